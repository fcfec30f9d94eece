"""``boardbench demo``: everything at once, on this machine, with exit code 0 and nothing left behind."""

from __future__ import annotations

import re
import signal
import urllib.request
from pathlib import Path
from typing import Any


def _processes() -> set[int]:
    return {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}


def _ours(pids: set[int], folder: Path) -> list[str]:
    found = []
    for pid in pids:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "boardbench" in line and str(folder) in environment:
            found.append(line)
    return found


def test_demo(programs: Any) -> None:
    before = _processes()
    answer = programs.client("demo", seconds=170)
    text = answer.out + answer.err
    assert "tflite" in text and "onnx" in text
    assert "p50" in text
    assert "ARG_MAX" in text and "XNNPACK" in text.upper()
    assert "boardbench_latency_seconds" in text
    assert "Traceback" not in text
    assert _ours(_processes() - before, programs.folder) == [], "no process is left"


def test_demo_stays_until_interrupted(programs: Any, eventually: Any) -> None:
    before = _processes()
    program = programs.client.begin("demo", "--stay")

    def metrics_url() -> str | None:
        assert program.running, program.log()
        found = re.search(r"http://127\.0\.0\.1:\d+/metrics", program.log())
        return found[0] if found and "Ctrl-C" in program.log() else None

    url = eventually("the demo tells its URLs and stays", metrics_url, 150)
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert b"boardbench_latency_seconds{" in answer.read()
    assert program.end(signal.SIGINT, 30) == 0, program.log()
    assert _ours(_processes() - before, programs.folder) == [], "no process is left"
