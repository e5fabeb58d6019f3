"""What every operation owes, whatever it computes: gradients from any output, any layout, NaN that shows, the same bits
again, and operators that PyTorch's own checks accept. VARIANTS in cases.py lists the calls."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import (
    GRADIENT_TOLERANCE,
    LAYOUTS,
    THROUGH_ROUNDED,
    TRUTH,
    VARIANTS,
    check,
    differentiate,
    errors,
    gradient_layout,
    laid_out,
    variant,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import newllm_kernels as nk
from newllm_kernels import operator

all_variants = pytest.mark.parametrize("name", VARIANTS)


class _Recorder(TorchDispatchMode):
    """Keeps the calls of newllm::* operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "newllm":
            self.calls[function] = args
        return function(*args, **(kwargs or {}))


def captured(problem):
    """The operators that a call and its backward run, with their arguments."""
    recorder = _Recorder()
    with recorder:
        leaves = {name: x.detach().requires_grad_() for name, x in problem.tensors.items()}
        outputs = problem.run(leaves)
        # create_graph keeps the backward from taking the way around the dispatcher
        grads = [torch.randn_like(output) for output in outputs]
        torch.autograd.grad(outputs, list(leaves.values()), grads, create_graph=True)
    return recorder.calls


def opcheck_all(calls):
    for function, args in calls.items():
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(function, plain)
        if not function.name().endswith("_backward"):
            floating = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in plain]
            torch.library.opcheck(
                function, [x.clone().requires_grad_() if f else x for x, f in zip(plain, floating, strict=True)]
            )


def test_variants_cover_every_operation():
    assert {name.partition("-")[0] for name in VARIANTS} == set(TRUTH)
    # decode_linear has no gradient, and tests of its own.
    assert {name.removesuffix("_packed") for name in TRUTH} == {*nk.operations(), "add_layer_norm"} - {"decode_linear"}
    public = {name for name in nk.__all__ if name[0].islower()}
    assert public - set(TRUTH) == {
        "decode_linear",
        "current_backend",
        "explain",
        "operations",
        "record_seams",
        "use_backend",
    }


# ---- gradients -----------------------------------------------------------------------------------------------------


@all_variants
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_from_every_set_of_outputs(name, backend):
    """Each output alone, so that the gradients of the others are absent, and all together."""
    outputs = range(len(variant(name).run()))
    for size in range(1, len(outputs) + 1):
        for some in itertools.combinations(outputs, size):
            with nk.use_backend(backend):
                check(variant(name, torch.float32), outputs=some)
                check(variant(name, torch.float64), outputs=some)


@all_variants
def test_every_single_tensor_can_want_a_gradient_alone(name):
    problem = variant(name)
    everything = differentiate(problem.run, problem.tensors, [torch.ones_like(x) for x in problem.run()])[1]
    for wanted, leaf in problem.tensors.items():
        leaves = problem.tensors | {wanted: leaf.detach().requires_grad_()}
        torch.autograd.backward(problem.run(leaves), [torch.ones_like(x) for x in problem.run()])
        assert torch.equal(leaves[wanted].grad, everything[wanted]), wanted
        assert all(x.grad is None for other, x in leaves.items() if other != wanted)


@all_variants
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(name, backend):
    """Also of undefined incoming gradients, which gradcheck tries by default."""
    # Small, as it differentiates by every element. clamp=1 stays: its kinks are narrower than finite differences can hit
    # except by a chance of 1e-6 per element.
    small = {} if "cu_seqlens" not in VARIANTS[name] else {"cu_seqlens": [0, 0, 1, 4, 5]}
    problem = variant(name, torch.float64, T=4, D=3, **small)
    if small:
        problem = problem.map(lambda key, x: x[:, :5] if key in ("a", "b", "f", "i", "d", "gates") else x)
    names = list(problem.tensors)
    leaves = [x.detach().clone().requires_grad_() for x in problem.tensors.values()]
    with nk.use_backend(backend):
        assert torch.autograd.gradcheck(lambda *xs: problem.run(dict(zip(names, xs, strict=True))), leaves)


