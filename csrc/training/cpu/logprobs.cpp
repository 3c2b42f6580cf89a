// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#include "logprobs.h"

#include <optional>

#include "kernels.h"
#include "tensors.h"

namespace vllm_training {
namespace {

using torch::headeronly::ScalarType;

const float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// logits [rows, size] with contiguous rows, all others [rows] -> [rows, size]
Tensor logits_gradient(const Tensor& logits, const Tensor& lse,
                       const Tensor& targets, const Tensor& grad,
                       const std::optional<Tensor>& entropy,
                       const std::optional<Tensor>& grad_entropy,
                       const std::optional<Tensor>& temperature,
                       ScalarType dtype) {
  const int64_t rows = logits.size(0);
  const int64_t size = logits.size(1);
  STD_TORCH_CHECK(dtype == logits.scalar_type() || dtype == ScalarType::Float,
                  "the gradient has the dtype of the logits or is float32");
  Tensor output = torch::stable::new_empty(logits, {rows, size}, dtype);
  LogitsGradientArguments arguments{
      dtype_of(logits),
      logits.const_data_ptr(),
      logits.stride(0),
      size,
      floats(lse),
      static_cast<const int64_t*>(targets.const_data_ptr()),
      floats(grad),
      floats(entropy),
      floats(grad_entropy),
      floats(temperature),
      dtype_of(output),
      output.mutable_data_ptr(),
  };
  // An exponential costs as much as touching several elements.
  parallel(rows, 4 * size, [&](int64_t begin, int64_t end) {
    kernels().logits_gradient(arguments, begin, end);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_training, CPU, library) {
  library.impl("logits_gradient", TORCH_BOX(&logits_gradient));
}

}  // namespace vllm_training
