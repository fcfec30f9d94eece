"""Boards, as commands name them and as they are called."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from boardbench.cli.address import AGENT_PORT, AddressType
from boardbench.cli.errors import Refused

if TYPE_CHECKING:
    from boardbench.cli.client import AgentClient
    from boardbench.v1 import board_pb2

_Command = TypeVar("_Command", bound=Callable[..., Any])


def board_option(command: _Command) -> _Command:
    """Adds ``--to`` for one board."""
    return click.option(
        "--to",
        "address",
        required=True,
        envvar="BOARDBENCH_AGENT",
        type=AddressType(AGENT_PORT),
        help=f"The board; port {AGENT_PORT} when none is given.",
    )(command)


def the_one(prefix: str, ids: Iterable[str], what: str, where: str) -> str:
    """The only one of ``ids`` that begins with ``prefix``. Raises Refused, saying what there is instead."""
    found = sorted({name for name in ids if name.startswith(prefix.lower())})
    if prefix.lower() in found:
        return prefix.lower()
    if not found:
        raise Refused(
            f"no {what} {prefix!r} on {where}: `boardbench {what}s --to {where}` lists what there is"
        )
    if len(found) > 1:
        several = ", ".join(name[:16] for name in found[:4]) + (", …" if len(found) > 4 else "")
        raise Refused(f"{prefix!r} names {len(found)} {what}s on {where}: {several}; give more digits")
    return found[0]


def run_id_on(client: AgentClient, prefix: str) -> str:
    """The whole id of the run on this board that ``prefix`` begins. Raises Refused."""
    return the_one(prefix, (run.run_id for run in client.list_runs()), "run", str(client.address))


def board_name(board: board_pb2.Board) -> str:
    """What to call a board: its host name, and its identity where that is something else."""
    if board.hostname and board.device_id and board.hostname != board.device_id:
        return f"{board.hostname} ({board.device_id})"
    return board.hostname or board.device_id


def short_names(boards: Iterable[board_pb2.Board]) -> dict[str, str]:
    """Host names by identity; with the identity where two boards have one host name, as new boards do."""
    known = {board.device_id: board for board in boards}
    bearers = collections.Counter(board.hostname for board in known.values())
    return {
        device_id: board_name(board) if bearers[board.hostname] > 1 else board.hostname or device_id
        for device_id, board in known.items()
    }
