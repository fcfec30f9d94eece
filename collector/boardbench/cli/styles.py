"""The few styles of everything that is printed, by what they mean."""

from __future__ import annotations

GOOD = "green"
BAD = "bold red"
DOUBTFUL = "bold yellow"
QUIET = "dim"
STRONG = "bold"
