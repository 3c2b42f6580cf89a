// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project

#pragma once

#include "../activation.h"
#include "vector.h"

namespace {

using vllm_training::Activation;
using vllm_training::GatedArguments;

// An activation is x share(x), with a share between 0 and 1.
struct Share {
  Vec value;
  Vec slope;
};

inline Vec minus_magnitude(Vec x) { return (Vec)((VecBits)x | 0x80000000); }

// sigmoid x and its slope, sigmoid(x) sigmoid(-x). Both sigmoids are computed
// from e^-|x|, so that neither overflows and none is a difference.
inline Share sigmoid(Vec x) {
  Vec decay = exp_negative(minus_magnitude(x));
  Vec large = 1.0f / (1.0f + decay);
  Vec small = decay * large;
  return {x < 0.0f ? small : large, large * small};
}

struct Silu {
  static Share share(Vec x) { return sigmoid(x); }
};

// The normal distribution Phi and its density. With z = |x|, Phi(-z) is e^(-z^2
// / 2) times a smooth function of z, which is a polynomial in 1 / (1 + 0.33 z):
// minimax, with an error of 2e-8 times e^(z^2 / 4), relative.
struct Gelu {
  static Share share(Vec x) {
    Vec decay = exp_negative(x * x * -0.5f);
    Vec t = 1.0f / (1.0f - 0.33f * minus_magnitude(x));
    Vec p = broadcast(0.0462510958f);
    p = p * t - 0.2238699049f;
    p = p * t + 0.3375605345f;
    p = p * t - 0.0957385153f;
    p = p * t + 0.1846915632f;
    p = p * t + 0.1183506921f;
    p = p * t + 0.1327545345f;
    Vec tail = p * t * decay;
    return {x < 0.0f ? tail : 1.0f - tail, decay * 0.3989422804f};
  }
};

// (1 + tanh u) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static Share share(Vec x) {
    constexpr float kLinear = 1.5957691216;  // 2 sqrt(2 / pi)
    constexpr float kCubic = 0.044715 * 1.5957691216;
    Share outer = sigmoid(x * (x * x * kCubic + kLinear));
    return {outer.value, outer.slope * (x * x * (3 * kCubic) + kLinear)};
  }
};

// Calls `function` with the form of an activation.
template <class Function>
inline void for_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::kSilu:
      return function(Silu{});
    case Activation::kGelu:
      return function(Gelu{});
    case Activation::kGeluTanh:
      return function(GeluTanh{});
  }
}

template <class Form, class T>
void gated_row(const T* gate, const T* up, T* output, int64_t size) {
  by_vectors(size, [&](int64_t i, auto lanes) {
    Vec x = load_some(gate + i, lanes);
    Vec activated = x * Form::share(x).value;
    store_some(output + i, activated * load_some(up + i, lanes), lanes);
  });
}

template <class Form, class T>
void gated_backward_row(const T* grad, const T* gate, const T* up, T* grad_gate,
                        T* grad_up, int64_t size) {
  by_vectors(size, [&](int64_t i, auto lanes) {
    Vec x = load_some(gate + i, lanes);
    Share share = Form::share(x);
    Vec g = load_some(grad + i, lanes);
    Vec g_activated = g * load_some(up + i, lanes);
    store_some(grad_gate + i, g_activated * (share.value + x * share.slope),
               lanes);
    store_some(grad_up + i, g * (x * share.value), lanes);
  });
}

void gated_activation(const GatedArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_activation(a.activation, [&](auto form) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = static_cast<const T*>(a.input) + row * a.input_stride;
        T* output = static_cast<T*>(a.output) + row * a.size;
        gated_row<decltype(form)>(gate, gate + a.size, output, a.size);
      }
    });
  });
}

void gated_activation_backward(const GatedArguments& a, int64_t begin,
                               int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_activation(a.activation, [&](auto form) {
      for (int64_t row = begin; row < end; ++row) {
        const T* grad = static_cast<const T*>(a.grad) + row * a.grad_stride;
        const T* gate = static_cast<const T*>(a.input) + row * a.input_stride;
        T* output = static_cast<T*>(a.output) + row * 2 * a.size;
        gated_backward_row<decltype(form)>(grad, gate, gate + a.size, output,
                                           output + a.size, a.size);
      }
    });
  });
}

}  // namespace
