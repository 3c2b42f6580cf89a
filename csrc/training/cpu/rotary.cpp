// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#include "rotary.h"

#include <tuple>

#include "kernels.h"
#include "tensors.h"

namespace vllm_training {
namespace {

// positions int64 [num_tokens], query [num_tokens, num_heads, head_size] and
// key with contiguous heads, cos_sin_cache fp32 [max_positions, rotary_dim] ->
// rotated query, key
std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& positions,
                                            const Tensor& query,
                                            const Tensor& key,
                                            const Tensor& cos_sin_cache,
                                            bool is_neox_style, bool inverse) {
  const int64_t num_tokens = query.size(0);
  const auto* rows = static_cast<const int64_t*>(positions.const_data_ptr());
  const int64_t max_positions = cos_sin_cache.size(0);
  for (int64_t token = 0; token < num_tokens; ++token) {
    STD_TORCH_CHECK(rows[token] >= 0 && rows[token] < max_positions,
                    "position ", rows[token], " of token ", token,
                    " is not one of 0 to ", max_positions - 1,
                    ", which cos_sin_cache holds");
  }
  Tensor rotated_query = torch::stable::new_empty(query, query.sizes());
  Tensor rotated_key = torch::stable::new_empty(key, key.sizes());
  RotaryArguments arguments{
      dtype_of(query),
      {{query.const_data_ptr(), query.stride(0), query.stride(1),
        rotated_query.mutable_data_ptr(), query.size(1)},
       {key.const_data_ptr(), key.stride(0), key.stride(1),
        rotated_key.mutable_data_ptr(), key.size(1)}},
      query.size(2),
      rows,
      static_cast<const float*>(cos_sin_cache.const_data_ptr()),
      cos_sin_cache.size(1),
      is_neox_style,
      inverse};
  const int64_t cost = (query.size(1) + key.size(1)) * query.size(2);
  parallel(num_tokens, cost, [&](int64_t begin, int64_t end) {
    kernels().rotary_embedding(arguments, begin, end);
  });
  return {rotated_query, rotated_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_training, CPU, library) {
  library.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
}

}  // namespace vllm_training
