"""What a board's examination found, as a page: the worst first, each with what to do about it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult  # noqa: TID253 - this file owns the page
from rich.text import Text  # noqa: TID253

from boardbench.cli import figures
from boardbench.cli.plain import cleaned
from boardbench.cli.styles import BAD, DOUBTFUL, GOOD, QUIET, STRONG
from boardbench.v1 import agent_pb2

_MARKS = {
    agent_pb2.FINDING_STATE_INVALID: ("✗", BAD),
    agent_pb2.FINDING_STATE_DOUBTFUL: ("!", DOUBTFUL),
    agent_pb2.FINDING_STATE_UNSPECIFIED: ("?", QUIET),
    agent_pb2.FINDING_STATE_OK: ("✓", GOOD),
    agent_pb2.FINDING_STATE_ABSENT: ("–", QUIET),
}
"""Mark and style by state, the worst first: the order in which they are shown."""

_UNKNOWN_STATE = ("?", QUIET)  # of a newer agent
_INDENT = 2


def doctor_page(
    address: str, examined: agent_pb2.ExamineResponse, *, fixing: bool = False, whole: bool = False
) -> DoctorPage:
    """The page. ``fixing``: --fix was given; ``whole``: what the board lacks has its lines, too."""
    return DoctorPage(address, cleaned(examined), fixing=fixing, whole=whole)


class DoctorPage:
    """Lines that are folded by words, but for commands: these must stay whole to be pasted."""

    def __init__(
        self, address: str, examined: agent_pb2.ExamineResponse, *, fixing: bool, whole: bool
    ) -> None:
        """``examined`` is safe for a terminal."""
        self._address = address
        self._examined = examined
        self._fixing = fixing
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Rich's own protocol."""
        findings = self._examined.findings
        yield from _folded(console, options, Text(), self._head(), 0)
        yield Text()
        absent = [each for each in findings if each.state == agent_pb2.FINDING_STATE_ABSENT]
        shown = [each for each in findings if self._whole or each not in absent]
        margin = _INDENT + 2 + max((len(each.code) for each in shown), default=0) + 2
        for finding in self._by_state(shown):
            yield from self._finding(console, options, finding, margin)
        if absent and not self._whole:
            names = ", ".join(each.code for each in absent)
            head = Text(" " * _INDENT).append(f"{_MARKS[agent_pb2.FINDING_STATE_ABSENT][0]} ", QUIET)
            yield from _folded(
                console, options, head, Text(f"not on this board: {names}", QUIET), _INDENT + 2
            )
        yield from self._settings(console, options)

    def _head(self) -> Text:
        states = [each.state for each in self._examined.findings]
        invalid = states.count(agent_pb2.FINDING_STATE_INVALID)
        doubtful = states.count(agent_pb2.FINDING_STATE_DOUBTFUL)
        text = Text(self._address, STRONG).append(": ", "")
        if not invalid and not doubtful:
            return text.append("fit to measure on", GOOD)
        counts = []
        if invalid:
            counts.append(f"{figures.plural(invalid, 'check')} would make figures invalid")
        if doubtful:
            counts.append(f"{doubtful} doubtful" if invalid else f"{figures.plural(doubtful, 'doubt')}")
        text.append("not fit to measure on", BAD if invalid else DOUBTFUL)
        return text.append(f": {', '.join(counts)}", "")

    @staticmethod
    def _by_state(findings: Sequence[agent_pb2.Finding]) -> list[agent_pb2.Finding]:
        order = list(_MARKS)
        return sorted(
            findings, key=lambda each: order.index(each.state) if each.state in order else len(order)
        )

    @staticmethod
    def _finding(
        console: Console, options: ConsoleOptions, finding: agent_pb2.Finding, margin: int
    ) -> Iterable[Text]:
        mark, style = _MARKS.get(finding.state, _UNKNOWN_STATE)
        head = Text(" " * _INDENT).append(f"{mark} ", style)
        head.append(finding.code.ljust(margin - _INDENT - 2), STRONG if style in (BAD, DOUBTFUL) else "")
        quiet = QUIET if style == QUIET else ""
        yield from _folded(console, options, head, Text(finding.message, quiet), margin)
        if finding.fix:
            yield Text(" " * margin).append(f"→ {finding.fix}", QUIET if style == GOOD else "")

    def _settings(self, console: Console, options: ConsoleOptions) -> Iterable[Text]:
        examined = self._examined
        if examined.changed:
            until = ""
            if examined.HasField("restored_at"):
                moment = examined.restored_at.ToDatetime(datetime.timezone.utc)
                until = f" until {figures.minute(moment)}, or --restore"
            yield Text()
            yield Text(f"Set{until}:", STRONG)
            yield from _listed(console, options, examined.changed)
        if examined.failed:
            yield Text()
            yield Text("Could not be set or put back:", BAD)
            # They end with the command to do it by hand.
            for line in examined.failed:
                yield Text(" " * _INDENT).append(line)
        fixable = [each.code for each in examined.findings if each.fixable]
        if fixable and not self._fixing:
            yield Text()
            line = f"--fix sets {', '.join(fixable)} for an hour and puts it back."
            yield from _folded(console, options, Text(), Text(line, QUIET), 0)


def _listed(console: Console, options: ConsoleOptions, lines: Iterable[str]) -> Iterable[Text]:
    for line in lines:
        yield from _folded(console, options, Text(" " * _INDENT), Text(line), _INDENT)


def _folded(console: Console, options: ConsoleOptions, head: Text, body: Text, margin: int) -> Iterable[Text]:
    """``body`` behind ``head`` and, where the width does not do, on lines of its own at the margin."""
    width = max(options.max_width - margin, 20)
    for number, line in enumerate(body.wrap(console, width)):
        line.rstrip()
        yield (head.copy() if number == 0 else Text(" " * margin)).append_text(line)
