"""backup, restore, check, prune and serve --store, as processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from boardbench.v1 import collector_pb2, collector_pb2_grpc, result_pb2

from .conftest import run

MakeResult = Callable[..., result_pb2.RunResult]
MakeHello = Callable[..., collector_pb2.Hello]


async def send(address: str, hello: collector_pb2.Hello, *results: result_pb2.RunResult) -> None:
    """Sends results, and returns once they are acknowledged."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = collector_pb2_grpc.CollectorServiceStub(channel).Report()
        await call.write(collector_pb2.ReportRequest(hello=hello))
        welcome = await call.read()
        begin = welcome.welcome.acknowledged_sequence + 1
        for sequence, result in enumerate(results, begin):
            spooled = collector_pb2.SpooledResult(spool_id=hello.spool_id, sequence=sequence, result=result)
            await call.write(collector_pb2.ReportRequest(result=spooled))
        while (await call.read()).acknowledgement.sequence < begin + len(results) - 1:
            pass
        await call.done_writing()
        await call.code()


def run_ids(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        stub = collector_pb2_grpc.CollectorServiceStub(channel)
        return [each.run_id for each in stub.ListResults(collector_pb2.ListResultsRequest()).results]


def test_a_backup_of_a_running_collector_becomes_another_one(
    start_collector: Callable[..., Any], make_result: MakeResult, make_hello: MakeHello, tmp_path: Path
) -> None:
    collector = start_collector()
    asyncio.run(send(collector.grpc_address, make_hello(), *(make_result(f"run-{n}") for n in range(3))))
    data, backups = ("--data-dir", str(tmp_path / "data")), tmp_path / "backups"
    backups.mkdir()
    answer = run("backup", *data, str(backups))
    assert answer.returncode == 0, answer.stderr
    (file,) = backups.iterdir()
    assert file.name.startswith("boardbench-") and file.name.endswith("Z.backup")
    assert f"{file}: whole, of 20" in answer.stdout and "3 results" in answer.stdout
    asyncio.run(send(collector.grpc_address, make_hello(), make_result("after")))
    answer = run("restore", *data, str(file))
    assert answer.returncode == 1 and "another boardbench-collector has" in answer.stderr
    assert collector.stop() == 0
    answer = run("restore", *data, str(file))
    assert answer.returncode == 1 and "there is a store" in answer.stderr
    answer = run("check", "--backup", str(file))
    assert answer.returncode == 0 and "3 results" in answer.stdout
    (tmp_path / "data" / "results.db").rename(tmp_path / "lost")
    answer = run("restore", *data, str(file))
    assert answer.returncode == 0 and "3 results" in answer.stdout
    assert run("check", *data).stdout.strip().endswith("results.db: sound")
    collector = start_collector()
    assert sorted(run_ids(collector.grpc_address)) == ["run-0", "run-1", "run-2"]
    assert collector.stop() == 0


def test_collectors_share_a_database(
    start_collector: Callable[..., Any],
    make_result: MakeResult,
    make_hello: MakeHello,
    postgres_url: str,
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    first = start_collector("--store", postgres_url)
    assert "Store: postgresql://" in first.log()
    asyncio.run(send(first.grpc_address, make_hello(), make_result("run-1")))
    first.kill()
    second = start_collector("--store", postgres_url)
    asyncio.run(send(second.grpc_address, make_hello(), make_result("run-2")))
    assert sorted(run_ids(second.grpc_address)) == ["run-1", "run-2"]
    file = tmp_path / "all.backup"
    assert run("backup", "--store", postgres_url, str(file)).returncode == 0
    answer = run("restore", "--data-dir", str(tmp_path / "other"), str(file))
    assert answer.returncode == 0 and "2 results" in answer.stdout
    assert run("check", BOARDBENCH_COLLECTOR_STORE=postgres_url).stdout.endswith(": sound\n")
    assert second.stop() == 0
    assert not (tmp_path / "data" / "results.db").exists()


def test_prune_says_what_it_removed_and_gives_the_space_back(
    start_collector: Callable[..., Any], make_result: MakeResult, make_hello: MakeHello, tmp_path: Path
) -> None:
    collector = start_collector()
    results = [make_result(f"run-{n}", samples=20_000) for n in range(10)]
    asyncio.run(send(collector.grpc_address, make_hello(), *results))
    data, store = ("--data-dir", str(tmp_path / "data")), tmp_path / "data" / "results.db"
    answer = run("prune", *data, "--keep-per-series", "2")
    assert answer.returncode == 1 and "another boardbench-collector has" in answer.stderr
    assert collector.stop() == 0
    before = store.stat().st_size
    answer = run("prune", *data, "--keep-per-series", "2", "--keep-samples", "365")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("8 results removed, ") and "0 samples of 0" in answer.stdout
    assert store.stat().st_size < before / 3
    answer = run("prune", *data)
    assert answer.returncode == 2 and "say what to keep" in answer.stderr


def test_a_collector_prunes_by_itself_and_counts_it(
    start_collector: Callable[..., Any],
    make_result: MakeResult,
    make_hello: MakeHello,
    wait_until: Callable[..., None],
) -> None:
    collector = start_collector()
    asyncio.run(send(collector.grpc_address, make_hello(), *(make_result(f"run-{n}") for n in range(5))))
    assert "results_removed_total" not in collector.get("/metrics"), (
        "where everything is kept, nothing is said"
    )
    assert collector.stop() == 0
    collector = start_collector("--keep-per-series", "3")
    wait_until(
        lambda: "boardbench_collector_results_removed_total 2" in collector.get("/metrics"),
        "two results are removed",
    )
    assert len(run_ids(collector.grpc_address)) == 3
    assert collector.stop() == 0


@pytest.mark.parametrize("command", ["serve", "backup", "check"])
def test_a_store_of_an_unknown_kind_is_named(command: str, tmp_path: Path) -> None:
    more = [str(tmp_path / "file")] if command == "backup" else []
    answer = run(command, "--store", "mysql://root:secret@host/x", *more, "--data-dir", str(tmp_path))
    assert answer.returncode == 1
    assert "--store mysql" in answer.stderr and "postgresql://HOST/DATABASE" in answer.stderr
    assert "secret" not in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize("command", ["serve", "backup", "restore", "check", "token list"])
def test_without_psycopg_the_command_that_mends_it_is_told(command: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    arguments = [*command.split(), "--store", "postgresql:///x", "--data-dir", str(tmp_path)]
    arguments += [str(file)] if command in {"backup", "restore"} else []
    program = (
        "import sys; sys.modules['psycopg'] = None; from boardbench.collector.cli import main; "
        f"main({arguments!r})"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 1
    assert "pip install 'boardbench[postgres]'" in answer.stderr
    assert "Traceback" not in answer.stderr
