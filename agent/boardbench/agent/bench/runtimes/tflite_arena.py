"""How much memory TensorFlow Lite has for tensors: its arena, told by where the tensors are.

No interpreter tells the size of its arena. But each tensor's view tells its address, and the arena is planned
so that every tensor begins where another one ends, at the next multiple of 64 bytes, or at the begin
(tensorflow/lite/simple_memory_arena.cc; kDefaultTensorAlignment in util.h): the tensors that are not in the
model's file make up the arena without gaps. Tensors that the interpreter allocates one by one (strings, open
sizes) are among them. What a delegate keeps for itself (XNNPACK's workspace) is not.

The interpreter follows a null pointer when it is asked for some tensors that it has for itself, so a copy of
the process asks, by fork: what goes wrong there costs nothing but the figure.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import warnings
from pathlib import Path
from typing import Any, Callable, List, NoReturn, Optional, Sequence, Tuple

ALIGNMENT = 64

PATIENCE_SECONDS = 10
"""It takes some milliseconds, and on a slow board with a large model a fraction of a second."""


def used_bytes(interpreter: Any, model: Path, maps: Path = Path("/proc/self/maps")) -> Optional[int]:
    """Bytes that the interpreter's tensors take beside the model's file; None where it can't be told."""
    if not hasattr(os, "fork") or not maps.is_file():
        return None
    return in_copy(lambda: _used_bytes(interpreter, model, maps))


def in_copy(work: Callable[[], Optional[int]]) -> Optional[int]:
    """What ``work`` finds in a copy of this process; None if it finds nothing, or if that ends the copy."""
    reading, writing = os.pipe()
    try:
        with warnings.catch_warnings():
            # From Python 3.12 on: that threads may hold locks. The copy takes none.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _answer(work, writing)
    except OSError:  # there is no memory for another process
        os.close(reading)
        return None
    finally:
        os.close(writing)
    with open(reading, "rb") as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return int(said) if said.isdigit() else None


def _answer(work: Callable[[], Optional[int]], descriptor: int) -> NoReturn:
    try:
        faulthandler.disable()  # its own end is expected, and no part of the run's output
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE_SECONDS)
        found = work()
        if found is not None:
            os.write(descriptor, str(found).encode("ascii"))
    finally:
        os._exit(0)


def _used_bytes(interpreter: Any, model: Path, maps: Path) -> Optional[int]:
    files = mappings(maps.read_text(encoding="utf-8", errors="surrogateescape"), model)
    found: List[Tuple[int, int]] = []
    for detail in interpreter.get_tensor_details():  # those without a type are left out
        try:
            view = interpreter.tensor(detail["index"])()
        except (ValueError, RuntimeError):
            continue  # a delegate has taken it, so that it has no place
        begin = int(view.__array_interface__["data"][0])
        if not any(first <= begin < last for first, last in files):
            found.append((begin, begin + int(view.nbytes)))
    return covered(found) if found else None


def covered(spans: Sequence[Tuple[int, int]]) -> int:
    """Bytes that the spans cover together, gaps up to the alignment included."""
    total, end = 0, -ALIGNMENT - 1
    for begin, last in sorted(spans):
        if begin > end + ALIGNMENT:
            total += last - begin
        elif last > end:
            total += last - end
        end = max(end, last)
    return total


def mappings(text: str, model: Path) -> List[Tuple[int, int]]:
    """Addresses at which the model's file is mapped."""
    path = str(model.resolve())
    found = []
    for line in text.splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5] == path:
            begin, _, end = fields[0].partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found
