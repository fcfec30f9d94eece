"""The main job: a model goes to the board, the answer to the client, the collector and /metrics."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

# Few inferences: what is looked at is the record, not the figures.
QUICK = ("--duration", "0.2", "--min-runs", "12", "--warm-up", "0.05")


def _only(answer: Any) -> Any:
    """The one result of a push of one model."""
    document = answer.json
    assert isinstance(document, dict)
    return document


def _check_record(result: Any, path: Path, runtime: str) -> None:
    data = path.read_bytes()
    assert result["status"] == "RUN_STATUS_SUCCEEDED"
    assert result["model"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert result["model"]["name"] == path.name
    assert int(result["model"]["size_bytes"]) == len(data)
    assert result["model"]["format"] == path.suffix[1:]
    assert result["runtime"]["name"] == runtime
    assert result["runtime"]["version"]
    assert result["runtime"]["interpreter"]["path"]
    for seconds in ("create_seconds", "first_inference_seconds", "import_seconds"):
        assert result[seconds] > 0
    latency = result["latency"]
    samples = sorted(int(each) for each in latency["samples_nanoseconds"])
    assert len(samples) == latency["count"] >= 12
    assert latency["min_seconds"] == pytest.approx(samples[0] / 1e9)
    assert latency["max_seconds"] == pytest.approx(samples[-1] / 1e9)
    assert latency["mean_seconds"] == pytest.approx(sum(samples) / len(samples) / 1e9)
    for each in latency["percentiles"]:
        rank = max(1, math.ceil(len(samples) * each["percentile"] / 100))
        assert each["seconds"] == pytest.approx(samples[rank - 1] / 1e9)
        assert each["low_seconds"] <= each["seconds"] <= each["high_seconds"]
    assert 50 in [each["percentile"] for each in latency["percentiles"]]
    assert [phase["phase"].removeprefix("MEMORY_PHASE_") for phase in result["memory"]["phases"]] == [
        "BASELINE",
        "LOADED",
        "FIRST_INFERENCE",
        "STEADY",
    ]
    assert all(int(phase["rss_bytes"]) > 1_000_000 for phase in result["memory"]["phases"])
    placement = result["placement"]
    assert placement["evidence"] != "EVIDENCE_UNSPECIFIED"
    assert placement["ops"]
    assert placement["cpu_ops"] == len(placement["ops"])
    assert sum(placement["cpu_op_types"].values()) == len(placement["ops"])
    assert all(op["type"] and op["unit"] for op in placement["ops"])
    assert result["environment"]["boardbench_version"]
    assert result["input_data"]["source"] == "seeded"
    assert result["output_sha256"]
    assert "error" not in result
    assert result["created_at"] <= result["started_at"] <= result["finished_at"]


def test_tflite(house: Any, demo_tflite: Path) -> None:
    result = _only(house.push(demo_tflite, "--format", "json", *QUICK))
    _check_record(result, demo_tflite, "tflite")
    assert [(each["name"], each["dtype"]) for each in result["outputs"]] == [
        (result["outputs"][0]["name"], "int8"),
        (result["outputs"][1]["name"], "int64"),
    ]
    left = [op["type"] for op in result["placement"]["ops"] if op["unit"] == "UNIT_CPU"]
    taken = [op for op in result["placement"]["ops"] if op["unit"] == "UNIT_CPU_DELEGATE"]
    assert "ARG_MAX" in left
    assert all("XNN" in op["delegate"].upper() for op in taken)
    assert len(left) + len(taken) == len(result["placement"]["ops"])


def test_onnx(house: Any, demo_onnx: Path) -> None:
    result = _only(house.push(demo_onnx, "--format", "json", *QUICK))
    _check_record(result, demo_onnx, "onnxruntime")
    assert {op["unit"] for op in result["placement"]["ops"]} == {"UNIT_CPU"}


def test_two_models_in_one_command(house: Any, demo_tflite: Path, demo_onnx: Path) -> None:
    answer = house.push(demo_tflite, demo_onnx, "--format", "json", *QUICK)
    assert [each["model"]["name"] for each in answer.json] == [demo_tflite.name, demo_onnx.name]


def test_the_table_shows_what_the_record_says(house: Any, demo_tflite: Path) -> None:
    answer = house.push(demo_tflite, *QUICK)
    assert demo_tflite.name in answer.out
    assert "p50" in answer.out and "ms" in answer.out.replace("µs", "ms")
    assert "ARG_MAX" in answer.out
    assert "XNNPACK" in answer.out.upper()
    assert "MiB" in answer.out
    assert "\x1b" not in answer.out + answer.err


def test_the_same_input_gives_the_same_output(house: Any, demo_tflite: Path) -> None:
    first, second, other = (
        _only(house.push(demo_tflite, "--format", "json", "--seed", seed, *QUICK)) for seed in (5, 5, 6)
    )
    assert first["input_data"] == second["input_data"] != other["input_data"]
    assert first["output_sha256"] == second["output_sha256"] != other["output_sha256"]


def test_threads_and_seed_are_kept_as_asked_and_as_run(house: Any, demo_onnx: Path) -> None:
    result = _only(house.push(demo_onnx, "--format", "json", "--threads", "1", "--max-runs", "20", *QUICK))
    assert result["spec"]["threads"] == 1
    assert result["effective_spec"]["threads"] == 1
    assert result["effective_spec"]["max_runs"] == 20
    assert result["latency"]["count"] <= 20
    assert result["effective_spec"]["runtime"] == "onnxruntime"


def test_inputs_from_a_file(house: Any, demo_onnx: Path, tmp_path: Path) -> None:
    np: Any = pytest.importorskip("numpy")
    path = tmp_path / "inputs.npz"
    np.savez(path, image=np.full((1, 3, 160, 160), 0.25, np.float32))
    result = _only(house.push(demo_onnx, "--inputs", path, "--format", "json", *QUICK))
    assert result["input_data"]["source"] == "file"
    assert result["spec"]["inputs_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_collector_tells_the_same_everywhere(house: Any, demo_tflite: Path) -> None:
    result = _only(house.push(demo_tflite, "--format", "json", *QUICK))
    run_id = result["run_id"]
    from_http = _http_result(house, run_id)
    assert from_http == result
    shown = house.client("show", run_id, "--collector", house.collector.address, "--format", "json")
    assert shown.json == result
    listed = house.client("results", "--collector", house.collector.address, "--format", "json").json
    assert run_id in json.dumps(listed)
    devices = house.client("devices", "--collector", house.collector.address, "--format", "json").json
    assert house.agent.device_id in json.dumps(devices)


def _http_result(house: Any, run_id: str) -> Any:
    from urllib.error import HTTPError

    def ask() -> Any:
        try:
            return house.collector.get_json(f"/api/v1/results/{run_id}")
        except HTTPError as error:
            # The result reaches the client and the collector on two ways; the second may be a moment later.
            assert error.code == 404
            return None

    answer = house.eventually(f"run {run_id} is in the collector", ask)
    return answer.get("result", answer)


def test_metrics_hold_what_the_client_printed(house: Any, demo_onnx: Path) -> None:
    result = _only(house.push(demo_onnx, "--format", "json", *QUICK))
    _http_result(house, result["run_id"])
    told = {str(each["percentile"]): each["seconds"] for each in result["latency"]["percentiles"]}
    found = house.collector.metric(
        "boardbench_latency_seconds",
        device=house.agent.device_id,
        model=demo_onnx.name,
        threads="",
        variant="",
    )
    assert found
    shown = {str(float(labels["percentile"])): value for labels, value in found}
    assert shown == pytest.approx(told)
    assert house.collector.metric("boardbench_device_up", device=house.agent.device_id)[0][1] == 1
    assert result["run_id"] not in house.collector.get("/metrics")
