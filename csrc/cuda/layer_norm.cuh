// What LayerNorm's kernels share, forward and backward: how a row is spread over threads, and how its sums are made.
//
//     vector     16 bytes of a row, kEach elements: what a thread reads at once
//     group      the threads of a row: LANES of a warp (WARPS 1), or WARPS whole ones; each holds COLUMNS columns
//     cluster    rows of more than kWidest columns: each of up to 8 blocks has a piece, and they exchange their sums
//
// Parts of a row are always put together by the same tree: the same inputs give the same bits.
#pragma once

#include <type_traits>

#include "cluster.cuh"
#include "numeric.cuh"

namespace newllm::cuda {

constexpr int kMostPieces = 8, kWidest = 8192;  // blocks of a cluster; columns of one

// LANES and WARPS of a row, COLUMNS of a thread, THREADS of a block, and as many blocks of a multiprocessor as
// registers are to be kept few enough for.
template <int LANES, int WARPS, int COLUMNS, int THREADS, int BLOCKS>
struct Tile {
  static constexpr int kLanes = LANES, kWarps = WARPS, kColumns = COLUMNS, kThreads = THREADS, kBlocks = BLOCKS;
  static constexpr int kGroup = LANES * WARPS, kGroups = THREADS / kGroup;
  static_assert(WARPS == 1 || LANES == 32);
};

// 16 bytes that nobody writes while the kernel runs, unless `there` is false. ONCE: they pass the first-level cache by.
// In assembly, for a branch would keep the next load behind the first use of this one, and what the compiler knows to
// be constant it may load before wait_for_kernel_before.
template <bool ONCE>
__device__ __forceinline__ void load_if(int4& bits, const void* source, bool there) {
  if constexpr (ONCE) {
    asm volatile(
        "{\n.reg .pred there;\nsetp.ne.s32 there, %5, 0;\n"
        "@there ld.global.nc.L1::no_allocate.L2::128B.v4.s32 {%0, %1, %2, %3}, [%4];\n}"
        : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)
        : "l"(source), "r"(int(there)));
  } else {
    asm volatile(
        "{\n.reg .pred there;\nsetp.ne.s32 there, %5, 0;\n"
        "@there ld.global.nc.v4.s32 {%0, %1, %2, %3}, [%4];\n}"
        : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)
        : "l"(source), "r"(int(there)));
  }
}

// STREAM: nobody is expected to read them soon.
template <bool STREAM>
__device__ __forceinline__ void store_if(void* target, const int4& bits, bool there) {
  if constexpr (STREAM) {
    asm volatile(
        "{\n.reg .pred there;\nsetp.ne.s32 there, %5, 0;\n@there st.global.cs.v4.s32 [%4], {%0, %1, %2, %3};\n}" ::"r"(
            bits.x),
        "r"(bits.y), "r"(bits.z), "r"(bits.w), "l"(target), "r"(int(there))
        : "memory");
  } else {
    asm volatile(
        "{\n.reg .pred there;\nsetp.ne.s32 there, %5, 0;\n@there st.global.v4.s32 [%4], {%0, %1, %2, %3};\n}" ::"r"(
            bits.x),
        "r"(bits.y), "r"(bits.z), "r"(bits.w), "l"(target), "r"(int(there))
        : "memory");
  }
}

template <class T, class Tile, bool ALIGNED>
struct RowLayout {
  static constexpr int kEach = 16 / sizeof(T), kVectors = Tile::kColumns / kEach;

  struct alignas(16) Raw {
    T x[kEach];
  };

  // Column of element e of this thread's vector v. Rows that are read element by element are dealt out one by one, so
  // that neighbouring threads read neighbours.
  static __device__ __forceinline__ int column(int v, int e = 0) {
    const int thread = int(threadIdx.x) % Tile::kGroup;
    return ALIGNED ? (v * Tile::kGroup + thread) * kEach + e : (v * kEach + e) * Tile::kGroup + thread;
  }

  static __device__ __forceinline__ bool counts(int v, int e, int width) { return column(v, ALIGNED ? 0 : e) < width; }

