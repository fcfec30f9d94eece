"""Packages of the agent, and Debians in folders, in which they are installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CACHE = REPOSITORY / ".cache"

# QEMU's name of each architecture, and how its programs begin (binutils, elf.h: class, order, machine).
_EMULATORS = {
    "arm64": ("qemu-aarch64", b"\x02", b"\xb7\x00"),
    "armhf": ("qemu-arm", b"\x01", b"\x28\x00"),
}


@pytest.fixture(scope="session")
def packed(build_deb: ModuleType) -> Callable[[str, Path, str], Path]:
    """Builds the package of a target with its real wheels; skips where that can't be."""

    def build(target: str, folder: Path, version: str) -> Path:
        try:
            found = build_deb.TARGETS[target]
            return Path(build_deb.build(found, folder, wheels=CACHE / "wheels", version=version, preset=0))
        except build_deb.BuildError as error:
            pytest.skip(f"the package can't be built here: {error}")

    return build


@pytest.fixture(scope="session")
def debian() -> Callable[..., Path]:
    """Makes a root file system, once, and keeps it."""

    def make(name: str, *options: str) -> Path:
        """The suite is the last of the options."""
        place = CACHE / "debian" / name
        if place.exists():
            return place
        program = shutil.which("mmdebstrap")
        if program is None or os.geteuid() != 0:
            pytest.skip("a Debian in a folder needs root and: apt install mmdebstrap")
        fresh = place.with_name(f"{name}.part")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(parents=True, exist_ok=True)
        *options, suite = options
        # The archive alone: that of security may be in the middle of a change, and this lives for minutes.
        mirror = f"deb {_archive()} {suite} main"
        done = subprocess.run(
            [program, "--quiet", *options, suite, str(fresh), mirror],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"mmdebstrap failed: {done.stderr[-500:]}")
        fresh.rename(place)
        return place

    return make


def _archive() -> str:
    """The mirror of Debian that this machine uses."""
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    if not told:
        pytest.skip("apt knows no mirror of Debian here")
    return told[0]


@pytest.fixture(scope="session")
def qemu(debian: Callable[..., Path]) -> Callable[[str], Path]:
    """The emulator for an architecture: of Debian 13, since 12's (7.2) breaks down in newer wheels."""

    def find(architecture: str) -> Path:
        folder = debian("qemu-user", "--variant=extract", "--include=qemu-user", "trixie")
        emulator = folder / "usr/bin" / _EMULATORS[architecture][0]
        if b"interpreter" in subprocess.run(["file", emulator], capture_output=True, check=False).stdout:
            pytest.skip(f"{emulator} is not static")
        return emulator

    return find


@pytest.fixture(scope="session")
def runs_foreign(qemu: Callable[[str], Path]) -> Iterator[Callable[[str], None]]:
    """Lets this machine start another architecture's programs, until the tests end (binfmt_misc)."""
    place = Path("/proc/sys/fs/binfmt_misc")
    registered: list[Path] = []

    def register(architecture: str) -> None:
        name = f"boardbench-{architecture}"
        if (place / name).exists():
            return
        _, bits, machine = _EMULATORS[architecture]
        # Magic and mask over the head of a program: any system's, and a program or a library.
        magic = b"\x7fELF" + bits + b"\x01\x01\x00" + bytes(8) + b"\x02\x00" + machine
        mask = b"\xff\xff\xff\xff\xff\xff\xff\x00" + b"\xff" * 8 + b"\xfe\xff\xff\xff"
        words = ["".join(f"\\x{byte:02x}" for byte in part) for part in (magic, mask)]
        # F: opened now, so that it is found in every root; C: with the rights of the program.
        line = f":{name}:M::{words[0]}:{words[1]}:{qemu(architecture)}:OCF"
        if os.geteuid() != 0:
            pytest.skip("another architecture's programs are registered by root")
        if not (place / "register").exists():
            subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(place)], check=False)
        try:
            (place / "register").write_text(line)
        except OSError as error:
            pytest.skip(f"this kernel registers no other architecture's programs: {error}")
        registered.append(place / name)

    yield register
    for entry in registered:
        entry.write_text("-1")


