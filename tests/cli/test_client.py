"""The client by itself: what becomes of gRPC's errors, of silence, and of restarts."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time

import grpc
import pytest

from boardbench.cli import client as client_module
from boardbench.cli.address import Address
from boardbench.cli.client import AgentClient, CollectorClient
from boardbench.cli.errors import Interrupted, Refused, RunLost, Unreachable
from boardbench.cli.source import Source
from boardbench.v1 import agent_pb2, result_pb2


@pytest.fixture
def client(board):
    with AgentClient(Address("127.0.0.1", board.port), retry_seconds=20) as client:
        yield client


def running(board, run):
    run.tell(stage=agent_pb2.StageEvent(stage=result_pb2.STAGE_MEASURE))


def request_for(board, run_id="r1"):
    return agent_pb2.RunBenchmarkRequest(model_sha256=board.keep(b"model", "m.onnx"), run_id=run_id)


def test_a_run_that_a_restarted_agent_forgot_is_lost(board, client):
    board.script = running
    with contextlib.closing(client.run(request_for(board))) as events:
        assert next(events).stage.stage == result_pb2.STAGE_MEASURE
        board.stop()
        board.runs.clear()
        board.start()
        with pytest.raises(RunLost, match=r"no longer knows run r1: its agent was restarted"):
            next(events)
    assert board.calls.count("RunBenchmark") == 1


def test_a_run_that_a_restarted_agent_kept_is_followed_on(board, client):
    board.script = running
    with contextlib.closing(client.run(request_for(board))) as events:
        first = next(events)
        board.stop()
        board.start()
        board.runs["r1"].finish()
        last = next(events)
    assert (first.sequence, last.sequence) == (1, 2), "no event comes twice"
    assert last.HasField("result")


def test_a_run_is_not_started_twice_when_the_answer_was_lost(board, cable):
    board.script = running
    notes = []
    with AgentClient(Address("127.0.0.1", cable.port), notice=notes.append) as client:
        client.push_nothing = None
        client._heard()  # as after an upload
        cable.cut()
        events = client.run(request_for(board))
        thread = threading.Thread(target=cable.mend)
        thread.start()
        assert next(events).sequence == 1
        thread.join()
        events.close()
    assert list(board.runs) == ["r1"]
    assert len(notes) <= 1, "an outage is told once"


def test_watching_a_run_that_does_not_exist_is_refused(board, client):
    with pytest.raises(Refused, match=r"no run nope here"):
        next(client.watch("nope"))


def test_stop_ends_every_wait(board, client, wait_until):
    board.script = running
    events = client.run(request_for(board))
    next(events)
    caught = []

    def wait():
        try:
            next(events)
        except Interrupted as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    client.stop()
    thread.join(20)
    assert caught


def test_stop_ends_the_wait_between_two_tries(board, wait_until):
    notes = []
    board.script = running
    with AgentClient(Address("127.0.0.1", board.port), retry_seconds=600, notice=notes.append) as client:
        events = client.run(request_for(board))
        next(events)
        board.stop()
        caught = []

        def wait():
            try:
                next(events)
            except Interrupted as error:
                caught.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: notes, "the outage")
        client.stop()
        thread.join(20)
    assert caught
    assert "following run r1" in notes[0]
    assert "Trying again" in notes[0]


def test_nobody_listening_says_how_to_start_the_agent(closed_port):
    with AgentClient(Address("127.0.0.1", closed_port)) as client, pytest.raises(Unreachable) as caught:
        client.describe()
    assert str(caught.value) == (
        f"no agent listens on 127.0.0.1:{closed_port} (connection refused): "
        "start it with `boardbench-agent serve`"
    )


def test_nobody_listening_on_a_board_tells_of_the_default(closed_port):
    told = AgentClient(Address("10.0.0.7", 7341))._unavailable("connect: Connection refused")
    assert "`--listen 0.0.0.0:7341`" in told
    assert "only its own machine may connect" in told


def test_no_collector_is_called_a_collector(closed_port):
    with CollectorClient(Address("127.0.0.1", closed_port)) as client, pytest.raises(Unreachable) as caught:
        client.devices()
    assert "no collector listens on" in str(caught.value)
    assert "`boardbench-collector serve`" in str(caught.value)


def test_an_unknown_name_is_called_unknown():
    with AgentClient(Address("no-such-host.invalid", 7341)) as client, pytest.raises(Unreachable) as caught:
        client.describe()
    assert "the name 'no-such-host.invalid' is not known" in str(caught.value)


def test_a_local_name_hints_at_mdns():
    told = AgentClient(Address("pi.local", 7341))._unavailable("errors resolving pi.local:7341")
    assert "mDNS" in told


def test_a_collector_is_no_agent(board):
    with CollectorClient(Address("127.0.0.1", board.port)) as client, pytest.raises(Unreachable) as caught:
        client.devices()
    assert "answers, but not as a boardbench-collector: collectors listen on port 7342" in str(caught.value)


def test_a_web_server_is_no_agent():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        with (
            AgentClient(Address("127.0.0.1", server.server_port)) as client,
            pytest.raises(Unreachable) as caught,
        ):
            client.describe()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert str(server.server_port) in str(caught.value)
    assert "port 7341 by default" in str(caught.value)


def test_a_server_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(client_module, "CALL_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with (
            AgentClient(Address("127.0.0.1", port)) as client,
            pytest.raises(Unreachable, match="gave no answer"),
        ):
            client.describe()


def test_an_upload_that_stands_still_is_given_up(board, client, model_file, monkeypatch, wait_until):
    monkeypatch.setattr(client_module, "STALL_SECONDS", 0.2)
    board.on_chunk = lambda chunk, context: wait_until(lambda: not context.is_active(), "the end of the call")
    with (
        Source(model_file) as source,
        pytest.raises(Unreachable, match=r"took nothing of model\.tflite for 0 s"),
    ):
        client.push(source)


def test_a_file_taken_over_by_another_client_is_sent_on(board, client, model_file, monkeypatch):
    monkeypatch.setattr(client_module, "_BUSY_WAIT_SECONDS", 0.0)
    aborted = []

    def take_over(chunk, context):
        if not aborted:
            aborted.append(True)
            context.abort(grpc.StatusCode.ABORTED, "another client sends this file")

    board.on_chunk = take_over
    with Source(model_file) as source:
        done = client.push(source)
    assert done.model.sha256 == source.sha256
    assert aborted


def test_a_nonsensical_offset_is_the_agents_defect(board, client, model_file):
    def push(request_iterator, context):
        next(request_iterator)
        yield agent_pb2.PushModelResponse(resume=agent_pb2.PushResume(offset_bytes=1 << 40))

    board.PushModel = push
    board.stop()
    board.start()
    with Source(model_file) as source, pytest.raises(Refused, match="a defect of the agent"):
        client.push(source)


def test_progress_of_an_upload_ends_at_the_size_of_the_file(board, client, model_file):
    sent = []
    with Source(model_file) as source:
        client.push(source, on_sent=sent.append)
    assert sent[0] == 0
    assert sent == sorted(sent)
    assert sent[-1] == model_file.stat().st_size


def test_progress_of_an_upload_ends_there_though_the_answer_comes_first(board, client, model_file):
    sent, size = [], model_file.stat().st_size
    here, answered = threading.current_thread(), threading.Event()

    def on_sent(at):
        if at == size and threading.current_thread() is not here:
            answered.wait(30)
        sent.append(at)

    with Source(model_file) as source:
        client.push(source, on_sent=on_sent)
    assert sent[-1] == size
    answered.set()


def test_a_defect_of_the_agent_points_to_its_log(board, client):
    def fail(request, context):
        raise RuntimeError("a bug")

    board.Describe = fail
    board.stop()
    board.start()
    with pytest.raises(Refused, match="the log of boardbench-agent says more"):
        client.describe()


def test_a_proxy_in_the_environment_is_not_used(board, boardbench):
    done = boardbench(
        "devices",
        "--to",
        f"127.0.0.1:{board.port}",
        http_proxy="http://127.0.0.1:9",
        grpc_proxy="http://127.0.0.1:9",
    )
    assert done.code == 0, done.err


def test_a_connection_over_ipv6(board):
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    server = grpc.server(threading_pool := __import__("concurrent.futures").futures.ThreadPoolExecutor(2))
    from boardbench.v1 import agent_pb2_grpc

    agent_pb2_grpc.add_AgentServiceServicer_to_server(board, server)
    port = server.add_insecure_port("[::1]:0")
    server.start()
    try:
        with AgentClient(Address("::1", port)) as client:
            assert client.describe().agent_version == "0.1.0"
    finally:
        server.stop(None).wait()
        threading_pool.shutdown()


def test_time_between_tries_grows_and_stays_bounded(monkeypatch, closed_port):
    waits = []
    with AgentClient(Address("127.0.0.1", closed_port), retry_seconds=1000) as client:
        client._heard()
        monkeypatch.setattr(client, "wait", waits.append)
        monkeypatch.setattr(client_module._jitter, "uniform", lambda low, high: high)
        retry = client_module._Retry(client, "testing")
        for _ in range(10):
            retry.after(Unreachable("gone"))
        assert waits[:3] == [0.1, 0.2, 0.4]
        assert max(waits) == 5.0
        retry.progressed()
        retry.after(Unreachable("gone"))
        assert waits[-1] == 0.1
    assert time.monotonic() > 0
