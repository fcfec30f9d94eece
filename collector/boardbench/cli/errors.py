"""What can go wrong on the laptop, and the exit code that says so.

    CliError                       1   something was tried and did not work
    ├── Refused                    1   a board or collector answered, and said no
    ├── RunLost                    1   a run was started and nobody knows its end
    ├── WrongUse                   2   what was asked for, or a file that was named, can't be used
    ├── Unreachable                3   nobody answered, or nobody who speaks boardbench
    ├── Interrupted              130   Ctrl-C
    └── ReaderGone               141   whoever read the output went away

Mistakes in the command line are click's ``UsageError``, exit code 2. gRPC's exceptions become these in
:mod:`boardbench.cli.client` and nowhere else.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """The exit codes of ``boardbench``; they never change their meaning."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    DEFECT = 70
    INTERRUPTED = 130
    BROKEN_PIPE = 141


EXIT_CODES: dict[ExitCode, str] = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "a run failed, was refused or was cancelled, or a check did not hold",
    ExitCode.USAGE: "the command line, or a file that it names, is wrong; nothing was started",
    ExitCode.UNREACHABLE: "a board or the collector can't be reached",
    ExitCode.DEFECT: "a defect in boardbench itself",
    ExitCode.INTERRUPTED: "interrupted with Ctrl-C",
    ExitCode.BROKEN_PIPE: "whoever read the output went away",
}


class CliError(Exception):
    """Ends the command with one message that says what, which and what to do."""

    exit_code = ExitCode.FAILED


class Refused(CliError):
    """A board or collector answered, and said no; the message holds its words."""


class RunLost(CliError):
    """A run was started, and the board no longer knows it."""


class WrongUse(CliError):
    """What the command line asks for, or a file that it names, can't be used."""

    exit_code = ExitCode.USAGE


class Unreachable(CliError):
    """Nobody answered, or nobody who speaks boardbench."""

    exit_code = ExitCode.UNREACHABLE


class Interrupted(CliError):
    """The user pressed Ctrl-C."""

    exit_code = ExitCode.INTERRUPTED


class ReaderGone(CliError):
    """Whoever read the output, ``head`` for example, has had enough; there is nothing to say about it."""

    exit_code = ExitCode.BROKEN_PIPE


_WORST_FIRST = (
    ExitCode.INTERRUPTED,
    ExitCode.BROKEN_PIPE,
    ExitCode.DEFECT,
    ExitCode.UNREACHABLE,
    ExitCode.FAILED,
    ExitCode.USAGE,
)


def worst(codes: list[ExitCode]) -> ExitCode:
    """The exit code that stands for several: the first of these that is among them, else that of success."""
    for code in _WORST_FIRST:
        if code in codes:
            return code
    return ExitCode.DONE
