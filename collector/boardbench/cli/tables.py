"""Lists of boards, runs, results and files as tables."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Group, RenderableType  # noqa: TID253 - this file owns the tables
from rich.padding import Padding  # noqa: TID253
from rich.table import Table  # noqa: TID253
from rich.text import Text  # noqa: TID253

from boardbench.cli import figures
from boardbench.cli.board import board_name, short_names
from boardbench.cli.plain import cleaned, printable
from boardbench.cli.report import EMULATORS, STAGES, emulators_of
from boardbench.cli.styles import BAD, DOUBTFUL, GOOD, QUIET, STRONG
from boardbench.cli.trust import validity_word
from boardbench.cli.verdict import device_asked, is_plain, percent, placement_known
from boardbench.v1 import (
    agent_pb2,
    board_pb2,
    collector_pb2,
    job_pb2,
    latency_pb2,
    placement_pb2,
    result_pb2,
    update_pb2,
)

_FIGURES = ("p50", "p90", "memory")
_NUMBERS = (*_FIGURES, "fallback", "size", "results")
_ID_DIGITS = 8  # `show` and `cancel` take the first digits of an id; 8 tell a million runs apart

_STATUS: dict[int, tuple[str, str]] = {
    result_pb2.RUN_STATUS_UNSPECIFIED: ("unknown", DOUBTFUL),
    result_pb2.RUN_STATUS_SUCCEEDED: ("done", GOOD),
    result_pb2.RUN_STATUS_FAILED: ("FAILED", BAD),
    result_pb2.RUN_STATUS_CANCELLED: ("cancelled", DOUBTFUL),
}


def _table(*columns: str, whole: Sequence[str] = ()) -> Table:
    """An empty table. Where the width does not do, any column but those in ``whole`` takes more lines."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=STRONG, show_edge=False, pad_edge=False)
    for column in columns:
        right = column in _NUMBERS
        table.add_column(
            column, justify="right" if right else "left", overflow="fold", no_wrap=right or column in whole
        )
    return table


def results_table(results: Iterable[result_pb2.RunResult]) -> RenderableType:
    """A line a result: when, where, what, how fast, how much memory, where its ops ran."""
    results = [cleaned(result) for result in results]
    boards = short_names(result.board for result in results)
    fallback = ["fallback"] if _any_fallback(results) else []
    table = _table(
        *("ended", "board", "model", "runtime", *_FIGURES, "accelerated", *fallback, "status", "run"),
        whole=("run",),
    )
    for result in results:
        ended = _time(result.finished_at if result.HasField("finished_at") else None)
        table.add_row(
            ended,
            boards[result.board.device_id],
            result.model.name,
            of_runtime(result),
            *_figures(result),
            accelerated(result),
            *([_fallback(result)] if fallback else []),
            status_of(result),
            result.run_id[:_ID_DIGITS],
        )
    return table


def comparison_table(results: Iterable[result_pb2.RunResult], cases: Sequence[str] = ()) -> RenderableType:
    """A line a result of one command, to be read from top to bottom.

    ``cases`` are what the results are called instead of by their models.
    """
    results = [cleaned(result) for result in results]
    boards = short_names(result.board for result in results)
    fallback = ["fallback"] if _any_fallback(results) else []
    named = "case" if cases else "model"
    table = _table(named, "board", "runtime", *_FIGURES, "accelerated", *fallback, "status")
    for place, result in enumerate(results):
        table.add_row(
            printable(cases[place]) if cases else result.model.name,
            boards[result.board.device_id],
            of_runtime(result),
            *_figures(result),
            accelerated(result),
            *([_fallback(result)] if fallback else []),
            status_of(result),
        )
    return table


def _figures(result: result_pb2.RunResult) -> tuple[str, str, str]:
    return (
        percentile(result.latency, 50),
        percentile(result.latency, 90),
        peak_memory(result),
    )


def of_runtime(result: result_pb2.RunResult) -> str:
    """The engine, and the device where that is not the CPU."""
    name = result.runtime.name or result.spec.runtime or "–"
    device = result.runtime.device or result.spec.device
    return f"{name} {device}" if device and device != "cpu" else name


