"""An agent in hostile circumstances: hung workers, deadlines, missing engines, rivals for port and data."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--duration", "0.1", "--min-runs", "3", "--warm-up", "0")
LONG = ("--duration", "60", "--warm-up", "0")


def _measuring(agent: Any, client: Any, eventually: Any) -> str:
    def found() -> Any:
        assert client.running, client.log()
        return [run for run in agent.runs() if run.get("stage") == "STAGE_MEASURE"]

    return str(eventually("a run is being measured", found)[0]["run_id"])


def _worker(agent: Any) -> int:
    pid = agent.program.pid
    (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(worker)


def test_a_worker_that_hangs_is_killed_at_its_deadline(
    programs: Any, demo_onnx: Path, eventually: Any
) -> None:
    """A stopped process takes no signal but SIGKILL, as one does that hangs in a driver."""
    agent = programs.agent(environment={"BOARDBENCH_AGENT_DEADLINES_MEASURE_SECONDS": "1"})
    client = programs.client.begin(
        "push", demo_onnx, "--to", agent.address, "--duration", "3", "--format", "json"
    )
    run_id = _measuring(agent, client, eventually)
    worker = _worker(agent)
    os.kill(worker, signal.SIGSTOP)
    assert client.process.wait(60) == 1, client.log()
    result = programs.client("watch", run_id, "--to", agent.address, "--format", "json", code=1).json
    assert (result["error"]["code"], result["error"]["stage"]) == ("deadline", "STAGE_MEASURE")
    assert not Path(f"/proc/{worker}/exe").exists()
    programs.client("push", demo_onnx, "--to", agent.address, *QUICK)


def test_a_run_ends_at_the_time_that_was_given_it(programs: Any, demo_onnx: Path) -> None:
    agent = programs.agent()
    to = ("--to", agent.address, "--timeout", "3")
    endless = ("--duration", "0", "--min-runs", "1000000", "--format", "json")
    answer = programs.client("push", demo_onnx, *to, *endless, code=1)
    assert answer.json["error"]["code"] == "deadline"
    assert "3 s" in answer.json["error"]["message"]
    refused = programs.client("push", demo_onnx, *to, *LONG, code=None)
    assert refused.code in (1, 2) and "60 s" in refused.err, "what can't be done is refused at once"


def test_more_memory_than_there_is(programs: Any, tmp_path: Path, demo_onnx: Path) -> None:
    """A worker that is refused memory is a failed run, whoever notices first."""
    onnx: Any = pytest.importorskip("onnx")
    helper = onnx.helper
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", ["data"], ["out"])],
            "open",
            [helper.make_tensor_value_info("data", onnx.TensorProto.FLOAT, ["batch"])],
            [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["batch"])],
        ),
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17)],
    )
    path = tmp_path / "open.onnx"
    path.write_bytes(model.SerializeToString())
    agent = programs.agent()
    limit = 4 << 30
    resource.prlimit(agent.program.pid, resource.RLIMIT_AS, (limit, limit))
    answer = programs.client(
        "push", path, "--to", agent.address, "--shape", "data=2000000000", "--format", "json", *QUICK, code=1
    )
    assert answer.json["error"]["code"] in ("out_of_memory", "inputs_rejected"), answer
    assert "memory" in answer.json["error"]["message"].lower()
    programs.client("push", demo_onnx, "--to", agent.address, *QUICK)


def test_an_engine_in_an_interpreter_that_lacks_it(
    programs: Any, tmp_path: Path, demo_tflite: Path, demo_onnx: Path
) -> None:
    """One runtime under another Python, where it is not installed: said so, and the other one works."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    configuration = tmp_path / "agent.toml"
    configuration.write_text(f'[runtimes.tflite]\npython = "{bare / "bin" / "python"}"\n')
    agent = programs.agent(environment={"BOARDBENCH_AGENT_CONFIG": str(configuration)})
    described = programs.client("devices", "--to", agent.address, "--format", "json").json
    described = described[0] if isinstance(described, list) else described
    runtimes = {each["name"]: each for each in described["runtimes"]}
    assert not runtimes["tflite"].get("available")
    assert "pip install" in runtimes["tflite"]["reason"]
    assert runtimes["onnxruntime"]["available"]
    named = ("--runtime", "tflite")
    answer = programs.client("push", demo_tflite, "--to", agent.address, *named, *QUICK, code=1)
    assert "pip install" in answer.out + answer.err, answer
    programs.client("push", demo_onnx, "--to", agent.address, *QUICK)


def test_an_engine_in_an_interpreter_that_is_not_there(
    programs: Any, tmp_path: Path, demo_onnx: Path
) -> None:
    configuration = tmp_path / "agent.toml"
    configuration.write_text('[runtimes.onnxruntime]\npython = "/nowhere/python3"\n')
    agent = programs.agent(environment={"BOARDBENCH_AGENT_CONFIG": str(configuration)})
    named = ("--runtime", "onnxruntime")
    answer = programs.client("push", demo_onnx, "--to", agent.address, *named, *QUICK, code=1)
    assert "/nowhere/python3" in answer.out + answer.err, answer


