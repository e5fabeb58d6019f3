// LayerNorm backward. Blocks stay and walk the rows, one a group at a time, because a thread keeps its columns' share
// of the gradients of weight and bias in registers. Rows ahead wait in shared memory, where each thread copies
// (cp.async) just what it will read itself, so no barrier is needed.
//
// Shares of a block are added in order of its groups, blocks in a second kernel, whose blocks take their places while
// the first runs out.
#pragma once

#include "copy_async.cuh"
#include "dependent_launch.cuh"
#include "layer_norm.cuh"

namespace newllm::cuda {

struct LayerNormBackwardRun {
  LayerNormBackwardArgs args;
  Parameter weight;
  float* partial = nullptr;    // (2, parts, D), a part a block or cluster
  int cluster = 1, piece = 0;  // blocks of a row, and columns of each
};

// Rows on their way: vectors of x, grad_y and, if it is there, grad_sum, kStages times.
template <class T, class Tile, bool DIRECT>
struct Ring {
  static constexpr int kInputs = DIRECT ? 3 : 2, kVectors = Tile::kColumns * int(sizeof(T)) / 16;
  static constexpr int kStages = sizeof(T) == 4 ? 1 : 2;  // 64 KB, without grad_sum; half of it was slower
  static constexpr int kBytes = kStages * kInputs * kVectors * Tile::kThreads * 16;

  static __device__ __forceinline__ int4* at(int4* memory, int stage, int input, int v) {
    return memory + ((stage * kInputs + input) * kVectors + v) * Tile::kThreads + threadIdx.x;
  }
};

// Sums of this thread's group's row, in every thread of it; `turn` alternates.
template <class Tile, bool CLUSTER>
__device__ __forceinline__ void sum_row(float (&sums)[2], int turn, const Piece& piece, int cluster) {
  constexpr int kWarps = Tile::kThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  sum_lanes<Tile::kLanes>(sums);
  if constexpr (Tile::kWarps > 1) {
    __shared__ float2 of_warp[2][kWarps];
    if (lane == 0) of_warp[turn][warp] = make_float2(sums[0], sums[1]);
    sync_group<Tile>();
    const float2 part = of_warp[turn][warp / Tile::kWarps * Tile::kWarps + lane % Tile::kWarps];
    sums[0] = part.x, sums[1] = part.y;
    sum_lanes<Tile::kWarps>(sums);
  }
  if constexpr (CLUSTER) {
    __shared__ float4 of_piece[2][kMostPieces];
    if (int(threadIdx.x) < cluster) {
      store_remote(make_float4(sums[0], sums[1], 0.0f, 0.0f), &of_piece[turn][piece.rank], threadIdx.x);
    }
    cluster_sync();
    const int other = lane % kMostPieces;
    const float4 part = of_piece[turn][other];
    sums[0] = other < cluster ? part.x : 0.0f, sums[1] = other < cluster ? part.y : 0.0f;
    sum_lanes<kMostPieces>(sums);
  }
}

// One block's sums over its rows, of weight or bias, into its part of `partial`. `shared`: a float for every column of
// every thread; all threads of the block must call.
template <class Layout, class Tile>
__device__ __forceinline__ void write_part(float (&share)[Layout::kVectors][Layout::kEach], float* shared, float* part,
                                           int width) {
  constexpr int kEach = Layout::kEach, kSpan = Tile::kGroup * Tile::kColumns;
  constexpr bool kSeveral = Tile::kLanes < 32;  // rows of a warp
  constexpr int kShares = kSeveral ? Tile::kThreads / 32 : Tile::kGroups;
  const int which = kSeveral ? threadIdx.x / 32 : threadIdx.x / Tile::kGroup;
#pragma unroll
  for (int offset = Tile::kLanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) share[v][e] += __shfl_xor_sync(0xffffffffu, share[v][e], offset);
    }
  }
  __syncthreads();  // what was in `shared` has been read
  if (threadIdx.x % 32 < Tile::kLanes) {
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) shared[which * kSpan + Layout::column(v, e)] = share[v][e];
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < width; k += Tile::kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kShares; ++s) sum += shared[s * kSpan + k];
    part[k] = sum;
  }
}

