"""The dashboards: what each of them answers, panel by panel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as model
from panels import (
    CHOSEN,
    GREEN,
    MOMENT,
    NAMED,
    RED,
    SERIES,
    SOURCE,
    Ask,
    bars,
    heat,
    judged,
    lines,
    listing,
    number,
    states,
)

# Medians of a series over what Prometheus has of it: what a regression is held against.
HISTORY = "$history"

BOARD = "label_values(boardbench_device_up, device)"
MODEL = 'label_values(boardbench_latency_seconds{device=~"$board"}, model)'
RUNTIME = 'label_values(boardbench_latency_seconds{device=~"$board"}, runtime)'


def p(percentile: int) -> str:
    """The chosen series' latency at a percentile."""
    return f'boardbench_latency_seconds{{{CHOSEN}, percentile="{percentile}"}}'


def fleet() -> dashboard.Dashboard:
    """Are the boards there, fit, and as fast as they were?"""
    page = _page("Fleet", "fleet", "All boards: which are there, which are unfit, what they measured last.")
    gone = 'count(boardbench_device_up{device=~"$board"} == 0) or vector(0)'
    throttled = 'count(max by (device) (boardbench_device_throttled{device=~"$board"}) == 1) or vector(0)'
    invalid = f'count(boardbench_result_validity_info{{{CHOSEN}, validity="invalid"}}) or vector(0)'
    doubtful = f'count(boardbench_result_validity_info{{{CHOSEN}, validity="doubtful"}}) or vector(0)'
    return (
        page.with_row(dashboard.Row("At a glance"))
        .with_panel(
            number(
                "Boards up",
                "Boards whose stream to the collector is open.",
                "none",
                Ask('sum(boardbench_device_up{device=~"$board"})', "up"),
                good_from=1,
            )
        )
        .with_panel(
            number(
                "Boards gone",
                "Boards that the collector knows and that are not connected.",
                "none",
                Ask(gone, "gone"),
                bad_from=1,
            )
        )
        .with_panel(
            number(
                "Boards throttled",
                "Boards that something slows down now: heat, their supply, a power limit.",
                "none",
                Ask(throttled, "throttled"),
                bad_from=1,
            )
        )
        .with_panel(
            number(
                "Invalid results",
                "Series whose latest result is invalid: its figures must not be compared.",
                "none",
                Ask(invalid, "invalid"),
                bad_from=1,
            )
        )
        .with_panel(
            number(
                "Doubtful results",
                "Series whose latest result is to be used with its warnings in mind.",
                "none",
                Ask(doubtful, "doubtful"),
                doubtful_from=1,
            )
        )
        .with_panel(
            number(
                "Jobs waiting",
                "Jobs that no board has yet.",
                "none",
                Ask('sum(boardbench_jobs{state="queued"}) or vector(0)', "waiting"),
            )
        )
        .with_row(dashboard.Row("What was measured"))
        .with_panel(
            listing(
                "Latest results",
                "The latest result of every series, and its worth. Invalid ones must not be compared.",
                ("p50", "s", Ask(judged(p(50)))),
                ("p90", "s", Ask(judged(p(90)))),
                ("peak memory", "bytes", Ask(judged(f"boardbench_memory_run_peak_rss_bytes{{{CHOSEN}}}"))),
                (
                    "ended",
                    MOMENT,
                    Ask(judged(f"boardbench_result_timestamp_seconds{{{CHOSEN}}}") + " * 1000"),
                ),
                joined_by=("device", "model", "runtime", "target", "threads", "variant", "validity"),
            )
        )
        .with_panel(
            lines(
                "Median latency",
                "Median of one inference by board and model, from the latest run at each moment.",
                "s",
                Ask(judged(p(50)), NAMED),
                points=True,
            )
        )
        .with_panel(
            lines(
                "Operations on the CPU",
                "Share of the operations of a model that run on the CPU, whatever was asked for.",
                "percentunit",
                Ask(
                    judged(
                        f"(sum by ({SERIES}) (boardbench_ops{{{CHOSEN}, unit=~'cpu|cpu_delegate'}}) or "
                        f"sum by ({SERIES}) (boardbench_ops{{{CHOSEN}}}) * 0) / "
                        f"sum by ({SERIES}) (boardbench_ops{{{CHOSEN}}})"
                    ),
                    NAMED,
                ),
            )
        )
        .with_row(dashboard.Row("How the boards are"))
        .with_panel(
            listing(
                "Boards",
                "Every board: what it is and when it was last heard of.",
                (
                    "last heard of",
                    MOMENT,
                    Ask(
                        'boardbench_device_last_seen_timestamp_seconds{device=~"$board"} * 1000'
                        " * on (device) group_left (board, os, architecture, emulator) boardbench_device_info"
                        " * on (device) group_left (version) boardbench_agent_info"
                    ),
                ),
                joined_by=("device", "board", "os", "architecture", "emulator", "version"),
            )
        )
        .with_panel(
            lines(
                "Hottest part of each board",
                "The highest temperature that a board tells now, at rest or while it measures.",
                "celsius",
                Ask(
                    'max by (device) (boardbench_device_temperature_celsius{device=~"$board"})', "{{device}}"
                ),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Runs by how they ended",
                "Runs that were reported, in the last hour.",
                "none",
                Ask('sum by (status) (increase(boardbench_runs_total{device=~"$board"}[1h]))', "{{status}}"),
                stacked=True,
                runs=False,
            )
        )
    )


