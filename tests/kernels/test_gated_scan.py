"""gated_scan: c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(d_t), separate gates and packed."""

from __future__ import annotations

import pytest
import torch
from cases import BOUNDS, DTYPES, check, large_batch, make, relative_error

import newllm_kernels as nk

# As for scan (test_scan.py says why this and not the cross product); packed gates are read at another stride only, so
# they take turns with separate ones, and each kind of c0 meets each dtype.
SHAPES = [(1, 1, 1), (2, 7, 33), (3, 33, 1000), (1, 7, 4097), (1, 4097, 33), (2, 1000, 7)]
FUNCTIONS = ["gated_scan", "gated_scan_packed"]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(shape, dtype, function):
    state = {0: None, 1: "acc", 2: "own"}[(sum(shape) + FUNCTIONS.index(function)) % 3]
    check(make(function, *shape, dtype, state=state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_outputs_that_are_written_past_the_caches(dtype, threads):
    threads(2)
    # Only aligned rows are (D = 1024). Packed and separate gates are written the same way: one each for two dtypes.
    function = FUNCTIONS[dtype in (torch.float32, torch.bfloat16)]
    check(make(function, large_batch(100, 1024, dtype), 100, 1024, dtype))


@pytest.mark.parametrize("bounds_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("state", [None, "acc"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(dtype, function, state, bounds_dtype):
    check(make(function, 1, 33, 1000, dtype, state=state, cu_seqlens=torch.tensor(BOUNDS, dtype=bounds_dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_carry_their_state(dtype):
    problem = make("gated_scan_packed", 2, 33, 40, dtype)

    def in_pieces(tensors):
        state, pieces = tensors["c0"], []
        for gates in tensors["gates"].split([1, 19, 13], dim=1):
            c, state = nk.gated_scan_packed(gates, state)
            pieces.append(c)
        return torch.cat(pieces, dim=1), state

    check(problem, run=in_pieces)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_gates_are_the_separate_ones_bit_for_bit(dtype):
    """Reading in place is the only difference. Gates that are views into one tensor need no packed call either."""
    gates = make("gated_scan_packed", 2, 33, 40, dtype).tensors["gates"]
    packed, packed_last = nk.gated_scan_packed(gates)
    for f, i, d in (gates.chunk(3, dim=-1), [x.contiguous() for x in gates.chunk(3, dim=-1)]):
        c, last = nk.gated_scan(f, i, d)
        assert torch.equal(c, packed)
        assert torch.equal(last, packed_last)


def test_packed_gates_are_not_copied():
    """A copy of the gates would cost as much as the whole computation; allocations show it."""
    gates = torch.randn(1, 1000, 3 * 1000)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        nk.gated_scan_packed(gates)
    allocated = sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0)
    assert 4_000_000 <= allocated < 4_100_000  # the output (1, 1000, 1000) and a state, not the 12 MB of the gates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 30.0, 300.0])
def test_activations_are_accurate_in_relative_terms(scale, dtype):
    """Near zero, where tanh(d) = d, and saturated, where slopes shrink to nothing. 300 overflows e^x in float32."""
    # Not in 16 bits, where a saturated gradient lies below the smallest normal number of float16. Past e^-87 a float32
    # slope is zero or subnormal and the truth's is not, hence the error relative to the largest gradients, not to each.
    check(make("gated_scan", 2, 7, 1000, dtype).map(lambda name, x: x if name == "c0" else x * scale))


@pytest.mark.parametrize("gate", ["f", "i", "d"])
@pytest.mark.parametrize("value", [-25.0, -10.0, 10.0, 14.0])
def test_slopes_of_saturated_gates_keep_their_relative_accuracy(gate, value):
    """1 - sigmoid(x) and 1 - tanh(x)^2 cancel in float32 where the kernels must not: the gradient alone is compared."""
    if gate == "d" and abs(value) > 20:
        value = -15.0  # tanh' = 4 e^-30: the smallest that a bound of 20 leaves exact
    values = {name: torch.full((1, 1, 1), 0.5) for name in "fid"} | {gate: torch.full((1, 1, 1), value)}
    leaf = values[gate].requires_grad_()
    (got,) = torch.autograd.grad(nk.gated_scan(**values, c0=torch.ones(1, 1))[1], leaf)
    x = values[gate].detach().double()
    slope = 1 / (x.exp() + 2 + (-x).exp())  # sigmoid'
    slope = {
        "f": slope,
        "i": slope * torch.tensor(0.5).double().tanh(),
        "d": torch.tensor(0.5).double().sigmoid() / x.cosh() ** 2,
    }[gate]
    assert relative_error(got, slope) <= 2e-6
