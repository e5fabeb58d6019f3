"""layer_norm and add_layer_norm."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Problem, check, errors, large_batch, make, randn, relative_error

import newllm_kernels as nk

# Every size of {1, 7, 33, 1000, 4097} as D and as number of rows (B * T); one partner each, as rows do not meet but in
# the weight gradients.
SHAPES = [(1, 1, 1), (1, 33, 7), (7, 1, 33), (1, 7, 4097), (1, 1000, 33), (1, 4097, 7), (2, 500, 1000)]
FUNCTIONS = ["layer_norm", "add_layer_norm"]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(shape, dtype, function):
    check(make(function, *shape, dtype, affine=sum(shape) % 4 > 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_large_outputs_that_are_written_past_the_caches(function, dtype, threads):
    threads(2)
    check(make(function, large_batch(100, 1024, dtype), 100, 1024, dtype))  # only aligned rows are: D = 1024


@pytest.mark.parametrize("affine_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_any_dtype(dtype, function, affine_dtype):
    check(make(function, 2, 7, 33, dtype, affine_dtype=affine_dtype))


@pytest.mark.parametrize("only", ["weight", "bias"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_parameter_alone(function, only):
    problem = make(function, 2, 7, 33)
    del problem.tensors["bias" if only == "weight" else "weight"]
    check(problem)


@pytest.mark.parametrize("shape", [(33,), (7, 33), (2, 3, 2, 5, 33)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_number_of_dimensions(function, shape):
    names = ["x", "residual"][: 1 + FUNCTIONS.index(function)]
    check(Problem(function, {name: randn(*shape, dtype=torch.float32) for name in names}))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
def test_eps(eps):
    check(make("layer_norm", 2, 7, 33, eps=eps))


def test_a_mean_far_from_zero_costs_no_accuracy_beyond_that_of_the_input():
    """mean(x^2) - mean(x)^2 would cancel: at 1000 with a spread of 1 it loses six of float32's seven digits."""
    problem = make("layer_norm", 1, 33, 1000).map(lambda name, x: x + 1000 if name == "x" else x)
    # The sum, 1e6, is rounded to its last place, 0.06, a few times on its way, which moves the mean by 1e-4.
    error, _ = errors(problem)["output 0"]
    assert error <= 3e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_row_gives_the_bias(dtype):
    bias = randn(33, dtype=torch.float32)
    y = nk.layer_norm(torch.full((7, 33), 3.0, dtype=dtype), None, bias)
    assert torch.equal(y, bias.to(dtype).expand(7, 33))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_normalised_is_the_stored_sum(dtype):
    """So a stack that passes the sum on reads the numbers that were normalised."""
    problem = make("add_layer_norm", 2, 7, 1000, dtype)
    y, total = problem.run()
    expected = problem.tensors["x"] + problem.tensors["residual"]  # torch adds in float32 and rounds once
    assert torch.equal(total, expected)
    weight, bias = (problem.tensors[name].double() for name in ("weight", "bias"))
    want = torch.nn.functional.layer_norm(total.double(), (1000,), weight, bias)
    assert relative_error(y, want) <= {torch.float32: 2e-6, torch.float64: 8e-15}.get(dtype, 4e-3)


def test_agrees_with_torch():
    """The truth of the other tests is our own reference; this one is not."""
    problem = make("layer_norm", 2, 33, 1000, torch.float64)
    t = problem.tensors
    want = torch.nn.functional.layer_norm(t["x"], (1000,), t["weight"], t["bias"])
    assert relative_error(problem.run()[0], want) <= 8e-15
