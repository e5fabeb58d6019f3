"""The CUDA C++ kernels of the cell, context_update and context_scan, on a GPU. Elsewhere they are only compiled (test_build.py).

A row of context_scan is walked by as many warps as its width wants; on a GPU of 132 multiprocessors more than 132 rows share them,
and few, long sequences go in chunks of at least 64 steps.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from cases import (
    LAYOUTS,
    VARIANTS,
    check,
    check_graph,
    check_streams,
    differentiate,
    errors,
    gradient_layout,
    laid_out,
    make,
    variant,
)
from test_compile import check_compiled
from test_cuda import DTYPES, place
from test_operators import captured, opcheck_all

import newllm_kernels as nk
from newllm_kernels.context_scan import cuda

pytestmark = pytest.mark.gpu

SCANS = ("context_scan", "context_scan_packed")
FUNCTIONS = ("context_update", *SCANS)
OF_FUNCTIONS = [name for name in VARIANTS if name.startswith(FUNCTIONS)]

# Every layout of a row: groups within a warp, a warp, several; whole vectors and not; in shared memory past 4096.
WIDTHS = [1, 7, 33, 64, 65, 256, 257, 300, 512, 1000, 1024, 2048, 2049, 4096, 4097, 12288]

# (B, T, D). One to eight warps a row; whole vectors and not; rows alone on a multiprocessor, and sharing it.
SHAPES = [
    (3, 1, 1),
    (2, 7, 33),
    (3, 40, 200),
    (2, 33, 260),
    (3, 33, 1000),
    (2, 9, 1024),
    (2, 9, 1031),
    (2, 9, 2048),
    (1, 7, 4090),
    (2, 7, 4096),
    (300, 20, 72),
    (140, 12, 600),
]
LONG = [(1, 4097, 33), (2, 1100, 64), (3, 1000, 520)]  # in chunks


@pytest.fixture(autouse=True)
def cuda_serves():
    with nk.use_backend("cuda"):
        yield


@pytest.mark.parametrize("state", ["acc", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_rows(D, dtype, state):
    """One row, fewer than a block takes at a time, and more than all blocks do."""
    for rows in (1, 7, 20_000 if D <= 64 else 1000 if D <= 2048 else 200):
        check(place(make("context_update", 1, rows, D, dtype, state=state)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LONG, ids=str)
@pytest.mark.parametrize("function", SCANS)
def test_truth(function, shape, dtype):
    # No clamp: where it cuts, a gradient jumps, and the bound on its error is another (see below).
    check(place(make(function, *shape, dtype, clamp=None)))


@pytest.mark.parametrize("clamp", [0.5, 1.0, 1.003, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 33, 1000), (2, 600, 40)], ids=str)
def test_clamp_cuts_values_and_gradients(shape, dtype, clamp):
    """In 16 bits most draws hold components so near the clamp that rounding would decide, did the forward not mark what it
    cut; 1.003 is no number of those dtypes."""
    problem = place(make("context_scan", *shape, dtype, clamp=clamp))
    if dtype == torch.float32 or shape[0] == 3:
        check(problem)
    else:  # a start that is open by the seams' tolerance may bring a component to the other side
        found = errors(problem)
        assert found["output 0"][0] < {torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
        assert found["grad f"][0] < 3e-2


def test_a_context_at_the_clamp_is_not_cut():
    """As in torch.clamp: a weight of zero makes every context the bias."""
    for dtype in DTYPES:
        problem = place(make("context_scan", 2, 5, 64, dtype, clamp=0.5))
        problem.tensors["weight"].zero_()
        problem.tensors["bias"].fill_(0.5)
        found, want = (
            differentiate(problem.run, problem.tensors, [torch.ones(2, 5, 64, dtype=dtype, device="cuda"), None])[1][
                "bias"
            ],
            10.0,
        )
        assert (found == want).all()


@pytest.mark.parametrize(
    "options", [{"state": None}, {"affine": False}, {"state": "own", "affine_dtype": torch.float16}], ids=str
)
@pytest.mark.parametrize("shape", [(2, 33, 264), (2, 700, 40)], ids=str)
def test_options(shape, options):
    check(place(make("context_scan", *shape, torch.bfloat16, clamp=None, **options)))


@pytest.mark.parametrize("only", ["weight", "bias"])
@pytest.mark.parametrize("function", ["context_update", "context_scan"])
def test_one_parameter_alone(function, only):
    problem = place(make(function, 2, 7, 33))
    del problem.tensors["bias" if only == "weight" else "weight"]
    check(problem)


@pytest.mark.parametrize("outputs", [(0,), (1,)])
@pytest.mark.parametrize("shape", [(2, 33, 264), (2, 700, 40)], ids=str)
def test_gradient_of_one_output_alone(shape, outputs):
    """Without c0, whose gradient 700 steps from the last output is no float32."""
    check(place(make("context_scan", *shape, clamp=None, state=None)), outputs=outputs)


@pytest.mark.parametrize("function", ["context_update", "context_scan"])
@pytest.mark.parametrize("D", [33, 1024, 2048])
def test_a_large_mean_takes_nothing_from_the_variance(function, D):
    """Then the squares are summed again, centred."""
    problem = place(make(function, 2, 3, D, clamp=None))
    state = problem.tensors["c" if function == "context_update" else "c0"]
    state += 300.0
    problem.tensors["f"] += 8.0  # what is kept is all of it, so that the mean stays
    f, i, d = (problem.tensors[name].double() for name in "fid")
    u = f.sigmoid() * (state[:, None] if state.dim() == 2 else state).double() + i.sigmoid() * d.tanh()
    first = u[:, 0]
    want = torch.nn.functional.layer_norm(
        first, (D,), problem.tensors["weight"].double(), problem.tensors["bias"].double()
    )
    got = problem.run()[0][:, 0]
    assert (
        got - want
    ).norm() / want.norm() < 1e-4  # float32 holds u itself to 3e-5; the squares alone would leave 1e-2


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("function", SCANS)
@pytest.mark.parametrize("shape", [(3, 17, 64), (2, 600, 64)], ids=str)
def test_layouts(shape, function, layout):
    problem = place(make(function, *shape, clamp=None))
    check(laid_out(problem, layout), layout=gradient_layout(problem, layout))


def test_any_shape_stride_and_alignment():
    """Tensors that begin at any element, in rows of any distance."""
    torch.manual_seed(0)
    choose = random.Random(0)
    for _ in range(40):
        function, dtype = choose.choice((*FUNCTIONS, "context_update_packed")), choose.choice(DTYPES)
        B, T, D = (
            choose.choice([1, 2, 9]),
            choose.choice([1, 5, 70, 600]),
            choose.choice([7, 8, 33, 64, 100, 264, 1032]),
        )
        problem = place(make(function, B, T, D, dtype, clamp=None))
        for name, x in problem.tensors.items():
            if x.dim() == 3:
                gap, offset = choose.choice([0, 1, 8]), choose.choice([0, 1, 2, 4, 8])
                buffer = torch.full((B * T * (x.shape[2] + gap) + offset,), float("nan"), dtype=x.dtype, device="cuda")
                rows = buffer[offset:].view(B, T, x.shape[2] + gap)[..., : x.shape[2]]
                problem.tensors[name] = rows.copy_(x)
        check(problem)


STREAMED = [
    ("context_update", (1, 5000, 1024)),
    ("context_scan", (3, 100, 1000)),
    ("context_scan", (2, 2000, 520)),
    ("context_scan", (200, 60, 300)),
]


@pytest.mark.parametrize(("function", "shape"), STREAMED, ids=str)
def test_same_bits_on_many_streams(function, shape):
    """Calls that share the GPU with others, and calls twice, get the bits of a call alone."""
    check_streams(place(make(function, *shape, torch.bfloat16)))


@pytest.mark.parametrize("forget", [-4.0, 6.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_are_exact_whatever_the_memory(forget, dtype, monkeypatch):
    """Chunks of few steps: a cell that forgets is done after two passes, one that does not goes on in order of time."""
    monkeypatch.setattr(cuda, "plan", lambda *args: (5, 4))
    problem = place(make("context_scan", 3, 19, 264, dtype, clamp=None))
    problem.tensors["f"] = (problem.tensors["f"] / 10 + forget).to(dtype)
    with nk.record_seams() as seams:
        found = errors(problem)
    assert {record.in_order for record in seams} == {forget > 0}
    bound = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    for name, (error, _) in found.items():
        assert error < bound * (10 if name in ("grad weight", "grad bias") else 1), name


@pytest.mark.parametrize("shape", [(2, 30, 64), (2, 800, 64)], ids=str)
def test_nan_stays_in_its_row(shape):
    problem = place(make("context_scan", *shape))
    problem.tensors["f"][1, 5, 3] = float("nan")
    c, last = problem.run()
    assert c[1, 5:].isnan().all()
    assert last[1].isnan().all()
    assert c[0].isfinite().all()
    assert c[1, :5].isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_batch(function):
    problem = place(make(function, 2, 5, 7))
    empty = replace(problem, tensors={k: x[:0] if x.dim() > 1 else x for k, x in problem.tensors.items()})
    outputs, grads = differentiate(empty.run, empty.tensors, [torch.randn_like(x) for x in empty.run()])
    assert all(x.shape[0] == 0 for x in outputs)
    assert (grads["weight"] == 0).all()
    assert (grads["bias"] == 0).all()


def test_no_steps():
    problem = place(make("context_scan", 2, 1, 7))
    problem.tensors |= {name: problem.tensors[name][:, :0] for name in "fid"}
    (c, last), grads = differentiate(
        problem.run, problem.tensors, [torch.empty(2, 0, 7, device="cuda"), torch.ones(2, 7, device="cuda")]
    )
    assert c.shape == (2, 0, 7)
    assert torch.equal(last, problem.tensors["c0"])
    assert (grads["c0"] == 1).all()
    assert (grads["weight"] == 0).all()


@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_opcheck(name):
    opcheck_all(captured(place(variant(name, torch.bfloat16, T=5, D=17))))


@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_compiled_code_gives_the_same_bits(name):
    check_compiled(place(variant(name, T=5, D=17)))


@pytest.mark.parametrize(("function", "shape"), STREAMED, ids=str)
def test_cuda_graph_replays(function, shape):
    check_graph(place(make(function, *shape)))


def test_rows_too_wide_are_refused_by_name():
    with pytest.raises(nk.BackendError, match=r"context_scan.* D up to \d+ on this GPU, got 4104"):
        place(make("context_scan", 1, 3, 4104)).run()


def test_more_than_two_to_the_31_elements():
    """Offsets of 64 bits: the last of 2^31 + 2^20 elements are those of a call on the last rows alone."""
    T, D = 2**21 + 2**10, 1024
    f = torch.randn(T, D, device="cuda").bfloat16()
    got = nk.context_update(f, f, f, f)[-5:]
    assert torch.equal(got, nk.context_update(*[f[-5:].clone()] * 4))
    f, start = f[None], torch.randn(1, D, device="cuda")
    c, last = nk.context_scan(f, f, f, start)
    want, want_last = nk.context_scan(*[f[:, -5:].clone()] * 3, c[:, -6].float())
    assert (last - want_last).norm() < 1e-2 * want_last.norm()
    assert (c[:, -1].float() - want[:, -1].float()).norm() < 2e-2 * want_last.norm()
