// `scan`, `gated_scan`, `layer_norm` and `recurrent_context` as operators, for CPU and CUDA alike: from tensors to
// arguments and back. A Backend has run(arguments, a tensor of the call) for each kind of arguments, and says whether
// its LayerNorm reads weight and bias in the dtype of the rows.
#pragma once

#include <tuple>

#include "tensors.h"

namespace newllm {

inline ScanShape scan_shape(const Tensor& like, int64_t D, const OptionalTensor& cu_seqlens) {
  ScanShape shape;
  shape.dtype = dtype_of(like);
  shape.B = like.size(0);
  shape.T = like.size(1);
  shape.D = D;
  shape.cu_seqlens = static_cast<const int64_t*>(data_or_null(cu_seqlens));
  shape.num_sequences = cu_seqlens ? cu_seqlens->size(0) - 1 : shape.B;
  return shape;
}

template <class Backend>
std::tuple<Tensor, Tensor> scan(const Tensor& a_, const Tensor& b_, const OptionalTensor& h0_, bool reverse,
                                const OptionalTensor& cu_seqlens_) {
  const Tensor a = with_contiguous_rows(a_), b = with_contiguous_rows(b_);
  const OptionalTensor h0 = contiguous(h0_), cu_seqlens = contiguous(cu_seqlens_);
  ScanArgs args;
  args.shape = scan_shape(a, a.size(2), cu_seqlens);
  args.reverse = reverse;
  Tensor h = empty<3>({args.shape.B, args.shape.T, args.shape.D}, a.scalar_type(), a);
  Tensor h_last = empty<2>({args.shape.num_sequences, args.shape.D}, acc_type(a), a);
  args.a = view(a);
  args.b = view(b);
  args.h = view(h);
  args.h0 = data_or_null(h0);
  args.h_last = h_last.data_ptr();
  Backend::run(args, a);
  return {h, h_last};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> scan_backward(const OptionalTensor& grad_h_, const OptionalTensor& grad_h_last_,
                                                 const Tensor& a_, const Tensor& h_, const OptionalTensor& h0_,
                                                 bool reverse, const OptionalTensor& cu_seqlens_) {
  const Tensor a = with_contiguous_rows(a_), h = with_contiguous_rows(h_);
  const OptionalTensor grad_h = with_contiguous_rows(grad_h_), grad_h_last = contiguous(grad_h_last_);
  const OptionalTensor h0 = contiguous(h0_), cu_seqlens = contiguous(cu_seqlens_);
  ScanBackwardArgs args;
  args.shape = scan_shape(a, a.size(2), cu_seqlens);
  args.reverse = reverse;
  const std::array<int64_t, 3> sizes{args.shape.B, args.shape.T, args.shape.D};
  Tensor grad_a = empty(sizes, a.scalar_type(), a), grad_b = empty(sizes, a.scalar_type(), a);
  Tensor grad_h0 = empty<2>({args.shape.num_sequences, args.shape.D}, acc_type(a), a);
  args.grad_h = view(grad_h);
  args.a = view(a);
  args.h = view(h);
  args.grad_a = view(grad_a);
  args.grad_b = view(grad_b);
  args.grad_h_last = data_or_null(grad_h_last);
  args.h0 = data_or_null(h0);
  args.grad_h0 = grad_h0.data_ptr();
  Backend::run(args, a);
  return {grad_a, grad_b, grad_h0};
}

template <class Backend>
std::tuple<Tensor, Tensor> gated_scan(const Tensor& f, const OptionalTensor& i, const OptionalTensor& d,
                                      const OptionalTensor& c0_, const OptionalTensor& cu_seqlens_) {
  const Gates gates(f, i, d);
  const OptionalTensor c0 = contiguous(c0_), cu_seqlens = contiguous(cu_seqlens_);
  GatedScanArgs args;
  args.shape = scan_shape(gates.first, gates.D, cu_seqlens);
  Tensor c = empty<3>({args.shape.B, args.shape.T, args.shape.D}, f.scalar_type(), f);
  Tensor c_last = empty<2>({args.shape.num_sequences, args.shape.D}, acc_type(f), f);
  args.f = gates.f;
  args.i = gates.i;
  args.d = gates.d;
  args.c = view(c);
  args.c0 = data_or_null(c0);
  args.c_last = c_last.data_ptr();
  Backend::run(args, f);
  return {c, c_last};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_scan_backward(const OptionalTensor& grad_c_,
                                                               const OptionalTensor& grad_c_last_, const Tensor& f,
                                                               const OptionalTensor& i, const OptionalTensor& d,
                                                               const Tensor& c_, const OptionalTensor& c0_,
                                                               const OptionalTensor& cu_seqlens_) {
  const Gates gates(f, i, d);
  GateGradients grads(gates);
  const Tensor c = with_contiguous_rows(c_);
  const OptionalTensor grad_c = with_contiguous_rows(grad_c_), grad_c_last = contiguous(grad_c_last_);
  const OptionalTensor c0 = contiguous(c0_), cu_seqlens = contiguous(cu_seqlens_);
  GatedScanBackwardArgs args;
  args.shape = scan_shape(gates.first, gates.D, cu_seqlens);
  Tensor grad_c0 = empty<2>({args.shape.num_sequences, args.shape.D}, acc_type(f), f);
  args.grad_c = view(grad_c);
  args.f = gates.f;
  args.i = gates.i;
  args.d = gates.d;
  args.c = view(c);
  args.grad_f = grads.f;
  args.grad_i = grads.i;
  args.grad_d = grads.d;
  args.grad_c_last = data_or_null(grad_c_last);
  args.c0 = data_or_null(c0);
  args.grad_c0 = grad_c0.data_ptr();
  Backend::run(args, f);
  return {grads.first, grads.second, grads.third, grad_c0};
}

// y, c, c_last, mean, rstd.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_scan_layer_norm(
    const Tensor& f, const OptionalTensor& i, const OptionalTensor& d, const OptionalTensor& c0_,
    const OptionalTensor& cu_seqlens_, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
    double clamp) {
  const Gates gates(f, i, d);
  const OptionalTensor c0 = contiguous(c0_), cu_seqlens = contiguous(cu_seqlens_);
  const Norm norm(f, weight, bias, eps, clamp, Backend::kParametersAsStored);
  GatedScanNormArgs args;
  ScanShape& shape = args.scan.shape;
  shape = scan_shape(gates.first, gates.D, cu_seqlens);
  const std::array<int64_t, 3> sizes{shape.B, shape.T, shape.D};
  Tensor y = empty(sizes, f.scalar_type(), f), c = empty(sizes, f.scalar_type(), f);
  Tensor c_last = empty<2>({shape.num_sequences, shape.D}, acc_type(f), f);
  Tensor mean = empty<1>({shape.B * shape.T}, acc_type(f), f), rstd = empty<1>({shape.B * shape.T}, acc_type(f), f);
  args.scan.f = gates.f;
  args.scan.i = gates.i;
  args.scan.d = gates.d;
  args.scan.c = view(c);
  args.scan.c0 = data_or_null(c0);
  args.scan.c_last = c_last.data_ptr();
  args.norm = norm.params;
  args.y = view(y);
  args.mean = mean.data_ptr();
  args.rstd = rstd.data_ptr();
  Backend::run(args, f);
  return {y, c, c_last, mean, rstd};
}

// grad_y must be there, grad_c must not.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_scan_layer_norm_backward(
    const OptionalTensor& grad_y_, const OptionalTensor& grad_c, const OptionalTensor& grad_c_last_, const Tensor& f,
    const OptionalTensor& i, const OptionalTensor& d, const Tensor& c_, const OptionalTensor& c0_,
    const OptionalTensor& cu_seqlens_, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& rstd, double clamp) {
  STD_TORCH_CHECK(grad_y_ && !grad_c, "newllm: gated_scan_layer_norm_backward takes a gradient of y, and none of c");
  const Gates gates(f, i, d);
  GateGradients grads(gates);
  const Tensor c = with_contiguous_rows(c_), grad_y = with_contiguous_rows(*grad_y_);
  const OptionalTensor grad_c_last = contiguous(grad_c_last_);
  const OptionalTensor c0 = contiguous(c0_), cu_seqlens = contiguous(cu_seqlens_);
  const Norm norm(f, weight, bias, 0, clamp, Backend::kParametersAsStored);
  GatedScanNormBackwardArgs args;
  ScanShape& shape = args.scan.shape;
  shape = scan_shape(gates.first, gates.D, cu_seqlens);
  Tensor grad_c0 = empty<2>({shape.num_sequences, shape.D}, acc_type(f), f);
  Tensor grad_weight = empty<1>({shape.D}, acc_type(f), f), grad_bias = empty<1>({shape.D}, acc_type(f), f);
  args.scan.f = gates.f;
  args.scan.i = gates.i;
  args.scan.d = gates.d;
  args.scan.c = view(c);
  args.scan.grad_f = grads.f;
  args.scan.grad_i = grads.i;
  args.scan.grad_d = grads.d;
  args.scan.grad_c_last = data_or_null(grad_c_last);
  args.scan.c0 = data_or_null(c0);
  args.scan.grad_c0 = grad_c0.data_ptr();
  args.norm = norm.params;
  args.grad_y = view(grad_y);
  args.mean = mean.data_ptr();
  args.rstd = rstd.data_ptr();
  args.grad_weight = grad_weight.data_ptr();
  args.grad_bias = grad_bias.data_ptr();
  Backend::run(args, f);
  return {grads.first, grads.second, grads.third, grad_c0, grad_weight, grad_bias};
}

// x, residual: (..., D). Without a `backward` to come, y itself stands for what nobody wants, statistics and (without a
// residual) sum: an allocation costs more of the host's time than a small kernel takes.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_for(bool backward, const Tensor& x_,
                                                          const OptionalTensor& residual_, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, double eps) {
  const Rows x(x_);
  const std::optional<Rows> residual = rows_of(residual_);
  const Norm norm(x_, weight, bias, eps, 0, Backend::kParametersAsStored);
  LayerNormArgs args;
  args.dtype = dtype_of(x_);
  args.rows = x.count;
  args.D = x.width;
  args.norm = norm.params;
  Tensor y = empty_of_shape(x_);
  Tensor sum = residual ? empty_of_shape(x_) : backward ? empty<1>({0}, x_.scalar_type(), x_) : y;
  Tensor mean = backward ? empty<1>({args.rows}, acc_type(x_), x_) : y;
  Tensor rstd = backward ? empty<1>({args.rows}, acc_type(x_), x_) : y;
  args.x = x.data();
  args.x_stride = x.stride;
  if (residual) {
    args.residual = residual->data();
    args.residual_stride = residual->stride;
    args.sum = sum.data_ptr();
  }
  args.y = y.data_ptr();
  args.mean = backward ? mean.data_ptr() : nullptr;
  args.rstd = backward ? rstd.data_ptr() : nullptr;
  Backend::run(args, x_);
  return {y, sum, mean, rstd};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const OptionalTensor& residual,
                                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                                      double eps) {
  return layer_norm_for<Backend>(true, x, residual, weight, bias, eps);
}

