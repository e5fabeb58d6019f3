// The backward of context_scan for blocks that have a multiprocessor to themselves, where a step is as long as the
// chain through it. As forward (context_scan.cuh), helpers do ahead of time what does not depend on the gradient of the
// step after: they load, compute activations and normalise, and leave in a slot
//
//     xhat, grad_c, which contexts the clamp cut;  forget, c_{t-1} forget', delta input', input delta', these times
//     rstd
//
// Walkers go from slot to slot: g, its two sums, e = g - mean(g) - xhat mean(g xhat), the state e forget. The gradients
// of the gates, e times the last three, are stored a step later, while the first shuffle is on its way.
#pragma once

#include "context_scan_backward_row.cuh"

namespace newllm::cuda {

template <class L, int HELPERS, int SLOTS, int AHEAD>
struct ContextScanBackwardAlone {
  using Layout = L;
  using T = typename L::Storage;
  using Raw = typename L::Raw;
  using Sums = RowSums<L, 2>;
  using Exchange = typename Sums::Exchange;
  using Row = BackwardRow<L>;
  using State = BackwardState<L>;
  using Step = BackwardStep<L>;
  static constexpr int kColumns = L::kColumns, kThreads = L::kThreads, kInputs = Row::kInputs;
  static constexpr int kBlockThreads = (1 + HELPERS) * kThreads, kBlocks = 1;
  enum Plane { kXhat, kForget, kOfF, kOfI, kOfD, kPlanes };

  struct alignas(16) Slot {
    float4 planes[kPlanes][kColumns / 4][kThreads];
    typename L::Piece grad_c[L::PIECES][kThreads];
    uint32_t cut[kThreads];  // of the contexts before the step
  };
  struct Shared {
    Slot slots[SLOTS];
    typename L::Piece raw[HELPERS][L::ALIGNED ? AHEAD : 1][kInputs][L::PIECES][kThreads];
    typename Sums::Shared sums[1 + HELPERS];
    SlotBarriers<SLOTS> barriers;
    int flag;

    __device__ __forceinline__ void init() {
      if (threadIdx.x == 0) barriers.init(L::W);
      __syncthreads();
    }
  };

  // What a step's sums need of its slot.
  struct Taken {
    float xhat[kColumns], forget[kColumns];
    Raw grad_c;
    uint32_t cut;
  };

  struct Walk {
    Shared& shared;
    Slots<SLOTS> slots;
    Exchange exchange;  // of the walkers, or of the group of helpers
    uint32_t base;      // of the slots
    int group;          // of helpers; -1: walkers
    uint32_t count = 0;

    explicit __device__ __forceinline__ Walk(Shared& shared)
        : shared(shared),
          slots(shared.barriers),
          exchange(shared.sums[warp_of_block() / L::W], 1 + warp_of_block() / L::W),
          base(shared_word_once(shared.slots)),
          group(warp_of_block() / L::W - 1) {}

    __device__ __forceinline__ bool walks() const { return group < 0; }

    __device__ __forceinline__ void operator()(const Row& row, State& state, int64_t first, int64_t end, bool final) {
      const int steps = int(end - first);
      if (steps <= 0) return;
      if (walks()) {
        walk(row, state, end, steps, final);
      } else {
        help(row, state, first, end - 1 - group, steps);
      }
      count += uint32_t(steps) + 1;
    }

    static __device__ __forceinline__ void put(Slot& slot, Plane plane, int thread, const float (&x)[kColumns]) {
#pragma unroll
      for (int k = 0; k < kColumns; k += 4) {
        slot.planes[plane][k / 4][thread] = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
      }
    }

    // What a slot takes of the step t, from its inputs.
    __device__ __forceinline__ void fill(const Row& row, const State& state, int64_t t, int buffer,
                                         const Raw (&raw)[kInputs], Turn<SLOTS> turn) {
      Step step;
      uint32_t cut;
      const float2 of_u = step.prepare(row, state.edge, t, raw, cut);
      const auto total = Sums::sum({of_u.x, of_u.y}, exchange, buffer);
      const float rstd = step.template normalise<Sums>(row, state.scale, state.eps, {total.x[0], total.x[1]}, exchange);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        step.forget[k] *= rstd, step.of_f[k] *= rstd, step.of_i[k] *= rstd, step.of_d[k] *= rstd;
      }
      slots.wait_emptied(turn);
      Slot& slot = shared.slots[turn.slot];
      put(slot, kXhat, row.thread, step.x);
      put(slot, kForget, row.thread, step.forget);
      put(slot, kOfF, row.thread, step.of_f);
      put(slot, kOfI, row.thread, step.of_i);
      put(slot, kOfD, row.thread, step.of_d);
#pragma unroll
      for (int p = 0; p < L::PIECES; ++p) slot.grad_c[p][row.thread] = step.grad_c.piece[p];
      slot.cut[row.thread] = cut;
      slots.tell_filled(turn);
    }

