"""The spool: what append has returned for reaches the collector, once and in order, whatever breaks."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from boardbench.agent.errors import ConfigurationError, StorageError, Unavailable
from boardbench.agent.spool import Disk, Record, Spool

SECTOR_BYTES = 512
# Of a segment: magic, epoch, identity, CRC-32.
HEADER_BYTES = 8 + 8 + 16 + 4


class PowerCut(BaseException):
    """The lights are out: nothing may catch this."""


class SimulatedDisk(Disk):
    """Real files, and beside them what a power cut would leave of them.

    Pessimistic: what was not synced may be there or not, sector by sector and name by name, and a sector
    of a new file that was not written holds what another file left there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps_left: int | None = None
        self.full = self.broken = self.dead = False
        self._names: dict[int, str] = {}
        # Name → content, as far as synced; and what was written since.
        self.synced: dict[str, bytes] = {path.name: path.read_bytes() for path in self._files()}
        self.named: set[str] = set(self.synced)
        self.unlinked: set[str] = set()
        self.unsynced: dict[str, list[tuple[int, bytes]]] = {}

    def _files(self) -> list[Path]:
        return [path for path in self.root.iterdir() if path.name != "lock"] if self.root.exists() else []

    def _step(self) -> None:
        if self.steps_left is not None and not self.dead:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise PowerCut
        if self.broken:
            raise OSError(errno.EROFS, "Read-only file system")

    def create(self, path: Path) -> int:
        self._step()
        if self.dead:
            return os.open(os.devnull, os.O_WRONLY)
        descriptor = super().create(path)
        self._names[descriptor] = path.name
        self.unsynced[path.name] = []
        return descriptor

    def open_state(self, path: Path) -> int:
        self._step()
        descriptor = super().open_state(path)
        self._names[descriptor] = path.name
        self.unsynced.setdefault(path.name, [])
        return descriptor

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        self._step()
        if self.dead:
            return
        grows = offset + len(data) > os.fstat(descriptor).st_size
        if self.full and grows:
            super().write(descriptor, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        self.unsynced[self._names[descriptor]].append((offset, bytes(data)))
        super().write(descriptor, data, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        # Not synced by itself: after a cut, what was cut off may be there again.
        self._step()
        super().truncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        self._step()
        if self.dead:
            return
        name = self._names[descriptor]
        self.synced[name] = (self.root / name).read_bytes()
        self.unsynced[name] = []

    def sync_folder(self, path: Path) -> None:
        self._step()
        if not self.dead:
            self.named = {file.name for file in self._files()}
            self.unlinked = set()

    def unlink(self, path: Path) -> None:
        self._step()
        if not self.dead:
            self.unlinked.add(path.name)
            super().unlink(path)

    def free_bytes(self, path: Path) -> int:
        return 0 if self.full else 1 << 40

    def after_power_cut(self, target: Path, rng: random.Random) -> None:
        """Writes what is left into another folder."""
        target.mkdir()
        for name in self.named | set(self.unsynced):
            if name not in self.named and rng.random() < 0.5:
                continue
            if name in self.unlinked and rng.random() < 0.5:
                continue
            durable = self.synced.get(name, b"")
            content = bytearray(durable)
            for offset, data in self.unsynced.get(name, []):
                for start in range(0, len(data), SECTOR_BYTES):
                    piece = data[start : start + SECTOR_BYTES]
                    fate = rng.random()
                    end = offset + start + len(piece)
                    if fate < 0.4:
                        content.extend(bytes(max(0, end - len(content))))
                        content[offset + start : end] = piece
                    elif fate < 0.7 and end > len(content):
                        stale = rng.choice([bytes(piece), bytes(len(piece)), rng.randbytes(len(piece))])
                        content.extend(stale[: end - len(content)])
            (target / name).write_bytes(content)

    def after_kill(self, target: Path) -> None:
        shutil.copytree(self.root, target, ignore=shutil.ignore_patterns("lock"))


@pytest.fixture
def spools(tmp_path: Path):
    """Opens spools in one folder and closes them."""
    opened: list[Spool] = []

    def open_spool(limit_bytes: int = 1 << 20, **options) -> Spool:
        options.setdefault("free_share", 1.0)
        opened.append(Spool(tmp_path / "spool", limit_bytes, **options))
        return opened[-1]

    yield open_spool
    for spool in opened:
        spool.close()


def segments(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "spool").glob("*.seg"))


def sequences(spool: Spool) -> list[int]:
    return [record.sequence for record in spool.pending()]


def payload(number: int, size: int = 100) -> bytes:
    return random.Random(number).randbytes(size)


def fill(spool: Spool, count: int, first: int = 0, size: int = 100) -> list[int]:
    return [spool.append(f"run-{number}", payload(number, size)) for number in range(first, first + count)]


# What goes in comes out.


def test_results_come_out_in_order_and_stay_until_they_are_acknowledged(spools):
    spool = spools()
    assert fill(spool, 3) == [1, 2, 3]
    own_id = spool.status().spool_id
    assert list(spool.pending()) == [
        Record(own_id, number + 1, f"run-{number}", payload(number)) for number in range(3)
    ]
    assert spool.status().pending == 3
    spool.acknowledge(own_id, 2)
    assert sequences(spool) == [3]
    assert spool.status().pending == 1
    assert spool.status().dropped == 0
    assert spool.status().trouble == ""


def test_results_and_identity_survive_a_restart(spools):
    spool = spools()
    fill(spool, 3)
    before = list(spool.pending())
    own_id = spool.status().spool_id
    spool.acknowledge(own_id, 1)
    spool.close()
    spool = spools()
    assert list(spool.pending()) == before[1:]
    assert spool.status().spool_id == own_id
    (sequence,) = fill(spool, 1, first=9)
    assert sequence > 3
    assert [record.run_id for record in spool.pending()] == ["run-1", "run-2", "run-9"]


def test_sequences_rise_over_restarts_also_when_everything_was_acknowledged(spools):
    last = 0
    for _ in range(3):
        spool = spools()
        (sequence,) = fill(spool, 1)
        assert sequence > last
        last = sequence
        spool.acknowledge(spool.status().spool_id, last)
        spool.close()
    assert spools().status().pending == 0


def test_a_start_that_measures_nothing_writes_nothing(spools, tmp_path: Path):
    spool = spools()
    fill(spool, 1)
    spool.close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "spool").iterdir()}
    spools().close()
    assert {path.name: path.read_bytes() for path in (tmp_path / "spool").iterdir()} == before


