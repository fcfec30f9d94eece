"""``boardbench suite``: many models on many boards, at once, by the clock, or as files come."""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import hashlib
import json
import os
import random
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from boardbench.cli import figures
from boardbench.cli.address import Address, CollectorType, ca_option
from boardbench.cli.collected import holder_option, retry_option, via_option
from boardbench.cli.errors import CliError, ExitCode, Unreachable, WrongUse, worst
from boardbench.cli.terminal import Output, output_from, output_options

if TYPE_CHECKING:
    from boardbench.cli.client import JobsClient
    from boardbench.cli.progress import Watched
    from boardbench.cli.suite_file import Case, Suite
    from boardbench.v1 import job_pb2

_EXAMPLES = """\b
Examples:
  boardbench suite check nightly.toml
  boardbench suite run nightly.toml --via lab.example
  boardbench suite watch nightly.toml --via lab.example
"""
_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
# The clock may be set, and a folder has no bell.
_LOOK_SECONDS = 1.0
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0


@click.group(epilog=_EXAMPLES)
def suite() -> None:
    """Run many models on many boards: at once, by the clock, as files come.

    A suite.toml says which models, runtimes, boards and scenarios; every combination is a case, and every
    case a job for each of its boards.
    """


def _case_option(command: Any) -> Any:
    return click.option(
        "--case",
        "patterns",
        multiple=True,
        metavar="PATTERN",
        help="Only cases whose name matches, * for anything. Repeatable.",
    )(command)


@suite.command()
@click.argument("path", metavar="FILE", type=_FILE)
@click.option(
    "--via",
    "collector",
    type=CollectorType(),
    help="Ask this collector which boards each case would get.",
)
@ca_option
@_case_option
@output_options
def check(path: Path, collector: Address | None, patterns: tuple[str, ...], **values: Any) -> ExitCode:
    """Say what a suite would run, and run nothing.

    With --format json: an array of objects with name, model, runtime, scenario, on, count and spec.
    """
    output = output_from(values)
    from boardbench.cli import suite_file
    from boardbench.cli.client import CollectorClient

    read = suite_file.read(path)
    cases = _chosen(read.cases, patterns, path)
    boards: dict[tuple[str, ...], int] = {}
    if collector is not None:
        with CollectorClient(collector) as client:
            for case in cases:
                if case.board.on not in boards:
                    boards[case.board.on] = len(client.devices(case.board.on))
    if output.json:
        from boardbench.cli.terminal import as_json

        listed: list[dict[str, Any]] = [
            {
                "name": case.name,
                "model": str(case.model),
                "runtime": case.runtime,
                "scenario": case.scenario,
                "on": list(case.board.on),
                "count": case.board.count,
                "require": list(case.require),
                "spec": as_json(case.spec.message()),
                **({"boards": boards[case.board.on]} if collector is not None else {}),
            }
            for case in cases
        ]
        click.echo(json.dumps(listed, indent=2))
    else:
        from boardbench.cli.tables import cases_table

        rows = [
            (
                case.model.name,
                case.runtime,
                case.scenario,
                f"{case.board.count or 'all'} of {','.join(case.board.on) or 'all boards'}",
                str(boards[case.board.on]) if collector is not None else "",
            )
            for case in cases
        ]
        output.show(cases_table(rows), table=True)
    if collector is None:
        return ExitCode.DONE
    lacking = [case for case in cases if boards[case.board.on] < max(1, case.board.count)]
    for case in lacking:
        output.complain(f"{case.name}: {_too_few(case, boards[case.board.on])}")
    return ExitCode.FAILED if lacking else ExitCode.DONE


def _too_few(case: Case, there: int) -> str:
    """Why a case would not be queued."""
    terms = ",".join(case.board.on)
    if not there:
        return f"no board meets {terms}" if terms else "the collector knows no board"
    of = f"{there} meets {terms}" if there == 1 else f"{there} meet {terms}"
    return f"{case.board.count} boards are asked for, and {of if terms else f'there is {there}'}"


