"""A result as a page of text: what a person looks at after a run."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator

from google.protobuf.message import Message
from rich.console import Group, RenderableType  # noqa: TID253 - this file owns the page
from rich.padding import Padding  # noqa: TID253
from rich.table import Table  # noqa: TID253
from rich.text import Text  # noqa: TID253

from boardbench.cli import figures
from boardbench.cli.board import board_name
from boardbench.cli.placement import accelerator_block, cost_block, evidence_block, placement_block
from boardbench.cli.plain import cleaned
from boardbench.cli.styles import BAD, DOUBTFUL, QUIET, STRONG
from boardbench.cli.trust import (
    comparison_block,
    energy_block,
    interference_block,
    processes_block,
    scenario_block,
    sensors_block,
    sorted_warnings,
    stopping_line,
    validity_line,
    validity_mark,
    warm_up_words,
    warning_style,
)
from boardbench.cli.verdict import device_asked, is_plain, verdict_of
from boardbench.v1 import board_pb2, latency_pb2, model_pb2, result_pb2

# What they time is the emulator. The other names that a board gives are virtual machines, which run on
# the real processor.
EMULATORS = frozenset(("qemu", "qemu-user", "rosetta"))
# What an agent says whose sensors are a folder: the figures of time are those of a machine.
RECORDED_SENSORS = "recorded-sensors"
_SECTION_WIDTH = 10

STAGES: dict[int, str] = {
    result_pb2.STAGE_UNSPECIFIED: "an unknown step",
    result_pb2.STAGE_START: "starting the worker",
    result_pb2.STAGE_IMPORT: "importing the engine",
    result_pb2.STAGE_CREATE: "loading the model",
    result_pb2.STAGE_INPUTS: "preparing the inputs",
    result_pb2.STAGE_FIRST_INFERENCE: "first inference",
    result_pb2.STAGE_WARM_UP: "warming up",
    result_pb2.STAGE_MEASURE: "measuring",
    result_pb2.STAGE_REPORT: "reading placement and memory",
    result_pb2.STAGE_COOL_DOWN: "cooling down",
    result_pb2.STAGE_IDLE: "measuring the idle board",
}

_PHASES: dict[int, str] = {
    result_pb2.MEMORY_PHASE_UNSPECIFIED: "unknown phase",
    result_pb2.MEMORY_PHASE_BASELINE: "engine imported",
    result_pb2.MEMORY_PHASE_LOADED: "model loaded",
    result_pb2.MEMORY_PHASE_FIRST_INFERENCE: "first inference",
    result_pb2.MEMORY_PHASE_STEADY: "steady",
}


def result_page(result: result_pb2.RunResult, *, whole: bool = False, more: str = "") -> RenderableType:
    """A result as a page; ``whole`` adds every op, tensor and circumstance.

    ``more`` says how to see the whole page, where something had to be cut off.
    """
    result = cleaned(result)
    grid = Table.grid(padding=(0, 2), expand=False)
    grid.add_column(style=STRONG, no_wrap=True)
    grid.add_column(overflow="fold")
    for title, body in _sections(result, whole, more):
        grid.add_row(title.ljust(_SECTION_WIDTH), body)
    return Group(
        _headline(result),
        *_banners(result),
        Padding(_setting(result, whole), (0, 0, 0, 2)),
        Padding(grid, (0, 0, 1, 2)),
    )


def _sections(result: result_pb2.RunResult, whole: bool, more: str) -> Iterator[tuple[str, RenderableType]]:
    if result.HasField("error"):
        yield "Error", _error(result.error, whole)
    for index, warning in enumerate(sorted_warnings(result)):
        yield (
            "" if index else "Warnings",
            _warning(warning.code, warning.message, warning_style(warning)),
        )
    if result.HasField("latency") and result.latency.count:
        yield "Latency", _latency(result.latency, whole)
    for title, block in (
        ("Precision", stopping_line(result)),
        ("Compared", comparison_block(result)),
        ("Scenario", scenario_block(result, whole=whole)),
        ("Beside", interference_block(result)),
        ("Processes", processes_block(result, whole=whole)),
        ("Energy", energy_block(result)),
    ):
        if block is not None:
            yield title, block
    before = _before(result)
    if before:
        yield "Before", Text(before)
    if result.memory.phases:
        yield "Memory", _memory(result.memory)
    if result.HasField("placement"):
        told = whole or not is_plain(result)
        yield (
            "Placement",
            placement_block(
                result.placement,
                asked=device_asked(result),
                whole=whole,
                more=more,
                evidence_follows=told,
            ),
        )
        if result.placement.HasField("fallback_cost") and told:
            yield "Cost", cost_block(result)
        if result.placement.evidence_reports and told:
            yield "Evidence", evidence_block(result.placement)
    if result.status == result_pb2.RUN_STATUS_SUCCEEDED and not result.HasField("placement"):
        yield "Placement", Text("unknown: the run tells nothing about it", DOUBTFUL)
    if result.HasField("accelerator"):
        kind = result.accelerator.kind.upper()
        yield kind if kind in ("TPU", "GPU", "NPU") else "Device", accelerator_block(result.accelerator)
    if result.HasField("transfers"):
        yield "Transfers", Text(_transfers(result.transfers))
    if whole and (result.inputs or result.outputs):
        yield "Tensors", _tensors(result)
    around = _around(result.environment, whole)
    if result.validity == result_pb2.VALIDITY_VALID:
        around = f"valid · {around}" if around else "valid"
    if around:
        yield "Conditions", Text(around)
    sensors = sensors_block(result.telemetry) if whole else None
    if sensors is not None:
        yield "Sensors", sensors
    yield "Run", _run(result, whole)


def _headline(result: result_pb2.RunResult) -> Text:
    """Where it ran and what that cost, when that is news; what ran where; how it ended, unless well."""
    text = Text()
    verdict = verdict_of(result) if result.status == result_pb2.RUN_STATUS_SUCCEEDED else None
    if verdict is not None:
        text.append(f"{verdict.mark} {verdict.text}\n  ", verdict.style)
    elif result.status == result_pb2.RUN_STATUS_SUCCEEDED:
        text.append(*validity_mark(result))
    elif result.status == result_pb2.RUN_STATUS_CANCELLED:
        text.append("– ", DOUBTFUL)
    else:
        text.append("✗ ", BAD)
    text.append(result.model.name or result.model.sha256[:12], STRONG)
    board = board_name(result.board)
    if board:
        text.append(" on ").append(board, STRONG)
    if result.status == result_pb2.RUN_STATUS_CANCELLED:
        text.append(": ").append("cancelled", DOUBTFUL)
    elif result.status == result_pb2.RUN_STATUS_FAILED:
        text.append(": ").append("FAILED", BAD).append(_where_failed(result.error))
    elif result.status == result_pb2.RUN_STATUS_UNSPECIFIED:
        text.append(": ").append("it is not known how it ended", BAD)
    return text


def _where_failed(error: result_pb2.RunError) -> str:
    where = "" if error.stage == result_pb2.STAGE_UNSPECIFIED else f" while {_while(error.stage)}"
    if error.signal:
        return f"{where}, the worker was ended by {error.signal}"
    if error.HasField("exit_code") and _died(error):
        return f"{where}, the worker ended with exit code {error.exit_code}"
    return where


def _died(error: result_pb2.RunError) -> bool:
    """Whether the worker came to grief without a word of its own: then its last output is all there is."""
    return error.code.startswith("worker_") or error.code in ("", "deadline", "internal", "out_of_memory")


def _while(stage: int) -> str:
    return (
        "running the first inference" if stage == result_pb2.STAGE_FIRST_INFERENCE else STAGES.get(stage, "")
    )


def emulators_of(result: result_pb2.RunResult) -> list[str]:
    """Emulators that had the processor's part in the run, by name."""
    return sorted({*result.standins, result.board.emulator} & EMULATORS)


