"""The TensorFlow Lite writer: what is written is what a reader and the interpreter find."""

from __future__ import annotations

import struct
import sys
from typing import Any

import pytest

from boardbench.cli.tflite_build import BuildUnavailable, ModelBuilder, Options

pytest.importorskip("flatbuffers")
schema: Any = pytest.importorskip("ai_edge_litert.schema_py_generated")
np: Any = pytest.importorskip("numpy")


def _read(data: bytes) -> Any:
    return schema.ModelT.InitFromPackedBuf(data)


def test_every_part_is_found_again() -> None:
    model = ModelBuilder(description="what it is")
    graph = model.subgraph("first")
    image = graph.tensor("image", [-1, 4, 4, 2], "uint8", scale=0.5, zero_point=3)
    weights = graph.tensor(
        "weights", [2], "int8", data=b"\x01\xff", scale=[0.25, 0.5], zero_point=0, quantized_dimension=0
    )
    state = graph.tensor("state", [3], "float32", variable=True)
    words = graph.tensor("words", [1], "string")
    graph.operator("edgetpu-custom-op", [image, -1], [words], custom_options=b"\x07\x08", version=1)
    graph.operator("CUMSUM", [weights, state], [state], Options("CumsumOptions", {"reverse": True}))
    graph.operator("edgetpu-custom-op", [image], [words])
    graph.inputs(image)
    graph.outputs(words, state)
    second = model.subgraph("second")
    only = second.tensor("only", [], "int4")
    second.inputs(only)
    second.outputs(only)
    model.signature({"picture": image}, {"text": words}, key="read", subgraph=0)
    model.metadata("min_runtime_version", b"1.5.0")

    data = model.finish()
    read = _read(data)

    assert data[4:8] == b"TFL3"
    assert (read.version, read.description) == (3, b"what it is")
    first = read.subgraphs[0]
    assert [sub.name for sub in read.subgraphs] == [b"first", b"second"]
    assert [tensor.name for tensor in first.tensors] == [b"image", b"weights", b"state", b"words"]
    assert (list(first.inputs), list(first.outputs)) == ([image], [words, state])
    read_image = first.tensors[image]
    assert (list(read_image.shape), list(read_image.shapeSignature)) == ([1, 4, 4, 2], [-1, 4, 4, 2])
    assert read_image.type == schema.TensorType.UINT8
    assert (list(read_image.quantization.scale), list(read_image.quantization.zeroPoint)) == ([0.5], [3])
    assert list(first.tensors[weights].quantization.zeroPoint) == [0, 0]
    assert bytes(read.buffers[first.tensors[weights].buffer].data) == b"\x01\xff"
    assert first.tensors[state].isVariable and not read_image.isVariable
    assert read.subgraphs[1].tensors[0].type == schema.TensorType.INT4
    codes = [read.operatorCodes[op.opcodeIndex] for op in first.operators]
    assert [code.customCode for code in codes] == [b"edgetpu-custom-op", None, b"edgetpu-custom-op"]
    assert len(read.operatorCodes) == 2
    assert codes[1].builtinCode == schema.BuiltinOperator.CUMSUM
    assert codes[1].deprecatedBuiltinCode == 127
    assert bytes(first.operators[0].customOptions) == b"\x07\x08"
    assert list(first.operators[0].inputs) == [image, -1]
    assert first.operators[1].builtinOptions.reverse is True
    assert read.signatureDefs[0].signatureKey == b"read"
    assert read.signatureDefs[0].inputs[0].name == b"picture"
    assert read.metadata[0].name == b"min_runtime_version"
    assert bytes(read.buffers[read.metadata[0].buffer].data) == b"1.5.0"


