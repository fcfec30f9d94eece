"""Can the accelerators be used, and as fast as they are?

Sources: google/gasket-driver (``/dev/apex_N``, ``/sys/class/apex``), google-coral/libedgetpu
driver/usb/usb_driver.h (identities of the stick before and after its firmware is sent), Documentation/ABI/
testing/sysfs-bus-usb of the Linux kernel (``speed`` in megabits per second); NVIDIA's drivers
(``/dev/nvidia*``; ``/dev/nvmap`` on a Jetson), hailort-drivers (``/dev/hailo*``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.check import Check, View, absent, doubtful, join_group, ok, unknown
from boardbench.agent.board.identify import USB_ACCELERATORS
from boardbench.v1 import agent_pb2

# Before libedgetpu has sent the firmware it is in a mode of its own, whose speed says nothing.
_BEFORE_FIRST_USE = ("1a6e", "089a")
_SUPERSPEED = 5000
_RULE = "/etc/udev/rules.d/60-coral-usb.rules"
# Device files that an engine must be able to open, by the path that a board's accelerator has.
_NVIDIA_NODES = ("dev/nvidia[0-9]*", "dev/nvidiactl")
_TEGRA_NODES = ("dev/nvmap", "dev/nvhost-gpu")


def _sticks(root: Path) -> Iterator[tuple[Path, tuple[str, str]]]:
    for path in sysfs.listed(root / "sys/bus/usb/devices"):
        identity = (sysfs.word(path / "idVendor"), sysfs.word(path / "idProduct"))
        if identity in USB_ACCELERATORS:
            yield path, identity


def _usb(view: View) -> agent_pb2.Finding:
    said: list[str] = []
    slow: list[str] = []
    unsure: list[str] = []
    asleep: list[Path] = []
    for path, identity in _sticks(view.root):
        speed = sysfs.word(path / "speed")
        name = f"{USB_ACCELERATORS[identity][1]} at {path.name}"
        if not speed.isdecimal():
            unsure.append(f"{name}: its speed can't be read")
        elif int(speed) >= _SUPERSPEED:
            said.append(f"{name}: {speed} Mbit/s (USB 3)")
        elif identity == _BEFORE_FIRST_USE:
            unsure.append(f"{name} was not used since it was plugged in, and its speed is settled by that")
        else:
            slow.append(
                f"{name}: {speed} Mbit/s (USB 2), where inputs and parameters take several times longer"
            )
        if sysfs.word(path / "power/control") == "auto":
            asleep.append(path / "power/control")
    if slow:
        return doubtful(
            "; ".join(slow), "plug it into a USB 3 port (blue) with its own cable, without a USB 2 hub"
        )
    if unsure:
        return unknown("; ".join(unsure), "run any Edge TPU model once, then look again")
    if not said:
        return absent("no accelerator on USB")
    if asleep:
        paths = [path.relative_to(view.root).as_posix() for path in asleep]
        return doubtful(
            f"{'; '.join(said)}, and it may be put to sleep between two inferences",
            f"echo on | sudo tee {' '.join('/' + path for path in paths)}",
            fixable=any(os.access(view.root / path, os.W_OK) for path in paths),
        )
    return ok("; ".join(said))


def _accelerator(view: View) -> agent_pb2.Finding:
    if not view.board.accelerators:
        return absent("none that boardbench knows")
    usable: list[str] = []
    for accelerator in view.board.accelerators:
        problem = _problem(view, accelerator.name, accelerator.path)
        if problem is not None:
            return problem
        if accelerator.kind == "tpu" and not _runs_on(view, "edgetpu"):
            return doubtful(
                f"{accelerator.name} at {accelerator.path}, and no runtime that can use it",
                "sudo apt install libedgetpu1-std  # from github.com/feranick/libedgetpu/releases",
            )
        usable.append(f"{accelerator.name} at {accelerator.path}")
    return ok("; ".join(usable))


def _runs_on(view: View, device: str) -> bool:
    # Not asked yet is no doubt.
    return not view.runtimes or any(device in status.devices for status in view.runtimes)


def _problem(view: View, name: str, path: str) -> agent_pb2.Finding | None:
    """What is in the way of using it."""
    if path.startswith("/sys/bus/pci/"):
        return doubtful(
            f"{name} ({path})",
            "sudo apt install gasket-dkms  # from github.com/feranick/gasket-driver/releases; then reboot",
        )
    if path.startswith("/sys/bus/usb/"):
        return _stick_problem(view, name, view.root / path.lstrip("/"))
    if path.startswith("/dev/"):
        return _node_problem(view.root / path.lstrip("/"), name, path)
    patterns = _NVIDIA_NODES if path.startswith("/proc/driver/nvidia/") else ()
    if path.startswith("/sys/bus/platform/") and view.board.soc.startswith("tegra"):
        patterns = _TEGRA_NODES
    for pattern in patterns:
        for node in sorted(view.root.glob(pattern)):
            problem = _node_problem(node, name, f"/{node.relative_to(view.root)}")
            if problem is not None:
                return problem
    return None


def _node_problem(node: Path, name: str, path: str) -> agent_pb2.Finding | None:
    if not node.exists():
        return doubtful(f"{name}: there is no {path}", "sudo modprobe apex; sudo dmesg | grep -i apex")
    if os.access(node, os.R_OK | os.W_OK):
        return None
    fix = join_group(node) or f"sudo chmod 666 {path}  # until the next boot; or start the agent as root"
    return doubtful(f"{name}: the agent's user may not open {path}", fix)


def _stick_problem(view: View, name: str, device: Path) -> agent_pb2.Finding | None:
    bus, number = sysfs.word(device / "busnum"), sysfs.word(device / "devnum")
    if not (bus.isdecimal() and number.isdecimal()):
        return None
    path = f"/dev/bus/usb/{int(bus):03}/{int(number):03}"
    node = view.root / path.lstrip("/")
    if not node.exists() or os.access(node, os.R_OK | os.W_OK):
        # A board's tree without its /dev says nothing.
        return None
    rules = "\\n".join(
        f'SUBSYSTEM=="usb", ATTRS{{idVendor}}=="{vendor}", ATTRS{{idProduct}}=="{product}", MODE="0666"'
        for vendor, product in USB_ACCELERATORS
    )
    return doubtful(
        f"{name}: the agent's user may not open {path}",
        join_group(node)
        or f"printf '{rules}\\n' | sudo tee {_RULE} && sudo udevadm control --reload && sudo udevadm trigger",
    )


CHECKS = (
    Check(
        "usb",
        "the speed of the USB link of an accelerator, and whether it may be put to sleep",
        "doubtful below USB 3, and with autosuspend",
        _usb,
    ),
    Check(
        "accelerator",
        "drivers, libraries and permissions of the accelerators",
        "doubtful when one can't be used",
        _accelerator,
    ),
)
"""In the order in which they are told."""
