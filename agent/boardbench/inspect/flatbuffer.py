"""FlatBuffers, read without trusting them: every offset is checked before it is followed.

The format: https://flatbuffers.dev/internals/. A table begins with a signed offset back to its vtable; the
vtable holds its own size, the table's size, and the offset of each field inside the table (0: absent), where
field ``id`` is at byte ``4 + 2 * id``.

A file made to hurt can point many vectors at one table, so that a small file unfolds into a huge one. What is
visited therefore counts against a budget.
"""

from __future__ import annotations

import struct
from operator import itemgetter
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from boardbench.inspect.budget import Budget
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

# Names longer than this are cut: they are for people.
_LONGEST_NAME = 4096
# How many steps of the budget things take.
_STEPS_PER_TABLE, _STEPS_PER_VECTOR = 3, 2
# A table that is asked field by field takes more.
_STEPS_PER_FIELDS = 6
# A table's description is read once, and the plan for reading its fields made.
_STEPS_PER_DESCRIPTION = 70
# Elements of a vector, or bytes of a text, that take about as long as a step.
_ELEMENTS_PER_STEP, _BYTES_PER_STEP = 4, 256
# No table of any format that is read here has as many fields.
_MOST_FIELDS = 48
# Vectors are mostly short: their formats, and their marks, are made once.
_SHORT = 8
_SHORT_MARK = 65

# What a table points to: (field, "text" | "vector" | "table" | "tables" | "union", more), where more is the
# bytes of an element, the name of the table's kind, or for a union (field of its kind, kinds by number).
Pointer = Tuple[int, str, object]


class Fields:
    """Fields of one kind of table that are read at once: each its id, letter of :mod:`struct` and default.

    A pointer is read as ``I``: it is relative to the field's own place.
    """

    __slots__ = ("fields", "number")

    _made = 0

    def __init__(self, *fields: Tuple[int, str, int]) -> None:
        self.fields = fields
        self.number = Fields._made
        Fields._made += 1


# How the fields are read: size of the table, from bytes and position to values, place of each (0: absent).
_Plan = Tuple[int, Callable[[memoryview, int], Tuple[int, ...]], Tuple[int, ...]]

# (position of the table, fields, number of its purpose) → values of the fields, and the place of each in the
# table; a place of 0 is that of an absent field.
_Record = Callable[[int, Fields, int], Tuple[Tuple[int, ...], Tuple[int, ...]]]
# (position of the vector, bytes of an element, bytes behind it that belong to it, number of its purpose) →
# where its elements begin and end, which are not read.
_Skipped = Callable[[int, int, int, int], Tuple[int, int]]
# (position of the vector, letter of struct, bytes of an element, number of its purpose) → its elements.
_Numbers = Callable[[int, str, int, int], Tuple[int, ...]]


