"""Running on this machine: with the agent's real code, and with one that misbehaves."""

from __future__ import annotations

import json
import re
import signal
import sys
import textwrap
from pathlib import Path

import pytest

ENGINE = pytest.importorskip(
    "ai_edge_litert", reason="no TFLite engine here: pip install 'boardbench[tflite]'"
)


@pytest.fixture
def small_model(shared_models):
    return shared_models / "mobilenet_v1_0.25_128_quant.tflite"


@pytest.fixture
def broken_agent(tmp_path):
    """The environment in which ``python -m boardbench.agent`` is the given script."""

    def make(script):
        package = tmp_path / "path" / "boardbench" / "agent"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(textwrap.dedent(script))
        return {"PYTHONPATH": str(tmp_path / "path")}

    return make


def test_a_real_model_is_measured_here(boardbench, small_model, tmp_path):
    done = boardbench("run", small_model, "--duration", "0.1", "--threads", 1, TMPDIR=str(tmp_path))
    assert done.code == 0, done.err
    # The mark says what the measurement is worth, which is this machine's affair.
    assert re.search(r"^[✓!✗] mobilenet_v1_0\.25_128_quant\.tflite on ", done.out, re.MULTILINE)
    assert "1 thread" in done.out
    assert "p50" in done.out
    assert "on the CPU, as asked: all 31 ops" in done.out
    assert done.err == ""


def test_several_models_give_an_array_and_one_that_fails_exits_with_1(boardbench, shared_models):
    models = [shared_models / "split_concat.tflite", shared_models / "model_invoking_error.tflite"]
    done = boardbench("run", *models, "--duration", "0.1", "--format", "json")
    assert done.code == 1
    results = json.loads(done.out)
    assert [result["status"] for result in results] == ["RUN_STATUS_SUCCEEDED", "RUN_STATUS_FAILED"]
    assert results[1]["error"]["code"] == "model_rejected"


def test_what_can_not_be_begun_is_told_in_the_agents_words(boardbench, tmp_path):
    path = tmp_path / "text.tflite"
    path.write_text("this is no model, whatever its name says")
    done = boardbench("run", path)
    assert done.code == 2
    assert "text.tflite" in done.err
    assert "boardbench-agent" not in done.err, "nobody called that"


def test_ctrl_c_ends_a_real_run_and_leaves_no_process(start, small_model, wait_until):
    psutil = pytest.importorskip("psutil")
    running = start("run", small_model, "--duration", 60)
    started = []

    def worker_runs():
        started[:] = psutil.Process(running.process.pid).children(recursive=True)
        return len(started) >= 2

    wait_until(worker_runs, "the agent's part and, below it, a worker")
    running.process.send_signal(signal.SIGINT)
    done = running.finished()
    assert done.code == 130
    assert "interrupted" in done.err
    assert "could not be run" not in done.err
    assert psutil.wait_procs(started, timeout=20)[1] == []


def test_ctrl_c_shows_what_the_cancelled_run_has_to_tell(
    start, broken_agent, model_file, tmp_path, wait_until
):
    ready = tmp_path / "ready"
    environment = broken_agent(
        f"""
        import pathlib, signal
        def stop(*_):
            print('{{"run_id": "r", "result": {{"status": "RUN_STATUS_CANCELLED"}}}}', flush=True)
            raise SystemExit(1)
        signal.signal(signal.SIGTERM, stop)
        pathlib.Path({str(ready)!r}).touch()
        signal.pause()
        """
    )
    running = start("run", model_file, model_file, "--format", "json", **environment)
    wait_until(ready.exists, "the start of the agent's part")
    running.process.send_signal(signal.SIGINT)
    done = running.finished()
    assert done.code == 130
    assert json.loads(done.out) == [{"status": "RUN_STATUS_CANCELLED"}], "the second never began"
    assert done.err == "boardbench: interrupted\n"


def test_a_second_ctrl_c_ends_an_agent_that_does_not_listen(
    start, broken_agent, model_file, tmp_path, wait_until
):
    ready, told = tmp_path / "ready", tmp_path / "told"
    environment = broken_agent(
        f"""
        import pathlib, signal
        signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(told)!r}).touch())
        pathlib.Path({str(ready)!r}).touch()
        while True:
            signal.pause()
        """
    )
    running = start("run", model_file, **environment)
    wait_until(ready.exists, "the start of the agent's part")
    running.process.send_signal(signal.SIGINT)
    wait_until(told.exists, "the polite request")
    running.process.send_signal(signal.SIGINT)
    done = running.finished()
    assert done.code == 130
    assert "Traceback" not in done.err


def test_a_missing_part_is_named_with_the_command_that_mends_it(boardbench, broken_agent, model_file):
    environment = broken_agent("raise ModuleNotFoundError(\"No module named 'psutil'\", name='psutil')")
    done = boardbench("run", model_file, **environment)
    assert done.code == 1
    assert "(psutil is missing): pip install 'boardbench[agent,tflite,onnx]'" in done.err
    assert "Traceback" not in done.err


