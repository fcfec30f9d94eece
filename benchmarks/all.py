"""Every benchmark of this folder, one after the other; ends with 1 when a bound is missed."""

from __future__ import annotations

import sys

import engines
import first_inference
import fleet
import idle
import ingest
import inspecting
import overhead
import precision
import scrape
import sensors
import spool
import tools
import upload
from report import run

ALL = (
    overhead,
    engines,
    tools,
    precision,
    sensors,
    upload,
    first_inference,
    idle,
    spool,
    inspecting,
    ingest,
    scrape,
    fleet,
)

if __name__ == "__main__":
    sys.exit(
        run(
            [(each.measure, each.add_arguments) for each in ALL],
            __doc__,
            section=[each.__name__ for each in ALL],
        )
    )
