// The CUDA kernels as PyTorch operators newllm_native::*. Built also beside a PyTorch without CUDA, so nothing here may
// link against libtorch_cuda: the current stream is looked up in it at run time.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#include "operators.h"

namespace newllm {
namespace {

cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);  // a CUDA tensor exists, so it is loaded
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter != nullptr, "newllm: this PyTorch does not tell its current CUDA stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it again
  STD_TORCH_CHECK(error == cudaSuccess, "newllm: CUDA kernel ", kernel, ": ", cudaGetErrorString(error));
}

// Arguments of context_scan, and how it goes through time.
template <class Args>
struct InTime {
  Args args;
  cuda::TimeChunks time;
};

// What operators.h calls.
struct Cuda {
  static constexpr bool kParametersAsStored = true;

  template <class Args>
  static void run(const Args& args, const Tensor& like) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    const cudaStream_t stream = current_stream(like.get_device_index());
    // Freed when this returns: the caching allocator gives memory out again in the order of the stream.
    struct Held {
      const Tensor& like;
      std::vector<Tensor> tensors;
    } held{like, {}};
    const cuda::Scratch scratch{[](void* context, int64_t floats) {
                                  Held& held = *static_cast<Held*>(context);
                                  held.tensors.push_back(empty<1>({floats}, ScalarType::Float, held.like));
                                  return static_cast<float*>(held.tensors.back().data_ptr());
                                },
                                &held};
    launch(args, scratch, stream);
  }

 private:
  static void launch(const ScanArgs& args, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::scan_forward(args, scratch, stream), "scan");
  }
  static void launch(const ScanBackwardArgs& args, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::scan_backward(args, scratch, stream), "scan_backward");
  }
  static void launch(const GatedScanArgs& args, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::gated_scan_forward(args, scratch, stream), "gated_scan");
  }
  static void launch(const GatedScanBackwardArgs& args, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::gated_scan_backward(args, scratch, stream), "gated_scan_backward");
  }
  static void launch(const RecurrentArgs& args, const cuda::Scratch& scratch, cudaStream_t stream) {
    STD_TORCH_CHECK(args.pre.data == nullptr, "newllm: the CUDA kernel of recurrent_context keeps no pre-activations");
    check(cuda::recurrent_forward(args, scratch, stream), "recurrent_context");
  }
  static void launch(const RecurrentBackwardArgs& args, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::recurrent_backward(args, scratch, stream), "recurrent_context_backward");
  }
  static void launch(const GatedScanNormArgs& args, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::gated_scan_layer_norm_forward(args, scratch, stream), "gated_scan_layer_norm");
  }
  static void launch(const GatedScanNormBackwardArgs& args, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::gated_scan_layer_norm_backward(args, scratch, stream), "gated_scan_layer_norm_backward");
  }
  static void launch(const LayerNormArgs& args, const cuda::Scratch&, cudaStream_t stream) {
    check(cuda::layer_norm_forward(args, stream), "layer_norm");
  }
  static void launch(const LayerNormBackwardArgs& args, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::layer_norm_backward(args, scratch, stream), "layer_norm_backward");
  }
  static void launch(const ContextArgs& args, const cuda::Scratch&, cudaStream_t stream) {
    check(cuda::context_update_forward(args, stream), "context_update");
  }
  static void launch(const ContextBackwardArgs& args, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::context_update_backward(args, scratch, stream), "context_update_backward");
  }
  static void launch(const InTime<ContextArgs>& run, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::context_scan_forward(run.args, run.time, scratch, stream), "context_scan");
  }
  static void launch(const InTime<ContextBackwardArgs>& run, const cuda::Scratch& scratch, cudaStream_t stream) {
    check(cuda::context_scan_backward(run.args, run.time, scratch, stream), "context_scan_backward");
  }
};

ContextArgs context_args(const Gates& gates, const Norm& norm, const Tensor& state) {
  ContextArgs args;
  args.dtype = dtype_of(gates.first);
  args.state_dtype = dtype_of(state);
  args.B = gates.B();
  args.T = gates.T();
  args.D = gates.D;
  args.norm = norm.params;
  args.f = gates.f;
  args.i = gates.i;
  args.d = gates.d;
  args.c0 = view(state);
  return args;
}

