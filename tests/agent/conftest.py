"""The fake engine and its models, for every suite of the agent."""

from __future__ import annotations

import asyncio
import json
import stat
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offers the engine "fake", here and in every child."""
    monkeypatch.setenv("BOARDBENCH_FAKE_RUNTIME", "1")


@pytest.fixture
def fake_model(tmp_path: Path, fake_engine: None) -> Callable[..., Path]:
    """Writes a model of the fake engine: ``fake_model(create=[{"hang": True}])``."""
    count = 0

    def write(**content: Any) -> Path:
        nonlocal count
        count += 1
        path = tmp_path / f"model{count}.fake"
        path.write_text("boardbench-fake/1\n" + json.dumps(content))
        return path

    return write


@pytest.fixture
def worker_program(tmp_path: Path) -> Callable[[str], str]:
    """Makes an "interpreter" that is a program of the test's own: ``say(event)`` writes to the agent."""
    count = 0
    head = f"""\
        #!{sys.executable}
        import json, os, sys, time
        events = int(sys.argv[3])
        job = json.loads(sys.stdin.readline())
        def say(event):
            raw = event if isinstance(event, bytes) else json.dumps(event).encode() + b"\\n"
            left = memoryview(raw)
            while left:
                left = left[os.write(events, left):]
        def stage(name):
            say({{"event": "stage", "stage": "STAGE_" + name}})
        RESULT = {{"latency": {{"count": 2, "samples_nanoseconds": [1000, 2000]}}}}
        """

    def write(body: str) -> str:
        nonlocal count
        count += 1
        path = tmp_path / f"interpreter{count}"
        path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return write


@pytest.fixture
def until() -> Callable[..., Awaitable[Any]]:
    """Waits in the event loop until a check holds; its answer. Fails when it never does."""

    async def wait(check: Callable[[], Any], what: str = "it holds", seconds: float = 30.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := check()):
            if time.monotonic() > deadline:
                pytest.fail(f"waited {seconds:g} s in vain until {what}")
            await asyncio.sleep(0.01)
        return found

    return wait
