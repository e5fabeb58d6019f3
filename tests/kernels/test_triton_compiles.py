"""Every Triton kernel becomes machine code for a GPU here, whether there is one or not: the interpreter accepts much that the
compiler does not."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
PROGRAM = HERE / "compile_triton.py"


def kernels() -> set[str]:
    """Names of the functions that a function of the same file launches, `kernel[grid](...)`."""
    package = HERE.parents[1] / "newllm_kernels"
    found = set()
    for path in package.glob("*/triton*.py"):
        tree = ast.parse(path.read_text())
        launched = {
            node.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
        }
        found |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in launched}
    return found


@pytest.mark.parametrize("capability", [90])  # one costs 15 s, and what differs between 80 and 90 is Triton's own
def test_every_kernel_compiles(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, PROGRAM, str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert all(int(code) > 1000 for _, _, code in lines)
    assert kernels() <= {name.rpartition(".")[2] for name, _, _ in lines}
