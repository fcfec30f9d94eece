"""``boardbench demo``: everything at once, on this machine, with exit code 0 and nothing left behind."""

from __future__ import annotations

import re
import signal
import urllib.request
from typing import Any


def test_demo(programs: Any, survivors: Any) -> None:
    answer = programs.client("demo", seconds=170)
    text = answer.out + answer.err
    assert "tflite" in text and "onnx" in text
    assert "p50" in text
    assert "ARG_MAX" in text and "XNNPACK" in text.upper()
    assert "boardbench_latency_seconds" in text
    assert "Traceback" not in text
    assert survivors.started_with("HOME", str(programs.folder)) == []


def test_demo_stays_until_interrupted(programs: Any, survivors: Any, eventually: Any) -> None:
    program = programs.client.begin("demo", "--stay")

    def metrics_url() -> str | None:
        assert program.running, program.log()
        found = re.search(r"http://127\.0\.0\.1:\d+/metrics", program.log())
        return found[0] if found and "Ctrl-C" in program.log() else None

    url = eventually("the demo tells its URLs and stays", metrics_url, 150)
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert b"boardbench_latency_seconds{" in answer.read()
    left = survivors.started_with("HOME", str(programs.folder))
    assert {"boardbench.collector", "boardbench.agent"} <= {
        word for found in left for word in found.command.split()
    }
    assert program.end(signal.SIGINT, 30) == 0, program.log()
    assert survivors.started_with("HOME", str(programs.folder)) == []
