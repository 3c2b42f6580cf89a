// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The forward of attention, with the online softmax of Milakov and Gimelshein
// (2018) as in FlashAttention (Dao et al., 2022): the output of a tile of
// queries is summed over tiles of keys, relative to the largest score so far.

#pragma once

#include "attention_scores.h"

namespace {

// Of the queries of a panel.
struct Softmax {
  Vec maximum[kPanelVectors];
  Vec sum[kPanelVectors];  // of e^(score - maximum)
};

// A sink is a score whose value is zero.
inline Softmax first_softmax(const float* sink) {
  Softmax softmax;
  for (int v = 0; v < kPanelVectors; ++v) {
    float score = sink ? *sink : -__builtin_inff();
    softmax.maximum[v] = broadcast(score);
    softmax.sum[v] = broadcast(score == -__builtin_inff() ? 0.0f : 1.0f);
  }
  return softmax;
}

// Makes products [keys, kPanel] into scores.
inline void products_to_scores(const Scores& scores, const ScoreTile& tile,
                               int64_t panel, Range keys, float* products) {
  Vec distances[kPanelVectors];
  first_distances(tile, panel, distances);
  for_cells(keys, [&](int64_t cell, Range part) {
    if (scores.plain(tile, panel, cell)) return;
    for (int64_t key = part.begin; key < part.end; ++key) {
      for (int v = 0; v < tile.vectors(panel); ++v) {
        float* at = products + (key - keys.begin) * kPanel + v * kLanes;
        Vec slope;
        store(at,
              scores(load(at), distances[v] - static_cast<float>(key), slope));
      }
    }
  });
}

// Makes scores [keys, kPanel] into e^(score - maximum). `factors` becomes what
// sums under the last maximum are to be multiplied by. Where every score so far
// is minus infinity, so is the maximum, and they are taken relative to 0.
inline void next_softmax(int64_t keys, int vectors, float* scores,
                         Softmax& softmax, Vec* factors) {
  for (int v = 0; v < vectors; ++v) {
    float* const column = scores + v * kLanes;
    Vec largest = softmax.maximum[v];
    for (int64_t key = 0; key < keys; ++key) {
      Vec score = load(column + key * kPanel);
      largest = score > largest ? score : largest;
    }
    Vec origin = largest == -__builtin_inff() ? Vec{} : largest;
    Vec sum{};
    for (int64_t key = 0; key < keys; ++key) {
      float* at = column + key * kPanel;
      Vec power = exp_below_88(load(at) - origin);
      store(at, power);
      sum += power;
    }
    factors[v] = exp_below_88(softmax.maximum[v] - origin);
    softmax.maximum[v] = largest;
    softmax.sum[v] = softmax.sum[v] * factors[v] + sum;
  }
}

struct ForwardWorkspace {
  float* key;       // [kTile, row_stride]
  float* value;     // likewise
  float* rows;      // likewise, of queries, then of the output
  float* query;     // panels
  float* output;    // panels, not yet divided by the sums
  float* products;  // [kTile, kPanel]

