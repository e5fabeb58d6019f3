// The whole cell over T steps for widths past one cluster, H = 2 D: a team is a mesh of kGroups clusters ("groups") of
// eight blocks ("members"). A group owns 64 columns of the context and 128 hidden units; its members share out K, not
// outputs. A product is then a slice of K by all of the group's outputs, with the matrix in registers; the sums of a
// member's slice go through distributed shared memory to the members that add them up, each for two of the 16 rows;
// and what these compute goes through L2 to the member of every group that has this slice of K: an eighth of the
// bytes that blocks read who need all of K.
//
// Places. Member m owns rows m and m + 8. A lane of a warp is (g, q) = (lane / 4, lane % 4), and holds, as tensor cores
// want it, columns 2 q and 2 q + 1 of a tile of eight in rows g and g + 8: so what a lane computes goes to member g,
// and 16 bytes of a message, a "piece", are the four numbers of one lane and tile, (row g: 2 q, 2 q + 1; row g + 8:
// ...). Slice m of K: of every group, the tile m of its contexts and the tiles 2 m and 2 m + 1 of its hidden units.
#pragma once

#include "recurrent_context.cuh"
#include "recurrent_message.cuh"

namespace newllm::cuda {

constexpr int kMembers = 8, kGroupColumns = 64, kGroupUnits = 128;
constexpr int kOwners = 2 * kGroupColumns;  // threads that own a column of the context in one row

struct MeshShape {
  int B, T;
  ActivationKind activation;
};

// Words of a mesh's messages: of hidden units, of contexts, of the sums over a warp's columns.
// The sums have a copy for every slice: where all blocks ask for the same few lines, who writes them has to wait.
constexpr int kUnitWords = kRows * kGroupUnits, kColumnWords = 2 * kRows * kGroupColumns;
constexpr int kMeshWords = kUnitWords + kColumnWords;  // of a group

// What a block, warp and lane are in a mesh, and where their messages lie.
template <int kGroups>
struct Mesh {
  static constexpr int kColumns = kGroups * kGroupColumns, kUnits = kGroups * kGroupUnits;
  // Pieces that a lane reads of contexts and sums: first those of sums, then those of contexts.
  static constexpr int kSums = 4 * kGroups, kPieces = kGroups / 4;
  int team, group, member, warp, lane, g, q;
  uint32_t *units, *columns;

  __device__ Mesh(uint32_t* memory, int first_team)
      : member(blockIdx.x % kMembers), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), q(lane % 4) {
    const int local_team = blockIdx.x / (kMembers * kGroups);
    team = first_team + local_team, group = blockIdx.x / kMembers % kGroups;
    units = memory + int64_t(local_team) * kGroups * kMeshWords;
    columns = units + kGroups * kUnitWords;
  }
  __device__ int64_t row(int index) const { return int64_t(team) * kRows + index; }

  // What this thread owns, `index` counting the numbers of the group's tiles piece by piece: of rows member and
  // member + 8, the column or unit among the group's.
  __device__ int owned_row() const { return member + (threadIdx.x >> 1 & 1) * 8; }
  __device__ int owned() const { return threadIdx.x / 16 * 8 + (threadIdx.x / 4 & 3) * 2 + (threadIdx.x & 1); }

  // Where this thread's hidden unit and column go, for the members whose slice they are: a warp writes whole lines.
  __device__ uint32_t* unit_target() const {
    return units + ((warp * kGroups + group) * kMembers + member) * 32 + lane;
  }
  __device__ uint32_t* column_target() const {
    return columns + ((threadIdx.x / 16 % 8 * 8 + member) * 2 * kSums + kSums + group * 4) * 4 + threadIdx.x % 16;
  }
  // Two words of sums, of the row of this lane, for the members whose slice is this lane's: lanes below 16 write.
  __device__ uint32_t* sum_target() const {
    const int slice = (lane & 1) | (lane >> 1 & 6);
    return columns + ((slice % 8 * 8 + member) * 2 * kSums + group * 4 + warp % 4) * 4 + (lane & 2);
  }

