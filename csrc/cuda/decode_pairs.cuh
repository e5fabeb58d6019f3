// x of several rows that a layer of the same program wrote, in pairs of 16-bit numbers: read once, all that a thread
// can hold asked for at a time. What decode_rows.cuh does, which takes anything, reads a row that the threads of a warp
// or two cannot hold three times over.
#pragma once

#include "copy_async.cuh"
#include "decode_rows.cuh"

namespace newllm::cuda {

// What of a row a warp has to do: a row is shared out over as few warps as can hold it, for each executes all of this.
struct RowShare {
  int log_warps, rows;      // of a row; rows at a time
  int row, first, threads;  // the first row, the place in its team of threads

  __device__ __forceinline__ RowShare(int K, int B) {
    log_warps = max(31 - __clz(kDecodeWarps) - (B == 1 ? 0 : 32 - __clz(B - 1)), 0);
    while (log_warps > 0 && K <= 256 << log_warps) --log_warps;
    rows = kDecodeWarps >> log_warps, row = threadIdx.x / 32 >> log_warps;
    threads = 32 << log_warps, first = threadIdx.x & (threads - 1);
  }
};

// Of sums about `pivot`, the same for the whole warp.
__device__ __forceinline__ Moments join_lanes(float pivot, float sum, float squares, int count, int warps,
                                              Moments* scratch) {
  Moments own;
  own.count = float(__reduce_add_sync(0xffffffffu, count));
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  const float apart = __fdividef(sum, fmaxf(own.count, 1.0f));
  own.mean = pivot + apart;
  own.squares = fmaf(-apart, sum, squares);
  return join_warps(own, warps, scratch);
}

// LayerNorm and clamp of four numbers of a row.
template <class W>
__device__ __forceinline__ void normalize_quad(float (&y)[4], const DecodeLinear& layer, const char* norms, int k,
                                               float mean, float rstd) {
  NormQuad<W> norm;
  if (layer.norm) norm.load(norms, k);
  const float limit = layer.clamp_value;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    y[j] = (y[j] - mean) * rstd;
    if (layer.norm) y[j] = fmaf(y[j], norm.weight(j), norm.bias(j));
    y[j] = y[j] > limit ? limit : y[j];  // false for NaN, which passes as in torch.clamp
    y[j] = y[j] < -limit ? -limit : y[j];
  }
}

// Two words of pairs are four numbers of 16 bits.
__device__ __forceinline__ uint2 bits_of_pairs(ulonglong2 words) {
  return make_uint2(uint32_t(words.x), uint32_t(words.y));
}

template <class W>
__device__ __forceinline__ void unpack_quad(uint2 bits, float (&x)[4]) {
  using Pair = typename Vec<W, 2>::Raw;
  float low[2], high[2];
  Vec<W, 2>::unpack(reinterpret_cast<const Pair&>(bits.x), low);
  Vec<W, 2>::unpack(reinterpret_cast<const Pair&>(bits.y), high);
  x[0] = low[0], x[1] = low[1], x[2] = high[0], x[3] = high[1];
}

// Quads q, q + step, ... of a row of pairs; the whole warp waits until all of its are there, so that it stays together.
template <int kMost>
__device__ __forceinline__ void load_pair_words(const ulonglong2* row, uint32_t mark, int q, int step, int quads,
                                                uint2 (&x)[kMost]) {
  uint32_t wrong;
  Patience patience;
  do {
    patience.again();
    wrong = 0;
    ulonglong2 words[kMost];
#pragma unroll
    for (int h = 0; h < kMost; ++h) {
      if (q + h * step >= quads) break;
      words[h] = load_two_words(reinterpret_cast<const uint64_t*>(row + q + h * step));
    }
#pragma unroll
    for (int h = 0; h < kMost; ++h) {
      if (q + h * step >= quads) break;
      wrong |= (uint32_t(words[h].x >> 32) ^ mark) | (uint32_t(words[h].y >> 32) ^ mark);
      x[h] = bits_of_pairs(words[h]);
    }
  } while (__any_sync(0xffffffffu, wrong != 0));
}

