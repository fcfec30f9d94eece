"""The Edge TPU: its library described, why it refused to start, and what the hardware says it did.

Sources. The library's C API and options: google-coral/libedgetpu, ``tflite/public/edgetpu_c.h`` and
``tflite/edgetpu_delegate_for_custom_op_tflite_plugin.cc``. The PCIe driver's files in
``/sys/class/apex/apex_N``: google/gasket-driver, ``src/apex_driver.c`` (``temp`` and trip points in
thousandths of a degree), ``src/gasket_interrupt.c`` (``interrupt_counts``), ``src/gasket_core.c``
(``status``). The USB stick: ``urbnum`` and ``speed`` (Mbit/s) of the kernel's
Documentation/ABI/testing/sysfs-bus-usb; it has no temperature.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterator, List, Mapping, Optional, Tuple

from boardbench.agent.bench import doubts, libraries
from boardbench.agent.bench.gpu_counters import listed, text
from boardbench.agent.bench.placement import own_report
from boardbench.agent.bench.runtime import OptionRejected, Outcome, RuntimeUnavailable
from boardbench.agent.domain import (
    AcceleratorUse,
    CounterReading,
    Evidence,
    EvidenceReport,
    Placement,
    Verdict,
    Warning,
)

LIBRARY_VARIABLE = "BOARDBENCH_EDGETPU_LIBRARY"
"""Environment variable that names the library where it is not in the usual place."""

CUSTOM_OP = "edgetpu-custom-op"

STANDIN_SYMBOL = "boardbench_standin"
"""A string that says what it stands in for. Only delegates made for tests have it, no real one does."""

_PCI_TYPE, _USB_TYPE = 0, 1
_USB_IDS = (("1a6e", "089a"), ("18d1", "9302"))
"""Before and after libedgetpu has sent the stick its firmware (driver/usb/usb_driver.h)."""

_SPEEDS = ("Low", "Medium", "High", "Max")
_OPTIONS = {
    "device": re.compile(r"(usb|pci)?(:\d+)?"),
    "Performance": re.compile("|".join(_SPEEDS)),
    "Usb.AlwaysDfu": re.compile("True|False"),
    "Usb.MaxBulkInQueueLength": re.compile(r"\d{1,3}"),
}
_FORMS = {
    "device": "empty, :N, usb, usb:N, pci or pci:N",
    "Performance": "Low, Medium, High or Max",
    "Usb.AlwaysDfu": "True or False",
    "Usb.MaxBulkInQueueLength": "a number from 0 to 255",
}

BUSY_SHARE = 0.9
"""From here on a process did the work itself: an inference in plain kernels is above 0.97."""

WAITING_SHARE = 0.6
"""Up to here it mostly waited: copies and system calls of the slowest USB host take some half of the time."""

LEAST_SECONDS = 0.01
"""Below it a single pass of the garbage collector or a page fault can tip the scale."""

STREAMED_SHARE = 0.01
"""Below it streamed parameters don't show in the latency: nearly every compiled file has some."""


def library_name(environ: Optional[Mapping[str, str]] = None) -> str:
    """The library that device ``edgetpu`` loads."""
    variables = os.environ if environ is None else environ
    usual = "libedgetpu.1.dylib" if sys.platform == "darwin" else "libedgetpu.so.1"
    return variables.get(LIBRARY_VARIABLE) or usual


# The library


class _CDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("path", ctypes.c_char_p))


@dataclass(frozen=True)
class Driver:
    """A library that drives Edge TPUs."""

    library: str
    """As it was asked for."""

    version: str
    """In its own words, and whether it is the "std" or the "max" build where that can be told."""

    runtime_version: Optional[int]
    """What a compiled model asks for; None when it does not say."""

    standin: str
    """Name of the stand-in that it is; empty for the real thing."""

    devices: Tuple[str, ...]
    """Devices that it finds, as libedgetpu names them: "/dev/apex_0", "/sys/bus/usb/devices/2-1"."""


