"""Which format a file's bytes are, and whether its outer structure holds.

Both read little: the head, the tables that say where things are, never the weights.
Where the marks come from: TensorFlow Lite ``schema.fbs`` (``TFL3``), ExecuTorch ``program.fbs``
(``ET12``), PyTorch ``mobile_bytecode.fbs`` (``PTMF``), TensorRT's plan tag 0x74727466 (``ftrt``, checked by
NVIDIA's own samples), protobuf field numbers of ``onnx.proto`` and ``coreml/mlmodel/format/Model.proto``,
microsoft/ELL ``libraries/model/src/IRMapCompiler.cpp`` for the names that a compiled module exports.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import Iterator, List, Optional, Tuple, Union

from boardbench.inspect.archive import Entry, is_archive, read_archive, read_entry
from boardbench.inspect.errors import Malformed, Unreadable

Readable = Union[bytes, memoryview]

FORMATS = ("tflite", "onnx", "openvino", "executorch", "torchscript", "coreml", "tensorrt", "ell", "npz")

_MANIFEST = "Manifest.json"
_SMALL_TEXT_BYTES = 65536
_LIBRARY_HEADS = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"MZ")
# The first name is in every compiled ELL module, the second only in modules made of a map.
_ELL_NAMES = (b"_GetInputSize\x00", b"_Predict\x00")
# ModelProto of onnx.proto: field number → wire type.
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
# GraphProto of onnx.proto.
_ONNX_GRAPH_FIELDS = frozenset((1, 2, 5, 10, 11, 12, 13, 14, 15, 16))
_MOST_FIELDS = 20_000
_OPENVINO_ROOT = re.compile(rb"(?:<\?xml[^>]*\?>\s*|<!--.*?-->\s*)*<net\b[^>]*\bversion\s*=", re.DOTALL)


def sniff(path: Path) -> str:
    """Format of the file or folder, told from its bytes; empty when it is none that is known.

    Raises Unreadable when it can't be opened.
    """
    if path.is_dir():
        return "coreml" if (path / _MANIFEST).is_file() else ""
    with _opened(path) as data:
        return sniff_bytes(data)


def check(path: Path, format: str) -> Optional[str]:
    """What is broken about a file of that format, in one sentence; None when nothing was found.

    The check is cheap: it follows the outer structure, so a file that passes can still be refused by an
    engine. Raises Unreadable when it can't be opened.
    """
    if path.is_dir():
        return None if sniff(path) == format else f"the folder holds no {format} model"
    with _opened(path) as data:
        if len(data) == 0:
            return "the file is empty"
        found = sniff_bytes(data)
        if found != format:
            return f"the bytes are {found} and not {format}" if found else f"the bytes are not {format}"
        try:
            _CHECKS[format](data)
        except Malformed as error:
            return str(error)
    return None


class _opened:
    """The bytes of a file as a memory map, so that only the pages that are looked at are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: Optional[mmap.mmap] = None
        self._view: Optional[memoryview] = None

    def __enter__(self) -> memoryview:
        try:
            with self._path.open("rb") as file:
                if self._path.stat().st_size == 0:
                    self._view = memoryview(b"")
                else:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    self._view = memoryview(self._map)
        except (OSError, ValueError) as error:
            raise Unreadable(f"{self._path}: can't be read: {error}") from error
        return self._view

    def __exit__(self, *_exception: object) -> None:
        if self._view is not None:
            self._view.release()
        if self._map is not None:
            self._map.close()


def sniff_bytes(data: Readable) -> str:
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
    if is_archive(head):
        return _sniff_archive(data)
    if head[:4] in _LIBRARY_HEADS or head[:2] == b"MZ":
        return "ell" if _holds_all(data, _ELL_NAMES) else ""
    if _is_openvino_xml(data):
        return "openvino"
    return _sniff_protobuf(data)


def _engine_start(data: Readable) -> Optional[int]:
    """Where a TensorRT plan begins: 0, or after the JSON that Ultralytics puts before it."""
    head = bytes(data[:8])
    if head[:4] in (b"ftrt", b"ptrt"):
        return 0
    if len(head) == 8 and head[3:5] == b"\x00{":
        start = struct.unpack("<I", head[:4])[0] + 4
        if bytes(data[start : start + 4]) in (b"ftrt", b"ptrt"):
            return int(start)
    return None


