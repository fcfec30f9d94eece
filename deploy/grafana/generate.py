"""Writes the dashboards: ``generate.py [FOLDER]``, by default ``dashboards/`` beside this file.

Run by ``make dashboards``. What it writes is committed, so that Grafana can be given it as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dashboards import ALL
from grafana_foundation_sdk.cog.encoder import JSONEncoder


def generate(folder: Path) -> None:
    """Writes one file a dashboard, replacing what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in ALL.items():
        text = JSONEncoder(sort_keys=True, indent=1).encode(make().build())
        (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("dashboards"))
