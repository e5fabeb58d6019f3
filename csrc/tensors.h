// From PyTorch tensors to the raw arguments of the kernels. Python has validated shapes, dtypes and devices by the time
// an operator of ops_*.cpp is called; what fails here is a mistake of ours.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "args.h"

namespace newllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "newllm: a dtype that the operator's Python side should have refused");
  }
}

// float32 for 16- and 32-bit storage, float64 for float64.
inline ScalarType acc_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline constexpr size_t kMaxDims = 64;  // PyTorch's own limit

// An uninitialised contiguous tensor on the device of `like`. The shim is called directly: going through the
// dispatcher by operator name costs more than a small kernel.
inline Tensor empty(size_t dims, const int64_t* sizes, ScalarType dtype, const Tensor& like) {
  int64_t strides[kMaxDims];
  STD_TORCH_CHECK(dims <= kMaxDims, "newllm: a tensor of more than ", kMaxDims, " dimensions");
  int64_t stride = 1;
  for (size_t k = dims; k-- > 0;) {
    strides[k] = stride;
    stride *= sizes[k] > 1 ? sizes[k] : 1;
  }
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16(), aoti_torch_dtype_int64()};
  const int code = dtype == ScalarType::Float      ? 0
                   : dtype == ScalarType::Double   ? 1
                   : dtype == ScalarType::BFloat16 ? 2
                   : dtype == ScalarType::Half     ? 3
                                                   : 4;
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, codes[code], device_type, device_index, &handle));
  return Tensor(handle);
}

template <size_t N>
Tensor empty(const std::array<int64_t, N>& sizes, ScalarType dtype, const Tensor& like) {
  return empty(N, sizes.data(), dtype, like);
}

inline Tensor empty_of_shape(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return empty(sizes.size(), sizes.data(), tensor.scalar_type(), tensor);
}

// Kernels read rows of contiguous elements; only a tensor whose last dimension is strided is copied.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor with_contiguous_rows(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(with_contiguous_rows(*tensor)) : std::nullopt;
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor)) : std::nullopt;
}

inline void* data_or_null(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// (B, T, D), or (B, D) as the case T = 1. `column` starts the view that many elements into each row.
inline View3 view(const Tensor& tensor, int64_t column = 0) {
  const int64_t bytes = column * int64_t(tensor.element_size());
  return {static_cast<char*>(tensor.data_ptr()) + bytes, tensor.stride(0), tensor.dim() == 3 ? tensor.stride(1) : 0};
}

inline View3 view(const OptionalTensor& tensor) { return tensor ? view(*tensor) : View3{}; }

// The three gates, each (B, T, D) or (B, D): separate tensors, or the column blocks of one packed tensor (..., 3D).
struct Gates {
  Tensor first;
  OptionalTensor second, third;
  int64_t D;
  View3 f, i, d;

  Gates(const Tensor& f_, const OptionalTensor& i_, const OptionalTensor& d_)
      : first(with_contiguous_rows(f_)), second(with_contiguous_rows(i_)), third(with_contiguous_rows(d_)) {
    const int64_t width = first.size(first.dim() - 1);
    D = second ? width : width / 3;
    f = view(first);
    i = second ? view(*second) : view(first, D);
    d = third ? view(*third) : view(first, 2 * D);
  }

  int64_t B() const { return first.size(0); }
  int64_t T() const { return first.dim() == 3 ? first.size(1) : 1; }
};

// Gradients of the gates, laid out as the gates are; where these are packed, the second and third are empty.
struct GateGradients {
  Tensor first, second, third;
  View3 f, i, d;

  explicit GateGradients(const Gates& gates) {
    const bool packed = !gates.second;
    const auto make = [&](int64_t width) {
      return gates.first.dim() == 3 ? empty<3>({gates.B(), gates.T(), width}, gates.first.scalar_type(), gates.first)
                                    : empty<2>({gates.B(), width}, gates.first.scalar_type(), gates.first);
    };
    const auto none = [&] { return empty<1>({0}, gates.first.scalar_type(), gates.first); };
    first = make(packed ? 3 * gates.D : gates.D);
    second = packed ? none() : make(gates.D);
    third = packed ? none() : make(gates.D);
    f = view(first);
    i = packed ? view(first, gates.D) : view(second);
    d = packed ? view(first, 2 * gates.D) : view(third);
  }
};

// A tensor (..., D) as rows of one stride; copied where its leading dimensions do not lie at one distance.
struct Rows {
  Tensor tensor;
  int64_t width, count, stride;

  explicit Rows(const Tensor& source) : tensor(source) {
    if (!collapsible()) tensor = torch::stable::contiguous(source);
    const int64_t dims = tensor.dim();
    width = tensor.size(dims - 1);
    count = tensor.numel() / width;
    stride = dims > 1 ? row_stride() : width;
  }

  void* data() const { return tensor.data_ptr(); }

 private:
  // The stride of the innermost leading dimension that has more than one entry.
  int64_t row_stride() const {
    for (int64_t k = tensor.dim() - 2; k >= 0; --k) {
      if (tensor.size(k) > 1) return tensor.stride(k);
    }
    return tensor.size(tensor.dim() - 1);
  }

  bool collapsible() const {
    const int64_t last = tensor.dim() - 1;
    if (tensor.numel() == 0) return true;
    if (tensor.size(last) > 1 && tensor.stride(last) != 1) return false;
    int64_t expected = -1;
    for (int64_t k = last - 1; k >= 0; --k) {
      if (tensor.size(k) == 1) continue;
      if (expected >= 0 && tensor.stride(k) != expected) return false;
      expected = tensor.stride(k) * tensor.size(k);
    }
    return true;
  }
};

inline std::optional<Rows> rows_of(const OptionalTensor& tensor) {
  return tensor ? std::optional<Rows>(Rows(*tensor)) : std::nullopt;
}

// A parameter (D) as the kernels read it: contiguous, in the accumulation type, or, where `as_stored` and it is of the
// dtype of the rows, as it is.
inline OptionalTensor parameter(const OptionalTensor& tensor, const Tensor& rows, bool as_stored) {
  if (!tensor) return std::nullopt;
  const ScalarType acc = acc_type(rows), own = tensor->scalar_type();
  const bool fits = own == acc || (as_stored && own == rows.scalar_type());
  return contiguous(fits ? tensor : OptionalTensor(torch::stable::to(*tensor, acc)));
}

// LayerNorm's parameters (D).
struct Norm {
  OptionalTensor weight, bias;
  NormParams params;

  Norm(const Tensor& rows, const OptionalTensor& weight_, const OptionalTensor& bias_, double eps, double clamp_value,
       bool as_stored = false)
      : weight(parameter(weight_, rows, as_stored)), bias(parameter(bias_, rows, as_stored)) {
    params.weight = data_or_null(weight);
    params.bias = data_or_null(bias);
    if (weight) params.weight_dtype = dtype_of(*weight);
    if (bias) params.bias_dtype = dtype_of(*bias);
    params.eps = eps;
    params.clamp_value = clamp_value;
  }
};

}  // namespace newllm
