"""Sets a board up for measuring, and puts everything back: after the time, at the end, and after a crash.

What is set: the processors' governor, energy preference and least frequency, so that they run at one
frequency; turbo off, so that it does not depend on heat; a Coral stick's USB autosuspend off; on a Jetson
what NVIDIA's own ``jetson_clocks`` sets, the fan included. Nothing here needs a reboot, and nothing raises a
limit.

What was there before is on disk before anything is changed:

    tuning/lock            held while anything is changed, so that two processes don't undo each other
    tuning/journal.json    the boot, and each setting with what it was and what it became
    tuning/clocks.txt      what ``jetson_clocks --store`` wrote

Sources: Documentation/admin-guide/pm/{cpufreq,intel_pstate}.rst and Documentation/driver-api/usb/
power-management.rst of the Linux kernel; NVIDIA's Jetson Linux Developer Guide, "Maximizing Jetson
Performance"; proc_sys_kernel(5) for ``random/boot_id``, which is another one after every boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from boardbench.agent import folder
from boardbench.agent.board import sysfs
from boardbench.agent.board.identify import USB_ACCELERATORS
from boardbench.agent.board.policies import Policy, policies, processor_names
from boardbench.agent.errors import AgentError

_log = logging.getLogger(__name__)

_CPU = "sys/devices/system/cpu"
_USB = "sys/bus/usb/devices"
_POLICY = rf"{_CPU}/(?:cpufreq/policy\d+|cpu\d+/cpufreq)"
_CLOCKS = "usr/bin/jetson_clocks"
# It waits for systemd to stop and start the fan's service.
_COMMAND_SECONDS = 60.0

# Between looks whether a measurement is over that keeps the board from being put back.
_BUSY_SECONDS = 0.5

_ON_OFF = {"1": "on", "0": "off"}
_OFF_ON = {"1": "off", "0": "on"}


@dataclass(frozen=True)
class _Kind:
    """A kind of setting."""

    # What people call it.
    label: str
    # Where it may be, below the root: a journal that names any other file is not ours.
    place: re.Pattern[str]
    # Words for its values; the others are told as they are.
    words: Mapping[str, str]


_KINDS = {
    "governor": _Kind("governor", re.compile(rf"{_POLICY}/scaling_governor"), {}),
    "preference": _Kind("energy preference", re.compile(rf"{_POLICY}/energy_performance_preference"), {}),
    "least": _Kind("least frequency", re.compile(rf"{_POLICY}/scaling_min_freq"), {}),
    "boost": _Kind("turbo", re.compile(rf"(?:{_CPU}/cpufreq|{_POLICY})/boost"), _ON_OFF),
    "no_turbo": _Kind("turbo", re.compile(rf"{_CPU}/intel_pstate/no_turbo"), _OFF_ON),
    "autosuspend": _Kind(
        "USB autosuspend", re.compile(rf"{_USB}/[0-9.-]+/power/control"), {"auto": "on", "on": "off"}
    ),
}


@dataclass(frozen=True)
class Setting:
    """A file that is to hold a value while the board is measured."""

    # One of the kinds above.
    kind: str
    # Of which part: "cpu0-3", "2-1"; empty for the whole board.
    part: str
    # Below the root, as is ``like``.
    path: str
    wanted: str = ""
    # File whose content is the value, where it is not known before.
    like: str = ""


@dataclass(frozen=True)
class _Change:
    """A setting that is changed, or about to be."""

    kind: str
    part: str
    path: str
    before: str
    # What was read back after it was set; empty while that may not have happened.
    now: str = ""
    # As in the setting.
    like: str = ""


@dataclass(frozen=True)
class _Failure:
    """A value that could not be written."""

    change: _Change
    value: str
    why: str


# A program with its arguments, and variables of its environment. Raises CommandFailed.
Run = Callable[[Sequence[str], Mapping[str, str]], None]


class CommandFailed(Exception):
    """A program did not do what it was asked for; says why."""


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs a program to its end. Raises CommandFailed."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_COMMAND_SECONDS,
            env={**os.environ, **environment},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"it was not over after {_COMMAND_SECONDS:g} s") from None
    except OSError as error:
        raise CommandFailed(error.strerror or str(error)) from error
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").strip().splitlines()
        raise CommandFailed(said[-1] if said else f"it exited with {done.returncode}")


def settings(root: Path) -> list[Setting]:
    """What the board under ``root`` is to hold while it is measured, in the order in which it is set."""
    return [*_turbo(root), *_frequencies(root), *_autosuspend(root)]


def has_clocks(root: Path) -> bool:
    """Whether the board has NVIDIA's ``jetson_clocks``."""
    return (root / _CLOCKS).exists()


