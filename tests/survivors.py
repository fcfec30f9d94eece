"""Processes of a test that have outlived whoever started them, found by what they were started with.

Read from Linux's /proc; elsewhere nothing is found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Goes down to all that a session's tests start, and to what these start. pytest's own variables are kept in
# environments that are made for programs.
MARK = "PYTEST_SESSION_MARK"
# What was killed a moment ago, or lost who started it, takes a moment to go; on a busy machine, seconds.
GOING_SECONDS = 10.0
_TEST = b"PYTEST_CURRENT_TEST"
_PROC = Path("/proc")


@dataclass(frozen=True)
class Found:
    """A process that runs."""

    pid: int
    parent: int
    command: str
    # During which it was started, as far as that is known.
    test: str

    def __str__(self) -> str:
        return f"{self.pid} ({self.command or 'no command'}), started during {self.test or 'an unknown test'}"


def started_with(name: str, value: str) -> list[Found]:
    """Processes, other than this one, whose environment had the variable with this value at their start."""
    wanted = f"{name}={value}".encode()
    return [found for found, environment in _all() if wanted in environment]


def children() -> list[Found]:
    """This process's own."""
    return [found for found, _ in _all() if found.parent == os.getpid()]


def end(look: Callable[[], list[Found]]) -> None:
    """Kills those that it finds, again and again until there are none."""
    deadline = time.monotonic() + 60
    while left := look():
        for found in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"killed again and again, in vain: {left[0]}"
        time.sleep(0.02)


def check_none_is_left(look: Callable[[], list[Found]]) -> None:
    """Fails when there are some that don't end by themselves, and kills them."""
    deadline = time.monotonic() + GOING_SECONDS
    while left := look():
        if time.monotonic() > deadline:
            end(look)
            raise AssertionError("left behind, and killed now: " + "; ".join(map(str, left)))
        time.sleep(0.02)


def _all() -> list[tuple[Found, list[bytes]]]:
    """Those whose files this user may read, with their environments; none that has ended already."""
    everything = []
    for folder in _PROC.glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if state in "ZX" or folder.name == str(os.getpid()):
            continue
        test = next((each[len(_TEST) + 1 :] for each in environment if each.startswith(_TEST + b"=")), b"")
        found = Found(int(folder.name), int(parent), command[:300], test.decode(errors="replace"))
        everything.append((found, environment))
    return everything
