"""How an operation becomes a PyTorch operator: schema, kernel, fake kernel and autograd formula in one call.

The operators are `torch.ops.newllm.*`. Their kernel is a Python function that asks `backends.select` who computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_LIBRARY = torch.library.Library("newllm", "DEF")


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define the operator `newllm::<schema>` and return a function that calls it.

    Without `backward`, differentiating the operator is an error.
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

    def call(*args: Any) -> Any:
        return kernel(*args) if _is_plain(args) else operator(*args)

    return call


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether nobody but the kernel needs to see this call: no gradient to record, no compiler, no tensor subclass.

    The operator's way through the dispatcher and its autograd kernel, both in Python, costs 8 microseconds: more than a
    small kernel. A plain call skips it.
    """
    if torch.compiler.is_compiling():
        return False
    recording = torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if recording and arg.requires_grad:
                return False
        elif isinstance(arg, Tensor):
            return False
    return True