@suite.command()
@click.argument("path", metavar="FILE", type=_FILE)
@_case_option
@click.option(
    "--id",
    "tick",
    default="",
    help="Name of this round: the same again queues nothing twice.  [default: a new one]",
)
@click.option("--detach", is_flag=True, help="Leave once the jobs are queued, and print their ids.")
@retry_option("the collector")
@holder_option
@via_option
@output_options
def run(
    path: Path,
    patterns: tuple[str, ...],
    tick: str,
    detach: bool,
    retry_for: float,
    holder: str,
    collector: Address,
    **values: Any,
) -> ExitCode:
    """Run a suite now, and show the results.

    The exit code is that of `push`: 1 when a run failed, a job was given up, no board met a case, or a
    result lacks what the suite requires. With --format json: an array of RunResult.
    """
    output = output_from(values)
    from boardbench.cli import suite_file, via
    from boardbench.cli.client import JobsClient
    from boardbench.cli.interrupt import Interrupt
    from boardbench.cli.progress import progress_for

    read = suite_file.read(path)
    cases = _chosen(read.cases, patterns, path)
    with (
        progress_for(output) as progress,
        JobsClient(collector, retry_seconds=retry_for, notice=progress.note) as client,
    ):
        with Interrupt(client.stop):
            queued = submit(client, read, cases, tick or uuid.uuid4().hex, holder, progress)
        with progress.paused():
            for name, error in queued.errors:
                output.complain(f"{name}: {error}")
            if detach:
                via.tell_queued(queued.jobs, output, collector)
        if detach or not queued.jobs:
            return worst([error.exit_code for _, error in queued.errors])
        follower = via.Follower(client, collector, queued.jobs, progress, output, owner=True)
        ended = follower.follow()
    code = via.conclude(
        ended,
        len(queued.jobs),
        output,
        (),
        interrupted=follower.interrupted,
        collector=collector,
        listed=True,
    )
    codes = [code, *(error.exit_code for _, error in queued.errors)]
    if not _hold(queued, ended, output):
        codes.append(ExitCode.FAILED)
    return worst(codes)


def _hold(queued: Queued, ended: Sequence[Any], output: Output) -> bool:
    """Whether the results hold what their cases require; says which do not."""
    from boardbench.cli.board import short_names
    from boardbench.cli.require import all_hold, parse

    boards = short_names(entry.result.board for entry in ended if entry.result is not None)
    held = True
    for entry in ended:
        texts = queued.require.get(entry.job.job_id, ())
        if texts and entry.result is not None:
            case = [entry.job.tags["case"]]
            held = all_hold(tuple(map(parse, texts)), [entry.result], output, case, boards) and held
    return held


@dataclass
class Queued:
    """What a round of a suite came to."""

    jobs: list[job_pb2.Job] = field(default_factory=list)
    errors: list[tuple[str, CliError]] = field(default_factory=list)
    """Name of the case, and why it was not queued."""
    require: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By the job's id."""


