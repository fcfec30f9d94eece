"""The contract of a place where results live; implementations are in ``stores/``, one file each.

A store is used from one event loop. Writing returns once the data survive a power cut; reading never
waits for a writer. Every implementation passes the same suite (``tests/collector/test_store.py``).
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from boardbench.collector.errors import Ambiguous, InvalidRequest, NotFound, ResultRefused
from boardbench.collector.jobs import JobStore
from boardbench.v1 import collector_pb2, placement_pb2, result_pb2, scenario_pb2

MAX_ID_LENGTH = 128
"""Longest run, device and spool identity in characters: a UUID has 36, a host name at most 64."""

MAX_SEQUENCE = 2**63 - 1
"""Highest position in a spool: SQL's integers are signed."""

_EARLIEST_SECOND = -62135596800
_LATEST_SECOND = 253402300799  # year 1 to year 9999: what a Timestamp may hold


@dataclass(frozen=True)
class DeviceRecord:
    """A board as it is stored."""

    hello: collector_pb2.Hello
    """What it last said about itself."""
    first_seen_at: float
    """Unix seconds, by the collector's clock."""
    last_seen_at: float
    """Unix seconds, by the collector's clock."""
    heartbeat: collector_pb2.Heartbeat | None
    """The last one; None before the first."""
    elsewhere_at: float | None = None
    """When another collector of the same store last heard it on a stream that it holds; None: none does."""

    @property
    def device_id(self) -> str:
        """Identity of the board."""
        return self.hello.board.device_id


@dataclass(frozen=True)
class Sighting:
    """A board was heard of."""

    device_id: str
    at: float
    """Unix seconds, by the collector's clock."""
    heartbeat: collector_pb2.Heartbeat | None = None
    """What it said; None: it said something else, and the stored heartbeat stays."""
    streaming: bool = True
    """Whether its stream is still open."""


@dataclass(frozen=True)
class ResultFilter:
    """Which results are wanted; an empty field takes any."""

    device_id: str = ""
    model: str = ""
    """Name of the model, or the first digits of its SHA-256."""
    runtime: str = ""
    status: int = result_pb2.RUN_STATUS_UNSPECIFIED
    since_microseconds: int | None = None
    """Only runs that ended then or later, Unix microseconds."""


@dataclass(frozen=True)
class Position:
    """A place in the order of results: latest end first, latest arrival first among equals."""

    finished_microseconds: int
    arrival: int


@dataclass(frozen=True)
class ResultPage:
    """Some results and where the next ones begin."""

    results: tuple[result_pb2.RunResult, ...]
    next: Position | None
    """None: there are no more."""


@dataclass(frozen=True)
class LatestResult:
    """The last finished measurement of one series (:func:`series_of`) on one board."""

    device_id: str
    received_at: float
    """Unix seconds, by the collector's clock."""
    result: result_pb2.RunResult
    """Without raw samples and per-op list."""
    drifts: int | None = None
    """How often the series was placed otherwise than just before (:func:`has_drifted`), over all time; None
    while no placement of it was ever known."""


@dataclass(frozen=True)
class LatestResults:
    """The last finished measurement of every series, the latest first within a board."""

    results: tuple[LatestResult, ...]
    left_out: Mapping[str, int]
    """How many series each board has beyond the bound; boards without any are not in it."""


@dataclass(frozen=True)
class Arrival:
    """A stored result, whole, and its place in the order in which results became readable."""

    position: int
    """Rising; never below one that was read before."""
    device_id: str
    received_at: float
    """Unix seconds, by the collector's clock."""
    result: result_pb2.RunResult


@dataclass(frozen=True)
class News:
    """What came in behind a position."""

    position: int
    """Of the latest result; 0: there is none. Below the one asked about when the store was set back."""
    devices: frozenset[str]
    """Boards that the results behind the position came from."""


@dataclass(frozen=True)
class Outcomes:
    """How many runs of a board ended how, over all time."""

    device_id: str
    status: int
    """A ``RunStatus``."""
    total: int


