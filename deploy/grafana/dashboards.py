"""The dashboards: what each of them answers, panel by panel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as model
from panels import (
    BLUE,
    CHOSEN,
    COUNT,
    GREEN,
    MINE,
    MOMENT,
    NAMED,
    ORANGE,
    RED,
    SERIES,
    SOURCE,
    STATES,
    THESE,
    VALIDITY,
    WORTH,
    Ask,
    bars,
    heat,
    judged,
    lines,
    listing,
    named,
    newest,
    number,
    on_board,
    states,
)

# Medians of a series over what Prometheus has of it: what a regression is held against.
HISTORY = "$history"
# What a row of a table of results is of.
RESULT = ("device", "model", "runtime", "target", "threads", "variant", "validity", "standin")

BOARD = 'label_values(boardbench_device_up{job=~"$job"}, device)'
MODEL = f"label_values(boardbench_latency_seconds{{{THESE}}}, model)"
RUNTIME = f"label_values(boardbench_latency_seconds{{{THESE}}}, runtime)"
# Every target has one, whatever it is: a collector, a board that is scraped, results by remote write.
JOB = "label_values({__name__=~'boardbench_result_validity_info|boardbench_device_up'}, job)"
COLLECTORS = "label_values(boardbench_collector_open_streams, job)"
INSTANCE = 'label_values(boardbench_collector_open_streams{job=~"$job"}, instance)'
# When the alert of the rules fires.
CERTIFICATE_DAYS = 14


def p(percentile: int) -> str:
    """The chosen series' latency at a percentile."""
    return f'boardbench_latency_seconds{{{CHOSEN}, percentile="{percentile}"}}'


def fleet() -> dashboard.Dashboard:
    """Are the boards there, fit, and as fast as they were?"""
    page = _page("Fleet", "fleet", "All boards: which are there, which are unfit, what they measured last.")
    # Once, however often Prometheus has them.
    up = f"max by (device) (boardbench_device_up{{{THESE}}})"
    gone = f"count({up} == 0) or vector(0)"
    throttled = f"count(max by (device) (boardbench_device_throttled{{{THESE}}}) == 1) or vector(0)"

    def worth(validity: str) -> str:
        info = f'boardbench_result_validity_info{{{CHOSEN}, validity="{validity}"}}'
        return f"count(count without (job, instance) ({info})) or vector(0)"

    return (
        page.with_row(dashboard.Row("At a glance"))
        .with_panel(
            number(
                "Boards up",
                "Boards whose stream to the collector is open.",
                COUNT,
                Ask(f"sum({up})", "up"),
                good_from=1,
            )
        )
        .with_panel(
            number(
                "Boards gone",
                "Boards that the collector knows and that are not connected.",
                COUNT,
                Ask(gone, "gone"),
                bad_from=1,
            )
        )
        .with_panel(
            number(
                "Boards throttled",
                "Boards that something slows down now: heat, their supply, a power limit.",
                COUNT,
                Ask(throttled, "throttled"),
                bad_from=1,
            )
        )
        .with_panel(
            number(
                "Invalid results",
                "Series whose latest result is invalid: its figures must not be compared.",
                COUNT,
                Ask(worth("invalid"), "invalid"),
                bad_from=1,
            )
        )
        .with_panel(
            number(
                "Doubtful results",
                "Series whose latest result is to be used with its warnings in mind.",
                COUNT,
                Ask(worth("doubtful"), "doubtful"),
                doubtful_from=1,
            )
        )
        .with_panel(
            number(
                "Jobs waiting",
                "Jobs that no board has yet.",
                COUNT,
                Ask('max(boardbench_jobs{job=~"$job", state="queued"}) or vector(0)', "waiting"),
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
                joined_by=RESULT,
            )
        )
        .with_panel(
            lines(
                "Median latency",
                "Median of one inference by board and model, from the latest run at each moment.",
                "s",
                Ask(named(p(50)), NAMED),
            )
        )
        .with_panel(
            lines(
                "Operations on the CPU",
                "Share of the operations of a model that run on the CPU, whatever was asked for.",
                "percentunit",
                Ask(
                    named(
                        f"(sum by ({SERIES}) (boardbench_ops{{{CHOSEN}, unit=~'cpu|cpu_delegate'}}) or "
                        f"sum by ({SERIES}) (boardbench_ops{{{CHOSEN}}}) * 0) / "
                        f"sum by ({SERIES}) (boardbench_ops{{{CHOSEN}}})"
                    ),
                    NAMED,
                ),
                at_most=1,
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
                        f"boardbench_device_last_seen_timestamp_seconds{{{THESE}}} * 1000"
                        " * on (job, instance, device) group_left (board, os, architecture, emulator) "
                        "boardbench_device_info"
                        " * on (job, instance, device) group_left (version) boardbench_agent_info"
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
                    "max by (device, emulator) "
                    f"({on_board(f'boardbench_device_temperature_celsius{{{THESE}}}')})",
                    "{{device}} {{emulator}}",
                ),
                runs=False,
                from_zero=False,
            )
        )
        .with_panel(
            lines(
                "Runs by how they ended",
                "Runs that were reported, in the last hour.",
                COUNT,
                Ask(f"sum by (status) (increase(boardbench_runs_total{{{THESE}}}[1h]))", "{{status}}"),
                stacked=True,
                runs=False,
                colours=STATES,
            )
        )
    )


