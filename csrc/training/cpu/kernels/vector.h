// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Vectors of fp32 for the instruction set that this file is compiled for, their
// loads and stores in fp32, bf16 and fp16, and elementary functions.
//
// Code of this folder is compiled several times. It is in an unnamed namespace
// and includes no header with inline functions of external linkage: the linker
// would keep one copy of such a function, possibly one with instructions that
// the machine lacks.

#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../dtype.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

// The 16-bit types are their bits; conversion is explicit.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls `function` with a zero of the C++ type of a dtype.
template <class Function>
inline void for_dtype(vllm_training::DType dtype, Function function) {
  switch (dtype) {
    case vllm_training::DType::kFloat32:
      return function(float{});
    case vllm_training::DType::kBFloat16:
      return function(BFloat16{});
    case vllm_training::DType::kFloat16:
      return function(Float16{});
  }
}

inline Vec broadcast(float value) { return value - Vec{}; }

template <class T>
inline T load_unaligned(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof(T));
  return value;
}

// 16-bit integers to the low halves of lanes, and back. (gcc warns of its own
// header for the 512-bit instructions without a mask.)
inline VecBits widen(VecHalf half) {
#if defined(__AVX512F__)
  return (VecBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);
#elif defined(__AVX2__)
  return (VecBits)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, VecBits);
#endif
}

inline VecHalf narrow(VecBits bits) {
#if defined(__AVX512F__)
  return (VecHalf)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits);
#elif defined(__AVX2__)
  __m256i pairs = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  return (VecHalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  return __builtin_convertvector(bits, VecHalf);
#endif
}

// The bits of a value as bf16, in the high halves of lanes. Rounds to nearest,
// ties to even; a NaN stays one.
inline VecBits bfloat16_bits(Vec value) {
  VecBits bits = (VecBits)value;
  VecBits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return rounded | (VecBits)(value != value);  // all ones are a NaN
}

// The same for fp16, in the low halves of lanes.
inline VecHalf float16_bits(Vec value) {
#if defined(__AVX512F__)
  return (VecHalf)_mm512_maskz_cvtps_ph(0xffff, (__m512)value,
                                        _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (VecHalf)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  VecBits sign = (VecBits)value & 0x80000000;
  VecBits magnitude = (VecBits)value ^ sign;
  // The exponent of a float, moved to a half's place, is 112 too large.
  VecBits normal =
      (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
  // The last place of a sum with 1/2 is that of the subnormal halves.
  VecBits subnormal = (VecBits)((Vec)magnitude + 0.5f) - 0x3f000000;
  VecBits half = magnitude < (113 << 23) ? subnormal : normal;
  half = magnitude < 0x47800000 ? half : VecBits{} + 0x7c00;
  half = value == value ? half : VecBits{} + 0x7e00;
  return narrow(half | sign >> 16);
#endif
}

inline Vec from_float16_bits(VecHalf half) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)half);
#else
  VecBits bits = widen(half);
  VecBits sign = (bits & 0x8000) << 16;
  VecBits magnitude = (bits & 0x7fff) << 13;
  // The exponent of a half, moved to a float's place, is 112 too small.
  VecBits finite = (VecBits)((Vec)magnitude * 0x1p112f);
  VecBits infinite = magnitude | 0x7f800000;
  return (Vec)(sign | (magnitude < 0x0f800000 ? finite : infinite));
#endif
}

inline Vec load(const float* from) { return load_unaligned<Vec>(from); }
inline Vec load(const BFloat16* from) {
  return (Vec)(widen(load_unaligned<VecHalf>(from)) << 16);
}
inline Vec load(const Float16* from) {
  return from_float16_bits(load_unaligned<VecHalf>(from));
}

inline void store(float* to, Vec value) {
  __builtin_memcpy(to, &value, sizeof value);
}
inline void store(BFloat16* to, Vec value) {
  VecHalf half = narrow(bfloat16_bits(value) >> 16);
  __builtin_memcpy(to, &half, sizeof half);
}
inline void store(Float16* to, Vec value) {
  VecHalf half = float16_bits(value);
  __builtin_memcpy(to, &half, sizeof half);
}

