"""Broken model files out of good ones, the same ones for the same seed; and the loop that tries them.

python tests/inspect/mutate.py 100000        # so many, over the models in files/ and shared/models
"""

from __future__ import annotations

import random
import struct
import sys
import time
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from boardbench.inspect.analyse import inspect_bytes
from boardbench.inspect.errors import InspectError

NUMBERS = (0, 1, 2, 4, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC)


def mutate(data: bytes, random_numbers: random.Random) -> bytes:
    """One broken copy: a few small wounds, most of them near where structure is."""
    broken = bytearray(data)
    for _ in range(random_numbers.choice((1, 1, 1, 2, 3, 8))):
        size = len(broken)
        if size < 8:
            return bytes(broken)
        # Structure is at the ends of most formats, weights are in the middle.
        zone = random_numbers.random()
        limit = min(size, 4096) if zone < 0.5 else size
        at = random_numbers.randrange(limit)
        if zone > 0.8:
            at = size - 1 - random_numbers.randrange(min(size, 4096))
        kind = random_numbers.randrange(8)
        if kind == 0:
            broken[at] ^= 1 << random_numbers.randrange(8)
        elif kind == 1:
            broken[at] = random_numbers.randrange(256)
        elif kind == 2 and at + 4 <= size:
            value = random_numbers.choice((*NUMBERS, size, size - 4))
            broken[at : at + 4] = struct.pack("<I", value & 0xFFFFFFFF)
        elif kind == 3 and at + 4 <= size:
            value = struct.unpack_from("<I", broken, at)[0] + random_numbers.choice((-8, -4, -1, 1, 4, 8, 64))
            broken[at : at + 4] = struct.pack("<I", value & 0xFFFFFFFF)
        elif kind == 4:
            del broken[at:]
        elif kind == 5:
            del broken[at : at + random_numbers.randrange(1, 64)]
        elif kind == 6:
            start = random_numbers.randrange(size)
            broken[at:at] = broken[start : start + random_numbers.randrange(1, 256)]
        else:
            length = min(random_numbers.randrange(1, 64), size - at)
            broken[at : at + length] = bytes(length)
    return bytes(broken)


@dataclass
class Tried:
    """What became of the mutants."""

    mutants: int = 0
    reports: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    slowest: str = ""
    most_memory_ratio: float = 0.0


def mutants(models: Sequence[tuple[str, bytes]], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """``count`` broken files, over the models in turn."""
    for number in range(count):
        name, data = models[number % len(models)]
        yield f"{name}#{seed}.{number}", mutate(data, random.Random(f"{seed}.{number}"))


def attempt(broken: Iterable[tuple[str, bytes]], *, memory_every: int = 0) -> Tried:
    """Inspects every file; anything but a report or an InspectError goes through to the caller.

    TensorFlow Lite files are predicted for the Edge TPU too.
    """
    tried = Tried()
    for name, data in broken:
        measured = memory_every and tried.mutants % memory_every == 0
        if measured:
            tracemalloc.start()
        begin = time.process_time()
        try:
            report = inspect_bytes(name, memoryview(data), target="edgetpu" if ".tflite" in name else "")
            assert sum(use.size_bytes for use in report.bytes) == report.size_bytes, name
            tried.reports += 1
        except InspectError as error:
            assert str(error), name
            tried.refused += 1
        except Exception as error:
            error.args = (*error.args, name)
            raise
        finally:
            spent = time.process_time() - begin
            if measured:
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                # Half a megabyte of a report is the same for every size.
                ratio = max(0, peak - (1 << 19)) / max(1, len(data))
                tried.most_memory_ratio = max(tried.most_memory_ratio, ratio)
            elif spent > tried.slowest_seconds:
                tried.slowest_seconds, tried.slowest = spent, name
        tried.mutants += 1
    return tried


def real_models(folders: Sequence[Path], largest: int) -> list[tuple[str, bytes]]:
    """Model files in the folders, up to a size, smallest first."""
    paths = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".tflite", ".onnx", ".xml", ".pte", ".pt", ".ptl", ".mlmodel")
    ]
    sized = sorted((path.stat().st_size, path.name, path) for path in paths)
    return [(name, path.read_bytes()) for size, name, path in sized if size <= largest]


if __name__ == "__main__":
    here = Path(__file__).resolve()
    found = real_models([here.parent / "files", here.parents[2].parent / "shared" / "models"], 1 << 22)
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed_of_day = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    started = time.monotonic()
    print(attempt(mutants(found, total, seed_of_day), memory_every=200))  # noqa: T201
    print(f"{time.monotonic() - started:.0f} s")  # noqa: T201