  // Hidden units of this member's slice are read by all threads: piece [group][g][half of 16][q].
  __device__ const uint4* unit_source(int n) const {
    return reinterpret_cast<const uint4*>(units) + member * kGroups * 64 + threadIdx.x + n * kTeamThreads;
  }
  __device__ int unit_place(int n) const {  // in pairs of registers: [group][lane][half]
    const int p = threadIdx.x + n * kTeamThreads;
    return (p / 64 * 32 + p / 8 % 8 * 4 + p % 4) * 2 + p / 4 % 2;
  }
  // Contexts and sums of rows `warp` and warp + 8 are read by one warp.
  __device__ int piece(int n) const { return n * 32 + lane; }
  __device__ bool is_sum(int n) const { return piece(n) < kSums; }
  static __device__ constexpr bool some_sums(int n) { return n * 32 < kSums; }
  static __device__ constexpr bool some_columns(int n) { return n * 32 + 31 >= kSums; }
  __device__ const uint4* column_source(int n) const {
    return reinterpret_cast<const uint4*>(columns) + (member * 8 + warp) * 2 * kSums + piece(n);
  }
  __device__ int source_group(int n) const { return (piece(n) - kSums) / 4; }
  __device__ int column(int n) const { return source_group(n) * kGroupColumns + member * 8 + (lane & 3) * 2; }
  __device__ int column_place(int n) const {
    return (source_group(n) / 2 * 32 + warp * 4 + (lane & 3)) * 2 + source_group(n) % 2;
  }
  // The k of slice and step that lane and register `half` of a matrix begin with.
  __device__ int slice_column(int step, int half) const {
    return (2 * step + half) * kGroupColumns + member * 8 + 2 * q;
  }
  __device__ int slice_unit(int step, int half) const { return step * kGroupUnits + member * 16 + half * 8 + 2 * q; }
};

template <class T>
__device__ __forceinline__ uint32_t two_of(const T* matrix, int64_t first, int64_t second) {
  const unsigned short* bits = reinterpret_cast<const unsigned short*>(matrix);
  return uint32_t(bits[first]) | uint32_t(bits[second]) << 16;
}

// kTiles of eight outputs over kSteps of k, operands in shared memory as one piece a lane and step.
template <class T, int kSteps, int kTiles>
__device__ __forceinline__ void mesh_product(float4 (&result)[kTiles], const uint4* rows,
                                             const uint2 (&matrix)[kSteps][kTiles], int lane) {
  float sums[2][kTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint4 v = rows[step * 32 + lane];
    const uint32_t a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      mma<T>(sums[step % 2][tile], a, matrix[step][tile].x, matrix[step][tile].y);
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const float (&a)[4] = sums[0][tile], (&b)[4] = sums[1][tile];
    result[tile] = make_float4(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]);
  }
}

// Sums that the members of a group have of their slices, to the member that adds them up.
template <int kTiles>
struct Parts {
  float4 tiles[kMembers][kTiles * 4];

  __device__ __forceinline__ float total(int index) const {
    float sum = 0;
#pragma unroll
    for (int from = 0; from < kMembers; ++from) sum += reinterpret_cast<const float*>(tiles[from])[index];
    return sum;
  }
};

// Sum over the lanes that own columns of the same row.
__device__ __forceinline__ float sum_owned(float x) {
#pragma unroll
  for (int step = 1; step < 32; step = step == 1 ? 4 : step * 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ __forceinline__ float4 sum_lanes(float4 v) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    v.x += __shfl_xor_sync(0xffffffffu, v.x, step), v.y += __shfl_xor_sync(0xffffffffu, v.y, step);
    v.z += __shfl_xor_sync(0xffffffffu, v.z, step), v.w += __shfl_xor_sync(0xffffffffu, v.w, step);
  }
  return v;
}

// Mean and 1 / std of rows `warp` and warp + 8 from means and squares of 16 columns each. Squares are taken about the
// first of these means, which is at most sqrt(columns / 16) deviations off: nothing cancels that float32 would miss.
template <int kGroups>
__device__ __forceinline__ float4 mesh_statistics(const Mesh<kGroups>& mesh, const uint4 (&piece)[kGroups / 4],
                                                  float eps) {
  const float first = __shfl_sync(0xffffffffu, real_of(piece[0].x), 0);
  const float second = __shfl_sync(0xffffffffu, real_of(piece[0].z), 0);
  float4 part = {};
#pragma unroll
  for (int n = 0; n < kGroups / 4; ++n) {
    if (!mesh.some_sums(n) || !mesh.is_sum(n)) continue;
    const float x = real_of(piece[n].x) - first, y = real_of(piece[n].z) - second;
    part.x += x, part.y += fmaf(16 * x, x, real_of(piece[n].y));
    part.z += y, part.w += fmaf(16 * y, y, real_of(piece[n].w));
  }
  const float4 total = sum_lanes(part);
  constexpr float kEach = 1.0f / Mesh<kGroups>::kSums, kColumn = 1.0f / Mesh<kGroups>::kColumns;
  const float x = total.x * kEach, y = total.z * kEach;
  const float v = total.y * kColumn - x * x, w = total.w * kColumn - y * y;  // NaN passes
  return make_float4(first + x, rsqrtf((v < 0 ? 0 : v) + eps), second + y, rsqrtf((w < 0 ? 0 : w) + eps));
}

