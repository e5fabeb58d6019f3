"""Cross entropy over a vocabulary: the truth is PyTorch's in float64, whole or in blocks, in PyTorch and in Triton."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from newllm import cross_entropy
from newllm.cross_entropy import linear_cross_entropy

GPU = torch.cuda.is_available()
# Logits are rounded to the storage's precision (2^-24, 2^-9), and gradients once more; sums run over 5000 columns.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2}


@pytest.fixture(params=["whole", "blocks", "padded", "triton"])
def way(request, monkeypatch):
    """Blocks: room for five rows of logits at once."""
    if request.param == "blocks":
        monkeypatch.setattr(cross_entropy, "_rows_at_once", lambda weight: 5)
    if request.param in ("padded", "triton"):  # as on a GPU
        monkeypatch.setattr(cross_entropy, "_columns", lambda V, device: -(-V // 64) * 64)
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        from newllm import cross_entropy_triton

        for name in ("row_losses", "logit_gradients_"):
            monkeypatch.setattr(cross_entropy, name, getattr(cross_entropy_triton, name))
    return request.param


def problem(dtype, N=23, E=6, V=37, device="cpu"):
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((N, E), (V, E)))
    targets = torch.randint(V, (N,), generator=draw)
    grad = torch.randn(N, generator=draw, dtype=torch.float64)
    x, weight = (t.to(dtype).to(device).requires_grad_() for t in (x, weight))
    return x, weight, targets.to(device), grad.to(device)


def truth(x, weight, targets, grad):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    nll = F.cross_entropy(x @ weight.t(), targets, reduction="none")
    return nll.detach(), *torch.autograd.grad(nll, (x, weight), grad)


def assert_close(got, want, dtype):
    for name, one, true in zip(("nll", "x", "weight"), got, want, strict=True):
        error = ((one.double() - true).norm() / true.norm()).item()
        assert error <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_words_that_share_the_target(way, dtype):
    """Against the same sum in float64; the target is among the words in some rows, shares sum to one in others."""
    if way == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels reduce in float32")
    V = 37
    x, weight, targets, grad = problem(dtype, V=V, device="cuda" if GPU and way == "triton" else "cpu")
    draw = torch.Generator().manual_seed(1)
    words = torch.stack([torch.randperm(V, generator=draw)[:5] for _ in range(len(x))]).to(x.device)
    words[:4, 2] = torch.where((words[:4] == targets[:4, None]).any(1), words[:4, 2], targets[:4])
    shares = torch.rand(words.shape, generator=draw).to(x.device)
    shares = shares / shares.sum(1, keepdim=True) * torch.linspace(0, 1, len(x), device=x.device)[:, None]
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logp = (wide_x @ wide_weight.t()).log_softmax(-1)
    each = -logp.gather(1, torch.cat([words, targets[:, None]], 1))
    nll = (each * torch.cat([shares.double(), 1 - shares.double().sum(1, keepdim=True)], 1)).sum(1)
    want = nll.detach(), *torch.autograd.grad(nll, (wide_x, wide_weight), grad)
    got = linear_cross_entropy(x, weight, targets, words, shares)
    assert_close((got.detach(), *torch.autograd.grad(got, (x, weight), grad.to(got.dtype))), want, dtype)


def test_words_that_do_not_fit():
    x, weight, targets, _ = problem(torch.float32)
    words = torch.zeros(23, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="words, shares: got one without the other"):
        linear_cross_entropy(x, weight, targets, words)
    with pytest.raises(ValueError, match=r"words: got \(22, 2\)"):
        linear_cross_entropy(x, weight, targets, words[:22], torch.zeros(22, 2))
    with pytest.raises(ValueError, match=r"shares: got \(23, 1\)"):
        linear_cross_entropy(x, weight, targets, words, torch.zeros(23, 1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("V", [37, 5000])  # Triton walks blocks of 4096 columns
def test_loss_and_gradients(way, dtype, V):
    if way == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels reduce in float32")
    x, weight, targets, grad = problem(dtype, V=V, device="cuda" if GPU and way == "triton" else "cpu")
    nll = linear_cross_entropy(x, weight, targets)
    assert nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    got = nll.detach(), *torch.autograd.grad(nll, (x, weight), grad.to(nll.dtype))
    assert_close(got, truth(x, weight, targets, grad), dtype)


def test_a_second_backward_is_the_first(way):
    x, weight, targets, grad = problem(torch.float32, device="cuda" if GPU and way == "triton" else "cpu")
    nll = linear_cross_entropy(x, weight, targets)
    first, second = (torch.autograd.grad(nll, (x, weight), grad.float(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_of_one_alone(way):
    x, weight, targets, grad = problem(torch.float32, device="cuda" if GPU and way == "triton" else "cpu")
    want = truth(x, weight, targets, grad)
    for wanted, leaf, other in ((want[1], 0, 1), (want[2], 1, 0)):
        pair = [x.detach(), weight.detach()]
        pair[leaf].requires_grad_()
        pair[other].requires_grad_(False)
        linear_cross_entropy(*pair, targets).backward(grad.float())
        assert torch.allclose(pair[leaf].grad.double(), wanted, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    x, weight, targets, _ = problem(torch.float64, N=4, E=3, V=5)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets), (x, weight))


def test_large_logits_do_not_overflow_and_nan_shows(way):
    x, weight, targets, _ = problem(torch.float32, device="cuda" if GPU and way == "triton" else "cpu")
    far = x.detach() * 1e4
    got = linear_cross_entropy(far, weight, targets)
    want = F.cross_entropy(far.double() @ weight.detach().double().t(), targets, reduction="none")
    assert torch.allclose(got.double(), want, rtol=1e-5)
    far[3, 0] = torch.nan
    assert linear_cross_entropy(far, weight, targets).isnan().nonzero().flatten().tolist() == [3]


def test_blocks_hold_few_rows(monkeypatch):
    """What is kept for the backward does not grow with N."""
    seen = []
    real = cross_entropy.row_losses
    monkeypatch.setattr(
        cross_entropy, "row_losses", lambda logits, *rest: (seen.append(logits.shape), real(logits, *rest))
    )
    monkeypatch.setattr(cross_entropy, "KEPT_BYTES", 37 * 4 * 10)
    x, weight, targets, _ = problem(torch.float32)
    nll = linear_cross_entropy(x, weight, targets)
    assert [tuple(shape) for shape in seen] == [(10, 37), (10, 37), (3, 37)]
    assert nll.grad_fn.logits is None


def test_arguments_are_named():
    x, weight, targets, _ = problem(torch.float32)
    with pytest.raises(ValueError, match=r"x, weight: got \(23, 5\) and \(37, 6\)"):
        linear_cross_entropy(x[:, :5], weight, targets)
    with pytest.raises(ValueError, match=r"targets: got \(22,\) of torch.int64, wanted \(23,\)"):
        linear_cross_entropy(x, weight, targets[:22])
    with pytest.raises(ValueError, match=r"targets: got .* of torch.int32"):
        linear_cross_entropy(x, weight, targets.int())
