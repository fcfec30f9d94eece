"""Where the bytes of a file go: every byte is counted once, and the sum is the size of the file."""

from __future__ import annotations

import mmap
import re
from typing import Dict, List, Optional, Tuple

from boardbench.inspect.budget import Budget
from boardbench.inspect.report import ByteUse

GRAPH = "graph"
NAMES = "names"
WEIGHTS = "weights"
QUANTISATION = "quantisation"
METADATA = "metadata"
OPTIONS = "operator options"
PADDING = "padding"
UNREFERENCED = "unreferenced"

# Longer runs between two claims are looked at in pieces, so that no copy is large.
_PIECE_BYTES = 1 << 20
_UNMARKED = re.compile(rb"\0+")
_UNMARKED_BITS = b"\xff" + bytes(255)
# Between two parts that did not lie side by side: no purpose has this number.
_SEAM = 0xFF

# Purpose, dtype, operation type.
Kind = Tuple[str, str, str]
# Start, minus stop, number of the claim, kind, elements, zeros: sorted, the longest of those that begin
# together comes first, and the first among equals.
_Claim = Tuple[int, int, int, Kind, Optional[int], Optional[int]]


class _Pages:
    """What all ledgers of one file share."""

    __slots__ = ("budget", "claims", "marks", "noted", "purposes", "rest")

    def __init__(self, budget: Optional[Budget]) -> None:
        self.budget = budget
        self.claims: List[_Claim] = []
        self.noted: Dict[Kind, List[Optional[int]]] = {}
        self.marks: Optional[mmap.mmap] = None
        self.purposes: List[str] = [""]
        self.rest = ""


