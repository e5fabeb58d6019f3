// The whole cell over T steps: hidden layers, gates, update, LayerNorm and clamp inside the loop. A task is a few rows
// (batch entries) over all of time; the matrices are packed once, and a row of weights is read once for all rows of a
// task.
#include <array>
#include <optional>
#include <vector>

#include "activations.h"
#include "context_rows.h"
#include "products.h"

namespace newllm::cpu::NEWLLM_ISA {
namespace {

// More rows of one task than this gain nothing: a panel of weights is read once for eight of them.
constexpr int64_t kMostRows = 32;

template <class T>
NEWLLM_INLINE T* row(const View3& view, int64_t b, int64_t t) {
  return view.data ? static_cast<T*>(view.data) + b * view.stride_b + t * view.stride_t : nullptr;
}

// The matrices of the cell, or, for the adjoint, their transposes.
template <class T, class A = acc_t<T>>
struct Matrices {
  Matrices(const RecurrentShape& shape, const RecurrentWeights& weights, bool transposed)
      : context(static_cast<const T*>(weights.context), shape.Z(), shape.D, transposed) {
    for (int64_t layer = 1; layer < shape.layers; ++layer) {
      hidden.emplace_back(static_cast<const T*>(weights.hidden) + (layer - 1) * shape.H * shape.H, shape.H, shape.H,
                          transposed);
    }
    if (shape.layers > 0) gates.emplace(static_cast<const T*>(weights.gates), 3 * shape.D, shape.H, transposed);
  }
  Panels<A> context;
  std::vector<Panels<A>> hidden;
  std::optional<Panels<A>> gates;
};

// Rows of one task, each padded to whole panels, so that every product can read and write them.
template <class A>
struct Rows {
  Rows(int64_t rows, int64_t width) : stride(Panels<A>::padded(width)), data(new A[rows * Panels<A>::padded(width)]) {}
  A* operator[](int64_t r) { return data.get() + r * stride; }
  int64_t stride;
  std::unique_ptr<A[]> data;
};

// target = source + addend, both optional but for the source.
template <class A, class X>
NEWLLM_INLINE void add_to(A* target, const X* addend, int64_t width) {
  if (addend == nullptr) return;
  for_vectors<A>(width, [&](int64_t k, auto full, int64_t n) {
    store_if<false>(full, target + k, load_if(full, target + k, n) + load_if(full, addend + k, n), n);
  });
}

template <class X, class Y, class A = acc_t<X>>
NEWLLM_INLINE void copy_row(const X* source, Y* target, int64_t width) {
  for_vectors<A>(width, [&](int64_t k, auto full, int64_t n) {
    store_if<false>(full, target + k, load_if(full, source + k, n), n);
  });
}

// y = clamp(LayerNorm(x)).
template <class A>
NEWLLM_INLINE void read_row(const NormParams& norm, const A* x, A* y, int64_t D) {
  const Statistics<A> s = row_statistics(x, D, norm.eps);
  for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
    const Vec<A> xhat = (load_if(full, x + k, n) - s.mean) * s.rstd;
    const Vec<A> value = xhat * affine_weight(full, static_cast<const A*>(norm.weight), k, n) +
                         affine_bias(full, static_cast<const A*>(norm.bias), k, n);
    store_if<false>(full, y + k, clamped(value, A(norm.clamp_value)), n);
  });
}

// decay *= sigmoid(f) and, where LayerNorm is in the loop, the diagonal of its Jacobian: w rstd (1 - (1 + xhat^2) / D).
template <class A, class Xhat>
NEWLLM_INLINE void multiply_decay(const RecurrentShape& shape, const NormParams& norm, A* decay, const A* f, A rstd,
                                  const Xhat& xhat) {
  const bool normed = shape.norm_kind == NormKind::kState;
  const A over_width = A(1) / A(shape.D);
  for_vectors<A>(shape.D, [&](int64_t k, auto full, int64_t n) {
    Vec<A> factor = sigmoid(load_if(full, f + k, n)).value;
    if (normed) {
      const Vec<A> x = xhat(k, full, n);
      factor *= affine_weight(full, static_cast<const A*>(norm.weight), k, n) * rstd * (1 - (1 + x * x) * over_width);
    }
    store_if<false>(full, decay + k, load_if(full, decay + k, n) * factor, n);
  });
}

