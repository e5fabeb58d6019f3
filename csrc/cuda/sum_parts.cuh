// The second stage of the gradients of weight and bias: (2, parts, D) -> (D) twice, in an order that the shape alone
// decides.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace newllm::cuda {

constexpr int kPartWarps = 16;

// 32 columns a block; its warps take every kPartWarps-th part, then add up in order.
static __global__ void __launch_bounds__(32 * kPartWarps)
    sum_parts_kernel(const float* parts, int64_t count, int64_t D, float* grad_weight, float* grad_bias) {
  __shared__ float sums[kPartWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t at = int64_t(blockIdx.x) * 32 + lane;
  parts += int64_t(blockIdx.y) * count * D;
  float sum = 0.0f;
  if (at < D) {
#pragma unroll 8
    for (int64_t part = warp; part < count; part += kPartWarps) sum += parts[part * D + at];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && at < D) {
    sum = 0.0f;
    for (int w = 0; w < kPartWarps; ++w) sum += sums[w][lane];
    (blockIdx.y == 0 ? grad_weight : grad_bias)[at] = sum;
  }
}

inline cudaError_t sum_parts(const float* parts, int64_t count, int64_t D, void* grad_weight, void* grad_bias,
                             cudaStream_t stream) {
  sum_parts_kernel<<<dim3(static_cast<unsigned>((D + 31) / 32), 2), 32 * kPartWarps, 0, stream>>>(
      parts, count, D, static_cast<float*>(grad_weight), static_cast<float*>(grad_bias));
  return cudaGetLastError();
}

// Of no rows.
inline cudaError_t clear_gradients(void* grad_weight, void* grad_bias, int64_t D, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(grad_weight, 0, D * sizeof(float), stream);
  return error != cudaSuccess ? error : cudaMemsetAsync(grad_bias, 0, D * sizeof(float), stream);
}

}  // namespace newllm::cuda
