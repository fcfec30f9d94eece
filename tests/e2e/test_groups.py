"""Runs that are measured together, on a real agent: waiting for each other, cancelling, kill -9."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from boardbench.agent.spool import Spool
from boardbench.v1 import agent_pb2, agent_pb2_grpc, result_pb2

INTERLEAVED = result_pb2.GROUP_MODE_INTERLEAVED
CONCURRENT = result_pb2.GROUP_MODE_CONCURRENT
MODES = pytest.mark.parametrize("mode", [INTERLEAVED, CONCURRENT], ids=["interleaved", "concurrent"])
HANG: dict[str, Any] = {"create": [{"hang": True}]}
SECONDS = 90.0


class Board:
    """An agent process with the fake engine, and a client of it in the terms of the wire."""

    def __init__(self, programs: Any, **settings: object) -> None:
        self._programs = programs
        self._settings = {"BOARDBENCH_FAKE_RUNTIME": "1"} | {
            f"BOARDBENCH_AGENT_{name}": str(value) for name, value in settings.items()
        }
        self._lives = 0
        self.begin()

    def begin(self) -> None:
        """The agent, again on the same data."""
        self._lives += 1
        self.agent = self._programs.agent(
            f"agent-{self._lives}",
            data_dir=self._programs.folder / "board",
            device_id="it",
            environment=self._settings,
        )
        self._channel = grpc.insecure_channel(
            self.agent.address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub = agent_pb2_grpc.AgentServiceStub(self._channel)

    def end(self) -> None:
        self._channel.close()

    def kill(self) -> None:
        """kill -9."""
        self.agent.program.kill()
        self._channel.close()

    def model(self, name: str = "m.fake", **content: Any) -> str:
        content["producer"] = os.urandom(4).hex()
        data = b"boardbench-fake/1\n" + json.dumps(content).encode()
        header = agent_pb2.PushHeader(
            sha256=hashlib.sha256(data).hexdigest(), name=name, size_bytes=len(data)
        )
        chunk = agent_pb2.PushChunk(data=data, crc32=zlib.crc32(data))
        requests = [agent_pb2.PushModelRequest(header=header), agent_pb2.PushModelRequest(chunk=chunk)]
        return str(list(self.stub.PushModel(iter(requests), timeout=SECONDS))[-1].done.model.sha256)

    def run(self, sha256: str, run_id: str, spec: result_pb2.BenchmarkSpec) -> Any:
        request = agent_pb2.RunBenchmarkRequest(model_sha256=sha256, run_id=run_id, spec=spec)
        return self.stub.RunBenchmark(request, timeout=SECONDS)

    def queue(self, sha256: str, run_id: str, spec: result_pb2.BenchmarkSpec) -> agent_pb2.QueuedEvent:
        """Queues a run; what it is told first."""
        event = next(self.run(sha256, run_id, spec)).event
        assert event.WhichOneof("event") == "queued", event
        return event.queued

    def watch(self, run_id: str) -> Iterator[agent_pb2.RunEvent]:
        for answer in self.stub.WatchRun(agent_pb2.WatchRunRequest(run_id=run_id), timeout=SECONDS):
            yield answer.event

    def result(self, run_id: str) -> result_pb2.RunResult:
        return list(self.watch(run_id))[-1].result

    def until_stage(self, run_id: str, stage: str) -> None:
        for event in self.watch(run_id):
            if event.stage.stage == result_pb2.Stage.Value(f"STAGE_{stage}"):
                return
        pytest.fail(f"{run_id} ended before {stage}")

    def cancel(self, run_id: str) -> bool:
        return self.stub.CancelRun(agent_pb2.CancelRunRequest(run_id=run_id), timeout=SECONDS).cancelled

    def runs(self) -> list[agent_pb2.RunSummary]:
        return list(self.stub.ListRuns(agent_pb2.ListRunsRequest(), timeout=SECONDS).runs)

    def spooled(self) -> int:
        return self.stub.Describe(agent_pb2.DescribeRequest(), timeout=SECONDS).spool.pending


@pytest.fixture
def boards(programs: Any) -> Iterator[Callable[..., Board]]:
    made: list[Board] = []

    def make(**settings: object) -> Board:
        made.append(Board(programs, **settings))
        return made[-1]

    yield make
    for board in made:
        board.end()


def spec(**fields: Any) -> result_pb2.BenchmarkSpec:
    given = {"duration_seconds": 0.0, "min_runs": 8, "warm_up_seconds": 0.0, "warm_up_runs": 1} | fields
    return result_pb2.BenchmarkSpec(**given)


def member(
    mode: result_pb2.GroupMode.ValueType = INTERLEAVED, name: str = "g", size: int = 2, **fields: Any
) -> result_pb2.BenchmarkSpec:
    given = {"processes": 2} | fields
    return spec(group=result_pb2.RunGroup(id=name, size=size, mode=mode), **given)


def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    return raised.value.code(), raised.value.details()


# --- waiting for each other


@MODES
def test_group_begins_when_all_are_there_and_others_go_before(
    boards: Callable[..., Board], mode: result_pb2.GroupMode.ValueType
) -> None:
    board = boards()
    model = board.model()
    waiting = board.queue(model, "a", member(mode))
    assert not waiting.HasField("runs_ahead"), "nobody knows how long"
    between = list(board.run(model, "between", spec()))[-1].event.result
    assert between.status == result_pb2.RUN_STATUS_SUCCEEDED
    states = {run.run_id: run.state for run in board.runs()}
    assert states == {"a": agent_pb2.RUN_STATE_QUEUED, "between": agent_pb2.RUN_STATE_ENDED}
    assert board.queue(model, "b", member(mode)).runs_ahead == 0
    for name, other in (("a", "b"), ("b", "a")):
        result = board.result(name)
        assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error
        assert result.spec.group.id == "g"
        if mode == INTERLEAVED:
            assert [each.run_id for each in result.comparisons] == [other]
        else:
            assert list(result.interference.run_ids) == [other]
    assert board.spooled() == 3


def test_group_has_the_place_of_its_last(boards: Callable[..., Board]) -> None:
    board = boards()
    hangs = board.model(**HANG)
    board.queue(hangs, "now", spec())
    board.until_stage("now", "CREATE")
    model = board.model()
    assert not board.queue(model, "a", member()).HasField("runs_ahead")
    assert board.queue(model, "between", spec()).runs_ahead == 1
    assert board.queue(model, "b", member()).runs_ahead == 2
    ahead = [event.queued.runs_ahead for event in itertools.islice(board.watch("a"), 2)]
    assert ahead[-1] == 2, "told as soon as it is known"
    assert board.queue(model, "after", spec()).runs_ahead == 4
    board.cancel("now")
    ends = [board.result(name).finished_at.ToNanoseconds() for name in ("between", "a", "after")]
    assert ends == sorted(ends)
    assert board.result("b").finished_at.ToNanoseconds() < ends[-1]


def test_group_that_stays_incomplete_fails(boards: Callable[..., Board]) -> None:
    board = boards(RUNS_GROUP_SECONDS=2)
    model = board.model()
    for name in ("a", "b"):
        board.queue(model, name, member(size=4))
    for name in ("a", "b"):
        result = board.result(name)
        assert (result.status, result.error.code) == (result_pb2.RUN_STATUS_FAILED, "group_incomplete")
        assert "2 of the 4 runs of the group g did not come within 2 s" in result.error.message
    code, said = refused(board.run(model, "c", member(size=4)))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "the group g has begun or ended" in said
    assert board.spooled() == 2


def test_what_does_not_fit_into_a_group_is_refused(boards: Callable[..., Board]) -> None:
    board = boards()
    model = board.model()
    board.queue(model, "a", member(size=3))
    for asked, words in (
        (member(size=2), ["group.size is 2 here and 3 in run a"]),
        (member(CONCURRENT, size=3), ["group.mode is 2 here and 1 in run a"]),
        (member(size=3, processes=5), ["processes is 5 here and 2 in run a"]),
        (member(size=1), ["group.size is 1"]),
    ):
        code, said = refused(board.run(model, "b", asked))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        for word in words:
            assert word in said
    # A repeat after a broken connection is no second run.
    assert not board.queue(model, "a", member(size=3)).HasField("runs_ahead")
    hangs = board.model(**HANG)
    board.queue(hangs, "b", member(size=3))
    board.queue(hangs, "c", member(size=3))
    code, said = refused(board.run(model, "d", member(size=3)))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "the group g" in said


# --- cancelling


def test_waiting_run_of_an_interleaved_group_is_cancelled_by_itself(boards: Callable[..., Board]) -> None:
    board = boards()
    model = board.model()
    board.queue(model, "a", member(size=3))
    assert board.cancel("a")
    board.queue(model, "b", member(size=3))
    board.queue(model, "c", member(size=3))
    assert board.result("a").status == result_pb2.RUN_STATUS_CANCELLED
    for name, other in (("b", "c"), ("c", "b")):
        result = board.result(name)
        assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error
        assert [each.run_id for each in result.comparisons] == [other]


def test_waiting_run_of_a_concurrent_group_ends_it(boards: Callable[..., Board]) -> None:
    board = boards()
    model = board.model()
    board.queue(model, "a", member(CONCURRENT, size=3))
    board.queue(model, "b", member(CONCURRENT, size=3))
    assert board.cancel("b")
    assert board.result("b").status == result_pb2.RUN_STATUS_CANCELLED
    assert board.result("a").error.code == "group_ended"
    code, _ = refused(board.run(model, "c", member(CONCURRENT, size=3)))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert board.spooled() == 2


def test_running_interleaved_run_is_cancelled_by_itself(boards: Callable[..., Board]) -> None:
    board = boards()
    board.queue(board.model(**HANG), "hangs", member())
    board.queue(board.model(), "works", member())
    board.until_stage("hangs", "CREATE")
    running = [run for run in board.runs() if run.state == agent_pb2.RUN_STATE_RUNNING]
    assert {run.run_id for run in running} == {"hangs", "works"}
    assert board.cancel("hangs")
    assert board.result("hangs").status == result_pb2.RUN_STATUS_CANCELLED
    result = board.result("works")
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error
    assert len(result.processes.processes) == 2
    assert not result.comparisons


def test_running_concurrent_run_ends_the_group(boards: Callable[..., Board]) -> None:
    board = boards()
    model = board.model(inference=[{"sleep_seconds": 0.01}])
    asked = member(CONCURRENT, processes=1, min_runs=900)
    for name in ("a", "b"):
        board.queue(model, name, asked)
    measures = 0
    for event in board.watch("b"):
        measures += event.stage.stage == result_pb2.STAGE_MEASURE
        if measures == 2:
            break
    assert board.cancel("a")
    assert board.result("a").status == result_pb2.RUN_STATUS_CANCELLED
    failed = board.result("b")
    assert failed.error.code == "group_ended"
    assert "run a" in failed.error.message
    after = list(board.run(model, "after", spec()))[-1].event.result
    assert after.status == result_pb2.RUN_STATUS_SUCCEEDED, "and the agent goes on"


# --- the agent ends


@MODES
def test_kill_in_the_middle_ends_every_member_once(
    boards: Callable[..., Board], mode: result_pb2.GroupMode.ValueType, eventually: Callable[..., Any]
) -> None:
    board = boards()
    quick, hangs = board.model(), board.model(**HANG)
    board.queue(quick, "a", member(mode, size=3))
    board.queue(hangs, "b", member(mode, size=3))
    board.queue(quick, "c", member(mode, size=3))
    board.queue(quick, "waits", spec())
    board.queue(quick, "alone", member(mode, name="other"))
    board.until_stage("b", "CREATE")
    board.kill()

    board.begin()
    for name in ("a", "b", "c"):
        result = board.result(name)
        assert (result.status, result.error.code) == (result_pb2.RUN_STATUS_FAILED, "agent_restarted")
        assert result.started_at.ToNanoseconds() > 0
    assert board.result("b").error.stage == result_pb2.STAGE_CREATE
    assert board.result("waits").status == result_pb2.RUN_STATUS_SUCCEEDED
    states = {run.run_id: run.state for run in board.runs()}
    assert states.pop("alone") == agent_pb2.RUN_STATE_QUEUED, "it still waits for its group"
    assert set(states.values()) == {agent_pb2.RUN_STATE_ENDED}
    assert len(board.runs()) == 5
    assert board.spooled() == 4
    board.queue(quick, "came", member(mode, name="other"))
    for name in ("alone", "came"):
        assert board.result(name).status == result_pb2.RUN_STATUS_SUCCEEDED
    board.kill()

    board.begin()
    assert board.spooled() == 6, "nothing is told twice"
    assert len(board.runs()) == 6
    scratch = board.agent.data_dir / "scratch"
    eventually(
        "nothing is left of the workers",
        lambda: not scratch.exists() or not any(path.is_dir() for path in scratch.iterdir()),
    )


@MODES
def test_kill_while_the_start_is_noted_ends_every_member(
    boards: Callable[..., Board], mode: result_pb2.GroupMode.ValueType
) -> None:
    """As if the agent had been killed after it noted the start of one, and before that of the others."""
    board = boards()
    model = board.model()
    board.queue(model, "a", member(mode, size=3))
    board.queue(model, "b", member(mode, size=3))
    board.kill()
    journal = board.agent.data_dir / "runs"
    order = json.loads((journal / "b.jsonl").read_text().splitlines()[-1])
    (journal / "c.jsonl").write_text(json.dumps(order | {"run_id": "c"}) + "\n")
    with (journal / "a.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"started_at": "2026-01-01T00:00:01Z"}) + "\n")
    board.begin()
    for name in ("a", "b", "c"):
        assert board.result(name).error.code == "agent_restarted"
        assert board.result(name).started_at.ToJsonString() == "2026-01-01T00:00:01Z"
    assert board.spooled() == 3


def test_kill_after_one_of_a_concurrent_group_was_cancelled(boards: Callable[..., Board]) -> None:
    """As if the agent had been killed before it told the others."""
    board = boards()
    model = board.model()
    board.queue(model, "a", member(CONCURRENT, size=3))
    board.queue(model, "b", member(CONCURRENT, size=3))
    journal = board.agent.data_dir / "runs"
    order = (journal / "b.jsonl").read_text()
    assert board.cancel("a")
    assert board.result("b").error.code == "group_ended"
    board.kill()
    (journal / "b.jsonl").write_text(order)
    folder = board.agent.data_dir / "spool"
    spool = Spool(folder, 1 << 20)
    kept = spool.find("a")
    spool.close()
    assert kept is not None
    for path in folder.iterdir():
        path.unlink()
    spool = Spool(folder, 1 << 20)
    spool.append("a", kept.payload)
    spool.close()
    board.begin()
    result = board.result("b")
    assert result.error.code == "group_ended"
    assert "group g" in result.error.message


@MODES
def test_stop_in_the_middle_gives_every_member_its_reason(
    boards: Callable[..., Board], mode: result_pb2.GroupMode.ValueType, eventually: Callable[..., Any]
) -> None:
    board = boards()
    board.queue(board.model(**HANG), "a", member(mode))
    board.queue(board.model(**HANG), "b", member(mode))
    eventually("one of them hangs", lambda: any(run.stage == result_pb2.STAGE_CREATE for run in board.runs()))
    assert board.agent.program.end(signal.SIGTERM) == 0
    board.begin()
    for name in ("a", "b"):
        result = board.result(name)
        assert result.error.code == "agent_stopped"
        assert "SIGTERM" in result.error.message
    assert board.spooled() == 2


# --- real engines


def test_two_engines_take_turns(programs: Any, demo_tflite: Path, demo_onnx: Path) -> None:
    """As a user asks for it; each answer has both sides of the comparison."""
    agent = programs.agent()
    options = ("--interleave", "--processes", "6", "--duration", "0.6", "--warm-up", "0", "--format", "json")
    answer = programs.client("push", demo_tflite, demo_onnx, "--to", agent.address, *options)
    results = {result["model"]["name"]: result for result in answer.json}
    one, other = results[demo_tflite.name], results[demo_onnx.name]
    for result, against in ((one, other), (other, one)):
        assert len(result["processes"]["processes"]) == 6
        (comparison,) = result["comparisons"]
        assert comparison["run_id"] == against["run_id"]
        assert comparison["model_name"] == against["model"]["name"]
        assert comparison["low_ratio"] <= comparison["ratio"] <= comparison["high_ratio"]
    assert one["comparisons"][0]["ratio"] == pytest.approx(1 / other["comparisons"][0]["ratio"])
    began = sorted(
        (process["started_at"], name)
        for name, result in results.items()
        for process in result["processes"]["processes"]
    )
    turns = [{name for _, name in began[at : at + 2]} for at in range(0, 12, 2)]
    assert turns == [set(results)] * 6


def test_two_engines_at_the_same_time(programs: Any, demo_tflite: Path, demo_onnx: Path) -> None:
    agent = programs.agent()
    options = ("--concurrent", "--duration", "0.6", "--warm-up", "0", "--format", "json")
    answer = programs.client("push", demo_tflite, demo_onnx, "--to", agent.address, *options)
    results = {result["model"]["name"]: result for result in answer.json}
    assert len(results) == 2
    for name, result in results.items():
        (other,) = (each["run_id"] for key, each in results.items() if key != name)
        interference = result["interference"]
        assert interference["run_ids"] == [other]
        assert interference["slowdown_low_ratio"] <= interference["slowdown_ratio"]
        assert interference["slowdown_ratio"] <= interference["slowdown_high_ratio"]
        assert interference["alone"]["count"] > 0
        assert result["latency"]["count"] > 0


def test_several_processes_of_a_real_engine(programs: Any, demo_tflite: Path) -> None:
    agent = programs.agent()
    options = ("--processes", "3", "--duration", "0.6", "--format", "json")
    answer = programs.client("push", demo_tflite, "--to", agent.address, *options)
    result = answer.json[0] if isinstance(answer.json, list) else answer.json
    processes = result["processes"]["processes"]
    assert len(processes) == 3
    assert len({process["started_at"] for process in processes}) == 3
    pooled = sum(process["count"] for process in processes if process.get("pooled"))
    assert pooled == result["latency"]["count"]
    assert result["effective_spec"]["processes"] == 3
    assert result["placement"]["verdict"]


def test_run_here_has_several_processes_and_no_group(programs: Any, demo_tflite: Path) -> None:
    def run_here(asked: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        spec = json.dumps({"duration_seconds": 0.2, "warm_up_seconds": 0} | asked)
        return subprocess.run(
            [
                sys.executable, "-m", "boardbench.agent", "run", str(demo_tflite), "--format", "jsonl",
                "--spec", spec, "--data-dir", str(programs.folder / "here"),
            ],
            capture_output=True, text=True, timeout=SECONDS, env=programs.environment,
        )  # fmt: skip

    done = run_here({"processes": 2})
    assert done.returncode == 0, done
    *events, last = map(json.loads, done.stdout.splitlines())
    assert len(last["result"]["processes"]["processes"]) == 2
    starts = [event for event in events if event.get("stage", {}).get("stage") == "STAGE_START"]
    assert len(starts) == 2
    refused = run_here({"group": {"id": "g", "size": 2, "mode": "GROUP_MODE_INTERLEAVED"}})
    assert refused.returncode == 2
    assert "push them to an agent" in refused.stderr
