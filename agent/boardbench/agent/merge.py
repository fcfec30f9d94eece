"""What surrounded several processes of one run, as what surrounded the run: nothing here is about latency.

Figures that add up are added, peaks are the highest, what was read before is that of the first process and
what was read after that of the last. What no process told stays untold.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from boardbench.v1 import board_pb2, result_pb2, telemetry_pb2

# Points of one series: one every second of half an hour, or every tenth of three minutes.
MOST_POINTS = 1800

_Message = TypeVar("_Message", bound=Message)
_Fold = Callable[[list[Any]], Any]


def _first(values: list[Any]) -> Any:
    return values[0]


def _last(values: list[Any]) -> Any:
    return values[-1]


_ENVIRONMENT: dict[str, _Fold] = {
    "clock_read_seconds": statistics.median,
    "clock_read_worst_seconds": max,
    "load_average_before": _first,
    "cpu_frequency_hertz": statistics.fmean,
    "cpu_frequency_least_hertz": min,
    "temperature_before_celsius": _first,
    "involuntary_context_switches": sum,
    "voluntary_context_switches": sum,
    "cpu_seconds": sum,
    "wall_seconds": sum,
    "other_cpu_seconds": sum,
    "memory_available_before_bytes": _first,
    "memory_available_least_bytes": min,
    "cpu_pressure_share": statistics.fmean,
    "io_pressure_share": statistics.fmean,
    "memory_pressure_share": statistics.fmean,
    "swap_used_before_bytes": _first,
}
_MEMORY: dict[str, _Fold] = dict.fromkeys(
    (
        "peak_rss_bytes",
        "model_rss_bytes",
        "peak_swap_bytes",
        "available_drop_bytes",
        "accelerator_bytes",
        "arena_bytes",
    ),
    max,
)
_PHASE: dict[str, _Fold] = dict.fromkeys(("rss_bytes", "pss_bytes", "peak_rss_bytes"), max)
# What each process does once; the spread between them is told process by process.
ONCE: dict[str, _Fold] = dict.fromkeys(
    ("create_seconds", "first_inference_seconds", "import_seconds"), statistics.median
)


def into(
    whole: result_pb2.RunResult, results: Sequence[result_pb2.RunResult], offsets_seconds: Sequence[float]
) -> None:
    """Sets in a copy of the last result all that surrounded any of them.

    ``offsets_seconds``: when each process began, on the time axis of the first.
    """
    whole.started_at.CopyFrom(results[0].started_at)
    fold(whole, loaded_alike(results), ONCE)
    whole.environment.CopyFrom(environment(results))
    whole.memory.CopyFrom(memory(results))
    if whole.HasField("warm_up"):
        whole.warm_up.CopyFrom(warm_up(results))
    if whole.HasField("accelerator"):
        whole.accelerator.CopyFrom(accelerator(results))
    _set_energy(whole, results)
    sampled = telemetry(results, offsets_seconds)
    whole.ClearField("telemetry")
    if sampled is not None:
        whole.telemetry.CopyFrom(sampled)
    # Only the first measured it.
    if results[0].effective_spec.HasField("idle_seconds"):
        whole.effective_spec.idle_seconds = results[0].effective_spec.idle_seconds


def loaded_alike(results: Sequence[result_pb2.RunResult]) -> list[result_pb2.RunResult]:
    """Those that found in the engine's caches what the last one found: other loads take other times."""

    def found(result: result_pb2.RunResult) -> list[tuple[str, bool]]:
        return [(cache.name, cache.warm) for cache in result.caches]

    return [result for result in results if found(result) == found(results[-1])]


def fold(whole: _Message, parts: Sequence[_Message], folds: dict[str, _Fold]) -> None:
    """Sets each of the fields to what its values in the parts come to; one that none has is left out."""
    for name, take in folds.items():
        values = [getattr(part, name) for part in parts if part.HasField(name)]
        if values:
            setattr(whole, name, take(values))
        else:
            whole.ClearField(name)


def by_itself(whole: result_pb2.RunResult, alone: Sequence[result_pb2.RunResult]) -> None:
    """Sets in the result of a run that was measured beside others what can't be told apart there.

    The board has one supply and one memory.
    """
    whole.started_at.CopyFrom(alone[0].started_at)
    fold(whole, loaded_alike(alone), ONCE)
    del whole.caches[:]
    whole.caches.extend(alone[-1].caches)
    swapped = whole.memory.peak_swap_bytes
    whole.memory.CopyFrom(memory(alone))
    if swapped:
        whole.memory.peak_swap_bytes = max(swapped, whole.memory.peak_swap_bytes)
    _set_energy(whole, alone)
    done = whole.effective_spec
    done.idle_seconds = alone[0].effective_spec.idle_seconds
    done.profile_runs = alone[-1].effective_spec.profile_runs


def environment(results: Sequence[result_pb2.RunResult]) -> board_pb2.Environment:
    """The environment of all of them."""
    parts = [result.environment for result in results]
    whole = board_pb2.Environment()
    whole.CopyFrom(parts[-1])
    fold(whole, parts, _ENVIRONMENT)
    del whole.throttled_before[:], whole.throttled_during[:]
    whole.throttled_before.extend(parts[0].throttled_before)
    whole.throttled_during.extend(_once(what for part in parts for what in part.throttled_during))
    if any(part.throttling_readable for part in parts):
        whole.throttling_readable = True
    return whole


def memory(results: Sequence[result_pb2.RunResult]) -> result_pb2.Memory:
    """The most that any of them took, phase by phase."""
    parts = [result.memory for result in results]
    whole = result_pb2.Memory()
    whole.CopyFrom(parts[-1])
    fold(whole, parts, _MEMORY)
    for phase in whole.phases:
        fold(phase, [each for part in parts for each in part.phases if each.phase == phase.phase], _PHASE)
    return whole


