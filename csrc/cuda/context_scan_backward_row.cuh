// What the two kernels of context_scan's backward have in common: a row, its inputs on their way back through time, a
// step's activations, and the gradient of a context.
//
// With u = forget c_{t-1} + write, xhat = (u - mean) rstd and g the gradient of c_t:
//
//     g = carry + grad_c_t, 0 where the clamp cut;  grad_weight += g xhat;  grad_bias += g;  g *= weight
//     du = (g - mean(g) - xhat mean(g xhat)) rstd
//     grad_f = du c_{t-1} forget',  grad_i = du delta input',  grad_d = du input delta',  carry = du forget
//
// All but g is known beforehand: the stored contexts say what every step started from.
#pragma once

#include "cell.cuh"
#include "context_passes.cuh"
#include "row_sums.cuh"

namespace newllm::cuda {

struct ContextScanBackwardRun {
  ContextBackwardArgs args;
  Chunks chunks;
  float edge = 0;           // the least magnitude in storage of what the clamp cut; NaN where nothing is
  float* shares = nullptr;  // (2, B * chunks, D): of the gradients of weight and bias
};

template <class L>
struct BackwardRow {
  using T = typename L::Storage;
  using Raw = typename L::Raw;
  static constexpr int kColumns = L::kColumns;
  static constexpr bool kMarked = sizeof(T) == 2;  // 16-bit contexts say what the clamp cut
  static constexpr int kInputs = 5;                // f, i, d, c before, grad_c

  const T* in[kInputs];  // of step 0, but c, which is of the step before it
  int64_t in_step[kInputs];
  T* out[3];  // grad_f, grad_i, grad_d
  int64_t out_step[3];
  const float* c0;
  bool has_grad_c;
  int D, thread;

  __device__ __forceinline__ void set(const ContextBackwardArgs& args, int64_t b) {
    const View3* const ins[kInputs] = {&args.f, &args.i, &args.d, &args.c, &args.grad_c};
    const View3* const outs[3] = {&args.grad_f, &args.grad_i, &args.grad_d};
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      in[k] = static_cast<const T*>(ins[k]->data) + b * ins[k]->stride_b - (k == 3 ? ins[k]->stride_t : 0);
      in_step[k] = ins[k]->stride_t;
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      out[k] = static_cast<T*>(outs[k]->data) + b * outs[k]->stride_b;
      out_step[k] = outs[k]->stride_t;
    }
    c0 = static_cast<const float*>(args.c0.data) + b * args.c0.stride_b;
    has_grad_c = args.grad_c.data != nullptr;
  }

  // A bit for each column that the clamp cut.
  static __device__ __forceinline__ uint32_t cut_of(const float (&c)[kColumns], float edge) {
    uint32_t cut = 0;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) cut |= fabsf(c[k]) >= edge ? 1u << k : 0u;
    return cut;
  }

  // Of the contexts of step t.
  __device__ __forceinline__ uint32_t cut_at(int64_t t, float edge) const {
    if constexpr (!kMarked) return 0;
    Raw raw;
    float c[kColumns];
    L::load(in[3] + (t + 1) * in_step[3], D, thread, raw);
    L::unpack(raw, c);
    return cut_of(c, edge);
  }
};

// Where the loads of a row are: they go back through time.
template <class L>
struct BackwardReader {
  using Row = BackwardRow<L>;
  const typename L::Storage* next[Row::kInputs];
  int64_t t;  // of the step that is loaded next
  int left;   // steps to be loaded

  __device__ __forceinline__ BackwardReader(const Row& row, int64_t t, int left) : t(t), left(left) {
#pragma unroll
    for (int k = 0; k < Row::kInputs; ++k) next[k] = row.in[k] + t * row.in_step[k];
  }

  // Calls load(input, row in memory, its width): there is no context before step 0, and grad_c may be absent.
  template <class Load>
  __device__ __forceinline__ void step(const Row& row, const Load& load) {
    if (left-- <= 0) return;
#pragma unroll
    for (int k = 0; k < Row::kInputs; ++k) {
      const bool there = k == 3 ? t > 0 : k == 4 ? row.has_grad_c : true;
      load(k, there ? next[k] : next[0], there ? row.D : 0);
      next[k] -= row.in_step[k];
    }
    --t;
  }
};

// Of a step, from its inputs alone. Gradients of f, i, d and of the context before it are du times these.
template <class L>
struct BackwardStep {
  static constexpr int kColumns = L::kColumns;
  float x[kColumns];  // u, then xhat
  float of_f[kColumns], of_i[kColumns], of_d[kColumns], forget[kColumns];
  typename L::Raw grad_c;