# Every engine is imported, and one of each kind of work done: NumPy's BLAS, and a quantised model.
_LOADS = """
import numpy, onnxruntime, grpc, google.protobuf, psutil
from ai_edge_litert import interpreter
matrix = numpy.random.default_rng(0).standard_normal((64, 64)).astype("f")
assert numpy.isfinite(matrix @ matrix).all()
model = interpreter.Interpreter("/srv/model.tflite", num_threads=1)
model.allocate_tensors()
given = model.get_input_details()[0]
model.set_tensor(given["index"], numpy.full(given["shape"], 128, given["dtype"]))
model.invoke()
print(int(model.get_tensor(model.get_output_details()[0]["index"]).argmax()))
"""


@pytest.fixture(scope="session")
def loads(
    debian: Callable[..., Path],
    qemu: Callable[[str], Path],
    packed: Callable[[str, Path, str], Path],
    shared_models: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], None]:
    """Loads everything in the package of a target, on a processor of QEMU's."""
    unpacked: dict[str, Path] = {}

    def load(target: str, processor: str) -> None:
        root = debian(
            f"{DEBIANS[target]}-arm64",
            "--architectures=arm64",
            "--variant=extract",
            "--include=base-files,bash,dash,coreutils,python3,libstdc++6,libc-bin,zlib1g",
            "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
            DEBIANS[target],
        )
        if target not in unpacked:
            deb = packed(target, tmp_path_factory.mktemp("package"), "0.1.0")
            # The package's release, in the place that it has on a board.
            shutil.rmtree(root / "opt/boardbench", ignore_errors=True)
            subprocess.run(["dpkg-deb", "-x", deb, str(root)], check=True)
            tag = target.partition("-")[2]
            unpacked[target] = Path(f"/opt/boardbench/releases/0.1.0+{tag}/bin/python")
        # What is only unpacked has no such folder: a script of base-files makes it.
        (root / "srv").mkdir(exist_ok=True)
        shutil.copy(shared_models / "mobilenet_v1_0.25_128_quant.tflite", root / "srv/model.tflite")
        shutil.copy(qemu("arm64"), root / "usr/bin/qemu-aarch64")
        done = System(root).done(
            "/usr/bin/qemu-aarch64", "-cpu", processor, str(unpacked[target]), "-IB", "-c", _LOADS,
            ORT_DISABLE_TELEMETRY="1",
        )  # fmt: skip
        assert done[0] == 0, f"{processor}: {done[0]}\n{done[1]}{done[2]}"
        assert done[1].strip().isdigit()

    return load


class System:
    """A Debian that commands run in."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *command: str, code: int = 0, **environment: str) -> str:
        """What it says; fails the test unless it ends with this exit code."""
        ended, said, complaint = self.done(*command, **environment)
        assert ended == code, f"{command}: {ended}\n{said}{complaint}"
        return said + complaint

    def done(self, *command: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, output and complaints."""
        with self.started(*command, **environment) as process:
            said, complaint = process.communicate()
        return process.returncode, said, complaint

    def started(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """The program, which runs."""
        # A mount of its own that goes with the process.
        mounts = f'mount -t proc proc "{self.root}/proc" && mount --rbind /dev "{self.root}/dev"'
        script = f'{mounts} && exec chroot "{self.root}" "$@"'
        return subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script, "_", *command],
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "LC_ALL": "C.UTF-8",
                "HOME": "/root",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def files(self) -> set[str]:
        """What is there, without what dpkg and the accounts' own programs write about themselves."""
        told = re.compile(
            r"(var/(lib/dpkg|log|cache|backups)/|etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$|dev/|proc/|run/|tmp/)"
        )
        return {
            name for path in self.root.rglob("*") if not told.match(name := str(path.relative_to(self.root)))
        }


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Callable[[Path], System]]:
    """Makes a copy of a root file system that may be changed."""
    made: list[Path] = []

    def copy(source: Path) -> System:
        root = tmp_path / f"root-{len(made)}"
        subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(root)], check=True)
        made.append(root)
        return System(root)

    yield copy
    for root in made:
        subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=True)


