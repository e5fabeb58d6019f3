// Launches of context_update.cuh, forward.
#include "context_update_launch.cuh"

namespace newllm::cuda {
namespace {

template <class R>
cudaError_t run_forward(const ContextArgs& args, cudaStream_t stream) {
  // Registers are kept few enough for that many blocks of a multiprocessor: 1024 threads.
  constexpr auto kKernel = context_update_kernel < R, R::kColumns == 8 ? 1024 / R::kThreads : 1 > ;
  const int64_t blocks = (args.B + R::kGroups - 1) / R::kGroups;
  if (blocks >= int64_t(1) << 31) return cudaErrorInvalidConfiguration;
  kKernel<<<static_cast<unsigned>(blocks), R::kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

template <class T, class S>
cudaError_t run_wide(const ContextArgs& args, cudaStream_t stream) {
  constexpr auto kKernel = context_update_wide_kernel<T, S>;
  Device device;
  cudaError_t error = current_device(device);
  const int64_t widest = context_update_max_width(device.index) * kWideForwardRows * int64_t(sizeof(float));
  if (error == cudaSuccess) error = allow_shared_memory<kKernel>(device.index, size_t(widest));
  if (error != cudaSuccess) return error;
  kKernel<<<static_cast<unsigned>(least(args.B, 1 << 20)), kWideThreads, args.D * sizeof(float), stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int64_t context_update_max_width(int device) {
  int bytes = 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  const int64_t wide = (bytes - int(sizeof(float)) * kWideWarps) / int(kWideBackwardRows * sizeof(float));
  return wide > kWidestInRegisters ? wide : kWidestInRegisters;
}

cudaError_t context_update_forward(const ContextArgs& args, cudaStream_t stream) {
  if (args.B == 0) return cudaSuccess;
  return for_dtypes(args.dtype, args.state_dtype, [&](auto tag, auto state_tag) {
    using T = decltype(tag);
    using S = decltype(state_tag);
    if (args.D > kWidestInRegisters) return run_wide<T, S>(args, stream);
    const bool whole = rows_whole<T, S>(args.D, {&args.f, &args.i, &args.d}, {&args.c0, &args.c_last});
    const auto run = [&](auto row) { return run_forward<decltype(row)>(args, stream); };
    return whole ? for_row<T, S, true>(args.D, run) : for_row<T, S, false>(args.D, run);
  });
}

}  // namespace newllm::cuda