def settable(root: Path, path: str) -> bool:
    """Whether this process may write the file below the root."""
    return os.access(root / path, os.W_OK)


def command(root: Path, paths: Sequence[str], value: str) -> str:
    """What a person pastes on the board to write the value into files below the root."""
    return f"echo {shlex.quote(value)} | sudo tee {_globbed(root, paths)}"


class Tuner:
    """The settings of one board. Every call blocks on the disk; any thread may make it.

    Whoever measures holds the board under a name of their own; it is put back when nobody holds it any more.
    """

    def __init__(self, root: Path, data_dir: Path, run: Run = run_command) -> None:
        """``root`` holds ``sys`` and ``proc``; nothing is made in ``data_dir`` before something is set."""
        self._root = root
        self._folder = data_dir / "tuning"
        self._journal = self._folder / "journal.json"
        self._stored_clocks = self._folder / "clocks.txt"
        self._run = run
        self._guard = threading.Lock()
        self._holders: set[str] = set()
        self._changes: list[_Change] = []
        # Whether jetson_clocks has set anything, or is about to.
        self._clocks = False
        self._failed: list[str] = []
        self._lock: int | None = None

    @property
    def changed(self) -> list[str]:
        """What is changed now, each as "what: before → now"."""
        with self._guard:
            return self._told()

    @property
    def failed(self) -> list[str]:
        """What the last call could not set or put back, each with the reason and what to do."""
        with self._guard:
            return list(self._failed)

    @property
    def holders(self) -> list[str]:
        """Who holds the board as it is now."""
        with self._guard:
            return sorted(self._holders)

    def acquire(self, owner: str) -> list[str]:
        """Sets the board up and holds it; what is changed now. What could not be set is in ``failed``."""
        with self._guard:
            self._failed = []
            self._holders.add(owner)
            try:
                if self._journal.exists() or self._to_do():
                    self._claim()
                    self._set()
            except AgentError as error:
                self._failed.append(f"nothing was set: {error}")
            except OSError as error:
                self._failed.append(f"nothing was set, since how it was can't be noted first: {error}")
            self._forget_if_done()
            return self._told()

    def release(self, owner: str) -> list[str]:
        """Lets go; puts the board back when nobody else holds it. What could not be put back."""
        with self._guard:
            self._failed = []
            self._holders.discard(owner)
            if not self._holders:
                self._put_back()
            return list(self._failed)

    def restore(self) -> list[str]:
        """Puts the board back, whoever holds it. What could not be put back."""
        with self._guard:
            self._failed = []
            self._holders.clear()
            self._put_back()
            return list(self._failed)

    def recover(self) -> list[str]:
        """Puts back what a killed process left; what that was, each as "what: now → before".

        Nothing of a former boot: the kernel keeps none of it. What could not be put back is in ``failed``.
        """
        with self._guard:
            self._failed = []
            if self._lock is not None or not self._journal.exists():
                return []
            try:
                self._claim()
            except (OSError, AgentError) as error:
                self._failed.append(f"{self._journal}: what it says is not put back: {error}")
                return []
            told = self._told(back=True)
            self._put_back()
            return told

    # --- the journal

    def _claim(self) -> None:
        """Takes the folder, and over what a killed process left there. Raises OSError, AgentError."""
        if self._lock is not None:
            return
        self._lock = folder.claim(self._folder)
        try:
            self._read()
        except BaseException:
            self._let_lock_go()
            raise

    def _let_lock_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read(self) -> None:
        try:
            noted = json.loads(self._journal.read_bytes())
            root, boot, clocks = str(noted["root"]), str(noted["boot_id"]), bool(noted["clocks"])
            changes = [
                _Change(**{str(key): str(text) for key, text in entry.items()}) for entry in noted["changes"]
            ]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            aside = self._journal.with_suffix(".broken")
            self._journal.replace(aside)
            self._failed.append(f"{aside}: no journal of ours ({error}); what it says is not put back")
            return
        if root != str(self._root.absolute()):
            raise AgentError(
                f"{self._journal} is about the board under {root}, not {self._root.absolute()}: "
                f"start once with --sys-root {root}, or remove the file"
            )
        if boot != _boot_id(self._root):
            self._drop()
            return
        for change in changes:
            if change.kind in _KINDS and _KINDS[change.kind].place.fullmatch(change.path):
                self._changes.append(change)
            else:
                self._failed.append(f"{self._journal}: {change.path} is nothing that boardbench sets")
        self._clocks = clocks

    def _note(self) -> None:
        noted = {
            "root": str(self._root.absolute()),
            "boot_id": _boot_id(self._root),
            "clocks": self._clocks,
            "changes": [asdict(change) for change in self._changes],
        }
        folder.replace(self._journal, json.dumps(noted, indent=1).encode())

    def _drop(self) -> None:
        for path in (self._journal, self._stored_clocks):
            path.unlink(missing_ok=True)
        folder.sync(self._folder)

    def _forget_if_done(self) -> None:
        """Drops the journal when nothing is changed."""
        if self._lock is None or self._changes or self._clocks:
            return
        try:
            self._drop()
        except OSError as error:
            self._failed.append(f"{self._journal}: can't be removed: {error.strerror}")
        self._let_lock_go()

    # --- setting

    def _set(self) -> None:
        """Raises OSError when the journal can't be written, before anything is changed."""
        planned, clocks = self._planned(), self._wants_clocks()
        if not planned and not clocks:
            return
        former = self._changes
        fresh = {change.path for change, _ in planned}
        self._changes = [change for change in former if change.path not in fresh]
        self._changes += [change for change, _ in planned]
        try:
            self._note()
        except OSError:
            self._changes = former
            raise
        if clocks:
            self._set_clocks()
        failures: list[_Failure] = []
        for change, setting in planned:
            done = self._apply(change, setting, failures)
            at = self._changes.index(change)
            self._changes[at : at + 1] = [done] if done is not None else []
        self._failed += _tell(self._root, failures, "")
        # From now on a value that somebody else sets can be told from ours; until then, all is put back.
        with contextlib.suppress(OSError):
            self._note()

    def _to_do(self) -> bool:
        return bool(self._planned()) or self._wants_clocks()

    def _wants_clocks(self) -> bool:
        return has_clocks(self._root) and not self._clocks

    def _planned(self) -> list[tuple[_Change, Setting]]:
        return [
            (change, setting)
            for setting in settings(self._root)
            if (change := self._plan(setting)) is not None
        ]

    def _plan(self, setting: Setting) -> _Change | None:
        """What is to be changed for it; None when there is nothing to do."""
        now = _read(self._root / setting.path)
        if now is None or now == self._wanted(setting):
            return None
        for change in self._changes:
            if change.path == setting.path and change.now in ("", now):
                # Ours, and all that the driver would take; or a crash came in between.
                return None if change.now else change
        # Where somebody changed it after us, theirs is what is put back.
        return _Change(setting.kind, setting.part, setting.path, before=now, like=setting.like)

    def _wanted(self, setting: Setting) -> str:
        return (_read(self._root / setting.like) or "") if setting.like else setting.wanted

    def _apply(self, change: _Change, setting: Setting, failures: list[_Failure]) -> _Change | None:
        """The change as it came out; None when there is none."""
        # Looked up only now: what was set before may have moved it, and jetson_clocks may have set it.
        wanted = self._wanted(setting)
        path = self._root / change.path
        if _read(path) == wanted:
            return replace(change, now=wanted)
        try:
            _write(self._root, path, wanted)
            why = ""
        except OSError as error:
            why = _why(error)
        now = _read(path)
        if now is not None and now != change.before:
            return replace(change, now=now)
        failures.append(_Failure(change, wanted, why or "the driver did not take it"))
        return None

    def _set_clocks(self) -> None:
        program = str(self._root / _CLOCKS)
        advice = "sudo jetson_clocks --fan"
        try:
            # It asks before it overwrites, and nobody would answer.
            self._stored_clocks.unlink(missing_ok=True)
            self._run((program, "--store", str(self._stored_clocks)), self._home())
            if not self._stored_clocks.exists():
                raise CommandFailed("it stored nothing")
            _sync(self._stored_clocks)
            self._clocks = True
            self._note()
        except (CommandFailed, OSError) as error:
            self._clocks = False
            self._failed.append(f"jetson_clocks: {error}: {advice}")
            return
        try:
            self._run((program, "--fan"), self._home())
        except CommandFailed as error:
            # It may have got half-way, so it is put back all the same.
            self._failed.append(f"jetson_clocks: {error}: {advice}")

    def _home(self) -> Mapping[str, str]:
        # It notes there whether the fan's service ran; a person's own note must not be overwritten.
        return {"HOME": str(self._folder.absolute())}

    # --- putting back

    def _put_back(self) -> None:
        kept: list[_Change] = []
        failures: list[_Failure] = []
        for change in reversed(self._changes):
            try:
                self._write_back(change)
            except OSError as error:
                kept.append(change)
                failures.append(_Failure(change, change.before, _why(error)))
        self._changes = kept[::-1]
        self._failed += _tell(self._root, failures[::-1], "not put back, ")
        if self._clocks:
            arguments = ("--restore", str(self._stored_clocks))
            try:
                self._run((str(self._root / _CLOCKS), *arguments), self._home())
                self._clocks = False
            except CommandFailed as error:
                self._failed.append(
                    f"jetson_clocks: not put back, {error}: sudo jetson_clocks {shlex.join(arguments)}"
                )
        if self._lock is not None and (kept or self._clocks):
            with contextlib.suppress(OSError):
                self._note()
        self._forget_if_done()

    def _write_back(self, change: _Change) -> None:
        """Raises OSError when it can't be written."""
        path = self._root / change.path
        now = _read(path)
        if now == change.before:
            return
        if now is None:
            # A processor that went offline, a stick that was pulled out.
            self._failed.append(f"{_what(change)}: not put back, it is no longer there")
        elif change.now and now != change.now and not self._follows(change, now):
            self._failed.append(
                f"{_what(change)}: left at {_shown(change.kind, now)}, which somebody else has set since "
                f"(it was {_shown(change.kind, change.before)})"
            )
        else:
            _write(self._root, path, change.before)

    def _follows(self, change: _Change, now: str) -> bool:
        """Whether the value only followed the bound that it was set to: heat lowers both frequencies."""
        return bool(change.like) and now == _read(self._root / change.like)

    # --- telling

    def _told(self, *, back: bool = False) -> list[str]:
        told: list[str] = []
        if self._clocks:
            ends = ["as it was", "the highest clocks of the power mode, the fan at full speed"]
            told.append("jetson_clocks: " + " → ".join(ends[::-1] if back else ends))
        groups: dict[str, list[str]] = {}
        for change in self._changes:
            before = _shown(change.kind, change.before)
            now = _shown(change.kind, change.now) if change.now else "?"
            first, last = (now, before) if back else (before, now)
            groups.setdefault(f"{_KINDS[change.kind].label}: {first} → {last}", []).append(change.part)
        return told + [f"{_parts(parts)} {line}".lstrip() for line, parts in groups.items()]


