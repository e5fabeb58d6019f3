// Launches of layer_norm.cuh: which layout for which width. Those of 256, 1024 and 4096 columns of 16 bits are the
// fastest of the few measured on an H100 (docs/performance.md), the others follow from them.
#include "layer_norm.cuh"

#include "device.h"
#include "kernels.h"

namespace newllm::cuda {
namespace {

// The most blocks that run at a time; more would only wait.
template <auto kKernel, int kThreads>
cudaError_t resident_blocks(const Device& device, int64_t shared, int64_t& blocks) {
  static std::atomic<int> known[kMostDevices];
  int each = shared == 0 ? known[device.index].load(std::memory_order_relaxed) : 0;
  if (each == 0) {
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, kThreads, size_t(shared));
    if (error != cudaSuccess) return error;
    if (shared == 0) known[device.index].store(each);
  }
  blocks = int64_t(each) * device.multiprocessors;
  return cudaSuccess;
}

template <class Layout>
int64_t blocks_for(int64_t rows, int64_t resident) {
  const int64_t wanted = (rows + Layout::kGroups - 1) / Layout::kGroups;
  return wanted < resident ? wanted : resident;
}

template <class T, bool ALIGNED, int LPR, int WPR, int VPT, bool RESIDUAL>
cudaError_t forward(const LayerNormRun& run, cudaStream_t stream) {
  using Layout = RowLayout<T, LPR, WPR, VPT, ALIGNED>;
  constexpr auto kKernel = layer_norm_kernel<T, LPR, WPR, VPT, ALIGNED, RESIDUAL>;
  Device device;
  int64_t resident = 0;
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) error = resident_blocks<kKernel, Layout::kThreads>(device, 0, resident);
  if (error != cudaSuccess) return error;
  const int64_t blocks = blocks_for<Layout>(run.args.rows, resident);
  kKernel<<<static_cast<unsigned>(blocks), Layout::kThreads, 0, stream>>>(run);
  return cudaGetLastError();
}

template <class T, bool ALIGNED, int LPR, int WPR, int VPT>
cudaError_t forward(const LayerNormRun& run, cudaStream_t stream) {
  return run.args.residual != nullptr ? forward<T, ALIGNED, LPR, WPR, VPT, true>(run, stream)
                                      : forward<T, ALIGNED, LPR, WPR, VPT, false>(run, stream);
}

// Shared memory of the backward's widest row, and from where on it has to be asked for: 48 KB, static memory included.
// It is asked for whole, so that no thread lowers the limit before another's launch.
constexpr int64_t kMostShared = 2 * 8192 * sizeof(float), kAskedFor = 47 * 1024;

template <class T, bool ALIGNED, int LPR, int WPR, int VPT>
cudaError_t backward(LayerNormBackwardRun run, const Scratch& scratch, cudaStream_t stream) {
  using Layout = RowLayout<T, LPR, WPR, VPT, ALIGNED>;
  constexpr auto kKernel = layer_norm_backward_kernel<T, LPR, WPR, VPT, ALIGNED>;
  const int64_t D = run.args.D, shared = 2 * D * int64_t(sizeof(float));
  Device device;
  int64_t resident = 0;
  cudaError_t error = current_device(device);
  if (error == cudaSuccess && shared > kAskedFor) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kMostShared));
  }
  if (error == cudaSuccess) error = resident_blocks<kKernel, Layout::kThreads>(device, shared, resident);
  if (error != cudaSuccess) return error;
  const int64_t blocks = blocks_for<Layout>(run.args.rows, resident);
  run.partial = scratch.allocate(scratch.context, 2 * blocks * D);
  kKernel<<<static_cast<unsigned>(blocks), Layout::kThreads, shared, stream>>>(run);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  layer_norm_reduce_kernel<<<dim3(static_cast<unsigned>((D + 31) / 32), 2), 32 * kReduceWarps, 0, stream>>>(
      run.partial, blocks, D, static_cast<float*>(run.args.grad_weight), static_cast<float*>(run.args.grad_bias));
  return cudaGetLastError();
}

bool aligned(const void* data, int64_t stride, int64_t each) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % each == 0;
}

