// One step of the cell on a thread's columns: activations, and the sums over a row that LayerNorm needs.
#pragma once

#include "numeric.cuh"

namespace newllm::cuda {

__device__ __forceinline__ float rsqrt_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Numerator of tanh |d| over 1 + e with e = e^-2|d|. 16-bit gates do without the series for small d: what 1 - e loses
// there, 6e-8, is a thousandth of what their own rounding leaves of the step's sum.
template <class T>
__device__ __forceinline__ float delta_numerator(float d, float e) {
  return sizeof(T) == 2 ? 1.0f - e : tanh_numerator(d, e);
}

// forget and write of u = forget c + write: sigmoid(f), and sigmoid(i) tanh(d) over one denominator.
template <class T>
__device__ __forceinline__ void gate_values(float f, float i, float d, float& forget, float& write) {
  forget = reciprocal_fast(1.0f + exp2_fast(-kLog2e * f));
  const float e_i = exp2_fast(-kLog2e * i), e_d = exp2_fast(-2.0f * kLog2e * fabsf(d));
  write = copysignf(delta_numerator<T>(d, e_d), d) * reciprocal_fast((1.0f + e_i) * (1.0f + e_d));
}

// As sigmoid_fast, in one instruction less: past x = -88 e^-x would overflow and the slope become 0 * inf; NaN stays.
__device__ __forceinline__ Activation sigmoid_of(float x) {
  float t = -kLog2e * x;
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(t) : "f"(88.0f * kLog2e));
  const float e = exp2_fast(t), s = reciprocal_fast(1.0f + e);
  return {s, s * (s * e)};
}

template <class T>
__device__ __forceinline__ Activation tanh_of(float x) {
  const float e = exp2_fast(-2.0f * kLog2e * fabsf(x)), r = reciprocal_fast(1.0f + e);
  return {copysignf(delta_numerator<T>(x, e) * r, x), 4.0f * e * r * r};
}

// y cut to +-limit; NaN stays, as in torch.clamp.
__device__ __forceinline__ float clamped(float y, float limit) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(y) : "f"(limit));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(y) : "f"(-limit));
  return y;
}

// The largest magnitude, NaN where there is one.
template <int N>
__device__ __forceinline__ float largest(const float (&x)[N]) {
  float part[N];
#pragma unroll
  for (int k = 0; k < N; ++k) part[k] = fabsf(x[k]);
#pragma unroll
  for (int width = N / 2; width > 0; width /= 2) {
#pragma unroll
    for (int k = 0; k < width; ++k) asm("max.NaN.f32 %0, %0, %1;" : "+f"(part[k]) : "f"(part[k + width]));
  }
  return part[0];
}

// Sum of N values as a tree of pairs.
template <int N>
__device__ __forceinline__ float tree_sum(const float (&x)[N]) {
  float part[N];
#pragma unroll
  for (int k = 0; k < N; ++k) part[k] = x[k];
#pragma unroll
  for (int width = N / 2; width > 0; width /= 2) {
#pragma unroll
    for (int k = 0; k < width; ++k) part[k] += part[k + width];
  }
  return part[0];
}

}  // namespace newllm::cuda
