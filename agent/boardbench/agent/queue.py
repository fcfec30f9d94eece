"""Runs in their order, one or one group at a time: taken, followed by any number of watchers, ended once.

A run lives here and in the journal, not in the call that asked for it: the call may break off at any
moment. Its result is in the spool before anybody is told about it.

Runs of a group wait until all of them are there, while others go before, and have the place of the last that
came. A group whose runs don't all come in time fails; so does one that is to be measured at the same time
when one of its runs is cancelled.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import errno
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.agent import folder, validity, wire
from boardbench.agent.config import AgentConfig
from boardbench.agent.drift import Placements
from boardbench.agent.errors import (
    AgentError,
    DiskFull,
    GroupClosed,
    InvalidRequest,
    ModelNotFound,
    NotRunnable,
    QueueFull,
    RunExists,
    RunNotFound,
    StorageError,
    Unavailable,
)
from boardbench.agent.journal import Ended, Journal, Order, Unfinished
from boardbench.agent.plan import RUN_ID, Job, Plan, blank_result, check_power_mode, check_spec, plan
from boardbench.agent.probe import Engines
from boardbench.agent.receive import StoredFile
from boardbench.agent.recognise import FileKind
from boardbench.agent.run import stage_name
from boardbench.agent.session import Session
from boardbench.agent.spool import Spool
from boardbench.agent.store import ModelStore
from boardbench.v1 import agent_pb2, board_pb2, model_pb2, result_pb2

if TYPE_CHECKING:
    # Loaded when a board is set up: few runs ask for it.
    from boardbench.agent.board.tune import Tuner

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# Progress that is kept for those who come late; beyond it every second one goes.
_KEPT_PROGRESS = 120


class _Run:
    """A run that this agent knows."""

    def __init__(self, order: Order, last_sequence: int = 0) -> None:
        self.order = order
        self.state: agent_pb2.RunState.ValueType = agent_pb2.RUN_STATE_QUEUED
        self.status: result_pb2.RunStatus.ValueType = result_pb2.RUN_STATUS_UNSPECIFIED
        # Empty when it is measured by itself.
        self.group = order.spec.group.id
        # While it is measured.
        self.session: Session | None = None
        self.leases = contextlib.ExitStack()
        # All but the result, while the run has not ended.
        self.events: list[agent_pb2.RunEvent] = []
        self.last_sequence = last_sequence
        # None where nobody knows: until the others of its group are there.
        self.runs_ahead: int | None = -1
        # Why it can't be begun; empty when it can.
        self.trouble = ""
        self.cancelled = False
        # Of an ended run, until another ends and the journal has this one.
        self.result_event: agent_pb2.RunEvent | None = None
        # Set, and replaced by a new one, whenever something happens.
        self.changed = asyncio.Event()

    def emit(self, event: agent_pb2.QueuedEvent | wire.WorkerNews) -> None:
        """Adds an event and wakes the watchers."""
        if isinstance(event, agent_pb2.ProgressEvent):
            self._thin()
        self.last_sequence += 1
        self.events.append(wire.to_event(self.order.run_id, self.last_sequence, event))
        self.wake()

    def end(self, result: result_pb2.RunResult) -> None:
        """The result is the last event, and the only one that is kept."""
        self.last_sequence += 1
        self.result_event = wire.to_event(self.order.run_id, self.last_sequence, result)
        self.events.clear()
        self.state, self.status, self.session = agent_pb2.RUN_STATE_ENDED, result.status, None
        self.leases.close()
        self.wake()

    @property
    def is_concurrent(self) -> bool:
        """Whether it is measured at the same time as the others of its group."""
        return self.order.spec.group.mode == result_pb2.GROUP_MODE_CONCURRENT

    @property
    def is_left_out(self) -> bool:
        """Whether the others of its group go on without it."""
        return self.status == result_pb2.RUN_STATUS_CANCELLED and not self.is_concurrent

    def wake(self) -> None:
        """Something happened."""
        self.changed.set()
        self.changed = asyncio.Event()

    def after(self, sequence: int) -> agent_pb2.RunEvent | None:
        """The first kept event with a higher sequence; never the result."""
        at = bisect.bisect_right(self.events, sequence, key=lambda event: event.sequence)
        return self.events[at] if at < len(self.events) else None

    def _thin(self) -> None:
        progress = [event for event in self.events if event.HasField("progress")]
        if len(progress) >= _KEPT_PROGRESS:
            dropped = {event.sequence for event in progress[::2]}
            self.events = [event for event in self.events if event.sequence not in dropped]


class Runs:
    """Every run that waits, runs or has lately ended. Used from one event loop; :meth:`work` does them."""

    def __init__(
        self,
        config: AgentConfig,
        store: ModelStore,
        spool: Spool,
        journal: Journal,
        placements: Placements,
        engines: Engines,
        identify: Callable[[], board_pb2.Board],
        scratch: Path,
        tuner: Tuner | None = None,
    ) -> None:
        """``identify`` says what the board is now; ``scratch`` is a folder for what workers leave.

        ``tuner`` is the one of this board, if there is one already.
        """
        self._config = config
        self._store = store
        self._spool = spool
        self._journal = journal
        self._placements = placements
        self._engines = engines
        self._identify = identify
        self._scratch = scratch
        self._tuner = tuner
        self._runs: dict[str, _Run] = {}
        self._waiting: list[_Run] = []
        # What is measured in one go.
        self._running: list[_Run] = []
        self._latest: _Run | None = None
        self._news = asyncio.Event()
        self._admission = asyncio.Lock()
        self._finished = 0
        # No further run begins meanwhile.
        self._held = False
        self._calm = asyncio.Event()
        # Why it stops; empty while it does not.
        self._stopping = ""
        # Of each group that is not complete, when it is no longer waited for.
        self._group_ends: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- what is going on

    @property
    def running_run_id(self) -> str:
        """The run that is being measured; of a group, one of them; empty when idle."""
        for run in self._measured():
            return (run.session.run_id if run.session is not None else "") or run.order.run_id
        return ""

    @property
    def waiting(self) -> int:
        """Number of runs that wait."""
        return len(self._waiting)

    @property
    def finished(self) -> int:
        """Number of runs that have ended in this life of the agent."""
        return self._finished

    def knows(self, run_id: str) -> bool:
        """Whether there is a run of this id."""
        return run_id in self._runs

    def has_ended(self, run_id: str) -> bool:
        """Whether there is one, and it has ended."""
        run = self._runs.get(run_id)
        return run is not None and run.state == agent_pb2.RUN_STATE_ENDED

    def summaries(self) -> list[agent_pb2.RunSummary]:
        """Running first, then waiting in their order, then ended, the latest first."""
        ended = [run for run in self._runs.values() if run.state == agent_pb2.RUN_STATE_ENDED]
        return [
            agent_pb2.RunSummary(
                run_id=run.order.run_id,
                model=run.order.model,
                state=run.state,
                status=run.status,
                stage=run.session.stage(run.order.run_id)
                if run.session is not None
                else result_pb2.STAGE_UNSPECIFIED,
                created_at=run.order.created_at,
            )
            for run in [*self._measured(), *self._waiting, *reversed(ended)]
        ]

    async def watch(self, run_id: str, after: int = 0) -> AsyncIterator[agent_pb2.RunEvent]:
        """Its events with a sequence above ``after``, those that are kept and those that come, to the result.

        Raises RunNotFound, and Unavailable when the agent stops while the run waits: it then starts again.
        """
        run = self._find(run_id)
        while run.state != agent_pb2.RUN_STATE_ENDED:
            changed = run.changed
            event = run.after(after)
            if event is not None:
                after = event.sequence
                yield event
            elif self._stopping and run.state == agent_pb2.RUN_STATE_QUEUED:
                raise Unavailable(f"the agent is stopping; run {run_id} waits and is begun when it is back")
            else:
                await changed.wait()
        if run.last_sequence > after:
            yield await self._result_event(run)

    # --- what is asked for

    async def submit(self, model_sha256: str, spec: result_pb2.BenchmarkSpec, run_id: str = "") -> str:
        """Queues a run, which lasts from then on; its id. The same run again is the same run.

        Raises InvalidRequest, ModelNotFound, NotRunnable, RunExists, GroupClosed, QueueFull, DiskFull,
        Unavailable.
        """
        asked = result_pb2.BenchmarkSpec()
        asked.CopyFrom(spec)
        return await self._to_its_end(self._submit(model_sha256, asked, run_id))

    async def check(self, model: model_pb2.Model, spec: result_pb2.BenchmarkSpec) -> None:
        """Raises InvalidRequest, NotRunnable when such a run is sure to be refused, before its files come."""
        check_spec(spec)
        if model.format:
            await self._settle(Order("", model, spec, wire.timestamp(time.time_ns())))

    async def cancel(self, run_id: str) -> bool:
        """Ends a run; whether this call did. Returns when the run has ended. Raises RunNotFound."""
        run = self._find(run_id)
        if run.state == agent_pb2.RUN_STATE_ENDED or run.cancelled:
            await self._until_ended(run)
            return False
        run.cancelled = True
        if run in self._waiting:
            await self._to_its_end(self._cancel_waiting(run))
        elif run.session is not None:
            run.session.stop(run_id)
        await self._until_ended(run)
        return run.status == result_pb2.RUN_STATUS_CANCELLED

    # --- its life

    async def recover(self) -> None:
        """Takes up what a former life of the agent left. Called once, before anything else."""
        recovered = await asyncio.to_thread(self._journal.recover)
        for ended in recovered.ended:
            self._remember(ended)
        for run_id, started_at in _begun_together(recovered.unfinished):
            # It went down while it noted the start of each.
            await asyncio.to_thread(self._journal.start, run_id, started_at)
        for unfinished in recovered.unfinished:
            await self._take_up(unfinished)
        for run in list(self._waiting):
            if run.group and self._is_closed(run.group):
                self._waiting.remove(run)
                await self._finish(run, self._without_group(run))
        for run in self._waiting:
            self._await_group(run)
        self._renumber()

    async def work(self) -> None:
        """Does one run or group after the other, until :meth:`stop`."""
        while not self._stopping:
            due = self._in_order()[:1] if not self._held else []
            if not due:
                self._news.clear()
                await self._news.wait()
                continue
            self._running = due[0]
            for run in self._running:
                self._waiting.remove(run)
                run.state = agent_pb2.RUN_STATE_RUNNING
                self._forget_group_end(run.group)
            self._renumber()
            try:
                await self._perform(self._running)
            finally:
                self._running = []
                self._calm.set()
            self._renumber()

    async def hold(self) -> None:
        """Begins no further run until :meth:`let_go`; returns when none is measured. What is queued waits."""
        self._held = True
        while self._running:
            self._calm.clear()
            await self._calm.wait()

    def let_go(self) -> None:
        """Goes on after :meth:`hold`."""
        self._held = False
        self._news.set()

    async def stop(self, reason: str) -> None:
        """Takes no more runs and ends what is measured, with that reason. The others stay queued."""
        self._stopping = reason or "stopped"
        self._engines.close()
        self._news.set()
        for run in self._measured():
            if run.session is not None:
                run.session.stop_all(self._stop_error)
                break
        for group in list(self._group_ends):
            self._forget_group_end(group)
        for waiting in self._waiting:
            waiting.wake()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _stop_error(self, stage: result_pb2.Stage.ValueType) -> result_pb2.RunError:
        where = f" in the stage {stage_name(stage)}" if stage else ""
        return result_pb2.RunError(
            code="agent_stopped", message=f"the agent was stopped ({self._stopping}){where}: run it again"
        )

    async def _submit(self, model_sha256: str, spec: result_pb2.BenchmarkSpec, run_id: str) -> str:
        if run_id and not RUN_ID.fullmatch(run_id):
            raise InvalidRequest(
                f"run_id is {run_id[:80]!r}; it must be 1 to 64 letters, digits, '-' or '_', "
                "and begin with a letter or digit"
            )
        # One at a time: what is checked still holds when the run is accepted.
        async with self._admission:
            if self._stopping:
                raise Unavailable("the agent is stopping; ask again when it is back")
            known = self._runs.get(run_id)
            if known is not None:
                if known.order.model.sha256 != model_sha256 or known.order.spec != spec:
                    raise RunExists(
                        f"run {run_id} is there already, with another model or spec: leave run_id empty"
                    )
                return run_id
            check_spec(spec)
            check_power_mode(self._config, spec)
            self._check_group(spec)
            if len(self._waiting) >= self._config.runs.waiting_limit:
                raise QueueFull(
                    f"{len(self._waiting)} runs wait already, as many as may: wait for some, or cancel some"
                )
            with contextlib.ExitStack() as leases:
                model = self._lease(leases, model_sha256, spec)
                order = Order(
                    run_id or os.urandom(16).hex(), wire.to_model(model), spec, wire.timestamp(time.time_ns())
                )
                await self._settle(order)
                await self._on_disk(self._journal.accept, order)
                run = _Run(order)
                run.leases = leases.pop_all()
        self._runs[order.run_id] = run
        self._waiting.append(run)
        self._await_group(run)
        self._renumber()
        self._news.set()
        return order.run_id

    def _lease(
        self, leases: contextlib.ExitStack, model_sha256: str, spec: result_pb2.BenchmarkSpec
    ) -> StoredFile:
        """The model, which stays in the store with its inputs as long as the leases last."""
        model = leases.enter_context(self._store.lease(model_sha256))
        if model.kind is not FileKind.MODEL:
            raise InvalidRequest(f"{model.name} was pushed as inputs and is no model")
        if spec.inputs_sha256:
            inputs = leases.enter_context(self._store.lease(spec.inputs_sha256))
            if inputs.kind is not FileKind.INPUTS:
                raise InvalidRequest(f"{inputs.name} was pushed as a model and holds no inputs: push an .npz")
        return model

    async def _settle(self, order: Order) -> Plan:
        """What will be done. Looks again at what engines there are before it says that it can't be done."""
        defaults, thresholds = self._config.spec, self._config.validity.thresholds
        more = self._engines.more_devices
        try:
            return plan(order.model, order.spec, await self._engines.statuses(), defaults, thresholds, more)
        except NotRunnable:
            return plan(order.model, order.spec, await self._engines.refresh(), defaults, thresholds, more)

    async def _on_disk(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            await asyncio.to_thread(call, *arguments)
        except OSError as error:
            kind = DiskFull if error.errno in _NO_ROOM else StorageError
            where = self._config.data_dir
            raise kind(
                f"the run can't be written to {where} ({error.strerror}): mend that, ask again"
            ) from error

    async def _perform(self, runs: Sequence[_Run]) -> None:
        plans: dict[str, Plan] = {}
        for run in runs:
            try:
                plans[run.order.run_id] = await self._settle(run.order)
            except AgentError as error:
                run.trouble = str(error)
        async with self._engines.quiet:
            if self._stopping:
                # Nothing of it has begun: it waits for the next life.
                for run in runs:
                    run.state = agent_pb2.RUN_STATE_QUEUED
                    run.wake()
                return
            for run in runs:
                if run.trouble:
                    await self._end(self._failed(run.order, "not_runnable", run.trouble))
            left = [run for run in runs if not run.trouble]
            if len(left) < len(runs) and runs[0].is_concurrent:
                for run in left:
                    await self._end(self._without_group(run))
            elif left:
                await self._measure(left, plans)

    async def _measure(self, runs: Sequence[_Run], plans: Mapping[str, Plan]) -> None:
        folders = [self._scratch / run.order.run_id for run in runs]
        failure: tuple[str, str] | None = None
        try:
            jobs = [
                self._job(run.order, plans[run.order.run_id], scratch)
                for run, scratch in zip(runs, folders, strict=True)
            ]
            session = Session(jobs, self._config, self._emit, self._end, self._tuner)
            for run in runs:
                await self._on_disk(self._journal.start, run.order.run_id, wire.timestamp(time.time_ns()))
            # From here on it is stopped by the session, which ends it; before, it would be while it starts.
            for run in runs:
                run.session = session
            if self._stopping:
                session.stop_all(self._stop_error)
            for run in runs:
                if run.cancelled:
                    session.stop(run.order.run_id)
            await session.execute()
        except AgentError as error:
            failure = "not_started", str(error)
        except OSError as error:
            remedy = "make room on the board's disk" if error.errno in _NO_ROOM else "see to the board's disk"
            what = f"{error.filename or self._scratch}: {error.strerror or error}"
            failure = "not_started", f"{what}: {remedy}, then push again"
        except Exception as error:  # a fault of the agent's own must not end the runs that wait
            _log.exception("run %s", ", ".join(run.order.run_id for run in runs))
            failure = "internal", f"{type(error).__name__}: {error}: please report this"
        finally:
            for scratch in folders:
                await asyncio.to_thread(folder.remove_tree, scratch)
        for run in runs:
            if failure is not None and run.state != agent_pb2.RUN_STATE_ENDED:
                await self._end(self._failed(run.order, *failure))

    def _job(self, order: Order, plan_: Plan, scratch: Path) -> Job:
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        inputs = order.spec.inputs_sha256
        return Job(
            run_id=order.run_id,
            model=order.model,
            model_path=self._store.get(order.model.sha256).path,
            inputs_path=self._store.get(inputs).path if inputs else None,
            asked=order.spec,
            plan=plan_,
            created_at=order.created_at,
            board=self._identify(),
            interpreter=self._engines.interpreter(plan_.spec.runtime),
            scratch=scratch,
        )

    def _emit(self, run_id: str, event: wire.WorkerNews) -> None:
        if isinstance(event, agent_pb2.StageEvent):
            with contextlib.suppress(OSError):
                self._journal.stage(run_id, event.stage)
        self._runs[run_id].emit(event)

    async def _end(self, result: result_pb2.RunResult) -> None:
        """Ends a run that was measured, or was to be now."""
        run = self._runs[result.run_id]
        drifted = await asyncio.to_thread(self._placements.compare, result)
        if drifted is not None:
            validity.weigh(drifted, self._config.validity.severity)
            result.warnings.append(drifted)
            run.emit(drifted)
            validity.settle(result, self._config.validity.severity)
        await self._finish(run, result)
        await asyncio.to_thread(self._placements.remember, result)

    async def _finish(self, run: _Run, result: result_pb2.RunResult) -> None:
        """The result is in the spool; then it is the run's last event; then the journal has it."""
        try:
            await asyncio.to_thread(self._spool.append, result.run_id, result.SerializeToString())
            trouble = self._spool.status().trouble
        except AgentError as error:
            trouble = str(error)
        if trouble:
            result.warnings.append(
                validity.warn(
                    "not_spooled", f"the collector may never get this result ({trouble})", validity.NOTE
                )
            )
            validity.settle(result, self._config.validity.severity)
        # The runs are in the order of their ends.
        self._runs[result.run_id] = self._runs.pop(result.run_id, run)
        run.end(result)
        self._finished += 1
        try:
            await asyncio.to_thread(self._journal.end, result, run.last_sequence)
        except OSError as error:
            _log.warning("run %s: its result stays in memory: %s", result.run_id, error)
        self._forget_old(run)

    def _forget_old(self, latest: _Run) -> None:
        """Keeps the latest result in memory too, the others in the journal only, and what it dropped not."""
        if self._latest is not None:
            self._latest.result_event = None
        self._latest = latest
        kept = self._journal.kept()
        for run_id, run in list(self._runs.items()):
            if run.state == agent_pb2.RUN_STATE_ENDED and run is not latest and run_id not in kept:
                del self._runs[run_id]

    async def _take_up(self, unfinished: Unfinished) -> None:
        order = unfinished.order
        run = self._runs[order.run_id] = _Run(order, unfinished.last_sequence)
        record = await asyncio.to_thread(self._spool.find, order.run_id)
        if record is not None:
            # It had ended, and the agent went down before the journal had it.
            result = result_pb2.RunResult.FromString(record.payload)
            run.end(result)
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._journal.end, result, run.last_sequence)
            return
        if unfinished.started_at is not None:
            stage = stage_name(unfinished.stage or result_pb2.STAGE_START)
            failed = self._failed(
                order,
                "agent_restarted",
                f"the agent or the board went down while {order.model.name} was in the stage {stage}: run it "
                "again; if it happens again, the model takes the board down",
            )
            failed.error.stage = result_pb2.Stage.ValueType(unfinished.stage)
            failed.started_at.CopyFrom(unfinished.started_at)
            await self._finish(run, failed)
            return
        try:
            self._lease(run.leases, order.model.sha256, order.spec)
        except (ModelNotFound, InvalidRequest) as error:
            await self._finish(
                run, self._failed(order, "model_missing", f"{error}; push it and run it again")
            )
            return
        self._waiting.append(run)

    def _remember(self, ended: Ended) -> None:
        run = self._runs[ended.order.run_id] = _Run(ended.order, ended.last_sequence)
        run.state = agent_pb2.RUN_STATE_ENDED
        run.status = result_pb2.RunStatus.ValueType(ended.status)

    def _failed(self, order: Order, code: str, message: str) -> result_pb2.RunResult:
        result = blank_result(order.run_id, order.model, order.spec, self._identify(), order.created_at)
        result.status = result_pb2.RUN_STATUS_FAILED
        result.error.code, result.error.message = code, message
        return result

    def _measured(self) -> list[_Run]:
        """The runs between their start and their result; their last traces may take a little longer."""
        return [run for run in self._running if run.state == agent_pb2.RUN_STATE_RUNNING]

    def _in_order(self) -> list[list[_Run]]:
        """What waits and can be begun, in its order, each with what is measured in one go with it."""
        there = Counter(run.group for run in self._runs.values())
        latest = {run.group: run for run in self._waiting}
        found = []
        for run in self._waiting:
            if not run.group:
                found.append([run])
            elif latest[run.group] is run and there[run.group] >= run.order.spec.group.size:
                found.append([member for member in self._waiting if member.group == run.group])
        return found

    def _renumber(self) -> None:
        """Tells those that wait how many are before them, when that has changed."""
        ahead: dict[str, int] = {}
        before = len(self._measured())
        for runs in self._in_order():
            ahead.update((run.order.run_id, before) for run in runs)
            before += len(runs)
        for run in self._waiting:
            now = ahead.get(run.order.run_id)
            if run.runs_ahead != now:
                run.runs_ahead = now
                run.emit(agent_pb2.QueuedEvent(runs_ahead=now))

    # --- groups

    def _check_group(self, spec: result_pb2.BenchmarkSpec) -> None:
        """Raises InvalidRequest and GroupClosed when a run that is asked for so can't be of its group."""
        group = spec.group
        members = [run for run in self._runs.values() if run.group and run.group == group.id]
        for member in members:
            theirs = member.order.spec
            for name, one, other in (
                ("group.size", group.size, theirs.group.size),
                ("group.mode", group.mode, theirs.group.mode),
                ("processes", spec.processes, theirs.processes),
                # It is set for the board, and so for all of them.
                ("tune", spec.tune, theirs.tune),
                ("power_mode", spec.power_mode, theirs.power_mode),
            ):
                if one != other:
                    raise InvalidRequest(
                        f"{name} is {one} here and {other} in run {member.order.run_id} of the same group "
                        f"{group.id}: all of a group are asked for alike"
                    )
        if self._is_closed(group.id):
            raise GroupClosed(f"the group {group.id} has begun or ended: choose another group.id")
        if members and len(members) >= group.size:
            raise GroupClosed(f"the group {group.id} has all its {group.size} runs: choose another group.id")

    def _is_closed(self, group: str) -> bool:
        """Whether the group can't be begun any more."""
        return bool(group) and any(
            run.state != agent_pb2.RUN_STATE_QUEUED and not run.is_left_out
            for run in self._runs.values()
            if run.group == group
        )

    def _await_group(self, run: _Run) -> None:
        if run.group and run.group not in self._group_ends:
            self._group_ends[run.group] = asyncio.get_running_loop().call_later(
                self._config.runs.group_seconds, self._group_is_due, run.group
            )

    def _forget_group_end(self, group: str) -> None:
        timer = self._group_ends.pop(group, None)
        if timer is not None:
            timer.cancel()

    def _group_is_due(self, group: str) -> None:
        self._forget_group_end(group)
        task = asyncio.create_task(self._end_incomplete(group))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def _end_incomplete(self, group: str) -> None:
        """Fails the runs that have waited for others in vain."""
        # None of them is just being taken.
        async with self._admission:
            members = [run for run in self._runs.values() if run.group == group]
            waiting = [run for run in self._waiting if run.group == group]
            if self._stopping or not waiting or len(members) >= waiting[0].order.spec.group.size:
                return
            size = waiting[0].order.spec.group.size
            for run in waiting:
                self._waiting.remove(run)
            self._renumber()
            for run in waiting:
                message = (
                    f"{size - len(members)} of the {size} runs of the group {group} did not come within "
                    f"{self._config.runs.group_seconds:g} s (runs.group_seconds in the agent's "
                    "configuration): ask for all of them again, in a new group"
                )
                await self._finish(run, self._failed(run.order, "group_incomplete", message))

    async def _cancel_waiting(self, run: _Run) -> None:
        others = [other for other in self._waiting if run.group and other.group == run.group]
        ended = others if run.is_concurrent else [run]
        for each in ended:
            self._waiting.remove(each)
        self._renumber()
        order = run.order
        result = blank_result(order.run_id, order.model, order.spec, self._identify(), order.created_at)
        result.status = result_pb2.RUN_STATUS_CANCELLED
        await self._finish(run, result)
        for each in ended:
            if each is not run:
                await self._finish(each, self._without_group(each))

    def _without_group(self, run: _Run) -> result_pb2.RunResult:
        """The result of a run whose group can't be measured."""
        return self._failed(
            run.order,
            "group_ended",
            f"another run of the group {run.group} has ended, and they were to be measured in one go: ask "
            "for all of them again, in a new group",
        )

    def _find(self, run_id: str) -> _Run:
        run = self._runs.get(run_id)
        if run is None:
            raise RunNotFound(
                f"no run {run_id[:80]!r} is known here; one that ended long ago is in the collector only"
            )
        return run

    async def _result_event(self, run: _Run) -> agent_pb2.RunEvent:
        if run.result_event is not None:
            return run.result_event
        result = await asyncio.to_thread(self._journal.result, run.order.run_id)
        if result is None:
            raise RunNotFound(
                f"the result of run {run.order.run_id} is no longer here; the collector may have it"
            )
        return agent_pb2.RunEvent(
            run_id=run.order.run_id, sequence=run.last_sequence, time=result.finished_at, result=result
        )

    async def _until_ended(self, run: _Run) -> None:
        while run.state != agent_pb2.RUN_STATE_ENDED:
            await run.changed.wait()

    async def _to_its_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Does the work whole, even when the caller breaks off: half of it would lose the run."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.debug("a request ended with %s", task.exception())


def _begun_together(unfinished: Sequence[Unfinished]) -> Iterator[tuple[str, Timestamp]]:
    """Those that were to begin together with one that had begun, and count as begun at the same time now."""
    begun = {
        each.order.spec.group.id: each.started_at
        for each in unfinished
        if each.order.spec.group.id and each.started_at is not None
    }
    for each in unfinished:
        started_at = begun.get(each.order.spec.group.id)
        if each.started_at is None and started_at is not None:
            each.started_at = started_at
            yield each.order.run_id, started_at
