"""Sets the power mode of a Jetson for the time of a run, and puts the former one back.

``nvpmodel -m ID`` sets one of the modes in ``/etc/nvpmodel.conf``, and notes it in
``/var/lib/nvpmodel/status``, from where it is set again at the next boot: so what a killed process left is
put back after a boot, too. Some modes want a reboot; then nvpmodel asks, and with nobody to answer leaves all
as it was, which its status tells.

    power/lock            held while another mode is set
    power/journal.json    the mode that was there before

Source: NVIDIA's Jetson Linux Developer Guide, "Power Mode Controls".
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from boardbench.agent import folder
from boardbench.agent.board import sysfs
from boardbench.agent.board.tune import CommandFailed, Run, run_command
from boardbench.agent.errors import AgentError, NotRunnable

if TYPE_CHECKING:
    from boardbench.agent.board.sensors.power_mode import PowerMode

_PROGRAM = "usr/sbin/nvpmodel"


class NoPowerMode(NotRunnable):
    """The power mode can't be had; the message says why, and which can."""


class PowerModes:
    """The power modes of one board. Every call blocks; any thread may make it."""

    def __init__(self, root: Path, data_dir: Path, run: Run = run_command) -> None:
        """``root`` holds ``etc``, ``usr`` and ``var``; in ``data_dir`` nothing is made before one is set."""
        self._root = root
        self._folder = data_dir / "power"
        self._journal = self._folder / "journal.json"
        self._run = run
        self._guard = threading.Lock()
        self._lock: int | None = None
        self._before: int | None = None

    def index_of(self, name: str) -> int:
        """The number of a mode, by its name or, where two have one, its number. Raises NoPowerMode."""
        known = _modes(self._root)
        if not known or not sysfs.exists(self._root / _PROGRAM):
            raise NoPowerMode(
                f"power_mode is {name!r}, and this board has no modes that boardbench can set (it knows "
                "those of NVIDIA's nvpmodel): leave it out"
            )
        same = [index for index, each in known.items() if each == name] or [
            index for index, each in known.items() if each.lower() == name.lower() or str(index) == name
        ]
        if len(same) == 1:
            return same[0]
        listed = ", ".join(f"{each} ({index})" for index, each in sorted(known.items()))
        raise NoPowerMode(
            f"power_mode is {name!r}, which is {'several' if same else 'none'} of this board's: {listed}"
        )

    def set(self, name: str) -> str:
        """Sets the mode; what that changed, as "power mode: 15W → MAXN", empty when it was set.

        Raises NoPowerMode, and all is as it was.
        """
        with self._guard:
            wanted = self.index_of(name)
            try:
                self._claim()
                if self._before is not None and (failed := self._put_back(keep_lock=True)):
                    raise NoPowerMode("; ".join(failed))
                now = self._now()
                if now is None:
                    raise NoPowerMode(
                        f"power_mode is {name!r}, and nvpmodel does not tell which is set now, which is to "
                        "be put back: set one first (sudo nvpmodel -m ID)"
                    )
                if now == wanted:
                    self._forget()
                    return ""
                folder.replace(self._journal, json.dumps({"root": self._about(), "before": now}).encode())
                self._before = now
                try:
                    self._change(wanted)
                except CommandFailed as error:
                    self._put_back()
                    raise NoPowerMode(
                        f"nvpmodel does not set {name} ({wanted}): {error}: sudo nvpmodel -m {wanted}"
                    ) from error
            except AgentError:
                self._let_lock_go()
                raise
            except CommandFailed as error:
                self._let_lock_go()
                raise NoPowerMode(f"power_mode is {name!r}, and {error}") from error
            except OSError as error:
                self._let_lock_go()
                raise NoPowerMode(
                    f"power_mode is {name!r}, and the mode of before can't be noted first: {error}"
                ) from error
            known = _modes(self._root)
            return f"power mode: {known.get(now, now)} → {known.get(wanted, wanted)}"

    def put_back(self) -> list[str]:
        """Puts the former mode back; what could not be, with the command that does it."""
        with self._guard:
            return self._put_back()

    def recover(self) -> list[str]:
        """Puts back what a killed process left; what that was, or why it could not be."""
        with self._guard:
            if self._lock is not None or not self._journal.exists():
                return []
            try:
                self._claim()
            except (OSError, AgentError) as error:
                return [f"{self._journal}: the power mode in it is not put back: {error}"]
            before = self._before
            failed = self._put_back()
            return failed or ([] if before is None else [f"power mode: back to {before}"])

    def _claim(self) -> None:
        """Takes the folder, and over what a killed process left there. Raises OSError, AgentError."""
        if self._lock is not None:
            return
        self._lock = folder.claim(self._folder)
        try:
            noted = json.loads(self._journal.read_bytes())
            if noted["root"] == self._about():
                self._before = int(noted["before"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            self._journal.replace(self._journal.with_suffix(".broken"))

    def _put_back(self, *, keep_lock: bool = False) -> list[str]:
        failed = []
        before = self._before
        if before is not None:
            try:
                if self._now() != before:
                    self._change(before)
                self._before = None
                self._journal.unlink(missing_ok=True)
            except (CommandFailed, OSError) as error:
                failed.append(f"power mode: not put back, {error}: sudo nvpmodel -m {before}")
        if not keep_lock:
            self._let_lock_go()
        return failed

    def _change(self, index: int) -> None:
        """Raises CommandFailed, also when the mode is another one afterwards."""
        self._run((str(self._root / _PROGRAM), "-m", str(index)), {})
        if self._now() != index:
            raise CommandFailed("it did not take the mode, which may want a reboot")

    def _now(self) -> int | None:
        try:
            mode = _power_mode(self._root)
        except OSError as error:
            raise CommandFailed(f"its status can't be read: {error}") from error
        return None if mode is None else mode.index

    def _about(self) -> str:
        return str(self._root.absolute())

    def _forget(self) -> None:
        self._before = None
        self._let_lock_go()

    def _let_lock_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


# An agent that waits has no sensors in memory, and few boards have modes.


def _modes(root: Path) -> dict[int, str]:
    from boardbench.agent.board.sensors.power_mode import modes

    return modes(root)


def _power_mode(root: Path) -> PowerMode | None:
    from boardbench.agent.board.sensors.power_mode import power_mode

    return power_mode(root)
