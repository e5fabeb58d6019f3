"""What every architecture owes: causality, gradients, honest errors, NaN that shows, autocast, compile, checkpoints."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from configs import RECURRENT, SMALL, VOCAB, WALK, make_model, make_tokens

from newllm.config import ModelConfig
from newllm.model import build_model, stack_states, state_bytes
from newllm.model.common import init_linear

ONE_OF_EACH = [
    "newllm-none-norm_output-fnn0",
    "newllm-hops2-norm_output-fnn1",
    "newllm-full-norm_state-fnn1",
    "classic-full-norm_state-fnn1",
    "classic-hops3-norm_output-fnn2",
    "transformer-window5",
    "transformer-window64",
]


@pytest.mark.parametrize("name", WALK)
@torch.no_grad()
def test_a_future_token_never_changes_past_logits(name):
    model, tokens = make_model(WALK[name]), make_tokens(2, 11)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7] != after[:, 7]).any(dim=-1).all()  # and the present one does


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_an_early_token_is_remembered(name):
    model, tokens = make_model(RECURRENT[name]), make_tokens(2, 11)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    difference = (model(tokens)[0][:, -1] - model(changed)[0][:, -1]).abs().amax(dim=-1)
    assert (difference > 1e-9).all()


@pytest.mark.parametrize("name", WALK)
@torch.no_grad()
def test_rows_of_a_batch_do_not_touch_each_other(name):
    model, tokens = make_model(WALK[name]), make_tokens(3, 8)
    whole = model(tokens)[0]
    for row in range(3):
        alone = model(tokens[row : row + 1])[0]
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", WALK)
def test_every_parameter_gets_a_gradient(name):
    model = make_model(WALK[name]).train()
    tokens = make_tokens(3, 9)
    logits, _ = model(tokens)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", WALK)
def test_fresh_weights_give_a_near_uniform_loss(name):
    """The loss of an untrained model is near log V, so that training starts by learning and not by unlearning."""
    torch.manual_seed(0)
    config = dataclasses.replace(WALK[name], vocab_size=512, embed_dim=48, num_heads=3, hidden_dim=64, context_dim=32)
    tokens = torch.randint(512, (4, 32))
    logits, _ = build_model(config).eval()(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - torch.tensor(512.0).log().item()) < 0.6  # unit-variance logits cost 1/2


@pytest.mark.parametrize("name", RECURRENT)
def test_forget_biases_are_spread_and_the_start_has_unit_variance(name):
    torch.manual_seed(0)
    config = dataclasses.replace(RECURRENT[name], context_dim=400)
    model = build_model(config)
    cells = [module for module in model.modules() if type(module).__name__ == "ContextCell"]
    assert len(cells) == (config.num_layers if config.architecture == "newllm" else 1)
    for cell in cells:
        bias = (cell.to_gates or cell.from_x).bias
        torch.testing.assert_close(bias[:400], torch.linspace(0, 4, 400))
        assert (bias[400:] == 0).all()
        assert 0.8 < cell.start.var() < 1.2  # the variance of 400 draws is good to 7%


@pytest.mark.parametrize("name", ["newllm-none-norm_output-fnn0", "transformer-window64"])
@torch.no_grad()
def test_blocks_begin_as_the_identity(name):
    model, tokens = build_model(WALK[name]), make_tokens(2, 6)
    want = model.head(model.final_norm(model.embedding(tokens)))
    assert torch.equal(model(tokens)[0], want)


def test_init_linear_keeps_the_variance_of_its_input():
    torch.manual_seed(0)
    linear = torch.nn.Linear(300, 400)
    init_linear(linear)
    assert linear(torch.randn(200, 300)).var().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_dropout_acts_in_training_only(name):
    tokens = make_tokens(2, 6)
    model = make_model(dataclasses.replace(WALK[name], dropout=0.5))
    plain = make_model(WALK[name])
    assert torch.equal(model(tokens)[0], plain(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_nan_in_a_state_shows_in_its_row_and_in_no_other(name):
    model, tokens = make_model(WALK[name]), make_tokens(3, 4)
    _, state = model(tokens)
    for key, value in state.items():
        if key != "position":
            value[1] = float("nan")
    logits, _ = model(tokens, state)
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


@torch.no_grad()
def test_padding_of_stacked_caches_is_never_read():
    """NaN in a key-value cache's padding would show: masked values still enter 0 * NaN. Hence zeros, checked here."""
    model = make_model(WALK["transformer-window64"])
    long, short = make_tokens(1, 9), make_tokens(1, 4, seed=3)
    state = stack_states([model(long)[1], model(short)[1]])
    assert (state["layers.0.keys"][1, :, :5] == 0).all()
    assert state["position"].tolist() == [9, 4]
    for key in ("layers.0.keys", "layers.1.keys"):
        state[key][1, :, :5] = 1e3  # any finite value does: the mask takes these keys out
    step = make_tokens(2, 1, seed=4)
    got = model(step, state)[0]
    for row, prompt in enumerate((long, short)):
        want = model(torch.cat((prompt, step[row : row + 1]), dim=1))[0][:, -1:]
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_stacked_states_give_what_each_gives_alone(name):
    model = make_model(WALK[name])
    prompts = [make_tokens(1, T, seed=T) for T in (3, 11, 7)]
    alone = [model(prompt)[1] for prompt in prompts]
    step = make_tokens(3, 2, seed=5)
    together, _ = model(step, stack_states(alone))
    for row in range(3):
        want, _ = model(step[row : row + 1], alone[row])
        torch.testing.assert_close(together[row : row + 1], want, rtol=1e-11, atol=1e-11)


