"""What every store does alike when old results are made smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


KEPT = (
    "(results.arrival = (SELECT MAX(arrival) FROM results) OR EXISTS (SELECT 1 FROM series"
    " WHERE series.device_id = results.device_id AND series.arrival = results.arrival))"
)
"""What is never removed: where the order of arrival ends, and the latest measurement of each series."""


def removable(
    ask: Callable[[str, Sequence[Any]], list[tuple[Any, ...]]],
    *,
    received_before: float | None,
    per_series: int | None,
    limit: int,
) -> list[int]:
    """Returns the arrivals of results to remove, in their order; see ``ResultStore.remove``.

    ``ask`` returns all rows that answer a question, in which ``?`` stands for each of the values.
    """
    chosen: list[int] = []
    last = 0
    while received_before is not None and len(chosen) < limit:
        # By arrival, because there is no order by age; what stays for ever is as long as the series.
        rows = ask(
            f"SELECT arrival, received, {KEPT} FROM results WHERE arrival > ? ORDER BY arrival LIMIT 500",
            (last,),
        )
        chosen += [arrival for arrival, received, kept in rows if received < received_before and not kept]
        if not rows or rows[-1][1] >= received_before:
            break
        last = rows[-1][0]
    if per_series is not None and len(chosen) < limit:
        for (series,) in ask(
            "SELECT series_id FROM results GROUP BY series_id HAVING COUNT(*) > ?", (per_series,)
        ):
            later = ask(
                f"SELECT arrival, {KEPT} FROM results WHERE series_id = ?"
                " ORDER BY arrival DESC LIMIT ? OFFSET ?",
                (series, limit, per_series),
            )
            chosen += [arrival for arrival, kept in later if not kept]
            if len(chosen) >= limit:
                break
    return sorted(set(chosen))[:limit]
