"""TensorFlow Lite."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .flat import Flat, Place, places


@dataclass
class TfliteParts:
    """The frame of a TensorFlow Lite file: lists to be filled."""

    flat: Flat
    codes: Place
    graphs: Place
    buffers: Place


def frame() -> TfliteParts:
    flat = Flat(b"TFL3")
    codes, graphs, buffers = places(3)
    flat.table(flat.top, {0: ("I", 3), 1: codes, 2: graphs, 4: buffers})
    return TfliteParts(flat, codes, graphs, buffers)


def with_codes(parts: TfliteParts, *codes: int | bytes) -> None:
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


def one_graph(
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


def with_buffers(parts: TfliteParts, *contents: bytes) -> None:
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
    parts = frame()
    flat = parts.flat
    with_codes(parts, 0)
    with_buffers(parts, b"")
    tensors, operators = one_graph(parts)
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
    parts = frame()
    with_codes(parts, 0)
    with_buffers(parts, b"")
    tensors, operators = one_graph(parts)
    tensor = Place()
    parts.flat.pointers(tensors, [tensor] * (size // 4))
    parts.flat.pointers(operators, [])
    parts.flat.table(tensor, {})
    return parts.flat.finish()


def tensors_described_apart(size: int) -> bytes:
    """Tensors, each with a description of its own, whose fields are in another order each time."""
    parts = frame()
    flat = parts.flat
    with_codes(parts, 0)
    with_buffers(parts, b"")
    count = size // 60
    tensors, operators = one_graph(parts)
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
    parts = frame()
    flat = parts.flat
    with_codes(parts, 0)
    with_buffers(parts, b"")
    count = size // 24
    tensors, operators = one_graph(parts, range(min(count, 5000)), range(min(count, 5000)))
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
        parts = frame()
        flat = parts.flat
        with_codes(parts, code)
        with_buffers(parts, b"", constant or b"\0")
        tensors, operators = one_graph(parts, [0], [1])
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
        parts = frame()
        flat = parts.flat
        with_codes(parts, 0)
        count = size // 2 // 40
        tables, vectors, found = places(count), places(count), places(count)
        flat.pointers(parts.buffers, tables)
        vtable = len(flat.data)
        flat.data += struct.pack("<HHH", 6, 8, 4) + bytes(2)
        for table, vector in zip(tables, vectors, strict=True):
            flat.same(table, vtable, 8, {4: vector})
        tensors, operators = one_graph(parts)
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
    parts = frame()
    flat = parts.flat
    with_codes(parts, 0)
    count = size // 40
    tables, found = places(count), places(count)
    flat.pointers(parts.buffers, tables)
    vtable = len(flat.data)
    flat.data += struct.pack("<HHH", 6, 8, 4) + bytes(2)
    for table in tables:
        vector = Place()
        flat.same(table, vtable, 8, {4: vector})
        flat.content(vector, b"\x01")
    tensors, operators = one_graph(parts)
    flat.pointers(tensors, found)
    flat.pointers(operators, [])
    vtable = len(flat.data)
    flat.data += struct.pack("<HHHHH", 10, 9, 0, 8, 4) + bytes(2)
    for number, tensor in enumerate(found):
        flat.same(tensor, vtable, 9, {4: ("I", number), 8: ("b", 9)})
    return flat.finish()


def tables_with_gaps(size: int) -> bytes:
    """Tables of four bytes with a byte between them that nobody refers to."""
    parts = frame()
    flat = parts.flat
    with_codes(parts, 0)
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
    parts = frame()
    flat = parts.flat
    with_codes(parts, 0)
    with_buffers(parts, b"")
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
    parts = frame()
    flat = parts.flat
    with_codes(parts, 0)
    with_buffers(parts, b"")
    tensors, operators = one_graph(parts, [0] * (size // 8), [0] * (size // 8))
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
}
