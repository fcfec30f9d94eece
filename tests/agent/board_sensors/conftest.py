"""A library in the place of NVIDIA's, built for the tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("nvml_standin.c")


@pytest.fixture(scope="session")
def nvml_standin(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds ``libnvidia-ml.so.1`` (a stand-in, see its source) in a folder of its own; gives the folder."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here (cc, gcc) to build the stand-in for libnvidia-ml.so.1")
    built: dict[tuple[str, ...], Path] = {}

    def build(*flags: str) -> Path:
        if flags not in built:
            folder = tmp_path_factory.mktemp("nvml")
            target = folder / "libnvidia-ml.so.1"
            command = [compiler, "-shared", "-fPIC", "-w", "-o", str(target), *flags, str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built[flags] = folder
        return built[flags]

    return build