def is_driver(library: str) -> bool:
    """Whether the library drives Edge TPUs, and not something else. Raises RuntimeUnavailable."""
    return hasattr(_open(library), "edgetpu_version")


def describe(library: str) -> Driver:
    """What a library that drives Edge TPUs says of itself. Raises RuntimeUnavailable."""
    loaded = _open(library)
    loaded.edgetpu_version.restype = ctypes.c_char_p
    said = (loaded.edgetpu_version() or b"").decode("utf-8", "replace")
    number = re.search(r"RuntimeVersion\((\d+)\)", said)
    build = _build(library)
    return Driver(
        library=library,
        version=f"{said}, {build}" if said and build else said,
        runtime_version=int(number.group(1)) if number else None,
        standin=standin(library),
        devices=_devices(loaded),
    )


def standin(library: str) -> str:
    """Name of the stand-in that the library is; empty for the real thing. Raises RuntimeUnavailable."""
    try:
        symbol = (ctypes.c_char * 64).in_dll(_open(library), STANDIN_SYMBOL)
    except ValueError:
        return ""
    return ctypes.string_at(ctypes.addressof(symbol)).decode("utf-8", "replace")


def loads(library: str) -> bool:
    """Whether the library can be loaded; whether a device is plugged in is not looked at."""
    try:
        _open(library)
    except RuntimeUnavailable:
        return False
    return True


def _open(library: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(library)
    except OSError as error:
        why = libraries.why_not(library, str(error))
        if not why or not Path(library).exists():
            why = (
                f"{why + ': ' if why else ''}install it (for an Edge TPU the package libedgetpu1-std or "
                "libedgetpu1-max), or give its path on the board with the option delegate=PATH"
            )
        raise RuntimeUnavailable(
            f"the delegate library {library} can't be loaded ({error}): {why}"
        ) from error


def _devices(loaded: ctypes.CDLL) -> Tuple[str, ...]:
    if not hasattr(loaded, "edgetpu_list_devices") or not hasattr(loaded, "edgetpu_free_devices"):
        return ()
    loaded.edgetpu_list_devices.restype = ctypes.POINTER(_CDevice)
    loaded.edgetpu_free_devices.argtypes = [ctypes.POINTER(_CDevice)]
    count = ctypes.c_size_t(0)
    told = loaded.edgetpu_list_devices(ctypes.byref(count))
    found = tuple((told[at].path or b"").decode("utf-8", "replace") for at in range(count.value))
    if told:
        loaded.edgetpu_free_devices(told)
    return found


def _build(library: str) -> str:
    """Build of libedgetpu: "std" holds USB devices at half clock, "max" does not; "" where it can't be told.

    Each carries a mark (port/default/builddata.cc).
    """
    path = _mapped(library)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"PERFORMANCE=THROTTLED") >= 0:
                return "std"
            return "max" if content.find(b"PERFORMANCE=DIRECT") >= 0 else ""
    except (OSError, ValueError):
        return ""


def _mapped(library: str) -> Path:
    """Where the loader found the library."""
    if "/" in library:
        return Path(library)
    # libedgetpu.so.1 is a link to libedgetpu.so.1.0; the map has the name of what it leads to.
    stem = library.split(".so")[0]
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:  # no Linux
        return Path(library)
    for line in maps.splitlines():
        path = line.partition("/")[2]
        if path.rpartition("/")[2].startswith(stem):
            return Path("/" + path)
    return Path(library)


# Starting it


def check_options(options: Mapping[str, str]) -> Tuple[Warning, ...]:
    """Doubts about options for libedgetpu.

    Raises OptionRejected for what it would ignore, or refuse without a word.
    """
    for key, value in options.items():
        if key not in _OPTIONS:
            raise OptionRejected(f"libedgetpu has no option {key}; it takes {', '.join(sorted(_OPTIONS))}")
        if not _OPTIONS[key].fullmatch(value):
            raise OptionRejected(f"option delegate.{key} of libedgetpu is {_FORMS[key]}, not {value!r}")
    without_effect = sorted(set(options) - {"device"})
    if without_effect and ":" not in options.get("device", ""):
        seen = f"libedgetpu ignores {', '.join(without_effect)} unless the option device has an index (usb:0)"
        return (doubts.warn("edgetpu_option_ignored", seen),)
    return ()


