"""Single-stream and multi-stream: the next call is made when the last one has returned."""

from __future__ import annotations

from array import array
from itertools import repeat
from typing import Optional

from boardbench.agent.bench import measure, stats, throughput
from boardbench.agent.bench.scenarios.terms import Call, Run, Terms, Told, silent
from boardbench.agent.domain import ScenarioKind, ScenarioResult, Stage


class SingleStream:
    """One inference after the other."""

    def __init__(self, call: Call, terms: Terms) -> None:
        """``call`` is the timed one, as it is."""
        self._call = call
        self._terms = terms

    def measure(self) -> Run:
        """Counts inferences."""
        return self._counted(1, None)

    def fill(self, told: Told) -> None:
        """Infers until told."""
        fill(self._call, told, self._terms)

    def _counted(self, inferences: int, kind: Optional[ScenarioKind]) -> Run:
        terms = self._terms
        counted = measure.measure(
            self._call,
            terms.bounds,
            terms.report,
            progress_seconds=terms.progress_seconds,
            clock=terms.clock,
            looks=terms.looks,
        )
        result = None
        if kind is not None:
            found = throughput.one_after_the_other(counted.samples, inferences, terms.confidence)
            result = ScenarioResult(
                kind=kind,
                throughput_hertz=found.hertz,
                throughput_low_hertz=found.low_hertz,
                throughput_high_hertz=found.high_hertz,
            )
        return Run(
            samples=counted.samples,
            usage=counted.usage,
            reason=counted.reason,
            inferences=inferences * len(counted.samples),
            inference_nanoseconds=stats.median(counted.samples) // inferences,
            engine_wall_seconds=counted.usage.wall_seconds,
            engine_cpu_seconds=counted.usage.cpu_seconds,
            result=result,
        )


class MultiStream(SingleStream):
    """Queries of several samples, one query after the other: what is timed is a whole query."""

    def __init__(self, call: Call, terms: Terms, samples: int) -> None:
        """A query has so many ``samples``, which one instance of the model computes one after the other."""

        def query() -> None:
            for _ in repeat(None, samples):
                call()

        super().__init__(query, terms)
        self._samples = samples

    def measure(self) -> Run:
        """Counts queries."""
        return self._counted(self._samples, ScenarioKind.MULTI_STREAM)


def fill(call: Call, told: Told, terms: Terms) -> array[int]:
    """Calls until told; the samples are not kept."""
    return measure.loop(
        Stage.MEASURE,
        call,
        measure.UntilTold(told),
        silent,
        progress_seconds=terms.progress_seconds,
        clock=terms.clock,
    )
