"""``boardbench runs``, ``watch`` and ``cancel``: what a board is doing."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from boardbench.cli.address import Address
from boardbench.cli.board import board_option, run_id_on
from boardbench.cli.collected import retry_option
from boardbench.cli.errors import ExitCode
from boardbench.cli.require import Requirement, all_hold, require_option
from boardbench.cli.terminal import full_option, output_from, output_options


@click.command()
@board_option
@output_options
def runs(address: Address, **values: Any) -> ExitCode:
    """List the runs of a board.

    The running one first, then those that wait, then those that ended. With --format json: an array of
    RunSummary.
    """
    output = output_from(values)
    from boardbench.cli.client import AgentClient
    from boardbench.cli.tables import runs_table

    with AgentClient(address) as client:
        found = client.list_runs()
    if output.json:
        output.show_json(found)
    elif found:
        output.show(runs_table(found), table=True)
    else:
        output.note(f"no runs on {address}")
    return ExitCode.DONE


@click.command()
@click.argument("run_id", metavar="RUN")
@board_option
@retry_option("the board")
@require_option()
@full_option
@output_options
def watch(
    run_id: str, address: Address, retry_for: float, require: tuple[Requirement, ...], **values: Any
) -> ExitCode:
    """Follow a run on a board to its result.

    RUN is the id of the run or the first digits of it. Ctrl-C leaves; the run goes on. With --format json:
    the RunResult.
    """
    output = output_from(values)
    from boardbench.cli.answer import answer
    from boardbench.cli.client import AgentClient
    from boardbench.cli.interrupt import Interrupt
    from boardbench.cli.progress import progress_for

    with (
        progress_for(output) as progress,
        AgentClient(address, retry_seconds=retry_for, notice=progress.note) as client,
    ):
        whole = run_id_on(client, run_id)
        with Interrupt(client.stop), contextlib.closing(client.watch(whole)) as events:
            for event in events:
                progress.happened(whole[:8], event)
                if event.HasField("result"):
                    result = event.result
    code = answer(result, output, more="--full shows all")
    return code if all_hold(require, [result], output) else ExitCode.FAILED


@click.command()
@click.argument("run_id", metavar="RUN")
@board_option
@click.option("-q", "--quiet", is_flag=True, help="No notes on stderr; errors still.")
def cancel(run_id: str, address: Address, quiet: bool) -> ExitCode:
    """End a run on a board, waiting or running.

    RUN is the id of the run or the first digits of it. A run that has ended already is no error.
    """
    from boardbench.cli.client import AgentClient

    with AgentClient(address) as client:
        whole = run_id_on(client, run_id)
        cancelled = client.cancel(whole)
    if not quiet:
        click.echo(f"{whole} {'is cancelled' if cancelled else 'had ended before'}", err=True)
    return ExitCode.DONE
