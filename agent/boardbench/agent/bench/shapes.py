"""Open dimensions of inputs, settled by what the caller gave."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from boardbench.agent.bench import memory
from boardbench.agent.bench.runtime import InputsRejected
from boardbench.agent.domain import TensorInfo

EVERY = "*"
"""Stands for every input: what is given by it is the size of their first dimension, the batch."""

LARGEST_DIMENSION = 2**31 - 1
"""TensorFlow Lite keeps sizes in 32 bits; no input of a board is beyond it elsewhere either."""

_ITEM_BYTES = {"bool": 1, "complex64": 8, "complex128": 16, "str": 16}


def item_bytes(dtype: str) -> int:
    """Bytes of one element of a NumPy type name; a guess of 16 for text."""
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    bits = dtype.lstrip("abcdefghijklmnopqrstuvwxyz")
    return max(1, int(bits) // 8) if bits.isdigit() else 8


def size_bytes(tensor: TensorInfo) -> int:
    """Bytes of a tensor whose dimensions are all settled."""
    return math.prod(tensor.shape) * item_bytes(tensor.dtype)


def positional(position: int) -> str:
    """The name under which ``numpy.savez`` keeps the argument at ``position``."""
    return f"arr_{position}"


def by_name(inputs: Sequence[TensorInfo], given: Mapping[str, object]) -> Dict[str, str]:
    """From the names in ``given`` to input names: a name is an input's, or arr_N for the one at position N.

    Raises InputsRejected for a name that is neither, or an input named twice.
    """
    names = {tensor.name for tensor in inputs}
    places = {positional(at): tensor.name for at, tensor in enumerate(inputs)}
    found: Dict[str, str] = {}
    for name in given:
        target = name if name in names else places.get(name)
        if target is None:
            raise InputsRejected(f"the model has no input {name!r}; its inputs are {describe(inputs)}")
        if target in found.values():
            raise InputsRejected(f"input {target!r} is given twice, by name and by position")
        found[name] = target
    return found


def describe(inputs: Sequence[TensorInfo]) -> str:
    """``x float32 [1, ?, 3], y int64 [?]``: every input for a message."""
    if not inputs:
        return "none"
    return ", ".join(f"{tensor.name} {tensor.dtype} {_dimensions(tensor.shape)}" for tensor in inputs)


def _dimensions(shape: Sequence[int]) -> str:
    return "[" + ", ".join("?" if size < 0 else str(size) for size in shape) + "]"


def settle(
    inputs: Sequence[TensorInfo],
    given: Mapping[str, Tuple[int, ...]],
    *,
    available_bytes: Optional[int] = None,
) -> Tuple[TensorInfo, ...]:
    """The inputs with every dimension settled; ``given`` may name an input or its position (arr_0).

    ``given[EVERY]`` holds one size, that of the first dimension of every input.

    Raises InputsRejected when a shape does not fit its input, when dimensions stay open (with the
    options to give), or when the data could not be held in ``available_bytes`` (the system's own
    figure by default), once here and once in the engine.
    """
    named = {name: shape for name, shape in given.items() if name != EVERY}
    wanted = {target: tuple(named[name]) for name, target in by_name(inputs, named).items()}
    settled: List[TensorInfo] = []
    for tensor in inputs:
        shape = wanted.get(tensor.name)
        if shape is not None:
            _check(tensor, shape)
            tensor = replace(tensor, shape=shape)
        settled.append(_batched(tensor, given[EVERY][0], shape) if EVERY in given else tensor)
    missing = [(tensor, at) for at, tensor in enumerate(settled) if any(size < 0 for size in tensor.shape)]
    if missing:
        needed = " ".join(f"--shape '{tensor.name}={_example(tensor.shape)}'" for tensor, _ in missing)
        raise InputsRejected(
            f"the model leaves sizes open in {describe([tensor for tensor, _ in missing])}; "
            f"give them, for example {needed}"
        )
    _fits(settled, memory.available_bytes() if available_bytes is None else available_bytes)
    return tuple(settled)


def _check(tensor: TensorInfo, shape: Sequence[int]) -> None:
    declared = tensor.shape
    fits = len(shape) == len(declared) and all(
        size == own if own >= 0 else size > 0 for size, own in zip(shape, declared)
    )
    if not fits:
        raise InputsRejected(
            f"input {tensor.name} is {tensor.dtype} {_dimensions(declared)} in the model"
            f"{' (? is open)' if any(size < 0 for size in declared) else ''}; "
            f"{_dimensions(shape)} does not fit it"
        )
    if any(size > LARGEST_DIMENSION for size in shape):
        raise InputsRejected(
            f"input {tensor.name}: a size in {_dimensions(shape)} is above {LARGEST_DIMENSION}"
        )


def _batched(tensor: TensorInfo, batch: int, given: Optional[Sequence[int]]) -> TensorInfo:
    """The input with the batch for its first dimension, where that is open or has this size anyhow."""
    if tensor.shape and tensor.shape[0] in (-1, batch):
        return replace(tensor, shape=(batch, *tensor.shape[1:]))
    if given is not None:
        raise InputsRejected(
            f"input {tensor.name} is given as {_dimensions(given)} and the batch as {batch}: give data or "
            "shapes of that size, or leave the batch out"
        )
    raise InputsRejected(
        f"a batch of {batch} does not fit input {tensor.name}, {tensor.dtype} {_dimensions(tensor.shape)}: "
        "its first dimension is settled in the model; export the model with an open one, or leave the batch "
        "out"
    )


def _example(shape: Sequence[int]) -> str:
    # A batch of one, and the size of a common picture elsewhere: an example that can be run as it is.
    return ",".join(str(size) if size >= 0 else ("1" if at == 0 else "224") for at, size in enumerate(shape))


def _fits(inputs: Sequence[TensorInfo], available: Optional[int]) -> None:
    needed = 2 * sum(size_bytes(tensor) for tensor in inputs)
    if available is not None and needed > available:
        raise InputsRejected(
            f"the inputs {describe(inputs)} need {needed} bytes, once for the data and once in the engine; "
            f"{available} bytes of memory are available: give smaller sizes"
        )
