"""ContextRNN: the manners of torch.nn.LSTM, and the values of the cell it is made of."""

from __future__ import annotations

import io
import math

import pytest
import torch
from cases import relative_error
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import newllm_kernels as nk
from newllm_kernels.recurrent_context import reference

E, H, D, LAYERS = 5, 12, 7, 2
CLOSE = 1e-12  # float64: only the order of additions differs


def network(**options):
    rnn = nk.ContextRNN(E, H, D, LAYERS, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in rnn.parameters():
            p.add_(0.1 * torch.randn_like(p))  # what begins as zero or one hides mistakes
    return rnn


def by_hand(rnn, x, state):
    """The formula in plain PyTorch: x (N, T, E), state (layers, N, D)."""
    ends = []
    for layer, c in zip(rnn.layers, state, strict=True):
        W = torch.cat((layer.from_input.weight, layer.context_weight), dim=1)
        outputs = []
        for x_t in x.unbind(1):
            read = layer.norm(c).clamp(-10, 10) if layer.norm_kind == "output" else c
            a = nn.functional.linear(torch.cat((x_t, read), dim=-1), W, layer.from_input.bias)
            activate = {"silu": nn.functional.silu, "relu": torch.relu}[layer.activation]
            for k in range(0 if layer.hidden_weight is None else len(layer.hidden_weight)):
                a = nn.functional.linear(activate(a), layer.hidden_weight[k], layer.hidden_bias[k])
            f, i, d = (a if layer.gates is None else layer.gates(activate(a))).chunk(3, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * d.tanh()
            c = layer.norm(c).clamp(-10, 10) if layer.norm_kind == "state" else c
            outputs.append(c)
        x = torch.stack(outputs, dim=1)
        ends.append(c)
    return x, torch.stack(ends)


@pytest.mark.parametrize("norm", reference.NORMS, ids=str)
@pytest.mark.parametrize("fnn_layers", [0, 1, 3])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_formula(fnn_layers, norm, activation):
    rnn = network(fnn_layers=fnn_layers, norm=norm, activation=activation, batch_first=True)
    x = torch.randn(3, 9, E, dtype=torch.float64)
    output, state = rnn(x)
    want, want_state = by_hand(rnn, x, rnn.initial_state(3))
    assert relative_error(output, want.detach()) < CLOSE
    assert relative_error(state, want_state.detach()) < CLOSE
    got = torch.autograd.grad(output.square().sum() + state.sum(), list(rnn.parameters()))
    grads = torch.autograd.grad(want.square().sum() + want_state.sum(), list(rnn.parameters()))
    for (name, _), x, y in zip(rnn.named_parameters(), got, grads, strict=True):
        assert (x - y).norm() <= 1e-9 * y.norm() + 1e-12, name


@pytest.mark.parametrize("norm", reference.NORMS, ids=str)
@pytest.mark.parametrize("fnn_layers", [0, 1, 3])
def test_single_steps_are_the_whole(fnn_layers, norm):
    rnn = network(fnn_layers=fnn_layers, norm=norm, batch_first=True)
    x = torch.randn(2, 6, E, dtype=torch.float64)
    want, end = rnn(x)
    state, outputs = None, []
    for x_t in x.split(1, dim=1):
        output, state = rnn(x_t, state)
        outputs.append(output)
    assert relative_error(torch.cat(outputs, dim=1), want.detach()) < CLOSE
    assert relative_error(state, end.detach()) < CLOSE


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, E), (4, E), (1, 3, E)], ids=str)
def test_shapes_are_those_of_lstm(shape, batch_first):
    theirs = nn.LSTM(E, D, LAYERS, batch_first=batch_first)
    ours = nk.ContextRNN(E, H, D, LAYERS, batch_first=batch_first)
    x = torch.randn(shape)
    want, (want_state, _) = theirs(x)
    output, state = ours(x)
    assert output.shape == want.shape
    assert state.shape == want_state.shape
    again, _ = ours(x, state)
    assert again.shape == want.shape
    assert not torch.equal(again, output)


