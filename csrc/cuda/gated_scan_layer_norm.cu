// `gated_scan_layer_norm` in one cooperative launch (scan_norm.cuh). The tiles are the fastest of those measured on an
// H100 (docs/performance.md).
#include "device.h"
#include "kernels.h"
#include "recurrence_launch.cuh"
#include "scan_norm_backward.cuh"
#include "scan_norm_forward.cuh"

namespace newllm::cuda {
namespace {

// A kernel on all devices: one block a multiprocessor, all of them at the same time.
template <class Kernel, void (*kKernel)(ScanNormArgs)>
struct Cooperative {
  static constexpr size_t kShared = sizeof(typename Kernel::Shared);
  static_assert(kShared <= 227 * 1024);  // of compute capability 9.0

  // Blocks that run at the same time, which is what a cooperative launch is held to; none before Hopper.
  static cudaError_t resident(int device, int64_t& blocks) {
    static std::atomic<int> known[kMostDevices];  // plus one; 0: not asked yet
    if (known[device].load(std::memory_order_acquire) == 0) {
      int each = 0, multiprocessors = 0, major = 0, shared = 0;
      for (const auto& [name, value] : {std::pair{cudaDevAttrMultiProcessorCount, &multiprocessors},
                                        std::pair{cudaDevAttrComputeCapabilityMajor, &major},
                                        std::pair{cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared}}) {
        const cudaError_t error = cudaDeviceGetAttribute(value, name, device);
        if (error != cudaSuccess) return error;
      }
      cudaFuncAttributes attributes;
      cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel));
      if (error != cudaSuccess) return error;
      if (major >= 9 && attributes.ptxVersion >= 90 && size_t(shared) >= kShared) {
        error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, int(kShared));
        if (error != cudaSuccess) return error;
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, Kernel::kThreads, kShared);
        if (error != cudaSuccess) return error;
      }
      known[device].store(1 + each * multiprocessors, std::memory_order_release);
    }
    blocks = known[device].load(std::memory_order_acquire) - 1;
    return cudaSuccess;
  }

  static cudaError_t teams(int device, int64_t D, int64_t& teams) {
    const int64_t column_blocks = (D + kColumns - 1) / kColumns;
    int64_t blocks = 0;
    const cudaError_t error = resident(device, blocks);
    teams = column_blocks <= kMostColumnBlocks ? blocks / most(1, column_blocks) : 0;
    return error;
  }

  static cudaError_t run(ScanNormArgs args, const Scratch& scratch, cudaStream_t stream) {
    Device device;
    int64_t teams_there = 0;
    cudaError_t error = current_device(device);
    if (error == cudaSuccess) error = teams(device.index, args.scan.D, teams_there);
    if (error != cudaSuccess) return error;
    if (teams_there == 0) return cudaErrorInvalidConfiguration;
    args.teams = int(least(teams_there, args.sequences));
    args.scan.column_blocks = int((args.scan.D + kColumns - 1) / kColumns);
    constexpr int64_t kFloats = sizeof(TwoWords) / sizeof(float);
    const int64_t words = Kernel::Exchange::size(args.teams, args.scan.column_blocks);
    float* memory = scratch.allocate(scratch.context, kFloats * words + 2 * args.teams * args.scan.D);
    args.exchange = reinterpret_cast<TwoWords*>(memory);
    args.shares = memory + kFloats * words;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(args.teams * args.scan.column_blocks));
    config.blockDim = dim3(Kernel::kThreads);
    config.dynamicSmemBytes = kShared;
    config.stream = stream;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeCooperative;
    attribute[0].val.cooperative = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kKernel, args);
  }
};

template <class T, int... kTiles>
using Forward = Cooperative<ScanNormForward<T, kTiles...>, scan_norm_forward_kernel<T, kTiles...>>;
template <class T, int... kTiles>
using Backward = Cooperative<ScanNormBackward<T, kTiles...>, scan_norm_backward_kernel<T, kTiles...>>;

template <class T>
using Forward16 = Forward<T, 8, 8, 3, 4, 2, 4, 6>;
using Forward32 = Forward<float, 8, 8, 2, 4, 2, 4, 6>;
template <class T>
using Backward16 = Backward<T, 8, 8, 2, 4, 1, 2, 4, 7, 3>;
using Backward32 = Backward<float, 4, 8, 2, 8, 1, 2, 4, 7, 3>;

