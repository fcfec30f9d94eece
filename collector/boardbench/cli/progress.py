"""How far things are, drawn on stderr while somebody watches, and not at all otherwise."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from rich.progress import (  # noqa: TID253 - this file owns the bars
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text  # noqa: TID253

from boardbench.cli import figures
from boardbench.cli.plain import printable
from boardbench.cli.report import STAGES
from boardbench.cli.styles import DOUBTFUL, QUIET
from boardbench.cli.terminal import Output, console_for
from boardbench.v1 import agent_pb2

# Drawing costs processor time, and `boardbench run` draws on the machine that it measures.
_DRAWINGS_PER_SECOND = 4
_LABEL_WIDTH = 36
_PERCENT = re.compile(r"\s+(\d+) ?%$")
_PATIENT_SECONDS = 2.0  # a step that takes longer shows its time, so that nobody takes it as hung


class Watched(Protocol):
    """Takes note of how far jobs are. Jobs are named by a label; any thread may call."""

    def sending(self, job: str, sent_bytes: int, total_bytes: int) -> None:
        """A file is on its way."""

    def happened(self, job: str, event: agent_pb2.RunEvent) -> None:
        """Something happened in a run."""

    def doing(self, job: str, step: str) -> None:
        """A job of a collector is at this step."""

    def ended(self, job: str) -> None:
        """Nothing more comes of this job."""

    def note(self, text: str) -> None:
        """A line for a person."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, others may write to the terminal."""


class Unwatched:
    """Nobody looks: everything is ignored."""

    def sending(self, job: str, sent_bytes: int, total_bytes: int) -> None:
        """Ignored."""

    def happened(self, job: str, event: agent_pb2.RunEvent) -> None:
        """Ignored."""

    def doing(self, job: str, step: str) -> None:
        """Ignored."""

    def ended(self, job: str) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing."""
        return contextlib.nullcontext()

    def __enter__(self) -> Unwatched:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Does nothing."""


class _Detail(ProgressColumn):
    """What the bar can't show: speed of an upload, the interim median, seconds of a step."""

    def render(self, task: Task) -> Text:
        """The cell of one job."""
        detail = str(task.fields["detail"])
        if task.fields["upload"]:
            detail = (
                f"{figures.count_bytes(int(task.completed))} of {figures.count_bytes(int(task.total or 0))}"
            )
            if task.speed:
                detail += f"  {task.speed / 1e6:,.1f} MB/s"
        elif not detail:
            seconds = time.monotonic() - task.fields["since"]
            detail = figures.span(seconds) if seconds >= _PATIENT_SECONDS else ""
        return Text(detail, style=QUIET, no_wrap=True)


class Live:
    """Bars on a terminal, one a job, gone when it ends."""

    def __init__(self) -> None:
        """Draws nothing before it is entered."""
        self._console = console_for(sys.stderr)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[label]}", markup=False),
            TextColumn("{task.fields[step]}", markup=False, style="bold"),
            BarColumn(bar_width=16),
            _Detail(),
            console=self._console,
            transient=True,
            refresh_per_second=_DRAWINGS_PER_SECOND,
        )
        self._tasks: dict[str, tuple[TaskID | None, str]] = {}

    def sending(self, job: str, sent_bytes: int, total_bytes: int) -> None:
        """Draws an upload."""
        self._draw(job, "sending", completed=sent_bytes, total=total_bytes, upload=True)

    def happened(self, job: str, event: agent_pb2.RunEvent) -> None:
        """Draws the step that a run is in, or how far it is."""
        kind = event.WhichOneof("event")
        if kind == "queued":
            ahead = event.queued.runs_ahead
            step = f"waiting for {figures.plural(ahead, 'run')}" if ahead else "next in line"
            if not event.queued.HasField("runs_ahead"):
                step = "waiting for its group"
            self._draw(job, step, completed=0, total=None)
        elif kind == "stage":
            self._draw(job, STAGES.get(event.stage.stage, "running"), completed=0, total=None)
        elif kind == "progress":
            progress = event.progress
            detail = figures.plural(progress.runs, "run")
            if progress.HasField("median_seconds"):
                detail = f"p50 {figures.seconds(progress.median_seconds)}  {detail}"
            known = progress.HasField("fraction")
            self._draw(
                job,
                STAGES.get(progress.stage, "running"),
                completed=progress.fraction if known else 0,
                total=1.0 if known else None,
                detail=detail,
            )

    def doing(self, job: str, step: str) -> None:
        """Draws the step; a share of it in percent at its end is the bar."""
        found = _PERCENT.search(step)
        name = step if found is None else step[: found.start()]
        share = None if found is None else int(found[1]) / 100
        self._draw(job, printable(name), completed=share or 0.0, total=None if share is None else 1.0)

    def _draw(
        self,
        job: str,
        step: str,
        *,
        completed: float,
        total: float | None,
        detail: str = "",
        upload: bool = False,
    ) -> None:
        task, before = self._tasks.get(job, (None, ""))
        if task is None or before != step:
            # A new step is a new bar: it begins from nothing, and the speed of the one before must not count.
            if task is not None:
                self._progress.remove_task(task)
            task = self._progress.add_task(
                "",
                label=_label(job),
                step=step,
                since=time.monotonic(),
                detail="",
                upload=upload,
                total=total,
            )
            self._tasks[job] = task, step
        self._progress.update(task, completed=completed, total=total, detail=detail)

    def ended(self, job: str) -> None:
        """Takes the bar away."""
        task, _ = self._tasks.pop(job, (None, ""))
        if task is not None:
            self._progress.remove_task(task)

    def note(self, text: str) -> None:
        """Writes a line above the bars."""
        self._console.print(Text(printable(text, keep_lines=True), style=DOUBTFUL))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the bars away for a while."""
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    def __enter__(self) -> Live:
        """Draws."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes everything away and gives the cursor back."""
        self._progress.stop()


def _label(job: str) -> str:
    label = printable(job)
    half = _LABEL_WIDTH // 2
    return label if len(label) <= _LABEL_WIDTH else f"{label[:half]}…{label[1 - half :]}"


def progress_for(output: Output) -> Live | Unwatched:
    """Bars where somebody watches."""
    return Live() if output.shows_progress else Unwatched()