def test_classes_that_take_no_arguments_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older flatbuffers generated them, in ai-edge-litert 1.4 for one."""

    def build() -> bytes:
        model = ModelBuilder()
        graph = model.subgraph()
        graph.tensor("image", [-1, 4], "uint8", data=b"\x01" * 4, scale=0.5, zero_point=3)
        graph.operator("CUMSUM", [0, 0], [0], Options("CumsumOptions", {"reverse": True}))
        model.signature({"picture": 0}, {"text": 0})
        model.metadata("min_runtime_version", b"1.5.0")
        return model.finish()

    expected = build()
    tables = {
        name: kind for name, kind in vars(schema).items() if name.endswith("T") and isinstance(kind, type)
    }
    for name, kind in tables.items():
        older = type(name, (kind,), {"__init__": lambda self, kind=kind: kind.__init__(self)})
        monkeypatch.setattr(schema, name, older)
    assert build() == expected


def test_constants_begin_on_sixteen_bytes() -> None:
    model = ModelBuilder()
    graph = model.subgraph()
    marks = [bytes([mark]) * 7 for mark in (0xA1, 0xA2, 0xA3)]
    for number, mark in enumerate(marks):
        graph.tensor(f"constant{number}", [7], data=mark)
    data = model.finish()
    assert [data.index(mark) % 16 for mark in marks] == [0, 0, 0]


def test_options_of_the_second_kind() -> None:
    model = ModelBuilder()
    graph = model.subgraph()
    value = graph.tensor("value", [1])
    options = Options("StablehloConcatenateOptions", {"dimension": 2})
    graph.operator("STABLEHLO_CONCATENATE", [value], [value], options)
    operator = _read(model.finish()).subgraphs[0].operators[0]
    assert operator.builtinOptionsType == 0
    assert operator.builtinOptions2.dimension == 2


def test_an_array_is_a_constant() -> None:
    model = ModelBuilder()
    graph = model.subgraph()
    graph.tensor("axes", [2], "int32", data=np.array([1, 2], np.int32))
    assert bytes(_read(model.finish()).buffers[1].data) == struct.pack("<2i", 1, 2)


def test_what_the_schema_lacks_is_named() -> None:
    graph = ModelBuilder().subgraph()
    with pytest.raises(ValueError, match="no element type 'INT9'"):
        graph.tensor("a", [1], "int9")
    with pytest.raises(ValueError, match="2 scales but 1 zero points"):
        graph.tensor("a", [2], scale=[1.0, 2.0], zero_point=[0])
    with pytest.raises(ValueError, match="no options table 'NoOptionsT'"):
        graph.operator("ADD", [], [], Options("NoOptions"))
    with pytest.raises(ValueError, match="Conv2DOptions has no field 'stride'; it has padding, strideW"):
        graph.operator("CONV_2D", [], [], Options("Conv2DOptions", {"stride": 1}))
    with pytest.raises(ValueError, match="no member of Padding 'FULL'"):
        graph.enum("Padding", "FULL")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(BuildUnavailable, match=r"package flatbuffers.*pip install 'boardbench\[demo\]'"):
        ModelBuilder()


def test_per_channel_quantisation_computes_what_it_says() -> None:
    interpreter_module: Any = pytest.importorskip("ai_edge_litert.interpreter")
    generator = np.random.default_rng(7)
    weights = generator.integers(-127, 128, (4, 1, 1, 3), dtype=np.int8)
    scales = np.array([0.01, 0.02, 0.005, 0.04])
    bias = generator.integers(-500, 500, 4, dtype=np.int32)
    model = ModelBuilder()
    graph = model.subgraph()
    data = graph.tensor("data", [1, 5, 5, 3], scale=0.1, zero_point=-4)
    kernel = graph.tensor("kernel", weights.shape, data=weights, scale=scales.tolist(), quantized_dimension=0)
    added = graph.tensor("added", [4], "int32", data=bias, scale=(0.1 * scales).tolist())
    output = graph.tensor("output", [1, 5, 5, 4], scale=0.7, zero_point=9)
    options = Options(
        "Conv2DOptions", {"padding": graph.enum("Padding", "VALID"), "strideH": 1, "strideW": 1}
    )
    graph.operator("CONV_2D", [data, kernel, added], [output], options, version=3)
    graph.inputs(data)
    graph.outputs(output)
    fed = generator.integers(-128, 128, (1, 5, 5, 3), dtype=np.int8)

    interpreter = interpreter_module.Interpreter(model_content=model.finish())
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], fed)
    interpreter.invoke()
    got = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    real = 0.1 * (fed.astype(float) + 4) @ (weights[:, 0, 0].astype(float) * scales[:, None]).T
    expected = np.clip(np.round((real + bias * 0.1 * scales) / 0.7) + 9, -128, 127)
    assert np.abs(got - expected).max() <= 1
    assert len(np.unique(got)) > 20
