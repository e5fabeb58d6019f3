// What the launches of context_update have in common, forward and backward: dtypes, and which layout for which width.
#pragma once

#include "context_update.cuh"
#include "context_update_wide.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace newllm::cuda {

// Wider rows go to shared memory.
constexpr int64_t kWidestInRegisters = 4096;

// Calls body(gates tag, contexts tag); float64 has no CUDA kernel and is refused in Python.
template <class Body>
cudaError_t for_dtypes(DType dtype, DType state_dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{}, float{});
    case DType::kBFloat16:
      return state_dtype == dtype ? body(__nv_bfloat16{}, __nv_bfloat16{}) : body(__nv_bfloat16{}, float{});
    case DType::kFloat16: return state_dtype == dtype ? body(__half{}, __half{}) : body(__half{}, float{});
    default: return cudaErrorInvalidValue;
  }
}

// Calls body(layout tag) with the narrowest layout that holds a row, 8 columns a thread.
template <class T, class S, bool ALIGNED, class Body>
cudaError_t for_row(int64_t D, const Body& body) {
  constexpr int E = 16 / sizeof(T), PIECES = 8 / E;
  if (D <= 64) return body(CellRow<T, S, E, PIECES, 8, ALIGNED>{});
  if (D <= 256) return body(CellRow<T, S, E, PIECES, 32, ALIGNED>{});
  if (D <= 512) return body(CellRow<T, S, E, PIECES, 64, ALIGNED>{});
  if (D <= 1024) return body(CellRow<T, S, E, PIECES, 128, ALIGNED>{});
  if (D <= 2048) return body(CellRow<T, S, E, PIECES, 256, ALIGNED>{});
  return body(CellRow<T, S, E, PIECES, 512, ALIGNED>{});
}

template <class T, class S, size_t N, size_t M>
bool rows_whole(int64_t D, const View3* const (&gates)[N], const View3* const (&states)[M]) {
  bool whole = D * sizeof(T) % 16 == 0;
  for (const View3* view : gates) whole = whole && rows_at_16_bytes(*view, sizeof(T));
  for (const View3* view : states) whole = whole && rows_at_16_bytes(*view, sizeof(S));
  return whole;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace newllm::cuda
