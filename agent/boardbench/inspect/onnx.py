"""An ONNX file: its graph, constants and where its bytes go.

Source of the format: onnx/onnx ``onnx/onnx.proto``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Dict, List, Mapping, Optional, Set, Tuple

from boardbench.inspect.elements import BITS, count_zeros, most_operations
from boardbench.inspect.errors import Malformed
from boardbench.inspect.ledger import GRAPH, METADATA, NAMES, WEIGHTS, Ledger
from boardbench.inspect.onnx_shapes import Node, Value, costs, infer
from boardbench.inspect.protobuf import Message, Wire
from boardbench.inspect.report import ModelReport, OpPlacement, Placement, ReportWarning, TensorInfo

# TensorProto.DataType.
TYPES: Mapping[int, str] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "str",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4_e2m1fn",
    24: "float8_e8m0fnu",
    25: "uint2",
    26: "int2",
}
# Typed data fields of TensorProto: field → the type whose bytes lie there, packed.
_TYPED_DATA: Mapping[int, str] = {4: "float32", 10: "float64"}
_EXTERNAL = 1
_DEEPEST_GRAPH = 8
_LONGEST_CONSTANT = 64


@dataclass(frozen=True)
class Constant:
    """A tensor in the file, or beside it."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    values: Optional[Tuple[int, ...]]
    external: str


class _Reader:
    """One pass over the file: what it finds is collected in the attributes."""

    def __init__(self, data: memoryview, ledger: Ledger) -> None:
        self.data = data
        self.ledger = ledger
        self.wire = Wire(data, "the ONNX model")
        self.nodes: List[Node] = []
        self.nested_nodes = 0
        self.left = 3 * most_operations(len(data))
        self.constants: Dict[str, Constant] = {}
        self.parameters: Optional[int] = 0
        self.external: Dict[str, None] = {}

    def tensor(self, message: Message, op_type: str) -> Constant:
        dtype = TYPES.get(message.integer(2), f"type{message.integer(2)}")
        shape = message.integers(1)
        external = ""
        if message.integer(14) == _EXTERNAL:
            for entry in message.messages(13):
                if entry.text(1) == "location":
                    external = entry.text(2)
            self.external[external] = None
        count = 1
        for size in shape:
            count *= max(0, size)
        count = count if count < 1 << 62 else 0
        claimed = False
        for field, stored in (
            (9, dtype),
            (4, "float32"),
            (10, "float64"),
            (5, ""),
            (7, ""),
            (11, ""),
            (6, ""),
        ):
            for start, stop in message.spans(field):
                # Fields of integers hold variable lengths, so their zeros can't be counted at a glance.
                zeros = count_zeros(self.data[start:stop], stored) if stored else None
                if zeros is not None and shape:
                    zeros = min(zeros, count)
                self.ledger.claim(start, stop, WEIGHTS, dtype, op_type, None if claimed else count, zeros)
                claimed = True
        if dtype in BITS and self.parameters is not None:
            self.parameters += count
        return Constant(message.text(8), dtype, shape, self._values(message, dtype, count), external)

    def _values(self, message: Message, dtype: str, count: int) -> Optional[Tuple[int, ...]]:
        """Small integers, which shapes are made of."""
        if dtype not in ("int64", "int32") or count > _LONGEST_CONSTANT:
            return None
        raw = message.span(9)
        if raw is not None:
            width = 8 if dtype == "int64" else 4
            content = bytes(self.data[raw[0] : raw[1]])
            return tuple(
                int.from_bytes(content[at : at + width], "little", signed=True)
                for at in range(0, len(content) - width + 1, width)
            )
        return message.integers(7 if dtype == "int64" else 5)

    def graph(self, message: Message, depth: int) -> Tuple[List[Node], List[Message], List[Message]]:
        if depth > _DEEPEST_GRAPH:
            raise Malformed("the ONNX model nests graphs deeper than any model: damaged, or made to harm")
        for field in (1, 5, 11, 12, 13):
            self.left -= message.count(field)
        if self.left < 0:
            raise Malformed(
                "the ONNX model has more parts than any model of its size: damaged, or made to harm"
            )
        made = [self.node(each, depth) for each in message.messages(1)]
        reader: Dict[str, str] = {}
        for node in made:
            for name in node.inputs:
                reader.setdefault(name, node.type)
        for each in message.messages(5):
            name = each.text(8)
            constant = self.tensor(each, reader.get(name, ""))
            if depth == 0:
                self.constants[name] = constant
        for each in message.messages(15):
            values, indices = each.message(1), each.message(2)
            if values is not None:
                self.tensor(values, reader.get(values.text(8), ""))
            if indices is not None:
                start, stop = indices.start, indices.stop
                self.ledger.claim(start, stop, "sparsity")
        for field in (2, 10):
            for start, stop in message.spans(field):
                self.ledger.claim(start, stop, NAMES)
        for field in (13, 16, 14):
            for start, stop in message.spans(field):
                self.ledger.claim(start, stop, METADATA)
        return made, message.messages(11), message.messages(12)

    def node(self, message: Message, depth: int) -> Node:
        op_type = message.text(4)
        domain = message.text(7)
        attributes: Dict[str, Tuple[int, ...]] = {}
        constant: Optional[Constant] = None
        for attribute in message.messages(5):
            name = attribute.text(1)
            if 8 in attribute:
                attributes[name] = attribute.integers(8)
            elif 3 in attribute:
                attributes[name] = (attribute.integer(3),)
            elif 4 in attribute:
                # Few attributes are text; of those only auto_pad matters to a shape, by its last letters.
                attributes[name] = tuple(attribute.text(4)[:16].encode())
            for held in (attribute.message(5), *attribute.messages(10)):
                if held is not None:
                    constant = self.tensor(held, op_type)
                    attributes[name] = ()
            for held in (attribute.message(6), *attribute.messages(11)):
                if held is not None:
                    inner, _, _ = self.graph(held, depth + 1)
                    self.nested_nodes += len(inner)
        for field in (1, 2, 3, 6):
            for start, stop in message.spans(field):
                self.ledger.claim(start, stop, NAMES)
        outputs = tuple(message.texts(2))
        if op_type == "Constant" and outputs and depth == 0:
            for name in ("value_ints", "value_int"):
                if name in attributes:
                    shape = (len(attributes[name]),) if name == "value_ints" else ()
                    constant = Constant("", "int64", shape, attributes[name][:_LONGEST_CONSTANT], "")
            if constant is not None:
                self.constants[outputs[0]] = replace(constant, name=outputs[0])
        return Node(op_type, domain, message.text(3), tuple(message.texts(1)), outputs, attributes)