def test_batch_first_and_no_batch_are_the_same_network():
    first, second = network(batch_first=True), network()
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 6, E, dtype=torch.float64)
    want, end = first(x)
    output, state = second(x.transpose(0, 1))
    assert torch.equal(output, want.transpose(0, 1))
    assert torch.equal(state, end)
    alone, alone_state = second(x[1])
    assert relative_error(alone, want[1].detach()) < CLOSE
    assert relative_error(alone_state, end[:, 1].detach()) < CLOSE
    assert relative_error(second(x[1], end[:, 1])[1], first(x, end)[1][:, 1].detach()) < CLOSE


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences(with_state):
    """Each sequence as if it were alone: outputs, its own last state, gradients; in any order, several of one length."""
    rnn = network()
    lengths = [4, 9, 1, 4, 7]
    sequences = [torch.randn(n, E, dtype=torch.float64, requires_grad=True) for n in lengths]
    start = torch.randn(LAYERS, len(lengths), D, dtype=torch.float64) if with_state else None
    output, state = rnn(pack_sequence(sequences, enforce_sorted=False), start)
    padded, got_lengths = pad_packed_sequence(output)
    assert got_lengths.tolist() == lengths
    loss = output.data.square().sum() + state.square().sum()
    grads = torch.autograd.grad(loss, sequences)
    for n, x in enumerate(sequences):
        alone, end = rnn(x, None if start is None else start[:, n])
        assert relative_error(padded[: lengths[n], n], alone.detach()) < CLOSE
        assert relative_error(state[:, n], end.detach()) < CLOSE
        (grad,) = torch.autograd.grad(alone.square().sum() + end.square().sum(), x)
        assert relative_error(grads[n], grad) < 1e-10


def test_packing_is_taken_as_lstm_takes_it():
    theirs, ours = nn.LSTM(E, D, LAYERS), nk.ContextRNN(E, H, D, LAYERS)
    packed = pack_padded_sequence(torch.randn(6, 3, E), torch.tensor([2, 6, 3]), enforce_sorted=False)
    want, (want_state, _) = theirs(packed)
    output, state = ours(packed)
    assert state.shape == want_state.shape
    for x, y in zip(output[1:], want[1:], strict=True):
        assert torch.equal(x, y)


def test_dropout_is_between_layers_and_in_training_only():
    rnn = network(dropout=0.5, batch_first=True)
    x = torch.randn(2, 5, E, dtype=torch.float64)
    assert not torch.equal(rnn(x)[0], rnn(x)[0])
    assert torch.equal(rnn(x)[1][0], rnn(x)[1][0])  # the first layer is not touched
    rnn.eval()
    assert torch.equal(rnn(x)[0], rnn(x)[0])
    assert (rnn.train()(x)[0] != 0).all()  # nor is what comes out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    rnn = nk.ContextRNN(E, H, D, dtype=dtype)
    for T in (1, 4):
        output, state = rnn(torch.randn(T, 2, E, dtype=dtype))
        assert output.dtype == dtype
        assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        output.float().sum().backward()
    assert all(p.grad.dtype == dtype for p in rnn.parameters())


def test_autocast():
    rnn, x = nk.ContextRNN(E, H, D, LAYERS), torch.randn(4, 2, E)
    want, _ = rnn(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = rnn(x)
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(output, want.detach().double()) < 3e-2  # bfloat16 weights and inputs, 2^-9 each, in a loop
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in rnn.parameters())


def test_state_dict_goes_to_a_file_and_back():
    first, second = network(fnn_layers=2), network(fnn_layers=2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 2, E, dtype=torch.float64)
    assert torch.equal(first(x)[0], second(x)[0])


def test_starts_with_unit_variance_and_spread_memories():
    rnn = nk.ContextRNN(64, 128, 256, num_layers=2)
    for layer in rnn.layers:
        assert 0.8 < layer.start.std() < 1.2
        assert layer.gates.bias[:256].tolist() == torch.linspace(0.0, 4.0, 256).tolist()
    output, _ = rnn(torch.randn(20, 3, 64))
    assert 0.9 < output.std() < 1.1  # LayerNorm in the loop