def test_acknowledged_segments_leave_the_disk_and_only_they(spools, tmp_path: Path):
    spool = spools(segment_bytes=1000)
    fill(spool, 20)
    files = segments(tmp_path)
    assert len(files) > 2
    own_id = spool.status().spool_id
    spool.acknowledge(own_id, 1)
    assert segments(tmp_path) == files
    spool.acknowledge(own_id, 20)
    assert segments(tmp_path) == files[-1:]
    assert spool.status().used_bytes == files[-1].stat().st_size
    spool.close()
    spool = spools(segment_bytes=1000)
    assert sequences(spool) == []
    assert segments(tmp_path) == files[-1:]
    (sequence,) = fill(spool, 1)
    spool.acknowledge(own_id, sequence)
    assert [int(file.stem) for file in segments(tmp_path)] == [int(files[-1].stem) + 1]


def test_a_result_larger_than_a_segment_gets_its_own(spools, tmp_path: Path):
    spool = spools(segment_bytes=1000)
    fill(spool, 1)
    fill(spool, 1, first=1, size=5000)
    fill(spool, 1, first=2)
    assert len(segments(tmp_path)) == 3
    spool.close()
    assert [record.payload for record in spools().pending()] == [payload(0), payload(1, 5000), payload(2)]


def test_segments_are_read_in_the_order_of_their_numbers(spools, tmp_path: Path):
    spool = spools(segment_bytes=1)
    fill(spool, 12)
    assert len(segments(tmp_path)) == 12
    spool.close()
    spool = spools(segment_bytes=1)
    assert sequences(spool) == list(range(1, 13))
    fill(spool, 1)
    assert int(segments(tmp_path)[-1].stem) == 13


def test_a_result_is_found_by_its_run_as_long_as_it_is_here(spools):
    spool = spools()
    fill(spool, 2)
    own_id = spool.status().spool_id
    spool.acknowledge(own_id, 2)
    found = spool.find("run-1")
    assert found == Record(own_id, 2, "run-1", payload(1))
    assert spool.find("run-7") is None
    spool.close()
    spool = spools()
    assert spool.find("run-1") == found
    (sequence,) = fill(spool, 1, first=2)
    spool.acknowledge(own_id, sequence)
    assert spool.find("run-1") is None
    assert spool.find("run-2") is not None


def test_pending_goes_on_when_results_go_meanwhile(spools):
    spool = spools()
    fill(spool, 4)
    walk = spool.pending()
    assert next(walk).sequence == 1
    spool.acknowledge(spool.status().spool_id, 3)
    assert [record.sequence for record in walk] == [4]


