"""The trainer: gradients, carried contexts, evaluation, and runs that go on to the last digit."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading

import numpy as np
import pytest
import torch
import torch._dynamo

from newllm import checkpoint
from newllm.config import ModelConfig
from newllm.data import Segment
from newllm.errors import UserError
from newllm.evaluation import Score, evaluate
from newllm.model.recall import TABLES
from newllm.run import Run
from newllm.training import Trainer
from newllm.training_config import TrainingConfig

VOCAB = 17
MODEL = ModelConfig(
    vocab_size=VOCAB, embed_dim=12, hidden_dim=16, context_dim=12, num_layers=2, ffn_dim=16, fnn_layers=0, dropout=0.1
)
FULL = dataclasses.replace(MODEL, coupling="full", norm="state")
TRANSFORMER = dataclasses.replace(MODEL, architecture="transformer", num_heads=2, max_seq_len=8)
CONFIG = TrainingConfig(
    steps=12, batch_size=4, segment=8, lr=1e-2, warmup=3, eval_every=4, eval_tokens=64, checkpoint_every=5, log_every=2,
    device="cpu", threads=1,
)  # fmt: skip


def text(n=400, seed=0):
    """Tokens with a rule: mostly the last one plus 3."""
    random = np.random.default_rng(seed)
    steps = np.where(random.random(n) < 0.8, 3, random.integers(VOCAB, size=n))
    return (np.cumsum(steps) % VOCAB).astype(np.uint16)


def trainer(folder, model=MODEL, **changes):
    run = Run(folder)
    run.path.mkdir(exist_ok=True)
    return Trainer(run, model, dataclasses.replace(CONFIG, **changes), text(), text(100, seed=1))


def weights(of):
    return {name: p.detach().clone() for name, p in of.model.named_parameters()}


def losses(run):
    """The records without what differs from run to run: the clock."""
    timings = ("tokens_per_s", "elapsed_s")
    return [{key: value for key, value in record.items() if key not in timings} for record in run.metrics()]


def test_the_loss_falls(tmp_path):
    one = trainer(tmp_path, steps=150, log_every=25, eval_every=150)
    one.train()
    curve = [record["loss"] for record in one.run.metrics() if "loss" in record]
    # The rule leaves ln(5) of noise at most; a model that learnt nothing stays at ln(17) = 2.83.
    assert curve[0] > 2.4
    assert curve[-1] < 1.9


def test_logs_evaluations_and_checkpoints_come_when_they_should(tmp_path):
    one = trainer(tmp_path)
    saved = []
    real = one.save
    one.save = lambda: (saved.append(one.step), real())
    one.train()
    records = one.run.metrics()
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if "valid_loss" in r] == [4, 8, 12]
    assert saved == [5, 10, 12]
    lines = one.run.metrics_file.read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    first = records[0]
    assert first["lr"] == pytest.approx(CONFIG.lr * 2 / 3)
    assert first["tokens"] == 2 * 4 * 8
    assert first["grad_norm"] > 0
    assert first["tokens_per_s"] > 0
    assert first["elapsed_s"] > 0


def test_full_cells_tell_their_passes_and_seams(tmp_path, monkeypatch):
    """As where the solver takes chunks of time; of the validation between two logs by itself."""
    from newllm.model.mixer import ContextCell

    full = ContextCell.full

    def in_chunks(self, from_x, c, reading):
        return full(self, from_x, c, reading, chunks=2 if self.training else 4, passes=4, tolerance=1e-9)

    monkeypatch.setattr(ContextCell, "full", in_chunks)
    one = trainer(tmp_path, FULL)
    one.train()
    logs, scores = ([r for r in one.run.metrics() if key in r] for key in ("loss", "valid_loss"))
    assert all(r["passes"] == 2 and 0 <= r["seam_mismatch"] <= 1e-9 for r in logs)
    assert all(3 <= r["valid_passes"] <= 4 and 0 <= r["valid_seam_mismatch"] <= 1e-8 for r in scores)
    other = trainer(tmp_path / "none")
    other.train(stop_after=2)
    assert [r.get("passes") for r in other.run.metrics()] == [None]


def test_best_checkpoint_is_the_one_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    scores = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr("newllm.training.evaluate", lambda *args, **kwargs: Score(next(scores), 63))
    kept = {}
    one = trainer(tmp_path)
    real = one._evaluate
    monkeypatch.setattr(one, "_evaluate", lambda bar: (kept.update({one.step: weights(one)}), real(bar)))
    one.train()
    tensors, info = checkpoint.load(one.run.best_file)
    assert info == {"step": 8, "valid_loss": 2.0}
    best = checkpoint.with_prefix("model", tensors)
    assert all(torch.equal(best[name], value) for name, value in kept[8].items())
    assert not all(torch.equal(best[name], value) for name, value in kept[12].items())


def batches_of(one, batches):
    """Let a trainer read these (inputs, targets), each the start of a text, instead of its streams'."""
    one.streams.next = (Segment(n, x.shape[1], True) for n, (x, _) in enumerate(batches)).__next__
    one.streams.window = lambda offset, length: batches[int(offset)]
    return one


