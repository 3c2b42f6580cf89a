// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#pragma once

#include "../logprobs.h"
#include "vector.h"

namespace {

// What all columns of a row share.
struct LogitsGradientRow {
  float temperature;
  float lse;
  int64_t target;
  float grad;
  float entropy;
  float grad_entropy;
};

// The gradient at the columns from `column` on.
template <bool kEntropy>
inline Vec logits_gradient_at(const LogitsGradientRow& row, Vec logits,
                              VecInt lanes, int64_t column) {
  Vec logprobs = logits / row.temperature - row.lse;
  Vec slope = broadcast(row.grad);
  if constexpr (kEntropy) {
    // Where the probability is 0 in any dtype; times -inf it would be NaN.
    Vec lowest = broadcast(-1000.0f);
    Vec finite = logprobs < lowest ? lowest : logprobs;
    slope += row.grad_entropy * (finite + row.entropy);
  }
  Vec gradient = -exp(logprobs) * slope;
  int64_t lane = row.target - column;
  if (lane < 0 || lane >= kLanes) return gradient;
  return lanes == static_cast<int32_t>(lane) ? gradient + row.grad : gradient;
}

template <bool kEntropy, class T, class U>
void logits_gradient_row(const LogitsGradientRow& row, const T* logits,
                         U* output, int64_t size) {
  VecInt lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store(output + i,
          logits_gradient_at<kEntropy>(row, load(logits + i), lanes, i));
  }
  if (int64_t rest = size - i) {
    Vec some = load_some(logits + i, rest);
    store_some(output + i, logits_gradient_at<kEntropy>(row, some, lanes, i),
               rest);
  }
}

template <class T, class U>
void logits_gradient_rows(const vllm_training::LogitsGradientArguments& a,
                          int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* logits = static_cast<const T*>(a.logits) + i * a.logits_stride;
    U* output = static_cast<U*>(a.output) + i * a.size;
    LogitsGradientRow row{1.0f, a.lse[i], a.targets[i], a.grad[i], 0.0f, 0.0f};
    if (a.temperature != nullptr) row.temperature = a.temperature[i];
    if (a.grad_entropy != nullptr) {
      row.entropy = a.entropy[i];
      row.grad_entropy = a.grad_entropy[i];
      logits_gradient_row<true>(row, logits, output, a.size);
    } else {
      logits_gradient_row<false>(row, logits, output, a.size);
    }
  }
}

void logits_gradient(const vllm_training::LogitsGradientArguments& a,
                     int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.output_dtype == a.dtype) {
      logits_gradient_rows<T, T>(a, begin, end);
    } else {
      logits_gradient_rows<T, float>(a, begin, end);
    }
  });
}

}  // namespace
