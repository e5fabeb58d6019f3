// The backward of context_scan for blocks that share a multiprocessor. Every thread does everything for its columns: a
// step's activations and sums of u are computed one step ahead, and four sums, two of this step's g and two of the next
// u, share one exchange.
#pragma once

#include "context_scan_backward_row.cuh"

namespace newllm::cuda {

template <class L, int AHEAD, int BLOCKS>
struct ContextScanBackward {
  using Layout = L;
  using T = typename L::Storage;
  using Raw = typename L::Raw;
  using Sums = RowSums<L, 4>;
  using Row = BackwardRow<L>;
  using State = BackwardState<L>;
  using Step = BackwardStep<L>;
  using Reader = BackwardReader<L>;
  static constexpr int kColumns = L::kColumns, kThreads = L::kThreads, kInputs = Row::kInputs;
  static constexpr int kBlocks = BLOCKS;

  struct Shared {
    typename L::Piece raw[L::ALIGNED ? AHEAD : 1][kInputs][L::PIECES][kThreads];
    typename Sums::Shared sums;
    int flag;
  };

  struct Walk {
    Shared& shared;
    typename Sums::Exchange exchange;

    explicit __device__ __forceinline__ Walk(Shared& shared) : shared(shared), exchange(shared.sums) {}

    __device__ __forceinline__ void fetch(const Row& row, Reader& reader, int at) {
      reader.step(row, [&](int k, const T* from, int D) { L::copy(shared.raw[at][k][0], from, D, row.thread); });
      copy_async_commit();
    }

    // The inputs of a step; in aligned rows another starts on its way.
    __device__ __forceinline__ void take(const Row& row, Reader& reader, int& at, Raw (&raw)[kInputs]) {
      if constexpr (L::ALIGNED) {
        copy_async_wait<AHEAD - 1>();
#pragma unroll
        for (int k = 0; k < kInputs; ++k) L::take(shared.raw[at][k][0], row.thread, raw[k]);
        fetch(row, reader, at);
        at = at + 1 == AHEAD ? 0 : at + 1;
      } else {
        reader.step(row, [&](int k, const T* from, int D) { L::load(from, D, row.thread, raw[k]); });
      }
    }

    // What du = e rstd gives: the state for the step before, and the step's gradients.
    static __device__ __forceinline__ void hand_back(const Row& row, State& state, T* (&out)[3], const Step& step,
                                                     float rstd, const float (&g)[kColumns], float mean_g,
                                                     float mean_gx, bool final) {
      float du[kColumns], of_gate[kColumns];
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        du[k] = fmaf(-step.x[k], mean_gx, g[k] - mean_g) * rstd;
        state.carry[k] = du[k] * step.forget[k];
      }
      if (!final) return;
      Raw raw;
#pragma unroll
      for (int n = 0; n < 3; ++n) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          of_gate[k] = du[k] * (n == 0 ? step.of_f[k] : n == 1 ? step.of_i[k] : step.of_d[k]);
        }
        L::pack(of_gate, raw);
        L::store(out[n], row.D, row.thread, raw);
        out[n] -= row.out_step[n];
      }
    }

    // The steps end - 1 .. first.
    __device__ __forceinline__ void operator()(const Row& row, State& state, int64_t first, int64_t end, bool final) {
      if (first >= end) return;
      uint32_t cut = row.cut_at(end - 1, state.edge), cut_next = 0;
      Reader reads(row, end - 1, int(end - first));
      int at = 0;
      if constexpr (L::ALIGNED) {
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) fetch(row, reads, k);
      }
      T* out[3];
#pragma unroll
      for (int n = 0; n < 3; ++n) out[n] = row.out[n] + (end - 1) * row.out_step[n];
      Raw raw[kInputs];
      Step steps[2];  // this one, and the one before it in time, which comes next: they take turns
      float rstd[2];
      take(row, reads, at, raw);
      float2 of_u = steps[0].prepare(row, state.edge, end - 1, raw, cut_next);
      auto v = Sums::sum({0.0f, 0.0f, of_u.x, of_u.y}, exchange, int(end & 1));
      const auto normalise = [&](int n) {
        rstd[n] = steps[n].template normalise<Sums>(row, state.scale, state.eps, {v.x[2], v.x[3]}, exchange);
      };
      normalise(0);
      const auto one = [&](int64_t t, int n) {
        Step &step = steps[n], &next = steps[1 - n];
        float g[kColumns];
        const float2 of_g = state.gradient(step.grad_c, step.x, cut, g);
        cut = cut_next;
        if (t > first) {
          take(row, reads, at, raw);
          of_u = next.prepare(row, state.edge, t - 1, raw, cut_next);
        }
        v = Sums::sum({of_g.x, of_g.y, of_u.x, of_u.y}, exchange, int(t & 1));
        hand_back(row, state, out, step, rstd[n], g, v.x[0] * state.scale, v.x[1] * state.scale, final);
        if (t > first) normalise(1 - n);
      };
      for (int64_t t = end - 1; t >= first; t -= 2) {
        one(t, 0);
        if (t > first) one(t - 1, 1);
      }
      if constexpr (L::ALIGNED) copy_async_wait<0>();
    }
  };
};

template <class Backward>
__global__ void __launch_bounds__(Backward::kThreads, Backward::kBlocks)
    context_scan_backward_kernel(const __grid_constant__ ContextScanBackwardRun run) {
  extern __shared__ __align__(16) unsigned char bytes[];
  typename Backward::Shared& shared = *reinterpret_cast<typename Backward::Shared*>(bytes);
  BackwardCell<typename Backward::Layout, typename Backward::Sums, typename Backward::Walk> cell(run, shared);
  walk_chunks(run.chunks, cell, shared.flag);
}

}  // namespace newllm::cuda
