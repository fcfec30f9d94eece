"""ONNX models of other types than float32, of open sizes and of text, in the real worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.testkit.child import BRIEF

from . import models

WEIGHTS = ((np.arange(8 * 4) % 7) - 3).reshape(4, 8)


def _model(nodes: Any, inputs: Any, outputs: Any, constants: dict[str, Any], **more: int) -> bytes:
    helper, _, finish = models._onnx_builder()
    from onnx import numpy_helper

    made = [helper.make_node(kind, takes, gives, **attributes) for kind, takes, gives, attributes in nodes]
    tensors = [helper.make_tensor_value_info(*each) for each in (*inputs, *outputs)]
    kept = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    content: bytes = finish(made, tensors[: len(inputs)], tensors[len(inputs) :], constants=kept, **more)
    return content


def float16() -> bytes:
    """x · W in half precision."""
    half = models._onnx_builder()[1].FLOAT16
    return _model(
        [("MatMul", ["x", "w"], ["m"], {}), ("Relu", ["m"], ["y"], {})],
        [("x", half, ["N", 4])],
        [("y", half, ["N", 8])],
        {"w": WEIGHTS.astype(np.float16)},
    )


def qdq() -> bytes:
    """x · W as quantisers write it now: values go through 8 bits between operations of floats."""
    kind = models._onnx_builder()[1].FLOAT
    return _model(
        [
            ("QuantizeLinear", ["x", "s", "z"], ["xq"], {}),
            ("DequantizeLinear", ["xq", "s", "z"], ["xd"], {}),
            ("DequantizeLinear", ["wq", "s", "z"], ["wd"], {}),
            ("MatMul", ["xd", "wd"], ["m"], {}),
            ("QuantizeLinear", ["m", "s", "z"], ["mq"], {}),
            ("DequantizeLinear", ["mq", "s", "z"], ["y"], {}),
        ],
        [("x", kind, ["N", 4])],
        [("y", kind, ["N", 8])],
        {"s": np.float32(0.25), "z": np.int8(0), "wq": (WEIGHTS * 4).astype(np.int8)},
    )


def qoperator() -> bytes:
    """x · W by an operator of 8 bits, 8 bits in and out."""
    kind = models._onnx_builder()[1].UINT8
    return _model(
        [("QLinearMatMul", ["x", "xs", "xz", "w", "s", "z", "s", "xz"], ["y"], {})],
        [("x", kind, ["N", 4])],
        [("y", kind, ["N", 8])],
        {
            "w": (WEIGHTS * 4).astype(np.int8),
            "s": np.float32(0.25),
            "z": np.int8(0),
            "xs": np.float32(0.125),
            "xz": np.uint8(128),
        },
    )


def dynamic() -> bytes:
    """x · W with a scale that is found in the data of every inference."""
    types = models._onnx_builder()[1]
    return _model(
        [
            ("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], {}),
            ("MatMulInteger", ["xq", "w", "xz"], ["m"], {}),
            ("Cast", ["m"], ["f"], {"to": types.FLOAT}),
            ("Mul", ["f", "xs"], ["y"], {}),
        ],
        [("x", types.FLOAT, ["N", 4])],
        [("y", types.FLOAT, ["N", 8])],
        {"w": WEIGHTS.astype(np.int8)},
    )


def text() -> bytes:
    """Whether words are the same."""
    types = models._onnx_builder()[1]
    return _model(
        [("Equal", ["a", "b"], ["y"], {})],
        [("a", types.STRING, ["N"]), ("b", types.STRING, ["N"])],
        [("y", types.BOOL, ["N"])],
        {},
        opset=19,
        ir=9,
    )


X = np.array([[1, 0.5, -0.25, 2], [0, 0, 1, -1], [0.75, 2, 2, 0.125]], np.float32)
PRODUCT = X @ WEIGHTS.astype(np.float32)
# Model, its input, its output, and how far that may be off by rounding.
CASES: dict[str, tuple[Callable[[], bytes], Any, Any, float]] = {
    "float16": (float16, X.astype(np.float16), np.maximum(PRODUCT, 0), 0.05),
    # The step is a quarter, half of which is lost on the way in, times weights of at most 3, and out.
    "qdq": (qdq, X, PRODUCT, 0.125 * 3 * 4 + 0.125),
    "qoperator": (qoperator, (X / 0.125 + 128).astype(np.uint8), PRODUCT / 0.25 + 128, 1),
    "dynamic": (dynamic, X, PRODUCT, 0.1),
}


@pytest.fixture
def run(worker: Any, tmp_path: Path) -> Any:
    pytest.importorskip("onnxruntime")

    def start(content: bytes, data: dict[str, Any] | None = None, **job: Any) -> Any:
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        given: dict[str, Any] = {}
        if data is not None:
            np.savez(tmp_path / "data.npz", **data)
            given["inputs_path"] = str(tmp_path / "data.npz")
        known = {"kind": "run", "runtime": "onnxruntime", "format": "onnx", "model_path": str(path)}
        return worker.run({**known, **BRIEF, **given, **job})

    return start


@pytest.mark.parametrize("name", CASES)
def test_it_computes_as_numpy_does_bound_once_or_not(run: Any, name: str) -> None:
    make, x, expected, most = CASES[name]
    digests = []
    for io_binding in ("off", "on"):
        outcome = run(make(), {"x": x}, options={"io_binding": io_binding}, output_values=100)
        assert outcome.exit_code == 0, outcome.output
        result = outcome.result
        assert result["inputs"] == [{"name": "x", "dtype": x.dtype.name, "shape": [3, 4]}]
        (values,) = result["output_values"]
        assert np.abs(np.array(values["values"]).reshape(3, 8) - expected).max() <= most
        assert result["placement"]["cpu_ops"] == len(result["placement"]["ops"]) > 0
        assert result["runtime"]["options"]["io_binding"] == io_binding
        digests.append(result["output_sha256"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", CASES)
def test_an_open_size_has_to_be_given_and_is_enough(run: Any, name: str) -> None:
    make = CASES[name][0]
    refused = run(make())
    assert refused.error["code"] == "inputs_rejected"
    assert "give them, for example --shape 'x=1,4'" in refused.error["message"]
    result = run(make(), shapes={"x": [5, 4]}).result
    assert [tensor["shape"] for tensor in result["outputs"]] == [[5, 8]]


def test_words_are_compared(run: Any) -> None:
    words = {"a": np.array(["one", "two"]), "b": np.array(["one", "drei"])}
    result = run(text(), words, output_values=10).result
    (values,) = result["output_values"]
    assert values["values"] == [1, 0]


def test_words_can_not_be_bound(run: Any) -> None:
    outcome = run(text(), shapes={"a": [2], "b": [2]}, options={"io_binding": "on"})
    assert outcome.error["code"] == "option_rejected"
    assert "io_binding=on is for numbers, and a, b of model.onnx is" in outcome.error["message"]


def test_numbers_in_the_place_of_words_are_refused(run: Any) -> None:
    outcome = run(text(), {"a": np.arange(2), "b": np.arange(2)})
    assert outcome.error["code"] == "inputs_rejected"
    assert "expected a str [2], b str [2]" in outcome.error["message"]
