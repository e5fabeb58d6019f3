"""For every run of pytest in this repository, read before any module is imported for its doctests."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

collect_ignore_glob = (
    [] if find_spec("triton") else ["newllm_kernels/*/triton*.py", "newllm_kernels/triton_*.py", "tests/*/compile_*.py"]
)

if not torch.cuda.is_available():
    # Where there is no GPU Triton's kernels run in its interpreter; triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU; this PyTorch sees none")
