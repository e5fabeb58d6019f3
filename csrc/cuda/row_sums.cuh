// Sums of N values (2 or 4) over the threads of a row in one exchange: the first shuffles halve the number of values a lane
// goes on with, so that N values cost hardly more than one; the warps' shares meet in shared memory, behind one barrier.
#pragma once

#include "cell.cuh"
#include "row_parts.cuh"

namespace newllm::cuda {

template <class L, int N, int SKIP>
struct RowSums {
  static constexpr int kShares = 1 << SKIP;  // of a warp: SKIP levels of shuffles are left to whoever adds the warps up

  struct Values {
    float x[N];
  };
  // Calls one after the other take different buffers.
  struct alignas(16) Shared {
    float shares[3][L::W * kShares][N];
  };
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
  static __device__ __forceinline__ Values finish(const Level& level, Shared& shared, int buffer, int barrier,
                                                  const Between& between) {
    const int lane = threadIdx.x % 32, warp = int(threadIdx.x) / 32 % L::W;
    float x = level.kept[0] + level.came[0];
    int level_number = 0;
    if constexpr (N == 4) {
      const float y = level.kept[1] + level.came[1];
      const bool second = threadIdx.x & 2;
      const float came = __shfl_xor_sync(0xffffffffu, second ? x : y, 2);
      between(level_number++);
      x = (second ? y : x) + came;
    }
    constexpr int kSpan = L::W > 1 ? 32 >> SKIP : L::kThreads;
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
      if (lane % kSpan < N) shared.shares[buffer][warp * kShares + lane / kSpan][lane % kSpan] = x;
      asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(L::kThreads) : "memory");
      add_up(shared, buffer, sums);
    }
    return sums;
  }

  static __device__ __forceinline__ Values sum(const Values& v, Shared& shared, int buffer, int barrier = 1) {
    return finish(first(v), shared, buffer, barrier, [](int) {});
  }

 private:
  static __device__ __forceinline__ void add_up(const Shared& shared, int buffer, Values& sums) {
    constexpr int kAll = L::W * kShares;
    using Row = std::conditional_t<N == 4, float4, float2>;
    const Row* all = reinterpret_cast<const Row*>(shared.shares[buffer]);
    if constexpr (kAll > 8) {  // each lane one of them: to hold all would take too many registers
      static_assert(kAll <= 32);
      const Row mine = all[threadIdx.x % kAll];
#pragma unroll
      for (int n = 0; n < N; ++n) sums.x[n] = reinterpret_cast<const float*>(&mine)[n];
#pragma unroll
      for (int offset = 1; offset < kAll; offset *= 2) {
#pragma unroll
        for (int n = 0; n < N; ++n) sums.x[n] += __shfl_xor_sync(0xffffffffu, sums.x[n], offset);
      }
    } else {
      float part[N][kAll];
#pragma unroll
      for (int k = 0; k < kAll * N / 4; ++k) {
        const float4 four = reinterpret_cast<const float4*>(all)[k];
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
                                           typename Sums::Shared& shared) {
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
  v = Sums::sum(v, shared, 2);
  return v.x[0] == 0.0f ? 0.0f : v.x[0] / v.x[1];
}

}  // namespace newllm::cuda
