// The adjoint of the whole cell by the meshes of recurrent_mesh.cuh. What travels first is the gradient of LayerNorm's
// output with its sums; whoever reads it works out the gradients of the gates from its own copy of the
// pre-activations, ahead of the message: so the sums need no meeting of their own.
#pragma once

#include "recurrent_backward.cuh"
#include "recurrent_mesh.cuh"

namespace newllm::cuda {

// What a reader needs of one piece to make gradients of gates from those of contexts: raw inputs of four numbers, and
// what they come to.
struct RawPiece {
  uint32_t f[2], i[2], d[2], before[2];  // of two rows, pairs of columns
};
struct GatePiece {
  float xhat[4], f[4], i[4], d[4];
};

__device__ __forceinline__ uint32_t load_pair(const void* source) {
  uint32_t bits;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(bits) : "l"(source));
  return bits;
}

template <class T>
__device__ __forceinline__ float element_of(const uint32_t (&raw)[2], int k) {  // k as in a piece
  return from_raw<T>(raw[k / 2] >> (k % 2 * 16) & 0xffff);
}

// Gradients of gates are these times (g - its mean - xhat times the mean of g xhat).
template <class T, class Start>
__device__ __forceinline__ void prepare(GatePiece& gates, const RawPiece& raw, const float2 (&statistics)[2],
                                        bool first, const Start& start) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float before = first ? start(k) : element_of<T>(raw.before, k), mean = statistics[k / 2].x,
                rstd = statistics[k / 2].y;
    const Activation forget = sigmoid_fast(element_of<T>(raw.f, k)), write = sigmoid_fast(element_of<T>(raw.i, k)),
                     delta = tanh_fast(element_of<T>(raw.d, k));
    gates.xhat[k] = (forget.value * before + write.value * delta.value - mean) * rstd;
    gates.f[k] = before * forget.slope * rstd;
    gates.i[k] = delta.value * write.slope * rstd;
    gates.d[k] = write.value * delta.slope * rstd;
  }
}

// What is loaded is not looked at before this: the compiler would do so as soon as it can, and wait.
template <int kPieces>
__device__ __forceinline__ void hold(RawPiece (&raw)[kPieces], float2 (&of_rows)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile("" : "+f"(of_rows[half].x), "+f"(of_rows[half].y));
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      asm volatile("" : "+r"(raw[n].f[half]), "+r"(raw[n].i[half]), "+r"(raw[n].d[half]), "+r"(raw[n].before[half]));
    }
  }
}

// The raw inputs of step t: those of the column and unit that this thread owns, and of the pieces it reads.
struct MeshInputs {
  uint32_t f, i, d, c, before, grad_c, a;
  float2 statistics;
};

template <class T, int kGroups>
__device__ __forceinline__ void load_owned(MeshInputs& in, const RecurrentBackwardArgs& args, const Mesh<kGroups>& mesh,
                                           const MeshShape& shape, const float2* statistics, int t) {
  const int64_t row = mesh.row(mesh.owned_row());
  if (t < 0 || row >= shape.B) return;
  constexpr int D = Mesh<kGroups>::kColumns, H = Mesh<kGroups>::kUnits;
  const T* pre = at<T>(args.pre, row, t, 0);
  in.a = load_raw(pre + mesh.group * kGroupUnits + mesh.owned());
  if (threadIdx.x >= kOwners) return;
  const int column = mesh.group * kGroupColumns + mesh.owned();
  in.f = load_raw(pre + H + column), in.i = load_raw(pre + H + D + column), in.d = load_raw(pre + H + 2 * D + column);
  in.c = load_raw(at<T>(args.c, row, t, column));
  if (t > 0) in.before = load_raw(at<T>(args.c, row, t - 1, column));
  if (args.grad_c.data) in.grad_c = load_raw(at<T>(args.grad_c, row, t, column));
  in.statistics = statistics[row * shape.T + t];
}

