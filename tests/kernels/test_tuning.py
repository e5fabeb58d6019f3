"""Configurations are tried once, and the choice outlives the process."""

from __future__ import annotations

import contextlib
import json
from importlib import import_module

import pytest
import torch
from cases import check, differentiate, make, relative_error
from torch.utils._pytree import tree_leaves

import newllm_kernels as nk
from newllm_kernels import tuning

CONFIGURATIONS = [(1, "slow"), (2, "fast"), (3, "cannot")]
MILLISECONDS = {"slow": 2.0, "fast": 1.0, "cannot": float("inf")}
DEVICE = torch.device("cuda", 0)
HERE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = ("layer_norm", "add_layer_norm", "context_update")


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """The configurations that were timed, on a GPU that is not there."""
    found = []

    def milliseconds(call):
        found.append(call.args[0])
        return MILLISECONDS[call.args[0][1]]

    monkeypatch.setenv("NEWLLM_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_taken", {})
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_file_name", lambda device: "gpu.json")
    monkeypatch.setattr(tuning, "tries", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return found


def choose(kind="scan"):
    return tuning.fastest((kind,), CONFIGURATIONS, lambda configuration: None, DEVICE)


def test_the_fastest_is_taken_and_kept(tried, tmp_path):
    assert choose() == (2, "fast")
    assert tried == CONFIGURATIONS
    tuning._choices.clear()  # as another process would begin
    tuning._taken.clear()
    assert choose() == (2, "fast")
    assert len(tried) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_choice_once_taken_costs_no_look_into_the_file(tried, monkeypatch):
    choose()
    monkeypatch.setattr(tuning, "folder", pytest.fail)
    assert choose() == (2, "fast")


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


# ---- the kernels that normalise rows ---------------------------------------------------------------------------------


def problem(function, rows, D, dtype=torch.float32, **options):
    return make(function, 1, rows, D, dtype, **options).map(lambda name, x: x.to(HERE))


@pytest.fixture
def tiles(monkeypatch):
    """newllm_kernels.layer_norm.triton_tiles, on a GPU of one multiprocessor: there programs stay and walk even a few rows."""
    pytest.importorskip("triton", reason="triton is not installed")
    from newllm_kernels.layer_norm import triton_tiles

    monkeypatch.setattr(triton_tiles, "multiprocessors", lambda device: 1)
    with nk.use_backend("triton"):
        yield triton_tiles


class Taking:
    """In place of `tuning.fastest`: of every list of tiles the one at `position`, without a trial; notes what it was asked."""

    def __init__(self, RowTile):
        self.position, self.asked, self.RowTile = 0, {}, RowTile

    def __call__(self, kind, configurations, run, device):
        if not isinstance(configurations[0], self.RowTile):  # a scan's
            return configurations[0]
        self.asked[kind] = configurations
        print(kind, self.of(configurations))
        return self.of(configurations)

    def of(self, configurations):
        return configurations[min(self.position, len(configurations) - 1)]

    def kinds(self, *arguments, **options):
        """Of a call, forward and backward."""
        self.asked = {}
        called = problem(*arguments, **options)
        differentiate(called.run, called.tensors, [torch.ones_like(x) for x in called.run()])
        return set(self.asked)


@pytest.fixture
def taking(tiles, monkeypatch):
    monkeypatch.setattr(tuning, "tries", lambda device: True)
    monkeypatch.setattr(tuning, "fastest", Taking(tiles.RowTile))
    return tuning.fastest


@pytest.fixture
def summed_by_torch(tiles, monkeypatch):
    """The last sum of weight gradients: no tile touches it, test_triton.py has it, and the interpreter takes longest for it."""

    def reduce_partials(parts, gweight, gbias, dtype=torch.float32):
        assert gweight.shape[0] == gbias.shape[0] == parts
        return gweight.sum(0).to(dtype), gbias.sum(0).to(dtype)

    for module in ("layer_norm", "context_update", "gated_scan_layer_norm"):
        monkeypatch.setattr(import_module(f"newllm_kernels.{module}.triton"), "reduce_partials", reduce_partials)


@pytest.fixture
def launched(tiles, monkeypatch):
    """(BR, BD, warps) of all launches."""
    from newllm_kernels.triton_support import Kernel

    found, launch = set(), Kernel._launch

    def noting(kernel, grid, *arguments, **constants):
        found.add(tuple(constants[name] for name in ("BR", "BD", "num_warps")))
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(Kernel, "_launch", noting)
    return found


@pytest.mark.parametrize("D", [33, 260, 1000])
@pytest.mark.parametrize("function", ROWS)
def test_every_tile_gives_the_truth(function, D, taking, launched, summed_by_torch):
    """Each in memory that no other has written (poison.py), so what it leaves out shows."""
    called = problem(function, 7, D)
    while taking.position < max(map(len, taking.asked.values()), default=1):
        launched.clear()
        check(called)
        assert launched == {taking.of(found)[:3] for found in taking.asked.values()}
        taking.position += 1
    assert len(taking.asked) == 2  # forward and backward
    assert taking.position >= 5


@pytest.mark.parametrize("D", [33, 260, 1000])
def test_every_tile_gives_the_row_sums(D, tiles, launched, summed_by_torch):
    """Of gated_scan_layer_norm, whose scans would take the interpreter a minute."""
    from newllm_kernels.gated_scan_layer_norm.triton import _launch_row_sums

    grad, c, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, D), (7, D), (D,), (D,)))
    mean, rstd = c.mean(1), (c.var(1, correction=0) + 1e-5).rsqrt()
    xhat = (c - mean[:, None]) * rstd[:, None]
    kept = torch.where((xhat * weight + bias).abs() > 1.0, 0.0, grad)
    g = kept * weight
    want = (g.mean(1), (g * xhat).mean(1), (kept * xhat).sum(0), kept.sum(0))
    of_call = [x.float().to(HERE) for x in (grad, c, mean, rstd, weight, bias)]
    for tile in tiles.candidates(tiles.weights_tile(D), D, tiles.WEIGHTS):
        sums = [torch.full((7,), torch.nan, device=HERE) for _ in range(2)]
        got = *sums, *_launch_row_sums(*of_call, *sums, 1.0, tile)
        for k, (x, y) in enumerate(zip(got, want, strict=True)):
            assert relative_error(x, y) < 2e-6, (tile, k)
        assert launched == {tile[:3]}
        launched.clear()


