"""The golden property: a text fed token by token, or in pieces, gives the logits of the text fed at once.

Errors are relative L2 errors over all logits. In float64 only the order of summation differs, some 1e-16 per
operation; 1e-11 leaves room for the sensitivity of a few dozen recurrent steps and stays far below any real mistake. In
float32 an operation rounds to 6e-8, and sums of some tens of terms through some tens of steps make that 1e-5 at most.
"""

from __future__ import annotations

import pytest
import torch
from configs import RECURRENT, VOCAB, WALK, make_model, make_tokens

from newllm.config import ModelConfig
from newllm.model import detach_state, state_bytes

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def feed(model, tokens, sizes):
    """Logits (B, T, V) of tokens fed in pieces of the given sizes, and the state after each piece."""
    assert sum(sizes) == tokens.shape[1]
    pieces, states, state = [], [], None
    for piece in tokens.split(sizes, dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
        states.append(state)
    return torch.cat(pieces, dim=1), states


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", WALK)
@torch.no_grad()
def test_pieces_give_the_logits_of_the_whole(name, dtype):
    model, tokens = make_model(WALK[name], dtype), make_tokens(3, 19)
    whole, end = model(tokens)
    assert whole.dtype == dtype
    assert whole.isfinite().all()
    for sizes in ([1] * 19, [7, 1, 11]):
        logits, states = feed(model, tokens, sizes)
        assert relative_error(logits, whole) < TOLERANCE[dtype]
        for key, value in end.items():
            assert relative_error(states[-1][key].double(), value.double()) < TOLERANCE[dtype], key


@pytest.mark.parametrize("name", WALK)
@torch.no_grad()
def test_initial_state_is_what_none_stands_for(name):
    model, tokens = make_model(WALK[name]), make_tokens(3, 6)
    state = model.initial_state(3)
    assert relative_error(model(tokens, state)[0], model(tokens)[0]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_recurrent_state_has_constant_size_and_is_float32(name):
    config = RECURRENT[name]
    model = make_model(config, torch.float32)
    _, states = feed(model, make_tokens(2, 19), [1, 1, 4, 13])
    vectors = config.hops * (config.num_layers if config.architecture == "newllm" else 1)
    tables = 3 * (4 * 4 * config.recall + 8) + 4 * VOCAB if config.recall else 0  # entries, the last tokens, counts
    for state in [model.initial_state(2), *states]:
        assert state_bytes(state) == 2 * (vectors * config.context_dim * 4 + tables)
        assert all(value.shape[0] == 2 for value in state.values())
        assert all(value.dtype == torch.float32 for key, value in state.items() if key.endswith("context"))
        assert all(value.is_contiguous() for value in state.values())


@pytest.mark.parametrize("window", [1, 2, 5])
@torch.no_grad()
def test_transformer_cache_grows_to_its_window_and_no_further(window):
    config = ModelConfig(architecture="transformer", vocab_size=23, embed_dim=12, num_heads=3, max_seq_len=window)
    model, tokens = make_model(config), make_tokens(2, 12)
    logits, states = feed(model, tokens, [1] * 12)
    lengths = [state["layers.0.keys"].shape[2] for state in states]
    assert lengths == [min(t + 1, window - 1) for t in range(12)]
    assert relative_error(logits, model(tokens)[0]) < TOLERANCE[torch.float64]


@torch.no_grad()
def test_transformer_sees_its_window_and_nothing_before():
    config = ModelConfig(
        architecture="transformer", vocab_size=23, embed_dim=12, num_heads=3, num_layers=1, max_seq_len=5
    )
    model, tokens = make_model(config), make_tokens(1, 12)
    other = tokens.clone()
    other[0, 3] = (other[0, 3] + 1) % 23
    changed = (model(tokens)[0] != model(other)[0]).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


@torch.no_grad()
def test_rope_depends_on_distance_only():
    """Attention of a text that starts at position 10**6 is that of a text that starts at 0."""
    config = ModelConfig(architecture="transformer", vocab_size=23, embed_dim=12, num_heads=3, max_seq_len=64)
    model, tokens = make_model(config), make_tokens(2, 9)
    late = model.initial_state(2)
    # Position 10**6 with nothing cached: no earlier token is visible, only the angles differ.
    late["position"] += 10**6
    assert relative_error(model(tokens, late)[0], model(tokens)[0]) < 1e-8  # angles of 1e6 rad hold 1e-10 in float64


@pytest.mark.parametrize("norm", ["state", "output", None])
@torch.no_grad()
def test_enough_hops_are_the_full_cell(norm):
    """After K hops the first K - 1 contexts are exact, so T + 1 hops of one layer equal coupling="full"."""
    T = 6
    settings = {"vocab_size": 23, "embed_dim": 10, "hidden_dim": 14, "context_dim": 9, "num_layers": 1, "norm": norm}
    full = make_model(ModelConfig(**settings, coupling="full"))
    tokens = make_tokens(2, T)
    want = full(tokens)[0]
    for hops, exact_steps in [(3, 2), (T + 1, T)]:
        model = make_model(ModelConfig(**settings, coupling="hops", hops=hops))
        model.load_state_dict(full.state_dict())
        got = model(tokens)[0]
        assert relative_error(got[:, :exact_steps], want[:, :exact_steps]) < TOLERANCE[torch.float64]
        if exact_steps < T:
            assert relative_error(got[:, exact_steps:], want[:, exact_steps:]) > 1e-6


@pytest.mark.parametrize("name", WALK)
def test_gradients_through_a_carried_state_are_those_of_the_whole(name):
    model, tokens = make_model(WALK[name]), make_tokens(2, 9)
    weights = torch.randn(2, 9, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(sizes):
        logits, _ = feed(model, tokens, sizes)
        return torch.autograd.grad((logits * weights).sum(), list(model.parameters()))

    for (key, _), got, want in zip(model.named_parameters(), gradients([4, 5]), gradients([9]), strict=True):
        assert (got - want).norm() <= 1e-10 * want.norm(), (
            key
        )  # one order above the logits: a backward of the same length


@pytest.mark.parametrize("name", ["newllm-full-norm_state-fnn1", "newllm-hops2-norm_output-fnn1"])
def test_detached_state_cuts_the_gradient(name):
    model, tokens = make_model(WALK[name]), make_tokens(2, 9)
    state = detach_state(model(tokens)[1])
    assert not any(value.requires_grad for value in state.values())
    logits, _ = model(tokens, state)
    logits.sum().backward()
    starts = [p.grad for key, p in model.named_parameters() if key.endswith("start")]
    assert starts
    assert all(grad is None for grad in starts)  # the start lies before the seam