def test_a_waiting_run_is_cancelled_and_its_model_stays_while_it_waits(
    programs: Any, demo_onnx: Path, demo_tflite: Path, eventually: Any
) -> None:
    agent = programs.agent()
    to = ("--to", agent.address)
    long = programs.client.begin("push", demo_onnx, *to, *LONG)
    running = _measuring(agent, long, eventually)
    waiting = programs.client("push", demo_tflite, *to, "--detach", *QUICK).out.strip()
    listed = programs.client("runs", *to, "--format", "json").json
    states = {run["run_id"]: run["state"] for run in listed}
    assert states == {running: "RUN_STATE_RUNNING", waiting: "RUN_STATE_QUEUED"}
    for model in programs.client("models", *to, "--format", "json").json:
        refused = programs.client("models", "rm", model["model"]["sha256"], *to, code=1)
        assert model["model"]["name"] in refused.err and "used by" in refused.err, refused
    programs.client("cancel", waiting, *to)
    programs.client("cancel", running, *to)
    assert long.process.wait(30) == 1
    assert {run["status"] for run in agent.runs()} == {"RUN_STATUS_CANCELLED"}
    for model in programs.client("models", *to, "--format", "json").json:
        programs.client("models", "rm", model["model"]["sha256"], *to)
    assert programs.client("models", *to, "--format", "json").json == []


def test_waiting_runs_survive_a_restart(programs: Any, demo_onnx: Path, eventually: Any) -> None:
    """What was accepted is done, once, even when the agent was killed meanwhile."""
    agent = programs.agent()
    long = programs.client.begin("push", demo_onnx, "--to", agent.address, *LONG)
    running = _measuring(agent, long, eventually)
    waiting = [
        programs.client("push", demo_onnx, "--to", agent.address, "--detach", *QUICK).out.strip()
        for _ in range(2)
    ]
    agent.program.kill()
    again = programs.agent(listen=agent.address)
    assert long.process.wait(90) == 1

    def ended() -> Any:
        states = {run["run_id"]: run for run in again.runs()}
        return {*waiting, running} <= states.keys() and all(
            run["state"] == "RUN_STATE_ENDED" for run in states.values()
        )

    eventually("all runs ended", ended, 60)
    status = {run["run_id"]: run["status"] for run in again.runs()}
    assert status[running] == "RUN_STATUS_FAILED"
    assert [status[each] for each in waiting] == ["RUN_STATUS_SUCCEEDED"] * 2


@pytest.mark.parametrize("what", ["port", "data"])
def test_two_agents_do_not_share(programs: Any, what: str) -> None:
    agent = programs.agent()
    listen = agent.address if what == "port" else "127.0.0.1:0"
    data_dir = agent.data_dir if what == "data" else programs.folder / "other"
    from sysconfig import get_path

    done = subprocess.run(
        [
            sys.executable, str(Path(get_path("scripts")) / "boardbench-agent"), "serve",
            "--listen", listen, "--data-dir", str(data_dir),
        ],
        capture_output=True, text=True, timeout=60, env=programs.environment,
    )  # fmt: skip
    assert done.returncode in (1, 2), done
    assert (agent.address if what == "port" else str(data_dir)) in done.stderr, done
    assert "Traceback" not in done.stderr
    programs.client("devices", "--to", agent.address)


def test_two_collectors_do_not_share(programs: Any) -> None:
    collector = programs.collector()
    from sysconfig import get_path

    base = [sys.executable, str(Path(get_path("scripts")) / "boardbench-collector"), "serve"]
    for arguments, named in (
        (["--listen", collector.address, "--http", "127.0.0.1:0"], collector.address),
        (["--listen", "127.0.0.1:0", "--http", collector.http], collector.http),
    ):
        done = subprocess.run(
            [*base, *arguments, "--data-dir", str(programs.folder / "other")],
            capture_output=True, text=True, timeout=60, env=programs.environment,
        )  # fmt: skip
        assert done.returncode in (1, 2), done
        assert named in done.stderr and "Traceback" not in done.stderr, done


def test_ipv6(programs: Any, demo_onnx: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    agent = programs.agent(listen="[::1]:0")
    port = agent.address.rpartition(":")[2]
    programs.client("push", demo_onnx, "--to", f"[::1]:{port}", *QUICK)


def test_idle_programs_end_at_once_and_cleanly(programs: Any, eventually: Any) -> None:
    collector = programs.collector()
    agent = programs.agent(collector=collector.address)
    eventually(
        "the board is up",
        lambda: collector.metric("boardbench_device_up", device=agent.device_id),
    )
    assert agent.program.end(signal.SIGTERM) == 0
    assert collector.program.end(signal.SIGTERM) == 0
    assert not list(programs.folder.glob("*.ports")), "the port files are taken away"


def test_the_main_process_loads_no_engine(programs: Any, demo_onnx: Path, demo_tflite: Path) -> None:
    """NumPy and the engines are mapped by the worker, never by the process that stays."""
    agent = programs.agent()
    programs.client("push", demo_onnx, demo_tflite, "--to", agent.address, *QUICK)
    maps = Path(f"/proc/{agent.program.pid}/maps").read_text()
    assert "cygrpc" in maps
    for library in ("numpy", "onnxruntime", "ai_edge_litert", "psutil"):
        assert library not in maps
