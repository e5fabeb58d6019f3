"""Every test here draws its own inputs from a printed seed and runs on poisoned memory."""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that the tests can import cases.py however pytest was started

import poison


@pytest.fixture(autouse=True)
def seed(request):
    """A seed of the test's own. NEWLLM_TEST_SEED draws other inputs for all tests; pytest shows the print on failure."""
    value = zlib.crc32(request.node.nodeid.encode()) ^ int(os.environ.get("NEWLLM_TEST_SEED", "0"))
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory holds NaN or absurdly large numbers, so an element that nobody wrote, or that was read before it was
    written, shows. Where the platform has no way to do so the tests run all the same; test_poison.py says so."""
    with poison.poisoned():
        yield


@pytest.fixture(autouse=True)
def threads():
    """A function that sets PyTorch's number of threads, which is one until a test wants more: to wake a second for these
    sizes costs more than it computes, above all on a busy machine. That threads change no bit is a test of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
