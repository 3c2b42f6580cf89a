// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#include "norm.h"

#include <optional>
#include <tuple>

#include "kernels.h"
#include "tensors.h"

namespace vllm_training {
namespace {

// A tensor is a matrix whose rows are contiguous, or contiguous.
int64_t size_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

int64_t count_rows(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) rows *= tensor.size(dim);
  return rows;
}

NormRows rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(),
          tensor.dim() == 2 ? tensor.stride(0) : size_of(tensor)};
}

Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes,
                                  torch::headeronly::ScalarType::Float);
}

float* floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// The number of rows whose share of a weight's gradient is summed in one piece.
// It depends on the number of rows alone, so that the result does.
int64_t block_rows_of(int64_t rows) {
  constexpr int64_t kMinRows = 16;
  constexpr int64_t kMaxBlocks = 64;
  const int64_t block_rows = (rows + kMaxBlocks - 1) / kMaxBlocks;
  return block_rows > kMinRows ? block_rows : kMinRows;
}

// Fills output, rstd, and sum where there is a residual.
void forward(const Tensor& input, const Tensor* residual, const Tensor& weight,
             double eps, const Tensor& output, const Tensor* sum,
             const Tensor& rstd) {
  const int64_t rows = count_rows(input);
  const int64_t size = size_of(input);
  NormArguments arguments{
      .dtype = dtype_of(input),
      .weight_dtype = dtype_of(weight),
      .size = size,
      .input = rows_of(input),
      .residual = residual ? rows_of(*residual) : NormRows{},
      .weight = weight.const_data_ptr(),
      .eps = static_cast<float>(eps),
      .output = output.mutable_data_ptr(),
      .sum = sum ? sum->mutable_data_ptr() : nullptr,
      .rstd = floats(rstd),
  };
  parallel(rows, 2 * size, [&](int64_t begin, int64_t end) {
    kernels().rms_norm(arguments, begin, end);
  });
}

// input [..., size], weight [size] contiguous
// -> output of input's shape, rstd fp32 [rows]
std::tuple<Tensor, Tensor> rms_norm(const Tensor& input, const Tensor& weight,
                                    double eps) {
  Tensor output = torch::stable::new_empty(input, input.sizes());
  Tensor rstd = new_floats(input, {count_rows(input)});
  forward(input, nullptr, weight, eps, output, nullptr, rstd);
  return {output, rstd};
}

// Likewise of input + residual -> output, the sum in their dtype, rstd
std::tuple<Tensor, Tensor, Tensor> fused_add_rms_norm(const Tensor& input,
                                                      const Tensor& residual,
                                                      const Tensor& weight,
                                                      double eps) {
  Tensor output = torch::stable::new_empty(input, input.sizes());
  Tensor sum = torch::stable::new_empty(input, input.sizes());
  Tensor rstd = new_floats(input, {count_rows(input)});
  forward(input, &residual, weight, eps, output, &sum, rstd);
  return {output, sum, rstd};
}

// -> gradients of input, which is the sum if there was a residual, and of
// weight
std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad_output, const std::optional<Tensor>& grad_sum,
    const Tensor& input, const Tensor& weight, const Tensor& rstd) {
  const int64_t rows = count_rows(input);
  const int64_t size = size_of(input);
  const int64_t block_rows = block_rows_of(rows);
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  Tensor grad_input = torch::stable::new_empty(input, input.sizes());
  Tensor grad_weight = torch::stable::new_empty(weight, {size});
  Tensor block_grad_weights = new_floats(input, {blocks, size});
  NormBackwardArguments arguments{
      .dtype = dtype_of(input),
      .weight_dtype = dtype_of(weight),
      .rows = rows,
      .block_rows = block_rows,
      .size = size,
      .grad_output = rows_of(grad_output),
      .grad_sum = grad_sum ? rows_of(*grad_sum) : NormRows{},
      .input = rows_of(input),
      .weight = weight.const_data_ptr(),
      .rstd = static_cast<const float*>(rstd.const_data_ptr()),
      .grad_input = grad_input.mutable_data_ptr(),
      .block_grad_weights = floats(block_grad_weights),
  };
  parallel(blocks, 4 * block_rows * size, [&](int64_t begin, int64_t end) {
    kernels().rms_norm_backward(arguments, begin, end);
  });
  SumRowsArguments sum{
      .rows = floats(block_grad_weights),
      .count = blocks,
      .size = size,
      .output_dtype = dtype_of(weight),
      .output = grad_weight.mutable_data_ptr(),
  };
  parallel(size, blocks, [&](int64_t begin, int64_t end) {
    kernels().sum_rows(sum, begin, end);
  });
  return {grad_input, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_training, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace vllm_training
