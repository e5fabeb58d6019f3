// Launches of context_scan_backward.cuh.
#include <algorithm>
#include <cmath>
#include <limits>

#include "context_scan_backward.cuh"
#include "context_scan_launch.cuh"
#include "sum_parts.cuh"

namespace newllm::cuda {
namespace {

constexpr int steps_ahead(int warps, bool wide) { return wide ? 2 : warps > 4 ? 3 : 4; }

template <class L>
using BackwardOf = ContextScanBackward<L, steps_ahead(L::W, (L::kColumns > 8)), (L::W > 4 ? 1 : 8 / L::W)>;

template <class L>
cudaError_t run_backward(ContextScanBackwardRun run, cudaStream_t stream) {
  using Backward = BackwardOf<L>;
  using T = typename L::Storage;
  constexpr auto kKernel = context_scan_backward_kernel<Backward>;
  constexpr size_t kShared = sizeof(typename Backward::Shared);
  static_assert(kShared <= 227 * 1024);
  Device device;
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) error = allow_shared_memory<kKernel>(device.index, kShared);
  if (error != cudaSuccess) return error;
  const float clamp = float(run.args.norm.clamp_value);
  run.edge = std::isinf(clamp) ? std::numeric_limits<float>::quiet_NaN() : float(T(clamp));
  error = launch_passes(run.chunks, [&](const Chunks& chunks, int64_t blocks) {
    run.chunks = chunks;
    kKernel<<<static_cast<unsigned>(blocks), Backward::kThreads, kShared, stream>>>(run);
    return cudaGetLastError();
  });
  if (error != cudaSuccess) return error;
  return sum_parts(run.shares, run.args.B * run.chunks.chunks, run.args.D, run.args.grad_weight, run.args.grad_bias,
                   stream);
}

template <class T>
int64_t shared_memory(int64_t D) {
  int64_t bytes = 0;
  for_width<T, true>(D, [&](auto layout) {
    bytes = sizeof(typename BackwardOf<decltype(layout)>::Shared);
    return cudaSuccess;
  });
  return bytes;
}

}  // namespace

int64_t context_scan_backward_shared_memory(int64_t D) {
  return std::max(shared_memory<float>(D), shared_memory<__half>(D));
}

cudaError_t context_scan_backward(const ContextBackwardArgs& args, const TimeChunks& time, const Scratch& scratch,
                                  cudaStream_t stream) {
  if (args.B == 0) return clear_gradients(args.grad_weight, args.grad_bias, args.D, stream);
  ContextScanBackwardRun run;
  run.args = args;
  run.chunks = chunks_of(time, args.B, args.D, scratch);
  run.shares = scratch.allocate(scratch.context, 2 * args.B * time.chunks * args.D);
  return for_storage(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    bool aligned = args.D * sizeof(T) % 16 == 0;
    for (const View3* view :
         {&args.f, &args.i, &args.d, &args.c, &args.grad_c, &args.grad_f, &args.grad_i, &args.grad_d}) {
      aligned = aligned && rows_at_16_bytes(*view, sizeof(T));
    }
    const auto with = [&](auto layout) { return run_backward<decltype(layout)>(run, stream); };
    return aligned ? for_width<T, true>(args.D, with) : for_width<T, false>(args.D, with);
  });
}

}  // namespace newllm::cuda
