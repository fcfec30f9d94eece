"""``/metrics``: what Prometheus sees, read at the scrape, written down only where something has changed.

Samples become text board by board; the text is kept by family and by segment of the fleet, and a scrape
writes anew only what has changed since the one before. Tests compare every format with what prometheus_client
makes of the same samples.

No series has an explicit timestamp: one without it vanishes from Prometheus with the next scrape after it
vanishes here, one with it would linger for five minutes.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import platform
import time
import zlib
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import choose_encoder

from boardbench.collector import native
from boardbench.collector.histogram import Distribution, distribution, distribution_of
from boardbench.collector.look import DeviceView, ReadModel, Snapshot
from boardbench.collector.metrics import METRICS, SERIES_LABELS
from boardbench.collector.samples import (
    Group,
    LeftOut,
    board_group,
    collector_group,
    result_group,
    state_group,
)
from boardbench.collector.store import LatestResult, News

_log = logging.getLogger(__name__)

MIN_SERIES_PER_RESULT = 8
"""Series that every finished measurement has at least; bounds what is read from the store for one board."""

_SEGMENT_GROUPS = 256
"""Groups of samples whose text is kept together. A change costs writing all of its segment, some
milliseconds; more segments cost every scrape."""

_REREAD_SECONDS = 600.0
"""A board is read again after this time though nothing came from it: retention may have removed a result."""

_REREAD_SHARE = 0.05
"""Share of the boards that one scrape reads again for that reason."""

_SHAPES_PER_SCRAPE = 2000
"""Results whose samples one scrape reads for their distribution; after a start the next scrapes go on."""

_SHAPES_AT_ONCE = 16
"""Of these, whose samples are in memory at once: the largest results have megabytes."""

_GZIP_LEVEL = 1
"""An eighth of the bytes for a tenth of level 9's time."""

_GZIP_WINDOW_BITS = 16 + zlib.MAX_WBITS
"""The 16 makes gzip's header and trailer (https://docs.python.org/3/library/zlib.html#zlib.compressobj)."""

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PROTOBUF = native.CONTENT_TYPE

_FAMILY = {name: index for index, metric in enumerate(METRICS) for name in metric.samples}
_RESULT_FAMILIES = frozenset(
    index for index, metric in enumerate(METRICS) if metric.labels[: len(SERIES_LABELS)] == SERIES_LABELS
)
_END = "\0"
"""Between the families of a group's text; no label holds it, since all are printable."""

_SHARED = "\1"
"""Where the labels go that all samples of a group share."""


class _Layout:
    """Which samples a group has; shared by all groups that have the same."""

    def __init__(self, entries: tuple[tuple[str, tuple[str, ...]], ...], shared: int) -> None:
        # In the order of the table, and within a family as they came.
        self.order = sorted(range(len(entries)), key=lambda at: _FAMILY[entries[at][0]])
        self.entries = tuple(entries[at] for at in self.order)
        self.families: list[int] = []
        self.sizes: list[int] = []
        lines: list[str] = []
        for name, extra in self.entries:
            family = _FAMILY[name]
            if not self.families or self.families[-1] != family:
                if lines:
                    lines.append(_END)
                self.families.append(family)
                self.sizes.append(0)
            self.sizes[-1] += 1
            lines.append(self._line(name, extra, shared))
        self.template = "".join(lines)
        self._shared = shared

    @functools.cached_property
    def encoded(self) -> tuple[bytes, ...]:
        """Labels of each sample behind the shared ones, as protobuf."""
        return tuple(
            native.labels(zip(_label_names(name)[self._shared :], extra, strict=True))
            for name, extra in self.entries
        )

    @staticmethod
    def _line(name: str, extra: tuple[str, ...], shared: int) -> str:
        names = _label_names(name)[shared:]
        pairs = ",".join(_pair(*pair) for pair in zip(names, extra, strict=True)).replace("%", "%%")
        if not shared and not pairs:
            return f"{name} %r\n"
        start = _SHARED + ("," if pairs else "") if shared else ""
        return f"{name}{{{start}{pairs}}} %r\n"


