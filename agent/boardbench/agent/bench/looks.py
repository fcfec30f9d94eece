"""Looks at the samples while they come: what a timed loop asks of :mod:`boardbench.agent.bench.stopping`."""

from __future__ import annotations

import math
from array import array
from typing import Optional, Sequence, Tuple

from boardbench.agent.bench import stopping
from boardbench.agent.bench.stopping import Target
from boardbench.agent.domain import Latency, PrecisionReached


class PrecisionLooks:
    """Ends a loop when every target is reached; a :class:`~boardbench.agent.bench.measure.Looks`."""

    def __init__(self, targets: Sequence[Target], *, confidence: float, least_runs: int) -> None:
        """Before ``least_runs`` there is no look."""
        self._sequential = stopping.Sequential(targets, confidence=confidence, least_runs=least_runs)
        self._needed: Optional[int] = None

    @property
    def next_look(self) -> int:
        """Number of samples from which on the next look is due."""
        return self._sequential.next_look

    def look(self, samples: array[int]) -> bool:
        """Whether the measurement may end."""
        seen = self._sequential.look(samples)
        self._needed = seen.runs_needed
        return seen.over

    def fraction(self, runs: int) -> Optional[float]:
        """Of the number of inferences that the last look took for necessary."""
        return None if self._needed is None else runs / max(1, self._needed)


def reached(latency: Latency, targets: Sequence[Target]) -> Tuple[PrecisionReached, ...]:
    """How precise the final figures are, by target."""
    return tuple(
        PrecisionReached(
            percentile=float(each.target.percentile),
            asked_ratio=each.target.ratio,
            # Bounds around a value of zero have no ratio to it.
            reached_ratio=None if each.ratio is None or math.isinf(each.ratio) else each.ratio,
        )
        for each in stopping.reached(latency, targets)
    )
