"""recurrent_context in fused steps, the Triton backend: every kind of cell against float64, on a GPU and in Triton's interpreter,
and the CUDA graphs that eager calls replay."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import LOOPED_FACTOR, check_graph, differentiate, errors, make, relative_error, variant
from test_compile import check_compiled
from test_operators import captured, opcheck_all

import newllm_kernels as nk
from newllm_kernels.recurrent_context import reference

pytest.importorskip("triton", reason="triton is not installed")

GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def steps_serve(monkeypatch):
    if not GPU:  # the interpreter cuts bfloat16 where a GPU rounds it
        doubled = {**cases.TOLERANCE, torch.bfloat16: 2 * cases.TOLERANCE[torch.bfloat16]}
        monkeypatch.setattr(cases, "TOLERANCE", doubled)
        monkeypatch.setattr(cases, "GRADIENT_TOLERANCE", {dtype: 2 * value for dtype, value in doubled.items()})
    with nk.use_backend("triton"):
        yield


def check(problem):
    """What the products read is of the tensors' dtype, contexts too, so no output is more exact than that dtype, as on the
    persistent kernel."""
    dtype = problem.tensors["z"].dtype
    for name, (error, _) in errors(problem).items():
        bound = (cases.GRADIENT_TOLERANCE if name.startswith("grad") else cases.TOLERANCE)[dtype]
        assert error <= LOOPED_FACTOR * bound, (name, error)


def place(problem):
    return problem.map(lambda name, x: x.cuda() if GPU else x)


# Rows and columns that fill no tile; in the interpreter few steps, on a GPU enough for a graph and a rest.
SHAPES = [(2, 1, 12), (9, 37, 33), (40, 20, 130), (3, 5, 2050)] if GPU else [(2, 1, 12), (9, 3, 33)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(shape, dtype):
    check(place(make("recurrent_context", *shape, dtype, clamp=None)))


@pytest.mark.parametrize("norm", reference.NORMS, ids=str)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_layers_and_norms(layers, norm):
    T = 35 if GPU else 4
    for dtype in DTYPES if GPU else (torch.float32,):
        check(place(make("recurrent_context", 3, T, 21, dtype, layers=layers, norm=norm, clamp=None)))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation):
    problem = make("recurrent_context", 3, 4, 20, activation=activation, clamp=None, layers=2)
    problem.tensors["z"] *= 3  # far into both tails
    check(place(problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamp_cuts_values_and_gradients(dtype):
    check(place(make("recurrent_context", 3, 8, 33, dtype, clamp=1.0)))


def test_clamp_of_what_is_read():
    check(place(make("recurrent_context", 3, 8, 33, clamp=0.5, norm="output")))


@pytest.mark.parametrize("absent", ["hidden_bias", "gate_bias", "weight", "bias"])
def test_any_bias_may_be_absent(absent):
    problem = make("recurrent_context", 2, 3, 17, layers=2, clamp=None)
    del problem.tensors[absent]
    check(place(problem))


def test_no_steps_and_no_rows():
    problem = place(make("recurrent_context", 2, 5, 7))
    none = problem.map(lambda name, x: x[:, :0] if name == "z" else x)
    c, last = none.run()
    assert c.shape == (2, 0, 7)
    assert torch.equal(last, problem.tensors["c0"])
    grads = differentiate(none.run, none.tensors, [torch.randn_like(c), torch.ones_like(last)])[1]
    assert torch.equal(grads["c0"], torch.ones_like(last))
    assert problem.map(lambda name, x: x[:0] if name in ("z", "c0") else x).run()[0].shape == (0, 5, 7)


def test_chunks_equal_the_order_of_time():
    T = 70 if GPU else 6
    problem = place(make("recurrent_context", 2, T, 9, clamp=None))
    want, whole = differentiate(problem.run, problem.tensors, grads := [torch.randn_like(x) for x in problem.run()])
    problem.options |= {"chunks": 3, "passes": 3}
    got, in_chunks = differentiate(problem.run, problem.tensors, grads)
    for x, y in zip((*got, *in_chunks.values()), (*want, *whole.values()), strict=True):
        assert relative_error(x, y.cpu().double()) <= 1e-5


@pytest.mark.parametrize("norm", [None, "state"])
def test_decay_of_both_directions(norm):
    t = place(make("recurrent_context", 2, 3, 9, norm=norm)).tensors
    kinds = (1e-5, 0.7, 2, reference.NORMS.index(norm))
    weights = (t["context_weight"], None, None, t["gate_weight"], t["gate_bias"], t["weight"], t["bias"])
    back = (weights[0], None, weights[3], *weights[5:], *kinds, True)
    found = []
    for backend in ("triton", "reference"):
        kernels = nk.backends._registry["recurrent_context"][backend]
        c, _, pre, decay = kernels.forward(t["z"], t["c0"], *weights, *kinds, True, True)
        found.append((decay, kernels.backward(torch.ones_like(c), None, pre, c, t["c0"], *back)[4]))
    for x, y in zip(*found, strict=True):
        assert relative_error(x, y.cpu().double()) <= 1e-5


def test_nan_stays_in_its_row():
    problem = place(make("recurrent_context", 3, 5, 9))
    problem.tensors["z"][1, 2, 3] = float("nan")
    c, last = problem.run()
    assert c[1, 2:].isnan().all()
    assert last[1].isnan().all()
    assert not c[[0, 2]].isnan().any()
    assert not c[1, :2].isnan().any()


@pytest.mark.parametrize("name", ["recurrent_context", "recurrent_context-output", "recurrent_context-plain"])
def test_opcheck_and_compiled_code(name):
    small = {"B": 1, "T": 2, "D": 9}
    if GPU:  # calls an operator some ten times, which the interpreter takes half a minute for
        opcheck_all(captured(place(variant(name, torch.bfloat16, **small))))
    check_compiled(place(variant(name, **small)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["recurrent_context", "recurrent_context-output", "recurrent_context-plain"])
def test_replayed_graphs_give_the_bits_of_single_steps(name, monkeypatch):
    """The first call of a kind launches step by step, the second records a graph, the third replays it with other numbers."""
    from newllm_kernels.recurrent_context import replay

    replay.clear()
    sizes = {"T": 53, "D": 48, "H": 64}
    first = [place(variant(name, dtype, **sizes)) for dtype in DTYPES]
    for problem in first:
        for _ in range(2):
            differentiate(problem.run, problem.tensors, [torch.randn_like(x) for x in problem.run()])
    assert replay._graphs
    for problem, other in zip(first, [place(variant(name, dtype, **sizes)) for dtype in DTYPES], strict=True):
        grads = [torch.randn_like(x) for x in problem.run()]
        replayed = differentiate(other.run, other.tensors, grads)
        kept = [x.clone() for x in (*replayed[0], *replayed[1].values())]
        differentiate(problem.run, problem.tensors, grads)  # works in the same buffers
        with monkeypatch.context() as patch:
            patch.setattr(replay, "applies", lambda *args: False)
            single = differentiate(other.run, other.tensors, grads)
        for x, before, y in zip(
            (*replayed[0], *replayed[1].values()), kept, (*single[0], *single[1].values()), strict=True
        ):
            assert torch.equal(x, before)
            assert torch.equal(x, y)
    assert len(replay._graphs) <= replay.MOST


@pytest.mark.gpu
def test_widths_that_a_graph_would_give_other_bits_for_are_not_replayed():
    from newllm_kernels.recurrent_context import replay

    replay.clear()
    problem = place(variant("recurrent_context", T=53, D=33))
    grads = [torch.randn_like(x) for x in problem.run()]
    outputs, found = zip(*(differentiate(problem.run, problem.tensors, grads) for _ in range(4)), strict=True)
    assert not replay._graphs
    for other, gradients in zip(outputs[1:], found[1:], strict=True):
        assert all(map(torch.equal, other, outputs[0]))
        assert all(torch.equal(gradients[key], found[0][key]) for key in found[0])


@pytest.mark.gpu
def test_two_streams_share_a_graph():
    problem = place(make("recurrent_context", 16, 64, 256, torch.bfloat16))
    other = problem.map(lambda name, x: torch.randn_like(x) if name == "z" else x)
    for _ in range(3):
        want = [x.run()[0] for x in (problem, other)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, x in zip(streams, (problem, other), strict=True):
            with torch.cuda.stream(stream):
                got.append(x.run()[0])
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.gpu
def test_inside_a_captured_graph():
    check_graph(place(make("recurrent_context", 16, 40, 96, torch.bfloat16)))
