"""The dashboards on a real Prometheus that is filled by real runs: every query answers, with its worth.

The boards are this machine four times: as it is; with the files of a synthetic Jetson and of a synthetic
Raspberry Pi for its sensors; and with a stand-in for the Edge TPU. Nothing here looks at how fast it is.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
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
UNITS = {"bytes", "celsius", "d", "hertz", "joule", "none", "percentunit", "s", "short", "watt"}
# Filled in as Grafana does with everything chosen.
VARIABLES = {
    "$job": ".*",
    "$instance": ".*",
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
    """Every figure of a result comes with its validity, which is in its name and gives it its colour; and
    with whether an emulator or a stand-in had a part in it."""
    figures = re.compile(
        r"boardbench_(?!result_validity|device|jobs|job|collector|runtime|agent|runs|queued|spool)"
    )
    for panel in panels(load(path)):
        for target in panel["targets"]:
            if not figures.search(target["expr"]) or panel["type"] == "heatmap":
                continue
            assert "boardbench_result_validity_info" in target["expr"], panel["title"]
            assert "boardbench_result_standin" in target["expr"], panel["title"]
            if panel["type"] == "table":
                shown = panel["transformations"][1]["options"]["indexByName"]
                assert {"validity", "standin"} <= set(shown), panel["title"]
                continue
            assert "{{validity}}{{standin}}" in target["legendFormat"], panel["title"]
            # Where operations ran is as true of an invalid measurement.
            if target["expr"].startswith("label_replace((boardbench_ops{"):
                continue
            coloured = {
                rule["matcher"]["options"]
                for rule in panel["fieldConfig"]["overrides"]
                if rule["matcher"]["id"] == "byRegexp"
            }
            assert coloured >= {"/\\binvalid\\b/", "/\\bdoubtful\\b/"}, panel["title"]


@every_dashboard
def test_an_axis_begins_where_the_figure_does(path: Path) -> None:
    """Without a minimum Grafana takes the least of what it shows: the shortest bar has no length, a share of
    89 % looks like nothing, and a stack of five like one of three."""
    for panel in panels(load(path)):
        told = panel["fieldConfig"]["defaults"]
        if panel["type"] == "bargauge":
            assert told["min"] == 0, panel["title"]
        if panel["type"] != "timeseries":
            continue
        # It is the change that is looked at, not the size.
        near = told["unit"] == "celsius" or re.search(r"bounds|against its history", panel["title"])
        assert told.get("min") == (None if near else 0), panel["title"]
        if told["unit"] == "none":
            assert (told["decimals"], told["custom"]["axisSoftMax"]) == (0, 1), panel["title"]


def bands() -> set[str]:
    """Names of series between which it is to be filled, on all dashboards."""
    return {
        rule["matcher"]["options"]
        for path in DASHBOARDS
        for panel in panels(load(path))
        for rule in panel["fieldConfig"]["overrides"]
        if any(each["id"] == "custom.fillBelowTo" for each in rule["properties"])
    }


@dataclass(frozen=True)
class Filled:
    """A Prometheus that has seen real runs."""

    url: str
    fell_back: bool
    encrypted: bool


RESULTS = "boardbench_results"
"""The job of what a collector sends by remote write."""


class Sent(http.server.BaseHTTPRequestHandler):
    """The series of results as remote write leaves them: with timestamps, so without an end. What each result
    is worth was something else half a minute ago."""

    exposition = ""

    def do_GET(self) -> None:
        now = time.time() * 1000
        lines = []
        for line in self.exposition.splitlines():
            if "model_sha256=" not in line or line.startswith("#"):
                continue
            lines.append(f"{line} {now:.0f}")
            if line.startswith("boardbench_result_validity_info{"):
                worth = "doubtful" if 'validity="doubtful"' not in line else "valid"
                before = re.sub(r'validity="\w+"', f'validity="{worth}"', line)
                lines.append(f"{before} {now - 30_000:.0f}")
        body = ("\n".join(lines) + "\n").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def sent() -> Iterator[http.server.HTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join(20)
    server.server_close()


@pytest.fixture(scope="module")
def filled(
    module_programs: Any,
    start_prometheus: Any,
    eventually: Any,
    demo_tflite: Path,
    demo_onnx: Path,
    edgetpu_standin: Path,
    sent: http.server.HTTPServer,
) -> Filled:
    """One that scrapes a collector twice, which is what a board looks like that is scraped itself, too;
    another collector, which has a certificate; and what remote write would have left."""
    collector = module_programs.collector()
    more: list[dict[str, Any]] = [
        {"job_name": "again", "static_configs": [{"targets": [collector.http]}]},
        {"job_name": RESULTS, "static_configs": [{"targets": [f"127.0.0.1:{sent.server_port}"]}]},
    ]
    encrypted = shutil.which("openssl") is not None
    if encrypted:
        pair = [module_programs.folder / name for name in ("lab.pem", "lab.key")]
        subprocess.run(
            [
                *(
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "ec",
                    "-pkeyopt",
                    "ec_paramgen_curve:P-256",
                    "-nodes",
                ),
                *("-subj", "/CN=localhost", "-days", "20", "-out", pair[0], "-keyout", pair[1]),
            ],
            check=True,
            capture_output=True,
        )
        options = [f"--tls-cert={pair[0]}", f"--tls-key={pair[1]}"]
        other = module_programs.collector("encrypted", options=options)
        more.append(
            {
                "job_name": "encrypted",
                "scheme": "https",
                "tls_config": {"insecure_skip_verify": True},
                "static_configs": [{"targets": [other.http]}],
            }
        )

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
    url = start_prometheus(module_programs, collector.http, *more)
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
    Sent.exposition = collector.get("/metrics")
    runs = 4 + fell_back
    for job, worths in (("boardbench", 1), ("again", 1), (RESULTS, 2)):
        wanted = f'count(boardbench_result_validity_info{{job="{job}"}}) == {worths * runs}'
        eventually(f"Prometheus has them as {job}", functools.partial(query, url, wanted), 60)
    if encrypted:
        eventually("the other one is scraped", lambda: _value(query(url, 'up{job="encrypted"}')) == 1, 60)
    # Rates and changes need some scrapes.
    wanted = 'count_over_time(up{job="boardbench"}[1h])'
    eventually("there were scrapes", lambda: _value(query(url, wanted)) >= 20, 60)
    return Filled(url, fell_back, encrypted)


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
    # $1 is of label_replace(), and of no variable.
    assert not re.search(r"\$(?!1\b)", expression), expression
    return expression


@every_dashboard
def test_every_query_of_every_panel_has_an_answer(filled: Filled, path: Path) -> None:
    empty = []
    for panel in panels(load(path)):
        asked = [target["expr"] for target in panel["targets"]]
        empty += [(panel["title"], each) for each in asked if not query(filled.url, filled_in(each))]
    if not filled.fell_back:
        empty = [each for each in empty if "fallback" not in each[1] and "crossings" not in each[1]]
    if not filled.encrypted:
        empty = [each for each in empty if "certificate" not in each[1]]
    assert empty == []


def expressions(path: Path, title: str) -> list[str]:
    (found,) = [panel for panel in panels(load(path)) if panel["title"] == title]
    return [filled_in(target["expr"]) for target in found["targets"]]


def test_a_result_has_its_own_worth_wherever_it_is_from(filled: Filled) -> None:
    truly = {
        each["metric"]["device"] + each["metric"]["model"]: each["metric"]["validity"]
        for each in query(filled.url, 'boardbench_result_validity_info{job="boardbench"}')
    }
    (asked,) = expressions(FOLDER / "dashboards" / "fleet.json", "Median latency")
    shown: dict[str, dict[str, str]] = {}
    for each in query(filled.url, asked):
        of = shown.setdefault(each["metric"]["job"], {})
        key = each["metric"]["device"] + each["metric"]["model"]
        assert key not in of
        of[key] = each["metric"]["validity"]
    assert shown == {"boardbench": truly, "again": truly, RESULTS: truly}


def test_a_stand_in_says_so_and_nothing_else_does(filled: Filled) -> None:
    (asked,) = expressions(FOLDER / "dashboards" / "fleet.json", "Median latency")
    told = {each["metric"]["device"]: each["metric"].get("standin") for each in query(filled.url, asked)}
    assert told.pop("board-plain") is None
    # Its sensors are a folder.
    assert told.pop("board-jetson_orin_nano") == " stand-in"
    assert told == ({"board-tpu": " stand-in"} if filled.fell_back else {})


def test_what_is_filled_between_is_there(filled: Filled) -> None:
    """The names of bands are spelled out, and have to be those that legends make of the labels."""
    shown = set()
    for panel in panels(load(FOLDER / "dashboards" / "board.json")):
        for target in panel["targets"]:
            if target.get("legendFormat", "").endswith(worth := "{{validity}}{{standin}}"):
                for each in query(filled.url, filled_in(target["expr"])):
                    of = each["metric"]["validity"] + each["metric"].get("standin", "")
                    shown.add(target["legendFormat"].replace(worth, of))
    upper = {name for name in shown if re.match("upper|p90|p99", name)}
    assert upper and upper <= bands()
    assert not filled.fell_back or any(name.endswith(" stand-in") for name in upper)


def test_the_end_of_a_certificate_is_told_in_days(filled: Filled) -> None:
    if not filled.encrypted:
        pytest.skip("there is no openssl here to make a certificate with")
    (asked,) = expressions(FOLDER / "dashboards" / "collector.json", "Certificate ends in")
    assert 19.9 < _value(query(filled.url, asked)) <= 20


def test_the_queries_that_the_documentation_shows_have_an_answer(filled: Filled) -> None:
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
    assert [each for each in asked if not query(filled.url, each)] == []


@every_dashboard
def test_every_variable_and_annotation_has_an_answer(filled: Filled, path: Path) -> None:
    url = filled.url
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
