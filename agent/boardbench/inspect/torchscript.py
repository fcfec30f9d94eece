"""A TorchScript archive (``.pt``, ``.ptl``): its tensors, and the operations that its code names.

Source of the format: pytorch/pytorch ``torch/csrc/jit/docs/serialization.md``; for the lite interpreter
``torch/csrc/jit/mobile/import.cpp``. The archive is a ZIP: ``data.pkl`` (the module), ``constants.pkl``,
``data/*`` and ``constants/*`` (raw tensors), ``code/*`` (the source of its methods) and, for mobile,
``bytecode.pkl``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Dict, Iterator, List, Optional, Tuple

from boardbench.inspect.archive import Archive, Entry, read_archive, read_entry
from boardbench.inspect.budget import Budget
from boardbench.inspect.elements import BITS, count_zeros
from boardbench.inspect.ledger import GRAPH, METADATA, PADDING, WEIGHTS, Ledger
from boardbench.inspect.pickles import Call, Global, Persistent, Pickle, read_pickle
from boardbench.inspect.report import ModelReport, OpPlacement, Placement, ReportWarning

_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
}
# Pickles hold structure, code is text: both are small beside the tensors.
_LARGEST_PICKLE_BYTES = 64 << 20
_LARGEST_CODE_BYTES = 16 << 20
# A call in the serialized source: torch.conv2d( , ops.quantized.add( .
_CALLS = re.compile(r"\b(?:torch\.([A-Za-z_]\w*)|ops\.(\w+)\.(\w+))\(")
_MOBILE_FLATBUFFER = b"PTMF"
_MOST_ELEMENTS = 1 << 48
_LONGEST_TYPE = 256
_STEPS_PER_OPERATION = 12
_WHAT = "the TorchScript archive"
_EXECUTED = frozenset(("OP", "OPN"))


def report(base: ModelReport, data: memoryview, ledger: Ledger) -> ModelReport:
    """``base`` with everything filled in that the file tells; raises Malformed."""
    if bytes(data[4:8]) == _MOBILE_FLATBUFFER:
        from boardbench.inspect import torch_mobile

        return torch_mobile.report(base, data, ledger)
    budget = ledger.budget(len(data))
    archive = read_archive(data, budget)
    entries = {_leaf(entry.name): entry for entry in archive.entries}
    stored, parameters = _tensors(data, entries, budget)
    _claim(data, archive, stored, ledger)
    operations, source = _operations(data, entries, budget)
    types: Dict[str, int] = {}
    for name in operations:
        types[name] = types.get(name, 0) + 1
    mobile = "bytecode.pkl" in entries
    warnings: List[ReportWarning] = []
    if source and operations:
        warnings.append(
            ReportWarning(
                "operations_from_source",
                "the operations are those that the source in the archive names, each as often as it is "
                "written; a method that is called twice runs them twice",
            )
        )
    version = _text(data, entries.get("version"))
    return replace(
        base,
        format_version=(f"{version}, " if version else "")
        + ("lite interpreter" if mobile else "TorchScript"),
        op_count=len(operations) if operations else None,
        op_types=types,
        ops=tuple(OpPlacement(index, name) for index, name in enumerate(operations)),
        parameter_count=parameters,
        bytes=ledger.uses(data),
        placement=_placement(),
        warnings=tuple(warnings),
    )


def _placement() -> Placement:
    return Placement(
        detail="the file does not say where its operations run; PyTorch runs it where it is loaded"
    )


def _leaf(name: str) -> str:
    """The name without the folder that the whole archive is in."""
    return name.split("/", 1)[-1]


def _text(data: memoryview, entry: Optional[Entry]) -> str:
    return "" if entry is None else read_entry(data, entry, 64).decode("ascii", "replace").strip()


def _pickle(data: memoryview, entry: Optional[Entry], budget: Budget) -> Optional[Pickle]:
    if entry is None:
        return None
    return read_pickle(read_entry(data, entry, _LARGEST_PICKLE_BYTES, budget), budget)


def _tensors(
    data: memoryview, entries: Dict[str, Entry], budget: Budget
) -> Tuple[Dict[str, str], Optional[int]]:
    """(name of each raw tensor's entry → its type, number of elements in all)."""
    stored: Dict[str, str] = {}
    seen: Dict[str, int] = {}
    for pickle_name, folder in (
        ("data.pkl", "data/"),
        ("constants.pkl", "constants/"),
        ("bytecode.pkl", "constants/"),
    ):
        found = _pickle(data, entries.get(pickle_name), budget)
        if found is None:
            continue
        for call in found.calls:
            budget.spend(2, _WHAT)
            for storage, elements in _storages(call):
                key, dtype = storage
                name = folder + key
                if name not in entries:
                    # Mobile archives keep the tensors of all pickles in one folder.
                    name = next(
                        (other + key for other in ("constants/", "data/") if other + key in entries), name
                    )
                stored[name] = dtype
                seen[name] = max(seen.get(name, 0), elements)
    return stored, sum(seen.values()) if seen or "data.pkl" in entries else None


def _storages(call: Call) -> Iterator[Tuple[Tuple[str, str], int]]:
    """((key, type) of the storage, elements in use) of each tensor that the call would make."""
    callee = call.callee
    if (
        not isinstance(callee, Global)
        or "rebuild" not in callee.name
        or not isinstance(call.arguments, tuple)
    ):
        return
    reference = call.arguments[0] if call.arguments else None
    if (
        not isinstance(reference, Persistent)
        or not isinstance(reference.key, tuple)
        or len(reference.key) < 5
    ):
        return
    kind, key, numel = reference.key[1], reference.key[2], reference.key[4]
    if (
        isinstance(kind, Global)
        and isinstance(key, str)
        and isinstance(numel, int)
        and 0 <= numel < _MOST_ELEMENTS
    ):
        yield (key[:64], _STORAGES.get(kind.name, kind.name)), numel


def _claim(data: memoryview, archive: Archive, stored: Dict[str, str], ledger: Ledger) -> None:
    for entry in archive.entries:
        leaf = _leaf(entry.name)
        start, stop = entry.data_start, entry.data_start + entry.compressed_bytes
        if leaf in stored or leaf.startswith(("data/", "constants/")):
            dtype = stored.get(leaf, "")
            elements = zeros = None
            if dtype in BITS and entry.method == 0:
                ledger.budget(0).look(stop - start, _WHAT)
                elements = (stop - start) * 8 // BITS[dtype]
                zeros = count_zeros(data[start:stop], dtype)
            ledger.claim(start, stop, WEIGHTS, dtype, "", elements, zeros)
        elif leaf.startswith("code/") or leaf.endswith(".pkl"):
            ledger.claim(start, stop, GRAPH)
        else:
            ledger.claim(start, stop, METADATA)
        # The header's extra field is stretched so that tensors begin at multiples of 64 bytes.
        named = min(entry.header_start + 30 + len(entry.name), start)
        ledger.claim(named, start, PADDING)
    ledger.fill("archive")


def _operations(data: memoryview, entries: Dict[str, Entry], budget: Budget) -> Tuple[List[str], bool]:
    """(operations in the order of the file, whether they were taken from source text)."""
    found = _pickle(data, entries.get("bytecode.pkl"), budget)
    if found is not None:
        return list(_bytecode(found.value, budget)), False
    names: List[str] = []
    for leaf, entry in entries.items():
        if not leaf.startswith("code/") or not leaf.endswith(".py"):
            continue
        text = read_entry(data, entry, _LARGEST_CODE_BYTES, budget).decode("utf-8", "replace")
        for call in _CALLS.finditer(text):
            budget.spend(_STEPS_PER_OPERATION, _WHAT)
            name = call.group(1)
            names.append((f"aten::{name}" if name else f"{call.group(2)}::{call.group(3)}")[:_LONGEST_TYPE])
    return names, True


def _bytecode(value: Any, budget: Budget) -> Iterator[str]:
    """Names of the operations that the functions of ``bytecode.pkl`` execute, in order."""
    if not isinstance(value, tuple):
        return
    # Whatever is visited counts, since a pickle may hold the same thing many times.
    budget.spend(len(value), _WHAT)
    for function in value:
        if not isinstance(function, tuple) or len(function) < 2:
            continue
        pairs = function[1] if isinstance(function[1], tuple) else ()
        budget.spend(len(pairs), _WHAT)
        parts = {
            part[0]: part[1]
            for part in pairs
            if isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], str)
        }
        listed, instructions = parts.get("operators"), parts.get("instructions")
        if not isinstance(listed, tuple) or not isinstance(instructions, tuple):
            continue
        budget.spend(3 * len(listed) + _STEPS_PER_OPERATION * len(instructions), _WHAT)
        operators = [_operator_name(each) for each in listed]
        for instruction in instructions:
            if not isinstance(instruction, tuple) or len(instruction) < 2 or instruction[0] not in _EXECUTED:
                continue
            index = instruction[1]
            if isinstance(index, int) and 0 <= index < len(operators):
                yield operators[index]


def _operator_name(value: Any) -> str:
    if not isinstance(value, tuple) or not value or not isinstance(value[0], str):
        return "unknown"
    overload = value[1] if len(value) > 1 and isinstance(value[1], str) else ""
    return (f"{value[0]}.{overload}" if overload else value[0])[:_LONGEST_TYPE]
