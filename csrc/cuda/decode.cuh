// Linear layers at one token: memory-bound on the weights, so the weights must never stop coming (decode_stream.cuh).
//
// One kernel runs a program, layer under layer. Blocks do not meet between layers: what they hand to each other are
// words that say themselves whether they are there (DecodeStorage::kWords), one way through L2 and no fence. A block
// overwrites a word only after it has read all of a later layer's output, which nobody makes who still needs the word;
// where a program does not give that, the layer asks for a barrier.
//
// A program of one layer is launched so that it fills its ring while the launch before it is still running
// (programmatic dependent launch).
#pragma once

#include "decode_output.cuh"
#include "decode_pairs.cuh"

namespace newllm::cuda {

constexpr int kPartialFloats = 1024;  // of each of two buffers for the sums of the warps

// A barrier over the grid, all of whose blocks are resident. `arrivals` only ever grows, by gridDim.x a barrier.
__device__ __forceinline__ void grid_barrier(unsigned long long* arrivals) {
  meet();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned long long before = atomicAdd(arrivals, 1ULL);
    const unsigned long long target = (before / gridDim.x + 1) * gridDim.x;
    unsigned long long seen;
    Patience patience;
    do {
      patience.again();
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(arrivals) : "memory");
    } while (seen < target);
  }
  meet();
}

struct DecodeLaunch {
  const DecodeLinear* program;  // on the device; nullptr: the one layer that comes with the launch
  int32_t count;
  int32_t x_bytes;               // shared memory of x, with LayerNorm's parameters
  int32_t norm_bytes;            // at its end
  int32_t slots;                 // of each line's ring
  unsigned long long* counters;  // blocks of launches, of barriers, then of each layer; nullptr for one layer
};

// The layers into shared memory, and what of them belongs to this block. Returns how many launches there were before.
__device__ __forceinline__ unsigned long long load_layers(const DecodeLaunch& launch, const DecodeLinear& single,
                                                          DecodeLinear* layers) {
  __shared__ unsigned long long launches;
  if (threadIdx.x == 0) {
    // Launches follow one another, so all blocks of one find the same multiple.
    launches = launch.counters ? atomicAdd(launch.counters, 1ULL) / gridDim.x : 0;
  }
  const int64_t* from = reinterpret_cast<const int64_t*>(launch.program ? launch.program : &single);
  for (int k = threadIdx.x; k < launch.count * int(sizeof(DecodeLinear) / 8); k += kDecodeAllThreads) {
    reinterpret_cast<int64_t*>(layers)[k] = from[k];
  }
  __syncthreads();
  for (int n = threadIdx.x; n < launch.count; n += kDecodeAllThreads) {
    const int shift = unit_shift(layers[n].parts);
    const unsigned units = (layers[n].N + (1 << shift) - 1) >> shift;
    layers[n].first_unit = int(units * blockIdx.x / gridDim.x);
    layers[n].last_unit = int(units * (blockIdx.x + 1) / gridDim.x);
  }
  __syncthreads();
  return launches;
}

// Shared memory: layers | rings (line, slot, warp, chunk, lane) | x | LayerNorm's parameters | two buffers of sums |
// barriers.
template <class W, int kRows>
__global__ void __launch_bounds__(kDecodeAllThreads, 1)
    decode_kernel(const __grid_constant__ DecodeLaunch launch, const __grid_constant__ DecodeLinear single) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Moments scratch[2][kDecodeWarps];
  DecodeLinear* layers = reinterpret_cast<DecodeLinear*>(shared);
  char* rings = shared + (launch.count * sizeof(DecodeLinear) + 127) / 128 * 128;
  char* x = rings + kLines * launch.slots * kStageBytes;
  float* partial = reinterpret_cast<float*>(x + launch.x_bytes + launch.norm_bytes);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(partial + 2 * kPartialFloats);
  const int warp = threadIdx.x / 32, line = warp < kDecodeWarps ? warp / kWarpsOfLine : warp - kDecodeWarps;
  for (int k = threadIdx.x; k < kLines * launch.slots; k += kDecodeAllThreads) {
    barrier_init(barriers + k, 32);
    barrier_init(barriers + kLines * launch.slots + k, kWarpsOfLine);
  }
  const Progress progress{launch.counters ? launch.counters + 2 : nullptr, load_layers(launch, single, layers)};
  const uint32_t first_mark = uint32_t(progress.launches * launch.count) + 1;
  Ring ring{reinterpret_cast<uint4*>(rings + line * launch.slots * kStageBytes), barriers + line * launch.slots,
            barriers + (kLines + line) * launch.slots, launch.slots};
  if (warp >= kDecodeWarps) {
    stream_weights<W>(layers, launch.count, line, ring);
    return;
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  int first_line = 0, buffer = 0;  // whose the layer's first stage is
#pragma unroll 1
  for (int n = 0; n < launch.count; ++n) {
    const DecodeLinear& layer = layers[n];
    if (layer.barrier && n > 0) grid_barrier(launch.counters + 1);
    const int units = layer.last_unit - layer.first_unit, B = layer.B;
    const bool keeps_x = layer.x_out && blockIdx.x == 0;
    if (units == 0 && !keeps_x) continue;
    const int group = kPartialFloats / (kDecodeWarps * kUnitRows * B);
    Output<W> output;
    output.find(layer, threadIdx.x, 0, min(group, units));
    prepare_x<W, kRows>(layers, n, first_mark, progress, x, x + launch.x_bytes, scratch[n & 1]);
    meet();
    const int stages = stages_of(layer.K, sizeof(W)), stride = x_row_bytes(stages);
    const char* mine = x + warp % kWarpsOfLine * kPieceBytes + threadIdx.x % 4 * 16;
    const uint4* slot = ring.stages + warp % kWarpsOfLine * kPieceVectors + threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < units; first += group) {
      const int last = min(first + group, units);
      float* sums = partial + buffer * kPartialFloats;
      buffer ^= 1;
#pragma unroll 1
      for (int unit = first; unit < last; ++unit) {
        const int skipped = (line - first_line - unit * stages) & (kLines - 1);
        if (skipped >= stages) continue;
        UnitSum<W, kRows> sum;
#pragma unroll 1
        for (int stage = skipped; stage < stages; stage += kLines) {
          barrier_wait(ring.full + ring.slot, ring.parity);
          sum.add(slot + ring.slot * (kWarpsOfLine * kPieceVectors), mine + stage * kStageRowBytes, stride, B);
          __syncwarp();
          if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty + ring.slot);
          ring.advance();
        }
        sum.store(sums + ((unit - first) * kDecodeWarps + warp) * B * kUnitRows, B);
      }
      meet();
      const int outputs = (last - first) * B * kUnitRows;
#pragma unroll 1
      for (int index = threadIdx.x; index / 32 * 32 < outputs; index += kDecodeThreads) {
        if (index >= kDecodeThreads || first > 0) output.find(layer, index, first, last);
        output.finish(layer, sums, first_line + first * stages, stages, first_mark, first_mark + n);
      }
    }
    if (threadIdx.x == 0 && units > 0) progress.add(n);
    first_line = (first_line + units * stages) & (kLines - 1);
  }
}

}  // namespace newllm::cuda