def test_threads_append_at_once_and_listeners_are_told(spools):
    spool = spools(segment_bytes=2000)
    heard: list[str] = []
    unsubscribe = spool.subscribe(lambda: heard.append(threading.current_thread().name))

    def work(first: int) -> None:
        fill(spool, 10, first=first)

    threads = [threading.Thread(target=work, args=(first,), name=f"t{first}") for first in range(0, 80, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(heard) == 80
    assert set(heard) == {thread.name for thread in threads}
    records = list(spool.pending())
    assert [record.sequence for record in records] == list(range(1, 81))
    assert {record.run_id: record.payload for record in records} == {
        f"run-{number}": payload(number) for number in range(80)
    }
    unsubscribe()
    unsubscribe()
    fill(spool, 1)
    assert len(heard) == 80


def test_a_folder_has_one_owner(spools):
    spool = spools()
    with pytest.raises(ConfigurationError, match="another agent is using it"):
        spools()
    spool.close()
    spool.close()
    with pytest.raises(Unavailable):
        fill(spool, 1)
    spools()


# What the collector says.


def test_an_acknowledgement_of_another_identity_says_nothing(spools):
    spool = spools()
    fill(spool, 2)
    spool.acknowledge("f" * 32, 2)
    spool.reject("f" * 32, 2, "no")
    assert sequences(spool) == [1, 2]


def test_what_a_restored_collector_lacks_is_sent_again_if_it_is_here(spools):
    spool = spools(segment_bytes=400)
    fill(spool, 8)
    own_id = spool.status().spool_id
    for after in range(8):
        assert spool.next_after(after, own_id) is not None
    spool.acknowledge(own_id, 7)
    spool.reconcile(own_id, 2)
    # 2 to 5 left the disk with their segments.
    assert sequences(spool) == [7, 8]
    spool.acknowledge(own_id, 8)
    assert sequences(spool) == []


def test_what_is_acknowledged_is_kept_for_a_restored_collector(spools):
    spool = spools(segment_bytes=400, kept_bytes=1 << 20)
    fill(spool, 8)
    own_id = spool.status().spool_id
    for after in range(8):
        assert spool.next_after(after, own_id) is not None
    spool.acknowledge(own_id, 8)
    assert sequences(spool) == []
    assert not spool.waits("run-3")
    spool.close()
    spool = spools(segment_bytes=400, kept_bytes=1 << 20)
    spool.reconcile(own_id, 8)
    assert sequences(spool) == []
    spool.reconcile(own_id, 2)
    assert sequences(spool) == [3, 4, 5, 6, 7, 8]
    assert spool.waits("run-3")
    assert [record.payload for record in spool.pending()] == [payload(number) for number in range(2, 8)]
    # A restart in between forgets nothing of it.
    spool.close()
    spool = spools(segment_bytes=400, kept_bytes=1 << 20)
    assert sequences(spool) == [3, 4, 5, 6, 7, 8]
    assert spool.status().dropped == 0


def test_a_restored_collector_gets_results_of_earlier_identities_too(spools, tmp_path: Path):
    spool = spools(kept_bytes=1 << 20)
    fill(spool, 2)
    first_id = spool.status().spool_id
    assert spool.next_after(1, first_id) is not None
    spool.acknowledge(first_id, 2)
    spool.renew(first_id, 100)
    own_id = spool.status().spool_id
    assert own_id != first_id
    (third,) = fill(spool, 1, first=2)
    assert spool.next_after(0, own_id) is not None
    spool.acknowledge(own_id, third)
    assert sequences(spool) == []
    spool.reconcile(own_id, 0)
    assert [(record.spool_id, record.run_id) for record in spool.pending()] == [
        (first_id, "run-0"),
        (first_id, "run-1"),
        (own_id, "run-2"),
    ]
    assert spool.outgoing_id() == first_id


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(spools, tmp_path: Path):
    now = [1000.0]
    spool = spools(segment_bytes=400, kept_bytes=1000, kept_seconds=60.0, clock=lambda: now[0])
    fill(spool, 20)
    own_id = spool.status().spool_id
    spool.next_after(19, own_id)
    spool.acknowledge(own_id, 20)
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= 1000 + 400
    assert spool.find("run-0") is None
    assert spool.find("run-18") is not None
    now[0] += 61
    fill(spool, 3, first=20)
    spool.acknowledge(own_id, 23)
    assert spool.find("run-18") is None
    assert spool.find("run-22") is not None
    assert spool.status().dropped == 0


def test_what_is_kept_makes_room_for_what_waits(spools, tmp_path: Path):
    spool = spools(limit_bytes=2000, segment_bytes=400, kept_bytes=2000)
    fill(spool, 12)
    own_id = spool.status().spool_id
    spool.next_after(11, own_id)
    spool.acknowledge(own_id, 12)
    waiting = fill(spool, 12, first=12)
    assert sequences(spool) == waiting
    status = spool.status()
    assert (status.dropped, status.trouble) == (0, "")
    assert status.used_bytes <= 2000


def test_what_is_kept_is_given_up_when_the_disk_fills_up(spools, tmp_path: Path):
    disk = SimulatedDisk(tmp_path / "spool")
    spool = spools(segment_bytes=400, kept_bytes=1 << 20, free_share=0.5, disk=disk)
    fill(spool, 12)
    own_id = spool.status().spool_id
    spool.next_after(11, own_id)
    spool.acknowledge(own_id, 12)
    disk.free_bytes = lambda _path: 900
    (waiting,) = fill(spool, 1, first=12)
    assert sequences(spool) == [waiting]
    assert spool.status().trouble == ""
    assert spool.find("run-0") is None


def test_a_spool_that_is_told_so_takes_a_new_identity(spools, tmp_path: Path, caplog):
    spool = spools(kept_bytes=1 << 20)
    fill(spool, 5)
    own_id = spool.status().spool_id
    spool.next_after(4, own_id)
    spool.acknowledge(own_id, 3)
    spool.renew(own_id, 2)
    new_id = spool.status().spool_id
    assert new_id != own_id
    records = list(spool.pending())
    assert [(record.spool_id, record.sequence, record.run_id) for record in records] == [
        (new_id, number, f"run-{number - 1}") for number in range(2, 6)
    ]
    assert "from 2 on" in caplog.text
    assert spool.outgoing_id() == new_id
    # Whatever is said of the old one does not touch them.
    spool.acknowledge(own_id, 5)
    assert list(spool.pending()) == records
    spool.close()
    spool = spools(kept_bytes=1 << 20)
    assert list(spool.pending()) == records
    spool.reconcile(new_id, 0)
    spool.acknowledge(new_id, 5)
    assert sequences(spool) == []
    assert spool.append("run-9", b"later") == spools_next(records)


def spools_next(records: list[Record]) -> int:
    """The sequence that comes after a restart: numbers that were reserved are not used again."""
    return (1 << 16) + records[-1].sequence - 4


def test_a_new_identity_that_costs_results_leaves_those_that_are_held_to_be_read(spools):
    """The copies need room: what waits and is oldest makes it, also when it was to be copied next."""
    spool = spools(limit_bytes=1000)
    for run_id in ("copied", "held", "dropped"):
        spool.append(run_id, bytes(250))
    spool.hold("held")
    spool.renew(spool.status().spool_id, 1)
    assert [record.run_id for record in spool.pending()] == ["copied"]
    assert spool.status().dropped == 2
    record = spool.find("held")
    assert record is not None
    assert record.payload == bytes(250)


def test_a_spool_that_can_not_do_so_loses_nothing(spools, tmp_path: Path):
    disk = SimulatedDisk(tmp_path / "spool")
    spool = spools(disk=disk)
    fill(spool, 3)
    own_id = spool.status().spool_id
    disk.broken = True
    with pytest.raises(StorageError, match="can't take a new identity"):
        spool.renew(own_id, 1)
    disk.broken = False
    assert sequences(spool) == [1, 2, 3]
    spool.renew(own_id, 1)
    assert sequences(spool) == [1, 2, 3]
    assert {record.payload for record in spool.pending()} == {payload(number) for number in range(3)}


def test_a_result_that_is_refused_for_good_goes_is_counted_and_does_not_come_back(spools, caplog):
    spool = spools()
    fill(spool, 3)
    own_id = spool.status().spool_id
    spool.reject(own_id, 2, "run-1 has a time before 1970")
    assert sequences(spool) == [1, 3]
    assert spool.status().dropped == 1
    assert "run-1 for good: run-1 has a time before 1970" in caplog.text
    spool.reject(own_id, 2, "again")
    spool.acknowledge(own_id, 1)
    spool.reconcile(own_id, 1)
    assert sequences(spool) == [3]
    assert spool.status().dropped == 1
    spool.close()
    assert spools().status().dropped == 1


def test_a_spool_that_was_copied_takes_a_new_identity(spools, tmp_path: Path):
    spool = spools()
    fill(spool, 2)
    own_id = spool.status().spool_id
    assert spool.next_after(0, own_id) is not None
    spool.close()
    shutil.copytree(tmp_path / "spool", tmp_path / "image")
    # Life goes on, and the collector hears of it ...
    spool = spools()
    stored = fill(spool, 5, first=10)
    assert spool.next_after(stored[-2], own_id) is not None
    spool.acknowledge(own_id, stored[-1])
    spool.close()
    # ... until the card is written anew from the image, and starts a few times without a collector.
    shutil.rmtree(tmp_path / "spool")
    shutil.move(tmp_path / "image", tmp_path / "spool")
    for first in (20, 30):
        spool = spools()
        fill(spool, 2, first=first)
        spool.close()
    spool = spools()
    fill(spool, 1, first=40)
    assert len(sequences(spool)) == 7
    spool.reconcile(own_id, stored[-1])
    assert spool.status().spool_id != own_id
    records = list(spool.pending())
    # The first two may have been sent before the copy was made.
    assert [record.run_id for record in records] == ["run-20", "run-21", "run-30", "run-31", "run-40"]
    assert {record.spool_id for record in records} == {spool.status().spool_id} == {spool.outgoing_id()}
    new_id = spool.status().spool_id
    spool.reconcile(new_id, 0)
    assert len(sequences(spool)) == 5
    spool.close()
    spool = spools()
    assert list(spool.pending()) == records
    assert spool.status().spool_id == new_id


def test_a_spool_that_can_not_take_a_new_identity_loses_nothing(spools, tmp_path: Path):
    disk = SimulatedDisk(tmp_path / "spool")
    spool = spools(disk=disk)
    fill(spool, 3)
    own_id = spool.status().spool_id
    disk.broken = True
    with pytest.raises(StorageError, match="can't take a new identity"):
        spool.reconcile(own_id, 1000)
    assert sequences(spool) == [1, 2, 3]
    disk.broken = False
    spool.reconcile(own_id, 1000)
    assert sequences(spool) == [1, 2, 3]
    assert spool.outgoing_id() == spool.status().spool_id != own_id


# Bounds.


def test_the_oldest_results_are_dropped_and_counted_for_good(spools, caplog):
    spool = spools(limit_bytes=3000, segment_bytes=700)
    fill(spool, 40)
    status = spool.status()
    assert status.used_bytes <= 3000
    assert status.pending + status.dropped == 40
    assert status.dropped > 10
    kept = sequences(spool)
    assert kept == list(range(41 - status.pending, 41))
    assert "oldest results are dropped" in caplog.text
    spool.close()
    spool = spools(limit_bytes=3000, segment_bytes=700)
    assert spool.status().dropped == status.dropped
    assert sequences(spool) == kept


def test_the_segment_in_use_may_have_to_go_too(spools):
    spool = spools(limit_bytes=600, segment_bytes=100_000)
    fill(spool, 20)
    assert spool.status().used_bytes <= 600
    assert sequences(spool)[-1] == 20
    assert spool.status().pending + spool.status().dropped == 20


def test_acknowledged_results_are_not_counted_as_dropped(spools):
    spool = spools(limit_bytes=2000, segment_bytes=700)
    for number in range(40):
        fill(spool, 1, first=number)
        spool.acknowledge(spool.status().spool_id, number + 1)
    assert spool.status().dropped == 0


def test_a_full_disk_drops_nothing_that_is_safe(spools, tmp_path: Path, caplog):
    disk = SimulatedDisk(tmp_path / "spool")
    spool = spools(disk=disk, free_share=0.1)
    fill(spool, 2)
    disk.full = True
    fill(spool, 2, first=2)
    status = spool.status()
    assert (status.pending, status.dropped) == (4, 0)
    # The state is written in place, which a full disk allows.
    spool.reject(status.spool_id, 1, "no")
    assert "state can't be written" not in caplog.text
    assert [record.sequence for record in spool.pending()] == [2, 3, 4]
    assert "results stay in memory" in status.trouble
    assert "results stay in memory" in caplog.text
    assert [record.payload for record in spool.pending()] == [payload(number) for number in range(1, 4)]
    assert spool.find("run-3") is not None
    disk.full = False
    fill(spool, 1, first=4)
    assert spool.status().trouble == ""
    spool.close()
    spool = spools()
    assert spool.status().dropped == 1
    assert [record.payload for record in spool.pending()][-4:] == [payload(number) for number in range(1, 5)]


def test_a_spool_that_is_closed_leaves_the_folder_alone(spools, tmp_path: Path):
    spool = spools(segment_bytes=1)
    fill(spool, 3)
    own_id = spool.status().spool_id
    spool.close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "spool").iterdir()}
    spool.acknowledge(own_id, 2)
    spool.reject(own_id, 3, "no")
    spool.settle()
    assert {path.name: path.read_bytes() for path in (tmp_path / "spool").iterdir()} == before


