"""The worker as the agent sees it: a real process, its events, and how it ends."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from boardbench.agent.bench import runtimes
from boardbench.v1 import placement_pb2, result_pb2

AGENT = Path(__file__).resolve().parents[3] / "agent"
WORKER = AGENT / "boardbench" / "agent" / "bench" / "__main__.py"
ENGINES = ", ".join(engine.name for engine in runtimes.offered({"BOARDBENCH_FAKE_RUNTIME": "1"}))
STAGES = ["IMPORT", "CREATE", "INPUTS", "FIRST_INFERENCE", "WARM_UP", "MEASURE", "REPORT"]

Make = Callable[..., dict[str, Any]]

posix = pytest.mark.skipif(os.name != "posix", reason="signals")
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel to kill")


def test_a_run_tells_its_stages_in_order_and_ends_with_the_result(worker: Any, fake_job: Make) -> None:
    outcome = worker.run(fake_job(job={"progress_seconds": 0.0}))
    assert outcome.exit_code == 0
    assert outcome.stages == STAGES
    result = outcome.result
    assert result["latency"]["count"] == 20
    assert len(result["latency"]["samples_nanoseconds"]) == 20
    assert [phase["phase"].removeprefix("MEMORY_PHASE_") for phase in result["memory"]["phases"]] == [
        "BASELINE", "LOADED", "FIRST_INFERENCE", "STEADY",
    ]  # fmt: skip
    assert result["input_data"]["source"] == "seeded"
    assert set(result["output_sha256"]) == {"y"}
    progress = [event["progress"] for event in outcome.of("progress")]
    assert {event["stage"] for event in progress} == {"STAGE_WARM_UP", "STAGE_MEASURE"}
    assert progress[-1]["fraction"] == 1.0
    assert progress[-1]["runs"] == 20


def test_the_result_is_the_message_of_the_wire(worker: Any, fake_job: Make) -> None:
    result = worker.run(fake_job(ops=[{"type": "ADD", "unit": "UNIT_TPU"}])).result
    message = json_format.ParseDict(result, result_pb2.RunResult())
    assert message.latency.count == 20
    assert message.placement.ops[0].unit == placement_pb2.UNIT_TPU
    assert message.placement.standin
    assert message.HasField("first_inference_seconds")
    assert message.runtime.interpreter.path == sys.executable
    assert message.environment.page_size_bytes >= 4096


def test_the_spec_that_was_run_has_every_default_filled_in(worker: Any, fake_job: Make) -> None:
    job = fake_job(
        inputs=[{"name": "x", "dtype": "int8", "shape": [-1, 4]}],
        job={"shapes": {"x": [2, 4]}, "seed": 2**64 - 1, "threads": 1},
    )
    spec = worker.run(job).result["effective_spec"]
    expected = {
        "runtime": "fake", "device": "cpu", "options": {"mode": "plain"}, "threads": 1,
        "shapes": {"x": {"dimensions": [2, 4]}}, "seed": 2**64 - 1, "duration_seconds": 0.0,
        "min_runs": 20, "max_runs": 1_000_000, "warm_up_seconds": 0.0, "warm_up_runs": 2,
        "confidence": 0.95, "scenario": {"kind": "SCENARIO_KIND_SINGLE_STREAM"},
        "cache": "CACHE_USE_NONE",
    }  # fmt: skip
    assert {key: spec[key] for key in expected} == expected
    assert not any(value for key, value in spec.items() if key not in expected)


def test_warnings_are_events_and_not_repeated_in_the_result(worker: Any, fake_job: Make) -> None:
    outcome = worker.run(fake_job(job={"min_runs": 3, "max_runs": 3}))
    assert "few_samples" in [event["warning"]["code"] for event in outcome.of("warning")]
    assert "warnings" not in outcome.result


def test_more_threads_than_processors_are_doubted(worker: Any, fake_job: Make) -> None:
    outcome = worker.run(fake_job(job={"threads": 4096}))
    assert "threads_exceed_processors" in [event["warning"]["code"] for event in outcome.of("warning")]


def test_equal_jobs_have_equal_data_and_outputs(worker: Any, fake_job: Make) -> None:
    first, second = (worker.run(fake_job(job={"seed": 3})).result for _ in range(2))
    other = worker.run(fake_job(job={"seed": 4})).result
    assert first["input_data"] == second["input_data"]
    assert first["output_sha256"] == second["output_sha256"]
    assert other["input_data"]["sha256"] != first["input_data"]["sha256"]
    assert other["output_sha256"] != first["output_sha256"]


def test_the_users_file_is_fed_and_settles_open_shapes(worker: Any, fake_job: Make, tmp_path: Path) -> None:
    file = tmp_path / "inputs.npz"
    np.savez(file, x=np.ones((3, 4), np.float32))
    job = fake_job(
        inputs=[{"name": "x", "dtype": "float32", "shape": [-1, 4]}], job={"inputs_path": str(file)}
    )
    result = worker.run(job).result
    assert result["inputs"] == [{"name": "x", "dtype": "float32", "shape": [3, 4]}]
    assert result["input_data"]["source"] == "file"
    assert "seed" not in result["input_data"]


def test_an_array_that_the_file_lacks_is_told_with_those_it_has(
    worker: Any, fake_job: Make, tmp_path: Path
) -> None:
    file = tmp_path / "inputs.npz"
    np.savez(file, x=np.ones((3, 4), np.float32))
    open_inputs = [{"name": name, "dtype": "float32", "shape": [-1, 4]} for name in ("x", "y")]
    error = worker.run(fake_job(inputs=open_inputs, job={"inputs_path": str(file)})).error
    assert error["code"] == "inputs_rejected"
    assert "leaves sizes open in y float32 [?, 4]" in error["message"]
    assert "the .npz holds x [3, 4]" in error["message"]


def test_output_of_the_engine_is_never_in_the_events(worker: Any, fake_job: Make) -> None:
    outcome = worker.run(
        fake_job(create=[{"stdout": '{"event":"error"}', "times": 5000}, {"stderr": "noise"}],
                 job={"options": {"mode": "noisy"}})
    )  # fmt: skip
    assert outcome.exit_code == 0
    assert {event["event"] for event in outcome.events} <= {"stage", "progress", "warning", "result"}
    assert outcome.output.count('{"event":"error"}') == 5000
    assert outcome.output.count("the fake engine ran") >= 20


# -- what goes wrong, told ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "job", "code", "said", "stages"),
    [
        ({"create": [{"reject": "bad graph"}]}, {}, "model_rejected", "bad graph", 2),
        ({"create": [{"memory_error": True}]}, {}, "out_of_memory", "smaller model", 2),
        ({"create": [{"raise": "std::bad_alloc"}]}, {}, "out_of_memory", "std::bad_alloc", 2),
        ({"create": [{"raise": "boom"}]}, {}, "internal", "RuntimeError: boom", 2),
        ({"create": [{"no_such_action": 1}]}, {}, "model_rejected", "no_such_action", 2),
        ({"ops": [{"type": "ADD"}]}, {}, "model_rejected", "malformed", 2),
        ({}, {"options": {"mode": "loud"}}, "option_rejected", "plain or noisy", 2),
        ({}, {"options": {"volume": "1"}}, "option_rejected", "no option volume", 2),
        ({}, {"device": "gpu"}, "option_rejected", "no device 'gpu'; it has cpu, faketpu", 2),
        ({}, {"shapes": {"z": [1]}}, "inputs_rejected", "no input 'z'", 2),
        ({"inputs": [{"name": "x", "dtype": "int8", "shape": [-1]}]}, {}, "inputs_rejected",
         "--shape 'x=1'", 2),
        ({"inputs": [{"name": "x", "dtype": "int7", "shape": [1]}]}, {}, "inputs_rejected", "int7", 3),
        ({"first_inference": [{"raise": "no kernel"}]}, {}, "inference_failed", "no kernel", 4),
        ({"first_inference": [{"memory_error": True}]}, {}, "out_of_memory", "", 4),
        ({"first_inference": [], "inference": [{"raise": "later"}]}, {}, "inference_failed", "later", 5),
        ({"first_inference": [], "inference": [{"raise": "later"}]}, {"warm_up_runs": 0}, "inference_failed",
         "later", 6),
        ({"placement": [{"raise": "profiler"}]}, {}, "inference_failed", "profiler", 7),
        ({}, {"runtime": "nosuch"}, "runtime_unavailable", f"knows {ENGINES}", 1),
        ({}, {"format": "onnx"}, "model_rejected", "fake runs fake models, and model.fake is onnx", 1),
        ({}, {"format": ""}, "model_rejected", "of no known format", 1),
        ({}, {"model_path": "/no/such/model"}, "model_rejected", "model", 2),
        ({}, {"inputs_path": "/no/such/inputs.npz"}, "inputs_rejected", "npz", 2),
        ({}, {"min_runs": 0}, "option_rejected", "min_runs", 0),
        ({}, {"min_runs": 5, "max_runs": 4}, "option_rejected", "max_runs", 0),
        ({}, {"duration_seconds": -1}, "option_rejected", "duration_seconds", 0),
        ({}, {"threads": 0}, "option_rejected", "threads", 0),
        ({}, {"warm_up_runs": -1}, "option_rejected", "warm_up_runs", 0),
        ({}, {"seed": -1}, "option_rejected", "seed", 0),
        ({}, {"colour": "red"}, "internal", "unknown fields: colour", 0),
        ({}, {"shapes": {"x": "1,2"}}, "internal", "can't be read", 0),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_code_in_its_stage(
    worker: Any,
    fake_job: Make,
    content: dict[str, Any],
    job: dict[str, Any],
    code: str,
    said: str,
    stages: int,
) -> None:
    outcome = worker.run(fake_job(job=job, **content))
    assert outcome.exit_code == 1
    assert (outcome.error["code"], outcome.stages) == (code, STAGES[:stages])
    assert said in outcome.error["message"]
    assert "Traceback" in outcome.output  # for whoever looks for the cause


def test_a_file_that_is_no_model_is_refused(worker: Any, fake_job: Make) -> None:
    job = fake_job()
    Path(job["model_path"]).write_bytes(b"\x00\xff")
    assert worker.run(job).error["code"] == "model_rejected"
    Path(job["model_path"]).write_text("another/1\n{}")
    assert "its first line is not boardbench-fake/1" in worker.run(job).error["message"]


@pytest.mark.parametrize("line", [b"\n", b"{\n", b"[]\n", b'{"kind":"dance"}\n', b"{}\n", b"\xff\n"])
def test_a_line_that_is_no_job_is_an_error(worker: Any, line: bytes) -> None:
    outcome = worker.run(line)
    assert (outcome.exit_code, outcome.error["code"]) == (1, "internal")


def test_the_fake_engine_is_not_there_unless_asked_for(worker: Any, fake_job: Make) -> None:
    outcome = worker.run(fake_job(), environ={"BOARDBENCH_FAKE_RUNTIME": ""})
    assert outcome.error["code"] == "runtime_unavailable"
    assert "fake" not in outcome.error["message"].partition("knows")[2]


# -- what goes wrong, untold: the process ends ----------------------------------------------------------


@posix
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGILL"])
@pytest.mark.parametrize(
    ("where", "stages"), [("create", 2), ("first_inference", 4), ("inference", 5), ("placement", 7)]
)
def test_a_crash_ends_it_by_its_signal_without_a_last_event(
    worker: Any, fake_job: Make, name: str, where: str, stages: int
) -> None:
    content = {"first_inference": [], where: [{"stdout": "last words"}, {"signal": name}]}
    outcome = worker.run(fake_job(**content))
    assert outcome.exit_code == -signal.Signals[name]
    assert outcome.stages == STAGES[:stages]
    assert not outcome.of("result") and not outcome.of("error")
    assert "last words" in outcome.output
    if name != "SIGKILL":
        assert "Fatal Python error" in outcome.output  # the Python stack of the crash


@posix
def test_a_crash_while_the_engine_is_imported(worker: Any, fake_job: Make) -> None:
    environ = {"BOARDBENCH_FAKE_IMPORT": json.dumps([{"signal": "SIGSEGV"}])}
    outcome = worker.run(fake_job(), environ=environ)
    assert (outcome.exit_code, outcome.stages) == (-signal.SIGSEGV, ["IMPORT"])
    assert worker.run({"kind": "probe", "runtime": "fake"}, environ=environ).exit_code == -signal.SIGSEGV


def test_an_exit_behind_our_back_keeps_its_code(worker: Any, fake_job: Make) -> None:
    outcome = worker.run(fake_job(inference=[{"exit_code": 42}]))
    assert (outcome.exit_code, outcome.of("result"), outcome.of("error")) == (42, [], [])


@posix
def test_an_engine_that_crashes_when_it_is_closed_takes_no_result_with_it(
    worker: Any, fake_job: Make
) -> None:
    crashed = worker.run(fake_job(close=[{"signal": "SIGSEGV"}]))
    assert crashed.exit_code == -signal.SIGSEGV
    assert crashed.result["latency"]["count"] == 20
    raised = worker.run(fake_job(close=[{"raise": "can't close"}]))
    assert raised.exit_code == 1
    assert raised.result["latency"]["count"] == 20  # and no error event after it
    assert "can't close" in raised.output


@pytest.mark.parametrize("fault", [{"raise": "refused"}, {"exit_code": 9}])
def test_an_engine_is_closed_after_a_failure_too(worker: Any, fake_job: Make, fault: dict[str, Any]) -> None:
    outcome = worker.run(fake_job(first_inference=[fault], close=[{"stdout": "closed"}]))
    assert ("closed" in outcome.output) == ("raise" in fault)


@posix
def test_exit_handlers_of_an_engine_have_no_say(worker: Any, fake_job: Make) -> None:
    assert worker.run(fake_job(create=[{"at_exit": [{"signal": "SIGABRT"}]}])).exit_code == 0


@pytest.mark.parametrize(
    ("content", "stage"),
    [
        ({"create": [{"hang": True}]}, "CREATE"),
        ({"first_inference": [{"hang": True}]}, "FIRST_INFERENCE"),
        ({"first_inference": [], "inference": [{"hang": True}]}, "WARM_UP"),
        ({"placement": [{"hang": True}]}, "REPORT"),
    ],
)
def test_a_hang_is_seen_in_its_stage_and_can_be_killed(
    worker: Any, fake_job: Make, content: dict[str, Any], stage: str
) -> None:
    child = worker.start(fake_job(**content))
    child.wait_for(lambda events: any(event.get("stage") == f"STAGE_{stage}" for event in events))
    assert child.process.poll() is None
    child.process.kill()
    outcome = child.outcome()
    assert outcome.stages[-1] == stage
    assert not outcome.of("result") and not outcome.of("error")


@linux
def test_memory_without_bound_is_told_when_the_limit_is_the_process_s_own(
    worker: Any, fake_job: Make, tmp_path: Path
) -> None:
    # A limit of address space turns the machine's end of memory into a MemoryError.
    limited = tmp_path / "limited-python"
    limited.write_text(f'#!/bin/sh\nulimit -v 3000000\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    job = fake_job(first_inference=[{"allocate_bytes": 4 << 30}])
    outcome = worker.run(job, python=str(limited))
    assert (outcome.exit_code, outcome.error["code"]) == (1, "out_of_memory")
    assert outcome.stages[-1] == "FIRST_INFERENCE"


def test_memory_that_is_taken_is_seen_in_its_phase(worker: Any, fake_job: Make) -> None:
    size = 96 << 20
    memory = worker.run(fake_job(create=[{"allocate_bytes": size}])).result["memory"]
    phases = {phase["phase"].removeprefix("MEMORY_PHASE_"): phase for phase in memory["phases"]}
    slack = 24 << 20
    assert phases["LOADED"]["rss_bytes"] - phases["BASELINE"]["rss_bytes"] == pytest.approx(size, abs=slack)
    assert memory["model_rss_bytes"] == pytest.approx(size, abs=slack)
    assert memory["peak_rss_bytes"] >= size


def test_no_test_may_take_the_machine_s_memory(worker: Any, fake_job: Make) -> None:
    outcome = worker.run(fake_job(create=[{"allocate_bytes": 1 << 40}]))
    assert outcome.error["code"] == "model_rejected"


# -- the life of the process ----------------------------------------------------------------------------


@linux
def test_it_never_outlives_whoever_started_it(tmp_path: Path, fake_job: Make) -> None:
    """A parent that is killed takes a hanging worker with it."""
    job = fake_job(create=[{"hang": True}])
    # The worker keeps the writing end open: our reading end sees its end only when it is dead.
    reading, writing = os.pipe()
    program = textwrap.dedent(
        """
        import json, subprocess, sys
        worker, descriptor, job = sys.argv[1:]
        child = subprocess.Popen(
            [sys.executable, worker, "--events-fd", descriptor],
            stdin=subprocess.PIPE, pass_fds=[int(descriptor)],
        )
        child.stdin.write(job.encode() + b"\\n")
        child.stdin.flush()
        child.wait()
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(WORKER), str(writing), json.dumps(job)],
        pass_fds=[writing],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "BOARDBENCH_FAKE_RUNTIME": "1"},
    )
    os.close(writing)
    with open(reading, "rb") as events:
        for line in events:
            if json.loads(line) == {"event": "stage", "stage": "STAGE_CREATE"}:
                break
        parent.kill()
        parent.wait()
        assert events.read() == b""  # returns only when the worker is gone too


