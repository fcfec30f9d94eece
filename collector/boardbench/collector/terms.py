"""Which boards are meant: terms like ``board=pi5``, ``lab!=zurich`` and ``runtime=onnx*``.

Capitals don't matter. ``*`` in the value stands for anything. A board's model is meant by its short name
(:data:`BOARDS`), by words of it that stand together, or by a pattern for the whole of it.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from boardbench.collector.errors import InvalidRequest
from boardbench.v1 import collector_pb2

BOARDS: tuple[tuple[str, str, str], ...] = (
    ("pi", "any Raspberry Pi", r"raspberry pi"),
    ("pi2", "Raspberry Pi 2", r"raspberry pi 2\b"),
    ("pi3", "Raspberry Pi 3, Compute Module 3", r"raspberry pi (3\b|compute module 3)"),
    ("pi4", "Raspberry Pi 4, 400, Compute Module 4", r"raspberry pi (4\b|400\b|compute module 4)"),
    ("pi400", "Raspberry Pi 400", r"raspberry pi 400\b"),
    ("pi5", "Raspberry Pi 5, 500, Compute Module 5", r"raspberry pi (5\b|500\b|compute module 5)"),
    ("pi500", "Raspberry Pi 500", r"raspberry pi 500\b"),
    ("cm3", "Raspberry Pi Compute Module 3", r"raspberry pi compute module 3"),
    ("cm4", "Raspberry Pi Compute Module 4", r"raspberry pi compute module 4"),
    ("cm5", "Raspberry Pi Compute Module 5", r"raspberry pi compute module 5"),
    ("zero", "Raspberry Pi Zero, Zero W", r"raspberry pi zero\b(?! 2)"),
    ("zero2", "Raspberry Pi Zero 2 W", r"raspberry pi zero 2"),
    ("jetson", "any NVIDIA Jetson", r"jetson"),
    ("nano", "NVIDIA Jetson Nano", r"jetson nano"),
    ("tx2", "NVIDIA Jetson TX2", r"jetson[ -]tx2"),
    ("xavier", "NVIDIA Jetson AGX Xavier", r"jetson[ -](agx[ -])?xavier(?! nx)"),
    ("xavier-nx", "NVIDIA Jetson Xavier NX", r"jetson[ -]xavier[ -]nx"),
    ("orin-nano", "NVIDIA Jetson Orin Nano", r"jetson orin nano"),
    ("orin-nx", "NVIDIA Jetson Orin NX", r"jetson orin nx"),
    ("agx-orin", "NVIDIA Jetson AGX Orin", r"jetson agx orin"),
    ("thor", "NVIDIA Jetson AGX Thor", r"jetson (agx )?thor"),
    ("coral", "Coral Dev Board", r"(coral|phanbell|freescale i\.mx8mq)"),
    ("coral-mini", "Coral Dev Board Mini", r"coral dev board mini"),
    ("imx8mp", "NXP i.MX 8M Plus", r"i\.mx ?8m ?plus"),
    ("imx93", "NXP i.MX 93", r"i\.mx ?93"),
    ("rock5", "Radxa ROCK 5", r"rock 5"),
    ("rock5a", "Radxa ROCK 5A", r"rock 5 ?a"),
    ("rock5b", "Radxa ROCK 5B", r"rock 5 ?b"),
    ("orangepi5", "Orange Pi 5", r"orange ?pi 5"),
    ("odroid-n2", "Hardkernel ODROID-N2", r"odroid-n2"),
    ("beagle", "any BeagleBoard.org board", r"beagle"),
    ("beagleplay", "BeaglePlay", r"beagleplay"),
    ("visionfive2", "StarFive VisionFive 2", r"visionfive (2|v2)"),
)
"""Short names of boards, what each means, and how it is found in a model's name, as device trees have it."""

