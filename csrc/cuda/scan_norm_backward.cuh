// The backward of y = clamp(LayerNorm(c)), c = gated_scan(f, i, d), in one pass: 5 tensors read, 3 written.
//
// Time is walked from the end. The warps that normalise go ahead: of g = grad_y weight they publish a row's sums of g
// and g xhat over the block's columns, a window later add up the rows that their block owns, and another later make
// the gradient of c, in shared memory, where the warps that walk take it, and c itself, which is the state before a
// step. Gradients of weight and bias are summed in registers, then block by block in order.
#pragma once

#include <cooperative_groups.h>

#include "scan_norm.cuh"

namespace newllm::cuda {

// AHEAD: windows whose grad_y and c are on their way; KEEP windows of c and GRADS of its gradient are held.
template <class T, int R, int W, int STAGES, int NORM_WARPS, int AHEAD, int TOTAL_LAG, int LAG, int KEEP, int GRADS>
struct ScanNormBackward {
  using Part = RowPart<T>;
  using Gates = GateRows<T, R, W, STAGES>;
  using Kept = Activation[R][2];  // of f
  static constexpr int kEach = Part::kEach, kLanes = Part::kLanes, kAtOnce = Part::kAtOnce;
  static constexpr int kWalkers = W / NORM_WARPS, kRows = kWalkers * R, kGroups = kRows / kAtOnce;
  static constexpr int kAhead = STAGES - 1, kThreads = 32 * (W + NORM_WARPS), kOfY = AHEAD + LAG + 1;
  using Exchange = RowExchange<kRows, NORM_WARPS, LAG + 2>;
  static_assert(W % NORM_WARPS == 0 && kRows <= 32 && kGroups <= kLanes && kAhead >= 1);
  static_assert(TOTAL_LAG >= 1 && LAG > TOTAL_LAG && KEEP >= AHEAD + LAG + 2 && GRADS >= 1);

  struct Shared {
    WalkShared<T, R, W, STAGES> walk;
    float grad[GRADS][W * R][kColumns];        // of c
    T grad_y[kOfY][W * R][kColumns];           // of a lane of a warp that normalises, nobody else reads it
    T contexts[KEEP][W * R + 1][kColumns];     // the last is the first of the next window
    float sums[2][NORM_WARPS][kColumns];       // of weight and bias
    uint64_t full[GRADS][W], empty[GRADS][W];  // grad
    uint64_t passed[KEEP];                     // contexts
  };

  const ScanNormArgs& args;
  Shared& shared;
  const int lane, warp, which;  // of the warps that normalise
  const int block;              // of columns
  const int64_t team, column;

  __device__ __forceinline__ ScanNormBackward(const ScanNormArgs& args_, Shared& shared_)
      : args(args_),
        shared(shared_),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        which(warp - W),
        block(int(blockIdx.x) % args.scan.column_blocks),
        team(int(blockIdx.x) / args.scan.column_blocks),
        column(int64_t(block) * kColumns) {}

  // ---- warps that walk ----------------------------------------------------------------------------------------------

  __device__ __forceinline__ float2 grad_of(uint32_t count, int r) const {
    return *reinterpret_cast<const float2*>(&shared.grad[count % GRADS][warp * R + r][2 * lane]);
  }

