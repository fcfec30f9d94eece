"""The CLI with a real agent and a real collector, each in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

for needed in ("psutil", "aiohttp", "prometheus_client", "ai_edge_litert"):
    pytest.importorskip(needed, reason="needs pip install 'boardbench[agent,collector,tflite]'")


class Part:
    """A program of ours on a free port."""

    def __init__(self, folder, environment, wait_until, name, *arguments):
        folder.mkdir()
        self._ports = folder / "ports.json"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", f"boardbench.{name}", "serve", "--listen", "127.0.0.1:0"),
                    *("--data-dir", str(folder / "data"), "--port-file", str(self._ports), *arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
            )
        wait_until(self._answers, f"the {name} to start", 60)
        self.address = f"127.0.0.1:{json.loads(self._ports.read_text())['grpc']}"

    def _answers(self):
        assert self.process.poll() is None, self._log.read_text()
        return self._ports.exists()

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, module_environment, module_wait_until):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "agent.toml").touch()
    collector = Part(
        folder / "collector", module_environment, module_wait_until, "collector", "--http", "127.0.0.1:0"
    )
    try:
        agent = Part(
            folder / "agent", module_environment, module_wait_until, "agent", "--device-id", "test-agent",
            "--config", str(folder / "agent.toml"), "--collector", collector.address,
        )  # fmt: skip
        try:
            yield agent, collector
        finally:
            agent.stop()
    finally:
        collector.stop()


@pytest.fixture
def to(parts):
    return ("--to", parts[0].address)


@pytest.fixture
def at(parts):
    return ("--collector", parts[1].address)


@pytest.fixture
def small_model(shared_models):
    return shared_models / "split_concat.tflite"


def test_a_pushed_model_arrives_at_the_collector_as_the_client_saw_it(
    boardbench, to, at, small_model, wait_until
):
    done = boardbench("push", small_model, *to, "--duration", "0.1", "--format", "json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["board"]["device_id"] == "test-agent"

    def arrived():
        return boardbench("show", result["run_id"][:10], *at, "--format", "json").code == 0

    wait_until(arrived, "the result at the collector")
    shown = json.loads(boardbench("show", result["run_id"][:10], *at, "--format", "json").out)
    assert shown == result
    listed = boardbench("results", *at, "--model", small_model.name, "--device", "test-agent")
    assert result["run_id"][:8] in listed.out
    devices = boardbench("devices", *at)
    assert "test-agent" in devices.out
    assert "tflite" in devices.out


def test_a_file_is_pushed_once(boardbench, to, small_model):
    first = boardbench("push", small_model, *to, "--no-run")
    again = boardbench("push", small_model, *to, "--no-run")
    assert (first.code, again.code) == (0, 0)
    assert first.out == again.out
    listed = json.loads(boardbench("models", *to, "--format", "json").out)
    assert [item["model"]["name"] for item in listed].count(small_model.name) == 1


def test_ctrl_c_cancels_a_run_on_a_real_board(start, boardbench, to, small_model, wait_until):
    running = start("push", small_model, *to, "--duration", 300, "--format", "json")

    def measuring():
        runs = json.loads(boardbench("runs", *to, "--format", "json").out)
        return any(run["state"] == "RUN_STATE_RUNNING" for run in runs)

    wait_until(measuring, "the run", 60)
    running.process.send_signal(signal.SIGINT)
    done = running.finished()
    assert done.code == 130, done.err
    result = json.loads(done.out)
    assert result["status"] == "RUN_STATUS_CANCELLED"
    runs = json.loads(boardbench("runs", *to, "--format", "json").out)
    assert {run["run_id"]: run["status"] for run in runs}[result["run_id"]] == "RUN_STATUS_CANCELLED"


def test_a_detached_run_can_be_followed_and_cancelled(start, boardbench, to, small_model):
    done = boardbench("push", small_model, *to, "--duration", 300, "--detach")
    assert done.code == 0, done.err
    run_id = done.out.strip()
    behind = boardbench("push", small_model, *to, "--duration", "0.1", "--detach").out.strip()
    assert boardbench("cancel", run_id[:12], *to).code == 0
    watched = boardbench("watch", run_id, *to, "--format", "json")
    assert watched.code == 1
    assert json.loads(watched.out)["status"] == "RUN_STATUS_CANCELLED"
    assert boardbench("watch", behind, *to).code == 0, "what waited runs next"


def test_what_the_board_refuses_is_told(boardbench, to, tmp_path, small_model):
    text = tmp_path / "notes.tflite"
    text.write_text("no model at all")
    done = boardbench("push", text, *to)
    assert done.code == 1
    assert "notes.tflite" in done.err
    done = boardbench("push", small_model, *to, "--runtime", "warpdrive")
    assert done.code == 1
    assert "warpdrive" in done.err
    assert "tflite" in done.err, "what there is instead"


def test_models_go_when_they_are_deleted(boardbench, to, small_model):
    sha256 = boardbench("push", small_model, *to, "--no-run").out.split()[0]
    assert boardbench("models", "rm", sha256[:16], *to).code == 0
    assert sha256 not in boardbench("models", *to, "--format", "json").out


def test_a_board_describes_itself(boardbench, to, at):
    done = boardbench("devices", *to)
    assert done.code == 0, done.err
    assert "test-agent" in done.out
    assert "✓" in done.out
    assert f"{at[1]} connected" in " ".join(done.out.split())


def test_every_engine_of_a_real_board_runs_a_model_and_is_compared(boardbench, to, shared_models):
    pytest.importorskip("openvino", reason="needs pip install 'boardbench[openvino]'")
    model = shared_models / "mobilenet_v1_0.25_128_quant.tflite"
    listed = json.loads(boardbench("runtimes", model, *to, "--format", "json").out)
    assert [(entry["name"], entry["can_run"], entry["default"]) for entry in listed] == [
        ("tflite", True, True),
        ("openvino", True, False),
    ]
    done = boardbench(
        *("push", model, *to, "--runtime", "all", "--interleave", "--processes", "2", "--duration", "0.1"),
        *("--threads", "1", "--no-profile", "--format", "json"),
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    first, second = document["engines"]
    assert (first["runtime"], second["runtime"]) == ("tflite", "openvino")
    assert second["difference"]["from"] == "tflite"
    assert second["difference"]["elements"] == second["difference"]["compared"] == 1001
    assert second["difference"]["verdict"] in ("same bytes", "close", "rough")
    assert document["results"][0]["comparisons"][0]["run_id"] == document["results"][1]["run_id"]


def test_a_real_engine_loads_from_what_it_kept(boardbench, to, shared_models):
    pytest.importorskip("openvino", reason="needs pip install 'boardbench[openvino]'")
    model = shared_models / "mobilenet_v1_0.25_128_quant.tflite"

    def push(*more):
        arguments = ("--runtime", "openvino", "--duration", "0.05", "--no-profile", *more)
        done = boardbench("push", model, *to, *arguments, "--format", "json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    assert "caches" not in push()
    cold, warm = push("--cache", "keep"), push("--cache", "keep")
    assert [result["caches"][0]["warm"] for result in (cold, warm)] == [False, True]
    assert cold["caches"][0]["path"] == warm["caches"][0]["path"]
    assert int(warm["caches"][0]["size_bytes"]) > 100_000
    assert push("--cache", "renew")["caches"][0]["warm"] is False
    page = boardbench("push", model, *to, *("--runtime", "openvino", "--duration", "0.05", "--cache", "keep"))
    assert "from a warm cache (compiled blobs, " in page.out
    refused = boardbench("push", model, *to, "--runtime", "tflite", "--cache", "keep")
    assert refused.code == 1
    assert "tflite takes no cache (keep was asked for): leave it out, or choose openvino" in refused.err
