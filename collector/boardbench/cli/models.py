"""``boardbench models``: the files that a board keeps."""

from __future__ import annotations

from typing import Any

import click

from boardbench.cli.address import Address
from boardbench.cli.board import board_option, the_one
from boardbench.cli.errors import CliError, ExitCode, worst
from boardbench.cli.terminal import output_from, output_options

_EXAMPLES = """\b
Examples:
  boardbench models list --to raspberrypi.local
  boardbench models rm 3f2a9c --to raspberrypi.local
"""


@click.group(epilog=_EXAMPLES, invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> ExitCode | None:
    """List or delete the files that a board keeps."""
    if context.invoked_subcommand is None:
        raise click.UsageError(
            "say what to do: `boardbench models list --to HOST` or `boardbench models rm …`"
        )
    return None


@models.command("list")
@board_option
@output_options
def list_models(address: Address, **values: Any) -> ExitCode:
    """List the files that a board keeps, the one used last first.

    With --format json: an array of StoredModel.
    """
    output = output_from(values)
    from boardbench.cli.client import AgentClient
    from boardbench.cli.tables import models_table

    with AgentClient(address) as client:
        found = client.list_models()
    if output.json:
        output.show_json(found)
    elif found:
        output.show(models_table(found), table=True)
    else:
        output.note(f"no files on {address}")
    return ExitCode.DONE


@models.command("rm")
@click.argument("names", metavar="SHA256...", nargs=-1, required=True)
@board_option
@click.option("-q", "--quiet", is_flag=True, help="No notes on stderr; errors still.")
def remove(names: tuple[str, ...], address: Address, quiet: bool) -> ExitCode:
    """Delete files from a board.

    Each is named by its SHA-256, the first digits of it, or its file name when only one file has it. A file
    that a waiting or running job needs stays.
    """
    from boardbench.cli.client import AgentClient

    codes = [ExitCode.DONE]
    with AgentClient(address) as client:
        stored = client.list_models()
        for name in names:
            named = [entry.model.sha256 for entry in stored if entry.model.name == name]
            try:
                sha256 = (
                    named[0]
                    if len(named) == 1
                    else the_one(name, (entry.model.sha256 for entry in stored), "model", str(address))
                )
                client.delete_model(sha256)
            except CliError as error:
                click.echo(f"boardbench: {error}", err=True)
                codes.append(error.exit_code)
            else:
                if not quiet:
                    click.echo(f"{sha256} is deleted", err=True)
    return worst(codes)
