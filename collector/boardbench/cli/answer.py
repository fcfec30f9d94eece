"""A result as the answer of a command: a page or JSON on stdout, and the exit code that goes with it."""

from __future__ import annotations

from boardbench.cli.errors import ExitCode
from boardbench.cli.report import result_page
from boardbench.cli.terminal import Output
from boardbench.v1 import result_pb2


def answer(result: result_pb2.RunResult, output: Output, *, whole: bool = False) -> ExitCode:
    """Writes ``result`` to stdout; FAILED unless the run succeeded."""
    if output.json:
        output.show_json(result)
    else:
        output.show(result_page(result, whole=whole))
    return exit_code(result)


def exit_code(result: result_pb2.RunResult) -> ExitCode:
    """DONE for a run that was measured to its end, FAILED for any other."""
    return ExitCode.DONE if result.status == result_pb2.RUN_STATUS_SUCCEEDED else ExitCode.FAILED
