// What comes before the product of a layer of one token: x, normalised, into shared memory. All of it is latency, and
// run so seldom that its size in the instruction cache counts: fields are read from shared memory once, and no loop is
// unrolled that need not be.
#pragma once

#include "decode_words.cuh"

namespace newllm::cuda {

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Of the threads that multiply.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(kDecodeThreads) : "memory"); }

// Of a row's part: how many columns, their mean, and the sum of squares of what is left without it.
struct Moments {
  float count, mean, squares;
};

// Those of the row that `warps` neighbouring warps share; every thread of the block calls it. scratch: one a warp.
__device__ __forceinline__ Moments join_warps(Moments part, int warps, Moments* scratch) {
  if (warps == 1) return part;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = part;
  meet();
  const Moments* of_row = scratch + (threadIdx.x / 32 & -warps);
  Moments row{0, 0, 0};
#pragma unroll 4
  for (int warp = 0; warp < warps; ++warp) {
    row.count += of_row[warp].count;
    row.mean = fmaf(of_row[warp].count, of_row[warp].mean, row.mean);
  }
  row.mean = __fdividef(row.mean, row.count);
#pragma unroll 4
  for (int warp = 0; warp < warps; ++warp) {
    const float apart = of_row[warp].mean - row.mean;
    row.squares += fmaf(apart * apart, of_row[warp].count, of_row[warp].squares);
  }
  return row;
}

__device__ __forceinline__ void store_quad(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

template <class W>
__device__ __forceinline__ void store_quad(W* to, const float (&x)[4]) {
  using Pair = typename Vec<W, 2>::Raw;
  reinterpret_cast<Pair*>(to)[0] = Vec<W, 2>::pack({x[0], x[1]});
  reinterpret_cast<Pair*>(to)[1] = Vec<W, 2>::pack({x[2], x[3]});
}

// Four weights and four biases of LayerNorm, as they are stored.
template <class W>
struct NormQuad {
  uint4 raw[sizeof(W) / 2];

  __device__ __forceinline__ void load(const void* norm, int k) {
#pragma unroll
    for (int j = 0; j < int(sizeof(W) / 2); ++j) {
      raw[j] = static_cast<const uint4*>(norm)[k / 4 * int(sizeof(W) / 2) + j];
    }
  }
  __device__ __forceinline__ float weight(int j) const { return to_float(reinterpret_cast<const W*>(raw)[j]); }
  __device__ __forceinline__ float bias(int j) const { return to_float(reinterpret_cast<const W*>(raw)[4 + j]); }
};

template <class W, int kHeld>
__device__ __forceinline__ void load_norms(NormQuad<W> (&norms)[kHeld], const void* norm, int k, int step, int K) {
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (k + h * step < K) norms[h].load(norm, k + h * step);
  }
}

// Fills shared memory with p(x). A row is shared out over as few warps as can hold it, for each executes all of this.
// Passes over a row: mean, squares, result; a row that the threads can hold is read once, with all that the result
// needs.
template <class W, int kHeld>
__device__ __forceinline__ void prepare_row(const DecodeLinear* layers, int number, uint32_t launch,
                                            const Progress& progress, char* shared_x, Moments* scratch) {
  const DecodeLinear& layer = layers[number];
  const int K = layer.K, B = layer.B;
  int log_warps = max(31 - __clz(kDecodeWarps) - (B == 1 ? 0 : 32 - __clz(B - 1)), 0);
  while (log_warps > 0 && K <= kHeld * 64 << log_warps) --log_warps;
  const int warps = 1 << log_warps, threads = warps * 32, step = threads * 4, first = threadIdx.x & (threads - 1);
  const bool normalize = layer.normalize, fits = K <= kHeld * step;
  const DecodeTensor from = layer.x, factor = layer.factor;
  const void* norm = layer.norm;
  const float limit = layer.clamp_value;
  const int stages = stages_of(K, sizeof(W)), padded = stages * (kStageRowBytes / int(sizeof(W)));
  const int first_pass = normalize ? 0 : 2;
  const bool waits = from.storage == DecodeStorage::kWords || from.storage == DecodeStorage::kPairs;
  NormQuad<W> norms[kHeld];
  if (norm && fits) load_norms(norms, norm, first * 4, step, K);  // while x is waited for
#pragma unroll 1
  for (int base = 0; base < B; base += kDecodeWarps >> log_warps) {  // more than once only with a warp a row
    const int b = base + (threadIdx.x / 32 >> log_warps);
    const bool real = b < B;
    const int64_t row = real && layer.x_is_table ? layer.tokens[b] : b;
    float* const x_out = blockIdx.x == 0 && layer.x_out ? layer.x_out + int64_t(b) * K : nullptr;
    W* const to = reinterpret_cast<W*>(shared_x + b * x_row_bytes(stages));
    Moments own{0, 0, 0};
    float mean = 0, rstd = 1;
    Quads<kHeld> x, times;
#pragma unroll 1
    for (int pass = first_pass; pass < 3; ++pass) {
      float sum = 0;
      int count = 0;
      if (waits && pass == first_pass && real) progress.wait(layers, from.from);  // whole warps
#pragma unroll 1
      for (int k = first * 4; real && k < K; k += kHeld * step) {
        if (pass == first_pass || !fits) {
          if (norm && !fits && pass == 2) load_norms(norms, norm, k, step, K);
          load_quads<W, kHeld>(from, row, launch, k, step, K, x);
          if (factor.data && (fits || pass == 2)) load_quads<W, kHeld>(factor, b, launch, k, step, K, times);
        }
#pragma unroll
        for (int h = 0; h < kHeld; ++h) {
          const int left = K - k - h * step;
          if (left <= 0) break;
          if (pass == 0) {
            sum += (x[h][0] + x[h][1]) + (x[h][2] + x[h][3]);  // 0 past the end
            count += min(left, 4);
          } else if (pass == 1) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float apart = j < left ? x[h][j] - own.mean : 0.0f;
              sum = fmaf(apart, apart, sum);
            }
          } else {
            float y[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              y[j] = x[h][j];
              if (normalize) {
                y[j] = (y[j] - mean) * rstd;
                if (norm) y[j] = fmaf(y[j], norms[h].weight(j), norms[h].bias(j));
                y[j] = y[j] > limit ? limit : y[j];  // false for NaN, which passes as in torch.clamp
                y[j] = y[j] < -limit ? -limit : y[j];
              }
              if (j >= left) y[j] = 0;
              if (x_out && j < left) x_out[k + h * step + j] = y[j];
              if (factor.data) y[j] *= times[h][j];
            }
            store_quad(to + k + h * step, y);
          }
        }
      }
      if (pass == 0) {
        own.count = float(__reduce_add_sync(0xffffffffu, count));
        own.mean = __fdividef(warp_sum(sum), fmaxf(own.count, 1.0f));
      } else if (pass == 1) {
        own.squares = warp_sum(sum);
        const Moments whole = join_warps(own, warps, scratch);
        mean = whole.mean;
        rstd = rsqrtf(__fdividef(whole.squares, float(K)) + layer.eps);
      }
    }
    if (real) {  // zeros up to the end of the last stage
      for (int k = words_of_row(K) + first; k < padded; k += threads) to[k] = from_float<W>(0.0f);
    }
  }
}

}  // namespace newllm::cuda
