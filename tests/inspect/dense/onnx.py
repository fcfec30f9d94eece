"""ONNX."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .protobuf import field, number, varint


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


DENSE: dict[str, Callable[[int], bytes]] = {
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
}
