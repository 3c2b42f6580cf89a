// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Matrix products of attention's tiles, and what brings tiles into fp32 and
// back.
//
// Tiles of scores are transposed, [keys, queries]: a vector's lanes are
// queries, so that the softmax over keys is vector by vector, and the keys and
// values of a product are scalars that need no packing. Queries are cut into
// panels, which fill the registers of a product.

#pragma once

#include "../attention.h"
#include "vector.h"

namespace {

constexpr int kPanelVectors = 3;
constexpr int64_t kPanel = kPanelVectors * kLanes;
constexpr int64_t kPanels = vllm_training::kTile / kPanel;
static_assert(kPanels * kPanel == vllm_training::kTile);

// How many times the registers of AVX2 there are.
constexpr int kWide = kLanes == 16 ? 2 : 1;

template <int kNumber>
struct Constant {
  constexpr int operator()() const { return kNumber; }
};

// A left operand, [rows, depth] or, if transposed, [depth, rows].
template <bool kTransposed>
struct Left {
  const float* data;
  int64_t stride;

  const float* at(int64_t row, int64_t k) const {
    return kTransposed ? data + k * stride + row : data + row * stride + k;
  }
};

// What becomes of the sums of a product: each of these takes the address of a
// vector, its number in the row, and the sums.
struct Assign {
  void operator()(float* to, int, Vec sum) const { store(to, sum); }
};
struct Add {
  void operator()(float* to, int, Vec sum) const { store(to, load(to) + sum); }
};

// left [kCount, depth] @ right [depth, kVectors] into `to`, each sum in the
// order of depth, by fused multiply-add where the machine has it.
template <int kCount, int kVectors, bool kTransposed, class Finish>
inline void multiply_rows(Left<kTransposed> left, const float* right,
                          int64_t right_stride, float* to, int64_t to_stride,
                          int64_t depth, const Finish& finish) {
  Vec sums[kCount][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec vectors[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      vectors[v] = load(right + k * right_stride + v * kLanes);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      Vec scalar = broadcast(*left.at(row, k));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] += scalar * vectors[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kCount; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      finish(to + row * to_stride + v * kLanes, v, sums[row][v]);
    }
  }
}

// The same for any number of rows, kCount at a time.
template <int kCount, int kVectors, bool kTransposed, class Finish>
void multiply(Left<kTransposed> left, int64_t rows, const float* right,
              int64_t right_stride, float* to, int64_t to_stride, int64_t depth,
              const Finish& finish) {
  int64_t row = 0;
  auto next = [&](auto count) {
    constexpr int kNext = decltype(count){}();
    Left<kTransposed> from{left.at(row, 0), left.stride};
    multiply_rows<kNext, kVectors>(from, right, right_stride,
                                   to + row * to_stride, to_stride, depth,
                                   finish);
    row += kNext;
  };
  while (row + kCount <= rows) next(Constant<kCount>{});
  while (row < rows) next(Constant<1>{});
}

// The same for a panel with queries in its first `vectors`.
template <bool kTransposed, class Finish>
void multiply_panel(int vectors, Left<kTransposed> left, int64_t rows,
                    const float* right, int64_t right_stride, float* to,
                    int64_t to_stride, int64_t depth, const Finish& finish) {
  auto run = vectors == 3   ? multiply<4 * kWide, 3, kTransposed, Finish>
             : vectors == 2 ? multiply<4 * kWide, 2, kTransposed, Finish>
                            : multiply<8 * kWide, 1, kTransposed, Finish>;
  run(left, rows, right, right_stride, to, to_stride, depth, finish);
}

// The distance of rows of a tile: whole cache lines, an odd number of them, so
// that the rows of a column spread over all sets of the cache.
inline int64_t row_stride(int64_t head_size) {
  return ((head_size + 15) / 16 | 1) * 16;
}

// The head size in whole vectors.
inline int64_t padded(int64_t head_size) {
  return (head_size + kLanes - 1) / kLanes * kLanes;
}

// The next `size` floats of a workspace.
inline float* take(float*& memory, int64_t size) {
  memory += size;
  return memory - size;
}

// The rows of a head as fp32, padded with zeros to whole vectors.
template <class T>
void load_rows(const vllm_training::AttentionInput& input, int64_t token,
               int64_t head, int64_t rows, int64_t head_size, float* to) {
  const T* from = static_cast<const T*>(input.data) +
                  token * input.token_stride + head * input.head_stride;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t i = 0;
    for (; i + kLanes <= head_size; i += kLanes) store(to + i, load(from + i));
    if (i < head_size) store(to + i, load_some(from + i, head_size - i));
    from += input.token_stride;
    to += row_stride(head_size);
  }
}