def test_an_agent_that_dies_without_a_result_is_told_with_its_words(boardbench, broken_agent, model_file):
    environment = broken_agent(
        """
        import os, sys
        print('{"run_id": "r", "sequence": 1, "stage": {"stage": "STAGE_MEASURE"}}', flush=True)
        sys.stderr.write("boardbench-agent: the disk is on fire\\n")
        sys.stderr.flush()
        os._exit(7)
        """
    )
    done = boardbench("run", model_file, **environment)
    assert done.code == 1
    assert done.err == "boardbench: model.tflite could not be run here: the disk is on fire\n"


def test_an_agent_that_dies_in_silence_is_told(boardbench, broken_agent, model_file):
    done = boardbench("run", model_file, **broken_agent("import os; os.kill(os.getpid(), 9)"))
    assert done.code == 1
    assert "it ended with exit code -9 and said nothing" in done.err


def test_what_is_no_event_is_told(boardbench, broken_agent, model_file):
    done = boardbench("run", model_file, **broken_agent("print('hello')"))
    assert done.code == 1
    assert "printed something that is no event: 'hello'" in done.err


def test_events_of_a_newer_agent_are_taken(boardbench, broken_agent, model_file):
    environment = broken_agent(
        """
        print('{"run_id": "r", "sequence": 1, "shiny_new_event": {}}')
        print('{"run_id": "r", "sequence": 2, "result": {"run_id": "r", "status": "RUN_STATUS_SUCCEEDED"}}')
        """
    )
    done = boardbench("run", model_file, "--format", "json", **environment)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"run_id": "r", "status": "RUN_STATUS_SUCCEEDED"}


def test_an_agent_that_does_not_end_is_ended(boardbench, broken_agent, model_file, monkeypatch):
    environment = broken_agent(
        """
        import signal, sys, time
        print('{"run_id": "r", "result": {"run_id": "r", "status": "RUN_STATUS_SUCCEEDED"}}', flush=True)
        time.sleep(3600)
        """
    )
    done = boardbench("run", model_file, "--format", "json", **environment)
    assert done.code == 0


def test_the_options_of_a_run_are_those_of_the_agent(small_model, boardbench, tmp_path):
    numpy = pytest.importorskip("numpy")
    inputs = tmp_path / "in.npz"
    numpy.savez(inputs, input=numpy.zeros((1, 128, 128, 3), "uint8"))
    done = boardbench(
        "run", small_model, "--format", "json", "--runtime", "tflite", "--device", "cpu", "--threads", 1,
        "--inputs", inputs, "--seed", 7, "--duration", 0, "--min-runs", 3, "--max-runs", 3,
        "--warm-up", 0, "--warm-up-runs", 1, "--timeout", 60, "--option", "xnnpack=off",
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["latency"]["count"] == 3
    assert result["input_data"]["source"] == "file"
    asked = result["spec"]
    assert asked["runtime"] == "tflite"
    assert asked["options"] == {"xnnpack": "off"}
    assert (asked["min_runs"], asked["max_runs"], asked["timeout_seconds"]) == (3, 3, 60.0)


def test_a_delegate_of_this_folder_and_its_options_reach_the_engine(
    boardbench, small_model, edgetpu_standin, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    library = tmp_path / "libmine.so"
    library.symlink_to(edgetpu_standin)
    done = boardbench(
        *("run", small_model, "--delegate", "libmine.so", "--duration", "0.1", "--format", "json"),
        *("--delegate-option", "claim=ops", "--delegate-option", "claim_types=SOFTMAX", "--no-profile"),
    )
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["runtime"]["options"]["delegate"] == str(library)
    assert result["runtime"]["options"]["delegate.claim_types"] == "SOFTMAX"
    taken = [op["type"] for op in result["placement"]["ops"] if op.get("delegate") == "libmine.so"]
    assert taken == ["SOFTMAX"]


def test_a_core_ml_package_is_a_folder_and_travels_as_one_file(boardbench):
    package = Path(__file__).resolve().parents[1] / "coreml" / "affine.mlpackage"
    done = boardbench("run", package, "--format", "json")
    if sys.platform == "darwin":
        result = json.loads(done.out)
        assert (result["model"]["name"], result["model"]["format"]) == ("affine.mlpackage", "coreml")
    else:
        assert done.code == 1
        assert "can run affine.mlpackage (coreml): coreml: Core ML needs macOS" in done.err


def test_another_folder_is_no_model(boardbench, tmp_path):
    done = boardbench("run", tmp_path)
    assert done.code == 2
    assert "give the path of a model file, or of an .mlpackage" in done.err


def test_every_engine_here_runs_a_model_and_is_compared(boardbench, small_model):
    pytest.importorskip("openvino", reason="needs pip install 'boardbench[openvino]'")
    done = boardbench(
        *("run", small_model, "--runtime", "all", "--duration", "0.05", "--no-profile", "--format", "json")
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert [row["runtime"] for row in document["engines"]] == ["tflite", "openvino"]
    assert document["engines"][1]["difference"]["from"] == "tflite"
    assert len(document["results"]) == 2


def test_a_setting_that_the_engine_does_not_take_is_refused_with_those_that_do(boardbench, small_model):
    done = boardbench("run", small_model, "--runtime", "tflite", "--compute", "float16")
    assert done.code == 1
    assert "tflite takes no compute_precision (float16 was asked for): leave it out" in done.err
