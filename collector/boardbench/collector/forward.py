"""Sends results on to databases of time series, by Prometheus's remote write 1.0.

A scrape shows what is the latest now; this is for results that come late: those of a board that was offline
appear at the time they were measured. The store's order of arrival is followed by a cursor on disk, which
moves once the receiver has taken a batch, so a restart neither leaves results out nor begins anew.

https://prometheus.io/docs/specs/prw/remote_write_spec/
"""

from __future__ import annotations

import abc
import asyncio
import bisect
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import logging
import os
import random
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp

from boardbench.collector.errors import StoreError
from boardbench.collector.histogram import SCHEMA, Distribution, distribution_of
from boardbench.collector.look import ForwardView
from boardbench.collector.metrics import METRICS, SERIES_LABELS
from boardbench.collector.native import ZERO_THRESHOLD_SECONDS
from boardbench.collector.protowire import double, number, piece, text, varint, zigzag
from boardbench.collector.samples import Group, result_group
from boardbench.collector.store import Arrival, LatestResult, ResultStore, finished_microseconds
from boardbench.v1 import result_pb2

_log = logging.getLogger(__name__)

JOB = "boardbench_results"
"""Label ``job`` of everything that is sent: what is scraped has another, so that the two are never mixed."""

_NATIVE = "boardbench_latency_distribution_seconds"
_LABELS = {name: metric.labels for metric in METRICS for name in metric.samples}
_SHARED = len(SERIES_LABELS)

_REFUSED = (
    # What Prometheus, Mimir and VictoriaMetrics say of samples that they will never take.
    ("too_old", ("too old", "out of bounds", "outside retention", "timestamp-too-old")),
    ("conflict", ("duplicate sample", "duplicate-timestamp", "conflict", "different value")),
    ("out_of_order", ("out of order", "out-of-order")),
)
_ANSWER_BYTES = 4096
"""Of what a receiver says this much is read."""

LONGEST_WAIT_SECONDS = 3600.0
"""A receiver that asks for more is asked again after this."""

_NATIVE_OFF = ("native histograms are disabled", "native histogram")


@dataclass(frozen=True)
class Pace:
    """How much at once, and how often."""

    batch_samples: int = 5_000
    """A post carries about so many: from 3,000 on the receiver's time a sample no longer falls."""
    batch_results: int = 256
    batch_bytes: int = 16 * 1024 * 1024
    """Of the results in the store, single samples included: twice as many are in memory at once."""
    poll_seconds: float = 1.0
    """How often the store is asked when there was nothing."""
    post_seconds: float = 30.0
    """Prometheus's own sender gives up after as long."""
    first_retry_seconds: float = 0.5
    longest_retry_seconds: float = 60.0


@dataclass(frozen=True)
class Answer:
    """What a receiver said."""

    status: int
    text: str = ""
    retry_after_seconds: float | None = None
    code: str = ""
    """The name that gRPC has for it; empty: it came by HTTP, or was none."""
    rejected: int = 0
    """Samples that it did not take of what it took."""

    @property
    def taken(self) -> bool:
        """Whether the receiver has it now."""
        return 200 <= self.status < 300

    def __str__(self) -> str:
        return f"{self.code or f'HTTP {self.status}'}: {' '.join(self.text.split())[:300]}"


class Unreachable(Exception):
    """The receiver gave no answer."""


class Post(Protocol):
    """Sends one body and returns the answer; Unreachable when there is none."""

    def __call__(self, body: bytes) -> Awaitable[Answer]:
        """Sends it."""


@dataclass(frozen=True)
class _Measured:
    """One result, ready to be sent."""

    milliseconds: int
    """When it was measured, since 1970."""
    group: Group

    @property
    def samples(self) -> int:
        return len(self.group.samples)


class Item(Protocol):
    """What is sent of one result."""

    @property
    def milliseconds(self) -> int:
        """When it was measured, since 1970."""

    @property
    def samples(self) -> int:
        """How many things a receiver counts in it."""


_Item = TypeVar("_Item", bound=Item)


