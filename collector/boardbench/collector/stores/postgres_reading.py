"""What is read from PostgreSQL, each question on one of a few connections that only read."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from boardbench.collector.errors import CollectorError, StoreUnavailable
from boardbench.collector.store import (
    Arrival,
    DeviceRecord,
    Position,
    ResultFilter,
    ResultPage,
    check_limit,
)
from boardbench.collector.stores.gather import Gatherer
from boardbench.collector.stores.postgres_connection import connect, is_passing, place, told
from boardbench.collector.stores.postgres_schema import storable
from boardbench.collector.stores.reading import SqlReading
from boardbench.v1 import collector_pb2, result_pb2

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]

_T = TypeVar("_T")

_READERS = 4
"""Connections for reading: a scrape, a page and two queries at once; the rest wait their turn."""


class PostgresReading(SqlReading["Connection"]):
    """The half of a ``PostgresResultStore`` that reads, and the connections that it does so on."""

    _writer: Gatherer[Connection]

    def __init__(self, url: str) -> None:
        self._url = url
        self._name = place(url)
        self._loop = asyncio.get_running_loop()
        self._idle_readers: queue.LifoQueue[Connection] = queue.LifoQueue()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        self._identity = secrets.token_hex(8)
        """This collector among those of the same store."""

    def rows(self, db: Connection, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """See ``Asking.rows``."""
        return db.execute(query.replace("?", "%s"), values, binary=True).fetchall()

    def among(self, column: str, values: Collection[Any], kind: str = "text") -> tuple[str, Any]:
        """See ``Asking.among``."""
        return f"{column} = ANY(?::{kind}[])", list(values)

    def fits(self, text: str) -> str:
        """See ``Asking.fits``."""
        return storable(text)

    def whole(self, text: str) -> str:
        """See ``Asking.whole``."""
        return storable(text, None)

    async def held_elsewhere(self, device_id: str, *, since: float) -> collector_pb2.Hello | None:
        """See ``ResultStore.held_elsewhere``."""

        def read(db: Connection) -> collector_pb2.Hello | None:
            found = db.execute(
                "SELECT d.hello FROM streams s JOIN devices d ON d.device_id = s.device_id"
                " WHERE s.device_id = %s AND s.collector <> %s AND s.heard >= %s LIMIT 1",
                (device_id, self._identity, since),
            ).fetchone()
            return None if found is None else collector_pb2.Hello.FromString(bytes(found[0]))

        return await self.read(read)

    async def devices(self) -> tuple[DeviceRecord, ...]:
        """See ``ResultStore.devices``."""

        def read(db: Connection) -> tuple[DeviceRecord, ...]:
            return tuple(
                DeviceRecord(
                    collector_pb2.Hello.FromString(hello),
                    first_seen,
                    last_seen,
                    None if heartbeat is None else collector_pb2.Heartbeat.FromString(heartbeat),
                    elsewhere,
                )
                for hello, first_seen, last_seen, heartbeat, elsewhere in db.execute(
                    "SELECT d.hello, d.first_seen, d.last_seen, d.heartbeat, s.heard FROM devices d"
                    " LEFT JOIN streams s ON s.device_id = d.device_id AND s.collector <> %s"
                    " ORDER BY d.device_id",
                    (self._identity,),
                    binary=True,
                )
            )

        return await self.read(read)

    async def results(
        self,
        wanted: ResultFilter,
        *,
        limit: int,
        after: Position | None = None,
        summary: bool = False,
        max_bytes: int | None = None,
    ) -> ResultPage:
        """See ``ResultStore.results``."""
        check_limit(limit)
        where, values = self.conditions(wanted, after)
        size = "octet_length(summary)" + ("" if summary else " + octet_length(detail)")
        query = (
            f"SELECT finished, arrival, {size} FROM results{where}"
            " ORDER BY finished DESC, arrival DESC LIMIT ?"
        )
        record = "summary, ''::bytea" if summary else "summary, detail"

        def read(db: Connection) -> ResultPage:
            # Sizes first: what does not fit on the page is not fetched.
            chosen: list[int] = []
            total, last, more = 0, None, False
            for finished, arrival, size_bytes in self.rows(db, query, (*values, limit + 1)):
                total += size_bytes
                if len(chosen) == limit or (chosen and max_bytes is not None and total > max_bytes):
                    more = True
                    break
                chosen.append(arrival)
                last = Position(finished, arrival)
            found = {
                arrival: head + tail
                for arrival, head, tail in db.execute(
                    f"SELECT arrival, {record} FROM results WHERE arrival = ANY(%s::bigint[])",
                    (chosen,),
                    binary=True,
                )
            }
            page = (found.get(arrival) for arrival in chosen)
            return ResultPage(
                tuple(result_pb2.RunResult.FromString(content) for content in page if content is not None),
                last if more else None,
            )

        return await self.read(read)

    async def arrivals(self, after: int, *, limit: int, max_bytes: int) -> tuple[Arrival, ...]:
        """See ``ResultStore.arrivals``."""
        check_limit(limit)

        def read(db: Connection) -> tuple[Arrival, ...]:
            chosen: list[int] = []
            total = 0
            for arrival, size_bytes in db.execute(
                "SELECT arrival, octet_length(summary) + octet_length(detail) FROM results"
                " WHERE arrival > %s ORDER BY arrival LIMIT %s",
                (after, limit),
            ).fetchall():
                total += size_bytes
                if chosen and total > max_bytes:
                    break
                chosen.append(arrival)
            rows = db.execute(
                "SELECT arrival, device_id, received, summary, detail FROM results"
                " WHERE arrival = ANY(%s::bigint[]) ORDER BY arrival",
                (chosen,),
                binary=True,
            )
            return tuple(
                Arrival(arrival, device_id, received, result_pb2.RunResult.FromString(summary + detail))
                for arrival, device_id, received, summary, detail in rows
            )

        return await self.read(read)

    async def check(self) -> None:
        """See ``ResultStore.check``."""

        def read(db: Connection) -> None:
            last = -1
            while rows := self.rows(
                db,
                "SELECT arrival, run_id, device_id, status, summary, detail FROM results"
                " WHERE arrival > ? ORDER BY arrival LIMIT 100",
                (last,),
            ):
                last = rows[-1][0]
                for _, run_id, device_id, status, summary, detail in rows:
                    self.check_record(run_id, device_id, status, summary + detail)

        await self.read(read)

    async def read(self, function: Callable[[Connection], _T]) -> _T:
        """Returns what the function returns, called with a connection that only reads; maybe called twice."""

        def work() -> _T:
            from psycopg import Error

            for attempt in (1, 2):
                try:
                    with self._reader() as db:
                        return function(db)
                except Error as error:
                    # A connection that lay idle may have been cut long ago; reading twice harms nobody.
                    if attempt == 2 or not is_passing(error):
                        raise self._told(error) from error
                    # The others lay idle as well: the second time is on a new one.
                    self._drop_idle()
            raise AssertionError("the second attempt returns or raises")

        if self._writer.closed:
            raise StoreUnavailable(f"the store {self._name} is closed")
        return await self._loop.run_in_executor(self._readers, work)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Connection]:
        try:
            db = self._idle_readers.get_nowait()
        except queue.Empty:
            db = connect(self._url)
        try:
            yield db
        finally:
            if db.closed or db.broken:
                db.close()
            else:
                self._idle_readers.put(db)

    def _told(self, error: BaseException) -> CollectorError:
        return told(error, self._name)

    def _close_readers(self) -> None:
        """Ends what still reads, and its connections; not for the loop's thread."""
        self._readers.shutdown()
        self._drop_idle()

    def _drop_idle(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle_readers.get_nowait().close()
