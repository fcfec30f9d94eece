"""Scrapes of a collector that goes on: what came since is shown, and nothing is lost when a scrape fails."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from boardbench.collector.errors import StoreUnavailable
from boardbench.collector.expose import Exposition
from boardbench.collector.store import LatestResults
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.v1 import result_pb2

MakeResult = Callable[..., result_pb2.RunResult]


class CountingStore(MemoryResultStore):
    """Counts what is read, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.boards_read: list[Collection[str] | None] = []
        self.failing = False

    async def latest(
        self, *, received_since: float, per_device: int, devices: Collection[str] | None = None
    ) -> LatestResults:
        if self.failing:
            raise StoreUnavailable("no space left")
        self.boards_read.append(devices)
        return await super().latest(received_since=received_since, per_device=per_device, devices=devices)

    async def find(self, run_id: str) -> tuple[result_pb2.RunResult, ...]:
        self.reads[run_id] += 1
        return await super().find(run_id)


async def metrics(collector: Any) -> tuple[int, str]:
    async with aiohttp.ClientSession() as http, http.get(collector.url + "/metrics") as answer:
        return answer.status, await answer.text()


def values(text: str, name: str) -> dict[str, float]:
    """By model."""
    return {
        sample.labels["model"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


@pytest.fixture
def counting() -> CountingStore:
    return CountingStore()


async def test_only_what_came_since_is_read(
    counting: CountingStore, collector_over: Any, make_result: MakeResult
) -> None:
    async with collector_over(counting) as collector:
        boards = [collector.board(f"board-{n}", f"spool-{n}") for n in range(3)]
        for n, board in enumerate(boards):
            await board.join()
            await board.send(1, make_result(f"run-{n}", device_id=f"board-{n}", model=f"m{n}"))
            await board.acknowledged(1)
        for _ in range(3):
            status, text = await metrics(collector)
            assert status == 200
            count = values(text, "boardbench_latency_distribution_seconds_count")
            assert count == {"m0": 100, "m1": 100, "m2": 100}
        assert len(counting.boards_read) == 1, "with nothing new, nothing is read"
        await boards[1].send(2, make_result("run-9", device_id="board-1", model="m9", p50=0.5))
        await boards[1].acknowledged(2)
        _, text = await metrics(collector)
        assert values(text, "boardbench_latency_mean_seconds")["m9"] == pytest.approx(0.505)
        assert counting.boards_read[1:] == [{"board-1"}]
        assert counting.reads == {"run-0": 1, "run-1": 1, "run-2": 1, "run-9": 1}
        for board in boards:
            await board.leave()


async def test_what_came_while_a_scrape_failed_is_shown_by_the_next(
    counting: CountingStore, collector_over: Any, make_result: MakeResult
) -> None:
    async with collector_over(counting) as collector:
        board = collector.board()
        await board.join()
        await board.send(1, make_result("run-1", p50=0.01))
        await board.acknowledged(1)
        assert (await metrics(collector))[0] == 200
        await board.send(2, make_result("run-2", p50=0.02))
        await board.acknowledged(2)
        counting.failing = True
        status, text = await metrics(collector)
        assert status == 503 and "no space left" in text
        counting.failing = False
        _, text = await metrics(collector)
        (mean,) = values(text, "boardbench_latency_mean_seconds").values()
        assert mean == pytest.approx(0.0202)
        await board.leave()


async def test_a_scrape_that_could_not_be_written_down_is_made_up_for_by_the_next(
    counting: CountingStore, collector_over: Any, make_result: MakeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, faults = Exposition.take, 1

    def fails(exposition: Exposition, snapshot: Any) -> None:
        nonlocal faults
        if faults:
            faults -= 1
            raise RuntimeError("a fault of ours")
        take(exposition, snapshot)

    async with collector_over(counting) as collector:
        board = collector.board()
        await board.join()
        await board.send(1, make_result("run-1"))
        await board.acknowledged(1)
        assert (await metrics(collector))[0] == 200
        await board.send(2, make_result("run-2", model="another"))
        await board.acknowledged(2)
        monkeypatch.setattr(Exposition, "take", fails)
        assert (await metrics(collector))[0] == 500
        assert "another" in values((await metrics(collector))[1], "boardbench_latency_mean_seconds")
        await board.leave()


async def test_scrapes_at_the_same_time_are_all_right(
    counting: CountingStore, collector_over: Any, make_result: MakeResult
) -> None:
    async with collector_over(counting) as collector:
        board = collector.board()
        await board.join()
        for n in range(8):
            await board.send(n + 1, make_result(f"run-{n}", model=f"m{n}"))
        await board.acknowledged(8)
        answers = await asyncio.gather(*(metrics(collector) for _ in range(8)))
        for status, text in answers:
            assert status == 200
            assert len(values(text, "boardbench_latency_distribution_seconds_count")) == 8
        await board.leave()
