"""What the sensors say while nothing is measured: now and then, and only those that cost next to nothing.

A run has its own sampler, ten times a second. For the heartbeats it is enough to know whether the board is
warm, throttled or clocked down; programs are not started for that, and no library of a vendor is loaded.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from boardbench.agent.board.sensor import Reading, Sensor, period_seconds
from boardbench.v1 import collector_pb2, telemetry_pb2

_log = logging.getLogger(__name__)

LEAST_SECONDS = 10.0
"""Between two reads: heat takes longer to come or go."""

COST_SHARE = 0.0005
"""Of one processor: where sensors are dear they are read less often."""

# Read at rest, the most telling first. The others tell what a run does, start programs or load libraries.
_LIGHT = (
    "raspberry_pi",
    "thermal",
    "over_current",
    "x86_throttle",
    "hwmon_power",
    "ina3221",
    "battery",
    "fan",
    "tegra_gpu",
    "cpufreq",
)
# Counters of which the collector keeps the history: how often the board was throttled since it booted.
_EVENTS = frozenset({"throttle_events", "over_current_events"})
# Its own library would be loaded to look for it.
_NVIDIA = "nvidia"
_NVIDIA_DRIVER = "proc/driver/nvidia/version"
# A heartbeat goes over every link there is; with the numbers of a field and its length.
_MOST_BYTES = 2800
_BYTES_EACH = 16


class AtRest:
    """The sensors of a board that waits; a party of the stream. Used from one event loop."""

    def __init__(
        self, root: Path, without: Iterable[str] = (), *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Looks at nothing yet. ``root`` holds ``sys`` and ``proc``; kinds in ``without`` are not read."""
        self._root = root
        self._without = frozenset(without)
        self._monotonic = monotonic
        self._kinds: tuple[str, ...] = ()
        self._sensors: list[Sensor] = []
        self._readings: tuple[Reading, ...] = ()
        self._next = 0.0
        self._reading: asyncio.Task[None] | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of sensors that the board has; empty before :meth:`look`."""
        return self._kinds

    @property
    def readings(self) -> Sequence[Reading]:
        """What they said last."""
        return self._readings

    def look(self) -> None:
        """Finds the sensors. Blocks on the kernel; called once."""
        from boardbench.agent.board import sensors

        kinds = []
        light: dict[str, list[Sensor]] = {}
        before = frozenset(sys.modules)
        for kind in sensors.KINDS:
            if kind in self._without:
                continue
            if kind == _NVIDIA:
                if (self._root / _NVIDIA_DRIVER).exists():
                    kinds.append(kind)
                continue
            name = f"{sensors.__name__}.{kind}"
            try:
                found = importlib.import_module(name).find(self._root)
            except OSError as error:
                _log.debug("%s: %s", kind, error)
                continue
            if found:
                kinds.append(kind)
            if found and kind in _LIGHT:
                light[kind] = [sensor for sensor in found if _is_light(sensor)]
        # Most boards have few of them: the others leave the memory again.
        for kind in sensors.KINDS:
            name = f"{sensors.__name__}.{kind}"
            if kind not in light and name not in before:
                sys.modules.pop(name, None)
                vars(sensors).pop(kind, None)
        self._kinds = tuple(kinds)
        self._sensors = [sensor for kind in _LIGHT for sensor in light.get(kind, ())]

    async def close(self) -> None:
        """Ends a read that goes on. Idempotent."""
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)

    # --- a party of the stream

    def connected(self) -> None:
        """Nothing is to be said again."""

    def beat(self, heartbeat: collector_pb2.Heartbeat) -> None:
        """Adds what was read last, and has it read again when that is old."""
        heartbeat.readings.extend(
            telemetry_pb2.Reading(quantity=reading.quantity, source=reading.source, value=reading.value)
            for reading in self._readings
        )
        self.refresh()

    def hear(self, response: collector_pb2.ReportResponse) -> None:
        """Nothing is for it."""

    def say(self) -> tuple[collector_pb2.ReportRequest, ...]:
        """It speaks in heartbeats only."""
        return ()

    def refresh(self) -> None:
        """Has the sensors read, unless that was lately."""
        if not self._sensors or self._monotonic() < self._next or self._reading is not None:
            return
        self._reading = asyncio.ensure_future(asyncio.to_thread(self.read))
        self._reading.add_done_callback(self._was_read)

    def _was_read(self, task: asyncio.Task[Any]) -> None:
        self._reading = None
        if not task.cancelled() and task.exception() is not None:
            _log.warning("sensors at rest: %s", task.exception())

    def read(self) -> None:
        """Reads all of them. Blocks; one thread at a time."""
        begin = time.thread_time()
        order = [
            reading
            for sensor in self._sensors
            for reading in _read(sensor)
            if not reading.cumulative or reading.quantity in _EVENTS
        ]
        self._readings = tuple(_fitting(order))
        spent = time.thread_time() - begin
        self._next = self._monotonic() + max(LEAST_SECONDS, spent / COST_SHARE)


def _fitting(readings: Iterable[Reading]) -> Iterator[Reading]:
    """As many as a heartbeat may carry."""
    size = 0
    for reading in readings:
        size += len(reading.quantity.encode()) + len(reading.source.encode()) + _BYTES_EACH
        if size > _MOST_BYTES:
            return
        yield reading


def _is_light(sensor: Sensor) -> bool:
    return not hasattr(sensor, "child_cpu_seconds") and period_seconds(sensor) <= LEAST_SECONDS


def _read(sensor: Sensor) -> list[Reading]:
    found: list[Reading] = []
    try:
        # One by one: those before an error count.
        for reading in sensor.read():
            found.append(reading)  # noqa: PERF402
    except OSError as error:
        _log.debug("%s: %s", sensor.name, error)
    return found
