"""Which format a file's bytes are, and whether its outer structure holds.

Both read little: the head, the tables that say where things are, never the weights.
Where the marks come from: TensorFlow Lite ``schema.fbs`` (``TFL3``), ExecuTorch ``program.fbs``
(``ET12``), PyTorch ``mobile_bytecode.fbs`` (``PTMF``), TensorRT's plan tag 0x74727466 (``ftrt``, checked by
NVIDIA's own samples), protobuf field numbers of ``onnx.proto`` and ``coreml/mlmodel/format/Model.proto``,
microsoft/ELL ``libraries/model/src/IRMapCompiler.cpp`` for the names that a compiled module exports.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Iterator, Optional, Sequence, Tuple

from boardbench.inspect.content import Opened
from boardbench.inspect.errors import Malformed, TooLarge

FORMATS = ("tflite", "onnx", "openvino", "executorch", "torchscript", "coreml", "tensorrt", "ell", "npz")

_MANIFEST = "Manifest.json"
_HEAD_BYTES = 4096
# A ZIP archive with something in it, and an empty one.
_ARCHIVE_HEADS = (b"PK\x03\x04", b"PK\x05\x06")
_LIBRARY_HEADS = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"MZ")
# The first name is in every compiled ELL module, the second only in modules made of a map.
_ELL_NAMES = (b"_GetInputSize\x00", b"_Predict\x00")
# ModelProto of onnx.proto: field number → wire type.
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
# GraphProto of onnx.proto.
_ONNX_GRAPH_FIELDS = frozenset((1, 2, 5, 10, 11, 12, 13, 14, 15, 16))
_MOST_FIELDS = 20_000
_MOST_TEXTS = 16
_OPENVINO_ROOT = re.compile(rb"<net\b[^>]*\bversion\s*=")


def sniff(path: Path) -> str:
    """Format of the file or folder, told from its bytes; empty when it is none that is known.

    Raises Unreadable when it can't be opened.
    """
    if path.is_dir():
        return "coreml" if (path / _MANIFEST).is_file() else ""
    with Opened(path, mapped=True) as data:
        return sniff_bytes(data)


def check(path: Path, format: str) -> Optional[str]:
    """What is broken about a file of that format, in one sentence; None when nothing was found.

    The check is cheap: it follows the outer structure, so a file that passes can still be refused by an
    engine. Raises Unreadable when it can't be opened.
    """
    if path.is_dir():
        return None if sniff(path) == format else f"the folder holds no {format} model"
    with Opened(path, mapped=True) as data:
        if len(data) == 0:
            return "the file is empty"
        found = sniff_bytes(data)
        if found != format:
            return f"the bytes are {found} and not {format}" if found else f"the bytes are not {format}"
        try:
            _CHECKS[format](data)
        except Malformed as error:
            return str(error)
        except TooLarge:
            # An engine may take it all the same.
            return None
    return None


def sniff_bytes(data: memoryview) -> str:
    """Format of the bytes; empty when it is none that is known."""
    head = bytes(data[:64])
    mark = head[4:8]
    if mark == b"TFL3":
        return "tflite"
    if mark[:2] == b"ET" and mark[2:].isdigit():
        return "executorch"
    if mark == b"PTMF":
        return "torchscript"
    if _engine_start(data) is not None:
        return "tensorrt"
    if head[:4] in _ARCHIVE_HEADS:
        return _sniff_archive(data)
    if head[:4] in _LIBRARY_HEADS or head[:2] == b"MZ":
        return "ell" if _holds_all(data, _ELL_NAMES) else ""
    if _is_openvino_xml(bytes(data[:_HEAD_BYTES])):
        return "openvino"
    return _sniff_protobuf(data)


def _engine_start(data: memoryview) -> Optional[int]:
    """Where a TensorRT plan begins: 0, or after the JSON that Ultralytics puts before it."""
    head = bytes(data[:8])
    if head[:4] in (b"ftrt", b"ptrt"):
        return 0
    if len(head) == 8 and head[3:5] == b"\x00{":
        start = struct.unpack("<I", head[:4])[0] + 4
        if bytes(data[start : start + 4]) in (b"ftrt", b"ptrt"):
            return int(start)
    return None


def _sniff_archive(data: memoryview) -> str:
    from boardbench.inspect.archive import read_archive, read_head

    try:
        archive = read_archive(data)
    except Malformed:
        # The directory is at the end, so a truncated archive has none; its first name still tells.
        first = bytes(data[30 : 30 + struct.unpack_from("<H", data, 26)[0]]) if len(data) > 30 else b""
        return _format_of_names([first.decode("utf-8", "replace")])
    found = _format_of_names(archive.names())
    texts = [] if found else [entry for entry in archive.entries if entry.name.endswith(".xml")]
    if any(_is_openvino_xml(read_head(data, entry, _HEAD_BYTES)) for entry in texts[:_MOST_TEXTS]):
        return "openvino"
    return found


def _format_of_names(names: Sequence[str]) -> str:
    leaves = {name.split("/", 1)[-1] for name in names if "/" in name}
    if leaves & {"bytecode.pkl", "constants.pkl"} or any(leaf.startswith("code/") for leaf in leaves):
        return "torchscript"
    if "data.pkl" in leaves and len(names) == 1:
        return "torchscript"
    if _MANIFEST in names or _MANIFEST in leaves:
        return "coreml"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    return ""


def _is_openvino_xml(head: bytes) -> bool:
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    # Step by step: one expression for any number of comments takes forever for some dozens of them.
    while head.startswith((b"<?", b"<!--")):
        _, end, head = head.partition(b"-->" if head.startswith(b"<!--") else b"?>")
        head = head.lstrip() if end else b""
    return _OPENVINO_ROOT.match(head) is not None


def _holds_all(data: memoryview, needles: Tuple[bytes, ...]) -> bool:
    """Whether all are in the bytes; looks at a window at a time, so that memory stays small."""
    window, overlap = 1 << 20, max(map(len, needles))
    missing = set(needles)
    for start in range(0, len(data), window):
        chunk = bytes(data[start : start + window + overlap])
        missing = {needle for needle in missing if needle not in chunk}
        if not missing:
            return True
    return False


def _fields(data: memoryview, start: int, stop: int) -> Iterator[Tuple[int, int, int, int]]:
    """(number, wire type, start, stop) of each field; ends with stop > ``stop`` where one is cut off."""
    from boardbench.inspect.protobuf import Wire, read_varint

    wire = Wire(data, "the file")
    at = start
    for _ in range(_MOST_FIELDS):
        if at >= stop:
            return
        key, at = read_varint(wire, at, stop)
        number, kind = key >> 3, key & 7
        if number == 0 or kind not in (0, 1, 2, 5):
            raise wire.broken("is no protocol buffer", at)
        begin = at
        if kind == 0:
            _, at = read_varint(wire, at, stop)
        elif kind == 2:
            length, begin = read_varint(wire, at, stop)
            at = begin + length
        else:
            at += 8 if kind == 1 else 4
        yield number, kind, begin, at
        if at > stop:
            return


def _sniff_protobuf(data: memoryview) -> str:
    seen = {}
    try:
        for number, wire, start, stop in _fields(data, 0, len(data)):
            if number not in seen:
                seen[number] = (wire, start, stop)
    except Malformed:
        pass
    if 1 not in seen or seen[1][0] != 0:
        return ""
    if 7 in seen and all(_ONNX_FIELDS.get(number) == where[0] for number, where in seen.items()):
        _, start, stop = seen[7]
        try:
            number, wire, _, _ = next(_fields(data, start, min(stop, len(data))), (0, 0, 0, 0))
        except Malformed:
            return ""
        return "onnx" if number in _ONNX_GRAPH_FIELDS and wire == 2 else ""
    kinds = [number for number, where in seen.items() if where[0] == 2]
    return "coreml" if 2 in kinds and any(200 <= number <= 3100 for number in kinds) else ""


def _check_tflite(data: memoryview) -> None:
    # The first tables of a FlatBuffer are at its beginning and what they point to is behind them, so only
    # following everything shows that the end is missing.
    from boardbench.inspect.ledger import Ledger
    from boardbench.inspect.tflite import read_model

    read_model(data, Ledger())


def _check_executorch(data: memoryview) -> None:
    from boardbench.inspect import executorch
    from boardbench.inspect.ledger import Ledger
    from boardbench.inspect.report import ModelReport

    executorch.report(ModelReport("", "", len(data), "executorch"), data, Ledger())


def _check_protobuf(data: memoryview) -> None:
    size = len(data)
    for number, _, _, stop in _fields(data, 0, size):
        if stop > size:
            raise Malformed(
                f"field {number} needs {stop} bytes and the file has {size}: it is truncated; copy it again"
            )


def _check_archive(data: memoryview) -> None:
    from boardbench.inspect.archive import read_archive

    read_archive(data)


def _check_torchscript(data: memoryview) -> None:
    if bytes(data[4:8]) == b"PTMF":
        from boardbench.inspect import torch_mobile
        from boardbench.inspect.ledger import Ledger
        from boardbench.inspect.report import ModelReport

        torch_mobile.report(ModelReport("", "", len(data), "torchscript"), data, Ledger())
    else:
        _check_archive(data)


def _check_coreml(data: memoryview) -> None:
    (_check_archive if bytes(data[:4]) in _ARCHIVE_HEADS else _check_protobuf)(data)


def _check_openvino(data: memoryview) -> None:
    if bytes(data[:4]) in _ARCHIVE_HEADS:
        _check_archive(data)
    elif not bytes(data[-64:]).rstrip().endswith(b"</net>"):
        raise Malformed("the XML does not end with </net>: the file is truncated; copy it again")


def _check_engine(data: memoryview) -> None:
    start = _engine_start(data) or 0
    if len(data) < start + 24:
        raise Malformed("the engine ends inside its header: the file is truncated; copy it again")


def _check_library(data: memoryview) -> None:
    if bytes(data[:4]) != b"\x7fELF":
        return
    size = len(data)
    wide = len(data) > 5 and data[4] == 2
    order = "<" if len(data) > 5 and data[5] == 1 else ">"
    if size < (64 if wide else 52):
        raise Malformed("the library ends inside its header: the file is truncated; copy it again")
    if wide:
        (sections,) = struct.unpack_from(order + "Q", data, 40)
        each, count = struct.unpack_from(order + "HH", data, 58)
    else:
        (sections,) = struct.unpack_from(order + "I", data, 32)
        each, count = struct.unpack_from(order + "HH", data, 46)
    end = sections + each * count
    if end > size:
        raise Malformed(f"the library's sections end at byte {end} of {size}: truncated; copy the file again")


_CHECKS = {
    "tflite": _check_tflite,
    "executorch": _check_executorch,
    "onnx": _check_protobuf,
    "coreml": _check_coreml,
    "openvino": _check_openvino,
    "torchscript": _check_torchscript,
    "npz": _check_archive,
    "tensorrt": _check_engine,
    "ell": _check_library,
}
