// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#pragma once

#include <stdint.h>

#include "dtype.h"

namespace vllm_training {

enum class Activation { kSilu, kGelu, kGeluTanh };

// An item is a row.
struct GatedArguments {
  Activation activation;
  DType dtype;
  int64_t size;
  // [rows, 2 * size], gate in the first half; rows are input_stride elements
  // apart.
  const void* input;
  int64_t input_stride;
  // [rows, size]; of the backward alone.
  const void* grad;
  int64_t grad_stride;
  // Contiguous: [rows, size], of the backward [rows, 2 * size].
  void* output;
};

}  // namespace vllm_training
