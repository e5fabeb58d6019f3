// Launches of context_update.cuh, backward.
#include "context_update_launch.cuh"
#include "sum_parts.cuh"

namespace newllm::cuda {
namespace {

template <class R>
cudaError_t run_backward(const ContextBackwardArgs& args, const Scratch& scratch, cudaStream_t stream) {
  using Backward = ContextUpdateBackward<R, 2, R::kThreads == 256 ? 2 : 1>;
  constexpr auto kKernel = context_update_backward_kernel<Backward>;
  // Inputs on their way, and afterwards a block's gradients of weight and bias.
  constexpr size_t kWaiting = sizeof(typename Backward::Shared);
  constexpr size_t kGradients = 2 * sizeof(float) * R::kGroup * R::kColumns;
  constexpr size_t kShared = kWaiting > kGradients ? kWaiting : kGradients;
  Device device;
  int64_t resident = 0;
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) error = allow_shared_memory<kKernel>(device.index, kShared);
  if (error == cudaSuccess) error = blocks_at_a_time<kKernel, R::kThreads>(device, kShared, resident);
  if (error != cudaSuccess) return error;
  const int64_t blocks = least((args.B + R::kGroups - 1) / R::kGroups, resident);
  float* parts = scratch.allocate(scratch.context, 2 * blocks * args.D);
  kKernel<<<static_cast<unsigned>(blocks), R::kThreads, kShared, stream>>>(args, parts);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return sum_parts(parts, blocks, args.D, args.grad_weight, args.grad_bias, stream);
}

template <class T, class S>
cudaError_t run_wide(const ContextBackwardArgs& args, const Scratch& scratch, cudaStream_t stream) {
  constexpr auto kKernel = context_update_wide_backward_kernel<T, S>;
  Device device;
  cudaError_t error = current_device(device);
  const int64_t each = kWideBackwardRows * int64_t(sizeof(float));
  const int64_t widest = context_update_max_width(device.index) * each;
  if (error == cudaSuccess) error = allow_shared_memory<kKernel>(device.index, size_t(widest));
  if (error != cudaSuccess) return error;
  const int64_t blocks = least(args.B, 4 * device.multiprocessors);
  float* parts = scratch.allocate(scratch.context, 2 * blocks * args.D);
  kKernel<<<static_cast<unsigned>(blocks), kWideThreads, args.D * each, stream>>>(args, parts);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return sum_parts(parts, blocks, args.D, args.grad_weight, args.grad_bias, stream);
}

}  // namespace

cudaError_t context_update_backward(const ContextBackwardArgs& args, const Scratch& scratch, cudaStream_t stream) {
  if (args.B == 0) return clear_gradients(args.grad_weight, args.grad_bias, args.D, stream);
  return for_dtypes(args.dtype, args.state_dtype, [&](auto tag, auto state_tag) {
    using T = decltype(tag);
    using S = decltype(state_tag);
    if (args.D > kWidestInRegisters) return run_wide<T, S>(args, scratch, stream);
    const bool whole = rows_whole<T, S>(args.D, {&args.f, &args.i, &args.d, &args.grad_f, &args.grad_i, &args.grad_d},
                                        {&args.c0, &args.grad_c_last, &args.grad_c0});
    const auto run = [&](auto row) { return run_backward<decltype(row)>(args, scratch, stream); };
    return whole ? for_row<T, S, true>(args.D, run) : for_row<T, S, false>(args.D, run);
  });
}

}  // namespace newllm::cuda
