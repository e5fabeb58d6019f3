// Plain C++ interface of the CPU kernels.
#pragma once

#include <cstdint>

#include "../args.h"

namespace newllm::cpu {

#define NEWLLM_CPU_KERNELS(X)                   \
  X(scan_forward, ScanArgs)                     \
  X(scan_backward, ScanBackwardArgs)            \
  X(gated_scan_forward, GatedScanArgs)          \
  X(gated_scan_backward, GatedScanBackwardArgs) \
  X(context_forward, ContextArgs)               \
  X(context_backward, ContextBackwardArgs)      \
  X(recurrent_forward, RecurrentArgs)           \
  X(recurrent_backward, RecurrentBackwardArgs)  \
  X(layer_norm_forward, LayerNormArgs)          \
  X(layer_norm_backward, LayerNormBackwardArgs)

// One entry point per kernel; dispatch.cpp sends it to the widest instruction set that this processor has.
#define NEWLLM_DECLARE(name, args) void name(const args& args_);
NEWLLM_CPU_KERNELS(NEWLLM_DECLARE)
#undef NEWLLM_DECLARE

// Name of the instruction set in use ("baseline", "avx2", "avx512"), and a comma-separated list of those compiled in.
const char* active_isa();
const char* compiled_isas();

}  // namespace newllm::cpu