def _banners(result: result_pb2.RunResult) -> list[RenderableType]:
    banners: list[RenderableType] = []
    worth = validity_line(result)
    if worth is not None:
        banners.append(Padding(worth, (0, 0, 0, 2)))
    emulators = emulators_of(result)
    standins = sorted(set(result.standins) - EMULATORS - {RECORDED_SENSORS})
    if RECORDED_SENSORS in result.standins:
        banners.append(
            _banner("RECORDED SENSORS: heat, clocks and power are those of a folder, and of no board")
        )
    if emulators:
        banners.append(
            _banner(f"EMULATED ({', '.join(emulators)}): these timings are not the performance of any board")
        )
    if standins or result.placement.standin:
        called = f" ({', '.join(standins)})" if standins else ""
        banners.append(
            _banner(
                f"STAND-IN{called}: no accelerator had a part in this; it says nothing about real hardware"
            )
        )
    return banners


def _banner(text: str) -> RenderableType:
    return Padding(Text(f"! {text}", BAD), (0, 0, 0, 2))


def _setting(result: result_pb2.RunResult, whole: bool) -> Text:
    runtime = result.runtime
    parts: list[str] = []
    name = runtime.name or result.spec.runtime
    if name:
        parts.append(f"{name} ({runtime.version})" if runtime.version else name)
    device = runtime.device or result.spec.device
    if device:
        parts.append(f"device {device}")
    spec = result.effective_spec if result.HasField("effective_spec") else result.spec
    if spec.HasField("threads"):
        parts.append(figures.plural(spec.threads, "thread"))
    if spec.cpu_affinity:
        parts.append(f"on CPUs {', '.join(map(str, spec.cpu_affinity))}")
    parts.extend(text for text in (spec.compute_precision, spec.power_mode) if text)
    # The engine's own defaults are many; what somebody asked for is few.
    options = runtime.options if whole else result.spec.options
    parts.extend(f"{key}={value}" for key, value in sorted(options.items()))
    if result.board.model and result.board.model != result.board.hostname:
        parts.append(result.board.model)
    if result.board.architecture:
        parts.append(result.board.architecture)
    if result.board.emulator and result.board.emulator not in EMULATORS:
        parts.append(f"virtual machine ({result.board.emulator})")
    return Text(" · ".join(part for part in parts), QUIET)