class FlatBuffer:
    """The bytes of one buffer; positions are relative to its first byte.

    ``what`` names it in errors ("the model", "the Edge TPU executable").
    """

    __slots__ = (
        "_plans",
        "_vtables",
        "base",
        "budget",
        "data",
        "ledger",
        "marks",
        "numbers_at",
        "record",
        "size",
        "skipped_at",
        "what",
    )

    def __init__(self, data: memoryview, what: str, ledger: Ledger) -> None:
        self.data = data
        self.size = len(data)
        self.what = what
        self.ledger = ledger
        self.budget: Budget = ledger.budget(self.size, "tflite")
        self.base = ledger.base
        self.marks = ledger.marks(self.size)
        # Position → size of the table, places of its fields.
        self._vtables: Dict[int, Tuple[int, Tuple[int, ...]]] = {}
        self._plans: Dict[int, Dict[int, _Plan]] = {}
        # What is called a hundred thousand times for a large file: made here, with all that it needs at hand.
        self.record: _Record = _record(self)
        self.skipped_at: _Skipped = _skipped(self)
        self.numbers_at: _Numbers = _numbers(self)

    def root(self, identifier: bytes = b"") -> "Table":
        """The first table; raises Malformed when the identifier is another one."""
        if self.size < 8:
            raise self.broken("ends inside its header", self.size)
        found = bytes(self.data[4:8])
        if identifier and found != identifier:
            raise Malformed(f"{self.what} is marked {found!r} and not {identifier!r}")
        (start,) = _SIZE.unpack_from(self.data, 0)
        self.mark(0, 8 if identifier else 4, GRAPH)
        return self.table_at(start)

    def broken(self, how: str, at: int) -> Malformed:
        """The error to raise: ``how`` continues the name of the buffer."""
        return Malformed(
            f"{self.what} {how} (byte {at} of {self.size}): the file is truncated or damaged; copy it again"
        )

    def mark(self, start: int, stop: int, purpose: str) -> None:
        """Notes what the bytes serve that are no content: those of tables, lists and names."""
        self.mark_as(start, stop, self.ledger.number(purpose))

    def mark_as(self, start: int, stop: int, number: int) -> None:
        """The same by the number of the purpose in the ledger."""
        size = min(stop, self.size) - start
        start += self.base
        if 0 <= size < _SHORT_MARK:
            self.marks[start : start + size] = _MARKS[number][size]
        elif size > 0:
            self.budget.look(size, self.what)
            self.marks[start : start + size] = bytes((number,)) * size

    # ---- tables

    def vtable_of(self, at: int) -> int:
        """Where the description of the table at ``at`` is, which may be anywhere; takes steps."""
        budget = self.budget
        budget.steps_left -= _STEPS_PER_TABLE
        if budget.steps_left < 0:
            budget.exhausted(self.what)
        if at < 0 or at + 4 > self.size:
            raise self.broken("points outside the file", at)
        vtable: int = at - _BACK.unpack_from(self.data, at)[0]
        return vtable

    def plan(self, vtable: int, fields: Fields) -> _Plan:
        """How the fields are read of tables with this description; kept for the next of them."""
        size, offsets = self._description(vtable)
        places = tuple([offsets[field] if field < len(offsets) else 0 for field, _, _ in fields.fields])
        kinds = [struct.Struct("<" + letter) for _, letter, _ in fields.fields]
        defaults = tuple([default for _, _, default in fields.fields])
        for place, kind in zip(places, kinds):
            if place and (place < 4 or place + kind.size > size):
                raise self.broken("has a field outside its table", vtable)
        present = sorted((place, index) for index, place in enumerate(places) if place)
        layout, end = "<", 0
        for place, index in present:
            if place < end:
                break
            layout += f"{place - end}x{fields.fields[index][1]}"
            end = place + kinds[index].size
        else:
            order = [len(present) + index for index in range(len(places))]
            for position, (_, index) in enumerate(present):
                order[index] = position
            return self._keep(vtable, fields, (size, _together(layout, defaults, order), places))
        return self._keep(vtable, fields, (size, _one_by_one(places, kinds, defaults), places))

    def _keep(self, vtable: int, fields: Fields, plan: _Plan) -> _Plan:
        self._plans.setdefault(fields.number, {})[vtable] = plan
        return plan

    def _description(self, at: int) -> Tuple[int, Tuple[int, ...]]:
        """(size of the table, places of its fields) of the vtable at ``at``."""
        known = self._vtables.get(at)
        if known is not None:
            return known
        if at < 0 or at + 4 > self.size:
            raise self.broken("points outside the file", at)
        own_size, table_size = _PAIR.unpack_from(self.data, at)
        if own_size < 4 or own_size % 2 or at + own_size > self.size or table_size < 4:
            raise self.broken("has a broken table description", at)
        self.budget.spend(_STEPS_PER_DESCRIPTION, self.what)
        self.budget.look(own_size, self.what)
        count = min(own_size // 2 - 2, _MOST_FIELDS)
        self.mark(at, at + own_size, GRAPH)
        found = table_size, struct.unpack_from(f"<{count}H", self.data, at + 4)
        self._vtables[at] = found
        return found

    def table_at(self, at: int, purpose: str = GRAPH) -> "Table":
        """The table at a position."""
        self.budget.steps_left -= _STEPS_PER_FIELDS
        size, fields = self._description(self.vtable_of(at))
        if at + size > self.size:
            raise self.broken("has a table that ends outside the file", at)
        number = self.ledger.number(purpose)
        self.mark_as(at, at + size, number)
        return Table(self, at, size, fields, purpose, number)

    # ---- vectors

    def vector_at(self, at: int, width: int, visit: bool) -> Tuple[int, int]:
        """(position of the first element, number of elements) of the vector at ``at``; takes steps.

        ``visit`` says that its elements are going to be read.
        """
        if at < 0 or at + 4 > self.size:
            raise self.broken("points outside the file", at)
        count: int = _SIZE.unpack_from(self.data, at)[0]
        if at + 4 + count * width > self.size:
            raise self.broken(f"has a list of {count} that ends outside the file", at)
        budget = self.budget
        budget.steps_left -= _STEPS_PER_VECTOR
        if visit:
            budget.bytes_left -= count * width + 4
            if budget.bytes_left < 0:
                budget.look(0, self.what)
            if count >= _ELEMENTS_PER_STEP:
                # The longest vectors are of bytes and never looked at one by one.
                budget.steps_left -= count // (_BYTES_PER_STEP if width == 1 else _ELEMENTS_PER_STEP)
        if budget.steps_left < 0:
            budget.exhausted(self.what)
        return at + 4, count

    def text_at(self, at: int, number: int) -> str:
        """The string at ``at``, which is marked as ``number``. Bytes that are no UTF-8 are replaced."""
        start, count = self.vector_at(at, 1, True)
        # The closing zero is part of a string.
        self.mark_as(at, start + count + 1, number)
        return str(self.data[start : start + min(count, _LONGEST_NAME)], "utf-8", "replace")

    def places_at(self, at: int, number: int) -> List[int]:
        """Where the things are that the vector of pointers at ``at`` points to."""
        start, count = self.vector_at(at, 4, True)
        # Before a list of that length is made: each of them will take so many at least.
        if count * _STEPS_PER_TABLE > self.budget.steps_left:
            self.budget.exhausted(self.what)
        self.mark_as(at, start + 4 * count, number)
        offsets = struct.unpack_from(f"<{count}I", self.data, start)
        return [place + offset for place, offset in zip(range(start, start + 4 * count, 4), offsets)]


class Table:
    """One table. Fields are asked for by id; an absent one is the default, as in the schema."""

    __slots__ = ("_fields", "_number", "_size", "at", "buffer", "purpose")

    def __init__(
        self, buffer: FlatBuffer, at: int, size: int, fields: Tuple[int, ...], purpose: str, number: int
    ) -> None:
        self.buffer = buffer
        self.at = at
        self._size = size
        self._fields = fields
        self.purpose = purpose
        self._number = number

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

    def _marked(self, purpose: str) -> int:
        return self.buffer.ledger.number(purpose) if purpose else self._number

    def table(self, field: int, purpose: str = "") -> Optional["Table"]:
        """A table that the field points to; None when it is absent."""
        at = self._target(field)
        return self.buffer.table_at(at, purpose or self.purpose) if at else None

    def places(self, field: int, purpose: str = "") -> List[int]:
        """Where the tables of a vector of tables are."""
        at = self._target(field)
        return self.buffer.places_at(at, self._marked(purpose)) if at else []

    def tables(self, field: int, purpose: str = "") -> List["Table"]:
        """The tables of a vector of tables."""
        return [self.buffer.table_at(at, purpose or self.purpose) for at in self.places(field, purpose)]

    def text(self, field: int, purpose: str = NAMES) -> str:
        """A string; empty when it is absent. Bytes that are no UTF-8 are replaced."""
        at = self._target(field)
        return self.buffer.text_at(at, self._marked(purpose)) if at else ""

    def values(self, field: int, letter: str, width: int, purpose: str = "") -> Tuple[int, ...]:
        """The elements of a vector of numbers; ``letter`` is that of the struct module."""
        at = self._target(field)
        return self.buffer.numbers_at(at, letter, width, self._marked(purpose)) if at else ()

    def span(self, field: int, width: int = 1) -> Optional[Tuple[int, int]]:
        """(start, stop) of a vector's elements, which are not read; None when it is absent.

        The length before the elements is marked; the elements are left to the caller.
        """
        at = self._target(field)
        if not at:
            return None
        start, count = self.buffer.vector_at(at, width, False)
        self.buffer.mark_as(at, start, self._number)
        return start, start + width * count

    def fixed(self, field: int, size: int) -> None:
        """Marks the bytes of a value of fixed size that the field points to."""
        at = self._target(field)
        if at:
            if at + size > self.buffer.size:
                raise self.buffer.broken("has a value that ends outside the file", at)
            self.buffer.mark_as(at, at + size, self._number)

    def spans(self, field: int, purpose: str = "") -> List[Tuple[int, int]]:
        """(start, stop) of each element of a vector of strings, which are not read."""
        found = []
        for place in self.places(field):
            start, length = self.buffer.vector_at(place, 1, False)
            self.buffer.mark_as(place, start, self._marked(purpose))
            found.append((start, start + length))
        return found


_FORMATS: Dict[Tuple[str, int], struct.Struct] = {}
# Number of a purpose → runs of it by their length.
_MARKS = [[bytes((number,)) * size for size in range(_SHORT_MARK)] for number in range(16)]


def _record(buffer: FlatBuffer) -> _Record:
    data, size, base, marks, budget = buffer.data, buffer.size, buffer.base, buffer.marks, buffer.budget
    plans, back = buffer._plans, _BACK.unpack_from

    def record(at: int, fields: Fields, number: int) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
        budget.steps_left -= _STEPS_PER_TABLE
        if budget.steps_left < 0:
            budget.exhausted(buffer.what)
        if at < 0 or at + 4 > size:
            raise buffer.broken("points outside the file", at)
        vtable = at - back(data, at)[0]
        try:
            table_size, read, places = plans[fields.number][vtable]
        except KeyError:
            table_size, read, places = buffer.plan(vtable, fields)
        if at + table_size > size:
            raise buffer.broken("has a table that ends outside the file", at)
        if table_size < _SHORT_MARK:
            start = base + at
            marks[start : start + table_size] = _MARKS[number][table_size]
        else:
            buffer.mark_as(at, at + table_size, number)
        return read(data, at), places

    return record


def _skipped(buffer: FlatBuffer) -> _Skipped:
    data, size, base, marks, budget = buffer.data, buffer.size, buffer.base, buffer.marks, buffer.budget
    length = _SIZE.unpack_from

    def skipped_at(at: int, width: int, more: int, number: int) -> Tuple[int, int]:
        stop = size + 1
        if 0 <= at <= size - 4:
            stop = at + 4 + length(data, at)[0] * width
        run = stop + more - at
        if stop > size or run >= _SHORT_MARK:
            start, count = buffer.vector_at(at, width, True)
            stop = start + count * width
            buffer.mark_as(at, stop + more, number)
            return start, stop
        budget.steps_left -= _STEPS_PER_VECTOR
        budget.bytes_left -= run
        if budget.steps_left < 0:
            budget.exhausted(buffer.what)
        if budget.bytes_left < 0:
            budget.look(0, buffer.what)
        start = base + at
        # A text at the very end of the file may lack the zero behind it.
        if stop + more > size:
            run = size - at
        marks[start : start + run] = _MARKS[number][run]
        return at + 4, stop

    return skipped_at


def _numbers(buffer: FlatBuffer) -> _Numbers:
    data, size, base, marks, budget = buffer.data, buffer.size, buffer.base, buffer.marks, buffer.budget
    length = _SIZE.unpack_from

    def numbers_at(at: int, letter: str, width: int, number: int) -> Tuple[int, ...]:
        count = length(data, at)[0] if 0 <= at <= size - 4 else _SHORT
        if count >= _SHORT or at + 4 + count * width > size:
            start, count = buffer.vector_at(at, width, True)
            buffer.mark_as(at, start + width * count, number)
            return struct.unpack_from(f"<{count}{letter}", data, start)
        run = 4 + width * count
        budget.steps_left -= _STEPS_PER_VECTOR
        budget.bytes_left -= run
        if budget.steps_left < 0:
            budget.exhausted(buffer.what)
        if budget.bytes_left < 0:
            budget.look(0, buffer.what)
        start = base + at
        marks[start : start + run] = _MARKS[number][run] if run < _SHORT_MARK else bytes((number,)) * run
        short = _FORMATS.get((letter, count)) or _format(letter, count)
        return short.unpack_from(data, at + 4)

    return numbers_at


def _format(letter: str, count: int) -> struct.Struct:
    return _FORMATS.setdefault((letter, count), struct.Struct(f"<{count}{letter}"))


def _together(
    layout: str, defaults: Tuple[int, ...], order: Sequence[int]
) -> Callable[[memoryview, int], Tuple[int, ...]]:
    """Reads all fields that are there, and puts them and the defaults of the others into order."""
    read: Callable[[memoryview, int], Tuple[int, ...]] = struct.Struct(layout).unpack_from
    values = sum(letter in "bBhHiIqQf" for letter in layout)
    if values == len(defaults) and list(order) == sorted(order):
        return read
    pick: Callable[[Tuple[int, ...]], Tuple[int, ...]] = itemgetter(*order)
    return lambda data, at: pick(read(data, at) + defaults)


def _one_by_one(
    places: Sequence[int], kinds: Sequence[struct.Struct], defaults: Sequence[int]
) -> Callable[[memoryview, int], Tuple[int, ...]]:
    """Reads fields that overlap, as no writer lays them out."""

    def read(data: memoryview, at: int) -> Tuple[int, ...]:
        return tuple(
            int(kind.unpack_from(data, at + place)[0]) if place else default
            for place, kind, default in zip(places, kinds, defaults)
        )

    return read


def claim_tree(roots: Sequence[Table], kind: str, schema: Mapping[str, Tuple[Pointer, ...]]) -> None:
    """Marks all that the tables point to, by a schema of only the pointers, and reads none of it."""
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
                    table.buffer.mark(span[0], span[1], table.purpose)
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
