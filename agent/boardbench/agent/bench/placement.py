"""Counts and verdict of a placement, from its list of operations. One rule for every engine."""

from __future__ import annotations

from collections import Counter
from typing import Sequence

from boardbench.agent.domain import Evidence, OpPlacement, Placement, Unit, UnitCount, Verdict

ON_CPU = (Unit.CPU, Unit.CPU_DELEGATE)


def known(ops: Sequence[OpPlacement], *, evidence: Evidence, detail: str, standin: bool = False) -> Placement:
    """The placement that the list amounts to. An op on no known unit is in neither count.

    With such an op the counts are of the others, and the verdict stays open.
    """
    units = Counter(op.unit for op in ops)
    on_cpu = [op.type for op in ops if op.unit in ON_CPU]
    accelerated = [op.type for op in ops if op.unit not in ON_CPU and op.unit is not Unit.UNSPECIFIED]
    return Placement(
        evidence=evidence,
        accelerated_ops=len(accelerated),
        cpu_ops=len(on_cpu),
        accelerated_op_types=dict(Counter(accelerated)),
        cpu_op_types=dict(Counter(on_cpu)),
        units=tuple(UnitCount(unit=unit, ops=units[unit]) for unit in Unit if units[unit]),
        ops=tuple(ops),
        verdict=_verdict(len(accelerated), len(on_cpu), units[Unit.UNSPECIFIED]),
        detail=detail,
        standin=standin,
    )


def unknown(detail: str) -> Placement:
    """A placement that is not known, and why."""
    return Placement(detail=detail)


def _verdict(accelerated: int, on_cpu: int, open_ops: int) -> Verdict:
    if accelerated and on_cpu:
        return Verdict.PARTLY
    if open_ops or not accelerated + on_cpu:
        return Verdict.UNSPECIFIED
    return Verdict.ACCELERATED if accelerated else Verdict.NOT_ACCELERATED


def listed(counts: "Counter[str]", most: int = 6) -> str:
    """``3 CONV_2D, 1 SOFTMAX``: for a person, the most frequent first."""
    parts = [f"{number} {name}" for name, number in counts.most_common(most)]
    rest = sum(counts.values()) - sum(number for _, number in counts.most_common(most))
    return ", ".join(parts + ([f"{rest} others"] if rest else []))
