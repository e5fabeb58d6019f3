from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that the tests can import configs.py however pytest was started


@pytest.fixture(autouse=True)
def one_thread():
    """These models are tiny: waking a second thread costs more than it computes, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
