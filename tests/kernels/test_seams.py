"""record_seams: what `context_scan` tells of its passes over chunks of time.

Where there is no GPU the chunks run in Triton's interpreter, like all of test_triton.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import make, relative_error

import newllm_kernels as nk
from newllm_kernels.context_scan import cuda, passes
from newllm_kernels.context_scan.seams import Seams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 1e-3}  # as docs/kernels.md states it
B, CHUNKS, STEPS, D = 2, 5, 4, 9
WHOLE = {"chunks": 1, "passes": 1, "mismatch": 0.0, "in_order": False}


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def in_chunks(monkeypatch, request):
    """Few steps in chunks, which the plan would walk in one piece."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        from newllm_kernels.context_scan import triton

        monkeypatch.setattr(triton, "plan", lambda *args: triton.Plan(CHUNKS, STEPS, 1, 2))
    else:
        monkeypatch.setattr(cuda, "plan", lambda *args: (CHUNKS, STEPS))
    with nk.use_backend(request.param):
        yield


def problem(forget, dtype=torch.float32):
    """Random gates, those of forgetting around `forget`; the last chunk is shorter."""
    made = make("context_scan", B, CHUNKS * STEPS - 1, D, dtype, clamp=None).map(lambda name, x: x.to(DEVICE))
    made.tensors["f"] = (made.tensors["f"] / 10 + forget).to(dtype)
    return made


def both_ways(problem):
    c, last = problem.run({name: x.requires_grad_() for name, x in problem.tensors.items()})
    (c.square().sum() + last.sum()).backward()


def told(seams, *names):
    return {name: getattr(seams, name) for name in names or WHOLE}


def move_of_second_pass(problem):
    """The largest relative change between the states after a chunk from a guess and from the state that this left before."""
    tensors = dict(problem.tensors)
    guess, worst = tensors.pop("c0"), 0.0
    chunks = [tensors | {name: tensors[name].split(STEPS, dim=1)[k] for name in "fid"} for k in range(CHUNKS - 1)]
    ends = [problem.run(chunk | {"c0": guess})[1] for chunk in chunks]
    for start, old, chunk in zip(ends, ends[1:], chunks[1:], strict=False):
        new = problem.run(chunk | {"c0": start})[1]
        worst = max(worst, ((new - old).norm(dim=1) / new.norm(dim=1)).max().item())
    return worst


def test_a_cell_that_forgets_takes_two_passes(in_chunks):
    short = problem(-4.0, torch.bfloat16)
    with nk.record_seams() as seams:
        both_ways(short)
    assert [told(x, "direction", "chunks", "steps", "passes", "in_order") for x in seams] == [
        {"direction": way, "chunks": CHUNKS, "steps": STEPS, "passes": 2, "in_order": False}
        for way in ("forward", "backward")
    ]
    assert all(0 < x.mismatch <= TOLERANCE[torch.bfloat16] for x in seams)
    with nk.use_backend("reference"):
        want = move_of_second_pass(short)
    assert seams[0].mismatch == pytest.approx(want, rel=5e-2)  # a difference of close states, rounded as such


def test_a_cell_that_never_forgets_ends_in_order_of_time(in_chunks):
    long = problem(6.0)
    with nk.record_seams() as seams:
        both_ways(long)
    for record, way in zip(seams, ("forward", "backward"), strict=True):
        assert told(record, "direction", "passes", "in_order") == {"direction": way, "passes": 4, "in_order": True}
        assert TOLERANCE[torch.float32] * 0.999 < record.mismatch < 2 * TOLERANCE[torch.float32]
    exact = {name: x.detach().to("cpu", torch.float64) for name, x in long.tensors.items()}
    assert relative_error(long.run()[0], long.truth(exact)[0]) < 5e-6  # so what it says is left is all that is left


@pytest.mark.parametrize(
    ("moves", "passes", "mismatch", "in_order"),
    [
        ([[0, 0], [0, 0], [0, 0]], 2, 0.0, False),
        ([[0.01, 0.02], [0, 0], [0, 0]], 2, 0.02, False),
        ([[0.5, 0], [0, 0.03], [0, 0]], 3, 0.03, False),  # what a chunk was computed again for is not left
        ([[0.5, 0], [0, 0.5], [0.04, 0]], 4, 0.04, False),
        ([[0.5, 0.04], [0.5, 0.04], [0, 0.04]], 4, 0.12, False),  # three moves, each too small to compute it again
        ([[0.5, 0.5], [0.5, 0.5], [0.01, 0.5]], 4, 0.11, True),
        ([[math.nan, 0], [0, math.nan], [0, math.nan]], 4, 0.1, True),
    ],
)
def test_what_the_changes_tell(moves, passes, mismatch, in_order):
    """Of two seams, tolerance 0.1. What the kernels do not write must not count, NaN least of all."""
    change = torch.full((4, 1, 4), math.nan)
    change[1:, 0, 2:] = torch.tensor(moves).square()
    seams = Seams("forward", 7, 4, change, 0.1**2)
    assert told(seams) == {
        "chunks": 4, "passes": passes, "mismatch": pytest.approx(mismatch), "in_order": in_order,
    }  # fmt: skip


