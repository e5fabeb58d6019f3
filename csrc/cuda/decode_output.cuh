// What comes after the product of a layer of one token: of the warps' sums the layer's outputs.
#pragma once

#include "decode_words.cuh"

namespace newllm::cuda {

__device__ __forceinline__ float activate(float z, DecodeActivation activation) {
  switch (activation) {
    case DecodeActivation::kRelu: return z < 0.0f ? 0.0f : z;  // NaN stays
    case DecodeActivation::kGelu: return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
    case DecodeActivation::kSilu: return z * sigmoid_fast(z).value;
    case DecodeActivation::kTanh: return tanh_fast(z).value;
    default: return z;
  }
}

// One row of a unit, for one row of the batch: eight neighbouring lanes hold the eight. What does not depend on the
// product is asked for before it.
template <class W>
struct Output {
  int b, unit, n, part, column;
  bool real;
  float added, old;  // bias; state or residual

  // Units from `first` to `last` of this block are in work.
  __device__ __forceinline__ void find(const DecodeLinear& layer, int index, int first, int last) {
    real = false;
    if (index / 32 * 32 >= (last - first) * layer.B * kUnitRows) return;  // nothing for the whole warp
    added = old = 0;
    const int shift = unit_shift(layer.parts), pair = index / kUnitRows, B = layer.B, N = layer.N;
    n = index % kUnitRows;
    unit = B == 1 ? pair : pair / B;
    b = pair - unit * B;
    part = n >> shift;
    column = ((layer.first_unit + first + unit) << shift) + (n & ((1 << shift) - 1));
    real = first + unit < last && part < layer.parts && column < N;
    if (!real) return;
    const W* bias = static_cast<const W*>(layer.bias[part]);
    if (bias) added = to_float(bias[column]);
    if (part > 0) return;
    if (layer.state) old = layer.state[int64_t(b) * N + column];
    const DecodeTensor residual = layer.residual;
    if (residual.data == nullptr) return;
    // `kept` by this block, whose share of N columns is always the same; or a row of a table.
    const int64_t at = (layer.residual_is_table ? layer.tokens[b] : b) * int64_t(N) + column;
    const bool is_float = residual.storage == DecodeStorage::kFloat;
    old = is_float ? static_cast<const float*>(residual.data)[at] : to_float(static_cast<const W*>(residual.data)[at]);
  }

  // What another layer added up already, once it is there.
  __device__ __forceinline__ float addend(const DecodeLinear& layer, uint32_t launch) const {
    const int width = layer.parts * layer.N, at = part * layer.N + column;
    if (layer.addend.storage == DecodeStorage::kFloat) {
      return static_cast<const float*>(layer.addend.data)[int64_t(b) * width + at];
    }
    const uint64_t* from = static_cast<const uint64_t*>(layer.addend.data) + b * words_of_row(width) + at;
    uint64_t word;
    Patience patience;
    do {
      patience.again();
      word = load_word(from);
    } while (uint32_t(word >> 32) != launch + layer.addend.from);
    return value_of(word);
  }

  // partial: (unit, warp, B, 8). A unit of fewer stages than there are lines has sums of the first lines from `line` on
  // only.
  __device__ __forceinline__ void finish(const DecodeLinear& layer, const float* partial, int line, int stages,
                                         uint32_t launch, uint32_t mark) {
    const int B = layer.B, N = layer.N;
    float z = added;
    if (real) {
      if (layer.addend.data) z += addend(layer, launch);
      const int step = B * kUnitRows;
      const float* sums = partial + unit * kDecodeWarps * step + b * kUnitRows + n;
      float of_warp[kDecodeWarps];
#pragma unroll
      for (int warp = 0; warp < kDecodeWarps; ++warp) {
        const bool there = ((warp / kWarpsOfLine - line - unit * stages) & (kLines - 1)) < stages;
        of_warp[warp] = there ? sums[warp * step] : 0.0f;
      }
#pragma unroll
      for (int width = kDecodeWarps / 2; width > 0; width /= 2) {
        for (int warp = 0; warp < width; ++warp) of_warp[warp] += of_warp[warp + width];
      }
      z += of_warp[0];
    }
    const int columns = 1 << unit_shift(layer.parts), lane = threadIdx.x % 32, own = (lane & ~7) + (n & (columns - 1));
    float y = z;
    if (layer.epilogue == DecodeEpilogue::kLinear) {
      y = activate(z, layer.activation) + old;
    } else {
      const float second = __shfl_sync(0xffffffffu, z, own + columns);
      if (layer.epilogue == DecodeEpilogue::kGated) {
        y = z * sigmoid_fast(z).value * second;
      } else {
        const float third = __shfl_sync(0xffffffffu, z, own + 2 * columns);
        y = __shfl_sync(0xffffffffu, z, own + 3 * columns);
        y *= sigmoid_fast(y).value;
        const float context = sigmoid_fast(z).value * old + sigmoid_fast(second).value * tanh_fast(third).value;
        const bool here = real && part == 0;
        if (layer.context.data) store_activation<W>(layer.context, here, b, column, N, context, mark);
        if (here && layer.state_out) layer.state_out[int64_t(b) * N + column] = context;
      }
    }
    const bool here = real && part == 0;
    if (layer.y.data) store_activation<W>(layer.y, here, b, column, N, y, mark);
    if (here && layer.kept) layer.kept[int64_t(b) * N + column] = y;
  }
};

}  // namespace newllm::cuda
