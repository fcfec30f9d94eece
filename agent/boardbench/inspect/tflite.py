"""A TensorFlow Lite file: its graphs, constants and metadata, every offset checked.

Source of the format: tensorflow/tensorflow ``tensorflow/compiler/mlir/lite/schema/schema.fbs``.
"""

from __future__ import annotations

import struct
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from boardbench.inspect import tflite_schema as schema
from boardbench.inspect.budget import Budget
from boardbench.inspect.errors import Malformed
from boardbench.inspect.flatbuffer import F32, I8, I32, I64, U8, U32, Fields, FlatBuffer, Table
from boardbench.inspect.ledger import GRAPH, METADATA, NAMES, QUANTISATION, Ledger

Span = Tuple[int, int]

SPARSITY = "sparsity"


class Quantisation(NamedTuple):
    """Affine quantisation: one scale for the tensor, or one for each index of a dimension."""

    scales: Tuple[float, ...]
    zero_points: Tuple[int, ...]
    dimension: int


class Tensor(NamedTuple):
    """A value of the graph; ``data`` is where its bytes are when it is constant.

    ``shape`` has -1 where the model leaves a size open; ``fixed_shape`` never has. The last three fields are
    the file, and where in it what is read when it is asked for: files have many tensors, and of few of them
    anybody asks the name.
    """

    index: int  # type: ignore[assignment]
    dtype: str
    shape: Tuple[int, ...]
    fixed_shape: Tuple[int, ...]
    buffer: int
    data: Optional[Span]
    variable: bool
    sparse: bool
    has_rank: bool
    source: memoryview
    name_span: Span
    quantised: Optional["_Quantised"]

    @property
    def name(self) -> str:
        """Its name; bytes that are no UTF-8 are replaced, and what is longer than a name is cut."""
        start, stop = self.name_span
        return str(self.source[start : min(stop, start + _LONGEST_NAME)], "utf-8", "replace")

    @property
    def quantisation(self) -> Optional[Quantisation]:
        """Its quantisation; None where it has no scale."""
        where = self.quantised
        if where is None:
            return None
        return Quantisation(
            _numbers(self.source, where.scales, "f", 4),
            _numbers(self.source, where.zero_points, "q", 8),
            where.dimension,
        )

    @property
    def whole_scale(self) -> Optional[float]:
        """The scale of the whole tensor; None where it has none, or several."""
        where = self.quantised
        if where is None or where.scales[1] - where.scales[0] != 4:
            return None
        return float(F32.unpack_from(self.source, where.scales[0])[0])

    @property
    def zero_point(self) -> int:
        """The first zero point; 0 where there is none."""
        where = self.quantised
        if where is None or where.zero_points[0] == where.zero_points[1]:
            return 0
        return int(I64.unpack_from(self.source, where.zero_points[0])[0])

    @property
    def constant(self) -> bool:
        """Whether the value is in the file."""
        return self.data is not None


class _Quantised(NamedTuple):
    """Where a tensor's scales and zero points are."""

    scales: Span
    zero_points: Span
    dimension: int


class Operator(NamedTuple):
    """One node; -1 among the inputs stands for an optional one that is left out."""

    index: int  # type: ignore[assignment]
    type: str
    custom: bool
    version: int
    inputs: Tuple[int, ...]
    outputs: Tuple[int, ...]
    options_type: int
    options: Optional[Table]
    custom_options: Optional[Span]

    def option(self, name: str, default: int = 0) -> int:
        """An option by its name in the schema; ``default`` where this operation has no such option."""
        field = schema.OPTIONS.get(self.options_type, {}).get(name)
        if field is None:
            return default
        number, kind, value = field
        return value if self.options is None else self.options.integer(number, kind, value)


class Subgraph(NamedTuple):
    """One graph; operations are in the order in which they run."""

    index: int  # type: ignore[assignment]
    name: str
    tensors: Tuple[Tensor, ...]
    operators: Tuple[Operator, ...]
    inputs: Tuple[int, ...]
    outputs: Tuple[int, ...]


