"""FlatBuffers, read without trusting them: every offset is checked before it is followed.

The format: https://flatbuffers.dev/internals/. A table begins with a signed offset back to its vtable; the
vtable holds its own size, the table's size, and the offset of each field inside the table (0: absent), where
field ``id`` is at byte ``4 + 2 * id``.

A file made to hurt can point many vectors at one table, so that a small file unfolds into a huge one. Each
reader therefore has a budget: how many tables and how many bytes of vectors may be visited.
"""

from __future__ import annotations

import struct
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from boardbench.inspect.errors import Malformed
from boardbench.inspect.ledger import GRAPH, NAMES, Ledger

_SIZE = struct.Struct("<I")
_BACK = struct.Struct("<i")
_PAIR = struct.Struct("<HH")
I8 = struct.Struct("<b")
U8 = struct.Struct("<B")
I16 = struct.Struct("<h")
I32 = struct.Struct("<i")
U32 = struct.Struct("<I")
I64 = struct.Struct("<q")
U64 = struct.Struct("<Q")
F32 = struct.Struct("<f")

# How many tables a file may unfold into. A table and the pointer to it take 8 bytes at least; in models
# without weights there is one for some 50 bytes, with them for thousands. A small file may be all structure.
_BYTES_PER_POSSIBLE_TABLE = 8
_BYTES_PER_TABLE = 40
_TABLES_AT_LEAST, _TABLES_AT_MOST = 20_000, 2_000_000
# Writers share equal strings and vectors, so a byte may be visited more than once, but not often.
_VISITS_PER_BYTE = 4
_VISITS = 1 << 20
# Names longer than this are cut: they are for people.
_LONGEST_NAME = 4096


# What a table points to: (field, "text" | "vector" | "table" | "tables" | "union", more), where more is the
# bytes of an element, the name of the table's kind, or for a union (field of its kind, kinds by number).
Pointer = Tuple[int, str, object]


