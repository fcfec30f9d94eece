"""Whether the ops of a run are where they were wanted, and what it costs where not: one line, and words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from boardbench.cli import figures
from boardbench.cli.styles import BAD, DOUBTFUL, GOOD, QUIET
from boardbench.v1 import placement_pb2, result_pb2

ON_CPU = (placement_pb2.UNIT_CPU, placement_pb2.UNIT_CPU_DELEGATE)
COMPILED = "edgetpu-custom-op"  # one op that stands for all that edgetpu_compiler put into it
# Warnings of the worker that say more than the placement.
NOT_COMPILED = "not_compiled_for_edgetpu"
DEVICE_FALLBACK = "device_fallback"

_UNITS: dict[int, str] = {
    placement_pb2.UNIT_UNSPECIFIED: "unknown",
    placement_pb2.UNIT_CPU: "CPU",
    placement_pb2.UNIT_CPU_DELEGATE: "CPU delegate",
    placement_pb2.UNIT_GPU: "GPU",
    placement_pb2.UNIT_TPU: "TPU",
    placement_pb2.UNIT_NPU: "NPU",
    placement_pb2.UNIT_DELEGATE: "delegate",
}

EVIDENCE: dict[int, str] = {
    placement_pb2.EVIDENCE_STATIC: "static",
    placement_pb2.EVIDENCE_PARTITION: "partition",
    placement_pb2.EVIDENCE_PROFILED: "profiled",
    placement_pb2.EVIDENCE_COUNTERS: "counters",
    placement_pb2.EVIDENCE_HOST_CPU: "host_cpu",
    placement_pb2.EVIDENCE_PREDICTION: "prediction",
}

VERDICTS: dict[int, tuple[str, str]] = {
    placement_pb2.PLACEMENT_VERDICT_ACCELERATED: ("accelerated", GOOD),
    placement_pb2.PLACEMENT_VERDICT_PARTLY: ("partly", DOUBTFUL),
    placement_pb2.PLACEMENT_VERDICT_NOT_ACCELERATED: ("NOT accelerated", BAD),
    placement_pb2.PLACEMENT_VERDICT_CONTRADICTED: ("CONTRADICTED", BAD),
}


@dataclass(frozen=True)
class Verdict:
    """A line about a run for which more than the CPU was asked."""

    mark: str
    text: str
    style: str


def device_asked(result: result_pb2.RunResult) -> str:
    """The device that somebody wanted, also where another one was taken instead."""
    return result.spec.device or result.runtime.device or "cpu"


def is_plain(result: result_pb2.RunResult) -> bool:
    """Whether nothing but the CPU was asked for or had a part: then where the ops ran is no news."""
    placement = result.placement
    return (
        device_asked(result) == "cpu"
        and not placement.accelerated_ops
        and not result.HasField("accelerator")
        and placement.verdict != placement_pb2.PLACEMENT_VERDICT_CONTRADICTED
    )


def verdict_of(result: result_pb2.RunResult) -> Verdict | None:
    """What all evidence says, and what the ops on the CPU cost; None where that is no news."""
    if is_plain(result):
        return None
    placement = result.placement
    verdict = _verdict(result, placement)
    if placement.standin or result.accelerator.standin:
        return Verdict("✗", f"STAND-IN, no hardware: {verdict.text}", BAD)
    return verdict


def _verdict(result: result_pb2.RunResult, placement: placement_pb2.Placement) -> Verdict:
    asked = device_asked(result)
    if placement.verdict == placement_pb2.PLACEMENT_VERDICT_CONTRADICTED:
        return Verdict("✗", f"CONTRADICTED: {contradiction(placement)}", BAD)
    if not placement_known(placement):
        return Verdict("?", "UNKNOWN where the ops ran: nothing proves it", DOUBTFUL)
    ran = _every(placement.cpu_ops) + " ran on the CPU"
    if placement.accelerated_ops == 0 and any(warning.code == NOT_COMPILED for warning in result.warnings):
        text = f"NOT COMPILED for the Edge TPU: {ran} (compile it with edgetpu_compiler)"
        return Verdict("✗", text, BAD)
    if placement.accelerated_ops == 0:
        if any(warning.code == DEVICE_FALLBACK for warning in result.warnings):
            return Verdict("✗", f"NOT ACCELERATED: {asked} could not be used, and {ran} instead", BAD)
        return Verdict("✗", f"NOT ACCELERATED: {asked} was asked for, and {ran}", BAD)
    units = accelerator_names(placement)
    if unknown := _unknown_ops(placement):
        lost = figures.plural(unknown, "op")
        return Verdict("?", f"on the {units} in part: of {lost} it is not known where", DOUBTFUL)
    if placement.cpu_ops == 0 and placement.verdict == placement_pb2.PLACEMENT_VERDICT_PARTLY:
        # A DLA leaves to the GPU what it does not take.
        taken = sum(op.delegate.lower() == asked.lower() for op in placement.ops)
        left = f"{_of(len(placement.ops) - taken, placement)} fell back to another accelerator"
        return Verdict("✗", f"partly on the {asked.upper()}: {left}{_cost(result)}", DOUBTFUL)
    if placement.cpu_ops == 0:
        return Verdict("✓", f"{_taken(placement, units)}, nothing fell back", GOOD)
    return Verdict("✗", f"partly on the {units}: {_left(placement)}{_cost(result)}", DOUBTFUL)


def _every(count: int) -> str:
    return "the only op" if count == 1 else f"all {count:,} ops"


def _taken(placement: placement_pb2.Placement, units: str) -> str:
    compiled = placement.accelerated_op_types.get(COMPILED, 0)
    if compiled and compiled == placement.accelerated_ops:
        return f"wholly on the {units} as {figures.plural(compiled, 'compiled subgraph')}"
    return f"{_every(placement.accelerated_ops)} on the {units}"


def _left(placement: placement_pb2.Placement) -> str:
    compiled = placement.accelerated_op_types.get(COMPILED, 0)
    if compiled and compiled == placement.accelerated_ops:
        # How many ops went into it is not told, so there is no whole to set those on the CPU against.
        return f"{figures.plural(placement.cpu_ops, 'op')} left on the CPU"
    return f"{_of(placement.cpu_ops, placement)} on the CPU"


def _of(count: int, placement: placement_pb2.Placement) -> str:
    return f"{count:,} of {placement.cpu_ops + placement.accelerated_ops:,} ops"


def _cost(result: result_pb2.RunResult) -> str:
    if not result.placement.HasField("fallback_cost"):
        return ", cost not measured"
    cost = result.placement.fallback_cost
    text = f" cost {share(cost)} of the time"
    median = next((entry.seconds for entry in result.latency.percentiles if entry.percentile == 50), None)
    if median is None:
        return text
    length, sign = figures.seconds_unit(median)
    now, without = (figures.digits(value / length, 3) for value in (median, cost.latency_without_seconds))
    return f"{text}; {now} → at best {without} {sign} without them"


def share(cost: placement_pb2.FallbackCost) -> str:
    """The share with its bounds: "34 % (31–37 %)"."""
    return f"{percent(cost.share)} % ({percent(cost.share_low)}–{percent(cost.share_high)} %)"


def percent(value: float) -> str:
    """A share as a number of per cent: "34", "2.1"."""
    return figures.digits(100 * value, 2) if 0 < value < 0.1 else f"{100 * value:.0f}"


def contradiction(placement: placement_pb2.Placement) -> str:
    """Which kinds of evidence say what."""
    said: dict[str, list[str]] = {}
    for report in placement.evidence_reports:
        if report.verdict in VERDICTS:
            said.setdefault(VERDICTS[report.verdict][0], []).append(evidence_name(report.evidence))
    if len(said) < 2:
        return "two kinds of evidence say different things"
    return "; ".join(
        f"{' and '.join(kinds)} {'say' if len(kinds) > 1 else 'says'} {verdict}"
        for verdict, kinds in said.items()
    )


def placement_known(placement: placement_pb2.Placement) -> bool:
    """Whether it is known where the ops ran, by something stronger than a prediction."""
    return (
        placement.HasField("accelerated_ops")
        and placement.HasField("cpu_ops")
        and placement.evidence not in (placement_pb2.EVIDENCE_UNSPECIFIED, placement_pb2.EVIDENCE_PREDICTION)
    )


def _unknown_ops(placement: placement_pb2.Placement) -> int:
    return sum(entry.ops for entry in placement.units if entry.unit == placement_pb2.UNIT_UNSPECIFIED)


def evidence_name(evidence: int) -> str:
    """A kind of evidence as documents name it."""
    return EVIDENCE.get(evidence, "unknown")


def verdict_word(verdict: int) -> tuple[str, str]:
    """A verdict as a word, and its style."""
    return VERDICTS.get(verdict, ("says nothing", QUIET))


def on_accelerator(op: placement_pb2.OpPlacement) -> bool:
    """Whether the op is known to be on something else than the CPU."""
    return op.unit not in (*ON_CPU, placement_pb2.UNIT_UNSPECIFIED)


def short_name(op: placement_pb2.OpPlacement) -> str:
    """The name of an op; of a fused one, which has the names of all that went into it, the first."""
    return op.name.split(";", 1)[0]


def unit_of(op: placement_pb2.OpPlacement) -> str:
    """Where one op runs: "TPU", "XNNPACK (CPU)"."""
    if op.unit == placement_pb2.UNIT_CPU_DELEGATE and op.delegate:
        return f"{op.delegate} (CPU)"
    if op.unit == placement_pb2.UNIT_DELEGATE and op.delegate:
        return op.delegate
    return _UNITS.get(op.unit, "unknown")


def unit_name(placement: placement_pb2.Placement, unit: int) -> str:
    """A unit, by the names of its delegates where it has any."""
    delegates = sorted({op.delegate for op in placement.ops if op.unit == unit and op.delegate})
    if unit == placement_pb2.UNIT_CPU_DELEGATE and delegates:
        return f"{', '.join(delegates)} (CPU)"
    if unit == placement_pb2.UNIT_DELEGATE and delegates:
        return ", ".join(delegates)
    return _UNITS.get(unit, "unknown")


def accelerator_names(placement: placement_pb2.Placement) -> str:
    """The accelerators that took ops: "TPU", "GPU and the NPU"."""
    units: Iterable[int] = (entry.unit for entry in placement.units if entry.ops)
    names = [unit_name(placement, unit) for unit in units if unit not in (*ON_CPU, 0)]
    return " and the ".join(names) or "accelerator"


def cause_rank(op: placement_pb2.OpPlacement) -> int:
    """0: it stays because of itself. 1: it is not known why. 2: only because of another op."""
    return 1 if not op.HasField("root_cause") else 0 if op.root_cause else 2
