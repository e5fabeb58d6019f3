"""`python -m newllm_kernels`: what this installation holds, for a person or a bug report."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec

import torch

import newllm_kernels
from newllm_kernels import backends, native


def report() -> str:
    """Versions, what was compiled for which processors, what loads, and which backends serve which operation here."""
    loaded = native.library()
    lines = [
        f"newllm_kernels  {newllm_kernels.__version__}",
        f"python          {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch           {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton          {_triton()}",
        f"library         {loaded.reason}",
    ]
    try:
        info = native.build_info()
    except ImportError as error:
        lines.append(f"build           {error}")
    else:
        cuda = f"{info['cuda_compiler']} for {info['cuda_archs']}" if info["cuda_compiler"] else "left out"
        lines += [
            f"build           {info['version']}, {info['build_type']}, {info['compiler']}",
            f"built beside    torch {info['torch_build']}, runs with {info['torch_target']} and newer",
            f"cpu kernels     {info['cpu_isas']}" + (f"; in use: {native.active_isa()}" if loaded.ok else ""),
            f"cuda kernels    {cuda}",
        ]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines.append(f"gpu             {', '.join(gpus) or 'none that this PyTorch sees'}")
    lines.append(f"backend         {backends.current_backend()} (NEWLLM_KERNELS_BACKEND, use_backend)")
    for device in ("cpu", *(["cuda"] if gpus else [])):
        call = backends.Call(torch.device(device), torch.float32, 1024)
        for operation in backends.operations():
            able = [name for name, answer in backends.verdicts(operation, call).items() if answer.ok]
            lines.append(f"  {operation:<15} {device:<5} {', '.join(able)}")
    return "\n".join(lines)


def _triton() -> str:
    if find_spec("triton") is None:
        return "not installed"
    import triton

    return triton.__version__


if __name__ == "__main__":
    print(report())
    sys.exit(0)