template <class T, int kGroups>
__device__ __forceinline__ void load_pieces(RawPiece (&raw)[kGroups / 4], float2 (&of_rows)[2],
                                            const RecurrentBackwardArgs& args, const Mesh<kGroups>& mesh,
                                            const MeshShape& shape, const float2* statistics, int t) {
  if (t < 0) return;
  constexpr int D = Mesh<kGroups>::kColumns, H = Mesh<kGroups>::kUnits;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = mesh.row(mesh.warp + 8 * half);
    if (row >= shape.B) continue;
    of_rows[half] = statistics[row * shape.T + t];
    const T* pre = at<T>(args.pre, row, t, H);
#pragma unroll
    for (int n = 0; n < kGroups / 4; ++n) {
      if (!mesh.some_columns(n) || mesh.is_sum(n)) continue;
      const T* gates = pre + mesh.column(n);
      raw[n].f[half] = load_pair(gates), raw[n].i[half] = load_pair(gates + D);
      raw[n].d[half] = load_pair(gates + 2 * D);
      if (t > 0) raw[n].before[half] = load_pair(at<T>(args.c, row, t - 1, mesh.column(n)));
    }
  }
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrent_mesh_backward_kernel(RecurrentBackwardArgs args, MeshShape shape, uint32_t* memory,
                                   const float2* statistics, int first_team, float edge) {
  using M = Mesh<kGroups>;
  constexpr int D = M::kColumns, H = M::kUnits, kSteps = kGroups / 2;
  __shared__ uint4 g_rows[3 * kSteps * 32], a_rows[kGroups * 32];  // [step of k][lane]
  __shared__ Parts<kGroupUnits / 8> hidden_parts;
  __shared__ Parts<kGroupColumns / 8> context_parts;
  __shared__ float4 own_means;  // of the rows that this block owns
  __shared__ uint64_t barriers[2];
  const M mesh(memory, first_team);
  const int warp = mesh.warp, lane = mesh.lane, member = mesh.member;

  const T *W_c = static_cast<const T*>(args.weights.context), *W_g = static_cast<const T*>(args.weights.gates);
  uint2 to_hidden[3 * kSteps][2], to_context[kGroups][1];  // both transposed
#pragma unroll
  for (int step = 0; step < 3 * kSteps; ++step) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const T* first = W_g + int64_t(step / kSteps * D) * H + mesh.group * kGroupUnits + (2 * warp + tile) * 8 + mesh.g;
      const int64_t low = int64_t(mesh.slice_column(step % kSteps, 0)) * H;
      const int64_t high = int64_t(mesh.slice_column(step % kSteps, 1)) * H;
      to_hidden[step][tile] = make_uint2(two_of(first, low, low + H), two_of(first, high, high + H));
    }
  }
#pragma unroll
  for (int step = 0; step < kGroups; ++step) {
    const T* first = W_c + mesh.group * kGroupColumns + warp * 8 + mesh.g;
    const int64_t low = int64_t(mesh.slice_unit(step, 0)) * D, high = int64_t(mesh.slice_unit(step, 1)) * D;
    to_context[step][0] = make_uint2(two_of(first, low, low + D), two_of(first, high, high + D));
  }

  const uint4 *unit_source[kGroups / 4], *column_source[M::kPieces];
