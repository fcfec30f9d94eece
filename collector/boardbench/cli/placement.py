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
from boardbench.v1 import placement_pb2

# An output of twelve lines is read; a longer one is searched, and for that there is `show`.
_OPS_SHOWN = 12
_TYPES_SHOWN = 8

_EVIDENCE: dict[int, str] = {
    placement_pb2.EVIDENCE_STATIC: "read in the model file, not seen running",
    placement_pb2.EVIDENCE_PARTITION: "asked of the runtime after loading",
    placement_pb2.EVIDENCE_PROFILED: "seen per op under a profiler",
    placement_pb2.EVIDENCE_COUNTERS: "told by the accelerator's counters",
    placement_pb2.EVIDENCE_HOST_CPU: "told by CPU time against wall time",
    placement_pb2.EVIDENCE_PREDICTION: "predicted by rule: nothing of it was seen running",
}

_UNITS: dict[int, str] = {
    placement_pb2.UNIT_UNSPECIFIED: "unknown",
    placement_pb2.UNIT_CPU: "CPU",
    placement_pb2.UNIT_CPU_DELEGATE: "CPU delegate",
    placement_pb2.UNIT_GPU: "GPU",
    placement_pb2.UNIT_TPU: "TPU",
    placement_pb2.UNIT_NPU: "NPU",
    placement_pb2.UNIT_DELEGATE: "delegate",
}

_ON_CPU = (placement_pb2.UNIT_CPU, placement_pb2.UNIT_CPU_DELEGATE)


def placement_block(
    placement: placement_pb2.Placement, *, asked: str, whole: bool, more: str
) -> RenderableType:
    """Verdict, evidence, counts by unit, and the ops that stayed behind, or with ``whole`` every op.

    ``asked`` is the device that was wanted; ``more`` says how to see what was cut off.
    """
    placement = cleaned(placement)
    verdict = _verdict(placement, asked)
    if placement.evidence != placement_pb2.EVIDENCE_UNSPECIFIED:
        known = _EVIDENCE.get(placement.evidence, "known in a way that this version does not know")
        verdict.append(f" ({known})", QUIET)
    parts: list[RenderableType] = [verdict]
    if placement.detail:
        parts.append(Text(placement.detail))
    units = _unit_table(placement, whole)
    if units is not None:
        parts.append(units)
    if whole and placement.ops:
        parts.append(_op_table(placement.ops))
    elif placement.ops:
        parts.extend(_left_out(placement, asked, more))
    return Group(*parts)


def _verdict(placement: placement_pb2.Placement, asked: str) -> Text:
    known = placement_known(placement)
    total = placement.accelerated_ops + placement.cpu_ops
    if placement.verdict == placement_pb2.PLACEMENT_VERDICT_CONTRADICTED:
        return Text("CONTRADICTED: two kinds of evidence say different things", BAD)
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
    units = _accelerator_names(placement)
    if placement.standin:
        text = (
            f"a stand-in took {placement.accelerated_ops:,} of {figures.plural(total, 'op')}, no hardware did"
        )
        return Text(text, BAD)
    if placement.cpu_ops == 0:
        return Text(f"accelerated: all {figures.plural(total, 'op')} on the {units}", GOOD)
    return Text(
        f"PARTLY accelerated: {placement.accelerated_ops:,} of {figures.plural(total, 'op')} on the {units}, "
        f"{placement.cpu_ops:,} on the CPU",
        DOUBTFUL,
    )


def _accelerator_names(placement: placement_pb2.Placement) -> str:
    names = [
        _unit_name(placement, entry.unit) for entry in placement.units if entry.unit not in (*_ON_CPU, 0)
    ]
    return " and the ".join(names) or "accelerator"


def _unit_name(placement: placement_pb2.Placement, unit: int) -> str:
    name = _UNITS.get(unit, "unknown")
    if unit in (placement_pb2.UNIT_CPU_DELEGATE, placement_pb2.UNIT_DELEGATE):
        delegates = sorted({op.delegate for op in placement.ops if op.unit == unit and op.delegate})
        if delegates:
            return (
                f"{', '.join(delegates)} (CPU)"
                if unit == placement_pb2.UNIT_CPU_DELEGATE
                else ", ".join(delegates)
            )
    return name


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
    for unit, ops in sorted(counts.items(), key=lambda item: (item[0] in _ON_CPU, -item[1])):
        types: dict[str, int] = Counter(op.type for op in placement.ops if op.unit == unit)
        if not types and unit in _ON_CPU and not set(_ON_CPU) <= set(counts):
            types = dict(placement.cpu_op_types)
        table.add_row(_unit_name(placement, unit), figures.plural(ops, "op"), _types(types, whole))
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
    accelerated = [op for op in ops if op.unit not in (*_ON_CPU, placement_pb2.UNIT_UNSPECIFIED)]
    if accelerated or asked != "cpu":
        left = [op for op in ops if op.unit in (*_ON_CPU, placement_pb2.UNIT_UNSPECIFIED)]
        title = "not on the accelerator:"
    elif any(op.unit == placement_pb2.UNIT_CPU_DELEGATE for op in ops):
        left = [op for op in ops if op.unit != placement_pb2.UNIT_CPU_DELEGATE]
        title = (
            f"not taken by {_unit_name(placement, placement_pb2.UNIT_CPU_DELEGATE).removesuffix(' (CPU)')}:"
        )
    else:
        left, title = [op for op in ops if op.unit == placement_pb2.UNIT_UNSPECIFIED], "not known where:"
    if not left:
        return
    if all(not (op.cause or op.remedy) for op in left) and len(left) == len(ops):
        return  # the list of everything says nothing that the counts don't
    yield Text(title, DOUBTFUL if accelerated or asked != "cpu" else "")
    # Those that stay because of themselves come first: they are what can be mended.
    left.sort(key=lambda op: op.HasField("root_cause") and not op.root_cause)
    yield _op_table(left[:_OPS_SHOWN], with_unit=False)
    if len(left) > _OPS_SHOWN:
        yield Text(f"and {len(left) - _OPS_SHOWN:,} more" + (f": {more}" if more else ""), QUIET)


def _op_table(ops: Iterable[placement_pb2.OpPlacement], *, with_unit: bool = True) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True, style=QUIET)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", style=QUIET)
    if with_unit:
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for op in ops:
        unit = (
            [Text(_op_unit(op), DOUBTFUL if op.unit == placement_pb2.UNIT_UNSPECIFIED else "")]
            if with_unit
            else []
        )
        table.add_row(f"#{op.index}", op.type, op.name, *unit, _reason(op))
    return table


def _op_unit(op: placement_pb2.OpPlacement) -> str:
    if op.unit == placement_pb2.UNIT_CPU_DELEGATE and op.delegate:
        return f"{op.delegate} (CPU)"
    if op.unit == placement_pb2.UNIT_DELEGATE and op.delegate:
        return op.delegate
    return _UNITS.get(op.unit, "unknown")


def _reason(op: placement_pb2.OpPlacement) -> Text:
    text = Text(op.cause)
    if op.HasField("root_cause") and not op.root_cause:
        text.append(" (because of another op)" if op.cause else "because of another op")
    if op.remedy:
        text.append(" → " if text else "→ ").append(op.remedy)
    return text


def placement_known(placement: placement_pb2.Placement) -> bool:
    """Whether it is known where the ops ran, by something stronger than a prediction."""
    return (
        placement.HasField("accelerated_ops")
        and placement.HasField("cpu_ops")
        and placement.evidence not in (placement_pb2.EVIDENCE_UNSPECIFIED, placement_pb2.EVIDENCE_PREDICTION)
    )
