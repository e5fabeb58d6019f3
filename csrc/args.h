// Arguments of the kernels, CPU and CUDA alike: raw pointers, sizes, strides. No torch header is included here or in
// csrc/cpu and csrc/cuda, so every kernel compiles and can be tested on its own.
//
// Dimension letters: B batch, T time steps, D context_dim (last dimension, always contiguous), N sequences.
// Strides are counted in elements. "acc" is the accumulation type: float for 16- and 32-bit storage, double for double.
#pragma once

#include <cstdint>

namespace newllm {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A (B, T, D) tensor whose last dimension is contiguous. Rows (B, D) are the case T = 1.
struct View3 {
  void* data = nullptr;  // nullptr: the tensor is absent
  int64_t stride_b = 0;
  int64_t stride_t = 0;
};

struct ScanShape {
  DType dtype = DType::kFloat32;
  int64_t B = 0, T = 0, D = 0;
  // Packed sequences: B == 1 and sequence s covers rows cu_seqlens[s] .. cu_seqlens[s + 1]; nullptr when dense.
  const int64_t* cu_seqlens = nullptr;
  int64_t num_sequences = 0;  // N; equals B when dense
};

// weight and bias are (D) in acc, on CUDA also in the dtype of the rows; nullptr means 1 and 0. clamp_value
// is +inf where nothing is clamped.
struct NormParams {
  const void* weight = nullptr;
  const void* bias = nullptr;
  DType weight_dtype = DType::kFloat32, bias_dtype = DType::kFloat32;  // read on CUDA
  double eps = 1e-5;
  double clamp_value = 0;
};

// h_t = a_t h_{t-1} + b_t. States are (N, D) contiguous in acc.
struct ScanArgs {
  ScanShape shape;
  bool reverse = false;
  View3 a, b, h;
  const void* h0 = nullptr;
  void* h_last = nullptr;
};

struct ScanBackwardArgs {
  ScanShape shape;
  bool reverse = false;
  View3 grad_h, a, h;    // grad_h may be absent
  View3 grad_a, grad_b;  // written
  const void* grad_h_last = nullptr;
  const void* h0 = nullptr;
  void* grad_h0 = nullptr;  // written, (N, D) acc
};

// c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t)
struct GatedScanArgs {
  ScanShape shape;
  View3 f, i, d, c;
  const void* c0 = nullptr;
  void* c_last = nullptr;
};

struct GatedScanBackwardArgs {
  ScanShape shape;
  View3 grad_c, f, i, d, c;      // grad_c may be absent
  View3 grad_f, grad_i, grad_d;  // written
  const void* grad_c_last = nullptr;
  const void* c0 = nullptr;
  void* grad_c0 = nullptr;  // written, (N, D) acc
};

// c of GatedScanArgs, and y = clamp(LayerNorm(c)). c and y are (B, T, D) contiguous.
struct GatedScanNormArgs {
  GatedScanArgs scan;
  NormParams norm;
  View3 y;
  void* mean = nullptr;  // (B * T) acc
  void* rstd = nullptr;  // (B * T) acc
};

struct GatedScanNormBackwardArgs {
  GatedScanBackwardArgs scan;  // without grad_c
  NormParams norm;
  View3 grad_y;
  const void* mean = nullptr;
  const void* rstd = nullptr;
  void* grad_weight = nullptr;  // written, (D) acc
  void* grad_bias = nullptr;    // written, (D) acc
};

// c_t = clamp(LayerNorm(sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t))) over T steps; context_update is T = 1.
struct ContextArgs {
  DType dtype = DType::kFloat32;
  DType state_dtype = DType::kFloat32;  // of c0 and c_last: dtype itself or its acc
  int64_t B = 0, T = 0, D = 0;
  NormParams norm;
  View3 f, i, d;
  View3 c;           // all contexts, may be absent (context_update writes c_last only)
  View3 c0, c_last;  // (B, D) in state_dtype; stride_t unused
};

struct ContextBackwardArgs {
  DType dtype = DType::kFloat32;
  DType state_dtype = DType::kFloat32;  // of c0, grad_c_last and grad_c0
  int64_t B = 0, T = 0, D = 0;
  NormParams norm;
  View3 f, i, d, c, grad_c;      // c and grad_c may be absent (context_update)
  View3 c0, grad_c_last;         // grad_c_last may be absent
  View3 grad_f, grad_i, grad_d;  // written
  View3 grad_c0;                 // written
  void* grad_weight = nullptr;   // written, (D) acc
  void* grad_bias = nullptr;     // written, (D) acc
};

enum class ActivationKind : int32_t { kRelu, kGelu, kSilu, kTanh };
// Where the cell's LayerNorm stands: nowhere, in the loop, or on what the hidden layer reads of a context.
enum class NormKind : int32_t { kNone, kState, kOutput };

// The whole cell over T steps. Z is H, or 3D where there is no hidden layer; S = layers * H + 3D, what a row of `pre`
// holds: the pre-activations of the hidden layers and the gates, [a_1 | ... | a_L | f | i | d].
struct RecurrentShape {
  DType dtype = DType::kFloat32;
  int64_t B = 0, T = 0, D = 0, H = 0, layers = 0;
  ActivationKind activation = ActivationKind::kSilu;
  NormKind norm_kind = NormKind::kState;

