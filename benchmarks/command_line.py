"""What the programs of this folder do with what was typed: one line to standard error, and exit code 2, where it cannot be done."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import NoReturn

from newllm.errors import one_line


def refuse(program: str, why: object) -> int:
    """Print why; the exit code."""
    print(f"{program}: error: {one_line(why)}", file=sys.stderr)
    return 2


def typed(program: str, arguments: list[str] | None) -> str:
    """The command, to be kept beside its figures, but for where they were to go: `arguments`, or what was typed."""
    kept: list[str] = []
    for argument in sys.argv[1:] if arguments is None else arguments:
        if kept and kept[-1] == "--results":
            kept.pop()
        elif not argument.startswith("--results="):
            kept.append(argument)
    return shlex.join(["python", f"benchmarks/{program}.py", *kept])


class Parser(argparse.ArgumentParser):
    """Refuses in one line; its commands, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(refuse(self.prog.split()[0].removesuffix(".py"), message))


def parser(program: str, doc: str) -> Parser:
    """Of benchmarks/<program>.py, described by the first line of its docstring."""
    return Parser(prog=f"{program}.py", description=doc.partition("\n")[0], allow_abbrev=False)
