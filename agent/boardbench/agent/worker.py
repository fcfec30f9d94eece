"""A bench process seen from the agent: its job in, its events and its last words out, and its end.

Whatever runs in it is not trusted. It gets a session of its own so that everything it starts can be
killed with it, a scratch folder, and nothing of the agent's own environment variables; what it says is
bounded before it is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.config import ENVIRONMENT_PREFIX

BENCH = Path(__file__).parent / "bench" / "__main__.py"

# A million samples of 12 digits, and the per-op list of the largest model.
LINE_LIMIT_BYTES = 48 * 1024 * 1024
# All events of a run together: progress is small and comes a few times a second.
EVENTS_LIMIT_BYTES = 2 * LINE_LIMIT_BYTES
# Four a second for the longest run that can be asked for is a third of this.
EVENTS_LIMIT = 1_000_000
# Two screens: enough for the end of a traceback and of what the engine printed before it.
TAIL_LIMIT_BYTES = 8 * 1024
# A job is written at once, before anybody reads: it has to fit into the pipe, which holds 64 KiB on Linux.
JOB_LIMIT_BYTES = 32 * 1024
# A full pipe is read at most this often, so that a worker that floods it can't keep the agent busy.
_FLOOD_PAUSE_SECONDS = 0.005
_PIPE_BYTES = 64 * 1024
# Engines colour their log (ECMA-48, "select graphic rendition"), whoever reads it.
_COLOUR = re.compile("\x1b\\[[0-9;]*m")
# After the worker's end its pipes are empty at once, unless something that left its session holds them.
_DRAIN_SECONDS = 1.0


@dataclass(frozen=True)
class WorkerEnd:
    """How the process ended: by a signal ("SIGSEGV", else empty), or with an exit code."""

    exit_code: int | None
    signal: str


class Worker:
    """One bench process. Made by :func:`start`; ends when it ends, or by :meth:`kill`."""

    def __init__(self, process: subprocess.Popen[bytes], lines: _Lines, tail: _Tail) -> None:
        self._process = process
        self._lines = lines
        self._tail = tail
        self._end: asyncio.Future[WorkerEnd] = asyncio.get_running_loop().create_future()
        self._watch()

    @property
    def pid(self) -> int:
        """Its process id, also the id of its session and process group."""
        return self._process.pid

    @property
    def output_tail(self) -> str:
        """The last lines that it wrote to stdout and stderr, made printable."""
        return self._tail.text()

    def tell(self, line: bytes) -> None:
        """Writes one short line to it, without its end; one that has ended does not hear it."""
        if self._end.done() or self._process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """Kills it and everything in its session. Idempotent; :meth:`ended` tells when it is gone."""
        if not self._end.done():
            _kill_group(self.pid)

    async def ended(self) -> WorkerEnd:
        """How it ended, once it has, and once all that it said was heard."""
        end = await asyncio.shield(self._end)
        await asyncio.wait([self._lines.closed, self._tail.closed], timeout=_DRAIN_SECONDS)
        self._lines.close()
        self._tail.close()
        return end

    def _watch(self) -> None:
        """Notices the end without reaping: until then the process id, and so its group, is not reused."""
        loop = asyncio.get_running_loop()
        try:
            descriptor = os.pidfd_open(self.pid)
        except (AttributeError, OSError):
            # Other systems, Linux before 5.3, some emulators.
            waiting = threading.Thread(target=_wait, args=(self._process, loop, self._reap), daemon=True)
            waiting.start()
            return

        def exited() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._reap()

        loop.add_reader(descriptor, exited)

    def _reap(self) -> None:
        # What the worker started and left behind would disturb the next run.
        _kill_group(self.pid)
        code = self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._end.set_result(WorkerEnd(code, "") if code >= 0 else WorkerEnd(None, _signal_name(-code)))


async def start(
    interpreter: str,
    job: bytes,
    scratch: Path,
    on_line: Callable[[bytes], None],
    on_flood: Callable[[str], None],
    environment: Mapping[str, str] = os.environ,
) -> Worker:
    """A bench process of that interpreter that has been given the job.

    ``on_line`` is called for each line of events, without its end; ``on_flood`` once, with what was too
    much, when a line or all of them exceed their limit: nothing more is read then. ``scratch`` exists and
    becomes its working and temporary folder. Raises OSError when the process can't be started.
    """
    if len(job) > JOB_LIMIT_BYTES:
        raise ValueError(f"a job has at most {JOB_LIMIT_BYTES} bytes, not {len(job)}")
    events_in, events_out = os.pipe()
    output_in, output_out = os.pipe()
    try:
        process = subprocess.Popen(  # noqa: ASYNC220 - returns as soon as the program is loaded
            [interpreter, os.fspath(BENCH), "--events-fd", str(events_out)],
            stdin=subprocess.PIPE,
            stdout=output_out,
            stderr=output_out,
            pass_fds=(events_out,),
            start_new_session=True,
            cwd=scratch,
            env=_worker_environment(environment, scratch),
        )
    except BaseException:
        os.close(events_in)
        os.close(output_in)
        raise
    finally:
        os.close(events_out)
        os.close(output_out)
    _forbid_core_file(process.pid)
    loop = asyncio.get_running_loop()
    lines, tail = _Lines(on_line, on_flood), _Tail()
    worker = Worker(process, lines, tail)
    try:
        with contextlib.ExitStack() as unread:
            unread.callback(os.close, output_in)
            await loop.connect_read_pipe(lambda: lines, os.fdopen(events_in, "rb", buffering=0))
            unread.pop_all()
            await loop.connect_read_pipe(lambda: tail, os.fdopen(output_in, "rb", buffering=0))
    except BaseException:
        worker.kill()
        await worker.ended()
        raise
    # It may have ended already, and its pipe with it.
    if process.stdin is not None and not process.stdin.closed:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job + b"\n")
            process.stdin.flush()
    return worker


class _Reader(asyncio.Protocol):
    """One pipe from the worker, until it is closed at either end."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.ReadTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.ReadTransport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        if not self.closed.done():
            self.closed.set_result(None)

    def close(self) -> None:
        """Reads no more. Idempotent."""
        if self._transport is not None:
            self._transport.close()