  int64_t Z() const { return layers > 0 ? H : 3 * D; }
  int64_t S() const { return layers * H + 3 * D; }
};

// Contiguous, weights in dtype, biases in acc.
struct RecurrentWeights {
  const void* context = nullptr;      // (Z, D)
  const void* hidden = nullptr;       // (layers - 1, H, H)
  const void* hidden_bias = nullptr;  // (layers - 1, H), may be absent
  const void* gates = nullptr;        // (3D, H), absent where layers is 0
  const void* gates_bias = nullptr;   // (3D), may be absent
};

struct RecurrentArgs {
  RecurrentShape shape;
  RecurrentWeights weights;
  NormParams norm;
  View3 z;                   // (B, T, Z)
  const void* c0 = nullptr;  // (B, D) acc
  View3 c;                   // written
  void* c_last = nullptr;    // written, (B, D) acc
  View3 pre;                 // written, (B, T, S), may be absent
  void* decay = nullptr;     // written, (B, D) acc, may be absent: the product over T of the diagonal of dc_t/dc_{t-1}
};

struct RecurrentBackwardArgs {
  RecurrentShape shape;
  RecurrentWeights weights;
  NormParams norm;
  View3 grad_c;  // may be absent
  View3 pre, c;
  const void* c0 = nullptr;
  const void* grad_c_last = nullptr;
  View3 grad_pre;             // written, (B, T, S)
  View3 hidden;               // written, (B, T, layers * H): what the hidden layers gave
  void* grad_c0 = nullptr;    // written, (B, D) acc
  void* grad_norm = nullptr;  // written, (B, 2, D) acc: gradients of the norm's weight and bias, of every row its own
  void* decay = nullptr;      // as in RecurrentArgs
};

// y = (x - mean) * rstd * weight + bias over rows of D; with a residual, x + residual is normalised and kept in sum.
struct LayerNormArgs {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, D = 0;
  NormParams norm;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  void* sum = nullptr;   // (rows, D) contiguous, written when residual is given
  void* y = nullptr;     // (rows, D) contiguous
  void* mean = nullptr;  // (rows) acc, on CUDA it may be absent, and rstd with it
  void* rstd = nullptr;  // (rows) acc
};

struct LayerNormBackwardArgs {
  DType dtype = DType::kFloat32;
  int64_t rows = 0, D = 0;
  NormParams norm;
  const void* grad_y = nullptr;  // may be absent
  int64_t grad_y_stride = 0;
  const void* grad_sum = nullptr;  // may be absent: the gradient that reached x + residual directly
  int64_t grad_sum_stride = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* mean = nullptr;
  const void* rstd = nullptr;
  void* grad_x = nullptr;              // (rows, D) contiguous
  void* grad_weight = nullptr;         // (D) acc, on CUDA it may also be of the dtype of the rows
  void* grad_bias = nullptr;           // (D), of the same dtype
  DType grad_dtype = DType::kFloat32;  // of these two; read by the CUDA kernels
};

}  // namespace newllm
