"""Engine options: text from the caller, checked against what the engine takes."""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional, Sequence

from boardbench.agent.bench.runtime import OptionRejected

NATIVE_MODELS = "BOARDBENCH_NATIVE_MODELS"
"""Variable of the agent that, at 1, lets models run that are programs with the rights of the agent."""


class OptionReader:
    """Takes the options of one engine one by one; :meth:`finish` refuses whatever was not taken."""

    def __init__(self, engine: str, options: Mapping[str, str]) -> None:
        """Reads ``options`` for ``engine``, whose name goes into the messages."""
        self._engine = engine
        self._given = dict(options)
        self._left = dict(options)
        self._known: List[str] = []
        self._in_force: Dict[str, str] = {}

    def choice(self, name: str, choices: Sequence[str], *, default: str) -> str:
        """The value of ``name``, one of ``choices``."""
        self._known.append(f"{name}={'|'.join(choices)}")
        value = self._left.pop(name, default)
        if value not in choices:
            raise OptionRejected(
                f"option {name} of {self._engine} is {' or '.join(choices)} (default {default}), "
                f"not {value!r}"
            )
        self._in_force[name] = value
        return value

    def switch(self, name: str, *, default: bool) -> bool:
        """The value of ``name``, on or off."""
        return self.choice(name, ("on", "off"), default="on" if default else "off") == "on"

    def number(self, name: str, *, least: int, most: int) -> Optional[int]:
        """The value of ``name``, a whole number; None when it is not given."""
        self._known.append(f"{name}={least}..{most}")
        text = self._left.pop(name, None)
        if text is None:
            return None
        # isdecimal alone also takes digits of other scripts, and int a sign or underscores.
        if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
            raise OptionRejected(
                f"option {name} of {self._engine} is a number from {least} to {most}, not {text!r}"
            )
        self._in_force[name] = text
        return int(text)

    def text(self, name: str, meaning: str) -> Optional[str]:
        """The value of ``name``, any text but the empty one; None when it is not given."""
        self._known.append(f"{name}={meaning}")
        value = self._left.pop(name, None)
        if value is None:
            return None
        if not value or "\0" in value:
            raise OptionRejected(f"option {name} of {self._engine} is {meaning}, not {value!r}")
        self._in_force[name] = value
        return value

    def prefixed(self, prefix: str, meaning: str) -> Dict[str, str]:
        """All options whose name begins with ``prefix``, without it: those are passed on as they are."""
        self._known.append(f"{prefix}KEY={meaning}")
        found = {name[len(prefix) :]: value for name, value in self._left.items() if name.startswith(prefix)}
        for key, value in found.items():
            if not key or "\0" in key + value:
                raise OptionRejected(
                    f"option {prefix}{key} of {self._engine}: {meaning} has a key and no NUL"
                )
            self._in_force[prefix + key] = self._left.pop(prefix + key)
        return found

    def refuse_both(self, name: str, setting: str, given: object) -> None:
        """Raises OptionRejected when the option ``name`` is given beside the setting that means the same."""
        if given and name in self._given:
            raise OptionRejected(
                f"the option {name}={self._given[name]} of {self._engine} says what the setting {setting} "
                f"({given}) says: give only the setting"
            )

    def finish(self) -> Dict[str, str]:
        """Every option in force, defaults included. Raises OptionRejected for what nobody took."""
        if self._left:
            unknown = ", ".join(sorted(self._left))
            raise OptionRejected(
                f"{self._engine} has no option {unknown}; it takes {', '.join(sorted(self._known)) or 'none'}"
            )
        return dict(self._in_force)
