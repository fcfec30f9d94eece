"""The nouns of a run, frozen.

The bench process speaks in these, under any Python from 3.9 on, so nothing here may need more
than the standard library. Field names and enum values are those of ``boardbench.v1``:
:mod:`boardbench.agent.wire` turns one into the other without a table.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Mapping, Optional, Tuple

# What a file and a run have in common.
from boardbench.inspect.report import Evidence, Quantization, TensorInfo, Unit, UnitCount, Verdict

__all__ = ["Evidence", "Quantization", "TensorInfo", "Unit", "UnitCount", "Verdict"]


class Stage(str, enum.Enum):
    """The steps of a run. See ``boardbench.v1.Stage``."""

    UNSPECIFIED = "STAGE_UNSPECIFIED"
    START = "STAGE_START"
    IMPORT = "STAGE_IMPORT"
    CREATE = "STAGE_CREATE"
    INPUTS = "STAGE_INPUTS"
    FIRST_INFERENCE = "STAGE_FIRST_INFERENCE"
    WARM_UP = "STAGE_WARM_UP"
    MEASURE = "STAGE_MEASURE"
    REPORT = "STAGE_REPORT"
    COOL_DOWN = "STAGE_COOL_DOWN"
    IDLE = "STAGE_IDLE"


class MemoryPhase(str, enum.Enum):
    """A phase with memory of its own. See ``boardbench.v1.MemoryPhase``."""

    BASELINE = "MEMORY_PHASE_BASELINE"
    LOADED = "MEMORY_PHASE_LOADED"
    FIRST_INFERENCE = "MEMORY_PHASE_FIRST_INFERENCE"
    STEADY = "MEMORY_PHASE_STEADY"


@dataclass(frozen=True)
class OpPlacement:
    """One operation and where it runs."""

    index: int
    type: str
    name: str = ""
    unit: Unit = Unit.UNSPECIFIED
    delegate: str = ""
    cause: str = ""
    root_cause: Optional[bool] = None
    remedy: str = ""
    seconds: Optional[float] = None
    precision: str = ""


@dataclass(frozen=True)
class CounterReading:
    """A counter of the hardware before and after the counted inferences; ``name`` is where it was read."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class EvidenceReport:
    """What one kind of evidence says by itself, for a person in ``detail``; counts where it counts ops."""

    evidence: Evidence
    verdict: Verdict
    detail: str
    accelerated_ops: Optional[int] = None
    cpu_ops: Optional[int] = None
    counters: Tuple[CounterReading, ...] = ()


@dataclass(frozen=True)
class Crossings:
    """How often execution moves between the accelerator and the CPU in one inference, and with how much."""

    count: int
    bytes: Optional[int] = None


@dataclass(frozen=True)
class FallbackCost:
    """What the operations cost that are not where they were asked to be; bounds at 95 %."""

    share: float
    share_low: float
    share_high: float
    seconds: float
    seconds_low: float
    seconds_high: float
    latency_without_seconds: float
    method: str


@dataclass(frozen=True)
class Placement:
    """Where the operations run, and how that is known. Counts are absent when not known."""

    evidence: Evidence = Evidence.UNSPECIFIED
    accelerated_ops: Optional[int] = None
    cpu_ops: Optional[int] = None
    accelerated_op_types: Mapping[str, int] = field(default_factory=dict)
    cpu_op_types: Mapping[str, int] = field(default_factory=dict)
    units: Tuple[UnitCount, ...] = ()
    ops: Tuple[OpPlacement, ...] = ()
    verdict: Verdict = Verdict.UNSPECIFIED
    detail: str = ""
    standin: bool = False
    evidence_reports: Tuple[EvidenceReport, ...] = ()
    crossings: Optional[Crossings] = None
    fallback_cost: Optional[FallbackCost] = None


@dataclass(frozen=True)
class AcceleratorUse:
    """The accelerator as it was used. Absent is absent."""

    kind: str
    path: str = ""
    library: str = ""
    library_version: str = ""
    runtime_version: Optional[int] = None
    model_min_runtime_version: Optional[int] = None
    usb_megabits_per_second: Optional[int] = None
    temperature_before_celsius: Optional[float] = None
    temperature_after_celsius: Optional[float] = None
    parameters_cached_bytes: Optional[int] = None
    parameters_streamed_bytes: Optional[int] = None
    standin: bool = False


@dataclass(frozen=True)
class Percentile:
    """One percentile with its distribution-free bounds, in seconds, and LoadGen's estimate of it."""

    percentile: float
    seconds: float
    low_seconds: float
    high_seconds: float
    loadgen_estimate_seconds: Optional[float] = None


@dataclass(frozen=True)
class Latency:
    """The distribution of the counted inferences; samples in the order they ran."""

    count: int
    mean_seconds: float
    min_seconds: float
    max_seconds: float
    stdev_seconds: Optional[float]
    percentiles: Tuple[Percentile, ...]
    samples_nanoseconds: Tuple[int, ...]
    confidence: Optional[float] = None
    effective_count: Optional[float] = None


