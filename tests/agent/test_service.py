"""The gRPC face over a real server on the loopback, with real children behind it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from boardbench.agent import errors, service
from boardbench.agent.config import AgentConfig, DeadlinesConfig, RunsConfig, RuntimeConfig, StoreConfig
from boardbench.agent.serve import serve
from boardbench.v1 import agent_pb2, agent_pb2_grpc, board_pb2, model_pb2, result_pb2

QUICK = result_pb2.BenchmarkSpec(duration_seconds=0.0, min_runs=3, warm_up_seconds=0.0, warm_up_runs=1)
HANG: dict[str, Any] = {"create": [{"hang": True}]}

Watch = grpc.aio.UnaryStreamCall


class Client:
    """A client of one agent, in the terms of the wire."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.aio.insecure_channel(address)
        self.stub = agent_pb2_grpc.AgentServiceStub(self.channel)

    async def push(
        self, content: bytes, name: str = "m.fake", kind: Any = agent_pb2.FILE_KIND_MODEL
    ) -> agent_pb2.PushDone:
        header = agent_pb2.PushHeader(
            sha256=hashlib.sha256(content).hexdigest(), name=name, size_bytes=len(content), kind=kind
        )
        call = self.stub.PushModel()
        await call.write(agent_pb2.PushModelRequest(header=header))
        answer = await call.read()
        if answer is not grpc.aio.EOF and answer.HasField("resume"):
            offset = answer.resume.offset_bytes
            chunk = agent_pb2.PushChunk(
                offset_bytes=offset, data=content[offset:], crc32=zlib.crc32(content[offset:])
            )
            await call.write(agent_pb2.PushModelRequest(chunk=chunk))
            answer = await call.read()
        if answer is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                await call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), await call.details()
            )
        await call.done_writing()
        return answer.done

    async def model(self, **content: Any) -> str:
        """Pushes a model of the fake engine; its digest. Each one is another."""
        content["producer"] = os.urandom(4).hex()
        done = await self.push(b"boardbench-fake/1\n" + json.dumps(content).encode())
        return done.model.sha256

    def run(self, sha256: str, spec: result_pb2.BenchmarkSpec = QUICK, run_id: str = "") -> Watch:
        return self.stub.RunBenchmark(
            agent_pb2.RunBenchmarkRequest(model_sha256=sha256, spec=spec, run_id=run_id)
        )

    def watch(self, run_id: str, after: int = 0) -> Watch:
        return self.stub.WatchRun(agent_pb2.WatchRunRequest(run_id=run_id, after_sequence=after))

    async def result(self, sha256: str, **arguments: Any) -> result_pb2.RunResult:
        return (await events(self.run(sha256, **arguments)))[-1].result

    async def describe(self) -> agent_pb2.DescribeResponse:
        return await self.stub.Describe(agent_pb2.DescribeRequest())

    async def runs(self) -> list[agent_pb2.RunSummary]:
        return list((await self.stub.ListRuns(agent_pb2.ListRunsRequest())).runs)

    async def cancel(self, run_id: str) -> bool:
        return (await self.stub.CancelRun(agent_pb2.CancelRunRequest(run_id=run_id))).cancelled


async def events(call: Watch) -> list[agent_pb2.RunEvent]:
    return [answer.event async for answer in call]


async def first(call: Watch, kind: str, **fields: Any) -> agent_pb2.RunEvent:
    """The first event of that kind with these fields; what comes before it is read."""
    async for answer in call:
        event = answer.event
        if event.WhichOneof("event") == kind:
            content = getattr(event, kind)
            if all(getattr(content, name) == value for name, value in fields.items()):
                return event
    raise AssertionError(f"the run ended without {kind} {fields}")


async def reached(call: Watch, stage: str) -> agent_pb2.RunEvent:
    return await first(call, "stage", stage=result_pb2.Stage.Value("STAGE_" + stage))


