// newllm_kernels._C: what this build holds. The kernels themselves are in libnewllm_kernels, which no Python version
// is tied to; this small module is rebuilt for each.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of newllm_kernels holds.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = NEWLLM_VERSION;
        info["compiler"] = compiler();
        info["cpu_isas"] = NEWLLM_CPU_ISAS;
        info["torch_build"] = NEWLLM_TORCH_BUILD;    // the PyTorch whose headers were used
        info["torch_target"] = NEWLLM_TORCH_TARGET;  // the oldest PyTorch the library runs with
        info["cuda_compiler"] = NEWLLM_CUDA_COMPILER;
        info["cuda_archs"] = NEWLLM_CUDA_ARCHS;
        info["build_type"] = NEWLLM_BUILD_TYPE;
        return info;
      },
      "Versions, compilers, instruction sets and CUDA architectures of this build; empty text where there is none.");
}
