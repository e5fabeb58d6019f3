// c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t) and its backward (recurrence.cuh), activations computed in both.
// The tiles are the fastest of those measured on an H100 (docs/performance.md).
#include "recurrence_launch.cuh"

namespace newllm::cuda {
namespace {

using Forward16 = Tiles<16, 8, 2, 16, 8, 3>;
using Forward32 = Tiles<8, 8, 2, 8, 8, 3>;
using Backward16 = Tiles<8, 8, 2, 8, 8, 3>;
using Backward32 = Tiles<4, 8, 2, 4, 8, 3>;

}  // namespace

int64_t gated_scan_shared_memory() {
  return most(kSharedMemory<GatedForward, Forward16, Forward32>, kSharedMemory<GatedBackward, Backward16, Backward32>);
}

cudaError_t gated_scan_forward(const GatedScanArgs& args, const Scratch& scratch, cudaStream_t stream) {
  RecurrenceArgs run = recurrence_args(args.shape);
  run.in[0] = args.f;
  run.in[1] = args.i;
  run.in[2] = args.d;
  run.out[0] = args.c;
  run.start = static_cast<const float*>(args.c0);
  run.last = static_cast<float*>(args.c_last);
  return run_recurrence<GatedForward, Forward16, Forward32>(run, args.shape, scratch, stream);
}

cudaError_t gated_scan_backward(const GatedScanBackwardArgs& args, const Scratch& scratch, cudaStream_t stream) {
  RecurrenceArgs run = recurrence_args(args.shape);
  run.in[0] = args.grad_c;
  run.in[1] = args.f;
  run.in[2] = args.i;
  run.in[3] = args.d;
  run.in[4] = args.c;
  run.out[0] = args.grad_f;
  run.out[1] = args.grad_i;
  run.out[2] = args.grad_d;
  run.start = static_cast<const float*>(args.grad_c_last);
  run.edge = static_cast<const float*>(args.c0);
  run.last = static_cast<float*>(args.grad_c0);
  run.from_end = true;
  return run_recurrence<GatedBackward, Backward16, Backward32>(run, args.shape, scratch, stream);
}

}  // namespace newllm::cuda
