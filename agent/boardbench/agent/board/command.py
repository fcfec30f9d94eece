"""A vendor's program that tells what no file does: run, bounded in time and output, its cost counted."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import time
from pathlib import Path

_MOST_BYTES = 1 << 16
_TIMEOUT_SECONDS = 2.0
# Between looks whether a program that has closed its output is gone.
_PAUSE_SECONDS = 0.001


class Command:
    """One program. For one thread at a time."""

    def __init__(self, program: Path, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self.program = program
        self.cpu_seconds = 0.0
        """That it took so far, all runs together."""
        self._timeout_seconds = timeout_seconds

    def run(self, *arguments: str) -> str:
        """What it says. Raises OSError when it can't be started, fails, or takes too long."""
        environment = {**os.environ, "LC_ALL": "C"}
        process = subprocess.Popen(
            [self.program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=environment,
        )
        assert process.stdout is not None
        deadline = time.monotonic() + self._timeout_seconds
        with process.stdout:
            said, in_time = _output(process.stdout.fileno(), deadline)
        code = self._end(process, deadline if in_time else 0.0)
        text = said.decode("utf-8", "replace")
        # One that still talked may have died of nobody listening before it was killed.
        if code is None or not in_time:
            raise OSError(errno.ETIMEDOUT, f"not over after {self._timeout_seconds:g} s", str(self.program))
        if code:
            last = " ".join(text.split())[-200:]
            raise OSError(errno.EIO, f"exited with {code}: {last}", str(self.program))
        return text

    def _end(self, process: subprocess.Popen[bytes], deadline: float) -> int | None:
        """Its exit code once it is gone; None when it had to be killed."""
        killed = False
        while True:
            # Not Popen.wait: only wait4 tells what this one child took.
            pid, status, usage = os.wait4(process.pid, 0 if killed else os.WNOHANG)
            if pid:
                break
            if time.monotonic() >= deadline:
                process.kill()
                killed = True
            else:
                time.sleep(_PAUSE_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_seconds += usage.ru_utime + usage.ru_stime
        return None if killed else process.returncode


def _output(descriptor: int, deadline: float) -> tuple[bytes, bool]:
    """What is written until the end, and whether that came in time and within bounds."""
    said = bytearray()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(said) < _MOST_BYTES:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return bytes(said), False
        part = os.read(descriptor, 4096)
        if not part:
            return bytes(said), True
        said += part
    return bytes(said), False