class Signature(NamedTuple):
    """Names under which the inputs and outputs of a graph are offered."""

    key: str
    subgraph: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


class Model(NamedTuple):
    """A whole file. ``buffers[i]`` is where the i-th constant lies; None where it has no bytes."""

    data: memoryview
    version: int
    description: str
    subgraphs: Tuple[Subgraph, ...]
    buffers: Tuple[Optional[Span], ...]
    metadata: Mapping[str, int]
    signatures: Tuple[Signature, ...]
    external_files: Tuple[str, ...]
    budget: Budget

    @property
    def main(self) -> Subgraph:
        """The graph that an interpreter runs."""
        return self.subgraphs[0]


# Tables of which a file has thousands: fields, letters, defaults; see Fields.
_BUFFER = Fields((0, "I", 0), (1, "Q", 0), (2, "Q", 0))
_QUANTIZATION = Fields(
    (0, "I", 0), (1, "I", 0), (2, "I", 0), (3, "I", 0), (4, "B", 0), (5, "I", 0), (6, "i", 0)
)
_TENSOR = Fields(
    (0, "I", 0),
    (1, "b", 0),
    (2, "I", 0),
    (3, "I", 0),
    (4, "I", 0),
    (5, "B", 0),
    (6, "I", 0),
    (7, "I", 0),
    (8, "B", 0),
    (9, "I", 0),
)
_OPERATOR = Fields(
    (0, "I", 0),
    (1, "I", 0),
    (2, "I", 0),
    (3, "B", 0),
    (4, "I", 0),
    (5, "I", 0),
    (7, "I", 0),
    (8, "I", 0),
    (9, "Q", 0),
    (10, "Q", 0),
    (11, "B", 0),
    (12, "I", 0),
)
# An input or output of a graph is written out.
_STEPS_PER_TOLD, _STEPS_PER_GRAPH = 8, 30
_LONGEST_NAME, _LONGEST_TYPE = 4096, 256
_NO_NAME = (0, 0)
# Interpreters have six dimensions or so; what has more could keep every rule busy that looks at sizes.
_MOST_DIMENSIONS = 64
# What is done with a tensor that an operation reads or writes takes about as long as so many steps.
_STEPS_PER_EDGE, _STEPS_PER_OPERATOR, _STEPS_PER_TENSOR = 3, 7, 2


def read_model(data: memoryview, ledger: Ledger) -> Model:
    """The model in the bytes; raises Malformed when they are truncated or contradict themselves.

    Claims everything in the ledger but the bytes of constants and of operators' custom options.
    """
    buffer = FlatBuffer(data, "the TensorFlow Lite model", ledger)
    root = buffer.root(schema.IDENTIFIER)
    reader = _Reader(buffer)
    codes = [_read_code(table) for table in root.tables(1)]
    buffers = [reader.constant(at) for at in root.places(4)]
    graphs = tuple(
        reader.subgraph(index, table, codes, buffers) for index, table in enumerate(root.tables(2))
    )
    if not graphs:
        raise Malformed("the TensorFlow Lite model has no graph: it is empty or damaged; convert it again")
    root.values(5, "i", 4, METADATA)
    metadata = {table.text(0, METADATA): table.integer(1, U32) for table in root.tables(6, METADATA)}
    signatures = tuple(_read_signature(table) for table in root.tables(7))
    groups = tuple(table.text(0) for table in root.tables(8))
    for external in root.tables(9):
        external.text(4)
    return Model(
        data=data,
        version=root.integer(0, U32),
        description=root.text(3, METADATA),
        subgraphs=graphs,
        buffers=tuple(buffers),
        metadata=metadata,
        signatures=signatures,
        external_files=groups,
        budget=buffer.budget,
    )


