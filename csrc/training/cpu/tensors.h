// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// What the ops need of torch's stable ABI.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dtype.h"

namespace vllm_training {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::kFloat32;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false,
                      "the kernels take float32, bfloat16 and float16 only");
  }
}

// Runs `work(begin, end)` over [0, count) on torch's threads. `cost` is about
// the number of elements that one item touches; less than 32k of them are not
// worth a thread.
template <class Work>
inline void parallel(int64_t count, int64_t cost, const Work& work) {
  int64_t grain = 32768 / (cost > 0 ? cost : 1);
  torch::stable::parallel_for(0, count, grain > 0 ? grain : 1, work);
}

}  // namespace vllm_training
