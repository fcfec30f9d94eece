"""The agent as a process: its start, its stop, kill -9 at every moment, and what it costs a board."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

from boardbench.agent import footprint
from boardbench.v1 import agent_pb2, agent_pb2_grpc, result_pb2

QUICK = result_pb2.BenchmarkSpec(duration_seconds=0.0, min_runs=3, warm_up_seconds=0.0, warm_up_runs=1)
HANG: dict[str, Any] = {"create": [{"hang": True}]}
SECONDS = 60.0


def eventually(what: str, check: Callable[[], Any], seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := check()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain until {what}")
        time.sleep(0.02)
    return found


class Agent:
    """An agent process and a client of it."""

    def __init__(self, folder: Path, *arguments: str, listen: str = "127.0.0.1:0") -> None:
        self.port_file = folder / "port"
        self.data_dir = folder / "data"
        self.log_path = folder / f"agent-{time.monotonic_ns()}.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-W", "error", "-m", "boardbench.agent", "serve", "--listen", listen,
                    "--data-dir", str(self.data_dir), "--device-id", "it",
                    "--port-file", str(self.port_file), *arguments,
                ],
                stdout=log,
                stderr=log,
                env=os.environ | {"BOARDBENCH_FAKE_RUNTIME": "1"},
            )  # fmt: skip

    def ready(self) -> Agent:
        def port() -> int | None:
            assert self.process.poll() is None, self.log()
            try:
                return int(json.loads(self.port_file.read_text())["grpc"])
            except FileNotFoundError:
                return None

        self.address = f"127.0.0.1:{eventually('the agent listens', port)}"
        self.channel = grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = agent_pb2_grpc.AgentServiceStub(self.channel)
        return self

    def log(self) -> str:
        return self.log_path.read_text()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def kill(self) -> None:
        """kill -9; the file with the port stays behind, as it would."""
        self.process.kill()
        self.process.wait()
        self.channel.close()
        self.port_file.unlink(missing_ok=True)

    def describe(self) -> agent_pb2.DescribeResponse:
        return self.stub.Describe(agent_pb2.DescribeRequest(), timeout=SECONDS)

    def model(self, **content: Any) -> str:
        content["producer"] = os.urandom(4).hex()
        data = b"boardbench-fake/1\n" + json.dumps(content).encode()
        header = agent_pb2.PushHeader(
            sha256=hashlib.sha256(data).hexdigest(), name="m.fake", size_bytes=len(data)
        )
        chunk = agent_pb2.PushChunk(data=data, crc32=zlib.crc32(data))
        requests = [agent_pb2.PushModelRequest(header=header), agent_pb2.PushModelRequest(chunk=chunk)]
        return list(self.stub.PushModel(iter(requests), timeout=SECONDS))[-1].done.model.sha256

    def run(self, sha256: str, run_id: str = "", spec: result_pb2.BenchmarkSpec = QUICK) -> Any:
        request = agent_pb2.RunBenchmarkRequest(model_sha256=sha256, run_id=run_id, spec=spec)
        return self.stub.RunBenchmark(request, timeout=SECONDS)

    def watch(self, run_id: str, after: int = 0) -> list[agent_pb2.RunEvent]:
        request = agent_pb2.WatchRunRequest(run_id=run_id, after_sequence=after)
        return [answer.event for answer in self.stub.WatchRun(request, timeout=SECONDS)]

    def result(self, run_id: str) -> result_pb2.RunResult:
        return self.watch(run_id)[-1].result


def until_stage(call: Any, stage: str) -> agent_pb2.RunEvent:
    for answer in call:
        if answer.event.stage.stage == result_pb2.Stage.Value("STAGE_" + stage):
            return answer.event
    raise AssertionError(f"the run ended before {stage}")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    started: list[Agent] = []

    def start(*arguments: str, **options: Any) -> Agent:
        started.append(Agent(tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for agent in started:
        agent.process.kill()
        agent.process.wait()
        with contextlib.suppress(AttributeError):
            agent.channel.close()


# --- start and stop


def test_it_says_where_it_listens_and_takes_the_file_away_again(agents: Callable[..., Agent]) -> None:
    agent = agents().ready()
    assert f"listening on {agent.address}\n" in agent.log()
    agent.describe()
    assert agent.end(signal.SIGTERM) == 0
    assert not agent.port_file.exists()
    assert "Traceback" not in agent.log()


def test_port_that_is_taken(agents: Callable[..., Agent], tmp_path: Path) -> None:
    agent = agents().ready()
    other = agents("--data-dir", str(tmp_path / "other"), listen=agent.address)
    assert other.process.wait(SECONDS) == 2
    assert f"can't listen on {agent.address}" in other.log()
    assert "--listen" in other.log()
    assert "Traceback" not in other.log()


def test_folder_that_another_agent_has(agents: Callable[..., Agent]) -> None:
    agents().ready()
    other = agents()
    assert other.process.wait(SECONDS) == 2
    assert "another agent is using it" in other.log()


def test_address_open_to_the_network_is_warned_about(agents: Callable[..., Agent]) -> None:
    agent = agents(listen="0.0.0.0:0").ready()
    assert "open to the network" in agent.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_ends_the_run_with_a_reason_and_keeps_those_that_wait(
    agents: Callable[..., Agent], number: signal.Signals
) -> None:
    agent = agents().ready()
    call = agent.run(agent.model(**HANG), "measured")
    until_stage(call, "CREATE")
    waits = agent.run(agent.model(), "waits")
    assert next(waits).event.queued.runs_ahead == 1
    (worker,) = children(agent.process.pid)
    agent.process.send_signal(number)
    last = list(call)[-1].event.result
    assert last.status == result_pb2.RUN_STATUS_FAILED
    assert last.error.code == "agent_stopped"
    assert number.name in last.error.message
    assert last.error.stage == result_pb2.STAGE_CREATE
    with pytest.raises(grpc.RpcError) as raised:
        list(waits)
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "waits" in (raised.value.details() or "")
    assert agent.process.wait(SECONDS) == 0
    assert gone(worker)
    assert "Traceback" not in agent.log()

    again = agents().ready()
    assert again.result("measured") == last
    assert again.result("waits").status == result_pb2.RUN_STATUS_SUCCEEDED
    assert again.describe().spool.pending == 2


def test_stop_while_engines_are_probed(agents: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOARDBENCH_FAKE_IMPORT", '[{"hang": true}]')
    agent = agents().ready()
    (probe,) = eventually("the probe is there", lambda: children(agent.process.pid))
    assert agent.end(signal.SIGTERM) == 0
    assert gone(probe)
    assert "Traceback" not in agent.log()


# --- kill -9


def test_run_that_was_killed_with_the_agent_fails_once(agents: Callable[..., Agent]) -> None:
    agent = agents().ready()
    call = agent.run(agent.model(**HANG), "killed")
    seen = until_stage(call, "CREATE")
    waits = agent.run(agent.model(), "waits")
    assert next(waits).event.queued.runs_ahead == 1
    (worker,) = children(agent.process.pid)
    agent.kill()
    eventually("the worker is gone", lambda: gone(worker))

    again = agents().ready()
    # A client goes on behind what it has seen: the numbers of the next life are higher.
    (event,) = again.watch("killed", seen.sequence)
    assert event.sequence > seen.sequence
    failed = event.result
    assert failed.status == result_pb2.RUN_STATUS_FAILED
    assert failed.error.code == "agent_restarted"
    assert failed.error.stage == result_pb2.STAGE_CREATE
    assert "stage create" in failed.error.message
    assert failed.created_at.seconds <= failed.started_at.seconds <= failed.finished_at.seconds
    assert again.result("waits").status == result_pb2.RUN_STATUS_SUCCEEDED, "what waited is begun"
    assert again.describe().spool.pending == 2

    again.kill()
    third = agents().ready()
    assert third.result("killed") == failed
    assert third.describe().spool.pending == 2, "and told once only"


def test_run_that_waited_keeps_its_place_and_its_model(agents: Callable[..., Agent]) -> None:
    agent = agents().ready()
    until_stage(agent.run(agent.model(**HANG), "killed"), "CREATE")
    names = ["first", "second", "third"]
    for name in names:
        next(agent.run(agent.model(create=[{"sleep_seconds": 0.1}]), name))
    agent.kill()
    again = agents().ready()
    results = [again.result(name) for name in names]
    assert [result.status for result in results] == [result_pb2.RUN_STATUS_SUCCEEDED] * 3
    ends = [result.finished_at.ToNanoseconds() for result in results]
    assert ends == sorted(ends)


def test_model_that_vanished_meanwhile_fails_its_run(agents: Callable[..., Agent]) -> None:
    agent = agents().ready()
    until_stage(agent.run(agent.model(**HANG), "killed"), "CREATE")
    sha256 = agent.model()
    next(agent.run(sha256, "waits"))
    agent.kill()
    for path in (agent.data_dir / "models" / "files").glob(f"{sha256}*"):
        path.unlink()
    again = agents().ready()
    result = again.result("waits")
    assert result.error.code == "model_missing"
    assert "push it" in result.error.message


def test_result_that_reached_the_spool_is_not_told_a_second_time(agents: Callable[..., Agent]) -> None:
    """As if the agent had been killed between the spool and the journal."""
    agent = agents().ready()
    sha256 = agent.model()
    list(agent.run(sha256, "done"))
    result = agent.result("done")
    journal = agent.data_dir / "runs"
    eventually("the journal has the end", lambda: b'"ended"' in (journal / "done.jsonl").read_bytes())
    assert agent.end(signal.SIGTERM) == 0
    order = {
        "run_id": "done",
        "model": {"sha256": sha256, "name": "m.fake", "format": "fake", "size_bytes": "1"},
        "spec": {},
        "created_at": "2026-01-01T00:00:00Z",
    }
    (journal / "done.jsonl").write_text(
        json.dumps(order) + "\n" + json.dumps({"started_at": "2026-01-01T00:00:01Z"}) + "\n"
    )
    again = agents().ready()
    assert again.result("done") == result
    assert again.describe().spool.pending == 1


def test_journal_that_is_torn_or_garbage_does_not_stop_the_agent(agents: Callable[..., Agent]) -> None:
    agent = agents().ready()
    until_stage(agent.run(agent.model(**HANG), "killed"), "CREATE")
    agent.kill()
    journal = agent.data_dir / "runs"
    with (journal / "killed.jsonl").open("ab") as file:
        file.write(b'{"stage": "STAGE_INP')
    (journal / "garbage.jsonl").write_bytes(b"\xff\x00{")
    (journal / "other.result").write_bytes(b"\xff\x00{")
    (journal / "empty.jsonl").write_bytes(b"")
    (journal / "left.result.tmp").write_bytes(b"x")
    again = agents().ready()
    assert again.result("killed").error.stage == result_pb2.STAGE_CREATE
    assert [run.run_id for run in again.stub.ListRuns(agent_pb2.ListRunsRequest()).runs] == ["killed"]
    assert "garbage" in again.log()
    # And once more, with what the second life wrote behind the torn line.
    again.kill()
    assert agents().ready().result("killed").error.code == "agent_restarted"


def test_what_workers_left_is_removed(agents: Callable[..., Agent]) -> None:
    agent = agents().ready()
    until_stage(agent.run(agent.model(**HANG), "killed"), "CREATE")
    scratch = agent.data_dir / "scratch"
    assert (scratch / "killed").is_dir()
    agent.kill()
    again = agents().ready()
    list(again.run(again.model(), "done"))
    eventually("nothing is left", lambda: not any(path.is_dir() for path in scratch.iterdir()))


def test_disk_that_is_full_refuses_the_run_and_keeps_the_agent(
    agents: Callable[..., Agent],
    small_disk: Callable[[int], Path],
    small_disks: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = small_disk(4_000_000)
    monkeypatch.setenv("BOARDBENCH_AGENT_STORE_FREE_FLOOR_BYTES", "0")
    agent = agents("--data-dir", str(disk / "data")).ready()
    sha256 = agent.model()
    list(agent.run(sha256, "fits"))
    steps = disk / "data/runs/fits.jsonl"
    eventually("the run is over", lambda: b'"ended"' in steps.read_bytes())
    small_disks.fill(disk / "filler")
    with pytest.raises(grpc.RpcError) as raised:
        list(agent.run(sha256, "does-not-fit"))
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "No space left" in (raised.value.details() or "")
    (disk / "filler").unlink()
    assert list(agent.run(sha256, "does-not-fit"))[-1].event.result.status == result_pb2.RUN_STATUS_SUCCEEDED


# --- what it costs


# What an agent that waits has no use for: engines and what they stand on, and what costs megabytes.
BANNED = (
    "numpy", "onnxruntime", "ai_edge_litert", "tflite_runtime", "onnx", "flatbuffers", "click", "rich",
    "sqlite3", "prometheus_client", "aiohttp", "psutil", "ssl", "hashlib", "multiprocessing",
    "importlib.metadata", "email", "xml", "ctypes", "shutil", "tempfile", "asyncio.__main__", "unittest",
)  # fmt: skip


def test_main_process_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from boardbench.agent import cli\n"
        "cli.parser()\n"
        "cli._leave_ssl_out()\n"
        "import boardbench.agent.serve\n"
        "print(*(name for name, module in sys.modules.items() if module is not None))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    assert sorted(set(done.stdout.split()) & set(BANNED)) == []


def test_agent_that_has_run_a_model_has_loaded_no_engine(agents: Callable[..., Agent]) -> None:
    agent = agents().ready()
    list(agent.run(agent.model(), "done"))
    maps = Path(f"/proc/{agent.process.pid}/maps").read_text()
    for name in ("numpy", "onnxruntime", "litert", "sqlite", "_ssl"):
        assert name not in maps
    assert "cygrpc" in maps, "the maps are those of the agent"


def test_agent_that_waits_lets_go_of_the_code_that_is_not_needed(
    agents: Callable[..., Agent],
) -> None:
    agent = agents().ready()
    agent.describe()

    def code_bytes() -> int:
        """What is resident of gRPC's code, by far the largest library."""
        found, is_code = 0, False
        for line in Path(f"/proc/{agent.process.pid}/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                is_code = "cygrpc" in line and "r-xp" in line
            elif line.startswith("Rss:") and is_code:
                found += int(line.split()[1]) * 1024
        return found

    before = code_bytes()
    assert before > 0
    eventually("the code is dropped", lambda: code_bytes() < before * 0.7)
    # And again after an upload.
    sha256 = agent.model()
    uploaded = code_bytes()
    eventually("the code is dropped again", lambda: code_bytes() < uploaded * 0.8)
    # And it works on.
    assert list(agent.run(sha256, "done"))[-1].event.result.status == result_pb2.RUN_STATUS_SUCCEEDED


SMAPS = """\
00400000-00500000 r-xp 00000000 08:01 1234       /usr/lib/clean.so
Rss:                 100 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd ex
00500000-00600000 r-xp 00000000 08:01 1235       /usr/lib/with relocations in its code.so
Anonymous:             4 kB
Swap:                  0 kB
VmFlags: rd ex
00600000-00700000 r-xp 00000000 08:01 1236       /usr/lib/whose changed pages are swapped out.so
Anonymous:             0 kB
Swap:                  4 kB
VmFlags: rd ex
00700000-00800000 rw-p 00000000 08:01 1234       /usr/lib/clean.so
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd wr
00800000-00900000 r--p 00000000 08:01 1237       /usr/lib/locale/C.utf8/LC_CTYPE
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd
00900000-00a00000 r--p 00000000 08:01 1234       /usr/lib/constants of the clean.so.6
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd
00a00000-00b00000 r-xp 00000000 00:00 0
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd ex
7fff0000-7fff1000 r-xp 00000000 00:00 0          [vdso]
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd ex
"""


def test_only_code_that_is_as_in_its_file_is_dropped() -> None:
    assert list(footprint._clean_libraries(SMAPS.splitlines())) == [
        (0x400000, 0x500000),
        (0x900000, 0xA00000),
    ]