class Ledger:
    """Collects who uses which bytes.

    Content is claimed (:meth:`claim`), a run at a time; where claims overlap, a byte counts for the one that
    begins first. The small pieces of a graph, of which a file may have half a million, are marked byte by
    byte in a map as long as the file (:meth:`marks`); a claim stands over a mark, and a mark over an earlier
    one. ``base`` is what positions are relative to, for a format nested inside another one.
    """

    __slots__ = ("_pages", "base")

    def __init__(
        self, budget: Optional[Budget] = None, *, base: int = 0, pages: Optional[_Pages] = None
    ) -> None:
        self._pages = _Pages(budget) if pages is None else pages
        self.base = base

    def budget(self, size_bytes: int, format: str = "") -> Budget:
        """How much work is left; a new one for a file of this size and format when none was given."""
        if self._pages.budget is None:
            self._pages.budget = Budget(size_bytes, format)
        return self._pages.budget

    def at(self, start: int) -> "Ledger":
        """The same ledger for a format that is nested at ``start``."""
        return Ledger(base=self.base + start, pages=self._pages)

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
            claims = self._pages.claims
            kind = (purpose, dtype, op_type)
            claims.append((self.base + start, -self.base - stop, len(claims), kind, elements, zeros))

    def note(
        self,
        size_bytes: int,
        purpose: str,
        dtype: str = "",
        op_type: str = "",
        elements: Optional[int] = None,
        zeros: Optional[int] = None,
    ) -> None:
        """Notes how many bytes serve the purpose, wherever they are.

        For formats in which no two things share a byte, and nothing is visited twice; what is left belongs
        to what :meth:`fill` says.
        """
        noted = self._pages.noted.get((purpose, dtype, op_type))
        if noted is None:
            noted = self._pages.noted[purpose, dtype, op_type] = [0, None, None]
        _add(noted, size_bytes, elements, zeros)

    def marks(self, size_bytes: int) -> mmap.mmap:
        """The map of what is marked, for whoever reads the next ``size_bytes`` from ``base`` on.

        Whoever marks writes the number of a purpose into it, for each byte, and never beyond its end.
        """
        pages = self._pages
        end = max(1, self.base + size_bytes)
        if pages.marks is None or end > len(pages.marks):
            # Memory of its own kind: of a large file, only the pages where something is marked take any.
            grown = mmap.mmap(-1, end)
            if pages.marks is not None:
                grown[: len(pages.marks)] = pages.marks[:]
            pages.marks = grown
        return pages.marks

    def number(self, purpose: str) -> int:
        """What a purpose is in the map; there are few of them, and none comes from a file."""
        purposes = self._pages.purposes
        if purpose not in purposes:
            purposes.append(purpose)
        return purposes.index(purpose)

    def claimed_up_to(self) -> int:
        """Where the last claim or mark ends."""
        pages = self._pages
        end = max((-claim[1] for claim in pages.claims), default=0)
        # Marks before the last claim's end don't matter.
        for start in range(0 if pages.marks is None else len(pages.marks), end, -_PIECE_BYTES):
            first = max(end, start - _PIECE_BYTES)
            marked = pages.marks[first:start].rstrip(b"\0") if pages.marks is not None else b""
            if marked:
                return first + len(marked)
        return end

    def fill(self, purpose: str) -> None:
        """Says what all bytes serve that nobody claims, for formats without gaps."""
        self._pages.rest = purpose

    def uses(self, data: memoryview) -> Tuple[ByteUse, ...]:
        """One entry for each purpose, type and operation, largest first; the sum is ``len(data)``.

        What nobody claimed is padding where it is zero and unreferenced where it is not, unless
        :meth:`fill` was called.
        """
        size = len(data)
        totals = {kind: [*noted] for kind, noted in self._pages.noted.items()}
        gaps: List[Tuple[int, int]] = []
        cursor = 0
        for start, negative, _, kind, elements, zeros in sorted(self._pages.claims):
            if start > cursor:
                if start >= size:
                    break
                gaps.append((cursor, start))
                cursor = start
            stop = min(-negative, size)
            if stop <= cursor:
                continue
            total = totals.get(kind)
            if total is None:
                total = totals[kind] = [0, None, None]
            _add(total, stop - cursor, elements, zeros)
            cursor = stop
        if cursor < size:
            gaps.append((cursor, size))
        for purpose, size_bytes in self._between(data, gaps).items():
            total = totals.setdefault((purpose, "", ""), [0, None, None])
            total[0] = (total[0] or 0) + size_bytes
        found = [
            ByteUse(purpose, dtype, op_type, size_bytes or 0, zeros, elements)
            for (purpose, dtype, op_type), (size_bytes, elements, zeros) in totals.items()
            if size_bytes
        ]
        found.sort(key=lambda use: (-use.size_bytes, use.purpose, use.dtype, use.op_type))
        return tuple(found)

    def _between(self, data: memoryview, gaps: List[Tuple[int, int]]) -> Dict[str, int]:
        """What the bytes serve that nobody claimed: by their marks, or by what they are."""
        pages = self._pages
        found: Dict[str, int] = {}
        if pages.noted:
            somewhere = sum(noted[0] or 0 for noted in pages.noted.values())
            return {pages.rest: sum(stop - start for start, stop in gaps) - somewhere}
        marked = pages.marks
        if marked is None:
            for start, stop in gaps:
                _count_unmarked(data[start:stop], pages.rest, found)
            return found
        marks = bytes((_SEAM,)).join(marked[start:stop] for start, stop in gaps)
        for number, purpose in enumerate(pages.purposes):
            if number:
                # To find the first and the last is much faster than to count.
                first, last = marks.find(number), marks.rfind(number)
                size_bytes = marks.count(number, first, last + 1) if first >= 0 else 0
                if size_bytes:
                    found[purpose] = found.get(purpose, 0) + size_bytes
        # What is behind the map is not marked, and is looked at last.
        content = bytes((_SEAM,)).join(data[start : min(stop, len(marked))] for start, stop in gaps)
        # Mostly all of it is padding, which is seen at once; a step for each run takes much longer.
        unmarked = int.from_bytes(marks.translate(_UNMARKED_BITS), "little")
        if pages.rest or not unmarked & int.from_bytes(content, "little"):
            size_bytes = marks.count(0)
            if size_bytes:
                found[pages.rest or PADDING] = found.get(pages.rest or PADDING, 0) + size_bytes
        else:
            for run in _UNMARKED.finditer(marks):
                _count_unmarked(memoryview(content)[run.start() : run.end()], "", found)
        for start, stop in gaps:
            _count_unmarked(data[max(start, len(marked)) : stop], pages.rest, found)
        return found


def _add(total: List[Optional[int]], size_bytes: int, elements: Optional[int], zeros: Optional[int]) -> None:
    total[0] = (total[0] or 0) + size_bytes
    if elements is not None:
        total[1] = (total[1] or 0) + elements
    if zeros is not None:
        total[2] = (total[2] or 0) + zeros


def _count_unmarked(run: memoryview, rest: str, found: Dict[str, int]) -> None:
    """Counts a run that nobody refers to: as padding when it is all zero, its zeros too when it is not."""
    for start in range(0, len(run), _PIECE_BYTES):
        piece = bytes(run[start : start + _PIECE_BYTES])
        purpose = rest or (PADDING if piece.count(0) == len(piece) else UNREFERENCED)
        found[purpose] = found.get(purpose, 0) + len(piece)
