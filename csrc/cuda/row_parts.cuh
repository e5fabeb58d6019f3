// A row of up to THREADS * kColumns columns, spread over a group of threads: pieces of E neighbours, the threads side
// by side, so that a warp's access is one stretch of memory.
#pragma once

#include <type_traits>

#include "copy_async.cuh"
#include "numeric.cuh"

namespace newllm::cuda {

// The number of the warp, in a form that tells the compiler that it is the same for all lanes.
__device__ __forceinline__ int warp_of_block() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0); }

template <class T, int E_, int PIECES_, int THREADS, bool ALIGNED_>
struct RowParts {
  using Storage = T;
  static constexpr int E = E_, PIECES = PIECES_;
  static constexpr int kColumns = E * PIECES;                // of a thread
  static constexpr int kThreads = THREADS;                   // of a row; a power of two
  static constexpr int W = THREADS > 32 ? THREADS / 32 : 1;  // warps
  static constexpr bool ALIGNED = ALIGNED_;                  // rows begin and end at whole pieces

  static constexpr int kBytes = E * sizeof(T) < 16 ? E * sizeof(T) : 16;  // of an access
  static constexpr int kParts = E * sizeof(T) / kBytes;                   // accesses of a piece

  struct alignas(kBytes) Piece {
    T x[E];
  };
  struct Raw {
    Piece piece[PIECES];
  };

  // The first column of a thread's piece.
  static __device__ __forceinline__ int column(int thread, int piece) { return (piece * kThreads + thread) * E; }

  static __device__ __forceinline__ int column_of(int thread, int k) { return column(thread, k / E) + k % E; }

  // Zeros past the end of the row.
  static __device__ __forceinline__ void load(const T* row, int D, int thread, Raw& raw) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int at = column(thread, p);
      if constexpr (ALIGNED) {
        using Bits = std::conditional_t<kBytes == 16, int4, int2>;
#pragma unroll
        for (int n = 0; n < kParts; ++n) {
          Bits bits = {};
          if (at < D) bits = __ldcs(reinterpret_cast<const Bits*>(row + at) + n);
          reinterpret_cast<Bits*>(&raw.piece[p])[n] = bits;
        }
      } else {
#pragma unroll
        for (int e = 0; e < E; ++e) raw.piece[p].x[e] = at + e < D ? row[at + e] : T(0.0f);
      }
    }
  }

  static __device__ __forceinline__ void store(T* row, int D, int thread, const Raw& raw) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int at = column(thread, p);
      if constexpr (ALIGNED) {
        if (at < D) *reinterpret_cast<Piece*>(row + at) = raw.piece[p];
      } else {
#pragma unroll
        for (int e = 0; e < E; ++e) {
          if (at + e < D) row[at + e] = raw.piece[p].x[e];
        }
      }
    }
  }

  // The thread's own pieces of a row on their way into `slots` (PIECES, kThreads); whole pieces only.
  static __device__ __forceinline__ void copy(Piece* slots, const T* row, int D, int thread) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int at = column(thread, p);
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        copy_async<kBytes>(reinterpret_cast<char*>(slots + p * kThreads + thread) + n * kBytes,
                           reinterpret_cast<const char*>(row + (at < D ? at : 0)) + n * kBytes, at < D);
      }
    }
  }

  static __device__ __forceinline__ void take(const Piece* slots, int thread, Raw& raw) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) raw.piece[p] = slots[p * kThreads + thread];
  }

  static __device__ __forceinline__ float get(const Raw& raw, int k) { return to_float(raw.piece[k / E].x[k % E]); }

  static __device__ __forceinline__ void unpack(const Raw& raw, float (&x)[kColumns]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // two at a time, in one instruction each
      const uint32_t* pairs = reinterpret_cast<const uint32_t*>(&raw);
#pragma unroll
      for (int k = 0; k < kColumns; k += 2) {
        x[k] = __uint_as_float(pairs[k / 2] << 16);
        x[k + 1] = __uint_as_float(pairs[k / 2] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) x[k] = get(raw, k);
    }
  }

  static __device__ __forceinline__ void pack(const float (&x)[kColumns], Raw& raw) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) raw.piece[k / E].x[k % E] = from_float<T>(x[k]);
  }

  // Whether any of a warp's elements has at least the magnitude `edge`, which is given twice, packed; never in float32.
  static __device__ __forceinline__ bool any_reaches(const Raw& raw, uint32_t edge) {
    if constexpr (sizeof(T) == 4) {
      return false;
    } else {
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
      const Pair* pairs = reinterpret_cast<const Pair*>(&raw);
      Pair largest = __habs2(pairs[0]);
#pragma unroll
      for (int k = 1; k < kColumns / 2; ++k) largest = __hmax2(largest, __habs2(pairs[k]));
      return __any_sync(0xffffffffu, __hge2_mask(largest, reinterpret_cast<const Pair&>(edge)) != 0);
    }
  }

  // A state (D) in float32, 0 past its end.
  static __device__ __forceinline__ void load_state(const float* state, int D, int thread, float (&x)[kColumns]) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) x[k] = column_of(thread, k) < D ? state[column_of(thread, k)] : 0.0f;
  }

  static __device__ __forceinline__ void store_state(float* state, int D, int thread, const float (&x)[kColumns]) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (column_of(thread, k) < D) state[column_of(thread, k)] = x[k];
    }
  }

  // weight or bias (D), float32 or as the rows; `absent` where there is no such parameter, 0 past the end of the row.
  static __device__ __forceinline__ void parameter(const void* data, DType dtype, float absent, int D, int thread,
                                                   float (&x)[kColumns]) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int at = column_of(thread, k);
      x[k] = absent;
      if (at >= D) {
        x[k] = 0.0f;
      } else if (data != nullptr) {
        x[k] = dtype == DType::kFloat32 ? __ldg(static_cast<const float*>(data) + at)
                                        : to_float(static_cast<const T*>(data)[at]);
      }
    }
  }
};

}  // namespace newllm::cuda
