"""Doubts about a measurement, found in what surrounded it. The rules are in :mod:`boardbench.agent.validity`.

Nothing is read here: what was seen goes in, warnings come out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.agent.board import memory, throttling
from boardbench.agent.board.accounts import Moment
from boardbench.agent.board.policies import Policy
from boardbench.agent.board.timeline import Timeline, fastest
from boardbench.agent.config import ValidityConfig
from boardbench.agent.validity import DOUBTFUL, INVALID, NOTE, Severity, warn
from boardbench.v1 import result_pb2, scenario_pb2

# The kernel counts processor time in hundredths of a second; below half a second that is too coarse.
SHORTEST_SECONDS = 0.5

_SUSTAINED = scenario_pb2.SCENARIO_KIND_SUSTAINED
# Between two inferences the processors rest there, and governors let them.
_RESTING = (scenario_pb2.SCENARIO_KIND_PERIODIC, scenario_pb2.SCENARIO_KIND_POISSON)

# Stretches of a measurement that are compared, and samples without which a stretch says nothing.
_STRETCHES = 10
_LEAST_SAMPLES = 3
# An accelerator that is busy less than this was not what was measured.
_BUSY = 0.2

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Measurement:
    """What surrounded the counted inferences of one worker."""

    timeline: Timeline
    # On the timeline's axis.
    begin: float
    end: float
    # The kernel's accounts at these moments.
    before: Moment
    after: Moment
    # What a moment on the axis is for everybody else.
    time: Callable[[float], Timestamp]
    limits: ValidityConfig
    processors: int
    # Those that the worker may use ("cpu4"); all when it is not known.
    allowed: Sequence[str] = ()
    device: str = "cpu"
    scenario: int = scenario_pb2.SCENARIO_KIND_UNSPECIFIED
    # Others were measured at the same time: that they wait for each other is what is to be seen.
    has_peers: bool = False
    governor: str = ""
    policies: Sequence[Policy] = ()
    # Names of the thermal zones, and where those that have one begin to throttle, in degrees Celsius.
    zones: Sequence[str] = ()
    throttling_celsius: Mapping[str, float] = field(default_factory=dict)
    memory_total_bytes: int = 0
    # Names of the power modes that were in force at both ends.
    power_modes: tuple[str, str] = ("", "")

    @property
    def on_accelerator(self) -> bool:
        """Whether something else than the processors was asked for."""
        return self.device != "cpu"

    @property
    def is_sustained(self) -> bool:
        """Whether it is made to show what heat does."""
        return self.scenario == _SUSTAINED

    def signs(self) -> list[throttling.Sign]:
        """What held the board back."""
        return throttling.signs(self.timeline, self.begin, self.end, accelerator=self.on_accelerator)

    def hottest(self) -> tuple[str, float] | None:
        """The hottest zone, and how hot it was at most."""
        found = [
            (point.greatest, zone)
            for zone in self.zones
            for point in self.timeline.around("temperature_celsius", zone, self.begin, self.end)
        ]
        return (max(found)[1], max(found)[0]) if found else None


def of_measurement(measured: Measurement) -> Iterator[result_pb2.Warning]:
    """Every doubt about it, the accounts' first."""
    yield from _of_accounts(measured)
    signs = measured.signs()
    yield from _of_signs(measured, signs)
    yield from _of_clocks(measured)
    yield from _of_memory(measured)
    if not any(sign.code == throttling.THROTTLED for sign in signs):
        yield from _of_heat(measured)


# --- the kernel's accounts