def report(base: ModelReport, data: memoryview) -> ModelReport:
    """``base`` with everything filled in that the file tells; raises Malformed."""
    ledger = Ledger()
    reader = _Reader(data, ledger)
    root = reader.wire.root()
    main = root.message(7)
    if main is None:
        raise Malformed("the ONNX model has no graph: it is empty or damaged; export it again")
    nodes, inputs, outputs = reader.graph(main, 0)
    for field in (2, 3, 4, 6):
        for start, stop in root.spans(field):
            ledger.claim(start, stop, METADATA)
    for start, stop in root.spans(14):
        ledger.claim(start, stop, METADATA)
    for function in root.messages(25):
        for each in function.messages(7):
            reader.node(each, 1)
            reader.nested_nodes += 1
    ledger.fill(GRAPH)
    given = [_value(each) for each in inputs if each.text(1) not in reader.constants]
    known = {each.text(1): _value(each) for each in inputs if _has_shape(each)}
    for each in (*outputs, *main.messages(13)):
        tensor = _value(each)
        # Without a shape it may have any; with an empty one it is a scalar.
        if _has_shape(each):
            known.setdefault(tensor.name, tensor)
    values = infer(
        nodes,
        {name: (constant.dtype, constant.shape) for name, constant in reader.constants.items()},
        {name: constant.values for name, constant in reader.constants.items() if constant.values is not None},
        {tensor.name: (tensor.dtype, tensor.shape) for tensor in known.values() if tensor.dtype},
    )
    results = [_completed(each, values) for each in outputs]
    macs, arena = costs(
        nodes,
        values,
        set(reader.constants),
        [tensor.name for tensor in given],
        [tensor.name for tensor in results],
    )
    types: Dict[str, int] = {}
    for node in nodes:
        types[node.type] = types.get(node.type, 0) + 1
    ops = tuple(
        OpPlacement(index, node.type, node.name or (node.outputs[0] if node.outputs else ""))
        for index, node in enumerate(nodes)
    )
    opsets = {each.text(1) or "ai.onnx": each.integer(2) for each in root.messages(8)}
    version = f"IR {root.integer(1)}"
    if opsets:
        version += ", opset " + ", ".join(
            str(number) if domain == "ai.onnx" else f"{domain} {number}" for domain, number in opsets.items()
        )
    return replace(
        base,
        format_version=version,
        producer=" ".join(part for part in (root.text(2), root.text(3)) if part),
        inputs=tuple(given),
        outputs=tuple(results),
        op_count=len(nodes),
        op_types=types,
        ops=ops,
        placement=Placement(
            detail="the file does not say where its operations run; that is the runtime's choice: run it"
        ),
        parameter_count=reader.parameters,
        multiply_accumulates=macs if not reader.nested_nodes else None,
        arena_estimate_bytes=arena if not reader.nested_nodes else None,
        bytes=ledger.uses(data),
        warnings=tuple(_warnings(reader, given, nodes)),
    )