DEBIANS = {
    "amd64-cp311": "bookworm",
    "amd64-cp313": "trixie",
    "arm64-cp311": "bookworm",
    "arm64-cp313": "trixie",
    "armhf-cp311": "bookworm",
}
INSIDE = "python3,libstdc++6,systemd,udev"
# 32 bits: NumPy and psutil are the system's.
INSIDE_ARMHF = f"{INSIDE},python3-numpy,python3-psutil"
ENGINES = {"amd64": ("tflite", "onnxruntime"), "arm64": ("tflite", "onnxruntime"), "armhf": ("tflite",)}


@pytest.fixture
def place_of(debian: Callable[..., Path], runs_foreign: Callable[[str], None]) -> Callable[[str], Path]:
    """The Debian that a package is for."""

    def make(target: str) -> Path:
        architecture = target.partition("-")[0]
        suite = DEBIANS[target]
        options = ["--variant=minbase", f"--include={INSIDE_ARMHF if architecture == 'armhf' else INSIDE}"]
        if architecture != "amd64":
            runs_foreign(architecture)
            options.append(f"--architectures={architecture}")
        kind = "" if architecture == "amd64" else "-whole"
        return debian(f"{suite}-{architecture}{kind}", *options, suite)

    return make


@dataclass(frozen=True)
class Look:
    """What can be seen of a package that is installed."""

    described: Callable[[System], dict[str, Any]]
    runs_a_model: Callable[[System, Path], None]
    serves: Callable[[System], None]
    engines: Mapping[str, tuple[str, ...]]


@pytest.fixture
def look() -> Look:
    """The eyes of the tests."""
    return Look(described, runs_a_model, serves, ENGINES)


@pytest.fixture
def live(
    place_of: Callable[[str], Path],
    copied: Callable[[Path], System],
    packed: Callable[[str, Path, str], Path],
    tmp_path: Path,
    shared_models: Path,
) -> Callable[[str], None]:
    """Takes the package of a target from install to purge, in the Debian that it is for."""

    def whole(target: str) -> None:
        system = copied(place_of(target))
        _live(
            target,
            system,
            *(packed(target, tmp_path, version) for version in ("0.1.0", "0.2.0")),
            shared_models,
        )

    return whole