def warm_up(results: Sequence[result_pb2.RunResult]) -> result_pb2.WarmUp:
    """All inferences before the counted ones; steady when each process was, as far as it is known."""
    parts = [result.warm_up for result in results]
    whole = result_pb2.WarmUp(
        runs=sum(part.runs for part in parts), seconds=sum(part.seconds for part in parts)
    )
    known = [part.steady for part in parts if part.HasField("steady")]
    if known and (len(known) == len(parts) or not all(known)):
        whole.steady = all(known)
    samples = [sample for part in parts for sample in part.samples_nanoseconds]
    whole.samples_nanoseconds.extend(samples[:_MOST_WARM_UP_SAMPLES])
    return whole


# As one process has it.
_MOST_WARM_UP_SAMPLES = 1000


def accelerator(results: Sequence[result_pb2.RunResult]) -> result_pb2.AcceleratorUse:
    """The accelerator as it was used, from the first process to the last."""
    whole = result_pb2.AcceleratorUse()
    whole.CopyFrom(results[-1].accelerator)
    fold(whole, [result.accelerator for result in results], {"temperature_before_celsius": _first})
    return whole


def _set_energy(whole: result_pb2.RunResult, results: Sequence[result_pb2.RunResult]) -> None:
    power = energy(results) if all(each.HasField("energy") for each in results) else None
    whole.ClearField("energy")
    if power is not None:
        whole.energy.CopyFrom(power)


def energy(results: Sequence[result_pb2.RunResult]) -> telemetry_pb2.Energy | None:
    """What all of them took from the supply; None unless each was read at the same rail.

    Idle power is measured before the first process only, and subtracted from all of them.
    """
    parts = [result.energy for result in results]
    if any(
        part.rail != parts[0].rail or not part.HasField("energy_joules") or not part.mean_watts
        for part in parts
    ):
        return None
    whole = telemetry_pb2.Energy(rail=parts[0].rail, method=parts[0].method)
    joules = sum(part.energy_joules for part in parts)
    seconds = sum(part.energy_joules / part.mean_watts for part in parts)
    inferences = sum(part.inferences for part in parts)
    whole.energy_joules, whole.mean_watts, whole.inferences = joules, joules / seconds, inferences
    if not inferences:
        return whole
    whole.total_energy_per_inference_joules = joules / inferences
    idle = next((part.idle_watts for part in parts if part.HasField("idle_watts")), None)
    if idle is not None:
        whole.idle_watts = idle
        whole.energy_per_inference_joules = (joules - idle * seconds) / inferences
    return whole


def telemetry(
    results: Sequence[result_pb2.RunResult], offsets_seconds: Sequence[float]
) -> telemetry_pb2.Telemetry | None:
    """What the sensors said, on one time axis; None when nothing was sampled.

    ``offsets_seconds``: when the telemetry of each process began, on that of the first.
    """
    parts = [
        (offset, result.telemetry)
        for offset, result in zip(offsets_seconds, results, strict=True)
        if result.HasField("telemetry")
    ]
    if not parts:
        return None
    began = parts[0][0]
    whole = telemetry_pb2.Telemetry(rate_hertz=min(part.rate_hertz for _, part in parts))
    joined: dict[tuple[str, str], telemetry_pb2.Series] = {}
    for offset, part in parts:
        for series in part.series:
            key = series.quantity, series.source
            if key not in joined:
                joined[key] = whole.series.add(
                    quantity=series.quantity, source=series.source, cumulative=series.cumulative
                )
            _append(joined[key], series, offset - began)
        for mark in part.marks:
            whole.marks.add(time_seconds=mark.time_seconds + offset - began, label=mark.label)
    for series in whole.series:
        thin(series)
    whole.left_out.extend(_once(reason for _, part in parts for reason in part.left_out))
    _add_cost(whole, [part for _, part in parts])
    return whole


def _append(whole: telemetry_pb2.Series, part: telemetry_pb2.Series, offset_seconds: float) -> None:
    is_thinned = len(part.least) == len(part.values) > 0
    if is_thinned and not whole.least:
        whole.least.extend(whole.values)
        whole.greatest.extend(whole.values)
    if is_thinned or whole.least:
        whole.least.extend(part.least if is_thinned else part.values)
        whole.greatest.extend(part.greatest if is_thinned else part.values)
    whole.times_seconds.extend(time + offset_seconds for time in part.times_seconds)
    whole.values.extend(part.values)


def thin(series: telemetry_pb2.Series, most: int = MOST_POINTS) -> None:
    """Makes a series at most so long: stretches become their mean, with their extremes beside it."""
    count = len(series.values)
    if count <= most:
        return
    step = -(-count // most)
    values, moments = list(series.values), list(series.times_seconds)
    least, greatest = list(series.least) or values, list(series.greatest) or values
    del series.values[:], series.times_seconds[:], series.least[:], series.greatest[:]
    for begin in range(0, count, step):
        end = begin + step
        series.values.append(statistics.fmean(values[begin:end]))
        series.times_seconds.append(statistics.fmean(moments[begin:end]))
        series.least.append(min(least[begin:end]))
        series.greatest.append(max(greatest[begin:end]))


def _add_cost(whole: telemetry_pb2.Telemetry, parts: Sequence[telemetry_pb2.Telemetry]) -> None:
    costs = [(part.cpu_seconds, part.cpu_share) for part in parts if part.HasField("cpu_seconds")]
    if not costs:
        return
    whole.cpu_seconds = sum(seconds for seconds, _ in costs)
    sampled = sum(seconds / share for seconds, share in costs if share > 0)
    whole.cpu_share = whole.cpu_seconds / sampled if sampled else 0.0


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