template <class T, class A = acc_t<T>>
class Forward {
 public:
  Forward(const RecurrentArgs& args, const Matrices<T>& matrices, int64_t begin, int64_t end)
      : args_(args),
        shape_(args.shape),
        matrices_(matrices),
        b0_(begin),
        rows_(end - begin),
        state_(rows_, shape_.D),
        read_(rows_, shape_.D),
        x_(rows_, shape_.H),
        y_(rows_, std::max(shape_.H, 3 * shape_.D)),
        u_(1, shape_.D) {}

  void run() {
    const int64_t D = shape_.D;
    for (int64_t r = 0; r < rows_; ++r) {
      copy_row(static_cast<const A*>(args_.c0) + (b0_ + r) * D, state_[r], D);
      if (args_.decay) std::fill_n(decay(r), D, A(1));
    }
    for (int64_t t = 0; t < shape_.T; ++t) step(t);
    for (int64_t r = 0; r < rows_; ++r) copy_row(state_[r], static_cast<A*>(args_.c_last) + (b0_ + r) * D, D);
  }

 private:
  A* decay(int64_t r) { return static_cast<A*>(args_.decay) + (b0_ + r) * shape_.D; }

  void step(int64_t t) {
    const bool output = shape_.norm_kind == NormKind::kOutput;
    if (output) {
      for (int64_t r = 0; r < rows_; ++r) read_row(args_.norm, state_[r], read_[r], shape_.D);
    }
    Rows<A>& read = output ? read_ : state_;
    matrices_.context.multiply(read[0], read.stride, y_[0], y_.stride, rows_);
    for (int64_t r = 0; r < rows_; ++r) {
      add_to(y_[r], row<const T>(args_.z, b0_ + r, t), shape_.Z());
      keep(r, t, 0, shape_.Z());
    }
    const A* hidden_bias = static_cast<const A*>(args_.weights.hidden_bias);
    for (int64_t layer = 0; layer < shape_.layers; ++layer) {
      activate();
      const bool last = layer == shape_.layers - 1;
      const A* bias = last          ? static_cast<const A*>(args_.weights.gates_bias)
                      : hidden_bias ? hidden_bias + layer * shape_.H
                                    : nullptr;
      const int64_t width = last ? 3 * shape_.D : shape_.H;
      (last ? *matrices_.gates : matrices_.hidden[layer]).multiply(x_[0], x_.stride, y_[0], y_.stride, rows_);
      for (int64_t r = 0; r < rows_; ++r) {
        add_to(y_[r], bias, width);
        keep(r, t, (layer + 1) * shape_.H, width);
      }
    }
    for (int64_t r = 0; r < rows_; ++r) update(r, t);
  }

  // Pre-activations for the backward.
  void keep(int64_t r, int64_t t, int64_t column, int64_t width) {
    if (args_.pre.data) copy_row(y_[r], row<T>(args_.pre, b0_ + r, t) + column, width);
  }

  void activate() {
    with_activation(shape_.activation, [&](auto activation) {
      for (int64_t r = 0; r < rows_; ++r) {
        for_vectors<A>(shape_.H, [&](int64_t k, auto full, int64_t n) {
          store_if<false>(full, x_[r] + k, activation(load_if(full, y_[r] + k, n)).value, n);
        });
      }
    });
  }

