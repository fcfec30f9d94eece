"""Shows the most that files of each kind take to read."""

from __future__ import annotations

import sys

from . import DENSE, padded
from .effort import attempt, worst

chosen = [name for name in DENSE if not sys.argv[2:] or any(word in name for word in sys.argv[2:])]
for name in chosen:
    found, dense = worst(name, int(float(sys.argv[1]) * (1 << 20)))
    peak = attempt(name, padded(DENSE[name](dense), found.size_bytes), memory=True).peak_bytes
    print(  # noqa: T201
        f"{name:42} {dense / 1e6:6.2f} of {found.size_bytes / 1e6:5.1f} MB {found.seconds:6.3f} s "
        f"{found.steps:8} steps {found.seconds / max(1, found.steps) * 1e9:6.0f} ns/step "
        f"{peak / found.size_bytes:5.1f}x {found.outcome[:60]}",
        flush=True,
    )