_ARCHITECTURES = {
    "arm64": "aarch64",
    "amd64": "x86_64",
    "x64": "x86_64",
    "armhf": "armv7l",
    "arm32": "armv7l",
}
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_WORD = re.compile(r"[a-z0-9]+")
_Test = Callable[[collector_pb2.Device, str], bool]
_TERM = re.compile(r"\s*([A-Za-z0-9_][A-Za-z0-9_./-]*?)\s*(!?=)\s*(.*?)\s*", re.DOTALL)
_MEMORY = re.compile(r"([0-9]{1,6}) *(?:g|gb|gib)?")
_MAX_TERMS = 64
_PATTERNS = {name: re.compile(pattern) for name, _, pattern in BOARDS}


@dataclass(frozen=True)
class Term:
    """What a board must be, or must not be."""

    name: str
    value: str
    negated: bool

    def __str__(self) -> str:
        return f"{self.name}{'!=' if self.negated else '='}{self.value}"

    def holds(self, device: collector_pb2.Device) -> bool:
        """Whether the board meets it."""
        test = _TESTS.get(self.name)
        if test is not None:
            return test(device, self.value) is not self.negated
        return _like(self.value, (labels_of(device).get(self.name, ""),)) is not self.negated


def parse(texts: Sequence[str]) -> tuple[Term, ...]:
    """Returns the terms; InvalidRequest says which is none."""
    if len(texts) > _MAX_TERMS:
        raise InvalidRequest(f"{len(texts)} terms are too many; at most {_MAX_TERMS} are taken")
    terms = []
    for text in texts:
        match = _TERM.fullmatch(text)
        if match is None or not match[3]:
            raise InvalidRequest(
                f"{text[:200]!r} is no term; write NAME=VALUE or NAME!=VALUE, as board=pi5 or lab!=zurich"
            )
        name, value = match[1], match[3]
        if name.lower() in _TESTS:
            name = name.lower()
        if name == "memory" and _gibibytes(value) is None:
            raise InvalidRequest(f"{text!r}: write how much it is on the box, as memory=8GB")
        if name == "up" and value.lower() not in _TRUTH:
            raise InvalidRequest(f"{text!r}: a board is up or not; write up=true or up=false")
        terms.append(Term(name, value, match[2] == "!="))
    return tuple(terms)


def chosen(
    devices: Iterable[collector_pb2.Device], terms: Sequence[Term]
) -> tuple[collector_pb2.Device, ...]:
    """Returns the boards that meet every term."""
    return tuple(device for device in devices if all(term.holds(device) for term in terms))


def complaint(devices: Sequence[collector_pb2.Device], terms: Sequence[Term]) -> str:
    """Returns why no board meets the terms, as far as it can be told."""
    if not devices:
        return "no board has ever reported to this collector"
    unknown = [
        term.name
        for term in terms
        if term.name not in _TESTS and not any(term.name in labels_of(device) for device in devices)
    ]
    if unknown:
        names = ", ".join(sorted(_TESTS))
        return f"no board has a label {unknown[0]!r}, and terms are about labels or {names}"
    alone = [term for term in terms if not chosen(devices, (term,))]
    which = f"{alone[0]}" if alone else " and ".join(str(term) for term in terms)
    hint = ""
    if alone and alone[0].name in _TESTS:
        mistaken = sum(_is_labelled(device, alone[0]) for device in devices)
        if mistaken:
            hint = (
                f"; {mistaken} {'has' if mistaken == 1 else 'have'} it as a label, which is not looked at:"
                f" {alone[0].name} is what the board itself says, so give the label another name"
            )
    return f"none of {len(devices)} boards meets {which}{hint}"


def _is_labelled(device: collector_pb2.Device, term: Term) -> bool:
    """Whether it has a label that looks like what the term is about."""
    return any(
        name.lower() == term.name and _like(term.value, (value,)) for name, value in labels_of(device).items()
    )


def labels_of(device: collector_pb2.Device) -> dict[str, str]:
    """Returns the labels that count: the operator's before the agent's."""
    return {**device.board.labels, **device.labels}


def _like(value: str, candidates: Iterable[str]) -> bool:
    """Whether one of them is the value, or fits it as a pattern."""
    # fnmatch's patterns never go back over a text again and again, however many * there are.
    literal = value.casefold().replace("[", "[[]").replace("?", "[?]")
    pattern = re.compile(fnmatch.translate(literal))
    return any(candidate and pattern.fullmatch(candidate.casefold()) for candidate in candidates)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _has_words(value: str, candidates: Iterable[str]) -> bool:
    """Whether the words of the value stand together in one of them."""
    wanted = _words(value)
    for candidate in candidates:
        words = _words(candidate)
        if wanted and any(
            words[at : at + len(wanted)] == wanted for at in range(len(words) - len(wanted) + 1)
        ):
            return True
    return False


