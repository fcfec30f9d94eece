"""The real bench process, as an agent starts it: a job in, its events out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import boardbench.agent.bench

# An import of a large engine on a busy machine takes many seconds; one that takes longer is stuck.
DEADLINE_SECONDS = 120.0

BRIEF: Mapping[str, Any] = {
    "duration_seconds": 0.0,
    "min_runs": 20,
    "warm_up_seconds": 0.0,
    "warm_up_runs": 2,
    "progress_seconds": 0.0,
    "profile_runs": 0,
}
"""Enough of a run for every step of it, and quick: what is measured is of no interest."""

_WORKER = Path(boardbench.agent.bench.__file__).with_name("__main__.py")


@dataclass(frozen=True)
class Answer:
    """What a bench process said, and how it ended."""

    events: tuple[Mapping[str, Any], ...]
    exit_code: int
    output: str
    """What it wrote to stdout and stderr."""

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The events of a kind, in their order."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def result(self) -> Mapping[str, Any]:
        """The result; fails the test, with all that was said, where there is none."""
        return self._only("result")

    @property
    def error(self) -> Mapping[str, Any]:
        """Code and message of the error; fails the test where there is none."""
        return self._only("error")

    def _only(self, kind: str) -> Mapping[str, Any]:
        found = self.of(kind)
        if len(found) != 1:
            pytest.fail(f"the bench process told no {kind}: {self.events[-3:]}\n{self.output}")
        content: Mapping[str, Any] = found[0][kind]
        return content


class BenchChild:
    """Starts bench processes, one at a time, each to its end."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """``environment`` are variables besides those of this process."""
        self._environment = dict(environment or {})

    def run(self, job: Mapping[str, Any], *, python: str = sys.executable) -> Answer:
        """What the process says to the job; killed, and the test failed, when it does not end."""
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [python, str(_WORKER), "--events-fd", str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            env={**os.environ, **self._environment},
        )
        os.close(writing)
        heard: list[bytes] = []
        listener = threading.Thread(target=lambda: heard.append(_all_of(reading)), daemon=True)
        listener.start()
        printed: list[bytes] = []
        assert process.stdin is not None and process.stdout is not None
        stdout = process.stdout
        reader = threading.Thread(target=lambda: printed.append(stdout.read()), daemon=True)
        reader.start()
        try:
            # Its stdin stays open: its end would end the process.
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            code = process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the bench process did not end within {DEADLINE_SECONDS:g} s: {job}")
        finally:
            process.kill()
            process.wait()
            for thread in (listener, reader):
                thread.join(DEADLINE_SECONDS)
            process.stdin.close()
            process.stdout.close()
        events = tuple(json.loads(line) for line in b"".join(heard).splitlines())
        return Answer(events, code, b"".join(printed).decode("utf-8", "replace"))


def _all_of(descriptor: int) -> bytes:
    with open(descriptor, "rb") as stream:
        return stream.read()


@pytest.fixture
def bench_child() -> Iterator[BenchChild]:
    """The bench process, for jobs of the test's own: ``bench_child.run({"kind": "probe"})``."""
    yield BenchChild()
