"""Collectors (in this process or as one of their own), boards that talk to them, and results to tell."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType

import grpc
import psycopg
import pytest

from boardbench.collector.config import Address, CollectorConfig
from boardbench.collector.serve import Listening, running
from boardbench.collector.store import ResultStore
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.collector.stores.postgres import PostgresResultStore
from boardbench.collector.stores.sqlite import SqliteResultStore
from boardbench.v1 import board_pb2, collector_pb2, collector_pb2_grpc, placement_pb2, result_pb2

REPOSITORY = Path(__file__).resolve().parents[2]

DEADLINE_SECONDS = 30.0
"""Nothing here takes a second; a loaded machine may make it several."""


def wait_until(
    condition: Callable[[], object], what: str, deadline_seconds: float = DEADLINE_SECONDS
) -> None:
    """Returns when the condition holds, looking again and again; fails the test when it never does."""
    deadline = time.monotonic() + deadline_seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {deadline_seconds:.0f} s")
        time.sleep(0.02)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs boardbench-collector to its end."""
    return subprocess.run(
        [sys.executable, "-m", "boardbench.collector", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | environment,
    )


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., None]:
    return wait_until


def build_result(
    run_id: str = "run-1",
    *,
    device_id: str = "pi5",
    status: int = result_pb2.RUN_STATUS_SUCCEEDED,
    model: str = "mobilenet.tflite",
    sha256: str = "5ba0" * 16,
    runtime: str = "tflite",
    finished: float = 1_800_000_000.0,
    p50: float = 0.0125,
    samples: int = 100,
) -> result_pb2.RunResult:
    """A result as an agent sends it: a quantised MobileNet with one op that XNNPACK did not take."""
    result = result_pb2.RunResult(run_id=run_id, status=status)
    result.model.name, result.model.sha256 = model, sha256
    result.model.format, result.model.size_bytes = "tflite", 543_216
    result.board.CopyFrom(build_board(device_id))
    result.spec.threads = 4
    result.effective_spec.runtime, result.effective_spec.device = runtime, "cpu"
    result.effective_spec.threads = 4
    result.created_at.FromNanoseconds(int((finished - 12) * 1e9))
    result.finished_at.FromNanoseconds(int(finished * 1e9))
    result.runtime.name, result.runtime.device = runtime, "cpu"
    result.runtime.version = "ai-edge-litert 2.3.0"
    if status != result_pb2.RUN_STATUS_SUCCEEDED:
        result.error.code, result.error.message = "worker_killed", "the worker was killed by SIGSEGV"
        result.error.stage = result_pb2.STAGE_FIRST_INFERENCE
        return result
    result.started_at.FromNanoseconds(int((finished - 11) * 1e9))
    result.import_seconds, result.create_seconds, result.first_inference_seconds = 0.31, 0.0042, 0.0171
    latency = result.latency
    latency.count, latency.mean_seconds = 800, p50 * 1.01
    latency.min_seconds, latency.max_seconds, latency.stdev_seconds = p50 * 0.9, p50 * 2, p50 * 0.05
    for percentile, factor in ((50, 1.0), (90, 1.1), (99, 1.5), (99.9, 1.9)):
        latency.percentiles.add(
            percentile=percentile,
            seconds=p50 * factor,
            low_seconds=p50 * factor * 0.99,
            high_seconds=p50 * factor * 1.02,
        )
    latency.samples_nanoseconds.extend(int(p50 * 1e9) + index for index in range(samples))
    for phase, megabytes in ((1, 60), (2, 66), (3, 70), (4, 71)):
        result.memory.phases.add(
            phase=phase,  # type: ignore[arg-type]
            rss_bytes=megabytes << 20,
            pss_bytes=(megabytes - 9) << 20,
            peak_rss_bytes=(megabytes + 3) << 20,
        )
    result.memory.peak_rss_bytes, result.memory.model_rss_bytes = 74 << 20, 11 << 20
    placement = result.placement
    placement.evidence = placement_pb2.EVIDENCE_PARTITION
    placement.verdict = placement_pb2.PLACEMENT_VERDICT_NOT_ACCELERATED
    placement.accelerated_ops, placement.cpu_ops = 0, 31
    placement.units.add(unit=placement_pb2.UNIT_CPU_DELEGATE, ops=30)
    placement.units.add(unit=placement_pb2.UNIT_CPU, ops=1)
    for index in range(31):
        placement.ops.add(
            index=index,
            type="CONV_2D" if index else "TOPK_V2",
            unit=placement_pb2.UNIT_CPU_DELEGATE if index else placement_pb2.UNIT_CPU,
            delegate="TfLiteXNNPackDelegate" if index else "",
        )
    result.warnings.add(code="high_load", message="load was 3.1 on 4 processors when the run began")
    return result