def test_compiles_whole():
    rnn, x = network(batch_first=True), torch.randn(2, 5, E, dtype=torch.float64)
    run = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x)[0], rnn(x)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_size": 0}, "input_size: got 0"),
        ({"context_dim": 2.0}, "context_dim: got 2.0"),
        ({"fnn_layers": -1}, "fnn_layers: got -1"),
        ({"activation": "elu"}, "activation: got 'elu'"),
        ({"norm": "batch"}, "norm: got 'batch'"),
        ({"clamp": 0}, "clamp: got 0"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        nk.ContextRNN(**({"input_size": E, "hidden_dim": H, "context_dim": D} | options))


def test_bad_inputs():
    rnn = nk.ContextRNN(E, H, D, LAYERS)
    for x, words in (([1.0], "x: got list"), (torch.zeros(4, 2, 6), r"x: got \(4, 2, 6\), wanted \(T, N, 5\)")):
        with pytest.raises(ValueError, match=words):
            rnn(x)
    x = torch.zeros(4, 2, E)
    for state in (torch.zeros(LAYERS, 3, D), torch.zeros(2, D)):
        with pytest.raises(ValueError, match=r"state: got .* wanted \(2, 2, 7\)"):
            rnn(x, state)
    with pytest.raises(ValueError, match=r"x: got packed data \(8, 6\)"):
        rnn(pack_sequence([torch.zeros(4, 6), torch.zeros(4, 6)]))


# ---- solvers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sequential", "chunked", "auto"])
def test_solvers_agree(solver):
    rnn = network(batch_first=True)
    other = network(batch_first=True, solver=solver, chunks=4, tolerance=1e-13, passes=12)
    other.load_state_dict(rnn.state_dict())
    x = torch.randn(2, 70, E, dtype=torch.float64)
    with nk.record_seams() as seams:
        output, state = other(x)
    want, end = rnn(x)
    assert relative_error(output, want.detach()) < 1e-10
    assert relative_error(state, end.detach()) < 1e-10
    chunks = {"sequential": 1, "chunked": 4, "auto": 1}[
        solver
    ]  # products take a CPU's time, and chunks do more of them
    assert [x.chunks for x in seams] == [chunks] * LAYERS


def filled_by(rows):
    """A device that computes so many rows in the time of one; a pass costs as much as 25 steps."""
    return lambda *_: (lambda count: -(-count // rows), 25)


def test_auto_goes_by_what_it_has_seen(monkeypatch):
    from newllm_kernels.recurrent_context import solver as module

    monkeypatch.setattr(module, "cost_of_steps", filled_by(128))
    auto, T = module.Solver("auto"), 4096
    z = torch.randn(4, T, 3)

    def call(memory):
        """Of a cell that remembers for so many steps; (chunks, warm-up)."""
        with auto.way(z, 8, 16) as way:
            K, W, most = way["chunks"], way["warm_up"], way["passes"]
            if K > 1:
                W, steps = module.Plan(K, 0.0, 1, W).steps(T)
                needed = 1 + max(0, -(-(memory - W) // steps))
                module.seams.report_known("forward", steps, K, min(most, needed), 0.0, needed > most)
        return K, way["warm_up"]

    assert call(300) == (32, module.GUESSED_MEMORY)  # 128 rows at once
    ways = [call(300) for _ in range(8)]
    assert ways[-1] == ways[-2]  # nothing more to find out
    assert ways[-1][0] == 32
    assert 300 <= ways[-1][1] <= 400
    ways = [call(10**6) for _ in range(8)]  # a cell that never forgets costs few calls
    assert ways[4:] == [(1, 0)] * 4
    for _ in range(module.FORGET_AFTER):  # training goes on, and chunks get another chance
        if call(100)[0] > 1:
            break
    else:
        pytest.fail("never tried again")
    monkeypatch.setattr(module, "cost_of_steps", filled_by(4))  # the batch alone fills the device
    auto = module.Solver("auto")
    assert call(100) == (1, 0)
    full = filled_by(128)()
    assert module.Solver("chunked")._choose(4, 1024, *full)[:2] == (32, module.GUESSED_MEMORY)
    assert module.Solver("chunked", chunks=5, warm_up=7)._choose(4, 1024, *full) == (5, 7, 8)


def test_auto_hears_of_the_adjoint(monkeypatch):
    """Which runs when the call is over, and whose memory may be longer than that of the forward."""
    from newllm_kernels.recurrent_context import solver as module

    rnn = nk.ContextRNN(E, H, D, batch_first=True, solver="auto")
    auto, x = rnn.layers[0].solver, torch.randn(1, 364, E)
    monkeypatch.setattr(auto, "_decide", lambda *_: (6, 64, 8))
    module.adjoints.clear()
    with nk.record_seams() as seams:
        rnn(x)[0].square().sum().backward()
    assert list(module.adjoints.values()) == [(seams[1].passes, seams[1].in_order)]
    for key in module.adjoints:
        module.adjoints[key] = (9, False)
    rnn(x)
    assert (auto.memory.too_few, auto.memory.enough) == (64 + 7 * 50, 64 + 8 * 50)
    assert not module.adjoints


def test_memory_between_bounds():
    from newllm_kernels.recurrent_context.solver import GUESSED_MEMORY, Memory

    memory = Memory()
    assert memory.guess() == GUESSED_MEMORY
    memory.learn(256, 64, passes=3, met=True)
    assert (memory.too_few, memory.enough) == (320, 384)
    memory.learn(64, 16, passes=1, met=True)  # it has become shorter
    assert (memory.too_few, memory.enough, memory.guess()) == (0, 64, 32)
    memory.learn(64, 64, passes=8, met=False)  # and longer than all that was tried
    assert (memory.too_few, memory.guess()) == (512, 1024)
    memory.learn(0, 128, passes=9, met=True)
    assert (memory.too_few, memory.enough, memory.guess()) == (896, 1024, 1024)


@pytest.mark.parametrize("memory", [50, 500, 3000, math.inf])
@pytest.mark.parametrize(("B", "T", "D"), [(1, 16384, 768), (1, 16384, 256), (16, 1024, 256), (16, 1024, 768)])
def test_auto_costs_at_most_a_twentieth_more_than_the_order_of_time(B, T, D, memory):
    """All its trials counted, over the calls between two resets, by the costs it goes by: for a cell that forgets after `memory` steps."""
    from newllm_kernels.recurrent_context import costs
    from newllm_kernels.recurrent_context import solver as module

    cluster = sum(base + 16 * each for base, each in costs.CLUSTER)  # of 16 blocks; seven of them at once on an H100
    at_once, step = {768: (16, sum(costs.MESH[768])), 256: (7 * 16, cluster)}[D]

    def time(rows: int) -> float:
        return min(-(-rows // at_once) * step, costs.steps(D, 2 * D, 1, rows).both)

    auto, in_order, spent = module.Solver("auto"), T * time(B), []
    for _ in range(40):
        K, W, most = auto._choose(B, T, time, costs.PASS.both)
        if K == 1:
            spent.append(in_order)
            continue
        warm_up, steps = module.Plan(K, 0.0, most, W).steps(T)
        needed = 1 + max(0.0, math.ceil((memory - warm_up) / steps)) if memory < math.inf else math.inf
        passes = min(needed, most)
        chunks = warm_up * time(B * K) + passes * (steps * time(B * K) + costs.PASS.both)
        spent.append(chunks + in_order * (needed > most))  # what does not meet goes in order after all
        auto._learn(warm_up, steps, [(passes, needed > most)])
    settled = spent[-1]
    assert settled <= in_order
    assert sum(spent) + (module.FORGET_AFTER - 40) * settled <= 1.05 * module.FORGET_AFTER * in_order


def test_windows_of_several_rows_are_not_copied_without_end():
    from newllm_kernels.recurrent_context import solver as module

    auto = module.Solver("auto")
    auto.memory.learn(2000, 100, passes=1, met=True)
    auto.memory.learn(1000, 950, passes=2, met=True)
    time, overhead = filled_by(1024)()
    found = {}
    for B in (1, 2):
        K, W, _ = auto._choose(B, 16384, time, overhead)
        W, steps = module.Plan(K, 0.0, 1, W).steps(16384)
        found[B] = K, W / steps
    assert found[2][1] <= module.MOST_COPIES < found[1][1]
    assert found[2][0] < found[1][0]


def test_unknown_solver():
    with pytest.raises(ValueError, match="solver: got 'newton', wanted one of 'sequential', 'chunked', 'auto'"):
        nk.ContextRNN(E, H, D, solver="newton")
