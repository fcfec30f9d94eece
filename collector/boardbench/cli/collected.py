"""The collector and its boards, as the commands about them name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from boardbench.cli.address import COLLECTOR_PORT, CollectorType, ca_option
from boardbench.cli.spec import Seconds

_Command = TypeVar("_Command", bound=Callable[..., Any])


def collector_option(command: _Command) -> _Command:
    """Adds ``--collector``."""
    return _option("--collector")(command)


def via_option(command: _Command) -> _Command:
    """Adds ``--via``, the collector whose queue is meant; ``--collector`` is the same."""
    return _option("--via", "--collector")(command)


def _option(*names: str) -> Callable[[_Command], _Command]:
    option = click.option(
        *names,
        "collector",
        envvar="BOARDBENCH_COLLECTOR",
        default=f"127.0.0.1:{COLLECTOR_PORT}",
        show_default=True,
        type=CollectorType(),
        help=f"The collector; port {COLLECTOR_PORT} when none is given; tls://HOST where it is encrypted.",
    )
    return lambda command: option(ca_option(command))


def retry_option(to: str) -> Callable[[_Command], _Command]:
    """Adds ``--retry-for``; the command gets the seconds, ``retry_for``. ``to`` is what is connected to."""
    return click.option(
        "--retry-for",
        type=Seconds(zero=True),
        default=60.0,
        show_default=True,
        help=f"Go on trying this long when the connection to {to} is lost.",
    )


def on_option(help: str) -> Callable[[_Command], _Command]:
    """Adds ``--on``; the command gets the terms as a tuple, ``on``."""
    return click.option(
        "--on",
        multiple=True,
        metavar="TERM,…",
        callback=_terms,
        help=help + " Terms are name=value or name!=value, * in the value for anything: board, soc, "
        "architecture, os, accelerator, runtime, device_id, up, or a label. All must hold. Repeatable.",
    )


def _terms(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return terms(values)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def terms(texts: Iterable[str]) -> tuple[str, ...]:
    """Each term of texts like "board=pi5,lab=zurich". Raises ValueError for what is none."""
    found = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    for part in found:
        name, equals, _ = part.partition("=")
        if not equals or not name.strip("! "):
            raise ValueError(f"{part!r} is not NAME=VALUE, as in board=pi5 or lab!=zurich")
    return tuple(found)


def pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Names and values of repeated NAME=VALUE; for ``callback`` of an option or argument."""
    found: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", ctx, param)
        if name.strip() in found:
            raise click.BadParameter(f"{name.strip()!r} is given twice", ctx, param)
        found[name.strip()] = value.strip()
    return found


def holder_option(command: _Command) -> _Command:
    """Adds ``--holder``; the command gets the holder's name."""
    return click.option(
        "--holder",
        envvar="BOARDBENCH_HOLDER",
        default=None,
        callback=lambda _ctx, _param, value: value or default_holder(),
        metavar="NAME",
        help="Who asks; reservations look at it.  [default: you, at this machine]",
    )(command)


def default_holder() -> str:
    """Who sits here: "anna@laptop"."""
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no such user, as in some containers
        user = "somebody"
    return f"{user}@{socket.gethostname()}"
