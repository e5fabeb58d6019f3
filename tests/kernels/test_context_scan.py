"""context_scan: the cell over a whole sequence, LayerNorm and clamp in the loop, separate gates and packed."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, check, errors, make

import newllm_kernels as nk

# Every size of {1, 7, 33, 1000, 4097} as T and as D, one partner each: a row is one task whatever B, T and D are, D decides
# how it is cut into vectors and T how often the same code runs. Packed gates differ by a stride and take turns.
SHAPES = [(1, 1, 1), (7, 7, 33), (3, 33, 1000), (1, 7, 4097), (1, 4097, 33), (33, 33, 7), (2, 1000, 7)]
FUNCTIONS = ["context_scan", "context_scan_packed"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(shape, dtype):
    turn = SHAPES.index(shape)
    state = ("acc", "own")[turn % 2]  # none is another shape's; a zero start is test_zero_start
    # No clamp: where it cuts, a gradient jumps, and the bound on its error is another (see the tests below).
    check(make(FUNCTIONS[turn // 2 % 2], *shape, dtype, state=state, affine=turn % 3 > 0, clamp=None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_start(dtype):
    check(make("context_scan", 2, 33, 33, dtype, state=None, clamp=None))


@pytest.mark.parametrize("affine_dtype", DTYPES, ids=str)
def test_parameters_of_any_dtype(affine_dtype):
    check(make("context_scan", 2, 7, 33, torch.float32, affine_dtype=affine_dtype))


@pytest.mark.parametrize("only", ["weight", "bias"])
def test_one_parameter_alone(only):
    problem = make("context_scan", 2, 7, 33)
    del problem.tensors["bias" if only == "weight" else "weight"]
    check(problem)


@pytest.mark.parametrize("clamp", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clamp_cuts_values_and_gradients(dtype, clamp):
    problem = make("context_scan", 3, 33, 1000, dtype, clamp=clamp)
    assert problem.run()[0].abs().max() == clamp
    check(problem)


@pytest.mark.parametrize("clamp", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clamp_cuts_values_in_16_bits(dtype, clamp):
    problem = make("context_scan", 3, 33, 1000, dtype, clamp=clamp)
    c, _ = problem.run()
    assert c.abs().max() == clamp
    for name, (error, output_dtype) in errors(problem).items():
        if name.startswith("output"):
            assert error <= {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}[output_dtype], name


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("dtype", "clamp"),
    [(dtype, clamp) for dtype in (torch.bfloat16, torch.float16) for clamp in (0.5, 1.0, 10.0)]
    + [(torch.float16, 1.003)],  # no number of this dtype: what is cut is stored rounded
    ids=str,
)
def test_clamp_cuts_gradients_in_16_bits(dtype, clamp, backend):
    """Most draws hold components so near the clamp that rounding would decide, did the forward not mark what it cut."""
    with nk.use_backend(backend):
        check(make("context_scan", 3, 33, 1000, dtype, clamp=clamp))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_carry_their_state(dtype):
    problem = make("context_scan_packed", 2, 33, 40, dtype, clamp=None)

    def in_pieces(tensors):
        gates, state, pieces = tensors["gates"], tensors["c0"], []
        for piece in gates.split([1, 19, 13], dim=1):
            c, state = nk.context_scan_packed(piece, state, tensors["weight"], tensors["bias"], clamp=None)
            pieces.append(c)
        return torch.cat(pieces, dim=1), state

    check(problem, run=in_pieces)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_of_context_update_are_the_scan(dtype):
    """The state is kept in the accumulation type between steps, as the scan keeps it."""
    problem = make("context_scan", 2, 7, 40, dtype, clamp=None)

    def in_steps(tensors):
        state, contexts = tensors["c0"], []
        for f, i, d in zip(*(tensors[name].unbind(1) for name in "fid"), strict=True):
            state = nk.context_update(f, i, d, state, tensors["weight"], tensors["bias"], clamp=None)
            contexts.append(state)
        return torch.stack(contexts, dim=1).to(dtype), state

    check(problem, run=in_steps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_gates_are_the_separate_ones_bit_for_bit(dtype):
    problem = make("context_scan_packed", 2, 33, 40, dtype)
    gates, rest = problem.tensors["gates"], [problem.tensors[name] for name in ("c0", "weight", "bias")]
    f, i, d = (x.contiguous() for x in gates.chunk(3, dim=-1))
    for packed, separate in zip(nk.context_scan_packed(gates, *rest), nk.context_scan(f, i, d, *rest), strict=True):
        assert torch.equal(packed, separate)
