// LayerNorm over rows, forward and backward, each row read once and kept in registers.
//
//     vector     16 bytes of a row, kEach elements; a thread holds VPT of them, a group of threads the whole row
//     group      LPR lanes of a warp (WPR 1), or WPR warps, which add their sums up through shared memory
//     block      walks rows, one a group at a time, the next on its way while one is computed
//
// Mean and variance take one reduction each, the second of centred squares, which does not cancel. Backward a thread
// keeps its columns' share of the gradients of weight and bias in registers; groups of a block are added in order, then
// blocks in a second kernel, so the same inputs give the same bits.
#pragma once

#include "numeric.cuh"

namespace newllm::cuda {

struct LayerNormRun {
  LayerNormArgs args;
  Parameter weight, bias;
};

struct LayerNormBackwardRun {
  LayerNormBackwardArgs args;
  Parameter weight;
  float* partial = nullptr;  // (2, blocks, D)
};

template <class T, int LPR, int WPR, int VPT, bool ALIGNED>
struct RowLayout {
  static constexpr int kEach = 16 / sizeof(T);
  static constexpr int kGroup = WPR > 1 ? 32 * WPR : LPR;       // threads of a row
  static constexpr int kThreads = kGroup > 256 ? kGroup : 256;  // of a block
  static constexpr int kGroups = kThreads / kGroup;             // rows at a time
  static_assert(WPR == 1 || LPR == 32);

  struct alignas(16) Raw {
    T x[kEach];
  };

  // The first column of a thread's vector v.
  static __device__ __forceinline__ int64_t column(int v) {
    return (int64_t(v) * kGroup + threadIdx.x % kGroup) * kEach;
  }

  static __device__ __forceinline__ void load_one(const T* row, int64_t D, bool there, int v, Raw& raw) {
    const int64_t at = column(v);
    if constexpr (ALIGNED) {
      int4 bits = make_int4(0, 0, 0, 0);
      if (there && at < D) bits = __ldcs(reinterpret_cast<const int4*>(row + at));
      raw = *reinterpret_cast<const Raw*>(&bits);
    } else {
#pragma unroll
      for (int e = 0; e < kEach; ++e) raw.x[e] = there && at + e < D ? row[at + e] : T(0.0f);
    }
  }

  static __device__ __forceinline__ void load(const T* row, int64_t D, bool there, Raw (&raw)[VPT]) {
#pragma unroll
    for (int v = 0; v < VPT; ++v) load_one(row, D, there, v, raw[v]);
  }

  // Keeps the compiler from holding the vector as floats between two uses, in twice the registers.
  static __device__ __forceinline__ void keep_packed(Raw& raw) {
    int4& bits = reinterpret_cast<int4&>(raw);
    asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
  }

  static __device__ __forceinline__ void store(T* row, int64_t D, bool there, int v, const Raw& raw) {
    const int64_t at = column(v);
    if constexpr (ALIGNED) {
      if (there && at < D) *reinterpret_cast<int4*>(row + at) = *reinterpret_cast<const int4*>(&raw);
    } else {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (there && at + e < D) row[at + e] = raw.x[e];
      }
    }
  }

  // kEach values of weight or bias from column `at` on.
  static __device__ __forceinline__ void load(const Parameter& parameter, float absent, int64_t at, int64_t D,
                                              float (&w)[kEach]) {
    if (parameter.data == nullptr || at >= D) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) w[e] = absent;
    } else if (parameter.is_float) {
      const float* data = static_cast<const float*>(parameter.data) + at;
      if constexpr (ALIGNED) {
#pragma unroll
        for (int e = 0; e < kEach; e += 4) {
          const float4 four = __ldg(reinterpret_cast<const float4*>(data + e));
          w[e] = four.x, w[e + 1] = four.y, w[e + 2] = four.z, w[e + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int e = 0; e < kEach; ++e) w[e] = at + e < D ? __ldg(data + e) : absent;
      }
    } else {
      const T* data = static_cast<const T*>(parameter.data) + at;
      if constexpr (ALIGNED) {
        const int4 bits = __ldg(reinterpret_cast<const int4*>(data));
#pragma unroll
        for (int e = 0; e < kEach; ++e) w[e] = to_float(reinterpret_cast<const Raw*>(&bits)->x[e]);
      } else {
#pragma unroll
        for (int e = 0; e < kEach; ++e) w[e] = at + e < D ? to_float(data[e]) : absent;
      }
    }
  }

  // Sums over the group, in every thread of it. Every thread of the block must call; `scratch` must be another one than
  // at the call before.
  template <int N>
  static __device__ __forceinline__ void sum(float (&x)[N], float (&scratch)[N][kThreads / 32]) {
#pragma unroll
    for (int offset = (WPR > 1 ? 32 : LPR) / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int n = 0; n < N; ++n) x[n] += __shfl_xor_sync(0xffffffffu, x[n], offset);
    }
    if constexpr (WPR > 1) {
      const int warp = threadIdx.x / 32, first = warp / WPR * WPR;
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) scratch[n][warp] = x[n];
      }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < N; ++n) {
        x[n] = 0.0f;
#pragma unroll
        for (int w = 0; w < WPR; ++w) x[n] += scratch[n][first + w];
      }
    }
  }
};

