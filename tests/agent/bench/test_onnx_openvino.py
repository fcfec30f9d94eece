"""ONNX Runtime with OpenVINO: a real accelerator's provider with real fallbacks, on any x86 machine.

``onnxruntime-openvino`` can't live beside ``onnxruntime``: it has an environment of its own, whose Python the
variable BOARDBENCH_ORT_OPENVINO_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.testkit.child import BRIEF

from . import models

VARIABLE = "BOARDBENCH_ORT_OPENVINO_PYTHON"
OPENVINO = "OpenVINOExecutionProvider"


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get(VARIABLE)
    if not found:
        pytest.skip(f"set {VARIABLE} to a Python that has onnxruntime-openvino")
    return found


@pytest.fixture
def run(worker: Any, python: str, tmp_path: Path) -> Callable[..., Any]:
    def start(content: bytes, **changes: Any) -> Any:
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        job = {"kind": "run", "runtime": "onnxruntime", "format": "onnx", "model_path": str(path),
               "device": "openvino", **BRIEF, **changes}  # fmt: skip
        return worker.run(job, python=python)

    return start


def profiled(outcome: Any) -> dict[str, Any]:
    assert outcome.exit_code == 0, outcome.output
    (event,) = outcome.of("profile")
    placement: dict[str, Any] = event["placement"]
    return placement


def by_type(placement: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {op["type"]: op for op in placement["ops"]}


def test_what_it_refuses_is_on_the_cpu_and_is_the_root_cause(run: Callable[..., Any]) -> None:
    """Conv, Relu and Flatten are OpenVINO's; Unique it does not have."""
    placement = profiled(run(models.onnx_partly(), profile_runs=20))
    ops = by_type(placement)
    for name in ("Conv", "Relu", "Flatten", "ReduceSum"):
        assert (ops[name]["unit"], ops[name]["delegate"]) == ("UNIT_CPU_DELEGATE", OPENVINO)
        assert not ops[name]["cause"]
    unique = ops["Unique"]
    assert (unique["unit"], unique["delegate"], unique["root_cause"]) == ("UNIT_CPU", "", True)
    assert unique["cause"] == f"{OPENVINO} refuses it, by itself and between others that it takes"
    assert "Unique" in unique["remedy"]
    # OpenVINO runs on the CPU here: nothing is accelerated, and yet one is not where it was asked to be.
    assert (placement["verdict"], placement["accelerated_ops"]) == ("PLACEMENT_VERDICT_PARTLY", 0)


def test_an_operation_that_makes_a_number_without_dimensions_is_refused_for_itself(
    run: Callable[..., Any],
) -> None:
    """Also in a graph without Unique it would stay: being behind a root cause is no proof of innocence."""
    ops = by_type(profiled(run(models.onnx_partly(keep=False), profile_runs=10)))
    assert (ops["ReduceSum"]["unit"], ops["ReduceSum"]["root_cause"]) == ("UNIT_CPU", True)
    without = run(models.onnx_partly(keep=False, unique=False)).result["placement"]
    assert by_type(without)["ReduceSum"]["unit"] == "UNIT_CPU"


def test_what_it_would_take_elsewhere_is_collateral(run: Callable[..., Any]) -> None:
    """Of two that are alike, cut off from each other, OpenVINO leaves one: for no reason in itself."""
    placement = profiled(run(models.onnx_cut_off(), profile_runs=10))
    alike = [op for op in placement["ops"] if op["type"] == "Relu"]
    assert sorted(op["unit"] for op in alike) == ["UNIT_CPU", "UNIT_CPU_DELEGATE"]
    (left,) = [op for op in alike if op["unit"] == "UNIT_CPU"]
    roots = {op["index"] for op in placement["ops"] if op["type"] == "Unique"}
    assert {op["index"] for op in placement["ops"] if op.get("root_cause")} == roots
    assert left["root_cause"] is False
    said, _, named = left["cause"].partition("#")
    assert said == f"{OPENVINO} takes it elsewhere: it is on the CPU because of "
    assert named in {f"{index} Unique" for index in roots}
    assert left["remedy"] == f"change #{named} first"


