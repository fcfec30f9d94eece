"""Has the board its processors and its memory for the measurement alone?

Sources: Documentation/admin-guide/cgroup-v2.rst (``cpu.max``: quota and period in microseconds;
``memory.max``), cgroup-v1/{memory,cpuacct}.rst and scheduler/sched-bwc.rst (``cpu.cfs_quota_us``),
Documentation/accounting/psi.rst of the Linux kernel; proc_loadavg(5), proc_meminfo(5), proc_swaps(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.check import (
    Check,
    Program,
    View,
    absent,
    doubtful,
    invalid,
    ok,
    size,
    told,
    unknown,
)
from boardbench.agent.board.identify import EMULATORS, memory_bytes
from boardbench.agent.board.policies import processor_names
from boardbench.v1 import agent_pb2

# What makers of containers leave in them.
_CONTAINER_MARKS = {".dockerenv": "Docker", "run/.containerenv": "Podman"}
_CONTAINER_ID = re.compile(r"(?:docker|libpod)[-/]([0-9a-f]{12})[0-9a-f]{52}")
_AVERAGE = re.compile(r"^some avg10=(\d+(?:\.\d+)?)", re.MULTILINE)
# Below it pages of the model itself may go to swap in the next run.
_SCARCE_SHARE = 0.25


def _machine(view: View) -> agent_pb2.Finding:
    kind = view.board.emulator
    if kind in EMULATORS:
        return invalid(
            f"it runs under {kind}, an emulator, and timings are those of the emulator",
            "measure on the board itself",
        )
    container = _container(view.root)
    inside = f" and in a container ({container})" if container else ""
    if not kind:
        return ok(f"no emulator and no virtual machine{f', a container ({container})' if container else ''}")
    said = f"a virtual machine ({kind}){inside}"
    if view.work is None:
        return ok(f"{said}: whether its host takes processor time away is not told")
    stolen = view.work.stolen_share
    said += f", whose host took {stolen:.1%} of the processor time in the last {view.work.seconds:.1f} s"
    if stolen > view.limits.steal_invalid:
        return invalid(said, "measure on a machine of its own, or give this one processors of its own")
    if stolen > view.limits.steal_doubtful:
        return doubtful(said, "measure on a machine of its own, or give this one processors of its own")
    return ok(said)


def _container(root: Path) -> str:
    """What it calls itself; empty outside of any."""
    for mark, name in _CONTAINER_MARKS.items():
        if sysfs.exists(root / mark):
            return name
    # systemd's own, by its container interface (systemd.io/CONTAINER_INTERFACE).
    return sysfs.word(root / "run/systemd/container")


def _processors(view: View) -> agent_pb2.Finding:
    online = sysfs.word(view.root / "sys/devices/system/cpu/online")
    if not view.board.cpu_count:
        return unknown("the processors can't be counted")
    said = f"{view.board.cpu_count} × {view.board.cpu_model or view.board.architecture}"
    allowed = _allowed(view.root)
    isolated = set(_numbers(sysfs.word(view.root / "sys/devices/system/cpu/isolated")))
    missing = set(_numbers(online)) - allowed - isolated if allowed and online else set()
    if missing:
        return doubtful(
            f"{said}, of which the agent may not use {processor_names(missing)}: an engine that starts a "
            "thread for each then has too many",
            "start the agent without taskset, CPUAffinity= and cpuset, or measure with --threads "
            f"{view.board.cpu_count - len(missing)}",
        )
    notes = []
    if isolated:
        notes.append(f"{processor_names(isolated)} isolated, which nothing uses that does not ask for it")
    if sysfs.word(view.root / "sys/devices/system/cpu/smt/active") == "1":
        notes.append("two threads share a core (SMT)")
    if " + " in view.board.cpu_model:
        notes.append("which kind a thread gets is the scheduler's choice")
    return ok("; ".join([said, *notes]))


def _allowed(root: Path) -> set[int]:
    """Processors that this process may use; empty where it is not told."""
    try:
        status = sysfs.table(root / "proc/self/status")
    except OSError:
        return set()
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)$", status, re.MULTILINE)
    return set(_numbers(found.group(1))) if found else set()


def _numbers(text: str) -> Iterator[int]:
    """Of "0-3,6"."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (not last or last.isdecimal()):
            yield from range(int(first), int(last or first) + 1)


@dataclass(frozen=True)
class _Quota:
    """How much of the processors a control group may use."""

    group: str
    processors: float
    # How often it was held back so far; None where it is not told.
    times: int | None


