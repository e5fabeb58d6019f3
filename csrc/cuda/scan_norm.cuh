// What the fused kernels of `gated_scan_layer_norm` share.
//
// A block owns 64 neighbouring columns, as in recurrence.cuh, and the blocks of all columns are a team, which takes
// sequence after sequence. A block has two kinds of warps that meet in shared memory, slot by slot:
//
//     W walk             a window of W * R steps at a time, R steps a warp; a thread owns two columns
//     NORM_WARPS         work on whole rows of the block's columns, W * R / NORM_WARPS of a window; a lane holds 16
//     normalise          bytes of a row; what belongs to the whole row goes through row_exchange.cuh
//
// Everything is added in one order, whatever the timing: the same inputs give the same bits.
#pragma once

#include <cuda_runtime.h>

#include "cluster.cuh"
#include "copy_async.cuh"
#include "numeric.cuh"
#include "recurrence_args.cuh"
#include "recurrence_ops.cuh"
#include "row_exchange.cuh"

namespace newllm::cuda {

// Rows of all tensors begin at multiples of 16 bytes and are whole multiples of them.
struct ScanNormArgs {
  RecurrenceArgs scan;  // forward f, i, d -> c, of which y is made; backward f, i, d -> their gradients
  View3 c, y, grad_y;
  Parameter weight, bias;
  float* mean = nullptr;  // (B * T,)
  float* rstd = nullptr;
  float eps = 0.0f, clamp = 0.0f;
  float* shares = nullptr;  // (2, teams, D) of the gradients of weight and bias
  float* grad_weight = nullptr;
  float* grad_bias = nullptr;
  TwoWords* exchange = nullptr;
  int64_t sequences = 0;
  int teams = 1;  // each takes every teams-th sequence
};

// 16 bytes of a row.
template <class T>
struct RowPart {
  static constexpr int kEach = 16 / sizeof(T), kLanes = kColumns / kEach, kAtOnce = 32 / kLanes;  // rows of a warp

  // kEach values of weight or bias from column `at` on.
  static __device__ __forceinline__ void load(const Parameter& parameter, float absent, int64_t at, int64_t D,
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
    const int word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (sizeof(T) == 4) {
        x[k] = __int_as_float(word[k]);
      } else {
        float both[2];
        Vec<T, 2>::unpack(reinterpret_cast<const typename Vec<T, 2>::Raw&>(word[k]), both);
        x[2 * k] = both[0], x[2 * k + 1] = both[1];
      }
    }
  }

  static __device__ __forceinline__ int4 pack(const float (&x)[kEach]) {
    int word[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (sizeof(T) == 4) {
        word[k] = __float_as_int(x[k]);
      } else {
        const float both[2] = {x[2 * k], x[2 * k + 1]};
        reinterpret_cast<typename Vec<T, 2>::Raw&>(word[k]) = Vec<T, 2>::pack(both);
      }
    }
    return make_int4(word[0], word[1], word[2], word[3]);
  }

  // Without a branch, so that loads and shuffles around it stay free to move. Nothing of the kernel reads it again.
  static __device__ __forceinline__ void store_if(bool there, T* target, const int4& bits) {
    asm volatile(
        "{\n.reg .pred there;\nsetp.ne.b32 there, %0, 0;\n@there st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
            int(there)),
        "l"(target), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w));
  }

  // Sums of N numbers over the lanes of a row, in all of them.
  template <int N>
  static __device__ __forceinline__ void sum(float (&x)[N]) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int n = 0; n < N; ++n) x[n] += __shfl_xor_sync(0xffffffffu, x[n], offset);
    }
  }
};

__device__ __forceinline__ float clamped(float x, float most) {  // NaN stays
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(most));
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(y), "f"(-most));
  return y;
}

