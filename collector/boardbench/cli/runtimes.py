"""``boardbench runtimes``: which engines a board has, and which of them can run a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from boardbench.cli.address import AGENT_PORT, Address, AddressType
from boardbench.cli.errors import CliError, ExitCode, worst
from boardbench.cli.terminal import output_from, output_options

_EXAMPLES = """\b
Examples:
  boardbench runtimes --to pi5
  boardbench runtimes model.onnx --to pi5
"""


@click.command(epilog=_EXAMPLES)
@click.argument(
    "path", metavar="[MODEL]", required=False, type=click.Path(exists=True, readable=True, path_type=Path)
)
@click.option(
    "--to",
    "boards",
    multiple=True,
    required=True,
    envvar="BOARDBENCH_AGENT",
    type=AddressType(AGENT_PORT),
    help="Board to ask. Repeatable.",
)
@output_options
def runtimes(path: Path | None, boards: tuple[Address, ...], **values: Any) -> ExitCode:
    """List the engines of a board, or those that take a model.

    With MODEL: which of the board's engines can run it, on which devices, which one is taken when none is
    asked for, and of the others, why they can't. Nothing is sent: the format is told from the file here.
    Without: every engine with its settings and options.

    With --format json: the RuntimeStatus of each, with "can_run", "default" and "reason" where a model was
    given; an array of such arrays for several boards.
    """
    output = output_from(values)
    from boardbench.cli.client import AgentClient
    from boardbench.cli.engines import choices
    from boardbench.cli.spec import Spec

    model_format = _format(path) if path is not None else ""
    documents = []
    codes = [ExitCode.DONE]
    for address in dict.fromkeys(boards):
        try:
            with AgentClient(address) as client:
                statuses = list(client.describe().runtimes)
        except CliError as error:
            output.complain(str(error))
            codes.append(error.exit_code)
            continue
        found = choices(statuses, model_format, Spec()) if path is not None else None
        if found is not None and not any(not choice.refusal for choice in found):
            codes.append(ExitCode.FAILED)
        if output.json:
            from boardbench.cli.terminal import as_json

            documents.append(
                [as_json(status) for status in statuses]
                if found is None
                else [
                    {
                        **as_json(choice.status),
                        "can_run": not choice.refusal,
                        "default": choice.default,
                        "reason": choice.refusal,
                    }
                    for choice in found
                ]
            )
            continue
        from boardbench.cli.engine_table import choices_page

        title = f"{address}" if path is None else f"{path.name} ({model_format}) on {address}"
        output.show(choices_page(title, statuses, found))
    if output.json and documents:
        import json

        click.echo(json.dumps(documents if len(boards) > 1 else documents[0], indent=2))
    return worst(codes)


def _format(path: Path) -> str:
    from boardbench.inspect.errors import InspectError
    from boardbench.inspect.sniff import sniff

    try:
        found = sniff(path)
    except InspectError as error:
        raise CliError(f"{path}: {error}") from error
    if not found:
        raise CliError(
            f"{path.name} is of no format that is known here; a board may have an engine for it: see "
            "`boardbench runtimes --to BOARD`"
        )
    return found
