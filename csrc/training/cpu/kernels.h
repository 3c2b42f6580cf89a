// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The kernels that the library has one version of for each instruction set.

#pragma once

#include <stdint.h>

#include "activation.h"
#include "attention.h"
#include "logprobs.h"
#include "norm.h"
#include "rotary.h"

namespace vllm_training {

// A kernel does the items [begin, end) of its range, so that threads share the
// work; what an item computes does not depend on how they are shared.
template <class Arguments>
using Kernel = void (*)(const Arguments&, int64_t begin, int64_t end);

struct Kernels {
  Kernel<AttentionArguments> attention_forward;
  Kernel<AttentionArguments> attention_backward_by_sequence;
  Kernel<AttentionArguments> attention_backward_by_queries;
  Kernel<AttentionArguments> attention_backward_by_keys;
  // Floats that they need; the backward keeps gradients of that many keys.
  int64_t (*attention_forward_workspace)(int64_t head_size);
  int64_t (*attention_backward_workspace)(int64_t head_size, int64_t keys);
  Kernel<LogitsGradientArguments> logits_gradient;
  Kernel<GatedArguments> gated_activation;
  Kernel<GatedArguments> gated_activation_backward;
  Kernel<NormArguments> rms_norm;
  Kernel<NormBackwardArguments> rms_norm_backward;
  Kernel<SumRowsArguments> sum_rows;
  Kernel<RotaryArguments> rotary_embedding;
};

// The version for this machine.
const Kernels& kernels();

}  // namespace vllm_training
