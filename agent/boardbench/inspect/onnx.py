"""An ONNX file: its graph, constants and where its bytes go.

Source of the format: onnx/onnx ``onnx/onnx.proto``.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

from boardbench.inspect.elements import BITS, count_zeros
from boardbench.inspect.errors import Malformed
from boardbench.inspect.ledger import GRAPH, METADATA, NAMES, WEIGHTS, Ledger
from boardbench.inspect.onnx_shapes import Node, Value, costs, infer
from boardbench.inspect.protobuf import Message, Readable, Span, Wire, fields, packed, signed, text
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
# Fields of TensorProto that hold values → their order; of two of them, what lies there packed.
_STORED: Mapping[int, int] = {9: 0, 4: 1, 10: 2, 5: 3, 7: 4, 11: 5, 6: 6}
_STORED_TYPES: Mapping[int, str] = {1: "float32", 2: "float64"}
_INTEGERS = {"int32": struct.Struct("<i"), "int64": struct.Struct("<q")}
_EXTERNAL = 1
_DEEPEST_GRAPH = 8
_LONGEST_CONSTANT = 64
_LARGEST = 1 << 62
# A message up to this size is copied before it is read, which is faster.
_COPIED_BYTES = 1 << 14
# What is done with a node, and with a value that it reads or writes, takes about as long as so many steps.
_STEPS_PER_NODE, _STEPS_PER_EDGE, _STEPS_PER_ATTRIBUTE, _STEPS_PER_CONSTANT = 12, 4, 3, 22


class Constant(NamedTuple):
    """A tensor in the file, or beside it."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    values: Optional[Tuple[int, ...]]
    external: str


class _Value(NamedTuple):
    """What a ValueInfoProto tells: without a shape it may have any, with an empty one it is a scalar."""

    info: TensorInfo
    has_shape: bool


class _Graph(NamedTuple):
    """The parts of a GraphProto but its constants; ``told`` are the types of values in between."""

    nodes: List[Node]
    inputs: List[_Value]
    outputs: List[_Value]
    told: List[_Value]


