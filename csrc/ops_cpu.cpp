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
  static void run(const RecurrentArgs& args, const Tensor&) { cpu::recurrent_forward(args); }
  static void run(const RecurrentBackwardArgs& args, const Tensor&) { cpu::recurrent_backward(args); }
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
  m.impl("recurrent_context", TORCH_BOX(&newllm::recurrent_context<newllm::Cpu>));
  m.impl("recurrent_context_backward", TORCH_BOX(&newllm::recurrent_context_backward<newllm::Cpu>));
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
