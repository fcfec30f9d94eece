"""devices, results and show against a collector on a real port."""

from __future__ import annotations

import datetime
import json
from concurrent import futures

import grpc
import pytest

from boardbench.v1 import board_pb2, collector_pb2, collector_pb2_grpc, result_pb2


class ScriptedCollector(collector_pb2_grpc.CollectorServiceServicer):
    """A collector whose store is a list."""

    def __init__(self):
        self.results = []
        self.devices = []
        self.asked = []

    def ListDevices(self, request, context):
        return collector_pb2.ListDevicesResponse(devices=self.devices)

    def ListResults(self, request, context):
        self.asked.append(request)
        begin = int(request.page_token or 0)
        end = begin + request.page_size
        return collector_pb2.ListResultsResponse(
            results=self.results[begin:end], next_page_token=str(end) if end < len(self.results) else ""
        )

    def GetResult(self, request, context):
        found = [result for result in self.results if result.run_id.startswith(request.run_id)]
        if len(found) != 1:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no run {request.run_id!r} here")
        return collector_pb2.GetResultResponse(result=found[0])


@pytest.fixture
def collector():
    servicer = ScriptedCollector()
    with futures.ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        collector_pb2_grpc.add_CollectorServiceServicer_to_server(servicer, server)
        servicer.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield servicer
        server.stop(None).wait()


@pytest.fixture
def at(collector):
    return ("--collector", f"127.0.0.1:{collector.port}")


def many(count, sample):
    results = []
    for number in range(count):
        result = result_pb2.RunResult()
        result.CopyFrom(sample("success"))
        result.run_id = f"{number:032x}"
        results.append(result)
    return results


def test_results_are_fetched_page_by_page(collector, boardbench, at, sample):
    collector.results = many(45, sample)
    done = boardbench("results", *at, "--limit", 44, "--format", "json")
    assert done.code == 0, done.err
    assert [item["run_id"] for item in json.loads(done.out)] == [f"{number:032x}" for number in range(44)]
    assert [request.page_size for request in collector.asked] == [20, 20, 4]
    assert not any(request.summary for request in collector.asked)


def test_a_list_for_people_is_a_row_a_result_and_asks_for_no_samples(collector, boardbench, at, sample):
    collector.results = many(3, sample)
    done = boardbench("results", *at)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 4, "a row is a line where no terminal is"
    assert collector.asked[0].summary
    assert collector.asked[0].page_size == 20


def test_filters_are_passed_on(collector, boardbench, at):
    done = boardbench(
        "results", *at, "--device", "pi5", "--model", "m.onnx", "--runtime", "onnxruntime",
        "--status", "failed", "--since", "2026-01-31T12:00:00Z",
    )  # fmt: skip
    assert done.code == 0, done.err
    (request,) = collector.asked
    assert (request.device_id, request.model, request.runtime) == ("pi5", "m.onnx", "onnxruntime")
    assert request.status == result_pb2.RUN_STATUS_FAILED
    assert request.since.ToDatetime() == datetime.datetime(2026, 1, 31, 12)  # noqa: DTZ001 - protobuf gives UTC so


@pytest.mark.parametrize(("age", "seconds"), [("90m", 5400), ("12h", 43200), ("3d", 259200), ("1w", 604800)])
def test_an_age_is_a_time(collector, boardbench, at, age, seconds):
    before = datetime.datetime.now(datetime.timezone.utc)
    assert boardbench("results", *at, "--since", age).code == 0
    after = datetime.datetime.now(datetime.timezone.utc)
    since = collector.asked[0].since.ToDatetime(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)
    assert before <= since <= after


def test_a_date_is_that_of_this_machine(collector, boardbench, at):
    assert boardbench("results", *at, "--since", "2026-01-31", TZ="Asia/Tokyo").code == 0
    assert collector.asked[0].since.ToDatetime() == datetime.datetime(2026, 1, 30, 15)  # noqa: DTZ001