template <class T, class Tile, bool ALIGNED, bool DIRECT, bool CLUSTER>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    layer_norm_backward_kernel(const __grid_constant__ LayerNormBackwardRun run) {
  using Layout = RowLayout<T, Tile, ALIGNED>;
  using Raw = typename Layout::Raw;
  using Ring = Ring<T, Tile, DIRECT>;
  constexpr int kEach = Layout::kEach, kVectors = Layout::kVectors, kStages = Ring::kStages;
  extern __shared__ int4 ring[];
  const LayerNormBackwardArgs& args = run.args;
  const Piece piece = Piece::mine<CLUSTER>(args.D, run.piece, run.cluster);
  const int group = threadIdx.x / Tile::kGroup;
  const int64_t parts = CLUSTER ? int64_t(gridDim.x) / run.cluster : gridDim.x, step = parts * Tile::kGroups;
  const float scale = 1.0f / float(args.D);
  const auto row_of = [&](int input, int64_t row) {
    const void* data = input == 0 ? args.x : input == 1 ? args.grad_y : args.grad_sum;
    const int64_t stride = input == 0 ? args.x_stride : input == 1 ? args.grad_y_stride : args.grad_sum_stride;
    return static_cast<const T*>(data) + row * stride + piece.begin;
  };
  const auto given = [&](int input, int64_t row) { return row < args.rows && (input != 1 || args.grad_y != nullptr); };
  // Inputs [from, to) of a row into the ring, zeros where there is none.
  const auto fetch = [&](int64_t row, int stage, int from, int to) {
    if constexpr (ALIGNED) {
#pragma unroll
      for (int input = 0; input < Ring::kInputs; ++input) {
        if (input < from || input >= to) continue;
        const bool there = given(input, row);
        const T* source = row_of(input, there ? row : 0);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int column = Layout::column(v);
          copy_async<16, false>(Ring::at(ring, stage, input, v), source + column, there && column < piece.width);
        }
      }
    }
  };
  const auto read = [&](int input, int64_t row, int stage, int v) {
    Raw raw;
    if constexpr (ALIGNED) {
      reinterpret_cast<int4&>(raw) = *Ring::at(ring, stage, input, v);
    } else {
      const bool there = given(input, row);
      raw = Layout::load(row_of(input, there ? row : 0), piece.width, there, v);
    }
    return raw;
  };

  wait_for_kernel_before();
  if constexpr (CLUSTER) cluster_sync();  // before anything is written to the others, they must have begun
  int64_t row = piece.tile * Tile::kGroups + group;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    fetch(row + stage * step, stage, 0, Ring::kInputs);
    copy_async_commit();
  }
  float next_mean = row < args.rows ? static_cast<const float*>(args.mean)[row] : 0.0f;
  float next_rstd = row < args.rows ? static_cast<const float*>(args.rstd)[row] : 0.0f;
  float w[kVectors][kEach], grad_w[kVectors][kEach], grad_b[kVectors][kEach];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    Layout::template load<void>(run.weight, 1.0f, piece.begin, piece.width, v, w[v]);
#pragma unroll
    for (int e = 0; e < kEach; ++e) grad_w[v][e] = grad_b[v][e] = 0.0f;
  }
  int stage = 0, turn = 0;
  // Rows of one warp go on together.
  for (int64_t lead = row - (Tile::kLanes < 32 ? group % (32 / Tile::kLanes) : 0); lead < args.rows;
       lead += step, row += step, turn ^= 1) {
    const bool there = row < args.rows;
    const float mean = next_mean, rstd = next_rstd;
    next_mean = row + step < args.rows ? static_cast<const float*>(args.mean)[row + step] : 0.0f;
    next_rstd = row + step < args.rows ? static_cast<const float*>(args.rstd)[row + step] : 0.0f;
    copy_async_wait<kStages - 1>();
    Raw x[kVectors], gy[kVectors];
    float sums[2] = {0.0f, 0.0f};  // of g = grad_y weight, of g xhat
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v] = read(0, row, stage, v), gy[v] = read(1, row, stage, v);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const float g = to_float(gy[v].x[e]), xhat = (to_float(x[v].x[e]) - mean) * rstd;  // g is 0 past the row's end
        grad_w[v][e] = fmaf(g, xhat, grad_w[v][e]);
        grad_b[v][e] += g;
        sums[0] = fmaf(g, w[v][e], sums[0]);
        sums[1] = fmaf(g * w[v][e], xhat, sums[1]);
      }
      Layout::keep_packed(x[v]), Layout::keep_packed(gy[v]);
    }
    sum_row<Tile, CLUSTER>(sums, turn, piece, run.cluster);
    fetch(row + kStages * step, stage, 0, 2);  // this thread has read what was there
    const float mean_g = sums[0] * scale, mean_gx = sums[1] * scale;
    T* grad_x = static_cast<T*>(args.grad_x) + (there ? row * args.D : 0) + piece.begin;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Raw raw, direct;
      if constexpr (DIRECT) direct = read(2, row, stage, v);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const float xhat = (to_float(x[v].x[e]) - mean) * rstd;
        const float gx = (fmaf(to_float(gy[v].x[e]), w[v][e], -mean_g) - xhat * mean_gx) * rstd;
        raw.x[e] = from_float<T>(DIRECT ? gx + to_float(direct.x[e]) : gx);
      }
      Layout::template store<false>(grad_x, piece.width, there, v, raw);
    }
    fetch(row + kStages * step, stage, 2, Ring::kInputs);
    copy_async_commit();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  let_next_kernel_start();
  copy_async_wait<0>();
  float* shared = reinterpret_cast<float*>(ring);
  float* part = run.partial + piece.tile * args.D + piece.begin;
  write_part<Layout, Tile>(grad_w, shared, part, piece.width);
  write_part<Layout, Tile>(grad_b, shared, part + parts * args.D, piece.width);
}

// (2, parts, D) -> (D) twice: 32 columns a block, each warp a sixteenth of the parts, all loads of a round at once.
constexpr int kReduceWarps = 16, kReduceRound = 9;  // 144 parts: an H100 has 132 multiprocessors

template <class T>
__global__ void __launch_bounds__(32 * kReduceWarps)
    layer_norm_reduce_kernel(const float* partial, int64_t parts, int64_t D, T* grad_weight, T* grad_bias) {
  __shared__ float sums[kReduceWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = int64_t(blockIdx.x) * 32 + lane;
  partial += int64_t(blockIdx.y) * parts * D;
  wait_for_kernel_before();
  let_next_kernel_start();
  float sum = 0.0f;
  for (int64_t first = warp; first < parts && at < D; first += kReduceWarps * kReduceRound) {
    float x[kReduceRound];
#pragma unroll
    for (int k = 0; k < kReduceRound; ++k) {
      const int64_t part = first + k * kReduceWarps;
      x[k] = part < parts ? partial[part * D + at] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kReduceRound; ++k) sum += x[k];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && at < D) {
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kReduceWarps; ++w) sum += sums[w][lane];
    (blockIdx.y == 0 ? grad_weight : grad_bias)[at] = from_float<T>(sum);
  }
}

}  // namespace newllm::cuda
