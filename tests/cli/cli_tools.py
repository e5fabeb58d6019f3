"""What the tests of the command line share: a tiny text, options of a tiny run, processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import NamedTuple

TINY = [
    "--embed-dim", "16", "--context-dim", "16", "--ffn-dim", "16", "--layers", "1", "--vocab-size", "280",
    "--batch-size", "4", "--segment", "16", "--steps", "20", "--warmup", "2", "--lr", "0.01", "--eval-every", "10",
    "--checkpoint-every", "10", "--log-every", "5", "--threads", "1", "--device", "cpu",
]  # fmt: skip
TEXT = "".join(f"The {n}th cat sat on mat {n % 7}, and the dog ran to door {n % 5}.\n" for n in range(150))


class Result(NamedTuple):
    code: int
    out: str
    err: str


def start(*argv: object, **options: object) -> subprocess.Popen[str]:
    """The command in a process of its own, its output in pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    # A shell's background job ignores SIGINT and so would all it starts: Control-C could not be tested there.
    control_c = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "newllm", *map(str, argv)], text=True, env=environment, **control_c, **pipes
    )


def finish(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=240)  # a busy machine; alone it is seconds
    return Result(process.returncode, out, err)
