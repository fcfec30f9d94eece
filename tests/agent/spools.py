"""What tests put into spools, and a disk under them that breaks when it is told to."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

from boardbench.agent.spool import Disk, Spool

SECTOR_BYTES = 512


class PowerCut(BaseException):
    """The lights are out: nothing may catch this."""


class SimulatedDisk(Disk):
    """Real files, and beside them what a power cut would leave of them.

    Pessimistic: what was not synced may be there or not, sector by sector and name by name, and a sector
    of a new file that was not written holds what another file left there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps_left: int | None = None
        self.full = self.broken = self.dead = False
        self._names: dict[int, str] = {}
        # Name → content, as far as synced; and what was written since.
        self.synced: dict[str, bytes] = {path.name: path.read_bytes() for path in self._files()}
        self.named: set[str] = set(self.synced)
        self.unlinked: set[str] = set()
        self.unsynced: dict[str, list[tuple[int, bytes]]] = {}

    def _files(self) -> list[Path]:
        return [path for path in self.root.iterdir() if path.name != "lock"] if self.root.exists() else []

    def _step(self) -> None:
        if self.steps_left is not None and not self.dead:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise PowerCut
        if self.broken:
            raise OSError(errno.EROFS, "Read-only file system")

    def create(self, path: Path) -> int:
        self._step()
        if self.dead:
            return os.open(os.devnull, os.O_WRONLY)
        descriptor = super().create(path)
        self._names[descriptor] = path.name
        self.unsynced[path.name] = []
        return descriptor

    def open_state(self, path: Path) -> int:
        self._step()
        descriptor = super().open_state(path)
        self._names[descriptor] = path.name
        self.unsynced.setdefault(path.name, [])
        return descriptor

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        self._step()
        if self.dead:
            return
        grows = offset + len(data) > os.fstat(descriptor).st_size
        if self.full and grows:
            super().write(descriptor, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        self.unsynced[self._names[descriptor]].append((offset, bytes(data)))
        super().write(descriptor, data, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        # Not synced by itself: after a cut, what was cut off may be there again.
        self._step()
        super().truncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        self._step()
        if self.dead:
            return
        name = self._names[descriptor]
        self.synced[name] = (self.root / name).read_bytes()
        self.unsynced[name] = []

    def sync_folder(self, path: Path) -> None:
        self._step()
        if not self.dead:
            self.named = {file.name for file in self._files()}
            self.unlinked = set()

    def unlink(self, path: Path) -> None:
        self._step()
        if not self.dead:
            self.unlinked.add(path.name)
            super().unlink(path)

    def free_bytes(self, path: Path) -> int:
        return 0 if self.full else 1 << 40

    def after_power_cut(self, target: Path, rng: random.Random) -> None:
        """Writes what is left into another folder."""
        target.mkdir()
        for name in self.named | set(self.unsynced):
            if name not in self.named and rng.random() < 0.5:
                continue
            if name in self.unlinked and rng.random() < 0.5:
                continue
            durable = self.synced.get(name, b"")
            content = bytearray(durable)
            for offset, data in self.unsynced.get(name, []):
                for start in range(0, len(data), SECTOR_BYTES):
                    piece = data[start : start + SECTOR_BYTES]
                    fate = rng.random()
                    end = offset + start + len(piece)
                    if fate < 0.4:
                        content.extend(bytes(max(0, end - len(content))))
                        content[offset + start : end] = piece
                    elif fate < 0.7 and end > len(content):
                        stale = rng.choice([bytes(piece), bytes(len(piece)), rng.randbytes(len(piece))])
                        content.extend(stale[: end - len(content)])
            (target / name).write_bytes(content)

    def after_kill(self, target: Path) -> None:
        shutil.copytree(self.root, target, ignore=shutil.ignore_patterns("lock"))


def segments(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "spool").glob("*.seg"))


def sequences(spool: Spool) -> list[int]:
    return [record.sequence for record in spool.pending()]


def payload(number: int, size: int = 100) -> bytes:
    return random.Random(number).randbytes(size)


def fill(spool: Spool, count: int, first: int = 0, size: int = 100) -> list[int]:
    return [spool.append(f"run-{number}", payload(number, size)) for number in range(first, first + count)]