class _Lines(_Reader):
    """Events, cut into lines and bounded."""

    def __init__(self, on_line: Callable[[bytes], None], on_flood: Callable[[str], None]) -> None:
        super().__init__()
        self._on_line = on_line
        self._on_flood = on_flood
        self._begun = bytearray()
        self._total = 0
        self._count = 0

    def data_received(self, data: bytes) -> None:
        self._total += len(data)
        # Only the new bytes can hold the end of a line: a long one is not searched again and again.
        searched = len(self._begun)
        self._begun += data
        while (end := self._begun.find(b"\n", searched)) >= 0:
            line = bytes(self._begun[:end])
            del self._begun[: end + 1]
            searched = 0
            self._count += 1
            self._on_line(line)
        if len(self._begun) > LINE_LIMIT_BYTES:
            self._flooded(f"a line of events is longer than {LINE_LIMIT_BYTES} bytes")
        elif self._total > EVENTS_LIMIT_BYTES:
            self._flooded(f"its events are more than {EVENTS_LIMIT_BYTES} bytes")
        elif self._count > EVENTS_LIMIT:
            self._flooded(f"it sent more than {EVENTS_LIMIT} events")

    def _flooded(self, what: str) -> None:
        self._begun.clear()
        self.close()
        self._on_flood(what)


class _Tail(_Reader):
    """The end of what was printed."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = bytearray()

    def data_received(self, data: bytes) -> None:
        self._kept += data
        del self._kept[:-TAIL_LIMIT_BYTES]
        if len(data) >= _PIPE_BYTES and self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(_FLOOD_PAUSE_SECONDS, self._resume, self._transport)

    def _resume(self, transport: asyncio.ReadTransport) -> None:
        if not transport.is_closing():
            transport.resume_reading()

    def text(self) -> str:
        """What is kept, without control characters: it is shown on terminals."""
        text = self._kept.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
        text = _COLOUR.sub("", text)
        return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _worker_environment(environment: Mapping[str, str], scratch: Path) -> dict[str, str]:
    kept = {name: value for name, value in environment.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    return {
        **kept,
        "TMPDIR": os.fspath(scratch),
        # What was printed before a crash is in the pipe and not in a buffer that died.
        "PYTHONUNBUFFERED": "1",
        # onnxruntime from 1.32 on keeps a database of its use in the user's cache.
        "ORT_DISABLE_TELEMETRY": "1",
    }


def _forbid_core_file(pid: int) -> None:
    """A core file of gigabytes would fill an SD card, and delay the end of the process by minutes."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _wait(
    process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop, then: Callable[[], None]
) -> None:
    if hasattr(os, "waitid"):
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    else:
        process.wait()
    # The loop is closed when the agent itself is ending.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(then)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
