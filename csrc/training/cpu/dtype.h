// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#pragma once

namespace vllm_training {

// The dtypes that kernels compute with; all accumulate in fp32.
enum class DType { kFloat32, kBFloat16, kFloat16 };

}  // namespace vllm_training
