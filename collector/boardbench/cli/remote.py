"""A board that runs already and takes SSH, and the root file system of one that will be written.

SSH is the user's own program, with the user's own keys and settings: no password is taken or kept here.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shlex
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from boardbench.cli import card, first_boot
from boardbench.cli.errors import CliError, Unreachable, WrongUse

_ASK = (
    "dpkg --print-architecture; "
    "python3 -c 'import sys; print(\"%d.%d\" % sys.version_info[:2])'; "
    '. /etc/os-release; echo "$PRETTY_NAME"; uname -n'
)
_SUPPORTED = ("3.10", "3.11", "3.12", "3.13")
_FOLDER = "opt/boardbench-install"
_SSH_FAILED = 255
_INSTALL_SECONDS = 900


@dataclass(frozen=True)
class Target:
    """What runs on the board."""

    architecture: str
    python: str
    system: str
    hostname: str

    @property
    def tag(self) -> str:
        """``cp311``."""
        return f"cp{self.python.replace('.', '')}"


def ask(program: str, host: str) -> Target:
    """What the board is. Raises Unreachable, or CliError where the agent can't run."""
    lines = _ssh(program, host, _ASK).split("\n")
    if len(lines) < 4:
        raise CliError(f"{host} is no Debian or Ubuntu with Python 3, which the agent needs")
    target = Target(*(line.strip() for line in lines[:4]))
    if target.python not in _SUPPORTED:
        why = (
            "Mendel Linux on a Coral Dev Board is at its end, and no engine supports it: put a Debian 12 "
            "on the board, or use a Coral USB stick on another one"
            if "Mendel" in target.system
            else "update its system"
        )
        raise CliError(
            f"{host} runs {target.system} with Python {target.python}; the agent needs {_SUPPORTED[0]} to "
            f"{_SUPPORTED[-1]}: {why}"
        )
    if target.architecture not in ("arm64", "amd64", "armhf"):
        raise CliError(f"{host} is {target.architecture}: there is no package for that")
    return target


def install(program: str, host: str, order: first_boot.Order) -> str:
    """Installs the agent there; what the board said. The token goes through SSH's encrypted pipe only."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as files:
        for name, data in change(order).files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o600
            files.addfile(entry, io.BytesIO(data))
    script = (
        'set -e; d=$(mktemp -d); trap \'rm -rf "$d"\' EXIT; tar -x -C "$d"; '
        "sudo=; [ \"$(id -u)\" = 0 ] || sudo='sudo -n'; "
        'code=0; $sudo sh "$d/install.sh" || code=$?; $sudo cat "$d/install.log"; exit $code'
    )
    return _ssh(program, host, script, data=archive.getvalue(), seconds=_INSTALL_SECONDS)


def python_of(rootfs: Path) -> str:
    """``cp310``: the Python in a root file system. Raises WrongUse."""
    for version in _SUPPORTED:
        if (rootfs / f"usr/bin/python{version}").exists():
            return f"cp{version.replace('.', '')}"
    raise WrongUse(
        f"{rootfs} has none of Python {', '.join(_SUPPORTED)}: name Linux_for_Tegra/rootfs of JetPack 6 or "
        "later, after NVIDIA's apply_binaries.sh"
    )


def put_into(rootfs: Path, order: first_boot.Order, *, dry_run: bool) -> card.Change:
    """Writes what the first boot installs. Raises WrongUse."""
    bundle = change(order)
    files = {f"{_FOLDER}/{name}": data for name, data in bundle.files.items()}
    files["etc/systemd/system/boardbench-install.service"] = _UNIT.encode()
    stale = (f"{_FOLDER}/{_inside(path)}" for path in (*first_boot.MAYBE, first_boot.LOG, first_boot.DONE))
    removed = tuple(path for path in stale if path not in files and (rootfs / path).exists())
    secret = frozenset(f"{_FOLDER}/{name}" for name in bundle.secret)
    done = card.Change(files, frozenset(files), removed, secret)
    if dry_run:
        return done
    try:
        for path, data in files.items():
            place = _within(rootfs, path)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.touch(mode=0o600 if path in secret else 0o644)
            place.write_bytes(data)
        for path in removed:
            _within(rootfs, path).unlink()
        # Itself it leads to where the unit will be.
        wanted = _within(rootfs, "etc/systemd/system/multi-user.target.wants")
        wanted.mkdir(parents=True, exist_ok=True)
        link = wanted / "boardbench-install.service"
        link.unlink(missing_ok=True)
        link.symlink_to("/etc/systemd/system/boardbench-install.service")
    except PermissionError as error:
        raise WrongUse(f"{error.filename}: {error.strerror}; NVIDIA's files are root's: use sudo") from error
    for path, data in files.items():
        if (rootfs / path).read_bytes() != data:
            raise CliError(f"{rootfs / path} reads back as something else: is the disk full, or broken?")
    return done


def _within(rootfs: Path, path: str) -> Path:
    place = rootfs / path
    # A link in that system may lead out of the folder, into this computer's own.
    if not place.resolve().is_relative_to(rootfs.resolve()):
        raise WrongUse(f"{place} leads out of {rootfs}")
    return place


def change(order: first_boot.Order) -> card.Change:
    """The same as on a Raspberry Pi's card, in one folder, which is new."""
    files = {_inside(path): data for path, data in first_boot.bundle(order).items()}
    return card.Change(files, frozenset(files), (), frozenset((_inside(first_boot.ENROLMENT),)))


def _inside(path: str) -> str:
    return path.removeprefix(f"{first_boot.FOLDER}/")


_UNIT = f"""\
[Unit]
Description=Installs the agent of boardbench once
ConditionPathExists=!/{_FOLDER}/installed
After=local-fs.target

[Service]
Type=oneshot
ExecStart=/bin/sh /{_FOLDER}/install.sh

[Install]
WantedBy=multi-user.target
"""


def _ssh(program: str, host: str, script: str, *, data: bytes = b"", seconds: float = 60) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.@:%\[\]-]+", host) or host.startswith("-"):
        raise WrongUse(f"{host!r} is no [USER@]HOST")
    # The script as one word that no shell on the way takes apart.
    packed = base64.b64encode(script.encode()).decode()
    command = f'sh -c "$(echo {packed} | base64 -d)"'
    try:
        done = subprocess.run(
            # A program of Windows is named with backslashes.
            [*shlex.split(program, posix=os.name != "nt"), "-o", "ConnectTimeout=15", host, command],
            input=data,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        raise WrongUse(f"there is no program {program!r}: install OpenSSH's client") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{host} was not done after {seconds:.0f} s") from None
    said = done.stdout.decode("utf-8", "replace").strip()
    complaint = done.stderr.decode("utf-8", "replace").strip()
    if done.returncode == _SSH_FAILED:
        raise Unreachable(f"{host} can't be reached over SSH: {complaint or 'no reason given'}")
    if done.returncode:
        hint = ""
        if "sudo" in complaint:
            hint = "\nsudo asks for a password there: log in as root, or allow it without (visudo)"
        raise CliError(f"{host} failed ({done.returncode}):\n{said}\n{complaint}{hint}".rstrip())
    return said