  __device__ __forceinline__ Pair reduce(Gates& gates, uint32_t count, const Steps& steps, Kept& kept) const {
    copy_async_wait<kAhead - 1>();
    __syncwarp();  // rows of this window are there for the whole warp, and all have done with those overwritten next
    gates.fetch();
    mbarrier_wait_in_block(&shared.full[count % GRADS][warp], count / GRADS % 2);
    Pair own;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float x[2][3];
      gates_at(shared.walk.rows[warp][count % STAGES], r, x);
      const float2 grad = grad_of(count, r);
      Pair next;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        kept[r][v] = sigmoid_fast(x[v][0]);
        next.a[v] = kept[r][v].value;
        next.b[v] = next.a[v] * (v == 0 ? grad.x : grad.y);
      }
      if (r < steps.there) own.then_step(next);
    }
    return own;
  }

  // The gradients of the gates.
  __device__ __forceinline__ void apply(uint32_t count, const Steps& steps, const Kept& kept, float (&state)[2]) const {
    const int64_t at = column + 2 * lane, D = args.scan.D;
    const int there = at < D ? steps.there : 0;
    float edge[2] = {0.0f, 0.0f};  // c0
    if (steps.left > 0 && steps.left <= R && args.scan.edge != nullptr && at < D) {
      edge[0] = args.scan.edge[steps.n * D + at], edge[1] = args.scan.edge[steps.n * D + at + 1];
    }
    T* out[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const View3& view = args.scan.out[k];
      out[k] = static_cast<T*>(view.data) + steps.batch * view.stride_b + steps.row * view.stride_t + at;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float gates[2][3], before[2], y[2][3];
      gates_at(shared.walk.rows[warp][count % STAGES], r, gates);
      const float2 grad = grad_of(count, r);
      Vec<T, 2>::unpack(
          reinterpret_cast<const typename Vec<T, 2>::Raw*>(shared.contexts[count % KEEP][warp * R + r + 1])[lane],
          before);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const float x[5] = {v == 0 ? grad.x : grad.y, gates[v][0], gates[v][1], gates[v][2],
                            r + 1 == steps.left ? edge[v] : before[v]};
        state[v] = GatedBackward::step(x, kept[r][v], state[v], y[v]);
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const float both[2] = {y[0][k], y[1][k]};
        if (r < there) *reinterpret_cast<typename Vec<T, 2>::Raw*>(out[k]) = Vec<T, 2>::pack(both);
        out[k] -= args.scan.out[k].stride_t;
      }
    }
    warp_arrives(&shared.empty[count % GRADS][warp]), warp_arrives(&shared.passed[count % KEEP]);
  }

  // ---- warps that normalise -----------------------------------------------------------------------------------------

  __device__ __forceinline__ Exchange exchange() const {
    return Exchange(args.exchange, team, which, args.scan.column_blocks, block, args.scan.D);
  }

  // The row of a lane's g-th part in a window, of `kRows`, and the part's first column.
  __device__ __forceinline__ int row_of(int g) const { return g * kAtOnce + lane / kLanes; }
  __device__ __forceinline__ int at() const { return lane % kLanes * kEach; }

  struct Statistics {
    float mean = 0.0f, rstd = 0.0f;  // of row `lane`; zeros where there is none
  };

  // Rows of grad_y and c of the window `count` on their way, and their statistics.
  __device__ __forceinline__ Statistics fetch(const Windows& windows, uint32_t count) const {
    Statistics found;
    if (windows.there()) {
      const int64_t step = windows.first + which * kRows;
      const int there = windows.steps_left(which * kRows, kRows);
      const bool counts = column + at() < args.scan.D;
      const auto source = [&](const View3& view) {
        return static_cast<const T*>(view.data) + windows.batch * view.stride_b +
               (windows.row - step - row_of(0)) * view.stride_t + column + at();
      };
      const T *grad_y = source(args.grad_y), *c = source(args.c);
      if (count >= KEEP) mbarrier_wait_in_block(&shared.passed[count % KEEP], (count / KEEP - 1) % 2);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int to = which * kRows + row_of(g);
        const bool reads = row_of(g) < there && counts;  // or the address may be anything
        copy_async<16>(&shared.grad_y[count % kOfY][to][at()], grad_y, reads);
        copy_async<16>(&shared.contexts[count % KEEP][to][at()], c, reads);
        grad_y -= kAtOnce * args.grad_y.stride_t, c -= kAtOnce * args.c.stride_t;
      }
      if (which == NORM_WARPS - 1 && lane < kLanes) {
        copy_async<16>(&shared.contexts[count % KEEP][W * R][at()], c, step + kRows < windows.steps && counts);
      }
      if (lane < there) {
        const int64_t row = windows.batch * args.scan.T + windows.row - step - lane;
        found = {args.mean[row], args.rstd[row]};
      }
      __syncwarp();
    }
    copy_async_commit();
    return found;
  }

  // This lane's parts of the rows of a window: grad_y, zero where the clamp cut, and c.
  __device__ __forceinline__ void read(uint32_t count, const Statistics& of, const float (&w)[kEach],
                                       const float (&b)[kEach], int4 (&grads)[kGroups], int4 (&c)[kGroups]) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int row = which * kRows + row_of(g);
      grads[g] = *reinterpret_cast<const int4*>(&shared.grad_y[count % kOfY][row][at()]);
      c[g] = *reinterpret_cast<const int4*>(&shared.contexts[count % KEEP][row][at()]);
    }
    if (args.clamp == INFINITY) return;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float mean = __shfl_sync(0xffffffffu, of.mean, row_of(g));
      const float rstd = __shfl_sync(0xffffffffu, of.rstd, row_of(g));
      float grad[kEach], x[kEach];
      Part::unpack(grads[g], grad);
      Part::unpack(c[g], x);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        grad[e] = fabsf(fmaf((x[e] - mean) * rstd, w[e], b[e])) > args.clamp ? 0.0f : grad[e];
      }
      grads[g] = Part::pack(grad);
    }
  }

  struct Sums {
    float weight[kEach] = {}, bias[kEach] = {};
  };

  __device__ __forceinline__ void publish(const Exchange& exchange, uint32_t count, const Statistics& of,
                                          const float (&w)[kEach], const float (&b)[kEach], Sums& sums) const {
    int4 grads[kGroups], c[kGroups];
    read(count, of, w, b, grads, c);
    float of_g[kGroups], of_gx[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float mean = __shfl_sync(0xffffffffu, of.mean, row_of(g));
      const float rstd = __shfl_sync(0xffffffffu, of.rstd, row_of(g));
      float grad[kEach], x[kEach];
      Part::unpack(grads[g], grad);
      Part::unpack(c[g], x);
      of_g[g] = of_gx[g] = 0.0f;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const float xhat = (x[e] - mean) * rstd;
        sums.weight[e] = fmaf(grad[e], xhat, sums.weight[e]);
        sums.bias[e] += grad[e];
        of_g[g] = fmaf(grad[e], w[e], of_g[g]);
        of_gx[g] = fmaf(grad[e] * w[e], xhat, of_gx[g]);
      }
    }
    Part::sum(of_g);
    Part::sum(of_gx);
    float own[2] = {0.0f, 0.0f};  // of row_of(lane % kLanes)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      own[0] = lane % kLanes == g ? of_g[g] : own[0];
      own[1] = lane % kLanes == g ? of_gx[g] : own[1];
    }
    if (lane % kLanes < kGroups) exchange.publish(count, row_of(lane % kLanes), own[0], own[1]);
    __syncwarp();
  }

  __device__ __forceinline__ void total(const Exchange& exchange, uint32_t count, TwoWords peeked) const {
    const float scale = 1.0f / float(args.scan.D);
    exchange.total(
        count, peeked,
        [=](float2 share, float, int width) {
          return make_float2(sum_lanes(share.x, width) * scale, sum_lanes(share.y, width) * scale);
        },
        [](int, float2) {});
    __syncwarp();
  }

  // The gradient of c, for the warps that walk.
  __device__ __forceinline__ void pass_on(const Exchange& exchange, uint32_t count, TwoWords peeked,
                                          const Statistics& of, const float (&w)[kEach],
                                          const float (&b)[kEach]) const {
    float2 means = make_float2(0.0f, 0.0f);  // of g and of g xhat
    if (lane < kRows) means = exchange.read(count, lane, peeked);
    __syncwarp();
    // ((x - mean) rstd means.y + means.x - g) (-rstd)
    const float slope = -of.rstd * of.rstd * means.y, offset = -means.x * of.rstd;
    const int slot = count % GRADS;
    if (count >= GRADS) {
#pragma unroll
      for (int k = 0; k < kWalkers; ++k) {
        mbarrier_wait_in_block(&shared.empty[slot][which * kWalkers + k], (count / GRADS - 1) % 2);
      }
    }
    int4 grads[kGroups], c[kGroups];
    read(count, of, w, b, grads, c);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float mean = __shfl_sync(0xffffffffu, of.mean, row_of(g));
      const float rstd = __shfl_sync(0xffffffffu, of.rstd, row_of(g));
      const float by_x = __shfl_sync(0xffffffffu, slope, row_of(g));
      const float whole = __shfl_sync(0xffffffffu, offset, row_of(g));
      float grad[kEach], x[kEach];
      Part::unpack(grads[g], grad);
      Part::unpack(c[g], x);
#pragma unroll
      for (int e = 0; e < kEach; ++e) grad[e] = fmaf(grad[e], w[e] * rstd, fmaf(x[e] - mean, by_x, whole));
      float* row = &shared.grad[slot][which * kRows + row_of(g)][at()];
#pragma unroll
      for (int e = 0; e < kEach; e += 4) {
        *reinterpret_cast<float4*>(row + e) = make_float4(grad[e], grad[e + 1], grad[e + 2], grad[e + 3]);
      }
    }
    warp_arrives(&shared.full[slot][which * kWalkers], kWalkers);
    __syncwarp();
  }

  __device__ __forceinline__ void normalise(const Exchange& exchange) const {
    float w[kEach], b[kEach];
    Part::load(args.weight, 1.0f, column + at(), args.scan.D, w);
    Part::load(args.bias, 0.0f, column + at(), args.scan.D, b);
    Sums sums;
    Statistics of[AHEAD + 1 + LAG];  // of windows, the last that was fetched first
    Windows windows(args, W * R, team);
    uint32_t fetched = 0;
    const auto fetch_next = [&] {
      const Statistics found = fetch(windows, fetched);
      if (windows.there()) ++fetched, windows.next();
      return found;
    };
#pragma unroll
    for (int k = AHEAD; k > 0; --k) of[k - 1] = fetch_next();
    for (uint32_t count = 0; count == 0 || count < fetched + LAG; ++count) {
#pragma unroll
      for (int k = AHEAD + LAG; k > 0; --k) of[k] = of[k - 1];
      of[0] = fetch_next();
      copy_async_wait<AHEAD>();
      const TwoWords shares = exchange.peek_shares(count - TOTAL_LAG);
      const TwoWords totals = exchange.peek_totals(count - LAG, lane);
      if (count < fetched) publish(exchange, count, of[AHEAD], w, b, sums);
      if (count >= TOTAL_LAG && count - TOTAL_LAG < fetched) total(exchange, count - TOTAL_LAG, shares);
      if (count >= LAG && count - LAG < fetched) pass_on(exchange, count - LAG, totals, of[AHEAD + LAG], w, b);
    }
    copy_async_wait<0>();
    // Rows of the warp's lanes, in order; warps are added up by `sum_parameters`.
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
#pragma unroll
      for (int offset = kLanes; offset < 32; offset *= 2) {
        sums.weight[e] += __shfl_xor_sync(0xffffffffu, sums.weight[e], offset);
        sums.bias[e] += __shfl_xor_sync(0xffffffffu, sums.bias[e], offset);
      }
      if (lane < kLanes) {
        shared.sums[0][which][at() + e] = sums.weight[e];
        shared.sums[1][which][at() + e] = sums.bias[e];
      }
    }
  }

  // ---- both ---------------------------------------------------------------------------------------------------------

  // Gradients of weight and bias: warps of a block, then blocks, in order.
  __device__ __forceinline__ void sum_parameters() const {
    const int64_t D = args.scan.D, at = column + threadIdx.x % kColumns;
    const int of = threadIdx.x / kColumns;
    const bool sums = of < 2 && at < D;
    __syncthreads();
    if (sums) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < NORM_WARPS; ++w) sum += shared.sums[of][w][threadIdx.x % kColumns];
      args.shares[(of * args.teams + team) * D + at] = sum;
    }
    cooperative_groups::this_grid().sync();
    if (sums && team == 0) {
      float sum = 0.0f;
#pragma unroll 8
      for (int64_t k = 0; k < args.teams; ++k) sum += __ldcg(&args.shares[(of * args.teams + k) * D + at]);
      (of == 0 ? args.grad_weight : args.grad_bias)[at] = sum;
    }
  }

  __device__ __forceinline__ void run() const {
    if (threadIdx.x == 0) {
      shared.walk.begin();
      for (int slot = 0; slot < GRADS; ++slot) {
        for (int w = 0; w < W; ++w) {
          mbarrier_init(&shared.full[slot][w], kArrivalsOfWarp);
          mbarrier_init(&shared.empty[slot][w], kArrivalsOfWarp);
        }
      }
      for (uint64_t& barrier : shared.passed) mbarrier_init(&barrier, W * kArrivalsOfWarp);
    }
    if (warp < W) {
      Gates gates(args, shared.walk, team, column);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) gates.fetch();
      cooperative_groups::this_grid().sync();  // barriers and the exchange's memory are ready everywhere
      walk<false, Kept, R, W>(
          args, shared.walk, team, column,
          [&](uint32_t count, const Steps& steps, Kept& kept) { return reduce(gates, count, steps, kept); },
          [&](uint32_t count, const Steps& steps, const Kept& kept, float (&state)[2]) {
            apply(count, steps, kept, state);
          });
      copy_async_wait<0>();
    } else {
      exchange().clear();
      cooperative_groups::this_grid().sync();
      normalise(exchange());
    }
    sum_parameters();
  }
};

template <class T, int R, int W, int STAGES, int NORM_WARPS, int AHEAD, int TOTAL_LAG, int LAG, int KEEP, int GRADS>
__global__ void __launch_bounds__(32 * (W + NORM_WARPS), 1)
    scan_norm_backward_kernel(const __grid_constant__ ScanNormArgs args) {
#ifdef NEWLLM_CLUSTERS
  using Kernel = ScanNormBackward<T, R, W, STAGES, NORM_WARPS, AHEAD, TOTAL_LAG, LAG, KEEP, GRADS>;
  extern __shared__ __align__(16) unsigned char memory[];
  Kernel(args, *reinterpret_cast<typename Kernel::Shared*>(memory)).run();
#else
  __trap();  // never launched on this architecture
#endif
}

}  // namespace newllm::cuda
