"""decode_linear and its programs: against their formula in float64, on whatever this machine has."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import TOLERANCE
from torch.nn import functional as F

import newllm_kernels as nk
from newllm_kernels.decode_linear.program import Activation, DecodeLayer, DecodeProgram

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
PARTS = {"linear": (1,), "gated": (2,), "context": (3, 4)}
KINDS = [(epilogue, parts) for epilogue, counts in PARTS.items() for parts in counts]
# (N, K): odd ones, of one stage of a kernel and of several, rows of whole 16 bytes and not.
SHAPES = [(1, 1), (7, 5), (33, 64), (131, 520), (40, 1031), (300, 2048), (64, 2304)]


def problem(B, N, K, epilogue, parts, dtype, device):
    """Arguments of decode_linear, everything that the epilogue takes given."""

    def draw(*shape, scale=1.0, of=dtype):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(of).to(device)

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        "x": draw(B, K) + 0.5, "weight": [draw(N, K, scale=K**-0.5) for _ in range(parts)],
        "bias": [draw(N), *[None] * (parts == 4), *(draw(N) for _ in range(parts - 1 - (parts == 4)))],
        "norm": (draw(K, scale=0.2) + 1, draw(K, scale=0.2)) if K > 1 else None, "clamp": 1.5, "factor": draw(B, K),
        "addend": draw(B, parts * N, of=acc), "epilogue": epilogue,
    }  # fmt: skip
    if epilogue == "linear":
        arguments |= {"residual": draw(B, N, of=acc), "activation": "gelu"}
    if epilogue == "context":
        arguments["state"] = draw(B, N, of=acc)
    return arguments


def wide(value):
    if isinstance(value, torch.Tensor):
        return value.double().cpu()
    return type(value)(map(wide, value)) if isinstance(value, (list, tuple)) else value


def truth(x, weight, bias, norm, clamp, factor, addend, epilogue, residual=None, activation=None, state=None):
    """The formula once more, from PyTorch's own functions."""
    p = x if norm is None else F.layer_norm(x, x.shape[-1:], *norm).clamp(-clamp, clamp)
    z = [F.linear(p * factor, w, b) + a for w, b, a in zip(weight, bias, addend.chunk(len(weight), -1), strict=True)]
    if epilogue == "linear":
        return residual + F.gelu(z[0]), None
    if epilogue == "gated":
        return F.silu(z[0]) * z[1], None
    return F.silu(z[3]) if len(z) == 4 else None, z[0].sigmoid() * state + z[1].sigmoid() * z[2].tanh()


def check(arguments, dtype):
    for got, want in zip(
        nk.decode_linear(**arguments), truth(**{k: wide(v) for k, v in arguments.items()}), strict=True
    ):
        assert (got is None) == (want is None)
        if got is not None:
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            # Terms are of order one; a result that they cancel to is no more exact than they are.
            assert (wide(got) - want).norm() <= TOLERANCE[dtype] * max(want.norm(), want.numel() ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("epilogue", "parts"), KINDS)
