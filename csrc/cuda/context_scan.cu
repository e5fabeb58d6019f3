// Launches of context_scan.cuh: which tile for which width, and for blocks that have a multiprocessor to themselves.
#include "context_scan.cuh"

#include <algorithm>
#include <cmath>

#include "context_scan_launch.cuh"

namespace newllm::cuda {
namespace {

// The fastest of those measured on an H100 at 256 to 2048 columns of bfloat16 (docs/performance.md).
constexpr int most_blocks(int warps) { return warps > 4 ? 1 : warps > 2 ? 3 : 8 / warps; }
constexpr int many_ahead(int warps, bool wide) { return wide ? 2 : warps > 4 ? 3 : warps > 1 ? 4 : 8; }

// Blocks that share a multiprocessor: three of 1024 columns.
template <class L>
using Many = ContextScanForward<L, 1, (L::W > 1 ? 3 : 4), many_ahead(L::W, (L::kColumns > 8)), most_blocks(L::W)>;

// Blocks with one to themselves: a step is as long as its slowest part, and one group of helpers may be that.
template <class L>
using Alone = ContextScanForward<L, (L::kColumns > 8 ? 1 : 2), (L::W > 4 ? 3 : 4), (L::W > 4 ? 2 : 3), 1>;

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

// The largest magnitude that the dtype holds below the clamp: what was not cut stays below it, so that the backward can
// tell (context_scan/reference.py). float32 needs no such mark.
template <class T>
void set_mark(ContextScanRun& run) {
  if constexpr (sizeof(T) == 2) {
    const float clamp = float(run.args.norm.clamp_value);
    T edge = T(clamp);
    uint16_t& bits = reinterpret_cast<uint16_t&>(edge);
    run.edge = bits | uint32_t(bits) << 16;
    if (!std::isinf(clamp)) bits -= 1;
    run.below = float(edge);
  }
}

template <class L>
cudaError_t run_forward(ContextScanRun run, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  set_mark<typename L::Storage>(run);
  return launch_passes(run.chunks, [&](const Chunks& chunks, int64_t blocks) {
    run.chunks = chunks;
    return blocks <= device.multiprocessors ? launch<Alone<L>>(run, blocks, device.index, stream)
                                            : launch<Many<L>>(run, blocks, device.index, stream);
  });
}

// What the forward of a width takes of shared memory, at most.
template <class T>
int64_t shared_memory(int64_t D) {
  int64_t bytes = 0;
  for_width<T, true>(D, [&](auto layout) {
    using L = decltype(layout);
    bytes = int64_t(std::max(sizeof(typename Alone<L>::Shared), sizeof(typename Many<L>::Shared)));
    return cudaSuccess;
  });
  return bytes;
}

}  // namespace

int64_t context_scan_max_width(int device) {
  int bytes = 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  for (const int64_t D : {4096, 2048, 1024, 512, 256}) {
    const int64_t forward = std::max(shared_memory<float>(D), shared_memory<__half>(D));
    if (std::max(forward, context_scan_backward_shared_memory(D)) <= bytes) return D;
  }
  return 0;
}

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
