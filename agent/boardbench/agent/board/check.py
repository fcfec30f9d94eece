"""The contract of a check: is the board fit to measure on? One file a subject in ``checks/``."""

from __future__ import annotations

import grp
import importlib
import os
import pwd
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from boardbench.agent.board.sensor import Reading
from boardbench.agent.config import ValidityConfig
from boardbench.v1 import agent_pb2, board_pb2

OK = agent_pb2.FINDING_STATE_OK
DOUBTFUL = agent_pb2.FINDING_STATE_DOUBTFUL
INVALID = agent_pb2.FINDING_STATE_INVALID
ABSENT = agent_pb2.FINDING_STATE_ABSENT
UNKNOWN = agent_pb2.FINDING_STATE_UNSPECIFIED

State = agent_pb2.FindingState.ValueType


@dataclass(frozen=True)
class Program:
    """A program that took processor time while the board was looked at."""

    name: str
    pid: int
    # 1: all the time of one processor.
    processors: float
    # systemd's unit that it belongs to; empty when it is none.
    unit: str = ""


@dataclass(frozen=True)
class Work:
    """What the board did while it was looked at, boardbench's own work left out."""

    seconds: float
    # Busy with other programs: 1.0 is all of one processor.
    busy_processors: float
    # Share of the processors' time that the host of a virtual machine took away.
    stolen_share: float
    # Pages that came back from swap, in bytes; None where the kernel does not count them.
    swapped_in_bytes: int | None = None
    # Those that took most, most first.
    programs: tuple[Program, ...] = ()


@dataclass(frozen=True)
class View:
    """What checks look at: the board's files, and what is known without them."""

    root: Path
    board: board_pb2.Board
    limits: ValidityConfig = field(default_factory=ValidityConfig)
    # Every runtime that boardbench knows.
    runtimes: Sequence[board_pb2.RuntimeStatus] = ()
    # Where models are kept, and what is left free there.
    data_dir: Path = Path("/")
    free_bytes: int | None = None
    free_floor_bytes: int = 0
    # The run that is measured now; empty when none is.
    running_run_id: str = ""
    # None where the kernel does not tell.
    work: Work | None = None
    # What the kernel says about its clock; None where it can't be asked.
    clock_kept: bool | None = None
    # Kinds of sensors that are not to be read.
    without: tuple[str, ...] = ()

    @property
    def processors(self) -> int:
        """Logical processors, at least one."""
        return max(1, self.board.cpu_count)


@dataclass(frozen=True)
class Check:
    """One thing that is looked at."""

    # Stable identifier, the finding's.
    code: str
    # What it looks at, for the documentation.
    subject: str
    # What makes the figures doubtful or invalid, for the documentation.
    doubt: str
    look: Callable[[View], agent_pb2.Finding]


def ok(message: str, fix: str = "") -> agent_pb2.Finding:
    """As it should be; ``fix`` is advice all the same."""
    return agent_pb2.Finding(state=OK, message=message, fix=fix)


def doubtful(message: str, fix: str, *, fixable: bool = False) -> agent_pb2.Finding:
    """Figures would be doubtful."""
    return agent_pb2.Finding(state=DOUBTFUL, message=message, fix=fix, fixable=fixable)


def invalid(message: str, fix: str) -> agent_pb2.Finding:
    """Figures would be invalid."""
    return agent_pb2.Finding(state=INVALID, message=message, fix=fix)


def unknown(message: str, fix: str = "") -> agent_pb2.Finding:
    """It can't be told."""
    return agent_pb2.Finding(state=UNKNOWN, message=message, fix=fix)


def absent(message: str) -> agent_pb2.Finding:
    """The board has nothing of the kind."""
    return agent_pb2.Finding(state=ABSENT, message=message)


def read(view: View, *kinds: str) -> tuple[list[Reading], list[str]]:
    """What the sensors of these kinds say now, and what those say that failed."""
    readings: list[Reading] = []
    faults: list[str] = []
    for kind in kinds:
        if kind in view.without:
            faults.append(f"{kind} is left out by sensors.without")
            continue
        module = importlib.import_module(f"boardbench.agent.board.sensors.{kind}")
        for sensor in module.find(view.root):
            try:
                readings.extend(sensor.read())
            except OSError as error:
                faults.append(told(error))
    return readings, faults


def told(error: OSError) -> str:
    """The error for a person, with its file as the board has it."""
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


def megahertz(hertz: float) -> str:
    """The frequency for a person: "1800 MHz"."""
    return f"{hertz / 1e6:.0f} MHz"


def size(count: float) -> str:
    """Bytes for a person: "1.5 GB"."""
    for unit, bytes_in_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= bytes_in_it:
            return f"{count / bytes_in_it:.1f} {unit}"
    return f"{count:.0f} bytes"


def user() -> str:
    """Name of the user that this process runs as; its number where it has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def group() -> str:
    """Name of the group that this process runs in; its number where it has none."""
    try:
        return grp.getgrgid(os.getegid()).gr_name
    except KeyError:
        return str(os.getegid())


def join_group(path: Path) -> str:
    """The command that lets this user at a device, by its group."""
    try:
        owner = grp.getgrgid(path.stat().st_gid).gr_name
    except (OSError, KeyError):
        return ""
    if owner in ("", "root"):
        return ""
    return f"sudo usermod -aG {shlex.quote(owner)} {shlex.quote(user())}  # then start the agent again"
