// c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t) and its adjoint. Activations live in registers only: the
// backward computes them again from the pre-activations instead of reading them from memory.
#include "gates.h"
#include "sequences.h"

namespace newllm::cpu::NEWLLM_ISA {

void gated_scan_forward(const GatedScanArgs& args) {
  const int64_t D = args.shape.D;
  run_tasks(args.shape, 1, {args.c}, [&](const Task& task, auto tag, auto streaming) {
    using T = decltype(tag);
    using A = acc_t<T>;
    alignas(NEWLLM_VECTOR_BYTES) A state[kMaxBlock];
    load_state(state, args.c0, task, D);
    for (int64_t t = task.begin; t < task.begin + task.length; ++t) {
      const T* f = row<const T>(args.f, task.batch, t, task.d0);
      const T* i = row<const T>(args.i, task.batch, t, task.d0);
      const T* d = row<const T>(args.d, task.batch, t, task.d0);
      T* c = row<T>(args.c, task.batch, t, task.d0);
      for_vectors<A>(task.columns, [&](int64_t k, auto full, int64_t n) {
        const Vec<A> keep = sigmoid(load_if(full, f + k, n)).value;
        const Vec<A> write = gated_write(load_if(full, i + k, n), load_if(full, d + k, n));
        const Vec<A> next = keep * load_if(full, state + k, n) + write;
        store_if<false>(full, state + k, next, n);
        store_if<streaming.value>(full, c + k, next, n);
      });
    }
    save_state(state, args.c_last, task, D);
  });
}

// g_t = grad_c_t + sigmoid(f_{t+1}) g_{t+1}; `state` holds the second term.
void gated_scan_backward(const GatedScanBackwardArgs& args) {
  const int64_t D = args.shape.D;
  const auto written = {args.grad_f, args.grad_i, args.grad_d};
  run_tasks(args.shape, 3, written, [&](const Task& task, auto tag, auto streaming) {
    using T = decltype(tag);
    using A = acc_t<T>;
    alignas(NEWLLM_VECTOR_BYTES) A state[kMaxBlock];
    alignas(NEWLLM_VECTOR_BYTES) A start[kMaxBlock];
    load_state(state, args.grad_c_last, task, D);
    load_state(start, args.c0, task, D);
    for (int64_t t = task.begin + task.length - 1; t >= task.begin; --t) {
      const T* f = row<const T>(args.f, task.batch, t, task.d0);
      const T* i = row<const T>(args.i, task.batch, t, task.d0);
      const T* d = row<const T>(args.d, task.batch, t, task.d0);
      const T* grad_c = args.grad_c.data ? row<const T>(args.grad_c, task.batch, t, task.d0) : nullptr;
      const T* before = t > task.begin ? row<const T>(args.c, task.batch, t - 1, task.d0) : nullptr;
      T* grad_f = row<T>(args.grad_f, task.batch, t, task.d0);
      T* grad_i = row<T>(args.grad_i, task.batch, t, task.d0);
      T* grad_d = row<T>(args.grad_d, task.batch, t, task.d0);
      for_vectors<A>(task.columns, [&](int64_t k, auto full, int64_t n) {
        Vec<A> g = load_if(full, state + k, n);
        if (grad_c != nullptr) g += load_if(full, grad_c + k, n);
        const Vec<A> c = before != nullptr ? load_if(full, before + k, n) : load_if(full, start + k, n);
        const Activation<Vec<A>> forget = sigmoid(load_if(full, f + k, n));
        const Activation<Vec<A>> input = sigmoid(load_if(full, i + k, n));
        const Activation<Vec<A>> delta = tanh(load_if(full, d + k, n));
        store_if<false>(full, state + k, forget.value * g, n);
        store_if<streaming.value>(full, grad_f + k, g * c * forget.slope, n);
        store_if<streaming.value>(full, grad_i + k, g * delta.value * input.slope, n);
        store_if<streaming.value>(full, grad_d + k, g * input.value * delta.slope, n);
      });
    }
    save_state(state, args.grad_c0, task, D);
  });
}

}  // namespace newllm::cpu::NEWLLM_ISA