#pragma unroll
  for (int n = 0; n < M::kPieces; ++n) {
    unit_source[n] = mesh.unit_source(n), column_source[n] = mesh.column_source(n);
  }
  const bool owner = threadIdx.x < kOwners;
  const int column = mesh.group * kGroupColumns + mesh.owned(), unit = mesh.group * kGroupUnits + mesh.owned();
  const int64_t row = mesh.row(mesh.owned_row()), of_state = row * D + column;
  const bool real = row < shape.B;
  const float w = args.norm.weight && owner ? static_cast<const float*>(args.norm.weight)[column] : 1.0f;
  const float start = owner && real ? static_cast<const float*>(args.c0)[of_state] : 0.0f;
  float carry = 0, grad_weight = 0, grad_bias = 0, decay = 1;
  if (owner && real && args.grad_c_last) carry = static_cast<const float*>(args.grad_c_last)[of_state];
  uint32_t *unit_target = mesh.unit_target(), *column_target = mesh.column_target(), *sum_target = mesh.sum_target();

  if (threadIdx.x < 2) mbarrier_init(barriers + threadIdx.x, 1);
  cluster_sync();
  const uint32_t hidden_there = remote_address(hidden_parts.tiles[member] + 2 * warp * 4 + mesh.q, mesh.g);
  const uint32_t context_there = remote_address(context_parts.tiles[member] + warp * 4 + mesh.q, mesh.g);
  const uint32_t hidden_bell = remote_address(barriers, mesh.g), context_bell = remote_address(barriers + 1, mesh.g);
  const auto start_of = [&](int n, int k) {
    const int64_t of = mesh.row(warp + k / 2 * 8);
    return of < shape.B && !mesh.is_sum(n) ? static_cast<const float*>(args.c0)[of * D + mesh.column(n) + k % 2] : 0.0f;
  };

  MeshInputs next = {};
  RawPiece raw[M::kPieces] = {};
  GatePiece gates[M::kPieces];
  float2 of_rows[2] = {};
  load_owned<T, kGroups>(next, args, mesh, shape, statistics, shape.T - 1);
  load_pieces<T, kGroups>(raw, of_rows, args, mesh, shape, statistics, shape.T - 1);
#pragma unroll
  for (int n = 0; n < M::kPieces; ++n) {
    if (mesh.some_columns(n))
      prepare<T>(gates[n], raw[n], of_rows, shape.T == 1, [&](int k) { return start_of(n, k); });
  }

  for (int t = shape.T - 1; t >= 0; --t) {
    const Step step(shape.T - 1 - t);
    const MeshInputs in = next;
    const float before = t > 0 ? from_raw<T>(in.before) : start;
    const Activation forget = sigmoid_fast(from_raw<T>(in.f)), write = sigmoid_fast(from_raw<T>(in.i));
    const float xhat =
        (forget.value * before + write.value * tanh_fast(from_raw<T>(in.d)).value - in.statistics.x) * in.statistics.y;
    float g = carry + (args.grad_c.data ? from_raw<T>(in.grad_c) : 0.0f);
    if (owner) {
      const float stored = from_raw<T>(in.c);
      if (!real || stored >= edge || stored <= -edge) g = 0;
      grad_bias += g, grad_weight += real ? g * xhat : 0.0f;
      g *= w;
      store_relaxed(column_target, step.real(g));
      const float sum = sum_owned(g), sum_x = sum_owned(real ? g * xhat : 0.0f);
      if (lane < 16) store_relaxed(sum_target, step.real(sum), step.real(sum_x));
    }
    load_owned<T, kGroups>(next, args, mesh, shape, statistics, t - 1);
    load_pieces<T, kGroups>(raw, of_rows, args, mesh, shape, statistics, t - 1);
    uint4 piece[M::kPieces], units[kGroups / 4];
    receive(column_source, piece, [&](uint4 v, int) { return step.reals(v); });
    float4 means = {};
#pragma unroll
    for (int n = 0; n < M::kPieces; ++n) {
      if (!mesh.some_sums(n) || !mesh.is_sum(n)) continue;
      means.x += real_of(piece[n].x), means.y += real_of(piece[n].y);
      means.z += real_of(piece[n].z), means.w += real_of(piece[n].w);
    }
    means = sum_lanes(means);
    means.x *= 1.0f / D, means.y *= 1.0f / D, means.z *= 1.0f / D, means.w *= 1.0f / D;
#pragma unroll
    for (int n = 0; n < M::kPieces; ++n) {
      if (!mesh.some_columns(n) || mesh.is_sum(n)) continue;
      const GatePiece& gate = gates[n];
      const float e[4] = {real_of(piece[n].x) - means.x - gate.xhat[0] * means.y,
                          real_of(piece[n].y) - means.x - gate.xhat[1] * means.y,
                          real_of(piece[n].z) - means.z - gate.xhat[2] * means.w,
                          real_of(piece[n].w) - means.z - gate.xhat[3] * means.w};
      const uint2 df = make_uint2(two_packed<T>(e[0] * gate.f[0], e[1] * gate.f[1]),
                                  two_packed<T>(e[2] * gate.f[2], e[3] * gate.f[3]));
      const uint2 di = make_uint2(two_packed<T>(e[0] * gate.i[0], e[1] * gate.i[1]),
                                  two_packed<T>(e[2] * gate.i[2], e[3] * gate.i[3]));
      const uint2 dd = make_uint2(two_packed<T>(e[0] * gate.d[0], e[1] * gate.d[1]),
                                  two_packed<T>(e[2] * gate.d[2], e[3] * gate.d[3]));
      uint2* target = reinterpret_cast<uint2*>(g_rows) + mesh.column_place(n);
      target[0] = df, target[kSteps * 64] = di, target[2 * kSteps * 64] = dd;
      if (mesh.source_group(n) == mesh.group) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (mesh.row(warp + 8 * half) >= shape.B) continue;
          T* out = at<T>(args.grad_pre, mesh.row(warp + 8 * half), t, H + mesh.column(n));
          *reinterpret_cast<uint32_t*>(out) = half ? df.y : df.x;
          *reinterpret_cast<uint32_t*>(out + D) = half ? di.y : di.x;
          *reinterpret_cast<uint32_t*>(out + 2 * D) = half ? dd.y : dd.x;
        }
      }
    }
    if (warp == member && lane == 0) own_means = means;
    __syncthreads();

    float4 hidden[2], context[1];
    mesh_product<T>(hidden, g_rows, to_hidden, lane);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) send(hidden[tile], hidden_there + tile * 64, hidden_bell);
    if (threadIdx.x == 0) mbarrier_expect(barriers, sizeof(hidden_parts));
    if (owner) {
      const float mean = lane & 2 ? own_means.z : own_means.x, mean_x = lane & 2 ? own_means.w : own_means.y;
      carry = real ? (g - mean - xhat * mean_x) * in.statistics.y * forget.value : 0.0f;
      decay *= forget.value * w * in.statistics.y * (1 - (1 + xhat * xhat) * (1.0f / D));
    }
    const Activation h = activated(real ? from_raw<T>(in.a) : 0.0f, shape.activation);
    mbarrier_wait(barriers, step.tag & 1 ^ 1);
    const T da = from_float<T>(hidden_parts.total(threadIdx.x) * h.slope);
    store_relaxed(unit_target, step.number(da));
    if (real) {
      *at<T>(args.grad_pre, row, t, unit) = da;
      *at<T>(args.hidden, row, t, unit) = from_float<T>(h.value);
    }
    hold(raw, of_rows);