    // Fills slots with the steps t, t - HELPERS and so on, down to `first`; `steps` is how many all groups fill.
    __device__ __forceinline__ void help(const Row& row, const State& state, int64_t first, int64_t t, int steps) {
      int left = t >= first ? int((t - first) / HELPERS) + 1 : 0, at = 0, buffer = 0;
      BackwardReader<L, HELPERS> reads(row, t, left);
      Raw raw[kInputs];
      Turn<SLOTS> turn(count + group);
      const auto fetch = [&](int to) {
        reads.step(row,
                   [&](int k, const T* from, int D) { L::copy(shared.raw[group][to][k][0], from, D, row.thread); });
        copy_async_commit();
      };
      const auto load = [&] {
        reads.step(row, [&](int k, const T* from, int D) { L::load(from, D, row.thread, raw[k]); });
      };
      if constexpr (L::ALIGNED) {
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) fetch(k);
      }
      for (; left > 0; --left, t -= HELPERS, turn.advance(HELPERS), buffer ^= 1) {
        if constexpr (L::ALIGNED) {
          copy_async_wait<AHEAD - 1>();
#pragma unroll
          for (int k = 0; k < kInputs; ++k) L::take(shared.raw[group][at][k][0], row.thread, raw[k]);
          fetch(at);
          at = at + 1 == AHEAD ? 0 : at + 1;
        } else {
          load();
        }
        fill(row, state, t, buffer, raw, turn);
      }
      if (steps % HELPERS == group) {  // and a last one, with nothing in it, which saves the walkers a question a step
        slots.wait_emptied(turn);
        slots.tell_filled(turn);
      }
      if constexpr (L::ALIGNED) copy_async_wait<0>();
    }

    __device__ __forceinline__ void get(Turn<SLOTS> turn, Plane plane, int thread, float (&x)[kColumns]) const {
      constexpr uint32_t kPlane = kColumns / 4 * kThreads * sizeof(float4);
      const uint32_t from = base + turn.slot * uint32_t(sizeof(Slot)) + plane * kPlane + thread * sizeof(float4);
#pragma unroll
      for (int k = 0; k < kColumns; k += 4) {
        const float4 four = load_shared(from + k / 4 * kThreads * sizeof(float4));
        x[k] = four.x, x[k + 1] = four.y, x[k + 2] = four.z, x[k + 3] = four.w;
      }
    }

    __device__ __forceinline__ void take(int thread, Turn<SLOTS> turn, Taken& taken) const {
      slots.wait_filled(turn);
      get(turn, kXhat, thread, taken.xhat);
      get(turn, kForget, thread, taken.forget);
      L::take(shared.slots[turn.slot].grad_c[0], thread, taken.grad_c);
      taken.cut = shared.slots[turn.slot].cut[thread];
    }

    // Gradients of the gates of the step that `turn` holds, from its e.
    __device__ __forceinline__ void hand_out(const Row& row, Turn<SLOTS> turn, const float (&e)[kColumns], T* (&out)[3],
                                             bool final) const {
#pragma unroll
      for (int n = 0; n < 3; ++n) {
        float of_gate[kColumns];
        Raw raw;
        get(turn, Plane(kOfF + n), row.thread, of_gate);
#pragma unroll
        for (int k = 0; k < kColumns; ++k) of_gate[k] *= e[k];
        L::pack(of_gate, raw);
        L::store(out[n], final ? row.D : 0, row.thread, raw);
        out[n] -= row.out_step[n];
      }
      slots.tell_emptied(turn);
    }

    __device__ __forceinline__ void walk(const Row& row, State& state, int64_t end, int steps, bool final) {
      uint32_t cut = row.cut_at(end - 1, state.edge);
      T* out[3];
#pragma unroll
      for (int n = 0; n < 3; ++n) out[n] = row.out[n] + (end - 1) * row.out_step[n];
      Turn<SLOTS> turn(count), last(count);
      Taken taken;
      take(row.thread, turn, taken);
      float e[kColumns];
      for (int step = 0; step < steps; ++step) {
        float g[kColumns], xhat[kColumns], forget[kColumns];
#pragma unroll
        for (int k = 0; k < kColumns; ++k) xhat[k] = taken.xhat[k], forget[k] = taken.forget[k];
        const float2 of_g = state.gradient(taken.grad_c, xhat, cut, g);
        cut = taken.cut;
        const auto level = Sums::first({of_g.x, of_g.y});
        if (step > 0) hand_out(row, last, e, out, final);
        last = turn;
        turn.advance(1);
        const auto total = Sums::finish(level, exchange, step & 1, [&](int k) {
          if (k == 1) take(row.thread, turn, taken);
        });
        const float mean_g = total.x[0] * state.scale, mean_gx = total.x[1] * state.scale;
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          e[k] = fmaf(-xhat[k], mean_gx, g[k] - mean_g);
          state.carry[k] = e[k] * forget[k];
        }
      }
      hand_out(row, last, e, out, final);
      slots.tell_emptied(turn);  // the last, which was empty
    }
  };
};

}  // namespace newllm::cuda
