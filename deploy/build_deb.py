"""Builds the agent's Debian packages, byte for byte the same from the same sources: build_deb.py [TARGET …].

A package holds one release of the agent as a virtual environment under /opt/boardbench/releases/VERSION, with
every wheel that it needs: nothing is fetched on the board. Which wheels these are is in locks/TARGET.txt,
with their hashes; ``--lock`` writes these files anew. The environment sees the system's own packages, behind
its own, because a Jetson's TensorRT and the numpy of 32-bit Raspberry Pi OS are there.

Needs for each target the Python that its board has (the wheels' modules are compiled with it) and pip;
nothing of Debian's tools, so a package can be built wherever Python runs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parent.parent
DEPLOY = REPOSITORY / "deploy"
PACKAGE = "boardbench-agent"
PREFIX = PurePosixPath("opt/boardbench")

# What the agent's part of the distribution needs; the laptop's click and rich are not loaded on a board.
_REQUIREMENTS = (
    "grpcio>=1.74",
    "protobuf>=6.31",
    "grpcio-health-checking>=1.74",
    "grpcio-reflection>=1.74",
    "psutil>=5.9",
    "ai-edge-litert>=1.4",
    "onnxruntime>=1.20",
    "numpy>=1.26",
    "typing-extensions",
)
# 32-bit: no LiteRT, no ONNX Runtime, and numpy and psutil are Debian's, because PyPI has no wheels of them.
_REQUIREMENTS_ARMHF = (
    "grpcio>=1.74",
    "protobuf>=6.31",
    "grpcio-health-checking>=1.74",
    "grpcio-reflection>=1.74",
    "tflite-runtime>=2.13",
    "typing-extensions",
)
# A third of the files, which a board would unpack for nothing: other programs' tests, and types for checkers.
_UNUSED = re.compile(r"^numpy/.*tests/|\.pyi$")
_SOURCES = (
    "agent/boardbench/agent",
    "agent/boardbench/inspect",
    "protos/gen/boardbench/v1",
)


@dataclass(frozen=True)
class Target:
    """Boards that one package is for."""

    architecture: str
    """Debian's name of it."""
    machine: str
    """The wheels' name of it."""
    python: str
    glibc_minor: int
    """Of the oldest system with this Python: wheels for a newer one are not taken."""
    system: str
    depends: tuple[str, ...] = ()
    requirements: tuple[str, ...] = _REQUIREMENTS
    complete: bool = True
    """Whether the wheels include all that they need; else the rest is Debian's."""

    @property
    def name(self) -> str:
        """``arm64-cp311``."""
        return f"{self.architecture}-cp{self.python.replace('.', '')}"

    @property
    def tag(self) -> str:
        """``cp311``."""
        return f"cp{self.python.replace('.', '')}"

    @property
    def lock(self) -> Path:
        """The wheels, with their hashes."""
        return DEPLOY / "locks" / f"{self.name}.txt"

    @property
    def platforms(self) -> tuple[str, ...]:
        """Tags of platforms whose wheels run there, the best first (PEP 600)."""
        new = tuple(f"manylinux_2_{minor}_{self.machine}" for minor in range(self.glibc_minor, 16, -1))
        return (*new, f"manylinux2014_{self.machine}", f"linux_{self.machine}")


_SYSTEMS = (
    ("3.10", 35, "Ubuntu 22.04, JetPack 6"),
    ("3.11", 36, "Debian 12, Raspberry Pi OS Bookworm"),
    ("3.12", 39, "Ubuntu 24.04, JetPack 7"),
    ("3.13", 41, "Debian 13, Raspberry Pi OS Trixie"),
)
TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        *(Target("arm64", "aarch64", python, glibc, system) for python, glibc, system in _SYSTEMS),
        *(Target("amd64", "x86_64", python, glibc, system) for python, glibc, system in _SYSTEMS),
        Target(
            "armhf",
            "armv7l",
            "3.11",
            36,
            "Raspberry Pi OS Bookworm, 32-bit",
            depends=("python3-numpy", "python3-psutil"),
            requirements=_REQUIREMENTS_ARMHF,
            complete=False,
        ),
    )
}