def _sniff_archive(data: Readable) -> str:
    try:
        archive = read_archive(data)
    except Malformed:
        # The directory is at the end, so a truncated archive has none; its first name still tells.
        first = bytes(data[30 : 30 + struct.unpack_from("<H", data, 26)[0]]) if len(data) > 30 else b""
        return _format_of_names([first.decode("utf-8", "replace")])
    found = _format_of_names(archive.names())
    if not found and any(_is_openvino_entry(data, entry) for entry in archive.entries):
        return "openvino"
    return found


def _format_of_names(names: Union[List[str], Tuple[str, ...]]) -> str:
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


def _is_openvino_entry(data: Readable, entry: Entry) -> bool:
    if not entry.name.endswith(".xml"):
        return False
    try:
        return _is_openvino_xml(read_entry(data, entry, 1 << 28))
    except Malformed:
        return False


def _is_openvino_xml(data: Readable) -> bool:
    head = bytes(data[:4096]).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head.startswith(b"<"):
        return False
    return _OPENVINO_ROOT.match(head) is not None


def _holds_all(data: Readable, needles: Tuple[bytes, ...]) -> bool:
    """Whether all are in the bytes; looks at a window at a time, so that memory stays small."""
    window, overlap = 1 << 20, max(map(len, needles))
    missing = set(needles)
    for start in range(0, len(data), window):
        chunk = bytes(data[start : start + window + overlap])
        missing = {needle for needle in missing if needle not in chunk}
        if not missing:
            return True
    return False


def _fields(data: Readable, start: int, stop: int) -> Iterator[Tuple[int, int, int, int]]:
    """(number, wire type, start, stop) of each field; ends with stop > ``stop`` where one is cut off."""
    at = start
    for _ in range(_MOST_FIELDS):
        if at >= stop:
            return
        key, at = _varint(data, at, stop)
        number, wire = key >> 3, key & 7
        if number == 0 or wire not in (0, 1, 2, 5):
            raise Malformed(f"not protobuf at byte {at}")
        if wire == 0:
            begin = at
            _, at = _varint(data, at, stop)
        elif wire == 2:
            length, begin = _varint(data, at, stop)
            at = begin + length
        else:
            begin = at
            at += 8 if wire == 1 else 4
        yield number, wire, begin, at
        if at > stop:
            return


def _varint(data: Readable, at: int, stop: int) -> Tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            raise Malformed("the file ends inside a number: it is truncated; copy it again")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Malformed(f"not protobuf at byte {at}")


def _sniff_protobuf(data: Readable) -> str:
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


def _check_flatbuffer(data: Readable) -> None:
    size = len(data)
    if size < 8:
        raise Malformed("the file ends inside its header: it is truncated; copy it again")
    (root,) = struct.unpack_from("<I", data, 0)
    if root + 4 > size:
        raise Malformed(f"the first table is at byte {root} of {size}: the file is truncated; copy it again")
    (back,) = struct.unpack_from("<i", data, root)
    if not 0 <= root - back <= size - 4:
        raise Malformed("the first table points outside the file: it is truncated or damaged; copy it again")


def _check_protobuf(data: Readable) -> None:
    size = len(data)
    for number, _, _, stop in _fields(data, 0, size):
        if stop > size:
            raise Malformed(
                f"field {number} needs {stop} bytes and the file has {size}: it is truncated; copy it again"
            )


def _check_archive(data: Readable) -> None:
    read_archive(data)


def _check_torchscript(data: Readable) -> None:
    if bytes(data[4:8]) == b"PTMF":
        _check_flatbuffer(data)
    else:
        _check_archive(data)


def _check_coreml(data: Readable) -> None:
    (_check_archive if is_archive(bytes(data[:4])) else _check_protobuf)(data)


def _check_openvino(data: Readable) -> None:
    if is_archive(bytes(data[:4])):
        _check_archive(data)
    elif not bytes(data[-64:]).rstrip().endswith(b"</net>"):
        raise Malformed("the XML does not end with </net>: the file is truncated; copy it again")


def _check_engine(data: Readable) -> None:
    start = _engine_start(data) or 0
    if len(data) < start + 24:
        raise Malformed("the engine ends inside its header: the file is truncated; copy it again")


def _check_library(data: Readable) -> None:
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
    "tflite": _check_flatbuffer,
    "executorch": _check_flatbuffer,
    "onnx": _check_protobuf,
    "coreml": _check_coreml,
    "openvino": _check_openvino,
    "torchscript": _check_torchscript,
    "npz": _check_archive,
    "tensorrt": _check_engine,
    "ell": _check_library,
}

__all__ = ["FORMATS", "check", "sniff", "sniff_bytes"]
