"""``boardbench demo``: collector, agent, two models, results and metrics, all here and all real."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import click

from boardbench.cli.address import Address
from boardbench.cli.errors import CliError, ExitCode, Refused, worst
from boardbench.cli.interrupt import ENDING_SIGNALS
from boardbench.cli.spec import Seconds, Spec
from boardbench.cli.terminal import Output, full_option

if TYPE_CHECKING:
    from boardbench.cli.client import CollectorClient
    from boardbench.v1 import result_pb2

# What each thing that the demo uses is imported as; any of a row will do.
_NEEDED: tuple[tuple[str, ...], ...] = (
    ("psutil",),
    ("aiohttp",),
    ("prometheus_client",),
    ("grpc_health",),
    ("grpc_reflection",),
    ("numpy",),
    ("ai_edge_litert", "tflite_runtime"),
    ("onnxruntime",),
    ("flatbuffers",),
    ("onnx",),
)
_START_SECONDS = 60.0  # Python on a slow disk imports gRPC for several seconds, and CI machines are busy
_ARRIVE_SECONDS = 30.0  # from the end of a run to the collector's commit: usually far below one second
_STOP_SECONDS = 15.0  # the agent ends a run and its worker first
_LOG_LINES = 20
_POLL_SECONDS = 0.05

_T = TypeVar("_T")


@click.command()
@click.option("--stay", is_flag=True, help="Keep everything running until Ctrl-C, to look around.")
@click.option(
    "--duration",
    type=Seconds(zero=True),
    default=2.0,
    show_default=True,
    help="Measure each model this long.",
)
@full_option
def demo(stay: bool, duration: float, full: bool) -> ExitCode:
    """Try everything on this machine, with models built on the spot.

    Starts a collector and an agent on free ports of this machine and in a temporary folder, builds a .tflite
    and an .onnx file, pushes and runs both, shows where each op ran, and reads the results back from the
    collector's /metrics. Needs no hardware and no download: pip install 'boardbench[demo]'. Leaves nothing
    behind.
    """
    missing = [" or ".join(names) for names in _NEEDED if not any(map(importlib.util.find_spec, names))]
    if missing:
        lacking = f"{', '.join(missing)} missing"
        raise CliError(f"the demo needs more of boardbench ({lacking}): pip install 'boardbench[demo]'")
    with _Signals() as signals, _Stage(signals) as stage:
        try:
            _load()
            return _play(stage, duration=duration, stay=stay, full=full)
        except CliError:
            stage.fail()
            raise


def _load() -> None:
    """Imports what the play needs, so that none of it is left for the push, which signals may interrupt."""
    for name in ("demo_models", "tflite_build", "progress", "push", "source", "client", "answer", "engines"):
        importlib.import_module(f"boardbench.cli.{name}")
    import grpc
    from rich.cells import cell_len

    # Both import parts of themselves when they are first used.
    grpc.insecure_channel("127.0.0.1:1").close()
    cell_len("→")


def _play(stage: _Stage, *, duration: float, stay: bool, full: bool) -> ExitCode:
    _say("Starting a collector and an agent on this machine …")
    collector = stage.start(
        "collector",
        *("boardbench.collector", "serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"),
    )
    grpc_address = Address("127.0.0.1", collector["grpc"])
    web = f"http://127.0.0.1:{collector['http']}"
    settings = stage.folder / "agent.toml"
    settings.touch()  # or it would take those of a real agent on this machine
    agent = stage.start(
        "agent",
        *("boardbench.agent", "serve", "--config", str(settings)),
        *("--listen", "127.0.0.1:0", "--collector", str(grpc_address)),
    )
    board = Address("127.0.0.1", agent["grpc"])
    _say(f"  collector  {grpc_address}, {web}/")
    _say(f"  agent      {board}")

    _say("Building two models …")
    models = _build(stage.folder)
    for path in models:
        _say(f"  {path.name}  {path.stat().st_size:,} bytes")

    _say(f"Pushing both to the agent, as `boardbench push` does, and measuring each for {duration:g} s …\n")
    results, code = _push(models, board, duration, full, stage.signals)
    if code == ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code != ExitCode.DONE:
        stage.fail()
        return code

    _say("What Prometheus would scrape of this:\n")
    for line in _metrics(results, grpc_address, web, stage.signals):
        _say(f"  {line}")
    _say("")
    if stay:
        _say(_where_to_look(board, grpc_address, web, results, models))
        stage.stay()
    else:
        _say(_where_to_go())
    return ExitCode.DONE


def _build(folder: Path) -> list[Path]:
    from boardbench.cli import demo_models
    from boardbench.cli.tflite_build import BuildUnavailable

    builders = (
        ("demo_mobilenet_int8.tflite", demo_models.build_tflite),
        ("demo_net.onnx", demo_models.build_onnx),
    )
    made = []
    for name, build in builders:
        path = folder / name
        try:
            path.write_bytes(build())
        except BuildUnavailable as error:
            raise CliError(str(error)) from error
        made.append(path)
    return made


def _push(
    models: list[Path], board: Address, duration: float, full: bool, signals: _Signals
) -> tuple[list[result_pb2.RunResult], ExitCode]:
    from boardbench.cli.progress import progress_for
    from boardbench.cli.push import Order, exit_code_of, push_all
    from boardbench.cli.source import Source

    output = Output(json=False, quiet=False, full=full)
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(Source(path)) for path in models]
        order = Order(sources, None, Spec(duration=duration), detach=False, no_run=False, retry_seconds=5.0)
        with progress_for(output) as progress, signals.let_through():
            outcomes = push_all(order, [board], progress, output)
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    return results, worst([exit_code_of(outcome) for outcome in outcomes])


def _metrics(
    results: list[result_pb2.RunResult], collector: Address, web: str, signals: _Signals
) -> Iterator[str]:
    """The lines about ``results`` in the collector's own ``/metrics``, once it has them all."""
    from boardbench.cli.client import CollectorClient

    with CollectorClient(collector) as client:
        for result in results:
            there = functools.partial(_has, client, result.run_id)
            _until(there, _ARRIVE_SECONDS, f"run {result.run_id} to arrive at the collector", signals)
    url = f"{web}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode("utf-8").splitlines()
    except (OSError, urllib.error.URLError) as error:
        raise CliError(f"{url} can't be read: {error}") from error
    yield from (line for line in lines if line.startswith("boardbench_device_up{"))
    for result in results:
        mine = [line for line in lines if f'model_sha256="{result.model.sha256[:8]}' in line]
        latencies = (line for line in mine if line.startswith("boardbench_latency_seconds{"))
        medians = [line for line in latencies if 'percentile="50"' in line]
        median = next(entry.seconds for entry in result.latency.percentiles if entry.percentile == 50)
        told = [float(line.rpartition(" ")[2]) for line in medians]
        if told != [median]:
            raise CliError(
                f"{url} tells {told} as the median of {result.model.name}, but the client got {median}"
            )
        yield from medians
        yield from (
            line for line in mine if line.startswith(("boardbench_placement_known{", "boardbench_ops{"))
        )