@contextlib.asynccontextmanager
async def serving(config: AgentConfig) -> AsyncIterator[Client]:
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, ready=address.set_result, stop=stop))
    await asyncio.wait([address, task], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    client = Client(await address)
    try:
        yield client
    finally:
        await client.channel.close()
        stop.set()
        await task


@pytest.fixture
def settings(tmp_path: Path, fake_engine: None) -> dict[str, Any]:
    return {
        "listen": "127.0.0.1:0",
        "data_dir": tmp_path / "data",
        "device_id": "it",
        "store": StoreConfig(limit_bytes=1_000_000, free_floor_bytes=0),
    }


@pytest.fixture
async def agent(settings: dict[str, Any]) -> AsyncIterator[Client]:
    async with serving(AgentConfig(**settings)) as client:
        yield client


def refused(raised: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> tuple[grpc.StatusCode, str]:
    return raised.value.code(), raised.value.details() or ""


# --- what it is


async def test_describe(agent: Client, settings: dict[str, Any]) -> None:
    found = await agent.describe()
    assert found.board.device_id == "it"
    assert found.board.cpu_count == os.cpu_count()
    fake = {status.name: status for status in found.runtimes}["fake"]
    assert (fake.available, list(fake.devices), list(fake.formats)) == (True, ["cpu", "faketpu"], ["fake"])
    assert fake.interpreter.path
    assert found.agent_version
    assert found.started_at.seconds > 0
    assert (found.running_run_id, found.queued_runs) == ("", 0)
    assert found.model_store.limit_bytes == 1_000_000
    assert len(found.spool.spool_id) == 32
    assert found.collector == agent_pb2.CollectorLinkStatus()


async def test_collector_that_is_not_there_is_told(settings: dict[str, Any], until: Any) -> None:
    async with serving(AgentConfig(**settings, collector="127.0.0.1:1")) as agent:
        found = agent_pb2.DescribeResponse()
        while "refused" not in found.collector.error:
            found = await agent.describe()
            await asyncio.sleep(0.02)
        assert (found.collector.address, found.collector.connected) == ("127.0.0.1:1", False)


async def test_engine_that_crashes_when_imported_is_told_and_the_others_are_there(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOARDBENCH_FAKE_IMPORT", '[{"signal": "SIGSEGV"}]')
    async with serving(AgentConfig(**settings)) as agent:
        found = {status.name: status for status in (await agent.describe()).runtimes}
        assert not found["fake"].available
        assert "SIGSEGV" in found["fake"].reason
        assert list(found["fake"].formats) == ["fake"]
        assert found["tflite"].available or "pip install" in found["tflite"].reason


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
async def test_foreign_interpreter_that_does_not_work_is_told(settings: dict[str, Any], python: str) -> None:
    async with serving(AgentConfig(**settings, runtimes={"fake": RuntimeConfig(python)})) as agent:
        found = {status.name: status for status in (await agent.describe()).runtimes}
        assert not found["fake"].available
        assert python in found["fake"].reason
        assert found["fake"].interpreter.path == python
        assert found["tflite"].interpreter.path != python


async def test_foreign_interpreter_is_used(settings: dict[str, Any], tmp_path: Path) -> None:
    import sys

    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    # Through a link Python does not find its virtual environment: it stands for another installation.
    (tmp_path / "pyvenv.cfg").write_text(
        (Path(sys.prefix) / "pyvenv.cfg").read_text() if (Path(sys.prefix) / "pyvenv.cfg").exists() else ""
    )
    async with serving(AgentConfig(**settings, runtimes={"fake": RuntimeConfig(str(link))})) as agent:
        status = {status.name: status for status in (await agent.describe()).runtimes}["fake"]
        if not status.available:
            # It has no NumPy of its own: that is what is told, and by whom.
            assert str(link) in status.interpreter.path
            assert status.reason
            return
        result = await agent.result(await agent.model())
        assert result.runtime.interpreter.path == str(link)


def test_unknown_runtime_in_the_configuration_is_an_error(settings: dict[str, Any]) -> None:
    async def start() -> None:
        async with serving(AgentConfig(**settings, runtimes={"tensorflow": RuntimeConfig()})):
            pass

    with pytest.raises(errors.ConfigurationError, match=r"runtimes\.tensorflow.*boardbench knows tflite"):
        asyncio.run(start())


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        (None, ["boardbench has no runtime 'tensorflow'", "tflite", "boardbench.runtimes", "[runtimes.tens"]),
        ("/x", ["/x can't be started: No such file", "[runtimes]"]),
        ("bin/python", ["bin/python is no full path", "[runtimes]"]),
        ("/usr", ["/usr is a folder", "bin/python"]),
        ("/bin/echo", ["/bin/echo is no Python", "exits with 0", "[runtimes]"]),
    ],
)
async def test_runtime_that_an_interpreter_does_not_offer_is_told(
    settings: dict[str, Any], python: str | None, reason: list[str]
) -> None:
    """It may be one from elsewhere, so that only the interpreter can tell."""
    runtimes = {"tensorflow": RuntimeConfig(python or sys.executable)}
    async with serving(AgentConfig(**settings, runtimes=runtimes)) as agent:
        found = {status.name: status for status in (await agent.describe()).runtimes}
        assert not found["tensorflow"].available
        missing = [part for part in reason if part not in found["tensorflow"].reason]
        assert not missing, found["tensorflow"].reason
        assert found["fake"].available


async def test_stranger_finds_the_way(agent: Client) -> None:
    """Health checking and reflection, as grpcurl uses them."""
    health = health_pb2_grpc.HealthStub(agent.channel)
    for name in ("", "boardbench.v1.AgentService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call = reflection_pb2_grpc.ServerReflectionStub(agent.channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {entry.name for entry in (await call.read()).list_services_response.service}
    assert {"boardbench.v1.AgentService", "grpc.health.v1.Health"} <= names
    await call.write(
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="boardbench.v1.AgentService")
    )
    assert (await call.read()).file_descriptor_response.file_descriptor_proto
    await call.done_writing()


# --- models


async def test_push_list_delete(agent: Client) -> None:
    content = b"boardbench-fake/1\n{}"
    done = await agent.push(content, "mine.fake")
    assert not done.already_present
    assert done.model == model_pb2.Model(
        sha256=hashlib.sha256(content).hexdigest(), name="mine.fake", format="fake", size_bytes=len(content)
    )
    assert (await agent.push(content, "mine.fake")).already_present
    (stored,) = (await agent.stub.ListModels(agent_pb2.ListModelsRequest())).models
    assert stored.model == done.model
    assert (stored.kind, stored.in_use) == (agent_pb2.FILE_KIND_MODEL, False)
    assert (await agent.describe()).model_store.files == 1
    await agent.stub.DeleteModel(agent_pb2.DeleteModelRequest(sha256=done.model.sha256))
    assert not (await agent.stub.ListModels(agent_pb2.ListModelsRequest())).models


async def test_model_in_use_is_not_deleted(agent: Client) -> None:
    sha256 = await agent.model(**HANG)
    call = agent.run(sha256)
    event = await reached(call, "CREATE")
    (stored,) = (await agent.stub.ListModels(agent_pb2.ListModelsRequest())).models
    assert stored.in_use
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await agent.stub.DeleteModel(agent_pb2.DeleteModelRequest(sha256=sha256))
    assert refused(raised)[0] == grpc.StatusCode.FAILED_PRECONDITION
    await agent.cancel(event.run_id)
    await agent.stub.DeleteModel(agent_pb2.DeleteModelRequest(sha256=sha256))


def header(**fields: Any) -> agent_pb2.PushModelRequest:
    known = {"sha256": "0" * 64, "name": "m.fake", "size_bytes": 10}
    return agent_pb2.PushModelRequest(header=agent_pb2.PushHeader(**(known | fields)))


def chunk(
    offset: int = 0, data: bytes = b"0123456789", crc32: int | None = None
) -> agent_pb2.PushModelRequest:
    crc32 = zlib.crc32(data) if crc32 is None else crc32
    return agent_pb2.PushModelRequest(chunk=agent_pb2.PushChunk(offset_bytes=offset, data=data, crc32=crc32))


@pytest.mark.parametrize(
    ("requests", "code", "words"),
    [
        ([], grpc.StatusCode.INVALID_ARGUMENT, "header"),
        ([chunk()], grpc.StatusCode.INVALID_ARGUMENT, "header"),
        ([header(sha256="xyz")], grpc.StatusCode.INVALID_ARGUMENT, "64 hexadecimal"),
        ([header(size_bytes=0)], grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        ([header(kind=9)], grpc.StatusCode.INVALID_ARGUMENT, "kind 9"),
        ([header(size_bytes=10**12)], grpc.StatusCode.RESOURCE_EXHAUSTED, "may hold"),
        ([header(), header()], grpc.StatusCode.INVALID_ARGUMENT, "chunks only"),
        ([header(), chunk(offset=3)], grpc.StatusCode.INVALID_ARGUMENT, "byte 3"),
        ([header(), chunk(crc32=1)], grpc.StatusCode.DATA_LOSS, "CRC"),
        ([header(), chunk()], grpc.StatusCode.DATA_LOSS, "sha256"),
        ([header(), chunk(data=b"01")], grpc.StatusCode.INVALID_ARGUMENT, "2 of 10"),
        (
            [header(size_bytes=900_000), chunk(data=b"x" * 3_000_000)],
            grpc.StatusCode.INVALID_ARGUMENT,
            "chunk",
        ),
    ],
)
async def test_bad_push_is_refused(
    agent: Client, requests: list[agent_pb2.PushModelRequest], code: grpc.StatusCode, words: str
) -> None:
    call = agent.stub.PushModel()
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for request in requests:
            await call.write(request)
        await call.done_writing()
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    assert await call.code() == code
    assert words in (await call.details() or "")
    assert (await agent.describe()).model_store.files == 0


# --- runs


async def test_run_from_queue_to_result(agent: Client) -> None:
    found = await events(agent.run(await agent.model()))
    kinds = [event.WhichOneof("event") for event in found]
    assert kinds[0] == "queued"
    assert found[0].queued.runs_ahead == 0
    assert kinds[-1] == "result"
    assert kinds.count("result") == 1
    stages = [event.stage.stage for event in found if event.HasField("stage")]
    assert stages == sorted(set(stages))
    sequences = [event.sequence for event in found]
    assert sequences == sorted(set(sequences))
    assert {event.run_id for event in found} == {found[-1].result.run_id}
    assert found[-1].result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert found[-1].result.latency.count >= 3


async def test_result_is_in_the_spool_before_it_is_told(agent: Client) -> None:
    await agent.result(await agent.model())
    assert (await agent.describe()).spool.pending == 1


async def test_one_at_a_time_and_the_rest_see_how_many_are_before_them(agent: Client) -> None:
    blocker = agent.run(await agent.model(**HANG))
    blocking = await reached(blocker, "CREATE")
    second, third = agent.run(await agent.model()), agent.run(await agent.model())
    waiting = [await first(second, "queued", runs_ahead=1), await first(third, "queued", runs_ahead=2)]
    found = await agent.describe()
    assert (found.running_run_id, found.queued_runs) == (blocking.run_id, 2)
    states = [(run.run_id, run.state) for run in await agent.runs()]
    assert states == [
        (blocking.run_id, agent_pb2.RUN_STATE_RUNNING),
        (waiting[0].run_id, agent_pb2.RUN_STATE_QUEUED),
        (waiting[1].run_id, agent_pb2.RUN_STATE_QUEUED),
    ]
    assert (await agent.runs())[0].stage == result_pb2.STAGE_CREATE
    assert await agent.cancel(blocking.run_id)
    await first(third, "queued", runs_ahead=1)
    await first(second, "result", status=result_pb2.RUN_STATUS_SUCCEEDED)
    await first(third, "result", status=result_pb2.RUN_STATUS_SUCCEEDED)
    ended = await agent.runs()
    assert [run.run_id for run in ended] == [waiting[1].run_id, waiting[0].run_id, blocking.run_id]
    assert [run.status for run in ended] == [
        result_pb2.RUN_STATUS_SUCCEEDED,
        result_pb2.RUN_STATUS_SUCCEEDED,
        result_pb2.RUN_STATUS_CANCELLED,
    ]


async def test_client_that_goes_away_ends_no_run(agent: Client) -> None:
    sha256 = await agent.model(inference=[{"sleep_seconds": 0.01}])
    spec = result_pb2.BenchmarkSpec(duration_seconds=0.5, warm_up_seconds=0.0, warm_up_runs=1)
    call = agent.run(sha256, spec)
    last = await reached(call, "MEASURE")
    call.cancel()
    rest = await events(agent.watch(last.run_id, last.sequence))
    assert rest[0].sequence == last.sequence + 1, "it goes on right behind what was seen"
    assert rest[-1].result.status == result_pb2.RUN_STATUS_SUCCEEDED


async def test_client_that_goes_away_at_once_has_started_a_run(agent: Client, until: Any) -> None:
    sha256 = await agent.model()
    call = agent.run(sha256, run_id="mine")
    await asyncio.sleep(0)
    call.cancel()
    # Whether the agent had taken it or not, asking again under the same id gives one run.
    result = await agent.result(sha256, run_id="mine")
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert [run.run_id for run in await agent.runs()] == ["mine"]


async def test_same_run_again_is_the_same_run(agent: Client) -> None:
    sha256 = await agent.model(**HANG)
    call = agent.run(sha256, run_id="mine")
    await reached(call, "CREATE")
    again = agent.run(sha256, run_id="mine")
    assert (await reached(again, "CREATE")).sequence > 0
    assert len(await agent.runs()) == 1
    await agent.cancel("mine")
    results = [(await events(each))[-1].result for each in (call, again)]
    assert results[0] == results[1]
    # And after its end.
    assert await agent.result(sha256, run_id="mine") == results[0]
    assert len(await agent.runs()) == 1


async def test_other_run_under_the_same_id_is_refused(agent: Client) -> None:
    sha256 = await agent.model()
    await agent.result(sha256, run_id="mine")
    other = result_pb2.BenchmarkSpec(min_runs=4)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await events(agent.run(sha256, other, run_id="mine"))
    assert refused(raised)[0] == grpc.StatusCode.ALREADY_EXISTS


async def test_result_stays_after_the_end(agent: Client) -> None:
    sha256 = await agent.model()
    results = [await agent.result(sha256) for _ in range(3)]
    for result in results:
        (event,) = await events(agent.watch(result.run_id))
        assert event.result == result
        assert await events(agent.watch(result.run_id, event.sequence)) == []


async def test_only_the_latest_results_stay(settings: dict[str, Any], until: Any) -> None:
    async with serving(AgentConfig(**settings, runs=RunsConfig(kept_limit=2))) as agent:
        sha256 = await agent.model()
        results = [await agent.result(sha256) for _ in range(4)]
        folder = settings["data_dir"] / "runs"
        names = {result.run_id for result in results[2:]}
        await until(
            lambda: {path.name.partition(".")[0] for path in folder.iterdir()} == names,
            "the journal has dropped the oldest",
        )
        # The queue forgets them after the journal has.
        deadline = asyncio.get_running_loop().time() + 30.0
        while [run.run_id for run in await agent.runs()] != [results[3].run_id, results[2].run_id]:
            assert asyncio.get_running_loop().time() < deadline
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await events(agent.watch(results[0].run_id))
        assert refused(raised)[0] == grpc.StatusCode.NOT_FOUND


async def test_cancel_while_it_waits(agent: Client) -> None:
    blocking = await reached(agent.run(await agent.model(**HANG)), "CREATE")
    call = agent.run(await agent.model())
    waiting = await first(call, "queued", runs_ahead=1)
    assert await agent.cancel(waiting.run_id)
    (event,) = await events(call)
    assert event.result.status == result_pb2.RUN_STATUS_CANCELLED
    assert not event.result.HasField("started_at")
    assert not await agent.cancel(waiting.run_id)
    assert await agent.cancel(blocking.run_id)


async def test_two_who_cancel_end_it_once(agent: Client) -> None:
    blocking = await reached(agent.run(await agent.model(**HANG)), "CREATE")
    answers = await asyncio.gather(agent.cancel(blocking.run_id), agent.cancel(blocking.run_id))
    assert sorted(answers) == [False, True]


async def test_cancel_kills_at_once_and_waits_for_no_time_to_pass(
    agent: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No grace is given: for the agent, whose loop's clock stands still, not a moment passes meanwhile."""
    blocking = await reached(agent.run(await agent.model(**HANG)), "CREATE")
    signals: list[int] = []
    kill = os.killpg

    def noted(group: int, number: int) -> None:
        signals.append(number)
        kill(group, number)

    monkeypatch.setattr(os, "killpg", noted)
    loop = asyncio.get_running_loop()
    cancelling = asyncio.ensure_future(agent.cancel(blocking.run_id))
    # The loop's own timers do not run out: this one is a thread's.
    deadline = threading.Timer(60.0, loop.call_soon_threadsafe, [cancelling.cancel])
    deadline.start()
    try:
        with monkeypatch.context() as patch:
            now = loop.time()
            patch.setattr(loop, "time", lambda: now)
            assert await cancelling
    finally:
        deadline.cancel()
        deadline.join()
    assert signals[0] == signal.SIGKILL


@pytest.mark.soak
async def test_cancel_takes_less_than_a_second(agent: Client) -> None:
    blocking = await reached(agent.run(await agent.model(**HANG)), "CREATE")
    await asyncio.wait_for(agent.cancel(blocking.run_id), 1.0)


async def test_failed_run_is_a_result_and_the_next_one_works(agent: Client) -> None:
    crashed = await agent.result(await agent.model(create=[{"signal": "SIGSEGV"}]))
    assert (crashed.status, crashed.error.signal) == (result_pb2.RUN_STATUS_FAILED, "SIGSEGV")
    assert (await agent.result(await agent.model())).status == result_pb2.RUN_STATUS_SUCCEEDED
    assert (await agent.describe()).spool.pending == 2


async def test_inputs_are_taken_by_their_digest(agent: Client) -> None:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, x=np.ones((1, 4), np.float32))
    inputs = (await agent.push(buffer.getvalue(), "in.npz", agent_pb2.FILE_KIND_INPUTS)).model.sha256
    spec = result_pb2.BenchmarkSpec(inputs_sha256=inputs)
    spec.MergeFrom(QUICK)
    result = await agent.result(await agent.model(), spec=spec)
    assert result.input_data.source == "file"
    assert result.effective_spec.inputs_sha256 == inputs


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        (
            {"runtime": "tensorflow"},
            grpc.StatusCode.FAILED_PRECONDITION,
            ["'tensorflow'", "boardbench-fake 1"],
        ),
        ({"runtime": "tflite"}, grpc.StatusCode.FAILED_PRECONDITION, ["tflite"]),
        ({"device": "warp"}, grpc.StatusCode.FAILED_PRECONDITION, ["'warp'", "cpu, faketpu"]),
        ({"duration_seconds": -1.0}, grpc.StatusCode.INVALID_ARGUMENT, ["duration_seconds"]),
        ({"inputs_sha256": "1" * 64}, grpc.StatusCode.NOT_FOUND, ["1111"]),
    ],
)
async def test_bad_run_is_refused(
    agent: Client, spec: dict[str, Any], code: grpc.StatusCode, words: list[str]
) -> None:
    sha256 = await agent.model()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await events(agent.run(sha256, result_pb2.BenchmarkSpec(**spec)))
    found, details = refused(raised)
    assert found == code, details
    for word in words:
        assert word in details
    assert await agent.runs() == []
    (stored,) = (await agent.stub.ListModels(agent_pb2.ListModelsRequest())).models
    assert not stored.in_use


