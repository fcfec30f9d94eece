"""Jobs over the board's own stream: each is begun once, whatever breaks, and what can't be done is said."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from boardbench.agent import folder
from boardbench.agent.config import AgentConfig, JobsConfig, RunsConfig, StoreConfig
from boardbench.agent.jobs import Jobs
from boardbench.agent.serve import serve
from boardbench.agent.stream import Pace
from boardbench.v1 import (
    collector_pb2,
    collector_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    model_pb2,
    result_pb2,
)

QUICK = result_pb2.BenchmarkSpec(duration_seconds=0.0, min_runs=3, warm_up_seconds=0.0, warm_up_runs=1)
CHUNK = 1000
Until = Callable[..., Awaitable[Any]]


class Collector(collector_pb2_grpc.CollectorServiceServicer, job_pb2_grpc.JobServiceServicer):
    """Offers what a test puts in, and stores results once by their place in the spool."""

    def __init__(self) -> None:
        self.address = ""
        self.hellos: list[collector_pb2.Hello] = []
        self.heartbeats: list[collector_pb2.Heartbeat] = []
        self.reports: list[job_pb2.JobReport] = []
        self.results: list[result_pb2.RunResult] = []
        self.marks: dict[str, int] = {}
        self.files: dict[str, bytes] = {}
        # Offset of each fetch, by the file's SHA-256.
        self.fetches: dict[str, list[int]] = {}
        # A fetch breaks off once, at this byte.
        self.breaks_at: int | None = None
        self.damages = False
        # Nothing more of a file is sent from this byte on.
        self.stops_at: int | None = None
        self.stopped = False
        self.holds: asyncio.Event | None = None
        # Takes results and does not acknowledge them.
        self.silent = False
        self.heartbeat_seconds = 0.1
        # None ends the stream.
        self._outbox: asyncio.Queue[collector_pb2.ReportResponse | None] = asyncio.Queue()

    def say(self, **response: Any) -> None:
        self._outbox.put_nowait(collector_pb2.ReportResponse(**response))

    def file(self, data: bytes, name: str) -> model_pb2.Model:
        sha256 = hashlib.sha256(data).hexdigest()
        self.files[sha256] = data
        return model_pb2.Model(sha256=sha256, name=name, size_bytes=len(data))

    def model(self, size_bytes: int = 0, **content: Any) -> model_pb2.Model:
        content["producer"] = os.urandom(4).hex() + " " * size_bytes
        return self.file(b"boardbench-fake/1\n" + json.dumps(content).encode(), "m.fake")

    def cut(self) -> None:
        """Breaks the stream."""
        self._outbox.put_nowait(None)

    def reported(self, job_id: str) -> list[job_pb2.JobReport]:
        return [report for report in self.reports if report.job_id == job_id]

    def last(self, job_id: str) -> int | None:
        found = self.reported(job_id)
        return found[-1].phase if found else None

    async def Report(self, requests: AsyncIterator[collector_pb2.ReportRequest], context: Any):
        first = await anext(requests)
        self.hellos.append(first.hello)
        outbox = self._outbox = asyncio.Queue()
        outbox.put_nowait(
            collector_pb2.ReportResponse(
                welcome=collector_pb2.Welcome(
                    acknowledged_sequence=self.marks.get(first.hello.spool_id, 0),
                    heartbeat_seconds=self.heartbeat_seconds,
                )
            )
        )
        reader = asyncio.ensure_future(self._read(requests, outbox))
        try:
            while (response := await outbox.get()) is not None:
                yield response
        finally:
            reader.cancel()

    async def _read(self, requests: Any, outbox: asyncio.Queue[collector_pb2.ReportResponse]) -> None:
        async for request in requests:
            kind = request.WhichOneof("request")
            if kind == "heartbeat":
                self.heartbeats.append(request.heartbeat)
            elif kind == "job":
                self.reports.append(request.job)
            elif kind == "result":
                spooled = request.result
                if spooled.sequence > self.marks.get(spooled.spool_id, 0) and not self.silent:
                    self.marks[spooled.spool_id] = spooled.sequence
                    self.results.append(spooled.result)
                if not self.silent:
                    acknowledgement = collector_pb2.Acknowledgement(
                        spool_id=spooled.spool_id, sequence=spooled.sequence
                    )
                    outbox.put_nowait(collector_pb2.ReportResponse(acknowledgement=acknowledgement))

    async def FetchFile(self, request: job_pb2.FetchFileRequest, context: Any):
        data = self.files.get(request.sha256)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such file")
        self.fetches.setdefault(request.sha256, []).append(request.offset_bytes)
        if self.holds is not None:
            await self.holds.wait()
        for offset in range(request.offset_bytes, len(data), CHUNK):
            if self.breaks_at is not None and offset >= self.breaks_at:
                self.breaks_at = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")
            if self.stops_at is not None and offset >= self.stops_at:
                self.stopped = True
                await asyncio.Event().wait()
            piece = data[offset : offset + CHUNK]
            crc32 = zlib.crc32(piece)
            if self.damages:
                piece = bytes(len(piece))
            yield job_pb2.FetchFileResponse(
                chunk={"offset_bytes": offset, "data": piece, "crc32": crc32}  # type: ignore[arg-type]
            )


def offer(model: model_pb2.Model, job_id: str = "job-1", attempt: int = 1, **more: Any) -> job_pb2.JobOffer:
    more = {"spec": QUICK, "run_id": f"{job_id}-{attempt}", "lease_seconds": 30.0} | more
    return job_pb2.JobOffer(job_id=job_id, attempt=attempt, model=model, **more)


@pytest.fixture
async def collector(listen: Callable[..., Any]) -> Collector:
    made = Collector()
    made.address = await listen(
        made,
        collector_pb2_grpc.add_CollectorServiceServicer_to_server,
        job_pb2_grpc.add_JobServiceServicer_to_server,
    )
    return made


@pytest.fixture
def agent(
    tmp_path: Path, collector: Collector, fake_engine: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs an agent that nobody can reach, in this process."""
    monkeypatch.setattr("boardbench.agent.fetch._FIRST_RETRY_SECONDS", 0.02)
    quick = Pace(first_retry_seconds=0.02, longest_retry_seconds=0.1)
    monkeypatch.setattr("boardbench.agent.stream.Pace", lambda: quick)

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[None]:
        config = AgentConfig(
            listen="",
            collector=collector.address,
            data_dir=tmp_path / "data",
            device_id="board-1",
            **settings,
        )
        stop = asyncio.Event()
        task = asyncio.ensure_future(serve(config, stop=stop))
        try:
            yield
            assert not task.done(), task.result()
        finally:
            stop.set()
            await task

    return start


