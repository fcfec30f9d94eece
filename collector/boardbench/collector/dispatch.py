"""Hands jobs out over the streams that boards hold open, and hears what becomes of them.

One task does what costs a commit, gathered: leases that heartbeats prolong, what boards report, leases that
ran out, and claims for boards that have room. Streams only leave word here and are never kept waiting. What a
board is to be told goes into its desk, which is bounded by the jobs that it has.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import partial

from boardbench.collector.errors import (
    InvalidRequest,
    NotFound,
    Occupied,
    StoreError,
)
from boardbench.collector.files import Files
from boardbench.collector.jobs import (
    HELD_STATES,
    OPEN_STATES,
    Batch,
    Booking,
    JobQuery,
    JobRecord,
    JobStore,
    Submission,
    Transition,
    cancelled,
    expired,
    new_job_id,
    new_record,
    renewed,
    reported,
    retried,
    set_time,
)
from boardbench.collector.look import QueueView, ReadModel
from boardbench.collector.store import check_identity, the_one
from boardbench.collector.terms import MEANINGS, Term, chosen, complaint, parse
from boardbench.v1 import collector_pb2, job_pb2, model_pb2, result_pb2

_log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
"""How often it is looked for what nobody pokes about: leases that ran out, what another process did."""

_GATHER_SECONDS = 0.02
"""After a poke: boards that are poked for in the same moment share commits."""

_AT_ONCE = 64
"""Claims under way at once: they share a commit, and a fleet that comes back does not fill the memory."""

_FEW = 8
_MAX_DUE = 1000
_MAX_WATCHED = 10_000
"""Jobs that one call may be about: 10,000 boards, one each."""

_MAX_PAGE = 1000
_DEFAULT_PAGE = 100
_MAX_TAGS = 32
_MAX_TEXT = 256
_MAX_ATTEMPTS = 100
_LONGEST_SECONDS = 366 * 86400.0
_RESERVED_SECONDS = 3600.0
_FORGET_SECONDS = 600.0
_FORGET_JOBS = 500

_NO_TAKER = "the board's agent takes no jobs: it is older, or jobs.take = false"

_DONE = job_pb2.JOB_STATE_DONE
_DEAD = job_pb2.JOB_STATE_DEAD
_GIVEN_BACK = (job_pb2.JOB_PHASE_RETURNED, job_pb2.JOB_PHASE_REFUSED)


@dataclass(frozen=True)
class Rules:
    """How jobs are handed out."""

    lease_seconds: float
    jobs_per_board: int
    max_attempts: int
    timeout_seconds: float
    keep_seconds: float
    """How long a job that has ended is remembered."""


class Desk:
    """Where jobs are handed to one board, from its hello to the end of its stream."""

    __slots__ = (
        "_closed",
        "_dispatcher",
        "_outbox",
        "_send",
        "_sender",
        "_withdrawn",
        "device_id",
        "named",
        "offered",
        "phases",
        "ready",
        "takes_jobs",
    )

    def __init__(
        self,
        dispatcher: Dispatcher,
        device_id: str,
        send: Callable[[collector_pb2.ReportResponse], Awaitable[None]],
        *,
        takes_jobs: bool,
    ) -> None:
        self.device_id = device_id
        self.takes_jobs = takes_jobs
        self.ready = False
        """Whether the board has named the jobs that it has: nothing is handed out before."""
        self.offered: dict[str, int] = {}
        """Jobs that the board has, as far as this stream knows, with the latest attempt it was told of."""
        self.named: dict[str, float] = {}
        """When it last named them, on a clock that never jumps."""
        self.phases: dict[str, tuple[int, int]] = {}
        """Attempt and phase that it told last of each job."""
        self._withdrawn: dict[tuple[str, int], None] = {}
        """A set; an empty one of those has three times the size, and there is one for each board."""
        self._dispatcher = dispatcher
        self._send = send
        self._outbox: dict[tuple[str, int, str], collector_pb2.ReportResponse] = {}
        self._sender: asyncio.Task[None] | None = None
        self._closed = False

    def heartbeat(self, heartbeat: collector_pb2.Heartbeat) -> None:
        """The board names the jobs that it has."""
        self._dispatcher.named(self, tuple(dict.fromkeys(heartbeat.job_ids)))

    def report(self, report: job_pb2.JobReport) -> None:
        """The board says what it does with a job."""
        self._dispatcher.reported(self, report)

    def offer(self, record: JobRecord, lease_seconds: float) -> None:
        """Asks the board to make the run of the job's latest attempt."""
        job = record.job
        self.offered[job.job_id] = job.attempts
        offer = job_pb2.JobOffer(
            job_id=job.job_id,
            attempt=job.attempts,
            run_id=job.run_id,
            model=job.model,
            inputs=record.inputs,
            spec=job.spec,
            lease_seconds=lease_seconds,
        )
        self._put((job.job_id, job.attempts, "offer"), collector_pb2.ReportResponse(offer=offer))

    def withdraw(self, job_id: str, attempt: int, reason: str) -> None:
        """Tells the board, once, that an attempt is not wanted any more."""
        self._outbox.pop((job_id, attempt, "offer"), None)
        if (job_id, attempt) in self._withdrawn:
            return
        if len(self._withdrawn) >= _MAX_DUE:
            self._withdrawn.clear()
        self._withdrawn[(job_id, attempt)] = None
        withdrawal = job_pb2.JobWithdrawal(job_id=job_id, attempt=attempt, reason=reason)
        self._put((job_id, attempt, "withdrawal"), collector_pb2.ReportResponse(withdrawal=withdrawal))

    def forget(self, job_id: str) -> None:
        """The board has it no more."""
        for known in (self.offered, self.named, self.phases):
            known.pop(job_id, None)

    def _put(self, key: tuple[str, int, str], response: collector_pb2.ReportResponse) -> None:
        if self._closed:
            return
        self._outbox[key] = response
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        while self._outbox and not self._closed:
            key = next(iter(self._outbox))
            try:
                await self._send(self._outbox.pop(key))
            except asyncio.CancelledError:
                raise
            except Exception as error:  # the stream ends; whoever reads it says why
                _log.debug("device %s: a job could not be told: %s", self.device_id, error)
                return

    async def close(self) -> None:
        """The stream has ended."""
        self._closed = True
        self._outbox.clear()
        self._dispatcher.left(self)
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)


