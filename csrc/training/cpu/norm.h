// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#pragma once

#include <stdint.h>

#include "dtype.h"

namespace vllm_training {

// [rows, size]; rows are `stride` elements apart.
struct NormRows {
  const void* data;
  int64_t stride;
};

// An item is a row.
struct NormArguments {
  DType dtype;
  DType weight_dtype;
  int64_t size;
  NormRows input;
  NormRows residual;   // added to input; null: nothing
  const void* weight;  // [size]
  float eps;
  void* output;  // [rows, size], contiguous; so is sum
  void* sum;     // of input and residual
  float* rstd;   // [rows]
};

// An item is a block of block_rows rows.
struct NormBackwardArguments {
  DType dtype;
  DType weight_dtype;
  int64_t rows;
  int64_t block_rows;
  int64_t size;
  NormRows grad_output;
  NormRows grad_sum;  // added to the gradient of input; null: nothing
  NormRows input;
  const void* weight;         // [size]
  const float* rstd;          // [rows]
  void* grad_input;           // [rows, size], contiguous
  float* block_grad_weights;  // [blocks, size], contiguous
};

// An item is a column.
struct SumRowsArguments {
  const float* rows;  // [count, size], contiguous
  int64_t count;
  int64_t size;
  DType output_dtype;
  void* output;  // [size]
};

}  // namespace vllm_training
