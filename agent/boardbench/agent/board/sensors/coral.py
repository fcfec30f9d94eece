"""The Coral Edge TPU: its temperature, and how often it answered.

On PCIe ``/sys/class/apex/apex_*/temp`` is in thousandths of a degree, and ``interrupt_counts`` has a line a
vector, "0x00: 4120" (google/gasket-driver, src/apex_driver.c and src/gasket_interrupt.c). The USB stick has
no temperature; ``urbnum`` in its folder counts its transfers (Documentation/ABI/testing/sysfs-bus-usb of
the Linux kernel), and its ids are 1a6e:089a before libedgetpu has sent its firmware and 18d1:9302 after.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor

_USB_IDS = (("1a6e", "089a"), ("18d1", "9302"))
_COUNT = re.compile(r"^0x[0-9a-f]{1,4}: (\d{1,20})$", re.MULTILINE)


@dataclass(frozen=True)
class PcieTpu:
    """A module with its driver."""

    name: str
    folder: Path

    def read(self) -> Iterable[Reading]:
        """Temperature of the chip, and interrupts since the driver started."""
        return sysfs.each([self._temperature, self._interrupts])

    def _temperature(self) -> Iterable[Reading]:
        milli = sysfs.number_if_any(self.folder / "temp")
        if milli is None:
            return
        # A chip that sleeps or is gone reads as all ones.
        if abs(milli) > 200_000:
            raise sysfs.fault(self.folder / "temp", f"{milli}")
        yield Reading("temperature_celsius", self.name, milli / 1000)

    def _interrupts(self) -> Iterable[Reading]:
        path = self.folder / "interrupt_counts"
        try:
            content = sysfs.table(path)
        except FileNotFoundError:
            return
        counts = _COUNT.findall(content)
        if not counts:
            raise sysfs.fault(path, "no count", content.encode())
        yield Reading("interrupts", self.name, float(sum(map(int, counts))), cumulative=True)


@dataclass(frozen=True)
class UsbTpu:
    """A stick."""

    name: str
    folder: Path

    def read(self) -> Iterable[Reading]:
        """Transfers since it was plugged in."""
        count = sysfs.number(self.folder / "urbnum", least=0)
        return [Reading("usb_transfers", self.name, float(count), cumulative=True)]


def find(root: Path) -> list[Sensor]:
    """Every Edge TPU with a driver, or on USB."""
    found: list[Sensor] = [PcieTpu(path.name, path) for path in sysfs.listed(root / "sys/class/apex", "apex")]
    for path in sysfs.listed(root / "sys/bus/usb/devices"):
        identity = (sysfs.word(path / "idVendor"), sysfs.word(path / "idProduct"))
        if identity in _USB_IDS and sysfs.exists(path / "urbnum"):
            found.append(UsbTpu(f"usb {path.name}", path))
    return found