class TimedHold:
    """One holder of a board whose time runs out. Used from one event loop; a cancelled call is still done."""

    def __init__(self, tuner: Tuner, owner: str, busy: Callable[[], bool] = lambda: False) -> None:
        """``owner`` is its name among the holders. While ``busy``, the time does not run out."""
        self._busy = busy
        self._tuner = tuner
        self._owner = owner
        self._turn = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._until: float | None = None
        self._tasks: set[asyncio.Task[list[str]]] = set()

    @property
    def until(self) -> float | None:
        """When it ends, in seconds since 1970; None when it does not hold."""
        return self._until

    async def hold(self, seconds: float) -> list[str]:
        """Holds from now on for so long, whatever was asked for before; what could not be set."""
        return await self._to_its_end(self._hold(seconds))

    async def let_go(self) -> list[str]:
        """Ends it now; what could not be put back."""
        return await self._to_its_end(self._let_go(self._tuner.release, self._owner))

    async def close(self) -> list[str]:
        """Puts the board back, whoever holds it; what could not be put back."""
        return await self._to_its_end(self._let_go(self._tuner.restore))

    async def _hold(self, seconds: float) -> list[str]:
        async with self._turn:
            self._stop_timer()
            await asyncio.to_thread(self._tuner.acquire, self._owner)
            failed = self._tuner.failed
            self._until = time.time() + seconds
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)
            return failed

    async def _let_go(self, how: Callable[..., list[str]], *arguments: str) -> list[str]:
        async with self._turn:
            self._stop_timer()
            failed = await asyncio.to_thread(how, *arguments)
            for line in failed:
                _log.warning("%s", line)
            return failed

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._until = None

    def _expire(self) -> None:
        if self._busy():
            # What is being measured now is not to be measured under two settings.
            self._timer = asyncio.get_running_loop().call_later(_BUSY_SECONDS, self._expire)
            return
        self._start(self._let_go(self._tuner.release, self._owner))

    def _start(self, work: Coroutine[Any, Any, list[str]]) -> asyncio.Task[list[str]]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _to_its_end(self, work: Coroutine[Any, Any, list[str]]) -> list[str]:
        return await asyncio.shield(self._start(work))


