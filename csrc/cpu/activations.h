// Activations of the hidden layers with their derivatives, beside the gates' of gates.h.
#pragma once

#include "../args.h"
#include "gates.h"

namespace newllm::cpu::NEWLLM_ISA {

// The normal distribution Phi(x) = erfc(-x / sqrt 2) / 2 and its density. erfc by Chebyshev fit (Numerical Recipes'
// erfcc: relative error below 1.2e-7 everywhere).
struct Normal {
  FloatV below, density;
};

NEWLLM_INLINE Normal normal(FloatV x) {
  const FloatV bound = bounded(x, 13.0f);  // beyond, Phi is 0 or 1 to 1e-38
  const FloatV z = (bound < 0.0f ? -bound : bound) * 0.70710678f;
  const FloatV t = reciprocal(1.0f + 0.5f * z);
  FloatV p = splat<float>(0.17087277f);
  for (const float next : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f,
                           1.00002368f, -1.26551223f}) {
    p = p * t + next;
  }
  const FloatV gauss = exp_pair(bounded(-z * z, 87.0f)).exp;  // e^(-x^2 / 2)
  const FloatV half_erfc = 0.5f * t * gauss * exp_pair(p).exp;
  return {bound < 0.0f ? half_erfc : 1.0f - half_erfc, gauss * 0.39894228f};
}

NEWLLM_INLINE Activation<FloatV> gelu(FloatV x) {
  const Normal phi = normal(x);
  return {x * (x < -13.0f ? FloatV{} : phi.below), phi.below + x * phi.density};  // of -inf NaN, as in PyTorch
}

NEWLLM_INLINE Activation<DoubleV> gelu(DoubleV x) {
  DoubleV below, density;
  for (int lane = 0; lane < kLanes<double>; ++lane) {
    below[lane] = 0.5 * std::erfc(-x[lane] * 0.70710678118654752440);
    density[lane] = 0.39894228040143267794 * std::exp(-0.5 * x[lane] * x[lane]);
  }
  return {x * below, below + x * density};
}

// As torch.relu: NaN goes through, and the derivative at 0 is 0.
template <class V>
NEWLLM_INLINE Activation<V> relu(V x) {
  const V one = V{} + 1;
  return {x <= 0 ? V{} : x, x > 0 ? one : V{}};
}

template <class V>
NEWLLM_INLINE Activation<V> silu(V x) {
  const Activation<V> s = sigmoid(x);
  return {x * (x < -87 ? V{} : s.value), s.value + x * s.slope};  // of -inf NaN, as in PyTorch
}

// Calls body(activation of a vector) for the kind that is asked for, so that the choice is made once for a row.
template <class Body>
NEWLLM_INLINE void with_activation(ActivationKind kind, const Body& body) {
  switch (kind) {
    case ActivationKind::kRelu: return body([](auto x) { return relu(x); });
    case ActivationKind::kGelu: return body([](auto x) { return gelu(x); });
    case ActivationKind::kSilu: return body([](auto x) { return silu(x); });
    case ActivationKind::kTanh: return body([](auto x) { return tanh(x); });
  }
}

}  // namespace newllm::cpu::NEWLLM_ISA
