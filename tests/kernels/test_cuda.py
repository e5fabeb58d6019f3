"""The CUDA C++ kernels of scan, gated_scan and LayerNorm on a GPU. Elsewhere they are only compiled (test_build.py).

With how many columns and steps a recurrence takes which way depends on the GPU: on one of 132 multiprocessors, 64 columns a block,
67 blocks and more go alone, 9 to 66 in clusters of 8 to 2, and fewer in chunks.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, VARIANTS, check, check_graph, check_streams, laid_out, make, variant
from test_compile import check_compiled
from test_operators import captured, opcheck_all

import newllm_kernels as nk

pytestmark = pytest.mark.gpu

HAS_CLUSTERS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUNCTIONS = ("scan", "gated_scan", "gated_scan_packed")
NORMS = ("layer_norm", "add_layer_norm")
OF_FUNCTIONS = [
    name
    for name in VARIANTS
    if name.startswith(("scan", "gated_scan", *NORMS)) and not name.startswith("gated_scan_layer")
]
# Every layout of a row: parts of a warp, a warp, several; whole vectors and not; one row, and more than the blocks at a time.
WIDTHS = [7, 33, 64, 100, 128, 256, 260, 512, 513, 768, 1000, 1024, 1025, 2048, 3072, 4096, 4097, 6144, 8192]
# A row for several blocks of a cluster, two to eight of them: pieces of one width and not, whole vectors and not.
CLUSTER_WIDTHS = [8193, 8200, 16384, 20001, 24576, 65528, 65535, 65536]

# (B, T, D). Rows of 16 bytes and not; whole windows and not; sizes of {1, 7, 33, 1000, 4097}.
SHAPES = [
    (3, 40, 1),
    (2, 7, 33),
    (3, 33, 1000),
    (2, 1000, 7),
    (1, 4097, 33),
    (2, 7, 4097),
    (8, 1000, 129),
    (100, 130, 72),  # alone
    (2, 4096, 4096),  # alone, all windows whole
    (1, 5000, 1024),  # clusters
    (5, 1000, 520),  # clusters, the last columns of a block missing
    (40, 999, 64),  # clusters of few
    (1, 20000, 64),  # chunks
    (2, 9000, 40),  # chunks
    (1, 6001, 65),  # chunks, rows of odd length
]


@pytest.fixture(autouse=True)
def cuda_serves():
    with nk.use_backend("cuda"):
        yield


def place(problem):
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in problem.options.items()}
    return replace(problem.map(lambda name, x: x.cuda()), options=options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_truth(function, shape, dtype):
    check(place(make(function, *shape, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("function", NORMS)
def test_rows(function, D, dtype):
    for rows in (1, 7, 1000 if D > 1024 else 20_000):
        check(place(make(function, 1, rows, D, dtype)))


@pytest.mark.skipif(not HAS_CLUSTERS, reason="needs compute capability 9.0")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", CLUSTER_WIDTHS)
@pytest.mark.parametrize("function", NORMS)
def test_rows_of_several_blocks(function, D, dtype):
    for rows in (1, 67):  # more than the clusters at a time
        check(place(make(function, 1, rows, D, dtype)))


@pytest.mark.parametrize("affine_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [33, 64, 1024])
def test_parameters_of_another_dtype(D, affine_dtype):
    check(place(make("layer_norm", 2, 9, D, torch.bfloat16, affine_dtype=affine_dtype)))


@pytest.mark.parametrize("D", [33, 64, 1024])
@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_weight_and_bias_need_not_be_alike(missing, D):
    problem = place(make("layer_norm", 2, 9, D, torch.bfloat16))
    problem.tensors["bias"] = problem.tensors["bias"].bfloat16()
    check(problem)
    check(replace(problem, tensors={name: x for name, x in problem.tensors.items() if name != missing}))


@pytest.mark.parametrize("affine_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 9])
def test_gradients_of_the_parameters_come_in_their_dtype(rows, affine_dtype):
    """The same sums, rounded once: the last kernel writes what autograd would have to cast."""
    x, grad = torch.randn(2, rows, 1024, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(1024, dtype=affine_dtype, device="cuda")
    mean, rstd = torch.randn(rows, device="cuda"), torch.rand(rows, device="cuda")
    exact = torch.ops.newllm.layer_norm_backward(grad, None, x, mean, rstd, weight, False)
    rounded = torch.ops.newllm.layer_norm_backward(grad, None, x, mean, rstd, weight, True)
    for sums, got in zip(exact, rounded, strict=True):
        assert torch.equal(sums.to(got.dtype), got)
    assert rounded[1].dtype == rounded[2].dtype == affine_dtype
    assert exact[1].dtype == exact[2].dtype == torch.float32


@pytest.mark.parametrize("D", [33, 1024, 4096])
@pytest.mark.parametrize("function", NORMS)
def test_without_gradients_the_same_bits(function, D):
    """Then statistics are not written, and nothing else is for them."""
    problem = place(make(function, 2, 33, D, torch.bfloat16))
    with torch.no_grad():
        plain = problem.run()
    for x, y in zip(plain, problem.run({k: x.requires_grad_() for k, x in problem.tensors.items()}), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("function", NORMS)
def test_rows_too_wide_are_refused_by_name(function):
    widest = 65536 if HAS_CLUSTERS else 8192
    with pytest.raises(nk.BackendError, match=rf"D up to {widest} .*, got {widest + 8}"):
        place(make(function, 1, 3, widest + 8)).run()


def test_a_large_mean_takes_nothing_from_the_variance():
    """It is of centred values."""
    x = torch.randn(50, 1024, device="cuda") + 1e4
    want = torch.nn.functional.layer_norm(x.double(), (1024,)).float()
    assert (nk.layer_norm(x) - want).abs().max() < 5e-3  # float32 holds the values themselves to 5e-4


@pytest.mark.parametrize("shape", [(2, 300, 64), (1, 5000, 1024), (1, 20000, 64), (1, 300, 5)], ids=str)
@pytest.mark.parametrize("options", [{"state": None}, {"reverse": True}, {"reverse": True, "state": None}], ids=str)
def test_options(shape, options):
    check(place(make("scan", *shape, **options)))


@pytest.mark.parametrize("D", [9, 64, 1024])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_packed_sequences(function, D):
    """Empty sequences, sequences of one step, and one of many windows; few columns, and enough for clusters."""
    bounds = torch.tensor([0, 0, 1, 4000, 4000, 4150])
    check(place(make(function, 1, 4150, D, cu_seqlens=bounds)))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("function", FUNCTIONS + NORMS)
def test_layouts(function, layout):
    check(laid_out(place(make(function, 2, 300, 64)), layout))


def test_any_shape_stride_and_alignment():
    """Tensors that begin at any element, in rows of any distance."""
    torch.manual_seed(0)
    choose = random.Random(0)
    for _ in range(40):
        function, dtype = choose.choice(FUNCTIONS + NORMS), choose.choice(DTYPES)
        B, T, D = choose.choice([1, 1, 2, 9]), choose.randrange(1, 3000), choose.choice([7, 8, 33, 64, 100, 264])
        if function in NORMS:
            T, D = T % 100 + 1, choose.choice([D, 1024, 1032, 4096, 4100, 6145])
        problem = place(make(function, B, T, D, dtype))
        for name, x in problem.tensors.items():
            if x.dim() == 3:
                gap, offset = choose.choice([0, 1, 8]), choose.choice([0, 1, 2, 4, 8])
                buffer = torch.full((B * T * (x.shape[2] + gap) + offset,), float("nan"), dtype=dtype, device="cuda")
                rows = buffer[offset:].view(B, T, x.shape[2] + gap)[..., : x.shape[2]]
                problem.tensors[name] = rows.copy_(x)
        check(problem)


@pytest.mark.parametrize("shape", [(2, 300, 33), (2, 4096, 4096), (1, 5000, 1024), (1, 20000, 64)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS + NORMS)
def test_same_bits_on_many_streams(function, shape):
    """Calls that share the GPU with others get the bits of a call alone: nothing depends on the order of blocks."""
    check_streams(place(make(function, *shape, torch.bfloat16)))


@pytest.mark.parametrize("D", [256, 1024, 4096, 16384])
@pytest.mark.parametrize("function", NORMS)
def test_norms_one_after_the_other(function, D):
    """A kernel that takes its places while the one before runs out must wait for what that writes: each call reads the output
    of the last, into memory that was freed just before."""
    if D > 8192 and not HAS_CLUSTERS:
        pytest.skip("needs compute capability 9.0")
    problem = place(make(function, 1, 500, D, torch.bfloat16))

    def chain(wait):
        tensors = dict(problem.tensors)
        for _ in range(20):
            leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
            outputs = problem.run(leaves)
            grads = torch.autograd.grad(outputs[0], list(leaves.values()), outputs[0].detach())
            tensors["x"] = outputs[0].detach() + grads[0]
            tensors["weight"] = tensors["weight"] + grads[-2].sign() * 1e-3
            if wait:
                torch.cuda.synchronize()
        return tensors

    want = chain(wait=True)
    for name, x in chain(wait=False).items():
        assert want[name].isfinite().all()
        assert torch.equal(x, want[name]), name


@pytest.mark.parametrize("shape", [(2, 300, 64), (1, 5000, 1024), (1, 20000, 64)], ids=str)
@pytest.mark.parametrize("function", ["scan", "gated_scan"])
def test_nan_shows_where_it_belongs(function, shape):
    problem = place(make(function, *shape))
    tensor, T = next(iter(problem.tensors.values())), shape[1]
    tensor[-1, T // 2, 3] = float("nan")
    out = problem.run()[0]
    assert out[-1, T // 2 :, 3].isnan().all()
    out[-1, T // 2 :, 3] = 0.0
    assert out.isfinite().all()


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_small_deltas_keep_their_accuracy(size, dtype):
    """tanh near 0, where 1 - e^-2d cancels."""
    problem = place(make("gated_scan", 2, 300, 64, dtype, state=None))
    problem.tensors["d"] *= size
    check(problem)


@pytest.mark.parametrize("shape", [(2, 600, 64), (1, 5000, 1024), (1, 20000, 64)], ids=str)
def test_decays_above_one_make_no_nan_of_a_state_of_zero(shape):
    """The product of a window's decays overflows; the state is zero until the last step."""
    a, b = torch.full(shape, 2.0, device="cuda"), torch.zeros(shape, device="cuda")
    b[:, -1] = 3.0
    h, last = nk.scan(a, b)
    assert torch.equal(h, b)
    assert torch.equal(last, b[:, -1])
    h, _ = nk.scan(a, torch.ones_like(a))
    assert (h[:, 200:] == torch.inf).all()


