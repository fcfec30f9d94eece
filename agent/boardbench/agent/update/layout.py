"""Where releases, packages and the journal of an update lie, and what stands in the journal.

opt/boardbench/releases/RELEASE/      releases, side by side
opt/boardbench/current                link to the one that runs
opt/boardbench/update/journal.json    how far the update is: root writes it, everybody reads it
opt/boardbench/update/package         the package as root has taken it, where the agent can't change it
etc/boardbench/update.pub             whose signatures are trusted
DATA/update/request.json              what the agent asks for; the agent's own folder, as the next ones
DATA/update/SHA256.deb                the package as it was fetched
DATA/update/healthy.json              the new release says that it works
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from boardbench.inspect.errors import InspectError
from boardbench.inspect.release import Manifest, order, read_keys

ACCEPTED = "accepted"
UNPACKED = "unpacked"
SWITCHED = "switched"
GOING_BACK = "going_back"
DONE = "done"
ROLLED_BACK = "rolled_back"
FAILED = "failed"
FINAL = (DONE, ROLLED_BACK, FAILED)

_MAX_FILE_BYTES = 64 * 1024


class Refused(Exception):
    """The release is not taken; the message says why."""


@dataclass(frozen=True)
class Layout:
    """The places, below a folder that is / on a board."""

    root: Path
    data_dir: Path

    @property
    def prefix(self) -> Path:
        """Folder of everything that root has."""
        return self.root / "opt/boardbench"

    @property
    def releases(self) -> Path:
        """Folder of the releases."""
        return self.prefix / "releases"

    @property
    def current(self) -> Path:
        """Link to the release that runs."""
        return self.prefix / "current"

    @property
    def work(self) -> Path:
        """Folder of the update."""
        return self.prefix / "update"

    @property
    def journal(self) -> Path:
        """How far the update is."""
        return self.work / "journal.json"

    @property
    def keys(self) -> Path:
        """Whose signatures are trusted."""
        return self.root / "etc/boardbench/update.pub"

    @property
    def inbox(self) -> Path:
        """The agent's side of it."""
        return self.data_dir / "update"


@dataclass(frozen=True)
class Entry:
    """What the journal holds: one update."""

    update_id: str
    sha256: str = ""
    state: str = ACCEPTED
    reason: str = ""
    from_release: str = ""
    to_release: str = ""
    # What the new release has to say back, so that no older word of it counts.
    token: str = ""
    # How often the new release was started.
    tries: int = 0

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens with it."""
        return self.state in FINAL

    def at(self, state: str, reason: str = "") -> Entry:
        """The same update, further on."""
        return replace(self, state=state, reason=reason or self.reason)


def read_entry(layout: Layout) -> Entry | None:
    """What the journal holds; None when there was no update, or it can't be read."""
    told = read_object(layout.journal)
    known = {field.name: field.type for field in fields(Entry)}
    try:
        return Entry(**{name: value for name, value in told.items() if name in known}) if told else None
    except TypeError:
        return None


def write_entry(layout: Layout, entry: Entry) -> None:
    """The journal holds it from now on, also after a power cut."""
    replace_file(layout.journal, json.dumps(asdict(entry)).encode() + b"\n", 0o644)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file; empty when there is none that can be read. Follows no link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return {}
    try:
        told = json.loads(os.read(descriptor, _MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    finally:
        os.close(descriptor)
    return told if isinstance(told, dict) else {}


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """The file holds ``data``, or after a power cut what it held before, and never anything between."""
    fresh = path.with_name(path.name + ".tmp")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        # Whatever the umask is: the agent reads root's journal.
        os.fchmod(descriptor, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Names in the folder last from now on."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def running_release(layout: Layout) -> str:
    """Name of the release that `current` leads to. Raises Refused."""
    try:
        target = layout.current.readlink()
    except OSError as error:
        raise Refused(f"{layout.current} is no link to a release: {error.strerror}") from error
    name = target.name
    if not name or (layout.prefix / target).parent != layout.releases:
        raise Refused(f"{layout.current} leads to {target}, which is no release")
    return name


def trusted_keys(layout: Layout) -> tuple[bytes, ...]:
    """Whose signatures are trusted. Raises Refused when there are none."""
    try:
        found = tuple(read_keys(layout.keys.read_text()))
    except FileNotFoundError:
        found = ()
    except (OSError, UnicodeDecodeError, InspectError) as error:
        raise Refused(f"{layout.keys}: {error}") from error
    if not found:
        raise Refused(
            "the board trusts no signature: put the public key of `boardbench release keygen` into "
            f"{layout.keys}"
        )
    return found


def check(manifest: Manifest, running: Mapping[str, Any]) -> None:
    """Returns when a board with the ``running`` release (its release.json) can take it; Refused if not."""
    here = str(running.get("architecture", ""))
    if manifest.architecture != here:
        raise Refused(f"the package is for {manifest.architecture}, and this board is {here or 'unknown'}")
    python = str(running.get("python", ""))
    if manifest.python != python:
        raise Refused(
            f"the package is for Python {manifest.python or 'unknown'}, and this board has "
            f"{python or 'unknown'}"
        )
    try:
        later = order(manifest.version) >= order(str(running.get("version", "")))
    except ValueError as error:
        raise Refused(f"the versions can't be compared: {error}") from error
    if not later and not manifest.downgrade:
        raise Refused(
            f"{manifest.version} is older than {running.get('version')}, which runs: to go back, sign it "
            "with --downgrade"
        )