def build_board(device_id: str = "pi5") -> board_pb2.Board:
    """A board as it describes itself."""
    return board_pb2.Board(
        device_id=device_id,
        hostname=f"{device_id}.lab",
        model="Raspberry Pi 5 Model B Rev 1.0",
        soc="bcm2712",
        architecture="aarch64",
        cpu_count=4,
        memory_bytes=8 << 30,
        os="Debian GNU/Linux 12 (bookworm)",
        kernel="6.6.31+rpt-rpi-2712",
        labels={"lab": "zurich"},
    )


def build_hello(device_id: str = "pi5", spool_id: str = "spool-1") -> collector_pb2.Hello:
    """What a board says first."""
    hello = collector_pb2.Hello(
        board=build_board(device_id),
        agent_version="0.1.0",
        spool_id=spool_id,
        address=f"{device_id}.lab:7341",
    )
    hello.runtimes.add(
        name="tflite", available=True, version="ai-edge-litert 2.3.0", formats=["tflite"], devices=["cpu"]
    )
    hello.runtimes.add(
        name="onnxruntime", available=False, reason="not installed; pip install boardbench[onnx]"
    )
    return hello


@pytest.fixture
def make_result() -> Callable[..., result_pb2.RunResult]:
    return build_result


@pytest.fixture
def make_hello() -> Callable[..., collector_pb2.Hello]:
    return build_hello


class Board:
    """The agent's side of a report, over a real connection."""

    def __init__(
        self, stub: collector_pb2_grpc.CollectorServiceAsyncStub, hello: collector_pb2.Hello
    ) -> None:
        self.hello = hello
        self.call = stub.Report()
        self.welcome: collector_pb2.Welcome | None = None

    async def join(self) -> collector_pb2.Welcome:
        """Says hello and returns the welcome."""
        await self.call.write(collector_pb2.ReportRequest(hello=self.hello))
        answer = await self.read()
        assert answer.WhichOneof("response") == "welcome", answer
        self.welcome = answer.welcome
        return answer.welcome

    async def send(self, sequence: int, result: result_pb2.RunResult, *, spool_id: str | None = None) -> None:
        """Sends a result."""
        spooled = collector_pb2.SpooledResult(
            spool_id=self.hello.spool_id if spool_id is None else spool_id, sequence=sequence, result=result
        )
        await self.call.write(collector_pb2.ReportRequest(result=spooled))

    async def beat(self, **heartbeat: object) -> None:
        """Sends a heartbeat."""
        message = collector_pb2.Heartbeat(**heartbeat)  # type: ignore[arg-type]
        await self.call.write(collector_pb2.ReportRequest(heartbeat=message))

    async def read(self) -> collector_pb2.ReportResponse:
        """Returns the next answer; fails when the stream has ended."""
        answer = await asyncio.wait_for(self.call.read(), DEADLINE_SECONDS)
        if answer is grpc.aio.EOF:
            pytest.fail(f"the stream ended: {await self.call.code()} {await self.call.details()}")
        return answer

    async def acknowledged(self, sequence: int, *, spool_id: str | None = None) -> None:
        """Returns when everything up to the sequence is acknowledged."""
        while True:
            answer = await self.read()
            assert answer.WhichOneof("response") == "acknowledgement", answer
            if answer.acknowledgement.sequence >= sequence:
                assert answer.acknowledgement.sequence == sequence
                assert answer.acknowledgement.spool_id == (spool_id or self.hello.spool_id)
                return

    async def leave(self) -> None:
        """Ends the stream and returns when the collector has, too."""
        await self.call.done_writing()
        # gRPC tells how a stream ended only past everything that came on it.
        await asyncio.wait_for(self._drain(), DEADLINE_SECONDS)
        assert await self.call.code() is grpc.StatusCode.OK

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """Returns (status, message) with which the collector ended the stream, skipping answers before it."""
        await asyncio.wait_for(self._drain(), DEADLINE_SECONDS)
        return await self.call.code(), await self.call.details()

    async def _drain(self) -> None:
        try:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError:
            pass


