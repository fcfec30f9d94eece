"""Doubts about the figures, found in the figures themselves: the warnings of a result.

Every code that the worker can give is in :data:`DOUBTS`, with its limit and the reason for it;
the documentation is made from that table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Optional, Sequence

from boardbench.agent.bench import stats
from boardbench.agent.domain import Latency, Warning

FEW_SAMPLES = 10
HIGH_VARIATION = 0.10
DRIFT = 0.05
DRIFT_SAMPLES = 60
CLOCK_READS = 100
PREEMPTIONS_PER_SECOND = 50.0


@dataclass(frozen=True)
class Doubt:
    """A kind of doubt: when it is raised, why there, and what to do."""

    code: str
    condition: str
    reason: str
    remedy: str


DOUBTS = (
    Doubt(
        "few_samples",
        f"fewer than {FEW_SAMPLES} counted inferences",
        "hyperfine and trtexec want ten at least; below six even the median has no bounds",
        "a longer --duration, or a higher --min-runs",
    ),
    Doubt(
        "high_variation",
        f"standard deviation above {HIGH_VARIATION:.0%} of the mean",
        "the limit of pyperf: beyond it the mean says little",
        "stop other work on the board, fix the clocks, and compare medians",
    ),
    Doubt(
        "slow_first_runs",
        f"median of the first tenth more than {DRIFT:.0%} above the rest, their 95 % bounds apart; "
        f"from {DRIFT_SAMPLES} inferences on",
        "the warm-up ended before the latency had settled; a tenth of 60 is the least that has bounds",
        "a longer --warm-up",
    ),
    Doubt(
        "slowing_down",
        f"median of the last tenth more than {DRIFT:.0%} above the rest, their 95 % bounds apart; "
        f"from {DRIFT_SAMPLES} inferences on",
        "the board got slower while it measured, as it does when it heats up",
        "cool the board, then measure longer to see where it ends",
    ),
    Doubt(
        "timer_resolution",
        f"median below {CLOCK_READS} readings of the clock",
        "an inference is timed with two readings: beyond this they are over one percent of it",
        "a bigger batch, and divide",
    ),
    Doubt(
        "preempted",
        f"more than {PREEMPTIONS_PER_SECOND:.0f} involuntary context switches a second",
        "an idle board takes the processor away a few times a second; a busy one at every time slice",
        "stop other work on the board, or use fewer threads than it has processors",
    ),
    Doubt(
        "threads_exceed_processors",
        "more threads asked for than processors that the worker may use",
        "threads of one inference then wait for each other",
        "fewer --threads",
    ),
    Doubt(
        "outputs_not_finite",
        "an output of the first inference holds NaN or infinity",
        "such values can be much slower or faster to compute than ordinary ones",
        "feed real data with --inputs",
    ),
    Doubt(
        "peak_not_resettable",
        "the kernel refused to reset the peak of the resident set",
        "then the peak of a phase can't be told from those before it, and is left out",
        "nothing is wrong with the latency; a kernel with CONFIG_PROC_PAGE_MONITOR tells the peaks",
    ),
    Doubt(
        "not_compiled_for_edgetpu",
        "a model without a compiled part on the device edgetpu",
        "the TPU takes only what edgetpu_compiler made for it; the rest runs on the CPU without a word",
        "quantise it to 8 bits, compile it with edgetpu_compiler, and run the file named …_edgetpu.tflite",
    ),
    Doubt(
        "placement_contradicted",
        "the interpreter says that an accelerator ran, and its counters or the processor time deny it",
        "a counter of the hardware can't be wrong about standing still",
        "take the latency for what the CPU did, and look at the driver's log (dmesg)",
    ),
    Doubt(
        "edgetpu_parameters_streamed",
        "more than 1% of a compiled model's parameters don't fit into the Edge TPU",
        "they are sent over USB or PCIe at every inference, which can take longer than the inference",
        "a smaller model, compiled by itself, or one cut into segments for several TPUs",
    ),
    Doubt(
        "edgetpu_slow_usb",
        "an Edge TPU on a USB link below 5000 Mbit/s",
        "a USB 2 link is ten times slower, and tensors and streamed parameters all go through it",
        "plug it into a USB 3 port (blue), with the cable that came with it, and without a hub",
    ),
    Doubt(
        "edgetpu_hot",
        "an Edge TPU at or above the temperature from which its driver lowers the clock",
        "the clock is lowered at each of three temperatures (google/gasket-driver, apex_driver.c)",
        "cool it, wait, and run again",
    ),
    Doubt(
        "edgetpu_option_ignored",
        "options for an Edge TPU that libedgetpu looks at only when the device is given by index",
        "its plugin passes options on only with :N, usb:N or pci:N",
        "give the option delegate.device=usb:0 or delegate.device=pci:0 too",
    ),
    Doubt(
        "device_fallback",
        "the device that was asked for is not there or takes nothing, and allow_fallback was given",
        "what was measured is then the CPU",
        "take the figures for the CPU's, or leave --allow-fallback out to be told instead",
    ),
    Doubt(
        "standin",
        "a stand-in took the place of an accelerator",
        "it computes on the CPU or puts out a pattern, and waits as it is told",
        "a test of boardbench itself: neither figures nor outputs say anything about hardware",
    ),
)

_BY_CODE = {doubt.code: doubt for doubt in DOUBTS}


def warn(code: str, seen: str) -> Warning:
    """A warning of a kind in the table: what was seen, and the remedy from the table."""
    return Warning(code=code, message=f"{seen}: {_BY_CODE[code].remedy}")


def of_latency(
    latency: Latency,
    *,
    clock_read_seconds: float,
    wall_seconds: Optional[float] = None,
    involuntary_context_switches: Optional[int] = None,
) -> Iterator[Warning]:
    """Doubts that the samples and what surrounded them raise."""
    samples = latency.samples_nanoseconds
    middle = stats.median(samples) / 1e9
    if latency.count < FEW_SAMPLES:
        yield warn("few_samples", f"only {latency.count} inferences were counted")
    if latency.stdev_seconds is not None and latency.stdev_seconds > HIGH_VARIATION * latency.mean_seconds:
        share = latency.stdev_seconds / latency.mean_seconds
        yield warn("high_variation", f"the standard deviation is {share:.0%} of the mean")
    if latency.count >= DRIFT_SAMPLES:
        tenth = latency.count // 10
        first = _excess(samples[:tenth], samples[tenth:])
        if first is not None:
            seen = f"the first {tenth} inferences were {first:.0%} slower than the rest"
            yield warn("slow_first_runs", seen)
        last = _excess(samples[-tenth:], samples[:-tenth])
        if last is not None:
            yield warn("slowing_down", f"the last {tenth} inferences were {last:.0%} slower than the rest")
    if middle < CLOCK_READS * clock_read_seconds:
        yield warn(
            "timer_resolution",
            f"the median is {middle * 1e9:.0f} ns and one reading of the clock takes "
            f"{clock_read_seconds * 1e9:.0f} ns",
        )
    if wall_seconds and involuntary_context_switches is not None:
        rate = involuntary_context_switches / wall_seconds
        if rate > PREEMPTIONS_PER_SECOND:
            yield warn("preempted", f"the kernel took the processor away {rate:.0f} times a second")


def _excess(part: Sequence[int], rest: Sequence[int]) -> Optional[float]:
    """Share by which the median of ``part`` is above that of ``rest``; None where noise could explain it."""
    part_bounds, rest_bounds = stats.median_bounds(part), stats.median_bounds(rest)
    if part_bounds is None or rest_bounds is None or part_bounds[0] <= rest_bounds[1]:
        return None
    share = stats.median(part) / stats.median(rest) - 1.0
    return share if share > DRIFT else None
