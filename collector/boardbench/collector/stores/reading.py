"""What is asked alike of every store in SQL, whichever database answers.

Questions are written with ``?`` where a value goes; each store has its own way to hand one over.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, TypeVar

from boardbench.collector.errors import StoreDamaged
from boardbench.collector.store import (
    LatestResult,
    LatestResults,
    News,
    Outcomes,
    Position,
    ResultFilter,
)
from boardbench.v1 import result_pb2

_T = TypeVar("_T")
Connection = TypeVar("Connection")

BEYOND = "\U0010ffff"
"""Sorts behind every text that begins alike: the highest code point, and texts are compared as bytes."""


class Asking(abc.ABC, Generic[Connection]):
    """A database's own way with questions."""

    @abc.abstractmethod
    async def read(self, function: Callable[[Connection], _T]) -> _T:
        """Returns what the function returns, called with a connection that only reads; maybe called twice."""

    @abc.abstractmethod
    async def write(self, function: Callable[[Connection], _T]) -> _T:
        """Returns what the function returns, once its transaction is committed. It may be called again."""

    @abc.abstractmethod
    def rows(self, db: Connection, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Returns all that answer the question."""

    @abc.abstractmethod
    def among(self, column: str, values: Collection[Any], kind: str = "text") -> tuple[str, Any]:
        """Returns the condition that the column, a "text" or an "int", is one of these, and its one value."""

    def fits(self, text: str) -> str:
        """Returns the text as a column that is indexed has it."""
        return text

    def whole(self, text: str) -> str:
        """Returns the text as any other column has it."""
        return text


class SqlReading(Asking[Connection]):
    """The half of a ``ResultStore`` in SQL that reads, as far as it is the same everywhere."""

    _name: str
    """Where the store is, for people."""

    async def acknowledged(self, device_id: str, spool_id: str) -> int:
        """See ``ResultStore.acknowledged``."""
        query = "SELECT sequence FROM spools WHERE device_id = ? AND spool_id = ?"
        found = await self.read(lambda db: self.rows(db, query, (device_id, spool_id)))
        return int(found[0][0]) if found else 0

    async def outcomes(self) -> tuple[Outcomes, ...]:
        """See ``ResultStore.outcomes``."""
        query = "SELECT device_id, status, total FROM outcomes ORDER BY device_id, status"
        return tuple(Outcomes(*row) for row in await self.read(lambda db: self.rows(db, query)))

    async def find(self, run_id: str) -> tuple[result_pb2.RunResult, ...]:
        """See ``ResultStore.find``."""
        begin = self.whole(run_id)

        def read(db: Connection) -> list[tuple[Any, ...]]:
            select = "SELECT summary, detail FROM results WHERE "
            return self.rows(db, select + "run_id = ?", (begin,)) or self.rows(
                db, select + "run_id >= ? AND run_id < ? ORDER BY run_id LIMIT 2", (begin, begin + BEYOND)
            )

        return tuple(
            result_pb2.RunResult.FromString(summary + detail) for summary, detail in await self.read(read)
        )

    async def news(self, after: int) -> News:
        """See ``ResultStore.news``."""

        def read(db: Connection) -> News:
            # The position first: no board may be missing whose result it counts.
            ((position,),) = self.rows(db, "SELECT COALESCE(MAX(arrival), 0) FROM results")
            found = self.rows(db, "SELECT DISTINCT device_id FROM results WHERE arrival > ?", (after,))
            return News(int(position), frozenset(device_id for (device_id,) in found))

        return await self.read(read)

    async def latest(
        self, *, received_since: float, per_device: int, devices: Collection[str] | None = None
    ) -> LatestResults:
        """See ``ResultStore.latest``."""
        values: list[Any] = [received_since]
        chosen = ""
        if devices is not None:
            condition, only = self.among("n.device_id", devices)
            chosen = f" AND {condition}"
            values.append(only)
        query = (
            "SELECT s.device_id, r.received, r.summary, s.place, s.count, s.drifts FROM ("
            " SELECT n.device_id, n.arrival,"
            " CASE WHEN n.places IS NULL THEN NULL ELSE n.drifts END AS drifts,"
            " ROW_NUMBER() OVER (PARTITION BY n.device_id ORDER BY n.arrival DESC) AS place,"
            " COUNT(*) OVER (PARTITION BY n.device_id) AS count"
            f" FROM series n JOIN results o ON o.arrival = n.arrival WHERE o.received >= ?{chosen}"
            ") s JOIN results r ON r.arrival = s.arrival WHERE s.place <= ?"
            " ORDER BY s.device_id, s.place"
        )

        def read(db: Connection) -> LatestResults:
            kept: list[LatestResult] = []
            left_out: dict[str, int] = {}
            for device_id, received, summary, place, count, drifts in self.rows(
                db, query, (*values, per_device)
            ):
                if place == 1 and count > per_device:
                    left_out[device_id] = count - per_device
                kept.append(
                    LatestResult(device_id, received, result_pb2.RunResult.FromString(summary), drifts)
                )
            return LatestResults(tuple(kept), left_out)

        return await self.read(read)

    def conditions(self, wanted: ResultFilter, after: Position | None) -> tuple[str, list[Any]]:
        """Returns which results are wanted, as the clause of a question, and its values."""
        conditions: list[str] = []
        values: list[Any] = []

        def add(condition: str, *more: Any) -> None:
            conditions.append(condition)
            values.extend(more)

        if wanted.device_id:
            add("device_id = ?", self.whole(wanted.device_id))
        if wanted.model:
            digits = self.fits(wanted.model.lower())
            add(
                "(model_name = ? OR (model_sha256 >= ? AND model_sha256 < ?))",
                self.fits(wanted.model),
                digits,
                digits + BEYOND,
            )
        if wanted.runtime:
            add("runtime = ?", self.fits(wanted.runtime))
        if wanted.status:
            add("status = ?", wanted.status)
        if wanted.since_microseconds is not None:
            add("finished >= ?", wanted.since_microseconds)
        if after is not None:
            add(
                "(finished, arrival) < (CAST(? AS BIGINT), CAST(? AS BIGINT))",
                after.finished_microseconds,
                after.arrival,
            )
        return (" WHERE " + " AND ".join(conditions) if conditions else ""), values

    def check_record(self, run_id: str, device_id: str, status: int, content: bytes) -> None:
        """Returns when the record is that of the run; StoreDamaged when it is not, or is none."""
        what = f"{self._name}: the record of run {run_id} ({device_id})"
        try:
            result = result_pb2.RunResult.FromString(content)
        except Exception as error:
            raise StoreDamaged(f"{what} is unreadable: {error}") from error
        if (result.run_id, result.status) != (run_id, status):
            raise StoreDamaged(f"{what} says {result.run_id!r}")
