"""What a measurement is worth and what it went through, as blocks of a result's page."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType  # noqa: TID253 - this file owns these blocks
from rich.table import Table  # noqa: TID253
from rich.text import Text  # noqa: TID253

from boardbench.cli import figures
from boardbench.cli.styles import BAD, DOUBTFUL, GOOD, QUIET, STRONG
from boardbench.v1 import result_pb2, scenario_pb2, telemetry_pb2

_VALIDITY: dict[int, tuple[str, str, str]] = {
    result_pb2.VALIDITY_VALID: ("✓", "valid", GOOD),
    result_pb2.VALIDITY_DOUBTFUL: ("!", "DOUBTFUL", DOUBTFUL),
    result_pb2.VALIDITY_INVALID: ("✗", "INVALID", BAD),
}
_SEVERITY_STYLES: dict[int, str] = {
    result_pb2.SEVERITY_UNSPECIFIED: DOUBTFUL,
    result_pb2.SEVERITY_NOTE: QUIET,
    result_pb2.SEVERITY_DOUBTFUL: DOUBTFUL,
    result_pb2.SEVERITY_INVALID: BAD,
}
_SCENARIOS: dict[int, str] = {
    scenario_pb2.SCENARIO_KIND_OFFLINE: "offline",
    scenario_pb2.SCENARIO_KIND_PERIODIC: "periodic",
    scenario_pb2.SCENARIO_KIND_POISSON: "poisson",
    scenario_pb2.SCENARIO_KIND_MULTI_STREAM: "multi-stream",
    scenario_pb2.SCENARIO_KIND_SUSTAINED: "sustained",
}
_MOST_WINDOWS = 12
"""Windows of a sustained run on the short page: two hours of them fill a screen."""


def validity_word(result: result_pb2.RunResult) -> tuple[str, str]:
    """One word and its style, for tables; empty where nothing was measured."""
    _, word, style = _VALIDITY.get(result.validity, ("", "", ""))
    return word, style


def validity_mark(result: result_pb2.RunResult) -> tuple[str, str]:
    """The mark before a run that was measured, and its style."""
    mark, _, style = _VALIDITY.get(result.validity, ("✓", "", GOOD))
    return f"{mark} ", style


def validity_line(result: result_pb2.RunResult) -> Text | None:
    """What the measurement is worth, and by which warnings; None where all is well, or nothing known."""
    if result.validity not in (result_pb2.VALIDITY_DOUBTFUL, result_pb2.VALIDITY_INVALID):
        return None
    _, word, style = _VALIDITY[result.validity]
    wanted = (
        (result_pb2.SEVERITY_INVALID,)
        if result.validity == result_pb2.VALIDITY_INVALID
        else (result_pb2.SEVERITY_DOUBTFUL, result_pb2.SEVERITY_UNSPECIFIED)
    )
    codes = list(dict.fromkeys(warning.code for warning in result.warnings if warning.severity in wanted))
    what = "don't compare these figures" if result.validity == result_pb2.VALIDITY_INVALID else "with care"
    return Text(f"{word} measurement ({what}): {', '.join(codes) or 'see the warnings'}", style)


def sorted_warnings(result: result_pb2.RunResult) -> list[result_pb2.Warning]:
    """The worst first, otherwise in their order."""
    rank = {result_pb2.SEVERITY_INVALID: 0, result_pb2.SEVERITY_NOTE: 2}
    return sorted(result.warnings, key=lambda warning: rank.get(warning.severity, 1))


def warning_style(warning: result_pb2.Warning) -> str:
    """Style of a warning by its severity."""
    return _SEVERITY_STYLES.get(warning.severity, DOUBTFUL)


def stopping_line(result: result_pb2.RunResult) -> Text | None:
    """How precise the percentiles became that a precision was asked for; None where none was."""
    targets = result.stopping.targets
    if not targets:
        return None
    text = Text()
    for index, target in enumerate(targets):
        text.append(" · " if index else "")
        name = figures.percentile_name(target.percentile)
        if not target.HasField("reached_ratio"):
            text.append(f"{name}: too few inferences for bounds (asked ±{_percent(target.asked_ratio)})", BAD)
            continue
        held = target.reached_ratio <= target.asked_ratio
        text.append(
            f"{name} ±{_percent(target.reached_ratio)} (asked ±{_percent(target.asked_ratio)})",
            GOOD if held else DOUBTFUL,
        )
    ended = {
        result_pb2.STOP_REASON_PRECISION: "reached, and that ended it",
        result_pb2.STOP_REASON_DURATION: "the time was over first",
        result_pb2.STOP_REASON_RUNS: "the number of inferences was reached first",
    }.get(result.stopping.reason, "")
    return text.append(f" · {ended}", QUIET) if ended else text


def warm_up_words(result: result_pb2.RunResult) -> str:
    """The warm-up in a few words; empty when there was none."""
    if not result.HasField("warm_up") or not result.warm_up.runs:
        return ""
    warm_up = result.warm_up
    words = f"warm-up {figures.plural(warm_up.runs, 'run')} in {figures.seconds(warm_up.seconds)}"
    if warm_up.HasField("steady"):
        words += ", steady" if warm_up.steady else ", NOT steady at its end"
    return words


def processes_block(result: result_pb2.RunResult, *, whole: bool) -> RenderableType | None:
    """The processes that measured; None for one."""
    processes = result.processes
    if len(processes.processes) < 2:
        return None
    count = figures.plural(len(processes.processes), "process", "processes")
    text = Text(count)
    if processes.HasField("agree"):
        text.append(" agree" if processes.agree else " DISAGREE", GOOD if processes.agree else DOUBTFUL)
    if processes.HasField("spread_ratio"):
        text.append(f" · medians within ±{_percent(processes.spread_ratio)}")
    if processes.HasField("median_low_seconds") and processes.HasField("median_high_seconds"):
        low, high = processes.median_low_seconds, processes.median_high_seconds
        length, sign = figures.seconds_unit(high)
        text.append(
            f" · other processes too: {figures.digits(low / length)} … {figures.digits(high / length)} {sign}"
        )
    if processes.detail:
        text.append(f" · {processes.detail}", QUIET)
    if not whole:
        return text
    table = Table.grid(padding=(0, 2))
    for column in range(5):
        table.add_column(justify="left" if column == 4 else "right", no_wrap=column < 4)
    table.add_row(
        *(Text(name, QUIET) for name in ("process", "p50", "create", "first", "")),
    )
    for position, process in enumerate(processes.processes, 1):
        table.add_row(
            str(position),
            figures.seconds(process.median_seconds),
            figures.seconds(process.create_seconds) if process.HasField("create_seconds") else "–",
            figures.seconds(process.first_inference_seconds)
            if process.HasField("first_inference_seconds")
            else "–",
            figures.plural(process.count, "inference") + ("" if process.pooled else ", not pooled"),
        )
    return Group(text, table)


def scenario_block(result: result_pb2.RunResult, *, whole: bool) -> RenderableType | None:
    """What the scenario adds; None in single stream."""
    if not result.HasField("scenario"):
        return None
    scenario = result.scenario
    name = _SCENARIOS.get(scenario.kind)
    if name is None:
        return None
    parts: list[RenderableType] = [Text.assemble((name, STRONG), _scenario_words(result, scenario))]
    if scenario.HasField("deadline_misses"):
        parts.append(_deadlines(result, scenario))
    if scenario.HasField("service") and scenario.service.count:
        medians = {entry.percentile: entry.seconds for entry in scenario.service.percentiles}
        told = " · ".join(
            f"{figures.percentile_name(p)} {figures.seconds(medians[p])}"
            for p in (50, 90, 99)
            if p in medians
        )
        parts.append(Text(f"in the engine alone, waiting left out: {told}"))
    if scenario.windows:
        parts.append(_windows(scenario, whole))
    if scenario.HasField("slowdown_ratio"):
        parts.append(_slowdown(scenario))
    return Group(*parts)


def _scenario_words(result: result_pb2.RunResult, scenario: scenario_pb2.ScenarioResult) -> str:
    asked = result.effective_spec.scenario if result.HasField("effective_spec") else result.spec.scenario
    words = ""
    if asked.HasField("rate_hertz"):
        words += f" at {asked.rate_hertz:g} Hz"
    if scenario.kind == scenario_pb2.SCENARIO_KIND_MULTI_STREAM and asked.HasField("streams"):
        words += f", {figures.plural(asked.streams, 'sample')} a query: the latency is a query's"
    if scenario.kind == scenario_pb2.SCENARIO_KIND_OFFLINE:
        if asked.HasField("batch"):
            words += f", batch {asked.batch}"
        if asked.HasField("streams") and asked.streams > 1:
            words += f", {figures.plural(asked.streams, 'instance')} side by side"
    if scenario.kind in (scenario_pb2.SCENARIO_KIND_PERIODIC, scenario_pb2.SCENARIO_KIND_POISSON):
        words += ": latency from the due start"
    if scenario.HasField("throughput_hertz"):
        words += f" · {figures.digits(scenario.throughput_hertz)} inferences/s"
        if scenario.HasField("throughput_low_hertz") and scenario.HasField("throughput_high_hertz"):
            low, high = scenario.throughput_low_hertz, scenario.throughput_high_hertz
            words += f" ({figures.digits(low)} … {figures.digits(high)})"
    return words


def _deadlines(result: result_pb2.RunResult, scenario: scenario_pb2.ScenarioResult) -> Text:
    misses = scenario.deadline_misses
    count = result.latency.count
    text = Text(
        f"{figures.whole(misses)} of {figures.whole(count)} missed the deadline",
        BAD if misses else GOOD,
    )
    if scenario.HasField("deadline_seconds"):
        text.append(f" of {figures.seconds(scenario.deadline_seconds)}")
    if scenario.HasField("most_waiting"):
        text.append(f" · at most {figures.whole(scenario.most_waiting)} waiting", "")
    if scenario.HasField("worst_start_delay_seconds"):
        text.append(f" · timers up to {figures.seconds(scenario.worst_start_delay_seconds)} late", QUIET)
    return text


def _windows(scenario: scenario_pb2.ScenarioResult, whole: bool) -> RenderableType:
    windows = list(scenario.windows)
    half = _MOST_WINDOWS // 2
    left_out = 0 if whole else max(0, len(windows) - _MOST_WINDOWS)
    table = Table.grid(padding=(0, 2))
    for _ in range(6):
        table.add_column(justify="right", no_wrap=True)
    table.add_row(*(Text(name, QUIET) for name in ("from", "p50", "heat", "clock", "power", "")))
    for index, window in enumerate(windows):
        if left_out and half <= index < len(windows) - half:
            if index == half:
                table.add_row("…", Text(f"{left_out} more", QUIET))
            continue
        table.add_row(
            figures.span(window.begin_seconds),
            figures.seconds(window.median_seconds) if window.HasField("median_seconds") else "–",
            f"{window.temperature_celsius:.0f} °C" if window.HasField("temperature_celsius") else "–",
            f"{window.cpu_frequency_hertz / 1e9:.2f} GHz" if window.HasField("cpu_frequency_hertz") else "–",
            f"{window.power_watts:.2f} W" if window.HasField("power_watts") else "–",
            Text("throttled", BAD) if window.throttled else Text(""),
        )
    return table


def _slowdown(scenario: scenario_pb2.ScenarioResult) -> Text:
    ratio = scenario.slowdown_ratio
    text = Text(f"the end takes {figures.digits(ratio, 3)} × as long as the first window", _slow_style(ratio))
    if scenario.HasField("steady_median_seconds"):
        text.append(f" · steady at p50 {figures.seconds(scenario.steady_median_seconds)}", STRONG)
    else:
        text.append(" · it never got steady", DOUBTFUL)
    return text


def _slow_style(ratio: float) -> str:
    """Above 1.05, the slowdown is more than what two runs of one board differ by."""
    return DOUBTFUL if ratio > 1.05 else GOOD


def interference_block(result: result_pb2.RunResult) -> RenderableType | None:
    """What other models did to this one; None when it ran by itself."""
    if not result.HasField("interference"):
        return None
    interference = result.interference
    others = figures.plural(len(interference.run_ids), "other model")
    if not interference.HasField("slowdown_ratio"):
        return Text(f"beside {others}; by how much that slowed it is not known", DOUBTFUL)
    ratio = interference.slowdown_ratio
    text = Text(f"takes {figures.digits(ratio, 3)} × as long beside {others}", _slow_style(ratio))
    if interference.HasField("slowdown_low_ratio") and interference.HasField("slowdown_high_ratio"):
        low, high = interference.slowdown_low_ratio, interference.slowdown_high_ratio
        text.append(f" ({figures.digits(low, 3)} … {figures.digits(high, 3)})")
    alone = next((p.seconds for p in interference.alone.percentiles if p.percentile == 50), None)
    return text.append(f" · by itself p50 {figures.seconds(alone)}", QUIET) if alone is not None else text


def comparison_block(result: result_pb2.RunResult) -> RenderableType | None:
    """How it stands to those that took turns with it; None when it ran by itself."""
    lines = [_compared(comparison) for comparison in result.comparisons]
    return Group(*lines) if lines else None


def _compared(comparison: result_pb2.Comparison) -> Text:
    other = comparison.model_name or comparison.run_id[:8]
    if not comparison.HasField("ratio"):
        return Text(f"against {other}: {comparison.detail or 'not comparable'}", DOUBTFUL)
    ratio = comparison.ratio
    how = (
        f"{figures.digits(1 / ratio, 4)} × as fast as {other}"
        if ratio < 1
        else f"takes {figures.digits(ratio, 4)} × as long as {other}"
    )
    text = Text()
    if not comparison.HasField("differs"):
        text.append(f"{how}, which can't be told from noise with so few processes", DOUBTFUL)
    elif comparison.differs:
        text.append(how, STRONG)
    else:
        text.append(f"no difference to {other} that could be told from noise")
    if comparison.HasField("low_ratio") and comparison.HasField("high_ratio"):
        low, high = figures.digits(comparison.low_ratio, 4), figures.digits(comparison.high_ratio, 4)
        text.append(f" · p50 ratio {figures.digits(ratio, 4)} ({low} … {high})", QUIET)
    return text


def energy_block(result: result_pb2.RunResult) -> RenderableType | None:
    """What it took from the supply; None where nothing tells."""
    if not result.HasField("energy"):
        return None
    energy = result.energy
    parts = []
    if energy.HasField("energy_per_inference_joules"):
        text = f"{joules(energy.energy_per_inference_joules)} an inference"
        if energy.HasField("energy_per_inference_low_joules"):
            low, high = energy.energy_per_inference_low_joules, energy.energy_per_inference_high_joules
            text += f" ({joules(low)} … {joules(high)})"
        text += ", idle subtracted"
        parts.append(text)
    elif energy.HasField("total_energy_per_inference_joules"):
        parts.append(
            f"{joules(energy.total_energy_per_inference_joules)} an inference, idle included (it was not "
            "measured)"
        )
    if energy.HasField("mean_watts"):
        parts.append(f"{figures.digits(energy.mean_watts, 3)} W on average")
    if energy.HasField("idle_watts"):
        parts.append(f"idle {figures.digits(energy.idle_watts, 3)} W")
    where = " · ".join(part for part in (energy.rail, energy.method) if part)
    return Group(Text(" · ".join(parts)), Text(where, QUIET))


def joules(value: float) -> str:
    """An energy: "23.1 mJ"."""
    for length, sign in ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ")):
        if abs(value) >= length:
            return f"{figures.digits(value / length, 3)} {sign}"
    return f"{figures.digits(value / 1e-6, 3)} µJ"


def sensors_block(telemetry: telemetry_pb2.Telemetry) -> RenderableType | None:
    """Least, mean and most of every sensor, and what sampling cost; None without any."""
    if not telemetry.series and not telemetry.left_out:
        return None
    table = Table.grid(padding=(0, 2))
    for column in range(5):
        table.add_column(justify="left" if column < 2 else "right", overflow="fold")
    table.add_row(*(Text(name, QUIET) for name in ("what", "of", "least", "mean", "most")))
    for series in telemetry.series:
        if not series.values:
            continue
        least = min(series.least or series.values)
        most = max(series.greatest or series.values)
        mean = sum(series.values) / len(series.values)
        if series.cumulative:
            rise = series.values[-1] - series.values[0]
            table.add_row(series.quantity, series.source, "", f"+{figures.digits(rise)}", "")
            continue
        table.add_row(series.quantity, series.source, *map(figures.digits, (least, mean, most)))
    return Group(table, *_sampling(telemetry))


def _sampling(telemetry: telemetry_pb2.Telemetry) -> Iterator[RenderableType]:
    words = f"sampled {telemetry.rate_hertz:g} times a second"
    if telemetry.HasField("cpu_share"):
        words += f", for {telemetry.cpu_share:.2%} of one processor"
    yield Text(words, QUIET)
    for left_out in telemetry.left_out:
        yield Text(f"left out: {left_out}", DOUBTFUL)


def _percent(ratio: float) -> str:
    return f"{figures.digits(ratio * 100, 2)} %"
