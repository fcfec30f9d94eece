"""Stand-ins for engines that don't run on this machine, put in place for the length of a test."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]


@functools.cache
def cudart() -> str:
    """A library that takes the place of CUDA's runtime, compiled here. Skips where there is no C compiler."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang) to build a stand-in of libcudart with: install gcc")
    folder = tempfile.mkdtemp(prefix="boardbench-cudart-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = Path(folder) / "libcudart-standin.so"
    command = [compiler, "-std=gnu11", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o", os.fspath(made)]
    subprocess.run([*command, os.fspath(TESTS / "tensorrt" / "cudart.c")], check=True)
    return os.fspath(made)


def tensorrt(patch: pytest.MonkeyPatch, *, version: str = "10.13.0.35", dla: int = 0) -> None:
    """Puts the fakes of TensorRT and CUDA in place; the package is imported anew."""
    for name, value in tensorrt_environment(version=version, dla=dla).items():
        if name != "PYTHONPATH":
            patch.setenv(name, value)
    _package(patch, "tensorrt", TESTS / "tensorrt")


def tensorrt_environment(*, version: str = "10.13.0.35", dla: int = 0) -> dict[str, str]:
    """The same for a process of its own."""
    return {
        "BOARDBENCH_CUDART": cudart(),
        "STANDIN_TENSORRT_VERSION": version,
        "STANDIN_TENSORRT_DLA": str(dla),
        "PYTHONPATH": os.fspath(TESTS / "tensorrt"),
    }


def coremltools(patch: pytest.MonkeyPatch) -> None:
    """Puts the fake of Apple's package in place, as it is on macOS."""
    _package(patch, "coremltools", TESTS / "coreml")


def _package(patch: pytest.MonkeyPatch, name: str, folder: Path) -> None:
    patch.syspath_prepend(os.fspath(folder))
    for module in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
        patch.delitem(sys.modules, module)
    # Taken out again at the end, so that no other test finds it.
    patch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    del sys.modules[name]
