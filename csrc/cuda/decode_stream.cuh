// The weights of the layers of one token, as a stream that never waits for a layer to finish.
//
// The product of a "unit", 8 rows of weights (for `parts` matrices 8 / parts columns of each), is cut along K into
// stages of 1024 bytes a row. A block has four lines, each of one warp that copies and two that multiply, and a ring
// of stages in shared memory; stage n of a block, counted through all layers, belongs to line n % 4. The copying warp
// goes on into the layers to come while the others wait for a layer before: weights depend on nothing. But it keeps
// only a few stages on their way: what waits in the memory system's queues would hold up the activations.
#pragma once

#include "../decode_args.h"
#include "copy_async.cuh"
#include "numeric.cuh"

namespace newllm::cuda {

constexpr int kLines = 4, kWarpsOfLine = 2;
constexpr int kDecodeWarps = kLines * kWarpsOfLine, kDecodeThreads = kDecodeWarps * 32;  // those that multiply
constexpr int kDecodeAllThreads = kDecodeThreads + kLines * 32;
constexpr int kUnitRows = 8;
constexpr int kChunks = 8, kPieceBytes = kChunks * 64;  // of each row, for one warp; a chunk is 16 bytes of four lanes
constexpr int kStageRowBytes = kWarpsOfLine * kPieceBytes, kStageBytes = kUnitRows * kStageRowBytes;
constexpr int kPieceVectors = kChunks * 32;  // uint4 of a piece of 8 rows

// log2 of the columns of one matrix in a unit; with three matrices two of its eight rows stay empty.
__host__ __device__ __forceinline__ int unit_shift(int parts) { return parts == 1 ? 3 : parts == 2 ? 2 : 1; }

// Stages of a unit.
__host__ __device__ __forceinline__ int stages_of(int K, int element_size) {
  return (K * element_size + kStageRowBytes - 1) / kStageRowBytes;
}

// LayerNorm's parameters of K columns: four weights, four biases, ...
__host__ __device__ __forceinline__ int norm_bytes(int K, int element_size) { return (K + 3) / 4 * 8 * element_size; }

// ---- barriers in shared memory ----

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives when this thread's copies so far have.
__device__ __forceinline__ void barrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t passed;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(passed)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(passed)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#endif
  } while (!passed);
}

// A line's ring: `slots` stages, and for each whether it is full and whether it is empty.
struct Ring {
  uint4* stages;    // (slot, warp, chunk, lane)
  uint64_t* full;   // 32 arrivals: the lanes that copied
  uint64_t* empty;  // 2 arrivals: the warps that have read
  int slots, slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// ---- the copying warps ----

// This lane's share of a row's stage: 16 bytes of every chunk. A stage goes in halves, the next asked for when the one
// before the last has come: so between 16 and 32 KB a block are on their way.
template <class W>
__device__ __forceinline__ void copy_row(uint4* to, const char* from, int bytes_left, bool aligned, uint64_t* full) {
  if (aligned) {
#pragma unroll
    for (int k = 0; k < kWarpsOfLine * kChunks; ++k) {
      copy_async<16>(to + 32 * k, from + 64 * k, bytes_left > 64 * k);
      if (k % kChunks != kChunks - 1) continue;
      if (k == kWarpsOfLine * kChunks - 1) barrier_arrive_after_copies(full);
      copy_async_commit();
      copy_async_wait<1>();
    }
    return;
  }
#pragma unroll 1
  for (int k = 0; k < kWarpsOfLine * kChunks; ++k) {  // rows that do not begin or end at 16 bytes
#pragma unroll 1
    for (int e = 0; e < 16 / int(sizeof(W)); ++e) {
      const int at = 64 * k + e * int(sizeof(W));
      W* element = reinterpret_cast<W*>(to + 32 * k) + e;
      *element = at < bytes_left ? *reinterpret_cast<const W*>(from + at) : from_float<W>(0.0f);
    }
  }
  barrier_arrive(full);
}

// Everything that one line's warps will multiply, in their order.
template <class W>
__device__ void stream_weights(const DecodeLinear* layers, int count, int line, Ring ring) {
  const int lane = threadIdx.x % 32;
  int stage = line;  // of this line, counted from the first of the layer
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    const DecodeLinear& layer = layers[n];
    const int per_unit = stages_of(layer.K, sizeof(W)), stages = (layer.last_unit - layer.first_unit) * per_unit;
    const int shift = unit_shift(layer.parts), part = lane / 4 >> shift, row_bytes = layer.K * int(sizeof(W));
    const bool part_there = part < layer.parts;
    const int64_t stride = layer.weight_stride * int64_t(sizeof(W));
    const char* base = static_cast<const char*>(layer.weight[part_there ? part : 0]) + lane % 4 * 16;
    bool aligned = (stride | row_bytes) % 16 == 0;
    for (int p = 0; p < layer.parts; ++p) aligned = aligned && reinterpret_cast<uintptr_t>(layer.weight[p]) % 16 == 0;
#pragma unroll 1
    for (; stage < stages; stage += kLines) {
      const int unit = stage / per_unit, at = (stage - unit * per_unit) * kStageRowBytes;
      const int column = ((layer.first_unit + unit) << shift) + (lane / 4 & ((1 << shift) - 1));
      const bool there = part_there && column < layer.N;
      barrier_wait(ring.empty + ring.slot, ring.parity ^ 1);
      copy_row<W>(ring.stages + ring.slot * (kWarpsOfLine * kPieceVectors) + lane,
                  base + (there ? column * stride : 0) + at, there ? row_bytes - at - lane % 4 * 16 : 0, aligned,
                  ring.full + ring.slot);
      ring.advance();
    }
    stage -= stages;
  }
}

