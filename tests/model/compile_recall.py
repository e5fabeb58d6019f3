"""Compiles the kernels of recall to machine code for an NVIDIA GPU that need not be there: the interpreter, in which tests run without one,
accepts much that the compiler does not. Prints one line a variant: the kernel's name and the size of its code in bytes.
"""

from __future__ import annotations

import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from newllm.model import recall_triton
from newllm.model.recall import DECAY, FINISH, MIX, NONE, TAG_BITS, VISITS, WORDS

LOOK_UP = {
    "tokens": "*i64", "last": "*i64", "recalled": "*fp32", "base": "*fp32", "words": "*i64", "groups": "*i64", "S": "i32", "E": "i32",
    "row_stride": "i32", "order_stride": "i32",
}  # fmt: skip
MIXED = {
    "logits": "*fp32", "tokens": "*i64", "words": "*i64", "groups": "*i64", "recent": "*fp32", "total": "*fp32", "temperature": "fp32",
    "recall_share": "fp32", "V": "i32",
}  # fmt: skip


def variants():
    for entries, bits, dtype in (("*i32", 17, "*bf16"), ("*i64", 48, "*fp32")):
        constants = {
            "BITS": bits,
            "TAG": TAG_BITS,
            "MULTIPLIER": MIX,
            "LAST": FINISH,
            "NOTHING": NONE,
            "K": VISITS,
            "BLOCK": 512,
        }
        yield "_look_up", LOOK_UP | {"entries": entries, "embedding": dtype, "flag_embedding": dtype}, constants, 4
    for block, warps in ((512, 1), (16384, 32)):
        yield "_mix", MIXED | {"shares": "*bf16"}, {"N": WORDS, "DECAYS": DECAY, "BLOCK": block}, warps


def main(capability: int) -> None:
    for name, types, constants, warps in variants():
        source = ASTSource(getattr(recall_triton, name), types | dict.fromkeys(constants, "constexpr"), constants)
        made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        print(name, len(made.asm["cubin"]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
