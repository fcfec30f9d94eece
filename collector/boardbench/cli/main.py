"""``boardbench``: the commands, loaded one by one, and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from boardbench.cli.errors import EXIT_CODES, CliError, ExitCode, ReaderGone

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Command(NamedTuple):
    """Where a command lives, and its line in the list of commands."""

    module: str
    attribute: str
    help: str


# The help lines stand here so that `boardbench --help` loads none of the modules.
COMMANDS: dict[str, Command] = {
    "push": Command(
        "boardbench.cli.push", "push", "Send models to boards, run them there and show the results."
    ),
    "run": Command("boardbench.cli.run", "run", "Run models on this machine, without an agent."),
    "inspect": Command(
        "boardbench.cli.inspect", "inspect", "Say what is in a model file, without running it."
    ),
    "results": Command("boardbench.cli.results", "results", "List the results that the collector keeps."),
    "show": Command("boardbench.cli.results", "show", "Show one result of the collector, whole."),
    "jobs": Command("boardbench.cli.jobs", "jobs", "List, follow, cancel or retry the jobs of a collector."),
    "suite": Command(
        "boardbench.cli.suite",
        "suite",
        "Run many models on many boards: at once, by the clock, as files come.",
    ),
    "devices": Command(
        "boardbench.cli.devices",
        "devices",
        "List boards and what they can run; reserve, label and update them.",
    ),
    "runtimes": Command(
        "boardbench.cli.runtimes", "runtimes", "List the engines of a board, or those that take a model."
    ),
    "doctor": Command("boardbench.cli.doctor", "doctor", "Say whether a board is fit to measure on."),
    "models": Command("boardbench.cli.models", "models", "List or delete the files that a board keeps."),
    "runs": Command("boardbench.cli.runs", "runs", "List the runs of a board."),
    "watch": Command("boardbench.cli.runs", "watch", "Follow a run on a board to its result."),
    "cancel": Command("boardbench.cli.runs", "cancel", "End a run on a board, waiting or running."),
    "flash": Command(
        "boardbench.cli.flash",
        "flash",
        "Put the agent onto a board: on its card before the first boot, or over SSH.",
    ),
    "release": Command(
        "boardbench.cli.release", "release", "Make keys, and sign releases of the agent for boards."
    ),
    "demo": Command(
        "boardbench.cli.demo", "demo", "Try everything on this machine, with models built on the spot."
    ),
    "completion": Command(
        "boardbench.cli.completion", "completion", "Print the completion script of a shell."
    ),
}

EPILOG = (
    "\b\nExamples:\n"
    "  boardbench push model.tflite --to raspberrypi.local\n"
    "  boardbench run model.onnx --threads 2\n"
    "  boardbench demo\n"
    "\n\b\nExit codes:\n"
    + "\n".join(f"  {code.value:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    + """

\b
Environment:
  BOARDBENCH_AGENT      boards for --to, separated by spaces
  BOARDBENCH_COLLECTOR  the collector for --collector, and for --via of jobs, devices and suite
  BOARDBENCH_CA         the authority of the collector's certificate, for --ca
  BOARDBENCH_HOLDER     who asks, for --holder
  BOARDBENCH_DEBUG=1    show the traceback of an error
  NO_COLOR              no colour and no other terminal styling
"""
)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order of a user's day."""
        del ctx
        from importlib.util import find_spec

        return [name for name, command in COMMANDS.items() if find_spec(command.module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None when there is none of this name."""
        del ctx
        command = COMMANDS.get(cmd_name)
        if command is None:
            return None
        try:
            module = importlib.import_module(command.module)
        except ModuleNotFoundError as error:
            # One that is not in this installation is not listed either.
            if error.name != command.module:
                raise
            return None
        found = getattr(module, command.attribute)
        assert isinstance(found, click.Command), (
            f"{command.module}.{command.attribute} is not a click command"
        )
        return found

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command. A reader that went away ends it before click makes another exit code of that."""
        try:
            code: object = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            # Python would try once more to flush at exit, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise ReaderGone from error
        return code

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, but names the command that was probably meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near or "Did you mean" in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes the names of commands from the table, importing none."""
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [
            CompletionItem(name, help=COMMANDS[name].help)
            for name in self.list_commands(ctx)
            if name.startswith(incomplete)
        ]


def print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    """Prints the version and ends, when ``--version`` was given."""
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"boardbench {version('boardbench')}")
    except PackageNotFoundError:
        raise CliError(
            "the version is not known: boardbench runs from a folder and is not installed"
        ) from None
    ctx.exit()


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Print the version.",
)
def boardbench() -> None:
    """Benchmark ML models on edge boards.

    Does it fit, how fast is it really, and does it truly run on the accelerator?
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; every error ends here as one message on stderr."""
    # gRPC reads both when it is imported. Its own resolver knows no mDNS (raspberrypi.local), the system's
    # does; and what it logs about broken connections is for its developers.
    os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that can't show a character gets a substitute instead of a crash.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = boardbench.main(
            args=None if arguments is None else list(arguments), prog_name="boardbench", standalone_mode=False
        )
    except Exception as error:
        if os.environ.get("BOARDBENCH_DEBUG", "") not in ("", "0"):
            import traceback

            traceback.print_exc()
        return told(error)
    except KeyboardInterrupt:
        return told(click.Abort())
    return ExitCode(code) if code else ExitCode.DONE


def told(error: Exception) -> ExitCode:
    """The exit code for an error, after saying on stderr what happened and what to do."""
    if isinstance(error, click.Abort):
        click.echo("boardbench: interrupted", err=True)
        return ExitCode.INTERRUPTED
    if isinstance(error, click.ClickException):
        error.show()
        return ExitCode(error.exit_code)
    if isinstance(error, CliError):
        if str(error):
            from boardbench.cli.plain import printable

            click.echo(f"boardbench: {printable(str(error), keep_lines=True)}", err=True)
        return error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name:
        click.echo(
            f"boardbench: the module {error.name!r} is missing: install boardbench again "
            "with `pip install boardbench`",
            err=True,
        )
        return ExitCode.DEFECT
    if isinstance(error, OSError):
        click.echo(f"boardbench: {error}", err=True)
        return ExitCode.FAILED
    click.echo(
        f"boardbench: a defect in boardbench: {type(error).__name__}: {error}\n"
        "Please report it with the output of the same command under BOARDBENCH_DEBUG=1.",
        err=True,
    )
    return ExitCode.DEFECT


if __name__ == "__main__":
    sys.exit(main())
