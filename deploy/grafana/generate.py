"""Writes the dashboards: ``generate.py [FOLDER]``, by default ``dashboards/`` beside this file.

Run by ``make dashboards``. What it writes is committed, so that Grafana can be given it as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dashboards import ALL
from grafana_foundation_sdk.cog.encoder import JSONEncoder

# The library writes for the latest Grafana; Grafana 11 knows none of these, and needs none of them.
_NEWER = {
    "links": ("placement",),
    "annotations": ("placement",),
    "variables": ("auto", "auto_count", "auto_min"),
}


def generate(folder: Path) -> None:
    """Writes one file a dashboard, replacing what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in ALL.items():
        dashboard = json.loads(JSONEncoder().encode(make().build()))
        _drop(dashboard["links"], "links")
        _drop(dashboard["annotations"].get("list", []), "annotations")
        _drop(dashboard["templating"]["list"], "variables")
        (folder / f"{name}.json").write_text(json.dumps(dashboard, sort_keys=True, indent=1) + "\n")


def _drop(entries: list[dict[str, Any]], kind: str) -> None:
    for entry in entries:
        for name in _NEWER[kind]:
            entry.pop(name, None)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("dashboards"))
