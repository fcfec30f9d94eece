"""ExecuTorch."""

from __future__ import annotations

import struct
from collections.abc import Callable

from .flat import Flat, Place, places


def executorch(
    values: int = 1, instructions: int = 1, arguments: int = 1, frames: int = 1, constants: bool = False
) -> Callable[[int], bytes]:
    """A program of one plan, whose lists point to one thing each, in these shares of the room."""
    shares = values + instructions + frames

    def make(size: int) -> bytes:
        flat = Flat(b"ET12")
        plans, plan, listed, chains, chain, operators, operator, inline = places(8)
        flat.table(flat.top, {1: plans, 2: inline})
        flat.pointers(plans, [plan])
        ins = Place()
        flat.table(plan, {2: listed, 3: ins, 4: ins, 5: chains, 6: operators})
        flat.numbers(ins, "i", [0])
        value, tensor, shape, order, planned, name = places(6)
        distinct = places(size // 64) if constants else []
        flat.pointers(listed, [value] * (values * size // 4 // shares) if not constants else distinct)
        flat.pointers(chains, [chain])
        listed_instructions, instruction, frame_list, frame, inner = places(5)
        flat.table(chain, {2: listed_instructions, 3: frame_list})
        flat.pointers(listed_instructions, [instruction] * (instructions * size // 4 // shares))
        flat.pointers(frame_list, [frame] * (frames * size // 4 // shares))
        call, given = places(2)
        flat.table(instruction, {0: ("B", 1), 1: call})
        flat.table(call, {0: ("i", 0), 1: given})
        flat.numbers(given, "i", [0] * arguments)
        flat.table(frame, {0: inner})
        entry = Place()
        flat.pointers(inner, [entry])
        flat.table(entry, {0: name, 2: name, 3: name})
        flat.pointers(operators, [operator])
        flat.table(operator, {0: name, 1: name})
        for number_of, each in enumerate(distinct):
            own = Place()
            flat.table(each, {0: ("B", 5), 1: own})
            flat.table(own, {0: ("b", 2), 2: shape, 5: ("I", number_of)})
        if not constants:
            flat.table(value, {0: ("B", 5), 1: tensor})
            flat.table(tensor, {0: ("b", 6), 2: shape, 3: order, 5: ("I", 1), 6: planned})
        flat.numbers(shape, "i", [size // 8] if constants else [1, 2, 3, 4])
        flat.numbers(order, "B", [0, 1, 2, 3])
        flat.table(planned, {0: ("I", 0)})
        flat.content(name, b"n")
        blobs = places(len(distinct))
        flat.pointers(inline, blobs)
        contents = places(len(distinct))
        for blob, content in zip(blobs, contents, strict=True):
            flat.table(blob, {0: content})
        for content in contents:
            content.at = len(flat.data)
            flat.data += struct.pack("<I", size // 4)
        flat.data += bytes(size // 4 + 4) if constants else b""
        return flat.finish()

    return make


DENSE: dict[str, Callable[[int], bytes]] = {
    "executorch values": executorch(values=20),
    "executorch instructions": executorch(instructions=20),
    "executorch arguments": executorch(instructions=20, arguments=500),
    "executorch frames": executorch(frames=20),
    "executorch constants upon each other": executorch(constants=True),
}
