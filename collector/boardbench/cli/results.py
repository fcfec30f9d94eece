"""``boardbench results`` and ``show``: what the collector keeps."""

from __future__ import annotations

import dataclasses
import datetime
import re
from typing import TYPE_CHECKING, Any

import click

from boardbench.cli.address import Address
from boardbench.cli.collected import collector_option
from boardbench.cli.errors import ExitCode
from boardbench.cli.require import Requirement, all_hold, require_option
from boardbench.cli.spec import Count
from boardbench.cli.terminal import output_from, output_options

if TYPE_CHECKING:
    _MomentParameter = click.ParamType[datetime.datetime]
else:
    _MomentParameter = click.ParamType  # generic only from click 8.2 on

_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_STATUSES = ("succeeded", "failed", "cancelled")


class Moment(_MomentParameter):
    """Reads a point in time: a date, a date and time, or how long ago (``90m``, ``12h``, ``3d``)."""

    name = "TIME"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime.datetime:
        """The time, with its zone (this machine's where none is written); fails with a usage error."""
        text = str(value).strip()
        ago = re.fullmatch(r"(\d{1,9})([smhdw])", text)
        try:
            if ago:
                span = datetime.timedelta(seconds=int(ago[1]) * _SPANS[ago[2]])
                return datetime.datetime.now(datetime.timezone.utc) - span
            # Python 3.10 does not read the Z that everybody writes.
            return datetime.datetime.fromisoformat(re.sub(r"Z$", "+00:00", text)).astimezone()
        except (ValueError, OverflowError):
            self.fail(
                f"{text!r} is not a time: give 2026-01-31, 2026-01-31T12:00, or an age as in 12h or 3d",
                param,
                ctx,
            )


@click.command()
@click.option("--device", default="", metavar="ID", help="Only of this board, by its identity.")
@click.option(
    "--model",
    default="",
    metavar="MODEL",
    help="Only of this model: its name, its SHA-256, or the first digits of that.",
)
@click.option("--runtime", default="", help="Only with this engine.")
@click.option("--status", type=click.Choice(_STATUSES), help="Only with this ending.")
@click.option(
    "--since", type=Moment(), help="Only runs that ended then or later: a date, a time, or an age (12h, 3d)."
)
@click.option("--limit", type=Count(1, 100_000), default=20, show_default=True, help="At most so many.")
@click.option("--summary", is_flag=True, help="With --format json: leave out raw samples and per-op lists.")
@collector_option
@output_options
def results(
    device: str,
    model: str,
    runtime: str,
    status: str | None,
    since: datetime.datetime | None,
    limit: int,
    summary: bool,
    collector: Address,
    **values: Any,
) -> ExitCode:
    """List the results that the collector keeps.

    The latest comes first. With --format json: an array of RunResult.
    """
    output = output_from(values)
    from boardbench.cli.client import CollectorClient
    from boardbench.cli.tables import results_table
    from boardbench.v1 import result_pb2

    with CollectorClient(collector) as client:
        found = list(
            client.results(
                limit=limit,
                device_id=device,
                model=model,
                runtime=runtime,
                status=result_pb2.RunStatus.Value(f"RUN_STATUS_{(status or 'unspecified').upper()}"),
                since=since,
                summary=summary or not output.json,
            )
        )
    if output.json:
        output.show_json(found)
    elif found:
        output.show(results_table(found), table=True)
    else:
        output.note(f"the collector at {collector} has no such results")
    return ExitCode.DONE


@click.command()
@click.argument("run_id", metavar="RUN")
@require_option()
@collector_option
@output_options
def show(run_id: str, require: tuple[Requirement, ...], collector: Address, **values: Any) -> ExitCode:
    """Show one result of the collector, whole.

    RUN is the id of the run or the first digits of it. Every op, tensor and circumstance is shown. The exit
    code says whether the result was found and holds what was required, not how the run ended. With --format
    json: the RunResult.
    """
    output = dataclasses.replace(output_from(values), full=True)
    from boardbench.cli.answer import answer
    from boardbench.cli.client import CollectorClient

    with CollectorClient(collector) as client:
        result = client.result(run_id)
    answer(result, output)
    return ExitCode.DONE if all_hold(require, [result], output) else ExitCode.FAILED