def test_time_is_told_by_provider(run: Callable[..., Any]) -> None:
    outcome = run(models.onnx_partly(), profile_runs=20, min_runs=20)
    placement = profiled(outcome)
    (report,) = [r for r in placement["evidence_reports"] if r["evidence"] == "EVIDENCE_PROFILED"]
    assert report["verdict"] == "PLACEMENT_VERDICT_PARTLY"
    assert f"ms on {OPENVINO}" in report["detail"]
    assert "ms on CPUExecutionProvider" in report["detail"]
    seconds = {name: op.get("seconds") for name, op in by_type(placement).items()}
    # Three in one piece have no time of their own, one alone has.
    assert [name for name, each in seconds.items() if each is None] == ["Conv", "Relu", "Flatten"]
    cost = placement["fallback_cost"]
    assert 0 <= cost["share_low"] <= cost["share"] <= cost["share_high"] <= 1
    assert cost["share"] > 0
    assert cost["method"] == "ONNX Runtime's profiler, 20 inferences, median share"


@pytest.mark.parametrize("named", [True, False])
def test_crossings_are_counted_with_their_bytes(run: Callable[..., Any], named: bool) -> None:
    """16384 numbers go to Unique, and what is different among them comes back."""
    placement = profiled(run(models.onnx_partly(named=named), profile_runs=6))
    assert placement["crossings"]["count"] == 2
    if named:
        there, back = 4 * 16384, placement["crossings"]["bytes"] - 4 * 16384
        assert placement["crossings"]["bytes"] == there + back
        assert 4 <= back <= there
        assert back % 4 == 0
    else:
        assert "bytes" not in placement["crossings"]  # which node is which can't be told


def test_strict_names_what_is_not_there(run: Callable[..., Any]) -> None:
    error = run(models.onnx_partly(), strict=True).error
    assert error["code"] == "cpu_fallback"
    assert "1 of 5 operations of model.onnx" in error["message"]
    assert f"not in {OPENVINO}, which strict forbids: #4 Unique (unique)" in error["message"]


def test_strict_takes_a_model_that_is_wholly_there(run: Callable[..., Any]) -> None:
    outcome = run(models.onnx_affine(), strict=True, profile_runs=6)
    assert outcome.result["placement"]["verdict"] == "PLACEMENT_VERDICT_ACCELERATED"
    cost = profiled(outcome)["fallback_cost"]
    assert (cost["share"], cost["share_high"]) == (0, 0)


def test_a_device_that_does_not_start_is_an_error_unless_that_is_allowed(run: Callable[..., Any]) -> None:
    options = {"provider.device_type": "GPU"}
    refused = run(models.onnx_affine(), options=options)
    assert (refused.error["code"], "could not be started" in refused.error["message"]) == (
        "model_rejected",
        True,
    )
    allowed = run(models.onnx_affine(), options=options, allow_fallback=True, profile_runs=6)
    (warning,) = [e["warning"] for e in allowed.of("warning") if e["warning"]["code"] == "device_fallback"]
    assert OPENVINO in warning["message"]
    placement = profiled(allowed)
    assert placement["verdict"] == "PLACEMENT_VERDICT_NOT_ACCELERATED"
    assert "fallback_cost" not in placement  # everything would be its cost


def test_all_on_the_cpu_because_nothing_is_taken(run: Callable[..., Any]) -> None:
    content = models.onnx_of_node("Unique")
    assert "takes none of its operations" in run(content).error["message"]
    outcome = run(content, allow_fallback=True)
    assert "device_fallback" in [event["warning"]["code"] for event in outcome.of("warning")]


I915 = "drm-driver:\ti915\ndrm-client-id:\t7\ndrm-pdev:\t0000:00:02.0\ndrm-engine-compute:\t5 ns\n"


