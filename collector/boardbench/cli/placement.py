"""Where the ops of a model run, as text: what a person must not overlook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType  # noqa: TID253 - this file owns the picture of a placement
from rich.table import Table  # noqa: TID253
from rich.text import Text  # noqa: TID253

from boardbench.cli import figures
from boardbench.cli.plain import cleaned
from boardbench.cli.styles import BAD, DOUBTFUL, GOOD, QUIET
from boardbench.cli.verdict import (
    ON_CPU,
    accelerator_names,
    cause_rank,
    contradiction,
    evidence_name,
    on_accelerator,
    placement_known,
    share,
    short_name,
    unit_name,
    unit_of,
    verdict_word,
)
from boardbench.v1 import placement_pb2, result_pb2

# An output of twelve lines is read; a longer one is searched, and for that there is `show`.
_OPS_SHOWN = 12
_TYPES_SHOWN = 8
_USB_3_MEGABITS = 5000

_EVIDENCE: dict[int, str] = {
    placement_pb2.EVIDENCE_STATIC: "read in the model file, not seen running",
    placement_pb2.EVIDENCE_PARTITION: "asked of the runtime after loading",
    placement_pb2.EVIDENCE_PROFILED: "seen per op under a profiler",
    placement_pb2.EVIDENCE_COUNTERS: "told by the accelerator's counters",
    placement_pb2.EVIDENCE_HOST_CPU: "told by CPU time against wall time",
    placement_pb2.EVIDENCE_PREDICTION: "predicted by rule: nothing of it was seen running",
}


def placement_block(
    placement: placement_pb2.Placement, *, asked: str, whole: bool, more: str, evidence_follows: bool = False
) -> RenderableType:
    """Verdict, evidence, counts by unit, and the ops that stayed behind, or with ``whole`` every op.

    ``asked`` is the device that was wanted; ``more`` says how to see what was cut off. What the evidence will
    say is not said here when it follows.
    """
    placement = cleaned(placement)
    verdict = _verdict(placement, asked)
    if placement.evidence != placement_pb2.EVIDENCE_UNSPECIFIED:
        known = _EVIDENCE.get(placement.evidence, "known in a way that this version does not know")
        verdict.append(f" ({known})", QUIET)
    parts: list[RenderableType] = [verdict]
    told = {report.detail for report in placement.evidence_reports} if evidence_follows else set()
    if placement.detail and placement.detail not in told:
        parts.append(Text(placement.detail))
    units = _unit_table(placement, whole)
    if units is not None:
        parts.append(units)
    if placement.HasField("crossings") and (placement.crossings.count or whole):
        parts.append(Text(_crossings(placement.crossings)))
    if whole and placement.ops:
        parts.append(_op_table(placement.ops, whole=True))
    elif placement.ops:
        parts.extend(_left_out(placement, asked, more))
    return Group(*parts)


def cost_block(result: result_pb2.RunResult) -> RenderableType:
    """What the ops on the CPU cost, with bounds, and how it was measured."""
    cost = cleaned(result.placement.fallback_cost)
    text = Text(f"{share(cost)} of the time", DOUBTFUL if cost.share else GOOD)
    text.append(
        f": {figures.seconds(cost.seconds)} "
        f"({figures.seconds(cost.seconds_low)} … {figures.seconds(cost.seconds_high)}) "
        "of an inference are spent in ops on the CPU",
        "",
    )
    lines: list[RenderableType] = [text]
    median = next((entry.seconds for entry in result.latency.percentiles if entry.percentile == 50), None)
    if median is not None:
        lines.append(
            Text(
                f"{figures.seconds(median)} would at best be {figures.seconds(cost.latency_without_seconds)} "
                "if they cost nothing"
            )
        )
    if cost.method:
        lines.append(Text(f"measured apart from the counted inferences: {cost.method}", QUIET))
    return Group(*lines)


def evidence_block(placement: placement_pb2.Placement) -> RenderableType:
    """What each kind of evidence says by itself."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for report in sorted(cleaned(placement).evidence_reports, key=lambda report: report.evidence):
        word, style = verdict_word(report.verdict)
        table.add_row(evidence_name(report.evidence), Text(word, style), report.detail)
    return table


