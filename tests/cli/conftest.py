"""A board and a cable for the tests of the CLI: real sockets, a scripted agent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format

from boardbench.v1 import agent_pb2, agent_pb2_grpc, board_pb2, model_pb2, result_pb2

GOLDEN = Path(__file__).parent / "golden"
MIB = 1 << 20


def sample_result(name: str = "success") -> result_pb2.RunResult:
    """A result from the folder of golden ones."""
    return json_format.ParseDict(
        json.loads((GOLDEN / f"{name}.json").read_text("utf-8")), result_pb2.RunResult()
    )


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Returns once the condition holds; fails the test when it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.005)


@dataclass
class ScriptedRun:
    """A run of the scripted board: events are put in by the test or by its script."""

    request: agent_pb2.RunBenchmarkRequest
    events: list[agent_pb2.RunEvent] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def tell(self, **event: object) -> None:
        with self.changed:
            sequence = len(self.events) + 1
            self.events.append(
                agent_pb2.RunEvent(run_id=self.request.run_id, sequence=sequence, **event)  # type: ignore[arg-type]
            )
            self.changed.notify_all()

    def finish(self, result: result_pb2.RunResult | None = None) -> None:
        result = result_pb2.RunResult() if result is None else result
        result.run_id = self.request.run_id
        self.tell(result=result)

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].HasField("result")


def measure(board: ScriptedBoard, run: ScriptedRun) -> None:
    """The usual script: a short run that succeeds."""
    run.tell(queued=agent_pb2.QueuedEvent(runs_ahead=0))
    for stage in (result_pb2.STAGE_START, result_pb2.STAGE_CREATE, result_pb2.STAGE_MEASURE):
        run.tell(stage=agent_pb2.StageEvent(stage=stage))
    run.tell(
        progress=agent_pb2.ProgressEvent(
            stage=result_pb2.STAGE_MEASURE, runs=12, elapsed_seconds=0.1, fraction=0.5, median_seconds=0.00123
        )
    )
    result = sample_result()
    result.model.CopyFrom(board.stored[run.request.model_sha256].model)
    result.board.CopyFrom(board.board)
    run.finish(result)


class ScriptedBoard(agent_pb2_grpc.AgentServiceServicer):
    """An agent whose files are in memory and whose runs follow a script, on a real port."""

    RUN = ScriptedRun

    def __init__(self) -> None:
        self.board = board_pb2.Board(
            device_id="test-board",
            hostname="test-board",
            architecture="aarch64",
            model="Test Board 1",
            cpu_count=4,
        )
        self.contents: dict[str, bytearray] = {}
        self.stored: dict[str, agent_pb2.StoredModel] = {}
        self.runs: dict[str, ScriptedRun] = {}
        self.cancelled: list[str] = []
        self.script: Callable[[ScriptedBoard, ScriptedRun], None] = measure
        self.on_chunk: Callable[[agent_pb2.PushChunk, grpc.ServicerContext], None] = lambda chunk, context: (
            None
        )
        self.on_header: Callable[[agent_pb2.PushHeader], None] = lambda header: None
        self.before_run: Callable[[str, grpc.ServicerContext], None] = lambda name, context: None
        self.headers: list[agent_pb2.PushHeader] = []
        self.resumed_from: list[int] = []
        self.received_bytes = 0
        self.calls: list[str] = []
        self.examined: list[agent_pb2.ExamineRequest] = []
        # None: it is an agent that can't be examined yet.
        self.examination: agent_pb2.ExamineResponse | None = None
        self.runtimes = [
            board_pb2.RuntimeStatus(
                name="tflite",
                available=True,
                version="ai-edge-litert 2.3.0",
                formats=["tflite"],
                devices=["cpu"],
                interpreter=board_pb2.Interpreter(version="CPython 3.11.7"),
            ),
            board_pb2.RuntimeStatus(
                name="onnxruntime", reason="onnxruntime is not installed: pip install 'boardbench[onnx]'"
            ),
        ]
        self._server: grpc.Server | None = None
        self.port = 0

    def start(self) -> None:
        self._server = grpc.server(
            futures.ThreadPoolExecutor(16, thread_name_prefix="board"), options=[("grpc.so_reuseport", 0)]
        )
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            for run in list(self.runs.values()):
                with run.changed:
                    run.changed.notify_all()
            self._server.stop(None).wait()
            self._server = None

    def keep(
        self, data: bytes, name: str, kind: agent_pb2.FileKind.ValueType = agent_pb2.FILE_KIND_MODEL
    ) -> str:
        """A file that is on the board from the beginning."""
        sha256 = hashlib.sha256(data).hexdigest()
        model = model_pb2.Model(
            sha256=sha256, name=name, format=name.rpartition(".")[2], size_bytes=len(data)
        )
        self.stored[sha256] = agent_pb2.StoredModel(model=model, kind=kind)
        return sha256

    def Describe(self, request, context):
        self.calls.append("Describe")
        return agent_pb2.DescribeResponse(
            board=self.board,
            agent_version="0.1.0",
            runtimes=self.runtimes,
            model_store=agent_pb2.ModelStoreStatus(
                files=1, used_bytes=MIB, limit_bytes=4096 * MIB, free_bytes=999 * MIB
            ),
            spool=agent_pb2.SpoolStatus(pending=2, dropped=1),
            collector=agent_pb2.CollectorLinkStatus(address="10.0.0.1:7342", error="connection refused"),
        )

    def PushModel(self, request_iterator, context):
        self.calls.append("PushModel")
        header = next(request_iterator).header
        self.headers.append(header)
        self.on_header(header)
        if header.sha256 in self.stored:
            model = self.stored[header.sha256].model
            yield agent_pb2.PushModelResponse(done=agent_pb2.PushDone(model=model, already_present=True))
            return
        content = self.contents.setdefault(header.sha256, bytearray())
        self.resumed_from.append(len(content))
        yield agent_pb2.PushModelResponse(resume=agent_pb2.PushResume(offset_bytes=len(content)))
        for request in request_iterator:
            chunk = request.chunk
            self.on_chunk(chunk, context)
            if zlib.crc32(chunk.data) != chunk.crc32:
                context.abort(
                    grpc.StatusCode.DATA_LOSS, f"the chunk at byte {chunk.offset_bytes} arrived damaged"
                )
            if chunk.offset_bytes != len(content):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a gap")
            content += chunk.data
            self.received_bytes += len(chunk.data)
            if len(content) == header.size_bytes:
                break
        if len(content) != header.size_bytes:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the file ended early")
        if hashlib.sha256(content).hexdigest() != header.sha256:
            del self.contents[header.sha256]
            context.abort(
                grpc.StatusCode.DATA_LOSS, f"{header.name} arrived with another SHA-256 than announced"
            )
        sha256 = self.keep(bytes(content), header.name, header.kind)
        yield agent_pb2.PushModelResponse(done=agent_pb2.PushDone(model=self.stored[sha256].model))

    def Examine(self, request, context):
        self.calls.append("Examine")
        self.examined.append(request)
        if self.examination is None:
            return super().Examine(request, context)
        return self.examination

    def ListModels(self, request, context):
        return agent_pb2.ListModelsResponse(models=self.stored.values())

    def DeleteModel(self, request, context):
        if self.stored[request.sha256].in_use:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a run needs it: cancel the run first")
        del self.stored[request.sha256]
        return agent_pb2.DeleteModelResponse()

    def RunBenchmark(self, request, context):
        self.calls.append("RunBenchmark")
        if request.model_sha256 not in self.stored:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model here: push it first")
        self.before_run(self.stored[request.model_sha256].model.name, context)
        run = self.runs.get(request.run_id)
        if run is None:
            run = self.runs[request.run_id] = ScriptedRun(request)
            threading.Thread(target=self.script, args=(self, run), daemon=True).start()
        for event in self._events(run, 0, context):
            yield agent_pb2.RunBenchmarkResponse(event=event)

    def WatchRun(self, request, context):
        self.calls.append("WatchRun")
        run = self.runs.get(request.run_id)
        if run is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no run {request.run_id} here")
        for event in self._events(run, request.after_sequence, context):
            yield agent_pb2.WatchRunResponse(event=event)

    def _events(self, run, after, context):
        while context.is_active():
            with run.changed:
                if len(run.events) == after and context.is_active():
                    run.changed.wait(1.0)
                fresh = run.events[after:]
            for event in fresh:
                after = event.sequence
                yield event
                if event.HasField("result"):
                    return

    def ListRuns(self, request, context):
        def summary(run: ScriptedRun) -> agent_pb2.RunSummary:
            ended = run.ended
            return agent_pb2.RunSummary(
                run_id=run.request.run_id,
                model=self.stored[run.request.model_sha256].model,
                state=agent_pb2.RUN_STATE_ENDED if ended else agent_pb2.RUN_STATE_RUNNING,
                status=run.events[-1].result.status if ended else result_pb2.RUN_STATUS_UNSPECIFIED,
                stage=result_pb2.STAGE_UNSPECIFIED if ended else result_pb2.STAGE_MEASURE,
            )

        return agent_pb2.ListRunsResponse(runs=[summary(run) for run in self.runs.values()])

    def CancelRun(self, request, context):
        self.calls.append("CancelRun")
        run = self.runs.get(request.run_id)
        if run is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no run {request.run_id} here")
        if run.ended:
            return agent_pb2.CancelRunResponse(cancelled=False)
        self.cancelled.append(request.run_id)
        run.finish(sample_result("cancelled"))
        return agent_pb2.CancelRunResponse(cancelled=True)


@pytest.fixture
def board() -> Iterator[ScriptedBoard]:
    """A running scripted board."""
    board = ScriptedBoard()
    board.start()
    yield board
    board.stop()


@pytest.fixture
def another_board() -> Iterator[ScriptedBoard]:
    """One more."""
    board = ScriptedBoard()
    board.board.hostname = board.board.device_id = "another-board"
    board.start()
    yield board
    board.stop()


class Cable:
    """A TCP connection to a board that a test can cut and mend; every byte is counted."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.to_board_bytes = 0
        self._cut_after: int | None = None
        self._mended = threading.Event()
        self._mended.set()
        self._stopped = False
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Breaks every connection, as by a reset, and refuses new ones until ``mend``."""
        self._mended.clear()
        self._break()

    def cut_after(self, to_board_bytes: int) -> None:
        """Breaks every connection once, when so many more bytes have gone to the board."""
        self._cut_after = self.to_board_bytes + to_board_bytes

    def mend(self) -> None:
        """Takes connections again."""
        self._mended.set()

    def close(self) -> None:
        self._stopped = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close alone does not wake accept
        self._listener.close()
        self._mended.set()
        self._break()
        for thread in self._threads:
            thread.join(10)

    def _break(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._stopped:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._mended.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self.connections += 1
            with self._lock:
                self._pairs.add((near, far))
            thread = threading.Thread(target=self._carry, args=(near, far), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with near, far, contextlib.suppress(OSError):
            while True:
                readable, _, _ = select.select([near, far], [], [])
                for end in readable:
                    data = end.recv(1 << 16)
                    if not data:
                        return
                    if end is near:
                        self.to_board_bytes += len(data)
                        if self._cut_after is not None and self.to_board_bytes >= self._cut_after:
                            self._cut_after = None
                            self._break()
                            return
                    (far if end is near else near).sendall(data)


@pytest.fixture
def cable(board: ScriptedBoard) -> Iterator[Cable]:
    """A cable to the board."""
    cable = Cable(board.port)
    yield cable
    cable.close()


@dataclass(frozen=True)
class Finished:
    """What a command did."""

    code: int
    out: str
    err: str


class Running:
    """A ``boardbench`` command as a process."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "boardbench.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=clean_environment() | environment,
        )

    def finished(self, seconds: float = 60.0) -> Finished:
        out, err = self.process.communicate(timeout=seconds)
        return Finished(self.process.returncode, out, err)


