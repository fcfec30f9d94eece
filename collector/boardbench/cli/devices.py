"""``boardbench devices``: which boards there are, and what each can run."""

from __future__ import annotations

import os
from typing import Any

import click

from boardbench.cli.address import AGENT_PORT, Address, AddressType
from boardbench.cli.collected import collector_option
from boardbench.cli.errors import CliError, ExitCode, worst
from boardbench.cli.terminal import Output, output_from, output_options


@click.command()
@click.option(
    "--to",
    "boards",
    multiple=True,
    type=AddressType(AGENT_PORT),
    help="Ask this board itself, instead of the collector. Repeatable.",
)
@collector_option
@output_options
def devices(boards: tuple[Address, ...], collector: Address, **values: Any) -> ExitCode:
    """List boards and what they can run.

    Without --to: every board that ever reported to the collector. With --to: what a board says about
    itself, with every runtime and, for those that can't run, why not and what to do.

    With --format json: an array of Device; with --to the DescribeResponse of one board, an array for several.
    """
    output = output_from(values)
    if boards:
        return _describe(list(dict.fromkeys(boards)), output)
    from boardbench.cli.client import CollectorClient
    from boardbench.cli.tables import devices_table

    with CollectorClient(collector) as client:
        found = client.devices()
    if output.json:
        output.show_json(found)
    elif found:
        output.show(devices_table(found), table=True)
    else:
        hint = (
            " (BOARDBENCH_AGENT is for --to of other commands)" if os.environ.get("BOARDBENCH_AGENT") else ""
        )
        output.note(
            f"no board has reported to the collector at {collector}; ask one itself with --to HOST{hint}"
        )
    return ExitCode.DONE


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
