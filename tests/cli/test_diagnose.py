"""newllm diagnose: figures of cells whose answer is known, and the command from end to end."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from cli_tools import TINY

from newllm import diagnosis
from newllm.config import ModelConfig
from newllm.model.mixer import ContextCell

D = 12


def cell(forget, norm=None, coupling=0.0):
    """A cell of plain forgetting: c_t = sigmoid(forget) c_{t-1} + what x writes, blind to its context unless `coupling`."""
    torch.manual_seed(0)
    made = (
        ContextCell(ModelConfig(embed_dim=4, context_dim=D, fnn_layers=0, coupling="full", norm=norm)).double().eval()
    )
    with torch.no_grad():
        made.from_context.weight.mul_(coupling)
        made.from_x.weight[:D] = 0
        made.from_x.bias[:D] = forget
    return made


def along(made, T=128):
    x = torch.randn(1, T, 4, dtype=torch.float64)
    start = made.start.detach()[None]
    from_x = made.from_x(x).detach()
    return from_x, start, made.full(from_x, start, made.from_context.weight)[0].detach()


@torch.no_grad()
@pytest.mark.parametrize("forget", [-2.0, 0.0, 2.0])
def test_forgetting_is_the_exponent_and_the_horizon(forget):
    """Differences shrink by sigmoid(forget) a step, whatever the text."""
    made = cell(forget)
    from_x, start, contexts = along(made)
    rate = math.log(torch.tensor(forget).sigmoid().item())
    assert diagnosis.lyapunov(made, from_x, start) == pytest.approx(rate, rel=1e-6)
    trace, horizon = diagnosis.memory(made, from_x, start, contexts)
    assert math.log(trace[10] / trace[5]) / 5 == pytest.approx(rate, abs=0.3)  # relative to contexts that vary
    assert horizon["0.001"] == pytest.approx(math.log(0.001) / rate, abs=max(3, -2 / rate))
    left = diagnosis.forgetting(made, from_x, start, contexts)
    assert [row["steps"] for row in left] == [16, 32, 64]
    for row, next_row in itertools.pairwise(left):
        if row["median"] > 1e-6:
            assert math.log(next_row["median"] / row["median"]) / row["steps"] == pytest.approx(rate, abs=0.1)
        assert row["median"] <= row["worst"]
    gates = diagnosis.gate_statistics(made, from_x, start, contexts)
    assert gates["forget"]["mean"] == pytest.approx(torch.tensor(forget).sigmoid().item())


@torch.no_grad()
def test_a_cell_that_never_forgets_has_no_horizon_and_a_strongly_coupled_one_is_chaotic():
    made = cell(30.0)
    from_x, start, contexts = along(made, 64)
    assert diagnosis.memory(made, from_x, start, contexts)[1]["0.001"] is None
    assert diagnosis.lyapunov(made, from_x, start) == pytest.approx(0.0, abs=1e-6)
    wild = cell(0.0, norm="state", coupling=6.0)
    assert diagnosis.lyapunov(wild, *along(wild)[:2]) > 0.05


@torch.no_grad()
def test_passes_are_two_where_chunks_forget_and_all_where_none_does():
    short, long = cell(-6.0), cell(30.0)
    for made, wanted in (
        (short, lambda row: 3),
        (long, lambda row: 2),
    ):  # undamped but direct: what the correction carries
        from_x, start, _ = along(made)
        rows = diagnosis.passes(made, from_x, start)
        assert {(row["T"], row["chunk"]) for row in rows} == {(128, 16), (128, 32), (128, 64)}
        assert all(row["passes"] <= wanted(row) for row in rows), rows


@torch.no_grad()
def test_rank_counts_directions():
    basis = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0][:3]
    shares = diagnosis.variances(torch.randn(4000, 3, dtype=torch.float64) @ basis)
    assert shares[3:].abs().max() < 1e-20
    assert torch.allclose(shares[:3], torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.03)


@pytest.mark.parametrize(
    "options",
    [["--preset", "classic", "--hidden-dim", 16], ["--coupling", "full", "--norm", "state", "--layers", 2]],
    ids=["classic", "newllm"],
)
def test_the_command(newllm, text, runs_root, options):
    assert newllm("train", "--data", text, *TINY, *options, "--steps", 4, "--run", "cell").code == 0
    code, out, err = newllm("diagnose", "cell", "--tokens", 300)
    assert (code, err) == (0, "")
    for words in (
        "Lyapunov exponent",
        "memory horizon",
        "left of a wrong start",
        "effective rank",
        "forget",
        "passes to 0.001",
        "diagnose.png",
    ):
        assert words in out
    assert (runs_root / "cell" / "diagnose.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(newllm("diagnose", "cell", "--tokens", 300, "--json").out)
    assert len(found["cells"]) == (2 if "--layers" in options else 1)
    for one in found["cells"]:
        assert math.isfinite(one["lyapunov"])
        assert len(one["trace"]) == found["tokens"] == one["steps"]
        assert sum(one["variances"]) == pytest.approx(1.0)
        assert one["passes"]
        assert all(1 <= row["passes"] <= row["chunks"] for row in one["passes"])
    assert newllm("diagnose", "cell", "--data", text, "--tokens", 100).code == 0


def test_what_it_cannot_diagnose(newllm, trained):
    code, _, err = newllm("diagnose", "first")
    assert code == 2
    assert "--coupling full" in err
    assert newllm("diagnose", "first", "--tokens", 5).code == 2
    assert newllm("diagnose", "nowhere").code == 2