class BuildError(Exception):
    """The package can't be built; the message says why and what to do."""


def main() -> int:
    """Builds what is asked for; exit code 1 when it can't be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (all)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "dist", help="folder of the packages (dist)")
    parser.add_argument(
        "--wheels", type=Path, default=REPOSITORY / ".cache" / "wheels", help="folder of the wheels"
    )
    parser.add_argument("--lock", action="store_true", help="write deploy/locks anew, and build nothing")
    parser.add_argument("--version", default="", help="version of the release (that of pyproject.toml)")
    parser.add_argument(
        "--fast", action="store_true", help="compress little: for tests; the bytes differ from a release's"
    )
    options = parser.parse_args()
    try:
        for name in options.targets or TARGETS:
            if name not in TARGETS:
                raise BuildError(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
            if options.lock:
                print(write_lock(TARGETS[name]))
            else:
                print(
                    build(
                        TARGETS[name],
                        options.out,
                        wheels=options.wheels,
                        version=options.version,
                        preset=0 if options.fast else 6,
                    )
                )
    except BuildError as error:
        print(f"build_deb: {error}", file=sys.stderr)
        return 1
    return 0


def build(target: Target, out: Path, *, wheels: Path, version: str = "", preset: int = 6) -> Path:
    """The package for the target, written into ``out``. Raises BuildError."""
    version = version or project_version()
    release = f"{version}+{target.tag}"
    epoch = source_epoch()
    python = interpreter(target.python)
    with tempfile.TemporaryDirectory(prefix="boardbench-deb-") as scratch:
        tree = Path(scratch) / "tree"
        home = tree / PREFIX / "releases" / release
        site = home / "lib" / f"python{target.python}" / "site-packages"
        site.mkdir(parents=True)
        for wheel in download(target, python, wheels):
            unpack(wheel, site)
        _add_sources(site, version)
        _add_environment(home, release, target, version)
        _compile(python, site, PurePosixPath("/") / site.relative_to(tree))
        _add_system_files(tree, target)
        content = _archive(_entries(tree), epoch)
        control = _archive(_control(tree, target, release), epoch)
    deb = out / f"{PACKAGE}_{version}_{target.architecture}_{target.tag}.deb"
    out.mkdir(parents=True, exist_ok=True)
    fresh = deb.with_suffix(".part")
    fresh.write_bytes(
        _ar(
            (
                ("debian-binary", b"2.0\n"),
                _compressed("control.tar", control, preset),
                _compressed("data.tar", content, preset),
            ),
            epoch,
        )
    )
    fresh.replace(deb)
    return deb


def project_version() -> str:
    """Version in pyproject.toml."""
    found = re.search(r'^version = "([^"]+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    if found is None:
        raise BuildError(f"{REPOSITORY / 'pyproject.toml'} names no version")
    return found.group(1)


def source_epoch() -> int:
    """Time that every file in the package has: SOURCE_DATE_EPOCH, else that of the last commit."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given:
        if not given.isascii() or not given.isdigit():
            raise BuildError(f"SOURCE_DATE_EPOCH is {given!r}; it must be seconds since 1970")
        return int(given)
    try:
        said = subprocess.run(
            ["git", "-C", REPOSITORY, "log", "-1", "--format=%ct"], check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError("this is no git checkout: set SOURCE_DATE_EPOCH to the release's time") from error
    return int(said)


def interpreter(version: str) -> str:
    """A Python of this version. Raises BuildError where there is none."""
    candidates = [f"python{version}"]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")), reverse=True)
    for candidate in candidates:
        path = shutil.which(candidate)
        # A version manager's shim can be there and refuse to run.
        if path and subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode == 0:
            return path
    raise BuildError(f"no python{version} here: the board's own version compiles its modules; install it")


# Wheels.


def write_lock(target: Target) -> Path:
    """Asks pip which wheels are the newest that run there, and writes them down. Raises BuildError."""
    python = interpreter(target.python)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        _pip(
            python,
            [
                "install",
                "--dry-run",
                "--ignore-installed",
                f"--report={report}",
                f"--target={scratch}/none",
                *_wheel_options(target),
                *([] if target.complete else ["--no-deps"]),
                *target.requirements,
                *(["tomli>=2"] if target.python == "3.10" else []),
            ],
        )
        found = json.loads(report.read_text())["install"]
    lines = [
        f"# {target.name}: {target.system}. Written by deploy/build_deb.py --lock {target.name}",
    ]
    for entry in sorted(found, key=lambda entry: entry["metadata"]["name"].lower()):
        metadata, source = entry["metadata"], entry["download_info"]
        digest = source["archive_info"]["hashes"]["sha256"]
        lines.append(
            f"{metadata['name'].lower().replace('_', '-')}=={metadata['version']} --hash=sha256:{digest}"
        )
    target.lock.write_text("\n".join(lines) + "\n")
    return target.lock


def download(target: Target, python: str, folder: Path) -> list[Path]:
    """The wheels of the lock, in the order of the lock; fetched unless they are there. Raises BuildError."""
    wanted = pinned(target)
    folder.mkdir(parents=True, exist_ok=True)
    here = {_sha256(path): path for path in folder.glob("*.whl")}
    if any(digest not in here for _, digest in wanted):
        _pip(
            python,
            [
                "download",
                "--no-deps",
                "--require-hashes",
                f"--dest={folder}",
                *_wheel_options(target),
                f"--requirement={target.lock}",
            ],
        )
        here = {_sha256(path): path for path in folder.glob("*.whl")}
    return [here[digest] for _, digest in wanted]


def pinned(target: Target) -> list[tuple[str, str]]:
    """Name and SHA-256 of each wheel in the target's lock. Raises BuildError."""
    found = re.findall(r"^(\S+)==\S+ --hash=sha256:([0-9a-f]{64})$", target.lock.read_text(), re.MULTILINE)
    if not found:
        raise BuildError(f"{target.lock} pins nothing; write it with --lock {target.name}")
    return found


def _wheel_options(target: Target) -> list[str]:
    abis = (target.tag, "abi3", "none")
    return [
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={target.python}",
        *(f"--abi={abi}" for abi in abis),
        *(f"--platform={platform}" for platform in target.platforms),
    ]


def _pip(python: str, arguments: Sequence[str]) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"pip under {python} failed: {done.stderr.strip()[-2000:]}")


