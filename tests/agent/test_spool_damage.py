"""Files that are damaged, lives that are cut off at any step: the spool loses nothing that was safe."""

from __future__ import annotations

import errno
import logging
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from boardbench.agent.errors import StorageError
from boardbench.agent.spool import Record, Spool

from .spools import PowerCut, SimulatedDisk, fill, payload, segments, sequences

# Of a segment: magic, epoch, identity, CRC-32.
HEADER_BYTES = 8 + 8 + 16 + 4


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


@pytest.mark.parametrize("step", ["free_bytes", "create", "write", "sync"])
def test_a_copy_that_fails_for_a_new_identity_costs_nothing(spools, tmp_path: Path, step: str):
    disk = SimulatedDisk(tmp_path / "spool")
    spool = spools(disk=disk)
    fill(spool, 1)
    former = spool.outgoing_id()

    def fail(*_: object) -> int:
        if step == "free_bytes":
            return 0
        raise OSError(errno.EIO, "Input/output error")

    setattr(disk, step, fail)
    with pytest.raises(StorageError, match="can't take a new identity"):
        spool.renew(former, 1)
    delattr(disk, step)
    spool.close()
    assert [record.payload for record in spools().pending()] == [payload(0)]


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
@example(
    # A new identity on a disk that is full: what is to be copied is nowhere else.
    lives=[
        ([("append", 40), ("disk broken", True), ("send", 1)], "stop", 0),
        ([("disk full", True), ("send", 0), ("send", 0)], "stop", 0),
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
