// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Compiled once for each instruction set, which TRAINING_ISA names.

#include "kernels.h"

#include "kernels/activation.h"
#include "kernels/attention_backward.h"
#include "kernels/attention_forward.h"
#include "kernels/logprobs.h"
#include "kernels/norm.h"
#include "kernels/rotary.h"

#define JOIN(a, b) a##b
#define TABLE_OF(isa) JOIN(kernels_, isa)

namespace vllm_training {

extern const Kernels TABLE_OF(TRAINING_ISA);
constexpr Kernels TABLE_OF(TRAINING_ISA) = {
    .attention_forward = attention_forward,
    .attention_backward_by_sequence = attention_backward_by_sequence,
    .attention_backward_by_queries = attention_backward_by_queries,
    .attention_backward_by_keys = attention_backward_by_keys,
    .attention_forward_workspace = attention_forward_workspace,
    .attention_backward_workspace = attention_backward_workspace,
    .logits_gradient = logits_gradient,
    .gated_activation = gated_activation,
    .gated_activation_backward = gated_activation_backward,
    .rms_norm = rms_norm,
    .rms_norm_backward = rms_norm_backward,
    .sum_rows = sum_rows,
    .rotary_embedding = rotary_embedding,
};

}  // namespace vllm_training
