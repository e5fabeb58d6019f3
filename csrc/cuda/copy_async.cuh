// cp.async: copies from global into shared memory that run on while the thread computes.
#pragma once

#include <cstdint>

namespace newllm::cuda {

// N bytes (4, 8 or 16, both addresses aligned to them), or zeros where `there` is false. NEIGHBOUR: the other half of
// 256 bytes goes to L2 with them, because another block wants it at about this time.
template <int N, bool NEIGHBOUR = true>
__device__ __forceinline__ void copy_async(void* target, const void* source, bool there) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  const int bytes = there ? N : 0;
  if constexpr (N == 16 && NEIGHBOUR) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes)
                 : "memory");
  } else if constexpr (N == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(source), "r"(bytes), "n"(N)
                 : "memory");
  }
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of this thread's groups are on their way.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace newllm::cuda
