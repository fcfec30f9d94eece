"""TorchScript: archives with pickles."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable


def archive_of(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A ZIP archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def archive_of_empty_files(size: int) -> bytes:
    """As many files as are listed, or as there is room for, with nothing in them."""
    count = min(size // 100, 49_990)
    return archive_of(
        ("m/data.pkl", b"\x80\x02}."), *((f"m/code/{number}.py", b"") for number in range(count))
    )


def archive_upon_itself(size: int) -> bytes:
    """Entries that all lie upon the same packed bytes, each of which unpacks to much more."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    text = b"torch.a(" * (1 << 17)
    packed = packer.compress(text) + packer.flush()
    head = (
        b"PK\x03\x04"
        + struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(packed), len(text), 6, 0)
        + b"m/c.py"
    )
    directory = b""
    count = min((size - len(packed)) // 62, 49_000)
    for number_of in range(count):
        name = f"m/code/{number_of:05d}.py".encode()
        directory += (
            b"PK\x01\x02"
            + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0)
            + struct.pack("<IIIHHHHHII", 0, len(packed), len(text), len(name), 0, 0, 0, 0, 0, 0)
            + name
        )
    end = b"PK\x05\x06" + struct.pack(
        "<HHHHIIH", 0, 0, count & 0xFFFF, count & 0xFFFF, len(directory), len(head) + len(packed), 0
    )
    return head + packed + directory + end


def archive_of_constants_upon_each_other(size: int) -> bytes:
    """Entries of raw tensors that all hold most of the file."""
    raw = bytes(size // 2)
    head = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, len(raw), len(raw), 6, 0) + b"m/data"
    count = min(size // 2 // 70, 9000)
    calls = b"".join(
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nShortStorage\nX"
        + struct.pack("<I", 5)
        + f"{number_of:05d}".encode()
        + b"X\x03\x00\x00\x00cpuK\x01tQtR0"
        for number_of in range(count)
    )
    pickle = b"\x80\x02" + calls + b"}."
    pickled = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, len(pickle), len(pickle), 10, 0)
    body = head + raw + pickled + b"m/data.pkl" + pickle
    directory = b""
    entries = [(f"m/data/{number_of:05d}", len(raw), 0) for number_of in range(count)]
    entries.append(("m/data.pkl", len(pickle), len(head) + len(raw)))
    entries.append(("m/code/x.py", 0, 0))
    for name, length, at in entries:
        directory += (
            b"PK\x01\x02"
            + struct.pack("<HHHHHH", 20, 20, 0, 0, 0, 0)
            + struct.pack("<IIIHHHHHII", 0, length, length, len(name), 0, 0, 0, 0, 0, at)
            + name.encode()
        )
    total = len(entries)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, total, total, len(directory), len(body), 0)
    return body + directory + end


def pickle_of(piece: bytes, before: bytes = b"", after: bytes = b".") -> Callable[[int], bytes]:
    """An archive with a pickle of the piece, as often as there is room for."""
    return lambda size: archive_of(
        ("m/data.pkl", b"\x80\x02" + before + piece * (size // len(piece)) + after), ("m/code/x.py", b"")
    )


def pickle_packed(size: int) -> bytes:
    """A pickle that unpacks to a thousand times its size."""
    return archive_of(
        ("m/data.pkl", b"\x80\x02" + b"]0" * (size * 7) + b"}."),
        ("m/code/x.py", b""),
        method=zipfile.ZIP_DEFLATED,
    )


def bytecode_shared(size: int) -> bytes:
    """A function of many instructions, which the pickle holds as often as there is room for."""
    operators = b"((X\x01\x00\x00\x00aX\x00\x00\x00\x00ttq\x01"
    instruction = b"(X\x02\x00\x00\x00OPK\x00K\x00tq\x02"
    instructions = b"(" + instruction + b"h\x02" * (size // 4) + b"tq\x03"
    function = (
        b"(X\x01\x00\x00\x00f((X\x09\x00\x00\x00operatorsh\x01t(X\x0c\x00\x00\x00instructionsh\x03tttq\x04"
    )
    content = operators + b"0" + instructions + b"0" + b"(" + function + b"h\x04" * (size // 4) + b"t."
    return archive_of(("m/bytecode.pkl", b"\x80\x02" + content), ("m/data.pkl", b"\x80\x02}."))


def source_of_calls(size: int) -> bytes:
    """Source text that is nothing but calls."""
    return archive_of(("m/data.pkl", b"\x80\x02}."), ("m/code/x.py", b"torch.a(" * (size // 8)))


DENSE: dict[str, Callable[[int], bytes]] = {
    "torchscript empty files": archive_of_empty_files,
    "torchscript files upon each other": archive_upon_itself,
    "torchscript constants upon each other": archive_of_constants_upon_each_other,
    "torchscript pickle of nothing": pickle_of(b"N0"),
    "torchscript pickle of lists": pickle_of(b"]"),
    "torchscript pickle of dictionaries": pickle_of(b"}"),
    "torchscript pickle of tuples": pickle_of(b"\x85", b"N"),
    "torchscript pickle of numbers": pickle_of(b"G\0\0\0\0\0\0\0\0"),
    "torchscript pickle of calls": pickle_of(b"ca\nb\n)R"),
    "torchscript pickle of keys": pickle_of(b"K\1Ns", b"}"),
    "torchscript pickle packed": pickle_packed,
    "torchscript functions shared": bytecode_shared,
    "torchscript calls": source_of_calls,
}
