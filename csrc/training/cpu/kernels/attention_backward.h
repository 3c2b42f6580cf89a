// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The backward of attention. With P the probabilities, O the output, L the
// log-sum-exp:
//   P = exp(S - L)    dP = dO V^T    dS = P (dP - rowsum(dO O)) ds/d(product)
//   dV = P^T dO       dK = dS^T Q    dQ = dS K
// A tile's P and dS are computed from Q, K, V, dO, O and L alone, and every
// gradient is summed over tiles in the order of heads and positions. So its
// bits do not depend on whether all three are computed in one pass over a
// sequence, which computes a tile of scores once, or in one pass for dQ and one
// for dK and dV, which have more units of work.

#pragma once

#include "attention_scores.h"

namespace {

struct BackwardWorkspace {
  float* key;            // [kTile, row_stride]
  float* value;          // likewise
  float* query;          // likewise
  float* grad_output;    // likewise
  float* rows;           // likewise, of the output, then of a gradient
  float* query_panels;   // panels, of query times the scale
  float* grad_panels;    // panels, of grad_output
  float* output_panels;  // panels
  float* grad_query;     // panels
  float* probabilities;  // [kTile, kTile]
  float* grad_scores;    // likewise
  float* lse;            // [kTile]
  float* delta;          // [kTile], rowsum(dO O)
  float* grad_key;       // [keys, row_stride]
  float* grad_value;     // likewise

  BackwardWorkspace(float* memory, int64_t head_size, int64_t keys)
      : key(take(memory, kTile * row_stride(head_size))),
        value(take(memory, kTile * row_stride(head_size))),
        query(take(memory, kTile * row_stride(head_size))),
        grad_output(take(memory, kTile * row_stride(head_size))),
        rows(take(memory, kTile * row_stride(head_size))),
        query_panels(take(memory, kTile * head_size)),
        grad_panels(take(memory, kTile * head_size)),
        output_panels(take(memory, kTile * head_size)),
        grad_query(take(memory, kTile * head_size)),
        probabilities(take(memory, kTile * kTile)),
        grad_scores(take(memory, kTile * kTile)),
        lse(take(memory, kTile)),
        delta(take(memory, kTile)),
        grad_key(take(memory, keys * row_stride(head_size))),
        grad_value(take(memory, keys * row_stride(head_size))) {}
};

int64_t attention_backward_workspace(int64_t head_size, int64_t keys) {
  return kTile * (5 * row_stride(head_size) + 4 * head_size + 2 * kTile + 2) +
         2 * keys * row_stride(head_size);
}

template <class T>
void load_queries(const AttentionArguments& a, const AttentionBlock& block,
                  Range queries, int64_t head, const BackwardWorkspace& w) {
  const int64_t size = a.head_size, token = block.begin + queries.begin;
  const int64_t count = queries.size();
  load_rows<T>(a.query, token, head, count, size, w.query);
  rows_to_panels(w.query, count, size, a.scale, w.query_panels);
  load_rows<T>(a.grad_output, token, head, count, size, w.grad_output);
  rows_to_panels(w.grad_output, count, size, 1.0f, w.grad_panels);
  load_rows<T>(a.saved_output, token, head, count, size, w.rows);
  rows_to_panels(w.rows, count, size, 1.0f, w.output_panels);
  // In the order of the products with values: where a query sees a single key,
  // dP is delta to the bit and dS is 0.
  for (int64_t query = 0; query < count; query += kLanes) {
    const int64_t at = query / kPanel * size * kPanel + query % kPanel;
    Vec sum{};
    for (int64_t i = 0; i < size; ++i) {
      sum += load(w.output_panels + at + i * kPanel) *
             load(w.grad_panels + at + i * kPanel);
    }
    store(w.delta + query, sum);
  }
  const float* lse = a.lse + head * a.num_tokens + token;
  for (int64_t i = 0; i < kTile; ++i) w.lse[i] = i < count ? lse[i] : 0.0f;
}

template <class T>
void load_keys(const AttentionArguments& a, const AttentionBlock& block,
               Range keys, int64_t kv_head, const BackwardWorkspace& w) {
  const int64_t token = block.begin + keys.begin;
  load_rows<T>(a.key, token, kv_head, keys.size(), a.head_size, w.key);
  load_rows<T>(a.value, token, kv_head, keys.size(), a.head_size, w.value);
}

// Makes products and dP of a panel into P and dS.
template <bool kPlain>
void next_gradients(const Scores& scores, const ScoreTile& tile, int64_t panel,
                    Range keys, const BackwardWorkspace& w) {
  Vec distances[kPanelVectors];
  first_distances(tile, panel, distances);
  for (int v = 0; v < tile.vectors(panel); ++v) {
    const int64_t query = panel * kPanel + v * kLanes;
    const Vec lse = load(w.lse + query), delta = load(w.delta + query);
    float* probability = w.probabilities + keys.begin * kTile + query;
    float* grad_score = w.grad_scores + keys.begin * kTile + query;
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      Vec score = load(probability);
      Vec slope;
      if (!kPlain) {
        score = scores(score, distances[v] - static_cast<float>(key), slope);
      }
      Vec power = exp_below_88(score - lse);
      Vec grad = power * (load(grad_score) - delta);
      if (!kPlain) grad = score == -__builtin_inff() ? Vec{} : grad * slope;
      store(probability, power);
      store(grad_score, grad);
      probability += kTile;
      grad_score += kTile;
    }
  }
}

