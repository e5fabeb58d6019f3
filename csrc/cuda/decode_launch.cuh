// From arguments to a launch of decode_kernel: how deep a ring fits, how many blocks, which kind of launch.
#pragma once

#include <algorithm>

#include "decode.cuh"
#include "device.h"

namespace newllm::cuda {

struct DecodeShape {
  int32_t B = 0;
  int64_t x_bytes = 0;     // what the widest layer's x takes of shared memory
  int64_t norm_bytes = 0;  // and the parameters of the widest LayerNorm, where they go there
  int32_t layers = 1;
};

inline int64_t decode_x_bytes(int64_t B, int64_t K, int64_t element) {
  return B * x_row_bytes(stages_of(int(K), int(element)));
}

inline int64_t decode_norm_bytes(int64_t K, int64_t element) {
  return element == 2 ? norm_bytes(int(K), int(element)) : 0;  // prepare_pairs
}

constexpr int kMostSlots = 5;  // of each line: 160 KB

inline int64_t decode_shared_bytes(const DecodeShape& shape, int slots) {
  const int64_t layers = (shape.layers * int64_t(sizeof(DecodeLinear)) + 127) / 128 * 128;
  const int64_t ring = kLines * slots * int64_t(kStageBytes + 2 * sizeof(uint64_t));
  return layers + ring + shape.x_bytes + shape.norm_bytes + 2 * kPartialFloats * 4;
}

template <class Kernel>
cudaError_t launch_decode_kernel(Kernel kernel, DecodeLaunch launch, const DecodeLinear& single,
                                 const DecodeShape& shape, const Device& device, cudaStream_t stream) {
  int limit = 0;
  cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index);
  if (error != cudaSuccess) return error;
  launch.slots = kMostSlots;
  while (launch.slots > 1 && decode_shared_bytes(shape, launch.slots) + 1024 > limit) --launch.slots;
  const size_t shared = size_t(decode_shared_bytes(shape, launch.slots));
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(device.multiprocessors));
  config.blockDim = dim3(kDecodeAllThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (launch.count > 1) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  } else if (device.major >= 9) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  config.attrs = &attribute;
  return cudaLaunchKernelEx(&config, kernel, launch, single);
}

template <class W>
cudaError_t launch_decode(const DecodeLaunch& launch, const DecodeLinear& single, const DecodeShape& shape,
                          cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const auto run = [&](auto kernel) { return launch_decode_kernel(kernel, launch, single, shape, device, stream); };
  if constexpr (sizeof(W) == 4) {
    if (shape.B == 1) return run(decode_kernel<W, 1>);
    if (shape.B <= 4) return run(decode_kernel<W, 4>);
  } else {
    if (shape.B <= 8) return run(decode_kernel<W, 8>);
  }
  return run(decode_kernel<W, 16>);
}

}  // namespace newllm::cuda
