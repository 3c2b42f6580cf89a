// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#include "activation.h"

#include "kernels.h"
#include "tensors.h"

namespace vllm_training {
namespace {

// input [rows, 2 * size] with contiguous rows -> [rows, size]
Tensor forward(Activation activation, const Tensor& input) {
  const int64_t rows = input.size(0);
  const int64_t size = input.size(1) / 2;
  Tensor output = torch::stable::new_empty(input, {rows, size});
  GatedArguments arguments{
      .activation = activation,
      .dtype = dtype_of(input),
      .size = size,
      .input = input.const_data_ptr(),
      .input_stride = input.stride(0),
      .grad = nullptr,
      .grad_stride = 0,
      .output = output.mutable_data_ptr(),
  };
  parallel(rows, 2 * size, [&](int64_t begin, int64_t end) {
    kernels().gated_activation(arguments, begin, end);
  });
  return output;
}

// grad [rows, size] with contiguous rows and input -> gradient of input,
// contiguous
Tensor backward(Activation activation, const Tensor& grad,
                const Tensor& input) {
  const int64_t rows = input.size(0);
  const int64_t size = input.size(1) / 2;
  Tensor output = torch::stable::new_empty(input, {rows, 2 * size});
  GatedArguments arguments{
      .activation = activation,
      .dtype = dtype_of(input),
      .size = size,
      .input = input.const_data_ptr(),
      .input_stride = input.stride(0),
      .grad = grad.const_data_ptr(),
      .grad_stride = grad.stride(0),
      .output = output.mutable_data_ptr(),
  };
  parallel(rows, 4 * size, [&](int64_t begin, int64_t end) {
    kernels().gated_activation_backward(arguments, begin, end);
  });
  return output;
}

Activation gelu(bool tanh) {
  return tanh ? Activation::kGeluTanh : Activation::kGelu;
}

Tensor silu_and_mul(const Tensor& input) {
  return forward(Activation::kSilu, input);
}

Tensor silu_and_mul_backward(const Tensor& grad, const Tensor& input) {
  return backward(Activation::kSilu, grad, input);
}

Tensor gelu_and_mul(const Tensor& input, bool tanh) {
  return forward(gelu(tanh), input);
}

Tensor gelu_and_mul_backward(const Tensor& grad, const Tensor& input,
                             bool tanh) {
  return backward(gelu(tanh), grad, input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_training, CPU, library) {
  library.impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  library.impl("silu_and_mul_backward", TORCH_BOX(&silu_and_mul_backward));
  library.impl("gelu_and_mul", TORCH_BOX(&gelu_and_mul));
  library.impl("gelu_and_mul_backward", TORCH_BOX(&gelu_and_mul_backward));
}

}  // namespace vllm_training