def _error(error: result_pb2.RunError, whole: bool) -> RenderableType:
    parts: list[RenderableType] = [_warning(error.code or "unknown", error.message, BAD)]
    tail = error.output_tail.strip("\n")
    if tail and (whole or _died(error)):
        parts.append(Text("the last output of the worker:", QUIET))
        parts.extend(Text("│ " + line, overflow="fold") for line in tail.split("\n"))
    return Group(*parts)


def _warning(code: str, message: str, style: str = DOUBTFUL) -> RenderableType:
    return Text.assemble((code, style), "  ", message)


def _latency(latency: latency_pb2.Latency, whole: bool) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    confidence = latency.confidence if latency.HasField("confidence") else 0.95
    loadgen = whole and any(entry.HasField("loadgen_estimate_seconds") for entry in latency.percentiles)
    median = next((p.seconds for p in latency.percentiles if p.percentile == 50), latency.mean_seconds)
    length, sign = figures.seconds_unit(median)
    # As many decimals as the median needs for four digits, and the same for all: they are compared.
    decimals = len(figures.digits(median / length).partition(".")[2])

    def shown(seconds: float) -> str:
        return f"{seconds / length:,.{decimals}f}"

    for index, percentile in enumerate(latency.percentiles):
        table.add_row(
            Text(figures.percentile_name(percentile.percentile), STRONG),
            Text(f"{shown(percentile.seconds)} {sign}", STRONG),
            f"{shown(percentile.low_seconds)} … {shown(percentile.high_seconds)}",
            Text(f"{confidence * 100:g} % bounds" if index == 0 else "", QUIET),
            *([_loadgen(percentile, shown)] if loadgen else []),
        )
    line = (
        f"{figures.plural(latency.count, 'inference')} · mean {shown(latency.mean_seconds)}"
        f" · fastest {shown(latency.min_seconds)} · slowest {shown(latency.max_seconds)}"
    )
    if latency.HasField("stdev_seconds"):
        line += f" · stdev {shown(latency.stdev_seconds)}"
    line += f" {sign}"
    if not latency.percentiles:
        return Group(Text("too few inferences for any percentile", DOUBTFUL), Text(line))
    return Group(table, Text(line))