def _of_accounts(measured: Measurement) -> Iterator[result_pb2.Warning]:
    limits, before, after = measured.limits, measured.before, measured.after
    seconds = after.seconds - before.seconds
    if seconds < SHORTEST_SECONDS:
        return
    others = other_seconds(before, after)
    if others is not None:
        used = others / seconds
        share = used / measured.processors
        if share > limits.load_doubtful:
            yield warn(
                "high_load",
                f"other programs used {used:.2f} of {measured.processors} processors during the measurement",
                INVALID if share > limits.load_invalid else DOUBTFUL,
                evidence={
                    "load_share": share,
                    "load_doubtful_share": limits.load_doubtful,
                    "load_invalid_share": limits.load_invalid,
                },
            )
    if before.processors is not None and after.processors is not None:
        stolen = (after.processors.stolen - before.processors.stolen) / seconds / measured.processors
        if stolen > limits.steal_doubtful:
            yield warn(
                "cpu_steal",
                f"the host of this virtual machine took {stolen:.1%} of the processor time away during the "
                "measurement",
                INVALID if stolen > limits.steal_invalid else DOUBTFUL,
                evidence={
                    "steal_share": stolen,
                    "steal_doubtful_share": limits.steal_doubtful,
                    "steal_invalid_share": limits.steal_invalid,
                },
            )
    waited = pressure(before, after, "cpu")
    if waited is not None and waited > limits.cpu_pressure_doubtful and not measured.has_peers:
        yield warn(
            "cpu_pressure",
            f"in {waited:.0%} of the measurement some task waited for a processor",
            DOUBTFUL,
            evidence={"pressure_share": waited, "pressure_doubtful_share": limits.cpu_pressure_doubtful},
        )


def other_seconds(before: Moment, after: Moment) -> float | None:
    """Processor seconds of all but the worker; None where the kernel does not tell."""
    if before.processors is None or after.processors is None:
        return None
    if before.processes_seconds is None or after.processes_seconds is None:
        return None
    own = after.processes_seconds - before.processes_seconds
    # Both are rounded to ticks, each in its own way.
    return max(0.0, after.processors.busy - before.processors.busy - own)


def pressure(before: Moment, after: Moment, resource: str) -> float | None:
    """Share of the time in which some task waited for it; None where the kernel does not tell."""
    seconds = after.seconds - before.seconds
    if seconds <= 0 or resource not in before.waited_seconds or resource not in after.waited_seconds:
        return None
    share = (after.waited_seconds[resource] - before.waited_seconds[resource]) / seconds
    return min(1.0, max(0.0, share))


# --- what holds the board back


def _of_signs(measured: Measurement, signs: Sequence[throttling.Sign]) -> Iterator[result_pb2.Warning]:
    hottest = measured.hottest()
    heat = f" at {hottest[1]:.0f} °C" if hottest is not None else ""
    for code in (throttling.THROTTLED, throttling.UNDERVOLTAGE, throttling.OVER_CURRENT):
        found = [sign for sign in signs if sign.code == code]
        if not found:
            continue
        evidence = {sign.quantity: sign.amount for sign in found}
        severity, seen = INVALID, "the board's supply was too weak while it was measured"
        if code == throttling.THROTTLED:
            seen = f"the board was slowed down while it was measured{heat}"
            if hottest is not None:
                evidence["temperature_celsius"] = hottest[1]
            if measured.is_sustained:
                severity = NOTE
            elif all(sign.light for sign in found):
                severity = DOUBTFUL
        yield warn(
            code,
            f"{seen} ({throttling.joined(found)})",
            severity,
            time=measured.time(found[0].seconds),
            evidence=evidence,
        )
    earlier = throttling.before(measured.timeline, measured.begin)
    if earlier and not signs:
        yield warn(
            "throttled_before",
            f"since it booted the board was held back ({', '.join(earlier)}), and not while it was measured",
            NOTE,
        )


def _of_heat(measured: Measurement) -> Iterator[result_pb2.Warning]:
    for zone, limit in measured.throttling_celsius.items():
        points = measured.timeline.around("temperature_celsius", zone, measured.begin, measured.end)
        hottest = max(points, key=lambda point: point.greatest) if points else None
        if hottest is not None and hottest.greatest >= limit - measured.limits.temperature_margin_celsius:
            yield warn(
                "near_throttling",
                f"{zone} was at {hottest.greatest:.0f} °C, and the board throttles at {limit:.0f} °C",
                NOTE,
                time=measured.time(hottest.seconds),
                evidence={
                    "temperature_celsius": hottest.greatest,
                    "throttling_celsius": limit,
                    "margin_celsius": measured.limits.temperature_margin_celsius,
                },
            )
            return


# --- clocks


