// A ring of slots in shared memory that some warps fill and others empty, guarded by mbarriers (compute
// capability 8.0).
#pragma once

#include <cstdint>

#include "cluster.cuh"

namespace newllm::cuda {

__device__ __forceinline__ uint32_t shared_word(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same, where it is used in a loop: the compiler would compute it anew in every round, from a special register that
// takes its time.
__device__ __forceinline__ uint32_t shared_word_once(const void* pointer) {
  uint32_t word = shared_word(pointer);
  asm volatile("" : "+r"(word));
  return word;
}

__device__ __forceinline__ float4 load_shared(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

// Which slot comes next, and its round.
template <int SLOTS>
struct Turn {
  int slot;
  uint32_t parity;

  explicit __device__ __forceinline__ Turn(uint32_t count) : slot(count % SLOTS), parity(count / SLOTS & 1) {}
  __device__ __forceinline__ void advance(int by) {
    slot += by;
    if (slot >= SLOTS) slot -= SLOTS, parity ^= 1;
  }
};

// Two barriers a slot: filled by some warps, emptied by as many.
template <int SLOTS>
struct SlotBarriers {
  uint64_t filled[SLOTS], emptied[SLOTS];

  // By one thread, before a __syncthreads.
  __device__ __forceinline__ void init(uint32_t warps) {
#pragma unroll
    for (int k = 0; k < 2 * SLOTS; ++k) {
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_word(filled + k)), "r"(warps * kArrivalsOfWarp)
                   : "memory");
    }
  }
};

// What a thread does with them.
template <int SLOTS>
struct Slots {
  uint32_t filled, emptied;

  explicit __device__ __forceinline__ Slots(const SlotBarriers<SLOTS>& barriers)
      : filled(shared_word_once(barriers.filled)), emptied(filled + SLOTS * sizeof(uint64_t)) {}

  __device__ __forceinline__ void wait_filled(Turn<SLOTS> turn) const { wait(filled + 8 * turn.slot, turn.parity); }
  __device__ __forceinline__ void wait_emptied(Turn<SLOTS> turn) const {
    wait(emptied + 8 * turn.slot, turn.parity ^ 1);  // the first round finds all empty
  }
  // Of a whole warp.
  __device__ __forceinline__ void tell_filled(Turn<SLOTS> turn) const { arrive(filled + 8 * turn.slot); }
  __device__ __forceinline__ void tell_emptied(Turn<SLOTS> turn) const { arrive(emptied + 8 * turn.slot); }

 private:
  static __device__ __forceinline__ void arrive(uint32_t barrier) {
    __syncwarp();
    if (kArrivalsOfWarp > 1 || threadIdx.x % 32 == 0) {
      asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
    }
  }

  static __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
      asm volatile(
          "{\n.reg .pred done;\n"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
          "mbarrier.try_wait.parity.shared.b64 done, [%1], %2;\n"
#else
          "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
#endif
          "selp.u32 %0, 1, 0, done;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    }
  }
};

}  // namespace newllm::cuda
