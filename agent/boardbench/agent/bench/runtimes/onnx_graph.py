"""The nodes of an ONNX file, and a node of it as a model of its own.

Format: onnx/onnx ``onnx/onnx.proto`` (field numbers below). Messages are copied as bytes, so that nothing of
a node is lost, and no package is needed that a board may not have.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Set, Tuple

_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSETS = 1, 7, 8
_GRAPH_NODES, _GRAPH_NAME, _GRAPH_CONSTANTS, _GRAPH_INPUTS, _GRAPH_OUTPUTS = 1, 2, 5, 11, 12
_NODE_INPUTS, _NODE_OUTPUTS, _NODE_NAME, _NODE_TYPE, _NODE_ATTRIBUTES, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_GRAPHS = (6, 11)
_TENSOR_NAME, _TENSOR_LOCATION = 8, 14

# As a profile of ONNX Runtime spells types: (TensorProto.DataType, bytes of an element).
ELEMENTS: Mapping[str, Tuple[int, int]] = {
    "float": (1, 4),
    "uint8": (2, 1),
    "int8": (3, 1),
    "uint16": (4, 2),
    "int16": (5, 2),
    "int32": (6, 4),
    "int64": (7, 8),
    "bool": (9, 1),
    "float16": (10, 2),
    "double": (11, 8),
    "uint32": (12, 4),
    "uint64": (13, 8),
    "bfloat16": (16, 2),
}

NEIGHBOUR = "boardbench_neighbour"
"""Names of what is put around a node begin with it."""

Typed = Tuple[str, Tuple[int, ...]]
"""Element as in ELEMENTS, and sizes."""


@dataclass(frozen=True)
class FileNode:
    """A node of the main graph; an empty name among the tensors is an optional one that is left out."""

    index: int
    name: str
    op_type: str
    domain: str
    inputs: Tuple[str, ...]
    outputs: Tuple[str, ...]
    content: bytes
    nested: bool
    """Whether it holds graphs, which may read tensors that are not among its inputs."""


@dataclass(frozen=True)
class Graph:
    """The main graph of a file."""

    nodes: Tuple[FileNode, ...]
    constants: Mapping[str, bytes]
    external: Set[str]
    """Constants that are in other files."""

    ir_version: int
    opsets: Tuple[bytes, ...]

    def computed(self) -> Tuple[FileNode, ...]:
        """The nodes without those whose result does not depend on any input."""
        known = set(self.constants)
        found: List[FileNode] = []
        for node in self.nodes:
            if not node.nested and all(not name or name in known for name in node.inputs):
                known.update(node.outputs)
            else:
                found.append(node)
        return tuple(found)


def read(model: Path) -> Graph:
    """The main graph of an ONNX file. Raises OSError, ValueError, boardbench.inspect's InspectError."""
    from boardbench.inspect.protobuf import Wire

    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = memoryview(mapped)
        try:
            root = Wire(data, "the ONNX model").root()
            graph = root.message(_MODEL_GRAPH)
            if graph is None:
                raise ValueError("the ONNX model has no graph")
            nodes = []
            for index, message in enumerate(graph.messages(_GRAPH_NODES)):
                attributes = message.messages(_NODE_ATTRIBUTES)
                nodes.append(
                    FileNode(
                        index=index,
                        name=message.text(_NODE_NAME),
                        op_type=message.text(_NODE_TYPE),
                        domain=message.text(_NODE_DOMAIN),
                        inputs=tuple(message.texts(_NODE_INPUTS)),
                        outputs=tuple(message.texts(_NODE_OUTPUTS)),
                        content=bytes(data[message.start : message.stop]),
                        nested=any(field in each for each in attributes for field in _ATTRIBUTE_GRAPHS),
                    )
                )
            constants: Dict[str, bytes] = {}
            external: Set[str] = set()
            for message in graph.messages(_GRAPH_CONSTANTS):
                name = message.text(_TENSOR_NAME)
                if message.integer(_TENSOR_LOCATION):
                    external.add(name)
                    constants[name] = b""
                else:
                    constants[name] = bytes(data[message.start : message.stop])
            return Graph(
                nodes=tuple(nodes),
                constants=constants,
                external=external,
                ir_version=root.integer(_MODEL_IR),
                opsets=tuple(bytes(data[begin:end]) for begin, end in root.spans(_MODEL_OPSETS)),
            )
        finally:
            data.release()


def alone(
    graph: Graph,
    node: FileNode,
    inputs: Mapping[str, Typed],
    outputs: Mapping[str, Typed],
    *,
    before: bool = False,
    after: bool = False,
) -> Optional[bytes]:
    """A model of the one node, or of it between others; None where that can't be made.

    ``inputs`` and ``outputs`` are the types and sizes of its tensors. Its neighbours are Abs, or Not for
    booleans, which change neither type nor shape and which every provider has.
    """
    if node.nested or any(name in graph.external for name in node.inputs):
        return None
    nodes, constants, fed, given = [_field(_GRAPH_NODES, node.content)], [], [], []
    for at, name in enumerate(dict.fromkeys(filter(None, node.inputs))):
        if name in graph.constants:
            constants.append(_field(_GRAPH_CONSTANTS, graph.constants[name]))
            continue
        if name not in inputs or inputs[name][0] not in ELEMENTS:
            return None
        source = f"{NEIGHBOUR}_in_{at}" if before else name
        if before:
            nodes.insert(0, _neighbour(source, name, inputs[name][0]))
        fed.append(_field(_GRAPH_INPUTS, _value(source, inputs[name])))
    for at, name in enumerate(filter(None, node.outputs)):
        target = name
        if after:
            if name not in outputs or outputs[name][0] not in ELEMENTS:
                return None
            target = f"{NEIGHBOUR}_out_{at}"
            nodes.append(_neighbour(name, target, outputs[name][0]))
        # Without a type: it follows, and a wrong one would be refused.
        given.append(_field(_GRAPH_OUTPUTS, _field(1, target.encode())))
    content = b"".join([*nodes, _field(_GRAPH_NAME, b"probe"), *constants, *fed, *given])
    opsets = b"".join(_field(_MODEL_OPSETS, each) for each in graph.opsets)
    return _number(_MODEL_IR, graph.ir_version) + opsets + _field(_MODEL_GRAPH, content)


def _neighbour(source: str, target: str, element: str) -> bytes:
    kind = "Not" if element == "bool" else "Abs"
    return _field(
        _GRAPH_NODES,
        _field(_NODE_INPUTS, source.encode())
        + _field(_NODE_OUTPUTS, target.encode())
        + _field(_NODE_NAME, f"{NEIGHBOUR}_{target}".encode())
        + _field(_NODE_TYPE, kind.encode()),
    )


def _value(name: str, typed: Typed) -> bytes:
    """ValueInfoProto: name 1, type 2 { tensor 1 { element 1, shape 2 { dimension 1 { size 1 } } } }."""
    element, sizes = typed
    shape = b"".join(_field(1, _number(1, size)) for size in sizes)
    tensor = _number(1, ELEMENTS[element][0]) + _field(2, shape)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def sizes_bytes(typed: Sequence[Typed]) -> Optional[int]:
    """Bytes of tensors; None when one is of a type without a size."""
    total = 0
    for element, sizes in typed:
        if element not in ELEMENTS:
            return None
        count = ELEMENTS[element][1]
        for size in sizes:
            count *= size
        total += count
    return total