def _has_shape(message: Message) -> bool:
    kind = message.message(2)
    tensor = kind.message(1) if kind is not None else None
    return tensor is not None and 2 in tensor


def _completed(message: Message, values: Mapping[str, Value]) -> TensorInfo:
    """An output, with the shape that follows from the graph where the file gives none."""
    tensor = _value(message)
    inferred = values.get(tensor.name, ("", None))[1]
    return replace(tensor, shape=inferred) if inferred is not None and not _has_shape(message) else tensor


def _value(message: Message) -> TensorInfo:
    kind = message.message(2)
    tensor = kind.message(1) if kind is not None else None
    if tensor is None:
        return TensorInfo(message.text(1), "", ())
    shape_message = tensor.message(2)
    shape: List[int] = []
    for dimension in shape_message.messages(1) if shape_message is not None else ():
        size = dimension.integer(1, -1)
        shape.append(size if size >= 0 else -1)
    return TensorInfo(message.text(1), TYPES.get(tensor.integer(1), ""), tuple(shape))


def _warnings(reader: _Reader, inputs: List[TensorInfo], nodes: List[Node]) -> List[ReportWarning]:
    warnings: List[ReportWarning] = []
    open_inputs = [tensor.name for tensor in inputs if -1 in tensor.shape]
    if open_inputs:
        warnings.append(
            ReportWarning(
                "open_shapes",
                f"inputs with open sizes: {', '.join(open_inputs[:8])}; name them with --shape when running",
            )
        )
    if reader.external:
        names: Set[str] = {PurePosixPath(name).name or name for name in reader.external}
        warnings.append(
            ReportWarning(
                "external_data",
                f"constants lie in other files: {', '.join(sorted(names)[:8])}; the model does not run "
                "without them, and their bytes are not in this report",
            )
        )
    custom = sorted({f"{node.domain}.{node.type}" for node in nodes if node.domain not in _KNOWN_DOMAINS})
    if custom:
        warnings.append(
            ReportWarning(
                "custom_operations",
                f"operations that a runtime may lack: {', '.join(custom[:8])}; it must be built with them",
            )
        )
    if reader.nested_nodes:
        warnings.append(
            ReportWarning(
                "nested_graphs",
                f"{reader.nested_nodes} more operations are in graphs inside operations (If, Loop, Scan, "
                "functions); they are not counted, because the data decides how often they run",
            )
        )
    return warnings


_KNOWN_DOMAINS = frozenset(
    ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "ai.onnx.preview.training")
)