// Forward: blocks of a multiprocessor that registers are to be kept few enough for, where that takes no spills.
template <class Layout, bool PLAIN>
constexpr int kResident = (PLAIN ? 1024 : 512) / Layout::kThreads > 0 ? (PLAIN ? 1024 : 512) / Layout::kThreads : 1;

template <class T, int LPR, int WPR, int VPT, bool ALIGNED, bool RESIDUAL>
__global__ void __launch_bounds__(RowLayout<T, LPR, WPR, VPT, ALIGNED>::kThreads,
                                  kResident<RowLayout<T, LPR, WPR, VPT, ALIGNED>, ALIGNED && !RESIDUAL>)
    layer_norm_kernel(const __grid_constant__ LayerNormRun run) {
  using Layout = RowLayout<T, LPR, WPR, VPT, ALIGNED>;
  using Raw = typename Layout::Raw;
  constexpr int kEach = Layout::kEach;
  __shared__ float scratch[2][1][Layout::kThreads / 32];
  const LayerNormArgs& args = run.args;
  const int64_t D = args.D, stride = int64_t(gridDim.x) * Layout::kGroups;
  const float scale = 1.0f / float(D);

  Raw next[VPT], next_residual[RESIDUAL ? VPT : 1];
  const auto fetch = [&](int64_t row) {
    const bool there = row < args.rows;
    Layout::load(static_cast<const T*>(args.x) + (there ? row * args.x_stride : 0), D, there, next);
    if constexpr (RESIDUAL) {
      Layout::load(static_cast<const T*>(args.residual) + (there ? row * args.residual_stride : 0), D, there,
                   next_residual);
    }
  };
  int64_t row = int64_t(blockIdx.x) * Layout::kGroups + threadIdx.x / Layout::kGroup;
  fetch(row);
  for (int64_t first = int64_t(blockIdx.x) * Layout::kGroups; first < args.rows; first += stride, row += stride) {
    const bool there = row < args.rows;
    Raw x[VPT];
    float total[1] = {0.0f};
#pragma unroll
    for (int v = 0; v < VPT; ++v) {
      x[v] = next[v];
      if constexpr (RESIDUAL) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          x[v].x[e] = from_float<T>(to_float(x[v].x[e]) + to_float(next_residual[v].x[e]));
        }
        Layout::store(static_cast<T*>(args.sum) + row * D, D, there, v, x[v]);
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) total[0] += to_float(x[v].x[e]);
      Layout::keep_packed(x[v]);
    }
    fetch(row + stride);
    Layout::template sum<1>(total, scratch[0]);
    const float mean = total[0] * scale;
    float squares[1] = {0.0f};
#pragma unroll
    for (int v = 0; v < VPT; ++v) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const float centred = to_float(x[v].x[e]) - mean;
        const bool counts = Layout::column(v) + (ALIGNED ? 0 : e) < D;
        squares[0] += counts ? centred * centred : 0.0f;
      }
      Layout::keep_packed(x[v]);
    }
    Layout::template sum<1>(squares, scratch[1]);
    const float rstd = rsqrtf(squares[0] * scale + float(args.norm.eps));
    T* y = static_cast<T*>(args.y) + row * D;
#pragma unroll
    for (int v = 0; v < VPT; ++v) {
      float w[kEach], b[kEach];
      Layout::load(run.weight, 1.0f, Layout::column(v), D, w);
      Layout::load(run.bias, 0.0f, Layout::column(v), D, b);
      Raw raw;
#pragma unroll
      for (int e = 0; e < kEach; ++e) raw.x[e] = from_float<T>(fmaf((to_float(x[v].x[e]) - mean) * rstd, w[e], b[e]));
      Layout::store(y, D, there, v, raw);
    }
    if (there && threadIdx.x % Layout::kGroup == 0) {
      static_cast<float*>(args.mean)[row] = mean;
      static_cast<float*>(args.rstd)[row] = rstd;
    }
  }
}

