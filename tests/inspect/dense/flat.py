"""FlatBuffers, laid out by hand: parents first, many pointers to one child."""

from __future__ import annotations

import struct
from collections.abc import Iterable


class Place:
    """Where something will be: pointers to it are filled in when it is."""

    def __init__(self) -> None:
        self.at = -1


class Flat:
    """A FlatBuffer in the making. Values of fields are numbers by their letter of struct, or places."""

    def __init__(self, identifier: bytes) -> None:
        self.data = bytearray(8)
        self.data[4:8] = identifier
        self._open: list[tuple[int, Place]] = []
        self.top = Place()
        self._open.append((0, self.top))

    def table(self, where: Place, fields: dict[int, tuple[str, int] | Place]) -> None:
        """A table with its own vtable before it."""
        letters = {field: "I" if isinstance(value, Place) else value[0] for field, value in fields.items()}
        offsets, end = {}, 4
        # The widest first, so that everything is aligned.
        for field in sorted(fields, key=lambda field: -struct.calcsize(letters[field])):
            width = struct.calcsize(letters[field])
            end += -end % width
            offsets[field] = end
            end += width
        count = max(fields, default=-1) + 1
        vtable = len(self.data)
        self.data += struct.pack("<HH", 4 + 2 * count, end)
        self.data += struct.pack(f"<{count}H", *(offsets.get(field, 0) for field in range(count)))
        self.same(where, vtable, end, {offsets[field]: value for field, value in fields.items()})

    def same(self, where: Place, vtable: int, size: int, values: dict[int, tuple[str, int] | Place]) -> None:
        """A table by a vtable that is there already; values by their offset."""
        where.at = at = len(self.data)
        self.data += bytes(size)
        struct.pack_into("<i", self.data, at, at - vtable)
        for offset, value in values.items():
            if isinstance(value, Place):
                self._open.append((at + offset, value))
            else:
                struct.pack_into("<" + value[0], self.data, at + offset, value[1])

    def pointers(self, where: Place, targets: Iterable[Place]) -> None:
        """A vector of pointers."""
        found = list(targets)
        where.at = len(self.data)
        self.data += struct.pack("<I", len(found))
        for target in found:
            self._open.append((len(self.data), target))
            self.data += bytes(4)

    def numbers(self, where: Place, letter: str, values: Iterable[int]) -> None:
        """A vector of numbers."""
        found = list(values)
        where.at = len(self.data)
        self.data += struct.pack("<I", len(found)) + struct.pack(f"<{len(found)}{letter}", *found)

    def content(self, where: Place, content: bytes) -> None:
        """A vector of bytes, or a text."""
        where.at = len(self.data)
        self.data += struct.pack("<I", len(content)) + content

    def finish(self) -> bytes:
        """The bytes, all pointers filled in."""
        for at, place in self._open:
            assert place.at > at, "a pointer goes forward"
            struct.pack_into("<I", self.data, at, place.at - at)
        return bytes(self.data)


def places(count: int) -> list[Place]:
    """So many of them."""
    return [Place() for _ in range(count)]