def test_it_ends_when_nobody_says_what_to_do(worker: Any) -> None:
    child = worker.start(b"")
    child.process.stdin.close()
    assert child.process.wait(60) == 1


def test_it_ends_quietly_when_nobody_listens(fake_job: Make) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, str(WORKER), "--events-fd", str(writing)],
        input=json.dumps(fake_job()).encode() + b"\n",
        pass_fds=[writing],
        capture_output=True,
        env={**os.environ, "BOARDBENCH_FAKE_RUNTIME": "1"},
        timeout=120,
    )
    os.close(writing)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


@linux
def test_what_an_engine_starts_does_not_hold_the_events_open(worker: Any, fake_job: Make) -> None:
    child = worker.start(fake_job(create=[{"hang": True}]))
    child.wait_for(lambda events: any(event.get("stage") == "STAGE_CREATE" for event in events))
    pid = child.process.pid
    flags = {
        str(link.readlink()): Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if int(link.name) > 2
    }
    pipes = [text for target, text in flags.items() if target.startswith("pipe:")]
    assert pipes
    for text in pipes:
        octal = next(line.split()[1] for line in text.splitlines() if line.startswith("flags:"))
        assert int(octal, 8) & os.O_CLOEXEC
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"


# -- probing --------------------------------------------------------------------------------------------


