"""``make observe``: real boards, a collector and a Prometheus with the rules, and all of it is seen."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
QUEUED = "synthetic-jetson"

# It measures for as long as it takes.
pytestmark = pytest.mark.soak


def test_boards_jobs_and_rules_are_seen(
    prometheus: dict[str, str], tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    ports, log = tmp_path / "ports.json", tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, REPOSITORY / "deploy" / "observe.py", "--ports", ports],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )

    def started() -> dict[str, Any] | None:
        assert process.poll() is None, log.read_text()
        try:
            return dict(json.loads(ports.read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    try:
        found = eventually("all of it runs", started, 120)

        def get(path: str, **query: str) -> Any:
            address = f"{found['prometheus']}/api/v1/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(address, timeout=20) as answer:
                return json.load(answer)["data"]

        def value(query: str) -> float:
            result = get("query", query=query)["result"]
            return float(result[0]["value"][1]) if result else 0.0

        written = (REPOSITORY / "deploy" / "prometheus" / "rules" / "boardbench.yml").read_text()
        told = {rule["name"] for group in get("rules")["groups"] for rule in group["rules"]}
        assert told == set(re.findall(r"(?:alert|record): (\S+)", written)) != set()

        boards = set(found["boards"])
        assert boards >= {"this-machine", QUEUED, "synthetic-raspberry"}
        eventually("all boards are up", lambda: value("sum(boardbench_device_up)") == len(boards), 60)
        # By the queue, as boards are reached that can't be called.
        eventually("a job is done", lambda: value('boardbench_jobs{state="done"}') >= 1, 120)
        wanted = f'count(boardbench_latency_seconds{{device="{QUEUED}", percentile="50"}})'
        eventually("its results are there", lambda: value(wanted) == 2, 60)
        # Its rails, of the synthetic files.
        assert value(f'count(boardbench_device_power_watts{{device="{QUEUED}"}})') > 0
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert process.returncode == 0, log.read_text()
