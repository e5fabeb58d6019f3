// One step of the cell, c' = clamp(LayerNorm(sigmoid(f) c + sigmoid(i) tanh(d))), one block per row, the row in shared
// memory: every input is read once and the result written once. Memory-bound: 5 elements moved per element computed.
#include "kernels.h"
#include "numeric.cuh"

namespace newllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// s = 1 / (1 + e^-x), s' = s^2 e^-x, which keeps its relative accuracy where 1 - s would cancel. Past x = -87, e^-x
// would overflow and s' become 0 * inf.
__device__ __forceinline__ Activation sigmoid(float x) {
  const float e = expf(x < -87.0f ? 87.0f : -x);
  const float s = 1.0f / (1.0f + e);
  return {s, s * (s * e)};
}

// t' = 4 / (e^x + e^-x)^2, for the same reason.
__device__ __forceinline__ Activation tanh_of(float x) {
  const float e = expf(-fabsf(x));
  const float sech = 2.0f * e / (1.0f + e * e);
  return {tanhf(x), sech * sech};
}

__device__ __forceinline__ float clamped(float y, float limit) {
  y = y > limit ? limit : y;  // false for NaN, which passes through as in torch.clamp
  return y < -limit ? -limit : y;
}

// The sum over the block, in every thread; the order of additions is fixed.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();  // the scratch may still be read from the last call
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp];
  return total;
}

template <class T>
__device__ __forceinline__ T* row(const View3& view, int64_t b) {
  return static_cast<T*>(view.data) + b * view.stride_b;
}

struct Statistics {
  float mean, rstd;
};

// Fills u with the updated row before the norm, and returns its statistics (two passes over shared memory).
template <class T, class S>
__device__ Statistics update_row(const T* f, const T* i, const T* d, const S* c, float* u, int64_t D, float eps,
                                 float* scratch) {
  float sum = 0;
  for (int64_t k = threadIdx.x; k < D; k += kThreads) {
    const float keep = sigmoid(to_float(f[k])).value * to_float(c[k]);
    const float write = sigmoid(to_float(i[k])).value * tanh_of(to_float(d[k])).value;
    u[k] = keep + write;
    sum += u[k];
  }
  const float mean = block_sum(sum, scratch) / float(D);
  float squares = 0;
  for (int64_t k = threadIdx.x; k < D; k += kThreads) squares += (u[k] - mean) * (u[k] - mean);
  return {mean, rsqrtf(block_sum(squares, scratch) / float(D) + eps)};
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ ContextArgs args) {
  extern __shared__ float u[];  // (D)
  __shared__ float scratch[kWarps];
  const float* weight = static_cast<const float*>(args.norm.weight);
  const float* bias = static_cast<const float*>(args.norm.bias);
  for (int64_t b = blockIdx.x; b < args.B; b += gridDim.x) {
    const Statistics s = update_row(row<const T>(args.f, b), row<const T>(args.i, b), row<const T>(args.d, b),
                                    row<const S>(args.c0, b), u, args.D, float(args.norm.eps), scratch);
    S* next = row<S>(args.c_last, b);
    for (int64_t k = threadIdx.x; k < args.D; k += kThreads) {
      const float y = (u[k] - s.mean) * s.rstd * (weight ? weight[k] : 1.0f) + (bias ? bias[k] : 0.0f);
      next[k] = from_float<S>(clamped(y, float(args.norm.clamp_value)));
    }
  }
}

