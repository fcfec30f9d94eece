"""What surrounds a run, watched from outside the worker: load, clocks, heat and memory of the board.

Sources: proc_loadavg(5), proc_meminfo(5), proc_stat(5), proc_pid_stat(5).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from boardbench.agent.board.identify import EMULATORS, memory_bytes
from boardbench.agent.board.sensor import Reading, Sensor
from boardbench.agent.board.sensors import cpufreq, find_all
from boardbench.v1 import board_pb2, result_pb2

# Other work that takes more than this share of the processors can be seen in the figures.
_HIGH_LOAD_SHARE = 0.10
# A host that takes more than this share of the time away is seen in the tail.
_HIGH_STEAL_SHARE = 0.01
# The kernel counts processor time in hundredths of a second; below half a second that is too coarse.
_SHORTEST_WINDOW_SECONDS = 0.5
# Limits are rounded by drivers; less than this below the maximum is no cap.
_CAPPED_BELOW = 0.99

# Warnings that this file may give, and what each means.
WARNINGS = {
    "high_load": "Other work on the board took processor time while the run was measured.",
    "cpu_steal": "The host of this virtual machine took processor time away while the run was measured.",
    "throttled": "The kernel slowed the processors down against heat during the run.",
    "frequency_capped": "The processors were not allowed to run at their full frequency.",
    "emulated": "The board is an emulator: its timings are no performance.",
}


@dataclass(frozen=True)
class _Ticks:
    """Processor seconds since boot: all that was worked, all that was stolen, and the worker's own."""

    time: float
    busy: float
    stolen: float
    worker: float


