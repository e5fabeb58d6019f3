// sigmoid and tanh with their derivatives, accurate in relative terms at both ends: pre-activations near zero keep a
// relative error of a few ulp in tanh, and saturated gates keep one in sigmoid' and tanh'.
#pragma once

#include "vec.h"

namespace newllm::cpu::NEWLLM_ISA {

struct ExpPair {
  FloatV exp;    // e^x
  FloatV expm1;  // e^x - 1, without cancellation
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

// x between -limit and limit. Where an operand is NaN these instructions return the second one, so NaN passes through.
NEWLLM_INLINE FloatV bounded(FloatV x, float limit) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_max_ps(_mm512_set1_ps(-limit), _mm512_min_ps(_mm512_set1_ps(limit), (__m512)x));
#elif defined(__AVX2__)
  return (FloatV)_mm256_max_ps(_mm256_set1_ps(-limit), _mm256_min_ps(_mm256_set1_ps(limit), (__m256)x));
#else
  x = x > limit ? FloatV{} + limit : x;  // comparisons with NaN are false
  return x < -limit ? FloatV{} - limit : x;
#endif
}

// 1 / x for x in [1, 2^126], to about one ulp. A division occupies the divider for as long as ten other instructions
// take, and the gates need three; the estimate of AVX-512 has 14 bits, one Newton step doubles them.
NEWLLM_INLINE FloatV reciprocal(FloatV x) {
#if defined(__AVX512F__)
  const FloatV estimate = (FloatV)_mm512_rcp14_ps((__m512)x);
  return estimate * (1.0f - x * estimate) + estimate;
#else
  return 1.0f / x;
#endif
}

template <class V>
struct Activation {
  V value;
  V slope;  // derivative at the pre-activation
};

// s = 1 / (1 + e^-x), s' = s^2 e^-x. Past |x| = 87, s is 1 or below 1e-37.
NEWLLM_INLINE Activation<FloatV> sigmoid(FloatV x) {
  const FloatV e = exp_pair(bounded(-x, 87.0f)).exp;
  const FloatV s = reciprocal(1.0f + e);
  return {s, s * (s * e)};
}

// t = m / (m + 2) with m = e^2x - 1; t' = 4 e^2x / (m + 2)^2. Past |x| = 20, |t| is 1 and t' below 2e-17.
NEWLLM_INLINE Activation<FloatV> tanh(FloatV x) {
  const ExpPair e = exp_pair(bounded(x + x, 40.0f));
  const FloatV inverse = reciprocal(e.expm1 + 2.0f);
  return {e.expm1 * inverse, 4.0f * e.exp * (inverse * inverse)};
}

// sigmoid(i) tanh(d) with one reciprocal for both: m / ((1 + e^-i) (m + 2)). The bounds keep the product in range: an
// input gate below -56 counts as -56 (5e-25), and |tanh| is 1 to the last bit past 15.
NEWLLM_INLINE FloatV gated_write(FloatV i, FloatV d) {
  const FloatV e = exp_pair(bounded(-i, 56.0f)).exp;
  const FloatV m = exp_pair(bounded(d + d, 30.0f)).expm1;
  return m * reciprocal((1.0f + e) * (m + 2.0f));
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

NEWLLM_INLINE DoubleV gated_write(DoubleV i, DoubleV d) { return sigmoid(i).value * tanh(d).value; }

}  // namespace newllm::cpu::NEWLLM_ISA