// Every block walks a fixed set of rows and keeps its share of the weight gradients in shared memory; `partial` takes
// them out, (2, blocks, D), and reduce_kernel adds the blocks in order.
template <class T, class S>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ ContextBackwardArgs args, float* partial) {
  extern __shared__ float shared[];  // xhat, g, grad_weight, grad_bias: (4, D)
  __shared__ float scratch[kWarps];
  const int64_t D = args.D;
  float *xhat = shared, *g = xhat + D, *grad_weight = g + D, *grad_bias = grad_weight + D;
  const float* weight = static_cast<const float*>(args.norm.weight);
  const float* bias = static_cast<const float*>(args.norm.bias);
  const float limit = float(args.norm.clamp_value);
  for (int64_t k = threadIdx.x; k < D; k += kThreads) grad_weight[k] = grad_bias[k] = 0;  // each thread its own columns
  for (int64_t b = blockIdx.x; b < args.B; b += gridDim.x) {
    const T *f = row<const T>(args.f, b), *i = row<const T>(args.i, b), *d = row<const T>(args.d, b);
    const S *c = row<const S>(args.c0, b), *grad = row<const S>(args.grad_c_last, b);
    const Statistics s = update_row(f, i, d, c, xhat, D, float(args.norm.eps), scratch);
    float sum_g = 0, sum_gx = 0;
    for (int64_t k = threadIdx.x; k < D; k += kThreads) {
      const float x = (xhat[k] - s.mean) * s.rstd;
      const float w = weight ? weight[k] : 1.0f;
      const float y = x * w + (bias ? bias[k] : 0.0f);
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
    for (int64_t k = threadIdx.x; k < D; k += kThreads) {
      const float du = (g[k] - mean_g - xhat[k] * mean_gx) * s.rstd;
      const Activation forget = sigmoid(to_float(f[k])), input = sigmoid(to_float(i[k])),
                       delta = tanh_of(to_float(d[k]));
      row<T>(args.grad_f, b)[k] = from_float<T>(du * to_float(c[k]) * forget.slope);
      row<T>(args.grad_i, b)[k] = from_float<T>(du * delta.value * input.slope);
      row<T>(args.grad_d, b)[k] = from_float<T>(du * input.value * delta.slope);
      row<S>(args.grad_c0, b)[k] = from_float<S>(du * forget.value);
    }
  }
  for (int64_t k = threadIdx.x; k < D; k += kThreads) {
    partial[blockIdx.x * D + k] = grad_weight[k];
    partial[(gridDim.x + blockIdx.x) * D + k] = grad_bias[k];
  }
}

__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const float* partial, int64_t blocks, int64_t D, float* grad_weight, float* grad_bias) {
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= D) return;
  float w = 0, b = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    w += partial[block * D + k];
    b += partial[(blocks + block) * D + k];
  }
  grad_weight[k] = w;
  grad_bias[k] = b;
}

// Raises the limit on dynamic shared memory where more than the default 48 KB, static memory included, is wanted, then
// launches.
template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, int64_t blocks, size_t shared, cudaStream_t stream, const Args&... args) {
  if (shared > 47 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(args...);
  return cudaGetLastError();
}

// Calls body(storage tag, state tag); float64 has no CUDA kernel and is refused in Python.
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

}  // namespace

int64_t context_update_blocks(int64_t rows) { return rows < 512 ? rows : 512; }

int64_t context_update_max_width(int device) {
  int bytes = 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return (bytes - int(sizeof(float)) * kWarps) / int(4 * sizeof(float));
}

cudaError_t context_update_forward(const ContextArgs& args, cudaStream_t stream) {
  if (args.B == 0) return cudaSuccess;
  const int64_t blocks = args.B < (1 << 20) ? args.B : (1 << 20);
  return for_dtypes(args.dtype, args.state_dtype, [&](auto tag, auto state_tag) {
    return launch(forward_kernel<decltype(tag), decltype(state_tag)>, blocks, args.D * sizeof(float), stream, args);
  });
}

cudaError_t context_update_backward(const ContextBackwardArgs& args, float* partial, cudaStream_t stream) {
  const int64_t blocks = context_update_blocks(args.B);
  if (blocks > 0) {
    const cudaError_t error = for_dtypes(args.dtype, args.state_dtype, [&](auto tag, auto state_tag) {
      return launch(backward_kernel<decltype(tag), decltype(state_tag)>, blocks, 4 * args.D * sizeof(float), stream,
                    args, partial);
    });
    if (error != cudaSuccess) return error;
  }
  return launch(reduce_kernel, (args.D + kThreads - 1) / kThreads, 0, stream, static_cast<const float*>(partial),
                blocks, args.D, static_cast<float*>(args.grad_weight), static_cast<float*>(args.grad_bias));
}

}  // namespace newllm::cuda
