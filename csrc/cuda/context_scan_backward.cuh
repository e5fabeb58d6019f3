// The backward of context_scan: g, the gradient of a context, walks back through time. With u = forget c_{t-1} + write,
// xhat = (u - mean) rstd and the gradient that came from outside:
//
//     g = carry + grad_c_t, 0 where the clamp cut;  grad_weight += g xhat;  grad_bias += g;  g *= weight
//     du = (g - mean(g) - xhat mean(g xhat)) rstd
//     grad_f = du c_{t-1} forget',  grad_i = du delta input',  grad_d = du input delta',  carry = du forget
//
// All but g is known beforehand: the stored contexts say what every step started from. So a step's activations and sums of u
// are computed one step ahead, and four sums, two of this step's g and two of the next u, share one exchange.
#pragma once

#include "cell.cuh"
#include "context_passes.cuh"
#include "row_sums.cuh"

namespace newllm::cuda {

struct ContextScanBackwardRun {
  ContextBackwardArgs args;
  Chunks chunks;
  float edge = 0;              // the least magnitude in storage of what the clamp cut; NaN where nothing is
  float* shares = nullptr;     // (2, B * chunks, D): of the gradients of weight and bias
};

template <class L, int AHEAD, int BLOCKS>
struct ContextScanBackward {
  using T = typename L::Storage;
  using Raw = typename L::Raw;
  using Sums = RowSums<L, 4>;
  using Values = typename Sums::Values;
  static constexpr int kColumns = L::kColumns, kThreads = L::kThreads, kBlocks = BLOCKS;
  static constexpr bool kMarked = sizeof(T) == 2;  // 16-bit contexts say what the clamp cut
  static constexpr int kInputs = 5;

  struct Shared {
    typename L::Piece raw[L::ALIGNED ? AHEAD : 1][kInputs][L::PIECES][kThreads];  // f, i, d, c before, grad_c
    typename Sums::Shared sums;
    int flag;
  };

  struct Row {
    const T *in[kInputs];  // of step 0, but c, which is of the step before it
    int64_t in_step[kInputs];
    T* out[3];  // grad_f, grad_i, grad_d
    int64_t out_step[3];
    const float* c0;
    bool has_grad_c;
    int D, thread;
  };

  struct Walker {
    float weight[kColumns], carry[kColumns], grad_weight[kColumns], grad_bias[kColumns];
    float bias[kMarked ? 1 : kColumns];
    float eps, scale, clamp, edge;
    typename Sums::Exchange exchange;

    explicit __device__ __forceinline__ Walker(const Shared& shared) : exchange(shared.sums) {}
  };

  // Of a step, from its inputs alone. du of f, i, d and of what goes on to the step before are its products with these.
  struct Step {
    float x[kColumns];  // u, then xhat
    float of_f[kColumns], of_i[kColumns], of_d[kColumns], forget[kColumns];
    Raw grad_c;
    float rstd;
  };

  // Where loads are: they go back through time.
  struct Reader {
    const T* next[kInputs];
    int64_t t;   // of the step that is loaded next
    int left;    // steps to be loaded
  };

  static __device__ __forceinline__ Reader reader(const Row& row, int64_t first, int64_t end) {
    Reader reader;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) reader.next[k] = row.in[k] + (end - 1) * row.in_step[k];
    reader.t = end - 1;
    reader.left = int(end - first);
    return reader;
  }

  // Calls load(input, row in memory, its width): there is no context before step 0, and grad_c may be absent.
  template <class Load>
  static __device__ __forceinline__ void next_step(const Row& row, Reader& reader, const Load& load) {
    if (reader.left-- <= 0) return;
#pragma unroll
    for (int k = 0; k < kInputs; ++k) {
      const bool there = k == 3 ? reader.t > 0 : k == 4 ? row.has_grad_c : true;
      load(k, there ? reader.next[k] : reader.next[0], there ? row.D : 0);
      reader.next[k] -= row.in_step[k];
    }
    --reader.t;
  }

  static __device__ __forceinline__ void fetch(Shared& shared, const Row& row, Reader& reader, int at) {
    next_step(row, reader, [&](int k, const T* from, int D) { L::copy(shared.raw[at][k][0], from, D, row.thread); });
    copy_async_commit();
  }

  // The inputs of a step; in aligned rows another starts on its way.
  static __device__ __forceinline__ void take(Shared& shared, const Row& row, Reader& reader, int& at,
                                              Raw (&raw)[kInputs]) {
    if constexpr (L::ALIGNED) {
      copy_async_wait<AHEAD - 1>();
#pragma unroll
      for (int k = 0; k < kInputs; ++k) L::take(shared.raw[at][k][0], row.thread, raw[k]);
      fetch(shared, row, reader, at);
      at = at + 1 == AHEAD ? 0 : at + 1;
    } else {
      next_step(row, reader, [&](int k, const T* from, int D) { L::load(from, D, row.thread, raw[k]); });
    }
  }

