// Schemas of the compiled kernels. They are internal: `newllm::*`, the operators with autograd and fake kernels, are
// defined in newllm_kernels/<op>/__init__.py and call these where the backend is "cpu" or "cuda".
//
// f, i, d: three tensors (B, T, D), or f alone with the three as column blocks (B, T, 3D); gradients come laid out
// alike. States and statistics are in the accumulation type, float32 or (for float64) float64, and so are the gradients
// of weight and bias; these themselves may be of any dtype.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(newllm_native, m) {
  m.def("scan(Tensor a, Tensor b, Tensor? h0, bool reverse, Tensor? cu_seqlens) -> (Tensor h, Tensor h_last)");
  m.def(
      "scan_backward(Tensor? grad_h, Tensor? grad_h_last, Tensor a, Tensor h, Tensor? h0, bool reverse, "
      "Tensor? cu_seqlens) -> (Tensor grad_a, Tensor grad_b, Tensor grad_h0)");
  m.def("gated_scan(Tensor f, Tensor? i, Tensor? d, Tensor? c0, Tensor? cu_seqlens) -> (Tensor c, Tensor c_last)");
  m.def(
      "gated_scan_backward(Tensor? grad_c, Tensor? grad_c_last, Tensor f, Tensor? i, Tensor? d, Tensor c, Tensor? c0, "
      "Tensor? cu_seqlens) -> (Tensor grad_f, Tensor grad_i, Tensor grad_d, Tensor grad_c0)");
  m.def(
      "gated_scan_layer_norm(Tensor f, Tensor? i, Tensor? d, Tensor? c0, Tensor? cu_seqlens, Tensor? weight, Tensor? "
      "bias, "
      "float eps, float clamp) -> (Tensor y, Tensor c, Tensor c_last, Tensor mean, Tensor rstd)");
  m.def(
      "gated_scan_layer_norm_backward(Tensor? grad_y, Tensor? grad_c, Tensor? grad_c_last, Tensor f, Tensor? i, "
      "Tensor? d, Tensor c, Tensor? c0, Tensor? cu_seqlens, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
      "float clamp) -> (Tensor grad_f, Tensor grad_i, Tensor grad_d, Tensor grad_c0, Tensor grad_weight, "
      "Tensor grad_bias)");
  m.def(
      "context_update(Tensor f, Tensor? i, Tensor? d, Tensor c, Tensor? weight, Tensor? bias, float eps, float clamp) "
      "-> Tensor");
  m.def(
      "context_update_backward(Tensor grad, Tensor f, Tensor? i, Tensor? d, Tensor c, Tensor? weight, Tensor? bias, "
      "float eps, float clamp) -> (Tensor grad_f, Tensor grad_i, Tensor grad_d, Tensor grad_c, Tensor grad_weight, "
      "Tensor grad_bias)");
  m.def(
      "context_scan(Tensor f, Tensor? i, Tensor? d, Tensor c0, Tensor? weight, Tensor? bias, float eps, float clamp) "
      "-> (Tensor c, Tensor c_last)");
  m.def(
      "context_scan_backward(Tensor? grad_c, Tensor? grad_c_last, Tensor f, Tensor? i, Tensor? d, Tensor? c, Tensor "
      "c0, "
      "Tensor? weight, Tensor? bias, float eps, float clamp) -> (Tensor grad_f, Tensor grad_i, Tensor grad_d, "
      "Tensor grad_c0, Tensor grad_weight, Tensor grad_bias)");
  // CUDA only: chunks of so many steps in passes where `change` (passes, B, chunks) is given and filled; else in order.
  m.def(
      "context_scan_in_time(Tensor f, Tensor? i, Tensor? d, Tensor c0, Tensor? weight, Tensor? bias, float eps, float "
      "clamp, int steps, float tolerance, Tensor(a!)? change) -> (Tensor c, Tensor c_last)");
  m.def(
      "context_scan_in_time_backward(Tensor? grad_c, Tensor? grad_c_last, Tensor f, Tensor? i, Tensor? d, Tensor c, "
      "Tensor c0, Tensor? weight, Tensor? bias, float eps, float clamp, int steps, float tolerance, Tensor(a!)? "
      "change) "
      "-> (Tensor grad_f, Tensor grad_i, Tensor grad_d, Tensor grad_c0, Tensor grad_weight, Tensor grad_bias)");
  // activation and norm: as ActivationKind and NormKind of args.h. decay: whether the product of the direct derivatives
  // over T is wanted; what is not wanted is empty.
  m.def(
      "recurrent_context(Tensor z, Tensor c0, Tensor context_weight, Tensor? hidden_weight, Tensor? hidden_bias, "
      "Tensor? gate_weight, Tensor? gate_bias, Tensor? weight, Tensor? bias, float eps, float clamp, int activation, "
      "int norm, bool save, bool decay) -> (Tensor c, Tensor c_last, Tensor pre, Tensor decay)");
  m.def(
      "recurrent_context_backward(Tensor? grad_c, Tensor? grad_c_last, Tensor pre, Tensor c, Tensor c0, "
      "Tensor context_weight, Tensor? hidden_weight, Tensor? gate_weight, Tensor? weight, Tensor? bias, float eps, "
      "float clamp, int activation, int norm, bool decay) -> (Tensor grad_pre, Tensor hidden, Tensor grad_c0, "
      "Tensor grad_norm, Tensor decay)");
  m.def(
      "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) "
      "-> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
  // Where no gradient will be asked for; without a residual sum is y itself. CUDA only.
  m.def(
      "layer_norm_plain(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor "
      "sum)");
  m.def(
      "layer_norm_backward(Tensor? grad_y, Tensor? grad_sum, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
      "bool as_weight=False) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  // A layer of one token (csrc/decode_args.h) as bytes on the device, which decode_run runs one under the other, and
  // decode_linear one at once. Written are y, context, x_out and state_out. `counters` (2) int64 begin as 0.
  m.def(
      "decode_layer(Tensor x, Tensor? tokens, Tensor? factor, Tensor? addend, Tensor? residual, Tensor? y, Tensor? "
      "context, Tensor? kept, Tensor? norm, Tensor? x_out, Tensor[] weights, Tensor?[] biases, Tensor? state, Tensor? "
      "state_out, float eps, "
      "float clamp, int flags, int[] sources, int epilogue, int activation) -> Tensor");
  m.def(
      "decode_linear(Tensor x, Tensor? tokens, Tensor? factor, Tensor? addend, Tensor? residual, Tensor(a!)? y, "
      "Tensor(b!)? context, "
      "Tensor? kept, Tensor? norm, Tensor(c!)? x_out, Tensor[] weights, Tensor?[] biases, Tensor? state, Tensor(d!)? "
      "state_out, "
      "float eps, "
      "float clamp, int flags, int[] sources, int epilogue, int activation) -> ()");
  m.def("decode_run(Tensor program, Tensor(a!) counters, Tensor weight, int B, int widest, int widest_norm) -> ()");
}
