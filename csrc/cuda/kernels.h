// Plain C++ interface of the CUDA kernels. A launcher returns what CUDA said of the launch; it never synchronises.
#pragma once

#include <cuda_runtime_api.h>

#include "../args.h"
#include "../decode_args.h"

namespace newllm::cuda {

// Memory on the device for one call: `allocate(context, floats)`; it must live until the stream has done with the call.
struct Scratch {
  float* (*allocate)(void* context, int64_t floats);
  void* context;
};

// States are float32 (N, D); rows of all tensors may start anywhere, whole 16 bytes are faster.
cudaError_t scan_forward(const ScanArgs& args, const Scratch& scratch, cudaStream_t stream);
cudaError_t scan_backward(const ScanBackwardArgs& args, const Scratch& scratch, cudaStream_t stream);
cudaError_t gated_scan_forward(const GatedScanArgs& args, const Scratch& scratch, cudaStream_t stream);
cudaError_t gated_scan_backward(const GatedScanBackwardArgs& args, const Scratch& scratch, cudaStream_t stream);

// What a block of them may take of shared memory, in bytes.
int64_t scan_shared_memory();
int64_t gated_scan_shared_memory();

// Rows of up to 8192 elements.
cudaError_t layer_norm_forward(const LayerNormArgs& args, cudaStream_t stream);
cudaError_t layer_norm_backward(const LayerNormBackwardArgs& args, const Scratch& scratch, cudaStream_t stream);

// Where `args.c` and `args.grad_c` are absent and T is 1: one step of the cell. `partial` is scratch of
// 2 * context_update_blocks(B) * D floats.
cudaError_t context_update_forward(const ContextArgs& args, cudaStream_t stream);
cudaError_t context_update_backward(const ContextBackwardArgs& args, float* partial, cudaStream_t stream);

// Blocks of the backward: a function of the shape only, so that sums are added in the same order on every GPU.
int64_t context_update_blocks(int64_t rows);

// Widest D whose row fits into the shared memory of one block of this device (forward and backward).
int64_t context_update_max_width(int device);

// Layers of one token. `dtype` is that of the weights; `program` lies on the device, `counters` are 2 + layers
// numbers there that begin as 0; `widest` is the largest K. All layers have the same B.
cudaError_t decode_linear(const DecodeLinear& layer, DType dtype, cudaStream_t stream);
cudaError_t decode_program(const DecodeLinear* program, int32_t layers, unsigned long long* counters, int32_t B,
                           int64_t widest, DType dtype, cudaStream_t stream);

// Shared memory that a block needs at least, in bytes.
int64_t decode_shared_memory(int64_t layers, int64_t B, int64_t widest, int64_t element_size);

}  // namespace newllm::cuda
