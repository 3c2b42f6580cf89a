// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#pragma once

#include <stdint.h>

#include "dtype.h"

namespace vllm_training {

struct LogitsGradientArguments {
  DType dtype;
  // [rows, size]; rows are logits_stride elements apart.
  const void* logits;
  int64_t logits_stride;
  int64_t size;
  // Each [rows]. A target outside [0, size) is not among the columns.
  const float* lse;
  const int64_t* targets;
  const float* grad;
  // Both null where the entropy has no gradient.
  const float* entropy;
  const float* grad_entropy;
  // Null for 1.
  const float* temperature;
  // [rows, size], contiguous, in fp32 or in the dtype of the logits.
  DType output_dtype;
  void* output;
};

}  // namespace vllm_training
