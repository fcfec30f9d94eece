"""Whether a model fits a board's memory or the Edge TPU's cache."""

from __future__ import annotations

import re
from typing import Dict, Optional

from boardbench.inspect.errors import InspectError
from boardbench.inspect.report import Fit

MIB = 1 << 20
GIB = 1 << 30
EDGETPU_CACHE = "edgetpu-cache"
# "The Edge TPU has roughly 8 MB of SRAM that can cache the model's parameter data" (coral.ai, Edge TPU
# Compiler); a little of it goes to each model's own executable.
EDGETPU_CACHE_BYTES = 8 * MIB

# Memory as the makers state it.
BOARDS: Dict[str, int] = {
    "raspberrypi-zero-2w": 512 * MIB,
    "raspberrypi3": GIB,
    "raspberrypi4-1gb": GIB,
    "raspberrypi4-2gb": 2 * GIB,
    "raspberrypi4-4gb": 4 * GIB,
    "raspberrypi4-8gb": 8 * GIB,
    "raspberrypi5-2gb": 2 * GIB,
    "raspberrypi5-4gb": 4 * GIB,
    "raspberrypi5-8gb": 8 * GIB,
    "raspberrypi5-16gb": 16 * GIB,
    "coral-dev-board": GIB,
    "coral-dev-board-4gb": 4 * GIB,
    "coral-dev-board-mini": 2 * GIB,
    "coral-dev-board-micro": 64 * MIB,
    "jetson-nano": 4 * GIB,
    "jetson-nano-2gb": 2 * GIB,
    "jetson-tx2": 8 * GIB,
    "jetson-xavier-nx": 8 * GIB,
    "jetson-agx-xavier": 32 * GIB,
    "jetson-orin-nano-4gb": 4 * GIB,
    "jetson-orin-nano-8gb": 8 * GIB,
    "jetson-orin-nx-16gb": 16 * GIB,
    "jetson-agx-orin-64gb": 64 * GIB,
    "beaglebone-black": 512 * MIB,
}
_UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "kib": 1 << 10,
    "m": 1000**2,
    "mb": 1000**2,
    "mib": MIB,
    "g": 1000**3,
    "gb": 1000**3,
    "gib": GIB,
}


def memory_of(target: str) -> int:
    """Bytes of memory that the target stands for: a board's name, or a size ("512MiB", "2GB", "65536").

    Raises InspectError, with the names that are known, for anything else.
    """
    name = target.strip().lower()
    if name == EDGETPU_CACHE:
        return EDGETPU_CACHE_BYTES
    if name in BOARDS:
        return BOARDS[name]
    size = re.fullmatch(r"(\d{1,15})(?:\.(\d{1,3}))?\s*([a-z]{0,3})", name)
    if size is not None and size.group(3) in _UNITS:
        number = float(f"{size.group(1)}.{size.group(2) or 0}")
        return int(number * _UNITS[size.group(3)])
    raise InspectError(
        f"{target!r} is neither a board nor a size; give a size (512MiB, 2GB), {EDGETPU_CACHE}, or one of "
        f"{', '.join(sorted(BOARDS))}"
    )


def fit(target: str, size_bytes: int, arena_bytes: Optional[int]) -> Fit:
    """Whether the model fits the memory: the file, and the tensors between operations."""
    available = memory_of(target)
    needed = size_bytes + (arena_bytes or 0)
    detail = (
        "the file and the tensors between operations"
        if arena_bytes is not None
        else "the file alone: the tensors between operations are not known"
    )
    return Fit(
        target,
        needed,
        available,
        needed <= available,
        f"{detail}; without the runtime and the operating system",
    )