// P and dS of the cells that are visible.
inline void compute_scores(const Scores& scores, const ScoreTile& tile,
                           int64_t head_size, const BackwardWorkspace& w) {
  const int64_t stride = row_stride(head_size);
  for (int64_t panel = 0; panel < tile.panels(); ++panel) {
    const Range keys = tile.keys_of_panel(panel);
    if (keys.size() <= 0) continue;
    const int64_t first = keys.begin * kTile + panel * kPanel;
    auto products = [&](const float* left, const float* panels, float* to) {
      multiply_panel(tile.vectors(panel),
                     Left<false>{left + keys.begin * stride, stride},
                     keys.size(), panels + panel * head_size * kPanel, kPanel,
                     to + first, kTile, head_size, Assign{});
    };
    products(w.key, w.query_panels, w.probabilities);
    products(w.value, w.grad_panels, w.grad_scores);
    for_cells(keys, [&](int64_t cell, Range part) {
      auto next = scores.plain(tile, panel, cell) ? next_gradients<true>
                                                  : next_gradients<false>;
      next(scores, tile, panel, part, w);
    });
  }
}

inline void add_grad_query(const ScoreTile& tile, int64_t head_size,
                           const BackwardWorkspace& w) {
  const int64_t stride = row_stride(head_size);
  for (int64_t panel = 0; panel < tile.panels(); ++panel) {
    const Range keys = tile.keys_of_panel(panel);
    if (keys.size() <= 0) continue;
    multiply_panel(
        tile.vectors(panel), Left<true>{w.key + keys.begin * stride, stride},
        head_size, w.grad_scores + keys.begin * kTile + panel * kPanel, kTile,
        w.grad_query + panel * head_size * kPanel, kPanel, keys.size(), Add{});
  }
}

// sums [keys, head_size] += left [keys, queries] @ right [queries, head_size]
inline void add_over_queries(const ScoreTile& tile, int64_t head_size,
                             const float* left, const float* right,
                             float* sums) {
  const int64_t stride = row_stride(head_size);
  auto columns = [&](auto rows, auto vectors, int64_t column) {
    for (int64_t cell = 0; cell < tile.cells(); ++cell) {
      const Range queries = tile.queries_of_cell(cell);
      if (queries.size() <= 0) continue;
      const int64_t key = cell * kPanel, rest = tile.keys.size() - key;
      multiply<decltype(rows){}() * kWide, decltype(vectors){}()>(
          Left<false>{left + key * kTile + queries.begin, kTile},
          rest < kPanel ? rest : kPanel,
          right + queries.begin * stride + column, stride,
          sums + key * stride + column, stride, queries.size(), Add{});
    }
  };
  int64_t column = 0;
  for (; column + 2 * kLanes <= padded(head_size); column += 2 * kLanes) {
    columns(Constant<6>{}, Constant<2>{}, column);
  }
  if (column < head_size) columns(Constant<8>{}, Constant<1>{}, column);
}

// Adds to the gradients of a tile's keys and values, rows `first` of those in
// the workspace.
inline void add_grad_key_value(const ScoreTile& tile, int64_t head_size,
                               int64_t first, const BackwardWorkspace& w) {
  const int64_t offset = first * row_stride(head_size);
  add_over_queries(tile, head_size, w.grad_scores, w.query,
                   w.grad_key + offset);
  add_over_queries(tile, head_size, w.probabilities, w.grad_output,
                   w.grad_value + offset);
}

inline void clear_grad_query(const AttentionArguments& a,
                             const BackwardWorkspace& w) {
  __builtin_memset(w.grad_query, 0, kTile * a.head_size * sizeof(float));
}

inline void clear_grad_key_value(const AttentionArguments& a, int64_t keys,
                                 const BackwardWorkspace& w) {
  const size_t bytes = keys * row_stride(a.head_size) * sizeof(float);
  __builtin_memset(w.grad_key, 0, bytes);
  __builtin_memset(w.grad_value, 0, bytes);
}