class Collector:
    """A collector with both faces open on free ports, in this process."""

    def __init__(self, config: CollectorConfig, store: ResultStore) -> None:
        self.config = config
        self.store = store
        self.listening: Listening
        self.stub: collector_pb2_grpc.CollectorServiceAsyncStub
        self._server, self._client = AsyncExitStack(), AsyncExitStack()

    async def __aenter__(self) -> Collector:
        self.listening = await self._server.enter_async_context(running(self.config, self.store))
        self.channel = await self._client.enter_async_context(
            grpc.aio.insecure_channel(
                str(self.listening.grpc), options=(("grpc.max_send_message_length", -1),)
            )
        )
        self.stub = collector_pb2_grpc.CollectorServiceStub(self.channel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()
        await self.stop_serving()

    async def stop_serving(self) -> None:
        """Stops the server while its clients still listen."""
        await self._server.aclose()

    @property
    def url(self) -> str:
        """Where HTTP answers, without a final slash."""
        return f"http://{self.listening.http}"

    def board(self, device_id: str = "pi5", spool_id: str = "spool-1") -> Board:
        """Returns a board that has a stream but has said nothing yet."""
        return Board(self.stub, build_hello(device_id, spool_id))


@pytest.fixture
def local_config(tmp_path: Path) -> CollectorConfig:
    """Free loopback ports and a fresh folder."""
    return CollectorConfig(
        listen=Address("127.0.0.1", 0),
        http=Address("127.0.0.1", 0),
        data_dir=tmp_path / "collector",
        drain_seconds=2.0,
    )


_NOBODY = 65534
"""Users that no system lacks; PostgreSQL refuses to run as root."""


class PostgresServer:
    """A PostgreSQL server of our own: its own folder, a socket in it, its ordinary durability."""

    def __init__(self, bin_: Path, libraries: str, *, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="boardbench-postgres-"))
        self.folder.mkdir(exist_ok=True)
        self._bin, self._numbers = bin_, itertools.count(1)
        # By what pytest says of itself those are found that a test has left behind.
        self._environment = {
            name: value for name, value in os.environ.items() if name.startswith("PYTEST_")
        } | {
            "PATH": os.environ["PATH"],
            "LC_ALL": "C.UTF-8",
            "LD_LIBRARY_PATH": libraries,
        }
        self._as: tuple[str, ...] = ()
        if os.geteuid() == 0:
            os.chown(self.folder, _NOBODY, _NOBODY)
            # Not by subprocess' own user: for that it forks, and gRPC starts its threads anew in the child,
            # which may end it before the program is there.
            self._as = ("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            made = self.run(
                "initdb", "-D", "data", "-U", "tester", "--auth", "trust", "--no-sync", "-E", "UTF8"
            )
            if made.returncode:
                pytest.fail(f"initdb: {made.stdout}")
            self.start()
        except BaseException:
            self.stop()
            raise

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs one of the server's programs to its end."""
        return subprocess.run(
            [*self._as, str(self._bin / program), *arguments],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )

    def start(self) -> None:
        """Starts it and returns once it answers."""
        self._launch()
        wait_until(self._answers, "PostgreSQL answers")

    def _launch(self) -> None:
        (self.folder / "log").unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._as,
                    *(str(self._bin / "postgres"), "-D", "data", "-k", str(self.folder)),
                    # A socket in the folder, and no port that somebody else may take.
                    *("-h", "", "-c", "shared_buffers=32MB"),
                    # After a crash it syncs a thousand files one by one, which takes a busy disk ten seconds.
                    *("-c", "recovery_init_sync_method=syncfs"),
                ],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            said = (self.folder / "log").read_text()
            if "is still in use" not in said:
                pytest.fail(f"PostgreSQL ended: {said}")
            # On a busy machine a child of the one that was killed takes a moment to notice.
            self._launch()
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(self.url("postgres")).close()
            return True
        return False

    def kill(self) -> None:
        """Ends all of it at once, as a crash would."""
        assert self._process is not None
        # Its children notice that it is gone, and end; the new one waits for the last of them.
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        """Ends it for good."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(DEADLINE_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str) -> str:
        """Returns the address of a database."""
        return f"postgresql://tester@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """Returns the address of a schema that nobody has used: all that a store sees of a database."""
        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            db.execute(f"CREATE SCHEMA {name}")
        return f"{self.url('postgres')}&options=-csearch_path%3D{name}"


def _postgres_programs() -> tuple[Path, str] | None:
    """Returns the folder of a PostgreSQL server's programs and that of its libraries, the newest first."""
    unpacked = REPOSITORY / ".cache" / "system" / "usr"
    for root in (Path("/usr"), unpacked):
        libraries = ":".join(map(str, root.glob("lib/*-linux-*"))) if root == unpacked else ""
        found = sorted(root.glob("lib/postgresql/*/bin/initdb"), key=lambda path: int(path.parts[-3]))
        if found:
            return found[-1].parent, libraries
    initdb = shutil.which("initdb")
    return (Path(initdb).resolve().parent, "") if initdb else None


