// Arguments of the linear layers of one token (csrc/cuda/decode*.cuh); no torch header here either.
#pragma once

#include "args.h"

namespace newllm {

enum class DecodeEpilogue : int32_t { kLinear, kGated, kContext };
enum class DecodeActivation : int32_t { kNone, kRelu, kGelu, kSilu, kTanh };

// How the numbers of an activation are stored. kFloat: float32. kWeight: the dtype of the weights (tables only). The
// others are words of 64 bits that only the layers of one program hand to each other: below a mark of the launch and
// layer that wrote it, one float32 (kWords) or two neighbours in a 16-bit dtype of the weights (kPairs). Who reads a
// word knows by its mark whether it is there yet. Rows are padded to multiples of 4 numbers.
enum class DecodeStorage : int32_t { kFloat, kWeight, kWords, kPairs };

struct DecodeTensor {
  void* data = nullptr;  // nullptr: absent
  DecodeStorage storage = DecodeStorage::kFloat;
  int32_t from = 0;  // words: the layer of the program that wrote them
};

constexpr int kDecodeMostBatch = 16, kDecodeMostParts = 4;

// y = epilogue(W p(x)) for the B <= 16 rows of one token each. W is up to four matrices (N, K) side by side ("parts"):
// output column n is made of row n of every one, which the same block reads.
//
//   p(x) = clamp(LayerNorm(x)) * factor, each where asked for; rounded to the dtype of W, as a layer before would store
//   it z_j  = W_j p(x) + bias_j + addend[:, j N + n] kLinear   y = residual + activation(z_0) kGated    y = silu(z_0) *
//   z_1 kContext  context = sigmoid(z_0) * state + sigmoid(z_1) * tanh(z_2), and y = silu(z_3) where there is a fourth
//   part
//
// K may be 0 (z is bias and addend), and N (only x_out is made).
struct DecodeLinear {
  DecodeTensor x;                   // (B, K), or with `tokens` a table (V, K) of which row tokens[b] is x[b]
  DecodeTensor factor;              // (B, K)
  DecodeTensor addend;              // (B, parts * N)
  DecodeTensor residual;            // (B, N), or with `residual_is_table` a table (V, N) of which row tokens[b] is it
  DecodeTensor y;                   // (B, N)
  DecodeTensor context;             // (B, N)
  float* kept = nullptr;            // (B, N): y once more, for a later residual
  const int64_t* tokens = nullptr;  // (B)
  const void* norm = nullptr;  // LayerNorm's parameters in the dtype of W: four weights, four biases, ...; zeros past K
  float* x_out = nullptr;      // (B, K): where LayerNorm and clamp of x are kept
  const void* weight[kDecodeMostParts] = {};  // (N, K) each, rows contiguous, `weight_stride` elements apart
  const void* bias[kDecodeMostParts] = {};    // (N) in the dtype of W
  const float* state = nullptr;               // (B, N)
  float* state_out = nullptr;                 // (B, N), the context once more; may be `state` itself
  int64_t weight_stride = 0;
  int32_t K = 0, N = 0, B = 0, parts = 1;
  float eps = 1e-5f, clamp_value = 0;  // +inf: nothing is clamped
  bool x_is_table = false, residual_is_table = false;
  bool normalize = false;
  bool barrier = false;  // in a program: begins when all blocks have finished the layers before
  DecodeEpilogue epilogue = DecodeEpilogue::kLinear;
  DecodeActivation activation = DecodeActivation::kNone;
  int32_t first_unit = 0, last_unit = 0;  // the kernel's own: what a block computes
};

static_assert(sizeof(DecodeLinear) % 8 == 0);

}  // namespace newllm
