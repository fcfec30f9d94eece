"""The contract suite: what every store must do, over every store there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boardbench.collector.errors import (
    InvalidRequest,
    OutOfOrder,
    PlaceTaken,
    ResultRefused,
    StoreUnavailable,
)
from boardbench.collector.store import (
    LONG,
    LatestResults,
    News,
    Places,
    Position,
    Removed,
    ResultFilter,
    ResultStore,
    Series,
    Sighting,
    has_drifted,
    list_at,
    places_of,
    series_of,
    split,
)
from boardbench.collector.thinning import DROPPED, histogram, total
from boardbench.v1 import collector_pb2, placement_pb2, result_pb2, scenario_pb2

MakeResult = Callable[..., result_pb2.RunResult]
MakeHello = Callable[..., collector_pb2.Hello]


async def test_a_result_comes_back_as_it_went_in(store: ResultStore, make_result: MakeResult) -> None:
    result = make_result()
    assert await store.append("pi5", "spool-1", 1, result) is True
    assert await store.find("run-1") == (result,)
    assert (await store.results(ResultFilter(), limit=10)).results == (result,)


async def test_appending_does_not_touch_the_callers_message(
    store: ResultStore, make_result: MakeResult
) -> None:
    result = make_result()
    await store.append("pi5", "spool-1", 1, result)
    assert result == make_result()


async def test_the_same_place_in_the_spool_is_stored_once(
    store: ResultStore, make_result: MakeResult
) -> None:
    assert await store.append("pi5", "spool-1", 1, make_result("run-1")) is True
    assert await store.append("pi5", "spool-1", 1, make_result("run-1")) is False
    assert len((await store.results(ResultFilter(), limit=10)).results) == 1
    assert [outcome.total for outcome in await store.outcomes()] == [1]


async def test_another_run_in_a_place_that_was_used_is_told_and_not_swallowed(
    store: ResultStore, make_result: MakeResult
) -> None:
    await store.append("pi5", "spool-1", 1, make_result("run-1"))
    await store.append("pi5", "spool-1", 4, make_result("run-4"))
    for sequence, other in (
        (1, make_result("run-9")),
        (4, make_result("run-4", finished=1.9e9)),
        (3, make_result("run-8")),
    ):
        with pytest.raises(PlaceTaken, match=rf"device pi5, spool spool-1: .* as {sequence};"):
            await store.append("pi5", "spool-1", sequence, other)
    assert await store.acknowledged("pi5", "spool-1") == 4
    assert await store.append("pi5", "spool-2", 1, make_result("run-9")) is True
    assert await store.append("pi5", "spool-1", 5, make_result("run-5"), after=3) is True


async def test_places_count_per_device_and_spool(store: ResultStore, make_result: MakeResult) -> None:
    assert await store.append("pi5", "spool-1", 7, make_result("run-1"))
    assert await store.append("pi5", "spool-2", 1, make_result("run-2"))
    assert await store.append("pi4", "spool-1", 1, make_result("run-3"))
    assert await store.acknowledged("pi5", "spool-1") == 7
    assert await store.acknowledged("pi5", "spool-2") == 1
    assert await store.acknowledged("pi4", "spool-1") == 1
    assert await store.acknowledged("pi4", "spool-2") == 0


async def test_the_same_run_from_another_spool_is_known(store: ResultStore, make_result: MakeResult) -> None:
    assert await store.append("pi5", "spool-1", 1, make_result()) is True
    assert await store.append("pi5", "spool-2", 1, make_result()) is False
    assert await store.acknowledged("pi5", "spool-2") == 1
    assert [outcome.total for outcome in await store.outcomes()] == [1]


@pytest.mark.parametrize(("device_id", "p50"), [("pi5", 0.5), ("pi4", 0.0125)], ids=["contents", "device"])
async def test_another_result_with_a_runs_identity_is_refused_and_dealt_with(
    store: ResultStore, make_result: MakeResult, device_id: str, p50: float
) -> None:
    await store.append("pi5", "spool-1", 1, make_result())
    with pytest.raises(ResultRefused, match=r"run-1 is stored already, from device pi5") as refused:
        await store.append(device_id, "spool-2", 4, make_result(p50=p50))
    assert refused.value.code == "conflict"
    assert await store.acknowledged(device_id, "spool-2") == 4
    assert await store.append(device_id, "spool-2", 5, make_result("run-2"), after=4) is True
    assert await store.find("run-1") == (make_result(),)


async def test_a_gap_in_the_spool_is_taken_when_the_sender_made_it(
    store: ResultStore, make_result: MakeResult
) -> None:
    assert await store.append("pi5", "spool-1", 3, make_result("run-3"))
    assert await store.append("pi5", "spool-1", 9, make_result("run-9"), after=3)
    assert await store.acknowledged("pi5", "spool-1") == 9


async def test_a_result_whose_forerunner_was_lost_waits_for_it(
    store: ResultStore, make_result: MakeResult
) -> None:
    await store.append("pi5", "spool-1", 3, make_result("run-3"))
    with pytest.raises(OutOfOrder, match=r"pi5.*spool-1.*4 is not stored"):
        await store.append("pi5", "spool-1", 5, make_result("run-5"), after=4)
    assert await store.acknowledged("pi5", "spool-1") == 3
    assert await store.append("pi5", "spool-1", 4, make_result("run-4"), after=3)
    assert await store.append("pi5", "spool-1", 5, make_result("run-5"), after=4)


async def test_calls_take_effect_in_their_order(store: ResultStore, make_result: MakeResult) -> None:
    waiting = [store.append("pi5", "spool-1", n, make_result(f"run-{n}"), after=n - 1) for n in range(1, 201)]
    waiting += [store.append("pi5", "spool-1", n, make_result(f"run-{n}")) for n in range(1, 201)]
    answers = await asyncio.gather(*waiting)
    assert answers == [True] * 200 + [False] * 200


def _bad_time(result: result_pb2.RunResult) -> None:
    result.finished_at.seconds = 2**62


def _bad_nanos(result: result_pb2.RunResult) -> None:
    result.created_at.nanos = -1


def _no_run_id(result: result_pb2.RunResult) -> None:
    result.run_id = ""


def _unprintable_run_id(result: result_pb2.RunResult) -> None:
    result.run_id = "run\x001"


def _long_run_id(result: result_pb2.RunResult) -> None:
    result.run_id = "x" * 129


def _too_large(result: result_pb2.RunResult) -> None:
    result.latency.samples_nanoseconds.extend([2**40] * 20_000)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (_no_run_id, "run_id"),
        (_unprintable_run_id, "run_id"),
        (_long_run_id, "run_id"),
        (_too_large, "too_large"),
        (_bad_time, "time"),
        (_bad_nanos, "time"),
    ],
)
async def test_an_unfit_record_is_refused_at_once_and_leaves_no_trace(
    store: ResultStore,
    make_result: MakeResult,
    spoil: Callable[[result_pb2.RunResult], None],
    code: str,
) -> None:
    result = make_result()
    spoil(result)
    with pytest.raises(ResultRefused) as refused:
        store.append("pi5", "spool-1", 1, result)
    assert refused.value.code == code
    assert await store.acknowledged("pi5", "spool-1") == 0
    assert (await store.results(ResultFilter(), limit=1)).results == ()


async def test_results_come_latest_end_first_and_page_by_page(
    store: ResultStore, make_result: MakeResult
) -> None:
    ends = [50.0, 10.0, 50.0, 40.0, 20.0, 50.0, 30.0]
    for n, end in enumerate(ends, 1):
        await store.append("pi5", "spool-1", n, make_result(f"run-{n}", finished=1e9 + end))
    expected = ["run-6", "run-3", "run-1", "run-4", "run-7", "run-5", "run-2"]
    seen: list[str] = []
    position: Position | None = None
    for _ in range(10):
        page = await store.results(ResultFilter(), limit=2, after=position)
        seen += [result.run_id for result in page.results]
        # What arrives meanwhile neither shifts nor repeats anything.
        await store.append("pi5", "spool-1", 100 + len(seen), make_result(f"late-{len(seen)}", finished=2e9))
        position = page.next
        if position is None:
            break
    assert seen == expected


async def test_a_full_last_page_is_known_to_be_the_last(store: ResultStore, make_result: MakeResult) -> None:
    for n in (1, 2):
        await store.append("pi5", "spool-1", n, make_result(f"run-{n}"))
    assert (await store.results(ResultFilter(), limit=2)).next is None
    assert (await store.results(ResultFilter(), limit=1)).next is not None


async def test_a_page_ends_before_it_gets_too_large_but_is_never_empty(
    store: ResultStore, make_result: MakeResult
) -> None:
    for n in (1, 2, 3):
        await store.append("pi5", "spool-1", n, make_result(f"run-{n}", samples=1000))
    size = make_result(samples=1000).ByteSize()
    page = await store.results(ResultFilter(), limit=10, max_bytes=2 * size + 100)
    assert (len(page.results), page.next is None) == (2, False)
    page = await store.results(ResultFilter(), limit=10, max_bytes=1)
    assert (len(page.results), page.next is None) == (1, False)


async def test_a_summary_lacks_the_two_long_lists_and_nothing_else(
    store: ResultStore, make_result: MakeResult
) -> None:
    await store.append("pi5", "spool-1", 1, make_result())
    (summary,) = (await store.results(ResultFilter(), limit=1, summary=True)).results
    expected = make_result()
    del expected.latency.samples_nanoseconds[:]
    del expected.placement.ops[:]
    assert summary == expected


@pytest.mark.parametrize(
    ("wanted", "runs"),
    [
        (ResultFilter(), "a b c d"),
        (ResultFilter(device_id="pi5"), "a c d"),
        (ResultFilter(device_id="nobody"), ""),
        (ResultFilter(model="mobilenet.tflite"), "a b"),
        (ResultFilter(model="mobilenet"), ""),
        (ResultFilter(model="5ba0"), "a b"),
        (ResultFilter(model="5BA05"), "a b"),
        (ResultFilter(model="feed" * 16), "c d"),
        (ResultFilter(model="fee1"), ""),
        (ResultFilter(model="%"), ""),
        (ResultFilter(runtime="onnxruntime"), "c d"),
        (ResultFilter(status=result_pb2.RUN_STATUS_FAILED), "d"),
        (ResultFilter(since_microseconds=1_000_000_002_000_000), "c d"),
        (ResultFilter(since_microseconds=1_000_000_002_000_001), "d"),
        (ResultFilter(device_id="pi5", runtime="onnxruntime", status=result_pb2.RUN_STATUS_SUCCEEDED), "c"),
    ],
)
async def test_filters(store: ResultStore, make_result: MakeResult, wanted: ResultFilter, runs: str) -> None:
    onnx = {"model": "net.onnx", "sha256": "feed" * 16, "runtime": "onnxruntime"}
    failed = {"status": result_pb2.RUN_STATUS_FAILED}
    await store.append("pi5", "spool-1", 1, make_result("a", finished=1e9))
    await store.append("pi4", "spool-1", 1, make_result("b", finished=1e9 + 1))
    await store.append("pi5", "spool-1", 2, make_result("c", finished=1e9 + 2, **onnx))
    await store.append("pi5", "spool-1", 3, make_result("d", finished=1e9 + 3, **onnx, **failed))
    page = await store.results(wanted, limit=10)
    assert " ".join(sorted(result.run_id for result in page.results)) == runs


async def test_a_page_without_room_is_no_question(store: ResultStore) -> None:
    with pytest.raises(InvalidRequest):
        await store.results(ResultFilter(), limit=0)


async def test_a_run_is_found_by_its_first_digits(store: ResultStore, make_result: MakeResult) -> None:
    for n, run_id in enumerate(("ab", "abc", "abd", "b%", "b_1"), 1):
        await store.append("pi5", "spool-1", n, make_result(run_id))

    async def find(run_id: str) -> list[str]:
        return [result.run_id for result in await store.find(run_id)]

    assert await find("ab") == ["ab"], "a whole name comes before names that begin with it"
    assert await find("abc") == ["abc"]
    assert await find("a") == ["ab", "abc"]
    assert await find("b%") == ["b%"]
    assert await find("b_") == ["b_1"]
    assert await find("%") == []
    assert await find("zz") == []


async def test_the_latest_result_of_each_series_is_kept_ready(
    store: ResultStore, make_result: MakeResult
) -> None:
    failed = result_pb2.RUN_STATUS_FAILED
    # The clock of a board may go back: what it reported last is the latest.
    await store.append("pi5", "spool-1", 1, make_result("old", finished=2e9, p50=0.1))
    await store.append("pi5", "spool-1", 2, make_result("new", finished=1e9, p50=0.2))
    await store.append("pi5", "spool-1", 3, make_result("failed", status=failed))
    await store.append("pi5", "spool-1", 4, make_result("other", sha256="feed" * 16))
    await store.append("pi4", "spool-1", 1, make_result("pi4"))
    latest = await store.latest(received_since=0, per_device=10)
    found = [(entry.device_id, entry.result.run_id) for entry in latest.results]
    assert found == [("pi4", "pi4"), ("pi5", "other"), ("pi5", "new")]
    assert not latest.left_out
    assert not latest.results[0].result.latency.samples_nanoseconds
    assert not latest.results[0].result.placement.ops


async def test_the_latest_results_are_bounded_by_age_and_number(
    store: ResultStore, make_result: MakeResult
) -> None:
    for n in range(1, 6):
        await store.append("pi5", "spool-1", n, make_result(f"run-{n}", model=f"model-{n}"))
    await store.append("pi4", "spool-1", 1, make_result("pi4"))
    latest = await store.latest(received_since=0, per_device=2)
    assert [entry.result.run_id for entry in latest.results] == ["pi4", "run-5", "run-4"]
    assert latest.left_out == {"pi5": 3}
    newest = max(entry.received_at for entry in latest.results)
    assert (await store.latest(received_since=newest + 1, per_device=2)).results == ()


async def test_outcomes_are_counted_per_board_and_ending(store: ResultStore, make_result: MakeResult) -> None:
    await store.append("pi5", "spool-1", 1, make_result("a"))
    await store.append("pi5", "spool-1", 2, make_result("b"))
    await store.append("pi5", "spool-1", 3, make_result("c", status=result_pb2.RUN_STATUS_CANCELLED))
    await store.append("pi4", "spool-1", 1, make_result("d", status=77))
    found = [(outcome.device_id, outcome.status, outcome.total) for outcome in await store.outcomes()]
    assert found == [("pi4", 77, 1), ("pi5", 1, 2), ("pi5", 3, 1)]


async def test_boards_are_known_from_their_hello_on(store: ResultStore, make_hello: MakeHello) -> None:
    await store.saw([Sighting("pi5", 50.0)])
    assert await store.devices() == ()
    await store.greet(make_hello("pi5"), 100.0)
    await store.greet(make_hello("pi4"), 101.0)
    first, second = await store.devices()
    assert (first.device_id, second.device_id) == ("pi4", "pi5")
    assert (second.hello, second.first_seen_at, second.last_seen_at) == (make_hello("pi5"), 100.0, 100.0)
    assert second.heartbeat is None


async def test_a_board_that_comes_back_keeps_its_first_day(store: ResultStore, make_hello: MakeHello) -> None:
    await store.greet(make_hello("pi5"), 100.0)
    heartbeat = collector_pb2.Heartbeat(spool_pending=3)
    await store.saw([Sighting("pi5", 110.0, heartbeat), Sighting("gone", 1.0)])
    await store.saw([Sighting("pi5", 105.0)])
    changed = make_hello("pi5")
    changed.agent_version = "0.2.0"
    await store.greet(changed, 108.0)
    (device,) = await store.devices()
    assert device.hello == changed
    assert (device.first_seen_at, device.last_seen_at) == (100.0, 110.0)
    assert device.heartbeat == heartbeat


async def test_it_is_sound_and_writable(store: ResultStore, make_result: MakeResult) -> None:
    await store.append("pi5", "spool-1", 1, make_result())
    await store.probe()
    await store.probe()
    await store.check()


async def test_a_closed_store_says_so(store: ResultStore, make_result: MakeResult) -> None:
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.append("pi5", "spool-1", 1, make_result())
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.devices()
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.probe()


def test_summary_and_detail_join_to_the_whole(make_result: MakeResult) -> None:
    summary, detail = split(make_result())
    assert result_pb2.RunResult.FromString(summary + detail) == make_result()
    assert len(summary) < len(detail)
    failed = make_result(status=result_pb2.RUN_STATUS_FAILED)
    assert split(failed) == (failed.SerializeToString(deterministic=True), b"")


def test_what_an_unknown_field_says_is_kept(make_result: MakeResult) -> None:
    from_the_future = make_result().SerializeToString() + b"\xca\x3e\x05later"  # field 1001
    summary, detail = split(result_pb2.RunResult.FromString(from_the_future))
    assert b"later" in result_pb2.RunResult.FromString(summary + detail).SerializeToString()


def test_a_series_is_told_by_everything_that_moves_the_figures(make_result: MakeResult) -> None:
    result = make_result()
    result.spec.options["xnnpack"] = "false"
    result.spec.options["a"] = "1"
    result.spec.shapes["input"].dimensions.extend([1, 224, 224, 3])
    result.spec.inputs_sha256 = "c0ffee" * 10 + "beef"
    assert series_of(result) == Series(
        model_name="mobilenet.tflite",
        model_sha256="5ba0" * 16,
        runtime="tflite",
        target="cpu",
        threads="4",
        variant="a=1,xnnpack=false,input=1x224x224x3,inputs=c0ffeec0ffee",
    )
    assert series_of(result_pb2.RunResult()) == Series("", "", "", "", "", "")


def test_settings_that_move_the_figures_are_in_the_series(make_result: MakeResult) -> None:
    result = make_result()
    result.spec.cache = result_pb2.CACHE_USE_KEEP
    result.caches.add(name="compiled blobs", warm=True)
    assert series_of(result).variant == "", "a cache makes loading faster, not inferences"
    result.spec.compute_precision, result.spec.power_mode = "bfloat16", "MAXN"
    result.spec.cpu_affinity.extend([2, 3])
    assert series_of(result).variant == "compute_precision=bfloat16,cpu_affinity=2+3,power_mode=MAXN"


def test_a_scenario_is_a_series_of_its_own(make_result: MakeResult) -> None:
    result = make_result()
    result.spec.scenario.kind = scenario_pb2.SCENARIO_KIND_SINGLE_STREAM
    assert series_of(result).variant == "", "single stream, said or not"
    result.spec.scenario.kind = scenario_pb2.SCENARIO_KIND_PERIODIC
    result.spec.scenario.rate_hertz = 29.97
    assert series_of(result).variant == "scenario=periodic,rate_hertz=29.97"
    result.spec.scenario.Clear()
    result.spec.group.mode, result.spec.group.size = result_pb2.GROUP_MODE_INTERLEAVED, 2
    assert series_of(result).variant == "", "taking turns changes nothing"
    result.spec.group.mode = result_pb2.GROUP_MODE_CONCURRENT
    assert series_of(result).variant == "concurrent=2"


def test_every_long_list_is_in_the_detail_only(make_result: MakeResult) -> None:
    result = make_result()
    result.warm_up.runs = 3
    result.warm_up.samples_nanoseconds.extend([5, 6, 7])
    result.scenario.service.count = 2
    result.scenario.service.samples_nanoseconds.extend([8, 9])
    result.interference.alone.samples_nanoseconds.extend([10, 11])
    result.telemetry.rate_hertz = 10
    result.telemetry.series.add(quantity="power_watts", values=[1.5, 2.5], times_seconds=[0, 0.1])
    result.output_values.add(name="y", dtype="float32", count=2, step=1, values=[0.5, 1.5])
    for latency in (result.latency, result.scenario.service, result.interference.alone):
        latency.histogram.CopyFrom(histogram([5_000, 6_000]))
    summary, detail = split(result)
    short = result_pb2.RunResult.FromString(summary)
    assert (short.warm_up.runs, short.scenario.service.count, short.telemetry.rate_hertz) == (3, 2, 10)
    assert not any(list_at(short, path) for path in LONG)
    assert all(list_at(result, path) for path in LONG), "the result has them all"
    assert result_pb2.RunResult.FromString(summary + detail) == result


# Placement drift

CPU, DELEGATED, TPU = placement_pb2.UNIT_CPU, placement_pb2.UNIT_CPU_DELEGATE, placement_pb2.UNIT_TPU


@pytest.fixture
def placed(make_result: MakeResult) -> Callable[..., result_pb2.RunResult]:
    """A result whose ops ran there, each with a name of its own."""

    def make(run_id: str, *units: int, **more: object) -> result_pb2.RunResult:
        result = make_result(run_id, **more)
        placement = result.placement
        del placement.ops[:], placement.units[:]
        for index, unit in enumerate(units):
            placement.ops.add(index=index, type="CONV_2D", name=f"conv{index}", unit=unit)  # type: ignore[arg-type]
        for unit in sorted(set(units)):
            placement.units.add(unit=unit, ops=units.count(unit))  # type: ignore[arg-type]
        on_cpu = {CPU, DELEGATED} & set(units)
        placement.verdict = (
            placement_pb2.PLACEMENT_VERDICT_UNSPECIFIED
            if 0 in units
            else placement_pb2.PLACEMENT_VERDICT_ACCELERATED
            if not on_cpu
            else placement_pb2.PLACEMENT_VERDICT_PARTLY
        )
        return result

    return make


async def _drifts(store: ResultStore) -> list[int | None]:
    latest = await store.latest(received_since=0, per_device=10)
    return [entry.drifts for entry in latest.results]


async def _stored(
    store: ResultStore, *results: result_pb2.RunResult, spool: str = "spool-1"
) -> list[int | None]:
    for sequence, result in enumerate(results, 1):
        assert await store.append("pi5", spool, sequence, result)
    return await _drifts(store)


async def test_a_series_that_is_placed_otherwise_is_counted(store: ResultStore, placed: MakeResult) -> None:
    assert await _stored(store, placed("a", TPU, TPU, CPU), placed("b", TPU, TPU, CPU)) == [0]
    await store.append("pi5", "spool-1", 3, placed("c", TPU, CPU, CPU))
    assert await _drifts(store) == [1]
    await store.append("pi5", "spool-1", 4, placed("d", TPU, CPU, CPU))
    assert await _drifts(store) == [1], "it is counted once"
    await store.append("pi5", "spool-1", 5, placed("e", TPU, TPU, CPU))
    assert await _drifts(store) == [2], "and the way back, too"


async def test_many_results_of_a_series_in_one_commit_are_compared_one_by_one(
    store: ResultStore, placed: MakeResult
) -> None:
    results = [placed("a", TPU), placed("b", CPU), placed("c", CPU), placed("d", TPU), placed("e", TPU)]
    futures = [
        store.append("pi5", "spool-1", sequence, result, after=sequence - 1)
        for sequence, result in enumerate(results, 1)
    ]
    assert await asyncio.gather(*futures) == [True] * 5
    assert await _drifts(store) == [2]


async def test_the_same_result_again_is_no_drift(store: ResultStore, placed: MakeResult) -> None:
    await _stored(store, placed("a", TPU), placed("b", CPU))
    assert await store.append("pi5", "spool-1", 1, placed("a", TPU)) is False
    assert await store.append("pi5", "spool-2", 1, placed("a", TPU)) is False
    assert await _drifts(store) == [1]


async def test_a_board_that_was_set_up_anew_is_compared_with_what_it_did_before(
    store: ResultStore, placed: MakeResult
) -> None:
    await _stored(store, placed("a", TPU))
    assert await _stored(store, placed("b", CPU), spool="spool-of-a-new-card") == [1]


async def test_series_boards_and_versions(store: ResultStore, placed: MakeResult) -> None:
    newer = placed("b", CPU)
    newer.runtime.version = "ai-edge-litert 9.9"
    assert await _stored(store, placed("a", TPU), newer) == [1], "the version is no part of a series"
    other = placed("c", TPU, model="other.tflite", sha256="feed" * 16)
    await store.append("pi5", "spool-1", 3, other)
    await store.append("pi4", "spool-1", 1, placed("d", TPU, device_id="pi4"))
    assert sorted(await _drifts(store)) == [0, 0, 1]  # type: ignore[type-var]


async def test_what_is_not_known_has_not_drifted(store: ResultStore, placed: MakeResult) -> None:
    unknown = placed("a", TPU)
    unknown.placement.Clear()
    assert await _stored(store, unknown) == [None], "nothing was ever known"
    contradicted, file_only = placed("c", CPU), placed("d", CPU)
    contradicted.placement.verdict = placement_pb2.PLACEMENT_VERDICT_CONTRADICTED
    file_only.placement.evidence = placement_pb2.EVIDENCE_STATIC
    failed = placed("e", CPU, status=result_pb2.RUN_STATUS_FAILED)
    rest = [placed("b", TPU, CPU), contradicted, file_only, failed]
    for sequence, result in enumerate(rest, 2):
        await store.append("pi5", "spool-1", sequence, result)
    assert await _drifts(store) == [0]
    await store.append("pi5", "spool-1", 9, placed("f", 0, CPU))
    assert await _drifts(store) == [0], "an op of which nothing is known has not moved"
    await store.append("pi5", "spool-1", 10, placed("g", CPU, CPU))
    assert await _drifts(store) == [1], "it is compared with where it was known to be"


async def test_other_ops_are_a_drift_only_with_another_verdict(
    store: ResultStore, placed: MakeResult
) -> None:
    fused = placed("b", TPU, CPU)
    for op in fused.placement.ops:
        op.name = "fused/" + op.name
    assert await _stored(store, placed("a", TPU, TPU, CPU), fused) == [0]
    gone = placed("c", TPU)
    gone.placement.ops[0].name = "all in one"
    await store.append("pi5", "spool-1", 3, gone)
    assert await _drifts(store) == [1]


async def test_without_a_list_of_ops_their_numbers_are_compared(
    store: ResultStore, placed: MakeResult
) -> None:
    results = [placed("a", TPU, CPU), placed("b", TPU, CPU), placed("c", CPU, CPU)]
    for result in results:
        del result.placement.ops[:]
    assert await _stored(store, *results) == [1]


async def test_hostile_placements_break_nothing(store: ResultStore, placed: MakeResult) -> None:
    many = placed("b", *range(1, 300))
    many.placement.units.add(unit=1, ops=2**32 - 1)
    many.placement.units.add(unit=2**31 - 1, ops=1)  # type: ignore[arg-type]
    many.placement.verdict = 2**31 - 1  # type: ignore[assignment]
    assert (await _stored(store, many, placed("c", *range(1, 300))))[0] is not None


def test_the_ops_of_a_giant_are_counted_and_not_kept_one_by_one(placed: MakeResult) -> None:
    giant = placed("a", *[TPU] * 30_000)
    places = places_of(giant)
    assert places is not None
    assert (dict(places.units), dict(places.ops)) == ({TPU: 30_000}, {})
    assert len(places.packed()) < 100


@given(st.lists(st.sampled_from([0, 1, 2, 4, 6]), min_size=1, max_size=40))
def test_places_survive_being_packed(units: list[int]) -> None:
    result = result_pb2.RunResult(status=result_pb2.RUN_STATUS_SUCCEEDED)
    result.placement.evidence = placement_pb2.EVIDENCE_PARTITION
    for unit in units:
        result.placement.ops.add(type="X", unit=unit, delegate="d")  # type: ignore[arg-type]
        result.placement.units.add(unit=unit, ops=1)  # type: ignore[arg-type]
    places = places_of(result)
    assert places is not None
    assert Places.unpacked(places.packed()) == places
    assert not has_drifted(places, places)
    for length in range(len(places.packed())):
        Places.unpacked(places.packed()[:length])  # what it gives does not matter, that it gives up does


async def test_arrivals_come_whole_in_their_order_and_news_name_their_boards(
    store: ResultStore, make_result: MakeResult
) -> None:
    assert await store.news(0) == News(0, frozenset())
    assert await store.arrivals(0, limit=10, max_bytes=10**9) == ()
    results = [make_result(f"run-{n}", device_id=f"board-{n % 2}") for n in range(5)]
    for n, result in enumerate(results):
        await store.append(result.board.device_id, "spool", n + 1, result)
    arrivals = await store.arrivals(0, limit=10, max_bytes=10**9)
    assert [entry.result for entry in arrivals] == results
    assert [entry.device_id for entry in arrivals] == [result.board.device_id for result in results]
    positions = [entry.position for entry in arrivals]
    assert positions == sorted(set(positions)) and positions[0] > 0
    assert all(entry.received_at > 0 for entry in arrivals)
    assert await store.news(0) == News(positions[-1], frozenset({"board-0", "board-1"}))
    assert await store.news(positions[3]) == News(positions[-1], frozenset({"board-0"}))
    assert await store.news(positions[-1]) == News(positions[-1], frozenset())


async def test_arrivals_are_bounded_in_number_and_bytes(store: ResultStore, make_result: MakeResult) -> None:
    for n in range(4):
        await store.append("pi5", "spool", n + 1, make_result(f"run-{n}"))
    size = len((await store.arrivals(0, limit=1, max_bytes=1))[0].result.SerializeToString())
    everything = await store.arrivals(0, limit=100, max_bytes=10**9)
    assert len(await store.arrivals(0, limit=3, max_bytes=10**9)) == 3
    assert 1 <= len(await store.arrivals(0, limit=100, max_bytes=2 * size + size // 2)) <= 2
    behind = await store.arrivals(everything[1].position, limit=100, max_bytes=1)
    assert [entry.result.run_id for entry in behind] == ["run-2"]
    with pytest.raises(InvalidRequest):
        await store.arrivals(0, limit=0, max_bytes=1)


async def test_the_latest_of_some_boards_only(store: ResultStore, make_result: MakeResult) -> None:
    for device_id in ("pi4", "pi5", "nano"):
        for n in range(3):
            result = make_result(f"{device_id}-{n}", device_id=device_id, model=f"m{n}.tflite")
            await store.append(device_id, "spool", n + 1, result)
    some = await store.latest(received_since=0, per_device=2, devices={"pi5", "nano", "nobody"})
    assert {entry.device_id for entry in some.results} == {"pi5", "nano"}
    assert len(some.results) == 4 and some.left_out == {"pi5": 1, "nano": 1}
    assert await store.latest(received_since=0, per_device=2, devices=()) == LatestResults((), {})


# Retention


def _sampled(make_result: MakeResult, run_id: str, **more: object) -> result_pb2.RunResult:
    """A result that has every kind of single samples."""
    result = make_result(run_id, **more)
    result.warm_up.samples_nanoseconds.extend([5, 6, 7])
    result.scenario.service.samples_nanoseconds.extend([8_000, 9_000])
    result.interference.alone.samples_nanoseconds.extend([10_000, 11_000])
    result.telemetry.series.add(quantity="power_watts", values=[1.5, 2.5], times_seconds=[0, 0.1])
    return result


async def test_single_samples_go_with_age_and_their_distribution_stays(
    store: ResultStore, make_result: MakeResult
) -> None:
    for n in (1, 2, 3):
        await store.append("pi5", "spool-1", n, _sampled(make_result, f"run-{n}", p50=0.01 * n))
    assert await store.thin(received_before=1.0, limit=10) == Removed(), "nothing is that old"
    first = await store.thin(received_before=4e9, limit=2)
    assert (first.results, first.samples, first.more) == (2, 2 * (100 + 3 + 2 + 2 + 2), True)
    assert first.size_bytes > 0
    second = await store.thin(received_before=4e9, limit=2)
    assert (second.results, second.more) == (1, False)
    assert (await store.thin(received_before=4e9, limit=2)).results == 0, "once is enough"
    for n in (1, 2, 3):
        whole = _sampled(make_result, f"run-{n}", p50=0.01 * n)
        (thin,) = await store.find(f"run-{n}")
        assert thin.latency.percentiles == whole.latency.percentiles
        assert thin.placement == whole.placement
        assert not any(list_at(thin, path) for path in DROPPED)
        for before, after in (
            (whole.latency, thin.latency),
            (whole.scenario.service, thin.scenario.service),
            (whole.interference.alone, thin.interference.alone),
        ):
            assert after.histogram == histogram(before.samples_nanoseconds)
            assert total(after.histogram) == len(before.samples_nanoseconds)
    await store.check()
    latest = await store.latest(received_since=0, per_device=9)
    assert [entry.result.run_id for entry in latest.results] == ["run-3"]


async def test_a_result_that_was_made_smaller_is_still_known(
    store: ResultStore, make_result: MakeResult
) -> None:
    await store.append("pi5", "spool-1", 1, _sampled(make_result, "run-1"))
    await store.thin(received_before=4e9, limit=10)
    assert await store.append("pi5", "spool-1", 1, _sampled(make_result, "run-1")) is False
    assert await store.append("pi5", "spool-2", 1, _sampled(make_result, "run-1")) is False
    with pytest.raises(ResultRefused, match="with other contents"):
        await store.append("pi5", "spool-2", 2, _sampled(make_result, "run-1", p50=0.5))


async def test_results_go_with_age_but_never_the_latest_of_a_series(
    store: ResultStore, make_result: MakeResult
) -> None:
    failed = result_pb2.RUN_STATUS_FAILED
    for n, more in enumerate([{}, {}, {"status": failed}, {"model": "other"}, {"status": failed}], 1):
        await store.append("pi5", "spool-1", n, make_result(f"run-{n}", **more))
    before = await store.outcomes()
    assert await store.remove(received_before=1.0, per_series=None, limit=10) == Removed()
    first = await store.remove(received_before=4e9, per_series=None, limit=1)
    assert (first.results, first.more, first.size_bytes > 0) == (1, True, True)
    await store.remove(received_before=4e9, per_series=None, limit=10)
    left = {result.run_id for result in (await store.results(ResultFilter(), limit=10)).results}
    assert left == {"run-2", "run-4", "run-5"}, "the latest of each series, and where the order ends"
    assert (await store.remove(received_before=4e9, per_series=None, limit=10)).results == 0
    assert await store.outcomes() == before, "what was counted stays counted"
    assert await store.acknowledged("pi5", "spool-1") == 5
    assert await store.append("pi5", "spool-1", 6, make_result("run-6"), after=5) is True
    assert (await store.news(0)).position > 5


async def test_so_many_results_of_each_series_are_kept(store: ResultStore, make_result: MakeResult) -> None:
    failed = result_pb2.RUN_STATUS_FAILED
    sequence = 0
    for device_id, model in (("pi5", "a"), ("pi5", "b"), ("pi4", "a")):
        for n in range(4):
            sequence += 1
            await store.append(
                device_id, "spool", sequence, make_result(f"{device_id}-{model}-{n}", model=model)
            )
    sequence += 1
    await store.append("pi4", "spool", sequence, make_result("last", model="a", status=failed))
    removed = [await store.remove(received_before=None, per_series=2, limit=3) for _ in range(4)]
    assert [each.results for each in removed] == [3, 3, 1, 0]
    left = {result.run_id for result in (await store.results(ResultFilter(), limit=100)).results}
    assert left == {"pi5-a-2", "pi5-a-3", "pi5-b-2", "pi5-b-3", "pi4-a-3", "last"}
    await store.remove(received_before=None, per_series=1, limit=100)
    left = {result.run_id for result in (await store.results(ResultFilter(), limit=100)).results}
    assert left == {"pi5-a-3", "pi5-b-3", "pi4-a-3", "last"}, "what succeeded last stays"
