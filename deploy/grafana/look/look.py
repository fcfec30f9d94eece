"""Looks at the dashboards without a Grafana server: ``look.py PROMETHEUS [--pictures FOLDER]``.

Checks each dashboard by a JSON Schema that is made of Grafana's own types, asks a Prometheus what each panel
would show, and draws the panels with Grafana's own components in a headless Chromium. Needs Node.js, npm and
Chromium; what it installs and makes is in ``.cache/grafana``. Panels that only Grafana's application can draw
(state timelines, heatmaps) are named with what they would show.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DASHBOARDS = HERE.parent / "dashboards"
WORK = HERE.parents[2] / ".cache" / "grafana"
SOURCES = ("package.json", "tsconfig.json", "dashboard.ts", "panels.jsx", "scrollbars.js", "validate.mjs")
# What Grafana would fill in with everything chosen.
EVERYTHING = {f"${name}": ".*" for name in ("job", "instance", "board", "model", "runtime")} | {
    "$history": "1h",
    "$__rate_interval": "1m",
}
# The variables of which dashboards that are about one of something have one chosen.
ABOUT = {"board": ("board", "model"), "model": ("model",)}
WIDTH = 24 * 62
_PAGE = """<!doctype html><html><head><meta charset="utf-8"><link rel="stylesheet" href="{folder}/panels.css">
<style>body {{ margin: 0; font-family: Inter, Helvetica, Arial, sans-serif; font-size: 14px; }}</style></head>
<body><div id="root"></div><script>window.process = {{ env: {{}} }}; window.DASHBOARD = {dashboard};
window.ANSWERS = {answers}; window.RANGE = {range};</script><script src="{folder}/panels.js"></script></body>
</html>
"""


def main() -> int:
    """Checks, asks, draws; 1 when a dashboard is not as Grafana has them, or a panel has nothing to show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "prometheus", help="address of a Prometheus that scrapes a collector: http://HOST:PORT"
    )
    parser.add_argument("--pictures", type=Path, help="folder for one picture a dashboard")
    parser.add_argument("--minutes", type=float, default=15, help="how far back to ask (default 15)")
    parser.add_argument(
        "--choose",
        action="append",
        default=[],
        metavar="VARIABLE=VALUE",
        help="choose one board or model on the dashboards that are about one; again for the other; "
        "without it everything is chosen",
    )
    arguments = parser.parse_args()
    chosen = dict(each.partition("=")[::2] for each in arguments.choose)
    prepare()
    files = sorted(DASHBOARDS.glob("*.json"))
    done = subprocess.run(["node", "validate.mjs", "schema.json", *files], cwd=WORK)
    empty = 0
    for file in files:
        dashboard = json.loads(file.read_text())
        about = {name: value for name, value in chosen.items() if name in ABOUT.get(file.stem, ())}
        end = time.time()
        between = (end - arguments.minutes * 60, end)
        answers, without = answered(arguments.prometheus, dashboard, between, about)
        for title in without:
            print(f"{file.stem}: {title}: nothing to show")
        empty += len(without)
        if arguments.pictures:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            photograph(named(dashboard, about), answers, between, arguments.pictures / f"{file.stem}.png")
    return 1 if done.returncode or empty else 0


def prepare() -> None:
    """Installs Grafana's components, makes the schema and the page's script, when something has changed."""
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            raise SystemExit(f"{name} is not here: install Node.js 20 or newer")
    WORK.mkdir(parents=True, exist_ok=True)
    stamp = WORK / "made"
    sources = b"".join((HERE / name).read_bytes() for name in SOURCES)
    if stamp.exists() and stamp.read_bytes() == sources:
        return
    for name in SOURCES:
        shutil.copy(HERE / name, WORK / name)
    _run("npm", "install", "--no-audit", "--no-fund", "--silent", "--no-package-lock")
    _run(
        *("npx", "ts-json-schema-generator", "--path", "dashboard.ts", "--type", "Checked"),
        *("--tsconfig", "tsconfig.json", "--no-type-check", "-o", "schema.json"),
    )
    _run(
        *("npx", "esbuild", "panels.jsx", "--bundle", "--minify", "--outfile=panels.js", "--log-level=error"),
        "--alias:react-custom-scrollbars-2=./scrollbars.js",
        *("--loader:.ttf=empty", "--loader:.svg=empty", '--define:process.env.NODE_ENV="production"'),
    )
    stamp.write_bytes(sources)


