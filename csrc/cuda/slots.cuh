// A ring of slots in shared memory that some warps fill and others empty, guarded by mbarriers (compute capability 8.0).
#pragma once

#include <cstdint>

namespace newllm::cuda {

__device__ __forceinline__ uint32_t shared_word(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
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

// Two barriers a slot: filled by `arrivals` warps, emptied by as many.
template <int SLOTS>
struct Slots {
  uint64_t filled[SLOTS], emptied[SLOTS];

  // By one thread, before a __syncthreads.
  __device__ __forceinline__ void init(uint32_t arrivals) {
#pragma unroll
    for (int k = 0; k < SLOTS; ++k) {
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_word(filled + k)), "r"(arrivals) : "memory");
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_word(emptied + k)), "r"(arrivals) : "memory");
    }
  }

  __device__ __forceinline__ void wait_filled(Turn<SLOTS> turn) { wait(filled + turn.slot, turn.parity); }
  __device__ __forceinline__ void wait_emptied(Turn<SLOTS> turn) {
    wait(emptied + turn.slot, turn.parity ^ 1);  // the first round finds all empty
  }
  // Of a whole warp.
  __device__ __forceinline__ void tell_filled(Turn<SLOTS> turn) { arrive(filled + turn.slot); }
  __device__ __forceinline__ void tell_emptied(Turn<SLOTS> turn) { arrive(emptied + turn.slot); }

 private:
  static __device__ __forceinline__ void arrive(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_word(barrier))
                   : "memory");
    }
  }

  static __device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
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
          : "r"(shared_word(barrier)), "r"(parity)
          : "memory");
    }
  }
};

}  // namespace newllm::cuda