async def test_a_board_that_nobody_can_reach_takes_a_job(
    agent: Any, collector: Collector, until: Until
) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        hello = collector.hellos[0]
        assert hello.takes_jobs
        assert not hello.address
        assert len(hello.instance_id) == 32
        assert len(hello.life_id) == 32
        assert hello.sent_at.seconds > 1_700_000_000
        collector.say(offer=offer(collector.model()))
        await until(lambda: collector.results)
        result = collector.results[0]
        assert (result.run_id, result.status) == ("job-1-1", result_pb2.RUN_STATUS_SUCCEEDED)
        phases = [report.phase for report in collector.reported("job-1")]
        assert phases[0] in (job_pb2.JOB_PHASE_ACCEPTED, job_pb2.JOB_PHASE_FETCHING)
        assert job_pb2.JOB_PHASE_RUNNING in phases
        assert {report.attempt for report in collector.reported("job-1")} == {1}
        await until(lambda: not collector.heartbeats[-1].job_ids, "the job is let go")
        assert collector.heartbeats[-1].spool_pending == 0
        assert collector.heartbeats[-1].HasField("spool_bytes")
        assert collector.heartbeats[-1].sent_at.seconds > 1_700_000_000


async def test_the_same_offer_again_starts_nothing_twice(
    agent: Any, collector: Collector, until: Until
) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        job = offer(collector.model(create=[{"sleep_seconds": 0.5}]))
        for _ in range(3):
            collector.say(offer=job)
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_RUNNING)
        collector.cut()
        await until(lambda: len(collector.hellos) > 1)
        collector.say(offer=job)
        await until(lambda: collector.results)
        await until(lambda: collector.heartbeats and not collector.heartbeats[-1].job_ids)
        assert [result.run_id for result in collector.results] == ["job-1-1"]
        assert list(collector.fetches.values()) == [[0]]


