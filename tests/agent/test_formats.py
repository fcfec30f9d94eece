"""Which format a file is that an engine from elsewhere brings."""

from __future__ import annotations

from pathlib import Path

import pytest

from boardbench.agent.errors import DamagedFile, InvalidRequest, MislabelledFile, UnknownFormat
from boardbench.agent.formats import Mark, claimed, marked
from boardbench.agent.recognise import FileKind, identify

HEF = Mark("hef", "hailo", "boardbench-hailo 1.2", b"\x01HEF", (".hef",))
SHORT = Mark("short", "short", "boardbench-short 1", b"\x01")
NAMED = Mark("rknn", "rknn", "boardbench-rknn 2", suffixes=(".rknn", ".rk"))
ALL = (HEF, SHORT, NAMED)


@pytest.mark.parametrize(
    ("head", "name", "format"),
    [
        (b"\x01HEF\0\0", "m.hef", "hef"),
        # The bytes tell, whatever the name is; the longer of two magics is the more exact.
        (b"\x01HEF\0\0", "m.bin", "hef"),
        (b"\x01HEF\0\0", "m.rknn", "hef"),
        (b"\x01XYZ", "m.bin", "short"),
        (b"whatever", "m.rknn", "rknn"),
        (b"whatever", "M.RK", "rknn"),
        (b"whatever", "m.hef", None),
        (b"", "m.bin", None),
    ],
)
def test_the_bytes_tell_and_then_the_name(head: bytes, name: str, format: str | None) -> None:
    found = marked(head, name, ALL)
    assert (found.format if found else None) == format


def test_a_name_promises() -> None:
    assert claimed("m.hef", ALL) == HEF
    assert claimed("m.bin", ALL) is None


def file(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_a_pushed_file_is_of_a_format_from_elsewhere(tmp_path: Path) -> None:
    path = file(tmp_path, "m.hef", b"\x01HEF and more")
    assert identify(path, path.name, FileKind.MODEL, ALL) == "hef"
    with pytest.raises(UnknownFormat, match="of no format known here"):
        identify(path, path.name, FileKind.MODEL)


def test_what_the_name_promises_and_the_bytes_are_not_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path, "m.hef", b"\x02 nothing of the kind")
    with pytest.raises(
        MislabelledFile, match=r"hef, a format of boardbench-hailo 1\.2.*02 20 6e 6f.*01 48 45 46"
    ):
        identify(path, path.name, FileKind.MODEL, ALL)


def test_what_is_of_no_format_at_all_is_refused_with_all_there_are(tmp_path: Path) -> None:
    path = file(tmp_path, "m.xyz", b"nothing of the kind")
    with pytest.raises(
        UnknownFormat, match=r"tflite, .*; hef by boardbench-hailo 1\.2, short by .*, rknn by"
    ):
        identify(path, path.name, FileKind.MODEL, ALL)
    assert issubclass(UnknownFormat, DamagedFile), "to a client it is what it was"


@pytest.mark.parametrize("name", ["m.tflite", "m.onnx", "m.engine"])
def test_no_engine_from_elsewhere_takes_what_calls_itself_a_format_of_boardbench(
    tmp_path: Path, name: str
) -> None:
    path = file(tmp_path, name, b"\x01HEF and more")
    with pytest.raises(MislabelledFile, match="the name says"):
        identify(path, path.name, FileKind.MODEL, ALL)


def test_nor_what_is_one(tmp_path: Path) -> None:
    greedy = Mark("zip", "zip", "boardbench-zip 1", b"PK\x03\x04")
    path = file(tmp_path, "m.bin", b"\x1c\0\0\0TFL3" + bytes(64))
    with pytest.raises(DamagedFile):
        identify(path, path.name, FileKind.MODEL, (Mark("all", "all", "boardbench-all 1", b"\x1c"), greedy))


def test_inputs_are_never_of_such_a_format(tmp_path: Path) -> None:
    path = file(tmp_path, "m.hef", b"\x01HEF and more")
    with pytest.raises(InvalidRequest):
        identify(path, path.name, FileKind.INPUTS, ALL)
