"""Registers, shared memory and stack of every compiled CUDA kernel, as a Markdown table: `python tools/resources.py [--all]`.

Reads the built library with cuobjdump: from the PATH, from CUDA_HOME, or the one that comes with Triton. A line is a kernel on an
architecture with all its variants (dtypes, tiles); --all gives each variant a line. Stack is where spilled registers
go; shared memory asked for at the launch (the windows of the recurrences) is not in the file and not shown.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

LIBRARY = Path(__file__).parents[1] / "newllm_kernels" / "libnewllm_kernels.so"


class Usage(NamedTuple):
    """Of one variant of a kernel. Memory in bytes, of a thread or (shared) of a block."""

    architecture: str
    kernel: str
    variant: str
    registers: int
    shared: int
    stack: int


def fail(message: str) -> NoReturn:
    print(f"resources: error: {message}", file=sys.stderr)
    sys.exit(2)


def cuobjdump() -> str:
    """Path of the program."""
    home = os.environ.get("CUDA_HOME")
    places = [shutil.which("cuobjdump"), Path(home) / "bin" / "cuobjdump" if home else None]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = next((str(place) for place in places if place and Path(place).exists()), None)
    return found or fail("cuobjdump was not found: put the CUDA toolkit on the PATH, or pip install triton")


def parse(text: str) -> Iterator[Usage]:
    """From what cuobjdump --dump-resource-usage prints."""
    architecture = kernel = variant = ""
    for line in text.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            kernel, variant = name(found[1])
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, found.groups())
            yield Usage(architecture, kernel, variant, registers, shared, stack)


def name(mangled: str) -> tuple[str, str]:
    """(kernel, variant) of a mangled name: its last plain identifier, and what are its template arguments."""
    rest, identifier = re.sub(r"^_ZN?", "", mangled), mangled
    while found := re.match(r"L?(\d+)", rest):
        length, begin = int(found[1]), found.end()
        identifier, rest = rest[begin : begin + length], rest[begin + length :]
    arguments = re.match(r"I(.*?)EEv", rest)
    return identifier, short(arguments[1]) if arguments else ""


def short(arguments: str) -> str:
    """Template arguments for a person: types and numbers in their order."""
    found = re.findall(
        r"\d+(ScanForward|ScanBackward|GatedForward|GatedBackward|__half|__nv_bfloat16)|L[ib](\d+)E?|^(f)|E(f)L",
        arguments,
    )
    return " ".join(next(part for part in parts if part) for parts in found).replace("__", "")


def table(usages: list[Usage], everything: bool) -> str:
    """Markdown: the most that any variant of a kernel takes, and how many keep something on the stack."""
    lines = [
        "| architecture | kernel | variants | registers | shared, bytes | stack, bytes | variants with a stack |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, str], list[Usage]] = {}
    for usage in usages:
        key = usage.architecture, f"{usage.kernel} {usage.variant}".strip() if everything else usage.kernel
        groups.setdefault(key, []).append(usage)
    for (architecture, kernel), group in sorted(groups.items()):
        registers, shared, stack = (
            max(getattr(usage, field) for usage in group) for field in ("registers", "shared", "stack")
        )
        on_stack = sum(usage.stack > 0 for usage in group)
        lines.append(f"| {architecture} | {kernel} | {len(group)} | {registers} | {shared} | {stack} | {on_stack} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = fail  # one line, without the usage
    parser.add_argument("--all", action="store_true", help="a line for every variant")
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    args = parser.parse_args()
    if not args.library.exists():
        fail(f"{args.library} is not there; build it with: pip install -e .")
    done = subprocess.run([cuobjdump(), "--dump-resource-usage", str(args.library)], capture_output=True, text=True)
    usages = list(parse(done.stdout))
    if not usages:
        fail(
            f"{args.library.name} holds no CUDA kernels ({(done.stderr.strip() or 'built without nvcc').splitlines()[0]})"
        )
    print(table(usages, args.all))
    return 0


if __name__ == "__main__":
    sys.exit(main())