def test_settle_brings_results_to_the_disk_when_it_is_back(spools, tmp_path: Path):
    disk = SimulatedDisk(tmp_path / "spool")
    spool = spools(disk=disk)
    disk.broken = True
    fill(spool, 3)
    spool.settle()
    assert spool.status().trouble
    assert segments(tmp_path) == []
    disk.broken = False
    spool.settle()
    assert spool.status().trouble == ""
    spool.close()
    assert [record.payload for record in spools().pending()] == [payload(number) for number in range(3)]


def test_memory_is_bounded_too(spools, tmp_path: Path, caplog):
    disk = SimulatedDisk(tmp_path / "spool")
    spool = spools(disk=disk, memory_limit_bytes=1000)
    disk.broken = True
    fill(spool, 25)
    status = spool.status()
    assert (status.pending, status.dropped) == (10, 15)
    assert status.used_bytes == 1000
    assert sequences(spool) == list(range(16, 26))
    assert "that of run run-14 is dropped" in caplog.text
    disk.broken = False
    spool.settle()
    spool.close()
    assert spools().status().dropped == 15


def test_a_result_larger_than_the_spool_stays_in_memory(spools):
    spool = spools(limit_bytes=1000)
    fill(spool, 3)
    fill(spool, 1, first=3, size=2000)
    assert sequences(spool) == [1, 2, 3, 4]
    assert "2" in spool.status().trouble
    spool.acknowledge(spool.status().spool_id, 4)
    spool.settle()
    assert spool.status().trouble == ""