async def test_a_job_is_named_until_its_result_is_acknowledged(
    agent: Any, collector: Collector, until: Until
) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        collector.silent = True
        collector.say(offer=offer(collector.model()))
        await until(lambda: collector.heartbeats and collector.heartbeats[-1].spool_pending)
        before = len(collector.heartbeats)
        await until(lambda: len(collector.heartbeats) > before + 3)
        assert all(list(beat.job_ids) == ["job-1"] for beat in collector.heartbeats[before:])
        collector.silent = False
        collector.cut()
        await until(lambda: not collector.heartbeats[-1].job_ids)
        assert len(collector.results) == 1


async def test_a_broken_fetch_goes_on_where_it_stopped(
    agent: Any, collector: Collector, until: Until
) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        model = collector.model(size_bytes=10 * CHUNK)
        collector.breaks_at = 5 * CHUNK
        collector.say(offer=offer(model))
        await until(lambda: collector.results)
        first, second = collector.fetches[model.sha256]
        assert (first, second) == (0, 5 * CHUNK)


async def test_inputs_are_fetched_too_and_files_only_once(
    agent: Any, collector: Collector, until: Until
) -> None:
    import io

    import numpy

    held = io.BytesIO()
    numpy.savez(held, x=numpy.zeros(4, dtype=numpy.float32))
    async with agent():
        await until(lambda: collector.hellos)
        model = collector.model(inputs=[{"name": "x", "dtype": "float32", "shape": [4]}])
        inputs = collector.file(held.getvalue(), "in.npz")
        spec = result_pb2.BenchmarkSpec()
        spec.CopyFrom(QUICK)
        spec.inputs_sha256 = inputs.sha256
        for number in (1, 2):
            collector.say(offer=offer(model, f"job-{number}", spec=spec, inputs=inputs))
            await until(lambda number=number: len(collector.results) == number)
        assert {sha256: len(offsets) for sha256, offsets in collector.fetches.items()} == {
            model.sha256: 1,
            inputs.sha256: 1,
        }


@pytest.mark.parametrize(
    ("change", "phase", "words"),
    [
        ({"spec": result_pb2.BenchmarkSpec(threads=5000)}, "REFUSED", "threads"),
        ({"spec": result_pb2.BenchmarkSpec(runtime="tensorrt")}, "REFUSED", "tensorrt"),
        ({"run_id": "../../etc/passwd"}, "REFUSED", "can't be the id of a run"),
    ],
)
async def test_what_the_board_can_never_run_is_refused(
    agent: Any, collector: Collector, until: Until, change: dict[str, Any], phase: str, words: str
) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        model = collector.model()
        model.format = "fake"
        collector.say(offer=offer(model, **change))
        await until(lambda: collector.last("job-1") == job_pb2.JobPhase.Value(f"JOB_PHASE_{phase}"))
        assert words in collector.reported("job-1")[-1].reason
        await until(lambda: collector.heartbeats)
        before = len(collector.heartbeats)
        await until(lambda: len(collector.heartbeats) > before + 1)
        assert not collector.heartbeats[-1].job_ids
        # Its files were not even asked for.
        assert not collector.fetches


