"""One file in, one report out."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Optional, Sequence

from boardbench.inspect.content import Opened
from boardbench.inspect.errors import InspectError, Malformed, UnknownFormat
from boardbench.inspect.fit import EDGETPU_CACHE, fit, memory_of
from boardbench.inspect.onnx import report as report_onnx
from boardbench.inspect.report import ModelReport
from boardbench.inspect.sniff import sniff_bytes
from boardbench.inspect.tflite_report import EDGETPU
from boardbench.inspect.tflite_report import report as report_tflite

TARGETS = (EDGETPU,)

_PIECE_BYTES = 1 << 20


def inspect(
    path: Path,
    *,
    original: Optional[Path] = None,
    target: str = "",
    fits: Sequence[str] = (),
) -> ModelReport:
    """What the model file says without being run.

    ``original`` is the file that ``path`` was compiled from; ``target`` asks for the placement on an
    accelerator, one of TARGETS; ``fits`` are boards, sizes or caches to fit into. Raises InspectError.
    """
    if target and target not in TARGETS:
        raise InspectError(f"no rules are known for target {target!r}; known: {', '.join(TARGETS)}")
    for each in fits:
        memory_of(each)
    with Opened(path) as data:
        if len(data) == 0:
            raise Malformed(f"{path}: the file is empty")
        base = ModelReport(path.name, _digest(data), len(data), sniff_bytes(data))
        if base.format == "onnx":
            found = report_onnx(base, data)
        elif base.format != "tflite":
            raise UnknownFormat(f"{path}: not a model format that can be inspected")
        elif original is None:
            found = report_tflite(base, data, None, target)
        else:
            with Opened(original) as source:
                found = replace(report_tflite(base, data, source, target), original_sha256=_digest(source))
    return _with_fits(found, fits)


def _digest(data: memoryview) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(data), _PIECE_BYTES):
        digest.update(data[start : start + _PIECE_BYTES])
    return digest.hexdigest()


def _with_fits(found: ModelReport, fits: Sequence[str]) -> ModelReport:
    parameters = None
    if found.edgetpu is not None:
        parameters = found.edgetpu.parameters_cached_bytes + found.edgetpu.parameters_streamed_bytes
    elif any(use.purpose == "weights" for use in found.bytes):
        parameters = sum(use.size_bytes for use in found.bytes if use.purpose == "weights")
    asked = list(fits)
    if found.target == EDGETPU and EDGETPU_CACHE not in asked:
        asked.append(EDGETPU_CACHE)
    answers = [fit(each, found.size_bytes, found.arena_estimate_bytes, parameters) for each in asked]
    return replace(found, fits=tuple(answer for answer in answers if answer is not None))