def gradients_of(one):
    """Of one step, before clipping; the step itself is not taken."""
    one.optimizer.step = lambda: None
    one.optimizer.zero_grad = lambda set_to_none: None
    one.train(1)
    return {name: p.grad.clone() for name, p in one.model.named_parameters()}


@pytest.mark.parametrize("model", [MODEL, FULL, TRANSFORMER], ids=["none", "full", "transformer"])
def test_accumulated_gradients_are_those_of_the_bigger_batch(tmp_path, model):
    model = dataclasses.replace(model, dropout=0.0)  # drawn per pass: no two batch shapes draw alike
    tokens = torch.randint(VOCAB, (8, 9), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    no_clip = {"clip": 1e9}
    whole = gradients_of(batches_of(trainer(tmp_path / "whole", model, **no_clip), [(x, y)]))
    parts = gradients_of(batches_of(trainer(tmp_path / "parts", model, grad_accum=2, **no_clip), halves))
    for name, want in whole.items():
        # float32 sums in another order: some 1e-7 a term, 1e-5 after a dozen layers of them.
        assert (parts[name] - want).norm() <= 1e-5 * want.norm() + 1e-8, name


def test_gradients_are_clipped_to_the_norm(tmp_path):
    one = trainer(tmp_path, clip=0.01)
    one.optimizer.step = lambda: None
    one.optimizer.zero_grad = lambda set_to_none: None
    one.train(1)
    total = torch.stack([p.grad.norm() for p in one.model.parameters()]).norm().item()
    assert total == pytest.approx(0.01, rel=1e-3)  # PyTorch adds 1e-6 to the norm it divides by
    assert one.weights.grad_norm > 0.05  # what is logged is the norm before


def test_some_streams_begin_a_segment_anew(tmp_path):
    one = trainer(tmp_path, segment=8, batch_size=4, restart=0.5)
    seen = []
    features = one.weights.computing.features
    one.forward = lambda tokens, state=None: seen.append(state) or features(tokens, state)
    one.train(stop_after=12)
    assert seen[0] is None
    for (name, value), anew in ((item, one.model.initial_state(4)) for state in seen[1:] for item in state.items()):
        assert value.requires_grad  # the start is learned
        assert value.shape == anew[name].shape
    starts = [
        torch.equal(state[name][b], state[name][a]) for state in seen[1:] for name in state for a, b in [(0, 1), (2, 3)]
    ]
    assert 0 < sum(starts) < len(starts)  # rows are alike only where both began anew
    always = trainer(tmp_path / "always", segment=8, batch_size=4, restart=1.0)
    always.forward = lambda tokens, state=None: seen.append(state) or always.weights.computing.features(tokens, state)
    always.train(stop_after=3)
    for state in seen[-2:]:
        assert all(torch.equal(value, value[:1].expand_as(value)) for value in state.values())


def test_the_context_is_carried_from_segment_to_segment(tmp_path):
    """The loss of the second step is that of a model that has read the first segment, and no gradient crosses the seam."""
    model = dataclasses.replace(FULL, dropout=0.0)
    one = trainer(tmp_path, model, lr=1e-30)  # weights stay as they are
    seen = []
    real = one.forward

    def forward(tokens, state):
        seen.append((tokens, state and {name: value.clone() for name, value in state.items()}))
        return real(tokens, state)

    one.forward = forward
    one.train(2)
    (first, start), (second, carried) = seen
    assert start is None
    _, state = one.model(first, None)
    assert carried.keys() == state.keys()
    for name, want in state.items():
        assert torch.equal(carried[name], want.detach())
        assert not carried[name].requires_grad
        assert not torch.equal(carried[name], one.model.initial_state(4)[name])
    logits, _ = one.model(torch.cat((first, second), dim=1), None)
    assert torch.allclose(one.model(second, carried)[0], logits[:, 8:], atol=1e-5)  # float32, sixteen steps


def test_the_context_starts_afresh_with_every_epoch(tmp_path):
    one = trainer(tmp_path)
    states = []
    real = one.forward
    one.forward = lambda tokens, state: (states.append(state), real(tokens, state))[1]
    per_epoch = one.streams.segments_per_epoch
    assert per_epoch == 12
    one.config = dataclasses.replace(one.config, steps=26)
    one.train()
    assert [step for step, state in enumerate(states) if state is None] == [0, 12, 24]


def test_a_transformer_starts_every_segment_afresh(tmp_path):
    one = trainer(tmp_path, TRANSFORMER)
    states = []
    real = one.forward
    one.forward = lambda tokens, state: (states.append(state), real(tokens, state))[1]
    one.train(3)
    assert states == [None, None, None]
    assert one.state is None


def test_a_transformer_carries_its_tables_of_recall(tmp_path):
    """And attention begins afresh: nothing else is handed on."""
    one = trainer(tmp_path, dataclasses.replace(TRANSFORMER, recall=50))
    states = []
    real = one.forward
    one.forward = lambda tokens, state: (
        states.append(state and {k: v.clone() for k, v in state.items()}),
        real(tokens, state),
    )[1]
    one.train(3)
    assert states[0] is None
    assert all(state.keys() == set(TABLES) for state in states[1:])
    assert all((state["recall.entries"] >= 0).any() for state in states[1:])
    assert not torch.equal(states[1]["recall.entries"], states[2]["recall.entries"])


@pytest.mark.parametrize(
    "model",
    [MODEL, FULL, TRANSFORMER, *(dataclasses.replace(m, recall=50, recall_dropout=0.2) for m in (MODEL, TRANSFORMER))],
    ids=["none", "full", "transformer", "recall", "transformer-recall"],
)
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path, model, stop):
    """Stopped between logs (3), at a checkpoint (5), in the second half; dropout and grad_accum on."""
    straight = trainer(tmp_path / "straight", model, grad_accum=2)
    straight.train()

    first = trainer(tmp_path / "resumed", model, grad_accum=2)
    first.train(stop)
    assert first.step == stop
    torch.manual_seed(99)  # another process: nothing in memory is as it was
    second = trainer(tmp_path / "resumed", model, grad_accum=2)
    second.load()
    assert second.step == stop
    second.train()

    assert losses(second.run) == losses(straight.run)
    for name, want in weights(straight).items():
        assert torch.equal(weights(second)[name], want), name
    for file in ("last_file", "best_file"):
        got, want = (checkpoint.load(getattr(of.run, file))[0] for of in (second, straight))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], value) for name, value in want.items())


