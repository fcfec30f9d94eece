"""An ExecuTorch program (``.pte``): its operations, what was delegated at export, and its planned memory.

Source of the format: pytorch/executorch ``schema/program.fbs``, ``schema/scalar_type.fbs`` and
``runtime/executor``'s extended header. Delegation is decided when the program is exported, so the file itself
is evidence of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Dict, List, Mapping, Optional, Tuple

from boardbench.inspect.cost import product
from boardbench.inspect.elements import BITS, count_zeros
from boardbench.inspect.errors import Malformed
from boardbench.inspect.flatbuffer import I8, I32, U8, U32, U64, FlatBuffer, Table
from boardbench.inspect.ledger import GRAPH, METADATA, WEIGHTS, Ledger
from boardbench.inspect.report import (
    ACCELERATORS,
    Evidence,
    ModelReport,
    OpPlacement,
    Placement,
    ReportWarning,
    TensorInfo,
    Unit,
    UnitCount,
    Verdict,
)

Span = Tuple[int, int]

_HEADER_AT = 8
_HEADER_MAGIC = b"eh00"
_HEADER = struct.Struct("<4sIQQ")
_DELEGATE = "delegate"
_LONGEST_TYPE = 256
# PyTorch's own limit.
_MOST_DIMENSIONS = 64
_STEPS_PER_OPERATION = 12

SCALARS: Mapping[int, str] = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
    12: "int8",
    13: "uint8",
    14: "int32",
    15: "bfloat16",
    22: "uint16",
    23: "float8_e5m2",
    24: "float8_e4m3fn",
    25: "float8_e5m2fnuz",
    26: "float8_e4m3fnuz",
    27: "uint16",
    28: "uint32",
    29: "uint64",
}
# Where a delegate runs what it took; others are named and their unit left open.
DELEGATES: Mapping[str, Unit] = {
    "XnnpackBackend": Unit.CPU_DELEGATE,
    "QnnBackend": Unit.NPU,
    "EthosUBackend": Unit.NPU,
    "NeuropilotBackend": Unit.NPU,
    "EnnBackend": Unit.NPU,
    "NXPBackend": Unit.NPU,
    "VulkanBackend": Unit.GPU,
    "MPSBackend": Unit.GPU,
    "MetalBackend": Unit.GPU,
    "CudaBackend": Unit.GPU,
}
# Numbers of the unions in the schema.
_TENSOR, _STRING = 5, 6
_LISTS = {7: ("q", 8), 8: ("d", 8), 9: ("B", 1), 10: ("i", 4), 11: ("i", 4)}
_KERNEL, _DELEGATED = 1, 2
_STATIC = 0


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: Tuple[int, ...]
    buffer: int
    planned: bool
    open: bool


@dataclass(frozen=True)
class _Plan:
    """One method of the program."""

    name: str
    values: Tuple[Optional[_Tensor], ...]
    inputs: Tuple[int, ...]
    outputs: Tuple[int, ...]
    ops: Tuple[Tuple[str, bool, Tuple[int, ...]], ...]
    delegates: Tuple[str, ...]
    # Of each delegate: whether its data is in a segment, and in which (or in which inline entry).
    delegate_data: Tuple[Tuple[bool, int], ...]
    planned_bytes: int


def report(base: ModelReport, data: memoryview, ledger: Ledger) -> ModelReport:
    """``base`` with everything filled in that the file tells; raises Malformed."""
    size, segments_at = len(data), 0
    if bytes(data[_HEADER_AT : _HEADER_AT + 4]) == _HEADER_MAGIC and len(data) >= _HEADER_AT + _HEADER.size:
        _, length, program_size, segments_at = _HEADER.unpack_from(data, _HEADER_AT)
        ledger.claim(_HEADER_AT, _HEADER_AT + min(max(length, _HEADER.size), 64), GRAPH)
        if program_size > len(data) or segments_at > len(data):
            raise Malformed(
                f"the ExecuTorch program needs {max(program_size, segments_at)} bytes and the file has "
                f"{len(data)}: it is truncated; copy it again"
            )
        size = program_size or len(data)
    buffer = FlatBuffer(data[:size], "the ExecuTorch program", ledger)
    root = buffer.root()
    ledger.claim(4, 8, GRAPH)
    plans = [_read_plan(table) for table in root.tables(1)]
    if not plans:
        raise Malformed("the ExecuTorch program has no method: it is empty or damaged; export it again")
    main = next((plan for plan in plans if plan.name == "forward"), plans[0])
    _claim_data(root, data, segments_at, plans, ledger)
    ops = tuple(_placed(index, kind, delegated) for index, (kind, delegated, _) in enumerate(main.ops))
    types: Dict[str, int] = {}
    for op in ops:
        types[op.type] = types.get(op.type, 0) + 1
    warnings = []
    if len(plans) > 1:
        warnings.append(
            ReportWarning(
                "more_methods",
                f"the program has {len(plans)} methods ({', '.join(plan.name for plan in plans[:8])}); this "
                f"report is about {main.name!r}",
            )
        )
    return replace(
        base,
        format_version=str(root.integer(0, U32)),
        inputs=tuple(_info(main, index) for index in main.inputs if _is_tensor(main, index)),
        outputs=tuple(_info(main, index) for index in main.outputs if _is_tensor(main, index)),
        op_count=len(ops),
        op_types=types,
        ops=ops,
        placement=_placement(ops, main),
        # What a delegate keeps in its own data is its own secret.
        parameter_count=None if main.delegates else _parameters(main),
        arena_estimate_bytes=main.planned_bytes,
        bytes=ledger.uses(data),
        warnings=tuple(warnings),
    )


def _is_tensor(plan: _Plan, index: int) -> bool:
    return 0 <= index < len(plan.values) and plan.values[index] is not None


def _info(plan: _Plan, index: int) -> TensorInfo:
    tensor = plan.values[index]
    if tensor is None:
        return TensorInfo("", "", ())
    return TensorInfo("", tensor.dtype, tuple(-1 for _ in tensor.shape) if tensor.open else tensor.shape)


def _parameters(plan: _Plan) -> Optional[int]:
    total = 0
    seen = set()
    for tensor in plan.values:
        if tensor is None or tensor.buffer == 0 or tensor.planned or tensor.buffer in seen:
            continue
        seen.add(tensor.buffer)
        count = product(tensor.shape)
        if count is None:
            return None
        total += count
    return total


def _read_plan(table: Table) -> _Plan:
    meta = table.table(1)
    if meta is not None:
        meta.text(0, METADATA)
        meta.text(1, METADATA)
    budget = table.buffer.budget
    values = tuple([_read_value(each) for each in table.tables(2)])
    operators = []
    for each in table.tables(6):
        name, overload = each.text(0), each.text(1)
        operators.append((f"{name}.{overload}" if overload else name)[:_LONGEST_TYPE])
    delegates, delegate_data = [], []
    for each in table.tables(7):
        delegates.append(each.text(0)[:_LONGEST_TYPE])
        where = each.table(1)
        delegate_data.append(
            (False, -1) if where is None else (bool(where.integer(0, I8)), where.integer(1, U32))
        )
        for spec in each.tables(2):
            spec.text(0, METADATA)
            span = spec.span(1)
            if span is not None:
                table.buffer.ledger.claim(span[0], span[1], METADATA)
    ops: List[Tuple[str, bool, Tuple[int, ...]]] = []
    for chain in table.tables(5):
        chain.values(0, "i", 4)
        chain.values(1, "i", 4)
        for instruction in chain.tables(2):
            call = instruction.table(1)
            kind = instruction.integer(0, U8)
            if call is None or kind not in (_KERNEL, _DELEGATED):
                continue
            index, arguments = call.integer(0, I32), call.values(1, "i", 4)
            budget.spend(_STEPS_PER_OPERATION + len(arguments), table.buffer.what)
            names = operators if kind == _KERNEL else delegates
            if not 0 <= index < len(names):
                raise table.buffer.broken(f"calls operation {index} of {len(names)}", table.at)
            ops.append((names[index], kind == _DELEGATED, arguments))
        for frames in chain.tables(3):
            for frame in frames.tables(0):
                for field in (0, 2, 3):
                    frame.text(field, METADATA)
    sizes = table.values(8, "q", 8)
    inputs, outputs = table.values(3, "i", 4), table.values(4, "i", 4)
    budget.spend(2 * (len(inputs) + len(outputs)) + len(sizes) // 8, table.buffer.what)
    return _Plan(
        name=table.text(0),
        values=values,
        inputs=inputs,
        outputs=outputs,
        ops=tuple(ops),
        delegates=tuple(delegates),
        delegate_data=tuple(delegate_data),
        # The first entry is not used (see the schema).
        planned_bytes=sum(max(0, each) for each in sizes[1:]),
    )


def _read_value(table: Table) -> Optional[_Tensor]:
    kind = table.integer(0, U8)
    value = table.table(1)
    if value is None:
        return None
    if kind == _STRING:
        value.text(0)
    elif kind in _LISTS:
        value.values(0, *_LISTS[kind])
    if kind != _TENSOR:
        return None
    value.values(3, "B", 1)
    planned = value.table(6) is not None
    extra = value.table(9)
    if extra is not None:
        extra.text(1)
    number = value.integer(0, I8)
    shape = value.values(2, "i", 4)
    if len(shape) > _MOST_DIMENSIONS:
        raise value.buffer.broken(f"has a tensor of {len(shape)} dimensions", value.at)
    return _Tensor(
        dtype=SCALARS.get(number, f"scalar{number}"),
        shape=shape,
        buffer=value.integer(5, U32),
        planned=planned,
        open=value.integer(8, I8) != _STATIC,
    )


def _claim_data(root: Table, data: memoryview, segments_at: int, plans: List[_Plan], ledger: Ledger) -> None:
    """Claims constants and delegates' data, inside the FlatBuffer and in the segments behind it."""
    inline = [each.span(0) for each in root.tables(2)]
    inline_delegates = [each.span(0) for each in root.tables(3)]
    segments: List[Span] = []
    for each in root.tables(4):
        start = segments_at + each.integer(0, U64)
        stop = start + each.integer(1, U64)
        if stop > len(data):
            raise Malformed(
                f"the ExecuTorch program has data up to byte {stop} of {len(data)}: it is truncated; copy "
                "it again"
            )
        segments.append((start, stop))
    constants: List[Optional[Span]] = list(inline)
    constant_segment = root.table(5)
    if constant_segment is not None:
        index, offsets = constant_segment.integer(0, U32), constant_segment.values(1, "Q", 8)
        root.buffer.budget.spend(len(offsets), root.buffer.what)
        if offsets and index < len(segments):
            start, stop = segments[index]
            ends = sorted({*(start + offset for offset in offsets if start + offset <= stop), stop})
            following = {begin: ends[number + 1] for number, begin in enumerate(ends[:-1])}
            constants = [
                (start + offset, following[start + offset]) if start + offset in following else None
                for offset in offsets
            ]
    for each in root.tables(6):
        each.values(1, "Q", 8)
    readers: Dict[int, Tuple[_Tensor, str]] = {}
    for plan in plans:
        reading: Dict[int, str] = {}
        for kind, _, arguments in plan.ops:
            for argument in arguments:
                reading.setdefault(argument, kind)
        for index, tensor in enumerate(plan.values):
            if tensor is not None and tensor.buffer and not tensor.planned:
                readers.setdefault(tensor.buffer, (tensor, reading.get(index, "")))
        for number, (in_segment, where) in enumerate(plan.delegate_data):
            places = segments if in_segment else inline_delegates
            span = places[where] if 0 <= where < len(places) else None
            if span is not None:
                ledger.claim(span[0], span[1], _DELEGATE, "", plan.delegates[number])
    for index, span in enumerate(constants):
        if span is None or index not in readers:
            continue
        tensor, kind = readers[index]
        count, bits = product(tensor.shape), BITS.get(tensor.dtype)
        if count is None or bits is None:
            ledger.claim(span[0], span[1], WEIGHTS, tensor.dtype, kind)
            continue
        stop = min(span[1], span[0] + -(-count * bits // 8))
        root.buffer.budget.look(max(0, stop - span[0]), root.buffer.what)
        ledger.claim(
            span[0], stop, WEIGHTS, tensor.dtype, kind, count, count_zeros(data[span[0] : stop], tensor.dtype)
        )
    for each in root.tables(7):
        each.text(0)
        where = each.integer(1, U32)
        if where < len(segments):
            ledger.claim(*segments[where], "named data")


def _placed(index: int, kind: str, delegated: bool) -> OpPlacement:
    if not delegated:
        return OpPlacement(index, kind, "", Unit.CPU)
    return OpPlacement(index, kind, "", DELEGATES.get(kind, Unit.DELEGATE), kind)


def _placement(ops: Tuple[OpPlacement, ...], plan: _Plan) -> Placement:
    counts: Dict[Unit, int] = {}
    cpu: Dict[str, int] = {}
    for op in ops:
        counts[op.unit] = counts.get(op.unit, 0) + 1
        if op.unit is Unit.CPU:
            cpu[op.type] = cpu.get(op.type, 0) + 1
    fast = sum(count for unit, count in counts.items() if unit in ACCELERATORS)
    slow = len(ops) - fast
    accelerated = Verdict.PARTLY if slow else Verdict.ACCELERATED
    delegated = len(ops) - counts.get(Unit.CPU, 0)
    names = ", ".join(dict.fromkeys(plan.delegates))
    return Placement(
        evidence=Evidence.STATIC,
        # How many operations a delegate took is in its own data.
        accelerated_ops=None if fast else 0,
        cpu_ops=None if delegated - fast else slow,
        cpu_op_types=cpu,
        units=tuple(UnitCount(unit, counts[unit]) for unit in Unit if unit in counts and unit is Unit.CPU),
        ops=ops,
        verdict=accelerated if fast else Verdict.NOT_ACCELERATED,
        detail=f"{counts.get(Unit.CPU, 0)} operations on portable kernels of the CPU"
        + (
            f", {delegated} calls of delegates ({names}); what is inside a delegate the file does not say"
            if delegated
            else ", and nothing was delegated at export"
        ),
    )
