"""Engines as tables: those of a board for a model, and what they measured side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType  # noqa: TID253 - this file owns these tables
from rich.padding import Padding  # noqa: TID253
from rich.table import Table  # noqa: TID253
from rich.text import Text  # noqa: TID253

from boardbench.cli import figures, numerics
from boardbench.cli.engines import Choice, Row, computed_in
from boardbench.cli.plain import cleaned, printable
from boardbench.cli.styles import BAD, DOUBTFUL, GOOD, QUIET, STRONG
from boardbench.cli.tables import accelerated, of_runtime, peak_memory, percentile, status_of
from boardbench.v1 import board_pb2, result_pb2

_VERDICTS = {
    numerics.SAME: GOOD,
    numerics.CLOSE: GOOD,
    numerics.ROUGH: DOUBTFUL,
    numerics.DIFFERS: BAD,
    numerics.UNKNOWN: DOUBTFUL,
}


def engines_table(rows: Sequence[Row]) -> RenderableType:
    """A line an engine, the first that measured being what the outputs of the others are compared with."""
    told = [(row, cleaned(row.result)) for row in rows]
    precise = any(computed_in(result) for _, result in told)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=STRONG, show_edge=False, pad_edge=False)
    right = ("create", "first", "p50", "p90", "memory")
    columns = ["engine", *right, "accelerated", *(["computed in"] if precise else []), "outputs", "status"]
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=column in (*right, "engine"),
        )
    for row, result in told:
        table.add_row(
            of_runtime(result),
            _seconds(result, "create_seconds") + _warm(result),
            _seconds(result, "first_inference_seconds"),
            percentile(result.latency, 50),
            percentile(result.latency, 90),
            peak_memory(result),
            accelerated(result),
            *([computed_in(result) or "–"] if precise else []),
            _outputs(row, result),
            status_of(result),
        )
    notes = [
        Text.assemble((of_runtime(result), STRONG), "  ", result.error.message, style=QUIET)
        for _, result in told
        if result.HasField("error")
    ]
    name = told[0][1].model.name if told else ""
    return Group(Text(name, STRONG), table, *(Padding(note, (0, 0, 0, 2)) for note in notes))


def _warm(result: result_pb2.RunResult) -> str:
    return " (cached)" if any(cache.warm for cache in result.caches) else ""


def _seconds(result: result_pb2.RunResult, name: str) -> str:
    return figures.seconds(getattr(result, name)) if result.HasField(name) else "–"  # type: ignore[arg-type]


def _outputs(row: Row, result: result_pb2.RunResult) -> Text:
    difference = row.difference
    if difference is None:
        measured = result.status == result_pb2.RUN_STATUS_SUCCEEDED
        return Text("compared with" if measured else "–", QUIET)
    text = Text(difference.verdict, _VERDICTS[difference.verdict])
    if difference.greatest:
        share = difference.share or 0.0
        text.append(f" max |Δ| {figures.digits(difference.greatest, 2)} ({share:.2g} of the greatest)", "")
    elif difference.verdict == numerics.UNKNOWN:
        text.append(f": {difference.detail}", QUIET)
    return text


def choices_page(
    title: str, statuses: Sequence[board_pb2.RuntimeStatus], found: Sequence[Choice] | None
) -> RenderableType:
    """Which engines a board has; with ``found``, which of them can run a model, which it takes, and why."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style=STRONG)
    table.add_column(overflow="fold")
    if found is None:
        found = [Choice(status, "" if status.available else status.reason) for status in statuses]
        whole = True
    else:
        whole = False
    for choice in map(_cleaned, found):
        status = choice.status
        able = not choice.refusal
        mark = Text("✓", GOOD) if able else Text("✗", BAD)
        lines = Text(status.version if status.available else "", "")
        if not able:
            lines.append(("  " if status.available else "") + choice.refusal, DOUBTFUL)
        elif choice.default:
            lines.append("  the default: the first of this list that can run it", GOOD)
        if status.available:
            lines.append(f"\n{', '.join(status.devices)}", QUIET)
            if whole:
                lines.append(f" · {', '.join(status.formats)}", QUIET)
                if status.default_formats:
                    lines.append(f", the default for {', '.join(status.default_formats)}", QUIET)
            if status.settings:
                lines.append(f"\nsettings: {', '.join(status.settings)}", QUIET)
            if whole:
                for name, what in sorted(status.options.items()):
                    lines.append(f"\n{name}{'KEY' if name.endswith('.') else ''}  {what}", QUIET)
        table.add_row(mark, status.name, lines)
    body: RenderableType = table if found else Text("none", BAD)
    return Group(Text(printable(title), STRONG), Padding(body, (0, 0, 1, 2)))


def _cleaned(choice: Choice) -> Choice:
    return Choice(cleaned(choice.status), printable(choice.refusal), choice.default)
