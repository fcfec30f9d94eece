"""Where the ops of each model ran last time: a run of the same model that is placed otherwise is told.

    <SHA-256 of the model>-<CRC of the key>.placement    a line of JSON; the placement, compressed

The key holds what was asked for (model, runtime, device, options, threads, shapes) and no version: a new
version of the runtime or of the accelerator's library that places a model otherwise is what is looked for.
A placement is remembered once the result that tells about it is in the spool: after a power cut the agent may
tell something twice, and never not at all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from boardbench.agent import folder, validity
from boardbench.v1 import placement_pb2, result_pb2

_log = logging.getLogger(__name__)

# As many models as a lab tries on a board in a year; 10 KB each at most but for a few.
KEPT = 512
KEPT_BYTES = 8 * 1024 * 1024
# Beyond it (some 50,000 ops) only how many ops each unit has is kept.
_ONE_BYTES = 512 * 1024

_OPS_NAMED = 6
_NAME_LENGTH = 60

_UNITS: dict[int, str] = {
    placement_pb2.UNIT_CPU: "the CPU",
    placement_pb2.UNIT_CPU_DELEGATE: "a CPU delegate",
    placement_pb2.UNIT_GPU: "the GPU",
    placement_pb2.UNIT_TPU: "the TPU",
    placement_pb2.UNIT_NPU: "the NPU",
    placement_pb2.UNIT_DELEGATE: "a delegate",
}
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, zlib.error, DecodeError)

# A unit, and the delegate where the unit alone does not tell one from another.
_Place = tuple[int, str]
_OpKey = tuple[str, str, int]


@dataclass(frozen=True)
class _Last:
    """A placement of a former run."""

    key: str
    run_id: str
    ended: str
    versions: tuple[str, ...]
    placement: placement_pb2.Placement


class Placements:
    """The last placement of every model, in one folder. Every call blocks on the disk; none raises for it."""

    def __init__(self, root: Path, *, kept: int = KEPT, kept_bytes: int = KEPT_BYTES) -> None:
        """``root`` is made when it is needed. At most so many placements, and bytes of them, are kept."""
        self._root = root
        self._kept = kept
        self._kept_bytes = kept_bytes

    def compare(self, result: result_pb2.RunResult) -> result_pb2.Warning | None:
        """A warning when ops ran elsewhere than the last time; None too where either is not known."""
        if not _is_known(result):
            return None
        last = self._read(result)
        if last is None:
            return None
        moved = difference(last.placement, result.placement)
        if not moved:
            return None
        then, now = last.versions, _versions(result)
        versions = f"{', '.join(now)} both times"
        if then != now:
            versions = f"{', '.join(then)} then, {', '.join(now)} now"
        return validity.warn(
            "placement_drifted",
            f"{moved} than in run {last.run_id} of the same model with the same settings, "
            f"which ended {last.ended} ({versions})",
            validity.NOTE,
        )

    def remember(self, result: result_pb2.RunResult) -> None:
        """The placement is what the next run of this model is compared with, when it is known."""
        if not _is_known(result):
            return
        path = self._path(result)
        try:
            last = self._read(result)
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.replace(path, _content(result, last))
            self._make_room(path)
        except OSError as error:
            _log.warning("%s: the placement of the last run can't be kept: %s", path, error)

    def _path(self, result: result_pb2.RunResult) -> Path:
        key = json.dumps(_key(result)).encode()
        return self._root / f"{result.model.sha256}-{zlib.crc32(key):08x}.placement"

    def _read(self, result: result_pb2.RunResult) -> _Last | None:
        path = self._path(result)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        try:
            last = _parsed(content)
        except _DAMAGE as error:
            _log.warning("%s: not readable; removed: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        # Two keys may have one CRC.
        return last if last.key == json.dumps(_key(result)) else None

    def _make_room(self, newest: Path) -> None:
        """Removes the placements that were not renewed for longest, and what a power cut left half done."""
        files = []
        for path in self._root.iterdir():
            if path.suffix == ".tmp":
                path.unlink(missing_ok=True)
            elif path != newest:
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    files.append((state.st_mtime_ns, state.st_size, path))
        files.sort(reverse=True)
        size = newest.stat().st_size
        for kept, (_, size_bytes, path) in enumerate(files, 2):
            size += size_bytes
            if kept > self._kept or size > self._kept_bytes:
                path.unlink(missing_ok=True)


def _key(result: result_pb2.RunResult) -> list[object]:
    """What two runs must share for a difference between them to be a drift."""
    spec = result.spec
    return [
        result.model.sha256,
        result.runtime.name,
        spec.device or result.runtime.device or "cpu",
        sorted(spec.options.items()),
        spec.threads if spec.HasField("threads") else None,
        sorted((name, list(shape.dimensions)) for name, shape in spec.shapes.items()),
        spec.inputs_sha256,
        # Other shapes than the model has; left out where there is none, as former versions did.
        *([spec.scenario.batch] if spec.scenario.HasField("batch") else []),
        *([spec.compute_precision] if spec.compute_precision else []),
    ]


def _is_known(result: result_pb2.RunResult) -> bool:
    """Whether it is known where the ops ran: told by the runtime, or seen, and not contradicted."""
    placement = result.placement
    unproven = (
        placement_pb2.EVIDENCE_UNSPECIFIED,
        placement_pb2.EVIDENCE_PREDICTION,
        # The same file says the same, wherever it runs.
        placement_pb2.EVIDENCE_STATIC,
    )
    return (
        result.status == result_pb2.RUN_STATUS_SUCCEEDED
        and placement.evidence not in unproven
        and placement.verdict != placement_pb2.PLACEMENT_VERDICT_CONTRADICTED
        and bool(placement.units or placement.ops)
    )


def _versions(result: result_pb2.RunResult) -> tuple[str, ...]:
    found = (result.runtime.version or result.runtime.name, result.accelerator.library_version)
    return tuple(version for version in found if version)


# What differs


def difference(before: placement_pb2.Placement, after: placement_pb2.Placement) -> str:
    """What ran elsewhere, as the beginning of a sentence; empty when nothing did."""
    then, now = _places(before), _places(after)
    moved = [key for key in now if key in then and then[key] != now[key]]
    if moved:
        return _told(moved, then, now)
    if then and now:
        # Not the same ops: an engine may fuse others than it did. That alone is no drift.
        open_ = placement_pb2.PLACEMENT_VERDICT_UNSPECIFIED
        same = before.verdict == after.verdict or open_ in (before.verdict, after.verdict)
    else:
        units = _units(before), _units(after)
        same = units[0] == units[1] or any(placement_pb2.UNIT_UNSPECIFIED in found for found in units)
    return "" if same else f"the ops run elsewhere ({_counts(after)}; before {_counts(before)})"


def _places(placement: placement_pb2.Placement) -> dict[_OpKey, _Place]:
    """Where each op of which it is known ran, by its type, name and place among its like."""
    seen: Counter[tuple[str, str]] = Counter()
    places: dict[_OpKey, _Place] = {}
    for op in placement.ops:
        like = (op.type, op.name)
        if op.unit != placement_pb2.UNIT_UNSPECIFIED:
            places[op.type, op.name, seen[like]] = _place(op)
        seen[like] += 1
    return places


def _place(op: placement_pb2.OpPlacement) -> _Place:
    return op.unit, op.delegate if op.unit == placement_pb2.UNIT_DELEGATE else ""


def _units(placement: placement_pb2.Placement) -> dict[int, int]:
    return {entry.unit: entry.ops for entry in placement.units if entry.ops}


def _counts(placement: placement_pb2.Placement) -> str:
    return ", ".join(
        f"{ops} on {_UNITS.get(unit, 'no known unit')}" for unit, ops in _units(placement).items()
    )


def _told(moved: Sequence[_OpKey], then: dict[_OpKey, _Place], now: dict[_OpKey, _Place]) -> str:
    ways: dict[tuple[_Place, _Place], list[_OpKey]] = {}
    for key in moved:
        ways.setdefault((then[key], now[key]), []).append(key)
    parts = [
        f"{len(keys)} from {_where(old)} to {_where(new)} ({', '.join(_named(keys))})"
        for (old, new), keys in sorted(ways.items(), key=lambda way: -len(way[1]))
    ]
    return f"{len(moved)} of {len(now)} ops run elsewhere, {'; '.join(parts)},"


def _where(place: _Place) -> str:
    unit, delegate = place
    return f"the delegate {delegate}" if delegate else _UNITS.get(unit, "a unit of no known kind")


def _named(keys: Sequence[_OpKey]) -> Iterator[str]:
    for kind, name, _ in keys[:_OPS_NAMED]:
        clipped = name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
        yield f"{kind} {clipped}".strip()
    if len(keys) > _OPS_NAMED:
        yield f"and {len(keys) - _OPS_NAMED} more"


# On disk


def _content(result: result_pb2.RunResult, last: _Last | None) -> bytes:
    ended = time.gmtime(result.finished_at.seconds)
    head: dict[str, object] = {
        "run_id": result.run_id,
        "ended": time.strftime("%Y-%m-%d %H:%M UTC", ended),
        "versions": _versions(result),
        "key": _key(result),
    }
    kept = placement_pb2.Placement(
        evidence=result.placement.evidence, verdict=result.placement.verdict, units=result.placement.units
    )
    known = {} if last is None else _places(last.placement)
    seen: Counter[tuple[str, str]] = Counter()
    for op in result.placement.ops:
        like = (op.type, op.name)
        # An op of which nothing is known now is still where it was known to be.
        unit, delegate = known.get((op.type, op.name, seen[like]), (0, "")) if not op.unit else _place(op)
        kept.ops.add(type=op.type, name=op.name, unit=placement_pb2.Unit.ValueType(unit), delegate=delegate)
        seen[like] += 1
    content = _packed(head, kept)
    if len(content) > _ONE_BYTES:
        del kept.ops[:]
        content = _packed(head, kept)
    return content


def _packed(head: dict[str, object], placement: placement_pb2.Placement) -> bytes:
    return json.dumps(head).encode() + b"\n" + zlib.compress(placement.SerializeToString())


def _parsed(content: bytes) -> _Last:
    head, _, packed = content.partition(b"\n")
    about = json.loads(head)
    return _Last(
        key=json.dumps(about["key"]),
        run_id=str(about["run_id"]),
        ended=str(about["ended"]),
        versions=tuple(str(version) for version in about["versions"]),
        placement=placement_pb2.Placement.FromString(zlib.decompress(packed)),
    )
