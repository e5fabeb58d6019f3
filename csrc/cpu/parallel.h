// How kernels spread work over threads without knowing whose threads they are: ops.cpp installs PyTorch's pool,
// a standalone program gets a plain loop.
#pragma once

#include <cstdint>

namespace newllm::cpu {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
using ParallelRunner = void (*)(int64_t count, int64_t grain, RangeFn fn, void* context);

extern ParallelRunner parallel_runner;
extern int64_t (*thread_count)();

// Calls body(begin, end) on disjoint ranges that cover [0, count); a range holds at least `grain` items, so work
// smaller than that stays on the calling thread.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  parallel_runner(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// Below this many elements the cost of waking a thread exceeds the work it would take over.
inline constexpr int64_t kElementsPerThread = 16384;

}  // namespace newllm::cpu
