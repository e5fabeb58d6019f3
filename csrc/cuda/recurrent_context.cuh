// The whole cell over T steps in one launch: one hidden layer, gates, update, LayerNorm in the loop, clamp. A team of
// blocks (recurrent_exchange.cuh) computes 16 rows (batch entries). Each block keeps its slice of both matrices in
// shared memory for all of time and owns `Hs` hidden units and `Ds` columns of the context; a step is two products, and
// after each the team meets and tells each other its columns, as 16-bit numbers, which is what the tensor cores
// multiply. The state itself stays in float32 in the registers of its owner.
#pragma once

#include "recurrent_product.cuh"

namespace newllm::cuda {

// Hidden units and context columns of a block: kTeamThreads threads own one column of one row, or two hidden units.
constexpr int kMostColumns = kTeamThreads / kRows, kUnitsPerThread = 2;
constexpr int kMostUnits = kMostColumns * kUnitsPerThread;
// LayerNorm's sums of a row are added up by so many threads, for teams of up to kMostBlocks.
constexpr int kRowThreads = kTeamThreads / kRows, kMostBlocks = 144, kSumsPerThread = kMostBlocks / kRowThreads;

struct TeamShape {
  int B, T, D, H, blocks;  // blocks of a team
  int Ds, Hs;
  ActivationKind activation;
};

__device__ __forceinline__ Activation activated(float x, ActivationKind kind) {
  switch (kind) {
    case ActivationKind::kRelu: return {x <= 0 ? 0.0f : x, x > 0 ? 1.0f : 0.0f};
    case ActivationKind::kGelu: {
      const float below = 0.5f * erfcf(-x * 0.70710678f);
      return {x * below, below + x * 0.39894228f * exp2_fast(-0.5f * kLog2e * x * x)};
    }
    case ActivationKind::kSilu: {
      const Activation s = sigmoid_fast(x);
      return {x * s.value, s.value + x * s.slope};
    }
    default: return tanh_fast(x);
  }
}

// As torch.clamp does, NaN passes through.
__device__ __forceinline__ float clamped(float y, float limit) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(y) : "f"(limit));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(y) : "f"(-limit));
  return y;
}

// What products of the forward read, whatever the tensors hold: float16. A cell's contexts are of LayerNorm and clamp,
// its hidden units and weights far below 65504, and there it has three bits more than bfloat16, so that rounding keeps
// two ways through time an eighth as far apart (docs/numerics.md).
using Operand = __half;
constexpr float kMostOperand = 65504;

// Of what is finite, something finite.
__device__ __forceinline__ Operand operand_of(float x) {
  return __float2half_rn(fabsf(x) < INFINITY ? clamped(x, kMostOperand) : x);
}
__device__ __forceinline__ Operand operand_of(__half x) { return x; }
__device__ __forceinline__ Operand operand_of(__nv_bfloat16 x) { return operand_of(__bfloat162float(x)); }

__device__ __forceinline__ uint32_t two_operands(Operand first, Operand second) {
  return uint32_t(__half_as_ushort(first)) | uint32_t(__half_as_ushort(second)) << 16;
}
// Two numbers of a matrix.
template <class T>
__device__ __forceinline__ uint32_t two_operands(const T* matrix, int64_t first, int64_t second) {
  return two_operands(operand_of(matrix[first]), operand_of(matrix[second]));
}

