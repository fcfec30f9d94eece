"""Runs in their order, one at a time: taken, followed by any number of watchers, and ended exactly once.

A run lives here and in the journal, not in the call that asked for it: the call may break off at any
moment. Its result is in the spool before anybody is told about it.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import errno
import functools
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from boardbench.agent import folder, validity, wire
from boardbench.agent.config import AgentConfig
from boardbench.agent.drift import Placements
from boardbench.agent.errors import (
    AgentError,
    DiskFull,
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
from boardbench.agent.plan import RUN_ID, Job, Plan, blank_result, check_spec, plan
from boardbench.agent.probe import Engines
from boardbench.agent.receive import FileKind, ModelStore, StoredFile
from boardbench.agent.run import Attempt, stage_name
from boardbench.agent.spool import Spool
from boardbench.v1 import agent_pb2, board_pb2, result_pb2

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Progress that is kept for those who come late; beyond it every second one goes.
_KEPT_PROGRESS = 120


class _Run:
    """A run that this agent knows."""

    def __init__(self, order: Order, last_sequence: int = 0) -> None:
        self.order = order
        self.state: agent_pb2.RunState.ValueType = agent_pb2.RUN_STATE_QUEUED
        self.status: result_pb2.RunStatus.ValueType = result_pb2.RUN_STATUS_UNSPECIFIED
        self.attempt: Attempt | None = None
        self.leases = contextlib.ExitStack()
        # All but the result, while the run has not ended.
        self.events: list[agent_pb2.RunEvent] = []
        self.last_sequence = last_sequence
        self.runs_ahead = -1
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
        self.state, self.status, self.attempt = agent_pb2.RUN_STATE_ENDED, result.status, None
        self.leases.close()
        self.wake()

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
    ) -> None:
        """``identify`` says what the board is now; ``scratch`` is a folder for what workers leave."""
        self._config = config
        self._store = store
        self._spool = spool
        self._journal = journal
        self._placements = placements
        self._engines = engines
        self._identify = identify
        self._scratch = scratch
        self._runs: dict[str, _Run] = {}
        self._waiting: deque[_Run] = deque()
        self._running: _Run | None = None
        self._latest: _Run | None = None
        self._news = asyncio.Event()
        self._admission = asyncio.Lock()
        self._finished = 0
        self._stopping = False
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- what is going on

    @property
    def running_run_id(self) -> str:
        """The run that is being measured; empty when idle."""
        run = self._measured()
        return run.order.run_id if run is not None else ""

    @property
    def waiting(self) -> int:
        """Number of runs that wait."""
        return len(self._waiting)

    @property
    def finished(self) -> int:
        """Number of runs that have ended in this life of the agent."""
        return self._finished

    def summaries(self) -> list[agent_pb2.RunSummary]:
        """Running first, then waiting in their order, then ended, the latest first."""
        running = [run] if (run := self._measured()) is not None else []
        ended = [run for run in self._runs.values() if run.state == agent_pb2.RUN_STATE_ENDED]
        return [
            agent_pb2.RunSummary(
                run_id=run.order.run_id,
                model=run.order.model,
                state=run.state,
                status=run.status,
                stage=run.attempt.stage if run.attempt is not None else result_pb2.STAGE_UNSPECIFIED,
                created_at=run.order.created_at,
            )
            for run in [*running, *self._waiting, *reversed(ended)]
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

        Raises InvalidRequest, ModelNotFound, NotRunnable, RunExists, QueueFull, DiskFull, Unavailable.
        """
        asked = result_pb2.BenchmarkSpec()
        asked.CopyFrom(spec)
        return await self._to_its_end(self._submit(model_sha256, asked, run_id))

    async def cancel(self, run_id: str) -> bool:
        """Ends a run; whether this call did. Returns when the run has ended. Raises RunNotFound."""
        run = self._find(run_id)
        if run.state == agent_pb2.RUN_STATE_ENDED or run.cancelled:
            await self._until_ended(run)
            return False
        run.cancelled = True
        if run in self._waiting:
            self._waiting.remove(run)
            self._renumber()
            result = blank_result(
                run_id, run.order.model, run.order.spec, self._identify(), run.order.created_at
            )
            result.status = result_pb2.RUN_STATUS_CANCELLED
            await self._to_its_end(self._finish(run, result))
        elif run.attempt is not None:
            run.attempt.stop()
        await self._until_ended(run)
        return run.status == result_pb2.RUN_STATUS_CANCELLED

    # --- its life

    async def recover(self) -> None:
        """Takes up what a former life of the agent left. Called once, before anything else."""
        recovered = await asyncio.to_thread(self._journal.recover)
        for ended in recovered.ended:
            self._remember(ended)
        for unfinished in recovered.unfinished:
            await self._take_up(unfinished)
        self._renumber()

    async def work(self) -> None:
        """Does one run after the other, until :meth:`stop`."""
        while not self._stopping:
            if not self._waiting:
                self._news.clear()
                await self._news.wait()
                continue
            run = self._running = self._waiting.popleft()
            run.state = agent_pb2.RUN_STATE_RUNNING
            self._renumber()
            try:
                await self._perform(run)
            finally:
                self._running = None
            self._renumber()

    async def stop(self, reason: str) -> None:
        """Takes no more runs and ends the one that is measured, with that reason. The others stay queued."""
        self._stopping = True
        self._engines.close()
        self._news.set()
        run = self._measured()
        if run is not None and run.attempt is not None:
            stage = stage_name(run.attempt.stage)
            run.attempt.stop(
                result_pb2.RunError(
                    code="agent_stopped",
                    message=f"the agent was stopped ({reason}) in the stage {stage}: run it again",
                )
            )
        for waiting in self._waiting:
            waiting.wake()
        while self._tasks:
            await asyncio.wait(self._tasks)

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
        defaults = self._config.spec
        try:
            return plan(order.model, order.spec, await self._engines.statuses(), defaults)
        except NotRunnable:
            return plan(order.model, order.spec, await self._engines.refresh(), defaults)

    async def _on_disk(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            await asyncio.to_thread(call, *arguments)
        except OSError as error:
            kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
            where = self._config.data_dir
            raise kind(
                f"the run can't be written to {where} ({error.strerror}): mend that, ask again"
            ) from error

    async def _perform(self, run: _Run) -> None:
        order = run.order
        result: result_pb2.RunResult | None = None
        try:
            plan_ = await self._settle(order)
        except AgentError as error:
            result = self._failed(order, "not_runnable", str(error))
        async with self._engines.quiet:
            if self._stopping:
                # Nothing of it has begun: it waits for the next life.
                run.state = agent_pb2.RUN_STATE_QUEUED
                run.wake()
                return
            if result is None:
                result = await self._measure(run, plan_)
        drifted = await asyncio.to_thread(self._placements.compare, result)
        if drifted is not None:
            validity.weigh(drifted, self._config.validity.severity)
            result.warnings.append(drifted)
            run.emit(drifted)
            validity.settle(result, self._config.validity.severity)
        await self._finish(run, result)
        await asyncio.to_thread(self._placements.remember, result)

    async def _measure(self, run: _Run, plan_: Plan) -> result_pb2.RunResult:
        order = run.order
        scratch = self._scratch / order.run_id
        inputs = order.spec.inputs_sha256
        try:
            scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
            job = Job(
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
            attempt = Attempt(job, self._config, functools.partial(self._emit, run))
            run.attempt = attempt
            if run.cancelled:
                attempt.stop()
            await self._on_disk(self._journal.start, order.run_id, wire.timestamp(time.time_ns()))
            return await attempt.execute()
        except (AgentError, OSError) as error:
            return self._failed(order, "not_started", str(error))
        except Exception as error:  # a fault of the agent's own must not end the runs that wait
            _log.exception("run %s", order.run_id)
            return self._failed(order, "internal", f"{type(error).__name__}: {error}: please report this")
        finally:
            await asyncio.to_thread(folder.remove_tree, scratch)

    def _emit(self, run: _Run, event: wire.WorkerNews) -> None:
        if isinstance(event, agent_pb2.StageEvent):
            with contextlib.suppress(OSError):
                self._journal.stage(run.order.run_id, event.stage)
        run.emit(event)

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

    def _measured(self) -> _Run | None:
        """The run that is between its start and its result; its last traces may take a little longer."""
        run = self._running
        return run if run is not None and run.state == agent_pb2.RUN_STATE_RUNNING else None

    def _renumber(self) -> None:
        """Tells those that wait how many are before them, when that has changed."""
        before = 0 if self._measured() is None else 1
        for position, run in enumerate(self._waiting, before):
            if run.runs_ahead != position:
                run.runs_ahead = position
                run.emit(agent_pb2.QueuedEvent(runs_ahead=position))

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