def _of_clocks(measured: Measurement) -> Iterator[result_pb2.Warning]:
    moved = _clock_moved(measured)
    if moved is not None:
        yield moved
    yield from _capped(measured)
    before, after = measured.power_modes
    if before != after:
        yield warn(
            "power_mode_moved",
            f"the power mode was {before or 'unknown'} before the run and {after or 'unknown'} after it",
            INVALID,
        )
    free = [policy for policy in measured.policies if not policy.fixed]
    if free:
        seen = bool(clock_points(measured))
        unseen = "" if seen else ", and no frequency could be read while it was measured"
        yield warn(
            "governor",
            f"the governor is {measured.governor}, under which the clock moves{unseen}",
            NOTE if seen else DOUBTFUL,
        )


def clock_points(measured: Measurement) -> list[tuple[float, float]]:
    """Seconds and frequency of the fastest processor that the worker may use, sample by sample."""
    sources = measured.allowed or [s for s in measured.timeline.sources("frequency_hertz") if is_processor(s)]
    return fastest(measured.timeline, sources, measured.begin, measured.end)


def is_processor(source: str) -> bool:
    """Whether it is the name of a logical processor: "cpu4"."""
    return source.startswith("cpu") and source[3:].isdecimal()


def _clock_moved(measured: Measurement) -> result_pb2.Warning | None:
    """About whichever clock dropped most."""
    limits = measured.limits
    # What runs on an accelerator needs the processors now and then, and they rest in between.
    rests = measured.on_accelerator or measured.scenario in _RESTING
    worst: tuple[float, float, float, float, str, Severity] | None = None
    for name, points, most in (
        ("processors", clock_points(measured), DOUBTFUL if rests else INVALID),
        *((f"accelerator ({source})", points, INVALID) for source, points in _accelerator_clocks(measured)),
    ):
        dropped = _drop(points, measured.begin, measured.end)
        if dropped is not None and dropped[0] > limits.clock_drop_doubtful:
            severity: Severity = DOUBTFUL
            if dropped[0] > limits.clock_drop_invalid:
                severity = most
            if measured.is_sustained:
                severity = NOTE
            if worst is None or (severity, dropped[0]) > (worst[5], worst[0]):
                worst = (*dropped, name, severity)
    if worst is None:
        return None
    share, slow, fast, seconds, name, severity = worst
    return warn(
        "clock_moved",
        f"the clock of the {name} moved by {share:.0%} while it was measured, between {slow / 1e6:.0f} and "
        f"{fast / 1e6:.0f} MHz",
        severity,
        time=measured.time(seconds),
        evidence={
            "clock_drop_share": share,
            "slowest_hertz": slow,
            "fastest_hertz": fast,
            "clock_drop_doubtful_share": limits.clock_drop_doubtful,
            "clock_drop_invalid_share": limits.clock_drop_invalid,
        },
    )


