"""Writes the pages of docs/generated from the tables in the code: ``generate.py [FOLDER]``.

A test generates them again and compares, so every command, option, setting, metric, engine and warning
of the code is in the documentation, with the words of the code.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from boardbench.agent.bench.doubts import DOUBTS, thresholds
from boardbench.agent.bench.runtimes import ENGINES
from boardbench.agent.board.checks import CHECKS
from boardbench.agent.cli import parser as agent_parser
from boardbench.agent.validity import RULES
from boardbench.cli.errors import EXIT_CODES
from boardbench.cli.main import boardbench
from boardbench.cli.require_names import FLAGS, NAMES, PERCENTILES, PERCENTILES_MEANING, VALUES
from boardbench.collector.cli import main as boardbench_collector
from boardbench.collector.jobs import RUN_LOST
from boardbench.collector.metrics import LABELS, METRICS
from boardbench.collector.terms import BOARDS, MEANINGS
from boardbench.inspect.doubts import WARNINGS as REPORT_WARNINGS

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent


def pages() -> dict[str, str]:
    """Every generated page by its file name."""
    found = {
        "boardbench.md": _commands("boardbench", boardbench) + _exit_codes(),
        "boardbench-collector.md": _commands("boardbench-collector", boardbench_collector),
        "boardbench-agent.md": _agent_commands(),
        "metrics.md": _metrics(),
        "terms.md": _terms(),
        "warnings.md": _warnings(),
        "checks.md": _checks(),
        "agent-configuration.md": _agent_configuration(),
        "engines.md": _engines(),
        "requirements.md": _requirements(),
        "report-warnings.md": _report_warnings(),
    }
    return {name: text.rstrip() + "\n" for name, text in found.items()}


def _terms() -> str:
    names = _table(("term", "value"), [(f"`{name}=…`", meaning) for name, meaning in MEANINGS.items()])
    boards = _table(("short name", "boards"), [(f"`{name}`", boards) for name, boards, _ in BOARDS])
    again = ", ".join(f"`{code}`" for code in sorted(RUN_LOST))
    attempts = f"Runs that failed with one of these codes get another attempt: {again}.\n"
    return f"{names}{boards}<!-- attempts -->\n\n{attempts}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return _row(*head) + "|" + "---|" * len(head) + "\n" + "".join(_row(*row) for row in rows) + "\n"


def _commands(name: str, command: click.Command) -> str:
    return "".join(_command(name, command, None))


def _command(path: str, command: click.Command, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, info_name=path.rsplit(" ", 1)[-1], parent=parent)
    yield f"## {path}\n\n"
    usage = " ".join(piece for piece in command.collect_usage_pieces(context))
    yield f"    {path} {usage}\n\n"
    if command.help:
        yield inspect.cleandoc(click.unstyle(command.help).replace("\b", "")) + "\n\n"
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record and record[1]:
            rows.append((f"`{record[0]}`", record[1]))
    if rows:
        yield _table(("option", "meaning"), rows)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from _command(f"{path} {name}", child, context)


def _agent_commands() -> str:
    """The agent parses with argparse; its parsers hold the same facts."""
    commands = next(a for a in agent_parser()._actions if isinstance(a, argparse._SubParsersAction))
    text = ""
    for name, parser in commands.choices.items():
        rows = [
            (f"`{', '.join(action.option_strings) or action.metavar}{_argument(action)}`", action.help or "")
            for action in parser._actions
            if action.dest != "help"
        ]
        text += f"## boardbench-agent {name}\n\n{parser.description}\n\n"
        text += _table(("option", "meaning"), rows)
    return text


def _argument(action: argparse.Action) -> str:
    if not action.option_strings or action.nargs == 0:
        return ""
    return " " + str(action.metavar or "{" + ",".join(map(str, action.choices or ())) + "}")


def _exit_codes() -> str:
    rows = [(str(code.value), meaning) for code, meaning in EXIT_CODES.items()]
    return "## Exit codes\n\n" + _table(("code", "meaning"), rows)


def _metrics() -> str:
    rows = [
        (f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.meaning)
        for metric in METRICS
    ]
    labels = [(f"`{label}`", meaning) for label, meaning in LABELS.items()]
    return (
        _table(("metric", "kind", "labels", "meaning"), rows)
        + "## Labels\n\n"
        + _table(("label", "meaning"), labels)
    )


def _warnings() -> str:
    found = [
        (
            f"`{doubt.code}`",
            doubt.condition,
            doubt.severity.value.removeprefix("SEVERITY_").lower(),
            doubt.reason,
            doubt.remedy,
        )
        for doubt in DOUBTS
    ]
    limits = [(f"`{name}`", f"`{default:g}`", meaning) for name, default, meaning in thresholds()]
    around = [(f"`{rule.code}`", rule.condition, rule.severity, rule.reason, rule.remedy) for rule in RULES]
    return (
        "## Found by the worker\n\n"
        + _table(("code", "when", "severity", "why there", "what to do"), found)
        + "## Where the worker's doubts begin\n\n"
        + _table(("threshold", "default", "of"), limits)
        + "## Found around the worker\n\n"
        + _table(("code", "when", "severity", "why", "what to do"), around)
    )


def _checks() -> str:
    rows = [(f"`{check.code}`", check.subject, check.doubt) for check in CHECKS]
    return _table(("check", "looks at", "not fit"), rows)


def _requirements() -> str:
    rows = [
        (f"`{flag.name}`", "", "a run or a file" if flag.file else "a run", flag.meaning) for flag in FLAGS
    ]
    rows += [
        (f"`{name.name}`", VALUES[name.kind], "a run or a file" if name.file else "a run", name.meaning)
        for name in NAMES
    ]
    rows.append((PERCENTILES, VALUES["seconds"], "a run", PERCENTILES_MEANING))
    return _table(("name", "compared with", "told by", "meaning"), rows)


def _report_warnings() -> str:
    return _table(("code", "when"), [(f"`{code}`", when) for code, when in REPORT_WARNINGS.items()])


def _engines() -> str:
    rows = [
        (engine.name, ", ".join(engine.formats), f"`{engine.module}`")
        for engine in ENGINES
        if not engine.environment  # test engines are offered on request only
    ]
    return _table(("engine", "formats", "module"), rows)


def _agent_configuration() -> str:
    path = SOURCES / "agent" / "boardbench" / "agent" / "config.py"
    return "".join(_settings(path.read_text()))


# The class of each table in agent.toml, in the order of the page.
_TABLES = {
    "AgentConfig": "",
    "StoreConfig": "store",
    "SpoolConfig": "spool",
    "JobsConfig": "jobs",
    "RunsConfig": "runs",
    "DeadlinesConfig": "deadlines",
    "SpecConfig": "spec",
    "SensorsConfig": "sensors",
    "ValidityConfig": "validity",
    "RuntimeConfig": "runtimes.NAME",
}


def _settings(source: str) -> Iterator[str]:
    """A table a class: key, default as the source has it, and the comment above it."""
    lines = source.splitlines()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    for name, table in _TABLES.items():
        node = classes[name]
        rows = []
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            default = ast.unparse(field.value) if field.value is not None else ""
            if ast.unparse(field.annotation) in classes or "RuntimeConfig" in ast.unparse(field.annotation):
                continue  # a table of its own
            comment = []
            at = field.lineno - 2
            while lines[at].strip().startswith("#"):
                comment.insert(0, lines[at].strip().lstrip("# "))
                at -= 1
            rows.append((f"`{field.target.id}`", f"`{_default(default)}`", " ".join(comment)))
        title = f"## [{table}]" if table else "## Top level"
        yield f"{title}\n\n" + _table(("key", "default", "why"), rows)


def _default(expression: str) -> str:
    if "default_data_dir" in expression:
        return "/var/lib/boardbench, or ~/.local/state/boardbench"
    if expression == "field(default_factory=dict)":
        return "{}"
    expression = expression.replace("Path('/')", "'/'")
    return expression.replace("_MIB", "MiB").replace("_GIB", "GiB").replace("'", '"')


def main(folder: Path) -> None:
    """Writes every page into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "generated")
