// How a recurrence is cut for the device it runs on, and its launches.
#pragma once

#include "device.h"
#include "kernels.h"
#include "recurrence.cuh"
#include "recurrence_ops.cuh"

namespace newllm::cuda {

constexpr int kMostChunks = 256;

// Starts of the chunks of a sequence from their pairs; one thread a column, few columns and chunks.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    chunk_starts_kernel(const float* pairs, const float* start, float* starts, int64_t N, int64_t D, int chunks) {
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x, n = k / D, column = k % D;
  if (n >= N) return;
  float state = start != nullptr ? start[n * D + column] : 0.0f;
#pragma unroll 8
  for (int64_t chunk = n * chunks; chunk < (n + 1) * chunks; ++chunk) {
    starts[chunk * D + column] = state;
    state = advance(pairs[2 * chunk * D + column], state, pairs[(2 * chunk + 1) * D + column]);
  }
}

// Whether all rows begin at multiples of 16 bytes and are whole multiples of them.
inline bool rows_aligned(const RecurrenceArgs& args, int64_t element_size) {
  const int64_t each = 16 / element_size;
  const auto fits = [&](const View3& view) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride_b % each == 0 && view.stride_t % each == 0;
  };
  bool all = args.D % each == 0;
  for (const View3& view : args.in) all = all && fits(view);
  for (const View3& view : args.out) all = all && fits(view);
  return all;
}

template <class Op, class T, int R, int W, int STAGES, bool ALIGNED, bool CLUSTER, bool PAIRS>
struct Launch {
  static constexpr auto kKernel = recurrence_kernel<Op, T, R, W, STAGES, ALIGNED, CLUSTER, PAIRS>;
  static constexpr size_t kShared = sizeof(typename Recurrence<Op, T, R, W, STAGES, ALIGNED, CLUSTER, PAIRS>::Shared);
  static_assert(kShared <= (CLUSTER ? 227 : 163) * 1024);  // of compute capability 9.0 and 8.0

  // More than 48 KB of shared memory has to be asked for, once a device. In clusters all that a block can have, for
  // clusters_that_fit: no thread may lower the limit while another asks there.
  static cudaError_t allow_shared_memory(int device) {
    static std::atomic<uint64_t> done{0};
    const uint64_t bit = uint64_t(1) << device;
    if (done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    int bytes = int(kShared);
    cudaError_t error = cudaSuccess;
    if (CLUSTER) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 bytes);
    if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
    return error;
  }

  static cudaError_t run(const RecurrenceArgs& args, int64_t blocks, int device, cudaStream_t stream) {
    const cudaError_t error = allow_shared_memory(device);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(32 * W);
    config.dynamicSmemBytes = kShared;
    config.stream = stream;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim.x = static_cast<unsigned>(args.cluster);
    attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
    config.attrs = attribute;
    config.numAttrs = CLUSTER ? 1 : 0;
    return cudaLaunchKernelEx(&config, kKernel, args);
  }

  // The most blocks of a cluster of which `clusters` run at the same time, each with a multiprocessor of its own: two
  // on one would hold up their clusters. Multiprocessors come in groups of 16 or 18, so it is seldom a power of two.
  static int widest_cluster(int64_t clusters, int device) {
    static std::atomic<int> most[kMostDevices][kMostCluster + 1];  // clusters that fit, plus one; 0: not asked yet
    for (int size = kMostCluster; size > 1; --size) {
      std::atomic<int>& known = most[device][size];
      if (known.load(std::memory_order_relaxed) == 0) {
        const int fit = clusters_that_fit(size, device);
        if (fit == 0) cudaGetLastError();  // of a question that failed: or the next launch would report it
        known.store(1 + fit);
      }
      if (known.load(std::memory_order_relaxed) - 1 >= clusters) return size;
    }
    return 1;
  }

 private:
  static int clusters_that_fit(int size, int device) {
    int shared = 0, found = 0;
    cudaFuncAttributes attributes;
    const void* kernel = reinterpret_cast<const void*>(kKernel);
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return 0;
    if (attributes.ptxVersion < 90) return 0;  // compiled on loading from PTX of an architecture without clusters
    if (allow_shared_memory(device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
    if (kShared > size_t(shared)) return 0;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(size));
    config.blockDim = dim3(32 * W);
    config.dynamicSmemBytes = size_t(shared);  // all of a multiprocessor
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim.x = static_cast<unsigned>(size);
    attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&found, kernel, &config) != cudaSuccess) found = 0;
    return found;
  }
};

// Tiles of an operation: steps a warp, warps, stages of a block alone and of one in a cluster.
template <int R_, int W_, int STAGES_, int CLUSTER_R_, int CLUSTER_W_, int CLUSTER_STAGES_>
struct Tiles {
  static constexpr int R = R_, W = W_, STAGES = STAGES_;
  static constexpr int CLUSTER_R = CLUSTER_R_, CLUSTER_W = CLUSTER_W_, CLUSTER_STAGES = CLUSTER_STAGES_;
};

