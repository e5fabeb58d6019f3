// The CPU kernels as PyTorch operators newllm_native::*, bound through LibTorch's stable ABI.
#include <exception>
#include <tuple>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "operators.h"

namespace newllm {
namespace {

void run_in_pytorchs_pool(int64_t count, int64_t grain, cpu::RangeFn fn, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { fn(begin, end, context); });
}

int64_t pytorchs_threads() { return torch::stable::get_num_threads(); }

// What operators.h calls.
struct Cpu {
  static constexpr bool kParametersAsStored = false;
  static void run(const ScanArgs& args, const Tensor&) { cpu::scan_forward(args); }
  static void run(const ScanBackwardArgs& args, const Tensor&) { cpu::scan_backward(args); }
  static void run(const GatedScanArgs& args, const Tensor&) { cpu::gated_scan_forward(args); }
  static void run(const GatedScanBackwardArgs& args, const Tensor&) { cpu::gated_scan_backward(args); }
  static void run(const LayerNormArgs& args, const Tensor&) { cpu::layer_norm_forward(args); }
  static void run(const LayerNormBackwardArgs& args, const Tensor&) { cpu::layer_norm_backward(args); }
};

ContextArgs context_args(const Gates& gates, const Norm& norm, const Tensor& c0) {
  ContextArgs args;
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
  return args;
}

Tensor context_update(const Tensor& f, const OptionalTensor& i, const OptionalTensor& d, const Tensor& c_,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps, double clamp) {
  const Gates gates(f, i, d);
  const Tensor c = with_contiguous_rows(c_);
  const Norm norm(f, weight, bias, eps, clamp);
  Tensor next = empty<2>({gates.B(), gates.D}, c.scalar_type(), c);
  ContextArgs args = context_args(gates, norm, c);
  args.c_last = view(next);
  cpu::context_forward(args);
  return next;
}

std::tuple<Tensor, Tensor> context_scan(const Tensor& f, const OptionalTensor& i, const OptionalTensor& d,
                                        const Tensor& c0_, const OptionalTensor& weight, const OptionalTensor& bias,
                                        double eps, double clamp) {
  const Gates gates(f, i, d);
  const Tensor c0 = with_contiguous_rows(c0_);
  const Norm norm(f, weight, bias, eps, clamp);
  Tensor c = empty<3>({gates.B(), gates.T(), gates.D}, f.scalar_type(), f);
  Tensor c_last = empty<2>({gates.B(), gates.D}, c0.scalar_type(), f);
  ContextArgs args = context_args(gates, norm, c0);
  args.c = view(c);
  args.c_last = view(c_last);
  cpu::context_forward(args);
  return {c, c_last};
}

using ContextGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Of context_scan, and with c and grad_c absent of context_update (then grad_c_last is the gradient of its result).
ContextGradients context_backward(const OptionalTensor& grad_c_, const OptionalTensor& grad_c_last_, const Tensor& f,
                                  const OptionalTensor& i, const OptionalTensor& d, const OptionalTensor& c_,
                                  const Tensor& c0_, const OptionalTensor& weight, const OptionalTensor& bias,
                                  double eps, double clamp) {
  const Gates gates(f, i, d);
  GateGradients grads(gates);
  const Norm norm(f, weight, bias, eps, clamp);
  const Tensor c0 = with_contiguous_rows(c0_);
  const OptionalTensor c = with_contiguous_rows(c_), grad_c = with_contiguous_rows(grad_c_);
  const OptionalTensor grad_c_last = with_contiguous_rows(grad_c_last_);
  Tensor grad_c0 = empty<2>({gates.B(), gates.D}, c0.scalar_type(), f);
  Tensor grad_weight = empty<1>({gates.D}, acc_type(f), f), grad_bias = empty<1>({gates.D}, acc_type(f), f);
  ContextBackwardArgs args;
  args.dtype = dtype_of(gates.first);
  args.state_dtype = dtype_of(c0);
  args.B = gates.B();
  args.T = gates.T();
  args.D = gates.D;
  args.norm = norm.params;
  args.f = gates.f;
  args.i = gates.i;
  args.d = gates.d;
  args.c = view(c);
  args.grad_c = view(grad_c);
  args.c0 = view(c0);
  args.grad_c_last = view(grad_c_last);
  args.grad_f = grads.f;
  args.grad_i = grads.i;
  args.grad_d = grads.d;
  args.grad_c0 = view(grad_c0);
  args.grad_weight = grad_weight.data_ptr();
  args.grad_bias = grad_bias.data_ptr();
  cpu::context_backward(args);
  return {grads.first, grads.second, grads.third, grad_c0, grad_weight, grad_bias};
}

ContextGradients context_update_backward(const Tensor& grad, const Tensor& f, const OptionalTensor& i,
                                         const OptionalTensor& d, const Tensor& c, const OptionalTensor& weight,
                                         const OptionalTensor& bias, double eps, double clamp) {
  return context_backward(std::nullopt, grad, f, i, d, std::nullopt, c, weight, bias, eps, clamp);
}

// What the recurrent kernels read of their weights, kept alive while they run.
struct Recurrent {
  Tensor context;
  OptionalTensor hidden, hidden_bias, gates, gates_bias;
  Norm norm;
  RecurrentShape shape;
  RecurrentWeights weights;

