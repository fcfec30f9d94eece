"""Does the board get what it needs, and does it get rid of its heat?

Sources: raspberrypi.com/documentation: "get_throttled", and in "Device Trees" ``chosen/power/max_current`` (a
big-endian number of mA, on a Raspberry Pi 5); coral.ai/docs/accelerator/datasheet (900 mA at most);
Documentation/ABI/testing/sysfs-class-power, Documentation/driver-api/thermal/sysfs-api.rst and
Documentation/hwmon/{coretemp,k10temp}.rst of the Linux kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.check import (
    Check,
    View,
    absent,
    doubtful,
    invalid,
    ok,
    read,
    told,
    unknown,
    user,
)
from boardbench.agent.board.sensor import Reading
from boardbench.agent.board.sensors import nvidia, over_current, raspberry_pi, thermal
from boardbench.v1 import agent_pb2

_MAX_CURRENT = "sys/firmware/devicetree/base/chosen/power/max_current"
# With less a Raspberry Pi 5 gives its USB ports 600 mA in all instead of 1.6 A.
_PI_5_MILLIAMPERES = 5000
# What its maker asks for (raspberrypi.com/documentation/computers/getting-started.html#power-supply).
_PI_SUPPLIES = {
    "Raspberry Pi 5": "5.1 V, 5 A",
    "Raspberry Pi 500": "5.1 V, 5 A",
    "Raspberry Pi Compute Module 5": "5.1 V, 5 A",
    "Raspberry Pi 4": "5.1 V, 3 A",
    "Raspberry Pi 400": "5.1 V, 3 A",
    "Raspberry Pi 3": "5.1 V, 2.5 A",
    "Raspberry Pi Zero": "5.1 V, 2.5 A",
}
# Where the firmware begins to hold the processor back. The 3B+ has a soft limit of its own
# (temp_soft_limit in raspberrypi.com/documentation/computers/config_txt.html#overclocking).
_PI_LIMIT_CELSIUS = 80.0
_PI_3_PLUS_LIMIT_CELSIUS = 60.0
# Trip points, by what the kernel does there: first it slows down, at last it switches off.
_SLOWING = "passive"
_STOPPING = ("hot", "critical")
# Firmwares leave trip points that they don't use at 0 or below, or far above what silicon bears.
_SENSIBLE_CELSIUS = (20.0, 150.0)


def _is_pi(view: View) -> bool:
    return view.board.model.startswith("Raspberry Pi")


def _pi_supply(view: View) -> str:
    for name, needs in sorted(_PI_SUPPLIES.items(), reverse=True):
        if view.board.model.startswith(name):
            return f"use a supply of {needs}, and a short cable; unplug what else hangs on its USB ports"
    return "use a supply made for it, and a short cable; unplug what else hangs on its USB ports"


def _on(readings: Iterable[Reading], quantity: str) -> bool:
    return any(reading.quantity == quantity and reading.value > 0 for reading in readings)


def _supply(view: View) -> agent_pb2.Finding:
    readings, faults = read(view, "raspberry_pi", "over_current")
    if _on(readings, "undervoltage_now"):
        return invalid("under-voltage now: the firmware holds the processor back", _pi_supply(view))
    if _on(readings, "undervoltage_since_boot"):
        return doubtful(
            "there was under-voltage since the board booted: under load it comes back",
            f"{_pi_supply(view)}; then reboot, since the mark stays",
        )
    events = [reading for reading in readings if reading.quantity == "over_current_events"]
    happened = [reading for reading in events if reading.value > 0]
    if happened:
        counts = ", ".join(
            f"{reading.value:,.0f} × {over_current.MEANINGS.get(reading.source, reading.source)}"
            for reading in happened
        )
        return doubtful(
            f"{counts} since the board booted: each held the clocks back",
            "use a stronger supply, or a power mode that draws less (sudo nvpmodel -q)",
        )
    if faults:
        return unknown(f"what tells about the supply can't be read: {faults[0]}", _permission(view))
    current = _max_milliamperes(view.root)
    if current is not None and current < _PI_5_MILLIAMPERES:
        said = f"the supply offers {current / 1000:g} A of {_PI_5_MILLIAMPERES / 1000:g}"
        on_usb = [each.name for each in view.board.accelerators if each.path.startswith("/sys/bus/usb/")]
        if on_usb:
            return doubtful(
                f"{said}, so the USB ports give 600 mA in all, and {on_usb[0]} asks for up to 900",
                _pi_supply(view),
            )
        return ok(f"{said}: enough for the board, not for what hangs on its USB ports")
    if readings:
        offers = f", the supply offers {current / 1000:g} A" if current is not None else ""
        return ok(
            f"no under-voltage{' and no over-current' if events else ''} since the board booted{offers}"
        )
    if _is_pi(view):
        return unknown(
            "nothing here tells what the firmware says about the supply",
            "sudo apt install raspi-utils  # it has vcgencmd",
        )
    return _mains(view)


def _permission(view: View) -> str:
    return f"sudo usermod -aG video {user()}  # then start the agent again" if _is_pi(view) else ""


def _max_milliamperes(root: Path) -> int | None:
    try:
        raw = sysfs.content(root / _MAX_CURRENT)
    except OSError:
        return None
    return int.from_bytes(raw, "big") if len(raw) == 4 and any(raw) else None


def _mains(view: View) -> agent_pb2.Finding:
    """Of a machine with a battery."""
    supplies = sysfs.listed(view.root / "sys/class/power_supply")
    # Those of a mouse have the scope "Device".
    own = [path for path in supplies if sysfs.word(path / "scope") != "Device"]
    batteries = [path for path in own if sysfs.word(path / "type") == "Battery"]
    if any(sysfs.word(path / "status") == "Discharging" for path in batteries):
        return doubtful("on battery: most machines then hold their clocks down", "plug the supply in")
    if batteries:
        return ok("plugged in")
    return absent("nothing on this board tells about its supply")


def _throttled(view: View) -> agent_pb2.Finding:
    readings, faults = read(view, "thermal", "x86_throttle", "raspberry_pi", "nvidia")
    now = [words for words, happens in _throttles(readings, "_now") if happens]
    steps = [reading for reading in readings if reading.quantity == "cooling_steps"]
    now += [
        f"{reading.source} at step {reading.value:.0f} of its cooling"
        for reading in steps
        if reading.value > 0
    ]
    if now:
        return invalid(f"now: {', '.join(now)}", "let it cool down, then see to its cooling and its supply")
    since = [words for words, happened in _throttles(readings, "_since_boot") if happened]
    counters = [reading for reading in readings if reading.quantity == "throttle_events"]
    since += [f"{reading.source} {reading.value:.0f} times" for reading in counters if reading.value > 0]
    if since:
        return ok(
            f"not now, but since the board booted: {', '.join(since)}",
            "see to its cooling and its supply before a longer run",
        )
    if faults:
        return unknown(f"it can't be told: {faults[0]}", _permission(view))
    if not (steps or counters or any(True for _ in _throttles(readings, "_now"))):
        return absent("nothing on this board tells whether it is throttled")
    return ok("not since the board booted" if counters or _is_pi(view) else "not now")


def _throttles(readings: Iterable[Reading], end: str) -> Iterable[tuple[str, bool]]:
    """Words and whether it is so, of every kind of throttling that is told."""
    words = {f"{name}{end}": said for _, name, said in raspberry_pi.BITS if name != "undervoltage"}
    # A graphics card at its power limit does what it is made for.
    words |= {f"{name}{end}": said for _, name, said in nvidia.REASONS if name != "power_capped"}
    for reading in readings:
        if reading.quantity in words:
            yield words[reading.quantity], reading.value > 0


@dataclass(frozen=True)
class _Zone:
    """A temperature, and where the board begins to slow down; None where it does not say."""

    name: str
    celsius: float
    limit: float | None

    @property
    def margin(self) -> float:
        """Degrees that are left."""
        return float("inf") if self.limit is None else self.limit - self.celsius


def _heat(view: View) -> agent_pb2.Finding:
    zones: list[_Zone] = []
    faults: list[str] = []
    for sensor in thermal.find(view.root):
        if not isinstance(sensor, thermal.ThermalZone):
            continue
        try:
            zones += [
                _Zone(sensor.name, reading.value, _limit(view, sensor.path.parent))
                for reading in sensor.read()
            ]
        except OSError as error:
            faults.append(told(error))
    zones += _chips(view.root)
    if not zones:
        if faults:
            return unknown(f"no temperature can be read: {faults[0]}")
        return absent("the board has no temperature that the system knows")
    closest = min(zones, key=lambda zone: (zone.margin, -zone.celsius))
    said = f"{closest.name} is at {closest.celsius:.1f} °C"
    if closest.limit is None:
        return ok(f"{said}; where the board begins to slow down is not told")
    said += f", and the board slows down from {closest.limit:g} on"
    if closest.margin <= 0:
        return invalid(said, "let it cool down, then give it a heat sink or a fan")
    if closest.margin <= view.limits.temperature_margin_celsius:
        return doubtful(
            said, f"let it cool down: boardbench push … --cool-to {closest.limit - 20:.0f}; a fan helps"
        )
    return ok(said)


def _limit(view: View, zone: Path) -> float | None:
    """Where the kernel or the firmware begins to slow the board down."""
    trips: dict[str, list[float]] = {}
    for path in sysfs.listed(zone, "trip_point_"):
        if path.name.endswith("_type"):
            milli = sysfs.word(zone / path.name.replace("_type", "_temp"))
            if (
                milli.lstrip("-").isdecimal()
                and _SENSIBLE_CELSIUS[0] < int(milli) / 1000 < _SENSIBLE_CELSIUS[1]
            ):
                trips.setdefault(sysfs.word(path), []).append(int(milli) / 1000)
    slowing = trips.get(_SLOWING, [])
    if _is_pi(view):
        plus = "Raspberry Pi 3 Model B Plus" in view.board.model
        slowing = [*slowing, _PI_3_PLUS_LIMIT_CELSIUS if plus else _PI_LIMIT_CELSIUS]
    return min(slowing or [each for kind in _STOPPING for each in trips.get(kind, [])], default=None)


def _chips(root: Path) -> list[_Zone]:
    """What x86 processors' own sensors say; Intel's slow down at the critical temperature."""
    found: list[_Zone] = []
    for chip in sysfs.listed(root / "sys/class/hwmon"):
        if sysfs.word(chip / "name") not in ("coretemp", "k10temp"):
            continue
        for path in sysfs.listed(chip, "temp"):
            if not path.name.endswith("_input"):
                continue
            milli = sysfs.word(path)
            critical = sysfs.word(chip / path.name.replace("_input", "_crit"))
            label = sysfs.word(chip / path.name.replace("_input", "_label")) or path.name
            if milli.lstrip("-").isdecimal():
                limit = int(critical) / 1000 if critical.isdecimal() else None
                found.append(_Zone(label, int(milli) / 1000, limit))
    return found


CHECKS = (
    Check(
        "supply",
        "under-voltage, over-current, a supply that is too weak, a battery",
        "invalid under under-voltage; doubtful when there was any since the board booted",
        _supply,
    ),
    Check(
        "throttled",
        "whether firmware, kernel or driver holds the clocks back",
        "invalid while they do",
        _throttled,
    ),
    Check(
        "heat",
        "the temperature that is closest to where the board begins to slow down",
        "doubtful within `validity.temperature_margin_celsius` of it, invalid beyond",
        _heat,
    ),
)
"""In the order in which they are told."""
