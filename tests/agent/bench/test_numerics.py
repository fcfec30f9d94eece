"""One model in two engines: what they compute is the same, as far as their arithmetic is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import inputs, runtimes
from boardbench.agent.bench.runtime import RuntimeUnavailable, Settings

from . import models
from .test_settings import convolution


def outputs_of(name: str, path: Path, settings: Settings | None = None) -> list[Any]:
    """The outputs of one inference on the data of seed 0, in their order."""
    runtime: Any = runtimes.create(name)
    try:
        runtime.version()
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
    more = {} if settings is None else {"settings": settings}
    model = runtime.load(path, device="cpu", threads=1, options={}, shapes={}, **more)
    try:
        found = model.fetch(model.bind(inputs.seeded(model.inputs, 0))())
        return [np.array(found[tensor.name]) for tensor in model.outputs]
    finally:
        model.close()


def apart(first: Any, second: Any) -> float:
    """The greatest difference as a share of the greatest magnitude."""
    assert first.shape == second.shape
    wide = first.astype(np.float64)
    return float(np.abs(wide - second.astype(np.float64)).max() / max(np.abs(wide).max(), 1e-30))


@pytest.mark.parametrize("make", [models.onnx_affine, convolution], ids=["affine", "convolution"])
def test_an_onnx_model_in_onnx_runtime_and_openvino(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make())
    (reference,) = outputs_of("onnxruntime", path)
    (found,) = outputs_of("openvino", path, Settings("float32"))
    assert np.abs(reference).max() > 0
    assert apart(reference, found) < 1e-5
    # In its own choice of arithmetic, which is bfloat16 where the processor has it.
    (found,) = outputs_of("openvino", path)
    assert apart(reference, found) < 3e-2


def test_a_tflite_model_in_litert_and_openvino(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(models.tflite_affine())
    (reference,) = outputs_of("tflite", path)
    (found,) = outputs_of("openvino", path, Settings("float32"))
    assert apart(reference, found) < 1e-6


@pytest.mark.parametrize(
    "name", ["mobilenet_v1_0.25_128_quant.tflite", "tf2_mobilenet_v2_1.0_224_ptq.tflite"]
)
def test_a_real_quantised_model_in_litert_and_openvino(shared_models: Path, name: str) -> None:
    """OpenVINO computes what is quantised in floating point: classes agree, and steps are few."""
    path = shared_models / name
    (reference,) = outputs_of("tflite", path)
    (found,) = outputs_of("openvino", path, Settings("float32"))
    assert reference.dtype == found.dtype
    steps = np.abs(reference.astype(np.int64) - found.astype(np.int64))
    assert steps.max() <= 8, "of 256"
    assert reference.argmax() in np.argsort(found.reshape(-1))[-5:]
