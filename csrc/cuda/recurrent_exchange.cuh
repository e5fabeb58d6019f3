// The blocks that compute one group of rows together, a team, and how they tell each other what they have computed:
// through distributed shared memory, each message announced at a barrier of its receiver, or, for teams larger than a
// cluster, through global memory (which stays in L2) and flags. All blocks of a team must run at the same time: CUDA
// starts clusters whole, and the larger teams are launched cooperatively.
#pragma once

#include "cluster.cuh"
#include "copy_async.cuh"
#include "numeric.cuh"

namespace newllm::cuda {

constexpr int kRows = 16;  // of a team, the M of one mma tile
constexpr int kTeamThreads = 256, kTeamWarps = kTeamThreads / 32;

// Rows of 16-bit numbers that all blocks know: eight columns of all 16 rows, 256 bytes, lie side by side, one such
// chunk after another, in the order of the blocks that computed them. An 8x8 matrix of tensor cores is then 128 bytes
// in one piece, and what a block sends is one piece too.
constexpr int kChunk = 8 * kRows;  // elements
__host__ __device__ constexpr int place_of(int row, int column) { return column / 8 * kChunk + row * 8 + column % 8; }

// What the blocks of a large team share in global memory; unused in clusters.
struct TeamMemory {
  uint4* data;
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

// One kind of message: every block's record of `pieces` of 16 bytes, in shared memory in the order of the blocks. A
// block writes its own there and puts it.
struct Channel {
  uint4* records;
  int pieces;
  int64_t offset;  // in the team's global memory
};

template <bool kCluster>
struct Team {
  int blocks, rank;
  TeamMemory memory;
  uint64_t* barriers;  // one for every meeting of a step
  uint32_t epoch = 0;

  // After a barrier of the block: its record goes to everybody.
  __device__ void put(const Channel& channel) {
    uint4* own = channel.records + rank * channel.pieces;
    if constexpr (!kCluster) {
      for (int piece = threadIdx.x; piece < channel.pieces; piece += kTeamThreads) {
        memory.data[channel.offset + rank * channel.pieces + piece] = own[piece];
      }
    }
  }

  __device__ void put(const Channel& channel, uint64_t* barrier) {
    uint4* own = channel.records + rank * channel.pieces;
    for (int piece = threadIdx.x % 32; piece < channel.pieces; piece += 32) {
      const uint4 value = own[piece];
#pragma unroll 2
      for (int to = threadIdx.x / 32; to < blocks; to += kTeamWarps) {
        if (to != rank)
          send(*reinterpret_cast<const float4*>(&value), reinterpret_cast<float4*>(own + piece), barrier, to);
      }
    }
  }

  // Everybody's records of one channel, or two; `meeting` counts those of a step, `parity` is that of the step. Records
  // of the next step cannot come early: who sends them has had ours of a later meeting.
  template <class... Channels>
  __device__ void exchange(int meeting, uint32_t parity, const Channels&... channels) {
    if constexpr (kCluster) {
      uint64_t* barrier = barriers + meeting;
      if (threadIdx.x == 0) mbarrier_expect(barrier, (channels.pieces + ...) * 16 * (blocks - 1));
      (put(channels, barrier), ...);
      mbarrier_wait(barrier, parity);
    } else {
      (put(channels), ...);
      __syncthreads();
      ++epoch;
      if (threadIdx.x == 0) store_release(memory.flags + rank, epoch);
      if (threadIdx.x < blocks) {
        while (load_acquire(memory.flags + threadIdx.x) < epoch) {
        }
      }
      __syncthreads();
      (get(channels), ...);
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
    }
  }

  __device__ void get(const Channel& channel) {
    const uint4* source = memory.data + channel.offset;
    for (int piece = threadIdx.x; piece < blocks * channel.pieces; piece += kTeamThreads) {
      copy_async<16>(channel.records + piece, source + piece, true);  // past L1, all of them on their way at once
    }
  }

  // Nobody sends before everybody is there, or ends while others send.
  __device__ void gather() {
    if constexpr (kCluster) cluster_sync();
    __syncthreads();
  }
};

}  // namespace newllm::cuda