// The same for pairs, K a multiple of 4, and a factor of pairs. x is read once, and what LayerNorm makes of it takes
// its place in shared memory. Squares are summed about the warp's first number.
template <class W, int kRows>
__device__ __forceinline__ void prepare_pairs(const DecodeLinear& layer, uint32_t launch, char* shared_x,
                                              const char* norms, Moments* scratch) {
  const int K = layer.K, B = layer.B, quads = K / 4, stages = stages_of(K, sizeof(W));
  const int padded = stages * (kStageRowBytes / int(sizeof(W)));
  const RowShare share(K, B);
  constexpr int kMost = kRows > 8 ? 6 : 4;  // quads that a thread waits for at a time
  constexpr bool kHoldsFactor = kRows <= 8;
  const int step = share.threads, lane = threadIdx.x % 32;
  const bool again = layer.normalize || layer.factor.data;
#pragma unroll 1
  for (int base = 0; base < B; base += share.rows) {  // more than once only with a warp a row
    const int b = base + share.row;
    const bool real = b < B;
    W* const to = reinterpret_cast<W*>(shared_x + b * x_row_bytes(stages));
    uint2* const raw = reinterpret_cast<uint2*>(to);
    const ulonglong2* const from = static_cast<const ulonglong2*>(layer.x.data) + int64_t(b) * quads;
    const ulonglong2* const factor = static_cast<const ulonglong2*>(layer.factor.data) + int64_t(b) * quads;
    uint2 times[kMost];
    float pivot = 0, sum = 0, squares = 0;
    int count = 0;
#pragma unroll 1
    for (int begin = share.first - lane; real && begin < quads; begin += kMost * step) {  // whole warps
      const int q = begin + lane;
      uint2 x[kMost];
      load_pair_words(from, launch + layer.x.from, q, step, quads, x);
      if (begin < step) {
        if (kHoldsFactor && layer.factor.data)
          load_pair_words(factor, launch + layer.factor.from, q, step, quads, times);
        pivot = __shfl_sync(0xffffffffu, value_of_bits<W>(x[0].x), 0);
      }
#pragma unroll
      for (int h = 0; h < kMost; ++h) {
        if (q + h * step >= quads) break;
        raw[q + h * step] = x[h];
        float y[4];
        unpack_quad<W>(x[h], y);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float apart = y[j] - pivot;
          sum += apart;
          squares = fmaf(apart, apart, squares);
        }
        count += 4;
      }
    }
    float mean = 0, rstd = 1;
    if (layer.normalize) {
      const Moments whole = join_lanes(pivot, sum, squares, count, 1 << share.log_warps, scratch);
      mean = whole.mean;
      const float variance = __fdividef(whole.squares, float(K));
      rstd = rsqrtf((variance < 0 ? 0 : variance) + layer.eps);  // NaN stays
    }
    float* const x_out = blockIdx.x == 0 && layer.x_out ? layer.x_out + int64_t(b) * K : nullptr;
#pragma unroll 1
    for (int begin = share.first - lane; again && real && begin < quads; begin += kMost * step) {
      const int q = begin + lane;
      if (layer.factor.data && !(kHoldsFactor && begin < step))
        load_pair_words(factor, launch + layer.factor.from, q, step, quads, times);
#pragma unroll
      for (int h = 0; h < kMost; ++h) {
        if (q + h * step >= quads) break;
        const int k = (q + h * step) * 4;
        float y[4], z[4];
        unpack_quad<W>(raw[q + h * step], y);
        if (layer.normalize) normalize_quad<W>(y, layer, norms, k, mean, rstd);
        if (x_out) *reinterpret_cast<float4*>(x_out + k) = make_float4(y[0], y[1], y[2], y[3]);
        if (layer.factor.data) {
          unpack_quad<W>(times[h], z);
#pragma unroll
          for (int j = 0; j < 4; ++j) y[j] *= z[j];
        }
        store_quad(to + k, y);
      }
    }
    if (real) {  // zeros up to the end of the last stage
      for (int k = K + share.first; k < padded; k += step) to[k] = from_float<W>(0.0f);
    }
  }
}

// Whatever x is, without a place in the caller's registers.
template <class W>
__device__ __noinline__ void prepare_row_apart(const DecodeLinear* layers, int number, uint32_t launch,
                                               const Progress& progress, char* shared_x, Moments* scratch) {
  prepare_row<W, 1>(layers, number, launch, progress, shared_x, scratch);
}

// Every multiplying thread calls it. LayerNorm's parameters are asked for before x is waited for.
template <class W, int kRows>
__device__ __forceinline__ void prepare_x(const DecodeLinear* layers, int number, uint32_t launch,
                                          const Progress& progress, char* shared_x, char* norms, Moments* scratch) {
  if constexpr (sizeof(W) == 4) {
    prepare_row<W, 4>(layers, number, launch, progress, shared_x, scratch);
  } else {
    const DecodeLinear& layer = layers[number];
    const DecodeStorage pairs = DecodeStorage::kPairs;
    const bool factor_fits = layer.factor.data == nullptr || layer.factor.storage == pairs;
    if (layer.x.storage != pairs || !factor_fits || layer.K % 4 != 0 || layer.K == 0) {
      prepare_row_apart<W>(layers, number, launch, progress, shared_x, scratch);
      return;
    }
    const char* const from = static_cast<const char*>(layer.norm);
    for (int at = threadIdx.x * 16; from && at < norm_bytes(layer.K, sizeof(W)); at += kDecodeThreads * 16) {
      copy_async<16, false>(norms + at, from + at, true);
    }
    copy_async_commit();
    if (threadIdx.x < 32) progress.wait(layers, layer.x.from);
    copy_async_wait<0>();
    meet();
    prepare_pairs<W, kRows>(layer, launch, shared_x, norms, scratch);
  }
}

}  // namespace newllm::cuda
