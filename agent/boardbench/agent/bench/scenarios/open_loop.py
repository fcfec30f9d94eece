"""Periodic and Poisson: inferences are due at times of their own, whether or not the last one is done.

Latency counts from the intended start. A loop that waits for an answer before it asks again skips just those
inferences that a stall would have hit, and so hides it ("coordinated omission", Gil Tene, How NOT to measure
latency, 2013); here they queue, as frames of a camera do, and the time in the queue is part of their latency.

An intended start is met by sleeping until shortly before it and then watching the clock: timers are late by
some 0.05 to 1 ms. What this keeps of a processor's time is not counted as the model's. The loop has time for
other things (progress, looks at the precision) only when nothing is due soon.
"""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Iterable, Iterator, List, Tuple

from boardbench.agent.bench import doubts, measure, stats
from boardbench.agent.bench.scenarios.terms import Call, Run, Terms, Told
from boardbench.agent.domain import Scenario, ScenarioKind, ScenarioResult, Stage, StopReason, Warning

SPIN_NANOSECONDS = 1_000_000
"""Sleep ends so long before an intended start: more than the timers of an ordinary kernel are late."""

ROOM_NANOSECONDS = 2_000_000
"""Time to the next intended start in which progress can be told: ten times what it takes."""

LEAD_NANOSECONDS = 5_000_000
"""From the decision to begin to the first intended start."""

PATIENCE = 2.0
"""An inference that begins later than this many times the duration ends it: the queue only grows."""

MOST_PATIENCE_SECONDS = 30.0


def periodic(rate_hertz: float) -> Iterator[int]:
    """Intended starts in nanoseconds after the first, without end; no error adds up."""
    return (round(number * 1e9 / rate_hertz) for number in count())


def poisson(rate_hertz: float, seed: int) -> Iterator[int]:
    """Intended starts of a Poisson process in nanoseconds, without end; equal seeds give equal ones."""
    # Its own stream: that of the input data begins with the same seed.
    source = random.Random(f"boardbench arrivals {seed}")
    now = 0.0
    while True:
        # -log(1 - u) has the exponential distribution; u is below 1, so there is no logarithm of 0.
        now -= math.log(1.0 - source.random()) / rate_hertz
        yield round(now * 1e9)


@dataclass
class _Served:
    """What was done with the inferences that were due, in order."""

    latencies: array[int]
    services: array[int]
    spun: int = 0
    precise: bool = False