def test_a_probe_lists_every_engine_with_its_state(worker: Any) -> None:
    outcome = worker.run({"kind": "probe"})
    assert outcome.exit_code == 0
    (event,) = outcome.events
    found = {status["name"]: status for status in event["runtimes"]}
    environ = {"BOARDBENCH_FAKE_RUNTIME": "1"}
    assert list(found) == [engine.name for engine in runtimes.offered(environ)]
    for status in found.values():
        assert status["interpreter"]["path"] == sys.executable
        assert status["available"] == (status["reason"] == "") == (status["version"] != "")
        if status["available"]:
            assert status["devices"][0] == "cpu"
    assert found["fake"]["version"] == "boardbench-fake 1"


def test_one_engine_can_be_probed_alone(worker: Any) -> None:
    (event,) = worker.run({"kind": "probe", "runtime": "fake"}).events
    assert [status["name"] for status in event["runtimes"]] == ["fake"]
    outcome = worker.run({"kind": "probe", "runtime": "nosuch"})
    assert outcome.error["code"] == "runtime_unavailable"


def test_a_missing_engine_has_a_reason_and_a_command(worker: Any) -> None:
    """Under an isolated Python without any package, as a board's own often is."""
    (event,) = worker.run({"kind": "probe"}, python=sys._base_executable).events
    for status in event["runtimes"]:
        if "set BOARDBENCH_NATIVE_MODELS=1" in status["reason"]:
            assert status["name"] == "ell"  # needs no package, but leave to run what is a program
        elif status["name"] == "coreml" and sys.platform != "darwin":
            assert "needs macOS" in status["reason"]  # no command on this system brings it
        elif not status["available"] and status["name"] != "fake":
            assert "-m pip install" in status["reason"]
            assert status["reason"].startswith("no ")


