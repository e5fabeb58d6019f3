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
    const int32_t device = like.get_device_index();
    int current = -1;  // to ask costs less than a guard, which is two objects and four calls
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (cudaGetDevice(&current) != cudaSuccess || current != device) guard.emplace(device);
    const cudaStream_t stream = current_stream(device);
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

// An activation, and the layer that writes it where it is of words.
DecodeTensor decode_tensor(const OptionalTensor& tensor, int64_t from, bool pairs) {
  DecodeTensor made;
  if (!tensor) return made;
  made.data = tensor->data_ptr();
  made.from = int32_t(from);
  made.storage = tensor->scalar_type() == ScalarType::Long    ? (pairs ? DecodeStorage::kPairs : DecodeStorage::kWords)
                 : tensor->scalar_type() == ScalarType::Float ? DecodeStorage::kFloat
                                                              : DecodeStorage::kWeight;
  return made;
}

// What the decode operators take, as the kernel's descriptor; Python has checked shapes, dtypes and contiguity.
// `sources`: which layers write x, factor, addend and residual. `flags`: 1 normalize, 2 x is a table, 4 residual is
// one, 8 barrier; 16, 32, 64, 128: x, factor, y, context are of pairs, not words.
struct DecodeInputs {
  const Tensor& x;
  const OptionalTensor &tokens, &factor, &addend, &residual, &y, &context, &kept, &norm, &x_out;
  const std::vector<Tensor>& weights;
  const std::vector<OptionalTensor>& biases;
  const OptionalTensor &state, &state_out;
  double eps, clamp;
  int64_t flags;
  const std::vector<int64_t>& sources;
  int64_t epilogue, activation;

  DecodeLinear descriptor() const {
    STD_TORCH_CHECK(!weights.empty() && weights.size() <= kDecodeMostParts && biases.size() == weights.size() &&
                        sources.size() == 4,
                    "newllm: a number of weights that Python should have refused");
    DecodeLinear layer;
    layer.x = decode_tensor(x, sources[0], flags & 16);
    layer.factor = decode_tensor(factor, sources[1], flags & 32);
    layer.addend = decode_tensor(addend, sources[2], false);
    layer.residual = decode_tensor(residual, sources[3], false);
    layer.y = decode_tensor(y, 0, flags & 64);
    layer.context = decode_tensor(context, 0, flags & 128);
    layer.tokens = static_cast<const int64_t*>(data_or_null(tokens));
    layer.kept = static_cast<float*>(data_or_null(kept));
    layer.norm = data_or_null(norm);
    layer.x_out = static_cast<float*>(data_or_null(x_out));
    layer.parts = int32_t(weights.size());
    for (size_t part = 0; part < weights.size(); ++part) {
      layer.weight[part] = weights[part].data_ptr();
      layer.bias[part] = data_or_null(biases[part]);
    }
    layer.weight_stride = weights[0].stride(0);
    layer.state = static_cast<const float*>(data_or_null(state));
    layer.state_out = static_cast<float*>(data_or_null(state_out));
    layer.N = int32_t(weights[0].size(0));
    layer.K = int32_t(weights[0].size(1));
    layer.B = int32_t(tokens ? tokens->size(0) : x.size(0));
    layer.eps = float(eps);
    layer.clamp_value = float(clamp);
    layer.normalize = flags & 1;
    layer.x_is_table = flags & 2;
    layer.residual_is_table = flags & 4;
    layer.barrier = flags & 8;
    layer.epilogue = DecodeEpilogue(epilogue);
    layer.activation = DecodeActivation(activation);
    return layer;
  }
};

Tensor decode_layer(const Tensor& x, const OptionalTensor& tokens, const OptionalTensor& factor,
                    const OptionalTensor& addend, const OptionalTensor& residual, const OptionalTensor& y,
                    const OptionalTensor& context, const OptionalTensor& kept, const OptionalTensor& norm,
                    const OptionalTensor& x_out, std::vector<Tensor> weights, std::vector<OptionalTensor> biases,
                    const OptionalTensor& state, const OptionalTensor& state_out, double eps, double clamp,
                    int64_t flags, std::vector<int64_t> sources, int64_t epilogue, int64_t activation) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const DecodeInputs inputs{x,    tokens, factor, addend,  residual, y,         context,
                            kept, norm,   x_out,  weights, biases,   state,     state_out,
                            eps,  clamp,  flags,  sources, epilogue, activation};
  const DecodeLinear layer = inputs.descriptor();
  Tensor bytes = empty<1>({sizeof(DecodeLinear) / 8}, ScalarType::Long, x);
  check(cudaMemcpyAsync(bytes.data_ptr(), &layer, sizeof(layer), cudaMemcpyHostToDevice,
                        current_stream(x.get_device_index())),
        "decode_layer");
  return bytes;
}

void decode_linear(const Tensor& x, const OptionalTensor& tokens, const OptionalTensor& factor,
                   const OptionalTensor& addend, const OptionalTensor& residual, const OptionalTensor& y,
                   const OptionalTensor& context, const OptionalTensor& kept, const OptionalTensor& norm,
                   const OptionalTensor& x_out, std::vector<Tensor> weights, std::vector<OptionalTensor> biases,
                   const OptionalTensor& state, const OptionalTensor& state_out, double eps, double clamp,
                   int64_t flags, std::vector<int64_t> sources, int64_t epilogue, int64_t activation) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const DecodeInputs inputs{x,    tokens, factor, addend,  residual, y,         context,
                            kept, norm,   x_out,  weights, biases,   state,     state_out,
                            eps,  clamp,  flags,  sources, epilogue, activation};
  check(cuda::decode_linear(inputs.descriptor(), dtype_of(weights[0]), current_stream(x.get_device_index())),
        "decode_linear");
}

void decode_run(const Tensor& program, const Tensor& counters, const Tensor& weight, int64_t B, int64_t widest,
                int64_t widest_norm) {
  const torch::stable::accelerator::DeviceGuard guard(program.get_device_index());
  check(cuda::decode_program(static_cast<const DecodeLinear*>(program.data_ptr()), int32_t(program.size(0)),
                             static_cast<unsigned long long*>(counters.data_ptr()), int32_t(B), widest, widest_norm,
                             dtype_of(weight), current_stream(program.get_device_index())),
        "decode_run");
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
  m.impl("decode_layer", TORCH_BOX(&newllm::decode_layer));
  m.impl("decode_linear", TORCH_BOX(&newllm::decode_linear));
  m.impl("decode_run", TORCH_BOX(&newllm::decode_run));
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

extern "C" __attribute__((visibility("default"))) int64_t newllm_recurrent_meshes(int64_t D, int64_t H, int device) {
  return newllm::cuda::recurrent_meshes(D, H, device);
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

extern "C" __attribute__((visibility("default"))) int64_t newllm_decode_shared_memory(int64_t layers, int64_t B,
                                                                                      int64_t widest,
                                                                                      int64_t widest_norm,
                                                                                      int64_t element_size) {
  return newllm::cuda::decode_shared_memory(layers, B, widest, widest_norm, element_size);
}

extern "C" __attribute__((visibility("default"))) int64_t newllm_gated_scan_layer_norm_teams(int device, bool is_float,
                                                                                             bool backward, int64_t D) {
  return newllm::cuda::gated_scan_layer_norm_teams(device, is_float, backward, D);
}
