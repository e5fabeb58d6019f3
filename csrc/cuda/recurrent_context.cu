// Launches of the whole cell: which teams of blocks compute it, and whether they fit.
#include <algorithm>
#include <cmath>

#include "device.h"
#include "kernels.h"
#include "recurrent_cluster_backward.cuh"
#include "recurrent_mesh_backward.cuh"

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

// Clusters of a mesh for these widths, and how many meshes run at once; 0 where none does.
struct MeshPlan {
  int groups = 0, teams = 0;
};

template <int kGroups>
cudaLaunchConfig_t mesh_config(int teams, cudaStream_t stream, cudaLaunchAttribute (&attribute)[2]) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(teams * kGroups * kMembers));
  config.blockDim = dim3(kTeamThreads);
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = 2;
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim.x = kMembers;
  attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
  attribute[1].id = cudaLaunchAttributeCooperative;
  attribute[1].val.cooperative = 1;
  return config;
}

template <class Body>
auto with_groups(int groups, const Body& body) {
  return groups == 8 ? body(std::integral_constant<int, 8>{}) : body(std::integral_constant<int, 12>{});
}

MeshPlan make_mesh(int D, int H, int device) {
  int cooperative = 0, major = 0, clusters = 0;
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  const int groups = D / kGroupColumns;
  if (!cooperative || major < 9 || D % kGroupColumns != 0 || H != 2 * D || (groups != 8 && groups != 12)) return {};
  const bool fits = with_groups(groups, [&](auto count) {
    cudaLaunchAttribute attribute[2];
    const cudaLaunchConfig_t config = mesh_config<count>(1, nullptr, attribute);
    return cudaOccupancyMaxActiveClusters(&clusters, recurrent_mesh_backward_kernel<__nv_bfloat16, count>, &config) ==
           cudaSuccess;
  });
  cudaGetLastError();  // a refusal is an answer
  return fits && clusters >= groups ? MeshPlan{groups, clusters / groups} : MeshPlan{};
}

struct Plans {
  TeamPlan team;
  MeshPlan mesh;
};

Plans plans_for(int D, int H, int device) {
  static thread_local struct {
    int D = 0, H = 0, device = -1;
    Plans plans;
  } last;
  if (last.D != D || last.H != H || last.device != device) {
    last = {D, H, device, {make_plan(D, H, device), make_mesh(D, H, device)}};
  }
  return last.plans;
}

// A mesh takes some 0.6 of a team's time; where more teams run at once there may be fewer turns of these.
bool takes_mesh(const Plans& plans, int64_t B) {
  const auto turns = [&](int teams) { return (B + kRows * teams - 1) / (kRows * teams); };
  return plans.mesh.teams > 0 && turns(plans.mesh.teams) <= turns(plans.team.teams);
}

// Pairs of neighbours are read and written in one piece.
bool in_pairs(const View3& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 4 == 0 && view.stride_b % 2 == 0 && view.stride_t % 2 == 0;
}

