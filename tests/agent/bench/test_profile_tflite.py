"""Where the time of TensorFlow Lite inferences goes, with real interpreters."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import inputs
from boardbench.agent.bench.runtime import NoProfile, ProfileRequest
from boardbench.agent.bench.runtimes import litert_profiler, tflite, tflite_profile
from boardbench.testkit.child import BRIEF
from boardbench.testkit.contract import available

from . import models

MOBILENET = "mobilenet_v1_0.25_128_quant"
SMALL_ENOUGH = {"profile_runs": 12, "min_runs": 12}


@pytest.fixture
def profiled(worker: Any) -> Callable[..., Any]:
    """Runs a model in the worker; its profile's placement, and what it says of the profile."""

    def start(python: str, model: Path, environ: dict[str, str] | None = None, **changes: Any) -> Any:
        job = {"kind": "run", "runtime": "tflite", "format": "tflite", "model_path": str(model),
               **BRIEF, **SMALL_ENOUGH, **changes}  # fmt: skip
        outcome = worker.run(job, python=python, environ=environ)
        assert outcome.exit_code == 0, outcome.output
        (event,) = outcome.of("profile")
        (report,) = [
            r for r in event["placement"]["evidence_reports"] if r["evidence"] == "EVIDENCE_PROFILED"
        ]
        return outcome.result, event["placement"], report

    return start


def test_operations_add_up_to_the_inference(
    profiled: Callable[..., Any], python: str, shared_models: Path
) -> None:
    _, placement, report = profiled(python, shared_models / f"{MOBILENET}.tflite")
    assert report["verdict"] == "PLACEMENT_VERDICT_NOT_ACCELERATED"
    assert report["cpu_ops"] == 31
    seconds = [op["seconds"] for op in placement["ops"]]
    assert len(seconds) == 31
    assert all(each >= 0 for each in seconds)
    told = float(report["detail"].split(" inferences of ")[1].split(" ms")[0]) / 1e3
    # Shares of the whole: the sum is the middle half's mean, and what is told is the median.
    assert sum(seconds) == pytest.approx(told, rel=0.9)
    assert "12 inferences of" in report["detail"]
    assert "fallback_cost" not in placement  # the CPU is what was asked for
    assert "crossings" not in placement


def test_the_largest_operation_is_the_largest(
    profiled: Callable[..., Any], python: str, tmp_path: Path
) -> None:
    """A million powers against sixteen comparisons."""
    path = tmp_path / "made.tflite"
    path.write_bytes(models.tflite_small_and_large())
    _, placement, _ = profiled(python, path)
    seconds = {op["type"]: op.get("seconds", 0.0) for op in placement["ops"]}
    assert max(seconds, key=lambda name: seconds[name]) in ("POW", "TILE", "SUM")
    assert seconds["RELU"] < 0.05 * sum(seconds.values())


def test_how_it_was_measured_is_said(profiled: Callable[..., Any], python: str, shared_models: Path) -> None:
    _, _, report = profiled(python, shared_models / f"{MOBILENET}.tflite")
    way = "LiteRT profiler" if python == sys.executable else "operations one by one"
    assert report["detail"].endswith(f"; inside parts by {way}")


def test_a_model_that_the_profiler_refuses_is_taken_apart(
    profiled: Callable[..., Any], python: str, shared_models: Path
) -> None:
    """LiteRT does not load the LSTM; XNNPACK computes two of its operations together."""
    _, placement, report = profiled(python, shared_models / "keras_lstm_mnist_ptq.tflite")
    assert report["detail"].endswith("; inside parts by operations one by one")
    by_unit = {op["type"]: ("seconds" in op, op["unit"]) for op in placement["ops"]}
    assert by_unit["UNIDIRECTIONAL_SEQUENCE_LSTM"][0]
    assert all(has_time or unit == "UNIT_CPU_DELEGATE" for has_time, unit in by_unit.values())


@pytest.mark.parametrize("options", [{"xnnpack": "off"}, {"xnnpack": "on"}])
def test_plain_kernels_are_profiled_as_plain_kernels(
    profiled: Callable[..., Any], python: str, shared_models: Path, options: dict[str, str]
) -> None:
    result, placement, _ = profiled(python, shared_models / f"{MOBILENET}.tflite", options=options, threads=1)
    assert [op["unit"] for op in placement["ops"]] == [op["unit"] for op in result["placement"]["ops"]]
    assert all("seconds" in op for op in placement["ops"])


def test_open_sizes_are_profiled_as_they_ran(
    profiled: Callable[..., Any], python: str, tmp_path: Path
) -> None:
    path = tmp_path / "open.tflite"
    path.write_bytes(models.tflite_affine(batch=-1))
    _, placement, _ = profiled(python, path, shapes={"x": [1000, 4]}, options={"xnnpack": "off"})
    assert all(op["seconds"] > 0 for op in placement["ops"])


