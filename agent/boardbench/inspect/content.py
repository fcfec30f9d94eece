"""The bytes of a model file, opened once and looked at through a view that copies nothing."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import TracebackType
from typing import Optional, Type

from boardbench.inspect.errors import Unreadable

# A map turns into a bus error when another program shortens the file; below this size the file is read
# into memory instead, which the report's own memory is small against.
LARGEST_READ_BYTES = 256 << 20


class Opened:
    """The bytes of a file as a memoryview, for the length of a ``with`` block.

    ``mapped`` maps the file, so that only the pages that are looked at are read; otherwise a file of up to
    LARGEST_READ_BYTES is read whole. Raises Unreadable on entry.
    """

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        self._path = path
        self._mapped = mapped
        self._map: Optional[mmap.mmap] = None
        self._view = memoryview(b"")

    def __enter__(self) -> memoryview:
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                if not self._mapped and size <= LARGEST_READ_BYTES:
                    self._view = memoryview(file.read())
                elif size > 0:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    self._view = memoryview(self._map)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreadable(f"{self._path}: can't be read: {reason}") from error
        return self._view

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if self._map is None:
            return
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            # A slice of the view is still held, by an exception's frames for example; the map goes with it.
            pass
