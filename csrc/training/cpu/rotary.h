// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#pragma once

#include <stdint.h>

#include "dtype.h"

namespace vllm_training {

// The heads of query or key.
struct RotaryHeads {
  // [num_tokens, num_heads, head_size], strides in elements, the last dim
  // contiguous.
  const void* input;
  int64_t token_stride;
  int64_t head_stride;
  // [num_tokens, num_heads, head_size], contiguous.
  void* output;
  int64_t num_heads;
};

struct RotaryArguments {
  DType dtype;
  RotaryHeads heads[2];
  int64_t head_size;
  // [num_tokens], each a row of the cache.
  const int64_t* positions;
  // [max_positions, rotary_dim], cosines in the first half.
  const float* cos_sin_cache;
  int64_t rotary_dim;
  bool is_neox_style;
  // Whether to rotate back: sines are negated.
  bool inverse;
};

}  // namespace vllm_training
