// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// From products of queries and keys to scores, and which scores there are.

#pragma once

#include "../attention.h"
#include "attention_math.h"
#include "attention_tile.h"

namespace {

using vllm_training::AttentionArguments;
using vllm_training::AttentionBlock;
using vllm_training::Band;
using vllm_training::kTile;

// From begin on, before end.
struct Range {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

// Whether some, or all, of the keys are visible to some, or all, of the
// queries.
inline bool any_visible(Band band, Range queries, Range keys) {
  return queries.end - 1 - keys.begin >= band.low &&
         queries.begin - (keys.end - 1) <= band.high;
}
inline bool all_visible(Band band, Range queries, Range keys) {
  return queries.begin - (keys.end - 1) >= band.low &&
         queries.end - 1 - keys.begin <= band.high;
}

// The part of a sequence, in whole tiles, that may be visible across the band
// from a tile: keys to queries, or with `mirrored` queries to keys.
inline Range visible_tiles(Band band, Range tile, int64_t length) {
  int64_t begin = tile.begin - band.high;
  int64_t end = tile.end - band.low;
  return {begin > 0 ? begin / kTile * kTile : 0, end < length ? end : length};
}
inline Band mirrored(Band band) { return {-band.high, -band.low}; }

inline Range tile_at(int64_t start, int64_t length) {
  return {start, start + kTile < length ? start + kTile : length};
}

// A tile of scores is [keys, queries]; the ranges of both are positions in the
// sequence. It is cut into cells, kPanel queries by kPanel keys, and a cell is
// computed if one of its keys is visible to one of its queries.
struct ScoreTile {
  Band band;
  Range queries;
  Range keys;

  // Positions in the sequence of the queries and the keys of a cell, and
  // perhaps beyond its end.
  Range panel_queries(int64_t panel) const { return part(queries, panel); }
  Range cell_keys(int64_t cell) const { return part(keys, cell); }

  // The number of a panel's vectors that have queries.
  int vectors(int64_t panel) const {
    const int64_t rest = queries.size() - panel * kPanel;
    return rest >= kPanel ? kPanelVectors : (rest + kLanes - 1) / kLanes;
  }

  int64_t panels() const { return (queries.size() + kPanel - 1) / kPanel; }
  int64_t cells() const { return (keys.size() + kPanel - 1) / kPanel; }

  // The keys, from the start of the tile, of a panel's computed cells.
  Range keys_of_panel(int64_t panel) const {
    Range cells_seen{0, cells()};
    auto seen = [&](int64_t cell) {
      return any_visible(band, part(queries, panel), part(keys, cell));
    };
    return shrink(cells_seen, seen, keys.size());
  }

  // The queries, likewise, for which the keys of a cell are computed.
  Range queries_of_cell(int64_t cell) const {
    Range panels_seeing{0, panels()};
    auto seen = [&](int64_t panel) {
      return any_visible(band, part(queries, panel), part(keys, cell));
    };
    return shrink(panels_seeing, seen, queries.size());
  }

 private:
  static Range part(Range whole, int64_t index) {
    int64_t begin = whole.begin + index * kPanel;
    return {begin, begin + kPanel};
  }

  template <class Seen>
  static Range shrink(Range parts, const Seen& seen, int64_t size) {
    while (parts.begin < parts.end && !seen(parts.begin)) ++parts.begin;
    while (parts.begin < parts.end && !seen(parts.end - 1)) --parts.end;
    int64_t end = parts.end * kPanel;
    return {parts.begin * kPanel, end < size ? end : size};
  }
};

// Scores of one head. A product is that of a key and a query times the scale.
struct Scores {
  float soft_cap;  // 0: none
  float alibi_slope;
  float low;
  float high;

  Scores(const AttentionArguments& a, int64_t head)
      : soft_cap(a.soft_cap),
        alibi_slope(a.alibi_slopes ? a.alibi_slopes[head] : 0.0f),
        low(static_cast<float>(a.band.low)),
        high(static_cast<float>(a.band.high)) {}

  // Whether scores are the products, and all are visible.
  bool plain(const ScoreTile& tile, int64_t panel, int64_t cell) const {
    return soft_cap == 0 && alibi_slope == 0 &&
           all_visible(tile.band, tile.panel_queries(panel),
                       tile.cell_keys(cell));
  }

  // The score of a product of a query and a key that is `distance` before it;
  // minus infinity if the key is not visible. `slope` becomes the derivative by
  // the product.
  Vec operator()(Vec product, Vec distance, Vec& slope) const {
    Vec score = product;
    if (soft_cap > 0) {
      Vec t = tanh(product / soft_cap);
      slope = 1.0f - t * t;
      score = t * soft_cap;
    } else {
      slope = broadcast(1.0f);
    }
    score -= alibi_slope * absolute(distance);
    Vec masked = broadcast(-__builtin_inff());
    score = distance >= low ? score : masked;
    return distance <= high ? score : masked;
  }
};

// Calls work(cell, its keys in the tile) for the cells of some keys of a panel.
template <class Work>
void for_cells(Range keys, const Work& work) {
  for (int64_t begin = keys.begin; begin < keys.end; begin += kPanel) {
    const int64_t end = begin + kPanel;
    work(begin / kPanel, Range{begin, end < keys.end ? end : keys.end});
  }
}

// The positions of a panel's queries minus that of the key at the tile's start.
inline void first_distances(const ScoreTile& tile, int64_t panel,
                            Vec* distances) {
  float difference =
      static_cast<float>(tile.panel_queries(panel).begin - tile.keys.begin);
  for (int v = 0; v < kPanelVectors; ++v) {
    for (int lane = 0; lane < kLanes; ++lane) {
      distances[v][lane] = difference + static_cast<float>(v * kLanes + lane);
    }
  }
}

// Calls work(zero of the dtype, block, head) for units of work.
template <class Work>
void for_units(const AttentionArguments& a, int64_t heads, int64_t begin,
               int64_t end, const Work& work) {
  for_dtype(a.dtype, [&](auto zero) {
    for (int64_t unit = begin; unit < end; ++unit) {
      work(zero, a.blocks[unit / heads], unit % heads);
    }
  });
}

}  // namespace
