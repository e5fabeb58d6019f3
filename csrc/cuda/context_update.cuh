// One step of the cell, c' = clamp(LayerNorm(sigmoid(f) c + sigmoid(i) tanh(d))): a row in the registers of a group of
// threads, read once and written once.
//
// The two sums that LayerNorm needs go together, of u and of u^2; where the mean would eat the digits of the variance a
// second exchange sums centred squares. Backward blocks stay and walk the rows, the next ones on their way into shared
// memory, each thread its own pieces; its columns' share of the gradients of weight and bias waits in registers, then
// groups of a block are added in order, then blocks (sum_parts.cuh): the same inputs give the same bits.
#pragma once

#include "cell.cuh"
#include "row_sums.cuh"

namespace newllm::cuda {

// Gates of type T, contexts of type S, both cut alike.
template <class T, class S, int E, int PIECES, int THREADS, bool ALIGNED>
struct CellRow {
  using Gate = RowParts<T, E, PIECES, THREADS, ALIGNED>;
  using State = RowParts<S, E, PIECES, THREADS, ALIGNED>;
  static constexpr int kColumns = Gate::kColumns, kGroup = THREADS;
  static constexpr int kThreads = THREADS > 256 ? THREADS : 256;  // of a block
  static constexpr int kGroups = kThreads / kGroup;

  static __device__ __forceinline__ int thread() { return threadIdx.x % kGroup; }
  static __device__ __forceinline__ int group() { return threadIdx.x / kGroup; }

  template <class X>
  static __device__ __forceinline__ X* row(const View3& view, int64_t b) {
    return static_cast<X*>(view.data) + b * view.stride_b;
  }

  // Mean and 1 / standard deviation from the sums of u and u^2 over a row. All threads of a group must call.
  template <class Sums>
  static __device__ __forceinline__ float2 statistics(const float (&u)[kColumns], int D, float eps,
                                                      const typename Sums::Exchange& exchange) {
    float squares[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) squares[k] = u[k] * u[k];
    const float scale = 1.0f / float(D);
    const auto total = Sums::sum({tree_sum(u), tree_sum(squares)}, exchange, 0);
    const float mean = total.x[0] * scale;
    float variance = fmaf(-mean, mean, total.x[1] * scale);
    // Groups of a warp go together.
    const bool cancels = variance < mean * mean;
    if (kGroup < 32 ? __any_sync(0xffffffffu, cancels) : cancels) {
      float centred = 0.0f;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const float from_mean = Gate::column_of(thread(), k) < D ? u[k] - mean : 0.0f;
        centred = fmaf(from_mean, from_mean, centred);
      }
      const float sum = Sums::sum({centred, 0.0f}, exchange, 1).x[0];
      variance = cancels ? sum * scale : variance;
    }
    return {mean, rsqrt_fast(variance + eps)};
  }
};

template <class R, int BLOCKS>
__global__ void __launch_bounds__(R::kThreads, BLOCKS) context_update_kernel(const __grid_constant__ ContextArgs args) {
  using Gate = typename R::Gate;
  using State = typename R::State;
  using T = typename Gate::Storage;
  using S = typename State::Storage;
  using Sums = RowSums<Gate, 2>;
  __shared__ typename Sums::Shared shared[R::kGroups];
  const int64_t b = int64_t(blockIdx.x) * R::kGroups + R::group();
  const bool there = b < args.B;
  const int D = int(args.D), reads = there ? D : 0, thread = R::thread();
  typename Gate::Raw f, i, d;
  typename State::Raw c;
  const int64_t from = there ? b : 0;
  Gate::load(R::template row<const T>(args.f, from), reads, thread, f);
  Gate::load(R::template row<const T>(args.i, from), reads, thread, i);
  Gate::load(R::template row<const T>(args.d, from), reads, thread, d);
  State::load(R::template row<const S>(args.c0, from), reads, thread, c);
  float u[R::kColumns], weight[R::kColumns], bias[R::kColumns];
#pragma unroll
  for (int k = 0; k < R::kColumns; ++k) {
    float forget, write;
    gate_values<T>(Gate::get(f, k), Gate::get(i, k), Gate::get(d, k), forget, write);
    u[k] = fmaf(forget, State::get(c, k), write);
  }
  const NormParams& norm = args.norm;
  const float2 s =
      R::template statistics<Sums>(u, D, float(norm.eps), typename Sums::Exchange(shared[R::group()], 1 + R::group()));
  Gate::parameter(norm.weight, norm.weight_dtype, 1.0f, D, thread, weight);
  Gate::parameter(norm.bias, norm.bias_dtype, 0.0f, D, thread, bias);
#pragma unroll
  for (int k = 0; k < R::kColumns; ++k) {
    u[k] = clamped(fmaf((u[k] - s.x) * s.y, weight[k], bias[k]), float(norm.clamp_value));
  }
  State::pack(u, c);
  State::store(R::template row<S>(args.c_last, from), reads, thread, c);
}