def test_what_nobody_uses_has_no_time(profiled: Callable[..., Any], python: str, tmp_path: Path) -> None:
    """It is not known whether it runs, or in what."""
    path = tmp_path / "dead_end.tflite"
    path.write_bytes(models.tflite_dead_end())
    _, placement, report = profiled(python, path)
    used, unused = placement["ops"]
    assert used["seconds"] >= 0
    assert "seconds" not in unused or unused["unit"] == "UNIT_CPU"
    assert report["detail"].startswith(("1 of 2", "2 of 2"))


def test_data_of_the_user_is_what_runs(profiled: Callable[..., Any], python: str, tmp_path: Path) -> None:
    path, data = tmp_path / "loop.tflite", tmp_path / "data.npz"
    path.write_bytes(models.tflite_while())
    taken = []
    for start in (9.0, -40000.0):  # one turn of the loop, and forty thousand
        np.savez(data, x=np.array([start], np.float32))
        _, placement, _ = profiled(python, path, inputs_path=str(data))
        taken.append(placement["ops"][0]["seconds"])
    assert taken[1] > 20 * taken[0]


def test_the_accelerator_is_free_for_the_profile(
    profiled: Callable[..., Any], python: str, shared_models: Path, edgetpu_standin: Path, tmp_path: Path
) -> None:
    """The delegate of the counted inferences is gone before another one is made, as an Edge TPU wants it."""
    import json

    log = tmp_path / "log.jsonl"
    profiled(
        python,
        shared_models / "deeplabv3_mnv2_dm05_pascal_quant_edgetpu.tflite",
        {"BOARDBENCH_EDGETPU_LIBRARY": str(edgetpu_standin)},
        device="edgetpu",
        min_runs=2,
        options={"delegate.log": str(log)},
    )
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert [event for event in events if event in ("create", "destroy")][:4] == ["create", "destroy"] * 2


def test_a_placement_that_is_not_known_is_the_reason(
    profiled: Callable[..., Any], shared_models: Path, edgetpu_standin: Path, tmp_path: Path
) -> None:
    if not importlib.util.find_spec("ai_edge_litert"):
        pytest.skip("ai-edge-litert is not installed here")
    path = tmp_path / "open.tflite"
    path.write_bytes(models.tflite_affine(batch=-1))
    _, _, report = profiled(
        sys.executable,
        path,
        {"BOARDBENCH_EDGETPU_LIBRARY": str(edgetpu_standin)},
        device="edgetpu",
        shapes={"x": [8, 4]},
        options={"delegate.claim": "ops", "delegate.nodes": "0"},
    )
    assert report["detail"].startswith("there is no profile: it is not known where operations run: ")


# The profiler by itself


@pytest.fixture
def litert() -> Any:
    if not importlib.util.find_spec("ai_edge_litert"):
        pytest.skip("ai-edge-litert is not installed here")
    from ai_edge_litert import interpreter

    return interpreter


def test_the_profiler_times_every_operation(litert: Any, shared_models: Path) -> None:
    path = shared_models / f"{MOBILENET}.tflite"
    feed = np.zeros((1, 128, 128, 3), np.uint8)
    for xnnpack, delegated in ((True, 29), (False, 0)):
        found = litert_profiler.profile(
            litert_profiler.library_of(litert), path, [feed], threads=1, xnnpack=xnnpack, runs=range(3)
        )
        assert len(found) == 3
        for inference in found:
            assert len(inference.events) == 31
            assert sum(event.delegated for event in inference.events) == delegated
            assert sum(event.seconds for event in inference.events) <= inference.seconds


def test_the_profiler_runs_on_the_data_that_it_is_given(litert: Any, tmp_path: Path) -> None:
    path = tmp_path / "loop.tflite"
    path.write_bytes(models.tflite_while())
    medians = []
    for start in (9.0, -4000.0):
        found = litert_profiler.profile(
            litert_profiler.library_of(litert),
            path,
            [np.array([start], np.float32)],
            threads=1,
            xnnpack=False,
            runs=range(3),
        )
        # What the bodies of the loop do is the loop's.
        assert [event.name for event in found[0].events] == ["WHILE"]
        medians.append(statistics.median(inference.seconds for inference in found))
    assert medians[1] > 20 * medians[0]


def test_text_is_refused(litert: Any, shared_models: Path) -> None:
    """What NumPy has of it are pointers."""
    with pytest.raises(litert_profiler.NoProfiler, match="type object can't be copied"):
        litert_profiler.profile(
            litert_profiler.library_of(litert),
            shared_models / f"{MOBILENET}.tflite",
            [np.array(["text"], object)],
            threads=1,
            xnnpack=True,
            runs=range(1),
        )


