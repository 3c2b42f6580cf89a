// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#pragma once

#include "../norm.h"
#include "vector.h"

namespace {

using vllm_training::NormArguments;
using vllm_training::NormBackwardArguments;
using vllm_training::NormRows;
using vllm_training::SumRowsArguments;

template <class T>
inline const T* row_of(NormRows rows, int64_t row) {
  return rows.data ? static_cast<const T*>(rows.data) + row * rows.stride
                   : nullptr;
}

// Returns rstd. With a residual, which is null for none, what is normalised is
// the sum, rounded to its type. The normalised value is rounded to the weight's
// type, multiplied by it, rounded to that type again, and then to x's.
template <class T, class W>
float rms_norm_row(const T* x, const T* residual, const W* weight, float eps,
                   T* output, T* sum, int64_t size) {
  const float squares = sum_vectors(size, [&](int64_t i, auto lanes) {
    Vec value = load_some(x + i, lanes);
    if (residual) {
      value = rounded_to(T{}, value + load_some(residual + i, lanes));
      store_some(sum + i, value, lanes);
    }
    return value * value;
  });
  const T* normed = residual ? sum : x;
  const float rstd = 1.0f / __builtin_sqrtf(squares / size + eps);
  by_vectors(size, [&](int64_t i, auto lanes) {
    Vec normalised = rounded_to(W{}, load_some(normed + i, lanes) * rstd);
    Vec value = rounded_to(W{}, normalised * load_some(weight + i, lanes));
    store_some(output + i, value, lanes);
  });
  return rstd;
}

void rms_norm(const NormArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_dtype(a.weight_dtype, [&](auto weight_zero) {
      using W = decltype(weight_zero);
      for (int64_t row = begin; row < end; ++row) {
        a.rstd[row] = rms_norm_row(
            row_of<T>(a.input, row), row_of<T>(a.residual, row),
            static_cast<const W*>(a.weight), a.eps,
            static_cast<T*>(a.output) + row * a.size,
            a.residual.data ? static_cast<T*>(a.sum) + row * a.size : nullptr,
            a.size);
      }
    });
  });
}

// With the normalised n = x rstd and g = grad_output weight, the gradient of x
// is rstd (g - n mean(g n)), and that of weight the sum over rows of
// grad_output n.
template <class T, class W>
void rms_norm_backward_row(const T* grad_output, const T* grad_sum, const T* x,
                           const W* weight, float rstd, T* grad_x,
                           float* grad_weight, int64_t size) {
  const float products = sum_vectors(size, [&](int64_t i, auto lanes) {
    Vec g = load_some(grad_output + i, lanes) * load_some(weight + i, lanes);
    return g * (load_some(x + i, lanes) * rstd);
  });
  const float mean = products / size;
  by_vectors(size, [&](int64_t i, auto lanes) {
    Vec grad = load_some(grad_output + i, lanes);
    Vec normalised = load_some(x + i, lanes) * rstd;
    Vec sum = load_some(grad_weight + i, lanes) + grad * normalised;
    store_some(grad_weight + i, sum, lanes);
    Vec g = grad * load_some(weight + i, lanes);
    Vec value = (g - normalised * mean) * rstd;
    if (grad_sum) value += load_some(grad_sum + i, lanes);
    store_some(grad_x + i, value, lanes);
  });
}

void rms_norm_backward(const NormBackwardArguments& a, int64_t begin,
                       int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_dtype(a.weight_dtype, [&](auto weight_zero) {
      using W = decltype(weight_zero);
      for (int64_t block = begin; block < end; ++block) {
        float* grad_weight = a.block_grad_weights + block * a.size;
        __builtin_memset(grad_weight, 0, a.size * sizeof(float));
        const int64_t first = block * a.block_rows;
        const int64_t last = first + a.block_rows;
        for (int64_t row = first; row < last && row < a.rows; ++row) {
          rms_norm_backward_row(
              row_of<T>(a.grad_output, row), row_of<T>(a.grad_sum, row),
              row_of<T>(a.input, row), static_cast<const W*>(a.weight),
              a.rstd[row], static_cast<T*>(a.grad_input) + row * a.size,
              grad_weight, a.size);
        }
      }
    });
  });
}

void sum_rows(const SumRowsArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.output_dtype, [&](auto zero) {
    using T = decltype(zero);
    by_vectors(end - begin, [&](int64_t i, auto lanes) {
      const float* column = a.rows + begin + i;
      Vec sum = {};
      for (int64_t row = 0; row < a.count; ++row) {
        sum += load_some(column + row * a.size, lanes);
      }
      store_some(static_cast<T*>(a.output) + begin + i, sum, lanes);
    });
  });
}

}  // namespace
