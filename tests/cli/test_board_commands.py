"""devices, models, runs, watch and cancel against a board on a real port."""

from __future__ import annotations

import json
import signal

import grpc
import pytest

from boardbench.v1 import agent_pb2, result_pb2


@pytest.fixture
def to(board):
    return ("--to", f"127.0.0.1:{board.port}")


@pytest.fixture
def run_on(board):
    """Puts a run on the board, without a client."""

    def begin(run_id, sample=None):
        request = agent_pb2.RunBenchmarkRequest(model_sha256=board.keep(b"m", "m.onnx"), run_id=run_id)
        run = board.runs[run_id] = board.RUN(request)
        run.tell(stage=agent_pb2.StageEvent(stage=result_pb2.STAGE_MEASURE))
        if sample is not None:
            run.finish(sample)
        return run

    return begin


def test_a_board_describes_itself_with_what_can_not_run_and_why(board, boardbench, to):
    done = boardbench("devices", *to)
    assert done.code == 0, done.err
    assert f"test-board at 127.0.0.1:{board.port}" in done.out
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "Runtimes ✓ tflite ai-edge-litert 2.3.0 tflite on cpu · CPython 3.11.7" in lines
    assert "✗ onnxruntime onnxruntime is not installed: pip install 'boardbench[onnx]'" in lines
    assert "Spool 2 results to send · 1 had to be dropped" in lines
    assert "Collector 10.0.0.1:7342 not connected: connection refused" in lines


def test_a_description_as_json(board, boardbench, to, closed_port):
    assert json.loads(boardbench("devices", *to, "--format", "json").out)["agent_version"] == "0.1.0"
    done = boardbench("devices", *to, "--to", f"127.0.0.1:{closed_port}", "--format", "json")
    assert done.code == 3
    assert [item["board"]["device_id"] for item in json.loads(done.out)] == ["test-board"]


def test_models_are_listed_and_deleted(board, boardbench, to):
    first = board.keep(b"1", "first.tflite")
    second = board.keep(b"2", "second.onnx")
    inputs = board.keep(b"3", "in.npz", agent_pb2.FILE_KIND_INPUTS)
    done = boardbench("models", *to)
    assert done.code == 0, done.err
    assert [line.split()[:3] for line in done.out.splitlines()] == [
        ["sha256", "name", "format"],
        [first[:12], "first.tflite", "tflite"],
        [second[:12], "second.onnx", "onnx"],
        [inputs[:12], "in.npz", "inputs"],
    ]
    assert len(json.loads(boardbench("models", *to, "--format", "json").out)) == 3
    done = boardbench("models", *to, "rm", first[:10].upper(), "second.onnx")
    assert done.code == 0, done.err
    assert list(board.stored) == [inputs]
    assert done.err == f"{first} is deleted\n{second} is deleted\n"


def test_a_model_that_is_needed_or_not_there_is_told_and_the_others_go(board, boardbench, to):
    needed = board.keep(b"1", "needed.tflite")
    board.stored[needed].in_use = True
    other = board.keep(b"2", "other.tflite")
    done = boardbench("models", "rm", needed, "ffff", other, "--quiet", *to)
    assert done.code == 1
    assert list(board.stored) == [needed]
    told = done.err.splitlines()
    assert "a run needs it: cancel the run first" in told[0]
    assert "no model 'ffff' on 127.0.0.1" in told[1]
    assert "`boardbench models --to" in told[1]
    assert len(told) == 2


def test_runs_are_listed(board, boardbench, to, run_on, sample):
    run_on("aaaa1111", sample("failed_sigsegv"))
    run_on("bbbb2222")
    done = boardbench("runs", *to)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[1][0] == "aaaa1111"
    assert rows[1][-1] == "FAILED"
    assert rows[2][-2:] == ["running:", "measuring"]
    assert len(json.loads(boardbench("runs", *to, "--format", "json").out)) == 2


def test_watching_follows_a_run_to_its_result(board, start, to, run_on, sample, wait_until):
    run = run_on("abcd1234")
    running = start("watch", "abc", *to)
    wait_until(lambda: "WatchRun" in board.calls, "the call")
    run.finish(sample("success"))
    done = running.finished()
    assert done.code == 0, done.err
    assert "✓ mobilenet" in done.out


def test_watching_a_run_that_ended_shows_its_result_whole(boardbench, to, run_on, sample):
    run_on("abcd1234", sample("partly_placed"))
    brief = boardbench("watch", "abcd1234", *to)
    whole = boardbench("watch", "abcd1234", *to, "--full")
    assert "and 3 more: --full shows all" in brief.out
    assert "#77" not in brief.out
    assert "#77" in whole.out
    document = json.loads(boardbench("watch", "abcd1234", *to, "--format", "json").out)
    assert len(document["placement"]["ops"]) == 79


def test_watching_a_failed_run_exits_with_1(boardbench, to, run_on, sample):
    run_on("abcd1234", sample("failed_sigsegv"))
    assert boardbench("watch", "abcd1234", *to).code == 1


def test_ctrl_c_leaves_a_watched_run_alone(board, start, to, run_on, wait_until):
    run = run_on("abcd1234")
    running = start("watch", "abcd1234", *to)
    wait_until(lambda: "WatchRun" in board.calls, "the call")
    running.process.send_signal(signal.SIGINT)
    done = running.finished(20)
    assert done.code == 130
    assert done.err == "boardbench: interrupted\n"
    assert not run.ended


def test_a_run_is_cancelled_by_the_first_digits_of_its_id(board, boardbench, to, run_on):
    run_on("aaaa1111")
    run_on("aabb2222")
    done = boardbench("cancel", "aab", *to)
    assert done.code == 0, done.err
    assert board.cancelled == ["aabb2222"]
    assert done.err == "aabb2222 is cancelled\n"
    assert boardbench("cancel", "aab", *to).err == "aabb2222 had ended before\n"


@pytest.mark.parametrize("command", ["watch", "cancel"])
def test_an_id_that_is_not_clear_is_told(boardbench, to, run_on, command):
    run_on("aaaa1111")
    run_on("aabb2222")
    done = boardbench(command, "aa", *to)
    assert done.code == 1
    assert "'aa' names 2 runs" in done.err
    done = boardbench(command, "ff", *to)
    assert done.code == 1
    assert "no run 'ff'" in done.err


def test_empty_lists_say_nothing_where_nobody_watches(boardbench, to):
    for command in (("runs",), ("models",)):
        done = boardbench(*command, *to)
        assert (done.code, done.out, done.err) == (0, "", "")
        assert boardbench(*command, *to, "--format", "json").out == "[]\n"


def test_a_board_that_fails_is_told(board, boardbench, to):
    def fail(request, context):
        context.abort(grpc.StatusCode.INTERNAL, "the disk fails (EIO)")

    board.ListRuns = fail
    board.stop()
    board.start()
    done = boardbench("runs", *to)
    assert done.code == 1
    assert "the disk fails (EIO)" in done.err
