"""The results file of expressivity.py: finished runs are added to it, by several processes at once if need be, and not made again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report

from newllm.errors import UserError

Run = dict[str, Any]
SAME = ("device", "precision", "trained", "words")  # of all runs in a file, or their figures could not be compared
OF_RUN = ("problem", "model", "shape", "lr", "seed", "steps", "batch")


def identity(run: Run) -> tuple[Any, ...]:
    """What a run is, as opposed to what came of it."""
    return tuple(run[key] for key in OF_RUN)


def load(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or `header` without runs where there is none. Raises UserError where it is no such file, or its runs are of
    another device or setting."""
    if not path.exists():
        return header | {"command": [], "expressivity": []}
    try:
        content = json.loads(path.read_text())
        known = [identity(run) for run in content["expressivity"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--results {path}: is not a results file of expressivity.py ({error!r})") from None
    if len(set(known)) < len(known):
        raise UserError(f"--results {path}: holds the same run twice")
    for key in SAME:
        if content.get(key) != header[key]:
            raise UserError(
                f"--results {path}: has {key} {content.get(key)!r}, this would have {header[key]!r}; name another file"
            )
    return content


def add(path: Path, header: dict[str, Any], command: str, runs: list[Run]) -> None:
    """Write the file anew, with these runs; all or nothing, and one process at a time."""
    with _alone(path):
        content = load(path, header)
        known = {identity(run) for run in content["expressivity"]}
        content["date"] = header["date"]
        content["command"] += [] if command in content["command"] else [command]
        content["expressivity"] += [run for run in runs if identity(run) not in known]
        report.save(path, content)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    folder = os.open(path.parent, os.O_RDONLY)  # not the file: it is replaced
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