def accelerator_block(use: result_pb2.AcceleratorUse) -> RenderableType:
    """The accelerator as it was used; what slows it down stands out."""
    use = cleaned(use)
    lines: list[RenderableType] = []
    if use.standin:
        lines.append(Text("a STAND-IN: no hardware had a part in this", BAD))
    lines.append(Text(" · ".join(part for part in (use.path, use.library, use.library_version) if part)))
    if use.HasField("runtime_version") or use.HasField("model_min_runtime_version"):
        lines.append(_versions(use))
    link = Text()
    if use.HasField("usb_megabits_per_second"):
        speed = use.usb_megabits_per_second
        slow = speed < _USB_3_MEGABITS
        link.append(
            f"USB at {speed:,} Mbit/s" + (", SLOW: not USB 3" if slow else ""), DOUBTFUL if slow else ""
        )
    degrees = [
        f"{getattr(use, name):.0f}"
        for name in ("temperature_before_celsius", "temperature_after_celsius")
        if use.HasField(name)
    ]
    if degrees:
        shown = " → ".join(degrees if len(set(degrees)) > 1 else degrees[:1])
        link.append((" · " if link else "") + f"{shown} °C", "")
    if link:
        lines.append(link)
    parameters = Text()
    if use.HasField("parameters_cached_bytes"):
        parameters.append(f"{figures.count_bytes(use.parameters_cached_bytes)} of parameters kept on it")
    if use.HasField("parameters_streamed_bytes"):
        streamed = use.parameters_streamed_bytes
        parameters.append(", " if parameters else "")
        amount = figures.count_bytes(streamed) if streamed else "nothing"
        parameters.append(f"{amount} streamed at every inference", DOUBTFUL if streamed else "")
    if parameters:
        lines.append(parameters)
    return Group(*(line for line in lines if not isinstance(line, Text) or line.plain))


def _versions(use: result_pb2.AcceleratorUse) -> Text:
    has, needs = use.HasField("runtime_version"), use.HasField("model_min_runtime_version")
    text = Text(f"runtime {use.runtime_version}" if has else "runtime of unknown version")
    if needs:
        old = has and use.runtime_version < use.model_min_runtime_version
        text.append(
            f", the model needs {use.model_min_runtime_version} or newer" + (": TOO OLD" if old else ""),
            BAD if old else "",
        )
    return text


def _verdict(placement: placement_pb2.Placement, asked: str) -> Text:
    known = placement_known(placement)
    total = placement.accelerated_ops + placement.cpu_ops
    if placement.verdict == placement_pb2.PLACEMENT_VERDICT_CONTRADICTED:
        return Text(f"CONTRADICTED: {contradiction(placement)}", BAD)
    if not known:
        return Text("UNKNOWN: nothing proves where the ops ran", DOUBTFUL)
    if placement.accelerated_ops == 0:
        if asked == "cpu":
            text = "on the CPU: the only op" if total == 1 else f"on the CPU, as asked: all {total:,} ops"
            return Text(text)
        return Text(
            f"NOT ACCELERATED: {asked} was asked for, and all {figures.plural(total, 'op')} ran on the CPU",
            BAD,
        )
    units = accelerator_names(placement)
    if placement.standin:
        text = (
            f"a stand-in took {placement.accelerated_ops:,} of {figures.plural(total, 'op')}, no hardware did"
        )
        return Text(text, BAD)
    if placement.cpu_ops == 0:
        every = "the only op" if total == 1 else f"all {total:,} ops"
        return Text(f"accelerated: {every} on the {units}", GOOD)
    return Text(
        f"PARTLY accelerated: {placement.accelerated_ops:,} of {figures.plural(total, 'op')} on the {units}, "
        f"{placement.cpu_ops:,} on the CPU",
        DOUBTFUL,
    )


def _crossings(crossings: placement_pb2.Crossings) -> str:
    text = f"{figures.plural(crossings.count, 'crossing')} between accelerator and CPU in an inference"
    return f"{text}, {figures.count_bytes(crossings.bytes)}" if crossings.HasField("bytes") else text


def _unit_table(placement: placement_pb2.Placement, whole: bool) -> RenderableType | None:
    counts = {entry.unit: entry.ops for entry in placement.units if entry.ops}
    if not counts:
        counts = Counter(op.unit for op in placement.ops)
    if not counts:
        return _types_only(placement, whole)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for unit, ops in sorted(counts.items(), key=lambda item: (item[0] in ON_CPU, -item[1])):
        types: dict[str, int] = Counter(op.type for op in placement.ops if op.unit == unit)
        if not types and unit in ON_CPU and not set(ON_CPU) <= set(counts):
            types = dict(placement.cpu_op_types)
        table.add_row(unit_name(placement, unit), figures.plural(ops, "op"), _types(types, whole))
    return table


