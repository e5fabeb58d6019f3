"""gated_scan_layer_norm in one launch of CUDA C++, on a GPU. Elsewhere the kernels are only compiled (test_build.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, VARIANTS, check, check_graph, check_streams, laid_out, make, relative_error, variant
from test_compile import check_compiled
from test_cuda import place
from test_operators import captured, opcheck_all

import newllm_kernels as nk
from newllm_kernels.gated_scan_layer_norm import composed, cuda

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUNCTIONS = ("gated_scan_layer_norm", "gated_scan_layer_norm_packed")
OF_Y = (0, 2)  # outputs whose gradients one launch takes

# (B, T, D). Windows of 64 steps, blocks of 64 columns, 132 blocks at a time on an H100.
SHAPES = [
    (3, 40, 8),  # one block a row, less than a window
    (2, 1000, 64),
    (2, 300, 136),  # the last block of a row with 8 columns
    (3, 257, 1000),
    (1, 1, 1024),
    (8, 300, 1024),
    (20, 130, 1024),  # a team takes more than one sequence
    (150, 65, 64),
    (2, 200, 1992),
    (1, 129, 2048),
]


@pytest.fixture(autouse=True)
def cuda_serves():
    with nk.use_backend("cuda"):
        yield


@pytest.fixture
def one_launch(monkeypatch):
    """The kernels one after the other would fail."""

    def fail(*args):
        pytest.fail("not in one launch")

    monkeypatch.setattr(composed, "gated_scan_layer_norm", fail)
    monkeypatch.setattr(composed, "gated_scan_layer_norm_backward", fail)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_truth(function, shape, dtype, one_launch):
    state = {0: None, 1: "acc", 2: "own"}[(sum(shape) + FUNCTIONS.index(function)) % 3]
    check(place(make(function, *shape, dtype, state=state)), outputs=OF_Y)


@pytest.mark.parametrize("outputs", [(1,), (2,), (0, 1, 2)], ids=str)
def test_gradients_that_take_two_launches(outputs):
    """Few steps: over 300 the last state's gradient of c0 is a product of decays below what float32 holds."""
    check(place(make("gated_scan_layer_norm", 2, 9, 136)), outputs=outputs)


# In 16 bits a value that rounding carries across the clamp changes sides, and its gradient with it.
@pytest.mark.parametrize("affine", [True, False])
def test_clamp(affine, one_launch):
    check(place(make("gated_scan_layer_norm", 2, 300, 136, affine=affine, clamp=1.0)), outputs=OF_Y)


@pytest.mark.parametrize("affine_dtype", DTYPES, ids=str)
def test_parameters_of_another_dtype(affine_dtype, one_launch):
    problem = make("gated_scan_layer_norm", 2, 100, 72, torch.bfloat16, affine_dtype=affine_dtype)
    check(place(problem), outputs=OF_Y)


@pytest.mark.parametrize("state", [None, "acc"])
@pytest.mark.parametrize("D", [64, 1024])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_packed_sequences(function, D, state, one_launch):
    """Empty sequences, sequences of one step, and one of many windows."""
    bounds = torch.tensor([0, 0, 1, 4000, 4000, 4150, 4150])
    check(place(make(function, 1, 4150, D, cu_seqlens=bounds, state=state)), outputs=OF_Y)


def test_more_packed_sequences_than_teams(one_launch):
    bounds = torch.cumsum(torch.randint(0, 90, (301,)), 0)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), bounds])
    problem = make("gated_scan_layer_norm", 1, int(bounds[-1]), 520, torch.bfloat16, cu_seqlens=bounds)
    check(place(problem), outputs=OF_Y)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_layouts(function, layout):
    """Rows at any address: what does not begin at 16 bytes takes two launches."""
    check(laid_out(place(make(function, 2, 300, 64)), layout), outputs=OF_Y)


