"""Every real model goes end to end: those that a CPU can run, run; the others say why not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("BOARDBENCH_MODELS", REPOSITORY.parent / "shared" / "models"))
FILES = (
    sorted(path.name for path in FOLDER.glob("*") if path.suffix in (".tflite", ".onnx"))
    if FOLDER.is_dir()
    else []
)

# Custom operations that a CPU interpreter lacks, by what is in the name.
REFUSED = {
    "_edgetpu": "edgetpu-custom-op",
    "quant_decoder": "PosenetDecoderOp",
    "model_invoking_error": "fake-op-double",
}


@pytest.mark.parametrize("name", FILES or ["(no models here)"])
def test_model(house: Any, shared_models: Path, name: str) -> None:
    path = shared_models / name
    cause = next((operation for mark, operation in REFUSED.items() if mark in name), None)
    arguments = ("--duration", "0.1", "--min-runs", "3", "--warm-up", "0", "--format", "json")
    answer = house.push(path, *arguments, code=1 if cause else 0)
    result = answer.json
    assert result["model"]["name"] == name
    assert result["model"]["format"] == path.suffix[1:]
    if cause:
        assert result["status"] == "RUN_STATUS_FAILED"
        assert cause in result["error"]["message"]
        assert "latency" not in result
    else:
        assert result["status"] == "RUN_STATUS_SUCCEEDED"
        assert result["latency"]["count"] >= 3
        assert result["placement"]["ops"]
        assert result["placement"]["cpu_ops"] == len(result["placement"]["ops"])
        assert result["placement"].get("accelerated_ops", 0) == 0
    house.eventually(
        "the collector has it",
        lambda: [each for each in house.collector.results(model=name) if each["run_id"] == result["run_id"]],
    )