# -- what the worker may need ---------------------------------------------------------------------------

SOURCES = [
    AGENT / "boardbench" / "agent" / "domain.py",
    *(AGENT / "boardbench" / "agent" / "bench").rglob("*.py"),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_its_sources_are_python_3_9(source: Path) -> None:
    tree = ast.parse(source.read_text(encoding="utf-8"), feature_version=(3, 9))
    unions = [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign | ast.arg | ast.FunctionDef)]
    lazy = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    assert lazy or not unions  # annotations are written as in newer versions


def test_listing_the_engines_imports_none_of_them() -> None:
    program = (
        "import sys, boardbench.agent.bench.probe, boardbench.agent.bench.job\n"
        "from boardbench.agent.bench import runtimes\n"
        "import os; os.environ['BOARDBENCH_FAKE_RUNTIME'] = '1'\n"
        "[runtimes.create(engine.name) for engine in runtimes.offered()]\n"
        "print(sorted({'numpy', 'onnxruntime', 'ai_edge_litert', 'tflite_runtime', 'google.protobuf', 'grpc',"
        " 'boardbench.agent.bench.plugins', 'boardbench.agent.bench.wheels'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(AGENT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_format_has_the_first_engine_that_takes_it() -> None:
    assert runtimes.default_for("tflite", {}) == "tflite"
    assert runtimes.default_for("onnx", {}) == "onnxruntime"
    assert runtimes.default_for("fake", {}) == ""
    assert runtimes.default_for("fake", {"BOARDBENCH_FAKE_RUNTIME": "1"}) == "fake"
    assert runtimes.default_for("nosuch", {}) == ""