class _Reader:
    """One pass over the file: what it finds is collected in the attributes.

    Messages of which a file has thousands are read field by field as they come, and small ones from a copy.
    No two things in the format share a byte, so that sizes are noted without their places.
    """

    def __init__(self, data: memoryview, ledger: Ledger) -> None:
        self.data = data
        self.ledger = ledger
        self.wire = Wire(data, "the ONNX model", ledger.budget(len(data)))
        self.nested_nodes = 0
        self.constants: Dict[str, Constant] = {}
        self.parameters: Optional[int] = 0
        self.external: Dict[str, None] = {}

    def _near(self, start: int, stop: int) -> Tuple[Readable, int]:
        """(bytes with the message in them, where they begin): a copy of the message when it is small."""
        if stop - start > _COPIED_BYTES:
            return self.data, 0
        return bytes(self.data[start:stop]), start

    def tensor(self, start: int, stop: int, op_type: str, readers: Mapping[str, str]) -> Constant:
        """The constant in a TensorProto; its bytes are noted for ``op_type``, or for who reads it."""
        data, base = self._near(start, stop)
        wire = self.wire
        type_number = 0
        shape: List[int] = []
        name = ""
        beside = False
        entries: List[Span] = []
        held: List[Tuple[int, int, int]] = []
        loose: List[int] = []
        for number, kind, first, second in fields(wire, data, base, start - base, stop - base):
            if kind == 2:
                if number in _STORED:
                    held.append((_STORED[number], first, second))
                elif number == 1:
                    shape.extend(packed(wire, data, base, first, second))
                elif number == 8:
                    name = text(data, first, second)
                elif number == 13:
                    entries.append((base + first, base + second))
            elif kind == 0:
                if number == 1:
                    shape.append(signed(first))
                elif number == 2:
                    type_number = signed(first)
                elif number == 14:
                    beside = first == _EXTERNAL
                elif number in (5, 7):
                    loose.append(signed(first))
        dtype = TYPES.get(type_number, f"type{type_number}")
        external = ""
        if beside:
            for entry_start, entry_stop in entries:
                entry = Message(wire, entry_start, entry_stop)
                if entry.text(1) == "location":
                    external = entry.text(2)
            self.external[external] = None
        count = 1
        for size in shape:
            count = min(count * max(0, size), _LARGEST)
        count = count if count < _LARGEST else 0
        op_type = op_type or readers.get(name, "")
        held.sort()
        elements: Optional[int] = count
        for order, first, second in held:
            # Fields of integers hold variable lengths, so their zeros can't be counted at a glance.
            stored = _STORED_TYPES.get(order, dtype if order == 0 else "")
            zeros = count_zeros(memoryview(data)[first:second], stored) if stored else None
            if zeros is not None and shape:
                zeros = min(zeros, count)
            self.ledger.note(second - first, WEIGHTS, dtype, op_type, elements, zeros)
            elements = None
        if dtype in BITS and self.parameters is not None:
            self.parameters += count
        values = None
        if dtype in ("int64", "int32") and count <= _LONGEST_CONSTANT:
            values = self._values(data, base, dtype, held, loose)
        return Constant(name, dtype, tuple(shape), values, external)

    def _values(
        self, data: Readable, base: int, dtype: str, held: List[Tuple[int, int, int]], loose: List[int]
    ) -> Tuple[int, ...]:
        """Small integers, which shapes are made of."""
        raw = [(first, second) for order, first, second in held if order == 0]
        if raw:
            first, second = raw[-1]
            kind = _INTEGERS[dtype]
            count = min((second - first) // kind.size, _LONGEST_CONSTANT)
            return tuple(kind.unpack_from(data, first + index * kind.size)[0] for index in range(count))
        wanted = _STORED[7 if dtype == "int64" else 5]
        values = loose
        for order, first, second in held:
            if order == wanted:
                values.extend(packed(self.wire, data, base, first, second))
        return tuple(values[:_LONGEST_CONSTANT])

    def graph(self, start: int, stop: int, depth: int) -> _Graph:
        """The graph in a GraphProto; notes its bytes, and keeps the constants of the outermost one."""
        if depth > _DEEPEST_GRAPH:
            raise Malformed("the ONNX model nests graphs deeper than any model: damaged, or made to harm")
        nodes: List[Node] = []
        constants: List[Span] = []
        sparse: List[Span] = []
        values: Dict[int, List[_Value]] = {11: [], 12: [], 13: []}
        for number, kind, first, second in fields(self.wire, self.data, 0, start, stop):
            if kind != 2:
                continue
            if number == 1:
                nodes.append(self.node(first, second, depth))
            elif number == 5 or number == 15:
                # At once, since there may be as many as the file is long.
                self.wire.budget.steps_left -= _STEPS_PER_CONSTANT
                (constants if number == 5 else sparse).append((first, second))
            elif number in (2, 10):
                self.ledger.note(second - first, NAMES)
            elif number in (13, 14, 16):
                self.ledger.note(second - first, METADATA)
            if number in values and depth == 0:
                values[number].append(self.value(first, second))
        readers: Dict[str, str] = {}
        for node in reversed(nodes):
            readers.update(dict.fromkeys(node.inputs, node.type))
        for first, second in constants:
            constant = self.tensor(first, second, "", readers)
            if depth == 0:
                self.constants[constant.name] = constant
        for first, second in sparse:
            message = Message(self.wire, first, second)
            held, indices = message.span(1), message.span(2)
            if held is not None:
                self.tensor(*held, "", readers)
            if indices is not None:
                self.ledger.note(indices[1] - indices[0], "sparsity")
        return _Graph(nodes, values[11], values[12], values[13])

    def value(self, start: int, stop: int) -> _Value:
        """Name and type of a value, in a ValueInfoProto."""
        message = Message(self.wire, start, stop)
        kind = message.message(2)
        tensor = kind.message(1) if kind is not None else None
        if tensor is None:
            return _Value(TensorInfo(message.text(1), "", ()), False)
        sizes = tensor.message(2)
        dimensions = sizes.messages(1) if sizes is not None else ()
        shape = tuple([max(-1, dimension.integer(1, -1)) for dimension in dimensions])
        dtype = TYPES.get(tensor.integer(1), "")
        return _Value(TensorInfo(message.text(1), dtype, shape), sizes is not None)

    def node(self, start: int, stop: int, depth: int) -> Node:
        """The operation in a NodeProto; notes its bytes."""
        data, base = self._near(start, stop)
        wire = self.wire
        inputs: List[str] = []
        outputs: List[str] = []
        name = op_type = domain = ""
        held: List[Span] = []
        names_bytes = 0
        for number, kind, first, second in fields(wire, data, base, start - base, stop - base):
            if kind != 2:
                continue
            if number <= 2:
                # At once, since a node may have as many of them as the file is long.
                wire.budget.steps_left -= _STEPS_PER_EDGE
                (inputs if number == 1 else outputs).append(text(data, first, second))
                names_bytes += second - first
            elif number == 5:
                held.append((first, second))
            elif number == 4:
                op_type = text(data, first, second)
            elif number == 3:
                name = text(data, first, second)
                names_bytes += second - first
            elif number == 7:
                domain = text(data, first, second)
            elif number == 6:
                names_bytes += second - first
        self.ledger.note(names_bytes, NAMES)
        wire.budget.spend(_STEPS_PER_NODE, wire.what)
        attributes: Dict[str, Tuple[int, ...]] = {}
        constant: Optional[Constant] = None
        wire.budget.spend(_STEPS_PER_ATTRIBUTE * len(held), wire.what)
        for first, second in held:
            constant = self.attribute(data, base, first, second, attributes, op_type, depth) or constant
        if op_type == "Constant" and outputs and depth == 0:
            for key in ("value_ints", "value_int"):
                if key in attributes:
                    shape = (len(attributes[key]),) if key == "value_ints" else ()
                    constant = Constant("", "int64", shape, attributes[key][:_LONGEST_CONSTANT], "")
            if constant is not None:
                self.constants[outputs[0]] = constant._replace(name=outputs[0])
        return Node(op_type, domain, name, tuple(inputs), tuple(outputs), attributes)

    def attribute(
        self,
        data: Readable,
        base: int,
        start: int,
        stop: int,
        attributes: Dict[str, Tuple[int, ...]],
        op_type: str,
        depth: int,
    ) -> Optional[Constant]:
        """Adds an AttributeProto to the attributes when it is of integers or short; its last constant."""
        wire = self.wire
        name = ""
        ints: Optional[List[int]] = None
        one: Optional[int] = None
        letters: Optional[bytes] = None
        tensors: List[Span] = []
        graphs: List[Span] = []
        for number, kind, first, second in fields(wire, data, base, start, stop):
            if number == 1 and kind == 2:
                name = text(data, first, second)
            elif number == 3:
                one = signed(first) if kind == 0 else 0
            elif number == 8:
                ints = [] if ints is None else ints
                if kind == 0:
                    ints.append(signed(first))
                elif kind == 2:
                    ints.extend(packed(wire, data, base, first, second))
            elif number == 4:
                # Few attributes are text; of those only auto_pad matters to a shape, by its first letters.
                letters = bytes(data[first : min(second, first + 16)]) if kind == 2 else b""
            elif kind == 2 and number in (5, 10):
                wire.budget.steps_left -= _STEPS_PER_CONSTANT
                tensors.append((base + first, base + second))
            elif kind == 2 and number in (6, 11):
                graphs.append((base + first, base + second))
        if ints is not None:
            attributes[name] = tuple(ints)
        elif one is not None:
            attributes[name] = (one,)
        elif letters is not None:
            attributes[name] = tuple(letters)
        constant: Optional[Constant] = None
        for first, second in tensors:
            constant = self.tensor(first, second, op_type, {})
            attributes[name] = ()
        for first, second in graphs:
            self.nested_nodes += len(self.graph(first, second, depth + 1).nodes)
        return constant


def report(base: ModelReport, data: memoryview, ledger: Ledger) -> ModelReport:
    """``base`` with everything filled in that the file tells; raises Malformed."""
    reader = _Reader(data, ledger)
    root = reader.wire.root()
    main = root.span(7)
    if main is None:
        raise Malformed("the ONNX model has no graph: it is empty or damaged; export it again")
    nodes, inputs, outputs, told = reader.graph(*main, 0)
    for field in (2, 3, 4, 6, 14):
        for start, stop in root.spans(field):
            ledger.note(stop - start, METADATA)
    for start, stop in root.spans(25):
        for first, second in Message(reader.wire, start, stop).spans(7):
            reader.node(first, second, 1)
            reader.nested_nodes += 1
    ledger.fill(GRAPH)
    given = [each.info for each in inputs if each.info.name not in reader.constants]
    known = {each.info.name: each.info for each in inputs if each.has_shape}
    for each in (*outputs, *told):
        if each.has_shape:
            known.setdefault(each.info.name, each.info)
    values = infer(
        nodes,
        {name: (constant.dtype, constant.shape) for name, constant in reader.constants.items()},
        {name: constant.values for name, constant in reader.constants.items() if constant.values is not None},
        {tensor.name: (tensor.dtype, tensor.shape) for tensor in known.values() if tensor.dtype},
        reader.wire.budget,
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
        [
            OpPlacement(index, node.type, node.name or (node.outputs[0] if node.outputs else ""))
            for index, node in enumerate(nodes)
        ]
    )
    reader.wire.budget.spend(_STEPS_PER_ATTRIBUTE * root.count(8), reader.wire.what)
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


def _completed(value: _Value, values: Mapping[str, Value]) -> TensorInfo:
    """An output, with the shape that follows from the graph where the file gives none."""
    inferred = values.get(value.info.name, ("", None))[1]
    return replace(value.info, shape=inferred) if inferred is not None and not value.has_shape else value.info


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
