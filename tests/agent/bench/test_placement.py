from __future__ import annotations

from collections import Counter

import pytest

from boardbench.agent.bench import placement
from boardbench.agent.domain import (
    Evidence,
    EvidenceReport,
    OpPlacement,
    Placement,
    Unit,
    UnitCount,
    Verdict,
)


def known(*units: Unit) -> Placement:
    ops = [OpPlacement(index=at, type=unit.name, unit=unit) for at, unit in enumerate(units)]
    return placement.known(ops, evidence=Evidence.PARTITION, detail="")


@pytest.mark.parametrize(
    ("units", "verdict"),
    [
        ((Unit.TPU, Unit.GPU, Unit.NPU, Unit.DELEGATE), Verdict.ACCELERATED),
        ((Unit.TPU, Unit.CPU), Verdict.PARTLY),
        ((Unit.TPU, Unit.CPU_DELEGATE, Unit.UNSPECIFIED), Verdict.PARTLY),
        ((Unit.CPU, Unit.CPU_DELEGATE), Verdict.NOT_ACCELERATED),
        ((Unit.CPU, Unit.UNSPECIFIED), Verdict.UNSPECIFIED),
        ((Unit.TPU, Unit.UNSPECIFIED), Verdict.UNSPECIFIED),
        ((), Verdict.UNSPECIFIED),
    ],
)
def test_the_verdict_never_claims_more_than_the_list(units: tuple[Unit, ...], verdict: Verdict) -> None:
    assert known(*units).verdict is verdict


def test_a_cpu_delegate_is_the_cpu_and_the_unknown_is_nowhere() -> None:
    found = known(Unit.CPU, Unit.CPU_DELEGATE, Unit.TPU, Unit.DELEGATE, Unit.UNSPECIFIED)
    assert (found.accelerated_ops, found.cpu_ops) == (2, 2)
    assert found.accelerated_op_types == {"TPU": 1, "DELEGATE": 1}
    assert found.cpu_op_types == {"CPU": 1, "CPU_DELEGATE": 1}
    assert UnitCount(Unit.UNSPECIFIED, 1) in found.units
    assert sum(count.ops for count in found.units) == 5


def test_unknown_has_a_reason_and_no_number() -> None:
    found = placement.unknown("no way to tell")
    assert found.evidence is Evidence.UNSPECIFIED
    assert (found.accelerated_ops, found.cpu_ops, found.ops, found.units) == (None, None, (), ())
    assert found.verdict is Verdict.UNSPECIFIED
    assert found.detail == "no way to tell"


def test_a_list_for_a_person_is_short() -> None:
    assert placement.listed(Counter("aaabbc")) == "3 a, 2 b, 1 c"
    assert placement.listed(Counter("aaabbcd"), most=2) == "3 a, 2 b, 2 others"


def report(evidence: Evidence, detail: str) -> EvidenceReport:
    return EvidenceReport(evidence=evidence, verdict=Verdict.UNSPECIFIED, detail=detail)


def test_a_placement_reports_its_own_evidence_and_each_kind_once() -> None:
    found = placement.with_report(known(Unit.TPU), report(Evidence.PROFILED, "first"))
    found = placement.with_report(found, report(Evidence.PROFILED, "second"))
    assert [(each.evidence, each.detail) for each in found.evidence_reports] == [
        (Evidence.PARTITION, ""),
        (Evidence.PROFILED, "second"),
    ]
    assert found.evidence_reports[0].accelerated_ops == 1
    assert placement.with_report(placement.unknown("nobody knows")).evidence_reports == ()


@pytest.mark.parametrize(
    ("wanted", "verdict", "away"),
    [
        ("", Verdict.NOT_ACCELERATED, []),
        ("OpenVINO", Verdict.PARTLY, [2, 3]),
        ("elsewhere", Verdict.NOT_ACCELERATED, [0, 1, 2, 3]),
    ],
)
def test_the_verdict_is_about_what_was_asked_for(wanted: str, verdict: Verdict, away: list[int]) -> None:
    ops = [
        OpPlacement(index=at, type="OP", unit=unit, delegate=delegate)
        for at, (unit, delegate) in enumerate(
            [
                (Unit.CPU_DELEGATE, "OpenVINO"),
                (Unit.CPU_DELEGATE, "OpenVINO"),
                (Unit.CPU_DELEGATE, "XNNPACK"),
                (Unit.CPU, ""),
            ]
        )
    ]
    found = placement.known(ops, evidence=Evidence.PARTITION, detail="", wanted=wanted)
    assert (found.verdict, found.accelerated_ops, found.cpu_ops) == (verdict, 0, 4)
    assert [op.index for op in placement.fallen_back(found, wanted)] == away
