"""/metrics: the golden exposition, what is left out and why, and the bounds on strangers' text."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from boardbench.collector import native
from boardbench.collector.expose import OPENMETRICS, PROTOBUF, TEXT, Exposition, choose
from boardbench.collector.fleet import Tally
from boardbench.collector.look import DeviceView, ForwardView, QueueView, RetentionView, Snapshot
from boardbench.collector.metrics import LABELS, METRICS
from boardbench.collector.samples import result_group
from boardbench.collector.store import LatestResult, LatestResults, News, Outcomes
from boardbench.v1 import board_pb2, collector_pb2, placement_pb2, result_pb2, scenario_pb2, telemetry_pb2

MakeResult = Callable[..., result_pb2.RunResult]
MakeHello = Callable[..., collector_pb2.Hello]

GOLDEN = Path(__file__).parent.parent / "golden" / "collector-metrics.txt"
NOW = 1_800_000_100.0

READINGS = (
    ("temperature_celsius", "cpu-thermal", 61.5),
    ("frequency_hertz", "policy0", 2.4e9),
    ("frequency_limit_hertz", "policy0", 2.4e9),
    ("power_watts", "VDD_IN", 6.25),
    ("busy_ratio", "gpu", 0.5),
    ("throttled_now", "soc:firmware", 0),
    ("undervoltage_now", "soc:firmware", 1),
    ("undervoltage_since_boot", "soc:firmware", 1),
    ("throttle_events", "package0", 4),
    ("memory_available_bytes", "", 1e9),
)
"""As a board has them, and two that are not shown."""

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def snapshot(
    results: list[result_pb2.RunResult] = [],  # noqa: B006
    *,
    devices: list[DeviceView] = [],  # noqa: B006
    left_out: dict[str, int] | None = None,
    outcomes: tuple[Outcomes, ...] = (),
    tally: Tally | None = None,
    drifts: int | None = None,
    at: float = NOW,
    **more: Any,
) -> Snapshot:
    latest = tuple(LatestResult(result.board.device_id, at - 1, result, drifts) for result in results)
    return Snapshot(
        at=at,
        devices=tuple(devices),
        latest=LatestResults(latest, left_out or {}),
        outcomes=outcomes,
        tally=tally or Tally(),
        open_streams=sum(device.up for device in devices),
        **more,
    )


def exposition(
    *, series_ttl: float = 3600, result_ttl: float = 86400, series_per_device: int = 5000, **more: Any
) -> Exposition:
    return Exposition(
        version="0.1.0",
        python="3.11.0",
        series_ttl_seconds=series_ttl,
        result_ttl_seconds=result_ttl,
        series_per_device=series_per_device,
        **{"monotonic": lambda: 0.0, **more},
    )


def take(fleet: Exposition, shown: Snapshot) -> None:
    """Does what a scrape does, with the samples that the results themselves have."""
    samples = {
        entry.result.run_id: entry.result.latency.samples_nanoseconds for entry in shown.latest.results
    }
    fleet.shapes({run_id: samples[run_id] for run_id in fleet.shapeless(shown.latest.results)})
    fleet.take(shown)
    fleet.own(shown, fleet.settle(), store_seconds=0.125, seconds=0.25)


def expose(shown: Snapshot, content_type: str = TEXT, **settings: Any) -> str:
    fleet = exposition(**settings)
    take(fleet, shown)
    return fleet.page(content_type).decode()


def series(text: str, name: str | None = None) -> list[tuple[dict[str, str], float]]:
    """Returns (labels, value) of every sample, or of those with the name."""
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if name is None or sample.name == name
    ]


def test_a_load_from_a_cache_is_another_quantity_than_a_first_one(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    result = make_result()
    result.create_seconds, result.first_inference_seconds = 0.5, 0.1
    cold = names(expose(snapshot([result], devices=[board()])))
    assert {"boardbench_create_seconds", "boardbench_first_inference_seconds"} <= cold
    assert not {name for name in cold if "from_cache" in name}
    result.caches.add(name="compiled blobs", warm=True)
    warm = expose(snapshot([result], devices=[board()]))
    assert "boardbench_create_seconds" not in names(warm)
    assert "boardbench_first_inference_seconds" not in names(warm)
    assert [value for _, value in series(warm, "boardbench_create_from_cache_seconds")] == [0.5]
    assert [value for _, value in series(warm, "boardbench_first_inference_from_cache_seconds")] == [0.1]


def names(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.fixture
def board(make_hello: MakeHello) -> Callable[..., DeviceView]:
    def make(device_id: str = "pi5", **more: Any) -> DeviceView:
        facts: dict[str, Any] = {
            "up": True,
            "last_seen_at": NOW - 2,
            "first_seen_at": NOW - 1000,
            "clock_offset_seconds": 0.25,
            "heartbeat": collector_pb2.Heartbeat(
                spool_pending=3,
                spool_dropped=2,
                running_run_id="run-9",
                queued_runs=1,
                spool_bytes=8192,
                readings=[
                    telemetry_pb2.Reading(quantity=quantity, source=source, value=value)
                    for quantity, source, value in READINGS
                ],
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
    result.create_seconds, result.first_inference_seconds = 0.8, 0.05
    result.caches.add(name="compiled blobs", warm=True)
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
    environment.cpu_frequency_hertz, environment.cpu_frequency_least_hertz = 1.8e9, 1.5e9
    environment.throttling_readable = True
    environment.throttled_during.append("under-voltage")
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
    for seconds in (0.0004, 0.002, 0.002, 99):
        tally.acknowledge.add(seconds)
    return snapshot(
        [unknown, make_result("run-1"), costly(), sustained()],
        drifts=2,
        devices=[board("pi4", up=False, heartbeat=None, last_seen_at=NOW - 300), board("pi5")],
        left_out={"pi5": 7},
        outcomes=(Outcomes("pi4", 1, 1), Outcomes("pi5", 1, 3), Outcomes("pi5", 2, 1), Outcomes("pi5", 9, 1)),
        tally=tally,
        queue=QueueView({"queued": 4, "running": 1}, 12.5, 2, 1, 1 << 20),
        forwarded=(
            ForwardView("victoria:8428", 1000, {"too_old": 3}, 2, True, 7),
            ForwardView("mimir:9009", 0, {}, 0, None, 9),
        ),
        retention=RetentionView(40, 3, 123_456, 1 << 20),
        certificate_ends_at=NOW + 30 * 86400,
    )


def test_golden_exposition(whole: Snapshot) -> None:
    """After a wanted change: BOARDBENCH_WRITE_GOLDEN=1, run, read the difference, commit it."""
    if os.environ.get("BOARDBENCH_WRITE_GOLDEN"):
        GOLDEN.write_text(expose(whole))
    assert expose(whole) == GOLDEN.read_text()


def test_promtool_finds_nothing_to_complain_about(
    whole: Snapshot, find_program: Callable[[str], str]
) -> None:
    body = expose(whole).encode()
    check = subprocess.run(
        [find_program("promtool"), "check", "metrics"], input=body, capture_output=True, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, b"", b"")


def test_the_table_and_reality_are_the_same(whole: Snapshot) -> None:
    text = expose(whole)
    table = {metric.name: metric for metric in METRICS}
    assert len(table) == len(METRICS)
    samples = {name: metric for metric in METRICS for name in metric.samples}
    assert names(text) == set(samples), "the golden snapshot has something of everything"
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(samples[sample.name].labels)
            assert ("le" in sample.labels) == sample.name.endswith("_bucket")
        metric = samples[family.samples[0].name]
        assert family.documentation == metric.meaning
        assert family.type == ("gauge" if metric.kind == "info" else metric.kind)
    used = {label for metric in METRICS for label in metric.labels}
    assert used == set(LABELS)


def test_openmetrics_on_request(whole: Snapshot) -> None:
    text = expose(whole, OPENMETRICS)
    assert "# TYPE boardbench_device info\n" in text
    assert "# TYPE boardbench_runs counter\n" in text
    assert choose("application/openmetrics-text; version=1.0.0") == OPENMETRICS


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/plain;version=0.0.4", TEXT),
        ("text/plain;version=0.0.4;q=0.2,application/openmetrics-text;version=1.0.0;q=0.8", OPENMETRICS),
        ("application/openmetrics-text;q=0, text/plain", TEXT),
        ("application/openmetrics-text;version=2.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", TEXT),
        (
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited,"
            "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            PROTOBUF,
        ),
        ("application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text", TEXT),
        ("application/openmetrics-text;q=much", TEXT),
        ("application/openmetrics-text;q=0", TEXT),
    ],
)
def test_the_accept_header_chooses_the_format(accept: str, chosen: str) -> None:
    assert choose(accept) == chosen


def reference(fleet: Exposition) -> CollectorRegistry:
    """The same samples, in prometheus_client's own hands."""
    samples = list(fleet.series())
    families = []
    for metric in METRICS:
        mine = [sample for sample in samples if sample[0] in metric.samples]
        if mine:
            family = Metric(metric.base_name, metric.meaning, metric.kind)
            for name, labels, value in mine:
                family.add_sample(name, labels, value)
            families.append(family)

    class Registered(Collector):
        def collect(self) -> list[Metric]:
            return families

    registry = CollectorRegistry()
    registry.register(Registered())
    return registry


