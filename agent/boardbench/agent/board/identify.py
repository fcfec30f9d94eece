"""Which board this is: maker's name, chip, processors, memory, system, accelerators, and what is underneath.

Everything is read below one root folder, so that the tree of another board can be looked at. Sources:
the kernel's Documentation/devicetree/usage-model.rst (``model``, ``compatible``), Documentation/ABI/testing/
sysfs-devices-system-cpu and sysfs-firmware-dmi-entries, os-release(5), machine-id(5).
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from boardbench.agent.errors import StorageError
from boardbench.v1 import board_pb2

# Says nothing when a board's maker left the field as the firmware vendor shipped it.
_DMI_PLACEHOLDERS = frozenset(
    (
        "",
        "default string",
        "none",
        "not specified",
        "o.e.m.",
        "system manufacturer",
        "system product name",
        "system version",
        "to be filled by o.e.m.",
        "undefined",
        "unknown",
    )
)

# Implementer and part of the MIDR, as util-linux's sys-utils/lscpu-arm.c names them.
_ARM_PARTS = {
    (0x41, 0xB76): "ARM1176",
    (0x41, 0xC07): "Cortex-A7",
    (0x41, 0xC08): "Cortex-A8",
    (0x41, 0xC09): "Cortex-A9",
    (0x41, 0xC0F): "Cortex-A15",
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD04): "Cortex-A35",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4B): "Cortex-A78C",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x4E, 0x003): "Denver 2",
    (0x4E, 0x004): "Carmel",
}

# PCI and USB identities of accelerators. The Coral USB stick has the first id until libedgetpu has sent
# its firmware, then the second (google-coral/libedgetpu, driver/usb/usb_driver.h).
_PCI_ACCELERATORS = {
    ("0x1ac1", "0x089a"): ("tpu", "Google Coral Edge TPU (PCIe)"),
    ("0x1e60", "0x2864"): ("npu", "Hailo-8"),
}
USB_ACCELERATORS = {
    ("1a6e", "089a"): ("tpu", "Google Coral USB Accelerator"),
    ("18d1", "9302"): ("tpu", "Google Coral USB Accelerator"),
}
# Device classes of accelerator drivers: gasket (google/gasket-driver) and hailort-drivers.
_CLASS_ACCELERATORS = {
    "apex": ("tpu", "Google Coral Edge TPU (PCIe)"),
    "hailo_chardev": ("npu", "Hailo"),
}
# Ends of platform device names: NVIDIA's integrated GPUs and DLAs (Nano, TX2, Xavier, Orin), Rockchip's NPU.
_PLATFORM_ACCELERATORS = {
    ".gpu": ("gpu", "GPU"),
    ".gp10b": ("gpu", "GPU"),
    ".gv11b": ("gpu", "GPU"),
    ".ga10b": ("gpu", "GPU"),
    ".nvdla0": ("npu", "DLA 0"),
    ".nvdla1": ("npu", "DLA 1"),
    ".npu": ("npu", "NPU"),
}
_PLATFORM_MAKERS = ("tegra", "rk")

# Emulators proper: what they time is the emulator. A virtual machine runs on the real processor.
EMULATORS = frozenset(("qemu", "qemu-user", "rosetta"))

RECORDED = "recorded-sensors"
"""What had a part in a run whose sensors were a folder, and no hardware."""

_DEVICE_ID_SALT = b"boardbench device id, version 1"
_DEVICE_ID_FILE = "device-id"


def identify(
    root: Path,
    *,
    device_id: str,
    labels: Mapping[str, str],
    architecture: str | None = None,
) -> board_pb2.Board:
    """The board whose ``proc``, ``sys`` and ``etc`` are below ``root``; what it does not say stays empty."""
    architecture = architecture or os.uname().machine
    processors = _processors(root)
    compatible = _strings(_device_tree(root) / "compatible")
    return board_pb2.Board(
        device_id=device_id,
        hostname=_text(root / "proc/sys/kernel/hostname"),
        model=_model(root),
        soc=_soc(compatible),
        architecture=architecture,
        cpu_model=_cpu_model(processors),
        cpu_count=_cpu_count(root, processors),
        memory_bytes=memory_bytes(root).get("MemTotal", 0),
        os=_os_name(root),
        kernel=_text(root / "proc/sys/kernel/osrelease"),
        accelerators=list(_accelerators(root, _soc(compatible))),
        labels=dict(labels),
        emulator=_emulator(root, architecture, processors, compatible),
    )


def is_recorded(root: Path) -> bool:
    """Whether what is read below the root is a folder that somebody filled, and not what a kernel says now.

    A container may be given the files of its host below another root: they are mounted there.
    """
    return root.resolve() != Path("/") and not (root / "sys").is_mount()


def derive_device_id(root: Path, data_dir: Path) -> str:
    """Identity of the board: from the machine id, else made once and kept in ``data_dir``.

    The machine id itself is to be kept secret (machine-id(5)), so only a keyed hash of it leaves the board.
    """
    machine = _machine_id(root)
    # Whether what is kept was made from this machine id: the card may have moved, or been copied.
    mark = [f"{zlib.crc32(machine.encode()):08x}"] if machine else []
    kept = data_dir / _DEVICE_ID_FILE
    found = _text(kept).split()
    if found and found[1:] == mark:
        return found[0]
    if machine:
        made = _keyed_hash(bytes.fromhex(machine))[:16]
        # Only to be spared the hash at the next start; a folder is not made for that.
        with contextlib.suppress(OSError):
            kept.write_text(f"{made} {mark[0]}\n")
        return made
    made = os.urandom(8).hex()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        kept.write_text(made + "\n")
    except OSError as error:
        raise StorageError(
            f"{kept}: can't be written ({error.strerror}), and this system has no machine id: "
            "set device_id in the configuration"
        ) from error
    return made


def _machine_id(root: Path) -> str:
    for path in (root / "etc/machine-id", root / "var/lib/dbus/machine-id"):
        machine = _text(path)
        # "uninitialized" stands there until the first boot is over.
        if len(machine) == 32 and set(machine) <= set("0123456789abcdef"):
            return machine
    return ""


def memory_bytes(root: Path) -> dict[str, int]:
    """``/proc/meminfo`` in bytes, by its own names ("MemTotal", "MemAvailable")."""
    found = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if number.isdigit():
            found[name] = int(number) * (1024 if unit == "kB" else 1)
    return found


def _keyed_hash(secret: bytes) -> str:
    # Here, because OpenSSL takes 3.5 MB, and all but the first start do without it.
    import hashlib
    import hmac

    return hmac.new(secret, _DEVICE_ID_SALT, hashlib.sha256).hexdigest()


def _device_tree(root: Path) -> Path:
    return root / "sys/firmware/devicetree/base"


def _model(root: Path) -> str:
    if found := _strings(_device_tree(root) / "model"):
        return found[0]
    words: list[str] = []
    for name in ("sys_vendor", "product_name", "product_version"):
        word = _text(root / "sys/class/dmi/id" / name)
        # Some makers repeat themselves: "LENOVO", "20XW", "ThinkPad X1".
        if word.lower() not in _DMI_PLACEHOLDERS and word not in words:
            words.append(word)
    return " ".join(words)


def _soc(compatible: list[str]) -> str:
    """The last entry names the chip, the ones before it the board."""
    maker, _, chip = compatible[-1].partition(",") if compatible else ("", "", "")
    # A virtual machine's tree ends with "linux,dummy-virt".
    return "" if maker == "linux" else chip


def _processors(root: Path) -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo that begin with a processor number."""
    found: list[dict[str, str]] = []
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "processor" and value.isdigit():
            found.append({})
        if name and found:
            found[-1].setdefault(name, value)
    return found