class OpenLoop:
    """Asks for inferences at intended times; one instance serves them in their order."""

    def __init__(self, call: Call, terms: Terms, scenario: Scenario, seed: int) -> None:
        """``scenario`` has its rate and deadline."""
        assert scenario.rate_hertz is not None and scenario.deadline_seconds is not None
        self._call = call
        self._terms = terms
        self._kind = scenario.kind
        self._rate = scenario.rate_hertz
        self._deadline = scenario.deadline_seconds
        self._seed = seed

    def measure(self) -> Run:
        """Counts inferences whose intended start lies in the measured time, until the last is done."""
        terms = self._terms
        intended, reason = self._plan()
        served, usage = measure.observed(lambda: self._serve(intended), terms.clock)
        working = sum(served.services) / 1e9
        if served.precise:
            reason = StopReason.PRECISION
        elif len(served.latencies) < len(intended):
            reason = StopReason.DURATION
        result, warnings = self._judge(intended, served)
        return Run(
            samples=served.latencies,
            # Waiting for a processor was mostly waiting to be woken up.
            usage=replace(usage, queued_seconds=None),
            reason=reason,
            inferences=len(served.latencies),
            inference_nanoseconds=stats.median(served.services),
            engine_wall_seconds=working,
            engine_cpu_seconds=max(0.0, usage.cpu_seconds - served.spun / 1e9),
            result=result,
            service=served.services,
            warnings=tuple(warnings),
        )

    def fill(self, told: Told) -> None:
        """Infers at intended times until told."""

        def untold() -> Iterator[int]:
            for offset in self._arrivals():
                if told():
                    return
                yield offset

        self._serve(untold(), counted=False)

    def _arrivals(self) -> Iterator[int]:
        if self._kind is ScenarioKind.PERIODIC:
            return periodic(self._rate)
        return poisson(self._rate, self._seed)

    def _plan(self) -> Tuple[array[int], StopReason]:
        """The intended starts that are to be measured, and what bounds them."""
        bounds = self._terms.bounds
        seconds = bounds.seconds
        if self._terms.looks is not None and bounds.most_seconds is not None:
            seconds = max(seconds, bounds.most_seconds)
        end = int(seconds * 1e9)
        intended = array("Q")
        for offset in self._arrivals():
            if len(intended) == bounds.most_runs:
                return intended, StopReason.RUNS
            if offset >= end and len(intended) >= bounds.least_runs:
                break
            intended.append(offset)
        return intended, StopReason.RUNS if intended[-1] >= end else StopReason.DURATION

    def _serve(self, intended: Iterable[int], *, counted: bool = True) -> _Served:
        call, clock = self._call, self._terms.clock
        served = _Served(array("Q"), array("Q"))
        latencies, services = served.latencies, served.services
        length = intended[-1] / 1e9 if isinstance(intended, array) else 0.0
        patience = min(PATIENCE * max(length, self._terms.bounds.seconds), MOST_PATIENCE_SECONDS) * 1e9
        least = self._terms.bounds.least_runs
        begin = clock() + LEAD_NANOSECONDS
        planned = len(intended) if isinstance(intended, array) else 0
        between = _Between(self._terms, latencies, begin, planned)
        for offset in intended:
            due = begin + offset
            now = clock()
            if now < due:
                if counted and between.look(now, due):
                    served.precise = True
                    break
                served.spun += self._wait(due)
            elif counted and now >= between.overdue:
                between.tell(now)
            start = clock()
            call()
            end = clock()
            latencies.append(end - due)
            services.append(end - start)
            if not counted:
                del latencies[:], services[:]
            elif start - due > patience and len(latencies) >= least:
                break
        if counted:
            between.tell(clock(), over=True)
        return served

    def _wait(self, due: int) -> int:
        """Returns at ``due``, or as soon after as the system lets it; nanoseconds of watching the clock."""
        clock = self._terms.clock
        left = due - clock()
        if left > SPIN_NANOSECONDS:
            self._terms.sleep((left - SPIN_NANOSECONDS) / 1e9)
        awake = now = clock()
        while now < due:
            now = clock()
        return now - awake

    def _judge(self, intended: array[int], served: _Served) -> Tuple[ScenarioResult, List[Warning]]:
        latencies, services, deadline = served.latencies, served.services, int(self._deadline * 1e9)
        misses = sum(latency > deadline for latency in latencies)
        delays = _delays(intended, latencies, services)
        # To the last end, or until the next one would have been due: a hundred at 100 Hz take no 0.99 s.
        following = next(islice(self._arrivals(), len(latencies), None))
        ended = max(intended[len(latencies) - 1] + latencies[-1], following)
        result = ScenarioResult(
            kind=self._kind,
            throughput_hertz=len(latencies) / (ended / 1e9),
            deadline_seconds=self._deadline,
            deadline_misses=misses,
            most_waiting=_most_waiting(intended, latencies),
            worst_start_delay_seconds=max(delays) / 1e9,
        )
        return result, [*self._overload(intended, served), *self._late(delays, latencies)]

    def _overload(self, intended: array[int], served: _Served) -> Iterator[Warning]:
        thresholds = self._terms.thresholds
        services = served.services
        mean = sum(services) / len(services) / 1e9
        utilisation = mean * self._rate
        if utilisation < thresholds.utilisation_ratio or utilisation <= 0:
            return
        left = 0 if served.precise else len(intended) - len(services)
        first, last = served.latencies[0] / 1e9, served.latencies[-1] / 1e9
        seen = (
            f"{self._rate:g} inferences a second were asked for and the board keeps {1 / mean:.3g}: one "
            f"takes {mean * 1e3:.3g} ms and the next is due after {1e3 / self._rate:.3g} ms, so the queue "
            f"grows, and the latency went from {first * 1e3:.3g} to {last * 1e3:.3g} ms"
        )
        if left > 0:
            seen += f"; {left} that were due were not begun any more"
        yield doubts.warn(
            "overloaded",
            seen,
            evidence={
                "rate_hertz": self._rate,
                "capacity_hertz": 1 / mean,
                "utilisation_ratio": utilisation,
                "limit_ratio": thresholds.utilisation_ratio,
                "inferences_left": left,
            },
        )

    def _late(self, delays: List[int], latencies: array[int]) -> Iterator[Warning]:
        limit = self._terms.thresholds.start_delay_ratio * stats.median(latencies)
        late = sorted(delays)[stats.rank("95", len(delays)) - 1]
        if late > limit:
            yield doubts.warn(
                "late_starts",
                f"one inference of twenty was begun {late / 1e6:.3g} ms later than intended though "
                "nothing waited",
                evidence={"start_delay_seconds": late / 1e9, "limit_seconds": limit / 1e9},
            )


