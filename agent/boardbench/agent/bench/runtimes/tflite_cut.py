"""A part of a TensorFlow Lite model as a model of its own, made by changing the file's bytes in place.

Only the main graph's lists of operations, inputs and outputs are changed; tensors, constants and all other
graphs stay, so tensors keep their numbers. The format: tensorflow/lite/schema/schema.fbs (field numbers
below) and https://flatbuffers.dev/internals/. Every offset points forwards, so a list of offsets can be
shortened where it is, and new lists can be put behind the end of the file.
"""

from __future__ import annotations

import struct
from typing import Mapping, Optional, Sequence, Tuple

_U16, _I32, _U32 = struct.Struct("<H"), struct.Struct("<i"), struct.Struct("<I")

_MODEL_CODES, _MODEL_SUBGRAPHS, _MODEL_METADATA, _MODEL_SIGNATURES = 1, 2, 6, 7
_GRAPH_TENSORS, _GRAPH_INPUTS, _GRAPH_OUTPUTS, _GRAPH_OPERATORS = 0, 1, 2, 3
_TENSOR_SHAPE = 0
_CODE_OLD, _CODE = 0, 3
# IF, WHILE, CALL_ONCE; from here on the operations of StableHLO, many of which have graphs for bodies.
_NAMES_GRAPHS = (118, 119, 129)
_FIRST_OF_STABLEHLO = 162


class CanNotCut(Exception):
    """The file can't be cut like this; the message says why."""


def cut(
    model: bytes,
    operators: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
    shapes: Optional[Mapping[int, Tuple[int, ...]]] = None,
) -> bytes:
    """The model with these operations of its main graph and no other, fed at ``inputs``.

    ``shapes`` sets the sizes of tensors, which have to keep their rank. Raises CanNotCut.
    """
    file = _File(model)
    try:
        root = file.follow(0)
        graph = file.follow(file.list(root, _MODEL_SUBGRAPHS)[0])
        file.keep(graph, _GRAPH_OPERATORS, operators)
        file.replace(graph, _GRAPH_INPUTS, inputs)
        file.replace(graph, _GRAPH_OUTPUTS, outputs)
        # They name inputs and number operations that are no longer there.
        file.empty(root, _MODEL_SIGNATURES)
        file.empty(root, _MODEL_METADATA)
        for tensor, shape in (shapes or {}).items():
            table = file.follow(file.list(graph, _GRAPH_TENSORS)[0] + 4 * tensor)
            if file.list(table, _TENSOR_SHAPE)[1] != len(shape):
                raise CanNotCut(f"tensor {tensor} has another number of dimensions in the file than in use")
            if shape:
                file.replace(table, _TENSOR_SHAPE, shape)
    except (struct.error, IndexError) as error:
        raise CanNotCut(f"the file points outside itself ({error})") from error
    return bytes(file.data)


def led_by(model: bytes, graph: int) -> bytes:
    """The model with another of its graphs for the main one, and no signatures. Raises CanNotCut.

    Not where operations name graphs by their numbers.
    """
    file = _File(model)
    try:
        root = file.follow(0)
        begin, count = file.list(root, _MODEL_CODES)
        for at in range(count):
            code = file.builtin_code(file.follow(begin + 4 * at))
            if code in _NAMES_GRAPHS or code >= _FIRST_OF_STABLEHLO:
                raise CanNotCut("it has control flow, whose bodies are graphs that are told by their numbers")
        begin, count = file.list(root, _MODEL_SUBGRAPHS)
        if not 0 <= graph < count:
            raise CanNotCut(f"it has {count} graphs, and none of the number {graph}")
        first, other = begin, begin + 4 * graph
        targets = file.follow(first), file.follow(other)
        _U32.pack_into(file.data, first, targets[1] - first)
        # Offsets point forwards, and both tables are behind the list.
        _U32.pack_into(file.data, other, targets[0] - other)
        file.empty(root, _MODEL_SIGNATURES)
        file.empty(root, _MODEL_METADATA)
    except (struct.error, IndexError) as error:
        raise CanNotCut(f"the file points outside itself ({error})") from error
    return bytes(file.data)


class _File:
    """The bytes, and the few steps in them that are needed."""

    def __init__(self, model: bytes) -> None:
        self.data = bytearray(model)

    def follow(self, at: int) -> int:
        """The position that the offset at ``at`` points to."""
        return at + int(_U32.unpack_from(self.data, at)[0])

    def field(self, table: int, number: int) -> int:
        """Position of a field of a table; 0 when it is absent."""
        vtable = table - int(_I32.unpack_from(self.data, table)[0])
        if 4 + 2 * number >= _U16.unpack_from(self.data, vtable)[0]:
            return 0
        offset = int(_U16.unpack_from(self.data, vtable + 4 + 2 * number)[0])
        return table + offset if offset else 0

    def list(self, table: int, number: int) -> Tuple[int, int]:
        """(position of the first element, number of elements) of a field that is a list; (0, 0) if absent."""
        at = self.field(table, number)
        if not at:
            return 0, 0
        begin = self.follow(at)
        return begin + 4, int(_U32.unpack_from(self.data, begin)[0])

    def builtin_code(self, table: int) -> int:
        """The number of an entry of the list of operation codes: the greater of an old byte and a field."""
        old, new = self.field(table, _CODE_OLD), self.field(table, _CODE)
        return max(
            struct.unpack_from("<b", self.data, old)[0] if old else 0,
            _I32.unpack_from(self.data, new)[0] if new else 0,
        )

    def keep(self, table: int, number: int, positions: Sequence[int]) -> None:
        """Shortens a list of tables to those at the positions, which rise."""
        begin, count = self.list(table, number)
        if positions and (positions[0] < 0 or positions[-1] >= count):
            raise CanNotCut(f"it has {count} operations, and not all of {list(positions)[:8]} are among them")
        targets = [self.follow(begin + 4 * position) for position in positions]
        if not begin:
            return
        _U32.pack_into(self.data, begin - 4, len(targets))
        for at, target in enumerate(targets):
            _U32.pack_into(self.data, begin + 4 * at, target - (begin + 4 * at))

    def replace(self, table: int, number: int, values: Sequence[int]) -> None:
        """Points a field that is a list of numbers to a new one behind the end of the file."""
        at = self.field(table, number)
        if not at:
            if not values:
                return
            raise CanNotCut(f"a list that is not in the file (field {number}) can't be set")
        self.data += bytes(-len(self.data) % 4)
        _U32.pack_into(self.data, at, len(self.data) - at)
        self.data += struct.pack(f"<I{len(values)}i", len(values), *values)

    def empty(self, table: int, number: int) -> None:
        """Empties a list where it is."""
        begin, count = self.list(table, number)
        if count:
            _U32.pack_into(self.data, begin - 4, 0)
