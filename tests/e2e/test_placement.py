"""Placement truth from the board to Prometheus: a stand-in for the Edge TPU takes what the test tells it to.

The stand-in is a delegate that real interpreters load. It is told what to take by the environment of the
agent, since options that a client gives are part of what is asked for, and then there is nothing to compare.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--duration", "0.2", "--min-runs", "12", "--warm-up", "0.05", "--profile-runs", "12")
PARTLY = "deeplabv3_mnv2_dm05_pascal_quant_edgetpu.tflite"
WHOLLY = "mobilenet_v1_0.25_128_quant_edgetpu.tflite"
UNCOMPILED = "mobilenet_v1_0.25_128_quant.tflite"
DRIFTS = "boardbench_placement_drifts_total"


class Board:
    """A board whose Edge TPU is the stand-in, and the collector that it reports to."""

    def __init__(self, programs: Any, library: Path, eventually: Callable[..., Any]) -> None:
        self._programs = programs
        self._library = library
        self._eventually = eventually
        self.collector = programs.collector()
        self.agent: Any = None

    def start(self, **standin: object) -> None:
        """Starts the agent, again on the data that it left; the keywords tell the stand-in what to do."""
        self.stop()
        # Waiting, as for a real device: what computes on the processor meanwhile is found out.
        standin = {"delay_us": 5000} | standin
        settings = {f"BOARDBENCH_STANDIN_{key.upper()}": str(value) for key, value in standin.items()}
        self.agent = self._programs.agent(collector=self.collector.address, environment=settings)

    def stop(self) -> None:
        if self.agent is not None:
            assert self.agent.program.end() == 0
            self.agent = None

    def push(self, *arguments: object, code: int | None = 0) -> Any:
        return self._programs.client(
            *("push", *QUICK, *arguments, "--to", self.agent.address, "--device", "edgetpu"),
            *("--option", f"delegate={self._library}"),
            code=code,
        )

    def result(self, *arguments: object, code: int | None = 0) -> Any:
        return self.push(*arguments, "--format", "json", code=code).json

    def show(self, *arguments: object, code: int) -> Any:
        return self._programs.client("show", *arguments, "--collector", self.collector.address, code=code)

    def stored(self, run_id: str) -> Any:
        """The result, once the collector has it."""
        found = self._eventually(
            f"the collector has {run_id}",
            lambda: [each for each in self.collector.results() if each["run_id"] == run_id],
        )
        return found[0]

    def metric(self, name: str, model: str, **labels: str) -> float:
        """The value of the one series of the model."""
        found = self.collector.metric(
            name, device=self.agent.device_id, target="edgetpu", model=model, **labels
        )
        ((_, value),) = found
        return float(value)


@pytest.fixture
def board(programs: Any, edgetpu_standin: Path, eventually: Callable[..., Any]) -> Board:
    return Board(programs, edgetpu_standin, eventually)


def _reports(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        report["evidence"].removeprefix("EVIDENCE_").lower(): report
        for report in result["placement"]["evidence_reports"]
    }


def _codes(result: Mapping[str, Any]) -> list[str]:
    return [warning["code"] for warning in result.get("warnings", [])]


def test_a_compiled_model_is_told_op_by_op_with_evidence_and_cost(board: Board, shared_models: Path) -> None:
    board.start()
    result = board.result(shared_models / PARTLY)
    placement = result["placement"]
    assert placement["verdict"] == "PLACEMENT_VERDICT_PARTLY"
    assert (placement["accelerated_ops"], placement["cpu_ops"]) == (1, 8)
    assert placement["standin"] is True
    assert result["standins"] == ["standin-edgetpu"]
    assert "standin" in _codes(result)
    reports = _reports(result)
    for kind in ("static", "partition", "profiled"):
        assert reports[kind]["verdict"] == "PLACEMENT_VERDICT_PARTLY"
    use = result["accelerator"]
    assert use["standin"] is True
    assert (use["runtime_version"], use["model_min_runtime_version"]) == (14, 12)
    assert int(use["parameters_cached_bytes"]) == 766720
    cost = placement["fallback_cost"]
    assert 0 < cost["share_low"] <= cost["share"] <= cost["share_high"] < 1
    assert placement["crossings"]["count"] >= 1
    assert board.stored(result["run_id"]) == result
    assert board.metric("boardbench_fallback_share_ratio", PARTLY) == cost["share"]
    assert board.metric("boardbench_fallback_share_low_ratio", PARTLY) == cost["share_low"]
    assert board.metric("boardbench_crossings", PARTLY) == placement["crossings"]["count"]
    assert board.metric("boardbench_result_standin", PARTLY) == 1
    assert board.metric(DRIFTS, PARTLY) == 0
    assert board.metric("boardbench_placement_info", PARTLY, verdict="partly", standin="true") == 1
    assert board.metric("boardbench_ops", PARTLY, unit="tpu") == 1
    page = board.collector.get("/")
    assert "stand-in</span>" in page
    assert f"{cost['share']:.0%} <small>" in page


def test_the_first_line_says_where_it_ran_and_what_that_cost(board: Board, shared_models: Path) -> None:
    board.start()
    partly = board.push(shared_models / PARTLY).out
    head = "✗ STAND-IN, no hardware: "
    assert partly.startswith(head + "partly on the TPU: 8 ops left on the CPU cost ")
    text = " ".join(partly.split())
    for words in (
        "of the time; ",
        "at best",
        "Evidence static partly",
        "partition partly",
        "profiled partly",
    ):
        assert words in text
    assert "ARG_MAX" in text
    wholly = board.push(shared_models / WHOLLY).out.splitlines()
    assert wholly[0] == head + "wholly on the TPU as 1 compiled subgraph, nothing fell back"
    uncompiled = " ".join(board.push(shared_models / UNCOMPILED).out.split())
    assert uncompiled.startswith(head + "NOT COMPILED for the Edge TPU: all 31 ops ran on the CPU")


def test_exit_codes_of_requirements(board: Board, shared_models: Path) -> None:
    board.start()
    held = board.push(
        shared_models / WHOLLY, "--format", "json", "--require", "no-fallback",
        "--require", "verdict==accelerated", "--require", "fallback_share<10%", "--require", "p50<=60s",
    )  # fmt: skip
    assert held.json["status"] == "RUN_STATUS_SUCCEEDED"
    assert held.err.count(": held: ") == 4
    assert "(by a stand-in or emulator, not by hardware)" in held.err
    lost = board.push(
        shared_models / PARTLY, "--format", "json", "--require", "no-fallback", "--require", "cpu_ops<=8",
        code=1,
    )  # fmt: skip
    assert lost.json["placement"]["cpu_ops"] == 8
    assert "no-fallback: NOT HELD: 8 ops are on the CPU" in lost.err
    assert "cpu_ops<=8: held: 8 of 9 ops" in lost.err
    assert lost.err.count("\n    #") == 8, "every op that is to blame"
    run_id = lost.json["run_id"]
    board.stored(run_id)
    assert board.show(run_id, "--format", "json", "--require", "cpu_ops<=8", code=0).json == lost.json
    board.show(run_id, "--require", "cpu_ops<8", code=1)
    assert "did you mean 'cpu_ops'" in board.show(run_id, "--require", "cpu_op<8", code=2).err


def test_strict_fails_and_names_the_ops(board: Board, shared_models: Path) -> None:
    board.start()
    result = board.result(shared_models / PARTLY, "--strict", code=1)
    assert result["error"]["code"] == "cpu_fallback"
    assert "ARG_MAX" in result["error"]["message"]
    assert board.result(shared_models / WHOLLY, "--strict")["status"] == "RUN_STATUS_SUCCEEDED"


def test_without_a_profile_the_cost_is_not_known(board: Board, shared_models: Path) -> None:
    board.start()
    answer = board.push(
        shared_models / PARTLY, "--profile-runs", "0", "--require", "fallback_share<=100%", code=1
    )
    assert answer.out.splitlines()[0].endswith("8 ops left on the CPU, cost not measured")
    assert "not known, and so it does not hold (what the ops on the CPU cost was not measured" in answer.err


def test_drift_is_told_by_the_board_and_counted_by_the_collector(board: Board, shared_models: Path) -> None:
    """The stand-in takes other ops after a restart, as another driver would."""
    model = shared_models / UNCOMPILED
    board.start(claim="ops")
    assert board.result(model)["placement"]["accelerated_ops"] == 31
    assert "placement_drifted" not in _codes(board.result(model))

    board.start(claim="ops", leave_types="SOFTMAX,RESHAPE")
    moved = board.result(model)
    (warning,) = (each for each in moved["warnings"] if each["code"] == "placement_drifted")
    assert "2 of 31 ops run elsewhere" in warning["message"]
    assert "from the TPU to" in warning["message"]
    assert "SOFTMAX MobilenetV1/Predictions" in warning["message"]
    assert "both times" in warning["message"]
    assert board.stored(moved["run_id"]) == moved
    assert board.metric(DRIFTS, UNCOMPILED) == 1

    again = board.result(model)
    assert "placement_drifted" not in _codes(again), "it is where it was"
    board.stored(again["run_id"])
    assert board.metric(DRIFTS, UNCOMPILED) == 1

    # The board is set up anew: it can't know what it did before, and the collector does.
    data_dir = board.agent.data_dir
    board.stop()
    shutil.rmtree(data_dir)
    board.start(claim="ops")
    anew = board.result(model)
    assert "placement_drifted" not in _codes(anew)
    board.stored(anew["run_id"])
    assert board.metric(DRIFTS, UNCOMPILED) == 2


def test_a_device_that_the_cpu_replaces_is_a_drift(board: Board, shared_models: Path) -> None:
    board.start(claim="ops")
    first = board.result(shared_models / UNCOMPILED)
    assert first["placement"]["verdict"] == "PLACEMENT_VERDICT_ACCELERATED"
    board.start(claim="ops", fail_at="create")
    refused = board.result(shared_models / UNCOMPILED, code=1)
    assert refused["error"]["code"] == "runtime_unavailable"
    answer = board.push(shared_models / UNCOMPILED, "--allow-fallback", "--require", "no-fallback", code=1)
    assert "NOT ACCELERATED: edgetpu could not be used, and all 31 ops ran on the CPU instead" in answer.out
    assert "placement_drifted" in answer.out
    assert "all 31 ops are on the CPU" in answer.err
