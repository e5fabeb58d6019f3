// Launches, with what Hopper and newer can do besides: clusters of blocks, and programmatic dependent launch, where the
// blocks of a kernel take their places while the kernel before it in the stream runs out, and wait there for its end.
#pragma once

#include "device.h"

namespace newllm::cuda {

// For the end of the kernel before, its writes included; to be called by every block, before it touches global memory.
// Nothing where the kernel was not launched `early`.
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel of the stream, if it is launched `early`, may start once all blocks have come here or have ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct Grid {
  int64_t blocks = 0;
  unsigned rows = 1;  // of blocks, gridDim.y
  int threads = 0;
  size_t shared = 0;
  int cluster = 1;
  bool early = false;  // programmatic dependent launch, where there is such a thing
};

// Whether what runs on this device was compiled for Hopper or newer: code for older ones, translated on loading, knows
// neither clusters nor griddepcontrol.
template <auto kKernel>
bool of_hopper(const Device& device) {
  static std::atomic<uint64_t> asked{0}, found{0};
  const uint64_t bit = uint64_t(1) << device.index;
  if (!(asked.load(std::memory_order_acquire) & bit)) {
    cudaFuncAttributes attributes;
    const bool known = cudaFuncGetAttributes(&attributes, kKernel) == cudaSuccess;
    if (!known) cudaGetLastError();  // the launch will say what is wrong
    if (known && device.major >= 9 && attributes.ptxVersion >= 90) found.fetch_or(bit);
    asked.fetch_or(bit, std::memory_order_release);
  }
  return found.load(std::memory_order_relaxed) & bit;
}

// More than 48 KB of shared memory has to be asked for, once a device; always the same number, so that no thread lowers
// the limit before another's launch.
template <auto kKernel>
cudaError_t allow_shared(const Device& device, size_t bytes) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t(1) << device.index;
  if (done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// Fills in what cudaLaunchKernelEx and cudaOccupancyMaxActiveClusters read; `attributes` must outlive the result.
inline cudaLaunchConfig_t configuration(const Grid& grid, bool early, cudaStream_t stream,
                                        cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), grid.rows);
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = attributes;
  if (early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  return config;
}

template <auto kKernel, class... Args>
cudaError_t launch(const Grid& grid, const Device& device, cudaStream_t stream, const Args&... args) {
  if (grid.blocks >= int64_t(1) << 31) return cudaErrorInvalidConfiguration;
  const bool hopper = of_hopper<kKernel>(device);
  if (grid.cluster > 1 && !hopper) return cudaErrorNotSupported;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(grid, grid.early && hopper, stream, attributes);
  return cudaLaunchKernelEx(&config, kKernel, args...);
}

// Clusters of this grid that the device runs at a time; 0 where it runs none.
template <auto kKernel>
cudaError_t clusters_at_a_time(Grid grid, const Device& device, int& clusters) {
  clusters = 0;
  if (!of_hopper<kKernel>(device)) return cudaErrorNotSupported;
  cudaLaunchAttribute attributes[2];
  grid.blocks = grid.cluster;
  const cudaLaunchConfig_t config = configuration(grid, false, nullptr, attributes);
  return cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config);
}

}  // namespace newllm::cuda
