// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#pragma once

#include "../rotary.h"
#include "vector.h"

namespace {

typedef uint32_t RotaryBits __attribute__((vector_size(kLanes * 2)));
typedef uint64_t RotaryPairs __attribute__((vector_size(kLanes * 4)));

template <class T>
inline Vec rotary_load(const T* from, int64_t count) {
  return count == kLanes ? load(from) : load_some(from, count);
}

template <class T>
inline void rotary_store(T* to, Vec value, int64_t count) {
  count == kLanes ? store(to, value) : store_some(to, value, count);
}

// A pair is the features i and i + half.
template <class T>
void rotate_halves(const T* x, const float* cos, const float* sin, float sign,
                   T* output, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i < kLanes ? half - i : kLanes;
    Vec c = rotary_load(cos + i, count);
    Vec s = rotary_load(sin + i, count) * sign;
    Vec first = rotary_load(x + i, count);
    Vec second = rotary_load(x + half + i, count);
    rotary_store(output + i, first * c - second * s, count);
    rotary_store(output + half + i, second * c + first * s, count);
  }
}

// a, b, ... -> a, a, b, b, ...; `count` <= kLanes / 2 values.
inline Vec each_twice(const float* from, int64_t count) {
  RotaryBits bits = {};
  if (count == kLanes / 2) {
    bits = load_unaligned<RotaryBits>(from);
  } else {
    __builtin_memcpy(&bits, from, count * sizeof(float));
  }
  RotaryPairs pairs = __builtin_convertvector(bits, RotaryPairs);
  return (Vec)(pairs | pairs << 32);
}

// a, b, c, d, ... -> b, a, d, c, ...
inline Vec swap_pairs(Vec x) {
  RotaryPairs pairs = (RotaryPairs)x;
  return (Vec)(pairs << 32 | pairs >> 32);
}

// A pair is the features 2 i and 2 i + 1.
template <class T>
void rotate_neighbours(const T* x, const float* cos, const float* sin,
                       float sign, T* output, int64_t half) {
  Vec signs;
  for (int lane = 0; lane < kLanes; ++lane)
    signs[lane] = lane % 2 ? sign : -sign;
  for (int64_t i = 0; i < half; i += kLanes / 2) {
    const int64_t count = half - i < kLanes / 2 ? half - i : kLanes / 2;
    Vec c = each_twice(cos + i, count);
    Vec s = each_twice(sin + i, count) * signs;
    Vec pairs = rotary_load(x + 2 * i, 2 * count);
    rotary_store(output + 2 * i, pairs * c + swap_pairs(pairs) * s, 2 * count);
  }
}

// An item is a token: its heads of query and key.
void rotary_embedding(const vllm_training::RotaryArguments& a, int64_t begin,
                      int64_t end) {
  const int64_t half = a.rotary_dim / 2;
  const int64_t kept = a.head_size - a.rotary_dim;
  const float sign = a.inverse ? -1.0f : 1.0f;
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto rotate =
        a.is_neox_style ? rotate_halves<T> : rotate_neighbours<T>;
    for (int64_t token = begin; token < end; ++token) {
      const float* cos = a.cos_sin_cache + a.positions[token] * a.rotary_dim;
      for (const vllm_training::RotaryHeads& heads : a.heads) {
        const T* x =
            static_cast<const T*>(heads.input) + token * heads.token_stride;
        T* output = static_cast<T*>(heads.output);
        output += token * heads.num_heads * a.head_size;
        for (int64_t head = 0; head < heads.num_heads; ++head) {
          rotate(x, cos, cos + half, sign, output, half);
          __builtin_memcpy(output + a.rotary_dim, x + a.rotary_dim,
                           kept * sizeof(T));
          x += heads.head_stride;
          output += a.head_size;
        }
      }
    }
  });
}

}  // namespace