class Series(NamedTuple):
    """What two runs must share for the later one to take the place of the earlier one in a graph."""

    model_name: str
    model_sha256: str
    runtime: str
    target: str
    """Device that was asked of the runtime: "cpu", "edgetpu", …."""
    threads: str
    """Number of threads; empty: the engine's own default."""
    variant: str
    """Options, shapes and inputs that were asked for, readable; empty: none."""


_MAX_PLACED_OPS = 20_000
"""Ops of a model whose places are kept one by one; the largest models have some thousands."""

_MAX_KEPT_TEXT = 1000
"""Characters of a name that may stand in a cache; real ones have a hundred."""

_UNIT_COUNT = struct.Struct("<BI")
_OP_DIGEST_BYTES, _OP_PLACE_BYTES = 8, 2
_OP_BYTES = _OP_DIGEST_BYTES + _OP_PLACE_BYTES
_NO_PLACE = bytes(_OP_PLACE_BYTES)
_PLACES_VERSION = 1
_LARGEST_UNIT, _LARGEST_COUNT = 0x7F, 0xFFFFFFFF


@dataclass(frozen=True)
class Places:
    """Where the ops of one run were, short enough to be kept for every series."""

    verdict: int
    units: Mapping[int, int]
    """Number of ops by unit."""
    ops: Mapping[bytes, bytes]
    """Place of each op by a digest of its type, name and order among its like; no known place: zeros."""

    def packed(self) -> bytes:
        """The same as bytes."""
        pieces = [bytes((_PLACES_VERSION, self.verdict, len(self.units)))]
        pieces += [_UNIT_COUNT.pack(unit, ops) for unit, ops in sorted(self.units.items())]
        pieces += [key + place for key, place in sorted(self.ops.items())]
        return b"".join(pieces)

    @classmethod
    def unpacked(cls, content: bytes) -> Places | None:
        """What :meth:`packed` made; None for anything else."""
        if len(content) < 3 or content[0] != _PLACES_VERSION:
            return None
        end = 3 + content[2] * _UNIT_COUNT.size
        if len(content) < end or (len(content) - end) % _OP_BYTES:
            return None
        units = dict(_UNIT_COUNT.iter_unpack(content[3:end]))
        ops = {
            content[at : at + _OP_DIGEST_BYTES]: content[at + _OP_DIGEST_BYTES : at + _OP_BYTES]
            for at in range(end, len(content), _OP_BYTES)
        }
        return cls(content[1], units, ops)

    def after(self, before: Places) -> Places:
        """The same; an op of which nothing is known now is where it was."""
        ops = {
            key: before.ops.get(key, place) if place == _NO_PLACE else place
            for key, place in self.ops.items()
        }
        return replace(self, ops=ops)


def places_of(result: result_pb2.RunResult) -> Places | None:
    """Returns where the ops of a finished measurement were; None where the runtime does not prove it.

    The file's own word is the same wherever it runs, and what other evidence contradicts is no place.
    """
    placement = result.placement
    unproven = (
        placement_pb2.EVIDENCE_UNSPECIFIED,
        placement_pb2.EVIDENCE_STATIC,
        placement_pb2.EVIDENCE_PREDICTION,
    )
    if (
        result.status != result_pb2.RUN_STATUS_SUCCEEDED
        or placement.evidence in unproven
        or placement.verdict == placement_pb2.PLACEMENT_VERDICT_CONTRADICTED
        or not (placement.units or placement.ops)
    ):
        return None
    units: dict[int, int] = {}
    for count in placement.units:
        unit = count.unit & _LARGEST_UNIT
        units[unit] = min(units.get(unit, 0) + count.ops, _LARGEST_COUNT)
    ops: dict[bytes, bytes] = {}
    seen: dict[tuple[str, str], int] = {}
    for op in placement.ops if len(placement.ops) <= _MAX_PLACED_OPS else ():
        like = (op.type, op.name)
        nth = seen[like] = seen.get(like, -1) + 1
        unit = op.unit
        # Of a delegate that is not known for its unit, the name tells one from another.
        foreign = op.delegate if unit == placement_pb2.UNIT_DELEGATE else ""
        digest = _op_digest if len(op.type) + len(op.name) <= _MAX_KEPT_TEXT else _op_digest.__wrapped__
        ops[digest(op.type, op.name, nth)] = _place(unit, foreign[:_MAX_KEPT_TEXT])
    return Places(placement.verdict & 0xFF, units, ops)