// Clusters of which every block has 16 columns and 32 units, for eight warps that hear one or two blocks each.
bool takes_cluster(const TeamPlan& plan, const RecurrentShape& shape) {
  return plan.cluster && (plan.blocks == 8 || plan.blocks == 16) && shape.D == plan.blocks * kBlockColumns &&
         shape.H == plan.blocks * kBlockUnits;
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

template <class T>
float2* recurrent_statistics(const RecurrentBackwardArgs& args, const TeamShape& shape, const Scratch& scratch,
                             cudaStream_t stream) {
  const int64_t rows = int64_t(shape.B) * shape.T;
  float2* statistics = reinterpret_cast<float2*>(scratch.allocate(scratch.context, 2 * std::max<int64_t>(1, rows)));
  if (rows > 0) recurrent_statistics_kernel<T><<<unsigned((rows + 7) / 8), 256, 0, stream>>>(args, shape, statistics);
  return statistics;
}

template <class T, bool kCluster>
cudaError_t launch_backward(const RecurrentBackwardArgs& args, const TeamPlan& plan, const Scratch& scratch,
                            cudaStream_t stream) {
  const TeamShape shape = team_shape(args.shape, plan);
  const int64_t shared = backward_shared(shape.D, shape.H, plan.blocks, kCluster);
  const auto kernel = recurrent_backward_kernel<T, kCluster>;
  cudaError_t error = allow_shared(kernel, shared, kCluster);
  if (error != cudaSuccess) return error;
  float edge, below;
  marks<T>(args.norm.clamp_value, edge, below);
  const float2* statistics = recurrent_statistics<T>(args, shape, scratch, stream);
  return for_teams(plan, shape.B, 3 * shape.D + shape.H, scratch, stream, [&](int first, int teams, TeamMemory memory) {
    LaunchConfig launch(plan, teams, shared, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, args, shape, memory, statistics, first, edge);
  });
}

template <class T, int kBlocks>
cudaError_t launch_cluster(const RecurrentArgs& args, const TeamPlan& plan, cudaStream_t stream) {
  float edge, below;
  marks<T>(args.norm.clamp_value, edge, below);
  const MeshShape shape = {int(args.shape.B), int(args.shape.T), args.shape.activation};
  const auto kernel = recurrent_cluster_forward_kernel<T, kBlocks>;
  const cudaError_t error = allow_shared(kernel, sizeof(ClusterMemory<kBlocks>), true);
  if (error != cudaSuccess || shape.B == 0) return error;
  LaunchConfig launch(plan, (shape.B + kRows - 1) / kRows, sizeof(ClusterMemory<kBlocks>), stream);
  return cudaLaunchKernelEx(&launch.config, kernel, args, shape, below);
}

// Calls launch(first team, teams, memory) until all rows are computed.
template <int kGroups, class Launch>
cudaError_t for_meshes(const MeshPlan& plan, int64_t B, const Scratch& scratch, cudaStream_t stream,
                       const Launch& launch) {
  const int all = int((B + kRows - 1) / kRows), at_once = std::min(all, plan.teams);
  const int64_t words = int64_t(at_once) * kGroups * kMeshWords;
  uint32_t* memory = reinterpret_cast<uint32_t*>(scratch.allocate(scratch.context, words));
  cudaError_t error = cudaSuccess;
  for (int first = 0; first < all && error == cudaSuccess; first += at_once) {
    const int teams = std::min(at_once, all - first);
    error = cudaMemsetAsync(memory, 0, sizeof(uint32_t) * words, stream);
    cudaLaunchAttribute attribute[2];
    const cudaLaunchConfig_t config = mesh_config<kGroups>(teams, stream, attribute);
    if (error == cudaSuccess) error = launch(config, first, memory);
  }
  return error;
}

template <class T, int kGroups>
cudaError_t launch_mesh(const RecurrentArgs& args, const MeshPlan& plan, const Scratch& scratch, cudaStream_t stream) {
  float edge, below;
  marks<T>(args.norm.clamp_value, edge, below);
  const MeshShape shape = {int(args.shape.B), int(args.shape.T), args.shape.activation};
  return for_meshes<kGroups>(plan, shape.B, scratch, stream, [&](const auto& config, int first, uint32_t* memory) {
    return cudaLaunchKernelEx(&config, recurrent_mesh_forward_kernel<T, kGroups>, args, shape, memory, first, below);
  });
}

template <class T, int kGroups>
cudaError_t launch_mesh(const RecurrentBackwardArgs& args, const MeshPlan& plan, const Scratch& scratch,
                        cudaStream_t stream) {
  float edge, below;
  marks<T>(args.norm.clamp_value, edge, below);
  const MeshShape shape = {int(args.shape.B), int(args.shape.T), args.shape.activation};
  const float2* statistics = recurrent_statistics<T>(args, team_shape(args.shape, TeamPlan{1}), scratch, stream);
  return for_meshes<kGroups>(plan, shape.B, scratch, stream, [&](const auto& config, int first, uint32_t* memory) {
    return cudaLaunchKernelEx(&config, recurrent_mesh_backward_kernel<T, kGroups>, args, shape, memory, statistics,
                              first, edge);
  });
}

template <class T, int kBlocks>
cudaError_t launch_cluster(const RecurrentBackwardArgs& args, const TeamPlan& plan, const Scratch& scratch,
                           cudaStream_t stream) {
  float edge, below;
  marks<T>(args.norm.clamp_value, edge, below);
  const MeshShape shape = {int(args.shape.B), int(args.shape.T), args.shape.activation};
  const auto kernel = recurrent_cluster_backward_kernel<T, kBlocks>;
  const cudaError_t error = allow_shared(kernel, sizeof(ClusterBackwardMemory<kBlocks>), true);
  if (error != cudaSuccess || shape.B == 0) return error;
  const float2* statistics = recurrent_statistics<T>(args, team_shape(args.shape, plan), scratch, stream);
  LaunchConfig launch(plan, (shape.B + kRows - 1) / kRows, sizeof(ClusterBackwardMemory<kBlocks>), stream);
  return cudaLaunchKernelEx(&launch.config, kernel, args, shape, statistics, edge);
}

// Calls body(a number of the dtype, plans).
template <class Body>
cudaError_t with_plans(const RecurrentShape& shape, const Body& body) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const Plans plans = plans_for(int(shape.D), int(shape.H), device);
  if (plans.team.blocks == 0) return cudaErrorInvalidConfiguration;
  return shape.dtype == DType::kFloat16 ? body(__half{}, plans) : body(__nv_bfloat16{}, plans);
}

}  // namespace

