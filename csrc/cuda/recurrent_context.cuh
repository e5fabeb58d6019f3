// The whole cell over T steps in one launch: one hidden layer, gates, update, LayerNorm in the loop, clamp. A team of blocks
// (recurrent_exchange.cuh) computes 16 rows (batch entries). Each block keeps its slice of both matrices in shared memory for
// all of time and owns `Hs` hidden units and `Ds` columns of the context; a step is two products, and after each the team
// meets and tells each other its columns, as 16-bit numbers, which is what the tensor cores multiply. The state itself stays
// in float32 in the registers of its owner.
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

// Sum over the `width` (8 or 16) neighbouring lanes that hold one row's columns of this block.
__device__ __forceinline__ float sum_columns(float x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Both kernels: which row and column a thread owns, which hidden units, and where its tensors lie.
struct Place {
  int row, column, b;  // column: of the context, in all of D
  bool owns, real;     // has a column; and its row is one of the batch
  __device__ Place(const TeamShape& shape, int team, int rank) {
    row = threadIdx.x / shape.Ds, column = rank * shape.Ds + threadIdx.x % shape.Ds;
    owns = row < kRows;
    b = team * kRows + row;
    real = owns && b < shape.B;
  }
};

struct Unit {
  int row, unit;  // unit: among those of the block
  int64_t b;
  bool owned, real;
  __device__ Unit(const TeamShape& shape, int team, int index) {
    const int element = threadIdx.x + index * kTeamThreads;
    row = element / shape.Hs, unit = element % shape.Hs;
    owned = row < kRows;
    b = team * kRows + row;
    real = owned && b < shape.B;
  }
};

template <class T>
__device__ __forceinline__ const T* at(const View3& view, int64_t b, int64_t t, int64_t column) {
  return static_cast<const T*>(view.data) + b * view.stride_b + t * view.stride_t + column;
}
template <class T>
__device__ __forceinline__ T* at(View3& view, int64_t b, int64_t t, int64_t column) {
  return static_cast<T*>(view.data) + b * view.stride_b + t * view.stride_t + column;
}

// u of all columns, as it was sent, becomes c.
template <class T>
__device__ __forceinline__ void normalise_rows(T* rows, int D, const float2* statistics, const float* weight,
                                               const float* bias, float limit) {
  for (int row = threadIdx.x / 32; row < kRows; row += kTeamWarps) {
    const float2 s = statistics[row];
#pragma unroll 4
    for (int column = threadIdx.x % 32 * 2; column < D; column += 64) {
      auto* target = reinterpret_cast<typename Vec<T, 2>::Raw*>(rows + row * row_stride(D) + column);
      float pair[2];
      Vec<T, 2>::unpack(*target, pair);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float y = (pair[k] - s.x) * s.y * (weight ? __ldg(weight + column + k) : 1.0f) +
                        (bias ? __ldg(bias + column + k) : 0.0f);
        pair[k] = y > limit ? limit : y < -limit ? -limit : y;
      }
      *target = Vec<T, 2>::pack(pair);
    }
  }
}

// Bytes of shared memory of a block. Forward: matrices, h and c of all, partial sums, LayerNorm's sums and statistics.
inline int64_t forward_shared(int D, int H, int blocks, bool cluster) {
  const int Ds = D / blocks, Hs = H / blocks;
  const int64_t matrices = int64_t(Hs) * D + int64_t(3 * Ds) * H;
  const int64_t rows = kRows * (int64_t(row_stride(D)) + row_stride(H));
  const int floats = Split(Hs).floats() > Split(3 * Ds).floats() ? Split(Hs).floats() : Split(3 * Ds).floats();
  return 2 * (matrices + rows) + 4 * floats + 8 * kRows * ((cluster ? blocks : 1) + 1);
}