template <class T, int LPR, int WPR, int VPT, bool ALIGNED>
__global__ void __launch_bounds__(RowLayout<T, LPR, WPR, VPT, ALIGNED>::kThreads)
    layer_norm_backward_kernel(const __grid_constant__ LayerNormBackwardRun run) {
  using Layout = RowLayout<T, LPR, WPR, VPT, ALIGNED>;
  using Raw = typename Layout::Raw;
  constexpr int kEach = Layout::kEach;
  __shared__ float scratch[2][2][Layout::kThreads / 32];
  const LayerNormBackwardArgs& args = run.args;
  const int64_t D = args.D, stride = int64_t(gridDim.x) * Layout::kGroups;
  const int group = threadIdx.x / Layout::kGroup;
  const float scale = 1.0f / float(D);

  float w[VPT][kEach], grad_w[VPT][kEach], grad_b[VPT][kEach];
#pragma unroll
  for (int v = 0; v < VPT; ++v) {
    Layout::load(run.weight, 1.0f, Layout::column(v), D, w[v]);
#pragma unroll
    for (int e = 0; e < kEach; ++e) grad_w[v][e] = grad_b[v][e] = 0.0f;
  }
  Raw next_x[VPT], next_gy[VPT];
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto fetch = [&](int64_t row) {
    const bool there = row < args.rows;
    Layout::load(static_cast<const T*>(args.x) + (there ? row * args.x_stride : 0), D, there, next_x);
    Layout::load(static_cast<const T*>(args.grad_y) + (there ? row * args.grad_y_stride : 0), D,
                 there && args.grad_y != nullptr, next_gy);
    next_mean = there ? static_cast<const float*>(args.mean)[row] : 0.0f;
    next_rstd = there ? static_cast<const float*>(args.rstd)[row] : 0.0f;
  };
  int64_t row = int64_t(blockIdx.x) * Layout::kGroups + group;
  fetch(row);
  int turn = 0;
  for (int64_t first = int64_t(blockIdx.x) * Layout::kGroups; first < args.rows;
       first += stride, row += stride, turn ^= 1) {
    const bool there = row < args.rows;
    const float mean = next_mean, rstd = next_rstd;
    float xhat[VPT][kEach], g[VPT][kEach], sums[2] = {0.0f, 0.0f};  // of g = grad_y weight, of g xhat
#pragma unroll
    for (int v = 0; v < VPT; ++v) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const float gy = to_float(next_gy[v].x[e]);  // zero past the row's end
        xhat[v][e] = (to_float(next_x[v].x[e]) - mean) * rstd;
        grad_w[v][e] = fmaf(gy, xhat[v][e], grad_w[v][e]);
        grad_b[v][e] += gy;
        g[v][e] = gy * w[v][e];
        sums[0] += g[v][e];
        sums[1] = fmaf(g[v][e], xhat[v][e], sums[1]);
      }
    }
    fetch(row + stride);
    Layout::template sum<2>(sums, scratch[turn]);
    const float mean_g = sums[0] * scale, mean_gx = sums[1] * scale;
    T* grad_x = static_cast<T*>(args.grad_x) + row * D;
#pragma unroll
    for (int v = 0; v < VPT; ++v) {
      float gx[kEach];
#pragma unroll
      for (int e = 0; e < kEach; ++e) gx[e] = (g[v][e] - mean_g - xhat[v][e] * mean_gx) * rstd;
      if (args.grad_sum != nullptr) {
        Raw direct;
        Layout::load_one(static_cast<const T*>(args.grad_sum) + (there ? row * args.grad_sum_stride : 0), D, there, v,
                         direct);
#pragma unroll
        for (int e = 0; e < kEach; ++e) gx[e] += to_float(direct.x[e]);
      }
      Raw raw;
#pragma unroll
      for (int e = 0; e < kEach; ++e) raw.x[e] = from_float<T>(gx[e]);
      Layout::store(grad_x, D, there, v, raw);
    }
  }
  // Groups of the block, one after the other.
  extern __shared__ float shares[];  // (2, D)
  for (int turn_of = 0; turn_of < Layout::kGroups; ++turn_of) {
    if (group == turn_of) {
#pragma unroll
      for (int v = 0; v < VPT; ++v) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const int64_t at = Layout::column(v) + e;
          if (at >= D) continue;
          shares[at] = (turn_of == 0 ? 0.0f : shares[at]) + grad_w[v][e];
          shares[D + at] = (turn_of == 0 ? 0.0f : shares[D + at]) + grad_b[v][e];
        }
      }
    }
    __syncthreads();
  }
  for (int64_t k = threadIdx.x; k < 2 * D; k += Layout::kThreads) {
    const int64_t which = k / D, at = k % D;
    run.partial[(which * gridDim.x + blockIdx.x) * D + at] = shares[k];
  }
}

// (2, parts, D) -> (D) twice: 32 columns a block, its warps take every kWarps-th part, then add up in order.
constexpr int kReduceWarps = 16;

static __global__ void __launch_bounds__(32 * kReduceWarps)
    layer_norm_reduce_kernel(const float* partial, int64_t parts, int64_t D, float* grad_weight, float* grad_bias) {
  __shared__ float sums[kReduceWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = int64_t(blockIdx.x) * 32 + lane;
  partial += int64_t(blockIdx.y) * parts * D;
  float sum = 0.0f;
  if (at < D) {
#pragma unroll 8
    for (int64_t part = warp; part < parts; part += kReduceWarps) sum += partial[part * D + at];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && at < D) {
    sum = 0.0f;
    for (int w = 0; w < kReduceWarps; ++w) sum += sums[w][lane];
    (blockIdx.y == 0 ? grad_weight : grad_bias)[at] = sum;
  }
}

}  // namespace newllm::cuda