def test_state_bytes_counts_every_tensor():
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.int64), "c": torch.zeros(0, dtype=torch.float64)}
    assert state_bytes(state) == 24 + 16


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_wrong_inputs_raise_and_say_what_was_wanted(name):
    model = make_model(WALK[name])
    tokens = make_tokens(2, 4)
    for bad in (tokens[0], tokens[:, :0], tokens.int(), tokens.double()):
        with pytest.raises(ValueError, match="tokens: got"):
            model(bad)
    state = model(tokens)[1]
    with pytest.raises(ValueError, match="holds 2 rows, tokens 1"):
        model(tokens[:1], state)
    with pytest.raises(ValueError, match=r"layers\.99\.context"):
        model(tokens, {**state, "layers.99.context": tokens})


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16_autocast_trains_and_carries_float32(name):
    """Logits in bfloat16 (8 bits) through some ten layers of rounding: within 5% of float32, and finite gradients."""
    model, tokens = make_model(WALK[name], torch.float32), make_tokens(3, 9)
    want, _ = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model(tokens)
        again, _ = model(tokens, state)
    assert (logits.float() - want).norm() < 0.05 * want.norm()
    assert again.isfinite().all()
    if model.carries_context:
        assert all(value.dtype == torch.float32 for value in state.values())
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_golden_property_under_bfloat16_autocast(name):
    """Kept to bfloat16's rounding (4e-3) times the few times it strikes: the state itself is not rounded on the way."""
    model, tokens = make_model(WALK[name], torch.float32), make_tokens(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, _ = model(tokens)
        state, pieces = None, []
        for t in range(12):
            logits, state = model(tokens[:, t : t + 1], state)
            pieces.append(logits)
    assert (torch.cat(pieces, dim=1).float() - whole.float()).norm() < 0.03 * whole.float().norm()


@pytest.mark.parametrize(
    "name", ["newllm-none-norm_output-fnn0", "classic-full-norm_state-fnn1", "transformer-window5"]
)
def test_compiles_without_graph_breaks(name):
    """Tracing is what can fail here, so the traced graph runs in eager kernels: no C++ compiler in the loop."""
    model, tokens = make_model(WALK[name], torch.float32), make_tokens(2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, want_state = model(tokens)
    got, state = compiled(tokens)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(state, want_state)
    got.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_weights_go_through_a_state_dict(name):
    model, other = make_model(WALK[name]), make_model(WALK[name], seed=9)
    tokens = make_tokens(2, 5)
    assert not torch.equal(model(tokens)[0], other(tokens)[0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens)[0], other(tokens)[0])


def test_tied_embeddings_are_one_matrix_counted_once():
    tied, untied = (build_model(ModelConfig(**SMALL, tie_embeddings=tie)) for tie in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == VOCAB * SMALL["embed_dim"]


def test_only_the_transformer_starts_every_segment_afresh():
    carries = {config.architecture: build_model(config).carries_context for config in WALK.values()}
    assert carries == {"newllm": True, "classic": True, "transformer": False}