def test_truth(epilogue, parts, dtype):
    for B, (N, K) in itertools.product((1, 3), SHAPES[:5]):
        check(problem(B, N, K, epilogue, parts, dtype, "cpu"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("epilogue", "parts"), KINDS)
def test_truth_on_a_gpu(epilogue, parts, dtype):
    with nk.use_backend("cuda"):
        for B, (N, K) in itertools.product((1, 3, 16), SHAPES):
            check(problem(B, N, K, epilogue, parts, dtype, "cuda"), dtype)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_activations(activation, device):
    x, weight = torch.randn(2, 9, device=device), torch.randn(5, 9, device=device)
    y, _ = nk.decode_linear(x, weight, activation=activation)
    z = x.double() @ weight.double().T
    want = z if activation == "none" else torch.tanh(z) if activation == "tanh" else getattr(F, activation)(z)
    assert (y - want).norm() <= 1e-6 * want.norm()


@pytest.mark.gpu
def test_rows_that_begin_anywhere():
    """Weights that do not begin at 16 bytes, and rows of a wider matrix."""
    for offset, gap in ((1, 0), (0, 3), (3, 8)):
        buffer = torch.randn(offset + 40 * (64 + gap), device="cuda", dtype=torch.bfloat16)
        weight = buffer[offset:].view(40, 64 + gap)[:, :64]
        x = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
        want = x.double() @ weight.double().T
        assert (nk.decode_linear(x, weight)[0] - want).norm() <= TOLERANCE[torch.bfloat16] * want.norm()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_nan_stays_in_its_row(device):
    x = torch.randn(3, 40, device=device)
    x[1, 7] = float("nan")
    y, _ = nk.decode_linear(x, torch.randn(6, 40, device=device), norm=(None, None), clamp=1.0)
    assert y.isnan().all(dim=1).tolist() == [False, True, False]
    assert not y[[0, 2]].isnan().any()


def test_opcheck():
    x, weight, state = torch.randn(2, 6), [torch.randn(4, 6) for _ in range(4)], torch.randn(2, 4)
    arguments = (x, weight, [None] * 4, None, None, False, 1e-5, 1.0, None, None, None, state, "context", "none")
    torch.library.opcheck(torch.ops.newllm.decode_linear.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"epilogue": "square"}, ValueError, "epilogue: got 'square'"),
        ({"activation": "sine"}, ValueError, "activation: got 'sine'"),
        ({"weight": [torch.ones(4, 6)] * 2}, ValueError, "weight: got 2 of them, wanted 1"),
        ({"weight": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "weight: got dtype torch.int64"),
        ({"weight": torch.ones(6, 4).T}, ValueError, "weight: got strides"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: got \(5,\)"),
        ({"x": torch.ones(2, 5)}, ValueError, r"x: got \(2, 5\), wanted \(B, 6\)"),
        ({"x": torch.ones(17, 6)}, ValueError, r"x: got \(17, 6\)"),
        ({"residual": torch.ones(2, 5)}, ValueError, r"residual: got shape \(2, 5\), wanted \(2, 4\)"),
        ({"state": torch.ones(2, 4)}, ValueError, "state: got Tensor"),
        ({"norm": (torch.ones(5), None)}, ValueError, r"norm weight: got shape \(5,\)"),
        ({"clamp": -1.0}, ValueError, "clamp: got -1.0"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=words):
        nk.decode_linear(**{"x": torch.ones(2, 6), "weight": torch.ones(4, 6), **change})


def test_a_gradient_is_refused():
    with pytest.raises(RuntimeError, match="has no gradient"):
        nk.decode_linear(torch.ones(1, 3, requires_grad=True), torch.eye(3))


# ---- programs ----


def small_program(device, dtype, rows):
    """A gated layer and a residual one of 40 columns, whose x is a table; and what PyTorch makes of the same tensors."""
    table, up = (torch.randn(9, 40, device=device, dtype=dtype) for _ in range(2))
    gate, value, down = (
        torch.randn(*shape, device=device, dtype=dtype) / 6 for shape in ((70, 40), (70, 40), (40, 70))
    )
    tokens = torch.zeros(rows, dtype=torch.int64, device=device)
    y = torch.full((rows, 9), float("nan"), device=device, dtype=torch.promote_types(dtype, torch.float32))
    inner, thought = Activation(70), Activation(40)
    layers = [
        DecodeLayer(table, tokens=tokens, norm=(None, None), weights=(gate, value), y=inner, epilogue="gated"),
        DecodeLayer(inner, weights=(down,), residual=table, residual_tokens=tokens, y=thought),
        DecodeLayer(thought, weights=(up,), y=y),
    ]

    def want(tokens):
        x = table[tokens].double()
        p = F.layer_norm(x, (40,))
        h = F.silu(F.linear(p, gate.double())) * F.linear(p, value.double())
        return F.linear(x + F.linear(h, down.double()), up.double())

    return DecodeProgram(layers, rows), tokens, y, want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_program_computes_its_layers_again_and_again(device, rows, dtype):
    program, tokens, y, want = small_program(device, dtype, rows)
    for _ in range(5):
        tokens.copy_(torch.randint(9, (rows,)))
        program.run()
        # Three layers, each rounded once or twice to the dtype of the weights.
        assert (y - want(tokens)).norm() <= 4 * TOLERANCE[dtype] * want(tokens).norm()


def wide_program(dtype, rows, width):
    """Eight gated pairs of layers with residuals from one to the next; and what PyTorch makes of the same tensors."""
    x = torch.randn(rows, width, device="cuda")
    y = torch.full((rows, width), float("nan"), device="cuda")
    matrices = [torch.randn(n, width, device="cuda").to(dtype) / width**0.5 for n in (width, width, width) * 8]
    layers, at = [], x
    for gate, value, down in zip(matrices[::3], matrices[1::3], matrices[2::3], strict=True):
        inner, thought = Activation(width), Activation(width)
        layers.append(DecodeLayer(at, norm=(None, None), weights=(gate, value), y=inner, epilogue="gated"))
        layers.append(DecodeLayer(inner, weights=(down,), residual=at, y=thought))
        at = thought
    layers.append(DecodeLayer(at, weights=(matrices[0],), y=y))

    def want():
        h = x.double()
        for gate, value, down in zip(*(map(torch.Tensor.double, matrices[k::3]) for k in range(3)), strict=True):
            p = F.layer_norm(h, (width,))
            h = h + F.linear(F.silu(F.linear(p, gate)) * F.linear(p, value), down)
        return F.linear(h, matrices[0].double())

    return DecodeProgram(layers, rows), y, want


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 9, 16])  # rows of a batch share the warps of a block in other ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_blocks_hand_to_each_other_is_right_and_the_same_every_time(rows, dtype):
    for width in (1000, 1030, 1544):  # rows of whole stages or not, of whole 16 bytes or not
        program, y, want = wide_program(dtype, rows, width)
        program.run()
        once = y.clone()
        assert (once - want()).norm() <= 8 * TOLERANCE[dtype] * want().norm()  # 17 layers, errors of each at random
        for _ in range(20):
            y.fill_(float("nan"))
            program.run()
            assert torch.equal(y, once)


@pytest.mark.gpu
def test_a_program_in_a_graph_gives_the_same_bits():
    program, tokens, y, _ = small_program("cuda", torch.bfloat16, 3)
    tokens.copy_(torch.tensor([4, 1, 7]))
    program.run()
    once = y.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        program.run()
    for _ in range(50):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, once)


def test_programs_refuse_what_is_no_layer():
    with pytest.raises(ValueError, match="rows: got 17"):
        DecodeProgram([], 17)
    with pytest.raises(ValueError, match="layers: got none"):
        DecodeProgram([], 1)
    with pytest.raises(ValueError, match="epilogue: got 'square'"):
        DecodeProgram([DecodeLayer(torch.ones(1, 2), weights=(torch.ones(2, 2),), epilogue="square")], 1)