def test_saturated_gates_are_exact():
    """Of an input gate and a delta 3e-6 is what the hardware's exponential leaves, element by element: a tanh just above 1/16
    loses three bits of it to 1 - e."""
    f, i, d = torch.randn(3, 1, 40, 64, device="cuda")
    c, _ = nk.gated_scan(torch.full_like(f, -torch.inf), i, d)
    assert torch.allclose(c, torch.sigmoid(i) * torch.tanh(d), rtol=3e-6, atol=0)
    c, _ = nk.gated_scan(f, torch.full_like(i, -torch.inf), d, torch.zeros(1, 64, device="cuda"))
    assert (c == 0).all()


@pytest.mark.parametrize("function", FUNCTIONS + NORMS)
def test_empty_batch(function):
    problem = place(make(function, 2, 5, 7))
    empty = replace(problem, tensors={k: x[:0] if x.dim() > 1 else x for k, x in problem.tensors.items()})
    assert all(x.shape[0] == 0 for x in empty.run())


@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_opcheck(name):
    opcheck_all(captured(place(variant(name, torch.bfloat16, T=5, D=17))))


@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_compiled_code_gives_the_same_bits(name):
    check_compiled(place(variant(name, T=5, D=17)))


@pytest.mark.parametrize("shape", [(4, 256, 64), (1, 5000, 1024), (1, 20000, 64)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS + NORMS)
def test_cuda_graph_replays(function, shape):
    check_graph(place(make(function, *shape)))


def test_more_than_two_to_the_31_elements():
    """Offsets of 64 bits: the last steps of a tensor of 4.3 GB depend on the first."""
    T, D = 2**16 + 3, 2**15 + 8
    a = torch.ones(1, T, D, dtype=torch.bfloat16, device="cuda")
    b = torch.zeros(1, T, D, dtype=torch.bfloat16, device="cuda")
    b[0, 0] = torch.arange(D, device="cuda") % 7
    h, last = nk.scan(a, b)
    assert torch.equal(last[0], b[0, 0].float())
    assert torch.equal(h[0, -1], b[0, 0])
    del h
    (g,) = torch.autograd.grad(nk.scan(a, b.requires_grad_())[1], b, last)
    assert torch.equal(g[0, 0], last[0].bfloat16())


def test_float64_is_refused_by_name():
    with pytest.raises(nk.BackendError, match="no float64 kernels"):
        nk.scan(*torch.ones(2, 1, 2, 3, dtype=torch.float64, device="cuda"))
