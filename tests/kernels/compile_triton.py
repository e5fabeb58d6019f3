"""Compiles one specialisation of every Triton kernel to machine code for an NVIDIA GPU that need not be there.

Run as a program, because tests run in Triton's interpreter where there is no GPU: python compile_triton.py 90
Prints one line a kernel: its name, shared memory and size of the code in bytes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

FLOAT32 = {
    "p_h0", "p_last", "p_glast", "p_gh0", "p_pair", "p_state0", "p_start", "p_weight", "p_bias", "p_mean", "p_rstd", "p_mean_g", "p_mean_gx", "p_gweight",
    "p_gbias", "p_out_weight", "p_out_bias", "p_c0", "p_gc0", "p_ends", "p_change", "p_product", "p_add", "p_state", "p_decay",
    "p_carry", "p_norm",
}  # fmt: skip
POINTERS = {"p_ticket": "*i32", "p_words": "*i32", "p_cu": "*i64"}
SCALARS = {"eps": "fp32", "clamp": "fp32", "below": "fp32", "edge": "fp32", "tolerance": "fp32"}

RECURRENCE = {
    "GATED": True, "REVERSE": False, "EXACT": False, "EVEN": False, "WIDE": False, "R": 4, "G": 32, "BD": 32,
}  # fmt: skip
PIECES = {"HAS_H0": True, "HAS_CU": False, "CHUNKED": True, "STAGES": 3}
GRADIENTS = {"HAS_GH": True, "HAS_GLAST": True}
AFFINE = {"HAS_WEIGHT": True, "HAS_BIAS": True}
PASSES = AFFINE | {"PASSES": 4, "BC": 64, "MARK": True, "EXACT": False, "BD": 1024}
NORMED = AFFINE | {"NORMED": True, "HAS_CLAMP": True}
UPDATE = AFFINE | {"DECAY": True, "MARK": True, "EXACT": False, "BR": 1, "BD": 1024}
AHEAD = {"HAS_Z": True, "HAS_ADD": True, "SAVE": True}
KERNELS: list[tuple[str, str, dict[str, Any]]] = [
    ("scan.triton", "_forward_stream", RECURRENCE | PIECES),
    ("scan.triton", "_backward_stream", RECURRENCE | PIECES | GRADIENTS | NORMED | {"HAS_CU": True, "CHUNKED": False}),
    ("scan.triton_chunks", "forward_pairs", RECURRENCE | {"STAGES": 3}),
    ("scan.triton_chunks", "backward_pairs", RECURRENCE | {"HAS_GH": True, "STAGES": 3}),
    ("scan.triton_chunks", "chunk_starts", {"HAS_STATE": True, "BC": 64, "BD": 32}),
    ("scan.triton_look_back", "forward_look_back", RECURRENCE | {"HAS_H0": True}),
    ("scan.triton_look_back", "backward_look_back", RECURRENCE | GRADIENTS | {"HAS_H0": True}),
    (
        "layer_norm.triton",
        "_forward_narrow",
        AFFINE | {"HAS_RESIDUAL": True, "HAS_CLAMP": True, "EVEN": False, "BR": 4, "BD": 1024},
    ),
    (
        "layer_norm.triton",
        "_backward_narrow",
        {"HAS_GY": True, "HAS_GSUM": True, "HAS_WEIGHT": True, "EVEN": False, "BR": 2, "BD": 1024, "STAGES": 3},
    ),
    (
        "gated_scan_layer_norm.triton",
        "_row_sums",
        AFFINE | {"HAS_CLAMP": True, "EVEN": False, "BR": 2, "BD": 1024, "STAGES": 3},
    ),
    ("layer_norm.triton", "_forward_wide", AFFINE | {"HAS_RESIDUAL": True, "BD": 4096}),
    ("layer_norm.triton", "_backward_wide", {"HAS_GSUM": True, "HAS_WEIGHT": True, "BD": 4096}),
    ("layer_norm.triton", "_backward_wide_weights", {"BD": 1024}),
    ("layer_norm.triton", "_reduce", {"BP": 64, "BD": 32}),
    ("context_update.triton", "_forward", AFFINE | {"EXACT": False, "EVEN": False, "BR": 2, "BD": 1024}),
    ("context_update.triton", "_backward", AFFINE | {"EXACT": False, "EVEN": False, "BR": 1, "BD": 1024, "STAGES": 1}),
    *(
        (
            "recurrent_context.triton_kernels",
            "hidden_forward",
            {"HAS_Z": True, "HAS_BIAS": True, "SAVE": True, "ACT": act, "EXACT": False, "BZ": 1024},
        )
        for act in range(4)
    ),
    ("recurrent_context.triton_kernels", "hidden_backward", {"ACT": 2, "EXACT": False, "BZ": 1024}),
    *(("recurrent_context.triton_kernels", "update_forward", UPDATE | {"NORM": norm} | AHEAD) for norm in range(3)),
    *(
        ("recurrent_context.triton_kernels", "update_backward", UPDATE | {"NORM": norm, "HAS_GRAD": True})
        for norm in range(3)
    ),
    *(("context_scan.triton", "_forward", PASSES | {"MODE": mode, "STAGES": 4}) for mode in range(4)),
    *(
        ("context_scan.triton", "_backward", PASSES | {"HAS_GC": True, "HAS_GLAST": True, "MODE": mode, "STAGES": 3})
        for mode in range(4)
    ),
]


def type_of(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name.startswith("p_"):
        return POINTERS.get(name, "*fp32" if name in FLOAT32 else "*bf16")
    return SCALARS.get(name, "i32")


def main(capability: int) -> None:
    for module, name, constants in KERNELS:
        kernel = getattr(import_module(f"newllm_kernels.{module}"), name)
        signature = {argument: type_of(argument, constants) for argument in kernel.arg_names}
        positions = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
        source = ASTSource(kernel.jit, signature, constexprs=positions)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        print(f"{module}.{name} {compiled.metadata.shared} {len(compiled.asm['cubin'])}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
