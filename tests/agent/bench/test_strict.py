"""What a run may do when the device that was asked for does not take everything."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.testkit.child import BRIEF

DEEPLAB = "deeplabv3_mnv2_dm05_pascal_quant_edgetpu"
MOBILENET = "mobilenet_v1_0.25_128_quant"


@pytest.fixture(params=["ai_edge_litert", "tflite_runtime"])
def run(request: pytest.FixtureRequest, worker: Any, shared_models: Path, edgetpu_standin: Path) -> Any:
    """Runs a model on device edgetpu, under each of the interpreters."""
    python: str | None = sys.executable
    if not importlib.util.find_spec(request.param):
        variable = f"BOARDBENCH_{request.param.upper()}_PYTHON"
        python = os.environ.get(variable)
        if not python:
            pytest.skip(f"{request.param} is not installed here: set {variable} to a Python that has it")

    def start(model: str, library: Path = edgetpu_standin, **changes: Any) -> Any:
        job = {"kind": "run", "runtime": "tflite", "format": "tflite", "device": "edgetpu",
               "model_path": str(shared_models / f"{model}.tflite"),
               **BRIEF, "min_runs": 2, **changes}  # fmt: skip
        return worker.run(job, python=python, environ={"BOARDBENCH_EDGETPU_LIBRARY": str(library)})

    return start


def test_strict_fails_and_lists_what_is_on_the_cpu(run: Callable[..., Any]) -> None:
    outcome = run(DEEPLAB, strict=True)
    assert outcome.error["code"] == "cpu_fallback"
    message = outcome.error["message"]
    assert f"8 of 9 operations of {DEEPLAB}.tflite run on the CPU" in message
    assert "which strict forbids: #1 " in message
    assert message.count("#") == 8
    assert outcome.stages[-1] == "FIRST_INFERENCE"  # nothing is measured in vain


def test_a_long_list_is_cut(run: Callable[..., Any]) -> None:
    message = run("movenet_single_pose_lightning_ptq_edgetpu", strict=True).error["message"]
    assert message.endswith(" and 19 more")
    assert message.count("#") == 40


def test_strict_takes_what_is_wholly_on_the_accelerator(run: Callable[..., Any]) -> None:
    outcome = run(f"{MOBILENET}_edgetpu", strict=True)
    assert outcome.exit_code == 0
    assert outcome.result["effective_spec"]["strict"] is True
    assert outcome.result["placement"]["verdict"] == "PLACEMENT_VERDICT_ACCELERATED"


def test_strict_names_a_model_that_was_not_compiled(run: Callable[..., Any]) -> None:
    outcome = run(MOBILENET, strict=True)
    assert outcome.error["code"] == "cpu_fallback"
    assert "31 of 31 operations" in outcome.error["message"]


def test_strict_makes_no_sense_where_the_cpu_was_asked_for(run: Callable[..., Any]) -> None:
    outcome = run(MOBILENET, strict=True, device="cpu")
    assert outcome.error["code"] == "option_rejected"
    assert "ask for an accelerator" in outcome.error["message"]


def test_strict_and_its_opposite_are_refused(run: Callable[..., Any]) -> None:
    outcome = run(MOBILENET, strict=True, allow_fallback=True)
    assert outcome.error["code"] == "option_rejected"


def test_a_missing_library_is_an_error_unless_fallback_is_allowed(run: Callable[..., Any]) -> None:
    refused = run(MOBILENET, library=Path("/nowhere.so"))
    assert refused.error["code"] == "runtime_unavailable"
    allowed = run(MOBILENET, library=Path("/nowhere.so"), allow_fallback=True, profile_runs=6)
    assert allowed.exit_code == 0
    (warning,) = [e["warning"] for e in allowed.of("warning") if e["warning"]["code"] == "device_fallback"]
    assert "/nowhere.so" in warning["message"]
    result = allowed.result
    assert result["effective_spec"]["allow_fallback"] is True
    assert result["runtime"]["device"] == "edgetpu"
    assert result["placement"]["verdict"] == "PLACEMENT_VERDICT_NOT_ACCELERATED"
    assert "accelerator" not in result
    (profile,) = allowed.of("profile")
    assert "fallback_cost" not in profile["placement"]
    assert all("seconds" in op for op in profile["placement"]["ops"])


def test_a_compiled_model_has_no_fallback(run: Callable[..., Any]) -> None:
    outcome = run(f"{MOBILENET}_edgetpu", library=Path("/nowhere.so"), allow_fallback=True)
    assert outcome.error["code"] == "model_rejected"
    assert "compiled for the Edge TPU" in outcome.error["message"]


@pytest.mark.parametrize("profile_runs", [-1, 1_000_001])
def test_a_number_of_profiled_inferences_has_bounds(run: Callable[..., Any], profile_runs: int) -> None:
    assert run(MOBILENET, profile_runs=profile_runs).error["code"] == "option_rejected"