def test_a_gpu_that_stood_still_while_the_processor_was_busy_contradicts(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """AUTO chooses by itself where it runs, here the CPU; a GPU's counters say that it was not that."""
    options = {"provider.device_type": "AUTO:CPU"}
    busy = {"duration_seconds": 0.5, "options": options}
    plain = run(models.onnx_partly(), sys_root=str(tmp_path / "nowhere"), **busy).result
    assert plain["placement"]["verdict"] == "PLACEMENT_VERDICT_PARTLY"
    assert plain["accelerator"]["library"] == OPENVINO
    kinds = [report["evidence"] for report in plain["placement"]["evidence_reports"]]
    assert "EVIDENCE_HOST_CPU" in kinds
    assert "EVIDENCE_COUNTERS" not in kinds
    (tmp_path / "still/proc/self/fdinfo").mkdir(parents=True)
    (tmp_path / "still/proc/self/fdinfo/9").write_text(I915)
    outcome = run(models.onnx_partly(), sys_root=str(tmp_path / "still"), **busy)
    placement = outcome.result["placement"]
    assert placement["verdict"] == "PLACEMENT_VERDICT_CONTRADICTED", placement["evidence_reports"]
    (told,) = [r for r in placement["evidence_reports"] if r["evidence"] == "EVIDENCE_COUNTERS"]
    assert told["counters"] == [
        {"name": "/proc/self/fdinfo i915 0000:00:02.0 compute (ns)", "before": 5, "after": 5}
    ]
    assert "placement_contradicted" in [event["warning"]["code"] for event in outcome.of("warning")]


def test_on_the_processor_nobody_watches_a_gpu(run: Callable[..., Any]) -> None:
    assert "accelerator" not in run(models.onnx_affine()).result


def test_the_real_provider_is_in_the_environment(python: str) -> None:
    script = "import onnxruntime, json; print(json.dumps(onnxruntime.get_available_providers()))"
    said = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout
    assert OPENVINO in json.loads(said.splitlines()[-1])


def test_the_provider_keeps_blobs_where_that_is_asked_for(run: Callable[..., Any], tmp_path: Path) -> None:
    wanted = {"cache_root": str(tmp_path / "caches"), "model_sha256": "ab", "profile_runs": 0}

    def load(use: str) -> tuple[dict[str, Any], dict[str, int]]:
        (cache,) = run(models.onnx_partly(), **wanted, cache=f"CACHE_USE_{use}").result["caches"]
        return cache, {path.name: path.stat().st_mtime_ns for path in Path(cache["path"]).iterdir()}

    first, made = load("KEEP")
    second, found = load("KEEP")
    assert (first["name"], first["warm"], first["size_bytes"] > 0) == ("compiled blobs", False, True)
    assert second["path"] == first["path"]
    # 1.24 writes the blob anew at every load, which is then no load from a cache.
    assert second["warm"] is (found == made)
    assert load("RENEW")[0]["warm"] is False
    assert not run(models.onnx_partly(), profile_runs=0).result.get("caches")


def test_the_provider_is_told_a_precision_or_refuses_it(run: Callable[..., Any]) -> None:
    result = run(models.onnx_partly(), compute_precision="float32", profile_runs=0).result
    assert result["effective_spec"]["compute_precision"] == "float32"
    for precision in ("float16", "bfloat16", "int8"):
        error = run(models.onnx_partly(), compute_precision=precision).error
        assert error["code"] == "option_rejected"
        assert f"compute_precision={precision}: the provider {OPENVINO} can't be told so" in error["message"]
    error = run(
        models.onnx_partly(), compute_precision="float32", options={"provider.precision": "FP32"}
    ).error
    assert "provider.precision say what compute_precision" in error["message"]
    error = run(models.onnx_partly(), device="cpu", compute_precision="float32").error
    assert "CPUExecutionProvider can't be told so, it computes as the model is written" in error["message"]
