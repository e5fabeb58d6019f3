// LayerNorm forward: which tile for which width. Those of 256, 1024 and 4096 columns of 16 bits are the fastest of
// those measured on an H100 (docs/performance.md), the others follow from them.
#include "layer_norm_forward.cuh"
#include "layer_norm_launch.cuh"

namespace newllm::cuda {
namespace {

template <class T, class W, bool ALIGNED, class Tile, int ROWS, bool RESIDUAL, bool CLUSTER>
cudaError_t run_forward(const LayerNormRun& run, cudaStream_t stream) {
  constexpr auto kKernel = layer_norm_kernel<T, W, Tile, ROWS, ALIGNED, RESIDUAL, CLUSTER>;
  constexpr int64_t kRows = Tile::kGroups * ROWS;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  Grid grid;
  grid.blocks = (run.args.rows + kRows - 1) / kRows * run.cluster;
  grid.threads = Tile::kThreads;
  grid.cluster = run.cluster;
  grid.early = true;
  return launch<kKernel>(grid, device, stream, run);
}

// Two rows a group, of several warps: as many bytes on their way as with a residual, and half as many meetings.
template <class T, class W, bool ALIGNED, class Residual, class Alone = Residual, bool CLUSTER = false>
cudaError_t run_forward(const LayerNormRun& run, cudaStream_t stream) {
  constexpr int kTwo = sizeof(T) == 2 && ALIGNED && Alone::kWarps > 1 && (Alone::kColumns < 32 || CLUSTER) ? 2 : 1;
  return run.args.residual != nullptr ? run_forward<T, W, ALIGNED, Residual, 1, true, CLUSTER>(run, stream)
                                      : run_forward<T, W, ALIGNED, Alone, kTwo, false, CLUSTER>(run, stream);
}

using Narrowest = Tile<4, 1, 16, 256, 4>;  // lanes, warps, columns of a thread, threads, blocks of a multiprocessor
using Warp = Tile<32, 1, 32, 128, 4>;
using Widest = Tile<32, 16, 16, 512, 2>;
using InPieces = Tile<32, 8, 32, 256, 2>;

template <class T, class W>
cudaError_t forward_aligned(LayerNormRun run, cudaStream_t stream) {
  constexpr int kFive = sizeof(T) == 2 ? 5 : 4;  // a row of float32 takes twice the registers
  using Alone = std::conditional_t<sizeof(T) == 2, Tile<32, 8, 32, 256, 3>, Widest>;
  const int64_t D = run.args.D;
  if (D <= 64) return run_forward<T, W, true, Narrowest>(run, stream);
  if (D <= 128) return run_forward<T, W, true, Tile<8, 1, 16, 256, kFive>>(run, stream);
  if (D <= 256) return run_forward<T, W, true, Tile<16, 1, 16, 256, kFive>>(run, stream);
  if (D <= 512) return run_forward<T, W, true, Tile<32, 1, 16, 256, kFive>>(run, stream);
  if (D <= 768) return run_forward<T, W, true, Tile<32, 1, 24, 128, sizeof(T) == 2 ? 6 : 4>>(run, stream);
  if (D <= 1024)
    return run_forward<T, W, true, Tile<32, 1, 32, 128, sizeof(T) == 4 ? 4 : sizeof(W) == 4 ? 5 : 6>>(run, stream);
  if (D <= 2048) return run_forward<T, W, true, Tile<32, 4, 16, 256, 3>>(run, stream);
  if (D <= 3072) return run_forward<T, W, true, Tile<32, 4, 24, 128, 4>>(run, stream);
  if (D <= 4096) return run_forward<T, W, true, Tile<32, 8, 16, 256, 3>>(run, stream);
  if (D <= 6144) return run_forward<T, W, true, Tile<32, 8, 24, 256, 2>>(run, stream);
  if (D <= kWidest) return run_forward<T, W, true, Widest, Alone>(run, stream);
  cut(run);
  return run_forward<T, W, true, InPieces, InPieces, true>(run, stream);
}

template <class T>
cudaError_t forward_unaligned(LayerNormRun run, cudaStream_t stream) {
  const int64_t D = run.args.D;
  if (D <= 64) return run_forward<T, void, false, Narrowest>(run, stream);
  if (D <= 1024) return run_forward<T, void, false, Warp>(run, stream);
  if (D <= kWidest) return run_forward<T, void, false, Widest>(run, stream);
  cut(run);
  return run_forward<T, void, false, Widest, Widest, true>(run, stream);
}

}  // namespace

int64_t layer_norm_max_width(int device) {
  constexpr auto kKernel = layer_norm_kernel<__half, __half, Widest, 1, true, false, true>;
  int before = 0;
  Device asked;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return 0;
  const bool clusters = current_device(asked) == cudaSuccess && of_hopper<kKernel>(asked);
  cudaSetDevice(before);
  return clusters ? kMostPieces * kWidest : kWidest;
}

cudaError_t layer_norm_forward(const LayerNormArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.D > kMostPieces * kWidest) return cudaErrorInvalidValue;  // refused in Python
  const LayerNormRun run{args, parameter(args.norm.weight, args.norm.weight_dtype),
                         parameter(args.norm.bias, args.norm.bias_dtype), 1.0f / float(args.D)};
  return for_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t kEach = 16 / sizeof(T);
    const bool whole = args.D % kEach == 0 && aligned(args.x, args.x_stride, kEach) && aligned(args.y, 0, kEach) &&
                       aligned(args.residual, args.residual_stride, kEach) && aligned(args.sum, 0, kEach) &&
                       aligned(args.norm.weight, 0, kEach) && aligned(args.norm.bias, 0, kEach);
    const bool floats = run.weight.is_float;
    if (!whole || run.bias.is_float != floats) return forward_unaligned<T>(run, stream);
    return floats ? forward_aligned<T, float>(run, stream) : forward_aligned<T, T>(run, stream);
  });
}

}  // namespace newllm::cuda