def unpack(wheel: Path, site: Path) -> None:
    """Unpacks a wheel as the binary distribution format has it (PEP 427), without its scripts."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
            name = entry.filename
            if name.endswith("/") or _UNUSED.search(name):
                continue
            folder, _, rest = name.partition("/")
            if folder.endswith(".data"):
                scheme, _, name = rest.partition("/")
                if scheme not in ("purelib", "platlib"):
                    # Programs, manual pages and headers, which nothing on a board uses.
                    continue
            place = site / name
            if not place.resolve().is_relative_to(site.resolve()):
                raise BuildError(f"{wheel.name} holds {entry.filename!r}, which leads out of it")
            if place.exists():
                raise BuildError(f"{wheel.name} brings {name}, and so does another wheel")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(archive.read(entry))


def _add_sources(site: Path, version: str) -> None:
    for source in _SOURCES:
        folder = REPOSITORY / source
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".pyi"):
                place = site / "boardbench" / folder.name / path.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
    information = site / f"boardbench-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: boardbench\nVersion: {version}\n")
    (information / "INSTALLER").write_text("dpkg\n")


def _add_environment(home: Path, release: str, target: Target, version: str) -> None:
    """What makes a virtual environment of the folder (PEP 405), and the program in it."""
    place = PurePosixPath("/") / PREFIX / "releases" / release
    (home / "bin").mkdir()
    (home / "bin" / "python").symlink_to(f"/usr/bin/python{target.python}")
    (home / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = true\nversion = {target.python}\n"
    )
    program = home / "bin" / PACKAGE
    # By the release's own name, and not by way of `current`: after an update a run that goes on must find the
    # modules that it began with.
    program.write_text(
        f"#!{place}/bin/python -IB\n"
        "import sys\n\n"
        "from boardbench.agent.cli import main\n\n"
        'if __name__ == "__main__":\n'
        "    sys.exit(main())\n"
    )
    program.chmod(0o755)
    (home / "release.json").write_text(
        json.dumps(
            {
                "version": version,
                "release": release,
                "architecture": target.architecture,
                "python": target.python,
                "lock_sha256": _sha256(target.lock),
                # What `probe` does not tell anybody to install.
                "wheels": sorted(name for name, _ in pinned(target)),
            },
            indent=2,
        )
        + "\n"
    )


# Compiled by one process in a fixed order, with nothing in it that differs between two: the bytes of a .pyc
# depend on which objects the compiler shares.
_COMPILE = """
import os, py_compile, sys
if sys.version_info < (3, 11):
    # It writes a set down in the order of hashes, and that of None is its place in memory: the same each time
    # from here on (personality(2), ADDR_NO_RANDOMIZE), where the system allows it.
    import ctypes
    personality = ctypes.CDLL(None).personality
    now = personality(0xFFFFFFFF)
    if now >= 0 and not now & 0x0040000 and personality(now | 0x0040000) >= 0:
        os.execv(sys.executable, sys.orig_argv)
