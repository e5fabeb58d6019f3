// The adjoint of the whole cell, from the gradients of the contexts to those of all pre-activations, by the teams and
// in the way of recurrent_context.cuh: three meetings a step, the first of them only for LayerNorm's sums.
#pragma once

#include "recurrent_context.cuh"

namespace newllm::cuda {

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

// Backward: matrices, gradients of gates and of hidden units of all, partial sums, LayerNorm's sums and means,
// barriers.
inline int64_t backward_shared(int D, int H, int blocks, bool cluster) {
  const int Ds = D / blocks, Hs = H / blocks;
  const int64_t matrices = int64_t(Hs) * 3 * D + int64_t(Ds) * H, rows = kRows * int64_t(3 * D + H);
  const int floats = Split(Hs).floats() > Split(Ds).floats() ? Split(Hs).floats() : Split(Ds).floats();
  return 2 * (matrices + rows) + 4 * floats + 8 * kRows * (1 + (cluster ? blocks : 0)) + 32;
}

// What the backward reads of one step, for the column that a thread owns and for its hidden units.
struct BackwardInputs {
  uint32_t f, i, d, c, before, grad_c, a[kUnitsPerThread];  // as load_raw gives them
  float2 statistics;
};

template <class T>
__device__ __forceinline__ void load_inputs(BackwardInputs& in, const RecurrentBackwardArgs& args,
                                            const TeamShape& shape, const float2* statistics, const Place& place,
                                            const Unit (&units)[kUnitsPerThread], int t) {
  if (t < 0) return;
  if (place.real) {
    const T* gates = at<T>(args.pre, place.b, t, shape.H + place.column);
    in.f = load_raw(gates), in.i = load_raw(gates + shape.D), in.d = load_raw(gates + 2 * shape.D);
    in.c = load_raw(at<T>(args.c, place.b, t, place.column));
    if (t > 0) in.before = load_raw(at<T>(args.c, place.b, t - 1, place.column));
    if (args.grad_c.data) in.grad_c = load_raw(at<T>(args.grad_c, place.b, t, place.column));
    in.statistics = statistics[place.b * shape.T + t];
  }
#pragma unroll
  for (int e = 0; e < kUnitsPerThread; ++e) {
    if (units[e].real) in.a[e] = load_raw(at<T>(args.pre, units[e].b, t, units[e].column));
  }
}

template <class T, bool kCluster>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrent_backward_kernel(RecurrentBackwardArgs args, TeamShape shape, TeamMemory memory, const float2* statistics,
                              int first_team, float edge) {
  const int D = shape.D, H = shape.H, Ds = shape.Ds, Hs = shape.Hs, blocks = shape.blocks;
  const int rank = blockIdx.x % blocks, local_team = blockIdx.x / blocks, team_index = first_team + local_team;
  extern __shared__ __align__(16) char storage[];
  T* to_hidden = reinterpret_cast<T*>(storage);  // (Hs, 3 D) packed: W_g transposed, its rows in the order of g_rows
  T* to_context = to_hidden + Hs * 3 * D;        // (Ds, H) packed: W_c transposed
  T* g_rows = to_context + Ds * H;               // (kRows, 3 D): f, i, d of one block, then of the next
  T* a_rows = g_rows + kRows * 3 * D;            // (kRows, H)
  float* partial = reinterpret_cast<float*>(a_rows + kRows * H);
  const Split split_h(Hs), split_c(Ds);
  float2* means = reinterpret_cast<float2*>(partial + max(split_h.floats(), split_c.floats()));
  uint64_t* barriers = reinterpret_cast<uint64_t*>(means + kRows);
  // (blocks, kRows). Large teams have no room for them; but there a block reads them before it fetches the next g_rows.
  float2* sums = reinterpret_cast<float2*>(kCluster ? reinterpret_cast<T*>(barriers + 4) : g_rows);
  const int64_t of_team = kRows * int64_t(3 * D + H) / 8 + kRows * blocks / 2;
  Team<kCluster> team{blocks, rank, {memory.data + local_team * of_team, memory.flags + local_team * blocks}, barriers};
  const Channel sum_channel{reinterpret_cast<uint4*>(sums), kRows / 2, 2 * (3 * D + H)};
  const Channel g_channel{reinterpret_cast<uint4*>(g_rows), 6 * Ds, 0};
  const Channel a_channel{reinterpret_cast<uint4*>(a_rows), 2 * Hs, 6 * D};

  const T *W_c = static_cast<const T*>(args.weights.context), *W_g = static_cast<const T*>(args.weights.gates);
  pack_matrix(to_hidden, Hs, 3 * D, [&](int n, int k) {
    const int block = k / (3 * Ds), gate = k % (3 * Ds) / Ds;
    return W_g[int64_t(gate * D + block * Ds + k % Ds) * H + rank * Hs + n];
  });
  pack_matrix(to_context, Ds, H, [&](int n, int k) { return W_c[int64_t(k) * D + rank * Ds + n]; });
  __syncthreads();  // racecheck takes addresses 64 KB apart, a matrix and these barriers, for one
  if (threadIdx.x < 3) mbarrier_init(barriers + threadIdx.x, 1);
  team.gather();

  const Product<T> hidden_product(to_hidden, g_rows, 3 * D, split_h, partial);
  const Product<T> context_product(to_context, a_rows, H, split_c, partial);
  const Place place(shape, team_index, rank);
  const Unit units[kUnitsPerThread] = {{shape, team_index, rank, 0}, {shape, team_index, rank, 1}};
  const float per_column = 1.0f / D;
  const float* weight = static_cast<const float*>(args.norm.weight);
  const float w = weight && place.owns ? weight[place.column] : 1.0f;
  const int64_t of_state = place.b * D + place.column;
  const float start = place.real ? static_cast<const float*>(args.c0)[of_state] : 0.0f;
  float carry = 0, grad_weight = 0, grad_bias = 0, decay = 1;
  if (place.real && args.grad_c_last) carry = static_cast<const float*>(args.grad_c_last)[of_state];
  BackwardInputs next = {};
  load_inputs<T>(next, args, shape, statistics, place, units, shape.T - 1);

  for (int t = shape.T - 1; t >= 0; --t) {
    const uint32_t parity = (shape.T - 1 - t) & 1;
    const BackwardInputs in = next;
    load_inputs<T>(next, args, shape, statistics, place, units, t - 1);
    const float before = t > 0 ? from_raw<T>(in.before) : start, stored = from_raw<T>(in.c);
    const Activation forget = sigmoid_fast(from_raw<T>(in.f)), write = sigmoid_fast(from_raw<T>(in.i)),
                     delta = tanh_fast(from_raw<T>(in.d));
    const float xhat = (forget.value * before + write.value * delta.value - in.statistics.x) * in.statistics.y;
    float g = carry + (args.grad_c.data ? from_raw<T>(in.grad_c) : 0.0f);
    if (!place.real || stored >= edge || stored <= -edge) g = 0;
    grad_weight += place.real ? g * xhat : 0.0f;
    grad_bias += g;
    g *= w;
    const float sum = sum_columns(g, Ds), sum_x = sum_columns(place.real ? g * xhat : 0.0f, Ds);
    if (place.owns && place.own == 0) sums[rank * kRows + place.row] = make_float2(sum, sum_x);
    __syncthreads();
    team.exchange(0, parity, sum_channel);
    const int row_lane = threadIdx.x % kRowThreads, row = threadIdx.x / kRowThreads;
    float2 total = {0, 0};
#pragma unroll
    for (int k = 0; k < kSumsPerThread; ++k) {
      const int block = row_lane + k * kRowThreads;
      const float2 part = block < blocks ? sums[block * kRows + row] : make_float2(0, 0);
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
      const int first = rank * 3 * Ds + place.own;
      g_rows[place_of(place.row, first)] = df;
      g_rows[place_of(place.row, first + Ds)] = di;
      g_rows[place_of(place.row, first + 2 * Ds)] = dd;
      if (place.real) {
        T* target = at<T>(args.grad_pre, place.b, t, H + place.column);
        target[0] = df, target[D] = di, target[2 * D] = dd;
      }
      carry = du * forget.value;
      decay *= forget.value * w * in.statistics.y * (1 - (1 + xhat * xhat) * per_column);
    }
    __syncthreads();
    team.exchange(1, parity, g_channel);

    hidden_product.multiply();
#pragma unroll
    for (int e = 0; e < kUnitsPerThread; ++e) {
      if (!units[e].owned) continue;
      const float* of_unit = partial + units[e].row * split_h.stride() + units[e].unit;
      const Activation h = activated(units[e].real ? from_raw<T>(in.a[e]) : 0.0f, shape.activation);
      const T da = from_float<T>(hidden_product.summed(of_unit) * h.slope);
      a_rows[place_of(units[e].row, units[e].column)] = da;
      if (units[e].real) {
        *at<T>(args.grad_pre, units[e].b, t, units[e].column) = da;
        *at<T>(args.hidden, units[e].b, t, units[e].column) = from_float<T>(h.value);
      }
    }
    __syncthreads();
    team.exchange(2, parity, a_channel);

    context_product.multiply();
    if (place.owns) carry += context_product.summed(partial + place.row * split_c.stride() + place.own);
    __syncthreads();
  }
  if (place.real) {
    static_cast<float*>(args.grad_c0)[of_state] = carry;
    if (args.decay) static_cast<float*>(args.decay)[of_state] = decay;
    float* grad_norm = static_cast<float*>(args.grad_norm) + 2 * place.b * D + place.column;
    grad_norm[0] = grad_weight, grad_norm[D] = grad_bias;
  }
  team.gather();
}

}  // namespace newllm::cuda
