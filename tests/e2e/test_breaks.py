"""What breaks in the middle: clients, connections, agents, collectors. Nothing is lost or comes twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

QUICK = ("--duration", "0.1", "--min-runs", "3", "--warm-up", "0")
# Long enough to be interrupted in the middle on any machine.
LONG = ("--duration", "60", "--warm-up", "0")


def _in_state(agent: Any, state: str, stage: str = "") -> list[dict[str, Any]]:
    return [
        run for run in agent.runs() if run.get("state") == state and (not stage or run.get("stage") == stage)
    ]


@pytest.fixture
def measuring(programs: Any, eventually: Any, demo_onnx: Path) -> Callable[[Any], tuple[Any, str]]:
    """Starts a client whose run is being measured; the client and the run's id."""

    def begin(agent: Any, *arguments: str) -> tuple[Any, str]:
        client = programs.client.begin("push", demo_onnx, "--to", agent.address, *(arguments or LONG))

        def measured() -> Any:
            assert client.running, client.log()
            return _in_state(agent, "RUN_STATE_RUNNING", "STAGE_MEASURE")

        return client, eventually("the run is being measured", measured)[0]["run_id"]

    return begin


def _ended(agent: Any, eventually: Any, run_id: str, seconds: float = 60) -> dict[str, Any]:
    def ended() -> Any:
        return [run for run in _in_state(agent, "RUN_STATE_ENDED") if run["run_id"] == run_id]

    return dict(eventually(f"run {run_id} ended", ended, seconds)[0])


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _in_collector(collector: Any, run_id: str) -> list[dict[str, Any]]:
    return [result for result in collector.results() if result["run_id"] == run_id]


def test_two_clients_at_once(house: Any, demo_onnx: Path, demo_tflite: Path) -> None:
    """Both get their result, one after the other; the second sees that it waits."""
    to = ("--to", house.agent.address)
    duration = ("--duration", "1.5", "--warm-up", "0")
    first = house.programs.client.begin("push", demo_onnx, *to, *duration, "--format", "json")
    second = house.programs.client.begin("push", demo_tflite, *to, *duration, "--format", "json")
    assert first.process.wait(90) == 0, first.log()
    assert second.process.wait(90) == 0, second.log()
    runs = [run for run in house.agent.runs() if run["state"] == "RUN_STATE_ENDED"]
    results = sorted(
        (house.collector.get_json(f"/api/v1/results/{run['run_id']}") for run in runs[:2]),
        key=lambda result: str(result["started_at"]),
    )
    assert results[0]["finished_at"] <= results[1]["started_at"]


def test_two_clients_push_the_same_file_at_once(programs: Any, demo_tflite: Path, eventually: Any) -> None:
    agent = programs.agent()
    wire = programs.wire(agent.address)
    wire.hold_after = 100_000
    slow = programs.client.begin("push", demo_tflite, "--to", wire.address, *QUICK)
    assert wire.held.wait(30)
    programs.client("push", demo_tflite, "--to", agent.address, *QUICK)
    wire.release()
    assert slow.process.wait(90) == 0, slow.log()
    stored = programs.client("models", "--to", agent.address, "--format", "json").json
    stored = stored["models"] if isinstance(stored, dict) else stored
    assert len(stored) == 1


def test_a_client_gone_in_the_middle_of_the_upload(programs: Any, tmp_path: Path, eventually: Any) -> None:
    """The next push goes on where the dead one stopped."""
    agent = programs.agent()
    wire = programs.wire(agent.address)
    model = _large(tmp_path / "large.tflite", 20_000_000)
    wire.hold_after = 12_000_000
    client = programs.client.begin("push", model, "--to", wire.address, *QUICK)
    assert wire.held.wait(30)
    client.kill()
    wire.cut()
    wire.release()
    again = programs.wire(agent.address)
    programs.client("push", model, "--to", again.address, *QUICK)
    # What was on its way in buffers is sent again, and no more.
    assert again.sent_up_bytes < 20_000_000 - 12_000_000 + 6_000_000
    assert again.sent_up_bytes > 1_000_000


