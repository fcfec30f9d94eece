"""Runs by way of the collector: a file goes there once, boards that meet the terms are chosen and run it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from boardbench.cli.address import Address
from boardbench.cli.errors import CliError, ExitCode, Interrupted, Refused, worst
from boardbench.cli.require import Requirement, all_hold
from boardbench.cli.terminal import Output
from boardbench.v1 import agent_pb2, collector_pb2, job_pb2, model_pb2, result_pb2

if TYPE_CHECKING:
    from boardbench.cli.client import JobsClient
    from boardbench.cli.progress import Watched
    from boardbench.cli.source import Source
    from boardbench.cli.spec import Spec


# Each is asked about by itself: a fleet has too many to ask about all.
_MOST_BOARDS = 50


@dataclass(frozen=True)
class Choice:
    """Which boards, and how a job waits for them."""

    on: Sequence[str]
    count: int = 0
    """0: all that meet the terms."""
    priority: int = 0
    holder: str = ""
    attempts: int = 0
    """0: the collector's default."""
    seconds: float | None = None
    """It is given up when it has not ended by then; None: the collector's default."""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """What became of a job: a result, or why there is none."""

    job: job_pb2.Job
    result: result_pb2.RunResult | None = None
    error: CliError | None = None


def submit(
    client: JobsClient,
    sources: Sequence[Source],
    inputs: Source | None,
    spec: Spec,
    choice: Choice,
    progress: Watched,
) -> list[job_pb2.Job]:
    """Queues the jobs, model by model; with a count, every model goes to the boards of the first.

    Raises CliError; then nothing is left queued.
    """
    jobs: list[job_pb2.Job] = []
    try:
        inputs_sha256 = send(client, inputs, progress, inputs=True).sha256 if inputs is not None else ""
        message = spec.message(inputs_sha256)
        for source in sources:
            sha256 = send(client, source, progress).sha256
            if choice.count and jobs:
                chosen = [
                    (f"device_id={device_id}",) for device_id in dict.fromkeys(j.device_id for j in jobs)
                ]
                for terms in chosen:
                    jobs += client.submit(request_for(sha256, message, choice, on=terms, count=0))
            else:
                jobs += client.submit(request_for(sha256, message, choice))
    except CliError:
        if jobs:
            with contextlib.suppress(CliError):
                client.cancel(job_pb2.JobFilter(job_ids=[job.job_id for job in jobs]))
        raise
    return jobs


def send(client: JobsClient, source: Source, progress: Watched, *, inputs: bool = False) -> model_pb2.Model:
    """The file as the collector has it from then on."""
    kind = agent_pb2.FILE_KIND_INPUTS if inputs else agent_pb2.FILE_KIND_MODEL
    try:
        done = client.push(source, kind, lambda sent: progress.sending(source.name, sent, source.size_bytes))
        return done.model
    finally:
        progress.ended(source.name)


def request_for(
    sha256: str,
    spec: result_pb2.BenchmarkSpec,
    choice: Choice,
    *,
    on: Sequence[str] | None = None,
    count: int | None = None,
    request_id: str = "",
) -> job_pb2.SubmitJobsRequest:
    """What the collector is asked for."""
    return job_pb2.SubmitJobsRequest(
        request_id=request_id or uuid.uuid4().hex,
        on=choice.on if on is None else on,
        count=choice.count if count is None else count,
        model_sha256=sha256,
        spec=spec,
        priority=choice.priority,
        holder=choice.holder,
        max_attempts=choice.attempts,
        timeout_seconds=choice.seconds,
        tags=dict(choice.tags),
    )


