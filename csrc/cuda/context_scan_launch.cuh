// What the launches of context_scan have in common, forward and backward.
#pragma once

#include "context_passes.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace newllm::cuda {

// Of one block, at most.
int64_t context_scan_backward_shared_memory(int64_t D);

// Launches all passes: launch(chunks, blocks) for each, until one fails.
template <class Launch>
cudaError_t launch_passes(Chunks chunks, const Launch& launch) {
  const auto pass = [&](Pass kind, int number, int64_t blocks) {
    chunks.pass = kind;
    chunks.number = number;
    return blocks < int64_t(1) << 31 ? launch(chunks, blocks) : cudaErrorInvalidConfiguration;
  };
  if (chunks.chunks == 1) return pass(Pass::kWhole, 0, chunks.B);
  for (int number = 0; number < kContextPasses; ++number) {
    const cudaError_t error = pass(number == 0 ? Pass::kFirst : Pass::kAgain, number, chunks.B * (chunks.chunks - 1));
    if (error != cudaSuccess) return error;
  }
  return pass(Pass::kRest, kContextPasses, chunks.B);
}

inline Chunks chunks_of(const TimeChunks& time, int64_t B, int64_t D, const Scratch& scratch) {
  Chunks chunks;
  chunks.chunks = time.chunks;
  chunks.steps = time.steps;
  chunks.tolerance = time.tolerance;
  chunks.B = B;
  chunks.D = D;
  chunks.change = time.change;
  if (time.chunks > 1) chunks.ends = scratch.allocate(scratch.context, kContextPasses * B * time.chunks * D);
  return chunks;
}

// Calls body(storage tag); float64 has no CUDA kernel and is refused in Python.
template <class Body>
cudaError_t for_storage(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kBFloat16: return body(__nv_bfloat16{});
    case DType::kFloat16: return body(__half{});
    default: return cudaErrorInvalidValue;
  }
}

// Calls body(layout tag) with the narrowest layout that holds a row.
template <class T, bool ALIGNED, class Body>
cudaError_t for_width(int64_t D, const Body& body) {
  constexpr int E = 16 / sizeof(T), PIECES = sizeof(T) / 2;  // 8 columns a thread
  if (D <= 256) return body(RowParts<T, E, PIECES, 32, ALIGNED>{});
  if (D <= 512) return body(RowParts<T, E, PIECES, 64, ALIGNED>{});
  if (D <= 1024) return body(RowParts<T, E, PIECES, 128, ALIGNED>{});
  if (D <= 2048) return body(RowParts<T, E, PIECES, 256, ALIGNED>{});
  if (D <= 4096) return body(RowParts<T, E, 2 * PIECES, 256, ALIGNED>{});
  return cudaErrorInvalidValue;  // wider rows are refused in Python
}

}  // namespace newllm::cuda
