// What launchers of different kernels share.
#pragma once

#include <atomic>

#include "../args.h"
#include "device.h"

namespace newllm::cuda {

// More than 48 KB of shared memory has to be asked for, once a device and kernel; it is asked for whole, so that no
// thread lowers the limit before another's launch.
template <auto kKernel>
cudaError_t allow_shared_memory(int device, size_t bytes) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t(1) << device;
  if (bytes <= 47 * 1024 || (done.load(std::memory_order_relaxed) & bit)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// The most blocks of a kernel that run at a time; asked once a device, so `shared` must not vary.
template <auto kKernel, int kThreads>
cudaError_t blocks_at_a_time(const Device& device, size_t shared, int64_t& blocks) {
  static std::atomic<int> known[kMostDevices];
  int each = known[device.index].load(std::memory_order_relaxed);
  if (each == 0) {
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, kThreads, shared);
    if (error != cudaSuccess) return error;
    if (each == 0) return cudaErrorInvalidConfiguration;
    known[device.index].store(each);
  }
  blocks = int64_t(each) * device.multiprocessors;
  return cudaSuccess;
}

// Whether all rows of a tensor begin at whole 16 bytes.
inline bool rows_at_16_bytes(const View3& view, int64_t element) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride_b * element % 16 == 0 &&
         view.stride_t * element % 16 == 0;
}

}  // namespace newllm::cuda