def _read_code(table: Table) -> Tuple[str, bool, int]:
    """(type as the schema spells it or the custom name, whether it is custom, version)."""
    code = max(table.integer(0, I8), table.integer(3, I32))
    version = table.integer(2, I32, 1)
    custom_name = table.text(1)
    if code == schema.CUSTOM:
        return custom_name[:_LONGEST_TYPE] or "CUSTOM", True, version
    name = schema.OPERATORS[code] if 0 <= code < len(schema.OPERATORS) else f"BUILTIN_{code}"
    return name, False, version


def _numbers(data: memoryview, span: Span, letter: str, width: int) -> Tuple[Any, ...]:
    start, stop = span
    return struct.unpack_from(f"<{(stop - start) // width}{letter}", data, start)


class _Reader:
    """Reads the tables of which a file has thousands, a table's fields at once."""

    def __init__(self, buffer: FlatBuffer) -> None:
        self.buffer = buffer
        self.graph = buffer.ledger.number(GRAPH)
        self.names = buffer.ledger.number(NAMES)
        self.quantised = buffer.ledger.number(QUANTISATION)
        self.sparsity = buffer.ledger.number(SPARSITY)

    def constant(self, at: int) -> Optional[Span]:
        """Where the bytes of an entry of the list of constants are; None where it has none."""
        buffer = self.buffer
        (inside, offset, length), places = buffer.record(at, _BUFFER, self.graph)
        if places[0]:
            vector = at + places[0] + inside
            start, count = buffer.vector_at(vector, 1, False)
            buffer.mark_as(vector, start, self.graph)
            if count:
                return start, start + count
        # Models beyond 2 GB keep the bytes after the FlatBuffer; 0 and 1 mean "not used".
        if offset <= 1 or length == 0:
            return None
        if offset + length > buffer.size:
            raise buffer.broken("has constants that end outside the file", offset)
        return offset, offset + length

    def quantisation(self, at: int) -> Optional[_Quantised]:
        """Where the quantisation in the table is; None where it has no scale."""
        buffer, number = self.buffer, self.quantised
        values, places = buffer.record(at, _QUANTIZATION, number)
        for field in (0, 1):
            if places[field]:
                buffer.skipped_at(at + places[field] + values[field], 4, 0, number)
        scales = zero_points = _NO_NAME
        if places[2]:
            scales = buffer.skipped_at(at + places[2] + values[2], 4, 0, number)
        if places[3]:
            zero_points = buffer.skipped_at(at + places[3] + values[3], 8, 0, number)
        if places[5]:
            details = buffer.table_at(at + places[5] + values[5], QUANTISATION)
            kind = values[4]
            if kind == 1:
                span = details.span(0)
                if span is not None:
                    buffer.mark_as(span[0], span[1], number)
            elif kind == 2:
                details.values(3, "i", 4)
        if scales[0] == scales[1]:
            return None
        return _Quantised(scales, zero_points, values[6])

    def tensor(self, index: int, at: int, buffers: List[Optional[Span]]) -> Tensor:
        """The tensor in the table."""
        buffer = self.buffer
        values, places = buffer.record(at, _TENSOR, self.graph)
        (
            shape_at,
            kind,
            constant,
            name_at,
            quantised_at,
            variable,
            sparsity_at,
            signature_at,
            ranked,
            variants,
        ) = values
        if constant >= len(buffers) and constant != 0:
            raise buffer.broken(f"has a tensor with constant {constant} of {len(buffers)}", at)
        shape: Tuple[int, ...] = ()
        if places[0]:
            shape = buffer.numbers_at(at + places[0] + shape_at, "i", 4, self.graph)
            if len(shape) > _MOST_DIMENSIONS:
                raise buffer.broken(f"has a tensor of {len(shape)} dimensions", at)
        open_shape = shape
        if places[7]:
            signature = buffer.numbers_at(at + places[7] + signature_at, "i", 4, self.graph)
            if len(signature) == len(shape):
                open_shape = signature
        if places[9]:
            for place in buffer.places_at(at + places[9] + variants, self.graph):
                buffer.table_at(place).values(0, "i", 4)
        name = _NO_NAME
        buffer.budget.spend(_STEPS_PER_TENSOR + len(shape) // 4, buffer.what)
        if places[3]:
            # The closing zero is part of a string.
            name = buffer.skipped_at(at + places[3] + name_at, 1, 1, self.names)
        return Tensor(
            index,
            schema.TYPES[kind][0] if 0 <= kind < len(schema.TYPES) else f"type{kind}",
            open_shape,
            shape,
            constant,
            buffers[constant] if constant < len(buffers) else None,
            variable != 0,
            bool(places[6]) and _claim_sparsity(buffer.table_at(at + places[6] + sparsity_at, SPARSITY)),
            ranked != 0 or shape != (),
            buffer.data,
            name,
            self.quantisation(at + places[4] + quantised_at) if places[4] else None,
        )

    def operator(
        self,
        index: int,
        at: int,
        codes: List[Tuple[str, bool, int]],
        tensors: Sequence[Tensor],
        costs: List[int],
    ) -> Operator:
        """The operation in the table; ``costs`` are the steps that looking at each tensor takes."""
        buffer = self.buffer
        values, places = buffer.record(at, _OPERATOR, self.graph)
        code = values[0]
        if code >= len(codes):
            raise buffer.broken(f"has an operation of kind {code} of {len(codes)}", at)
        name, custom, version = codes[code]
        inputs: Tuple[int, ...] = ()
        outputs: Tuple[int, ...] = ()
        if places[1]:
            inputs = buffer.numbers_at(at + places[1] + values[1], "i", 4, self.graph)
        if places[2]:
            outputs = buffer.numbers_at(at + places[2] + values[2], "i", 4, self.graph)
        steps, count = _STEPS_PER_OPERATOR, len(costs)
        for tensor in (*inputs, *outputs):
            if not -1 <= tensor < count:
                raise buffer.broken(f"has an operation on tensor {tensor} of {count}", at)
            steps += costs[tensor]
        buffer.budget.spend(steps, buffer.what)
        if outputs and outputs[0] >= 0:
            # It is called by that name.
            name_start, name_stop = tensors[outputs[0]].name_span
            buffer.budget.look(name_stop - name_start, buffer.what)
        options: Optional[Table] = None
        if places[4]:
            options = buffer.table_at(at + places[4] + values[4])
            _claim_lists(options, schema.OPTION_LISTS.get(values[3], ()))
        if places[11]:
            more = buffer.table_at(at + places[11] + values[11])
            _claim_lists(more, schema.OPTION2_LISTS.get(values[10], ()))
        if places[6]:
            buffer.numbers_at(at + places[6] + values[6], "B", 1, self.graph)
        if places[7]:
            buffer.numbers_at(at + places[7] + values[7], "i", 4, self.graph)
        custom_options: Optional[Span] = None
        if places[5]:
            vector = at + places[5] + values[5]
            start, length = buffer.vector_at(vector, 1, False)
            buffer.mark_as(vector, start, self.graph)
            custom_options = (start, start + length)
        large_at, large_size = values[8], values[9]
        if large_at > 1 and large_size > 0:
            if large_at + large_size > buffer.size:
                raise buffer.broken("has options that end outside the file", large_at)
            custom_options = (large_at, large_at + large_size)
        return Operator(index, name, custom, version, inputs, outputs, values[3], options, custom_options)

    def subgraph(
        self,
        index: int,
        table: Table,
        codes: List[Tuple[str, bool, int]],
        buffers: List[Optional[Span]],
    ) -> Subgraph:
        """The graph in the table."""
        buffer = self.buffer
        buffer.budget.spend(_STEPS_PER_GRAPH, buffer.what)
        tensors = tuple([self.tensor(i, at, buffers) for i, at in enumerate(table.places(0))])
        inputs, outputs = table.values(1, "i", 4), table.values(2, "i", 4)
        for tensor in (*inputs, *outputs):
            if not 0 <= tensor < len(tensors):
                raise buffer.broken(f"has a graph on tensor {tensor} of {len(tensors)}", table.at)
            name_start, name_stop = tensors[tensor].name_span
            buffer.budget.look(name_stop - name_start, buffer.what)
        buffer.budget.spend(_STEPS_PER_TOLD * (len(inputs) + len(outputs)), buffer.what)
        costs = [_STEPS_PER_EDGE + len(tensor.shape) // 4 for tensor in tensors]
        operators = tuple(
            [self.operator(i, at, codes, tensors, costs) for i, at in enumerate(table.places(3))]
        )
        return Subgraph(index, table.text(4, NAMES), tensors, operators, inputs, outputs)


def _claim_sparsity(table: Table) -> bool:
    table.values(0, "i", 4)
    table.values(1, "i", 4)
    for dimension in table.tables(2):
        for kind_field, field in ((2, 3), (4, 5)):
            indices = dimension.table(field)
            letter_width = schema.INDEX_WIDTHS.get(dimension.integer(kind_field, U8))
            if indices is not None and letter_width is not None:
                indices.values(0, *letter_width)
    return True


def _claim_lists(table: Table, lists: Tuple[Tuple[int, int], ...]) -> None:
    for field, width in lists:
        if width == 0:
            table.text(field)
            continue
        span = table.span(field, width)
        if span is not None:
            table.buffer.mark(span[0], span[1], GRAPH)


def _read_signature(table: Table) -> Signature:
    maps = [{entry.text(0): entry.integer(1, U32) for entry in table.tables(field)} for field in (0, 1)]
    return Signature(table.text(2), table.integer(4, U32), maps[0], maps[1])


def producers(graph: Subgraph) -> Dict[int, int]:
    """Tensor → the operation that writes it."""
    return {
        tensor: operator.index for operator in graph.operators for tensor in operator.outputs if tensor >= 0
    }


def consumers(graph: Subgraph) -> Dict[int, List[int]]:
    """Tensor → the operations that read it."""
    found: Dict[int, List[int]] = {}
    for operator in graph.operators:
        for tensor in set(operator.inputs):
            if tensor >= 0:
                found.setdefault(tensor, []).append(operator.index)
    return found


def closure(
    graph: Subgraph, outputs: Set[int], inputs: Set[int], made_by: Mapping[int, int], budget: Budget
) -> Set[int]:
    """The operations met on the way back from the tensors ``outputs`` to the tensors ``inputs``.

    ``made_by`` is what :func:`producers` says. Each of them takes a step.
    """
    met: Set[int] = set()
    waiting = [tensor for tensor in outputs if tensor not in inputs]
    seen = set(waiting)
    while waiting:
        operator = made_by.get(waiting.pop())
        if operator is None or operator in met:
            continue
        met.add(operator)
        reads = graph.operators[operator].inputs
        budget.spend(1 + len(reads) // 4, "the TensorFlow Lite model")
        for tensor in reads:
            if tensor >= 0 and tensor not in inputs and tensor not in seen:
                seen.add(tensor)
                waiting.append(tensor)
    return met


def op_name(graph: Subgraph, operator: Operator) -> str:
    """The name of an operation: that of its first output."""
    for tensor in operator.outputs:
        if tensor >= 0:
            return graph.tensors[tensor].name
    return ""


def count_types(operators: Sequence[Operator]) -> Dict[str, int]:
    """Number of operations by type, in the order of their first appearance."""
    found: Dict[str, int] = {}
    for operator in operators:
        found[operator.type] = found.get(operator.type, 0) + 1
    return found