def _board(device: collector_pb2.Device, value: str) -> bool:
    model = device.board.model
    lower = model.lower()
    if "*" in value:
        return _like(value, (model, *(name for name, found in _PATTERNS.items() if found.search(lower))))
    short = value.lower().removeprefix("jetson-").replace("rpi", "pi").replace("_", "-")
    pattern = _PATTERNS.get(short) or _PATTERNS.get(short.replace("-", "").replace(" ", ""))
    if pattern is not None:
        return pattern.search(lower) is not None
    return _has_words(value, (model,))


def _problem(device: collector_pb2.Device, value: str) -> bool:
    if value.lower() == "none":
        return not device.problems
    return _like(value, device.problems) or ("*" not in value and _has_words(value, device.problems))


def _gibibytes(value: str) -> int | None:
    """Returns a memory's size as it is written on the box; None when it is none."""
    match = _MEMORY.fullmatch(value.lower())
    return int(match[1]) if match else None


def _architecture(device: collector_pb2.Device, value: str) -> bool:
    return _like(_ARCHITECTURES.get(value.lower(), value), (device.board.architecture,))


def _accelerator(device: collector_pb2.Device, value: str) -> bool:
    if value.lower() == "none":
        return not device.board.accelerators
    named = [text for found in device.board.accelerators for text in (found.kind, found.name)]
    return _like(value, named) or ("*" not in value and _has_words(value, named))


def _either(
    of: Callable[[collector_pb2.Device], Iterable[str]],
) -> Callable[[collector_pb2.Device, str], bool]:
    """Returns a test that takes a pattern, or words that stand together."""

    def test(device: collector_pb2.Device, value: str) -> bool:
        texts = tuple(of(device))
        return _like(value, texts) or ("*" not in value and _has_words(value, texts))

    return test


_TESTS: dict[str, _Test] = {
    "accelerator": _accelerator,
    "agent_version": lambda device, value: _like(value, (device.agent_version,)),
    "architecture": _architecture,
    "board": _board,
    "device_id": lambda device, value: _like(value, (device.board.device_id,)),
    "hostname": lambda device, value: _like(value, (device.board.hostname,)),
    "kernel": _either(lambda device: (device.board.kernel,)),
    "memory": lambda device, value: math.ceil(device.board.memory_bytes / 2**30) == _gibibytes(value),
    "os": _either(lambda device: (device.board.os,)),
    "problem": _problem,
    "runtime": lambda device, value: _like(
        value, (runtime.name for runtime in device.runtimes if runtime.available)
    ),
    "sensor": _either(lambda device: device.sensors),
    "soc": _either(lambda device: (device.board.soc,)),
    "up": lambda device, value: device.up is _TRUTH[value.lower()],
}

MEANINGS = {
    "accelerator": "its kind or words of its name (`tpu`, `coral`, `*usb*`); `none`: a board without any",
    "agent_version": "the agent's version (`0.3.*`)",
    "architecture": "as the kernel names it, or as Debian does (`aarch64`, `arm64`)",
    "board": "a short name (`pi5`), words of the model that stand together, or a pattern for all of it",
    "device_id": "the board's identity",
    "hostname": "its host name",
    "kernel": "release of its kernel (`6.6*`)",
    "memory": "as it is on the box, in whole GiB (`8GB`): what the system has, rounded up",
    "os": "words of its system's name, or a pattern (`debian`, `bookworm`, `ubuntu*`)",
    "problem": "words of what is wrong with it, or a pattern; `none`: boards with which nothing is",
    "runtime": "an engine that can run on it now",
    "sensor": "a kind of sensor that it has",
    "soc": "its system on chip (`bcm2712`)",
    "up": "`true` or `false`: whether its stream is open",
}
"""What terms can be about beside labels, and what of it the value is."""
