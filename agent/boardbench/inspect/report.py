"""The nouns of a report, frozen; the field names and enum values are those of ``boardbench.v1``.

Absent is ``None`` (or empty, where the wire has no presence): never zero for what can't be told.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Mapping, Optional, Tuple

# The target that a placement can be asked for.
EDGETPU = "edgetpu"


class Unit(str, enum.Enum):
    """Where an operation runs. See ``boardbench.v1.Unit``."""

    UNSPECIFIED = "UNIT_UNSPECIFIED"
    CPU = "UNIT_CPU"
    CPU_DELEGATE = "UNIT_CPU_DELEGATE"
    GPU = "UNIT_GPU"
    TPU = "UNIT_TPU"
    NPU = "UNIT_NPU"
    DELEGATE = "UNIT_DELEGATE"


ACCELERATORS = frozenset((Unit.GPU, Unit.TPU, Unit.NPU, Unit.DELEGATE))


class Evidence(str, enum.Enum):
    """How a placement came to be known. See ``boardbench.v1.Evidence``."""

    UNSPECIFIED = "EVIDENCE_UNSPECIFIED"
    STATIC = "EVIDENCE_STATIC"
    PARTITION = "EVIDENCE_PARTITION"
    PROFILED = "EVIDENCE_PROFILED"
    COUNTERS = "EVIDENCE_COUNTERS"
    HOST_CPU = "EVIDENCE_HOST_CPU"
    PREDICTION = "EVIDENCE_PREDICTION"


class Verdict(str, enum.Enum):
    """What the evidence says. See ``boardbench.v1.PlacementVerdict``."""

    UNSPECIFIED = "PLACEMENT_VERDICT_UNSPECIFIED"
    ACCELERATED = "PLACEMENT_VERDICT_ACCELERATED"
    PARTLY = "PLACEMENT_VERDICT_PARTLY"
    NOT_ACCELERATED = "PLACEMENT_VERDICT_NOT_ACCELERATED"
    CONTRADICTED = "PLACEMENT_VERDICT_CONTRADICTED"


@dataclass(frozen=True)
class Quantization:
    """real = scale * (stored - zero_point), for a whole tensor."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class TensorInfo:
    """One input or output: NumPy's type name; ``shape`` outermost first, -1 where open."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    quantization: Optional[Quantization] = None


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


@dataclass(frozen=True)
class UnitCount:
    """Number of operations on one unit."""

    unit: Unit
    ops: int


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


@dataclass(frozen=True)
class EdgeTpuReport:
    """What the Edge TPU compiler left in the file."""

    nodes: int
    parameters_cached_bytes: int
    parameters_streamed_bytes: int
    min_runtime_version: Optional[int] = None
    scratch_bytes: int = 0
    parameter_caching_token: Optional[int] = None
    compiler_version: str = ""
    executables: int = 0
    chip: str = ""


@dataclass(frozen=True)
class ByteUse:
    """A part of the file; zeros and elements only where the part has elements."""

    purpose: str
    dtype: str
    op_type: str
    size_bytes: int
    zero_elements: Optional[int] = None
    elements: Optional[int] = None


@dataclass(frozen=True)
class Fit:
    """Whether a model fits a board's memory or a cache."""

    target: str
    needed_bytes: int
    available_bytes: int
    fits: bool
    detail: str


@dataclass(frozen=True)
class ReportWarning:
    """Something to know before a board is touched: a stable code, what was seen, what to do."""

    code: str
    message: str


@dataclass(frozen=True)
class ModelReport:
    """What a model file says about itself, without being run."""

    name: str
    sha256: str
    size_bytes: int
    format: str
    format_version: str = ""
    producer: str = ""
    inputs: Tuple[TensorInfo, ...] = ()
    outputs: Tuple[TensorInfo, ...] = ()
    op_count: Optional[int] = None
    op_types: Mapping[str, int] = field(default_factory=dict)
    ops: Tuple[OpPlacement, ...] = ()
    placement: Optional[Placement] = None
    edgetpu: Optional[EdgeTpuReport] = None
    parameter_count: Optional[int] = None
    bytes: Tuple[ByteUse, ...] = ()
    multiply_accumulates: Optional[int] = None
    fits: Tuple[Fit, ...] = ()
    warnings: Tuple[ReportWarning, ...] = ()
    arena_estimate_bytes: Optional[int] = None
    original_sha256: str = ""
    target: str = ""
