"""The policy at work: rounds, what is counted, what a failing store does to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from boardbench.collector.errors import StoreUnavailable
from boardbench.collector.retention import Policy, Retention
from boardbench.collector.store import Removed, ResultFilter, ResultStore
from boardbench.v1 import result_pb2

MakeResult = Callable[..., result_pb2.RunResult]

DAY = 86400.0


async def test_a_round_does_all_there_is_to_do(sqlite_store: ResultStore, make_result: MakeResult) -> None:
    for n in range(1, 131):
        await sqlite_store.append("pi5", "spool", n, make_result(f"run-{n}", samples=3))
    (arrived,) = (await sqlite_store.latest(received_since=0, per_device=9)).results
    later = arrived.received_at + 3 * DAY
    retention = Retention(sqlite_store, Policy(per_series=120, samples_days=2), clock=lambda: later)
    thinned, removed = await retention.round()
    assert (removed.results, thinned.results, thinned.samples) == (10, 120, 360)
    assert (await retention.round())[0].results == 0
    retention = Retention(sqlite_store, Policy(results_days=2), clock=lambda: later)
    assert (await retention.round())[1].results == 119
    view = retention.view()
    assert view is not None and (view.results_removed, view.bytes_removed > 0) == (119, True)
    assert len((await sqlite_store.results(ResultFilter(), limit=200)).results) == 1


def test_a_policy_that_keeps_nothing_is_none() -> None:
    assert Policy().keeps_everything
    for wrong in ({"samples_days": 0}, {"results_days": -1}, {"per_series": 0}):
        with pytest.raises(ValueError, match="can't be kept"):
            Policy(**wrong)  # type: ignore[arg-type]


async def test_without_a_policy_nothing_is_done(sqlite_store: ResultStore) -> None:
    retention = Retention(sqlite_store, Policy())
    await retention.run()
    assert retention.view() is None


async def test_a_store_that_fails_is_tried_again(
    sqlite_store: ResultStore,
    make_result: MakeResult,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = asyncio.Event()

    async def fails(**_: object) -> Removed:
        calls.set()
        raise StoreUnavailable("no space left")

    monkeypatch.setattr(sqlite_store, "thin", fails)
    retention = Retention(sqlite_store, Policy(samples_days=1))
    with caplog.at_level(logging.WARNING):
        task = asyncio.create_task(retention.run())
        await asyncio.wait_for(calls.wait(), 30)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert retention.failures == 1
    assert "no space left" in caplog.text
