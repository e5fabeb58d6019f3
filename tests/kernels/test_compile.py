"""torch.compile: whole graphs forward and backward, one compilation for all lengths."""

from __future__ import annotations

import pytest
import torch
from cases import VARIANTS, check, differentiate, variant
from torch._dynamo.testing import CompileCounterWithBackend

import newllm_kernels as nk


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(problem, backend):
    """The problem's call, compiled without graph breaks."""

    @torch.compile(fullgraph=True, backend=backend)
    def run(tensors):
        outputs = problem.run(tensors)
        return tuple(2 * x for x in outputs)  # something around the operator, so that there is a graph to speak of

    return lambda tensors: tuple(x / 2 for x in run(tensors))  # powers of two: no rounding


def check_compiled(problem):
    """Compiled code leaves the bits and strides that the operator leaves by itself, forward and backward."""
    torch._dynamo.reset()
    grads = [torch.randn_like(x) for x in problem.run()]
    want, want_grads = differentiate(problem.run, problem.tensors, grads)
    got, got_grads = differentiate(compiled(problem, "aot_eager"), problem.tensors, grads)
    for x, y in zip((*got, *got_grads.values()), (*want, *want_grads.values()), strict=True):
        assert torch.equal(x, y)
        assert x.stride() == y.stride()


@pytest.mark.parametrize("name", VARIANTS)
def test_same_bits_forward_and_backward(name):
    """aot_eager traces forward and backward through the fake kernels as inductor does, and compiles in milliseconds."""
    check_compiled(variant(name))


# Of packed sequences too, whose number then varies with T; the other variants differ in options, which are constants.
@pytest.mark.parametrize(
    "name",
    ["scan-reverse-h0", "gated_scan-c0", "context_update", "context_scan_packed", "layer_norm", "add_layer_norm"],
)
def test_one_compilation_for_all_lengths_and_batches(name):
    counter, call = CompileCounterWithBackend("aot_eager"), variant(name)
    run = torch.compile(lambda tensors: call.run(tensors), fullgraph=True, backend=counter)

    for B, T in ((2, 5), (3, 9), (4, 17), (5, 1000), (6, 33)):
        problem = variant(name, B=B, T=T)
        for x, y in zip(run(problem.tensors), problem.run(), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count <= 2  # the first sizes as constants, then once for all


def test_one_compilation_for_all_packings():
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda a, b, bounds: nk.scan(a, b, cu_seqlens=bounds), fullgraph=True, backend=counter)
    for bounds in ([0, 5], [0, 2, 9], [0, 0, 4, 17], [0, 1, 2, 3, 33]):
        a, b = torch.rand(1, bounds[-1], 7), torch.randn(1, bounds[-1], 7)
        for x, y in zip(run(a, b, torch.tensor(bounds)), nk.scan(a, b, cu_seqlens=torch.tensor(bounds)), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count <= 3  # one or two sequences are constants of their own, as any size of 0 or 1 is


def test_bad_boundaries_are_refused_in_compiled_code_too():
    run = torch.compile(lambda a, bounds: nk.scan(a, a, cu_seqlens=bounds), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens: got \\[0, 4, 3, 5\\], which element 2 is 3"):
        run(torch.rand(1, 5, 7), torch.tensor([0, 4, 3, 5]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled_code_obeys_use_backend(backend):
    problem = variant("scan")
    run = compiled(problem, "aot_eager")
    with nk.use_backend(backend):
        assert torch.equal(run(problem.tensors)[0], problem.run()[0])


def test_inductor():
    """The default backend, once: it costs seconds, and to it our operators are calls like any other."""
    layer = nk.ContextUpdate(16, 8)
    head = nk.LayerNorm(8)

    def loss(hidden):
        contexts, last = layer(hidden)
        return head(torch.nn.functional.gelu(contexts)).square().mean() + last.tanh().sum()

    hidden = torch.randn(2, 5, 16, requires_grad=True)
    parameters = [hidden, *layer.parameters(), *head.parameters()]
    want, want_grads = loss(hidden), torch.autograd.grad(loss(hidden), parameters)
    got = torch.compile(loss, fullgraph=True)(hidden)
    torch.testing.assert_close(got, want)
    for x, y in zip(torch.autograd.grad(got, parameters), want_grads, strict=True):
        torch.testing.assert_close(x, y)


def test_compiled_values_are_right():
    """Against the truth, as the tests above compare compiled with uncompiled kernels."""
    problem = variant("context_scan", clamp=None)
    check(problem, run=compiled(problem, "aot_eager"))