#pragma unroll
    for (int n = 0; n < M::kPieces; ++n) {
      if (mesh.some_columns(n)) prepare<T>(gates[n], raw[n], of_rows, t == 1, [&](int k) { return start_of(n, k); });
    }
    receive(unit_source, units, [&](uint4 v, int) { return step.numbers(v); });
#pragma unroll
    for (int n = 0; n < kGroups / 4; ++n) {
      reinterpret_cast<uint2*>(a_rows)[mesh.unit_place(n)] =
          make_uint2(pair_of(units[n].x, units[n].y), pair_of(units[n].z, units[n].w));
    }
    __syncthreads();
    mesh_product<T>(context, a_rows, to_context, lane);
    send(context[0], context_there, context_bell);
    if (threadIdx.x == 0) mbarrier_expect(barriers + 1, sizeof(context_parts));
    if (owner) {
      mbarrier_wait(barriers + 1, step.tag & 1 ^ 1);
      carry += context_parts.total(threadIdx.x);
    }
  }
  if (owner && real) {
    static_cast<float*>(args.grad_c0)[of_state] = carry;
    if (args.decay) static_cast<float*>(args.decay)[of_state] = decay;
    float* grad_norm = static_cast<float*>(args.grad_norm) + 2 * row * D + column;
    grad_norm[0] = grad_weight, grad_norm[D] = grad_bias;
  }
  cluster_sync();
}

}  // namespace newllm::cuda
