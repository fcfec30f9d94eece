"""Whether a GPU or NPU worked while the inferences were counted, by its driver's counters.

A runtime that places operations on a GPU says what it meant to do; the driver says what was done. What worked
for this process, or for anybody, speaks for the runtime; what stood still while the processor was busy
contradicts it. Time of the processor by itself says little here: CUDA, for one, waits for the GPU in a loop.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Iterable, List, Optional, Sequence, Tuple

from boardbench.agent.bench import doubts
from boardbench.agent.bench.gpu_counters import NVML_LIBRARY, Busy, Meaning, Nvml, busy
from boardbench.agent.bench.placement import own_report
from boardbench.agent.bench.runtime import Outcome
from boardbench.agent.domain import (
    AcceleratorUse,
    CounterReading,
    Evidence,
    EvidenceReport,
    Placement,
    Unit,
    Verdict,
    Warning,
)

WORKED_SHARE = 0.02
"""Of the time: from here on a GPU that others can use, too, worked. A desktop that redraws takes less."""

STILL_SHARE = 0.001
"""Up to here it stood still: a clock on a desktop takes more."""

LOADED_THOUSANDTHS = 100
"""A load of the moment from which it worked: it is the mean of a short time, and read just after the end."""

ASLEEP_SHARE = 0.98
"""Of the time: what slept so long did not work."""

BUSY_SHARE = 0.9
"""Of the time on the processor: from here on the process worked, or waited in a loop."""

WAITING_SHARE = 0.6
"""Up to here it mostly waited for something else."""

LEAST_SECONDS = 0.05
"""Drivers count in milliseconds, and NVML samples six times a second: what is shorter says nothing."""

_KINDS = {Unit.GPU: "gpu", Unit.NPU: "npu", Unit.TPU: "tpu"}


class GpuWatch:
    """Reads the counters before and after, and joins what they say with the placement."""

    def __init__(
        self,
        library: str,
        unit: Unit,
        families: Optional[Sequence[str]] = None,
        *,
        sys_root: Path = Path("/"),
        nvml_library: str = NVML_LIBRARY,
    ) -> None:
        """``library`` drives the accelerator; ``families`` are the drivers that can be behind it, None: any.

        NVML is asked on this machine only, where ``sys_root`` is ``/``.
        """
        self._library = library
        self._unit = unit
        self._families = families
        self._root = sys_root
        self._nvml_library = nvml_library
        self._nvml: Optional[Nvml] = None
        self._before: Tuple[Busy, ...] = ()
        self._after: Tuple[Busy, ...] = ()

    def doubts(self) -> Iterable[Warning]:
        """None: what is to be said is known at the end."""
        return ()

    def begin(self) -> None:
        """Reads what there is to read; called right before the counted inferences."""
        if self._may_be("nvidia") and self._root == Path("/"):
            self._nvml = Nvml.open(self._nvml_library)
        self._before = self._look()

    def end(self) -> None:
        """Reads it again, right after."""
        self._after = self._look()
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None

    def outcome(
        self,
        placement: Placement,
        *,
        runs: int,
        cpu_seconds: float,
        wall_seconds: float,
        queued_seconds: Optional[float],
    ) -> Outcome:
        """What the run did; ``placement`` is what the runtime itself says."""
        ran_seconds = wall_seconds - (queued_seconds or 0.0)
        on_cpu = cpu_seconds / ran_seconds if ran_seconds > 0 else 0.0
        counters = self._counter_evidence(runs, wall_seconds, on_cpu)
        host = _host_evidence(cpu_seconds, wall_seconds, queued_seconds, on_cpu)
        known = own_report(placement) if placement.evidence is not Evidence.UNSPECIFIED else None
        reports = tuple(report for report in (known, counters, host) if report is not None)
        verdict, why = placement.verdict, ""
        claimed = verdict in (Verdict.ACCELERATED, Verdict.PARTLY)
        stood_still = counters is not None and counters.verdict is Verdict.NOT_ACCELERATED
        if claimed and stood_still and on_cpu >= BUSY_SHARE and counters is not None:
            verdict = Verdict.CONTRADICTED
            why = f"{self._library} had nothing done: {counters.detail}, and the processor was busy"
        warnings = (doubts.warn("placement_contradicted", why),) if why else ()
        return Outcome(
            placement=replace(
                placement,
                verdict=verdict,
                detail=f"{placement.detail}; but {why}" if why else placement.detail,
                evidence_reports=reports,
            ),
            accelerator=AcceleratorUse(
                kind=_KINDS.get(self._unit, ""), path=self._path(), library=self._library
            ),
            warnings=warnings,
        )

    def _may_be(self, family: str) -> bool:
        return self._families is None or family in self._families

    def _look(self) -> Tuple[Busy, ...]:
        kind = _KINDS.get(self._unit)
        return tuple(
            reading
            for reading in busy(self._root, self._nvml)
            if self._may_be(reading.family) and kind in (None, reading.kind)
        )

    def _path(self) -> str:
        """Where the accelerator is, when only one was seen."""
        places = {reading.place for reading in self._after if reading.place}
        return places.pop() if len(places) == 1 else ""

    def _counter_evidence(self, runs: int, wall_seconds: float, on_cpu: float) -> Optional[EvidenceReport]:
        if wall_seconds < LEAST_SECONDS:
            return None
        moves = [_Move(before, after, wall_seconds) for before, after in _pairs(self._before, self._after)]
        # A driver that counts all work of this process settles it: what others do is of no interest then.
        whole = [move for move in moves if move.after.complete]
        said = [move for move in (whole or moves) if move.verdict is not None]
        if not said:
            return None
        verdicts = {move.verdict for move in said}
        if Verdict.ACCELERATED in verdicts:
            verdict = Verdict.ACCELERATED
        elif Verdict.UNSPECIFIED in verdicts:
            verdict = Verdict.UNSPECIFIED
        else:
            verdict = Verdict.NOT_ACCELERATED
            # A load is of the moment when it was read: alone it does not speak against a process that waited.
            if all(move.after.meaning is Meaning.LOAD for move in said) and on_cpu < BUSY_SHARE:
                verdict = Verdict.UNSPECIFIED
        # Those that say so come first; idle engines of a busy GPU are of no interest.
        said.sort(key=lambda move: move.verdict is not verdict)
        shown = [move for move in said if move.verdict is verdict] or said
        more = f" (and {len(shown) - 4} more)" if len(shown) > 4 else ""
        return EvidenceReport(
            evidence=Evidence.COUNTERS,
            verdict=verdict,
            detail="; ".join(move.detail for move in shown[:4]) + f"{more}, in {runs} inferences",
            counters=tuple(
                CounterReading(
                    name=move.after.name,
                    before=move.before.value if move.before else 0,
                    after=move.after.value,
                )
                for move in said
                if move.after.meaning is not Meaning.LOAD
            ),
        )


def _pairs(before: Sequence[Busy], after: Sequence[Busy]) -> Iterable[Tuple[Optional[Busy], Busy]]:
    earlier = {reading.name: reading for reading in before}
    for reading in after:
        # A client that opened the device meanwhile began at zero; what is of the whole board did not.
        if reading.name in earlier or reading.own:
            yield earlier.get(reading.name), reading


class _Move:
    """How one reading changed, and what that says."""

    def __init__(self, before: Optional[Busy], after: Busy, wall_seconds: float) -> None:
        self.before = before
        self.after = after
        self.rise = after.value - (before.value if before is not None else 0)
        self.share: Optional[float] = self._share(wall_seconds)
        self.verdict: Optional[Verdict] = self._verdict()

    @property
    def detail(self) -> str:
        """For a person."""
        name, meaning = self.after.name, self.after.meaning
        if meaning is Meaning.LOAD:
            earlier = self.before.value if self.before is not None else 0
            return f"{name} was at {earlier / 10:g} % before and {self.after.value / 10:g} % after"
        if meaning is Meaning.SLEEP:
            return f"{name} says that it slept for {self.share or 0.0:.1%} of the time"
        share = f", {self.share:.1%} of the time" if self.share is not None else ""
        return f"{name} went up by {self.rise}{share}"

    def _share(self, wall_seconds: float) -> Optional[float]:
        """Of the time; None where nothing was looked at."""
        before, after = self.before, self.after
        if after.meaning is Meaning.LOAD:
            return None
        if after.of is not None:
            whole = after.of - (before.of or 0 if before is not None else 0)
            return self.rise / whole if whole > 0 else None
        return self.rise * after.seconds / wall_seconds

    def _verdict(self) -> Optional[Verdict]:
        """None where it says nothing at all."""
        after = self.after
        if after.meaning is Meaning.LOAD:
            most = max(after.value, self.before.value if self.before is not None else 0)
            if most >= LOADED_THOUSANDTHS:
                return Verdict.ACCELERATED
            return Verdict.UNSPECIFIED if most else Verdict.NOT_ACCELERATED
        if self.rise < 0:  # the driver began anew
            return None
        if after.complete:
            return Verdict.ACCELERATED if self.rise > 0 else Verdict.NOT_ACCELERATED
        if self.share is None:
            return None
        if after.meaning is Meaning.SLEEP:
            # Awake is not yet at work.
            return Verdict.NOT_ACCELERATED if self.share >= ASLEEP_SHARE else Verdict.UNSPECIFIED
        if after.own and self.rise == 0:
            # It may have worked past the kernel.
            return None
        if self.share >= WORKED_SHARE or after.own:
            return Verdict.ACCELERATED
        return Verdict.NOT_ACCELERATED if self.share <= STILL_SHARE else Verdict.UNSPECIFIED


def _host_evidence(
    cpu_seconds: float, wall_seconds: float, queued_seconds: Optional[float], on_cpu: float
) -> Optional[EvidenceReport]:
    if wall_seconds - (queued_seconds or 0.0) < LEAST_SECONDS:
        return None
    detail: List[str] = [f"{cpu_seconds:.3f} s of processor time in {wall_seconds:.3f} s"]
    if queued_seconds is not None and queued_seconds > 0.01 * wall_seconds:
        detail.append(f", {queued_seconds:.3f} s of which were spent in the queue for a processor")
    verdict = Verdict.UNSPECIFIED
    if on_cpu <= WAITING_SHARE:
        verdict = Verdict.ACCELERATED
        detail.append(": the process mostly waited for a device")
    elif on_cpu >= BUSY_SHARE:
        detail.append(": the processor did the work, or waited for a device in a loop")
    else:
        detail.append(": which says nothing")
    return EvidenceReport(evidence=Evidence.HOST_CPU, verdict=verdict, detail="".join(detail))
