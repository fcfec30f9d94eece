"""A file on this machine on its way to a board: hashed once, read in chunks from any offset."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from boardbench.cli.errors import CliError, WrongUse

CHUNK_BYTES = (
    1 << 20
)  # half of what the wire allows; from 256 KiB on the cost per message is lost in the copying
_HASH_BYTES = 1 << 20  # stays in the cache of a laptop between read and hash


# A Core ML package is a folder with this file in it, and one or two more.
_MANIFEST = "Manifest.json"
_MOST_FILES = 1000


def _parts(path: Path) -> dict[str, Path]:
    """What belongs to a model, by its name in the archive; one file alone where it is no more than that.

    OpenVINO's model is an .xml and its .bin, Core ML's an .mlpackage. Raises WrongUse for any other folder.
    """
    if not path.is_dir():
        weights = path.with_suffix(".bin")
        both = path.suffix == ".xml" and weights.is_file()
        return {part.name: part for part in ((path, weights) if both else (path,))}
    if not (path / _MANIFEST).is_file():
        raise WrongUse(
            f"{path} is not a regular file: give the path of a model file, or of an .mlpackage, which holds "
            f"a {_MANIFEST}"
        )
    # By name and not by place on the disk, so that equal packages have one hash.
    inside = sorted(part for part in path.rglob("*") if part.is_symlink() or not part.is_dir())
    if len(inside) > _MOST_FILES:
        raise WrongUse(f"{path} holds {len(inside)} files: no .mlpackage has more than {_MOST_FILES}")
    for part in inside:
        if part.is_symlink() or not part.is_file():
            raise WrongUse(f"{part} is not a regular file, and an .mlpackage is of nothing else")
    return {part.relative_to(path).as_posix(): part for part in inside}


def _packed(parts: dict[str, Path]) -> IO[bytes]:
    """An unnamed file that holds the parts as one archive.

    Nothing is compressed and no time is kept, so that equal parts have equal bytes and one hash.
    """
    packed: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with its Source
    try:
        with zipfile.ZipFile(packed, "w") as archive:
            for name, part in parts.items():
                entry = zipfile.ZipInfo(name)
                with part.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, _HASH_BYTES)
        packed.seek(0)
    except BaseException:
        packed.close()
        raise
    return packed


@contextlib.contextmanager
def as_file(path: Path) -> Iterator[Path]:
    """The model as a file of the same name: ``path`` itself, or an .mlpackage in its archive while inside.

    Raises WrongUse for a folder that is no .mlpackage.
    """
    if not path.is_dir():
        yield path
        return
    try:
        with _packed(_parts(path)) as packed, tempfile.TemporaryDirectory(prefix="boardbench-") as folder:
            file = Path(folder) / path.name
            with file.open("wb") as target:
                shutil.copyfileobj(packed, target, _HASH_BYTES)
            yield file
    except OSError as error:
        raise WrongUse(f"{path} can't be read: {error.strerror or error}") from error


class Source:
    """An open file. ``sha256`` is that of the bytes it had when it was opened; memory stays at one chunk.

    Chunks may be read by several threads. Raises WrongUse where the file can't be read, is empty
    or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        """Opens and hashes ``path``."""
        self.path = path
        self.name = path.name.encode("utf-8", "replace").decode("utf-8")
        self._lock = threading.Lock()
        try:
            mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise WrongUse(f"{path} is not a regular file: give the path of a model file")
            parts = _parts(path)
            alone = list(parts.values()) == [path]
            self._file = path.open("rb", buffering=0) if alone else _packed(parts)
        except OSError as error:
            raise WrongUse(f"{path} can't be read: {error.strerror or error}") from error
        try:
            self._opened_as = os.fstat(self._file.fileno())
            self.size_bytes = self._opened_as.st_size
            if self.size_bytes == 0:
                raise WrongUse(
                    f"{path} is empty (0 bytes): there is nothing to send; was its download finished?"
                )
            self.sha256 = self._hash()
        except OSError as error:
            self.close()
            raise WrongUse(f"{path} can't be read: {error.strerror or error}") from error
        except WrongUse:
            self.close()
            raise

    def _hash(self) -> str:
        digest = hashlib.sha256()
        buffer = bytearray(_HASH_BYTES)
        view = memoryview(buffer)
        while count := self._file.readinto(buffer):  # type: ignore[attr-defined]  # both are raw files
            digest.update(view[:count])
        return digest.hexdigest()

    def chunks(self, offset_bytes: int) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of every chunk from ``offset_bytes`` to the end. Raises CliError."""
        while offset_bytes < self.size_bytes:
            try:
                with self._lock:
                    self._file.seek(offset_bytes)
                    data = self._file.read(min(CHUNK_BYTES, self.size_bytes - offset_bytes))
            except OSError as error:
                raise CliError(f"{self.path} can't be read any more: {error.strerror or error}") from error
            if not data:
                raise CliError(
                    f"{self.path} became shorter while it was sent: push it again when it is complete"
                )
            yield offset_bytes, data
            offset_bytes += len(data)

    def changed(self) -> bool:
        """Whether the file was written to since it was opened."""
        now = os.fstat(self._file.fileno())
        before = self._opened_as
        return (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)

    def close(self) -> None:
        """Closes the file. Idempotent."""
        self._file.close()

    def __enter__(self) -> Source:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()