def _has(client: CollectorClient, run_id: str) -> bool:
    try:
        client.result(run_id)
    except Refused:
        return False  # not yet
    return True


def _where_to_look(
    board: Address, collector: Address, web: str, results: list[result_pb2.RunResult], models: list[Path]
) -> str:
    here = _as_typed_here
    return f"""All of it stays up until Ctrl-C. Look around:

  {web}/          boards and results as a page
  {web}/metrics   for Prometheus
  {web}/api/v1/results

  {here("boardbench")} devices --to {board}
  {here("boardbench")} results --collector {collector}
  {here("boardbench")} show {results[0].run_id[:8]} --collector {collector}
  {here("boardbench")} push {models[0]} --to {board} --threads 1
"""


def _where_to_go() -> str:
    client, collector = _as_typed_here("boardbench"), _as_typed_here("boardbench-collector")
    again, own, serve = f"{client} demo --stay", f"{client} run model.tflite", f"{collector} serve"
    width = max(map(len, (again, own, serve)))
    return f"""That was all of it, and nothing is left behind. Next:

  {again:<{width}}   the same, and it stays up to look around
  {own:<{width}}   measure a model of yours on this machine

  {serve:<{width}}   on your side, then on the board:
  boardbench-agent serve --listen 0.0.0.0:7341 --collector HOST:7342
  {client} push model.tflite --to BOARD
"""


