"""How an operation becomes a PyTorch operator: schema, kernel, fake kernel and autograd formula in one call.

The operators are `torch.ops.newllm.*`. Their kernel is a Python function that asks `backends.select` who computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_LIBRARY = torch.library.Library("newllm", "DEF")


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    plain: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define the operator `newllm::<schema>` and return a function that calls it.

    Without `backward`, differentiating the operator is an error. `plain` computes calls that nobody records, and may leave
    out last outputs that only a backward reads; without it the kernel does.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"newllm::{name}", fake, lib=_LIBRARY)

    def not_differentiable(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"newllm::{name} is a backward kernel; second derivatives are not implemented")

    torch.library.register_autograd(
        f"newllm::{name}", backward or not_differentiable, setup_context=setup_context, lib=_LIBRARY
    )
    operator = getattr(torch.ops.newllm, name).default
    if backward is None:
        return lambda *args: kernel(*args) if _way(args) == PLAIN else operator(*args)

    class Recorded(torch.autograd.Function):
        """The operator's own formula, recorded without a way through the dispatcher."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = kernel(*args)
            setup_context(ctx, args, output)
            return output

    Recorded.backward = staticmethod(backward)
    record, plain = Recorded.apply, plain or kernel

    def call(*args: Any) -> Any:
        if forward_ad._current_level >= 0:  # torch.func.jvp enters a level too
            refuse_tangents(name, args)
        way = _way(args)
        return plain(*args) if way == PLAIN else record(*args) if way == RECORDED else operator(*args)

    return call


def refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raise NotImplementedError where forward-mode derivatives are asked for: PyTorch would take them for zero."""
    if any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args):
        raise NotImplementedError(
            f"newllm::{name}: forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) are not implemented;"
            " use backward()"
        )


PLAIN, RECORDED, TRACED = range(3)


# What needs no look at its base classes.
_NO_TENSORS = frozenset((type(None), bool, int, float, list, tuple))
_TENSORS = frozenset((Tensor, Parameter))
_KNOWN = _NO_TENSORS | _TENSORS
# Every call comes this way: names bound once save a tenth of a microsecond each.
_is_compiling, _is_recording = torch.compiler.is_compiling, torch.is_grad_enabled
_dispatch_modes, _in_transform = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active


def _way(args: tuple[Any, ...]) -> int:
    """Who needs to see this call: nobody but the kernel (PLAIN), autograd too (RECORDED), or a compiler, a tensor subclass
    or a transform, for which the operator is there (TRACED).

    The operator's way through the dispatcher and back into Python, twice, costs 8 to 20 microseconds, more than a small
    kernel takes; the first two ways skip it.
    """
    if _is_compiling() or _dispatch_modes() or _in_transform():  # a compiler; a mode that traces or counts; vmap, grad
        return TRACED
    recording, way = _is_recording(), PLAIN
    if not recording and _KNOWN.issuperset(map(type, args)):
        return PLAIN
    for arg in args:
        kind = type(arg)
        if kind in _TENSORS:
            if recording and arg.requires_grad:
                way = RECORDED
        elif kind not in _NO_TENSORS and isinstance(arg, Tensor):
            return TRACED
    return way