  Recurrent(const Tensor& rows, const Tensor& context_, const OptionalTensor& hidden_,
            const OptionalTensor& hidden_bias_, const OptionalTensor& gates_, const OptionalTensor& gates_bias_,
            const OptionalTensor& weight, const OptionalTensor& bias, double eps, double clamp, int64_t activation,
            int64_t norm_kind)
      : context(*contiguous(OptionalTensor(context_))),
        hidden(contiguous(hidden_)),
        hidden_bias(parameter(hidden_bias_, rows, false)),
        gates(contiguous(gates_)),
        gates_bias(parameter(gates_bias_, rows, false)),
        norm(rows, weight, bias, eps, clamp) {
    shape.dtype = dtype_of(rows);
    shape.B = rows.size(0);
    shape.T = rows.size(1);
    shape.D = context.size(1);
    shape.H = gates ? gates->size(1) : 0;
    shape.layers = (gates ? 1 : 0) + (hidden ? hidden->size(0) : 0);
    shape.activation = static_cast<ActivationKind>(activation);
    shape.norm_kind = static_cast<NormKind>(norm_kind);
    weights = {context.data_ptr(), data_or_null(hidden), data_or_null(hidden_bias), data_or_null(gates),
               data_or_null(gates_bias)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_context(
    const Tensor& z_, const Tensor& c0_, const Tensor& context, const OptionalTensor& hidden,
    const OptionalTensor& hidden_bias, const OptionalTensor& gates, const OptionalTensor& gates_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, double clamp, int64_t activation,
    int64_t norm_kind, bool save, bool with_decay) {
  const Tensor z = with_contiguous_rows(z_), c0 = *contiguous(OptionalTensor(c0_));
  const Recurrent cell(z, context, hidden, hidden_bias, gates, gates_bias, weight, bias, eps, clamp, activation,
                       norm_kind);
  const int64_t B = cell.shape.B, T = cell.shape.T, D = cell.shape.D;
  Tensor c = empty<3>({B, T, D}, z.scalar_type(), z), c_last = empty<2>({B, D}, acc_type(z), z);
  Tensor pre = save ? empty<3>({B, T, cell.shape.S()}, z.scalar_type(), z) : empty<1>({0}, z.scalar_type(), z);
  Tensor decay = with_decay ? empty<2>({B, D}, acc_type(z), z) : empty<1>({0}, acc_type(z), z);
  RecurrentArgs args;
  args.shape = cell.shape;
  args.weights = cell.weights;
  args.norm = cell.norm.params;
  args.z = view(z);
  args.c0 = c0.data_ptr();
  args.c = view(c);
  args.c_last = c_last.data_ptr();
  if (save) args.pre = view(pre);
  if (with_decay) args.decay = decay.data_ptr();
  cpu::recurrent_forward(args);
  return {c, c_last, pre, decay};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_context_backward(
    const OptionalTensor& grad_c_, const OptionalTensor& grad_c_last_, const Tensor& pre_, const Tensor& c_,
    const Tensor& c0_, const Tensor& context, const OptionalTensor& hidden, const OptionalTensor& gates,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, double clamp, int64_t activation,
    int64_t norm_kind, bool with_decay) {
  const Tensor pre = with_contiguous_rows(pre_), c = with_contiguous_rows(c_);
  const OptionalTensor grad_c = with_contiguous_rows(grad_c_), grad_c_last = contiguous(grad_c_last_);
  const Tensor c0 = *contiguous(OptionalTensor(c0_));
  const Recurrent cell(pre, context, hidden, std::nullopt, gates, std::nullopt, weight, bias, eps, clamp, activation,
                       norm_kind);
  const RecurrentShape& shape = cell.shape;
  const int64_t B = shape.B, T = shape.T, D = shape.D;
  Tensor grad_pre = empty<3>({B, T, shape.S()}, pre.scalar_type(), pre);
  Tensor hidden_rows = empty<3>({B, T, shape.layers * shape.H}, pre.scalar_type(), pre);
  Tensor grad_c0 = empty<2>({B, D}, acc_type(pre), pre);
  Tensor grad_weight = empty<1>({D}, acc_type(pre), pre), grad_bias = empty<1>({D}, acc_type(pre), pre);
  Tensor decay = with_decay ? empty<2>({B, D}, acc_type(pre), pre) : empty<1>({0}, acc_type(pre), pre);
  RecurrentBackwardArgs args;
  args.shape = shape;
  args.weights = cell.weights;
  args.norm = cell.norm.params;
  args.grad_c = view(grad_c);
  args.pre = view(pre);
  args.c = view(c);
  args.c0 = c0.data_ptr();
  args.grad_c_last = data_or_null(grad_c_last);
  args.grad_pre = view(grad_pre);
  args.hidden = view(hidden_rows);
  args.grad_c0 = grad_c0.data_ptr();
  args.grad_weight = grad_weight.data_ptr();
  args.grad_bias = grad_bias.data_ptr();
  if (with_decay) args.decay = decay.data_ptr();
  cpu::recurrent_backward(args);
  return {grad_pre, hidden_rows, grad_c0, grad_weight, grad_bias, decay};
}

}  // namespace
}  // namespace newllm

STABLE_TORCH_LIBRARY_IMPL(newllm_native, CPU, m) {
  newllm::cpu::parallel_runner = newllm::run_in_pytorchs_pool;
  newllm::cpu::thread_count = newllm::pytorchs_threads;
  m.impl("scan", TORCH_BOX(&newllm::scan<newllm::Cpu>));
  m.impl("scan_backward", TORCH_BOX(&newllm::scan_backward<newllm::Cpu>));
  m.impl("gated_scan", TORCH_BOX(&newllm::gated_scan<newllm::Cpu>));
  m.impl("gated_scan_backward", TORCH_BOX(&newllm::gated_scan_backward<newllm::Cpu>));
  m.impl("context_update", TORCH_BOX(&newllm::context_update));
  m.impl("context_update_backward", TORCH_BOX(&newllm::context_update_backward));
  m.impl("context_scan", TORCH_BOX(&newllm::context_scan));
  m.impl("context_scan_backward", TORCH_BOX(&newllm::context_backward));
  m.impl("recurrent_context", TORCH_BOX(&newllm::recurrent_context));
  m.impl("recurrent_context_backward", TORCH_BOX(&newllm::recurrent_context_backward));
  m.impl("layer_norm", TORCH_BOX(&newllm::layer_norm<newllm::Cpu>));
  m.impl("layer_norm_backward", TORCH_BOX(&newllm::layer_norm_backward<newllm::Cpu>));
}

// Read by newllm_kernels.native through ctypes: the instruction set that this processor and NEWLLM_CPU_ISA lead to.
extern "C" __attribute__((visibility("default"))) const char* newllm_active_isa() {
  try {
    return newllm::cpu::active_isa();
  } catch (const std::exception&) {
    return "";  // NEWLLM_CPU_ISA holds no known name; the first kernel call says so
  }
}
