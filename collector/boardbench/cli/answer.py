"""A result as the answer of a command: a page or JSON on stdout, and the exit code that goes with it."""

from __future__ import annotations

from boardbench.cli.errors import ExitCode
from boardbench.cli.report import result_page
from boardbench.cli.terminal import Output
from boardbench.v1 import result_pb2


def answer(result: result_pb2.RunResult, output: Output, *, more: str = "") -> ExitCode:
    """Writes ``result`` to stdout; FAILED unless the run succeeded.

    ``more`` says how to see the whole page, where something had to be cut off.
    """
    if output.json:
        output.show_json(result)
    else:
        output.show(result_page(result, whole=output.full, more=more))
    return exit_code(result)


def exit_code(result: result_pb2.RunResult) -> ExitCode:
    """DONE for a run that was measured to its end, FAILED for any other."""
    return ExitCode.DONE if result.status == result_pb2.RUN_STATUS_SUCCEEDED else ExitCode.FAILED
