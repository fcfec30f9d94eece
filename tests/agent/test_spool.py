"""The spool: what append has returned for reaches the collector, once and in order."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from boardbench.agent.errors import ConfigurationError, StorageError, Unavailable
from boardbench.agent.spool import Record

from .spools import SimulatedDisk, fill, payload, segments, sequences

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
