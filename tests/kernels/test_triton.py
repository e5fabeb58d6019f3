"""The Triton kernels of every operation: on a GPU over the full grid, elsewhere in Triton's interpreter on small shapes.

The interpreter runs the programs of a grid one after the other, in numpy; it shows wrong masks, offsets and formulas, not
races. Its bfloat16 conversions truncate instead of rounding, so there bfloat16 may be off by twice as much.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import cases
import pytest
import torch
import torch._dynamo
from cases import VARIANTS, Problem, check, check_graph, differentiate, laid_out, make, variant
from test_compile import check_compiled
from test_operators import captured, opcheck_all
from torch._dynamo.testing import CompileCounterWithBackend

import newllm_kernels as nk

pytest.importorskip("triton", reason="triton is not installed")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEQUENCES = (
    "scan", "gated_scan", "gated_scan_packed", "gated_scan_layer_norm", "gated_scan_layer_norm_packed", "context_scan",
    "context_scan_packed",
)  # fmt: skip
ROWS = ("context_update", "context_update_packed", "layer_norm", "add_layer_norm")

# (B, T, D). Interpreted: 70 steps are one tile and the start of another, 300 of one sequence make chunks that look back,
# 17 columns are no power of two. On a GPU every size of {1, 7, 33, 1000, 4097} as T and D, one partner each, and sequences
# so few and long that the scans look back.
# context_scan interprets a whole row step by step, so it gets few steps.
SMALL = [(2, 70, 17), (1, 300, 5)]
FEW_STEPS = [(2, 9, 17), (3, 7, 33)]
LARGE = [
    (3, 40, 1),
    (2, 7, 33),
    (3, 33, 1000),
    (2, 1000, 7),
    (1, 4097, 33),
    (2, 7, 4097),
    (8, 1000, 129),
    (1, 20000, 64),
]


def shapes(function: str) -> list[tuple[int, int, int]]:
    return LARGE if GPU else FEW_STEPS if function.startswith("context_scan") else SMALL


# A row of one is left out where it is normalised: the true gradient is zero, and fused multiply-adds leave 1e-9 of it.
GRID = [
    (function, shape)
    for function in SEQUENCES + ROWS
    for shape in shapes(function)
    if shape[2] > 1 or function in ("scan", "gated_scan", "gated_scan_packed")
]


@pytest.fixture(autouse=True)
def triton_serves():
    with nk.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def interpreted_rounding(monkeypatch):
    if not GPU:
        doubled = {**cases.TOLERANCE, torch.bfloat16: 2 * cases.TOLERANCE[torch.bfloat16]}
        monkeypatch.setattr(cases, "TOLERANCE", doubled)
        monkeypatch.setattr(cases, "GRADIENT_TOLERANCE", {dtype: 2 * value for dtype, value in doubled.items()})


def place(problem: Problem) -> Problem:
    return problem.map(lambda name, x: x.to(DEVICE))


def place_options(problem: Problem) -> Problem:
    """With the boundaries of packed sequences on the device too."""
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in problem.options.items()}
    return replace(place(problem), options=options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("function", "shape"), GRID, ids=str)
def test_truth(function, shape, dtype):
    check(place(make(function, *shape, dtype)))


@pytest.mark.parametrize("function", ["context_scan", "layer_norm", "add_layer_norm", "context_update"])
def test_a_row_of_one_is_its_bias(function):
    problem = place(make(function, 2, 3, 1))
    outputs = problem.run()
    assert (outputs[0] == problem.tensors["bias"].clamp(-10, 10)).all()
    _, gradients = differentiate(problem.run, problem.tensors, [torch.ones_like(x) for x in outputs])
    own = gradients[next(iter(problem.tensors))]
    through_the_sum = 1.0 if function == "add_layer_norm" else 0.0
    assert (own - through_the_sum).abs().max() < 1e-4  # what rounding leaves of a weight's size, over sqrt(eps)


@pytest.mark.parametrize(
    "function", ["context_scan", "layer_norm", "add_layer_norm", "context_update", "gated_scan_layer_norm"]
)
def test_wide_rows(function):
    """Past 8192 columns LayerNorm walks a row in blocks; the cell refuses and says so."""
    D = 9001 if GPU else 8200
    problem = place(make(function, 1, 3, D))
    if function in ("context_scan", "context_update", "gated_scan_layer_norm"):
        with pytest.raises(nk.BackendError, match="D up to 8192"):
            problem.run()
    else:
        check(problem)


@pytest.mark.parametrize("function", ["scan", "gated_scan", "context_scan"])
def test_without_a_start_state(function):
    check(place(make(function, 2, 10, 9, state=None)))


@pytest.mark.parametrize("way", ["stream", "chunks", "look-back"])
@pytest.mark.parametrize(("function", "options"), [("scan", {}), ("scan", {"reverse": True}), ("gated_scan", {})])
def test_every_way_through_time(function, options, way, monkeypatch):
    """Whatever the plan would be. Look-back: more than one group of chunks."""
    from newllm_kernels.scan import triton_plan

    plan = triton_plan.plan
    small = {} if GPU else {"R": 1, "G": 4}
    monkeypatch.setattr(triton_plan, "plan", lambda *args: plan(*args)._replace(way=way, chunks=3, **small))
    check(place(make(function, *((2, 5000) if GPU else (1, 90)), 9, **options)))


@pytest.mark.parametrize("dtype", DTYPES if GPU else DTYPES[:2], ids=str)
@pytest.mark.parametrize("memory", [0.0, 6.0], ids=["short memory", "long memory"])
def test_passes_over_chunks_of_time(memory, dtype, monkeypatch):
    """Short memory: the second pass finds all seams closed. Long: what the passes leave open is computed in order of time."""
    from newllm_kernels.context_scan import triton

    T, chunks = (900, 30) if GPU else (36, 9)
    monkeypatch.setattr(triton, "plan", lambda *args: triton.Plan(chunks, T // chunks, 4 if GPU else 1, 2))
    problem = make("context_scan", 2, T - 1, 33 if GPU else 9, dtype)
    problem.tensors["f"] += memory
    problem = place(problem)
    for name, (error, _) in cases.errors(
        problem
    ).items():  # the last state too is only as exact as the seams are closed
        assert error <= cases.tolerance(problem, "grad" if name.startswith("grad") else name, dtype), (name, error)


@pytest.mark.parametrize("T", [40, 300])
def test_reverse(T):
    check(place(make("scan", 1, T, 5, reverse=True)))


@pytest.mark.parametrize("function", ["scan", "gated_scan", "gated_scan_packed", "gated_scan_layer_norm"])
def test_packed_sequences(function):
    """Empty sequences, sequences of one step, and one longer than a tile."""
    check(place(make(function, 1, 150, 9, cu_seqlens=torch.tensor([0, 0, 1, 130, 130, 150], device=DEVICE))))


@pytest.mark.parametrize("layout", sorted(cases.LAYOUTS))
@pytest.mark.parametrize("function", ["gated_scan", "context_scan_packed", "context_update", "add_layer_norm"])
def test_layouts(function, layout):
    check(laid_out(place(make(function, 2, 10, 9)), layout))


@pytest.mark.parametrize("affine_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["context_scan", "context_update", "layer_norm", "add_layer_norm"])
def test_parameters_of_another_dtype(function, affine_dtype):
    """They are read as they are: no kernel casts them first."""
    check(place(make(function, 2, 9, 33, torch.bfloat16, affine_dtype=affine_dtype)))


@pytest.mark.parametrize("function", ["context_scan", "context_update"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamp(function, dtype):
    check(place(make(function, 2, 9, 33, dtype, clamp=1.0)))


@pytest.mark.parametrize("function", SEQUENCES + ROWS)
def test_empty_batch(function):
    problem = place(make(function, 2, 5, 7))
    empty = replace(problem, tensors={k: x[:0] if x.dim() > 1 else x for k, x in problem.tensors.items()})
    outputs = empty.run()
    assert all(x.shape[0] == 0 for x in outputs)


@pytest.mark.parametrize("function", SEQUENCES + ROWS)
def test_same_bits_twice(function):
    problem = place(
        make(function, 2, 300, 33) if GPU else make(function, 1, 20 if function.startswith("context_scan") else 140, 5)
    )
    grads = [torch.randn_like(x) for x in problem.run()]
    (outputs, gradients), (outputs_again, gradients_again) = (
        differentiate(problem.run, problem.tensors, grads) for _ in range(2)
    )
    for x, y in zip(outputs, outputs_again, strict=True):
        assert torch.equal(x, y)
    for name, x in gradients.items():
        assert torch.equal(x, gradients_again[name]), name


@pytest.mark.parametrize("function", ["scan", "gated_scan", "context_scan", "context_update", "layer_norm"])
def test_nan_shows_where_it_belongs(function):
    problem = place(make(function, 2, 10, 9))
    name = next(iter(problem.tensors))
    problem.tensors[name][1, 3] = float("nan")
    out = problem.run()[0]
    assert out[0].isfinite().all()
    assert out[1, 3].isnan().all()


# recurrent_context has no Triton kernel.
OF_TRITON = [name for name in VARIANTS if not name.startswith("recurrent_context")]


# opcheck calls an operator some ten times, and the interpreter takes seconds for a scan.
@pytest.mark.parametrize("name", OF_TRITON if GPU else ["scan", "context_update", "context_scan", "add_layer_norm"])
def test_opcheck(name):
    opcheck_all(captured(place_options(variant(name, torch.bfloat16, T=5, D=17))))


@pytest.mark.parametrize("name", OF_TRITON)
def test_compiled_code_gives_the_same_bits(name):
    check_compiled(place_options(variant(name, T=5, D=17)))


@pytest.mark.gpu
@pytest.mark.parametrize("function", ["gated_scan_packed", "context_scan", "layer_norm"])
def test_inductor_compiles_once_for_all_lengths(function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    problem = place(make(function, 2, 40, 64))
    run = torch.compile(lambda tensors: problem.run(tensors), fullgraph=True, backend=counter)
    for T in (40, 333, 1000, 77):
        longer = place(make(function, 2, T, 64))
        for x, y in zip(run(longer.tensors), longer.run(), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count <= 2  # the first length as a constant, then once for all


@pytest.mark.gpu
@pytest.mark.parametrize("function", SEQUENCES + ROWS)
def test_a_new_length_compiles_nothing(function):
    """T is no constant of a kernel: lengths that divide the tile, and lengths that do not, compile once each."""
    from newllm_kernels.triton_support import Kernel

    def compiled():
        return sum(
            len(kernel.compiled)
            for module in ("scan", "context_scan", "context_update", "gated_scan_layer_norm", "layer_norm")
            for kernel in vars(import_module(f"newllm_kernels.{module}.triton")).values()
            if isinstance(kernel, Kernel)
        )

    def run(T):
        problem = place(make(function, 3, T, 64))
        grads = [torch.randn_like(x) for x in problem.run()]
        differentiate(problem.run, problem.tensors, grads)

    for T in (30, 64, 2001, 2048):  # short and long, divisible by a tile and not
        run(T)
    before = compiled()
    for T in (31, 128, 2333, 4096, 3001, 2560):
        run(T)
    assert compiled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("function", SEQUENCES + ROWS)
def test_cuda_graph_replays(function):
    check_graph(place(make(function, 4, 256, 64)))


@pytest.mark.gpu
def test_float64_is_refused_by_name():
    with pytest.raises(nk.BackendError, match="no float64 kernels"):
        nk.layer_norm(torch.ones(2, 3, dtype=torch.float64, device="cuda"))
