"""Why an operation is not on the Edge TPU, in the result of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.inspect.analyse import inspect
from boardbench.testkit.child import BRIEF

DEEPLAB = "deeplabv3_mnv2_dm05_pascal_quant_edgetpu"
MOBILENET = "mobilenet_v1_0.25_128_quant"


@pytest.fixture
def ops(worker: Any, shared_models: Path, edgetpu_standin: Path) -> Callable[..., list[dict[str, Any]]]:
    pytest.importorskip("ai_edge_litert")

    def run(model: str, **options: str) -> list[dict[str, Any]]:
        job = {"kind": "run", "runtime": "tflite", "format": "tflite", "device": "edgetpu",
               "model_path": str(shared_models / f"{model}.tflite"), **BRIEF, "min_runs": 2,
               "options": {f"delegate.{key}": value for key, value in options.items()}}  # fmt: skip
        outcome = worker.run(job, environ={"BOARDBENCH_EDGETPU_LIBRARY": str(edgetpu_standin)})
        found: list[dict[str, Any]] = outcome.result["placement"]["ops"]
        return found

    return run


@pytest.mark.parametrize("model", [DEEPLAB, "movenet_single_pose_lightning_ptq_edgetpu"])
def test_causes_are_those_of_the_file(ops: Callable[..., Any], shared_models: Path, model: str) -> None:
    report = inspect(shared_models / f"{model}.tflite")
    assert report.placement is not None
    told = [(op.index, op.type, op.cause, op.root_cause, op.remedy) for op in report.placement.ops]
    seen = [(op["index"], op["type"], op["cause"], op.get("root_cause"), op["remedy"]) for op in ops(model)]
    assert seen == told


def test_a_root_cause_is_told_from_what_only_needs_its_result(ops: Callable[..., Any]) -> None:
    """Of eight, a RESIZE_BILINEAR stays because of itself; six wait for it; ARG_MAX makes 64-bit integers."""
    found = ops(DEEPLAB)
    assert [op["type"] for op in found if op.get("root_cause")] == ["RESIZE_BILINEAR", "ARG_MAX"]
    assert sum(op.get("root_cause") is False for op in found) == 6
    assert (found[0]["type"], found[0]["cause"]) == ("edgetpu-custom-op", "")


def test_an_uncompiled_model_is_on_the_cpu_for_one_reason(ops: Callable[..., Any]) -> None:
    assert {op["cause"] for op in ops(MOBILENET)} == {"the model is not compiled for the Edge TPU"}


def test_no_cause_is_invented(ops: Callable[..., Any]) -> None:
    """Of an uncompiled model the stand-in takes what it was told to: no file knows why it left the rest."""
    found = ops(MOBILENET, claim="ops", claim_types="CONV_2D")
    assert any(op["unit"] == "UNIT_TPU" for op in found)
    assert {op["cause"] for op in found} == {""}