template <class R, int AHEAD, int BLOCKS>
struct ContextUpdateBackward {
  using Gate = typename R::Gate;
  using State = typename R::State;
  using T = typename Gate::Storage;
  using S = typename State::Storage;
  using Sums = RowSums<Gate, 2>;
  using Exchange = typename Sums::Exchange;
  static constexpr int kColumns = R::kColumns, kThreads = R::kThreads, kGroups = R::kGroups;
  static constexpr int kAhead = AHEAD, kBlocks = BLOCKS;

  struct Waiting {
    typename Gate::Piece gates[3][Gate::PIECES][R::kGroup];
    typename State::Piece states[2][Gate::PIECES][R::kGroup];  // c, grad
  };
  struct Shared {
    Waiting waiting[Gate::ALIGNED ? AHEAD : 1][R::kGroups];
    typename Sums::Shared sums[R::kGroups];
  };
  struct Inputs {
    typename Gate::Raw f, i, d;
    typename State::Raw c, grad;
  };

  static __device__ __forceinline__ void fetch(const ContextBackwardArgs& args, Shared& shared, int64_t b, int at) {
    Waiting& to = shared.waiting[at][R::group()];
    const int D = b < args.B ? int(args.D) : 0, thread = R::thread();  // zeros past the last row
    const int64_t from = b < args.B ? b : 0;
    Gate::copy(to.gates[0][0], R::template row<const T>(args.f, from), D, thread);
    Gate::copy(to.gates[1][0], R::template row<const T>(args.i, from), D, thread);
    Gate::copy(to.gates[2][0], R::template row<const T>(args.d, from), D, thread);
    State::copy(to.states[0][0], R::template row<const S>(args.c0, from), D, thread);
    State::copy(to.states[1][0], R::template row<const S>(args.grad_c_last, from), D, thread);
    copy_async_commit();
  }

  static __device__ __forceinline__ void take(const ContextBackwardArgs& args, Shared& shared, int64_t b, int at,
                                              Inputs& in) {
    const int thread = R::thread();
    if constexpr (Gate::ALIGNED) {
      copy_async_wait<AHEAD - 1>();
      Waiting& from = shared.waiting[at][R::group()];
      Gate::take(from.gates[0][0], thread, in.f);
      Gate::take(from.gates[1][0], thread, in.i);
      Gate::take(from.gates[2][0], thread, in.d);
      State::take(from.states[0][0], thread, in.c);
      State::take(from.states[1][0], thread, in.grad);
    } else {
      const int D = b < args.B ? int(args.D) : 0;
      const int64_t from = b < args.B ? b : 0;
      Gate::load(R::template row<const T>(args.f, from), D, thread, in.f);
      Gate::load(R::template row<const T>(args.i, from), D, thread, in.i);
      Gate::load(R::template row<const T>(args.d, from), D, thread, in.d);
      State::load(R::template row<const S>(args.c0, from), D, thread, in.c);
      State::load(R::template row<const S>(args.grad_c_last, from), D, thread, in.grad);
    }
  }

  struct Gradients {
    float weight[kColumns] = {}, bias[kColumns] = {};
  };

