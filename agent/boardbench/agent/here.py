"""What this machine can do without a server: say what it is, and run one model, with events as they come."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from boardbench.agent import recognise, wire
from boardbench.agent.board.identify import derive_device_id, identify
from boardbench.agent.config import AgentConfig
from boardbench.agent.enrolment import Enrolment
from boardbench.agent.errors import InvalidRequest, NotRunnable, UnknownFormat
from boardbench.agent.formats import Mark
from boardbench.agent.instance import instance_id
from boardbench.agent.plan import Job, check_power_mode, check_spec, plan
from boardbench.agent.probe import Engines, Statuses
from boardbench.agent.run import stage_name
from boardbench.agent.session import Session
from boardbench.agent.version import version
from boardbench.v1 import agent_pb2, board_pb2, model_pb2, result_pb2

_MIB = 1024 * 1024
_MILLISECONDS = 1e3


async def describe(config: AgentConfig) -> agent_pb2.DescribeResponse:
    """What the board is and what it can run, found now."""
    with tempfile.TemporaryDirectory(prefix="boardbench-") as folder:
        statuses = await Engines(config, Path(folder)).statuses()
    return agent_pb2.DescribeResponse(board=_board(config), runtimes=statuses, agent_version=version())


async def run(
    config: AgentConfig,
    model_path: Path,
    inputs_path: Path | None,
    spec: result_pb2.BenchmarkSpec,
    show: Callable[[agent_pb2.RunEvent], None],
) -> result_pb2.RunResult:
    """Runs a model here; every event, the result last, goes to ``show``. SIGTERM and SIGINT cancel it.

    Raises InvalidRequest, NotRunnable, StorageError.
    """
    check_spec(spec)
    check_power_mode(config, spec)
    if spec.HasField("group"):
        raise InvalidRequest("a group is of several runs, and here is one: push them to an agent")
    unknown: UnknownFormat | None = None
    try:
        model = _read(model_path, recognise.FileKind.MODEL)
    except UnknownFormat as error:
        # It may be of an engine from elsewhere.
        unknown = error
    if inputs_path is not None:
        spec.inputs_sha256 = _read(inputs_path, recognise.FileKind.INPUTS).sha256
    run_id = os.urandom(16).hex()
    sequence = 0

    def emit(event: wire.WorkerNews | result_pb2.RunResult) -> None:
        nonlocal sequence
        sequence += 1
        show(wire.to_event(run_id, sequence, event))

    with tempfile.TemporaryDirectory(prefix="boardbench-") as folder:
        engines = Engines(config, Path(folder))
        statuses = await _ask(engines, spec.runtime)
        if unknown is not None:
            model = _read(model_path, recognise.FileKind.MODEL, engines.known_marks or await engines.marks())
        limits = config.validity.thresholds
        try:
            settled = plan(model, spec, statuses, config.spec, limits, engines.more_devices)
        except NotRunnable:
            if len(statuses) > 1:
                raise
            # Why not is told with what else could.
            statuses = await engines.statuses()
            settled = plan(model, spec, statuses, config.spec, limits, engines.more_devices)
        job = Job(
            run_id=run_id,
            model=model,
            model_path=_absolute(model_path),
            inputs_path=_absolute(inputs_path) if inputs_path is not None else None,
            asked=spec,
            plan=settled,
            created_at=wire.timestamp(time.time_ns()),
            board=_board(config),
            interpreter=engines.interpreter(settled.spec.runtime),
            scratch=Path(folder),
        )
        results: list[result_pb2.RunResult] = []

        async def ended(result: result_pb2.RunResult) -> None:
            results.append(result)

        session = Session([job], config, lambda _, event: emit(event), ended)
        with _cancelling(lambda: session.stop(run_id)):
            await session.execute()
    emit(results[0])
    return results[0]


async def enroll(config: AgentConfig, token: str) -> str:
    """Makes the board one of the configured collector's; its device id.

    Raises EnrolmentRefused, ConfigurationError, StorageError.
    """
    board = _board(config)
    instance = instance_id(config.data_dir, config.sys_root)
    await Enrolment(config.data_dir).enroll(config.collector, token, board, instance, ca=config.collector_ca)
    return board.device_id


def show_json(event: agent_pb2.RunEvent) -> None:
    """The event as one line of JSON on stdout."""
    sys.stdout.write(wire.to_json(event) + "\n")
    sys.stdout.flush()


def show_text(event: agent_pb2.RunEvent) -> None:
    """Stages on stderr as they come, the result on stdout."""
    kind = event.WhichOneof("event")
    if kind == "stage":
        sys.stderr.write(f"{stage_name(event.stage.stage)}\n")
    elif kind == "result":
        sys.stdout.write(_summary(event.result) + "\n")
        sys.stdout.flush()


def description(described: agent_pb2.DescribeResponse) -> str:
    """The board and its runtimes, for a person."""
    board = described.board
    lines = [
        board.model or "a board that does not say its name",
        f"  device id     {board.device_id}",
        f"  system        {board.os or 'unknown'}, kernel {board.kernel or 'unknown'}",
        f"  processors    {board.cpu_count} × {board.cpu_model or board.architecture} ({board.architecture}"
        + (f", {board.soc})" if board.soc else ")"),
        f"  memory        {board.memory_bytes / _MIB:.0f} MiB",
    ]
    if board.emulator:
        lines.append(f"  underneath    {board.emulator}: not the bare board")
    lines += [
        f"  accelerator   {accelerator.name} ({accelerator.kind}) at {accelerator.path}"
        for accelerator in board.accelerators
    ]
    if not board.accelerators:
        lines.append("  accelerators  none found")
    for status in described.runtimes:
        lines += ["", f"{status.name}: " + (status.version if status.available else "not available")]
        if status.available:
            lines.append(f"  runs          {', '.join(status.formats)} on {', '.join(status.devices)}")
            lines.append(f"  under         {status.interpreter.version}, {status.interpreter.path}")
            if status.default_formats:
                lines.append(f"  default for   {', '.join(status.default_formats)}")
            lines.append(f"  settings      {', '.join(status.settings) or 'none'}")
        else:
            lines.append(f"  why           {status.reason}")
    return "\n".join(lines)


def _summary(result: result_pb2.RunResult) -> str:
    runtime = result.runtime
    lines = [f"{result.model.name}: {runtime.name} ({runtime.version}) on {runtime.device}"]
    if result.status == result_pb2.RUN_STATUS_CANCELLED:
        lines.append("cancelled")
    if result.HasField("error"):
        lines.append(f"failed: {result.error.message} ({result.error.code})")
        lines += [f"  | {line}" for line in result.error.output_tail.splitlines()]
    for percentile in result.latency.percentiles:
        seconds, low, high = percentile.seconds, percentile.low_seconds, percentile.high_seconds
        lines.append(
            f"  p{percentile.percentile:<8g}{seconds * _MILLISECONDS:10.3f} ms   "
            f"95 % within {low * _MILLISECONDS:.3f} … {high * _MILLISECONDS:.3f}"
        )
    if result.HasField("latency"):
        lines.append(f"  inferences {result.latency.count:8d}")
    for name, present, seconds in (
        ("import", result.HasField("import_seconds"), result.import_seconds),
        ("create", result.HasField("create_seconds"), result.create_seconds),
        ("first", result.HasField("first_inference_seconds"), result.first_inference_seconds),
    ):
        if present:
            lines.append(f"  {name:9}{seconds * _MILLISECONDS:10.3f} ms")
    if result.memory.HasField("peak_rss_bytes"):
        lines.append(f"  peak     {result.memory.peak_rss_bytes / _MIB:10.1f} MiB")
    if result.placement.detail:
        lines.append(f"  {result.placement.detail}")
    lines += [f"  warning {warning.code}: {warning.message}" for warning in result.warnings]
    return "\n".join(lines)


def _board(config: AgentConfig) -> board_pb2.Board:
    device_id = config.device_id or derive_device_id(config.sys_root, config.data_dir)
    return identify(config.sys_root, device_id=device_id, labels=config.labels)


async def _ask(engines: Engines, runtime: str) -> Statuses:
    """The runtime that was asked for; all of them when none was, or none has that name."""
    status = await engines.status(runtime) if runtime else None
    return (status,) if status is not None else await engines.statuses()


def _read(path: Path, kind: recognise.FileKind, marks: Sequence[Mark] = ()) -> model_pb2.Model:
    """The file as a model of the wire, held to what a pushed file is held to. Raises InvalidRequest."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_MIB):
                digest.update(block)
            size_bytes = file.tell()
    except OSError as error:
        raise InvalidRequest(f"{path}: can't be read: {error.strerror}") from error
    return model_pb2.Model(
        sha256=digest.hexdigest(),
        name=path.name,
        format=recognise.identify(path, path.name, kind, marks),
        size_bytes=size_bytes,
    )


def _absolute(path: Path) -> Path:
    """The worker runs in a folder of its own."""
    return path.absolute()


@contextlib.contextmanager
def _cancelling(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT end the run inside the context, and not the process."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