template <class T, bool ALIGNED>
cudaError_t forward(const LayerNormRun& run, cudaStream_t stream) {
  const int64_t vectors = (run.args.D * int64_t(sizeof(T)) + 15) / 16;
  if (vectors <= 8) return forward<T, ALIGNED, 8, 1, 1>(run, stream);
  if (vectors <= 32) return forward<T, ALIGNED, 16, 1, 2>(run, stream);
  if (vectors <= 64) return forward<T, ALIGNED, 32, 1, 2>(run, stream);
  if (vectors <= 128) return forward<T, ALIGNED, 32, 2, 2>(run, stream);
  if (vectors <= 256) return forward<T, ALIGNED, 32, 4, 2>(run, stream);
  if (vectors <= 512) return forward<T, ALIGNED, 32, 8, 2>(run, stream);
  if (vectors <= 1024) return forward<T, ALIGNED, 32, 16, 2>(run, stream);
  if constexpr (sizeof(T) == 4) {
    if (vectors <= 2048) return forward<T, ALIGNED, 32, 32, 2>(run, stream);
  }
  return cudaErrorInvalidValue;  // wider rows are refused in Python
}

template <class T, bool ALIGNED>
cudaError_t backward(const LayerNormBackwardRun& run, const Scratch& scratch, cudaStream_t stream) {
  const int64_t vectors = (run.args.D * int64_t(sizeof(T)) + 15) / 16;
  if (vectors <= 8) return backward<T, ALIGNED, 8, 1, 1>(run, scratch, stream);
  if (vectors <= 32) return backward<T, ALIGNED, 32, 1, 1>(run, scratch, stream);
  if (vectors <= 64) return backward<T, ALIGNED, 32, 2, 1>(run, scratch, stream);
  if (vectors <= 128) return backward<T, ALIGNED, 32, 4, 1>(run, scratch, stream);
  if (vectors <= 256) return backward<T, ALIGNED, 32, 8, 1>(run, scratch, stream);
  if (vectors <= 512) return backward<T, ALIGNED, 32, 16, 1>(run, scratch, stream);
  if (vectors <= 1024) return backward<T, ALIGNED, 32, 16, 2>(run, scratch, stream);
  if constexpr (sizeof(T) == 4) {
    if (vectors <= 2048) return backward<T, ALIGNED, 32, 16, 4>(run, scratch, stream);
  }
  return cudaErrorInvalidValue;
}

template <class Body>
cudaError_t for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kBFloat16: return body(__nv_bfloat16{});
    case DType::kFloat16: return body(__half{});
    default: return cudaErrorInvalidValue;  // float64 is refused in Python
  }
}

Parameter parameter(const void* data, DType dtype) { return {data, dtype == DType::kFloat32}; }

}  // namespace

cudaError_t layer_norm_forward(const LayerNormArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  const LayerNormRun run{args, parameter(args.norm.weight, args.norm.weight_dtype),
                         parameter(args.norm.bias, args.norm.bias_dtype)};
  return for_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t kEach = 16 / sizeof(T);
    const bool whole = args.D % kEach == 0 && aligned(args.x, args.x_stride, kEach) && aligned(args.y, 0, kEach) &&
                       aligned(args.residual, args.residual_stride, kEach) && aligned(args.sum, 0, kEach) &&
                       aligned(args.norm.weight, 0, kEach) && aligned(args.norm.bias, 0, kEach);
    return whole ? forward<T, true>(run, stream) : forward<T, false>(run, stream);
  });
}

cudaError_t layer_norm_backward(const LayerNormBackwardArgs& args, const Scratch& scratch, cudaStream_t stream) {
  LayerNormBackwardRun run;
  run.args = args;
  run.weight = parameter(args.norm.weight, args.norm.weight_dtype);
  if (args.rows == 0) {
    const cudaError_t error = cudaMemsetAsync(args.grad_weight, 0, args.D * sizeof(float), stream);
    return error != cudaSuccess ? error : cudaMemsetAsync(args.grad_bias, 0, args.D * sizeof(float), stream);
  }
  return for_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t kEach = 16 / sizeof(T);
    const bool whole = args.D % kEach == 0 && aligned(args.x, args.x_stride, kEach) &&
                       aligned(args.grad_y, args.grad_y_stride, kEach) && aligned(args.grad_x, 0, kEach) &&
                       aligned(args.grad_sum, args.grad_sum_stride, kEach) && aligned(args.norm.weight, 0, kEach);
    return whole ? backward<T, true>(run, scratch, stream) : backward<T, false>(run, scratch, stream);
  });
}

}  // namespace newllm::cuda
