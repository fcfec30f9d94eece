"""Counts and verdict of a placement, from its list of operations. One rule for every engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Sequence, Tuple

from boardbench.agent.domain import (
    Evidence,
    EvidenceReport,
    OpPlacement,
    Placement,
    Unit,
    UnitCount,
    Verdict,
)

ON_CPU = (Unit.CPU, Unit.CPU_DELEGATE)

FALLS_BACK_TO = {"DLA": "GPU"}
"""By the device that was asked for: where its engine moves what it does not take, other than to the CPU."""


def known(
    ops: Sequence[OpPlacement],
    *,
    evidence: Evidence,
    detail: str,
    standin: bool = False,
    wanted: str = "",
) -> Placement:
    """The placement that the list amounts to. An op on no known unit is in neither count.

    With such an op the counts are of the others, and the verdict stays open. The verdict is about the
    delegate or provider that was asked for, ``wanted``, also where that runs on the CPU; counts are of units.
    """
    units = Counter(op.unit for op in ops)
    on_cpu = [op.type for op in ops if op.unit in ON_CPU]
    accelerated = [op.type for op in ops if op.unit not in ON_CPU and op.unit is not Unit.UNSPECIFIED]
    away = sum(is_away(op, wanted) for op in ops)
    return Placement(
        evidence=evidence,
        accelerated_ops=len(accelerated),
        cpu_ops=len(on_cpu),
        accelerated_op_types=dict(Counter(accelerated)),
        cpu_op_types=dict(Counter(on_cpu)),
        units=tuple(UnitCount(unit=unit, ops=units[unit]) for unit in Unit if units[unit]),
        ops=tuple(ops),
        verdict=verdict(len(ops) - away - units[Unit.UNSPECIFIED], away, units[Unit.UNSPECIFIED]),
        detail=detail,
        standin=standin,
    )


def unknown(detail: str) -> Placement:
    """A placement that is not known, and why."""
    return Placement(detail=detail)


def is_away(op: OpPlacement, wanted: str) -> bool:
    """Whether an op is not in the delegate or provider that was asked for, but on the CPU or its like."""
    moved = op.unit in ON_CPU or (bool(op.delegate) and op.delegate == FALLS_BACK_TO.get(wanted))
    return moved and not (wanted and op.delegate == wanted)


def fallen_back(placement: Placement, wanted: str) -> Tuple[OpPlacement, ...]:
    """The ops that are not where they were asked to be; none when nothing but the CPU was asked for."""
    return tuple(op for op in placement.ops if wanted and is_away(op, wanted))


def verdict(accelerated: int, on_cpu: int, open_ops: int = 0) -> Verdict:
    """What so many ops on the accelerator, on the CPU and on no known unit amount to."""
    if accelerated and on_cpu:
        return Verdict.PARTLY
    if open_ops or not accelerated + on_cpu:
        return Verdict.UNSPECIFIED
    return Verdict.ACCELERATED if accelerated else Verdict.NOT_ACCELERATED


def own_report(placement: Placement) -> EvidenceReport:
    """What the placement itself says, as one of several reports."""
    return EvidenceReport(
        evidence=placement.evidence,
        verdict=placement.verdict,
        detail=placement.detail,
        accelerated_ops=placement.accelerated_ops,
        cpu_ops=placement.cpu_ops,
    )


def with_report(placement: Placement, *reports: EvidenceReport) -> Placement:
    """The placement with its own evidence among the reports, and ``reports`` behind, each kind once."""
    own = own_report(placement)
    new = {report.evidence for report in reports}
    found = [report for report in placement.evidence_reports if report.evidence not in new]
    if own.evidence not in (Evidence.UNSPECIFIED, *new, *(report.evidence for report in found)):
        found.append(own)
    return replace(placement, evidence_reports=(*found, *reports))


def listed(counts: "Counter[str]", most: int = 6) -> str:
    """``3 CONV_2D, 1 SOFTMAX``: for a person, the most frequent first."""
    parts = [f"{number} {name}" for name, number in counts.most_common(most)]
    rest = sum(counts.values()) - sum(number for _, number in counts.most_common(most))
    return ", ".join(parts + ([f"{rest} others"] if rest else []))
