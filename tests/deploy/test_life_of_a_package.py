"""Install, upgrade, remove and purge in a Debian of its own, with Debian's own dpkg; and every processor.

Soak: some minutes, and more where another architecture is emulated. As root (a chroot), with mmdebstrap.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

# In the Debian that has the Python of each package. Those for Ubuntu (cp310, cp312) are below.
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
TARGETS = (*(f"{name}-cp{tag}" for name in ("arm64", "amd64") for tag in (310, 311, 312, 313)), "armhf-cp311")
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


def described(system: Any) -> dict[str, Any]:
    """What the agent says of the board and itself."""
    said = system.run("/usr/bin/boardbench-agent", "probe", "--format", "json", "--data-dir", "/tmp/probe")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


@pytest.mark.parametrize("target", DEBIANS)
def test_from_install_to_purge(
    target: str,
    place_of: Callable[[str], Path],
    copied: Callable[[Path], Any],
    packed: Callable[[str, Path, str], Path],
    tmp_path: Path,
    shared_models: Path,
) -> None:
    system = copied(place_of(target))
    architecture, _, tag = target.partition("-")
    before = system.files()
    first, second = (packed(target, tmp_path, version) for version in ("0.1.0", "0.2.0"))
    for deb in (first, second):
        shutil.copy(deb, system.root / "root")

    def release(version: str) -> str:
        return f"releases/{version}+{tag}"

    system.run("dpkg", "-i", f"/root/{first.name}")
    told = described(system)
    engines = {engine["name"]: engine for engine in told["runtimes"]}
    assert told["agent_version"] == "0.1.0"
    for name in ENGINES[architecture]:
        assert engines[name]["available"], engines[name]
    assert engines["tflite"]["interpreter"]["path"] == f"/opt/boardbench/{release('0.1.0')}/bin/python"
    # What is not there is not to be had by a pip that is not there either.
    for name, engine in engines.items():
        if not engine.get("available"):
            assert not re.search(r"(?<!/bin/python )-m pip", engine["reason"]), (name, engine["reason"])
            assert f"/opt/boardbench/{release('0.1.0')}/bin/python -m pip" not in engine["reason"], name
    _runs_a_model(system, shared_models)
    _serves(system)
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


def _runs_a_model(system: Any, shared_models: Path) -> None:
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


def _serves(system: Any) -> None:
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


@pytest.mark.parametrize("target", TARGETS)
def test_a_real_package_is_the_same_twice_and_for_its_board(
    target: str, packed: Callable[[str, Path, str], Path], build_deb: ModuleType, tmp_path: Path
) -> None:
    one = packed(target, tmp_path / "one", "0.1.0")
    other = packed(target, tmp_path / "other", "0.1.0")
    assert one.read_bytes() == other.read_bytes()
    dpkg, readelf = shutil.which("dpkg-deb"), shutil.which("readelf")
    if dpkg is None or readelf is None:
        pytest.skip("dpkg-deb or readelf is not here (Debian: dpkg, binutils)")
    tree = tmp_path / "tree"
    subprocess.run([dpkg, "-x", one, tree], check=True)
    found = build_deb.TARGETS[target]
    modules = [path for path in tree.rglob("*.so*") if path.is_file() and not path.is_symlink()]
    assert len(modules) > 10
    for path in modules:
        told = subprocess.run(
            [readelf, "--file-header", "--version-info", "--wide", path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (machine,) = re.findall(r"Machine: +(.+)", told)
        assert machine in _MACHINES[found.architecture], path
        # Nothing younger than what the system has: it would not be loaded there.
        for library, youngest in {
            "GLIBC": (2, found.glibc_minor),
            "GLIBCXX": (3, 4, _GLIBCXX[found.python]),
        }.items():
            for version in re.findall(rf"Name: {library}_([\d.]+)", told):
                assert tuple(map(int, version.split("."))) <= youngest, (
                    f"{path.name} needs {library}_{version}"
                )
        if match := re.search(r"\.cpython-(\d+)-", path.name):
            assert f"cp{match[1]}" == found.tag, path


_MACHINES = {
    "arm64": ("AArch64",),
    "amd64": ("Advanced Micro Devices X86-64",),
    "armhf": ("ARM",),
}
# Of libstdc++6 in Ubuntu 22.04, Debian 12, Ubuntu 24.04, Debian 13 (gcc.gnu.org, "ABI Policy").
_GLIBCXX = {"3.10": 30, "3.11": 30, "3.12": 33, "3.13": 33}


@pytest.mark.parametrize("target", ["amd64-cp310", "amd64-cp312"])
def test_the_packages_for_ubuntu_run_with_their_python(
    target: str,
    debian: Callable[..., Path],
    copied: Callable[[Path], Any],
    packed: Callable[[str, Path, str], Path],
    build_deb: ModuleType,
    tmp_path: Path,
    shared_models: Path,
) -> None:
    """Ubuntu can't be had here: Debian 13 stands in for it, with that Python put in the place of Ubuntu's."""
    version = build_deb.TARGETS[target].python
    system = copied(debian("trixie-amd64", "--variant=minbase", f"--include={INSIDE}", "trixie"))
    python = Path(build_deb.interpreter(version))
    ask = "import sys, sysconfig; print(sys.base_prefix, sysconfig.get_config_var('Py_ENABLE_SHARED'))"
    told = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    home = Path(told[0])
    if home == Path("/usr") or told[1] != "0":
        pytest.skip(
            f"{python} can't be taken elsewhere: it needs a Python in a folder of its own, linked as a whole"
        )
    name = f"python{version}"
    shutil.copy(home / "bin" / name, system.root / "usr/bin" / name)
    shutil.copytree(home / "lib" / name, system.root / "usr/lib" / name, ignore=_left_out)
    deb = packed(target, tmp_path, "0.1.0")
    shutil.copy(deb, system.root / "root")
    # dpkg does not know of the Python.
    system.run("dpkg", "--force-depends", "-i", f"/root/{deb.name}")
    engines = {engine["name"]: engine for engine in described(system)["runtimes"]}
    for engine in ENGINES["amd64"]:
        assert engines[engine]["available"], engines[engine]
    assert engines["tflite"]["interpreter"]["version"].startswith(version)
    _runs_a_model(system, shared_models)
    _serves(system)
    system.run("dpkg", "-P", "boardbench-agent")
    assert not (system.root / "opt/boardbench").exists() and not (system.root / _DATA[1:]).exists()


def _left_out(_folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in ("site-packages", "test", "tests", "__pycache__")}


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
def board(debian: Callable[..., Path], qemu: Callable[[str], Path]) -> tuple[Path, Path]:
    """An arm64 Debian in a folder, and a QEMU that runs its programs here."""
    root = debian(
        "bookworm-arm64",
        "--architectures=arm64",
        "--variant=extract",
        "--include=base-files,bash,dash,coreutils,python3,libstdc++6,libc-bin,zlib1g",
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        "bookworm",
    )
    return root, qemu("arm64")


@pytest.fixture(scope="module")
def release(
    board: tuple[Path, Path],
    packed: Callable[[str, Path, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
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
