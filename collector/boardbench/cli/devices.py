"""``boardbench devices``: which boards there are, and what each can run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from boardbench.cli import updates
from boardbench.cli.address import AGENT_PORT, Address, AddressType
from boardbench.cli.collected import holder_option, on_option, pairs, via_option
from boardbench.cli.errors import CliError, ExitCode, worst
from boardbench.cli.spec import Count, Seconds
from boardbench.cli.terminal import Output, output_from, output_options

if TYPE_CHECKING:
    from boardbench.v1 import job_pb2


@click.group(invoke_without_command=True)
@click.option(
    "--to",
    "boards",
    multiple=True,
    type=AddressType(AGENT_PORT),
    help="Ask this board itself, instead of the collector. Repeatable.",
)
@on_option("Only boards that meet these.")
@click.option("--full", is_flag=True, help="A page a board, with every runtime and why it can't run.")
@via_option
@output_options
@click.pass_context
def devices(
    context: click.Context,
    /,
    boards: tuple[Address, ...],
    on: tuple[str, ...],
    collector: Address,
    **values: Any,
) -> ExitCode | None:
    """List boards and what they can run; reserve, label and update them.

    Without --to: every board that ever reported to the collector; --full says of each all that is known.
    With --to: what a board says about itself, with every runtime and, for those that can't run, why not and
    what to do.

    With --format json: an array of Device; with --to the DescribeResponse of one board, an array for several.
    """
    if context.invoked_subcommand is not None:
        _leave_to(context, context.invoked_subcommand)
        return None
    output = output_from(values)
    if boards and on:
        raise click.UsageError("--on chooses among the boards of a collector: leave --to out")
    if boards:
        return _describe(list(dict.fromkeys(boards)), output)
    from boardbench.cli.client import CollectorClient
    from boardbench.cli.tables import device_page, devices_table

    with CollectorClient(collector) as client:
        found = client.devices(on)
    if output.json:
        output.show_json(found)
    elif found and output.full:
        for device in found:
            output.show(device_page(device))
    elif found:
        output.show(devices_table(found), table=True)
    elif on:
        output.note(f"no board of the collector at {collector} meets {', '.join(on)}")
    else:
        hint = (
            " (BOARDBENCH_AGENT is for --to of other commands)" if os.environ.get("BOARDBENCH_AGENT") else ""
        )
        output.note(
            f"no board has reported to the collector at {collector}; ask one itself with --to HOST{hint}"
        )
    return ExitCode.DONE


def _leave_to(context: click.Context, command: str) -> None:
    """Returns when the subcommand was given all options: one before it would not reach it, unseen."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[0]} stands before {command!r}, which would not see it: write it behind"
            )


def _describe(boards: list[Address], output: Output) -> ExitCode:
    from boardbench.cli.client import AgentClient
    from boardbench.cli.tables import board_page

    answers = []
    codes = [ExitCode.DONE]
    for address in boards:
        try:
            with AgentClient(address) as client:
                described = client.describe()
        except CliError as error:
            output.complain(str(error))
            codes.append(error.exit_code)
            continue
        answers.append(described)
        if not output.json:
            output.show(board_page(str(address), described))
    if output.json and len(boards) > 1:
        output.show_json(answers)
    elif output.json and answers:
        output.show_json(answers[0])
    return worst(codes)


@devices.command()
@on_option("Which boards.")
@click.option("--count", type=Count(1, 100_000), help="So many of them that nobody has.  [default: all]")
@click.option(
    "--for",
    "seconds",
    type=Seconds(zero=False),
    default=3600.0,
    show_default=True,
    help="For so long; then they are free again.",
)
@click.option("--reason", default="", help="What for, in words that others see.")
@holder_option
@via_option
@output_options
def reserve(
    on: tuple[str, ...],
    count: int | None,
    seconds: float,
    reason: str,
    holder: str,
    collector: Address,
    **values: Any,
) -> ExitCode:
    """Take boards for yourself: only your jobs are handed to them.

    Runs of others that go on are not ended. With --format json: an array of Reservation.
    """
    output = output_from(values)
    _need_terms(on)
    from boardbench.cli.client import JobsClient
    from boardbench.v1 import job_pb2

    request = job_pb2.ReserveRequest(on=on, count=count or 0, holder=holder, reason=reason, seconds=seconds)
    with JobsClient(collector) as client:
        found = client.reserve(request)
    _show_reservations(found, output, "no board was taken")
    return ExitCode.DONE


@devices.command()
@on_option("Which boards.  [default: all that you have]")
@click.option("--force", is_flag=True, help="Take them away from whoever has them.")
@holder_option
@via_option
@output_options
def release(on: tuple[str, ...], force: bool, holder: str, collector: Address, **values: Any) -> ExitCode:
    """Give boards back.

    With --format json: an array of the Reservations that ended.
    """
    output = output_from(values)
    if force:
        _need_terms(on)
    from boardbench.cli.client import JobsClient
    from boardbench.v1 import job_pb2

    with JobsClient(collector) as client:
        found = client.release(job_pb2.ReleaseRequest(on=on, holder=holder, force=force))
    _show_reservations(found, output, f"{holder} had none of them", ended=True)
    return ExitCode.DONE


def _show_reservations(
    found: list[job_pb2.Reservation], output: Output, none: str, *, ended: bool = False
) -> None:
    from boardbench.cli.tables import reservations_table

    if output.json:
        output.show_json(found)
    elif found:
        output.show(reservations_table(found, ended=ended), table=True)
    else:
        output.note(none)


@devices.command()
@click.argument("labels", metavar="NAME=VALUE...", nargs=-1, required=True, callback=pairs)
@on_option("Which boards.")
@via_option
@output_options
def label(labels: dict[str, str], on: tuple[str, ...], collector: Address, **values: Any) -> ExitCode:
    """Label boards, for --on of other commands; NAME= removes the label.

    Your labels go before those that the boards' agents are configured with. Prints the boards, one a line;
    with --format json: a SetLabelsResponse.
    """
    output = output_from(values)
    _need_terms(on)
    from boardbench.cli.client import JobsClient
    from boardbench.v1 import job_pb2

    with JobsClient(collector) as client:
        found = client.label(on, labels)
    if output.json:
        output.show_json(job_pb2.SetLabelsResponse(device_ids=found))
        return ExitCode.DONE
    for device_id in found:
        click.echo(device_id)
    output.note(f"{len(found)} labelled")
    return ExitCode.DONE


for _command in (updates.update, updates.updates, updates.stop_update):
    devices.add_command(_command)


def _need_terms(on: tuple[str, ...]) -> None:
    if not on:
        raise click.UsageError("which boards? Give --on TERMS; --on device_id=* means all")
