// The adjoint of the whole cell by the clusters of recurrent_cluster.cuh: three messages a step, the first of them only
// for LayerNorm's sums.
#pragma once

#include "recurrent_backward.cuh"
#include "recurrent_cluster.cuh"

namespace newllm::cuda {

template <int kBlocks>
struct ClusterBackwardMemory {
  static constexpr int kTile = ClusterMemory<kBlocks>::kTile;
  uint4 gates[kBlocks * 3 * 32];  // [block][gate][g][q]
  uint4 units[kBlocks * 64];      // as in ClusterMemory
  float4 sums[8 * kBlocks];       // [warp][block]: sums over 16 columns of rows `warp` and warp + 8
  float4 hidden[kTeamWarps][4 * kTile], context[kTeamWarps][2 * kTile];
  uint64_t gate_barriers[kTeamWarps], unit_barriers[kTeamWarps], sum_barriers[kTeamWarps];
};

template <class T, int kBlocks>
__device__ __forceinline__ void load_cluster_inputs(BackwardInputs& in, const RecurrentBackwardArgs& args,
                                                    const MeshShape& shape, const float2* statistics,
                                                    const ClusterPlace<kBlocks>& place, int t) {
  if (t < 0) return;
  constexpr int D = ClusterPlace<kBlocks>::kColumns, H = ClusterPlace<kBlocks>::kUnits;
  if (place.row < shape.B) {
    const T* gates = at<T>(args.pre, place.row, t, H + place.column);
    in.f = load_raw(gates), in.i = load_raw(gates + D), in.d = load_raw(gates + 2 * D);
    in.c = load_raw(at<T>(args.c, place.row, t, place.column));
    if (t > 0) in.before = load_raw(at<T>(args.c, place.row, t - 1, place.column));
    if (args.grad_c.data) in.grad_c = load_raw(at<T>(args.grad_c, place.row, t, place.column));
    in.statistics = statistics[place.row * shape.T + t];
  }
  if (place.unit_row < shape.B) {
    const T* pre = at<T>(args.pre, place.unit_row, t, place.unit);
    in.a[0] = load_raw(pre), in.a[1] = load_raw(pre + 1);
  }
}

template <class T, int kBlocks>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrent_cluster_backward_kernel(RecurrentBackwardArgs args, MeshShape shape, const float2* statistics,
                                      float edge) {
  using Memory = ClusterBackwardMemory<kBlocks>;
  using Place = ClusterPlace<kBlocks>;
  constexpr int D = Place::kColumns, H = Place::kUnits, kFrom = Place::kFrom;
  extern __shared__ __align__(16) char storage[];
  Memory& memory = *reinterpret_cast<Memory*>(storage);
  const Place place(storage);
  const int rank = place.rank, warp = place.warp, lane = place.lane, g_lane = place.g, q = place.q;

  const T *W_c = static_cast<const T*>(args.weights.context), *W_g = static_cast<const T*>(args.weights.gates);
  uint2 to_hidden[3 * kFrom][4], to_context[2 * kFrom][2];  // both transposed
#pragma unroll
  for (int step = 0; step < 3 * kFrom; ++step) {
    const int64_t k = step % 3 * D + (warp * kFrom + step / 3) * kBlockColumns + 2 * q;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      const T* first = W_g + k * H + rank * kBlockUnits + tile * 8 + g_lane;
      to_hidden[step][tile] = make_uint2(two_of(first, 0, H), two_of(first, 8 * H, 9 * H));
    }
  }
#pragma unroll
  for (int step = 0; step < 2 * kFrom; ++step) {
    const int64_t k = (warp * 2 * kFrom + step) * 16 + 2 * q;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const T* first = W_c + k * D + rank * kBlockColumns + tile * 8 + g_lane;
      to_context[step][tile] = make_uint2(two_of(first, 0, D), two_of(first, 8 * D, 9 * D));
    }
  }

  const bool real = place.row < shape.B, unit_real = place.unit_row < shape.B;
  const int64_t of_state = place.row * D + place.column;
  const float w = args.norm.weight ? static_cast<const float*>(args.norm.weight)[place.column] : 1.0f;
  const float start = real ? static_cast<const float*>(args.c0)[of_state] : 0.0f;
  float carry = 0, grad_weight = 0, grad_bias = 0, decay = 1;
  if (real && args.grad_c_last) carry = static_cast<const float*>(args.grad_c_last)[of_state];
  const uint32_t gate_place = place.offset(memory.gates + rank * 96 + warp * 4 + place.own_q);
  const uint32_t unit_place = place.offset(memory.units + rank * 64 + place.unit_piece());
  const uint32_t sum_place = place.offset(memory.sums + warp * kBlocks + rank);
  const uint32_t gate_bell = place.offset(memory.gate_barriers + rank / kFrom);
  const uint32_t unit_bell = place.offset(memory.unit_barriers + rank / kFrom);
  const uint32_t sum_bell = place.offset(memory.sum_barriers + warp);
  if (threadIdx.x < 3 * kTeamWarps) mbarrier_init(memory.gate_barriers + threadIdx.x, 1);
  cluster_sync();
  BackwardInputs next = {};
  load_cluster_inputs<T, kBlocks>(next, args, shape, statistics, place, shape.T - 1);

  for (int t = shape.T - 1; t >= 0; --t) {
    const uint32_t parity = (shape.T - 1 - t) & 1;
    const BackwardInputs in = next;
    const float before = t > 0 ? from_raw<T>(in.before) : start, stored = from_raw<T>(in.c);
    const Activation forget = sigmoid_fast(from_raw<T>(in.f)), write = sigmoid_fast(from_raw<T>(in.i)),
                     delta = tanh_fast(from_raw<T>(in.d));
    const float xhat = (forget.value * before + write.value * delta.value - in.statistics.x) * in.statistics.y;
    float g = carry + (args.grad_c.data ? from_raw<T>(in.grad_c) : 0.0f);
    if (!real || stored >= edge || stored <= -edge) g = 0;
    grad_weight += real ? g * xhat : 0.0f;
    grad_bias += g;
    g *= w;
    const float sum = sum_owned(g), sum_x = sum_owned(real ? g * xhat : 0.0f);
    place.send_sums(sum, sum_x, sum_place, sum_bell);
    if (lane == 0) mbarrier_expect(memory.sum_barriers + warp, kBlocks * 16);
    load_cluster_inputs<T, kBlocks>(next, args, shape, statistics, place, t - 1);
    mbarrier_wait(memory.sum_barriers + warp, parity);
    float4 means = lane < kBlocks ? memory.sums[warp * kBlocks + lane] : make_float4(0, 0, 0, 0);
    means = sum_lanes(means);
    const float mean = (lane & 2 ? means.z : means.x) * (1.0f / D);
    const float mean_x = (lane & 2 ? means.w : means.y) * (1.0f / D);
    const float du = real ? (g - mean - xhat * mean_x) * in.statistics.y : 0.0f;
    const float gradients[3] = {du * before * forget.slope, du * delta.value * write.slope,
                                du * write.value * delta.slope};
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      const float4 piece = place.template column_piece<T>(gradients[gate]);
      place.send_columns(piece, gate_place + gate * 512, gate_bell);
    }
    if (lane == 0) mbarrier_expect(memory.gate_barriers + warp, kFrom * 1536);
    if (real) {
      T* target = at<T>(args.grad_pre, place.row, t, H + place.column);
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) target[gate * D] = from_float<T>(gradients[gate]);
    }
    carry = du * forget.value;
    decay *= forget.value * w * in.statistics.y * (1 - (1 + xhat * xhat) * (1.0f / D));
    mbarrier_wait(memory.gate_barriers + warp, parity);

    float hidden[4][4] = {}, context[2][4] = {};
