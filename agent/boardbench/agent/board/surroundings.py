"""What surrounds a run, watched from outside the worker: load, clocks, heat, supply, power and memory.

The sensors are sampled in a thread of their own, on one time axis, from before the worker starts to its
report; what the kernel counts by itself is read at the begin and the end of the measurement. What follows
from it is judged at the end, see :mod:`boardbench.agent.board.doubts`.

Sources: proc_loadavg(5); Documentation/ABI/stable/sysfs-devices-system-clocksource, Documentation/ABI/
testing/sysfs-platform_profile and, for ``trip_point_*``, Documentation/driver-api/thermal/sysfs-api.rst of
the Linux kernel; raspberrypi.com/documentation/computers/raspberry-pi.html, "frequency management and
thermal control".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.agent import wire
from boardbench.agent.board import doubts, energy, memory, sysfs, throttling
from boardbench.agent.board.accounts import Moment, moment, swap_used
from boardbench.agent.board.identify import EMULATORS, core_types, memory_bytes
from boardbench.agent.board.memory import BoardMemory, WorkerMemory
from boardbench.agent.board.policies import policies
from boardbench.agent.board.sampler import HERTZ, Sampler, Series
from boardbench.agent.board.sensor import Coverage, Reading, Sensor
from boardbench.agent.board.sensors import KINDS, cpufreq, find_all, power_mode, thermal
from boardbench.agent.board.timeline import Timeline, mean_of_all, to_message
from boardbench.agent.config import AgentConfig
from boardbench.agent.validity import DOUBTFUL, INVALID, NOTE, warn
from boardbench.v1 import board_pb2, result_pb2, scenario_pb2, telemetry_pb2

# Points that a series has at most in a result: a sustained run of an hour is one of a megabyte or two.
_POINTS = 2048
# Until then the first look at every sensor, which is the dearest, is all that there was.
_LEAST_SAMPLED_SECONDS = 2.0
# How long the sampler may take for its look at the end of the measurement.
_LAST_LOOK_SECONDS = 1.0
_LOOK_AGAIN_SECONDS = 0.002

# Where the firmware of a Raspberry Pi begins to hold the processors back.
_RASPBERRY_PI = "Raspberry Pi "
_RASPBERRY_PI_CELSIUS = 80.0
_SOFT_LIMIT_CELSIUS = 60.0
_WITH_SOFT_LIMIT = ("Raspberry Pi 3 Model A Plus", "Raspberry Pi 3 Model B Plus")

# Devices that are graphics cards, as engines call them.
_GRAPHICS_CARDS = ("cuda", "dml", "gpu", "migraphx", "nvtensorrt", "rocm", "tensorrt")

_DEFAULT_SPEC = result_pb2.BenchmarkSpec()


@dataclass(frozen=True)
class Seen:
    """All that was seen around a run."""

    environment: board_pb2.Environment
    # The doubts that follow from it; none about a measurement that did not take place.
    warnings: list[result_pb2.Warning]
    # Samples a second that were taken; 0: none.
    sample_hertz: float
    # None when nothing was sampled.
    telemetry: telemetry_pb2.Telemetry | None = None
    # None where no rail can be read, or nothing was measured.
    energy: telemetry_pb2.Energy | None = None
    memory: result_pb2.Memory = field(default_factory=result_pb2.Memory)
    # By the windows of the report, in their order.
    windows: list[scenario_pb2.Window] = field(default_factory=list)
    # How memory went in the end, in words.
    last_memory: str = ""


class Surroundings:
    """Watches the board around one run. Made when the run begins; nothing here may make a run fail.

    Making it, :meth:`look`, :meth:`run_begins` and :meth:`end` block on sensors: they belong into a thread of
    their own, one after the other. The others only note a moment.
    """

    def __init__(
        self,
        config: AgentConfig,
        board: board_pb2.Board,
        spec: result_pb2.BenchmarkSpec = _DEFAULT_SPEC,
        *,
        sensors: list[Sensor] | None = None,
        clock: Callable[[], float] = time.monotonic,
        peers: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        """``peers``: workers that are measured at the same time on purpose, whose work is nobody's fault."""
        self._root = root = config.sys_root
        self._config = config
        self._board = board
        self._spec = spec
        self._clock = clock
        self._peers = peers
        if sensors is None:
            sensors = find_all(root, (kind for kind in KINDS if kind not in config.sensors.without_kinds))
        self._sensors = sensors
        self._zones = [sensor for sensor in sensors if isinstance(sensor, thermal.ThermalZone)]
        self._worker = WorkerMemory(root)
        self._hertz = spec.sample_hertz if spec.HasField("sample_hertz") else config.spec.sample_hertz
        self._sampler = Sampler(
            [*sensors, BoardMemory(root), self._worker],
            hertz=self._hertz or HERTZ,
            cost_share=config.sensors.cost_share,
            points=_POINTS,
            clock=clock,
        )
        self._environment = board_pb2.Environment()
        self._warnings: list[result_pb2.Warning] = []
        self._power_mode = ""
        self._idle: list[Moment] = []
        self._measured: list[Moment] = []
        self._had_peers = False
        # Ticks of the sampler when the measurement ended.
        self._ticks_at_end = 0
        self._ended = False
        self._sampler.begin()
        self._began_nanoseconds = time.time_ns()
        self.look()
        self.run_begins()
        if board.emulator in EMULATORS:
            self._warnings.append(
                warn(
                    "emulated",
                    f"this board runs under {board.emulator}, whose timings are no performance",
                    INVALID,
                )
            )

    # --- what goes on

    def look(self) -> None:
        """Reads every sensor once; for before the sampling begins."""
        self._sampler.sample(all_of_them=True)

    @property
    def hottest_celsius(self) -> float | None:
        """The hottest zone when the sensors were last read; None without a sensor."""
        latest = self._sampler.latest("temperature_celsius")
        return max((latest[zone.name] for zone in self._zones if zone.name in latest), default=None)

    @property
    def has_rail(self) -> bool:
        """Whether power can be sampled, at a rail that can be counted on."""
        return self._hertz > 0 and self._rail() is not None

    def run_begins(self) -> None:
        """Takes what the board is like before the worker starts."""
        environment = self._environment
        load = _load_average(self._root)
        if load is not None:
            environment.load_average_before = load
        memory_now = memory_bytes(self._root)
        if "MemAvailable" in memory_now:
            environment.memory_available_before_bytes = memory_now["MemAvailable"]
        used = swap_used(memory_now)
        if used is not None:
            environment.swap_used_before_bytes = used
        hottest = self.hottest_celsius
        if hottest is not None:
            environment.temperature_before_celsius = hottest
        self._power_mode = _power_mode(self._root)

    def sample(self) -> None:
        """Samples from now on, in a thread; not at all where no samples are wanted."""
        if self._hertz > 0:
            self._sampler.start()

    def idle_begins(self) -> None:
        """The board rests from now on."""
        self._mark("idle_begins")
        self._idle = [moment(self._root, (), self._clock)]

    def idle_ends(self) -> result_pb2.Warning | None:
        """It no longer does; a warning when it did not rest."""
        self._mark("idle_ends")
        self._idle = [*self._idle[:1], moment(self._root, (), self._clock)]
        return self._judge_idle()

    def worker_started(self, pid: int) -> None:
        """Its memory is watched from now on."""
        self._worker.pid = pid

    def measurement_begins(self, pid: int) -> None:
        """Takes the processor time used so far by the worker and by everybody."""
        self._worker.pid = pid
        self._mark("measurement_begins")
        self._measured = [self._account(pid)]

    def measurement_ends(self, pid: int) -> None:
        """Takes it again."""
        # First of all, since the worker no longer does what is measured.
        self._measured = [*self._measured[:1], self._account(pid)]
        self._ticks_at_end = self._sampler.cost.ticks
        self._mark("measurement_ends")

    def _account(self, pid: int) -> Moment:
        together = dict.fromkeys((pid, *self._peers()))
        self._had_peers = len(together) > 1
        return moment(self._root, together, self._clock)

    def _mark(self, label: str) -> None:
        self._sampler.mark(label)
        if not self._hertz:
            self.look()

    def not_cooled(self, wanted_celsius: float, waited_seconds: float) -> result_pb2.Warning:
        """The board did not get as cool as was asked for; with no sensor, nobody knows."""
        found = self.hottest_celsius
        evidence = {"wanted_celsius": wanted_celsius, "waited_seconds": waited_seconds}
        if found is None:
            seen = (
                f"it was to be {wanted_celsius:g} °C at most, and nothing on this board tells how warm it is"
            )
        else:
            seen = (
                f"after {waited_seconds:.0f} s it was still {found:.1f} °C, and was to be {wanted_celsius:g}"
            )
            evidence["temperature_celsius"] = found
        return warn("not_cooled", seen, DOUBTFUL, time=_now(), evidence=evidence)

    def tuned(self, changes: Iterable[str]) -> None:
        """These settings were changed for the run."""
        self._environment.tuned.extend(changes)

    def _judge_idle(self) -> result_pb2.Warning | None:
        before, after = self._idle
        busy = doubts.other_seconds(before, after)
        seconds = after.seconds - before.seconds
        if busy is None or seconds < doubts.SHORTEST_SECONDS:
            return None
        share, limit = busy / seconds / self._processors, self._config.validity.idle_load_note
        if share <= limit:
            return None
        return warn(
            "idle_disturbed",
            f"{busy / seconds:.2f} of {self._processors} processors were busy while the idle board's power "
            "was measured",
            NOTE,
            time=_now(),
            evidence={"load_share": share, "idle_load_note_share": limit},
        )

    # --- what it was

    def end(self, report: result_pb2.RunResult | None = None) -> Seen:
        """Ends the sampling; what was seen, and what follows from it. ``report`` is the worker's."""
        self._stop()
        environment = self._environment
        load = _load_average(self._root)
        if load is not None:
            environment.load_average_after = load
        environment.cpu_governor = cpufreq.governor(self._root)
        environment.clock_source = sysfs.word(
            self._root / "sys/devices/system/clocksource/clocksource0/current_clocksource"
        )
        hottest = _hottest([reading for zone in self._zones for reading in _read_once(zone)])
        if hottest is not None:
            environment.temperature_after_celsius = hottest
        used = swap_used(memory_bytes(self._root))
        if used is not None:
            environment.swap_used_after_bytes = used
        power_mode_now = _power_mode(self._root)
        environment.power_mode = power_mode_now
        timeline = Timeline(self._sampler.series())
        self._take_memory(timeline)
        affinity = list(report.environment.cpu_affinity) if report is not None else []
        environment.cpu_core_types.extend(core_types(self._root, affinity))
        environment.throttling_readable = throttling.is_readable(timeline)
        begin, end = energy.window(self._sampler.marks, "measurement") or (None, None)
        cost = self._sampler.cost
        if begin is None or end is None or len(self._measured) < 2:
            environment.throttled_before.extend(throttling.before(timeline, float("inf")))
            return self._seen(timeline, report)
        measured = doubts.Measurement(
            timeline=timeline,
            begin=begin,
            end=end,
            before=self._measured[0],
            after=self._measured[1],
            time=self._time,
            limits=self._config.validity,
            processors=self._processors,
            allowed=[f"cpu{number}" for number in affinity],
            device=self._spec.device or "cpu",
            scenario=self._spec.scenario.kind,
            has_peers=self._had_peers,
            governor=environment.cpu_governor,
            policies=policies(self._root),
            zones=[zone.name for zone in self._zones],
            throttling_celsius=self._throttling_celsius(),
            memory_total_bytes=memory_bytes(self._root).get("MemTotal", 0),
            power_modes=(self._power_mode, power_mode_now),
        )
        self._take_measurement(measured)
        self._warnings.extend(doubts.of_measurement(measured))
        limit = self._config.validity.sensors_doubtful
        share = cost.cpu_share
        if share is not None and share > limit and cost.wall_seconds >= _LEAST_SAMPLED_SECONDS:
            self._warnings.append(
                warn(
                    "sensors_costly",
                    f"reading the sensors took {share:.1%} of a processor",
                    DOUBTFUL,
                    evidence={"cpu_share": share, "cpu_doubtful_share": limit},
                )
            )
        return self._seen(timeline, report, measured)

    def _stop(self) -> None:
        """Ends the sampling, once what was asked for at the end of the measurement has been read."""
        if self._ended:
            return
        self._ended = True
        if self._hertz and len(self._measured) > 1:
            deadline = time.monotonic() + _LAST_LOOK_SECONDS
            # The tick that was going on at the mark may have begun before it.
            while self._sampler.cost.ticks < self._ticks_at_end + 2 and time.monotonic() < deadline:
                time.sleep(_LOOK_AGAIN_SECONDS)
        self._sampler.stop()

    def _take_memory(self, timeline: Timeline) -> None:
        points = timeline.within(memory.AVAILABLE, memory.BOARD, 0.0, float("inf"))
        environment = self._environment
        if environment.HasField("memory_available_before_bytes"):
            least = min((point.least for point in points), default=float("inf"))
            environment.memory_available_least_bytes = int(
                min(least, environment.memory_available_before_bytes)
            )

    def _take_measurement(self, measured: doubts.Measurement) -> None:
        environment, timeline, begin, end = self._environment, measured.timeline, measured.begin, measured.end
        environment.throttled_before.extend(throttling.before(timeline, begin))
        environment.throttled_during.extend(dict.fromkeys(sign.words for sign in measured.signs()))
        processors = [s for s in timeline.sources("frequency_hertz") if doubts.is_processor(s)]
        frequencies = [hertz for _, hertz in mean_of_all(timeline, processors, begin, end)]
        if not frequencies:
            # It was over before the next sample.
            after = [timeline.first("frequency_hertz", source, begin) for source in processors]
            known = [point.value for point in after if point is not None]
            frequencies = [sum(known) / len(known)] if known else []
        if frequencies:
            environment.cpu_frequency_hertz = frequencies[-1]
            environment.cpu_frequency_least_hertz = min(frequencies)
        others = doubts.other_seconds(measured.before, measured.after)
        if others is not None:
            environment.other_cpu_seconds = others
        for resource in ("cpu", "io", "memory"):
            share = doubts.pressure(measured.before, measured.after, resource)
            if share is not None:
                setattr(environment, f"{resource}_pressure_share", share)

    def _seen(
        self,
        timeline: Timeline,
        report: result_pb2.RunResult | None,
        measured: doubts.Measurement | None = None,
    ) -> Seen:
        telemetry = None
        if self._hertz > 0:
            sampler = self._sampler
            telemetry = to_message(sampler.series(), sampler.marks, sampler.cost, sampler.hertz)
        return Seen(
            environment=self._environment,
            warnings=self._warnings,
            sample_hertz=self._sampler.hertz if self._hertz > 0 else 0.0,
            telemetry=telemetry,
            energy=self._energy(report) if report is not None else None,
            memory=self._memory(timeline),
            windows=self._windows(measured, report) if measured is not None and report is not None else [],
            last_memory=memory.last_words(timeline) if self._hertz > 0 else "",
        )

    def _memory(self, timeline: Timeline) -> result_pb2.Memory:
        """What is known of it from outside the worker."""
        found = result_pb2.Memory()
        environment = self._environment
        if environment.HasField("memory_available_least_bytes"):
            found.available_drop_bytes = (
                environment.memory_available_before_bytes - environment.memory_available_least_bytes
            )
        swapped = timeline.within(memory.SWAPPED, memory.WORKER, 0.0, float("inf"))
        if swapped:
            found.peak_swap_bytes = int(max(point.greatest for point in swapped))
        for source in timeline.sources("accelerator_memory_bytes"):
            name, _, pid = source.rpartition(" pid ")
            if name and pid == str(self._worker.pid):
                held = timeline.within("accelerator_memory_bytes", source, 0.0, float("inf"))
                found.accelerator_bytes += int(max(point.greatest for point in held))
                found.accelerator_source = "nvmap" if name == "nvmap" else "nvml"
        return found

    def _energy(self, report: result_pb2.RunResult) -> telemetry_pb2.Energy | None:
        found = energy.per_inference(
            self._rails(),
            self._sampler.marks,
            _inferences(report),
            wanted=self._config.sensors.rail,
            on_accelerator=self._on_graphics_card,
        )
        if found is None:
            return None
        message = telemetry_pb2.Energy(
            rail=found.run.rail.name,
            method=found.method,
            mean_watts=found.run.watts,
            energy_joules=found.run.joules,
            total_energy_per_inference_joules=found.total_joules,
            inferences=found.inferences,
        )
        if found.idle is not None:
            message.idle_watts = found.idle.watts
        for name, joules in (
            ("energy_per_inference_joules", found.joules),
            ("energy_per_inference_low_joules", found.low_joules),
            ("energy_per_inference_high_joules", found.high_joules),
        ):
            if joules is not None:
                setattr(message, name, joules)
        return message

    def _windows(
        self, measured: doubts.Measurement, report: result_pb2.RunResult
    ) -> list[scenario_pb2.Window]:
        """For each window of the report: heat, clock, power and throttling."""
        timeline, rail = measured.timeline, self._rail()
        processors = [s for s in timeline.sources("frequency_hertz") if doubts.is_processor(s)]
        readable = throttling.is_readable(timeline)
        found = []
        for window in report.scenario.windows:
            begin, end = measured.begin + window.begin_seconds, measured.begin + window.end_seconds
            told = scenario_pb2.Window()
            heat = [timeline.mean("temperature_celsius", zone.name, begin, end) for zone in self._zones]
            known = [celsius for celsius in heat if celsius is not None]
            if known:
                told.temperature_celsius = max(known)
            clocks = [timeline.mean("frequency_hertz", source, begin, end) for source in processors]
            hertz = [clock for clock in clocks if clock is not None]
            if hertz:
                told.cpu_frequency_hertz = sum(hertz) / len(hertz)
            used = energy.over(rail, begin, end) if rail is not None else None
            if used is not None:
                told.power_watts = used.watts
            if readable:
                told.throttled = bool(
                    throttling.signs(timeline, begin, end, accelerator=measured.on_accelerator, mark=False)
                )
            found.append(told)
        return found

    def _rails(self) -> Mapping[tuple[str, str], Series]:
        """What was sampled, without the graphics card's own power where it has no part in the run."""
        return {
            key: series
            for key, series in self._sampler.series().items()
            if series.coverage is not Coverage.DEVICE or self._on_graphics_card or self._config.sensors.rail
        }

    def _rail(self) -> energy.Rail | None:
        found = energy.rails(self._rails(), on_accelerator=self._on_graphics_card)
        return energy.choose(found, self._config.sensors.rail)

    @property
    def _on_graphics_card(self) -> bool:
        return self._spec.device.lower().startswith(_GRAPHICS_CARDS)

    @property
    def _processors(self) -> int:
        return max(1, self._board.cpu_count)

    def _throttling_celsius(self) -> Mapping[str, float]:
        """Where zones begin to throttle, as far as that is known."""
        limits = {
            zone.name: celsius for zone in self._zones if (celsius := _trip(zone.path.parent)) is not None
        }
        if self._board.model.startswith(_RASPBERRY_PI):
            soft = self._board.model.startswith(_WITH_SOFT_LIMIT)
            celsius = _SOFT_LIMIT_CELSIUS if soft else _RASPBERRY_PI_CELSIUS
            limits |= {zone.name: celsius for zone in self._zones if zone.name == "cpu-thermal"}
        return limits

    def _time(self, seconds: float) -> Timestamp:
        """A moment of the sampler's axis as time of day."""
        return wire.timestamp(self._began_nanoseconds + int(seconds * 1e9))


