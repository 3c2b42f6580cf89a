// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Attention over packed sequences. Kernels compute it in tiles of kTile queries
// by kTile keys, aligned to the start of the sequence, and keep a few tiles in
// a workspace, never a whole matrix of scores.

#pragma once

#include <stdint.h>

#include "dtype.h"

namespace vllm_training {

// A multiple of a panel (kernels/attention_tile.h) of each instruction set.
constexpr int64_t kTile = 96;

// A key is visible to a query if its position in the sequence is `low` to
// `high` before the query's.
struct Band {
  int64_t low;
  int64_t high;
};

// [num_tokens, heads, head_size]; the last dimension is contiguous.
struct AttentionInput {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

// What one unit of work covers, for one head: a tile of a sequence, or all of
// it.
struct AttentionBlock {
  int64_t begin;   // the sequence's first token
  int64_t length;  // of the sequence
  int64_t start;   // of the tile, in the sequence
};

struct AttentionArguments {
  DType dtype;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_size;
  AttentionInput query;
  AttentionInput key;
  AttentionInput value;
  const float* sinks;         // [num_heads] or null
  const float* alibi_slopes;  // [num_heads] or null
  float scale;
  Band band;
  float soft_cap;  // 0: none
  float* lse;      // [num_heads, num_tokens]
  void* output;    // [num_tokens, num_heads, head_size], contiguous; null: lse
                   // alone

  // Of the backward alone.
  AttentionInput grad_output;
  AttentionInput saved_output;
  void* grad_query;  // these three are contiguous
  void* grad_key;
  void* grad_value;

  // Unit u is block u / heads for head u % heads, where heads is num_heads for
  // the kernels by query tile and num_kv_heads for the others.
  const AttentionBlock* blocks;
  float* workspace;  // of this thread, aligned to a cache line
};

}  // namespace vllm_training
