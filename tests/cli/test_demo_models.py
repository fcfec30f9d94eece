"""The demo's models: always the same, really running, and one with operations that XNNPACK leaves."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from boardbench.cli.demo_models import build_onnx, build_tflite
from boardbench.cli.tflite_build import BuildUnavailable

np: Any = pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def tflite_model() -> bytes:
    """The TensorFlow Lite model."""
    pytest.importorskip("flatbuffers")
    pytest.importorskip("ai_edge_litert.schema_py_generated")
    return build_tflite()


@pytest.fixture(scope="module")
def onnx_model() -> bytes:
    """The ONNX model."""
    pytest.importorskip("onnx")
    return build_onnx()


def _interpreter(model: bytes, **arguments: object) -> Any:
    module: Any = pytest.importorskip("ai_edge_litert.interpreter")
    interpreter = module.Interpreter(model_content=model, **arguments)
    interpreter.allocate_tensors()
    return interpreter


def _outputs(interpreter: Any, image: Any) -> tuple[Any, int]:
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
    interpreter.invoke()
    scores, label = (
        interpreter.get_tensor(detail["index"]).copy() for detail in interpreter.get_output_details()
    )
    return scores, int(label[0])


def test_tflite_bytes_are_the_same_at_every_call(tflite_model: bytes) -> None:
    assert build_tflite() == tflite_model
    assert 200_000 < len(tflite_model) < 1_000_000


def test_onnx_bytes_are_the_same_at_every_call(onnx_model: bytes) -> None:
    assert build_onnx() == onnx_model
    assert 200_000 < len(onnx_model) < 1_000_000


def test_tflite_answers_differ_with_the_input(tflite_model: bytes) -> None:
    interpreter = _interpreter(tflite_model)
    generator = np.random.default_rng(1)
    answers = [
        _outputs(interpreter, generator.integers(-128, 128, (1, 192, 192, 3), dtype=np.int8))
        for _ in range(10)
    ]
    assert len({label for _, label in answers}) >= 3
    for scores, label in answers:
        assert scores[0, label] == scores.max()
        assert ((scores.astype(int) + 128) / 256).sum() == pytest.approx(1, abs=0.1)


def test_tflite_signature_names_the_tensors(tflite_model: bytes) -> None:
    interpreter = _interpreter(tflite_model)
    assert interpreter.get_signature_list() == {
        "serving_default": {"inputs": ["image"], "outputs": ["label", "scores"]}
    }
    runner = interpreter.get_signature_runner()
    answer = runner(image=np.zeros((1, 192, 192, 3), np.int8))
    assert answer["scores"].shape == (1, 100)
    assert answer["label"].dtype == np.int64


def test_delegate_and_plain_kernels_agree(tflite_model: bytes) -> None:
    module: Any = pytest.importorskip("ai_edge_litert.interpreter")
    plain = _interpreter(
        tflite_model,
        experimental_op_resolver_type=module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    delegated = _interpreter(tflite_model)
    generator = np.random.default_rng(2)
    for _ in range(3):
        image = generator.integers(-128, 128, (1, 192, 192, 3), dtype=np.int8)
        scores = [_outputs(each, image)[0].astype(float).ravel() for each in (plain, delegated)]
        # Rounding differs by a step here and there and grows over 38 layers; another network's
        # answer, or another image's, has a correlation far below.
        assert np.corrcoef(*scores)[0, 1] > 0.95


def test_xnnpack_leaves_some_operations_and_takes_the_convolutions(tflite_model: bytes) -> None:
    operations = _interpreter(tflite_model)._get_ops_details()
    delegates = [op for op in operations if op["op_name"] == "DELEGATE"]
    if not delegates:
        pytest.skip("this interpreter has no default delegate for 8-bit models: nothing to leave out")
    producers = {tensor: op for op in operations if op["op_name"] != "DELEGATE" for tensor in op["outputs"]}
    taken: set[int] = set()
    for delegate in delegates:
        inputs, waiting = set(delegate["inputs"]), list(delegate["outputs"])
        while waiting:
            tensor = waiting.pop()
            producer = producers.get(tensor)
            if tensor not in inputs and producer is not None and producer["index"] not in taken:
                taken.add(producer["index"])
                waiting.extend(producer["inputs"])
    left = [op["op_name"] for op in operations if op["op_name"] != "DELEGATE" and op["index"] not in taken]
    # No XNNPACK release has had an operator for ARG_MAX; the 8-bit versions of the others may come.
    assert "ARG_MAX" in left
    assert set(left) <= {"HARD_SWISH", "SOFTMAX", "ARG_MAX"}
    assert len(taken) == len(producers) - len(left) >= 30


def test_onnx_runs_and_its_answers_differ(onnx_model: bytes) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_model, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(3)
    labels = set()
    for _ in range(10):
        image = generator.uniform(-1, 1, (1, 3, 160, 160)).astype(np.float32)
        scores, label = session.run(None, {"image": image})
        assert scores.shape == (1, 100)
        assert scores.sum() == pytest.approx(1, abs=1e-4)
        labels.add(int(label[0]))
    assert len(labels) >= 3


def test_onnx_loads_in_old_runtimes(onnx_model: bytes) -> None:
    onnx: Any = pytest.importorskip("onnx")
    model = onnx.load_from_string(onnx_model)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]


@pytest.mark.parametrize(("package", "build"), [("onnx", build_onnx), ("flatbuffers", build_tflite)])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, build: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BuildUnavailable, match=rf"package {package},.*pip install 'boardbench\[demo\]'"):
        build()