@dataclass(frozen=True)
class WarmUp:
    """Inferences before the counted ones; ``steady`` is None when they were too few to tell."""

    runs: int
    seconds: float
    steady: Optional[bool] = None
    samples_nanoseconds: Tuple[int, ...] = ()


class StopReason(str, enum.Enum):
    """What ended a measurement."""

    PRECISION = "STOP_REASON_PRECISION"
    DURATION = "STOP_REASON_DURATION"
    RUNS = "STOP_REASON_RUNS"


@dataclass(frozen=True)
class PrecisionReached:
    """How precise one percentile has become: the bounds lie within the ratio of the value."""

    percentile: float
    asked_ratio: float
    reached_ratio: Optional[float] = None


@dataclass(frozen=True)
class Stopping:
    """What ended a measurement, and how precise it then was."""

    reason: StopReason
    targets: Tuple[PrecisionReached, ...] = ()


class ScenarioKind(str, enum.Enum):
    """How inferences are asked for. See ``boardbench.v1.ScenarioKind``."""

    SINGLE_STREAM = "SCENARIO_KIND_SINGLE_STREAM"
    OFFLINE = "SCENARIO_KIND_OFFLINE"
    PERIODIC = "SCENARIO_KIND_PERIODIC"
    POISSON = "SCENARIO_KIND_POISSON"
    MULTI_STREAM = "SCENARIO_KIND_MULTI_STREAM"
    SUSTAINED = "SCENARIO_KIND_SUSTAINED"


@dataclass(frozen=True)
class Scenario:
    """What inferences are asked for, and when; None where nothing was said."""

    kind: ScenarioKind = ScenarioKind.SINGLE_STREAM
    rate_hertz: Optional[float] = None
    deadline_seconds: Optional[float] = None
    streams: Optional[int] = None
    batch: Optional[int] = None
    window_seconds: Optional[float] = None


@dataclass(frozen=True)
class Window:
    """A stretch of a sustained run, in seconds since it began; what sensors say, the agent adds."""

    begin_seconds: float
    end_seconds: float
    count: int
    median_seconds: Optional[float] = None
    median_low_seconds: Optional[float] = None
    median_high_seconds: Optional[float] = None


@dataclass(frozen=True)
class ScenarioResult:
    """What a scenario adds to the latency. See ``boardbench.v1.ScenarioResult``."""

    kind: ScenarioKind
    throughput_hertz: Optional[float] = None
    throughput_low_hertz: Optional[float] = None
    throughput_high_hertz: Optional[float] = None
    deadline_seconds: Optional[float] = None
    deadline_misses: Optional[int] = None
    most_waiting: Optional[int] = None
    service: Optional[Latency] = None
    worst_start_delay_seconds: Optional[float] = None
    windows: Tuple[Window, ...] = ()
    steady_median_seconds: Optional[float] = None
    slowdown_ratio: Optional[float] = None


@dataclass(frozen=True)
class PhaseMemory:
    """Memory at the end of a phase; the peak is the phase's own. Absent is absent."""

    phase: MemoryPhase
    rss_bytes: Optional[int] = None
    pss_bytes: Optional[int] = None
    peak_rss_bytes: Optional[int] = None


@dataclass(frozen=True)
class Memory:
    """Memory of the worker by phase. Absent is absent."""

    phases: Tuple[PhaseMemory, ...] = ()
    peak_rss_bytes: Optional[int] = None
    model_rss_bytes: Optional[int] = None
    peak_swap_bytes: Optional[int] = None
    accelerator_bytes: Optional[int] = None
    accelerator_source: str = ""
    arena_bytes: Optional[int] = None


class Severity(str, enum.Enum):
    """What a warning means for the measurement. See ``boardbench.v1.Severity``."""

    UNSPECIFIED = "SEVERITY_UNSPECIFIED"
    NOTE = "SEVERITY_NOTE"
    DOUBTFUL = "SEVERITY_DOUBTFUL"
    INVALID = "SEVERITY_INVALID"


@dataclass(frozen=True)
class Warning:
    """A doubt about the figures: a stable code, what was seen and what to do, and the figures by name."""

    code: str
    message: str
    severity: Severity = Severity.UNSPECIFIED
    evidence: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Interpreter:
    """A Python interpreter: its executable, and "CPython 3.11.7"."""

    path: str
    version: str


@dataclass(frozen=True)
class RuntimeStatus:
    """Whether one engine can run here; ``reason`` says why not and how to mend it."""

    name: str
    available: bool
    version: str = ""
    reason: str = ""
    formats: Tuple[str, ...] = ()
    devices: Tuple[str, ...] = ()
    interpreter: Optional[Interpreter] = None
    settings: Tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    plugin: str = ""


@dataclass(frozen=True)
class FormatMark:
    """How files of a format are known that an engine from elsewhere brings: how they begin, or are called.

    ``magic`` is hexadecimal. ``plugin`` is the distribution that says so.
    """

    format: str
    runtime: str
    plugin: str
    magic: str = ""
    suffixes: Tuple[str, ...] = ()


