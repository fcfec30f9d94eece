"""Where the time of ONNX Runtime inferences goes: joining, and what is told without an accelerator."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.bench import inputs
from boardbench.agent.bench.runtime import NoProfile, ProfileRequest
from boardbench.agent.bench.runtimes import onnx, onnx_profile
from boardbench.agent.bench.runtimes.onnx import CPU, Assigned
from boardbench.agent.domain import OpPlacement
from boardbench.testkit.child import BRIEF
from boardbench.testkit.contract import available

from . import models

NPU = "SomeNpuExecutionProvider"


@pytest.fixture
def runtime() -> onnx.OnnxRuntime:
    return available(onnx.OnnxRuntime())


def profile(runtime: onnx.OnnxRuntime, content: bytes, tmp_path: Path, **options: str) -> Any:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    request = ProfileRequest(
        model_path=path,
        device="cpu",
        threads=1,
        options=options,
        shapes={},
        allow_fallback=False,
        feeds=lambda tensors: inputs.seeded(tensors, 0),
        trying=lambda method: None,
    )
    return onnx_profile.profile(runtime, request, lambda: range(6))


@pytest.mark.parametrize("named", [True, False])
def test_every_node_that_ran_as_it_is_has_its_time(
    runtime: onnx.OnnxRuntime, tmp_path: Path, named: bool
) -> None:
    content = models.onnx_partly(named=named)
    found = profile(runtime, content, tmp_path, graph_optimization="off")
    assert len(found.whole_seconds) == 6
    assert (found.fallback_seconds, found.crossings, found.causes) == ((), None, {})
    assert sum(found.op_seconds.values()) <= 1.5 * max(found.whole_seconds)
    assert set(found.op_seconds) == set(range(5))
    # Sorting 16384 numbers takes longer than flattening them.
    assert found.op_seconds[3] > found.op_seconds[2]


def test_a_node_that_was_fused_has_no_time_of_its_own(runtime: onnx.OnnxRuntime, tmp_path: Path) -> None:
    found = profile(runtime, models.onnx_partly(), tmp_path)
    assert 1 not in found.op_seconds  # Relu is in Conv
    assert "on CPUExecutionProvider" in found.detail


def test_its_files_are_gone_afterwards(
    runtime: onnx.OnnxRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(scratch)
    profile(runtime, models.onnx_affine(), tmp_path)
    assert list(scratch.iterdir()) == []


def test_a_version_that_does_not_tell_who_took_a_node_has_the_times_of_nodes_as_they_ran(
    runtime: onnx.OnnxRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in versions before 1.24, whose placement is itself from a profile."""
    monkeypatch.setattr(onnx.OnnxModel, "assigned", lambda self: None)
    found = profile(runtime, models.onnx_partly(), tmp_path)
    assert set(found.op_seconds) == set(range(len(found.units)))


