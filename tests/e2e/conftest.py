"""Real programs for the end-to-end suites: collectors, agents and clients as processes, sockets between them.

Nothing is patched inside a program. What goes wrong is made to go wrong outside: a wire that damages or
stops bytes, a small file system, a signal to a process by its own number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

# Starting Python and importing gRPC takes a second; on a loaded board under an emulator, many.
START_SECONDS = 60.0
CLIENT_SECONDS = 150.0


def eventually(what: str, check: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The first true answer of ``check``; fails, saying what was waited for, after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        answer = check()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.02)


def installed(name: str) -> list[str]:
    """The command that the installation made, by the interpreter that runs the tests."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        pytest.fail(f"{path} is not there: install the project into this environment (pip install -e .)")
    return [sys.executable, str(path)]


class Program:
    """A process of ours with its own log, ended by its own process id."""

    def __init__(
        self, name: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log_path = folder / f"{name}.log"
        self._log = self.log_path.open("ab")
        self.process = subprocess.Popen(
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=dict(environment),
            cwd=folder,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def end(self, number: int = signal.SIGTERM, seconds: float = 20.0) -> int:
        """Sends the signal and waits; the exit code. Fails when the process outlives ``seconds``."""
        if self.running:
            self.process.send_signal(number)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"{self.name} did not end within {seconds:.0f} s after signal {number}\n{self.log()}")
        finally:
            self._log.close()
        return code

    def kill(self) -> None:
        """SIGKILL, without complaint."""
        if self.running:
            self.process.kill()
        self.process.wait()
        self._log.close()


@dataclasses.dataclass
class Answer:
    """What a client said: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def __str__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


class Client:
    """``boardbench`` as a user runs it, in a process of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str], started: list[Program]) -> None:
        self._folder = folder
        self._environment = environment
        self._started = started

    def __call__(self, *arguments: object, code: int | None = 0, seconds: float = CLIENT_SECONDS) -> Answer:
        """Runs it to its end; ``code`` is the exit code that must come (None: any)."""
        done = subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=dict(self._environment),
            cwd=self._folder,
        )
        answer = Answer(done.returncode, done.stdout, done.stderr)
        if code is not None:
            assert answer.code == code, f"boardbench {' '.join(map(str, arguments))}: {answer}"
        return answer

    def begin(self, *arguments: object) -> Program:
        """Starts it and returns; the log holds both outputs."""
        name = f"client-{len(self._started)}"
        program = Program(name, self.command(*arguments), self._folder, self._environment)
        self._started.append(program)
        return program

    @staticmethod
    def command(*arguments: object) -> list[str]:
        return [*installed("boardbench"), *map(str, arguments)]