class Follower(abc.ABC, Generic[_Item]):
    """Follows the store and keeps one receiver up to date. ``run()`` is the whole life of it."""

    def __init__(
        self,
        receiver: str,
        store: ResultStore,
        cursor: Path,
        post: Post,
        *,
        pace: Pace | None = None,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """Keeps how far it is in the file ``cursor``, whose folder must be there."""
        self.receiver = receiver
        self._store = store
        self._cursor = cursor
        self._post = post
        self._pace = pace or Pace()
        self._jitter = jitter
        self._sleep = sleep
        self._position = 0
        self._behind = 0
        self._taken = 0
        self._dropped: Counter[str] = Counter()
        self._retries = 0
        self._up: bool | None = None

    def view(self) -> ForwardView:
        """Returns how it goes."""
        return ForwardView(
            self.receiver, self._taken, dict(self._dropped), self._retries, self._up, self._behind
        )

    async def run(self) -> None:
        """Sends until cancelled; survives whatever the receiver and the store do."""
        self._position = await asyncio.to_thread(_read_cursor, self._cursor)
        while True:
            try:
                sent = await self._round()
            except StoreError as error:
                _log.warning("nothing is sent on to %s: %s", self.receiver, error)
                sent = False
            except Exception:
                # It would end for good, and unseen: the collector itself goes on.
                _log.exception("sending on to %s failed, trying again", self.receiver)
                self._up, self._retries, sent = False, self._retries + 1, False
                await self._sleep(self._pace.longest_retry_seconds)
            if not sent:
                await self._sleep(self._pace.poll_seconds)

    async def _round(self) -> bool:
        """Sends all that is there; False when there was nothing."""
        sent = False
        ahead = asyncio.create_task(self._read(self._position))
        try:
            while True:
                latest, arrivals, measured = await ahead
                if not arrivals:
                    if latest < self._position:
                        # The store was set back. After a restart, too, what comes next is sent.
                        await asyncio.to_thread(_write_cursor, self._cursor, latest)
                        self._position = latest
                    return sent
                # The receiver has its own work with what it is given: meanwhile the next is made ready.
                ahead = asyncio.create_task(self._read(arrivals[-1].position))
                await self._send_all(latest, arrivals, measured)
                sent = True
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)

    async def _read(self, position: int) -> tuple[int, Sequence[Arrival], list[_Item | None]]:
        """Returns the store's last position, what came after this one, and what to send of it."""
        news = await self._store.news(position)
        if news.position < position:
            _log.warning("the store was set back: everything in it is sent on to %s again", self.receiver)
            position = 0
        arrivals = await self._store.arrivals(
            position, limit=self._pace.batch_results, max_bytes=self._pace.batch_bytes
        )
        return news.position, arrivals, await asyncio.to_thread(self._prepare, arrivals)

    async def _send_all(
        self, latest: int, arrivals: Sequence[Arrival], measured: Sequence[_Item | None]
    ) -> None:
        """Sends these in posts of the usual size, and notes after each how far it is."""
        self._behind = max(0, latest - arrivals[0].position + 1)
        begin = 0
        while begin < len(arrivals):
            end, samples = begin, 0
            while end < len(arrivals) and (end == begin or samples < self._pace.batch_samples):
                one = measured[end]
                samples += one.samples if one is not None else 0
                end += 1
            batch = [one for one in measured[begin:end] if one is not None]
            await self._send(sorted(batch, key=lambda one: one.milliseconds))
            position = arrivals[end - 1].position
            await asyncio.to_thread(_write_cursor, self._cursor, position)
            self._position = position
            self._behind = max(0, latest - position)
            begin = end

    @abc.abstractmethod
    def _prepare(self, arrivals: Sequence[Arrival]) -> list[_Item | None]:
        """Returns what to send of each result; None: nothing. It is called in a thread of its own."""

    @abc.abstractmethod
    async def _send(self, batch: Sequence[_Item]) -> None:
        """Returns when each of these, which are in the order of time, was taken or refused for good."""

    def _drop(self, batch: Sequence[_Item], answer: Answer) -> None:
        self._count_dropped(sum(one.samples for one in batch), answer)

    def _count_dropped(self, lost: int, answer: Answer) -> None:
        reason = _reason(answer)
        self._dropped[reason] += lost
        _log.warning(
            "%s refuses %d samples (%s): %s", self.receiver, lost, reason, " ".join(answer.text.split())[:300]
        )

    async def _exchange(self, body: bytes) -> Answer:
        """Returns the answer that takes the body, or refuses it for good; tries again otherwise."""
        failures = 0
        while True:
            wait: float | None = None
            try:
                answer = await self._post(body)
            except Unreachable as error:
                problem = str(error)
            else:
                if answer.taken or _is_final(answer):
                    self._up = True
                    return answer
                problem = str(answer)
                wait = answer.retry_after_seconds
            if self._up is not False:
                _log.warning("%s takes nothing now, trying again: %s", self.receiver, problem)
            self._up = False
            self._retries += 1
            bound = min(self._pace.longest_retry_seconds, self._pace.first_retry_seconds * 2**failures)
            failures = min(failures + 1, 32)
            # At least as long as the receiver asks; many collectors at once are spread by the jitter.
            await self._sleep((wait or 0.0) + bound * self._jitter())


