"""Examines the board: what is found, and what is set and put back for that. The face of ``doctor``."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from boardbench.agent import wire
from boardbench.agent.board.tune import TimedHold, Tuner
from boardbench.agent.config import AgentConfig
from boardbench.agent.errors import Conflict, InvalidRequest
from boardbench.v1 import agent_pb2, board_pb2

if TYPE_CHECKING:
    from boardbench.agent.board.check import View

OWNER = "doctor"
"""Its name among those who hold the board."""

HOLD_SECONDS = 3600.0
"""How long what was set stays when nothing is said."""

# A day and more is no measurement any more, and a board that was forgotten stays hot.
_LONGEST_SECONDS = 7 * 86400.0
_NANOSECONDS = 1_000_000_000
# adjtimex(2): the kernel's clock is not kept right by anybody.
_TIME_ERROR = 5
# More than any layout of struct timex takes.
_TIMEX_BYTES = 1024


class Examiner:
    """Looks at one board. Used from one event loop."""

    def __init__(
        self,
        config: AgentConfig,
        tuner: Tuner,
        *,
        identify: Callable[[], board_pb2.Board],
        statuses: Callable[[], Awaitable[Sequence[board_pb2.RuntimeStatus]]],
        running: Callable[[], str] = str,
    ) -> None:
        """``statuses`` asks the engines; ``running`` is the run that is measured, empty when none is."""
        self._config = config
        self._tuner = tuner
        self._identify = identify
        self._statuses = statuses
        self._running = running
        self._hold = TimedHold(tuner, OWNER, busy=lambda: bool(running()))

    async def answer(self, request: agent_pb2.ExamineRequest) -> agent_pb2.ExamineResponse:
        """What was found after setting, or putting back, what was asked for.

        Raises InvalidRequest, and Conflict while a run is measured that this would disturb.
        """
        failed: list[str] = []
        if request.fix and request.restore:
            raise InvalidRequest("fix and restore exclude each other")
        if request.fix or request.restore:
            seconds = request.hold_seconds if request.HasField("hold_seconds") else HOLD_SECONDS
            if not (math.isfinite(seconds) and 1 <= seconds <= _LONGEST_SECONDS):
                raise InvalidRequest(f"hold_seconds is {seconds:g}; it must be 1 to {_LONGEST_SECONDS:.0f}")
            if self._running():
                raise Conflict(
                    f"the run {self._running()[:8]} is being measured, and this would change its clocks: "
                    "ask again when it has ended"
                )
            failed = await (self._hold.hold(seconds) if request.fix else self._hold.let_go())
            others = [holder for holder in self._tuner.holders if holder != OWNER]
            if request.restore and others and self._tuner.changed:
                failed.append(f"{', '.join(others)} still needs the settings, and puts them back at its end")
        return agent_pb2.ExamineResponse(
            findings=await self._findings(),
            changed=self._tuner.changed,
            restored_at=wire.timestamp(round(self._hold.until * _NANOSECONDS))
            if self._hold.until is not None and self._tuner.changed
            else None,
            failed=failed,
        )

    async def close(self) -> list[str]:
        """Puts the board back, whoever holds it; what could not be put back."""
        return await self._hold.close()

    async def _findings(self) -> list[agent_pb2.Finding]:
        statuses = await self._statuses()
        return await asyncio.to_thread(self._look, tuple(statuses))

    def _look(self, statuses: Sequence[board_pb2.RuntimeStatus]) -> list[agent_pb2.Finding]:
        # Only here: an agent that waits needs nothing of it.
        from boardbench.agent.board.checks import findings

        return findings(self._view(statuses))

    def _view(self, statuses: Sequence[board_pb2.RuntimeStatus]) -> View:
        from boardbench.agent.board.check import View
        from boardbench.agent.board.watch import watch

        config = self._config
        running = self._running()
        return View(
            root=config.sys_root,
            board=self._identify(),
            limits=config.validity,
            runtimes=statuses,
            data_dir=config.data_dir,
            free_bytes=_free_bytes(config.data_dir),
            free_floor_bytes=config.store.free_floor_bytes,
            running_run_id=running,
            # Then the load is the run's, and looking at every process would be some more.
            work=watch(config.sys_root) if not running else None,
            clock_kept=clock_kept() if config.sys_root == Path("/") else None,
            without=config.sensors.without_kinds,
        )


def clock_kept() -> bool | None:
    """Whether a time service keeps the kernel's clock right; None where the kernel can't be asked."""
    # Only here: the agent has no other use for it.
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        # All zero: it only asks.
        answer = libc.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
        return None if answer < 0 else bool(answer != _TIME_ERROR)
    return None


def _free_bytes(folder: Path) -> int | None:
    """Bytes that this user may still write there, or where the folder would be made."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            found = os.statvfs(place)
            return found.f_bavail * found.f_frsize
    return None
