"""Wrong arguments: the right exception, and words that name the argument, what it got and what was wanted."""

from __future__ import annotations

import re

import pytest
import torch
from cases import make

import newllm_kernels as nk

B, T, D = 2, 5, 7


def bounds(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


# (function, changed arguments, exception, words that the message holds in this order)
ERRORS = [
    # type
    ("scan", {"a": [1.0]}, TypeError, ["a", "list", "a tensor (B, T, D)"]),
    ("scan", {"b": None}, TypeError, ["b", "NoneType", "a tensor like a"]),
    ("scan", {"h0": 0.0}, TypeError, ["h0", "float", "a tensor (2, 7) or None"]),
    ("scan", {"reverse": 1}, TypeError, ["reverse", "int", "True or False"]),
    ("scan", {"cu_seqlens": [0, 5]}, TypeError, ["cu_seqlens", "list", "(N + 1,)"]),
    ("gated_scan", {"f": None}, TypeError, ["f", "NoneType", "a tensor (B, T, D)"]),
    ("gated_scan", {"i": 1}, TypeError, ["i", "int", "a tensor like f"]),
    ("gated_scan_packed", {"gates": "x"}, TypeError, ["gates", "str", "a tensor (B, T, D)"]),
    ("context_update", {"c": None}, TypeError, ["c", "None", "a tensor (2, 5, 7)"]),
    ("context_update", {"f": None}, TypeError, ["f", "NoneType", "a tensor"]),
    ("context_update", {"weight": 1.0}, TypeError, ["weight", "float", "a tensor (D,)"]),
    ("context_scan", {"bias": [0.0]}, TypeError, ["bias", "list", "a tensor (D,)"]),
    ("layer_norm", {"x": 1.0}, TypeError, ["x", "float", "a tensor"]),
    ("add_layer_norm", {"residual": None}, TypeError, ["residual", "NoneType", "a tensor like x"]),
    # dtype
    ("scan", {"a": zeros(B, T, D, dtype=torch.int64)}, TypeError, ["a", "torch.int64", "torch.float32, torch.bfloat16"]),
    ("scan", {"b": zeros(B, T, D, dtype=torch.float16)}, TypeError, ["b", "torch.float16", "torch.float32", "of a"]),
    ("scan", {"h0": zeros(B, D, dtype=torch.float64)}, TypeError, ["h0", "torch.float64", "torch.float32"]),
    ("gated_scan", {"d": zeros(B, T, D, dtype=torch.float64)}, TypeError, ["d", "torch.float64", "torch.float32", "of f"]),
    ("gated_scan", {"f": zeros(B, T, D, dtype=torch.complex64)}, TypeError, ["f", "torch.complex64", "torch.float32"]),
    ("scan", {"cu_seqlens": zeros(3)}, TypeError, ["cu_seqlens", "torch.float32", "torch.int64 or torch.int32"]),
    ("context_update", {"c": zeros(B, T, D, dtype=torch.float16)}, TypeError, ["c", "torch.float16", "torch.float32"]),
    ("context_update", {"weight": zeros(D, dtype=torch.int32)}, TypeError, ["weight", "torch.int32", "torch.float32"]),
    ("layer_norm", {"x": zeros(2, 3, dtype=torch.bool)}, TypeError, ["x", "torch.bool", "torch.float32"]),
    ("add_layer_norm", {"residual": zeros(B, T, D).half()}, TypeError, ["residual", "torch.float16", "torch.float32", "of x"]),
    # shape
    ("scan", {"a": zeros(T, D)}, ValueError, ["a", "(5, 7)", "(B, T, D)"]),
    ("scan", {"a": zeros(B, T, 0)}, ValueError, ["a", "(2, 5, 0)", "a last dimension of at least 1"]),
    ("scan", {"b": zeros(B, T, D + 1)}, ValueError, ["b", "(2, 5, 8)", "(2, 5, 7)", "of a"]),
    ("scan", {"h0": zeros(B + 1, D)}, ValueError, ["h0", "(3, 7)", "(2, 7)"]),
    ("gated_scan", {"i": zeros(B, T + 1, D)}, ValueError, ["i", "(2, 6, 7)", "(2, 5, 7)", "of f"]),
    ("gated_scan", {"d": zeros(B, T, 1)}, ValueError, ["d", "(2, 5, 1)", "(2, 5, 7)", "of f"]),
    ("gated_scan", {"c0": zeros(1, D)}, ValueError, ["c0", "(1, 7)", "(2, 7)"]),
    ("gated_scan_packed", {"gates": zeros(B, T, 20)}, ValueError, ["gates", "(2, 5, 20)", "3 * D"]),
    ("context_update", {"i": zeros(B, T, 8)}, ValueError, ["i", "(2, 5, 8)", "(2, 5, 7)", "of f"]),
    ("context_update", {"c": zeros(B, D)}, ValueError, ["c", "(2, 7)", "(2, 5, 7)"]),
    ("context_update", {"f": torch.tensor(1.0)}, ValueError, ["f", "()", "wanted"]),
    ("context_update", {"weight": zeros(D + 1)}, ValueError, ["weight", "(8,)", "(7,)", "of f"]),
    ("context_update_packed", {"bias": zeros(1, D)}, ValueError, ["bias", "(1, 7)", "(D,)"]),
    ("context_scan", {"f": zeros(T, D)}, ValueError, ["f", "(5, 7)", "(B, T, D)"]),
    ("context_scan", {"d": zeros(B, T, 6)}, ValueError, ["d", "(2, 5, 6)", "(2, 5, 7)", "of f"]),
    ("context_scan", {"c0": zeros(B, D + 1)}, ValueError, ["c0", "(2, 8)", "(2, 7)"]),
    ("context_scan_packed", {"gates": zeros(B, T, 22)}, ValueError, ["gates", "(2, 5, 22)", "3 * D"]),
    ("context_scan_packed", {"weight": zeros(21)}, ValueError, ["weight", "(21,)", "(7,)"]),
    ("recurrent_context", {"z": zeros(T, 12)}, ValueError, ["z", "(5, 12)", "(B, T, Z)"]),
    ("recurrent_context", {"context_weight": zeros(11, D)}, ValueError, ["context_weight", "(11, 7)", "(12, 7)"]),
    ("recurrent_context", {"context_weight": None}, TypeError, ["context_weight", "NoneType", "a tensor (Z, D)"]),
    ("recurrent_context", {"gate_weight": zeros(20, 12)}, ValueError, ["gate_weight", "(20, 12)", "(21, 12)"]),
    ("recurrent_context", {"gate_weight": None, "gate_bias": None}, ValueError, ["z", "(2, 5, 12)", "(B, T, 21)", "3 * D"]),
    ("recurrent_context", {"gate_bias": zeros(12)}, ValueError, ["gate_bias", "(12,)", "(21,)"]),
    ("recurrent_context", {"hidden_weight": zeros(1, 12, 11)}, ValueError, ["hidden_weight", "(1, 12, 11)", "(1, 12, 12)"]),
    ("recurrent_context", {"hidden_bias": zeros(1, 12)}, ValueError, ["hidden_bias", "a tensor", "None", "hidden_weight"]),
    ("recurrent_context", {"c0": zeros(B, 12)}, ValueError, ["c0", "(2, 12)", "(2, 7)"]),
    ("recurrent_context", {"activation": "elu"}, ValueError, ["activation", "'elu'", "'relu', 'gelu', 'silu', 'tanh'"]),
    ("recurrent_context", {"norm": "both"}, ValueError, ["norm", "'both'", "None, 'state', 'output'"]),
    ("recurrent_context", {"context_weight": zeros(12, D, device="meta")}, ValueError, ["context_weight", "meta", "of z"]),
    ("layer_norm", {"x": torch.tensor(1.0)}, ValueError, ["x", "()", "wanted"]),
    ("layer_norm", {"x": zeros(3, 0)}, ValueError, ["x", "(3, 0)", "a last dimension of at least 1"]),
    ("layer_norm", {"weight": zeros(6)}, ValueError, ["weight", "(6,)", "(7,)", "of x"]),
    ("add_layer_norm", {"residual": zeros(T, D)}, ValueError, ["residual", "(5, 7)", "(2, 5, 7)", "of x"]),
    # device
    ("scan", {"b": zeros(B, T, D, device="meta")}, ValueError, ["b", "meta", "cpu", "of a"]),
    ("scan", {"h0": zeros(B, D, device="meta")}, ValueError, ["h0", "meta", "cpu", "of a"]),
    ("gated_scan", {"i": zeros(B, T, D, device="meta")}, ValueError, ["i", "meta", "cpu", "of f"]),
    ("context_update", {"c": zeros(B, T, D, device="meta")}, ValueError, ["c", "meta", "cpu", "of f"]),
    ("context_scan", {"weight": zeros(D, device="meta")}, ValueError, ["weight", "meta", "cpu", "of f"]),
    ("layer_norm", {"bias": zeros(D, device="meta")}, ValueError, ["bias", "meta", "cpu", "of x"]),
    ("add_layer_norm", {"residual": zeros(B, T, D, device="meta")}, ValueError, ["residual", "meta", "cpu", "of x"]),
    # numbers
    *[
        (function, {"eps": value}, exception, ["eps", got, "at least 0"])
        for function in ("context_update", "context_scan_packed", "layer_norm", "add_layer_norm")
        for value, exception, got in (
            (-1e-5, ValueError, "-1e-05"), (float("nan"), ValueError, "nan"), (float("inf"), ValueError, "inf"),
            ("small", TypeError, "str"), (True, TypeError, "bool"), (None, TypeError, "NoneType"),
        )
    ],
    *[
        (function, {"clamp": value}, exception, ["clamp", got, "above 0 or None"])
        for function in ("context_update_packed", "context_scan")
        for value, exception, got in (
            (0.0, ValueError, "0.0"), (-10, ValueError, "-10"), (float("nan"), ValueError, "nan"),
            ("wide", TypeError, "str"), (True, TypeError, "bool"),
        )
    ],
    # packed sequences
    *[
        (function, {"cu_seqlens": value} | changed, ValueError, ["cu_seqlens", *words])
        for function in ("scan", "gated_scan", "gated_scan_packed")
        for value, changed, words in (
            (bounds(0, 3, 4), {}, ["[0, 3, 4]", "ends with 4", "T = 5"]),
            (bounds(0, 3, 6, dtype=torch.int32), {}, ["[0, 3, 6]", "ends with 6", "T = 5"]),
            (bounds(1, 3, 5), {}, ["[1, 3, 5]", "begins with 1", "from 0"]),
            (bounds(-2, 3, 5), {}, ["[-2, 3, 5]", "begins with -2", "from 0"]),
            (bounds(0, -3, 5), {}, ["[0, -3, 5]", "element 1 is -3, below the 0 before it", "never fall"]),
            (bounds(0, 4, 3, 5), {}, ["[0, 4, 3, 5]", "element 2 is 3, below the 4 before it", "never fall"]),
            (bounds(0, 9, 5), {}, ["[0, 9, 5]", "element 2 is 5, below the 9 before it"]),
            (bounds(*range(20)), {}, ["[0, 1, 2, 3, 4, 5, ..., 17, 18, 19]", "ends with 19", "T = 5"]),
            (bounds(0), {}, ["(1,)", "(N + 1,)"]),
            (bounds(0, 5)[None], {}, ["(1, 2)", "(N + 1,)"]),
            (bounds(0, 5).to("meta"), {}, ["meta", "cpu"]),
        )
    ],
    ("scan", {"cu_seqlens": bounds(0, 2, 5), "h0": zeros(1, D)}, ValueError, ["h0", "(1, 7)", "(2, 7)"]),
    ("gated_scan", {"cu_seqlens": bounds(0, 2, 5), "c0": zeros(3, D)}, ValueError, ["c0", "(3, 7)", "(2, 7)"]),
]  # fmt: skip


def call(function, **changed):
    packed = "cu_seqlens" in changed
    tensors = make(function, 1 if packed else B, T, D, state=None if packed else "acc").tensors
    return getattr(nk, function)(**tensors | changed)


def identify(value):
    if isinstance(value, dict):
        return "-".join(value)
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("function", "changed", "exception", "words"), ERRORS, ids=identify)
def test_wrong_arguments(function, changed, exception, words):
    argument, *rest = words
    with pytest.raises(exception, match=rf"^{argument}: got .*{'.*'.join(map(re.escape, rest))}"):
        call(function, **changed)