def board() -> dashboard.Dashboard:
    """One board: what it can do, what heat does to it, what it measured."""
    page = _page(
        "One board", "board", "One board: its latencies, heat, clock, power and memory.", one="board"
    )

    def worst(metric: str) -> str:
        return f"max by (validity) ({judged(metric)})"

    return (
        page.with_row(dashboard.Row("Latency"))
        .with_panel(
            lines(
                "$model: percentiles",
                "Half, nine of ten and 99 of 100 inferences were faster. Of several engines the slowest.",
                "s",
                *(Ask(worst(p(each)), f"p{each} {{{{validity}}}}") for each in (50, 90, 99)),
                points=True,
                runs=False,
                bands=(("p90", "p50"), ("p99", "p90")),
                repeated_by="model",
            )
        )
        .with_panel(
            lines(
                "$model: median and its bounds",
                "The median with its 95 % bounds. Of several engines the slowest.",
                "s",
                Ask(worst(p(50).replace("latency_seconds", "latency_high_seconds")), "upper {{validity}}"),
                Ask(worst(p(50)), "p50 {{validity}}"),
                Ask(worst(p(50).replace("latency_seconds", "latency_low_seconds")), "lower {{validity}}"),
                points=True,
                runs=False,
                bands=(("upper", "lower"),),
                repeated_by="model",
            )
        )
        .with_panel(
            heat(
                "Latencies of the latest run",
                "The counted inferences of the latest runs of the chosen models, at each moment.",
                "s",
                Ask(f"sum by (le) (boardbench_latency_distribution_seconds_bucket{{{CHOSEN}}})"),
            )
        )
        .with_panel(
            lines(
                "Memory by phase",
                "Proportional memory of the worker at the end of each phase of its life.",
                "bytes",
                Ask(
                    judged(f"boardbench_memory_pss_bytes{{{CHOSEN}}}"),
                    "{{phase}} {{model}} {{runtime}} {{validity}}",
                ),
            )
        )
        .with_row(dashboard.Row("The board"))
        .with_panel(
            lines(
                "Temperature",
                "What the thermal zones tell, at rest and while it measures.",
                "celsius",
                Ask('boardbench_device_temperature_celsius{device=~"$board"}', "{{device}} {{source}}"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Clock",
                "Frequency of each processor, now.",
                "hertz",
                Ask('boardbench_device_frequency_hertz{device=~"$board"}', "{{device}} {{source}}"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Power",
                "What the rails tell, now.",
                "watt",
                Ask('boardbench_device_power_watts{device=~"$board"}', "{{device}} {{source}}"),
                runs=False,
            )
        )
        .with_panel(
            states(
                "Throttled by",
                "Whether anything slows the board down now, by cause. Absent: the board can't tell.",
                Ask('boardbench_device_throttled{device=~"$board"}', "{{device}} {{cause}}"),
                {"0": ("no", GREEN), "1": ("throttled", RED)},
            )
        )
        .with_panel(
            states(
                "Connected",
                "Whether the board's stream to the collector is open.",
                Ask('boardbench_device_up{device=~"$board"}', "{{device}}"),
                {"0": ("gone", RED), "1": ("up", GREEN)},
            )
        )
        .with_panel(
            listing(
                "Runtimes",
                "What the board can run models in.",
                (
                    "available",
                    "bool_yes_no",
                    Ask('boardbench_runtime_available{device=~"$board"}'),
                ),
                joined_by=("device", "runtime"),
                width=12,
                height=7,
            )
        )
        .with_panel(
            lines(
                "Work on the board",
                "Runs that wait on the board, and results that it has not handed over yet.",
                "none",
                Ask('boardbench_queued_runs{device=~"$board"}', "{{device}} runs waiting"),
                Ask('boardbench_spool_pending{device=~"$board"}', "{{device}} results in the spool"),
                runs=False,
            )
        )
    )


def one_model() -> dashboard.Dashboard:
    """One model: on which board, in which engine is it best?"""
    page = _page(
        "One model across boards",
        "model",
        "One model on every board and in every engine: speed, memory, energy, and what it cost to load.",
        one="model",
    )
    return (
        page.with_row(dashboard.Row("Speed"))
        .with_panel(
            bars(
                "Median latency",
                "Median of one inference in the latest run, by board and engine.",
                "s",
                Ask(judged(p(50)), NAMED),
            )
        )
        .with_panel(
            bars(
                "p90",
                "Nine of ten inferences of the latest run were faster.",
                "s",
                Ask(judged(p(90)), NAMED),
            )
        )
        .with_panel(
            lines(
                "Median latency over time",
                "Median of one inference, from the latest run at each moment.",
                "s",
                Ask(judged(p(50)), NAMED),
                points=True,
            )
        )
        .with_panel(
            heat(
                "Distribution of latencies",
                "The counted inferences of the latest runs on all chosen boards, at each moment.",
                "s",
                Ask(f"sum by (le) (boardbench_latency_distribution_seconds_bucket{{{CHOSEN}}})"),
            )
        )
        .with_row(dashboard.Row("What it takes"))
        .with_panel(
            bars(
                "Peak memory",
                "Highest resident memory of the worker over all phases of the latest run.",
                "bytes",
                Ask(judged(f"boardbench_memory_run_peak_rss_bytes{{{CHOSEN}}}"), NAMED),
            )
        )
        .with_panel(
            bars(
                "Energy of one inference",
                "Energy with the idle board's subtracted. Boards without a power rail are not here.",
                "joule",
                Ask(judged(f"boardbench_energy_per_inference_joules{{{CHOSEN}}}"), NAMED),
            )
        )
        .with_panel(
            bars(
                "Time to create",
                "Time to create the session or interpreter, the import of the engine left out.",
                "s",
                Ask(judged(f"boardbench_create_seconds{{{CHOSEN}}}"), NAMED),
            )
        )
        .with_panel(
            bars(
                "First inference",
                "Time of the very first inference.",
                "s",
                Ask(judged(f"boardbench_first_inference_seconds{{{CHOSEN}}}"), NAMED),
            )
        )
    )


def placement() -> dashboard.Dashboard:
    """Does it truly run on the accelerator, and what does the CPU's part cost?"""
    page = _page(
        "Placement and fallback",
        "placement",
        "Where operations really ran, and what those cost that were moved to the CPU without a word.",
    )
    return (
        page.with_row(dashboard.Row("Where it ran"))
        .with_panel(
            listing(
                "Verdicts",
                "What all evidence says about the accelerator. A stand-in says nothing about hardware.",
                (
                    "operations",
                    "none",
                    Ask(
                        judged(f"sum by ({SERIES}) (boardbench_ops{{{CHOSEN}}})") + f" * on ({SERIES}) "
                        "group_left (verdict, evidence, standin) "
                        'label_replace(boardbench_placement_info, "verdict", "cpu_as_asked", "target", "cpu")'
                    ),
                ),
                joined_by=(
                    *("device", "model", "runtime", "target", "verdict", "evidence", "standin", "validity"),
                ),
            )
        )
        .with_panel(
            lines(
                "Operations by unit",
                "Operations of the chosen models by what ran them: accelerators green, the CPU orange.",
                "none",
                Ask(
                    judged(f"boardbench_ops{{{CHOSEN}}}"),
                    "{{unit}} {{model}} {{device}} {{runtime}} {{target}} {{validity}}",
                ),
                stacked=True,
                by_unit=True,
            )
        )
        .with_panel(
            lines(
                "Changes of placement",
                "Times that operations were elsewhere than in the run before, in the last hour.",
                "none",
                Ask(
                    judged(f"increase(boardbench_placement_drifts_total{{{CHOSEN}}}[1h])"),
                    NAMED,
                ),
            )
        )
        .with_row(dashboard.Row("What it cost"))
        .with_panel(
            lines(
                "Share of time on the CPU",
                "Share of an inference's time in operations that were to be on an accelerator and ran on "
                "the CPU, with its 95 % bounds. Absent: not measured, or nothing was asked for.",
                "percentunit",
                Ask(judged(f"boardbench_fallback_share_high_ratio{{{CHOSEN}}}"), f"upper {NAMED}"),
                Ask(judged(f"boardbench_fallback_share_ratio{{{CHOSEN}}}"), f"share {NAMED}"),
                Ask(judged(f"boardbench_fallback_share_low_ratio{{{CHOSEN}}}"), f"lower {NAMED}"),
            )
        )
        .with_panel(
            lines(
                "Median, and what it could be at best",
                "Median latency, and the same without the time of operations that fell back: a lower bound.",
                "s",
                Ask(judged(p(50)), f"p50 {NAMED}"),
                Ask(judged(f"boardbench_latency_without_fallback_seconds{{{CHOSEN}}}"), f"at best {NAMED}"),
                points=True,
            )
        )
        .with_panel(
            lines(
                "Crossings",
                "Times that one inference moves between the accelerator and the CPU.",
                "none",
                Ask(judged(f"boardbench_crossings{{{CHOSEN}}}"), NAMED),
                width=24,
            )
        )
    )


def regressions() -> dashboard.Dashboard:
    """What is slower, larger or elsewhere than it was?"""
    page = _page(
        "Regressions",
        "regressions",
        "Every series against its own history: what is slower, larger, or on another unit than before.",
    ).with_variable(
        dashboard.CustomVariable("history")
        .label("History")
        .description("How far back a series is compared with itself")
        .values("1h,6h,1d,7d,30d")
        .current(model.VariableOption(text="7d", value="7d"))
    )

    def against_history(metric: str) -> str:
        return f"{metric} / quantile_over_time(0.5, {metric}[{HISTORY}])"

    return (
        page.with_row(dashboard.Row("Against its own history"))
        .with_panel(
            listing(
                "Latest against the median of its history",
                "Above 1: worse than it was. Look at validity first.",
                ("p50", "percentunit", Ask(judged(against_history(p(50))))),
                ("p90", "percentunit", Ask(judged(against_history(p(90))))),
                (
                    "peak memory",
                    "percentunit",
                    Ask(judged(against_history(f"boardbench_memory_run_peak_rss_bytes{{{CHOSEN}}}"))),
                ),
                joined_by=("device", "model", "runtime", "target", "threads", "variant", "validity"),
            )
        )
        .with_panel(
            lines(
                "Median latency against its history",
                "Median of the latest run over the median of the chosen history; 1: as it was.",
                "percentunit",
                Ask(judged(against_history(p(50))), NAMED),
                points=True,
            )
        )
        .with_panel(
            lines(
                "First inference against its history",
                "Time of the first inference over the median of the chosen history.",
                "percentunit",
                Ask(judged(against_history(f"boardbench_first_inference_seconds{{{CHOSEN}}}")), NAMED),
                points=True,
            )
        )
        .with_panel(
            lines(
                "Changes of placement",
                "Times that operations were elsewhere than in the run before, within the chosen history.",
                "none",
                Ask(judged(f"increase(boardbench_placement_drifts_total{{{CHOSEN}}}[{HISTORY}])"), NAMED),
            )
        )
        .with_panel(
            lines(
                "Worth of the latest results",
                "Series by what their latest result is worth.",
                "none",
                Ask(f"count by (validity) (boardbench_result_validity_info{{{CHOSEN}}})", "{{validity}}"),
                stacked=True,
                runs=False,
            )
        )
    )


def collector() -> dashboard.Dashboard:
    """Is the collector itself well?"""
    page = _page("Collector", "collector", "The collector itself: what comes in, what it costs, what waits.")
    return (
        page.with_row(dashboard.Row("What comes in"))
        .with_panel(
            lines(
                "Results",
                "Results a second: stored, come again, refused, failed to be stored.",
                "cps",
                Ask("sum(rate(boardbench_collector_results_stored_total[$__rate_interval]))", "stored"),
                Ask(
                    "sum(rate(boardbench_collector_results_duplicate_total[$__rate_interval]))", "came again"
                ),
                Ask(
                    "sum(rate(boardbench_collector_store_failures_total[$__rate_interval]))",
                    "failed to be stored",
                ),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Streams",
                "Boards that are connected.",
                "none",
                Ask("boardbench_collector_open_streams", "open"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Time to acknowledge",
                "From a result's arrival to its acknowledgement.",
                "s",
                Ask(
                    "histogram_quantile(0.99, sum by (le) "
                    "(rate(boardbench_collector_acknowledge_seconds_bucket[$__rate_interval])))",
                    "p99",
                ),
                Ask(
                    "histogram_quantile(0.5, sum by (le) "
                    "(rate(boardbench_collector_acknowledge_seconds_bucket[$__rate_interval])))",
                    "p50",
                ),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Jobs",
                "Jobs by their state.",
                "none",
                Ask("boardbench_jobs", "{{state}}"),
                stacked=True,
                runs=False,
            )
        )
        .with_row(dashboard.Row("What it costs"))
        .with_panel(
            lines(
                "Scrapes",
                "Time that a scrape takes: in all, and waiting for the store.",
                "s",
                Ask("boardbench_collector_scrape_duration_seconds", "in all"),
                Ask("boardbench_collector_scrape_store_seconds", "waiting for the store"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Series",
                "Series of boards in a scrape.",
                "none",
                Ask("boardbench_collector_series", "series"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Files for jobs",
                "Bytes of the models and inputs that are kept for jobs.",
                "bytes",
                Ask("boardbench_collector_files_bytes", "files"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Oldest job that waits",
                "How long the oldest job that no board has yet has been waiting.",
                "s",
                Ask("boardbench_job_oldest_waiting_seconds", "oldest"),
                runs=False,
            )
        )
    )


ALL: dict[str, Callable[[], dashboard.Dashboard]] = {
    "fleet": fleet,
    "board": board,
    "model": one_model,
    "placement": placement,
    "regressions": regressions,
    "collector": collector,
}


def _page(title: str, name: str, description: str, one: str = "") -> dashboard.Dashboard:
    """A dashboard with what all have; ``one``: the variable of which only one value can be chosen."""
    page = (
        dashboard.Dashboard(f"boardbench: {title}")
        .uid(f"boardbench-{name}")
        .description(description)
        .tags(["boardbench"])
        .readonly()
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("boardbench")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["boardbench"])
            .include_vars(True)
            .keep_time(True)
            .as_dropdown(True)
        )
        .link(
            dashboard.DashboardLink("Collector")
            .type(model.DashboardLinkType.LINK)
            .url("${collector}/")
            .icon("external link")
            .tooltip("The collector's own page: boards, jobs and every run")
            .target_blank(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.TextBoxVariable("collector")
            .label("Collector")
            .description("Where the collector's page is, for links to runs")
            .default_value("http://localhost:7343")
        )
    )
    if name != "collector":
        for variable, label, values in (
            ("board", "Board", BOARD),
            ("model", "Model", MODEL),
            ("runtime", "Runtime", RUNTIME),
        ):
            page = page.with_variable(_variable(variable, label, values, several=variable != one))
        for annotation in _annotations():
            page = page.annotation(annotation)
    return page


def _variable(name: str, label: str, values: str, *, several: bool) -> dashboard.QueryVariable:
    variable = (
        dashboard.QueryVariable(name)
        .label(label)
        .query(values)
        .datasource(SOURCE)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )
    if not several:
        return variable
    every = model.VariableOption(text="All", value="$__all")
    return variable.multi(True).include_all(True).all_value(".*").current(every)


def _annotations() -> list[Any]:
    """Moments: a run ended, a model came that was not there before, operations moved."""
    ended = f"boardbench_result_timestamp_seconds{{{CHOSEN}}}"
    return [
        _annotation(
            "Runs",
            "blue",
            judged(ended) + " * 1000",
            "Run ended",
            "{{model}} on {{device}}, {{runtime}} {{target}}: {{validity}}",
            at_value=True,
        ),
        _annotation(
            "New models",
            "purple",
            f"{ended} unless {ended} offset 10m",
            "New series",
            "{{model}} ({{model_sha256}}) on {{device}}, {{runtime}} {{target}}",
        ),
        _annotation(
            "Placement changes",
            "orange",
            f"changes(boardbench_placement_drifts_total{{{CHOSEN}}}[2m]) > 0",
            "Operations moved",
            "{{model}} on {{device}}, {{runtime}} {{target}}",
        ),
    ]


def _annotation(
    name: str, colour: str, expression: str, title: str, text: str, *, at_value: bool = False
) -> dashboard.AnnotationQuery:
    made = (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(SOURCE)
        .enable(True)
        .hide(False)
        .icon_color(colour)
        .expr(expression)
        .step("30s")
        .title_format(title)
        .text_format(text)
        .tag_keys("device,model")
    )
    return made.use_value_for_time(True) if at_value else made
