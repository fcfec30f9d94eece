"""The journal of runs: a result is written once, by the spool, and stays to be read."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.agent import folder
from boardbench.agent.journal import Journal, Order, Recovered
from boardbench.agent.spool import Disk, Spool
from boardbench.v1 import model_pb2, result_pb2

NOW = Timestamp(seconds=1_790_000_000)
SUCCEEDED = result_pb2.RUN_STATUS_SUCCEEDED


def order(run_id: str) -> Order:
    model = model_pb2.Model(sha256="ab" * 32, name="m.tflite", format="tflite", size_bytes=7)
    return Order(run_id, model, result_pb2.BenchmarkSpec(min_runs=3), NOW)


def result_of(run_id: str, size: int = 100) -> result_pb2.RunResult:
    asked = order(run_id)
    result = result_pb2.RunResult(
        run_id=run_id, model=asked.model, spec=asked.spec, created_at=NOW, status=SUCCEEDED
    )
    result.error.message = random.Random(run_id).randbytes(size // 2).hex()
    return result


@dataclass
class Board:
    """The folders of an agent, and what of the agent writes to them."""

    root: Path
    kept_limit: int
    runs_bytes: int
    spool_options: dict[str, object]
    spool: Spool = field(init=False)
    journal: Journal = field(init=False)

    def begin(self) -> Recovered:
        options: dict[str, object] = {"limit_bytes": 1 << 30, "free_share": 1.0} | self.spool_options
        self.spool = Spool(self.root / "spool", **options)  # type: ignore[arg-type]
        self.journal = Journal(self.root / "runs", self.kept_limit, self.runs_bytes, self.spool)
        return self.journal.recover()

    def again(self) -> Recovered:
        """A new life; a kill leaves the same files as an end does here: nothing is written at the end."""
        self.spool.close()
        return self.begin()

    def accept(self, run_id: str) -> None:
        self.journal.accept(order(run_id))
        self.journal.start(run_id, NOW)
        self.journal.stage(run_id, result_pb2.STAGE_MEASURE)

    def run(self, run_id: str, size: int = 100) -> result_pb2.RunResult:
        """A run from its acceptance to its end."""
        self.accept(run_id)
        result = result_of(run_id, size)
        self.spool.append(run_id, result.SerializeToString())
        self.journal.end(result, 12)
        return result

    def acknowledge(self) -> None:
        self.spool.acknowledge(self.spool.status().spool_id, 1 << 40)

    def copies(self, result: result_pb2.RunResult) -> int:
        """How often the result is in the files."""
        return sum(
            path.read_bytes().count(result.error.message.encode())
            for path in self.root.rglob("*")
            if path.is_file()
        )


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[Callable[..., Board]]:
    made: list[Board] = []

    def make(kept_limit: int = 64, runs_bytes: int = 1 << 30, **options: object) -> Board:
        made.append(Board(tmp_path, kept_limit, runs_bytes, options))
        made[-1].begin()
        return made[-1]

    yield make
    for board in made:
        board.spool.close()


def ids(recovered: Recovered) -> list[str]:
    return [ended.order.run_id for ended in recovered.ended]


def test_a_result_is_written_once_and_read_from_the_spool(boards: Callable[..., Board]) -> None:
    board = boards()
    result = board.run("one", 10_000)
    assert board.copies(result) == 1
    assert board.journal.result("one") == result
    assert board.journal.kept() == {"one"}
    recovered = board.again()
    (ended,) = recovered.ended
    assert (ended.order, ended.status, ended.last_sequence) == (order("one"), SUCCEEDED, 12)
    assert ended.size_bytes >= 10_000
    assert not recovered.unfinished
    assert board.journal.result("one") == result


@pytest.mark.parametrize("step", ["write_all", "sync"])
def test_a_run_that_could_not_be_accepted_is_not_begun_by_the_next_start(
    boards: Callable[..., Board], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Who asked for it was told so."""
    board = boards()

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(folder, step, fails)
        with pytest.raises(OSError, match="Input/output error"):
            board.journal.accept(order("one"))
    assert list((board.root / "runs").iterdir()) == []
    assert not board.again().unfinished