template <class T, bool kCluster>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrent_forward_kernel(RecurrentArgs args, TeamShape shape, TeamMemory memory, int first_team, float below) {
  const int D = shape.D, H = shape.H, Ds = shape.Ds, Hs = shape.Hs, blocks = shape.blocks;
  const int rank = blockIdx.x % blocks, local_team = blockIdx.x / blocks, team_index = first_team + local_team;
  extern __shared__ __align__(16) char storage[];
  T* to_hidden = reinterpret_cast<T*>(storage);  // (Hs, D) packed
  T* to_gates = to_hidden + Hs * D;              // (3 Ds, H) packed
  T* c_rows = to_gates + 3 * Ds * H;             // (kRows, D)
  T* h_rows = c_rows + kRows * row_stride(D);    // (kRows, H)
  float* partial = reinterpret_cast<float*>(h_rows + kRows * row_stride(H));
  const Split split_h(Hs), split_g(3 * Ds);
  float2* sums = reinterpret_cast<float2*>(partial + max(split_h.floats(), split_g.floats()));  // (kRows, blocks)
  float2* statistics = sums + Team<kCluster>::kept_sums(blocks);                                                    // mean, 1 / std
  const int64_t of_team = int64_t(local_team) * kRows * (D + H) / 8;
  Team<kCluster> team{blocks, rank,
                      {memory.data + of_team, memory.sums + local_team * kRows * blocks, memory.flags + local_team * blocks}};
  const Chunks<2> h_chunks(rank * Hs, Hs, 1, 0);
  const Chunks<1> c_chunks(rank * Ds, Ds, 1, 0);
  const int64_t put_c = 0, put_h = kRows * D / 8;

  const T *W_c = static_cast<const T*>(args.weights.context), *W_g = static_cast<const T*>(args.weights.gates);
  pack_matrix(to_hidden, Hs, D, [&](int n, int k) { return W_c[int64_t(rank * Hs + n) * D + k]; });
  pack_matrix(to_gates, 3 * Ds, H,
              [&](int n, int k) { return W_g[int64_t(n / Ds * D + rank * Ds + n % Ds) * H + k]; });
  const float* c0 = static_cast<const float*>(args.c0);
  for (int index = threadIdx.x; index < kRows * D; index += kTeamThreads) {
    const int row = index / D, b = team_index * kRows + row;
    c_rows[row * row_stride(D) + index % D] = from_float<T>(b < shape.B ? c0[int64_t(b) * D + index % D] : 0.0f);
  }
  const Place place(shape, team_index, rank);
  const float per_column = 1.0f / D, per_own = 1.0f / Ds;
  const float limit = float(args.norm.clamp_value), eps = float(args.norm.eps);
  const float *weight = static_cast<const float*>(args.norm.weight), *bias = static_cast<const float*>(args.norm.bias);
  const float w = weight && place.owns ? weight[place.column] : 1.0f, b_norm = bias && place.owns ? bias[place.column] : 0.0f;
  const float* gate_bias = static_cast<const float*>(args.weights.gates_bias);
  float b_f = 0, b_i = 0, b_d = 0, state = 0, u = 0, decay = 1, keep = 0;
  if (gate_bias && place.owns) {
    b_f = gate_bias[place.column], b_i = gate_bias[D + place.column], b_d = gate_bias[2 * D + place.column];
  }
  if (place.real) state = c0[int64_t(place.b) * D + place.column];
  T z[kUnitsPerThread] = {};
  const auto load_z = [&](int t) {
#pragma unroll
    for (int e = 0; e < kUnitsPerThread; ++e) {
      const Unit unit(shape, team_index, e);
      if (unit.real && t < shape.T) z[e] = *at<T>(args.z, unit.b, t, rank * Hs + unit.unit);
    }
  };
  load_z(0);
  if constexpr (kCluster) cluster_sync();  // nobody sends before everybody is there
  __syncthreads();

  for (int t = 0; t < shape.T; ++t) {
    multiply(to_hidden, c_rows, D, split_h, partial);
#pragma unroll
    for (int e = 0; e < kUnitsPerThread; ++e) {
      const Unit unit(shape, team_index, e);
      if (!unit.owned) continue;
      const float a = to_float(z[e]) + summed(partial, split_h, unit.row, unit.unit);
      h_rows[unit.row * row_stride(H) + rank * Hs + unit.unit] = from_float<T>(activated(a, shape.activation).value);
    }
    load_z(t + 1);
    __syncthreads();
    team.put_rows(h_rows, H, h_chunks, put_h);
    team.meet();
    team.get_rows(h_rows, H, put_h);

    multiply(to_gates, h_rows, H, split_g, partial);
    if (place.owns) {
      const int own = threadIdx.x % Ds;
      const float f = summed(partial, split_g, place.row, own) + b_f;
      const float i = summed(partial, split_g, place.row, Ds + own) + b_i;
      const float d = summed(partial, split_g, place.row, 2 * Ds + own) + b_d;
      keep = sigmoid_fast(f).value;
      u = keep * state + sigmoid_fast(i).value * tanh_fast(d).value;
      c_rows[place.row * row_stride(D) + place.column] = from_float<T>(u);
    }
    // Of a block's columns of a row: their sum, and the squares about their own mean, which add up without cancellation.
    const float sum = sum_columns(u, Ds), centred = u - sum * per_own, squares = sum_columns(centred * centred, Ds);
    if (place.owns && threadIdx.x % Ds == 0) team.own_sum(sums, place.row) = make_float2(sum, squares);
    __syncthreads();
    team.put_rows(c_rows, D, c_chunks, put_c);
    team.put_sums(sums);
    team.meet();
    team.get_rows(c_rows, D, put_c);

    const int row_lane = threadIdx.x % kRowThreads, row = threadIdx.x / kRowThreads;
    float2 part[kSumsPerThread];
    float total = 0, squared = 0;
#pragma unroll
    for (int k = 0; k < kSumsPerThread; ++k) {
      const int block = row_lane + k * kRowThreads;
      part[k] = block < blocks ? team.sum_of(sums, row, block) : make_float2(0, 0);
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
      const bool cut = y > limit || y < -limit;
      state = cut ? copysignf(limit, y) : y;
      const float stored = cut ? state : y > below ? below : y < -below ? -below : y;
      if (place.real) *at<T>(args.c, place.b, t, place.column) = from_float<T>(stored);
    }
    normalise_rows(c_rows, D, statistics, weight, bias, limit);
    __syncthreads();
  }
  if (place.real) {
    static_cast<float*>(args.c_last)[int64_t(place.b) * D + place.column] = state;
    if (args.decay) static_cast<float*>(args.decay)[int64_t(place.b) * D + place.column] = decay;
  }
  if constexpr (kCluster) cluster_sync();
}