def submit(
    client: JobsClient, read: Suite, cases: Sequence[Case], tick: str, holder: str, progress: Watched
) -> Queued:
    """Queues the cases, every file sent once. Raises Unreachable, and Interrupted; refusals are collected."""
    from boardbench.cli import suite_file, via
    from boardbench.cli.errors import Interrupted
    from boardbench.cli.source import Source

    queued = Queued()
    sent: dict[Path, str | CliError] = {}

    def sha256_of(path: Path, *, inputs: bool = False) -> str:
        if path not in sent:
            try:
                with Source(path) as source:
                    sent[path] = via.send(client, source, progress, inputs=inputs).sha256
            except (Unreachable, Interrupted):
                raise
            except CliError as error:
                sent[path] = error
        found = sent[path]
        if isinstance(found, CliError):
            raise found
        return found

    for case in cases:
        try:
            inputs = case.spec.inputs or read.inputs
            inputs_sha256 = sha256_of(inputs, inputs=True) if inputs is not None else ""
            sha256 = sha256_of(case.model)
            choice = via.Choice(
                case.board.on,
                case.board.count,
                read.priority,
                holder,
                read.attempts,
                read.give_up_after,
                {"suite": read.name, "case": case.name},
            )
            jobs = client.submit(
                via.request_for(
                    sha256,
                    case.spec.message(inputs_sha256),
                    choice,
                    request_id=suite_file.request_id(read.name, case, sha256, inputs_sha256, tick),
                )
            )
            queued.jobs += jobs
            queued.require.update((job.job_id, case.require) for job in jobs)
        except (Unreachable, Interrupted):
            raise
        except CliError as error:
            queued.errors.append((case.name, error))
    return queued


def _chosen(cases: Sequence[Case], patterns: Sequence[str], path: Path) -> list[Case]:
    found = [
        case
        for case in cases
        if not patterns or any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)
    ]
    if cases and not found:
        raise WrongUse(f"{path} has no case that matches {' or '.join(patterns)}: `suite check` lists them")
    return found


@suite.command()
@click.argument("path", metavar="FILE", type=_FILE)
@click.option(
    "--state",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to remember what was queued.  [default: in the state folder of this user, by FILE]",
)
@click.option("--existing", is_flag=True, help="At the first start: queue what is in the folders already.")
@click.option("--once", is_flag=True, help="Queue what is due now, and leave.")
@holder_option
@via_option
@output_options
def watch(
    path: Path,
    state: Path | None,
    existing: bool,
    once: bool,
    holder: str,
    collector: Address,
    **values: Any,
) -> ExitCode:
    """Stay, and queue the suite by its schedule: by its cron expression, and when a new file has come.

    What was queued is remembered, so that a restart queues nothing twice; of rounds that were missed
    meanwhile the latest is made up for. The file is read again for every round. With --format json: an
    object a line, with suite, why, jobs and errors.
    """
    output = output_from(values)
    watching = Watching(path, state or _state_path(path), collector, holder, output, existing=existing)
    from boardbench.cli.interrupt import Interrupt

    with Interrupt(watching.stop):
        return watching.once() if once else watching.stay()


def _state_path(path: Path) -> Path:
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    return folder / "boardbench" / "suites" / f"{path.stem}-{digest}.json"


