"""recurrent_context: the whole cell over a sequence, for every number of hidden layers, activation and place of the norm."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, check, errors, make

import newllm_kernels as nk
from newllm_kernels.recurrent_context import reference

# T decides how often the same code runs, D and H = D + 5 how it is cut into vectors and panels (of 16 to 64), B how rows
# are shared out: more than eight and no multiple of four take every kind of tile.
SHAPES = [(1, 1, 1), (7, 7, 33), (3, 33, 130), (13, 9, 64), (1, 300, 7), (35, 3, 12)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(shape, dtype):
    turn = SHAPES.index(shape)
    # No clamp: where it cuts, a gradient jumps (see the tests below). One column leaves LayerNorm nothing.
    norm = None if shape[2] == 1 else "state"
    check(make("recurrent_context", *shape, dtype, state=("acc", "own")[turn % 2], clamp=None, norm=norm))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", reference.NORMS, ids=str)
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_layers_and_norms(layers, norm, dtype):
    check(make("recurrent_context", 3, 17, 21, dtype, layers=layers, norm=norm, clamp=None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation, dtype):
    problem = make("recurrent_context", 3, 9, 40, dtype, layers=2, activation=activation, clamp=None)
    problem.tensors["z"] *= 3  # far into both tails
    check(problem)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_elementwise(activation, dtype):
    """One step with matrices of one entry shows an activation bare: f = i = 0, d = act(z), so c - c0/2 = tanh(act(z)) / 2."""
    z = torch.cat((torch.linspace(-12, 12, 401), torch.tensor([0.0, 1e-4, -1e-4, 30.0, -30.0])))[:, None, None].to(
        dtype
    )
    gate = torch.tensor([[0.0], [0.0], [1.0]], dtype=dtype)
    z = z.requires_grad_()
    c, _ = nk.recurrent_context(
        z, torch.zeros(1, 1, dtype=dtype), gate_weight=gate, activation=activation, norm=None, clamp=None
    )
    exact = z.detach().double().requires_grad_()
    want = reference.activate(exact, reference.ACTIVATIONS.index(activation)).tanh() / 2
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13  # of each element by itself, where it is not next to nothing
    torch.testing.assert_close(c.double(), want, rtol=tolerance, atol=1e-9)
    (got,), (slope,) = torch.autograd.grad(c.sum(), z), torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(got.double(), slope, rtol=10 * tolerance, atol=1e-7)


@pytest.mark.parametrize("absent", ["hidden_bias", "gate_bias", "weight", "bias"])
def test_any_bias_may_be_absent(absent):
    problem = make("recurrent_context", 2, 7, 33, layers=3, clamp=None)
    del problem.tensors[absent]
    check(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_another_dtype(dtype):
    """Matrices are used in z's dtype: those that are numbers of it already change nothing when they come as others."""
    problem = make("recurrent_context", 2, 7, 33, torch.bfloat16, layers=2, clamp=None)
    wider = problem.map(lambda name, x: x.to(torch.float32) if name.endswith("_weight") else x)
    for x, y in zip(problem.run(), wider.run(), strict=True):
        assert torch.equal(x, y)
    check(wider)


