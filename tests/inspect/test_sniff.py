"""The format is told from the bytes, whatever the name, and what is broken is said."""

from __future__ import annotations

import io
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from boardbench.inspect.errors import Unreadable
from boardbench.inspect.sniff import FORMATS, check, sniff, sniff_bytes


@pytest.fixture
def models(tmp_path: Path, files: Path, conv_chain: Callable[..., bytes]) -> dict[str, list[Path]]:
    """Files of every format, under names that say nothing."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    content: dict[str, list[bytes]] = {
        "tflite": [conv_chain("CONV_2D", "RELU")],
        "onnx": [helper.make_model(graph).SerializeToString()],
        "openvino": [(files / "small.xml").read_bytes()],
        "executorch": [(files / name).read_bytes() for name in ("portable.pte", "xnnpack.pte")],
        "torchscript": [(files / name).read_bytes() for name in ("small.pt", "small.ptl")],
        "coreml": [(files / "small.mlmodel").read_bytes()],
        "tensorrt": [b"ftrt" + bytes(64), _prefixed(b"ftrt" + bytes(64))],
        "ell": [_library()],
        "npz": [_arrays()],
    }
    found: dict[str, list[Path]] = {}
    for kind, all_of_it in content.items():
        for number, data in enumerate(all_of_it):
            path = tmp_path / f"{kind}{number}.bin"
            path.write_bytes(data)
            found.setdefault(kind, []).append(path)
    return found


def _prefixed(engine: bytes) -> bytes:
    text = b'{"names": {"0": "cat"}}'
    return struct.pack("<I", len(text)) + text + engine


def _library() -> bytes:
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    return bytes(header) + b"\0x_GetInputSize\0x_Predict\0"


def _arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.arange(4))
    return buffer.getvalue()


def test_every_format_is_told_from_its_bytes(models: dict[str, list[Path]]) -> None:
    assert set(models) == set(FORMATS)
    for kind, paths in models.items():
        for path in paths:
            assert sniff(path) == kind
            assert check(path, kind) is None, kind


def test_other_files_are_unknown(tmp_path: Path) -> None:
    for number, data in enumerate(
        (
            b"",
            b"a",
            b"hello, world\n" * 20,
            b"\x08\x01",
            b"PK\x05\x06" + bytes(18),
            b"\x7fELF" + bytes(100),
            bytes(4096),
        )
    ):
        path = tmp_path / str(number)
        path.write_bytes(data)
        assert sniff(path) == ""


def test_packages_are_folders(files: Path, tmp_path: Path) -> None:
    assert sniff(files / "small.mlpackage") == "coreml"
    assert check(files / "small.mlpackage", "coreml") is None
    assert sniff(tmp_path) == ""


def test_comments_before_the_root() -> None:
    def told(text: bytes) -> str:
        return sniff_bytes(memoryview(text))

    assert told(b'<?xml version="1.0"?>\n<!-- a --><!----> <net name="x" version="11">') == "openvino"
    # Told by one expression, each comment doubled the time: some dozens of them took forever.
    assert told(b"<!-- -->" * 400) == ""
    assert told(b"<!-- never ends") == ""
    assert told(b"<?never ends") == ""


def test_openvino_in_an_archive(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(files / "small.xml", "small.xml")
        archive.write(files / "small.bin", "small.bin")
    assert sniff(path) == "openvino"


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("tensorrt",)])
@pytest.mark.parametrize("kept", [0.25, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_called_truncated(models: dict[str, list[Path]], kind: str, kept: float) -> None:
    for path in models[kind]:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept)])
        told = check(path, kind)
        assert told is not None, path.name
        # A file cut off early enough is not even known any more.
        assert "truncated" in told or "not" in told


def test_an_empty_and_a_mislabelled_file(models: dict[str, list[Path]], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    assert check(empty, "tflite") == "the file is empty"
    assert check(models["onnx"][0], "tflite") == "the bytes are onnx and not tflite"
    noise = tmp_path / "noise"
    noise.write_bytes(b"\xff" * 100)
    assert check(noise, "tflite") == "the bytes are not tflite"


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="No such file"):
        sniff(tmp_path / "missing")
    with pytest.raises(Unreadable):
        check(tmp_path / "missing", "onnx")


def test_onnx_with_constants_beyond_the_end(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1000])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1000])],
        [onnx.numpy_helper.from_array(np.zeros(1000, np.float32), "w")],
    )
    path = tmp_path / "half"
    data = helper.make_model(graph).SerializeToString()
    path.write_bytes(data[: len(data) // 2])
    assert sniff(path) == "onnx"
    assert "truncated" in (check(path, "onnx") or "")


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.npz"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.npy", b"1")
        archive.writestr("a.npy", b"2")
    assert sniff(path) == "npz"
    assert "two files named" in (check(path, "npz") or "")


@given(st.binary(max_size=300))
def test_no_bytes_are_too_odd(data: bytes) -> None:
    assert sniff_bytes(memoryview(data)) in ("", *FORMATS)


def test_the_name_does_not_matter(models: dict[str, list[Path]], tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    shutil.copy(models["onnx"][0], path)
    assert sniff(path) == "onnx"
