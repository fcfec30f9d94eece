"""Which file has come: its format by its bytes, whether its name tells the truth, and a name that is safe."""

from __future__ import annotations

import enum
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from boardbench.agent.bench import runtimes
from boardbench.agent.errors import (
    DamagedFile,
    InvalidRequest,
    MislabelledFile,
    StorageError,
    UnknownFormat,
)
from boardbench.agent.formats import HEAD_BYTES, Mark, claimed, marked
from boardbench.inspect import sniff
from boardbench.inspect.errors import InspectError

_NAME_LIMIT = 128
_SUFFIX_LIMIT = 16
# File name endings that promise a format. ".pt", ".xml" and ".zip" promise nothing.
_CLAIMS = {
    ".tflite": "tflite",
    ".lite": "tflite",
    ".onnx": "onnx",
    ".pte": "executorch",
    ".ptl": "torchscript",
    ".torchscript": "torchscript",
    ".mlmodel": "coreml",
    ".mlpackage": "coreml",
    ".engine": "tensorrt",
    ".plan": "tensorrt",
    ".trt": "tensorrt",
    ".npz": "npz",
}


class FileKind(str, enum.Enum):
    """What a file is for. See ``boardbench.v1.FileKind``."""

    MODEL = "FILE_KIND_MODEL"
    INPUTS = "FILE_KIND_INPUTS"


def clean_name(name: str) -> str:
    """The name without folders and without anything that moves a terminal's cursor, at most 128 characters.

    Empty when nothing is left. For people only: files on the disk are named by their digest.
    """
    leaf = re.split(r"[/\\]", name)[-1]
    shown = "".join(" " if character.isspace() else character for character in leaf)
    # C*: control, format (right-to-left marks), surrogate, private and unassigned characters.
    shown = "".join(character for character in shown if unicodedata.category(character)[0] != "C").strip()
    if shown in (".", ".."):
        return ""
    if len(shown) > _NAME_LIMIT:
        suffix = Path(shown).suffix
        suffix = suffix if len(suffix) <= _SUFFIX_LIMIT else ""
        shown = shown[: _NAME_LIMIT - len(suffix)] + suffix
    return shown


def identify(path: Path, name: str, kind: FileKind, marks: Sequence[Mark] = ()) -> str:
    """Format of a file that has come whole, told from its bytes; by ``marks`` where those alone don't tell.

    Raises MislabelledFile, UnknownFormat, DamagedFile, InvalidRequest, StorageError.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        own_format = runtimes.own_format(head)
        format = own_format or sniff.sniff(path)
        if not format and kind is FileKind.MODEL and Path(name).suffix.lower() not in _CLAIMS:
            format = own_format = _marked_format(head, name, marks)
        check_label(name, kind, format)
        damage = None if own_format else sniff.check(path, format)
    except (InspectError, OSError) as error:
        raise StorageError(f"{name}: {error}") from error
    if damage:
        raise DamagedFile(f"{name}: {damage}")
    return format


def _marked_format(head: bytes, name: str, marks: Sequence[Mark]) -> str:
    """The format by what engines from elsewhere say; empty when none does. Raises MislabelledFile."""
    mark = marked(head, name, marks)
    if mark is not None:
        return mark.format
    promised = claimed(name, marks)
    if promised is not None:
        raise MislabelledFile(
            f"{name}: the name says {promised.format}, a format of {promised.plugin}, and the bytes begin "
            f"with {head[: len(promised.magic)].hex(' ')} and not with {promised.magic.hex(' ')}; check the "
            "file, or rename it"
        )
    if marks:
        more = ", ".join(f"{mark.format} by {mark.plugin}" for mark in marks)
        raise UnknownFormat(
            f"{name}: the bytes are of no format known here ({', '.join(sniff.FORMATS)}; {more})"
        )
    return ""


def check_label(name: str, kind: FileKind, format: str) -> None:
    """Raises MislabelledFile, UnknownFormat, InvalidRequest where name and use do not fit the format."""
    claim = _CLAIMS.get(Path(name).suffix.lower())
    if claim and claim != format:
        found = f"{format} format" if format else "no format known here; it may be truncated"
        raise MislabelledFile(
            f"{name}: the name says {claim} and the bytes are of {found}; check the file, or rename it"
        )
    if not format:
        raise UnknownFormat(f"{name}: the bytes are of no format known here ({', '.join(sniff.FORMATS)})")
    if kind is FileKind.INPUTS and format != "npz":
        raise InvalidRequest(f"{name}: inputs come as .npz (numpy.savez), and the bytes are {format}")
    if kind is FileKind.MODEL and format == "npz":
        raise InvalidRequest(f"{name}: an .npz holds inputs and is no model; push it as inputs")
