"""What of a TensorFlow Lite graph runs as one, and what goes in and out of it.

The interpreter lists every original node of the main graph and, after them, a node called DELEGATE for each
part that a delegate took. Which originals that stands for follows from the tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from boardbench.agent.bench import crossings, placement
from boardbench.agent.bench.crossings import Part
from boardbench.agent.domain import Crossings, OpPlacement, Unit

DELEGATE_NODE = "DELEGATE"
NOT_TOLD = -1


@dataclass(frozen=True)
class Node:
    """A node of the first subgraph; tensors by index, absent optional ones left out."""

    name: str
    inputs: Tuple[int, ...]
    outputs: Tuple[int, ...]


def nodes_of(interpreter: Any) -> List[Node]:
    """The nodes as they are after delegation; raises AttributeError where the interpreter does not tell."""
    # The wrapper and not _get_ops_details: that one fails at any tensor whose type NumPy lacks.
    wrapper = interpreter._interpreter
    return [
        Node(
            name=str(wrapper.NodeName(at)),
            inputs=tuple(int(tensor) for tensor in wrapper.NodeInputs(at) if tensor >= 0),
            outputs=tuple(int(tensor) for tensor in wrapper.NodeOutputs(at) if tensor >= 0),
        )
        for at in range(wrapper.NumNodes())
    ]


def originals_of(nodes: Sequence[Node]) -> Dict[int, Node]:
    """The model's own nodes by their position; the n-th of them is the model's operation n."""
    return {at: node for at, node in enumerate(nodes) if node.name != DELEGATE_NODE}


def taken_apart(nodes: Sequence[Node]) -> Set[int]:
    """Original nodes that delegates took, where no DELEGATE node stands for more than one of them.

    A DELEGATE node puts out only what others use. One that puts out nothing is known by what it reads: it is
    an assignment to a variable, or a node whose results nobody uses. NOT_TOLD is among them for one that may
    stand for several, or for none.
    """
    originals = originals_of(nodes)
    used = {tensor for node in originals.values() for tensor in node.inputs}
    taken: Set[int] = set()
    for node in nodes:
        if node.name == DELEGATE_NODE:
            alike = [
                at
                for at, original in originals.items()
                if at not in taken
                and set(node.outputs) <= set(original.outputs)
                and (node.outputs or set(original.inputs) == set(node.inputs))
                and (node.outputs or used.isdisjoint(original.outputs))
            ]
            taken.add(alike[0] if len(alike) == 1 else NOT_TOLD)
    return taken


def closure(delegate: Node, originals: Mapping[int, Node], producer: Mapping[int, int]) -> Set[int]:
    """Original nodes between a delegate's outputs and its inputs."""
    stop = set(delegate.inputs)
    taken: Set[int] = set()
    pending = list(delegate.outputs)
    while pending:
        tensor = pending.pop()
        at = producer.get(tensor)
        if tensor in stop or at is None or at in taken:
            continue
        taken.add(at)
        pending.extend(originals[at].inputs)
    return taken


def parts_of(
    nodes: Sequence[Node],
    ops: Sequence[OpPlacement],
    wanted: str,
    *,
    inputs: Collection[int],
    outputs: Collection[int],
) -> List[Part]:
    """What runs as one, in the order in which it runs; operations are positions in ``ops``.

    ``inputs`` and ``outputs`` are the graph's. An operation on no known unit is in no part: nothing uses it.
    Nor is one that leads to no output, as an assignment to a variable, where a delegate took it.
    """
    originals = originals_of(nodes)
    position = {at: op for op, at in enumerate(originals)}
    producer = {tensor: at for at, node in originals.items() for tensor in node.outputs}
    groups = [
        sorted(position[at] for at in closure(node, originals, producer))
        for node in nodes
        if node.name == DELEGATE_NODE
    ]
    together = {op for group in groups for op in group}
    by_op = list(originals.values())
    groups += [
        [op]
        for op in range(len(ops))
        if op not in together
        and ops[op].unit is not Unit.UNSPECIFIED
        # In a delegate's part all the same, of which the tensors don't tell.
        and not ops[op].delegate
        and (by_op[op].inputs or by_op[op].outputs)
    ]
    computed = set(producer) | set(inputs)
    parts = [
        part_of(group, by_op, accelerated=not placement.is_away(ops[group[0]], wanted), computed=computed)
        for group in groups
    ]
    return crossings.in_order([_with_used_outputs(part, parts, outputs) for part in parts])


def part_of(
    ops: Sequence[int], nodes: Sequence[Node], *, accelerated: bool, computed: Collection[int]
) -> Part:
    """Operations as one part; a tensor that nobody computes, such as a constant, goes not in."""
    made = {tensor for op in ops for tensor in nodes[op].outputs}
    read = dict.fromkeys(tensor for op in ops for tensor in nodes[op].inputs)
    return Part(
        ops=tuple(ops),
        accelerated=accelerated,
        inputs=tuple(tensor for tensor in read if tensor in computed and tensor not in made),
        outputs=tuple(dict.fromkeys(tensor for op in ops for tensor in nodes[op].outputs)),
    )


def _with_used_outputs(part: Part, parts: Sequence[Part], outputs: Collection[int]) -> Part:
    used = set(outputs).union(*(other.inputs for other in parts if other is not part))
    return Part(part.ops, part.accelerated, part.inputs, tuple(t for t in part.outputs if t in used))


def joined(parts: Sequence[Part], outputs: Collection[int]) -> List[Part]:
    """Neighbours on the same side as one part each, in the same order."""
    groups: List[List[Part]] = []
    for part in parts:
        if groups and groups[-1][-1].accelerated == part.accelerated:
            groups[-1].append(part)
        else:
            groups.append([part])
    found = []
    for group in groups:
        made = {tensor for part in group for tensor in part.outputs}
        read = dict.fromkeys(tensor for part in group for tensor in part.inputs)
        found.append(
            Part(
                ops=tuple(sorted(op for part in group for op in part.ops)),
                accelerated=group[0].accelerated,
                inputs=tuple(tensor for tensor in read if tensor not in made),
                outputs=tuple(dict.fromkeys(tensor for part in group for tensor in part.outputs)),
            )
        )
    return [_with_used_outputs(part, found, outputs) for part in found]


def crossings_of(
    interpreter: Any,
    ops: Sequence[OpPlacement],
    wanted: str,
    *,
    inputs: Collection[int],
    outputs: Collection[int],
) -> Optional[Crossings]:
    """The crossings between ``wanted`` and the rest; None when the parts are not known."""
    if not ops or any(op.unit is Unit.UNSPECIFIED for op in ops):
        return None
    parts = parts_of(nodes_of(interpreter), ops, wanted, inputs=inputs, outputs=outputs)

    def size_bytes(tensor: object) -> Optional[int]:
        import numpy as np

        try:
            detail = interpreter._get_tensor_details(tensor, 0)
            element = np.dtype(detail["dtype"])
        except Exception:  # a type that NumPy lacks
            return None
        # Text and the like have no size of their own.
        return math.prod(map(int, detail["shape"])) * element.itemsize if element.kind in "biufc" else None

    return crossings.between(parts, size_bytes)
