"""Files on their way to a board."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile

import pytest

from boardbench.cli.errors import CliError, WrongUse
from boardbench.cli.source import CHUNK_BYTES, Source


def test_hash_size_and_chunks(tmp_path):
    data = os.urandom(2 * CHUNK_BYTES + 5)
    path = tmp_path / "m.tflite"
    path.write_bytes(data)
    with Source(path) as source:
        assert source.sha256 == hashlib.sha256(data).hexdigest()
        assert source.size_bytes == len(data)
        assert [(at, len(chunk)) for at, chunk in source.chunks(0)] == [
            (0, CHUNK_BYTES),
            (CHUNK_BYTES, CHUNK_BYTES),
            (2 * CHUNK_BYTES, 5),
        ]
        assert b"".join(chunk for _, chunk in source.chunks(7)) == data[7:]
        assert list(source.chunks(len(data))) == []
        assert not source.changed()


def test_a_file_that_is_replaced_is_still_the_one_that_was_opened(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"old")
    with Source(path) as source:
        path.unlink()
        path.write_bytes(b"new and longer")
        assert [chunk for _, chunk in source.chunks(0)] == [b"old"]
        assert not source.changed()


def test_a_file_that_shrinks_is_told(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"12345")
    with Source(path) as source:
        path.write_bytes(b"")
        assert source.changed()
        with pytest.raises(CliError, match="became shorter"):
            list(source.chunks(0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "can't be read: No such file"),
        (lambda path: path.touch(), r"is empty \(0 bytes\)"),
        (lambda path: path.mkdir(), "is not a regular file"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
    ],
)
def test_what_can_not_be_sent_is_told_with_exit_code_2(tmp_path, make, words):
    path = tmp_path / "m.tflite"
    make(path)
    with pytest.raises(WrongUse, match=words) as caught:
        Source(path)
    assert caught.value.exit_code == 2


def test_an_openvino_model_goes_with_its_weights(tmp_path):
    xml, weights = tmp_path / "net.xml", tmp_path / "net.bin"
    xml.write_text("<net version='11'/>")
    weights.write_bytes(bytes(3 << 20))
    with Source(xml) as source:
        content = b"".join(data for _, data in source.chunks(0))
        assert (source.name, source.size_bytes) == ("net.xml", len(content))
        assert hashlib.sha256(content).hexdigest() == source.sha256
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["net.xml", "net.bin"]
        assert archive.read("net.bin") == bytes(3 << 20)
    os.utime(xml, (1, 1))
    with Source(xml) as again:
        assert again.sha256 == source.sha256, "equal parts are one model, whenever they were written"


def test_a_core_ml_package_goes_as_one(tmp_path):
    package = tmp_path / "net.mlpackage"
    (package / "Data" / "weights").mkdir(parents=True)
    (package / "Manifest.json").write_text("{}")
    (package / "Data" / "weights" / "weight.bin").write_bytes(bytes(3 << 20))
    with Source(package) as source:
        content = b"".join(data for _, data in source.chunks(0))
        assert (source.name, source.size_bytes) == ("net.mlpackage", len(content))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["Data/weights/weight.bin", "Manifest.json"]
        assert archive.read("Data/weights/weight.bin") == bytes(3 << 20)
    os.utime(package / "Manifest.json", (1, 1))
    moved = package.rename(tmp_path / "other.mlpackage")
    with Source(moved) as again:
        assert again.sha256 == source.sha256, "equal packages are one model, wherever they are"


def test_a_package_is_of_plain_files_only(tmp_path):
    package = tmp_path / "net.mlpackage"
    package.mkdir()
    (package / "Manifest.json").write_text("{}")
    (package / "link").symlink_to("/etc/hostname")
    with pytest.raises(WrongUse, match="link is not a regular file"):
        Source(package)


def test_an_xml_alone_goes_as_it_is(tmp_path):
    path = tmp_path / "net.xml"
    path.write_text("<net version='11'/>")
    with Source(path) as source:
        assert b"".join(data for _, data in source.chunks(0)) == path.read_bytes()
