"""Frequency policies: which processors share one frequency, who decides it, and within which bounds.

``/sys/devices/system/cpu/cpufreq/policy*``, which ``cpu*/cpufreq`` link to; frequencies are in kHz.
Source: Documentation/admin-guide/pm/cpufreq.rst of the Linux kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs

_KILOHERTZ = 1000.0

# Under these the kernel itself does not move the frequency.
_STILL = ("performance", "userspace")


@dataclass(frozen=True)
class Policy:
    """The processors that share one frequency."""

    # Its folder below the root.
    path: str
    # Numbers of its processors.
    processors: tuple[int, ...]
    # Empty where it can't be read.
    governor: str
    # Those that it could have; empty where the driver does not say.
    governors: tuple[str, ...]
    driver: str
    # Bounds in force.
    least_hertz: float | None
    most_hertz: float | None
    # The most that the hardware can.
    hardware_hertz: float | None

    @property
    def fixed(self) -> bool:
        """Whether there is one frequency: the bounds leave no other, or the governor never moves it."""
        return self.governor in _STILL or (
            self.least_hertz is not None and self.least_hertz == self.most_hertz
        )

    @property
    def name(self) -> str:
        """Its processors in few characters: "cpu0-3"."""
        return processor_names(self.processors)


def policies(root: Path) -> list[Policy]:
    """Every policy of the board, each once; empty where the kernel does not scale frequencies."""
    cpu = root / "sys/devices/system/cpu"
    folders = sorted(cpu.glob("cpufreq/policy[0-9]*"), key=lambda path: _number(path.name, "policy"))
    if not folders:
        found: dict[Path, Path] = {}
        for folder in sorted(
            cpu.glob("cpu[0-9]*/cpufreq"), key=lambda path: _number(path.parent.name, "cpu")
        ):
            found.setdefault(folder.resolve(), folder)
        folders = list(found.values())
    # The folder of a policy whose processors are all offline is empty.
    return [_policy(root, folder) for folder in folders if (folder / "scaling_governor").exists()]


def processor_names(numbers: Iterable[int]) -> str:
    """Processors in few characters: "cpu0", "cpu0-3,6"."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return "cpu" + ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _policy(root: Path, folder: Path) -> Policy:
    related = sysfs.word(folder / "affected_cpus") or sysfs.word(folder / "related_cpus")
    numbers = tuple(int(word) for word in related.split() if word.isdigit())
    if not numbers:
        here = folder.name if folder.name.startswith("policy") else folder.parent.name
        numbers = (_number(here, here.rstrip("0123456789")),)
    return Policy(
        path=folder.relative_to(root).as_posix(),
        processors=numbers,
        governor=sysfs.word(folder / "scaling_governor"),
        governors=tuple(sysfs.word(folder / "scaling_available_governors").split()),
        driver=sysfs.word(folder / "scaling_driver"),
        least_hertz=_hertz(folder / "scaling_min_freq"),
        most_hertz=_hertz(folder / "scaling_max_freq"),
        hardware_hertz=_hertz(folder / "cpuinfo_max_freq"),
    )


def _number(name: str, prefix: str) -> int:
    digits = name[len(prefix) :]
    return int(digits) if digits.isdigit() else 0


def _hertz(path: Path) -> float | None:
    text = sysfs.word(path)
    return int(text) * _KILOHERTZ if text.isdigit() and int(text) else None
