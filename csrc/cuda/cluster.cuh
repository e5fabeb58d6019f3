// Thread-block clusters of Hopper: messages from block to block through distributed shared memory, and the barrier of
// the cluster. Below compute capability 9.0 these functions do nothing; the launchers use no clusters there.
#pragma once

#include <cstdint>

namespace newllm::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define NEWLLM_CLUSTERS 1
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Waits for all threads of all blocks of the cluster; what they wrote to shared memory before is then seen.
__device__ __forceinline__ void cluster_sync() {
#ifdef NEWLLM_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
#ifdef NEWLLM_CLUSTERS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives; what this thread wrote before is seen by whoever waits.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#ifdef NEWLLM_CLUSTERS
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// A whole warp arrives at each of `count` barriers, one lane for all: __syncwarp puts what the others wrote before that
// lane, and its arrival releases it all (the memory model's causality order goes through both). racecheck does not
// follow the first step; in a library configured with -DNEWLLM_EVERY_LANE_ARRIVES=ON, which is for it alone, it has no
// need to.
#ifdef NEWLLM_EVERY_LANE_ARRIVES
constexpr int kArrivalsOfWarp = 32;
#else
constexpr int kArrivalsOfWarp = 1;
#endif

__device__ __forceinline__ void warp_arrives(uint64_t* barriers, int count = 1) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
  if constexpr (kArrivalsOfWarp == 1) {
    if (lane < count) mbarrier_arrive(barriers + lane);
  } else {
    for (int k = 0; k < count; ++k) mbarrier_arrive(barriers + k);
  }
}

// Arrives, and lets the phase end only after so many bytes have come.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
#ifdef NEWLLM_CLUSTERS
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// For the phase of this parity to end. What other blocks of the cluster sent is then seen.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef NEWLLM_CLUSTERS
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

// The same among the warps of a block, which throws nothing out of the first-level cache.
__device__ __forceinline__ void mbarrier_wait_in_block(uint64_t* barrier, uint32_t parity) {
#ifdef NEWLLM_CLUSTERS
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

// Where something of this block's shared memory lies in that of block `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(const void* pointer, uint32_t rank) {
  uint32_t there = 0;
#ifdef NEWLLM_CLUSTERS
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(pointer)), "r"(rank));
#endif
  return there;
}

// Stores 16 bytes at such an address, and tells the barrier at another, of the same block, that they came.
__device__ __forceinline__ void send(float4 value, uint32_t target, uint32_t barrier) {
#ifdef NEWLLM_CLUSTERS
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
      : "memory");
#endif
}

// Stores 16 bytes into the shared memory of block `rank` of the cluster, and tells the barrier there that they came.
__device__ __forceinline__ void send(float4 value, float4* target, uint64_t* barrier, uint32_t rank) {
  send(value, remote_address(target, rank), remote_address(barrier, rank));
}

// Stores 16 bytes into the shared memory of block `rank` of the cluster, which sees them after cluster_sync.
__device__ __forceinline__ void store_remote(float4 value, float4* target, uint32_t rank) {
#ifdef NEWLLM_CLUSTERS
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(target)), "r"(rank));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
#endif
}

}  // namespace newllm::cuda
