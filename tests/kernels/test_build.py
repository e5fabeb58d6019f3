"""What was built says so, and is what the package says it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import newllm_kernels as nk
from newllm_kernels import native

pytestmark = pytest.mark.skipif(not native.library().ok, reason="the C++ kernels are not built")


def test_build_info():
    info = native.build_info()
    assert info["version"] == nk.__version__
    assert info["cpu_isas"] in ("baseline", "baseline,avx2,avx512")
    assert native.active_isa() in info["cpu_isas"].split(",")
    assert info["build_type"] in ("Release", "RelWithDebInfo", "Debug")
    assert bool(info["cuda_compiler"]) == bool(info["cuda_archs"]) == native.has_cuda_kernels()


def test_it_runs_with_every_pytorch_that_it_says():
    target = tuple(int(part) for part in native.build_info()["torch_target"].split(".")[:2])
    here = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert target <= here
    assert target <= (2, 11)  # the oldest that pyproject.toml promises


def test_the_library_is_tied_to_no_python():
    """One file for every Python version: the stable ABI knows none."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", native.LIBRARY], capture_output=True, text=True, check=False
    )
    if symbols.returncode != 0:
        pytest.skip("needs nm")
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert not [name for name in names if name.startswith(("Py", "_Py"))]
    # Nor to a PyTorch version: of libtorch only the C shim, no mangled name of c10, at or torch.
    mangled = [
        name
        for name in names
        if name.startswith("_Z") and any(f"{len(ns)}{ns}" in name for ns in ("c10", "torch", "at"))
    ]
    assert not mangled


def test_every_operation_has_its_compiled_kernels():
    # What recurrent_context has are the loops in the middle of what its operators do; decode_linear's native operators
    # write into given outputs.
    for operation in set(nk.operations()) - {"recurrent_context", "decode_linear"}:
        for suffix in ("", "_backward"):
            schema = getattr(torch.ops.newllm_native, operation + suffix).default._schema
            ours = getattr(torch.ops.newllm, operation + suffix).default._schema
            assert [(a.name, str(a.type)) for a in schema.arguments] == [
                (a.name, str(a.type)) for a in ours.arguments
            ] or (
                operation + suffix == "context_scan_backward"  # its c is absent where the step alone is differentiated
            )
            assert [str(r.type) for r in schema.returns] == [str(r.type) for r in ours.returns]
    for name, results in (("recurrent_context", 4), ("recurrent_context_backward", 5)):
        assert len(getattr(torch.ops.newllm_native, name).default._schema.returns) == results


def test_a_missing_c_module_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "newllm_kernels._C", None)
    monkeypatch.delattr(nk, "_C", raising=False)
    with pytest.raises(ImportError, match=r"newllm_kernels._C is not built for Python 3\.\d+: pip install -e \."):
        native.build_info()


@pytest.mark.skipif(not native.has_cuda_kernels(), reason="built without nvcc")
def test_no_recurrence_spills_registers():
    """A thread that walks time with part of its state in local memory would pay for it at every step. Rows that are not of whole
    16 bytes are another, slower case."""
    tool = Path(__file__).parents[2] / "tools" / "resources.py"
    done = subprocess.run([sys.executable, tool, "--all"], capture_output=True, text=True, check=False)
    if "cuobjdump was not found" in done.stderr:
        pytest.skip("needs cuobjdump")
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    kernels = [(*line[1].split(), int(line[5])) for line in lines if line[1].startswith("recurrence_kernel")]
    aligned = [kernel for kernel in kernels if kernel[-4] == "1"]  # ... ALIGNED CLUSTER PAIRS, stack
    assert {kernel[1] for kernel in aligned} == {"ScanForward", "ScanBackward", "GatedForward", "GatedBackward"}
    assert {kernel[2] for kernel in aligned} == {"f", "half", "nv_bfloat16"}
    assert [kernel for kernel in aligned if kernel[-1] > 0] == []
    of_cell = [line for line in lines if line[1].startswith(("recurrent_forward", "recurrent_backward"))]
    assert len({line[1] for line in of_cell}) >= 8  # two directions, two dtypes, clusters and larger teams
    assert [line for line in of_cell if int(line[5]) > 0] == []
    fused = {line[1]: int(line[5]) for line in lines if line[1].startswith("scan_norm_")}
    assert {name.split()[0] for name in fused} == {"scan_norm_forward_kernel", "scan_norm_backward_kernel"}
    assert [name for name, stack in fused.items() if stack > 0] == []
    norms = [(line[0], *line[1].split(), int(line[5])) for line in lines if line[1].startswith("layer_norm_")]
    # ... columns threads blocks ALIGNED DIRECT CLUSTER, and forward ... ROWS ALIGNED RESIDUAL CLUSTER: of 16 bits and whole vectors
    hot = [kernel for kernel in norms if kernel[-4:-3] == ("1",) and kernel[2] in ("half", "nv_bfloat16")]
    assert {kernel[1] for kernel in hot} == {"layer_norm_kernel", "layer_norm_backward_kernel"}
    # Blocks a multiprocessor were chosen on an H100, where a few of these for float32 parameters keep 8 or 16 bytes.
    allowed = {"sm_80": 32, "sm_90a": 16}
    assert [kernel for kernel in hot if kernel[-1] > allowed.get(kernel[0], 16)] == []