def load_delegate(
    module: Any, library: str, options: Mapping[str, str], *, sys_root: Path = Path("/")
) -> Any:
    """The delegate, by the interpreter package ``module``. Raises RuntimeUnavailable with the reason."""
    if not hasattr(_open(library), _ENTRY):
        raise RuntimeUnavailable(
            f"{library} is a shared library and no delegate of TensorFlow Lite: it has no {_ENTRY}"
        )
    try:
        return module.load_delegate(library, dict(options))
    except (ValueError, RuntimeError, AttributeError) as error:
        # ValueError: the library and what it reported, which in libedgetpu's case is nothing.
        said = " ".join(str(error).replace(f"Failed to load delegate from {library}", "").split())
    except OSError:
        _open(library)
        raise
    said = said or _reason_on_stderr(module, library, options)
    raise RuntimeUnavailable(
        f"the delegate {library} refused to start ({said or 'it gave no reason'}): "
        + _diagnosis(library, sys_root, options=options)
    )


def _reason_on_stderr(module: Any, library: str, options: Mapping[str, str]) -> str:
    """What libedgetpu writes when it is asked to be talkative: it has no other way to give a reason."""
    loaded = _open(library)
    if not hasattr(loaded, "edgetpu_verbosity"):
        return ""
    loaded.edgetpu_verbosity(10)
    try:
        with _captured_stderr() as captured:
            try:
                module.load_delegate(library, dict(options))
            except (ValueError, RuntimeError):
                pass
    finally:
        loaded.edgetpu_verbosity(0)
    return _condensed("".join(captured))


_ENTRY = "tflite_plugin_create_delegate"

_LOG_LINE = re.compile(r"^[IWEF] \S+?:\d+\] ?(.*)$")
_NOISE = re.compile(r"^\S+\.(?:cc|h|c):\d+$|^~?\w+$")


def _condensed(log: str, most: int = 4) -> str:
    """The last few different messages of a log of libedgetpu, places in its source left out."""
    messages: List[str] = []
    for line in log.splitlines():
        found = _LOG_LINE.match(line.strip())
        message = (found.group(1) if found else line).strip()
        if message and not _NOISE.match(message) and message not in messages:
            messages.append(message)
    return "; ".join(messages[-most:])[:500]