// The windows of a team in the order of its work.
struct Windows {
  const ScanNormArgs& args;
  const int steps_each;
  int64_t n;                     // the sequence
  int64_t first = 0, steps = 0;  // the window's first step, of so many of the sequence
  int64_t batch = 0, row = 0;    // of the walk's first step

  __device__ __forceinline__ Windows(const ScanNormArgs& args_, int steps_each_, int64_t team)
      : args(args_), steps_each(steps_each_), n(team) {
    settle();
  }

  __device__ __forceinline__ bool there() const { return n < args.sequences; }

  // How many of R steps from the window's `skipped`-th on there are.
  __device__ __forceinline__ int steps_left(int skipped, int R) const {
    return int(most(0, least(R, steps - first - skipped)));
  }

  __device__ __forceinline__ void next() {
    first += steps_each;
    if (first < steps) return;
    n += args.teams;
    settle();
  }

 private:
  // The first sequence from n on that has any steps.
  __device__ __forceinline__ void settle() {
    first = steps = 0;
    for (; there(); n += args.teams) {
      const Piece piece(args.scan, n);
      if (piece.steps == 0) continue;
      batch = piece.b, row = piece.row + (args.scan.from_end ? piece.length - 1 : 0), steps = piece.steps;
      return;
    }
  }
};

// The warps that walk: what of theirs is in shared memory.
template <class T, int R, int W, int STAGES>
struct WalkShared {
  static constexpr int kSlots = 4;
  T rows[W][STAGES][3][R][kColumns];  // of f, i, d
  Pair pairs[kSlots][W][32];
  uint64_t reduced[kSlots];  // pairs

  __device__ __forceinline__ void begin() {
    for (uint64_t& barrier : reduced) mbarrier_init(&barrier, W * kArrivalsOfWarp);
  }
};

// Rows of f, i and d on their way to a warp that walks.
template <class T, int R, int W, int STAGES>
struct GateRows {
  using Part = RowPart<T>;
  static_assert(R % Part::kAtOnce == 0);

  const ScanNormArgs& args;
  WalkShared<T, R, W, STAGES>& shared;
  const int warp, at, row;  // this lane's first column and row
  const int64_t column;
  Windows windows;     // the next
  const T* source[3];  // in it
  uint32_t count = 0;

  __device__ __forceinline__ GateRows(const ScanNormArgs& args_, WalkShared<T, R, W, STAGES>& shared_, int64_t team,
                                      int64_t column_)
      : args(args_),
        shared(shared_),
        warp(threadIdx.x / 32),
        at(threadIdx.x % Part::kLanes * Part::kEach),
        row(threadIdx.x % 32 / Part::kLanes),
        column(column_),
        windows(args_, W * R, team) {}

  // Of no window after the last.
  __device__ __forceinline__ void fetch() {
    const int there = column + at < args.scan.D ? windows.steps_left(warp * R, R) - row : 0;
    auto& rows = shared.rows[warp][count % STAGES];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const View3& view = args.scan.in[k];
      const int64_t stride = args.scan.from_end ? -view.stride_t : view.stride_t;
      if (windows.first == 0) {
        source[k] = static_cast<const T*>(view.data) + windows.batch * view.stride_b + windows.row * view.stride_t +
                    (warp * R + row) * stride + column + at;
      }
      const T* from = source[k];
#pragma unroll
      for (int r = 0; r < R; r += Part::kAtOnce, from += Part::kAtOnce * stride) {
        copy_async<16>(&rows[k][r + row][at], from, r < there);  // where it is not there nothing is read
      }
      source[k] += W * R * stride;
    }
    copy_async_commit();
    ++count;
    windows.next();
  }
};

// A warp's steps in a window.
struct Steps {
  int there = 0;
  int64_t n = 0, batch = 0, row = 0, left = 0;  // sequence; of the first step: batch, row, steps of it and after it
  float start[2];                               // where the sequence begins: the state before it
  bool begins = false, ends = false;            // the sequence
};