@pytest.mark.parametrize("function", ["scan", "gated_scan", "gated_scan_packed"])
def test_packed_sequences_need_one_batch(function):
    tensors = make(function, B, T, D, state=None).tensors
    name = next(iter(tensors))
    with pytest.raises(ValueError, match=rf"^{name}: got batch 2, wanted 1 where cu_seqlens packs"):
        getattr(nk, function)(**tensors, cu_seqlens=bounds(0, 5))


@pytest.mark.parametrize("function", ["scan", "gated_scan", "gated_scan_packed"])
def test_boundaries_are_refused_where_a_gradient_is_wanted_too(function):
    """That call goes through the dispatcher, which must hand the words on."""
    tensors = {key: x.requires_grad_() for key, x in make(function, 1, T, D, state=None).tensors.items()}
    with pytest.raises(ValueError, match=r"^cu_seqlens: got \[0, 3, 4\], which ends with 4"):
        getattr(nk, function)(**tensors, cu_seqlens=bounds(0, 3, 4))


def test_what_is_accepted():
    """The other side of the limits above."""
    call("context_update", eps=0, clamp=None)
    call("context_scan", eps=1, clamp=1)
    call("context_scan", clamp=float("inf"))
    call("scan", cu_seqlens=bounds(0, 5, dtype=torch.int32))
    call("scan", cu_seqlens=bounds(0, 0, 0, 5, 5))


def test_options_of_the_scans_are_keyword_only():
    a = zeros(1, T, D)
    with pytest.raises(TypeError, match="positional"):
        nk.scan(a, a, None, True)