@all_variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_exact_as_plain_pytorch(name, dtype):
    """At most twice the error of PyTorch's own autograd through the same formula in the same dtype."""
    # D=1000 so that errors are averages that hardly vary. Where PyTorch's error happens to be far below a rounding (it
    # adds ones exactly) one rounding, u, is allowed; kernels that save rounded values (cases.py) are held to the bound
    # of check() instead, which test_truth applies. No clamp, which makes a gradient jump.
    unclamped = {"clamp": None} if "clamp" in VARIANTS[name] or name.startswith("context") else {}
    problem = variant(name, dtype, D=1000, **unclamped)
    if problem.function in THROUGH_ROUNDED and dtype != torch.float32:
        check(problem)
        return
    seed = torch.initial_seed()
    torch.manual_seed(seed)
    ours = errors(problem)
    torch.manual_seed(seed)
    plain = errors(problem, run=problem.truth)
    for key, (error, gradient_dtype) in ours.items():
        u = torch.finfo(gradient_dtype).eps / 2
        assert error <= 2 * plain[key][0] + (u if key.startswith("grad") else 0) or error <= u, (key, error, plain[key])


@all_variants
def test_forward_mode_derivatives_are_refused(name):
    """Taken for zero they would be a wrong result without a word."""
    problem = variant(name, T=5, D=8)
    for key, x in problem.tensors.items():
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match=r"newllm::\w+: forward-mode derivatives"):
                problem.run(problem.tensors | {key: forward_ad.make_dual(x, torch.ones_like(x))})
            problem.run(problem.tensors)  # nothing here has a tangent


def test_jvp_is_refused():
    x = torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match="newllm::layer_norm: forward-mode"):
        torch.func.jvp(lambda x: nk.layer_norm(x, None, None), (x,), (x,))


@all_variants
def test_second_derivatives_are_refused(name):
    problem = variant(name)
    leaves = {key: x.detach().requires_grad_() for key, x in problem.tensors.items()}
    grads = torch.autograd.grad(problem.run(leaves)[0].square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match=r"newllm::\w+_backward is a backward kernel; second derivatives are not"):
        grads[0].sum().backward()


# ---- layouts and sizes ---------------------------------------------------------------------------------------------


@all_variants
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name, layout):
    """Of inputs and of incoming gradients."""
    # In two dtypes: how a tensor lies is seen before its dtype, but 2-byte rows start at addresses 4-byte ones cannot.
    for dtype, backend in ((torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.float32, "reference")):
        problem = variant(name, dtype, **({"clamp": None} if name.startswith("context") else {}))
        with nk.use_backend(backend):
            check(laid_out(problem, layout), layout=gradient_layout(problem, layout))


@all_variants
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("B", "T"), [(0, 33), (2, 0), (0, 0)])
def test_empty(name, B, T, backend):
    if "cu_seqlens" in VARIANTS[name]:
        problem = variant(name, cu_seqlens=[0, 0, 0])
        problem = problem.map(lambda key, x: x[:, :0] if x.dim() == 3 else x)
    else:
        problem = variant(name, B=B, T=T)
    with nk.use_backend(backend):
        outputs, grads = differentiate(problem.run, problem.tensors, [torch.ones_like(x) for x in problem.run()])
    for output, want in zip(outputs, problem.truth(problem.tensors), strict=True):
        assert torch.equal(output, want)  # the last state is the first
    for key, x in problem.tensors.items():
        want = torch.ones_like(x) if key in ("h0", "c0") else torch.zeros_like(x)  # no step: d last / d first = 1
        assert torch.equal(grads[key], want), key


# ---- NaN and Inf ---------------------------------------------------------------------------------------------------