  void update(int64_t r, int64_t t) {
    const int64_t D = shape_.D;
    A *f = y_[r], *state = state_[r], *u = u_[0];
    T* c = row<T>(args_.c, b0_ + r, t);
    if (shape_.norm_kind != NormKind::kState) {
      for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
        const Vec<A> next = sigmoid(load_if(full, f + k, n)).value * load_if(full, state + k, n) +
                            gated_write(load_if(full, f + D + k, n), load_if(full, f + 2 * D + k, n));
        store_if<false>(full, state + k, next, n);
        store_if<false>(full, c + k, next, n);
      });
      if (args_.decay) multiply_decay(shape_, args_.norm, decay(r), f, A(0), [](auto...) { return Vec<A>{}; });
      return;
    }
    const CutMark<T> mark(args_.norm.clamp_value);
    const A limit = A(args_.norm.clamp_value);
    const Statistics<A> s = update_row(f, f + D, f + 2 * D, state, u, D, args_.norm.eps);
    const auto xhat = [&](int64_t k, auto full, int64_t n) { return (load_if(full, u + k, n) - s.mean) * s.rstd; };
    for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
      const Vec<A> y = xhat(k, full, n) * affine_weight(full, static_cast<const A*>(args_.norm.weight), k, n) +
                       affine_bias(full, static_cast<const A*>(args_.norm.bias), k, n);
      const Vec<A> next = clamped(y, limit);
      store_if<false>(full, state + k, next, n);
      store_context(full, c + k, y, next, limit, mark, n);
    });
    if (args_.decay) multiply_decay(shape_, args_.norm, decay(r), f, s.rstd, xhat);
  }

  const RecurrentArgs& args_;
  const RecurrentShape& shape_;
  const Matrices<T>& matrices_;
  int64_t b0_, rows_;
  Rows<A> state_, read_, x_, y_, u_;
};

// From the gradients of the contexts to those of all pre-activations: what the gradients of weights and inputs are
// products of, for all of time at once and outside.
template <class T, class A = acc_t<T>>
class Backward {
 public:
  Backward(const RecurrentBackwardArgs& args, const Matrices<T>& matrices, A* grad_norm, int64_t begin, int64_t end)
      : args_(args),
        shape_(args.shape),
        matrices_(matrices),
        grad_norm_(grad_norm),
        b0_(begin),
        rows_(end - begin),
        carry_(rows_, shape_.D),
        gates_(1, 3 * shape_.D),
        x_(rows_, std::max(shape_.H, 3 * shape_.D)),
        y_(rows_, std::max(shape_.H, shape_.D)),
        scratch_(shape_.D) {}

  void run() {
    const int64_t D = shape_.D;
    for (int64_t r = 0; r < rows_; ++r) {
      std::fill_n(carry_[r], D, A(0));
      if (args_.grad_c_last) add_to(carry_[r], static_cast<const A*>(args_.grad_c_last) + (b0_ + r) * D, D);
      std::fill_n(grad_weight(r), 2 * D, A(0));
      if (args_.decay) std::fill_n(decay(r), D, A(1));
    }
    for (int64_t t = shape_.T - 1; t >= 0; --t) step(t);
    for (int64_t r = 0; r < rows_; ++r) copy_row(carry_[r], static_cast<A*>(args_.grad_c0) + (b0_ + r) * D, D);
  }

 private:
  A* grad_weight(int64_t r) { return grad_norm_ + (b0_ + r) * 2 * shape_.D; }
  A* grad_bias(int64_t r) { return grad_weight(r) + shape_.D; }
  A* decay(int64_t r) { return static_cast<A*>(args_.decay) + (b0_ + r) * shape_.D; }

  void load_before(int64_t r, int64_t t) {
    if (t > 0) {
      copy_row(row<const T>(args_.c, b0_ + r, t - 1), scratch_.before, shape_.D);
    } else {
      copy_row(static_cast<const A*>(args_.c0) + (b0_ + r) * shape_.D, scratch_.before, shape_.D);
    }
  }

