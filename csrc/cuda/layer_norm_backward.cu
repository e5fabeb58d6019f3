// LayerNorm backward: which tile for which width. All hold 16 columns a thread, whose gradients of weight and bias take
// 32 registers, in blocks of 512 threads, one a multiprocessor.
#include "layer_norm_backward.cuh"
#include "layer_norm_launch.cuh"

namespace newllm::cuda {
namespace {

// As many clusters as run at a time: one more would wait for another to walk all its rows.
template <auto kKernel>
cudaError_t resident_clusters(const Grid& grid, const Device& device, int64_t& clusters) {
  static std::atomic<int> known[kMostDevices][kMostPieces + 1];
  std::atomic<int>& found = known[device.index][grid.cluster];
  if (found.load(std::memory_order_relaxed) == 0) {
    int fit = 0;
    const cudaError_t error = clusters_at_a_time<kKernel>(grid, device, fit);
    if (error != cudaSuccess) return error;
    found.store(fit);
  }
  clusters = found.load(std::memory_order_relaxed);
  return clusters > 0 ? cudaSuccess : cudaErrorNotSupported;
}

template <class T, bool ALIGNED, class Tile, bool DIRECT, bool CLUSTER>
cudaError_t run_backward(LayerNormBackwardRun run, const Scratch& scratch, cudaStream_t stream) {
  constexpr auto kKernel = layer_norm_backward_kernel<T, Tile, ALIGNED, DIRECT, CLUSTER>;
  constexpr int kShares = Tile::kThreads * Tile::kColumns * int(sizeof(float));
  constexpr int kRing = ALIGNED ? Ring<T, Tile, DIRECT>::kBytes : 0;
  const int64_t D = run.args.D;
  Grid grid;
  grid.threads = Tile::kThreads;
  grid.shared = kRing > kShares ? kRing : kShares;
  grid.cluster = run.cluster;
  grid.early = Tile::kWarps == 1;  // 1 us faster at 256 columns, 1 us slower at 4096, we don't know why
  Device device;
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) error = allow_shared<kKernel>(device, grid.shared);
  int64_t resident = device.multiprocessors;
  if (error == cudaSuccess && CLUSTER) error = resident_clusters<kKernel>(grid, device, resident);
  if (error != cudaSuccess) return error;
  const int64_t wanted = (run.args.rows + Tile::kGroups - 1) / Tile::kGroups;
  const int64_t parts = wanted < resident ? wanted : resident;
  grid.blocks = parts * run.cluster;
  run.partial = scratch.allocate(scratch.context, 2 * parts * D);
  error = launch<kKernel>(grid, device, stream, run);
  if (error != cudaSuccess) return error;
  Grid second;
  second.blocks = (D + 31) / 32;
  second.rows = 2;
  second.threads = 32 * kReduceWarps;
  second.early = true;
  return for_dtype(run.args.grad_dtype, [&](auto tag) {
    using G = decltype(tag);
    return launch<layer_norm_reduce_kernel<G>>(second, device, stream, static_cast<const float*>(run.partial), parts, D,
                                               static_cast<G*>(run.args.grad_weight),
                                               static_cast<G*>(run.args.grad_bias));
  });
}

template <class T, bool ALIGNED, int LANES, int WARPS, bool CLUSTER = false>
cudaError_t run_backward(const LayerNormBackwardRun& run, const Scratch& scratch, cudaStream_t stream) {
  using Shape = Tile<LANES, WARPS, 16, 512, 1>;
  return run.args.grad_sum != nullptr ? run_backward<T, ALIGNED, Shape, true, CLUSTER>(run, scratch, stream)
                                      : run_backward<T, ALIGNED, Shape, false, CLUSTER>(run, scratch, stream);
}

template <class T>
cudaError_t backward_aligned(LayerNormBackwardRun run, const Scratch& scratch, cudaStream_t stream) {
  const int64_t D = run.args.D;
  if (D <= 64) return run_backward<T, true, 4, 1>(run, scratch, stream);
  if (D <= 128) return run_backward<T, true, 8, 1>(run, scratch, stream);
  if (D <= 256) return run_backward<T, true, 16, 1>(run, scratch, stream);
  if (D <= 512) return run_backward<T, true, 32, 1>(run, scratch, stream);
  if (D <= 1024) return run_backward<T, true, 32, 2>(run, scratch, stream);
  if (D <= 2048) return run_backward<T, true, 32, 4>(run, scratch, stream);
  if (D <= 4096) return run_backward<T, true, 32, 8>(run, scratch, stream);
  if (D <= kWidest) return run_backward<T, true, 32, 16>(run, scratch, stream);
  cut(run);
  return run_backward<T, true, 32, 16, true>(run, scratch, stream);
}

template <class T>
cudaError_t backward_unaligned(LayerNormBackwardRun run, const Scratch& scratch, cudaStream_t stream) {
  const int64_t D = run.args.D;
  if (D <= 64) return run_backward<T, false, 4, 1>(run, scratch, stream);
  if (D <= 512) return run_backward<T, false, 32, 1>(run, scratch, stream);
  if (D <= 2048) return run_backward<T, false, 32, 4>(run, scratch, stream);
  if (D <= kWidest) return run_backward<T, false, 32, 16>(run, scratch, stream);
  cut(run);
  return run_backward<T, false, 32, 16, true>(run, scratch, stream);
}

}  // namespace

cudaError_t layer_norm_backward(const LayerNormBackwardArgs& args, const Scratch& scratch, cudaStream_t stream) {
  if (args.rows == 0) {
    const size_t bytes = args.D * (args.grad_dtype == DType::kFloat32 ? 4 : 2);
    const cudaError_t error = cudaMemsetAsync(args.grad_weight, 0, bytes, stream);
    return error != cudaSuccess ? error : cudaMemsetAsync(args.grad_bias, 0, bytes, stream);
  }
  if (args.D > kMostPieces * kWidest) return cudaErrorInvalidValue;  // refused in Python
  LayerNormBackwardRun run;
  run.args = args;
  run.weight = parameter(args.norm.weight, args.norm.weight_dtype);
  return for_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t kEach = 16 / sizeof(T);
    const bool whole = args.D % kEach == 0 && aligned(args.x, args.x_stride, kEach) &&
                       aligned(args.grad_y, args.grad_y_stride, kEach) && aligned(args.grad_x, 0, kEach) &&
                       aligned(args.grad_sum, args.grad_sum_stride, kEach) && aligned(args.norm.weight, 0, kEach);
    return whole ? backward_aligned<T>(run, scratch, stream) : backward_unaligned<T>(run, scratch, stream);
  });
}

}  // namespace newllm::cuda