@pytest.mark.parametrize("feeds", [[], [np.zeros(1, np.uint8)] * 2, [np.zeros(10**6, np.uint8)]])
def test_wrong_data_is_refused_before_it_is_copied(litert: Any, shared_models: Path, feeds: Any) -> None:
    with pytest.raises(litert_profiler.NoProfiler, match=r"inputs where there are|bytes for an input"):
        litert_profiler.profile(
            litert_profiler.library_of(litert),
            shared_models / f"{MOBILENET}.tflite",
            feeds,
            threads=1,
            xnnpack=True,
            runs=range(1),
        )


def test_another_layout_of_events_is_refused(
    litert: Any, shared_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import struct

    monkeypatch.setattr(litert_profiler, "_EVENT", struct.Struct("<QixxxxQQ32xQQixxxx"))
    with pytest.raises(litert_profiler.NoProfiler, match="another layout than is known"):
        litert_profiler.profile(
            litert_profiler.library_of(litert),
            shared_models / f"{MOBILENET}.tflite",
            [np.zeros((1, 128, 128, 3), np.uint8)],
            threads=1,
            xnnpack=True,
            runs=range(1),
        )


def test_a_library_that_is_no_profiler_is_refused(tmp_path: Path) -> None:
    class Elsewhere:
        __file__ = str(tmp_path / "interpreter.py")

    with pytest.raises(litert_profiler.NoProfiler, match=r"no libLiteRt\.so"):
        litert_profiler.library_of(Elsewhere)
    nonsense = tmp_path / litert_profiler.LIBRARY
    nonsense.write_bytes(b"no library")
    for library in (nonsense, Path("libc.so.6")):
        with pytest.raises(litert_profiler.NoProfiler):
            litert_profiler.profile(library, nonsense, [], threads=1, xnnpack=True, runs=())


# What is avoided, and what can't be


@pytest.fixture
def request_for(tmp_path: Path) -> Callable[..., ProfileRequest]:
    def make(content: bytes, tried: list[str], **changes: Any) -> ProfileRequest:
        path = tmp_path / "model.tflite"
        path.write_bytes(content)
        return ProfileRequest(
            **{
                "model_path": path, "device": "cpu", "threads": None, "options": {"xnnpack": "off"},
                "shapes": {}, "allow_fallback": False, "trying": tried.append,
                "feeds": lambda tensors: inputs.seeded(tensors, 0), **changes,
            }
        )  # fmt: skip

    return make


@pytest.fixture
def runtime() -> tflite.TfliteRuntime:
    return available(tflite.TfliteRuntime())


def profile(runtime: tflite.TfliteRuntime, request: ProfileRequest) -> Any:
    return tflite_profile.profile(runtime, request, lambda: range(4))


def test_a_way_that_crashed_is_not_tried_again(
    runtime: tflite.TfliteRuntime, request_for: Callable[..., ProfileRequest]
) -> None:
    content = models.tflite_affine()
    tried: list[str] = []
    everything = [tflite_profile.IN_TURN, tflite_profile.LITERT, tflite_profile.ONE_BY_ONE]
    found = profile(runtime, request_for(content, tried, avoid=(tflite_profile.LITERT,)))
    assert tried == [everything[0], everything[2]]
    assert set(found.op_seconds) == {0, 1}
    found = profile(runtime, request_for(content, tried, avoid=tuple(everything[1:])))
    assert (found.op_seconds, len(found.whole_seconds)) == ({}, 4)
    with pytest.raises(NoProfile, match="every way of measuring"):
        profile(runtime, request_for(content, tried, avoid=tuple(everything)))


def test_an_accelerator_s_share_can_not_be_told_another_way(
    runtime: tflite.TfliteRuntime, request_for: Callable[..., ProfileRequest], edgetpu_standin: Path
) -> None:
    request = request_for(
        models.tflite_affine(),
        [],
        avoid=(tflite_profile.IN_TURN,),
        options={"delegate": str(edgetpu_standin), "delegate.claim": "ops", "delegate.nodes": "0"},
    )
    with pytest.raises(NoProfile, match="parts in turn ended the process"):
        profile(runtime, request)


def test_copies_of_the_model_have_a_bound(
    runtime: tflite.TfliteRuntime,
    request_for: Callable[..., ProfileRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = models.tflite_affine()
    monkeypatch.setattr(tflite_profile, "MOST_COPIED_BYTES", len(content) - 1)
    with pytest.raises(NoProfile, match=f"1 copies of {len(content)} bytes"):
        profile(runtime, request_for(content, []))


def test_nothing_is_left_behind(
    runtime: tflite.TfliteRuntime,
    request_for: Callable[..., ProfileRequest],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import tempfile

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    profile(runtime, request_for(models.tflite_affine(), []))
    assert list(scratch.iterdir()) == []
