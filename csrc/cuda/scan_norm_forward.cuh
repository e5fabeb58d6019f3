// c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t) and y_t = clamp(LayerNorm(c_t)) in one pass: 3 tensors read, 2
// written.
//
// The warps that walk leave c in shared memory, KEEP windows of it. A warp that normalises takes a window's rows there,
// stores them, and publishes mean and sum of squares over the block's columns; TOTAL_LAG windows later it adds up the
// rows that its block owns; and LAG later, when the statistics are back, writes y. By then nobody waits long.
#pragma once

#include <cooperative_groups.h>

#include "scan_norm.cuh"

namespace newllm::cuda {

template <class T, int R, int W, int STAGES, int NORM_WARPS, int TOTAL_LAG, int LAG, int KEEP>
struct ScanNormForward {
  using Part = RowPart<T>;
  using Gates = GateRows<T, R, W, STAGES>;
  using Kept = typename GatedForward::Kept[R][2];
  static constexpr int kEach = Part::kEach, kLanes = Part::kLanes, kAtOnce = Part::kAtOnce;
  static constexpr int kWalkers = W / NORM_WARPS, kRows = kWalkers * R, kGroups = kRows / kAtOnce;
  static constexpr int kAhead = STAGES - 1, kThreads = 32 * (W + NORM_WARPS);
  using Exchange = RowExchange<kRows, NORM_WARPS, LAG + 2>;
  static_assert(W % NORM_WARPS == 0 && kRows <= 32 && kGroups <= kLanes);
  static_assert(TOTAL_LAG >= 1 && LAG > TOTAL_LAG && KEEP > LAG);

  struct Shared {
    WalkShared<T, R, W, STAGES> walk;
    T contexts[KEEP][W][R][kColumns];
    uint64_t full[KEEP][W], empty[KEEP][W];
  };

  // Rows of a warp that normalises in a window: the first of (B * T), and how many there are.
  struct Run {
    int64_t first = 0;
    int there = 0;
  };

  const ScanNormArgs& args;
  Shared& shared;
  const int lane, warp, which;  // of the warps that normalise
  const int block;              // of columns
  const int64_t team, column;

  __device__ __forceinline__ ScanNormForward(const ScanNormArgs& args_, Shared& shared_)
      : args(args_),
        shared(shared_),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        which(warp - W),
        block(int(blockIdx.x) % args.scan.column_blocks),
        team(int(blockIdx.x) / args.scan.column_blocks),
        column(int64_t(block) * kColumns) {}

  // ---- warps that walk ----------------------------------------------------------------------------------------------

  __device__ __forceinline__ Pair reduce(Gates& gates, uint32_t count, const Steps& steps, Kept& kept) const {
    copy_async_wait<kAhead - 1>();
    __syncwarp();  // rows of this window are there for the whole warp, and all have done with those overwritten next
    gates.fetch();
    Pair own;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float x[2][3];
      gates_at(shared.walk.rows[warp][count % STAGES], r, x);
      Pair next;
#pragma unroll
      for (int v = 0; v < 2; ++v) GatedForward::pair(x[v], kept[r][v], next.a[v], next.b[v]);
      if (r < steps.there) own.then_step(next);
    }
    return own;
  }

