"""Configurations are tried once, and the choice outlives the process."""

from __future__ import annotations

import json

import pytest
import torch

from newllm_kernels import tuning

CONFIGURATIONS = [(1, "slow"), (2, "fast"), (3, "cannot")]
MILLISECONDS = {"slow": 2.0, "fast": 1.0, "cannot": float("inf")}
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """The configurations that were timed, on a GPU that is not there."""
    found = []

    def milliseconds(call):
        found.append(call.args[0])
        return MILLISECONDS[call.args[0][1]]

    monkeypatch.setenv("NEWLLM_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_file_name", lambda device: "gpu.json")
    monkeypatch.setattr(tuning, "tries", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def choose(kind="scan"):
    return tuning.fastest((kind,), CONFIGURATIONS, lambda configuration: None, DEVICE)


def test_the_fastest_is_taken_and_kept(tried, tmp_path):
    assert choose() == (2, "fast")
    assert tried == CONFIGURATIONS
    tuning._choices.clear()  # as another process would begin
    assert choose() == (2, "fast")
    assert len(tried) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_kinds_are_tried_each_and_share_the_file(tried, tmp_path):
    choose("scan")
    choose("gated_scan")
    assert len(tried) == 6
    assert sorted(json.loads((tmp_path / "gpu.json").read_text()).values()) == [1, 1]


def test_a_broken_file_is_told_and_replaced(tried, tmp_path):
    (tmp_path / "gpu.json").write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert choose() == (2, "fast")


def test_nothing_is_tried_while_a_graph_is_captured(tried, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == (1, "slow")
    assert tried == []


def test_nothing_is_tried_without_a_gpu_or_where_the_list_was_measured(monkeypatch):
    tuning.tries.cache_clear()
    monkeypatch.delenv("NEWLLM_KERNELS_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert not tuning.tries(torch.device("cpu"))
    assert not tuning.tries(DEVICE)
    tuning.tries.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert tuning.tries(DEVICE)
    tuning.tries.cache_clear()


def test_a_bad_setting_is_named(monkeypatch):
    tuning.tries.cache_clear()
    monkeypatch.setenv("NEWLLM_KERNELS_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match=r"^NEWLLM_KERNELS_AUTOTUNE: got 'yes', wanted 0 or 1"):
        tuning.tries(DEVICE)


@pytest.mark.gpu
def test_results_do_not_depend_on_the_trials(tmp_path, monkeypatch):
    import newllm_kernels as nk

    a, b = torch.rand(4, 500, 200, device="cuda"), torch.randn(4, 500, 200, device="cuda")
    want = nk.scan(a, b)[0]
    tuning.tries.cache_clear()
    monkeypatch.setenv("NEWLLM_KERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("NEWLLM_KERNELS_CACHE", str(tmp_path))
    try:
        got = nk.scan(a, b)[0]
    finally:
        tuning.tries.cache_clear()
    assert len(list(tmp_path.iterdir())) == 1
    assert float((got - want).norm() / want.norm()) < 1e-6
