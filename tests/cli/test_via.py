"""push --via, jobs and devices against a scripted collector on a real port."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from boardbench.cli import via as by_collector
from boardbench.v1 import (
    agent_pb2,
    board_pb2,
    collector_pb2,
    collector_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    model_pb2,
)

DONE, DEAD, CANCELLED, RUNNING = (
    job_pb2.JOB_STATE_DONE,
    job_pb2.JOB_STATE_DEAD,
    job_pb2.JOB_STATE_CANCELLED,
    job_pb2.JOB_STATE_RUNNING,
)


class ScriptedCollector(collector_pb2_grpc.CollectorServiceServicer, job_pb2_grpc.JobServiceServicer):
    """Boards whose jobs end as the test says."""

    def __init__(self, sample: Any) -> None:
        self.sample = sample
        self.boards = ["b1", "b2", "b3"]
        # Of every board; empty: its own identity.
        self.hostname = ""
        # By the term that asks for it; others are up and free.
        self.states: dict[str, collector_pb2.Device] = {}
        # State and reason that a board's jobs come to.
        self.ends: dict[str, tuple[int, str]] = {}
        self.files: dict[str, bytes] = {}
        self.broken_uploads = 0
        self.submitted: list[job_pb2.SubmitJobsRequest] = []
        self.refuses: list[str] = []
        # Requests that are taken before one is refused.
        self.takes = 0
        self.jobs: dict[str, job_pb2.Job] = {}
        self.broken_watches = 0
        self.watches = 0
        self.asked: list[Any] = []
        self.changed = threading.Condition()

    def SendFile(self, requests, context):
        header = next(requests).header
        data = self.files.setdefault(header.sha256, b"")
        if len(data) < header.size_bytes:
            yield job_pb2.SendFileResponse(resume={"offset_bytes": len(data)})
            for request in requests:
                self.files[header.sha256] += request.chunk.data
                if self.broken_uploads:
                    self.broken_uploads -= 1
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")
        assert hashlib.sha256(self.files[header.sha256]).hexdigest() == header.sha256
        model = model_pb2.Model(sha256=header.sha256, name=header.name, size_bytes=header.size_bytes)
        yield job_pb2.SendFileResponse(done=agent_pb2.PushDone(model=model))

    def SubmitJobs(self, request, context):
        self.submitted.append(request)
        if self.refuses and len(self.submitted) > self.takes:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refuses.pop())
        boards = [
            term.partition("=")[2] for term in request.on if term.startswith("device_id=")
        ] or self.boards
        jobs = []
        for board in boards[: request.count or None]:
            job = job_pb2.Job(
                job_id=hashlib.sha256(f"{request.request_id}{board}".encode()).hexdigest()[:20],
                batch_id=request.request_id,
                device_id=board,
                model={"sha256": request.model_sha256, "name": "m.tflite"},
                state=job_pb2.JOB_STATE_QUEUED,
                tags=request.tags,
            )
            self.jobs[job.job_id] = job
            jobs.append(job)
        return job_pb2.SubmitJobsResponse(jobs=jobs)

    def WatchJobs(self, request, context):
        self.watches += 1
        jobs = self._found(request.filter)
        for job in jobs:
            job.state, job.progress = RUNNING, "measuring 40 %"
            yield job_pb2.WatchJobsResponse(job=job)
        if self.broken_watches:
            self.broken_watches -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")
        for job in jobs:
            state, reason = self.ends.get(job.device_id, (DONE, ""))
            if state == RUNNING:
                with self.changed:
                    self.changed.wait_for(lambda job=job: job.state != RUNNING, 30)
            else:
                job.state, job.reason, job.run_id = state, reason, f"{job.job_id}-1"
            yield job_pb2.WatchJobsResponse(job=job)

    def CancelJobs(self, request, context):
        self.asked.append(request)
        with self.changed:
            for job in self._found(request.filter):
                job.state, job.reason = CANCELLED, "by the operator"
            self.changed.notify_all()
        return job_pb2.CancelJobsResponse(jobs=self._found(request.filter))

    def RetryJobs(self, request, context):
        self.asked.append(request)
        return job_pb2.RetryJobsResponse(jobs=self._found(request.filter))

    def ListJobs(self, request, context):
        found = self._found(request.filter)
        begin = int(request.page_token or 0)
        end = begin + min(request.page_size, 2)
        token = str(end) if end < len(found) else ""
        return job_pb2.ListJobsResponse(jobs=found[begin:end], next_page_token=token)

    def Reserve(self, request, context):
        self.asked.append(request)
        return job_pb2.ReserveResponse(
            reservations=[{"device_id": board, "holder": request.holder} for board in self.boards]
        )

    def Release(self, request, context):
        self.asked.append(request)
        return job_pb2.ReleaseResponse()

    def SetLabels(self, request, context):
        self.asked.append(request)
        return job_pb2.SetLabelsResponse(device_ids=self.boards)

    def ListDevices(self, request, context):
        for term in request.on:
            if term in self.states:
                return collector_pb2.ListDevicesResponse(devices=[self.states[term]])
            if term.removeprefix("device_id=") in self.boards:
                board = board_pb2.Board(device_id=term.removeprefix("device_id="))
                device = collector_pb2.Device(board=board, up=True)
                return collector_pb2.ListDevicesResponse(devices=[device])
        self.asked.append(request)
        device = collector_pb2.Device(
            board=board_pb2.Board(device_id="b1", labels={"lab": "zurich", "rack": "1"}),
            labels={"rack": "7"},
            open_jobs=2,
            problems=["its clock is 7 s off"],
            reservation=job_pb2.Reservation(holder="anna"),
        )
        return collector_pb2.ListDevicesResponse(devices=[device])

    def GetResult(self, request, context):
        job = self.jobs[request.run_id.rpartition("-")[0]]
        result = self.sample("success")
        result.run_id = request.run_id
        result.board.device_id = job.device_id
        result.board.hostname = self.hostname or job.device_id
        return collector_pb2.GetResultResponse(result=result)

    def _found(self, wanted: job_pb2.JobFilter) -> list[job_pb2.Job]:
        return [
            job
            for job in self.jobs.values()
            if (not wanted.job_ids or any(job.job_id.startswith(some) for some in wanted.job_ids))
            and (not wanted.batch_id or job.batch_id == wanted.batch_id)
            and (not wanted.device_id or job.device_id == wanted.device_id)
            and (not wanted.states or job.state in wanted.states)
        ]


@pytest.fixture
def collector(sample: Any) -> Iterator[ScriptedCollector]:
    servicer = ScriptedCollector(sample)
    with futures.ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        collector_pb2_grpc.add_CollectorServiceServicer_to_server(servicer, server)
        job_pb2_grpc.add_JobServiceServicer_to_server(servicer, server)
        servicer.port = server.add_insecure_port("127.0.0.1:0")  # type: ignore[attr-defined]
        server.start()
        yield servicer
        server.stop(None).wait()


@pytest.fixture
def via(collector: ScriptedCollector) -> tuple[str, str]:
    return ("--via", f"127.0.0.1:{collector.port}")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "x", "--on", "board=pi5"], "--on is about boards of a collector"),
        (["--to", "x", "--count", "2"], "--count is about boards of a collector"),
        (["--to", "x", "--priority", "2"], "--priority is about boards of a collector"),
        (["--via", "x"], "which boards?"),
        (["--via", "x", "--to", "y", "--all"], "leave one of them out"),
        (["--via", "x", "--all", "--on", "board=pi5"], "--all means every board"),
        (["--via", "x", "--on", "pi5"], "'pi5' is not NAME=VALUE"),
        (["--via", "x", "--all", "--tag", "suite"], "'suite' is not NAME=VALUE"),
        (["--via", "x", "--all", "--count", "0"], "0 is not from 1"),
        (["--via", "x", "--all", "--give-up-after", "0"], "a length of time: give seconds, more than 0"),
        (["--via", "x", "--all", "--retry-for", "-1"], "give seconds, 0 or more"),
        (["--via", "x", "--all", "--priority", "3000000000"], "3000000000 is not from -2147483648"),
        (["--via", "x", "--all", "--interleave"], "--interleave needs at least two models"),
    ],
)
def test_a_wrong_command_line_is_told(boardbench, model_file, arguments, words) -> None:
    done = boardbench("push", model_file, *arguments)
    assert done.code == 2, done.err
    assert words in " ".join(done.err.split())


def test_comparisons_need_one_board(boardbench, model_file) -> None:
    done = boardbench("push", model_file, model_file, "--via", "x", "--all", "--concurrent")
    assert (done.code, "need one board" in done.err) == (2, True)


def test_a_board_of_the_environment_is_no_contradiction(boardbench, collector, via, model_file) -> None:
    done = boardbench("push", model_file, *via, "--count", "1", BOARDBENCH_AGENT="elsewhere")
    assert done.code == 0, done.err


def test_one_board_gives_a_page_and_one_result(boardbench, collector, via, model_file) -> None:
    done = boardbench(
        *("push", model_file, *via, "--on", "board=pi5, lab!=zurich", "--on", "soc=*", "--count", "1"),
        *(
            "--priority",
            "7",
            "--holder",
            "anna",
            "--tag",
            "team=a",
            "--attempts",
            "2",
            "--give-up-after",
            "60",
        ),
    )
    assert done.code == 0, done.err
    assert "p50" in done.out
    (request,) = collector.submitted
    assert list(request.on) == ["board=pi5", "lab!=zurich", "soc=*"]
    assert (request.count, request.priority, request.holder, request.max_attempts) == (1, 7, "anna", 2)
    assert (request.timeout_seconds, dict(request.tags)) == (60, {"team": "a"})
    assert collector.files[request.model_sha256] == model_file.read_bytes()
    result = boardbench("push", model_file, *via, "--count", "1", "--format", "json")
    assert json.loads(result.out)["board"]["device_id"] == "b1"


def test_several_boards_give_a_table_and_an_array(boardbench, collector, via, model_file) -> None:
    done = boardbench("push", model_file, *via, "--all")
    assert done.code == 0, done.err
    assert [word for word in done.out.split() if word in ("b1", "b2", "b3")] == ["b1", "b2", "b3"]
    answers = json.loads(boardbench("push", model_file, *via, "--all", "--format", "json").out)
    assert [answer["board"]["device_id"] for answer in answers] == ["b1", "b2", "b3"]


def test_a_job_that_was_given_up_is_told_and_the_others_count(boardbench, collector, via, model_file) -> None:
    collector.ends = {"b2": (DEAD, "refused by the board: no runtime takes it"), "b3": (CANCELLED, "by anna")}
    done = boardbench("push", model_file, *via, "--all", "--format", "json")
    assert done.code == 1
    assert [answer["board"]["device_id"] for answer in json.loads(done.out)] == ["b1"]
    assert "was given up: refused by the board: no runtime takes it" in done.err
    assert "was cancelled: by anna" in done.err
    collector.ends = {"b3": (CANCELLED, "it was cancelled")}
    assert boardbench("push", model_file, *via, "--all").err.count("was cancelled") == 1


def test_what_is_required_is_looked_at_on_every_board(boardbench, collector, via, model_file) -> None:
    done = boardbench("push", model_file, *via, "--all", "--require", "p50<=1ns")
    assert done.code == 1
    assert done.err.count("p50") >= 3


def test_broken_connections_are_taken_up_again(boardbench, collector, via, model_file) -> None:
    collector.broken_uploads = collector.broken_watches = 1
    done = boardbench("push", model_file, *via, "--all", "--format", "json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)) == 3
    assert collector.watches == 2
    assert len(collector.submitted) == 1


def test_a_collector_that_refuses_is_told(boardbench, collector, via, model_file) -> None:
    collector.refuses = ["no board meets board=pi9"]
    done = boardbench("push", model_file, *via, "--on", "board=pi9")
    assert (done.code, "no board meets board=pi9" in done.err) == (1, True)


def test_several_models_go_to_the_same_boards(boardbench, collector, via, model_file, tmp_path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(b"another model")
    done = boardbench("push", model_file, other, *via, "--on", "lab=zurich", "--count", "2")
    assert done.code == 0, done.err
    assert [list(request.on) for request in collector.submitted] == [
        ["lab=zurich"],
        ["device_id=b1"],
        ["device_id=b2"],
    ]


def test_what_was_queued_does_not_stay_when_the_rest_is_refused(
    boardbench, collector, via, model_file, tmp_path
) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(b"another model")
    collector.takes, collector.refuses = 1, ["enough"]
    done = boardbench("push", model_file, other, *via, "--all")
    assert (done.code, "enough" in done.err) == (1, True)
    assert {job.state for job in collector.jobs.values()} == {CANCELLED}


def test_whoever_leaves_gets_the_ids(boardbench, collector, via, model_file) -> None:
    done = boardbench("push", model_file, *via, "--all", "--detach")
    assert done.out.split() == list(collector.jobs)
    listed = json.loads(boardbench("push", model_file, *via, "--all", "--detach", "--format", "json").out)
    assert [job["device_id"] for job in listed] == ["b1", "b2", "b3"]
    sent = boardbench("push", model_file, *via, "--all", "--no-run")
    assert sent.out.split() == [collector.submitted[0].model_sha256, "model.tflite"]


def test_ctrl_c_cancels_and_tells_what_became_of_it(start, collector, via, model_file, wait_until) -> None:
    collector.ends = dict.fromkeys(collector.boards, (RUNNING, ""))
    running = start("push", model_file, *via, "--all")
    wait_until(lambda: collector.watches, "it follows")
    running.process.send_signal(signal.SIGINT)
    done = running.finished()
    assert done.code == 130
    assert {job.state for job in collector.jobs.values()} == {CANCELLED}
    assert "was cancelled: by the operator" in done.err


def test_jobs_are_listed_page_by_page(boardbench, collector, via, model_file) -> None:
    boardbench("push", model_file, *via, "--all", "--detach")
    for arguments in (("jobs",), ("jobs", "list"), ("jobs", "list", "--open")):
        done = boardbench(*arguments, *via)
        assert done.code == 0, done.err
        assert [word for word in done.out.split() if word in collector.boards] == ["b1", "b2", "b3"]
    assert len(json.loads(boardbench("jobs", *via, "--limit", "2", "--format", "json").out)) == 2
    assert json.loads(boardbench("jobs", *via, "--state", "dead", "--format", "json").out) == []
    done = boardbench("jobs", "list", *via, "--open", "--state", "dead")
    assert (done.code, "leave one of them out" in done.err) == (2, True)


def test_jobs_are_followed_cancelled_and_queued_again(boardbench, collector, via, model_file) -> None:
    boardbench("push", model_file, *via, "--all", "--detach")
    first, second, _ = collector.jobs
    done = boardbench("jobs", "watch", first[:6], *via, "--format", "json")
    assert (done.code, json.loads(done.out)["board"]["device_id"]) == (0, "b1")
    batch = collector.jobs[first].batch_id
    assert len(json.loads(boardbench("jobs", "watch", "--batch", batch, *via, "--format", "json").out)) == 3
    assert boardbench("jobs", "watch", "ffffffffffff", *via).code == 1
    assert boardbench("jobs", first[:6].upper(), *via).out.count("b1") == 1
    assert boardbench("jobs", "cancel", second.upper(), *via).code == 0
    assert boardbench("jobs", "retry", "--device", "b2", *via).code == 0
    assert list(collector.asked[0].filter.job_ids) == [second]
    assert collector.asked[1].filter.device_id == "b2"
    for command in ("cancel", "retry"):
        done = boardbench("jobs", command, *via)
        assert (done.code, "which jobs?" in done.err) == (2, True)


def test_what_a_job_waits_for_is_told(boardbench, collector, via, model_file) -> None:
    down = collector_pb2.Device(board=board_pb2.Board(device_id="b1"), up=False)
    held = job_pb2.Reservation(holder="anna", reason="heat")
    taken = collector_pb2.Device(board=board_pb2.Board(device_id="b2"), up=True, reservation=held)
    collector.states = {"device_id=b1": down, "device_id=b2": taken}
    boardbench("push", model_file, *via, "--all", "--detach")
    table = " ".join(boardbench("jobs", *via).out.split())
    assert "its board is not connected" in table
    assert "anna has reserved the board (heat)" in table
    # Also where nobody watches, or a job of a CI run would wait without a word.
    done = boardbench("push", model_file, *via, "--all", "--quiet")
    assert done.code == 0
    told = [line for line in done.err.splitlines() if "waits" in line]
    assert [line.partition(":")[2].split(":")[0].strip() for line in told] == ["b1", "b2"]


def test_results_of_a_suite_are_named_by_their_cases(boardbench, collector, via, tmp_path) -> None:
    (tmp_path / "m.tflite").write_bytes(b"model")
    (tmp_path / "s.toml").write_text(
        'name = "s"\nmodels = ["m.tflite"]\nrequire = ["p50<=1ns"]\n'
        "[runtimes.one]\nthreads = 1\n[runtimes.two]\nthreads = 2\n"
        '[boards.first]\non = ["device_id=b1"]\n'
    )
    done = boardbench("suite", "run", tmp_path / "s.toml", *via)
    assert done.code == 1
    for case in ("m.tflite one first", "m.tflite two first"):
        assert case in " ".join(done.out.split())
        assert f"{case} on b1: required p50<=1ns" in done.err


def test_a_suite_that_asks_for_more_boards_than_there_are_is_told_of(
    boardbench, collector, via, tmp_path
) -> None:
    (tmp_path / "m.tflite").write_bytes(b"model")
    suite = tmp_path / "s.toml"
    for count, code in ((1, 0), (2, 1)):
        suite.write_text(f'models = ["m.tflite"]\n[boards.first]\non = ["device_id=b1"]\ncount = {count}\n')
        done = boardbench("suite", "check", suite, *via)
        told = "m.tflite first: 2 boards are asked for, and 1 meets device_id=b1" in done.err
        assert (done.code, told) == (code, count == 2)
    suite.write_text('models = ["m.tflite"]\n[boards.any]\ncount = 2\n')
    done = boardbench("suite", "check", suite, *via)
    assert "m.tflite any: 2 boards are asked for, and there is 1" in done.err


def test_boards_of_one_host_name_are_told_apart_where_one_lacks_what_is_required(
    boardbench, collector, via, model_file, tmp_path
) -> None:
    collector.hostname = "raspberrypi"
    done = boardbench("push", model_file, *via, "--all", "--require", "p50<=1ns")
    for board in collector.boards:
        assert f".tflite on raspberrypi ({board}): required p50<=1ns" in done.err
    (tmp_path / "m.tflite").write_bytes(b"model")
    (tmp_path / "s.toml").write_text('models = ["m.tflite"]\nrequire = "p50<=1ns"\n[boards.all]\ncount = 2\n')
    done = boardbench("suite", "run", tmp_path / "s.toml", *via)
    for board in ("b1", "b2"):
        assert f"m.tflite all on raspberrypi ({board}): required p50<=1ns" in done.err


def test_boards_are_chosen_reserved_and_labelled(boardbench, collector, via) -> None:
    done = boardbench("devices", *via, "--on", "lab=zurich")
    assert list(collector.asked[-1].on) == ["lab=zurich"]
    for words in ("lab=zurich", "rack=7", "2 jobs", "reserved by anna", "its clock is 7 s off"):
        assert words in done.out
    assert "rack=1" not in done.out
    done = boardbench("devices", "reserve", "--on", "rack=7", "--for", "60", "--holder", "anna", *via)
    request = collector.asked[-1]
    assert (done.code, request.holder, request.seconds, list(request.on)) == (0, "anna", 60, ["rack=7"])
    boardbench("devices", "release", "--holder", "anna", *via)
    assert (collector.asked[-1].holder, list(collector.asked[-1].on)) == ("anna", [])
    done = boardbench("devices", "label", "rack=8", "old=", "--on", "device_id=*", *via)
    assert done.out.split() == collector.boards
    assert dict(collector.asked[-1].labels) == {"rack": "8", "old": ""}
    done = boardbench("devices", "label", "rack=8", "--on", "device_id=*", *via, "--format", "json")
    assert json.loads(done.out) == {"device_ids": collector.boards}
    for arguments in (("reserve",), ("release", "--force"), ("label", "a=b")):
        done = boardbench("devices", *arguments, *via)
        assert (done.code, "which boards?" in done.err) == (2, True)
    for before in (("--via", "elsewhere"), ("--on", "rack=7"), ("--format", "json")):
        done = boardbench("devices", *before, "reserve", "--on", "rack=7", *via)
        assert (done.code, f"{before[0]} stands before 'reserve'" in done.err) == (2, True)


def test_a_job_waits_again_after_an_attempt_only() -> None:
    job = job_pb2.Job(state=job_pb2.JOB_STATE_QUEUED, reason="it takes no jobs")
    assert by_collector.words(job) == "waiting for the board (it takes no jobs)"
    job.attempts, job.reason = 1, "no room"
    assert by_collector.words(job) == "waiting for the board again (no room)"
    job.reason = ""
    assert by_collector.words(job) == "waiting for the board again"