def _types_only(placement: placement_pb2.Placement, whole: bool) -> RenderableType | None:
    if not placement.cpu_op_types:
        return None
    return Text(f"CPU: {_types(dict(placement.cpu_op_types), whole)}")


def _types(types: dict[str, int], whole: bool) -> str:
    ordered = sorted(types.items(), key=lambda item: (-item[1], item[0]))
    shown = ordered if whole else ordered[:_TYPES_SHOWN]
    text = ", ".join(f"{name} {count}" if count > 1 else name for name, count in shown)
    more = len(ordered) - len(shown)
    return f"{text}, and {figures.plural(more, 'other type')}" if more else text


def _left_out(placement: placement_pb2.Placement, asked: str, more: str) -> Iterator[RenderableType]:
    """The ops that did not go where the others, or the user, wanted them."""
    ops = placement.ops
    wanted = asked != "cpu" or any(on_accelerator(op) for op in ops)
    timed = any(op.HasField("seconds") for op in ops)
    if wanted:
        left = [op for op in ops if not on_accelerator(op)]
        title = f"not on the accelerator{', the dearest first' if timed else ''}:"
    elif any(op.unit == placement_pb2.UNIT_CPU_DELEGATE for op in ops):
        left = [op for op in ops if op.unit != placement_pb2.UNIT_CPU_DELEGATE]
        title = (
            f"not taken by {unit_name(placement, placement_pb2.UNIT_CPU_DELEGATE).removesuffix(' (CPU)')}:"
        )
    else:
        left, title = [op for op in ops if op.unit == placement_pb2.UNIT_UNSPECIFIED], "not known where:"
    if not left:
        return
    if not timed and all(not (op.cause or op.remedy) for op in left) and len(left) == len(ops):
        return  # the list of everything says nothing that the counts don't
    yield Text(title, DOUBTFUL if wanted else "")
    # What costs most comes first; where that is not known, what stays because of itself: it can be mended.
    left.sort(key=lambda op: (-op.seconds, cause_rank(op)))
    yield _op_table(left[:_OPS_SHOWN], whole=False)
    if len(left) > _OPS_SHOWN:
        rest = sum(op.seconds for op in left[_OPS_SHOWN:])
        cost = f", {figures.seconds(rest)} together" if rest else ""
        hint = f": {more}" if more else ""
        yield Text(f"and {len(left) - _OPS_SHOWN:,} more{cost}{hint}", QUIET)


def _op_table(ops: Iterable[placement_pb2.OpPlacement], *, whole: bool) -> RenderableType:
    """A line an op; with ``whole``, its unit, its precision and all of its name, too."""
    ops = list(ops)
    timed = any(op.HasField("seconds") for op in ops)
    precise = whole and any(op.precision for op in ops)
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True, style=QUIET)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", style=QUIET)
    if whole:
        table.add_column(no_wrap=True)
    if precise:
        table.add_column(no_wrap=True)
    if timed:
        table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for op in ops:
        cells: list[RenderableType] = [f"#{op.index}", op.type, op.name if whole else short_name(op)]
        if whole:
            cells.append(Text(unit_of(op), DOUBTFUL if op.unit == placement_pb2.UNIT_UNSPECIFIED else ""))
        if precise:
            cells.append(op.precision or "–")
        if timed:
            cells.append(_cost(op))
        table.add_row(*cells, _reason(op))
    return table


def _cost(op: placement_pb2.OpPlacement) -> str:
    if not op.HasField("seconds"):
        return "–"
    # What is left of it after what measuring took: an op that takes no time there is not.
    return figures.seconds(op.seconds) if op.seconds else "too short"


def _reason(op: placement_pb2.OpPlacement) -> Text:
    text = Text()
    if op.HasField("root_cause") and op.root_cause:
        text.append("root cause" + (": " if op.cause else ""), DOUBTFUL)
    text.append(op.cause, "")
    if op.HasField("root_cause") and not op.root_cause:
        text.append(" (because of another op)" if op.cause else "because of another op", QUIET)
    if op.remedy:
        text.append(" → " if text else "→ ").append(op.remedy)
    return text
