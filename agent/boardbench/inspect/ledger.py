"""Where the bytes of a file go: every byte is counted once, and the sum is the size of the file."""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple

from boardbench.inspect.report import ByteUse

GRAPH = "graph"
NAMES = "names"
WEIGHTS = "weights"
QUANTISATION = "quantisation"
METADATA = "metadata"
PADDING = "padding"
UNREFERENCED = "unreferenced"

# Longer runs between two claims are looked at in pieces, so that no copy is large.
_PIECE_BYTES = 1 << 20
# What the maker of a report claims: start, stop, purpose, dtype, operation type, elements, zeros.
Claim = Tuple[int, int, str, str, str, Optional[int], Optional[int]]


class Ledger:
    """Collects who uses which bytes; an overlap counts for the claim that begins first.

    ``base`` is what positions are relative to, for a format nested inside another one.
    """

    __slots__ = ("_rest", "base", "claims")

    def __init__(self, claims: Optional[List[Claim]] = None, base: int = 0) -> None:
        self.claims: List[Claim] = [] if claims is None else claims
        self.base = base
        self._rest = ""

    def at(self, start: int) -> "Ledger":
        """The same ledger for a format that is nested at ``start``."""
        return Ledger(self.claims, self.base + start)

    def claim(
        self,
        start: int,
        stop: int,
        purpose: str,
        dtype: str = "",
        op_type: str = "",
        elements: Optional[int] = None,
        zeros: Optional[int] = None,
    ) -> None:
        """Notes that the bytes from ``start`` up to ``stop`` serve the purpose."""
        if stop > start:
            self.claims.append(
                (self.base + start, self.base + stop, purpose, dtype, op_type, elements, zeros)
            )

    def fill(self, purpose: str) -> None:
        """Says what all bytes serve that nobody claims, for formats without gaps."""
        self._rest = purpose

    def uses(self, data: memoryview) -> Tuple[ByteUse, ...]:
        """One entry for each purpose, type and operation, largest first; the sum is ``len(data)``.

        What nobody claimed is padding where it is zero and unreferenced where it is not, unless
        :meth:`fill` was called.
        """
        size = len(data)
        totals: Dict[Tuple[str, str, str], List[Optional[int]]] = {}
        cursor = 0
        gaps = [0, 0]
        # Longest first among those that begin together: a shared or nested table then counts once.
        for start, stop, purpose, dtype, op_type, elements, zeros in sorted(
            self.claims, key=lambda claim: (claim[0], -claim[1])
        ):
            stop = min(stop, size)
            if start > cursor:
                _count_gap(data, cursor, min(start, size), gaps)
                cursor = min(start, size)
            if stop <= cursor:
                continue
            total = totals.setdefault((purpose, dtype, op_type), [0, None, None])
            total[0] = (total[0] or 0) + stop - cursor
            cursor = stop
            if elements is not None:
                total[1] = (total[1] or 0) + elements
            if zeros is not None:
                total[2] = (total[2] or 0) + zeros
        _count_gap(data, cursor, size, gaps)
        purposes = (self._rest, self._rest) if self._rest else (PADDING, UNREFERENCED)
        for purpose, gap in ((purposes[0], gaps[0]), (purposes[1], gaps[1])):
            if gap:
                total = totals.setdefault((purpose, "", ""), [0, None, None])
                total[0] = (total[0] or 0) + gap
        found = [
            ByteUse(purpose, dtype, op_type, size_bytes or 0, zeros, elements)
            for (purpose, dtype, op_type), (size_bytes, elements, zeros) in totals.items()
        ]
        found.sort(key=lambda use: (-use.size_bytes, use.purpose, use.dtype, use.op_type))
        return tuple(found)


def _count_gap(data: memoryview, start: int, stop: int, gaps: List[int]) -> None:
    for begin in range(start, stop, _PIECE_BYTES):
        piece = bytes(data[begin : min(stop, begin + _PIECE_BYTES)])
        zeros = piece.count(0)
        # A run with anything in it is a thing that nothing refers to, its own zeros included.
        gaps[0 if zeros == len(piece) else 1] += len(piece)
