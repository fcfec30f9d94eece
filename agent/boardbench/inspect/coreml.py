"""A Core ML model: ``.mlmodel``, or ``.mlpackage`` (a folder, or a ZIP of one) with its weights beside it.

Source of the format: apple/coremltools ``mlmodel/format/*.proto``; for ``weight.bin``
``mlmodel/src/MILBlob/Blob/StorageFormat.hpp``: each blob begins with 64 bytes that say where its data lies.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from boardbench.inspect.archive import read_archive, read_entry
from boardbench.inspect.budget import Budget
from boardbench.inspect.content import Opened
from boardbench.inspect.coreml_schema import (
    ARRAYS,
    KINDS,
    LAYERS,
    LSTM_LAYERS,
    LSTM_WEIGHTS,
    MIL_TYPES,
)
from boardbench.inspect.coreml_schema import (
    WEIGHTS as WEIGHT_FIELDS,
)
from boardbench.inspect.cost import product
from boardbench.inspect.elements import BITS, count_zeros
from boardbench.inspect.errors import Malformed, Unreadable
from boardbench.inspect.ledger import GRAPH, METADATA, WEIGHTS, Ledger
from boardbench.inspect.protobuf import Message, Span, Wire
from boardbench.inspect.report import ByteUse, ModelReport, OpPlacement, Placement, ReportWarning, TensorInfo

MANIFEST = "Manifest.json"
SPECIFICATION = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS_FILE = "Data/com.apple.CoreML/weights/weight.bin"

_NEURAL_NETWORKS = frozenset((303, 403, 500))
_PIPELINES = {200: 1, 201: 1, 202: 0}
_PROGRAM = 502
_SETTINGS = frozenset(("int32", "int64", "bool", "str", ""))
_WHAT = "the Core ML model"
_STEPS_PER_OPERATION = 10
_DEEPEST = 8
_MOST_FILES = 1000
_LARGEST_SPECIFICATION_BYTES = 512 << 20
_SENTINEL = 0xDEADBEEF
# By the version of the specification, from Model.proto; each also takes those before it.
_SYSTEMS: Dict[int, str] = {
    1: "macOS 10.13 or iOS 11",
    2: "macOS 10.13.2 or iOS 11.2",
    3: "macOS 10.14 or iOS 12",
    4: "macOS 10.15 or iOS 13",
    5: "macOS 11 or iOS 14",
    6: "macOS 12 or iOS 15",
    7: "macOS 13 or iOS 16",
    8: "macOS 14 or iOS 17",
    9: "macOS 15 or iOS 18",
    10: "macOS 26 or iOS 26",
}
_BLOB = struct.Struct("<IIQQ")
_IMAGE_CHANNELS = {10: 1, 20: 3, 30: 3, 40: 1}


@dataclass(frozen=True)
class _Operation:
    type: str
    name: str


@dataclass
class _Found:
    operations: List[_Operation]
    parameters: Optional[int]
    macs: Optional[int]
    # (offset in the weights, type, operation that reads it, elements)
    blobs: List[Tuple[int, str, str, Optional[int]]]
    nested: int = 0


def report(base: ModelReport, data: memoryview, ledger: Ledger) -> ModelReport:
    """``base`` filled in from one file: an ``.mlmodel``, or a ZIP of an ``.mlpackage``; raises Malformed."""
    if bytes(data[:2]) == b"PK":
        budget = ledger.budget(len(data))
        archive = read_archive(data, budget)
        # The folder itself may or may not be part of the names.
        entry = next((e for e in archive.entries if e.name.endswith(SPECIFICATION)), None)
        if entry is None:
            raise Malformed(f"the Core ML package holds no {SPECIFICATION}: export it again")
        content = memoryview(read_entry(data, entry, _LARGEST_SPECIFICATION_BYTES, budget))
        filled, _ = _read(base, content, Ledger(budget))
        for each in archive.entries:
            purpose = GRAPH if each.name.endswith(SPECIFICATION) else METADATA
            purpose = WEIGHTS if each.name.endswith(".bin") else purpose
            ledger.claim(each.data_start, each.data_start + each.compressed_bytes, purpose)
        ledger.fill("archive")
        return replace(filled, bytes=ledger.uses(data))
    filled, _ = _read(base, data, ledger)
    ledger.fill(GRAPH)
    return replace(filled, bytes=ledger.uses(data))


def report_folder(path: Path) -> ModelReport:
    """The report on an ``.mlpackage`` folder: its size is that of all files in it; raises InspectError.

    Its digest is the SHA-256 over the names and digests of the files, in the order of their names.
    """
    files = _files(path)
    specification = path / SPECIFICATION
    digest = hashlib.sha256()
    total = 0
    uses: List[ByteUse] = []
    budget = Budget((path / SPECIFICATION).stat().st_size if (path / SPECIFICATION).is_file() else 0)
    filled: Optional[ModelReport] = None
    found: Optional[_Found] = None
    for file in files:
        with Opened(file, mapped=True) as data:
            inner = hashlib.sha256()
            for start in range(0, len(data), 1 << 20):
                inner.update(data[start : start + (1 << 20)])
            name = file.relative_to(path).as_posix()
            digest.update(f"{name}\0{inner.hexdigest()}\n".encode("utf-8", "surrogateescape"))
            total += len(data)
            if file == specification:
                base = ModelReport(path.name, "", 0, "coreml")
                ledger = Ledger(budget)
                filled, found = _read(base, data, ledger)
                ledger.fill(GRAPH)
                uses.extend(ledger.uses(data))
            elif not name.endswith(".bin"):
                uses.append(ByteUse(METADATA, "", "", len(data)))
    if filled is None or found is None:
        raise Malformed(f"{path}: the package holds no {SPECIFICATION}: export it again")
    for file in files:
        if file.name.endswith(".bin"):
            with Opened(file, mapped=True) as data:
                uses.extend(_weights(data, found if file == path / WEIGHTS_FILE else None, budget))
    return replace(filled, sha256=digest.hexdigest(), size_bytes=total, bytes=_merged(uses))


def _files(path: Path) -> List[Path]:
    found: List[Path] = []
    try:
        for folder, folders, names in os.walk(path):
            folders.sort()
            found.extend(Path(folder) / name for name in names if not (Path(folder) / name).is_symlink())
            if len(found) > _MOST_FILES:
                raise Malformed(f"{path}: more than {_MOST_FILES} files: not a Core ML package")
    except OSError as error:
        raise Unreadable(f"{path}: can't be read: {error}") from error
    return sorted(found)


def _merged(uses: List[ByteUse]) -> Tuple[ByteUse, ...]:
    totals: Dict[Tuple[str, str, str], ByteUse] = {}
    for use in uses:
        if use.size_bytes == 0:
            continue
        key = (use.purpose, use.dtype, use.op_type)
        old = totals.get(key)
        if old is None:
            totals[key] = use
        else:
            totals[key] = ByteUse(
                *key,
                old.size_bytes + use.size_bytes,
                None
                if old.zero_elements is None or use.zero_elements is None
                else old.zero_elements + use.zero_elements,
                None if old.elements is None or use.elements is None else old.elements + use.elements,
            )
    return tuple(
        sorted(totals.values(), key=lambda use: (-use.size_bytes, use.purpose, use.dtype, use.op_type))
    )


def _read(base: ModelReport, data: memoryview, ledger: Ledger) -> Tuple[ModelReport, _Found]:
    found = _Found([], 0, 0, [])
    root = Wire(data, _WHAT, ledger.budget(len(data))).root()
    description = root.message(2)
    kind = _model(root, found, ledger, 0)
    types: Dict[str, int] = {}
    for operation in found.operations:
        types[operation.type] = types.get(operation.type, 0) + 1
    warnings: List[ReportWarning] = []
    if found.nested:
        warnings.append(
            ReportWarning(
                "nested_graphs",
                f"{found.nested} more operations are in blocks inside operations (cond, while_loop); they "
                "are not counted, because the data decides how often they run",
            )
        )
    metadata = description.message(100) if description is not None else None
    if description is not None:
        ledger.claim(description.start, description.stop, METADATA)
    user = {}
    for entry in metadata.messages(100) if metadata is not None else ():
        user[entry.text(1)] = entry.text(2)
    version = user.get("com.github.apple.coremltools.version", "")
    operations = found.operations
    return (
        replace(
            base,
            format_version=f"specification {root.integer(1)}, {kind}",
            producer=f"coremltools {version}" if version else "",
            inputs=tuple(
                _feature(each) for each in (description.messages(1) if description is not None else ())
            ),
            outputs=tuple(
                _feature(each) for each in (description.messages(10) if description is not None else ())
            ),
            op_count=len(operations) if operations else None,
            op_types=types,
            ops=tuple(OpPlacement(index, each.type, each.name) for index, each in enumerate(operations)),
            placement=Placement(
                detail="the file does not say where its operations run; Core ML chooses on the device: run it"
                + _needs(root.integer(1))
            ),
            parameter_count=found.parameters if operations else None,
            multiply_accumulates=found.macs if operations and not found.nested else None,
            warnings=tuple(warnings),
        ),
        found,
    )


def _needs(version: int) -> str:
    """Where Core ML takes it."""
    system = _SYSTEMS.get(version)
    return f" on {system}, or later" if system else ""


def _model(root: Message, found: _Found, ledger: Ledger, depth: int) -> str:
    if depth > _DEEPEST:
        raise Malformed("the Core ML model nests pipelines deeper than any model: damaged, or made to harm")
    number = next((each for each in root.numbers() if each in KINDS), 0)
    content = root.message(number) if number else None
    if content is None:
        raise Malformed("the Core ML model has no content: it is empty or damaged; export it again")
    if number in _PIPELINES:
        inner = content.message(_PIPELINES[number]) if _PIPELINES[number] else content
        for each in inner.messages(1) if inner is not None else ():
            _model(each, found, ledger, depth + 1)
    elif number in _NEURAL_NETWORKS:
        _network(content, found, ledger)
    elif number == _PROGRAM:
        _program(content, found, ledger)
    return KINDS[number]


# ---- neural networks -------------------------------------------------------------------------------------


def _network(content: Message, found: _Found, ledger: Ledger) -> None:
    # Only programs carry the shapes of their intermediate values.
    found.macs = None
    for layer in content.messages(1):
        number = next((each for each in layer.numbers() if each in LAYERS), 0)
        kind = LAYERS.get(number, "unknown")
        content.wire.budget.spend(_STEPS_PER_OPERATION, _WHAT)
        found.operations.append(_Operation(kind, layer.text(1)))
        parameters = layer.message(number) if number else None
        if parameters is None:
            continue
        holders = [(parameters, WEIGHT_FIELDS.get(number, ()))]
        for field in LSTM_LAYERS.get(number, ()):
            holders.extend((each, LSTM_WEIGHTS) for each in parameters.messages(field))
        for holder, fields in holders:
            for field in fields:
                weights = holder.message(field)
                if weights is not None:
                    _weight(weights, kind, found, ledger)


def _weight(weights: Message, kind: str, found: _Found, ledger: Ledger) -> None:
    for field, dtype in ((1, "float32"), (2, "float16"), (30, ""), (31, "int8")):
        for start, stop in weights.spans(field):
            if not dtype:
                # Of fewer bits than a byte: how many is in the quantisation beside it.
                ledger.claim(start, stop, WEIGHTS, "", kind)
                found.parameters = None
                continue
            count = (stop - start) * 8 // BITS[dtype]
            weights.wire.budget.look(stop - start, _WHAT)
            zeros = count_zeros(weights.wire.data[start:stop], dtype)
            ledger.claim(start, stop, WEIGHTS, dtype, kind, count, zeros)
            if found.parameters is not None:
                found.parameters += count


# ---- programs --------------------------------------------------------------------------------------------


def _program(content: Message, found: _Found, ledger: Ledger) -> None:
    functions = {entry.text(1): entry.message(2) for entry in content.messages(2)}
    main = functions.get("main") or next(iter(functions.values()), None)
    if main is None:
        raise Malformed("the Core ML program has no function: it is empty or damaged; export it again")
    blocks = {entry.text(1): entry.message(2) for entry in main.messages(3)}
    block = blocks.get(main.text(2)) or next(iter(blocks.values()), None)
    if block is None:
        return
    shapes: Dict[str, Tuple[str, Optional[Tuple[int, ...]]]] = {}
    for each in main.messages(1):
        shapes[each.text(1)] = _mil_type(each.message(2))
    operations = block.messages(3)
    readers: Dict[str, str] = {}
    for operation in operations:
        for entry in operation.messages(2):
            argument = entry.message(2)
            for binding in argument.messages(1) if argument is not None else ():
                readers.setdefault(binding.text(1), operation.text(1))
    for operation in operations:
        _operation(operation, shapes, readers, found, ledger)


def _operation(
    message: Message,
    shapes: Dict[str, Tuple[str, Optional[Tuple[int, ...]]]],
    readers: Dict[str, str],
    found: _Found,
    ledger: Ledger,
) -> None:
    message.wire.budget.spend(_STEPS_PER_OPERATION, _WHAT)
    kind = message.text(1)
    outputs = [(each.text(1), _mil_type(each.message(2))) for each in message.messages(3)]
    shapes.update(outputs)
    name = outputs[0][0] if outputs else ""
    inputs: Dict[str, str] = {}
    for entry in message.messages(2):
        argument = entry.message(2)
        for binding in argument.messages(1) if argument is not None else ():
            inputs.setdefault(entry.text(1), binding.text(1))
            _value(binding.message(2), kind, found, ledger)
    for entry in message.messages(5):
        if entry.text(1) == "val":
            _value(entry.message(2), readers.get(name, ""), found, ledger)
    found.nested += sum(block.count(3) for block in message.messages(4))
    if kind == "const":
        return
    found.operations.append(_Operation(kind, name))
    count = _multiplied(kind, inputs, outputs, shapes)
    found.macs = None if found.macs is None or count is None else found.macs + count


def _value(value: Optional[Message], kind: str, found: _Found, ledger: Ledger) -> None:
    if value is None:
        return
    dtype, shape = _mil_type(value.message(2))
    count = None if shape is None else product(shape)
    blob = value.message(5)
    if blob is not None:
        found.blobs.append((blob.integer(2), dtype, kind, count))
    else:
        immediate = value.message(3)
        tensor = immediate.message(1) if immediate is not None else None
        span: Optional[Span] = None
        for field in (1, 2, 3, 5, 6, 7):
            held = tensor.message(field) if tensor is not None else None
            span = held.span(1) if held is not None else span
        # Settings of operations, strides and the like, are part of the graph.
        if span is None or count is None or count <= 1 or dtype in _SETTINGS:
            return
        ledger.claim(span[0], span[1], WEIGHTS, dtype, kind, count)
    if dtype != "str":
        found.parameters = None if found.parameters is None or count is None else found.parameters + count


def _mil_type(message: Optional[Message]) -> Tuple[str, Optional[Tuple[int, ...]]]:
    tensor = message.message(1) if message is not None else None
    if tensor is None:
        return "", None
    sizes: List[int] = []
    for dimension in tensor.messages(3):
        constant = dimension.message(1)
        if constant is None:
            return MIL_TYPES.get(tensor.integer(1), ""), None
        sizes.append(constant.integer(1))
    return MIL_TYPES.get(tensor.integer(1), ""), tuple(sizes)


def _multiplied(
    kind: str,
    inputs: Dict[str, str],
    outputs: List[Tuple[str, Tuple[str, Optional[Tuple[int, ...]]]]],
    shapes: Dict[str, Tuple[str, Optional[Tuple[int, ...]]]],
) -> Optional[int]:
    if kind not in ("conv", "conv_transpose", "linear", "matmul", "lstm", "gru", "rnn"):
        return 0
    result = outputs[0][1][1] if outputs else None
    first = shapes.get(inputs.get("x", ""), ("", None))[1]
    weights = shapes.get(inputs.get("weight", ""), ("", None))[1]
    if kind == "conv":
        return None if result is None or weights is None else product((*result, *weights[1:]))
    if kind == "conv_transpose":
        return None if first is None or weights is None else product((*first, *weights[1:]))
    if kind == "linear":
        return None if result is None or not weights else product((*result, weights[-1]))
    if kind == "matmul" and result is not None and first:
        second = shapes.get(inputs.get("y", ""), ("", None))[1]
        # Which side is turned is a setting; the dimension that is not in the result is summed.
        if len(first) < 2 or not second or len(second) < 2:
            return None
        summed = first[-1] if first[-2] == result[-2] else first[-2]
        return product((*result, summed))
    return None


# ---- weights beside the model ----------------------------------------------------------------------------


def _weights(data: memoryview, found: Optional[_Found], budget: Budget) -> Tuple[ByteUse, ...]:
    ledger = Ledger(budget)
    budget.beside(len(data))
    ledger.claim(0, min(64, len(data)), METADATA)
    for offset, dtype, kind, count in found.blobs if found is not None else ():
        if offset + 64 > len(data):
            raise Malformed(
                f"a constant of the Core ML program is at byte {offset} of {len(data)} of its weights: the "
                "package is truncated; copy it again"
            )
        sentinel, _, size, start = _BLOB.unpack_from(data, offset)
        if sentinel != _SENTINEL or start + size > len(data):
            raise Malformed("the weights of the Core ML package are damaged or truncated; copy it again")
        ledger.claim(offset, offset + 64, METADATA)
        budget.look(size, _WHAT)
        zeros = count_zeros(data[start : start + size], dtype)
        if zeros is not None and count is not None:
            zeros = min(zeros, count)
        ledger.claim(start, start + size, WEIGHTS, dtype, kind, count, zeros)
    return ledger.uses(data)


def _sizes(array: Message) -> Tuple[int, ...]:
    """Dimensions of an array; -1 where one may have several sizes."""
    own, ranges, listed = array.integers(1), array.message(31), array.message(21)
    if ranges is not None:
        bounds = [(each.integer(1), each.integer(2)) for each in ranges.messages(1)]
        return tuple(least if least == most else -1 for least, most in bounds)
    if listed is not None:
        choices = [own, *(each.integers(1) for each in listed.messages(1))]
        if len({len(each) for each in choices}) > 1:
            return tuple(-1 for _ in own)
        return tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*choices))
    return own


def _feature(message: Message) -> TensorInfo:
    kind = message.message(3)
    name = message.text(1)
    if kind is None:
        return TensorInfo(name, "", ())
    array, image = kind.message(5), kind.message(4)
    if array is not None:
        return TensorInfo(name, ARRAYS.get(array.integer(2), ""), _sizes(array))
    if image is not None:
        channels = _IMAGE_CHANNELS.get(image.integer(3), 0)
        return TensorInfo(
            name, "uint8", (image.integer(2, -1), image.integer(1, -1), *((channels,) if channels else ()))
        )
    for number, dtype in ((1, "int64"), (2, "float64"), (3, "str")):
        if number in kind:
            return TensorInfo(name, dtype, ())
    return TensorInfo(name, "", ())