def _cpu_model(processors: list[dict[str, str]]) -> str:
    counts: dict[str, int] = {}
    for processor in processors:
        name = _processor_name(processor)
        if name:
            counts[name] = counts.get(name, 0) + 1
    if len(counts) > 1:
        return " + ".join(f"{count} × {name}" for name, count in counts.items())
    return next(iter(counts), "")


def _processor_name(processor: Mapping[str, str]) -> str:
    try:
        part = (int(processor["CPU implementer"], 16), int(processor["CPU part"], 16))
    except (KeyError, ValueError):
        return processor.get("model name") or processor.get("uarch") or processor.get("cpu model") or ""
    return _ARM_PARTS.get(part) or f"ARM implementer {part[0]:#04x} part {part[1]:#05x}"


def core_types(root: Path, numbers: Iterable[int]) -> list[str]:
    """Kinds of these processors ("Cortex-A76", "P-core"), without repeats; empty where it is not known.

    Intel's hybrids have the files cpu_core and cpu_atom (arch/x86/events/intel/core.c of the Linux kernel).
    A core without a name is told by what it can do, of 1024: ``cpu_capacity``
    (Documentation/ABI/testing/sysfs-devices-system-cpu).
    """
    blocks = {block.get("processor", ""): block for block in _processors(root)}
    hybrid = {
        number: kind
        for kind, folder in (("P-core", "cpu_core"), ("E-core", "cpu_atom"))
        for number in _numbers(_text(root / "sys/devices" / folder / "cpus"))
    }
    found: list[str] = []
    for number in numbers:
        name = hybrid.get(number) or _processor_name(blocks.get(str(number), {}))
        if not name:
            capacity = _text(root / f"sys/devices/system/cpu/cpu{number}/cpu_capacity")
            name = f"capacity {capacity}" if capacity.isdigit() else ""
        if name and name not in found:
            found.append(name)
    return found