// The first three ways below, in the order of their cost: one block a group of columns where these fill the GPU;
// clusters; chunks in three launches, where clusters of the largest size leave half of it idle.
template <class Op, class T, class Tiles, bool ALIGNED>
cudaError_t run_recurrence(RecurrenceArgs args, int64_t N, const Scratch& scratch, cudaStream_t stream) {
  using Alone = Launch<Op, T, Tiles::R, Tiles::W, Tiles::STAGES, ALIGNED, false, false>;
  using Reduce = Launch<Op, T, Tiles::R, Tiles::W, Tiles::STAGES, ALIGNED, false, true>;
  constexpr int64_t kWindow = Tiles::R * Tiles::W;
  args.column_blocks = int((args.D + kColumns - 1) / kColumns);
  args.chunk_steps = most(1, args.T);
  const int64_t blocks = N * args.column_blocks;
  if (blocks == 0) return cudaSuccess;
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  if (blocks >= int64_t(1) << 31) return cudaErrorInvalidConfiguration;
  // With more than half the multiprocessors at work (80 of 132 moved 90% of what a copy does), reading a and b twice in
  // chunks would cost more than idling does.
  if (2 * blocks > device.multiprocessors || args.T < 4 * kWindow) {
    return Alone::run(args, blocks, device.index, stream);
  }
  if constexpr (ALIGNED) {
    if (device.major >= 9) {
      using Together = Launch<Op, T, Tiles::CLUSTER_R, Tiles::CLUSTER_W, Tiles::CLUSTER_STAGES, ALIGNED, true, false>;
      args.cluster = Together::widest_cluster(blocks, device.index);
      const bool fills = 2 * blocks * args.cluster >= device.multiprocessors || args.cu_seqlens != nullptr;
      if (args.cluster > 1 && fills) return Together::run(args, blocks * args.cluster, device.index, stream);
      args.cluster = 1;
    }
  }
  const int64_t wanted = most(1, least(kMostChunks, 2 * device.multiprocessors / blocks));
  if (wanted == 1 || args.cu_seqlens != nullptr) return Alone::run(args, blocks, device.index, stream);
  args.chunk_steps = ((args.T + wanted - 1) / wanted + kWindow - 1) / kWindow * kWindow;
  args.chunks = int((args.T + args.chunk_steps - 1) / args.chunk_steps);
  const int64_t pieces = N * args.chunks;
  const float* start = args.start;
  args.pairs = scratch.allocate(scratch.context, 3 * pieces * args.D);
  float* starts = args.pairs + 2 * pieces * args.D;
  args.start = nullptr;
  error = Reduce::run(args, blocks * args.chunks, device.index, stream);
  if (error != cudaSuccess) return error;
  constexpr int kThreads = 64;
  const int64_t columns = N * args.D;
  chunk_starts_kernel<kThreads><<<static_cast<unsigned>((columns + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      args.pairs, start, starts, N, args.D, args.chunks);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  args.start = starts;
  return Alone::run(args, blocks * args.chunks, device.index, stream);
}

// What a block alone takes of shared memory, at most: every call may come to that.
template <class Op, class Tiles16, class Tiles32>
constexpr int64_t kSharedMemory =
    most(Launch<Op, __half, Tiles16::R, Tiles16::W, Tiles16::STAGES, true, false, false>::kShared,
         Launch<Op, float, Tiles32::R, Tiles32::W, Tiles32::STAGES, true, false, false>::kShared);

// Calls run_recurrence for the dtype of storage; Tiles16 and Tiles32 for 16 and 32 bits.
template <class Op, class Tiles16, class Tiles32>
cudaError_t run_recurrence(const RecurrenceArgs& args, const ScanShape& shape, const Scratch& scratch,
                           cudaStream_t stream) {
  const int64_t N = shape.num_sequences;
  const auto of = [&](auto tag, auto tiles) {
    using T = decltype(tag);
    using Tiles = decltype(tiles);
    return rows_aligned(args, sizeof(T)) ? run_recurrence<Op, T, Tiles, true>(args, N, scratch, stream)
                                         : run_recurrence<Op, T, Tiles, false>(args, N, scratch, stream);
  };
  switch (shape.dtype) {
    case DType::kFloat32: return of(float{}, Tiles32{});
    case DType::kBFloat16: return of(__nv_bfloat16{}, Tiles16{});
    case DType::kFloat16: return of(__half{}, Tiles16{});
    default: return cudaErrorInvalidValue;  // float64 is refused in Python
  }
}

inline RecurrenceArgs recurrence_args(const ScanShape& shape) {
  RecurrenceArgs args;
  args.T = shape.T;
  args.D = shape.D;
  args.cu_seqlens = shape.cu_seqlens;
  return args;
}

}  // namespace newllm::cuda
