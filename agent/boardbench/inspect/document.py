"""The report as a JSON document: protobuf's JSON form of ``boardbench.v1.ModelReport``, without protobuf.

The form (https://protobuf.dev/programming-guides/json/, with the proto's own field names): 64-bit integers
are strings, enum values are names, and what is empty or not set is left out. Importing protobuf takes longer
than reading a model; the tests hold both ways of writing a report against each other.
"""

from __future__ import annotations

import math
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, Callable, List, Mapping, Optional, Tuple

from boardbench.inspect.report import (
    ByteUse,
    EdgeTpuReport,
    Fit,
    ModelReport,
    OpPlacement,
    Placement,
    Quantization,
    ReportWarning,
    TensorInfo,
    UnitCount,
)

# How a field is written: "text", "number" (32 bits), "long" (64 bits), "real", "flag", "enum", "counts" (a
# map), "longs", or a message by its class, in a list with "many". The second word: 0 or False is told
# because it was set ("told"), or left out ("").
_Form = Tuple[Any, str]
FORMS: Mapping[type, Mapping[str, _Form]] = {
    Quantization: {"scale": ("real", ""), "zero_point": ("long", "told")},
    TensorInfo: {
        "name": ("text", ""),
        "dtype": ("text", ""),
        "shape": ("longs", ""),
        "quantization": (Quantization, ""),
    },
    OpPlacement: {
        "index": ("number", "told"),
        "type": ("text", ""),
        "name": ("text", ""),
        "unit": ("enum", ""),
        "delegate": ("text", ""),
        "cause": ("text", ""),
        "root_cause": ("flag", "told"),
        "remedy": ("text", ""),
    },
    UnitCount: {"unit": ("enum", ""), "ops": ("number", "")},
    Placement: {
        "evidence": ("enum", ""),
        "accelerated_ops": ("number", "told"),
        "cpu_ops": ("number", "told"),
        "accelerated_op_types": ("counts", ""),
        "cpu_op_types": ("counts", ""),
        "units": (UnitCount, "many"),
        "ops": (OpPlacement, "many"),
        "verdict": ("enum", ""),
        "detail": ("text", ""),
    },
    EdgeTpuReport: {
        "nodes": ("number", "told"),
        "parameters_cached_bytes": ("long", "told"),
        "parameters_streamed_bytes": ("long", "told"),
        "min_runtime_version": ("number", "told"),
        "scratch_bytes": ("long", "told"),
        "parameter_caching_token": ("long", "told"),
        "compiler_version": ("text", ""),
        "executables": ("number", "told"),
        "chip": ("text", ""),
    },
    ByteUse: {
        "purpose": ("text", ""),
        "dtype": ("text", ""),
        "op_type": ("text", ""),
        "size_bytes": ("long", ""),
        "zero_elements": ("long", "told"),
        "elements": ("long", "told"),
    },
    Fit: {
        "target": ("text", ""),
        "needed_bytes": ("long", ""),
        "available_bytes": ("long", ""),
        "fits": ("flag", "told"),
        "detail": ("text", ""),
    },
    ReportWarning: {"code": ("text", ""), "message": ("text", "")},
    ModelReport: {
        "name": ("text", ""),
        "sha256": ("text", ""),
        "size_bytes": ("long", ""),
        "format": ("text", ""),
        "format_version": ("text", ""),
        "producer": ("text", ""),
        "inputs": (TensorInfo, "many"),
        "outputs": (TensorInfo, "many"),
        "op_count": ("number", "told"),
        "op_types": ("counts", ""),
        "ops": (OpPlacement, "many"),
        "placement": (Placement, ""),
        "edgetpu": (EdgeTpuReport, ""),
        "parameter_count": ("long", "told"),
        "bytes": (ByteUse, "many"),
        "multiply_accumulates": ("long", "told"),
        "fits": (Fit, "many"),
        "warnings": (ReportWarning, "many"),
        "arena_estimate_bytes": ("long", "told"),
        "original_sha256": ("text", ""),
        "target": ("text", ""),
    },
}
_INDENT = "  "


def text(report: ModelReport, *, ascii_only: bool = False) -> str:
    """The document, indented by two, without a last newline; ``ascii_only`` escapes all other letters."""
    return _Writer(encode_basestring_ascii if ascii_only else encode_basestring).message(report, "")


class _Writer:
    """Writes a value with the indentation that it stands in; the fields' text is made once for each class."""

    def __init__(self, quote: Callable[[str], str]) -> None:
        self._quote = quote

    def message(self, value: Any, indent: str) -> str:
        inner = indent + _INDENT
        parts: List[str] = []
        for name, (form, more) in FORMS[type(value)].items():
            content = getattr(value, name)
            if content is None or not (content or more == "told" or form.__class__ is type or form == "real"):
                continue
            written = self._field(content, form, more, inner)
            if written is not None:
                parts.append(f'{inner}"{name}": {written}')
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}" if parts else "{}"

    def _field(self, content: Any, form: Any, more: str, indent: str) -> Optional[str]:
        if form == "text":
            return self._quote(_whole(content))
        if form == "number":
            return str(content)
        if form == "long":
            return f'"{content}"'
        if form == "flag":
            return "true" if content else "false"
        if form == "enum":
            # The first of an enum is what a field is that nobody set.
            return None if content.value.endswith("_UNSPECIFIED") else f'"{content.value}"'
        if form == "real":
            # A zero with a sign is not the zero that is left out.
            return _real(content) if content or math.copysign(1, content) < 0 else None
        if form == "longs":
            return self._lines("[", [f'"{each}"' for each in content], "]", indent)
        if form == "counts":
            pairs = [f"{self._quote(_whole(key))}: {count}" for key, count in content.items()]
            return self._lines("{", pairs, "}", indent)
        if more == "many":
            inner = indent + _INDENT
            return self._lines("[", [self.message(each, inner) for each in content], "]", indent)
        return self.message(content, indent)

    @staticmethod
    def _lines(begin: str, parts: List[str], end: str, indent: str) -> Optional[str]:
        if not parts:
            return None
        inner = f"\n{indent}{_INDENT}"
        return f"{begin}{inner}{f',{inner}'.join(parts)}\n{indent}{end}"


def _whole(content: str) -> str:
    """The text without halves of letters, which no encoding can hold."""
    return content if content.isascii() else content.encode("utf-8", "replace").decode("utf-8")


def _real(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return '"NaN"' if value != value else '"Infinity"' if value > 0 else '"-Infinity"'
