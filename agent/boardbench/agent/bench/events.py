"""Events of the worker: one JSON object a line, on a descriptor of their own.

The engine may write to stdout and stderr whatever it likes: no event is ever there.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from typing import Any, Mapping

from boardbench.agent.bench.runtime import Profile
from boardbench.agent.domain import Measurement, Placement, Probed, Progress, Stage, Warning


def to_json(value: object) -> Any:
    """The proto3 JSON form, with the proto's field names, of a noun of the domain; None is left out."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: to_json(content) for name, content in fields if content is not None}
    if isinstance(value, Mapping):
        return {str(key): to_json(content) for key, content in value.items()}
    if isinstance(value, (list, tuple)):
        if value and type(value[0]) is int:  # a million samples: no call for each
            return list(value)
        return [to_json(content) for content in value]
    return value


class EventWriter:
    """Writes events to a descriptor, each complete before the call returns."""

    def __init__(self, descriptor: int) -> None:
        """Takes over ``descriptor``, which stays open until the process ends."""
        self._descriptor = descriptor
        self.ended = False
        """Whether it is told how the job ended: a result, a probe or an error."""

    def stage(self, stage: Stage) -> None:
        """A stage begins."""
        self._write({"event": "stage", "stage": stage.value})

    def progress(self, progress: Progress) -> None:
        """How far the stage is."""
        self._write({"event": "progress", "progress": to_json(progress)})

    def warning(self, warning: Warning) -> None:
        """A doubt; told once, and not again in the result."""
        self._write({"event": "warning", "warning": to_json(warning)})

    def ready(self) -> None:
        """Warmed up; the worker waits for the line ``go``."""
        self._write({"event": "ready"})

    def counted(self) -> None:
        """All that counts is measured; the worker goes on until the line ``stop``."""
        self._write({"event": "counted"})

    def result(self, measurement: Measurement) -> None:
        """The measurement. Nothing but a profile follows, and doubts about that."""
        self.ended = True
        self._write({"event": "result", "result": to_json(measurement)})

    def profiling(self) -> None:
        """After the result: the profiling pass begins, and its outcome will follow."""
        self._write({"event": "profiling"})

    def profile(self, placement: Placement) -> None:
        """The placement of the result, with what the profiling pass adds to it. Nothing follows."""
        self._write({"event": "profile", "placement": to_json(placement)})

    def trying(self, method: str) -> None:
        """From the profiling process: what it does next, in case that ends it."""
        self._write({"event": "trying", "method": method})

    def profiled(self, profile: Profile) -> None:
        """From the profiling process: what it found. Nothing follows."""
        self.ended = True
        self._write({"event": "profiled", "profile": to_json(profile)})

    def probe(self, found: Probed) -> None:
        """What engines there are. Nothing follows."""
        self.ended = True
        self._write({"event": "probe", **to_json(found)})

    def error(self, code: str, message: str) -> None:
        """Why there is no result. Nothing follows."""
        self.ended = True
        self._write({"event": "error", "error": {"code": code, "message": message}})

    def _write(self, event: Mapping[str, object]) -> None:
        # ASCII: a lone surrogate in a tensor's name must not end the run. NaN is no JSON: an error.
        line = json.dumps(event, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
        left = memoryview(line)
        while left:
            left = left[os.write(self._descriptor, left) :]