def test_a_second_push_sends_no_model_bytes(programs: Any, demo_tflite: Path) -> None:
    agent = programs.agent()
    wire = programs.wire(agent.address)
    programs.client("push", demo_tflite, "--to", wire.address, *QUICK)
    first = wire.sent_up_bytes
    assert first > demo_tflite.stat().st_size
    programs.client("push", demo_tflite, "--to", wire.address, *QUICK)
    assert wire.sent_up_bytes - first < 10_000


def test_a_connection_that_breaks_in_the_upload_is_taken_up_again(programs: Any, tmp_path: Path) -> None:
    agent = programs.agent()
    wire = programs.wire(agent.address)
    model = _large(tmp_path / "large.tflite", 20_000_000)
    wire.hold_after = 12_000_000
    client = programs.client.begin("push", model, "--to", wire.address, *QUICK)
    assert wire.held.wait(30)
    wire.cut()
    wire.release()
    assert client.process.wait(90) == 0, client.log()
    assert wire.sent_up_bytes < 20_000_000 + 6_000_000


def test_a_connection_that_breaks_in_the_run_is_taken_up_again(
    programs: Any, demo_onnx: Path, eventually: Any
) -> None:
    agent = programs.agent()
    wire = programs.wire(agent.address)
    client = programs.client.begin(
        "push", demo_onnx, "--to", wire.address, "--duration", "3", "--format", "json"
    )
    eventually("the run is being measured", lambda: _in_state(agent, "RUN_STATE_RUNNING", "STAGE_MEASURE"))
    wire.cut()
    assert client.process.wait(90) == 0, client.log()
    assert len(agent.runs()) == 1, "the run was not started twice"


def test_a_client_gone_in_the_middle_of_the_run(programs: Any, measuring: Any, eventually: Any) -> None:
    """The run goes on to its end and its result reaches the collector."""
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    client, run_id = measuring(agent, "--duration", "3", "--warm-up", "0")
    client.kill()
    assert _ended(agent, eventually, run_id)["status"] == "RUN_STATUS_SUCCEEDED"
    eventually("the result is in the collector", lambda: _in_collector(collector, run_id))


def test_cancel_ends_a_run_within_a_second(programs: Any, measuring: Any, eventually: Any) -> None:
    agent = programs.agent()
    client, run_id = measuring(agent)
    assert _children(agent.program.pid)
    begin = time.monotonic()
    programs.client("cancel", run_id, "--to", agent.address)
    # A second for the agent; the rest is for a client to start on a busy machine.
    assert time.monotonic() - begin < 10
    assert client.process.wait(30) == 1, client.log()
    assert _ended(agent, eventually, run_id)["status"] == "RUN_STATUS_CANCELLED"
    assert _children(agent.program.pid) == []


def test_a_worker_that_is_killed_is_a_failed_run(programs: Any, measuring: Any, demo_onnx: Path) -> None:
    agent = programs.agent()
    client, run_id = measuring(agent, *LONG, "--format", "json")
    (worker,) = _children(agent.program.pid)
    os.kill(worker, signal.SIGSEGV)
    assert client.process.wait(30) == 1, client.log()
    watched = programs.client("watch", run_id, "--to", agent.address, "--format", "json", code=1)
    assert "SIGSEGV" in watched.out
    assert "STAGE_MEASURE" in watched.out
    programs.client("push", demo_onnx, "--to", agent.address, *QUICK)


