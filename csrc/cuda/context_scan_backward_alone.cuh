// The backward of context_scan for blocks that have a multiprocessor to themselves, where a step is as long as the chain through
// it. As forward (context_scan.cuh), helpers do ahead of time what does not depend on the gradient of the step after: they load,
// compute activations and normalise, and leave in a slot, with 1 / standard deviation already in the last four,
//
//     xhat, grad_c, which contexts the clamp cut;  forget, c_{t-1} forget', delta input', input delta'
//
// Walkers go from slot to slot: g, its two sums, e = g - mean(g) - xhat mean(g xhat), the state e forget. The gradients of the
// gates, e times the last three, are stored a step later, while the first shuffle is on its way.
#pragma once

#include "context_scan_backward.cuh"

namespace newllm::cuda {

template <class L, int HELPERS, int SLOTS, int AHEAD>
struct ContextScanBackwardAlone {
  using T = typename L::Storage;
  using Raw = typename L::Raw;
  using Sums = RowSums<L, 2>;
  // Inputs are read, and contexts marked, as in the other kernel.
  using Together = ContextScanBackward<L, AHEAD, 1>;
  using Row = typename Together::Row;
  using Reader = typename Together::template Reader<HELPERS>;
  static constexpr int kColumns = L::kColumns, kThreads = L::kThreads, kWarps = L::W, kBlocks = 1;
  static constexpr int kBlockThreads = (1 + HELPERS) * kThreads, kInputs = Together::kInputs;
  static constexpr bool kMarked = Together::kMarked;
  enum Plane { kXhat, kForget, kOfF, kOfI, kOfD, kPlanes };

  struct Slot {
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
  };

  static __device__ __forceinline__ void put(Slot& slot, Plane plane, int thread, const float (&x)[kColumns]) {
#pragma unroll
    for (int k = 0; k < kColumns; k += 4) {
      slot.planes[plane][k / 4][thread] = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
    }
  }

