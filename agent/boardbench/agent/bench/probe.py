"""What engines are there, found by importing each for real."""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence, Tuple

from boardbench.agent.bench import runtimes
from boardbench.agent.bench.runtime import RuntimeUnavailable
from boardbench.agent.domain import FormatMark, Interpreter, PluginOffer, Probed, RuntimeStatus

if TYPE_CHECKING:
    # Reading metadata takes a library that a run needs nothing of.
    from boardbench.agent.bench.plugins import Offer
    from boardbench.agent.bench.runtime import Runtime
    from boardbench.agent.bench.runtimes import Engine


# What this process does itself, whatever the engine.
_OF_THE_WORKER = ("cpu_affinity",) if hasattr(os, "sched_setaffinity") else ()


def interpreter() -> Interpreter:
    """The Python that runs this."""
    return Interpreter(
        path=sys.executable, version=f"{platform.python_implementation()} {platform.python_version()}"
    )


def probe(names: Optional[Sequence[str]] = None) -> Probed:
    """The state of the engines called that; of all that boardbench has itself, when none are named.

    What distributions offer here is listed besides, from their metadata. Raises RuntimeUnavailable for a name
    that is neither.

    An engine that crashes when it is imported takes the process with it: the caller then asks one by one.
    """
    from boardbench.agent.bench import plugins

    offers = {offer.name: offer for offer in plugins.offers()}
    own = [engine.name for engine in runtimes.offered()]
    statuses: List[RuntimeStatus] = []
    marks: List[FormatMark] = []
    more_devices: Dict[str, str] = {}
    for name in own if names is None else names:
        if name in own or name not in offers:
            statuses.append(_status(name))
            continue
        offer = offers[name]
        status, engine = _status_of_plugin(offer)
        statuses.append(status)
        if engine is not None:
            marks.extend(_marks(engine, offer))
            if engine.more_devices:
                more_devices[name] = engine.more_devices
    return Probed(
        tuple(statuses),
        tuple(PluginOffer(offer.name, offer.distribution) for offer in offers.values()),
        tuple(marks),
        more_devices,
    )


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
        settings=(*runtime.settings, *_OF_THE_WORKER),
        options=runtime.options,
    )


def _status_of_plugin(offer: Offer) -> Tuple[RuntimeStatus, Optional[Engine]]:
    """The state of an engine from elsewhere, and its declaration where that is a good one."""
    from boardbench.agent.bench import plugins

    engine: Optional[Engine] = None
    runtime: Optional[Runtime] = None
    version, devices, reason = "", (), ""  # type: Tuple[str, Tuple[str, ...], str]
    try:
        engine = plugins.declaration(offer)
        runtime = plugins.create(offer)
        version, devices = plugins.asked(offer, runtime)
        version = plugins.with_distribution(version, offer)
    except RuntimeUnavailable as error:
        reason = str(error)
        if offer.distribution not in reason:
            reason = f"{offer.distribution}: {reason}"
    status = RuntimeStatus(
        name=offer.name,
        available=not reason,
        version=version,
        reason=reason,
        formats=engine.formats if engine is not None else (),
        devices=devices,
        interpreter=interpreter(),
        settings=(*runtime.settings, *_OF_THE_WORKER) if runtime is not None else (),
        options=runtime.options if runtime is not None else {},
        plugin=offer.distribution,
    )
    return status, engine


def _marks(engine: Engine, offer: Offer) -> Tuple[FormatMark, ...]:
    if not engine.magic and not engine.suffixes:
        return ()
    mark = FormatMark(
        format=engine.formats[0],
        runtime=offer.name,
        plugin=offer.distribution,
        magic=engine.magic.hex(),
        suffixes=engine.suffixes,
    )
    return (mark,)