@dataclasses.dataclass
class Collector:
    """A collector that runs."""

    program: Program
    address: str
    http: str

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.http}{path}", timeout=20) as answer:
            return str(answer.read().decode())

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def metric(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """Samples of a series, labels and value, whose labels include these."""
        return [
            (found, value)
            for series, found, value in read_exposition(self.get("/metrics"))
            if series == name and labels.items() <= found.items()
        ]

    def results(self, **query: str) -> list[dict[str, Any]]:
        """Results that the collector stores, as JSON."""
        address = "&".join(f"{key}={value}" for key, value in query.items())
        answer = self.get_json(f"/api/v1/results?{address}")
        return list(answer.get("results", []))


@dataclasses.dataclass
class Agent:
    """An agent that runs."""

    program: Program
    address: str
    data_dir: Path
    device_id: str

    def runs(self) -> list[dict[str, Any]]:
        """Its runs, asked without starting a client: that takes longer than some of them last."""
        from google.protobuf import json_format

        from boardbench.cli.address import parse_address
        from boardbench.cli.client import AgentClient

        with AgentClient(parse_address(self.address, 0)) as client:
            return [
                json_format.MessageToDict(run, preserving_proto_field_name=True) for run in client.list_runs()
            ]


def read_exposition(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of every sample of a text exposition."""
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        assert found, f"not a sample: {line!r}"
        pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or "")
        yield found[1], {key: value.replace('\\"', '"') for key, value in pairs}, float(found[3])


class Wire:
    """A TCP connection with a hand on it, between a client and an agent (or an agent and its collector).

    ``change`` sees every block on the way up and may damage it; ``hold_after`` stops the way up after
    that many bytes, until :meth:`release`; while ``mute`` is set, what comes back is thrown away. Counts what
    went up.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.change: Callable[[bytes], bytes] | None = None
        self.hold_after: int | None = None
        self.mute = False
        self.held = threading.Event()
        self.sent_up_bytes = 0
        self._released = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def release(self) -> None:
        """Lets the way up go on."""
        self._released.set()

    def cut(self) -> None:
        """Breaks every connection; new ones are taken."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        self._closed = True
        self._released.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, port = self.target.rsplit(":", 1)
            try:
                far = socket.create_connection((host, int(port)), timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._sockets += [near, far]
            self._start(self._pump, near, far, True)
            self._start(self._pump, far, near, False)

    def _pump(self, source: socket.socket, sink: socket.socket, upward: bool) -> None:
        try:
            while block := source.recv(64 * 1024):
                if upward:
                    if self.change is not None:
                        block = self.change(block)
                    if self.hold_after is not None and self.sent_up_bytes + len(block) > self.hold_after:
                        self.held.set()
                        self._released.wait()
                        self.hold_after = None
                    self.sent_up_bytes += len(block)
                elif self.mute:
                    continue
                sink.sendall(block)
        except OSError:
            pass
        finally:
            for each in (source, sink):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


class Programs:
    """Starts programs for one test (or module) and ends all that are left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # Nothing of the developer's own settings, caches or proxies reaches the programs.
        kept = (
            "PATH",
            "LANG",
            "LC_ALL",
            "TMPDIR",
            "VIRTUAL_ENV",
            "LD_LIBRARY_PATH",
            "COVERAGE_PROCESS_START",
        )
        # By what pytest says of itself those are found that a test has left behind.
        ours = [name for name in os.environ if name in kept or name.startswith("PYTEST_")]
        self.environment = {name: os.environ[name] for name in ours} | {
            "HOME": str(folder),
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "default",
            "ORT_DISABLE_TELEMETRY": "1",
        }
        self.started: list[Program] = []
        self._wires: list[Wire] = []
        self.client = Client(folder, self.environment, self.started)

    def collector(
        self,
        name: str = "collector",
        *,
        listen: str = "127.0.0.1:0",
        http: str = "127.0.0.1:0",
        data_dir: Path | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> Collector:
        """A collector with the store of that name, ready; without ``wait``, on its way to that address."""
        port_file = self.folder / f"{name}.ports"
        port_file.unlink(missing_ok=True)
        program = self.start(
            name,
            [
                *installed("boardbench-collector"), "serve", "--listen", listen, "--http", http,
                "--data-dir", str(data_dir or self.folder / name), "--port-file", str(port_file), *options,
            ],
            environment,
        )  # fmt: skip
        if not wait:
            return Collector(program, listen, http)
        ports = self._ports(program, port_file)
        return Collector(program, f"127.0.0.1:{ports['grpc']}", f"127.0.0.1:{ports['http']}")

    def agent(
        self,
        name: str = "agent",
        *,
        collector: str = "",
        listen: str = "127.0.0.1:0",
        data_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        device_id: str = "",
        within: Sequence[str] = (),
        wait: bool = True,
    ) -> Agent:
        """An agent with the data of that name, ready; settings beyond these by their variables.

        ``within`` is a command that starts it somewhere else (in a network namespace); without ``wait``,
        it is on its way.
        """
        port_file = self.folder / f"{name}.ports"
        port_file.unlink(missing_ok=True)
        data_dir = data_dir or self.folder / name
        device_id = device_id or f"board-{name}"
        arguments = [
            *installed("boardbench-agent"), "serve", "--listen", listen,
            "--data-dir", str(data_dir), "--device-id", device_id, "--port-file", str(port_file),
        ]  # fmt: skip
        if collector:
            arguments += ["--collector", collector]
        settings = {"BOARDBENCH_AGENT_STORE_FREE_FLOOR_BYTES": str(1 << 20)} | dict(environment or {})
        program = self.start(name, [*within, *arguments], settings)
        ports = self._ports(program, port_file) if wait else {}
        # One that listens nowhere has no port.
        return Agent(program, f"127.0.0.1:{ports.get('grpc', 0)}", data_dir, device_id)

    def wire(self, target: str) -> Wire:
        """A wire to an address, with a hand on it."""
        made = Wire(target)
        self._wires.append(made)
        return made

    def close(self) -> None:
        for wire in self._wires:
            wire.close()
        for program in reversed(self.started):
            with contextlib.suppress(ValueError):
                program.kill()

    def check_logs(self) -> None:
        """Fails when a program of ours complained about itself: a traceback or a warning of Python's."""
        for each in self.started:
            found = re.search(r"(?m)^Traceback |never awaited|never retrieved|\w+Warning: .*", each.log())
            assert not found, f"{each.log_path.name} holds {found[0]!r}:\n{each.log()[-20_000:]}"

    def logs(self) -> str:
        return "\n".join(f"--- {each.log_path.name}\n{each.log()[-20_000:]}" for each in self.started)

    def start(
        self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> Program:
        program = Program(name, arguments, self.folder, self.environment | dict(environment or {}))
        self.started.append(program)
        return program

    def _ports(self, program: Program, port_file: Path) -> dict[str, int]:
        def ready() -> list[dict[str, int]] | None:
            if not program.running:
                pytest.fail(
                    f"{program.name} ended at once: exit {program.process.returncode}\n{program.log()}"
                )
            try:
                return [dict(json.loads(port_file.read_text()))]
            except (FileNotFoundError, json.JSONDecodeError):
                return None

        return dict(eventually(f"{program.name} wrote {port_file.name}", ready, START_SECONDS)[0])


def free_port() -> int:
    """A TCP port that was free on the loopback a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(name="free_port")
def _free_port() -> int:
    return free_port()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Puts the logs of the programs into the report of a failed test."""
    report = yield
    if report.failed:
        for programs in getattr(item, "funcargs", {}).values():
            if isinstance(programs, Programs):
                report.sections.append(("logs of the programs", programs.logs()))
    return report


@contextlib.contextmanager
def _programs(folder: Path, survivors: Any) -> Iterator[Programs]:
    made = Programs(folder)
    yield made
    made.close()
    # What was started by one of them is in nobody's list.
    survivors.check_none_is_left(lambda: survivors.started_with("HOME", str(folder)))
    made.check_logs()


@pytest.fixture
def programs(tmp_path: Path, survivors: Any) -> Iterator[Programs]:
    """Starts programs for this test; ends them after it."""
    with _programs(tmp_path / "programs", survivors) as made:
        yield made


@pytest.fixture(scope="module")
def module_programs(tmp_path_factory: pytest.TempPathFactory, survivors: Any) -> Iterator[Programs]:
    """Starts programs that a module's tests share."""
    with _programs(tmp_path_factory.mktemp("programs"), survivors) as made:
        yield made


@dataclasses.dataclass
class House:
    """A collector and an agent that reports to it."""

    programs: Programs
    collector: Collector
    agent: Agent
    eventually = staticmethod(eventually)

    def client(self, *arguments: object, code: int | None = 0, seconds: float = CLIENT_SECONDS) -> Answer:
        return self.programs.client(*arguments, code=code, seconds=seconds)

    def push(self, *arguments: object, code: int | None = 0, seconds: float = CLIENT_SECONDS) -> Answer:
        """``boardbench push … --to`` the agent."""
        return self.client("push", *arguments, "--to", self.agent.address, code=code, seconds=seconds)


@pytest.fixture(scope="module")
def house(module_programs: Programs) -> House:
    """A collector and an agent, shared by the tests of a module."""
    collector = module_programs.collector()
    agent = module_programs.agent(collector=collector.address)
    eventually(
        "the board is up",
        lambda: collector.metric("boardbench_device_up", device=agent.device_id),
    )
    return House(module_programs, collector, agent)


@pytest.fixture(name="eventually", scope="session")
def give_eventually() -> Callable[..., Any]:
    """:func:`eventually`, for suites that can't import this file."""
    return eventually


@pytest.fixture
def postgres_server() -> Iterator[Any]:
    """A PostgreSQL server that a test may kill, run as the collector's suite does it; else a skip."""
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'boardbench[postgres]'")
    path = Path(__file__).resolve().parents[1] / "collector" / "conftest.py"
    spec = importlib.util.spec_from_file_location("boardbench_tests_collector_tools", path)
    assert spec is not None and spec.loader is not None
    tools = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tools
    spec.loader.exec_module(tools)
    with tools.postgres() as server:
        yield server


@pytest.fixture(scope="session")
def demo_tflite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's int8 network as a file."""
    from boardbench.cli.demo_models import build_tflite

    path = tmp_path_factory.mktemp("models") / "demo.tflite"
    path.write_bytes(build_tflite())
    return path


@pytest.fixture(scope="session")
def demo_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's float network as a file."""
    from boardbench.cli.demo_models import build_onnx

    path = tmp_path_factory.mktemp("models") / "demo.onnx"
    path.write_bytes(build_onnx())
    return path


@pytest.fixture(scope="session")
def prometheus() -> dict[str, str]:
    """Paths of ``prometheus`` and ``promtool``; skips, saying so, where they are not installed."""
    found = {name: shutil.which(name) for name in ("prometheus", "promtool")}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        pytest.skip(
            f"no {' and no '.join(missing)} on the PATH: install the package 'prometheus' (make test does)"
        )
    return {name: str(path) for name, path in found.items()}


@pytest.fixture(scope="session")
def start_prometheus(prometheus: dict[str, str]) -> Callable[..., str]:
    """Starts a real Prometheus that scrapes one target four times a second; its address, once it answers."""

    def start(programs: Programs, target: str, *more: dict[str, Any]) -> str:
        folder = programs.folder / "prometheus"
        folder.mkdir()
        configuration = folder / "prometheus.yml"
        configuration.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"},
                    "scrape_configs": [
                        {"job_name": "boardbench", "static_configs": [{"targets": [target]}]},
                        *more,
                    ],
                }
            )
        )
        port = free_port()
        programs.start(
            "prometheus",
            [
                prometheus["prometheus"], f"--config.file={configuration}",
                f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
            ],
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            try:
                with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        eventually("Prometheus is ready", ready, 60)
        return url

    return start
