"""What a run's samples amount to: latency, what ended it, what the scenario adds, and what is doubtful."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Iterator, List, Optional, Sequence, Tuple

from boardbench.agent.bench import doubts, looks, scenarios, series, stats
from boardbench.agent.bench.jobline import Job
from boardbench.agent.domain import Latency, ScenarioKind, ScenarioResult, Stopping, Warning


@dataclass(frozen=True)
class Report:
    """The part of a result that follows from the samples."""

    latency: Latency
    stopping: Stopping
    scenario: Optional[ScenarioResult]
    warnings: Tuple[Warning, ...]
    engine: Latency
    """Of the engine alone, which is what is asked about the board."""


def of_run(run: scenarios.Run, job: Job) -> Report:
    """What the samples amount to, with the doubts that follow from them alone."""
    targets = job.targets()
    percentiles = (*stats.PERCENTILES, *(target.percentile for target in targets))
    latency = stats.latency(run.samples, confidence=job.confidence, percentiles=percentiles)
    stopping = Stopping(reason=run.reason, targets=looks.reached(latency, targets))
    scenario, engine = run.result, latency
    if run.service is not None and scenario is not None:
        engine = stats.latency(run.service, confidence=job.confidence, percentiles=percentiles)
        scenario = replace(scenario, service=engine)
    warnings = (
        *doubts.of_count(latency.count, job.thresholds),
        *doubts.of_stopping(stopping),
        *run.warnings,
    )
    return Report(latency, stopping, scenario, warnings, engine)


def of_surroundings(
    run: scenarios.Run, report: Report, clock_read_seconds: float, job: Job
) -> Iterator[Warning]:
    """Doubts about the engine's own time and about what surrounded it."""
    steady = job.scenario.kind is not ScenarioKind.SUSTAINED
    found: List[Warning] = list(
        doubts.of_latency(
            report.engine,
            clock_read_seconds=clock_read_seconds,
            wall_seconds=run.usage.wall_seconds,
            involuntary_context_switches=run.usage.involuntary_context_switches,
            drift=steady,
            thresholds=job.thresholds,
        )
    )
    yield from found
    samples = report.engine.samples_nanoseconds
    if steady:
        told = any(warning.code in ("slow_first_runs", "slowing_down") for warning in found)
        yield from _of_series(samples, run, job, drift=not told)


def _of_series(samples: Sequence[int], run: scenarios.Run, job: Job, *, drift: bool) -> Iterator[Warning]:
    found = series.describe(samples)
    # Of several instances the order of the samples is that of their ends, and says little.
    one_by_one = run.one_by_one
    yield from doubts.of_series(
        drift=found.drift if drift else None,
        modes=found.modes,
        outliers=found.outliers,
        period=found.period if one_by_one else None,
        dependence=found.dependence if one_by_one else None,
        thresholds=job.thresholds,
    )