def _run(*command: str) -> None:
    subprocess.run(command, cwd=WORK, check=True, timeout=1200)


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Every panel, those of rows too."""
    found: list[dict[str, Any]] = []
    for panel in dashboard["panels"]:
        found += panel.get("panels", []) if panel["type"] == "row" else [panel]
    return found


def named(dashboard: dict[str, Any], about: Mapping[str, str]) -> dict[str, Any]:
    """The dashboard with what it is about in its titles."""
    titled = json.loads(json.dumps(dashboard))
    titled["title"] = ": ".join([dashboard["title"], *about.values()])
    for panel in panels(titled):
        for name in EVERYTHING:
            panel["title"] = panel["title"].replace(name, about.get(name[1:], "everything"))
    return titled


def answered(
    prometheus: str, dashboard: dict[str, Any], between: tuple[float, float], about: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """What each panel's targets show, by its title; and the titles of panels with nothing to show."""
    filled = EVERYTHING | {
        f"${name}": re.escape(value).replace("\\", "\\\\") for name, value in about.items()
    }
    answers: dict[str, Any] = {}
    without = []
    for panel in panels(named(dashboard, about)):
        found = [_ask(prometheus, target, between, filled) for target in panel["targets"]]
        answers[panel["title"]] = found
        if not any(found) and "noValue" not in panel["fieldConfig"]["defaults"]:
            without.append(panel["title"])
    return answers, without


def _ask(
    prometheus: str, target: dict[str, Any], between: tuple[float, float], filled: Mapping[str, str]
) -> list[dict[str, Any]]:
    expression = target["expr"]
    for name, value in filled.items():
        expression = expression.replace(name, value)
    query: dict[str, object] = {"query": expression}
    if target.get("instant"):
        path = "query"
    else:
        path = "query_range"
        # As Grafana does: whole steps, at whole multiples of them.
        begin, end = between
        step = max(1, math.ceil((end - begin) / 240))
        query |= {"start": begin // step * step, "end": end // step * step, "step": step}
    address = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            document = json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{expression}: {error.read().decode()}") from error
    return [
        {
            "name": _named(target.get("legendFormat", ""), each["metric"]),
            "labels": each["metric"],
            "step": query.get("step"),
            "values": each.get("values") or [each["value"]],
        }
        for each in document["data"]["result"]
    ]


def _named(legend: str, labels: dict[str, str]) -> str:
    named = re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend)
    return " ".join(named.split()) or ", ".join(f"{key}={value}" for key, value in labels.items())


def photograph(
    dashboard: dict[str, Any], answers: dict[str, Any], between: tuple[float, float], picture: Path
) -> None:
    """A picture of the dashboard; repeated panels are drawn once, with everything."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium here: apt install chromium")
    page = WORK / f"{picture.stem}.html"
    page.write_text(
        _PAGE.format(
            folder=WORK.as_uri(),
            # A label may hold what would end the script.
            dashboard=json.dumps(dashboard).replace("<", "\\u003c"),
            answers=json.dumps(answers).replace("<", "\\u003c"),
            range=json.dumps(between),
        )
    )
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={WORK / 'chromium'}", "--virtual-time-budget=8000",
            f"--window-size={WIDTH + 16},{rows * 38 + 90}", f"--screenshot={picture.resolve()}",
            page.as_uri(),
        ],
        check=True,
        timeout=180,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    if not picture.exists():
        raise SystemExit(f"{picture} was not made")


if __name__ == "__main__":
    sys.exit(main())
