// The whole cell over T steps by one cluster, H = 2 D and 16 columns of the context a block: the team of
// recurrent_context.cuh with less to do in a step. Warps share out K, in the order of the blocks that computed it, so a
// warp waits only for those blocks, finds its operands as tensor cores want them, and normalises them in registers; its
// share of both matrices stays in registers too. What is left to a step are two products, two sums over the warps, and
// two messages.
//
// Places. Warp w adds up rows w and w + 8. A lane is (g, q) = (lane / 4, lane % 4); the operand of a product is one
// 16-byte piece a lane and 16 of K: (row g: 2 q, 2 q + 1 | row g + 8: the same | row g: 2 q + 8, 2 q + 9 | row g + 8).
#pragma once

#include "recurrent_mesh.cuh"

namespace newllm::cuda {

constexpr int kBlockColumns = 16, kBlockUnits = 32;

// A block's shared memory. Partial sums lie [warp][tile][lane], with tiles apart so that no two lanes want one bank.
template <int kBlocks>
struct ClusterMemory {
  static constexpr int kTile = 36, kSumStride = kBlocks + 4;
  uint4 units[kBlocks * 64];    // [block][g][half of 32 units, the other first where g is odd][q]
  uint4 columns[kBlocks * 32];  // [block][g][q]
  float4 sums[8 * kSumStride];  // [g][block]: mean and squares of 16 columns of row g, and of row g + 8
  float4 hidden[kTeamWarps][4 * kTile], gates[kTeamWarps][6 * kTile];
  uint64_t unit_barriers[kTeamWarps], column_barriers[kTeamWarps], sum_barrier;
};

template <int kTiles, int kTile>
__device__ __forceinline__ void store_partial(float4* target, const float (&sums)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    target[tile * kTile] = make_float4(sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]);
  }
}

// What a block, warp and lane are in a cluster; what a thread owns: two units of one row, and a column of one row; and
// how the pieces that it has a part in are put together and sent.
template <int kBlocks>
struct ClusterPlace {
  static constexpr int kColumns = kBlocks * kBlockColumns, kUnits = kBlocks * kBlockUnits;
  static constexpr int kFrom = kBlocks / kTeamWarps;  // blocks that a warp hears
  static constexpr int kTile = ClusterMemory<kBlocks>::kTile;
  const char* storage;
  int rank, warp, lane, g, q;
  // Of lanes, bit 0 is the row of a unit, bit 1 the tile in its half; bit 0 the second of two columns, bit 1 their row;
  // bits 2 and 3 q; bit 4 the half of the units or columns.
  int own_q, half, unit_tile, unit, column, own_row;
  int64_t unit_row, row;
  uint32_t unit_there[kBlocks / 4], column_there[kBlocks / 8], sum_there;  // every fourth block, every eighth, and one
  bool sends_sums;

  __device__ explicit ClusterPlace(const char* storage)
      : storage(storage),
        rank(blockIdx.x % kBlocks),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(lane / 4),
        q(lane % 4) {
    const int64_t first_row = int64_t(blockIdx.x / kBlocks) * kRows;
    own_q = lane >> 2 & 3, half = lane >> 4, unit_tile = 2 * half + (lane >> 1 & 1);
    unit = rank * kBlockUnits + unit_tile * 8 + 2 * own_q, unit_row = first_row + warp + (lane & 1) * 8;
    column = rank * kBlockColumns + half * 8 + own_q * 2 + (lane & 1);
    own_row = warp + (lane >> 1 & 1) * 8, row = first_row + own_row;
#pragma unroll
    for (int n = 0; n < kBlocks / 4; ++n) unit_there[n] = remote_address(storage, (lane & 3) + 4 * n);
#pragma unroll
    for (int n = 0; n < kBlocks / 8; ++n) column_there[n] = remote_address(storage, half * 4 + (lane & 3) + 8 * n);
    const int sum_to = (lane >> 2) * 2 + (lane & 1);
    sends_sums = !(lane & 2) && sum_to < kBlocks;
    sum_there = remote_address(storage, sends_sums ? sum_to : 0);
  }

  __device__ uint32_t offset(const void* place) const { return uint32_t(static_cast<const char*>(place) - storage); }

  // Where the piece of units that this thread sends lies among those of its block, and those that it multiplies.
  __device__ int unit_piece() const { return warp * 8 + (half ^ (warp & 1)) * 4 + own_q; }
  __device__ int unit_operand(int step) const {
    return (warp * kFrom + step / 2) * 64 + g * 8 + (step % 2 ^ (g & 1)) * 4 + q;
  }

