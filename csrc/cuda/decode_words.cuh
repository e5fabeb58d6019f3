// What layers of one token hand to each other: 64-bit words of numbers and a mark of launch and layer, and how they are
// read, written and waited for.
#pragma once

#include "decode_stream.cuh"

namespace newllm::cuda {

__host__ __device__ __forceinline__ int words_of_row(int width) { return (width + 3) & ~3; }

// For loops that ask until another block has written: a wait of several seconds can only be a mistake of ours, and an
// error is better than a GPU that hangs.
struct Patience {
  unsigned asked = 0;

  __device__ __forceinline__ void again() {
    if (++asked == 1u << 24) __trap();
  }
};

// Value and mark come together, so nothing else has to be ordered.
__device__ __forceinline__ ulonglong2 load_two_words(const uint64_t* from) {
  ulonglong2 words;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(words.x), "=l"(words.y) : "l"(from) : "memory");
  return words;
}

__device__ __forceinline__ uint64_t load_word(const uint64_t* from) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
}

__device__ __forceinline__ void store_word(uint64_t* to, float value, uint32_t mark) {
  const uint64_t word = uint64_t(mark) << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

__device__ __forceinline__ float value_of(uint64_t word) { return __uint_as_float(uint32_t(word)); }

template <class W>
__device__ __forceinline__ uint32_t bits_of(float value) {
  const W rounded = from_float<W>(value);
  return *reinterpret_cast<const uint16_t*>(&rounded);
}

template <class W>
__device__ __forceinline__ float value_of_bits(uint32_t bits) {
  const uint16_t low = uint16_t(bits);
  return to_float(*reinterpret_cast<const W*>(&low));
}

// One number; for pairs the lane of the even column stores `next` with it. All lanes of the warp call it.
template <class W>
__device__ __forceinline__ void store_activation(const DecodeTensor& tensor, bool real, int b, int column, int width,
                                                 float value, uint32_t mark) {
  if (tensor.storage == DecodeStorage::kPairs) {
    if constexpr (sizeof(W) == 2) {
      const uint32_t own = real ? bits_of<W>(value) : 0, next = __shfl_down_sync(0xffffffffu, own, 1);
      const uint64_t word = uint64_t(mark) << 32 | next << 16 | own;
      uint64_t* to = static_cast<uint64_t*>(tensor.data) + b * (words_of_row(width) / 2) + column / 2;
      if (real && column % 2 == 0) asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
    }
  } else if (!real) {
    return;
  } else if (tensor.storage == DecodeStorage::kWords) {
    store_word(static_cast<uint64_t*>(tensor.data) + b * words_of_row(width) + column, value, mark);
  } else {
    static_cast<float*>(tensor.data)[int64_t(b) * width + column] = value;
  }
}

template <int kHeld>
using Quads = float[kHeld][4];  // of columns, which a thread holds at a time

// Quads at columns k, k + step, ... of a row, zeros past `width`; waits until they are there.
template <int kHeld>
__device__ __forceinline__ void load_words(const uint64_t* row, uint32_t mark, int k, int step, int width,
                                           Quads<kHeld>& x) {
  bool there;
  Patience patience;
  do {
    patience.again();
    there = true;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int left = width - k - h * step;
      ulonglong2 low = make_ulonglong2(uint64_t(mark) << 32, uint64_t(mark) << 32), high = low;
      if (left > 0) low = load_two_words(row + k + h * step);
      if (left > 2) high = load_two_words(row + k + h * step + 2);
      if (left == 1) low.y = uint64_t(mark) << 32;  // what lies past the end was never written
      if (left == 3) high.y = uint64_t(mark) << 32;
      x[h][0] = value_of(low.x), x[h][1] = value_of(low.y), x[h][2] = value_of(high.x), x[h][3] = value_of(high.y);
      const uint32_t wrong = (uint32_t(low.x >> 32) ^ mark) | (uint32_t(low.y >> 32) ^ mark) |
                             (uint32_t(high.x >> 32) ^ mark) | (uint32_t(high.y >> 32) ^ mark);
      there = there && wrong == 0;
    }
  } while (!there);
}

template <class W, int kHeld>
__device__ __forceinline__ void load_pairs(const uint64_t* row, uint32_t mark, int k, int step, int width,
                                           Quads<kHeld>& x) {
  bool there;
  Patience patience;
  do {
    patience.again();
    there = true;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int left = width - k - h * step;
      ulonglong2 words = make_ulonglong2(uint64_t(mark) << 32, uint64_t(mark) << 32);
      if (left > 0) words = load_two_words(row + (k + h * step) / 2);
      if (left <= 2) words.y = uint64_t(mark) << 32;  // what lies past the end was never written
      x[h][0] = value_of_bits<W>(uint32_t(words.x)), x[h][1] = value_of_bits<W>(uint32_t(words.x) >> 16);
      x[h][2] = value_of_bits<W>(uint32_t(words.y)), x[h][3] = value_of_bits<W>(uint32_t(words.y) >> 16);
      there = there && uint32_t(words.x >> 32) == mark && uint32_t(words.y >> 32) == mark;
    }
  } while (!there);
}

// The same of a table's row, or of float32.
template <class T, int kHeld>
__device__ __forceinline__ void load_plain(const T* row, int k, int step, int width, Quads<kHeld>& x) {
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[h][j] = k + h * step + j < width ? to_float(row[k + h * step + j]) : 0.0f;
  }
}

template <class W, int kHeld>
__device__ __forceinline__ void load_quads(const DecodeTensor& tensor, int64_t row, uint32_t launch, int k, int step,
                                           int width, Quads<kHeld>& x) {
  const uint32_t mark = launch + tensor.from;
  const int words = words_of_row(width);
  if (tensor.storage == DecodeStorage::kPairs) {
    if constexpr (sizeof(W) == 2) {
      load_pairs<W, kHeld>(static_cast<const uint64_t*>(tensor.data) + row * (words / 2), mark, k, step, width, x);
    }
  } else if (tensor.storage == DecodeStorage::kWords) {
    load_words<kHeld>(static_cast<const uint64_t*>(tensor.data) + row * words, mark, k, step, width, x);
  } else if (tensor.storage == DecodeStorage::kFloat) {
    load_plain<float, kHeld>(static_cast<const float*>(tensor.data) + row * width, k, step, width, x);
  } else {
    load_plain<W, kHeld>(static_cast<const W*>(tensor.data) + row * width, k, step, width, x);
  }
}

// How far the blocks are, layer by layer: each adds one when it has written its part. Only a hint, for the words
// themselves say whether they are there; but to ask one counter costs less than to ask for all words again and again.
struct Progress {
  unsigned long long* finished;  // one a layer; nullptr for a layer alone
  unsigned long long launches;   // before this one

  __device__ __forceinline__ void add(int layer) const {
    if (finished) asm volatile("red.relaxed.gpu.global.add.u64 [%0], 1;" ::"l"(finished + layer) : "memory");
  }

  __device__ __forceinline__ void wait(const DecodeLinear* layers, int layer) const {
    if (threadIdx.x % 32 == 0) {
      const int shift = unit_shift(layers[layer].parts), units = (layers[layer].N + (1 << shift) - 1) >> shift;
      const unsigned long long wanted = (launches + 1) * min(units, int(gridDim.x));
      Patience patience;
      while (load_word(reinterpret_cast<const uint64_t*>(finished + layer)) < wanted) patience.again();
    }
    __syncwarp();
  }
};

}  // namespace newllm::cuda
