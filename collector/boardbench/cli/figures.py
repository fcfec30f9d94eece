"""Numbers as people read them: a fixed number of digits, a unit, the same form everywhere."""

from __future__ import annotations

import datetime
import math

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_BYTES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def digits(value: float, significant: int = 4) -> str:
    """``value`` with this many significant digits, never in exponents: "1.234", "12.34", "1234"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    rounded = float(f"{value:.{significant - 1}e}")
    decimals = max(0, significant - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}"


def seconds_unit(seconds: float) -> tuple[float, str]:
    """The unit in which ``seconds`` is at least 1: its length in seconds, and its sign."""
    for length, sign in _SECONDS:
        if abs(seconds) >= length * 0.99995:  # 0.99996 s is shown as 1.000 s, not as 1000 ms
            return length, sign
    return _SECONDS[-1] if seconds else _SECONDS[0]


def seconds(value: float) -> str:
    """A duration: "1.234 ms", "12.3 s" is "12.30 s"."""
    length, sign = seconds_unit(value)
    return f"{digits(value / length)} {sign}"


def count_bytes(value: int) -> str:
    """An amount of memory: "45.1 MiB"."""
    for size, sign in _BYTES:
        if abs(value) >= size:
            return f"{value / size:.1f} {sign}"
    return f"{value} B"


def whole(value: int) -> str:
    """An integer with commas between the thousands."""
    return f"{value:,}"


def plural(value: int, singular: str, several: str | None = None) -> str:
    """A number and its noun: "1 op", "2,000 ops"."""
    return f"{value:,} {singular if value == 1 else several or singular + 's'}"


def percentile_name(percentile: float) -> str:
    """The usual name of a percentile: "p50", "p99.9"."""
    return f"p{percentile:g}"


def span(value: float) -> str:
    """A length of time in one or two words: "12 s", "3 min", "2 h", "5 d"."""
    for length, sign in ((86400, "d"), (3600, "h"), (60, "min")):
        if value >= 2 * length:
            return f"{value / length:.0f} {sign}"
    return f"{max(0.0, value):.0f} s"


def moment(time: datetime.datetime) -> str:
    """A point in time in this machine's zone: "2026-11-22 14:01:03"."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def minute(time: datetime.datetime) -> str:
    """The same to the minute, for lists: "2026-11-22 14:01"."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M")
