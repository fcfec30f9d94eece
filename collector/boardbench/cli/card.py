"""A Raspberry Pi's card: what is on it, what it gets, and whether it has it then."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from boardbench.cli import boot_partition, first_boot
from boardbench.cli.errors import CliError, WrongUse
from boardbench.cli.first_boot import Format, Order

if TYPE_CHECKING:
    from boardbench.cli.boot_partition import BootPartition

PYTHONS: Mapping[str, str] = {"bookworm": "cp311", "trixie": "cp313"}
"""Of the systems that the agent is packaged for."""

# The program that the board runs at its start comes last: a card that was pulled out boots as before.
_LAST = "cmdline.txt"
# Kernels of 32 bits, which the system of 64 bits does not have (raspberrypi.com, "Boot folder contents").
_NARROW_KERNELS = ("kernel.img", "kernel7.img", "kernel7l.img")
_NAME_COLUMNS, _SIZE_COLUMNS = 17, 11


@dataclass(frozen=True)
class Card:
    """What is on it."""

    form: Format
    suite: str
    architecture: str
    """Debian's name: "arm64"."""
    released: str
    """The day that its system was made on: "2025-05-13"; empty when it does not tell."""

    @property
    def package(self) -> str:
        """``arm64_cp311``, as in the names of packages."""
        return f"{self.architecture}_{PYTHONS[self.suite]}"


@dataclass(frozen=True)
class Change:
    """What is written and removed to make it what was ordered."""

    files: Mapping[str, bytes]
    """Everything that is to be there."""
    changed: frozenset[str]
    removed: tuple[str, ...]
    secret: frozenset[str]


@contextlib.contextmanager
def opened(place: Path, *, writable: bool) -> Iterator[BootPartition]:
    """The boot partition in a folder, an image or on a disk. Raises CliError."""
    if not place.is_dir():
        with boot_partition.opened(place, writable=writable) as volume:
            yield volume
        return
    folder = Path(boot_partition.folder_of(place))
    for name in boot_partition.MARKS:
        if not (folder / name).is_file():
            raise WrongUse(
                f"{folder} is no boot partition of a Raspberry Pi's system: there is no {name} in it; name "
                "the folder that shows when the card is put in (bootfs)"
            )
    try:
        yield boot_partition.BootFolder(folder)
    except OSError as error:
        raise CliError(
            f"{folder}: {error.strerror or error}; is the card write protected, or gone?"
        ) from error


def look(partition: BootPartition, suite: str | None, form: str | None) -> Card:
    """What it is, where it tells; the rest as given. Raises WrongUse."""
    issue = re.search(rb"(20\d\d-\d\d-\d\d)", _read(partition, "issue.txt") or b"")
    released = issue.group(1).decode() if issue else ""
    found = Format(form) if form else first_boot.detect(lambda path: _read(partition, path))
    narrow = any(partition.exists(name) for name in _NARROW_KERNELS)
    return Card(found, suite or _suite(found, released), "armhf" if narrow else "arm64", released)


def _suite(form: Format, released: str) -> str:
    """The system on the card: pi-gen writes the day that it was made on into issue.txt."""
    if form is Format.CLOUD_INIT:
        # The first with cloud-init was a Trixie of 2025; no Bookworm ever had it.
        return "trixie"
    # Trixie came out on 2025-10-01. Later ones without cloud-init may be either.
    if "2023-10-10" <= released < "2025-10-01":
        return "bookworm"
    raise WrongUse(
        "the card does not say which system it holds: give --os bookworm or --os trixie"
        + (f" (it was made on {released})" if released else "")
    )


def compare(partition: BootPartition, order: Order, form: Format) -> Change:
    """What has to be written to make the card what was ordered. Raises CliError."""
    plan = first_boot.plan(order, form, lambda path: _read(partition, path))
    changed = {path: data for path, data in plan.files.items() if _read(partition, path) != data}
    removed = [path for path in plan.removed if partition.exists(path)]
    if changed or removed:
        removed += [path for path in plan.stale if partition.exists(path)]
    needed = sum(len(data) for data in changed.values())
    # A file that is replaced is there twice for a moment; the rest is what folders and clusters take.
    if needed + 65536 * len(changed) > partition.free_bytes:
        raise CliError(
            f"the boot partition has {partition.free_bytes / 2**20:.0f} MiB free and needs "
            f"{needed / 2**20:.0f} MiB: take away what is not needed there"
        )
    return Change(plan.files, frozenset(changed), tuple(removed), plan.secret)


def write(partition: BootPartition, change: Change) -> None:
    """Makes it so."""
    for path in sorted(change.changed, key=lambda path: (path == _LAST, path)):
        partition.write(path, change.files[path])
    for path in change.removed:
        partition.remove(path)


def verify(partition: BootPartition, change: Change) -> None:
    """Reads everything back. Raises CliError for what is not as it was written."""
    for path, data in change.files.items():
        if _read(partition, path) != data:
            raise CliError(f"{path} reads back as something else: the card is broken; take another one")
    for path in change.removed:
        if partition.exists(path):
            raise CliError(f"{path} is still there: the card is broken; take another one")


def lines(change: Change, *, dry_run: bool) -> Iterator[str]:
    """A line for each file; what would be in it, too, when nothing was written."""
    for path, data in sorted(change.files.items()):
        differs = path in change.changed
        state = "as it is" if not differs else "would be written" if dry_run else "written"
        yield f"{state:<{_NAME_COLUMNS}}{len(data):>{_SIZE_COLUMNS},}  {path}"
        if dry_run and differs:
            yield shown(data, secret=path in change.secret)
    for path in change.removed:
        state = "would be removed" if dry_run else "removed"
        yield f"{state:<{_NAME_COLUMNS + _SIZE_COLUMNS + 2}}{path}"


def shown(data: bytes, *, secret: bool) -> str:
    """A text file as it would be, without what nobody is to read over a shoulder."""
    if b"\0" in data[:4096] or data.startswith(b"!<arch>"):
        return "    (a package)"
    text = data.decode("utf-8", "replace")
    if secret:
        text = re.sub(r'("token": ")[^"]*', r"\1…", text)
        text = re.sub(r"\b[0-9a-f]{64}\b", "…", text)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _read(partition: BootPartition, path: str) -> bytes | None:
    return partition.read(path) if partition.exists(path) else None
