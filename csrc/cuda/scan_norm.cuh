// What the fused kernels of `gated_scan_layer_norm` share: their arguments, and how a warp that normalises holds rows.
//
// A block has W warps that walk the recurrence of its 64 columns (recurrence.cuh) and NORM_WARPS that work on whole
// rows, W / NORM_WARPS warps' rows each, 16 bytes of a row a lane. Both meet in shared memory, slot by slot, and blocks
// of other columns in row_exchange.cuh.
#pragma once

#include <cuda_runtime.h>

#include "cluster.cuh"
#include "numeric.cuh"
#include "recurrence.cuh"
#include "recurrence_ops.cuh"
#include "row_exchange.cuh"

namespace newllm::cuda {

// weight or bias: float32, or of the dtype of the rows.
struct NormParameter {
  const void* data = nullptr;
  bool is_float = true;
};

struct ScanNormArgs {
  RecurrenceArgs scan;  // forward: f, i, d -> c; backward: f, i, d -> their gradients
  View3 y, grad_y, c;   // rows contiguous and one after the other
  NormParameter weight, bias;
  float* mean = nullptr;  // (B * T,)
  float* rstd = nullptr;
  float eps = 0.0f, clamp = 0.0f;
  float* shares = nullptr;  // (2, teams, D) of the gradients of weight and bias
  float* grad_weight = nullptr;
  float* grad_bias = nullptr;
  TwoWords* exchange = nullptr;
  int64_t sequences = 0;
  int teams = 1;  // blocks of all columns; each takes every teams-th sequence
};

// kRows rows of 64 columns, 16 bytes a lane.
template <class T>
struct RowPart {
  static constexpr int kEach = 16 / sizeof(T), kLanes = kColumns / kEach, kRowsAtOnce = 32 / kLanes;

  // kEach values of weight or bias from column `at` on.
  static __device__ __forceinline__ void load(const NormParameter& parameter, float absent, int64_t at, int64_t D,
                                              float (&w)[kEach]) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      w[e] = absent;
      if (parameter.data == nullptr || at + e >= D) continue;
      w[e] = parameter.is_float ? static_cast<const float*>(parameter.data)[at + e]
                                : to_float(static_cast<const T*>(parameter.data)[at + e]);
    }
  }

  static __device__ __forceinline__ void unpack(const int4& bits, float (&x)[kEach]) {
    if constexpr (sizeof(T) == 4) {
      const float4& four = reinterpret_cast<const float4&>(bits);
      x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
      const auto* two = reinterpret_cast<const typename Vec<T, 2>::Raw*>(&bits);
#pragma unroll
      for (int e = 0; e < kEach; e += 2) {
        float both[2];
        Vec<T, 2>::unpack(two[e / 2], both);
        x[e] = both[0], x[e + 1] = both[1];
      }
    }
  }

  static __device__ __forceinline__ int4 pack(const float (&x)[kEach]) {
    int4 bits;
    if constexpr (sizeof(T) == 4) {
      bits = make_int4(__float_as_int(x[0]), __float_as_int(x[1]), __float_as_int(x[2]), __float_as_int(x[3]));
    } else {
      auto* two = reinterpret_cast<typename Vec<T, 2>::Raw*>(&bits);
#pragma unroll
      for (int e = 0; e < kEach; e += 2) {
        const float both[2] = {x[e], x[e + 1]};
        two[e / 2] = Vec<T, 2>::pack(both);
      }
    }
    return bits;
  }
};

// 16 bytes, or nothing, without a branch, so that loads and shuffles around it stay free to move. Nothing of the kernel
// reads them again.
__device__ __forceinline__ void store_if(bool there, void* target, const int4& bits) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.b32 there, %0, 0;\n@there st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
          int(there)),
      "l"(target), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w));
}

__device__ __forceinline__ float clamped(float x, float most) {  // NaN stays
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(most));
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(y), "f"(-most));
  return y;
}

