// Launches of the whole cell: which teams of blocks compute it, and whether they fit.
#include <algorithm>
#include <cmath>

#include "device.h"
#include "kernels.h"
#include "recurrent_backward.cuh"

namespace newllm::cuda {
namespace {

struct TeamPlan {
  int blocks = 0;  // of a team; 0: none fits
  bool cluster = false;
  int teams = 0;  // at once
};

template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int64_t bytes, bool cluster) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess && cluster)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// Blocks that share out D and H in whole tiles, and few enough hidden units and columns for a block's threads.
bool shares_out(int D, int H, int blocks) {
  if (D % (8 * blocks) != 0 || H % (8 * blocks) != 0 || D % 32 != 0 || H % 32 != 0) return false;
  const int Ds = D / blocks, Hs = H / blocks;
  return (Ds == 8 || Ds == 16) && Hs <= kMostUnits;
}

struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute[1];
  LaunchConfig(const TeamPlan& plan, int teams, int64_t shared, cudaStream_t stream) {
    config.gridDim = dim3(unsigned(teams * plan.blocks));
    config.blockDim = dim3(kTeamThreads);
    config.dynamicSmemBytes = size_t(shared);
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = 1;
    if (plan.cluster) {
      attribute[0].id = cudaLaunchAttributeClusterDimension;
      attribute[0].val.clusterDim.x = unsigned(plan.blocks);
      attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
    } else {
      attribute[0].id = cudaLaunchAttributeCooperative;
      attribute[0].val.cooperative = 1;
    }
  }
};

// The smallest team whose matrices fit into its shared memory, as a cluster where there is one that large. Backward
// needs more, so what it takes the forward takes.
TeamPlan make_plan(int D, int H, int device) {
  TeamPlan plan;
  int multiprocessors = 0, most = 0, major = 0, cooperative = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  for (int blocks = 1; blocks <= std::min(multiprocessors, kMostBlocks) && major >= 9; ++blocks) {
    if (!shares_out(D, H, blocks)) continue;
    const int64_t shared = std::max(forward_shared(D, H, blocks), backward_shared(D, H, blocks, blocks <= 16));
    if (shared > most) continue;
    plan.blocks = blocks;
    if (blocks <= 16) {
      const auto kernel = recurrent_backward_kernel<__nv_bfloat16, true>;
      plan.cluster = true;
      LaunchConfig launch(plan, 1, backward_shared(D, H, blocks, true), nullptr);
      int clusters = 0;
      const bool fits = allow_shared(kernel, backward_shared(D, H, blocks, true), true) == cudaSuccess &&
                        cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess;
      cudaGetLastError();  // a refusal is an answer
      plan.teams = clusters;
      if (fits && clusters > 0) return plan;
      plan.cluster = false;
    }
    plan.teams = cooperative ? multiprocessors / blocks : 0;
    if (plan.teams > 0) return plan;
  }
  return TeamPlan{};
}

TeamPlan plan_for(int D, int H, int device) {
  static thread_local struct {
    int D = 0, H = 0, device = -1;
    TeamPlan plan;
  } last;
  if (last.D != D || last.H != H || last.device != device) last = {D, H, device, make_plan(D, H, device)};
  return last.plan;
}

TeamShape team_shape(const RecurrentShape& shape, const TeamPlan& plan) {
  return {int(shape.B),
          int(shape.T),
          int(shape.D),
          int(shape.H),
          plan.blocks,
          int(shape.D) / plan.blocks,
          int(shape.H) / plan.blocks,
          shape.activation};
}

// Rows of all teams at once, in 16-bit numbers of `width` a row, then their sums and flags. Clusters need none of it.
cudaError_t team_memory(const TeamPlan& plan, int teams, int width, const Scratch& scratch, cudaStream_t stream,
                        TeamMemory& memory) {
  memory = {};
  if (plan.cluster) return cudaSuccess;
  const int64_t floats = int64_t(teams) * kRows * (width / 2 + 2 * plan.blocks);
  float* storage = scratch.allocate(scratch.context, floats + int64_t(teams) * plan.blocks);
  memory.data = reinterpret_cast<uint4*>(storage);
  memory.flags = reinterpret_cast<uint32_t*>(storage + floats);
  return cudaSuccess;
}

// The clamp as the storage holds it, and the next smaller number: what marks a cut context (docs/numerics.md).
template <class T>
void marks(double clamp, float& edge, float& below) {
  edge = NAN, below = INFINITY;
  if (!(clamp < INFINITY)) return;
  T stored = T(float(clamp));
  edge = float(stored);
  uint16_t bits;
  static_assert(sizeof(bits) == sizeof(stored));
  memcpy(&bits, &stored, sizeof bits);
  bits -= 1;
  memcpy(&stored, &bits, sizeof bits);
  below = float(stored);
}