# Boards measure the same models again and again: their ops are told by their names once.
@functools.lru_cache(maxsize=1 << 16)
def _op_digest(kind: str, name: str, nth: int) -> bytes:
    text = f"{kind}\0{name}\0{nth}".encode()
    return hashlib.blake2b(text, digest_size=_OP_DIGEST_BYTES).digest()


@functools.lru_cache(maxsize=1 << 10)
def _place(unit: int, foreign: str) -> bytes:
    if unit == placement_pb2.UNIT_UNSPECIFIED:
        return _NO_PLACE
    return bytes((unit & _LARGEST_UNIT,)) + hashlib.blake2b(foreign.encode(), digest_size=1).digest()


def has_drifted(before: Places, after: Places) -> bool:
    """Whether the same model was placed otherwise than just before.

    It was when an op is elsewhere. Other ops alone are no drift, since a newer engine may fuse more of them,
    unless the verdict is another; without ops, their numbers by unit count. What is not known did not move.
    """
    for key, place in after.ops.items():
        if before.ops.get(key, place) != place and _NO_PLACE not in (before.ops[key], place):
            return True
    if before.ops and after.ops:
        unknown = placement_pb2.PLACEMENT_VERDICT_UNSPECIFIED
        return before.verdict != after.verdict and unknown not in (before.verdict, after.verdict)
    unknown_unit = placement_pb2.UNIT_UNSPECIFIED
    return before.units != after.units and not (unknown_unit in before.units or unknown_unit in after.units)


@dataclass(frozen=True)
class Removed:
    """What was taken out of a store."""

    results: int = 0
    """Results that were removed, or made smaller."""
    samples: int = 0
    """Single samples that were dropped."""
    size_bytes: int = 0
    """Bytes of records that are gone."""
    more: bool = False
    """Whether there may be more to do at once."""

    def __add__(self, other: Removed) -> Removed:
        return Removed(
            self.results + other.results,
            self.samples + other.samples,
            self.size_bytes + other.size_bytes,
            other.more,
        )