cudaError_t recurrent_forward(const RecurrentArgs& args, const Scratch& scratch, cudaStream_t stream) {
  return with_plans(args.shape, [&](auto tag, const Plans& plans) {
    using T = decltype(tag);
    if (takes_mesh(plans, args.shape.B)) {
      return with_groups(plans.mesh.groups,
                         [&](auto groups) { return launch_mesh<T, groups>(args, plans.mesh, scratch, stream); });
    }
    if (takes_cluster(plans.team, args.shape)) {
      return plans.team.blocks == 8 ? launch_cluster<T, 8>(args, plans.team, stream)
                                    : launch_cluster<T, 16>(args, plans.team, stream);
    }
    return plans.team.cluster ? launch_forward<T, true>(args, plans.team, scratch, stream)
                              : launch_forward<T, false>(args, plans.team, scratch, stream);
  });
}

cudaError_t recurrent_backward(const RecurrentBackwardArgs& args, const Scratch& scratch, cudaStream_t stream) {
  return with_plans(args.shape, [&](auto tag, const Plans& plans) {
    using T = decltype(tag);
    if (takes_mesh(plans, args.shape.B) && in_pairs(args.pre) && in_pairs(args.c) && in_pairs(args.grad_pre)) {
      return with_groups(plans.mesh.groups,
                         [&](auto groups) { return launch_mesh<T, groups>(args, plans.mesh, scratch, stream); });
    }
    if (takes_cluster(plans.team, args.shape)) {
      return plans.team.blocks == 8 ? launch_cluster<T, 8>(args, plans.team, scratch, stream)
                                    : launch_cluster<T, 16>(args, plans.team, scratch, stream);
    }
    return plans.team.cluster ? launch_backward<T, true>(args, plans.team, scratch, stream)
                              : launch_backward<T, false>(args, plans.team, scratch, stream);
  });
}

int64_t recurrent_team(int64_t D, int64_t H, int device) {
  const TeamPlan plan = plans_for(int(D), int(H), device).team;
  return plan.cluster ? -plan.blocks : plan.blocks;
}

int64_t recurrent_teams(int64_t D, int64_t H, int device) { return plans_for(int(D), int(H), device).team.teams; }

int64_t recurrent_meshes(int64_t D, int64_t H, int device) { return plans_for(int(D), int(H), device).mesh.teams; }

}  // namespace newllm::cuda
