"""The collector, as the commands about it name it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from boardbench.cli.address import COLLECTOR_PORT, AddressType

_Command = TypeVar("_Command", bound=Callable[..., Any])


def collector_option(command: _Command) -> _Command:
    """Adds ``--collector``."""
    return click.option(
        "--collector",
        envvar="BOARDBENCH_COLLECTOR",
        default=f"127.0.0.1:{COLLECTOR_PORT}",
        show_default=True,
        type=AddressType(COLLECTOR_PORT),
        help=f"The collector; port {COLLECTOR_PORT} when none is given.",
    )(command)
