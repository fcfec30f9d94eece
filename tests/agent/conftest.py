"""The fake engine and its models, for every suite of the agent."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
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


@pytest.fixture
async def listen() -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Serves parts of a collector until the test ends; their address.

    ``await listen(servicer, add_JobServiceServicer_to_server, …)``, with what adds it to a server.
    """
    import grpc

    servers: list[Any] = []

    async def begin(servicer: object, *adding: Callable[..., None]) -> str:
        servers.append(grpc.aio.server())
        for add in adding:
            add(servicer, servers[-1])
        port = servers[-1].add_insecure_port("127.0.0.1:0")
        await servers[-1].start()
        return f"127.0.0.1:{port}"

    yield begin
    for server in servers:
        await server.stop(None)


@pytest.fixture
def spools(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens spools in one folder and closes them."""
    # Engines are also tested under interpreters that have nothing else of the agent's.
    from boardbench.agent.spool import Spool

    opened: list[Spool] = []

    def open_spool(limit_bytes: int = 1 << 20, **options: Any) -> Spool:
        options.setdefault("free_share", 1.0)
        opened.append(Spool(tmp_path / "spool", limit_bytes, **options))
        return opened[-1]

    yield open_spool
    for spool in opened:
        spool.close()


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A folder that every user gets down to; pytest's own are for their owner."""
    with tempfile.TemporaryDirectory(prefix="boardbench-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def as_nobody() -> Callable[..., Any]:
    """Runs a program of the test's own as a user without rights; what it printed, as JSON.

    Where the tests run as root, that is the user 65534: root may write everything. What it is to reach must
    be in ``public_path``.
    """
    drop = "import os\nif os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"

    def run(program: str, *arguments: object, writable: Sequence[Path] = ()) -> Any:
        for folder in writable:
            folder.mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                os.chown(folder, 65534, 65534)
        imports, _, rest = textwrap.dedent(program).partition("\n\n")
        # Imported before: nobody may not read all that root may.
        head = f"import json, sys\nfrom pathlib import Path\n{imports}\n"
        done = subprocess.run(
            [sys.executable, "-c", head + drop + rest, *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
