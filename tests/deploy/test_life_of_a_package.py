"""Install, upgrade, remove and purge in a Debian of its own, with Debian's own dpkg; and every processor.

Soak: a minute or two. As root (a chroot), with mmdebstrap.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CACHE = REPOSITORY / ".cache"
WHEELS = CACHE / "wheels"

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "boardbench_build_deb_life", REPOSITORY / "deploy" / "build_deb.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build_deb = _load()


def packed(target: str, folder: Path, version: str) -> Path:
    try:
        return Path(
            build_deb.build(build_deb.TARGETS[target], folder, wheels=WHEELS, version=version, preset=0)
        )
    except build_deb.BuildError as error:
        pytest.skip(f"the package can't be built here: {error}")


def debian(name: str, *options: str) -> Path:
    """A root file system, made once and kept."""
    place = CACHE / "debian" / name
    if place.exists():
        return place
    program = shutil.which("mmdebstrap")
    if program is None or os.geteuid() != 0:
        pytest.skip("a Debian in a folder needs root and: apt install mmdebstrap")
    fresh = place.with_name(f"{name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [program, "--quiet", *options, str(fresh)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mmdebstrap failed: {done.stderr[-500:]}")
    fresh.rename(place)
    return place


class System:
    """A Debian that commands run in."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *command: str, code: int = 0, **environment: str) -> str:
        # A mount of its own that goes with the process.
        mounts = f'mount -t proc proc "{self.root}/proc" && mount --rbind /dev "{self.root}/dev"'
        script = f'{mounts} && exec chroot "{self.root}" "$@"'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "_", *command],
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "LC_ALL": "C.UTF-8",
                "HOME": "/root",
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def files(self) -> set[str]:
        """What is there, without what dpkg and the accounts' own programs write about themselves."""
        told = re.compile(
            r"(var/(lib/dpkg|log|cache|backups)/|etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$|dev/|proc/|tmp/)"
        )
        return {
            name for path in self.root.rglob("*") if not told.match(name := str(path.relative_to(self.root)))
        }


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    made = debian(
        "bookworm-amd64", "--variant=minbase", "--include=python3,libstdc++6,systemd,udev", "bookworm"
    )
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", "--reflink=auto", str(made), str(root)], check=True)
    yield System(root)
    subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=True)


def test_from_install_to_purge(system: System, tmp_path: Path) -> None:
    before = system.files()
    first, second = (packed("amd64-cp311", tmp_path, version) for version in ("0.1.0", "0.2.0"))
    for deb in (first, second):
        shutil.copy(deb, system.root / "root")

    def probe() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            system.run(
                "/usr/bin/boardbench-agent", "probe", "--format", "json", "--data-dir", "/tmp/probe"
            ).splitlines()[-1]
        )
        return found

    system.run("dpkg", "-i", f"/root/{first.name}")
    described = probe()
    engines = {engine["name"]: engine for engine in described["runtimes"]}
    assert described["agent_version"] == "0.1.0"
    assert engines["tflite"]["available"] and engines["onnxruntime"]["available"]
    assert engines["tflite"]["interpreter"]["path"] == "/opt/boardbench/releases/0.1.0+cp311/bin/python"
    state = system.run("stat", "-c", "%U %G %a", "/var/lib/boardbench", "/etc/boardbench/agent.toml").split(
        "\n"
    )
    assert state[:2] == ["boardbench boardbench 700", "root root 644"]
    assert "boardbench" in system.run("id", "boardbench")
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
    assert probe()["agent_version"] == "0.2.0"
    assert probe()["board"]["labels"] == {"lab": "kept"}
    assert (system.root / "opt/boardbench/current").readlink() == Path("releases/0.2.0+cp311")
    assert not (system.root / "opt/boardbench/releases/0.1.0+cp311").exists()
    assert not wanted.is_symlink(), "who had disabled the service keeps it disabled"
    # The way back.
    system.run("dpkg", "-i", f"/root/{first.name}")
    assert probe()["agent_version"] == "0.1.0"

    (system.root / "var/lib/boardbench/results").mkdir()
    # What an update has put beside the package's own release.
    (system.root / "opt/boardbench/releases/0.3.0+cp311").mkdir()
    system.run("dpkg", "-r", "boardbench-agent")
    assert not (system.root / "opt/boardbench").exists()
    assert (system.root / "var/lib/boardbench/results").exists()
    assert '"kept"' in settings.read_text()
    system.run("dpkg", "-P", "boardbench-agent")
    left = {name for name in system.files() - before if not name.startswith("root/boardbench-agent_")}
    assert left == set()
    assert "no such user" in system.run("id", "boardbench", code=1)


