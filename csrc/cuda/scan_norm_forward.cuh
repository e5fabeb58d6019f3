// c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t) and y_t = clamp(LayerNorm(c_t)) in one pass: 3 tensors read, 2
// written.
//
// The warps that walk leave c in shared memory, KEEP windows of it. A warp that normalises takes a window's rows there,
// stores them, and publishes mean and sum of squares over the block's columns; a window later it adds up the rows
// that its block owns; and another later, when all columns' statistics are back, writes y. By then nobody waits long.
#pragma once

#include <cooperative_groups.h>

#include "scan_norm.cuh"

namespace newllm::cuda {

template <class T, int R, int W, int STAGES, int NORM_WARPS, int KEEP, bool CLUSTER>
struct ScanNormForward {
  using Scan = Recurrence<GatedForward, T, R, W, STAGES, true, CLUSTER, false>;
  using Kept = typename Scan::Kept;
  using Gates = GateRows<Scan, T, R, W, STAGES>;
  using Part = RowPart<T>;
  static constexpr int kEach = Part::kEach, kLanes = Part::kLanes, kAtOnce = Part::kRowsAtOnce;
  static constexpr int kWalkers = W / NORM_WARPS, kRows = kWalkers * R, kGroups = kRows / kAtOnce;
  static constexpr int kThreads = 32 * (W + NORM_WARPS);
  using Exchange = RowExchange<kRows, NORM_WARPS>;
  static_assert(W % NORM_WARPS == 0 && R % kAtOnce == 0 && kRows <= 32 && kGroups <= kLanes);
  static_assert(KEEP >= 3);

  struct Shared {
    typename Scan::Shared scan;
    T contexts[KEEP][W][R][kColumns];
    uint64_t full[KEEP][W], empty[KEEP][W];
  };

  const ScanNormArgs& args;
  Shared& shared;
  const int lane, warp, cluster, rank, block;
  const int64_t team, column;

  __device__ __forceinline__ ScanNormForward(const ScanNormArgs& args_, Shared& shared_)
      : args(args_),
        shared(shared_),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        cluster(CLUSTER ? args.scan.cluster : 1),
        rank(CLUSTER ? int(blockIdx.x) % cluster : 0),
        block(int(blockIdx.x) / cluster % args.scan.column_blocks),
        team(int(blockIdx.x) / cluster / args.scan.column_blocks),
        column(int64_t(block) * kColumns) {}

  // ---- warps that walk ----------------------------------------------------------------------------------------------

  __device__ __forceinline__ Scan scan_of(int64_t n) const { return Scan(args.scan, shared.scan, n); }

  // As Recurrence::reduce, of the block's window `count`, of which `there` steps of this warp are.
  __device__ __forceinline__ Pair reduce(Gates& gates, uint32_t count, int there, Kept& kept) const {
    copy_async_wait<Scan::kAhead - 1>();
    __syncwarp();
    gates.fetch();
    const auto& rows = shared.scan.rows[warp][count % STAGES];
    Pair own;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float x[2][GatedForward::kInputs];
      Scan::inputs(rows, r, lane, true, x);
      Pair next;
#pragma unroll
      for (int v = 0; v < 2; ++v) GatedForward::pair(x[v], kept[r][v], next.a[v], next.b[v]);
      if (r < there) own.then_step(next);
    }
    return own;
  }

  static __device__ __forceinline__ int steps_left(const Scan& scan, int64_t turn) {
    return Scan::rows_left(scan.step_of(turn), scan.piece.steps);
  }