def percentile(latency: latency_pb2.Latency, number: float) -> str:
    """The percentile as it is read; a dash where there is none."""
    for entry in latency.percentiles:
        if entry.percentile == number:
            return figures.seconds(entry.seconds)
    return "–"


def peak_memory(result: result_pb2.RunResult) -> str:
    """The highest peak of the worker."""
    memory = result.memory
    return figures.count_bytes(memory.peak_rss_bytes) if memory.HasField("peak_rss_bytes") else "–"


def accelerated(result: result_pb2.RunResult) -> Text:
    """How many of its operations an accelerator runs."""
    placement = result.placement
    if result.status != result_pb2.RUN_STATUS_SUCCEEDED and not result.HasField("placement"):
        return Text("–", QUIET)
    if placement.verdict == placement_pb2.PLACEMENT_VERDICT_CONTRADICTED:
        return Text("CONTRADICTED", BAD)
    if not placement_known(placement):
        return Text("unknown", DOUBTFUL)
    total = placement.accelerated_ops + placement.cpu_ops
    if placement.accelerated_ops == 0:
        return Text("no", "" if device_asked(result) == "cpu" else BAD)
    counts = f"{placement.accelerated_ops:,} of {total:,}"
    if placement.standin:
        return Text(f"{counts} (stand-in)", BAD)
    return Text(counts, GOOD if placement.cpu_ops == 0 else DOUBTFUL)


def _fallback(result: result_pb2.RunResult) -> Text:
    """Share of the time that goes into ops that did not get onto the accelerator."""
    if is_plain(result) or not result.placement.HasField("fallback_cost"):
        return Text("–", QUIET)
    cost = result.placement.fallback_cost
    return Text(f"{percent(cost.share)} %", DOUBTFUL if cost.share else GOOD)


def _any_fallback(results: Iterable[result_pb2.RunResult]) -> bool:
    """Whether there is anything to say in a column of its own."""
    return any(result.placement.HasField("fallback_cost") and not is_plain(result) for result in results)


def status_of(result: result_pb2.RunResult) -> Text:
    """How it ended, what it is worth, and that it was no real board."""
    word, style = _STATUS.get(result.status, ("unknown", DOUBTFUL))
    if result.HasField("error") and result.error.code:
        return Text(f"{word} {result.error.code}", style)
    worth, worth_style = validity_word(result)
    doubts = _doubts(result)
    is_worse = bool(result.warnings and worth) and result.validity != result_pb2.VALIDITY_VALID
    if is_worse:
        word, style = worth, worth_style
    marks = ["EMULATED"] if emulators_of(result) else []
    # One in the accelerator's place is told where the accelerator is.
    if not result.placement.standin and set(result.standins) - EMULATORS:
        marks.append("STAND-IN")
    text = Text(", ".join([*marks, word]), BAD if marks else style)
    if is_worse or doubts:
        text.append(f" ({figures.plural(doubts, 'warning')})", "" if is_worse else DOUBTFUL)
    return text


def _doubts(result: result_pb2.RunResult) -> int:
    """Number of warnings that are more than notes."""
    return sum(warning.severity != result_pb2.SEVERITY_NOTE for warning in result.warnings)


def devices_table(devices: Iterable[collector_pb2.Device]) -> RenderableType:
    """A line a board that the collector knows."""
    table = _table("board", "model", "up", "runs", "address", "queue", "results")
    # Below it: within, a sentence would make a column as wide as it is.
    problems: list[Text] = []
    now = datetime.datetime.now(datetime.timezone.utc)
    for device in map(cleaned, devices):
        board = device.board
        problems += [
            Text(f"{board_name(board)}: ", STRONG).append(problem, BAD) for problem in device.problems
        ]
        table.add_row(
            _who(device),
            _hardware(board),
            _up(device, now),
            _engines(device.runtimes),
            device.address or "–",
            _occupied(device),
            figures.whole(device.results),
        )
    return Group(table, *problems)


