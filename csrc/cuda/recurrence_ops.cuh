// What the recurrences compute from a step's inputs. `pair`: a and b of s_t = a s_{t-1} + b, and what is kept of that
// work. `step`: outputs and the state after, from the inputs, what was kept, and the state before.
//
// The backward of s_t = a_t s_{t-1} + b_t with gradients grad_t walks time from the end: g_t = grad_t + v_{t+1} is the
// gradient of s_t, and v_t = a_t g_t what it hands on, so v_t = a_t v_{t+1} + a_t grad_t is again such a recurrence,
// all of whose inputs stand at its own step.
#pragma once

#include "numeric.cuh"

namespace newllm::cuda {

struct ScanForward {  // a, b -> h
  static constexpr int kInputs = 2, kOutputs = 1, kPrevious = -1;
  struct Kept {};
  static __host__ __device__ constexpr bool in_pair(int) { return true; }
  static __device__ __forceinline__ void pair(const float (&x)[2], Kept&, float& a, float& b) { a = x[0], b = x[1]; }
  static __device__ __forceinline__ float step(const float (&x)[2], Kept, float state, float (&y)[1]) {
    return y[0] = fmaf(x[0], state, x[1]);
  }
};

struct ScanBackward {  // grad_h, a, h before -> grad_a, grad_b
  static constexpr int kInputs = 3, kOutputs = 2, kPrevious = 2;
  struct Kept {};
  static __host__ __device__ constexpr bool in_pair(int k) { return k < 2; }
  static __device__ __forceinline__ void pair(const float (&x)[3], Kept&, float& a, float& b) {
    a = x[1], b = x[1] * x[0];
  }
  static __device__ __forceinline__ float step(const float (&x)[3], Kept, float state, float (&y)[2]) {
    const float g = x[0] + state;
    y[0] = g * x[2];
    y[1] = g;
    return x[1] * g;
  }
};

struct GatedForward {  // f, i, d -> c
  static constexpr int kInputs = 3, kOutputs = 1, kPrevious = -1;
  struct Kept {
    float a, b;
  };
  static __host__ __device__ constexpr bool in_pair(int) { return true; }
  static __device__ __forceinline__ void pair(const float (&x)[3], Kept& kept, float& a, float& b) {
    // Without slopes an exponential may overflow: its reciprocal is 0, as it should be.
    kept.a = a = reciprocal_fast(1.0f + exp2_fast(x[0] * -kLog2e));
    // sigmoid(i) tanh(d) over one denominator.
    const float e_i = exp2_fast(x[1] * -kLog2e), e_d = exp2_fast(-2.0f * kLog2e * fabsf(x[2]));
    kept.b = b = copysignf(tanh_numerator(x[2], e_d), x[2]) * reciprocal_fast((1.0f + e_i) * (1.0f + e_d));
  }
  static __device__ __forceinline__ float step(const float (&)[3], Kept kept, float state, float (&y)[1]) {
    return y[0] = fmaf(kept.a, state, kept.b);
  }
};

struct GatedBackward {  // grad_c, f, i, d, c before -> grad_f, grad_i, grad_d
  static constexpr int kInputs = 5, kOutputs = 3, kPrevious = 4;
  using Kept = Activation;  // of f
  static __host__ __device__ constexpr bool in_pair(int k) { return k < 2; }
  static __device__ __forceinline__ void pair(const float (&x)[5], Kept& kept, float& a, float& b) {
    kept = sigmoid_fast(x[1]);
    a = kept.value;
    b = a * x[0];
  }
  static __device__ __forceinline__ float step(const float (&x)[5], Kept forget, float state, float (&y)[3]) {
    const float g = x[0] + state;
    const Activation input = sigmoid_fast(x[2]), delta = tanh_fast(x[3]);
    y[0] = g * x[4] * forget.slope;
    y[1] = g * delta.value * input.slope;
    y[2] = g * input.value * delta.slope;
    return forget.value * g;
  }
};

}  // namespace newllm::cuda
