"""Does the system give what a measurement needs: clocks, room, meters, engines?

Sources: Documentation/timers/timekeeping.rst and hpet.rst of the Linux kernel (clock sources), adjtimex(2),
systemd-timesyncd(8) (``/run/systemd/timesync/synchronized``), Documentation/power/powercap/powercap.rst,
proc_pid_clear_refs(5).
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.check import (
    Check,
    View,
    absent,
    doubtful,
    group,
    invalid,
    ok,
    read,
    size,
    unknown,
)
from boardbench.agent.board.sensor import Coverage
from boardbench.v1 import agent_pb2

_CLOCKSOURCE = "sys/devices/system/clocksource/clocksource0"
# A read goes to a device or counts interrupts: microseconds, or steps of milliseconds.
_SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies", "refined-jiffies", "pit")
# What can be read by a program without the kernel's help, the best first.
_FAST_CLOCKS = ("tsc", "arch_sys_counter", "kvm-clock", "hyperv_clocksource_tsc_page")
# Kinds of sensors that tell power or energy of a whole board or a part of it.
_METERS = ("ina3221", "raspberry_pi_pmic", "rapl", "hwmon_power", "battery", "nvidia")
_POWERCAP = "sys/class/powercap"


def _disk(view: View) -> agent_pb2.Finding:
    if view.free_bytes is None:
        return unknown(f"{view.data_dir}: what is free there can't be read")
    said = f"{size(view.free_bytes)} free at {view.data_dir}"
    if view.free_bytes <= view.free_floor_bytes:
        return doubtful(
            f"{said}, and {size(view.free_floor_bytes)} are left free: no model can be pushed",
            f"make room: sudo du -xh --max-depth=2 {view.data_dir.anchor} | sort -h | tail",
        )
    return ok(said)


def _clock_source(view: View) -> agent_pb2.Finding:
    folder = view.root / _CLOCKSOURCE
    name = sysfs.word(folder / "current_clocksource")
    if not name:
        return unknown("what the kernel takes the time from can't be read")
    if name not in _SLOW_CLOCKS:
        return ok(name)
    others = sysfs.word(folder / "available_clocksource").split()
    better = next((clock for clock in _FAST_CLOCKS if clock in others), "")
    if better:
        fix = f"echo {better} | sudo tee /{_CLOCKSOURCE}/current_clocksource"
    else:
        fix = "see why the kernel does not trust its own: sudo dmesg | grep -i -e tsc -e clocksource"
    return doubtful(f"{name}: reading the time takes microseconds instead of nanoseconds", fix)


def _time(view: View) -> agent_pb2.Finding:
    if sysfs.exists(view.root / "run/systemd/timesync/synchronized") or view.clock_kept:
        return ok("kept right by a time service")
    said = "latencies don't depend on it, the times of results do"
    if view.clock_kept is None:
        return unknown(f"whether a time service keeps the clock right is not told: {said}")
    return ok(f"no time service keeps the clock right: {said}", "sudo timedatectl set-ntp true")


def _power_meter(view: View) -> agent_pb2.Finding:
    readings, faults = read(view, *_METERS)
    powers = [each for each in readings if each.quantity in ("power_watts", "energy_joules")]
    if powers:
        widest = max(powers, key=lambda reading: reading.coverage or Coverage.RAIL)
        coverage = (widest.coverage or Coverage.RAIL).words
        return ok(f"{widest.source}: {coverage}{_unread(faults)}")
    closed = _closed(view.root)
    if closed:
        pattern = f"/{_POWERCAP}/intel-rapl*/energy_uj"
        return unknown(
            f"the processor counts its energy, and the agent's user may not read it: {closed}",
            f"sudo chgrp {group()} {pattern} && sudo chmod g+r {pattern}  # until the next boot",
        )
    if faults:
        return unknown(f"what there is can't be read: {faults[0]}")
    return absent("nothing on this board tells its power")


def _unread(faults: list[str]) -> str:
    return f"; not read: {faults[0]}" if faults else ""


def _closed(root: Path) -> str:
    """A counter of energy that is there and may not be read."""
    for path in sysfs.listed(root / _POWERCAP, "intel-rapl"):
        try:
            sysfs.content(path / "energy_uj")
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                return f"/{(path / 'energy_uj').relative_to(root)}"
    return ""


def _page_monitor(view: View) -> agent_pb2.Finding:
    process = view.root / "proc/self"
    if not sysfs.exists(process / "status"):
        return unknown("there is no /proc/self to look at")
    if not sysfs.exists(process / "clear_refs"):
        return absent(
            "this kernel was built without CONFIG_PROC_PAGE_MONITOR: memory peaks are told for the whole "
            "run, and not phase by phase"
        )
    return ok("memory peaks can be told phase by phase")


def _runtimes(view: View) -> agent_pb2.Finding:
    if not view.runtimes:
        return unknown("they have not been asked yet")
    available = [status for status in view.runtimes if status.available]
    missing = [status for status in view.runtimes if not status.available]
    if not available:
        from boardbench.agent.bench import wheels

        return invalid(
            "; ".join(f"{status.name}: {status.reason}" for status in missing),
            wheels.REINSTALL
            if wheels.here().brought is not None
            else f"{sys.executable} -m pip install 'boardbench[agent,tflite,onnx]'",
        )
    said = ", ".join(f"{status.name} ({status.version})" for status in available)
    return ok(f"{said}{'; not here: ' if missing else ''}{', '.join(status.name for status in missing)}")


CHECKS = (
    Check(
        "disk",
        "room where models are kept",
        "doubtful when none can be pushed (`store.free_floor_bytes`)",
        _disk,
    ),
    Check("clock_source", "what the kernel takes the time from", "doubtful for a slow one", _clock_source),
    Check("time", "whether a time service keeps the clock right", "never", _time),
    Check("power_meter", "whether power or energy can be read, and of what", "never", _power_meter),
    Check("page_monitor", "whether the kernel tells memory peaks phase by phase", "never", _page_monitor),
    Check("runtimes", "engines that can run", "invalid when there is none", _runtimes),
)
"""In the order in which they are told."""