def device_page(device: collector_pb2.Device) -> RenderableType:
    """What the collector knows of a board, with every runtime and, for those that can't run, why not."""
    device = cleaned(device)
    now = datetime.datetime.now(datetime.timezone.utc)
    grid = _board_grid(device.board, dict(device.board.labels) | dict(device.labels), device.runtimes)
    grid.add_row("Agent", f"version {device.agent_version}" if device.agent_version else "–")
    if device.sensors:
        grid.add_row("Sensors", ", ".join(device.sensors))
    up = _up(device, now)
    if device.HasField("clock_offset_seconds"):
        up.append(f" · its clock is {device.clock_offset_seconds:+.3f} s off the collector's", QUIET)
    grid.add_row("Stream", up)
    grid.add_row("Queue", _occupied(device, ", "))
    grid.add_row("Results", figures.whole(device.results))
    for problem in device.problems:
        grid.add_row("Problem", Text(problem, BAD))
    head = Text(board_name(device.board), STRONG)
    if device.address:
        head.append(f" at {device.address}", "")
    return Group(head, Padding(grid, (0, 0, 1, 2)))


def _engines(statuses: Sequence[board_pb2.RuntimeStatus]) -> Text:
    """Those that can run, a line each, and how many can't: with all of them a fleet fills screens."""
    able = [status.name for status in statuses if status.available]
    text = Text("\n".join(able))
    lacking = len(statuses) - len(able)
    if lacking:
        text.append(f"\n{lacking} can't run" if able else f"none of {lacking}", QUIET if able else BAD)
    return text if statuses else Text("–")


def _who(device: collector_pb2.Device) -> Text:
    """The board's name, and its labels; the operator's go before the agent's."""
    text = Text(board_name(device.board), STRONG)
    labels = dict(device.board.labels) | dict(device.labels)
    for name, value in sorted(labels.items()):
        text.append(f"\n{name}={value}", QUIET)
    return text


def _occupied(device: collector_pb2.Device, between: str = "\n") -> Text:
    heartbeat = device.heartbeat
    text = Text(_queue(heartbeat.running_run_id, heartbeat.queued_runs))
    if not device.up:
        # What its last heartbeat said; what it does now is not known.
        text = Text(f"was {text}" if heartbeat.running_run_id or heartbeat.queued_runs else "–", QUIET)
    if device.open_jobs:
        text.append(f"{between}{figures.plural(device.open_jobs, 'job')}")
    if device.HasField("reservation"):
        text.append(f"{between}reserved by {device.reservation.holder}", DOUBTFUL)
    return text


def _up(device: collector_pb2.Device, now: datetime.datetime) -> Text:
    if device.up:
        return Text("up", GOOD)
    if not device.HasField("last_seen_at"):
        return Text("down", BAD)
    ago = (now - device.last_seen_at.ToDatetime(datetime.timezone.utc)).total_seconds()
    return Text(f"down, seen {figures.span(ago)} ago", BAD)


def _hardware(board: board_pb2.Board) -> Text:
    text = Text(", ".join(part for part in (board.model, board.soc, board.architecture) if part) or "–")
    if board.emulator in EMULATORS:
        text.append(f" EMULATED ({board.emulator})", BAD)
    elif board.emulator:
        text.append(f", virtual machine ({board.emulator})")
    for accelerator in board.accelerators:
        text.append(f"\n{accelerator.name or accelerator.kind}", BAD if accelerator.standin else GOOD)
        if accelerator.standin:
            text.append(" (stand-in)", BAD)
    return text


def _runtime_status(status: board_pb2.RuntimeStatus) -> Text:
    if not status.available:
        return Text(status.reason or "not available", DOUBTFUL)
    return Text(status.version)


def _queue(running: str, waiting: int) -> str:
    if not running and not waiting:
        return "idle"
    text = "running" if running else "idle"
    return f"{text}, {waiting:,} waiting" if waiting else text


