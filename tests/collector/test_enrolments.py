"""Tokens are good for one board and a time; keys are checked; neither is kept in clear."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from boardbench.collector.cli import main
from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import InvalidRequest, NotAllowed, StoreUnavailable
from boardbench.collector.serve import running
from boardbench.collector.stores.enrolments import Enrolments
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.v1 import board_pb2, collector_pb2, collector_pb2_grpc


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def enrolments(tmp_path: Path, clock: Clock) -> Iterator[Enrolments]:
    with contextlib.closing(Enrolments(tmp_path / "kept" / "enrolments.db", clock)) as opened:
        yield opened


def test_a_token_makes_one_board_known(enrolments: Enrolments) -> None:
    token = enrolments.create(labels={"lab": "zurich"})
    key, labels = enrolments.enroll(token, "pi5", "instance-1")
    assert labels == {"lab": "zurich"}
    enrolments.check("pi5", key, required=True)
    with pytest.raises(NotAllowed, match="used by board pi5"):
        enrolments.enroll(token, "pi6", "instance-2")
    with pytest.raises(NotAllowed, match="used by board pi5"):
        enrolments.enroll(token, "pi5", "instance-2")
    enrolments.check("pi5", key, required=True)


def test_the_same_agent_may_ask_again_when_the_answer_was_lost(enrolments: Enrolments, clock: Clock) -> None:
    token = enrolments.create(hours=1)
    first, _ = enrolments.enroll(token, "pi5", "instance-1")
    clock.now += 3000
    second, _ = enrolments.enroll(token, "pi5", "instance-1")
    assert first != second
    enrolments.check("pi5", second, required=True)
    with pytest.raises(NotAllowed, match="not its own"):
        enrolments.check("pi5", first, required=True)
    clock.now += 3000
    with pytest.raises(NotAllowed, match="expired"):
        enrolments.enroll(token, "pi5", "instance-1")


def test_without_an_instance_a_token_is_used_up_at_once(enrolments: Enrolments) -> None:
    token = enrolments.create()
    enrolments.enroll(token, "pi5", "")
    # None is never told from None in the data: whoever says nothing about itself is taken for the same.
    enrolments.enroll(token, "pi5", "")
    with pytest.raises(NotAllowed):
        enrolments.enroll(token, "pi5", "instance-1")


@pytest.mark.parametrize("token", ["", "bbt_guess", "bbt_" + "A" * 1000])
def test_what_is_no_token_is_refused(enrolments: Enrolments, token: str) -> None:
    enrolments.create()
    with pytest.raises(NotAllowed, match="no such token"):
        enrolments.enroll(token, "pi5", "instance-1")


@pytest.mark.parametrize("hours", [0, -1, 24.1, float("nan"), float("inf")])
def test_a_token_is_good_for_a_day_at_most(enrolments: Enrolments, hours: float) -> None:
    with pytest.raises(InvalidRequest, match="24 hours"):
        enrolments.create(hours)


def test_an_expired_or_revoked_token_is_worth_nothing(enrolments: Enrolments, clock: Clock) -> None:
    short, revoked, used = enrolments.create(hours=0.5), enrolments.create(), enrolments.create()
    assert enrolments.revoke(revoked)
    assert not enrolments.revoke(revoked)
    with pytest.raises(NotAllowed, match="no such token"):
        enrolments.enroll(revoked, "pi5", "i")
    enrolments.enroll(used, "pi6", "i")
    assert not enrolments.revoke(used)
    clock.now += 1801
    with pytest.raises(NotAllowed, match="expired"):
        enrolments.enroll(short, "pi5", "i")
    assert [(token.name, token.device_id) for token in enrolments.tokens() if token.used] == [
        (used[:10], "pi6")
    ]


def test_what_is_required_and_what_is_not(enrolments: Enrolments) -> None:
    key, _ = enrolments.enroll(enrolments.create(), "pi5", "i")
    enrolments.check("stranger", "", required=False)
    enrolments.check("pi5", "", required=False)
    with pytest.raises(NotAllowed, match="is not enrolled here: make a token"):
        enrolments.check("stranger", "", required=True)
    with pytest.raises(NotAllowed, match="shows no key"):
        enrolments.check("pi5", "", required=True)
    for required in (False, True):
        with pytest.raises(NotAllowed, match="not its own"):
            enrolments.check("stranger", key, required=required)
    assert enrolments.forget("pi5")
    assert not enrolments.forget("pi5")
    with pytest.raises(NotAllowed, match="no longer"):
        enrolments.check("pi5", key, required=False)


def test_one_token_enrols_one_of_many_that_come_at_once(enrolments: Enrolments) -> None:
    token = enrolments.create()

    def enroll(number: int) -> bool:
        try:
            enrolments.enroll(token, f"pi{number}", f"i{number}")
        except NotAllowed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(enroll, range(32))) == 1


def test_neither_token_nor_key_is_in_the_file_and_nobody_else_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "enrolments.db"
    with contextlib.closing(Enrolments(path)) as enrolments:
        token = enrolments.create()
        key, _ = enrolments.enroll(token, "pi5", "i")
    content = path.read_bytes()
    assert token.encode() not in content
    assert key.encode() not in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_all_there_after_a_start(tmp_path: Path) -> None:
    path = tmp_path / "enrolments.db"
    with contextlib.closing(Enrolments(path)) as enrolments:
        token = enrolments.create()
        key, _ = enrolments.enroll(enrolments.create(), "pi5", "i")
    with contextlib.closing(Enrolments(path)) as enrolments:
        enrolments.check("pi5", key, required=True)
        enrolments.enroll(token, "pi6", "i")


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "enrolments.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreUnavailable, match=r"enrolments\.db"):
        Enrolments(path)


def test_a_file_that_another_holds_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boardbench.collector.stores.enrolments._BUSY_SECONDS", 0.05)
    path = tmp_path / "enrolments.db"
    with (
        contextlib.closing(Enrolments(path)) as enrolments,
        contextlib.closing(sqlite3.connect(path)) as other,
    ):
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreUnavailable, match="locked"):
            enrolments.create()


def test_the_commands(tmp_path: Path) -> None:
    def say(*arguments: str, code: int = 0) -> str:
        answer = CliRunner().invoke(main, [*arguments, "--data-dir", str(tmp_path)])
        assert answer.exit_code == code, answer.output
        return answer.output

    token = say("token", "create", "--hours", "2", "--label", "lab=zurich", "--label", "rack=1").strip()
    assert token.startswith("bbt_")
    listed = say("token", "list")
    assert listed == f"{token[:10]}…  good for 2.0 h  lab=zurich rack=1\n"
    with contextlib.closing(Enrolments(tmp_path / "enrolments.db")) as enrolments:
        enrolments.enroll(token, "pi5", "i")
    assert say("token", "list") == f"{token[:10]}…  used by pi5  lab=zurich rack=1\n"
    assert "no token" in say("token", "revoke", token[:10], code=1)
    say("forget", "pi5")
    assert "no board 'pi5'" in say("forget", "pi5", code=1)
    other = say("token", "create").strip()
    say("token", "revoke", other[:10])
    assert "NAME=VALUE" in say("token", "create", "--label", "nothing", code=2)
    assert "24" in say("token", "create", "--hours", "25", code=2)


async def test_over_the_wire(local_config: CollectorConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    config = replace(local_config, require_enrolment=True)
    with contextlib.closing(Enrolments(tmp_path / "enrolments.db")) as enrolments:
        token = enrolments.create(labels={"lab": "zurich"})
        async with (
            running(config, MemoryResultStore(), enrolments) as listening,
            grpc.aio.insecure_channel(str(listening.grpc)) as channel,
        ):
            stub = collector_pb2_grpc.CollectorServiceStub(channel)

            async def report(*metadata: tuple[str, str]) -> str:
                call = stub.Report(metadata=metadata)
                hello = collector_pb2.Hello(board=board_pb2.Board(device_id="pi5"), spool_id="spool-1")
                await call.write(collector_pb2.ReportRequest(hello=hello))
                try:
                    response = await call.read()
                finally:
                    call.cancel()
                return str(response.WhichOneof("response"))

            with pytest.raises(grpc.aio.AioRpcError, match="not enrolled here") as refused:
                await report()
            assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
            board = board_pb2.Board(device_id="pi5")
            with pytest.raises(grpc.aio.AioRpcError, match="no such token"):
                await stub.Enroll(collector_pb2.EnrollRequest(token="x", board=board, instance_id="i"))
            with pytest.raises(grpc.aio.AioRpcError, match="device_id") as refused:
                await stub.Enroll(collector_pb2.EnrollRequest(token=token, instance_id="i"))
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            answer = await stub.Enroll(collector_pb2.EnrollRequest(token=token, board=board, instance_id="i"))
            assert dict(answer.labels) == {"lab": "zurich"}
            assert await report(("boardbench-device-key", answer.device_key)) == "welcome"
            with pytest.raises(grpc.aio.AioRpcError, match="not its own"):
                await report(("boardbench-device-key", "wrong"))


async def test_a_collector_without_them_says_so(local_config: CollectorConfig) -> None:
    async with (
        running(local_config, MemoryResultStore()) as listening,
        grpc.aio.insecure_channel(str(listening.grpc)) as channel,
    ):
        stub = collector_pb2_grpc.CollectorServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="enrols no boards"):
            await stub.Enroll(collector_pb2.EnrollRequest(token="t", board=board_pb2.Board(device_id="pi5")))
