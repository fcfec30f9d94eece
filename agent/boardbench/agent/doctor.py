"""The examination of this board without a server: what is found, for a person, and a fix that is held."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from boardbench.agent.board.identify import derive_device_id, identify
from boardbench.agent.board.tune import Tuner
from boardbench.agent.config import AgentConfig
from boardbench.agent.examine import Examiner
from boardbench.agent.probe import Engines
from boardbench.v1 import agent_pb2, board_pb2

_MARKS = {
    agent_pb2.FINDING_STATE_INVALID: "✗",
    agent_pb2.FINDING_STATE_DOUBTFUL: "!",
    agent_pb2.FINDING_STATE_UNSPECIFIED: "?",
    agent_pb2.FINDING_STATE_OK: "✓",
    agent_pb2.FINDING_STATE_ABSENT: "–",
}
"""By state, the worst first: the order in which they are shown."""

_DOUBTS = (agent_pb2.FINDING_STATE_INVALID, agent_pb2.FINDING_STATE_DOUBTFUL)


async def doctor(
    config: AgentConfig,
    request: agent_pb2.ExamineRequest,
    show: Callable[[agent_pb2.ExamineResponse], None],
) -> bool:
    """Whether the board is fit to measure on, and all was done that was asked for.

    With ``fix`` it returns when the time is over, or at SIGTERM or SIGINT, and has put everything back then.
    Raises InvalidRequest, ConfigurationError.
    """
    tuner = Tuner(config.sys_root, config.data_dir)
    # What an agent left that was killed; one that runs keeps it.
    recovered = await asyncio.to_thread(tuner.recover) if request.restore else []
    failed = tuner.failed
    with tempfile.TemporaryDirectory(prefix="boardbench-") as folder:
        engines = Engines(config, Path(folder))

        def describe_board() -> board_pb2.Board:
            device_id = config.device_id or derive_device_id(config.sys_root, config.data_dir)
            return identify(config.sys_root, device_id=device_id, labels=config.labels)

        examiner = Examiner(config, tuner, identify=describe_board, statuses=engines.statuses)
        with _stopped() as stop:
            try:
                examined = await examiner.answer(request)
                examined.failed.extend(failed)
                show(examined)
                for line in recovered:
                    _tell(f"put back: {line}")
                if request.fix and examined.changed:
                    await _until(stop, examined)
            finally:
                left = await examiner.close()
    for line in left:
        _tell(line)
    return is_fit(examined) and not examined.failed and not left


def is_fit(examined: agent_pb2.ExamineResponse) -> bool:
    """Whether no check has a doubt. What can't be told is none."""
    return not any(finding.state in _DOUBTS for finding in examined.findings)


def page(examined: agent_pb2.ExamineResponse) -> str:
    """What was found, for a person: the worst first, each with what to do about it."""
    order = list(_MARKS)
    lines = ["fit to measure on" if is_fit(examined) else "not fit to measure on"]
    width = max((len(finding.code) for finding in examined.findings), default=0)
    for finding in sorted(examined.findings, key=lambda each: order.index(each.state)):
        lines.append(f"  {_MARKS[finding.state]} {finding.code:{width}}  {finding.message}")
        if finding.fix:
            lines.append(f"    {'':{width}}  → {finding.fix}")
    if examined.changed:
        lines += ["set:", *(f"  {line}" for line in examined.changed)]
    if examined.failed:
        lines += ["could not be set or put back:", *(f"  {line}" for line in examined.failed)]
    return "\n".join(lines)


async def _until(stop: asyncio.Event, examined: agent_pb2.ExamineResponse) -> None:
    """Returns when what was set is to be put back."""
    moment = examined.restored_at.ToNanoseconds() / 1e9
    _tell(f"held until {time.strftime('%H:%M:%S', time.localtime(moment))}; Ctrl-C puts it back now")
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(stop.wait(), max(0.0, moment - time.time()))


@contextlib.contextmanager
def _stopped() -> Iterator[asyncio.Event]:
    """Set by SIGTERM and SIGINT inside the context, instead of the process being ended."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