def _quota(view: View) -> agent_pb2.Finding:
    try:
        quotas = list(_quotas(view.root))
    except FileNotFoundError:
        return absent("the agent is in no control group that could limit it")
    except OSError as error:
        return unknown(f"the control groups of the agent can't be read: {told(error)}")
    if not quotas:
        return ok("no limit on the agent's processor time")
    least = min(quotas, key=lambda quota: quota.processors)
    if least.processors >= view.processors:
        return ok(f"the agent may use {least.processors:g} processors, and there are {view.processors}")
    held = f"; that happened {least.times:,} times so far" if least.times else ""
    return doubtful(
        f"the agent and its workers may use {least.processors:g} of {view.processors} processors, and are "
        f"stopped until the next period when that is used up{held}",
        _unlimited(least.group),
    )


def _unlimited(group: str) -> str:
    name = group.rpartition("/")[2]
    if name.endswith((".service", ".slice", ".scope")) and not _CONTAINER_ID.search(group):
        return f"sudo systemctl set-property {name} CPUQuota="
    container = _CONTAINER_ID.search(group)
    if container:
        return f"docker update --cpus 0 {container.group(1)}"
    return "take the limit away where the container is started (--cpus, resources.limits.cpu)"


def _quotas(root: Path) -> Iterator[_Quota]:
    """Of the agent's control group and those above it. Raises OSError."""
    for line in sysfs.table(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if not controllers:
            for folder, group in _upwards(root / "sys/fs/cgroup", path):
                words = sysfs.word(folder / "cpu.max").split()
                if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
                    yield _Quota(group, int(words[0]) / max(1, int(words[1])), _times(folder))
        elif "cpu" in controllers.split(","):
            for folder, group in _upwards(root / "sys/fs/cgroup/cpu", path):
                quota = sysfs.word(folder / "cpu.cfs_quota_us")
                period = sysfs.word(folder / "cpu.cfs_period_us")
                if quota.isdecimal() and period.isdecimal():
                    yield _Quota(group, int(quota) / max(1, int(period)), _times(folder))


def _upwards(top: Path, path: str) -> Iterator[tuple[Path, str]]:
    """The group's folder and those above it, each with its name."""
    names = [name for name in path.split("/") if name not in ("", ".", "..")]
    for count in range(len(names), -1, -1):
        yield top.joinpath(*names[:count]), "/" + "/".join(names[:count])


def _times(folder: Path) -> int | None:
    try:
        for line in sysfs.table(folder / "cpu.stat").splitlines():
            name, _, count = line.partition(" ")
            if name == "nr_throttled" and count.isdecimal():
                return int(count)
    except OSError:
        pass
    return None


def _load(view: View) -> agent_pb2.Finding:
    average = sysfs.word(view.root / "proc/loadavg").split(" ")[0]
    minute = f"; load average over one minute {average}" if average else ""
    if view.running_run_id:
        return ok(f"the run {view.running_run_id[:8]} is being measured: the load is its own{minute}")
    work = view.work
    if work is None:
        return unknown("the kernel does not tell what the processors do")
    share = work.busy_processors / view.processors
    said = f"other programs use {work.busy_processors:.2f} of {view.processors} processors{minute}"
    if share <= view.limits.load_doubtful:
        return ok(said)
    if work.programs:
        said += ": " + ", ".join(
            f"{program.name} (pid {program.pid}) {program.processors:.2f}" for program in work.programs
        )
    make = invalid if share > view.limits.load_invalid else doubtful
    return make(said, _stop(work.programs))


def _stop(programs: tuple[Program, ...]) -> str:
    units = list(dict.fromkeys(program.unit for program in programs if program.unit.endswith(".service")))
    if units:
        return f"sudo systemctl stop {' '.join(units)}"
    if programs:
        names = dict.fromkeys(program.name for program in programs)
        return f"end {', '.join(names)}, or wait until it is done"
    return "find out what it is (top), and stop it"


def _pressure(view: View) -> agent_pb2.Finding:
    found = {kind: _average(view.root, kind) for kind in ("cpu", "memory", "io")}
    known = {kind: share for kind, share in found.items() if share is not None}
    if not known:
        return absent("this kernel does not tell what tasks wait for (it was built or booted without PSI)")
    said = "in the last 10 s some task waited " + ", ".join(
        f"{share:.0%} of the time for {_WAITED[kind]}" for kind, share in known.items()
    )
    if view.running_run_id:
        return ok(f"{said}; a run is being measured")
    if known.get("memory", 0.0) > view.limits.memory_pressure_doubtful:
        return doubtful(said, "stop what takes the memory: ps -eo rss,pid,comm --sort=-rss | head")
    if known.get("cpu", 0.0) > view.limits.cpu_pressure_doubtful:
        return doubtful(said, "stop what takes the processors: ps -eo pcpu,pid,comm --sort=-pcpu | head")
    return ok(said)


_WAITED = {"cpu": "a processor", "memory": "memory", "io": "a disk"}


def _average(root: Path, kind: str) -> float | None:
    try:
        found = _AVERAGE.search(sysfs.table(root / "proc/pressure" / kind))
    except OSError:
        return None
    return float(found.group(1)) / 100 if found else None


def _memory(view: View) -> agent_pb2.Finding:
    known = memory_bytes(view.root)
    total, available = known.get("MemTotal"), known.get("MemAvailable")
    if not total or available is None:
        return unknown("the kernel does not tell how much memory is available")
    what = "the board"
    for limit, used in _memory_limits(view.root):
        if limit < total:
            total, available, what = limit, min(available, max(0, limit - used)), "the agent's control group"
    said = f"{size(available)} of {size(total)} of {what} available"
    if available < view.limits.memory_available_doubtful * total:
        return doubtful(
            f"{said}: the kernel drops pages of the model's file and reads them again",
            "stop what takes it: ps -eo rss,pid,comm --sort=-rss | head",
        )
    return ok(said)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of the agent's control groups that have one."""
    try:
        lines = sysfs.table(root / "proc/self/cgroup").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for folder, _ in _upwards(top, path):
            limit, used = (sysfs.word(folder / name) for name in names)
            if limit.isdecimal() and used.isdecimal():
                yield int(limit), int(used)


def _swap(view: View) -> agent_pb2.Finding:
    known = memory_bytes(view.root)
    if "SwapTotal" not in known:
        return unknown("the kernel does not tell about swap")
    total, used = known["SwapTotal"], known["SwapTotal"] - known.get("SwapFree", 0)
    if not total:
        return ok("none")
    said = f"{size(used)} of {size(total)} in use{_kinds(view.root)}"
    fix = "sudo swapoff -a (sudo swapon -a turns it on again)"
    moved = view.work.swapped_in_bytes if view.work is not None else None
    if moved and moved > view.limits.swap_doubtful_bytes and not view.running_run_id:
        return doubtful(f"{said}; {size(moved)} came back from it within {view.work.seconds:.1f} s", fix)  # type: ignore[union-attr]
    scarce = known.get("MemAvailable", 0) < _SCARCE_SHARE * known.get("MemTotal", 0)
    if used > view.limits.swap_doubtful_bytes and scarce:
        return doubtful(f"{said}, and memory is scarce: the model's own pages may go there", fix)
    return ok(said)


def _kinds(root: Path) -> str:
    """Where it is: ", on /dev/zram0"."""
    try:
        lines = sysfs.table(root / "proc/swaps").splitlines()[1:]
    except OSError:
        return ""
    places = [line.split()[0] for line in lines if line.strip()]
    return f", on {', '.join(places)}" if places else ""


CHECKS = (
    Check(
        "machine",
        "an emulator, a virtual machine or a container underneath",
        "invalid under an emulator; doubtful from `validity.steal_doubtful` of the time taken away by the "
        "host, invalid from `validity.steal_invalid` on",
        _machine,
    ),
    Check(
        "processors",
        "which processors the agent may use, isolated ones, SMT, two kinds of cores",
        "doubtful when the agent may not use all of them",
        _processors,
    ),
    Check(
        "quota",
        "a limit on the processor time of the agent's control group",
        "doubtful when it is less than all processors",
        _quota,
    ),
    Check(
        "load",
        "what other programs take of the processors, over a second",
        "doubtful from `validity.load_doubtful` on, invalid from `validity.load_invalid` on",
        _load,
    ),
    Check(
        "pressure",
        "what tasks waited for in the last ten seconds",
        "doubtful beyond `validity.cpu_pressure_doubtful` and `validity.memory_pressure_doubtful`",
        _pressure,
    ),
    Check(
        "memory",
        "memory that is available",
        "doubtful below `validity.memory_available_doubtful`",
        _memory,
    ),
    Check(
        "swap",
        "swap and zram in use",
        "doubtful while pages come back from it, or when it is used and memory is scarce",
        _swap,
    ),
)
"""In the order in which they are told."""
