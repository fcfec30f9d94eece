"""A TensorFlow Lite file: its graphs, constants and metadata, every offset checked.

Source of the format: tensorflow/tensorflow ``tensorflow/compiler/mlir/lite/schema/schema.fbs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Set, Tuple

from boardbench.inspect import tflite_schema as schema
from boardbench.inspect.errors import Malformed
from boardbench.inspect.flatbuffer import I8, I32, U8, U32, U64, FlatBuffer, Table
from boardbench.inspect.ledger import GRAPH, METADATA, NAMES, QUANTISATION, Ledger

Span = Tuple[int, int]

SPARSITY = "sparsity"


@dataclass(frozen=True)
class Quantisation:
    """Affine quantisation: one scale for the tensor, or one for each index of a dimension."""

    scales: Tuple[float, ...]
    zero_points: Tuple[int, ...]
    dimension: int


@dataclass(frozen=True)
class Tensor:
    """A value of the graph; ``data`` is where its bytes are when it is constant.

    ``shape`` has -1 where the model leaves a size open; ``fixed_shape`` never has.
    """

    index: int
    name: str
    dtype: str
    shape: Tuple[int, ...]
    fixed_shape: Tuple[int, ...]
    buffer: int
    data: Optional[Span]
    quantisation: Optional[Quantisation]
    variable: bool
    sparse: bool
    has_rank: bool

    @property
    def constant(self) -> bool:
        """Whether the value is in the file."""
        return self.data is not None


@dataclass(frozen=True)
class Operator:
    """One node; -1 among the inputs stands for an optional one that is left out."""

    index: int
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


@dataclass(frozen=True)
class Subgraph:
    """One graph; operations are in the order in which they run."""

    index: int
    name: str
    tensors: Tuple[Tensor, ...]
    operators: Tuple[Operator, ...]
    inputs: Tuple[int, ...]
    outputs: Tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """Names under which the inputs and outputs of a graph are offered."""

    key: str
    subgraph: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]


@dataclass(frozen=True)
class Model:
    """A whole file. ``buffers[i]`` is where the i-th constant lies; None where it has no bytes."""

    data: memoryview
    version: int
    description: str
    subgraphs: Tuple[Subgraph, ...]
    buffers: Tuple[Optional[Span], ...]
    metadata: Mapping[str, int]
    signatures: Tuple[Signature, ...]
    external_files: Tuple[str, ...]

    @property
    def main(self) -> Subgraph:
        """The graph that an interpreter runs."""
        return self.subgraphs[0]

    def metadata_bytes(self, name: str, limit: int = 4096) -> bytes:
        """Content of a named piece of metadata; empty when it is absent."""
        index = self.metadata.get(name, -1)
        span = self.buffers[index] if 0 <= index < len(self.buffers) else None
        return b"" if span is None else bytes(self.data[span[0] : min(span[1], span[0] + limit)])


def read_model(data: memoryview, ledger: Ledger) -> Model:
    """The model in the bytes; raises Malformed when they are truncated or contradict themselves.

    Claims everything in the ledger but the bytes of constants and of operators' custom options.
    """
    buffer = FlatBuffer(data, "the TensorFlow Lite model", ledger)
    root = buffer.root(schema.IDENTIFIER)
    codes = [_read_code(table) for table in root.tables(1)]
    buffers = tuple(_read_buffer(table, len(data)) for table in root.tables(4))
    graphs = tuple(
        _read_subgraph(index, table, codes, buffers, len(data)) for index, table in enumerate(root.tables(2))
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
        buffers=buffers,
        metadata=metadata,
        signatures=signatures,
        external_files=groups,
    )


def _read_code(table: Table) -> Tuple[str, bool, int]:
    """(type as the schema spells it or the custom name, whether it is custom, version)."""
    code = max(table.integer(0, I8), table.integer(3, I32))
    version = table.integer(2, I32, 1)
    custom_name = table.text(1)
    if code == schema.CUSTOM:
        return custom_name or "CUSTOM", True, version
    name = schema.OPERATORS[code] if 0 <= code < len(schema.OPERATORS) else f"BUILTIN_{code}"
    return name, False, version


def _read_buffer(table: Table, size: int) -> Optional[Span]:
    inside = table.span(0)
    if inside is not None and inside[1] > inside[0]:
        return inside
    # Models beyond 2 GB keep the bytes after the FlatBuffer; 0 and 1 mean "not used".
    offset, length = table.integer(1, U64), table.integer(2, U64)
    if offset <= 1 or length == 0:
        return None
    if offset + length > size:
        raise table.buffer.broken("has constants that end outside the file", offset)
    return offset, offset + length


def _read_quantisation(table: Optional[Table]) -> Optional[Quantisation]:
    if table is None:
        return None
    table.values(0, "f", 4)
    table.values(1, "f", 4)
    scales = table.values(2, "f", 4)
    zero_points = table.values(3, "q", 8)
    details = table.table(5)
    if details is not None:
        kind = table.integer(4, U8)
        if kind == 1:
            span = details.span(0)
            if span is not None:
                table.buffer.ledger.claim(span[0], span[1], QUANTISATION)
        elif kind == 2:
            details.values(3, "i", 4)
    if not scales:
        return None
    return Quantisation(
        tuple(float(scale) for scale in scales),
        tuple(int(point) for point in zero_points),
        table.integer(6, I32),
    )


def _claim_sparsity(table: Optional[Table]) -> bool:
    if table is None:
        return False
    table.values(0, "i", 4)
    table.values(1, "i", 4)
    for dimension in table.tables(2):
        for kind_field, field in ((2, 3), (4, 5)):
            indices = dimension.table(field)
            letter_width = schema.INDEX_WIDTHS.get(dimension.integer(kind_field, U8))
            if indices is not None and letter_width is not None:
                indices.values(0, *letter_width)
    return True


def _read_tensor(index: int, table: Table, buffers: Tuple[Optional[Span], ...]) -> Tensor:
    kind = table.integer(1, I8)
    buffer = table.integer(2, U32)
    if buffer >= len(buffers) and buffer != 0:
        raise table.buffer.broken(f"has a tensor with constant {buffer} of {len(buffers)}", table.at)
    shape = table.values(0, "i", 4)
    signature = table.values(7, "i", 4)
    for variant in table.tables(9):
        variant.values(0, "i", 4)
    return Tensor(
        index=index,
        name=table.text(3),
        dtype=schema.TYPES[kind][0] if 0 <= kind < len(schema.TYPES) else f"type{kind}",
        shape=signature if len(signature) == len(shape) else shape,
        fixed_shape=shape,
        buffer=buffer,
        data=buffers[buffer] if buffer < len(buffers) else None,
        quantisation=_read_quantisation(table.table(4, QUANTISATION)),
        variable=bool(table.integer(5, U8)),
        sparse=_claim_sparsity(table.table(6, SPARSITY)),
        has_rank=bool(table.integer(8, U8)) or bool(shape),
    )


def _claim_lists(table: Table, lists: Tuple[Tuple[int, int], ...]) -> None:
    for field, width in lists:
        if width == 0:
            table.text(field)
            continue
        span = table.span(field, width)
        if span is not None:
            table.buffer.ledger.claim(span[0], span[1], GRAPH)


def _read_operator(
    index: int, table: Table, codes: List[Tuple[str, bool, int]], tensor_count: int, size: int
) -> Operator:
    code = table.integer(0, U32)
    if code >= len(codes):
        raise table.buffer.broken(f"has an operation of kind {code} of {len(codes)}", table.at)
    name, custom, version = codes[code]
    inputs, outputs = table.values(1, "i", 4), table.values(2, "i", 4)
    for tensor in (*inputs, *outputs):
        if not -1 <= tensor < tensor_count:
            raise table.buffer.broken(f"has an operation on tensor {tensor} of {tensor_count}", table.at)
    options_type = table.integer(3, U8)
    options = table.table(4)
    if options is not None:
        _claim_lists(options, schema.OPTION_LISTS.get(options_type, ()))
    more = table.table(12)
    if more is not None:
        _claim_lists(more, schema.OPTION2_LISTS.get(table.integer(11, U8), ()))
    table.values(7, "B", 1)
    table.values(8, "i", 4)
    custom_options = table.span(5)
    large_at, large_size = table.integer(9, U64), table.integer(10, U64)
    if large_at > 1 and large_size > 0:
        if large_at + large_size > size:
            raise table.buffer.broken("has options that end outside the file", large_at)
        custom_options = (large_at, large_at + large_size)
    return Operator(index, name, custom, version, inputs, outputs, options_type, options, custom_options)


def _read_subgraph(
    index: int,
    table: Table,
    codes: List[Tuple[str, bool, int]],
    buffers: Tuple[Optional[Span], ...],
    size: int,
) -> Subgraph:
    tensors = tuple(_read_tensor(i, t, buffers) for i, t in enumerate(table.tables(0)))
    inputs, outputs = table.values(1, "i", 4), table.values(2, "i", 4)
    for tensor in (*inputs, *outputs):
        if not 0 <= tensor < len(tensors):
            raise table.buffer.broken(f"has a graph on tensor {tensor} of {len(tensors)}", table.at)
    operators = tuple(_read_operator(i, t, codes, len(tensors), size) for i, t in enumerate(table.tables(3)))
    return Subgraph(index, table.text(4, NAMES), tensors, operators, inputs, outputs)


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


def closure(graph: Subgraph, outputs: Set[int], inputs: Set[int]) -> Set[int]:
    """The operations met on the way back from the tensors ``outputs`` to the tensors ``inputs``."""
    made_by = producers(graph)
    met: Set[int] = set()
    waiting = [tensor for tensor in outputs if tensor not in inputs]
    seen = set(waiting)
    while waiting:
        operator = made_by.get(waiting.pop())
        if operator is None or operator in met:
            continue
        met.add(operator)
        for tensor in graph.operators[operator].inputs:
            if tensor >= 0 and tensor not in inputs and tensor not in seen:
                seen.add(tensor)
                waiting.append(tensor)
    return met
