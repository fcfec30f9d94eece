"""Pushing through the real client over real sockets: transfer, resumption, runs, cancellation."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from pathlib import Path

import grpc
import pytest

from boardbench.v1 import agent_pb2, result_pb2

from .conftest import sample_result

MIB = 1 << 20


def test_a_model_is_sent_run_and_shown(board, boardbench, model_file):
    done = boardbench(
        "push", model_file, "--to", f"127.0.0.1:{board.port}", "--threads", 2, "--shape", "in=1,2"
    )
    assert done.code == 0, done.err
    assert done.err == "", "nothing but errors on a stderr that is no terminal"
    assert "✓ model.tflite on test-board" in done.out
    assert "p50  1.234 ms" in done.out
    sha256 = hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert bytes(board.contents[sha256]) == model_file.read_bytes()
    (run,) = board.runs.values()
    assert run.request.model_sha256 == sha256
    assert run.request.spec.threads == 2
    assert list(run.request.spec.shapes["in"].dimensions) == [1, 2]
    assert not run.request.spec.HasField("duration_seconds"), "what was not asked for is left to the board"


def test_no_figure_is_cut_off_on_a_narrow_terminal(board, boardbench, model_file):
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}", COLUMNS="40")
    assert "  p50  1.234 ms" in done.out
    assert "95 % bounds" in done.out
    assert "engine imported" in done.out
    assert "peak in phase" in done.out


def test_json_of_one_model_on_one_board_is_the_result(board, boardbench, model_file):
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}", "--format", "json")
    assert done.code == 0
    document = json.loads(done.out)
    assert document["status"] == "RUN_STATUS_SUCCEEDED"
    assert document["run_id"] in board.runs
    assert document["latency"]["percentiles"][0]["percentile"] == 50


def test_json_of_several_is_an_array_by_model_then_board(
    board, another_board, boardbench, model_file, tmp_path
):
    other = tmp_path / "other.onnx"
    other.write_bytes(b"other")
    to = [f"127.0.0.1:{board.port}", f"127.0.0.1:{another_board.port}", f"127.0.0.1:{board.port}"]
    done = boardbench(
        "push", model_file, other, "--to", to[0], "--to", to[1], "--to", to[2], "--format", "json"
    )
    assert done.code == 0, done.err
    assert [(result["model"]["name"], result["board"]["hostname"]) for result in json.loads(done.out)] == [
        ("model.tflite", "test-board"),
        ("model.tflite", "another-board"),
        ("other.onnx", "test-board"),
        ("other.onnx", "another-board"),
    ], "a board that is named twice works once"


def test_several_results_end_with_a_comparison(board, boardbench, model_file, tmp_path):
    other = tmp_path / "other.onnx"
    other.write_bytes(b"other")
    done = boardbench("push", model_file, other, "--to", f"127.0.0.1:{board.port}")
    assert done.code == 0
    comparison = done.out.splitlines()[-3:]
    assert comparison[0].split()[:4] == ["model", "board", "runtime", "p50"]
    assert [line.split()[0] for line in comparison[1:]] == ["model.tflite", "other.onnx"]


def test_a_file_that_the_board_has_is_not_sent_again(board, cable, boardbench, model_file):
    to = ("--to", f"127.0.0.1:{cable.port}")
    assert boardbench("push", model_file, *to).code == 0
    before = board.received_bytes, cable.to_board_bytes
    assert boardbench("push", model_file, *to).code == 0
    assert board.received_bytes == before[0]
    assert cable.to_board_bytes - before[1] < 4096


def test_inputs_are_sent_first_and_named_in_the_spec(board, boardbench, model_file, tmp_path):
    inputs = tmp_path / "in.npz"
    inputs.write_bytes(b"PK..")
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}", "--inputs", inputs)
    assert done.code == 0, done.err
    assert [(header.name, header.kind) for header in board.headers] == [
        ("in.npz", agent_pb2.FILE_KIND_INPUTS),
        ("model.tflite", agent_pb2.FILE_KIND_MODEL),
    ]
    (run,) = board.runs.values()
    assert run.request.spec.inputs_sha256 == hashlib.sha256(b"PK..").hexdigest()


def test_a_broken_upload_goes_on_where_it_stopped(board, cable, boardbench, tmp_path):
    path = tmp_path / "large.tflite"
    path.write_bytes(bytes(range(256)) * (12 * MIB // 256))
    cable.cut_after(5 * MIB)
    done = boardbench("push", path, "--to", f"127.0.0.1:{cable.port}")
    assert done.code == 0, done.err
    assert board.resumed_from[0] == 0
    assert board.resumed_from[1] >= 2 * MIB, "what had arrived is not sent again"
    assert board.received_bytes == 12 * MIB


def test_an_upload_survives_an_outage(board, cable, start, tmp_path, wait_until):
    path = tmp_path / "large.tflite"
    path.write_bytes(bytes(8 * MIB))
    cut = []

    def cut_once(chunk, context):
        if not cut:
            cut.append(True)
            cable.cut()

    board.on_chunk = cut_once
    running = start("push", path, "--to", f"127.0.0.1:{cable.port}")
    wait_until(lambda: cut, "the first chunk")
    cable.mend()
    done = running.finished()
    assert done.code == 0, done.err


def test_a_lost_board_is_given_up_after_a_while(board, cable, boardbench, model_file):
    board.on_chunk = lambda chunk, context: cable.cut()
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{cable.port}", "--retry-for", "0.5")
    assert done.code == 3
    assert "gave up after 0.5 s of trying" in done.err
    assert str(cable.port) in done.err
    assert done.out == ""


def test_a_damaged_chunk_is_sent_again(board, boardbench, model_file):
    damaged = []

    def damage(chunk, context):
        if not damaged:
            damaged.append(chunk.offset_bytes)
            context.abort(grpc.StatusCode.DATA_LOSS, "the chunk at byte 0 arrived damaged")

    board.on_chunk = damage
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}")
    assert damaged
    assert done.code == 0, done.err


def test_a_network_that_always_damages_is_told(board, boardbench, model_file):
    board.on_chunk = lambda chunk, context: context.abort(
        grpc.StatusCode.DATA_LOSS, "the chunk arrived damaged"
    )
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}")
    assert done.code == 1
    assert "the chunk arrived damaged; that was try 3" in done.err
    assert len(board.resumed_from) == 3


def test_a_file_that_changes_meanwhile_is_told(board, boardbench, model_file):
    def change(_header):
        with model_file.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\0" if model_file.read_bytes()[-1:] != b"\0" else b"\1")

    # It was hashed, and no byte of it is sent before the answer.
    board.on_header = change
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}")
    assert done.code == 1
    assert "was changed while it was sent" in done.err


def test_what_the_board_refuses_is_told_in_its_words(board, boardbench, model_file):
    board.on_chunk = lambda chunk, context: context.abort(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "the model store is full: delete models"
    )
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}")
    assert done.code == 1
    assert done.err == f"boardbench: 127.0.0.1:{board.port}: the model store is full: delete models\n"


def test_one_refused_model_does_not_keep_the_next_from_running(board, boardbench, model_file, tmp_path):
    small = tmp_path / "small.tflite"
    small.write_bytes(b"small")
    board.on_chunk = lambda chunk, context: (
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large") if len(chunk.data) > 100 else None
    )
    done = boardbench("push", model_file, small, "--to", f"127.0.0.1:{board.port}", "--format", "json")
    assert done.code == 1
    assert "model.tflite: " in done.err
    assert [result["model"]["name"] for result in json.loads(done.out)] == ["small.tflite"]


def test_a_stream_that_breaks_in_the_middle_of_a_run_is_taken_up_again(
    board, cable, start, model_file, wait_until
):
    def script(board, run):
        run.tell(stage=agent_pb2.StageEvent(stage=result_pb2.STAGE_MEASURE))

    board.script = script
    running = start("push", model_file, "--to", f"127.0.0.1:{cable.port}", "--format", "json")
    wait_until(lambda: board.runs, "the run")
    (run,) = board.runs.values()
    wait_until(lambda: run.events, "its first event")
    cable.cut()
    cable.mend()
    wait_until(
        lambda: board.calls.count("WatchRun") + board.calls.count("RunBenchmark") > 1, "the second call"
    )
    run.finish(sample := result_pb2.RunResult(status=result_pb2.RUN_STATUS_SUCCEEDED))
    done = running.finished()
    assert done.code == 0, done.err
    assert json.loads(done.out)["run_id"] == sample.run_id
    assert len(board.runs) == 1, "nothing is started twice"


def test_a_board_that_is_lost_during_a_run_is_told_with_how_to_see_the_result(
    board, start, model_file, wait_until
):
    board.script = lambda board, run: run.tell(stage=agent_pb2.StageEvent(stage=result_pb2.STAGE_MEASURE))
    running = start("push", model_file, "--to", f"127.0.0.1:{board.port}", "--retry-for", "0.1")
    wait_until(lambda: board.runs, "the run")
    board.stop()
    done = running.finished(20)
    assert done.code == 3
    (run_id,) = board.runs
    assert f"boardbench watch {run_id[:8]} --to 127.0.0.1:{board.port}" in done.err


@pytest.mark.parametrize(
    ("status", "word"),
    [("failed_sigsegv", "FAILED while running the first inference"), ("cancelled", "cancelled")],
)
def test_a_run_that_did_not_succeed_is_shown_and_exits_with_1(
    board, boardbench, model_file, sample, status, word
):
    board.script = lambda board, run: run.finish(sample(status))
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}")
    assert done.code == 1
    assert word in done.out
    assert done.err == ""


def test_ctrl_c_cancels_the_run_on_the_board(board, start, model_file, wait_until):
    board.script = lambda board, run: run.tell(stage=agent_pb2.StageEvent(stage=result_pb2.STAGE_MEASURE))
    running = start("push", model_file, "--to", f"127.0.0.1:{board.port}")
    wait_until(lambda: board.runs and next(iter(board.runs.values())).events, "the run")
    running.process.send_signal(signal.SIGINT)
    done = running.finished()
    assert done.code == 130
    assert board.cancelled == list(board.runs)
    assert "cancelled" in done.out, "the board's own last word is shown"
    assert "interrupted" in done.err


def test_a_result_that_overtakes_the_answer_to_the_cancellation_is_no_failure(
    board, start, model_file, wait_until
):
    board.script = lambda board, run: run.tell(stage=agent_pb2.StageEvent(stage=result_pb2.STAGE_MEASURE))

    def answers_too_late(request, context):
        board.runs[request.run_id].finish(result_pb2.RunResult(status=result_pb2.RUN_STATUS_CANCELLED))
        wait_until(lambda: not context.is_active(), "the client's leaving")
        return agent_pb2.CancelRunResponse(cancelled=True)

    board.CancelRun = answers_too_late
    board.stop()
    board.start()
    running = start("push", model_file, "--to", f"127.0.0.1:{board.port}")
    wait_until(lambda: board.runs and next(iter(board.runs.values())).events, "the run")
    running.process.send_signal(signal.SIGINT)
    done = running.finished()
    assert done.code == 130
    assert "cancelled" in done.out
    assert "could not be cancelled" not in done.err


def test_a_second_ctrl_c_leaves_at_once(board, start, model_file, wait_until):
    board.script = lambda board, run: run.tell(stage=agent_pb2.StageEvent(stage=result_pb2.STAGE_MEASURE))
    asked = []

    def never_ends(request, context):
        asked.append(request.run_id)
        return agent_pb2.CancelRunResponse(cancelled=True)

    board.CancelRun = never_ends
    board.stop()
    board.start()
    running = start("push", model_file, "--to", f"127.0.0.1:{board.port}")
    wait_until(lambda: board.runs and next(iter(board.runs.values())).events, "the run")
    running.process.send_signal(signal.SIGINT)
    wait_until(lambda: asked, "the cancellation")
    running.process.send_signal(signal.SIGINT)
    done = running.finished(20)
    assert done.code == 130
    assert done.out == ""
    (run_id,) = board.runs
    assert f"boardbench watch {run_id[:8]} --to 127.0.0.1:{board.port}" in done.err


def test_ctrl_c_ends_an_upload(board, start, model_file, wait_until):
    stuck = []

    def hang(chunk, context):
        stuck.append(True)
        wait_until(lambda: not context.is_active(), "the end of the call")

    board.on_chunk = hang
    running = start("push", model_file, "--to", f"127.0.0.1:{board.port}")
    wait_until(lambda: stuck, "the upload")
    running.process.send_signal(signal.SIGTERM)
    done = running.finished(20)
    assert done.code == 130
    assert not board.runs


def test_detached_runs_are_queued_and_their_ids_printed(board, boardbench, model_file):
    board.script = lambda board, run: run.tell(queued=agent_pb2.QueuedEvent(runs_ahead=1))
    to = ("--to", f"127.0.0.1:{board.port}")
    done = boardbench("push", model_file, *to, "--detach")
    assert done.code == 0, done.err
    (run,) = board.runs.values()
    assert done.out == run.request.run_id + "\n"
    assert not run.ended
    assert not board.cancelled
    document = json.loads(boardbench("push", model_file, *to, "--detach", "--format", "json").out)
    assert document["run_id"] in board.runs


def test_files_can_be_sent_without_a_run(board, boardbench, model_file):
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}", "--no-run")
    assert done.code == 0, done.err
    assert done.out == f"{hashlib.sha256(model_file.read_bytes()).hexdigest()}  model.tflite\n"
    assert not board.runs


def test_a_board_that_is_not_there_does_not_keep_the_other_from_working(
    board, boardbench, model_file, closed_port
):
    done = boardbench(
        "push",
        model_file,
        "--to",
        f"127.0.0.1:{board.port}",
        "--to",
        f"127.0.0.1:{closed_port}",
        "--format",
        "json",
    )
    assert done.code == 3
    assert f"no agent listens on 127.0.0.1:{closed_port}" in done.err
    assert len(json.loads(done.out)) == 1


def test_the_name_on_the_wire_has_no_folders_and_is_text(board, boardbench, tmp_path):
    path = Path(str(tmp_path / "mod\udcff.tflite"))
    path.write_bytes(b"x")
    done = boardbench("push", path, "--to", f"127.0.0.1:{board.port}", "--no-run")
    assert done.code == 0, done.err
    assert board.headers[0].name == "mod?.tflite"


def test_what_is_asked_about_the_placement_reaches_the_board(board, boardbench, model_file):
    to = ("--to", f"127.0.0.1:{board.port}")
    assert boardbench("push", model_file, *to, "--strict", "--profile-runs", 20).code == 0
    assert boardbench("push", model_file, *to, "--allow-fallback", "--no-profile").code == 0
    assert boardbench("push", model_file, *to).code == 0
    strict, lenient, silent = (run.request.spec for run in board.runs.values())
    assert (strict.strict, strict.allow_fallback, strict.profile_runs) == (True, False, 20)
    assert (lenient.strict, lenient.allow_fallback) == (False, True)
    assert lenient.HasField("profile_runs") and lenient.profile_runs == 0
    assert not silent.HasField("profile_runs")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--strict", "--allow-fallback"), "--strict forbids what --allow-fallback allows"),
        (("--no-profile", "--profile-runs", 3), "contradict"),
        (("--profile-runs", 99_999), "not from 0 to 10000"),
    ],
)
def test_what_contradicts_itself_about_the_placement_starts_nothing(
    board, boardbench, model_file, options, words
):
    done = boardbench("push", model_file, "--to", f"127.0.0.1:{board.port}", *options)
    assert done.code == 2
    assert words in " ".join(done.err.split())
    assert not board.calls


# Runs that are measured together


@pytest.mark.parametrize(
    ("flag", "mode", "processes"),
    [
        ("--interleave", result_pb2.GROUP_MODE_INTERLEAVED, 6),
        ("--concurrent", result_pb2.GROUP_MODE_CONCURRENT, 0),
    ],
)
def test_runs_together_are_one_group(board, boardbench, model_file, tmp_path, flag, mode, processes):
    other = tmp_path / "other.onnx"
    other.write_bytes(b"other")
    everybody = threading.Barrier(2, timeout=30)

    def together(board, run):
        everybody.wait()  # as a board does: no member begins before all are there
        run.finish(sample_result("success"))

    board.script = together
    done = boardbench("push", model_file, other, "--to", f"127.0.0.1:{board.port}", flag, "--format", "json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)) == 2
    specs = [run.request.spec for run in board.runs.values()]
    assert len({spec.group.id for spec in specs}) == 1
    assert {(spec.group.size, spec.group.mode, spec.processes) for spec in specs} == {(2, mode, processes)}


def test_when_one_of_a_group_is_refused_the_others_do_not_wait_for_it(
    board, boardbench, model_file, tmp_path
):
    other = tmp_path / "other.onnx"
    other.write_bytes(b"other")
    waits = threading.Event()

    def refuse_one(name, context):
        if name == "other.onnx":
            waits.wait(30)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "nothing here can run other.onnx")

    board.before_run = refuse_one
    board.script = lambda board, run: waits.set()  # it waits for the others for ever
    done = boardbench("push", model_file, other, "--to", f"127.0.0.1:{board.port}", "--interleave")
    assert done.code == 1
    assert "nothing here can run other.onnx" in done.err
    assert len(board.cancelled) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--interleave",), "needs at least two models"),
        (("--interleave", "--concurrent", "again"), "leave one of them out"),
        (("--concurrent", "--no-run", "again"), "asks for none"),
    ],
)
def test_a_group_that_is_none_is_told(boardbench, model_file, arguments, told):
    arguments = [str(model_file) if argument == "again" else argument for argument in arguments]
    done = boardbench("push", model_file, *arguments, "--to", "127.0.0.1:1")
    assert done.code == 2
    assert told in done.err
