// Messages through global memory (they stay in L2) that need no flag: every word says itself of which step it is, so
// that a reader asks for the data until it is there, and neither side waits for a fence. A word is written once a step,
// by one thread, and only after everybody has read that of the step before; at launch all words are zero.
#pragma once

#include "numeric.cuh"

namespace newllm::cuda {

// A word in one of two forms: a 16-bit number above 16 bits of the step, or a float32 whose last bit is that of the
// step, which moves it by 2^-23 of itself at most.
struct Step {
  uint32_t tag, phase;
  __device__ explicit Step(int step) : tag((step + 1) & 0xffff), phase((step + 1) & 1) {}

  template <class T>
  __device__ __forceinline__ uint32_t number(T x) const {
    static_assert(sizeof(T) == 2);
    return uint32_t(reinterpret_cast<const unsigned short&>(x)) << 16 | tag;
  }
  __device__ __forceinline__ uint32_t real(float x) const { return (__float_as_uint(x) & ~1u) | phase; }

  __device__ __forceinline__ bool numbers(uint4 w) const {
    return (((w.x ^ tag) | (w.y ^ tag) | (w.z ^ tag) | (w.w ^ tag)) & 0xffffu) == 0;
  }
  __device__ __forceinline__ bool reals(uint4 w) const {
    return (((w.x ^ phase) | (w.y ^ phase) | (w.z ^ phase) | (w.w ^ phase)) & 1u) == 0;
  }
};

__device__ __forceinline__ float real_of(uint32_t word) { return __uint_as_float(word & ~1u); }
// Two numbers as tensor cores take them, without their steps.
__device__ __forceinline__ uint32_t pair_of(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

__device__ __forceinline__ uint4 load_relaxed(const uint4* source) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed(uint32_t* target, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(target), "r"(value) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint32_t* target, uint32_t first, uint32_t second) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(target), "r"(first), "r"(second) : "memory");
}

// Until all pieces of this thread are there.
template <int kPieces, class Ready>
__device__ __forceinline__ void receive(const uint4* const (&source)[kPieces], uint4 (&piece)[kPieces],
                                        const Ready& ready) {
  bool all;
  do {
    all = true;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) piece[n] = load_relaxed(source[n]);
#pragma unroll
    for (int n = 0; n < kPieces; ++n) all &= ready(piece[n], n);
  } while (!all);
}

}  // namespace newllm::cuda