def test_results_in_memory_are_acknowledged_and_refused_like_others(spools, tmp_path: Path):
    disk = SimulatedDisk(tmp_path / "spool")
    spool = spools(disk=disk)
    disk.broken = True
    fill(spool, 4)
    spool.acknowledge(spool.status().spool_id, 2)
    spool.reject(spool.status().spool_id, 3, "no")
    assert sequences(spool) == [4]
    assert spool.status().used_bytes == 100


# Damage.


def test_a_torn_end_costs_only_itself(spools, tmp_path: Path, caplog):
    spool = spools()
    fill(spool, 3)
    spool.close()
    (file,) = segments(tmp_path)
    for cut in range(1, 100, 7):
        whole = file.read_bytes()
        file.write_bytes(whole[:-cut])
        spool = spools()
        assert sequences(spool) == [1, 2]
        spool.close()
        file.write_bytes(whole)
    assert "ends with a damaged record" in caplog.text


@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_never_makes_a_wrong_result(tmp_path_factory, position: float, flip: int):
    root = tmp_path_factory.mktemp("flip") / "spool"
    spool = Spool(root, 1 << 20, 1.0)
    fill(spool, 4, size=30)
    spool.close()
    file = next(root.glob("*.seg"))
    data = bytearray(file.read_bytes())
    data[int(position * len(data))] ^= flip
    file.write_bytes(data)
    spool = Spool(root, 1 << 20, 1.0)
    found = [(record.sequence, record.payload) for record in spool.pending()]
    assert found == [(number + 1, payload(number, 30)) for number in range(len(found))]
    assert len(found) < 4
    assert fill(spool, 1)[0] > 4
    spool.close()


