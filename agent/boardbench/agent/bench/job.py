"""One run, stage by stage: a job becomes a measurement."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Mapping, Optional, Tuple

from boardbench.agent.bench import doubts, inputs, measure, probe, profiling, runtimes, stats
from boardbench.agent.bench import placement as placements
from boardbench.agent.bench.events import EventWriter
from boardbench.agent.bench.memory import MemoryMeter
from boardbench.agent.bench.runtime import (
    InputsRejected,
    LoadedModel,
    ModelRejected,
    NoProfile,
    OptionRejected,
    ProfileRequest,
    Runtime,
    RuntimeUnavailable,
)
from boardbench.agent.bench.shapes import by_name
from boardbench.agent.domain import (
    BenchmarkSpec,
    Latency,
    Measurement,
    MemoryPhase,
    Placement,
    RuntimeUsed,
    Shape,
    Stage,
    TensorInfo,
    Verdict,
    WorkerEnvironment,
)

if TYPE_CHECKING:
    from boardbench.agent.bench.runtime import Tensors

MOST_RUNS = 1_000_000
"""Every sample goes into the result: a million are a line of some 10 MB."""


class InferenceFailed(Exception):
    """The engine took the model, and then could not run it."""


class CpuFallback(Exception):
    """Operations run on the CPU where that was forbidden; lists them."""


class JobRejected(Exception):
    """The job itself makes no sense: a fault of the caller of this process."""


@dataclass(frozen=True)
class Job:
    """What the agent asks for; the fields of the job line."""

    runtime: str
    model_path: Path
    format: str
    device: str = "cpu"
    threads: Optional[int] = None
    options: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, Tuple[int, ...]] = field(default_factory=dict)
    inputs_path: Optional[Path] = None
    seed: int = 0
    duration_seconds: float = 5.0
    min_runs: int = 10
    max_runs: int = 1_000_000
    warm_up_seconds: float = 0.5
    warm_up_runs: int = 1
    progress_seconds: float = 0.25
    sys_root: Path = Path("/")
    strict: bool = False
    allow_fallback: bool = False
    profile_runs: Optional[int] = None
    avoid: Tuple[str, ...] = ()
    """For a profile: ways of measuring that are left out, because they ended the process before."""

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Job:
        """The job in a decoded JSON object. Raises JobRejected, naming the field."""
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(content) - known - {"kind"})
        if unknown:
            raise JobRejected(f"the job has unknown fields: {', '.join(unknown)}")
        try:
            job = cls(**{name: content[name] for name in known if name in content})
            return replace(
                job,
                model_path=Path(job.model_path),
                sys_root=Path(job.sys_root),
                inputs_path=Path(job.inputs_path) if job.inputs_path else None,
                shapes={str(name): tuple(int(size) for size in sizes) for name, sizes in job.shapes.items()},
                options={str(name): str(value) for name, value in job.options.items()},
                device=job.device or "cpu",
                avoid=tuple(job.avoid),
            )._checked()
        except (TypeError, ValueError, AttributeError) as error:
            raise JobRejected(f"the job can't be read: {error}") from error

    def _checked(self) -> Job:
        if not 1 <= self.min_runs <= self.max_runs <= MOST_RUNS:
            raise OptionRejected(
                f"min_runs ({self.min_runs}) is at least 1 and at most max_runs ({self.max_runs}), "
                f"which is at most {MOST_RUNS}"
            )
        if self.profile_runs is not None and not 0 <= self.profile_runs <= MOST_RUNS:
            raise OptionRejected(f"profile_runs is from 0 to {MOST_RUNS}, not {self.profile_runs}")
        if self.strict and self.allow_fallback:
            raise OptionRejected("strict forbids what allow_fallback allows: leave one of them out")
        if self.warm_up_runs < 0:
            raise OptionRejected(f"warm_up_runs is at least 0, not {self.warm_up_runs}")
        for name in ("duration_seconds", "warm_up_seconds", "progress_seconds"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise OptionRejected(f"{name} is a number of seconds from 0 on, not {seconds}")
        if self.threads is not None and self.threads < 1:
            raise OptionRejected(f"threads is at least 1, not {self.threads}")
        if not 0 <= self.seed < 2**64:
            raise OptionRejected(f"seed is from 0 to 2^64-1, not {self.seed}")
        return self

    def line(self) -> Dict[str, object]:
        """The job as it is in a job line, without its kind."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("model_path", "sys_root", "inputs_path"):
            found[name] = None if found[name] is None else str(found[name])
        return found


