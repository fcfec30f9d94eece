"""Bytes of protobuf messages that are not ours, made field by field.

Prometheus's own message definitions would have to be generated, and would be refused beside anybody else's
copy of them in one process; what is sent here has a dozen fields.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import struct

_DOUBLE = struct.Struct("<d")


def varint(value: int) -> bytes:
    """Returns the number as a varint; a negative one as its 64 bits."""
    value &= 0xFFFFFFFFFFFFFFFF
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(content: bytes, at: int) -> tuple[int, int]:
    """Returns the number that begins there and where it ends; IndexError when there is none."""
    byte = content[at]
    at += 1
    value, shift = byte & 0x7F, 7
    while byte & 0x80:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > 70:
            raise IndexError("a number has ten bytes at most")
    return value, at


def zigzag(value: int) -> int:
    """Returns the number as sint32 and sint64 have it."""
    return value * 2 if value >= 0 else -value * 2 - 1


def number(field: int, value: int) -> bytes:
    """Returns a field of an integer, an enumeration or a bool."""
    return varint(field << 3) + varint(value)


def double(field: int, value: float) -> bytes:
    """Returns a field of a double."""
    return varint(field << 3 | 1) + _DOUBLE.pack(value)


def piece(field: int, content: bytes) -> bytes:
    """Returns a field of bytes, of a message or of packed numbers."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def text(field: int, content: str) -> bytes:
    """Returns a field of text."""
    return piece(field, content.encode())