def test_old_records_of_another_segment_are_no_records_of_this_one(spools, tmp_path: Path):
    spool = spools(segment_bytes=1)
    fill(spool, 4)
    *_, third, last = segments(tmp_path)
    stale = third.read_bytes()[HEADER_BYTES:]
    third.unlink()
    spool.close()
    last.write_bytes(last.read_bytes() + stale)
    assert sequences(spools(segment_bytes=1)) == [1, 2, 4]


@pytest.mark.parametrize(
    "damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"BBSPOOL\x01")]
)
def test_a_missing_segment_costs_only_itself(spools, tmp_path: Path, damage: Callable[[Path], object]):
    spool = spools(segment_bytes=1)
    fill(spool, 5)
    spool.close()
    damage(segments(tmp_path)[2])
    spool = spools(segment_bytes=1)
    assert sequences(spool) == [1, 2, 4, 5]
    spool.acknowledge(spool.status().spool_id, 5)
    assert segments(tmp_path) == []


def test_a_result_that_the_disk_loses_is_counted_and_the_rest_goes_on(spools, tmp_path: Path, caplog):
    spool = spools(segment_bytes=1)
    fill(spool, 3)
    segments(tmp_path)[1].write_bytes(b"")
    assert [record.sequence for record in spool.pending()] == [1, 3]
    assert spool.status().dropped == 1
    assert "lost the result of run run-1" in caplog.text
    assert spool.find("run-1") is None


@pytest.mark.parametrize("slot", [0, 4096])
def test_a_torn_state_slot_costs_nothing_that_matters(spools, tmp_path: Path, slot: int):
    spool = spools()
    fill(spool, 3)
    own_id = spool.status().spool_id
    spool.acknowledge(own_id, 3)
    spool.close()
    with (tmp_path / "spool" / "state").open("r+b") as file:
        file.seek(slot + 20)
        file.write(b"torn")
    spool = spools()
    assert spool.status().spool_id == own_id
    assert fill(spool, 1, first=9)[0] > 3
    assert sequences(spool)[-1] > 3


