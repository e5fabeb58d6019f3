// What the launchers ask of a device, once.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

#include <cuda_runtime_api.h>

namespace newllm::cuda {

constexpr int kMostDevices = 64;

struct Device {
  int index = 0, multiprocessors = 0, major = 0;
};

inline cudaError_t current_device(Device& device) {
  static std::atomic<int> multiprocessors[kMostDevices], major[kMostDevices];
  const cudaError_t error = cudaGetDevice(&device.index);
  if (error != cudaSuccess) return error;
  if (device.index >= kMostDevices) return cudaErrorInvalidDevice;
  const int at = device.index;
  if (multiprocessors[at].load(std::memory_order_acquire) == 0) {
    int found = 0, version = 0;
    for (const auto& [name, value] :
         {std::pair{cudaDevAttrMultiProcessorCount, &found}, std::pair{cudaDevAttrComputeCapabilityMajor, &version}}) {
      const cudaError_t failed = cudaDeviceGetAttribute(value, name, at);
      if (failed != cudaSuccess) return failed;
    }
    major[at].store(version);
    multiprocessors[at].store(found, std::memory_order_release);
  }
  device.multiprocessors = multiprocessors[at].load();
  device.major = major[at].load();
  return cudaSuccess;
}

}  // namespace newllm::cuda
