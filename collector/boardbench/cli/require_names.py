"""What ``--require`` can ask of a result, or of a model file: flags and names, and how each is read.

Every figure is an interval, usually of no width: where the unit of some ops is not known, the number on the
accelerator is from those that are known to be there to those that may be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from boardbench.v1 import placement_pb2, report_pb2, result_pb2

VERDICTS = ("accelerated", "partly", "not_accelerated", "contradicted")

PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d{1,4})?)(?:_(low|high))?")


class Unknown(Exception):
    """The value is not known; the message says why."""


class Figure(NamedTuple):
    """A value that is known to be from ``low`` to ``high``, both in its unit of account, and its words."""

    low: Fraction
    high: Fraction
    words: str
    # Of how many: for shares of a count.
    whole: int = 0


@dataclass(frozen=True)
class Subject:
    """What is judged: a result, or a report on a file."""

    placement: placement_pb2.Placement | None
    result: result_pb2.RunResult | None = None
    report: report_pb2.ModelReport | None = None

    @classmethod
    def of_result(cls, result: result_pb2.RunResult) -> Subject:
        """A run."""
        return cls(result.placement if result.HasField("placement") else None, result=result)

    @classmethod
    def of_report(cls, report: report_pb2.ModelReport) -> Subject:
        """A model file."""
        return cls(report.placement if report.HasField("placement") else None, report=report)

    @property
    def standin(self) -> bool:
        """Whether something that is not the hardware had a part in it."""
        result = self.result
        return (self.placement is not None and self.placement.standin) or (
            result is not None and bool(result.standins or result.accelerator.standin)
        )


@dataclass(frozen=True)
class Name:
    """Something to ask for."""

    name: str
    kind: str
    """One of :data:`VALUES`: what it can be compared with."""
    meaning: str
    read: Callable[[Subject], Figure]
    run: bool = True
    """Whether a run has it."""
    file: bool = False
    """Whether a model file has it."""
    placement: bool = False
    """Whether the ops that are not on the accelerator explain it."""


# Reading


def _placement(subject: Subject) -> placement_pb2.Placement:
    """The placement, where it is known. Raises Unknown."""
    from boardbench.v1 import placement_pb2

    placement = subject.placement
    nothing = [placement_pb2.EVIDENCE_UNSPECIFIED]
    if subject.result is not None:
        nothing.append(placement_pb2.EVIDENCE_PREDICTION)
    if placement is None or placement.evidence in nothing:
        why = f": {placement.detail}" if placement is not None and placement.detail else ""
        raise Unknown(f"nothing proves where the ops ran{why}" if subject.result else f"no placement{why}")
    return placement


def _counts(subject: Subject) -> tuple[int | None, int | None, int]:
    """Ops on an accelerator, ops on the CPU (None: not told), and ops of no known unit. Raises Unknown."""
    from boardbench.v1 import placement_pb2

    placement = _placement(subject)
    if placement.verdict == placement_pb2.PLACEMENT_VERDICT_CONTRADICTED:
        raise Unknown("the evidence contradicts itself")
    unknown = placement_pb2.UNIT_UNSPECIFIED
    lost = sum(count.ops for count in placement.units if count.unit == unknown)
    return (
        placement.accelerated_ops if placement.HasField("accelerated_ops") else None,
        placement.cpu_ops if placement.HasField("cpu_ops") else None,
        lost or sum(op.unit == unknown for op in placement.ops),
    )


def _ops(of: str, where: str) -> Callable[[Subject], Figure]:
    def read(subject: Subject) -> Figure:
        accelerated, on_cpu, unknown = _counts(subject)
        count = accelerated if of == "accelerated" else on_cpu
        if count is None:
            hint = "; --original FILE tells" if subject.report is not None else ""
            raise Unknown(f"how many ops are on {where} is not told{hint}")
        others = on_cpu if of == "accelerated" else accelerated
        whole = 0 if others is None else count + others + unknown
        words = f"{count:,}"
        if unknown:
            words += f" to {count + unknown:,}"
        words += f" of {whole:,} ops" if whole else " ops"
        if whole:
            shares = [f"{100 * number / whole:.4g}" for number in sorted({count, count + unknown})]
            words += f" ({' to '.join(shares)} %)"
        if subject.placement is not None and "edgetpu-custom-op" in subject.placement.accelerated_op_types:
            words += ", where a compiled subgraph counts as one"
        return Figure(Fraction(count), Fraction(count + unknown), words, whole)

    return read


def _verdict(subject: Subject) -> Figure:
    name = _verdict_name(_placement(subject))
    if name not in VERDICTS:
        raise Unknown("the evidence amounts to no verdict")
    number = Fraction(VERDICTS.index(name))
    return Figure(number, number, name.replace("_", " "))


def _verdict_name(placement: placement_pb2.Placement) -> str:
    from boardbench.v1 import placement_pb2

    entry = placement_pb2.PlacementVerdict.DESCRIPTOR.values_by_number.get(placement.verdict)
    return "" if entry is None else entry.name.removeprefix("PLACEMENT_VERDICT_").lower()


def _nothing_fell_back(subject: Subject) -> bool:
    from boardbench.v1 import placement_pb2

    accelerated, on_cpu, unknown = _counts(subject)
    verdict = _placement(subject).verdict
    return verdict == placement_pb2.PLACEMENT_VERDICT_ACCELERATED and not (
        on_cpu or unknown or accelerated == 0
    )


def _cost(name: str, kind: str) -> Callable[[Subject], Figure]:
    def read(subject: Subject) -> Figure:
        placement = subject.placement
        if placement is None or not placement.HasField("fallback_cost"):
            if _nothing_fell_back(subject):
                return Figure(Fraction(0), Fraction(0), "0, since nothing is on the CPU")
            raise Unknown("what the ops on the CPU cost was not measured (is the profiling pass on?)")
        return _figure(getattr(placement.fallback_cost, name), kind)

    return read


def _crossings(name: str, kind: str) -> Callable[[Subject], Figure]:
    def read(subject: Subject) -> Figure:
        placement = _placement(subject)
        if not placement.HasField("crossings"):
            raise Unknown("crossings between accelerator and CPU are not told")
        return _optional(placement.crossings, name, kind)

    return read


def percentile(name: str) -> Callable[[Subject], Figure]:
    """Reads a percentile, or one of its bounds, by a name that :data:`PERCENTILE` matches."""
    found = PERCENTILE.fullmatch(name)
    assert found is not None
    percentile = float(found[1])
    bound = {"low": "low_seconds", "high": "high_seconds"}.get(found[2] or "", "seconds")

    def read(subject: Subject) -> Figure:
        assert subject.result is not None
        latency = subject.result.latency
        for entry in latency.percentiles:
            if entry.percentile == percentile:
                return _figure(getattr(entry, bound), "seconds")
        told = ", ".join(f"p{entry.percentile:g}" for entry in latency.percentiles) or "no percentile"
        raise Unknown(f"{latency.count:,} inferences tell {told}")

    return read


def _latency(name: str) -> Callable[[Subject], Figure]:
    def read(subject: Subject) -> Figure:
        assert subject.result is not None
        latency = subject.result.latency
        if not latency.count or (name == "stdev_seconds" and not latency.HasField("stdev_seconds")):
            raise Unknown("there are no inferences that tell it")
        return _figure(getattr(latency, name), "seconds")

    return read


def _of_result(path: str, kind: str) -> Callable[[Subject], Figure]:
    """The optional field at this path in a result."""
    *way, last = path.split(".")

    def read(subject: Subject) -> Figure:
        message: Any = subject.result
        for step in way:
            message = getattr(message, step)
        return _optional(message, last, kind)

    return read


def _parameters(name: str) -> Callable[[Subject], Figure]:
    def read(subject: Subject) -> Figure:
        if subject.result is not None:
            return _optional(subject.result.accelerator, name, "bytes")
        assert subject.report is not None
        if not subject.report.HasField("edgetpu"):
            raise Unknown("the file is not compiled for the Edge TPU")
        return _figure(getattr(subject.report.edgetpu, name), "bytes")

    return read


def _model_size(subject: Subject) -> Figure:
    size = subject.result.model.size_bytes if subject.result is not None else 0
    size = subject.report.size_bytes if subject.report is not None else size
    if not size:
        raise Unknown("the size of the model is not told")
    return _figure(size, "bytes")


def _warnings(subject: Subject) -> Figure:
    from boardbench.v1 import result_pb2

    every = subject.result.warnings if subject.result is not None else ()
    found = [warning for warning in every if warning.severity != result_pb2.SEVERITY_NOTE]
    if subject.report is not None:
        count, codes = len(subject.report.warnings), [warning.code for warning in subject.report.warnings]
    else:
        count, codes = len(found), [warning.code for warning in found]
    return Figure(Fraction(count), Fraction(count), f"{count} ({', '.join(codes)})" if codes else "0")


def _optional(message: Message, name: str, kind: str) -> Figure:
    if message.DESCRIPTOR.fields_by_name[name].has_presence and not message.HasField(name):
        raise Unknown("it was not told")
    return _figure(getattr(message, name), kind)


def _figure(value: float, kind: str) -> Figure:
    if not math.isfinite(value):
        raise Unknown(f"it is no number: {value}")
    # By its shortest decimal form: 5 ms as a double is a little more than 5 ms, and must still be <= 5ms.
    exact = Fraction(value) if isinstance(value, int) else Fraction(Decimal(repr(value)))
    return Figure(exact, exact, in_words(value, kind))


def in_words(value: float, kind: str) -> str:
    """The value for a person, with digits enough to see on which side of a bound it is."""
    from boardbench.cli import figures

    if kind == "seconds":
        length, sign = figures.seconds_unit(value)
        return f"{figures.digits(value / length, 6)} {sign}"
    if kind == "bytes":
        return (
            f"{figures.count_bytes(int(value))} ({int(value):,} bytes)" if value >= 1024 else f"{value} bytes"
        )
    if kind == "share":
        return f"{100 * value:.4g} %"
    if kind == "joules":
        return f"{figures.digits(value * 1000, 6)} mJ"
    return f"{value:,}"


# What there is


def _no_fallback(subject: Subject) -> tuple[bool, str]:
    accelerated, on_cpu, unknown = _counts(subject)
    if _nothing_fell_back(subject):
        return True, "nothing is on the CPU"
    if unknown:
        return False, f"of {unknown:,} ops it is not known where they are"
    if not accelerated and on_cpu is not None:
        return False, f"all {on_cpu:,} ops are on the CPU"
    return False, f"{on_cpu or 0:,} ops are on the CPU"


def _no_standin(subject: Subject) -> tuple[bool, str]:
    if not subject.standin:
        return True, "real hardware"
    assert subject.result is not None
    return False, f"{', '.join(subject.result.standins) or 'a stand-in'} had a part in it"


def _valid(subject: Subject) -> tuple[bool, str]:
    return _validity(subject, worst="VALIDITY_VALID")


def _not_invalid(subject: Subject) -> tuple[bool, str]:
    return _validity(subject, worst="VALIDITY_DOUBTFUL")


def _validity(subject: Subject, *, worst: str) -> tuple[bool, str]:
    from boardbench.v1 import result_pb2

    assert subject.result is not None
    found = subject.result.validity
    if found == result_pb2.VALIDITY_UNSPECIFIED:
        return False, "not known: nothing was measured"
    name = result_pb2.Validity.Name(found).removeprefix("VALIDITY_").lower()
    codes = dict.fromkeys(
        warning.code for warning in subject.result.warnings if warning.severity != result_pb2.SEVERITY_NOTE
    )
    return found <= result_pb2.Validity.Value(worst), f"{name} ({', '.join(codes)})" if codes else name


@dataclass(frozen=True)
class Flag:
    """Something that holds or not, without a comparison."""

    name: str
    meaning: str
    judge: Callable[[Subject], tuple[bool, str]]
    file: bool
    placement: bool


FLAGS: tuple[Flag, ...] = (
    Flag("no-fallback", "every op is on the accelerator, none on the CPU", _no_fallback, True, True),
    Flag("no-standin", "neither stand-in nor emulator had a part in the run", _no_standin, False, False),
    Flag("valid", "the measurement is valid: no warning is more than a note", _valid, False, False),
    Flag("not-invalid", "the measurement is valid or doubtful", _not_invalid, False, False),
)
"""Every flag."""

NAMES: tuple[Name, ...] = (
    Name(
        "accelerated_ops",
        "ops",
        "ops on an accelerator; with %, of all ops",
        _ops("accelerated", "the accelerator"),
        file=True,
        placement=True,
    ),
    Name(
        "cpu_ops",
        "ops",
        "ops on the CPU, with or without a CPU delegate; with %, of all ops",
        _ops("cpu", "the CPU"),
        file=True,
        placement=True,
    ),
    Name(
        "verdict",
        "verdict",
        f"what all evidence says: {', '.join(VERDICTS)}",
        _verdict,
        file=True,
        placement=True,
    ),
    Name(
        "fallback_share",
        "share",
        "share of the inference time that ops on the CPU take; 0 when there are none",
        _cost("share", "share"),
        placement=True,
    ),
    Name(
        "fallback_share_high",
        "share",
        "upper 95 % bound of that share",
        _cost("share_high", "share"),
        placement=True,
    ),
    Name(
        "fallback_time",
        "seconds",
        "time that ops on the CPU take in one inference; 0 when there are none",
        _cost("seconds", "seconds"),
        placement=True,
    ),
    Name(
        "crossings",
        "count",
        "times that one inference moves between accelerator and CPU",
        _crossings("count", "count"),
        placement=True,
    ),
    Name(
        "crossing_bytes",
        "bytes",
        "bytes that move between accelerator and CPU in one inference",
        _crossings("bytes", "bytes"),
        placement=True,
    ),
    Name(
        "parameters_cached",
        "bytes",
        "parameters that the accelerator keeps",
        _parameters("parameters_cached_bytes"),
        file=True,
    ),
    Name(
        "parameters_streamed",
        "bytes",
        "parameters that are sent to the accelerator at every inference",
        _parameters("parameters_streamed_bytes"),
        file=True,
    ),
    Name("mean", "seconds", "mean latency", _latency("mean_seconds")),
    Name("min", "seconds", "latency of the fastest inference", _latency("min_seconds")),
    Name("max", "seconds", "latency of the slowest inference", _latency("max_seconds")),
    Name("stdev", "seconds", "standard deviation of the latency", _latency("stdev_seconds")),
    Name(
        "first_inference",
        "seconds",
        "time of the very first inference",
        _of_result("first_inference_seconds", "seconds"),
    ),
    Name("create", "seconds", "time to load the model", _of_result("create_seconds", "seconds")),
    Name("import", "seconds", "time to import the engine", _of_result("import_seconds", "seconds")),
    Name(
        "peak_rss",
        "bytes",
        "highest resident memory of the worker",
        _of_result("memory.peak_rss_bytes", "bytes"),
    ),
    Name(
        "model_rss",
        "bytes",
        "resident memory that the model adds",
        _of_result("memory.model_rss_bytes", "bytes"),
    ),
    Name("model_size", "bytes", "length of the model file", _model_size, file=True),
    Name(
        "energy",
        "joules",
        "energy of one inference, idle subtracted",
        _of_result("energy.energy_per_inference_joules", "joules"),
    ),
    Name(
        "energy_high",
        "joules",
        "upper bound of that energy",
        _of_result("energy.energy_per_inference_high_joules", "joules"),
    ),
    Name(
        "throughput",
        "count",
        "samples computed a second in the scenario",
        _of_result("scenario.throughput_hertz", "count"),
    ),
    Name(
        "throughput_low",
        "count",
        "lower bound of that throughput",
        _of_result("scenario.throughput_low_hertz", "count"),
    ),
    Name(
        "deadline_misses",
        "count",
        "inferences that missed their deadline (periodic and poisson)",
        _of_result("scenario.deadline_misses", "count"),
    ),
    Name(
        "slowdown",
        "count",
        "median at the end over median of the first window (sustained)",
        _of_result("scenario.slowdown_ratio", "count"),
    ),
    Name(
        "interference",
        "count",
        "median beside other models over median alone (concurrent)",
        _of_result("interference.slowdown_ratio", "count"),
    ),
    Name("warnings", "count", "number of warnings, notes left out", _warnings, file=True),
)
"""Every name but the percentiles, which are without number."""

PERCENTILES = "p50, p90, p99.9, … and p50_low, p50_high, …"
PERCENTILES_MEANING = "latency that so many % of the inferences don't exceed, and its 95 % bounds"

VALUES = {
    "ops": "a number (64), or with % (95%) a share of all ops",
    "share": "a share with % (10%), or from 0 to 1 (0.1)",
    "seconds": "a time with its unit: ns, us, ms, s or min (5ms)",
    "bytes": "a size: B, kB, MB, GB, KiB, MiB or GiB (200MiB)",
    "count": "a number (4)",
    "joules": "an energy with its unit: J, mJ or uJ (5mJ)",
    "verdict": "one of " + ", ".join(VERDICTS),
}
"""What each kind is compared with."""
