// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Matrix products by vLLM's oneDNN op whose rows do not depend on their number.

#include <array>
#include <optional>

#include "tensors.h"

namespace vllm_training {
namespace {

using torch::headeronly::ScalarType;

// vLLM's op, of which the handle is a weight.
void onednn_mm(const Tensor& output, const Tensor& input,
               const std::optional<Tensor>& bias, const Tensor& handle) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(output), torch::stable::detail::from(input),
      torch::stable::detail::from(bias), torch::stable::detail::from(handle)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      "_C::onednn_mm", "", stack.data(), TORCH_ABI_VERSION));
}

// input [rows, K], bias [N] in input's dtype, of any strides, oneDNN's handle
// of a weight
// -> [rows, N] in input's dtype
Tensor packed_linear(const Tensor& input, const std::optional<Tensor>& bias,
                     const Tensor& handle, int64_t out_features, bool in_fp32) {
  const int64_t rows = input.size(0);
  const ScalarType dtype = in_fp32 ? ScalarType::Float : input.scalar_type();
  const bool casts = dtype != input.scalar_type();
  // oneDNN may have another kernel for one row.
  const int64_t multiplied = rows == 1 ? 2 : rows;
  Tensor output =
      torch::stable::new_empty(input, {multiplied, out_features}, dtype);
  if (rows > 0) {
    Tensor operand = input;
    // One column is contiguous with any stride, but not to oneDNN.
    const bool unit_stride = input.is_contiguous() && input.stride(1) == 1;
    if (casts || multiplied != rows || !unit_stride) {
      operand =
          torch::stable::new_empty(input, {multiplied, input.size(1)}, dtype);
      torch::stable::copy_(operand, input);
    }
    std::optional<Tensor> added = bias;
    if (added && casts) added = torch::stable::to(*added, dtype);
    // oneDNN would read past its elements.
    if (added && !added->is_contiguous()) {
      added = torch::stable::contiguous(*added);
    }
    onednn_mm(output, operand, added, handle);
  }
  if (multiplied != rows) output = torch::stable::narrow(output, 0, 0, rows);
  return casts ? torch::stable::to(output, input.scalar_type()) : output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_training, CPU, library) {
  library.impl("packed_linear", TORCH_BOX(&packed_linear));
}

}  // namespace vllm_training
