"""Files made to keep the readers busy: for each format the densest that we know how to build.

Every entry of DENSE makes a file of about the size that it is asked for. All of them are refused, or reported
on, within the budget of steps (boardbench/inspect/budget.py); what a step takes is measured by

    python tests/inspect/dense.py MEGABYTES [NAME…]        # the worst that files of that size take
"""

from __future__ import annotations

import io
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from boardbench.inspect.analyse import inspect_bytes
from boardbench.inspect.budget import Budget
from boardbench.inspect.errors import InspectError
from boardbench.inspect.sniff import sniff_bytes

# ---- FlatBuffers, laid out by hand: parents first, many pointers to one child ----------------------------


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


@dataclass
class TfliteParts:
    """The frame of a TensorFlow Lite file: lists to be filled."""

    flat: Flat
    codes: Place
    graphs: Place
    buffers: Place


def _tflite() -> TfliteParts:
    flat = Flat(b"TFL3")
    codes, graphs, buffers = places(3)
    flat.table(flat.top, {0: ("I", 3), 1: codes, 2: graphs, 4: buffers})
    return TfliteParts(flat, codes, graphs, buffers)


def _with_codes(parts: TfliteParts, *codes: int | bytes) -> None:
    flat = parts.flat
    tables = places(len(codes))
    flat.pointers(parts.codes, tables)
    for table, code in zip(tables, codes, strict=True):
        if isinstance(code, bytes):
            name = Place()
            flat.table(table, {0: ("b", 32), 1: name, 3: ("i", 32)})
            flat.content(name, code)
        else:
            flat.table(table, {0: ("b", min(code, 127)), 3: ("i", code)})


def _one_graph(
    parts: TfliteParts, inputs: Iterable[int] = (), outputs: Iterable[int] = ()
) -> tuple[Place, Place]:
    """Places for the tensors and the operations of the only graph."""
    flat, graph = parts.flat, Place()
    tensors, ins, outs, operators = places(4)
    flat.pointers(parts.graphs, [graph])
    flat.table(graph, {0: tensors, 1: ins, 2: outs, 3: operators})
    flat.numbers(ins, "i", inputs)
    flat.numbers(outs, "i", outputs)
    return tensors, operators


def _buffers(parts: TfliteParts, *contents: bytes) -> None:
    flat = parts.flat
    tables = places(len(contents))
    flat.pointers(parts.buffers, tables)
    for table, content in zip(tables, contents, strict=True):
        vector = Place()
        flat.table(table, {0: vector} if content else {})
        if content:
            flat.content(vector, content)


