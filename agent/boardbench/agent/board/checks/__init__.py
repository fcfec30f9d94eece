"""Every check that boardbench makes of a board. A new one is a function and a line in its file's table."""

from __future__ import annotations

import logging

from boardbench.agent.board.check import Check, View, unknown
from boardbench.agent.board.checks import accelerators, clocks, load, supply, system
from boardbench.v1 import agent_pb2

_log = logging.getLogger(__name__)

_ORDER = (
    "machine",
    "processors",
    "quota",
    "governor",
    "frequency_cap",
    "turbo",
    "power_mode",
    "clocks",
    "supply",
    "throttled",
    "heat",
    "load",
    "pressure",
    "memory",
    "swap",
    "disk",
    "clock_source",
    "time",
    "usb",
    "accelerator",
    "power_meter",
    "page_monitor",
    "runtimes",
)

_BY_CODE = {
    check.code: check for subject in (load, clocks, supply, accelerators, system) for check in subject.CHECKS
}

CHECKS: tuple[Check, ...] = tuple(_BY_CODE[code] for code in _ORDER)
"""In the order in which they are told."""


def findings(view: View) -> list[agent_pb2.Finding]:
    """One finding a check. A check that fails says so and hides no other."""
    return [_look(check, view) for check in CHECKS]


def _look(check: Check, view: View) -> agent_pb2.Finding:
    try:
        found = check.look(view)
    except (OSError, ValueError) as error:
        _log.warning("the check %s failed", check.code, exc_info=True)
        found = unknown(f"it can't be told: {type(error).__name__}: {error}")
    found.code = check.code
    return found
