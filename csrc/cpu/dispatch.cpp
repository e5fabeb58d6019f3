// Chooses, once, among the instruction sets that the kernels were compiled for.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"

namespace newllm::cpu {

#define NEWLLM_DECLARE(name, args) void name(const args&);
namespace baseline {
NEWLLM_CPU_KERNELS(NEWLLM_DECLARE)
}
#ifdef NEWLLM_HAVE_X86
namespace avx2 {
NEWLLM_CPU_KERNELS(NEWLLM_DECLARE)
}
namespace avx512 {
NEWLLM_CPU_KERNELS(NEWLLM_DECLARE)
}
#endif
#undef NEWLLM_DECLARE

namespace {

struct Table {
  const char* name;
#define NEWLLM_ENTRY(name, args) void (*name)(const args&);
  NEWLLM_CPU_KERNELS(NEWLLM_ENTRY)
#undef NEWLLM_ENTRY
};

#define NEWLLM_POINTER(name, args) NEWLLM_NAMESPACE::name,
#define NEWLLM_NAMESPACE baseline
constexpr Table kBaseline{"baseline", NEWLLM_CPU_KERNELS(NEWLLM_POINTER)};
#undef NEWLLM_NAMESPACE
#ifdef NEWLLM_HAVE_X86
#define NEWLLM_NAMESPACE avx2
constexpr Table kAvx2{"avx2", NEWLLM_CPU_KERNELS(NEWLLM_POINTER)};
#undef NEWLLM_NAMESPACE
#define NEWLLM_NAMESPACE avx512
constexpr Table kAvx512{"avx512", NEWLLM_CPU_KERNELS(NEWLLM_POINTER)};
#undef NEWLLM_NAMESPACE
#endif
#undef NEWLLM_POINTER

const Table& choose() {
  // NEWLLM_CPU_ISA caps the choice, so that one machine can test what another would run.
  const char* cap = std::getenv("NEWLLM_CPU_ISA");
  const auto allowed = [cap](const char* name) { return cap == nullptr || std::strcmp(cap, name) == 0; };
  if (cap != nullptr && !allowed("baseline") && !allowed("avx2") && !allowed("avx512")) {
    throw std::invalid_argument(std::string("NEWLLM_CPU_ISA must be baseline, avx2 or avx512, got ") + cap);
  }
#ifdef NEWLLM_HAVE_X86
  __builtin_cpu_init();
  const bool avx2_ok =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512_ok = avx2_ok && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512_ok && allowed("avx512")) return kAvx512;
  if (avx2_ok && (allowed("avx2") || allowed("avx512"))) return kAvx2;
#endif
  return kBaseline;
}

const Table& table() {
  static const Table& chosen = choose();
  return chosen;
}

void run_serially(int64_t count, int64_t, RangeFn fn, void* context) { fn(0, count, context); }
int64_t one_thread() { return 1; }

}  // namespace

ParallelRunner parallel_runner = run_serially;
int64_t (*thread_count)() = one_thread;

#define NEWLLM_FORWARD(name, args) \
  void name(const args& args_) { table().name(args_); }
NEWLLM_CPU_KERNELS(NEWLLM_FORWARD)
#undef NEWLLM_FORWARD

const char* active_isa() { return table().name; }

const char* compiled_isas() {
#ifdef NEWLLM_HAVE_X86
  return "baseline,avx2,avx512";
#else
  return "baseline";
#endif
}

}  // namespace newllm::cpu
