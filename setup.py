"""Hands the build over to CMake (CMakeLists.txt is its one definition) and puts the two libraries beside the package.

Environment: NEWLLM_CUDA=auto|on|off, TORCH_CUDA_ARCH_LIST, CMAKE_BUILD_TYPE, CMAKE_ARGS.
The build folder, build/<python tag>, is kept: `pip install -e .` again compiles only what has changed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))
from build_backend import torch_folder  # noqa: E402 - found through the line above


class CMakeBuild(build_ext):
    """Configure, build and install into newllm_kernels/: of the sources (editable, in place) or of the wheel."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "newllm_kernels" if in_place else Path(self.build_lib).resolve() / "newllm_kernels"
        build = ROOT / "build" / sysconfig.get_config_var("SOABI")
        self._drop_a_cache_of_another_environment(build)
        torch = torch_folder()
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "Python_EXECUTABLE": sys.executable,
            "NEWLLM_CUDA": os.environ.get("NEWLLM_CUDA", "auto"),
            "NEWLLM_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            "NEWLLM_TORCH_DIR": str(torch) if torch else "",
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        self._cmake("-S", ROOT, "-B", build, "-G", "Ninja", *defines, *shlex.split(os.environ.get("CMAKE_ARGS", "")))
        self._cmake("--build", build)
        self._cmake("--install", build, "--prefix", package)

    @staticmethod
    def _drop_a_cache_of_another_environment(build: Path) -> None:
        """Under build isolation ninja and pybind11 lie in a temporary folder that is another one every time."""
        cache = build / "CMakeCache.txt"
        if not cache.exists():
            return
        entries = dict(line.partition("=")[::2] for line in cache.read_text().splitlines() if "=" in line)
        ninja = Path(entries.get("CMAKE_MAKE_PROGRAM:FILEPATH", ""))
        if not ninja.is_file() or entries.get("CMAKE_HOME_DIRECTORY:INTERNAL") != str(ROOT):
            cache.unlink()  # object files stay, and ninja finds those that are up to date
            shutil.rmtree(build / "CMakeFiles" / "pkgRedirects", ignore_errors=True)

    @staticmethod
    def _cmake(*arguments: object) -> None:
        try:
            subprocess.run(["cmake", *map(str, arguments)], check=True)
        except FileNotFoundError:
            raise SystemExit("cmake was not found: pip install cmake ninja") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"the build of the kernels failed (cmake exited with {error.returncode})") from None

    def get_outputs(self) -> list[str]:
        return []  # bdist_wheel takes the folder as it is

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("newllm_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
