"""What a run is to do: what was asked for checked, every default filled in, the worker's job written."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.agent import wire, worker
from boardbench.agent.bench.runtimes import offered
from boardbench.agent.board.identify import EMULATORS
from boardbench.agent.config import AgentConfig, SpecConfig
from boardbench.agent.errors import InvalidRequest, NotRunnable
from boardbench.agent.version import version
from boardbench.v1 import board_pb2, model_pb2, result_pb2, scenario_pb2

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

_DAY_SECONDS = 86400.0
_HOUR_SECONDS = 3600.0
# Bounds of what can be asked for: beyond them it is a mistake, or would fill the board.
_MOST_SECONDS = {
    "duration_seconds": _DAY_SECONDS,
    "warm_up_seconds": _HOUR_SECONDS,
    "timeout_seconds": _DAY_SECONDS,
    "precision_seconds": _DAY_SECONDS,
    "cool_down_seconds": _HOUR_SECONDS,
    "idle_seconds": 600.0,
}
_MOST_RUNS = {
    "min_runs": 1_000_000,
    "max_runs": 1_000_000,
    "warm_up_runs": 1_000_000,
    # Beyond it a profile grows no sharper, only longer.
    "profile_runs": 10_000,
}
_MOST_THREADS = 1024
_MOST_DIMENSIONS = 16
_MOST_SIZE = 2**31 - 1
# Each loads the model: a hundred of the smallest take minutes.
_MOST_PROCESSES = 100
_MOST_TARGETS = 16
# As many models as anybody compares in one go, or runs at the same time.
_MOST_MEMBERS = 32
# Reading all sensors of a board takes about a hundredth of a second.
_MOST_SAMPLE_HERTZ = 100.0
# More than any kernel of Linux is built for.
_MOST_PROCESSORS = 8192
_LONGEST_POWER_MODE = 64
# What thermal zones can show.
_CELSIUS = (-40.0, 150.0)

_SINGLE_STREAM = scenario_pb2.SCENARIO_KIND_SINGLE_STREAM
_OFFLINE = scenario_pb2.SCENARIO_KIND_OFFLINE
_MULTI_STREAM = scenario_pb2.SCENARIO_KIND_MULTI_STREAM
_SUSTAINED = scenario_pb2.SCENARIO_KIND_SUSTAINED
_AT_A_RATE = (scenario_pb2.SCENARIO_KIND_PERIODIC, scenario_pb2.SCENARIO_KIND_POISSON)
# They end by time: what they are about is not a percentile of one inference's latency.
_WITHOUT_PRECISION = (_OFFLINE, _SUSTAINED)
# The scenarios that a field says something to, and its bounds.
_SCENARIO_FIELDS: Mapping[str, tuple[tuple[int, ...], float, float]] = {
    "rate_hertz": (_AT_A_RATE, 1e-3, 1e6),
    "deadline_seconds": (_AT_A_RATE, 1e-6, _HOUR_SECONDS),
    "streams": ((_OFFLINE, _MULTI_STREAM), 1, 1024),
    "batch": ((_OFFLINE,), 1, 65536),
    "window_seconds": ((_SUSTAINED,), 1e-3, _DAY_SECONDS),
}
# MLPerf's: https://github.com/mlcommons/inference_policies/blob/master/inference_rules.adoc
_SAMPLES_A_QUERY = 8
# A minute shows heat, and a tenth of the run is short enough to see it come.
_WINDOW_SECONDS = 60.0
_WINDOWS = 10

# ±0.01 %: clocks and boards are no steadier than that, whatever the number of inferences. The worker has the
# same bounds.
_LEAST_RATIO = 0.0001
_MOST_RATIO = 0.99
# Of several processes each is to be so much more precise than its share of the precision: how far a few are
# apart varies by chance, and six of one kind then reach what was asked for nine times of ten.
_PRECISION_MARGIN = 0.75
# Of a model by itself, before it runs at the same time as others: its share of the time, and at most this.
_ALONE_SHARE = 1 / 3
_MOST_ALONE_SECONDS = 10.0

# Of the bounds of every figure, as everybody expects it.
_CONFIDENCE = 0.95

# Progress is for eyes.
_PROGRESS_SECONDS = 0.25


def check_spec(spec: result_pb2.BenchmarkSpec) -> None:
    """Raises InvalidRequest, naming the field, when the spec asks for what makes no sense."""
    for name, most in _MOST_SECONDS.items():
        seconds = getattr(spec, name)
        if _given(spec, name) and not (math.isfinite(seconds) and 0 <= seconds <= most):
            raise InvalidRequest(f"{name} is {seconds:g}; it must be from 0 to {most:g}")
    for name, most_runs in _MOST_RUNS.items():
        if _given(spec, name) and getattr(spec, name) > most_runs:
            raise InvalidRequest(f"{name} is {getattr(spec, name)}; it must be at most {most_runs}")
    for name in ("min_runs", "max_runs"):
        if _given(spec, name) and getattr(spec, name) < 1:
            raise InvalidRequest(f"{name} is 0; it must be at least 1")
    if _given(spec, "min_runs") and _given(spec, "max_runs") and spec.min_runs > spec.max_runs:
        raise InvalidRequest(f"min_runs is {spec.min_runs} and max_runs {spec.max_runs}: swap them")
    if _given(spec, "threads") and not 1 <= spec.threads <= _MOST_THREADS:
        raise InvalidRequest(f"threads is {spec.threads}; it must be from 1 to {_MOST_THREADS}")
    if spec.strict and spec.allow_fallback:
        raise InvalidRequest("strict forbids what allow_fallback allows: leave one of them out")
    if _given(spec, "timeout_seconds") and spec.timeout_seconds <= 0:
        raise InvalidRequest("timeout_seconds is 0; leave it out for the default")
    for name, shape in spec.shapes.items():
        sizes = list(shape.dimensions)
        if len(sizes) > _MOST_DIMENSIONS or not all(1 <= size <= _MOST_SIZE for size in sizes):
            raise InvalidRequest(
                f"the shape of {name!r} is {sizes[:20]}; it must have at most {_MOST_DIMENSIONS} dimensions, "
                "each at least 1"
            )
    if spec.inputs_sha256 and not re.fullmatch(r"[0-9a-f]{64}", spec.inputs_sha256):
        raise InvalidRequest(
            f"inputs_sha256 is {spec.inputs_sha256[:80]!r}; it must be 64 lower-case hex digits"
        )
    _check_settings(spec)
    _check_precision(spec)
    _check_processes(spec)
    _check_scenario(spec)
    _check_surroundings(spec)
    _check_group(spec)


def _check_settings(spec: result_pb2.BenchmarkSpec) -> None:
    processors = list(spec.cpu_affinity)
    if len(set(processors)) < len(processors):
        raise InvalidRequest("cpu_affinity names a processor twice")
    if any(number >= _MOST_PROCESSORS for number in processors):
        raise InvalidRequest(f"cpu_affinity names processor {max(processors)}; no board has as many")
    if spec.compute_precision:
        from boardbench.agent.bench.runtime import PRECISIONS

        if spec.compute_precision not in PRECISIONS:
            raise InvalidRequest(
                f"compute_precision is {spec.compute_precision[:80]!r}; it must be {', '.join(PRECISIONS)}"
            )
    if len(spec.power_mode) > _LONGEST_POWER_MODE or not spec.power_mode.isprintable():
        raise InvalidRequest(f"power_mode is {spec.power_mode[:80]!r}, which is no name of a mode")
    if spec.cache not in result_pb2.CacheUse.values():
        raise InvalidRequest(f"there is no use of caches {spec.cache}: the agent may be older than what asks")
    if spec.output_values > wire.MOST_OUTPUT_VALUES:
        raise InvalidRequest(
            f"output_values is {spec.output_values}; it must be at most {wire.MOST_OUTPUT_VALUES}"
        )


def _check_precision(spec: result_pb2.BenchmarkSpec) -> None:
    for target in spec.precision:
        if not 0 < target.percentile < 100:
            raise InvalidRequest(
                f"precision has the percentile {target.percentile:g}; it must be above 0 and below 100"
            )
        if not _LEAST_RATIO <= target.ratio < 1:
            raise InvalidRequest(
                f"precision wants p{target.percentile:g} within a share of {target.ratio:g}; it must be from "
                f"{_LEAST_RATIO:g} up and below 1 (0.01 is ±1 %)"
            )
    named = [target.percentile for target in spec.precision]
    if len(named) > _MOST_TARGETS or len(set(named)) < len(named):
        raise InvalidRequest(f"precision names a percentile twice, or more than {_MOST_TARGETS}")
    if spec.precision and spec.scenario.kind in _WITHOUT_PRECISION:
        kind = scenario_pb2.ScenarioKind.Name(spec.scenario.kind).removeprefix("SCENARIO_KIND_").lower()
        raise InvalidRequest(
            f"precision is asked for and the scenario is {kind}, which lasts as long as it is told to: leave "
            "one of them out"
        )
    if _given(spec, "confidence") and not 0.5 <= spec.confidence <= 0.999:
        raise InvalidRequest(f"confidence is {spec.confidence:g}; it must be from 0.5 to 0.999")
    if not _given(spec, "precision_seconds"):
        return
    if not spec.precision:
        raise InvalidRequest("precision_seconds bounds a precision, and none is asked for: leave it out")
    if spec.precision_seconds <= 0:
        raise InvalidRequest("precision_seconds is 0; leave it out for the default")
    if _given(spec, "duration_seconds") and spec.duration_seconds > spec.precision_seconds:
        raise InvalidRequest(
            f"duration_seconds is {spec.duration_seconds:g} and precision_seconds "
            f"{spec.precision_seconds:g}: the measurement lasts at least the first, at most the second"
        )


def _check_processes(spec: result_pb2.BenchmarkSpec) -> None:
    if not _given(spec, "processes"):
        return
    if not 1 <= spec.processes <= _MOST_PROCESSES:
        raise InvalidRequest(f"processes is {spec.processes}; it must be from 1 to {_MOST_PROCESSES}")
    if _given(spec, "max_runs") and spec.max_runs < spec.processes:
        raise InvalidRequest(
            f"max_runs is {spec.max_runs} and processes {spec.processes}: each counts at least one inference"
        )


def _check_scenario(spec: result_pb2.BenchmarkSpec) -> None:
    scenario = spec.scenario
    kind = scenario.kind or _SINGLE_STREAM
    if kind not in scenario_pb2.ScenarioKind.values():
        raise InvalidRequest(f"there is no scenario {kind}: the agent may be older than what asks it")
    name = scenario_name(kind)
    for field_name, (takers, least, most) in _SCENARIO_FIELDS.items():
        if not _given(scenario, field_name):
            continue
        value = getattr(scenario, field_name)
        if kind not in takers:
            raise InvalidRequest(
                f"scenario.{field_name} says nothing to {name}; it is for "
                + " and ".join(scenario_name(taker) for taker in takers)
            )
        # Not the other way round: NaN is in no bounds.
        if not least <= value <= most:
            raise InvalidRequest(f"scenario.{field_name} is {value:g}; it must be from {least:g} to {most:g}")
    if kind in _AT_A_RATE and not _given(scenario, "rate_hertz"):
        raise InvalidRequest(f"{name} needs scenario.rate_hertz: how many inferences a second")
    if kind == _SUSTAINED and spec.processes > 1:
        raise InvalidRequest(
            "a sustained run lasts its duration_seconds, in one process: leave processes out"
        )


def _check_surroundings(spec: result_pb2.BenchmarkSpec) -> None:
    least, most = _CELSIUS
    if _given(spec, "cool_down_celsius") and not least <= spec.cool_down_celsius <= most:
        raise InvalidRequest(
            f"cool_down_celsius is {spec.cool_down_celsius:g}; it must be from {least:g} to {most:g}"
        )
    if _given(spec, "cool_down_seconds") and not _given(spec, "cool_down_celsius"):
        raise InvalidRequest("cool_down_seconds says how long to wait for cool_down_celsius: give that, too")
    if _given(spec, "sample_hertz") and not 0 <= spec.sample_hertz <= _MOST_SAMPLE_HERTZ:
        raise InvalidRequest(
            f"sample_hertz is {spec.sample_hertz:g}; it must be from 0 to {_MOST_SAMPLE_HERTZ:g}"
        )


def _check_group(spec: result_pb2.BenchmarkSpec) -> None:
    if not _given(spec, "group"):
        return
    group = spec.group
    if not RUN_ID.fullmatch(group.id):
        raise InvalidRequest(
            f"group.id is {group.id[:80]!r}; it must be 1 to 64 letters, digits, '-' or '_', and begin with "
            "a letter or digit"
        )
    if not 2 <= group.size <= _MOST_MEMBERS:
        raise InvalidRequest(f"group.size is {group.size}; it must be from 2 to {_MOST_MEMBERS}")
    if group.mode not in (result_pb2.GROUP_MODE_INTERLEAVED, result_pb2.GROUP_MODE_CONCURRENT):
        raise InvalidRequest("group.mode is neither GROUP_MODE_INTERLEAVED nor GROUP_MODE_CONCURRENT")


def check_power_mode(config: AgentConfig, spec: result_pb2.BenchmarkSpec) -> None:
    """Raises NoPowerMode when a mode is asked for that the board does not have."""
    if spec.power_mode:
        from boardbench.agent.board.power_modes import PowerModes

        PowerModes(config.sys_root, config.data_dir).index_of(spec.power_mode)


def scenario_name(kind: int) -> str:
    """The scenario as a person reads it: "multi stream"."""
    name = scenario_pb2.ScenarioKind.Name(scenario_pb2.ScenarioKind.ValueType(kind))
    return name.removeprefix("SCENARIO_KIND_").lower().replace("_", " ")


def _given(message: Message, name: str) -> bool:
    return bool(message.HasField(name))


@dataclass(frozen=True)
class Plan:
    """A run with everything settled that can be before it begins."""

    status: board_pb2.RuntimeStatus
    # Every default filled in.
    spec: result_pb2.BenchmarkSpec
    # After its warm-up the worker waits until it is told to measure, and when it has measured it goes on,
    # uncounted, until it is told to stop: so that several measure at the same time.
    held: bool = False
    # By name, from where on the worker raises a doubt, where that is configured otherwise than it has it.
    thresholds: Mapping[str, float] = field(default_factory=dict)
    # Whether nobody asked for the use of caches: then an engine that keeps nothing is no error.
    cache_by_default: bool = False

    @property
    def processes(self) -> int:
        """How many processes measure, one after the other."""
        return self.spec.processes

    def of_process(self, position: int) -> Plan:
        """What the process at this position, from 0, does of it: an even share, and what one does for all."""
        count = self.processes
        if count == 1:
            return self
        spec = result_pb2.BenchmarkSpec()
        spec.CopyFrom(self.spec)
        spec.processes = 1
        spec.duration_seconds /= count
        spec.min_runs = max(1, _share(spec.min_runs, position, count))
        spec.max_runs = _share(spec.max_runs, position, count)
        if spec.precision:
            spec.precision_seconds /= count
            for target in spec.precision:
                target.ratio = min(_MOST_RATIO, target.ratio * _wider(count, spec.confidence))
        if position > 0:
            spec.idle_seconds = 0.0
        # The last one, after which nothing is measured any more.
        if position < count - 1:
            spec.profile_runs = 0
        return replace(self, spec=spec)

    def alone(self) -> Plan:
        """A short measurement of the same in the same way, to set what it is beside others against.

        Whatever else is to be known of the model is looked for here, while nothing else runs.
        """
        spec = result_pb2.BenchmarkSpec()
        spec.CopyFrom(self.spec)
        if spec.scenario.kind == _SUSTAINED:
            spec.ClearField("scenario")
        spec.duration_seconds = min(spec.duration_seconds * _ALONE_SHARE, _MOST_ALONE_SECONDS)
        spec.min_runs = max(1, math.ceil(spec.min_runs * _ALONE_SHARE))
        if spec.precision:
            spec.precision_seconds = max(
                spec.duration_seconds, min(spec.precision_seconds * _ALONE_SHARE, _MOST_ALONE_SECONDS)
            )
        return replace(self, spec=spec)

    def together(self) -> Plan:
        """The same, held until all others are ready."""
        spec = result_pb2.BenchmarkSpec()
        spec.CopyFrom(self.spec)
        spec.idle_seconds, spec.profile_runs = 0.0, 0
        return replace(self, spec=spec, held=True)


def _wider(count: int, confidence: float) -> float:
    """How much wider the bounds of each of so many processes may be than those of all of them are to be."""
    # Few runs have several processes, and an agent that waits needs no statistics.
    from boardbench.agent.bench import stats

    # Of all of them they are narrower by the root of the number, and wider by Student's t for being few.
    few = stats.student(confidence, count - 1) / stats.student(confidence)
    return math.sqrt(count) / few * _PRECISION_MARGIN


def _share(whole: int, position: int, count: int) -> int:
    return whole // count + (position < whole % count)


def counted_seconds(spec: result_pb2.BenchmarkSpec) -> float:
    """How long counting may take by what the spec says, besides the time of the inferences themselves."""
    seconds = max(spec.duration_seconds, spec.precision_seconds if spec.precision else 0.0)
    if spec.scenario.rate_hertz:
        seconds = max(seconds, spec.min_runs / spec.scenario.rate_hertz)
    return seconds


def samples_a_run(spec: result_pb2.BenchmarkSpec) -> int:
    """How many inferences, one after the other or side by side, count as one in the scenario."""
    return max(1, spec.scenario.streams)


def plan(
    model: model_pb2.Model,
    asked: result_pb2.BenchmarkSpec,
    statuses: tuple[board_pb2.RuntimeStatus, ...],
    defaults: SpecConfig,
    thresholds: Mapping[str, float] | None = None,
    more_devices: Mapping[str, str] | None = None,
) -> Plan:
    """What will be done. Raises InvalidRequest for a bad spec, NotRunnable when the board can't do it.

    ``more_devices`` says, by runtime from elsewhere, how devices come to it that the board lacks.
    """
    check_spec(asked)
    status = _choose(model, asked.runtime, statuses)
    # An engine that runs nothing on the processor has a default of its own.
    device = asked.device or ("cpu" if "cpu" in status.devices else next(iter(status.devices), "cpu"))
    # What is given as a library brings its device along, and a fallback is the worker's to find: it knows
    # what the device is, and says what it ran on instead.
    brings_one = "delegate" in asked.options or "provider_library" in asked.options
    if device not in status.devices and not (asked.allow_fallback or brings_one):
        how = {engine.name: engine.more_devices for engine in offered()} | dict(more_devices or {})
        more = f". {how[status.name]}" if how.get(status.name) else ""
        raise NotRunnable(
            f"{status.name} has no device {device!r} on this board; "
            f"it has {', '.join(status.devices) or 'none'} (allow_fallback runs on what there is, "
            f"with a warning){more}"
        )
    spec = result_pb2.BenchmarkSpec()
    spec.CopyFrom(asked)
    spec.runtime, spec.device = status.name, device
    _refuse_settings(model, asked, status, statuses)
    _refuse_processors(asked)
    _fill_in(spec, asked, defaults)
    by_default = not asked.cache
    if by_default:
        keeps = defaults.cache == "keep" and CACHE in status.settings
        spec.cache = result_pb2.CACHE_USE_KEEP if keeps else result_pb2.CACHE_USE_NONE
    if _given(asked, "timeout_seconds") and spec.timeout_seconds <= counted_seconds(spec):
        raise InvalidRequest(
            f"timeout_seconds is {spec.timeout_seconds:g} and the measurement alone takes "
            f"{counted_seconds(spec):g} s: give it more time, or a shorter duration_seconds"
        )
    if not _given(asked, "timeout_seconds"):
        each = spec.warm_up_seconds + spec.cool_down_seconds
        spec.timeout_seconds += counted_seconds(spec) + spec.idle_seconds + each * spec.processes
    found = Plan(status, spec, thresholds=thresholds or {}, cache_by_default=by_default)
    if len(job_line(found, model.format, Path("/"), None)) > worker.JOB_LIMIT_BYTES - 3 * _PATH_BYTES:
        raise InvalidRequest("options and shapes together are too long for a job")
    return found


def _fill_in(spec: result_pb2.BenchmarkSpec, asked: result_pb2.BenchmarkSpec, defaults: SpecConfig) -> None:
    """Every default, none of which contradicts what was asked for."""
    sustained = spec.scenario.kind == _SUSTAINED
    if not _given(spec, "duration_seconds"):
        spec.duration_seconds = defaults.duration_seconds
        if sustained:
            spec.duration_seconds = defaults.sustained_seconds
        elif spec.precision:
            spec.duration_seconds = defaults.precision_least_seconds
            if _given(asked, "precision_seconds"):
                spec.duration_seconds = min(spec.duration_seconds, spec.precision_seconds)
    if spec.precision and not _given(spec, "precision_seconds"):
        spec.precision_seconds = max(defaults.precision_seconds, spec.duration_seconds)
    for name in ("warm_up_seconds", "warm_up_runs", "timeout_seconds"):
        if not _given(spec, name):
            setattr(spec, name, getattr(defaults, name))
    if not _given(spec, "processes"):
        interleaved = spec.group.mode == result_pb2.GROUP_MODE_INTERLEAVED and not sustained
        spec.processes = defaults.interleaved_processes if interleaved else 1
        if _given(spec, "max_runs"):
            spec.processes = min(spec.processes, spec.max_runs)
    if not _given(spec, "max_runs"):
        most = _MOST_RUNS["max_runs"] if sustained else defaults.max_runs
        spec.max_runs = max(most, spec.min_runs, spec.processes)
    if not _given(spec, "min_runs"):
        spec.min_runs = min(defaults.min_runs, spec.max_runs)
    if not _given(spec, "seed"):
        spec.seed = 0
    if not _given(spec, "confidence"):
        spec.confidence = _CONFIDENCE
    if _given(spec, "cool_down_celsius") and not _given(spec, "cool_down_seconds"):
        spec.cool_down_seconds = defaults.cool_down_seconds
    _fill_in_scenario(spec)


def _fill_in_scenario(spec: result_pb2.BenchmarkSpec) -> None:
    scenario = spec.scenario
    if scenario.kind in _AT_A_RATE and not _given(scenario, "deadline_seconds"):
        scenario.deadline_seconds = 1 / scenario.rate_hertz
    elif scenario.kind in (_OFFLINE, _MULTI_STREAM) and not _given(scenario, "streams"):
        scenario.streams = _SAMPLES_A_QUERY if scenario.kind == _MULTI_STREAM else 1
    elif scenario.kind == _SUSTAINED:
        if not _given(scenario, "window_seconds"):
            scenario.window_seconds = min(_WINDOW_SECONDS, spec.duration_seconds / _WINDOWS)
        elif scenario.window_seconds > spec.duration_seconds:
            raise InvalidRequest(
                f"scenario.window_seconds is {scenario.window_seconds:g} and the run lasts "
                f"{spec.duration_seconds:g} s: a window is shorter than the run"
            )


CACHE = "cache"


def asked_settings(spec: result_pb2.BenchmarkSpec) -> dict[str, str]:
    """The common settings of the engine that are asked for, each with its value in words."""
    asked = {
        "threads": str(spec.threads) if _given(spec, "threads") else "",
        "cpu_affinity": ",".join(str(number) for number in spec.cpu_affinity),
        "compute_precision": spec.compute_precision,
        CACHE: "",
    }
    if spec.cache in (result_pb2.CACHE_USE_KEEP, result_pb2.CACHE_USE_RENEW):
        asked[CACHE] = result_pb2.CacheUse.Name(spec.cache).removeprefix("CACHE_USE_").lower()
    return {name: value for name, value in asked.items() if value}


def _refuse_settings(
    model: model_pb2.Model,
    asked: result_pb2.BenchmarkSpec,
    status: board_pb2.RuntimeStatus,
    statuses: tuple[board_pb2.RuntimeStatus, ...],
) -> None:
    """Raises NotRunnable for a common setting that the engine would not heed."""
    # An engine that says nothing about settings is asked when the run begins.
    for name, value in asked_settings(asked).items() if status.settings else ():
        if name in status.settings:
            continue
        takers = ", ".join(
            each.name
            for each in statuses
            if each.available and name in each.settings and model.format in each.formats
        )
        raise NotRunnable(
            f"{status.name} takes no {name} ({value} was asked for): leave it out"
            + (f", or choose {takers}, which can run {model.format} here, too" if takers else "")
        )


def _refuse_processors(asked: result_pb2.BenchmarkSpec) -> None:
    """Raises NotRunnable for a processor that the worker can't have."""
    if not asked.cpu_affinity or not hasattr(os, "sched_getaffinity"):
        return
    here = os.sched_getaffinity(0)
    missing = sorted(set(asked.cpu_affinity) - here)
    if missing:
        raise NotRunnable(
            f"cpu_affinity names processor {', '.join(map(str, missing))}, and the agent may use "
            f"{', '.join(map(str, sorted(here)))}"
        )