template <class T>
void store_grad_query(const AttentionArguments& a, const AttentionBlock& block,
                      Range queries, int64_t head, const BackwardWorkspace& w) {
  panels_to_rows(w.grad_query, queries.size(), a.head_size, w.rows);
  store_rows<T>(w.rows, a.scale, queries.size(), a.head_size, a.grad_query,
                block.begin + queries.begin, a.num_heads, head);
}

template <class T>
void store_grad_key_value(const AttentionArguments& a,
                          const AttentionBlock& block, Range keys,
                          int64_t kv_head, const BackwardWorkspace& w) {
  store_rows<T>(w.grad_key, a.scale, keys.size(), a.head_size, a.grad_key,
                block.begin + keys.begin, a.num_kv_heads, kv_head);
  store_rows<T>(w.grad_value, 1.0f, keys.size(), a.head_size, a.grad_value,
                block.begin + keys.begin, a.num_kv_heads, kv_head);
}

// All three gradients of a sequence, for one head of keys and values.
template <class T>
void attention_backward_sequence(const AttentionArguments& a,
                                 const AttentionBlock& block, int64_t kv_head) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const BackwardWorkspace w(a.workspace, a.head_size, block.length);
  clear_grad_key_value(a, block.length, w);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Scores scores(a, head);
    for (int64_t first = 0; first < block.length; first += kTile) {
      const Range queries = tile_at(first, block.length);
      load_queries<T>(a, block, queries, head, w);
      clear_grad_query(a, w);
      const Range visible = visible_tiles(a.band, queries, block.length);
      for (int64_t start = visible.begin; start < visible.end; start += kTile) {
        const ScoreTile tile{a.band, queries, tile_at(start, block.length)};
        load_keys<T>(a, block, tile.keys, kv_head, w);
        compute_scores(scores, tile, a.head_size, w);
        add_grad_query(tile, a.head_size, w);
        add_grad_key_value(tile, a.head_size, start, w);
      }
      store_grad_query<T>(a, block, queries, head, w);
    }
  }
  store_grad_key_value<T>(a, block, {0, block.length}, kv_head, w);
}

// The gradient of a tile of queries.
template <class T>
void attention_backward_queries(const AttentionArguments& a,
                                const AttentionBlock& block, int64_t head) {
  const BackwardWorkspace w(a.workspace, a.head_size, 0);
  const Scores scores(a, head);
  const int64_t kv_head = head / (a.num_heads / a.num_kv_heads);
  const Range queries = tile_at(block.start, block.length);
  load_queries<T>(a, block, queries, head, w);
  clear_grad_query(a, w);
  const Range visible = visible_tiles(a.band, queries, block.length);
  for (int64_t start = visible.begin; start < visible.end; start += kTile) {
    const ScoreTile tile{a.band, queries, tile_at(start, block.length)};
    load_keys<T>(a, block, tile.keys, kv_head, w);
    compute_scores(scores, tile, a.head_size, w);
    add_grad_query(tile, a.head_size, w);
  }
  store_grad_query<T>(a, block, queries, head, w);
}

// The gradients of a tile of keys and values.
template <class T>
void attention_backward_keys(const AttentionArguments& a,
                             const AttentionBlock& block, int64_t kv_head) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const BackwardWorkspace w(a.workspace, a.head_size, kTile);
  const Range keys = tile_at(block.start, block.length);
  load_keys<T>(a, block, keys, kv_head, w);
  clear_grad_key_value(a, kTile, w);
  const Range visible = visible_tiles(mirrored(a.band), keys, block.length);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const Scores scores(a, head);
    for (int64_t first = visible.begin; first < visible.end; first += kTile) {
      const ScoreTile tile{a.band, tile_at(first, block.length), keys};
      load_queries<T>(a, block, tile.queries, head, w);
      compute_scores(scores, tile, a.head_size, w);
      add_grad_key_value(tile, a.head_size, 0, w);
    }
  }
  store_grad_key_value<T>(a, block, keys, kv_head, w);
}

void attention_backward_by_sequence(const AttentionArguments& a, int64_t begin,
                                    int64_t end) {
  for_units(a, a.num_kv_heads, begin, end,
            [&](auto zero, auto& block, int64_t head) {
              attention_backward_sequence<decltype(zero)>(a, block, head);
            });
}

void attention_backward_by_queries(const AttentionArguments& a, int64_t begin,
                                   int64_t end) {
  for_units(a, a.num_heads, begin, end,
            [&](auto zero, auto& block, int64_t head) {
              attention_backward_queries<decltype(zero)>(a, block, head);
            });
}

void attention_backward_by_keys(const AttentionArguments& a, int64_t begin,
                                int64_t end) {
  for_units(a, a.num_kv_heads, begin, end,
            [&](auto zero, auto& block, int64_t head) {
              attention_backward_keys<decltype(zero)>(a, block, head);
            });
}

}  // namespace