  // A bit for each column that the clamp cut.
  static __device__ __forceinline__ uint32_t cut_of(const float (&c)[kColumns], float edge) {
    uint32_t cut = 0;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) cut |= fabsf(c[k]) >= edge ? 1u << k : 0u;
    return cut;
  }

  // Activations of step t; adds its sums of u to `v`. `cut` gets which of the contexts before it the clamp cut.
  static __device__ __forceinline__ void prepare(const Row& row, const Walker& w, int64_t t, const Raw (&raw)[kInputs],
                                                 Step& step, Values& v, uint32_t& cut) {
    float f[kColumns], i[kColumns], d[kColumns], before[kColumns], squares[kColumns];
    L::unpack(raw[0], f), L::unpack(raw[1], i), L::unpack(raw[2], d), L::unpack(raw[3], before);
    cut = kMarked ? cut_of(before, w.edge) : 0;
    if (t == 0) L::load_state(row.c0, row.D, row.thread, before);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const Activation forget = sigmoid_of(f[k]), input = sigmoid_of(i[k]), delta = tanh_of<T>(d[k]);
      step.forget[k] = forget.value;
      step.of_f[k] = before[k] * forget.slope;
      step.of_i[k] = delta.value * input.slope;
      step.of_d[k] = input.value * delta.slope;
      step.x[k] = fmaf(forget.value, before[k], input.value * delta.value);
      squares[k] = step.x[k] * step.x[k];
    }
    step.grad_c = raw[4];
    v.x[2] = tree_sum(step.x);
    v.x[3] = tree_sum(squares);
  }

  // u becomes xhat. Every thread of the row must call.
  static __device__ __forceinline__ void normalise(const Row& row, const Walker& w, const Values& v, Step& step) {
    const float mean = v.x[2] * w.scale;
    float variance = fmaf(-mean, mean, v.x[3] * w.scale);
    step.rstd = rsqrt_fast(variance + w.eps);
    if (variance < mean * mean) [[unlikely]] {  // the mean would eat its digits: from centred squares
      Values squares = {};
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const float from_mean = L::column_of(row.thread, k) < row.D ? step.x[k] - mean : 0.0f;
        squares.x[0] = fmaf(from_mean, from_mean, squares.x[0]);
      }
      variance = Sums::sum(squares, w.exchange, 2).x[0] * w.scale;
      step.rstd = rsqrt_fast(variance + w.eps);
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) step.x[k] = (step.x[k] - mean) * step.rstd;
  }

  // g = carry + grad_c, times weight, and its two sums.
  static __device__ __forceinline__ void gradient(Walker& w, const Step& step, uint32_t cut, float (&g)[kColumns],
                                                  Values& v) {
    float products[kColumns];
    L::unpack(step.grad_c, g);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      g[k] += w.carry[k];
      bool is_cut = cut >> k & 1;
      if constexpr (!kMarked) {
        const float y = fmaf(step.x[k], w.weight[k], w.bias[k]);
        is_cut = y > w.clamp || y < -w.clamp;
      }
      if (is_cut) g[k] = 0.0f;
      w.grad_weight[k] = fmaf(g[k], step.x[k], w.grad_weight[k]);
      w.grad_bias[k] += g[k];
      g[k] *= w.weight[k];
      products[k] = g[k] * step.x[k];
    }
    v.x[0] = tree_sum(g);
    v.x[1] = tree_sum(products);
  }

  // What du gives: the state for the step before, and the step's gradients.
  static __device__ __forceinline__ void hand_back(const Row& row, Walker& w, T* (&out)[3], const Step& step,
                                                   const float (&g)[kColumns], const Values& v, bool final) {
    float du[kColumns], of_gate[kColumns];
    const float mean_g = v.x[0] * w.scale, mean_gx = v.x[1] * w.scale;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      du[k] = fmaf(-step.x[k], mean_gx, g[k] - mean_g) * step.rstd;
      w.carry[k] = du[k] * step.forget[k];
    }
    if (!final) return;
    Raw raw;
#pragma unroll
    for (int n = 0; n < 3; ++n) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        of_gate[k] = du[k] * (n == 0 ? step.of_f[k] : n == 1 ? step.of_i[k] : step.of_d[k]);
      }
      L::pack(of_gate, raw);
      L::store(out[n], row.D, row.thread, raw);
      out[n] -= row.out_step[n];
    }
  }

  // The steps end - 1 .. first.
  static __device__ __forceinline__ void walk(Shared& shared, const Row& row, Walker& w, int64_t first, int64_t end,
                                              bool final) {
    if (first >= end) return;
    Reader reads = reader(row, first, end);
    Raw raw[kInputs];
    Step steps[2];  // this one, and the one before it in time, which comes next: they take turns
    Values v = {};
    uint32_t cut = 0, cut_next = 0;
    if constexpr (kMarked) {
      float c[kColumns];
      L::load(row.in[3] + end * row.in_step[3], row.D, row.thread, raw[3]);  // of step end - 1
      L::unpack(raw[3], c);
      cut = cut_of(c, w.edge);
    }
    if constexpr (L::ALIGNED) {
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) fetch(shared, row, reads, k);
    }
    T* out[3];