site, place = sys.argv[1:]
for folder, folders, files in os.walk(site):
    folders.sort()
    for name in sorted(files):
        if name.endswith(".py"):
            path = os.path.join(folder, name)
            try:
                py_compile.compile(
                    path, dfile=os.path.join(place, os.path.relpath(path, site)), doraise=True,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )
            except py_compile.PyCompileError:
                # Templates, and modules for another version of Python, which nobody imports.
                pass
"""


def _compile(python: str, site: Path, place: PurePosixPath) -> None:
    done = subprocess.run(
        # Not -I, which leaves PYTHONHASHSEED unread: Python 3.10 writes sets down in the order of hashes.
        [python, "-s", "-S", "-W", "ignore", "-c", _COMPILE, str(site), str(place)],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        env={"PYTHONHASHSEED": "0", "PATH": os.environ.get("PATH", "")},
    )
    if done.returncode:
        raise BuildError(f"{python} could not compile the modules: {done.stderr.strip()[-2000:]}")


# The package.


def _add_system_files(tree: Path, target: Target) -> None:
    files = (
        ("systemd/boardbench-agent.service", "usr/lib/systemd/system/boardbench-agent.service"),
        ("systemd/boardbench-update.service", "usr/lib/systemd/system/boardbench-update.service"),
        ("systemd/boardbench-update.path", "usr/lib/systemd/system/boardbench-update.path"),
        ("udev/60-boardbench.rules", "usr/lib/udev/rules.d/60-boardbench.rules"),
        ("debian/agent.toml", "etc/boardbench/agent.toml"),
        ("debian/README.md", f"usr/share/doc/{PACKAGE}/README.md"),
        ("../LICENSE", f"usr/share/doc/{PACKAGE}/copyright"),
    )
    for source, place in files:
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(DEPLOY / source, tree / place)
    _add_updater(tree, target)
    (tree / "etc/boardbench/agent.d").mkdir()
    (tree / "usr/bin").mkdir()
    (tree / "usr/bin" / PACKAGE).symlink_to(f"/{PREFIX}/current/bin/{PACKAGE}")


# What brings releases into place as root: of the system and not of a release, so that none that is broken
# takes it along. Needs nothing but Python.
_UPDATER = (
    "agent/__init__.py",
    "agent/update/__init__.py",
    "agent/update/layout.py",
    "agent/update/switch.py",
    "inspect/__init__.py",
    "inspect/ed25519.py",
    "inspect/errors.py",
    "inspect/release.py",
)


def _add_updater(tree: Path, target: Target) -> None:
    home = tree / "usr/lib/boardbench"
    for name in _UPDATER:
        (home / "boardbench" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / "agent/boardbench" / name, home / "boardbench" / name)
    (home / "bin").mkdir()
    (home / "bin" / "python").symlink_to(f"/usr/bin/python{target.python}")
    (home / "bin" / "boardbench-update").write_text(
        "import os, sys\n\n"
        "sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))\n"
        "from boardbench.agent.update.switch import main\n\n"
        "sys.exit(main())\n"
    )


def _control(tree: Path, target: Target, release: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    depends = (
        f"python{target.python}",
        f"libc6 (>= 2.{target.glibc_minor})",
        "libstdc++6",
        "passwd",
        *target.depends,
    )
    control = (
        f"Package: {PACKAGE}\n"
        f"Version: {release}\n"
        f"Architecture: {target.architecture}\n"
        "Maintainer: boardbench <noreply@boardbench.invalid>\n"
        f"Installed-Size: {(size + 1023) // 1024}\n"
        f"Depends: {', '.join(depends)}\n"
        "Recommends: systemd, udev\n"
        "Section: science\n"
        "Priority: optional\n"
        "Description: runs ML models on this board and measures them\n"
        f" The agent of boardbench for {target.system},\n"
        " with the engines that it brings along.\n"
    )
    sums = "".join(
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(tree)}\n"
        for path in sorted(tree.rglob("*"))
        if path.is_file() and not path.is_symlink() and not str(path.relative_to(tree)).startswith("etc/")
    )
    yield _entry("./", 0o755, kind=tarfile.DIRTYPE), b""
    yield _file("./conffiles", b"/etc/boardbench/agent.toml\n")
    yield _file("./control", control.encode())
    yield _file("./md5sums", sums.encode())
    for name in ("postinst", "postrm", "prerm"):
        script = (DEPLOY / "debian" / name).read_text().replace("@VERSION@", release)
        yield _file(f"./{name}", script.encode(), 0o755)


def _entries(tree: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Everything below the tree, by name; modes are those of a system file, whatever the umask was."""
    yield _entry("./", 0o755, kind=tarfile.DIRTYPE), b""
    for path in sorted(tree.rglob("*"), key=lambda path: path.relative_to(tree).parts):
        name = f"./{path.relative_to(tree)}"
        if path.is_symlink():
            entry = _entry(name, 0o777, kind=tarfile.SYMTYPE)
            entry.linkname = str(path.readlink())
            yield entry, b""
        elif path.is_dir():
            yield _entry(f"{name}/", 0o755, kind=tarfile.DIRTYPE), b""
        else:
            yield _file(name, path.read_bytes(), 0o755 if path.parent.name == "bin" else 0o644)


