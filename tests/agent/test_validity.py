"""The verdict is the worst warning's, by documented rules that the configuration can move."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

from boardbench.agent import validity
from boardbench.agent.bench.doubts import DOUBTS
from boardbench.agent.board import throttling
from boardbench.agent.config import SEVERITIES
from boardbench.agent.validity import DOUBTFUL, INVALID, NOTE, RULES
from boardbench.v1 import result_pb2

UNSPECIFIED = result_pb2.SEVERITY_UNSPECIFIED
VALID = result_pb2.VALIDITY_VALID

VERDICTS = {
    NOTE: VALID,
    UNSPECIFIED: result_pb2.VALIDITY_DOUBTFUL,
    DOUBTFUL: result_pb2.VALIDITY_DOUBTFUL,
    INVALID: result_pb2.VALIDITY_INVALID,
}


def warnings(*severities: result_pb2.Severity.ValueType) -> list[result_pb2.Warning]:
    return [result_pb2.Warning(code="w", severity=severity) for severity in severities]


def result(*severities: result_pb2.Severity.ValueType) -> result_pb2.RunResult:
    return result_pb2.RunResult(status=result_pb2.RUN_STATUS_SUCCEEDED, warnings=warnings(*severities))


def test_nothing_against_it_is_valid() -> None:
    assert validity.verdict([]) == VALID


@pytest.mark.parametrize("severities", list(itertools.product(VERDICTS, repeat=3)))
def test_verdict_is_the_worst_of_all(severities: tuple[result_pb2.Severity.ValueType, ...]) -> None:
    assert validity.verdict(warnings(*severities)) == max(VERDICTS[severity] for severity in severities)


def test_severity_can_be_configured_by_code() -> None:
    found = result(INVALID, NOTE)
    found.warnings[0].code, found.warnings[1].code = "throttled", "governor"
    validity.settle(found, {"throttled": "doubtful", "governor": "doubtful", "high_load": "invalid"})
    assert [warning.severity for warning in found.warnings] == [DOUBTFUL, DOUBTFUL]
    assert found.validity == result_pb2.VALIDITY_DOUBTFUL
    validity.settle(found, {"throttled": "note", "governor": "note"})
    assert found.validity == VALID, "it can be settled again"


@pytest.mark.parametrize("name", SEVERITIES)
def test_every_name_of_a_severity_is_one(name: str) -> None:
    (warning,) = warnings(UNSPECIFIED)
    validity.weigh(warning, {"w": name})
    assert warning.severity == {"note": NOTE, "doubtful": DOUBTFUL, "invalid": INVALID}[name]


@pytest.mark.parametrize("status", [result_pb2.RUN_STATUS_FAILED, result_pb2.RUN_STATUS_CANCELLED])
def test_run_that_was_not_measured_has_no_verdict(status: result_pb2.RunStatus.ValueType) -> None:
    found = result(INVALID)
    validity.settle(found, {})
    found.status = status
    validity.settle(found, {})
    assert found.validity == result_pb2.VALIDITY_UNSPECIFIED


def test_warning_says_what_was_seen_and_what_to_do() -> None:
    warning = validity.warn("high_load", "a lot was seen", DOUBTFUL, evidence={"share": 0.3})
    assert warning.message == "a lot was seen: stop them"
    assert dict(warning.evidence) == {"share": 0.3}
    assert not warning.HasField("time")


def test_every_rule_is_complete_and_told_apart() -> None:
    assert len(validity.codes()) == len(RULES) + len(DOUBTS)
    for rule in RULES:
        assert all((rule.code, rule.condition, rule.reason, rule.remedy)), rule
        assert rule.severity.startswith(SEVERITIES), rule


def test_every_warning_of_the_agent_has_its_rule() -> None:
    """Also where a test does not come along."""
    folder = Path(validity.__file__).parent
    used = set()
    for path in [*folder.glob("*.py"), *(folder / "board").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warn", "validity.warn"):
                assert isinstance(node.args[0], (ast.Constant, ast.Name)), ast.unparse(node)
                used.add(getattr(node.args[0], "value", ""))
    # Those of throttling.py are called by the constants there.
    used |= {throttling.THROTTLED, throttling.UNDERVOLTAGE, throttling.OVER_CURRENT}
    assert used - {""} == {rule.code for rule in RULES}
