"""What a run is to do: what was asked for checked, every default filled in, the worker's job written."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.agent import wire, worker
from boardbench.agent.bench.runtimes import offered
from boardbench.agent.board.identify import EMULATORS
from boardbench.agent.config import SpecConfig
from boardbench.agent.errors import InvalidRequest, NotRunnable
from boardbench.agent.version import version
from boardbench.v1 import board_pb2, model_pb2, result_pb2

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

_DAY_SECONDS = 86400.0
# Bounds of what can be asked for: beyond them it is a mistake, or would fill the board.
_MOST_SECONDS = {"duration_seconds": _DAY_SECONDS, "warm_up_seconds": 3600.0, "timeout_seconds": _DAY_SECONDS}
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


def _given(spec: result_pb2.BenchmarkSpec, name: str) -> bool:
    return bool(spec.HasField(name))  # type: ignore[arg-type]  # the stub wants literals


@dataclass(frozen=True)
class Plan:
    """A run with everything settled that can be before it begins."""

    status: board_pb2.RuntimeStatus
    # Every default filled in.
    spec: result_pb2.BenchmarkSpec
    # After its warm-up the worker waits until it is told to measure, and when it has measured it goes on,
    # uncounted, until it is told to stop: so that several measure at the same time.
    held: bool = False


def plan(
    model: model_pb2.Model,
    asked: result_pb2.BenchmarkSpec,
    statuses: tuple[board_pb2.RuntimeStatus, ...],
    defaults: SpecConfig,
) -> Plan:
    """What will be done. Raises InvalidRequest for a bad spec, NotRunnable when the board can't do it."""
    check_spec(asked)
    status = _choose(model, asked.runtime, statuses)
    device = asked.device or "cpu"
    # What is given as a library brings its device along, and a fallback is the worker's to find: it knows
    # what the device is, and says what it ran on instead.
    if device not in status.devices and not (asked.allow_fallback or "delegate" in asked.options):
        more = "".join(f". {e.more_devices}" for e in offered() if e.name == status.name and e.more_devices)
        raise NotRunnable(
            f"{status.name} has no device {device!r} on this board; "
            f"it has {', '.join(status.devices) or 'none'} (allow_fallback runs on what there is, "
            f"with a warning){more}"
        )
    spec = result_pb2.BenchmarkSpec()
    spec.CopyFrom(asked)
    spec.runtime, spec.device = status.name, device
    for name in ("duration_seconds", "warm_up_seconds", "warm_up_runs", "timeout_seconds"):
        if not _given(spec, name):
            setattr(spec, name, getattr(defaults, name))
    # A default never contradicts what was asked for.
    if not _given(spec, "max_runs"):
        spec.max_runs = max(defaults.max_runs, spec.min_runs)
    if not _given(spec, "min_runs"):
        spec.min_runs = min(defaults.min_runs, spec.max_runs)
    if not _given(spec, "seed"):
        spec.seed = 0
    if _given(asked, "timeout_seconds") and spec.timeout_seconds <= spec.duration_seconds:
        raise InvalidRequest(
            f"timeout_seconds is {spec.timeout_seconds:g} and the measurement alone takes "
            f"{spec.duration_seconds:g} s: give it more time, or a shorter duration_seconds"
        )
    if not _given(asked, "timeout_seconds"):
        spec.timeout_seconds += spec.duration_seconds + spec.warm_up_seconds
    found = Plan(status, spec)
    if len(job_line(found, model.format, Path("/"), None)) > worker.JOB_LIMIT_BYTES - 3 * _PATH_BYTES:
        raise InvalidRequest("options and shapes together are too long for a job")
    return found


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


def job_line(plan: Plan, format: str, model: Path, inputs: Path | None, sys_root: Path = Path("/")) -> bytes:
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
