// What the launches of LayerNorm forward and backward have in common: kernels by dtype and alignment, rows in pieces.
#pragma once

#include "dependent_launch.cuh"
#include "kernels.h"
#include "layer_norm.cuh"

namespace newllm::cuda {

template <class Body>
cudaError_t for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kBFloat16: return body(__nv_bfloat16{});
    case DType::kFloat16: return body(__half{});
    default: return cudaErrorInvalidValue;  // float64 is refused in Python
  }
}

inline Parameter parameter(const void* data, DType dtype) { return {data, dtype == DType::kFloat32}; }

// Whether rows begin at multiples of 16 bytes, `each` elements.
inline bool aligned(const void* data, int64_t stride, int64_t each) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % each == 0;
}

// Rows wider than kWidest, in pieces of whole vectors.
template <class Run>
void cut(Run& run) {
  const int64_t D = run.args.D;
  run.cluster = int((D + kWidest - 1) / kWidest);
  run.piece = int(((D + run.cluster - 1) / run.cluster + 7) / 8 * 8);
}

}  // namespace newllm::cuda
