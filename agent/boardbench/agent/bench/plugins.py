"""Engines of others: offered by installed distributions of this interpreter, by an entry point.

An entry point of the group ``boardbench.runtimes`` names a declaration, an :class:`Engine`. Which there are
is read from the metadata of the distributions, which imports nothing of them; a declaration is imported when
its engine is asked for. Nothing that is wrong with one says anything about another.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Dict, List, Optional, Set, Tuple, cast

from boardbench.agent.bench import runtimes
from boardbench.agent.bench.runtime import SETTINGS, Runtime, RuntimeUnavailable
from boardbench.agent.bench.runtimes import CONTRACT, Engine
from boardbench.inspect import sniff

GROUP = "boardbench.runtimes"

MAGIC_BYTES = 64
"""As much of a file as is looked at for a magic."""

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_FORMAT = re.compile(r"[a-z][a-z0-9_]{0,31}")
_SUFFIX = re.compile(r"\.[a-z0-9][a-z0-9_-]{0,15}")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_LONGEST_TEXT = 500
# A directory of distributions can hold anything, and what it holds is shown.
_LONGEST_NAME = 64


@dataclass(frozen=True)
class Offer:
    """An engine that a distribution offers, known from its metadata alone."""

    name: str
    """What it is called here: its own name, or DISTRIBUTION:NAME where that can't be had."""
    distribution: str
    """Name and version of the distribution ("boardbench-hailo 1.2")."""
    point: metadata.EntryPoint
    problem: str = ""
    """Why it can't be used, as far as metadata tell; empty otherwise."""


def offers() -> Tuple[Offer, ...]:
    """Every engine that the distributions of this interpreter offer, by name. Imports none of them."""
    found: Dict[str, List[Offer]] = {}
    for distribution, points in _distributions():
        for point in points:
            offer = _offer(distribution, point)
            found.setdefault(offer.name, []).append(offer)
    return tuple(_alone(found[name]) for name in sorted(found))


def _distributions() -> List[Tuple[str, List[metadata.EntryPoint]]]:
    found = []
    seen: Set[str] = set()
    for distribution in metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if point.group == GROUP]
            if not points:
                continue
            name, version = str(distribution.metadata["Name"]), str(distribution.version)
        except Exception:
            # An installation that can't be read offers nothing.
            continue
        # The first on the path is the one that is imported.
        if _normal(name) not in seen:
            seen.add(_normal(name))
            found.append((f"{_shown(name)} {_shown(version)}", points))
    return found


def _offer(distribution: str, point: metadata.EntryPoint) -> Offer:
    name = str(point.name)
    elsewhere = f"{distribution.split(' ')[0]}:{_shown(name)}"
    if not _NAME.fullmatch(name):
        problem = (
            f"the name of a runtime is lower-case letters, digits, - and _, 32 at most, and {distribution} "
            f"offers {_shown(name)!r}: {_maker(distribution)}"
        )
        return Offer(elsewhere, distribution, point, problem)
    if any(name == engine.name for engine in runtimes.ENGINES):
        problem = (
            f"{distribution} offers a runtime called {name}, which boardbench has itself, and which stays as "
            f"it is: {_maker(distribution)}"
        )
        return Offer(elsewhere, distribution, point, problem)
    return Offer(name, distribution, point)


def _alone(same: List[Offer]) -> Offer:
    """The one offer of a name; a problem where there are several, since none is better than another."""
    if len(same) == 1:
        return same[0]
    several = " and ".join(offer.distribution for offer in same)[: 4 * _LONGEST_NAME]
    first = same[0]
    problem = (
        f"{several} offer a runtime called {first.point.name}, in {sys.executable}: keep one of them "
        f"({sys.executable} -m pip uninstall {first.distribution.split(' ')[0]})"
    )
    return Offer(first.name, several, first.point, problem)


@functools.lru_cache(maxsize=None)
def find(name: str) -> Optional[Offer]:
    """The offer of that name; None without one."""
    return next((offer for offer in offers() if offer.name == name), None)


@functools.lru_cache(maxsize=None)
def declaration(offer: Offer) -> Engine:
    """What the distribution declares, imported and looked at. Raises RuntimeUnavailable."""
    if offer.problem:
        raise RuntimeUnavailable(offer.problem)
    try:
        found = offer.point.load()
    except (Exception, SystemExit) as error:
        raise RuntimeUnavailable(
            f"{offer.distribution} can't be imported in {sys.executable} ({_told(error)}): install what it "
            f"needs, another version of it, or remove it with {_uninstall(offer)}"
        ) from error
    problem = _problem(found, offer)
    if problem:
        raise RuntimeUnavailable(
            f"{offer.distribution} declares its runtime {offer.name} wrongly: {problem}: "
            f"{_maker(offer.distribution)}"
        )
    return cast(Engine, found)


def create(offer: Offer) -> Runtime:
    """The engine itself; nothing heavy is imported yet. Raises RuntimeUnavailable, saying whose fault."""
    engine = declaration(offer)
    try:
        made = getattr(importlib.import_module(engine.module), engine.type)()
        told = (str(made.name), tuple(made.formats))
        strange = _strange(made)
    except RuntimeUnavailable:
        raise
    except (Exception, SystemExit) as error:
        raise RuntimeUnavailable(
            f"{engine.module}.{engine.type} of {offer.distribution} can't be made ({_told(error)}): "
            f"{_maker(offer.distribution)}"
        ) from error
    if told != (engine.name, engine.formats):
        raise RuntimeUnavailable(
            f"{engine.type} of {offer.distribution} says that it is {told[0]!r} for {', '.join(told[1])}, "
            f"and is declared as {engine.name!r} for {', '.join(engine.formats)}: "
            f"{_maker(offer.distribution)}"
        )
    if strange:
        raise RuntimeUnavailable(
            f"{engine.type} of {offer.distribution}: {strange}: {_maker(offer.distribution)}"
        )
    return cast(Runtime, made)