def test_the_largest_of_all_rows_counts():
    change = torch.zeros(4, 3, 4)
    change[1, 1, 3] = 0.05**2
    assert Seams("forward", 7, 4, change, 0.1**2).mismatch == pytest.approx(0.05)
    change[1, 2, 2] = 1.0
    assert Seams("forward", 7, 4, change, 0.1**2).passes == 3


@pytest.mark.parametrize(
    ("B", "T", "want"),
    [
        (8, 4096, (33, 125)),
        (1, 16384, (64, 256)),
        (1, 600, (9, 67)),
        (1, 511, (1, 511)),  # chunks of 64 steps would be seven
        (34, 4096, (1, 4096)),  # rows enough
        (0, 600, (1, 600)),
    ],
)
def test_the_plan_of_132_multiprocessors(B, T, want):
    chunks, steps = passes.chunks(B, T, 132)
    assert (chunks, steps) == want
    assert (chunks - 1) * steps < max(T, 1) <= chunks * steps  # the last has at least one


def test_two_chunks_have_no_seam_that_moves():
    assert Seams("forward", 7, 2, torch.full((4, 1, 2), math.nan), 0.01).passes == 2


@pytest.mark.parametrize("backend", ["auto", "reference", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("rows", "T"), [(2, 3), (0, 600)])  # many steps of no row need no chunks
def test_without_chunks_one_pass(backend, rows, T):
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    f = torch.randn(rows, T, 4, device=DEVICE, requires_grad=True)
    with nk.use_backend(backend), nk.record_seams() as seams:
        nk.context_scan(f, f, f)[0].sum().backward()
    assert [told(x, *WHOLE, "direction", "steps") for x in seams] == [
        WHOLE | {"direction": way, "steps": T} for way in ("forward", "backward")
    ]


def test_blocks_nest_and_record_only_what_is_inside():
    def call(T, width=6):
        nk.context_scan_packed(torch.randn(1, T, width))

    call(1)
    with nk.record_seams() as outer:
        call(2)
        with nk.record_seams() as inner:
            call(3)
        with pytest.raises(ValueError, match="gates"), nk.record_seams() as failed:
            call(4, width=7)
        call(5)
    call(6)
    assert [x.steps for x in outer] == [2, 3, 5]
    assert [x.steps for x in inner] == [3]
    assert failed == []


def test_nothing_is_read_until_asked_and_then_once(in_chunks):
    with nk.record_seams() as seams:
        problem(-4.0).run()
    seams[0]._change.zero_()
    assert told(seams[0], "passes", "mismatch") == {"passes": 2, "mismatch": 0.0}
    seams[0]._change.fill_(1.0)
    assert seams[0].passes == 2


def test_compiled_code_is_recorded_from_outside_and_runs_from_inside():
    def from_inside(f):
        with nk.record_seams():
            return nk.context_scan(f, f, f)[0]

    f = torch.randn(2, 3, 4)
    want = nk.context_scan(f, f, f)[0]
    run = torch.compile(lambda f: nk.context_scan(f, f, f)[0], fullgraph=True, backend="aot_eager")
    for _ in range(2):  # compiled, and compiled before
        with nk.record_seams() as seams:
            assert torch.equal(run(f), want)
        assert [told(x) for x in seams] == [WHOLE]
    assert torch.equal(torch.compile(from_inside, backend="aot_eager")(f), want)


@pytest.mark.gpu
def test_a_captured_call_is_not_recorded():
    long = make("context_scan", 1, 1024, 64).map(lambda name, x: x.to(DEVICE))
    with torch.no_grad(), nk.record_seams() as seams:
        want = long.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = long.run()
        graph.replay()
    assert [x.chunks > 1 for x in seams] == [True]
    assert all(torch.equal(x, y) for x, y in zip(captured, want, strict=True))
