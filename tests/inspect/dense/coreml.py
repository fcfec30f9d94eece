"""Core ML."""

from __future__ import annotations

from collections.abc import Callable

from .protobuf import field, number


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


DENSE: dict[str, Callable[[int], bytes]] = {
    "coreml layers": coreml_network,
    "coreml empty layers": coreml_empty_layers,
    "coreml operations": coreml_program,
    "coreml pipelines": coreml_pipelines,
    "coreml inputs": coreml_features,
}
