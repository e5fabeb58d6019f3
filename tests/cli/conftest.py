from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from newllm.cli import main

sys.path.insert(0, str(Path(__file__).parent))  # so that the tests can import cli_tools.py however pytest was started
from cli_tools import TEXT, TINY, Result


@pytest.fixture(autouse=True)
def runs_root(tmp_path, monkeypatch):
    """Every test has a folder of runs, and a current folder, of its own; and torch's threads are put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("NEWLLM_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "runs"
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def newllm(capfd):
    """Run the command in this process."""

    def run(*argv) -> Result:
        capfd.readouterr()
        code = main([str(arg) for arg in argv])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def _trained(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--data", text, *TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def trained(_trained, runs_root):
    """A finished run by the name "first", a copy for this test alone."""
    shutil.copytree(_trained, runs_root / "first")
    return runs_root / "first"