Tensor context_update(const Tensor& f, const OptionalTensor& i, const OptionalTensor& d, const Tensor& c_,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps, double clamp) {
  const Gates gates(f, i, d);
  const Tensor c = with_contiguous_rows(c_);
  const Norm norm(f, weight, bias, eps, clamp, Cuda::kParametersAsStored);
  Tensor next = empty<2>({gates.B(), gates.D}, c.scalar_type(), c);
  ContextArgs args = context_args(gates, norm, c);
  args.c_last = view(next);
  Cuda::run(args, f);
  return next;
}

using ContextGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a backward reads and writes; of the tensors among it those that are made here are returned by `results`.
struct ContextBackward {
  const Gates gates;
  const Tensor c0;
  const Norm norm;
  GateGradients grads;
  Tensor grad_c0, grad_weight, grad_bias;
  ContextBackwardArgs args;

  ContextBackward(const Tensor& f, const OptionalTensor& i, const OptionalTensor& d, const Tensor& c0_,
                  const OptionalTensor& weight, const OptionalTensor& bias, double eps, double clamp)
      : gates(f, i, d),
        c0(with_contiguous_rows(c0_)),
        norm(f, weight, bias, eps, clamp, Cuda::kParametersAsStored),
        grads(gates),
        grad_c0(empty<2>({gates.B(), gates.D}, c0.scalar_type(), c0)),
        grad_weight(empty<1>({gates.D}, ScalarType::Float, f)),
        grad_bias(empty<1>({gates.D}, ScalarType::Float, f)) {
    args.dtype = dtype_of(gates.first);
    args.state_dtype = dtype_of(c0);
    args.B = gates.B();
    args.T = gates.T();
    args.D = gates.D;
    args.norm = norm.params;
    args.f = gates.f;
    args.i = gates.i;
    args.d = gates.d;
    args.c0 = view(c0);
    args.grad_f = grads.f;
    args.grad_i = grads.i;
    args.grad_d = grads.d;
    args.grad_c0 = view(grad_c0);
    args.grad_weight = grad_weight.data_ptr();
    args.grad_bias = grad_bias.data_ptr();
  }

  ContextGradients results() const { return {grads.first, grads.second, grads.third, grad_c0, grad_weight, grad_bias}; }
};

ContextGradients context_update_backward(const Tensor& grad_, const Tensor& f, const OptionalTensor& i,
                                         const OptionalTensor& d, const Tensor& c, const OptionalTensor& weight,
                                         const OptionalTensor& bias, double eps, double clamp) {
  ContextBackward backward(f, i, d, c, weight, bias, eps, clamp);
  const Tensor grad = with_contiguous_rows(grad_);
  backward.args.grad_c_last = view(grad);
  Cuda::run(backward.args, f);
  return backward.results();
}

// `change` (passes, B, chunks) is written; without it all steps go in order of time.
cuda::TimeChunks time_chunks(int64_t steps, double tolerance, const OptionalTensor& change) {
  cuda::TimeChunks time;
  time.steps = steps;
  time.tolerance = float(tolerance);
  if (change) {
    time.chunks = int(change->size(2));
    time.change = static_cast<float*>(change->data_ptr());
  }
  return time;
}

std::tuple<Tensor, Tensor> context_scan(const Tensor& f, const OptionalTensor& i, const OptionalTensor& d,
                                        const Tensor& c0_, const OptionalTensor& weight, const OptionalTensor& bias,
                                        double eps, double clamp, int64_t steps, double tolerance,
                                        const OptionalTensor& change) {
  const Gates gates(f, i, d);
  const Tensor c0 = with_contiguous_rows(c0_);
  const Norm norm(f, weight, bias, eps, clamp, Cuda::kParametersAsStored);
  Tensor c = empty<3>({gates.B(), gates.T(), gates.D}, f.scalar_type(), f);
  Tensor c_last = empty<2>({gates.B(), gates.D}, ScalarType::Float, f);
  InTime<ContextArgs> run{context_args(gates, norm, c0), time_chunks(steps, tolerance, change)};
  run.args.c = view(c);
  run.args.c_last = view(c_last);
  Cuda::run(run, f);
  return {c, c_last};
}

