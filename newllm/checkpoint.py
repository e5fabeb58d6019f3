"""Checkpoints: safetensors files that are either whole or not there.

A file is written beside its place under a temporary name, flushed to the disk and then renamed over the old one, so that
a kill, a crash or a full disk at any moment leaves the old file as it was. Its header carries a JSON text (everything that
is not a tensor) and a checksum of that text and of the tensors. Nothing here is ever unpickled.

Names inside a training checkpoint: `model.*` the weights, `optimizer.<n>.*` AdamW's moments of the n-th parameter,
`state.*` the carried contexts, `rng.*` the states of PyTorch's generators.
"""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from newllm.errors import UserError, one_line, os_reason

Tensors = dict[str, Tensor]
FORMAT = "newllm-1"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; after the block its file is flushed and takes the place of `path`.

    Raises UserError naming `path` where the disk is full or the folder not writable; the file that stood there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the previous one is untouched" if path.exists() else ""
        raise UserError(f"cannot write {path}: {os_reason(error)}{kept}") from error
    finally:
        with suppress(OSError):  # renamed into place, never made, or on a disk that has become read-only
            os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a loss of power; only POSIX lets a folder be opened for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented for people."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError naming the file where it is missing, cut or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)})") from error
    except (ValueError, RecursionError) as error:  # malformed JSON, or bytes that are not UTF-8
        raise UserError(f"{path}: not valid JSON, cut short or damaged ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}; wanted an object")
    return value


def save(path: Path, tensors: Tensors, info: dict[str, Any]) -> None:
    """Write tensors and the JSON-able `info` as one safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(info)
    header = {"format": FORMAT, "info": text, "crc32": _checksum(tensors, text)}
    data = safetensors.torch.save(tensors, header)
    with atomic_write(path) as temporary:
        # Written here rather than by the library: it may map the file, and a full disk is then a signal, not an error.
        temporary.write_bytes(data)


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what `save` wrote. Raises UserError naming the file where it is missing, cut short, damaged or foreign.

    A run that is being trained may put a new file in its place at any time. safetensors opens it once for the header and once
    for the tensors, so what does not fit together is read again if it was replaced meanwhile.
    """
    while True:
        read = _identity(path)
        try:
            return _load(path)
        except UserError:
            if _identity(path) == read:
                raise


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Another one after `path` was replaced; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)})") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a readable checkpoint, cut short or damaged ({one_line(error)})") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: a safetensors file, but not a checkpoint of newllm (format {header.get('format')!r})")
    text = header.get("info", "")
    if header.get("crc32") != _checksum(tensors, text):
        raise UserError(f"{path}: damaged checkpoint, it does not match its checksum")
    return tensors, json.loads(text)


def _checksum(tensors: Tensors, info: str) -> str:
    """CRC-32 over the info text and every tensor's name, dtype, shape and bytes."""
    value = zlib.crc32(info.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def with_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """Inverse of `prefixed`: the tensors under a prefix, without it."""
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def model_tensors(model: nn.Module) -> Tensors:
    """Parameters and saved buffers by name, tied parameters once."""
    state = model.state_dict()
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        name for name, _ in model.named_parameters()
    }
    return {name: tensor for name, tensor in state.items() if name not in shared}


SHARES = "recall.shares"  # set, not trained: newllm/model/recall.py


def load_model(model: nn.Module, tensors: Tensors, source: Path) -> None:
    """Copy weights into the model. Raises UserError naming `source` and the first tensor that does not fit."""
    own = model_tensors(model)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing == [SHARES] and not extra:
        raise UserError(
            f"{source}: lacks {SHARES}, which newer versions have; `newllm calibrate` makes a run that has them"
        )
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model does not"
        raise UserError(f"{source}: weights of another model than its config.json describes: it {what}")
    for name, tensor in own.items():
        if name == SHARES and tensors[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {SHARES} is of an older version, {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}; `newllm calibrate` makes"
                " a run that has them as they are now"
            )
        if tensors[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, the model of config.json {tuple(tensor.shape)};"
                " the checkpoint belongs to another model or vocabulary"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's per-parameter tensors as `<n>.<key>`; its hyperparameters come from the config, not from here."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": value
        for index, entries in state.items()
        for key, value in entries.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Inverse of `optimizer_tensors`."""
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_state() -> tuple[Tensors, dict[str, Any]]:
    """States of the generators of torch (CPU and every GPU), numpy and python: tensors, and what goes into `info`."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global one, whoever draws from it
    return tensors, {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def set_rng_state(tensors: Tensors, info: dict[str, Any]) -> None:
    """Inverse of `rng_state`; states of GPUs that this machine does not have are left out."""
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, internal, gauss = info["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = info["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