def test_records_after_the_checkpoint_are_dropped_on_resuming(tmp_path):
    one = trainer(tmp_path)
    one.train(5)
    before = one.run.metrics()
    one.run.append_metrics({"step": 6, "loss": 1.0})
    with open(one.run.metrics_file, "a") as file:
        file.write('{"step": 7, "lo')  # cut by a kill
    trainer(tmp_path).load()
    assert Run(tmp_path).metrics() == before


def test_another_text_is_refused_on_resuming(tmp_path):
    trainer(tmp_path).train(1)
    other = Trainer(Run(tmp_path), MODEL, CONFIG, text(seed=7), text(100, seed=1))
    with pytest.raises(UserError, match=r"the data is not what this run was trained on.*put it back"):
        other.load()


def test_weights_alone_are_no_training_to_go_on_with(tmp_path):
    one = trainer(tmp_path)
    one.train(4)
    one.run.last_file.write_bytes(one.run.best_file.read_bytes())
    with pytest.raises(UserError, match="not the state of a training"):
        trainer(tmp_path).load()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_diverged_model_never_replaces_a_good_checkpoint(tmp_path, where):
    one = trainer(tmp_path, log_every=100, eval_every=100)
    one.train(5)
    good = one.run.last_file.read_bytes()
    parameter = next(one.model.parameters())
    if where == "loss":
        parameter.data.fill_(math.nan)
    else:  # the loss of this step is fine, the weights it leaves are not
        parameter.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(UserError, match=r"diverged.*Lower --lr"):
        one.train(1)
    assert one.run.last_file.read_bytes() == good