  ForwardWorkspace(float* memory, int64_t head_size)
      : key(take(memory, kTile * row_stride(head_size))),
        value(take(memory, kTile * row_stride(head_size))),
        rows(take(memory, kTile * row_stride(head_size))),
        query(take(memory, kTile * head_size)),
        output(take(memory, kTile * head_size)),
        products(take(memory, kTile * kPanel)) {}
};

int64_t attention_forward_workspace(int64_t head_size) {
  return kTile * (3 * row_stride(head_size) + 2 * head_size + kPanel);
}

// Divides by the sums and writes the logarithms of the sums.
inline void finish(const AttentionArguments& a, const AttentionBlock& block,
                   int64_t head, const ScoreTile& tile, Softmax* softmax,
                   const ForwardWorkspace& w) {
  for (int64_t panel = 0; panel < tile.panels(); ++panel) {
    Softmax& of = softmax[panel];
    float sums[kPanel], maxima[kPanel];
    for (int v = 0; v < kPanelVectors; ++v) {
      store(sums + v * kLanes, of.sum[v]);
      store(maxima + v * kLanes, of.maximum[v]);
      of.sum[v] = 1.0f / of.sum[v];
    }
    float* output = w.output + panel * a.head_size * kPanel;
    for (int64_t i = 0; a.output && i < a.head_size; ++i, output += kPanel) {
      for (int v = 0; v < kPanelVectors; ++v) {
        store(output + v * kLanes, load(output + v * kLanes) * of.sum[v]);
      }
    }
    Range queries = tile.panel_queries(panel);
    float* lse = a.lse + head * a.num_tokens + block.begin + queries.begin;
    for (int64_t i = 0; i < kPanel && queries.begin + i < block.length; ++i) {
      // With an infinite score the sum is NaN, the log-sum-exp infinite, as in
      // torch.
      lse[i] = maxima[i] < __builtin_inff()
                   ? maxima[i] + __builtin_logf(sums[i])
                   : maxima[i];
    }
  }
}

template <class T>
void attention_forward_tile(const AttentionArguments& a,
                            const AttentionBlock& block, int64_t head) {
  const int64_t size = a.head_size, stride = row_stride(size);
  const int64_t kv_head = head / (a.num_heads / a.num_kv_heads);
  const ForwardWorkspace w(a.workspace, size);
  const Scores scores(a, head);
  Softmax softmax[kPanels];
  for (auto& of : softmax)
    of = first_softmax(a.sinks ? a.sinks + head : nullptr);

  const Range queries = tile_at(block.start, block.length);
  load_rows<T>(a.query, block.begin + queries.begin, head, queries.size(), size,
               w.rows);
  rows_to_panels(w.rows, queries.size(), size, a.scale, w.query);
  __builtin_memset(w.output, 0, kTile * size * sizeof(float));

  const Range visible = visible_tiles(a.band, queries, block.length);
  for (int64_t start = visible.begin; start < visible.end; start += kTile) {
    const ScoreTile tile{a.band, queries, tile_at(start, block.length)};
    load_rows<T>(a.key, block.begin + start, kv_head, tile.keys.size(), size,
                 w.key);
    if (a.output) {
      load_rows<T>(a.value, block.begin + start, kv_head, tile.keys.size(),
                   size, w.value);
    }
    for (int64_t panel = 0; panel < tile.panels(); ++panel) {
      const Range keys = tile.keys_of_panel(panel);
      if (keys.size() <= 0) continue;
      const int vectors = tile.vectors(panel);
      multiply_panel(vectors, Left<false>{w.key + keys.begin * stride, stride},
                     keys.size(), w.query + panel * size * kPanel, kPanel,
                     w.products, kPanel, size, Assign{});
      products_to_scores(scores, tile, panel, keys, w.products);
      Vec factors[kPanelVectors];
      next_softmax(keys.size(), vectors, w.products, softmax[panel], factors);
      if (!a.output) continue;
      auto rescale = [&](float* to, int v, Vec sum) {
        store(to, load(to) * factors[v] + sum);
      };
      multiply_panel(vectors, Left<true>{w.value + keys.begin * stride, stride},
                     size, w.products, kPanel, w.output + panel * size * kPanel,
                     kPanel, keys.size(), rescale);
    }
  }

  finish(a, block, head, {a.band, queries, {}}, softmax, w);
  if (!a.output) return;
  panels_to_rows(w.output, queries.size(), size, w.rows);
  store_rows<T>(w.rows, 1.0f, queries.size(), size, a.output,
                block.begin + queries.begin, a.num_heads, head);
}

void attention_forward(const AttentionArguments& a, int64_t begin,
                       int64_t end) {
  for_units(a, a.num_heads, begin, end,
            [&](auto zero, auto& block, int64_t head) {
              attention_forward_tile<decltype(zero)>(a, block, head);
            });
}

}  // namespace
