"""Crossings: how often execution moves between accelerator and CPU, and with how many bytes.

A part is what runs as one: what a delegate or provider took in one piece, or one operation by itself. What
goes into the model at its beginning and comes out at its end is no crossing: it moves in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Hashable, List, Optional, Sequence, Set, Tuple

from boardbench.agent.domain import Crossings


@dataclass(frozen=True)
class Part:
    """Operations that run as one, by their positions in the model, and the tensors that go in and out."""

    ops: Tuple[int, ...]
    accelerated: bool
    inputs: Tuple[Hashable, ...]
    outputs: Tuple[Hashable, ...]


def in_order(parts: Sequence[Part]) -> List[Part]:
    """The parts in the order in which an interpreter runs them.

    As TensorFlow Lite partitions a graph (tensorflow/lite/graph_info.cc): turn by turn all that is ready and
    of one kind, the kind being that of the first part that is ready.
    """
    made_by = {tensor: at for at, part in enumerate(parts) for tensor in part.outputs}
    needs: List[Set[int]] = [
        {made_by[tensor] for tensor in part.inputs if tensor in made_by} - {at}
        for at, part in enumerate(parts)
    ]
    order: List[Part] = []
    done: Set[int] = set()
    waiting = sorted(range(len(parts)), key=lambda at: parts[at].ops)
    while waiting:
        kind: Optional[bool] = None
        took = True
        while took:
            took = False
            for at in list(waiting):
                if needs[at] <= done and kind in (None, parts[at].accelerated):
                    kind = parts[at].accelerated
                    order.append(parts[at])
                    done.add(at)
                    waiting.remove(at)
                    took = True
        if kind is None:
            raise ValueError("the parts wait for each other")
    return order


def between(parts: Sequence[Part], size_bytes: Callable[[Hashable], Optional[int]]) -> Crossings:
    """The crossings of parts that run in this order; bytes are absent when a size is not known.

    A tensor leaves the accelerator once, however many read it, and enters it once for each part that does.
    """
    sides = [part.accelerated for part in parts]
    count = sum(sides[at] != sides[at - 1] for at in range(1, len(sides)))
    made_on: Dict[Hashable, bool] = {tensor: part.accelerated for part in parts for tensor in part.outputs}
    moved: List[Hashable] = []
    left: Set[Hashable] = set()
    for part in parts:
        for tensor in dict.fromkeys(part.inputs):
            if tensor not in made_on or made_on[tensor] == part.accelerated:
                continue
            if part.accelerated:
                moved.append(tensor)
            elif tensor not in left:
                left.add(tensor)
                moved.append(tensor)
    sizes = [size_bytes(tensor) for tensor in moved]
    known = [size for size in sizes if size is not None]
    return Crossings(count=count, bytes=sum(known) if len(known) == len(sizes) else None)