def test_penalties_are_added_to_the_objective_and_not_to_the_loss_that_is_logged(tmp_path):
    model = dataclasses.replace(MODEL, dropout=0.0)
    plain = trainer(tmp_path / "plain", model, clip=1e9)
    both = trainer(tmp_path / "both", model, clip=1e9, activation_penalty=2.0, change_penalty=3.0)
    gradients = gradients_of(plain)
    features = plain.forward(plain.streams.window(0, 8)[0], None)[0]
    penalty = 2 * features.square().mean() + 3 * features.diff(dim=1).square().mean()
    wanted = torch.autograd.grad(penalty, list(plain.model.parameters()), allow_unused=True)
    got = gradients_of(both)
    for (name, gradient), more in zip(gradients.items(), wanted, strict=True):
        torch.testing.assert_close(got[name], gradient if more is None else gradient + more, rtol=1e-4, atol=1e-6)
    assert both._loss_sum == plain._loss_sum


def test_shorter_segments_take_shorter_steps(tmp_path):
    one = trainer(tmp_path, random_segments=True, segment=16, steps=40, warmup=0, schedule="constant")
    rates = []
    real = one._segment
    one._segment = lambda segment, first: (rates.append(segment.length), real(segment, first))
    lengths = []
    update = one.weights.update
    one.weights.update = lambda averaged: (lengths.append(one.optimizer.param_groups[0]["lr"]), update(averaged))
    one.train()
    assert len(set(rates)) > 2
    assert lengths == pytest.approx([CONFIG.lr * length / 16 for length in rates])
    assert one.tokens == 4 * sum(rates)


def test_minutes_end_a_session_which_goes_on_to_the_same_end(tmp_path, monkeypatch):
    straight = trainer(tmp_path / "straight")
    straight.train()
    clock = iter(range(10_000))
    with monkeypatch.context() as patch:
        patch.setattr("newllm.training.time.monotonic", lambda: float(next(clock)))  # a second passes at every look
        first = trainer(tmp_path / "parts")
        assert first.train(max_minutes=0.1) is None
    assert 0 < first.step < 12
    assert first.step == checkpoint.load(first.run.last_file)[1]["step"]
    second = trainer(tmp_path / "parts")
    second.load()
    second.train(max_minutes=60)
    assert second.step == 12
    assert losses(second.run) == losses(straight.run)
    assert all(torch.equal(weights(second)[name], want) for name, want in weights(straight).items())


