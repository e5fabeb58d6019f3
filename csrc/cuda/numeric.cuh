// Storage types and activations of the kernels. Arithmetic is float32 whatever the storage.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../args.h"

namespace newllm::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N neighbours of a row in one access.
template <class T, int N>
struct Vec;

template <class T>
struct Vec<T, 1> {
  using Raw = T;
  static __device__ __forceinline__ void unpack(Raw raw, float (&x)[1]) { x[0] = to_float(raw); }
  static __device__ __forceinline__ Raw pack(const float (&x)[1]) { return from_float<T>(x[0]); }
};

template <>
struct Vec<float, 2> {
  using Raw = float2;
  static __device__ __forceinline__ void unpack(Raw raw, float (&x)[2]) { x[0] = raw.x, x[1] = raw.y; }
  static __device__ __forceinline__ Raw pack(const float (&x)[2]) { return make_float2(x[0], x[1]); }
};

template <>
struct Vec<__half, 2> {
  using Raw = __half2;
  static __device__ __forceinline__ void unpack(Raw raw, float (&x)[2]) {
    const float2 y = __half22float2(raw);
    x[0] = y.x, x[1] = y.y;
  }
  static __device__ __forceinline__ Raw pack(const float (&x)[2]) { return __floats2half2_rn(x[0], x[1]); }
};

template <>
struct Vec<__nv_bfloat16, 2> {
  using Raw = __nv_bfloat162;
  static __device__ __forceinline__ void unpack(Raw raw, float (&x)[2]) {  // an instruction each
    const uint32_t bits = reinterpret_cast<const uint32_t&>(raw);
    x[0] = __uint_as_float(bits << 16), x[1] = __uint_as_float(bits & 0xffff0000u);
  }
  static __device__ __forceinline__ Raw pack(const float (&x)[2]) { return __floats2bfloat162_rn(x[0], x[1]); }
};

// weight or bias of LayerNorm: float32, or of the dtype of the rows.
struct Parameter {
  const void* data = nullptr;
  bool is_float = true;
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2e = 1.4426950408889634f;

// e^-x for a sigmoid. Past x = -88 it would overflow, and slopes become 0 * inf; NaN stays. At 88 the reciprocal is
// below 2^-126 and flushed, so that the sigmoid of -inf is 0.
__device__ __forceinline__ float exp_minus(float x) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x * -kLog2e), "f"(88.0f * kLog2e));
  return exp2_fast(y);
}

struct Activation {
  float value, slope;
};

// s = 1 / (1 + e^-x), s' = s^2 e^-x, which keeps its relative accuracy where 1 - s would cancel; s^2 alone would
// underflow. The hardware's approximations of exponential and reciprocal are good to 2 units in float32's last place.
__device__ __forceinline__ Activation sigmoid_fast(float x) {
  const float e = exp_minus(x), s = reciprocal_fast(1.0f + e);
  return {s, s * (s * e)};
}

// tanh |x| = (1 - e) / (1 + e) with e = e^-2|x|: the numerator. Near 0, where 1 - e cancels, from tanh's own series,
// which is good to 3e-9 below 1/16.
__device__ __forceinline__ float tanh_numerator(float x, float e) {
  const float square = x * x;
  const float series = fabsf(x) * fmaf(square, fmaf(square, 2.0f / 15.0f, -1.0f / 3.0f), 1.0f);
  return fabsf(x) < 0.0625f ? series * (1.0f + e) : 1.0f - e;
}

// tanh, and t' = 4 e / (1 + e)^2.
__device__ __forceinline__ Activation tanh_fast(float x) {
  const float e = exp2_fast(-2.0f * kLog2e * fabsf(x)), r = reciprocal_fast(1.0f + e);
  return {copysignf(tanh_numerator(x, e) * r, x), 4.0f * e * r * r};
}

}  // namespace newllm::cuda
