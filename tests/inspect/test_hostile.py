"""Files made to harm, and files that were damaged: an error that says so, in bounded time and memory."""

from __future__ import annotations

import importlib.util
import io
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import flatbuffers
import pytest
from flatbuffers import flexbuffers
from hypothesis import given, settings
from hypothesis import strategies as st

from boardbench.inspect import analyse
from boardbench.inspect.archive import read_archive, read_entry
from boardbench.inspect.errors import InspectError, Malformed
from boardbench.inspect.flatbuffer import FlatBuffer
from boardbench.inspect.flexbuffer import read_map
from boardbench.inspect.ledger import Ledger
from boardbench.inspect.pickles import read_pickle
from boardbench.inspect.protobuf import Wire

# Far above what is needed (milliseconds), far below a hang; CPU time, so that a busy machine does not matter.
PATIENCE_SECONDS = 5.0
MEMORY_RATIO = 24
MEMORY_BYTES = 8 << 20


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    """The script that breaks files."""
    path = Path(__file__).with_name("mutate.py")
    spec = importlib.util.spec_from_file_location("inspect_mutate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _refused(data: bytes) -> str:
    """Why the file is refused; checks time and memory on the way."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(InspectError) as caught:
            analyse.inspect_bytes("hostile", memoryview(data))
        assert time.process_time() - begin < PATIENCE_SECONDS
        assert tracemalloc.get_traced_memory()[1] < MEMORY_RATIO * len(data) + MEMORY_BYTES
    finally:
        tracemalloc.stop()
    return str(caught.value)


def _survived(data: bytes) -> analyse.ModelReport:
    """The report on the file; checks time and memory on the way."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        report = analyse.inspect_bytes("hostile", memoryview(data))
        assert time.process_time() - begin < PATIENCE_SECONDS
        assert tracemalloc.get_traced_memory()[1] < MEMORY_RATIO * len(data) + MEMORY_BYTES
    finally:
        tracemalloc.stop()
    assert sum(use.size_bytes for use in report.bytes) == report.size_bytes
    return report


def test_mutants_of_small_models(
    mutate: ModuleType, files: Path, conv_chain: Callable[..., bytes], compile_like: Callable[..., bytes]
) -> None:
    node = sys.modules[compile_like.__module__].Node
    original = conv_chain("CONV_2D", "RELU", "LEAKY_RELU", "CONV_2D")
    models = [
        ("original.tflite", original),
        ("compiled.tflite", compile_like(original, [node((0, 1), cached=500, streamed=70)])),
        *mutate.real_models([files], 1 << 20),
    ]
    tried = mutate.attempt(mutate.mutants(models, 2000, seed=2), memory_every=50)
    assert tried.mutants == 2000
    # Both ends are reached: damage that does not matter, and damage that does.
    assert tried.reports > 100
    assert tried.refused > 100
    assert tried.slowest_seconds < 1.0, tried.slowest
    assert tried.most_memory_ratio < MEMORY_RATIO


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_mutants_of_real_models(
    mutate: ModuleType, files: Path, shared_models: Path
) -> None:
    models = mutate.real_models([files, shared_models], 1 << 22)
    tried = mutate.attempt(mutate.mutants(models, 100_000, seed=3), memory_every=500)
    assert tried.mutants == 100_000
    assert tried.slowest_seconds < 1.0, tried.slowest
    assert tried.most_memory_ratio < MEMORY_RATIO


@given(st.binary(min_size=1, max_size=2000))
@settings(max_examples=200, deadline=None)
def test_bytes_behind_every_mark(data: bytes) -> None:
    for head in (
        b"",
        b"\x00\x00\x00\x10TFL3",
        b"\x10\x00\x00\x00ET12",
        b"PK\x03\x04",
        b"<net version='11'>",
        b"\x08\x07",
    ):
        try:
            analyse.inspect_bytes("any", memoryview(head + data))
        except InspectError as error:
            assert str(error)


# ---- FlatBuffers -----------------------------------------------------------------------------------------


def _shared_table_model(vector_length: int) -> bytes:
    """A model whose graphs, operations and tensors are each one table that a long list points to."""
    builder = flatbuffers.Builder(0)

    def table(fields: int, *filled: tuple[int, int]) -> int:
        builder.StartObject(fields)
        for field, offset in filled:
            builder.PrependUOffsetTRelativeSlot(field, offset, 0)
        return builder.EndObject()

    def repeated(offset: int) -> int:
        builder.StartVector(4, vector_length, 4)
        for _ in range(vector_length):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()

    tensor = table(11)
    operator = table(14)
    code = table(4)
    codes = repeated(code)
    graph = table(6, (0, repeated(tensor)), (3, repeated(operator)))
    graphs = repeated(graph)
    builder.Finish(table(10, (1, codes), (2, graphs)), b"TFL3")
    return bytes(builder.Output())


def test_a_table_pointed_at_a_million_times() -> None:
    # 12,000 graphs of 12,000 operations each would be 144 million of them, in a file of 190 KB.
    told = _refused(_shared_table_model(12_000))
    assert "more parts than any model" in told


def test_vectors_that_claim_more_than_there_is() -> None:
    data = bytearray(_shared_table_model(3))
    for at in range(8, len(data) - 4, 4):
        broken = bytearray(data)
        broken[at : at + 4] = b"\xff\xff\xff\x7f"
        try:
            analyse.inspect_bytes("x", memoryview(bytes(broken)))
        except InspectError:
            pass


def test_a_flatbuffer_is_bounded_everywhere() -> None:
    def root(data: bytes) -> None:
        FlatBuffer(memoryview(data), "the file", Ledger()).root()

    for data in (
        b"",
        b"\x00\x00\x00",
        b"\xff\xff\xff\xff",
        b"\x04\x00\x00\x00" + b"\xff\xff\xff\x7f",  # a description before the file
        b"\x04\x00\x00\x00" + b"\x00\x00\x00\x80",  # and behind it
        b"\x04\x00\x00\x00" + b"\x00\x00\x00\x00",  # a table that is its own description
    ):
        with pytest.raises(Malformed):
            root(data)


# ---- FlexBuffers -----------------------------------------------------------------------------------------


def test_flexbuffer_values_of_all_kinds() -> None:
    content = {"a": 1, "b": "text", "c": [1, 2.5, "x", {"d": True}], "e": None, "f": b"\x00\x01"}
    data = bytes(flexbuffers.Dumps(content))
    found = read_map(memoryview(data))
    assert found["a"] == 1
    text = found["b"]
    assert data[text.start : text.stop] == b"text"
    assert found["c"][:2] == (1, 2.5)
    assert found["c"][3] == {"d": 1}
    assert found["e"] is None


@given(st.binary(max_size=64), st.integers(0, 255), st.sampled_from((0, 1, 2, 3, 4, 8, 255)))
def test_flexbuffer_of_any_bytes(data: bytes, packed: int, width: int) -> None:
    try:
        read_map(memoryview(data + bytes((packed, width))))
    except Malformed:
        pass


# ---- protocol buffers ------------------------------------------------------------------------------------


def _field(number: int, content: bytes) -> bytes:
    length = len(content)
    size = bytearray()
    while length >= 0x80:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    size.append(length)
    key = number << 3 | 2
    return (bytes((key,)) if key < 0x80 else bytes((key & 0x7F | 0x80, key >> 7))) + bytes(size) + content


def test_graphs_inside_graphs_without_end() -> None:
    graph = _field(2, b"g")
    for _ in range(2000):
        node = _field(4, b"If") + _field(5, _field(1, b"then_branch") + _field(6, graph))
        graph = _field(1, node)
    assert "nests graphs deeper" in _refused(b"\x08\x07" + _field(7, graph))


def test_more_parts_than_a_model_has() -> None:
    assert "more parts than any model" in _refused(b"\x08\x07" + _field(7, b"\x0a\x00" * 190_000))
    report = _survived(b"\x08\x07" + _field(7, b"\x12\x00" * 50_000))
    assert report.op_count == 0
    with pytest.raises(Malformed, match="more parts than any model"):
        message = Wire(memoryview(b"\x0a\x00" * 60_000), "the file").root()
        for _ in range(3):
            message.wire.root()


def test_numbers_without_end() -> None:
    with pytest.raises(Malformed, match="too long"):
        Wire(memoryview(b"\x08" + b"\xff" * 20), "the file").root()
    with pytest.raises(Malformed, match="ends inside a number"):
        Wire(memoryview(b"\x08\x80"), "the file").root()
    with pytest.raises(Malformed, match="ends outside"):
        Wire(memoryview(b"\x0a\x05ab"), "the file").root()
    with pytest.raises(Malformed, match="unknown kind"):
        Wire(memoryview(b"\x0b"), "the file").root()


# ---- archives --------------------------------------------------------------------------------------------


def _archive(*entries: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def test_an_archive_that_unpacks_to_gigabytes() -> None:
    data = _archive(("m/data.pkl", bytes(80 << 20)), ("m/constants.pkl", b""))
    assert len(data) < 1 << 20
    assert "at most" in _refused(data)


def test_an_archive_that_lies_about_its_sizes() -> None:
    data = bytearray(_archive(("m/data.pkl", bytes(1 << 20)), ("m/code/x.py", b"")))
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 10)
    archive = read_archive(memoryview(bytes(data)))
    with pytest.raises(Malformed, match="does not unpack"):
        read_entry(memoryview(bytes(data)), archive.entries[0], 10)


def test_an_archive_of_too_many_files() -> None:
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0, 0, 0)
    with pytest.raises(Malformed, match="claims 65535 files"):
        read_archive(memoryview(b"PK\x03\x04" + end))


