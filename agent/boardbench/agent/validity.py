"""What a measurement is worth: the rules by which the agent doubts it, and the verdict that follows.

A result is as good as the worst of its warnings: ``invalid`` when one of them says so, else ``doubtful``,
else ``valid``. A warning whose severity is not known counts as doubtful, and a run that was not measured to
its end has no verdict. Thresholds are in the configuration, :class:`~boardbench.agent.config.ValidityConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.v1 import result_pb2

NOTE = result_pb2.SEVERITY_NOTE
DOUBTFUL = result_pb2.SEVERITY_DOUBTFUL
INVALID = result_pb2.SEVERITY_INVALID

Severity: TypeAlias = result_pb2.Severity.ValueType


@dataclass(frozen=True)
class Rule:
    """A kind of warning: when it is given, how much it weighs, why, and what to do."""

    code: str
    # Settings of [validity] are named by their key.
    condition: str
    # In words where it depends: "doubtful, invalid from load_invalid on".
    severity: str
    reason: str
    remedy: str


RULES = (
    Rule(
        "throttled",
        "while it was measured, the firmware or the kernel slowed the processors or the accelerator down: "
        "bits of the Raspberry Pi's firmware, steps of a cooling device, counters of an x86 processor, "
        "reasons that a GPU gives",
        "invalid; doubtful for nothing but a graphics card's power limit; in a sustained scenario a note",
        "a throttled board is another board; a sustained run is made to show just that",
        "cool the board, or wait for it with --cool-to, then run again",
    ),
    Rule(
        "undervoltage",
        "the supply's voltage was too low at some time while it was measured",
        "invalid",
        "the firmware then holds the processors back, for as long as it likes",
        "a supply and a cable made for this board; fewer devices on its USB ports",
    ),
    Rule(
        "over_current",
        "a counter of over-current events rose while it was measured",
        "invalid",
        "each event holds the module's clocks back at once",
        "a stronger supply, or a power mode that draws less",
    ),
    Rule(
        "cache_not_kept",
        "what the engine left for the next load is more than all caches may take, and was removed",
        "note",
        "the next load is a first one again",
        "raise store.cache_limit_bytes in the agent's configuration",
    ),
    Rule(
        "throttled_before",
        "the board was throttled or short of voltage since it booted, and not while it was measured",
        "note",
        "it says nothing about this run, but something about the supply or the cooling",
        "look at both before a longer run",
    ),
    Rule(
        "clock_moved",
        "the processors' frequency in the slowest tenth of the measurement was below that in the fastest by "
        "more than clock_drop_doubtful",
        "doubtful, invalid from clock_drop_invalid on; of processors that rest between inferences (periodic, "
        "Poisson, on an accelerator) doubtful at most; in a sustained scenario a note",
        "figures from several clocks are figures of no clock",
        "the governor performance (--tune sets it for the run), and cooling",
    ),
    Rule(
        "frequency_capped",
        "the limit of the frequency is below what the processor can by more than frequency_cap_note",
        "note; doubtful when the limit was moved while it was measured",
        "the figures are right for this limit, and for no other",
        "see scaling_max_freq, the power mode of the board, and its power supply",
    ),
    Rule(
        "power_mode_moved",
        "the board's power mode was another one at the end of the measurement",
        "invalid",
        "a power mode sets the clocks of everything",
        "find out what sets it (nvpmodel, a daemon against heat), then run again",
    ),
    Rule(
        "governor",
        "the governor of the processors is not performance, and their frequency can move",
        "note; doubtful where no frequency could be read during the measurement",
        "it raises the clock only after the work has begun; what it did to the run is told by clock_moved",
        "the governor performance (--tune sets it for the run)",
    ),
    Rule(
        "high_load",
        "other programs used more than load_doubtful of the processors' time while it was measured",
        "doubtful, invalid from load_invalid on",
        "they take time, caches and the bandwidth of the memory",
        "stop them",
    ),
    Rule(
        "cpu_steal",
        "the host of this virtual machine took more than steal_doubtful of the processors' time away",
        "doubtful, invalid from steal_invalid on",
        "the tail is then the host's",
        "a machine of its own, or pinned processors",
    ),
    Rule(
        "cpu_pressure",
        "in more than cpu_pressure_doubtful of the measurement, some task waited for a processor; not where "
        "several runs were measured at the same time",
        "doubtful",
        "what waits is either the model or runs in its place the next time",
        "stop other work, or use fewer threads than there are processors",
    ),
    Rule(
        "memory_low",
        "less than memory_available_doubtful of the board's memory was available at some time of the run, or "
        "some task waited for memory in more than memory_pressure_doubtful of the measurement",
        "doubtful",
        "the kernel then takes pages of the model's file away and reads them again",
        "stop other programs, or use a smaller model",
    ),
    Rule(
        "swapped",
        "more than swap_doubtful_bytes of the worker were swapped out, or came back from swap while it was "
        "measured",
        "doubtful",
        "a page from swap takes as long as many inferences",
        "stop other programs, or turn swap off (sudo swapoff -a)",
    ),
    Rule(
        "near_throttling",
        "it came within temperature_margin_celsius of the temperature at which the board throttles, and was "
        "not throttled",
        "note",
        "the next run may be",
        "a heat sink or a fan; --cool-to before the run",
    ),
    Rule(
        "not_cooled",
        "the board did not get as cool as was asked for in the time that was asked for, or can't tell how "
        "warm it is",
        "doubtful",
        "the run then began warmer than those that it is to be compared with",
        "a longer --cool-for, a higher --cool-to, or a fan",
    ),
    Rule(
        "idle_not_measured",
        "the idle board's power was asked for, and the board has no rail or meter",
        "note",
        "nothing can be said about energy",
        "`boardbench doctor` says which sensors there are; a meter whose driver exposes hwmon",
    ),
    Rule(
        "idle_disturbed",
        "while the idle board's power was measured, more than idle_load_note of its processors was busy",
        "note",
        "the latency is right; the energy per inference comes out too low, since too much was subtracted",
        "stop other work on the board",
    ),
    Rule(
        "sensors_costly",
        "reading the sensors took more than sensors_doubtful of one processor",
        "doubtful",
        "they are then a part of what is measured",
        "fewer samples (--sample-rate), or leave the costly kind out (sensors.without)",
    ),
    Rule(
        "not_tuned",
        "--tune was asked for, and some setting could not be set or put back",
        "note",
        "what the board then did is judged by the other rules",
        "the message has the command that sets it",
    ),
    Rule(
        "emulated",
        "the board is an emulator",
        "invalid",
        "its timings are no performance",
        "run on the board itself",
    ),
    Rule(
        "worker_end",
        "the worker crashed or hung after it had reported its result",
        "note",
        "the figures are whole by then",
        "tell the engine's maker",
    ),
    Rule(
        "processes_disagree",
        "the medians of several processes differ by more than ± processes_doubtful, and by more than chance "
        "explains",
        "doubtful",
        "addresses and allocations differ from process to process, and with them what the caches do; the "
        "figures of one process are then not those of the model",
        "more --processes, and compare the bounds that hold for all of them",
    ),
    Rule(
        "placement_differs",
        "ops run elsewhere in one process of several than in the others, or beside other models than by "
        "themselves",
        "doubtful",
        "figures of two placements are figures of neither",
        "look at the processes one by one, and what else wants the accelerator",
    ),
    Rule(
        "outputs_differ",
        "processes of one run computed different outputs from equal inputs",
        "note",
        "the latency is right; the arithmetic depends on the order in which threads end, or on memory that "
        "was not set",
        "compare the outputs before the model is trusted",
    ),
    Rule(
        "placement_drifted",
        "ops run elsewhere than in the last run of the same model with the same settings",
        "note",
        "this run is right, and not to be compared with the last one",
        "look what changed on the board in between",
    ),
    Rule(
        "not_spooled",
        "the result could not be kept for the collector",
        "note",
        "the figures are whole; the collector may never get them",
        "make room on the board's disk",
    ),
)
"""What the agent itself doubts. What the worker finds in the figures is in bench/doubts.py."""

_BY_CODE = {rule.code: rule for rule in RULES}


def codes() -> frozenset[str]:
    """The code of every warning that a result can have."""
    # Only to check a configuration; an agent that waits needs nothing of the bench process.
    from boardbench.agent.bench.doubts import DOUBTS

    return frozenset((*_BY_CODE, *(doubt.code for doubt in DOUBTS)))


def warn(
    code: str,
    seen: str,
    severity: Severity,
    *,
    time: Timestamp | None = None,
    evidence: Mapping[str, float] | None = None,
) -> result_pb2.Warning:
    """A warning by one of the rules: what was seen, and the remedy from the table."""
    warning = result_pb2.Warning(
        code=code, message=f"{seen}: {_BY_CODE[code].remedy}", severity=severity, time=time
    )
    warning.evidence.update(evidence or {})
    return warning


def weigh(warning: result_pb2.Warning, severities: Mapping[str, str]) -> None:
    """Gives the warning the severity that the configuration has for its code, if it has one."""
    name = severities.get(warning.code)
    if name is not None:
        warning.severity = result_pb2.Severity.Value(f"SEVERITY_{name.upper()}")


def verdict(warnings: Iterable[result_pb2.Warning]) -> result_pb2.Validity.ValueType:
    """What a measurement with these warnings is worth."""
    worst = max((warning.severity or DOUBTFUL for warning in warnings), default=NOTE)
    if worst == NOTE:
        return result_pb2.VALIDITY_VALID
    return result_pb2.VALIDITY_DOUBTFUL if worst == DOUBTFUL else result_pb2.VALIDITY_INVALID


def settle(result: result_pb2.RunResult, severities: Mapping[str, str]) -> None:
    """Weighs the warnings of the result and sets its validity. As often as one likes: after each change."""
    for warning in result.warnings:
        weigh(warning, severities)
    if result.status == result_pb2.RUN_STATUS_SUCCEEDED:
        result.validity = verdict(result.warnings)
    else:
        result.ClearField("validity")
