"""FlexBuffers, as far as options of operators need them: maps, vectors, strings and numbers.

The format: https://flatbuffers.dev/flexbuffers/. It is read from its end: the last byte is the width of the
root value, the one before its packed type (kind << 2 | log2 of the width of children), then the root value.
Values that are no number are offsets backwards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Dict, Optional, Tuple, Union

from boardbench.inspect.budget import Budget
from boardbench.inspect.errors import Malformed

_INT, _UINT, _FLOAT, _KEY, _STRING = 1, 2, 3, 4, 5
_INDIRECT_INT, _INDIRECT_UINT, _INDIRECT_FLOAT, _MAP, _VECTOR = 6, 7, 8, 9, 10
_VECTOR_INT, _VECTOR_UINT, _VECTOR_FLOAT, _VECTOR_KEY = 11, 12, 13, 14
_BLOB, _BOOL, _VECTOR_BOOL = 25, 26, 36
_SIGNED = {1: "<b", 2: "<h", 4: "<i", 8: "<q"}
_UNSIGNED = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}
_FLOATS = {2: "<e", 4: "<f", 8: "<d"}
_TYPED = {
    _VECTOR_INT: _INT,
    _VECTOR_UINT: _UINT,
    _VECTOR_FLOAT: _FLOAT,
    _VECTOR_KEY: _KEY,
    _VECTOR_BOOL: _BOOL,
}
# Options are small; what is larger is no map of options.
_MOST_VALUES = 10_000
_LONGEST_KEY = 256
_STEPS_PER_VALUE = 2


@dataclass(frozen=True)
class Span:
    """Bytes of a string or blob by their place in the buffer: they may be megabytes."""

    start: int
    stop: int


Value = Union[None, int, float, Span, Tuple["Value", ...], Dict[str, "Value"]]


def read_map(data: memoryview, budget: Optional[Budget] = None) -> Dict[str, Value]:
    """The map at the root of the buffer; raises Malformed when there is none. Each value takes a step."""
    size = len(data)
    if size < 3:
        raise Malformed("the operator's options are cut off")
    width, packed = data[size - 1], data[size - 2]
    at = size - 2 - width
    if width not in _UNSIGNED or at < 0:
        raise Malformed("the operator's options do not end as options do")
    value = _Reader(data, Budget(size) if budget is None else budget).value(at, width, packed, 0)
    if not isinstance(value, dict):
        raise Malformed("the operator's options are not a map")
    return value


class _Reader:
    __slots__ = ("_budget", "_data", "_left")

    def __init__(self, data: memoryview, budget: Budget) -> None:
        self._data = data
        self._budget = budget
        self._left = _MOST_VALUES

    def _number(self, formats: Dict[int, str], at: int, width: int) -> Union[int, float]:
        if width not in formats or at < 0 or at + width > len(self._data):
            raise Malformed(
                f"the operator's options point outside themselves (byte {at} of {len(self._data)})"
            )
        found: Union[int, float] = struct.unpack_from(formats[width], self._data, at)[0]
        return found

    def _unsigned(self, at: int, width: int) -> int:
        return int(self._number(_UNSIGNED, at, width))

    def _size_before(self, at: int, width: int, element_bytes: int) -> int:
        """The length that stands before the elements at ``at``."""
        count = self._unsigned(at - width, width)
        if at + count * element_bytes > len(self._data):
            raise Malformed(f"the operator's options hold a list that ends outside them (byte {at})")
        return count

    def value(self, at: int, width: int, packed: int, depth: int) -> Value:
        self._budget.spend(_STEPS_PER_VALUE, "the list of the operators' options")
        self._left -= 1
        if self._left < 0 or depth > 8:
            raise Malformed("the operator's options are too large or too deep to be options")
        kind, child_width = packed >> 2, 1 << (packed & 3)
        if kind == _INT:
            return self._number(_SIGNED, at, width)
        if kind in (_UINT, _BOOL):
            return self._number(_UNSIGNED, at, width)
        if kind == _FLOAT:
            return self._number(_FLOATS, at, width)
        if kind == 0:
            return None
        target = at - self._unsigned(at, width)
        if target < 0:
            raise Malformed(f"the operator's options point outside themselves (byte {at})")
        if kind == _INDIRECT_INT:
            return self._number(_SIGNED, target, child_width)
        if kind == _INDIRECT_UINT:
            return self._number(_UNSIGNED, target, child_width)
        if kind == _INDIRECT_FLOAT:
            return self._number(_FLOATS, target, child_width)
        if kind == _KEY:
            return Span(target, target + len(self._key(target)))
        if kind in (_STRING, _BLOB):
            return Span(target, target + self._size_before(target, child_width, 1))
        if kind == _MAP:
            return self._map(target, child_width, depth)
        if kind == _VECTOR:
            return self._vector(target, child_width, depth)
        if kind in _TYPED:
            count = self._size_before(target, child_width, child_width)
            element = _TYPED[kind] << 2
            return tuple(
                self.value(target + index * child_width, child_width, element, depth + 1)
                for index in range(count)
            )
        # Fixed vectors of two to four numbers, vectors of deprecated strings: in no options known here.
        return None

    def _key(self, at: int) -> str:
        if at < 0:
            raise Malformed("the operator's options have a name outside themselves")
        raw = bytes(self._data[at : at + _LONGEST_KEY])
        end = raw.find(b"\0")
        if end < 0:
            raise Malformed(f"the operator's options have a name without an end (byte {at})")
        return raw[:end].decode("utf-8", "replace")

    def _vector(self, at: int, width: int, depth: int) -> Tuple[Value, ...]:
        # A byte of type for each element follows the elements.
        count = self._size_before(at, width, width + 1)
        types = at + count * width
        return tuple(
            self.value(at + index * width, width, self._data[types + index], depth + 1)
            for index in range(count)
        )

    def _map(self, at: int, width: int, depth: int) -> Dict[str, Value]:
        keys_at = at - 3 * width
        keys = keys_at - self._unsigned(keys_at, width)
        key_width = self._unsigned(at - 2 * width, width)
        if key_width not in _UNSIGNED or keys < 0:
            raise Malformed(f"the operator's options have broken names (byte {at})")
        count = self._size_before(at, width, width + 1)
        if self._size_before(keys, key_width, key_width) != count or count > _MOST_VALUES:
            raise Malformed(f"the operator's options have {count} values and another number of names")
        values = self._vector(at, width, depth)
        found: Dict[str, Value] = {}
        for index in range(count):
            name_at = keys + index * key_width
            found[self._key(name_at - self._unsigned(name_at, key_width))] = values[index]
        return found
