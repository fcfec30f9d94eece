"""TensorFlow Lite: signatures, open sizes in and out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench.runtime import InputsRejected, OptionRejected
from boardbench.agent.bench.runtimes import tflite, tflite_cut
from boardbench.agent.domain import Evidence, Unit
from boardbench.testkit.child import BRIEF
from boardbench.testkit.contract import available

from . import models


@pytest.fixture
def runtime() -> tflite.TfliteRuntime:
    return available(tflite.TfliteRuntime())


@pytest.fixture
def two(tmp_path: Path) -> Path:
    path = tmp_path / "two.tflite"
    path.write_bytes(models.tflite_of_signatures())
    return path


def load(runtime: tflite.TfliteRuntime, file: Path, **changes: Any) -> tflite.TfliteModel:
    shapes, options = changes.pop("shapes", {}), changes.pop("options", changes)
    return runtime.load(file, device="cpu", threads=None, options=options, shapes=shapes)


A, B = np.array([[1, 2, 3, 4]], np.float32), np.array([[10, 20, 30, -40]], np.float32)
X = np.array([[1, 0, 0, 0], [-1, 0, 0, 2], [0, 0, 1, 0]], np.float32)
PRODUCT = X @ np.arange(32, dtype=np.float32).reshape(8, 4).T


def test_without_a_signature_the_main_graph_runs_by_the_names_of_its_tensors(
    runtime: tflite.TfliteRuntime, two: Path
) -> None:
    model = load(runtime, two)
    assert [tensor.name for tensor in model.inputs] == ["add_a:0", "add_b:0"]
    outputs = model.fetch(model.bind({"add_a:0": A, "add_b:0": B})())
    assert np.array_equal(outputs["add_total:0"], A + B)


def test_a_signature_of_the_main_graph_gives_its_names(runtime: tflite.TfliteRuntime, two: Path) -> None:
    model = load(runtime, two, signature="add")
    assert [tensor.name for tensor in model.inputs] == ["left", "right"]
    outputs = model.fetch(model.bind({"left": A, "right": B})())
    assert np.array_equal(outputs["sum"], A + B)
    assert model.options["signature"] == "add"
    assert model.profiles
    assert [op.type for op in model.placement().ops] == ["ADD"]


@pytest.mark.parametrize("xnnpack", ["on", "off"])
def test_a_signature_of_another_graph_runs_that(
    runtime: tflite.TfliteRuntime, two: Path, xnnpack: str
) -> None:
    model = load(
        runtime, two, shapes={"features": (3, 4)}, options={"signature": "scale", "xnnpack": xnnpack}
    )
    assert [(tensor.name, tensor.shape) for tensor in model.inputs] == [("features", (3, 4))]
    assert [tensor.name for tensor in model.outputs] == ["flipped", "scaled"]
    call = model.bind({"features": X})
    for _ in range(3):
        outputs = model.fetch(call())
    assert np.allclose(outputs["scaled"], np.maximum(PRODUCT, 0))
    assert np.allclose(outputs["flipped"], -PRODUCT)
    assert not model.profiles
    found = model.placement()
    assert found.evidence is Evidence.PARTITION
    assert [op.type for op in found.ops] == ["FULLY_CONNECTED", "RELU", "NEG"]
    assert "(graph 1, as a second interpreter has it that runs it first)" in found.detail
    expected = {Unit.CPU_DELEGATE} if xnnpack == "on" else {Unit.CPU}
    assert {op.unit for op in found.ops} == expected
    model.close()
    model.close()


def test_an_unknown_signature_is_refused_with_those_that_there_are(
    runtime: tflite.TfliteRuntime, two: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionRejected, match="no signature 'serving_default'; it has add, scale"):
        load(runtime, two, signature="serving_default")
    plain = tmp_path / "plain.tflite"
    plain.write_bytes(models.tflite_affine())
    with pytest.raises(OptionRejected, match="it has none: leave the option out"):
        load(runtime, plain, signature="add")


def test_an_open_size_of_a_signature_has_to_be_given_by_its_name(
    runtime: tflite.TfliteRuntime, two: Path
) -> None:
    with pytest.raises(InputsRejected, match="features float32 \\[\\?, 4\\]; give them"):
        load(runtime, two, signature="scale")


def test_beside_loops_where_it_runs_is_not_known(runtime: tflite.TfliteRuntime, tmp_path: Path) -> None:
    path = tmp_path / "loop.tflite"
    path.write_bytes(models.tflite_of_signatures(loop=True))
    model = load(runtime, path, shapes={"features": (3, 4)}, options={"signature": "scale"})
    assert np.allclose(model.fetch(model.bind({"features": X})())["flipped"], -PRODUCT)
    found = model.placement()
    assert (found.evidence, found.ops) == (Evidence.UNSPECIFIED, ())
    assert "it can't be put first: it has control flow" in found.detail


def test_another_graph_can_lead_and_no_further_one(two: Path) -> None:
    content = two.read_bytes()
    assert tflite_cut.led_by(tflite_cut.led_by(content, 1), 1) == tflite_cut.led_by(content, 0)
    with pytest.raises(tflite_cut.CanNotCut, match="it has 2 graphs, and none of the number 2"):
        tflite_cut.led_by(content, 2)
    for cut in range(0, len(content), 97):
        try:
            tflite_cut.led_by(content[:cut], 1)
        except tflite_cut.CanNotCut:
            pass


OTHER = os.environ.get("BOARDBENCH_TFLITE_RUNTIME_PYTHON", "")


@pytest.mark.parametrize("package", ["ai-edge-litert", "tflite-runtime"])
def test_the_worker_runs_a_signature_in_both_packages(worker: Any, two: Path, package: str) -> None:
    python = OTHER if package == "tflite-runtime" else sys.executable
    if not python:
        pytest.skip("set BOARDBENCH_TFLITE_RUNTIME_PYTHON to a Python that has tflite-runtime")
    outcome = worker.run(
        {"kind": "run", "runtime": "tflite", "format": "tflite", "model_path": str(two), **BRIEF,
         "options": {"signature": "scale"}, "shapes": {"features": [3, 4]}, "profile_runs": 5},
        python=python,
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    result = outcome.result
    assert result["runtime"]["version"].startswith(package)
    assert result["effective_spec"]["options"]["signature"] == "scale"
    assert [(each["name"], each["shape"]) for each in result["outputs"]] == [
        ("flipped", [3, 8]), ("scaled", [3, 8]),
    ]  # fmt: skip
    assert [op["type"] for op in result["placement"]["ops"]] == ["FULLY_CONNECTED", "RELU", "NEG"]
    assert outcome.of("profile") == []


def test_an_output_of_open_size_has_the_size_of_the_first_inference(worker: Any, tmp_path: Path) -> None:
    path = tmp_path / "open.tflite"
    path.write_bytes(models.tflite_of_open_output())
    data = tmp_path / "data.npz"
    np.savez(data, x=np.array([0.9, 0.1, 0.8, 0.7], np.float32))
    job = {"kind": "run", "runtime": "tflite", "format": "tflite", "model_path": str(path)}
    result = worker.run({**job, **BRIEF, "inputs_path": str(data)}).result
    (output,) = result["outputs"]
    assert (output["name"], output["dtype"], output["shape"]) == ("places", "int64", [3, 1])
