// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Elementary functions of attention's scores.

#pragma once

#include "vector.h"

namespace {

constexpr float kLog2E = 0x1.715476p+0f;

inline Vec absolute(Vec x) { return (Vec)((VecBits)x & 0x7fffffff); }

// e^x for x < 88: 0 below -87.7, NaN for NaN, else with a relative error of at
// most 1e-7 + 1.4e-8 |x|. x = (n + f) ln 2 with |f| <= 1/2, and 2^f by a
// minimax polynomial with an error of 4e-9. It takes about half the time of
// exp, which is for all x.
inline Vec exp_below_88(Vec x) {
  Vec least = broadcast(-88.0f);
  Vec clamped = least > x ? least : x;
  // Adding 1.5 * 2^23 rounds to an integer; the low bits then hold n + 127.
  constexpr float kShift = 0x1.8p23f + 127.0f;
  Vec shifted = clamped * kLog2E + kShift;
  Vec f = clamped * kLog2E - (shifted - kShift);
  Vec p = broadcast(0x1.446c78p-13f);
  p = p * f + 0x1.5f0896p-10f;
  p = p * f + 0x1.3b29e4p-7f;
  p = p * f + 0x1.c6af6cp-5f;
  p = p * f + 0x1.ebfbe0p-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  return p * (Vec)((VecBits)shifted << 23);
}

// tanh x: an odd minimax polynomial near 0, (1 - e^-2|x|) / (1 + e^-2|x|)
// elsewhere.
inline Vec tanh(Vec x) {
  Vec magnitude = absolute(x);
  Vec e = exp_below_88(magnitude * -2.0f);
  Vec far = (1.0f - e) / (1.0f + e);
  far = (Vec)((VecBits)far | ((VecBits)x & 0x80000000));
  Vec square = x * x;
  Vec p = broadcast(-0.00611258f);
  p = p * square + 0.02100955f;
  p = p * square - 0.05385391f;
  p = p * square + 0.13332793f;
  p = p * square - 0.33333329f;
  Vec near = x + x * (square * p);
  return magnitude < 0.625f ? near : far;
}

}  // namespace
