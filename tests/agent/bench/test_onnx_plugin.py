"""Execution providers of ONNX Runtime that come as a library: one that runs here, and those that don't."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.bench.runtime import OptionRejected, RuntimeUnavailable
from boardbench.agent.bench.runtimes import onnx
from boardbench.testkit.child import BRIEF
from boardbench.testkit.contract import available

from . import models

PLUGIN_PYTHON = os.environ.get("BOARDBENCH_ORT_PLUGIN_PYTHON", "")
NEEDS_PLUGIN = pytest.mark.skipif(
    not PLUGIN_PYTHON,
    reason="make test-engines sets BOARDBENCH_ORT_PLUGIN_PYTHON to a Python with onnxruntime-ggml",
)


@pytest.fixture
def runtime() -> onnx.OnnxRuntime:
    return available(onnx.OnnxRuntime())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(models.onnx_affine())
    return path


def load(runtime: onnx.OnnxRuntime, file: Path, library: object, device: str = "mine") -> onnx.OnnxModel:
    options = {"provider_library": str(library)}
    return runtime.load(file, device=device, threads=None, options=options, shapes={})


def test_a_library_that_is_not_there_is_named(runtime: onnx.OnnxRuntime, file: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"/nowhere/ep\.so can't be loaded: there is no such file"):
        load(runtime, file, "/nowhere/ep.so")


def test_a_file_that_is_no_library(runtime: onnx.OnnxRuntime, file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library, whatever its name says")
    with pytest.raises(RuntimeUnavailable, match="it is no shared library of Linux, or not whole"):
        load(runtime, file, tmp_path / "text.so")


def test_a_library_that_is_no_provider(runtime: onnx.OnnxRuntime, file: Path, edgetpu_standin: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="a shared library, and no execution provider"):
        load(runtime, file, edgetpu_standin)


def test_a_version_without_plugins_says_so(
    runtime: onnx.OnnxRuntime, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
    with pytest.raises(RuntimeUnavailable, match=r"update it to 1\.23 or later"):
        load(runtime, file, "/nowhere/ep.so")


def test_the_hardware_of_no_library_is_refused(runtime: onnx.OnnxRuntime, file: Path) -> None:
    with pytest.raises(OptionRejected, match="provider_hardware"):
        runtime.load(file, device="cpu", threads=None, options={"provider_hardware": "gpu"}, shapes={})


@pytest.fixture
def ggml(worker: Any, tmp_path: Path) -> Any:
    """Runs a model with the provider of onnxruntime-ggml, which computes on any processor."""
    find = "import onnxruntime_ggml as g; print(g.library_path())"
    found = subprocess.run([PLUGIN_PYTHON, "-c", find], capture_output=True, text=True, check=True)

    def run(
        content: bytes, *, device: str = "ggml", options: dict[str, str] | None = None, **job: Any
    ) -> Any:
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        given = {"provider_library": found.stdout.strip(), **(options or {})}
        return worker.run(
            {"kind": "run", "runtime": "onnxruntime", "format": "onnx", "model_path": str(path),
             "device": device, **BRIEF, "options": given, **job},
            python=PLUGIN_PYTHON,
        )  # fmt: skip

    return run


@NEEDS_PLUGIN
def test_a_provider_of_a_library_runs_and_is_seen_to(ggml: Any) -> None:
    outcome = ggml(models.onnx_affine())
    assert outcome.exit_code == 0, outcome.output
    ops = outcome.result["placement"]["ops"]
    assert [(op["type"], op["unit"], op["delegate"]) for op in ops] == [
        ("Relu", "UNIT_CPU_DELEGATE", "ggml"),
        ("Add", "UNIT_CPU_DELEGATE", "ggml"),
    ]
    assert outcome.result["placement"]["evidence"] == "EVIDENCE_PARTITION"
    assert outcome.result["runtime"]["options"]["provider_hardware"] == "any"


@NEEDS_PLUGIN
@pytest.mark.parametrize("io_binding", ["on", "off"])
def test_what_it_leaves_falls_back_and_has_a_cost(ggml: Any, io_binding: str) -> None:
    options = {"provider.partial": "1", "io_binding": io_binding}
    outcome = ggml(models.onnx_with_an_end("Unique"), options=options, profile_runs=20)
    assert outcome.exit_code == 0, outcome.output
    placement = outcome.result["placement"]
    assert {op["type"]: op.get("delegate", "") for op in placement["ops"]} == {
        "Relu": "ggml", "Add": "ggml", "Mul": "ggml", "Unique": "",
    }  # fmt: skip
    (profile,) = outcome.of("profile")
    assert profile["placement"]["fallback_cost"]["share"] > 0


@NEEDS_PLUGIN
def test_what_takes_nothing_is_refused_and_what_it_lacks_is_told(ggml: Any) -> None:
    outcome = ggml(models.onnx_with_an_end("Unique"))  # it takes a whole model or nothing, by default
    assert outcome.error["code"] == "model_rejected"
    assert "the provider ggml takes none of its operations" in outcome.error["message"]
    outcome = ggml(models.onnx_affine(), options={"provider_hardware": "npu"})
    assert outcome.error == {
        "code": "option_rejected",
        "message": "provider_hardware=npu: ggml finds no such here; it finds cpu",
    }


@NEEDS_PLUGIN
def test_without_its_device_the_library_says_which_it_brings(ggml: Any) -> None:
    outcome = ggml(models.onnx_affine(), device="cpu")
    assert outcome.error["code"] == "option_rejected"
    assert "not 'cpu': ask for that with --device" in outcome.error["message"]
    assert "brings the device" in json.dumps(outcome.error)
