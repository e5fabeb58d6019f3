// How context_scan goes through time: whole, or in chunks that run side by side, in passes (context_scan/triton.py
// tells of them). A launch is one pass; a block one chunk of one row, but in the last, which is one row.
//
// A Cell has, all called by all threads of a block:
//     row(b)                which row it is
//     begin(float*, chunk)  the state before a chunk from memory (D), or, without, as it is before chunk 0 and guessed
//     elsewhere run(chunk, final)     walks the steps of a chunk; `final` says whether what it finds on its way counts
//     change(float*)        squared relative change of the state against an old one, in thread 0
//     keep(float*)          the state into memory
//     end()                 the state after the last chunk, which the caller wants
#pragma once

#include <cstdint>

namespace newllm::cuda {

enum class Pass : int { kWhole, kFirst, kAgain, kRest };

struct Chunks {
  Pass pass = Pass::kWhole;
  int number = 0;  // of the pass
  int passes = 0;  // before the last, which goes in order of time
  int chunks = 1;
  int64_t steps = 0;    // of a chunk; the last may have fewer
  float tolerance = 0;  // squared, of the change of a state
  int64_t B = 0, D = 0;
  float* ends = nullptr;    // (passes, B, chunks, D): states after every chunk
  float* change = nullptr;  // (passes, B, chunks): by what the state before a chunk moved

  __device__ __forceinline__ float* end_of(int pass_number, int64_t b, int chunk) const {
    return ends + ((pass_number * B + b) * chunks + chunk) * D;
  }
  __device__ __forceinline__ float* change_of(int pass_number, int64_t b, int chunk) const {
    return change + (pass_number * B + b) * chunks + chunk;
  }
  // The state before a chunk as pass `before` left it; that after chunk 0 is final since the first.
  __device__ __forceinline__ float* start_of(int before, int64_t b, int chunk) const {
    return end_of(chunk == 1 ? 0 : before, b, chunk - 1);
  }
  __device__ __forceinline__ bool above(float moved) const { return !(moved <= tolerance); }  // NaN too
};

// A condition that is the same for all threads, in a form that tells the compiler: it need not keep a warp together
// then.
__device__ __forceinline__ bool uniform(bool condition) { return __any_sync(0xffffffffu, condition); }

// Whether the pass before has moved the state before any chunk of the row.
__device__ __forceinline__ bool any_open(const Chunks& chunks, int64_t b) {
  bool open = false;
  for (int chunk = 2 + threadIdx.x; chunk < chunks.chunks; chunk += blockDim.x) {
    open |= chunks.above(*chunks.change_of(chunks.number - 1, b, chunk));
  }
  return uniform(__syncthreads_or(open));
}

// `flag` is shared by the block.
template <class Cell>
__device__ __forceinline__ void walk_chunks(const Chunks& chunks, Cell& cell, int& flag) {
  const bool side_by_side = chunks.pass == Pass::kFirst || chunks.pass == Pass::kAgain,
             rest = chunks.pass == Pass::kRest;
  const int number = chunks.number, columns = side_by_side ? chunks.chunks - 1 : 1;
  const int64_t b = blockIdx.x / columns;
  if (rest && !any_open(chunks, b)) return;
  int chunk = rest ? 2 : int(blockIdx.x % columns) + (chunks.pass == Pass::kAgain ? 1 : 0);
  const int stop = rest ? chunks.chunks : chunk + 1;
  bool running = false;  // the chunk before was walked again by this block, so the state is new
  cell.row(b);
  for (; chunk < stop; ++chunk) {
    const bool last = chunk == chunks.chunks - 1;
    const float* old = chunks.end_of(number - 1, b, chunk);
    float* end = chunks.end_of(number, b, chunk);
    if (!running && number > 1 && (chunk == 1 || !uniform(chunks.above(*chunks.change_of(number - 1, b, chunk))))) {
      if (rest || last) continue;
      if (threadIdx.x == 0) *chunks.change_of(number, b, chunk + 1) = 0.0f;
      for (int64_t k = threadIdx.x; k < chunks.D; k += blockDim.x) end[k] = old[k];
      continue;
    }
    if (!running) cell.begin(number == 0 ? nullptr : chunks.start_of(number - 1, b, chunk), chunk);
    cell.run(chunk, number > 0 || chunk == 0);
    if (last) {
      cell.end();
      continue;
    }
    const float moved = number > 0 ? cell.change(old) : 0.0f;
    if (!rest) {
      if (number > 0 && threadIdx.x == 0) *chunks.change_of(number, b, chunk + 1) = moved;
      cell.keep(end);
    } else {
      if (threadIdx.x == 0) flag = chunks.above(moved);
      __syncthreads();
      running = uniform(flag);
      __syncthreads();
    }
  }
}

}  // namespace newllm::cuda
