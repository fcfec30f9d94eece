"""boardbench-agent on the command line: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from boardbench.agent import cli
from boardbench.v1 import agent_pb2, result_pb2

BOARDS = Path(__file__).parent.parent / "boards"
QUICK = ("--duration", "0", "--min-runs", "3", "--warm-up", "0", "--warm-up-runs", "1")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "boardbench.agent", *map(str, arguments)]


@pytest.fixture
def ask(tmp_path: Path, fake_engine: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program to its end."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        first, *rest = arguments
        return subprocess.run(
            command(first, "--data-dir", tmp_path / "data", *rest),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )

    return run


# --- probe


def test_probe_as_json_is_what_describe_says(ask: Any) -> None:
    done = ask("probe", "--format", "json", "--device-id", "it", "--label", "lab=zurich")
    assert (done.returncode, done.stderr) == (0, "")
    described = json_format.Parse(done.stdout, agent_pb2.DescribeResponse())
    assert described.board.device_id == "it"
    assert described.board.labels == {"lab": "zurich"}
    assert described.board.cpu_count == os.cpu_count()
    assert {status.name: status.available for status in described.runtimes}["fake"]
    assert described.agent_version


def test_probe_for_a_person_says_what_and_why_not(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOARDBENCH_FAKE_IMPORT", '[{"signal": "SIGILL"}]')
    done = ask("probe", "--sys-root", BOARDS / "jetson_orin_nano", "--device-id", "it")
    assert done.returncode == 0
    for words in (
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "it",
        "6 × Cortex-A78AE",
        "tegra234 GPU (gpu) at /sys/bus/platform/devices/17000000.gpu",
        "fake: not available",
        "SIGILL",
    ):
        assert words in done.stdout


# --- run


def events(text: str) -> list[agent_pb2.RunEvent]:
    return [json_format.Parse(line, agent_pb2.RunEvent()) for line in text.splitlines()]


def test_run_as_json_lines(ask: Any, fake_model: Callable[..., Path]) -> None:
    done = ask("run", fake_model(), "--format", "jsonl", "--seed", 7, "--threads", 2, *QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    found = events(done.stdout)
    assert [event.sequence for event in found] == list(range(1, len(found) + 1))
    result = found[-1].result
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED
    assert {event.run_id for event in found} == {result.run_id}
    assert (result.spec.seed, result.spec.threads) == (7, 2)
    assert result.input_data.seed == 7
    assert (result.model.format, result.model.size_bytes) == ("fake", fake_model().stat().st_size)


def test_run_for_a_person(ask: Any, fake_model: Callable[..., Path]) -> None:
    done = ask("run", fake_model(inference=[{"sleep_seconds": 0.001}]), "--min-runs", 30, "--duration", 0)
    assert done.returncode == 0
    assert "boardbench-fake 1" in done.stdout
    assert "p50" in done.stdout
    assert "ms" in done.stdout
    assert "first inference" in done.stderr


def test_failed_run_is_exit_code_1_with_its_reason(ask: Any, fake_model: Callable[..., Path]) -> None:
    done = ask("run", fake_model(create=[{"stderr": "last words"}, {"exit_code": 9}]), *QUICK)
    assert done.returncode == 1
    assert "exited with 9 in the stage create" in done.stdout
    assert "| last words" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_cancels_the_run(
    fake_model: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    model = fake_model(create=[{"hang": True}])
    process = subprocess.Popen(
        command("run", model, "--format", "jsonl", "--data-dir", tmp_path), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "STAGE_CREATE" in line:
            break
    process.send_signal(number)
    last, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert events(last)[-1].result.status == result_pb2.RUN_STATUS_CANCELLED


def test_inputs_come_from_a_file(ask: Any, fake_model: Callable[..., Path], tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "in.npz", x=np.ones((1, 4), np.float32))
    done = ask("run", fake_model(), "--inputs", "in.npz", "--format", "jsonl", *QUICK)
    result = events(done.stdout)[-1].result
    assert result.input_data.source == "file"
    assert len(result.spec.inputs_sha256) == 64


def test_shapes_and_options_reach_the_engine(ask: Any, fake_model: Callable[..., Path]) -> None:
    model = fake_model(inputs=[{"name": "x", "dtype": "float32", "shape": [-1, -1]}])
    done = ask("run", model, "--shape", "x=2,3", "--option", "mode=noisy", "--format", "jsonl", *QUICK)
    result = events(done.stdout)[-1].result
    assert result.status == result_pb2.RUN_STATUS_SUCCEEDED, result.error.message
    assert list(result.effective_spec.shapes["x"].dimensions) == [2, 3]
    assert result.runtime.options["mode"] == "noisy"
    missing = ask("run", model, "--format", "jsonl", *QUICK)
    assert missing.returncode == 1
    assert "x" in events(missing.stdout)[-1].result.error.message


def test_model_is_left_where_it_is_and_nothing_else_stays(
    ask: Any, fake_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    model = fake_model()
    before = model.read_bytes()
    ask("run", model, *QUICK)
    assert model.read_bytes() == before
    assert list(scratch.iterdir()) == []


# --- usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "none.tflite"], ["none.tflite", "No such file"]),
        (["run", "garbage"], ["garbage", "no format known"]),
        (["run", "wrong.onnx"], ["wrong.onnx", "onnx", "fake"]),
        (["run", "m.fake", "--inputs", "m.fake"], ["m.fake", ".npz"]),
        (["run", "m.fake", "--shape", "x"], ["--shape", "'x'"]),
        (["run", "m.fake", "--shape", "x=1,y"], ["--shape", "x=1,y"]),
        (["run", "m.fake", "--option", "a=1", "--option", "a=2"], ["--option", "'a'", "twice"]),
        (["run", "m.fake", "--duration", "-1"], ["duration_seconds", "-1"]),
        (["run", "m.fake", "--seed", "-1"], ["range"]),
        (["run", "m.fake", "--threads", "99999999999"], ["range"]),
        (["run", "m.fake", "--threads", "two"], ["--threads", "two"]),
        (["run"], ["MODEL"]),
        (["run", "m.fake", "--dur", "1"], ["--dur"]),
        (["probe", "--config", "none.toml"], ["none.toml", "can't be read"]),
        (["serve", "--listen", "here"], ["--listen", "'here'"]),
        (["serve", "--label", "lab"], ["--label", "'lab'"]),
        (["fly"], ["fly"]),
        ([], ["serve"]),
    ],
)
def test_mistake_is_exit_code_2_and_says_which(
    tmp_path: Path, fake_engine: None, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "garbage").write_bytes(b"nothing in particular")
    (tmp_path / "m.fake").write_text("boardbench-fake/1\n{}")
    (tmp_path / "wrong.onnx").write_text("boardbench-fake/1\n{}")
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_runtime_that_is_not_there_is_exit_code_1(ask: Any, fake_model: Callable[..., Path]) -> None:
    done = ask("run", fake_model(), "--runtime", "tensorflow", *QUICK)
    assert done.returncode == 1
    assert "there is no runtime 'tensorflow'" in done.stderr
    assert "fake (boardbench-fake 1)" in done.stderr


def test_reader_that_goes_away_is_no_crash(fake_model: Callable[..., Path], tmp_path: Path) -> None:
    program = " ".join(command("probe", "--format", "json", "--data-dir", tmp_path))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} | true"], capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr


def test_version_is_the_one_that_is_installed() -> None:
    done = subprocess.run(command("--version"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"boardbench-agent {metadata.version('boardbench')}\n"


def test_missing_part_of_the_installation_is_told_with_the_command_that_mends_it() -> None:
    program = (
        "import sys; sys.modules['grpc_health'] = None; from boardbench.agent import cli; cli.main(['serve'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pip install 'boardbench[agent]'" in done.stderr
    assert "grpc_health" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_command_and_flag() -> None:
    text = cli.parser().format_help()
    for name in ("serve", "probe", "run"):
        assert name in text


def test_flags_of_run_are_those_of_the_client() -> None:
    """``boardbench run`` hands its options on as they are."""
    spec = pytest.importorskip("boardbench.cli.spec")
    whole = spec.Spec(
        runtime="fake",
        device="cpu",
        threads=1,
        options={"a": "b"},
        shapes={"x": (1, 2)},
        inputs=Path("in.npz"),
        seed=1,
        duration=1.0,
        min_runs=1,
        max_runs=2,
        warm_up=0.5,
        warm_up_runs=1,
        timeout=9.0,
        allow_fallback=True,
        profile_runs=7,
    )
    options = cli.parser().parse_args(["run", *whole.arguments(), "--", "m.fake"])
    assert cli._spec(options) == whole.message()
    assert options.inputs == Path("in.npz")
    strict = spec.Spec(strict=True, profile_runs=0)
    assert cli._spec(cli.parser().parse_args(["run", *strict.arguments(), "m"])) == strict.message()
    silent = cli._spec(cli.parser().parse_args(["run", "--no-profile", "m"]))
    assert silent.HasField("profile_runs") and silent.profile_runs == 0
    assert not cli._spec(cli.parser().parse_args(["run", "m"])).HasField("profile_runs")


def test_json_is_json(ask: Any) -> None:
    assert json.loads(ask("probe", "--format", "json").stdout)["board"]["architecture"] == os.uname().machine