  // Sums of u and u^2 over the thread's columns. `cut` gets which of the contexts before step t the clamp cut.
  __device__ __forceinline__ float2 prepare(const BackwardRow<L>& row, float edge, int64_t t,
                                            const typename L::Raw (&raw)[BackwardRow<L>::kInputs], uint32_t& cut) {
    float f[kColumns], i[kColumns], d[kColumns], before[kColumns], squares[kColumns];
    L::unpack(raw[0], f), L::unpack(raw[1], i), L::unpack(raw[2], d), L::unpack(raw[3], before);
    cut = BackwardRow<L>::kMarked ? BackwardRow<L>::cut_of(before, edge) : 0;
    if (t == 0) L::load_state(row.c0, row.D, row.thread, before);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const Activation keep = sigmoid_of(f[k]), input = sigmoid_of(i[k]), delta = tanh_of<typename L::Storage>(d[k]);
      forget[k] = keep.value;
      of_f[k] = before[k] * keep.slope;
      of_i[k] = delta.value * input.slope;
      of_d[k] = input.value * delta.slope;
      x[k] = fmaf(keep.value, before[k], input.value * delta.value);
      squares[k] = x[k] * x[k];
    }
    grad_c = raw[4];
    return {tree_sum(x), tree_sum(squares)};
  }

  // u becomes xhat, from its sums over the row; returns 1 / standard deviation. Every thread of the row must call.
  template <class Sums>
  __device__ __forceinline__ float normalise(const BackwardRow<L>& row, float scale, float eps, float2 total,
                                             const typename Sums::Exchange& exchange) {
    const float mean = total.x * scale, variance = fmaf(-mean, mean, total.y * scale);
    float rstd = rsqrt_fast(variance + eps);
    if (variance < mean * mean) [[unlikely]] {  // the mean would eat its digits: from centred squares
      typename Sums::Values squares = {};
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const float from_mean = L::column_of(row.thread, k) < row.D ? x[k] - mean : 0.0f;
        squares.x[0] = fmaf(from_mean, from_mean, squares.x[0]);
      }
      rstd = rsqrt_fast(Sums::sum(squares, exchange, 2).x[0] * scale + eps);
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) x[k] = (x[k] - mean) * rstd;
    return rstd;
  }
};

// What a thread carries back through time, and its columns' share of the gradients of weight and bias.
template <class L>
struct BackwardState {
  static constexpr int kColumns = L::kColumns;
  static constexpr bool kMarked = BackwardRow<L>::kMarked;
  float weight[kColumns], carry[kColumns], grad_weight[kColumns], grad_bias[kColumns];
  float bias[kMarked ? 1 : kColumns];
  float eps, scale, clamp, edge;

  __device__ __forceinline__ void set(const ContextScanBackwardRun& run, int thread) {
    const NormParams& norm = run.args.norm;
    const int D = int(run.args.D);
    L::parameter(norm.weight, norm.weight_dtype, 1.0f, D, thread, weight);
    if constexpr (!kMarked) L::parameter(norm.bias, norm.bias_dtype, 0.0f, D, thread, bias);
    eps = float(norm.eps);
    scale = 1.0f / float(D);
    clamp = float(norm.clamp_value);
    edge = run.edge;
  }

  // g = carry + grad_c, times weight; returns the sums of g and g xhat over the thread's columns.
  __device__ __forceinline__ float2 gradient(const typename L::Raw& grad_c, const float (&xhat)[kColumns], uint32_t cut,
                                             float (&g)[kColumns]) {
    float products[kColumns];
    L::unpack(grad_c, g);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      g[k] += carry[k];
      bool is_cut = cut >> k & 1;
      if constexpr (!kMarked) {
        const float y = fmaf(xhat[k], weight[k], bias[k]);
        is_cut = y > clamp || y < -clamp;
      }
      if (is_cut) g[k] = 0.0f;
      grad_weight[k] = fmaf(g[k], xhat[k], grad_weight[k]);
      grad_bias[k] += g[k];
      g[k] *= weight[k];
      products[k] = g[k] * xhat[k];
    }
    return {tree_sum(g), tree_sum(products)};
  }
};

// A block's way through chunks, which are counted from the end of time; Walk is the kernel's own.
template <class L, class Sums, class Walk>
struct BackwardCell {
  const ContextScanBackwardRun& run_;
  Walk walk;
  BackwardRow<L> row_;
  BackwardState<L> state;
  int64_t b = 0;

  template <class Shared>
  __device__ __forceinline__ BackwardCell(const ContextScanBackwardRun& run, Shared& shared) : run_(run), walk(shared) {
    row_.D = int(run.args.D);
    row_.thread = threadIdx.x % L::kThreads;
    state.set(run, row_.thread);
  }

  __device__ __forceinline__ void row(int64_t b_) {
    b = b_;
    row_.set(run_.args, b);
  }

  __device__ __forceinline__ void begin(const float* from, int chunk) {
    if (from == nullptr && chunk == 0 && run_.args.grad_c_last.data != nullptr) {
      from = static_cast<const float*>(run_.args.grad_c_last.data) + b * run_.args.grad_c_last.stride_b;
    }
    L::load_state(from, from == nullptr ? 0 : row_.D, row_.thread, state.carry);
  }

  __device__ __forceinline__ void run(int chunk, bool final) {
    const int64_t end = run_.args.T - chunk * run_.chunks.steps, from = end - run_.chunks.steps;
#pragma unroll
    for (int k = 0; k < L::kColumns; ++k) state.grad_weight[k] = state.grad_bias[k] = 0.0f;
    walk(row_, state, from > 0 ? from : 0, end, final);
    if (!final) return;
    const int64_t parts = run_.chunks.B * run_.chunks.chunks, part = b * run_.chunks.chunks + chunk;
    L::store_state(run_.shares + part * row_.D, row_.D, row_.thread, state.grad_weight);
    L::store_state(run_.shares + (parts + part) * row_.D, row_.D, row_.thread, state.grad_bias);
  }

  __device__ __forceinline__ float change(const float* old) {
    return change_of<L, Sums>(state.carry, old, row_.D, row_.thread, walk.exchange);
  }

  __device__ __forceinline__ void keep(float* to) { L::store_state(to, row_.D, row_.thread, state.carry); }

  __device__ __forceinline__ void end() { keep(static_cast<float*>(run_.args.grad_c0.data) + b * row_.D); }
};

}  // namespace newllm::cuda
