"""/metrics: the golden exposition, what is left out and why, and the bounds on strangers' text."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from boardbench.collector.expose import LABELS, METRICS, FleetCollector, process_collector, render
from boardbench.collector.fleet import Tally
from boardbench.collector.look import DeviceView, Snapshot
from boardbench.collector.store import LatestResult, LatestResults, Outcomes
from boardbench.v1 import board_pb2, collector_pb2, placement_pb2, result_pb2, scenario_pb2

MakeResult = Callable[..., result_pb2.RunResult]
MakeHello = Callable[..., collector_pb2.Hello]

GOLDEN = Path(__file__).parent.parent / "golden" / "collector-metrics.txt"
NOW = 1_800_000_100.0

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def snapshot(
    results: list[result_pb2.RunResult] = [],  # noqa: B006
    *,
    devices: list[DeviceView] = [],  # noqa: B006
    left_out: dict[str, int] | None = None,
    outcomes: tuple[Outcomes, ...] = (),
    tally: Tally | None = None,
    drifts: int | None = None,
) -> Snapshot:
    latest = tuple(LatestResult(result.board.device_id, NOW - 1, result, drifts) for result in results)
    return Snapshot(
        at=NOW,
        devices=tuple(devices),
        latest=LatestResults(latest, left_out or {}),
        outcomes=outcomes,
        tally=tally or Tally(),
        open_streams=sum(device.up for device in devices),
    )


def expose(shown: Snapshot, *, series_ttl: float = 3600, series_per_device: int = 5000) -> str:
    fleet = FleetCollector(
        shown,
        version="0.1.0",
        python="3.11.0",
        series_ttl_seconds=series_ttl,
        series_per_device=series_per_device,
        seconds_before=0.25,
        monotonic=lambda: 0.0,
    )
    body, content_type = render((fleet,), accept="")
    assert content_type.startswith("text/plain; version=0.0.4")
    return body.decode()


def series(text: str, name: str | None = None) -> list[tuple[dict[str, str], float]]:
    """Returns (labels, value) of every sample, or of those with the name."""
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if name is None or sample.name == name
    ]


def names(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.fixture
def board(make_hello: MakeHello) -> Callable[..., DeviceView]:
    def make(device_id: str = "pi5", **more: Any) -> DeviceView:
        facts: dict[str, Any] = {
            "up": True,
            "last_seen_at": NOW - 2,
            "first_seen_at": NOW - 1000,
            "heartbeat": collector_pb2.Heartbeat(
                spool_pending=3, spool_dropped=2, running_run_id="run-9", queued_runs=1
            ),
        }
        return DeviceView(hello=make_hello(device_id), **(facts | more))

    return make


def costly() -> result_pb2.RunResult:
    """A run of which nothing is known but that ops fell back, and what it cost."""
    result = result_pb2.RunResult(run_id="run-3", status=result_pb2.RUN_STATUS_SUCCEEDED)
    result.board.device_id, result.model.name, result.model.sha256 = "pi5", "deeplab.tflite", "beef" * 16
    result.runtime.name, result.runtime.device = "tflite", "edgetpu"
    placement = result.placement
    placement.evidence = placement_pb2.EVIDENCE_PARTITION
    placement.verdict = placement_pb2.PLACEMENT_VERDICT_PARTLY
    placement.units.add(unit=placement_pb2.UNIT_TPU, ops=64)
    placement.units.add(unit=placement_pb2.UNIT_CPU, ops=8)
    cost = placement.fallback_cost
    cost.share, cost.share_low, cost.share_high = 0.34, 0.31, 0.37
    cost.seconds, cost.latency_without_seconds = 0.0041, 0.008
    placement.crossings.count, placement.crossings.bytes = 2, 110_592
    return result


def sustained() -> result_pb2.RunResult:
    """A long run on a board with a power rail that got hot, measured beside another and by two processes."""
    result = result_pb2.RunResult(run_id="run-4", status=result_pb2.RUN_STATUS_SUCCEEDED)
    result.board.device_id, result.model.name, result.model.sha256 = "pi5", "video.tflite", "cafe" * 16
    result.runtime.name, result.runtime.device = "tflite", "cpu"
    result.spec.scenario.kind = scenario_pb2.SCENARIO_KIND_PERIODIC
    result.spec.scenario.rate_hertz = 30
    result.validity = result_pb2.VALIDITY_INVALID
    result.warnings.add(code="throttled", severity=result_pb2.SEVERITY_INVALID)
    result.warnings.add(code="throttled_before", severity=result_pb2.SEVERITY_NOTE)
    energy = result.energy
    energy.mean_watts, energy.idle_watts, energy.energy_per_inference_joules = 6.4, 2.8, 0.0056
    energy.energy_per_inference_low_joules, energy.energy_per_inference_high_joules = 0.0055, 0.0057
    scenario = result.scenario
    scenario.throughput_hertz, scenario.throughput_low_hertz, scenario.throughput_high_hertz = 29.98, 29.9, 30
    scenario.deadline_misses, scenario.slowdown_ratio = 3, 1.31
    result.interference.slowdown_ratio, result.processes.spread_ratio = 1.25, 0.006
    environment = result.environment
    environment.temperature_before_celsius, environment.temperature_after_celsius = 46, 82
    environment.cpu_frequency_hertz = 1.8e9
    return result


@pytest.fixture
def whole(make_result: MakeResult, board: Callable[..., DeviceView]) -> Snapshot:
    """Two boards, one gone; a known, an unknown and a costly placement; something of everything."""
    unknown = make_result(
        "run-2", device_id="pi4", model="net.onnx", sha256="feed" * 16, runtime="onnxruntime"
    )
    unknown.placement.Clear()
    unknown.ClearField("warnings")
    unknown.spec.options["intra_op"] = "2"
    tally = Tally(stored=5, duplicates=2, store_failures=1, streams=3, superseded=1, silent=1)
    tally.refused.update({"run_id": 1, "too_large": 2})
    return snapshot(
        [unknown, make_result("run-1"), costly(), sustained()],
        drifts=2,
        devices=[board("pi4", up=False, heartbeat=None, last_seen_at=NOW - 300), board("pi5")],
        left_out={"pi5": 7},
        outcomes=(Outcomes("pi4", 1, 1), Outcomes("pi5", 1, 3), Outcomes("pi5", 2, 1), Outcomes("pi5", 9, 1)),
        tally=tally,
    )


def test_golden_exposition(whole: Snapshot) -> None:
    """After a wanted change: BOARDBENCH_WRITE_GOLDEN=1, run, read the difference, commit it."""
    if os.environ.get("BOARDBENCH_WRITE_GOLDEN"):
        GOLDEN.write_text(expose(whole))
    assert expose(whole) == GOLDEN.read_text()


def test_promtool_finds_nothing_to_complain_about(
    whole: Snapshot, find_program: Callable[[str], str]
) -> None:
    fleet = FleetCollector(whole, version="0.1.0", series_ttl_seconds=3600, series_per_device=5000)
    body, _ = render((fleet, process_collector()), accept="")
    check = subprocess.run(
        [find_program("promtool"), "check", "metrics"], input=body, capture_output=True, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, b"", b"")


def test_the_table_and_reality_are_the_same(whole: Snapshot) -> None:
    text = expose(whole)
    table = {metric.name: metric for metric in METRICS}
    assert len(table) == len(METRICS)
    assert names(text) == set(table), "the golden snapshot has something of everything"
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert set(sample.labels) == set(table[sample.name].labels)
        metric = table[family.samples[0].name]
        assert family.documentation == metric.meaning
        assert family.type == ("gauge" if metric.kind == "info" else metric.kind)
    used = {label for metric in METRICS for label in metric.labels}
    assert used == set(LABELS)


def test_openmetrics_on_request(whole: Snapshot) -> None:
    fleet = FleetCollector(whole, version="0.1.0", series_ttl_seconds=3600, series_per_device=5000)
    body, content_type = render((fleet,), accept="application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert b"# TYPE boardbench_device info\n" in body


def test_unknown_placement_is_told_and_never_shown_as_numbers(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    absent, units_unknown, no_evidence, verdict_only = (
        make_result(model=name) for name in ("absent", "units", "evidence", "verdict")
    )
    absent.ClearField("placement")
    del units_unknown.placement.units[:]
    units_unknown.placement.units.add(unit=placement_pb2.UNIT_UNSPECIFIED, ops=31)
    no_evidence.placement.evidence = placement_pb2.EVIDENCE_UNSPECIFIED
    no_evidence.placement.verdict = placement_pb2.PLACEMENT_VERDICT_UNSPECIFIED
    verdict_only.placement.Clear()
    verdict_only.placement.evidence = placement_pb2.EVIDENCE_COUNTERS
    verdict_only.placement.verdict = placement_pb2.PLACEMENT_VERDICT_ACCELERATED
    text = expose(snapshot([absent, units_unknown, no_evidence, verdict_only], devices=[board()]))
    known = series(text, "boardbench_placement_known")
    assert [(labels["model"], value) for labels, value in known] == [
        ("absent", 0),
        ("units", 0),
        ("evidence", 0),
        ("verdict", 0),
    ]
    assert not series(text, "boardbench_ops")
    info = {
        (labels["model"], labels["verdict"], labels["evidence"])
        for labels, _ in series(text, "boardbench_placement_info")
    }
    assert info == {
        ("units", "not_accelerated", "partition"),
        ("verdict", "accelerated", "counters"),
    }


def test_what_is_absent_has_no_series(make_result: MakeResult, board: Callable[..., DeviceView]) -> None:
    bare = result_pb2.RunResult(run_id="run-1", status=result_pb2.RUN_STATUS_SUCCEEDED)
    bare.board.device_id, bare.model.name = "pi5", "m"
    view = DeviceView(
        hello=collector_pb2.Hello(board=board_pb2.Board(device_id="pi5")),
        up=True,
        last_seen_at=NOW,
        first_seen_at=NOW,
        heartbeat=None,
    )
    text = expose(snapshot([bare], devices=[view]))
    assert {name for name in names(text) if not name.startswith("boardbench_collector")} == {
        "boardbench_placement_known",
        "boardbench_result_warnings",
        "boardbench_result_standin",
        "boardbench_model_info",
        "boardbench_device_up",
        "boardbench_device_last_seen_timestamp_seconds",
        "boardbench_device_info",
        "boardbench_agent_info",
        "boardbench_device_results_left_out",
    }


def test_drifts_have_a_series_once_a_placement_was_known(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    text = expose(snapshot([make_result()], devices=[board()], drifts=0))
    assert [value for _, value in series(text, "boardbench_placement_drifts_total")] == [0]
    assert "boardbench_placement_drifts_total" not in expose(snapshot([make_result()], devices=[board()]))


def test_bytes_that_are_not_told_are_not_zero(board: Callable[..., DeviceView]) -> None:
    result = costly()
    result.placement.crossings.ClearField("bytes")
    result.placement.ClearField("fallback_cost")
    shown = names(expose(snapshot([result], devices=[board()])))
    assert "boardbench_crossings" in shown
    assert not {name for name in shown if "crossing_bytes" in name or "fallback" in name}


def test_a_figure_that_is_no_number_is_left_out(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    result = make_result()
    result.latency.mean_seconds = float("nan")
    result.latency.max_seconds = float("inf")
    text = expose(snapshot([result], devices=[board()]))
    assert "boardbench_latency_mean_seconds" not in names(text)
    assert "boardbench_latency_max_seconds" not in names(text)
    assert "boardbench_latency_min_seconds" in names(text)


def test_stand_ins_are_told(make_result: MakeResult, board: Callable[..., DeviceView]) -> None:
    real, fake = make_result(model="real"), make_result(model="fake")
    fake.standins.append("standin-edgetpu")
    fake.placement.standin = True
    text = expose(snapshot([real, fake], devices=[board()]))
    found = {labels["model"]: value for labels, value in series(text, "boardbench_result_standin")}
    assert found == {"real": 0, "fake": 1}
    placement = {
        labels["model"]: labels["standin"] for labels, _ in series(text, "boardbench_placement_info")
    }
    assert placement == {"real": "false", "fake": "true"}


def test_a_board_that_is_gone_leaves_with_everything(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    devices = [
        board("just", up=False, last_seen_at=NOW - 3600),
        board("gone", up=False, last_seen_at=NOW - 3601),
        board("still", up=True, last_seen_at=NOW - 9999),
    ]
    results = [make_result(device_id=device.device_id) for device in devices]
    outcomes = tuple(Outcomes(device.device_id, 1, 1) for device in devices)
    text = expose(snapshot(results, devices=devices, outcomes=outcomes))
    assert {labels["device"] for labels, _ in series(text) if "device" in labels} == {"just", "still"}
    assert 'device="gone"' not in text


def test_a_board_that_is_gone_measures_nothing(board: Callable[..., DeviceView]) -> None:
    text = expose(snapshot(devices=[board(up=False, last_seen_at=NOW - 10)]))
    assert series(text, "boardbench_device_up") == [({"device": "pi5"}, 0)]
    assert "boardbench_device_running" not in names(text)
    assert "boardbench_queued_runs" not in names(text)
    assert series(text, "boardbench_spool_pending") == [({"device": "pi5"}, 3)]


def test_a_board_has_a_bounded_number_of_series(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    results = [make_result(model=f"model-{n}") for n in range(10)]
    devices = [board("pi5"), board("pi4")]
    results.append(make_result(device_id="pi4"))
    one = len(
        [1 for labels, _ in series(expose(snapshot(results[:1], devices=devices))) if "model" in labels]
    )
    text = expose(
        snapshot(results, devices=devices, left_out={"pi5": 100}), series_per_device=3 * one + one // 2
    )
    shown = {labels["model"] for labels, _ in series(text, "boardbench_latency_samples")}
    assert shown == {"model-0", "model-1", "model-2", "mobilenet.tflite"}
    per_device = {
        labels["device"]: value for labels, value in series(text, "boardbench_device_results_left_out")
    }
    assert per_device == {"pi5": 107, "pi4": 0}


def test_hostile_text_stays_bounded_distinct_and_parseable(
    make_result: MakeResult, board: Callable[..., DeviceView], find_program: Callable[[str], str]
) -> None:
    models = [
        'quote " backslash \\ brace } newline \n end',
        "x" * 1000 + "1",
        "x" * 1000 + "2",
        "\x00\x1b[31m\u202e",
        "模型" * 500,
        "",
        " ",
    ]
    text = expose(snapshot([make_result(model=model) for model in models], devices=[board()]))
    shown = [labels["model"] for labels, _ in series(text, "boardbench_latency_samples")]
    assert len(set(shown)) == len(models)
    assert max(len(model) for model in shown) <= 128
    assert all(model.isprintable() for model in shown)
    check = subprocess.run(
        [find_program("promtool"), "check", "metrics"],
        input=text.encode(),
        capture_output=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr


def test_a_result_cant_repeat_itself_into_a_broken_scrape(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    result = make_result()
    for _ in range(100):
        result.latency.percentiles.add(percentile=50, seconds=1)
        result.memory.phases.add(phase=result_pb2.MEMORY_PHASE_STEADY, rss_bytes=1)
        result.placement.units.add(unit=placement_pb2.UNIT_CPU, ops=1)
    for n in range(1000):
        result.latency.percentiles.add(percentile=n / 10, seconds=1)
    # Two models whose hashes begin alike would have the same labels: the later one is shown, whole.
    twin = make_result(sha256="5ba0" * 15 + "ffff", p50=77.0)
    devices = [board()]
    devices[0].hello.runtimes.add(name="tflite", available=False)
    text = expose(snapshot([result, twin], devices=devices))
    everything = [
        (sample.name, frozenset(sample.labels.items()))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert len(everything) == len(set(everything))
    percentiles = series(text, "boardbench_latency_seconds")
    assert len(percentiles) == 32
    assert {labels["percentile"]: value for labels, value in percentiles}["50"] == 0.0125
    assert series(text, "boardbench_latency_mean_seconds")[0][1] == pytest.approx(0.0125 * 1.01)
    assert [value for labels, value in series(text, "boardbench_ops") if labels["unit"] == "cpu"] == [101]


def test_series_of_unlike_runs_are_kept_apart(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    results = [make_result() for _ in range(4)]
    results[1].effective_spec.threads = 1
    results[2].spec.options["xnnpack"] = "false"
    results[3].runtime.device = "edgetpu"
    text = expose(snapshot(results, devices=[board()]))
    found = {
        (labels["threads"], labels["variant"], labels["target"])
        for labels, _ in series(text, "boardbench_latency_samples")
    }
    assert found == {("4", "", "cpu"), ("1", "", "cpu"), ("4", "xnnpack=false", "cpu"), ("4", "", "edgetpu")}