class Forwarder(Follower[_Measured]):
    """Sends results on by remote write."""

    def __init__(
        self,
        url: str,
        store: ResultStore,
        folder: Path,
        post: Post,
        *,
        pace: Pace | None = None,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """Keeps its cursor in ``folder``, which must be there."""
        cursor = folder / f"forward-{digest_of(url)}.json"
        super().__init__(receiver_of(url), store, cursor, post, pace=pace, jitter=jitter, sleep=sleep)
        self._native = True
        self._native_since = 0
        """Native histograms go in order only: the latest that was taken, milliseconds."""

    def _prepare(self, arrivals: Sequence[Arrival]) -> list[_Measured | None]:
        """Returns what to send of each result; None: it measured nothing."""
        return [
            _measured(arrival) if arrival.result.status == result_pb2.RUN_STATUS_SUCCEEDED else None
            for arrival in arrivals
        ]

    async def _send(self, batch: Sequence[_Measured]) -> None:
        """Returns when each of these, which are in the order of time, was taken or refused for good."""
        if not batch:
            return
        answer = await self._deliver(batch, native=self._native)
        if answer is None:
            return
        native = self._native and any(one.group.distribution for one in batch)
        if native:
            # Not every receiver has them, and few take them late: without them the rest may be welcome.
            if any(words in answer.text.lower() for words in _NATIVE_OFF):
                _log.info("%s takes no native histograms; it gets the classic ones", self.receiver)
                self._native = False
            answer = await self._deliver(batch, native=False)
            if answer is None:
                return
        if len(batch) == 1:
            self._drop(batch, answer)
        elif _reason(answer) == "too_old":
            await self._send_young(batch)
        else:
            half = len(batch) // 2
            await self._send(batch[:half])
            await self._send(batch[half:])

    async def _send_young(self, batch: Sequence[_Measured]) -> None:
        """Finds from where on results are young enough, drops those before, and sends the rest."""
        old, young = 0, len(batch)
        dealt_with: set[int] = set()
        middle = young - 1
        while old < young:
            answer = await self._deliver(batch[middle : middle + 1], native=False)
            dealt_with.add(middle)
            if answer is not None and _reason(answer) == "too_old":
                self._drop(batch[old : middle + 1], answer)
                old = middle + 1
            else:
                if answer is not None:
                    self._drop(batch[middle : middle + 1], answer)
                young = middle
            middle = (old + young) // 2
        await self._send([one for at, one in enumerate(batch) if at >= old and at not in dealt_with])

    async def _deliver(self, batch: Sequence[_Measured], *, native: bool) -> Answer | None:
        """Returns None once the batch was taken, or the answer that refuses it; tries again otherwise."""
        since = self._native_since
        body = await asyncio.to_thread(write_request, batch, since if native else None)
        answer = await self._exchange(body)
        if not answer.taken:
            return answer
        self._taken += sum(one.samples for one in batch)
        if native:
            self._native_since = max(since, batch[-1].milliseconds)
        return None


def digest_of(url: str) -> str:
    """Returns what tells the URL from others in the name of a file."""
    return hashlib.sha256(url.encode()).hexdigest()[:12]


def receiver_of(url: str) -> str:
    """Returns host and port of the URL, for people; credentials in it are never told."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2]


def _is_final(answer: Answer) -> bool:
    """Whether the same body would be refused again, whenever it came."""
    if answer.status in {400, 413, 422}:
        return True
    # Prometheus answers 500 to samples that are too old, and to native histograms that are off.
    text_ = answer.text.lower()
    known = (words for _, some in _REFUSED for words in some)
    return answer.status == 500 and any(words in text_ for words in (*known, *_NATIVE_OFF))


def _reason(answer: Answer) -> str:
    text_ = answer.text.lower()
    return next((reason for reason, some in _REFUSED if any(words in text_ for words in some)), "refused")


def _measured(arrival: Arrival) -> _Measured:
    result = arrival.result
    shape = distribution_of(result.latency)
    group = result_group(LatestResult(arrival.device_id, arrival.received_at, result), shape)
    return _Measured((measured_microseconds(arrival) + 500) // 1000, group)


def measured_microseconds(arrival: Arrival) -> int:
    """Returns when the run ended, since 1970.

    A board whose clock is ahead must not write into the future: a receiver would then find everything else
    too old. The run had ended when its result arrived.
    """
    received = int(arrival.received_at * 1e6)
    return min(finished_microseconds(arrival.result, arrival.received_at), received)


def write_request(batch: Sequence[_Measured], native_since: int | None) -> bytes:
    """Returns the body of a post, compressed: the samples of these results.

    With native histograms of those that are later than ``native_since``; None: without any.
    """
    series: dict[bytes, list[bytes]] = {}
    for one in batch:
        labels = _SharedLabels(one.group.labels)
        stamp = number(2, one.milliseconds)
        head = _SAMPLE + varint(_DOUBLE_BYTES + len(stamp)) + _VALUE
        for name, extra, value in one.group.samples:
            series.setdefault(labels.of(name, extra), []).append(head + _DOUBLE.pack(value) + stamp)
        shape = one.group.distribution
        if shape is not None and native_since is not None and one.milliseconds > native_since:
            found = series.setdefault(labels.of(_NATIVE, ()), [])
            found.append(piece(4, _histogram(shape, one.milliseconds)))
    pieces: list[bytes] = []
    for labelled, some in series.items():
        content = b"".join((labelled, *some))
        pieces += (_SERIES, varint(len(content)), content)
    return snappy(b"".join(pieces))


_SERIES, _SAMPLE, _VALUE = varint(1 << 3 | 2), varint(2 << 3 | 2), varint(1 << 3 | 1)
_DOUBLE = struct.Struct("<d")
_DOUBLE_BYTES = 9
_ORDER = sorted((*SERIES_LABELS, "job"))


def _label(name: str, value: str) -> bytes:
    # An empty label is one that is not there.
    return piece(1, text(1, name) + text(2, value)) if value else b""


class _SharedLabels:
    """Makes the labels of the series of one result, in the order of their names, as receivers want them."""

    def __init__(self, values: tuple[str, ...]) -> None:
        told = dict(zip((*SERIES_LABELS, "job"), (*values, JOB), strict=True))
        pieces = [_label(name, told[name]) for name in _ORDER]
        self._all = b"".join(pieces)
        self._ends = (0, *itertools.accumulate(len(each) for each in pieces))

    def of(self, name: str, extra: tuple[str, ...]) -> bytes:
        """Returns the labels of a series of this name, with these values behind the shared ones."""
        head, cuts = _between(name, extra)
        if not cuts:
            return head + self._all
        pieces = [head]
        at = 0
        for place, label in cuts:
            end = self._ends[place]
            pieces += (self._all[at:end], label)
            at = end
        pieces.append(self._all[at:])
        return b"".join(pieces)


@functools.lru_cache(maxsize=10_000)
def _between(name: str, extra: tuple[str, ...]) -> tuple[bytes, tuple[tuple[int, bytes], ...]]:
    """Returns the label of the name, and the others, each with its place among the shared ones."""
    names = (*_LABELS.get(name, SERIES_LABELS)[_SHARED:], "le")
    told = sorted(zip(names, extra, strict=False))
    # "__name__" comes before all others: no label begins with a capital letter or a digit.
    return _label("__name__", name), tuple(
        (bisect.bisect(_ORDER, label), _label(label, value)) for label, value in told
    )


def _histogram(shape: Distribution, milliseconds: int) -> bytes:
    native = shape.native
    return (
        number(1, shape.count)
        + double(3, shape.sum_seconds)
        + number(4, zigzag(SCHEMA))
        + double(5, ZERO_THRESHOLD_SECONDS)
        + number(6, 0)
        + b"".join(
            piece(11, number(1, zigzag(offset)) + number(2, length)) for offset, length in native.spans
        )
        + piece(12, b"".join(varint(zigzag(delta)) for delta in native.deltas))
        # A gauge: each run's own, which falls as well as it rises.
        + number(14, 3)
        + number(15, milliseconds)
    )


def snappy(content: bytes) -> bytes:
    """Returns the content in snappy's block format: compressed where cramjam is installed, else as it is."""
    try:
        cramjam = importlib.import_module("cramjam")
    except ModuleNotFoundError:
        return snappy_literal(content)
    return bytes(cramjam.snappy.compress_raw(content))


def snappy_literal(content: bytes) -> bytes:
    """Returns the content as literals: valid snappy of any reader, and not smaller.

    https://github.com/google/snappy/blob/main/format_description.txt
    """
    pieces = [varint(len(content))]
    for begin in range(0, len(content), 0x10000):
        literal = content[begin : begin + 0x10000]
        size = len(literal) - 1
        if size < 60:
            pieces += (bytes((size << 2,)), literal)
        else:
            # 61: the length less one follows in two bytes.
            pieces += (bytes((61 << 2,)), size.to_bytes(2, "little"), literal)
    return b"".join(pieces)


def _read_cursor(path: Path) -> int:
    try:
        return int(json.loads(path.read_text())["position"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s can't be read (%s): everything is sent on again", path, error)
        return 0


def _write_cursor(path: Path, position: int) -> None:
    fresh = path.with_suffix(".new")
    try:
        with fresh.open("w") as file:
            file.write(json.dumps({"position": position}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        # What was sent is sent again after a restart then, which receivers take.
        _log.warning("%s can't be written: %s", path, error.strerror)


@contextlib.asynccontextmanager
async def posting(url: str, headers: Mapping[str, str], pace: Pace | None = None) -> AsyncIterator[Post]:
    """Returns what posts to the URL, for the context; a user and password in it are shown to the receiver."""
    seconds = (pace or Pace()).post_seconds
    more = {
        "Content-Encoding": "snappy",
        "Content-Type": "application/x-protobuf",
        "X-Prometheus-Remote-Write-Version": "0.1.0",
        "User-Agent": "boardbench-collector",
        **headers,
    }
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with aiohttp.ClientSession(timeout=timeout, headers=more) as session:

        async def post(body: bytes) -> Answer:
            try:
                async with session.post(url, data=body, allow_redirects=False) as answer:
                    said = (await answer.content.read(_ANSWER_BYTES)).decode("utf-8", "replace")
                    return Answer(answer.status, said, retry_after(answer.headers.get("Retry-After", "")))
            except asyncio.TimeoutError as error:
                raise Unreachable(f"no answer within {seconds:.0f} s") from error
            except (aiohttp.ClientError, OSError) as error:
                raise Unreachable(str(error) or type(error).__name__) from error

        yield post


def retry_after(header: str) -> float | None:
    """Returns the seconds that the header asks to wait, at most an hour; None when it asks for none."""
    if header.isascii() and header.isdigit():
        return min(float(header), LONGEST_WAIT_SECONDS)
    try:
        then = parsedate_to_datetime(header)
    except ValueError:
        return None
    if then.tzinfo is None:
        return None
    return min(max(0.0, then.timestamp() - time.time()), LONGEST_WAIT_SECONDS)