def obstacles(collector: Address, jobs: Sequence[job_pb2.Job]) -> dict[str, str]:
    """What jobs wait for that may last, by their ids: boards that are away, or that others have.

    Empty where the collector does not say.
    """
    from boardbench.cli.client import CollectorClient
    from boardbench.cli.plain import cleaned

    waiting = [job for job in jobs if job.state == job_pb2.JOB_STATE_QUEUED]
    boards = list(dict.fromkeys(job.device_id for job in waiting))[:_MOST_BOARDS]
    known: dict[str, collector_pb2.Device] = {}
    with contextlib.suppress(CliError), CollectorClient(collector) as client:
        for device_id in boards:
            for device in client.devices((f"device_id={device_id}",)):
                known[device.board.device_id] = cleaned(device)
    found = {}
    for job in waiting:
        if job.device_id not in known:
            continue
        device = known[job.device_id]
        if not device.up:
            found[job.job_id] = "its board is not connected"
        elif device.HasField("reservation") and device.reservation.holder != job.holder:
            why = f" ({device.reservation.reason})" if device.reservation.reason else ""
            found[job.job_id] = f"{device.reservation.holder} has reserved the board{why}"
    return found


def tell_obstacles(collector: Address, jobs: Sequence[job_pb2.Job], output: Output) -> None:
    """Says which of the jobs that are to be followed may wait for long, also where nobody watches."""
    found = obstacles(collector, jobs)
    for job in jobs:
        if job.job_id in found:
            output.complain(f"{job.device_id}: job {job.job_id[:8]} waits: {found[job.job_id]}")


class Follower:
    """Follows jobs to their ends, a line each for whoever watches; Ctrl-C cancels them."""

    def __init__(
        self,
        client: JobsClient,
        collector: Address,
        jobs: Sequence[job_pb2.Job],
        progress: Watched,
        output: Output,
        *,
        owner: bool,
    ) -> None:
        """``owner``: whether Ctrl-C cancels the jobs, instead of only leaving."""
        self._client = client
        self._collector = collector
        self._latest = {job.job_id: job for job in jobs}
        self._several = len({job.model.sha256 for job in jobs}) > 1
        self._progress = progress
        self._output = output
        self._owner = owner
        self._ended: dict[str, Ended] = {}
        self.interrupted = False

    def follow(self) -> list[Ended]:
        """What became of each, in the order that they were given in; those that were not awaited lack."""
        from boardbench.cli.interrupt import Interrupt

        filters = job_pb2.JobFilter(job_ids=self._latest)
        with self._progress.paused():
            tell_obstacles(self._collector, list(self._latest.values()), self._output)
        with Interrupt(self._politely) as interrupt:
            try:
                with contextlib.closing(self._client.watch(filters)) as changes:
                    for job in changes:
                        self._changed(job)
                        if len(self._ended) == len(self._latest):
                            break
            except Interrupted:
                pass
            except KeyboardInterrupt:
                self._output.complain(
                    f"left before all jobs had ended; follow them with: {self._how_to_follow()}"
                )
        self.interrupted = interrupt.happened
        return [self._ended[job_id] for job_id in self._latest if job_id in self._ended]

    def _politely(self) -> None:
        if not self._owner:
            self._client.stop()
            return
        self._progress.note("Cancelling the jobs; Ctrl-C again leaves at once")
        open_ids = [job_id for job_id in self._latest if job_id not in self._ended]
        try:
            self._client.cancel(job_pb2.JobFilter(job_ids=open_ids))
        except (CliError, ValueError) as error:  # ValueError: gRPC's word for a channel that is closed
            self._output.complain(f"the jobs could not be cancelled and go on: {error}")
            self._client.stop()

    def _how_to_follow(self) -> str:
        batches = {job.batch_id for job in self._latest.values()}
        which = f"--batch {batches.pop()}" if len(batches) == 1 else " ".join(i[:8] for i in self._latest)
        return f"boardbench jobs watch {which} --via {self._collector}"

    def _label(self, job: job_pb2.Job) -> str:
        name = job.tags.get("case", "") or (job.model.name if self._several else "")
        return f"{name} → {job.device_id}" if name else job.device_id

    def _changed(self, job: job_pb2.Job) -> None:
        from boardbench.cli.client import ENDED_STATES

        self._latest[job.job_id] = job
        label = self._label(job)
        if job.state not in ENDED_STATES:
            self._progress.doing(label, words(job))
            return
        self._progress.ended(label)
        if job.job_id not in self._ended:
            self._ended[job.job_id] = ended = self._end(job)
            with self._progress.paused():
                self._tell(ended, label)

    def _end(self, job: job_pb2.Job) -> Ended:
        from boardbench.cli.client import CollectorClient

        if job.state == job_pb2.JOB_STATE_DONE:
            try:
                with CollectorClient(self._collector) as client:
                    return Ended(job, result=client.result(job.run_id))
            except CliError as error:
                return Ended(job, error=error)
        what = "was cancelled" if job.state == job_pb2.JOB_STATE_CANCELLED else "was given up"
        # A cancellation without a reason says just that.
        why = "" if what in job.reason else f": {job.reason or 'nobody said why'}"
        return Ended(job, error=Refused(f"job {job.job_id[:8]} {what}{why}"))

    def _tell(self, ended: Ended, label: str) -> None:
        if ended.error is not None:
            self._output.complain(f"{label}: {ended.error}")
        elif len(self._latest) > 1 and ended.result is not None:
            result = ended.result
            status = result_pb2.RunStatus.Name(result.status).removeprefix("RUN_STATUS_").lower()
            why = f": {result.error.code}: {result.error.message}" if result.error.code else ""
            self._output.note(f"{label}: {status}{why}")


