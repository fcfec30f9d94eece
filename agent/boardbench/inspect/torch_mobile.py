"""A PyTorch Mobile file in its FlatBuffer form (``.ptl``, ``.ff``): its operations, inputs and tensors.

Source of the format: pytorch/pytorch ``torch/csrc/jit/serialization/mobile_bytecode.fbs``; for what is done
with it ``flatbuffer_serializer.cpp`` and ``torch/csrc/jit/runtime/instruction.h``. Everything that a method
uses, and the method itself, is an entry of one list of values.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

from boardbench.inspect.elements import BITS, count_zeros
from boardbench.inspect.errors import Malformed
from boardbench.inspect.executorch import SCALARS
from boardbench.inspect.flatbuffer import I8, U8, U32, FlatBuffer, Table
from boardbench.inspect.ledger import GRAPH, METADATA, NAMES, QUANTISATION, WEIGHTS, Ledger
from boardbench.inspect.report import ModelReport, OpPlacement, Placement, TensorInfo

IDENTIFIER = b"PTMF"
Span = Tuple[int, int]

_WHAT = "the PyTorch Mobile file"
# Numbers of the union of values. Those of one fixed size are no tables, and are there without a description.
_FIXED_BYTES: Mapping[int, int] = {1: 8, 2: 1, 3: 8, 4: 16}
_TENSOR, _TEXTS, _LISTS, _DICT, _OBJECT, _ENUM, _FUNCTION = 5, (6, 14), (7, 8), 9, 10, 15, 16
# Letter of struct and bytes of an element.
_NUMBERS: Mapping[int, Tuple[str, int]] = {11: ("q", 8), 12: ("d", 8), 13: ("B", 1)}
# One instruction: operation code, two numbers. Those that run an operator (OP, OPN) name it by the second.
_INSTRUCTION = struct.Struct("<bxHi")
_RUNS = (0, 1)
_LONGEST_TYPE = 256
# PyTorch's own limit.
_MOST_DIMENSIONS = 64
_STEPS_PER_OPERATION = 12
_METHOD = ".forward"


class _Tensor(NamedTuple):
    """A tensor: the storage that it is in, and its type."""

    storage: int
    dtype: str


class _Method(NamedTuple):
    """A function of the file: what it runs, and its arguments by name and type."""

    name: str
    operations: Tuple[str, ...]
    arguments: Tuple[Tuple[str, str], ...]
    results: Tuple[str, ...]


class _Reader:
    """Reads the list of values; what matters of it is collected in the attributes."""

    def __init__(self, buffer: FlatBuffer) -> None:
        self.buffer = buffer
        self.tensors: List[_Tensor] = []
        self.methods: Dict[int, _Method] = {}

    def value(self, index: int, table: Table) -> None:
        """Reads one entry of the list."""
        kind = table.integer(0, U8)
        size = _FIXED_BYTES.get(kind)
        if size is not None:
            table.fixed(1, size)
            return
        value = table.table(1)
        if value is None:
            return
        if kind == _TENSOR:
            self.tensors.append(self.tensor(value))
        elif kind in _TEXTS:
            value.text(0)
        elif kind in _LISTS:
            value.values(0, "I", 4)
            value.text(1)
        elif kind == _DICT:
            value.values(0, "I", 4)
            value.values(1, "I", 4)
            value.text(2)
        elif kind == _OBJECT:
            value.values(2, "I", 4)
        elif kind in _NUMBERS:
            value.values(0, *_NUMBERS[kind])
        elif kind == _ENUM:
            value.text(0)
        elif kind == _FUNCTION:
            self.methods[index] = self.method(value)

    def tensor(self, table: Table, depth: int = 0) -> _Tensor:
        """The tensor that the table describes; the scales of a quantised one are tensors too."""
        shape = table.values(3, "i", 4)
        if len(shape) > _MOST_DIMENSIONS:
            raise self.buffer.broken(f"has a tensor of {len(shape)} dimensions", table.at)
        table.values(4, "i", 4)
        quantised = table.table(6, QUANTISATION)
        for field in (3, 4) if quantised is not None else ():
            inner = quantised.table(field) if quantised is not None else None
            if inner is not None:
                if depth:
                    raise self.buffer.broken("has a scale that is quantised itself", table.at)
                self.tensors.append(self.tensor(inner, depth + 1))
        number = table.integer(1, I8)
        return _Tensor(table.integer(0, U32), SCALARS.get(number, f"scalar{number}"))

    def method(self, table: Table) -> _Method:
        """The function that the table describes."""
        operators = []
        for each in table.tables(2):
            name, overload = each.text(0), each.text(1)
            operators.append((f"{name}.{overload}" if overload else name)[:_LONGEST_TYPE])
        table.values(3, "I", 4)
        for start, stop in table.spans(4, NAMES):
            self.buffer.mark(start, stop + 1, NAMES)
        debug = table.table(7)
        if debug is not None:
            debug.values(0, "q", 8)
        schema = table.table(6)
        sides: List[Tuple[Tuple[str, str], ...]] = [(), ()]
        if schema is not None:
            for field in (0, 1):
                sides[field] = tuple([(each.text(0), each.text(1)) for each in schema.tables(field)])
        operations = self.operations(table.span(1, _INSTRUCTION.size), operators)
        return _Method(table.text(0), operations, sides[0], tuple(kind for _, kind in sides[1]))

    def operations(self, span: Optional[Span], operators: List[str]) -> Tuple[str, ...]:
        """Names of the operations that the instructions run, in order."""
        if span is None:
            return ()
        buffer = self.buffer
        start, stop = span
        buffer.budget.spend((stop - start) // _INSTRUCTION.size, _WHAT)
        buffer.mark(start, stop, GRAPH)
        found = []
        for code, _, index in _INSTRUCTION.iter_unpack(buffer.data[start:stop]):
            if code in _RUNS:
                if not 0 <= index < len(operators):
                    raise buffer.broken(f"runs operation {index} of {len(operators)}", start)
                found.append(operators[index])
        buffer.budget.spend(_STEPS_PER_OPERATION * len(found), _WHAT)
        return tuple(found)


def report(base: ModelReport, data: memoryview, ledger: Ledger) -> ModelReport:
    """``base`` with everything filled in that the file tells; raises Malformed."""
    buffer = FlatBuffer(data, _WHAT, ledger)
    root = buffer.root(IDENTIFIER)
    for field, purpose in ((1, METADATA), (8, GRAPH)):
        for extra in root.tables(field, purpose):
            extra.text(0, purpose)
            content = extra.span(1)
            if content is not None:
                ledger.claim(content[0], content[1] + 1, purpose)
    chosen = root.values(2, "I", 4)
    root.values(9, "I", 4)
    for kind in root.tables(7):
        kind.text(0)
        for start, stop in kind.spans(2, NAMES):
            buffer.mark(start, stop + 1, NAMES)
    reader = _Reader(buffer)
    for index, table in enumerate(root.tables(4)):
        reader.value(index, table)
    # The methods of the module come first, as they are listed; functions that they call are not among them.
    methods = [reader.methods[index] for index in dict.fromkeys(chosen) if index in reader.methods]
    methods = methods or list(reader.methods.values())
    if not methods:
        raise Malformed(f"{_WHAT} has no method: it is empty or damaged; export it again")
    parameters = _claim_storages(root, reader, ledger)
    main = next((method for method in methods if method.name.endswith(_METHOD)), methods[0])
    operations = [name for method in methods for name in method.operations]
    types: Dict[str, int] = {}
    for name in operations:
        types[name] = types.get(name, 0) + 1
    return replace(
        base,
        format_version=f"bytecode {root.integer(0, U32)}, lite interpreter (FlatBuffer)",
        # The first argument is the module itself; of tensors neither type nor size is told.
        inputs=tuple([TensorInfo(name, "", ()) for name, kind in main.arguments[1:] if kind == "Tensor"]),
        outputs=tuple([TensorInfo("", "", ()) for kind in main.results if kind == "Tensor"]),
        op_count=len(operations),
        op_types=types,
        ops=tuple([OpPlacement(index, name) for index, name in enumerate(operations)]),
        parameter_count=parameters,
        bytes=ledger.uses(data),
        placement=Placement(
            detail="the file does not say where its operations run; PyTorch runs it where it is loaded"
        ),
    )


def _claim_storages(root: Table, reader: _Reader, ledger: Ledger) -> Optional[int]:
    """Number of parameters: elements of the storages that tensors are in. Claims the bytes of all."""
    dtypes: Dict[int, str] = {}
    for tensor in reader.tensors:
        dtypes.setdefault(tensor.storage, tensor.dtype)
    storages = [each.span(0) for each in root.tables(6)]
    missing = max(dtypes, default=-1)
    if missing >= len(storages):
        raise reader.buffer.broken(f"has a tensor in storage {missing} of {len(storages)}", root.at)
    total: Optional[int] = 0
    for index, span in enumerate(storages):
        dtype = dtypes.get(index, "")
        bits = BITS.get(dtype)
        if span is None:
            continue
        start, stop = span
        if bits is None:
            ledger.claim(start, stop, WEIGHTS, dtype)
            total = None if index in dtypes else total
            continue
        elements = (stop - start) * 8 // bits
        reader.buffer.budget.look(stop - start, _WHAT)
        ledger.claim(
            start, stop, WEIGHTS, dtype, "", elements, count_zeros(reader.buffer.data[start:stop], dtype)
        )
        total = None if total is None else total + elements
    return total
