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

// Rows of up to layer_norm_max_width elements, wherever they begin; whole 16 bytes are faster, and so are weight and
// bias of one dtype. `args.mean` and `args.rstd` may be absent.
cudaError_t layer_norm_forward(const LayerNormArgs& args, cudaStream_t stream);
cudaError_t layer_norm_backward(const LayerNormBackwardArgs& args, const Scratch& scratch, cudaStream_t stream);

// 65536 on Hopper and newer, whose blocks can share a row, 8192 elsewhere.
int64_t layer_norm_max_width(int device);

// How context_scan cuts time into chunks that run side by side, in passes (context_scan/passes.py). Of one chunk, the
// last two are not used.
struct TimeChunks {
  int64_t steps = 0;  // of a chunk; the last may have fewer
  int chunks = 1;
  float tolerance = 0;      // squared relative change of a chunk's start from which on it is computed again
  float* change = nullptr;  // written, (kContextPasses, B, chunks): those changes
};
constexpr int kContextPasses = 4;

// Rows of up to context_scan_max_width columns; states are float32.
cudaError_t context_scan_forward(const ContextArgs& args, const TimeChunks& time, const Scratch& scratch,
                                 cudaStream_t stream);
cudaError_t context_scan_backward(const ContextBackwardArgs& args, const TimeChunks& time, const Scratch& scratch,
                                  cudaStream_t stream);

// Widest D whose slots fit into the shared memory of one block of this device, forward and backward.
int64_t context_scan_max_width(int device);

// One launch of blocks that run at the same time; cudaErrorInvalidConfiguration where the teams below are none, or rows
// are not of whole 16 bytes at multiples of 16 bytes.
cudaError_t gated_scan_layer_norm_forward(const GatedScanNormArgs& args, const Scratch& scratch, cudaStream_t stream);
cudaError_t gated_scan_layer_norm_backward(const GatedScanNormBackwardArgs& args, const Scratch& scratch,
                                           cudaStream_t stream);

// Sequences of D columns that they work on at a time on this device.
int64_t gated_scan_layer_norm_teams(int device, bool is_float, bool backward, int64_t D);

// Where `args.c` and `args.grad_c` are absent and T is 1: one step of the cell, rows of up to context_update_max_width.
cudaError_t context_update_forward(const ContextArgs& args, cudaStream_t stream);
cudaError_t context_update_backward(const ContextBackwardArgs& args, const Scratch& scratch, cudaStream_t stream);

// Widest D whose row fits into registers, or into the shared memory of one block of this device, forward and backward.
int64_t context_update_max_width(int device);

// The whole cell of one hidden layer with LayerNorm in the loop, 16-bit tensors, for widths that recurrent_team takes.
cudaError_t recurrent_forward(const RecurrentArgs& args, const Scratch& scratch, cudaStream_t stream);
cudaError_t recurrent_backward(const RecurrentBackwardArgs& args, const Scratch& scratch, cudaStream_t stream);

// Blocks that compute 16 rows of these widths together, negative where they are a cluster; 0 where they do not fit.
int64_t recurrent_team(int64_t D, int64_t H, int device);

// How many such teams run at once.
int64_t recurrent_teams(int64_t D, int64_t H, int device);

// The same for meshes of clusters, which take their place where they need no more turns; 0 where there are none.
int64_t recurrent_meshes(int64_t D, int64_t H, int device);

// Layers of one token. `dtype` is that of the weights; `program` lies on the device, `counters` are 2 + layers
// numbers there that begin as 0; `widest` is the largest K, `widest_norm` that of
// layers with parameters of LayerNorm. All layers have the same B.
cudaError_t decode_linear(const DecodeLinear& layer, DType dtype, cudaStream_t stream);
cudaError_t decode_program(const DecodeLinear* program, int32_t layers, unsigned long long* counters, int32_t B,
                           int64_t widest, int64_t widest_norm, DType dtype, cudaStream_t stream);

// Shared memory that a block needs at least, in bytes.
int64_t decode_shared_memory(int64_t layers, int64_t B, int64_t widest, int64_t widest_norm, int64_t element_size);

}  // namespace newllm::cuda
