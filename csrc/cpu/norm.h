// LayerNorm of one row, shared by layer_norm and the context kernels. The row is read from the first- or second-level
// cache three times (mean, variance, result), which keeps the two-pass variance exact and costs no memory traffic.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace newllm::cpu::NEWLLM_ISA {

// Sum of term(k, full, n) over the row; four running sums hide the latency of the addition.
template <class A, class Term>
NEWLLM_INLINE A sum_over(int64_t count, const Term& term) {
  Vec<A> s0{}, s1{}, s2{}, s3{};
  int64_t k = 0;
  constexpr int64_t W = kLanes<A>;
  for (; k + 4 * W <= count; k += 4 * W) {
    s0 += term(k, std::true_type{}, W);
    s1 += term(k + W, std::true_type{}, W);
    s2 += term(k + 2 * W, std::true_type{}, W);
    s3 += term(k + 3 * W, std::true_type{}, W);
  }
  for (; k + W <= count; k += W) s0 += term(k, std::true_type{}, W);
  A total = sum_lanes((s0 + s1) + (s2 + s3));
  if (k < count) {
    const Vec<A> rest = term(k, std::false_type{}, count - k);
    for (int64_t lane = 0; lane < count - k; ++lane) total += rest[lane];
  }
  return total;
}

template <class A>
struct Statistics {
  A mean;
  A rstd;
};

// Of a row whose mean is known already.
template <class T, class A = acc_t<T>>
NEWLLM_INLINE Statistics<A> row_statistics(const T* x, int64_t D, double eps, A mean) {
  const A variance = sum_over<A>(D,
                                 [&](int64_t k, auto full, int64_t n) {
                                   const Vec<A> centred = load_if(full, x + k, n) - mean;
                                   return centred * centred;
                                 }) /
                     A(D);
  return {mean, A(1) / std::sqrt(variance + A(eps))};
}

template <class T, class A = acc_t<T>>
NEWLLM_INLINE Statistics<A> row_statistics(const T* x, int64_t D, double eps) {
  const A mean = sum_over<A>(D, [&](int64_t k, auto full, int64_t n) { return load_if(full, x + k, n); }) / A(D);
  return row_statistics(x, D, eps, mean);
}

template <class Full, class A>
NEWLLM_INLINE Vec<A> affine_weight(Full full, const A* weight, int64_t k, int64_t n) {
  return weight != nullptr ? load_if(full, weight + k, n) : splat<A>(A(1));
}

template <class Full, class A>
NEWLLM_INLINE Vec<A> affine_bias(Full full, const A* bias, int64_t k, int64_t n) {
  return bias != nullptr ? load_if(full, bias + k, n) : Vec<A>{};
}

// Rows are cut into a number of blocks that depends on the shape only, never on the number of threads: each block
// sums its own weight gradients, and the blocks are added in order, so the same inputs give the same bits.
struct RowBlocks {
  int64_t count;
  int64_t rows_per_block;

  RowBlocks(int64_t rows, int64_t D) {
    const int64_t by_work = std::max<int64_t>(1, rows * D / kElementsPerThread);
    const int64_t wanted = std::min<int64_t>({rows, by_work, 64});
    rows_per_block = wanted > 0 ? (rows + wanted - 1) / wanted : 0;
    count = rows_per_block > 0 ? (rows + rows_per_block - 1) / rows_per_block : 0;
  }
};

// target[k] = sum over blocks of partial[block * D + k], in the order of the blocks.
template <class A>
inline void reduce_blocks(const A* partial, int64_t blocks, int64_t D, A* target) {
  parallel_for(
      D, std::max<int64_t>(1024, kElementsPerThread / std::max<int64_t>(1, blocks)), [&](int64_t begin, int64_t end) {
        std::fill(target + begin, target + end, A(0));
        for (int64_t block = 0; block < blocks; ++block) {
          for_vectors<A>(end - begin, [&](int64_t k, auto full, int64_t n) {
            A* out = target + begin + k;
            store_if<false>(full, out, load_if(full, out, n) + load_if(full, partial + block * D + begin + k, n), n);
          });
        }
      });
}

}  // namespace newllm::cpu::NEWLLM_ISA
