"""Counts of elements and zeros in constant data, a megabyte at a time and never a Python step each."""

from __future__ import annotations

from typing import Dict, Optional

# NumPy's name of an element type → its size in bits. Types without a fixed size are not here.
BITS: Dict[str, int] = {
    "bool": 8,
    "int2": 2,
    "int4": 4,
    "uint2": 2,
    "uint4": 4,
    "int8": 8,
    "uint8": 8,
    "int16": 16,
    "uint16": 16,
    "int32": 32,
    "uint32": 32,
    "int64": 64,
    "uint64": 64,
    "float4_e2m1fn": 4,
    "float8_e4m3fn": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2": 8,
    "float8_e5m2fnuz": 8,
    "float8_e8m0fnu": 8,
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
    "float64": 64,
    "complex64": 64,
    "complex128": 128,
}
# Interpreters lay tensors out at multiples of this (TensorFlow Lite's kDefaultTensorAlignment).
_ALIGNMENT_BYTES = 64
# A multiple of every element size.
_PIECE_BYTES = 1 << 16
# Clears the sign, so that a floating point -0.0 counts as the zero it is.
_UNSIGNED = bytes(value & 0x7F for value in range(256))
_ZERO_NIBBLES = bytes((value & 0x0F == 0) + (value >> 4 == 0) for value in range(256))
_ZERO_PAIRS = bytes(sum((value >> shift) & 3 == 0 for shift in (0, 2, 4, 6)) for value in range(256))
# Types whose most significant byte holds a sign of zero. E5M2 and E4M3 have one too, the "fnuz" types don't.
_SIGNED_BYTE = frozenset(("float8_e4m3fn", "float8_e5m2"))
_SIGNED_ZERO = frozenset(("float16", "bfloat16", "float32", "float64", "complex64", "complex128"))


def element_count(size_bytes: int, dtype: str) -> Optional[int]:
    """How many elements of the type fill that many bytes; None for types without a fixed size."""
    bits = BITS.get(dtype)
    return None if bits is None else size_bytes * 8 // bits


def aligned_bytes(count: int, bits: int) -> int:
    """Bytes that so many elements of so many bits take in an interpreter's memory."""
    size = (count * bits + 7) // 8
    return (size + _ALIGNMENT_BYTES - 1) // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES


def count_zeros(data: memoryview, dtype: str, zero_point: int = 0) -> Optional[int]:
    """How many of the elements are zero; None for types without a fixed size.

    ``zero_point`` is the stored value that stands for zero in quantised data; it is only looked at for
    types of 8 bits.
    """
    bits = BITS.get(dtype)
    if bits is None:
        return None
    if len(data) <= _PIECE_BYTES:
        whole = bytes(data)
        return whole.count(zero_point & 0xFF) if bits == 8 and zero_point else _zeros_in(whole, bits, dtype)
    pieces = (bytes(data[start : start + _PIECE_BYTES]) for start in range(0, len(data), _PIECE_BYTES))
    if bits == 8 and zero_point:
        return sum(piece.count(zero_point & 0xFF) for piece in pieces)
    return sum(_zeros_in(piece, bits, dtype) for piece in pieces)


def _zeros_in(piece: bytes, bits: int, dtype: str) -> int:
    if bits == 8:
        return (piece.translate(_UNSIGNED) if dtype in _SIGNED_BYTE else piece).count(0)
    if bits < 8:
        counts = piece.translate(_ZERO_NIBBLES if bits == 4 else _ZERO_PAIRS)
        return sum(times * counts.count(times) for times in range(1, 8 // bits + 1))
    width = bits // 8
    if piece.count(0) == 0:
        return 0
    whole = len(piece) // width * width
    # An element is zero where the bitwise or of its bytes is: each byte position is one long integer.
    joined = 0
    for position in range(width):
        column = piece[position:whole:width]
        part = width // 2 if dtype.startswith("complex") else width
        if dtype in _SIGNED_ZERO and position % part == part - 1:
            column = column.translate(_UNSIGNED)
        joined |= int.from_bytes(column, "little")
    return joined.to_bytes(whole // width, "little").count(0)