// The value that a store and a load would give; the first argument names the
// type.
inline Vec rounded_to(float, Vec value) { return value; }
inline Vec rounded_to(BFloat16, Vec value) {
  return (Vec)(bfloat16_bits(value) & 0xffff0000);
}
inline Vec rounded_to(Float16, Vec value) {
  return from_float16_bits(float16_bits(value));
}

// The first `count` < kLanes elements; the other lanes are zero.
template <class T>
inline Vec load_some(const T* from, int64_t count) {
  T padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <class T>
inline void store_some(T* to, Vec value, int64_t count) {
  T padded[kLanes];
  store(padded, value);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// In the place of a count: every lane.
struct AllLanes {};

template <class T>
inline Vec load_some(const T* from, AllLanes) {
  return load(from);
}

template <class T>
inline void store_some(T* to, Vec value, AllLanes) {
  store(to, value);
}

// Calls `work(i, lanes)` for the vectors that begin at i of [0, size); lanes
// says how much of one to load and store: AllLanes, or a count for the last.
template <class Work>
inline void by_vectors(int64_t size, const Work& work) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) work(i, AllLanes{});
  if (i < size) work(i, size - i);
}

// The sum of the lanes of all `term(i, lanes)`, as in by_vectors; the lanes of
// a last, partial vector that do not count must be zero. The order depends on
// size alone.
template <class Term>
inline float sum_vectors(int64_t size, const Term& term) {
  constexpr int kSums = 4;
  Vec sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
    for (int k = 0; k < kSums; ++k) sums[k] += term(i + k * kLanes, AllLanes{});
  }
  for (; i + kLanes <= size; i += kLanes) sums[0] += term(i, AllLanes{});
  if (i < size) sums[1] += term(i, size - i);
  Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

// e^x within 1.2 ulp: 0 below -104, infinity above 89, NaN for NaN. x = n ln 2
// + r with |r| <= ln 2 / 2, and e^r by its Taylor polynomial of degree 7.
inline Vec exp(Vec x) {
  Vec clamped = x < -104.0f ? broadcast(-104.0f) : x;
  clamped = clamped > 89.0f ? broadcast(89.0f) : clamped;
  // Adding 1.5 * 2^23 rounds to an integer.
  Vec shifted = clamped * 0x1.715476p+0f + 0x1.8p23f;
  Vec n = shifted - 0x1.8p23f;
  Vec r = clamped - n * 0x1.62e4p-1f;
  r = r - n * 0x1.7f7d1cp-20f;
  Vec p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors: n goes from -150 to 128, beyond the exponents of fp32.
  VecInt exponent = __builtin_convertvector(n, VecInt);
  VecInt half = exponent >> 1;
  Vec first = (Vec)((half + 127) << 23);
  Vec second = (Vec)((exponent - half + 127) << 23);
  return p * first * second;
}

// e^x for x <= 0 and NaN, in fewer steps: 0 below -87.7, else within 1.2 ulp.
// With the minimax polynomial of degree 6.
inline Vec exp_negative(Vec x) {
  Vec clamped = x < -88.0f ? broadcast(-88.0f) : x;
  // The low bits of the shifted number hold n + 127, the exponent of 2^n.
  constexpr float kShift = 0x1.8p23f + 127.0f;
  Vec shifted = clamped * 0x1.715476p+0f + kShift;
  Vec n = shifted - kShift;
  Vec r = clamped - n * 0x1.62e4p-1f;
  r = r - n * 0x1.7f7d1cp-20f;
  Vec p = broadcast(0.0013814433f);
  p = p * r + 0.0083687967f;
  p = p * r + 0.0416683964f;
  p = p * r + 0.1666651964f;
  p = p * r + 0.4999999404f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (Vec)((VecBits)shifted << 23);
}

}  // namespace