def _now() -> Timestamp:
    return wire.timestamp(time.time_ns())


def _inferences(report: result_pb2.RunResult) -> int:
    """How many were done in the measurement, each of a batch or query counted by itself."""
    scenario, wall_seconds = report.scenario, report.environment.wall_seconds
    if scenario.HasField("throughput_hertz") and wall_seconds > 0:
        return round(scenario.throughput_hertz * wall_seconds)
    return sum(window.count for window in scenario.windows) or report.latency.count


def _read_once(sensor: Sensor) -> list[Reading]:
    """Its readings; none when it fails, since a broken sensor must not end a run."""
    try:
        return list(sensor.read())
    except OSError:
        return []


def _hottest(readings: list[Reading]) -> float | None:
    return max((r.value for r in readings if r.quantity == "temperature_celsius"), default=None)


def _trip(zone: Path) -> float | None:
    """The least temperature at which the zone holds something back; None where it says none."""
    found = []
    for path in sysfs.listed(zone, "trip_point_"):
        if path.name.endswith("_type") and sysfs.word(path) == "passive":
            try:
                celsius = sysfs.number(path.with_name(path.name.replace("_type", "_temp"))) / 1000
            except OSError:
                continue
            # Below freezing it is switched off.
            if celsius > 0:
                found.append(celsius)
    return min(found, default=None)


def _power_mode(root: Path) -> str:
    """The mode that nvpmodel has set, or the profile of the platform; empty where there is neither."""
    try:
        mode = power_mode.power_mode(root)
    except OSError:
        mode = None
    if mode is not None:
        return mode.name or f"mode {mode.index}"
    return sysfs.word(root / "sys/firmware/acpi/platform_profile")


def _load_average(root: Path) -> float | None:
    try:
        return float(sysfs.word(root / "proc/loadavg").split()[0])
    except (ValueError, IndexError):
        return None
