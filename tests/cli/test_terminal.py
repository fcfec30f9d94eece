"""What a person at a terminal sees: a real pseudo-terminal, the real command."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from boardbench.v1 import agent_pb2, result_pb2

fcntl = pytest.importorskip("fcntl", reason="pseudo-terminals are Unix")
pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A command with a terminal of 100 columns as stdout and stderr."""

    def __init__(self, environment, *arguments):
        self._near, far = pty.openpty()
        termios.tcsetwinsize(far, (40, 100)) if hasattr(termios, "tcsetwinsize") else fcntl.ioctl(
            far, termios.TIOCSWINSZ, b"\x28\x00\x64\x00\x00\x00\x00\x00"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "boardbench.cli", *map(str, arguments)],
            stdin=far, stdout=far, stderr=far, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(far)
        self.text = ""

    def read_until(self, pattern, seconds=30.0):
        """Reads on until all that was written matches."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text!r}"
            if not self._read(1.0) and self.process.poll() is not None:
                raise AssertionError(f"ended without {pattern!r}: {self.text!r}")

    def _read(self, seconds):
        if not select.select([self._near], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._near, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            return False
        self.text += data.decode("utf-8", "replace")
        return bool(data)

    def finish(self):
        while self.process.poll() is None:
            self._read(0.1)
        while self._read(0.1):
            pass
        return self.process.returncode

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._near)


@pytest.fixture
def terminal(environment):
    opened = []

    def run(*arguments, **more):
        opened.append(Terminal(environment | {"TERM": "xterm-256color"} | more, *arguments))
        return opened[-1]

    yield run
    for entry in opened:
        entry.close()


def words(text):
    return " ".join(re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", " ", text).split())


@pytest.fixture
def to(board):
    return ("--to", f"127.0.0.1:{board.port}")


@pytest.fixture
def slow_board(board):
    """A run that stops at half, until the test lets it go on."""

    def script(board, run):
        run.tell(queued=agent_pb2.QueuedEvent(runs_ahead=2))
        run.tell(stage=agent_pb2.StageEvent(stage=result_pb2.STAGE_CREATE))
        run.tell(
            progress=agent_pb2.ProgressEvent(
                stage=result_pb2.STAGE_MEASURE, runs=1234, fraction=0.5, median_seconds=0.00123
            )
        )

    board.script = script
    return board


def test_progress_is_drawn_and_gone_before_the_result(
    slow_board, terminal, to, model_file, wait_until, sample
):
    shown = terminal("push", model_file, *to)
    shown.read_until(r"measuring.*p50 1\.230 ms  1,234 runs")
    (run,) = slow_board.runs.values()
    run.finish(sample("success"))
    assert shown.finish() == 0
    assert "p50" in words(shown.text)
    assert "✓ mobilenet_v1_0.25_128_quant.tflite on pi5 (pi5-lab)" in words(shown.text)
    assert "\x1b[32m✓" in shown.text, "colours on a terminal"
    assert shown.text.rindex(SHOW) > shown.text.rindex(HIDE), "the cursor comes back"


@pytest.mark.parametrize(
    ("queued", "shown_as"),
    [
        (agent_pb2.QueuedEvent(), "waiting for its group"),
        (agent_pb2.QueuedEvent(runs_ahead=0), "next in line"),
        (agent_pb2.QueuedEvent(runs_ahead=2), "waiting for 2 runs"),
    ],
)
def test_what_a_run_waits_for_is_drawn(board, terminal, to, model_file, sample, queued, shown_as):
    board.script = lambda board, run: run.tell(queued=queued)
    shown = terminal("push", model_file, *to)
    shown.read_until(shown_as)
    (run,) = board.runs.values()
    run.finish(sample("success"))
    assert shown.finish() == 0


def test_an_upload_is_drawn(board, terminal, to, model_file, wait_until):
    passed = []

    def hold(chunk, context):
        if chunk.offset_bytes:
            wait_until(lambda: passed or not context.is_active(), "the go-ahead")

    board.on_chunk = hold
    shown = terminal("push", model_file, *to)
    shown.read_until(r"sending.* of 3\.0 MiB")
    passed.append(True)
    assert shown.finish() == 0


def test_the_cursor_comes_back_after_ctrl_c(slow_board, terminal, to, model_file):
    shown = terminal("push", model_file, *to)
    shown.read_until("measuring")
    shown.process.send_signal(signal.SIGINT)
    assert shown.finish() == 130
    assert "Cancelling the run on the board; Ctrl-C again leaves at once" in words(shown.text)
    assert slow_board.cancelled
    assert shown.text.rindex(SHOW) > shown.text.rindex(HIDE)


def test_an_outage_is_told_above_the_bars(slow_board, cable, terminal, model_file, sample):
    shown = terminal("push", model_file, "--to", f"127.0.0.1:{cable.port}")
    shown.read_until("measuring")
    cable.cut()
    shown.read_until(r"Trying again")
    cable.mend()
    (run,) = slow_board.runs.values()
    run.finish(sample("success"))
    assert shown.finish() == 0


def test_quiet_draws_nothing(board, terminal, to, model_file):
    shown = terminal("push", model_file, *to, "--quiet")
    assert shown.finish() == 0
    assert HIDE not in shown.text
    assert "measuring" not in shown.text


def test_no_color_means_no_styling_at_all(board, terminal, to, model_file):
    shown = terminal("push", model_file, *to, NO_COLOR="1")
    assert shown.finish() == 0
    assert re.findall(r"\x1b\[[0-9;]*m", shown.text) == []
    assert "✓ model.tflite on test-board" in words(shown.text)


def test_a_dumb_terminal_gets_plain_text(board, terminal, to, model_file):
    shown = terminal("push", model_file, *to, TERM="dumb")
    assert shown.finish() == 0
    assert "\x1b" not in shown.text


def test_a_terminal_without_utf8_loses_characters_and_nothing_else(board, terminal, to, model_file):
    shown = terminal("push", model_file, *to, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert shown.finish() == 0
    assert "model.tflite on test-board" in words(shown.text)


def test_json_stays_json_without_utf8(board, boardbench, to, model_file):
    done = boardbench("push", model_file, *to, "--format", "json", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.code == 0
    assert done.out.isascii()


def test_json_on_a_terminal_still_shows_progress_but_on_stderr_only(
    slow_board, terminal, to, model_file, sample
):
    shown = terminal("push", model_file, *to, "--format", "json")
    shown.read_until("measuring")
    (run,) = slow_board.runs.values()
    run.finish(sample("success"))
    assert shown.finish() == 0
    assert '"status": "RUN_STATUS_SUCCEEDED"' in shown.text


def test_an_empty_list_is_explained_to_a_person(board, terminal, to):
    shown = terminal("runs", *to)
    assert shown.finish() == 0
    assert f"no runs on 127.0.0.1:{board.port}" in shown.text


def test_a_detached_run_tells_how_to_follow_it(slow_board, terminal, to, model_file):
    shown = terminal("push", model_file, *to, "--detach")
    assert shown.finish() == 0
    (run_id,) = slow_board.runs
    assert f"boardbench watch {run_id[:8]} --to 127.0.0.1:{slow_board.port}" in words(shown.text)
