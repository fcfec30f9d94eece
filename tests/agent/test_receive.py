"""The model store: what comes is what was sent, whatever breaks on the way, and it stays within bounds."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import zipfile
import zlib
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boardbench.agent import folder
from boardbench.agent.errors import (
    AgentError,
    ConfigurationError,
    CorruptChunk,
    DamagedFile,
    DigestMismatch,
    DiskFull,
    InvalidRequest,
    InvalidTransfer,
    MislabelledFile,
    ModelInUse,
    ModelNotFound,
    OverQuota,
    StorageError,
    Superseded,
    Unavailable,
)
from boardbench.agent.part import CHUNK_LIMIT_BYTES, Part
from boardbench.agent.receive import StoredFile, Transfer
from boardbench.agent.recognise import FileKind, clean_name
from boardbench.agent.store import ModelStore

MIB = 1024 * 1024


class Disk:
    """A file system as statvfs tells it, and writes that can fail."""

    def __init__(self, free_bytes: int = 1 << 40) -> None:
        self.free_bytes = free_bytes
        self.room_bytes = 1 << 40
        self.error = errno.ENOSPC
        self.counts_writes = False

    def statvfs(self, path: Path) -> os.statvfs_result:
        return os.statvfs_result((1, 1, 0, 0, self.free_bytes, 0, 0, 0, 0, 255))

    def write(self, descriptor: int, data: memoryview) -> int:
        data = data[: self.room_bytes]
        if not data:
            raise OSError(self.error, os.strerror(self.error))
        self.room_bytes -= len(data)
        if self.counts_writes:
            self.free_bytes -= len(data)
        return os.write(descriptor, data)


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


@pytest.fixture
async def stores(tmp_path: Path):
    """Opens stores in one folder and closes them."""
    opened: list[ModelStore] = []

    def open_store(limit_bytes: int = 1 << 30, free_floor_bytes: int = 0, **settings) -> ModelStore:
        opened.append(ModelStore(tmp_path / "store", limit_bytes, free_floor_bytes, **settings))
        return opened[-1]

    yield open_store
    for store in opened:
        await store.close()


def tflite(size_bytes: int, seed: object = 0) -> bytes:
    """A TensorFlow Lite file with one empty graph, and random bytes behind it."""
    model = struct.pack("<I4s5H2xiI", 20, b"TFL3", 10, 8, 0, 0, 4, 12, 4)
    graph = struct.pack("<II2Hi", 1, 8, 4, 4, 4)
    head = model + graph
    return head + random.Random(str(seed)).randbytes(size_bytes - len(head))


def onnx(size_bytes: int) -> bytes:
    graph_bytes = size_bytes - 8
    length = bytes([graph_bytes & 0x7F | 0x80, graph_bytes >> 7 & 0x7F | 0x80, graph_bytes >> 14])
    name = bytes([0x12, graph_bytes - 4 & 0x7F | 0x80, graph_bytes - 4 >> 7 | 0x80, 0])
    assert 128 <= size_bytes < 16384
    return b"\x08\x08\x3a" + length + name + b"g" * (size_bytes - 10)


def npz() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("image.npy", b"\x93NUMPY")
    return target.getvalue()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def send(transfer: Transfer, data: bytes, until: int | None = None, chunk_bytes: int = MIB) -> None:
    while transfer.offset_bytes < (len(data) if until is None else until):
        chunk = data[transfer.offset_bytes : transfer.offset_bytes + chunk_bytes][
            : None if until is None else until - transfer.offset_bytes
        ]
        await transfer.write(offset_bytes=transfer.offset_bytes, data=chunk, crc32=zlib.crc32(chunk))


async def push(
    store: ModelStore, data: bytes, name: str = "model.tflite", kind: FileKind = FileKind.MODEL
) -> StoredFile:
    async with store.receive(sha256=digest(data), name=name, size_bytes=len(data), kind=kind) as transfer:
        if transfer.stored is None:
            await send(transfer, data)
        return await transfer.finish()


async def push_part(store: ModelStore, data: bytes, until: int, chunk_bytes: int = MIB) -> None:
    """A push whose connection breaks."""
    async with store.receive(sha256=digest(data), name="model.tflite", size_bytes=len(data)) as transfer:
        await send(transfer, data, until, chunk_bytes)


async def run_script(script: str, root: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """Runs it in a process of its own; it gets the root and the folder of these tests as arguments."""
    command = [*before, sys.executable, "-c", textwrap.dedent(script), str(root), str(Path(__file__).parent)]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
    )


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "store" / "arriving").iterdir())


# A file comes.


async def test_a_file_in_chunks_is_stored_under_its_digest(stores, tmp_path: Path):
    store = stores(limit_bytes=10 * MIB, free_floor_bytes=7)
    data = tflite(3 * MIB + 17)
    stored = await push(store, data)
    assert stored.path.read_bytes() == data
    assert stored.path.name == f"{digest(data)}.tflite"
    assert (stored.name, stored.format, stored.size_bytes) == ("model.tflite", "tflite", len(data))
    assert stored.kind is FileKind.MODEL
    assert not stored.in_use
    assert store.get(digest(data)) == stored
    assert store.files() == (stored,)
    assert left(tmp_path) == []
    status = store.status()
    assert (status.used_bytes, status.files) == (len(data), 1)
    assert (status.limit_bytes, status.free_floor_bytes) == (10 * MIB, 7)
    assert 0 < status.free_bytes <= shutil.disk_usage(tmp_path).total


async def test_an_upper_case_digest_is_the_same_file(stores):
    store = stores()
    data = tflite(100)
    async with store.receive(sha256=digest(data).upper(), name="m.tflite", size_bytes=100) as transfer:
        await send(transfer, data)
        stored = await transfer.finish()
    assert stored.sha256 == digest(data)
    assert store.get(digest(data).upper()) == stored


async def test_a_second_push_sends_nothing(stores):
    store = stores()
    data = tflite(2 * MIB)
    await push(store, data)
    async with store.receive(sha256=digest(data), name="model.tflite", size_bytes=len(data)) as transfer:
        assert transfer.already_present
        assert transfer.complete
        assert transfer.stored == store.get(digest(data))
        with pytest.raises(InvalidTransfer, match="here already"):
            await transfer.write(offset_bytes=len(data), data=b"x", crc32=0)
        assert await transfer.finish() == transfer.stored


async def test_the_name_is_that_of_the_latest_push_also_after_a_restart(stores):
    store = stores()
    data = tflite(1000)
    await push(store, data, "first.tflite")
    assert (await push(store, data, "second.tflite")).name == "second.tflite"
    await store.close()
    assert stores().get(digest(data)).name == "second.tflite"


async def test_inputs_are_kept_apart_by_kind(stores):
    store = stores()
    stored = await push(store, npz(), "inputs.npz", FileKind.INPUTS)
    assert (stored.kind, stored.format) == (FileKind.INPUTS, "npz")
    await store.close()
    assert stores().get(stored.sha256).kind is FileKind.INPUTS


@given(
    size=st.integers(44, 5 * MIB),
    breaks=st.lists(st.tuples(st.floats(0, 1), st.integers(1, CHUNK_LIMIT_BYTES), st.booleans()), max_size=4),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_breaks_the_file_is_the_one_that_was_sent(tmp_path_factory, size, breaks):
    root = tmp_path_factory.mktemp("any") / "store"
    data = tflite(size)

    async def scenario() -> None:
        store = ModelStore(root, 1 << 30, 0)
        for share, chunk_bytes, restarts in breaks:
            await push_part(store, data, int(share * (size - 1)), max(chunk_bytes, size // 50 + 1))
            if restarts:
                await store.close()
                store = ModelStore(root, 1 << 30, 0)
        stored = await push(store, data)
        assert stored.path.read_bytes() == data
        assert store.status().used_bytes == size
        await store.close()

    asyncio.run(scenario())


# It goes on where it broke.


async def test_it_goes_on_where_the_connection_broke(stores):
    store = stores()
    data = tflite(5 * MIB)
    await push_part(store, data, 2 * MIB + 5)
    assert store.status().used_bytes == 2 * MIB + 5
    async with store.receive(sha256=digest(data), name="model.tflite", size_bytes=len(data)) as transfer:
        assert transfer.offset_bytes == 2 * MIB + 5
        await send(transfer, data)
        assert (await transfer.finish()).path.read_bytes() == data


async def test_it_goes_on_after_a_restart(stores):
    store = stores()
    data = tflite(5 * MIB)
    await push_part(store, data, 3 * MIB + 1, chunk_bytes=100_000)
    await store.close()
    store = stores()
    assert store.status().used_bytes == 3 * MIB + 1
    async with store.receive(sha256=digest(data), name="model.tflite", size_bytes=len(data)) as transfer:
        assert transfer.offset_bytes == 3 * MIB + 1
        await send(transfer, data)
        assert (await transfer.finish()).path.read_bytes() == data


async def test_all_bytes_came_but_not_the_end_of_the_push(stores):
    store = stores()
    data = tflite(2 * MIB)
    await push_part(store, data, len(data))
    async with store.receive(sha256=digest(data), name="model.tflite", size_bytes=len(data)) as transfer:
        assert transfer.complete
        assert not transfer.already_present
        assert (await transfer.finish()).path.read_bytes() == data


async def test_a_killed_agent_keeps_what_had_come(stores, tmp_path: Path):
    data = tflite(6 * MIB, seed=4)
    script = """
        import asyncio, os, pathlib, signal, sys
        sys.path.insert(0, sys.argv[2])
        from test_receive import ModelStore, digest, send, tflite

        async def main():
            store = ModelStore(pathlib.Path(sys.argv[1]), 1 << 30, 0)
            data = tflite(6 * 1024 * 1024, seed=4)
            async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=len(data)) as transfer:
                await send(transfer, data, 5 * 1024 * 1024 + 9)
                part = pathlib.Path(sys.argv[1]) / "arriving" / f"{digest(data)}.part"
                while part.stat().st_size < transfer.offset_bytes:
                    await asyncio.sleep(0)
                os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
    """
    killed = await run_script(script, tmp_path / "store")
    assert killed.returncode == -signal.SIGKILL
    store = stores()
    async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=len(data)) as transfer:
        # The block that was not full is asked for again.
        assert transfer.offset_bytes == 5 * MIB
        await send(transfer, data)
        assert (await transfer.finish()).path.read_bytes() == data


def lose_the_end(part: Path, journal: Path) -> None:
    os.truncate(part, 3 * MIB + 5)


def zero_the_end(part: Path, journal: Path) -> None:
    with part.open("r+b") as file:
        file.seek(3 * MIB + 5)
        file.write(bytes(MIB))


def lose_the_journal(part: Path, journal: Path) -> None:
    os.truncate(journal, 3 * 8 + 3)


def damage_the_journal(part: Path, journal: Path) -> None:
    with journal.open("r+b") as file:
        file.seek(3 * 8)
        file.write(b"\xff\xff\xff\xff")


@pytest.mark.parametrize("damage", [lose_the_end, zero_the_end, lose_the_journal, damage_the_journal])
async def test_after_a_power_cut_only_blocks_that_hold_are_kept(stores, tmp_path: Path, damage):
    store = stores()
    data = tflite(6 * MIB)
    await push_part(store, data, 5 * MIB)
    await store.close()
    folder = tmp_path / "store" / "arriving"
    damage(folder / f"{digest(data)}.part", folder / f"{digest(data)}.crc")
    store = stores()
    async with store.receive(sha256=digest(data), name="model.tflite", size_bytes=len(data)) as transfer:
        assert transfer.offset_bytes == 3 * MIB
        await send(transfer, data)
        assert (await transfer.finish()).path.read_bytes() == data


async def test_a_header_with_another_size_does_not_bring_foreign_bytes_in(stores):
    store = stores()
    data = tflite(4 * MIB)
    await push_part(store, data, 3 * MIB)
    async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=1000) as transfer:
        assert transfer.offset_bytes == 0
        with pytest.raises(InvalidTransfer, match="more bytes than the 1000"):
            await transfer.write(offset_bytes=0, data=data[:1001], crc32=zlib.crc32(data[:1001]))
    assert (await push(store, data)).path.read_bytes() == data
    with pytest.raises(InvalidTransfer, match=f"has {4 * MIB} bytes and not 1000"):
        async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=1000):
            pass


# Wrong from the start, or damaged on the way.


@pytest.mark.parametrize("sha256", ["", "12", "z" * 64, "../" * 21 + "a", "0" * 65])
async def test_a_digest_that_is_none_is_refused(stores, sha256: str):
    with pytest.raises(InvalidTransfer, match="64 hexadecimal digits"):
        async with stores().receive(sha256=sha256, name="m.tflite", size_bytes=10):
            pass


@pytest.mark.parametrize("size", [0, -1])
async def test_an_empty_file_is_refused(stores, size: int):
    with pytest.raises(InvalidTransfer, match=r"m\.tflite is empty"):
        async with stores().receive(sha256="0" * 64, name="m.tflite", size_bytes=size):
            pass


async def test_a_damaged_chunk_is_refused_and_what_came_before_is_kept(stores):
    store = stores()
    data = tflite(4 * MIB)
    with pytest.raises(CorruptChunk, match=f"chunk for byte {2 * MIB} came damaged"):
        async with store.receive(sha256=digest(data), name="model.tflite", size_bytes=len(data)) as transfer:
            await send(transfer, data, 2 * MIB)
            await transfer.write(offset_bytes=2 * MIB, data=data[:MIB], crc32=1)
            # The error may come with a later chunk; none behind the damaged one is taken.
            await send(transfer, data)
            await transfer.finish()
    async with store.receive(sha256=digest(data), name="model.tflite", size_bytes=len(data)) as transfer:
        assert transfer.offset_bytes == 2 * MIB
        await send(transfer, data)
        assert (await transfer.finish()).path.read_bytes() == data


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (0, 10, r"for byte 0 came where byte 100 was due"),
        (101, 10, r"for byte 101 came where byte 100 was due"),
        (100, 0, r"a chunk of 0 bytes"),
        (100, CHUNK_LIMIT_BYTES + 1, rf"a chunk of {CHUNK_LIMIT_BYTES + 1} bytes"),
        (100, MIB, r"more bytes than the 1000 that the header says"),
    ],
)
async def test_a_chunk_out_of_place_is_refused(stores, offset: int, size: int, message: str):
    store = stores()
    data = tflite(1000)
    async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=1000) as transfer:
        await send(transfer, data, 100)
        with pytest.raises(InvalidTransfer, match=message):
            await transfer.write(offset_bytes=offset, data=bytes(size), crc32=zlib.crc32(bytes(size)))
        await send(transfer, data)
        assert (await transfer.finish()).path.read_bytes() == data


async def test_other_bytes_than_announced_leave_nothing_behind(stores, tmp_path: Path):
    store = stores()
    data, other = tflite(2 * MIB, seed=1), tflite(2 * MIB, seed=2)
    with pytest.raises(DigestMismatch) as caught:
        async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=len(data)) as transfer:
            await send(transfer, other)
            await transfer.finish()
    assert digest(data) in str(caught.value)
    assert digest(other) in str(caught.value)
    assert left(tmp_path) == []
    assert store.status().used_bytes == 0
    assert (await push(store, data)).path.read_bytes() == data


async def test_an_end_before_the_last_byte_says_where_it_goes_on(stores):
    store = stores()
    data = tflite(3000)
    with pytest.raises(InvalidTransfer, match="only 1000 of 3000 bytes came"):
        async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=3000) as transfer:
            await send(transfer, data, 1000)
            await transfer.finish()
    assert store.status().used_bytes == 1000


@pytest.mark.parametrize(
    ("name", "data", "kind", "error", "words"),
    [
        ("model.tflite", onnx(500), FileKind.MODEL, MislabelledFile, ["model.tflite", "says tflite", "onnx"]),
        ("model.onnx", tflite(500), FileKind.MODEL, MislabelledFile, ["model.onnx", "says onnx", "tflite"]),
        ("MODEL.TFLITE", onnx(500), FileKind.MODEL, MislabelledFile, ["says tflite"]),
        ("model.tflite", b"<html>404", FileKind.MODEL, MislabelledFile, ["says tflite", "no format known"]),
        ("model.bin", b"<html>404", FileKind.MODEL, DamagedFile, ["model.bin", "no format known here"]),
        ("model.onnx", onnx(500)[:300], FileKind.MODEL, DamagedFile, ["model.onnx", "truncated"]),
        ("model.tflite", tflite(500)[:10], FileKind.MODEL, DamagedFile, ["model.tflite", "truncated"]),
        ("inputs.npz", npz()[:-9], FileKind.INPUTS, DamagedFile, ["inputs.npz"]),
        ("inputs.npz", npz(), FileKind.MODEL, InvalidRequest, ["inputs.npz", "push it as inputs"]),
        ("model.tflite", tflite(500), FileKind.INPUTS, InvalidRequest, ["model.tflite", ".npz"]),
    ],
)
async def test_bytes_that_are_not_what_they_should_be_are_refused(
    stores, tmp_path: Path, name: str, data: bytes, kind: FileKind, error: type[AgentError], words: list[str]
):
    store = stores()
    with pytest.raises(error) as caught:
        await push(store, data, name, kind)
    for word in words:
        assert word in str(caught.value)
    assert left(tmp_path) == []
    assert store.files() == ()


@pytest.mark.parametrize("name", ["", "weights", "model.bin", "model.pt"])
async def test_a_name_that_promises_nothing_is_taken(stores, name: str):
    stored = await push(stores(), tflite(500), name)
    assert stored.format == "tflite"
    assert stored.name == name or stored.name == stored.sha256[:12]


async def test_a_wrong_name_is_refused_for_a_file_that_is_here_too(stores):
    store = stores()
    await push(store, tflite(500))
    with pytest.raises(MislabelledFile, match="says onnx"):
        await push(store, tflite(500), "model.onnx")
    assert store.files()[0].name == "model.tflite"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.tflite", "model.tflite"),
        ("/home/me/model.tflite", "model.tflite"),
        ("..\\..\\model.tflite", "model.tflite"),
        ("../..", ""),
        (".", ""),
        ("a/b/", ""),
        ("mo\x1b[31mdel\x00.tflite", "mo[31mdel.tflite"),
        ("one\r\ntwo.onnx", "one  two.onnx"),
        ("evil\u202eetilft.exe", "eviletilft.exe"),
        ("Modèle größe 模型.tflite", "Modèle größe 模型.tflite"),
        ("x" * 300 + ".tflite", "x" * 121 + ".tflite"),
        ("x" * 300, "x" * 128),
        ("  padded.tflite ", "padded.tflite"),
    ],
)
def test_names_have_no_folders_and_move_no_cursor(name: str, shown: str):
    assert clean_name(name) == shown


# Bounds.


async def test_the_least_recently_used_goes_first(stores):
    store = stores(limit_bytes=3000)
    a, b, c = (tflite(1000, seed) for seed in "abc")
    for data in (a, b, c):
        await push(store, data)
    with store.lease(digest(a)):
        pass
    await push(store, tflite(1500, "d"))
    assert [file.sha256 for file in store.files()] == [digest(tflite(1500, "d")), digest(a)]
    assert store.status().used_bytes == 2500


async def test_the_order_of_use_holds_over_a_restart_and_when_the_clock_jumps_back(stores):
    clock = Clock()
    store = stores(limit_bytes=2000, clock=clock)
    a, b, c = (tflite(1000, seed) for seed in "abc")
    await push(store, a)
    await push(store, b)
    clock.seconds -= 1_000_000
    with store.lease(digest(a)):
        pass
    await push(store, c)
    assert {file.sha256 for file in store.files()} == {digest(a), digest(c)}
    await store.close()
    clock.seconds += 2_000_000
    store = stores(limit_bytes=2000, clock=clock)
    with store.lease(digest(a)):
        pass
    await store.close()
    store = stores(limit_bytes=2000, clock=clock)
    await push(store, b)
    assert {file.sha256 for file in store.files()} == {digest(a), digest(b)}


async def test_a_leased_file_stays_and_the_refusal_says_why(stores):
    store = stores(limit_bytes=2000)
    a, b = tflite(1000, "a"), tflite(1000, "b")
    await push(store, a)
    await push(store, b)
    with store.lease(digest(a)) as outer, store.lease(digest(a)):
        assert outer.in_use
        with pytest.raises(OverQuota) as caught:
            await push(store, tflite(1500, "c"))
        assert "model.tflite needs 1.5 kB and the model store can make room for 1.0 kB" in str(caught.value)
        # Nothing went for a file that could not come.
        assert len(store.files()) == 2
        await push(store, tflite(1000, "d"))
        assert outer.path.read_bytes() == a
    assert {file.sha256 for file in store.files()} == {digest(a), digest(tflite(1000, "d"))}
    assert not store.get(digest(a)).in_use


async def test_more_than_the_store_may_hold_is_refused_at_once(stores):
    store = stores(limit_bytes=2000)
    await push(store, tflite(1000))
    with pytest.raises(
        OverQuota, match=r"has 2\.0 kB and the model store may hold 2\.0 kB; raise store\.limit"
    ):
        await push(store, tflite(2001))
    assert len(store.files()) == 1


async def test_what_has_to_go_is_gone_for_everybody_at_once(stores, monkeypatch: pytest.MonkeyPatch):
    """The disk takes a while for the first; the second must not be taken for a file that stays."""
    store = stores(limit_bytes=3000)
    a, b = tflite(1000, "a"), tflite(1000, "b")
    await push(store, a)
    await push(store, b)
    begun, may_go = threading.Event(), threading.Event()
    unlink = ModelStore._unlink

    def slowly(self: ModelStore, kept: Any) -> None:
        begun.set()
        assert may_go.wait(30)
        unlink(self, kept)

    monkeypatch.setattr(ModelStore, "_unlink", slowly)
    pushing = asyncio.create_task(push(store, tflite(3000, "c")))
    assert await asyncio.to_thread(begun.wait, 30)
    try:
        for data in (a, b):
            with pytest.raises(ModelNotFound), store.lease(digest(data)):
                pass
    finally:
        may_go.set()
        await pushing
    assert store.status().used_bytes == 3000


async def test_unfinished_files_make_room_in_their_turn(stores):
    store = stores(limit_bytes=3 * MIB)
    old, data = tflite(2 * MIB, "old"), tflite(2 * MIB, "new")
    await push(store, tflite(MIB, "kept"))
    await push_part(store, old, MIB)
    with store.lease(digest(tflite(MIB, "kept"))):
        pass
    await push(store, data)
    assert {file.sha256 for file in store.files()} == {digest(data), digest(tflite(MIB, "kept"))}
    assert store.status().used_bytes == 3 * MIB


async def test_files_on_their_way_are_counted_whole(stores):
    store = stores(limit_bytes=3000)
    first = tflite(2000, 1)
    async with store.receive(sha256=digest(first), name="a.tflite", size_bytes=2000) as transfer:
        await send(transfer, first, 10)
        with pytest.raises(OverQuota, match=r"2\.0 kB are in use by jobs or arriving"):
            await push(store, tflite(1500, 2))
        await push(store, tflite(1000, 3))
        await send(transfer, first)
        await transfer.finish()
    assert store.status().used_bytes == 3000


async def test_the_free_floor_is_kept_by_removing_old_files(stores):
    disk = Disk(free_bytes=10_000)
    store = stores(free_floor_bytes=8000, statvfs=disk.statvfs)
    await push(store, tflite(1500, "a"))
    disk.free_bytes -= 1500
    with pytest.raises(DiskFull) as caught:
        await push(store, tflite(2001, "b"))
    assert "needs 2.0 kB and the file system of" in str(caught.value)
    assert "8.5 kB free, of which 8.0 kB stay free" in str(caught.value)
    assert "would free 1.5 kB" in str(caught.value)
    assert len(store.files()) == 1
    await push(store, tflite(2000, "b"))
    assert [file.size_bytes for file in store.files()] == [2000]


async def test_the_floor_is_watched_while_a_file_comes(stores, tmp_path: Path):
    disk = Disk()
    disk.counts_writes = True
    store = stores(free_floor_bytes=100 * MIB, statvfs=disk.statvfs, write=disk.write)
    data = tflite(40 * MIB)
    with pytest.raises(DiskFull, match="make room on the board"):
        async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=len(data)) as transfer:
            await send(transfer, data, 10 * MIB)
            disk.free_bytes = 110 * MIB
            await send(transfer, data)
    assert left(tmp_path) == []
    assert store.status().used_bytes == 0


async def test_a_disk_that_fills_up_is_told_and_survived(stores, tmp_path: Path):
    disk = Disk()
    disk.room_bytes = 5 * MIB // 2
    disk.free_bytes = 1_234_567
    store = stores(write=disk.write, statvfs=disk.statvfs)
    data = tflite(8 * MIB)
    disk.free_bytes = 1 << 40
    with pytest.raises(DiskFull) as caught:
        async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=len(data)) as transfer:
            disk.free_bytes = 1_234_567
            await send(transfer, data)
            await transfer.finish()
    assert "m.tflite: the disk filled up: " in str(caught.value)
    assert "1.2 MB free" in str(caught.value)
    assert left(tmp_path) == []
    disk.room_bytes = disk.free_bytes = 1 << 40
    assert (await push(store, data)).path.read_bytes() == data


async def test_a_real_full_disk_is_told_and_survived(tmp_path: Path, small_disk: Callable[[int], Path]):
    mount: list[str] = []
    if os.geteuid() == 0:
        disk = small_disk(6 * MIB)
    else:
        # Whoever may mount nothing may do so in a namespace of his own, and there only in memory.
        disk = tmp_path
        mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        mount += ['mount -t tmpfs -o size=6m none "$0" && exec "$@"', str(disk)]
        try:
            await asyncio.to_thread(
                subprocess.run, [*mount, "true"], check=True, capture_output=True, timeout=20
            )
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this machine lets nobody mount a small tmpfs (unshare --map-root-user --mount)")
    script = """
        import asyncio, os, pathlib, sys
        sys.path.insert(0, sys.argv[2])
        from test_receive import DiskFull, MIB, ModelStore, push, tflite

        async def main():
            roomy = lambda path: os.statvfs_result((1, 1, 0, 0, 1 << 40, 0, 0, 0, 0, 255))
            store = ModelStore(pathlib.Path(sys.argv[1]) / "store", 1 << 30, 0, statvfs=roomy)
            try:
                await push(store, tflite(8 * MIB))
            except DiskFull as error:
                print(error)
            stored = await push(store, tflite(3 * MIB, 2))
            assert stored.path.read_bytes() == tflite(3 * MIB, 2)
            await store.close()

        asyncio.run(main())
    """
    done = await run_script(script, disk, *mount)
    assert done.returncode == 0, done.stderr
    assert "model.tflite: the disk filled up" in done.stdout


async def test_a_failing_disk_is_told_and_survived(stores):
    disk = Disk()
    store = stores(write=disk.write)
    disk.room_bytes, disk.error = 0, errno.EIO
    with pytest.raises(StorageError, match="Input/output error"):
        await push(store, tflite(1000))
    disk.room_bytes = 1 << 40
    await push(store, tflite(1000))


async def test_what_can_not_be_read_back_is_not_in_the_way(
    stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def bad_sector(*_: object) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    store = stores()
    data = tflite(3 * MIB)
    await push_part(store, data, 2 * MIB)
    with monkeypatch.context() as patch:
        patch.setattr(Part, "read_back", bad_sector)
        with pytest.raises(StorageError, match="Input/output error"):
            await push(store, data)
    assert left(tmp_path) == []
    assert (await push(store, data)).path.read_bytes() == data


async def test_a_file_whose_name_does_not_last_is_not_there(
    stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The bytes have their name when the folder can't be synced: at the next start they would look whole."""
    calls = 0
    sync = folder.sync

    def fails_at_second(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    store = stores()
    monkeypatch.setattr(folder, "sync", fails_at_second)
    with pytest.raises(StorageError, match="Input/output error"):
        await push(store, tflite(1000))
    assert list((tmp_path / "store" / "files").iterdir()) == []
    assert left(tmp_path) == []
    assert store.status().used_bytes == 0
    await push(store, tflite(1000))


async def test_a_file_that_can_not_be_removed_is_still_there(stores, monkeypatch: pytest.MonkeyPatch):
    store = stores()
    data = tflite(1000)
    await push(store, data)

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(ModelStore, "_unlink", read_only)
        with pytest.raises(StorageError, match=r"can't be removed: .*Read-only.*; check the disk"):
            await store.delete(digest(data))
    assert store.status().used_bytes == 1000
    await store.delete(digest(data))
    assert store.files() == ()


async def test_a_disk_that_can_not_be_looked_at_is_told(stores):
    def fail(path: Path) -> os.statvfs_result:
        raise OSError(errno.EIO, "Input/output error")

    store = stores(statvfs=fail)
    with pytest.raises(StorageError, match="Input/output error"):
        await push(store, tflite(1000))
    with pytest.raises(StorageError, match="Input/output error"):
        store.status()


# Several clients.


async def test_the_second_client_waits_and_finds_the_file(stores):
    store = stores()
    data = tflite(3 * MIB)
    async with store.receive(sha256=digest(data), name="a.tflite", size_bytes=len(data)) as transfer:
        second = asyncio.create_task(push(store, data, "b.tflite"))
        await send(transfer, data)
        assert not second.done()
        await transfer.finish()
    assert (await second).path.read_bytes() == data
    assert len(store.files()) == 1


async def test_the_second_client_goes_on_when_the_first_breaks(stores):
    store = stores()
    data = tflite(3 * MIB)
    offsets: list[int] = []

    async def second() -> None:
        async with store.receive(sha256=digest(data), name="b.tflite", size_bytes=len(data)) as transfer:
            offsets.append(transfer.offset_bytes)
            await send(transfer, data)
            await transfer.finish()

    async with store.receive(sha256=digest(data), name="a.tflite", size_bytes=len(data)) as transfer:
        task = asyncio.create_task(second())
        await send(transfer, data, 2 * MIB)
    await task
    assert offsets == [2 * MIB]
    assert store.get(digest(data)).path.read_bytes() == data


async def test_a_stalled_client_is_superseded(stores):
    seconds = 0.0
    store = stores(stall_seconds=0.01, monotonic=lambda: seconds)
    data = tflite(3 * MIB)
    async with store.receive(sha256=digest(data), name="a.tflite", size_bytes=len(data)) as transfer:
        await send(transfer, data, MIB)
        second = asyncio.create_task(push(store, data, "b.tflite"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not second.done()
        seconds = 1.0
        assert (await second).path.read_bytes() == data
        with pytest.raises(Superseded, match="another client"):
            await send(transfer, data)
        with pytest.raises(Superseded):
            await transfer.finish()
    assert store.get(digest(data)).path.read_bytes() == data


async def test_many_clients_at_once_never_mix_their_bytes(stores):
    store = stores()
    files = [tflite(MIB + 100 * seed, seed) for seed in range(4)]
    stored = await asyncio.gather(*(push(store, data) for data in files * 3))
    for file, data in zip(stored, files * 3, strict=True):
        assert file.path.read_bytes() == data
    assert len(store.files()) == 4
    assert store.status().used_bytes == sum(map(len, files))


async def test_a_client_that_goes_away_while_it_waits_leaves_no_trace(stores):
    store = stores()
    data = tflite(2 * MIB)
    async with store.receive(sha256=digest(data), name="a.tflite", size_bytes=len(data)) as transfer:
        waiting = asyncio.create_task(push(store, data))
        await send(transfer, data, MIB)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await send(transfer, data)
        assert (await transfer.finish()).path.read_bytes() == data


@pytest.mark.parametrize("steps", range(0, 40, 3))
async def test_a_client_that_goes_away_at_any_moment_harms_nothing(stores, steps: int):
    store = stores()
    data = tflite(4 * MIB + 3)
    task = asyncio.create_task(push(store, data))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await push(store, data)).path.read_bytes() == data
    assert store.status().used_bytes == len(data)


@pytest.mark.parametrize("step", ["open", "read_back"])
async def test_a_client_that_goes_away_while_it_is_read_back_loses_nothing(
    stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    """What was not read back yet is there nevertheless, and takes its room."""
    monkeypatch.setattr("boardbench.agent.part._VERIFY_STEP_BYTES", MIB)
    store = stores()
    data = tflite(6 * MIB)
    await push_part(store, data, 5 * MIB)
    begun, may_go = threading.Event(), threading.Event()
    method = getattr(Part, step)

    def slowly(self: Part, *arguments: Any) -> Any:
        begun.set()
        assert may_go.wait(30)
        return method(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Part, step, slowly)
        pushing = asyncio.create_task(push(store, data))
        assert await asyncio.to_thread(begun.wait, 30)
        pushing.cancel()
        may_go.set()
        with pytest.raises(asyncio.CancelledError):
            await pushing
    assert store.status().used_bytes == store.arrived_bytes(digest(data)) == 5 * MIB
    async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=len(data)) as transfer:
        assert transfer.offset_bytes == 5 * MIB


async def test_a_client_that_goes_away_at_the_end_has_pushed(stores):
    store = stores()
    data = tflite(MIB)
    async with AsyncExitStack() as stack:
        transfer = await stack.enter_async_context(
            store.receive(sha256=digest(data), name="m.tflite", size_bytes=len(data))
        )
        await send(transfer, data)
        finishing = asyncio.create_task(transfer.finish())
        await asyncio.sleep(0)
        finishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finishing
    assert store.get(digest(data)).path.read_bytes() == data


# Use, removal, start and stop.


async def test_a_file_is_removed_unless_it_is_in_use(stores, tmp_path: Path):
    store = stores()
    data = tflite(1000)
    stored = await push(store, data)
    with store.lease(digest(data)):
        with pytest.raises(ModelInUse, match=r"model\.tflite \(.{12}\) is used by a waiting or running job"):
            await store.delete(digest(data))
        assert store.files()[0].in_use
    await store.delete(digest(data))
    assert not stored.path.exists()
    assert list((tmp_path / "store" / "files").iterdir()) == []
    for missing in (store.get, store.lease(digest(data)).__enter__):
        with pytest.raises(ModelNotFound, match="push it first"):
            missing(*([digest(data)] if missing == store.get else []))
    with pytest.raises(ModelNotFound):
        await store.delete(digest(data))


async def test_a_lease_counts_as_use(stores):
    clock = Clock()
    store = stores(clock=clock)
    a, b = tflite(1000, "a"), tflite(1000, "b")
    before = (await push(store, a)).used_at
    await push(store, b)
    with store.lease(digest(a)):
        pass
    assert [file.sha256 for file in store.files()] == [digest(a), digest(b)]
    used_at = store.get(digest(a)).used_at
    assert used_at > before
    await store.close()
    assert stores(clock=clock).get(digest(a)).used_at == pytest.approx(used_at, abs=1e-3)


async def test_what_is_not_whole_is_dropped_at_the_start(stores, tmp_path: Path, caplog):
    store = stores()
    kept, short, bare, unreadable = (tflite(1000, seed) for seed in range(4))
    for data in (kept, short, bare, unreadable):
        await push(store, data)
    await store.close()
    files = tmp_path / "store" / "files"
    os.truncate(files / f"{digest(short)}.tflite", 999)
    (files / f"{digest(bare)}.tflite").unlink()
    (files / f"{digest(unreadable)}.json").write_bytes(b'{"name": "m.tf')
    (files / "stranger").write_bytes(b"x")
    (tmp_path / "store" / "arriving" / "stranger.part").write_bytes(b"x")
    (tmp_path / "store" / "arriving" / f"{digest(bare)}.crc").write_bytes(b"x")
    store = stores()
    assert [file.sha256 for file in store.files()] == [digest(kept)]
    assert store.status().used_bytes == 1000
    assert sorted(path.name for path in files.iterdir()) == [f"{digest(kept)}.json", f"{digest(kept)}.tflite"]
    assert left(tmp_path) == []
    assert "999 bytes are there and 1000 were stored" in caplog.text
    assert (await push(store, short)).path.read_bytes() == short


async def test_old_unfinished_files_are_dropped(stores, tmp_path: Path):
    clock = Clock()
    store = stores(clock=clock, leftover_seconds=1000)
    first, second = tflite(2 * MIB, 1), tflite(2 * MIB, 2)
    await push_part(store, first, MIB)
    clock.seconds += 2000
    await push_part(store, second, MIB)
    assert left(tmp_path) == [f"{digest(second)}.crc", f"{digest(second)}.part"]
    await store.close()
    stamp = clock.seconds - 2000
    os.utime(tmp_path / "store" / "arriving" / f"{digest(second)}.part", (stamp, stamp))
    stores(clock=clock, leftover_seconds=1000)
    assert left(tmp_path) == []


async def test_a_lower_limit_holds_from_the_start(stores):
    clock = Clock()
    store = stores(clock=clock)
    for seed in range(4):
        await push(store, tflite(1000, seed))
    await store.close()
    store = stores(limit_bytes=2500, clock=clock)
    assert [file.sha256 for file in store.files()] == [digest(tflite(1000, 3)), digest(tflite(1000, 2))]


async def test_a_folder_has_one_owner(stores, tmp_path: Path):
    store = stores()
    with pytest.raises(ConfigurationError, match="another agent is using it"):
        stores()
    await store.close()
    stores()


async def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path):
    (tmp_path / "store").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"store: can't be used"):
        ModelStore(tmp_path / "store", 1000, 0)


async def test_closing_ends_transfers_and_keeps_what_came(stores):
    store = stores()
    data = tflite(3 * MIB)
    async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=len(data)) as transfer:
        waiting = asyncio.create_task(push(store, data))
        await send(transfer, data, 2 * MIB)
        await store.close()
        with pytest.raises(Unavailable):
            await send(transfer, data)
        with pytest.raises(Unavailable):
            await waiting
    with pytest.raises(Unavailable):
        await push(store, data)
    with pytest.raises(Unavailable):
        await store.delete(digest(data))
    store = stores()
    async with store.receive(sha256=digest(data), name="m.tflite", size_bytes=len(data)) as transfer:
        assert transfer.offset_bytes == 2 * MIB