  // Vector v of a row; zeros past its end, or where it is not `there`.
  static __device__ __forceinline__ Raw load(const T* row, int width, bool there, int v) {
    Raw raw;
    int4& bits = reinterpret_cast<int4&>(raw);
    if constexpr (ALIGNED) {
      bits = make_int4(0, 0, 0, 0);
      load_if<true>(bits, row + column(v), there && column(v) < width);
    } else {
#pragma unroll
      for (int e = 0; e < kEach; ++e) raw.x[e] = there && counts(v, e, width) ? row[column(v, e)] : T(0.0f);
    }
    return raw;
  }

  template <bool STREAM>
  static __device__ __forceinline__ void store(T* row, int width, bool there, int v, const Raw& raw) {
    if constexpr (ALIGNED) {
      store_if<STREAM>(row + column(v), reinterpret_cast<const int4&>(raw), there && column(v) < width);
    } else {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (there && counts(v, e, width)) row[column(v, e)] = raw.x[e];
      }
    }
  }

  // Keeps the compiler from holding the vector as floats between two uses, in twice the registers.
  static __device__ __forceinline__ void keep_packed(Raw& raw) {
    int4& bits = reinterpret_cast<int4&>(raw);
    asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
  }

  // weight or bias, of dtype W, of vector v's columns, `begin` columns into the row; `absent` where it is not given.
  template <class W>
  static __device__ __forceinline__ void load(const void* given, float absent, int64_t begin, int width, int v,
                                              float (&w)[kEach]) {
    const W* data = static_cast<const W*>(given) + begin;
    if constexpr (ALIGNED) {
      constexpr int kAtOnce = 16 / sizeof(W);
#pragma unroll
      for (int e = 0; e < kEach; e += kAtOnce) {
        struct alignas(16) Few {
          W x[kAtOnce];
        } few;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) few.x[k] = from_float<W>(absent);
        load_if<false>(reinterpret_cast<int4&>(few), data + column(v, e), given != nullptr && column(v) < width);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) w[e + k] = to_float(few.x[k]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        w[e] = given != nullptr && counts(v, e, width) ? to_float(data[column(v, e)]) : absent;
      }
    }
  }

  // The same of a Parameter. W void: of the dtype that it says itself.
  template <class W>
  static __device__ __forceinline__ void load(const Parameter& parameter, float absent, int64_t begin, int width, int v,
                                              float (&w)[kEach]) {
    if constexpr (!std::is_void_v<W>) {
      load<W>(parameter.data, absent, begin, width, v, w);
    } else if (parameter.is_float) {
      load<float>(parameter.data, absent, begin, width, v, w);
    } else {
      load<T>(parameter.data, absent, begin, width, v, w);
    }
  }
};

// Sums over N neighbouring lanes, in each of them.
template <int N, int M>
__device__ __forceinline__ void sum_lanes(float (&x)[M]) {
#pragma unroll
  for (int offset = N / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int m = 0; m < M; ++m) x[m] += __shfl_xor_sync(0xffffffffu, x[m], offset);
  }
}

// The warps of a group, which go on when all have come and see what the others wrote to shared memory.
template <class Tile>
__device__ __forceinline__ void sync_group() {
  if constexpr (Tile::kGroups == 1) {
    __syncthreads();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + int(threadIdx.x) / Tile::kGroup), "n"(Tile::kGroup) : "memory");
  }
}

// A block's piece of its rows: all of them, or block `rank` of a cluster's share.
struct Piece {
  int64_t tile, begin;
  int rank, width;

  template <bool CLUSTER>
  static __device__ __forceinline__ Piece mine(int64_t D, int columns, int cluster) {
    if constexpr (!CLUSTER) return {int64_t(blockIdx.x), 0, 0, int(D)};
    const int rank = int(blockIdx.x) % cluster;
    const int64_t begin = int64_t(rank) * columns, left = D - begin;
    return {int64_t(blockIdx.x) / cluster, begin, rank, int(left < columns ? left : columns)};
  }
};

}  // namespace newllm::cuda
