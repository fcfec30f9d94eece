"""Which engines of a board can run a model, and all of them side by side: ``--runtime all``."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from boardbench.cli import numerics
from boardbench.cli.errors import ExitCode
from boardbench.cli.spec import Spec
from boardbench.v1 import board_pb2, model_pb2, result_pb2

if TYPE_CHECKING:
    from boardbench.cli.terminal import Output

ALL = "all"
"""In the place of a runtime's name."""

OUTPUT_VALUES = 16384
"""Elements of outputs that each result holds to be compared: a thousand classes, a tenth of a megabyte."""

NOT_RUNNABLE = "not_runnable"


@dataclass(frozen=True)
class Choice:
    """An engine that takes a model's format, and why it can't run it here; empty when it can."""

    status: board_pb2.RuntimeStatus
    refusal: str = ""
    default: bool = False
    """Whether it is the one that is taken when none is asked for."""

    @property
    def name(self) -> str:
        """Of the engine."""
        return self.status.name


def choices(statuses: Iterable[board_pb2.RuntimeStatus], model_format: str, spec: Spec) -> list[Choice]:
    """Every engine that takes the format, in the board's order, with what it would refuse of the spec."""
    takers = [status for status in statuses if model_format in status.formats]
    named = [status.name for status in takers if model_format in status.default_formats]
    first = named or [status.name for status in takers if status.available][:1]
    return [Choice(status, _refusal(status, spec), status.name in first) for status in takers]


def _refusal(status: board_pb2.RuntimeStatus, spec: Spec) -> str:
    if not status.available:
        return status.reason or "it is not available"
    asked = {
        "threads": spec.threads,
        "cpu_affinity": spec.affinity,
        "compute_precision": spec.compute,
        "cache": spec.cache if spec.cache != "none" else "",
    }
    # An engine that names no setting at all is of an agent that does not tell.
    missed = [
        name for name, value in asked.items() if value and status.settings and name not in status.settings
    ]
    if missed:
        return f"it takes no {' and no '.join(missed)}"
    # One that is given as a library brings its device along.
    brings_one = "delegate" in spec.options or "provider_library" in spec.options
    if spec.device and spec.device not in status.devices and not brings_one:
        return f"it has no device {spec.device} here; it has {', '.join(status.devices)}"
    known = [name for name in status.options if not name.endswith(".")]
    prefixes = tuple(name for name in status.options if name.endswith("."))
    foreign = [
        name
        for name in spec.options
        if status.options and name not in known and not name.startswith(prefixes)
    ]
    return f"it has no option {', '.join(foreign)}" if foreign else ""


def spec_for(choice: Choice, spec: Spec) -> Spec:
    """The spec for one of all engines."""
    return replace(spec, runtime=choice.name, output_values=OUTPUT_VALUES)


def default_line(found: Sequence[Choice], model_name: str) -> str:
    """Which engine is taken, and which could be; empty where there is nothing to choose from."""
    able = [choice for choice in found if not choice.refusal]
    default = next((choice for choice in able if choice.default), None)
    others = [choice.name for choice in able if choice is not default]
    if default is None or not others:
        return ""
    return (
        f"{model_name}: {default.name}, this board's default for it; {', '.join(others)} can run it, too "
        "(--runtime NAME, or --runtime all)"
    )


def refused(choice: Choice, model: model_pb2.Model, spec: Spec) -> result_pb2.RunResult:
    """A result that says that this engine did not run it, and why."""
    result = result_pb2.RunResult(
        status=result_pb2.RUN_STATUS_FAILED,
        model=model,
        error=result_pb2.RunError(code=NOT_RUNNABLE, message=choice.refusal),
    )
    result.spec.CopyFrom(spec_for(choice, spec).message())
    result.runtime.name, result.runtime.version = choice.name, choice.status.version
    result.runtime.device = spec.device
    return result


@dataclass(frozen=True)
class Row:
    """An engine's run in a comparison."""

    result: result_pb2.RunResult
    difference: numerics.Difference | None = None
    """From the first that measured; None for that one, and where nothing was measured."""
    reference: str = ""
    """The runtime that the difference is from."""

    def as_json(self) -> dict[str, Any]:
        """The row for :mod:`json`; what is not known is left out."""
        result = self.result
        found: dict[str, Any] = {
            "model": result.model.name,
            "board": result.board.device_id,
            "runtime": result.runtime.name or result.spec.runtime,
            "version": result.runtime.version,
            "device": result.runtime.device,
            "run_id": result.run_id,
            "status": result_pb2.RunStatus.Name(result.status),
        }
        if result.HasField("error"):
            found["reason"] = result.error.message
        for name in ("create_seconds", "first_inference_seconds"):
            if result.HasField(name):
                found[name] = getattr(result, name)
        for percentile in result.latency.percentiles:
            if percentile.percentile in (50, 90):
                found[f"p{percentile.percentile:g}_seconds"] = percentile.seconds
        if result.memory.HasField("peak_rss_bytes"):
            found["peak_rss_bytes"] = result.memory.peak_rss_bytes
        for name in ("accelerated_ops", "cpu_ops"):
            if result.placement.HasField(name):  # type: ignore[arg-type]
                found[name] = getattr(result.placement, name)
        if precision := computed_in(result):
            found["computed_in"] = precision
        if self.difference is not None:
            difference = {
                "from": self.reference,
                "verdict": self.difference.verdict,
                "detail": self.difference.detail,
                "greatest": self.difference.greatest,
                "share": self.difference.share,
                "output": self.difference.output or None,
                "compared": self.difference.compared,
                "elements": self.difference.of,
            }
            found["difference"] = {
                name: value
                for name, value in difference.items()
                if value is not None and value != float("inf")
            }
        return found


def rows(results: Sequence[result_pb2.RunResult]) -> list[Row]:
    """The runs of one model on one board, each set against the first that measured."""
    measured = [result for result in results if result.status == result_pb2.RUN_STATUS_SUCCEEDED]
    reference = measured[0] if measured else None
    found = []
    for result in results:
        if reference is None or result is reference or result.status != result_pb2.RUN_STATUS_SUCCEEDED:
            found.append(Row(result))
        else:
            found.append(Row(result, numerics.compare(reference, result), reference.runtime.name))
    return found


def computed_in(result: result_pb2.RunResult) -> str:
    """The precisions in which operations were executed, that of most first; empty where that is not told."""
    counts = collections.Counter(op.precision for op in result.placement.ops if op.precision)
    return ", ".join(precision for precision, _ in counts.most_common(3))


def conclude(groups: Sequence[Sequence[result_pb2.RunResult]], output: Output) -> ExitCode:
    """Shows each group of runs, of one model on one board, side by side; DONE when each has a measurement."""
    compared = [rows(results) for results in groups if results]
    if output.json:
        import json
        import sys

        from boardbench.cli.terminal import as_json

        document = {
            "engines": [row.as_json() for group in compared for row in group],
            "results": [as_json(row.result) for group in compared for row in group if row.result.run_id],
        }
        ascii_only = (sys.stdout.encoding or "ascii").lower().replace("-", "") != "utf8"
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n")
    else:
        from boardbench.cli.engine_table import engines_table

        for group in compared:
            output.show(engines_table(group), table=True)
    done = all(
        any(row.result.status == result_pb2.RUN_STATUS_SUCCEEDED for row in group) for group in compared
    )
    return ExitCode.DONE if done and compared else ExitCode.FAILED
