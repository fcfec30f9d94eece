"""Runs that are measured in one go, process by process, each from its start to its one result.

A run by itself is a session of one member. Its processes come one after the other, each fresh; what they
measured is pooled in :mod:`boardbench.agent.pool`. Several members are either *interleaved*: their processes
take turns in an order that is balanced against drift (A B, B A, …); or *concurrent*: each measures by itself,
then all are warmed up, let go at once, and kept running until the last of them has counted enough.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Any, TypeVar

from boardbench.agent import folder, validity, wire
from boardbench.agent.config import AgentConfig
from boardbench.agent.plan import Job, Plan, blank_result
from boardbench.agent.run import Attempt
from boardbench.v1 import agent_pb2, result_pb2

if TYPE_CHECKING:
    # Loaded when a board is set up: few runs ask for it.
    from boardbench.agent.board.power_modes import PowerModes
    from boardbench.agent.board.tune import Tuner

_log = logging.getLogger(__name__)

# Why a run of a group failed, when the group did.
ERRORS = {
    "group_ended": "Another run of the same group, which was to be measured at the same time, has ended.",
    "group_incomplete": "The other runs of the group did not come in time.",
}

# Doubts about the number of samples: those of several processes are counted together.
OF_SAMPLES = frozenset(("few_samples", "precision_not_reached"))
# Stages that each process goes through, and of which watchers see how far all of them are.
_SHARED_STAGES = (result_pb2.STAGE_WARM_UP, result_pb2.STAGE_MEASURE)
# What a spec says about the whole run.
_OF_THE_RUN = (
    "duration_seconds",
    "min_runs",
    "max_runs",
    "precision",
    "confidence",
    "processes",
    "scenario",
    "cool_down_celsius",
    "cool_down_seconds",
    "tune",
    "group",
    "precision_seconds",
)

_T = TypeVar("_T")


class Session:
    """Members that are measured in one go. :meth:`execute` is called once; :meth:`stop` at any time."""

    def __init__(
        self,
        jobs: Sequence[Job],
        config: AgentConfig,
        emit: Callable[[str, wire.WorkerNews], None],
        ended: Callable[[result_pb2.RunResult], Awaitable[None]],
        tuner: Tuner | None = None,
    ) -> None:
        """``emit`` is called with a run's id and every event of it but the result.

        ``ended`` is called with the result of each member, once, as soon as it is settled; what is measured
        next waits for it. ``tuner`` is the one of this board, if there is one already.
        """
        self._config = config
        self._emit = emit
        self._ended = ended
        self._members = {job.run_id: _Member(job, config, emit, tuner) for job in jobs}
        self._tuner = tuner
        # Who holds the board; empty when nobody of this session does.
        self._owner = ""
        # Of a board that is in another power mode than before; None while it is not.
        self._modes: PowerModes | None = None
        # Jobs of one session are of one group, or there is only one.
        self._group = jobs[0].asked.group
        self._at_the_same_time = self._group.mode == result_pb2.GROUP_MODE_CONCURRENT
        self._ends: set[asyncio.Task[None]] = set()

    @property
    def run_id(self) -> str:
        """The run that is being measured; of several that take turns, the one whose turn it is."""
        for run_id, member in self._members.items():
            if member.attempt is not None:
                return run_id
        return ""

    def stage(self, run_id: str) -> result_pb2.Stage.ValueType:
        """The stage that the run is in; unspecified while it waits for its turn, and when it has ended."""
        attempt = self._members[run_id].attempt
        return result_pb2.STAGE_UNSPECIFIED if attempt is None else attempt.stage

    async def execute(self) -> None:
        """Measures all of it; every member has its result then."""
        try:
            if await self._set_power_mode():
                await self._set_up()
                if self._at_the_same_time and len(self._members) > 1:
                    await self._measure_at_the_same_time()
                else:
                    await self._take_turns()
            while self._ends:
                await asyncio.gather(*self._ends)
        finally:
            # Also when this task is cancelled: it is put back all the same.
            for line in await asyncio.shield(self._put_back()):
                _log.warning("%s", line)

    # --- the board's settings

    async def _set_power_mode(self) -> bool:
        """Whether the board is in the mode that was asked for; if not, all members have failed."""
        wanted = next(iter(self._members.values())).job.plan.spec.power_mode
        if not wanted:
            return True
        from boardbench.agent.board.power_modes import NoPowerMode, PowerModes

        # Put back by whoever ends this, also when it is cancelled in here.
        self._modes = modes = PowerModes(self._config.sys_root, self._config.data_dir)
        try:
            await asyncio.to_thread(modes.set, wanted)
        except NoPowerMode as error:
            for member in self._members.values():
                self._stop(member, result_pb2.RunError(code="power_mode_not_set", message=str(error)))
            while self._ends:
                await asyncio.gather(*self._ends)
            return False
        return True

    async def _set_up(self) -> None:
        """Holds the board as it is set up for measuring: set once, and not again for every process."""
        jobs = [member.job for member in self._members.values()]
        if not any(job.plan.spec.tune for job in jobs):
            return
        if self._tuner is None:
            from boardbench.agent.board.tune import Tuner

            self._tuner = Tuner(self._config.sys_root, self._config.data_dir)
            for member in self._members.values():
                member.tuner = self._tuner
        self._owner = f"session {jobs[0].run_id}"
        # What could not be set, each process tells.
        await asyncio.to_thread(self._tuner.acquire, self._owner)

    async def _put_back(self) -> list[str]:
        """Lets go of the board, once; what could not be put back."""
        failed: list[str] = []
        if self._tuner is not None and self._owner:
            owner, self._owner = self._owner, ""
            failed += await asyncio.to_thread(self._tuner.release, owner)
        if self._modes is not None:
            # After the clocks, whose bounds are those of the mode.
            modes, self._modes = self._modes, None
            failed += await asyncio.to_thread(modes.put_back)
        return failed

    def stop(self, run_id: str, error: result_pb2.RunError | None = None) -> None:
        """Ends a member at once: failed with that error, or cancelled without one. One that is over stays so.

        The others go on, unless they are measured at the same time: then they fail.
        """
        self._stop(self._members[run_id], error)
        if self._at_the_same_time:
            self._break_up(self._members[run_id])

    def stop_all(self, error: Callable[[result_pb2.Stage.ValueType], result_pb2.RunError]) -> None:
        """Ends every member at once; ``error`` is called with the stage that each is in."""
        for run_id, member in self._members.items():
            self._stop(member, error(self.stage(run_id)))

    def _stop(self, member: _Member, error: result_pb2.RunError | None) -> None:
        if member.is_out:
            return
        member.stopped, member.error = True, error
        if member.attempt is not None:
            member.attempt.stop(error)
        else:
            self._end_soon(member)

    # --- one after the other

    async def _take_turns(self) -> None:
        members = list(self._members.values())
        for member in turns(members, [member.plan.processes for member in members], self._group.id):
            if member.is_out:
                continue
            position = len(member.results)
            result = await member.start(member.plan.of_process(position), position)
            if result.status != result_pb2.RUN_STATUS_SUCCEEDED:
                await self._end(member, member.failed(result))
                continue
            member.results.append(result)
            # A stop that came when the last process was over came too late.
            if member.stopped and not member.has_measured:
                await self._end(member, member.unfinished())
        # All of them are needed to compare each with the others.
        measured = [member for member in members if member.has_measured and not member.over]
        await self._end_all(measured)

    # --- at the same time

    async def _measure_at_the_same_time(self) -> None:
        members = list(self._members.values())
        for position in range(members[0].plan.processes):
            for member in members:
                if not await self._measure_alone(member, position):
                    return
            if not await self._measure_together(members, position):
                return
        await self._end_all(members)

    async def _measure_alone(self, member: _Member, position: int) -> bool:
        """Whether it has measured; when it has not, the session is over."""
        if member.is_out:
            return False
        member.quiet = True
        result = await member.start(member.plan.of_process(position).alone(), position)
        member.quiet = False
        if result.status == result_pb2.RUN_STATUS_SUCCEEDED:
            member.alone.append(result)
            return not member.stopped
        self._break_up(member)
        await self._end(member, member.failed(result))
        return False

    async def _measure_together(self, members: Sequence[_Member], position: int) -> bool:
        """Whether all of them have measured; when one has not, the session is over."""
        tasks: dict[_Member, asyncio.Task[result_pb2.RunResult]] = {}
        try:
            # One loads after the other: loading is not what is to be measured under load.
            for member in members:
                if member.is_out:
                    break
                others = [other for other in members if other is not member]
                plan = member.plan.of_process(position).together()
                tasks[member] = member.start(plan, position, others)
                if not await _before_any_ends(tasks, [member.attempt_now.ready]):
                    break
            else:
                attempts = [member.attempt_now for member in members]
                for attempt in attempts:
                    attempt.go()
                if await _before_any_ends(tasks, [attempt.counted for attempt in attempts]):
                    for attempt in attempts:
                        attempt.enough()
            return await self._conclude(members, tasks)
        except BaseException:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            raise

    async def _conclude(
        self, members: Sequence[_Member], tasks: dict[_Member, asyncio.Task[result_pb2.RunResult]]
    ) -> bool:
        """Takes what the tasks come to; when one of them does not measure, none has."""
        for member, task in tasks.items():
            if task.done() and task.result().status != result_pb2.RUN_STATUS_SUCCEEDED:
                self._break_up(member)
        results = {member: await task for member, task in tasks.items()}
        measured = [m for m, result in results.items() if result.status == result_pb2.RUN_STATUS_SUCCEEDED]
        if len(measured) == len(members):
            for member in members:
                member.results.append(results[member])
            # A stop that came when the last process was over came too late.
            if members[0].has_measured or not any(member.stopped for member in members):
                return True
        for member in results:
            if member not in measured:
                self._break_up(member)
        for member, result in results.items():
            await self._end(member, member.unfinished() if member in measured else member.failed(result))
        return False

    def _break_up(self, cause: _Member) -> None:
        """What is measured at the same time ends when one of it does."""
        how = "failed"
        if cause.stopped and cause.error is None:
            how = "was cancelled"
        for member in self._members.values():
            if member is not cause:
                self._stop(
                    member,
                    result_pb2.RunError(
                        code="group_ended",
                        message=f"run {cause.job.run_id} ({cause.job.model.name}), which was to be "
                        f"measured at the same time, {how}: run the whole group again",
                    ),
                )

    # --- how it ends

    def _end_soon(self, member: _Member) -> None:
        task = asyncio.create_task(self._end(member, member.unfinished()))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _end_all(self, members: Sequence[_Member]) -> None:
        """Ends members that have measured all that they were to."""
        not_put_back = await self._put_back()
        results = {member: await asyncio.to_thread(member.pooled) for member in members}
        for result in results.values():
            result.warnings.extend(
                validity.warn("not_tuned", line, validity.NOTE, time=wire.timestamp(time_ns()))
                for line in not_put_back
            )
        if len(members) > 1:
            # Most runs are by themselves, and an agent that waits needs no statistics.
            from boardbench.agent import pool

            if self._at_the_same_time:
                for member, result in results.items():
                    others = [other.job.run_id for other in members if other is not member]
                    pool.set_against(result, member.alone, others, member.plan)
            else:
                pool.compare(list(results.values()))
        for member, result in results.items():
            for warning in result.warnings:
                validity.weigh(warning, self._config.validity.severity)
                if member.is_pooled:
                    member.tell(warning)
            await self._end(member, result)

    async def _end(self, member: _Member, result: result_pb2.RunResult) -> None:
        if not member.over:
            member.over = True
            validity.settle(result, self._config.validity.severity)
            await self._ended(result)


async def _before_any_ends(
    tasks: dict[_Member, asyncio.Task[result_pb2.RunResult]], events: Sequence[asyncio.Event]
) -> bool:
    """Whether all of these events happened before any of the tasks ended."""
    happened = asyncio.ensure_future(asyncio.gather(*(event.wait() for event in events)))
    waited_for: list[asyncio.Future[Any]] = [happened, *tasks.values()]
    try:
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        return happened.done() and not any(task.done() for task in tasks.values())
    finally:
        happened.cancel()
        await asyncio.gather(happened, return_exceptions=True)


class _Member:
    """One run of a session."""

    def __init__(
        self,
        job: Job,
        config: AgentConfig,
        emit: Callable[[str, wire.WorkerNews], None],
        tuner: Tuner | None,
    ) -> None:
        self.job = job
        self.plan = job.plan
        self.tuner = tuner
        self.attempt: Attempt | None = None
        # What each process has measured, and what each has by itself before all measured together.
        self.results: list[result_pb2.RunResult] = []
        self.alone: list[result_pb2.RunResult] = []
        # Whether what it is doing is not to be told: doubts about a measurement that only serves another.
        self.quiet = False
        self.over = False
        self.stopped = False
        # Why it was stopped; one that was cancelled has none.
        self.error: result_pb2.RunError | None = None
        self._config = config
        self._tell = emit
        self._told: set[str] = set()
        self._left_seconds = job.plan.spec.timeout_seconds
        self._is_out_of_time = False
        self._position = 0
        # When each of the processes began whose results count.
        self._began: list[float] = []
        # Inferences and seconds of the processes before, by stage; and of this one so far.
        self._before: dict[int, tuple[int, float]] = {}
        self._latest: dict[int, tuple[int, float]] = {}

    @property
    def is_out(self) -> bool:
        """Whether nothing more is to be measured of it."""
        return self.over or self.stopped

    @property
    def has_measured(self) -> bool:
        """Whether all its processes have measured."""
        return len(self.results) == self.plan.processes

    @property
    def attempt_now(self) -> Attempt:
        """The process that was started."""
        assert self.attempt is not None
        return self.attempt

    def start(
        self, plan: Plan, position: int, others: Sequence[_Member] = ()
    ) -> asyncio.Task[result_pb2.RunResult]:
        """Starts one process, the one at this position from 0, beside those of others; what it comes to."""

        def peers() -> Iterator[int]:
            for other in others:
                if other.attempt is not None and other.attempt.pid is not None:
                    yield other.attempt.pid

        self._position = position
        scratch = self.job.scratch / str(position)
        scratch.mkdir(mode=0o700)
        job = replace(self.job, plan=plan, scratch=scratch)
        self.attempt = Attempt(job, self._config, self._heard, tuner=self.tuner, peers=peers)
        if not self.quiet:
            self._began.append(asyncio.get_running_loop().time())
        return asyncio.create_task(self._execute(self.attempt, scratch))

    async def _execute(self, attempt: Attempt, scratch: Path) -> result_pb2.RunResult:
        loop = asyncio.get_running_loop()
        began = loop.time()
        # Of those that take turns, none pays for the others' time.
        timer = loop.call_later(self._left_seconds, self._out_of_time)
        try:
            return await attempt.execute()
        finally:
            timer.cancel()
            self._left_seconds -= loop.time() - began
            self.attempt = None
            self._add_up()
            await asyncio.to_thread(folder.remove_tree, scratch)

    def _out_of_time(self) -> None:
        self._is_out_of_time = True
        timeout = self.plan.spec.timeout_seconds
        self.attempt_now.stop(
            result_pb2.RunError(
                code="deadline",
                message=f"the whole run was not over after {timeout:g} s (timeout_seconds); the worker was "
                "killed: the model or the engine hangs, or this board needs more time for it",
            )
        )

    # --- what is told while it goes on

    def _heard(self, event: wire.WorkerNews) -> None:
        if isinstance(event, result_pb2.Warning) and self.is_pooled:
            # What one of several processes doubts, another may make up for.
            if not self.quiet and event.code not in OF_SAMPLES:
                self.tell(event)
            return
        if isinstance(event, agent_pb2.ProgressEvent) and event.stage in _SHARED_STAGES:
            event = self._of_all(event)
        self._tell(self.job.run_id, event)

    def tell(self, warning: result_pb2.Warning) -> None:
        """Tells of a doubt once, however many processes raise it; the result says which did."""
        if warning.code not in self._told:
            self._told.add(warning.code)
            self._tell(self.job.run_id, warning)

    def _of_all(self, event: agent_pb2.ProgressEvent) -> agent_pb2.ProgressEvent:
        """Progress of one process as that of all of them."""
        self._latest[event.stage] = event.runs, event.elapsed_seconds
        runs, seconds = self._before.get(event.stage, (0, 0.0))
        found = agent_pb2.ProgressEvent()
        found.CopyFrom(event)
        found.runs = runs + event.runs
        found.elapsed_seconds = seconds + event.elapsed_seconds
        if event.HasField("fraction"):
            found.fraction = (self._position + event.fraction) / self.plan.processes
        return found

    def _add_up(self) -> None:
        for stage, (runs, seconds) in self._latest.items():
            before = self._before.get(stage, (0, 0.0))
            self._before[stage] = before[0] + runs, before[1] + seconds
        self._latest.clear()

    # --- its result

    @property
    def is_pooled(self) -> bool:
        """Whether its result is made of those of several processes."""
        return self.plan.processes > 1 or self.plan.spec.group.mode == result_pb2.GROUP_MODE_CONCURRENT

    def pooled(self) -> result_pb2.RunResult:
        """The result of all that it measured."""
        if not self.is_pooled:
            result = self.results[0]
        else:
            from boardbench.agent import pool

            offsets = [began - self._began[0] for began in self._began]
            result = pool.pooled(self.results, self.plan, offsets, self._config.validity)
        self._say_what_was_done(result)
        return result

    def failed(self, result: result_pb2.RunResult) -> result_pb2.RunResult:
        """The result of a run of which a process came to this."""
        if self.plan.processes > 1 and not self.stopped and not self._is_out_of_time:
            which = f"process {self._position + 1} of {self.plan.processes}"
            result.error.message = f"{which}: {result.error.message}"
        before = self.alone or self.results
        if before:
            result.started_at.CopyFrom(before[0].started_at)
        return result

    def unfinished(self) -> result_pb2.RunResult:
        """The result of a run that was stopped between two of its processes, or before the first."""
        job = self.job
        result = blank_result(job.run_id, job.model, job.asked, job.board, job.created_at)
        before = self.alone or self.results
        if before:
            result.started_at.CopyFrom(before[0].started_at)
        if self.error is None:
            result.status = result_pb2.RUN_STATUS_CANCELLED
        else:
            result.status = result_pb2.RUN_STATUS_FAILED
            result.error.CopyFrom(self.error)
        return result

    def _say_what_was_done(self, result: result_pb2.RunResult) -> None:
        """What the whole run was to do, of which a process knows only its part."""
        done, planned = result.effective_spec, self.plan.spec
        del done.precision[:]
        of_the_run = result_pb2.BenchmarkSpec()
        of_the_run.CopyFrom(planned)
        for field, _ in planned.ListFields():
            if field.name not in _OF_THE_RUN:
                of_the_run.ClearField(field.name)  # type: ignore[arg-type]  # the stub wants literals
        done.MergeFrom(of_the_run)


def turns(members: Sequence[_T], counts: Sequence[int], seed: str) -> Iterator[_T]:
    """The order in which members take their turns, each as often as it is to.

    Rounds come in pairs, the second backwards: whatever changes steadily while they last then changes as much
    for each. The first of a pair is drawn, so that nothing periodic on the board falls in step with it.
    """
    order = list(range(len(members)))
    for round_ in range(max(counts)):
        if round_ % 2:
            order.reverse()
        else:
            order.sort(key=lambda position: zlib.crc32(f"{seed} {round_} {position}".encode()))
        for position in order:
            if round_ < counts[position]:
                yield members[position]