// Sum over the `width` (8 or 16) neighbouring lanes that hold one row's columns of this block.
__device__ __forceinline__ float sum_columns(float x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <class T>
__device__ __forceinline__ const T* at(const View3& view, int64_t b, int64_t t, int64_t column) {
  return static_cast<const T*>(view.data) + b * view.stride_b + t * view.stride_t + column;
}
template <class T>
__device__ __forceinline__ T* at(View3& view, int64_t b, int64_t t, int64_t column) {
  return static_cast<T*>(view.data) + b * view.stride_b + t * view.stride_t + column;
}

// A 16-bit number that is wanted a step later. Loaded into a register of its own: where two share one, the compiler
// puts them together at once, and waits for both.
template <class T>
__device__ __forceinline__ uint32_t load_raw(const T* source) {
  static_assert(sizeof(T) == 2);
  uint32_t bits;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(bits) : "l"(source));
  return bits;
}
template <class T>
__device__ __forceinline__ float from_raw(uint32_t bits);
template <>
__device__ __forceinline__ float from_raw<__nv_bfloat16>(uint32_t bits) {
  return __uint_as_float(bits << 16);
}
template <>
__device__ __forceinline__ float from_raw<__half>(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// What a thread owns, worked out before the loop over time: a column of the context in one row, and hidden units.
struct Place {
  int row, own, column;  // own: among the block's columns; column: in all of D
  int64_t b;
  bool owns, real;  // has a column; and its row is one of the batch
  __device__ Place(const TeamShape& shape, int team, int rank)
      : row(threadIdx.x / shape.Ds),
        own(threadIdx.x % shape.Ds),
        column(rank * shape.Ds + own),
        b(int64_t(team) * kRows + row),
        owns(row < kRows),
        real(owns && b < shape.B) {}
};

struct Unit {
  int row, unit, column;  // unit: among the block's; column: in all of H
  int64_t b;
  bool owned, real;
  __device__ Unit(const TeamShape& shape, int team, int rank, int index) {
    const int element = threadIdx.x + index * kTeamThreads;
    row = element / shape.Hs, unit = element % shape.Hs, column = rank * shape.Hs + unit;
    b = int64_t(team) * kRows + row;
    owned = row < kRows;
    real = owned && b < shape.B;
  }
};

// u of all columns, as it was sent, becomes c. A thread takes eight columns of one row at a time.
__device__ __forceinline__ void normalise_rows(Operand* rows, int D, const float2* statistics, const float* weight,
                                               const float* bias, float limit) {
  const float2 s = statistics[threadIdx.x % kRows];
  const float shift = -s.x * s.y;
#pragma unroll 2
  for (int chunk = threadIdx.x / kRows; chunk < D / 8; chunk += kTeamThreads / kRows) {
    using Pair = typename Vec<Operand, 2>::Raw;
    uint4* target = reinterpret_cast<uint4*>(rows + chunk * kChunk + threadIdx.x % kRows * 8);
    uint4 values = *target;
    const float4* w = reinterpret_cast<const float4*>(weight + chunk * 8);
    const float4* b = reinterpret_cast<const float4*>(bias + chunk * 8);
    const float4 w4[2] = {w[0], w[1]}, b4[2] = {b[0], b[1]};
    Pair* pairs = reinterpret_cast<Pair*>(&values);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float pair[2];
      Vec<Operand, 2>::unpack(pairs[k], pair);
      const float w0 = k % 2 ? w4[k / 2].z : w4[k / 2].x, w1 = k % 2 ? w4[k / 2].w : w4[k / 2].y;
      const float b0 = k % 2 ? b4[k / 2].z : b4[k / 2].x, b1 = k % 2 ? b4[k / 2].w : b4[k / 2].y;
      pair[0] = clamped(fmaf(pair[0], s.y, shift) * w0 + b0, limit);
      pair[1] = clamped(fmaf(pair[1], s.y, shift) * w1 + b1, limit);
      pairs[k] = Vec<Operand, 2>::pack(pair);
    }
    *target = values;
  }
}

// Bytes of shared memory of a block. Forward: matrices, rows of h and c, LayerNorm's weight and bias, partial sums,
// LayerNorm's sums and statistics, barriers.
inline int64_t forward_shared(int D, int H, int blocks) {
  const int Ds = D / blocks, Hs = H / blocks;
  const int64_t matrices = int64_t(Hs) * D + int64_t(3 * Ds) * H, rows = kRows * int64_t(D + H);
  const int floats = Split(Hs).floats() > Split(3 * Ds).floats() ? Split(Hs).floats() : Split(3 * Ds).floats();
  return 2 * (matrices + rows) + 4 * (2 * D + floats) + 8 * kRows * (blocks + 1) + 32;
}