#pragma unroll
    for (int step = 0; step < 3 * kFrom; ++step) {
      const uint4 v = memory.gates[(warp * 3 * kFrom + step) * 32 + lane];
      const uint32_t a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) mma<T>(hidden[tile], a, to_hidden[step][tile].x, to_hidden[step][tile].y);
    }
    store_partial<4, Memory::kTile>(memory.hidden[warp] + lane, hidden);
    __syncthreads();
    const float2 total = place.unit_total(memory.hidden[0]);
    const Activation h[2] = {activated(unit_real ? from_raw<T>(in.a[0]) : 0.0f, shape.activation),
                             activated(unit_real ? from_raw<T>(in.a[1]) : 0.0f, shape.activation)};
    const float da[2] = {total.x * h[0].slope, total.y * h[1].slope};
    place.send_units(place.unit_piece(two_packed<T>(da[0], da[1])), unit_place, unit_bell);
    if (lane == 0) mbarrier_expect(memory.unit_barriers + warp, kFrom * 1024);
    if (unit_real) {
      T *grad = at<T>(args.grad_pre, place.unit_row, t, place.unit),
        *out = at<T>(args.hidden, place.unit_row, t, place.unit);
#pragma unroll
      for (int e = 0; e < 2; ++e) grad[e] = from_float<T>(da[e]), out[e] = from_float<T>(h[e].value);
    }
    mbarrier_wait(memory.unit_barriers + warp, parity);
#pragma unroll
    for (int step = 0; step < 2 * kFrom; ++step) {
      const uint4 v = memory.units[place.unit_operand(step)];
      const uint32_t a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) mma<T>(context[tile], a, to_context[step][tile].x, to_context[step][tile].y);
    }
    store_partial<2, Memory::kTile>(memory.context[warp] + lane, context);
    __syncthreads();
    carry += place.template column_total<2>(memory.context[0], 0);
  }
  if (real) {
    static_cast<float*>(args.grad_c0)[of_state] = carry;
    if (args.decay) static_cast<float*>(args.decay)[of_state] = decay;
    float* grad_norm = static_cast<float*>(args.grad_norm) + 2 * place.row * D + place.column;
    grad_norm[0] = grad_weight, grad_norm[D] = grad_bias;
  }
  cluster_sync();
}

}  // namespace newllm::cuda