def test_one_result_is_shown_whole(collector, boardbench, at, sample):
    collector.results = many(2, sample)
    done = boardbench("show", f"{1:032x}", *at)
    assert done.code == 0, done.err
    assert "#30" in done.out
    assert "sha256 3f2a9c" in " ".join(done.out.split())
    assert json.loads(boardbench("show", f"{1:032x}", *at, "--format", "json").out)["run_id"] == f"{1:032x}"


def test_showing_a_failed_run_is_no_failure(collector, boardbench, at, sample):
    collector.results = [sample("failed_sigsegv")]
    assert boardbench("show", "9f1c", *at).code == 0


def test_a_run_that_the_collector_does_not_have_is_told(boardbench, at):
    done = boardbench("show", "abc", *at)
    assert done.code == 1
    assert "no run 'abc' here" in done.err


def test_the_collector_may_be_named_in_the_environment(collector, boardbench, sample):
    collector.results = many(1, sample)
    done = boardbench("results", BOARDBENCH_COLLECTOR=f"127.0.0.1:{collector.port}")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 2


def test_devices_are_listed(collector, boardbench, at):
    seen = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(hours=3)
    up = collector_pb2.Device(
        board=board_pb2.Board(device_id="a", hostname="pi5", model="Raspberry Pi 5", architecture="aarch64"),
        up=True,
        address="pi5:7341",
        runtimes=[
            board_pb2.RuntimeStatus(name="tflite", available=True),
            board_pb2.RuntimeStatus(name="onnxruntime", reason="not installed"),
        ],
        heartbeat=collector_pb2.Heartbeat(running_run_id="x", queued_runs=2),
        results=1234,
    )
    virtual = collector_pb2.Device(
        board=board_pb2.Board(device_id="c", architecture="x86_64", emulator="kvm")
    )
    down = collector_pb2.Device(board=board_pb2.Board(device_id="b", emulator="qemu-user"))
    down.last_seen_at.FromDatetime(seen)
    collector.devices = [up, down, virtual]
    done = boardbench("devices", *at)
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "pi5 (a) Raspberry Pi 5, aarch64 up tflite pi5:7341 running, 2 waiting 1,234" in text
    assert "1 can't run" in text
    assert "EMULATED (qemu-user) down, seen 3 h ago" in text
    assert "x86_64, virtual machine (kvm) down" in text
    assert "idle" not in text, "nobody knows what a board does that is down"
    down.heartbeat.running_run_id = "y"
    assert "was running" in boardbench("devices", *at).out
    assert len(json.loads(boardbench("devices", *at, "--format", "json").out)) == 3
    up.clock_offset_seconds = 1.25
    up.problems.append("its clock is off")
    up.sensors.append("thermal")
    page = " ".join(boardbench("devices", *at, "--full").out.split())
    for words in (
        "pi5 (a) at pi5:7341",
        "✗ onnxruntime not installed",
        "Sensors thermal",
        "its clock is +1.250 s off the collector's",
        "Queue running, 2 waiting",
        "Problem its clock is off",
    ):
        assert words in page


def test_no_devices_and_no_results_are_empty_lists(boardbench, at):
    for command in ("devices", "results"):
        done = boardbench(command, *at)
        assert (done.code, done.out, done.err) == (0, "", "")
        assert boardbench(command, *at, "--format", "json").out == "[]\n"


def test_a_collector_that_is_not_there_exits_with_3(boardbench, closed_port):
    done = boardbench("results", "--collector", f"127.0.0.1:{closed_port}")
    assert done.code == 3
    assert "`boardbench-collector serve`" in done.err


def test_an_agent_is_not_taken_for_a_collector(board, boardbench):
    done = boardbench("results", "--collector", f"127.0.0.1:{board.port}")
    assert done.code == 3
    assert "answers, but not as a boardbench-collector" in done.err


def test_a_result_with_many_samples_fits_through(collector, boardbench, at, sample):
    result = sample("success")
    result.latency.ClearField("samples_nanoseconds")
    result.latency.samples_nanoseconds.extend([1_234_567_890] * 2_000_000)
    assert result.ByteSize() > 9_000_000, "more than gRPC takes by default"
    collector.results = [result]
    done = boardbench("show", result.run_id, *at)
    assert done.code == 0, done.err