_PATH_BYTES = 4096


def _choose(
    model: model_pb2.Model, name: str, statuses: tuple[board_pb2.RuntimeStatus, ...]
) -> board_pb2.RuntimeStatus:
    available = [status for status in statuses if status.available]
    here = ", ".join(f"{status.name} ({status.version})" for status in available) or "none"
    takers = [status for status in statuses if model.format in status.formats]
    if name:
        named = next((status for status in statuses if status.name == name), None)
        if named is None:
            missing = "".join(f"; {s.name} is not: {s.reason}" for s in statuses if not s.available)
            raise NotRunnable(f"there is no runtime {name!r}; available here: {here}{missing}")
        if not named.available:
            raise NotRunnable(f"{name} is not available on this board: {named.reason}; available: {here}")
        if model.format not in named.formats:
            better = ", ".join(status.name for status in takers if status.available)
            raise NotRunnable(
                f"{name} takes {', '.join(named.formats)} models and {model.name} is {model.format}"
                + (f"; use {better}, or name no runtime at all" if better else "")
            )
        return named
    for status in takers:
        if status.available:
            return status
    if takers:
        reasons = "; ".join(f"{status.name}: {status.reason}" for status in takers)
        raise NotRunnable(f"nothing on this board can run {model.name} ({model.format}): {reasons}")
    raise NotRunnable(
        f"{model.name} is a {model.format} model, and no runtime here takes those; available here: {here}"
    )


