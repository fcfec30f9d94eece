"""Formats whose inside is closed: what can be said of a TensorRT engine or a compiled ELL module."""

from __future__ import annotations

import re
import struct
from dataclasses import replace

from boardbench.inspect.ledger import Ledger
from boardbench.inspect.report import ByteUse, ModelReport, Placement, ReportWarning

_FUNCTION = re.compile(rb"\x00([A-Za-z_][A-Za-z0-9_]{0,100})_GetInputSize\x00")
_PIECE_BYTES = 1 << 20


def report_engine(base: ModelReport, data: memoryview, _ledger: Ledger) -> ModelReport:
    """The report on a TensorRT engine: only its serialization version can be read."""
    start = 0
    if bytes(data[:4]) not in (b"ftrt", b"ptrt"):
        start = struct.unpack_from("<I", data, 0)[0] + 4
    version = struct.unpack_from("<I", data, start + 4)[0] if start + 8 <= len(data) else 0
    uses = [ByteUse("engine", "", "", len(data) - start)]
    if start:
        uses.append(ByteUse("metadata", "", "", start))
    return replace(
        base,
        format_version=f"serialization {version}",
        bytes=tuple(uses),
        placement=Placement(
            detail="an engine is closed: its layers are told by TensorRT's inspector on the board"
        ),
        warnings=(
            ReportWarning(
                "not_portable",
                "an engine runs only on the kind of GPU and the version of TensorRT that it was built for; "
                "push the ONNX file to have it built on the board",
            ),
        ),
    )


def report_library(base: ModelReport, data: memoryview, _ledger: Ledger) -> ModelReport:
    """The report on a module compiled by ELL: the prefix of its functions."""
    prefix = ""
    for start in range(0, len(data), _PIECE_BYTES):
        found = _FUNCTION.search(bytes(data[start : start + _PIECE_BYTES + 128]))
        if found is not None:
            prefix = found.group(1).decode("ascii")
            break
    return replace(
        base,
        producer="Embedded Learning Library",
        format_version=f"module {prefix}" if prefix else "",
        bytes=(ByteUse("machine code", "", "", len(data)),),
        placement=Placement(detail="a compiled module runs on the CPU that it was compiled for"),
    )
