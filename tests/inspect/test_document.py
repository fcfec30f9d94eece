"""The report's JSON, written without protobuf, against what protobuf makes of the same report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from boardbench.cli.inspect import report_message
from boardbench.inspect import analyse, document
from boardbench.inspect.report import (
    ByteUse,
    EdgeTpuReport,
    Evidence,
    Fit,
    ModelReport,
    OpPlacement,
    Placement,
    Quantization,
    ReportWarning,
    TensorInfo,
    Unit,
    UnitCount,
    Verdict,
)
from boardbench.v1 import report_pb2


def _by_protobuf(report: ModelReport) -> dict[str, Any]:
    return json_format.MessageToDict(report_message(report), preserving_proto_field_name=True)


def _same(report: ModelReport) -> None:
    expected = _by_protobuf(report)
    for ascii_only in (False, True):
        text = document.text(report, ascii_only=ascii_only)
        found = json.loads(text)
        assert found == expected
        # To the letter as json writes it: what reads it may go by lines.
        assert text == json.dumps(found, indent=2, ensure_ascii=ascii_only)
        assert not ascii_only or text.isascii()


def test_reports_on_files(files: Path, conv_chain: Callable[..., bytes]) -> None:
    for path in sorted(files.iterdir()):
        if path.suffix != ".bin":
            _same(analyse.inspect(path, fits=["1GB", "1"]))
    data = memoryview(conv_chain("CONV_2D", "LEAKY_RELU", "CONV_2D"))
    _same(analyse.inspect_bytes("m.tflite", data))
    _same(analyse.inspect_bytes("m.tflite", data, target="edgetpu"))


def test_reports_on_real_models(shared_models: Path) -> None:
    for path in sorted(shared_models.glob("*.tflite")):
        _same(analyse.inspect(path))
        _same(analyse.inspect(path, target="edgetpu"))


_texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
_small, _large = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 63) - 1)
_counts = st.dictionaries(_texts, _small, max_size=3)
_tensors = st.builds(
    TensorInfo,
    _texts,
    _texts,
    st.lists(st.integers(-1, 1 << 62), max_size=3).map(tuple),
    st.none() | st.builds(Quantization, st.floats(), st.integers(-(1 << 63), (1 << 63) - 1)),
)
_ops = st.builds(
    OpPlacement,
    _small,
    _texts,
    _texts,
    st.sampled_from(Unit),
    _texts,
    _texts,
    st.none() | st.booleans(),
    _texts,
)
_maybe_small, _maybe_large = st.none() | _small, st.none() | _large
_placements = st.builds(
    Placement,
    st.sampled_from(Evidence),
    _maybe_small,
    _maybe_small,
    _counts,
    _counts,
    st.lists(st.builds(UnitCount, st.sampled_from(Unit), _small), max_size=2).map(tuple),
    st.lists(_ops, max_size=2).map(tuple),
    st.sampled_from(Verdict),
    _texts,
)
_edgetpus = st.builds(
    EdgeTpuReport, _small, _large, _large, _maybe_small, _large, _maybe_large, _texts, _small, _texts
)
_reports = st.builds(
    ModelReport,
    name=_texts,
    sha256=_texts,
    size_bytes=_large,
    format=_texts,
    format_version=_texts,
    producer=_texts,
    inputs=st.lists(_tensors, max_size=2).map(tuple),
    outputs=st.lists(_tensors, max_size=2).map(tuple),
    op_count=_maybe_small,
    op_types=_counts,
    ops=st.lists(_ops, max_size=2).map(tuple),
    placement=st.none() | _placements,
    edgetpu=st.none() | _edgetpus,
    parameter_count=_maybe_large,
    bytes=st.lists(
        st.builds(ByteUse, _texts, _texts, _texts, _large, _maybe_large, _maybe_large), max_size=2
    ).map(tuple),
    multiply_accumulates=_maybe_large,
    fits=st.lists(st.builds(Fit, _texts, _large, _large, st.booleans(), _texts), max_size=2).map(tuple),
    warnings=st.lists(st.builds(ReportWarning, _texts, _texts), max_size=2).map(tuple),
    arena_estimate_bytes=_maybe_large,
    original_sha256=_texts,
    target=_texts,
)


@given(_reports)
@settings(deadline=None, max_examples=50)
def test_reports_of_anything(report: ModelReport) -> None:
    _same(report)


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_has_none_of(scale: float) -> None:
    _same(ModelReport("m", "", 1, "tflite", inputs=(TensorInfo("x", "int8", (), Quantization(scale, 0)),)))


def test_halves_of_letters_do_not_get_out() -> None:
    # Names of files may hold them; protobuf refuses such text.
    text = document.text(ModelReport("m\udcff", "", 1, "tflite"))
    assert json.loads(text)["name"] == "m?"


_KINDS = {
    FieldDescriptor.TYPE_STRING: "text",
    FieldDescriptor.TYPE_UINT32: "number",
    FieldDescriptor.TYPE_INT64: "long",
    FieldDescriptor.TYPE_UINT64: "long",
    FieldDescriptor.TYPE_DOUBLE: "real",
    FieldDescriptor.TYPE_BOOL: "flag",
    FieldDescriptor.TYPE_ENUM: "enum",
}


def test_the_forms_are_those_of_the_proto() -> None:
    def check(kind: type, message: Descriptor) -> None:
        assert list(document.FORMS[kind]) == [field.name for field in dataclasses.fields(kind)]
        for name, (form, more) in document.FORMS[kind].items():
            field = message.fields_by_name[name]
            if isinstance(form, type):
                assert (more == "many") == field.is_repeated
                assert field.message_type is not None
                check(form, field.message_type)
            elif form == "counts":
                assert field.message_type is not None
                assert field.message_type.GetOptions().map_entry
                assert field.message_type.fields_by_name["value"].type == FieldDescriptor.TYPE_UINT32
            elif form == "longs":
                assert field.is_repeated
                assert field.type == FieldDescriptor.TYPE_INT64
            else:
                assert form == _KINDS[field.type], name
                assert (more == "told") == field.has_presence, name

    check(ModelReport, report_pb2.ModelReport.DESCRIPTOR)