def _strange(made: Any) -> str:
    """What is wrong with what an engine says of itself; empty when nothing is."""
    made.sys_root  # noqa: B018 - it has to be there
    unknown = [each for each in made.settings if each not in SETTINGS]
    if unknown:
        return f"settings are {', '.join(SETTINGS)}, and it has {unknown!r}"
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in made.options.items()):
        return f"options is {made.options!r} and no text by name"
    return ""


def asked(offer: Offer, runtime: Runtime) -> Tuple[str, Tuple[str, ...]]:
    """Version and devices, as the engine says. Raises RuntimeUnavailable, whatever it raises."""
    try:
        version, devices = runtime.version(), tuple(runtime.devices())
    except RuntimeUnavailable:
        raise
    except (Exception, SystemExit) as error:
        raise RuntimeUnavailable(
            f"{offer.name} of {offer.distribution} fails when it is asked what it can do ({_told(error)}): "
            f"{_maker(offer.distribution)}"
        ) from error
    if not isinstance(version, str) or not devices or not all(isinstance(each, str) for each in devices):
        raise RuntimeUnavailable(
            f"{offer.name} of {offer.distribution} answers with the version {version!r} and the devices "
            f"{devices!r}, which are no text: {_maker(offer.distribution)}"
        )
    return version, devices


def with_distribution(version: str, offer: Offer) -> str:
    """The engine's own version, and behind it the distribution that brought it, where that is another."""
    return version if version == offer.distribution else f"{version} ({offer.distribution})"


def _problem(found: Any, offer: Offer) -> str:
    """What is wrong with a declaration; empty when nothing is."""
    if not isinstance(found, Engine):
        return f"{offer.point.value} is a {type(found).__name__} and no {Engine.__module__}.Engine"
    if found.contract != CONTRACT:
        return (
            f"it is made for contract {found.contract!r} and this boardbench has contract {CONTRACT}; "
            "another version of one of the two is needed"
        )
    if found.name != offer.point.name:
        return f"it is called {found.name!r} and its entry point {offer.point.name!r}"
    for field in ("module", "type"):
        if not _is_dotted(getattr(found, field)):
            return f"{field} is {getattr(found, field)!r} and no dotted name"
    if found.profiler and not _is_dotted(found.profiler):
        return f"profiler is {found.profiler!r} and no dotted name of a module"
    if not isinstance(found.more_devices, str) or len(found.more_devices) > _LONGEST_TEXT:
        return f"more_devices is no text of at most {_LONGEST_TEXT} characters"
    if found.environment:
        return "environment is for boardbench's own tests"
    return _problem_of_formats(found)


def _problem_of_formats(found: Engine) -> str:
    formats = found.formats
    if not isinstance(formats, tuple) or not formats:
        return f"formats is {formats!r} and no tuple with a format"
    for each in formats:
        if not isinstance(each, str) or not _FORMAT.fullmatch(each) or each == "npz":
            return f"{each!r} is no name of a format (lower-case letters, digits and _; npz is for inputs)"
    ours = known_formats()
    for each in formats[1:]:
        if each not in ours:
            return f"only the first format can be its own, and {each} is none of {', '.join(sorted(ours))}"
    magic, suffixes = found.magic, found.suffixes
    if not isinstance(magic, bytes) or len(magic) > MAGIC_BYTES:
        return f"magic is {magic!r}; it is at most {MAGIC_BYTES} bytes"
    if not isinstance(suffixes, tuple) or not all(
        isinstance(each, str) and _SUFFIX.fullmatch(each) for each in suffixes
    ):
        return f"suffixes is {suffixes!r}; it is a tuple of endings as in ('.hef',)"
    if formats[0] in ours:
        if magic or suffixes:
            return f"magic and suffixes are for a format of its own, and {formats[0]} is boardbench's"
    elif not magic and not suffixes:
        return f"nobody can tell a file of its format {formats[0]}: give a magic, or suffixes"
    return ""


def known_formats() -> Set[str]:
    """Formats that boardbench knows by itself."""
    return {*sniff.FORMATS, *(each for engine in runtimes.ENGINES for each in engine.formats)} - {"npz"}


def _is_dotted(value: object) -> bool:
    return isinstance(value, str) and _DOTTED.fullmatch(value) is not None


def _told(error: BaseException) -> str:
    """An exception in a few words, whatever its own text is."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}"[:_LONGEST_TEXT] if text else type(error).__name__


def _maker(distribution: str) -> str:
    return f"tell the maker of {distribution}"


def _uninstall(offer: Offer) -> str:
    return f"{sys.executable} -m pip uninstall {offer.distribution.split(' ')[0]}"


def _normal(name: str) -> str:
    """As PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _shown(text: str) -> str:
    """Text from somebody's metadata, printable and short."""
    return "".join(each if each.isprintable() and each != " " else "?" for each in text[:_LONGEST_NAME])
