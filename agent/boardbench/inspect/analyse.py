"""One file in, one report out."""

from __future__ import annotations

import gc
import hashlib
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, Optional, Sequence, Tuple

from boardbench.inspect.budget import Budget
from boardbench.inspect.content import Opened
from boardbench.inspect.errors import InspectError, Malformed, UnknownFormat, Unreadable
from boardbench.inspect.fit import EDGETPU_CACHE, fit, memory_of
from boardbench.inspect.ledger import Ledger
from boardbench.inspect.report import EDGETPU, Fit, ModelReport
from boardbench.inspect.sniff import sniff_bytes

TARGETS = (EDGETPU,)

_PIECE_BYTES = 1 << 20
# Module and function of each format's reader: only the one that is needed is imported, since importing
# all of them takes as long as reading a model.
_READERS: Dict[str, Tuple[str, str]] = {
    "coreml": ("coreml", "report"),
    "ell": ("opaque", "report_library"),
    "executorch": ("executorch", "report"),
    "onnx": ("onnx", "report"),
    "tensorrt": ("opaque", "report_engine"),
    "torchscript": ("torchscript", "report"),
}


def inspect(
    path: Path,
    *,
    original: Optional[Path] = None,
    target: str = "",
    fits: Sequence[str] = (),
) -> ModelReport:
    """What the model file says without being run.

    ``original`` is the file that ``path`` was compiled from; ``target`` asks for the placement on an
    accelerator, one of TARGETS; ``fits`` are boards, sizes or caches to fit into. Raises InspectError, whose
    message names the file.
    """
    if target and target not in TARGETS:
        raise InspectError(f"no rules are known for target {target!r}; known: {', '.join(TARGETS)}")
    for each in fits:
        memory_of(each)
    try:
        found = _inspect(path, original, target)
    except Unreadable:
        raise
    except InspectError as error:
        raise type(error)(f"{path}: {error}") from error
    return _with_fits(found, fits)


def _inspect(path: Path, original: Optional[Path], target: str) -> ModelReport:
    if path.is_dir():
        from boardbench.inspect import coreml

        if not (path / coreml.MANIFEST).is_file():
            raise UnknownFormat("a folder, and no Core ML package (.mlpackage)")
        found = coreml.report_folder(path)
        _refuse_request(found, original is not None, target)
        return found
    with Opened(path) as data:
        if original is None:
            return inspect_bytes(path.name, data, target=target, weights=path.with_suffix(".bin"))
        with Opened(original) as source:
            return inspect_bytes(path.name, data, original=source, target=target)


def inspect_bytes(
    name: str,
    data: memoryview,
    *,
    original: Optional[memoryview] = None,
    target: str = "",
    weights: Optional[Path] = None,
    budget: Optional[Budget] = None,
) -> ModelReport:
    """What the bytes say; ``weights`` is where OpenVINO's constants are. Raises InspectError.

    ``budget`` is the work that it may take; without one, what files of this size may.
    """
    # What is made here has no cycles, and lives to the end: looking for garbage in it takes a quarter of the
    # time for a large graph.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _inspect_bytes(name, data, original, target, weights, budget)
    finally:
        if collects:
            gc.enable()


def _inspect_bytes(
    name: str,
    data: memoryview,
    original: Optional[memoryview],
    target: str,
    weights: Optional[Path],
    budget: Optional[Budget],
) -> ModelReport:
    if len(data) == 0:
        raise Malformed("the file is empty")
    base = ModelReport(name, _digest(data), len(data), sniff_bytes(data))
    if budget is None:
        budget = Budget(len(data) + (0 if original is None else len(original)), base.format)
    if base.format == "tflite":
        from boardbench.inspect import tflite_report

        if original is None:
            return tflite_report.report(base, data, None, target, budget)
        if sniff_bytes(original) != "tflite":
            raise InspectError("the original of a compiled .tflite file is a .tflite file; this is none")
        found = tflite_report.report(base, data, original, target, budget)
        return replace(found, original_sha256=_digest(original))
    _refuse_request(base, original is not None, target)
    if base.format == "openvino":
        if bytes(data[:2]) == b"PK":
            raise UnknownFormat("an archive: unpack it, and inspect the .xml file in it")
        from boardbench.inspect import openvino

        return openvino.report(base, data, weights, budget)
    if base.format not in _READERS:
        what = "arrays and no model" if base.format == "npz" else "not a model format that is known"
        known = ", ".join(sorted((*_READERS, "openvino", "tflite")))
        more = "" if base.format else " (a board may know it by an engine from elsewhere: push it there)"
        raise UnknownFormat(f"{what}; inspected are {known}{more}")
    module, function = _READERS[base.format]
    read: Callable[[ModelReport, memoryview, Ledger], ModelReport] = getattr(
        importlib.import_module(f"boardbench.inspect.{module}"), function
    )
    return read(base, data, Ledger(budget))


def _refuse_request(base: ModelReport, original: bool, target: str) -> None:
    if original:
        raise InspectError(
            f"only .tflite files compiled for the Edge TPU have an original; this is {base.format}"
        )
    if target == EDGETPU:
        raise InspectError(f"the Edge TPU runs .tflite files, and this is {base.format}: convert it first")


def _digest(data: memoryview) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(data), _PIECE_BYTES):
        digest.update(data[start : start + _PIECE_BYTES])
    return digest.hexdigest()


def _with_fits(found: ModelReport, fits: Sequence[str]) -> ModelReport:
    asked = list(fits)
    if found.target == EDGETPU and EDGETPU_CACHE not in asked:
        asked.append(EDGETPU_CACHE)
    answers = [
        _cache_fit(found)
        if each.strip().lower() == EDGETPU_CACHE
        else fit(each, found.size_bytes, found.arena_estimate_bytes)
        for each in asked
    ]
    return replace(found, fits=tuple(answers))


def _cache_fit(found: ModelReport) -> Fit:
    available = memory_of(EDGETPU_CACHE)
    if found.edgetpu is not None:
        streamed = found.edgetpu.parameters_streamed_bytes
        needed = found.edgetpu.parameters_cached_bytes + streamed
        return Fit(
            EDGETPU_CACHE,
            needed,
            available,
            streamed == 0,
            f"by the compiler's own account: {streamed} bytes are sent at every inference"
            if streamed
            else "by the compiler's own account: all parameters are kept",
        )
    needed = sum(use.size_bytes for use in found.bytes if use.purpose == "weights")
    return Fit(
        EDGETPU_CACHE,
        needed,
        available,
        needed <= available,
        "all constants against the roughly 8 MB of the chip; what does not fit is sent at every inference",
    )
