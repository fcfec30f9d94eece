"""Protocol buffers on the wire, read without trusting them and without a schema.

The format: https://protobuf.dev/programming-guides/encoding/. A message is a run of fields, each a number and
a wire type before its value; bytes, strings, packed numbers and nested messages look alike, so it is the
caller who says what a field is. Long values are not copied: they are told by their place.
"""

from __future__ import annotations

import struct
from array import array
from typing import Dict, List, Optional, Tuple

from boardbench.inspect.errors import Malformed

Span = Tuple[int, int]

_F32 = struct.Struct("<f")
# How many fields a file may have: one takes 2 bytes at least, in models some 5 to 10.
_FIELDS_AT_LEAST = 100_000
_BYTES_PER_FIELD = 2
_LONGEST_TEXT = 4096
_NOTHING: "array[int]" = array("Q")


class Wire:
    """The bytes that messages are read from, and how many fields may still be read."""

    __slots__ = ("data", "left", "what")

    def __init__(self, data: memoryview, what: str) -> None:
        self.data = data
        self.what = what
        self.left = max(_FIELDS_AT_LEAST, len(data) // _BYTES_PER_FIELD)

    def root(self) -> "Message":
        """The message that is the whole."""
        return Message(self, 0, len(self.data))

    def broken(self, how: str, at: int) -> Malformed:
        """The error to raise: ``how`` continues the name of the file."""
        return Malformed(
            f"{self.what} {how} (byte {at} of {len(self.data)}): truncated or damaged; copy it again"
        )


class Message:
    """One message, split into its fields; a field that comes again is kept again."""

    __slots__ = ("_fields", "start", "stop", "wire")

    def __init__(self, wire: Wire, start: int, stop: int) -> None:
        self.wire = wire
        self.start = start
        self.stop = stop
        # Number → three numbers for each time that it comes: wire type, then value and 0, or start and stop.
        # Arrays, because a tuple takes five times the memory.
        self._fields: Dict[int, array[int]] = {}
        data = wire.data
        at = start
        while at < stop:
            wire.left -= 1
            if wire.left < 0:
                raise Malformed(
                    f"{wire.what} has more fields than any model of its size: damaged, or made to harm"
                )
            key, at = read_varint(wire, at, stop)
            number, kind = key >> 3, key & 7
            if number == 0:
                raise wire.broken("has a field without a number", at)
            if kind == 0:
                value, at = read_varint(wire, at, stop)
                found = (0, value, 0)
            elif kind == 2:
                length, begin = read_varint(wire, at, stop)
                at = begin + length
                found = (2, begin, at)
            elif kind == 1 or kind == 5:
                found = (kind, at, at + (8 if kind == 1 else 4))
                at = found[2]
            else:
                raise wire.broken(f"has a field of unknown kind {kind}", at)
            if at > stop:
                raise wire.broken("has a field that ends outside its message", min(at, len(data)))
            kept = self._fields.get(number)
            if kept is None:
                kept = self._fields[number] = array("Q")
            kept.extend(found)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def numbers(self) -> Tuple[int, ...]:
        """Numbers of the fields that are there, in the order of their first appearance."""
        return tuple(self._fields)

    def count(self, number: int) -> int:
        """How often the field comes."""
        kept = self._fields.get(number)
        return 0 if kept is None else len(kept) // 3

    def spans(self, number: int) -> List[Span]:
        """Where the values of a field of bytes, text or messages lie."""
        kept = self._fields.get(number)
        if kept is None:
            return []
        return [(kept[at + 1], kept[at + 2]) for at in range(0, len(kept), 3) if kept[at] == 2]

    def span(self, number: int) -> Optional[Span]:
        """Where the last value of such a field lies; None when it is absent."""
        kept = self._fields.get(number)
        if kept is None or kept[-3] != 2:
            return None
        return kept[-2], kept[-1]

    def messages(self, number: int) -> List["Message"]:
        """The nested messages of a field."""
        return [Message(self.wire, start, stop) for start, stop in self.spans(number)]

    def message(self, number: int) -> Optional["Message"]:
        """The last nested message of a field; None when it is absent."""
        found = self.span(number)
        return None if found is None else Message(self.wire, found[0], found[1])

    def text(self, number: int) -> str:
        """The last string of a field; empty when it is absent. Bytes that are no UTF-8 are replaced."""
        found = self.span(number)
        return "" if found is None else self._decode(found)

    def texts(self, number: int) -> List[str]:
        """All strings of a field."""
        return [self._decode(found) for found in self.spans(number)]

    def _decode(self, span: Span) -> str:
        start, stop = span
        return bytes(self.wire.data[start : min(stop, start + _LONGEST_TEXT)]).decode("utf-8", "replace")

    def integer(self, number: int, default: int = 0) -> int:
        """The last integer of a field, as a signed 64-bit number."""
        kept = self._fields.get(number)
        return default if kept is None or kept[-3] != 0 else _signed(kept[-2])

    def number(self, number: int, default: float = 0.0) -> float:
        """The last 32-bit floating point number of a field."""
        kept = self._fields.get(number)
        if kept is None or kept[-3] != 5:
            return default
        return float(_F32.unpack_from(self.wire.data, kept[-2])[0])

    def integers(self, number: int) -> Tuple[int, ...]:
        """All integers of a repeated field, packed or not."""
        values: List[int] = []
        kept = self._fields.get(number, _NOTHING)
        for first in range(0, len(kept), 3):
            if kept[first] == 0:
                values.append(_signed(kept[first + 1]))
            elif kept[first] == 2:
                at, stop = kept[first + 1], kept[first + 2]
                while at < stop:
                    self.wire.left -= 1
                    if self.wire.left < 0:
                        raise Malformed(f"{self.wire.what} has more numbers than any model of its size")
                    value, at = read_varint(self.wire, at, stop)
                    values.append(_signed(value))
        return tuple(values)


def read_varint(wire: Wire, at: int, stop: int) -> Tuple[int, int]:
    """(value, position after it) of the number at ``at``."""
    data = wire.data
    if at < stop and data[at] < 0x80:
        return data[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            raise wire.broken("ends inside a number", at)
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise wire.broken("has a number that is too long", at)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
