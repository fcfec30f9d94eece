"""When a measurement is precise enough to end: the targets, and the looks at the sample on the way.

A target is reached when the bounds of its percentile lie within its share of the value: ±1 % means that
low >= 0.99 × value and high <= 1.01 × value.

Who looks again and again and stops at the first look that pleases stops too often at samples whose bounds
came out too narrow by chance, and these enclose the truth less often than is said: 93 % instead of 95 for
the p99 of a heavy tail. The bounds themselves stay the exact ones; the rule makes up for it:

- Looks are at counts fixed beforehand, each a quarter more than the last, and none before 64 inferences
  and before every target's percentile is supported at all. A look that cannot please, by what the last one
  saw, is left out.
- Once all targets are reached, half as many inferences again are measured, whatever comes, and the figures
  are those of the whole. The measurement ends if they still reach the targets then. So a third of what is
  reported was not seen by the decision, and the bounds have room. Where neighbours resemble each other it is
  two and a half times as many in all, since how much they do is uncertain, too.
- A dependence among the samples counts from a third less evidence on than in the final figures, so that a
  trace that only may wander is measured longer.

``benchmarks/coverage.py`` measures what comes of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Iterable, List, Optional, Sequence, Tuple

from boardbench.agent.bench import stats
from boardbench.agent.domain import Latency

LEAST_RUNS = 64
"""Of the first look; 96 are then the fewest to end with."""

GROWTH = 1.25
"""From one look to the next: ends at most a quarter late, and a million inferences take some 40 looks."""

CONFIRMATION = 1.5
"""Times the inferences at which the targets were first reached; with 1.25 coverage still fell to 94.5 %."""

CONFIRMATION_DEPENDENT = 2.5
"""The same where neighbours resemble each other: with 1.5 the median of bursts was covered by 93 %."""

DOUBT = 0.65
"""Share of the evidence that the final figures ask for before they take samples for dependent."""

LEAST_RATIO = 0.0001
"""±0.01 %: clocks and boards are no steadier than that, whatever the number of inferences."""

_MOST_RUNS = 1e12  # what is "never": bounds that reach to zero have no ratio

_TARGET = re.compile(r"p?\s*(\d+(?:\.\d+)?)\s*=\s*(?:±\s*)?(\d+(?:\.\d+)?)\s*(%?)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """A percentile, as decimal text, and the share of its value within which its bounds must lie."""

    percentile: str
    ratio: float

    def __str__(self) -> str:
        return f"p{self.percentile}={self.ratio * 100:.6g}%"


@dataclass(frozen=True)
class Reached:
    """How precise a target's percentile is; None where this many inferences support no bounds."""

    target: Target
    ratio: Optional[float]

    @property
    def holds(self) -> bool:
        """Whether the target is reached."""
        return self.ratio is not None and self.ratio <= self.target.ratio


@dataclass(frozen=True)
class Look:
    """What was seen at one look.

    ``over``: the measurement may end. ``runs_needed`` is about how many inferences that will take in all,
    as the width of bounds falls with the root of their number; at least so many where bounds are lacking.
    """

    count: int
    reached: Tuple[Reached, ...]
    over: bool
    runs_needed: int

    def fits(self, most_runs: Optional[int], seconds_left: Optional[float], seconds_a_run: float) -> bool:
        """Whether the targets can be expected before the last run or the end of the time."""
        if most_runs is not None and self.runs_needed > most_runs:
            return False
        return seconds_left is None or (self.runs_needed - self.count) * seconds_a_run <= seconds_left


def parse(text: str) -> Tuple[Target, ...]:
    """Targets from text such as "p50=1%,p99=5%". Raises ValueError, naming the part that is wrong."""
    targets = []
    for part in text.split(","):
        found = _TARGET.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"{part.strip()!r} is no precision; write p50=1% or p50=1%,p99=5%")
        ratio = Fraction(found.group(2)) / (100 if found.group(3) else 1)
        targets.append(target(float(found.group(1)), float(ratio)))
    return check(targets)


