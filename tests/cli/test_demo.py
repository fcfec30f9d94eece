"""The demo, played for real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from boardbench.cli import demo

psutil = pytest.importorskip("psutil", reason="the demo needs pip install 'boardbench[demo]'")
for needed in ("ai_edge_litert", "onnxruntime", "onnx", "flatbuffers", "aiohttp", "prometheus_client"):
    pytest.importorskip(needed, reason="the demo needs pip install 'boardbench[demo]'")


@pytest.fixture
def nothing_left(tmp_path):
    """A folder for the demo; afterwards it must be empty and no process may know it."""
    folder = tmp_path / "demo"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(process.info["cmdline"] or [])
    ]
    assert left == []


def test_it_plays_to_the_end_and_leaves_nothing(boardbench, nothing_left):
    done = boardbench("demo", "--duration", "0.2", TMPDIR=str(nothing_left))
    assert done.code == 0, done.err + done.out
    # The mark says what the measurement is worth, which is this machine's affair.
    assert re.search("^[✓!✗] demo_mobilenet_int8.tflite on ", done.out, re.MULTILINE)
    assert re.search("^[✓!✗] demo_net.onnx on ", done.out, re.MULTILINE)
    assert re.search(r"not taken by \w*XNNPack\w*:", done.out), "an op stays behind, and is named"
    medians = re.findall(
        r'boardbench_latency_seconds\{.*model="(demo_\w+\.\w+)".*percentile="50".*\} (\S+)', done.out
    )
    assert [name for name, _ in medians] == ["demo_mobilenet_int8.tflite", "demo_net.onnx"]
    assert 'boardbench_device_up{device="' in done.out
    assert "boardbench demo --stay" in done.out
    assert done.err == ""


def test_nothing_is_left_to_be_imported_where_a_signal_interrupts(nothing_left):
    """An import that is broken off leaves its file open."""
    program = """
import contextlib, sys
from boardbench.cli import demo, main
real, late = demo._Signals.let_through, set()
@contextlib.contextmanager
def let_through(signals):
    before = set(sys.modules)
    with real(signals):
        yield
    late.update(set(sys.modules) - before)
demo._Signals.let_through = let_through
code = main.main(["demo", "--duration", "0.1"])
assert code == 0, code
assert not late, sorted(late)
"""
    environment = {**os.environ, "TMPDIR": str(nothing_left)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_its_commands_can_be_typed_as_they_are_shown(tmp_path, monkeypatch):
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "boardbench", "boardbench-collector"):
        (programs / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    shown = demo._where_to_go()
    assert "  .venv/bin/boardbench demo --stay " in shown
    assert "  .venv/bin/boardbench-collector serve " in shown
    monkeypatch.chdir("/")
    assert f"  {str(programs)[1:]}/boardbench demo --stay " in demo._where_to_go()
    monkeypatch.setenv("PATH", str(programs))
    assert "  boardbench demo --stay " in demo._where_to_go()


def read_until(stream, pattern):
    text = ""
    while not (found := re.search(pattern, text)):
        line = stream.readline()
        assert line, f"ended before {pattern!r}: {text}"
        text += line
    return found


def test_it_stays_until_ctrl_c_and_its_urls_answer(start, boardbench, nothing_left):
    running = start("demo", "--duration", "0.1", "--stay", TMPDIR=str(nothing_left))
    stdout = running.process.stdout
    web = read_until(stdout, r"(http://127\.0\.0\.1:\d+)/metrics")[1]
    asked = read_until(stdout, r"boardbench show (\w+) --collector (\S+)")
    with urllib.request.urlopen(f"{web}/metrics", timeout=10) as answer:
        assert b"boardbench_latency_seconds" in answer.read()
    shown = boardbench("show", asked[1], "--collector", asked[2])
    assert shown.code == 0, shown.err
    assert "demo_mobilenet_int8.tflite" in shown.out
    listed = boardbench("results", "--collector", asked[2])
    assert len(listed.out.splitlines()) == 3
    running.process.send_signal(signal.SIGINT)
    done = running.finished()
    assert done.code == 0, "Ctrl-C is how it is meant to end"
    assert done.err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after", ["Starting a collector", "Building two models", "Pushing both"])
def test_it_leaves_nothing_when_it_is_interrupted(start, nothing_left, after, number):
    running = start("demo", "--duration", "30", TMPDIR=str(nothing_left))
    read_until(running.process.stdout, after)
    running.process.send_signal(number)
    done = running.finished()
    assert done.code == 130
    assert "interrupted" in done.err
    assert "Traceback" not in done.err
    assert "The last words of" not in done.err


def test_it_says_that_it_was_interrupted_in_the_middle_of_a_measurement(start, nothing_left):
    running = start("demo", "--duration", "30", TMPDIR=str(nothing_left))
    deadline = time.monotonic() + 60
    while not any(b"MEASURE" in path.read_bytes() for path in nothing_left.rglob("runs/*.jsonl")):
        assert time.monotonic() < deadline and running.process.poll() is None
        time.sleep(0.05)
    running.process.send_signal(signal.SIGINT)
    done = running.finished()
    assert done.code == 130
    assert done.err.strip() == "boardbench: interrupted"


def test_a_program_that_breaks_is_told_with_the_end_of_its_log(boardbench, nothing_left, tmp_path):
    package = tmp_path / "path" / "boardbench" / "agent"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys; sys.exit('no agent today \\x1b[2J')")
    done = boardbench("demo", TMPDIR=str(nothing_left), PYTHONPATH=str(tmp_path / "path"))
    assert done.code == 1
    assert "the agent ended at once, with exit code 1" in done.err
    assert "The last words of the agent:\n  no agent today \\x1b[2J\n" in done.err
    assert "Traceback" not in done.err


def test_what_is_not_installed_is_named_with_the_command(boardbench, nothing_left, tmp_path):
    hide = tmp_path / "path"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name in ('aiohttp', 'onnx') else find(name, *more)\n"
    )
    done = boardbench("demo", TMPDIR=str(nothing_left), PYTHONPATH=str(hide))
    assert done.code == 1
    assert done.err == (
        "boardbench: the demo needs more of boardbench (aiohttp, onnx missing): "
        "pip install 'boardbench[demo]'\n"
    )


def test_settings_of_a_real_agent_and_collector_are_not_touched(boardbench, nothing_left, tmp_path):
    done = boardbench(
        "demo", "--duration", "0.1", TMPDIR=str(nothing_left),
        BOARDBENCH_AGENT_DATA_DIR=str(tmp_path / "real"), BOARDBENCH_AGENT_LISTEN="nonsense",
        BOARDBENCH_COLLECTOR_DATA_DIR=str(tmp_path / "real"), BOARDBENCH_COLLECTOR_HTTP="nonsense",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert not (tmp_path / "real").exists()


@pytest.mark.parametrize("number", demo.ENDING_SIGNALS)
def test_a_signal_waits_until_something_is_waited_for(number):
    before = signal.getsignal(number)
    with demo._Signals() as signals:
        signal.raise_signal(number)  # as between the opening of a log and the start of the process
        with pytest.raises(KeyboardInterrupt):
            signals.sleep(0)
        reached = []
        with pytest.raises(KeyboardInterrupt), signals.let_through():
            reached.append("the block")
        assert reached == [], "what came before interrupts before anything is begun"
    with demo._Signals() as signals, pytest.raises(KeyboardInterrupt), signals.let_through():
        signal.raise_signal(number)
        reached.append("after the signal")
    assert reached == []
    assert signal.getsignal(number) is before