// ---- the product ----

__device__ __forceinline__ void multiply_tile(float (&sum)[4], uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3,
                                              uint32_t w0, uint32_t w1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(w0), "r"(w1));
}

__device__ __forceinline__ void multiply_tile(float (&sum)[4], uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3,
                                              uint32_t w0, uint32_t w1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(w0), "r"(w1));
}

// x in shared memory: rows of whole stages and 64 bytes more, so that two rows lie in different banks.
__host__ __device__ __forceinline__ int x_row_bytes(int stages) { return stages * kStageRowBytes + 64; }

// Sums of a unit over the warp's pieces: 16-bit weights on the tensor cores, x as the 16 rows of A, weights as the 8
// columns of B. Which k is called which is free as long as both agree: a lane's 16 bytes are its k of two tiles.
template <class W, int kRows>
struct UnitSum {
  float sums[4][4] = {};  // of every other tile of a lane's two: no product waits for the one before

  // x: at this piece and this lane's 16 bytes of the first chunk. Rows past B are not there: what comes of them is not
  // kept, so they are read as the last one, without a branch around the load.
  __device__ __forceinline__ void add(const uint4* slots, const char* x, int stride, int B) {
    const int row = threadIdx.x % 32 / 4;
    const char* low_row = x + min(row, B - 1) * stride;
    const char* high_row = x + min(row + 8, B - 1) * stride;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const uint4 w = slots[32 * k];
      const uint4 low = *reinterpret_cast<const uint4*>(low_row + 64 * k);
      uint4 high = make_uint4(0, 0, 0, 0);
      if (kRows > 8) high = *reinterpret_cast<const uint4*>(high_row + 64 * k);
      multiply_tile(sums[k % 2], low.x, high.x, low.y, high.y, w.x, w.y, W{});
      multiply_tile(sums[2 + k % 2], low.z, high.z, low.w, high.w, w.z, w.w, W{});
    }
  }

  // To partial (B, 8).
  __device__ __forceinline__ void store(float* partial, int B) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    float2* to = reinterpret_cast<float2*>(partial + row * kUnitRows + column);
    if (row < B) to[0] = make_float2(total(0), total(1));
    if (kRows > 8 && row + 8 < B) to[8 * kUnitRows / 2] = make_float2(total(2), total(3));
  }

 private:
  __device__ __forceinline__ float total(int k) const { return (sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]); }
};

template <int kRows>
struct UnitSum<float, kRows> {
  float sum[kRows] = {};

  __device__ __forceinline__ void add(const uint4* slots, const char* x, int stride, int B) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const float4 w = *reinterpret_cast<const float4*>(slots + 32 * k);
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        if (b >= B) break;
        const float4 v = *reinterpret_cast<const float4*>(x + b * stride + 64 * k);
        sum[b] = fmaf(w.x, v.x, fmaf(w.y, v.y, fmaf(w.z, v.z, fmaf(w.w, v.w, sum[b]))));
      }
    }
  }

  __device__ __forceinline__ void store(float* partial, int B) {
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (b >= B) break;
      float total = sum[b];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      if (threadIdx.x % 4 == 0) partial[b * kUnitRows + threadIdx.x % 32 / 4] = total;
    }
  }
};

}  // namespace newllm::cuda