def _entry(name: str, mode: int, *, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.mode, entry.type, entry.uname, entry.gname = mode, kind, "root", "root"
    return entry


def _file(name: str, content: bytes, mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    entry = _entry(name, mode)
    entry.size = len(content)
    return entry, content


def _archive(entries: Iterator[tuple[tarfile.TarInfo, bytes]], epoch: int) -> bytes:
    whole = io.BytesIO()
    # dpkg reads GNU's format, and not pax's.
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for entry, content in entries:
            entry.mtime = epoch
            archive.addfile(entry, io.BytesIO(content))
    return whole.getvalue()


def _compressed(name: str, data: bytes, preset: int) -> tuple[str, bytes]:
    """A member of the package. The least is gzip's: xz takes an emulated processor six times as long."""
    if preset:
        return f"{name}.xz", lzma.compress(data, preset=preset)
    return f"{name}.gz", gzip.compress(data, compresslevel=1, mtime=0)


def _ar(members: Sequence[tuple[str, bytes]], epoch: int) -> bytes:
    """The archive that a .deb is (deb(5), ar(5))."""
    whole = bytearray(b"!<arch>\n")
    for name, content in members:
        whole += f"{name:<16}{epoch:<12}{0:<6}{0:<6}{0o100644:<8o}{len(content):<10}`\n".encode()
        whole += content + b"\n" * (len(content) % 2)
    return bytes(whole)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
