r"""The format: a graph in JSON, and its constants.

    AFFINE1\n
    {"input":   {"name": "x", "shape": [-1, 4]},                     -1: open; only the first may be
     "output":  {"name": "y", "value": "sum"},
     "operations": [
        {"type": "dense", "name": "hidden", "of": ["x"], "weights": [4, 8], "at": 0},
        {"type": "relu",  "name": "act",    "of": ["hidden"]},
        {"type": "add",   "name": "sum",    "of": ["act", "act"]}]}\n
    float32, little-endian: for each dense operation from byte "at" on its weights, then as many biases as
    they have columns

All on one line but for the breaks that are written. A value is called as the operation that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

MAGIC = b"AFFINE1\n"

# How many values each takes.
TYPES = {"dense": 1, "relu": 1, "add": 2}

_MOST_OPERATIONS = 10_000


class Malformed(Exception):
    """What is wrong with a file."""


@dataclass(frozen=True)
class Operation:
    """One operation; ``weights`` and ``bias`` of a dense one."""

    type: str
    name: str
    of: tuple[str, ...]
    weights: Array | None = None
    bias: Array | None = None


@dataclass(frozen=True)
class Graph:
    """A model, checked: every value is made before it is taken, and every size fits."""

    input_name: str
    input_shape: tuple[int, ...]
    output_name: str
    output_value: str
    output_shape: tuple[int, ...]
    operations: tuple[Operation, ...]


def read(path: Path) -> Graph:
    """The graph in a file. Raises Malformed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Malformed(f"can't be read: {error.strerror}") from error
    if not data.startswith(MAGIC):
        raise Malformed(f"does not begin with {MAGIC!r}")
    head, newline, constants = data[len(MAGIC) :].partition(b"\n")
    if not newline:
        raise Malformed("ends inside its first line: it is truncated; copy it again")
    try:
        content = json.loads(head)
        return _graph(content, constants)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Malformed(f"has a first line that can't be read ({type(error).__name__}: {error})") from error


def write(
    *,
    shape: Sequence[int],
    operations: Sequence[Mapping[str, Any]],
    output: str,
    input_name: str = "x",
    output_name: str = "y",
) -> bytes:
    """The bytes of a file; a dense operation has its ``weights`` and ``bias`` as arrays."""
    import numpy as np

    constants = b""
    told: list[dict[str, Any]] = []
    for operation in operations:
        entry = {key: operation[key] for key in ("type", "name", "of")}
        if operation["type"] == "dense":
            weights, bias = np.asarray(operation["weights"]), np.asarray(operation["bias"])
            entry.update(weights=list(weights.shape), at=len(constants))
            constants += weights.astype("<f4").tobytes() + bias.astype("<f4").tobytes()
        told.append(entry)
    content = {
        "input": {"name": input_name, "shape": list(shape)},
        "output": {"name": output_name, "value": output},
        "operations": told,
    }
    return MAGIC + json.dumps(content).encode() + b"\n" + constants


def _graph(content: Mapping[str, Any], constants: bytes) -> Graph:
    shape = tuple(int(size) for size in content["input"]["shape"])
    if not shape or any(size < 1 for size in shape[1:]) or (shape[0] < 1 and shape[0] != -1):
        raise ValueError(f"an input of {list(shape)}")
    input_name, output_name = str(content["input"]["name"]), str(content["output"]["name"])
    if not input_name or not output_name or len(content["operations"]) > _MOST_OPERATIONS:
        raise ValueError(f"names that are empty, or more than {_MOST_OPERATIONS} operations")
    shapes = {input_name: shape}
    operations = []
    for entry in content["operations"]:
        operation = _operation(entry, constants)
        if operation.name in shapes or any(name not in shapes for name in operation.of):
            raise ValueError(f"operation {operation.name!r} of {operation.of} is not in order")
        shapes[operation.name] = _shape(operation, [shapes[name] for name in operation.of])
        operations.append(operation)
    value = str(content["output"]["value"])
    return Graph(input_name, shape, output_name, value, shapes[value], tuple(operations))


def _operation(entry: Mapping[str, Any], constants: bytes) -> Operation:
    kind, name, of = str(entry["type"]), str(entry["name"]), tuple(str(each) for each in entry["of"])
    if kind not in TYPES:
        raise ValueError(f"no operation is called {kind!r}; there are {', '.join(TYPES)}")
    if not name or len(of) != TYPES[kind]:
        raise ValueError(f"{kind} {name!r} takes {TYPES[kind]} values and has {len(of)}")
    if kind != "dense":
        return Operation(kind, name, of)
    import numpy as np

    rows, columns = (int(size) for size in entry["weights"])
    start, count = int(entry["at"]), rows * columns + columns
    if rows < 1 or columns < 1 or start < 0 or start + 4 * count > len(constants):
        raise ValueError(f"the weights of {name!r} are not all there: the file is truncated; copy it again")
    # Copied, so that they lie as NumPy likes them, whatever the length of the text before.
    values = np.frombuffer(constants, "<f4", count, start).astype(np.float32)
    return Operation(
        kind, name, of, values[: rows * columns].reshape(rows, columns), values[rows * columns :]
    )


def _shape(operation: Operation, of: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if operation.type == "add" and of[0] != of[1]:
        raise ValueError(f"add {operation.name!r} of {list(of[0])} and {list(of[1])}")
    if operation.weights is None:
        return of[0]
    rows, columns = operation.weights.shape
    if of[0][-1] != rows:
        raise ValueError(f"dense {operation.name!r} has {rows} rows and takes {list(of[0])}")
    return (*of[0][:-1], columns)