  void step(int64_t t) {
    for (int64_t r = 0; r < rows_; ++r) update(r, t);
    for (int64_t layer = shape_.layers - 1; layer >= 0; --layer) {
      const bool last = layer == shape_.layers - 1;
      (last ? *matrices_.gates : matrices_.hidden[layer]).multiply(x_[0], x_.stride, y_[0], y_.stride, rows_);
      activate(t, layer);
    }
    matrices_.context.multiply(x_[0], x_.stride, y_[0], y_.stride, rows_);
    for (int64_t r = 0; r < rows_; ++r) {
      if (shape_.norm_kind == NormKind::kOutput) {
        load_before(r, t);
        read_backward(r);
      }
      add_to(carry_[r], y_[r], shape_.D);
    }
  }

  // Gates, update and the norm in the loop: the gradients of f, i, d to x_, the direct part of the carry.
  void update(int64_t r, int64_t t) {
    const int64_t D = shape_.D, column = shape_.layers * shape_.H;
    A *f = gates_[0], *grad_f = x_[r];
    copy_row(row<const T>(args_.pre, b0_ + r, t) + column, f, 3 * D);
    load_before(r, t);
    add_to(carry_[r], row<const T>(args_.grad_c, b0_ + r, t), D);
    copy_row(carry_[r], scratch_.g, D);
    scratch_.carry = carry_[r];
    if (shape_.norm_kind == NormKind::kState) {
      const CutMark<T> mark(args_.norm.clamp_value);
      const Statistics<A> s =
          backward_step<false>(args_.norm, D, f, f + D, f + 2 * D, row<const T>(args_.c, b0_ + r, t), mark, grad_f,
                               grad_f + D, grad_f + 2 * D, scratch_, grad_weight(r), grad_bias(r));
      if (args_.decay) {
        multiply_decay(shape_, args_.norm, decay(r), f, s.rstd,
                       [&](int64_t k, auto full, int64_t n) { return load_if(full, scratch_.u + k, n); });
      }
    } else {
      gates_backward(f, grad_f);
      if (args_.decay) multiply_decay(shape_, args_.norm, decay(r), f, A(0), [](auto...) { return Vec<A>{}; });
    }
    copy_row(grad_f, row<T>(args_.grad_pre, b0_ + r, t) + column, 3 * D);
  }

