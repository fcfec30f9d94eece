"""From a flashed card to a board that runs models and is updated: emulated boards, real programs.

Two boards, one for each way of the first boot. The cable of one is pulled while it measures, and its power is
cut while it unpacks a release. The other is updated, goes back from a release that is broken, and loses its
power in the middle of a switch.

Run by ``make test-board``; as root, on Debian or Ubuntu, with the packages that the skip names. Nothing here
is a measurement: what QEMU times is QEMU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

from boardbench.v1 import agent_pb2, agent_pb2_grpc, result_pb2

from . import emulated

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CACHE = REPOSITORY / ".cache" / "board"
# On a machine that does nothing else a boot takes half a minute and an install a minute.
BOOT_SECONDS, INSTALL_SECONDS, RUN_SECONDS, UPDATE_SECONDS = 420.0, 900.0, 420.0, 900.0
# The board reaches this machine's loopback by this address (QEMU's user network).
HOST = "10.0.2.2"

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def command(program: str, *arguments: object) -> list[str]:
    """A program of ours, as the installation has made it."""
    return [str(Path(sys.executable).parent / program), *map(str, arguments)]


def installed(program: str, *arguments: object, code: int = 0) -> str:
    """What a program of ours says on stdout."""
    done = subprocess.run(
        command(program, *arguments),
        # Tables are as wide as they are, so that no word in them is broken.
        env=os.environ | {"COLUMNS": "250"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def begun(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A program of ours that goes on meanwhile, and does not outlive the context."""
    with subprocess.Popen(command(program, *arguments), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


class Phases:
    """How long the parts of a story take: to see where this test takes its time, and of nothing else."""

    def __init__(self, way: str) -> None:
        self._path = CACHE / f"seconds-{way}.json"
        self._told: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def phase(self, name: str, machine: Any = None) -> Iterator[None]:
        began, cpu = time.monotonic(), machine.cpu_seconds if machine else 0.0
        yield
        self._told[name] = {"seconds": round(time.monotonic() - began, 1)}
        if machine:
            self._told[name]["of QEMU's processor time"] = round(machine.cpu_seconds - cpu, 1)
        self._path.write_text(json.dumps(self._told, indent=1) + "\n")


Build = Callable[[str], Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory, build_deb: ModuleType) -> Build:
    """Makes the agent's package for Bookworm on arm64, of the sources as they are, by a version's name."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Of the session and not of this worker: what one builds is there for both.
        folder = folder.parent
    target, wheels = build_deb.TARGETS["arm64-cp311"], REPOSITORY / ".cache" / "wheels"

    def once(version: str) -> Path:
        with emulated.held(folder / "package.lock"):
            if found := list(folder.glob(f"packages-{version}/*.deb")):
                return found[0]
            place = folder / f"packages-{version}"
            try:
                return Path(build_deb.build(target, place, wheels=wheels, version=version, preset=0))
            except build_deb.BuildError as error:
                pytest.skip(f"the package can't be built here: {error}")

    return once


class Collector:
    """A collector that takes only boards that were enrolled."""

    def __init__(self, folder: Path) -> None:
        self.data_dir = folder / "collector"
        ports = folder / "ports"
        with (folder / "collector.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    Path(sys.executable).parent / "boardbench-collector",
                    "serve",
                    "--listen=127.0.0.1:0",
                    "--http=127.0.0.1:0",
                    f"--data-dir={self.data_dir}",
                    f"--port-file={ports}",
                    "--require-enrolment",
                    # A board that is silent for three of these is gone.
                    "--heartbeat=3",
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while not ports.exists():
            assert self._process.poll() is None and time.monotonic() < deadline, (
                folder / "collector.log"
            ).read_text()
            time.sleep(0.1)
        self.port, self._http = (json.loads(ports.read_text())[name] for name in ("grpc", "http"))
        self.address = f"127.0.0.1:{self.port}"

    def token(self, *arguments: str) -> str:
        return installed("boardbench-collector", "token", *arguments, f"--data-dir={self.data_dir}").strip()

    def get(self, path: str) -> str:
        """What it answers to a browser, or to Prometheus."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http}{path}", timeout=60) as answer:
            return str(answer.read().decode())

    def table(self, what: str) -> str:
        return installed("boardbench", what, "--collector", self.address)

    def up(self, version: str = "") -> dict[str, Any] | None:
        """The board, while it reports; as soon as it is of this version."""
        for device in json.loads(self.get("/api/v1/devices")).get("devices", ()):
            if device.get("up") and version in ("", device["agent_version"]):
                return dict(device)
        return None

    def results(self) -> list[dict[str, Any]]:
        return list(
            json.loads(installed("boardbench", "results", "--collector", self.address, "--format=json"))
        )

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    running = Collector(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def made(shared_models: Path, build_deb: ModuleType) -> Any:
    """The system that both cards hold."""
    if missing := emulated.missing():
        pytest.skip(f"an emulated board needs: apt install {' '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("an emulated board needs root: its files belong to root and are made here")
    try:
        python = build_deb.interpreter("3.11")
    except build_deb.BuildError as error:
        pytest.skip(str(error))
    return emulated.system("bookworm", CACHE, python)


@pytest.fixture
def model(shared_models: Path) -> Path:
    return shared_models / "mobilenet_v1_0.25_128_quant.tflite"


@pytest.mark.xdist_group("script")
def test_a_card_with_a_script_becomes_a_board_whose_cable_is_pulled_while_it_measures(
    made: Any, releases: Releases, collector: Collector, model: Path, tmp_path: Path
) -> None:
    image = emulated.card(made, tmp_path / "card.img", cloud_init=False)
    token, phases = _flash(image, releases, collector), Phases("systemd")
    port = emulated.free_port()
    with (
        emulated.powered(made, image, tmp_path / "first.log", port) as machine,
        phases.phase("first boot, with install", machine),
    ):
        machine.until_off(INSTALL_SECONDS)
    _check_card(image, token)
    assert "systemd.run" not in emulated.read_boot(image, "cmdline.txt")
    # It ends with a reboot, behind which the agent is started.
    assert _starts(tmp_path / "first.log") == 0
    with emulated.powered(made, image, tmp_path / "boot.log", port) as machine:
        with phases.phase("boot, until it reports", machine):
            _check_board(machine.until("the board reports", collector.up, BOOT_SECONDS), collector)
        assert _starts(tmp_path / "boot.log") == 1
        with phases.phase("two runs", machine):
            _check_runs(machine, port, collector, model)
        with phases.phase("a run while the cable is out", machine):
            _check_pulled_cable(machine, port, collector, model)
        # Some of it is on the disk by then, and some is not: to unpack it takes many times as long.
        with (
            _power_cut(machine, collector, releases.good(), ": accepted", 4.0, phases) as client,
            emulated.powered(made, image, tmp_path / "after.log", port) as after,
            phases.phase("boot, until the new release reports", after),
        ):
            assert _ended(client, code=0)["state"] == "UPDATE_STATE_DONE"
            after.until("the new release reports", lambda: collector.up(releases.version), BOOT_SECONDS)
            assert f"unpacked {releases.version}+cp311" in after.log()
    if keep := os.environ.get("BOARDBENCH_KEEP_CARD"):
        shutil.copyfile(image, keep)


@pytest.mark.xdist_group("cloud-init")
def test_a_card_with_cloud_init_becomes_a_board_that_goes_back_from_a_broken_release(
    made: Any, releases: Releases, collector: Collector, model: Path, tmp_path: Path
) -> None:
    image = emulated.card(made, tmp_path / "card.img", cloud_init=True)
    token, phases = _flash(image, releases, collector), Phases("cloudinit")
    port = emulated.free_port()
    with emulated.powered(made, image, tmp_path / "first.log", port) as machine:
        with phases.phase("first boot, until it reports", machine):
            _check_board(
                machine.until("the board reports", collector.up, BOOT_SECONDS + INSTALL_SECONDS), collector
            )
        assert _starts(tmp_path / "first.log") == 1
        with phases.phase("two runs", machine):
            _check_runs(machine, port, collector, model)
        with phases.phase("an update", machine):
            good = releases.good()
            board = _update(collector, good)
            assert board["state"] == "UPDATE_STATE_DONE", board
            machine.until("the new release reports", lambda: collector.up(releases.version), BOOT_SECONDS)
        with phases.phase("an update with a broken release", machine):
            broken = releases.broken("1", "exit 1")
            board = _update(collector, broken, code=1)
            assert board["state"] == "UPDATE_STATE_ROLLED_BACK", board
            assert "it did not start" in board["reason"]
            machine.until("the good release reports", lambda: collector.up(releases.version), BOOT_SECONDS)
        # Started long enough to be the one that is in place when the power goes.
        slow, switched = releases.broken("2", "sleep 15; exit 1"), f"switched {releases.broken_release('2')}"
        with _power_cut(machine, collector, slow, switched, 0.0, phases) as client:
            # cloud-init has done its part at the first boot.
            _check_card(image, token)
            log = tmp_path / "after.log"
            with emulated.powered(made, image, log, port) as after:
                with phases.phase("boot, until the good release reports", after):
                    board = _ended(client, code=1)
                    assert board["state"] == "UPDATE_STATE_ROLLED_BACK", board
                    after.until("it reports", lambda: collector.up(releases.version), BOOT_SECONDS)
                # It has gone on where the power was cut, and did not begin anew.
                assert ": accepted" not in after.log()
                assert f"going_back {releases.broken_release('2')}" in after.log()
                there = _outputs_there(port, hashlib.sha256(model.read_bytes()).hexdigest())
    _same(there, _outputs_here(model))


@pytest.fixture
def releases(tmp_path: Path, build: Build, build_deb: ModuleType, release_packages: ModuleType) -> Releases:
    """What the board gets, one after the other."""
    return Releases(tmp_path, build, build_deb.project_version(), release_packages)


_ON_EMULATED = ("--on=lab=qemu",)


class Releases:
    """Signed packages, by a key that the board trusts."""

    def __init__(self, folder: Path, build: Build, version: str, packages: ModuleType) -> None:
        """``version`` is the one that the card gets first."""
        self._folder = folder / "releases"
        self._build = build
        self._packages = packages
        self.first = build(version)
        self._folder.mkdir()
        self._key = self._folder / "key"
        installed("boardbench", "release", "keygen", self._key)
        self.version = f"{version}.1"

    @property
    def public_key(self) -> Path:
        """Whose signatures the board is to trust."""
        return self._key.with_name("key.pub")

    def good(self) -> Path:
        """A whole package of the sources as they are, by another name."""
        return self._signed(self._build(self.version))

    def broken_release(self, number: str) -> str:
        return f"{self.version}.{number}+cp311"

    def broken(self, number: str, script: str) -> Path:
        """One whose agent is a script that ends."""
        release = self.broken_release(number)
        card = {"version": release.partition("+")[0], "release": release, "architecture": "arm64"}
        files = {
            "release.json": json.dumps({**card, "python": "3.11"}),
            "bin/boardbench-agent": f"#!/bin/sh\necho this release is broken >&2\n{script}\n",
        }
        return self._signed(self._packages.build(self._folder, card["version"], files))

    def _signed(self, package: Path) -> Path:
        out = self._folder / f"signed-{package.name}"
        installed("boardbench", "release", "sign", package, f"--key={self._key}", f"--out={out}")
        return out


def _update_arguments(collector: Collector, package: Path) -> tuple[object, ...]:
    return ("devices", "update", package, *_ON_EMULATED, f"--via={collector.address}", "--format=json")


def _update(collector: Collector, package: Path, code: int = 0) -> dict[str, Any]:
    """How the update of the one board has ended."""
    told = installed("boardbench", *_update_arguments(collector, package), code=code)
    (board,) = json.loads(told)["boards"]
    return dict(board)


def _ended(client: subprocess.Popen[str], code: int) -> dict[str, Any]:
    """The same, of an update that was begun."""
    told, _ = client.communicate(timeout=UPDATE_SECONDS)
    assert client.returncode == code, told
    (board,) = json.loads(told)["boards"]
    return dict(board)


@contextlib.contextmanager
def _power_cut(
    machine: Any, collector: Collector, package: Path, word: str, seconds: float, phases: Phases
) -> Iterator[subprocess.Popen[str]]:
    """An update, and the power is cut so long after the board has said the word; who waits for it goes on."""
    with begun("boardbench", *_update_arguments(collector, package)) as client:
        with phases.phase("until the power is cut", machine):
            machine.until(f"it says {word}", lambda: word in machine.log(), UPDATE_SECONDS, pause=0.1)
            time.sleep(seconds)
        machine.cut_power()
        yield client


def _flash(image: Path, releases: Releases, collector: Collector) -> str:
    """Prepares the card; the token that is on it then."""
    token = collector.token("create", "--label=rack=emulated")
    arguments = (
        "flash", "pi", f"--image={image}", f"--package={releases.first}", "--os=bookworm",
        "--hostname=emulated-pi", f"--collector={HOST}:{collector.port}", f"--token={token}",
        "--label=lab=qemu", f"--update-key={releases.public_key}",
    )  # fmt: skip
    installed("boardbench", *arguments)
    # The other direction of the same: nothing is to be written.
    written = _digest(image)
    assert "written" not in installed("boardbench", *arguments).replace("as it is", "")
    assert _digest(image) == written
    assert token in emulated.read_boot(image, "boardbench/enrolment.json")
    return token


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _check_board(device: Any, collector: Collector) -> None:
    board = device["board"]
    assert board["hostname"] == "emulated-pi"
    assert board["emulator"] == "qemu"
    assert board["architecture"] == "aarch64"
    assert board["labels"] == {"lab": "qemu", "rack": "emulated"}
    assert f"used by {board['device_id']}" in collector.token("list")


def _check_runs(machine: Any, port: int, collector: Collector, model: Path) -> None:
    """A model is pushed, its outputs are this machine's, and what is known of it says where it ran."""
    said = installed(
        "boardbench", "push", model, "--to", f"127.0.0.1:{port}", "--max-runs=20", "--min-runs=5",
        "--duration=0.5", f"--timeout={RUN_SECONDS:.0f}",
    )  # fmt: skip
    assert "EMULATED (qemu)" in said
    there = _outputs_there(port, hashlib.sha256(model.read_bytes()).hexdigest())
    _same(there, _outputs_here(model))
    results = machine.until(
        "both results are in the collector", lambda: (r := collector.results()) and len(r) == 2 and r, 120
    )
    assert {result["status"] for result in results} == {"RUN_STATUS_SUCCEEDED"}
    # Everywhere where somebody could take it for a board's performance.
    for result in results:
        assert result["board"]["emulator"] == "qemu"
        assert result["standins"] == ["qemu"]
        assert result["validity"] == "VALIDITY_INVALID"
        assert "emulated" in {warning["code"] for warning in result["warnings"]}
    assert "EMULATED (qemu)" in collector.table("devices")
    assert collector.table("results").count("INVALID") == 2
    assert "INVALID" in collector.get("/")
    metrics = collector.get("/metrics").splitlines()
    flags = [line for line in metrics if line.startswith("boardbench_result_standin{")]
    assert flags and all(line.endswith(" 1") for line in flags)
    assert any(line.startswith("boardbench_device_info{") and 'emulator="qemu"' in line for line in metrics)


def _check_pulled_cable(machine: Any, port: int, collector: Collector, model: Path) -> None:
    """A run that was begun by way of the collector ends without it, and is told later."""
    known = {result["run_id"] for result in collector.results()}
    arguments = (
        "push", model, f"--via={collector.address}", *_ON_EMULATED, "--duration=15", "--max-runs=1000000",
        "--no-profile", "--idle=0", f"--timeout={RUN_SECONDS:.0f}",
    )  # fmt: skip
    with begun("boardbench", *arguments) as client, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        agent = agent_pb2_grpc.AgentServiceStub(channel)

        def run() -> agent_pb2.RunSummary | None:
            runs = agent.ListRuns(agent_pb2.ListRunsRequest(), timeout=60).runs
            return next((each for each in runs if each.run_id not in known), None)

        def is_measured() -> bool:
            found = run()
            return found is not None and found.stage == result_pb2.STAGE_MEASURE

        machine.until("the run is measured", is_measured, RUN_SECONDS)
        machine.cable(plugged=False)
        pulled = run()
        assert pulled is not None and pulled.state == agent_pb2.RUN_STATE_RUNNING
        machine.until(
            "the run has ended",
            lambda: (r := run()) is not None and r.status == result_pb2.RUN_STATUS_SUCCEEDED,
            RUN_SECONDS,
        )
        machine.until("the collector misses the board", lambda: not collector.up(), 120)
        assert {result["run_id"] for result in collector.results()} == known
        assert agent.Describe(agent_pb2.DescribeRequest(), timeout=60).spool.pending == 1
        assert client.poll() is None
        machine.cable(plugged=True)
        later = machine.until(
            "the result is in the collector",
            lambda: [result for result in collector.results() if result["run_id"] not in known],
            300,
        )
        assert isinstance(later, list)
        assert [(each["run_id"], each["status"]) for each in later] == [
            (pulled.run_id, "RUN_STATUS_SUCCEEDED")
        ]
        told, _ = client.communicate(timeout=120)
        assert client.returncode == 0, told


def _starts(log: Path) -> int:
    """How often systemd has begun to start the agent, as the console tells."""
    return log.read_text(errors="replace").count("Starting boardbench-agent.service")


def _check_card(image: Path, token: str) -> None:
    """The install is done, and the token is nowhere on the boot partition, also not in free clusters."""
    log = emulated.read_boot(image, "boardbench/install.log")
    assert "\ndone " in log, log
    with pytest.raises(emulated.Unbuildable):
        emulated.read_boot(image, "boardbench/enrolment.json")
    with image.open("rb") as file:
        boot = file.read(516 << 20)
    assert token.encode() not in boot


_SPEC = {"max_runs": 3, "min_runs": 1, "duration_seconds": 0.01, "seed": 7, "output_values": 1001}


def _outputs_there(port: int, sha256: str) -> result_pb2.RunResult:
    """The outputs that the board's engine has computed."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        request = agent_pb2.RunBenchmarkRequest(model_sha256=sha256, spec=result_pb2.BenchmarkSpec(**_SPEC))
        for response in stub.RunBenchmark(request, timeout=RUN_SECONDS):
            if response.event.WhichOneof("event") == "result":
                return response.event.result
    raise AssertionError("the run ended without a result")


def _outputs_here(model: Path) -> result_pb2.RunResult:
    from google.protobuf import json_format

    lines = installed(
        "boardbench-agent", "run", model, "--format=jsonl", f"--spec={json.dumps(_SPEC)}"
    ).splitlines()
    return json_format.Parse(lines[-1], agent_pb2.RunEvent()).result


def _same(there: result_pb2.RunResult, here: result_pb2.RunResult) -> None:
    """Quantised arithmetic differs by a step between processors (by two here), and the answer does not."""
    assert there.runtime.name == here.runtime.name == "tflite"
    assert [(o.name, o.dtype, o.count) for o in there.output_values] == [
        (o.name, o.dtype, o.count) for o in here.output_values
    ]
    assert there.output_values
    for one, other in zip(there.output_values, here.output_values, strict=True):
        board, host = list(one.values), list(other.values)
        assert len(board) == len(host) == 1001
        assert max(abs(a - b) for a, b in zip(board, host, strict=True)) <= 2
        assert board.index(max(board)) == host.index(max(host))
