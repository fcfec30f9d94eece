"""The dashboards on a real Prometheus that is filled by real runs: every query answers, with its worth.

The boards are this machine four times: as it is; with the files of a synthetic Jetson and of a synthetic
Raspberry Pi for its sensors; and with a stand-in for the Edge TPU. Nothing here looks at how fast it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "deploy" / "grafana"
DASHBOARDS = sorted((FOLDER / "dashboards").glob("*.json"))
# As many as p99 needs to be told.
QUICK = ("--duration", "0.2", "--min-runs", "500", "--warm-up", "0.05")
PARTLY = "deeplabv3_mnv2_dm05_pascal_quant_edgetpu.tflite"
# Names that Grafana has for these units; for one that it does not know it shows the name itself.
# https://github.com/grafana/grafana/blob/v11.6.0/packages/grafana-data/src/valueFormats/categories.ts
UNITS = {"bytes", "celsius", "cps", "hertz", "joule", "none", "percentunit", "s", "short", "watt"}
# Filled in as Grafana does with everything chosen.
VARIABLES = {
    "$board": ".*",
    "$model": ".*",
    "$runtime": ".*",
    "$history": "1h",
    "$__rate_interval": "10s",
}


def load(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for panel in dashboard["panels"]:
        found += panel.get("panels", []) if panel["type"] == "row" else [panel]
    return found


every_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def test_what_is_committed_is_what_is_generated(tmp_path: Path) -> None:
    if importlib.util.find_spec("grafana_foundation_sdk") is None:
        pytest.fail("grafana-foundation-sdk is not here: pip install --group test")
    subprocess.run([sys.executable, FOLDER / "generate.py", tmp_path], check=True, timeout=120)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in DASHBOARDS]
    for path in DASHBOARDS:
        assert (tmp_path / path.name).read_text() == path.read_text(), f"{path.name}: run `make dashboards`"


def test_there_are_the_six() -> None:
    assert [path.stem for path in DASHBOARDS] == [
        "board",
        "collector",
        "fleet",
        "model",
        "placement",
        "regressions",
    ]


# The rules of Grafana's dashboard-linter, as far as they are about Prometheus:
# https://github.com/grafana/dashboard-linter/blob/main/docs/index.md


@every_dashboard
def test_data_source_is_a_variable_everywhere(path: Path) -> None:
    dashboard = load(path)
    (variable,) = [each for each in dashboard["templating"]["list"] if each["type"] == "datasource"]
    assert (variable["name"], variable["query"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels(dashboard):
        assert panel["datasource"] == source
        for target in panel["targets"]:
            assert target["datasource"] == source
    for each in dashboard["templating"]["list"]:
        if each["type"] == "query":
            assert each["datasource"] == source
    for each in dashboard["annotations"].get("list", []):
        assert each["datasource"] == source


@every_dashboard
def test_every_panel_says_what_it_is(path: Path) -> None:
    dashboard = load(path)
    assert dashboard["title"].startswith("boardbench: ") and dashboard["uid"] == f"boardbench-{path.stem}"
    assert dashboard["editable"] is False
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(set(titles)) == len(titles)
    for panel in panels(dashboard):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        if panel["type"] not in ("table", "state-timeline", "heatmap"):
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        for target in panel["targets"]:
            assert panel["type"] == "table" or target["legendFormat"], panel["title"]
            assert bool(target.get("instant")) == (panel["type"] in ("table", "stat", "bargauge")), panel[
                "title"
            ]


@every_dashboard
def test_rates_follow_the_scrape_interval(path: Path) -> None:
    for panel in panels(load(path)):
        for target in panel["targets"]:
            for window in re.findall(r"rate\([^\[]+\[([^\]]+)\]", target["expr"]):
                assert window == "$__rate_interval", panel["title"]


@every_dashboard
def test_panels_don_t_overlap(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in load(path)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


@every_dashboard
def test_what_is_not_valid_never_looks_valid(path: Path) -> None:
    """Every figure of a result comes with its validity, which is in its name and gives it its colour."""
    figures = re.compile(
        r"boardbench_(?!result_validity|device|jobs|job|collector|runtime|agent|runs|queued|spool)"
    )
    for panel in panels(load(path)):
        for target in panel["targets"]:
            if not figures.search(target["expr"]) or panel["type"] == "heatmap":
                continue
            assert "boardbench_result_validity_info" in target["expr"], panel["title"]
            # Where operations ran is as true of an invalid measurement.
            if panel["type"] == "table" or target["expr"].startswith("(boardbench_ops{"):
                continue
            assert "{{validity}}" in target["legendFormat"], panel["title"]
            coloured = {
                rule["matcher"]["options"]
                for rule in panel["fieldConfig"]["overrides"]
                if rule["matcher"]["id"] == "byRegexp"
            }
            assert coloured >= {"/\\binvalid\\b/", "/\\bdoubtful\\b/"}, panel["title"]


@pytest.fixture(scope="module")
def filled(
    module_programs: Any,
    start_prometheus: Any,
    eventually: Any,
    demo_tflite: Path,
    demo_onnx: Path,
    edgetpu_standin: Path,
) -> Iterator[tuple[str, bool]]:
    """Address of a Prometheus that has seen real runs; whether some of them fell back."""
    collector = module_programs.collector()

    def synthetic(name: str) -> Any:
        tree = module_programs.folder / f"{name}-files"
        shutil.copytree(REPOSITORY / "tests" / "boards" / name, tree, symlinks=True)
        environment = {"BOARDBENCH_AGENT_SYS_ROOT": str(tree)}
        return module_programs.agent(name, collector=collector.address, environment=environment)

    synthetic("raspberry_pi_4_throttled")
    agents = [
        module_programs.agent("plain", collector=collector.address),
        synthetic("jetson_orin_nano"),
        module_programs.agent(
            "tpu", collector=collector.address, environment={"BOARDBENCH_STANDIN_DELAY_US": "1000"}
        ),
    ]
    url = start_prometheus(module_programs, collector.http)
    for agent in agents[:2]:
        module_programs.client("push", demo_tflite, demo_onnx, "--to", agent.address, *QUICK, code=None)
    fell_back = False
    # Without the real models there is nothing that an Edge TPU takes in part.
    models = Path(os.environ.get("BOARDBENCH_MODELS", REPOSITORY.parent / "shared" / "models"))
    if models.is_dir():
        module_programs.client(
            *("push", models / PARTLY, "--to", agents[2].address, "--device", "edgetpu", *QUICK),
            *("--profile-runs", "12", "--option", f"delegate={edgetpu_standin}"),
            code=None,
        )
        fell_back = True
    eventually("all results are there", lambda: len(collector.results()) == 4 + fell_back, 60)
    wanted = "boardbench_result_validity_info"
    eventually("Prometheus has them", lambda: len(query(url, wanted)) >= 4 + fell_back, 60)
    # Rates and changes need some scrapes.
    eventually("there were scrapes", lambda: _value(query(url, "sum(count_over_time(up[1h]))")) >= 20, 60)
    yield url, fell_back


def query(url: str, promql: str) -> list[dict[str, Any]]:
    address = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': promql})}"
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            document = json.load(answer)
    except urllib.error.HTTPError as error:
        pytest.fail(f"{promql}: {error.read().decode()}")
    assert document["status"] == "success", document
    return list(document["data"]["result"])


def _value(found: list[dict[str, Any]]) -> float:
    return float(found[0]["value"][1]) if found else 0.0


def filled_in(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


@every_dashboard
def test_every_query_of_every_panel_has_an_answer(filled: tuple[str, bool], path: Path) -> None:
    url, fell_back = filled
    empty = []
    for panel in panels(load(path)):
        asked = [target["expr"] for target in panel["targets"]]
        empty += [(panel["title"], each) for each in asked if not query(url, filled_in(each))]
    if not fell_back:
        empty = [each for each in empty if "fallback" not in each[1] and "crossings" not in each[1]]
    assert empty == []


def test_the_queries_that_the_documentation_shows_have_an_answer(filled: tuple[str, bool]) -> None:
    text = (REPOSITORY / "docs" / "prometheus.md").read_text().split("### Queries")[1].split("\n## ")[0]
    blocks = [
        # An indented block of code; lines that are indented further go on with the one before.
        re.sub(r"\n\s+(?=[*+/-])", " ", textwrap.dedent(block))
        for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    ]
    shown = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    # Native histograms are behind a switch of Prometheus; the tests of the scrape have it on.
    asked = [line for line in shown if not re.search(r"distribution_seconds\)", line)]
    assert len(asked) >= 2
    assert [each for each in asked if not query(filled[0], each)] == []


@every_dashboard
def test_every_variable_and_annotation_has_an_answer(filled: tuple[str, bool], path: Path) -> None:
    url, _ = filled
    dashboard = load(path)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert found
            assert [each["metric"][found[2]] for each in query(url, filled_in(found[1]))]
    for annotation in dashboard["annotations"].get("list", []):
        found = query(url, filled_in(annotation["expr"]))
        # Nothing moved while the test ran, and nothing may be shown that did not happen.
        assert bool(found) == (annotation["name"] != "Placement changes"), annotation["name"]