def _as_typed_here(program: str) -> str:
    """What starts this installation's ``program`` when typed here: its name if that will do, or its path."""
    ours = Path(sys.executable).with_name(program)
    found = shutil.which(program)
    if not ours.exists() or (found and Path(found).parent.resolve() == ours.parent.resolve()):
        return program
    with contextlib.suppress(ValueError):
        return str(ours.relative_to(Path.cwd()))
    return str(ours)


def _say(text: str) -> None:
    click.echo(text)


def _until(condition: Callable[[], _T], seconds: float, what: str, signals: _Signals) -> _T:
    """The first true value of ``condition``. Raises CliError when there is none in this time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise CliError(f"waited {seconds:.0f} s for {what}, in vain")
        signals.sleep(_POLL_SECONDS)
    return value


class _Signals:
    """While it is entered, SIGTERM and SIGHUP interrupt like Ctrl-C, so that what was started is ended.

    They do so only where something is waited for: anywhere else they could come between the opening of a file
    or the start of a process and its being noted, and leave it behind.
    """

    def __init__(self) -> None:
        self._before: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}
        self._through = False
        self._pending = False

    @contextlib.contextmanager
    def let_through(self) -> Iterator[None]:
        """In this block a signal interrupts at once, and one from before does so as it begins."""
        self._through = True
        try:
            if self._pending:
                raise KeyboardInterrupt
            yield
        finally:
            self._through = False

    def sleep(self, seconds: float) -> None:
        """Waits so long, or until a signal. Raises KeyboardInterrupt."""
        with self.let_through():
            time.sleep(seconds)

    def ignore(self) -> None:
        """From now on, no signal interrupts the end."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self._pending = True
        if self._through:
            raise KeyboardInterrupt

    def __enter__(self) -> _Signals:
        """Takes the signals."""
        for number in ENDING_SIGNALS:
            self._before[number] = signal.signal(number, self._signalled)
        return self

    def __exit__(self, *ending: object) -> None:
        """Gives them back."""
        del ending
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Stage:
    """A folder and processes that are gone when the play is over, however it ends."""

    def __init__(self, signals: _Signals) -> None:
        self.signals = signals
        self.folder = Path(tempfile.mkdtemp(prefix="boardbench-demo-"))
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._failed = False

    def start(self, name: str, *module_and_arguments: str) -> dict[str, int]:
        """Starts a program of ours; returns its ports once it answers. Raises CliError."""
        ports = self.folder / f"{name}.ports.json"
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", *module_and_arguments),
                    *("--data-dir", str(self.folder / name), "--port-file", str(ports)),
                ],
                cwd=self.folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; they are ended in order
            )
            self._processes.append((name, process))

        def answered() -> bool:
            if process.poll() is not None:
                raise CliError(f"the {name} ended at once, with exit code {process.returncode}")
            return ports.exists()

        _until(answered, _START_SECONDS, f"the {name} to start", self.signals)
        found: dict[str, int] = json.loads(ports.read_text("utf-8"))
        return found

    def stay(self) -> None:
        """Returns with Ctrl-C. Raises CliError when a program ends before."""
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                for name, process in self._processes:
                    if process.poll() is not None:
                        raise CliError(f"the {name} ended, with exit code {process.returncode}")
                self.signals.sleep(0.5)

    def fail(self) -> None:
        """Lets the end show what the programs said."""
        self._failed = True

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def __enter__(self) -> _Stage:
        """Itself."""
        return self

    def __exit__(self, *ending: object) -> None:
        """Ends the programs, the agent first, and removes the folder."""
        self.signals.ignore()  # a second Ctrl-C would leave them running
        del ending
        for _name, process in reversed(self._processes):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        if self._failed:
            self._tell_logs()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tell_logs(self) -> None:
        from boardbench.cli.plain import printable

        for name, _ in self._processes:
            with self._log(name).open(encoding="utf-8", errors="replace") as log:
                tail = collections.deque(log, maxlen=_LOG_LINES)
            if tail:
                click.echo(f"The last words of the {name}:", err=True)
                for line in tail:
                    click.echo(f"  {printable(line.rstrip())}", err=True)


def _environment() -> dict[str, str]:
    """The environment without settings of a real agent or collector, which the demo must not touch."""
    ours: tuple[str, ...] = ("BOARDBENCH_AGENT_", "BOARDBENCH_COLLECTOR_")
    ours += ("GRPC_VERBOSITY", "GRPC_DNS_RESOLVER")  # set by this program for itself
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}