def job_line(
    plan: Plan,
    format: str,
    model: Path,
    inputs: Path | None,
    sys_root: Path = Path("/"),
    *,
    model_sha256: str = "",
    cache_root: Path | None = None,
) -> bytes:
    """The job as the worker reads it: one line of JSON, without its end."""
    spec = plan.spec
    job: dict[str, object] = {
        "kind": "run",
        "runtime": spec.runtime,
        "model_path": str(model),
        "format": format,
        "device": spec.device,
        "threads": spec.threads if _given(spec, "threads") else None,
        "options": dict(spec.options),
        "shapes": {name: list(shape.dimensions) for name, shape in spec.shapes.items()},
        "inputs_path": str(inputs) if inputs is not None else None,
        "seed": spec.seed,
        "duration_seconds": spec.duration_seconds,
        "min_runs": spec.min_runs,
        "max_runs": spec.max_runs,
        "warm_up_seconds": spec.warm_up_seconds,
        "warm_up_runs": spec.warm_up_runs,
        "progress_seconds": _PROGRESS_SECONDS,
    }
    # Left out when not asked for, so that a worker that knows nothing of them still runs.
    if spec.strict:
        job["strict"] = True
    if spec.allow_fallback:
        job["allow_fallback"] = True
    if _given(spec, "profile_runs"):
        job["profile_runs"] = spec.profile_runs
    if spec.precision:
        job["precision"] = [
            {"percentile": target.percentile, "ratio": target.ratio} for target in spec.precision
        ]
        job["precision_seconds"] = spec.precision_seconds
    if _given(spec, "confidence") and spec.confidence != _CONFIDENCE:
        job["confidence"] = spec.confidence
    if _given(spec, "scenario"):
        job["scenario"] = json_format.MessageToDict(spec.scenario, preserving_proto_field_name=True)
    if spec.cpu_affinity:
        job["cpu_affinity"] = list(spec.cpu_affinity)
    if spec.compute_precision:
        job["compute_precision"] = spec.compute_precision
    if spec.cache not in (result_pb2.CACHE_USE_UNSPECIFIED, result_pb2.CACHE_USE_NONE):
        job["cache"] = result_pb2.CacheUse.Name(spec.cache)
        job["cache_root"], job["model_sha256"] = str(cache_root), model_sha256
        if plan.cache_by_default:
            job["cache_by_default"] = True
    if spec.output_values:
        job["output_values"] = spec.output_values
    if plan.thresholds:
        job["thresholds"] = dict(plan.thresholds)
    if plan.held:
        job["hold"] = job["until_told"] = True
    if sys_root != Path("/"):
        job["sys_root"] = str(sys_root)
    return json.dumps(job, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Job:
    """Everything that one run needs."""

    run_id: str
    model: model_pb2.Model
    model_path: Path
    inputs_path: Path | None
    asked: result_pb2.BenchmarkSpec
    plan: Plan
    created_at: Timestamp
    board: board_pb2.Board
    interpreter: str
    # Exists, is empty, and belongs to this run.
    scratch: Path


def blank_result(
    run_id: str,
    model: model_pb2.Model,
    asked: result_pb2.BenchmarkSpec,
    board: board_pb2.Board,
    created_at: Timestamp,
) -> result_pb2.RunResult:
    """The result of a run of which nothing more is known."""
    result = result_pb2.RunResult(
        run_id=run_id,
        model=model,
        spec=asked,
        board=board,
        created_at=created_at,
        finished_at=wire.timestamp(time.time_ns()),
    )
    result.environment.boardbench_version = version()
    if board.emulator in EMULATORS:
        result.standins.append(board.emulator)
    result.standins.extend(entry.name for entry in board.accelerators if entry.standin)
    return result
