"""Offline: all the work is there at once, and instances of the model side by side work through it.

Each instance has a thread of its own; engines give up Python's global lock while they compute. What counts is
the throughput while all of them work; the latency is that of one call.
"""

from __future__ import annotations

import heapq
import threading
import time
from array import array
from dataclasses import dataclass, field, replace
from typing import Optional, Sequence, Union

from boardbench.agent.bench import measure, stats, throughput
from boardbench.agent.bench.scenarios.terms import Call, Run, Terms, Told
from boardbench.agent.domain import ScenarioKind, ScenarioResult, Stage, StopReason

LEAST_WAIT_SECONDS = 0.05
"""Between two looks at the instances: each takes Python's global lock for a moment."""


@dataclass
class _Stream:
    """What one instance did."""

    call: Call
    begins: array[int] = field(default_factory=lambda: array("Q"))
    ends: array[int] = field(default_factory=lambda: array("Q"))
    error: Optional[BaseException] = None


class Offline:
    """Instances of a model that work side by side."""

    def __init__(self, calls: Sequence[Call], terms: Terms, samples_in_call: int) -> None:
        """A call each for the instances; one computes so many samples (the batch)."""
        self._calls = calls
        self._terms = terms
        self._samples = samples_in_call

    def measure(self) -> Run:
        """Counts calls of all instances, each for the whole duration and its share of the numbers."""
        terms = self._terms
        streams = [_Stream(call) for call in self._calls]
        count = _Count(terms, streams)
        _, usage = measure.observed(lambda: self._together(streams, count), terms.clock)
        calls = [(stream.begins, stream.ends) for stream in streams]
        found = throughput.of_streams(calls, self._samples, terms.confidence)
        ended = heapq.merge(*(zip(ends, begins) for begins, ends in calls))
        samples = array("Q", (end - begin for end, begin in ended))
        return Run(
            samples=samples,
            # The thread that waited for the others is not the one that is asked about.
            usage=replace(usage, queued_seconds=None),
            reason=StopReason.RUNS if count.ended_by_number() else StopReason.DURATION,
            inferences=len(samples),
            inference_nanoseconds=stats.median(samples),
            engine_wall_seconds=usage.wall_seconds,
            engine_cpu_seconds=usage.cpu_seconds,
            one_by_one=len(streams) == 1,
            result=ScenarioResult(
                kind=ScenarioKind.OFFLINE,
                throughput_hertz=None if found is None else found.hertz,
                throughput_low_hertz=None if found is None else found.low_hertz,
                throughput_high_hertz=None if found is None else found.high_hertz,
            ),
        )

    def fill(self, told: Told) -> None:
        """All instances infer until told."""
        self._together([_Stream(call) for call in self._calls], _Fill(told))

    def _together(self, streams: Sequence[_Stream], ending: Union[_Count, _Fill]) -> None:
        """Runs every stream in a thread until it has enough. Raises what the first failing one raised."""
        clock = self._terms.clock
        gate, failed = threading.Event(), threading.Event()

        def work(stream: _Stream) -> None:
            call, begins, ends = stream.call, stream.begins, stream.ends
            gate.wait()
            try:
                while not failed.is_set():
                    begin = clock()
                    call()
                    end = clock()
                    begins.append(begin)
                    ends.append(end)
                    if ending.enough(stream, end):
                        return
            except BaseException as error:  # told where the threads are joined
                stream.error = error
                failed.set()

        threads = [
            threading.Thread(target=work, args=(stream,), name=f"stream-{number}", daemon=True)
            for number, stream in enumerate(streams)
        ]
        for thread in threads:
            thread.start()
        ending.begin(clock())
        gate.set()
        wait = max(LEAST_WAIT_SECONDS, self._terms.progress_seconds)
        due = time.monotonic() + wait
        for thread in threads:
            while thread.is_alive():
                thread.join(max(0.0, due - time.monotonic()))
                if time.monotonic() >= due:
                    ending.report(clock())
                    due = time.monotonic() + wait
        for stream in streams:
            if stream.error is not None:
                raise stream.error
        ending.report(clock(), over=True)


class _Count:
    """Ends each stream after the duration and its share of the least number of calls."""

    def __init__(self, terms: Terms, streams: Sequence[_Stream]) -> None:
        self._terms = terms
        self._streams = streams
        bounds = terms.bounds
        self._least = -(-bounds.least_runs // len(streams))
        self._most = measure.FOREVER if bounds.most_runs is None else max(1, bounds.most_runs // len(streams))
        self._began = 0
        self._due = 0

    def begin(self, now: int) -> None:
        self._began = now
        self._due = now + int(self._terms.bounds.seconds * 1e9)

    def enough(self, stream: _Stream, now: int) -> bool:
        done = len(stream.ends)
        return done >= self._most or (now >= self._due and done >= self._least)

    def ended_by_number(self) -> bool:
        """Whether some stream had all the calls it may have, or began its last one after the duration."""
        return any(
            len(stream.ends) >= self._most or stream.begins[-1] >= self._due for stream in self._streams
        )

    def report(self, now: int, *, over: bool = False) -> None:
        elapsed, seconds = (now - self._began) / 1e9, self._terms.bounds.seconds
        done = [len(stream.ends) for stream in self._streams]
        fraction = min(elapsed / seconds if seconds > 0 else 1.0, min(done) / max(1, self._least))
        fraction = 1.0 if over else max(fraction, min(done) / self._most)
        # The ends come second: of a call that is being noted there is only the begin.
        ends = self._streams[0].ends[:: max(1, done[0] // measure.INTERIM_SAMPLES)]
        begins = self._streams[0].begins[:: max(1, done[0] // measure.INTERIM_SAMPLES)]
        durations = [end - begin for begin, end in zip(begins, ends)]
        progress = measure.progress(Stage.MEASURE, durations, elapsed, fraction)
        self._terms.report(replace(progress, runs=sum(done)))


class _Fill:
    """Ends every stream when told; keeps nothing."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def begin(self, now: int) -> None:
        pass

    def enough(self, stream: _Stream, now: int) -> bool:  # noqa: ARG002 - as when it counts
        del stream.begins[:], stream.ends[:]
        return self._told()

    def report(self, now: int, *, over: bool = False) -> None:
        pass
