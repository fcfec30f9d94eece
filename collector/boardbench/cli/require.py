"""``--require``: what a result, or a model file, must hold; a small language and its judge.

    requirement = flag | name comparison value
    comparison  = ">=" | "<=" | "==" | "!=" | ">" | "<"
    value       = number [unit] | word

What there is to ask for stands in :mod:`boardbench.cli.require_names`; the documentation is made from it. A
requirement holds only if it holds over the whole interval of a figure, and what is not known at all holds
nothing, not even ``!=``.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

from boardbench.cli.board import short_names
from boardbench.cli.require_names import (
    FLAGS,
    NAMES,
    PERCENTILE,
    PERCENTILES,
    PERCENTILES_MEANING,
    VALUES,
    VERDICTS,
    Flag,
    Name,
    Subject,
    Unknown,
    in_words,
    percentile,
)

# Commands get it here, with the rest.
from boardbench.cli.require_option import require_option as require_option

if TYPE_CHECKING:
    from boardbench.cli.terminal import Output
    from boardbench.v1 import placement_pb2, result_pb2

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"([A-Za-z][\w.-]*)\s*(?:(>=|<=|==|!=|=|>|<)\s*(\S.*)?)?")
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,2}))?\s*(\D*)")
_SECONDS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),  # the micro sign
    "μs": Fraction(1, 10**6),  # the Greek letter, which many keyboards give
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
}
_JOULES = {
    "uj": Fraction(1, 10**6),
    "µj": Fraction(1, 10**6),
    "μj": Fraction(1, 10**6),
    "mj": Fraction(1, 1000),
    "j": Fraction(1),
}
_BYTES = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


# Reading the language


@dataclass(frozen=True)
class Requirement:
    """One thing that must hold."""

    text: str
    """As it was written."""
    flag: Flag | None = None
    name: Name | None = None
    comparison: str = ""
    wanted: Fraction = field(default=Fraction(0))
    of_whole: bool = False
    """Whether ``wanted`` is a share of all ops, and not their number."""

    @property
    def about_placement(self) -> bool:
        """Whether the ops on the CPU explain it."""
        about = self.flag or self.name
        return about is not None and about.placement


def parse(text: str, *, file: bool = False) -> Requirement:
    """The requirement on a run, or with ``file`` on a model file. Raises ValueError, saying what is wrong."""
    found = _FORM.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is no requirement: write a name, a comparison and a value, as p50<=5ms")
    word, comparison, value = found[1].lower(), found[2], (found[3] or "").strip()
    flag = next((flag for flag in FLAGS if flag.name == word.replace("_", "-")), None)
    if flag is not None and (flag.file or not file):
        if comparison:
            raise ValueError(f"{text!r}: {flag.name} stands by itself, without a comparison")
        return Requirement(text.strip(), flag=flag)
    name = _find(word.replace("-", "_"), text, file=file)
    if not comparison or not value:
        raise ValueError(
            f"{text!r} compares with nothing: write {name.name}, one of {' '.join(_COMPARISONS)}, "
            f"and {VALUES[name.kind]}"
        )
    comparison = "==" if comparison == "=" else comparison
    wanted, of_whole = _value(value, name, text, comparison)
    return Requirement(text.strip(), name=name, comparison=comparison, wanted=wanted, of_whole=of_whole)


def _find(word: str, text: str, *, file: bool) -> Name:
    if not file and PERCENTILE.fullmatch(word) and float(PERCENTILE.fullmatch(word)[1]) > 0:  # type: ignore[index]
        return Name(word, "seconds", PERCENTILES_MEANING, percentile(word))
    known = {name.name: name for name in NAMES if (name.file if file else name.run)}
    if word in known:
        return known[word]
    flags = [flag.name for flag in FLAGS if flag.file or not file]
    there_is = ", ".join([*flags, *known, *(() if file else (PERCENTILES,))])
    near = difflib.get_close_matches(word, [*known, *flags], n=1)
    if file and (word in {name.name for name in NAMES} or PERCENTILE.fullmatch(word)):
        raise ValueError(f"{text!r}: only a run tells {word}; for a file there are {there_is}")
    raise ValueError(
        f"{text!r}: there is no {word!r}{f', did you mean {near[0]!r}' if near else ''}? There are {there_is}"
    )


def _value(value: str, name: Name, text: str, comparison: str) -> tuple[Fraction, bool]:
    wrong = ValueError(f"{text!r}: {name.name} is compared with {VALUES[name.kind]}, not with {value!r}")
    if name.kind == "verdict":
        word = value.strip("'\"").lower().replace(" ", "_").replace("-", "_")
        if word not in VERDICTS:
            raise wrong
        if comparison not in ("==", "!="):
            raise ValueError(f"{text!r}: a verdict is neither more nor less: write == or !=")
        return Fraction(VERDICTS.index(word)), False
    found = _NUMBER.fullmatch(value)
    if not found:
        raise wrong
    number = Fraction(Decimal(found[1])) * Fraction(10) ** int(found[2] or 0)
    unit = found[3].strip()
    if unit == "%" and name.kind in ("ops", "share") and number <= 100:
        return number / 100, name.kind == "ops"
    if name.kind == "seconds" and unit.lower() in _SECONDS:
        return number * _SECONDS[unit.lower()], False
    if name.kind == "joules" and unit.lower() in _JOULES:
        return number * _JOULES[unit.lower()], False
    if name.kind == "bytes" and unit.lower() in _BYTES:
        return number * _BYTES[unit.lower()], False
    if unit or name.kind in ("seconds", "joules") or (name.kind == "share" and number > 1):
        raise wrong
    return number, False


# Judging


@dataclass(frozen=True)
class Judgement:
    """Whether a requirement holds, and the figure by which."""

    requirement: Requirement
    held: bool
    words: str


def judge(requirement: Requirement, subject: Subject) -> Judgement:
    """Whether it holds. What is not known holds nothing."""
    try:
        held, words = _judge(requirement, subject)
    except Unknown as unknown:
        held, words = False, f"not known, and so it does not hold ({unknown})"
    return Judgement(requirement, held, words)


def _judge(requirement: Requirement, subject: Subject) -> tuple[bool, str]:
    if requirement.flag is not None:
        return requirement.flag.judge(subject)
    assert requirement.name is not None
    figure = requirement.name.read(subject)
    low, high = figure.low, figure.high
    if requirement.of_whole:
        if not figure.whole:
            raise Unknown(f"{figure.words}, and of how many is not told")
        low, high = low / figure.whole, high / figure.whole
    compare = _COMPARISONS[requirement.comparison]
    if requirement.comparison == "!=":
        return requirement.wanted < low or requirement.wanted > high, figure.words
    return compare(low, requirement.wanted) and compare(high, requirement.wanted), figure.words


# Judging all that a command was given


def holds(requirements: Sequence[Requirement], subject: Subject, output: Output, *, about: str = "") -> bool:
    """Whether all hold. Says on stderr which do and which don't, and which ops are to blame.

    ``about`` names the subject where there are several.
    """
    from boardbench.cli.plain import printable

    judgements = [judge(requirement, subject) for requirement in requirements]
    head = f"{about}: " if about else ""
    for judgement in judgements:
        if not judgement.held or not output.quiet:
            word = "held" if judgement.held else "NOT HELD"
            note = _note(judgement.requirement, subject)
            output.complain(f"{head}required {judgement.requirement.text}: {word}: {judgement.words}{note}")
    lost = [judgement.requirement for judgement in judgements if not judgement.held]
    if any(requirement.about_placement for requirement in lost):
        for line in _blame(subject):
            click.echo(printable(line), err=True)
    return not lost


def _note(requirement: Requirement, subject: Subject) -> str:
    """What must not be overlooked about where the figure comes from."""
    from boardbench.v1 import placement_pb2

    told = requirement.flag is not None and requirement.flag.name == "no-standin"
    if subject.standin and not told:
        return " (by a stand-in or emulator, not by hardware)"
    placement = subject.placement
    if (
        requirement.about_placement
        and placement is not None
        and placement.evidence == placement_pb2.EVIDENCE_PREDICTION
        and subject.report is not None
    ):
        return " (predicted by rule, not seen)"
    return ""


def _blame(subject: Subject) -> Iterator[str]:
    """The ops that are not on the accelerator, a line each: those that stay because of themselves first."""
    from boardbench.cli.verdict import cause_rank, evidence_name, on_accelerator, short_name, unit_of

    placement = subject.placement
    if placement is None:
        return
    left = [op for op in placement.ops if not on_accelerator(op)]
    left.sort(key=lambda op: (cause_rank(op), -op.seconds, op.index))
    if left:
        yield f"  not on the accelerator, by {evidence_name(placement.evidence)}, root causes first:"
    for op in left:
        words = in_words(op.seconds, "seconds") if op.HasField("seconds") else ""
        parts = (f"#{op.index} {op.type}", short_name(op), unit_of(op), words, _why(op))
        yield "    " + "  ".join(part for part in parts if part)


def _why(op: placement_pb2.OpPlacement) -> str:
    from boardbench.cli.verdict import cause_rank

    role = ("root cause", "", "because of another op")[cause_rank(op)]
    return ": ".join(part for part in (role, op.cause) if part)


def all_hold(
    requirements: Sequence[Requirement],
    results: Sequence[result_pb2.RunResult],
    output: Output,
    cases: Sequence[str] = (),
    boards: Mapping[str, str] | None = None,
) -> bool:
    """Whether all hold for every result; says on stderr which do and which don't.

    ``cases`` are what the results are called instead of by their models; ``boards`` what boards are called,
    by their identities: needed where there are more of them than these results are of.
    """
    called = short_names(result.board for result in results) if boards is None else boards
    verdicts = []
    for place, result in enumerate(results):
        name = cases[place] if cases else result.model.name
        board = called[result.board.device_id]
        about = f"{name} on {board}" if board else name
        subject = Subject.of_result(result)
        verdicts.append(
            holds(requirements, subject, output, about=about if cases or len(results) > 1 else "")
        )
    return all(verdicts)
