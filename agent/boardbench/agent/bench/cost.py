"""What fallback costs: the time of an inference that passes in operations that are not where they belong.

The profiled inferences are others than the counted ones, and a board may have become slower or busier between
them. There are two ways to carry over what was seen:

- by *share*: the share of a profiled inference is the share of a counted one. Right where whatever slowed
  the board down slowed everything;
- by *rest*: the accelerator took as long in the counted inferences as in the profiled ones, and fallback is
  what is left. Right where the accelerator is hardware of its own, which other work on the processor does not
  disturb.

The second is told for an accelerator of its own whose parts were timed by themselves, else the first. Either
is a median, and its bounds are the order statistics that enclose the true median with at least 95 %
confidence, whatever the distribution (see :mod:`boardbench.agent.bench.stats`). They are widened so that they
hold another way as well (the share beside the rest, the profile's own seconds beside the share): where the
passes differ, they are wide.
"""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

from boardbench.agent.bench import stats
from boardbench.agent.domain import FallbackCost

LEAST_INFERENCES = 6
"""Below it the median of a sample has no bounds at 95 %."""


def of_fallback(
    inferences: Sequence[Tuple[float, float]], latency_seconds: float, method: str, *, by_rest: bool
) -> Optional[FallbackCost]:
    """The cost by (seconds of it in fallback, seconds of it) for every profiled inference.

    None when there are too few for bounds. ``latency_seconds`` is the median of the counted inferences.
    """
    timed = [(fallen, whole) for fallen, whole in inferences if whole > 0]
    share = _median([fallen / whole * latency_seconds for fallen, whole in timed])
    rest = _median([latency_seconds - (whole - fallen) for fallen, whole in timed])
    seen = _median([fallen for fallen, _ in timed])
    if share is None or rest is None or seen is None:
        return None
    found, beside = (rest, share) if by_rest else (share, seen)
    seconds, low, high = (
        min(max(each, 0.0), latency_seconds)
        for each in (found[0], min(found[1], beside[1]), max(found[2], beside[2]))
    )
    return FallbackCost(
        share=seconds / latency_seconds,
        share_low=low / latency_seconds,
        share_high=high / latency_seconds,
        seconds=seconds,
        seconds_low=low,
        seconds_high=high,
        latency_without_seconds=latency_seconds - seconds,
        method=f"{method}, {'counted median less the accelerator' if by_rest else 'median share'}",
    )


def _median(values: Sequence[float]) -> Optional[Tuple[float, float, float]]:
    """The median and its bounds; None where there are none."""
    bounds = stats.bounds("50", len(values))
    if bounds is None:
        return None
    ordered = sorted(values)
    return ordered[stats.rank("50", len(values)) - 1], ordered[bounds[0] - 1], ordered[bounds[1] - 1]