async def test_a_model_that_is_none_is_refused(agent: Any, collector: Collector, until: Until) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        collector.say(offer=offer(collector.file(b"no model at all", "m.tflite")))
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_REFUSED)
        assert "m.tflite" in collector.reported("job-1")[-1].reason


async def test_what_does_not_fit_is_given_back(agent: Any, collector: Collector, until: Until) -> None:
    async with agent(store=StoreConfig(limit_bytes=100, free_floor_bytes=1)):
        await until(lambda: collector.hellos)
        collector.say(offer=offer(collector.model(size_bytes=1000)))
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_RETURNED)
        assert "store.limit_bytes" in collector.reported("job-1")[-1].reason


async def test_a_file_that_comes_damaged_again_and_again_is_given_back(
    agent: Any, collector: Collector, until: Until
) -> None:
    collector.damages = True
    async with agent():
        await until(lambda: collector.hellos)
        model = collector.model()
        collector.say(offer=offer(model))
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_RETURNED)
        assert len(collector.fetches[model.sha256]) == 3


async def test_a_file_that_the_collector_lacks_is_given_back(
    agent: Any, collector: Collector, until: Until
) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        model = collector.model()
        del collector.files[model.sha256]
        collector.say(offer=offer(model))
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_RETURNED)
        assert "no such file" in collector.reported("job-1")[-1].reason


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"jobs": JobsConfig(take=False)}, "jobs.take"),
        ({"jobs": JobsConfig(open_limit=1)}, "jobs.open_limit"),
        ({"runs": RunsConfig(waiting_limit=0)}, "wait already"),
    ],
)
async def test_what_the_board_does_not_take_now_is_given_back(
    agent: Any, collector: Collector, until: Until, settings: dict[str, Any], words: str
) -> None:
    async with agent(**settings):
        await until(lambda: collector.hellos)
        assert collector.hellos[0].takes_jobs == settings.get("jobs", JobsConfig()).take
        model = collector.model(create=[{"hang": True}])
        if "open_limit" in words:
            collector.say(offer=offer(model, "job-0"))
            await until(lambda: collector.last("job-0") == job_pb2.JOB_PHASE_RUNNING)
        collector.say(offer=offer(model))
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_RETURNED)
        assert words in collector.reported("job-1")[-1].reason


async def test_a_job_whose_result_was_acknowledged_takes_no_place(
    agent: Any, collector: Collector, until: Until
) -> None:
    """The collector gives the next one at once, and the board names this one up to the next heartbeat."""
    collector.heartbeat_seconds = 3600.0
    async with agent(jobs=JobsConfig(open_limit=1)):
        await until(lambda: collector.hellos)
        for number in range(1, 4):
            collector.say(offer=offer(collector.model(), f"job-{number}"))
            await until(lambda number=number: len(collector.results) == number)
    assert {report.phase for report in collector.reports} & {job_pb2.JOB_PHASE_RETURNED} == set()


async def test_a_withdrawn_job_is_cancelled_where_it_is(
    agent: Any, collector: Collector, until: Until
) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        hanging = collector.model(create=[{"hang": True}])
        collector.say(offer=offer(hanging, "runs"))
        await until(lambda: collector.last("runs") == job_pb2.JOB_PHASE_RUNNING)
        collector.say(offer=offer(hanging, "waits"))
        await until(lambda: collector.last("waits") == job_pb2.JOB_PHASE_WAITING)
        collector.holds = asyncio.Event()
        collector.say(offer=offer(collector.model(), "fetches"))
        await until(lambda: collector.last("fetches") == job_pb2.JOB_PHASE_FETCHING)
        for job_id in ("runs", "waits", "fetches", "unknown"):
            withdrawal = job_pb2.JobWithdrawal(job_id=job_id, attempt=1, reason="enough")
            collector.say(withdrawal=withdrawal)
        await until(lambda: len(collector.results) == 2)
        assert {result.run_id for result in collector.results} == {"runs-1", "waits-1"}
        assert {result.status for result in collector.results} == {result_pb2.RUN_STATUS_CANCELLED}
        for job_id, words in (("fetches", "enough"), ("unknown", "does not have it")):
            await until(lambda job_id=job_id: collector.last(job_id) == job_pb2.JOB_PHASE_RETURNED)
            assert words in collector.reported(job_id)[-1].reason
        await until(lambda: not collector.heartbeats[-1].job_ids)


