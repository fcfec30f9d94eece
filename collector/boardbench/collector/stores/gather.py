"""One thread that writes: what arrives within a short window becomes one commit.

A commit costs an fsync, and with a server a way there and back, however much is in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from boardbench.collector.errors import CollectorError, StoreUnavailable
from boardbench.collector.jobs import attempt_of
from boardbench.collector.store import (
    Places,
    ending_of,
    finished_microseconds,
    places_of,
    series_id,
    series_of,
    split,
)
from boardbench.collector.stores.sqlite_schema import series_text
from boardbench.v1 import result_pb2

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Connection = TypeVar("_Connection")

_BATCH_ENTRIES = 4096
"""A commit takes no more than this, so that the first record in it is not kept waiting by the last."""

_BATCH_BYTES = 32 * 1024 * 1024
"""The same in bytes: a batch is held in memory twice, here and on its way to the database."""

CROWDED_BYTES = 4 * _BATCH_BYTES
"""Bytes that wait for their commit, from which on no more should come: the next batches are whole by then."""


class Row(NamedTuple):
    """A result as a table holds it, without its arrival; the names are those of the columns."""

    run_id: str
    device_id: str
    spool_id: str
    sequence: int
    status: int
    runtime: str
    model_name: str
    model_sha256: str
    finished: int
    received: float
    summary: bytes
    detail: bytes
    series_id: int


class Append(NamedTuple):
    """A result on its way to the writer."""

    future: asyncio.Future[bool]
    spool: tuple[str, str]
    """The board and its spool."""
    after: int
    row: Row
    series: str | None
    """None: not a measurement that a graph could show."""
    places: Places | None
    says_its_end: bool
    """Whether it says when it ended; else the end in the row is its arrival."""
    job: tuple[str, int] | None
    """The job and the attempt that the run is; None: of no job."""
    ending: result_pb2.RunResult | None
    """How the run ended, and nothing else of the result; None: of no job."""
    size_bytes: int


def new_append(
    future: asyncio.Future[bool],
    device_id: str,
    spool_id: str,
    sequence: int,
    result: result_pb2.RunResult,
    *,
    after: int,
    content: bytes | None,
    received: float,
    fits: Callable[[str], str] = str,
) -> Append:
    """Returns the result as the writer takes it; ``fits`` makes a text one that the table can index."""
    series = series_of(result)
    summary, detail = split(result, content)
    job = attempt_of(result.run_id)
    status = result.status
    row = Row(
        result.run_id,
        device_id,
        spool_id,
        sequence,
        status,
        fits(series.runtime),
        fits(series.model_name),
        fits(series.model_sha256),
        finished_microseconds(result, received),
        received,
        summary,
        detail,
        series_id(device_id, series),
    )
    return Append(
        future,
        (device_id, spool_id),
        after,
        row,
        series_text(series) if status == result_pb2.RUN_STATUS_SUCCEEDED else None,
        places_of(result),
        result.HasField("finished_at"),
        job,
        ending_of(result) if job is not None else None,
        len(summary) + len(detail),
    )


@dataclass(frozen=True)
class Call(Generic[_Connection]):
    """Anything else that writes."""

    future: asyncio.Future[Any]
    function: Callable[[_Connection], Any]
    size_bytes: int = 0


class Gatherer(Generic[_Connection]):
    """Takes entries from the loop, and hands batches of them to ``commit`` in a thread of its own.

    ``commit`` returns what to tell each entry, an exception included, or raises when nothing was stored;
    ``told`` puts what it raised into the collector's words.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Append | Call[_Connection]]], list[Any]],
        told: Callable[[BaseException], CollectorError],
        *,
        name: str,
        window_seconds: float,
    ) -> None:
        self._commit = commit
        self._told = told
        self._name = name
        self._window_seconds = window_seconds
        self._loop = asyncio.get_running_loop()
        self._entries: queue.SimpleQueue[Append | Call[_Connection] | None] = queue.SimpleQueue()
        self._closed = False
        # Only the loop looks at them.
        self._waiting_bytes = 0
        self._room: asyncio.Future[None] | None = None
        self._thread = threading.Thread(target=self._work, name="store-write", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken."""
        return self._closed

    def put(self, entry: Append | Call[_Connection]) -> None:
        """Takes an entry; its future tells what became of it."""
        if self._closed:
            entry.future.set_exception(StoreUnavailable(f"the store {self._name} is closed"))
        else:
            self._waiting_bytes += entry.size_bytes
            self._entries.put(entry)

    @property
    def is_crowded(self) -> bool:
        """Whether so much waits that no more should be put."""
        return self._waiting_bytes >= CROWDED_BYTES

    async def room(self) -> None:
        """Returns when it is not crowded any more."""
        while self.is_crowded:
            if self._room is None:
                self._room = self._loop.create_future()
            # Others wait for the same one.
            await asyncio.shield(self._room)

    async def call(self, function: Callable[[_Connection], _T]) -> _T:
        """Returns what the function returned, once its writes are committed with their batch."""
        future: asyncio.Future[_T] = self._loop.create_future()
        self.put(Call(future, function))
        return await future

    def tell(self, function: Callable[..., object], *arguments: object) -> None:
        """Has the loop call it; for the writer's thread."""
        # The loop may be gone when the process is ending: then nobody waits for the answer.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def close(self) -> None:
        """Takes nothing more; what was taken is still committed. Idempotent."""
        if not self._closed:
            self._closed = True
            self._entries.put(None)

    def join(self) -> None:
        """Returns once everything that was taken is dealt with; not for the loop's thread."""
        self._thread.join()

    def _work(self) -> None:
        failing = False
        while True:
            batch, last = self._gather()
            if batch:
                outcomes: list[Any]
                try:
                    outcomes = self._commit(batch)
                    if failing:
                        _log.info("what comes in is stored again")
                    failing = False
                except BaseException as error:
                    told = self._told(error)
                    outcomes = [told] * len(batch)
                    # Once, and not for each of thousands of boards that try again.
                    if not failing:
                        _log.warning("what comes in can't be stored: %s", told)
                    failing = True
                self.tell(self._answer, batch, outcomes)
            if last:
                return

    def _answer(self, batch: Sequence[Append | Call[_Connection]], outcomes: Sequence[Any]) -> None:
        """Completes the futures of a batch; runs in the loop. Whoever has gone away is not told."""
        for entry, outcome in zip(batch, outcomes, strict=True):
            self._waiting_bytes -= entry.size_bytes
            if entry.future.done():
                continue
            if isinstance(outcome, BaseException):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)
        if self._room is not None and not self.is_crowded:
            self._room.set_result(None)
            self._room = None

    def _gather(self) -> tuple[list[Append | Call[_Connection]], bool]:
        """Returns the next batch in the order of arrival, and whether it is the last one."""
        first = self._entries.get()
        if first is None:
            return [], True
        batch, size = [first], first.size_bytes
        if self._window_seconds > 0:
            time.sleep(self._window_seconds)
        while len(batch) < _BATCH_ENTRIES and size < _BATCH_BYTES:
            try:
                entry = self._entries.get_nowait()
            except queue.Empty:
                break
            if entry is None:
                return batch, True
            batch.append(entry)
            size += entry.size_bytes
        return batch, False