def _drop(
    points: Sequence[tuple[float, float]], begin: float, end: float
) -> tuple[float, float, float, float] | None:
    """Share between the slowest and the fastest stretch, both means, and when the slowest began.

    None where the samples are too few to tell a moved clock from a single odd reading.
    """
    count = min(_STRETCHES, len(points) // _LEAST_SAMPLES)
    if count < 2:
        return None
    length = (end - begin) / count
    stretches: dict[int, list[float]] = {}
    for seconds, hertz in points:
        stretches.setdefault(min(count - 1, int((seconds - begin) / length)), []).append(hertz)
    # A stretch in which hardly anything was sampled is left out.
    means = {
        at: statistics.fmean(found) for at, found in stretches.items() if len(found) >= _LEAST_SAMPLES - 1
    }
    if len(means) < 2:
        return None
    slowest = min(means, key=lambda at: means[at])
    fast = max(means.values())
    if fast <= 0:
        return None
    return 1.0 - means[slowest] / fast, means[slowest], fast, begin + slowest * length


def _accelerator_clocks(measured: Measurement) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Of those that were busy, and only where an accelerator is measured."""
    if not measured.on_accelerator:
        return
    timeline, begin, end = measured.timeline, measured.begin, measured.end
    for source in timeline.sources("frequency_hertz"):
        busy = timeline.mean("busy_ratio", source, begin, end)
        if busy is not None and busy >= _BUSY:
            points = timeline.within("frequency_hertz", source, begin, end)
            yield source, [(point.seconds, point.value) for point in points]


def _capped(measured: Measurement) -> Iterator[result_pb2.Warning]:
    timeline, share = measured.timeline, measured.limits.frequency_cap_note
    worst: tuple[float, str, float, float] | None = None
    moved = False
    for source in timeline.sources("frequency_limit_hertz"):
        points = timeline.around("frequency_limit_hertz", source, measured.begin, measured.end)
        most = timeline.last("frequency_maximum_hertz", source)
        if not points or most is None or most.value <= 0:
            continue
        low, high = min(point.least for point in points), max(point.greatest for point in points)
        moved = moved or low < (1 - share) * high
        if low < (1 - share) * most.value:
            worst = min(worst or (2.0, "", 0.0, 0.0), (low / most.value, source, low, most.value))
    if worst is not None:
        ratio, source, low, most_hertz = worst
        changed = ", a limit that moved while it was measured" if moved else ""
        yield warn(
            "frequency_capped",
            f"{source} may run at {low / 1e6:.0f} of {most_hertz / 1e6:.0f} MHz{changed}",
            DOUBTFUL if moved and not measured.is_sustained else NOTE,
            evidence={"limit_hertz": low, "maximum_hertz": most_hertz, "cap_share": 1 - ratio},
        )


# --- memory


def _of_memory(measured: Measurement) -> Iterator[result_pb2.Warning]:
    limits, timeline = measured.limits, measured.timeline
    # What comes after the measurement says nothing about it.
    points = timeline.within(memory.AVAILABLE, memory.BOARD, 0.0, measured.end)
    least = min(points, key=lambda point: point.least) if points else None
    floor = limits.memory_available_doubtful * measured.memory_total_bytes
    waited = pressure(measured.before, measured.after, "memory")
    long_enough = measured.after.seconds - measured.before.seconds >= SHORTEST_SECONDS
    seen: list[str] = []
    evidence: dict[str, float] = {}
    if least is not None and least.least < floor:
        seen.append(
            f"only {least.least / _MIB:.0f} of {measured.memory_total_bytes / _MIB:.0f} MiB of memory were "
            "available at some time of the run"
        )
        evidence |= {"memory_available_bytes": least.least, "memory_available_doubtful_bytes": floor}
    if waited is not None and long_enough and waited > limits.memory_pressure_doubtful:
        seen.append(f"in {waited:.1%} of the measurement some task waited for memory")
        evidence |= {"pressure_share": waited, "pressure_doubtful_share": limits.memory_pressure_doubtful}
    if seen:
        when = measured.time(least.seconds) if least is not None and least.least < floor else None
        yield warn("memory_low", ", and ".join(seen), DOUBTFUL, time=when, evidence=evidence)
    yield from _swapped(measured)


def _swapped(measured: Measurement) -> Iterator[result_pb2.Warning]:
    limit = measured.limits.swap_doubtful_bytes
    before, after = measured.before.swapped_in_bytes, measured.after.swapped_in_bytes
    came_back = after - before if before is not None and after is not None else 0
    points = measured.timeline.around(memory.SWAPPED, memory.WORKER, measured.begin, measured.end)
    out = max(points, key=lambda point: point.greatest) if points else None
    seen = []
    if out is not None and out.greatest > limit:
        seen.append(f"{out.greatest / _MIB:.0f} MiB of the worker were swapped out")
    if came_back > limit:
        seen.append(f"{came_back / _MIB:.0f} MiB came back from swap while it was measured")
    if seen:
        yield warn(
            "swapped",
            ", and ".join(seen),
            DOUBTFUL,
            time=measured.time(out.seconds) if out is not None and out.greatest > limit else None,
            evidence={
                "swapped_bytes": out.greatest if out is not None else 0.0,
                "swapped_in_bytes": float(came_back),
                "swap_doubtful_bytes": float(limit),
            },
        )