class _Block:
    """A group, ready to be written."""

    __slots__ = ("distribution", "labels", "layout", "shared", "values")

    def __init__(self, group: Group, layouts: dict[object, _Layout]) -> None:
        entries = tuple((name, extra) for name, extra, _ in group.samples)
        key = (len(group.labels), entries)
        layout = layouts.get(key)
        if layout is None:
            if len(layouts) >= 10_000:
                # Each has kilobytes, and a board could make up ever new ones.
                layouts.clear()
            layout = layouts[key] = _Layout(entries, len(group.labels))
        self.layout = layout
        self.labels = group.labels
        names = _label_names(group.samples[0][0]) if group.samples else ()
        self.shared = ",".join(_pair(name, value) for name, value in zip(names, group.labels, strict=False))
        self.values = tuple(group.samples[at][2] for at in layout.order)
        self.distribution = group.distribution

    def cells(self) -> list[str]:
        """Returns the text of each of its families, in the order of its layout."""
        layout = self.layout
        return (layout.template % self.values).replace(_SHARED, self.shared).split(_END)

    def encoded(self, families: Container[int]) -> Iterator[tuple[int, bytes]]:
        """Returns those of its families as protobuf: (family, fields of a MetricFamily)."""
        layout, at = self.layout, 0
        shared = b""
        for family, size in zip(layout.families, layout.sizes, strict=True):
            begin, at = at, at + size
            if family not in families:
                continue
            metric = METRICS[family]
            shared = shared or native.labels(zip(metric.labels, self.labels, strict=False))
            values = self.values[begin:at]
            if metric.kind == "histogram":
                entries = layout.entries[begin:at]
                yield family, native.histogram_metric(shared, entries, values, self.distribution)
            else:
                yield (
                    family,
                    native.metrics(metric.kind, shared, layout.encoded[begin:at], values),
                )

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Returns (name, labels, value) of each sample."""
        for (name, extra), value in zip(self.layout.entries, self.values, strict=True):
            names = _label_names(name)
            yield name, dict(zip(names, (*self.labels, *extra), strict=True)), value


def _label_names(name: str) -> tuple[str, ...]:
    names = METRICS[_FAMILY[name]].labels
    return (*names, "le") if name.endswith("_bucket") else names


def _pair(name: str, value: str) -> str:
    if "\\" in value or '"' in value:
        value = value.replace("\\", r"\\").replace('"', r"\"")
    return f'{name}="{value}"'


_Key = tuple[str, tuple[int | None, bool]]
"""Run, and what of its block may still change: drifts, and whether its distribution is there."""


@dataclass
class _Board:
    """What is known of one board."""

    segment: _Segment
    read_at: float = 0.0
    """When its results were last read, monotonic seconds."""
    expires_at: float = float("inf")
    """When the first of its results is too old to be shown."""
    hello: object = None
    state: object = None
    about: _Block | None = None
    about_lost: tuple[int, int] = (0, 0)
    """How many of its samples were duplicates, how many texts cut."""
    now: _Block | None = None
    results: list[_Block] = field(default_factory=list)
    known: dict[_Key, tuple[_Block, int, int]] = field(default_factory=dict)
    """By what a result is: its block, how many samples were duplicates, how many texts cut."""
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def weight(self) -> int:
        """Number of its groups."""
        return 2 + len(self.results)


class _Segment:
    """A part of the fleet, and its text by family as of the last scrape."""

    def __init__(self) -> None:
        self.boards: dict[str, _Board] = {}
        self.text: dict[int, bytes] = {}
        self.encoded: dict[int, bytes] = {}
        """The same as protobuf; made only when it is asked for."""
        self._dirty: set[int] = set()

    @property
    def weight(self) -> int:
        return sum(board.weight for board in self.boards.values())

    def changed(self, before: Iterable[_Block | None], after: Iterable[_Block | None]) -> None:
        """Notes the families whose text is another when these blocks become those."""
        for old, new in zip(before, after, strict=True):
            if old is None or new is None or old.layout is not new.layout or old.shared != new.shared:
                for block in (old, new):
                    if block is not None:
                        self._dirty.update(block.layout.families)
            else:
                at = 0
                for family, size in zip(new.layout.families, new.layout.sizes, strict=True):
                    if old.values[at : at + size] != new.values[at : at + size]:
                        self._dirty.add(family)
                    at += size
                if old.distribution != new.distribution:
                    self._dirty.add(_FAMILY["boardbench_latency_distribution_seconds_bucket"])

    def _blocks(self, families: Collection[int]) -> Iterator[_Block]:
        """Returns the blocks that can have one of these families."""
        results = not _RESULT_FAMILIES.isdisjoint(families)
        others = not _RESULT_FAMILIES.issuperset(families)
        for board in self.boards.values():
            if others:
                if board.about is not None:
                    yield board.about
                if board.now is not None:
                    yield board.now
            if results:
                yield from board.results

    def settle(self) -> None:
        """Writes what has changed."""
        if not self._dirty:
            return
        columns: dict[int, list[str]] = {family: [] for family in self._dirty}
        if len(columns) > len(METRICS) // 4:
            # Most of a group is wanted: writing all of it and picking is cheaper than finding the places.
            for layout, alike in itertools.groupby(self._blocks(self._dirty), lambda block: block.layout):
                cells_by_family = zip(*(block.cells() for block in alike), strict=True)
                for family, same in zip(layout.families, cells_by_family, strict=True):
                    if family in columns:
                        columns[family].append("".join(same))
        else:
            for block in self._blocks(self._dirty):
                if not columns.keys().isdisjoint(block.layout.families):
                    for family, cell in zip(block.layout.families, block.cells(), strict=True):
                        if family in columns:
                            columns[family].append(cell)
        for family, cells in columns.items():
            self.encoded.pop(family, None)
            if cells:
                self.text[family] = "".join(cells).encode()
            else:
                self.text.pop(family, None)
        self._dirty.clear()

    def encode(self) -> None:
        """Writes as protobuf what is not there yet."""
        missing = self.text.keys() - self.encoded.keys()
        if not missing:
            return
        columns: dict[int, list[bytes]] = {family: [] for family in missing}
        for block in self._blocks(missing):
            for family, cell in block.encoded(columns):
                columns[family].append(cell)
        self.encoded.update((family, b"".join(cells)) for family, cells in columns.items())


class Exposition:
    """The series of a fleet, kept between scrapes. :meth:`take` and :meth:`page` are called by turns."""

    def __init__(
        self,
        *,
        version: str,
        series_ttl_seconds: float,
        result_ttl_seconds: float,
        series_per_device: int,
        python: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._version = version
        self._python = python or platform.python_version()
        self._series_ttl_seconds = series_ttl_seconds
        self._result_ttl_seconds = result_ttl_seconds
        self._series_per_device = series_per_device
        self._monotonic = monotonic
        self._boards: dict[str, _Board] = {}
        self._segments: list[_Segment] = []
        self._layouts: dict[object, _Layout] = {}
        self._shapes: dict[str, Distribution | None] = {}
        self._own: tuple[_Block, ...] = ()
        self._scrapes = 0

    def present(self, views: Iterable[DeviceView], at: float) -> set[str]:
        """Returns the boards that have series at this time."""
        return {
            view.device_id for view in views if view.up or at - view.last_seen_at <= self._series_ttl_seconds
        }

    def wanted(self, views: Collection[DeviceView], news: News, at: float) -> frozenset[str]:
        """Returns the boards whose results must be read before :meth:`take`."""
        now = self._monotonic()
        wanted: set[str] = set()
        old: list[tuple[float, str]] = []
        for device_id in self.present(views, at):
            board = self._boards.get(device_id)
            if board is None or device_id in news.devices or board.expires_at < at:
                wanted.add(device_id)
            elif now - board.read_at > _REREAD_SECONDS:
                old.append((board.read_at, device_id))
        old.sort()
        wanted.update(device_id for _, device_id in old[: 1 + int(len(self._boards) * _REREAD_SHARE)])
        return frozenset(wanted)

    def shapeless(self, results: Iterable[LatestResult]) -> list[str]:
        """Returns the runs among these whose samples are needed, as many as one scrape may read."""
        runs = [entry.result for entry in results]
        for run in runs:
            if run.latency.HasField("histogram") and run.run_id not in self._shapes:
                self._shapes[run.run_id] = distribution_of(run.latency)
        missing = (run.run_id for run in runs if run.latency.count and run.run_id not in self._shapes)
        return [run_id for run_id, _ in zip(missing, range(_SHAPES_PER_SCRAPE), strict=False)]

    def shapes(self, samples: Mapping[str, Sequence[int]]) -> None:
        """Takes the samples of runs, in nanoseconds."""
        for run_id, latencies in samples.items():
            self._shapes[run_id] = distribution(latencies)

    def take(self, snapshot: Snapshot) -> None:
        """Takes in what was read."""
        present = self.present(snapshot.devices, snapshot.at)
        for device_id in [device_id for device_id in self._boards if device_id not in present]:
            self._remove(device_id)
        read: dict[str, list[LatestResult]] = {}
        for entry in snapshot.latest.results:
            if entry.device_id in present:
                read.setdefault(entry.device_id, []).append(entry)
        runs: dict[str, list[tuple[int, int]]] = {}
        for outcomes in snapshot.outcomes:
            runs.setdefault(outcomes.device_id, []).append((outcomes.status, outcomes.total))
        for view in snapshot.devices:
            device_id = view.device_id
            if device_id not in present:
                continue
            board = self._boards.get(device_id)
            if board is None:
                board = self._boards[device_id] = _Board(self._segment())
                board.segment.boards[device_id] = board
            if snapshot.read is None or device_id in snapshot.read:
                left_out = snapshot.latest.left_out.get(device_id, 0)
                self._results(board, read.get(device_id, []), left_out)
            self._facts(board, view, tuple(runs.get(device_id, ())))
        kept = {run_id for board in self._boards.values() for run_id, _ in board.known}
        if len(self._shapes) > 2 * len(kept) + 100:
            self._shapes = {run: shape for run, shape in self._shapes.items() if run in kept}

    def _segment(self) -> _Segment:
        """Returns a segment that has room."""
        if not self._segments or self._segments[-1].weight >= _SEGMENT_GROUPS:
            roomy = next((s for s in self._segments if s.weight < _SEGMENT_GROUPS // 4), None)
            if roomy is not None:
                return roomy
            self._segments.append(_Segment())
        return self._segments[-1]

    def _remove(self, device_id: str) -> None:
        board = self._boards.pop(device_id)
        blocks = (board.about, board.now, *board.results)
        board.segment.changed(blocks, itertools.repeat(None, len(blocks)))
        del board.segment.boards[device_id]

    def _results(self, board: _Board, entries: list[LatestResult], left_out: int) -> None:
        """Shows these results of the board in place of those before, as many as it may have."""
        known: dict[_Key, tuple[_Block, int, int]] = {}
        shown: set[tuple[str, ...]] = set()
        blocks: list[_Block] = []
        series = duplicates = beyond = cut = 0
        for entry in entries:
            run_id = entry.result.run_id
            shape = self._shapes.get(run_id)
            key: _Key = (run_id, (entry.drifts, shape is not None))
            found = board.known.get(key)
            if found is None:
                try:
                    group = result_group(entry, shape)
                    found = (_Block(group, self._layouts), group.duplicates, group.cut)
                except Exception:
                    # One board must not make all others vanish, whatever it has sent.
                    _log.exception("device %s, run %s: not shown", entry.device_id, run_id)
                    left_out += 1
                    continue
            block = found[0]
            known[key] = found
            if block.labels in shown:
                duplicates += len(block.values)
                continue
            shown.add(block.labels)
            if series + len(block.values) > self._series_per_device:
                left_out += 1
                beyond += len(block.values)
                continue
            series += len(block.values)
            duplicates += found[1]
            cut += found[2]
            blocks.append(block)
        before = {block.labels: block for block in board.results}
        after = {block.labels: block for block in blocks}
        labels = before | after
        board.segment.changed([before.get(name) for name in labels], [after.get(name) for name in labels])
        board.results = blocks
        board.known = known
        board.left_out = LeftOut(left_out, duplicates, beyond, cut)
        board.read_at = self._monotonic()
        ages = [entry.received_at for entry in entries]
        board.expires_at = min(ages) + self._result_ttl_seconds if ages else float("inf")
        if self.shapeless(entries):
            # There were too many for one scrape: the next goes on.
            board.expires_at = 0.0

    def _facts(self, board: _Board, view: DeviceView, runs: tuple[tuple[int, int], ...]) -> None:
        """Shows what the board says about itself, where that has changed."""
        before = (board.about, board.now)
        if board.hello is not view.hello and board.hello != view.hello:
            group = board_group(view.hello)
            board.about = _Block(group, self._layouts)
            board.hello = view.hello
            board.state = None
            board.about_lost = (group.duplicates, group.cut)
        state = (view.up, view.last_seen_at, view.clock_offset_seconds, runs, board.left_out)
        if board.state != state:
            duplicates, cut = board.about_lost
            left_out = board.left_out
            whole = LeftOut(
                left_out.results, left_out.duplicates + duplicates, left_out.series, left_out.cut + cut
            )
            board.now = _Block(state_group(view, runs, whole), self._layouts)
            board.state = state
        board.segment.changed(before, (board.about, board.now))

    def settle(self) -> int:
        """Writes down what has changed; returns how many series the boards have."""
        for segment in self._segments:
            segment.settle()
        return sum(
            len(block.values)
            for board in self._boards.values()
            for block in (board.about, board.now, *board.results)
            if block is not None
        )

    def own(self, snapshot: Snapshot, series: int, *, store_seconds: float, seconds: float) -> None:
        """Takes what the collector says about itself and about this scrape."""
        group = collector_group(snapshot, self._version, self._python)
        group.samples += [
            ("boardbench_collector_series", (), series),
            ("boardbench_collector_scrapes_total", (), self._scrapes),
            ("boardbench_collector_scrape_store_seconds", (), store_seconds),
            ("boardbench_collector_scrape_duration_seconds", (), seconds),
        ]
        self._scrapes += 1
        self._own = (_Block(group, self._layouts),)

    def page(self, content_type: str) -> bytes:
        """Returns everything in one of the formats, as of the last :meth:`settle`."""
        return b"".join(self.pieces(content_type))

    def pieces(self, content_type: str) -> list[bytes]:
        """Returns the page as it is kept: joining it costs a fourth of writing it, and its memory again."""
        if content_type == PROTOBUF:
            return self._protobuf()
        openmetrics = content_type == OPENMETRICS
        own: dict[int, list[str]] = {}
        for block in self._own:
            for family, cell in zip(block.layout.families, block.cells(), strict=True):
                own.setdefault(family, []).append(cell)
        pieces: list[bytes] = []
        for family in range(len(METRICS)):
            texts = [text for segment in self._segments if (text := segment.text.get(family))]
            texts += [cell.encode() for cell in own.get(family, ())]
            if texts:
                pieces.append(_HEADS[openmetrics][family])
                pieces += texts
        return pieces

    def _protobuf(self) -> list[bytes]:
        own: dict[int, list[bytes]] = {}
        for block in self._own:
            for family, cell in block.encoded(range(len(METRICS))):
                own.setdefault(family, []).append(cell)
        for segment in self._segments:
            segment.encode()
        pieces: list[bytes] = []
        for family, metric in enumerate(METRICS):
            metrics = [found for segment in self._segments if (found := segment.encoded.get(family))]
            metrics += own.get(family, [])
            if metrics:
                pieces.append(native.family(metric, b"".join(metrics)))
        return pieces

    def series(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Returns (name, labels, value) of everything that the page shows, in no order that matters."""
        for board in self._boards.values():
            for block in (board.about, board.now, *board.results):
                if block is not None:
                    yield from block.samples()
        for block in self._own:
            yield from block.samples()