// Mean and 1 / std of u, which LayerNorm saw at every step, from the pre-activations and the contexts: a warp a row.
template <class T>
__global__ void recurrent_statistics_kernel(RecurrentBackwardArgs args, TeamShape shape, float2* statistics) {
  const int64_t index = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (index >= int64_t(shape.B) * shape.T) return;
  const int64_t b = index / shape.T, t = index % shape.T;
  const int D = shape.D, lane = threadIdx.x % 32;
  const T* gates = at<T>(args.pre, b, t, shape.H);
  const auto value = [&](int k) {
    const float before = t > 0 ? to_float(*at<T>(args.c, b, t - 1, k)) : static_cast<const float*>(args.c0)[b * D + k];
    return sigmoid_fast(to_float(gates[k])).value * before +
           sigmoid_fast(to_float(gates[D + k])).value * tanh_fast(to_float(gates[2 * D + k])).value;
  };
  float total = 0, squares = 0;
  for (int k = lane; k < D; k += 32) total += value(k);
  const float mean = sum_columns(total, 32) / D;
  for (int k = lane; k < D; k += 32) {
    const float centred = value(k) - mean;
    squares += centred * centred;
  }
  const float variance = sum_columns(squares, 32) / D;
  if (lane == 0) statistics[index] = make_float2(mean, rsqrtf(variance + float(args.norm.eps)));
}

// Backward: matrices, gradients of gates and of hidden units of all, partial sums, LayerNorm's sums and their means.
inline int64_t backward_shared(int D, int H, int blocks, bool cluster) {
  const int Ds = D / blocks, Hs = H / blocks;
  const int64_t matrices = int64_t(Hs) * 3 * D + int64_t(Ds) * H;
  const int64_t rows = kRows * (int64_t(row_stride(3 * D)) + row_stride(H));
  const int floats = Split(Hs).floats() > Split(Ds).floats() ? Split(Hs).floats() : Split(Ds).floats();
  return 2 * (matrices + rows) + 4 * floats + 8 * kRows * ((cluster ? blocks : 1) + 1);
}

