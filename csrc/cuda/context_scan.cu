// Launches of context_scan.cuh: which tile for which width, and for blocks that have a multiprocessor to themselves.
#include "context_scan.cuh"

#include "context_scan_launch.cuh"

namespace newllm::cuda {
namespace {

// Blocks that share a multiprocessor: one group of helpers, and registers for two blocks.
template <class L>
struct Many {
  static constexpr int W = L::W, kWide = L::kColumns > 8;
  using Forward = ContextScanForward<L, 1, W > 4 ? 3 : 4, W > 4 ? 3 : 4, 1, W > 4 ? 1 : 8 / W>;
};

// Alone a step is as long as its slowest part, and one group of helpers would be that.
template <class L>
struct Alone {
  static constexpr int W = L::W;
  using Forward = ContextScanForward<L, L::kColumns > 8 ? 1 : 2, W > 4 ? 3 : 4, W > 4 ? 2 : 3, 1, 1>;
};

template <class Forward>
cudaError_t launch(const ContextScanRun& run, int64_t blocks, int device, cudaStream_t stream) {
  constexpr auto kKernel = context_scan_kernel<Forward>;
  constexpr size_t kShared = sizeof(typename Forward::Shared);
  static_assert(kShared <= 227 * 1024);
  const cudaError_t error = allow_shared_memory<kKernel>(device, kShared);
  if (error != cudaSuccess) return error;
  kKernel<<<static_cast<unsigned>(blocks), Forward::kBlockThreads, kShared, stream>>>(run);
  return cudaGetLastError();
}

// The largest magnitude that the dtype holds below the clamp: what was not cut stays below it, so that the backward can tell
// (context_scan/reference.py). float32 needs no such mark.
template <class T>
float below(float clamp) {
  if constexpr (sizeof(T) == 4) {
    return clamp;
  } else {
    if (isinf(clamp)) return clamp;
    T edge = T(clamp);
    reinterpret_cast<uint16_t&>(edge) -= 1;
    return float(edge);
  }
}

template <class L>
cudaError_t run_forward(ContextScanRun run, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  run.below = below<typename L::Storage>(float(run.args.norm.clamp_value));
  return launch_passes(run.chunks, [&](const Chunks& chunks, int64_t blocks) {
    run.chunks = chunks;
    return blocks <= device.multiprocessors ? launch<typename Alone<L>::Forward>(run, blocks, device.index, stream)
                                            : launch<typename Many<L>::Forward>(run, blocks, device.index, stream);
  });
}

}  // namespace

cudaError_t context_scan_forward(const ContextArgs& args, const TimeChunks& time, const Scratch& scratch,
                                 cudaStream_t stream) {
  if (args.B == 0) return cudaSuccess;
  ContextScanRun run;
  run.args = args;
  run.chunks = chunks_of(time, args.B, args.D, scratch);
  return for_storage(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    bool aligned = args.D * sizeof(T) % 16 == 0;
    for (const View3* view : {&args.f, &args.i, &args.d, &args.c}) {
      aligned = aligned && rows_at_16_bytes(*view, sizeof(T));
    }
    const auto with = [&](auto layout) { return run_forward<decltype(layout)>(run, stream); };
    return aligned ? for_width<T, true>(args.D, with) : for_width<T, false>(args.D, with);
  });
}

}  // namespace newllm::cuda