  // Four lanes have two units each of one piece, eight lanes one column each; after this all of them have the piece.
  __device__ __forceinline__ float4 unit_piece(uint32_t two) const {
    uint32_t piece[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) piece[k] = __shfl_sync(0xffffffffu, two, (lane & ~3) + k);
    return make_float4(__uint_as_float(piece[0]), __uint_as_float(piece[1]), __uint_as_float(piece[2]),
                       __uint_as_float(piece[3]));
  }
  template <class T>
  __device__ __forceinline__ float4 column_piece(float x) const {
    const float other = __shfl_xor_sync(0xffffffffu, x, 1);
    const uint32_t two = lane & 1 ? two_packed<T>(other, x) : two_packed<T>(x, other);
    uint32_t piece[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) piece[k] = __shfl_sync(0xffffffffu, two, (k >> 1) * 16 + (lane & 12) + (k & 1) * 2);
    return make_float4(__uint_as_float(piece[0]), __uint_as_float(piece[1]), __uint_as_float(piece[2]),
                       __uint_as_float(piece[3]));
  }

  __device__ __forceinline__ void send_units(float4 piece, uint32_t place, uint32_t barrier) const {
#pragma unroll
    for (int n = 0; n < kBlocks / 4; ++n) send(piece, unit_there[n] + place, unit_there[n] + barrier);
  }
  __device__ __forceinline__ void send_columns(float4 piece, uint32_t place, uint32_t barrier) const {
#pragma unroll
    for (int n = 0; n < kBlocks / 8; ++n) send(piece, column_there[n] + place, column_there[n] + barrier);
  }
  // Two sums over the 16 columns of this lane's row, with those of the other row.
  __device__ __forceinline__ void send_sums(float x, float y, uint32_t place, uint32_t barrier) const {
    const float x_other = __shfl_xor_sync(0xffffffffu, x, 2), y_other = __shfl_xor_sync(0xffffffffu, y, 2);
    if (sends_sums) send(make_float4(x, y, x_other, y_other), sum_there + place, sum_there + barrier);
  }

  // Totals of all warps' partial sums: of this thread's two units, and of its column, whose tiles begin at `tile`.
  __device__ __forceinline__ float2 unit_total(const float4* partial) const {
    float2 total = {0, 0};
#pragma unroll
    for (int from = 0; from < kTeamWarps; ++from) {
      const float4* piece = partial + (from * 4 + unit_tile) * kTile + warp * 4 + own_q;
      const float2 part = reinterpret_cast<const float2*>(piece)[lane & 1];
      total.x += part.x, total.y += part.y;
    }
    return total;
  }
  template <int kTiles>
  __device__ __forceinline__ float column_total(const float4* partial, int tile) const {
    float total = 0;
#pragma unroll
    for (int from = 0; from < kTeamWarps; ++from) {
      const float4* piece = partial + (from * kTiles + tile + half) * kTile + warp * 4 + own_q;
      total += reinterpret_cast<const float*>(piece)[lane & 3];
    }
    return total;
  }
};

template <class T, int kBlocks>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrent_cluster_forward_kernel(RecurrentArgs args, MeshShape shape, float below) {
  using Memory = ClusterMemory<kBlocks>;
  using Place = ClusterPlace<kBlocks>;
  constexpr int D = Place::kColumns, H = Place::kUnits, kFrom = Place::kFrom;
  extern __shared__ __align__(16) char storage[];
  Memory& memory = *reinterpret_cast<Memory*>(storage);
  const Place place(storage);
  const int rank = place.rank, warp = place.warp, lane = place.lane, g = place.g, q = place.q;

  const T *W_c = static_cast<const T*>(args.weights.context), *W_g = static_cast<const T*>(args.weights.gates);
  const float *norm_weight = static_cast<const float*>(args.norm.weight),
              *norm_bias = static_cast<const float*>(args.norm.bias), *c0 = static_cast<const float*>(args.c0);
  const auto weight_at = [&](int column) { return norm_weight ? norm_weight[column] : 1.0f; };
  const auto bias_at = [&](int column) { return norm_bias ? norm_bias[column] : 0.0f; };
  const auto start_at = [&](int row, int column) {
    const int64_t b = place.row - place.own_row + row;
    return b < shape.B ? c0[b * D + column] : 0.0f;
  };
  uint2 to_hidden[kFrom][4], to_gates[2 * kFrom][6];
  float w[kFrom][4], b[kFrom][4];  // of columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9
  uint4 operand[kFrom];
#pragma unroll
  for (int from = 0; from < kFrom; ++from) {
    const int first = (warp * kFrom + from) * kBlockColumns + 2 * q;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      const T* row = W_c + int64_t(rank * kBlockUnits + tile * 8 + g) * D + first;
      to_hidden[from][tile] = make_uint2(two_operands(row, 0, 1), two_operands(row, 8, 9));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      w[from][k] = weight_at(first + k / 2 * 8 + k % 2), b[from][k] = bias_at(first + k / 2 * 8 + k % 2);
    }
    operand[from] = make_uint4(two_packed<Operand>(start_at(g, first), start_at(g, first + 1)),
                               two_packed<Operand>(start_at(g + 8, first), start_at(g + 8, first + 1)),
                               two_packed<Operand>(start_at(g, first + 8), start_at(g, first + 9)),
                               two_packed<Operand>(start_at(g + 8, first + 8), start_at(g + 8, first + 9)));
  }