def test_an_agent_restarted_in_the_middle_of_the_run(
    programs: Any, measuring: Any, demo_onnx: Path, eventually: Any
) -> None:
    """kill -9: no worker is left, the run is told as failed once, the next agent works on."""
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    client, run_id = measuring(agent)
    (worker,) = _children(agent.program.pid)
    agent.program.kill()
    eventually("the worker is gone with its agent", lambda: not Path(f"/proc/{worker}/exe").exists())
    again = programs.agent(collector=collector.address, listen=agent.address)
    assert client.process.wait(90) == 1, client.log()
    (result,) = eventually("the failed run is in the collector", lambda: _in_collector(collector, run_id))
    assert result["status"] == "RUN_STATUS_FAILED"
    assert result["error"]["message"]
    programs.client("push", demo_onnx, "--to", again.address, *QUICK)
    assert len(_in_collector(collector, run_id)) == 1


def test_an_agent_stopped_in_the_middle_of_the_run(programs: Any, measuring: Any, eventually: Any) -> None:
    """SIGTERM: it ends soon, with exit code 0, and its worker with it."""
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    _, run_id = measuring(agent)
    (worker,) = _children(agent.program.pid)
    assert agent.program.end(signal.SIGTERM) == 0
    assert not Path(f"/proc/{worker}/exe").exists()
    programs.agent(collector=collector.address, listen=agent.address)
    (result,) = eventually("the run is in the collector", lambda: _in_collector(collector, run_id))
    assert result["status"] in ("RUN_STATUS_FAILED", "RUN_STATUS_CANCELLED")


def test_a_collector_down_for_the_whole_run_and_back_later(
    programs: Any, demo_onnx: Path, eventually: Any
) -> None:
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    eventually("the board is up", lambda: collector.metric("boardbench_device_up", device=agent.device_id))
    collector.program.kill()
    answer = programs.client("push", demo_onnx, "--to", agent.address, "--format", "json", *QUICK)
    result = answer.json
    back = programs.collector(listen=collector.address, http=collector.http)
    eventually("the result arrived", lambda: _in_collector(back, result["run_id"]), 60)
    assert _in_collector(back, result["run_id"]) == [result]
    assert back.metric("boardbench_runs_total", device=agent.device_id, status="succeeded")[0][1] == 1


def test_a_result_survives_kill_of_both(programs: Any, demo_onnx: Path, eventually: Any) -> None:
    """The agent is killed with the result in its spool and the collector down."""
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    eventually("the board is up", lambda: collector.metric("boardbench_device_up", device=agent.device_id))
    collector.program.kill()
    answer = programs.client("push", demo_onnx, "--to", agent.address, "--format", "json", *QUICK)
    result = answer.json
    agent.program.kill()
    programs.agent(collector=collector.address)
    back = programs.collector(listen=collector.address, http=collector.http)
    eventually("the result arrived", lambda: _in_collector(back, result["run_id"]), 60)
    assert _in_collector(back, result["run_id"]) == [result]


def test_an_acknowledgement_that_is_lost_stores_nothing_twice(
    programs: Any, demo_onnx: Path, eventually: Any
) -> None:
    """What the collector answers is thrown away after it has stored: the agent asks again, once is stored."""
    collector = programs.collector()
    wire = programs.wire(collector.address)
    agent = programs.agent(collector=wire.address)
    eventually("the board is up", lambda: collector.metric("boardbench_device_up", device=agent.device_id))
    run_ids = []
    for _ in range(3):
        wire.mute = True
        run_id = _push_one(programs, agent, demo_onnx)["run_id"]
        run_ids.append(run_id)
        eventually("the result arrived", lambda run_id=run_id: _in_collector(collector, run_id), 60)
        wire.mute = False
        wire.cut()
        eventually("the spool is empty", lambda: _pending(programs, agent) == 0)
    assert sorted(result["run_id"] for result in collector.results()) == sorted(run_ids)
    assert collector.metric("boardbench_runs_total", device=agent.device_id)[0][1] == 3