class Watching:
    """A suite by its schedule."""

    def __init__(
        self, path: Path, state: Path, collector: Address, holder: str, output: Output, *, existing: bool
    ) -> None:
        """Raises WrongUse when there is nothing to wait for, or the state can't be kept."""
        from boardbench.cli import suite_file
        from boardbench.cli.schedule import Folders

        self._path = path
        self._state_path = state
        self._collector = collector
        self._holder = holder
        self._output = output
        self._suite = suite_file.read(path)
        schedule = self._suite.schedule
        if not (schedule.cron or schedule.folders):
            raise WrongUse(f"{path} has no schedule: give [schedule] with cron or folders")
        self._folders = Folders(schedule.folders, schedule.settle_seconds)
        self._stop = threading.Event()
        self._complained = ""
        first = not state.exists()
        self._state = self._read_state()
        if first:
            self._state["tick"] = time.time()
            if not existing:
                settled = Folders(schedule.folders, 0.0)
                self._state["files"] = {str(path): list(mark) for path, mark in settled.whole({}).items()}
            self._save()

    def stop(self) -> None:
        """Ends :meth:`stay`."""
        self._stop.set()

    def stay(self) -> ExitCode:
        """Queues what is due, until it is stopped."""
        schedule = self._suite.schedule
        waits = [f"cron {schedule.cron}"] * bool(schedule.cron) + [str(path) for path in schedule.folders]
        click.echo(f"{self._suite.name}: waiting for {' and '.join(waits)}", err=True)
        failures = 0
        while not self._stop.is_set():
            try:
                self.look()
                failures, self._complained = 0, ""
                pause = _LOOK_SECONDS
            except CliError as error:
                if str(error) != self._complained:
                    self._complained = str(error)
                    self._output.complain(f"{error}; trying again")
                bound = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**failures)
                failures = min(failures + 1, 16)
                pause = _LOOK_SECONDS + bound * random.random()
            self._stop.wait(pause)
        return ExitCode.DONE

    def once(self) -> ExitCode:
        """Queues what is due now; files need to be seen twice to be known as whole."""
        code = self.look()
        if self._suite.schedule.folders and not self._stop.wait(self._suite.schedule.settle_seconds):
            code = worst([code, self.look()])
        return code

    def look(self) -> ExitCode:
        """Queues what is due now. Raises CliError when the collector can't be reached: then it stays due."""
        codes = [ExitCode.DONE]
        schedule = self._suite.schedule
        if schedule.cron:
            from boardbench.cli.schedule import latest_tick

            now = time.time()
            # A clock that was set back must not stop the schedule until it has caught up.
            since = min(self._state["tick"], now)
            tick = latest_tick(schedule.cron, schedule.timezone, now, since)
            if tick is not None:
                self._read_again()
                when = datetime.datetime.fromtimestamp(tick, datetime.timezone.utc)
                codes.append(self._submit(self._suite.cases, f"cron:{tick:.0f}", when.isoformat()))
                self._state["tick"] = tick
                self._save()
        for path, mark in self._folders.whole(self._state["files"]).items():
            self._read_again()
            codes.append(
                self._submit(self._suite.cases_for([path]), f"file:{path.name}:{mark[1]}", str(path))
            )
            self._state["files"][str(path)] = list(mark)
            self._save()
        return worst(codes)

    def _submit(self, cases: Sequence[Case], tick: str, why: str) -> ExitCode:
        from boardbench.cli.client import JobsClient
        from boardbench.cli.progress import Unwatched

        with JobsClient(self._collector, retry_seconds=0.0) as client:
            queued = submit(client, self._suite, cases, tick, self._holder, Unwatched())
        name = self._suite.name
        if self._output.json:
            from boardbench.cli.terminal import as_json

            told: Mapping[str, Any] = {
                "suite": name,
                "why": why,
                "jobs": [as_json(job) for job in queued.jobs],
                "errors": [{"case": case, "message": str(error)} for case, error in queued.errors],
            }
            click.echo(json.dumps(told))
        else:
            click.echo(f"{name}: {why}: {figures.plural(len(queued.jobs), 'job')} queued")
        for case, error in queued.errors:
            self._output.complain(f"{case}: {error}")
        return worst([error.exit_code for _, error in queued.errors])

    def _read_again(self) -> None:
        """Takes a changed file; one that is wrong is told, and the last one that was right stays."""
        from boardbench.cli import suite_file

        try:
            self._suite = suite_file.read(self._path)
        except CliError as error:
            self._output.complain(f"{error}; the suite stays as it was")

    def _read_state(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"tick": 0.0, "files": {}}
        try:
            found = json.loads(self._state_path.read_text())
            return {"tick": float(found["tick"]), "files": dict(found["files"])}
        except FileNotFoundError:
            return empty
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WrongUse(
                f"{self._state_path}: can't be read ({error}): mend it, or give another --state"
            ) from None

    def _save(self) -> None:
        there = {path: mark for path, mark in self._state["files"].items() if Path(path).exists()}
        self._state["files"] = there
        fresh = self._state_path.with_name(self._state_path.name + ".tmp")
        try:
            self._state_path.parent.mkdir(parents=True, exist_ok=True)
            with fresh.open("w") as file:
                json.dump(self._state, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._state_path)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise WrongUse(f"{self._state_path} can't be written: {error.strerror}: give --state") from None