ScanNormArgs arguments(const ScanShape& shape, const NormParams& norm) {
  ScanNormArgs run;
  run.scan = recurrence_args(shape);
  run.scan.chunk_steps = most(1, shape.T);
  run.sequences = shape.num_sequences;
  run.weight = {norm.weight, norm.weight_dtype == DType::kFloat32};
  run.bias = {norm.bias, norm.bias_dtype == DType::kFloat32};
  run.eps = float(norm.eps);
  run.clamp = float(norm.clamp_value);
  return run;
}

bool aligned(const ScanNormArgs& args, int64_t element_size) {
  RecurrenceArgs rest;
  rest.D = args.scan.D;
  rest.in[0] = args.c, rest.in[1] = args.y, rest.in[2] = args.grad_y;
  return rows_aligned(args.scan, element_size) && rows_aligned(rest, element_size);
}

}  // namespace

int64_t gated_scan_layer_norm_teams(int device, bool is_float, bool backward, int64_t D) {
  using T = __nv_bfloat16;  // of both dtypes of 16 bits
  int64_t teams = 0;
  const cudaError_t error =
      backward   ? is_float ? Backward32::teams(device, D, teams) : Backward16<T>::teams(device, D, teams)
      : is_float ? Forward32::teams(device, D, teams)
                 : Forward16<T>::teams(device, D, teams);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? teams : 0;
}

cudaError_t gated_scan_layer_norm_forward(const GatedScanNormArgs& args, const Scratch& scratch, cudaStream_t stream) {
  ScanNormArgs run = arguments(args.scan.shape, args.norm);
  run.scan.in[0] = args.scan.f;
  run.scan.in[1] = args.scan.i;
  run.scan.in[2] = args.scan.d;
  run.scan.start = static_cast<const float*>(args.scan.c0);
  run.scan.last = static_cast<float*>(args.scan.c_last);
  run.c = args.scan.c;
  run.y = args.y;
  run.mean = static_cast<float*>(args.mean);
  run.rstd = static_cast<float*>(args.rstd);
  const DType dtype = args.scan.shape.dtype;
  if (!aligned(run, dtype == DType::kFloat32 ? 4 : 2)) return cudaErrorInvalidConfiguration;
  switch (dtype) {
    case DType::kFloat32: return Forward32::run(run, scratch, stream);
    case DType::kBFloat16: return Forward16<__nv_bfloat16>::run(run, scratch, stream);
    case DType::kFloat16: return Forward16<__half>::run(run, scratch, stream);
    default: return cudaErrorInvalidValue;  // float64 is refused in Python
  }
}

cudaError_t gated_scan_layer_norm_backward(const GatedScanNormBackwardArgs& args, const Scratch& scratch,
                                           cudaStream_t stream) {
  ScanNormArgs run = arguments(args.scan.shape, args.norm);
  run.scan.in[0] = args.scan.f;
  run.scan.in[1] = args.scan.i;
  run.scan.in[2] = args.scan.d;
  run.scan.out[0] = args.scan.grad_f;
  run.scan.out[1] = args.scan.grad_i;
  run.scan.out[2] = args.scan.grad_d;
  run.scan.start = static_cast<const float*>(args.scan.grad_c_last);
  run.scan.edge = static_cast<const float*>(args.scan.c0);
  run.scan.last = static_cast<float*>(args.scan.grad_c0);
  run.scan.from_end = true;
  run.c = args.scan.c;
  run.grad_y = args.grad_y;
  run.mean = const_cast<float*>(static_cast<const float*>(args.mean));
  run.rstd = const_cast<float*>(static_cast<const float*>(args.rstd));
  run.grad_weight = static_cast<float*>(args.grad_weight);
  run.grad_bias = static_cast<float*>(args.grad_bias);
  const DType dtype = args.scan.shape.dtype;
  if (!aligned(run, dtype == DType::kFloat32 ? 4 : 2)) return cudaErrorInvalidConfiguration;
  switch (dtype) {
    case DType::kFloat32: return Backward32::run(run, scratch, stream);
    case DType::kBFloat16: return Backward16<__nv_bfloat16>::run(run, scratch, stream);
    case DType::kFloat16: return Backward16<__half>::run(run, scratch, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace newllm::cuda
