"""The layers: LayerNorm as a drop-in for torch.nn.LayerNorm, ContextUpdate as a recurrent layer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import DTYPES, GRADIENT_TOLERANCE, TOLERANCE, randn, relative_error
from torch import nn

import newllm_kernels as nk

NORMS = ["state", "output", None]

# ---- LayerNorm -----------------------------------------------------------------------------------------------------

LAYER_NORMS = {
    "plain": {"normalized_shape": 33},
    "several dimensions": {"normalized_shape": (3, 11)},
    "a list and eps": {"normalized_shape": [33], "eps": 0.1},
    "no bias": {"normalized_shape": (3, 11), "bias": False},
    "no affine": {"normalized_shape": 33, "elementwise_affine": False},
}


def pair(arguments, dtype):
    theirs, ours = nn.LayerNorm(**arguments, dtype=dtype), nk.LayerNorm(**arguments, dtype=dtype)
    for p in theirs.parameters():
        nn.init.normal_(p)
    return theirs, ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", LAYER_NORMS.values(), ids=LAYER_NORMS)
def test_layer_norm_is_a_drop_in(arguments, dtype):
    """Parameters move both ways; outputs and gradients are those of torch's layer in float64."""
    theirs, ours = pair(arguments, dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    back = nn.LayerNorm(**arguments, dtype=dtype)
    back.load_state_dict(ours.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)

    x, grad = randn(2, 5, 3, 11, dtype=dtype), randn(2, 5, 3, 11, dtype=dtype)
    if len(ours.normalized_shape) == 1:
        x, grad = x.flatten(-2), grad.flatten(-2)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    truth = copy.deepcopy(theirs).double()
    got, want = ours(leaf), truth(exact)
    got.backward(grad)
    want.backward(grad.double())
    assert got.dtype == dtype
    assert relative_error(got, want.detach()) <= TOLERANCE[dtype]
    assert relative_error(leaf.grad, exact.grad) <= GRADIENT_TOLERANCE[dtype]
    for (name, p), q in zip(ours.named_parameters(), truth.parameters(), strict=True):
        assert p.grad.dtype == p.dtype
        assert relative_error(p.grad, q.grad) <= GRADIENT_TOLERANCE[dtype], name


@pytest.mark.parametrize("arguments", LAYER_NORMS.values(), ids=LAYER_NORMS)
def test_layer_norm_starts_and_prints_as_torchs(arguments):
    theirs, ours = nn.LayerNorm(**arguments), nk.LayerNorm(**arguments)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
    assert ours.extra_repr().startswith(theirs.extra_repr().partition(", bias")[0])
    assert f"eps={ours.eps}" in repr(ours)


def test_layer_norm_takes_16_bits_beside_float32_parameters():
    ours, x = nk.LayerNorm(33), randn(7, 33, dtype=torch.bfloat16)
    assert ours(x).dtype == torch.bfloat16
    assert relative_error(ours(x), nn.LayerNorm(33).double()(x.double()).detach()) <= TOLERANCE[torch.bfloat16]


def test_layer_norm_of_strided_rows_of_several_dimensions():
    theirs, ours = pair({"normalized_shape": (3, 11)}, torch.float32)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(11, 3, 5, 2).permute(3, 2, 1, 0)
    assert relative_error(ours(x), theirs.double()(x.double()).detach()) <= TOLERANCE[torch.float32]


def test_layer_norm_moves_as_modules_do():
    layer = nk.LayerNorm(5).to(torch.float64)
    assert layer.weight.dtype == torch.float64
    assert nk.LayerNorm(5, device="meta").bias.device.type == "meta"
    assert torch.equal(copy.deepcopy(layer)(torch.ones(2, 5).double()), torch.zeros(2, 5).double())


@pytest.mark.parametrize("shape", [0, -3, (), (3, 0), (2.5,), [4, -1]], ids=str)
def test_layer_norm_refuses_impossible_shapes(shape):
    with pytest.raises(ValueError, match=r"normalized_shape: got .*, wanted one or more sizes of at least 1"):
        nk.LayerNorm(shape)


@pytest.mark.parametrize(("sizes", "shape"), [(33, (2, 32)), ((3, 11), (2, 11, 3)), ((3, 11), (11,))])
def test_layer_norm_refuses_inputs_of_other_sizes(sizes, shape):
    with pytest.raises(ValueError, match=r"x: got shape \(.*\), wanted \(\.\.\., (3, 11|33)\)"):
        nk.LayerNorm(sizes)(torch.ones(shape))


# ---- ContextUpdate -------------------------------------------------------------------------------------------------


def formula(layer, hidden, context):
    """The layer's docstring, in float64 and plain PyTorch: all contexts, the last, and what is read."""
    layer = copy.deepcopy(layer).double()
    f, i, d = layer.gates(hidden.double()).chunk(3, dim=-1)
    c = layer.start.expand(hidden.shape[0], -1) if context is None else context.double()

    def norm(u):
        y = nn.functional.layer_norm(u, u.shape[-1:], layer.norm.weight, layer.norm.bias, layer.norm.eps)
        return y if layer.clamp is None else y.clamp(-layer.clamp, layer.clamp)

    contexts = []
    for t in range(hidden.shape[1]):
        c = torch.sigmoid(f[:, t]) * c + torch.sigmoid(i[:, t]) * torch.tanh(d[:, t])
        c = norm(c) if layer.norm_kind == "state" else c
        contexts.append(c)
    stacked = torch.stack(contexts, dim=1)
    return stacked.detach(), c.detach(), (norm(stacked) if layer.norm_kind == "output" else stacked).detach()


# The gates are rounded to the layer's dtype on the way from the linear layer to the kernel, which a float64 formula does
# not do: one rounding of 2^-8 or 2^-11 in numbers around 1 to 4, and then the bound of the kernel's own output.
LAYER_TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@pytest.mark.parametrize("start", ["learned", "float32", "own"])
@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_context_update_is_its_formula(dtype, norm, start):
    layer = nk.ContextUpdate(16, 33, norm=norm, clamp=1.5, dtype=dtype)
    hidden = randn(3, 7, 16, dtype=dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    context = {"learned": None, "float32": randn(3, 33, dtype=acc), "own": randn(3, 33, dtype=dtype)}[start]
    want, want_last, want_read = formula(layer, hidden, context)
    contexts, last = layer(hidden, context)
    assert contexts.dtype == dtype
    assert last.dtype == acc
    assert relative_error(contexts, want) <= LAYER_TOLERANCE[dtype]
    assert relative_error(last, want_last) <= LAYER_TOLERANCE[dtype]
    assert relative_error(layer.read(contexts), want_read) <= LAYER_TOLERANCE[dtype]


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_by_step_equals_whole(dtype, norm):
    layer = nk.ContextUpdate(16, 33, norm=norm, dtype=dtype)
    hidden = randn(3, 9, 16, dtype=dtype)
    contexts, last = layer(hidden)
    context, steps = layer.initial_context(3), []
    for t in range(9):
        context = layer(hidden[:, t], context)
        assert context.dtype == last.dtype
        steps.append(context)
    # A matrix product of 3 rows may add up otherwise than one of 27, so gates differ in their last place.
    tolerance = LAYER_TOLERANCE[dtype]
    assert relative_error(context, last.detach().double()) <= tolerance
    assert relative_error(torch.stack(steps, dim=1), contexts.detach().double()) <= tolerance
    # And in two pieces, the state carried.
    first, state = layer(hidden[:, :4])
    second, end = layer(hidden[:, 4:], state)
    assert relative_error(torch.cat([first, second], dim=1), contexts.detach().double()) <= tolerance
    assert relative_error(end, last.detach().double()) <= tolerance


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_one_step_without_a_context_starts_from_the_learned_one(norm):
    layer, hidden = nk.ContextUpdate(16, 8, norm=norm), torch.randn(3, 16)
    assert torch.equal(layer(hidden), layer(hidden, layer.initial_context(3)))


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_a_single_step_keeps_the_dtype_of_its_context(norm):
    layer = nk.ContextUpdate(16, 8, norm=norm, dtype=torch.bfloat16)
    hidden = torch.randn(3, 16, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        assert layer(hidden, torch.zeros(3, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_state_dict_round_trip(norm, bias):
    layer, other = (nk.ContextUpdate(16, 8, norm=norm, bias=bias) for _ in range(2))
    hidden, file = torch.randn(2, 5, 16), io.BytesIO()
    assert not torch.equal(layer(hidden)[0], other(hidden)[0])
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer(hidden)[0], other(hidden)[0])
    names = {"gates.weight", "start"} | ({"gates.bias"} if bias else set())
    assert set(layer.state_dict()) == names | ({"norm.weight", "norm.bias"} if norm else set())


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_decreases_a_loss(dtype, norm):
    """To echo the sign of an input three steps back, which takes the memory: without it the loss stays at the variance."""
    layer = nk.ContextUpdate(8, 32, norm=norm, dtype=dtype)
    head = nn.Linear(32, 8, dtype=dtype)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(60):
        hidden = torch.randn(16, 12, 8).sign().to(dtype)
        contexts, _ = layer(hidden)
        loss = nn.functional.mse_loss(head(layer.read(contexts))[:, 3:].float(), hidden[:, :-3].float())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.95 * 5  # of a variance of 1


def test_gates_start_with_memories_of_two_to_fifty_steps():
    layer = nk.ContextUpdate(256, 64)
    assert torch.equal(layer.gates.bias[:64], torch.linspace(0, 4, 64))
    assert (layer.gates.bias[64:] == 0).all()
    # Sums of 256 terms of variance 1 / 256, some 40000 of them: their variance is good to 1%.
    assert layer.gates.weight.pow(2).sum(dim=1).mean().item() == pytest.approx(1, rel=0.05)


def test_context_update_prints_what_it_is():
    assert repr(nk.ContextUpdate(4, 2, norm="output", clamp=None)).startswith(
        "ContextUpdate(\n  norm='output', clamp=None"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hidden_dim": 0}, "hidden_dim: got 0, wanted an integer of at least 1"),
        ({"context_dim": 2.5}, "context_dim: got 2.5, wanted an integer of at least 1"),
        ({"context_dim": True}, "context_dim: got True, wanted an integer of at least 1"),
        ({"norm": "layer"}, "norm: got 'layer', wanted 'state', 'output' or None"),
        ({"clamp": 0}, "clamp: got 0, wanted a number above 0 or None"),
        ({"clamp": float("nan")}, "clamp: got nan, wanted a number above 0 or None"),
    ],
)
def test_context_update_refuses_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        nk.ContextUpdate(**{"hidden_dim": 4, "context_dim": 2} | arguments)


@pytest.mark.parametrize(
    ("hidden", "context", "words"),
    [
        (torch.ones(3, 5), None, r"hidden: got \(3, 5\), wanted \(B, 4\) or \(B, T, 4\)"),
        (torch.ones(4), None, r"hidden: got \(4,\), wanted \(B, 4\) or \(B, T, 4\)"),
        ([1.0], None, r"hidden: got list, wanted \(B, 4\) or \(B, T, 4\)"),
        (torch.ones(3, 4), torch.ones(2, 2), r"context: got \(2, 2\), wanted \(3, 2\)"),
        (torch.ones(3, 5, 4), torch.ones(3, 5, 2), r"context: got \(3, 5, 2\), wanted \(3, 2\)"),
        (torch.ones(3, 4), 0.0, r"context: got float, wanted \(3, 2\)"),
    ],
)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_context_update_refuses_wrong_inputs(norm, hidden, context, words):
    with pytest.raises(ValueError, match=words):
        nk.ContextUpdate(4, 2, norm=norm)(hidden, context)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_context_update_names_a_wrong_dtype(norm):
    with pytest.raises(TypeError, match=r"c0?: got dtype torch.float64, wanted torch.float32"):
        nk.ContextUpdate(4, 2, norm=norm)(torch.ones(3, 5, 4), torch.ones(3, 2).double())
