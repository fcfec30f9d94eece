"""The agent's Debian packages: the same bytes twice, what is in them, and what systemd says to the unit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DEPLOY = REPOSITORY / "deploy"
EPOCH = "1800000000"


RUNNING = f"{sys.version_info[0]}.{sys.version_info[1]}"


def program(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not here")
    return found


def said(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build_deb: ModuleType) -> Any:
    """A target for the Python that runs this, with one wheel of our own: the package of seconds."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", EPOCH)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "engine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        # A set that the compiler keeps as it is; what has None in it has a hash that differs in all digits.
        names = ", ".join([*(f"'name{n}', ({n}, None)" for n in range(20)), "None", "..."])
        archive.writestr("engine/__init__.py", f"def known(name):\n    return name in {{{names}}}\n")
        archive.writestr("engine/broken.py", "this is no Python\n")
        archive.writestr("engine/__init__.pyi", "names: set[str]\n")
        archive.writestr("engine-1.0.data/purelib/beside.py", "value = 1\n")
        archive.writestr("engine-1.0.data/scripts/engine", "#!python\n")
        archive.writestr("engine-1.0.dist-info/METADATA", "Name: engine\nVersion: 1.0\n")
    lock = tmp_path / "lock.txt"
    lock.write_text(f"# made\nengine==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")

    class Small(build_deb.Target):  # type: ignore[name-defined]
        lock = property(lambda _: tmp_path / "lock.txt")

    return Small("amd64", "x86_64", RUNNING, 36, "a test"), wheels


# Python 3.10 writes sets down in the order of hashes; later ones do not.
@pytest.mark.parametrize("version", sorted({"3.10", RUNNING}))
def test_the_same_sources_make_the_same_bytes(
    version: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build_deb: ModuleType
) -> None:
    target, wheels = dataclasses.replace(small[0], python=version), small[1]
    try:
        build_deb.interpreter(version)
    except build_deb.BuildError as error:
        pytest.skip(str(error))
    one = build_deb.build(target, tmp_path / "one", wheels=wheels, preset=0)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "a longer name of a folder"))
    (tmp_path / "a longer name of a folder").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    before = os.umask(0o077)
    try:
        other = build_deb.build(target, tmp_path / "other", wheels=wheels, preset=0)
    finally:
        os.umask(before)
    assert one.read_bytes() == other.read_bytes()
    assert one.name == other.name == f"boardbench-agent_{build_deb.project_version()}_amd64_{target.tag}.deb"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000001")
    assert (
        build_deb.build(target, tmp_path / "later", wheels=wheels, preset=0).read_bytes() != one.read_bytes()
    )