#pragma unroll
    for (int n = 0; n < 3; ++n) out[n] = row.out[n] + (end - 1) * row.out_step[n];
    int at = 0;
    take(shared, row, reads, at, raw);
    prepare(row, w, end - 1, raw, steps[0], v, cut_next);
    v = Sums::sum(v, w.exchange, int(end & 1));
    normalise(row, w, v, steps[0]);
    const auto one = [&](int64_t t, Step& step, Step& next) {
      float g[kColumns];
      gradient(w, step, cut, g, v);
      cut = cut_next;
      if (t > first) {
        take(shared, row, reads, at, raw);
        prepare(row, w, t - 1, raw, next, v, cut_next);
      }
      v = Sums::sum(v, w.exchange, int(t & 1));
      hand_back(row, w, out, step, g, v, final);
      if (t > first) normalise(row, w, v, next);
    };
    for (int64_t t = end - 1; t >= first; t -= 2) {
      one(t, steps[0], steps[1]);
      if (t > first) one(t - 1, steps[1], steps[0]);
    }
    if constexpr (L::ALIGNED) copy_async_wait<0>();
  }

  struct Cell {
    const ContextScanBackwardRun& run_;
    Shared& shared;
    Row row_;
    Walker walker;
    int64_t b = 0;

    __device__ __forceinline__ Cell(const ContextScanBackwardRun& run, Shared& shared)
        : run_(run), shared(shared), walker(shared) {
      row_.D = int(run.args.D);
      row_.thread = threadIdx.x;
      const NormParams& norm = run.args.norm;
      L::parameter(norm.weight, norm.weight_dtype, 1.0f, row_.D, row_.thread, walker.weight);
      if constexpr (!kMarked) {
        L::parameter(norm.bias, norm.bias_dtype, 0.0f, row_.D, row_.thread, walker.bias);
      }
      walker.eps = float(norm.eps);
      walker.scale = 1.0f / float(row_.D);
      walker.clamp = float(norm.clamp_value);
      walker.edge = run.edge;
    }

    __device__ __forceinline__ void row(int64_t b_) {
      b = b_;
      const ContextBackwardArgs& args = run_.args;
      const View3* const in[kInputs] = {&args.f, &args.i, &args.d, &args.c, &args.grad_c};
      const View3* const out[3] = {&args.grad_f, &args.grad_i, &args.grad_d};
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
        row_.in[k] = static_cast<const T*>(in[k]->data) + b * in[k]->stride_b - (k == 3 ? in[k]->stride_t : 0);
        row_.in_step[k] = in[k]->stride_t;
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        row_.out[k] = static_cast<T*>(out[k]->data) + b * out[k]->stride_b;
        row_.out_step[k] = out[k]->stride_t;
      }
      row_.c0 = static_cast<const float*>(args.c0.data) + b * args.c0.stride_b;
      row_.has_grad_c = args.grad_c.data != nullptr;
    }

    // Chunks are counted from the end of time.
    __device__ __forceinline__ void begin(const float* state, int chunk) {
      if (state == nullptr && chunk == 0 && run_.args.grad_c_last.data != nullptr) {
        state = static_cast<const float*>(run_.args.grad_c_last.data) + b * run_.args.grad_c_last.stride_b;
      }
      L::load_state(state, state == nullptr ? 0 : row_.D, row_.thread, walker.carry);
    }

    __device__ __forceinline__ void run(int chunk, bool final) {
      const int64_t end = run_.args.T - chunk * run_.chunks.steps, from = end - run_.chunks.steps;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) walker.grad_weight[k] = walker.grad_bias[k] = 0.0f;
      walk(shared, row_, walker, from > 0 ? from : 0, end, final);
      if (!final) return;
      const int64_t parts = run_.chunks.B * run_.chunks.chunks, part = b * run_.chunks.chunks + chunk;
      L::store_state(run_.shares + part * row_.D, row_.D, row_.thread, walker.grad_weight);
      L::store_state(run_.shares + (parts + part) * row_.D, row_.D, row_.thread, walker.grad_bias);
    }

    __device__ __forceinline__ float change(const float* old) {
      return change_of<L, Sums>(walker.carry, old, row_.D, row_.thread, walker.exchange);
    }

    __device__ __forceinline__ void keep(float* state) { L::store_state(state, row_.D, row_.thread, walker.carry); }

    __device__ __forceinline__ void end() { keep(static_cast<float*>(run_.args.grad_c0.data) + b * row_.D); }
  };
};

template <class Backward>
__global__ void __launch_bounds__(Backward::kThreads, Backward::kBlocks)
    context_scan_backward_kernel(const __grid_constant__ ContextScanBackwardRun run) {
  extern __shared__ __align__(16) unsigned char bytes[];
  typename Backward::Shared& shared = *reinterpret_cast<typename Backward::Shared*>(bytes);
  typename Backward::Cell cell(run, shared);
  walk_chunks(run.chunks, cell, shared.flag);
}

}  // namespace newllm::cuda
