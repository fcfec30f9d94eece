"""What every store does alike when old results are made smaller."""

from __future__ import annotations

from boardbench.collector.store import Removed
from boardbench.collector.thinning import thinned_record

_BYTES = 16 * 1024 * 1024
"""A transaction rewrites no more than about this, so that results that come in do not wait for it."""


class Thinning:
    """Results in the order of their arrival, and what is to become of them."""

    def __init__(self, begin: int, received_before: float) -> None:
        self.begin = self.end = begin
        """Everything up to here has been looked at."""
        self.changes: list[tuple[bytes, bytes, int]] = []
        """(summary, detail, arrival) of those that change."""
        self._received_before = received_before
        self._seen = self._samples = self._saved = self._read = 0
        self._full = False

    def take(self, arrival: int, received: float, summary: bytes, detail: bytes) -> bool:
        """Looks at the next one; False: it and all behind it are for another time."""
        if received >= self._received_before:
            return False
        if self._read > _BYTES:
            self._full = True
            return False
        self._seen += 1
        self._read += len(summary) + len(detail)
        self.end = arrival
        (head, tail), samples = thinned_record((summary, detail))
        if samples:
            self.changes.append((head, tail, arrival))
            self._samples += samples
            self._saved += len(summary) + len(detail) - len(head) - len(tail)
        return True

    def removed(self, limit: int) -> Removed:
        """Returns what that makes; ``limit`` is how many were asked for."""
        more = self._full or self._seen == limit
        return Removed(len(self.changes), self._samples, self._saved, more)