// Sums of N numbers over `kLanes` neighbouring lanes, in all of them.
template <int kLanes, int N>
__device__ __forceinline__ void sum_parts(float (&x)[N]) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] += __shfl_xor_sync(0xffffffffu, x[n], offset);
  }
}

// The windows of a block in the order of its work: turn after turn of a sequence, sequence after sequence of its team.
struct Windows {
  const ScanNormArgs& args;
  const int64_t turn_steps;            // of all blocks that take a window of the sequence at the same time
  int64_t n;                           // the sequence
  int64_t first = 0, steps = 0;        // the turn's first step, of so many of the sequence
  int64_t batch = 0, row = 0;          // of the first step of the walk
  bool begins = false;                 // whether the turn is the first of its sequence

  __device__ __forceinline__ Windows(const ScanNormArgs& args_, int64_t turn_steps_, int64_t team)
      : args(args_), turn_steps(turn_steps_), n(team) {
    settle();
  }

  __device__ __forceinline__ bool there() const { return n < args.sequences; }

  __device__ __forceinline__ void next() {
    begins = false;
    first += turn_steps;
    if (first < steps) return;
    n += args.teams;
    settle();
  }

 private:
  // The next sequence from n on that has any steps.
  __device__ __forceinline__ void settle() {
    first = steps = 0;
    for (; there(); n += args.teams) {
      const Piece piece(args.scan, n);
      if (piece.steps == 0) continue;
      batch = piece.b, row = piece.row + (args.scan.from_end ? piece.length - 1 : 0), steps = piece.steps;
      begins = true;
      return;
    }
  }
};

// Rows of f, i and d on their way to a warp that walks.
template <class Scan, class T, int R, int W, int STAGES>
struct GateRows {
  static constexpr int kEach = 16 / sizeof(T), kLanes = kColumns / kEach, kAtOnce = 32 / kLanes;
  static_assert(R % kAtOnce == 0);

  const ScanNormArgs& args;
  typename Scan::Shared& shared;
  const int warp, at, row, skipped;  // this lane's first column and row, steps before this warp's in a turn
  const int64_t column;
  Windows windows;     // the next one
  const T* source[3];  // in it
  uint32_t count = 0;

  __device__ __forceinline__ GateRows(const ScanNormArgs& args_, typename Scan::Shared& shared_, int cluster, int rank,
                                      int64_t team, int64_t column_)
      : args(args_),
        shared(shared_),
        warp(threadIdx.x / 32),
        at(threadIdx.x % kLanes * kEach),
        row(threadIdx.x % 32 / kLanes),
        skipped((rank * W + warp) * R),
        column(column_),
        windows(args_, int64_t(cluster) * W * R, team) {}

  __device__ __forceinline__ void fetch() {
    const int64_t left = windows.steps - windows.first - skipped;  // none after the last window
    const int there = column + at < args.scan.D ? int(most(0, least(R, left))) - row : 0;
    auto& rows = shared.rows[warp][count % STAGES];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const View3& view = args.scan.in[k];
      const int64_t stride = args.scan.from_end ? -view.stride_t : view.stride_t;
      if (windows.begins) {
        source[k] = static_cast<const T*>(view.data) + windows.batch * view.stride_b + windows.row * view.stride_t +
                    (skipped + row) * stride + column + at;
      }
      const T* from = source[k];
#pragma unroll
      for (int r = 0; r < R; r += kAtOnce, from += kAtOnce * stride) {
        copy_async<16>(&rows[k][r + row][at], from, r < there);  // nothing is read where it is not there
      }
      source[k] += windows.turn_steps * stride;
    }
    copy_async_commit();
    ++count;
    windows.next();
  }
};

// Consecutive rows of a warp in a window, in the direction of the walk; how many of them there are.
struct RowRun {
  int64_t first = 0;
  int there = 0;
};

}  // namespace newllm::cuda
