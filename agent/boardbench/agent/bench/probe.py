"""What engines are there, found by importing each for real."""

from __future__ import annotations

import platform
import sys
from typing import Optional, Tuple

from boardbench.agent.bench import runtimes
from boardbench.agent.bench.runtime import RuntimeUnavailable
from boardbench.agent.domain import Interpreter, RuntimeStatus


def interpreter() -> Interpreter:
    """The Python that runs this."""
    return Interpreter(
        path=sys.executable, version=f"{platform.python_implementation()} {platform.python_version()}"
    )


def probe(name: Optional[str] = None) -> Tuple[RuntimeStatus, ...]:
    """The state of every engine, or of the one called ``name``. Raises RuntimeUnavailable for no such name.

    An engine that crashes when it is imported takes the process with it: the caller then asks one by one.
    """
    names = [engine.name for engine in runtimes.offered()] if name is None else [name]
    return tuple(_status(name) for name in names)


def _status(name: str) -> RuntimeStatus:
    runtime = runtimes.create(name)
    try:
        version, devices, reason = runtime.version(), runtime.devices(), ""
    except RuntimeUnavailable as error:
        version, devices, reason = "", (), str(error)
    return RuntimeStatus(
        name=runtime.name,
        available=not reason,
        version=version,
        reason=reason,
        formats=runtime.formats,
        devices=devices,
        interpreter=interpreter(),
    )
