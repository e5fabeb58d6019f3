// Sums of N values (2 or 4) over the threads of a row in one exchange: the first shuffles halve the number of values a
// lane goes on with, so that N values cost hardly more than one; the warps' shares meet in shared memory, behind one
// barrier.
#pragma once

#include "cell.cuh"
#include "row_parts.cuh"
#include "slots.cuh"

namespace newllm::cuda {

template <class L, int N>
struct RowSums {
  struct Values {
    float x[N];
  };
  // Calls one after the other take different buffers.
  struct alignas(16) Shared {
    float shares[3][L::W][N];
  };
  // A thread's view of it.
  struct Exchange {
    uint32_t address, mine;  // where a buffer begins, and where in it this lane's value goes
    int barrier;

    explicit __device__ __forceinline__ Exchange(const Shared& shared, int barrier = 1)
        : address(shared_word_once(shared.shares)), barrier(barrier) {
      const int lane = threadIdx.x % 32, warp = int(threadIdx.x) / 32 % L::W;
      mine = address + 4 * (warp * N + lane);
    }
  };
  static constexpr int kSpan = L::kThreads < 32 ? L::kThreads : 32;  // lanes that shuffles add up
  static constexpr int kBufferBytes = 4 * L::W * N;

  struct Level {
    float kept[N / 2], came[N / 2];
  };

  // The first shuffle: even lanes go on with the values of even number, odd ones with the others.
  static __device__ __forceinline__ Level first(const Values& v) {
    const bool odd = threadIdx.x & 1;
    Level level;
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      level.kept[n] = odd ? v.x[2 * n + 1] : v.x[2 * n];
      level.came[n] = __shfl_xor_sync(0xffffffffu, odd ? v.x[2 * n] : v.x[2 * n + 1], 1);
    }
    return level;
  }

  // The others. Every thread of the row must call, and gets all sums. between(k) runs while shuffle k is on its way.
  template <class Between>
  static __device__ __forceinline__ Values finish(const Level& level, const Exchange& exchange, int buffer,
                                                  const Between& between) {
    float x = level.kept[0] + level.came[0];
    int level_number = 0;
    if constexpr (N == 4) {
      const float y = level.kept[1] + level.came[1];
      const bool second = threadIdx.x & 2;
      const float came = __shfl_xor_sync(0xffffffffu, second ? x : y, 2);
      between(level_number++);
      x = (second ? y : x) + came;
    }
#pragma unroll
    for (int offset = N; offset < kSpan; offset *= 2) {
      const float came = __shfl_xor_sync(0xffffffffu, x, offset);
      between(level_number++);
      x += came;
    }
    Values sums;
    if constexpr (L::W == 1) {
#pragma unroll
      for (int n = 0; n < N; ++n) sums.x[n] = __shfl_sync(0xffffffffu, x, n, L::kThreads);
    } else {
      if (threadIdx.x % 32 < N) store_shared(exchange.mine + buffer * kBufferBytes, x);
      asm volatile("bar.sync %0, %1;" ::"r"(exchange.barrier), "n"(L::kThreads) : "memory");
      add_up(exchange.address + buffer * kBufferBytes, sums);
    }
    return sums;
  }

  static __device__ __forceinline__ Values sum(const Values& v, const Exchange& exchange, int buffer) {
    return finish(first(v), exchange, buffer, [](int) {});
  }

 private:
  static __device__ __forceinline__ void add_up(uint32_t shares, Values& sums) {
    constexpr int kAll = L::W;
    if constexpr (kAll > 8) {  // each lane one of them: to hold all would take too many registers
      static_assert(kAll <= 32 && N == 2);
      const float4 two = load_shared(shares + 16 * (threadIdx.x % kAll / 2));
      const bool odd = threadIdx.x & 1;
      sums.x[0] = odd ? two.z : two.x, sums.x[1] = odd ? two.w : two.y;
#pragma unroll
      for (int offset = 1; offset < kAll; offset *= 2) {
#pragma unroll
        for (int n = 0; n < N; ++n) sums.x[n] += __shfl_xor_sync(0xffffffffu, sums.x[n], offset);
      }
    } else {
      float part[N][kAll];
#pragma unroll
      for (int k = 0; k < kAll * N / 4; ++k) {
        const float4 four = load_shared(shares + 16 * k);
        part[0][k * 4 / N] = four.x;
        part[1][k * 4 / N] = four.y;
        if constexpr (N == 4) {
          part[2][k] = four.z, part[3][k] = four.w;
        } else {
          part[0][k * 2 + 1] = four.z, part[1][k * 2 + 1] = four.w;
        }
      }
#pragma unroll
      for (int n = 0; n < N; ++n) sums.x[n] = tree_sum(part[n]);
    }
  }
};

// The squared part of itself by which a state has moved, for the threads of the row.
template <class L, class Sums>
__device__ __forceinline__ float change_of(const float (&state)[L::kColumns], const float* old, int D, int thread,
                                           const typename Sums::Exchange& exchange) {
  typename Sums::Values v = {};
#pragma unroll
  for (int k = 0; k < L::kColumns; ++k) {
    const int at = L::column_of(thread, k);
    if (at >= D) continue;
    const float moved = state[k] - old[at];
    v.x[0] = fmaf(moved, moved, v.x[0]);
    v.x[1] = fmaf(state[k], state[k], v.x[1]);
  }
  if constexpr (L::W > 1) asm volatile("bar.sync 1, %0;" ::"n"(L::kThreads) : "memory");  // the buffer may be in use
  v = Sums::sum(v, exchange, 2);
  return v.x[0] == 0.0f ? 0.0f : v.x[0] / v.x[1];
}

}  // namespace newllm::cuda