def conclude(
    ended: Sequence[Ended],
    expected: int,
    output: Output,
    require: tuple[Requirement, ...],
    *,
    interrupted: bool,
    collector: Address,
    listed: bool = False,
) -> ExitCode:
    """The exit code, after the results as a page, a table or JSON; one that is ``listed`` is a table, too."""
    from boardbench.cli.answer import answer, exit_code

    results = [entry.result for entry in ended if entry.result is not None]
    if output.json:
        if expected > 1 or listed:
            output.show_json(results)
        elif results:
            output.show_json(results[0])
    elif len(results) == 1 and expected == 1 and not listed:
        more = f"boardbench show {results[0].run_id[:24]} --collector {collector}"
        answer(results[0], output, more=more)
    elif results:
        from boardbench.cli.tables import comparison_table

        cases = [entry.job.tags.get("case", "") for entry in ended if entry.result is not None]
        output.show(comparison_table(results, cases if all(cases) else ()), table=True)
    codes = [entry.error.exit_code if entry.error else ExitCode.DONE for entry in ended]
    codes += [exit_code(result) for result in results]
    if len(ended) < expected:
        codes.append(ExitCode.FAILED)
    if not all_hold(require, results, output):
        codes.append(ExitCode.FAILED)
    if interrupted:
        output.complain("interrupted")
        codes.append(ExitCode.INTERRUPTED)
    return worst(codes)


def tell_queued(jobs: Sequence[job_pb2.Job], output: Output, collector: Address) -> None:
    """Says what was queued, for whoever leaves."""
    if output.json:
        output.show_json(list(jobs))
        return
    for job in jobs:
        click.echo(job.job_id)
    batches = list(dict.fromkeys(job.batch_id for job in jobs))
    for batch in batches:
        output.note(f"follow them with: boardbench jobs watch --batch {batch} --via {collector}")


_STATES = {
    job_pb2.JOB_STATE_QUEUED: "waiting for the board",
    job_pb2.JOB_STATE_LEASED: "the board has it",
    job_pb2.JOB_STATE_RUNNING: "running",
    job_pb2.JOB_STATE_DONE: "done",
    job_pb2.JOB_STATE_CANCELLED: "cancelled",
    job_pb2.JOB_STATE_DEAD: "given up",
}


def words(job: job_pb2.Job) -> str:
    """How far the job is, for a person."""
    text = job.progress or _STATES.get(job.state, "in an unknown state")
    if job.state == job_pb2.JOB_STATE_QUEUED:
        again = " again" if job.attempts else ""
        return f"{_STATES[job.state]}{again}" + (f" ({job.reason})" if job.reason else "")
    return text
