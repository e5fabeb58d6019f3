"""The command `newllm`. Exit codes: 0 done, 2 one line says what the user can do about it, 128 + n stopped by signal n."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from newllm.cli.parser import build_parser
from newllm.errors import UserError, one_line, os_reason

# Threads that spin while they wait starve each other where other programs want the cores too: measured on two busy ones,
# training ran three times as fast without. Read when PyTorch is first imported, hence here; a value of the user's stands.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# What newllm_kernels reads of the environment: the user's, as options are.
SETTINGS = ("NEWLLM_KERNELS_BACKEND", "NEWLLM_KERNELS_AUTOTUNE", "NEWLLM_CPU_ISA")
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors of use are one line on stderr, never a traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 must not end a text half-way
    try:
        args = build_parser().parse_args(argv)
        args.typed_fields = frozenset(vars(args))  # a recipe or a preset puts its own beside them later on
        args.typed = shlex.join(["newllm", *(sys.argv[1:] if argv is None else argv)])  # what a run folder keeps
        return args.command(args)
    except SystemExit as stop:  # argparse: --help, --version, errors of usage
        return int(stop.code or 0)
    except UserError as error:
        return _fail(error)
    except BrokenPipeError:  # `newllm generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again as it exits
        return BROKEN_PIPE
    except OSError as error:
        return _fail(f"{error.filename}: {os_reason(error)}" if error.filename else os_reason(error))
    except (MemoryError, RuntimeError, ValueError) as error:
        if (message := _about_the_environment(error)) is not None:
            return _fail(message)
        if isinstance(error, ValueError) or not _is_out_of_memory(error):
            raise
        return _fail("out of memory; choose a smaller model, --batch-size or --segment")
    except KeyboardInterrupt:
        print("newllm: interrupted", file=sys.stderr)
        return INTERRUPTED


def _about_the_environment(error: Exception) -> str | None:
    """The message of an error that a variable of the environment is to blame for, None for all others."""
    if any(name in str(error) for name in SETTINGS):
        return str(error)
    named = os.environ.get("NEWLLM_KERNELS_BACKEND")
    # By its name: where reading the environment fails, newllm_kernels, which has the class, cannot be imported.
    return f"NEWLLM_KERNELS_BACKEND={named}: {error}" if named and type(error).__name__ == "BackendError" else None


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a class of its own for a GPU's memory; a CPU's runs out as a plain RuntimeError."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _fail(message: object) -> int:
    print(f"newllm: error: {one_line(message)}", file=sys.stderr)
    return USER_ERROR
