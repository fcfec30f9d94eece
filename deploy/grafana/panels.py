"""Panels as every dashboard here has them: units, legends, links, and the validity of what they show.

A run that is invalid must not look like a good one. So every query of a result's figures carries the label
``validity`` (:func:`judged`), every legend shows it, and every panel draws what is not valid in its own
colour: invalid in red and dashed, doubtful in orange.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import prometheus as prometheus_model

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
# What makes a series of results: the labels that a result's figures and its validity share. A Prometheus may
# have it more than once: of several collectors, by a scrape and by remote write.
SERIES = "job, instance, device, model, model_sha256, runtime, target, threads, variant"
# What the reader has chosen above the dashboard: of boards, of results, of collectors.
THESE = 'job=~"$job", device=~"$board"'
CHOSEN = f'{THESE}, model=~"$model", runtime=~"$runtime"'
MINE = 'job=~"$job", instance=~"$instance"'
# What a series of results is worth, and what tells those of one model on one board apart.
WORTH = "{{validity}}{{standin}}{{asked}} {{variant}}"
# How a series of results is called.
NAMED = f"{{{{device}}}} {{{{model}}}} {{{{runtime}}}} {{{{target}}}} {WORTH}"
# The label `standin` of a series in which an emulator or a stand-in had a part, and of none else. The space
# is for legends, in which it follows another label.
STANDIN = " stand-in"

RED, ORANGE, GREEN, BLUE, GREY = "red", "orange", "green", "blue", "#808080"
VALIDITY = {"valid": GREEN, "doubtful": ORANGE, "invalid": RED, "unknown": GREY}
VERDICTS = {
    "accelerated": GREEN,
    "partly": ORANGE,
    "not_accelerated": RED,
    "cpu_as_asked": GREY,
    "contradicted": RED,
    "unknown": GREY,
}
UNITS = {
    "tpu": GREEN,
    "gpu": GREEN,
    "npu": GREEN,
    "delegate": "light-green",
    "cpu_delegate": BLUE,
    "cpu": ORANGE,
    "unknown": GREY,
}
# Of jobs and of runs, where they are and how they ended.
STATES = {
    "queued": "light-blue",
    "leased": BLUE,
    "running": "dark-blue",
    "done": GREEN,
    "succeeded": GREEN,
    "cancelled": GREY,
    "unknown": ORANGE,
    "dead": RED,
    "failed": RED,
}
# Grafana's unit for what is counted.
COUNT = "none"
# Grafana's unit for a moment, as how long ago it was.
MOMENT = "dateTimeFromNow"
# Room for "a few seconds ago", in pixels.
MOMENT_WIDTH = 140
# Text of bars, in pixels: with few of them it would fill the panel.
BAR_TITLE, BAR_VALUE = 13, 20
# Of columns of a table, in pixels.
WIDTHS = {
    "device": 165,
    "model": 300,
    "runtime": 100,
    "target": 75,
    "threads": 65,
    "variant": 110,
    "validity": 75,
    "standin": 75,
    "verdict": 130,
    "evidence": 90,
    "board": 300,
    "os": 250,
}
# Those with figures share what is left.
LEAST_WIDTH = 80
# What is longer than its column is shown by a click.
LONG = ("device", "model", "variant", "board", "os")
RUNS = (
    "${collector}/api/v1/results?device=${__field.labels.device}&model=${__field.labels.model_sha256}"
    "&page_size=20&summary=true"
)


def newest(metric: str) -> str:
    """The chosen of a metric that is always 1, once a series of results.

    What is sent by remote write has no end: for five minutes what the result before was worth is there, too.
    """
    return f"(topk by ({SERIES}) (1, timestamp({metric}{{{CHOSEN}}})) * 0 + 1)"


def judged(expression: str) -> str:
    """The expression, of figures of results, with the labels ``validity`` and ``standin``."""
    had = f"boardbench_result_standin{{{CHOSEN}}}"
    standin = f'(label_replace({had} == 1, "standin", "{STANDIN}", "", "") or ({had} == 0) + 1)'
    return (
        f"({expression}) * on ({SERIES}) group_left (validity) {newest('boardbench_result_validity_info')} "
        f"* on ({SERIES}) group_left (standin) {standin}"
    )


def named(expression: str) -> str:
    """The figures of results, judged, as :data:`NAMED` names them: with the threads that were asked for."""
    return f'label_replace({judged(expression)}, "asked", " threads=$1", "threads", "(.+)")'


def on_board(expression: str) -> str:
    """The expression, of readings of boards, with the label ``emulator``."""
    return f"{expression} * on (job, instance, device) group_left (emulator) boardbench_device_info"


@dataclass(frozen=True)
class Ask:
    """A query and how its series are called."""

    expression: str
    legend: str = ""


def lines(
    title: str,
    description: str,
    unit: str,
    *asks: Ask,
    width: int = 12,
    height: int = 9,
    stacked: bool = False,
    runs: bool = True,
    bands: Sequence[tuple[str, str]] = (),
    repeated_by: str = "",
    by_unit: bool = False,
    from_zero: bool = True,
    at_most: float | None = None,
    colours: Mapping[str, str] | None = None,
) -> timeseries.Panel:
    """Series over time.

    ``by_unit``: coloured by the unit that their names begin with, and not by validity, which the name has.
    ``from_zero``: the axis begins there. ``at_most``: it ends there. ``colours``: of series, by their names.
    ``bands``: names of series, upper and lower edge, between which it is filled, one band for each worth of
    a result. ``repeated_by``: the variable of whose every value there is a panel.
    """
    panel = timeseries.Panel().fill_opacity(60 if stacked else 0).line_width(0 if stacked else 2)
    # Only where they are far apart, as what is sent by remote write is.
    panel = panel.show_points(common_model.VisibilityMode.AUTO)
    if from_zero:
        panel = panel.min(0)
    if at_most is not None:
        panel = panel.max(at_most)
    if unit == COUNT:
        # Or an axis of nothing but zeros would go to 100.
        panel = panel.decimals(0).axis_soft_max(1)
    panel = panel.legend(
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(common_model.LegendDisplayMode.TABLE)
        .placement(common_model.LegendPlacement.BOTTOM)
        .calcs(["lastNotNull"])
        # It has room for a few: the largest, which most of these are looked at for.
        .sort_by("Last *")
        .sort_desc(True)
    ).tooltip(common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI))
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
    dashed = model.DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 8]})
    if by_unit:
        for ran_on, colour in UNITS.items():
            panel = panel.override_by_regexp(f"/^{ran_on} /", [_fixed(colour)])
    else:
        panel = _by_validity(panel, [dashed])
    for name, colour in (colours or {}).items():
        panel = panel.override_by_name(name, [_fixed(colour)])
    for (upper, lower), worth, standin in itertools.product(bands, VALIDITY, ("", STANDIN)):
        filled = [
            model.DynamicConfigValue(id_val="custom.fillBelowTo", value=f"{lower} {worth}{standin}"),
            model.DynamicConfigValue(id_val="custom.fillOpacity", value=20),
        ]
        panel = panel.override_by_name(f"{upper} {worth}{standin}", filled)
    if repeated_by:
        panel = panel.repeat(repeated_by).repeat_direction("h").max_per_row(2)
    if runs:
        panel = panel.data_links([_link("Runs of this series in the collector", RUNS)])
    return _placed(panel, title, description, unit, width, height, asks, instant=False)


def number(
    title: str,
    description: str,
    unit: str,
    ask: Ask,
    *,
    width: int = 4,
    height: int = 4,
    bad_from: float | None = None,
    doubtful_from: float | None = None,
    good_from: float | None = None,
    none: str = "",
) -> stat.Panel:
    """One figure, coloured by where it becomes good or bad. ``none``: what is shown when there is none."""
    steps = [model.Threshold(value=None, color=GREEN if good_from is None else RED)]
    if good_from is not None:
        steps.append(model.Threshold(value=good_from, color=GREEN))
    if doubtful_from is not None:
        steps.append(model.Threshold(value=doubtful_from, color=ORANGE))
    if bad_from is not None:
        steps.append(model.Threshold(value=bad_from, color=RED))
    if (bad_from, doubtful_from, good_from) == (None, None, None):
        steps = [model.Threshold(value=None, color=BLUE)]
    panel = (
        stat.Panel()
        .thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
        .color_mode(common_model.BigValueColorMode.VALUE)
        .graph_mode(common_model.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if none:
        panel = panel.no_value(none)
    if unit == COUNT:
        # Of a counter Prometheus makes up what is at both ends of the time.
        panel = panel.decimals(0)
    return _placed(panel, title, description, unit, width, height, [ask], instant=True)


def bars(
    title: str, description: str, unit: str, *asks: Ask, width: int = 12, height: int = 9
) -> bargauge.Panel:
    """The latest value of each series, side by side."""
    panel = (
        bargauge.Panel()
        # Or the shortest would have no length.
        .min(0)
        .orientation(common_model.VizOrientation.HORIZONTAL)
        .display_mode(common_model.BarGaugeDisplayMode.BASIC)
        .name_placement(common_model.BarGaugeNamePlacement.TOP)
        .text(common.VizTextDisplayOptions().title_size(BAR_TITLE).value_size(BAR_VALUE))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(
            dashboard.ThresholdsConfig()
            .mode(model.ThresholdsMode.ABSOLUTE)
            .steps([model.Threshold(value=None, color=BLUE)])
        )
    )
    panel = _by_validity(panel, []).data_links([_link("Runs of this series in the collector", RUNS)])
    return _placed(panel, title, description, unit, width, height, asks, instant=True)


def heat(title: str, description: str, unit: str, ask: Ask, *, width: int = 12, height: int = 9) -> Any:
    """A histogram over time."""
    panel = heatmap.Panel().calculate(False).y_axis(heatmap.YAxisConfig().unit(unit))
    panel = _placed(panel, title, description, unit, width, height, [], instant=False)
    return panel.with_target(
        _query(ask, "A", instant=False)
        .format(prometheus_model.PromQueryFormat.HEATMAP)
        .legend_format("{{le}}")
    )


def states(
    title: str,
    description: str,
    ask: Ask,
    names: Mapping[str, tuple[str, str]],
    *,
    width: int = 12,
    height: int = 9,
    none: str = "",
) -> statetimeline.Panel:
    """States over time; ``names``: value → text and colour. ``none``: what is shown when there is none."""
    panel = statetimeline.Panel().mappings(
        [
            model.ValueMap(
                options={
                    value: model.ValueMappingResult(text=text, color=colour)
                    for value, (text, colour) in names.items()
                }
            )
        ]
    )
    if none:
        panel = panel.no_value(none)
    return _placed(panel, title, description, "", width, height, [ask], instant=False)


def listing(
    title: str,
    description: str,
    *columns: tuple[str, str, Ask],
    joined_by: Sequence[str],
    width: int = 24,
    height: int = 9,
) -> table.Panel:
    """A table: one row a series, one column a query (heading, unit, query) that has the labels ``joined_by``.

    Every query gives the labels of the row and its value; the columns are joined by the labels' text.
    """
    panel = table.Panel().cell_height(common_model.TableCellHeight.SM)
    for place, (heading, unit, _) in enumerate(columns):
        shown = [model.DynamicConfigValue(id_val="displayName", value=heading)]
        if unit:
            shown.append(model.DynamicConfigValue(id_val="unit", value=unit))
        width_of = ("width", MOMENT_WIDTH) if unit == MOMENT else ("minWidth", LEAST_WIDTH)
        shown.append(model.DynamicConfigValue(id_val=f"custom.{width_of[0]}", value=width_of[1]))
        panel = panel.override_by_name(f"Value #{_ref(place)}", shown)
    for label, colours in (("validity", VALIDITY), ("verdict", VERDICTS)):
        mapped = {
            value: {"text": value, "color": colour, "index": index}
            for index, (value, colour) in enumerate(colours.items())
        }
        panel = panel.override_by_name(
            label,
            [
                model.DynamicConfigValue(id_val="mappings", value=[{"type": "value", "options": mapped}]),
                model.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-text"}),
            ],
        )
    for label, pixels in WIDTHS.items():
        if label in joined_by:
            wide = [model.DynamicConfigValue(id_val="custom.width", value=pixels)]
            if label in LONG:
                wide.append(model.DynamicConfigValue(id_val="custom.inspect", value=True))
            panel = panel.override_by_name(label, wide)
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
    panel = panel.with_transformation(
        model.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": {"Time": True},
                "indexByName": {label: index for index, label in enumerate(joined_by)},
            },
        )
    )
    panel = _placed(panel, title, description, "", width, height, [], instant=True)
    for place, (_, _, ask) in enumerate(columns):
        by = ", ".join(joined_by)
        summed = Ask(f"max by ({by}) ({ask.expression})")
        panel = panel.with_target(
            _query(summed, _ref(place), instant=True).format(prometheus_model.PromQueryFormat.TABLE)
        )
    return panel


def _ref(place: int) -> str:
    return chr(ord("A") + place)


def _link(title: str, url: str) -> dashboard.DashboardLink:
    return dashboard.DashboardLink(title).url(url).target_blank(True)


def _fixed(colour: str) -> model.DynamicConfigValue:
    return model.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": colour})


def _by_validity(panel: Any, more: Sequence[model.DynamicConfigValue]) -> Any:
    panel = panel.override_by_regexp("/\\binvalid\\b/", [_fixed(RED), *more])
    return panel.override_by_regexp("/\\bdoubtful\\b/", [_fixed(ORANGE)])


def _query(ask: Ask, ref: str, *, instant: bool) -> prometheus.Dataquery:
    built = prometheus.Dataquery().expr(ask.expression).ref_id(ref).datasource(SOURCE)
    built = built.instant() if instant else built.range()
    return built.legend_format(ask.legend) if ask.legend else built


def _placed(
    panel: Any,
    title: str,
    description: str,
    unit: str,
    width: int,
    height: int,
    asks: Sequence[Ask],
    *,
    instant: bool,
) -> Any:
    panel = panel.title(title).description(description).datasource(SOURCE).span(width).height(height)
    if unit:
        panel = panel.unit(unit)
    for place, ask in enumerate(asks):
        panel = panel.with_target(_query(ask, _ref(place), instant=instant))
    return panel