class ResultStore(Protocol):
    """Results and the boards they come from."""

    @property
    def jobs(self) -> JobStore:
        """The jobs of the same store."""

    def append(
        self,
        device_id: str,
        spool_id: str,
        sequence: int,
        result: result_pb2.RunResult,
        *,
        after: int = 0,
        content: bytes | None = None,
    ) -> asyncio.Future[bool]:
        """Stores a result; the future is done once it would survive a power cut.

        ``content`` is what the result was read from, where the caller has it: it need not be written anew.

        Calls take effect in their order. True: stored now. False: (device, spool, sequence), or the very
        same run, was there before. ``after`` is the sequence that the caller handed over just before
        (0: none): when that one turns out not to be stored, this one fails with OutOfOrder instead of
        leaving a gap that the high-water mark would hide. PlaceTaken comes through the future when the place
        was dealt with, but not by this run: a copy of the spool has used it. A result of a job's attempt
        ends the job in the same transaction (``jobs.after_result``). ResultRefused is raised at once when the
        record is unfit (:func:`check_result`); it comes through the future when another result has the
        run's identity, and then counts as dealt with: the mark moves on. StoreError comes through the future.
        """

    @property
    def is_crowded(self) -> bool:
        """Whether so many bytes wait for their commit that nothing should be handed over before some have it.

        What one stream has under way is bounded; a fleet that comes back with what it kept is many streams.
        """

    async def room(self) -> None:
        """Returns when it is not crowded any more."""

    async def greet(self, hello: collector_pb2.Hello, at: float) -> None:
        """Stores what a board says about itself."""

    async def held_elsewhere(self, device_id: str, *, since: float) -> collector_pb2.Hello | None:
        """Returns how the board described itself when another collector of this store holds its stream.

        None when none does, or has not heard it since then.
        """

    async def saw(self, sightings: Sequence[Sighting]) -> None:
        """Stores when boards were last heard of; boards that never said hello are passed over."""

    async def acknowledged(self, device_id: str, spool_id: str) -> int:
        """Returns the highest sequence of the spool that was dealt with; 0: none."""

    async def devices(self) -> tuple[DeviceRecord, ...]:
        """Returns every board by its identity."""

    async def outcomes(self) -> tuple[Outcomes, ...]:
        """Returns how the runs of every board ended."""

    async def results(
        self,
        wanted: ResultFilter,
        *,
        limit: int,
        after: Position | None = None,
        summary: bool = False,
        max_bytes: int | None = None,
    ) -> ResultPage:
        """Returns at most ``limit`` results behind ``after``, fewer when they would exceed ``max_bytes``.

        A page is never empty while there is a result. With ``summary``, raw samples and per-op lists are
        left out.
        """

    async def find(self, run_id: str) -> tuple[result_pb2.RunResult, ...]:
        """Returns the result of this run, or else up to two whose run's identity begins so."""

    async def news(self, after: int) -> News:
        """Returns where the order of arrival ends now, and which boards' results lie behind ``after``.

        A result that becomes readable later has a higher position than every one that was told before.
        """

    async def arrivals(self, after: int, *, limit: int, max_bytes: int) -> tuple[Arrival, ...]:
        """Returns at most ``limit`` results behind ``after`` in the order of arrival, long lists included.

        Fewer when they would exceed ``max_bytes``; never none while there is one.
        """

    async def latest(
        self, *, received_since: float, per_device: int, devices: Collection[str] | None = None
    ) -> LatestResults:
        """Returns each series' last SUCCEEDED result that arrived since then, at most so many a board.

        Only of these ``devices``; None: of all.
        Drifts are counted as results are stored, in the order of their arrival, and outlive everything but
        the store: a board that was set up anew is compared with what it did before, too.
        """

    async def thin(self, *, received_before: float, limit: int) -> Removed:
        """Drops the single samples of results that arrived before, the oldest first (``thinning.thinned``).

        Looks at no more than ``limit`` results, which is one transaction.
        """

    async def remove(self, *, received_before: float | None, per_series: int | None, limit: int) -> Removed:
        """Removes at most ``limit`` results in one transaction, the oldest first.

        Those that arrived before, and those of which their series has ``per_series`` later ones on the board,
        whatever their ending; None: no such bound. The latest SUCCEEDED of each series stays, and the last
        that arrived at all. Marks and counts stay, too.
        """

    async def compact(self) -> None:
        """Gives space that nothing uses any more back to the disk, as far as the store does not by itself.

        May take as long as copying everything, and holds up what comes in.
        """

    async def probe(self) -> None:
        """Returns once something was written and committed; StoreError when that can't be done."""

    async def check(self) -> None:
        """Returns when everything that is kept was read and is sound; StoreDamaged tells what is not."""

    async def close(self) -> None:
        """Ends what was begun and lets go of everything; idempotent."""


def check_identity(what: str, text: str) -> None:
    """Returns when the text can name a run, a board or a spool; ValueError says why it can't."""
    if not text:
        raise ValueError(f"{what} is missing")
    if len(text) > MAX_ID_LENGTH:
        raise ValueError(f"{what} has {len(text)} characters; at most {MAX_ID_LENGTH} are taken")
    if not text.isprintable():
        raise ValueError(f"{what} {text!r} has characters that can't be printed")