async def told(collector: Collector, until: Until) -> None:
    """The agent has taken in everything that was said before."""
    marker = f"marker-{os.urandom(4).hex()}"
    collector.say(withdrawal=job_pb2.JobWithdrawal(job_id=marker, attempt=1))
    await until(lambda: collector.last(marker) == job_pb2.JOB_PHASE_RETURNED)


async def test_a_job_that_is_withdrawn_while_it_is_given_back_is_given_back(
    agent: Any, collector: Collector, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes a while to forget it: a job that was not answered would stay on the board for ever."""
    begun, may_go = asyncio.Event(), asyncio.Event()
    forget = Jobs._forget

    async def slowly(self: Jobs, run_id: str) -> None:
        begun.set()
        await may_go.wait()
        await forget(self, run_id)

    monkeypatch.setattr(Jobs, "_forget", slowly)
    async with agent():
        await until(lambda: collector.hellos)
        model = collector.model()
        collector.files.clear()
        collector.say(offer=offer(model))
        await until(begun.is_set)
        collector.say(withdrawal=job_pb2.JobWithdrawal(job_id="job-1", attempt=1, reason="enough"))
        await told(collector, until)
        may_go.set()
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_RETURNED)
        assert "no such file" in collector.reported("job-1")[-1].reason
        beats = len(collector.heartbeats)
        await until(lambda: len(collector.heartbeats) > beats + 1)
        assert not collector.heartbeats[-1].job_ids


async def test_a_job_that_is_withdrawn_while_it_is_written_down_leaves_nothing(
    agent: Any, collector: Collector, until: Until, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written after it was forgotten it would be measured by the next life of the agent."""
    begun, may_go, written = threading.Event(), threading.Event(), threading.Event()
    replace = folder.replace

    def slowly(path: Path, *arguments: Any) -> None:
        ours = path.suffix == ".offer"
        if ours:
            begun.set()
            assert may_go.wait(30)
        replace(path, *arguments)
        if ours:
            written.set()

    monkeypatch.setattr(folder, "replace", slowly)
    async with agent():
        await until(lambda: collector.hellos)
        collector.say(offer=offer(collector.model()))
        await until(begun.is_set)
        collector.say(withdrawal=job_pb2.JobWithdrawal(job_id="job-1", attempt=1, reason="enough"))
        await told(collector, until)
        may_go.set()
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_RETURNED)
        await until(written.is_set)
        assert list((tmp_path / "data" / "jobs").iterdir()) == []


async def test_what_a_kill_left_half_written_goes(
    agent: Any, collector: Collector, until: Until, tmp_path: Path
) -> None:
    torn = tmp_path / "data" / "jobs" / "job-1-1.offer.tmp"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"half")
    async with agent():
        await until(lambda: collector.hellos)
        assert not torn.exists()


async def test_a_later_attempt_of_a_job_that_is_here_is_not_begun(
    agent: Any, collector: Collector, until: Until
) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        model = collector.model(create=[{"sleep_seconds": 1.0}])
        collector.say(offer=offer(model))
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_RUNNING)
        collector.say(offer=offer(model, attempt=2))
        await until(lambda: collector.reported("job-1")[-1].attempt == 2)
        await until(lambda: collector.results)
        await until(lambda: not collector.heartbeats[-1].job_ids)
        assert [result.run_id for result in collector.results] == ["job-1-1"]