class _Watcher:
    """Jobs that somebody follows: what is kept of each is its version."""

    def __init__(self, versions: dict[str, int]) -> None:
        self.versions = versions
        self.changed: set[str] = set()
        self.came = asyncio.Event()


class Dispatcher:
    """The queue as people, programs and boards use it. ``run()`` is its task."""

    def __init__(
        self,
        jobs: JobStore,
        files: Files,
        look: ReadModel,
        rules: Rules,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        random: Callable[[int], bytes] = os.urandom,
        tick_seconds: float = _TICK_SECONDS,
    ) -> None:
        self._jobs = jobs
        self._files = files
        self._look = look
        self._rules = rules
        self._clock = clock
        self._monotonic = monotonic
        self._random = random
        self._tick_seconds = tick_seconds
        self._desks: dict[str, Desk] = {}
        self._watchers: set[_Watcher] = set()
        self._named: dict[Desk, tuple[str, ...]] = {}
        self._reports: dict[tuple[Desk, str, int], job_pb2.JobReport] = {}
        self._poked: set[str] = set()
        self._poke = asyncio.Event()
        self._forgotten_at = float("-inf")
        self._leases_expired = 0
        self._dead = 0
        jobs.listen(self._changed)

    # Boards.

    def attach(
        self,
        hello: collector_pb2.Hello,
        send: Callable[[collector_pb2.ReportResponse], Awaitable[None]],
    ) -> Desk:
        """Returns the desk of a stream; ``send`` may be called from other tasks than the stream's."""
        desk = Desk(self, hello.board.device_id, send, takes_jobs=hello.takes_jobs)
        self._desks[desk.device_id] = desk
        return desk

    def left(self, desk: Desk) -> None:
        """The stream has ended; what it said before still counts."""
        if self._desks.get(desk.device_id) is desk:
            del self._desks[desk.device_id]

    def named(self, desk: Desk, job_ids: tuple[str, ...]) -> None:
        """A board names the jobs that it has."""
        now = self._monotonic()
        for job_id in {*desk.named, *desk.phases} - set(job_ids):
            desk.named.pop(job_id, None)
            desk.phases.pop(job_id, None)
        desk.named.update((job_id, now) for job_id in job_ids)
        self._named[desk] = job_ids
        if not desk.ready:
            self._poke.set()

    def reported(self, desk: Desk, report: job_pb2.JobReport) -> None:
        """A board says what it does with a job; the latest word on an attempt counts."""
        if report.phase in _GIVEN_BACK:
            desk.forget(report.job_id)
        else:
            desk.named[report.job_id] = self._monotonic()
        self._reports.pop((desk, report.job_id, report.attempt), None)
        self._reports[(desk, report.job_id, report.attempt)] = report
        # How far a run is is for eyes and can wait for others; what changes its state can't.
        phase = (report.attempt, int(report.phase))
        if desk.phases.get(report.job_id) != phase:
            desk.phases[report.job_id] = phase
            self._poke.set()

    async def run(self) -> None:
        """Does the work until cancelled; survives whatever the store does."""
        looked_at = float("-inf")
        while True:
            if await _within(self._poke.wait(), self._tick_seconds):
                await asyncio.sleep(_GATHER_SECONDS)
            self._poke.clear()
            try:
                await self._take_in()
                if self._monotonic() - looked_at >= self._tick_seconds:
                    looked_at = self._monotonic()
                    await self._look_around()
                await self._hand_out()
            except StoreError as error:
                _log.warning("the queue of jobs has to wait: %s", error)
                await asyncio.sleep(self._tick_seconds)
            except Exception:
                _log.exception("the queue of jobs failed; it goes on")
                await asyncio.sleep(self._tick_seconds)

    async def _take_in(self) -> None:
        """Takes in what boards have said since the last time."""
        reports, self._reports = self._reports, {}
        named, self._named = self._named, {}
        if not reports and not named:
            return
        now = self._clock()
        until = now + self._rules.lease_seconds
        transitions: dict[str, list[Transition]] = {}
        for (desk, job_id, _), report in reports.items():
            step: Transition = partial(
                reported,
                device_id=desk.device_id,
                report=report,
                at=now,
                lease_until=until,
                progress=_progress(report),
            )
            transitions.setdefault(job_id, []).append(step)
        for desk, job_ids in named.items():
            for job_id in job_ids:
                step = partial(renewed, device_id=desk.device_id, lease_until=until)
                transitions.setdefault(job_id, []).append(step)
        changed: tuple[JobRecord, ...] = ()
        try:
            if transitions:
                changed = await self._jobs.change(
                    {job_id: partial(_in_turn, steps=steps) for job_id, steps in transitions.items()}
                )
        except StoreError:
            # It is said again, but for what boards give back.
            self._reports = {**reports, **self._reports}
            self._named = {**named, **self._named}
            raise
        fine = {record.job_id for record in changed if record.is_held and not record.cancelling}
        await self._answer_unwanted(reports, named, set(transitions) - fine)
        fresh = [(desk, job_ids) for desk, job_ids in named.items() if not desk.ready]
        for at in range(0, len(fresh), _AT_ONCE):
            await asyncio.gather(*(self._begin(*each) for each in fresh[at : at + _AT_ONCE]))

    async def _answer_unwanted(
        self,
        reports: dict[tuple[Desk, str, int], job_pb2.JobReport],
        named: dict[Desk, tuple[str, ...]],
        doubtful: set[str],
    ) -> None:
        """Tells boards of jobs that they have and should not."""
        told = [
            (desk, job_id, attempt)
            for (desk, job_id, attempt), report in reports.items()
            if report.phase not in _GIVEN_BACK
        ]
        told += [(desk, job_id, desk.offered.get(job_id, 0)) for desk, ids in named.items() for job_id in ids]
        told = [entry for entry in told if entry[1] in doubtful]
        if not told:
            return
        there = {record.job_id: record for record in await self._get({job_id for _, job_id, _ in told})}
        for desk, job_id, attempt in told:
            record = there.get(job_id)
            if record is None or record.device_id != desk.device_id:
                desk.withdraw(job_id, attempt, "this collector has no such job for this board")
            elif not record.is_open:
                # The board keeps naming a job until it knows that its result is stored.
                if record.job.state != _DONE or record.job.run_status == 0:
                    desk.withdraw(job_id, attempt or record.job.attempts, record.job.reason or "it has ended")
            elif record.cancelling:
                desk.withdraw(job_id, attempt or record.job.attempts, record.job.reason)

    async def _begin(self, desk: Desk, job_ids: Sequence[str]) -> None:
        """A board that has come back: what it was given before and does not name is offered again."""
        query = JobQuery(device_id=desk.device_id, states=HELD_STATES)
        for record in await self._jobs.jobs(query, limit=_MAX_DUE):
            if record.cancelling:
                desk.withdraw(record.job_id, record.job.attempts, record.job.reason)
            elif record.job_id in job_ids:
                desk.offered[record.job_id] = record.job.attempts
            elif desk.takes_jobs:
                desk.offer(record, self._rules.lease_seconds)
        desk.ready = True
        self._poked.add(desk.device_id)

    async def _look_around(self) -> None:
        """Looks for what time and other processes have done."""
        now = self._clock()
        due = await self._jobs.due(at=now, limit=_MAX_DUE)
        if due:
            transitions = {record.job_id: self._over(record, now) for record in due}
            for record in await self._jobs.change(transitions):
                if record.lapsed:
                    self._leases_expired += 1
                    _log.warning("job %s on %s: %s", record.job_id, record.device_id, record.job.reason)
        if self._desks:
            self._poked |= await self._jobs.waiting_devices(at=now) & self._desks.keys()
            for record in await self._jobs.cancelling():
                desk = self._desks.get(record.device_id)
                if desk is not None and desk.ready:
                    desk.withdraw(record.job_id, record.job.attempts, record.job.reason)
        if self._monotonic() - self._forgotten_at >= _FORGET_SECONDS:
            before = now - self._rules.keep_seconds
            if await self._jobs.forget_jobs(ended_before=before, limit=_FORGET_JOBS) < _FORGET_JOBS:
                self._forgotten_at = self._monotonic()

    def _over(self, record: JobRecord, now: float) -> Transition:
        """Returns what happens to a job whose lease or time is over by the clock.

        A board that has just named it has it, however far the clock has jumped.
        """
        desk = self._desks.get(record.device_id)
        named_at = desk.named.get(record.job_id, float("-inf")) if desk is not None else float("-inf")
        if self._monotonic() - named_at < self._rules.lease_seconds and record.deadline > now:
            until = now + self._rules.lease_seconds
            return partial(renewed, device_id=record.device_id, lease_until=until)
        return partial(expired, at=now)

    async def _hand_out(self) -> None:
        """Leases jobs to the boards that were poked for and have room."""
        poked, self._poked = self._poked, set()
        if len(poked) > _FEW:
            # A fleet that comes back has few jobs: one look is less than a commit for every board.
            poked &= await self._jobs.waiting_devices(at=self._clock())
        desks = [self._desks[name] for name in poked if name in self._desks]
        desks = [desk for desk in desks if desk.ready and desk.takes_jobs]
        for at in range(0, len(desks), _AT_ONCE):
            try:
                await asyncio.gather(*(self._claim(desk) for desk in desks[at : at + _AT_ONCE]))
            except StoreError:
                self._poked |= {desk.device_id for desk in desks[at:]}
                raise

    async def _claim(self, desk: Desk) -> None:
        now = self._clock()
        given = await self._jobs.claim(
            desk.device_id,
            at=now,
            lease_until=now + self._rules.lease_seconds,
            most_open=self._rules.jobs_per_board,
        )
        for record in given:
            desk.offer(record, self._rules.lease_seconds)

    def _changed(self, records: Sequence[JobRecord]) -> None:
        """Some jobs have changed; called by the store."""
        for watcher in self._watchers:
            hits = {record.job_id for record in records if record.job_id in watcher.versions}
            if hits:
                watcher.changed |= hits
                watcher.came.set()
        for record in records:
            self._dead += record.job.state == _DEAD
            desk = self._desks.get(record.device_id)
            if desk is None:
                continue
            if record.cancelling:
                desk.withdraw(record.job_id, record.job.attempts, record.job.reason)
            elif not record.is_held:
                self._let_go(desk, record)
                self._poked.add(desk.device_id)
                self._poke.set()

    def _let_go(self, desk: Desk, record: JobRecord) -> None:
        """The job is not this board's any more: told, unless that came from the board itself."""
        attempt = desk.offered.get(record.job_id)
        if attempt is None or record.is_open:
            # One that waits again may still be on the board; when it is, that attempt goes on.
            return
        by_its_run = record.job.run_status and record.job.run_id == f"{record.job_id}-{attempt}"
        if not by_its_run:
            desk.withdraw(record.job_id, attempt, record.job.reason or "another attempt has finished it")
        desk.forget(record.job_id)

    # People and programs.

    async def submit(self, request: job_pb2.SubmitJobsRequest) -> tuple[JobRecord, ...]:
        """Queues a job for every board that is chosen; the same request again finds those jobs."""
        terms = parse(request.on)
        batch_id = request.request_id or self._random(16).hex()
        _check("request_id", batch_id)
        _check("holder", request.holder, empty=True)
        if len(request.tags) > _MAX_TAGS or any(
            len(text) > _MAX_TEXT for pair in request.tags.items() for text in pair
        ):
            raise InvalidRequest(f"at most {_MAX_TAGS} tags of {_MAX_TEXT} characters are taken")
        if request.max_attempts > _MAX_ATTEMPTS:
            raise InvalidRequest(f"max_attempts: at most {_MAX_ATTEMPTS}, not {request.max_attempts}")
        seconds = self._rules.timeout_seconds
        if request.HasField("timeout_seconds"):
            seconds = request.timeout_seconds
        if not 0 < seconds <= _LONGEST_SECONDS:
            raise InvalidRequest(f"timeout_seconds: more than 0 and at most a year, not {seconds:g}")
        digest = _digest(request)
        known = await self._jobs.jobs(JobQuery(batch_id=batch_id), limit=1)
        if known:
            # Neither the files nor the boards need to be there still.
            return self._same(await self._jobs.submit(Batch(batch_id, digest, 0.0), ()), digest)
        model = await self._files.find(request.model_sha256)
        inputs = await self._files.find(request.spec.inputs_sha256) if request.spec.inputs_sha256 else None
        now = self._clock()
        takers = {view.device_id for view in await self._look.views() if view.hello.takes_jobs}
        boards = await self._choose(request, terms, takers)
        records = [
            new_record(
                self._job(request, batch_id, device_id, model, "" if device_id in takers else _NO_TAKER),
                at=now,
                deadline=now + seconds,
                inputs=inputs,
            )
            for device_id in boards
        ]
        submission = await self._jobs.submit(Batch(batch_id, digest, now), records)
        if submission.repeated:
            return self._same(submission, digest)
        self._poke_for(record.device_id for record in submission.records)
        return submission.records

    def _same(self, submission: Submission, digest: str) -> tuple[JobRecord, ...]:
        if submission.digest != digest:
            raise InvalidRequest("another request was submitted under this request_id; choose a new one")
        return submission.records

    def _job(
        self,
        request: job_pb2.SubmitJobsRequest,
        batch_id: str,
        device_id: str,
        model: model_pb2.Model,
        reason: str,
    ) -> job_pb2.Job:
        return job_pb2.Job(
            job_id=new_job_id(self._random),
            batch_id=batch_id,
            device_id=device_id,
            model=model,
            spec=request.spec,
            max_attempts=request.max_attempts or self._rules.max_attempts,
            priority=request.priority,
            holder=request.holder,
            tags=request.tags,
            reason=reason,
        )

    async def _choose(
        self, request: job_pb2.SubmitJobsRequest, terms: Sequence[Term], takers: Set[str]
    ) -> list[str]:
        """Returns the boards for a request; NotFound when there are none, or too few."""
        devices = await self._look.devices()
        met = chosen(devices, terms)
        if not met:
            raise NotFound(complaint(devices, terms))
        if not request.count:
            return [device.board.device_id for device in met]
        able = [device for device in met if device.board.device_id in takers]
        free = [device for device in able if _is_free_for(device, request.holder)]
        if len(free) < request.count:
            raise NotFound(
                f"--count {request.count}: only {len(free)} can be had; "
                + _shares(len(met), len(met) - len(able), len(able) - len(free))
            )
        free.sort(key=lambda device: (not device.up, device.open_jobs, device.board.device_id))
        return [device.board.device_id for device in free[: request.count]]

    async def page(self, request: job_pb2.ListJobsRequest) -> job_pb2.ListJobsResponse:
        """Returns a page of jobs, the latest first."""
        before = None
        if request.page_token:
            if not (request.page_token.isascii() and request.page_token.isdigit()):
                raise InvalidRequest("page_token is none that this collector gave out; ask again without it")
            before = min(int(request.page_token), 2**63 - 1)
        limit = min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE)
        query = await self._query(request.filter)
        records = await self._jobs.jobs(query, limit=limit + 1, before=before)
        token = str(records[limit - 1].arrival) if len(records) > limit else ""
        return job_pb2.ListJobsResponse(
            jobs=[record.job for record in records[:limit]], next_page_token=token
        )

    async def watch(self, filter: job_pb2.JobFilter) -> AsyncGenerator[job_pb2.Job, None]:
        """Yields the jobs as they are, then each as it has changed, until all have ended.

        Changes that follow each other quickly may be seen as one.
        """
        records = await self._all(await self._query(filter))
        watcher = _Watcher({record.job_id: record.version for record in records if record.is_open})
        self._watchers.add(watcher)
        try:
            # What has changed since it was read is seen below.
            watcher.changed |= set(watcher.versions)
            for record in reversed(records):
                yield record.job
            while watcher.versions:
                changed, watcher.changed = watcher.changed, set()
                watcher.came.clear()
                for record in await self._newer(watcher, changed):
                    yield record.job
                waits = watcher.versions and not watcher.changed
                if waits and not await _within(watcher.came.wait(), self._tick_seconds):
                    # Another process may have changed some.
                    watcher.changed |= set(watcher.versions)
        finally:
            self._watchers.discard(watcher)

    async def _newer(self, watcher: _Watcher, job_ids: set[str]) -> list[JobRecord]:
        """Returns the jobs of which the watcher has seen less; those that have ended it forgets."""
        now = await self._jobs.versions(sorted(job_ids))
        for job_id in job_ids - now.keys():
            watcher.versions.pop(job_id, None)
        newer = [job_id for job_id, version in now.items() if version > watcher.versions.get(job_id, version)]
        records = sorted(await self._get(newer), key=lambda record: record.arrival)
        for record in records:
            watcher.versions[record.job_id] = record.version
            if not record.is_open:
                del watcher.versions[record.job_id]
        return records

    async def cancel(self, filter: job_pb2.JobFilter) -> list[job_pb2.Job]:
        """Ends jobs that have not ended; returns them."""
        now = self._clock()
        return await self._change_all(
            filter, OPEN_STATES, partial(cancelled, reason="it was cancelled", at=now)
        )

    async def retry(self, filter: job_pb2.JobFilter) -> list[job_pb2.Job]:
        """Queues dead jobs again; returns them."""
        now = self._clock()
        deadline = now + self._rules.timeout_seconds
        jobs = await self._change_all(filter, (_DEAD,), partial(retried, deadline=deadline, at=now))
        self._poke_for(job.device_id for job in jobs)
        return jobs

    async def _change_all(
        self, filter: job_pb2.JobFilter, states: Sequence[int], transition: Transition
    ) -> list[job_pb2.Job]:
        if not (filter.job_ids or filter.batch_id or filter.device_id or filter.states):
            raise InvalidRequest("say which jobs are meant: an empty filter would mean all of them")
        wanted = tuple(state for state in filter.states or states if state in states)
        query = await self._query(filter)
        if not wanted:
            return []
        named = await self._all(JobQuery(query.job_ids, query.batch_id, query.device_id, states=wanted))
        changed = await self._jobs.change({record.job_id: transition for record in named})
        return [record.job for record in sorted(changed, key=lambda record: record.arrival)]

    async def _query(self, filter: job_pb2.JobFilter) -> JobQuery:
        """Returns the filter with whole identities; NotFound or Ambiguous when one names not one job."""
        given = [digits.lower() for digits in filter.job_ids]
        if len(given) > _MAX_WATCHED:
            raise InvalidRequest(f"at most {_MAX_WATCHED:,} jobs can be named at once; name their batch")
        for digits in given:
            _check("job_id", digits)
        # Whoever follows what was queued for a fleet names every job, whole: one question for all of them.
        there = await self._jobs.versions(given) if given else {}
        names = [digits if digits in there else await self._begins(digits) for digits in given]
        return JobQuery(tuple(names), filter.batch_id, filter.device_id, tuple(filter.states))

    async def _begins(self, digits: str) -> str:
        """Returns the one job whose identity begins so; NotFound or Ambiguous."""
        found = await self._jobs.find_jobs(digits)
        the_one("job", digits, [record.job_id for record in found])
        return found[0].job_id

    async def _all(self, query: JobQuery) -> tuple[JobRecord, ...]:
        records = await self._jobs.jobs(query, limit=_MAX_WATCHED + 1)
        if len(records) > _MAX_WATCHED:
            raise InvalidRequest(f"more than {_MAX_WATCHED:,} jobs are meant; name a batch or a board")
        return records

    async def _get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        names = sorted(job_ids)
        found: list[JobRecord] = []
        for at in range(0, len(names), 500):
            some = tuple(names[at : at + 500])
            found += await self._jobs.jobs(JobQuery(job_ids=some), limit=len(some))
        return found

    async def reserve(self, request: job_pb2.ReserveRequest) -> list[job_pb2.Reservation]:
        """Takes boards for one holder alone; Occupied when others are in the way."""
        _check("holder", request.holder)
        _check("reason", request.reason, empty=True)
        seconds = request.seconds if request.HasField("seconds") else _RESERVED_SECONDS
        if not 0 < seconds <= _LONGEST_SECONDS:
            raise InvalidRequest(f"seconds: more than 0 and at most a year, not {seconds:g}")
        terms = parse(request.on)
        if not terms:
            raise InvalidRequest("say which boards are meant, as board=pi5 or device_id=NAME")
        now = self._clock()
        devices = await self._look.devices()
        met = chosen(devices, terms)
        if not met:
            raise NotFound(complaint(devices, terms))
        if request.count:
            mine = [device for device in met if _is_free_for(device, request.holder)]
            if len(mine) < request.count:
                raise Occupied(
                    f"--count {request.count}: only {len(mine)} can be had; "
                    + _shares(len(met), 0, len(met) - len(mine))
                )
            mine.sort(key=lambda device: (not device.up, device.open_jobs, device.board.device_id))
            met = tuple(mine[: request.count])
        bookings = [
            Booking(device.board.device_id, request.holder, request.reason, now + seconds) for device in met
        ]
        taken = await self._jobs.reserve(bookings, at=now)
        if taken:
            first = taken[0]
            more = f", and {len(taken) - 1} more" if len(taken) > 1 else ""
            why = f" ({first.reason})" if first.reason else ""
            raise Occupied(
                f"{first.device_id} is reserved by {first.holder}{why} for another"
                f" {first.ends - now:.0f} s{more}"
            )
        return [reservation(booking) for booking in bookings]

    async def release(self, request: job_pb2.ReleaseRequest) -> list[job_pb2.Reservation]:
        """Gives boards back."""
        if not request.holder and not request.force:
            raise InvalidRequest("holder is missing: only who has a board gives it back, unless forced")
        terms = parse(request.on)
        device_ids = None
        if terms:
            devices = await self._look.devices()
            device_ids = [device.board.device_id for device in chosen(devices, terms)]
            if not device_ids:
                raise NotFound(complaint(devices, terms))
        elif request.force and not request.holder:
            raise InvalidRequest("say which boards are to be taken from whoever has them")
        holder = None if request.force and terms else request.holder
        freed = await self._jobs.release(device_ids, holder=holder, at=self._clock())
        self._poke_for(booking.device_id for booking in freed)
        return [reservation(booking) for booking in freed]

    async def set_labels(self, request: job_pb2.SetLabelsRequest) -> list[str]:
        """Sets the operator's labels of boards; returns which boards those are."""
        terms = parse(request.on)
        if not terms:
            raise InvalidRequest("say which boards are meant, as board=pi5 or device_id=NAME")
        if not request.labels:
            raise InvalidRequest("labels are missing")
        if len(request.labels) > _MAX_TAGS:
            raise InvalidRequest(f"at most {_MAX_TAGS} labels are taken at once")
        for name, value in request.labels.items():
            _check("a label's name", name)
            _check(f"label {name}", value, empty=True)
            if name.lower() in MEANINGS:
                if value:
                    raise InvalidRequest(
                        f"{name!r} can't be a label's name: terms about {name.lower()} are about what the"
                        " board itself says; choose another name"
                    )
                # One that is there already may be removed.
                continue
            # A term about it must be readable as one.
            if parse([f"{name}=x"])[0].name != name:
                raise InvalidRequest(f"{name!r} can't be a label's name")
        devices = await self._look.devices()
        names = [device.board.device_id for device in chosen(devices, terms)]
        if not names:
            raise NotFound(complaint(devices, terms))
        await self._jobs.set_labels(names, dict(request.labels))
        return names

    async def view(self) -> QueueView:
        """Returns how full the queue is."""
        counts = await self._jobs.queue_counts()
        by_name = {
            job_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower(): counts.by_state.get(state, 0)
            for state in job_pb2.JobState.values()
            if state
        }
        waited = 0.0 if counts.oldest_waiting is None else max(0.0, self._clock() - counts.oldest_waiting)
        return QueueView(
            jobs=by_name,
            oldest_waiting_seconds=waited,
            leases_expired=self._leases_expired,
            dead=self._dead,
            files_bytes=self._files.used_bytes,
        )

    def _poke_for(self, device_ids: Iterable[str]) -> None:
        self._poked |= set(device_ids)
        self._poke.set()


