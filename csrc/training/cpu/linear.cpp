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

// The tensor in a dtype, contiguous, its one row `rows` times.
Tensor copied(const Tensor& tensor, int64_t rows, ScalarType dtype) {
  Tensor copy =
      torch::stable::new_empty(tensor, {rows, tensor.size(-1)}, dtype);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// input [rows, K], bias [N] in input's dtype, oneDNN's handle of a weight
// -> [rows, N] in input's dtype
Tensor packed_linear(const Tensor& input, const std::optional<Tensor>& bias,
                     const Tensor& handle, int64_t out_features, bool in_fp32) {
  const int64_t rows = input.size(0);
  const ScalarType dtype = in_fp32 ? ScalarType::Float : input.scalar_type();
  const bool casts = dtype != input.scalar_type();
  // oneDNN may have another kernel for one row.
  const int64_t multiplied = rows == 1 ? 2 : rows;
  const bool ready = !casts && multiplied == rows && input.is_contiguous();
  Tensor output =
      torch::stable::new_empty(input, {multiplied, out_features}, dtype);
  if (rows > 0) {
    std::optional<Tensor> added = bias;
    if (bias && casts) {
      added = torch::stable::new_empty(*bias, bias->sizes(), dtype);
      torch::stable::copy_(*added, *bias);
    }
    onednn_mm(output, ready ? input : copied(input, multiplied, dtype), added,
              handle);
  }
  if (multiplied != rows) output = torch::stable::narrow(output, 0, 0, rows);
  return casts ? copied(output, rows, input.scalar_type()) : output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_training, CPU, library) {
  library.impl("packed_linear", TORCH_BOX(&packed_linear));
}

}  // namespace vllm_training