def the_one(what: str, given: str, found: Sequence[str]) -> None:
    """Returns when the digits name one of what there is; NotFound or Ambiguous says why not."""
    if not found:
        raise NotFound(f"no {what} is named {given!r}, nor does one begin so")
    if len(found) > 1:
        raise Ambiguous(
            f"several {what}s begin with {given!r}, {found[0]} and {found[1]} among them; give more digits"
        )


def check_result(result: result_pb2.RunResult, max_bytes: int, content: bytes | None = None) -> None:
    """Returns when the record can be stored and read back; ResultRefused says why it can never be.

    ``content``: what it was read from, where that is at hand.
    """
    try:
        check_identity("run_id", result.run_id)
    except ValueError as error:
        raise ResultRefused("run_id", str(error)) from None
    # Its size is not known to the message: to tell it, all of it is written down.
    size = result.ByteSize() if content is None else len(content)
    if size > max_bytes:
        raise ResultRefused(
            "too_large",
            f"run {result.run_id}: the record has {size:,} bytes; at most {max_bytes:,} are taken",
        )
    for name in ("created_at", "started_at", "finished_at"):
        if result.HasField(name):
            time = getattr(result, name)
            if not (_EARLIEST_SECOND <= time.seconds <= _LATEST_SECOND and 0 <= time.nanos < 1_000_000_000):
                raise ResultRefused(
                    "time", f"run {result.run_id}: {name} is no time ({time.seconds} s, {time.nanos} ns)"
                )


def finished_microseconds(result: result_pb2.RunResult, received_at: float) -> int:
    """Returns when the run ended, in Unix microseconds; a run that does not say so ended when it arrived."""
    if result.HasField("finished_at"):
        return result.finished_at.seconds * 1_000_000 + result.finished_at.nanos // 1000
    return int(received_at * 1_000_000)


def ending_of(result: result_pb2.RunResult) -> result_pb2.RunResult:
    """Returns how the run ended: its status and its error, and nothing else."""
    ending = result_pb2.RunResult(status=result.status)
    if result.HasField("error"):
        ending.error.code, ending.error.message = result.error.code, result.error.message
    return ending


def split(result: result_pb2.RunResult, content: bytes | None = None) -> tuple[bytes, bytes]:
    """Returns the record as (summary, detail), whose concatenation is the whole.

    Protobuf merges messages whose bytes are joined: the detail holds only the long lists (:data:`LONG`), so
    that everything that reads many results reads kilobytes and not megabytes.
    https://protobuf.dev/programming-guides/encoding/#last-one-wins

    ``content`` is what the result was read from, and becomes the summary where there are no such lists.
    """
    there = list(_present(result, _LISTS))
    if not there:
        return result.SerializeToString(deterministic=True) if content is None else content, b""
    summary, detail = result_pb2.RunResult(), result_pb2.RunResult()
    summary.CopyFrom(result)
    for path in there:
        # Through the detail's own path, so that a message on the way is there only with its list.
        list_at(detail, path).MergeFrom(list_at(result, path))
        del list_at(summary, path)[:]
    return summary.SerializeToString(deterministic=True), detail.SerializeToString(deterministic=True)


LONG = (
    "latency.samples_nanoseconds",
    "placement.ops",
    "output_values",
    "warm_up.samples_nanoseconds",
    "scenario.service.samples_nanoseconds",
    "interference.alone.samples_nanoseconds",
    "telemetry.series",
    "latency.histogram.index_steps",
    "latency.histogram.counts",
    "scenario.service.histogram.index_steps",
    "scenario.service.histogram.counts",
    "interference.alone.histogram.index_steps",
    "interference.alone.histogram.counts",
)
"""The lists of a result that grow with the run or the model."""


def _tree(paths: Iterable[Sequence[str]], above: str = "") -> tuple[tuple[str, str, Any], ...]:
    """Returns (name, path, what is in it) of each field on the paths; nothing is in a list."""
    within: dict[str, list[Sequence[str]]] = {}
    for name, *below in paths:
        within.setdefault(name, []).extend([below] if below else [])
    return tuple((name, above + name, _tree(below, f"{above}{name}.")) for name, below in within.items())


