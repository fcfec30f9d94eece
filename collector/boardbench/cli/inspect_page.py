"""The report on a model file as a page of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from boardbench.cli import figures
from boardbench.cli.grid import Column, Line, folded, grid, line
from boardbench.cli.plain import printable
from boardbench.cli.styles import BAD, DOUBTFUL, GOOD, QUIET, STRONG
from boardbench.inspect.report import (
    EdgeTpuReport,
    Evidence,
    Fit,
    ModelReport,
    OpPlacement,
    Placement,
    TensorInfo,
    Unit,
    Verdict,
)

_SECTION_WIDTH, _MARGIN = 10, 2
# A page is read, a list is searched: what is cut off is in `--full`.
_BYTES_SHOWN = 8
_OPS_SHOWN = 12
_TYPES_SHOWN = 10
_MORE = "--full shows all"

_UNITS: dict[Unit, str] = {
    Unit.UNSPECIFIED: "unknown",
    Unit.CPU: "CPU",
    Unit.CPU_DELEGATE: "CPU delegate",
    Unit.GPU: "GPU",
    Unit.TPU: "TPU",
    Unit.NPU: "NPU",
    Unit.DELEGATE: "delegate",
}


def inspect_page(report: ModelReport, width: int, *, whole: bool = False) -> Iterator[Line]:
    """The lines of the report, folded to ``width``; ``whole`` cuts nothing off."""
    yield from folded(_headline(report), width)
    room = width - _SECTION_WIDTH - 2 * _MARGIN
    for title, body in _sections(report, room, whole):
        for number, content in enumerate(body):
            head = "" if number else title
            yield [(" " * _MARGIN, ""), (f"{head:{_SECTION_WIDTH + _MARGIN}}", STRONG), *content]
    yield ()


def _headline(report: ModelReport) -> Line:
    version = f" {printable(report.format_version)}" if report.format_version else ""
    pieces = [
        (printable(report.name), STRONG),
        (f": {printable(report.format)}{version}, {figures.count_bytes(report.size_bytes)}", ""),
    ]
    if report.producer:
        pieces.append((f", by {printable(report.producer)}", QUIET))
    return pieces


def _sections(report: ModelReport, width: int, whole: bool) -> Iterator[tuple[str, Iterable[Line]]]:
    if report.placement is not None and report.placement.verdict is not Verdict.UNSPECIFIED:
        yield "Placement", _placement(report.placement, width, whole)
    for index, warning in enumerate(report.warnings):
        body = ((printable(warning.code), DOUBTFUL), (f": {printable(warning.message)}", ""))
        yield "" if index else "Warnings", folded(body, width)
    if report.edgetpu is not None:
        yield "Edge TPU", folded(line(_edgetpu(report.edgetpu)), width)
    yield "Inputs", _tensors(report.inputs, width)
    yield "Outputs", _tensors(report.outputs, width)
    if report.op_count is not None:
        told = f"{figures.whole(report.op_count)}: {_types(report.op_types, whole)}"
        yield "Ops", folded(line(told), width)
    size = _size(report)
    if size:
        yield "Size", folded(line(size), width)
    if report.bytes:
        yield "Bytes", _bytes(report, width, whole)
    for index, fit in enumerate(report.fits):
        yield "" if index else "Fits", folded(_fit(fit), width)
    if whole and report.ops:
        yield "All ops", _ops(report.ops, width, with_unit=True)
    yield "SHA-256", [line(report.sha256 if whole else report.sha256[:16], QUIET)]


def _placement(placement: Placement, width: int, whole: bool) -> Iterator[Line]:
    yield from folded(_verdict(placement), width)
    if placement.detail:
        yield from folded(line(printable(placement.detail)), width)
    left = [op for op in placement.ops if op.unit is not Unit.TPU]
    if left:
        # What stays because of itself comes first: that can be mended.
        left.sort(key=lambda op: op.root_cause is False)
        shown = left if whole else left[:_OPS_SHOWN]
        yield from _ops(shown, width, with_unit=False)
        if len(left) > len(shown):
            yield line(f"and {len(left) - len(shown):,} more: {_MORE}", QUIET)


def _verdict(placement: Placement) -> Line:
    word, style = {
        Verdict.ACCELERATED: ("accelerated: all ops on the TPU", GOOD),
        Verdict.PARTLY: ("PARTLY accelerated", DOUBTFUL),
        Verdict.NOT_ACCELERATED: ("NOT ACCELERATED: all ops on the CPU", BAD),
    }.get(placement.verdict, ("UNKNOWN", DOUBTFUL))
    if placement.accelerated_ops is not None and placement.verdict is Verdict.PARTLY:
        slow = placement.cpu_ops or 0
        total = placement.accelerated_ops + slow
        word += f": {placement.accelerated_ops:,} of {total:,} ops on the TPU, {slow:,} on the CPU"
    if placement.evidence is Evidence.PREDICTION:
        return ("predicted, not evidence: ", DOUBTFUL), (word, style)
    return (word, style), (" (read in the file)", QUIET)


def _ops(ops: Sequence[OpPlacement], width: int, *, with_unit: bool) -> Iterator[Line]:
    columns = [Column(QUIET, right=True), Column(), *([Column()] if with_unit else []), Column(folded=True)]
    rows = []
    for op in ops:
        unit = [line(_UNITS.get(op.unit, "unknown"))] if with_unit else []
        rows.append([line(f"#{op.index}"), line(printable(op.type)), *unit, _reason(op)])
    return grid(columns, rows, width)


def _reason(op: OpPlacement) -> Line:
    if not op.cause:
        # Fused ops carry the names of all that went into them.
        return line(printable(op.name.split(";", 1)[0]), QUIET)
    pieces = [("root cause: ", DOUBTFUL)] if op.root_cause else []
    pieces.append((printable(op.cause), "" if op.root_cause else QUIET))
    if op.remedy and op.root_cause:
        pieces.append((f" → {printable(op.remedy)}", ""))
    return pieces


def _edgetpu(report: EdgeTpuReport) -> str:
    parts = [
        figures.plural(report.nodes, "compiled subgraph"),
        f"{figures.count_bytes(report.parameters_cached_bytes)} of parameters cached",
        f"{figures.count_bytes(report.parameters_streamed_bytes)} streamed at every inference",
    ]
    if report.min_runtime_version is not None:
        parts.append(f"needs runtime {report.min_runtime_version} or newer")
    if report.scratch_bytes:
        parts.append(f"{figures.count_bytes(report.scratch_bytes)} of scratch")
    if report.chip:
        parts.append(f"for {printable(report.chip)}")
    return ", ".join(parts)


def _tensors(tensors: Sequence[TensorInfo], width: int) -> Iterable[Line]:
    if not tensors:
        return [line("none", QUIET)]
    rows = []
    for tensor in tensors:
        shape = ", ".join("?" if size < 0 else str(size) for size in tensor.shape)
        quantisation = ""
        if tensor.quantization is not None:
            scale, zero = tensor.quantization.scale, tensor.quantization.zero_point
            quantisation = f"scale {scale:.6g}, zero point {zero}"
        rows.append(
            [
                line(printable(tensor.name) or "–"),
                line(f"{printable(tensor.dtype)} ({shape})") if tensor.dtype else line("not told", QUIET),
                line(quantisation),
            ]
        )
    return grid([Column(folded=True), Column(), Column(QUIET)], rows, width)


def _types(types: Mapping[str, int], whole: bool) -> str:
    ordered = sorted(types.items(), key=lambda item: (-item[1], item[0]))
    shown = ordered if whole else ordered[:_TYPES_SHOWN]
    text = ", ".join(f"{count} {printable(name)}" for name, count in shown)
    return (
        f"{text}, and {figures.plural(len(ordered) - len(shown), 'other type')}"
        if len(shown) < len(ordered)
        else text
    )


def _size(report: ModelReport) -> str:
    parts = []
    if report.parameter_count is not None:
        parts.append(f"{figures.whole(report.parameter_count)} parameters")
    if report.multiply_accumulates is not None:
        parts.append(f"{figures.whole(report.multiply_accumulates)} multiply-accumulates an inference")
    if report.arena_estimate_bytes is not None:
        parts.append(f"about {figures.count_bytes(report.arena_estimate_bytes)} for tensors between ops")
    return ", ".join(parts)


def _bytes(report: ModelReport, width: int, whole: bool) -> Iterator[Line]:
    shown = list(report.bytes) if whole else list(report.bytes[:_BYTES_SHOWN])
    rows: list[list[Line]] = []
    for use in shown:
        pieces = [(" ".join(printable(part) for part in (use.purpose, use.dtype, use.op_type) if part), "")]
        if use.elements and use.zero_elements:
            pieces.append((f" ({use.zero_elements / use.elements:.1%} zero)", QUIET))
        rows.append([line(figures.count_bytes(use.size_bytes)), line(_share(use.size_bytes, report)), pieces])
    rest = sum(use.size_bytes for use in report.bytes[len(shown) :])
    if rest:
        rows.append(
            [line(figures.count_bytes(rest)), line(_share(rest, report)), line(f"others: {_MORE}", QUIET)]
        )
    return grid([Column(right=True), Column(QUIET, right=True), Column(folded=True)], rows, width)


def _share(size_bytes: int, report: ModelReport) -> str:
    return f"{size_bytes / max(1, report.size_bytes):.1%}"


def _fit(fit: Fit) -> Line:
    word, style = ("fits", GOOD) if fit.fits else ("DOES NOT FIT", BAD)
    return (
        (f"{printable(fit.target)}: ", ""),
        (word, style),
        (f", {figures.count_bytes(fit.needed_bytes)} of {figures.count_bytes(fit.available_bytes)}", ""),
        (f" ({printable(fit.detail)})", QUIET),
    )
