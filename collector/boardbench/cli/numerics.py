"""How far the outputs of two runs of one model lie apart, from the values that their results hold.

Every result of ``--runtime all`` holds values of the outputs of its first inference: all of a small output,
and every so manieth element of a large one, the same for every engine. They are compared only where both runs
were fed the same data. Differences are told as a share of the greatest magnitude in the first run's output,
because an element that is almost zero has any relative error.
"""

from __future__ import annotations

from dataclasses import dataclass

from boardbench.v1 import result_pb2

SAME = "same bytes"
CLOSE = "close"
ROUGH = "rough"
DIFFERS = "DIFFERS"
UNKNOWN = "not comparable"

# float32 has seven digits; sums of thousands of products in another order agree in four or five of them.
CLOSE_SHARE = 1e-3
# bfloat16 has two to three digits, and an int8 model's outputs come in up to 256 steps.
ROUGH_SHARE = 3e-2


@dataclass(frozen=True)
class Difference:
    """What was found; ``verdict`` is one of the words above."""

    verdict: str
    detail: str
    greatest: float | None = None
    """Greatest absolute difference of two elements; None where none were compared."""
    share: float | None = None
    """The same as a share of the greatest magnitude in that output of the first run."""
    output: str = ""
    """The output in which that is."""
    compared: int = 0
    """Elements that were compared, of all outputs."""
    of: int = 0
    """Elements that these outputs have."""


def compare(reference: result_pb2.RunResult, other: result_pb2.RunResult) -> Difference:
    """How far the outputs of ``other`` lie from those of ``reference``."""
    if not _same_inputs(reference, other):
        return Difference(UNKNOWN, "they were not fed the same data")
    pairs = _pairs(reference, other)
    if not pairs:
        return Difference(UNKNOWN, "their outputs don't match by name, nor in number and size")
    ours, theirs = reference.output_sha256, other.output_sha256
    if ours and all(a in ours and b in theirs and ours[a] == theirs[b] for a, b in pairs):
        return Difference(SAME, "every output has the same bytes", 0.0, 0.0)
    return _by_values(reference, other, pairs)


def _by_values(
    reference: result_pb2.RunResult, other: result_pb2.RunResult, pairs: list[tuple[str, str]]
) -> Difference:
    ours = {entry.name: entry for entry in reference.output_values}
    theirs = {entry.name: entry for entry in other.output_values}
    worst: Difference | None = None
    compared = elements = 0
    missing = []
    for first, second in pairs:
        one, two = ours.get(first), theirs.get(second)
        if one is None or two is None or (one.count, one.step) != (two.count, two.step):
            missing.append(first)
            continue
        compared += len(one.values)
        elements += one.count
        greatest = max((abs(a - b) for a, b in zip(one.values, two.values, strict=False)), default=0.0)
        scale = max((abs(a) for a in one.values), default=0.0)
        share = greatest / scale if scale else (0.0 if not greatest else float("inf"))
        if worst is None or share > (worst.share or 0.0):
            worst = Difference(_verdict(share), "", greatest, share, first)
    if worst is None:
        return Difference(UNKNOWN, f"no values of {', '.join(missing[:6])} were kept by both")
    detail = f"{compared} of {elements} elements compared"
    if missing:
        detail += (
            f"; {', '.join(missing[:6])} not, since they hold text, or what is not finite, or other sizes"
        )
    return Difference(
        worst.verdict, detail, worst.greatest, worst.share, worst.output, compared=compared, of=elements
    )


def _verdict(share: float) -> str:
    if share <= CLOSE_SHARE:
        return CLOSE
    return ROUGH if share <= ROUGH_SHARE else DIFFERS


def _same_inputs(reference: result_pb2.RunResult, other: result_pb2.RunResult) -> bool:
    ours, theirs = reference.input_data, other.input_data
    if ours.sha256 and ours.sha256 == theirs.sha256:
        return True
    # Engines name inputs as they like; what is made from a seed depends on place, type and sizes.
    return (
        ours.source == theirs.source == "seeded"
        and ours.seed == theirs.seed
        and [(tensor.dtype, list(tensor.shape)) for tensor in reference.inputs]
        == [(tensor.dtype, list(tensor.shape)) for tensor in other.inputs]
    )


def _pairs(reference: result_pb2.RunResult, other: result_pb2.RunResult) -> list[tuple[str, str]]:
    """Names of the outputs that belong together: by name, else by place where sizes agree."""
    ours = [(tensor.name, _count(list(tensor.shape))) for tensor in reference.outputs]
    theirs = [(tensor.name, _count(list(tensor.shape))) for tensor in other.outputs]
    if {name for name, _ in ours} == {name for name, _ in theirs}:
        return [(name, name) for name, _ in ours]
    if [count for _, count in ours] != [count for _, count in theirs]:
        return []
    return [(one, two) for (one, _), (two, _) in zip(ours, theirs, strict=True)]


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