def parsed(families: Iterable[Metric]) -> dict[str, Any]:
    """Everything that a parser finds: names, types, meanings, and samples as sets."""
    found = {}
    for family in families:
        samples = [(sample.name, frozenset(sample.labels.items()), sample.value) for sample in family.samples]
        assert len(samples) == len(set(samples))
        found[family.name] = (family.type, family.documentation, frozenset(samples))
    return found


def test_the_text_is_what_prometheus_client_would_write(whole: Snapshot) -> None:
    fleet = exposition()
    take(fleet, whole)
    mine = parsed(text_string_to_metric_families(fleet.page(TEXT).decode()))
    theirs = parsed(text_string_to_metric_families(generate_latest(reference(fleet)).decode()))
    assert len(mine) == len(METRICS)
    assert mine == theirs


def test_openmetrics_is_what_prometheus_client_would_write(whole: Snapshot) -> None:
    fleet = exposition()
    take(fleet, whole)
    mine = parsed(openmetrics_families(fleet.page(OPENMETRICS).decode() + "# EOF\n"))
    theirs = parsed(openmetrics_families(generate_openmetrics(reference(fleet)).decode()))
    assert len(mine) == len(METRICS)
    assert mine == theirs


def test_hostile_text_is_what_prometheus_client_would_write(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    models = [
        "100% %s %r %(x)s %%",
        'q"\\\\n\\',
        "\0\1\2\n",
        "模型" * 90,
        "{}",
        "\N{LINE SEPARATOR}",
        "a" * 500,
    ]
    results = [make_result(model=model) for model in models]
    for result, text in zip(results, models, strict=True):
        result.spec.options[text or "x"] = text
        result.model.format = text
    views = [board(), board('device "%d"\\')]
    views[0].hello.board.hostname = "%s\0"
    views[0].heartbeat.readings.add(quantity="temperature_celsius", source='%r"', value=1)
    fleet = exposition()
    take(fleet, snapshot(results, devices=views))
    text = fleet.page(TEXT).decode()
    assert len(series(text, "boardbench_model_info")) == len(models)
    theirs = generate_latest(reference(fleet)).decode()
    assert parsed(text_string_to_metric_families(text)) == parsed(text_string_to_metric_families(theirs))
    openmetrics = fleet.page(OPENMETRICS).decode() + "# EOF\n"
    theirs = generate_openmetrics(reference(fleet)).decode()
    assert parsed(openmetrics_families(openmetrics)) == parsed(openmetrics_families(theirs))


def test_a_result_that_can_not_be_shown_hides_no_other(
    make_result: MakeResult,
    board: Callable[..., DeviceView],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(entry: LatestResult, shape: Any) -> Any:
        if entry.result.run_id == "bad":
            raise OverflowError("nobody has thought of this")
        return result_group(entry, shape)

    monkeypatch.setattr("boardbench.collector.expose.result_group", broken)
    text = expose(snapshot([make_result("good"), make_result("bad", model="b")], devices=[board()]))
    assert [labels["model"] for labels, _ in series(text, "boardbench_latency_samples")] == [
        "mobilenet.tflite"
    ]
    assert [value for _, value in series(text, "boardbench_device_results_left_out")] == [1]
    assert "device pi5, run bad: not shown" in caplog.text


def in_protobuf(page: bytes) -> dict[bytes, list[bytes]]:
    """The metrics of every family by its name, each as it is written, in no order that matters."""

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = page[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    found: dict[bytes, list[bytes]] = {}
    at = 0
    while at < len(page):
        size = varint()
        end = at + size
        fields: dict[int, list[bytes]] = {}
        while at < end:
            key, value = varint(), varint()
            if key & 7 == 2:
                fields.setdefault(key >> 3, []).append(page[at : at + value])
                at += value
        (name,) = fields[1]
        found[name] = sorted(fields[4])
    found.pop(b"boardbench_collector_scrapes_total")
    return found


def test_after_any_change_the_page_is_as_if_it_were_new(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    """Boards come, change, go and come back in random order; what is kept never shows."""
    random = Random(7)
    fleet = exposition(series_ttl=60, series_per_device=150)
    names_ = [f"board-{n}" for n in range(40)]
    state: dict[str, DeviceView] = {}
    results: dict[str, list[result_pb2.RunResult]] = {}
    at = NOW
    for step in range(60):
        at += random.choice((1, 5, 50))
        news: set[str] = set()
        for name in random.sample(names_, 6):
            up = random.random() < 0.6
            view = board(name, up=up, last_seen_at=at - random.choice((0, 0, 59, 61)))
            view.heartbeat.running_run_id = random.choice(("", "run"))
            if random.random() < 0.2:
                view.hello.agent_version = f"0.{step}"
            state[name] = view
        for name in random.sample(sorted(state), 3):
            mine = results.setdefault(name, [])
            result = make_result(
                f"{name}-{step}", device_id=name, model=f"m{random.randrange(3)}", p50=0.001 * step + 0.001
            )
            if random.random() < 0.3:
                result.ClearField("memory")
            results[name] = [result, *(other for other in mine if other.model.name != result.model.name)]
            news.add(name)
        views = [state[name] for name in sorted(state)]
        wanted = fleet.wanted(views, News(step + 1, frozenset(news)), at)
        read = [result for name in sorted(wanted) for result in results.get(name, ())]
        take(fleet, snapshot(read, devices=views, at=at, read=wanted))
        if step % 5 == 0:
            fresh = exposition(series_ttl=60, series_per_device=150)
            everything = [result for name in sorted(results) for result in results[name]]
            take(fresh, snapshot(everything, devices=views, at=at))
            for page in (TEXT, OPENMETRICS):
                kept, new = (
                    sorted(
                        line for line in one.page(page).decode().splitlines() if "scrapes_total" not in line
                    )
                    for one in (fleet, fresh)
                )
                assert kept == new, f"step {step}"
            pages = [in_protobuf(one.page(PROTOBUF)) for one in (fleet, fresh)]
            assert pages[0] == pages[1], f"step {step}"


def test_the_distribution_of_the_latest_run_may_fall_and_that_of_acknowledgements_not() -> None:
    # io.prometheus.client.MetricType: HISTOGRAM is 4, GAUGE_HISTOGRAM is 5; without metrics it comes last.
    kinds = {metric.name: native.family(metric, b"")[-1] for metric in METRICS if metric.kind == "histogram"}
    assert kinds == {
        "boardbench_latency_distribution_seconds": 5,
        "boardbench_collector_acknowledge_seconds": 4,
    }


def test_a_distribution_that_only_differs_in_its_finest_part_is_written_anew(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    fleet, fresh = exposition(), exposition()
    first, second = make_result("run-1", samples=2), make_result("run-2", samples=2)
    first.latency.samples_nanoseconds[:] = [1_500_000, 1_500_000]
    # The same sum, and the same classic buckets.
    second.latency.samples_nanoseconds[:] = [1_400_000, 1_600_000]
    take(fleet, snapshot([first], devices=[board()]))
    assert fleet.page(PROTOBUF)
    for one in (fleet, fresh):
        take(one, snapshot([second], devices=[board()]))
    assert in_protobuf(fleet.page(PROTOBUF)) == in_protobuf(fresh.page(PROTOBUF))


def test_only_what_has_changed_is_written_anew(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    fleet = exposition()
    views = [board(f"board-{n}") for n in range(3)]
    results = [make_result(f"run-{n}", device_id=f"board-{n}") for n in range(3)]
    take(fleet, snapshot(results, devices=views))
    (segment,) = fleet._segments
    before = dict(segment.text)
    views[1] = board("board-1", last_seen_at=NOW - 1)
    take(fleet, snapshot([], devices=views, read=frozenset()))
    changed = {METRICS[family].name for family, text in segment.text.items() if text is not before[family]}
    assert changed == {"boardbench_device_last_seen_timestamp_seconds"}


def test_results_that_are_too_old_are_read_again_and_vanish(
    make_result: MakeResult, board: Callable[..., DeviceView]
) -> None:
    fleet = exposition(result_ttl=100)
    nothing = News(1, frozenset())
    assert fleet.wanted([board()], nothing, NOW) == {"pi5"}
    take(fleet, snapshot([make_result()], devices=[board()]))
    assert fleet.wanted([board()], nothing, NOW + 98) == frozenset()
    assert fleet.wanted([board()], nothing, NOW + 100) == {"pi5"}
    take(fleet, snapshot([], devices=[board()], read=frozenset({"pi5"}), at=NOW + 100))
    assert "boardbench_latency" not in fleet.page(TEXT).decode()


def test_every_board_is_read_again_now_and_then(board: Callable[..., DeviceView]) -> None:
    clock = [0.0]
    fleet = exposition(monotonic=lambda: clock[0])
    views = [board(f"board-{n:02}") for n in range(40)]
    take(fleet, snapshot(devices=views))
    seen: set[str] = set()
    clock[0] = 601.0
    for _ in range(14):
        wanted = fleet.wanted(views, News(0, frozenset()), NOW)
        assert len(wanted) <= 3
        seen |= wanted
        take(fleet, snapshot(devices=views, read=wanted))
    assert len(seen) == 40


def test_samples_are_read_a_part_at_a_time_and_none_is_forgotten(
    make_result: MakeResult, board: Callable[..., DeviceView], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("boardbench.collector.expose._SHAPES_PER_SCRAPE", 2)
    fleet = exposition()
    results = [make_result(f"run-{n}", model=f"m{n}") for n in range(5)]
    shown = []
    for _ in range(3):
        if fleet.wanted([board()], News(0, frozenset()), NOW):
            take(fleet, snapshot(results, devices=[board()]))
        shown.append(len(series(fleet.page(TEXT).decode(), "boardbench_latency_distribution_seconds_count")))
    assert shown == [2, 4, 5]
    assert not fleet.wanted([board()], News(0, frozenset()), NOW)


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
        "boardbench_device_series_left_out",
        "boardbench_device_labels_cut",
        "boardbench_result_validity_info",
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
    # Each of the places where it can stand is enough.
    placed, driven = make_result(model="placed"), make_result(model="driven")
    placed.placement.standin = True
    driven.accelerator.standin = True
    for each in (placed, driven):
        ((_, told),) = series(expose(snapshot([each], devices=[board()])), "boardbench_result_standin")
        assert told == 1


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
