// What the recurrences (recurrence.cuh) are given, and how they think of time: arguments, pairs, pieces, walks.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "../args.h"

namespace newllm::cuda {

constexpr int kMostInputs = 5, kMostOutputs = 3, kMostCluster = 8;
constexpr int kColumns = 64;  // of a block

struct RecurrenceArgs {
  View3 in[kMostInputs];  // one may be absent: zeros
  View3 out[kMostOutputs];
  const float* start = nullptr;  // (pieces, D), the state before each piece; absent: zeros
  const float* edge = nullptr;   // (N, D), what stands before the first step of the input kPrevious; absent: zeros
  float* last = nullptr;         // (N, D), the state after the last step
  float* pairs = nullptr;        // (pieces, 2, D), written by PAIRS
  const int64_t* cu_seqlens = nullptr;
  int64_t T = 0, D = 0, chunk_steps = 0;
  int chunks = 1;  // pieces of a sequence
  int column_blocks = 1, cluster = 1;
  bool from_end = false;  // walk time from the end
};

__host__ __device__ constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// a x + b, where a is the product of many decays: one that has overflowed must not make a NaN of a state of zero.
__device__ __forceinline__ float advance(float a, float x, float b) { return x == 0.0f ? b : fmaf(a, x, b); }

// s -> a s + b for a thread's two columns.
struct alignas(16) Pair {
  float a[2] = {1.0f, 1.0f}, b[2] = {0.0f, 0.0f};

  // The next step.
  __device__ __forceinline__ void then_step(const Pair& next) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      b[v] = fmaf(next.a[v], b[v], next.b[v]);
      a[v] *= next.a[v];
    }
  }

  // Many steps.
  __device__ __forceinline__ void then(const Pair& next) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      b[v] = advance(next.a[v], b[v], next.b[v]);
      a[v] *= next.a[v];
    }
  }

  __device__ __forceinline__ void move(float (&state)[2]) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) state[v] = advance(a[v], state[v], b[v]);
  }
};

// Steps [first, first + steps) of a sequence of `length` steps that begins at row `row` of batch `b`.
struct Piece {
  int64_t n, b, row, length, first, steps;
  bool is_last;

  __device__ Piece(const RecurrenceArgs& args, int64_t index) : n(index / args.chunks), b(n), row(0), length(args.T) {
    if (args.cu_seqlens != nullptr) {
      b = 0;
      row = args.cu_seqlens[n];
      length = args.cu_seqlens[n + 1] - row;
    }
    const int64_t chunk = index % args.chunks;
    first = chunk * args.chunk_steps;
    steps = most(0, least(length - first, args.chunk_steps));
    is_last = chunk == args.chunks - 1;
  }
};

// One input or output, its rows counted in the direction of the walk.
template <class T>
struct Walk {
  T* base = nullptr;
  int64_t stride = 0;

  __device__ __forceinline__ Walk(const View3& view, const Piece& piece, bool from_end) {
    if (view.data == nullptr) return;
    const int64_t row = piece.row + (from_end ? piece.length - 1 : 0);
    base = static_cast<T*>(view.data) + piece.b * view.stride_b + row * view.stride_t;
    stride = from_end ? -view.stride_t : view.stride_t;
  }
};

}  // namespace newllm::cuda