@contextlib.contextmanager
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL, inside the context; skips, saying so, where there is none."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server here; `make test` unpacks Debian's")
    server = PostgresServer(*programs)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL."""
    with postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """A fresh database."""
    return postgres_server.new_database()


@pytest.fixture
def own_postgres_server() -> Iterator[PostgresServer]:
    """A server that a test may kill."""
    with postgres() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, local_config: CollectorConfig) -> AsyncIterator[ResultStore]:
    """Every kind of store, one after the other; a new kind is added here."""
    opened: ResultStore
    if request.param == "memory":
        opened = MemoryResultStore(max_result_bytes=100_000)
    elif request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
        opened = await PostgresResultStore.open(url, max_result_bytes=100_000)
    else:
        opened = await SqliteResultStore.open(local_config.store_path, max_result_bytes=100_000)
    yield opened
    await opened.close()


@pytest.fixture
async def sqlite_store(local_config: CollectorConfig) -> AsyncIterator[SqliteResultStore]:
    """The default store."""
    opened = await SqliteResultStore.open(local_config.store_path, max_result_bytes=100_000)
    yield opened
    await opened.close()


@pytest.fixture
async def collector(
    local_config: CollectorConfig, sqlite_store: SqliteResultStore
) -> AsyncIterator[Collector]:
    """A collector over the default store."""
    async with Collector(local_config, sqlite_store) as opened:
        yield opened


@pytest.fixture
def collector_over(local_config: CollectorConfig) -> Callable[..., Collector]:
    """Returns collectors over any store and configuration, to be entered with ``async with``."""
    return lambda store, config=local_config: Collector(config, store)


class CollectorProcess:
    """``boardbench-collector serve`` as a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.killed = False
        self.port_file = folder / "ports.json"
        self.port_file.unlink(missing_ok=True)
        self._log = (folder / "collector.log").open("ab")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "boardbench.collector", "serve"),
                *("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"),
                *("--data-dir", str(folder / "data"), "--port-file", str(self.port_file)),
                *arguments,
            ],
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
        )
        wait_until(
            lambda: self.port_file.exists() or self.process.poll() is not None, "the collector listens"
        )
        if not self.port_file.exists():
            pytest.fail(f"the collector ended with {self.process.returncode}:\n{self.log()}")
        ports = json.loads(self.port_file.read_text())
        self.grpc_address = f"127.0.0.1:{ports['grpc']}"
        self.url = f"http://127.0.0.1:{ports['http']}"

    def log(self) -> str:
        """Returns what it has written."""
        return (self.folder / "collector.log").read_text()

    def get(self, path: str) -> str:
        """Returns what HTTP answers, whatever the status."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=DEADLINE_SECONDS) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode()

    def kill(self) -> None:
        """Ends it as a power cut would, as far as a process can know."""
        self.killed = True
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def stop(self) -> int:
        """Asks it to end and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(DEADLINE_SECONDS)
        finally:
            self._log.close()


@pytest.fixture
def start_collector(tmp_path: Path) -> Iterator[Callable[..., CollectorProcess]]:
    """Starts collectors as processes, over one folder unless another is named; ends those that still run."""
    started: list[CollectorProcess] = []

    def start(*arguments: str, folder: Path = tmp_path) -> CollectorProcess:
        folder.mkdir(exist_ok=True)
        started.append(CollectorProcess(folder, *arguments))
        return started[-1]

    yield start
    for process in started:
        if process.process.poll() is None:
            process.kill()


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def find_program() -> Callable[[str], str]:
    """Returns the path of a program that a test runs for real; skips, saying so, where it is not."""

    def find(name: str) -> str:
        for folder in os.environ.get("PATH", "").split(os.pathsep):
            path = Path(folder) / name
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
        pytest.skip(f"{name} is not on the PATH; `make test` installs it")

    return find
