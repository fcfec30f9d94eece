"""``boardbench devices update | updates | stop-update``: releases of the agent, by way of the collector."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from boardbench.cli.address import Address
from boardbench.cli.collected import on_option, retry_option, via_option
from boardbench.cli.errors import CliError, ExitCode, Interrupted, WrongUse
from boardbench.cli.spec import Count
from boardbench.cli.terminal import Output, output_from, output_options

if TYPE_CHECKING:
    from boardbench.cli.client import UpdatesClient
    from boardbench.cli.progress import Watched
    from boardbench.v1 import update_pb2


@click.command()
@click.argument("package", type=click.Path(path_type=Path, dir_okay=False))
@on_option("Which boards.")
@click.option(
    "--canary",
    type=Count(0, 100_000),
    default=1,
    show_default=True,
    help="So many go first; the others when these run the release. 0: all at once.",
)
@click.option("--no-wait", is_flag=True, help="Only begin it; `devices updates` tells how it goes.")
@retry_option("the collector")
@via_option
@output_options
def update(
    package: Path,
    on: tuple[str, ...],
    canary: int,
    no_wait: bool,
    retry_for: float,
    collector: Address,
    **values: Any,
) -> ExitCode:
    """Bring a signed release of the agent onto boards.

    PACKAGE is what `boardbench release sign` wrote. Each board verifies it, waits until it measures nothing,
    switches, and goes back by itself when the new release does not work; then no further board begins. Ctrl-C
    leaves; the update goes on. Exit code 1 unless every board runs the release.

    With --format json: an Update.
    """
    output = output_from(values)
    if not on:
        raise click.UsageError("which boards? Give --on TERMS; --on device_id=* means all")
    _check(package)
    from boardbench.cli.client import UpdatesClient
    from boardbench.cli.progress import progress_for
    from boardbench.cli.source import Source
    from boardbench.v1 import update_pb2

    with (
        progress_for(output) as progress,
        UpdatesClient(collector, retry_seconds=retry_for, notice=progress.note) as client,
    ):
        with contextlib.closing(Source(package)) as source:
            try:
                client.push(
                    source, on_sent=lambda sent: progress.sending(source.name, sent, source.size_bytes)
                )
            finally:
                progress.ended(source.name)
            begun = client.start(
                update_pb2.StartUpdateRequest(
                    on=on, canary=canary, package_sha256=source.sha256, request_id=uuid.uuid4().hex
                )
            )
        latest = begun if no_wait else _follow(client, begun, progress, output, collector)
    _show(latest, output)
    if no_wait:
        return ExitCode.DONE
    done = all(board.state == update_pb2.UPDATE_STATE_DONE for board in latest.boards)
    return ExitCode.DONE if done else ExitCode.FAILED


def _check(package: Path) -> None:
    """Raises WrongUse for what no board would take, before it is sent anywhere."""
    from boardbench.inspect import release
    from boardbench.inspect.errors import InspectError

    try:
        with package.open("rb") as file:
            release.read(file)
    except OSError as error:
        raise WrongUse(f"{package} can't be read: {error.strerror}") from error
    except InspectError as error:
        raise WrongUse(f"{package}: {error}") from error


def _follow(
    client: UpdatesClient,
    begun: update_pb2.Update,
    progress: Watched,
    output: Output,
    collector: Address,
) -> update_pb2.Update:
    from boardbench.cli.interrupt import Interrupt
    from boardbench.v1 import update_pb2

    latest = begun
    told: dict[str, int] = {}
    with Interrupt(client.stop):
        try:
            with contextlib.closing(client.watch_update(begun.update_id)) as changes:
                for latest in changes:
                    for board in latest.boards:
                        if board.state in _ENDED:
                            progress.ended(board.device_id)
                            if told.get(board.device_id) != board.state:
                                with progress.paused():
                                    output.note(f"{board.device_id}: {words(board)}")
                        elif board.state != update_pb2.UPDATE_STATE_WAITING:
                            progress.doing(board.device_id, words(board))
                        told[board.device_id] = board.state
        except (Interrupted, KeyboardInterrupt):
            output.complain(
                "left before all boards had ended; the update goes on: "
                f"boardbench devices updates --via {collector}"
            )
    return latest


_ENDED = (5, 6, 7, 8)
_WORDS = {
    1: "waiting",
    2: "fetching",
    3: "ready",
    4: "switched, looked at",
    5: "done",
    6: "rolled back",
    7: "failed",
    8: "not begun",
}


def words(board: update_pb2.BoardUpdate) -> str:
    """Where the board is, for a person."""
    text = _WORDS.get(board.state, "unknown")
    if board.HasField("fraction"):
        text += f" {board.fraction:.0%}"
    return f"{text}: {board.reason}" if board.reason else text


def _show(found: update_pb2.Update, output: Output) -> None:
    from boardbench.cli.tables import update_table

    if output.json:
        output.show_json(found)
        return
    output.show(update_table(found, words), table=True)
    if found.halted:
        output.complain(f"no further board begins: {found.halted}")


@click.command()
@click.argument("update_id", metavar="[UPDATE]", default="")
@via_option
@output_options
def updates(update_id: str, collector: Address, **values: Any) -> ExitCode:
    """List updates, the latest first; with UPDATE: how far each of its boards is.

    UPDATE is the id of an update or the first digits of it. With --format json: an array of Update; with
    UPDATE one Update.
    """
    output = output_from(values)
    from boardbench.cli.client import UpdatesClient
    from boardbench.cli.tables import updates_table

    with UpdatesClient(collector) as client:
        found = client.updates()
    if update_id:
        chosen = [entry for entry in found if entry.update_id.startswith(update_id.lower())]
        if len(chosen) != 1:
            raise CliError(f"the collector at {collector} has no update {update_id!r}, or several")
        _show(chosen[0], output)
    elif output.json:
        output.show_json(found)
    elif found:
        output.show(updates_table(found), table=True)
    else:
        output.note(f"the collector at {collector} has brought no release onto boards")
    return ExitCode.DONE


@click.command("stop-update")
@click.argument("update_id", metavar="UPDATE")
@via_option
@output_options
def stop_update(update_id: str, collector: Address, **values: Any) -> ExitCode:
    """Leave boards as they are that have not begun; the others go on to their end.

    UPDATE is the id of an update or the first digits of it. With --format json: an Update.
    """
    output = output_from(values)
    from boardbench.cli.client import UpdatesClient

    with UpdatesClient(collector) as client:
        _show(client.stop_update(update_id.lower()), output)
    return ExitCode.DONE