// What the backward reads of one step, for the column that a thread owns and for its hidden units.
template <class T>
struct BackwardInputs {
  T f, i, d, c, before, grad_c, a[kUnitsPerThread];
  float2 statistics;
};

template <class T>
__device__ __forceinline__ void load_inputs(BackwardInputs<T>& in, const RecurrentBackwardArgs& args,
                                            const TeamShape& shape, const float2* statistics, const Place& place,
                                            int team, int rank, int t) {
  if (t < 0) return;
  if (place.real) {
    const T* gates = at<T>(args.pre, place.b, t, shape.H + place.column);
    in.f = gates[0], in.i = gates[shape.D], in.d = gates[2 * shape.D];
    in.c = *at<T>(args.c, place.b, t, place.column);
    if (t > 0) in.before = *at<T>(args.c, place.b, t - 1, place.column);
    if (args.grad_c.data) in.grad_c = *at<T>(args.grad_c, place.b, t, place.column);
    in.statistics = statistics[int64_t(place.b) * shape.T + t];
  }
#pragma unroll
  for (int e = 0; e < kUnitsPerThread; ++e) {
    const Unit unit(shape, team, e);
    if (unit.real) in.a[e] = *at<T>(args.pre, unit.b, t, rank * shape.Hs + unit.unit);
  }
}

