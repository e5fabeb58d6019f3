// From arguments to a launch of decode_kernel: how deep a ring fits, how many blocks, which kind of launch.
#pragma once

#include <algorithm>

#include "decode.cuh"
#include "device.h"

namespace newllm::cuda {

struct DecodeShape {
  int32_t B = 0;
  int64_t x_bytes = 0;  // what the widest layer's x takes of shared memory
  int32_t layers = 1;
};

inline int64_t decode_x_bytes(int64_t B, int64_t K, int64_t element) {
  return B * x_row_bytes(stages_of(int(K), int(element)));
}

constexpr int kMostSlots = 4;  // of each line: 128 KB

inline int64_t decode_shared_bytes(const DecodeShape& shape, int slots) {
  const int64_t layers = (shape.layers * int64_t(sizeof(DecodeLinear)) + 127) / 128 * 128;
  const int64_t ring = kLines * slots * int64_t(kStageBytes + 2 * sizeof(uint64_t));
  return layers + ring + shape.x_bytes + 2 * kPartialFloats * 4;
}

struct DecodeOptions {
  int slots = 0;  // 0: as many as fit
  bool chained = true;
  int way = 1;
};

template <class Kernel>
cudaError_t launch_decode_kernel(Kernel kernel, DecodeLaunch launch, const DecodeLinear& single,
                                 const DecodeShape& shape, const DecodeOptions& options, const Device& device,
                                 cudaStream_t stream) {
  int limit = 0;
  cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index);
  if (error != cudaSuccess) return error;
  launch.slots = options.slots ? options.slots : kMostSlots;
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
  } else if (device.major >= 9 && options.chained) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  config.attrs = &attribute;
  return cudaLaunchKernelEx(&config, kernel, launch, single);
}

template <class W, int kRows>
cudaError_t launch_decode(const DecodeLaunch& launch, const DecodeLinear& single, const DecodeShape& shape,
                          const DecodeOptions& options, const Device& device, cudaStream_t stream) {
#ifdef DECODE_SWEEP
  if (options.way == 0)
    return launch_decode_kernel(decode_kernel<W, kRows, 0>, launch, single, shape, options, device, stream);
  if (options.way == 2)
    return launch_decode_kernel(decode_kernel<W, kRows, 2>, launch, single, shape, options, device, stream);
  if (options.way == 3)
    return launch_decode_kernel(decode_kernel<W, kRows, 3>, launch, single, shape, options, device, stream);
#endif
  return launch_decode_kernel(decode_kernel<W, kRows, 1>, launch, single, shape, options, device, stream);
}

template <class W>
cudaError_t launch_decode(const DecodeLaunch& launch, const DecodeLinear& single, const DecodeShape& shape,
                          cudaStream_t stream, const DecodeOptions& options = {}) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  if constexpr (sizeof(W) == 4) {
    if (shape.B == 1) return launch_decode<W, 1>(launch, single, shape, options, device, stream);
    if (shape.B <= 4) return launch_decode<W, 4>(launch, single, shape, options, device, stream);
  } else {
    if (shape.B <= 8) return launch_decode<W, 8>(launch, single, shape, options, device, stream);
  }
  return launch_decode<W, 16>(launch, single, shape, options, device, stream);
}

}  // namespace newllm::cuda
