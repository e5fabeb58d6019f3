// Splits a (B, T, D) recurrence into independent tasks: one sequence times one block of columns.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace newllm::cpu::NEWLLM_ISA {

// Columns whose state one task keeps in the first-level cache (4 KiB of float).
inline constexpr int64_t kMaxBlock = 1024;
// A block starts on a cache-line boundary of every storage format, so no line is written by two threads.
inline constexpr int64_t kBlockStep = 64;

struct Task {
  int64_t sequence;  // row of the state tensors
  int64_t batch;     // index into B
  int64_t begin;     // first time step
  int64_t length;
  int64_t d0;  // first column
  int64_t columns;
};

class TaskGrid {
 public:
  explicit TaskGrid(const ScanShape& shape) : shape_(shape) {
    // Whole rows stream best, so columns are cut only until there is a task for every thread.
    block_ = std::min(kMaxBlock, round_up(shape.D));
    const int64_t wanted = thread_count();
    while (block_ > kBlockStep && shape.num_sequences * blocks() < wanted) block_ = round_up(block_ / 2);
  }

  int64_t size() const { return shape_.num_sequences * blocks(); }

  int64_t grain() const {
    const int64_t elements = shape_.B * shape_.T * shape_.D;
    return std::max<int64_t>(1, kElementsPerThread * size() / std::max<int64_t>(1, elements));
  }

  Task operator[](int64_t index) const {
    const int64_t sequence = index / blocks();
    const int64_t d0 = (index % blocks()) * block_;
    const int64_t columns = std::min(block_, shape_.D - d0);
    if (shape_.cu_seqlens == nullptr) return {sequence, sequence, 0, shape_.T, d0, columns};
    const int64_t begin = shape_.cu_seqlens[sequence];
    return {sequence, 0, begin, shape_.cu_seqlens[sequence + 1] - begin, d0, columns};
  }

 private:
  static int64_t round_up(int64_t columns) { return (columns + kBlockStep - 1) / kBlockStep * kBlockStep; }
  int64_t blocks() const { return (shape_.D + block_ - 1) / block_; }

  ScanShape shape_;
  int64_t block_;
};

// A pointer to the row of one time step.
template <class T>
NEWLLM_INLINE T* row(const View3& view, int64_t batch, int64_t t, int64_t d0) {
  return static_cast<T*>(view.data) + batch * view.stride_b + t * view.stride_t + d0;
}

template <class A>
NEWLLM_INLINE void load_state(A* state, const void* source, const Task& task, int64_t D) {
  const A* from = static_cast<const A*>(source) + task.sequence * D + task.d0;
  if (source == nullptr) {
    std::fill_n(state, task.columns, A(0));
  } else {
    std::copy_n(from, task.columns, state);
  }
}

template <class A>
NEWLLM_INLINE void save_state(const A* state, void* target, const Task& task, int64_t D) {
  if (target != nullptr) std::copy_n(state, task.columns, static_cast<A*>(target) + task.sequence * D + task.d0);
}

// Runs kernel.template operator()<T, kStreaming>(task) for the storage type of `shape`, over all tasks in parallel.
template <class Kernel>
void run_tasks(const ScanShape& shape, int64_t outputs, std::initializer_list<View3> written, const Kernel& kernel) {
  const TaskGrid grid(shape);
  const auto typed = [&](auto tag) {
    using T = decltype(tag);
    bool streaming = outputs * shape.B * shape.T * shape.D * int64_t(sizeof(T)) > kStreamingBytes;
    for (const View3& view : written) streaming = streaming && is_aligned<T>(view.data, view.stride_b, view.stride_t);
    parallel_for(grid.size(), grid.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        if (streaming) {
          kernel(grid[index], T{}, std::true_type{});
        } else {
          kernel(grid[index], T{}, std::false_type{});
        }
      }
      if (streaming) finish_streaming();
    });
  };
  switch (shape.dtype) {
    case DType::kFloat32: return typed(float{});
    case DType::kFloat64: return typed(double{});
    case DType::kBFloat16: return typed(bfloat16{});
    case DType::kFloat16: return typed(float16{});
  }
}

}  // namespace newllm::cpu::NEWLLM_ISA
