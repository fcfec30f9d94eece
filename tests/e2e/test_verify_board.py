"""``boardbench-agent verify-board``: the row and the file that say what ran here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def test_a_row_for_every_engine_and_a_file_with_everything(programs: Any, demo_tflite: Path) -> None:
    out = programs.folder / "evidence.json"
    script = str(Path(sys.executable).parent / "boardbench-agent")
    arguments = [
        sys.executable,
        script,
        "verify-board",
        str(demo_tflite),
        f"--out={out}",
        f"--data-dir={programs.folder}",
    ]
    program = programs.start("verify", arguments)
    assert program.process.wait(150) == 0, program.log()
    rows = [line for line in program.log().splitlines() if line.startswith("| ")]
    assert rows[0] == "| board | system | Python | engine | device | how | date |"
    assert any(" ai-edge-litert " in row and f" {demo_tflite.name}, " in row for row in rows[1:])
    evidence = json.loads(out.read_text())
    ran = {
        (run["runtime"], run["device"]): run["result"]["status"] for run in evidence["runs"] if run["result"]
    }
    assert ran["tflite", "cpu"] == "RUN_STATUS_SUCCEEDED"
    # OpenVINO refuses to spread a model over a single processor, which is told and breaks nothing.
    refused = [row for row in rows if "| not run: " in row]
    assert len(refused) == sum(status != "RUN_STATUS_SUCCEEDED" for status in ran.values())
    assert len(evidence["runs"]) == len(rows) - 1
    assert evidence["described"]["board"]["device_id"]


def test_a_file_that_is_no_model_is_told(programs: Any, tmp_path: Path) -> None:
    script = str(Path(sys.executable).parent / "boardbench-agent")
    (tmp_path / "x.tflite").write_text("no model")
    program = programs.start(
        "verify",
        [sys.executable, script, "verify-board", str(tmp_path / "x.tflite"), f"--data-dir={programs.folder}"],
    )
    assert program.process.wait(150) == 2, program.log()
    assert "x.tflite" in program.log()
