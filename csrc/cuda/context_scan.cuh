// The cell over a sequence, LayerNorm and clamp in the loop. A block walks the steps of one row of the batch, or of a
// chunk of its time.
//
// Forward, half of the warps (helpers) load the gates some steps ahead and leave sigmoid(f) and sigmoid(i) tanh(d) in a
// ring of slots; the other half (walkers) only do what waits for the step before:
//
//     u = forget c + write; sums of u and u^2 over the row: a warp's by shuffles, both in one; the warps' through
//     shared memory and one barrier; c = clamp((u - mean) rstd weight + bias)
//
// A step is as long as this chain, some 350 cycles. What of it can wait (storing contexts, taking the next slot) is
// done while the first shuffle is on its way.
#pragma once

#include "cell.cuh"
#include "context_passes.cuh"
#include "row_sums.cuh"
#include "slots.cuh"

namespace newllm::cuda {

struct ContextScanRun {
  ContextArgs args;
  Chunks chunks;
  // In 16 bits: the clamp in storage, twice, and the next smaller value, the most that contexts have which were not
  // cut.
  uint32_t edge = 0;
  float below = 0;
};

// HELPERS: groups of helpers. SLOTS of the ring; steps whose loads are AHEAD of a helper; BLOCKS of a multiprocessor
// that registers are kept few enough for.
template <class L, int HELPERS, int SLOTS, int AHEAD, int BLOCKS>
struct ContextScanForward {
  using T = typename L::Storage;
  using Raw = typename L::Raw;
  using Sums = RowSums<L, 2>;
  static constexpr int kColumns = L::kColumns, kThreads = L::kThreads, kWarps = L::W, kBlocks = BLOCKS;
  static constexpr int kBlockThreads = (1 + HELPERS) * kThreads;

  struct Shared {
    float4 gates[SLOTS][kColumns / 2][kThreads];  // forget of four columns and more, then write
    typename L::Piece raw[HELPERS][L::ALIGNED ? AHEAD : 1][3][L::PIECES][kThreads];
    typename Sums::Shared sums;
    SlotBarriers<SLOTS> barriers;
    int flag;
  };

  // What is the same for all steps of a block.
  struct Row {
    const T *f, *i, *d;
    T* c;
    int64_t f_step, i_step, d_step, c_step;
    int D, thread;  // among the helpers, or the walkers
  };

