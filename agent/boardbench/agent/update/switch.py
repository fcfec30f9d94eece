"""Brings a release into place as root, and back out again when it does not work: boardbench-update.

Started when the agent leaves a request, and at every boot. The journal says how far it is; each step can be
cut off at any moment and is then done again:

    accepted     the package is copied, verified, unpacked beside the others and synced
    unpacked     `current` is renamed to lead to it
    switched     the agent is started again; it has to say that it works, with the journal's token
    going_back   `current` is renamed to lead to the old one, which is started again
    done, rolled_back, failed

Whatever lies in the agent's folder is not trusted: only a package that is signed gets anywhere, and it is
verified after it was copied to where the agent can't write. This program belongs to the system and not to a
release, so that none that is broken can take it along.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from boardbench.agent.update import layout as places
from boardbench.agent.update.layout import Entry, Layout, Refused
from boardbench.inspect import release
from boardbench.inspect.errors import InspectError

_RESTART = "systemctl restart boardbench-agent.service"
# Restarted too often within minutes, a unit is not started any more.
_RESET = "systemctl reset-failed boardbench-agent.service"
# The stop of a run, the start of Python and engines on a slow card.
_RESTART_SECONDS = 300.0
# A slow board asks its engines for minutes before it greets its collector, which may be starting, too.
_HEALTH_SECONDS = 300.0
# A release that takes the power away, or the kernel along, gets one more chance and no third.
_TRIES = 2
_LOOK_SECONDS = 0.2
_BLOCK_BYTES = 1 << 20
_SPARE_BYTES = 64 * 1024 * 1024
_COMING = ".coming-"
# In releases that this program has unpacked: those of the Debian package are dpkg's.
_MARK = ".updated"


class Switch:
    """One board's updates."""

    def __init__(
        self,
        layout: Layout,
        restart: Callable[[], str],
        *,
        health_seconds: float = _HEALTH_SECONDS,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``restart`` starts the agent again and returns why it could not, else nothing."""
        self._layout = layout
        self._restart = restart
        self._health_seconds = health_seconds
        self._say = say

    def run(self) -> Entry | None:
        """Does what is to be done, to its end; what the journal holds then. Raises OSError."""
        work = self._layout.work
        if not work.is_dir():
            work.mkdir(mode=0o755)
            places.sync_folder(work.parent)
        while True:
            entry = places.read_entry(self._layout)
            if entry is None or entry.is_final:
                # A cut may have come before it.
                self._clean(entry)
                asked = self._asked(entry)
                if asked is None:
                    return entry
                entry = asked
                self._note(entry)
            while not entry.is_final:
                entry = self._step(entry)
                self._note(entry)

    def _asked(self, last: Entry | None) -> Entry | None:
        told = places.read_object(self._layout.inbox / "request.json")
        update_id, sha256 = told.get("update_id"), told.get("sha256")
        if not (isinstance(update_id, str) and update_id and isinstance(sha256, str)):
            return None
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            return None
        if last is not None and last.update_id == update_id[:200]:
            return None
        return Entry(update_id[:200], sha256)

    def _note(self, entry: Entry) -> None:
        places.write_entry(self._layout, entry)
        why = f": {entry.reason}" if entry.reason else ""
        self._say(f"update {entry.update_id[:12]}: {entry.state} {entry.to_release}{why}")

    def _step(self, entry: Entry) -> Entry:
        if entry.state == places.ACCEPTED:
            try:
                return self._unpack(entry)
            except (Refused, InspectError) as error:
                return entry.at(places.FAILED, str(error))
            except OSError as error:
                return entry.at(places.FAILED, f"it could not be unpacked: {error.strerror or error}")
            except Exception as error:  # nothing has changed yet, and at every boot it would fail again
                return entry.at(places.FAILED, f"it could not be unpacked ({type(error).__name__}: {error})")
        if entry.state == places.UNPACKED:
            self._lead_to(entry.to_release)
            return entry.at(places.SWITCHED)
        if entry.state == places.SWITCHED:
            return self._try(entry)
        self._lead_to(entry.from_release)
        problem = self._restart()
        more = f"; and the old release did not start again: {problem}" if problem else ""
        return entry.at(places.ROLLED_BACK, entry.reason + more)

    # The package.

    def _unpack(self, entry: Entry) -> Entry:
        old = places.running_release(self._layout)
        running = places.read_object(self._layout.releases / old / "release.json")
        package = self._layout.work / "package"
        self._copy(self._layout.inbox / f"{entry.sha256}.deb", package)
        with package.open("rb") as file:
            manifest = release.verify(file, places.trusted_keys(self._layout))
            places.check(manifest, running)
            if manifest.release == old:
                raise Refused(f"release {old} runs already")
            entry = replace(entry, from_release=old, to_release=manifest.release)
            status = os.statvfs(self._layout.releases)
            if status.f_bavail * status.f_frsize < manifest.installed_bytes + _SPARE_BYTES:
                raise Refused(
                    f"release {manifest.release} needs {manifest.installed_bytes / 1e6:.0f} MB in "
                    f"{self._layout.releases}, and there is not so much: make room"
                )
            place = self._layout.releases / manifest.release
            coming = place.with_name(f"{_COMING}{manifest.release}")
            # One that was tried before and may be damaged; never the one that runs.
            self._remove(place)
            self._remove(coming)
            self._take_out(file, manifest.release, coming)
        # All of it at once: an fsync for each of thousands of files takes a card minutes.
        os.sync()
        coming.rename(place)
        places.sync_folder(self._layout.releases)
        package.unlink()
        return entry.at(places.UNPACKED)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        """Copies what can only be a plain file, wherever a link might lead."""
        try:
            descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise Refused(f"the package is not there: {error.strerror}") from error
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Refused("the package is no file")
            with target.open("wb") as copy:
                while block := file.read(_BLOCK_BYTES):
                    copy.write(block)

    def _take_out(self, file: BinaryIO, name: str, coming: Path) -> None:
        begin = f"opt/boardbench/releases/{name}/"
        coming.mkdir(mode=0o755)
        found = False
        for entry, data in release.content(file):
            path = entry.name.removeprefix("./")
            if not path.startswith(begin) or path == begin:
                continue
            inside = path[len(begin) :].rstrip("/")
            parts = inside.split("/")
            if ".." in parts or "" in parts or inside == _MARK:
                raise Refused(f"the package holds {path!r}, which leads elsewhere")
            place = coming / inside
            if place.parent.resolve() != coming.resolve() / Path(inside).parent:
                raise Refused(f"the package holds {path!r} behind a link")
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            if entry.isdir():
                place.mkdir(mode=0o755, exist_ok=True)
            elif entry.issym():
                place.symlink_to(entry.linkname)
            elif data is not None:
                found = True
                with place.open("xb") as copy:
                    while block := data.read(_BLOCK_BYTES):
                        copy.write(block)
                place.chmod(0o755 if entry.mode & 0o100 else 0o644)
        if not found:
            raise Refused(f"the package holds no release {name}")
        (coming / _MARK).touch()

    # The switch.

    def _lead_to(self, name: str) -> None:
        """`current` leads to the release; at every moment it leads to one."""
        fresh = self._layout.prefix / "current.new"
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        fresh.symlink_to(f"releases/{name}")
        fresh.replace(self._layout.current)
        places.sync_folder(self._layout.prefix)

    def _try(self, entry: Entry) -> Entry:
        if entry.tries >= _TRIES:
            return entry.at(
                places.GOING_BACK, f"the board went down {entry.tries} times before it was healthy"
            )
        # Written before: a release that takes the board down would be tried for ever otherwise.
        entry = replace(entry, tries=entry.tries + 1, token=secrets.token_hex(16))
        self._note(entry)
        problem = self._restart()
        if problem:
            return entry.at(places.GOING_BACK, f"it did not start: {problem}")
        deadline = time.monotonic() + self._health_seconds
        why = "it said nothing"
        while time.monotonic() < deadline:
            told = places.read_object(self._layout.inbox / "healthy.json")
            if told.get("token") == entry.token and told.get("release") == entry.to_release:
                if told.get("healthy") is True:
                    return entry.at(places.DONE)
                why = str(told.get("reason") or why)[:500]
            time.sleep(min(_LOOK_SECONDS, self._health_seconds / 10))
        return entry.at(places.GOING_BACK, f"it was not healthy within {self._health_seconds:.0f} s: {why}")

    def _clean(self, entry: Entry | None) -> None:
        """Removes what ended updates have left: neither what runs, nor what ran before, nor dpkg's."""
        with contextlib.suppress(FileNotFoundError):
            (self._layout.work / "package").unlink()
        try:
            kept = {places.running_release(self._layout)}
        except Refused:
            return
        if entry is not None and entry.state == places.DONE:
            kept.add(entry.from_release)
        # One that failed has changed nothing: what ran before the good one is still what to go back to.
        changed = entry is None or entry.state != places.FAILED
        for path in list(self._layout.releases.iterdir()):
            old = changed and (path / _MARK).exists() and path.name not in kept
            if old or path.name.startswith(_COMING):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Removes a folder and all that is in it; what is half removed has a name that says so."""
        if not path.is_dir():
            return
        if not path.name.startswith(_COMING):
            going = path.with_name(f"{_COMING}{path.name}")
            self._remove(going)
            path.rename(going)
            places.sync_folder(path.parent)
            path = going
        for folder, folders, files in os.walk(path, topdown=False):
            for name in (*files, *folders):
                inside = Path(folder, name)
                if name in folders and not inside.is_symlink():
                    inside.rmdir()
                else:
                    inside.unlink()
        path.rmdir()


def _restarting(command: str) -> Callable[[], str]:
    def call(words: str) -> str:
        try:
            done = subprocess.run(
                shlex.split(words), check=False, capture_output=True, text=True, timeout=_RESTART_SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"{words} took more than {_RESTART_SECONDS:.0f} s"
        except OSError as error:
            return f"{words}: {error.strerror}"
        return "" if done.returncode == 0 else (done.stderr.strip()[-500:] or f"{words} failed")

    def restart() -> str:
        if command == _RESTART:
            call(_RESET)
        return call(command)

    return restart


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; exit code 1 when the disk or the system failed, and it is to be run again."""
    parser = argparse.ArgumentParser(prog="boardbench-update", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("/"), help="folder that is / (another in tests)")
    parser.add_argument("--data-dir", type=Path, help="the agent's data folder (/var/lib/boardbench)")
    parser.add_argument("--restart", default=_RESTART, help=f"command that restarts the agent ({_RESTART})")
    parser.add_argument(
        "--health-seconds",
        type=float,
        default=_HEALTH_SECONDS,
        help=f"how long a new release has to become healthy ({_HEALTH_SECONDS:.0f})",
    )
    options = parser.parse_args(arguments)
    layout = Layout(options.root, options.data_dir or options.root / "var/lib/boardbench")

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")

    try:
        Switch(layout, _restarting(options.restart), health_seconds=options.health_seconds, say=say).run()
    except OSError as error:
        say(f"boardbench-update: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
