"""External delegates of TensorFlow Lite by their path: what is refused, and why, and one that runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.bench.runtime import RuntimeUnavailable
from boardbench.agent.bench.runtimes import tflite

from . import models

# A delegate that can't be made: it reports what it was given, and returns nothing.
REFUSES = """
#include <stdio.h>
#include <stddef.h>
void *tflite_plugin_create_delegate(char **keys, char **values, size_t count, void (*report)(const char *)) {
  static char text[200];
  snprintf(text, sizeof text, "no option %s here, so not %s (of %zu)", keys[0], values[0], count);
  report(text);
  return NULL;
}
void tflite_plugin_destroy_delegate(void *delegate) { (void)delegate; }
"""
NEEDS = (
    "extern int from_elsewhere(void);\nint tflite_plugin_create_delegate(void) { return from_elsewhere(); }\n"
)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    runtime = tflite.TfliteRuntime()
    try:
        runtime.version()
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
    path = tmp_path / "model.tflite"
    path.write_bytes(models.tflite_affine())

    def begin(library: object, **options: str) -> tflite.TfliteModel:
        given = {"delegate": str(library), **{f"delegate.{key}": value for key, value in options.items()}}
        return runtime.load(path, device="cpu", threads=None, options=given, shapes={})

    return begin


def compiled(folder: Path, name: str, source: str, *more: str) -> Path:
    compiler = next((found for each in ("cc", "gcc", "clang") if (found := shutil.which(each))), None)
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang) to build a library with: install gcc")
    (folder / f"{name}.c").write_text(source)
    made = folder / f"lib{name}.so"
    command = [compiler, "-shared", "-fPIC", "-o", os.fspath(made), os.fspath(folder / f"{name}.c"), *more]
    subprocess.run(command, check=True, cwd=folder)
    return made


def test_one_that_is_not_there(load: Any) -> None:
    with pytest.raises(
        RuntimeUnavailable, match=r"/nowhere/libd\.so can't be loaded .* no such file on this"
    ):
        load("/nowhere/libd.so")
    with pytest.raises(RuntimeUnavailable, match=r"libnowhere\.so can't be loaded .*: install it"):
        load("libnowhere.so")


def test_one_that_is_no_library(load: Any, tmp_path: Path) -> None:
    (tmp_path / "libtext.so").write_text("this is no library, whatever its name says")
    with pytest.raises(RuntimeUnavailable, match="it is no shared library of Linux, or not whole"):
        load(tmp_path / "libtext.so")


def test_a_library_that_is_no_delegate(load: Any, tmp_path: Path) -> None:
    library = compiled(tmp_path, "other", "int answer(void) { return 42; }\n")
    with pytest.raises(RuntimeUnavailable, match="no delegate of TensorFlow Lite: it has no tflite_plugin_"):
        load(library)


def test_one_for_another_processor(load: Any, tmp_path: Path) -> None:
    library = compiled(tmp_path, "refuses", REFUSES)
    content = bytearray(library.read_bytes())
    content[18:20] = b"\xf3\x00"  # RISC-V, by e_machine of the ELF header
    library.write_bytes(content)
    with pytest.raises(RuntimeUnavailable, match="it is built for another kind of processor; this Python is"):
        load(library)


def test_one_whose_own_libraries_are_missing(load: Any, tmp_path: Path) -> None:
    compiled(tmp_path, "elsewhere", "int from_elsewhere(void) { return 1; }\n")
    library = compiled(tmp_path, "needs", NEEDS, "-L.", "-lelsewhere")
    (tmp_path / "libelsewhere.so").unlink()
    with pytest.raises(RuntimeUnavailable, match=r"it needs libelsewhere\.so, which is not here"):
        load(library)


def test_one_that_refuses_its_options_is_heard(load: Any, tmp_path: Path) -> None:
    library = compiled(tmp_path, "refuses", REFUSES)
    with pytest.raises(RuntimeUnavailable) as caught:
        load(library, level="7", mode="fast")
    said = str(caught.value)
    assert "refused to start (no option level here, so not 7 (of 2))" in said
    assert "does it take the options level=7, mode=fast?" in said


def test_one_that_runs_is_named_in_the_placement(load: Any, edgetpu_standin: Path) -> None:
    model = load(edgetpu_standin, claim="ops", claim_types="ADD")
    assert model.wanted == edgetpu_standin.name
    found = model.placement()
    assert [(op.type, op.delegate) for op in found.ops if op.delegate == edgetpu_standin.name] == [
        ("ADD", edgetpu_standin.name)
    ]
    assert found.standin
