"""Do the clocks stand still, and where they should?

Sources: Documentation/admin-guide/pm/{cpufreq,intel_pstate}.rst, Documentation/ABI/testing/
sysfs-class-devfreq and sysfs-platform_profile of the Linux kernel; NVIDIA's Jetson Linux Developer Guide.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.check import Check, View, absent, doubtful, megahertz, ok, told, unknown
from boardbench.agent.board.policies import Policy, policies, processor_names
from boardbench.agent.board.sensors.power_mode import power_mode
from boardbench.agent.board.tune import command, has_clocks, settable
from boardbench.v1 import agent_pb2

_CPU = "sys/devices/system/cpu"
_INTEL = f"{_CPU}/intel_pstate/no_turbo"
_BOOST = f"{_CPU}/cpufreq/boost"
_PROFILE = "sys/firmware/acpi/platform_profile"
# Profiles that hold the clocks down; "balanced" and above leave them to the governor.
_HOLDING_PROFILES = ("low-power", "quiet", "cool")
# How NVIDIA's devfreq devices of the GPU end, by chip: Nano, TX2, Xavier, Orin.
_TEGRA_GPUS = (".gpu", ".gp10b", ".gv11b", ".ga10b")


def _governor(view: View) -> agent_pb2.Finding:
    found = policies(view.root)
    if not found:
        return _no_policies(view)
    moving = [policy for policy in found if not policy.fixed]
    if not moving:
        return ok("; ".join(_grouped(found, _standing)))
    unreadable = [policy for policy in moving if not policy.governor]
    if unreadable:
        return unknown(f"the governor of {_names(unreadable)} can't be read")
    paths = [f"{policy.path}/scaling_governor" for policy in moving]
    fix = command(view.root, paths, "performance")
    if any(policy.governors and "performance" not in policy.governors for policy in moving):
        pattern = f"/{_CPU}/cpufreq/policy*"
        fix = f'for p in {pattern}; do sudo sh -c "cat $p/scaling_max_freq >$p/scaling_min_freq"; done'
        paths = [f"{policy.path}/scaling_min_freq" for policy in moving]
    return doubtful(
        "; ".join(_grouped(moving, _moving)) + ": the clock follows the load, and comes late",
        fix,
        fixable=any(settable(view.root, path) for path in paths),
    )


def _no_policies(view: View) -> agent_pb2.Finding:
    if view.board.emulator:
        return absent("this machine is virtual: its host decides about the frequency")
    return absent("the kernel does not move the processors' frequency")


def _standing(policy: Policy) -> str:
    at = f" at {megahertz(policy.most_hertz)}" if policy.most_hertz is not None else ""
    if policy.governor in ("performance", "userspace"):
        return f"{policy.governor}{at if policy.governor == 'performance' else ''}"
    return f"{policy.governor} with one frequency{at}"


def _moving(policy: Policy) -> str:
    if policy.least_hertz is None or policy.most_hertz is None:
        return policy.governor
    return f"{policy.governor} between {megahertz(policy.least_hertz)} and {megahertz(policy.most_hertz)}"


def _grouped(found: Iterable[Policy], words: Callable[[Policy], str]) -> list[str]:
    """Policies of the same words together: "performance at 2400 MHz on cpu0-3"."""
    groups: dict[str, list[Policy]] = {}
    for policy in found:
        groups.setdefault(words(policy), []).append(policy)
    return [f"{said} on {_names(group)}" for said, group in groups.items()]


def _names(found: Iterable[Policy]) -> str:
    return processor_names(number for policy in found for number in policy.processors)


def _frequency_cap(view: View) -> agent_pb2.Finding:
    found = [policy for policy in policies(view.root) if policy.most_hertz and policy.hardware_hertz]
    if not found:
        return absent("the kernel tells no limit of the processors' frequency")
    turbo_off = _turbo(view.root) == "off"
    capped: list[Policy] = []
    for policy in found:
        assert policy.most_hertz is not None and policy.hardware_hertz is not None
        # Without turbo some drivers lower the limit to the base frequency, others leave it.
        most = _base_hertz(view.root, policy) if turbo_off else None
        if policy.most_hertz < (most or policy.hardware_hertz) * (1 - view.limits.frequency_cap_note):
            capped.append(policy)
    if not capped:
        return ok("; ".join(_grouped(found, lambda policy: f"up to {megahertz(policy.most_hertz or 0)}")))
    said = "; ".join(_grouped(capped, _cap))
    mode = _jetson_mode(view.root)
    if mode:
        return ok(f"{said}, as the power mode {mode} has it")
    fixes: dict[str, list[str]] = {}
    for policy in capped:
        limit = sysfs.word(view.root / policy.path / "cpuinfo_max_freq")
        fixes.setdefault(limit, []).append(f"{policy.path}/scaling_max_freq")
    fix = "; ".join(command(view.root, paths, limit) for limit, paths in fixes.items())
    return doubtful(f"{said}: figures are right for this limit and for no other", fix)


def _cap(policy: Policy) -> str:
    return f"limited to {(policy.most_hertz or 0) / 1e6:.0f} of {megahertz(policy.hardware_hertz or 0)}"


def _base_hertz(root: Path, policy: Policy) -> float | None:
    kilohertz = sysfs.word(root / policy.path / "base_frequency")
    return int(kilohertz) * 1000.0 if kilohertz.isdecimal() else policy.most_hertz


def _turbo(root: Path) -> str:
    """Whether it is "on" or "off"; empty where there is no such switch."""
    word = sysfs.word(root / _INTEL)
    if word:
        return "off" if word == "1" else "on"
    words = {sysfs.word(root / _BOOST)} - {""}
    words = words or {sysfs.word(root / path) for path in _policy_switches(root)} - {""}
    return "" if not words else "on" if "1" in words else "off"


def _policy_switches(root: Path) -> list[str]:
    switches = [f"{policy.path}/boost" for policy in policies(root)]
    return [path for path in switches if sysfs.exists(root / path)]


def _turbo_check(view: View) -> agent_pb2.Finding:
    state = _turbo(view.root)
    if not state:
        return absent("the processors have no turbo that can be switched")
    if state == "off":
        return ok("off")
    if sysfs.exists(view.root / _INTEL):
        paths, value = [_INTEL], "1"
    elif sysfs.exists(view.root / _BOOST):
        paths, value = [_BOOST], "0"
    else:
        paths, value = _policy_switches(view.root), "0"
    return doubtful(
        "on: the clock is above the one that can be kept up for as long as heat and power allow, so figures "
        "depend on what ran before",
        command(view.root, paths, value),
        fixable=any(settable(view.root, path) for path in paths),
    )


def _jetson_mode(root: Path) -> str:
    try:
        mode = power_mode(root)
    except OSError:
        return ""
    return "" if mode is None else mode.name or str(mode.index)


def _power_mode(view: View) -> agent_pb2.Finding:
    try:
        mode = power_mode(view.root)
    except OSError as error:
        return unknown(f"the power mode can't be read: {told(error)}", "sudo nvpmodel -q")
    if mode is not None:
        name = f"{mode.name} ({mode.index})" if mode.name else str(mode.index)
        return ok(f"{name}: figures are right for this power mode and for no other")
    if _is_tegra(view):
        return unknown("nvpmodel has not noted a power mode", "sudo nvpmodel -q")
    profile = sysfs.word(view.root / _PROFILE)
    if not profile:
        return absent("the board has no power modes that the system knows")
    if profile not in _HOLDING_PROFILES:
        return ok(f"platform profile {profile}")
    choices = sysfs.word(view.root / f"{_PROFILE}_choices").split()
    better = "performance" if "performance" in choices else "balanced"
    return doubtful(
        f"platform profile {profile}: it holds the clocks down", command(view.root, [_PROFILE], better)
    )


def _is_tegra(view: View) -> bool:
    return view.board.soc.startswith("tegra")


def _clocks(view: View) -> agent_pb2.Finding:
    if not _is_tegra(view):
        return absent("no clocks beside the processors' that boardbench knows to hold")
    gpus = [path for path in sysfs.listed(view.root / "sys/class/devfreq") if path.name.endswith(_TEGRA_GPUS)]
    fix = "sudo jetson_clocks --fan"
    for gpu in gpus:
        bounds = sysfs.word(gpu / "min_freq"), sysfs.word(gpu / "max_freq")
        if not (bounds[0].isdecimal() and bounds[1].isdecimal()):
            continue
        least, most = (float(bound) for bound in bounds)
        if least == most:
            return ok(f"GPU held at {megahertz(most)}")
        return doubtful(
            f"GPU between {megahertz(least)} and {megahertz(most)}: it follows the load, as the memory does",
            fix,
            fixable=has_clocks(view.root) and os.geteuid() == 0,
        )
    return unknown("the bounds of the GPU's clock can't be read", "sudo jetson_clocks --show")


CHECKS = (
    Check(
        "governor",
        "whether the processors run at one frequency",
        "doubtful while a governor moves it",
        _governor,
    ),
    Check(
        "frequency_cap",
        "whether the processors may run as fast as they can",
        "doubtful when a limit holds them down, unless it is a Jetson's power mode",
        _frequency_cap,
    ),
    Check("turbo", "turbo or boost", "doubtful while it is on", _turbo_check),
    Check(
        "power_mode",
        "a Jetson's power mode, a PC's platform profile",
        "doubtful for a profile that holds the clocks down",
        _power_mode,
    ),
    Check(
        "clocks",
        "a Jetson's GPU and memory clocks, which jetson_clocks holds",
        "doubtful while they move",
        _clocks,
    ),
)
"""In the order in which they are told."""
