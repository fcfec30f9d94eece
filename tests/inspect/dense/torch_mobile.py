"""PyTorch Mobile."""

from __future__ import annotations

import struct
from collections.abc import Callable

from .flat import Flat, places


def torch_mobile(kind: int) -> Callable[[int], bytes]:
    """A list of values of the kind, which are all one, as often as there is room for."""

    def make(size: int) -> bytes:
        flat = Flat(b"PTMF")
        chosen, values, method, function, entry, value = places(6)
        flat.table(flat.top, {0: ("I", 9), 2: chosen, 4: values})
        flat.numbers(chosen, "I", [0])
        flat.pointers(values, [method, *([entry] * (size // 8))])
        flat.table(method, {0: ("B", 16), 1: function})
        operators, operator, instructions, name = places(4)
        flat.table(function, {0: name, 1: instructions, 2: operators})
        flat.pointers(operators, [operator])
        flat.table(operator, {0: name, 1: name})
        flat.table(entry, {0: ("B", kind), 1: value})
        listed, scales, quantised = places(3)
        if kind == 5:
            flat.table(value, {1: ("b", 6), 3: listed, 4: listed, 6: quantised})
            flat.table(quantised, {3: scales, 4: scales})
            flat.table(scales, {1: ("b", 6), 3: listed, 4: listed})
        elif kind == 16:
            again, other = places(2)
            flat.table(value, {0: name, 1: instructions, 2: again})
            flat.pointers(again, [other])
            flat.table(other, {0: name, 1: name})
        else:
            flat.table(value, {0: listed, 1: name, 2: listed})
        flat.numbers(listed, "I", [1, 2, 3, 4])
        flat.content(name, b"name.forward")
        # Instructions of eight bytes, each of which runs the only operation.
        instructions.at = len(flat.data)
        flat.data += struct.pack("<I", 8 if kind == 16 else size // 16)
        flat.data += bytes(8 * (size // 16))
        return flat.finish()

    return make


DENSE: dict[str, Callable[[int], bytes]] = {
    "torch mobile tensors": torch_mobile(5),
    "torch mobile lists": torch_mobile(7),
    "torch mobile functions": torch_mobile(16),
}