def test_what_a_kill_left_half_written_goes(boards: Callable[..., Board]) -> None:
    board = boards()
    board.run("one")
    torn = board.root / "runs" / "two.result.tmp"
    torn.write_bytes(b'{"run_id"')
    assert ids(board.again()) == ["one"]
    assert not torn.exists()


def test_a_result_stays_when_the_collector_has_it_though_the_spool_keeps_nothing(
    boards: Callable[..., Board],
) -> None:
    board = boards(segment_bytes=2_000, kept_bytes=0, kept_limit=3)
    results = [board.run(f"r{number}", 1500) for number in range(6)]
    board.acknowledge()
    for result in results[-3:]:
        assert board.journal.result(result.run_id) == result
    assert [board.journal.result(f"r{number}") for number in range(3)] == [None] * 3
    assert board.copies(results[0]) == 0, "what nobody wants leaves the disk"
    assert ids(board.again()) == ["r3", "r4", "r5"]
    board.acknowledge()
    board.run("r6", 1500)
    board.acknowledge()
    assert [board.journal.result(result.run_id) for result in results[-3:]] == [None, *results[-2:]]


def test_runs_that_end_at_one_time_stay_in_the_order_of_their_results(boards: Callable[..., Board]) -> None:
    board = boards()
    names = [f"r{number * 7919 % 31}" for number in range(31)]
    for name in names:
        board.run(name)
    for path in (board.root / "runs").iterdir():
        os.utime(path, ns=(0, 10**18))
    assert ids(board.again()) == names


def test_a_run_that_was_never_accepted_leaves_nothing(
    boards: Callable[..., Board], caplog: pytest.LogCaptureFixture
) -> None:
    board = boards()
    (board.root / "runs" / "begun.jsonl").touch()  # killed between making the file and the first line
    recovered = board.again()
    assert (recovered.unfinished, recovered.ended, caplog.text) == ([], [], "")
    assert list((board.root / "runs").iterdir()) == []


def test_a_result_stays_longer_than_the_spool_keeps_what_is_acknowledged(
    boards: Callable[..., Board],
) -> None:
    clock = [1e9]
    board = boards(segment_bytes=2_000, kept_bytes=1 << 20, kept_seconds=60.0, clock=lambda: clock[0])
    first, second = board.run("first", 1500), board.run("second", 1500)
    board.acknowledge()
    clock[0] += 1e6
    third = board.run("third", 1500)
    board.acknowledge()
    for result in (first, second, third):
        assert board.journal.result(result.run_id) == result


def test_results_that_are_held_take_no_room_from_those_that_wait(boards: Callable[..., Board]) -> None:
    board = boards(limit_bytes=6_000, segment_bytes=2_000, kept_bytes=0)
    done = [board.run(f"done-{number}", 1500) for number in range(3)]
    board.acknowledge()
    waiting = [board.run(f"waits-{number}", 1500) for number in range(3)]
    assert board.spool.status().dropped == 0
    assert board.spool.status().used_bytes <= 6_000
    assert [record.run_id for record in board.spool.pending()] == ["waits-0", "waits-1", "waits-2"]
    for result in (*done, *waiting):
        assert board.journal.result(result.run_id) == result


