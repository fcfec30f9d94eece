"""``boardbench jobs``: what waits for boards at a collector, what runs, and what was given up."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from boardbench.cli.address import Address
from boardbench.cli.collected import retry_option, via_option
from boardbench.cli.errors import ExitCode
from boardbench.cli.require_option import require_option
from boardbench.cli.spec import Count
from boardbench.cli.terminal import Output, full_option, output_from, output_options

if TYPE_CHECKING:
    from boardbench.cli.require import Requirement
    from boardbench.v1 import job_pb2

_Command = TypeVar("_Command", bound=Callable[..., Any])

_STATES = ("queued", "leased", "running", "done", "cancelled", "dead")
_OPEN = ("queued", "leased", "running")
_DIGITS = re.compile("[0-9A-Fa-f]+")


def _which(command: _Command) -> _Command:
    """Adds what chooses jobs; :func:`_filter` reads it."""
    for option in reversed(
        (
            click.argument("job_ids", metavar="[JOB]...", nargs=-1),
            click.option("--batch", default="", metavar="ID", help="Those that were submitted together."),
            click.option("--device", default="", metavar="ID", help="Only of this board, by its device_id."),
        )
    ):
        command = option(command)
    return command


def _filter(job_ids: tuple[str, ...], batch: str, device: str, states: tuple[str, ...]) -> job_pb2.JobFilter:
    from boardbench.v1 import job_pb2

    return job_pb2.JobFilter(
        job_ids=[job_id.lower() for job_id in job_ids],
        batch_id=batch,
        device_id=device,
        states=[job_pb2.JobState.Value(f"JOB_STATE_{state.upper()}") for state in states],
    )


class _Listed(click.Group):
    """A group that lists when no subcommand is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Like click's, with `list` for whoever gives options or the id of a job only."""
        first = args[0] if args else "-"
        is_id = first not in self.commands and _DIGITS.fullmatch(first) is not None
        if is_id or (first.startswith("-") and first not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Listed)
def jobs() -> None:
    """List, follow, cancel or retry the jobs of a collector.

    A job is a run that a collector hands to a board: see `boardbench push --via`. Without a subcommand:
    `jobs list`.
    """


@jobs.command("list")
@_which
@click.option(
    "--state", "states", multiple=True, type=click.Choice(_STATES), help="Only in this state. Repeatable."
)
@click.option("--open", "is_open", is_flag=True, help="Only those that have not ended.")
@click.option("--limit", type=Count(1, 100_000), default=50, show_default=True, help="At most so many.")
@via_option
@output_options
def list_jobs(
    job_ids: tuple[str, ...],
    batch: str,
    device: str,
    states: tuple[str, ...],
    is_open: bool,
    limit: int,
    collector: Address,
    **values: Any,
) -> ExitCode:
    """List jobs, the latest first.

    JOB is the id of a job or the first digits of it. With --format json: an array of Job.
    """
    output = output_from(values)
    if is_open and states:
        raise click.UsageError("--open means --state queued, leased and running: leave one of them out")
    from boardbench.cli.client import JobsClient

    with JobsClient(collector) as client:
        found = list(client.jobs(_filter(job_ids, batch, device, _OPEN if is_open else states), limit))
    _show(found, output, f"the collector at {collector} has no such jobs", collector)
    return ExitCode.DONE


def _show(found: list[job_pb2.Job], output: Output, none: str, collector: Address | None = None) -> None:
    from boardbench.cli import via
    from boardbench.cli.tables import jobs_table

    if output.json:
        output.show_json(found)
    elif found:
        waits = via.obstacles(collector, found) if collector is not None else {}
        output.show(jobs_table(found, waits), table=True)
    else:
        output.note(none)


@jobs.command("watch")
@_which
@retry_option("the collector")
@require_option()
@via_option
@full_option
@output_options
def watch(
    job_ids: tuple[str, ...],
    batch: str,
    device: str,
    retry_for: float,
    require: tuple[Requirement, ...],
    collector: Address,
    **values: Any,
) -> ExitCode:
    """Follow jobs to their ends, and show their results.

    JOB is the id of a job or the first digits of it; without any, and without --batch, all that have not
    ended. Ctrl-C leaves; the jobs go on. With --format json: the RunResult of one job, an array for several.
    """
    output = output_from(values)
    from boardbench.cli import via
    from boardbench.cli.client import JobsClient
    from boardbench.cli.progress import progress_for

    with (
        progress_for(output) as progress,
        JobsClient(collector, retry_seconds=retry_for, notice=progress.note) as client,
    ):
        named = bool(job_ids or batch)
        found = list(client.jobs(_filter(job_ids, batch, device, () if named else _OPEN)))[::-1]
        if found:
            follower = via.Follower(client, collector, found, progress, output, owner=False)
            ended = follower.follow()
    if not found:
        _show([], output, f"the collector at {collector} has no such jobs")
        return ExitCode.FAILED if named else ExitCode.DONE
    return via.conclude(
        ended, len(found), output, require, interrupted=follower.interrupted, collector=collector
    )


@jobs.command("cancel")
@_which
@via_option
@output_options
def cancel(job_ids: tuple[str, ...], batch: str, device: str, collector: Address, **values: Any) -> ExitCode:
    """End jobs, waiting or running.

    JOB is the id of a job or the first digits of it. Those that have ended already are no error. With
    --format json: an array of the Jobs that had not.
    """
    output = output_from(values)
    _need(job_ids, batch, device)
    from boardbench.cli.client import JobsClient

    with JobsClient(collector) as client:
        found = client.cancel(_filter(job_ids, batch, device, ()))
    _show(found, output, "they had all ended before")
    return ExitCode.DONE


@jobs.command("retry")
@_which
@via_option
@output_options
def retry(job_ids: tuple[str, ...], batch: str, device: str, collector: Address, **values: Any) -> ExitCode:
    """Queue jobs again that were given up.

    JOB is the id of a job or the first digits of it. With --format json: an array of the Jobs.
    """
    output = output_from(values)
    _need(job_ids, batch, device)
    from boardbench.cli.client import JobsClient

    with JobsClient(collector) as client:
        found = client.retry(_filter(job_ids, batch, device, ()))
    _show(found, output, "none of them was given up")
    return ExitCode.DONE


def _need(job_ids: tuple[str, ...], batch: str, device: str) -> None:
    if not (job_ids or batch or device):
        raise click.UsageError("which jobs? Give their ids, --batch or --device")