class FlatBuffer:
    """The bytes of one buffer; positions are relative to its first byte.

    ``what`` names it in errors ("the model", "the Edge TPU executable").
    """

    __slots__ = ("_tables_left", "_visits_left", "_vtables", "data", "ledger", "size", "what")

    def __init__(self, data: memoryview, what: str, ledger: Ledger) -> None:
        self.data = data
        self.size = len(data)
        self.what = what
        self.ledger = ledger
        self._vtables: Dict[int, Tuple[int, Tuple[int, ...]]] = {}
        likely = max(_TABLES_AT_LEAST, self.size // _BYTES_PER_TABLE)
        self._tables_left = min(self.size // _BYTES_PER_POSSIBLE_TABLE + 64, likely, _TABLES_AT_MOST)
        self._visits_left = self.size * _VISITS_PER_BYTE + _VISITS

    def root(self, identifier: bytes = b"") -> "Table":
        """The first table; raises Malformed when the identifier is another one."""
        if self.size < 8:
            raise self.broken("ends inside its header", self.size)
        found = bytes(self.data[4:8])
        if identifier and found != identifier:
            raise Malformed(f"{self.what} is marked {found!r} and not {identifier!r}")
        (start,) = _SIZE.unpack_from(self.data, 0)
        self.ledger.claim(0, 8 if identifier else 4, GRAPH)
        return self.table_at(start)

    def broken(self, how: str, at: int) -> Malformed:
        """The error to raise: ``how`` continues the name of the buffer."""
        return Malformed(
            f"{self.what} {how} (byte {at} of {self.size}): the file is truncated or damaged; copy it again"
        )

    def table_at(self, at: int, purpose: str = GRAPH) -> "Table":
        """The table at a position."""
        self._tables_left -= 1
        if self._tables_left < 0:
            raise Malformed(
                f"{self.what} has more tables than any model of its size: damaged, or made to harm"
            )
        if at < 0 or at + 4 > self.size:
            raise self.broken("points outside the file", at)
        vtable = at - _BACK.unpack_from(self.data, at)[0]
        known = self._vtables.get(vtable)
        if known is None:
            known = self._vtables[vtable] = self._read_vtable(vtable)
        size, fields = known
        if at + size > self.size:
            raise self.broken("has a table that ends outside the file", at)
        self.ledger.claim(at, at + size, purpose)
        return Table(self, at, size, fields, purpose)

    def _read_vtable(self, at: int) -> Tuple[int, Tuple[int, ...]]:
        if at < 0 or at + 4 > self.size:
            raise self.broken("points outside the file", at)
        own_size, table_size = _PAIR.unpack_from(self.data, at)
        if own_size < 4 or own_size % 2 or at + own_size > self.size or table_size < 4:
            raise self.broken("has a broken table description", at)
        fields = struct.unpack_from(f"<{own_size // 2 - 2}H", self.data, at + 4)
        self.ledger.claim(at, at + own_size, GRAPH)
        return table_size, fields

    def vector_at(self, at: int, width: int, visit: bool) -> Tuple[int, int]:
        """(position of the first element, number of elements) of the vector at ``at``."""
        if at < 0 or at + 4 > self.size:
            raise self.broken("points outside the file", at)
        (count,) = _SIZE.unpack_from(self.data, at)
        if at + 4 + count * width > self.size:
            raise self.broken(f"has a list of {count} that ends outside the file", at)
        if visit:
            self._visits_left -= count * width + 4
            if self._visits_left < 0:
                raise Malformed(f"{self.what} refers to its own bytes too often: damaged, or made to harm")
        return at + 4, count


class Table:
    """One table. Fields are asked for by id; an absent one is the default, as in the schema."""

    __slots__ = ("_fields", "_size", "at", "buffer", "purpose")

    def __init__(self, buffer: FlatBuffer, at: int, size: int, fields: Tuple[int, ...], purpose: str) -> None:
        self.buffer = buffer
        self.at = at
        self._size = size
        self._fields = fields
        self.purpose = purpose

    def _offset(self, field: int, width: int) -> int:
        """Where the field's own bytes are; 0 when it is absent."""
        offset = self._fields[field] if field < len(self._fields) else 0
        if offset == 0:
            return 0
        if offset < 4 or offset + width > self._size:
            raise self.buffer.broken("has a field outside its table", self.at)
        return self.at + offset

    def has(self, field: int) -> bool:
        """Whether the field is there."""
        return field < len(self._fields) and self._fields[field] != 0

    def integer(self, field: int, kind: struct.Struct, default: int = 0) -> int:
        """An integer or boolean."""
        at = self._offset(field, kind.size)
        return int(kind.unpack_from(self.buffer.data, at)[0]) if at else default

    def number(self, field: int, default: float = 0.0) -> float:
        """A 32-bit floating point number."""
        at = self._offset(field, 4)
        return float(F32.unpack_from(self.buffer.data, at)[0]) if at else default

    def _target(self, field: int) -> int:
        at = self._offset(field, 4)
        return at + int(_SIZE.unpack_from(self.buffer.data, at)[0]) if at else 0

    def table(self, field: int, purpose: str = "") -> Optional["Table"]:
        """A table that the field points to; None when it is absent."""
        at = self._target(field)
        return self.buffer.table_at(at, purpose or self.purpose) if at else None

    def tables(self, field: int, purpose: str = "") -> List["Table"]:
        """The tables of a vector of tables."""
        at = self._target(field)
        if not at:
            return []
        start, count = self.buffer.vector_at(at, 4, True)
        self.buffer.ledger.claim(at, start + 4 * count, purpose or self.purpose)
        offsets = struct.unpack_from(f"<{count}I", self.buffer.data, start)
        return [
            self.buffer.table_at(start + 4 * index + offset, purpose or self.purpose)
            for index, offset in enumerate(offsets)
        ]

    def text(self, field: int, purpose: str = NAMES) -> str:
        """A string; empty when it is absent. Bytes that are no UTF-8 are replaced."""
        at = self._target(field)
        if not at:
            return ""
        start, count = self.buffer.vector_at(at, 1, True)
        # The closing zero is part of a string.
        self.buffer.ledger.claim(at, min(start + count + 1, self.buffer.size), purpose)
        return bytes(self.buffer.data[start : start + min(count, _LONGEST_NAME)]).decode("utf-8", "replace")

    def values(self, field: int, letter: str, width: int, purpose: str = "") -> Tuple[int, ...]:
        """The elements of a vector of numbers; ``letter`` is that of the struct module."""
        at = self._target(field)
        if not at:
            return ()
        start, count = self.buffer.vector_at(at, width, True)
        self.buffer.ledger.claim(at, start + width * count, purpose or self.purpose)
        return struct.unpack_from(f"<{count}{letter}", self.buffer.data, start)

    def span(self, field: int, width: int = 1) -> Optional[Tuple[int, int]]:
        """(start, stop) of a vector's elements, which are not read; None when it is absent.

        The length before the elements is claimed; the elements are left to the caller.
        """
        at = self._target(field)
        if not at:
            return None
        start, count = self.buffer.vector_at(at, width, False)
        self.buffer.ledger.claim(at, start, self.purpose)
        return start, start + width * count

    def spans(self, field: int) -> List[Tuple[int, int]]:
        """(start, stop) of each element of a vector of strings, which are not read."""
        at = self._target(field)
        if not at:
            return []
        start, count = self.buffer.vector_at(at, 4, True)
        self.buffer.ledger.claim(at, start + 4 * count, self.purpose)
        found = []
        for index, offset in enumerate(struct.unpack_from(f"<{count}I", self.buffer.data, start)):
            position = start + 4 * index + offset
            first, length = self.buffer.vector_at(position, 1, False)
            self.buffer.ledger.claim(position, first, self.purpose)
            found.append((first, first + length))
        return found


def claim_tree(roots: Sequence[Table], kind: str, schema: Mapping[str, Tuple[Pointer, ...]]) -> None:
    """Claims all that the tables point to, by a schema of only the pointers, and reads none of it."""
    waiting = [(table, kind) for table in roots]
    while waiting:
        table, kind = waiting.pop()
        for field, shape, more in schema[kind]:
            if not table.has(field):
                continue
            if shape == "text":
                table.text(field, table.purpose)
            elif shape == "vector" and isinstance(more, int):
                span = table.span(field, more)
                if span is not None:
                    table.buffer.ledger.claim(span[0], span[1], table.purpose)
            elif shape == "tables" and isinstance(more, str):
                waiting.extend((child, more) for child in table.tables(field))
            elif shape == "union" and isinstance(more, tuple):
                chosen = more[1].get(table.integer(more[0], U8))
                child = table.table(field) if chosen is not None else None
                if child is not None:
                    waiting.append((child, chosen))
            elif isinstance(more, str):
                child = table.table(field)
                if child is not None:
                    waiting.append((child, more))
