"""Where the time of a TensorFlow Lite inference goes.

With a delegate on an accelerator, the model is cut where it changes hands (:mod:`.tflite_cut`), and the
parts run one after the other, each in an interpreter of its own, as they do inside the whole: on the data
that the part before made, the parts on the CPU after the processor has waited for the accelerator. What an
invocation costs by itself is measured with an empty model and taken off. Where the delegate takes a part
otherwise than it takes the whole, the whole runs in turn with the parts on the CPU instead. For how long each
part had no processor, because of other work on the board, is told beside its time.

Inside a part on the CPU, LiteRT's profiler tells the share of each operation (:mod:`.litert_profiler`); where
it can't be had, each runs in an interpreter of its own, and those that XNNPACK took together have no time of
their own. Shares are told as shares of the part's time in turn.
"""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from boardbench.agent.bench.crossings import Part
from boardbench.agent.bench.laps import Lap, Track
from boardbench.agent.bench.runtime import NoProfile, Profile, ProfileRequest
from boardbench.agent.bench.runtimes import litert_profiler, xnnpack_names
from boardbench.agent.bench.runtimes.tflite_cut import CanNotCut, cut
from boardbench.agent.bench.runtimes.tflite_parts import (
    DELEGATE_NODE,
    Node,
    closure,
    joined,
    nodes_of,
    originals_of,
    parts_of,
)
from boardbench.agent.bench.stats import midmean
from boardbench.agent.domain import Placement, Unit

if TYPE_CHECKING:
    import numpy as np

    from boardbench.agent.bench.runtimes.tflite import Maker, TfliteModel, TfliteRuntime

    Array = np.ndarray[Any, np.dtype[Any]]

IN_TURN = "parts in turn"
LITERT = "LiteRT profiler"
ONE_BY_ONE = "operations one by one"

SPLIT_RUNS = 20
"""Inferences for the shares inside one of several parts: they are weights, not durations."""

SPLIT_SECONDS = 20.0
"""For operations one by one, of which a model may have hundreds; those that are left then have no time."""

MOST_COPIED_BYTES = 512 << 20
"""Every part is a copy of the file, on the disk of the board."""

_EMPTY_RUNS = 200
_WAITING_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 0.1
"""For invocations after a wait, of which each costs the wait; after a tenth of a second no cache is warm."""

_LONGEST_TRIAL_SECONDS = 0.5
"""A call that takes longer is tried once only."""

_TOLD_QUEUE = 0.01
"""Share of the time: less is no matter."""

_APART = (Unit.TPU, Unit.GPU, Unit.NPU)
"""Not a delegate of which nobody knows where it computes."""


class _TakenOtherwise(Exception):
    """The delegate takes of a part something else than it took of the whole."""


@dataclass
class _Work:
    """A model to profile: what is known of it, and the data that its tensors hold."""

    path: Path
    content: bytes
    maker: Maker
    placement: Placement
    wanted: str
    nodes: Tuple[Node, ...]
    """The model's own, by operation."""

    parts: Tuple[Part, ...]
    inputs: Tuple[int, ...]
    outputs: Tuple[int, ...]
    folder: Path
    values: Dict[int, Array] = field(default_factory=dict)

    @property
    def apart(self) -> bool:
        """Whether the accelerator is hardware of its own, for which the processor waits."""
        return any(op.unit in _APART for op in self.placement.ops)

    @property
    def segments(self) -> List[Part]:
        return joined(self.parts, self.outputs)