template <class T, bool kCluster>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrent_forward_kernel(RecurrentArgs args, TeamShape shape, TeamMemory memory, int first_team, float below) {
  const int D = shape.D, H = shape.H, Ds = shape.Ds, Hs = shape.Hs, blocks = shape.blocks;
  const int rank = blockIdx.x % blocks, local_team = blockIdx.x / blocks, team_index = first_team + local_team;
  extern __shared__ __align__(16) char storage[];
  Operand* to_hidden = reinterpret_cast<Operand*>(storage);  // (Hs, D) packed
  Operand* to_gates = to_hidden + Hs * D;                    // (3 Ds, H) packed
  Operand* c_rows = to_gates + 3 * Ds * H;                   // (kRows, D)
  Operand* h_rows = c_rows + kRows * D;                      // (kRows, H)
  float* weight = reinterpret_cast<float*>(h_rows + kRows * H);
  float *bias = weight + D, *partial = bias + D;
  const Split split_h(Hs), split_g(3 * Ds);
  float2* sums = reinterpret_cast<float2*>(partial + max(split_h.floats(), split_g.floats()));  // (blocks, kRows)
  float2* statistics = sums + kRows * blocks;                                                   // mean, 1 / std
  uint64_t* barriers = reinterpret_cast<uint64_t*>(statistics + kRows);
  const int64_t of_team = kRows * int64_t(D + H) / 8 + kRows * blocks / 2;
  Team<kCluster> team{blocks, rank, {memory.data + local_team * of_team, memory.flags + local_team * blocks}, barriers};
  const Channel c_channel{reinterpret_cast<uint4*>(c_rows), 2 * Ds, 0};
  const Channel h_channel{reinterpret_cast<uint4*>(h_rows), 2 * Hs, 2 * D};
  const Channel sum_channel{reinterpret_cast<uint4*>(sums), kRows / 2, 2 * (D + H)};

  const T *W_c = static_cast<const T*>(args.weights.context), *W_g = static_cast<const T*>(args.weights.gates);
  pack_matrix(to_hidden, Hs, D, [&](int n, int k) { return operand_of(W_c[int64_t(rank * Hs + n) * D + k]); });
  pack_matrix(to_gates, 3 * Ds, H,
              [&](int n, int k) { return operand_of(W_g[int64_t(n / Ds * D + rank * Ds + n % Ds) * H + k]); });
  const float* c0 = static_cast<const float*>(args.c0);
  for (int index = threadIdx.x; index < kRows * D; index += kTeamThreads) {
    const int64_t row = index / D, b = int64_t(team_index) * kRows + row;
    c_rows[place_of(int(row), index % D)] = operand_of(b < shape.B ? c0[b * D + index % D] : 0.0f);
  }
  for (int column = threadIdx.x; column < D; column += kTeamThreads) {
    weight[column] = args.norm.weight ? static_cast<const float*>(args.norm.weight)[column] : 1.0f;
    bias[column] = args.norm.bias ? static_cast<const float*>(args.norm.bias)[column] : 0.0f;
  }
  __syncthreads();  // racecheck takes addresses 64 KB apart, a matrix and these barriers, for one
  if (threadIdx.x < 2) mbarrier_init(barriers + threadIdx.x, 1);
  team.gather();

  const Product<Operand> hidden_product(to_hidden, c_rows, D, split_h, partial);
  const Product<Operand> gate_product(to_gates, h_rows, H, split_g, partial);
  const Place place(shape, team_index, rank);
  const Unit units[kUnitsPerThread] = {{shape, team_index, rank, 0}, {shape, team_index, rank, 1}};
  const float limit = float(args.norm.clamp_value), eps = float(args.norm.eps);
  const float per_column = 1.0f / D, per_own = 1.0f / Ds;
  const float w = place.owns ? weight[place.column] : 1.0f, b_norm = place.owns ? bias[place.column] : 0.0f;
  const float* gate_bias = static_cast<const float*>(args.weights.gates_bias);
  float b_f = 0, b_i = 0, b_d = 0, state = 0, u = 0, decay = 1, keep = 0;
  if (gate_bias && place.owns) {
    b_f = gate_bias[place.column], b_i = gate_bias[D + place.column], b_d = gate_bias[2 * D + place.column];
  }
  if (place.real) state = c0[place.b * D + place.column];
  const float* gate_sums = partial + place.row * split_g.stride() + place.own;
  T* c_out = place.real ? at<T>(args.c, place.b, 0, place.column) : nullptr;
  const T* z_in[kUnitsPerThread];
  uint32_t z[kUnitsPerThread] = {};
#pragma unroll
  for (int e = 0; e < kUnitsPerThread; ++e) {
    z_in[e] = units[e].real ? at<T>(args.z, units[e].b, 0, units[e].column) : nullptr;
    if (z_in[e]) z[e] = load_raw(z_in[e]);
  }

  for (int t = 0; t < shape.T; ++t) {
    hidden_product.multiply();
#pragma unroll
    for (int e = 0; e < kUnitsPerThread; ++e) {
      if (!units[e].owned) continue;
      const float* of_unit = partial + units[e].row * split_h.stride() + units[e].unit;
      const float a = from_raw<T>(z[e]) + hidden_product.summed(of_unit);
      h_rows[place_of(units[e].row, units[e].column)] = operand_of(activated(a, shape.activation).value);
      if (z_in[e] && t + 1 < shape.T) z[e] = load_raw(z_in[e] += args.z.stride_t);
    }
    __syncthreads();
    team.exchange(0, t & 1, h_channel);

    gate_product.multiply();
    if (place.owns) {
      const float f = gate_product.summed(gate_sums) + b_f, i = gate_product.summed(gate_sums + Ds) + b_i;
      const float d = gate_product.summed(gate_sums + 2 * Ds) + b_d;
      keep = sigmoid_fast(f).value;
      u = keep * state + sigmoid_fast(i).value * tanh_fast(d).value;
      c_rows[place_of(place.row, place.column)] = operand_of(u);
    }
    // Of a block's columns of a row: their sum, and the squares about their own mean, which add up without
    // cancellation.
    const float sum = sum_columns(u, Ds), centred = u - sum * per_own, squares = sum_columns(centred * centred, Ds);
    if (place.owns && place.own == 0) sums[rank * kRows + place.row] = make_float2(sum, squares);
    __syncthreads();
    team.exchange(1, t & 1, c_channel, sum_channel);

    const int row_lane = threadIdx.x % kRowThreads, row = threadIdx.x / kRowThreads;
    float2 part[kSumsPerThread];
    float total = 0, squared = 0;
#pragma unroll
    for (int k = 0; k < kSumsPerThread; ++k) {
      const int block = row_lane + k * kRowThreads;
      part[k] = block < blocks ? sums[block * kRows + row] : make_float2(0, 0);
      total += part[k].x;
    }
    const float mean = sum_columns(total, kRowThreads) * per_column;
#pragma unroll
    for (int k = 0; k < kSumsPerThread; ++k) {
      const float off = part[k].x * per_own - mean;
      squared += part[k].y + (row_lane + k * kRowThreads < blocks ? Ds * off * off : 0.0f);
    }
    const float variance = sum_columns(squared, kRowThreads) * per_column;
    if (row_lane == 0) statistics[row] = make_float2(mean, rsqrtf(variance + eps));
    __syncthreads();
    if (place.owns) {
      const float2 s = statistics[place.row];
      const float xhat = (u - s.x) * s.y, y = xhat * w + b_norm;
      decay *= keep * w * s.y * (1 - (1 + xhat * xhat) * per_column);
      state = clamped(y, limit);
      if (c_out) {
        *c_out = from_float<T>(y > limit || y < -limit ? state : clamped(y, below));
        c_out += args.c.stride_t;
      }
    }
    normalise_rows(c_rows, D, statistics, weight, bias, fminf(limit, kMostOperand));
    __syncthreads();
  }
  if (place.real) {
    static_cast<float*>(args.c_last)[place.b * D + place.column] = state;
    if (args.decay) static_cast<float*>(args.decay)[place.b * D + place.column] = decay;
  }
  team.gather();
}

}  // namespace newllm::cuda
