"""A card is flashed, the board boots, enrols, runs a model: an emulated board, real programs on both sides.

Run by ``make test-board``; as root, on Debian or Ubuntu, with the packages that the skip names. Nothing here
is a measurement: what QEMU times is QEMU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

from boardbench.v1 import agent_pb2, agent_pb2_grpc, result_pb2

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CACHE = REPOSITORY / ".cache" / "board"
# On a machine that does nothing else a boot takes half a minute and an install a minute.
BOOT_SECONDS, INSTALL_SECONDS, RUN_SECONDS = 420.0, 900.0, 420.0
# The board reaches this machine's loopback by this address (QEMU's user network).
HOST = "10.0.2.2"

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


emulated = _module("boardbench_tests_emulated", Path(__file__).parent / "emulated.py")
build_deb = _module("boardbench_tests_build_deb", REPOSITORY / "deploy" / "build_deb.py")


def installed(program: str, *arguments: object, code: int = 0, **environment: str) -> str:
    """What a program of ours says on stdout."""
    path = Path(sys.executable).parent / program
    done = subprocess.run(
        [path, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent's package for Bookworm on arm64, of the sources as they are."""
    try:
        return Path(
            build_deb.build(
                build_deb.TARGETS["arm64-cp311"],
                tmp_path_factory.mktemp("packages"),
                wheels=REPOSITORY / ".cache" / "wheels",
                preset=0,
            )
        )
    except build_deb.BuildError as error:
        pytest.skip(f"the package can't be built here: {error}")


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
        self.port = json.loads(ports.read_text())["grpc"]
        self.address = f"127.0.0.1:{self.port}"

    def token(self, *arguments: str) -> str:
        return installed("boardbench-collector", "token", *arguments, f"--data-dir={self.data_dir}").strip()

    def devices(self) -> list[dict[str, Any]]:
        return list(
            json.loads(installed("boardbench", "devices", "--collector", self.address, "--format=json"))
        )

    def up(self) -> dict[str, Any] | None:
        return next((device for device in self.devices() if device.get("up")), None)

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


@pytest.fixture(params=["systemd", "cloudinit"])
def card(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Path]:
    """The way of the first boot, the system, and a card with it as it is written from a download."""
    if missing := emulated.missing():
        pytest.skip(f"an emulated board needs: apt install {' '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("an emulated board needs root: its files belong to root and are made here")
    cloud_init = request.param == "cloudinit"
    made = emulated.system("bookworm", CACHE, cloud_init=cloud_init)
    return request.param, made, emulated.card(made, tmp_path / "card.img", cloud_init=cloud_init)


def test_a_flashed_card_becomes_a_board_that_runs_models(
    card: tuple[str, Any, Path],
    package: Path,
    collector: Collector,
    shared_models: Path,
    tmp_path: Path,
) -> None:
    way, made, image = card
    token = collector.token("create", "--label=rack=emulated")
    arguments = (
        "flash", "pi", f"--image={image}", f"--package={package}", "--os=bookworm", "--hostname=emulated-pi",
        f"--collector={HOST}:{collector.port}", f"--token={token}", "--label=lab=qemu",
    )  # fmt: skip
    installed("boardbench", *arguments)
    # The other direction of the same: nothing is to be written.
    written = hashlib.sha256(image.read_bytes()).hexdigest()
    assert "written" not in installed("boardbench", *arguments).replace("as it is", "")
    assert hashlib.sha256(image.read_bytes()).hexdigest() == written
    assert token in emulated.read_boot(image, "boardbench/enrolment.json")

    port = emulated.free_port()
    timings: dict[str, float] = {}
    began = time.monotonic()
    if way == "systemd":
        with emulated.powered(made, image, tmp_path / "first.log", port) as machine:
            machine.until_off(INSTALL_SECONDS)
        timings["first boot, with install"] = time.monotonic() - began
        _check_card(image, token)
        assert "systemd.run" not in emulated.read_boot(image, "cmdline.txt")
        began = time.monotonic()
    with emulated.powered(made, image, tmp_path / "boot.log", port) as machine:
        device = machine.until("the board reports", collector.up, BOOT_SECONDS + INSTALL_SECONDS)
        timings["boot, until it reports"] = time.monotonic() - began
        board = device["board"]
        assert board["hostname"] == "emulated-pi"
        assert board["emulator"] == "qemu"
        assert board["architecture"] == "aarch64"
        assert board["labels"] == {"lab": "qemu", "rack": "emulated"}
        assert f"used by {board['device_id']}" in collector.token("list")

        began = time.monotonic()
        model = shared_models / "mobilenet_v1_0.25_128_quant.tflite"
        installed(
            "boardbench", "push", model, "--to", f"127.0.0.1:{port}", "--max-runs=20", "--min-runs=5",
            "--duration=0.5", f"--timeout={RUN_SECONDS:.0f}",
        )  # fmt: skip
        there = _outputs_there(port, hashlib.sha256(model.read_bytes()).hexdigest())
        timings["two runs"] = time.monotonic() - began
        results = machine.until(
            "both results are in the collector", lambda: (r := collector.results()) and len(r) == 2 and r, 120
        )
        assert {result["board"]["emulator"] for result in results} == {"qemu"}
        assert {result["status"] for result in results} == {"RUN_STATUS_SUCCEEDED"}
    _same(there, _outputs_here(model))
    if way == "cloudinit":
        _check_card(image, token)
    # Of the emulator, to see where this test takes its time.
    told = {name: round(seconds) for name, seconds in timings.items()}
    (CACHE / f"seconds-{way}.json").write_text(json.dumps(told) + "\n")
    if keep := os.environ.get("BOARDBENCH_KEEP_CARD"):
        shutil.copyfile(image, keep)


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