_LISTS = _tree(path.split(".") for path in LONG)
"""The same as a tree: of most results, most of it is quickly passed over."""


def _present(message: Any, tree: tuple[tuple[str, str, Any], ...]) -> Iterator[str]:
    """Returns the paths of the lists that the message has."""
    for name, path, below in tree:
        if not below:
            if getattr(message, name):
                yield path
        elif message.HasField(name):
            yield from _present(getattr(message, name), below)


def list_at(result: result_pb2.RunResult, path: str) -> Any:
    """Returns the list at one of the paths in :data:`LONG`."""
    found: Any = result
    for name in path.split("."):
        found = getattr(found, name)
    return found


def series_of(result: result_pb2.RunResult) -> Series:
    """Returns the series that the result continues.

    Options, shapes and inputs count as they were asked for, not as filled in, so that a default that
    a later version spells out does not break the series.
    """
    spec, effective, runtime, model = result.spec, result.effective_spec, result.runtime, result.model
    threads = ""
    if effective.HasField("threads"):
        threads = str(effective.threads)
    elif spec.HasField("threads"):
        threads = str(spec.threads)
    return Series(
        model.name,
        model.sha256,
        runtime.name or effective.runtime or spec.runtime,
        runtime.device or effective.device or spec.device,
        threads,
        ",".join(_variant(spec)) if result.HasField("spec") else "",
    )


def _variant(spec: result_pb2.BenchmarkSpec) -> list[str]:
    parts = [f"{name}={value}" for name, value in sorted(spec.options.items())]
    parts += [
        f"{name}={'x'.join(str(size) for size in shape.dimensions)}"
        for name, shape in sorted(spec.shapes.items())
    ]
    parts += [
        f"{name}={value}"
        for name, value in (
            ("compute_precision", spec.compute_precision),
            ("cpu_affinity", "+".join(str(number) for number in spec.cpu_affinity)),
            ("power_mode", spec.power_mode),
        )
        if value
    ]
    if spec.inputs_sha256:
        parts.append(f"inputs={spec.inputs_sha256[:12]}")
    return parts + scenario_parts(spec)


def series_id(device_id: str, series: Series) -> int:
    """Returns a number that stands for the series of a board: 64 bits of a digest, signed as in SQL."""
    return (_series_id if is_short(series) else _series_id.__wrapped__)(device_id, series)


@functools.lru_cache(maxsize=1 << 14)
def _series_id(device_id: str, series: Series) -> int:
    text = "\0".join((device_id, *series)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def is_short(series: Series) -> bool:
    """Whether what follows from the series may be kept in memory: nobody can make it gigabytes."""
    return sum(map(len, series)) <= _MAX_KEPT_TEXT


def scenario_parts(spec: result_pb2.BenchmarkSpec) -> list[str]:
    """Returns what of the scenario makes its latency another quantity; nothing in single stream."""
    parts = []
    scenario = spec.scenario
    plain = (scenario_pb2.SCENARIO_KIND_UNSPECIFIED, scenario_pb2.SCENARIO_KIND_SINGLE_STREAM)
    if scenario.kind not in plain:
        entry = scenario_pb2.ScenarioKind.DESCRIPTOR.values_by_number.get(scenario.kind)
        name = entry.name.removeprefix("SCENARIO_KIND_").lower() if entry is not None else "unknown"
        parts.append(f"scenario={name}")
        told = {field.name: value for field, value in scenario.ListFields()}
        parts += [f"{name}={told[name]:g}" for name in ("rate_hertz", "streams", "batch") if name in told]
    if spec.group.mode == result_pb2.GROUP_MODE_CONCURRENT:
        parts.append(f"concurrent={spec.group.size}")
    return parts


def check_limit(limit: int) -> None:
    """Returns when a page can be that long."""
    if limit < 1:
        raise InvalidRequest(f"a page has at least one result, not {limit}")
