"""Messages of protocol buffers, piece by piece."""

from __future__ import annotations


def varint(value: int) -> bytes:
    """A number on the wire."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(number: int, value: int) -> bytes:
    """A field of a number."""
    return varint(number << 3) + varint(value)
