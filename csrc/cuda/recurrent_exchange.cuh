// The blocks that compute one group of rows together, a team, and how they tell each other what they have computed: through
// distributed shared memory and the barrier of a cluster, or, for teams larger than a cluster, through global memory (which
// stays in L2) and flags. All blocks of a team must run at the same time: CUDA starts clusters whole, and the larger teams
// are launched cooperatively.
#pragma once

#include "cluster.cuh"
#include "numeric.cuh"

namespace newllm::cuda {

constexpr int kRows = 16;  // of a team, the M of one mma tile
constexpr int kTeamThreads = 256, kTeamWarps = kTeamThreads / 32;

// Shared rows of K elements: 16 bytes more than that apart, so that the eight rows of an ldmatrix meet eight banks.
__host__ __device__ constexpr int row_stride(int K) { return K + 8; }

// What the blocks of a large team share in global memory; unused in clusters.
struct TeamMemory {
  uint4* data;      // one exchanged row buffer after another
  float2* sums;     // (kRows, blocks)
  uint32_t* flags;  // (blocks), zero at launch
};

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ void store_remote(uint32_t address, uint32_t rank, uint4 value) {
#ifdef NEWLLM_CLUSTERS
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#endif
}

__device__ __forceinline__ void store_remote(uint32_t address, uint32_t rank, float2 value) {
#ifdef NEWLLM_CLUSTERS
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(value.x), "f"(value.y) : "memory");
#endif
}

// The 16-byte pieces of a block's own columns that a lane sends, the same at every step: `width` columns from `first` in each
// of `segments` that lie `segment` apart.
template <int kChunks>
struct Chunks {
  int row[kChunks], column[kChunks];  // row -1: none
  __device__ Chunks(int first, int width, int segments, int segment) {
    const int of_row = width / 8;
#pragma unroll
    for (int index = 0; index < kChunks; ++index) {
      const int chunk = threadIdx.x % 32 + index * 32, part = chunk / of_row;
      row[index] = part < kRows * segments ? part % kRows : -1;
      column[index] = part / kRows * segment + first + chunk % of_row * 8;
    }
  }
};

template <bool kCluster>
struct Team {
  int blocks, rank;
  TeamMemory memory;
  uint32_t epoch = 0;

  // All of the team see what the others have put before.
  __device__ void meet() {
    if constexpr (kCluster) {
      cluster_sync();
    } else {
      __syncthreads();
      ++epoch;
      if (threadIdx.x == 0) store_release(memory.flags + rank, epoch);
      if (threadIdx.x < 32) {
        for (int block = threadIdx.x; block < blocks; block += 32) {
          while (load_acquire(memory.flags + block) < epoch) {
          }
        }
      }
      __syncthreads();
    }
  }

  // The block's own columns of `rows` (kRows x K in shared memory) go to everybody's `rows`. `offset`: where in memory.data.
  template <class T, int kChunks>
  __device__ void put_rows(T* rows, int K, const Chunks<kChunks>& chunks, int64_t offset) {
    if constexpr (kCluster) {
      const int warp = threadIdx.x / 32;
#pragma unroll
      for (int index = 0; index < kChunks; ++index) {
        if (chunks.row[index] < 0) continue;
        const T* source = rows + chunks.row[index] * row_stride(K) + chunks.column[index];
        const uint4 value = *reinterpret_cast<const uint4*>(source);
        const uint32_t address = shared_address(source);
#pragma unroll 2
        for (int to = warp; to < blocks; to += kTeamWarps) {
          if (to != rank) store_remote(address, to, value);
        }
      }
    } else if (threadIdx.x < 32) {
#pragma unroll
      for (int index = 0; index < kChunks; ++index) {
        if (chunks.row[index] < 0) continue;
        const T* source = rows + chunks.row[index] * row_stride(K) + chunks.column[index];
        memory.data[offset + (chunks.row[index] * K + chunks.column[index]) / 8] =
            *reinterpret_cast<const uint4*>(source);
      }
    }
  }

  // After meet(): everybody's columns.
  template <class T>
  __device__ void get_rows(T* rows, int K, int64_t offset) {
    if constexpr (!kCluster) {
      const uint4* source = memory.data + offset;
      for (int row = threadIdx.x / 32; row < kRows; row += kTeamWarps) {
#pragma unroll 6
        for (int chunk = threadIdx.x % 32; chunk < K / 8; chunk += 32) {
          reinterpret_cast<uint4*>(rows + row * row_stride(K))[chunk] = __ldcg(source + row * (K / 8) + chunk);
        }
      }
      __syncthreads();
    }
  }

  // Where in shared memory this block has its pair of sums for a row: beside those of all others in a cluster, else alone.
  static __host__ __device__ int64_t kept_sums(int blocks) { return kRows * (kCluster ? blocks : 1); }
  __device__ float2& own_sum(float2* sums, int row) const { return sums[kCluster ? row * blocks + rank : row]; }

  // These go to all.
  __device__ void put_sums(float2* sums) {
    if constexpr (kCluster) {
      const float2* source = sums + threadIdx.x % kRows * blocks + rank;
      for (int to = threadIdx.x / kRows; to < blocks; to += kTeamThreads / kRows) {
        if (to != rank) store_remote(shared_address(source), to, *source);
      }
    } else if (threadIdx.x < kRows) {
      memory.sums[threadIdx.x * blocks + rank] = sums[threadIdx.x];
    }
  }

  // After meet(): the pair of `block` for `row`.
  __device__ float2 sum_of(const float2* sums, int row, int block) const {
    return kCluster ? sums[row * blocks + block] : __ldcg(memory.sums + row * blocks + block);
  }
};

}  // namespace newllm::cuda
