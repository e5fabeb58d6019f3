// sigmoid and tanh with their derivatives, accurate in relative terms at both ends: pre-activations near zero keep a
// relative error of a few ulp in tanh, and saturated gates keep one in sigmoid' and tanh'.
#pragma once

#include "vec.h"

namespace newllm::cpu::NEWLLM_ISA {

struct ExpPair {
  FloatV exp;     // e^x
  FloatV expm1;   // e^x - 1, without cancellation
};

// x in [-87, 87]; NaN gives NaN. e^x = 2^n e^r with |r| <= ln(2)/2 (Cody and Waite's two-part ln 2), e^r - 1 by a
// degree-7 Taylor polynomial: its truncation error, r^8/8! <= 5.2e-9, is below half an ulp of the result.
NEWLLM_INLINE ExpPair exp_pair(FloatV x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, kept in the low bits
  const FloatV shifted = x * 1.44269504088896341f + magic;
  const FloatV n = shifted - magic;
  FloatV r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  FloatV p = splat<float>(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  const FloatV expm1_r = p * (r * r) + r;
  const FloatV scale = bit_cast<FloatV>((bit_cast<UInt32V>(shifted) << 23) + 0x3f800000u);
  return {expm1_r * scale + scale, expm1_r * scale + (scale - 1.0f)};
}

template <class V>
NEWLLM_INLINE V bounded(V x, typename std::remove_reference_t<decltype(V{}[0] + 0)> limit) {
  // Comparisons with NaN are false, so a NaN passes through unchanged.
  x = x > limit ? V{} + limit : x;
  return x < -limit ? V{} - limit : x;
}

template <class V>
struct Activation {
  V value;
  V slope;  // derivative at the pre-activation
};

// s = 1 / (1 + e^-x), s' = s^2 e^-x. Past |x| = 87, s is 1 or below 1e-37.
NEWLLM_INLINE Activation<FloatV> sigmoid(FloatV x) {
  const FloatV e = exp_pair(bounded(-x, 87.0f)).exp;
  const FloatV s = 1.0f / (1.0f + e);
  return {s, s * (s * e)};
}

// t = m / (m + 2) with m = e^2x - 1; t' = 4 e^2x / (m + 2)^2. Past |x| = 20, |t| is 1 and t' below 2e-17.
NEWLLM_INLINE Activation<FloatV> tanh(FloatV x) {
  const ExpPair e = exp_pair(bounded(x + x, 40.0f));
  const FloatV inverse = 1.0f / (e.expm1 + 2.0f);
  return {e.expm1 * inverse, 4.0f * e.exp * (inverse * inverse)};
}

NEWLLM_INLINE Activation<DoubleV> sigmoid(DoubleV x) {
  DoubleV e;
  for (int lane = 0; lane < kLanes<double>; ++lane) e[lane] = std::exp(-x[lane]);
  const DoubleV s = 1.0 / (1.0 + e);
  return {s, s * (1.0 - s)};
}

NEWLLM_INLINE Activation<DoubleV> tanh(DoubleV x) {
  DoubleV t;
  for (int lane = 0; lane < kLanes<double>; ++lane) t[lane] = std::tanh(x[lane]);
  return {t, 1.0 - t * t};
}

}  // namespace newllm::cpu::NEWLLM_ISA