class Surroundings:
    """Watches the board around one run. Made when the run begins; nothing here may make a run fail."""

    def __init__(
        self,
        root: Path,
        board: board_pb2.Board,
        sensors: list[Sensor] | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._root = root
        self._board = board
        self._sensors = find_all(root) if sensors is None else sensors
        self._clock = clock
        self._environment = board_pb2.Environment()
        self._warnings: list[result_pb2.Warning] = []
        self._coolings: list[Sensor] = []
        self._cooling_steps = 0.0
        self._ticks: _Ticks | None = None
        self._begin()

    def _begin(self) -> None:
        environment = self._environment
        readings = self._read(self._sensors)
        # Only these are read while the run goes on: asking a core for its frequency wakes it.
        cooling = {reading.source for reading in readings if reading.quantity == "cooling_steps"}
        self._coolings = [sensor for sensor in self._sensors if sensor.name in cooling]
        load = _load_average(self._root)
        if load is not None:
            environment.load_average_before = load
        available = memory_bytes(self._root).get("MemAvailable")
        if available is not None:
            environment.memory_available_before_bytes = available
            environment.memory_available_least_bytes = available
        hottest = _hottest(readings)
        if hottest is not None:
            environment.temperature_before_celsius = hottest
        if self._board.emulator in EMULATORS:
            self._warn(
                "emulated", f"this board runs under {self._board.emulator}: timings here are no performance"
            )

    def sample(self) -> None:
        """Looks once; called a few times a second while the run goes on."""
        available = memory_bytes(self._root).get("MemAvailable")
        environment = self._environment
        if available is not None and environment.HasField("memory_available_least_bytes"):
            environment.memory_available_least_bytes = min(
                environment.memory_available_least_bytes, available
            )
        self._watch_cooling(self._read(self._coolings))

    def measurement_begins(self, pid: int) -> None:
        """Takes the processor time used so far by the worker and by everybody."""
        self._ticks = self._count(pid)

    def measurement_ends(self, pid: int) -> None:
        """Judges what else the processors did in between; takes the frequency under load."""
        readings = self._read(self._sensors)
        self._watch_cooling(readings)
        self._take_frequency(readings)
        before, after = self._ticks, self._count(pid)
        if before is None or after is None or after.time - before.time < _SHORTEST_WINDOW_SECONDS:
            return
        seconds = after.time - before.time
        processors = max(1, self._board.cpu_count)
        others = (after.busy - before.busy - (after.worker - before.worker)) / seconds
        if others > _HIGH_LOAD_SHARE * processors:
            self._warn(
                "high_load",
                f"other programs used {others:.2f} of {processors} processors during the measurement: "
                "stop them, or expect slower and less steady figures",
            )
        stolen = (after.stolen - before.stolen) / seconds / processors
        if stolen > _HIGH_STEAL_SHARE:
            self._warn(
                "cpu_steal",
                f"the host of this virtual machine took {stolen:.1%} of the processor time away during the "
                "measurement: expect a longer tail than the processor itself would give",
            )

    def end(self) -> tuple[board_pb2.Environment, list[result_pb2.Warning]]:
        """What was seen, and the doubts that follow from it."""
        environment = self._environment
        self.sample()
        load = _load_average(self._root)
        if load is not None:
            environment.load_average_after = load
        environment.cpu_governor = cpufreq.governor(self._root)
        hottest = _hottest(self._read(self._sensors))
        if hottest is not None:
            environment.temperature_after_celsius = hottest
        if self._cooling_steps > 0:
            heat = f" at {hottest:.0f} °C" if hottest is not None else ""
            self._warn(
                "throttled",
                f"the kernel slowed the processors down by {self._cooling_steps:.0f} steps{heat}: "
                "cool the board, then run again",
            )
        return environment, self._warnings

    def _warn(self, code: str, message: str) -> None:
        self._warnings.append(result_pb2.Warning(code=code, message=message))

    @staticmethod
    def _read(sensors: list[Sensor]) -> list[Reading]:
        return [reading for sensor in sensors for reading in _read_once(sensor)]

    def _watch_cooling(self, readings: list[Reading]) -> None:
        steps = (reading.value for reading in readings if reading.quantity == "cooling_steps")
        self._cooling_steps = max(self._cooling_steps, max(steps, default=0.0))

    def _take_frequency(self, readings: list[Reading]) -> None:
        now = [reading.value for reading in readings if reading.quantity == "frequency_hertz"]
        if now:
            self._environment.cpu_frequency_hertz = sum(now) / len(now)
        limit = {r.source: r.value for r in readings if r.quantity == "frequency_limit_hertz"}
        most = {r.source: r.value for r in readings if r.quantity == "frequency_maximum_hertz"}
        capped = [name for name in limit if limit[name] < _CAPPED_BELOW * most.get(name, 0.0)]
        if capped:
            worst = min(capped, key=lambda name: limit[name] / most[name])
            self._warn(
                "frequency_capped",
                f"{worst} may run at {limit[worst] / 1e6:.0f} of {most[worst] / 1e6:.0f} MHz: "
                "see scaling_max_freq, the power mode of the board, and its power supply",
            )

    def _count(self, pid: int) -> _Ticks | None:
        """Processor seconds now; None where the system does not tell."""
        try:
            total = (self._root / "proc/stat").read_text().split("\n", 1)[0].split()
            worker = (self._root / f"proc/{pid}/stat").read_text().rpartition(")")[2].split()
            tick = os.sysconf("SC_CLK_TCK")
            user, nice, system, _, _, irq, softirq, steal = (int(field) / tick for field in total[1:9])
            # utime and stime are the 14th and 15th field; the name before them may hold spaces.
            return _Ticks(
                self._clock(),
                user + nice + system + irq + softirq,
                steal,
                (int(worker[11]) + int(worker[12])) / tick,
            )
        except (OSError, ValueError, IndexError):
            return None


def _read_once(sensor: Sensor) -> list[Reading]:
    """Its readings; none when it fails, since a broken sensor must not end a run."""
    try:
        return list(sensor.read())
    except OSError:
        return []


def _hottest(readings: list[Reading]) -> float | None:
    return max((r.value for r in readings if r.quantity == "temperature_celsius"), default=None)


def _load_average(root: Path) -> float | None:
    try:
        return float((root / "proc/loadavg").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