template <class T>
__device__ __forceinline__ uint32_t two_packed(float first, float second) {
  const float pair[2] = {first, second};
  const auto raw = Vec<T, 2>::pack(pair);
  return reinterpret_cast<const uint32_t&>(raw);
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrent_mesh_forward_kernel(RecurrentArgs args, MeshShape shape, uint32_t* memory, int first_team, float below) {
  using M = Mesh<kGroups>;
  constexpr int D = M::kColumns, H = M::kUnits;
  __shared__ uint4 c_rows[kGroups / 2 * 32], h_rows[kGroups * 32];  // [step of k][lane]
  __shared__ Parts<kGroupUnits / 8> hidden_parts;
  __shared__ Parts<3 * kGroupColumns / 8> gate_parts;
  __shared__ float4 statistics;  // of the rows that this block owns
  __shared__ uint64_t barriers[2];
  const M mesh(memory, first_team);
  const int warp = mesh.warp, lane = mesh.lane, member = mesh.member;

  const T *W_c = static_cast<const T*>(args.weights.context), *W_g = static_cast<const T*>(args.weights.gates);
  uint2 to_hidden[kGroups / 2][2], to_gates[kGroups][3];
#pragma unroll
  for (int step = 0; step < kGroups / 2; ++step) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const T* row = W_c + int64_t(mesh.group * kGroupUnits + (2 * warp + tile) * 8 + mesh.g) * D;
      const int low = mesh.slice_column(step, 0), high = mesh.slice_column(step, 1);
      to_hidden[step][tile] = make_uint2(two_operands(row, low, low + 1), two_operands(row, high, high + 1));
    }
  }
#pragma unroll
  for (int step = 0; step < kGroups; ++step) {
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      const T* row = W_g + int64_t(gate * D + mesh.group * kGroupColumns + warp * 8 + mesh.g) * H;
      const int low = mesh.slice_unit(step, 0), high = mesh.slice_unit(step, 1);
      to_gates[step][gate] = make_uint2(two_operands(row, low, low + 1), two_operands(row, high, high + 1));
    }
  }

  const uint4 *unit_source[kGroups / 4], *column_source[M::kPieces];
  float w[M::kPieces][2], b[M::kPieces][2];
  const float *norm_weight = static_cast<const float*>(args.norm.weight),
              *norm_bias = static_cast<const float*>(args.norm.bias), *c0 = static_cast<const float*>(args.c0);
  const auto weight_at = [&](int column) { return norm_weight ? norm_weight[column] : 1.0f; };
  const auto bias_at = [&](int column) { return norm_bias ? norm_bias[column] : 0.0f; };
  const auto start_at = [&](int row, int column) {
    return mesh.row(row) < shape.B ? c0[mesh.row(row) * D + column] : 0.0f;
  };
#pragma unroll
  for (int n = 0; n < M::kPieces; ++n) {
    unit_source[n] = mesh.unit_source(n), column_source[n] = mesh.column_source(n);
    if (mesh.is_sum(n)) continue;
    const int column = mesh.column(n);
    w[n][0] = weight_at(column), w[n][1] = weight_at(column + 1);
    b[n][0] = bias_at(column), b[n][1] = bias_at(column + 1);
    reinterpret_cast<uint2*>(c_rows)[mesh.column_place(n)] =
        make_uint2(two_packed<Operand>(start_at(warp, column), start_at(warp, column + 1)),
                   two_packed<Operand>(start_at(warp + 8, column), start_at(warp + 8, column + 1)));
  }

  const bool owner = threadIdx.x < kOwners;
  const int column = mesh.group * kGroupColumns + mesh.owned(), unit = mesh.group * kGroupUnits + mesh.owned();
  const int64_t row = mesh.row(mesh.owned_row());
  const bool real = row < shape.B;
  const float limit = float(args.norm.clamp_value), operand_limit = fminf(limit, kMostOperand);
  const float eps = float(args.norm.eps);
  const float* gate_bias = static_cast<const float*>(args.weights.gates_bias);
  float b_f = 0, b_i = 0, b_d = 0, state = 0, u = 0, decay = 1, keep = 0, own_w = 1, own_b = 0;
  if (owner) {
    if (gate_bias) b_f = gate_bias[column], b_i = gate_bias[D + column], b_d = gate_bias[2 * D + column];
    own_w = weight_at(column), own_b = bias_at(column), state = start_at(mesh.owned_row(), column);
  }
  T* c_out = owner && real ? at<T>(args.c, row, 0, column) : nullptr;
  const T* z_in = real ? at<T>(args.z, row, 0, unit) : nullptr;
  uint32_t z = real && shape.T > 0 ? load_raw(z_in) : 0;
  uint32_t *unit_target = mesh.unit_target(), *column_target = mesh.column_target(), *sum_target = mesh.sum_target();

  if (threadIdx.x < 2) mbarrier_init(barriers + threadIdx.x, 1);
  cluster_sync();
  const uint32_t hidden_there = remote_address(hidden_parts.tiles[member] + 2 * warp * 4 + mesh.q, mesh.g);
  const uint32_t gates_there = remote_address(gate_parts.tiles[member] + warp * 4 + mesh.q, mesh.g);
  const uint32_t hidden_bell = remote_address(barriers, mesh.g), gate_bell = remote_address(barriers + 1, mesh.g);
  // The state that this thread's column has after LayerNorm, once its row's statistics are known.
  const auto finish = [&] {
    const float mean = lane & 2 ? statistics.z : statistics.x, rstd = lane & 2 ? statistics.w : statistics.y;
    const float xhat = (u - mean) * rstd, y = xhat * own_w + own_b;
    decay *= keep * own_w * rstd * (1 - (1 + xhat * xhat) * (1.0f / D));
    state = clamped(y, limit);
    if (c_out) {
      *c_out = from_float<T>(y > limit || y < -limit ? state : clamped(y, below));
      c_out += args.c.stride_t;
    }
  };

  for (int t = 0; t < shape.T; ++t) {
    const Step step(t);
    float4 hidden[2], gates[3];
    mesh_product<Operand>(hidden, c_rows, to_hidden, lane);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) send(hidden[tile], hidden_there + tile * 64, hidden_bell);
    if (threadIdx.x == 0) mbarrier_expect(barriers, sizeof(hidden_parts));
    if (owner && t > 0) finish();
    mbarrier_wait(barriers, t & 1);
    const float h = activated(from_raw<T>(z) + hidden_parts.total(threadIdx.x), shape.activation).value;
    store_relaxed(unit_target, step.number(operand_of(h)));
    if (real && t + 1 < shape.T) z = load_raw(z_in += args.z.stride_t);
    uint4 units[kGroups / 4], piece[M::kPieces];
    receive(unit_source, units, [&](uint4 v, int) { return step.numbers(v); });
