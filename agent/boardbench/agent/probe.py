"""Which engines the board has. Asked of child processes: an engine can crash the one that imports it.

Each interpreter is asked by itself, so one that does not work takes only its own engines along; and so is
each engine that comes from elsewhere, so that it takes nothing along but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from boardbench.agent import wire, worker
from boardbench.agent.bench import runtimes
from boardbench.agent.config import AgentConfig
from boardbench.agent.errors import ConfigurationError
from boardbench.agent.formats import Mark
from boardbench.v1 import board_pb2, result_pb2

# A probe that was made this lately is not made again because somebody asks for what is not there.
_FRESH_SECONDS = 10.0
# Saying its version takes Python a moment, from a worn card seconds.
_VERSION_SECONDS = 20.0
# What the worker's own code needs.
_LEAST_PYTHON = (3, 9)
# Distributions name their engines by it.
_GROUP = "boardbench.runtimes"

Statuses = tuple[board_pb2.RuntimeStatus, ...]


class Engines:
    """The runtimes of the board, as the last probe found them. Used from one event loop."""

    def __init__(self, config: AgentConfig, scratch: Path) -> None:
        """``scratch`` is a folder for the probes, made when needed. Raises ConfigurationError."""
        self._own = {engine.name: engine for engine in runtimes.offered()}
        self._pythons = {
            name: os.path.expanduser(entry.python)  # noqa: PTH111 - a bare name is looked up on the PATH
            for name, entry in config.runtimes.items()
            if entry.python
        }
        self._timeout = config.deadlines.probe_seconds
        self._start_timeout = min(config.deadlines.start_seconds, self._timeout)
        self._scratch = scratch
        self._known: Statuses = ()
        # By the name of a runtime from elsewhere: the interpreter that has it.
        self._homes: dict[str, str] = {}
        self._marks: dict[str, tuple[Mark, ...]] = {}
        self._more_devices: dict[str, str] = {}
        # Those that were not over in time, with their distributions: waiting for them again helps nobody.
        self._hung: dict[str, board_pb2.RuntimeStatus] = {}
        self._probed_at: float | None = None
        self._closing = asyncio.Event()
        # Held while a run is measured, so that no probe disturbs it, and while a probe runs.
        self.quiet = asyncio.Lock()
        for name in config.runtimes:
            if name not in self._own and name not in self._pythons:
                known = ", ".join(self._own)
                raise ConfigurationError(
                    f"runtimes.{name}: there is no such runtime; boardbench knows {known}; for one that a "
                    "distribution brings, say with python which interpreter has it"
                )

    def interpreter(self, name: str) -> str:
        """Path of the Python that runs this runtime."""
        return self._pythons.get(name) or self._homes.get(name, sys.executable)

    @property
    def known(self) -> Statuses:
        """What the last probe found; empty before the first."""
        return self._known

    @property
    def more_devices(self) -> dict[str, str]:
        """By the name of a runtime from elsewhere: how devices come to it that the board lacks."""
        return self._more_devices

    @property
    def known_marks(self) -> tuple[Mark, ...]:
        """How files are known of formats that engines from elsewhere bring, those that were asked."""
        return tuple(mark for marks in self._marks.values() for mark in marks)

    async def statuses(self) -> Statuses:
        """Every runtime, boardbench's own first, in its order; probes when that was never done."""
        if self._probed_at is None:
            async with self.quiet:
                if self._probed_at is None:
                    await self._probe()
        return self._known

    async def marks(self) -> tuple[Mark, ...]:
        """How files are known of formats that engines from elsewhere bring; probes as ``statuses`` does."""
        await self.statuses()
        return self.known_marks

    async def status(self, name: str) -> board_pb2.RuntimeStatus | None:
        """One runtime, asked of a child of its own; None when there is none of that name."""
        if name in self._own:
            return await self._ask_one(name)
        for python in self._interpreters():
            if self._pythons.get(name, python) != python:
                continue
            with contextlib.suppress(_NoAnswer):
                offers = (await self._ask(python, (), self._start_timeout)).offers
                if name in offers:
                    self._homes[name] = python
                    return await self._ask_one(name, offers[name])
        return None

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

    def _interpreters(self) -> list[str]:
        """The agent's own, and those of the configuration, each once."""
        return list(dict.fromkeys((sys.executable, *self._pythons.values())))

    async def _probe(self) -> None:
        found: dict[str, board_pb2.RuntimeStatus] = {}
        # By interpreter: what distributions offer there, by name, or why nothing is known.
        offers: dict[str, dict[str, str]] = {}
        broken: dict[str, str] = {}
        for python in self._interpreters():
            names = [name for name in self._own if self.interpreter(name) == python]
            try:
                if python != sys.executable:
                    # Whether it works at all is soon said, and then not waited for once for each engine.
                    offers[python] = dict((await self._ask(python, (), self._start_timeout)).offers)
                offers[python] = await self._probe_all(python, names, found, offers.get(python))
            except _NoAnswer as error:
                broken[python] = str(error)
                for name in names:
                    found.setdefault(name, self._unavailable(name, str(error)))
        for name in self._own:
            if name not in found:
                found[name] = await self._ask_one(name)
        self._homes = self._homes_of(offers)
        self._marks = {name: marks for name, marks in self._marks.items() if name in self._homes}
        for name, python in self._homes.items():
            plugin = offers[python][name]
            hung = self._hung.get(name)
            if hung is not None and hung.plugin == plugin:
                found[name] = hung
            else:
                found[name] = await self._ask_one(name, plugin)
        for name, python in self._pythons.items():
            if name not in found:
                reason = broken.get(python) or self._nobody_offers(name, python, offers.get(python, {}))
                found[name] = self._unavailable(name, reason)
        self._known = (
            *(found[name] for name in self._own),
            *(found[name] for name in found if name not in self._own),
        )
        mark_defaults(self._known)
        self._probed_at = asyncio.get_running_loop().time()

    async def _probe_all(
        self,
        python: str,
        names: Sequence[str],
        found: dict[str, board_pb2.RuntimeStatus],
        offers: dict[str, str] | None,
    ) -> dict[str, str]:
        """Asks one child for all: that is quickest. Fills ``found``; what is offered there besides.

        When one engine takes the child down nothing is found, and each is to be asked by itself. Raises
        _NoAnswer when the interpreter says nothing at all.
        """
        # One alone is as well asked by itself.
        if len(names) > 1 or offers is None:
            with contextlib.suppress(_NoAnswer):
                answer = await self._ask(python, names, self._timeout)
                found.update((status.name, status) for status in answer.statuses if status.name in names)
                return dict(answer.offers)
        if offers is None:
            offers = dict((await self._ask(python, (), self._start_timeout)).offers)
        return offers

    def _homes_of(self, offers: dict[str, dict[str, str]]) -> dict[str, str]:
        """Which interpreter runs a runtime from elsewhere: the configured one, else the first that has it."""
        homes: dict[str, str] = {}
        for python, names in offers.items():
            for name in names:
                if name not in self._own and self._pythons.get(name, python) == python:
                    homes.setdefault(name, python)
        return homes

    def _nobody_offers(self, name: str, python: str, offers: Iterable[str]) -> str:
        there = ", ".join(offers) or "none"
        return (
            f"boardbench has no runtime {name!r} ({', '.join(self._own)}), and no distribution in {python} "
            f"offers it by an entry point of the group {_GROUP} (offered there: {there}): install one, or "
            f"mend the name in [runtimes.{name}]"
        )

    async def _ask_one(self, name: str, plugin: str = "") -> board_pb2.RuntimeStatus:
        """One runtime, of a child of its own; ``plugin`` is the distribution that offers it, if one does."""
        python = self.interpreter(name)
        try:
            answer = await self._ask(python, (name,), self._timeout)
            self._marks[name] = answer.marks
            self._more_devices.update(answer.more_devices)
            for status in answer.statuses:
                if status.name == name:
                    return status
            reason = f"{python} did not say whether it has it"
        except _NoAnswer as error:
            reason = f"{plugin}: {error}" if plugin else str(error)
            if plugin and isinstance(error, _TooLate):
                self._hung[name] = self._unavailable(
                    name, f"{reason}; it is asked again when the agent is started again", plugin
                )
                return self._hung[name]
        return self._unavailable(name, reason, plugin)

    def _unavailable(self, name: str, reason: str, plugin: str = "") -> board_pb2.RuntimeStatus:
        engine = self._own.get(name)
        return board_pb2.RuntimeStatus(
            name=name,
            reason=reason,
            formats=engine.formats if engine is not None else (),
            interpreter=board_pb2.Interpreter(path=self.interpreter(name)),
            plugin=plugin,
        )

    async def _ask(self, python: str, names: Sequence[str], seconds: float) -> wire.Probed:
        """What a child of that interpreter says about the runtimes of these names. Raises _NoAnswer."""
        answers: list[wire.Probed] = []
        complaints: list[str] = []

        def on_line(line: bytes) -> None:
            try:
                event = wire.parse_event(line)
            except wire.MalformedEvent as error:
                complaints.append(f"its answer was {error}")
                return
            if isinstance(event, wire.Probed):
                answers.append(event)
            elif isinstance(event, result_pb2.RunError):
                complaints.append(event.message)

        if self._closing.is_set():
            raise _NoAnswer("the agent is stopping")
        job = {"kind": "probe", "runtimes": list(names)}
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
            if os.sep in python and not os.path.isabs(python):  # noqa: PTH117 - as it is written
                raise _NoAnswer(f"{python} is no full path: write it from / on, in [runtimes]")
            child = await worker.start(
                python, json.dumps(job).encode(), self._scratch, on_line, complaints.append
            )
        except OSError as error:
            raise _NoAnswer(_not_started(python, error)) from error
        ended = asyncio.ensure_future(child.ended())
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait([ended, closing], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            in_time = ended.done()
        finally:
            closing.cancel()
            child.kill()
            end = await ended
        if not in_time:
            what = "importing it" if names else "asking it what there is"
            raise _TooLate(
                f"{what} under {python} was not over after {seconds:g} s: mend that, or give it longer with "
                f"deadlines.{'probe' if names else 'start'}_seconds"
            )
        if answers:
            return answers[0]
        if not complaints and (reason := await asyncio.to_thread(_no_python, python)):
            raise _NoAnswer(reason)
        if end.signal:
            raise _NoAnswer(f"importing it crashes {python} ({end.signal}); reinstall it, or another version")
        last = child.output_tail.strip().splitlines()[-1:]
        what = "; ".join(complaints[:1] or last or ["it said nothing"])
        raise _NoAnswer(f"{python} was asked about it and exited with {end.exit_code}: {what}")


def mark_defaults(statuses: Statuses) -> None:
    """Says of each runtime for which formats it is the default: the first that can run them."""
    taken: set[str] = set()
    for status in statuses:
        del status.default_formats[:]
        if status.available:
            status.default_formats.extend(format for format in status.formats if format not in taken)
            taken.update(status.formats)


class _NoAnswer(Exception):
    """A child said nothing usable; the message is a reason for a RuntimeStatus."""


class _TooLate(_NoAnswer):
    """It was not over in time."""


def _not_started(python: str, error: OSError) -> str:
    """Why an interpreter can't be started, and what to do."""
    if Path(python).is_dir():
        return f"{python} is a folder: name the interpreter in it (bin/python), in [runtimes]"
    return f"{python} can't be started: {error.strerror}; see [runtimes] in the agent's configuration"


def _no_python(python: str) -> str:
    """What is wrong with an interpreter that does not say its version, or too old a one; else empty."""
    command = [python, "-c", "import sys; sys.stdout.write('%d.%d' % sys.version_info[:2])"]
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} does not even say its version ({error}): name a Python in [runtimes]"
    said = done.stdout[:200].decode("utf-8", "replace").strip()
    version = re.fullmatch(r"(\d+)\.(\d+)", said)
    if done.returncode or version is None:
        told = said if said.isprintable() and said else "nothing"
        return (
            f"{python} is no Python: asked for its version it says {told} and exits with {done.returncode}; "
            "name the interpreter that has the engine, in [runtimes]"
        )
    if (int(version[1]), int(version[2])) < _LEAST_PYTHON:
        return (
            f"{python} is Python {said}, and engines run under {'.'.join(map(str, _LEAST_PYTHON))} or newer: "
            "install the engine for a newer one and name that, in [runtimes]"
        )
    return ""
