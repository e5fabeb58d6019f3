// One step of the cell for rows too wide for registers: one block a row, the row in shared memory. Sums are of centred
// values, in two passes over it.
#pragma once

#include "cell.cuh"

namespace newllm::cuda {

constexpr int kWideThreads = 256;
constexpr int kWideWarps = kWideThreads / 32;
// Rows of floats in shared memory, forward and backward.
constexpr int kWideForwardRows = 1, kWideBackwardRows = 4;

// The sum over the block, in every thread; the order of additions is fixed.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();  // the scratch may still be read from the last call
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < kWideWarps; ++warp) total += scratch[warp];
  return total;
}

template <class X>
__device__ __forceinline__ X* wide_row(const View3& view, int64_t b) {
  return static_cast<X*>(view.data) + b * view.stride_b;
}

template <class T>
__device__ __forceinline__ float parameter(const void* data, DType dtype, float absent, int64_t k) {
  if (data == nullptr) return absent;
  return dtype == DType::kFloat32 ? static_cast<const float*>(data)[k] : to_float(static_cast<const T*>(data)[k]);
}

struct Statistics {
  float mean, rstd;
};

// Fills u with the updated row before the norm, and returns its statistics (two passes over shared memory).
template <class T, class S>
__device__ Statistics update_row(const T* f, const T* i, const T* d, const S* c, float* u, int64_t D, float eps,
                                 float* scratch) {
  float sum = 0;
  for (int64_t k = threadIdx.x; k < D; k += kWideThreads) {
    float forget, write;
    gate_values<T>(to_float(f[k]), to_float(i[k]), to_float(d[k]), forget, write);
    u[k] = fmaf(forget, to_float(c[k]), write);
    sum += u[k];
  }
  const float mean = block_sum(sum, scratch) / float(D);
  float squares = 0;
  for (int64_t k = threadIdx.x; k < D; k += kWideThreads) squares += (u[k] - mean) * (u[k] - mean);
  return {mean, rsqrtf(block_sum(squares, scratch) / float(D) + eps)};
}

template <class T, class S>
__global__ void __launch_bounds__(kWideThreads) context_update_wide_kernel(const __grid_constant__ ContextArgs args) {
  extern __shared__ float u[];  // (D)
  __shared__ float scratch[kWideWarps];
  const NormParams& norm = args.norm;
  for (int64_t b = blockIdx.x; b < args.B; b += gridDim.x) {
    const Statistics s =
        update_row(wide_row<const T>(args.f, b), wide_row<const T>(args.i, b), wide_row<const T>(args.d, b),
                   wide_row<const S>(args.c0, b), u, args.D, float(args.norm.eps), scratch);
    S* next = wide_row<S>(args.c_last, b);
    for (int64_t k = threadIdx.x; k < args.D; k += kWideThreads) {
      const float y = (u[k] - s.mean) * s.rstd * parameter<T>(norm.weight, norm.weight_dtype, 1.0f, k) +
                      parameter<T>(norm.bias, norm.bias_dtype, 0.0f, k);
      next[k] = from_float<S>(clamped(y, float(args.norm.clamp_value)));
    }
  }
}

// Every block walks a fixed set of rows and keeps its share of the weight gradients in shared memory; `partial` takes
// them out, (2, blocks, D), and sum_parts adds the blocks in order.
template <class T, class S>
__global__ void __launch_bounds__(kWideThreads)
    context_update_wide_backward_kernel(const __grid_constant__ ContextBackwardArgs args, float* partial) {
  extern __shared__ float shared[];  // xhat, g, grad_weight, grad_bias: (4, D)
  __shared__ float scratch[kWideWarps];
  const int64_t D = args.D;
  float *xhat = shared, *g = xhat + D, *grad_weight = g + D, *grad_bias = grad_weight + D;
  const NormParams& norm = args.norm;
  const float limit = float(args.norm.clamp_value);
  for (int64_t k = threadIdx.x; k < D; k += kWideThreads)
    grad_weight[k] = grad_bias[k] = 0;  // each thread its own columns
  for (int64_t b = blockIdx.x; b < args.B; b += gridDim.x) {
    const T *f = wide_row<const T>(args.f, b), *i = wide_row<const T>(args.i, b), *d = wide_row<const T>(args.d, b);
    const S *c = wide_row<const S>(args.c0, b), *grad = wide_row<const S>(args.grad_c_last, b);
    const Statistics s = update_row(f, i, d, c, xhat, D, float(args.norm.eps), scratch);
    float sum_g = 0, sum_gx = 0;
    for (int64_t k = threadIdx.x; k < D; k += kWideThreads) {
      const float x = (xhat[k] - s.mean) * s.rstd;
      const float w = parameter<T>(norm.weight, norm.weight_dtype, 1.0f, k);
      const float y = x * w + parameter<T>(norm.bias, norm.bias_dtype, 0.0f, k);
      const float dy = y > limit || y < -limit ? 0.0f : to_float(grad[k]);
      grad_weight[k] += dy * x;
      grad_bias[k] += dy;
      xhat[k] = x;
      g[k] = dy * w;
      sum_g += g[k];
      sum_gx += g[k] * x;
    }
    const float mean_g = block_sum(sum_g, scratch) / float(D);
    const float mean_gx = block_sum(sum_gx, scratch) / float(D);
    for (int64_t k = threadIdx.x; k < D; k += kWideThreads) {
      const float du = (g[k] - mean_g - xhat[k] * mean_gx) * s.rstd;
      const Activation forget = sigmoid_of(to_float(f[k])), input = sigmoid_of(to_float(i[k])),
                       delta = tanh_of<T>(to_float(d[k]));
      wide_row<T>(args.grad_f, b)[k] = from_float<T>(du * to_float(c[k]) * forget.slope);
      wide_row<T>(args.grad_i, b)[k] = from_float<T>(du * delta.value * input.slope);
      wide_row<T>(args.grad_d, b)[k] = from_float<T>(du * input.value * delta.slope);
      wide_row<S>(args.grad_c0, b)[k] = from_float<S>(du * forget.value);
    }
  }
  for (int64_t k = threadIdx.x; k < D; k += kWideThreads) {
    partial[blockIdx.x * D + k] = grad_weight[k];
    partial[(gridDim.x + blockIdx.x) * D + k] = grad_bias[k];
  }
}

}  // namespace newllm::cuda