def test_when_the_state_is_lost_new_results_get_a_new_identity(spools, tmp_path: Path, caplog):
    spool = spools()
    fill(spool, 2)
    old_id = spool.status().spool_id
    spool.close()
    (tmp_path / "spool" / "state").write_bytes(b"\xff" * 8192)
    spool = spools()
    new_id = spool.status().spool_id
    assert new_id != old_id
    assert "state is lost" in caplog.text
    fill(spool, 1, first=2)
    assert [(record.spool_id, record.run_id) for record in spool.pending()] == [
        (old_id, "run-0"),
        (old_id, "run-1"),
        (new_id, "run-2"),
    ]
    assert spool.outgoing_id() == old_id
    assert spool.next_after(2, old_id) is None
    spool.acknowledge(old_id, 2)
    assert spool.outgoing_id() == new_id
    record = spool.next_after(0, new_id)
    assert record is not None
    assert record.run_id == "run-2"
    spool.close()
    assert spools().status().spool_id == new_id


def test_when_all_is_lost_it_is_another_spool(spools, tmp_path: Path):
    spool = spools()
    fill(spool, 2)
    old_id = spool.status().spool_id
    spool.close()
    shutil.rmtree(tmp_path / "spool")
    spool = spools()
    assert spool.status().spool_id != old_id
    assert fill(spool, 1) == [1]


def test_a_disk_that_is_read_only_from_the_start_still_gives_and_takes(spools, tmp_path: Path):
    spool = spools()
    fill(spool, 2)
    own_id = spool.status().spool_id
    spool.close()
    disk = SimulatedDisk(tmp_path / "spool")
    disk.broken = True
    spool = spools(disk=disk)
    fill(spool, 1, first=2)
    records = list(spool.pending())
    assert [record.run_id for record in records] == ["run-0", "run-1", "run-2"]
    # The disk does not know that the number of the last was used, so it must be nobody else's.
    assert [record.spool_id == own_id for record in records] == [True, True, False]


def test_an_append_that_fails_half_way_is_done_again_elsewhere(spools, tmp_path: Path):
    class OneFailure(SimulatedDisk):
        failures = 0

        def sync(self, descriptor: int) -> None:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, "Input/output error")
            super().sync(descriptor)

    disk = OneFailure(tmp_path / "spool")
    spool = spools(disk=disk)
    fill(spool, 1)
    disk.failures = 1
    fill(spool, 1, first=1)
    assert "Input/output error" in spool.status().trouble
    fill(spool, 1, first=2)
    assert spool.status().trouble == ""
    assert len(segments(tmp_path)) == 2
    spool.close()
    assert [record.payload for record in spools().pending()] == [payload(number) for number in range(3)]


# Power cuts and kills.


@dataclass
class Collector:
    """Keeps a high-water mark per identity, as the real one does; never stores behind it."""

    marks: dict[str, int] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    # The same run under another key. The real one knows it by its run id.
    twice: list[str] = field(default_factory=list)

    def take(self, record: Record) -> None:
        if record.sequence > self.marks.get(record.spool_id, 0):
            self.marks[record.spool_id] = record.sequence
            if self.stored.setdefault(record.run_id, record.payload) is not record.payload:
                self.twice.append(record.run_id)
                assert self.stored[record.run_id] == record.payload

    def session(self, spool: Spool, most: int, acknowledges: bool) -> None:
        """A stream over which so many results go, and whose acknowledgements may be lost."""
        spool_id = spool.outgoing_id()
        try:
            spool.reconcile(spool_id, self.marks.get(spool_id, 0))
        except StorageError:
            return
        sequence = 0
        for _ in range(most):
            record = spool.next_after(sequence, spool_id)
            if record is None:
                break
            sequence = record.sequence
            self.take(record)
        if acknowledges:
            spool.acknowledge(spool_id, self.marks.get(spool_id, 0))


ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 40, 400, 1500])),
    st.tuples(st.just("send"), st.integers(0, 4)),
    st.tuples(st.just("send, no answer"), st.integers(1, 4)),
    st.tuples(st.just("disk full"), st.booleans()),
    st.tuples(st.just("disk broken"), st.booleans()),
    st.tuples(st.just("settle"), st.just(0)),
    st.tuples(st.just("hold"), st.integers(0, 3)),
    st.tuples(st.just("release"), st.just(0)),
)
LIVES = st.lists(
    st.tuples(st.lists(ACTIONS, max_size=12), st.sampled_from(["stop", "kill", "cut"]), st.integers(0, 60)),
    min_size=1,
    max_size=4,
)