@pytest.mark.parametrize("norm", ["state", "output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clamp_cuts_values_and_gradients(dtype, norm):
    problem = make("recurrent_context", 3, 33, 100, dtype, clamp=0.5, norm=norm)
    if norm == "state":
        assert problem.run()[0].abs().max() == 0.5
    check(problem)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clamp_cuts_gradients_in_16_bits(dtype, backend):
    """Contexts are stored with a mark of what was cut, as those of context_scan."""
    with nk.use_backend(backend):
        check(make("recurrent_context", 3, 33, 100, dtype, clamp=1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_carry_their_state(dtype):
    problem = make("recurrent_context", 2, 33, 40, dtype, clamp=None)

    def in_pieces(tensors):
        tensors = dict(tensors)
        z, state, pieces = tensors.pop("z"), tensors.pop("c0"), []
        for piece in z.split([1, 19, 13], dim=1):
            c, state = nk.recurrent_context(piece, c0=state, **tensors, clamp=None)
            pieces.append(c)
        return torch.cat(pieces, dim=1), state

    check(problem, run=in_pieces)


def test_no_steps_and_no_rows():
    problem = make("recurrent_context", 2, 5, 7)
    none = problem.map(lambda name, x: x[:, :0] if name == "z" else x)
    c, last = none.run()
    assert c.shape == (2, 0, 7)
    assert torch.equal(last, problem.tensors["c0"])
    empty = problem.map(lambda name, x: x[:0] if name in ("z", "c0") else x)
    assert empty.run()[0].shape == (0, 5, 7)
    leaves = {name: x.detach().requires_grad_() for name, x in none.tensors.items()}
    grads = torch.autograd.grad(none.run(leaves)[1].sum(), list(leaves.values()), allow_unused=True)
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        assert torch.equal(grad, torch.ones_like(x) if name == "c0" else torch.zeros_like(x)), name


def test_threads_and_company_change_no_bit(threads):
    """Rows are computed in groups that depend on threads and batch; their order of additions does not."""
    problem = make("recurrent_context", 11, 9, 33, layers=2)
    outputs = []
    for count in (1, 2, 3):
        threads(count)
        leaves = {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}
        got = problem.run(leaves)
        outputs.append((*got, *torch.autograd.grad(got[0].sum(), [leaves["c0"], leaves["weight"]])))
    alone = problem.map(lambda name, x: x[:1] if name in ("z", "c0") else x).run()
    for got in outputs[1:]:
        for x, y in zip(got, outputs[0], strict=True):
            assert torch.equal(x, y)
    for x, y in zip(alone, outputs[0], strict=False):
        assert torch.equal(x[0], y[0])


@pytest.mark.parametrize("norm", [None, "state"])
def test_decay_is_the_diagonal_of_the_direct_path(norm):
    """Of one step, with a hidden layer that is blind to the context: what is left is the direct path, and autograd knows it."""
    tensors = make("recurrent_context", 2, 1, 9, torch.float64, norm=norm).tensors
    kinds = (1e-5, float("inf"), 2, reference.NORMS.index(norm))
    blind = torch.zeros_like(tensors["context_weight"])
    weights = (blind, None, None, tensors["gate_weight"], tensors["gate_bias"], tensors["weight"], tensors["bias"])

    def step(c0):
        return reference.recurrent_context(tensors["z"], c0, *weights, *kinds, False, False)[1]

    jacobian = torch.autograd.functional.jacobian(step, tensors["c0"])  # (B, D, B, D)
    want = torch.stack([jacobian[b, :, b].diagonal() for b in range(2)])
    for backend in ("cpu", "reference"):
        with nk.use_backend(backend):
            kernels = nk.backends.select("recurrent_context", tensors["z"], 9)
        c, _, pre, decay = kernels.forward(tensors["z"], tensors["c0"], *weights, *kinds, True, True)
        torch.testing.assert_close(decay, want)
        back = kernels.backward(
            torch.ones_like(c), None, pre, c, tensors["c0"], blind, None, tensors["gate_weight"], tensors["weight"],
            tensors["bias"], *kinds, True,
        )  # fmt: skip
        torch.testing.assert_close(back[5], want)


def test_backward_computes_again_what_was_not_kept(monkeypatch):
    """As on a GPU: the pre-activations come from whole products of the stored contexts."""
    problem = make("recurrent_context", 3, 17, 21, torch.float64, layers=3, norm="output")
    kept = errors(problem)
    module = __import__("sys").modules["newllm_kernels.recurrent_context"]
    inner = module._recurrent_context
    monkeypatch.setattr(module, "_recurrent_context", lambda *args: inner(*args[:-1], False))
    again = errors(problem)
    assert all(error <= 1e-13 for error, _ in (*kept.values(), *again.values()))