def execute(job: Job, events: EventWriter) -> None:
    """Runs the job, telling stages, progress, doubts and the result.

    The result is told before the model is closed: an engine that crashes or hangs then takes nothing
    with it. The Edge TPU wants to be closed all the same, or its next user finds it in a bad state.
    Profiled is after that, in another process: see :mod:`boardbench.agent.bench.profiling`.

    Raises RuntimeUnavailable, ModelRejected, OptionRejected, InputsRejected, InferenceFailed, CpuFallback,
    MemoryError.
    """
    meter = MemoryMeter()
    events.stage(Stage.IMPORT)
    runtime, version, import_seconds = _imported(job)
    import numpy.random  # noqa: F401 - for the inputs: part of the baseline, not of what the model adds

    if job.format not in runtime.formats:
        raise ModelRejected(
            f"{runtime.name} runs {', '.join(runtime.formats)} models, and {job.model_path.name} is "
            f"{job.format or 'of no known format'}"
        )
    meter.end_phase(MemoryPhase.BASELINE)

    events.stage(Stage.CREATE)
    shapes = _shapes(job)
    try:
        model, create_seconds = _timed(
            lambda: runtime.load(
                job.model_path,
                device=job.device,
                threads=job.threads,
                options=job.options,
                shapes=shapes,
                allow_fallback=job.allow_fallback,
            )
        )
    except InputsRejected as error:
        if job.inputs_path is None:
            raise
        held = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items() if name not in job.shapes)
        raise InputsRejected(f"{error}; the .npz holds {held or 'no array'}") from error
    wanted = model.wanted
    try:
        meter.end_phase(MemoryPhase.LOADED)
        if model.device_fallback:
            events.warning(doubts.warn("device_fallback", model.device_fallback))
        for warning in model.watch.doubts() if model.watch else ():
            events.warning(warning)
        known = (runtime.name, version, import_seconds, create_seconds)
        measurement = _run(job, model, events, meter, known)
        events.result(measurement)
    finally:
        model.close()
    runs = measurement.effective_spec.profile_runs
    if runs:
        events.profiling()
        found = profiling.profiled(
            job.line(),
            measurement.placement,
            wanted=wanted,
            runs=runs,
            latency_seconds=stats.median(measurement.latency.samples_nanoseconds) / 1e9,
            create_seconds=create_seconds,
        )
        events.profile(found)


def profile(job: Job, events: EventWriter) -> None:
    """Profiles what the job ran: what the process of a profiling pass does. Raises NoProfile among others."""
    runtime, _, _ = _imported(job)
    profiler = runtimes.profiler(runtime.name)
    if profiler is None:
        raise NoProfile(f"{runtime.name} has no profiler")

    def feeds(tensors: Tuple[TensorInfo, ...]) -> Tensors:
        if job.inputs_path is not None:
            return inputs.from_file(tensors, job.inputs_path)
        return inputs.seeded(tensors, job.seed)

    request = ProfileRequest(
        model_path=job.model_path,
        device=job.device,
        threads=job.threads,
        options=job.options,
        shapes=_shapes(job),
        allow_fallback=job.allow_fallback,
        feeds=feeds,
        trying=events.trying,
        avoid=job.avoid,
    )
    events.profiled(profiler(runtime, request, lambda: profiling.turns(job.profile_runs)))


def _imported(job: Job) -> Tuple[Runtime, str, float]:
    """The engine, its version, and the seconds that its import took."""
    runtime = runtimes.create(job.runtime)
    runtime.sys_root = job.sys_root
    version, seconds = _timed(runtime.version)
    return runtime, version, seconds


def _shapes(job: Job) -> Dict[str, Tuple[int, ...]]:
    shapes: Dict[str, Tuple[int, ...]] = dict(job.shapes)
    if job.inputs_path is not None:
        # The arrays settle what the caller left open.
        shapes = {**inputs.shapes_in_file(job.inputs_path), **shapes}
    return shapes