@pytest.mark.parametrize(
    ("sha256", "run_id", "code", "words"),
    [
        ("abc", "", grpc.StatusCode.INVALID_ARGUMENT, "model_sha256"),
        ("", "", grpc.StatusCode.INVALID_ARGUMENT, "model_sha256"),
        ("2" * 64, "", grpc.StatusCode.NOT_FOUND, "2222"),
        ("2" * 64, "../../etc/passwd", grpc.StatusCode.INVALID_ARGUMENT, "run_id"),
        ("2" * 64, "x" * 65, grpc.StatusCode.INVALID_ARGUMENT, "run_id"),
    ],
)
async def test_bad_name_is_refused(
    agent: Client, sha256: str, run_id: str, code: grpc.StatusCode, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await events(agent.run(sha256, run_id=run_id))
    assert refused(raised)[0] == code
    assert words in refused(raised)[1]


async def test_run_that_is_not_known(agent: Client) -> None:
    for ask in (agent.cancel, lambda run_id: events(agent.watch(run_id))):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ask("nobody")
        assert refused(raised)[0] == grpc.StatusCode.NOT_FOUND
        assert "nobody" in refused(raised)[1]


async def test_queue_is_bounded(settings: dict[str, Any]) -> None:
    async with serving(AgentConfig(**settings, runs=RunsConfig(waiting_limit=1))) as agent:
        blocking = await reached(agent.run(await agent.model(**HANG)), "CREATE")
        sha256 = await agent.model()
        await first(agent.run(sha256), "queued")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await events(agent.run(sha256))
        assert refused(raised)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        await agent.cancel(blocking.run_id)


async def test_engine_that_came_later_is_found(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal would be out of date: before it is given, the board is asked again."""
    import sys

    monkeypatch.setattr("boardbench.agent.probe._FRESH_SECONDS", 0.0)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    async with serving(AgentConfig(**settings, runtimes={"fake": RuntimeConfig(str(python))})) as agent:
        sha256 = await agent.model()
        assert "fake" not in [status.name for status in (await agent.describe()).runtimes if status.available]
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        assert (await agent.result(sha256)).status == result_pb2.RUN_STATUS_SUCCEEDED


async def test_progress_of_a_long_run_is_thinned(
    settings: dict[str, Any], worker_program: Any, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    body = f"""
        if job["kind"] == "probe":
            status = {{"name": "fake", "available": True, "formats": ["fake"], "devices": ["cpu"]}}
            say({{"event": "probe", "runtimes": [status]}})
            sys.exit()
        stage("MEASURE")
        for number in range(300):
            say({{"event": "progress", "progress": {{"runs": number}}}})
        stage("REPORT")
        while not os.path.exists({str(go_on)!r}):
            time.sleep(0.01)
        say({{"event": "result", "result": RESULT}})
    """
    python = worker_program(body)
    settings["runtimes"] = {"fake": RuntimeConfig(python)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("boardbench.agent.run._LEAST_PROGRESS_SECONDS", 0.0)
        patch.setattr("boardbench.agent.queue._KEPT_PROGRESS", 20)
        async with serving(AgentConfig(**settings)) as agent:
            call = agent.run(await agent.model())
            # Stages are never dropped; what of the progress this watcher still gets is its own affair.
            event = await reached(call, "REPORT")
            late = agent.watch(event.run_id)
            kept = [(await late.read()).event]
            while not (kept[-1].HasField("stage") and kept[-1].stage.stage == result_pb2.STAGE_REPORT):
                kept.append((await late.read()).event)
            go_on.touch()
            await events(call)
            assert [each.sequence for each in kept] == sorted(each.sequence for each in kept)
            assert "STAGE_MEASURE" in [
                result_pb2.Stage.Name(each.stage.stage) for each in kept if each.HasField("stage")
            ]
            numbers = [each.progress.runs for each in kept if each.HasField("progress")]
            assert 10 <= len(numbers) <= 20
            assert numbers[-1] == 299, "the latest is never dropped"
            gaps = [after - before for before, after in itertools.pairwise(numbers)]
            assert gaps == sorted(gaps, reverse=True) and gaps[0] > gaps[-1], "the older, the fewer are kept"


async def test_hang_in_the_probe_does_not_hang_the_agent(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOARDBENCH_FAKE_IMPORT", '[{"hang": true}]')
    settings["deadlines"] = DeadlinesConfig(probe_seconds=3.0)
    async with serving(AgentConfig(**settings)) as agent:
        statuses = {status.name: status for status in (await agent.describe()).runtimes}
        assert "3 s" in statuses["fake"].reason


async def test_fault_of_the_agent_is_told_as_such(agent: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("boardbench.agent.queue.Runs.summaries", broken)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await agent.runs()
    assert refused(raised)[0] == grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError" in refused(raised)[1]
    await agent.describe()


def test_every_error_has_a_status() -> None:
    def leaves(kind: type[errors.AgentError]) -> list[type[errors.AgentError]]:
        inner = kind.__subclasses__()
        return [leaf for each in inner for leaf in leaves(each)] or [kind]

    for leaf in leaves(errors.AgentError):
        assert any(issubclass(leaf, kind) for kind, _ in service._STATUS), leaf


async def test_board_is_looked_at_for_every_run(agent: Client) -> None:
    result = await agent.result(await agent.model())
    board: board_pb2.Board = (await agent.describe()).board
    assert result.board == board