def clean_environment() -> dict[str, str]:
    """The environment without what would change the CLI's behaviour."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BOARDBENCH", "GRPC_"))}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        kept.pop(name, None)
    return kept | {"TZ": "UTC", "PYTHONUTF8": "1", "PYTHONWARNINGS": "error"}


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts ``boardbench`` with the given arguments; ended with the test."""
    running: list[Running] = []

    def begin(*arguments: object, **environment: str) -> Running:
        running.append(Running(*map(str, arguments), **environment))
        return running[-1]

    yield begin
    for entry in running:
        if entry.process.poll() is None:
            entry.process.kill()
        entry.process.communicate()


@pytest.fixture
def boardbench(start: Callable[..., Running]) -> Callable[..., Finished]:
    """Runs ``boardbench`` with the given arguments to its end."""

    def call(*arguments: object, **environment: str) -> Finished:
        return start(*arguments, **environment).finished()

    return call


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A file of 3 MiB and a bit that no board has."""
    path = tmp_path / "model.tflite"
    path.write_bytes(os.urandom(3 * MIB + 12345))
    return path


@pytest.fixture(name="sample")
def _sample() -> Callable[[str], result_pb2.RunResult]:
    """Results from the folder of golden ones, by name."""
    return sample_result


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., None]:
    """Waits for a condition, with a deadline."""
    return wait_until


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, and nobody else will while the test runs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment for a command that a test starts itself."""
    return clean_environment()


