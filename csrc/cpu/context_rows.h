// Rows of the cell, shared by context_scan and recurrent_context: one step of gates, update, LayerNorm and clamp, and
// its adjoint. Gates and their gradients are of type G, stored contexts of type T, everything else in the accumulation
// type.
#pragma once

#include <limits>
#include <memory>

#include "gates.h"
#include "norm.h"

namespace newllm::cpu::NEWLLM_ISA {

// As torch.clamp does, NaN passes through.
NEWLLM_INLINE FloatV clamped(FloatV y, float limit) { return bounded(y, limit); }
NEWLLM_INLINE DoubleV clamped(DoubleV y, double limit) {
  y = y > limit ? splat<double>(limit) : y;
  return y < -limit ? splat<double>(-limit) : y;
}

// The backward must know which components the clamp cut, and computes them again from the stored contexts. 16-bit
// contexts are rounded, so close to the clamp that answer would be chance. Hence the forward leaves it in what it
// stores: a cut component has the magnitude `edge`, the clamp as the storage holds it, and any other stays at or under
// `below`, the next smaller value.
template <class T, class A = acc_t<T>>
struct CutMark {
  static constexpr bool kUsed = sizeof(T) == 2;
  A edge = std::numeric_limits<A>::quiet_NaN();  // no clamp: nothing compares with it
  A below = std::numeric_limits<A>::infinity();

  explicit CutMark(double clamp_value) {
    if constexpr (kUsed) {
      if (clamp_value < std::numeric_limits<double>::infinity()) {
        T stored[kLanes<A>];
        store(stored, splat<A>(A(clamp_value)));
        edge = load(stored)[0];
        stored[0].bits -= 1;
        below = load(stored)[0];
      }
    }
  }
};

// Stores a context in storage, marked as CutMark says: y before the clamp, `next` after it.
template <class T, class Full, class A = acc_t<T>>
NEWLLM_INLINE void store_context(Full full, T* c, Vec<A> y, Vec<A> next, A limit, const CutMark<T>& mark, int64_t n) {
  if constexpr (CutMark<T>::kUsed) {
    const Vec<A> uncut = clamped(y, mark.below);
    store_if<false>(full, c, y > limit || y < -limit ? next : uncut, n);
  } else {
    store_if<false>(full, c, next, n);
  }
}

// Fills u with the row before the norm and returns its statistics; `before` is the last context, in storage or in acc.
template <class T, class P, class A = acc_t<T>>
NEWLLM_INLINE Statistics<A> update_row(const T* f, const T* i, const T* d, const P* before, A* u, int64_t D,
                                       double eps) {
  Vec<A> sums{};  // one running sum is enough: the gates take longer than an addition
  A tail = 0;
  for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
    const Vec<A> keep = sigmoid(load_if(full, f + k, n)).value * load_if(full, before + k, n);
    const Vec<A> updated = keep + gated_write(load_if(full, i + k, n), load_if(full, d + k, n));
    store_if<false>(full, u + k, updated, n);
    if constexpr (full.value) {
      sums += updated;
    } else {
      for (int64_t lane = 0; lane < n; ++lane) tail += updated[lane];
    }
  });
  const A sum = sum_lanes(sums) + tail;
  return row_statistics(u, D, eps, sum / A(D));
}

// Scratch rows of one thread: the adjoint that flows back in time, the values of one step, LayerNorm's input, and the
// activations with their slopes, which the step needs before the norm and after it.
template <class A>
struct Scratch {
  explicit Scratch(int64_t D) : storage(new A[10 * D]) {
    A* next = storage.get();
    for (A** row : {&carry, &u, &g, &before, &forget, &forget_slope, &input, &input_slope, &delta, &delta_slope}) {
      *row = next;
      next += D;
    }
  }
  std::unique_ptr<A[]> storage;
  A *carry, *u, *g, *before, *forget, *forget_slope, *input, *input_slope, *delta, *delta_slope;
};