#pragma unroll
  for (int step = 0; step < 2 * kFrom; ++step) {
#pragma unroll
    for (int tile = 0; tile < 6; ++tile) {
      const T* row = W_g + int64_t(tile / 2 * D + rank * kBlockColumns + tile % 2 * 8 + g) * H +
                     (warp * 2 * kFrom + step) * 16 + 2 * q;
      to_gates[step][tile] = make_uint2(two_operands(row, 0, 1), two_operands(row, 8, 9));
    }
  }

  const int column = place.column;
  const bool real = place.row < shape.B;
  const float limit = float(args.norm.clamp_value), operand_limit = fminf(limit, kMostOperand);
  const float eps = float(args.norm.eps);
  const float* gate_bias = static_cast<const float*>(args.weights.gates_bias);
  float state = start_at(place.own_row, column), u = 0, decay = 1, keep = 0;
  const float own_w = weight_at(column), own_b = bias_at(column);
  const float b_f = gate_bias ? gate_bias[column] : 0, b_i = gate_bias ? gate_bias[D + column] : 0;
  const float b_d = gate_bias ? gate_bias[2 * D + column] : 0;
  T* c_out = real ? at<T>(args.c, place.row, 0, column) : nullptr;
  const T* z_in = place.unit_row < shape.B ? at<T>(args.z, place.unit_row, 0, place.unit) : nullptr;
  uint32_t z[2] = {};
  if (z_in && shape.T > 0) z[0] = load_raw(z_in), z[1] = load_raw(z_in + 1);
  const uint32_t unit_place = place.offset(memory.units + rank * 64 + place.unit_piece());
  const uint32_t column_place = place.offset(memory.columns + rank * 32 + warp * 4 + place.own_q);
  const uint32_t sum_place = place.offset(memory.sums + warp * Memory::kSumStride + rank);
  const uint32_t unit_bell = place.offset(memory.unit_barriers + rank / kFrom);
  const uint32_t column_bell = place.offset(memory.column_barriers + rank / kFrom);
  const uint32_t sum_bell = place.offset(&memory.sum_barrier);
  if (threadIdx.x <= 2 * kTeamWarps) mbarrier_init(memory.unit_barriers + threadIdx.x, 1);
  cluster_sync();

  float own_mean = 0, own_rstd = 0;
  // Contexts of step t: what this warp needs of them becomes its operand.
  const auto receive_contexts = [&](int t) {
    if (lane == 0) mbarrier_expect(memory.column_barriers + warp, kFrom * 512);
    mbarrier_wait(&memory.sum_barrier, t & 1);
    float4 part[kBlocks / 4];
#pragma unroll
    for (int n = 0; n < kBlocks / 4; ++n) part[n] = memory.sums[g * Memory::kSumStride + q + 4 * n];
    const float first = __shfl_sync(0xffffffffu, part[0].x, lane & ~3);
    const float second = __shfl_sync(0xffffffffu, part[0].z, lane & ~3);
    float4 total = {};
#pragma unroll
    for (int n = 0; n < kBlocks / 4; ++n) {
      const float x = part[n].x - first, y = part[n].z - second;
      total.x += x, total.y += fmaf(16 * x, x, part[n].y);
      total.z += y, total.w += fmaf(16 * y, y, part[n].w);
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      total.x += __shfl_xor_sync(0xffffffffu, total.x, step), total.y += __shfl_xor_sync(0xffffffffu, total.y, step);
      total.z += __shfl_xor_sync(0xffffffffu, total.z, step), total.w += __shfl_xor_sync(0xffffffffu, total.w, step);
    }
    const float x = total.x * (1.0f / kBlocks), y = total.z * (1.0f / kBlocks);
    const float v = total.y * (1.0f / D) - x * x, v_second = total.w * (1.0f / D) - y * y;  // NaN passes
    const float mean[2] = {first + x, second + y};
    const float rstd[2] = {rsqrtf((v < 0 ? 0 : v) + eps), rsqrtf((v_second < 0 ? 0 : v_second) + eps)};
    mbarrier_wait(memory.column_barriers + warp, t & 1);
#pragma unroll
    for (int from = 0; from < kFrom; ++from) {
      const uint4 raw = memory.columns[(warp * kFrom + from) * 32 + lane];
      const auto normal = [&](uint32_t bits, int k, int half) {
        float pair[2];
        Vec<Operand, 2>::unpack(reinterpret_cast<const Vec<Operand, 2>::Raw&>(bits), pair);
        const float shift = -mean[half] * rstd[half];
        const float first = fmaf(pair[0], rstd[half], shift) * w[from][k] + b[from][k];
        const float second = fmaf(pair[1], rstd[half], shift) * w[from][k + 1] + b[from][k + 1];
        return two_packed<Operand>(clamped(first, operand_limit), clamped(second, operand_limit));
      };
      operand[from] = make_uint4(normal(raw.x, 0, 0), normal(raw.y, 0, 1), normal(raw.z, 2, 0), normal(raw.w, 2, 1));
    }
    const float mean_a = __shfl_sync(0xffffffffu, mean[0], warp * 4),
                mean_b = __shfl_sync(0xffffffffu, mean[1], warp * 4);
    const float rstd_a = __shfl_sync(0xffffffffu, rstd[0], warp * 4),
                rstd_b = __shfl_sync(0xffffffffu, rstd[1], warp * 4);
    own_mean = lane & 2 ? mean_b : mean_a, own_rstd = lane & 2 ? rstd_b : rstd_a;
  };
  const auto finish = [&] {
    const float xhat = (u - own_mean) * own_rstd, y = xhat * own_w + own_b;
    decay *= keep * own_w * own_rstd * (1 - (1 + xhat * xhat) * (1.0f / D));
    state = clamped(y, limit);
    if (c_out) {
      *c_out = from_float<T>(y > limit || y < -limit ? state : clamped(y, below));
      c_out += args.c.stride_t;
    }
  };

  for (int t = 0; t < shape.T; ++t) {
    if (t > 0) receive_contexts(t - 1);
    float hidden[4][4] = {}, gates[6][4] = {};
#pragma unroll
    for (int from = 0; from < kFrom; ++from) {
      const uint32_t a[4] = {operand[from].x, operand[from].y, operand[from].z, operand[from].w};
#pragma unroll
      for (int tile = 0; tile < 4; ++tile)
        mma<Operand>(hidden[tile], a, to_hidden[from][tile].x, to_hidden[from][tile].y);
    }
    store_partial<4, Memory::kTile>(memory.hidden[warp] + lane, hidden);
    __syncthreads();
    const float2 a = place.unit_total(memory.hidden[0]);
    const uint32_t h = two_operands(operand_of(activated(from_raw<T>(z[0]) + a.x, shape.activation).value),
                                    operand_of(activated(from_raw<T>(z[1]) + a.y, shape.activation).value));
    place.send_units(place.unit_piece(h), unit_place, unit_bell);
    if (lane == 0) mbarrier_expect(memory.unit_barriers + warp, kFrom * 1024);
    if (z_in && t + 1 < shape.T) {
      z_in += args.z.stride_t;
      z[0] = load_raw(z_in), z[1] = load_raw(z_in + 1);
    }
    if (t > 0) finish();
    mbarrier_wait(memory.unit_barriers + warp, t & 1);
#pragma unroll
    for (int step = 0; step < 2 * kFrom; ++step) {
      const uint4 v = memory.units[place.unit_operand(step)];
      const uint32_t a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int tile = 0; tile < 6; ++tile) mma<Operand>(gates[tile], a, to_gates[step][tile].x, to_gates[step][tile].y);
    }
    store_partial<6, Memory::kTile>(memory.gates[warp] + lane, gates);
    __syncthreads();
    if (threadIdx.x == 0) mbarrier_expect(&memory.sum_barrier, kBlocks * 128);
    const float f = place.template column_total<6>(memory.gates[0], 0) + b_f;
    const float i = place.template column_total<6>(memory.gates[0], 2) + b_i;
    const float d = place.template column_total<6>(memory.gates[0], 4) + b_d;
    keep = sigmoid_fast(f).value;
    u = keep * state + sigmoid_fast(i).value * tanh_fast(d).value;
    place.send_columns(place.template column_piece<Operand>(u), column_place, column_bell);
    // Mean of 16 columns and squares about it, by way of those about one of them.
    const float about = __shfl_sync(0xffffffffu, u, lane & 2), off = u - about;
    const float total = sum_owned(off), squares = sum_owned(off * off), mean = total * (1.0f / kBlockColumns);
    place.send_sums(about + mean, squares - total * mean, sum_place, sum_bell);
  }
  if (shape.T > 0) {
    receive_contexts(shape.T - 1);
    finish();
  }
  if (real) {
    static_cast<float*>(args.c_last)[place.row * D + column] = state;
    if (args.decay) static_cast<float*>(args.decay)[place.row * D + column] = decay;
  }
  cluster_sync();
}

}  // namespace newllm::cuda
