"""One run, stage by stage: a job becomes a measurement."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Tuple,
)

from boardbench.agent.bench import (
    caches,
    doubts,
    findings,
    inputs,
    libraries,
    measure,
    probe,
    profiling,
    runtimes,
    scenarios,
    stats,
    warm_up,
)
from boardbench.agent.bench import placement as placements
from boardbench.agent.bench.cost import Counted
from boardbench.agent.bench.events import EventWriter
from boardbench.agent.bench.jobline import Job
from boardbench.agent.bench.looks import PrecisionLooks
from boardbench.agent.bench.memory import MemoryMeter
from boardbench.agent.bench.runtime import (
    CACHE,
    COMPUTE_PRECISION,
    NO_SETTINGS,
    THREADS,
    InputsRejected,
    KeepsCaches,
    LoadedModel,
    ModelRejected,
    NoProfile,
    OptionRejected,
    ProfileRequest,
    Runtime,
    RuntimeUnavailable,
    Settings,
    TellsArena,
    TimesTransfers,
)
from boardbench.agent.bench.shapes import EVERY, by_name
from boardbench.agent.domain import (
    BenchmarkSpec,
    CacheUse,
    Measurement,
    MemoryPhase,
    OutputValues,
    Placement,
    RuntimeUsed,
    Shape,
    Stage,
    TensorInfo,
    Verdict,
    WarmUp,
    Warning,
    WorkerEnvironment,
)

if TYPE_CHECKING:
    from boardbench.agent.bench.runtime import Tensors


class InferenceFailed(Exception):
    """The engine took the model, and then could not run it."""


class CpuFallback(Exception):
    """Operations run on the CPU where that was forbidden; lists them."""


class Orders(Protocol):
    """What the agent says while a worker runs that it holds."""

    def wait_for_go(self) -> None:
        """Returns when the measurement may begin."""
        ...

    def stopped(self) -> bool:
        """Whether the worker is to report now."""
        ...


class Unheld:
    """Of a worker that nobody holds."""

    def wait_for_go(self) -> None:
        """At once."""

    def stopped(self) -> bool:
        """Always."""
        return True


TOGETHER_SECONDS = 0.25
"""Uncounted, after ``go``: a hundred times longer than it takes to tell all workers of a group."""


def execute(job: Job, events: EventWriter, orders: Optional[Orders] = None) -> None:
    """Runs the job, telling stages, progress, doubts and the result.

    The result is told before the model is closed: an engine that crashes or hangs then takes nothing
    with it. The Edge TPU wants to be closed all the same, or its next user finds it in a bad state.
    Profiled is after that, in another process: see :mod:`boardbench.agent.bench.profiling`.

    Raises RuntimeUnavailable, ModelRejected, OptionRejected, InputsRejected, InferenceFailed, CpuFallback,
    MemoryError.
    """
    _pin(job.cpu_affinity)
    meter = MemoryMeter()
    events.stage(Stage.IMPORT)
    runtime, version, import_seconds = _imported(job)
    refuse_settings(runtime, job)
    import numpy.random  # noqa: F401 - for the inputs: part of the baseline, not of what the model adds

    if job.format not in runtime.formats:
        raise ModelRejected(
            f"{runtime.name} runs {', '.join(runtime.formats)} models, and {job.model_path.name} is "
            f"{job.format or 'of no known format'}"
        )
    meter.end_phase(MemoryPhase.BASELINE)

    events.stage(Stage.CREATE)
    loaded = _load(job, runtime, _Engine(runtime.name, version, import_seconds))
    model = loaded.model
    wanted = model.wanted
    try:
        meter.end_phase(MemoryPhase.LOADED)
        if model.device_fallback:
            events.warning(doubts.warn("device_fallback", model.device_fallback))
        for warning in model.watch.doubts() if model.watch else ():
            events.warning(warning)
        measurement, counted = _run(job, loaded, events, meter, orders or Unheld())
        events.result(measurement)
    finally:
        loaded.close()
    runs = measurement.effective_spec.profile_runs
    if runs:
        events.profiling()
        found = profiling.profiled(
            replace(job, cache=loaded.cache).line(),
            measurement.placement,
            wanted=wanted,
            runs=runs,
            counted=counted,
            create_seconds=loaded.create_seconds,
        )
        for warning in profiling.doubts_of(found):
            events.warning(warning)
        events.profile(found)


def _load(job: Job, runtime: Runtime, engine: _Engine) -> _Loaded:
    """Every instance of the model that the scenario wants."""
    libraries.refuse_pushed(job.options)
    if job.cache_by_default and CACHE not in getattr(runtime, "settings", ()):
        job = replace(job, cache=CacheUse.NONE)
    shapes = _shapes(job)
    settings = Settings(job.compute_precision)
    cache = job.cache

    def load() -> LoadedModel:
        return runtime.load(
            job.model_path,
            device=job.device,
            threads=job.threads,
            options=job.options,
            shapes=shapes,
            allow_fallback=job.allow_fallback,
            **_more(settings),
        )

    try:
        try:
            settings = _settings(job, engine.name, engine.version, shapes)
            model, create_seconds = _timed(load)
        except OptionRejected:
            if cache is CacheUse.NONE or not job.cache_by_default:
                raise
            settings, cache = Settings(job.compute_precision), CacheUse.NONE
            model, create_seconds = _timed(load)
    except InputsRejected as error:
        if job.inputs_path is None:
            raise
        named = {*job.shapes, EVERY}
        held = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items() if name not in named)
        raise InputsRejected(f"{error}; the .npz holds {held or 'no array'}") from error
    loaded = _Loaded(engine, [model], create_seconds, cache)
    wanted = scenarios.instances(job.scenario)
    try:
        while len(loaded.models) < wanted:
            loaded.models.append(load())
    except Exception as error:
        here = len(loaded.models)
        loaded.close()
        if out_of_memory(error):
            raise MemoryError(
                f"{here} of {wanted} instances fit into memory: ask for fewer streams"
            ) from error
        raise ModelRejected(
            f"{engine.name} loads {here} of the {wanted} instances that were asked for ({error}): "
            f"ask for {here if here > 1 else 'one'} at most with --streams"
        ) from error
    return loaded


def refuse_settings(runtime: Runtime, job: Job) -> None:
    """Raises OptionRejected for a common setting that the engine would not heed."""
    asked = {
        THREADS: "" if job.threads is None else str(job.threads),
        COMPUTE_PRECISION: job.compute_precision,
        CACHE: "" if job.cache is CacheUse.NONE or job.cache_by_default else job.cache.name.lower(),
    }
    taken = getattr(runtime, "settings", (THREADS,))
    for name, value in asked.items():
        if value and name not in taken:
            raise OptionRejected(
                f"{runtime.name} takes no {name} ({value} was asked for); of the common settings it takes "
                f"{', '.join(taken) or 'none'}: leave it out"
            )


def _settings(job: Job, engine: str, version: str, shapes: Mapping[str, Tuple[int, ...]]) -> Settings:
    """The settings as the engine is given them; its folder for caches is there then."""
    if job.cache is CacheUse.NONE or job.cache_root is None:
        return Settings(job.compute_precision)
    folder = caches.folder(
        job.cache_root,
        engine,
        model_sha256=job.model_sha256,
        version=version,
        settings={
            "device": job.device,
            "threads": job.threads,
            "options": dict(job.options),
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "compute_precision": job.compute_precision,
            "cpu_affinity": job.cpu_affinity,
            "python": sys.executable,
        },
    )
    caches.prepare(folder, renew=job.cache is CacheUse.RENEW)
    return Settings(job.compute_precision, folder)


def _more(settings: Settings) -> Dict[str, Any]:
    """What an engine is given that takes more than threads; others need not know of it."""
    return {} if settings == NO_SETTINGS else {"settings": settings}


def _pin(processors: Tuple[int, ...]) -> None:
    """Lets this process, and all that the engine starts, use these processors only. Raises OptionRejected."""
    if not processors:
        return
    wanted = sorted(set(processors))
    if not hasattr(os, "sched_setaffinity"):
        raise OptionRejected("cpu_affinity: this system can't bind a process to processors: leave it out")
    before = measure.processors()
    try:
        os.sched_setaffinity(0, wanted)
    except (OSError, ValueError) as error:
        raise OptionRejected(
            f"cpu_affinity: {_listed(wanted)} can't be set ({error}); there is {_listed(before)}"
        ) from error
    # The kernel takes a set of which only a part is online, and says nothing.
    if list(measure.processors()) != wanted:
        missing = _listed(sorted(set(wanted) - set(measure.processors())))
        raise OptionRejected(f"cpu_affinity: {missing} is offline or not allowed; there is {_listed(before)}")


def _listed(processors: Sequence[int]) -> str:
    return ", ".join(str(number) for number in processors)


def profile(job: Job, events: EventWriter) -> None:
    """Profiles what the job ran: what the process of a profiling pass does. Raises NoProfile among others."""
    _pin(job.cpu_affinity)
    libraries.refuse_pushed(job.options)
    runtime, version, _ = _imported(job)
    profiler = runtimes.profiler(runtime.name)
    if profiler is None:
        raise NoProfile(f"{runtime.name} has no profiler")

    def feeds(tensors: Tuple[TensorInfo, ...]) -> Tensors:
        if job.inputs_path is not None:
            return inputs.from_file(tensors, job.inputs_path)
        return inputs.seeded(tensors, job.seed)

    shapes = _shapes(job)
    request = ProfileRequest(
        model_path=job.model_path,
        device=job.device,
        threads=job.threads,
        options=job.options,
        shapes=shapes,
        allow_fallback=job.allow_fallback,
        feeds=feeds,
        trying=events.trying,
        avoid=job.avoid,
        settings=_settings(job, runtime.name, version, shapes),
    )
    events.profiled(profiler(runtime, request, lambda: profiling.turns(job.profile_runs)))


def _imported(job: Job) -> Tuple[Runtime, str, float]:
    """The engine, its version, and the seconds that its import took."""
    runtime = runtimes.create(job.runtime)
    runtime.sys_root = job.sys_root
    version, seconds = _timed(lambda: runtimes.full_version(runtime))
    return runtime, version, seconds


def _shapes(job: Job) -> Dict[str, Tuple[int, ...]]:
    shapes = job.loaded_shapes()
    if job.inputs_path is not None:
        # The arrays settle what the caller left open.
        shapes = {**inputs.shapes_in_file(job.inputs_path), **shapes}
    return shapes


@dataclass(frozen=True)
class _Engine:
    """What is known of an engine once it is imported, and the time that took."""

    name: str
    version: str
    import_seconds: float


@dataclass
class _Loaded:
    """The instances of the model; all but one scenario have one."""

    engine: _Engine
    models: List[LoadedModel]
    create_seconds: float
    """Of the first."""
    cache: CacheUse
    """What the engine could do of what was asked for."""

    @property
    def model(self) -> LoadedModel:
        return self.models[0]

    def close(self) -> None:
        for model in reversed(self.models):
            model.close()


def _run(
    job: Job, loaded: _Loaded, events: EventWriter, meter: MemoryMeter, orders: Orders
) -> Tuple[Measurement, Counted]:
    """The measurement, and what the counted inferences took in the engine."""
    engine, model = loaded.engine, loaded.model
    events.stage(Stage.INPUTS)
    if job.inputs_path is not None:
        feeds = inputs.from_file(model.inputs, job.inputs_path)
    else:
        feeds = inputs.seeded(model.inputs, job.seed)
    input_data = inputs.described(feeds, seed=job.seed if job.inputs_path is None else None)

    events.stage(Stage.FIRST_INFERENCE)
    with_engine = _Boundary(engine.name)
    calls = with_engine(lambda: [each.bind(feeds) for each in loaded.models])
    first = with_engine(lambda: _first_inference(calls[0], model, meter, job.output_values))
    if job.strict:
        _forbid_fallback(job, model.wanted, with_engine(model.placement))
    if not first.all_finite:
        events.warning(doubts.warn("outputs_not_finite", "an output of the first inference is not finite"))

    clock = measure.clock_cost()
    drive = scenarios.create(job.scenario, calls, _terms(job, events), seed=job.seed)
    watch = model.watch
    with measure.collector_at_rest():
        warmed = with_engine(lambda: _warm_up(job, calls, drive, events))
        if job.hold:
            events.ready()
            orders.wait_for_go()
            with_engine(lambda: _begin_together(job, drive))
        events.stage(Stage.MEASURE)
        if watch is not None:
            watch.begin()
        run: scenarios.Run = with_engine(drive.measure)
        if watch is not None:
            watch.end()
        if job.until_told:
            events.counted()
            with_engine(lambda: drive.fill(orders.stopped))

    events.stage(Stage.REPORT)
    meter.end_phase(MemoryPhase.STEADY)
    report = findings.of_run(run, job)
    for warning in (
        *doubts.of_warm_up(warmed),
        *report.warnings,
        *findings.of_surroundings(run, report, clock.median_seconds, job),
        *_of_process(loaded, meter),
    ):
        events.warning(warning)
    placement, accelerator = with_engine(model.placement), None
    if watch is not None:
        outcome = watch.outcome(
            placement,
            runs=run.inferences,
            cpu_seconds=run.engine_cpu_seconds,
            wall_seconds=run.engine_wall_seconds,
            queued_seconds=run.usage.queued_seconds,
        )
        placement, accelerator = outcome.placement, outcome.accelerator
        for warning in outcome.warnings:
            events.warning(warning)
    placement = placements.with_report(placement)
    arena = with_engine(model.arena_bytes) if isinstance(model, TellsArena) else None
    kept = with_engine(model.caches) if isinstance(model, KeepsCaches) else ()
    transfers = with_engine(lambda: model.transfers(feeds)) if isinstance(model, TimesTransfers) else None
    measurement = Measurement(
        runtime=RuntimeUsed(
            name=engine.name,
            version=engine.version,
            device=job.device,
            options=model.options,
            interpreter=probe.interpreter(),
        ),
        effective_spec=BenchmarkSpec(
            runtime=engine.name,
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
                job.profile_runs, profiles=model.profiles, create_seconds=loaded.create_seconds
            ),
            precision=job.precision,
            precision_seconds=job.precision_seconds if job.precision else None,
            confidence=job.confidence,
            scenario=job.scenario,
            cpu_affinity=job.cpu_affinity,
            compute_precision=job.compute_precision,
            cache=loaded.cache,
            output_values=job.output_values or None,
        ),
        import_seconds=engine.import_seconds,
        create_seconds=loaded.create_seconds,
        first_inference_seconds=first.seconds,
        latency=report.latency,
        memory=meter.memory(arena),
        placement=placement,
        environment=WorkerEnvironment(
            clock_read_seconds=clock.median_seconds,
            clock_read_worst_seconds=clock.worst_seconds,
            involuntary_context_switches=run.usage.involuntary_context_switches,
            voluntary_context_switches=run.usage.voluntary_context_switches,
            cpu_seconds=run.usage.cpu_seconds,
            wall_seconds=run.usage.wall_seconds,
            page_size_bytes=os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
            cpu_affinity=measure.processors(),
        ),
        inputs=model.inputs,
        outputs=first.outputs,
        input_data=input_data,
        output_sha256=first.output_sha256,
        accelerator=accelerator,
        warm_up=warmed,
        stopping=report.stopping,
        scenario=report.scenario,
        caches=kept,
        transfers=transfers,
        output_values=first.output_values,
    )
    return measurement, _in_engine(run)


def _in_engine(run: scenarios.Run) -> Counted:
    """What inferences took in the engine; of a query of several their mean, once."""
    taken = run.samples if run.service is None else run.service
    inferences = max(round(stats.median(taken) / max(run.inference_nanoseconds, 1)), 1)
    return Counted(
        nanoseconds=[nanoseconds // inferences for nanoseconds in taken] if inferences > 1 else taken,
        cpu_seconds=run.engine_cpu_seconds / max(run.inferences, 1),
    )


def _terms(job: Job, events: EventWriter) -> scenarios.Terms:
    targets = job.targets()
    looks = None
    if targets:
        looks = PrecisionLooks(targets, confidence=job.confidence, least_runs=job.min_runs)
    return scenarios.Terms(
        bounds=measure.Bounds(
            seconds=job.duration_seconds,
            least_runs=job.min_runs,
            most_runs=job.max_runs,
            most_seconds=job.precision_seconds if targets else None,
        ),
        report=events.progress,
        progress_seconds=job.progress_seconds,
        confidence=job.confidence,
        looks=looks,
        thresholds=job.thresholds,
    )


def _warm_up(
    job: Job, calls: Sequence[scenarios.Call], drive: scenarios.Drive, events: EventWriter
) -> WarmUp:
    events.stage(Stage.WARM_UP)
    warmed = warm_up.warm_up(
        calls[0],
        job.warm_up_seconds,
        job.warm_up_runs,
        events.progress,
        progress_seconds=job.progress_seconds,
    )
    if len(calls) > 1:
        # Instances beside the first have not run at all yet, nor has any of them beside the others.
        drive.fill(_after(job.warm_up_seconds))
    return warmed


def _begin_together(job: Job, drive: scenarios.Drive) -> None:
    """What was warm has cooled down while it waited, and the others begin a moment earlier or later."""
    seconds = min(job.warm_up_seconds, TOGETHER_SECONDS)
    if seconds > 0:
        drive.fill(_after(seconds))


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


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
    output_values: Tuple[OutputValues, ...]


def _first_inference(
    call: Callable[[], object], model: LoadedModel, meter: MemoryMeter, most_values: int
) -> _FirstInference:
    returned, seconds = _timed(call)
    meter.end_phase(MemoryPhase.FIRST_INFERENCE)
    outputs = model.fetch(returned)
    infos, digests = _describe_outputs(model, outputs)
    return _FirstInference(
        seconds=seconds,
        outputs=infos,
        output_sha256=digests,
        all_finite=_all_finite(outputs),
        output_values=inputs.values_of([info.name for info in infos], outputs, most_values),
    )


def _given_shapes(
    model_inputs: Tuple[TensorInfo, ...], given: Mapping[str, Tuple[int, ...]]
) -> Dict[str, Shape]:
    return {target: Shape(given[name]) for name, target in by_name(model_inputs, given).items()}


def _of_process(loaded: _Loaded, meter: MemoryMeter) -> Iterator[Warning]:
    threads, processors = loaded.model.threads, len(measure.processors())
    if threads is not None and processors and threads * len(loaded.models) > processors:
        instances = f", in {len(loaded.models)} instances each," if len(loaded.models) > 1 else ""
        yield doubts.warn(
            "threads_exceed_processors",
            f"{threads} threads{instances} were asked for and the worker may use {processors} processors",
            evidence={"threads": threads * len(loaded.models), "processors": processors},
        )
    if not meter.resettable:
        yield doubts.warn("peak_not_resettable", "/proc/self/clear_refs could not be written")


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
