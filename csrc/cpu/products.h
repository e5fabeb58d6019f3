// Products of a few rows with a matrix that stays the same for many calls: y = x W^T or x W, the matrix packed once.
#pragma once

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "vec.h"

namespace newllm::cpu::NEWLLM_ISA {

// Vector registers that hold sums; the rest of 32 or 16 are for the matrix and for what is broadcast.
inline constexpr int kSums = NEWLLM_VECTOR_BYTES == 64 ? 16 : 8;
inline constexpr int kPanelVectors = 4;

// A matrix as panels of kPanelVectors vectors of outputs: panel p holds, for every k, the weights of its outputs side
// by side, so that a product reads memory in order. Outputs are padded with zeros to whole panels.
template <class A>
class Panels {
 public:
  static constexpr int64_t kWidth = kPanelVectors * kLanes<A>;

  // Of outputs y_n = sum_k W[n, k] x_k, or, transposed, y_k = sum_n W[n, k] x_n.
  template <class T>
  Panels(const T* weights, int64_t N, int64_t K, bool transposed)
      : outputs_(transposed ? K : N), inputs_(transposed ? N : K), data_(new A[padded(outputs_) * inputs_ + 16]) {
    // Panels start at whole cache lines.
    start_ = data_.get() + (64 - reinterpret_cast<uintptr_t>(data_.get()) % 64) % 64 / sizeof(A);
    parallel_for(padded(outputs_) / kWidth, std::max<int64_t>(1, kElementsPerThread / (kWidth * inputs_)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t panel = begin; panel < end; ++panel) pack(weights, K, transposed, panel);
                 });
  }

  static int64_t padded(int64_t width) { return (width + kWidth - 1) / kWidth * kWidth; }
  int64_t padded_outputs() const { return padded(outputs_); }

  // y (rows, padded outputs) = x (rows, inputs) times the matrix; rows of y and x lie y_stride and x_stride apart.
  void multiply(const A* x, int64_t x_stride, A* y, int64_t y_stride, int64_t rows) const {
    for (int64_t panel = 0; panel < padded(outputs_) / kWidth; ++panel) {
      const A* weights = start_ + panel * kWidth * inputs_;
      int64_t row = 0;
      const auto block = [&](auto count) {
        for (; row + count <= rows; row += count) {
          tile<count>(weights, x + row * x_stride, x_stride, y + row * y_stride + panel * kWidth, y_stride);
        }
      };
      block(std::integral_constant<int, 8>{});
      block(std::integral_constant<int, 4>{});
      block(std::integral_constant<int, 1>{});
    }
  }

 private:
  static A widened(A x) { return x; }
  static A widened(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
  static A widened(float16 x) { return half_to_float(x.bits); }

  template <class T>
  void pack(const T* weights, int64_t K, bool transposed, int64_t panel) {
    const int64_t first = panel * kWidth, here = std::min(kWidth, outputs_ - first);
    A* target = start_ + first * inputs_;
    if (here < kWidth) std::fill_n(target, kWidth * inputs_, A(0));
    for (int64_t outer = 0; outer < (transposed ? inputs_ : here); ++outer) {  // in the order the weights lie
      if (transposed) {
        for (int64_t j = 0; j < here; ++j) target[outer * kWidth + j] = widened(weights[outer * K + first + j]);
      } else {
        for (int64_t k = 0; k < K; ++k) target[k * kWidth + outer] = widened(weights[(first + outer) * K + k]);
      }
    }
  }

  // One panel for R rows: the sums stay in registers, in the order of k whatever R is.
  template <int R>
  NEWLLM_INLINE void tile(const A* weights, const A* x, int64_t x_stride, A* y, int64_t y_stride) const {
    constexpr int V = std::min(kPanelVectors, kSums / R);
    for (int v0 = 0; v0 < kPanelVectors; v0 += V) {
      Vec<A> sums[R][V] = {};
      const A* w = weights + v0 * kLanes<A>;
      for (int64_t k = 0; k < inputs_; ++k, w += kWidth) {
        Vec<A> columns[V];
        for (int v = 0; v < V; ++v) columns[v] = load(w + v * kLanes<A>);
        for (int r = 0; r < R; ++r) {
          const Vec<A> value = splat<A>(x[r * x_stride + k]);
          for (int v = 0; v < V; ++v) sums[r][v] += value * columns[v];
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) store(y + r * y_stride + (v0 + v) * kLanes<A>, sums[r][v]);
      }
    }
  }

  int64_t outputs_, inputs_;
  std::unique_ptr<A[]> data_;
  A* start_;
};

}  // namespace newllm::cpu::NEWLLM_ISA
