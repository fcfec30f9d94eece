"""The job: the line of JSON by which the agent says what to do, read strictly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

from boardbench.agent.bench import scenarios, shapes, stats, stopping
from boardbench.agent.bench.doubts import DEFAULT, Thresholds
from boardbench.agent.bench.events import to_json
from boardbench.agent.bench.runtime import PRECISIONS, OptionRejected
from boardbench.agent.bench.stopping import Target
from boardbench.agent.domain import CacheUse, Precision, Scenario, ScenarioKind

MOST_RUNS = 1_000_000
"""Every sample goes into the result: a million are a line of some 10 MB."""

MOST_OUTPUT_VALUES = 65536
"""Half a megabyte of them."""

PRECISION_SECONDS = 60.0
"""Longest measurement for a precision, if nobody said: a tenth of MLPerf LoadGen's least of 600 s."""

SINGLE_STREAM = Scenario()

_SECONDS = ("duration_seconds", "warm_up_seconds", "progress_seconds", "precision_seconds")

# What another process has to know to run the same inferences again.
_PROFILED = (
    "runtime", "model_path", "format", "device", "threads", "options", "shapes", "inputs_path", "seed",
    "sys_root", "strict", "allow_fallback", "profile_runs", "avoid", "cpu_affinity", "compute_precision",
    "cache_root", "model_sha256",
)  # fmt: skip


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
    """With a precision, 0 unless it is given."""
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

    precision: Tuple[Precision, ...] = ()
    """Percentiles, and the shares of their values within which their bounds are to be."""
    precision_seconds: float = PRECISION_SECONDS
    """With a precision: when the measurement ends even so."""
    confidence: float = stats.CONFIDENCE
    scenario: Scenario = SINGLE_STREAM
    """With every default filled in."""
    hold: bool = False
    """After the warm-up: tell the event ``ready`` and wait for the line ``go``."""
    until_told: bool = False
    """After the counted inferences: tell ``counted`` and go on, uncounted, until the line ``stop``."""
    thresholds: Thresholds = DEFAULT
    cpu_affinity: Tuple[int, ...] = ()
    """Processors that this process may use; empty: those that it has."""
    compute_precision: str = ""
    cache: CacheUse = CacheUse.NONE
    cache_by_default: bool = False
    """Nobody asked for the cache: where the engine can't have one, it has none."""
    cache_root: Optional[Path] = None
    """Folder of all caches of all engines."""
    model_sha256: str = ""
    """Names the model's caches."""
    output_values: int = 0

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Job:
        """The job in a decoded JSON object. Raises JobRejected, OptionRejected, naming the field."""
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(content) - known - {"kind"})
        if unknown:
            raise JobRejected(f"the job has unknown fields: {', '.join(unknown)}")
        given = {name: content[name] for name in known if name in content}
        try:
            for name in ("precision_seconds", "confidence", "duration_seconds"):
                if name in given and given[name] is None:
                    del given[name]
            if given.get("precision"):
                given.setdefault("duration_seconds", 0.0)
            given["precision"] = tuple(
                Precision(float(entry["percentile"]), float(entry["ratio"]))
                for entry in given.get("precision") or ()
            )
            scenario = _scenario(given.pop("scenario", None) or {})
            thresholds = given.pop("thresholds", None) or {}
            job = cls(**given)
            job = replace(
                job,
                model_path=Path(job.model_path),
                sys_root=Path(job.sys_root),
                inputs_path=Path(job.inputs_path) if job.inputs_path else None,
                shapes={str(name): tuple(int(size) for size in sizes) for name, sizes in job.shapes.items()},
                options={str(name): str(value) for name, value in job.options.items()},
                device=job.device or "cpu",
                avoid=tuple(job.avoid),
                hold=bool(job.hold),
                until_told=bool(job.until_told),
                cpu_affinity=tuple(int(number) for number in job.cpu_affinity),
                cache=CacheUse(job.cache),
                cache_root=Path(job.cache_root) if job.cache_root else None,
            )._checked()
            return replace(
                job,
                thresholds=Thresholds.of(thresholds),
                scenario=scenarios.settle(scenario, duration_seconds=job.duration_seconds),
            )._checked_precision()
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise JobRejected(f"the job can't be read: {error!r}") from error

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
        for name in _SECONDS:
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise OptionRejected(f"{name} is a number of seconds from 0 on, not {seconds}")
        if self.threads is not None and self.threads < 1:
            raise OptionRejected(f"threads is at least 1, not {self.threads}")
        if not 0 <= self.seed < 2**64:
            raise OptionRejected(f"seed is from 0 to 2^64-1, not {self.seed}")
        if not 0.5 <= self.confidence <= 0.999:
            raise OptionRejected(f"confidence is from 0.5 to 0.999, not {self.confidence}")
        if self.compute_precision and self.compute_precision not in PRECISIONS:
            raise OptionRejected(
                f"compute_precision is {', '.join(PRECISIONS)}, not {self.compute_precision!r}"
            )
        if self.cache is not CacheUse.NONE and not (self.cache_root and self.model_sha256):
            raise JobRejected("a cache needs cache_root and model_sha256")
        if not 0 <= self.output_values <= MOST_OUTPUT_VALUES:
            raise OptionRejected(f"output_values is from 0 to {MOST_OUTPUT_VALUES}, not {self.output_values}")
        if self.until_told and not self.hold:
            raise JobRejected("until_told is for a worker that is held: there is no hold")
        return self

    def _checked_precision(self) -> Job:
        if not self.precision:
            return self
        self.targets()
        if self.scenario.kind in scenarios.WITHOUT_PRECISION:
            raise OptionRejected(
                f"the scenario {scenarios.name_of(self.scenario.kind)} lasts its duration: leave the "
                "precision out"
            )
        if self.precision_seconds <= 0:
            raise OptionRejected("precision_seconds is above 0")
        return self

    def targets(self) -> Tuple[Target, ...]:
        """The precision as the rule for ending takes it. Raises OptionRejected."""
        try:
            return stopping.check(stopping.target(each.percentile, each.ratio) for each in self.precision)
        except ValueError as error:
            raise OptionRejected(f"precision: {error}") from error

    def loaded_shapes(self) -> Dict[str, Tuple[int, ...]]:
        """The shapes that are given, with the batch of the scenario for every input."""
        batch = self.scenario.batch
        return dict(self.shapes) if batch is None else {**self.shapes, shapes.EVERY: (batch,)}

    def line(self) -> Dict[str, object]:
        """The job as it is in a job line, as far as it says what an inference is; without its kind."""
        found = {name: getattr(self, name) for name in _PROFILED}
        for name in ("model_path", "sys_root", "inputs_path", "cache_root"):
            found[name] = None if found[name] is None else str(found[name])
        # What was thrown away for the run is there anew.
        found["cache"] = (CacheUse.NONE if self.cache is CacheUse.NONE else CacheUse.KEEP).value
        if self.scenario.kind is ScenarioKind.OFFLINE:
            found["scenario"] = to_json(self.scenario)
        return found


def _scenario(content: Mapping[str, Any]) -> Scenario:
    fields = dict(content)
    kind = ScenarioKind(fields.pop("kind", ScenarioKind.SINGLE_STREAM.value))
    return Scenario(kind=kind, **fields)
