// The recurrences of `scan` and `gated_scan`, forward and backward, as one kernel: s_t = a_t s_{t-1} + b_t where an
// operation (recurrence_ops.cuh) says how a and b come from its inputs and what it writes.
//
//     columns    a block owns 64 neighbouring columns, a thread two of them: a row of a warp is one cache line of
//                16-bit storage
//     time       a block walks windows of W * R steps, R steps a warp. Each warp copies its own rows of the next
//                STAGES - 1 windows into its part of shared memory while it computes. It hands the product and end
//                (A, B) of its steps to the other warps: one barrier a window, and no step waits for another warp's
//                memory.
//     cluster    where columns are too few to fill the GPU, up to 8 blocks of a cluster take a window each at the same
//                time, and send the window's (A, B) to each other through distributed shared memory. CUDA starts the
//                blocks of a cluster together, which is all that the waiting relies on.
//     chunks     where even that is too little (or without clusters), chunks of time are reduced to their (A, B) first
//                (PAIRS), their starts found, and then walked side by side: 2 more reads of what a and b are made of.
//
// Everything is added in one order, whatever the timing: the same inputs give the same bits.
#pragma once

#include <cuda_runtime.h>

#include "cluster.cuh"
#include "copy_async.cuh"
#include "numeric.cuh"
#include "recurrence_args.cuh"

namespace newllm::cuda {

// ALIGNED: rows of inputs and outputs begin at multiples of 16 bytes and are whole multiples of them.
template <class Op, class T, int R, int W, int STAGES, bool ALIGNED, bool CLUSTER, bool PAIRS>
struct Recurrence {
  using Rows = T[R][kColumns];
  using Kept = typename Op::Kept[R][2];
  static constexpr int kSlots = 4;                           // of messages, see send_window
  static constexpr int kAhead = STAGES - (CLUSTER ? 2 : 1);  // turns whose rows are on their way while one is computed
  static_assert(kAhead >= 1 && (!CLUSTER || W >= kMostCluster));

  struct Shared {
    Rows rows[W][STAGES][Op::kInputs];
    Pair pairs[2][W][32];
    Pair windows[CLUSTER ? kSlots : 1][CLUSTER ? kMostCluster : 1][32];  // of the blocks of the cluster
    uint64_t arrived[kSlots];
  };

  const RecurrenceArgs& args;
  Shared& shared;
  const int lane, warp, cluster, rank;
  const int64_t index, column;  // of the block
  const Piece piece;
  const int64_t turns;  // in each, every block of the cluster takes one window

  __device__ __forceinline__ Recurrence(const RecurrenceArgs& args_, Shared& shared_)
      : args(args_),
        shared(shared_),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        cluster(CLUSTER ? args.cluster : 1),
        rank(CLUSTER ? int(blockIdx.x) % cluster : 0),
        index(blockIdx.x / cluster / args.column_blocks),
        column(int64_t(blockIdx.x / cluster % args.column_blocks) * kColumns),
        piece(args, index),
        turns((piece.steps + W * R * cluster - 1) / (W * R * cluster)) {}

  // The first step of this warp in a turn.
  __device__ __forceinline__ int64_t step_of(int64_t turn) const {
    return piece.first + ((turn * cluster + rank) * W + warp) * R;
  }

  // How many of R steps from `step` on there are, below `end`.
  static __device__ __forceinline__ int rows_left(int64_t step, int64_t end) {
    return int(most(0, least(R, end - step)));
  }