def test_archives_are_read_as_zipfile_reads_them(files: Path) -> None:
    for path in files.glob("*.pt*"):
        if not zipfile.is_zipfile(path):
            continue
        data = memoryview(path.read_bytes())
        with zipfile.ZipFile(path) as reference:
            archive = read_archive(data)
            assert list(archive.names()) == reference.namelist()
            for entry in archive.entries:
                assert read_entry(data, entry, 1 << 20) == reference.read(entry.name)


# ---- pickles ---------------------------------------------------------------------------------------------


def test_a_pickle_is_never_run() -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("run!",))

    found = read_pickle(pickle.dumps({"a": Evil(), "b": [1, 2.5, "x", None, True]}, protocol=2))
    assert found.calls[0].callee.name == "print"
    assert found.calls[0].arguments == ("run!",)
    assert found.value["b"] == [1, 2.5, "x", None, True]


def test_a_pickle_that_contains_itself() -> None:
    import pickle

    loop: list[object] = []
    loop.append(loop)
    for protocol in (2, 3, 4, 5):
        found = read_pickle(pickle.dumps(loop, protocol=protocol))
        assert found.value[0] is found.value


@given(st.binary(max_size=200))
def test_pickles_of_any_bytes(data: bytes) -> None:
    try:
        read_pickle(b"\x80\x02" + data)
    except Malformed:
        pass


# ---- XML -------------------------------------------------------------------------------------------------


def test_xml_without_bottom() -> None:
    told = _refused(b'<net name="x" version="11">' + b"<a>" * 100_000)
    assert "deeper than any model" in told


def test_xml_with_many_layers_is_read() -> None:
    layers = "".join(f'<layer id="{i}" name="l{i}" type="ReLU"/>' for i in range(5000))
    report = _survived(f'<net name="x" version="11"><layers>{layers}</layers></net>'.encode())
    assert report.op_types == {"ReLU": 5000}
