"""How much work a file may cause, so that none takes long: a file can unfold into more than it is.

A step is what Python does in about half a microsecond of a laptop: a field of a protocol buffer, a third of a
table. Steps are bounded by the size of the file, which bounds the memory, and for every size by MOST_STEPS,
which bounds the time. Bytes that are looked at, each of which takes about a nanosecond, are bounded by the
size alone.
"""

from __future__ import annotations

from typing import Mapping

from boardbench.inspect.errors import Malformed, TooLarge

# A TensorFlow Lite file of 20,000 convolutions, far more than any for an edge board, takes 2,230,000; an ONNX
# file of 20,000 nodes takes 1,600,000.
MOST_STEPS = 2_250_000
# The densest real files are graphs without constants: TensorFlow Lite takes a step for some 5 bytes, ONNX for
# 2. What a step leaves in memory differs as much.
_STEPS_AT_LEAST, _BYTES_PER_STEP = 60_000, 2
_BYTES_PER_STEP_OF: Mapping[str, int] = {"tflite": 4, "executorch": 4, "onnx": 1, "coreml": 1}
# Every byte is looked at once, as a constant or as structure; writers share equal vectors and texts.
_LOOKS_PER_BYTE, _LOOKS_AT_LEAST = 2, 1 << 20
# What archives hold is text and small pickles beside the constants, which do not get smaller by packing.
_UNPACKED_PER_BYTE, _UNPACKED_AT_LEAST = 4, 16 << 20


class Budget:
    """What is left of the work that one report may take, on a file of that size and format.

    The readers of the file share one.

    Hot loops take from ``steps_left`` themselves and call :meth:`exhausted` below zero.
    """

    __slots__ = ("bytes_left", "most_steps", "steps_left", "unpacked_left")

    def __init__(self, size_bytes: int, format: str = "") -> None:
        bytes_per_step = _BYTES_PER_STEP_OF.get(format, _BYTES_PER_STEP)
        self.most_steps = min(MOST_STEPS, _STEPS_AT_LEAST + size_bytes // bytes_per_step)
        self.steps_left = self.most_steps
        self.bytes_left = size_bytes * _LOOKS_PER_BYTE + _LOOKS_AT_LEAST
        self.unpacked_left = size_bytes * _UNPACKED_PER_BYTE + _UNPACKED_AT_LEAST

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self.most_steps - self.steps_left

    def spend(self, steps: int, what: str) -> None:
        """Takes the steps; raises an error that begins with ``what`` when there are not as many."""
        self.steps_left -= steps
        if self.steps_left < 0:
            self.exhausted(what)

    def look(self, size_bytes: int, what: str) -> None:
        """Takes the bytes; raises Malformed when there are not as many."""
        self.bytes_left -= size_bytes
        if self.bytes_left < 0:
            raise Malformed(f"{what} refers to its own bytes too often: damaged, or made to harm")

    def beside(self, size_bytes: int) -> None:
        """Adds what a file of constants, beside the one with the structure, may be looked at."""
        self.bytes_left += size_bytes * _LOOKS_PER_BYTE

    def unpack(self, size_bytes: int, what: str) -> None:
        """Takes the bytes that something packed becomes; raises Malformed when there are not as many."""
        self.unpacked_left -= size_bytes
        if self.unpacked_left < 0:
            raise Malformed(f"{what} unpacks to far more than its size: damaged, or made to harm")

    def exhausted(self, what: str) -> None:
        """Raises the error for a file of which too much was read already."""
        if self.most_steps < MOST_STEPS:
            raise Malformed(f"{what} has more parts than any model of its size: damaged, or made to harm")
        raise TooLarge(
            f"{what} has more parts than are read here, which is enough for tens of thousands of operations: "
            "too large to be inspected, or made to harm"
        )
