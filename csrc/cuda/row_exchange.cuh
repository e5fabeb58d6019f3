// How blocks that hold 64 columns of a row each come to two numbers of the whole row, through memory that stays in L2.
//
//     publish    every block writes its share of a row, two floats
//     total      one of them, the row's owner, reads the shares of all, in the order of the columns, and writes two
//                floats back
//     read       every block reads these
//
// A float travels in one word of 8 bytes with the number of its window, plus one, so it is its own flag: one round
// trip, no fence. Memory is zero before the first window. A slot serves again SLOTS windows later: who publishes then
// must have read the totals of the window before it in that slot, so that its shares had been read; and the owner who
// then writes totals has read shares that were published after the totals before them were read.
//
// Whoever waits here relies on all blocks of a row running at the same time: the launch is cooperative, which CUDA
// refuses where they would not.
#pragma once

#include <cstdint>

#include "numeric.cuh"
#include "recurrence_args.cuh"

namespace newllm::cuda {

struct alignas(16) TwoWords {
  unsigned long long x, y;
};

constexpr int kMostColumnBlocks = 32;  // a lane each

__device__ __forceinline__ float value_of(unsigned long long word) { return __uint_as_float(unsigned(word)); }

__device__ __forceinline__ void publish_words(TwoWords* target, uint32_t tag, float x, float y) {
  const unsigned long long flag = (unsigned long long)(tag) << 32;
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(target), "l"(flag | __float_as_uint(x)),
               "l"(flag | __float_as_uint(y))
               : "memory");
}

// What stands there by now.
__device__ __forceinline__ TwoWords peek_words(const TwoWords* source) {
  TwoWords words;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(words.x), "=l"(words.y) : "l"(source) : "memory");
  return words;
}

// Waits until both words are of the window; `words` is what was seen of them earlier.
__device__ __forceinline__ float2 wait_words(const TwoWords* source, uint32_t tag, TwoWords words) {
  while (uint32_t(words.x >> 32) != tag || uint32_t(words.y >> 32) != tag) words = peek_words(source);
  return make_float2(value_of(words.x), value_of(words.y));
}

// The exchange of one warp, for ROWS rows of a window, with the warps of its number in the blocks of the other columns.
template <int ROWS, int WARPS, int SLOTS>
struct RowExchange {
  TwoWords* words;    // of this warp: (SLOTS, blocks + 1, ROWS), a window's shares and then its totals
  int blocks, block;  // of columns, and which of them this is
  int log_width = 0;  // of the lanes that hold a row's shares
  int64_t D;

  // Words that `groups` of blocks need.
  static __host__ __device__ int64_t size(int64_t groups, int blocks) {
    return groups * WARPS * SLOTS * (blocks + 1) * ROWS;
  }

  __device__ __forceinline__ RowExchange(TwoWords* all, int64_t group, int warp, int blocks_, int block_, int64_t D_)
      : words(all + (group * WARPS + warp) * SLOTS * (blocks_ + 1) * ROWS), blocks(blocks_), block(block_), D(D_) {
    while (1 << log_width < blocks) ++log_width;
  }

  __device__ __forceinline__ TwoWords* at(uint32_t window, int of, int row) const {
    return words + (int64_t(window % SLOTS) * (blocks + 1) + of) * ROWS + row;
  }

  // Before the first window, by all blocks; all must have done so before anyone publishes.
  __device__ __forceinline__ void clear() const {
    const int lane = threadIdx.x % 32;
    for (int slot = 0; slot < SLOTS; ++slot) {
      for (int row = lane; row < ROWS; row += 32) {
        *at(slot, block, row) = {0, 0};
        if (block == 0) *at(slot, blocks, row) = {0, 0};
      }
    }
  }

  __device__ __forceinline__ void publish(uint32_t window, int row, float x, float y) const {
    publish_words(at(window, block, row), window + 1, x, y);
  }

  // A look at what `read` and `total` will wait for, so that what is there already costs no round trip.
  __device__ __forceinline__ TwoWords peek_totals(uint32_t window, int row) const {
    return peek_words(at(window, blocks, row < ROWS ? row : 0));
  }

  __device__ __forceinline__ TwoWords peek_shares(uint32_t window) const {
    const Owned owned(*this, 0);
    return peek_words(at(window, owned.there ? owned.of : 0, owned.there ? owned.row : 0));
  }

  __device__ __forceinline__ float2 read(uint32_t window, int row, TwoWords peeked) const {
    return wait_words(at(window, blocks, row), window + 1, peeked);
  }

  // Lanes that are neighbours hold the shares of a row that this block owns; `pass`: of all its rows, a few at a time.
  struct Owned {
    int first, row, of;  // the pass's first row, this lane's row and block
    bool there;

    __device__ __forceinline__ Owned(const RowExchange& x, int pass)
        : first((pass * x.blocks + x.block) * (32 >> x.log_width)),
          row(first + (int(threadIdx.x % 32) >> x.log_width)),
          of(int(threadIdx.x % 32) & ((1 << x.log_width) - 1)),
          there(row < ROWS && of < x.blocks) {}
  };

  // The rows that this block owns: `combine(share, columns, width)` makes totals of the shares in `width` lanes, in all
  // of them, `write(row, total)` is called by one.
  template <class Combine, class Write>
  __device__ __forceinline__ void total(uint32_t window, TwoWords peeked, const Combine& combine,
                                        const Write& write) const {
    for (int pass = 0;; ++pass) {
      const Owned owned(*this, pass);
      if (owned.first >= ROWS) break;
      float2 share = make_float2(0.0f, 0.0f);
      if (owned.there) {
        const TwoWords none{0, 0};
        share = wait_words(at(window, owned.of, owned.row), window + 1, pass == 0 ? peeked : none);
      }
      __syncwarp();
      const float columns = owned.there ? float(least(kColumns, D - int64_t(owned.of) * kColumns)) : 0.0f;
      const float2 sum = combine(share, columns, 1 << log_width);
      if (owned.row < ROWS && owned.of == 0) {
        publish_words(at(window, blocks, owned.row), window + 1, sum.x, sum.y);
        write(owned.row, sum);
      }
    }
  }
};

// The sum over neighbouring lanes, in all of them.
__device__ __forceinline__ float sum_lanes(float x, int width) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, offset);
    if (offset < width) x += other;
  }
  return x;
}

}  // namespace newllm::cuda