@all_variants
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_show_where_they_do_in_the_reference_and_nowhere_else(name, value, backend):
    clean = variant(name)
    for key, x in clean.tensors.items():
        bad = x.clone()
        bad.view(-1)[x.numel() // 2] = value
        problem = variant(name)
        problem.tensors = clean.tensors | {key: bad}
        with nk.use_backend(backend):
            got = problem.run()
        want = problem.truth({k: t.double() for k, t in problem.tensors.items()})
        for output, (x_got, x_want) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(x_got.isnan(), x_want.isnan()), (key, output)
            assert torch.equal(x_got.isinf(), x_want.isinf()), (key, output)


@all_variants
def test_nan_in_an_incoming_gradient_shows_where_it_does_in_the_reference(name):
    problem = variant(name, clamp=None) if name.startswith(("context", "recurrent")) else variant(name)
    outputs = problem.run()
    for bad in range(len(outputs)):
        grads = [torch.randn_like(x) for x in outputs]
        grads[bad].view(-1)[grads[bad].numel() // 2] = math.nan
        got = differentiate(problem.run, problem.tensors, grads)[1]
        exact = {key: x.double() for key, x in problem.tensors.items()}
        want = differentiate(problem.truth, exact, [grad.double() for grad in grads])[1]
        assert any(grad.isnan().any() for grad in want.values())
        for key in problem.tensors:
            assert torch.equal(got[key].isnan(), want[key].isnan()), (bad, key)


# ---- same bits -----------------------------------------------------------------------------------------------------


def bits(problem, grads):
    outputs, found = differentiate(problem.run, problem.tensors, grads)
    return [*outputs, *found.values()]


@all_variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # the split of work sees no dtype
def test_same_bits_twice_and_with_any_number_of_threads(name, dtype, threads):
    # 16384 elements make a task worth a thread: B=6, T=33, D=1000 is a dozen. 3 threads cut unevenly.
    problem = variant(name, dtype, B=6, D=1000)
    grads = [torch.randn_like(x) for x in problem.run()]
    threads(1)
    want = bits(problem, grads)
    for number in (1, 2, 3):
        threads(number)
        for x, y in zip(bits(problem, grads), want, strict=True):
            assert torch.equal(x, y), number


@all_variants
def test_both_ways_to_the_kernel_give_the_same_bits(name):
    """operator.py calls the kernel directly where nobody else needs to see the call, else through the dispatcher."""
    problem = variant(name)
    for function, args in captured(problem).items():
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        module = getattr(nk, function.name().removeprefix("newllm::").removesuffix("_backward"))
        direct = _python_module(module).__dict__["_kernel" + ("_backward" if "_backward" in function.name() else "")]
        for x, y in zip(_tuple(direct(*plain)), _tuple(function(*plain)), strict=True):
            assert torch.equal(x, y), function.name()


@all_variants
def test_both_ways_to_record_give_the_same_gradients(name):
    """Through torch.autograd.Function, and through the operator's autograd kernel while a mode looks on."""
    problem = variant(name)
    grads = [torch.randn_like(x) for x in problem.run()]

    def gradients():
        leaves = {key: x.detach().requires_grad_() for key, x in problem.tensors.items()}
        return torch.autograd.grad(problem.run(leaves), list(leaves.values()), grads)

    direct = gradients()
    with _Recorder() as recorder:
        through_the_dispatcher = gradients()
    assert recorder.calls
    for x, y in zip(direct, through_the_dispatcher, strict=True):
        assert torch.equal(x, y)


def _tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _python_module(function):
    import sys

    return sys.modules[function.__module__]


@all_variants
def test_modes_see_the_operators(name):
    """Whoever traces or counts operators gets every call, recorded or not."""
    problem = variant(name)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context(), _Recorder() as recorder:
            leaves = {k: x.detach().requires_grad_(context is torch.enable_grad) for k, x in problem.tensors.items()}
            problem.run(leaves)
        assert len(recorder.calls) == 1


def test_who_needs_to_see_a_call():
    class Subclass(torch.Tensor):
        pass

    x, p = torch.ones(1), torch.nn.Parameter(torch.ones(1))
    assert operator._way((x, None, 1.0)) == operator.PLAIN
    assert operator._way((x, p)) == operator.RECORDED
    assert operator._way((p, x.as_subclass(Subclass))) == operator.TRACED
    with torch.no_grad():
        assert operator._way((x, p)) == operator.PLAIN
        assert operator._way((x.as_subclass(Subclass),)) == operator.TRACED
    with _Recorder():
        assert operator._way((x, p)) == operator.TRACED


@all_variants
def test_no_grad_and_inference_mode(name):
    problem = variant(name)
    leaves = {key: x.detach().requires_grad_() for key, x in problem.tensors.items()}
    want = problem.run(leaves)
    assert all(x.requires_grad for x in want)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = problem.run(leaves)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)
            assert not x.requires_grad
            assert x.is_inference() == (context is torch.inference_mode)


@all_variants
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(name, backend):
    """Schema, fake kernel, autograd registration and AOT dispatch, of the forward and of the backward operator."""
    # One dtype of two sizes: the fake kernels ask only whether a dtype is float64.
    with nk.use_backend(backend):
        calls = captured(variant(name, torch.bfloat16))
        assert sorted(function.name().endswith("_backward") for function in calls) == [False, True]
        opcheck_all(calls)


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
@all_variants
def test_outputs_are_fresh_and_contiguous(name, dtype):
    problem = variant(name, dtype).map(lambda key, x: LAYOUTS["transposed"](x))
    for backend in ("auto", "reference"):
        with nk.use_backend(backend):
            outputs = problem.run()
        for x in outputs:
            assert x.is_contiguous()
        storages = {x.untyped_storage().data_ptr() for x in (*outputs, *problem.tensors.values())}
        assert len(storages) == len(outputs) + len(problem.tensors)
