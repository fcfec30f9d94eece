"""The rules that we ship: valid, about metrics that there are, and each alert shown to fire."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from boardbench.collector.metrics import METRICS

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = FOLDER / "rules" / "boardbench.yml"
TESTS = sorted((FOLDER / "rules_tests").glob("*.yml"))

FindProgram = Callable[[str], str]


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_valid(find_program: FindProgram) -> None:
    run(find_program("promtool"), "check", "rules", str(RULES))


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_alerts_fire_when_they_should_and_only_then(find_program: FindProgram, file: Path) -> None:
    run(find_program("promtool"), "test", "rules", str(file))


def test_every_alert_is_shown_to_fire_and_to_be_silent() -> None:
    alerts = set(re.findall(r"alert: (\w+)", RULES.read_text()))
    tested = "".join(file.read_text() for file in TESTS)
    fired = set(re.findall(r"alertname: (\w+)\n\s+exp_alerts:\n", tested))
    silent = set(re.findall(r"alertname: (\w+)\}", tested))
    assert len(alerts) > 15
    assert fired == alerts
    # These are silent for one board or model in the very test in which they fire for another.
    assert alerts - silent == {"BoardbenchSeriesLeftOut"}


def test_rules_and_their_tests_are_about_metrics_that_there_are() -> None:
    known = {name for metric in METRICS for name in metric.samples}
    expressions = re.sub(r"#.*", "", RULES.read_text())
    for text in (expressions, *(file.read_text() for file in TESTS)):
        named = set(re.findall(r"\bboardbench_[a-z0-9_]+", text))
        assert named and named <= known
    recorded = set(re.findall(r"record: (\S+)", expressions))
    assert set(re.findall(r"\bboardbench:[a-z0-9_:]+", expressions)) == recorded
