"""What a result costs the flash of a board: bytes written for each, beside other ways to keep it."""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp
from report import Check, Report, note, run

from boardbench.agent.journal import Journal, Order
from boardbench.agent.spool import Spool
from boardbench.v1 import model_pb2, result_pb2

# Some hundred inferences, some thousand, a hundred thousand: what results have.
_SIZES = (10_000, 40_000, 400_000)
_RESULTS = 200
_LIMIT = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("spool")
    group.add_argument(
        "--spool-results", type=int, default=_RESULTS, help=f"of each size (default {_RESULTS})"
    )


def measure(arguments: argparse.Namespace) -> Report:
    rows: list[list[object]] = []
    checks = []
    count = arguments.spool_results
    with tempfile.TemporaryDirectory(prefix="boardbench-", dir=os.environ.get("TMPDIR")) as folder:
        for size in _SIZES:
            payload = os.urandom(size)
            note(f"spool: {count} results of {size:,} bytes")
            found = [
                written(way, Path(folder) / f"{way.__name__}-{size}", payload, count) / (size * count)
                for way in (spooled, run_whole, file_each, sqlite_each)
            ]
            rows.append([f"{size:,} bytes", *(f"{ratio:.2f} ×" for ratio in found)])
            checks.append(Check(f"written by the spool for {size:,} bytes", found[0], _LIMIT, "×"))
            checks.append(
                Check(f"written by spool and journal of runs for {size:,} bytes", found[1], _LIMIT, "×")
            )
    return Report(
        "flash writes",
        f"bytes written a result, as a multiple of it (/proc/self/io: pages of the file system, without "
        f"its own journal); {count} results each, synced one by one, acknowledged one by one",
        (
            "a result of",
            "spool",
            "spool and journal of runs",
            "a file each, renamed into place",
            "a row each, SQLite (WAL, FULL)",
        ),
        rows,
        checks,
    )


def written(way: Callable[[Path, bytes, int], None], folder: Path, payload: bytes, count: int) -> int:
    """Bytes that this process had the kernel write while ``way`` kept so many results."""
    folder.mkdir()
    before = _write_bytes()
    way(folder, payload, count)
    return _write_bytes() - before


def _write_bytes() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    # Pages of files that were removed before they were written.
    return int(lines["write_bytes"]) - int(lines["cancelled_write_bytes"])


def spooled(folder: Path, payload: bytes, count: int) -> None:
    spool = Spool(folder, 1 << 30, 1.0, kept_bytes=16 << 20)
    for number in range(count):
        sequence = spool.append(f"run-{number}", payload)
        _acknowledged(spool, sequence)
    spool.close()


def run_whole(folder: Path, payload: bytes, count: int) -> None:
    """All that the agent writes for a run: its order, its steps, its result and that it has ended."""
    spool = Spool(folder / "spool", 1 << 30, 1.0, kept_bytes=16 << 20)
    journal = Journal(folder / "runs", 64, 64 << 20, spool)
    now = Timestamp()
    now.GetCurrentTime()
    for number in range(count):
        run_id = f"run-{number}"
        model = model_pb2.Model(sha256="0" * 64, name="model.tflite", size_bytes=len(payload))
        journal.accept(Order(run_id, model, result_pb2.BenchmarkSpec(), now))
        journal.start(run_id, now)
        for stage in (1, 2, 3, 4, 5, 6, 7, 8):
            journal.stage(run_id, result_pb2.Stage.ValueType(stage))
        sequence = spool.append(run_id, payload)
        result = result_pb2.RunResult(run_id=run_id, model=model, created_at=now)
        journal.end(result, 10)
        # As the kernel does half a minute later; by then more than these have ended here.
        with (folder / "runs" / f"{run_id}.jsonl").open("ab") as steps:
            os.fdatasync(steps.fileno())
        _acknowledged(spool, sequence)
    spool.close()


def _acknowledged(spool: Spool, sequence: int) -> None:
    own = spool.status().spool_id
    assert spool.next_after(sequence - 1, own) is not None
    spool.acknowledge(own, sequence)


def file_each(folder: Path, payload: bytes, count: int) -> None:
    from boardbench.agent.folder import replace

    for number in range(count):
        path = folder / f"{number:08d}"
        replace(path, payload)
        path.unlink()


def sqlite_each(folder: Path, payload: bytes, count: int) -> None:
    database = sqlite3.connect(folder / "spool.db", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE spool (sequence INTEGER PRIMARY KEY, payload BLOB NOT NULL)")
    for number in range(count):
        database.execute("INSERT INTO spool VALUES (?, ?)", (number, payload))
        database.execute("DELETE FROM spool WHERE sequence = ?", (number,))
    database.close()


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__, section="spool"))