def _run(
    job: Job,
    model: LoadedModel,
    events: EventWriter,
    meter: MemoryMeter,
    known: Tuple[str, str, float, float],
) -> Measurement:
    name, version, import_seconds, create_seconds = known
    events.stage(Stage.INPUTS)
    if job.inputs_path is not None:
        feeds = inputs.from_file(model.inputs, job.inputs_path)
    else:
        feeds = inputs.seeded(model.inputs, job.seed)
    input_data = inputs.described(feeds, seed=job.seed if job.inputs_path is None else None)

    events.stage(Stage.FIRST_INFERENCE)
    with_engine = _Boundary(name)
    call = with_engine(lambda: model.bind(feeds))
    first = with_engine(lambda: _first_inference(call, model, meter))
    if job.strict:
        _forbid_fallback(job, model.wanted, with_engine(model.placement))
    if not first.all_finite:
        events.warning(doubts.warn("outputs_not_finite", "an output of the first inference is not finite"))

    clock_read_seconds = measure.clock_read_seconds()
    events.stage(Stage.WARM_UP)
    progress = job.progress_seconds
    bounds = measure.Bounds(seconds=job.warm_up_seconds, least_runs=job.warm_up_runs)
    with_engine(lambda: measure.warm_up(call, bounds, events.progress, progress_seconds=progress))

    events.stage(Stage.MEASURE)
    counted = measure.Bounds(seconds=job.duration_seconds, least_runs=job.min_runs, most_runs=job.max_runs)
    watch = model.watch
    if watch is not None:
        watch.begin()
    samples, window = with_engine(
        lambda: measure.measure(call, counted, events.progress, progress_seconds=progress)
    )
    if watch is not None:
        watch.end()

    events.stage(Stage.REPORT)
    meter.end_phase(MemoryPhase.STEADY)
    latency = stats.latency(samples)
    _doubt(events, model, latency, window, clock_read_seconds, meter)
    placement, accelerator = with_engine(model.placement), None
    if watch is not None:
        outcome = watch.outcome(
            placement,
            runs=latency.count,
            cpu_seconds=window.cpu_seconds,
            wall_seconds=window.wall_seconds,
            queued_seconds=window.queued_seconds,
        )
        placement, accelerator = outcome.placement, outcome.accelerator
        for warning in outcome.warnings:
            events.warning(warning)
    placement = placements.with_report(placement)
    return Measurement(
        runtime=RuntimeUsed(
            name=name,
            version=version,
            device=job.device,
            options=model.options,
            interpreter=probe.interpreter(),
        ),
        effective_spec=BenchmarkSpec(
            runtime=name,
            device=job.device,
            options=model.options,
            threads=model.threads,
            shapes=_given_shapes(model.inputs, job.shapes),
            seed=input_data.seed,
            duration_seconds=job.duration_seconds,
            min_runs=job.min_runs,
            max_runs=job.max_runs,
            warm_up_seconds=job.warm_up_seconds,
            warm_up_runs=job.warm_up_runs,
            strict=job.strict,
            allow_fallback=job.allow_fallback,
            profile_runs=profiling.wanted_runs(
                job.profile_runs, profiles=model.profiles, create_seconds=create_seconds
            ),
        ),
        import_seconds=import_seconds,
        create_seconds=create_seconds,
        first_inference_seconds=first.seconds,
        latency=latency,
        memory=meter.memory(),
        placement=placement,
        environment=WorkerEnvironment(
            clock_read_seconds=clock_read_seconds,
            involuntary_context_switches=window.involuntary_context_switches,
            cpu_seconds=window.cpu_seconds,
            wall_seconds=window.wall_seconds,
            page_size_bytes=os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
            cpu_affinity=measure.processors(),
        ),
        inputs=model.inputs,
        outputs=first.outputs,
        input_data=input_data,
        output_sha256=first.output_sha256,
        accelerator=accelerator,
    )


MOST_LISTED = 40
"""Operations in a message: more are no longer read, and a message is at most a page."""