def test_one_compiled_layer_serves_all_and_only_training(tmp_path, monkeypatch):
    """Traced, not compiled: what would cost time is counted. Epochs of 12 steps, so the start of a text comes twice."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = dataclasses.replace(MODEL, num_layers=3, dropout=0.0)
    compiled = trainer(tmp_path / "compiled", model, steps=30, compile=True)
    compiled.train()
    assert counters["stats"]["unique_graphs"] == 1
    eager = trainer(tmp_path / "eager", model, steps=30)
    eager.train()
    for key in ("loss", "valid_loss"):
        curves = [[r[key] for r in of.run.metrics() if key in r] for of in (compiled, eager)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-5)  # the same operations


def test_the_average_is_what_is_scored_and_kept(tmp_path):
    one = trainer(tmp_path, average=1.0, average_start=6)
    one.train()
    best = checkpoint.with_prefix("model", checkpoint.load(one.run.best_file)[0])
    mean = checkpoint.model_tensors(one.weights.average)
    score = evaluate(one.weights.average, one.valid, limit=64)
    assert [r["valid_loss"] for r in one.run.metrics() if "valid_loss" in r][-1] == score.loss
    assert score.loss == one.best_loss
    assert all(torch.equal(best[name], value) for name, value in mean.items())
    assert not all(torch.equal(best[name], value) for name, value in weights(one).items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop_and_handlers_are_put_back(tmp_path, number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    one = trainer(tmp_path)
    real = one._train_step
    one._train_step = lambda: (real(), signal.raise_signal(number) if one.step == 3 else None)
    assert one.train() == number
    assert one.step == checkpoint.load(one.run.last_file)[1]["step"] == 3
    assert {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} == before


def test_a_second_signal_stops_at_once(tmp_path):
    one = trainer(tmp_path)
    one._train_step = lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        one.train()


def test_training_works_outside_the_main_thread(tmp_path):
    one = trainer(tmp_path)
    thread = threading.Thread(target=one.train)
    thread.start()
    thread.join()
    assert one.step == CONFIG.steps


@pytest.mark.parametrize("model", [MODEL, FULL, TRANSFORMER], ids=["none", "full", "transformer"])
def test_bfloat16_computes_with_a_copy_of_float32_weights(tmp_path, model):
    one = trainer(tmp_path, model, precision="bfloat16", steps=4)
    seen = []
    real = one.forward
    one.forward = lambda tokens, state: (lambda out: (seen.append(out), out)[1])(real(tokens, state))
    one.train()
    assert all(x.dtype == torch.bfloat16 for x, _ in seen)
    if model.architecture != "transformer":
        assert all(value.dtype == torch.float32 for _, state in seen for value in state.values())
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in one.model.parameters())
    computing = one.weights.computing
    assert computing.head.weight is computing.embedding.weight
    for low, p in zip(computing.parameters(), one.model.parameters(), strict=True):
        assert torch.equal(low, p.to(low.dtype))
    assert {low.dtype for low in computing.parameters()} == {torch.bfloat16, torch.float32}
    # The best checkpoint is what was evaluated, at half the size.
    best = checkpoint.with_prefix("model", checkpoint.load(one.run.best_file)[0])
    assert best["embedding.weight"].dtype == torch.bfloat16


def test_bfloat16_gradients_are_those_of_float32_but_for_rounding(tmp_path):
    """Some ten layers of rounding to 8 bits: a few percent, as the forward (tests/model)."""
    model = dataclasses.replace(FULL, dropout=0.0)
    exact = gradients_of(trainer(tmp_path / "exact", model, clip=1e9))
    low = gradients_of(trainer(tmp_path / "low", model, clip=1e9, precision="bfloat16"))
    total = sum((low[name] - want).square().sum() for name, want in exact.items()).sqrt()
    assert total < 0.05 * sum(want.square().sum() for want in exact.values()).sqrt()
