"""The program that builds packages, as a module; and Debians in folders, in which they are installed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CACHE = REPOSITORY / ".cache"

# QEMU's name of each architecture, and how its programs begin (binutils, elf.h: class, order, machine).
_EMULATORS = {
    "arm64": ("qemu-aarch64", b"\x02", b"\xb7\x00"),
    "armhf": ("qemu-arm", b"\x01", b"\x28\x00"),
}


@pytest.fixture(scope="session")
def build_deb() -> ModuleType:
    """deploy/build_deb.py."""
    name = "boardbench_build_deb"
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "deploy" / "build_deb.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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

    return make


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


class System:
    """A Debian that commands run in."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *command: str, code: int = 0, **environment: str) -> str:
        """What it says; fails the test unless it ends with this exit code."""
        with self.started(*command, **environment) as process:
            said, complaint = process.communicate()
        assert process.returncode == code, f"{command}: {process.returncode}\n{said}{complaint}"
        return said + complaint

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
            r"(var/(lib/dpkg|log|cache|backups)/|etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$|dev/|proc/|tmp/)"
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
