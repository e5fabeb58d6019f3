"""setuptools' build backend, with one change: the PyTorch of the environment that is installed into serves as the build's.

Under build isolation pip would otherwise fetch PyTorch a second time (with CUDA, gigabytes) only for its headers. They
belong to the stable ABI, so it does not matter which PyTorch from 2.11 on they come from.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that stay as they are

TORCH = "torch>=2.11"


def torch_folder() -> Path | None:
    """The torch package to take headers from: one that can be imported, or that of the surrounding environment."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.submodule_search_locations[0])] if spec and spec.submodule_search_locations else []
    candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    for folder in candidates:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return folder
    return None


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if torch_folder() else [*requirements, TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
