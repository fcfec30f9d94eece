"""``boardbench doctor``: is this board fit to measure on, and what to do where it is not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from boardbench.cli.address import AGENT_PORT, Address, AddressType
from boardbench.cli.errors import CliError, ExitCode, worst
from boardbench.cli.terminal import output_from, output_options

if TYPE_CHECKING:
    from boardbench.v1 import agent_pb2

_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)?")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

if TYPE_CHECKING:
    _FloatParameter = click.ParamType[float]
else:
    _FloatParameter = click.ParamType  # generic only from click 8.2 on


class Length(_FloatParameter):
    """Reads a length of time with its unit: "90s", "30m", "1h"; a number alone is in seconds."""

    name = "TIME"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds; fails with a usage error."""
        if isinstance(value, float):
            return value
        found = _LENGTH.fullmatch(str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a length of time: give 90s, 30m or 1h", param, ctx)
        seconds = float(found.group(1)) * _UNITS[found.group(2) or ""]
        if seconds < 1:
            self.fail(f"{value!r} is less than a second", param, ctx)
        return seconds


@click.command()
@click.option(
    "--to",
    "boards",
    multiple=True,
    required=True,
    envvar="BOARDBENCH_AGENT",
    type=AddressType(AGENT_PORT),
    help=f"The board; port {AGENT_PORT} when none is given. Repeatable.",
)
@click.option(
    "--fix",
    is_flag=True,
    help="Set what can be set (governor, turbo, a Jetson's clocks, …) for a time, then put it back.",
)
@click.option(
    "--for", "hold_seconds", type=Length(), help="How long --fix holds: 90s, 30m, 1h.  [default: 1h]"
)
@click.option("--restore", is_flag=True, help="Put back now what --fix has set.")
@click.option("--full", is_flag=True, help="Show what the board has nothing of, too.")
@output_options
def doctor(
    boards: tuple[Address, ...], fix: bool, hold_seconds: float | None, restore: bool, **values: Any
) -> ExitCode:
    """Say whether a board is fit to measure on.

    Each check says what it saw, and where that is a doubt, what to do about it: governor, limits, turbo,
    supply, throttling, heat, load, memory, swap, USB link, permissions, clock, engines. Nothing is changed
    without --fix. What --fix sets is put back after the time of --for, with --restore, when the agent ends,
    and after a crash when it starts again.

    Exit code 0: fit. 1: not fit, or something could not be set or put back. With --format json: the
    ExamineResponse, an array for several boards.
    """
    output = output_from(values)
    if fix and restore:
        raise click.UsageError("--fix and --restore exclude each other")
    if hold_seconds is not None and not fix:
        raise click.UsageError("--for says how long --fix holds: give that too")
    from boardbench.cli.client import AgentClient
    from boardbench.cli.doctor_page import doctor_page
    from boardbench.v1 import agent_pb2

    request = agent_pb2.ExamineRequest(fix=fix, restore=restore, hold_seconds=hold_seconds)
    answers: list[agent_pb2.ExamineResponse] = []
    codes = [ExitCode.DONE]
    addresses = list(dict.fromkeys(boards))
    for address in addresses:
        try:
            with AgentClient(address) as client:
                examined = client.examine(request)
        except CliError as error:
            output.complain(str(error))
            codes.append(error.exit_code)
            continue
        answers.append(examined)
        codes.append(ExitCode.DONE if is_fit(examined) and not examined.failed else ExitCode.FAILED)
        if not output.json:
            output.show(doctor_page(str(address), examined, fixing=fix, whole=output.full), uncut=True)
    if output.json and len(addresses) > 1:
        output.show_json(answers)
    elif output.json and answers:
        output.show_json(answers[0])
    return worst(codes)


def is_fit(examined: agent_pb2.ExamineResponse) -> bool:
    """Whether no check has a doubt. What can't be told is none."""
    from boardbench.v1 import agent_pb2

    doubts = (agent_pb2.FINDING_STATE_DOUBTFUL, agent_pb2.FINDING_STATE_INVALID)
    return not any(finding.state in doubts for finding in examined.findings)
