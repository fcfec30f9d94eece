"""Runs on disk: what was accepted, what was started, how it ended. An agent that was killed goes on from it.

    <run id>.jsonl     a line for each step, the first and the start synced; of the ended ones the latest stay
    <run id>.result    instead, when the result is not on the spool's disk: a line of JSON, then the RunResult

A result is written once, by the spool, which keeps it for as long as its run is here. A run whose steps are
here and whose result is in the spool has ended, whatever the last line says: that one is not synced.
Former versions wrote a ``.result`` for every run; these are read as well.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.agent import folder
from boardbench.agent.spool import Spool
from boardbench.v1 import model_pb2, result_pb2

_log = logging.getLogger(__name__)

# Each life of the agent numbers a run's events from a base of its own, far above what the last life can
# have sent: four a second for the longest run are a third of it.
_EVENTS_A_LIFE = 1_000_000


@dataclass(frozen=True)
class Order:
    """A run as it was accepted."""

    run_id: str
    model: model_pb2.Model
    spec: result_pb2.BenchmarkSpec
    created_at: Timestamp


@dataclass
class Unfinished:
    """A run that a former life of the agent left waiting or running."""

    order: Order
    started_at: Timestamp | None = None
    stage: int = result_pb2.STAGE_UNSPECIFIED
    # Events of this life are numbered from the next on.
    last_sequence: int = 0


@dataclass(frozen=True)
class Ended:
    """A run that has ended, without its figures."""

    order: Order
    status: int
    # Of the last event, which carries the result.
    last_sequence: int
    size_bytes: int


@dataclass
class Recovered:
    """What a former life left, in the order of acceptance and of ending."""

    unfinished: list[Unfinished] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)


class Journal:
    """The runs in one folder. Every call blocks on the disk; OSError when it fails."""

    def __init__(self, root: Path, kept_limit: int, kept_bytes: int, spool: Spool) -> None:
        """``root`` is made when it is not there. At most so many results, and bytes of them, are kept."""
        self._root = root
        self._spool = spool
        self._kept_limit = kept_limit
        self._kept_bytes = kept_bytes
        self._kept: dict[str, int] = {}
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def accept(self, order: Order) -> None:
        """The run is not forgotten from now on; when this fails, nothing of it is kept."""
        try:
            self._append(order.run_id, _order_line(order), synced=True)
            folder.sync(self._root)
        except OSError:
            # Who asked is told that it was not accepted: the next start must not begin it.
            with contextlib.suppress(OSError):
                self._path(order.run_id, "jsonl").unlink()
            raise

    def start(self, run_id: str, started_at: Timestamp) -> None:
        """The run is about to begin: after a crash it is taken as interrupted and not begun again."""
        self._append(run_id, {"started_at": started_at.ToJsonString()}, synced=True)

    def stage(self, run_id: str, stage: result_pb2.Stage.ValueType) -> None:
        """The run is in this stage. Not synced: it outlives the agent, not a power cut."""
        self._append(run_id, {"stage": result_pb2.Stage.Name(stage)}, synced=False)

    def end(self, result: result_pb2.RunResult, last_sequence: int) -> None:
        """The result, which went to the spool, stays to be read; the oldest ones make room."""
        run_id, status = result.run_id, result_pb2.RunStatus.Name(result.status)
        size_bytes = self._spool.hold(run_id)
        if size_bytes:
            # Without this line the next start finds the result in the spool.
            with contextlib.suppress(OSError):
                self._append(run_id, {"ended": status, "last_sequence": last_sequence}, synced=False)
        else:
            order = Order(run_id, result.model, result.spec, result.created_at)
            head = {**_order_line(order), "status": status, "last_sequence": last_sequence}
            content = json.dumps(head).encode() + b"\n" + result.SerializeToString()
            folder.replace(self._path(run_id, "result"), content)
            self._path(run_id, "jsonl").unlink(missing_ok=True)
            size_bytes = len(content)
        self._kept[run_id] = size_bytes
        while len(self._kept) > self._kept_limit or sum(self._kept.values()) > self._kept_bytes:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            for suffix in ("jsonl", "result"):
                self._path(oldest, suffix).unlink(missing_ok=True)
            self._spool.release(oldest)

    def kept(self) -> frozenset[str]:
        """Ids of the ended runs whose results are here."""
        return frozenset(self._kept)

    def result(self, run_id: str) -> result_pb2.RunResult | None:
        """The result of an ended run; None when it is not here or damaged."""
        try:
            content = self._path(run_id, "result").read_bytes().partition(b"\n")[2]
        except FileNotFoundError:
            record = self._spool.find(run_id)
            if record is None:
                return None
            content = record.payload
        try:
            return result_pb2.RunResult.FromString(content)
        except DecodeError:
            return None

    def recover(self) -> Recovered:
        """What a former life left. Called once, before anything else; begins a new life for what waits."""
        recovered = Recovered()
        folder.remove_scratch(self._root)
        # With where its result is in the spool: runs that end within a tick of the clock have one time.
        found: list[tuple[int, int, Ended]] = []
        for path in self._root.glob("*.result"):
            with path.open("rb") as file:
                ended = _read_head(file.readline(), path.stat().st_size)
            if ended is None:
                _log.warning("%s: not readable; removed", path)
                path.unlink(missing_ok=True)
                continue
            found.append((path.stat().st_mtime_ns, 0, ended))
            # A crash between the result and the removal of the steps.
            path.with_suffix(".jsonl").unlink(missing_ok=True)
        for path in self._root.glob("*.jsonl"):
            if path.stat().st_size == 0:
                # The agent ended as it accepted the run: nobody was told that it did.
                path.unlink()
                continue
            steps = _read_steps(path)
            if isinstance(steps, Ended):
                size_bytes = self._spool.hold(steps.order.run_id)
                if size_bytes:
                    place = self._spool.place(steps.order.run_id)
                    found.append((path.stat().st_mtime_ns, place, replace(steps, size_bytes=size_bytes)))
                    continue
            if isinstance(steps, Unfinished):
                self._append(steps.order.run_id, {"life": True}, synced=True)
                recovered.unfinished.append(steps)
                continue
            why = "not readable" if steps is None else "its result is not in the spool any more"
            _log.warning("%s: %s; the run it told of is forgotten", path, why)
            # A spool that can't be read now may be another time.
            if steps is None or not self._spool.status().trouble:
                path.unlink(missing_ok=True)
        recovered.ended = [ended for *_, ended in sorted(found, key=lambda entry: entry[:2])]
        self._kept = {ended.order.run_id: ended.size_bytes for ended in recovered.ended}
        recovered.unfinished.sort(key=lambda entry: entry.order.created_at.ToNanoseconds())
        return recovered

    def _append(self, run_id: str, line: dict[str, Any], *, synced: bool) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._path(run_id, "jsonl"), flags, 0o600)
        try:
            # Begins a line of its own, also after one that a power cut tore.
            folder.write_all(descriptor, b"\n" + json.dumps(line).encode() + b"\n")
            if synced:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _path(self, run_id: str, suffix: str) -> Path:
        return self._root / f"{run_id}.{suffix}"


def _to_dict(message: model_pb2.Model | result_pb2.BenchmarkSpec) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def _order_line(order: Order) -> dict[str, Any]:
    return {
        "run_id": order.run_id,
        "model": _to_dict(order.model),
        "spec": _to_dict(order.spec),
        "created_at": order.created_at.ToJsonString(),
    }


def _read_order(line: dict[str, Any]) -> Order:
    created_at = Timestamp()
    created_at.FromJsonString(line["created_at"])
    return Order(
        line["run_id"],
        json_format.ParseDict(line["model"], model_pb2.Model()),
        json_format.ParseDict(line["spec"], result_pb2.BenchmarkSpec()),
        created_at,
    )


_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, json_format.ParseError)


def _read_steps(path: Path) -> Unfinished | Ended | None:
    """The run whose steps these are; lines that a power cut tore are left out."""
    found: Unfinished | None = None
    ended: Ended | None = None
    lives = 1
    for text in path.read_bytes().splitlines():
        with contextlib.suppress(*_DAMAGE):
            line = json.loads(text)
            if "run_id" in line:
                found = Unfinished(_read_order(line))
            elif found is not None and "ended" in line:
                status = result_pb2.RunStatus.Value(line["ended"])
                ended = Ended(found.order, status, int(line["last_sequence"]), 0)
            elif found is not None:
                lives += "life" in line
                _read_step(line, found)
    if found is None or found.order.run_id != path.stem:
        return None
    found.last_sequence = lives * _EVENTS_A_LIFE
    return ended or found


def _read_step(line: dict[str, Any], found: Unfinished) -> None:
    if "started_at" in line:
        started_at = Timestamp()
        started_at.FromJsonString(line["started_at"])
        found.started_at = started_at
    if "stage" in line:
        found.stage = result_pb2.Stage.Value(line["stage"])


def _read_head(head: bytes, size_bytes: int) -> Ended | None:
    try:
        line = json.loads(head)
        return Ended(
            _read_order(line),
            result_pb2.RunStatus.Value(line["status"]),
            int(line["last_sequence"]),
            size_bytes,
        )
    except _DAMAGE:
        return None
