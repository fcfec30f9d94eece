"""Jobs of the collector: an offer comes over the board's stream, its files are fetched, its run is queued.

    jobs/<run id>.offer     what was offered and not given back, from before its run is queued until its
                            result is acknowledged

An offer says which id its run must have, and the queue starts no run twice: whatever is offered again,
after a broken link, a restart or kill -9, is the run that is there already. How the run ended is said by
its result alone, which goes the way of every result; what is said here is only how far the board is.

A job that is offered again as another attempt, while an earlier one is still here, is not begun a second
time: the first result ends the job. Only when the earlier one fails is the later one begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from boardbench.agent import folder
from boardbench.agent.config import JobsConfig
from boardbench.agent.errors import (
    AgentError,
    GroupClosed,
    InvalidRequest,
    ModelNotFound,
    NotRunnable,
    RunExists,
    RunNotFound,
    Unavailable,
)
from boardbench.agent.fetch import Credentials, Fetcher
from boardbench.agent.plan import RUN_ID
from boardbench.agent.queue import Runs
from boardbench.agent.recognise import FileKind
from boardbench.agent.spool import Spool
from boardbench.agent.store import ModelStore
from boardbench.agent.stream import open_channel
from boardbench.v1 import agent_pb2, collector_pb2, job_pb2, model_pb2, result_pb2

_log = logging.getLogger(__name__)

# How far a run is is for eyes, over a link that may be slow and on a board that measures.
_REPORT_SECONDS = 0.5
# The store made room for something else just when the run was to be queued.
_EVICTED_TRIES = 3
_SUFFIX = ".offer"
# A person reads it in a line of a table.
_REASON_LENGTH = 600

# The board can never run it. All else may be different another time.
_NEVER = (InvalidRequest, NotRunnable, RunExists, GroupClosed)


class _GivenBack(Exception):
    """The job is not done here; the message says why."""

    def __init__(self, phase: job_pb2.JobPhase.ValueType, reason: str) -> None:
        super().__init__(reason)
        self.phase = phase


class _Held:
    """A job that the board has."""

    def __init__(self, offer: job_pb2.JobOffer) -> None:
        self.offer = offer
        # The latest that was offered of the job.
        self.attempt = offer.attempt
        # That offer, when it asks for another run than the one that is here.
        self.later: job_pb2.JobOffer | None = None
        self.phase: job_pb2.JobPhase.ValueType = job_pb2.JOB_PHASE_ACCEPTED
        self.stage: result_pb2.Stage.ValueType = result_pb2.STAGE_UNSPECIFIED
        self.fraction: float | None = None
        self.unsaid = True
        self.said_at = 0.0
        # Its run is, or may be by now, in the queue.
        self.queued = False
        # The run has ended; the job is held until its result is acknowledged.
        self.ended = False
        # And so that another attempt is worth it.
        self.failed = False
        # Why it is not wanted any more; None while it is.
        self.withdrawn: str | None = None
        self.task: asyncio.Task[None] | None = None

    def report(self) -> job_pb2.JobReport:
        """How far it is."""
        return job_pb2.JobReport(
            job_id=self.offer.job_id,
            attempt=self.attempt,
            phase=self.phase,
            stage=self.stage,
            fraction=self.fraction,
        )


class Jobs:
    """The jobs that the board has: a party of the stream. Used from one event loop; ``close()`` it."""

    def __init__(
        self,
        config: JobsConfig,
        root: Path,
        *,
        collector: str,
        device_id: str,
        store: ModelStore,
        runs: Runs,
        spool: Spool,
        credentials: Credentials | None = None,
        channel: Callable[[str], grpc.aio.Channel] = open_channel,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Coroutine[object, object, None]] = asyncio.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``root`` is a folder for what was offered; files come from the ``collector`` at ``HOST:PORT``.

        ``credentials`` is the metadata by which the collector knows the board.
        """
        self._config = config
        self._root = root
        self._store = store
        self._runs = runs
        self._spool = spool
        self._fetcher = Fetcher(
            collector, device_id, credentials=credentials, channel=channel, jitter=jitter, sleep=sleep
        )
        self._monotonic = monotonic
        self._held: dict[str, _Held] = {}
        # What was given back: until a heartbeat after it was said, it may be to be said again.
        self._answers: list[tuple[job_pb2.JobReport, bool]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._due: asyncio.TimerHandle | None = None
        self.speak: Callable[[], None] = lambda: None
        """Called when there is something to say."""

    @property
    def open(self) -> int:
        """Number of jobs that the board has."""
        return len(self._held)

    def recover(self) -> None:
        """Takes up what a former life of the agent left. Called once, after the queue has done so."""
        try:
            folder.remove_scratch(self._root)
            paths = sorted(self._root.glob("*" + _SUFFIX))
        except OSError as error:
            _log.warning("%s: can't be read: %s", self._root, error)
            return
        for path in paths:
            try:
                offer = job_pb2.JobOffer.FromString(path.read_bytes())
            except (OSError, DecodeError) as error:
                _log.warning("%s: can't be used: %s", path, error)
                continue
            if offer.run_id == path.name.removesuffix(_SUFFIX):
                held = self._hold(offer)
                held.queued = self._runs.knows(offer.run_id)

    async def close(self) -> None:
        """Ends what goes on here; runs and what was fetched stay. Idempotent."""
        self._closed = True
        if self._due is not None:
            self._due.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- a party of the stream

    def connected(self) -> None:
        """Everything is said again."""
        for held in self._held.values():
            held.unsaid, held.said_at = not held.ended, 0.0
        self._answers = [(answer, False) for answer, _ in self._answers]
        self.speak()

    def beat(self, heartbeat: collector_pb2.Heartbeat) -> None:
        """Names the jobs that the board has."""
        self._answers = [(answer, said) for answer, said in self._answers if not said]
        self._release_acknowledged()
        heartbeat.job_ids.extend(self._held)

    def hear(self, response: collector_pb2.ReportResponse) -> None:
        """Takes offers and withdrawals."""
        kind = response.WhichOneof("response")
        if kind == "offer":
            self._offered(response.offer)
        elif kind == "withdrawal":
            self._withdrawn(response.withdrawal)

    def say(self) -> list[collector_pb2.ReportRequest]:
        """How far jobs are, each as often as somebody can read it."""
        reports = [answer for answer, said in self._answers if not said]
        self._answers = [(answer, True) for answer, _ in self._answers]
        now = self._monotonic()
        later = False
        for held in self._held.values():
            if not held.unsaid:
                continue
            if held.said_at and now - held.said_at < _REPORT_SECONDS:
                later = True
                continue
            held.unsaid, held.said_at = False, now
            reports.append(held.report())
        if later and self._due is None and not self._closed:
            self._due = asyncio.get_running_loop().call_later(_REPORT_SECONDS, self._say_due)
        return [collector_pb2.ReportRequest(job=report) for report in reports]

    def _say_due(self) -> None:
        self._due = None
        self.speak()

    # --- what the collector asks for

    def _offered(self, offer: job_pb2.JobOffer) -> None:
        # The collector gives the next job as soon as it has a result, and not with the next heartbeat.
        self._release_acknowledged()
        held = self._held.get(offer.job_id)
        if held is not None and (held.offer.run_id == offer.run_id or offer.attempt <= held.attempt):
            held.unsaid, held.said_at = True, 0.0
            self.speak()
            return
        if held is not None:
            # The collector took the earlier attempt as lost, and it is not; or its run has failed.
            held.attempt, held.later = offer.attempt, offer
            held.unsaid, held.said_at = True, 0.0
            self._go_on(held)
            self.speak()
            return
        if not RUN_ID.fullmatch(offer.run_id):
            self._answer(offer, job_pb2.JOB_PHASE_REFUSED, f"{offer.run_id[:80]!r} can't be the id of a run")
        elif not self._config.take:
            self._answer(offer, job_pb2.JOB_PHASE_RETURNED, "the board takes no jobs (jobs.take = false)")
        elif self._closed:
            self._answer(offer, job_pb2.JOB_PHASE_RETURNED, "the agent is stopping")
        elif len(self._held) >= self._config.open_limit:
            self._answer(
                offer,
                job_pb2.JOB_PHASE_RETURNED,
                f"the board has {len(self._held)} jobs already, as many as it takes (jobs.open_limit)",
            )
        else:
            _log.info("job %s: offered, attempt %d: %s", offer.job_id, offer.attempt, offer.model.name)
            self._hold(offer)

    def _withdrawn(self, withdrawal: job_pb2.JobWithdrawal) -> None:
        held = self._held.get(withdrawal.job_id)
        if held is None:
            gone = job_pb2.JobOffer(job_id=withdrawal.job_id, attempt=withdrawal.attempt)
            self._answer(gone, job_pb2.JOB_PHASE_RETURNED, "the board does not have it")
            return
        if withdrawal.attempt < held.offer.attempt:
            return
        held.later = None
        if held.ended or held.withdrawn is not None:
            return
        _log.info("job %s: withdrawn: %s", withdrawal.job_id, withdrawal.reason)
        held.withdrawn = withdrawal.reason or "it is not wanted any more"
        if held.queued:
            self._start(self._cancel(held.offer.run_id))
        elif held.task is not None:
            held.task.cancel()

    async def _cancel(self, run_id: str) -> None:
        # It may be on its way into the queue; then it is cancelled there.
        with contextlib.suppress(RunNotFound):
            await self._runs.cancel(run_id)

    # --- a job

    def _hold(self, offer: job_pb2.JobOffer) -> _Held:
        held = self._held[offer.job_id] = _Held(offer)
        held.task = self._start(self._work(held))
        self.speak()
        return held

    async def _work(self, held: _Held) -> None:
        """Sees the job to its run's end."""
        try:
            result = await self._do(held)
        except _GivenBack as back:
            await self._give_back(held, back.phase, str(back))
        except _NEVER as error:
            await self._give_back(held, job_pb2.JOB_PHASE_REFUSED, str(error))
        except Unavailable:
            # The agent stops: what is queued is measured, and what is not is fetched, in its next life.
            if not held.queued:
                held.unsaid = False
        except AgentError as error:
            await self._give_back(held, job_pb2.JOB_PHASE_RETURNED, str(error))
        except asyncio.CancelledError:
            if held.withdrawn is None or self._closed:
                raise
            # As long as it was fetched.
            await self._give_back(held, job_pb2.JOB_PHASE_RETURNED, f"withdrawn: {held.withdrawn}")
        except Exception as error:  # a fault here must not end the stream, nor hold the job for ever
            _log.exception("job %s", held.offer.job_id)
            reason = f"the agent failed ({type(error).__name__}: {error}): please report this"
            await self._give_back(held, job_pb2.JOB_PHASE_RETURNED, reason)
        else:
            held.ended, held.unsaid = True, False
            held.failed = result.status != result_pb2.RUN_STATUS_SUCCEEDED
            self._go_on(held)

    def _go_on(self, held: _Held) -> None:
        """Begins the later attempt of a job whose run has failed, where there is one."""
        if held.failed and held.later is not None:
            self._start(self._forget(held.offer.run_id))
            self._hold(held.later)

    async def _do(self, held: _Held) -> result_pb2.RunResult:
        offer = held.offer
        known = self._runs.knows(offer.run_id)
        is_new = await self._write_down(offer)
        # Offered again after its end: the collector has lost the result.
        lost = is_new and self._runs.has_ended(offer.run_id)
        if not known:
            await self._runs.check(offer.model, offer.spec)
            for _ in range(_EVICTED_TRIES):
                await self._fetch(held, offer.model, FileKind.MODEL)
                if offer.HasField("inputs"):
                    await self._fetch(held, offer.inputs, FileKind.INPUTS)
                held.queued = True
                try:
                    await self._runs.submit(offer.model.sha256, offer.spec, offer.run_id)
                    break
                except ModelNotFound:
                    held.queued = False
                except AgentError:
                    held.queued = False
                    raise
            else:
                raise _GivenBack(
                    job_pb2.JOB_PHASE_RETURNED, f"the model store has no room for {offer.model.name}"
                )
        held.queued = True
        if held.withdrawn is not None:
            await self._cancel(offer.run_id)
        async for event in self._runs.watch(offer.run_id):
            self._note(held, event)
            if event.HasField("result"):
                if lost:
                    await self._send_again(event.result)
                return event.result
        raise RunNotFound(f"the end of run {offer.run_id} is not known")

    async def _send_again(self, result: result_pb2.RunResult) -> None:
        if not self._spool.waits(result.run_id):
            _log.warning("run %s was offered again after its end: its result is sent again", result.run_id)
            await asyncio.to_thread(self._spool.append, result.run_id, result.SerializeToString())

    def _note(self, held: _Held, event: agent_pb2.RunEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "queued":
            self._progress(held, job_pb2.JOB_PHASE_WAITING)
        elif kind == "stage":
            self._progress(held, job_pb2.JOB_PHASE_RUNNING, event.stage.stage)
        elif kind == "progress":
            fraction = event.progress.fraction if event.progress.HasField("fraction") else None
            self._progress(held, job_pb2.JOB_PHASE_RUNNING, event.progress.stage, fraction)

    def _progress(
        self,
        held: _Held,
        phase: job_pb2.JobPhase.ValueType,
        stage: result_pb2.Stage.ValueType = result_pb2.STAGE_UNSPECIFIED,
        fraction: float | None = None,
    ) -> None:
        if phase != held.phase:
            held.said_at = 0.0
        if (phase, stage, fraction) != (held.phase, held.stage, held.fraction):
            held.phase, held.stage, held.fraction, held.unsaid = phase, stage, fraction, True
            self.speak()

    async def _give_back(self, held: _Held, phase: job_pb2.JobPhase.ValueType, reason: str) -> None:
        _log.warning("job %s: %s: %s", held.offer.job_id, _WORDS[phase], reason)
        # A withdrawal has nothing to break off any more: it would only keep this from being said.
        held.task = None
        await self._forget(held.offer.run_id)
        if self._held.get(held.offer.job_id) is held:
            del self._held[held.offer.job_id]
        self._answer(held.offer, phase, reason, held.attempt)

    def _answer(
        self, offer: job_pb2.JobOffer, phase: job_pb2.JobPhase.ValueType, reason: str, attempt: int = 0
    ) -> None:
        report = job_pb2.JobReport(
            job_id=offer.job_id,
            attempt=attempt or offer.attempt,
            phase=phase,
            reason=reason[:_REASON_LENGTH],
        )
        self._answers.append((report, False))
        self.speak()

    def _release_acknowledged(self) -> None:
        """Lets go of jobs whose results are the collector's."""
        for job_id, held in tuple(self._held.items()):
            if held.ended and not self._spool.waits(held.offer.run_id):
                del self._held[job_id]
                self._start(self._forget(held.offer.run_id))

    # --- what outlives the agent

    async def _write_down(self, offer: job_pb2.JobOffer) -> bool:
        """Whether it was not on the disk before."""
        try:
            return await folder.whole(asyncio.to_thread(self._write, offer))
        except OSError as error:
            raise _GivenBack(
                job_pb2.JOB_PHASE_RETURNED, f"{self._root}: can't be written: {error.strerror}"
            ) from error

    def _write(self, offer: job_pb2.JobOffer) -> bool:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(offer.run_id)
        if path.exists():
            return False
        folder.replace(path, offer.SerializeToString())
        return True

    async def _forget(self, run_id: str) -> None:
        try:
            await asyncio.to_thread(self._path(run_id).unlink, missing_ok=True)
        except OSError as error:
            _log.warning("%s: %s", self._path(run_id), error)

    def _path(self, run_id: str) -> Path:
        return self._root / (run_id + _SUFFIX)

    # --- files

    async def _fetch(self, held: _Held, model: model_pb2.Model, kind: FileKind) -> None:
        """The file is in the store."""
        with contextlib.suppress(ModelNotFound):
            self._store.get(model.sha256)
            return
        self._progress(held, job_pb2.JOB_PHASE_FETCHING)
        await self._fetcher.fetch(
            model.sha256,
            model.name,
            lambda: self._store.receive(
                sha256=model.sha256, name=model.name, size_bytes=model.size_bytes, kind=kind
            ),
            lambda: self._store.arrived_bytes(model.sha256),
            lambda fraction: self._progress(held, job_pb2.JOB_PHASE_FETCHING, fraction=fraction),
        )

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.warning("a job: %s", task.exception())


_WORDS = {
    job_pb2.JOB_PHASE_RETURNED: "given back",
    job_pb2.JOB_PHASE_REFUSED: "refused",
}