def target(percentile: float, ratio: float) -> Target:
    """A target from its numbers. Raises ValueError when they make no sense."""
    if not 0.0 < percentile < 100.0:
        raise ValueError(f"p{percentile:g} is no percentile; it must be above 0 and below 100")
    if not LEAST_RATIO <= ratio < 1.0:
        raise ValueError(
            f"p{percentile:g}={ratio * 100:g}% can't be; it must be {LEAST_RATIO:.2%} at least and below 100%"
        )
    return Target(stats.text(percentile), ratio)


def check(targets: Iterable[Target]) -> Tuple[Target, ...]:
    """The targets in rising order of percentile. Raises ValueError when one is asked for twice."""
    ordered = sorted(targets, key=lambda each: Fraction(each.percentile))
    for place in range(1, len(ordered)):
        first, second = ordered[place - 1], ordered[place]
        if first.percentile == second.percentile:
            raise ValueError(f"p{first.percentile} is asked for twice: {first} and {second}")
    return tuple(ordered)


def reached(latency: Latency, targets: Sequence[Target]) -> Tuple[Reached, ...]:
    """How precise the final figures are."""
    ratios = {
        stats.text(each.percentile): _ratio(each.low_seconds, each.seconds, each.high_seconds)
        for each in latency.percentiles
    }
    return tuple(Reached(each, ratios.get(each.percentile)) for each in targets)


class Sequential:
    """Looks at a growing sample until every target is reached. One for each measurement."""

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        confidence: float = stats.CONFIDENCE,
        least_runs: int = LEAST_RUNS,
    ) -> None:
        if not targets:
            raise ValueError("nothing to reach: give at least one target")
        self._targets = check(targets)
        self._confidence = confidence
        self._least = {
            each.percentile: stats.least_count(each.percentile, confidence) for each in self._targets
        }
        # The middle tells of a dependence before a tail has enough samples to.
        self._percentiles = sorted({"50", *self._least}, key=Fraction)
        self._next = max(least_runs, LEAST_RUNS, *self._least.values())
        self._confirming = False

    @property
    def next_look(self) -> int:
        """Number of inferences at which to look again; never falls."""
        return self._next

    def look(self, samples: Sequence[int]) -> Look:
        """What all samples so far, in the order they ran, say; moves ``next_look`` on.

        To be called once there are ``next_look`` samples; earlier it tells how far things are and decides
        nothing.
        """
        count = len(samples)
        ordered = sorted(samples)
        found = stats.depends(samples, ordered, self._percentiles, doubt=DOUBT)
        seen: List[Reached] = []
        needed = 0.0
        for each in self._targets:
            effective = found.effective_count(each.percentile)
            positions = stats.bounds(each.percentile, count, self._confidence, effective_count=effective)
            if positions is None:
                seen.append(Reached(each, None))
                needed = max(needed, self._least[each.percentile] * count / effective)
                continue
            value = ordered[stats.rank(each.percentile, count) - 1]
            ratio = _ratio(ordered[positions[0] - 1], value, ordered[positions[1] - 1])
            seen.append(Reached(each, ratio))
            needed = max(needed, count * (ratio / each.ratio) ** 2)
        needed = min(needed, _MOST_RUNS)
        # How dependent samples are is itself the less certain, the more they are.
        confirmation = CONFIRMATION_DEPENDENT if found.found else CONFIRMATION
        holds = all(each.holds for each in seen)
        due = count >= self._next
        over = due and holds and self._confirming
        if due and holds and not over:
            self._confirming = True
            self._next = math.ceil(count * confirmation)
        elif due and not over:
            # Halfway, on the scale of the looks, to where it may be reached: nearer it can't be.
            steps = math.log(max(1.0, needed / count) ** 0.5, GROWTH)
            self._next = math.ceil(count * GROWTH ** max(1, int(steps)))
        if over:
            final = count
        elif self._confirming:
            final = max(self._next, math.ceil(needed))
        else:
            final = max(self._next, math.ceil(needed * confirmation))
        return Look(count, tuple(seen), over, final)


def _ratio(low: float, value: float, high: float) -> float:
    """Half-width of the bounds as a share of the value: the greater of the two sides."""
    if value <= 0:
        return 0.0 if low == high else math.inf
    return max(high / value - 1.0, 1.0 - low / value)
