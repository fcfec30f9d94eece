"""Where output goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console, RenderableType

_Command = TypeVar("_Command", bound=Callable[..., Any])
PIPE_WIDTH = 100  # fits a wide log, a mail and a README without being folded again


def is_plain() -> bool:
    """Whether the user wants no styling (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


def console_for(file: TextIO) -> Console:
    """A console that writes to ``file``: its width, colours only where a terminal shows them."""
    from rich.console import Console

    wide = None if file.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return Console(
        file=file,
        width=wide,
        color_system=None if is_plain() else "auto",
        no_color=is_plain(),
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )


LEAST_WIDTH = 72  # in less, figures would be cut off: a narrower terminal folds lines, and nothing is lost
TABLE_PIPE_WIDTH = 1000  # no name is as long, so that each row is one line for grep and awk


@dataclass(frozen=True)
class Output:
    """How a command was asked to speak."""

    json: bool
    quiet: bool
    full: bool = False

    @property
    def shows_progress(self) -> bool:
        """Whether somebody watches: stderr is a terminal, and --quiet was not given."""
        return not self.quiet and sys.stderr.isatty()

    def show(self, *parts: RenderableType, table: bool = False, uncut: bool = False) -> None:
        """Writes renderable parts to stdout, one after the other.

        The rows of a ``table`` stay on one line each where a program reads them. What is ``uncut`` has folded
        its lines itself: one that is longer than the terminal is wide is left to the terminal.
        """
        console = console_for(sys.stdout)
        if table and not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
            console.width = TABLE_PIPE_WIDTH
        console.width = max(console.width, LEAST_WIDTH)
        with console.capture() as captured:
            for part in parts:
                console.print(
                    part, crop=not uncut, no_wrap=uncut or None, overflow="ignore" if uncut else None
                )
        # Rich fills lines up with spaces, which nobody wants in a file or a mail.
        sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))
        sys.stdout.flush()

    def show_json(self, value: Message | Sequence[Message]) -> None:
        """Writes one JSON document to stdout: protobuf's JSON with the proto's names of the fields."""
        document: Any = [as_json(item) for item in value] if isinstance(value, Sequence) else as_json(value)
        ascii_only = (sys.stdout.encoding or "ascii").lower().replace("-", "") != "utf8"
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n")

    def note(self, text: str) -> None:
        """Writes a line for a person to stderr, unless nobody watches."""
        if self.shows_progress:
            click.echo(text, err=True)

    def complain(self, text: str) -> None:
        """Writes an error to stderr, always."""
        from boardbench.cli.plain import printable

        click.echo(f"boardbench: {printable(text, keep_lines=True)}", err=True)


def as_json(value: Message) -> dict[str, Any]:
    """``value`` for :mod:`json`: protobuf's JSON with the proto's names of the fields."""
    from google.protobuf import json_format

    return json_format.MessageToDict(value, preserving_proto_field_name=True)


def output_options(command: _Command) -> _Command:
    """Adds ``--format`` and ``--quiet``; :func:`output_from` reads them."""
    command = click.option(
        "-q", "--quiet", is_flag=True, help="No progress and no notes on stderr; errors still."
    )(command)
    return click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="How results are written to stdout.",
    )(command)


def full_option(command: _Command) -> _Command:
    """Adds ``--full``; :func:`output_from` reads it."""
    return click.option("--full", is_flag=True, help="Show every op, tensor and circumstance of a result.")(
        command
    )


def output_from(values: dict[str, Any]) -> Output:
    """What the options say; takes them out of ``values``."""
    return Output(
        json=values.pop("form") == "json", quiet=values.pop("quiet"), full=values.pop("full", False)
    )