  // Fills slots with the steps begin .. end - 1, group `group` of the helpers every HELPERS-th; `count` slots were
  // filled before.
  static __device__ __forceinline__ void help(Shared& shared, const Slots<SLOTS>& slots, const Row& row, int group,
                                              int64_t begin, int64_t end, uint32_t& count) {
    const int steps = int(end - begin);
    if (steps <= 0) return;
    begin += group;
    const T *next_f = row.f + begin * row.f_step, *next_i = row.i + begin * row.i_step,
            *next_d = row.d + begin * row.d_step;
    int left = end > begin ? int((end - begin + HELPERS - 1) / HELPERS) : 0, to_fetch = left;
    const auto on = [&] {
      next_f += HELPERS * row.f_step, next_i += HELPERS * row.i_step, next_d += HELPERS * row.d_step;
    };
    const auto fetch = [&](int at) {
      if (to_fetch > 0) {
        L::copy(shared.raw[group][at][0][0], next_f, row.D, row.thread);
        L::copy(shared.raw[group][at][1][0], next_i, row.D, row.thread);
        L::copy(shared.raw[group][at][2][0], next_d, row.D, row.thread);
        on();
      }
      --to_fetch;
      copy_async_commit();
    };
    Raw f, i, d;
    const auto load = [&] {
      if (to_fetch > 0) {
        L::load(next_f, row.D, row.thread, f);
        L::load(next_i, row.D, row.thread, i);
        L::load(next_d, row.D, row.thread, d);
        on();
      }
      --to_fetch;
    };
    if constexpr (L::ALIGNED) {
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) fetch(k);
    } else {
      load();
    }
    int at = 0;
    Turn<SLOTS> turn(count + group);
    for (; left > 0; --left, turn.advance(HELPERS)) {
      if constexpr (L::ALIGNED) {
        copy_async_wait<AHEAD - 1>();
        L::take(shared.raw[group][at][0][0], row.thread, f);
        L::take(shared.raw[group][at][1][0], row.thread, i);
        L::take(shared.raw[group][at][2][0], row.thread, d);
        fetch(at);
        at = at + 1 == AHEAD ? 0 : at + 1;
      }
      float forget[kColumns], write[kColumns], of_f[kColumns], of_i[kColumns], of_d[kColumns];
      L::unpack(f, of_f), L::unpack(i, of_i), L::unpack(d, of_d);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) gate_values<T>(of_f[k], of_i[k], of_d[k], forget[k], write[k]);
      if constexpr (!L::ALIGNED) load();
      slots.wait_emptied(turn);
      float4(*gates)[kThreads] = shared.gates[turn.slot];
#pragma unroll
      for (int k = 0; k < kColumns; k += 4) {
        gates[k / 4][row.thread] = make_float4(forget[k], forget[k + 1], forget[k + 2], forget[k + 3]);
        gates[(kColumns + k) / 4][row.thread] = make_float4(write[k], write[k + 1], write[k + 2], write[k + 3]);
      }
      slots.tell_filled(turn);
    }
    if (steps % HELPERS == group) {  // and a last one, with nothing in it, which saves the walkers a question a step
      slots.wait_emptied(turn);
      slots.tell_filled(turn);
    }
    count += uint32_t(steps) + 1;
    if constexpr (L::ALIGNED) copy_async_wait<0>();
  }

  struct Walker {
    float weight[kColumns], bias[kColumns], c[kColumns];
    float eps, scale, clamp, below;
    uint32_t edge;   // the clamp in storage, twice
    uint32_t gates;  // where this thread's begin
    Slots<SLOTS> slots;
    typename Sums::Exchange exchange;

    explicit __device__ __forceinline__ Walker(const Shared& shared)
        : gates(shared_word_once(&shared.gates[0][0][threadIdx.x % kThreads])),
          slots(shared.barriers),
          exchange(shared.sums) {}
  };

  static __device__ __forceinline__ void take(const Walker& w, Turn<SLOTS> turn, float (&forget)[kColumns],
                                              float (&write)[kColumns]) {
    constexpr int kPlane = kThreads * sizeof(float4), kSlot = kColumns / 2 * kPlane;
    w.slots.wait_filled(turn);
    const uint32_t slot = w.gates + turn.slot * kSlot;
#pragma unroll
    for (int k = 0; k < kColumns; k += 4) {
      const float4 a = load_shared(slot + k / 4 * kPlane), b = load_shared(slot + (kColumns + k) / 4 * kPlane);
      forget[k] = a.x, forget[k + 1] = a.y, forget[k + 2] = a.z, forget[k + 3] = a.w;
      write[k] = b.x, write[k + 1] = b.y, write[k + 2] = b.z, write[k + 3] = b.w;
    }
  }

  // In 16 bits what was cut from y has the clamp's magnitude, all else a smaller one (context_scan/reference.py). `raw`
  // holds the clamped contexts, some of which rounding may have lifted there.
  static __device__ __forceinline__ void mark(const Walker& w, const float (&y)[kColumns], Raw& raw) {
    float kept[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const bool cut = y[k] > w.clamp || y[k] < -w.clamp;
      kept[k] = clamped(y[k], cut ? w.clamp : w.below);
    }
    L::pack(kept, raw);
  }

  // Walks the steps begin .. end - 1 from the state w.c, and leaves the last one there. The contexts of a step are
  // stored during the next.
  static __device__ __forceinline__ void walk(const Row& row, Walker& w, int64_t begin, int64_t end, bool store,
                                              uint32_t& count) {
    const int steps = int(end - begin);
    if (steps <= 0) return;
    float forget[kColumns], write[kColumns], y[kColumns] = {};
    Raw raw;
    T* before = row.c + (begin - 1) * row.c_step;  // where w.c belongs
    Turn<SLOTS> turn(count);
    take(w, turn, forget, write);
    int buffer = 0;
    for (int step = 0; step < steps; ++step, buffer ^= 1, before += row.c_step) {
      const int stored = store && step > 0 ? row.D : 0;
      float u[kColumns], squares[kColumns];
#pragma unroll
      for (int k = 0; k < kColumns; ++k) u[k] = fmaf(forget[k], w.c[k], write[k]);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) squares[k] = u[k] * u[k];
      const auto level = Sums::first({tree_sum(u), tree_sum(squares)});
      w.slots.tell_emptied(turn);
      turn.advance(1);
      L::pack(w.c, raw);
      const bool lifted = L::any_reaches(raw, w.edge);
      const auto total = Sums::finish(level, w.exchange, buffer, [&](int k) {
        if (k == 0) {
          if (lifted) mark(w, y, raw);
          L::store(before, stored, row.thread, raw);
        } else if (k == 1) {
          take(w, turn, forget, write);
        }
      });
      const float mean = total.x[0] * w.scale, variance = fmaf(-mean, mean, total.x[1] * w.scale);
      const auto normalise = [&](float rstd) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          y[k] = fmaf(u[k] - mean, rstd * w.weight[k], w.bias[k]);
          w.c[k] = clamped(y[k], w.clamp);
        }
      };
      // The question comes last, when its answer has long been there; the compiler would ask first, and wait.
      normalise(rsqrt_fast(variance + w.eps));