def _numbers(text: str) -> Iterator[int]:
    """Of "0-3,6"."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            yield from range(int(first), (int(last) if last.isdigit() else int(first)) + 1)


def _cpu_count(root: Path, processors: list[dict[str, str]]) -> int:
    return len(list(_numbers(_text(root / "sys/devices/system/cpu/online")))) or len(processors)


def _os_name(root: Path) -> str:
    for path in (root / "etc/os-release", root / "usr/lib/os-release"):
        for line in _text(path).splitlines():
            name, _, value = line.partition("=")
            if name == "PRETTY_NAME":
                return value.strip("\"'")
    return ""


def _accelerators(root: Path, soc: str) -> Iterator[board_pb2.Accelerator]:
    with_driver: set[str] = set()
    for kind_of_device, (kind, name) in _CLASS_ACCELERATORS.items():
        for path in _listed(root / "sys/class" / kind_of_device):
            with_driver.add((path / "device").resolve().name)
            yield board_pb2.Accelerator(kind=kind, name=name, path=f"/dev/{path.name}")
    for path in _listed(root / "sys/bus/pci/devices"):
        found = _PCI_ACCELERATORS.get((_text(path / "vendor"), _text(path / "device")))
        if found and path.name not in with_driver:
            yield board_pb2.Accelerator(
                kind=found[0], name=f"{found[1]}, no driver", path=f"/sys/bus/pci/devices/{path.name}"
            )
    for path in _listed(root / "sys/bus/usb/devices"):
        found = USB_ACCELERATORS.get((_text(path / "idVendor"), _text(path / "idProduct")))
        if found:
            yield board_pb2.Accelerator(
                kind=found[0], name=found[1], path=f"/sys/bus/usb/devices/{path.name}"
            )
    for path in _listed(root / "proc/driver/nvidia/gpus"):
        yield board_pb2.Accelerator(
            kind="gpu", name=_nvidia_model(path), path=f"/proc/driver/nvidia/gpus/{path.name}"
        )
    if soc.startswith(_PLATFORM_MAKERS):
        for path in _listed(root / "sys/bus/platform/devices"):
            found = _PLATFORM_ACCELERATORS.get(path.suffix)
            if found:
                yield board_pb2.Accelerator(
                    kind=found[0], name=f"{soc} {found[1]}", path=f"/sys/bus/platform/devices/{path.name}"
                )


def _nvidia_model(path: Path) -> str:
    for line in _text(path / "information").splitlines():
        name, _, value = line.partition(":")
        if name == "Model":
            return value.strip()
    return "NVIDIA GPU"


def _emulator(root: Path, architecture: str, processors: list[dict[str, str]], compatible: list[str]) -> str:
    if _under_qemu_user(root, architecture, processors):
        return "qemu-user"
    first = processors[0] if processors else {}
    # Apple's translator of x86-64 for Linux calls its processor that.
    if first.get("vendor_id") == "VirtualApple" or first.get("model name", "").startswith("VirtualApple"):
        return "rosetta"
    vendor = _text(root / "sys/class/dmi/id/sys_vendor")
    product = _text(root / "sys/class/dmi/id/product_name")
    # Only KVM offers this clock, whatever the monitor calls itself (QEMU, Firecracker, a cloud).
    if "kvm-clock" in _text(root / "sys/devices/system/clocksource/clocksource0/available_clocksource"):
        return "kvm"
    if vendor == "QEMU" or "linux,dummy-virt" in compatible:
        # On Arm KVM can't be told from plain emulation here; the doubt is told rather than hidden.
        return "qemu"
    for mark, name in (
        ("VMware", "vmware"),
        ("innotek", "virtualbox"),
        ("Xen", "xen"),
        ("Amazon EC2", "kvm"),
        ("Google Compute Engine", "kvm"),
        ("Apple Virtualization", "apple"),
    ):
        if mark in vendor or mark in product:
            return name
    if vendor == "Microsoft Corporation" and product == "Virtual Machine":
        return "hyper-v"
    return "vm" if "hypervisor" in first.get("flags", "").split() else ""


def _under_qemu_user(root: Path, architecture: str, processors: list[dict[str, str]]) -> bool:
    """QEMU's user mode rewrites /proc/self/exe but not the same link of a thread (linux-user/syscall.c)."""
    if any(_link(task / "exe").startswith("qemu-") for task in _listed(root / "proc/self/task")):
        return True
    # Older ones show the host's /proc/cpuinfo to a program of another architecture.
    arm = architecture.startswith(("aarch64", "arm"))
    return arm and bool(processors) and "vendor_id" in processors[0]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _strings(path: Path) -> list[str]:
    """The NUL-terminated strings of a device-tree property."""
    try:
        return [text.decode("utf-8", "replace") for text in path.read_bytes().split(b"\0") if text]
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _link(path: Path) -> str:
    """Name of the file that a link leads to; empty when it is none or may not be read."""
    try:
        return path.readlink().name
    except OSError:
        return ""
