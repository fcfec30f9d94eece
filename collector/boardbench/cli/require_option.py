"""``--require`` as an option of a command; what it means is only loaded when it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from boardbench.cli.require import Requirement

_Command = TypeVar("_Command", bound=Callable[..., Any])


def require_option(*, file: bool = False) -> Callable[[_Command], _Command]:
    """Adds ``--require``; the command gets a tuple of requirements as ``require``."""
    example = "no-fallback, cpu_ops<=8" if file else "accelerated_ops>=95%, no-fallback, p50<=5ms"
    what = "file" if file else "result"

    def parsed(
        ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
    ) -> tuple[Requirement, ...]:
        if not values:
            return ()
        from boardbench.cli.require import parse

        try:
            return tuple(parse(value, file=file) for value in values)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return click.option(
        "--require",
        multiple=True,
        metavar="EXPR",
        callback=parsed,
        help=f"Exit with 1, saying why, unless the {what} holds this: {example}, … "
        "What is not known does not hold. Repeatable.",
    )