#pragma unroll
      for (int k = 0; k < kColumns; ++k) asm volatile("" : "+f"(w.c[k]), "+f"(y[k]));
      if (variance < mean * mean) [[unlikely]]
        normalise(rsqrt_fast(centred(row, w, u, mean) + w.eps));
    }
    w.slots.tell_emptied(turn);  // the last, which was empty
    count += uint32_t(steps) + 1;
    L::pack(w.c, raw);
    if (L::any_reaches(raw, w.edge)) mark(w, y, raw);
    L::store(before, store ? row.D : 0, row.thread, raw);
  }

  // Where the mean would eat the digits of the variance: from centred squares.
  static __device__ __forceinline__ float centred(const Row& row, const Walker& w, const float (&u)[kColumns],
                                                  float mean) {
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const float from_mean = L::column_of(row.thread, k) < row.D ? u[k] - mean : 0.0f;
      squares = fmaf(from_mean, from_mean, squares);
    }
    return Sums::sum({squares, 0.0f}, w.exchange, 2).x[0] * w.scale;
  }

  struct Cell {
    const ContextScanRun& run_;
    Shared& shared;
    Row row_;
    Walker walker;
    bool walks;
    uint32_t count = 0;
    int64_t b = 0;

    __device__ __forceinline__ Cell(const ContextScanRun& run, Shared& shared)
        : run_(run), shared(shared), walker(shared) {
      walks = warp_of_block() < L::W;
      row_.D = int(run.args.D);
      row_.thread = threadIdx.x % kThreads;
      if (!walks) return;
      const NormParams& norm = run.args.norm;
      L::parameter(norm.weight, norm.weight_dtype, 1.0f, row_.D, row_.thread, walker.weight);
      L::parameter(norm.bias, norm.bias_dtype, 0.0f, row_.D, row_.thread, walker.bias);
      walker.eps = float(norm.eps);
      walker.scale = 1.0f / float(row_.D);
      walker.clamp = float(norm.clamp_value);
      walker.below = run.below;
      walker.edge = run.edge;
    }

    __device__ __forceinline__ void row(int64_t b_) {
      b = b_;
      const auto at = [&](const View3& view) { return static_cast<T*>(view.data) + b * view.stride_b; };
      row_.f = at(run_.args.f), row_.f_step = run_.args.f.stride_t;
      row_.i = at(run_.args.i), row_.i_step = run_.args.i.stride_t;
      row_.d = at(run_.args.d), row_.d_step = run_.args.d.stride_t;
      row_.c = at(run_.args.c), row_.c_step = run_.args.c.stride_t;
    }

    __device__ __forceinline__ void begin(const float* state, int) {
      if (state == nullptr) state = static_cast<const float*>(run_.args.c0.data) + b * run_.args.c0.stride_b;
      if (walks) L::load_state(state, row_.D, row_.thread, walker.c);
    }

    __device__ __forceinline__ void run(int chunk, bool final) {
      const int64_t first = chunk * run_.chunks.steps, last = first + run_.chunks.steps;
      const int64_t end = last < run_.args.T ? last : run_.args.T;
      if (walks) {
        walk(row_, walker, first, end, final, count);
      } else {
        help(shared, walker.slots, row_, warp_of_block() / L::W - 1, first, end, count);
      }
    }

    __device__ __forceinline__ float change(const float* old) {
      return walks ? change_of<L, Sums>(walker.c, old, row_.D, row_.thread, walker.exchange) : 0.0f;
    }

    __device__ __forceinline__ void keep(float* state) {
      if (walks) L::store_state(state, row_.D, row_.thread, walker.c);
    }

    __device__ __forceinline__ void end() { keep(static_cast<float*>(run_.args.c_last.data) + b * row_.D); }
  };
};

template <class Forward>
__global__ void __launch_bounds__(Forward::kBlockThreads, Forward::kBlocks)
    context_scan_kernel(const __grid_constant__ ContextScanRun run) {
  extern __shared__ __align__(16) unsigned char bytes[];
  typename Forward::Shared& shared = *reinterpret_cast<typename Forward::Shared*>(bytes);
  if (threadIdx.x == 0) shared.barriers.init(Forward::kWarps);
  __syncthreads();
  typename Forward::Cell cell(run, shared);
  walk_chunks(run.chunks, cell, shared.flag);
}

}  // namespace newllm::cuda
