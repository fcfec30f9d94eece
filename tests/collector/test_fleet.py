"""Which boards are there, as seen before and after the store knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from boardbench.collector.errors import IdentityTaken, ShuttingDown, SilentAgent, StoreUnavailable, Superseded
from boardbench.collector.fleet import Durations, Fleet
from boardbench.collector.look import ReadModel
from boardbench.collector.store import Sighting
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.v1 import collector_pb2

MakeHello = Callable[..., collector_pb2.Hello]


class Clock:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class CountingStore(MemoryResultStore):
    """Tells how often it was written, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[Sighting, ...]] = []
        self.failing = False

    async def saw(self, sightings: Sequence[Sighting]) -> None:
        if self.failing:
            raise StoreUnavailable("no space left")
        self.written.append(tuple(sightings))
        await super().saw(sightings)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counting_store() -> CountingStore:
    return CountingStore()


@pytest.fixture
async def fleet(counting_store: CountingStore, clock: Clock) -> Fleet:
    return Fleet(counting_store, silence_seconds=30, clock=clock, monotonic=clock)


async def test_many_heartbeats_are_one_write(
    fleet: Fleet, counting_store: CountingStore, clock: Clock
) -> None:
    sessions = [fleet.join(f"board-{n}", "peer") for n in range(3)]
    for _ in range(10):
        clock.now += 1
        for session in sessions:
            fleet.heard(session, collector_pb2.Heartbeat(queued_runs=int(clock.now)))
    await fleet.flush()
    await fleet.flush()
    (written,) = counting_store.written
    assert {(sighting.device_id, sighting.at) for sighting in written} == {
        (f"board-{n}", 1010.0) for n in range(3)
    }
    assert {sighting.heartbeat.queued_runs for sighting in written if sighting.heartbeat} == {1010}


async def test_a_board_that_left_is_seen_with_its_last_word_before_the_store_knows(
    fleet: Fleet, counting_store: CountingStore, clock: Clock, make_hello: MakeHello
) -> None:
    look = ReadModel(counting_store, fleet, result_ttl_seconds=1, results_per_device=1, clock=clock)
    await counting_store.greet(make_hello(), clock.now)
    session = fleet.join("pi5", "peer")
    clock.now += 60
    fleet.heard(session, collector_pb2.Heartbeat(spool_pending=4))
    for step in ("open", "left", "flushed"):
        if step == "left":
            fleet.leave(session)
        if step == "flushed":
            await fleet.flush()
            assert fleet.sighting("pi5") is None
        (view,) = await look.views()
        assert (view.up, view.last_seen_at) == (step == "open", 1060.0), step
        assert view.heartbeat is not None
        assert view.heartbeat.spool_pending == 4


async def test_what_the_store_did_not_take_is_kept(fleet: Fleet, counting_store: CountingStore) -> None:
    gone, stays = fleet.join("gone", "peer"), fleet.join("stays", "peer")
    fleet.leave(gone)
    counting_store.failing = True
    with pytest.raises(StoreUnavailable):
        await fleet.flush()
    counting_store.failing = False
    await fleet.flush()
    (written,) = counting_store.written
    assert {sighting.device_id for sighting in written} == {"gone", "stays"}
    fleet.leave(stays)


async def test_silence_ends_a_stream_unless_the_collector_is_the_reason(fleet: Fleet, clock: Clock) -> None:
    silent, beating, held_up = (fleet.join(name, "peer") for name in ("silent", "beating", "held-up"))
    held_up.held_up = True
    clock.now += 30
    fleet.heard(beating)
    clock.now += 1
    fleet.end_silent()
    fleet.end_silent()
    assert isinstance(silent.ended.result(), SilentAgent)
    assert not beating.ended.done()
    assert not held_up.ended.done()
    assert fleet.tally.silent == 1


async def test_the_newer_stream_wins_and_the_older_ones_end_changes_nothing(fleet: Fleet) -> None:
    older = fleet.join("pi5", "10.0.0.1")
    newer = fleet.join("pi5", "10.0.0.2")
    assert isinstance(older.ended.result(), Superseded)
    fleet.leave(older)
    assert fleet.is_up("pi5")
    assert len(fleet) == 1
    assert (fleet.tally.streams, fleet.tally.superseded) == (2, 1)
    fleet.leave(newer)
    assert not fleet.is_up("pi5")


async def test_another_agent_may_come_once_the_one_before_has_been_asked_to_end(fleet: Fleet) -> None:
    first, second = (collector_pb2.Hello(instance_id=name) for name in ("one", "two"))
    session = fleet.join("pi5", "10.0.0.1", first)
    with pytest.raises(IdentityTaken):
        fleet.join("pi5", "10.0.0.2", second)
    session.end(SilentAgent("nothing came"))
    assert fleet.join("pi5", "10.0.0.2", second).instance_id == "two"


async def test_two_agents_with_copies_of_one_folder_are_told_from_one_that_restarts(fleet: Fleet) -> None:
    first, second = (collector_pb2.Hello(instance_id="one", life_id=name) for name in ("a", "b"))
    fleet.join("pi5", "10.0.0.1", first)
    fleet.join("pi5", "10.0.0.2", second)
    assert (fleet.conflict("pi5"), fleet.tally.identity_conflicts) == ("", 0), "it has restarted"
    fleet.join("pi5", "10.0.0.1", first)
    assert "two agents with copies of one data folder take turns as pi5" in fleet.conflict("pi5")
    assert fleet.tally.identity_conflicts == 1


async def test_closing_asks_everybody_and_takes_nobody(fleet: Fleet) -> None:
    session = fleet.join("pi5", "peer")
    await fleet.close(0.01)
    assert isinstance(session.ended.result(), ShuttingDown)
    with pytest.raises(ShuttingDown):
        fleet.join("pi4", "peer")
    fleet.leave(session)
    await fleet.close(60)


def test_durations_are_counted_up_to_each_bound() -> None:
    durations = Durations()
    for seconds in (0.0005, 0.001, 0.0011, 11.0):
        durations.add(seconds)
    copy = durations.copy()
    durations.add(0.0001)
    assert copy.count == 4 and copy.total == pytest.approx(11.0026)
    assert copy.cumulative() == (2, *(3,) * (len(Durations.bounds) - 1))
    assert durations.cumulative()[0] == 3