def test_a_collector_that_is_killed_again_and_again(programs: Any, demo_onnx: Path, eventually: Any) -> None:
    """kill -9 while results come in: each is there in the end, and none twice."""
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    answers = [
        programs.client("push", demo_onnx, "--to", agent.address, "--detach", *QUICK).out.strip()
        for _ in range(6)
    ]
    for _ in range(3):
        before = len(_in_state(agent, "RUN_STATE_ENDED"))
        eventually(
            "another run ended",
            lambda before=before: len(_in_state(agent, "RUN_STATE_ENDED")) > before or before == 6,
        )
        collector.program.kill()
        collector = programs.collector(listen=collector.address, http=collector.http)
    for run_id in answers:
        eventually("the result arrived", lambda run_id=run_id: _in_collector(collector, run_id), 60)
    assert sorted(result["run_id"] for result in collector.results()) == sorted(answers)


def test_a_collector_whose_disk_is_full(
    programs: Any,
    small_disk: Callable[[int], Path],
    small_disks: ModuleType,
    demo_onnx: Path,
    eventually: Any,
) -> None:
    """What it can't keep it does not acknowledge; with room again, the result comes."""
    disk = small_disk(20_000_000)
    collector = programs.collector(data_dir=disk / "collector")
    agent = programs.agent(collector=collector.address)
    first = _push_one(programs, agent, demo_onnx)["run_id"]
    eventually("the first result arrived", lambda: _in_collector(collector, first))
    small_disks.fill(disk / "filler")
    # Larger than what an SQLite file has to spare.
    second = _push_one(programs, agent, demo_onnx, "--min-runs", "20000", "--max-runs", "20000")["run_id"]
    assert _in_collector(collector, second) == []
    assert _pending(programs, agent) == 1
    (disk / "filler").unlink()
    eventually("the second result arrived", lambda: _in_collector(collector, second), 90)
    eventually("the spool is empty", lambda: _pending(programs, agent) == 0)


def test_an_agent_whose_disk_is_full(
    programs: Any,
    small_disk: Callable[[int], Path],
    small_disks: ModuleType,
    measuring: Any,
    demo_onnx: Path,
    eventually: Any,
) -> None:
    """A result that the disk has no room for waits in memory; all of them come when the collector is back."""
    disk = small_disk(16_000_000)
    collector = programs.collector()
    agent = programs.agent(
        collector=collector.address,
        data_dir=disk / "agent",
        environment={"BOARDBENCH_AGENT_STORE_FREE_FLOOR_BYTES": "0"},
    )
    eventually("the board is up", lambda: collector.metric("boardbench_device_up", device=agent.device_id))
    collector.program.kill()
    run_ids = [_push_one(programs, agent, demo_onnx)["run_id"]]

    client, run_id = measuring(agent, "--duration", "3", "--warm-up", "0")
    small_disks.fill(disk / "filler")
    assert client.process.wait(90) == 0, client.log()
    assert "the collector may never get this result" in client.log()
    run_ids.append(run_id)
    # A run needs room for what it leaves on the disk; that it did not begin is a result, too.
    push = ("push", demo_onnx, "--to", agent.address, "--format", "json", *QUICK)
    third = programs.client(*push, code=1).json
    assert third["error"]["code"] == "not_started", third
    assert "No space left on device: make room on the board's disk" in third["error"]["message"]
    run_ids.append(third["run_id"])
    back = programs.collector(listen=collector.address, http=collector.http)
    for each in run_ids:
        eventually("the result arrived", lambda each=each: _in_collector(back, each), 60)

    (disk / "filler").unlink()
    run_ids.append(_push_one(programs, agent, demo_onnx)["run_id"])
    eventually("the last result arrived", lambda: _in_collector(back, run_ids[-1]), 60)
    agent.program.kill()
    programs.agent(collector=collector.address, data_dir=disk / "agent")
    eventually("it is up again", lambda: back.metric("boardbench_device_up", device=agent.device_id))
    assert sorted(result["run_id"] for result in back.results()) == sorted(run_ids)


