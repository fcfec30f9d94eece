"""Every package that is offered: the same bytes twice, for its board, and installed where that can be had.

Soak: an hour on two processors, since other architectures are emulated (`make test-packages`). As root,
with mmdebstrap.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

TARGETS = (*(f"{name}-cp{tag}" for name in ("arm64", "amd64") for tag in (310, 311, 312, 313)), "armhf-cp311")


def test_these_are_all(build_deb: ModuleType) -> None:
    assert set(TARGETS) == set(build_deb.TARGETS)


# That of amd64-cp311 is in test_life_of_a_package.py.
@pytest.mark.parametrize("target", ["amd64-cp313", "arm64-cp311", "arm64-cp313", "armhf-cp311"])
def test_from_install_to_purge(target: str, live: Callable[[str], None]) -> None:
    live(target)


def test_the_wheels_for_trixie_run_on_a_pi_5(loads: Callable[[str, str], None]) -> None:
    loads("arm64-cp313", "cortex-a76")


@pytest.mark.parametrize("target", TARGETS)
def test_a_real_package_is_the_same_twice_and_for_its_board(
    target: str,
    packed: Callable[[str, Path, str], Path],
    build_deb: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A commit between the two would be another time.
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")
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
    assert len(modules) >= 2
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
    look: Any,
) -> None:
    """Ubuntu can't be had here: Debian 13 stands in for it, with that Python put in the place of Ubuntu's."""
    version = build_deb.TARGETS[target].python
    system = copied(
        debian("trixie-amd64", "--variant=minbase", "--include=python3,libstdc++6,systemd,udev", "trixie")
    )
    python = Path(build_deb.interpreter(version))
    told = subprocess.run(
        [python, "-c", "import sys; print(sys.base_prefix)"], capture_output=True, text=True, check=True
    )
    home = Path(told.stdout.strip())
    name = f"python{version}"
    if home == Path("/usr") or not (home / "bin" / name).exists():
        pytest.skip(f"{python} can't be taken elsewhere: it needs a Python in a folder of its own")
    shutil.copy(home / "bin" / name, system.root / "usr/bin" / name)
    shutil.copytree(home / "lib" / name, system.root / "usr/lib" / name, ignore=_left_out)
    for library in (home / "lib").glob(f"lib{name}.so*"):
        shutil.copy(library, system.root / "usr/lib" / library.name, follow_symlinks=False)
    deb = packed(target, tmp_path, "0.1.0")
    shutil.copy(deb, system.root / "root")
    # dpkg does not know of the Python.
    system.run("dpkg", "--force-depends", "-i", f"/root/{deb.name}")
    engines = {engine["name"]: engine for engine in look.described(system)["runtimes"]}
    for engine in look.engines["amd64"]:
        assert engines[engine].get("available"), engines[engine]
    assert engines["tflite"]["interpreter"]["version"].startswith(f"CPython {version}.")
    look.runs_a_model(system, shared_models)
    look.serves(system)
    system.run("dpkg", "-P", "boardbench-agent")
    assert not (system.root / "opt/boardbench").exists() and not (system.root / "var/lib/boardbench").exists()


def _left_out(_folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in ("site-packages", "test", "tests", "__pycache__")}
