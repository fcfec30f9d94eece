"""TensorFlow Lite that the Edge TPU compiler has been at."""

from __future__ import annotations

import struct
from collections.abc import Callable

from .flat import Flat, Place, places
from .tflite import frame, one_graph, with_buffers, with_codes


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
    parts = frame()
    flat = parts.flat
    with_codes(parts, b"edgetpu-custom-op")
    with_buffers(parts, b"")
    tensors, operators = one_graph(parts, [0], [1])
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


DENSE: dict[str, Callable[[int], bytes]] = {
    "edgetpu layers and hints": _compiled(lambda size: _flexbuffer_map(1, _package(_executable(size)))),
    "edgetpu executables": _compiled(
        lambda size: _flexbuffer_map(1, _package(_executable(8), size // len(_executable(8))))
    ),
    "edgetpu options upon each other": options_upon_each_other,
    "edgetpu options shared": lambda size: _operators_with_options(
        size // 40, _flexbuffer_map(1, _package(_executable(8)))
    ),
}
