"""Which of a few configurations of a kernel is fastest on this GPU: measured once, kept on disk.

The first configuration of a list is what was fastest on the GPUs named in MEASURED, and is taken there without a trial. On others
the list is tried at the first call of its kind, some hundred milliseconds besides compiling, and the choice is kept in a file
per GPU and Triton version. A choice once made is made again, so results keep their bits from run to run.

The scans and the kernels that normalise whole rows have such lists. `context_scan` has none: how many of its passes find work
depends on the numbers in its gates, so a trial on one input says little of the next.

    NEWLLM_KERNELS_AUTOTUNE   1: try on every GPU; 0: never try, always the first; unset: as above
    NEWLLM_KERNELS_CACHE      folder of the files; unset: $XDG_CACHE_HOME/newllm_kernels or ~/.cache/newllm_kernels
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

MEASURED = ("H100", "H200")
Configuration = TypeVar("Configuration")

_choices: dict[Path, dict[str, int]] = {}  # as the files have them
# What this process takes: to look it up in a file's choices takes 15 microseconds, more than many kernels.
_taken: dict[tuple[Any, ...], Any] = {}


def folder() -> Path:
    own = os.environ.get("NEWLLM_KERNELS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "newllm_kernels"


@functools.cache
def _file_name(device: torch.device) -> str:
    import triton

    return re.sub(r"[^\w.-]+", "-", f"{torch.cuda.get_device_name(device)}-triton-{triton.__version__}.json")


@functools.cache
def tries(device: torch.device) -> bool:
    """Whether configurations are tried on this device."""
    setting = os.environ.get("NEWLLM_KERNELS_AUTOTUNE", "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"NEWLLM_KERNELS_AUTOTUNE: got {setting!r}, wanted 0 or 1")
    if device.type != "cuda" or setting == "0":
        return False
    return setting == "1" or not any(name in torch.cuda.get_device_name(device) for name in MEASURED)


def fastest(
    kind: tuple[Any, ...],
    configurations: Sequence[Configuration],
    run: Callable[[Configuration], Any],
    device: torch.device,
) -> Configuration:
    """The configuration to run a call of this kind with. `run` must leave the same results whichever it is given."""
    if len(configurations) == 1 or not tries(device):
        return configurations[0]
    call = (device, kind, *configurations)
    if call in _taken:
        return _taken[call]
    path = folder() / _file_name(device)
    known = _choices.get(path)
    if known is None:
        known = _choices[path] = _read(path)
    key = f"{kind} {list(map(tuple, configurations))}"
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return configurations[0]
        with torch.cuda.device(device):  # whose streams the events must time
            times = [_milliseconds(functools.partial(run, configuration)) for configuration in configurations]
        known[key] = times.index(min(times))
        _write(path, known)
    _taken[call] = configurations[known[key]]
    return _taken[call]


def _milliseconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """The least of a few runs; infinity where the GPU cannot hold the configuration."""
    from triton.runtime.errors import OutOfResources

    times = []
    try:
        call()
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    except OutOfResources:
        return float("inf")
    return min(times)


def _read(path: Path) -> dict[str, int]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"newllm_kernels: {path} cannot be read ({error}); trying configurations again", stacklevel=2)
        return {}


def _write(path: Path, choices: dict[str, int]) -> None:
    """With what other processes have found in the meantime; the file is never half written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = (_read(path) if path.exists() else {}) | choices
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(merged, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            f"newllm_kernels: {path} cannot be written ({error}); configurations are tried again", stacklevel=2
        )
