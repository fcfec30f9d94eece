"""What to install where, and what can't be: of Pythons and machines that are not here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from boardbench.agent.bench import runtimes, wheels
from boardbench.agent.bench.runtime import RuntimeUnavailable
from boardbench.agent.bench.wheels import Here

PI_5 = Here((3, 11), "linux", "aarch64", (2, 36), "/opt/v/bin/python", managed=False)
ZERO_2 = replace(PI_5, machine="armv7l")
BULLSEYE = replace(PI_5, python=(3, 9), glibc=(2, 31))
MAC = Here((3, 12), "darwin", "arm64", None, "/opt/v/bin/python", managed=False)
ALPINE = replace(PI_5, machine="x86_64", glibc=None)


def tflite(at: Here) -> str:
    return wheels.how("tflite", wheels.AI_EDGE_LITERT, wheels.TFLITE_RUNTIME, at=at)


@pytest.mark.parametrize(
    ("at", "command"),
    [
        (PI_5, "/opt/v/bin/python -m pip install ai-edge-litert"),
        (replace(PI_5, python=(3, 13)), "/opt/v/bin/python -m pip install ai-edge-litert"),
        # There is only the older interpreter for 32 bits.
        (ZERO_2, "/opt/v/bin/python -m pip install tflite-runtime 'numpy<2'"),
    ],
)
def test_tensorflow_lite_is_had_from_what_has_a_wheel(at: Here, command: str) -> None:
    assert tflite(at) == command


def test_where_there_is_no_wheel_it_says_so_and_what_to_do() -> None:
    told = tflite(replace(ZERO_2, python=(3, 13)))
    assert "pip install" not in told
    assert "of ai-edge-litert none for armv7l linux" in told
    assert "of tflite-runtime none for Python 3.13 (3.9 to 3.11)" in told
    assert "another Python, and name that as python in [runtimes.tflite]" in told


@pytest.mark.parametrize(
    ("package", "at", "lacks"),
    [
        (wheels.EXECUTORCH, ZERO_2, "none for armv7l linux (x86_64 linux, aarch64 linux, arm64 darwin"),
        (wheels.EXECUTORCH, BULLSEYE, "none for Python 3.9 (3.10 or newer)"),
        (wheels.EXECUTORCH, replace(PI_5, glibc=(2, 27)), "none for glibc 2.27 (2.28 or newer)"),
        (wheels.EXECUTORCH, PI_5, ""),
        (wheels.EXECUTORCH, MAC, ""),
        (wheels.ONNXRUNTIME, ZERO_2, "none for armv7l linux"),
        (wheels.ONNXRUNTIME, ALPINE, "none for a C library other than GNU's"),
        (wheels.ONNXRUNTIME, PI_5, ""),
        (wheels.TFLITE_RUNTIME, replace(PI_5, python=(3, 12)), "none for Python 3.12 (3.9 to 3.11)"),
        (wheels.TFLITE_RUNTIME, replace(ZERO_2, glibc=(2, 31)), "none for glibc 2.31 (2.34 or newer)"),
        (wheels.TFLITE_RUNTIME, MAC, "none for arm64 darwin"),
        (wheels.OPENVINO, ZERO_2, "none for armv7l linux"),
        (wheels.TORCH, ZERO_2, "none for armv7l linux"),
    ],
    ids=lambda value: getattr(value, "package", None),
)
def test_what_there_is_no_wheel_for(package: wheels.Wheels, at: Here, lacks: str) -> None:
    found = package.lacks(at)
    assert found.startswith(lacks) and bool(found) == bool(lacks), found


def test_the_systems_python_takes_an_environment_and_not_packages() -> None:
    told = wheels.how(
        "onnxruntime", wheels.ONNXRUNTIME, at=replace(PI_5, executable="/usr/bin/python3", managed=True)
    )
    assert "/usr/bin/python3 -m venv /opt/boardbench-onnxruntime && " in told
    assert "/opt/boardbench-onnxruntime/bin/python -m pip install onnxruntime" in told
    assert "as python in [runtimes.onnxruntime]" in told


BROUGHT = frozenset(("ai-edge-litert", "numpy", "onnxruntime"))
PACKAGED = replace(PI_5, executable="/usr/bin/python3.11", brought=BROUGHT)


def test_the_agents_package_has_no_pip_and_is_told_what_works_there() -> None:
    told = wheels.how("torch", wheels.TORCH, at=PACKAGED)
    assert (
        "sudo apt install python3.11-venv && sudo /usr/bin/python3.11 -m venv /opt/boardbench-torch && "
        in told
    )
    assert "sudo /opt/boardbench-torch/bin/python -m pip install torch numpy; then " in told
    assert (
        'python = "/opt/boardbench-torch/bin/python" below [runtimes.torch] in /etc/boardbench/agent.toml'
        in told
    )
    # What is in it needs no installation, but the package anew.
    for told in (tflite(PACKAGED), wheels.how("onnxruntime", wheels.ONNXRUNTIME, at=PACKAGED)):
        assert "pip" not in told and "apt install --reinstall ./boardbench-agent_" in told
    # Of 32 bits it has the older interpreter.
    narrow = replace(PACKAGED, machine="armv7l", brought=frozenset(("tflite-runtime",)))
    assert "tflite-runtime is in the agent's package" in tflite(narrow)
    assert "there is no wheel" in wheels.how("onnxruntime", wheels.ONNXRUNTIME, at=narrow)


def test_the_agents_package_is_told_by_its_release(tmp_path: Path) -> None:
    """A virtual environment over this Python, as deploy/build_deb.py lays one out."""
    base = Path(sys._base_executable)  # type: ignore[attr-defined]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(base)
    (tmp_path / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
    agent = Path(wheels.__file__).parents[3]
    program = (
        f"import sys; sys.path.insert(0, {str(agent)!r}); from boardbench.agent.bench import wheels; "
        "here = wheels.here(); print(here.brought and sorted(here.brought), here.executable)"
    )

    def told() -> str:
        command = [tmp_path / "bin/python", "-I", "-c", program]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert told() == f"None {tmp_path / 'bin/python'}"
    for content, brought in (
        ('{"wheels": ["onnxruntime", "numpy"]}', "['numpy', 'onnxruntime']"),
        ("{}", "frozenset()"),
        ("no JSON", "None"),
        ("[]", "None"),
    ):
        (tmp_path / "release.json").write_text(content)
        assert told().startswith(f"{brought} ")
        if brought != "None":
            assert Path(told().split()[-1]).resolve() == base.resolve()


def test_a_jetsons_engine_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)

    def reason(at: Here) -> str:
        monkeypatch.setattr(wheels, "here", lambda: at)
        with pytest.raises(RuntimeUnavailable) as raised:
            runtimes.create("tensorrt").version()
        return str(raised.value)

    # The package's Python sees the system's packages.
    assert reason(PACKAGED).endswith("sudo apt install python3-libnvinfer")
    assert reason(PI_5).endswith(
        "python3-libnvinfer and name /usr/bin/python3 as python in [runtimes.tensorrt]"
    )
    assert "; elsewhere /opt/v/bin/python -m pip install tensorrt" in reason(replace(PI_5, machine="x86_64"))


@pytest.mark.parametrize(
    ("kernel", "bits", "machine"),
    [
        ("aarch64", 64, "aarch64"),
        ("aarch64", 32, "armv7l"),  # Raspberry Pi OS of 32 bits has had a 64-bit kernel since 2023
        ("armv8l", 32, "armv7l"),
        ("armv7l", 32, "armv7l"),
        ("AMD64", 64, "amd64"),
        ("x86_64", 32, "i686"),
    ],
)
def test_the_machine_is_that_of_the_python(kernel: str, bits: int, machine: str) -> None:
    assert wheels.machine(kernel, bits) == machine


def test_here_is_this_python() -> None:
    found = wheels.here()
    assert found.python == sys.version_info[:2]
    assert (found.system, found.executable) == (sys.platform, sys.executable)
    if found.system == "linux" and Path("/lib64/ld-linux-x86-64.so.2").exists():
        assert found.machine == "x86_64"
        assert found.glibc is not None and found.glibc >= (2, 17)


def test_every_engine_that_pip_installs_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of 32 bits each says that there is no wheel, and not a command that fails."""
    monkeypatch.setattr(wheels, "here", lambda: replace(ZERO_2, python=(3, 13)))
    for name in ("numpy", "onnxruntime", "openvino", "torch", "executorch"):
        monkeypatch.setitem(sys.modules, name, None)
    for package in ("ai_edge_litert", "tflite_runtime"):
        monkeypatch.setitem(sys.modules, f"{package}.interpreter", None)
    for name in ("tflite", "onnxruntime", "openvino", "torch", "executorch"):
        with pytest.raises(RuntimeUnavailable) as raised:
            runtimes.create(name).version()
        assert "there is no wheel" in str(raised.value), name
        assert f"[runtimes.{name}]" in str(raised.value)


