"""Tables, checks and the machine's description, the same for every benchmark here."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = Path(os.environ.get("BOARDBENCH_MODELS", REPOSITORY.parent / "shared" / "models"))


@dataclasses.dataclass
class Check:
    """A figure and the bound that it must keep."""

    what: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        sign = "≥" if self.at_least else "≤"
        verdict = "ok" if self.holds else "MISSED"
        return f"{verdict}: {self.what}: {self.value:.4g} {self.unit} ({sign} {self.limit:g})"


@dataclasses.dataclass
class Report:
    """What one benchmark found."""

    name: str
    method: str
    columns: Sequence[str]
    rows: list[Sequence[Any]]
    checks: list[Check]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        cells = [list(self.columns), *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(self.columns))]
        lines = [f"== {self.name}", self.method, ""]
        for number, row in enumerate(cells):
            lines.append(
                "  ".join(
                    cell.ljust(width) if place == 0 else cell.rjust(width)
                    for place, (cell, width) in enumerate(zip(row, widths, strict=True))
                ).rstrip()
            )
            if number == 0:
                lines.append("  ".join("-" * width for width in widths))
        return "\n".join([*lines, "", *(check.line() for check in self.checks)])

    def markdown(self) -> str:
        rows = [[_cell(value) for value in row] for row in self.rows]
        table = [list(self.columns), ["---", *["---:"] * (len(self.columns) - 1)], *rows]
        return "\n".join(
            [
                f"### {self.name[0].upper()}{self.name[1:]}\n\n{self.method}\n",
                *("| " + " | ".join(row) + " |" for row in table),
                "",
                *(f"- {check.line()}" for check in self.checks),
            ]
        )

    def json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "method": self.method,
            "columns": list(self.columns),
            "rows": [list(row) for row in self.rows],
            "checks": [dataclasses.asdict(check) | {"holds": check.holds} for check in self.checks],
            "details": self.details,
        }


Measure = Callable[[argparse.Namespace], Report]


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("model name", "Model"))
        ),
        platform.processor() or platform.machine(),
    )
    installed = {each.name: each.version for each in metadata.distributions()}
    names = (
        "boardbench",
        "ai-edge-litert",
        "onnxruntime",
        "openvino",
        "mlcommons-loadgen",
        "numpy",
        "grpcio",
        "protobuf",
    )
    packages = {name: installed.get(name) for name in names}
    return {
        "cpu": cpu,
        "processors": os.cpu_count(),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "packages": packages,
    }


def run(
    benchmarks: Sequence[tuple[Measure, Callable[[argparse.ArgumentParser], None]]],
    description: str,
    *,
    section: str | Sequence[str],
) -> int:
    """Parses the command line, measures, prints; 0 when every check holds, else 1.

    ``section`` is the part of README.md that ``--readme`` replaces: from ``<!-- SECTION: …`` to
    ``<!-- end of SECTION -->``; one for all benchmarks, or one for each.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--readme", action="store_true", help="write the figures into README.md as well")
    for _, add_arguments in benchmarks:
        add_arguments(parser)
    arguments = parser.parse_args()
    before = machine()
    print(", ".join(f"{key} {value}" for key, value in before.items() if key != "packages"))
    print(", ".join(f"{key} {value}" for key, value in before["packages"].items() if value), flush=True)
    reports = []
    for measure, _ in benchmarks:
        report = measure(arguments)
        reports.append(report)
        print(f"\n{report.text()}", flush=True)
    if arguments.json:
        found = {"machine": before, "reports": [report.json() for report in reports]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.readme and isinstance(section, str):
        _write_readme(before, reports, section)
    elif arguments.readme:
        for each, report in zip(section, reports, strict=True):
            _write_readme(before, [report], each)
    return 0 if all(check.holds for report in reports for check in report.checks) else 1


def _write_readme(before: dict[str, Any], reports: Sequence[Report], section: str) -> None:
    path = Path(__file__).with_name("README.md")
    text = path.read_text()
    begin = next(line for line in text.splitlines(keepends=True) if line.startswith(f"<!-- {section}: "))
    end = f"<!-- end of {section} -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    packages = ", ".join(f"{name} {version}" for name, version in before["packages"].items() if version)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    machine_line = (
        f"{today}: {before['cpu']}, {before['processors']} processors, "
        f"{before['architecture']}, Linux {before['kernel']}, Python {before['python']}, load average "
        f"{before['load_average']:.2f} at the start; {packages}."
    )
    figures = "\n\n".join([machine_line, *(report.markdown() for report in reports)])
    path.write_text(f"{head}{begin}\n{figures}\n\n{end}{tail}")


def note(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