def _digest(request: job_pb2.SubmitJobsRequest) -> str:
    """Returns what tells requests apart that have one request_id: all but who asks.

    A CI job that is repeated runs in another container, under another name.
    """
    asked = job_pb2.SubmitJobsRequest()
    asked.CopyFrom(request)
    asked.ClearField("holder")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()


def _shares(met: int, idle: int, reserved: int) -> str:
    """How many boards there are, and why not all of them can be had."""
    shares = [f"{met} meet the terms" if met != 1 else "1 meets the terms"]
    if idle:
        shares.append(f"{idle} of them {'takes' if idle == 1 else 'take'} no jobs")
    if reserved:
        shares.append(f"others have reserved {reserved}")
    return ", ".join(shares)


def _is_free_for(device: collector_pb2.Device, holder: str) -> bool:
    """Whether nobody else has reserved the board."""
    return not device.HasField("reservation") or device.reservation.holder == holder


def reservation(booking: Booking) -> job_pb2.Reservation:
    """Returns a reservation as the wire has it."""
    message = job_pb2.Reservation(device_id=booking.device_id, holder=booking.holder, reason=booking.reason)
    set_time(message.ends_at, booking.ends)
    return message


async def _within(work: Coroutine[object, object, object], seconds: float) -> bool:
    """Whether the work was done within the time.

    Not asyncio.wait_for: before Python 3.12 that one can swallow a cancellation (python/cpython#86296).
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=seconds)
        return task.done()
    finally:
        task.cancel()


def _in_turn(record: JobRecord, steps: Sequence[Transition]) -> JobRecord:
    for step in steps:
        record = step(record)
    return record


def _progress(report: job_pb2.JobReport) -> str:
    """Returns what a board does with a job, in words."""
    share = f" {100 * min(max(report.fraction, 0.0), 1.0):.0f} %" if report.HasField("fraction") else ""
    if report.phase == job_pb2.JOB_PHASE_RUNNING:
        return f"{_STAGES.get(report.stage, 'running')}{share}"
    return f"{_PHASES.get(report.phase, '')}{share}".strip()


_PHASES = {
    job_pb2.JOB_PHASE_ACCEPTED: "accepted",
    job_pb2.JOB_PHASE_FETCHING: "fetching",
    job_pb2.JOB_PHASE_WAITING: "waiting on the board",
}

_STAGES = {
    result_pb2.STAGE_START: "starting",
    result_pb2.STAGE_IMPORT: "importing the engine",
    result_pb2.STAGE_CREATE: "loading the model",
    result_pb2.STAGE_INPUTS: "reading inputs",
    result_pb2.STAGE_FIRST_INFERENCE: "first inference",
    result_pb2.STAGE_WARM_UP: "warming up",
    result_pb2.STAGE_MEASURE: "measuring",
    result_pb2.STAGE_REPORT: "reporting",
    result_pb2.STAGE_COOL_DOWN: "cooling down",
    result_pb2.STAGE_IDLE: "measuring the idle board",
}


def _check(what: str, text: str, *, empty: bool = False) -> None:
    if empty and not text:
        return
    try:
        check_identity(what, text)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
