"""Calls that are timed, and for how long they had no processor."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from boardbench.agent.bench.laps import SCHEDSTAT, Lap, Track


@pytest.fixture
def schedstat(tmp_path: Path) -> Path:
    """What the kernel tells of a thread: nanoseconds on a processor and in the queue for one, and turns."""
    path = tmp_path / "schedstat"
    path.write_text("1000 2000 3\n")
    return path


def test_the_queue_is_told_beside_the_time(schedstat: Path) -> None:
    def wait() -> None:
        time.sleep(0.02)
        schedstat.write_text("1000 5002000 4\n")  # five milliseconds more

    with Track(schedstat) as track:
        assert track.knows_queue
        (waited, idle), (again, _) = track.laps([wait, lambda: None], range(2))
    assert waited.seconds >= 0.02
    assert waited.queued_seconds == pytest.approx(0.005)
    assert waited.own_seconds == pytest.approx(waited.seconds - 0.005)
    assert (idle.queued_seconds, again.queued_seconds) == (0.0, 0.0)


def test_who_ran_did_not_wait(schedstat: Path) -> None:
    """The thread may wait while the readings are made, before the clock is read and after."""

    def work() -> None:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        schedstat.write_text("1000 90000000000 4\n")

    with Track(schedstat) as track:
        ((lap,),) = track.laps([work], range(1))
    assert lap.own_seconds >= 0.019
    assert lap.cpu_seconds >= 0.019
    assert lap.queued_seconds >= 0.0


def test_calls_are_made_in_turn(schedstat: Path) -> None:
    made: list[str] = []
    with Track(schedstat) as track:
        laps = track.laps([lambda: made.append("a"), lambda: made.append("b")], range(3))
    assert made == ["a", "b"] * 3
    assert [len(turn) for turn in laps] == [2, 2, 2]


@pytest.mark.parametrize("content", [None, "", "1 2\n", "1 x 3\n"])
def test_a_kernel_that_does_not_tell_leaves_the_time(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "schedstat"
    if content is not None:
        path.write_text(content)
    with Track(path) as track:
        assert not track.knows_queue
        ((lap,),) = track.laps([lambda: time.sleep(0.001)], range(1))
    assert lap.seconds >= 0.001
    assert lap.queued_seconds == 0.0


def test_nothing_stays_open(schedstat: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("open files are counted in /proc")
    before = len(list(descriptors.iterdir()))
    track = Track(schedstat)
    track.close()
    track.close()
    (schedstat.parent / "other").write_text("no numbers")
    Track(schedstat.parent / "other")
    assert len(list(descriptors.iterdir())) == before


def test_this_kernel_is_understood() -> None:
    if not SCHEDSTAT.exists():
        pytest.skip(f"this kernel has no {SCHEDSTAT}")
    with Track() as track:
        ((lap,),) = track.laps([lambda: time.sleep(0.001)], range(1))
        assert track.knows_queue
    assert 0.0 <= lap.queued_seconds <= lap.seconds


def test_what_belongs_to_no_call_is_taken_off_its_own_time() -> None:
    lap = Lap(0.5, 0.25, 0.125)
    assert lap.less(0.125) == Lap(0.375, 0.25, 0.125)
    assert lap.less(1.0) == Lap(0.25, 0.25, 0.125)
    assert lap.less(1.0).own_seconds == 0.0


def test_laps_add_up() -> None:
    assert Lap(0.5, 0.25, 0.125) + Lap(1.5, 0.5, 0.25) == Lap(2.0, 0.75, 0.375)
