"""What fallback costs: the share of an inference that passes in operations that are not where they belong.

Every profiled inference gives one share, of its own time, so that a board that has become slower since the
counted inferences does not distort it. The share that is told is the median of these, and its bounds are the
order statistics that enclose the true median with at least 95 % confidence, whatever the distribution
(see :mod:`boardbench.agent.bench.stats`). Seconds are the share of the counted inferences' median.
"""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

from boardbench.agent.bench import stats
from boardbench.agent.domain import FallbackCost

LEAST_INFERENCES = 6
"""Below it the median of a sample has no bounds at 95 %."""


def of_fallback(
    inferences: Sequence[Tuple[float, float]], latency_seconds: float, method: str
) -> Optional[FallbackCost]:
    """The cost by (seconds of it in fallback, seconds of it) for every profiled inference.

    None when there are too few for bounds. ``latency_seconds`` is the median of the counted inferences.
    """
    shares = sorted(min(fallen / whole, 1.0) for fallen, whole in inferences if whole > 0)
    found = stats.bounds("50", len(shares))
    if found is None:
        return None
    share, low, high = (shares[at - 1] for at in (stats.rank("50", len(shares)), *found))
    return FallbackCost(
        share=share,
        share_low=low,
        share_high=high,
        seconds=share * latency_seconds,
        seconds_low=low * latency_seconds,
        seconds_high=high * latency_seconds,
        latency_without_seconds=(1.0 - share) * latency_seconds,
        method=method,
    )
