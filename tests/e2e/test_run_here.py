"""``boardbench run``: the same record without an agent."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

QUICK = ("--duration", "0.2", "--min-runs", "12", "--warm-up", "0")


def test_the_record_has_the_same_fields_as_a_push(programs: Any, demo_tflite: Path) -> None:
    agent = programs.agent()
    # The profile's times differ from run to run, and they are part of the placement.
    quick = (*QUICK, "--no-profile")
    pushed = programs.client("push", demo_tflite, "--to", agent.address, "--format", "json", *quick).json
    here = programs.client("run", demo_tflite, "--format", "json", *quick).json
    assert here["status"] == "RUN_STATUS_SUCCEEDED"
    # A calm moment has fewer doubts than a busy one.
    assert here.keys() - {"warnings"} == pushed.keys() - {"warnings"}
    assert here["model"] == pushed["model"]
    assert here["output_sha256"] == pushed["output_sha256"]
    assert here["placement"] == pushed["placement"]


def test_several_models(programs: Any, demo_tflite: Path, demo_onnx: Path) -> None:
    answer = programs.client("run", demo_tflite, demo_onnx, "--format", "json", *QUICK)
    assert [each["runtime"]["name"] for each in answer.json] == ["tflite", "onnxruntime"]


def test_a_bad_file(programs: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.tflite"
    path.write_bytes(b"\x1c\0\0\0TFL3" + os.urandom(2000))
    answer = programs.client("run", path, code=None)
    assert answer.code in (1, 2), answer
    assert "bad.tflite" in answer.out + answer.err
    assert "Traceback" not in answer.err


def test_interrupted(programs: Any, demo_onnx: Path, eventually: Any) -> None:
    client = programs.client.begin("run", demo_onnx, "--duration", "60", "--format", "json")

    def child() -> list[str]:
        assert client.running, client.log()
        found = []
        waiting = [client.pid]
        while waiting:
            pid = waiting.pop()
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                continue
            found += children
            waiting += [int(each) for each in children]
        return found if len(found) >= 2 else []

    children = eventually("the worker runs", child)
    assert client.end(signal.SIGINT) == 130, client.log()
    for pid in children:
        eventually(f"process {pid} is gone", lambda pid=pid: not Path(f"/proc/{pid}/exe").exists())