def _turbo(root: Path) -> Iterator[Setting]:
    if (root / _CPU / "intel_pstate/no_turbo").exists():
        yield Setting("no_turbo", "", f"{_CPU}/intel_pstate/no_turbo", "1")
        return
    if (root / _CPU / "cpufreq/boost").exists():
        # It is the one of all policies; theirs follow.
        yield Setting("boost", "", f"{_CPU}/cpufreq/boost", "0")
        return
    for policy in policies(root):
        if (root / policy.path / "boost").exists():
            yield Setting("boost", policy.name, f"{policy.path}/boost", "0")


def _frequencies(root: Path) -> Iterator[Setting]:
    """The order matters: under the governor performance drivers move the preference and refuse another one
    (intel_pstate, amd-pstate), and some take the bounds anew from the governor.
    """
    found = [policy for policy in policies(root) if not _held(policy)]
    for policy in found:
        path = f"{policy.path}/energy_performance_preference"
        if "performance" in (_read(root / f"{policy.path}/energy_performance_available_preferences") or ""):
            yield Setting("preference", policy.name, path, "performance")
    for policy in found:
        if not policy.governors or "performance" in policy.governors:
            yield Setting("governor", policy.name, f"{policy.path}/scaling_governor", "performance")
    for policy in found:
        if policy.least_hertz is not None:
            path = f"{policy.path}/scaling_min_freq"
            yield Setting("least", policy.name, path, like=f"{policy.path}/scaling_max_freq")


