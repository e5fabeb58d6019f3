// Layers of one token: launchers of the kernel in decode.cuh.
#include "decode_launch.cuh"
#include "kernels.h"

namespace newllm::cuda {
namespace {

cudaError_t run(const DecodeLaunch& launch, const DecodeLinear& single, const DecodeShape& shape, DType dtype,
                cudaStream_t stream) {
  if (shape.B == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32: return launch_decode<float>(launch, single, shape, stream);
    case DType::kBFloat16: return launch_decode<__nv_bfloat16>(launch, single, shape, stream);
    case DType::kFloat16: return launch_decode<__half>(launch, single, shape, stream);
    default: return cudaErrorInvalidValue;
  }
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace

cudaError_t decode_linear(const DecodeLinear& layer, DType dtype, cudaStream_t stream) {
  const DecodeShape shape{layer.B, decode_x_bytes(layer.B, layer.K, size_of(dtype)), 0, 1};  // x is no pairs
  return run({nullptr, 1, int32_t(shape.x_bytes), 0, 0, nullptr}, layer, shape, dtype, stream);
}

cudaError_t decode_program(const DecodeLinear* program, int32_t layers, unsigned long long* counters, int32_t B,
                           int64_t widest, int64_t widest_norm, DType dtype, cudaStream_t stream) {
  if (layers == 0) return cudaSuccess;
  const DecodeShape shape{B, decode_x_bytes(B, widest, size_of(dtype)), decode_norm_bytes(widest_norm, size_of(dtype)),
                          layers};
  return run({program, layers, int32_t(shape.x_bytes), int32_t(shape.norm_bytes), 0, counters}, DecodeLinear{}, shape,
             dtype, stream);
}

int64_t decode_shared_memory(int64_t layers, int64_t B, int64_t widest, int64_t widest_norm, int64_t element_size) {
  const DecodeShape shape{int32_t(B), decode_x_bytes(B, widest, element_size),
                          decode_norm_bytes(widest_norm, element_size), int32_t(layers)};
  return decode_shared_bytes(shape, 1) + 1024;
}

}  // namespace newllm::cuda
