"""The evidence that this board works: every engine runs the models; a row for each, and a file with all."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from boardbench.agent import here, recognise, wire
from boardbench.agent.board.identify import EMULATORS
from boardbench.agent.config import AgentConfig
from boardbench.agent.errors import AgentError, ConfigurationError
from boardbench.v1 import agent_pb2, board_pb2, result_pb2

_SECONDS = 2.0
# The engine says beforehand that it does not do this, or the board lacks it: an answer, and no failure.
_NOT_HERE = ("runtime_unavailable", "cpu_fallback", "model_rejected")


async def verify(config: AgentConfig, models: Sequence[Path], out: Path | None) -> tuple[str, bool]:
    """Rows for docs/verified-on.md, and whether every run succeeded. The whole evidence goes into ``out``.

    Raises ConfigurationError where that can't be written, InvalidRequest for a model that can't be read.
    """
    described = await here.describe(config)
    runs: list[dict[str, Any]] = []
    rows: list[str] = []
    ended: list[bool] = []
    for model in models:
        kind = recognise.identify(model, model.name, recognise.FileKind.MODEL)
        for status in described.runtimes:
            for device in status.devices if status.available and kind in status.formats else ():
                result, problem = await _run(config, model, status, device)
                if result is not None and result.error.code not in _NOT_HERE:
                    ended.append(result.status == result_pb2.RUN_STATUS_SUCCEEDED)
                rows.append(_row(described, status, device, model, result, problem))
                runs.append(
                    {
                        "model": model.name,
                        "runtime": status.name,
                        "device": device,
                        "problem": problem or "",
                        "result": json.loads(wire.to_json(result)) if result is not None else None,
                    }
                )
    if not runs:
        raise ConfigurationError("no engine on this board takes any of these models: boardbench-agent probe")
    if out is not None:
        evidence = {"described": json.loads(wire.to_json(described)), "runs": runs}
        text = json.dumps(evidence, indent=1, ensure_ascii=False) + "\n"
        try:
            await asyncio.to_thread(out.write_text, text, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"--out {out}: can't be written: {error.strerror}") from error
    head = "| board | system | Python | engine | device | how | date |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *rows]), bool(ended) and all(ended)


async def _run(
    config: AgentConfig, model: Path, status: board_pb2.RuntimeStatus, device: str
) -> tuple[result_pb2.RunResult | None, str | None]:
    """The result, or why there is none."""
    spec = result_pb2.BenchmarkSpec(runtime=status.name, device=device, duration_seconds=_SECONDS)
    sys.stderr.write(f"{model.name} by {status.name} on {device}\n")
    try:
        result = await here.run(config, model, None, spec, lambda _: None)
    except AgentError as error:
        return None, str(error)
    return result, None


def _row(
    described: agent_pb2.DescribeResponse,
    status: board_pb2.RuntimeStatus,
    device: str,
    model: Path,
    result: result_pb2.RunResult | None,
    problem: str | None,
) -> str:
    board = described.board
    if result is not None and result.status == result_pb2.RUN_STATUS_SUCCEEDED:
        how = f"virtual machine ({board.emulator})" if board.emulator else "real"
        if board.emulator in EMULATORS:
            how = f"emulated ({board.emulator})"
        elif result.standins:
            how = f"stand-in ({', '.join(result.standins)})"
        how += f": {model.name}, {result.latency.count} inferences"
    else:
        why = problem if result is None else result.error.message
        missing = result is None or result.error.code in _NOT_HERE
        how = f"{'not run' if missing else 'failed'}: {why}"
    date = time.strftime("%Y-%m-%d", time.gmtime())
    cells = (
        board.model or board.soc or board.architecture,
        board.os,
        status.interpreter.version,
        status.version,
        device,
        how,
        date,
    )
    return "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |"
