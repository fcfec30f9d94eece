"""What every engine keeps to. A new engine adds a line to SUBJECTS and passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from boardbench.agent.bench import runtimes
from boardbench.testkit import EngineContract, Subject

from . import models, standins, torch_models


def relu_and_itself(x: Any) -> Any:
    """What all models compute but those of the fake engine, whose outputs are a pattern."""
    return np.maximum(x, 0) + x


SUBJECTS = (
    Subject(
        "fake",
        ".fake",
        models.fake,
        lambda: models.fake(batch=-1),
        environment={"BOARDBENCH_FAKE_RUNTIME": "1"},
    ),
    Subject(
        "tflite",
        ".tflite",
        models.tflite_affine,
        lambda: models.tflite_affine(batch=-1),
        computes=relu_and_itself,
    ),
    Subject(
        "onnxruntime",
        ".onnx",
        models.onnx_affine,
        lambda: models.onnx_affine(batch="N"),
        computes=relu_and_itself,
    ),
    # Relu and Add become one operation of its executed graph.
    Subject(
        "openvino",
        ".onnx",
        models.onnx_affine,
        lambda: models.onnx_affine(batch="N"),
        ops=1,
        computes=relu_and_itself,
    ),
    # A bundled input tells its sizes; others are given with the run.
    Subject("torch", ".ptl", torch_models.ptl_affine, computes=relu_and_itself),
    # Which dimensions are open its files do not say, only that some are.
    Subject("executorch", ".pte", torch_models.pte_affine, computes=relu_and_itself),
    # Compiled for one size and one number of threads.
    Subject(
        "ell",
        ".so",
        models.ell_affine,
        ops=1,
        shape=(1, 1, 4),
        threads=False,
        computes=relu_and_itself,
        environment={"BOARDBENCH_NATIVE_MODELS": "1"},
    ),
    Subject(
        "tensorrt",
        ".onnx",
        models.onnx_affine,
        lambda: models.onnx_affine(batch="N"),
        threads=False,
        device="gpu",
        computes=relu_and_itself,
        standin=standins.tensorrt,
    ),
    Subject(
        "coreml",
        ".mlpackage.zip",
        models.coreml_affine,
        lambda: models.coreml_affine(batch=-1),
        threads=False,
        computes=relu_and_itself,
        standin=standins.coremltools,
    ),
)


def test_every_engine_of_the_table_is_tested() -> None:
    assert {subject.name for subject in SUBJECTS} == {engine.name for engine in runtimes.ENGINES}


class TestContract(EngineContract):
    subjects = SUBJECTS