@contextmanager
def _captured_stderr() -> Iterator[List[str]]:
    """What is written to descriptor 2 inside, by whomever; it gets there after all when the block ends."""
    captured: List[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield captured
            finally:
                ctypes.CDLL(None).fflush(None)
                os.dup2(kept, 2)
                file.seek(0)
                content = file.read()
                captured.append(content.decode("utf-8", "replace"))
                os.write(2, content)
    finally:
        os.close(kept)


def _diagnosis(
    library: str,
    sys_root: Path,
    access: Callable[[Path, int], bool] = os.access,
    options: Optional[Mapping[str, str]] = None,
) -> str:
    """What is seen on the board, and what to do."""
    if standin(library):
        return "it is a stand-in and does as its options say"
    if not is_driver(library):
        given = ", ".join(f"{key}={value}" for key, value in (options or {}).items())
        asked = f"does it take the options {given}? Else: " if given else ""
        return f"{asked}is its device plugged in, free, and may this user open it?"
    seen = find(sys_root)
    if not seen:
        if _without_driver(sys_root):
            return "a PCIe Edge TPU is here without its driver: install the gasket and apex kernel modules"
        return "no Edge TPU is seen on this board, neither on PCIe (/sys/class/apex) nor on USB: plug it in"
    for tpu in seen:
        if tpu.status not in ("", "ALIVE"):
            return f"the driver of {tpu.path} says {tpu.status}: power the board off and on"
        node = sys_root / tpu.node.lstrip("/") if tpu.node else None
        if node is not None and node.exists() and not access(node, os.R_OK | os.W_OK):
            group = "apex" if tpu.kind == "pci" else "plugdev"
            return f"this user may not open {tpu.node}: add it to the group {group}, or install the udev rule"
    paths = ", ".join(tpu.path for tpu in seen)
    return f"{paths} is there: end whatever else uses it, or unplug it and plug it in again"


_NEWER = re.compile(r"requires runtime version \((\d+)\), which is newer than this runtime version \((\d+)\)")


def explain(said: str) -> Optional[str]:
    """What to do about an interpreter's refusal that comes from libedgetpu; None when it does not."""
    newer = _NEWER.search(said)
    if newer:
        return (
            f"the model is compiled for Edge TPU runtime {newer.group(1)} and libedgetpu here is "
            f"{newer.group(2)}: update libedgetpu, or compile with "
            f"edgetpu_compiler --min_runtime_version {newer.group(2)}"
        )
    if "Unsupported data type in custom op handler" in said:
        return (
            "libedgetpu was built for another version of TensorFlow Lite: install the libedgetpu that "
            "belongs to this interpreter"
        )
    if "only supports static-sized tensors" in said:
        return "the model leaves a size open, and the Edge TPU needs them all: fix the batch, convert again"
    return None


# What is on the board


@dataclass(frozen=True)
class Tpu:
    """An Edge TPU as the system shows it."""

    kind: str
    """ "pci" or "usb"."""

    path: str
    """As libedgetpu names it."""

    folder: Path
    """Its folder below the system root."""

    node: str = ""
    """The file that a program opens to use it; empty when not known."""

    status: str = ""
    """What its driver says: "ALIVE", "DEAD", …; empty without such a driver."""

    @property
    def counter(self) -> Path:
        """The file whose number goes up when the device is used."""
        return self.folder / ("interrupt_counts" if self.kind == "pci" else "urbnum")

    def count(self) -> Optional[int]:
        """Interrupts or USB transfers since the driver started; None when it can't be read."""
        told = text(self.counter)
        numbers = re.findall(r"^0x[0-9a-f]+: (\d+)$", told, re.MULTILINE) if self.kind == "pci" else [told]
        return sum(map(int, numbers)) if numbers and all(number.isdigit() for number in numbers) else None

    def temperature_celsius(self) -> Optional[float]:
        """Of the chip; None on USB, where nothing measures it."""
        return _thousandths(self.folder / "temp") if self.kind == "pci" else None

    def throttling_celsius(self) -> Optional[float]:
        """From which temperature on the driver lowers the clock; None when it does not say."""
        return _thousandths(self.folder / "trip_point0_temp") if self.kind == "pci" else None

    def megabits_per_second(self) -> Optional[int]:
        """Speed of the USB link; None on PCIe."""
        told = text(self.folder / "speed") if self.kind == "usb" else ""
        return int(told) if told.isdigit() else None


def find(sys_root: Path) -> Tuple[Tpu, ...]:
    """Every Edge TPU that the system below ``sys_root`` shows with a driver, or on USB."""
    found = [
        Tpu("pci", f"/dev/{folder.name}", folder, f"/dev/{folder.name}", text(folder / "status"))
        for folder in listed(sys_root / "sys/class/apex")
    ]
    for folder in listed(sys_root / "sys/bus/usb/devices"):
        if (text(folder / "idVendor"), text(folder / "idProduct")) in _USB_IDS:
            bus, number = text(folder / "busnum"), text(folder / "devnum")
            known = bus.isdigit() and number.isdigit()
            node = f"/dev/bus/usb/{int(bus):03}/{int(number):03}" if known else ""
            found.append(Tpu("usb", f"/sys/bus/usb/devices/{folder.name}", folder, node))
    return tuple(found)


def _without_driver(sys_root: Path) -> bool:
    return any(
        (text(folder / "vendor"), text(folder / "device")) == ("0x1ac1", "0x089a")
        for folder in listed(sys_root / "sys/bus/pci/devices")
    )


def _thousandths(path: Path) -> Optional[float]:
    told = text(path)
    return int(told) / 1000 if re.fullmatch(r"-?\d+", told) else None


# What the file says


@dataclass(frozen=True)
class CompiledFile:
    """What the compiler left in a model file; sizes and version only where it is compiled."""

    tpu_nodes: int
    cpu_ops: int
    cached_bytes: Optional[int] = None
    streamed_bytes: Optional[int] = None
    min_runtime_version: Optional[int] = None


def read_file(model: Path) -> Optional[CompiledFile]:
    """What the compiler left in the file; None when it can't be read."""
    from boardbench.inspect import darwinn, tflite
    from boardbench.inspect.errors import InspectError
    from boardbench.inspect.ledger import Ledger

    try:
        with model.open("rb") as file:
            # Not closed here: what reads it may hold views of it in cycles, until these are collected.
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        operators = tflite.read_model(data, Ledger()).main.operators
        spans = [op.custom_options for op in operators if op.type == CUSTOM_OP and op.custom]
        packages = [darwinn.read_packages(data[span[0] : span[1]], Ledger())[0] for span in spans if span]
    except (OSError, ValueError, InspectError):
        return None
    if not spans:
        return CompiledFile(tpu_nodes=0, cpu_ops=len(operators))
    versions = [package.min_runtime_version for package in packages]
    return CompiledFile(
        tpu_nodes=len(spans),
        cpu_ops=len(operators) - len(spans),
        cached_bytes=sum(package.cached_bytes for package in packages),
        streamed_bytes=sum(package.streamed_bytes for package in packages),
        min_runtime_version=max((version for version in versions if version is not None), default=None),
    )


# What happened


@dataclass(frozen=True)
class _Moment:
    counts: Mapping[str, int]
    temperatures: Mapping[str, float]


class EdgeTpuWatch:
    """Looks at the Edge TPU before and after the counted inferences, and joins what it sees with the rest."""

    def __init__(
        self,
        driver: Driver,
        options: Mapping[str, str],
        model: Path,
        *,
        took_nothing: bool,
        sys_root: Path = Path("/"),
    ) -> None:
        """Looks at the board. ``took_nothing``: the library was given the model and left all of it."""
        self._driver = driver
        self._options = options
        self._model = model
        seen = find(sys_root)
        named = tuple(tpu for tpu in seen if tpu.path in driver.devices)
        # The library may name devices otherwise than expected; those of the system are then all there is.
        self._tpus = _selected(named or seen, options.get("device", ""))
        self._took_nothing = took_nothing
        self._file: Optional[CompiledFile] = None
        self._before: Optional[_Moment] = None
        self._after: Optional[_Moment] = None

    def doubts(self) -> Iterator[Warning]:
        """What can be said before anything has run."""
        if self._driver.standin:
            yield doubts.warn(
                "standin", f"{self._driver.standin} took the place of the Edge TPU ({self._driver.library})"
            )
        else:
            yield from check_options(self._options)
        if self._took_nothing:
            yield doubts.warn(
                "not_compiled_for_edgetpu",
                f"{self._model.name} IS NOT COMPILED for the Edge TPU: all of it runs on the CPU",
            )
        for tpu in self._tpus:
            speed = tpu.megabits_per_second()
            if speed is not None and speed < 5000:
                yield doubts.warn("edgetpu_slow_usb", f"{tpu.path} is on a USB link of {speed} Mbit/s")

    def begin(self) -> None:
        """Reads what there is to read; called right before the counted inferences."""
        self._before = self._look()

    def end(self) -> None:
        """Reads it again, right after."""
        self._after = self._look()

    def outcome(
        self,
        placement: Placement,
        *,
        runs: int,
        cpu_seconds: float,
        wall_seconds: float,
        queued_seconds: Optional[float],
    ) -> Outcome:
        """What the run did, all evidence joined; ``placement`` is what the interpreter's partition says."""
        self._file = read_file(self._model)
        counters = self._counter_evidence(runs)
        host = self._host_evidence(cpu_seconds, wall_seconds, queued_seconds)
        found = (self._static_evidence(), own_report(placement), counters, host)
        reports = tuple(report for report in found if report is not None)
        verdict, why = _joined(placement.verdict, counters, host)
        warnings = [*self._streaming(), *self._heat()]
        if verdict is Verdict.CONTRADICTED:
            warnings.append(doubts.warn("placement_contradicted", why))
        detail = f"{placement.detail}; but {why}" if why else placement.detail
        return Outcome(
            placement=replace(
                placement,
                verdict=verdict,
                detail=detail,
                evidence_reports=reports,
                standin=bool(self._driver.standin),
            ),
            accelerator=self._use(),
            warnings=tuple(warnings),
        )

    def _look(self) -> _Moment:
        counts = {tpu.path: tpu.count() for tpu in self._tpus}
        temperatures = {tpu.path: tpu.temperature_celsius() for tpu in self._tpus}
        return _Moment(
            counts={path: count for path, count in counts.items() if count is not None},
            temperatures={path: degrees for path, degrees in temperatures.items() if degrees is not None},
        )

    def _parameters(self) -> Tuple[Optional[int], Optional[int]]:
        return (None, None) if self._file is None else (self._file.cached_bytes, self._file.streamed_bytes)

    def _static_evidence(self) -> Optional[EvidenceReport]:
        if self._file is None:
            return None
        nodes, others = self._file.tpu_nodes, self._file.cpu_ops
        verdict = Verdict.NOT_ACCELERATED
        if nodes:
            verdict = Verdict.PARTLY if others else Verdict.ACCELERATED
        return EvidenceReport(
            evidence=Evidence.STATIC,
            verdict=verdict,
            detail=f"{nodes} Edge TPU nodes in the file, and {others} operations outside them",
            # How many operations a compiled node stands for is not in the file.
            accelerated_ops=None if nodes else 0,
            cpu_ops=others,
        )

    def _counter_evidence(self, runs: int) -> Optional[EvidenceReport]:
        before, after = self._before, self._after
        if before is None or after is None:
            return None
        readings = tuple(
            CounterReading(
                name=self._counter_name(tpu), before=before.counts[tpu.path], after=after.counts[tpu.path]
            )
            for tpu in self._tpus
            if tpu.path in before.counts and tpu.path in after.counts
        )
        if not readings:
            return None
        moved = max(reading.after - reading.before for reading in readings)
        names = ", ".join(reading.name for reading in readings)
        verdict = Verdict.UNSPECIFIED
        if moved <= 0:
            verdict = Verdict.NOT_ACCELERATED
        elif moved >= runs:  # at least one interrupt or transfer for each inference
            verdict = Verdict.ACCELERATED
        return EvidenceReport(
            evidence=Evidence.COUNTERS,
            verdict=verdict,
            detail=f"{names} went up by {max(moved, 0)} in {runs} inferences",
            counters=readings,
        )

    def _counter_name(self, tpu: Tpu) -> str:
        folder = f"/sys/class/apex/{tpu.folder.name}" if tpu.kind == "pci" else tpu.path
        return f"{folder}/{tpu.counter.name}"

    @staticmethod
    def _host_evidence(
        cpu_seconds: float, wall_seconds: float, queued_seconds: Optional[float]
    ) -> Optional[EvidenceReport]:
        # On a busy board, time in the queue for a processor is neither work nor waiting for a device.
        ran_seconds = wall_seconds - (queued_seconds or 0.0)
        if ran_seconds < LEAST_SECONDS:
            return None
        share = cpu_seconds / ran_seconds
        detail = f"{cpu_seconds:.3f} s of processor time in {wall_seconds:.3f} s"
        if queued_seconds is not None and queued_seconds > 0.01 * wall_seconds:
            detail += f", {queued_seconds:.3f} s of which were spent in the queue for a processor"
        if share >= BUSY_SHARE:
            verdict, meaning = Verdict.NOT_ACCELERATED, "the processor did the work"
        elif share <= WAITING_SHARE:
            verdict, meaning = Verdict.ACCELERATED, "the process mostly waited for a device"
        else:
            verdict, meaning = Verdict.UNSPECIFIED, "which says nothing"
        return EvidenceReport(evidence=Evidence.HOST_CPU, verdict=verdict, detail=f"{detail}: {meaning}")

    def _streaming(self) -> Iterator[Warning]:
        cached, streamed = self._parameters()
        if cached is not None and streamed is not None and streamed > STREAMED_SHARE * (cached + streamed):
            yield doubts.warn(
                "edgetpu_parameters_streamed",
                f"{streamed} of {cached + streamed} bytes of parameters don't fit into the Edge TPU and are "
                "sent at every inference",
            )

    def _heat(self) -> Iterator[Warning]:
        for tpu in self._tpus:
            limit = tpu.throttling_celsius()
            seen = [moment.temperatures.get(tpu.path) for moment in (self._before, self._after) if moment]
            hottest = max((degrees for degrees in seen if degrees is not None), default=None)
            if limit is not None and hottest is not None and hottest >= limit:
                yield doubts.warn(
                    "edgetpu_hot",
                    f"{tpu.path} was at {hottest:.1f} °C and its driver lowers the clock from {limit:.1f} °C",
                )

    def _used(self) -> Optional[Tpu]:
        """The device that ran, where it can be told: the only one, or the only one whose counter moved."""
        if len(self._tpus) == 1:
            return self._tpus[0]
        if self._before is None or self._after is None:
            return None
        before, after = self._before.counts, self._after.counts
        moved = [tpu for tpu in self._tpus if after.get(tpu.path, 0) > before.get(tpu.path, 0)]
        return moved[0] if len(moved) == 1 else None

    def _use(self) -> AcceleratorUse:
        tpu = self._used()
        cached, streamed = self._parameters()
        before = self._before.temperatures if self._before else {}
        after = self._after.temperatures if self._after else {}
        return AcceleratorUse(
            kind="tpu",
            path=tpu.path if tpu else "",
            library=self._driver.library,
            library_version=self._driver.version,
            runtime_version=self._driver.runtime_version,
            model_min_runtime_version=self._file.min_runtime_version if self._file else None,
            usb_megabits_per_second=tpu.megabits_per_second() if tpu else None,
            temperature_before_celsius=before.get(tpu.path) if tpu else None,
            temperature_after_celsius=after.get(tpu.path) if tpu else None,
            parameters_cached_bytes=cached,
            parameters_streamed_bytes=streamed,
            standin=bool(self._driver.standin),
        )


def _selected(tpus: Tuple[Tpu, ...], device: str) -> Tuple[Tpu, ...]:
    """Those that the option ``device`` can mean."""
    kind, _, index = device.partition(":")
    meant = tuple(tpu for tpu in tpus if not kind or tpu.kind == kind)
    # The index counts in the library's own order, which the system's need not be.
    return meant if not index or len(meant) > 1 else meant[int(index) : int(index) + 1]


def _joined(
    claimed: Verdict, counters: Optional[EvidenceReport], host: Optional[EvidenceReport]
) -> Tuple[Verdict, str]:
    """The verdict of all evidence, and what contradicts the partition's; the latter empty when nothing does.

    Hardware counters are the strongest: what did not move did not run. Processor time speaks only where
    there are none, and only against a model that is wholly on the TPU: what is left keeps a processor busy.
    """
    if claimed not in (Verdict.ACCELERATED, Verdict.PARTLY):
        return claimed, ""
    if counters is not None:
        if counters.verdict is Verdict.NOT_ACCELERATED:
            return Verdict.CONTRADICTED, f"the Edge TPU did not run: {counters.detail}"
        return claimed, ""
    if claimed is Verdict.ACCELERATED and host is not None and host.verdict is Verdict.NOT_ACCELERATED:
        return Verdict.CONTRADICTED, f"the Edge TPU has no counter here and {host.detail}"
    return claimed, ""