def test_what_a_full_spool_drops_can_be_read_still(
    boards: Callable[..., Board], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    board = boards(limit_bytes=6_000, segment_bytes=2_000)
    results = [board.run(f"r{number}", 1500) for number in range(8)]
    status = board.spool.status()
    assert status.pending + status.dropped == 8
    assert status.dropped >= 4
    assert status.used_bytes <= 6_000
    for result in results:
        assert board.journal.result(result.run_id) == result
    # It was given up, and is not offered to the collector at the next greeting.
    pending = status.pending
    board.spool.reconcile(status.spool_id, 0)
    assert board.spool.status().pending == pending
    assert ids(board.again()) == [result.run_id for result in results]
    for result in results:
        assert board.journal.result(result.run_id) == result


def test_what_the_collector_refuses_can_be_read_still(
    boards: Callable[..., Board], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    board = boards()
    result = board.run("refused")
    board.spool.reject(board.spool.status().spool_id, 1, "no")
    assert board.spool.status().pending == 0
    assert board.journal.result("refused") == result


def test_results_are_bounded_by_their_bytes(boards: Callable[..., Board]) -> None:
    board = boards(runs_bytes=5_000)
    for number in range(5):
        board.run(f"r{number}", 2_000)
    assert board.journal.kept() == {"r3", "r4"}
    assert sorted(path.name for path in (board.root / "runs").iterdir()) == ["r3.jsonl", "r4.jsonl"]


class Failing(Disk):
    """A disk under the spool that takes nothing."""

    broken = False

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        if self.broken:
            raise OSError(5, "Input/output error")
        super().write(descriptor, data, offset)


def test_a_result_that_the_spool_can_not_write_is_kept_here(
    boards: Callable[..., Board], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    disk = Failing()
    board = boards(disk=disk)
    disk.broken = True
    result = board.run("alone")
    assert board.spool.status().trouble
    assert board.copies(result) == 1
    board.acknowledge()
    assert board.spool.find("alone") is None
    assert board.journal.result("alone") == result
    disk.broken = False
    (ended,) = board.again().ended
    assert (ended.order, ended.status, ended.last_sequence) == (order("alone"), SUCCEEDED, 12)
    assert board.journal.result("alone") == result


def test_the_files_of_former_versions_are_read(boards: Callable[..., Board]) -> None:
    board = boards(kept_limit=2)
    asked, old = order("old"), result_of("old")
    head = {
        "run_id": "old",
        "model": json_format.MessageToDict(asked.model, preserving_proto_field_name=True),
        "spec": json_format.MessageToDict(asked.spec, preserving_proto_field_name=True),
        "created_at": NOW.ToJsonString(),
        "status": "RUN_STATUS_SUCCEEDED",
        "last_sequence": 9,
    }
    path = board.root / "runs" / "old.result"
    path.write_bytes(json.dumps(head).encode() + b"\n" + old.SerializeToString())
    # As after a kill between the result and the removal of the steps.
    path.with_suffix(".jsonl").write_text(json.dumps({name: head[name] for name in list(head)[:4]}) + "\n")
    (ended,) = board.again().ended
    assert (ended.order, ended.status, ended.last_sequence) == (asked, SUCCEEDED, 9)
    assert not path.with_suffix(".jsonl").exists()
    assert board.journal.result("old") == old
    new = [board.run("new-1"), board.run("new-2")]
    assert board.journal.kept() == {"new-1", "new-2"}, "and leave as the others do"
    assert not path.exists()
    assert [board.journal.result(result.run_id) for result in new] == new


def test_a_run_whose_last_line_was_lost_has_ended_by_the_spool(boards: Callable[..., Board]) -> None:
    """What a power cut may leave: the line of the end is not synced."""
    board = boards()
    result = board.run("cut")
    path = board.root / "runs" / "cut.jsonl"
    whole = path.read_bytes()
    start = whole.index(b'{"ended"')
    for length in (start, start + 5, len(whole) - 2):
        path.write_bytes(whole[:length] + bytes(len(whole) - length))
        recovered = board.again()
        assert not recovered.ended
        (unfinished,) = recovered.unfinished
        assert unfinished.last_sequence > 12
        record = board.spool.find("cut")
        assert record is not None
        assert result_pb2.RunResult.FromString(record.payload) == result


def test_a_run_whose_result_the_disk_has_lost_is_forgotten(
    boards: Callable[..., Board], caplog: pytest.LogCaptureFixture
) -> None:
    board = boards()
    board.run("lost")
    board.spool.close()
    for path in (board.root / "spool").glob("*.seg"):
        path.unlink()
    recovered = board.begin()
    assert not recovered.ended
    assert not recovered.unfinished
    assert "lost.jsonl: its result is not in the spool" in caplog.text
    assert board.journal.result("lost") is None
    assert list((board.root / "runs").iterdir()) == []


def test_a_run_is_remembered_while_the_spool_can_not_be_read(
    boards: Callable[..., Board], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    board = boards()
    result = board.run("there")
    listed = Path.iterdir

    def fail(path: Path) -> Iterator[Path]:
        if path.name == "spool":
            raise OSError(5, "Input/output error")
        return listed(path)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "iterdir", fail)
        assert not board.again().ended
    assert ids(board.again()) == ["there"]
    assert board.journal.result("there") == result


LIFE = """
    import os, pathlib, sys
    from boardbench.agent.journal import Journal, Order
    from boardbench.agent.spool import Spool
    from boardbench.v1 import model_pb2, result_pb2
    from google.protobuf.timestamp_pb2 import Timestamp

    root, life = pathlib.Path(sys.argv[1]), sys.argv[2]
    spool = Spool(root / "spool", 1 << 30, 1.0, segment_bytes=20_000)
    journal = Journal(root / "runs", 8, 1 << 20, spool)
    now = Timestamp(seconds=1)

    def end(run_id, sequence):
        result = result_pb2.RunResult.FromString(spool.find(run_id).payload)
        journal.end(result, sequence)
        os.write(1, f"ended {run_id}\\n".encode())

    recovered = journal.recover()
    for ended in recovered.ended:
        assert journal.result(ended.order.run_id).run_id == ended.order.run_id
    for unfinished in recovered.unfinished:
        run_id = unfinished.order.run_id
        if spool.find(run_id) is None:
            assert unfinished.order.spec.min_runs == 1
            result = result_pb2.RunResult(run_id=run_id, status=result_pb2.RUN_STATUS_FAILED)
            spool.append(run_id, result.SerializeToString())
        end(run_id, unfinished.last_sequence)
    number = 0
    while True:
        run_id = f"{life}-{number}"
        journal.accept(Order(run_id, model_pb2.Model(), result_pb2.BenchmarkSpec(min_runs=1), now))
        os.write(1, f"accepted {run_id}\\n".encode())
        journal.start(run_id, now)
        result = result_pb2.RunResult(run_id=run_id, status=result_pb2.RUN_STATUS_SUCCEEDED)
        result.error.message = "x" * (number * 977 % 5000)
        spool.append(run_id, result.SerializeToString())
        end(run_id, 5)
        if number % 3 == 2:
            first = spool.next_after(0, spool.outgoing_id())
            os.write(1, f"stored {first.run_id}\\n".encode())
            spool.acknowledge(spool.outgoing_id(), first.sequence)
        number += 1
"""


def test_an_agent_that_is_killed_at_random_ends_every_run_once(tmp_path: Path) -> None:
    rng = random.Random(3)
    accepted: list[str] = []
    stored: set[str] = set()
    for life in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(LIFE), str(tmp_path), str(life)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as agent:
            assert agent.stdout is not None
            assert agent.stderr is not None
            lines = [agent.stdout.readline() for _ in range(rng.randrange(1, 80))]
            agent.send_signal(signal.SIGKILL)
            lines += agent.stdout.readlines()
            assert agent.stderr.read() == b""
        accepted += [line.split()[1].decode() for line in lines if line.startswith(b"accepted")]
        stored |= {line.split()[1].decode() for line in lines if line.startswith(b"stored")}
    assert len(accepted) == len(set(accepted))
    spool = Spool(tmp_path / "spool", 1 << 30, 1.0)
    journal = Journal(tmp_path / "runs", 8, 1 << 20, spool)
    recovered = journal.recover()
    waiting = {unfinished.order.run_id for unfinished in recovered.unfinished}
    ended = ids(recovered)
    assert len(ended) <= 9
    assert not waiting & set(ended)
    for run_id in ended:
        found = journal.result(run_id)
        assert found is not None
        assert found.run_id == run_id
    # Nothing twice, nothing lost: the collector has it, or it is on its way there, or it is still to end.
    records = list(spool.pending())
    runs = [record.run_id for record in records]
    assert len(runs) == len(set(runs))
    sequences = [record.sequence for record in records]
    assert sequences == sorted(set(sequences))
    to_end = {run_id for run_id in waiting if spool.find(run_id) is None}
    assert len(to_end) <= 1
    assert set(accepted) <= stored | set(runs) | to_end
    assert len(stored) > 10
    assert list((tmp_path / "runs").iterdir())
    spool.close()