async def test_a_later_attempt_is_begun_when_the_earlier_one_fails(
    agent: Any, collector: Collector, until: Until
) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        failing = collector.model(create=[{"sleep_seconds": 0.5}, {"reject": "no"}])
        collector.say(offer=offer(failing))
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_RUNNING)
        collector.say(offer=offer(failing, attempt=2))
        await until(lambda: len(collector.results) == 2)
        assert [result.run_id for result in collector.results] == ["job-1-1", "job-1-2"]


async def test_a_later_attempt_is_begun_though_the_board_still_names_the_failed_one(
    agent: Any, collector: Collector, until: Until
) -> None:
    """The collector tries again after seconds; the job stays on the board up to the next heartbeat."""
    collector.heartbeat_seconds = 3600.0
    async with agent():
        await until(lambda: collector.hellos)
        failing = collector.model(create=[{"reject": "no"}])
        collector.say(offer=offer(failing))
        await until(lambda: len(collector.results) == 1)
        collector.say(offer=offer(failing, attempt=2))
        await until(lambda: len(collector.results) == 2)
        assert [result.run_id for result in collector.results] == ["job-1-1", "job-1-2"]


async def test_a_restart_goes_on_with_what_was_offered(
    agent: Any, collector: Collector, until: Until
) -> None:
    collector.holds = asyncio.Event()
    async with agent():
        await until(lambda: collector.hellos)
        collector.say(offer=offer(collector.model()))
        await until(lambda: collector.last("job-1") == job_pb2.JOB_PHASE_FETCHING)
    collector.holds.set()
    collector.reports.clear()
    async with agent():
        await until(lambda: collector.results)
        assert [result.run_id for result in collector.results] == ["job-1-1"]
        first, second = (hello for hello in collector.hellos[:2])
        assert first.instance_id == second.instance_id
        assert first.life_id != second.life_id


async def test_an_agent_that_is_killed_while_it_fetches_goes_on_with_what_it_has(
    collector: Collector, tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed life loses what came of the last block at most; the offer is not forgotten."""

    def start() -> subprocess.Popen[bytes]:
        program = [sys.executable, "-m", "boardbench.agent", "serve", "--listen", "", "--device-id", "b"]
        program += ["--collector", collector.address, "--data-dir", str(tmp_path / "data")]
        return subprocess.Popen(program, env=os.environ | {"BOARDBENCH_FAKE_RUNTIME": "1"})

    monkeypatch.setattr(f"{__name__}.CHUNK", 100_000)
    model = collector.model(size_bytes=4 << 20)
    process = start()
    try:
        await until(lambda: collector.hellos)
        collector.stops_at = 3_500_000
        collector.say(offer=offer(model))
        await until(lambda: collector.stopped)
        arriving = tmp_path / "data/models/arriving" / f"{model.sha256}.part"
        await until(lambda: arriving.exists() and arriving.stat().st_size >= 3_000_000)
        process.kill()
        process.wait()
        collector.stops_at = None
        process = start()
        await until(lambda: collector.results)
    finally:
        process.terminate()
        assert process.wait(30) is not None
    assert [result.run_id for result in collector.results] == ["job-1-1"]
    first, second = collector.fetches[model.sha256]
    assert first == 0
    assert second >= 2 << 20


async def test_a_collector_that_lost_a_result_gets_it_by_offering_the_run_again(
    agent: Any, collector: Collector, until: Until
) -> None:
    async with agent():
        await until(lambda: collector.hellos)
        job = offer(collector.model())
        collector.say(offer=job)
        await until(lambda: collector.results)
        await until(lambda: not collector.heartbeats[-1].job_ids)
        collector.results.clear()
        collector.say(offer=job)
        await until(lambda: collector.results)
        assert [result.run_id for result in collector.results] == ["job-1-1"]