// As update_row, and keeps the activations and their slopes.
template <class T, class A = acc_t<T>>
NEWLLM_INLINE Statistics<A> update_row_kept(const T* f, const T* i, const T* d, Scratch<A>& scratch, int64_t D,
                                            double eps) {
  for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
    const Activation<Vec<A>> forget = sigmoid(load_if(full, f + k, n));
    const Activation<Vec<A>> input = sigmoid(load_if(full, i + k, n));
    const Activation<Vec<A>> delta = tanh(load_if(full, d + k, n));
    const Vec<A> updated = forget.value * load_if(full, scratch.before + k, n) + input.value * delta.value;
    store_if<false>(full, scratch.u + k, updated, n);
    store_if<false>(full, scratch.forget + k, forget.value, n);
    store_if<false>(full, scratch.forget_slope + k, forget.slope, n);
    store_if<false>(full, scratch.input + k, input.value, n);
    store_if<false>(full, scratch.input_slope + k, input.slope, n);
    store_if<false>(full, scratch.delta + k, delta.value, n);
    store_if<false>(full, scratch.delta_slope + k, delta.slope, n);
  });
  return row_statistics(scratch.u, D, eps);
}

// One step of the adjoint: from grad_c (with the carried part already in scratch.g) to the gates and the carry.
// `stored` is the context that the forward left behind, where it did.
// Returns the statistics of the row; its normalised values stay in scratch.u.
template <bool kStreaming, class T, class G>
NEWLLM_INLINE Statistics<acc_t<T>> backward_step(const NormParams& norm, int64_t D, const G* f, const G* i, const G* d,
                                                 const T* stored, const CutMark<T>& mark, G* grad_f, G* grad_i,
                                                 G* grad_d, Scratch<acc_t<T>>& scratch, acc_t<T>* grad_weight,
                                                 acc_t<T>* grad_bias) {
  using A = acc_t<T>;
  const A* weight = static_cast<const A*>(norm.weight);
  const A* bias = static_cast<const A*>(norm.bias);
  const A limit = A(norm.clamp_value);
  A *u = scratch.u, *g = scratch.g, *before = scratch.before;
  const Statistics<A> s = update_row_kept(f, i, d, scratch, D, norm.eps);
  for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
    const Vec<A> xhat = (load_if(full, u + k, n) - s.mean) * s.rstd;
    const Vec<A> w = affine_weight(full, weight, k, n);
    const Vec<A> y = xhat * w + affine_bias(full, bias, k, n);
    Vec<A> grad = load_if(full, g + k, n);
    if (CutMark<T>::kUsed && stored != nullptr) {
      const Vec<A> c = load_if(full, stored + k, n);
      grad = c >= mark.edge || c <= -mark.edge ? Vec<A>{} : grad;
    } else {
      grad = y > limit || y < -limit ? Vec<A>{} : grad;
    }
    store_if<false>(full, grad_weight + k, load_if(full, grad_weight + k, n) + grad * xhat, n);
    store_if<false>(full, grad_bias + k, load_if(full, grad_bias + k, n) + grad, n);
    store_if<false>(full, u + k, xhat, n);
    store_if<false>(full, g + k, grad * w, n);
  });
  const A mean_g = sum_over<A>(D, [&](int64_t k, auto full, int64_t n) { return load_if(full, g + k, n); }) / A(D);
  const A mean_gx = sum_over<A>(D, [&](int64_t k, auto full,
                                       int64_t n) { return load_if(full, g + k, n) * load_if(full, u + k, n); }) /
                    A(D);
  for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
    const Vec<A> du = (load_if(full, g + k, n) - mean_g - load_if(full, u + k, n) * mean_gx) * s.rstd;
    const auto kept = [&](const A* row) { return load_if(full, row + k, n); };
    store_if<kStreaming>(full, grad_f + k, du * kept(before) * kept(scratch.forget_slope), n);
    store_if<kStreaming>(full, grad_i + k, du * kept(scratch.delta) * kept(scratch.input_slope), n);
    store_if<kStreaming>(full, grad_d + k, du * kept(scratch.input) * kept(scratch.delta_slope), n);
    store_if<false>(full, scratch.carry + k, du * kept(scratch.forget), n);
  });
  return s;
}

}  // namespace newllm::cpu::NEWLLM_ISA
