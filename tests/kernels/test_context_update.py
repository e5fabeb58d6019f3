"""context_update: one step of the cell, on the CPU and, where there is one, on a GPU; separate gates and packed."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LAYOUTS, Problem, check, differentiate, gradient_layout, laid_out, make, randn

import newllm_kernels as nk

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES)

# Every size of {1, 7, 33, 1000, 4097} as D and as number of rows (B * T), one partner each: rows do not meet but in the
# weight gradients, which are summed in blocks of rows (1000 and 4097 rows fill more than one). Packed gates differ by a
# stride only and take turns with separate ones, as do the dtypes of c.
SHAPES = [(1, 1, 1), (1, 33, 7), (7, 1, 33), (1, 7, 4097), (1, 1000, 33), (1, 4097, 7), (2, 500, 1000)]
FUNCTIONS = ["context_update", "context_update_packed"]


def place(problem: Problem, device: str) -> Problem:
    """On the device, and without the warning of a slow reference: the kernels must serve what is tested here."""
    return problem.map(lambda name, x: x.to(device))


@pytest.fixture(autouse=True)
def kernels_serve(recwarn):
    yield
    assert not [str(w.message) for w in recwarn if "reference backend" in str(w.message)]


def skip_float64_on_cuda(dtype, device):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels have no float64")


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(shape, dtype, device):
    skip_float64_on_cuda(dtype, device)
    turn = SHAPES.index(shape)
    function, state = FUNCTIONS[turn % 2], ("acc", "own")[turn // 2 % 2]
    check(place(make(function, *shape, dtype, state=state, affine=turn % 3 > 0), device))


@on_every_device
@pytest.mark.parametrize("affine_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state", ["acc", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_mixture_of_dtypes(dtype, state, affine_dtype, device):
    problem = place(make("context_update", 3, 7, 33, dtype, state=state, affine_dtype=affine_dtype), device)
    assert problem.run()[0].dtype == problem.tensors["c"].dtype
    check(problem)


@on_every_device
@pytest.mark.parametrize("only", ["weight", "bias"])
def test_one_parameter_alone(only, device):
    problem = place(make("context_update", 2, 7, 33), device)
    del problem.tensors["bias" if only == "weight" else "weight"]
    check(problem)


@on_every_device
@pytest.mark.parametrize("clamp", [0.5, 1.0, 10.0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamp_cuts_values_and_gradients(dtype, clamp, device):
    """Unlike the scan's backward this one starts from a context that was not rounded, so it holds in every dtype."""
    skip_float64_on_cuda(dtype, device)
    problem = place(make("context_update", 3, 7, 1000, dtype, clamp=clamp), device)
    if clamp is not None and clamp < 10:
        assert problem.run()[0].abs().max() == clamp
    check(problem)


@on_every_device
@pytest.mark.parametrize("shape", [(33,), (7, 33), (2, 3, 2, 33)], ids=str)
def test_any_number_of_dimensions(shape, device):
    check(place(Problem("context_update", {name: randn(*shape, dtype=torch.float32) for name in "fidc"}), device))
    gates, c = randn(*shape[:-1], 99, dtype=torch.float32), randn(*shape, dtype=torch.float32)
    check(place(Problem("context_update_packed", {"gates": gates, "c": c}), device))


@on_every_device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # the layout is the same for all
def test_layouts(dtype, function, layout, device):
    for dims in (2, 3):
        problem = make(function, 3, 5, 33, dtype)
        problem = problem.map(lambda name, x, dims=dims: x.flatten(0, -2) if x.dim() > 1 and dims == 2 else x)
        check(laid_out(place(problem, device), layout), layout=gradient_layout(problem, layout))


@on_every_device
@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_batch(function, device):
    problem = place(make(function, 0, 1, 33), device)
    (c,), grads = differentiate(problem.run, problem.tensors, [torch.zeros(0, 1, 33, device=device)])
    assert c.shape == (0, 1, 33)
    assert all(grads[name].shape == x.shape for name, x in problem.tensors.items())
    assert (grads["weight"] == 0).all()
    assert (grads["bias"] == 0).all()


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_twice(dtype, device):
    problem = place(make("context_update", 1, 4097, 33, dtype), device)
    grad = randn(1, 4097, 33, dtype=torch.float32).to(device)
    runs = [differentiate(problem.run, problem.tensors, [grad]) for _ in range(2)]
    assert torch.equal(runs[0][0][0], runs[1][0][0])
    for name in problem.tensors:
        assert torch.equal(runs[0][1][name], runs[1][1][name]), name


@on_every_device
def test_nan_and_inf_stay_in_their_row(device):
    for value in (float("nan"), float("inf"), float("-inf")):
        problem = make("context_update", 1, 5, 33)
        problem.tensors["c"][0, 2, 3] = value
        (got,), (want,) = (
            place(problem, device).run(),
            problem.truth({k: x.double() for k, x in problem.tensors.items()}),
        )
        assert torch.equal(got.cpu().isnan(), want.isnan())
        assert want[0, 2].isnan().any()
        assert want[0, [0, 1, 3, 4]].isfinite().all()


@on_every_device
def test_clamp_lets_nan_through(device):
    f = torch.full((2, 7), float("nan"), device=device)
    assert nk.context_update(f, f, f, f, clamp=0.5).isnan().all()


@on_every_device
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, function, device):
    from test_operators import captured, opcheck_all

    problem = place(make(function, 1, 5, 33, dtype).map(lambda name, x: x.flatten(0, -2) if x.dim() > 1 else x), device)
    calls = captured(problem)
    assert len(calls) == 2
    opcheck_all(calls)


@pytest.mark.gpu
def test_a_row_wider_than_shared_memory_goes_to_the_reference_with_the_reason():
    f = torch.zeros(2, 100_000, device="cuda")
    text = nk.explain("context_update", f, f, f, f)
    assert "keeps a row in shared memory" in text
    assert "-> reference" in text
    with nk.use_backend("cuda"), pytest.raises(nk.BackendError, match="keeps a row in shared memory"):
        nk.context_update(f, f, f, f)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [3071, 3072, 3073, 12288])
def test_rows_around_the_shared_memory_that_must_be_asked_for(D):
    """48 KB without asking: a row of 12288 forward, four of 3072 backward; the kernels' own few bytes count too."""
    with nk.use_backend("cuda"):
        check(place(make("context_update", 1, 7, D), "cuda"))


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    """A kernel on another stream would read the inputs before the sleep is over and they are written."""
    problem = place(make("context_update", 1, 1000, 1000), "cuda")
    want = problem.run()[0]
    late = {name: torch.zeros_like(x) for name, x in problem.tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for name, x in problem.tensors.items():
            late[name].copy_(x)
        got = problem.run(late)[0]
        torch.cuda.current_stream().synchronize()
    assert torch.equal(got, want)