@pytest.mark.usefixtures("runtime")
def test_a_profile_is_evidence_in_the_result(worker: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(models.onnx_partly())
    job = {"kind": "run", "runtime": "onnxruntime", "format": "onnx", "model_path": str(path)}
    outcome = worker.run({**job, **BRIEF, "profile_runs": 8})
    placement = outcome.of("profile")[0]["placement"]
    (report,) = [r for r in placement["evidence_reports"] if r["evidence"] == "EVIDENCE_PROFILED"]
    assert report["verdict"] == "PLACEMENT_VERDICT_NOT_ACCELERATED"
    assert "8 inferences of" in report["detail"]
    assert "fallback_cost" not in placement
    assert "crossings" not in placement


# What is in a profile


def event(name: str, ts: int, dur: int, provider: str = CPU, op: str = "Add") -> dict[str, Any]:
    arguments = {"provider": provider, "op_name": op, "node_index": "0"}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": arguments}


def run_of(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


def test_nodes_belong_to_the_inference_in_which_they_began_and_the_first_is_left_out() -> None:
    events = [
        event("a", 10, 5), run_of(9, 20), event("a", 110, 6), event("b", 117, 2), run_of(109, 12),
        event("a", 210, 8), run_of(209, 12), {**run_of(0, 3), "name": "session_initialization"},
    ]  # fmt: skip
    found = onnx_profile._inferences(events)
    assert [each.seconds for each in found] == pytest.approx([12e-6, 12e-6])
    assert [[onnx.node_name(node) for node in each.nodes] for each in found] == [["a", "b"], ["a"]]
    (a, b) = onnx_profile._nodes(found)
    assert (a.seconds, b.seconds) == (pytest.approx((6e-6, 8e-6)), pytest.approx((2e-6,)))


def test_a_node_in_a_loop_has_the_time_of_all_its_turns() -> None:
    events = [run_of(0, 1), event("a", 10, 5), event("a", 16, 7), run_of(9, 20)]
    (a,) = onnx_profile._nodes(onnx_profile._inferences(events))
    assert a.seconds == pytest.approx((12e-6,))


@pytest.mark.parametrize("events", [[], [run_of(0, 9)], [run_of(0, 9), run_of(10, 9)]])
def test_a_profile_without_an_inference_is_none(events: list[dict[str, Any]]) -> None:
    with pytest.raises(NoProfile, match="without an inference"):
        onnx_profile._inferences(events)


def test_nodes_that_run_side_by_side_take_their_time_once() -> None:
    nodes = (
        event("a", 0, 10), event("b", 5, 10), event("c", 6, 2), event("n", 20, 50, NPU), event("d", 100, 10),
    )  # fmt: skip
    seconds = onnx_profile._seconds_away(onnx_profile._Inference(1.0, nodes))
    assert seconds == pytest.approx(25e-6)


def test_copies_between_device_and_host_are_a_cost_of_fallback() -> None:
    nodes = (
        event("n", 0, 50, NPU, "Conv"),
        event("copy", 50, 7, NPU, "MemcpyToHost"),
        event("a", 57, 3),
        event("back", 60, 5, NPU, "MemcpyFromHost"),
    )
    inference = onnx_profile._Inference(1.0, nodes)
    assert onnx_profile._seconds_away(inference) == pytest.approx(15e-6)
    assert onnx_profile._crossings(inference, seen([], [])).count == 2


def seen(assigned: list[Assigned], nodes: list[dict[str, Any]]) -> onnx_profile._Seen:
    ran = onnx_profile._nodes([onnx_profile._Inference(1.0, tuple(nodes))])
    ops = [OpPlacement(index=at, type=node.op_type) for at, node in enumerate(assigned)]
    return onnx_profile._Seen(ops, assigned, ran, None)


def test_names_are_joined_only_where_they_are_unique_and_of_one_type_and_provider() -> None:
    assigned = [
        Assigned(CPU, "a", "Add", 0), Assigned(CPU, "twice", "Add", 1), Assigned(CPU, "twice", "Add", 2),
        Assigned(CPU, "fused", "Conv", 3), Assigned(NPU, "moved", "Add", 4),
    ]  # fmt: skip
    nodes = [
        event("a", 0, 1),
        event("twice", 1, 1),
        event("fused", 2, 1, op="FusedConv"),
        event("moved", 3, 1),
    ]
    assert set(seen(assigned, nodes).op_seconds()) == {0}


def test_a_type_of_another_domain_is_named_without_it() -> None:
    assigned = [Assigned(CPU, "g", "com.microsoft.Gelu", 0)]
    assert set(seen(assigned, [event("g", 0, 1, op="Gelu")]).op_seconds()) == {0}


def test_what_a_provider_took_alone_is_joined_by_order_and_what_it_took_together_is_not() -> None:
    assigned = [Assigned(NPU, "a", "Conv", 0), Assigned(NPU, "b", "Relu", 0), Assigned(NPU, "c", "Add", 1)]
    nodes = [event("npu_graph_2_11", 5, 3, NPU, "graph_2"), event("npu_graph_1_10", 0, 5, NPU, "graph_1")]
    assert seen(assigned, nodes).op_seconds() == {2: pytest.approx(3e-6)}
    assert seen(assigned, nodes[:1]).op_seconds() == {}