  // This warp's rows of a turn, on their way into `rows`.
  __device__ __forceinline__ void fetch(int64_t turn, Rows (&rows)[Op::kInputs]) const {
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k) {
      if (PAIRS && !Op::in_pair(k)) continue;
      const bool previous = k == Op::kPrevious;  // the row before in time is the next one of the walk
      const Walk<const T> walk(args.in[k], piece, args.from_end);
      const int64_t step = step_of(turn) + previous;
      const int there = walk.base != nullptr ? rows_left(step, previous ? piece.length : piece.first + piece.steps) : 0;
      const T* source = walk.base + step * walk.stride + column;
      if constexpr (ALIGNED) {
        constexpr int kEach = 16 / sizeof(T), kLanes = kColumns / kEach;  // elements of a copy, copies of a row
        const int at = lane % kLanes * kEach;
#pragma unroll
        for (int r = lane / kLanes; r < R; r += 32 / kLanes) {
          const bool is_there = r < there && column + at < args.D;
          copy_async<16>(&rows[k][r][at], is_there ? source + r * walk.stride + at : source, is_there);
        }
      } else {
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int at = lane; at < kColumns; at += 32) {
            const bool is_there = r < there && column + at < args.D;
            const T* element = source + r * walk.stride + at;
            if constexpr (sizeof(T) == 4) {
              copy_async<4>(&rows[k][r][at], is_there ? element : source, is_there);
            } else {
              rows[k][r][at] = is_there ? *element : T(0.0f);
            }
          }
        }
      }
    }
    copy_async_commit();
  }

  // Inputs of a thread's two columns at step r of its warp.
  static __device__ __forceinline__ void inputs(const Rows (&rows)[Op::kInputs], int r, int lane, bool of_pair,
                                                float (&x)[2][Op::kInputs]) {
#pragma unroll
    for (int k = 0; k < Op::kInputs; ++k) {
      if (of_pair && !Op::in_pair(k)) continue;
      float both[2];
      Vec<T, 2>::unpack(*reinterpret_cast<const typename Vec<T, 2>::Raw*>(&rows[k][r][2 * lane]), both);
      x[0][k] = both[0], x[1][k] = both[1];
    }
  }

  __device__ __forceinline__ void read(const float* states, int64_t which, float (&x)[2]) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int64_t at = column + 2 * lane + v;
      x[v] = states != nullptr && at < args.D ? states[which * args.D + at] : 0.0f;
    }
  }

  __device__ __forceinline__ void write(float* states, int64_t which, const float (&x)[2]) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int64_t at = column + 2 * lane + v;
      if (at < args.D) states[which * args.D + at] = x[v];
    }
  }

  // Waits for this warp's rows of a turn, sends for later ones, and reduces them: own pair, and what `apply` needs
  // again.
  __device__ __forceinline__ Pair reduce(int64_t turn, Kept& kept) {
    const int64_t step = step_of(turn);
    copy_async_wait<kAhead - 1>();
    __syncwarp();  // rows of this turn are there for the whole warp, and all have done with those overwritten next
    fetch(turn + kAhead, rows_of(turn + kAhead));
    const Rows(&rows)[Op::kInputs] = rows_of(turn);
    const int there = rows_left(step, piece.first + piece.steps);
    Pair own;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float x[2][Op::kInputs];
      inputs(rows, r, lane, true, x);
      Pair next;
#pragma unroll
      for (int v = 0; v < 2; ++v) Op::pair(x[v], kept[r][v], next.a[v], next.b[v]);
      if (r < there) own.then_step(next);
    }
    return own;
  }

  __device__ __forceinline__ Rows (&rows_of(int64_t turn) const)[Op::kInputs] {
    return shared.rows[warp][int(turn) % STAGES];
  }

  // Cluster: reduces a turn and sends its window's pair to all blocks; what comes before this warp's steps in the
  // window. A slot fills again four turns on. Who sends that message has waited for the one two turns before it, which
  // this block sent past a barrier that all its warps reached after reading the slot.
  __device__ __forceinline__ Pair send_window(int64_t turn, Kept& kept) {
    Pair(&pairs)[W][32] = shared.pairs[turn % 2];
    pairs[warp][lane] = reduce(turn, kept);
    __syncthreads();
    Pair before, window;
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (w == warp) before = window;
      window.then(pairs[w][lane]);
    }
    const int slot = turn % kSlots;
    if (warp < cluster) {
      send(*reinterpret_cast<const float4*>(&window), reinterpret_cast<float4*>(&shared.windows[slot][rank][lane]),
           &shared.arrived[slot], warp);
    }
    return before;
  }

  // Cluster: the state before this block's window of a turn; `state` goes on to the next turn.
  __device__ __forceinline__ void receive_windows(int64_t turn, float (&state)[2], float (&begin)[2]) {
    const int slot = turn % kSlots;
    mbarrier_wait(&shared.arrived[slot], turn / kSlots % 2);
#pragma unroll
    for (int from = 0; from < kMostCluster; ++from) {
      if (from == rank) begin[0] = state[0], begin[1] = state[1];
      if (from < cluster) shared.windows[slot][from][lane].move(state);
    }
    if (warp == 0 && lane == 0) mbarrier_expect(&shared.arrived[slot], cluster * 32 * sizeof(Pair));
  }

  __device__ __forceinline__ void store(T* row, int64_t at, const float (&x)[2]) const {
    if constexpr (ALIGNED) {
      *reinterpret_cast<typename Vec<T, 2>::Raw*>(row + at) = Vec<T, 2>::pack(x);
    } else {
      row[at] = from_float<T>(x[0]);
      if (at + 1 < args.D) row[at + 1] = from_float<T>(x[1]);
    }
  }

  // The outputs of this warp's steps, given the state before them.
  __device__ __forceinline__ void apply(int64_t turn, const Kept& kept, float (&state)[2]) const {
    const int64_t step = step_of(turn);
    const Rows(&rows)[Op::kInputs] = rows_of(turn);
    const int64_t at = column + 2 * lane;
    const int there = at < args.D ? rows_left(step, piece.first + piece.steps) : 0;
    const int64_t at_edge = piece.length - 1 - step;
    float edge[2];
    if (Op::kPrevious >= 0) read(at_edge >= 0 && at_edge < R ? args.edge : nullptr, piece.n, edge);
    T* out[Op::kOutputs];
    int64_t stride[Op::kOutputs];
#pragma unroll
    for (int k = 0; k < Op::kOutputs; ++k) {
      const Walk<T> walk(args.out[k], piece, args.from_end);
      out[k] = walk.base + step * walk.stride;
      stride[k] = walk.stride;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float x[2][Op::kInputs], y[2][Op::kOutputs];
      inputs(rows, r, lane, false, x);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        if (Op::kPrevious >= 0 && r == at_edge) x[v][Op::kPrevious < 0 ? 0 : Op::kPrevious] = edge[v];
        state[v] = Op::step(x[v], kept[r][v], state[v], y[v]);
      }
      if (r < there) {
#pragma unroll
        for (int k = 0; k < Op::kOutputs; ++k) {
          const float both[2] = {y[0][k], y[1][k]};
          store(out[k] + r * stride[k], at, both);
        }
      }
    }
  }

  // One block a piece.
  __device__ __forceinline__ void run_alone(float (&state)[2]) {
    Pair all;  // PAIRS: of the piece up to here
    for (int64_t turn = 0; turn < turns; ++turn) {
      Kept kept;
      Pair(&pairs)[W][32] = shared.pairs[turn % 2];
      pairs[warp][lane] = reduce(turn, kept);
      __syncthreads();
      float begin[2];  // the state before this warp's steps
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const Pair pair = pairs[w][lane];
        if (w == warp) begin[0] = state[0], begin[1] = state[1];
        pair.move(state);
        if (PAIRS) all.then(pair);
      }
      if (!PAIRS) apply(turn, kept, begin);
    }
    if (PAIRS && warp == 0) {
      write(args.pairs, 2 * index, all.a);
      write(args.pairs, 2 * index + 1, all.b);
    }
  }

  // The blocks of a cluster. Messages of the next turn are sent before this one is computed, which hides their way.
  __device__ __forceinline__ void run_together(float (&state)[2]) {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < kSlots; ++slot) {
        mbarrier_init(&shared.arrived[slot], 1);
        mbarrier_expect(&shared.arrived[slot], cluster * 32 * sizeof(Pair));
      }
    }
    cluster_sync();  // no message may come before
    Kept kept;
    Pair before;
    if (turns > 0) before = send_window(0, kept);
    for (int64_t turn = 0; turn < turns; ++turn) {
      Kept next_kept;
      Pair next_before;
      if (turn + 1 < turns) next_before = send_window(turn + 1, next_kept);
      float begin[2];
      receive_windows(turn, state, begin);
      before.move(begin);
      apply(turn, kept, begin);
      before = next_before;
#pragma unroll
      for (int r = 0; r < R; ++r) kept[r][0] = next_kept[r][0], kept[r][1] = next_kept[r][1];
    }
    cluster_sync();  // nobody's shared memory may go while messages are on their way
  }

  __device__ __forceinline__ void run() {
    float state[2];  // before the turn
    read(args.start, index, state);
#pragma unroll
    for (int turn = 0; turn < kAhead; ++turn) fetch(turn, rows_of(turn));
    if constexpr (CLUSTER) {
      run_together(state);
    } else {
      run_alone(state);
    }
    copy_async_wait<0>();
    if (!PAIRS && piece.is_last && warp == 0 && rank == 0) write(args.last, piece.n, state);
  }
};

template <class Op, class T, int R, int W, int STAGES, bool ALIGNED, bool CLUSTER, bool PAIRS>
__global__ void __launch_bounds__(32 * W) recurrence_kernel(const __grid_constant__ RecurrenceArgs args) {
#ifndef NEWLLM_CLUSTERS
  if constexpr (CLUSTER)
    __trap();  // never launched on this architecture
  else
#endif
  {
    using Kernel = Recurrence<Op, T, R, W, STAGES, ALIGNED, CLUSTER, PAIRS>;
    extern __shared__ __align__(16) unsigned char memory[];
    Kernel(args, *reinterpret_cast<typename Kernel::Shared*>(memory)).run();
  }
}

}  // namespace newllm::cuda