@pytest.fixture(scope="module")
def module_environment() -> dict[str, str]:
    """The same for what lives as long as a module's tests."""
    return clean_environment()


@pytest.fixture(scope="module")
def module_wait_until() -> Callable[..., None]:
    """Waits for a condition, with a deadline."""
    return wait_until


@pytest.fixture
def card_image(tmp_path: Path) -> Callable[[str], Path]:
    """Makes an image with a table of partitions of that kind, whose second one is that of a Raspberry Pi's
    system from which it boots; by other people's programs.
    """
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    sfdisk, mkfs = (shutil.which(name, path=path) for name in ("sfdisk", "mkfs.vfat"))
    if sfdisk is None or mkfs is None:
        pytest.skip("sfdisk or mkfs.vfat is not here (Debian: fdisk, dosfstools)")

    def make(label: str) -> Path:
        from boardbench.cli.fat import FatVolume

        image = tmp_path / f"{label}.img"
        start, size = 16384, 40 * 2048
        with image.open("wb") as file:
            file.truncate((start + size) * 512)
        kinds = ("83", "c") if label == "dos" else ("L", "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7")
        # GPT keeps its copy behind the last one.
        last = size - 2048 if label == "gpt" else size
        table = f"label: {label}\nstart=2048, size=8192, type={kinds[0]}\n"
        table += f"start={start}, size={last}, type={kinds[1]}\n"
        subprocess.run([sfdisk, "--quiet", image], input=table.encode(), check=True, capture_output=True)
        subprocess.run(
            [mkfs, "-F", "32", "-s", "1", "--offset", str(start), image, str(last // 2)],
            check=True,
            capture_output=True,
        )
        with image.open("r+b") as file:
            volume = FatVolume(file, start * 512)
            volume.write("cmdline.txt", b"console=tty1 root=PARTUUID=4e639091-02 rootwait\n")
            volume.write("config.txt", b"arm_64bit=1\n")
            volume.write("issue.txt", b"Raspberry Pi reference 2025-05-13\n")
        return image

    return make


@pytest.fixture
def small_card(card_image: Callable[[str], Path]) -> Path:
    """An image of Bookworm's layout, with nothing but a boot partition in it."""
    return card_image("dos")
