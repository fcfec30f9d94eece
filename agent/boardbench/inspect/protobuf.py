"""Protocol buffers on the wire, read without trusting them and without a schema.

The format: https://protobuf.dev/programming-guides/encoding/. A message is a run of fields, each a number and
a wire type before its value; bytes, strings, packed numbers and nested messages look alike, so it is the
caller who says what a field is. Long values are not copied: they are told by their place.
"""

from __future__ import annotations

import struct
from array import array
from typing import Dict, Iterator, List, Optional, Tuple, Union

from boardbench.inspect.budget import Budget
from boardbench.inspect.errors import Malformed

Span = Tuple[int, int]
# Number, wire type, then value and 0, or start and stop.
Field = Tuple[int, int, int, int]
Readable = Union[bytes, memoryview]

_F32 = struct.Struct("<f")
_LONGEST_TEXT = 4096
# Of a message that is kept with all its fields.
_STEPS_PER_MESSAGE = 6
_NOTHING: "array[int]" = array("Q")


class Wire:
    """The bytes that messages are read from, and how much work is left; each field takes a step."""

    __slots__ = ("budget", "data", "what")

    def __init__(self, data: memoryview, what: str, budget: Optional[Budget] = None) -> None:
        self.data = data
        self.what = what
        self.budget = Budget(len(data)) if budget is None else budget

    def root(self) -> "Message":
        """The message that is the whole."""
        return Message(self, 0, len(self.data))

    def broken(self, how: str, at: int) -> Malformed:
        """The error to raise: ``how`` continues the name of the file."""
        return Malformed(
            f"{self.what} {how} (byte {at} of {len(self.data)}): truncated or damaged; copy it again"
        )


def fields(wire: Wire, data: Readable, base: int, start: int, stop: int) -> Iterator[Field]:
    """The fields of the message in ``data`` from ``start`` to ``stop``; raises Malformed.

    ``data`` is a part of the wire's bytes that begins at ``base``: a small part is read faster from a copy.
    """
    budget = wire.budget
    at = start
    while at < stop:
        budget.steps_left -= 1
        if budget.steps_left < 0:
            budget.exhausted(wire.what)
        key = data[at]
        at += 1
        if key >= 0x80:
            key, at = _varint(wire, data, base, at - 1, stop)
        kind = key & 7
        if key < 8:
            raise wire.broken("has a field without a number", base + at)
        if kind == 2:
            length = data[at] if at < stop else 0x80
            at += 1
            if length >= 0x80:
                length, at = _varint(wire, data, base, at - 1, stop)
            end = at + length
            if end > stop:
                raise wire.broken(
                    "has a field that ends outside its message", min(base + end, len(wire.data))
                )
            yield key >> 3, 2, at, end
            at = end
        elif kind == 0:
            value = data[at] if at < stop else 0x80
            at += 1
            if value >= 0x80:
                value, at = _varint(wire, data, base, at - 1, stop)
            yield key >> 3, 0, value, 0
        elif kind == 1 or kind == 5:
            end = at + (8 if kind == 1 else 4)
            if end > stop:
                raise wire.broken(
                    "has a field that ends outside its message", min(base + end, len(wire.data))
                )
            yield key >> 3, kind, at, end
            at = end
        else:
            raise wire.broken(f"has a field of unknown kind {kind}", base + at)


class Message:
    """One message, split into its fields; a field that comes again is kept again."""

    __slots__ = ("_fields", "start", "stop", "wire")

    def __init__(self, wire: Wire, start: int, stop: int) -> None:
        wire.budget.spend(_STEPS_PER_MESSAGE, wire.what)
        self.wire = wire
        self.start = start
        self.stop = stop
        # Number → three numbers for each time that it comes: wire type, then value and 0, or start and stop.
        # Arrays, because a tuple takes five times the memory.
        self._fields: Dict[int, array[int]] = {}
        for number, kind, first, second in fields(wire, wire.data, 0, start, stop):
            kept = self._fields.get(number)
            if kept is None:
                kept = self._fields[number] = array("Q")
            kept.extend((kind, first, second))

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
        return "" if found is None else text(self.wire.data, *found)

    def texts(self, number: int) -> List[str]:
        """All strings of a field."""
        return [text(self.wire.data, start, stop) for start, stop in self.spans(number)]

    def integer(self, number: int, default: int = 0) -> int:
        """The last integer of a field, as a signed 64-bit number."""
        kept = self._fields.get(number)
        return default if kept is None or kept[-3] != 0 else signed(kept[-2])

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
                values.append(signed(kept[first + 1]))
            elif kept[first] == 2:
                at, stop = kept[first + 1], kept[first + 2]
                values.extend(packed(self.wire, self.wire.data, 0, at, stop))
        return tuple(values)


def text(data: Readable, start: int, stop: int) -> str:
    """The text in these bytes, cut where it is longer than a name. Bytes that are no UTF-8 are replaced."""
    return str(data[start : min(stop, start + _LONGEST_TEXT)], "utf-8", "replace")


def packed(wire: Wire, data: Readable, base: int, start: int, stop: int) -> List[int]:
    """The integers of a packed field, signed, of 64 bits; ``data`` and ``base`` as for :func:`fields`."""
    values: List[int] = []
    budget = wire.budget
    at = start
    while at < stop:
        budget.steps_left -= 1
        if budget.steps_left < 0:
            budget.exhausted(wire.what)
        value = data[at]
        at += 1
        if value >= 0x80:
            value, at = _varint(wire, data, base, at - 1, stop)
            value = signed(value)
        values.append(value)
    return values


def read_varint(wire: Wire, at: int, stop: int) -> Tuple[int, int]:
    """(value, position after it) of the number at ``at``."""
    return _varint(wire, wire.data, 0, at, stop)


def _varint(wire: Wire, data: Readable, base: int, at: int, stop: int) -> Tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            raise wire.broken("ends inside a number", base + at)
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise wire.broken("has a number that is too long", base + at)


def signed(value: int) -> int:
    """A number of the wire as a signed 64-bit one."""
    return value - (1 << 64) if value >= 1 << 63 else value