def test_what_is_in_it(small: Any, tmp_path: Path, build_deb: ModuleType) -> None:
    target, wheels = small
    deb = build_deb.build(target, tmp_path, wheels=wheels, version="9.9.9")
    dpkg = program("dpkg-deb")
    fields = dict(line.split(": ", 1) for line in said(dpkg, "--field", deb).splitlines() if ": " in line)
    assert fields["Version"] == f"9.9.9+{target.tag}"
    assert fields["Depends"].startswith(f"python{RUNNING}, libc6 (>= 2.36)")
    listed = [line.split(None, 5) for line in said(dpkg, "--contents", deb).splitlines()]
    assert {line[1] for line in listed} == {"root/root"}
    assert {line[3] for line in listed} == {"2027-01-15"}
    assert {line[0] for line in listed} <= {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x", "lrwxrwxrwx"}
    tree = tmp_path / "tree"
    said(dpkg, "-x", deb, tree)
    home = tree / f"opt/boardbench/releases/9.9.9+{target.tag}"
    site = home / f"lib/python{RUNNING}/site-packages"
    files = {path.relative_to(tree) for path in tree.rglob("*") if not path.is_dir()}
    # The link that says which release runs is no file of the package: an update moves it.
    assert Path("opt/boardbench/current") not in files
    assert {path.parts[0] for path in files} == {"opt", "usr", "etc"}
    assert (tree / "usr/bin/boardbench-agent").readlink() == Path(
        "/opt/boardbench/current/bin/boardbench-agent"
    )
    assert (home / "bin/python").readlink() == Path(f"/usr/bin/python{RUNNING}")
    assert (
        (home / "bin/boardbench-agent")
        .read_text()
        .startswith(f"#!/{home.relative_to(tree)}/bin/python -IB\n")
    )
    assert (site / "engine/__init__.py").exists() and (site / "beside.py").exists()
    assert not list(tree.rglob("*.pyi")) and not list(tree.rglob("engine-1.0.data"))
    # A board neither compiles nor has anything compiled that has no source.
    for source in site.rglob("*.py"):
        compiled = source.parent / "__pycache__" / f"{source.stem}.cpython-{RUNNING.replace('.', '')}.pyc"
        assert compiled.exists() != (source.name == "broken.py"), source
    for compiled in site.rglob("*.pyc"):
        assert (compiled.parent.parent / f"{compiled.name.partition('.')[0]}.py").exists()
        # Unchecked (PEP 552): the source's time, which the package sets, is not looked at.
        assert compiled.read_bytes()[4:8] == b"\x01\0\0\0"
        assert str(tmp_path).encode() not in compiled.read_bytes()
    assert not (site / "boardbench/collector").exists() and not (site / "boardbench/cli").exists()
    conffiles = said(dpkg, "--info", deb, "conffiles")
    assert conffiles == "/etc/boardbench/agent.toml\n"
    assert said(dpkg, "--info", deb, "postinst").count(f"releases/9.9.9+{target.tag}") == 2


def test_the_release_runs_as_an_environment_of_its_own(
    small: Any, tmp_path: Path, build_deb: ModuleType
) -> None:
    target, wheels = small
    deb = build_deb.build(target, tmp_path, wheels=wheels)
    said(program("dpkg-deb"), "-x", deb, tmp_path / "tree")
    (home,) = (tmp_path / "tree/opt/boardbench/releases").iterdir()
    python = home / "bin/python"
    # Not the system's Python here, but the one that runs this.
    python.unlink()
    python.symlink_to(sys.executable if sys.prefix == sys.base_prefix else Path(sys._base_executable))  # type: ignore[attr-defined]
    shown = said(
        python,
        "-IB",
        "-c",
        "import sys, engine, boardbench.inspect; from boardbench.agent.version import version; "
        "print(sys.prefix); print(engine.__file__); print(version())",
    ).split("\n")
    assert shown[:3] == [str(home), str(Path(engine_file(home))), build_deb.project_version()]
    told = json.loads((home / "release.json").read_text())
    assert told["release"].endswith(f"+{target.tag}") and told["wheels"] == ["engine"]


def engine_file(home: Path) -> Path:
    return home / f"lib/python{RUNNING}/site-packages/engine/__init__.py"


@pytest.mark.parametrize(
    ("name", "words"),
    [("../outside.py", "leads out of it"), ("engine/__init__.py", "so does another wheel")],
)
def test_a_wheel_that_is_not_as_it_should_be_is_refused(
    tmp_path: Path, name: str, words: str, build_deb: ModuleType
) -> None:
    wheel = tmp_path / "bad-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, "")
    site = tmp_path / "site"
    (site / "engine").mkdir(parents=True)
    (site / "engine/__init__.py").touch()
    with pytest.raises(build_deb.BuildError, match=words):
        build_deb.unpack(wheel, site)
    assert not (tmp_path / "outside.py").exists()


def test_a_wheel_that_is_not_the_locked_one_is_refused(
    small: Any, tmp_path: Path, build_deb: ModuleType
) -> None:
    target, wheels = small
    (wheels / "engine-1.0-py3-none-any.whl").write_bytes(b"another one")
    with pytest.raises(build_deb.BuildError, match="pip under"):
        build_deb.build(target, tmp_path, wheels=wheels)


def test_every_target_is_locked_by_hash(build_deb: ModuleType) -> None:
    assert set(build_deb.TARGETS) == {path.stem for path in (DEPLOY / "locks").iterdir()}
    for name, target in build_deb.TARGETS.items():
        lines = [line for line in target.lock.read_text().splitlines() if not line.startswith("#")]
        pinned = {}
        for line in lines:
            match = re.fullmatch(r"([a-z0-9.-]+)==([\w.]+) --hash=sha256:([0-9a-f]{64})", line)
            assert match, f"{name}: {line}"
            pinned[match[1]] = match[2]
        wanted = {re.split(r"[<>=]", wish)[0] for wish in target.requirements}
        assert wanted <= set(pinned), name
        assert pinned["grpcio"] == pinned["grpcio-reflection"] == pinned["grpcio-health-checking"], name
    assert "numpy" not in build_deb.TARGETS["armhf-cp311"].lock.read_text()
    assert build_deb.TARGETS["armhf-cp311"].depends == ("python3-numpy", "python3-psutil")


def test_the_unit_is_hardened_and_sound(tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    unit = DEPLOY / "systemd/boardbench-agent.service"
    judged = said(analyze, "--no-pager", "security", "--offline=true", "--threshold=20", unit)
    score = re.search(r"Overall exposure level for boardbench-agent\.service: ([\d.]+)", judged)
    assert score is not None, judged
    assert float(score[1]) <= 2.0
    # With a program in its place: verify looks whether it can be started.
    root = tmp_path / "root"
    place = root / "usr/lib/systemd/system"
    place.mkdir(parents=True)
    shutil.copyfile(unit, place / unit.name)
    system = Path("/usr/lib/systemd/system")
    for name in (
        "network-online.target",
        "sysinit.target",
        "basic.target",
        "shutdown.target",
        "multi-user.target",
        "-.mount",
    ):
        if (system / name).exists():
            shutil.copyfile(system / name, place / name)
    start = root / "opt/boardbench/current/bin/boardbench-agent"
    start.parent.mkdir(parents=True)
    start.write_text("#!/bin/sh\n")
    start.chmod(0o755)
    done = subprocess.run(
        [analyze, f"--root={root}", "--man=no", "--recursive-errors=no", "verify", unit.name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "boardbench-agent.service:" not in done.stderr, done.stderr


# What the unit asks of the kernel (prctl(2), PR_SET_MDWE), and an engine that makes machine code of a model.
_COMPILES = """
import ctypes, sys
if sys.argv[2] == "yes":
    assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0
import numpy, openvino
made = openvino.Core().compile_model(sys.argv[1], "CPU")
made({each: numpy.zeros(tuple(each.shape), "B") for each in made.inputs})
"""


def test_the_unit_lets_engines_compile(shared_models: Path) -> None:
    pytest.importorskip("openvino")
    unit = (DEPLOY / "systemd/boardbench-agent.service").read_text()
    denied = re.findall(r"^MemoryDenyWriteExecute=(\w+)$", unit, re.MULTILINE) or ["no"]
    model = shared_models / "mobilenet_v1_0.25_128_quant.tflite"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _COMPILES, model, denied[-1]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_groups_of_the_unit_are_made_by_the_package() -> None:
    unit = (DEPLOY / "systemd/boardbench-agent.service").read_text()
    (groups,) = re.findall(r"^SupplementaryGroups=(.*)$", unit, re.MULTILINE)
    postinst = (DEPLOY / "debian/postinst").read_text()
    (made,) = re.findall(r"for group in (.*); do", postinst)
    # systemd does not start a service whose group does not exist.
    assert set(groups.split()) | {"boardbench"} == set(made.split())
    rules = (DEPLOY / "udev/60-boardbench.rules").read_text()
    assert set(re.findall(r'GROUP="(\w+)"', rules)) <= set(groups.split())


def test_the_rules_name_the_devices_that_the_agent_knows() -> None:
    from boardbench.agent.board.identify import USB_ACCELERATORS

    rules = (DEPLOY / "udev/60-boardbench.rules").read_text()
    named = re.findall(r'ATTRS\{idVendor\}=="(\w+)", ATTRS\{idProduct\}=="(\w+)"', rules)
    assert set(named) == set(USB_ACCELERATORS)


@pytest.mark.parametrize("name", ["postinst", "postrm", "prerm"])
def test_the_scripts_are_plain_shell(name: str) -> None:
    script = DEPLOY / "debian" / name
    said(shutil.which("dash") or "sh", "-n", script)
    assert script.read_text().startswith("#!/bin/sh\nset -e\n")


def configured(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """What the package's script asks of systemd: the script as it is, but for the place of its folders, with
    programs in the place of root's own.
    """
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    (folder / "run/systemd/system").mkdir(parents=True, exist_ok=True)
    asked = folder / "asked"
    asked.write_text("")
    for name in ("getent", "install", "ln", "mv", "udevadm", "systemctl"):
        text = f'echo "$*" >>"{asked}"' if name == "systemctl" else "exit 0"
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    script = folder / "postinst"
    script.write_text((DEPLOY / "debian/postinst").read_text().replace("/run/", f"{folder}/run/"))
    path = f"{programs}:{os.environ['PATH']}"
    subprocess.run(["sh", script, *arguments], env={"PATH": path, **environment}, check=True)
    return asked.read_text().splitlines()


def test_the_agent_is_started_by_the_package_unless_whoever_installs_it_does(tmp_path: Path) -> None:
    agent, before = "boardbench-agent.service", "0.1.0+cp311"
    first = configured(tmp_path, "configure", "")
    assert first[-1] == f"start --no-block {agent}"
    later = configured(tmp_path, "configure", before)
    assert later[-1] == f"try-restart --no-block {agent}"
    for told, *arguments in ((first, "configure", ""), (later, "configure", before)):
        # The same, and nothing of the agent.
        assert configured(tmp_path, *arguments, BOARDBENCH_NO_START="1") == told[:-1]


def test_the_agents_settings_in_the_package_are_valid(tmp_path: Path) -> None:
    from boardbench.agent.config import AgentConfig, load

    assert load(DEPLOY / "debian/agent.toml", {}) == AgentConfig()
    lines = (DEPLOY / "debian/agent.toml").read_text().splitlines()
    whole = tmp_path / "agent.toml"
    # What is only shown there can be switched on.
    whole.write_text("\n".join(line[1:] if re.match(r"#(\w+ =|\[)", line) else line for line in lines))
    config = load(whole, {})
    assert config.collector == "collector.example:7342"
    assert config.labels == {"lab": "zurich"}