def board_page(address: str, described: agent_pb2.DescribeResponse) -> RenderableType:
    """What a board says about itself: hardware, runtimes or why not, stores, link."""
    described = cleaned(described)
    board = described.board
    head = Text(f"{board_name(board) or address}", STRONG).append(f" at {address}", "")
    grid = _board_grid(board, board.labels, described.runtimes)
    grid.add_row("Agent", _agent(described))
    store, spool = described.model_store, described.spool
    grid.add_row(
        "Models",
        f"{figures.plural(store.files, 'file')}, {figures.count_bytes(store.used_bytes)} "
        f"of {figures.count_bytes(store.limit_bytes)} · "
        f"{figures.count_bytes(store.free_bytes)} free on its disk",
    )
    waiting = Text(f"{figures.plural(spool.pending, 'result')} to send")
    if spool.dropped:
        waiting.append(f" · {spool.dropped:,} had to be dropped", BAD)
    grid.add_row("Spool", waiting)
    grid.add_row("Collector", _link(described.collector))
    return Group(head, Padding(grid, (0, 0, 1, 2)))


def _board_grid(
    board: board_pb2.Board, labels: Mapping[str, str], runtimes: Sequence[board_pb2.RuntimeStatus]
) -> Table:
    """The rows with which the page of a board begins."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=STRONG, no_wrap=True)
    grid.add_column(overflow="fold")
    cpu = f"{board.cpu_count} × {board.cpu_model or board.architecture}" if board.cpu_count else ""
    memory = figures.count_bytes(board.memory_bytes) if board.memory_bytes else ""
    grid.add_row("Board", _hardware(board))
    grid.add_row("", " · ".join(part for part in (cpu, memory, board.os, board.kernel) if part))
    if labels:
        grid.add_row("Labels", " · ".join(f"{key}={value}" for key, value in sorted(labels.items())))
    grid.add_row("Runtimes", _runtimes(runtimes))
    return grid


def _runtimes(statuses: Sequence[board_pb2.RuntimeStatus]) -> RenderableType:
    if not statuses:
        return Text("none", BAD)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for status in statuses:
        name = Text(status.name, STRONG if status.available else "")
        mark = Text("✓", GOOD) if status.available else Text("✗", BAD)
        line = _runtime_status(status)
        if status.available:
            takes = ", ".join(status.formats)
            line.append(f"  {takes} on {', '.join(status.devices) or 'cpu'}", QUIET)
            if status.interpreter.version:
                line.append(f" · {status.interpreter.version}", QUIET)
        table.add_row(mark, name, line)
    return table


def _agent(described: agent_pb2.DescribeResponse) -> str:
    parts = [f"version {described.agent_version}"]
    if described.HasField("started_at"):
        parts.append(f"since {_time(described.started_at)}")
    parts.append(_queue(described.running_run_id, described.queued_runs))
    return " · ".join(parts)


def _link(link: agent_pb2.CollectorLinkStatus) -> Text:
    if not link.address:
        return Text("none: results stay on the board", QUIET)
    text = Text(f"{link.address} ")
    if link.connected:
        return text.append("connected", GOOD)
    return text.append(f"not connected: {link.error or 'trying'}", BAD)


def models_table(models: Iterable[agent_pb2.StoredModel]) -> RenderableType:
    """A line a file that a board keeps."""
    table = _table("sha256", "name", "format", "size", "used", "", whole=("sha256",))
    for stored in map(cleaned, models):
        inputs = stored.kind == agent_pb2.FILE_KIND_INPUTS
        table.add_row(
            stored.model.sha256[:12],
            stored.model.name,
            "inputs" if inputs else stored.model.format or "unknown",
            figures.count_bytes(stored.model.size_bytes),
            _time(stored.used_at if stored.HasField("used_at") else None),
            "in use" if stored.in_use else "",
        )
    return table


def runs_table(runs: Iterable[agent_pb2.RunSummary]) -> RenderableType:
    """A line a run of a board."""
    table = _table("run", "model", "accepted", "state", whole=("run",))
    for run in map(cleaned, runs):
        table.add_row(
            run.run_id[:_ID_DIGITS],
            run.model.name or run.model.sha256[:12],
            _time(run.created_at if run.HasField("created_at") else None),
            _state(run),
        )
    return table


_JOB_STATES: dict[int, tuple[str, str]] = {
    job_pb2.JOB_STATE_QUEUED: ("queued", QUIET),
    job_pb2.JOB_STATE_LEASED: ("leased", ""),
    job_pb2.JOB_STATE_RUNNING: ("running", STRONG),
    job_pb2.JOB_STATE_DONE: ("done", GOOD),
    job_pb2.JOB_STATE_CANCELLED: ("cancelled", DOUBTFUL),
    job_pb2.JOB_STATE_DEAD: ("DEAD", BAD),
}


def jobs_table(jobs: Iterable[job_pb2.Job], waits: Mapping[str, str] | None = None) -> RenderableType:
    """A line a job of a collector; ``waits`` says what some of them wait for, by their ids."""
    jobs = [cleaned(job) for job in jobs]
    tagged = ["tags"] if any(job.tags for job in jobs) else []
    columns = ("job", "board", "model", "submitted", "state", "tries", "by", *tagged, "")
    table = _table(*columns, whole=("job",))
    for job in jobs:
        tags = " ".join(f"{name}={value}" for name, value in sorted(job.tags.items()))
        table.add_row(
            job.job_id[:_ID_DIGITS],
            job.device_id,
            job.model.name or job.model.sha256[:12],
            _time(job.created_at if job.HasField("created_at") else None),
            _job_state(job),
            f"{job.attempts} of {job.max_attempts}" if job.max_attempts else f"{job.attempts}",
            job.holder,
            *([tags] if tagged else []),
            "; ".join(filter(None, (job.reason or job.progress, (waits or {}).get(job.job_id)))),
        )
    return table


def _job_state(job: job_pb2.Job) -> Text:
    if job.state == job_pb2.JOB_STATE_DONE and job.run_status == result_pb2.RUN_STATUS_FAILED:
        return Text("done, run FAILED", BAD)
    word, style = _JOB_STATES.get(job.state, ("unknown", DOUBTFUL))
    return Text(word, style)


def cases_table(rows: Iterable[tuple[str, ...]]) -> RenderableType:
    """A line a case of a suite."""
    table = _table("model", "runtime", "scenario", "boards", "there")
    for row in rows:
        table.add_row(*(cell or "–" for cell in row))
    return table


def reservations_table(reservations: Iterable[job_pb2.Reservation], *, ended: bool = False) -> RenderableType:
    """A line a board that is taken, or that is free again."""
    holder, until = ("given back by", "was taken until") if ended else ("holder", "until")
    table = _table("board", holder, until, "for")
    for reservation in map(cleaned, reservations):
        ends = reservation.ends_at if reservation.HasField("ends_at") else None
        table.add_row(reservation.device_id, reservation.holder, _time(ends), reservation.reason)
    return table


def update_table(update: update_pb2.Update, words: Callable[[update_pb2.BoardUpdate], str]) -> RenderableType:
    """A line a board."""
    table = _table("board", "from", "to", "first", "state")
    for board in map(cleaned, update.boards):
        first = "yes" if board.canary else ""
        table.add_row(board.device_id, board.from_version, update.version, first, words(board))
    return table


def updates_table(updates: Iterable[update_pb2.Update]) -> RenderableType:
    """A line an update."""
    table = _table("update", "begun", "release", "boards", "done", "state")
    for update in map(cleaned, updates):
        done = sum(1 for board in update.boards if board.state == update_pb2.UPDATE_STATE_DONE)
        is_open = any(board.state < update_pb2.UPDATE_STATE_DONE for board in update.boards)
        state = f"halted: {update.halted}" if update.halted else "going on" if is_open else "ended"
        begun = _time(update.created_at)
        table.add_row(update.update_id[:12], begun, update.version, str(len(update.boards)), str(done), state)
    return table


def _state(run: agent_pb2.RunSummary) -> Text:
    if run.state == agent_pb2.RUN_STATE_QUEUED:
        return Text("waiting", QUIET)
    if run.state == agent_pb2.RUN_STATE_RUNNING:
        stage = STAGES.get(run.stage) if run.stage else None
        return Text(f"running: {stage}" if stage else "running", STRONG)
    word, style = _STATUS.get(run.status, ("unknown", DOUBTFUL))
    return Text(word, style)


def _time(stamp: Timestamp | None) -> str:
    return "–" if stamp is None else figures.minute(stamp.ToDatetime(datetime.timezone.utc))
