// Linear recurrence h_t = a_t h_{t-1} + b_t and its adjoint. A task walks one sequence row by row with its state in
// the first-level cache: inputs are read once, in address order, and outputs written once.
#include "sequences.h"

namespace newllm::cpu::NEWLLM_ISA {

void scan_forward(const ScanArgs& args) {
  const int64_t D = args.shape.D;
  run_tasks(args.shape, 1, {args.h}, [&](const Task& task, auto tag, auto streaming) {
    using T = decltype(tag);
    using A = acc_t<T>;
    alignas(NEWLLM_VECTOR_BYTES) A state[kMaxBlock];
    load_state(state, args.h0, task, D);
    for (int64_t step = 0; step < task.length; ++step) {
      const int64_t t = task.begin + (args.reverse ? task.length - 1 - step : step);
      const T* a = row<const T>(args.a, task.batch, t, task.d0);
      const T* b = row<const T>(args.b, task.batch, t, task.d0);
      T* h = row<T>(args.h, task.batch, t, task.d0);
      for_vectors<A>(task.columns, [&](int64_t k, auto full, int64_t n) {
        const Vec<A> next = load_if(full, a + k, n) * load_if(full, state + k, n) + load_if(full, b + k, n);
        store_if<false>(full, state + k, next, n);
        store_if<streaming.value>(full, h + k, next, n);
      });
    }
    save_state(state, args.h_last, task, D);
  });
}

// The adjoint runs against the direction of the forward scan: g_t = grad_h_t + a_{t+1} g_{t+1}, then
// grad_b_t = g_t and grad_a_t = g_t h_{t-1}. `state` holds a_{t+1} g_{t+1}.
void scan_backward(const ScanBackwardArgs& args) {
  const int64_t D = args.shape.D;
  run_tasks(args.shape, 2, {args.grad_a, args.grad_b}, [&](const Task& task, auto tag, auto streaming) {
    using T = decltype(tag);
    using A = acc_t<T>;
    alignas(NEWLLM_VECTOR_BYTES) A state[kMaxBlock];
    alignas(NEWLLM_VECTOR_BYTES) A start[kMaxBlock];
    load_state(state, args.grad_h_last, task, D);
    load_state(start, args.h0, task, D);
    const int64_t towards_start = args.reverse ? 1 : -1;
    for (int64_t step = task.length - 1; step >= 0; --step) {
      const int64_t t = task.begin + (args.reverse ? task.length - 1 - step : step);
      const T* a = row<const T>(args.a, task.batch, t, task.d0);
      const T* grad_h = args.grad_h.data ? row<const T>(args.grad_h, task.batch, t, task.d0) : nullptr;
      const T* before = step > 0 ? row<const T>(args.h, task.batch, t + towards_start, task.d0) : nullptr;
      T* grad_a = row<T>(args.grad_a, task.batch, t, task.d0);
      T* grad_b = row<T>(args.grad_b, task.batch, t, task.d0);
      for_vectors<A>(task.columns, [&](int64_t k, auto full, int64_t n) {
        Vec<A> g = load_if(full, state + k, n);
        if (grad_h != nullptr) g += load_if(full, grad_h + k, n);
        const Vec<A> h = before != nullptr ? load_if(full, before + k, n) : load_if(full, start + k, n);
        store_if<false>(full, state + k, load_if(full, a + k, n) * g, n);
        store_if<streaming.value>(full, grad_b + k, g, n);
        store_if<streaming.value>(full, grad_a + k, g * h, n);
      });
    }
    save_state(state, args.grad_h0, task, D);
  });
}

}  // namespace newllm::cpu::NEWLLM_ISA