def _loadgen(percentile: latency_pb2.Percentile, shown: Callable[[float], str]) -> Text:
    if not percentile.HasField("loadgen_estimate_seconds"):
        return Text("")
    return Text(f"LoadGen would say {shown(percentile.loadgen_estimate_seconds)}", QUIET)


def _before(result: result_pb2.RunResult) -> str:
    parts = []
    for name, label in (
        ("import_seconds", "import"),
        ("create_seconds", "create"),
        ("first_inference_seconds", "first inference"),
    ):
        value = _optional(result, name)
        if value is not None:
            how = _of_caches(result) if name == "create_seconds" else ""
            parts.append(f"{label} {figures.seconds(value)}{how}")
    parts.append(warm_up_words(result))
    return " · ".join(part for part in parts if part)


def _of_caches(result: result_pb2.RunResult) -> str:
    """Whether the load found what an earlier one had left: with it and without, it is another figure."""
    warm, cold = (
        [
            f"{cache.name}, {figures.count_bytes(cache.size_bytes)}" if cache.size_bytes else cache.name
            for cache in result.caches
            if cache.HasField("warm") and cache.warm is state
        ]
        for state in (True, False)
    )
    if warm:
        return f" from a warm cache ({'; '.join(warm)})"
    return f", a first load ({'; '.join(cold)} kept for the next)" if cold else ""


def _transfers(told: result_pb2.Transfers) -> str:
    """Where the time of an inference goes on an accelerator with memory of its own."""
    parts = [
        f"{label} {figures.seconds(seconds)}"
        for name, label in (
            ("to_device_seconds", "to the device"),
            ("compute_seconds", "computing"),
            ("from_device_seconds", "back"),
        )
        if (seconds := _optional(told, name)) is not None
    ]
    return f"{' · '.join(parts)} (medians of {told.inferences} more inferences, by {told.method})"


def _memory(memory: result_pb2.Memory) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    columns = [
        (label, name)
        for label, name in (
            ("resident", "rss_bytes"),
            ("proportional", "pss_bytes"),
            ("peak in phase", "peak_rss_bytes"),
        )
        if any(_optional(phase, name) is not None for phase in memory.phases)
    ]
    for _ in columns:
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", *(Text(label, QUIET) for label, _ in columns))
    for phase in memory.phases:
        values = [_optional(phase, name) for _, name in columns]
        cells = ["–" if value is None else figures.count_bytes(int(value)) for value in values]
        table.add_row(_PHASES.get(phase.phase, "unknown phase"), *cells)
    parts = []
    if memory.HasField("model_rss_bytes"):
        parts.append(f"the model adds {figures.count_bytes(memory.model_rss_bytes)}")
    if memory.HasField("peak_rss_bytes"):
        parts.append(f"highest peak {figures.count_bytes(memory.peak_rss_bytes)}")
    for name, words in (
        ("arena_bytes", "{} of it the engine's arena"),
        ("accelerator_bytes", "{} on the accelerator"),
        ("available_drop_bytes", "the board's free memory fell by {}"),
    ):
        if memory.HasField(name) and getattr(memory, name):  # type: ignore[arg-type]
            parts.append(words.format(figures.count_bytes(getattr(memory, name))))
    if memory.peak_swap_bytes:
        parts.append(f"{figures.count_bytes(memory.peak_swap_bytes)} SWAPPED OUT")
    return Group(table, Text(" · ".join(parts))) if parts else table


def _tensors(result: result_pb2.RunResult) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style=QUIET)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for kind, tensors in (("in", result.inputs), ("out", result.outputs)):
        for tensor in tensors:
            table.add_row(kind, tensor.name or "–", _tensor(tensor))
    return table


def _tensor(tensor: model_pb2.TensorInfo) -> str:
    text = f"{tensor.dtype}[{', '.join('?' if size < 0 else str(size) for size in tensor.shape)}]"
    if tensor.HasField("quantization"):
        quantization = tensor.quantization
        text += f"  scale {figures.digits(quantization.scale)}, zero point {quantization.zero_point}"
    return text


