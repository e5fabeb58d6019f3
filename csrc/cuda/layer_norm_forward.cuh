// LayerNorm forward: ROWS rows a group, held in registers, and no loop over rows. Small blocks that the hardware starts
// in the order of their rows keep what is read and written close together, which DRAM rewards: blocks that stay and
// walk the rows were 3 to 6% slower (docs/performance.md).
//
// Mean and variance are those of each warp's columns, put together (Chan et al. 1979): what is squared is always
// centred, so nothing cancels, and the warps meet once.
#pragma once

#include "dependent_launch.cuh"
#include "layer_norm.cuh"

namespace newllm::cuda {

struct LayerNormRun {
  LayerNormArgs args;
  Parameter weight, bias;
  float inverse = 0.0f;        // 1 / D
  int cluster = 1, piece = 0;  // blocks of a row, and columns of each
};

// Of a part of a row: sum, squares about `mean`, and how many columns it has. `mean` is the part's own but for
// rounding, which changes nothing: squares are put together for the means that they were taken about.
struct alignas(16) Moments {
  float sum, squares, mean, count;
};

// Of N neighbouring lanes' parts together; `inverse` of the number of their columns.
template <int N>
__device__ __forceinline__ Moments together(const Moments& part, float inverse) {
  float sum[1] = {part.sum};
  sum_lanes<N>(sum);
  const float mean = sum[0] * inverse, off = part.mean - mean;
  float squares[1] = {fmaf(part.count * off, off, part.squares)};
  sum_lanes<N>(squares);
  return {sum[0], squares[0], mean, 0.0f};
}

// Sums of ROWS rows over the lanes that share them, or (SQUARES) of squares about `mean`.
template <class Layout, class Tile, int ROWS, bool SQUARES>
__device__ __forceinline__ void sum_rows(typename Layout::Raw (&x)[ROWS][Layout::kVectors], int width,
                                         const float (&mean)[ROWS], float (&sum)[ROWS]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sum[r] = 0.0f;
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < Layout::kEach; ++e) {
        const float value = to_float(x[r][v].x[e]);
        const float centred = !SQUARES || Layout::counts(v, e, width) ? value - mean[r] : 0.0f;
        sum[r] = SQUARES ? fmaf(centred, centred, sum[r]) : sum[r] + value;
      }
      Layout::keep_packed(x[r][v]);
    }
  }
  sum_lanes<Tile::kLanes>(sum);
}

// How many columns the warp of this thread has, of a group of several.
template <class Layout>
__device__ __forceinline__ float columns_of_warp(int width) {
  float count[1] = {0.0f};
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < Layout::kEach; ++e) count[0] += Layout::counts(v, e, width) ? 1.0f : 0.0f;
  }
  sum_lanes<32>(count);
  return count[0];
}

// Mean and squares about it of this thread's group's ROWS rows, in every thread of it.
template <class Layout, class Tile, int ROWS, bool CLUSTER>
__device__ __forceinline__ void moments(typename Layout::Raw (&x)[ROWS][Layout::kVectors], const Piece& piece,
                                        const LayerNormRun& run, float (&mean)[ROWS], float (&squares)[ROWS]) {
  float sum[ROWS], count = float(piece.width), inverse = run.inverse;
  if constexpr (Tile::kWarps > 1) {
    count = columns_of_warp<Layout>(piece.width);
    inverse = __fdividef(1.0f, fmaxf(count, 1.0f));
  }
  sum_rows<Layout, Tile, ROWS, false>(x, piece.width, mean, sum);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) mean[r] = sum[r] * inverse;
  sum_rows<Layout, Tile, ROWS, true>(x, piece.width, mean, squares);
  if constexpr (Tile::kWarps > 1) {
    __shared__ Moments of_warp[ROWS][Tile::kThreads / 32], of_piece[CLUSTER ? ROWS : 1][kMostPieces];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp / Tile::kWarps * Tile::kWarps;
    if (lane == 0) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) of_warp[r][warp] = {sum[r], squares[r], mean[r], count};
    }
    sync_group<Tile>();
    const float of_width = CLUSTER ? __fdividef(1.0f, float(piece.width)) : run.inverse;
    Moments of_row[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      of_row[r] = together<Tile::kWarps>(of_warp[r][first + lane % Tile::kWarps], of_width);
    }
    if constexpr (CLUSTER) {
      if (int(threadIdx.x) < run.cluster) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          store_remote(make_float4(of_row[r].sum, of_row[r].squares, of_row[r].mean, float(piece.width)),
                       reinterpret_cast<float4*>(&of_piece[r][piece.rank]), threadIdx.x);
        }
      }
      cluster_sync();
      const int other = lane % kMostPieces;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const Moments part = other < run.cluster ? of_piece[r][other] : Moments{0.0f, 0.0f, 0.0f, 0.0f};
        of_row[r] = together<kMostPieces>(part, run.inverse);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) mean[r] = of_row[r].mean, squares[r] = of_row[r].squares;
  }
}