  // This warp's steps of the block's window `count`, into shared memory.
  __device__ __forceinline__ void apply(uint32_t count, const Kept& kept, float (&state)[2]) const {
    const int slot = count % KEEP;
    if (count >= KEEP) mbarrier_wait_in_block(&shared.empty[slot][warp], (count / KEEP - 1) % 2);
    const float none[GatedForward::kInputs] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float y[2][1];
#pragma unroll
      for (int v = 0; v < 2; ++v) state[v] = GatedForward::step(none, kept[r][v], state[v], y[v]);
      const float both[2] = {y[0][0], y[1][0]};
      reinterpret_cast<typename Vec<T, 2>::Raw*>(&shared.contexts[slot][warp][r][0])[lane] = Vec<T, 2>::pack(both);
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.full[slot][warp]);
  }

  __device__ __forceinline__ void walk_alone(Scan& scan, Gates& gates, float (&state)[2], uint32_t& count) const {
    for (int64_t turn = 0; turn < scan.turns; ++turn, ++count) {
      Kept kept;
      Pair(&pairs)[W][32] = shared.scan.pairs[count % 2];
      pairs[warp][lane] = reduce(gates, count, steps_left(scan, turn), kept);
      Scan::sync();
      float begin[2];
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if (w == warp) begin[0] = state[0], begin[1] = state[1];
        pairs[w][lane].move(state);
      }
      apply(count, kept, begin);
    }
  }

  // The one sequence of a cluster.
  __device__ __forceinline__ void walk_together(Scan& scan, Gates& gates, float (&state)[2], uint32_t& count) const {
    Kept kept;
    Pair before;
    if (scan.turns > 0) before = scan.send_window(0, reduce(gates, 0, steps_left(scan, 0), kept));
    for (int64_t turn = 0; turn < scan.turns; ++turn, ++count) {
      Kept next_kept;
      Pair next_before;
      if (turn + 1 < scan.turns) {
        next_before =
            scan.send_window(turn + 1, reduce(gates, count + 1, steps_left(scan, turn + 1), next_kept));
      }
      float begin[2];
      scan.receive_windows(turn, state, begin);
      before.move(begin);
      apply(count, kept, begin);
      before = next_before;
#pragma unroll
      for (int r = 0; r < R; ++r) kept[r][0] = next_kept[r][0], kept[r][1] = next_kept[r][1];
    }
  }

  __device__ __forceinline__ void walk(Gates& gates) const {
    uint32_t count = 0;
    for (int64_t n = team; n < args.sequences; n += args.teams) {
      Scan scan = scan_of(n);
      float state[2];
      scan.read(args.scan.start, n, state);
      if constexpr (CLUSTER) {
        walk_together(scan, gates, state, count);
      } else {
        walk_alone(scan, gates, state, count);
      }
      if (warp == 0 && rank == 0) scan.write(args.scan.last, n, state);
    }
    copy_async_wait<0>();
  }

  // ---- warps that normalise -----------------------------------------------------------------------------------------

  __device__ __forceinline__ Exchange exchange_of(int which) const {
    return Exchange(args.exchange, team * cluster + rank, which, args.scan.column_blocks, block, args.scan.D);
  }

  // Row g of this lane's rows in a window, of `kRows`.
  __device__ __forceinline__ int row_of(int g) const { return g * kAtOnce + lane / kLanes; }
  __device__ __forceinline__ int at() const { return lane % kLanes * kEach; }  // the lane's first column in the block

  // This lane's parts of a window's rows.
  __device__ __forceinline__ void read(uint32_t count, int which, int4 (&bits)[kGroups]) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int walker = which * kWalkers + g * kAtOnce / R, row = g * kAtOnce % R + lane / kLanes;
      bits[g] = *reinterpret_cast<const int4*>(&shared.contexts[count % KEEP][walker][row][at()]);
    }
  }

  // Stores c, and publishes the block's share of every row.
  __device__ __forceinline__ void store_and_publish(const Exchange& exchange, uint32_t count, int which,
                                                    const RowRun& run) const {
    const bool counts = column + at() < args.scan.D;
    const float scale = 1.0f / float(least(kColumns, args.scan.D - column));
#pragma unroll
    for (int w = 0; w < kWalkers; ++w) {
      mbarrier_wait_in_block(&shared.full[count % KEEP][which * kWalkers + w], count / KEEP % 2);
    }
    int4 bits[kGroups];
    read(count, which, bits);
    T* c = static_cast<T*>(args.c.data) + (run.first + row_of(0)) * args.scan.D + column + at();
    float mean[kGroups], squares[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g, c += kAtOnce * args.scan.D) {
      store_if(row_of(g) < run.there && counts, c, bits[g]);
      float x[kEach];
      Part::unpack(bits[g], x);
      mean[g] = 0.0f;
#pragma unroll
      for (int e = 0; e < kEach; ++e) mean[g] += x[e];  // zeros past the last column
    }
    sum_parts<kLanes>(mean);
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
    sum_parts<kLanes>(squares);
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
                                        const RowRun& run) const {
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
  __device__ __forceinline__ void normalise(const Exchange& exchange, uint32_t count, TwoWords peeked, int which,
                                            const RowRun& run, const float (&w)[kEach], const float (&b)[kEach]) const {
    float2 found = make_float2(0.0f, 0.0f);
    if (lane < kRows) found = exchange.read(count, lane, peeked);
    __syncwarp();
    int4 bits[kGroups];
    read(count, which, bits);
    T* y = static_cast<T*>(args.y.data) + (run.first + row_of(0)) * args.scan.D + column + at();
#pragma unroll
    for (int g = 0; g < kGroups; ++g, y += kAtOnce * args.scan.D) {
      const float rstd = __shfl_sync(0xffffffffu, found.y, row_of(g));
      const float shift = __shfl_sync(0xffffffffu, -found.x * found.y, row_of(g));
      float x[kEach];
      Part::unpack(bits[g], x);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        x[e] = fmaf(fmaf(x[e], rstd, shift), w[e], b[e]);
        if (CLAMPED) x[e] = clamped(x[e], args.clamp);
      }
      store_if(row_of(g) < run.there && column + at() < args.scan.D, y, Part::pack(x));
    }
    __syncwarp();
    if (lane < kWalkers) mbarrier_arrive(&shared.empty[count % KEEP][which * kWalkers + lane]);
    __syncwarp();
  }

  template <bool CLAMPED>
  __device__ __forceinline__ void normalise_all(const Exchange& exchange, int which) const {
    float w[kEach], b[kEach];
    Part::load(args.weight, 1.0f, column + at(), args.scan.D, w);
    Part::load(args.bias, 0.0f, column + at(), args.scan.D, b);
    Windows windows(args, int64_t(cluster) * W * R, team);
    RowRun now, before, earlier;
    uint32_t windows_there = ~0u;
    for (uint32_t count = 0; windows_there == ~0u || count < windows_there + 2; ++count) {
      const TwoWords shares = exchange.peek_shares(count - 1), totals = exchange.peek_totals(count - 2, lane);
      earlier = before, before = now;
      if (windows.there()) {
        const int64_t step = windows.first + rank * (W * R) + which * kRows;
        now.first = windows.batch * args.scan.T + windows.row + step;
        now.there = int(most(0, least(kRows, windows.steps - step)));
        store_and_publish(exchange, count, which, now);
        windows.next();
      } else if (windows_there == ~0u) {
        windows_there = count;
      }
      if (count >= 1 && count - 1 < windows_there) total(exchange, count - 1, shares, before);
      if (count >= 2 && count - 2 < windows_there) normalise<CLAMPED>(exchange, count - 2, totals, which, earlier, w, b);
    }
  }

  // ---- both ---------------------------------------------------------------------------------------------------------

  // Barriers and the exchange's memory are ready everywhere.
  __device__ __forceinline__ void begin() const {
    if (CLUSTER) cluster_sync();
    cooperative_groups::this_grid().sync();
  }

  __device__ __forceinline__ void run() const {
    const bool walks = warp < W;
    const int which = warp - W;
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < KEEP; ++slot) {
        for (int w = 0; w < W; ++w) mbarrier_init(&shared.full[slot][w], 1), mbarrier_init(&shared.empty[slot][w], 1);
      }
    }
    if (CLUSTER) scan_of(team).expect_windows();
    if (walks) {
      Gates gates(args, shared.scan, cluster, rank, team, column);
#pragma unroll
      for (int turn = 0; turn < Scan::kAhead; ++turn) gates.fetch();
      begin();
      walk(gates);
    } else {
      exchange_of(which).clear();
      begin();
      if (args.clamp == INFINITY) {
        normalise_all<false>(exchange_of(which), which);
      } else {
        normalise_all<true>(exchange_of(which), which);
      }
    }
    if (CLUSTER) cluster_sync();  // nobody's shared memory may go while messages are on their way
  }
};

template <class T, int R, int W, int STAGES, int NORM_WARPS, int KEEP, bool CLUSTER>
__global__ void __launch_bounds__(32 * (W + NORM_WARPS), 1)
    scan_norm_forward_kernel(const __grid_constant__ ScanNormArgs args) {
#ifdef NEWLLM_CLUSTERS
  using Kernel = ScanNormForward<T, R, W, STAGES, NORM_WARPS, KEEP, CLUSTER>;
  extern __shared__ __align__(16) unsigned char memory[];
  Kernel(args, *reinterpret_cast<typename Kernel::Shared*>(memory)).run();
#else
  __trap();  // never launched on this architecture
#endif
}

}  // namespace newllm::cuda