def _forbid_fallback(job: Job, wanted: str, placement: Placement) -> None:
    """Raises CpuFallback unless it is known that nothing is away from what was asked for."""
    if not wanted:
        raise OptionRejected(
            f"strict forbids the CPU, and the device asked for is {job.device}: ask for an accelerator, or "
            "leave strict out"
        )
    if placement.verdict is Verdict.ACCELERATED:
        return
    away = placements.fallen_back(placement, wanted)
    if not away:
        raise CpuFallback(
            f"strict wants proof that nothing runs on the CPU, and there is none: {placement.detail}"
        )
    named = [f"#{op.index} {op.type}" + (f" ({op.name})" if op.name else "") for op in away[:MOST_LISTED]]
    more = f" and {len(away) - len(named)} more" if len(away) > len(named) else ""
    raise CpuFallback(
        f"{len(away)} of {len(placement.ops)} operations of {job.model_path.name} run on the CPU and not in "
        f"{wanted}, which strict forbids: {', '.join(named)}{more}"
    )


@dataclass(frozen=True)
class _FirstInference:
    """What is kept of the first inference; not the outputs, which may be large."""

    seconds: float
    outputs: Tuple[TensorInfo, ...]
    output_sha256: Mapping[str, str]
    all_finite: bool


def _first_inference(call: Callable[[], object], model: LoadedModel, meter: MemoryMeter) -> _FirstInference:
    returned, seconds = _timed(call)
    meter.end_phase(MemoryPhase.FIRST_INFERENCE)
    outputs = model.fetch(returned)
    infos, digests = _describe_outputs(model, outputs)
    return _FirstInference(
        seconds=seconds, outputs=infos, output_sha256=digests, all_finite=_all_finite(outputs)
    )


def _given_shapes(
    model_inputs: Tuple[TensorInfo, ...], given: Mapping[str, Tuple[int, ...]]
) -> Dict[str, Shape]:
    return {target: Shape(given[name]) for name, target in by_name(model_inputs, given).items()}


def _doubt(
    events: EventWriter,
    model: LoadedModel,
    latency: Latency,
    window: measure.Window,
    clock_read_seconds: float,
    meter: MemoryMeter,
) -> None:
    for warning in doubts.of_latency(
        latency,
        clock_read_seconds=clock_read_seconds,
        wall_seconds=window.wall_seconds,
        involuntary_context_switches=window.involuntary_context_switches,
    ):
        events.warning(warning)
    processors = len(measure.processors())
    if model.threads is not None and processors and model.threads > processors:
        events.warning(
            doubts.warn(
                "threads_exceed_processors",
                f"{model.threads} threads were asked for and the worker may use {processors} processors",
            )
        )
    if not meter.resettable:
        events.warning(doubts.warn("peak_not_resettable", "/proc/self/clear_refs could not be written"))


def _timed(call: Callable[[], Any]) -> Tuple[Any, float]:
    start = time.perf_counter_ns()
    returned = call()
    return returned, (time.perf_counter_ns() - start) / 1e9


def _describe_outputs(model: LoadedModel, outputs: Tensors) -> Tuple[Tuple[TensorInfo, ...], Dict[str, str]]:
    """The outputs as they came (shapes settled), and the digest of each one's bytes."""
    infos = []
    digests = {}
    for tensor in model.outputs:
        array = outputs.get(tensor.name)
        if array is None:
            infos.append(tensor)
            continue
        infos.append(replace(tensor, shape=tuple(array.shape)))
        digests[tensor.name] = hashlib.sha256(inputs.content(array)).hexdigest()
    return tuple(infos), digests


def _all_finite(outputs: Tensors) -> bool:
    import numpy as np

    return all(bool(np.isfinite(array).all()) for array in outputs.values() if array.dtype.kind in "fc")


class _Boundary:
    """Where an engine's own exceptions become ours."""

    def __init__(self, engine: str) -> None:
        self._engine = engine

    def __call__(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except (
            RuntimeUnavailable,
            ModelRejected,
            OptionRejected,
            InputsRejected,
            BrokenPipeError,
            MemoryError,
        ):
            raise
        except Exception as error:
            if out_of_memory(error):
                raise MemoryError(f"{self._engine}: {error}") from error
            raise InferenceFailed(
                f"{self._engine} failed to run the model: {error or type(error).__name__}"
            ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, also where an engine puts it into words of its own."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


# std::bad_alloc: C++ as it is. "Failed to allocate memory": ONNX Runtime's arenas (bfc_arena.cc) and
# TensorFlow Lite's. "Cannot allocate memory": the C library's ENOMEM. CUDA spells it out.
_OUT_OF_MEMORY = re.compile(
    r"bad_alloc|failed to allocate memory|cannot allocate memory|out of memory",
    re.IGNORECASE,
)