@given(lives=LIVES, seed=st.integers(0, 1 << 32))
@example(
    # Sent from memory, never on the disk: its number must not be used again.
    lives=[
        ([("append", 40), ("disk full", True), ("append", 40), ("send", 4)], "kill", 0),
        ([("append", 40), ("append", 40)], "stop", 0),
    ],
    seed=0,
)
@example(
    lives=[
        ([("disk broken", True), ("append", 40), ("send", 4)], "cut", 60),
        ([("append", 40)], "stop", 0),
    ],
    seed=0,
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_result_is_stored_once_whatever_ends_the_agent(caplog, tmp_path_factory, lives, seed: int):
    caplog.set_level(logging.CRITICAL)
    folder = tmp_path_factory.mktemp("lives")
    rng = random.Random(seed)
    collector = Collector()
    appended: dict[str, bytes] = {}
    safe: set[str] = set()
    keys: set[tuple[str, int]] = set()
    root = folder / "0"
    for life, (actions, ending, steps) in enumerate(lives):
        disk = SimulatedDisk(root)
        disk.steps_left = steps if ending == "cut" else None
        spool: Spool | None = None
        in_memory: set[str] = set()
        held: set[str] = set()
        try:
            spool = Spool(root, 1 << 20, 1.0, segment_bytes=600, disk=disk)
            for name, argument in actions:
                if name == "append":
                    run_id = f"run-{len(appended)}"
                    appended[run_id] = payload(len(appended), argument)
                    sequence = spool.append(run_id, appended[run_id])
                    key = (spool.status().spool_id, sequence)
                    assert key not in keys
                    keys.add(key)
                    in_memory.add(run_id)
                elif name == "settle":
                    spool.settle()
                elif name == "hold":
                    run_id = f"run-{len(appended) - 1 - argument}"
                    if spool.hold(run_id):
                        held.add(run_id)
                elif name == "release":
                    for run_id in held:
                        spool.release(run_id)
                    held = set()
                elif name == "disk full":
                    disk.full = argument
                elif name == "disk broken":
                    disk.broken = argument
                else:
                    collector.session(spool, argument, name == "send")
                if not spool.status().trouble:
                    safe |= in_memory
                    in_memory = set()
                for run_id in held:
                    found = spool.find(run_id)
                    assert found is not None
                    assert found.payload == appended[run_id]
            if ending == "stop":
                spool.close()
        except PowerCut:
            pass
        target = folder / str(life + 1)
        if ending == "cut":
            disk.after_power_cut(target, rng)
        else:
            disk.after_kill(target)
        disk.dead = True
        if spool is not None:
            spool.close()
        root = target
    spool = Spool(root, 1 << 20, 1.0)
    order = sequences(spool)
    assert order == sorted(set(order))
    run_id = "the last"
    appended[run_id] = b"x"
    sequence = spool.append(run_id, b"x")
    assert (spool.status().spool_id, sequence) not in keys
    assert sequence > max(order, default=0)
    safe.add(run_id)
    while spool.status().pending:
        collector.session(spool, 3, acknowledges=True)
    assert spool.status().dropped == 0
    spool.close()
    assert safe - collector.stored.keys() == set()
    if not any(action == ("disk broken", True) for actions, _, _ in lives for action in actions):
        # What is sent while the disk takes no state may be sent again under a new identity.
        assert collector.twice == []
    for run_id, data in collector.stored.items():
        assert appended[run_id] == data


WRITER = """
    import os, pathlib, random, sys, zlib
    from boardbench.agent.spool import Spool

    root, life = pathlib.Path(sys.argv[1]), sys.argv[2]
    spool = Spool(root, 1 << 30, 1.0, segment_bytes=20_000)
    rng = random.Random(life)
    number = 0
    while True:
        data = rng.randbytes(rng.choice([10, 300, 3000, 30000]))
        sequence = spool.append(f"{life}-{number}", data)
        os.write(1, f"{sequence} {life}-{number} {zlib.crc32(data)}\\n".encode())
        number += 1
"""


def test_a_writer_that_is_killed_at_random_loses_nothing_that_append_returned_for(tmp_path: Path):
    root = tmp_path / "spool"
    rng = random.Random(7)
    told: list[tuple[int, str, int]] = []
    lives = 12
    for life in range(lives):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(root), str(life)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            for _ in range(rng.randrange(1, 60)):
                writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().decode()
        # What was written before the kill and read after it counts as well; a line is written at once.
        told_now = rest.splitlines()
        for line in told_now:
            sequence, run_id, crc = line.split()
            told.append((int(sequence), run_id, int(crc)))
        if rng.random() < 0.5:
            with sorted(root.glob("*.seg"))[-1].open("ab") as file:
                file.write(rng.randbytes(rng.randrange(1, 5000)))
    spool = Spool(root, 1 << 30, 1.0)
    records = list(spool.pending())
    spool.close()
    order = [record.sequence for record in records]
    assert order == sorted(set(order))
    found = {record.run_id: record for record in records}
    assert len(found) == len(records)
    for sequence, run_id, crc in told:
        assert (found[run_id].sequence, zlib.crc32(found[run_id].payload)) == (sequence, crc)
    for life in range(lives):
        numbers = [
            int(record.run_id.split("-")[1]) for record in records if record.run_id.startswith(f"{life}-")
        ]
        assert numbers == list(range(len(numbers)))