def board() -> dashboard.Dashboard:
    """One board: what it can do, what heat does to it, what it measured."""
    page = _page(
        "One board", "board", "One board: its latencies, heat, clock, power and memory.", one="board"
    )

    def worst(metric: str) -> str:
        return f"max by (validity, standin) ({judged(metric)})"

    def reading(name: str) -> Ask:
        return Ask(on_board(f"boardbench_device_{name}{{{THESE}}}"), "{{device}} {{emulator}} {{source}}")

    return (
        page.with_row(dashboard.Row("Latency"))
        .with_panel(
            lines(
                "$model: percentiles",
                "Half, nine of ten and 99 of 100 inferences were faster. Of several engines the slowest.",
                "s",
                *(Ask(worst(p(each)), f"p{each} {{{{validity}}}}{{{{standin}}}}") for each in (50, 90, 99)),
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
                *(
                    Ask(worst(p(50).replace("_seconds", which)), f"{bound} {{{{validity}}}}{{{{standin}}}}")
                    for bound, which in (
                        ("upper", "_high_seconds"),
                        ("p50", "_seconds"),
                        ("lower", "_low_seconds"),
                    )
                ),
                runs=False,
                from_zero=False,
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
                    named(f"boardbench_memory_pss_bytes{{{CHOSEN}}}"),
                    f"{{{{phase}}}} {{{{model}}}} {{{{runtime}}}} {WORTH}",
                ),
            )
        )
        .with_row(dashboard.Row("The board"))
        .with_panel(
            lines(
                "Temperature",
                "What the thermal zones tell, at rest and while it measures.",
                "celsius",
                reading("temperature_celsius"),
                runs=False,
                from_zero=False,
            )
        )
        .with_panel(
            lines(
                "Clock",
                "Frequency of each processor, and of the GPU where it tells, now.",
                "hertz",
                reading("frequency_hertz"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Power",
                "What the rails tell, now.",
                "watt",
                reading("power_watts"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Busy",
                "Share of the time that each part is busy, now.",
                "percentunit",
                reading("busy_ratio"),
                runs=False,
                at_most=1,
            )
        )
        .with_panel(
            states(
                "Throttled by",
                "Whether anything slows the board down now, by cause.",
                Ask(
                    on_board(f"boardbench_device_throttled{{{THESE}}}"),
                    "{{device}} {{emulator}} {{source}} {{cause}}",
                ),
                {"0": ("no", GREEN), "1": ("throttled", RED)},
                none="the board can't tell",
            )
        )
        .with_panel(
            lines(
                "Throttle events",
                "Times that the board counted that it was slowed down, in the last hour. Absent: it does not "
                "count.",
                COUNT,
                Ask(
                    on_board(f"increase(boardbench_device_throttle_events_total{{{THESE}}}[1h])"),
                    "{{device}} {{emulator}} {{source}}",
                ),
                runs=False,
            )
        )
        .with_panel(
            states(
                "Connected",
                "Whether the board's stream to the collector is open.",
                Ask(on_board(f"boardbench_device_up{{{THESE}}}"), "{{device}} {{emulator}}"),
                {"0": ("gone", RED), "1": ("up", GREEN)},
            )
        )
        .with_panel(
            lines(
                "Work on the board",
                "Runs that wait on the board, and results that it has not handed over yet.",
                COUNT,
                Ask(f"boardbench_queued_runs{{{THESE}}}", "{{device}} runs waiting"),
                Ask(f"boardbench_spool_pending{{{THESE}}}", "{{device}} results in the spool"),
                runs=False,
            )
        )
        .with_panel(
            listing(
                "Runtimes",
                "What the board can run models in.",
                (
                    "available",
                    "bool_yes_no",
                    Ask(f"boardbench_runtime_available{{{THESE}}}"),
                ),
                joined_by=("device", "runtime"),
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
                Ask(named(p(50)), NAMED),
            )
        )
        .with_panel(
            bars(
                "p90",
                "Nine of ten inferences of the latest run were faster.",
                "s",
                Ask(named(p(90)), NAMED),
            )
        )
        .with_panel(
            lines(
                "Median latency over time",
                "Median of one inference, from the latest run at each moment.",
                "s",
                Ask(named(p(50)), NAMED),
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
                Ask(named(f"boardbench_memory_run_peak_rss_bytes{{{CHOSEN}}}"), NAMED),
            )
        )
        .with_panel(
            bars(
                "Energy of one inference",
                "Energy with the idle board's subtracted. Boards without a power rail are not here.",
                "joule",
                Ask(named(f"boardbench_energy_per_inference_joules{{{CHOSEN}}}"), NAMED),
            )
        )
        .with_panel(
            bars(
                "Time to create",
                "Time to create the session or interpreter, the import of the engine left out.",
                "s",
                Ask(named(f"boardbench_create_seconds{{{CHOSEN}}}"), NAMED),
            )
        )
        .with_panel(
            bars(
                "First inference",
                "Time of the very first inference.",
                "s",
                Ask(named(f"boardbench_first_inference_seconds{{{CHOSEN}}}"), NAMED),
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
    verdict = (
        "group_left (verdict, evidence) "
        f'label_replace({newest("boardbench_placement_info")}, "verdict", "cpu_as_asked", "target", "cpu")'
    )

    def ops(unit: str) -> str:
        # 0 where there are others.
        every = f"sum by ({SERIES}) (boardbench_ops{{{CHOSEN}}})"
        return f"sum by ({SERIES}) (boardbench_ops{{{CHOSEN}, unit=~'{unit}'}}) or {every} * 0"

    return (
        page.with_row(dashboard.Row("Where it ran"))
        .with_panel(
            listing(
                "Verdicts",
                "What all evidence says about the accelerator, and how many operations ran where. A stand-in "
                "says nothing about hardware.",
                *(
                    (heading, COUNT, Ask(judged(ops(unit)) + f" * on ({SERIES}) {verdict}"))
                    for heading, unit in (
                        ("accelerator", "tpu|gpu|npu|delegate"),
                        ("CPU", "cpu"),
                        ("CPU delegate", "cpu_delegate"),
                        ("unknown", "unknown"),
                    )
                ),
                joined_by=(
                    *("device", "model", "runtime", "target", "verdict", "evidence", "standin", "validity"),
                ),
            )
        )
        .with_panel(
            lines(
                "Operations by unit",
                "Operations of the chosen models by what ran them: accelerators green, the CPU orange, a "
                "delegate for the CPU blue.",
                COUNT,
                Ask(
                    named(f"boardbench_ops{{{CHOSEN}}}"),
                    f"{{{{unit}}}} {{{{model}}}} {{{{device}}}} {{{{runtime}}}} {{{{target}}}} {WORTH}",
                ),
                stacked=True,
                by_unit=True,
            )
        )
        .with_panel(
            lines(
                "Changes of placement",
                "Times that operations were elsewhere than in the run before, in the last hour.",
                COUNT,
                Ask(named(f"increase(boardbench_placement_drifts_total{{{CHOSEN}}}[1h])"), NAMED),
            )
        )
        .with_row(dashboard.Row("What it cost"))
        .with_panel(
            lines(
                "Share of time on the CPU",
                "Share of an inference's time in operations that were to be on an accelerator and ran on "
                "the CPU, with its 95 % bounds. Absent: not measured, or nothing was asked for.",
                "percentunit",
                Ask(named(f"boardbench_fallback_share_high_ratio{{{CHOSEN}}}"), f"upper {NAMED}"),
                Ask(named(f"boardbench_fallback_share_ratio{{{CHOSEN}}}"), f"share {NAMED}"),
                Ask(named(f"boardbench_fallback_share_low_ratio{{{CHOSEN}}}"), f"lower {NAMED}"),
                at_most=1,
            )
        )
        .with_panel(
            lines(
                "Median, and what it could be at best",
                "Median latency, and the same without the time of operations that fell back: a lower bound.",
                "s",
                Ask(named(p(50)), f"p50 {NAMED}"),
                Ask(named(f"boardbench_latency_without_fallback_seconds{{{CHOSEN}}}"), f"at best {NAMED}"),
            )
        )
        .with_panel(
            lines(
                "Crossings",
                "Times that one inference moves between the accelerator and the CPU.",
                COUNT,
                Ask(named(f"boardbench_crossings{{{CHOSEN}}}"), NAMED),
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
                "Above 100 %: worse than it was. Look at validity first.",
                ("p50", "percentunit", Ask(judged(against_history(p(50))))),
                ("p90", "percentunit", Ask(judged(against_history(p(90))))),
                (
                    "peak memory",
                    "percentunit",
                    Ask(judged(against_history(f"boardbench_memory_run_peak_rss_bytes{{{CHOSEN}}}"))),
                ),
                joined_by=RESULT,
            )
        )
        .with_panel(
            lines(
                "Median latency against its history",
                "Median of the latest run over the median of the chosen history; 100 %: as it was.",
                "percentunit",
                Ask(named(against_history(p(50))), NAMED),
                from_zero=False,
            )
        )
        .with_panel(
            lines(
                "First inference against its history",
                "Time of the first inference over the median of the chosen history.",
                "percentunit",
                Ask(named(against_history(f"boardbench_first_inference_seconds{{{CHOSEN}}}")), NAMED),
                from_zero=False,
            )
        )
        .with_panel(
            lines(
                "Changes of placement",
                "Times that operations were elsewhere than in the run before, within the chosen history.",
                COUNT,
                Ask(named(f"increase(boardbench_placement_drifts_total{{{CHOSEN}}}[{HISTORY}])"), NAMED),
            )
        )
        .with_panel(
            lines(
                "Worth of the latest results",
                "Series by what their latest result is worth.",
                COUNT,
                Ask(
                    "count by (validity) (count without (job, instance) "
                    f"(boardbench_result_validity_info{{{CHOSEN}}}))",
                    "{{validity}}",
                ),
                stacked=True,
                runs=False,
                colours=VALIDITY,
            )
        )
    )


def collector() -> dashboard.Dashboard:
    """Is the collector itself well?"""
    page = _page("Collector", "collector", "The collector itself: what comes in, what it costs, what waits.")
    ends = f"min(boardbench_collector_certificate_expiry_timestamp_seconds{{{MINE}}})"
    # Collectors that share a database tell the same jobs.
    waiting = f'max(boardbench_jobs{{{MINE}, state="queued"}})'

    def second(name: str) -> str:
        return f"sum(rate(boardbench_collector_{name}_total{{{MINE}}}[$__rate_interval])) or vector(0)"

    def hour(*names: str) -> str:
        each = (f"sum(increase(boardbench_collector_{name}_total{{{MINE}}}[1h]))" for name in names)
        return " + ".join(f"({one} or vector(0))" for one in each)

    def slowest(quantile: float) -> str:
        buckets = f"boardbench_collector_acknowledge_seconds_bucket{{{MINE}}}[$__rate_interval]"
        return f"histogram_quantile({quantile}, sum by (le) (rate({buckets})))"

    return (
        page.with_row(dashboard.Row("At a glance"))
        .with_panel(
            number(
                "Collectors",
                "Collectors that are scraped, and answer.",
                COUNT,
                Ask(f"count(boardbench_collector_open_streams{{{MINE}}}) or vector(0)", "collectors"),
                good_from=1,
            )
        )
        .with_panel(
            number(
                "Boards connected",
                "Boards whose stream to a collector is open.",
                COUNT,
                Ask(f"sum(boardbench_collector_open_streams{{{MINE}}})", "open"),
            )
        )
        .with_panel(
            number(
                "Stored in an hour",
                "Results that were stored in the last hour.",
                COUNT,
                Ask(hour("results_stored"), "stored"),
            )
        )
        .with_panel(
            number(
                "Not stored in an hour",
                "Results that were refused for good, or could not be stored, in the last hour.",
                COUNT,
                Ask(hour("results_refused", "store_failures"), "refused or failed"),
                bad_from=1,
            )
        )
        .with_panel(
            number(
                "Jobs waiting",
                "Jobs that no board has yet.",
                COUNT,
                Ask(waiting, "waiting"),
            )
        )
        .with_panel(
            number(
                "Certificate ends in",
                "Days until the first certificate of a collector's chain ends; red in the two weeks before.",
                "d",
                Ask(f"({ends} - time()) / 86400", "left"),
                good_from=CERTIFICATE_DAYS,
                none="no TLS",
            )
        )
        .with_row(dashboard.Row("What comes in"))
        .with_panel(
            lines(
                "Results a second",
                "Results a second: stored, come again, refused, failed to be stored.",
                "short",
                Ask(second("results_stored"), "stored"),
                Ask(second("results_duplicate"), "came again"),
                Ask(second("results_refused"), "refused"),
                Ask(second("store_failures"), "failed to be stored"),
                runs=False,
                colours={
                    "stored": GREEN,
                    "came again": BLUE,
                    "refused": ORANGE,
                    "failed to be stored": RED,
                },
            )
        )
        .with_panel(
            lines(
                "Streams",
                "Boards that are connected.",
                COUNT,
                Ask(f"boardbench_collector_open_streams{{{MINE}}}", "{{instance}}"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Time to acknowledge",
                "From a result's arrival to its acknowledgement.",
                "s",
                Ask(slowest(0.99), "p99"),
                Ask(slowest(0.5), "p50"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Jobs",
                "Jobs by their state.",
                COUNT,
                Ask(f"max by (state) (boardbench_jobs{{{MINE}}})", "{{state}}"),
                stacked=True,
                runs=False,
                colours=STATES,
            )
        )
        .with_row(dashboard.Row("What it costs"))
        .with_panel(
            lines(
                "Scrapes",
                "Time that a scrape takes: in all, and waiting for the store.",
                "s",
                Ask(f"boardbench_collector_scrape_duration_seconds{{{MINE}}}", "{{instance}} in all"),
                Ask(
                    f"boardbench_collector_scrape_store_seconds{{{MINE}}}",
                    "{{instance}} waiting for the store",
                ),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Series",
                "Series of boards in a scrape.",
                COUNT,
                Ask(f"boardbench_collector_series{{{MINE}}}", "{{instance}}"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Processor",
                "Share of one processor that the collector takes.",
                "percentunit",
                Ask(f"rate(process_cpu_seconds_total{{{MINE}}}[$__rate_interval])", "{{instance}}"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Memory",
                "Resident memory of the collector.",
                "bytes",
                Ask(f"process_resident_memory_bytes{{{MINE}}}", "{{instance}}"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Files for jobs",
                "Bytes of the models and inputs that are kept for jobs.",
                "bytes",
                Ask(f"boardbench_collector_files_bytes{{{MINE}}}", "{{instance}}"),
                runs=False,
            )
        )
        .with_panel(
            lines(
                "Oldest job that waits",
                "How long the oldest job that no board has yet has been waiting.",
                "s",
                Ask(f"max(boardbench_job_oldest_waiting_seconds{{{MINE}}})", "oldest"),
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
    if name == "collector":
        page = page.with_variable(_variable("job", "Job", COLLECTORS, several=True))
        page = page.with_variable(_variable("instance", "Instance", INSTANCE, several=True))
    else:
        for variable, label, values in (
            ("job", "Job", JOB),
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