def test_a_real_package_is_the_same_twice(tmp_path: Path) -> None:
    one = packed("arm64-cp313", tmp_path / "one", "0.1.0")
    other = packed("arm64-cp313", tmp_path / "other", "0.1.0")
    assert one.read_bytes() == other.read_bytes()


# Every engine is imported, and one of each kind of work done: NumPy's BLAS, and a quantised model.
_LOADS = """
import numpy, onnxruntime, grpc, google.protobuf, psutil
from ai_edge_litert import interpreter
matrix = numpy.random.default_rng(0).standard_normal((64, 64)).astype("f")
assert numpy.isfinite(matrix @ matrix).all()
model = interpreter.Interpreter("/root/model.tflite", num_threads=1)
model.allocate_tensors()
given = model.get_input_details()[0]
model.set_tensor(given["index"], numpy.full(given["shape"], 128, given["dtype"]))
model.invoke()
print(int(model.get_tensor(model.get_output_details()[0]["index"]).argmax()))
"""

PROCESSORS = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")


@pytest.fixture(scope="module")
def board() -> tuple[Path, Path]:
    """An arm64 Debian in a folder, and a QEMU that runs its programs here."""
    root = debian(
        "bookworm-arm64",
        "--architectures=arm64",
        "--variant=extract",
        "--include=base-files,bash,dash,coreutils,python3,libstdc++6,libc-bin,zlib1g",
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        "bookworm",
    )
    # Debian 12's own (7.2) breaks down in newer wheels; that of Debian 13 (10) runs them.
    emulator = (
        debian("qemu-user", "--variant=extract", "--include=qemu-user", "trixie") / "usr/bin/qemu-aarch64"
    )
    if b"interpreter" in subprocess.run(["file", emulator], capture_output=True, check=False).stdout:
        pytest.skip(f"{emulator} is not static")
    return root, emulator


@pytest.fixture(scope="module")
def release(board: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's release, unpacked in the place that it has on a board."""
    root, _ = board
    folder = tmp_path_factory.mktemp("package")
    deb = packed("arm64-cp311", folder, "0.1.0")
    shutil.rmtree(root / "opt/boardbench", ignore_errors=True)
    subprocess.run(["dpkg-deb", "-x", deb, str(root)], check=True)
    return Path("/opt/boardbench/releases/0.1.0+cp311/bin/boardbench-agent")


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_wheel_runs_on_every_processor(
    processor: str, board: tuple[Path, Path], release: Path, shared_models: Path
) -> None:
    """An illegal instruction here is one on the board: onnxruntime 1.21 was such on the Cortex-A72 of a Pi 4
    (microsoft/onnxruntime#23957).
    """
    root, emulator = board
    shutil.copy(shared_models / "mobilenet_v1_0.25_128_quant.tflite", root / "root/model.tflite")
    shutil.copy(emulator, root / "usr/bin/qemu-aarch64")
    python = str(release.parent / "python")
    script = (
        f'mount -t proc proc "{root}/proc" && mount --rbind /dev "{root}/dev" && '
        f'exec chroot "{root}" /usr/bin/qemu-aarch64 -cpu {processor} "$@"'
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "_", python, "-IB", "-c", _LOADS],
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": "/root",
            "ORT_DISABLE_TELEMETRY": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{processor}: {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stdout.strip().isdigit()