def _heads(openmetrics: bool) -> list[bytes]:
    heads = []
    for metric in METRICS:
        name, kind = (metric.base_name, metric.kind) if openmetrics else (metric.name, metric.kind)
        if kind == "info" and not openmetrics:
            kind = "gauge"
        meaning = metric.meaning.replace("\\", r"\\").replace("\n", r"\n")
        if openmetrics:
            meaning = meaning.replace('"', r"\"")
        heads.append(f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n".encode())
    return heads


_HEADS: Mapping[bool, list[bytes]] = {False: _heads(False), True: _heads(True)}


class Scrapes:
    """Answers scrapes, one after the other."""

    def __init__(
        self,
        look: ReadModel,
        exposition: Exposition,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look
        self._exposition = exposition
        self._monotonic = monotonic
        self._turn = asyncio.Lock()
        self._position = 0
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    async def answer(self, accept: str, *, zipped: bool) -> tuple[bytes, str]:
        """Returns (body, content type) in the format that the Accept header asks for."""
        content_type = choose(accept)
        async with self._turn:
            began = self._monotonic()
            snapshot, position = await self._read()
            read = self._monotonic()
            # Not in the loop: while a large fleet is written down, results still come in.
            pieces = await asyncio.to_thread(self._write, snapshot, content_type, began, read)
            # Only now: what failed before is read again by the next scrape.
            self._position = position
        return await asyncio.to_thread(zipped_of if zipped else b"".join, pieces), content_type

    async def _read(self) -> tuple[Snapshot, int]:
        """Returns what is new, up to where it was read, and takes the samples of new results."""
        exposition = self._exposition
        news = await self._look.news(self._position)
        views = await self._look.views()
        at = self._look.now()
        wanted = exposition.wanted(views, news, at)
        everything = len(wanted) == len(views)
        snapshot = await self._look.snapshot(
            views=views, devices=None if everything and self._position == 0 else wanted
        )
        missing = exposition.shapeless(snapshot.latest.results)
        for begin in range(0, len(missing), _SHAPES_AT_ONCE):
            runs = missing[begin : begin + _SHAPES_AT_ONCE]
            samples = await asyncio.gather(*(self._look.samples(run_id) for run_id in runs))
            await asyncio.to_thread(exposition.shapes, dict(zip(runs, samples, strict=True)))
        return snapshot, news.position

    def _write(self, snapshot: Snapshot, content_type: str, began: float, read: float) -> list[bytes]:
        exposition = self._exposition
        exposition.take(snapshot)
        series = exposition.settle()
        exposition.own(snapshot, series, store_seconds=read - began, seconds=self._monotonic() - began)
        pieces = exposition.pieces(content_type)
        if content_type == PROTOBUF:
            pieces.append(native.registry(self._process))
        elif content_type == OPENMETRICS:
            pieces.append(_openmetrics(self._process))
        else:
            pieces.append(generate_latest(self._process))
        return pieces


def zipped_of(pieces: Iterable[bytes]) -> bytes:
    """Returns the page that these are, as a gzip file."""
    compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW_BITS)
    return b"".join([*map(compressor.compress, pieces), compressor.flush()])


def _openmetrics(registry: CollectorRegistry) -> bytes:
    encode, _ = choose_encoder(OPENMETRICS)
    return encode(registry)


def choose(accept: str) -> str:
    """Returns the content type to answer with: of what the Accept header allows, the first that is known.

    Prometheus names protobuf first where native histograms are switched on, and OpenMetrics otherwise.
    """
    best: tuple[float, int] | None = None
    chosen = TEXT
    for place, part in enumerate(accept.split(",")):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        told = dict(parameter.partition("=")[::2] for parameter in parameters)
        if kind == "application/openmetrics-text" and told.get("version", "1.0.0") in {"1.0.0", "0.0.1"}:
            offered = OPENMETRICS
        elif (
            kind == "application/vnd.google.protobuf"
            and told.get("proto", "").strip('"') == "io.prometheus.client.metricfamily"
            and told.get("encoding", "").strip('"') == "delimited"
        ):
            offered = PROTOBUF
        elif kind in {"text/plain", "text/*", "*/*"} and told.get("version", "0.0.4") == "0.0.4":
            offered = TEXT
        else:
            continue
        try:
            weight = float(told.get("q", "1"))
        except ValueError:
            continue
        if weight > 0 and (best is None or (-weight, place) < best):
            best, chosen = (-weight, place), offered
    return chosen