template <class T, bool kCluster>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrent_backward_kernel(RecurrentBackwardArgs args, TeamShape shape, TeamMemory memory, const float2* statistics,
                              int first_team, float edge) {
  const int D = shape.D, H = shape.H, Ds = shape.Ds, Hs = shape.Hs, blocks = shape.blocks;
  const int rank = blockIdx.x % blocks, local_team = blockIdx.x / blocks, team_index = first_team + local_team;
  extern __shared__ __align__(16) char storage[];
  T* to_hidden = reinterpret_cast<T*>(storage);  // (Hs, 3 D) packed: W_g transposed
  T* to_context = to_hidden + Hs * 3 * D;        // (Ds, H) packed: W_c transposed
  T* g_rows = to_context + Ds * H;               // (kRows, 3 D)
  T* a_rows = g_rows + kRows * row_stride(3 * D);  // (kRows, H)
  float* partial = reinterpret_cast<float*>(a_rows + kRows * row_stride(H));
  const Split split_h(Hs), split_c(Ds);
  float2* sums = reinterpret_cast<float2*>(partial + max(split_h.floats(), split_c.floats()));  // (kRows, blocks)
  float2* means = sums + Team<kCluster>::kept_sums(blocks);
  const int64_t of_team = int64_t(local_team) * kRows * (3 * D + H) / 8;
  Team<kCluster> team{blocks, rank,
                      {memory.data + of_team, memory.sums + local_team * kRows * blocks, memory.flags + local_team * blocks}};
  const Chunks<3> g_chunks(rank * Ds, Ds, 3, D);
  const Chunks<2> a_chunks(rank * Hs, Hs, 1, 0);
  const int64_t put_g = 0, put_a = kRows * 3 * D / 8;

  const T *W_c = static_cast<const T*>(args.weights.context), *W_g = static_cast<const T*>(args.weights.gates);
  pack_matrix(to_hidden, Hs, 3 * D, [&](int n, int k) { return W_g[int64_t(k) * H + rank * Hs + n]; });
  pack_matrix(to_context, Ds, H, [&](int n, int k) { return W_c[int64_t(k) * D + rank * Ds + n]; });
  const Place place(shape, team_index, rank);
  const float per_column = 1.0f / D;
  const int own = threadIdx.x % Ds;
  const float* weight = static_cast<const float*>(args.norm.weight);
  const float w = weight && place.owns ? weight[place.column] : 1.0f;
  const int64_t of_state = int64_t(place.b) * D + place.column;
  const float start = place.real ? static_cast<const float*>(args.c0)[of_state] : 0.0f;
  float carry = 0, grad_weight = 0, grad_bias = 0, decay = 1;
  if (place.real && args.grad_c_last) carry = static_cast<const float*>(args.grad_c_last)[of_state];
  BackwardInputs<T> next = {};
  load_inputs(next, args, shape, statistics, place, team_index, rank, shape.T - 1);
  if constexpr (kCluster) cluster_sync();
  __syncthreads();

  for (int t = shape.T - 1; t >= 0; --t) {
    const BackwardInputs<T> in = next;
    load_inputs(next, args, shape, statistics, place, team_index, rank, t - 1);
    const float before = t > 0 ? to_float(in.before) : start, stored = to_float(in.c);
    const Activation forget = sigmoid_fast(to_float(in.f)), write = sigmoid_fast(to_float(in.i)),
                     delta = tanh_fast(to_float(in.d));
    const float xhat = (forget.value * before + write.value * delta.value - in.statistics.x) * in.statistics.y;
    float g = carry + (args.grad_c.data ? to_float(in.grad_c) : 0.0f);
    if (!place.real || stored >= edge || stored <= -edge) g = 0;
    grad_weight += place.real ? g * xhat : 0.0f;
    grad_bias += g;
    g *= w;
    const float sum = sum_columns(g, Ds), sum_x = sum_columns(place.real ? g * xhat : 0.0f, Ds);
    if (place.owns && own == 0) team.own_sum(sums, place.row) = make_float2(sum, sum_x);
    __syncthreads();
    team.put_sums(sums);
    team.meet();
    const int row_lane = threadIdx.x % kRowThreads, row = threadIdx.x / kRowThreads;
    float2 total = {0, 0};
#pragma unroll
    for (int k = 0; k < kSumsPerThread; ++k) {
      const int block = row_lane + k * kRowThreads;
      const float2 part = block < blocks ? team.sum_of(sums, row, block) : make_float2(0, 0);
      total.x += part.x, total.y += part.y;
    }
    total.x = sum_columns(total.x, kRowThreads), total.y = sum_columns(total.y, kRowThreads);
    if (row_lane == 0) means[row] = make_float2(total.x * per_column, total.y * per_column);
    __syncthreads();
    if (place.owns) {
      const float2 mean = means[place.row];
      const float du = place.real ? (g - mean.x - xhat * mean.y) * in.statistics.y : 0.0f;
      const T df = from_float<T>(du * before * forget.slope), di = from_float<T>(du * delta.value * write.slope),
              dd = from_float<T>(du * write.value * delta.slope);
      T* row = g_rows + place.row * row_stride(3 * D) + place.column;
      row[0] = df, row[D] = di, row[2 * D] = dd;
      if (place.real) {
        T* target = at<T>(args.grad_pre, place.b, t, H + place.column);
        target[0] = df, target[D] = di, target[2 * D] = dd;
      }
      carry = du * forget.value;
      decay *= forget.value * w * in.statistics.y * (1 - (1 + xhat * xhat) * per_column);
    }
    __syncthreads();
    team.put_rows(g_rows, 3 * D, g_chunks, put_g);
    team.meet();
    team.get_rows(g_rows, 3 * D, put_g);

    multiply(to_hidden, g_rows, 3 * D, split_h, partial);
#pragma unroll
    for (int e = 0; e < kUnitsPerThread; ++e) {
      const Unit unit(shape, team_index, e);
      if (!unit.owned) continue;
      const Activation h = activated(unit.real ? to_float(in.a[e]) : 0.0f, shape.activation);
      const T da = from_float<T>(summed(partial, split_h, unit.row, unit.unit) * h.slope);
      const int column = rank * Hs + unit.unit;
      a_rows[unit.row * row_stride(H) + column] = da;
      if (unit.real) {
        *at<T>(args.grad_pre, unit.b, t, column) = da;
        *at<T>(args.hidden, unit.b, t, column) = from_float<T>(h.value);
      }
    }
    __syncthreads();
    team.put_rows(a_rows, H, a_chunks, put_a);
    team.meet();
    team.get_rows(a_rows, H, put_a);

    multiply(to_context, a_rows, H, split_c, partial);
    if (place.owns) carry += summed(partial, split_c, place.row, own);
    __syncthreads();
  }
  if (place.real) {
    static_cast<float*>(args.grad_c0)[of_state] = carry;
    if (args.decay) static_cast<float*>(args.decay)[of_state] = decay;
    float* grad_norm = static_cast<float*>(args.grad_norm) + 2 * of_state - place.column;
    grad_norm[0] = grad_weight, grad_norm[D] = grad_bias;
  }
  if constexpr (kCluster) cluster_sync();
}

}  // namespace newllm::cuda