ContextGradients context_scan_backward(const OptionalTensor& grad_c_, const OptionalTensor& grad_c_last_,
                                       const Tensor& f, const OptionalTensor& i, const OptionalTensor& d,
                                       const Tensor& c_, const Tensor& c0, const OptionalTensor& weight,
                                       const OptionalTensor& bias, double eps, double clamp, int64_t steps,
                                       double tolerance, const OptionalTensor& change) {
  ContextBackward backward(f, i, d, c0, weight, bias, eps, clamp);
  const Tensor c = with_contiguous_rows(c_);
  const OptionalTensor grad_c = with_contiguous_rows(grad_c_), grad_c_last = with_contiguous_rows(grad_c_last_);
  backward.args.c = view(c);
  backward.args.grad_c = view(grad_c);
  backward.args.grad_c_last = view(grad_c_last);
  Cuda::run(InTime<ContextBackwardArgs>{backward.args, time_chunks(steps, tolerance, change)}, f);
  return backward.results();
}

}  // namespace
}  // namespace newllm

STABLE_TORCH_LIBRARY_IMPL(newllm_native, CUDA, m) {
  m.impl("scan", TORCH_BOX(&newllm::scan<newllm::Cuda>));
  m.impl("scan_backward", TORCH_BOX(&newllm::scan_backward<newllm::Cuda>));
  m.impl("gated_scan", TORCH_BOX(&newllm::gated_scan<newllm::Cuda>));
  m.impl("gated_scan_backward", TORCH_BOX(&newllm::gated_scan_backward<newllm::Cuda>));
  m.impl("recurrent_context", TORCH_BOX(&newllm::recurrent_context<newllm::Cuda>));
  m.impl("recurrent_context_backward", TORCH_BOX(&newllm::recurrent_context_backward<newllm::Cuda>));
  m.impl("gated_scan_layer_norm", TORCH_BOX(&newllm::gated_scan_layer_norm<newllm::Cuda>));
  m.impl("gated_scan_layer_norm_backward", TORCH_BOX(&newllm::gated_scan_layer_norm_backward<newllm::Cuda>));
  m.impl("layer_norm", TORCH_BOX(&newllm::layer_norm<newllm::Cuda>));
  m.impl("layer_norm_plain", TORCH_BOX(&newllm::layer_norm_plain<newllm::Cuda>));
  m.impl("layer_norm_backward", TORCH_BOX(&newllm::layer_norm_backward<newllm::Cuda>));
  m.impl("context_update", TORCH_BOX(&newllm::context_update));
  m.impl("context_update_backward", TORCH_BOX(&newllm::context_update_backward));
  m.impl("context_scan_in_time", TORCH_BOX(&newllm::context_scan));
  m.impl("context_scan_in_time_backward", TORCH_BOX(&newllm::context_scan_backward));
}

// Read by newllm_kernels.native through ctypes.
extern "C" __attribute__((visibility("default"))) int64_t newllm_context_update_max_width(int device) {
  return newllm::cuda::context_update_max_width(device);
}

extern "C" __attribute__((visibility("default"))) int64_t newllm_recurrent_team(int64_t D, int64_t H, int device) {
  return newllm::cuda::recurrent_team(D, H, device);
}

extern "C" __attribute__((visibility("default"))) int64_t newllm_recurrent_teams(int64_t D, int64_t H, int device) {
  return newllm::cuda::recurrent_teams(D, H, device);
}

extern "C" __attribute__((visibility("default"))) int64_t newllm_layer_norm_max_width(int device) {
  return newllm::cuda::layer_norm_max_width(device);
}

extern "C" __attribute__((visibility("default"))) int64_t newllm_context_scan_max_width(int device) {
  return newllm::cuda::context_scan_max_width(device);
}

extern "C" __attribute__((visibility("default"))) int64_t newllm_scan_shared_memory() {
  return newllm::cuda::scan_shared_memory();
}

extern "C" __attribute__((visibility("default"))) int64_t newllm_gated_scan_shared_memory() {
  return newllm::cuda::gated_scan_shared_memory();
}

extern "C" __attribute__((visibility("default"))) int64_t newllm_gated_scan_layer_norm_teams(int device, bool is_float,
                                                                                             bool backward, int64_t D) {
  return newllm::cuda::gated_scan_layer_norm_teams(device, is_float, backward, D);
}
