"""One run in one bench process: how long each stage may take, and how it ended.

What goes wrong in the worker becomes a failed result that names the stage, the signal or exit code and the
last output; nothing that a worker does can harm more than its own run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.agent import caches, validity, wire, worker
from boardbench.agent.board.identify import RECORDED, is_recorded
from boardbench.agent.config import AgentConfig
from boardbench.agent.plan import Job, blank_result, counted_seconds, job_line, samples_a_run
from boardbench.v1 import agent_pb2, placement_pb2, result_pb2

if TYPE_CHECKING:
    # Loaded when a run begins: an agent that waits needs no sensors.
    from boardbench.agent.board.surroundings import Seen, Surroundings
    from boardbench.agent.board.tune import Tuner

_log = logging.getLogger(__name__)

# Why a run failed, when the agent says so; the worker's own codes are in bench/__main__.py.
ERRORS = {
    "agent_restarted": "The agent or the board went down while the run was measured.",
    "agent_stopped": "The agent was told to stop while the run was measured.",
    "deadline": "A stage, or the whole run, took longer than it may; the worker was killed.",
    "model_missing": "The model or its inputs are no longer on the board.",
    "internal": "A fault of boardbench itself.",
    "not_started": "The board's disk did not let the run begin.",
    "not_runnable": "The runtime that was asked for is no longer available.",
    "out_of_memory": "The kernel killed the worker because memory ran out.",
    "power_mode_not_set": "The board's power mode that was asked for could not be set.",
    "protocol_error": "The worker sent what is no event; the worker was killed.",
    "worker_exited": "The worker exited without a result.",
    "worker_killed": "A signal ended the worker.",
    "worker_not_started": "The worker's interpreter could not be started.",
}

# Progress is for eyes.
_LEAST_PROGRESS_SECONDS = 0.05
# Of a worker's.
_MOST_WARNINGS = 64
# A board cools by some tenths of a degree in that time.
_COOL_DOWN_LOOK_SECONDS = 0.5
# An inference may take this many times as long as the first, which already includes lazy work.
_SLOWER_THAN_FIRST = 3.0
# A profiled inference may take this many times as long as the median, and a model is loaded again for it.
_SLOWER_UNDER_PROFILER = 6.0

_STAGE_KEYS = {
    result_pb2.STAGE_START: "start_seconds",
    result_pb2.STAGE_IMPORT: "import_seconds",
    result_pb2.STAGE_CREATE: "create_seconds",
    result_pb2.STAGE_INPUTS: "inputs_seconds",
    result_pb2.STAGE_FIRST_INFERENCE: "first_inference_seconds",
    result_pb2.STAGE_WARM_UP: "warm_up_seconds",
    result_pb2.STAGE_MEASURE: "measure_seconds",
    result_pb2.STAGE_REPORT: "report_seconds",
}
# Doubts that a worker may still have after its report: about its profile, and never about its figures.
_OF_A_PROFILE = ("cost_uncertain",)
# What sensors say about a worker that ended like this is not worth keeping: nothing ran.
_WITHOUT_TELEMETRY = (
    "inputs_rejected",
    "model_rejected",
    "option_rejected",
    "runtime_unavailable",
    "worker_not_started",
)


def stage_name(stage: int) -> str:
    """The stage as a person reads it: "first inference"."""
    name = result_pb2.Stage.Name(result_pb2.Stage.ValueType(stage))
    return name.removeprefix("STAGE_").lower().replace("_", " ")


class Attempt:
    """One run, from its start to its result. :meth:`execute` is called once; :meth:`stop` at any time."""

    def __init__(
        self,
        job: Job,
        config: AgentConfig,
        emit: Callable[[wire.WorkerNews], None],
        *,
        tuner: Tuner | None = None,
        peers: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        """``emit`` is called with every event but the result, in order.

        ``tuner`` is the one of this board, if there is one already. ``peers`` are the processes of workers
        that are measured at the same time on purpose.
        """
        self._job = job
        self._config = config
        self._deadlines = config.deadlines
        self._emit = emit
        self._sys_root = config.sys_root
        self._tuner = tuner
        self._peers = peers
        self._loop = asyncio.get_running_loop()
        self._worker: worker.Worker | None = None
        self._surroundings: Surroundings | None = None
        # Ends the watching as soon as the worker has reported.
        self._looking_back: asyncio.Task[None] | None = None
        self._seen: Seen | None = None
        self._idle_seconds = 0.0
        self._stage: result_pb2.Stage.ValueType = result_pb2.STAGE_UNSPECIFIED
        self._stage_began = 0.0
        self._first_inference_seconds = 0.0
        self._progress_at = -math.inf
        # The latest that was not passed on, since it came too soon after another.
        self._progress_left: agent_pb2.ProgressEvent | None = None
        self._stage_deadline: asyncio.TimerHandle | None = None
        self._warnings: list[result_pb2.Warning] = []
        self._report: result_pb2.RunResult | None = None
        # After the report: whether the worker profiles, and the placement that it found then.
        self._profiling = False
        self._profile: placement_pb2.Placement | None = None
        self._profile_missing = ""
        self._error: result_pb2.RunError | None = None
        # Why the agent ended it; a cancelled run has no error.
        self._stopped = False
        self._stop_asked = asyncio.Event()
        # Of a worker that is held: set when it waits for go(), and when it waits for enough().
        self.ready = asyncio.Event()
        self.counted = asyncio.Event()

    @property
    def stage(self) -> result_pb2.Stage.ValueType:
        """The stage that it is in."""
        return self._stage

    @property
    def pid(self) -> int | None:
        """The worker's process; None before it is started."""
        return None if self._worker is None else self._worker.pid

    def go(self) -> None:
        """Lets a worker that is ready measure."""
        if self._worker is not None and not self._is_over():
            self._limit(self._stage_seconds(self._stage))
            self._worker.tell(b"go")

    def enough(self) -> None:
        """Lets a worker that has counted report."""
        if self._worker is not None and not self._is_over():
            self._limit(self._stage_seconds(self._stage))
            self._worker.tell(b"stop")

    def _is_over(self) -> bool:
        """Whether it is settled how it ends."""
        return self._report is not None or self._error is not None or self._stopped

    def stop(self, error: result_pb2.RunError | None = None) -> None:
        """Ends it at once: failed with that error, or cancelled without one. One that is over stays so."""
        if self._is_over():
            if self._report is not None:
                self._end_profile("the run was ended during it")
            return
        self._stopped = True
        self._error = error
        self._stop_asked.set()
        if self._worker is not None:
            self._worker.kill()

    async def execute(self) -> result_pb2.RunResult:
        """Runs it to its end, whatever that is."""
        if self._is_over():
            return self._conclude(None, "", started_at=None)
        oom = _OomCounter(self._sys_root)
        timeout = self._job.plan.spec.timeout_seconds
        too_long = f"the whole run was not over after {timeout:g} s (timeout_seconds)"
        whole = self._loop.call_later(timeout, self._out_of_time, too_long)
        started_at: Timestamp | None = None
        end: worker.WorkerEnd | None = None
        try:
            await self._look_around()
            async with self._set_up():
                await self._cool_down()
                await self._idle()
                if not self._is_over():
                    started_at = wire.timestamp(time.time_ns())
                    end = await self._work()
                await self._look_back()
            await self._bound_caches()
        finally:
            whole.cancel()
        if not self._is_over():
            assert end is not None
            self._error = self._explain(end, oom)
        return self._conclude(end, self._worker.output_tail if self._worker is not None else "", started_at)

    async def _work(self) -> worker.WorkerEnd | None:
        """How the worker ended; None when it could not be started."""
        self._enter(result_pb2.STAGE_START)
        try:
            self._worker = await worker.start(
                self._job.interpreter,
                job_line(
                    self._job.plan,
                    self._job.model.format,
                    self._job.model_path,
                    self._job.inputs_path,
                    self._sys_root,
                    model_sha256=self._job.model.sha256,
                    cache_root=caches.root(self._config.data_dir).absolute(),
                ),
                self._job.scratch,
                self._heard,
                self._garbled,
            )
            if self._surroundings is not None:
                self._surroundings.worker_started(self._worker.pid)
            if self._is_over():
                self._worker.kill()
            return await self._worker.ended()
        except OSError as error:
            self._error = result_pb2.RunError(
                code="worker_not_started",
                message=f"{self._job.interpreter} can't be started: {error.strerror}; "
                "see [runtimes] in the agent's configuration",
            )
            return None
        finally:
            if self._stage_deadline is not None:
                self._stage_deadline.cancel()
            if self._worker is not None:
                self._worker.kill()
                await self._worker.ended()

    async def _bound_caches(self) -> None:
        """Removes the oldest of what engines keep, where it has become too much."""
        if self._job.plan.spec.cache in (result_pb2.CACHE_USE_UNSPECIFIED, result_pb2.CACHE_USE_NONE):
            return
        limit_bytes = self._config.store.cache_limit_bytes
        gone = await asyncio.to_thread(caches.bound, caches.root(self._config.data_dir), limit_bytes)
        kept = self._report.caches if self._report is not None else ()
        if any(str(path) in cache.path for path in gone for cache in kept):
            self._doubt(
                validity.warn(
                    "cache_not_kept",
                    f"what the engine left for the next load takes {sum(c.size_bytes for c in kept)} bytes, "
                    f"and all caches together may take {limit_bytes}",
                    validity.NOTE,
                )
            )

    # --- before the worker

    async def _look_around(self) -> None:
        """Begins to watch what surrounds the run."""

        def begin() -> Surroundings:
            from boardbench.agent.board.surroundings import Surroundings

            job = self._job
            return Surroundings(self._config, job.board, job.plan.spec, peers=self._peers)

        try:
            self._surroundings = await asyncio.to_thread(begin)
        except Exception:  # what surrounds a run must not end it
            _log.exception("run %s: what surrounds it can't be watched", self._job.run_id)

    @contextlib.asynccontextmanager
    async def _set_up(self) -> AsyncIterator[None]:
        """Inside, the board is set up for measuring, when that was asked for."""
        if not self._job.plan.spec.tune or self._is_over():
            yield
            return
        from boardbench.agent.board.tune import Tuner

        tuner = self._tuner or Tuner(self._sys_root, self._config.data_dir)
        owner = f"run {self._job.run_id}"
        try:
            changes = await asyncio.to_thread(tuner.acquire, owner)
            if self._surroundings is not None:
                self._surroundings.tuned(changes)
            self._tell_untuned(tuner.failed)
            yield
        finally:
            # Also when this task is cancelled: it is put back all the same.
            failed = await asyncio.shield(asyncio.to_thread(tuner.release, owner))
            self._tell_untuned(failed)

    def _tell_untuned(self, failed: Iterable[str]) -> None:
        if told := "; ".join(failed):
            self._doubt(validity.warn("not_tuned", told, validity.NOTE, time=wire.timestamp(time.time_ns())))

    async def _cool_down(self) -> None:
        """Waits until the board is as cool as was asked for, or the time for it is over."""
        spec, around = self._job.plan.spec, self._surroundings
        if not spec.HasField("cool_down_celsius") or around is None or self._is_over():
            return
        self._enter(result_pb2.STAGE_COOL_DOWN)
        wanted, most = spec.cool_down_celsius, self._cool_down_seconds
        begin, first = self._loop.time(), around.hottest_celsius
        while True:
            now, waited = around.hottest_celsius, self._loop.time() - begin
            if now is None or first is None or (now > wanted and waited >= most):
                self._doubt(around.not_cooled(wanted, waited))
                break
            if now <= wanted:
                break
            self._emit(
                agent_pb2.ProgressEvent(
                    stage=self._stage,
                    elapsed_seconds=waited,
                    fraction=min(1.0, max(0.0, (first - now) / (first - wanted))),
                )
            )
            if await self._stopped_within(min(_COOL_DOWN_LOOK_SECONDS, most - waited)):
                return
            await asyncio.to_thread(around.look)

    @property
    def _cool_down_seconds(self) -> float:
        spec = self._job.plan.spec
        if spec.HasField("cool_down_seconds"):
            return spec.cool_down_seconds
        return self._config.spec.cool_down_seconds

    async def _idle(self) -> None:
        """Begins to sample; measures the idle board's power first, where there is a rail to measure it at."""
        spec, around = self._job.plan.spec, self._surroundings
        if around is None or self._is_over():
            return
        await asyncio.to_thread(around.run_begins)
        around.sample()
        asked = spec.HasField("idle_seconds")
        seconds = spec.idle_seconds if asked else self._config.spec.idle_seconds
        if seconds <= 0:
            return
        if not around.has_rail:
            if asked:
                self._doubt(
                    validity.warn(
                        "idle_not_measured",
                        f"idle_seconds is {seconds:g}, and this board has no power rail or meter that can be "
                        "read",
                        validity.NOTE,
                    )
                )
            return
        self._enter(result_pb2.STAGE_IDLE)
        around.idle_begins()
        begin = self._loop.time()
        while (passed := self._loop.time() - begin) < seconds:
            self._emit(
                agent_pb2.ProgressEvent(stage=self._stage, elapsed_seconds=passed, fraction=passed / seconds)
            )
            if await self._stopped_within(min(_COOL_DOWN_LOOK_SECONDS, seconds - passed)):
                return
        if (disturbed := around.idle_ends()) is not None:
            self._doubt(disturbed)
        self._idle_seconds = seconds

    async def _stopped_within(self, seconds: float) -> bool:
        """Waits so long; whether the run was ended meanwhile."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop_asked.wait(), seconds)
        return self._is_over()

    # --- what the worker says

    def _heard(self, line: bytes) -> None:
        if self._report is not None:
            self._hear_profile(line)
        if self._is_over():
            return
        try:
            self._take(wire.parse_event(self._with_names(line)))
        except wire.MalformedEvent as error:
            self._garbled(f"{error}: {line[:120].decode('utf-8', 'replace')!r}")

    def _with_names(self, line: bytes) -> bytes:
        """The line with the model called by its name; in the store its file is called by its hash."""
        stored, name = self._job.model_path, self._job.model.name
        if stored.name != name:
            for told in (str(stored), stored.name):
                line = line.replace(_in_json(told), _in_json(name))
        return line

    def _hear_profile(self, line: bytes) -> None:
        """Takes what the worker adds to its report; whatever else comes after that is not heard."""
        if self._profile is not None or self._profile_missing:
            return
        with contextlib.suppress(wire.MalformedEvent):
            event = wire.parse_event(self._with_names(line))
            if isinstance(event, wire.Profiling) and not self._profiling:
                self._profiling = True
                self._limit(self._profile_seconds())
            elif isinstance(event, result_pb2.Warning) and self._profiling and event.code in _OF_A_PROFILE:
                if len(self._warnings) < _MOST_WARNINGS:
                    self._doubt(event)
            elif isinstance(event, placement_pb2.Placement) and self._profiling:
                self._profile = event
                self._limit(self._deadlines.exit_seconds)

    def _end_profile(self, why: str) -> None:
        """Ends a profiling pass that goes on; the report stands without it."""
        if self._profiling and self._profile is None and self._worker is not None:
            self._profile_missing = why
            self._worker.kill()

    def _garbled(self, what: str) -> None:
        if self._report is None:
            self.stop(
                result_pb2.RunError(
                    code="protocol_error",
                    message=f"the worker of {self._job.plan.spec.runtime} sent what is no event ({what}); "
                    "it, or the model in it, is broken or hostile",
                )
            )

    def _take(self, event: wire.WorkerEvent) -> None:
        if isinstance(event, agent_pb2.StageEvent):
            if event.stage <= self._stage or event.stage not in _STAGE_KEYS:
                order = f"{stage_name(event.stage)} after {stage_name(self._stage)}"
                raise wire.MalformedEvent(f"the stage {order}")
            self._enter(event.stage)
        elif isinstance(event, agent_pb2.ProgressEvent):
            now = self._loop.time()
            event.stage = self._stage
            if now - self._progress_at >= _LEAST_PROGRESS_SECONDS:
                self._progress_at, self._progress_left = now, None
                self._emit(event)
            else:
                self._progress_left = event
        elif isinstance(event, result_pb2.Warning):
            # The agent's own doubts are few, and none of the worker's can take their place.
            if len(self._warnings) < _MOST_WARNINGS:
                self._doubt(event)
        elif isinstance(event, wire.Ready | wire.Counted):
            self._hold(event)
        elif isinstance(event, result_pb2.RunResult):
            if self._job.plan.held and not self.counted.is_set():
                raise wire.MalformedEvent("a result of a measurement that was to go on")
            self._report = event
            # A profile that follows is not part of what was measured.
            self._looking_back = asyncio.create_task(self._end_of_watch())
            self._limit(self._deadlines.exit_seconds)
        elif isinstance(event, result_pb2.RunError):
            self._error = event
            self._limit(self._deadlines.exit_seconds)
        else:
            raise wire.MalformedEvent("an event that has no place before the result")

    def _hold(self, event: wire.Ready | wire.Counted) -> None:
        """Takes that the worker waits; for how long is not its own affair."""
        ready = isinstance(event, wire.Ready)
        now, stage = (
            (self.ready, result_pb2.STAGE_WARM_UP) if ready else (self.counted, result_pb2.STAGE_MEASURE)
        )
        if not self._job.plan.held or now.is_set() or self._stage != stage:
            raise wire.MalformedEvent(f"a wait in the stage {stage_name(self._stage)} that nobody asked for")
        if self._stage_deadline is not None:
            self._stage_deadline.cancel()
        if not ready:
            self._measured()
        now.set()

    def _measured(self) -> None:
        """All that counts is measured."""
        if self._worker is not None and self._surroundings is not None:
            self._surroundings.measurement_ends(self._worker.pid)

    async def _look_back(self) -> None:
        """Takes what surrounded the run, up to the report or to now."""
        if self._looking_back is None:
            self._looking_back = asyncio.create_task(self._end_of_watch())
        await self._looking_back

    async def _end_of_watch(self) -> None:
        around = self._surroundings
        if around is None:
            return
        try:
            seen = await asyncio.to_thread(around.end, self._report)
        except Exception:  # what surrounds a run must not end it
            _log.exception("run %s: what surrounded it can't be told", self._job.run_id)
            return
        self._seen = seen
        for doubt in seen.warnings:
            self._doubt(doubt)

    def _doubt(self, warning: result_pb2.Warning) -> None:
        validity.weigh(warning, self._config.validity.severity)
        self._warnings.append(warning)
        self._emit(warning)

    def _enter(self, stage: result_pb2.Stage.ValueType) -> None:
        now = self._loop.time()
        if self._progress_left is not None:
            # How far a stage came in the end is told, however soon after the rest.
            self._emit(self._progress_left)
            self._progress_left = None
        if self._stage == result_pb2.STAGE_FIRST_INFERENCE:
            self._first_inference_seconds = now - self._stage_began
        if stage == result_pb2.STAGE_MEASURE:
            if self._worker is not None and self._surroundings is not None:
                self._surroundings.measurement_begins(self._worker.pid)
        elif self._stage == result_pb2.STAGE_MEASURE and not self.counted.is_set():
            self._measured()
        self._stage, self._stage_began = stage, now
        if stage in _STAGE_KEYS:
            self._limit(self._stage_seconds(stage))
        self._emit(agent_pb2.StageEvent(stage=stage))

    # --- how long it may take

    def _stage_seconds(self, stage: int) -> float:
        spec = self._job.plan.spec
        base: float = getattr(self._deadlines, _STAGE_KEYS[result_pb2.Stage.ValueType(stage)])
        inference = _SLOWER_THAN_FIRST * self._first_inference_seconds * samples_a_run(spec)
        if stage == result_pb2.STAGE_WARM_UP:
            return base + 2 * spec.warm_up_seconds + inference * (spec.warm_up_runs + 1)
        if stage == result_pb2.STAGE_MEASURE:
            return base + 2 * counted_seconds(spec) + inference * (spec.min_runs + 1)
        return base

    def _profile_seconds(self) -> float:
        """For the profiling pass. The worker ends it earlier by itself, unless that hangs, too."""
        report = self._report
        assert report is not None
        runs = report.effective_spec.profile_runs
        seconds = report.create_seconds + runs * report.latency.mean_seconds
        return self._deadlines.report_seconds + _SLOWER_UNDER_PROFILER * seconds

    def _limit(self, seconds: float) -> None:
        if self._stage_deadline is not None:
            self._stage_deadline.cancel()
        setting = f"deadlines.{_STAGE_KEYS[self._stage]} in the agent's configuration"
        self._stage_deadline = self._loop.call_later(
            seconds,
            self._out_of_time,
            f"the stage {stage_name(self._stage)} was not over after {seconds:g} s ({setting})",
        )

    def _out_of_time(self, what: str) -> None:
        if self._is_over():
            # It has said everything and does not end by itself.
            self._end_profile("it took too long")
            if self._worker is not None:
                self._worker.kill()
            return
        self.stop(
            result_pb2.RunError(
                code="deadline",
                message=f"{what}; the worker was killed: "
                "the model or the engine hangs, or this board needs more time for it",
            )
        )

    # --- how it ended

    def _explain(self, end: worker.WorkerEnd, oom: _OomCounter) -> result_pb2.RunError:
        """Why a worker ended that said nothing about it."""
        stage = stage_name(self._stage)
        model = self._job.model.name
        if end.signal == "SIGKILL" and (evidence := oom.evidence()):
            return result_pb2.RunError(
                code="out_of_memory",
                message=f"memory ran out in the stage {stage} and the kernel killed the worker ({evidence}): "
                f"{model} needs more than this board has free{self._last_memory()}",
            )
        if end.signal:
            return result_pb2.RunError(
                code="worker_killed",
                message=f"{end.signal} ended the worker in the stage {stage} while it ran {model}; "
                "its last output may say why",
            )
        how = "ended by itself" if end.exit_code == 0 else f"exited with {end.exit_code}"
        return result_pb2.RunError(
            code="worker_exited",
            message=f"the worker {how} in the stage {stage} without a result for {model}; "
            "its last output may say why",
        )

    def _last_memory(self) -> str:
        return f"; {self._seen.last_memory}" if self._seen is not None and self._seen.last_memory else ""

    def _conclude(
        self, end: worker.WorkerEnd | None, output_tail: str, started_at: Timestamp | None
    ) -> result_pb2.RunResult:
        job, spec = self._job, self._job.plan.spec
        result = blank_result(job.run_id, job.model, job.asked, job.board, job.created_at)
        if started_at is not None:
            result.started_at.CopyFrom(started_at)
        result.runtime.name = spec.runtime
        result.runtime.version = job.plan.status.version
        result.runtime.device = spec.device
        result.runtime.options.update(spec.options)
        result.runtime.interpreter.CopyFrom(job.plan.status.interpreter)
        if self._seen is not None:
            result.environment.MergeFrom(self._seen.environment)
        if self._report is not None:
            self._take_report(result, self._report, end)
        elif self._error is not None:
            self._take_error(result, self._error, end, output_tail)
        else:
            result.status = result_pb2.RUN_STATUS_CANCELLED
        result.warnings.extend(self._warnings)
        if result.placement.standin and "standin" not in " ".join(result.standins):
            result.standins.append(f"standin-{spec.device if spec.device != 'cpu' else spec.runtime}")
        if is_recorded(self._sys_root):
            result.standins.append(RECORDED)
        validity.settle(result, self._config.validity.severity)
        return result

    def _take_report(
        self, result: result_pb2.RunResult, report: result_pb2.RunResult, end: worker.WorkerEnd | None
    ) -> None:
        # Merging would add its repeated fields to what is there.
        for name in ("runtime", "effective_spec"):
            if report.HasField(name):
                result.ClearField(name)
        result.MergeFrom(report)
        result.status = result_pb2.RUN_STATUS_SUCCEEDED
        result.effective_spec.inputs_sha256 = self._job.plan.spec.inputs_sha256
        spec = self._job.plan.spec
        for name in ("timeout_seconds", "strict", "allow_fallback", "tune", "power_mode"):
            setattr(result.effective_spec, name, getattr(spec, name))
        if spec.HasField("cool_down_celsius"):
            result.effective_spec.cool_down_celsius = spec.cool_down_celsius
            result.effective_spec.cool_down_seconds = self._cool_down_seconds
        result.effective_spec.idle_seconds = self._idle_seconds
        if self._seen is not None:
            self._take_seen(result, self._seen)
        how = ""
        if end is not None and (end.signal or end.exit_code):
            how = f"ended with {end.signal}" if end.signal else f"exited with {end.exit_code}"
        if self._profile is not None:
            result.placement.CopyFrom(self._profile)
        elif self._profiling:
            why = self._profile_missing or f"the worker {how or 'ended'} during it"
            result.placement.evidence_reports.add(
                evidence=placement_pb2.EVIDENCE_PROFILED, detail=f"there is no profile: {why}"
            )
            return
        if how:
            self._doubt(
                validity.warn(
                    "worker_end",
                    f"the worker {how} after it had reported: the figures are whole, "
                    f"but {result.runtime.name} does not unload cleanly",
                    validity.NOTE,
                )
            )

    @staticmethod
    def _take_seen(result: result_pb2.RunResult, seen: Seen) -> None:
        result.effective_spec.sample_hertz = seen.sample_hertz
        swapped = max(result.memory.peak_swap_bytes, seen.memory.peak_swap_bytes)
        told = result.memory.HasField("peak_swap_bytes") or seen.memory.HasField("peak_swap_bytes")
        result.memory.MergeFrom(seen.memory)
        if told:
            result.memory.peak_swap_bytes = swapped
        if seen.telemetry is not None:
            result.telemetry.CopyFrom(seen.telemetry)
        if seen.energy is not None:
            result.energy.CopyFrom(seen.energy)
        for window, around in zip(result.scenario.windows, seen.windows, strict=False):
            window.MergeFrom(around)

    def _take_error(
        self,
        result: result_pb2.RunResult,
        error: result_pb2.RunError,
        end: worker.WorkerEnd | None,
        output_tail: str,
    ) -> None:
        result.status = result_pb2.RUN_STATUS_FAILED
        result.error.CopyFrom(error)
        result.error.stage = self._stage
        result.error.output_tail = output_tail
        if error.code == "out_of_memory" and self._last_memory() not in error.message:
            result.error.message += self._last_memory()
        if (
            self._seen is not None
            and self._seen.telemetry is not None
            and self._stage >= result_pb2.STAGE_CREATE
            and error.code not in _WITHOUT_TELEMETRY
        ):
            result.telemetry.CopyFrom(self._seen.telemetry)
            result.memory.MergeFrom(self._seen.memory)
        if end is not None:
            result.error.signal = end.signal
            if end.exit_code is not None:
                result.error.exit_code = end.exit_code


def _in_json(text: str) -> bytes:
    return json.dumps(text)[1:-1].encode()


class _OomCounter:
    """How often the kernel killed for want of memory, counted from its making on.

    The control group's own count where there is one (cgroup v2's memory.events, v1's memory.oom_control),
    since the system's count in /proc/vmstat includes kills in every other group.
    """

    def __init__(self, root: Path) -> None:
        self._files = [path for path in _oom_files(root) if _oom_kills(path) is not None][:1]
        self._before = [_oom_kills(path) or 0 for path in self._files]

    def evidence(self) -> str:
        """What rose, in words; empty when nothing did."""
        for path, before in zip(self._files, self._before, strict=True):
            now = _oom_kills(path) or 0
            if now > before:
                return f"oom_kill in {path} rose from {before} to {now}"
        return ""


def _oom_files(root: Path) -> list[Path]:
    found = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                found.append(root / "sys/fs/cgroup" / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                found.append(root / "sys/fs/cgroup/memory" / path.lstrip("/") / "memory.oom_control")
    return [*found, root / "proc/vmstat"]


def _oom_kills(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None