  static __device__ __forceinline__ void one_row(const ContextBackwardArgs& args, const Exchange& exchange, int64_t b,
                                                 const Inputs& in, const float (&weight)[kColumns],
                                                 const float (&bias)[kColumns], Gradients& grads) {
    const int D = int(args.D), thread = R::thread();
    float x[kColumns], of_f[kColumns], of_i[kColumns], of_d[kColumns], forget[kColumns], g[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const float c = State::get(in.c, k);
      const Activation keep = sigmoid_of(Gate::get(in.f, k)), input = sigmoid_of(Gate::get(in.i, k)),
                       delta = tanh_of<T>(Gate::get(in.d, k));
      forget[k] = keep.value;
      of_f[k] = c * keep.slope;
      of_i[k] = delta.value * input.slope;
      of_d[k] = input.value * delta.slope;
      x[k] = fmaf(keep.value, c, input.value * delta.value);
    }
    const float2 s = R::template statistics<Sums>(x, D, float(args.norm.eps), exchange);
    const float clamp = float(args.norm.clamp_value), scale = 1.0f / float(D);
    float products[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      x[k] = (x[k] - s.x) * s.y;
      const float y = fmaf(x[k], weight[k], bias[k]);
      g[k] = y > clamp || y < -clamp ? 0.0f : State::get(in.grad, k);  // 0 past the end of the row, and of rows
      grads.weight[k] = fmaf(g[k], x[k], grads.weight[k]);
      grads.bias[k] += g[k];
      g[k] *= weight[k];
      products[k] = g[k] * x[k];
    }
    const auto total = Sums::sum({tree_sum(g), tree_sum(products)}, exchange, 2);
    if (b >= args.B) return;
    const float mean_g = total.x[0] * scale, mean_gx = total.x[1] * scale;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const float du = fmaf(-x[k], mean_gx, g[k] - mean_g) * s.y;
      of_f[k] *= du, of_i[k] *= du, of_d[k] *= du, forget[k] *= du;
    }
    typename Gate::Raw raw;
    typename State::Raw raw_state;
    Gate::pack(of_f, raw);
    Gate::store(R::template row<T>(args.grad_f, b), D, thread, raw);
    Gate::pack(of_i, raw);
    Gate::store(R::template row<T>(args.grad_i, b), D, thread, raw);
    Gate::pack(of_d, raw);
    Gate::store(R::template row<T>(args.grad_d, b), D, thread, raw);
    State::pack(forget, raw_state);
    State::store(R::template row<S>(args.grad_c0, b), D, thread, raw_state);
  }
};

// `parts` takes the blocks' shares of the gradients of weight and bias, (2, blocks, D).
template <class Backward>
__global__ void __launch_bounds__(Backward::kThreads, Backward::kBlocks)
    context_update_backward_kernel(const __grid_constant__ ContextBackwardArgs args, float* parts) {
  using Gate = typename Backward::Gate;
  constexpr int kAhead = Backward::kAhead, kGroups = Backward::kGroups;
  extern __shared__ __align__(16) unsigned char bytes[];
  typename Backward::Shared& shared = *reinterpret_cast<typename Backward::Shared*>(bytes);
  const int D = int(args.D), thread = threadIdx.x % Gate::kThreads, group = threadIdx.x / Gate::kThreads;
  const int64_t stride = int64_t(gridDim.x) * kGroups, first = int64_t(blockIdx.x) * kGroups;
  float weight[Gate::kColumns], bias[Gate::kColumns];
  Gate::parameter(args.norm.weight, args.norm.weight_dtype, 1.0f, D, thread, weight);
  Gate::parameter(args.norm.bias, args.norm.bias_dtype, 0.0f, D, thread, bias);
  typename Backward::Gradients grads;
  if constexpr (Gate::ALIGNED) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) Backward::fetch(args, shared, first + group + k * stride, k);
  }
  const typename Backward::Exchange exchange(shared.sums[group], 1 + group);
  int at = 0;
  for (int64_t b = first; b < args.B; b += stride) {
    typename Backward::Inputs in;
    Backward::take(args, shared, b + group, at, in);
    if constexpr (Gate::ALIGNED) Backward::fetch(args, shared, b + group + kAhead * stride, at);
    at = at + 1 == kAhead ? 0 : at + 1;
    Backward::one_row(args, exchange, b + group, in, weight, bias, grads);
  }
  if constexpr (Gate::ALIGNED) copy_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(bytes);  // (2, D), over what waited there: groups of the block, in order
  for (int turn = 0; turn < kGroups; ++turn) {
#pragma unroll
    for (int k = 0; k < Gate::kColumns; ++k) {
      const int column = Gate::column_of(thread, k);
      if (group != turn || column >= D) continue;
      sums[column] = (turn == 0 ? 0.0f : sums[column]) + grads.weight[k];
      sums[D + column] = (turn == 0 ? 0.0f : sums[D + column]) + grads.bias[k];
    }
    __syncthreads();
  }
  for (int k = threadIdx.x; k < 2 * D; k += Backward::kThreads) {
    const int which = k / D, column = k % D;
    parts[(int64_t(which) * gridDim.x + blockIdx.x) * D + column] = sums[k];
  }
}

}  // namespace newllm::cuda