@dataclass(frozen=True)
class PluginOffer:
    """An engine that a distribution offers, before anything of it is imported."""

    name: str
    plugin: str


@dataclass(frozen=True)
class Probed:
    """What a probe finds under one interpreter."""

    runtimes: Tuple[RuntimeStatus, ...]
    offers: Tuple[PluginOffer, ...] = ()
    marks: Tuple[FormatMark, ...] = ()
    more_devices: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RuntimeUsed:
    """The engine as a run used it. ``boardbench.v1.Runtime`` on the wire."""

    name: str
    version: str
    device: str
    options: Mapping[str, str] = field(default_factory=dict)
    interpreter: Optional[Interpreter] = None


@dataclass(frozen=True)
class Shape:
    """Sizes of the dimensions of one tensor, outermost first."""

    dimensions: Tuple[int, ...]


@dataclass(frozen=True)
class Precision:
    """A precision to reach: the bounds must lie within ``ratio`` of the value."""

    percentile: float
    ratio: float


@dataclass(frozen=True)
class BenchmarkSpec:
    """What to run and how long; None where nothing was said."""

    runtime: str = ""
    device: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    threads: Optional[int] = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    inputs_sha256: str = ""
    seed: Optional[int] = None
    duration_seconds: Optional[float] = None
    min_runs: Optional[int] = None
    max_runs: Optional[int] = None
    warm_up_seconds: Optional[float] = None
    warm_up_runs: Optional[int] = None
    timeout_seconds: Optional[float] = None
    strict: bool = False
    allow_fallback: bool = False
    profile_runs: Optional[int] = None
    precision: Tuple[Precision, ...] = ()
    confidence: Optional[float] = None
    scenario: Optional[Scenario] = None
    precision_seconds: Optional[float] = None
    cpu_affinity: Tuple[int, ...] = ()
    compute_precision: str = ""
    cache: Optional[CacheUse] = None
    output_values: Optional[int] = None


class CacheUse(str, enum.Enum):
    """What an engine may keep on disk from one load to the next."""

    NONE = "CACHE_USE_NONE"
    KEEP = "CACHE_USE_KEEP"
    RENEW = "CACHE_USE_RENEW"


@dataclass(frozen=True)
class Cache:
    """Something that an engine keeps on disk; ``warm``: the load of this run found it there."""

    name: str
    warm: Optional[bool] = None
    size_bytes: Optional[int] = None
    path: str = ""


@dataclass(frozen=True)
class Transfers:
    """Medians over inferences apart from the counted ones, by the accelerator's own events."""

    to_device_seconds: float
    compute_seconds: float
    from_device_seconds: float
    inferences: int
    method: str


@dataclass(frozen=True)
class OutputValues:
    """Values of one output of the first inference: every ``step``-th, in the order of memory."""

    name: str
    dtype: str
    count: int
    step: int
    values: Tuple[float, ...]


@dataclass(frozen=True)
class InputData:
    """What was fed: ``source`` is "seeded" or "file"; the digest is over names, types, shapes and bytes."""

    source: str
    sha256: str
    seed: Optional[int] = None


@dataclass(frozen=True)
class WorkerEnvironment:
    """What the worker itself knows of its surroundings: a part of ``boardbench.v1.Environment``."""

    clock_read_seconds: Optional[float] = None
    involuntary_context_switches: Optional[int] = None
    cpu_seconds: Optional[float] = None
    wall_seconds: Optional[float] = None
    page_size_bytes: Optional[int] = None
    cpu_affinity: Tuple[int, ...] = ()
    clock_read_worst_seconds: Optional[float] = None
    voluntary_context_switches: Optional[int] = None


@dataclass(frozen=True)
class Progress:
    """How far a stage is; the median is an interim figure."""

    stage: Stage
    runs: int
    elapsed_seconds: float
    fraction: Optional[float] = None
    median_seconds: Optional[float] = None


@dataclass(frozen=True)
class Measurement:
    """What the worker measured: the part of ``boardbench.v1.RunResult`` that it knows."""

    runtime: RuntimeUsed
    effective_spec: BenchmarkSpec
    import_seconds: float
    create_seconds: float
    first_inference_seconds: float
    latency: Latency
    memory: Memory
    placement: Placement
    environment: WorkerEnvironment
    inputs: Tuple[TensorInfo, ...]
    outputs: Tuple[TensorInfo, ...]
    input_data: InputData
    output_sha256: Mapping[str, str] = field(default_factory=dict)
    accelerator: Optional[AcceleratorUse] = None
    warm_up: Optional[WarmUp] = None
    stopping: Optional[Stopping] = None
    scenario: Optional[ScenarioResult] = None
    caches: Tuple[Cache, ...] = ()
    output_values: Tuple[OutputValues, ...] = ()
    transfers: Optional[Transfers] = None
