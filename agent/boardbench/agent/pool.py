"""One result of several processes of a run, and what several runs of a group say about each other.

Latency differs from process to process by the luck of addresses and allocations, so that the bounds of one
process hold for that process only. The samples of processes that agree are pooled, with bounds that hold for
processes not yet started: see :mod:`boardbench.agent.bench.processes`. Of processes that do not agree, the
latency is that of the one in the middle, and the bounds of its percentiles are those of the same ones of
others: see :mod:`boardbench.agent.spread`; with two processes, what encloses both.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from boardbench.agent import merge, validity
from boardbench.agent.bench import comparison, doubts, events, processes, stats
from boardbench.agent.config import ValidityConfig
from boardbench.agent.domain import Warning
from boardbench.agent.drift import difference
from boardbench.agent.plan import Plan
from boardbench.agent.session import OF_SAMPLES
from boardbench.agent.spread import Spread, of_others, spread
from boardbench.v1 import latency_pb2, result_pb2, scenario_pb2

# What the others of a group do by being measured at the same time: it is what the figures are to show. Their
# processor time is not in the load: see ``peers`` of the surroundings.
_OF_THE_OTHERS = frozenset(("cpu_pressure", "preempted"))

_Message = TypeVar("_Message", bound=Message)


def pooled(
    results: Sequence[result_pb2.RunResult],
    plan: Plan,
    offsets_seconds: Sequence[float],
    limits: ValidityConfig,
) -> result_pb2.RunResult:
    """The result of a run of which each of these is one process, in the order they ran; at least one.

    ``offsets_seconds``: when each began, on the time axis of the first.
    """
    whole = result_pb2.RunResult()
    whole.CopyFrom(results[-1])
    if len(results) == 1:
        return whole
    merge.into(whole, results, offsets_seconds)
    seen = spread([each.latency for each in results], plan.spec.confidence, limits.processes_doubtful)
    used = list(results) if seen.agree else [results[seen.middle]]
    whole.latency.CopyFrom(_latency([each.latency for each in used], plan))
    if not seen.agree:
        for percentile in whole.latency.percentiles:
            _widen(percentile, results, plan.spec.confidence)
    if whole.HasField("scenario"):
        whole.scenario.CopyFrom(_scenario(used, plan))
    _take_stopping(whole, results, plan)
    _take_processes(whole, results, seen)
    del whole.warnings[:]
    whole.warnings.extend(_warnings(whole, results, seen, limits))
    return whole


def set_against(
    whole: result_pb2.RunResult,
    alone: Sequence[result_pb2.RunResult],
    others: Sequence[str],
    plan: Plan,
) -> None:
    """Adds to a run that was measured beside others what it is by itself.

    Its latency is that beside the others; what has nothing to do with them is taken from when it was alone.
    """
    merge.by_itself(whole, alone)
    doubted: list[result_pb2.Warning] = []
    moved = difference(alone[-1].placement, whole.placement)
    if moved:
        doubted.append(
            validity.warn(
                "placement_differs", f"beside other models {moved} than by itself", validity.DOUBTFUL
            )
        )
    else:
        # Only there it was profiled.
        whole.placement.CopyFrom(alone[-1].placement)
    for warning in whole.warnings:
        if warning.code in _OF_THE_OTHERS:
            warning.severity = validity.NOTE
            warning.message = f"the other runs of the group are in this: {warning.message}"
    known = {warning.code for warning in whole.warnings if warning.code not in _OF_THE_OTHERS}
    for result in alone:
        for warning in result.warnings:
            if warning.code not in known | OF_SAMPLES and warning.severity != validity.NOTE:
                known.add(warning.code)
                warning.message = f"while it was measured by itself: {warning.message}"
                doubted.append(warning)
    whole.warnings.extend(doubted)
    interference = whole.interference
    interference.run_ids.extend(others)
    interference.alone.CopyFrom(_latency([each.latency for each in alone], plan))
    beside, by_itself = _median(whole.latency), _median(interference.alone)
    slowdown = comparison.by_samples(beside, by_itself) if beside and by_itself else None
    if slowdown is not None:
        interference.slowdown_ratio = slowdown.ratio
        interference.slowdown_low_ratio, interference.slowdown_high_ratio = slowdown.low, slowdown.high


def compare(results: Sequence[result_pb2.RunResult]) -> None:
    """Adds to each of several runs, whose processes took turns, how it compares with each of the others."""
    for result in results:
        for other in results:
            if other is not result:
                _compare(result.comparisons.add(), result, other)


def _compare(entry: result_pb2.Comparison, ours: result_pb2.RunResult, theirs: result_pb2.RunResult) -> None:
    entry.run_id, entry.model_name = theirs.run_id, theirs.model.name
    confidence = ours.effective_spec.confidence
    one, other = _medians(ours), _medians(theirs)
    found = comparison.by_turns(one, other, confidence)
    if found is not None:
        entry.ratio, entry.low_ratio, entry.high_ratio = found.ratio, found.low, found.high
        entry.differs = found.differs
        entry.detail = (
            f"the middle of the ratios of {min(len(one), len(other))} turns, each a process of both; bounds "
            "by signed ranks"
        )
    elif statistics.median(other) > 0:
        entry.ratio = statistics.median(one) / statistics.median(other)
        entry.detail = (
            "ratio of the medians; what other processes would give, only "
            f"{comparison.least_turns(confidence)} turns and more say"
        )
    else:
        entry.detail = "a median of zero has no ratio to another"


def _medians(result: result_pb2.RunResult) -> list[float]:
    if result.HasField("processes"):
        return [process.median_seconds for process in result.processes.processes]
    return [stats.median(result.latency.samples_nanoseconds) / 1e9]


# --- figures


def _latency(parts: Sequence[latency_pb2.Latency], plan: Plan) -> latency_pb2.Latency:
    """The distribution of all samples, process after process, with bounds that hold for others, too."""
    if len(parts) == 1:
        return parts[0]
    asked = {stats.text(target.percentile) for target in plan.spec.precision}
    found = processes.latency(
        [list(part.samples_nanoseconds) for part in parts],
        confidence=plan.spec.confidence,
        percentiles=tuple({*stats.PERCENTILES, *asked}),
    )
    whole = _of_the_wire(replace(found, samples_nanoseconds=()), latency_pb2.Latency())
    # By themselves: they are many, and JSON is slow.
    whole.samples_nanoseconds.extend(found.samples_nanoseconds)
    return whole


def _median(latency: latency_pb2.Latency) -> comparison.Bounds | None:
    """The median between its bounds; None with too few samples for any."""
    for each in latency.percentiles:
        if each.percentile == 50:
            return each.low_seconds, each.seconds, each.high_seconds
    return None


def _widen(
    percentile: latency_pb2.Percentile, results: Sequence[result_pb2.RunResult], confidence: float
) -> None:
    """Gives the bounds that hold for other processes, too."""
    same = [
        each
        for result in results
        for each in result.latency.percentiles
        if each.percentile == percentile.percentile
    ]
    low, high = of_others([each.seconds for each in same], confidence) or (
        min(each.low_seconds for each in same),
        max(each.high_seconds for each in same),
    )
    percentile.low_seconds = min(percentile.low_seconds, low)
    percentile.high_seconds = max(percentile.high_seconds, high)


def _scenario(used: Sequence[result_pb2.RunResult], plan: Plan) -> scenario_pb2.ScenarioResult:
    parts = [result.scenario for result in used]
    whole = scenario_pb2.ScenarioResult()
    whole.CopyFrom(parts[-1])
    counts = [result.latency.count for result in used]

    def rate(values: list[float]) -> float:
        return sum(counts) / sum(count / value for count, value in zip(counts, values, strict=True))

    for name in ("throughput_hertz", "throughput_low_hertz", "throughput_high_hertz"):
        values = [getattr(part, name) for part in parts]
        whole.ClearField(name)
        if all(values):
            setattr(whole, name, rate(values))
    limits = of_others([part.throughput_hertz for part in parts], plan.spec.confidence)
    if limits is not None and whole.HasField("throughput_low_hertz"):
        whole.throughput_low_hertz = min(whole.throughput_low_hertz, limits[0])
        whole.throughput_high_hertz = max(whole.throughput_high_hertz, limits[1])
    merge.fold(whole, parts, {"deadline_misses": sum, "most_waiting": max, "worst_start_delay_seconds": max})
    if all(part.HasField("service") for part in parts):
        whole.service.CopyFrom(_latency([part.service for part in parts], plan))
    return whole


def _take_processes(
    whole: result_pb2.RunResult, results: Sequence[result_pb2.RunResult], seen: Spread
) -> None:
    told = whole.processes
    told.agree, told.spread_ratio, told.detail = seen.agree, seen.ratio, seen.detail
    told.median_seconds = seen.median_seconds
    if seen.bounds_seconds is not None:
        told.median_low_seconds, told.median_high_seconds = seen.bounds_seconds
    for position, (result, median) in enumerate(zip(results, seen.medians_seconds, strict=True)):
        entry = told.processes.add(
            count=result.latency.count,
            median_seconds=median,
            pooled=seen.agree or position == seen.middle,
            started_at=result.started_at,
        )
        for name in ("create_seconds", "first_inference_seconds"):
            if result.HasField(name):
                setattr(entry, name, getattr(result, name))


def _take_stopping(whole: result_pb2.RunResult, results: Sequence[result_pb2.RunResult], plan: Plan) -> None:
    whole.ClearField("stopping")
    reasons = {result.stopping.reason for result in results if result.HasField("stopping")}
    if not reasons:
        return
    found = {percentile.percentile: percentile for percentile in whole.latency.percentiles}
    for target in plan.spec.precision:
        entry = whole.stopping.targets.add(percentile=target.percentile, asked_ratio=target.ratio)
        told = found.get(target.percentile)
        if told is not None and told.seconds > 0:
            entry.reached_ratio = max(
                told.high_seconds / told.seconds - 1, 1 - told.low_seconds / told.seconds
            )
    if not _short_of(whole):
        reasons = {result_pb2.STOP_REASON_PRECISION} if plan.spec.precision else reasons
    else:
        # Each process may have been as precise as it was to be, and all of them still are not.
        reasons.discard(result_pb2.STOP_REASON_PRECISION)
    if len(reasons) == 1:
        whole.stopping.reason = reasons.pop()
    elif reasons:
        whole.stopping.reason = result_pb2.STOP_REASON_DURATION


def _short_of(whole: result_pb2.RunResult) -> list[result_pb2.PrecisionReached]:
    """The targets that were not reached."""
    return [
        target
        for target in whole.stopping.targets
        if not target.HasField("reached_ratio") or target.reached_ratio > target.asked_ratio
    ]


# --- doubts


def _warnings(
    whole: result_pb2.RunResult,
    results: Sequence[result_pb2.RunResult],
    seen: Spread,
    limits: ValidityConfig,
) -> Iterator[result_pb2.Warning]:
    yield from _of_processes(whole, results)
    thresholds = doubts.Thresholds.of(limits.thresholds)
    counted = sum(result.latency.count for result in results)
    for doubt in doubts.of_count(counted, thresholds):
        yield _of_the_wire(doubt, result_pb2.Warning())
    missed = _short_of(whole)
    if missed:
        yield _of_the_wire(_not_reached(missed), result_pb2.Warning())
    if not seen.agree:
        slowest, fastest = max(seen.medians_seconds), min(seen.medians_seconds)
        yield validity.warn(
            "processes_disagree",
            f"the medians of {len(results)} processes go from {fastest * 1e3:.4g} to {slowest * 1e3:.4g} ms, "
            f"±{seen.ratio:.1%}, which chance does not explain; the latency is that of process "
            f"{seen.middle + 1}, with bounds for all",
            validity.DOUBTFUL,
            evidence={
                "fastest_seconds": fastest,
                "slowest_seconds": slowest,
                "spread_ratio": seen.ratio,
                "processes_doubtful_ratio": limits.processes_doubtful,
                "processes": len(results),
            },
        )
    yield from _differences(results)


def _not_reached(missed: Sequence[result_pb2.PrecisionReached]) -> Warning:
    words, evidence = [], {}
    for target in missed:
        name = f"p{target.percentile:g}"
        known = "has no bounds"
        evidence[f"{name}_asked_ratio"] = target.asked_ratio
        if target.HasField("reached_ratio"):
            known = f"is known to ±{target.reached_ratio:.2%}"
            evidence[f"{name}_reached_ratio"] = target.reached_ratio
        words.append(f"{name} {known} where ±{target.asked_ratio:.2%} was asked for")
    return doubts.warn(
        "precision_not_reached", f"of all processes together {', '.join(words)}", evidence=evidence
    )


def _of_processes(
    whole: result_pb2.RunResult, results: Sequence[result_pb2.RunResult]
) -> Iterator[result_pb2.Warning]:
    """What the processes doubt, each code once, in the words of one for which it is gravest."""
    found: dict[str, dict[int, list[result_pb2.Warning]]] = {}
    for position, result in enumerate(results):
        for warning in result.warnings:
            if warning.code not in OF_SAMPLES:
                found.setdefault(warning.code, {}).setdefault(position, []).append(warning)
    for code, by_process in found.items():
        gravest = max(by_process.values(), key=lambda warnings: _gravity(warnings))
        for warning in gravest:
            if len(by_process) < len(results):
                which = ", ".join(str(position + 1) for position in by_process)
                of = "process" if len(by_process) == 1 else "processes"
                warning.message = f"{of} {which} of {len(results)}: {warning.message}"
            yield warning
        if len(by_process) < len(results):
            for position in by_process:
                whole.processes.processes[position].warning_codes.append(code)


def _gravity(warnings: Sequence[result_pb2.Warning]) -> int:
    return max(warning.severity or validity.DOUBTFUL for warning in warnings)


def _differences(results: Sequence[result_pb2.RunResult]) -> Iterator[result_pb2.Warning]:
    """What should be the same in all processes and is not."""
    for position, result in enumerate(results[1:], 2):
        moved = difference(results[0].placement, result.placement)
        if moved:
            yield validity.warn(
                "placement_differs",
                f"in process {position} of {len(results)} {moved} than in process 1",
                validity.DOUBTFUL,
            )
            break
    for position, result in enumerate(results[1:], 2):
        names = [
            name
            for name, digest in results[0].output_sha256.items()
            if result.output_sha256.get(name, digest) != digest
        ]
        if names:
            yield validity.warn(
                "outputs_differ",
                f"process {position} of {len(results)} computed other values of "
                f"{', '.join(sorted(names)[:6])} than process 1, from the same inputs",
                validity.NOTE,
            )
            break


def _of_the_wire(noun: object, message: _Message) -> _Message:
    """A noun of the worker as a message."""
    return json_format.ParseDict(events.to_json(noun), message)