def tensors_shared(size: int) -> bytes:
    """One tensor with everything that a tensor can have, as often as there is room for pointers."""
    parts = _tflite()
    flat = parts.flat
    _with_codes(parts, 0)
    _buffers(parts, b"")
    tensors, operators = _one_graph(parts)
    tensor, shape, name, quantisation, sparsity, signature, variants = places(7)
    flat.pointers(tensors, [tensor] * (size // 4))
    flat.pointers(operators, [])
    flat.table(
        tensor,
        {
            0: shape, 1: ("b", 9), 2: ("I", 0), 3: name, 4: quantisation, 5: ("B", 1), 6: sparsity,
            7: signature, 8: ("B", 1), 9: variants,
        },
    )  # fmt: skip
    flat.numbers(shape, "i", [2] * 8)
    flat.numbers(signature, "i", [-1] * 8)
    flat.content(name, b"n")
    low, high, scales, points, details, weights = places(6)
    flat.table(quantisation, {0: low, 1: high, 2: scales, 3: points, 4: ("B", 1), 5: details, 6: ("i", 0)})
    for vector in (low, high, scales):
        flat.numbers(vector, "i", [1] * 4)
    flat.numbers(points, "q", [1] * 4)
    flat.table(details, {0: weights})
    flat.content(weights, b"w")
    order, blocks, dimensions, dimension, segments, indices = places(6)
    flat.table(sparsity, {0: order, 1: blocks, 2: dimensions})
    flat.numbers(order, "i", [1])
    flat.numbers(blocks, "i", [1])
    flat.pointers(dimensions, [dimension] * 2)
    flat.table(dimension, {2: ("B", 1), 3: segments, 4: ("B", 1), 5: indices})
    for table in (segments, indices):
        vector = Place()
        flat.table(table, {0: vector})
        flat.numbers(vector, "i", [1])
    variant, variant_shape = places(2)
    flat.pointers(variants, [variant] * 2)
    flat.table(variant, {0: variant_shape})
    flat.numbers(variant_shape, "i", [1])
    return flat.finish()


def tensors_bare(size: int) -> bytes:
    """Tensors with nothing in them: the cheapest table that leaves an object behind."""
    parts = _tflite()
    _with_codes(parts, 0)
    _buffers(parts, b"")
    tensors, operators = _one_graph(parts)
    tensor = Place()
    parts.flat.pointers(tensors, [tensor] * (size // 4))
    parts.flat.pointers(operators, [])
    parts.flat.table(tensor, {})
    return parts.flat.finish()


def tensors_described_apart(size: int) -> bytes:
    """Tensors, each with a description of its own, whose fields are in another order each time."""
    parts = _tflite()
    flat = parts.flat
    _with_codes(parts, 0)
    _buffers(parts, b"")
    count = size // 60
    tensors, operators = _one_graph(parts)
    found = places(count)
    flat.pointers(tensors, found)
    flat.pointers(operators, [])
    for number, tensor in enumerate(found):
        fields = [1, 5, 8, 2]
        for _ in range(number % 4):
            fields.append(fields.pop(0))
        flat.table(tensor, {field: ("B" if field != 2 else "I", 0) for field in fields})
    return flat.finish()


def tensors_with_long_names(size: int) -> bytes:
    """Tensors whose names begin side by side and are as long as names are read, of no valid letters."""
    parts = _tflite()
    flat = parts.flat
    _with_codes(parts, 0)
    _buffers(parts, b"")
    count = size // 24
    tensors, operators = _one_graph(parts, range(min(count, 5000)), range(min(count, 5000)))
    found, names = places(count), places(count)
    flat.pointers(tensors, found)
    flat.pointers(operators, [])
    vtable = len(flat.data)
    flat.data += struct.pack("<HH4H", 12, 8, 0, 0, 0, 4)
    for tensor, name in zip(found, names, strict=True):
        flat.same(tensor, vtable, 8, {4: name})
    for name in names:
        # Its length is the text of the one before.
        name.at = len(flat.data)
        flat.data += struct.pack("<I", 0xFFF)
    flat.data += b"\xff" * 5000
    return flat.finish()


def _operators(
    code: int | bytes,
    edges: int,
    options: bool = False,
    constant: bytes = b"",
    shape: Iterable[int] = (1, 8, 8, 4),
) -> Callable[[int], bytes]:
    """One operation of the type, with so many inputs and outputs, as often as there is room for."""

    def make(size: int) -> bytes:
        parts = _tflite()
        flat = parts.flat
        _with_codes(parts, code)
        _buffers(parts, b"", constant or b"\0")
        tensors, operators = _one_graph(parts, [0], [1])
        described = places(3)
        flat.pointers(tensors, described)
        operator, inputs, outputs, option = places(4)
        flat.pointers(operators, [operator] * ((size - len(constant)) // 4))
        fields: dict[int, tuple[str, int] | Place] = {0: ("I", 0), 1: inputs, 2: outputs}
        if options:
            fields |= {3: ("B", 1), 4: option}
        flat.table(operator, fields)
        # What is computed, the result, and a constant, all of eight bits.
        flat.numbers(inputs, "i", [0, *([2] if constant else [1] * (edges - 1))])
        flat.numbers(outputs, "i", [1] * (1 if constant else edges))
        if options:
            flat.table(option, dict.fromkeys(range(6), ("i", 1)))
        shape_vector, name = places(2)
        for number, tensor in enumerate(described):
            flat.table(tensor, {0: shape_vector, 1: ("b", 9), 2: ("I", 1 if number == 2 else 0), 3: name})
        flat.numbers(shape_vector, "i", shape)
        flat.content(name, b"n" * 40)
        return flat.finish()

    return make


def constants_upon_each_other(kind: int) -> Callable[[int], bytes]:
    """Constants that begin side by side and are each as long as half the file."""

    def make(size: int) -> bytes:
        parts = _tflite()
        flat = parts.flat
        _with_codes(parts, 0)
        count = size // 2 // 40
        tables, vectors, found = places(count), places(count), places(count)
        flat.pointers(parts.buffers, tables)
        vtable = len(flat.data)
        flat.data += struct.pack("<HHH", 6, 8, 4) + bytes(2)
        for table, vector in zip(tables, vectors, strict=True):
            flat.same(table, vtable, 8, {4: vector})
        tensors, operators = _one_graph(parts)
        flat.pointers(tensors, found)
        flat.pointers(operators, [])
        vtable = len(flat.data)
        flat.data += struct.pack("<HHHHH", 10, 9, 0, 8, 4) + bytes(2)
        for number, tensor in enumerate(found):
            flat.same(tensor, vtable, 9, {4: ("I", number), 8: ("b", kind)})
        rest = size // 2
        for vector in vectors:
            vector.at = len(flat.data)
            flat.data += struct.pack("<I", rest)
        flat.data += bytes((0, 0, 0, 1)) * (rest // 4 + 1)
        return flat.finish()

    return make


def constants_of_a_byte(size: int) -> bytes:
    """Tensors with a constant of their own each, of one byte."""
    parts = _tflite()
    flat = parts.flat
    _with_codes(parts, 0)
    count = size // 40
    tables, found = places(count), places(count)
    flat.pointers(parts.buffers, tables)
    vtable = len(flat.data)
    flat.data += struct.pack("<HHH", 6, 8, 4) + bytes(2)
    for table in tables:
        vector = Place()
        flat.same(table, vtable, 8, {4: vector})
        flat.content(vector, b"\x01")
    tensors, operators = _one_graph(parts)
    flat.pointers(tensors, found)
    flat.pointers(operators, [])
    vtable = len(flat.data)
    flat.data += struct.pack("<HHHHH", 10, 9, 0, 8, 4) + bytes(2)
    for number, tensor in enumerate(found):
        flat.same(tensor, vtable, 9, {4: ("I", number), 8: ("b", 9)})
    return flat.finish()


def tables_with_gaps(size: int) -> bytes:
    """Tables of four bytes with a byte between them that nobody refers to."""
    parts = _tflite()
    flat = parts.flat
    _with_codes(parts, 0)
    found = places(size // 9)
    flat.pointers(parts.buffers, found)
    flat.pointers(parts.graphs, [])
    vtable = len(flat.data)
    flat.data += struct.pack("<HH", 4, 4)
    for table in found:
        flat.same(table, vtable, 4, {})
        flat.data += b"\x07"
    return flat.finish()


def graphs_shared(size: int) -> bytes:
    """A graph of a few tensors and operations, as often as there is room for."""
    parts = _tflite()
    flat = parts.flat
    _with_codes(parts, 0)
    _buffers(parts, b"")
    graph, tensor, operator = places(3)
    flat.pointers(parts.graphs, [graph] * (size // 4))
    tensors, ins, operators, name = places(4)
    flat.table(graph, {0: tensors, 1: ins, 2: ins, 3: operators, 4: name})
    flat.pointers(tensors, [tensor])
    flat.numbers(ins, "i", [0])
    flat.pointers(operators, [operator])
    flat.content(name, b"graph")
    flat.table(tensor, {})
    flat.table(operator, {})
    return flat.finish()


def graph_of_inputs(size: int) -> bytes:
    """A graph that lists one tensor as its input as often as there is room for."""
    parts = _tflite()
    flat = parts.flat
    _with_codes(parts, 0)
    _buffers(parts, b"")
    tensors, operators = _one_graph(parts, [0] * (size // 8), [0] * (size // 8))
    tensor, name, quantisation, scales, shape = places(5)
    flat.pointers(tensors, [tensor])
    flat.pointers(operators, [])
    flat.table(tensor, {0: shape, 3: name, 4: quantisation})
    flat.numbers(shape, "i", [1] * 64)
    flat.content(name, b"n")
    flat.table(quantisation, {2: scales})
    flat.numbers(scales, "f", [1])
    return flat.finish()


def lists_beside_the_graphs(size: int) -> bytes:
    """Codes, metadata and signatures, each a table with texts, as often as there is room for."""
    flat = Flat(b"TFL3")
    codes, graphs, buffers, metadata, signatures, code, entry, signature = places(8)
    flat.table(flat.top, {1: codes, 2: graphs, 4: buffers, 6: metadata, 7: signatures})
    flat.pointers(codes, [code] * (size // 12))
    flat.pointers(graphs, [])
    flat.pointers(buffers, [])
    flat.pointers(metadata, [entry] * (size // 12))
    flat.pointers(signatures, [signature] * (size // 12))
    name, named = places(2)
    flat.table(code, {0: ("b", 32), 1: name, 2: ("i", 1), 3: ("i", 32)})
    flat.table(entry, {0: name, 1: ("I", 0)})
    flat.table(signature, {0: named, 1: named, 2: name, 4: ("I", 0)})
    flat.pointers(named, [])
    flat.content(name, b"name")
    return flat.finish()


def _flexbuffer_map(values: int, package: bytes) -> bytes:
    """A map with the package and a list of numbers, as the Edge TPU compiler's options are."""
    # Written by hand, from the end: keys, then the list, then the values of the map and their types.
    data = bytearray()
    keys = {}
    for key in ("4", "z"):
        keys[key] = len(data)
        data += key.encode() + b"\0"
    data += bytes(-len(data) % 4) + struct.pack("<I", len(package))
    package_at = len(data)
    data += package + b"\0"
    data += bytes(-len(data) % 4) + struct.pack("<I", values)
    list_at = len(data)
    data += bytes(4 * values)
    data += struct.pack("<I", 2)
    keys_at = len(data)
    for key in ("4", "z"):
        data += struct.pack("<I", len(data) - keys[key])
    data += struct.pack("<I", len(data) - keys_at)
    data += struct.pack("<I", 4)
    data += struct.pack("<I", 2)
    values_at = len(data)
    data += struct.pack("<I", len(data) - package_at)
    data += struct.pack("<I", len(data) - list_at)
    # A string, and a vector of signed numbers, both of four bytes.
    data += bytes((5 << 2 | 2, 11 << 2 | 2))
    data += struct.pack("<I", len(data) - values_at)
    return bytes(data) + bytes((9 << 2 | 2, 4))


def _package(executable: bytes, executables: int = 1) -> bytes:
    multi = Flat(b"\0\0\0\0")
    listed, content = places(2)
    multi.table(multi.top, {0: listed})
    contents = places(executables)
    multi.pointers(listed, contents)
    for content in contents:
        multi.content(content, executable)
    package = Flat(b"DWN1")
    inner = Place()
    package.table(package.top, {0: ("i", 13), 1: inner})
    package.content(inner, multi.finish())
    return package.finish()


def _executable(size: int) -> bytes:
    """Layers and hints of one table each, as often as there is room for."""
    flat = Flat(b"\0\0\0\0")
    layers, hints, bitstreams = places(3)
    flat.table(flat.top, {5: bitstreams, 7: hints, 8: layers, 13: ("h", 1)})
    layer, name, numerics, output, layout, shapes, shape, dimensions, vector = places(9)
    flat.pointers(layers, [layer] * max(1, size // 8))
    flat.table(layer, {0: name, 1: ("i", 4), 5: numerics, 7: ("B", 1), 8: output, 11: shape})
    flat.content(name, b"layer")
    flat.table(numerics, {0: ("i", 1)})
    flat.table(output, {0: layout, 2: shapes})
    flat.table(layout, dict.fromkeys(range(6), vector))
    flat.table(shapes, {1: vector})
    flat.table(shape, {0: dimensions})
    flat.numbers(dimensions, "q", [1])
    flat.numbers(vector, "i", [1])
    hint_list, hint, descriptor, meta, text = places(5)
    flat.table(hints, {0: hint_list})
    flat.pointers(hint_list, [hint] * max(1, size // 8))
    flat.table(hint, {0: ("B", 1), 1: descriptor})
    flat.table(descriptor, {0: meta})
    flat.table(meta, {2: text})
    flat.content(text, b"meta")
    flat.pointers(bitstreams, [])
    return flat.finish()


def _compiled(options: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """A compiled file of one node with the options."""

    def make(size: int) -> bytes:
        return _operators_with_options(1, options(size))

    return make


def _operators_with_options(count: int, options: bytes, step: int = 0) -> bytes:
    """Compiled nodes; with ``step``, the options of each begin so many bytes later and end where all do."""
    parts = _tflite()
    flat = parts.flat
    _with_codes(parts, b"edgetpu-custom-op")
    _buffers(parts, b"")
    tensors, operators = _one_graph(parts, [0], [1])
    described, found, contents = places(2), places(count), places(count)
    flat.pointers(tensors, described)
    flat.pointers(operators, found)
    inputs, outputs = places(2)
    fields = {0: ("I", 0), 1: inputs, 2: outputs, 5: contents[0]}
    flat.table(found[0], dict(fields))
    size = len(flat.data) - found[0].at
    vtable = found[0].at - struct.unpack_from("<i", flat.data, found[0].at)[0]
    places_of = struct.unpack_from("<6H", flat.data, vtable + 4)
    for operator, content in zip(found[1:], contents[1:], strict=True):
        flat.same(
            operator, vtable, size, {places_of[1]: inputs, places_of[2]: outputs, places_of[5]: content}
        )
    flat.numbers(inputs, "i", [0])
    flat.numbers(outputs, "i", [1])
    for number, tensor in enumerate(described):
        name = Place()
        flat.table(tensor, {1: ("b", 9), 3: name})
        flat.content(name, b"io"[number : number + 1])
    if not step:
        flat.content(contents[0], options)
        for content in contents[1:]:
            content.at = contents[0].at
        return flat.finish()
    end = len(flat.data) + count * step + len(options)
    for content in contents:
        content.at = len(flat.data)
        flat.data += struct.pack("<I", end - len(flat.data) - 4) + bytes(step - 4)
    flat.data += options
    return flat.finish()


def options_upon_each_other(size: int) -> bytes:
    """Compiled nodes whose options end together and are a list of numbers each."""
    return _operators_with_options(size // 80, _flexbuffer_map(8000, _package(_executable(8))), step=8)


# ---- protocol buffers ----------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """A number on the wire."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(number: int, value: int) -> bytes:
    """A field of a number."""
    return varint(number << 3) + varint(value)


def onnx_of(*graph: bytes, more: bytes = b"") -> bytes:
    """A model with the graph's fields."""
    return number(1, 8) + field(7, b"".join(graph) or field(2, b"g")) + more


def repeated(piece: bytes, around: Callable[[bytes], bytes] = onnx_of) -> Callable[[int], bytes]:
    """The piece as often as there is room for it."""
    return lambda size: around(piece * max(1, size // len(piece)))


def node(kind: str, inputs: Iterable[str] = (), outputs: Iterable[str] = (), *attributes: bytes) -> bytes:
    """A node in a graph's fields."""
    return field(
        1,
        b"".join(field(1, name.encode()) for name in inputs)
        + b"".join(field(2, name.encode()) for name in outputs)
        + field(4, kind.encode())
        + b"".join(field(5, attribute) for attribute in attributes),
    )


def constant(name: str, shape: Iterable[int], values: Iterable[int] = ()) -> bytes:
    """A constant of int64 in a graph's fields."""
    return field(
        5,
        field(1, b"".join(map(varint, shape)))
        + number(2, 7)
        + field(8, name.encode())
        + field(7, b"".join(varint(value & (1 << 64) - 1) for value in values)),
    )


def _after(*constants: bytes) -> Callable[[bytes], bytes]:
    return lambda rest: onnx_of(*constants, rest)


LONG = tuple(range(2, 66))
DEEP = (1,) * 15 + (2,)


def gathered_shapes(size: int) -> bytes:
    """Each node gathers by the shape of the one before, which doubles the dimensions."""
    pieces = [constant("v0", (2, 2, 2))]
    length, count = len(pieces[0]), 0
    while length < size:
        piece = node("Gather", (f"v{count}", f"v{count}"), (f"v{count + 1}",))
        pieces.append(piece)
        length += len(piece)
        count += 1
    return onnx_of(*pieces)


def graphs_in_graphs(size: int) -> bytes:
    """Nodes that hold graphs that hold nodes, as deep as is allowed."""
    inner = node("", (), ())
    for _ in range(7):
        inner = field(1, field(5, field(6, inner)))
    return onnx_of(inner * (size // len(inner)))


def coreml_network(size: int) -> bytes:
    """Layers of a neural network, each with empty weights."""
    layer = field(1, field(1, b"n") + field(100, field(90, field(1, b"") + field(31, b"")) + field(91, b"")))
    return number(1, 4) + field(2, b"") + field(500, layer * (size // len(layer)))


def coreml_empty_layers(size: int) -> bytes:
    """Layers of a neural network with nothing in them."""
    return number(1, 4) + field(2, b"") + field(500, b"\x0a\x00" * (size // 2))


def coreml_program(size: int) -> bytes:
    """Operations of a program, each with inputs, outputs and a value."""
    size_of = field(1, number(1, 3))
    kind = field(1, number(1, 11) + field(3, size_of) * 4)
    value = field(2, kind) + field(5, number(2, 64))
    operation = field(
        3,
        field(1, b"conv")
        + field(2, field(1, b"x") + field(2, field(1, field(1, b"x") + field(2, value))))
        + field(3, field(1, b"y") + field(2, kind))
        + field(5, field(1, b"val") + field(2, value)),
    )
    block = field(3, field(1, b"b") + field(2, operation * (size // len(operation))))
    return (
        number(1, 6)
        + field(2, b"")
        + field(502, field(2, field(1, b"main") + field(2, field(2, b"b") + block)))
    )


def coreml_pipelines(size: int) -> bytes:
    """Pipelines in pipelines, with as many models as there is room for."""
    inner = number(1, 4) + field(500, b"")
    for _ in range(6):
        inner = field(202, field(1, inner) * 2)
    return number(1, 4) + field(2, b"") + field(202, field(1, inner) * (size // len(inner)))


def coreml_features(size: int) -> bytes:
    """Inputs with shapes, as many as there is room for."""
    feature = field(1, field(1, b"x") + field(3, field(5, field(1, b"\1\2\3\4") + number(2, 65568))))
    return number(1, 4) + field(2, feature * (size // len(feature))) + field(500, b"")


# ---- XML ----------------------------------------------------------------------------


def xml_of(piece: str, around: str = "<layers>{}</layers>") -> Callable[[int], bytes]:
    """The piece as often as there is room for it."""
    return lambda size: (
        f'<net name="x" version="11">{around.format(piece * max(1, size // len(piece)))}</net>'.encode()
    )


LAYER = (
    '<layer id="1" name="n" type="MatMul"><data element_type="f32" shape="1,1" offset="0" size="4"/>'
    '<input><port id="0"><dim>1</dim><dim>2</dim></port><port id="1"><dim>1</dim></port></input>'
    '<output><port id="2" precision="FP32"><dim>1</dim><dim>2</dim></port></output></layer>'
)


def xml_long_element(size: int) -> bytes:
    """An element that is as long as the file."""
    return b'<net version="11"><layers a="' + b"a" * size + b'"></layers></net>'


def xml_many_attributes(size: int) -> bytes:
    """Elements with as many attributes as an element may be long."""
    element = "<data " + " ".join(f'a{number}=""' for number in range(40_000)) + "/>"
    layer = f'<layer id="0" name="" type="">{element}</layer>'
    return xml_of(layer)(size)


def xml_comments_before_the_root(size: int) -> bytes:
    """Comments of which an expression could tell in any number of ways where each ends."""
    return b"<!---->" * (size // 7)


# ---- archives ----------------------------------------------------------------------------


def archive_of(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A ZIP archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def archive_of_empty_files(size: int) -> bytes:
    """As many files as are listed, or as there is room for, with nothing in them."""
    count = min(size // 100, 49_990)
    return archive_of(
        ("m/data.pkl", b"\x80\x02}."), *((f"m/code/{number}.py", b"") for number in range(count))
    )


def archive_upon_itself(size: int) -> bytes:
    """Entries that all lie upon the same packed bytes, each of which unpacks to much more."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    text = b"torch.a(" * (1 << 17)
    packed = packer.compress(text) + packer.flush()
    head = (
        b"PK\x03\x04"
        + struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(packed), len(text), 6, 0)
        + b"m/c.py"
    )
    directory = b""
    count = min((size - len(packed)) // 62, 49_000)
    for number_of in range(count):
        name = f"m/code/{number_of:05d}.py".encode()
        directory += (
            b"PK\x01\x02"
            + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0)
            + struct.pack("<IIIHHHHHII", 0, len(packed), len(text), len(name), 0, 0, 0, 0, 0, 0)
            + name
        )
    end = b"PK\x05\x06" + struct.pack(
        "<HHHHIIH", 0, 0, count & 0xFFFF, count & 0xFFFF, len(directory), len(head) + len(packed), 0
    )
    return head + packed + directory + end


def archive_of_constants_upon_each_other(size: int) -> bytes:
    """Entries of raw tensors that all hold most of the file."""
    raw = bytes(size // 2)
    head = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, len(raw), len(raw), 6, 0) + b"m/data"
    count = min(size // 2 // 70, 9000)
    calls = b"".join(
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nShortStorage\nX"
        + struct.pack("<I", 5)
        + f"{number_of:05d}".encode()
        + b"X\x03\x00\x00\x00cpuK\x01tQtR0"
        for number_of in range(count)
    )
    pickle = b"\x80\x02" + calls + b"}."
    pickled = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, len(pickle), len(pickle), 10, 0)
    body = head + raw + pickled + b"m/data.pkl" + pickle
    directory = b""
    entries = [(f"m/data/{number_of:05d}", len(raw), 0) for number_of in range(count)]
    entries.append(("m/data.pkl", len(pickle), len(head) + len(raw)))
    entries.append(("m/code/x.py", 0, 0))
    for name, length, at in entries:
        directory += (
            b"PK\x01\x02"
            + struct.pack("<HHHHHH", 20, 20, 0, 0, 0, 0)
            + struct.pack("<IIIHHHHHII", 0, length, length, len(name), 0, 0, 0, 0, 0, at)
            + name.encode()
        )
    total = len(entries)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, total, total, len(directory), len(body), 0)
    return body + directory + end


def pickle_of(piece: bytes, before: bytes = b"", after: bytes = b".") -> Callable[[int], bytes]:
    """An archive with a pickle of the piece, as often as there is room for."""
    return lambda size: archive_of(
        ("m/data.pkl", b"\x80\x02" + before + piece * (size // len(piece)) + after), ("m/code/x.py", b"")
    )


def pickle_packed(size: int) -> bytes:
    """A pickle that unpacks to a thousand times its size."""
    return archive_of(
        ("m/data.pkl", b"\x80\x02" + b"]0" * (size * 7) + b"}."),
        ("m/code/x.py", b""),
        method=zipfile.ZIP_DEFLATED,
    )


def bytecode_shared(size: int) -> bytes:
    """A function of many instructions, which the pickle holds as often as there is room for."""
    operators = b"((X\x01\x00\x00\x00aX\x00\x00\x00\x00ttq\x01"
    instruction = b"(X\x02\x00\x00\x00OPK\x00K\x00tq\x02"
    instructions = b"(" + instruction + b"h\x02" * (size // 4) + b"tq\x03"
    function = (
        b"(X\x01\x00\x00\x00f((X\x09\x00\x00\x00operatorsh\x01t(X\x0c\x00\x00\x00instructionsh\x03tttq\x04"
    )
    content = operators + b"0" + instructions + b"0" + b"(" + function + b"h\x04" * (size // 4) + b"t."
    return archive_of(("m/bytecode.pkl", b"\x80\x02" + content), ("m/data.pkl", b"\x80\x02}."))


def source_of_calls(size: int) -> bytes:
    """Source text that is nothing but calls."""
    return archive_of(("m/data.pkl", b"\x80\x02}."), ("m/code/x.py", b"torch.a(" * (size // 8)))


# ---- ExecuTorch ----------------------------------------------------------------------------


def executorch(
    values: int = 1, instructions: int = 1, arguments: int = 1, frames: int = 1, constants: bool = False
) -> Callable[[int], bytes]:
    """A program of one plan, whose lists point to one thing each, in these shares of the room."""
    shares = values + instructions + frames

    def make(size: int) -> bytes:
        flat = Flat(b"ET12")
        plans, plan, listed, chains, chain, operators, operator, inline = places(8)
        flat.table(flat.top, {1: plans, 2: inline})
        flat.pointers(plans, [plan])
        ins = Place()
        flat.table(plan, {2: listed, 3: ins, 4: ins, 5: chains, 6: operators})
        flat.numbers(ins, "i", [0])
        value, tensor, shape, order, planned, name = places(6)
        distinct = places(size // 64) if constants else []
        flat.pointers(listed, [value] * (values * size // 4 // shares) if not constants else distinct)
        flat.pointers(chains, [chain])
        listed_instructions, instruction, frame_list, frame, inner = places(5)
        flat.table(chain, {2: listed_instructions, 3: frame_list})
        flat.pointers(listed_instructions, [instruction] * (instructions * size // 4 // shares))
        flat.pointers(frame_list, [frame] * (frames * size // 4 // shares))
        call, given = places(2)
        flat.table(instruction, {0: ("B", 1), 1: call})
        flat.table(call, {0: ("i", 0), 1: given})
        flat.numbers(given, "i", [0] * arguments)
        flat.table(frame, {0: inner})
        entry = Place()
        flat.pointers(inner, [entry])
        flat.table(entry, {0: name, 2: name, 3: name})
        flat.pointers(operators, [operator])
        flat.table(operator, {0: name, 1: name})
        for number_of, each in enumerate(distinct):
            own = Place()
            flat.table(each, {0: ("B", 5), 1: own})
            flat.table(own, {0: ("b", 2), 2: shape, 5: ("I", number_of)})
        if not constants:
            flat.table(value, {0: ("B", 5), 1: tensor})
            flat.table(tensor, {0: ("b", 6), 2: shape, 3: order, 5: ("I", 1), 6: planned})
        flat.numbers(shape, "i", [size // 8] if constants else [1, 2, 3, 4])
        flat.numbers(order, "B", [0, 1, 2, 3])
        flat.table(planned, {0: ("I", 0)})
        flat.content(name, b"n")
        blobs = places(len(distinct))
        flat.pointers(inline, blobs)
        contents = places(len(distinct))
        for blob, content in zip(blobs, contents, strict=True):
            flat.table(blob, {0: content})
        for content in contents:
            content.at = len(flat.data)
            flat.data += struct.pack("<I", size // 4)
        flat.data += bytes(size // 4 + 4) if constants else b""
        return flat.finish()

    return make


# ---- PyTorch Mobile ------------------------------------------------------------------------


def torch_mobile(kind: int) -> Callable[[int], bytes]:
    """A list of values of the kind, which are all one, as often as there is room for."""

    def make(size: int) -> bytes:
        flat = Flat(b"PTMF")
        chosen, values, method, function, entry, value = places(6)
        flat.table(flat.top, {0: ("I", 9), 2: chosen, 4: values})
        flat.numbers(chosen, "I", [0])
        flat.pointers(values, [method, *([entry] * (size // 8))])
        flat.table(method, {0: ("B", 16), 1: function})
        operators, operator, instructions, name = places(4)
        flat.table(function, {0: name, 1: instructions, 2: operators})
        flat.pointers(operators, [operator])
        flat.table(operator, {0: name, 1: name})
        flat.table(entry, {0: ("B", kind), 1: value})
        listed, scales, quantised = places(3)
        if kind == 5:
            flat.table(value, {1: ("b", 6), 3: listed, 4: listed, 6: quantised})
            flat.table(quantised, {3: scales, 4: scales})
            flat.table(scales, {1: ("b", 6), 3: listed, 4: listed})
        elif kind == 16:
            again, other = places(2)
            flat.table(value, {0: name, 1: instructions, 2: again})
            flat.pointers(again, [other])
            flat.table(other, {0: name, 1: name})
        else:
            flat.table(value, {0: listed, 1: name, 2: listed})
        flat.numbers(listed, "I", [1, 2, 3, 4])
        flat.content(name, b"name.forward")
        # Instructions of eight bytes, each of which runs the only operation.
        instructions.at = len(flat.data)
        flat.data += struct.pack("<I", 8 if kind == 16 else size // 16)
        flat.data += bytes(8 * (size // 16))
        return flat.finish()

    return make


DENSE: dict[str, Callable[[int], bytes]] = {
    "tflite tensors shared": tensors_shared,
    "tflite tensors bare": tensors_bare,
    "tflite tensors described apart": tensors_described_apart,
    "tflite tensors with long names": tensors_with_long_names,
    "tflite operators bare": _operators(0, 1),
    "tflite operators of many edges": _operators(0, 2000),
    "tflite operators that are judged": _operators(25, 1, options=True),
    "tflite operators that are costed": _operators(3, 3, options=True),
    "tflite operators of many dimensions": _operators(0, 40, shape=[1] * 64),
    "tflite operators with constants": _operators(2, 2, constant=b"\0" * 100_000),
    "tflite operators nobody knows": _operators(b"name" * 300, 1),
    "tflite constants upon each other, int16": constants_upon_each_other(7),
    "tflite constants upon each other, float64": constants_upon_each_other(10),
    "tflite constants of a byte": constants_of_a_byte,
    "tflite tables with gaps": tables_with_gaps,
    "tflite graphs shared": graphs_shared,
    "tflite graph of inputs": graph_of_inputs,
    "tflite lists beside the graphs": lists_beside_the_graphs,
    "edgetpu layers and hints": _compiled(lambda size: _flexbuffer_map(1, _package(_executable(size)))),
    "edgetpu executables": _compiled(
        lambda size: _flexbuffer_map(1, _package(_executable(8), size // len(_executable(8))))
    ),
    "edgetpu options upon each other": options_upon_each_other,
    "edgetpu options shared": lambda size: _operators_with_options(
        size // 40, _flexbuffer_map(1, _package(_executable(8)))
    ),
    "onnx empty nodes": repeated(b"\x0a\x00"),
    "onnx nodes of empty names": repeated(field(1, b"\x0a\x00" * 50 + b"\x12\x00" * 50)),
    "onnx nodes of empty attributes": repeated(field(1, b"\x2a\x00" * 100)),
    "onnx attributes of numbers": repeated(field(1, field(5, field(8, b"\x01" * 100)))),
    "onnx empty constants": repeated(b"\x2a\x00"),
    "onnx constants of small values": repeated(
        field(5, field(1, b"\x01") + number(2, 1) + field(9, b"\0\0\0\1"))
    ),
    "onnx values": repeated(field(13, field(2, field(1, field(2, field(1, number(1, 3)) * 4))))),
    "onnx empty values": repeated(b"\x6a\x00"),
    "onnx sparse constants": repeated(field(15, field(1, b"") + field(2, b""))),
    "onnx functions": lambda size: onnx_of(more=field(25, b"\x3a\x00" * (size // 2))),
    "onnx opsets": lambda size: onnx_of(more=field(8, field(1, b"d") + number(2, 1)) * (size // 7)),
    "onnx convolutions": repeated(
        node(
            "Conv",
            ("x", "w"),
            ("x",),
            *(field(1, name) + field(8, b"\1\1") for name in (b"strides", b"dilations", b"kernel_shape")),
            field(1, b"pads") + field(8, b"\1\1\1\1"),
        ),
        _after(constant("x", (1, 3, 8, 8)), constant("w", (3, 3, 3, 3))),
    ),
    "onnx arithmetic on sizes": repeated(
        node("Mul", ("a", "b"), ("c",)), _after(constant("a", (64,), LONG), constant("b", (64,), LONG))
    ),
    "onnx broadcasts of many dimensions": repeated(
        node("Sum", ["a"] * 30, ["c"]), _after(constant("a", DEEP))
    ),
    "onnx reshapes": repeated(
        node("Reshape", ("a", "b"), ("c",)),
        _after(constant("a", (1,) * 15 + (64,)), constant("b", (16,), DEEP)),
    ),
    "onnx splits": lambda size: onnx_of(
        constant("a", (size // 6, 2)),
        field(1, field(1, b"a") + b"\x12\x01b" * (size // 3) + field(4, b"Split")),
    ),
    "onnx joins of one": lambda size: onnx_of(
        constant("a", (1,) * 16), node("Sum", ["a"] * (size // 6), ["b"] * (size // 6))
    ),
    "onnx shapes of shapes": gathered_shapes,
    "onnx graphs in graphs": graphs_in_graphs,
    "coreml layers": coreml_network,
    "coreml empty layers": coreml_empty_layers,
    "coreml operations": coreml_program,
    "coreml pipelines": coreml_pipelines,
    "coreml inputs": coreml_features,
    "openvino layers": xml_of(LAYER),
    "openvino bare layers": xml_of("<layer/>"),
    "openvino bare elements": xml_of("<a/>"),
    "openvino edges": xml_of("<edge/>", "<edges>{}</edges>"),
    "openvino dimensions": xml_of(
        "<dim>1</dim>", "<layers><layer><output><port>{}</port></output></layer></layers>"
    ),
    "openvino lines": xml_of(
        "\n", "<layers><layer><output><port><dim>{}</dim></port></output></layer></layers>"
    ),
    "openvino letters": xml_of(
        "&lt;", "<layers><layer><output><port><dim>{}</dim></port></output></layer></layers>"
    ),
    "openvino deep": xml_of("<a><a><a><a><a><a><a><a></a></a></a></a></a></a></a></a>"),
    "openvino long element": xml_long_element,
    "openvino many attributes": xml_many_attributes,
    "openvino comments": xml_of("<!---->"),
    "openvino comments before the root": xml_comments_before_the_root,
    "torchscript empty files": archive_of_empty_files,
    "torchscript files upon each other": archive_upon_itself,
    "torchscript constants upon each other": archive_of_constants_upon_each_other,
    "torchscript pickle of nothing": pickle_of(b"N0"),
    "torchscript pickle of lists": pickle_of(b"]"),
    "torchscript pickle of dictionaries": pickle_of(b"}"),
    "torchscript pickle of tuples": pickle_of(b"\x85", b"N"),
    "torchscript pickle of numbers": pickle_of(b"G\0\0\0\0\0\0\0\0"),
    "torchscript pickle of calls": pickle_of(b"ca\nb\n)R"),
    "torchscript pickle of keys": pickle_of(b"K\1Ns", b"}"),
    "torchscript pickle packed": pickle_packed,
    "torchscript functions shared": bytecode_shared,
    "torchscript calls": source_of_calls,
    "torch mobile tensors": torch_mobile(5),
    "torch mobile lists": torch_mobile(7),
    "torch mobile functions": torch_mobile(16),
    "executorch values": executorch(values=20),
    "executorch instructions": executorch(instructions=20),
    "executorch arguments": executorch(instructions=20, arguments=500),
    "executorch frames": executorch(frames=20),
    "executorch constants upon each other": executorch(constants=True),
}


def padded(data: bytes, size: int) -> bytes:
    """The file with something at its end that costs nothing, so that its size allows more steps."""
    missing = size - len(data)
    if missing <= 16:
        return data
    if data[4:8] in (b"TFL3", b"ET12", b"PTMF"):
        return data + bytes(missing)
    if data.startswith(b"<"):
        return data + b" " * missing
    if data.startswith(b"PK"):
        # In front of the directory lies what nobody lists.
        at = struct.unpack_from("<I", data, data.rindex(b"PK\x05\x06") + 16)[0]
        end = data.rindex(b"PK\x05\x06")
        return (
            data[:at]
            + bytes(missing)
            + data[at : end + 16]
            + struct.pack("<I", at + missing)
            + data[end + 20 :]
        )
    # The documentation of an ONNX model; Core ML has no such field.
    return data + field(6, bytes(missing))


@dataclass
class Effort:
    """What became of a file, and what it took."""

    name: str
    size_bytes: int
    seconds: float
    steps: int
    most_steps: int
    peak_bytes: int
    outcome: str


def attempt(name: str, data: bytes, *, memory: bool = False) -> Effort:
    """Inspects the file; with ``memory`` the time means nothing."""
    view = memoryview(data)
    budget = Budget(len(data), sniff_bytes(view))
    if memory:
        tracemalloc.start()
    begin = time.process_time()
    try:
        report = inspect_bytes(name, view, target="edgetpu" if data[4:8] == b"TFL3" else "", budget=budget)
        assert sum(use.size_bytes for use in report.bytes) == report.size_bytes
        outcome = f"{report.op_count} operations"
    except InspectError as error:
        outcome = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - begin
    peak = 0
    if memory:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return Effort(name, len(data), seconds, budget.steps, budget.most_steps, peak, outcome)


def worst(name: str, size: int) -> tuple[Effort, int]:
    """The most that files of this kind and size take, and how much of the file is dense then.

    What is refused at once took little; the most is taken by what is nearly too much, or just is.
    """
    found: tuple[Effort, int] | None = None
    dense = float(size)
    while dense > 20_000:
        data = padded(DENSE[name](int(dense)), size)
        effort = attempt(name, data)
        if found is None or effort.seconds > found[0].seconds:
            found = (effort, int(dense))
        elif effort.seconds < found[0].seconds / 4 and found[0].steps > found[0].most_steps // 2:
            break
        dense /= 1.7
    assert found is not None
    return found


if __name__ == "__main__":
    chosen = [name for name in DENSE if not sys.argv[2:] or any(word in name for word in sys.argv[2:])]
    for name in chosen:
        found, dense = worst(name, int(float(sys.argv[1]) * (1 << 20)))
        peak = attempt(name, padded(DENSE[name](dense), found.size_bytes), memory=True).peak_bytes
        print(  # noqa: T201
            f"{name:42} {dense / 1e6:6.2f} of {found.size_bytes / 1e6:5.1f} MB {found.seconds:6.3f} s "
            f"{found.steps:8} steps {found.seconds / max(1, found.steps) * 1e9:6.0f} ns/step "
            f"{peak / found.size_bytes:5.1f}x {found.outcome[:60]}",
            flush=True,
        )