  // What a slot takes of the step t, from its inputs; `norm` is the walkers' too.
  template <class Norm>
  static __device__ __forceinline__ void fill(const Row& row, const Norm& norm, const typename Sums::Exchange& exchange,
                                              int64_t t, int buffer, const Raw (&raw)[kInputs], Slot& slot,
                                              const Slots<SLOTS>& slots, Turn<SLOTS> turn) {
    float f[kColumns], i[kColumns], d[kColumns], before[kColumns], squares[kColumns];
    L::unpack(raw[0], f), L::unpack(raw[1], i), L::unpack(raw[2], d), L::unpack(raw[3], before);
    const uint32_t cut = kMarked ? Together::cut_of(before, norm.edge) : 0;
    if (t == 0) L::load_state(row.c0, row.D, row.thread, before);
    float x[kColumns], of_f[kColumns], of_i[kColumns], of_d[kColumns], forget[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const Activation keep = sigmoid_of(f[k]), input = sigmoid_of(i[k]), delta = tanh_of<T>(d[k]);
      forget[k] = keep.value;
      of_f[k] = before[k] * keep.slope;
      of_i[k] = delta.value * input.slope;
      of_d[k] = input.value * delta.slope;
      x[k] = fmaf(keep.value, before[k], input.value * delta.value);
      squares[k] = x[k] * x[k];
    }
    const auto total = Sums::sum({tree_sum(x), tree_sum(squares)}, exchange, buffer);
    const float mean = total.x[0] * norm.scale;
    float variance = fmaf(-mean, mean, total.x[1] * norm.scale);
    if (variance < mean * mean) [[unlikely]] {  // the mean would eat its digits: from centred squares
      float centred = 0.0f;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const float from_mean = L::column_of(row.thread, k) < row.D ? x[k] - mean : 0.0f;
        centred = fmaf(from_mean, from_mean, centred);
      }
      variance = Sums::sum({centred, 0.0f}, exchange, 2).x[0] * norm.scale;
    }
    const float rstd = rsqrt_fast(variance + norm.eps);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      x[k] = (x[k] - mean) * rstd;
      forget[k] *= rstd, of_f[k] *= rstd, of_i[k] *= rstd, of_d[k] *= rstd;
    }
    slots.wait_emptied(turn);
    put(slot, kXhat, row.thread, x);
    put(slot, kForget, row.thread, forget);
    put(slot, kOfF, row.thread, of_f);
    put(slot, kOfI, row.thread, of_i);
    put(slot, kOfD, row.thread, of_d);
#pragma unroll
    for (int p = 0; p < L::PIECES; ++p) slot.grad_c[p][row.thread] = raw[4].piece[p];
    if (kMarked) slot.cut[row.thread] = cut;
    slots.tell_filled(turn);
  }

  // Fills slots with the steps end - 1 .. first, group `group` of the helpers every HELPERS-th.
  template <class Norm>
  static __device__ __forceinline__ void help(Shared& shared, const Slots<SLOTS>& slots, const Row& row,
                                              const Norm& norm, const typename Sums::Exchange& exchange, int group,
                                              int64_t first, int64_t end, uint32_t& count) {
    const int steps = int(end - first);
    if (steps <= 0) return;
    int64_t t = end - 1 - group;
    int left = t >= first ? int((t - first) / HELPERS) + 1 : 0, at = 0, buffer = 0;
    Reader reads(row, t, left);
    Raw raw[kInputs];
    Turn<SLOTS> turn(count + group);
    const auto fetch = [&] {
      reads.next_step(row, [&](int k, const T* from, int D) {
        L::copy(shared.raw[group][at][k][0], from, D, row.thread);
      });
      copy_async_commit();
      at = at + 1 == AHEAD ? 0 : at + 1;
    };
    const auto load = [&] {
      reads.next_step(row, [&](int k, const T* from, int D) { L::load(from, D, row.thread, raw[k]); });
    };
    if constexpr (L::ALIGNED) {
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) fetch();
    } else {
      load();
    }
    for (; left > 0; --left, t -= HELPERS, turn.advance(HELPERS), buffer ^= 1) {
      if constexpr (L::ALIGNED) {
        copy_async_wait<AHEAD - 1>();
#pragma unroll
        for (int k = 0; k < kInputs; ++k) L::take(shared.raw[group][at][k][0], row.thread, raw[k]);
        fetch();
      }
      fill(row, norm, exchange, t, buffer, raw, shared.slots[turn.slot], slots, turn);
      if constexpr (!L::ALIGNED) load();
    }
    if (steps % HELPERS == group) {  // and a last one, with nothing in it, which saves the walkers a question a step
      slots.wait_emptied(turn);
      slots.tell_filled(turn);
    }
    count += uint32_t(steps) + 1;
    if constexpr (L::ALIGNED) copy_async_wait<0>();
  }

  struct Walker {
    float weight[kColumns], carry[kColumns], grad_weight[kColumns], grad_bias[kColumns];
    float bias[kMarked ? 1 : kColumns];
    float eps, scale, clamp, edge;
    uint32_t base;  // of the slots
    Slots<SLOTS> slots;
    typename Sums::Exchange exchange;

    explicit __device__ __forceinline__ Walker(const Shared& shared)
        : base(shared_word_once(shared.slots)),
          slots(shared.barriers),
          exchange(shared.sums[threadIdx.x / kThreads], 1 + threadIdx.x / kThreads) {}
  };

  static __device__ __forceinline__ void get(uint32_t slot, Plane plane, int thread, float (&x)[kColumns]) {
    constexpr int kPlane = kColumns / 4 * kThreads * sizeof(float4);
#pragma unroll
    for (int k = 0; k < kColumns; k += 4) {
      const float4 four = load_shared(slot + plane * kPlane + (k / 4 * kThreads + thread) * uint32_t(sizeof(float4)));
      x[k] = four.x, x[k + 1] = four.y, x[k + 2] = four.z, x[k + 3] = four.w;
    }
  }

  // What a step's sums need of its slot.
  struct Taken {
    float xhat[kColumns], forget[kColumns];
    Raw grad_c;
    uint32_t cut;
  };

  static __device__ __forceinline__ void take(const Shared& shared, const Walker& w, int thread, Turn<SLOTS> turn,
                                              Taken& taken) {
    w.slots.wait_filled(turn);
    const Slot& slot = shared.slots[turn.slot];
    get(w.base + turn.slot * uint32_t(sizeof(Slot)), kXhat, thread, taken.xhat);
    get(w.base + turn.slot * uint32_t(sizeof(Slot)), kForget, thread, taken.forget);
    L::take(slot.grad_c[0], thread, taken.grad_c);
    taken.cut = kMarked ? slot.cut[thread] : 0;
  }

  // Gradients of the gates, of the step that `turn` holds, from its e.
  static __device__ __forceinline__ void hand_out(const Row& row, const Walker& w, Turn<SLOTS> turn,
                                                  const float (&e)[kColumns], T* (&out)[3], bool stored) {
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      float of_gate[kColumns];
      Raw raw;
      get(w.base + turn.slot * uint32_t(sizeof(Slot)), Plane(kOfF + n), row.thread, of_gate);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) of_gate[k] *= e[k];
      L::pack(of_gate, raw);
      L::store(out[n], stored ? row.D : 0, row.thread, raw);
      out[n] -= row.out_step[n];
    }
    w.slots.tell_emptied(turn);
  }

  static __device__ __forceinline__ void walk(const Shared& shared, const Row& row, Walker& w, int64_t first,
                                              int64_t end, bool final, uint32_t& count) {
    const int steps = int(end - first);
    if (steps <= 0) return;
    uint32_t cut = kMarked ? Together::cut_after(row, w.edge, end) : 0;
    T* out[3];  // of the step before this one in the walk
#pragma unroll
    for (int n = 0; n < 3; ++n) out[n] = row.out[n] + end * row.out_step[n];
    Turn<SLOTS> turn(count), last = turn;
    Taken taken;
    take(shared, w, row.thread, turn, taken);
    float e[kColumns] = {};
    int buffer = 0;
    for (int step = 0; step < steps; ++step, buffer ^= 1) {
      float g[kColumns], xhat[kColumns], forget[kColumns];
#pragma unroll
      for (int k = 0; k < kColumns; ++k) xhat[k] = taken.xhat[k], forget[k] = taken.forget[k];
      typename Sums::Values v = Together::gradient(w, taken.grad_c, xhat, cut, g);
      cut = taken.cut;
      const auto level = Sums::first(v);
      if (step > 0) {
        hand_out(row, w, last, e, out, final);
      } else {
#pragma unroll
        for (int n = 0; n < 3; ++n) out[n] -= row.out_step[n];
      }
      last = turn;
      turn.advance(1);
      v = Sums::finish(level, w.exchange, buffer, [&](int k) {
        if (k == 1) take(shared, w, row.thread, turn, taken);
      });
      const float mean_g = v.x[0] * w.scale, mean_gx = v.x[1] * w.scale;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        e[k] = fmaf(-xhat[k], mean_gx, g[k] - mean_g);
        w.carry[k] = e[k] * forget[k];
      }
    }
    hand_out(row, w, last, e, out, final);
    w.slots.tell_emptied(turn);  // the last, which was empty
    count += uint32_t(steps) + 1;
  }
};

}  // namespace newllm::cuda