def profile(runtime: TfliteRuntime, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    """Profiles the model as it was loaded in the run. Raises NoProfile, and what ``load`` raises."""
    with tempfile.TemporaryDirectory(prefix="boardbench-profile-") as folder:
        work = _begin(runtime, request, Path(folder))
        try:
            return _profile(work, request, runs)
        except (CanNotCut, MemoryError) as error:
            raise NoProfile(f"the model can't be taken apart: {error or 'memory ran out'}") from error
        except (RuntimeError, ValueError, TypeError) as error:  # by the interpreter, about a part
            raise NoProfile(f"a part of the model does not run by itself: {error}") from error


def _begin(runtime: TfliteRuntime, request: ProfileRequest, folder: Path) -> _Work:
    model: TfliteModel = runtime.load(
        request.model_path,
        device=request.device,
        threads=request.threads,
        options=request.options,
        shapes=request.shapes,
        allow_fallback=request.allow_fallback,
    )
    try:
        found = model.placement()
        if not found.ops:
            raise NoProfile(f"it is not known where operations run: {found.detail}")
        inputs = tuple(model.input_indices.values())
        outputs = tuple(model.output_indices.values())
        nodes = model.nodes()
        feeds = request.feeds(model.inputs)
        return _Work(
            path=request.model_path,
            content=request.model_path.read_bytes(),
            maker=model.maker,
            placement=found,
            wanted=model.wanted,
            nodes=tuple(originals_of(nodes).values()),
            parts=tuple(parts_of(nodes, found.ops, model.wanted, inputs=inputs, outputs=outputs)),
            inputs=inputs,
            outputs=outputs,
            folder=folder,
            values={index: feeds[name] for name, index in model.input_indices.items()},
        )
    finally:
        model.close()  # the accelerator serves one at a time, and memory one model


def _profile(work: _Work, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    segments = work.segments
    size = len(segments) * len(work.content)
    if size > min(MOST_COPIED_BYTES, shutil.disk_usage(work.folder).free // 2):
        raise NoProfile(f"it would be cut into {len(segments)} copies of {len(work.content)} bytes")
    timed: Optional[_Timed] = None
    if IN_TURN not in request.avoid:
        request.trying(IN_TURN)
        timed = _in_turn(work, segments, runs)
    elif work.wanted:
        raise NoProfile(f"{IN_TURN} ended the process")
    seconds: Dict[int, float] = {}
    ways: List[str] = []
    inferences: Sequence[float] = ()
    for at, segment in enumerate(segments):
        mean_seconds = midmean([run[at].seconds for run in timed.runs]) if timed is not None else None
        if len(segment.ops) == 1 and mean_seconds is not None:
            seconds[segment.ops[0]] = mean_seconds
        elif not segment.accelerated:
            turns = runs if len(segments) == 1 else (lambda: islice(runs(), SPLIT_RUNS))
            split = _split(work, segment, request, turns)
            if split is None:
                continue
            scale = 1.0 if mean_seconds is None else mean_seconds / split.whole
            seconds.update({op: value * scale for op, value in split.seconds.items()})
            inferences = inferences or split.inferences
            if split.way not in ways:
                ways.append(split.way)
    if timed is None and not inferences:
        raise NoProfile("every way of measuring ended the process")
    whole = list(timed.whole) if timed is not None else [Lap(each) for each in inferences]
    fallen = _fallback(segments, timed) if work.wanted and timed is not None else []
    queues = timed is not None and timed.knows_queue
    return Profile(
        method=timed.how if timed is not None else ways[0],
        detail=_detail(work, timed, seconds, ways),
        units=tuple(op.unit for op in work.placement.ops),
        whole_seconds=tuple(lap.seconds for lap in whole),
        fallback_seconds=tuple(lap.seconds for lap in fallen),
        whole_queued_seconds=tuple(lap.queued_seconds for lap in whole if queues),
        fallback_queued_seconds=tuple(lap.queued_seconds for lap in fallen if queues),
        whole_cpu_seconds=tuple(lap.cpu_seconds for lap in whole) if timed is not None else (),
        accelerator_apart=work.apart,
        op_seconds=seconds,
    )


def _fallback(segments: Sequence[Part], timed: _Timed) -> List[Lap]:
    """What of every run was in parts on the CPU."""
    away = [at for at, segment in enumerate(segments) if not segment.accelerated]
    return [sum((run[at] for at in away), Lap(0.0)) for run in timed.runs]


def _detail(work: _Work, timed: Optional[_Timed], seconds: Mapping[int, float], ways: Sequence[str]) -> str:
    text = f"{len(seconds)} of {len(work.placement.ops)} operations have a time of their own"
    if timed is not None:
        whole = median(lap.seconds for lap in timed.whole)
        text += f"; {len(timed.runs)} inferences of {_milliseconds(whole)}, {timed.how}"
        away = [part for part in work.segments if not part.accelerated]
        if work.wanted and away and len(away) < len(work.segments):
            on_cpu = median(lap.seconds for lap in _fallback(work.segments, timed))
            text += f", of which {_milliseconds(on_cpu)} in {len(away)} parts on the CPU"
        queued = sum(lap.queued_seconds for lap in timed.whole)
        if queued > _TOLD_QUEUE * sum(lap.seconds for lap in timed.whole):
            text += f"; {queued:.3g} s went by waiting for a processor that did other work"
    if ways:
        text += f"; inside parts by {' and '.join(ways)}"
    return text


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


# Parts in turn


@dataclass(frozen=True)
class _Timed:
    """Every segment in every run, and every run as a whole."""

    how: str
    runs: Tuple[Tuple[Lap, ...], ...]
    whole: Tuple[Lap, ...]
    knows_queue: bool


def _in_turn(work: _Work, segments: Sequence[Part], runs: Callable[[], Iterable[int]]) -> _Timed:
    with Track() as track:
        try:
            return _all_in_turn(work, segments, runs, track)
        except _TakenOtherwise:
            gc.collect()  # the delegates of the attempt
            return _after_the_whole(work, segments, runs, track)


def _all_in_turn(
    work: _Work, segments: Sequence[Part], runs: Callable[[], Iterable[int]], track: Track
) -> _Timed:
    hot = _empty_seconds(work, track)
    invokes = [
        _piece(work, segment, f"segment-{at}", keep=True).invoke for at, segment in enumerate(segments)
    ]
    cold = hot
    if work.apart:
        trial = _trial(track, invokes)
        waits = [seconds for seconds, segment in zip(trial, segments) if segment.accelerated]
        cold = _empty_seconds(work, track, median(waits))
    # After an accelerator's part the way back is cold; it leads into the part on the CPU, which is warm.
    overheads = [cold if segment.accelerated else hot for segment in segments]
    laps = tuple(
        tuple(lap.less(overhead) for lap, overhead in zip(turn, overheads))
        for turn in track.laps(invokes, runs())
    )
    how = "parts of the model timed in turn" if len(segments) > 1 else "the model timed whole"
    # A whole inference costs an invocation once, as a counted one does.
    whole = tuple(sum(turn, Lap(hot)) for turn in laps)
    return _Timed(how, laps, whole, track.knows_queue)


def _after_the_whole(
    work: _Work, segments: Sequence[Part], runs: Callable[[], Iterable[int]], track: Track
) -> _Timed:
    """The same, with the parts on the accelerator only inside the whole.

    In their place the thread sleeps, so that those on the CPU run after a wait, as they do inside the whole.
    """
    whole = _whole(work)
    borders = {tensor for segment in segments for tensor in (*_fed(segment), *_made(segment))}
    seen = _whole(work, experimental_preserve_all_tensors=True)
    work.values.update({tensor: seen.get_tensor(tensor) for tensor in borders - set(work.values)})
    del seen
    on_cpu = {
        at: _piece(work, segment, f"segment-{at}", keep=True).invoke
        for at, segment in enumerate(segments)
        if not segment.accelerated
    }
    elsewhere = max(len(segments) - len(on_cpu), 1)
    whole_seconds, *seconds = _trial(track, [whole.invoke, *on_cpu.values()])
    pause = max(whole_seconds - sum(seconds), 0.0) / elsewhere if work.apart else 0.0
    overhead = _empty_seconds(work, track, pause)
    wait = (lambda: time.sleep(pause)) if pause else (lambda: None)
    calls = [on_cpu.get(at, wait) for at in range(len(segments))]
    timed, totals = [], []
    for total, *rest in track.laps([whole.invoke, *calls], runs()):
        parts = {at: rest[at].less(overhead) for at in on_cpu}
        # What is left is the accelerator's, and can't be divided among its parts.
        known = sum(parts.values(), Lap(overhead))
        left = Lap(
            max(total.seconds - known.seconds, 0.0) / elsewhere,
            max(total.queued_seconds - known.queued_seconds, 0.0) / elsewhere,
        )
        timed.append(tuple(parts.get(at, left) for at in range(len(segments))))
        totals.append(total)
    how = "parts on the CPU timed in turn with the whole model"
    return _Timed(how, tuple(timed), tuple(totals), track.knows_queue)


def _whole(work: _Work, **more: object) -> Any:
    external = work.maker.another() if work.maker.external is not None else None
    interpreter = work.maker.interpreter(work.path, external, **more)
    _set(interpreter, {tensor: work.values[tensor] for tensor in work.inputs})
    interpreter.invoke()
    return interpreter


def _empty_seconds(work: _Work, track: Track, wait_seconds: float = 0.0) -> float:
    """What an invocation costs by itself; more after a wait, when nothing of it is in the caches any more."""
    path = work.folder / "empty.tflite"
    path.write_bytes(cut(work.content, (), (), ()))
    interpreter = work.maker.interpreter(path, None)
    interpreter.allocate_tensors()
    if wait_seconds == 0.0:
        return _own_seconds(track.laps([interpreter.invoke], range(_EMPTY_RUNS)), 0)
    wait = min(wait_seconds, _LONGEST_WAIT_SECONDS)
    runs = min(int(_WAITING_SECONDS / wait), _EMPTY_RUNS)
    return _own_seconds(track.laps([lambda: time.sleep(wait), interpreter.invoke], range(runs)), 1)


def _trial(track: Track, calls: Sequence[Callable[[], object]]) -> List[float]:
    """About how long each call takes of its own."""
    laps = track.laps(calls, range(1))
    if sum(lap.seconds for lap in laps[0]) < _LONGEST_TRIAL_SECONDS:
        laps += track.laps(calls, range(2))
    return [_own_seconds(laps, at) for at in range(len(calls))]


def _own_seconds(laps: Sequence[Tuple[Lap, ...]], at: int) -> float:
    return median(turn[at].own_seconds for turn in laps)


def _piece(work: _Work, part: Part, name: str, *, keep: bool = False) -> Any:
    """An interpreter for a part, which has run once; what it made is among the values then.

    Raises _TakenOtherwise, NoProfile.
    """
    path = _cut(work, part, name)
    external = work.maker.another() if part.accelerated and work.maker.external is not None else None
    try:
        interpreter = work.maker.interpreter(path, external)
        # A delegate of one's own takes what it takes now, XNNPACK when tensors are allocated.
        if part.accelerated and len(_together(interpreter)) < len(part.ops):
            raise _TakenOtherwise
        _set(interpreter, {tensor: work.values[tensor] for tensor in _fed(part)})
        if not part.accelerated:
            _check_taken(work, part, interpreter)
        interpreter.invoke()
        for tensor in _made(part):
            work.values[tensor] = interpreter.get_tensor(tensor)
    finally:
        if not keep:
            path.unlink()
    return interpreter


def _fed(part: Part) -> List[int]:
    return [tensor for tensor in part.inputs if isinstance(tensor, int)]


def _made(part: Part) -> List[int]:
    return [tensor for tensor in part.outputs if isinstance(tensor, int)]


def _cut(work: _Work, part: Part, name: str) -> Path:
    """The file of a part, its inputs as large as they are in use."""
    path = work.folder / f"{name}.tflite"
    missing = [tensor for tensor in _fed(part) if tensor not in work.values]
    if missing:
        raise NoProfile(f"nothing makes tensor {missing[0]}, which a part of the model needs")
    shapes = {tensor: tuple(work.values[tensor].shape) for tensor in _fed(part)}
    path.write_bytes(cut(work.content, part.ops, _fed(part), _made(part), shapes))
    return path


def _set(interpreter: Any, values: Mapping[int, Array]) -> None:
    """Sets inputs, and the sizes of those that are of another in the file."""
    for detail in interpreter.get_input_details():
        shape = values[int(detail["index"])].shape
        if tuple(int(size) for size in detail["shape"]) != shape:
            interpreter.resize_tensor_input(detail["index"], list(shape))
    interpreter.allocate_tensors()
    for tensor, value in values.items():
        interpreter.set_tensor(tensor, value)


def _check_taken(work: _Work, part: Part, interpreter: Any) -> None:
    """Sees to it that XNNPACK took of a part what it took of it inside the whole."""
    taken = {part.ops[at] for at in _together(interpreter)}
    # What leads to no output, as an assignment to a variable, can't be told by the tensors: not here either.
    told = {part.ops[at] for at in _leading_to_outputs(interpreter)}
    expected = {op for op in part.ops if work.placement.ops[op].delegate} & told
    if taken != expected:
        raise NoProfile(
            f"XNNPACK takes {len(taken)} operations of a part of the model by itself, and {len(expected)} of "
            "it inside the whole"
        )


def _leading_to_outputs(interpreter: Any) -> Set[int]:
    """Operations that a path leads from to an output."""
    originals = originals_of(nodes_of(interpreter))
    position = {at: op for op, at in enumerate(originals)}
    producer = {tensor: at for at, node in originals.items() for tensor in node.outputs}
    outputs = tuple(int(detail["index"]) for detail in interpreter.get_output_details())
    everything = Node(name="", inputs=(), outputs=outputs)
    return {position[at] for at in closure(everything, originals, producer)}


def _together(interpreter: Any) -> Set[int]:
    return {at for group in _delegated(nodes_of(interpreter)) for at in group}


def _delegated(nodes: Sequence[Node]) -> List[List[int]]:
    """Operations that each DELEGATE node took, in the order in which these run."""
    originals = originals_of(nodes)
    position = {at: op for op, at in enumerate(originals)}
    producer = {tensor: at for at, node in originals.items() for tensor in node.outputs}
    return [
        sorted(position[at] for at in closure(node, originals, producer))
        for node in nodes
        if node.name == DELEGATE_NODE
    ]


# Inside a part on the CPU


@dataclass(frozen=True)
class _Split:
    """Mean seconds of operations, and of all that was measured with them."""

    way: str
    seconds: Mapping[int, float]
    whole: float
    inferences: Tuple[float, ...] = ()


def _split(
    work: _Work, segment: Part, request: ProfileRequest, runs: Callable[[], Iterable[int]]
) -> Optional[_Split]:
    """Where the time inside a segment goes; None where that can't be told."""
    if LITERT not in request.avoid:
        request.trying(LITERT)
        try:
            return _by_litert(work, segment, runs)
        except litert_profiler.NoProfiler:
            pass  # the next best
    if ONE_BY_ONE not in request.avoid:
        request.trying(ONE_BY_ONE)
        return _one_by_one(work, segment, runs)
    return None


def _by_litert(work: _Work, segment: Part, runs: Callable[[], Iterable[int]]) -> _Split:
    library = litert_profiler.library_of(work.maker.module)
    path = _cut(work, segment, "litert")
    try:
        groups = _groups_of(work, path)
        inferences = litert_profiler.profile(
            library,
            path,
            [work.values[tensor] for tensor in _fed(segment)],
            threads=work.maker.threads or 1,
            xnnpack=work.maker.xnnpack,
            runs=runs(),
        )
    finally:
        path.unlink()
    # Summed by place in the profile, which is the same for every inference.
    first = inferences[0].events if inferences else ()
    names = [(event.name, event.index, event.delegated) for event in first]
    for inference in inferences:
        if [(event.name, event.index, event.delegated) for event in inference.events] != names:
            raise litert_profiler.NoProfiler("its profiles of two inferences differ")
    means = [midmean(times) for times in zip(*([e.seconds for e in i.events] for i in inferences))]
    types = [work.nodes[op].name for op in segment.ops]
    places = joined_places(first, types, groups)
    return _Split(
        LITERT,
        {segment.ops[at]: means[place] for at, place in places.items()},
        whole=sum(means) or math.inf,
        inferences=tuple(inference.seconds for inference in inferences),
    )


def _groups_of(work: _Work, path: Path) -> List[List[int]]:
    interpreter = work.maker.interpreter(path, None)
    interpreter.allocate_tensors()
    return _delegated(nodes_of(interpreter))


def joined_places(
    events: Sequence[litert_profiler.Event], types: Sequence[str], groups: Sequence[Sequence[int]]
) -> Dict[int, int]:
    """Operation → its place among the events of one inference, for those that have one of their own.

    ``groups`` are the operations that XNNPACK took, piece by piece as they run; the others ran in plain
    kernels. Raises NoProfiler when the events are not of these operations.
    """
    plain = [at for at in range(len(types)) if not any(at in group for group in groups)]
    places: Dict[int, int] = {}
    pieces: List[List[int]] = []
    last = -1
    for place, event in enumerate(events):
        if not event.delegated:
            places[event.index] = place
            last = -1
        elif pieces and event.index > last >= 0:
            pieces[-1].append(place)
            last = event.index
        else:
            pieces.append([place])
            last = event.index
    if sorted(places) != plain or any(events[places[at]].name != types[at] for at in plain):
        raise litert_profiler.NoProfiler("it leaves other operations to plain kernels than the interpreter")
    if len(pieces) != len(groups):
        raise litert_profiler.NoProfiler(
            f"XNNPACK works in {len(pieces)} pieces under it, and in {len(groups)} in the interpreter"
        )
    for group, piece in zip(groups, pieces):
        found = xnnpack_names.side_by_side(
            [types[at] for at in group], [events[place].name for place in piece]
        )
        places.update({group[op]: piece[place] for op, place in found.items()})
    return places


def _one_by_one(work: _Work, segment: Part, runs: Callable[[], Iterable[int]]) -> Optional[_Split]:
    """Every part of the segment in an interpreter of its own; None when time ran out."""
    inside: Set[int] = set(segment.ops)
    end = time.monotonic() + SPLIT_SECONDS
    seconds: Dict[int, float] = {}
    whole = 0.0
    with Track() as track:
        overhead = _empty_seconds(work, track)
        for part in work.parts:
            if not inside.issuperset(part.ops):
                continue
            if time.monotonic() > end:
                return None
            laps = track.laps([_piece(work, part, "one").invoke], islice(runs(), SPLIT_RUNS))
            taken = midmean([lap.less(overhead).own_seconds for (lap,) in laps])
            whole += taken
            if len(part.ops) == 1:
                seconds[part.ops[0]] = taken
    return _Split(ONE_BY_ONE, seconds, whole or math.inf)
