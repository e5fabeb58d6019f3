// Products of 16 rows with a matrix that stays in shared memory for the whole sequence, on tensor cores.
#pragma once

#include "recurrent_exchange.cuh"

namespace newllm::cuda {

__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(row)));
}

template <class T>
__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&s)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__half>(float (&s)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// How the eight warps share a product of N outputs: `across` of them take different outputs, `along` different parts of
// K.
struct Split {
  int tiles, across, along;
  __host__ __device__ explicit Split(int N)
      : tiles(N / 8),
        across(tiles % 8 == 0   ? 8
               : tiles % 4 == 0 ? 4
               : tiles % 2 == 0 ? 2
                                : 1),
        along(8 / across) {}
  // Partial sums (along, kRows, stride): a stride that keeps the eight rows of a tile on different banks.
  __host__ __device__ int stride() const { return tiles * 8 + (tiles % 2 == 0 ? 8 : 0); }
  __host__ __device__ int floats() const { return along * kRows * stride(); }
};

// Element (n, k) of the matrix goes where the lane that needs it finds two steps of k in one 16-byte load:
// [n / 8][k / 32][lane][8]. `element(n, k)` reads global memory, once.
template <class T, class Element>
__device__ void pack_matrix(T* packed, int N, int K, const Element& element) {
  for (int index = threadIdx.x; index < N * K / 2; index += kTeamThreads) {
    const int k = index % (K / 2) * 2, n = index / (K / 2);  // neighbours in k share a register
    const int lane = n % 8 * 4 + k % 8 / 2, part = k % 32 / 8;
    T* target = packed + ((n / 8 * (K / 32) + k / 32) * 32 + lane) * 8 + part * 2;
    target[0] = element(n, k);
    target[1] = element(n, k + 1);
  }
}

// A product as one warp sees it. Made before the loop over time: all that needs a division is in here.
template <class T>
struct Product {
  const uint4* matrix;                                       // of this lane
  const T* rows;                                             // of this lane, as ldmatrix wants it
  float* target;                                             // of this lane among the partial sums
  int tiles, first_step, step, steps, count, stride, along;  // count: of this warp's steps of k

  __device__ Product(const T* packed, const T* all_rows, int K, const Split& split, float* partial) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    tiles = split.tiles / split.across;
    along = split.along, stride = split.stride(), steps = K / 32, step = split.along;
    first_step = warp / split.across;
    count = (steps - first_step + step - 1) / step;
    const int first = warp % split.across * tiles;
    matrix = reinterpret_cast<const uint4*>(packed) + first * steps * 32 + lane;
    rows = all_rows + lane * 8;
    target = partial + (first_step * kRows + lane / 4) * stride + first * 8 + lane % 4 * 2;
  }

  // kSteps of k in one go, without a branch between them, so that all loads are on their way before the first product.
  template <int kTiles, int kSteps>
  __device__ __forceinline__ void add_steps(float (&sums)[2][kTiles][4], int& k) const {
#pragma unroll
    for (int n = 0; n < kSteps; ++n, k += step) {
      uint32_t even[4], odd[4];
      load_matrices(even, rows + k * 4 * kChunk);
      load_matrices(odd, rows + k * 4 * kChunk + 2 * kChunk);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 w = matrix[(tile * steps + k) * 32];
        mma<T>(sums[0][tile], even, w.x, w.y);
        mma<T>(sums[1][tile], odd, w.z, w.w);
      }
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void multiply_tiles() const {
    float sums[2][kTiles][4] = {};
    int k = first_step;
    for (int n = count / 4; n > 0; --n) add_steps<kTiles, 4>(sums, k);
    if (count & 2) add_steps<kTiles, 2>(sums, k);
    if (count & 1) add_steps<kTiles, 1>(sums, k);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float (&a)[4] = sums[0][tile], (&b)[4] = sums[1][tile];
      *reinterpret_cast<float2*>(target + tile * 8) = make_float2(a[0] + b[0], a[1] + b[1]);
      *reinterpret_cast<float2*>(target + tile * 8 + 8 * stride) = make_float2(a[2] + b[2], a[3] + b[3]);
    }
  }

  // Partial sums of rows (kRows, K) times the packed matrix (N, K) transposed; the block sees them afterwards.
  __device__ __forceinline__ void multiply() const {
    tiles == 1 ? multiply_tiles<1>() : multiply_tiles<3>();
    __syncthreads();
  }

  template <int kAlong>
  __device__ __forceinline__ float rest(const float* first) const {
    float sum = 0;
#pragma unroll
    for (int slice = 1; slice < kAlong; ++slice) sum += first[slice * kRows * stride];
    return sum;
  }

  // The result of one row and output, whose partial sums begin at `first`.
  __device__ __forceinline__ float summed(const float* first) const {
    float sum = first[0];
    if (along == 8) return sum + rest<8>(first);
    if (along == 4) return sum + rest<4>(first);
    return along == 2 ? sum + rest<2>(first) : sum;
  }
};

}  // namespace newllm::cuda