@pytest.mark.parametrize("shape", [(2, 300, 136), (8, 2000, 1024), (40, 130, 1024)], ids=str)
def test_same_bits_on_many_streams(shape, one_launch):
    """Calls that share the GPU get the bits of a call alone, and none waits for blocks that have no room."""
    check_streams(place(make("gated_scan_layer_norm", *shape, torch.bfloat16)), without=(1,))


def test_the_contexts_are_those_of_gated_scan(one_launch):
    problem = place(make("gated_scan_layer_norm", 2, 64, 1024, torch.bfloat16))
    _, c, last = problem.run()
    want, want_last = nk.gated_scan(*(problem.tensors[name] for name in ("f", "i", "d", "c0")))
    assert (c.float() - want.float()).abs().max() <= 2**-7 * want.float().abs().max()
    assert torch.allclose(last, want_last, rtol=1e-5, atol=1e-6)


def test_nan_shows_where_it_belongs(one_launch):
    problem = place(make("gated_scan_layer_norm", 3, 300, 136))
    problem.tensors["f"][1, 150, 3] = float("nan")
    y, c, _ = problem.run()
    assert c[1, 150:, 3].isnan().all()
    assert y[1, 150:].isnan().all()
    assert y[1, :150].isfinite().all()
    assert y[[0, 2]].isfinite().all()


def test_a_large_mean_takes_nothing_from_the_variance(one_launch):
    """Squares are of values centred in their block, and blocks are added up by their means."""
    f = torch.full((1, 70, 256), 30.0, device="cuda")  # keeps the state
    i, d, c0 = torch.randn_like(f) - 30, torch.randn_like(f), 1e3 + torch.randn(1, 256, device="cuda")
    y, c, _ = nk.gated_scan_layer_norm(f, i, d, c0)
    want = torch.nn.functional.layer_norm(c.double(), (256,)).float()
    assert (y - want).abs().max() < 1e-3  # float32 holds the values themselves to 6e-5


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("gated_scan_layer")])
def test_opcheck(name):
    opcheck_all(captured(place(variant(name, torch.bfloat16, T=5, D=24))))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("gated_scan_layer")])
def test_compiled_code_gives_the_same_bits(name):
    check_compiled(place(variant(name, T=5, D=24)))


@pytest.mark.parametrize("shape", [(4, 256, 64), (8, 1000, 1024)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_cuda_graph_replays(function, shape, one_launch):
    check_graph(place(make(function, *shape)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_batch(function):
    problem = place(make(function, 2, 5, 8))
    empty = replace(problem, tensors={k: x[:0] if x.dim() > 1 else x for k, x in problem.tensors.items()})
    assert all(x.shape[0] == 0 for x in empty.run())


@pytest.mark.parametrize(
    ("D", "reason"), [(2056, "D up to 2048, got 2056"), (33, "rows of whole 16 bytes, got D = 33 of torch.float32")]
)
def test_widths_that_it_refuses_by_name(D, reason):
    with pytest.raises(nk.BackendError, match=reason):
        place(make("gated_scan_layer_norm", 1, 3, D)).run()


@pytest.mark.parametrize(("steps", "small"), [(2000, True), (20000, False)])
def test_auto_leaves_few_sequences_to_triton_and_small_calls_to_two_launches(steps, small, monkeypatch):
    two_launches, calls = composed.gated_scan_layer_norm, []
    monkeypatch.setattr(composed, "gated_scan_layer_norm", lambda *args: calls.append(args) or two_launches(*args))
    problem = place(make("gated_scan_layer_norm", 1, steps, 64, torch.bfloat16))
    with nk.use_backend("auto"):
        got = problem.run()
        assert not cuda.in_one_launch(problem.tensors["f"], 64, None, (), backward=False)
    assert len(calls) == int(small)
    for x, want in zip(got, problem.truth({n: x.cpu().double() for n, x in problem.tensors.items()}), strict=True):
        assert relative_error(x, want) < 8e-3  # bfloat16; y is of a c that was rounded
