"""PyTorch and ExecuTorch under Pythons of their own, from this one: `make test-engines` names them.

Nothing of boardbench's own environment is there, and nothing of theirs is here.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.testkit.child import BRIEF

from . import models

VARIABLES = {"torch": "BOARDBENCH_TORCH_PYTHON", "executorch": "BOARDBENCH_EXECUTORCH_PYTHON"}
MAKE = Path(__file__).with_name("torch_models.py")


def interpreter(engine: str) -> str:
    found = os.environ.get(VARIABLES[engine])
    if not found:
        pytest.skip(f"make test-engines sets {VARIABLES[engine]} to a Python that has {engine}")
    return found


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str, str], Path]:
    """A model that is exported there."""

    def make(python: str, kind: str) -> Path:
        path = tmp_path / kind
        subprocess.run([python, str(MAKE), kind, str(path)], check=True, capture_output=True, timeout=170)
        return path

    return make


@pytest.mark.parametrize("engine", list(VARIABLES))
def test_the_probe_finds_it_there_and_not_here(worker: Any, engine: str) -> None:
    python = interpreter(engine)
    job = {"kind": "probe", "runtime": engine}
    (there,) = worker.run(job, python=python).of("probe")[0]["runtimes"]
    (here,) = worker.run(job).of("probe")[0]["runtimes"]
    assert there["version"].startswith(f"{engine} ") and "cpu" in there["devices"]
    assert not here.get("version")
    assert f"-m pip install {engine}" in here["reason"]


def test_the_same_model_gives_the_same_bytes_in_every_engine(
    worker: Any, made: Callable[[str, str], Path], tmp_path: Path
) -> None:
    torch, executorch = interpreter("torch"), interpreter("executorch")
    path = tmp_path / "affine.onnx"
    path.write_bytes(models.onnx_affine())
    runs = (
        ("onnxruntime", "onnx", path, {}),
        ("torch", "torchscript", made(torch, "ptl"), {"python": torch}),
        ("executorch", "executorch", made(executorch, "pte"), {"python": executorch}),
    )
    digests = {}
    for runtime, model_format, model, options in runs:
        job = {"kind": "run", "runtime": runtime, "format": model_format, "device": "cpu",
               "model_path": str(model), "seed": 7, **BRIEF}  # fmt: skip
        outcome = worker.run(job, **options)
        assert outcome.exit_code == 0, outcome.output
        (digests[runtime],) = outcome.result["output_sha256"].values()
    assert len(set(digests.values())) == 1, digests


def test_a_partly_delegated_program_is_profiled_there(worker: Any, made: Callable[[str, str], Path]) -> None:
    python = interpreter("executorch")
    job = {"kind": "run", "runtime": "executorch", "format": "executorch", "device": "xnnpack",
           "model_path": str(made(python, "pte_between")), **BRIEF, "profile_runs": 20}  # fmt: skip
    outcome = worker.run(job, python=python)
    assert outcome.exit_code == 0, outcome.output
    (profile,) = outcome.of("profile")
    units = [(op["type"], op["unit"]) for op in profile["placement"]["ops"]]
    assert units == [
        ("XnnpackBackend", "UNIT_CPU_DELEGATE"),
        ("aten::cumsum.out", "UNIT_CPU"),
        ("XnnpackBackend", "UNIT_CPU_DELEGATE"),
    ]
    assert 0 < profile["placement"]["fallback_cost"]["share"] < 1
