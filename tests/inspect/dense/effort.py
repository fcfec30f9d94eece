"""What a dense file takes to read."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import dataclass

from boardbench.inspect.analyse import inspect_bytes
from boardbench.inspect.budget import Budget
from boardbench.inspect.errors import InspectError
from boardbench.inspect.sniff import sniff_bytes

from . import DENSE, padded


@dataclass
class Effort:
    """What became of a file, and what it took."""

    name: str
    size_bytes: int
    seconds: float
    steps: int
    most_steps: int
    peak_bytes: int
    outcome: str


def attempt(name: str, data: bytes, *, memory: bool = False) -> Effort:
    """Inspects the file; with ``memory`` the time means nothing."""
    view = memoryview(data)
    budget = Budget(len(data), sniff_bytes(view))
    if memory:
        tracemalloc.start()
    begin = time.process_time()
    try:
        report = inspect_bytes(name, view, target="edgetpu" if data[4:8] == b"TFL3" else "", budget=budget)
        assert sum(use.size_bytes for use in report.bytes) == report.size_bytes
        outcome = f"{report.op_count} operations"
    except InspectError as error:
        outcome = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - begin
    peak = 0
    if memory:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return Effort(name, len(data), seconds, budget.steps, budget.most_steps, peak, outcome)


def worst(name: str, size: int) -> tuple[Effort, int]:
    """The most that files of this kind and size take, and how much of the file is dense then.

    What is refused at once took little; the most is taken by what is nearly too much, or just is.
    """
    found: tuple[Effort, int] | None = None
    dense = float(size)
    while dense > 20_000:
        data = padded(DENSE[name](int(dense)), size)
        effort = attempt(name, data)
        if found is None or effort.seconds > found[0].seconds:
            found = (effort, int(dense))
        elif effort.seconds < found[0].seconds / 4 and found[0].steps > found[0].most_steps // 2:
            break
        dense /= 1.7
    assert found is not None
    return found
