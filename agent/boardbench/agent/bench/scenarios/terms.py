"""What every scenario is given, and what it gives back."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from typing import Callable, Optional, Protocol, Tuple

from boardbench.agent.bench.doubts import DEFAULT, Thresholds
from boardbench.agent.bench.measure import Bounds, Clock, Looks, Report, Usage
from boardbench.agent.domain import ScenarioResult, StopReason, Warning

Call = Callable[[], object]
"""One inference."""

Told = Callable[[], bool]
"""Whether to end."""


@dataclass(frozen=True)
class Terms:
    """How long it is measured, who hears of it, and what the time is."""

    bounds: Bounds
    report: Report
    progress_seconds: float
    confidence: float
    looks: Optional[Looks] = None
    thresholds: Thresholds = DEFAULT
    clock: Clock = time.perf_counter_ns
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Run:
    """What was measured: ``samples`` are the latencies that the scenario is about, in nanoseconds."""

    samples: array[int]
    usage: Usage
    reason: StopReason
    inferences: int
    """Of the engine, all of them."""

    inference_nanoseconds: int
    """Median of one inference in the engine."""

    engine_wall_seconds: float
    """Time in which the engine worked; the rest was waiting for the next inference to be due."""

    engine_cpu_seconds: float
    """Processor time of it."""

    result: Optional[ScenarioResult] = None
    """What the scenario adds, but for the time in the engine alone: that is ``service``."""

    service: Optional[array[int]] = None
    warnings: Tuple[Warning, ...] = ()
    one_by_one: bool = True
    """Whether each sample began when the one before it had ended."""


class Drive(Protocol):
    """Asks a model for inferences."""

    def measure(self) -> Run:
        """Counts until the bounds are reached."""
        ...

    def fill(self, told: Told) -> None:
        """The same load until told to end; nothing is counted."""
        ...


def silent(_: object) -> None:
    """Reports to nobody."""