  // c into shared memory.
  __device__ __forceinline__ void apply(uint32_t count, const Kept& kept, float (&state)[2]) const {
    const int slot = count % KEEP;
    if (count >= KEEP) mbarrier_wait_in_block(&shared.empty[slot][warp], (count / KEEP - 1) % 2);
    const float none[3] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float y[2][1];
#pragma unroll
      for (int v = 0; v < 2; ++v) state[v] = GatedForward::step(none, kept[r][v], state[v], y[v]);
      const float both[2] = {y[0][0], y[1][0]};
      reinterpret_cast<typename Vec<T, 2>::Raw*>(shared.contexts[slot][warp][r])[lane] = Vec<T, 2>::pack(both);
    }
    warp_arrives(&shared.full[slot][warp]);
  }

  // ---- warps that normalise -----------------------------------------------------------------------------------------

  __device__ __forceinline__ Exchange exchange() const {
    return Exchange(args.exchange, team, which, args.scan.column_blocks, block, args.scan.D);
  }

  // The row of a lane's g-th part in a window, of `kRows`, and the part's first column.
  __device__ __forceinline__ int row_of(int g) const { return g * kAtOnce + lane / kLanes; }
  __device__ __forceinline__ int at() const { return lane % kLanes * kEach; }

  __device__ __forceinline__ void read(uint32_t count, int4 (&bits)[kGroups]) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int walker = which * kWalkers + g * kAtOnce / R, row = g * kAtOnce % R + lane / kLanes;
      bits[g] = *reinterpret_cast<const int4*>(&shared.contexts[count % KEEP][walker][row][at()]);
    }
  }

  // Stores c, and publishes the block's share of every row.
  __device__ __forceinline__ void store_and_publish(const Exchange& exchange, uint32_t count, const Run& run) const {
    const bool counts = column + at() < args.scan.D;
    const float scale = 1.0f / float(least(kColumns, args.scan.D - column));
#pragma unroll
    for (int w = 0; w < kWalkers; ++w) {
      mbarrier_wait_in_block(&shared.full[count % KEEP][which * kWalkers + w], count / KEEP % 2);
    }
    int4 bits[kGroups];
    read(count, bits);
    T* c = static_cast<T*>(args.c.data) + (run.first + row_of(0)) * args.scan.D + column + at();
    float mean[kGroups], squares[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g, c += kAtOnce * args.scan.D) {
      Part::store_if(row_of(g) < run.there && counts, c, bits[g]);
      float x[kEach];
      Part::unpack(bits[g], x);
      mean[g] = 0.0f;
#pragma unroll
      for (int e = 0; e < kEach; ++e) mean[g] += x[e];  // zeros past the last column
    }
    Part::sum(mean);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float x[kEach];
      Part::unpack(bits[g], x);
      mean[g] *= scale;
      squares[g] = 0.0f;
#pragma unroll
      for (int e = 0; e < kEach; ++e) squares[g] = fmaf(x[e] - mean[g], x[e] - mean[g], squares[g]);
      squares[g] = counts ? squares[g] : 0.0f;
    }
    Part::sum(squares);
    float own[2] = {0.0f, 0.0f};  // of row_of(lane % kLanes)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      own[0] = lane % kLanes == g ? mean[g] : own[0];
      own[1] = lane % kLanes == g ? squares[g] : own[1];
    }
    if (lane % kLanes < kGroups) exchange.publish(count, row_of(lane % kLanes), own[0], own[1]);
    __syncwarp();
  }

  // Mean and 1 / deviation of the rows that this block owns.
  __device__ __forceinline__ void total(const Exchange& exchange, uint32_t count, TwoWords peeked,
                                        const Run& run) const {
    const float scale = 1.0f / float(args.scan.D), eps = args.eps;
    exchange.total(
        count, peeked,
        [=](float2 share, float columns, int width) {
          const float mean = sum_lanes(columns * share.x, width) * scale, apart = share.x - mean;
          const float squares = sum_lanes(fmaf(columns * apart, apart, share.y), width);
          return make_float2(mean, rsqrtf(fmaf(squares, scale, eps)));
        },
        [&](int row, float2 found) {
          if (row < run.there) args.mean[run.first + row] = found.x, args.rstd[run.first + row] = found.y;
        });
    __syncwarp();
  }

  template <bool CLAMPED>
  __device__ __forceinline__ void normalise(const Exchange& exchange, uint32_t count, TwoWords peeked, const Run& run,
                                            const float (&w)[kEach], const float (&b)[kEach]) const {
    float2 found = make_float2(0.0f, 0.0f);
    if (lane < kRows) found = exchange.read(count, lane, peeked);
    __syncwarp();
    int4 bits[kGroups];
    read(count, bits);
    T* y = static_cast<T*>(args.y.data) + (run.first + row_of(0)) * args.scan.D + column + at();
#pragma unroll
    for (int g = 0; g < kGroups; ++g, y += kAtOnce * args.scan.D) {
      const float mean = __shfl_sync(0xffffffffu, found.x, row_of(g));
      const float rstd = __shfl_sync(0xffffffffu, found.y, row_of(g));
      float x[kEach];
      Part::unpack(bits[g], x);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        x[e] = fmaf((x[e] - mean) * rstd, w[e], b[e]);
        if (CLAMPED) x[e] = clamped(x[e], args.clamp);
      }
      Part::store_if(row_of(g) < run.there && column + at() < args.scan.D, y, Part::pack(x));
    }
    warp_arrives(&shared.empty[count % KEEP][which * kWalkers], kWalkers);
    __syncwarp();
  }

  template <bool CLAMPED>
  __device__ __forceinline__ void normalise_all(const Exchange& exchange) const {
    float w[kEach], b[kEach];
    Part::load(args.weight, 1.0f, column + at(), args.scan.D, w);
    Part::load(args.bias, 0.0f, column + at(), args.scan.D, b);
    Windows windows(args, W * R, team);
    Run runs[LAG + 1];   // of this window and those before it
    uint32_t end = ~0u;  // of the windows, once it is known
    for (uint32_t count = 0; end == ~0u || count < end + LAG; ++count) {
      const TwoWords shares = exchange.peek_shares(count - TOTAL_LAG);
      const TwoWords totals = exchange.peek_totals(count - LAG, lane);
#pragma unroll
      for (int k = LAG; k > 0; --k) runs[k] = runs[k - 1];
      if (windows.there()) {
        const int64_t step = windows.first + which * kRows;
        runs[0] = {windows.batch * args.scan.T + windows.row + step, windows.steps_left(which * kRows, kRows)};
        store_and_publish(exchange, count, runs[0]);
        windows.next();
      } else if (end == ~0u) {
        end = count;
      }
      if (count >= TOTAL_LAG && count - TOTAL_LAG < end) total(exchange, count - TOTAL_LAG, shares, runs[TOTAL_LAG]);
      if (count >= LAG && count - LAG < end) normalise<CLAMPED>(exchange, count - LAG, totals, runs[LAG], w, b);
    }
  }

  // ---- both ---------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      shared.walk.begin();
      for (int slot = 0; slot < KEEP; ++slot) {
        for (int w = 0; w < W; ++w) {
          mbarrier_init(&shared.full[slot][w], kArrivalsOfWarp);
          mbarrier_init(&shared.empty[slot][w], kArrivalsOfWarp);
        }
      }
    }
    if (warp < W) {
      Gates gates(args, shared.walk, team, column);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) gates.fetch();
      cooperative_groups::this_grid().sync();  // barriers and the exchange's memory are ready everywhere
      walk<true, Kept, R, W>(
          args, shared.walk, team, column,
          [&](uint32_t count, const Steps& steps, Kept& kept) { return reduce(gates, count, steps, kept); },
          [&](uint32_t count, const Steps&, const Kept& kept, float (&state)[2]) { apply(count, kept, state); });
      copy_async_wait<0>();
    } else {
      exchange().clear();
      cooperative_groups::this_grid().sync();
      if (args.clamp == INFINITY) {
        normalise_all<false>(exchange());
      } else {
        normalise_all<true>(exchange());
      }
    }
  }
};

template <class T, int R, int W, int STAGES, int NORM_WARPS, int TOTAL_LAG, int LAG, int KEEP>
__global__ void __launch_bounds__(32 * (W + NORM_WARPS), 1)
    scan_norm_forward_kernel(const __grid_constant__ ScanNormArgs args) {
#ifdef NEWLLM_CLUSTERS
  using Kernel = ScanNormForward<T, R, W, STAGES, NORM_WARPS, TOTAL_LAG, LAG, KEEP>;
  extern __shared__ __align__(16) unsigned char memory[];
  Kernel(args, *reinterpret_cast<typename Kernel::Shared*>(memory)).run();
#else
  __trap();  // never launched on this architecture
#endif
}

}  // namespace newllm::cuda
