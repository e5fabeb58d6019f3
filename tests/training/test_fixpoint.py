"""Fixed points: figures of cells whose answer is known, and what the objective does to a cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from newllm import fixpoint
from newllm.config import ModelConfig, preset
from newllm.errors import UserError
from newllm.model import build_model

D, V = 12, 24


def model(forget=0.0, coupling=0.0, **fields):
    """A classic model that forgets at a known rate; blind to its context unless `coupling`."""
    torch.manual_seed(0)
    settings = {"norm": None, "coupling": "full", "architecture": "classic"} | fields
    made = build_model(ModelConfig(vocab_size=V, embed_dim=8, hidden_dim=16, context_dim=D, **settings))
    with torch.no_grad():
        made.cell.from_context.weight.mul_(coupling)
        made.cell.to_gates.weight[:D] = 0
        made.cell.to_gates.bias[:D] = forget
    return made


def test_a_cell_that_forgets_at_a_known_rate_comes_to_rest_when_it_must():
    """c' = s c + w has one fixed point w / (1 - s), and changes shrink by s a pass."""
    made = model(forget=0.0)
    (found,) = fixpoint.measure(made, np.arange(V)[:, None], tolerance=1e-3)
    assert found.phrases == V
    assert found.converged == found.unique == 1.0
    assert found.rate == pytest.approx(0.5, abs=0.02)
    assert 8 <= found.passes["50%"] <= found.passes["99%"] <= 14  # 2^-10 is a thousandth
    assert sum(found.settled) == V
    assert 1 < found.participation <= found.effective_rank <= D


def test_a_cell_that_keeps_everything_never_rests_and_remembers_its_start():
    (found,) = fixpoint.measure(model(forget=30.0), np.arange(V)[:, None], tolerance=1e-3)
    assert found.converged == 0.0
    assert found.unique < 0.5
    assert set(found.passes.values()) == {None}


def test_passes_of_a_phrase_are_counted_at_its_end():
    made = model(coupling=1.0, norm="state").eval()
    phrases = torch.randint(V, (3, 4))
    with torch.no_grad():
        ends = fixpoint.passes_over(made, phrases, 3)["cell"]
        state = None
        for k in range(3):
            _, state = made.features(phrases, state)
            torch.testing.assert_close(ends[:, k], state["context"][:, 0])


def test_the_objective_is_zero_at_rest_and_apart_and_one_where_all_is_alike():
    apart = torch.eye(4)[:, None].expand(-1, 6, -1)  # contexts that stand still at right angles
    assert [x.item() for x in fixpoint.objective(apart, 0.5)] == [0.0, 0.0, 0.0]
    alike = torch.ones(4, 6, 4)
    assert [x.item() for x in fixpoint.objective(alike, 0.5)] == pytest.approx([0.5, 0.0, 1.0])
    restless = apart * torch.tensor([1.0, -1.0] * 3)[:, None]
    assert fixpoint.objective(restless, 0.0)[1].item() == pytest.approx(4.0)  # |2c|^2 / |c|^2
    early = restless.clone()
    early[:, 3:] = early[:, 2:3]  # moves in the first half only, which is free
    assert fixpoint.objective(early, 0.0)[1].item() == 0.0


def test_training_brings_a_restless_cell_to_rest_and_diversity_keeps_it_from_collapse():
    every, records, found = np.arange(V)[:, None], [], {}
    for diversity in (0.0, 0.3):
        made = model(forget=2.0, coupling=8.0, norm="state")
        (found["before"],) = fixpoint.measure(made, every, tolerance=1e-3)
        config = fixpoint.FixpointConfig(steps=60, batch_size=V, repeats=8, lr=0.01, diversity=diversity)
        assert fixpoint.FixpointTrainer(made, np.zeros(9, np.int64), config).train(records.append) is None
        (found[diversity],) = fixpoint.measure(made, every, tolerance=1e-3)
    assert found["before"].converged < 0.2
    assert found[0.0].converged > 0.9
    assert found[0.0].similarity["mean"] > 0.95  # all at one place: no context at all
    assert found[0.3].converged > 0.5
    assert found[0.3].similarity["mean"] < 0.4
    assert found[0.3].effective_rank > 1.5 * found[0.0].effective_rank
    assert [record["step"] for record in records] == [10, 20, 30, 40, 50, 60] * 2


def test_phrases_differ_and_come_from_the_text():
    tokens = np.arange(50) % 7
    assert sorted(fixpoint.phrases_of(tokens, V, 1, 1000, seed=3)[:, 0]) == list(range(V))
    found = fixpoint.phrases_of(tokens, V, 3, 10, seed=3)
    assert found.shape == (10, 3)
    assert ((found[:, 1:] - found[:, :-1]) % 7 == 1).all()
    with pytest.raises(UserError, match="--phrase 60: the text has only 50"):
        fixpoint.phrases_of(tokens, V, 60, 10, seed=0)


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"batch_size": 1}, {"repeats": 3}, {"lr": 0.0}, {"tolerance": 0.0}, {"diversity": -1.0}]
)
def test_settings_are_refused_by_their_option(fields):
    with pytest.raises(UserError, match="--" + next(iter(fields)).replace("_", "-")):
        fixpoint.FixpointConfig(**fields)


def test_models_without_a_full_cell_are_refused():
    for config in (preset("tiny"), ModelConfig(coupling="hops", hops=2), ModelConfig(architecture="transformer")):
        with pytest.raises(UserError, match="--coupling full"):
            fixpoint.check(config)