  // u = sigmoid(f) c + sigmoid(i) tanh(d), whose gradient is in scratch_.g.
  void gates_backward(const A* f, A* grad_f) {
    const int64_t D = shape_.D;
    for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
      const Activation<Vec<A>> forget = sigmoid(load_if(full, f + k, n)), input = sigmoid(load_if(full, f + D + k, n));
      const Activation<Vec<A>> delta = tanh(load_if(full, f + 2 * D + k, n));
      const Vec<A> du = load_if(full, scratch_.g + k, n);
      store_if<false>(full, grad_f + k, du * load_if(full, scratch_.before + k, n) * forget.slope, n);
      store_if<false>(full, grad_f + D + k, du * delta.value * input.slope, n);
      store_if<false>(full, grad_f + 2 * D + k, du * input.value * delta.slope, n);
      store_if<false>(full, scratch_.carry + k, du * forget.value, n);
    });
  }

  // y_, the gradient of what a hidden layer gave, to x_, that of its pre-activations.
  void activate(int64_t t, int64_t layer) {
    const int64_t column = layer * shape_.H;
    const bool relu = shape_.activation == ActivationKind::kRelu;  // stops a NaN where it stops everything
    with_activation(shape_.activation, [&](auto activation) {
      for (int64_t r = 0; r < rows_; ++r) {
        const T* pre = row<const T>(args_.pre, b0_ + r, t) + column;
        T *hidden = row<T>(args_.hidden, b0_ + r, t) + column, *grad = row<T>(args_.grad_pre, b0_ + r, t) + column;
        for_vectors<A>(shape_.H, [&](int64_t k, auto full, int64_t n) {
          const auto h = activation(load_if(full, pre + k, n));
          const Vec<A> dh = load_if(full, y_[r] + k, n);
          const Vec<A> da = relu ? (h.slope > 0 ? dh : Vec<A>{}) : dh * h.slope;
          store_if<false>(full, x_[r] + k, da, n);
          store_if<false>(full, grad + k, da, n);
          store_if<false>(full, hidden + k, h.value, n);
        });
      }
    });
  }

  // y_[r], the gradient of what is read of the context in scratch_.before, becomes that of this context.
  void read_backward(int64_t r) {
    const int64_t D = shape_.D;
    const A limit = A(args_.norm.clamp_value);
    A *x = scratch_.before, *g = y_[r], *w_sum = grad_weight(r), *b_sum = grad_bias(r);
    const Statistics<A> s = row_statistics(x, D, args_.norm.eps);
    const auto xhat = [&](int64_t k, auto full, int64_t n) { return (load_if(full, x + k, n) - s.mean) * s.rstd; };
    for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
      const Vec<A> w = affine_weight(full, static_cast<const A*>(args_.norm.weight), k, n);
      const Vec<A> y = xhat(k, full, n) * w + affine_bias(full, static_cast<const A*>(args_.norm.bias), k, n);
      Vec<A> grad = load_if(full, g + k, n);
      grad = y > limit || y < -limit ? Vec<A>{} : grad;
      store_if<false>(full, w_sum + k, load_if(full, w_sum + k, n) + grad * xhat(k, full, n), n);
      store_if<false>(full, b_sum + k, load_if(full, b_sum + k, n) + grad, n);
      store_if<false>(full, g + k, grad * w, n);
    });
    const auto gradient = [&](int64_t k, auto full, int64_t n) { return load_if(full, g + k, n); };
    const A mean_g = sum_over<A>(D, gradient) / A(D);
    const A mean_gx =
        sum_over<A>(D, [&](int64_t k, auto full, int64_t n) { return gradient(k, full, n) * xhat(k, full, n); }) / A(D);
    for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
      store_if<false>(full, g + k, (gradient(k, full, n) - mean_g - xhat(k, full, n) * mean_gx) * s.rstd, n);
    });
  }

  const RecurrentBackwardArgs& args_;
  const RecurrentShape& shape_;
  const Matrices<T>& matrices_;
  A* grad_norm_;  // (B, 2, D): of every row its own, added in their order whatever the number of threads
  int64_t b0_, rows_;
  Rows<A> carry_, gates_, x_, y_;
  Scratch<A> scratch_;
};

// Rows to tasks: as many as there are threads, for every task reads all weights at every step.
template <class Body>
void for_rows(int64_t B, const Body& body) {
  const int64_t per_task = std::max<int64_t>(1, std::min(kMostRows, (B + thread_count() - 1) / thread_count()));
  const int64_t tasks = (B + per_task - 1) / per_task;
  parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task * per_task, std::min(B, (task + 1) * per_task));
  });
}

template <class Body>
void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kFloat64: return body(double{});
    case DType::kBFloat16: return body(bfloat16{});
    case DType::kFloat16: return body(float16{});
  }
}

}  // namespace

void recurrent_forward(const RecurrentArgs& args) {
  for_dtype(args.shape.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Matrices<T> matrices(args.shape, args.weights, false);
    for_rows(args.shape.B, [&](int64_t begin, int64_t end) { Forward<T>(args, matrices, begin, end).run(); });
  });
}

void recurrent_backward(const RecurrentBackwardArgs& args) {
  for_dtype(args.shape.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const int64_t B = args.shape.B, D = args.shape.D;
    const Matrices<T> matrices(args.shape, args.weights, true);
    const std::unique_ptr<A[]> grad_norm(new A[B * 2 * D]), sums(new A[2 * D]);
    for_rows(B, [&](int64_t begin, int64_t end) { Backward<T>(args, matrices, grad_norm.get(), begin, end).run(); });
    reduce_blocks(grad_norm.get(), B, 2 * D, sums.get());
    std::copy_n(sums.get(), D, static_cast<A*>(args.grad_weight));
    std::copy_n(sums.get() + D, D, static_cast<A*>(args.grad_bias));
  });
}

}  // namespace newllm::cpu::NEWLLM_ISA