// The inverse, times a factor, into a contiguous [num_tokens, heads,
// head_size].
template <class T>
void store_rows(const float* from, float factor, int64_t rows,
                int64_t head_size, void* output, int64_t token, int64_t heads,
                int64_t head) {
  T* to = static_cast<T*>(output) + (token * heads + head) * head_size;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t i = 0;
    for (; i + kLanes <= head_size; i += kLanes)
      store(to + i, load(from + i) * factor);
    if (i < head_size)
      store_some(to + i, load(from + i) * factor, head_size - i);
    from += row_stride(head_size);
    to += heads * head_size;
  }
}

template <int... kLane>
struct Lanes {};
template <int kCount, int... kLane>
struct LanesBelow : LanesBelow<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct LanesBelow<0, kLane...> {
  using Type = Lanes<kLane...>;
};

// Swaps the lanes of `first` that have the bit kStep with those of `second`
// that lack it.
template <int kStep, int... kLane>
inline void exchange(Vec& first, Vec& second, Lanes<kLane...>) {
  Vec low = __builtin_shufflevector(
      first, second, (kLane & kStep ? kLanes + kLane - kStep : kLane)...);
  second = __builtin_shufflevector(
      first, second, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
  first = low;
}

// Transposes kLanes vectors: for each bit of the index, rows with columns.
template <int kStep = kLanes / 2>
inline void transpose_vectors(Vec* rows) {
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row) {
    if (!(row & kStep)) {
      exchange<kStep>(rows[row], rows[row + kStep], LanesBelow<kLanes>::Type{});
    }
  }
  if constexpr (kStep > 1) transpose_vectors<kStep / 2>(rows);
}

// to [columns, rows] = from [rows, columns] transposed, times a factor.
inline void transpose(const float* from, int64_t from_stride, int64_t rows,
                      int64_t columns, float factor, float* to,
                      int64_t to_stride) {
  auto element = [&](int64_t row, int64_t column) {
    to[column * to_stride + row] = from[row * from_stride + column] * factor;
  };
  const int64_t whole_columns = columns / kLanes * kLanes;
  int64_t row = 0;
  for (; row + kLanes <= rows; row += kLanes) {
    for (int64_t column = 0; column < whole_columns; column += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = load(from + (row + i) * from_stride + column) * factor;
      }
      transpose_vectors(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        store(to + (column + i) * to_stride + row, block[i]);
      }
    }
    for (int64_t column = whole_columns; column < columns; ++column) {
      for (int i = 0; i < kLanes; ++i) element(row + i, column);
    }
  }
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) element(row, column);
  }
}

// Panels of queries, [panels, head_size, kPanel], times a factor, from rows;
// missing queries are zeros.
inline void rows_to_panels(const float* from, int64_t rows, int64_t head_size,
                           float factor, float* panels) {
  for (int64_t first = 0; first < rows; first += kPanel) {
    int64_t count = rows - first < kPanel ? rows - first : kPanel;
    if (count < kPanel)
      __builtin_memset(panels, 0, head_size * kPanel * sizeof(float));
    transpose(from + first * row_stride(head_size), row_stride(head_size),
              count, head_size, factor, panels, kPanel);
    panels += head_size * kPanel;
  }
}

// The inverse.
inline void panels_to_rows(const float* panels, int64_t rows, int64_t head_size,
                           float* to) {
  for (int64_t first = 0; first < rows; first += kPanel) {
    int64_t count = rows - first < kPanel ? rows - first : kPanel;
    transpose(panels, kPanel, head_size, count, 1.0f,
              to + first * row_stride(head_size), row_stride(head_size));
    panels += head_size * kPanel;
  }
}

}  // namespace
