"""Which engines the board has. Asked of child processes: an engine can crash the one that imports it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

from boardbench.agent import wire, worker
from boardbench.agent.bench import runtimes
from boardbench.agent.config import AgentConfig
from boardbench.agent.errors import ConfigurationError
from boardbench.v1 import board_pb2, result_pb2

# A probe that was made this lately is not made again because somebody asks for what is not there.
_FRESH_SECONDS = 10.0

Statuses = tuple[board_pb2.RuntimeStatus, ...]


class Engines:
    """The runtimes of the board, as the last probe found them. Used from one event loop."""

    def __init__(self, config: AgentConfig, scratch: Path) -> None:
        """``scratch`` is a folder for the probes, made when needed. Raises ConfigurationError."""
        self._engines = {engine.name: engine for engine in runtimes.offered()}
        self._pythons = {name: entry.python for name, entry in config.runtimes.items() if entry.python}
        self._timeout = config.deadlines.probe_seconds
        self._scratch = scratch
        self._known: Statuses = ()
        self._probed_at: float | None = None
        self._closing = asyncio.Event()
        # Held while a run is measured, so that no probe disturbs it, and while a probe runs.
        self.quiet = asyncio.Lock()
        for name in config.runtimes:
            if name not in self._engines:
                known = ", ".join(self._engines)
                raise ConfigurationError(
                    f"runtimes.{name}: there is no such runtime; boardbench knows {known}"
                )

    def interpreter(self, name: str) -> str:
        """Path of the Python that runs this runtime."""
        return self._pythons.get(name, sys.executable)

    @property
    def known(self) -> Statuses:
        """What the last probe found; empty before the first."""
        return self._known

    async def statuses(self) -> Statuses:
        """Every runtime that boardbench knows, in its order; probes when that was never done."""
        if self._probed_at is None:
            async with self.quiet:
                if self._probed_at is None:
                    await self._probe()
        return self._known

    async def status(self, name: str) -> board_pb2.RuntimeStatus | None:
        """One runtime, asked of a child of its own; None when boardbench knows none of that name."""
        return await self._ask_one(name) if name in self._engines else None

    async def refresh(self) -> Statuses:
        """The same after a new probe, unless a run is going on or the last probe is fresh."""
        now = asyncio.get_running_loop().time()
        fresh = self._probed_at is not None and now - self._probed_at < _FRESH_SECONDS
        if not fresh and not self.quiet.locked():
            async with self.quiet:
                await self._probe()
        return await self.statuses()

    def close(self) -> None:
        """Ends a probe that is going on, whose answers are then worth nothing. Idempotent."""
        self._closing.set()

    async def _probe(self) -> None:
        found: dict[str, board_pb2.RuntimeStatus] = {}
        if not self._pythons:
            # One child for all is quickest; when one engine takes it down, each is asked by itself.
            with contextlib.suppress(_NoAnswer):
                found = {status.name: status for status in await self._ask(sys.executable, None)}
        for name in self._engines:
            if name not in found:
                found[name] = await self._ask_one(name)
        self._known = tuple(found[name] for name in self._engines)
        self._probed_at = asyncio.get_running_loop().time()

    async def _ask_one(self, name: str) -> board_pb2.RuntimeStatus:
        python = self.interpreter(name)
        try:
            for status in await self._ask(python, name):
                if status.name == name:
                    return status
            reason = f"{python} did not say whether it has it"
        except _NoAnswer as error:
            reason = str(error)
        return board_pb2.RuntimeStatus(
            name=name,
            reason=reason,
            formats=self._engines[name].formats,
            interpreter=board_pb2.Interpreter(path=python),
        )

    async def _ask(self, python: str, name: str | None) -> Statuses:
        """What a child of that interpreter says about one engine or all. Raises _NoAnswer."""
        answers: list[Statuses] = []
        complaints: list[str] = []

        def on_line(line: bytes) -> None:
            try:
                event = wire.parse_event(line)
            except wire.MalformedEvent as error:
                complaints.append(f"its answer was {error}")
                return
            if isinstance(event, tuple):
                answers.append(event)
            elif isinstance(event, result_pb2.RunError):
                complaints.append(event.message)

        if self._closing.is_set():
            raise _NoAnswer("the agent is stopping")
        job = {"kind": "probe"} if name is None else {"kind": "probe", "runtime": name}
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            child = await worker.start(
                python, json.dumps(job).encode(), self._scratch, on_line, complaints.append
            )
        except OSError as error:
            raise _NoAnswer(
                f"{python} can't be started: {error.strerror}; see [runtimes] in the agent's configuration"
            ) from error
        ended = asyncio.ensure_future(child.ended())
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait([ended, closing], timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            in_time = ended.done()
        finally:
            closing.cancel()
            child.kill()
            end = await ended
        if not in_time:
            raise _NoAnswer(f"importing it under {python} was not over after {self._timeout:g} s")
        if answers:
            return answers[0]
        if end.signal:
            raise _NoAnswer(f"importing it crashes {python} ({end.signal}); reinstall it, or another version")
        last = child.output_tail.strip().splitlines()[-1:]
        what = "; ".join(complaints[:1] or last or ["it said nothing"])
        raise _NoAnswer(f"{python} was asked about it and exited with {end.exit_code}: {what}")


class _NoAnswer(Exception):
    """A child said nothing usable; the message is a reason for a RuntimeStatus."""