def described(system: System) -> dict[str, Any]:
    """What the agent says of the board and itself."""
    said = system.run("/usr/bin/boardbench-agent", "probe", "--format", "json", "--data-dir", "/tmp/probe")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def _live(target: str, system: System, first: Path, second: Path, shared_models: Path) -> None:
    """From install to purge."""
    architecture, _, tag = target.partition("-")
    before = system.files()
    for deb in (first, second):
        shutil.copy(deb, system.root / "root")

    def release(version: str) -> str:
        return f"releases/{version}+{tag}"

    system.run("dpkg", "-i", f"/root/{first.name}")
    told = described(system)
    engines = {engine["name"]: engine for engine in told["runtimes"]}
    assert told["agent_version"] == "0.1.0"
    for name in ENGINES[architecture]:
        assert engines[name].get("available"), engines[name]
    assert engines["tflite"]["interpreter"]["path"] == f"/opt/boardbench/{release('0.1.0')}/bin/python"
    # What is not there is not to be had by a pip that is not there either.
    for name, engine in engines.items():
        if not engine.get("available"):
            assert not re.search(r"(?<!/bin/python )-m pip", engine["reason"]), (name, engine["reason"])
            assert f"/opt/boardbench/{release('0.1.0')}/bin/python -m pip" not in engine["reason"], name
    runs_a_model(system, shared_models)
    serves(system)
    state = system.run("stat", "-c", "%U %G %a", "/var/lib/boardbench", "/etc/boardbench/agent.toml").split(
        "\n"
    )
    assert state[:2] == ["boardbench boardbench 700", "root root 644"]
    assert "boardbench" in system.run("id", "boardbench")
    # What that system's own programs say of the units and the rules, with the package's groups in place.
    units = [f"boardbench-{name}" for name in ("agent.service", "update.service", "update.path")]
    system.run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units)
    if DEBIANS[target] == "trixie":
        system.run("udevadm", "verify", "/usr/lib/udev/rules.d/60-boardbench.rules")
    wanted = system.root / "etc/systemd/system/multi-user.target.wants/boardbench-agent.service"
    assert wanted.is_symlink()
    # Nothing was compiled on the board, by root either.
    listed = set(system.run("dpkg", "-L", "boardbench-agent").split("\n"))
    for path in (system.root / "opt/boardbench").rglob("*"):
        name = "/" + str(path.relative_to(system.root))
        assert name in listed or name == "/opt/boardbench/current", name

    settings = system.root / "etc/boardbench/agent.toml"
    settings.write_text(settings.read_text() + '[labels]\nlab = "kept"\n')
    (system.root / "etc/boardbench/agent.d/50-flash.toml").write_text('collector = "lab:7342"\n')
    wanted.unlink()
    system.run("dpkg", "-i", f"/root/{second.name}")
    told = described(system)
    assert told["agent_version"] == "0.2.0"
    assert told["board"]["labels"] == {"lab": "kept"}
    assert (system.root / "opt/boardbench/current").readlink() == Path(release("0.2.0"))
    assert not (system.root / "opt/boardbench" / release("0.1.0")).exists()
    assert not wanted.is_symlink(), "who had disabled the service keeps it disabled"
    # The way back.
    system.run("dpkg", "-i", f"/root/{first.name}")
    assert (system.root / "opt/boardbench/current").readlink() == Path(release("0.1.0"))

    (system.root / "var/lib/boardbench/results").mkdir()
    (system.root / "etc/boardbench/update.pub").touch()
    # What an update has put beside the package's own release.
    (system.root / "opt/boardbench" / release("0.3.0")).mkdir()
    system.run("dpkg", "-r", "boardbench-agent")
    assert not (system.root / "opt/boardbench").exists()
    assert (system.root / "var/lib/boardbench/results").exists()
    assert '"kept"' in settings.read_text()
    system.run("dpkg", "-P", "boardbench-agent")
    left = {name for name in system.files() - before if not name.startswith("root/boardbench-agent_")}
    assert left == set()
    assert "no such user" in system.run("id", "boardbench", code=1)


# By the service's user, with nothing of root's.
_AS_SERVICE = ("setpriv", "--reuid=boardbench", "--regid=boardbench", "--clear-groups", "--no-new-privs")
_DATA = "/var/lib/boardbench"


def runs_a_model(system: System, shared_models: Path) -> None:
    """One real model, by the agent's own command."""
    place = system.root / "srv/model.tflite"
    shutil.copy(shared_models / "mobilenet_v1_0.25_128_quant.tflite", place)
    said = system.run(
        *_AS_SERVICE, "/usr/bin/boardbench-agent", "run", "/srv/model.tflite", "--data-dir", _DATA,
        "--max-runs=5", "--min-runs=5", "--duration=0.1", "--format=jsonl", HOME=_DATA,
    )  # fmt: skip
    place.unlink()
    result = json.loads(said.splitlines()[-1])["result"]
    assert result["status"] == "RUN_STATUS_SUCCEEDED", result
    (output,) = result["outputs"]
    assert output["shape"] in (["1", "1001"], [1, 1001])


def serves(system: System) -> None:
    """The service starts, and answers over gRPC; systemd is not there to do it."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    file = system.root / _DATA[1:] / "port.json"
    command = (
        *_AS_SERVICE,
        "/usr/bin/boardbench-agent",
        "serve",
        "--listen=127.0.0.1:0",
        "--data-dir",
        _DATA,
    )
    with system.started(*command, f"--port-file={_DATA}/port.json", HOME=_DATA) as process:
        deadline = time.monotonic() + 300
        while not file.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "it has not opened its port within 300 s"
            time.sleep(0.1)
        port = json.loads(file.read_text())["grpc"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        process.terminate()
        assert process.wait(120) == 0, "it ends by itself when it is asked to"