// W: dtype of weight and bias, void where they differ.
template <class T, class W, class Tile, int ROWS, bool ALIGNED, bool RESIDUAL, bool CLUSTER>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    layer_norm_kernel(const __grid_constant__ LayerNormRun run) {
  using Layout = RowLayout<T, Tile, ALIGNED>;
  using Raw = typename Layout::Raw;
  constexpr int kEach = Layout::kEach, kVectors = Layout::kVectors;
  const LayerNormArgs& args = run.args;
  const Piece piece = Piece::mine<CLUSTER>(args.D, run.piece, run.cluster);
  const int64_t first = (piece.tile * Tile::kGroups + threadIdx.x / Tile::kGroup) * ROWS;
  const auto there = [&](int r) { return first + r < args.rows; };
  const auto row = [&](auto* data, int64_t stride, int r) {
    return data + (there(r) ? (first + r) * stride : 0) + piece.begin;
  };
  wait_for_kernel_before();
  let_next_kernel_start();
  Raw x[ROWS][kVectors];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[r][v] = Layout::load(row(static_cast<const T*>(args.x), args.x_stride, r), piece.width, there(r), v);
    }
  }
  if constexpr (CLUSTER) cluster_sync();  // before anything is written to the others, they must have begun
  if constexpr (RESIDUAL) {
    Raw residual[ROWS][kVectors];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        residual[r][v] =
            Layout::load(row(static_cast<const T*>(args.residual), args.residual_stride, r), piece.width, there(r), v);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          x[r][v].x[e] = from_float<T>(to_float(x[r][v].x[e]) + to_float(residual[r][v].x[e]));
        }
        Layout::template store<true>(row(static_cast<T*>(args.sum), args.D, r), piece.width, there(r), v, x[r][v]);
      }
    }
  }
  float mean[ROWS] = {}, rstd[ROWS];
  moments<Layout, Tile, ROWS, CLUSTER>(x, piece, run, mean, rstd);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) rstd[r] = rsqrtf(fmaf(rstd[r], run.inverse, float(args.norm.eps)));
  if (args.mean != nullptr && threadIdx.x % Tile::kGroup == 0 && piece.rank == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (!there(r)) continue;
      static_cast<float*>(args.mean)[first + r] = mean[r];
      static_cast<float*>(args.rstd)[first + r] = rstd[r];
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float w[kEach], b[kEach];
    Layout::template load<W>(run.weight, 1.0f, piece.begin, piece.width, v, w);
    Layout::template load<W>(run.bias, 0.0f, piece.begin, piece.width, v, b);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      Raw y;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        y.x[e] = from_float<T>(fmaf((to_float(x[r][v].x[e]) - mean[r]) * rstd[r], w[e], b[e]));
      }
      Layout::template store<true>(row(static_cast<T*>(args.y), args.D, r), piece.width, there(r), v, y);
    }
  }
}

}  // namespace newllm::cuda
