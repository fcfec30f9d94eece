"""``boardbench models``: the files that a board keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from boardbench.cli.address import AGENT_PORT, Address, AddressType
from boardbench.cli.board import the_one
from boardbench.cli.errors import CliError, ExitCode, worst
from boardbench.cli.terminal import output_from, output_options

if TYPE_CHECKING:
    from boardbench.cli.client import AgentClient
    from boardbench.v1 import agent_pb2

_EXAMPLES = """\b
Examples:
  boardbench models --to raspberrypi.local
  boardbench models rm 3f2a9c --to raspberrypi.local
"""

# Before or after the name of the sub-command: people write both.
_board_option = click.option(
    "--to",
    "address",
    envvar="BOARDBENCH_AGENT",
    type=AddressType(AGENT_PORT),
    help=f"The board; port {AGENT_PORT} when none is given.",
)


@click.group(epilog=_EXAMPLES, invoke_without_command=True)
@_board_option
@output_options
@click.pass_context
def models(context: click.Context, /, address: Address | None, **values: Any) -> ExitCode | None:
    """List or delete the files that a board keeps.

    Without a sub-command: the files, the one used last first. With --format json: an array of StoredModel.
    """
    if context.invoked_subcommand is not None:
        context.obj = address
        return None
    address = _needed(address)
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
@_board_option
@click.option("-q", "--quiet", is_flag=True, help="No notes on stderr; errors still.")
@click.pass_obj
def remove(
    before: Address | None, /, names: tuple[str, ...], address: Address | None, quiet: bool
) -> ExitCode:
    """Delete files from a board.

    Each is named by its SHA-256, the first digits of it, or its file name when only one file has it. A file
    that a waiting or running job needs stays.
    """
    address = _needed(address or before)
    from boardbench.cli.client import AgentClient

    with AgentClient(address) as client:
        stored = client.list_models()
        return worst([_delete(client, name, stored, quiet) for name in names])


def _delete(client: AgentClient, name: str, stored: list[agent_pb2.StoredModel], quiet: bool) -> ExitCode:
    try:
        sha256 = _named(name, stored, str(client.address))
        client.delete_model(sha256)
    except CliError as error:
        click.echo(f"boardbench: {error}", err=True)
        return error.exit_code
    if not quiet:
        click.echo(f"{sha256} is deleted", err=True)
    return ExitCode.DONE


def _named(name: str, stored: list[agent_pb2.StoredModel], where: str) -> str:
    """The SHA-256 of the only file that ``name`` can mean. Raises Refused."""
    called = [entry.model.sha256 for entry in stored if entry.model.name == name]
    if len(called) == 1:
        return called[0]
    return the_one(name, (entry.model.sha256 for entry in stored), "model", where)


def _needed(address: Address | None) -> Address:
    if address is None:
        raise click.UsageError("Missing option '--to': name the board, or set BOARDBENCH_AGENT")
    return address
