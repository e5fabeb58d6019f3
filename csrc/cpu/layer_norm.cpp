// LayerNorm over the last dimension, optionally of x + residual, and its backward.
#include <memory>

#include "norm.h"

namespace newllm::cpu::NEWLLM_ISA {
namespace {

template <class T, bool kStreaming>
void forward_rows(const LayerNormArgs& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t D = args.D;
  const A* weight = static_cast<const A*>(args.norm.weight);
  const A* bias = static_cast<const A*>(args.norm.bias);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(args.x) + r * args.x_stride;
    T* y = static_cast<T*>(args.y) + r * D;
    if (args.residual != nullptr) {
      const T* residual = static_cast<const T*>(args.residual) + r * args.residual_stride;
      T* sum = static_cast<T*>(args.sum) + r * D;
      for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
        store_if<false>(full, sum + k, load_if(full, x + k, n) + load_if(full, residual + k, n), n);
      });
      x = sum;  // what is normalised is the stored (rounded) sum, so the backward sees the same numbers
    }
    const Statistics<A> s = row_statistics(x, D, args.norm.eps);
    static_cast<A*>(args.mean)[r] = s.mean;
    static_cast<A*>(args.rstd)[r] = s.rstd;
    const auto write = [&](auto has_weight, auto has_bias) {
      for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
        Vec<A> value = (load_if(full, x + k, n) - s.mean) * s.rstd;
        if constexpr (has_weight.value) value *= load_if(full, weight + k, n);
        if constexpr (has_bias.value) value += load_if(full, bias + k, n);
        store_if<kStreaming>(full, y + k, value, n);
      });
    };
    if (weight != nullptr && bias != nullptr) {
      write(std::true_type{}, std::true_type{});
    } else if (weight != nullptr) {
      write(std::true_type{}, std::false_type{});
    } else if (bias != nullptr) {
      write(std::false_type{}, std::true_type{});
    } else {
      write(std::false_type{}, std::false_type{});
    }
  }
}

// With g = grad_y * weight and xhat = (x - mean) * rstd:
//   grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_sum
template <class T, bool kStreaming>
void backward_rows(const LayerNormBackwardArgs& args, int64_t begin, int64_t end, acc_t<T>* grad_weight,
                   acc_t<T>* grad_bias) {
  using A = acc_t<T>;
  const int64_t D = args.D;
  const A* weight = static_cast<const A*>(args.norm.weight);
  std::fill_n(grad_weight, D, A(0));
  std::fill_n(grad_bias, D, A(0));
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(args.x) + r * args.x_stride;
    const T* dy = args.grad_y ? static_cast<const T*>(args.grad_y) + r * args.grad_y_stride : nullptr;
    const T* direct = args.grad_sum ? static_cast<const T*>(args.grad_sum) + r * args.grad_sum_stride : nullptr;
    T* dx = static_cast<T*>(args.grad_x) + r * D;
    const A mean = static_cast<const A*>(args.mean)[r];
    const A rstd = static_cast<const A*>(args.rstd)[r];
    Vec<A> sum_g[2] = {}, sum_gx[2] = {};
    A tail_g = 0, tail_gx = 0;
    if (dy != nullptr) {
      for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
        const Vec<A> grad = load_if(full, dy + k, n);
        const Vec<A> xhat = (load_if(full, x + k, n) - mean) * rstd;
        const Vec<A> g = grad * affine_weight(full, weight, k, n);
        store_if<false>(full, grad_weight + k, load_if(full, grad_weight + k, n) + grad * xhat, n);
        store_if<false>(full, grad_bias + k, load_if(full, grad_bias + k, n) + grad, n);
        if constexpr (full.value) {
          const int odd = (k / kLanes<A>)&1;
          sum_g[odd] += g;
          sum_gx[odd] += g * xhat;
        } else {
          const Vec<A> gx = g * xhat;
          for (int64_t lane = 0; lane < n; ++lane) {
            tail_g += g[lane];
            tail_gx += gx[lane];
          }
        }
      });
    }
    const A mean_g = (sum_lanes(sum_g[0] + sum_g[1]) + tail_g) / A(D);
    const A mean_gx = (sum_lanes(sum_gx[0] + sum_gx[1]) + tail_gx) / A(D);
    for_vectors<A>(D, [&](int64_t k, auto full, int64_t n) {
      Vec<A> value{};
      if (dy != nullptr) {
        const Vec<A> xhat = (load_if(full, x + k, n) - mean) * rstd;
        value = (load_if(full, dy + k, n) * affine_weight(full, weight, k, n) - mean_g - xhat * mean_gx) * rstd;
      }
      if (direct != nullptr) value += load_if(full, direct + k, n);
      store_if<kStreaming>(full, dx + k, value, n);
    });
  }
}

template <class Body>
void for_dtype(DType dtype, int64_t elements, const void* out, int64_t stride, const Body& body) {
  const auto typed = [&](auto tag) {
    using T = decltype(tag);
    const bool streaming = elements * int64_t(sizeof(T)) > kStreamingBytes && is_aligned<T>(out, 0, stride);
    streaming ? body(tag, std::true_type{}) : body(tag, std::false_type{});
  };
  switch (dtype) {
    case DType::kFloat32: return typed(float{});
    case DType::kFloat64: return typed(double{});
    case DType::kBFloat16: return typed(bfloat16{});
    case DType::kFloat16: return typed(float16{});
  }
}

}  // namespace

void layer_norm_forward(const LayerNormArgs& args) {
  for_dtype(args.dtype, args.rows * args.D, args.y, args.D, [&](auto tag, auto streaming) {
    using T = decltype(tag);
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, args.D));
    parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
      forward_rows<T, streaming.value>(args, begin, end);
      if (streaming.value) finish_streaming();
    });
  });
}

void layer_norm_backward(const LayerNormBackwardArgs& args) {
  for_dtype(args.dtype, args.rows * args.D, args.grad_x, args.D, [&](auto tag, auto streaming) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const RowBlocks blocks(args.rows, args.D);
    const std::unique_ptr<A[]> partial(new A[2 * blocks.count * args.D]);
    A* partial_bias = partial.get() + blocks.count * args.D;
    parallel_for(blocks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * blocks.rows_per_block;
        const int64_t last = std::min(args.rows, first + blocks.rows_per_block);
        backward_rows<T, streaming.value>(args, first, last, partial.get() + block * args.D,
                                          partial_bias + block * args.D);
      }
      if (streaming.value) finish_streaming();
    });
    reduce_blocks(partial.get(), blocks.count, args.D, static_cast<A*>(args.grad_weight));
    reduce_blocks(partial_bias, blocks.count, args.D, static_cast<A*>(args.grad_bias));
  });
}

}  // namespace newllm::cpu::NEWLLM_ISA