def test_an_agent_killed_in_the_middle_of_the_upload(programs: Any, tmp_path: Path) -> None:
    """The client waits for it to come back, and goes on where the disk says it was."""
    agent = programs.agent()
    wire = programs.wire(agent.address)
    model = _large(tmp_path / "large.tflite", 20_000_000)
    wire.hold_after = 12_000_000
    client = programs.client.begin("push", model, "--to", wire.address, *QUICK)
    assert wire.held.wait(30)
    agent.program.kill()
    programs.agent(listen=agent.address)
    wire.cut()
    wire.release()
    assert client.process.wait(90) == 0, client.log()
    assert wire.sent_up_bytes < 20_000_000 + 8_000_000


def test_a_hundred_thousand_samples_go_all_the_way(programs: Any, tmp_path: Path, eventually: Any) -> None:
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    model = _large(tmp_path / "small.tflite", 4096)
    count = ("--min-runs", "100000", "--max-runs", "100000", "--duration", "0", "--warm-up", "0")
    result = _push_one(programs, agent, model, *count)
    assert len(result["latency"]["samples_nanoseconds"]) == result["latency"]["count"] == 100_000
    eventually("the result arrived", lambda: _in_collector(collector, result["run_id"]))
    shown = programs.client(
        "show", result["run_id"], "--collector", collector.address, "--format", "json"
    ).json
    assert shown == result


def test_a_board_that_is_gone_is_down(programs: Any, eventually: Any) -> None:
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    up = lambda: collector.metric("boardbench_device_up", device=agent.device_id)  # noqa: E731
    eventually("the board is up", lambda: up() and up()[0][1] == 1)
    agent.program.kill()
    eventually("the board is down", lambda: up() and up()[0][1] == 0)


def test_interrupting_the_client_tells_where_the_run_is(
    programs: Any, measuring: Any, eventually: Any
) -> None:
    agent = programs.agent()
    client, run_id = measuring(agent)
    assert client.end(signal.SIGINT) == 130
    # Ctrl-C ends the client or cancels the run; in both cases it says which.
    assert run_id[:8] in client.log()


def test_many_clients_one_after_the_other_leave_nothing(programs: Any, demo_onnx: Path) -> None:
    """Descriptors and threads of the agent do not grow with the runs it has done."""
    agent = programs.agent()

    def counts() -> tuple[int, int]:
        folder = Path(f"/proc/{agent.program.pid}")
        return len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))

    programs.client("push", demo_onnx, "--to", agent.address, *QUICK)
    programs.client("push", demo_onnx, "--to", agent.address, *QUICK)
    before = counts()
    for _ in range(4):
        programs.client("push", demo_onnx, "--to", agent.address, *QUICK)
    after = counts()
    assert after[0] <= before[0] + 3
    assert after[1] <= before[1] + 3


def _push_one(programs: Any, agent: Any, model: Path, *arguments: str) -> dict[str, Any]:
    answer = programs.client("push", model, "--to", agent.address, "--format", "json", *(arguments or QUICK))
    return dict(answer.json)


def _pending(programs: Any, agent: Any) -> int:
    """Results that wait in the agent's spool."""
    described = programs.client("devices", "--to", agent.address, "--format", "json").json
    described = described[0] if isinstance(described, list) else described
    return int(described["spool"].get("pending", 0))


def _large(path: Path, size_bytes: int) -> Path:
    from boardbench.cli.tflite_build import ModelBuilder, Options

    model = ModelBuilder()
    graph = model.subgraph()
    count = size_bytes - 2048
    data = graph.tensor("data", [1, count], scale=0.1)
    weights = graph.tensor("weights", [1, count], scale=0.1, data=os.urandom(count))
    total = graph.tensor("total", [1, count], scale=0.2)
    graph.operator("ADD", [data, weights], [total], Options("AddOptions"), version=2)
    graph.inputs(data)
    graph.outputs(total)
    path.write_bytes(model.finish())
    return path
