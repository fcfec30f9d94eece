"""Signs that the board was held back: by heat, by its supply, by a power limit.

Some say that it happens now (a bit, a step), some count how often it happened, and a Raspberry Pi's firmware
also has bits that stay set until the next boot: those say something about a run only when they are new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from boardbench.agent.board.timeline import Point, Timeline

# Samples of a quantity and source in a stretch of time.
_Take = Callable[[str, str, float, float], list[Point]]

THROTTLED, UNDERVOLTAGE, OVER_CURRENT = "throttled", "undervoltage", "over_current"

# Quantities that are above 0 as long as it lasts: the code of the warning, words, and whether it is the
# processors that are held back, and not only an accelerator.
_NOW = {
    "undervoltage_now": (UNDERVOLTAGE, "under-voltage", True),
    "frequency_capped_now": (THROTTLED, "frequency capped", True),
    "throttled_now": (THROTTLED, "throttled", True),
    "soft_temperature_limit_now": (THROTTLED, "soft temperature limit", True),
    "cooling_steps": (THROTTLED, "slowed down", True),
    "thermal_slowdown_now": (THROTTLED, "thermal slowdown", False),
    "hardware_thermal_slowdown_now": (THROTTLED, "thermal slowdown", False),
    "hardware_slowdown_now": (THROTTLED, "slowdown by hardware", False),
    "power_brake_now": (THROTTLED, "power brake", False),
    "power_capped_now": (THROTTLED, "power limit", False),
}
# A graphics card at its power limit does what it is made for; its figures are right for this limit.
_LIGHTER = {"power_capped_now"}

_SINCE_BOOT = {
    "undervoltage_since_boot": (UNDERVOLTAGE, "under-voltage"),
    "frequency_capped_since_boot": (THROTTLED, "frequency capped"),
    "throttled_since_boot": (THROTTLED, "throttled"),
    "soft_temperature_limit_since_boot": (THROTTLED, "soft temperature limit"),
}
# Quantities that count events.
_COUNTED = {
    "throttle_events": (THROTTLED, "throttled"),
    "over_current_events": (OVER_CURRENT, "over-current"),
}


@dataclass(frozen=True)
class Sign:
    """Something that held the board back within a stretch of time."""

    code: str
    # "under-voltage", "cpufreq-cpu0 slowed down by 2 steps".
    words: str
    # When it was first seen.
    seconds: float
    quantity: str
    # The step, or how many events.
    amount: float
    light: bool = False


def signs(
    timeline: Timeline, begin: float, end: float, *, accelerator: bool, mark: bool = True
) -> list[Sign]:
    """What held the board back from ``begin`` to ``end``; an accelerator's only where one is measured.

    ``mark``: that a mark was set at the end, so that what was sampled next belongs to it.
    """
    take = timeline.around if mark else timeline.within
    found: dict[tuple[str, str], Sign] = {}
    for sign in (
        *_now(timeline, begin, end, accelerator, take),
        *_newly_set(timeline, begin, end, take),
        *_counted(timeline, begin, end),
    ):
        found.setdefault((sign.code, sign.words), sign)
    return sorted(found.values(), key=lambda sign: sign.seconds)


def before(timeline: Timeline, begin: float) -> list[str]:
    """What had happened between the board's boot and ``begin``, in words."""
    words = []
    for quantity, (_, name) in _SINCE_BOOT.items():
        for source in timeline.sources(quantity):
            point = timeline.last(quantity, source, begin)
            if point is not None and point.value > 0:
                words.append(name)
    for quantity, (_, name) in _COUNTED.items():
        for source in timeline.sources(quantity):
            point = timeline.last(quantity, source, begin)
            if point is not None and point.value > 0:
                words.append(f"{source} {name} {point.value:.0f} times")
    return list(dict.fromkeys(words))


def is_readable(timeline: Timeline) -> bool:
    """Whether anything on the board can tell that it is held back."""
    return any(timeline.sources(quantity) for quantity in (*_NOW, *_SINCE_BOOT, *_COUNTED))


def _now(timeline: Timeline, begin: float, end: float, accelerator: bool, take: _Take) -> Iterator[Sign]:
    for quantity, (code, name, of_processors) in _NOW.items():
        if not of_processors and not accelerator:
            continue
        for source in timeline.sources(quantity):
            points = take(quantity, source, begin, end)
            held = [point for point in points if point.greatest > 0]
            if not held:
                continue
            most = max(point.greatest for point in held)
            words = name
            if quantity == "cooling_steps":
                words = f"{source} {name} by {most:.0f} {'step' if most == 1 else 'steps'}"
            elif not of_processors:
                words = f"{source}: {name}"
            yield Sign(code, words, held[0].seconds, quantity, most, light=quantity in _LIGHTER)


def _newly_set(timeline: Timeline, begin: float, end: float, take: _Take) -> Iterator[Sign]:
    for quantity, (code, name) in _SINCE_BOOT.items():
        for source in timeline.sources(quantity):
            point = timeline.last(quantity, source, begin) or timeline.first(quantity, source)
            if point is None or point.value > 0:
                continue
            for later in take(quantity, source, begin, end):
                if later.greatest > 0:
                    yield Sign(code, name, later.seconds, quantity, 1.0)
                    break


def _counted(timeline: Timeline, begin: float, end: float) -> Iterator[Sign]:
    for quantity, (code, name) in _COUNTED.items():
        for source in timeline.sources(quantity):
            events = timeline.rise(quantity, source, begin, end)
            if events > 0:
                words = f"{source} {name} {events:.0f} {'time' if events == 1 else 'times'}"
                yield Sign(code, words, _first_rise(timeline, quantity, source, begin), quantity, events)


def _first_rise(timeline: Timeline, quantity: str, source: str, begin: float) -> float:
    start = timeline.last(quantity, source, begin) or timeline.first(quantity, source)
    assert start is not None
    for point in timeline.within(quantity, source, start.seconds, float("inf")):
        if point.value > start.value:
            return point.seconds
    return start.seconds


def joined(found: Sequence[Sign]) -> str:
    """The signs as words of a sentence."""
    return ", ".join(sign.words for sign in found)
