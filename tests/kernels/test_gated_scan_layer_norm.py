"""gated_scan_layer_norm: gated_scan, then LayerNorm of what it returns."""

from __future__ import annotations

import pytest
import torch
from cases import BOUNDS, DTYPES, check, differentiate, make

import newllm_kernels as nk

SHAPES = [(2, 7, 33), (3, 33, 1000), (1, 7, 4097), (1, 4097, 33), (2, 1000, 7)]
FUNCTIONS = ["gated_scan_layer_norm", "gated_scan_layer_norm_packed"]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(shape, dtype, function):
    state = {0: None, 1: "acc", 2: "own"}[(sum(shape) + FUNCTIONS.index(function)) % 3]
    check(make(function, *shape, dtype, state=state))


@pytest.mark.parametrize("outputs", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_from_some_outputs(outputs):
    check(make("gated_scan_layer_norm", 2, 9, 33), outputs=outputs)


# In 16 bits a value that rounding carries across the clamp changes sides, and its gradient with it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_clamp(dtype, affine):
    check(make("gated_scan_layer_norm", 2, 9, 33, dtype, affine=affine, clamp=1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(dtype):
    check(make("gated_scan_layer_norm_packed", 1, 33, 100, dtype, cu_seqlens=torch.tensor(BOUNDS)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_two_operations_bit_for_bit(dtype):
    problem = make("gated_scan_layer_norm", 2, 33, 40, dtype)

    def one_after_the_other(tensors):
        c, last = nk.gated_scan(*(tensors[name] for name in "fid"), tensors["c0"])
        return nk.layer_norm(c, tensors["weight"], tensors["bias"]), c, last

    grads = [torch.randn_like(x) for x in problem.run()]
    grads[1] = None  # autograd would round the sum of two gradients of c, which the operation does not
    got, want = (differentiate(run, problem.tensors, grads) for run in (problem.run, one_after_the_other))
    assert all(torch.equal(x, y) for x, y in zip(got[0], want[0], strict=True))
    assert all(torch.equal(got[1][name], want[1][name]) for name in problem.tensors)


def test_bad_arguments_are_named():
    f = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"^weight: got shape \(5,\), wanted \(4,\)"):
        nk.gated_scan_layer_norm(f, f, f, weight=torch.ones(5))
    with pytest.raises(ValueError, match=r"^gates: got shape"):
        nk.gated_scan_layer_norm_packed(f)
    with pytest.raises(ValueError, match=r"^clamp: got -1"):
        nk.gated_scan_layer_norm(f, f, f, clamp=-1)