def _held(policy: Policy) -> bool:
    """Whether somebody holds the frequency on purpose; it may well be a lower one."""
    return policy.governor == "userspace"


def _autosuspend(root: Path) -> Iterator[Setting]:
    with contextlib.suppress(OSError):
        for path in sorted((root / _USB).iterdir()):
            ids = (_read(path / "idVendor") or "", _read(path / "idProduct") or "")
            if ids in USB_ACCELERATORS and (path / "power/control").exists():
                yield Setting("autosuspend", path.name, f"{_USB}/{path.name}/power/control", "on")


def _boot_id(root: Path) -> str:
    return _read(root / "proc/sys/kernel/random/boot_id") or ""


def _read(path: Path) -> str | None:
    try:
        return sysfs.content(path).decode("utf-8", "replace").strip()
    except OSError:
        return None


def _write(root: Path, path: Path, value: str) -> None:
    """Raises OSError, also when a link leads out of the root."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise OSError(errno.EXDEV, "it leads out of the board's root", str(path))
    # Never made: a setting that is not there must not become a file.
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        folder.write_all(descriptor, f"{value}\n".encode())
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    folder.sync(path.parent)


def _why(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"not allowed for the agent's user (uid {os.geteuid()})"
    if error.errno == errno.EROFS:
        return "read-only for the agent (a container, or its unit's ProtectKernelTunables)"
    return error.strerror or str(error)


def _tell(root: Path, failures: Iterable[_Failure], how: str) -> list[str]:
    """The failures as lines, with the command that does it; alike ones together."""
    groups: dict[tuple[str, str, str], list[_Change]] = {}
    for failure in failures:
        groups.setdefault((failure.change.kind, failure.value, failure.why), []).append(failure.change)
    return [
        f"{_parts([change.part for change in changes])} {_KINDS[kind].label}: ".lstrip()
        + f"{how}{why}: {command(root, [change.path for change in changes], value)}"
        for (kind, value, why), changes in groups.items()
    ]


def _globbed(root: Path, paths: Sequence[str]) -> str:
    """The files for a shell: as a pattern when it stands for these and no others."""
    patterns = {re.sub(r"(policy|/cpu)\d+", r"\1[0-9]*", path) for path in paths}
    if len(paths) > 1 and len(patterns) == 1:
        pattern = patterns.pop()
        if {path.relative_to(root).as_posix() for path in root.glob(pattern)} == set(paths):
            return "/" + pattern
    return " ".join(shlex.quote("/" + path) for path in paths)


def _what(change: _Change) -> str:
    return f"{change.part} {_KINDS[change.kind].label}".lstrip()


def _shown(kind: str, value: str) -> str:
    if kind == "least" and value.isdigit():
        return f"{int(value) / 1000:g} MHz"
    return _KINDS[kind].words.get(value, value)


def _parts(names: Sequence[str]) -> str:
    """Several parts in few characters: "cpu0-3" and "cpu4" are "cpu0-4"."""
    if not all(name.startswith("cpu") for name in names):
        return ", ".join(name for name in names if name)
    numbers: list[int] = []
    for piece in ",".join(name[3:] for name in names).split(","):
        first, _, last = piece.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return processor_names(numbers)
