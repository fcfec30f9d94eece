"""Writes the models beside it with Apple's coremltools, which runs on Linux, too: ``make_models.py``."""

from __future__ import annotations

from pathlib import Path

import coremltools as ct
from coremltools.converters.mil import Builder as mb

HERE = Path(__file__).resolve().parent


@mb.program(input_specs=[mb.TensorSpec(shape=(1, 4))])
def affine(x):
    return mb.add(x=mb.relu(x=x, name="positive"), y=x, name="y")


@mb.program(input_specs=[mb.TensorSpec(shape=(ct.converters.mil.mil.get_new_symbol(), 4))])
def affine_open(x):
    return mb.add(x=mb.relu(x=x, name="positive"), y=x, name="y")


ios15 = {"minimum_deployment_target": ct.target.iOS15, "compute_precision": ct.precision.FLOAT32}
ct.convert(affine, convert_to="mlprogram", **ios15).save(str(HERE / "affine.mlpackage"))
size = ct.RangeDim(lower_bound=1, upper_bound=64, default=1)
shape = ct.TensorType("x", shape=ct.Shape((size, 4)))
ct.convert(affine_open, convert_to="mlprogram", inputs=[shape], **ios15).save(
    str(HERE / "affine_open.mlpackage")
)