@pytest.mark.parametrize("function", ROWS)
def test_trials_on_the_tensors_of_a_call_leave_its_results(function, tiles, tried, monkeypatch):
    """And are not made again."""
    left = []  # tensors, and how a trial left them

    def run(call):
        tried.append(call.args[-1])
        call()
        call()
        left.extend((x, x.clone()) for x in tree_leaves(call.args) if isinstance(x, torch.Tensor))
        return -len(tried)  # so the last is taken

    monkeypatch.setattr(tuning, "_milliseconds", run)
    called = problem(function, 7, 33)
    check(called)
    once = len(tried)
    assert once >= 10
    assert all(relative_error(x, after) < 2e-6 for after, x in left)
    check(called)
    assert len(tried) == once


def test_kinds_of_calls(taking):
    """Apart where another tile may be fastest, together where trials again would only cost time."""
    base = taking.kinds("layer_norm", 7, 33)
    assert len(base) == 2
    assert taking.kinds("layer_norm", 5, 60) == base
    assert taking.kinds("layer_norm", 7, 33, affine=False) == base
    of_update = taking.kinds("context_update", 7, 33)
    assert len(of_update) == 2
    of_both = taking.kinds("gated_scan_layer_norm", 7, 33) - base  # forward it is layer_norm
    assert len(of_both) == 1
    others = [
        base,
        of_update,
        of_both,
        taking.kinds("add_layer_norm", 7, 33),
        taking.kinds("layer_norm", 9, 33),
        taking.kinds("layer_norm", 7, 65),
        taking.kinds("layer_norm", 7, 33, torch.bfloat16),
        taking.kinds("context_update", 7, 33, torch.bfloat16, state="acc"),
        taking.kinds("context_update", 7, 33, torch.bfloat16, state="own"),
    ]
    assert len(set().union(*others)) == sum(map(len, others))


def test_lists_of_tiles(tiles):
    from newllm_kernels.context_update.triton import _BACKWARD_TILES

    for D in (1, 33, 260, 1000, 4096, 8192):
        for others in (tiles.ONE_TILE_EACH, tiles.WEIGHTS, _BACKWARD_TILES):
            first = tiles.row_tile(D, 512, 4, *others[0][2:])
            found = tiles.candidates(first, D, others)
            assert found[0] == first
            assert 2 <= len(set(found)) == len(found) <= 6
            assert any(tile.stages == 1 for tile in found[1:])  # which fits a GPU with little shared memory
            assert all(tile.BD >= D and tile.BR * tile.BD <= 8192 for tile in found)  # what registers hold


@pytest.mark.parametrize("function", [*ROWS, "gated_scan_layer_norm"])
def test_without_trials_no_list_is_made(function, tiles, monkeypatch):
    def never(*arguments):
        pytest.fail("asked for the fastest tile where none is tried")

    if HERE == "cuda":
        monkeypatch.setattr(tuning, "tries", lambda device: False)
    monkeypatch.setattr(tuning, "fastest", never)
    monkeypatch.setattr(tiles, "candidates", never)
    check(problem(function, 7, 33))


# ---- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """Of this GPU, whichever it is, kept in a folder of the test's own."""
    monkeypatch.setattr(tuning, "_taken", {})
    monkeypatch.setenv("NEWLLM_KERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("NEWLLM_KERNELS_CACHE", str(tmp_path))
    tuning.tries.cache_clear()
    yield tmp_path
    tuning.tries.cache_clear()


@pytest.mark.gpu
def test_results_do_not_depend_on_the_trials(trials, monkeypatch):
    a, b = torch.rand(4, 500, 200, device="cuda"), torch.randn(4, 500, 200, device="cuda")
    with nk.use_backend("triton"):
        with monkeypatch.context() as without:
            without.setattr(tuning, "tries", lambda device: False)
            want = nk.scan(a, b)[0]
        got = nk.scan(a, b)[0]
    assert len(list(trials.iterdir())) == 1
    assert float((got - want).norm() / want.norm()) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("D", [260, 8192])  # of 8192 float32 columns not every tile fits every GPU
@pytest.mark.parametrize("function", [*ROWS, "gated_scan_layer_norm"])
def test_tried_tiles_give_the_truth(function, D, trials):
    with nk.use_backend("triton"):
        check(problem(function, 500, D))
    (file,) = trials.iterdir()
    assert len(json.loads(file.read_text())) >= 2
