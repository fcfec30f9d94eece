"""The page at ``/``: which boards there are and what they measured last. Plain HTML, no script."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from urllib.parse import quote

from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.collector.store import scenario_parts
from boardbench.v1 import collector_pb2, job_pb2, placement_pb2, result_pb2

STYLE = """\
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .5rem; text-align: left; border-bottom: 1px solid #8884; }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, .whole { white-space: nowrap; }
td.long { min-width: 8rem; overflow-wrap: anywhere; }
.good { color: #1a7f37; } .bad { color: #c0392b; } .doubt { color: #9a6700; }
code { font-family: ui-monospace, monospace; font-size: .92em; }
@media (prefers-color-scheme: dark) {
  .good { color: #57c785; } .bad { color: #ff7b72; } .doubt { color: #e3b341; }
}
"""

_COLUMNS = {"#": "number", "=": "whole", "~": "long"}

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>boardbench collector</title>
<link rel="stylesheet" href="/style.css">
</head>
<body>
<h1>boardbench collector</h1>
<p>Version {version}.
For Prometheus: <a href="/metrics"><code>/metrics</code></a>.
For programs: <a href="/api/v1/devices"><code>/api/v1/devices</code></a>,
<a href="/api/v1/results?summary=true"><code>/api/v1/results</code></a>,
<a href="/api/v1/jobs"><code>/api/v1/jobs</code></a>.
Health: <a href="/healthz"><code>/healthz</code></a>.</p>
<h2>Boards</h2>
{devices}
<h2>Jobs</h2>
{jobs}
<h2>Latest results</h2>
{results}
</body>
</html>
"""


def index_page(
    devices: Sequence[collector_pb2.Device],
    results: Sequence[result_pb2.RunResult],
    jobs: Sequence[job_pb2.Job],
    *,
    version: str,
    now: float,
) -> str:
    """Returns the page as HTML; every text from outside is escaped."""
    return _PAGE.format(
        version=escape(version),
        devices=_devices_table(devices, now),
        jobs=_jobs_table(jobs, now),
        results=_results_table(results),
    )


def _devices_table(devices: Sequence[collector_pb2.Device], now: float) -> str:
    if not devices:
        return (
            "<p>None has reported yet. On a board: "
            "<code>boardbench-agent serve --collector THIS_MACHINE:7342</code></p>"
        )
    rows = [
        (
            _board(device.board.device_id),
            escape(device.board.model or device.board.hostname),
            '<span class="good">connected</span>' if device.up else '<span class="bad">gone</span>',
            f"{_ago(now - device.last_seen_at.ToNanoseconds() / 1e9)}",
            escape(", ".join(runtime.name for runtime in device.runtimes if runtime.available) or "none"),
            f"{device.results:,}",
            f"{device.open_jobs:,}",
            escape(device.reservation.holder) if device.HasField("reservation") else "–",
            _problems(device),
        )
        for device in devices
    ]
    return _table(
        (
            *("board", "what it is", "stream", "last heard of", "runtimes", "#results", "#open jobs"),
            *("reserved by", "~problems"),
        ),
        rows,
    )


_RECORDED_SENSORS = "recorded-sensors"
"""What an agent says whose sensors are a folder."""

_LONG_IDENTITY = 32
"""Identities that are made have 16 letters; one that was chosen is broken where it is longer than this."""


def _board(device_id: str) -> str:
    """Returns the identity; browsers would break rack-7-pi-03 at each hyphen."""
    kind = ' class="whole"' if len(device_id) <= _LONG_IDENTITY else ""
    return f"<code{kind}>{escape(device_id)}</code>"


def _problems(device: collector_pb2.Device) -> str:
    """Returns what is wrong with a board beside that it is gone, which its stream says."""
    told = [problem for problem in device.problems if not problem.startswith("it is not connected")]
    return f'<span class="bad">{escape("; ".join(told))}</span>' if told else "–"


_JOB_STATES = {
    job_pb2.JOB_STATE_QUEUED: "waits",
    job_pb2.JOB_STATE_LEASED: "is on the board",
    job_pb2.JOB_STATE_RUNNING: '<span class="good">runs</span>',
    job_pb2.JOB_STATE_DONE: "done",
    job_pb2.JOB_STATE_CANCELLED: "cancelled",
    job_pb2.JOB_STATE_DEAD: '<span class="bad">given up</span>',
}


def _jobs_table(jobs: Sequence[job_pb2.Job], now: float) -> str:
    if not jobs:
        return "<p>None yet. <code>boardbench push MODEL --via THIS_MACHINE:7342 --on board=pi5</code></p>"
    rows = []
    for job in jobs:
        state = _JOB_STATES.get(job.state, "not known")
        if job.run_status == result_pb2.RUN_STATUS_FAILED and job.state == job_pb2.JOB_STATE_DONE:
            state = 'done: <span class="bad">the run failed</span>'
        run = "–"
        if job.state == job_pb2.JOB_STATE_DONE:
            link = f"/api/v1/results/{quote(job.run_id, safe='')}"
            run = f'<a href="{escape(link)}"><code>{escape(job.run_id[:8])}</code></a>'
        here = f"/api/v1/jobs/{quote(job.job_id, safe='')}"
        rows.append(
            (
                f'<a href="{escape(here)}"><code>{escape(job.job_id[:8])}</code></a>',
                _board(job.device_id),
                escape(job.model.name),
                state,
                escape(job.progress or job.reason),
                f"{job.attempts} of {job.max_attempts}",
                escape(job.holder) or "–",
                _ago(now - job.created_at.ToNanoseconds() / 1e9),
                run,
            )
        )
    return _table(
        ("job", "board", "~model", "state", "~what of it", "#attempts", "for", "submitted", "run"), rows
    )


def _results_table(results: Sequence[result_pb2.RunResult]) -> str:
    if not results:
        return "<p>None yet. <code>boardbench push MODEL --to BOARD</code> makes one.</p>"
    rows = []
    for result in results:
        link = f"/api/v1/results/{quote(result.run_id, safe='')}"
        rows.append(
            (
                f'<a href="{escape(link)}"><code>{escape(result.run_id[:8])}</code></a>',
                escape(_when(result.finished_at)),
                _board(result.board.device_id),
                escape(result.model.name),
                _how(result),
                _ending(result),
                _percentile(result, 50),
                _percentile(result, 99),
                _energy(result),
                _verdict(result),
                _placement(result),
                _fallback(result.placement),
                f'<span class="doubt">{escape(", ".join(_doubts(result)))}</span>',
            )
        )
    return _table(
        (
            *("run", "=ended (UTC)", "board", "~model", "runtime", "ending", "#p50", "#p99", "#energy"),
            *("accelerated", "~operations", "#fallback", "~doubts"),
        ),
        rows,
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table; cells are HTML already.

    A heading that begins with # is of numbers, with = of what stays on one line, with ~ of long texts that
    may be broken anywhere, so that a file's name of 60 letters doesn't push the figures off the page.
    """
    classes = [f' class="{_COLUMNS[heading[0]]}"' if heading[0] in _COLUMNS else "" for heading in headings]
    head = "".join(
        f"<th{kind}>{escape(heading.lstrip(''.join(_COLUMNS)))}</th>"
        for heading, kind in zip(headings, classes, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, classes, strict=True)) + "</tr>"
        for row in rows
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="scroll">{table}</div>'


def _how(result: result_pb2.RunResult) -> str:
    """Returns the engine and its device; and the scenario, where latency is another quantity by it."""
    engine = " ".join(part for part in (result.runtime.name, result.runtime.device) if part)
    return escape(", ".join(part for part in (engine, *scenario_parts(result.spec)) if part))


def _ending(result: result_pb2.RunResult) -> str:
    if result.status == result_pb2.RUN_STATUS_SUCCEEDED:
        doubts = len(_doubts(result))
        if result.validity == result_pb2.VALIDITY_INVALID:
            others = [name for name in result.standins if name != _RECORDED_SENSORS]
            on = f": not hardware but {', '.join(map(escape, others))}" if others else ""
            # With these the time is a machine's, and heat, clocks and power are not.
            on += ", sensors of a folder" if len(others) < len(result.standins) else ""
            return f'succeeded, <span class="bad">INVALID{on}</span>'
        if result.validity == result_pb2.VALIDITY_VALID and not doubts:
            return '<span class="good">valid</span>'
        if not doubts:
            return '<span class="good">succeeded</span>'
        worth = "doubtful: " if result.validity == result_pb2.VALIDITY_DOUBTFUL else "succeeded, "
        return f'<span class="doubt">{worth}{doubts} doubt{"s" if doubts > 1 else ""}</span>'
    if result.status == result_pb2.RUN_STATUS_FAILED:
        return f'<span class="bad">failed</span>: {escape(result.error.code)}'
    if result.status == result_pb2.RUN_STATUS_CANCELLED:
        return "cancelled"
    return '<span class="doubt">not known</span>'


def _doubts(result: result_pb2.RunResult) -> list[str]:
    codes = [warning.code for warning in result.warnings if warning.severity != result_pb2.SEVERITY_NOTE]
    return codes + [f"stand-in {name}" for name in result.standins]


def _percentile(result: result_pb2.RunResult, which: float) -> str:
    if result.status != result_pb2.RUN_STATUS_SUCCEEDED:
        return "–"
    for percentile in result.latency.percentiles:
        if percentile.percentile == which:
            return f"{percentile.seconds * 1e3:,.3f} ms"
    return "–"


def _energy(result: result_pb2.RunResult) -> str:
    """Returns the energy of one inference, idle subtracted."""
    if not result.energy.HasField("energy_per_inference_joules"):
        return "–"
    return f"{result.energy.energy_per_inference_joules * 1e3:,.3f} mJ"


_VERDICTS = {
    placement_pb2.PLACEMENT_VERDICT_ACCELERATED: '<span class="good">yes</span>',
    placement_pb2.PLACEMENT_VERDICT_PARTLY: '<span class="doubt">partly</span>',
    placement_pb2.PLACEMENT_VERDICT_NOT_ACCELERATED: '<span class="bad">no</span>',
    placement_pb2.PLACEMENT_VERDICT_CONTRADICTED: '<span class="bad">contradicted</span>',
}


def _verdict(result: result_pb2.RunResult) -> str:
    """Returns whether an accelerator did the work; a stand-in for one never counts as one."""
    if result.status != result_pb2.RUN_STATUS_SUCCEEDED:
        return "–"
    placement = result.placement
    asked = result.spec.device or result.runtime.device or "cpu"
    if asked == "cpu" and placement.verdict == placement_pb2.PLACEMENT_VERDICT_NOT_ACCELERATED:
        return "not asked for"
    text = _VERDICTS.get(placement.verdict, '<span class="doubt">not known</span>')
    if placement.standin or result.accelerator.standin:
        return f'<span class="bad">stand-in</span>: {text}'
    return text


def _fallback(placement: placement_pb2.Placement) -> str:
    """Returns the share of the time that goes into operations on the CPU, with its bounds."""
    if not placement.HasField("fallback_cost"):
        return "–"
    cost = placement.fallback_cost
    return f"{cost.share:.0%} <small>({cost.share_low:.0%}–{cost.share_high:.0%})</small>"


def _placement(result: result_pb2.RunResult) -> str:
    placement = result.placement
    counts = []
    for count in placement.units:
        known = count.unit in placement_pb2.Unit.values() and count.unit
        name = placement_pb2.Unit.Name(count.unit).removeprefix("UNIT_").lower() if known else "unknown"
        counts.append(f"{count.ops} {name.replace('_', ' ')}")
    if placement.evidence == placement_pb2.EVIDENCE_UNSPECIFIED or not counts:
        if result.status in (result_pb2.RUN_STATUS_FAILED, result_pb2.RUN_STATUS_CANCELLED):
            return "–"  # it did not get that far
        return '<span class="doubt">not known</span>'
    return escape(", ".join(counts))


def _when(time: Timestamp) -> str:
    moment = datetime.fromtimestamp(time.seconds, timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s ago"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min ago"
    if seconds < 172800:
        return f"{seconds / 3600:.0f} h ago"
    return f"{seconds / 86400:.0f} days ago"
