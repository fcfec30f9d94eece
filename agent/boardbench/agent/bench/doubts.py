"""Doubts about the figures, found in the figures themselves: the warnings of a result.

Every code that the worker can give is in :data:`DOUBTS`, with what it means for the measurement, its limit
and the reason for it; the documentation is made from that table. The limits themselves are in
:class:`Thresholds`, so that a board's owner can set others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Iterator, Mapping, Optional, Sequence, Tuple

from boardbench.agent.bench import cost, series, stats
from boardbench.agent.bench.dependence import Dependence
from boardbench.agent.bench.runtime import OptionRejected
from boardbench.agent.bench.series import Drift, Modes, Outliers, Period
from boardbench.agent.domain import Latency, Severity, Stopping, StopReason, WarmUp, Warning

INVALID, DOUBTFUL, NOTE = Severity.INVALID, Severity.DOUBTFUL, Severity.NOTE


def _limit(default: float, meaning: str) -> float:
    found: float = field(default=default, metadata={"meaning": meaning})
    return found


@dataclass(frozen=True)
class Thresholds:
    """Where doubts begin. Numbers without a unit in their name are counts."""

    samples_invalid: float = _limit(10, "few_samples is invalid below this many counted inferences")
    samples_doubtful: float = _limit(36, "few_samples is doubtful below this many; p90 has bounds from 36 on")
    variation_ratio: float = _limit(0.10, "high_variation: standard deviation over mean")
    drift_ratio: float = _limit(
        0.05,
        "slow_first_runs, slowing_down: median of a tenth over that of the rest, less one; drifting is "
        "doubtful from this change on",
    )
    drift_samples: float = _limit(60, "slow_first_runs, slowing_down: looked for from so many inferences on")
    modes_ratio: float = _limit(
        0.25, "several_modes is doubtful above this share of inferences outside of the greatest mode"
    )
    clock_reads: float = _limit(100, "timer_resolution: median over the cost of one reading of the clock")
    preemptions_hertz: float = _limit(50, "preempted: involuntary context switches a second")
    start_delay_ratio: float = _limit(
        0.05, "late_starts: 95th percentile of the loop's own delay over the median latency"
    )
    utilisation_ratio: float = _limit(
        1.0, "overloaded: time that the inferences take over the time in which they are asked for"
    )
    slowdown_ratio: float = _limit(
        0.05, "slowed_down: median of the steady end over the first window's, less one"
    )
    steady_ratio: float = _limit(0.02, "still_changing: difference of windows that are taken for equal")

    @classmethod
    def of(cls, given: Mapping[str, float]) -> Thresholds:
        """The defaults, and what was given by name. Raises OptionRejected for what is no threshold."""
        names = [each.name for each in fields(cls)]
        for name, value in given.items():
            if name not in names:
                raise OptionRejected(f"there is no threshold {name!r}; there are {', '.join(names)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise OptionRejected(f"the threshold {name} is a number, not {value!r}")
            if value < 0:
                raise OptionRejected(f"the threshold {name} is a number from 0 on, not {value}")
        return replace(cls(), **{name: float(value) for name, value in given.items()})


MOST_MODES = 8
"""In the figures of a warning; all of them are in its words."""

DEFAULT = Thresholds()
_T = DEFAULT


@dataclass(frozen=True)
class Doubt:
    """A kind of doubt: how grave, when it is raised, why there, and what to do."""

    code: str
    severity: Severity
    condition: str
    reason: str
    remedy: str


DOUBTS = (
    Doubt(
        "few_samples",
        INVALID,
        f"fewer than {_T.samples_invalid:.0f} counted inferences; doubtful below {_T.samples_doubtful:.0f}",
        "hyperfine and trtexec want ten at least, and below six even the median has no bounds; p90 has "
        "bounds from 36 on",
        "a longer --duration, or a higher --min-runs",
    ),
    Doubt(
        "high_variation",
        DOUBTFUL,
        f"standard deviation above {_T.variation_ratio:.0%} of the mean",
        "the limit of pyperf: beyond it the mean says little",
        "stop other work on the board, fix the clocks, and compare medians",
    ),
    Doubt(
        "slow_first_runs",
        DOUBTFUL,
        f"median of the first tenth more than {_T.drift_ratio:.0%} above the rest, their 95 % bounds apart; "
        f"from {_T.drift_samples:.0f} inferences on",
        "the warm-up ended before the latency had settled; a tenth of 60 is the least that has bounds",
        "a longer --warm-up",
    ),
    Doubt(
        "slowing_down",
        DOUBTFUL,
        f"median of the last tenth more than {_T.drift_ratio:.0%} above the rest, their 95 % bounds apart; "
        f"from {_T.drift_samples:.0f} inferences on",
        "the board got slower while it measured, as it does when it heats up",
        "cool the board, then measure longer to see where it ends (--scenario sustained)",
    ),
    Doubt(
        "warm_up_not_steady",
        DOUBTFUL,
        "at ten times the warm-up that was asked for, or 30 s more, its last half, in three windows, still "
        "has medians more than 10 % apart, or more than 1 % apart with their 95 % bounds apart",
        "what follows is then measured on a board that has not settled",
        "stop other work on the board, fix the clocks, or give a longer --warm-up",
    ),
    Doubt(
        "precision_not_reached",
        DOUBTFUL,
        "the measurement ended before the bounds of every percentile were as narrow as was asked for",
        "more inferences make bounds narrower with the square root of their number",
        "more time with --max-duration, a quieter board, or a wider precision",
    ),
    Doubt(
        "drifting",
        NOTE,
        f"the median changes by {series.DRIFT:.0%} or more over the run, by a trend or a step that chance "
        f"does not explain; doubtful from {_T.drift_ratio:.0%} on",
        "clock, heat or other work changed while it was measured, and the percentiles are those of the "
        "mixture",
        "fix the clocks, cool the board, or see where it ends (--scenario sustained)",
    ),
    Doubt(
        "periodically_slow",
        NOTE,
        f"every k-th inference is over {series.PERIOD_RATIO - 1:.0%} slower, more regularly than chance "
        "makes it",
        "it belongs to the model, the engine or the board (a timer, a flush, a collection), and to the tail",
        "look for what happens so often",
    ),
    Doubt(
        "several_modes",
        NOTE,
        f"the latencies gather around values at least {series.MODE_DISTANCE:.0%} apart; doubtful when more "
        f"than {_T.modes_ratio:.0%} lie outside of the greatest mode",
        "the median then is that of one mode, and the next run's may be that of another",
        "fix the clocks and the processors that it runs on, or compare the modes",
    ),
    Doubt(
        "outliers",
        NOTE,
        f"single inferences further from the median than {series.OUTLIER_SCORE} median absolute deviations "
        f"and {series.OUTLIER_RATIO - 1:.0%}",
        "the limit of hyperfine; medians do not feel them, and the tail is made of them",
        "see what else runs on the board",
    ),
    Doubt(
        "dependent_samples",
        NOTE,
        "neighbouring inferences resemble each other more than chance explains; doubtful when the run is too "
        "short for what wanders in it",
        "the same number of inferences then says less, and all bounds are widened for it",
        "measure longer; fixed clocks make them independent",
    ),
    Doubt(
        "timer_resolution",
        DOUBTFUL,
        f"median below {_T.clock_reads:.0f} readings of the clock",
        "an inference is timed with two readings: beyond this they are over one percent of it",
        "a bigger batch, and divide",
    ),
    Doubt(
        "preempted",
        DOUBTFUL,
        f"more than {_T.preemptions_hertz:.0f} involuntary context switches a second",
        "an idle board takes the processor away a few times a second; a busy one at every time slice",
        "stop other work on the board, or use fewer threads than it has processors",
    ),
    Doubt(
        "overloaded",
        INVALID,
        "inferences are asked for faster than they can be done: they take "
        f"{_T.utilisation_ratio:.0%} of the time or more in which they are asked for",
        "the queue, and with it the latency, then grows for as long as it is measured, and is no property of "
        "the board; the time in the engine alone still is",
        "a lower --rate, a faster model, or several inferences at once",
    ),
    Doubt(
        "late_starts",
        DOUBTFUL,
        "where nothing waited, one inference of twenty was begun later than intended by more than "
        f"{_T.start_delay_ratio:.0%} of the median latency",
        "timers and scheduler of the board are then a part of the latency, which counts from the intended "
        "start, as they would be in an application",
        "stop other work on the board; the time in the engine alone is told beside it",
    ),
    Doubt(
        "samples_thinned",
        NOTE,
        "a sustained run with more inferences than --max-runs",
        "all of them are in the windows; of the samples every second, fourth, … is kept",
        "nothing is wrong; a higher --max-runs keeps more of them",
    ),
    Doubt(
        "slowed_down",
        NOTE,
        f"the steady end of a sustained run is over {_T.slowdown_ratio:.0%} slower than its first window",
        "this is what the scenario is there to show",
        "compare the steady end, or cool the board better",
    ),
    Doubt(
        "still_changing",
        DOUBTFUL,
        "at the end of a sustained run fewer than three windows, or less than a fifth of all, have medians "
        f"that agree within {_T.steady_ratio:.0%} or within their bounds",
        "where it would have ended is not known",
        "a longer --duration",
    ),
    Doubt(
        "threads_exceed_processors",
        DOUBTFUL,
        "more threads asked for, over all instances, than processors that the worker may use",
        "threads of one inference then wait for each other",
        "fewer --threads or --streams",
    ),
    Doubt(
        "outputs_not_finite",
        DOUBTFUL,
        "an output of the first inference holds NaN or infinity",
        "such values can be much slower or faster to compute than ordinary ones",
        "feed real data with --inputs",
    ),
    Doubt(
        "peak_not_resettable",
        NOTE,
        "the kernel refused to reset the peak of the resident set",
        "then the peak of a phase can't be told from those before it, and is left out",
        "nothing is wrong with the latency; a kernel with CONFIG_PROC_PAGE_MONITOR tells the peaks",
    ),
    Doubt(
        "not_compiled_for_edgetpu",
        INVALID,
        "a model without a compiled part on the device edgetpu",
        "the TPU takes only what edgetpu_compiler made for it; the rest runs on the CPU without a word",
        "quantise it to 8 bits, compile it with edgetpu_compiler, and run the file named …_edgetpu.tflite",
    ),
    Doubt(
        "placement_contradicted",
        INVALID,
        "the interpreter says that an accelerator ran, and its counters or the processor time deny it",
        "a counter of the hardware can't be wrong about standing still",
        "take the latency for what the CPU did, and look at the driver's log (dmesg)",
    ),
    Doubt(
        "edgetpu_parameters_streamed",
        NOTE,
        "more than 1% of a compiled model's parameters don't fit into the Edge TPU",
        "they are sent over USB or PCIe at every inference, which can take longer than the inference",
        "a smaller model, compiled by itself, or one cut into segments for several TPUs",
    ),
    Doubt(
        "edgetpu_slow_usb",
        DOUBTFUL,
        "an Edge TPU on a USB link below 5000 Mbit/s",
        "a USB 2 link is ten times slower, and tensors and streamed parameters all go through it",
        "plug it into a USB 3 port (blue), with the cable that came with it, and without a hub",
    ),
    Doubt(
        "edgetpu_hot",
        DOUBTFUL,
        "an Edge TPU at or above the temperature from which its driver lowers the clock",
        "the clock is lowered at each of three temperatures (google/gasket-driver, apex_driver.c)",
        "cool it, wait, and run again",
    ),
    Doubt(
        "edgetpu_option_ignored",
        DOUBTFUL,
        "options for an Edge TPU that libedgetpu looks at only when the device is given by index",
        "its plugin passes options on only with :N, usb:N or pci:N",
        "give the option delegate.device=usb:0 or delegate.device=pci:0 too",
    ),
    Doubt(
        "device_fallback",
        INVALID,
        "the device that was asked for is not there or takes nothing, and allow_fallback was given",
        "what was measured is then the CPU",
        "take the figures for the CPU's, or leave --allow-fallback out to be told instead",
    ),
    Doubt(
        "cost_uncertain",
        NOTE,
        f"the bounds of what fallback costs are further from the figure than {cost.UNCERTAIN:.0%} of it, or "
        f"of the latency without it, and than {cost.NEGLIGIBLE:.0%} of the latency",
        "the board did other work, or the profiled inferences took longer or shorter than the counted ones",
        "stop other work on the board, or profile more inferences with --profile-runs",
    ),
    Doubt(
        "standin",
        INVALID,
        "a stand-in took the place of an accelerator",
        "it computes on the CPU or puts out a pattern, and waits as it is told",
        "a test of boardbench itself: neither figures nor outputs say anything about hardware",
    ),
)

_BY_CODE = {doubt.code: doubt for doubt in DOUBTS}


def warn(
    code: str,
    seen: str,
    *,
    severity: Optional[Severity] = None,
    evidence: Optional[Mapping[str, float]] = None,
) -> Warning:
    """A warning of a kind in the table: what was seen, the remedy from the table, and the figures by name."""
    doubt = _BY_CODE[code]
    return Warning(
        code=code,
        message=f"{seen}: {doubt.remedy}",
        severity=doubt.severity if severity is None else severity,
        evidence={name: float(value) for name, value in (evidence or {}).items()},
    )


def of_count(count: int, thresholds: Thresholds = DEFAULT) -> Iterator[Warning]:
    """Doubts that the number of counted inferences raises."""
    invalid = count < thresholds.samples_invalid
    if invalid or count < thresholds.samples_doubtful:
        yield warn(
            "few_samples",
            f"only {count} inferences were counted",
            severity=INVALID if invalid else DOUBTFUL,
            evidence={
                "inferences": count,
                "samples_invalid": thresholds.samples_invalid,
                "samples_doubtful": thresholds.samples_doubtful,
            },
        )


def of_latency(
    latency: Latency,
    *,
    clock_read_seconds: float,
    wall_seconds: Optional[float] = None,
    involuntary_context_switches: Optional[int] = None,
    drift: bool = True,
    thresholds: Thresholds = DEFAULT,
) -> Iterator[Warning]:
    """Doubts that the samples and what surrounded them raise; those about a drift only where asked for."""
    samples = latency.samples_nanoseconds
    middle = stats.median(samples) / 1e9
    if latency.stdev_seconds is not None and latency.mean_seconds > 0:
        share = latency.stdev_seconds / latency.mean_seconds
        if share > thresholds.variation_ratio:
            yield warn(
                "high_variation",
                f"the standard deviation is {share:.0%} of the mean",
                evidence={"variation_ratio": share, "limit_ratio": thresholds.variation_ratio},
            )
    if drift and latency.count >= thresholds.drift_samples:
        yield from _drift(samples, thresholds)
    if middle < thresholds.clock_reads * clock_read_seconds:
        yield warn(
            "timer_resolution",
            f"the median is {middle * 1e9:.0f} ns and one reading of the clock takes "
            f"{clock_read_seconds * 1e9:.0f} ns",
            evidence={
                "median_seconds": middle,
                "clock_read_seconds": clock_read_seconds,
                "limit_clock_reads": thresholds.clock_reads,
            },
        )
    if wall_seconds and involuntary_context_switches is not None:
        rate = involuntary_context_switches / wall_seconds
        if rate > thresholds.preemptions_hertz:
            yield warn(
                "preempted",
                f"the kernel took the processor away {rate:.0f} times a second",
                evidence={"preemptions_hertz": rate, "limit_hertz": thresholds.preemptions_hertz},
            )


def _drift(samples: Sequence[int], thresholds: Thresholds) -> Iterator[Warning]:
    tenth = len(samples) // 10
    for code, which, part, rest in (
        ("slow_first_runs", "first", samples[:tenth], samples[tenth:]),
        ("slowing_down", "last", samples[-tenth:], samples[:-tenth]),
    ):
        excess = _excess(part, rest, thresholds.drift_ratio)
        if excess is not None:
            yield warn(
                code,
                f"the {which} {tenth} inferences were {excess:.0%} slower than the rest",
                evidence={"excess_ratio": excess, "limit_ratio": thresholds.drift_ratio, "inferences": tenth},
            )


def _excess(part: Sequence[int], rest: Sequence[int], limit: float) -> Optional[float]:
    """Share by which the median of ``part`` is above that of ``rest``; None where noise could explain it."""
    part_bounds, rest_bounds = stats.median_bounds(part), stats.median_bounds(rest)
    if part_bounds is None or rest_bounds is None or part_bounds[0] <= rest_bounds[1]:
        return None
    share = stats.median(part) / stats.median(rest) - 1.0
    return share if share > limit else None


def of_warm_up(warm_up: WarmUp) -> Iterator[Warning]:
    """Doubts that the warm-up raises."""
    if warm_up.steady is False:
        yield warn(
            "warm_up_not_steady",
            f"after {warm_up.runs} inferences in {warm_up.seconds:.3g} s the latency was not yet steady",
            evidence={"inferences": warm_up.runs, "warm_up_seconds": warm_up.seconds},
        )


def of_stopping(stopping: Stopping) -> Iterator[Warning]:
    """Doubts that the end of a measurement with a precision raises."""
    if stopping.reason is StopReason.PRECISION:
        return
    missed = [
        each
        for each in stopping.targets
        if each.reached_ratio is None or each.reached_ratio > each.asked_ratio
    ]
    if not missed:
        return
    seen = ", ".join(
        f"p{each.percentile:g} "
        + ("has no bounds" if each.reached_ratio is None else f"is known to ±{_percent(each.reached_ratio)}")
        + f" where ±{_percent(each.asked_ratio)} was asked for"
        for each in missed
    )
    how = "its number of inferences" if stopping.reason is StopReason.RUNS else "its time"
    evidence = {}
    for each in missed:
        evidence[f"p{each.percentile:g}_asked_ratio"] = each.asked_ratio
        if each.reached_ratio is not None:
            evidence[f"p{each.percentile:g}_reached_ratio"] = each.reached_ratio
    yield warn("precision_not_reached", f"{how} ended the measurement when {seen}", evidence=evidence)


def _percent(ratio: float) -> str:
    return f"{ratio * 100:.2g} %"


def of_series(
    *,
    drift: Optional[Drift],
    modes: Optional[Modes],
    outliers: Optional[Outliers],
    period: Optional[Period],
    dependence: Optional[Dependence],
    thresholds: Thresholds = DEFAULT,
) -> Iterator[Warning]:
    """Doubts that the order and the shape of the samples raise; None is nothing to tell."""
    if drift is not None:
        yield warn(
            "drifting",
            drift.sentence,
            severity=DOUBTFUL if abs(drift.ratio - 1.0) > thresholds.drift_ratio else NOTE,
            evidence={
                "drift_ratio": drift.ratio,
                "limit_ratio": 1.0 + thresholds.drift_ratio,
                "before_seconds": drift.before_nanoseconds / 1e9,
                "after_seconds": drift.after_nanoseconds / 1e9,
            },
        )
    if period is not None:
        yield warn(
            "periodically_slow",
            period.sentence,
            evidence={
                "every_inferences": period.every,
                "first_inference": period.phase + 1,
                "slow_ratio": period.ratio,
                "hits": period.hits,
                "places": period.slots,
            },
        )
    if modes is not None:
        elsewhere = 1.0 - max(mode.share for mode in modes.modes)
        evidence = {"elsewhere_ratio": elsewhere, "limit_ratio": thresholds.modes_ratio}
        for number, mode in enumerate(modes.modes[:MOST_MODES], start=1):
            evidence[f"mode_{number}_seconds"] = mode.nanoseconds / 1e9
            evidence[f"mode_{number}_ratio"] = mode.share
        yield warn(
            "several_modes",
            modes.sentence,
            severity=DOUBTFUL if elsewhere > thresholds.modes_ratio else NOTE,
            evidence=evidence,
        )
    if outliers is not None:
        yield warn(
            "outliers",
            outliers.sentence,
            evidence={
                "slow_inferences": outliers.slow,
                "fast_inferences": outliers.fast,
                "worst_seconds": outliers.worst_nanoseconds / 1e9,
                "worst_ratio": outliers.worst_ratio,
                "time_ratio": outliers.time_share,
            },
        )
    if dependence is not None and dependence.found:
        yield warn(
            "dependent_samples",
            dependence.sentence
            or f"neighbours resemble each other: {dependence.count} inferences say as much as "
            f"{dependence.effective_count('50'):.0f} independent ones",
            severity=NOTE if dependence.settled else DOUBTFUL,
            evidence={
                "inferences": dependence.count,
                "effective_inferences": dependence.effective_count("50"),
                "neighbours_correlation_ratio": dependence.neighbours,
            },
        )


def thresholds() -> Iterator[Tuple[str, float, str]]:
    """Name, default and meaning of every threshold: for the documentation and for a configuration's check."""
    for each in fields(Thresholds):
        yield each.name, getattr(DEFAULT, each.name), each.metadata["meaning"]
