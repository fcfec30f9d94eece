"""The report on a model file as a page of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rich.console import Group, RenderableType  # noqa: TID253 - this file owns the page
from rich.padding import Padding  # noqa: TID253
from rich.table import Table  # noqa: TID253
from rich.text import Text  # noqa: TID253

from boardbench.cli import figures
from boardbench.cli.plain import printable
from boardbench.cli.styles import BAD, DOUBTFUL, GOOD, QUIET, STRONG
from boardbench.v1 import model_pb2, placement_pb2, report_pb2

_SECTION_WIDTH = 10
# A page is read, a list is searched: what is cut off is in `--full`.
_BYTES_SHOWN = 8
_OPS_SHOWN = 12
_TYPES_SHOWN = 10
_MORE = "--full shows all"

_UNITS: dict[int, str] = {
    placement_pb2.UNIT_UNSPECIFIED: "unknown",
    placement_pb2.UNIT_CPU: "CPU",
    placement_pb2.UNIT_CPU_DELEGATE: "CPU delegate",
    placement_pb2.UNIT_GPU: "GPU",
    placement_pb2.UNIT_TPU: "TPU",
    placement_pb2.UNIT_NPU: "NPU",
    placement_pb2.UNIT_DELEGATE: "delegate",
}


def inspect_page(report: report_pb2.ModelReport, *, whole: bool = False) -> RenderableType:
    """The report as a page; ``whole`` cuts nothing off."""
    grid = Table.grid(padding=(0, 2), expand=False)
    grid.add_column(width=_SECTION_WIDTH, style=STRONG, no_wrap=True)
    grid.add_column(overflow="fold")
    for title, body in _sections(report, whole):
        grid.add_row(title, body)
    return Group(_headline(report), Padding(grid, (0, 0, 1, 2)))


def _headline(report: report_pb2.ModelReport) -> Text:
    text = Text(printable(report.name), STRONG)
    version = f" {printable(report.format_version)}" if report.format_version else ""
    text.append(f": {printable(report.format)}{version}, {figures.count_bytes(report.size_bytes)}", "")
    if report.producer:
        text.append(f", by {printable(report.producer)}", QUIET)
    return text


def _sections(report: report_pb2.ModelReport, whole: bool) -> Iterator[tuple[str, RenderableType]]:
    if report.HasField("placement") and report.placement.verdict != 0:
        yield "Placement", _placement(report, whole)
    for index, warning in enumerate(report.warnings):
        body = Text(printable(warning.code), DOUBTFUL).append(f": {printable(warning.message)}", "")
        yield "" if index else "Warnings", body
    if report.HasField("edgetpu"):
        yield "Edge TPU", Text(_edgetpu(report.edgetpu))
    yield "Inputs", _tensors(report.inputs)
    yield "Outputs", _tensors(report.outputs)
    if report.HasField("op_count"):
        yield "Ops", Text(f"{figures.whole(report.op_count)}: {_types(report.op_types, whole)}")
    size = _size(report)
    if size:
        yield "Size", Text(size)
    if report.bytes:
        yield "Bytes", _bytes(report, whole)
    for index, fit in enumerate(report.fits):
        yield "" if index else "Fits", _fit(fit)
    if whole and report.ops:
        yield "All ops", _ops(report.ops, with_unit=True)
    yield "SHA-256", Text(report.sha256 if whole else report.sha256[:16], QUIET)


def _placement(report: report_pb2.ModelReport, whole: bool) -> RenderableType:
    placement = report.placement
    parts: list[RenderableType] = [_verdict(placement)]
    if placement.detail:
        parts.append(Text(printable(placement.detail)))
    left = [op for op in placement.ops if op.unit != placement_pb2.UNIT_TPU]
    if left:
        # What stays because of itself comes first: that can be mended.
        left.sort(key=lambda op: op.HasField("root_cause") and not op.root_cause)
        shown = left if whole else left[:_OPS_SHOWN]
        parts.append(_ops(shown, with_unit=False))
        if len(left) > len(shown):
            parts.append(Text(f"and {len(left) - len(shown):,} more: {_MORE}", QUIET))
    return Group(*parts)


def _verdict(placement: placement_pb2.Placement) -> Text:
    word, style = {
        placement_pb2.PLACEMENT_VERDICT_ACCELERATED: ("accelerated: all ops on the TPU", GOOD),
        placement_pb2.PLACEMENT_VERDICT_PARTLY: ("PARTLY accelerated", DOUBTFUL),
        placement_pb2.PLACEMENT_VERDICT_NOT_ACCELERATED: ("NOT ACCELERATED: all ops on the CPU", BAD),
    }.get(placement.verdict, ("UNKNOWN", DOUBTFUL))
    if placement.HasField("accelerated_ops") and placement.verdict == placement_pb2.PLACEMENT_VERDICT_PARTLY:
        total = placement.accelerated_ops + placement.cpu_ops
        word += (
            f": {placement.accelerated_ops:,} of {total:,} ops on the TPU, {placement.cpu_ops:,} on the CPU"
        )
    text = Text(word, style)
    if placement.evidence == placement_pb2.EVIDENCE_PREDICTION:
        return Text("predicted, not evidence: ", DOUBTFUL).append_text(text)
    return text.append(" (read in the file)", QUIET)


def _ops(ops: Iterable[placement_pb2.OpPlacement], *, with_unit: bool) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True, style=QUIET)
    table.add_column(no_wrap=True)
    if with_unit:
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for op in ops:
        unit = [_UNITS.get(op.unit, "unknown")] if with_unit else []
        table.add_row(f"#{op.index}", printable(op.type), *unit, _reason(op))
    return table


def _reason(op: placement_pb2.OpPlacement) -> Text:
    if not op.cause:
        # Fused ops carry the names of all that went into them.
        return Text(printable(op.name.split(";", 1)[0]), QUIET)
    text = Text()
    if op.HasField("root_cause") and op.root_cause:
        text.append("root cause: ", DOUBTFUL)
    text.append(printable(op.cause), "" if op.root_cause else QUIET)
    if op.remedy and op.root_cause:
        text.append(" → ").append(printable(op.remedy))
    return text


def _edgetpu(report: report_pb2.EdgeTpuReport) -> str:
    parts = [
        figures.plural(report.nodes, "compiled subgraph"),
        f"{figures.count_bytes(report.parameters_cached_bytes)} of parameters cached",
        f"{figures.count_bytes(report.parameters_streamed_bytes)} streamed at every inference",
    ]
    if report.HasField("min_runtime_version"):
        parts.append(f"needs runtime {report.min_runtime_version} or newer")
    if report.scratch_bytes:
        parts.append(f"{figures.count_bytes(report.scratch_bytes)} of scratch")
    if report.chip:
        parts.append(f"for {printable(report.chip)}")
    return ", ".join(parts)


def _tensors(tensors: Iterable[model_pb2.TensorInfo]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style=QUIET)
    rows = 0
    for tensor in tensors:
        shape = ", ".join("?" if size < 0 else str(size) for size in tensor.shape)
        quantisation = ""
        if tensor.HasField("quantization"):
            scale, zero = tensor.quantization.scale, tensor.quantization.zero_point
            quantisation = f"scale {scale:.6g}, zero point {zero}"
        table.add_row(printable(tensor.name) or "–", f"{printable(tensor.dtype)} ({shape})", quantisation)
        rows += 1
    return table if rows else Text("none", QUIET)


def _types(types: Mapping[str, int], whole: bool) -> str:
    ordered = sorted(types.items(), key=lambda item: (-item[1], item[0]))
    shown = ordered if whole else ordered[:_TYPES_SHOWN]
    text = ", ".join(f"{count} {printable(name)}" for name, count in shown)
    return (
        f"{text}, and {figures.plural(len(ordered) - len(shown), 'other type')}"
        if len(shown) < len(ordered)
        else text
    )


def _size(report: report_pb2.ModelReport) -> str:
    parts = []
    if report.HasField("parameter_count"):
        parts.append(f"{figures.whole(report.parameter_count)} parameters")
    if report.HasField("multiply_accumulates"):
        parts.append(f"{figures.whole(report.multiply_accumulates)} multiply-accumulates an inference")
    if report.HasField("arena_estimate_bytes"):
        parts.append(f"about {figures.count_bytes(report.arena_estimate_bytes)} for tensors between ops")
    return ", ".join(parts)


def _bytes(report: report_pb2.ModelReport, whole: bool) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style=QUIET)
    table.add_column(overflow="fold")
    shown = list(report.bytes) if whole else list(report.bytes[:_BYTES_SHOWN])
    for use in shown:
        text = Text(" ".join(printable(part) for part in (use.purpose, use.dtype, use.op_type) if part))
        if use.HasField("zero_elements") and use.elements and use.zero_elements:
            text.append(f" ({use.zero_elements / use.elements:.1%} zero)", QUIET)
        table.add_row(
            figures.count_bytes(use.size_bytes), f"{use.size_bytes / max(1, report.size_bytes):.1%}", text
        )
    rest = sum(use.size_bytes for use in report.bytes[len(shown) :])
    if rest:
        table.add_row(
            figures.count_bytes(rest),
            f"{rest / max(1, report.size_bytes):.1%}",
            Text(f"others: {_MORE}", QUIET),
        )
    return table


def _fit(fit: report_pb2.Fit) -> Text:
    word, style = ("fits", GOOD) if fit.fits else ("DOES NOT FIT", BAD)
    return (
        Text(f"{printable(fit.target)}: ")
        .append(word, style)
        .append(
            f", {figures.count_bytes(fit.needed_bytes)} of {figures.count_bytes(fit.available_bytes)}", ""
        )
        .append(f" ({printable(fit.detail)})", QUIET)
    )