// Calls launch(first team, teams, memory) until all rows are computed; clusters wait for each other by themselves.
template <class Launch>
cudaError_t for_teams(const TeamPlan& plan, int64_t B, int width, const Scratch& scratch, cudaStream_t stream,
                      const Launch& launch) {
  const int all = int((B + kRows - 1) / kRows), at_once = plan.cluster ? all : std::min(all, plan.teams);
  TeamMemory memory;
  cudaError_t error = team_memory(plan, at_once, width, scratch, stream, memory);
  for (int first = 0; first < all && error == cudaSuccess; first += at_once) {
    const int teams = std::min(at_once, all - first);
    if (memory.flags) error = cudaMemsetAsync(memory.flags, 0, sizeof(uint32_t) * teams * plan.blocks, stream);
    if (error == cudaSuccess) error = launch(first, teams, memory);
  }
  return error;
}

template <class T, bool kCluster>
cudaError_t launch_forward(const RecurrentArgs& args, const TeamPlan& plan, const Scratch& scratch,
                           cudaStream_t stream) {
  const TeamShape shape = team_shape(args.shape, plan);
  const int64_t shared = forward_shared(shape.D, shape.H, plan.blocks);
  const auto kernel = recurrent_forward_kernel<T, kCluster>;
  const cudaError_t error = allow_shared(kernel, shared, kCluster);
  if (error != cudaSuccess) return error;
  float edge, below;
  marks<T>(args.norm.clamp_value, edge, below);
  return for_teams(plan, shape.B, shape.D + shape.H, scratch, stream, [&](int first, int teams, TeamMemory memory) {
    LaunchConfig launch(plan, teams, shared, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, args, shape, memory, first, below);
  });
}

template <class T, bool kCluster>
cudaError_t launch_backward(const RecurrentBackwardArgs& args, const TeamPlan& plan, const Scratch& scratch,
                            cudaStream_t stream) {
  const TeamShape shape = team_shape(args.shape, plan);
  const int64_t shared = backward_shared(shape.D, shape.H, plan.blocks, kCluster), rows = int64_t(shape.B) * shape.T;
  const auto kernel = recurrent_backward_kernel<T, kCluster>;
  cudaError_t error = allow_shared(kernel, shared, kCluster);
  if (error != cudaSuccess) return error;
  float edge, below;
  marks<T>(args.norm.clamp_value, edge, below);
  float2* statistics = reinterpret_cast<float2*>(scratch.allocate(scratch.context, 2 * std::max<int64_t>(1, rows)));
  if (rows > 0) recurrent_statistics_kernel<T><<<unsigned((rows + 7) / 8), 256, 0, stream>>>(args, shape, statistics);
  return for_teams(plan, shape.B, 3 * shape.D + shape.H, scratch, stream, [&](int first, int teams, TeamMemory memory) {
    LaunchConfig launch(plan, teams, shared, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, args, shape, memory, statistics, first, edge);
  });
}

template <class Body>
cudaError_t with_plan(const RecurrentShape& shape, const Body& body) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const TeamPlan plan = plan_for(int(shape.D), int(shape.H), device);
  if (plan.blocks == 0) return cudaErrorInvalidConfiguration;
  const bool half = shape.dtype == DType::kFloat16;
  if (plan.cluster)
    return half ? body(__half{}, std::true_type{}, plan) : body(__nv_bfloat16{}, std::true_type{}, plan);
  return half ? body(__half{}, std::false_type{}, plan) : body(__nv_bfloat16{}, std::false_type{}, plan);
}

}  // namespace

cudaError_t recurrent_forward(const RecurrentArgs& args, const Scratch& scratch, cudaStream_t stream) {
  return with_plan(args.shape, [&](auto tag, auto cluster, const TeamPlan& plan) {
    return launch_forward<decltype(tag), cluster>(args, plan, scratch, stream);
  });
}

cudaError_t recurrent_backward(const RecurrentBackwardArgs& args, const Scratch& scratch, cudaStream_t stream) {
  return with_plan(args.shape, [&](auto tag, auto cluster, const TeamPlan& plan) {
    return launch_backward<decltype(tag), cluster>(args, plan, scratch, stream);
  });
}

int64_t recurrent_team(int64_t D, int64_t H, int device) {
  const TeamPlan plan = plan_for(int(D), int(H), device);
  return plan.cluster ? -plan.blocks : plan.blocks;
}

int64_t recurrent_teams(int64_t D, int64_t H, int device) { return plan_for(int(D), int(H), device).teams; }

}  // namespace newllm::cuda