// Sequences of no steps end where they begin.
__device__ __forceinline__ void pass_empty(const ScanNormArgs& args, int64_t team, int64_t at) {
  const int64_t D = args.scan.D;
  for (int64_t n = team; n < args.sequences; n += args.teams) {
    if (Piece(args.scan, n).steps > 0) continue;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (at + v < D)
        args.scan.last[n * D + at + v] = args.scan.start != nullptr ? args.scan.start[n * D + at + v] : 0.0f;
    }
  }
}

// Walks all windows of a block. `reduce(count, steps, kept)` makes the pair of a warp's steps of the block's window
// `count`, `apply(count, steps, kept, state)` writes what comes of them from the state before them. AHEAD: a window is
// applied when the next has been reduced, so that a warp seldom waits for the slowest, for twice the registers of Kept.
template <bool AHEAD, class Kept, int R, int W, class Shared, class Reduce, class Apply>
__device__ __forceinline__ void walk(const ScanNormArgs& args, Shared& shared, int64_t team, int64_t column,
                                     const Reduce& reduce, const Apply& apply) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = column + 2 * lane, D = args.scan.D;
  Windows windows(args, W * R, team);
  const auto reduce_next = [&](uint32_t count, Kept& kept) {
    Steps steps;
    steps.there = windows.steps_left(warp * R, R);
    const int64_t step = windows.first + warp * R;
    steps.n = windows.n, steps.batch = windows.batch, steps.left = windows.steps - step;
    steps.row = args.scan.from_end ? windows.row - step : windows.row + step;
    steps.begins = windows.first == 0, steps.ends = windows.first + W * R >= windows.steps;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const bool reads = steps.begins && args.scan.start != nullptr && at + v < D;
      steps.start[v] = reads ? args.scan.start[steps.n * D + at + v] : 0.0f;
    }
    shared.pairs[count % Shared::kSlots][warp][lane] = reduce(count, steps, kept);
    // A slot serves again four windows later: by then all have reduced the third, and so applied this one.
    warp_arrives(&shared.reduced[count % Shared::kSlots]);
    windows.next();
    return steps;
  };
  if (warp == 0 && args.scan.cu_seqlens != nullptr) pass_empty(args, team, at);
  if (!windows.there()) return;
  float state[2] = {0.0f, 0.0f};
  Kept kept;
  Steps steps = reduce_next(0, kept);
  for (uint32_t count = 0;; ++count) {
    Kept next_kept;
    Steps next;
    const bool goes_on = windows.there();
    if (AHEAD && goes_on) next = reduce_next(count + 1, next_kept);
    if (steps.begins) state[0] = steps.start[0], state[1] = steps.start[1];
    mbarrier_wait_in_block(&shared.reduced[count % Shared::kSlots], count / Shared::kSlots % 2);
    float begin[2];
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (w == warp) begin[0] = state[0], begin[1] = state[1];
      shared.pairs[count % Shared::kSlots][w][lane].move(state);
    }
    apply(count, steps, kept, begin);
    if (steps.ends && warp == 0) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        if (at + v < D) args.scan.last[steps.n * D + at + v] = state[v];
      }
    }
    if (!goes_on) break;
    if constexpr (AHEAD) {
      steps = next;
#pragma unroll
      for (int r = 0; r < R; ++r) kept[r][0] = next_kept[r][0], kept[r][1] = next_kept[r][1];
    } else {
      steps = reduce_next(count + 1, kept);
    }
  }
}

// Inputs of a thread's two columns at step r of its warp.
template <class T, int R>
__device__ __forceinline__ void gates_at(const T (&rows)[3][R][kColumns], int r, float (&x)[2][3]) {
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    float both[2];
    Vec<T, 2>::unpack(reinterpret_cast<const typename Vec<T, 2>::Raw*>(rows[k][r])[threadIdx.x % 32], both);
    x[0][k] = both[0], x[1][k] = both[1];
  }
}

}  // namespace newllm::cuda