def _around(environment: board_pb2.Environment, whole: bool) -> str:
    parts = []
    temperatures = _change(environment, "temperature_before_celsius", "temperature_after_celsius", "{:.0f}")
    if temperatures:
        parts.append(f"{temperatures} °C")
    if environment.cpu_governor:
        parts.append(f"governor {environment.cpu_governor}")
    if environment.HasField("cpu_frequency_hertz"):
        parts.append(f"{environment.cpu_frequency_hertz / 1e9:.2f} GHz")
    load = _change(environment, "load_average_before", "load_average_after", "{:.2f}")
    if load:
        parts.append(f"load {load}")
    if environment.throttled_during:
        parts.append(f"THROTTLED: {', '.join(environment.throttled_during)}")
    if environment.power_mode:
        parts.append(f"power mode {environment.power_mode}")
    if environment.tuned:
        parts.append(f"tuned for the run ({len(environment.tuned)})")
    if environment.HasField("involuntary_context_switches"):
        parts.append(f"preempted {figures.plural(environment.involuntary_context_switches, 'time')}")
    if (
        environment.HasField("cpu_seconds")
        and environment.HasField("wall_seconds")
        and environment.wall_seconds > 0
    ):
        parts.append(f"{environment.cpu_seconds / environment.wall_seconds:.2f} CPUs busy")
    if whole and environment.HasField("memory_available_least_bytes"):
        parts.append(
            f"at least {figures.count_bytes(environment.memory_available_least_bytes)} of memory free"
        )
    if whole and environment.cpu_affinity:
        parts.append(f"allowed on CPUs {', '.join(map(str, environment.cpu_affinity))}")
    if whole and environment.cpu_core_types:
        parts.append(f"cores {', '.join(environment.cpu_core_types)}")
    for name, words in (
        ("cpu_pressure_share", "a processor"),
        ("io_pressure_share", "a disk"),
        ("memory_pressure_share", "memory"),
    ):
        value = _optional(environment, name)
        if whole and value is not None:
            parts.append(f"waited for {words} {value:.1%} of the time")
    if whole and environment.throttled_before:
        parts.append(f"throttled since boot, before the run: {', '.join(environment.throttled_before)}")
    if whole and environment.clock_source:
        parts.append(f"clock {environment.clock_source}")
    if whole:
        parts.extend(environment.tuned)
    if whole and environment.HasField("clock_read_seconds"):
        parts.append(f"clock read costs {figures.seconds(environment.clock_read_seconds)}")
    if whole and environment.boardbench_version:
        parts.append(f"boardbench {environment.boardbench_version}")
    return " · ".join(parts)


def _change(environment: board_pb2.Environment, before: str, after: str, form: str) -> str:
    values = [_optional(environment, name) for name in (before, after)]
    shown = [form.format(value) for value in values if value is not None]
    return " → ".join(shown if len(set(shown)) > 1 else shown[:1])


def _optional(message: Message, name: str) -> float | None:
    """The number in an optional field; None when it is absent."""
    return getattr(message, name) if message.HasField(name) else None


def _run(result: result_pb2.RunResult, whole: bool) -> RenderableType:
    parts = [result.run_id]
    if result.HasField("finished_at"):
        parts.append(f"ended {figures.moment(result.finished_at.ToDatetime(datetime.timezone.utc))}")
    data = result.input_data
    if data.source == "file":
        parts.append(f"inputs from a file ({data.sha256[:12]})")
    elif data.HasField("seed"):
        parts.append(f"inputs from seed {data.seed}")
    lines: list[RenderableType] = [Text(" · ".join(part for part in parts), QUIET)]
    if whole:
        model = result.model
        lines.append(
            Text(
                f"{model.format or 'unknown format'}, {figures.whole(model.size_bytes)} bytes, "
                f"sha256 {model.sha256}",
                QUIET,
            )
        )
        lines.extend(
            Text(f"{'warm' if cache.warm else 'new'} cache {cache.name}: {cache.path}", QUIET)
            for cache in result.caches
        )
        lines.extend(
            Text(f"output {name}: sha256 {digest}", QUIET)
            for name, digest in sorted(result.output_sha256.items())
        )
    return Group(*lines)
