// The cell with LayerNorm and clamp in the loop: context_update is one step of it, context_scan all T in one call.
// A row needs its own mean before it can go on, so a task is a whole row of D and time is walked in order; rows
// (batch entries) run in parallel.
#include <vector>

#include "context_rows.h"

namespace newllm::cpu::NEWLLM_ISA {
namespace {

template <class T>
NEWLLM_INLINE T* row(const View3& view, int64_t b, int64_t t) {
  return view.data ? static_cast<T*>(view.data) + b * view.stride_b + t * view.stride_t : nullptr;
}

template <class T, class S>
void forward_row(const ContextArgs& args, int64_t b, acc_t<T>* state, acc_t<T>* u) {
  using A = acc_t<T>;
  const int64_t D = args.D;
  const A* weight = static_cast<const A*>(args.norm.weight);
  const A* bias = static_cast<const A*>(args.norm.bias);
  const A limit = A(args.norm.clamp_value);
  const CutMark<T> mark(args.norm.clamp_value);
  const S* c0 = row<const S>(args.c0, b, 0);
  S* c_last = row<S>(args.c_last, b, 0);
  if (args.T == 0) std::copy_n(c0, D, c_last);
  for (int64_t t = 0; t < args.T; ++t) {
    const T *f = row<const T>(args.f, b, t), *i = row<const T>(args.i, b, t), *d = row<const T>(args.d, b, t);
    T* c = row<T>(args.c, b, t);
    const bool last = t == args.T - 1;
    const Statistics<A> s =
        t == 0 ? update_row(f, i, d, c0, u, D, args.norm.eps) : update_row(f, i, d, state, u, D, args.norm.eps);
    for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
      const Vec<A> xhat = (load_if(full, u + k, n) - s.mean) * s.rstd;
      const Vec<A> y = xhat * affine_weight(full, weight, k, n) + affine_bias(full, bias, k, n);
      const Vec<A> next = clamped(y, limit);
      if (!last) store_if<false>(full, state + k, next, n);
      if (last) store_if<false>(full, c_last + k, next, n);
      if (c != nullptr) store_context(full, c + k, y, next, limit, mark, n);
    });
  }
}

template <class T, class S, bool kStreaming>
void backward_row(const ContextBackwardArgs& args, int64_t b, Scratch<acc_t<T>>& scratch, acc_t<T>* grad_weight,
                  acc_t<T>* grad_bias) {
  using A = acc_t<T>;
  const int64_t D = args.D;
  const CutMark<T> mark(args.norm.clamp_value);
  const S* last = row<const S>(args.grad_c_last, b, 0);
  const S* c0 = row<const S>(args.c0, b, 0);
  for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
    store_if<false>(full, scratch.carry + k, last ? load_if(full, last + k, n) : Vec<A>{}, n);
  });
  for (int64_t t = args.T - 1; t >= 0; --t) {
    const T* grad_c = row<const T>(args.grad_c, b, t);
    const T* before = t > 0 ? row<const T>(args.c, b, t - 1) : nullptr;
    for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
      Vec<A> g = load_if(full, scratch.carry + k, n);
      if (grad_c != nullptr) g += load_if(full, grad_c + k, n);
      store_if<false>(full, scratch.g + k, g, n);
      const Vec<A> c = before != nullptr ? load_if(full, before + k, n) : load_if(full, c0 + k, n);
      store_if<false>(full, scratch.before + k, c, n);
    });
    backward_step<kStreaming, T>(args.norm, D, row<const T>(args.f, b, t), row<const T>(args.i, b, t),
                                 row<const T>(args.d, b, t), row<const T>(args.c, b, t), mark,
                                 row<T>(args.grad_f, b, t), row<T>(args.grad_i, b, t), row<T>(args.grad_d, b, t),
                                 scratch, grad_weight, grad_bias);
  }
  S* grad_c0 = row<S>(args.grad_c0, b, 0);
  for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
    store_if<false>(full, grad_c0 + k, load_if(full, scratch.carry + k, n), n);
  });
}

// The state is stored as T or as acc_t<T>; for float and double these are the same.
template <class Body>
void for_dtypes(DType dtype, DType state_dtype, const Body& body) {
  const auto typed = [&](auto tag) {
    using T = decltype(tag);
    state_dtype == dtype ? body(tag, T{}) : body(tag, acc_t<T>{});
  };
  switch (dtype) {
    case DType::kFloat32: return body(float{}, float{});
    case DType::kFloat64: return body(double{}, double{});
    case DType::kBFloat16: return typed(bfloat16{});
    case DType::kFloat16: return typed(float16{});
  }
}

}  // namespace

void context_forward(const ContextArgs& args) {
  for_dtypes(args.dtype, args.state_dtype, [&](auto tag, auto state_tag) {
    using T = decltype(tag);
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, args.T * args.D));
    parallel_for(args.B, grain, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<acc_t<T>[]> scratch(new acc_t<T>[2 * args.D]);
      for (int64_t b = begin; b < end; ++b) {
        forward_row<T, decltype(state_tag)>(args, b, scratch.get(), scratch.get() + args.D);
      }
    });
  });
}

void context_backward(const ContextBackwardArgs& args) {
  for_dtypes(args.dtype, args.state_dtype, [&](auto tag, auto state_tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const RowBlocks blocks(args.B, args.T * args.D);
    bool streaming = 3 * args.B * args.T * args.D * int64_t(sizeof(T)) > kStreamingBytes;
    for (const View3& view : {args.grad_f, args.grad_i, args.grad_d}) {
      streaming = streaming && is_aligned<T>(view.data, view.stride_b, view.stride_t);
    }
    const std::unique_ptr<A[]> partial(new A[2 * blocks.count * args.D]);
    A* partial_bias = partial.get() + blocks.count * args.D;
    parallel_for(blocks.count, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(args.D);
      for (int64_t block = begin; block < end; ++block) {
        A* grad_weight = partial.get() + block * args.D;
        A* grad_bias = partial_bias + block * args.D;
        std::fill_n(grad_weight, args.D, A(0));
        std::fill_n(grad_bias, args.D, A(0));
        const int64_t last = std::min(args.B, (block + 1) * blocks.rows_per_block);
        for (int64_t b = block * blocks.rows_per_block; b < last; ++b) {
          streaming ? backward_row<T, decltype(state_tag), true>(args, b, scratch, grad_weight, grad_bias)
                    : backward_row<T, decltype(state_tag), false>(args, b, scratch, grad_weight, grad_bias);
        }
      }
      if (streaming) finish_streaming();
    });
    reduce_blocks(partial.get(), blocks.count, args.D, static_cast<A*>(args.grad_weight));
    reduce_blocks(partial_bias, blocks.count, args.D, static_cast<A*>(args.grad_bias));
  });
}

}  // namespace newllm::cpu::NEWLLM_ISA