def test_pip_agrees_on_this_machine() -> None:
    """The tags that this Python takes are those that the table says it does."""
    program = (
        "import json; from pip._vendor.packaging.tags import sys_tags; "
        "print(json.dumps(sorted({tag.platform for tag in sys_tags()})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip is not here to be asked: {done.stderr.strip().splitlines()[-1]}")
    platforms = json.loads(done.stdout)
    found = wheels.here()
    assert any(tag.endswith(f"_{found.machine}") for tag in platforms)
    if found.glibc is not None:
        major, minor = found.glibc
        assert f"manylinux_{major}_{minor}_{found.machine}" in platforms


def test_the_agent_alone_brings_no_engine_and_each_engine_is_an_extra() -> None:
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[\w-]+", each)[0] for each in requirements}

    heavy = {"numpy", "tensorrt", "coremltools", "ai-edge-litert"}
    heavy |= {each.package for each in vars(wheels).values() if isinstance(each, wheels.Wheels)}
    assert not names(project["dependencies"] + extras["agent"]) & heavy
    for extra, package in {
        "tflite": wheels.AI_EDGE_LITERT,
        "tflite-runtime": wheels.TFLITE_RUNTIME,
        "onnx": wheels.ONNXRUNTIME,
        "openvino": wheels.OPENVINO,
        "torch": wheels.TORCH,
        "executorch": wheels.EXECUTORCH,
    }.items():
        (requirement,) = (each for each in extras[extra] if names([each]) == {package.package})
        # With a marker pip would install nothing, and not say so.
        assert ";" not in requirement, f"{extra}: pip says when there is no wheel"