template <class Backend>
std::tuple<Tensor, Tensor> layer_norm_plain(const Tensor& x, const OptionalTensor& residual,
                                            const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const auto [y, sum, mean, rstd] = layer_norm_for<Backend>(false, x, residual, weight, bias, eps);
  return {y, sum};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const OptionalTensor& grad_y_, const OptionalTensor& grad_sum_,
                                                       const Tensor& x_, const Tensor& mean, const Tensor& rstd,
                                                       const OptionalTensor& weight, bool as_weight) {
  const Rows x(x_);
  const std::optional<Rows> grad_y = rows_of(grad_y_), grad_sum = rows_of(grad_sum_);
  const Norm norm(x_, weight, std::nullopt, 0, 0, Backend::kParametersAsStored);
  LayerNormBackwardArgs args;
  args.dtype = dtype_of(x_);
  args.rows = x.count;
  args.D = x.width;
  args.norm = norm.params;
  Tensor grad_x = empty_of_shape(x_);
  const ScalarType acc = acc_type(x_), wanted = as_weight && weight ? weight->scalar_type() : acc;
  const bool written = wanted == acc || (Backend::kParametersAsStored && wanted == x_.scalar_type());
  Tensor grad_weight = empty<1>({args.D}, written ? wanted : acc, x_);
  Tensor grad_bias = empty<1>({args.D}, written ? wanted : acc, x_);
  if (grad_y) {
    args.grad_y = grad_y->data();
    args.grad_y_stride = grad_y->stride;
  }
  if (grad_sum) {
    args.grad_sum = grad_sum->data();
    args.grad_sum_stride = grad_sum->stride;
  }
  args.x = x.data();
  args.x_stride = x.stride;
  args.mean = mean.data_ptr();
  args.rstd = rstd.data_ptr();
  args.grad_x = grad_x.data_ptr();
  args.grad_weight = grad_weight.data_ptr();
  args.grad_bias = grad_bias.data_ptr();
  args.grad_dtype = dtype_of(grad_weight);
  Backend::run(args, x_);
  if (written) return {grad_x, grad_weight, grad_bias};
  return {grad_x, torch::stable::to(grad_weight, wanted), torch::stable::to(grad_bias, wanted)};
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

template <class Backend>
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
  Backend::run(args, z);
  return {c, c_last, pre, decay};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_context_backward(
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
  Tensor grad_norm = empty<3>({B, 2, D}, acc_type(pre), pre);
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
  args.grad_norm = grad_norm.data_ptr();
  if (with_decay) args.decay = decay.data_ptr();
  Backend::run(args, pre);
  return {grad_pre, hidden_rows, grad_c0, grad_norm, decay};
}

}  // namespace newllm