class _Between:
    """What is done between inferences, where there is time for it."""

    def __init__(self, terms: Terms, latencies: array[int], begin: int, planned: int) -> None:
        self._terms = terms
        self._latencies = latencies
        self._begin = begin
        self._planned = planned
        self._step = int(terms.progress_seconds * 1e9)
        self._told = begin
        self._look_cost = 0
        self.overdue = begin + 4 * self._step
        """When progress is told though something waits: a little later than usual, lest it never is."""

    def look(self, now: int, due: int) -> bool:
        """Uses the time to the next intended start; whether the measurement is precise enough to end."""
        room = due - now
        if now >= self.overdue or (now >= self._told + self._step and room > ROOM_NANOSECONDS):
            self.tell(now)
        looks, bounds = self._terms.looks, self._terms.bounds
        if (
            looks is None
            or len(self._latencies) < max(looks.next_look, bounds.least_runs)
            or due - self._begin < bounds.seconds * 1e9
            or room < max(ROOM_NANOSECONDS, 4 * self._look_cost)
        ):
            return False
        before = self._terms.clock()
        precise = looks.look(self._latencies)
        self._look_cost = self._terms.clock() - before
        return precise

    def tell(self, now: int, *, over: bool = False) -> None:
        """Tells the progress."""
        elapsed = max(0, now - self._begin) / 1e9
        fraction = 1.0 if over else self._fraction()
        self._terms.report(measure.progress(Stage.MEASURE, self._latencies, elapsed, fraction))
        self._told = self._terms.clock()
        self.overdue = self._told + 4 * self._step

    def _fraction(self) -> float:
        """Of the intended starts, or how near the precision is."""
        runs = len(self._latencies)
        done = runs / self._planned if self._planned else 1.0
        looks = self._terms.looks
        return max(done, looks.fraction(runs) or 0.0) if looks is not None else done


def _delays(intended: array[int], latencies: array[int], services: array[int]) -> List[int]:
    """How late the loop began those that had not to wait."""
    delays = []
    free = 0
    for offset, latency, service in zip(intended, latencies, services):
        if free <= offset:
            delays.append(latency - service)
        free = offset + latency
    return delays


def _most_waiting(intended: array[int], latencies: array[int]) -> int:
    """Most that were due and not yet begun, which is when an inference ends."""
    most = due = 0
    for begun, (offset, latency) in enumerate(zip(intended, latencies), start=1):
        end = offset + latency
        while due < len(intended) and intended[due] <= end:
            due += 1
        most = max(most, due - begun)
    return most