#pragma unroll
    for (int n = 0; n < kGroups / 4; ++n) {
      reinterpret_cast<uint2*>(h_rows)[mesh.unit_place(n)] =
          make_uint2(pair_of(units[n].x, units[n].y), pair_of(units[n].z, units[n].w));
    }
    __syncthreads();

    mesh_product<Operand>(gates, h_rows, to_gates, lane);
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) send(gates[gate], gates_there + gate * 512, gate_bell);
    if (threadIdx.x == 0) mbarrier_expect(barriers + 1, sizeof(gate_parts));
    if (owner) {
      mbarrier_wait(barriers + 1, t & 1);
      const float f = gate_parts.total(threadIdx.x) + b_f, i = gate_parts.total(threadIdx.x + kOwners) + b_i;
      const float d = gate_parts.total(threadIdx.x + 2 * kOwners) + b_d;
      keep = sigmoid_fast(f).value;
      u = keep * state + sigmoid_fast(i).value * tanh_fast(d).value;
      store_relaxed(column_target, step.real(u));
      // Mean of 16 columns and squares about it, by way of those about one of them.
      const float about = __shfl_sync(0xffffffffu, u, lane & 2), off = u - about;
      const float sum = sum_owned(off), squares = sum_owned(off * off), mean = sum * (1.0f / 16);
      if (lane < 16) store_relaxed(sum_target, step.real(about + mean), step.real(squares - sum * mean));
    }
    receive(column_source, piece, [&](uint4 v, int) { return step.reals(v); });
    const float4 s = mesh_statistics<kGroups>(mesh, piece, eps);
#pragma unroll
    for (int n = 0; n < M::kPieces; ++n) {
      if (!mesh.some_columns(n) || mesh.is_sum(n)) continue;
      const auto normal = [&](uint32_t word, float mean, float rstd, int k) {
        return clamped((real_of(word) - mean) * rstd * w[n][k] + b[n][k], operand_limit);
      };
      reinterpret_cast<uint2*>(c_rows)[mesh.column_place(n)] =
          make_uint2(two_packed<Operand>(normal(piece[n].x, s.x, s.y, 0), normal(piece[n].y, s.x, s.y, 1)),
                     two_packed<Operand>(normal(piece[n].z, s.z, s.w, 0), normal(piece[n].w, s.z, s.w, 1)));
    }
    if (warp == member && lane == 0) statistics = s;
    __syncthreads();
  }
  if (owner && shape.T > 0) finish();
  if (owner && real) {
    static_cast<float*>(args.c_last)[row * D + column] = state;
    if (args.decay) static_cast<float*>(args.decay)[row * D + column] = decay;
  }
  cluster_sync();
}

}  // namespace newllm::cuda
