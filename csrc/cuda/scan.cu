// h_t = a_t h_{t-1} + b_t and its backward (recurrence.cuh). The tiles are the fastest of those measured on an H100
// (docs/performance.md).
#include "recurrence_launch.cuh"

namespace newllm::cuda {
namespace {

using Forward16 = Tiles<8, 8, 3, 16, 12, 3>;
using Forward32 = Tiles<8, 8, 2, 8, 12, 3>;
using Backward16 = Tiles<12, 8, 2, 16, 8, 3>;
using Backward32 = Tiles<8, 8, 2, 4, 16, 3>;

}  // namespace

int64_t scan_shared_memory() {
  return most(kSharedMemory<ScanForward, Forward16, Forward32>, kSharedMemory<ScanBackward, Backward16, Backward32>);
}

cudaError_t scan_forward(const ScanArgs& args, const Scratch& scratch, cudaStream_t stream) {
  RecurrenceArgs run = recurrence_args(args.shape);
  run.in[0] = args.a;
  run.in[1] = args.b;
  run.out[0] = args.h;
  run.start = static_cast<const float*>(args.h0);
  run.last = static_cast<float*>(args.h_last);
  run.from_end = args.reverse;
  return run_recurrence<ScanForward, Forward16, Forward32>(run, args.shape, scratch, stream);
}

cudaError_t scan_backward(const ScanBackwardArgs& args, const Scratch& scratch, cudaStream_t stream) {
  RecurrenceArgs run = recurrence_args(args.shape);
  run.in[0] = args.grad_h;
  run.in[1] = args.a;
  run.in[2] = args.h;
  run.out[0] = args.grad_a;
  run.out[1] = args.grad_b;
  run.start = static_cast<const float*>(args.grad_h_last);
  run.edge = static_cast<const float*>(args.h0);
  run.last = static_cast<float*>(args.grad_h0);
  run.from_end = !args.reverse;
  return run_recurrence<ScanBackward, Backward16, Backward32>(run, args.shape, scratch, stream);
}

}  // namespace newllm::cuda
