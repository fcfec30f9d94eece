"""Reports on small models that the tools owning the formats made (make_files.py), and on ONNX made here."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from boardbench.inspect import analyse, sniff
from boardbench.inspect.errors import InspectError, Malformed, UnknownFormat
from boardbench.inspect.report import Evidence, ModelReport, Unit, Verdict

# conv 3x16x16 → 4x8x8 by 3x3: 4*8*8*27; dense 256 → 10.
SMALL_MACS = 6912 + 2560


def _sums(report: ModelReport) -> bool:
    return sum(use.size_bytes for use in report.bytes) == report.size_bytes


def test_openvino(files: Path) -> None:
    report = analyse.inspect(files / "small.xml")
    assert (report.format, report.format_version) == ("openvino", "IR 11")
    assert report.op_types == {"Convolution": 1, "ReLU": 1, "Reshape": 1, "MatMul": 1, "SoftMax": 1}
    assert report.multiply_accumulates == SMALL_MACS
    assert report.parameter_count == 108 + 2560 + 2
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in report.inputs] == [
        ("x", "float32", (1, 3, 16, 16))
    ]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in report.outputs] == [
        ("scores", "float32", (1, 10))
    ]
    # The report is about the graph and the constants beside it.
    assert report.size_bytes == (files / "small.xml").stat().st_size + (files / "small.bin").stat().st_size
    assert _sums(report)
    conv = next(use for use in report.bytes if use.op_type == "Convolution")
    assert (conv.elements, conv.zero_elements) == (108, 27)
    assert report.arena_estimate_bytes


def test_openvino_without_its_constants(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "small.xml", tmp_path)
    report = analyse.inspect(tmp_path / "small.xml")
    assert "external_data" in {warning.code for warning in report.warnings}
    assert _sums(report)
    (tmp_path / "small.bin").write_bytes((files / "small.bin").read_bytes()[:100])
    with pytest.raises(Malformed, match="truncated, or that of another model"):
        analyse.inspect(tmp_path / "small.xml")


@pytest.mark.parametrize(
    "head",
    [
        '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>',
        '<!DOCTYPE net SYSTEM "file:///etc/passwd">',
    ],
)
def test_openvino_with_a_document_type_is_refused(tmp_path: Path, head: str) -> None:
    from boardbench.inspect.openvino import read_graph

    text = head + '<net name="&b;" version="11"><layers/><edges/></net>'
    with pytest.raises(Malformed, match="refused"):
        read_graph(memoryview(text.encode()))
    # In another encoding too, where a search for the word would not find it.
    with pytest.raises(Malformed, match="refused"):
        read_graph(memoryview(text.replace('<?xml version="1.0"?>', "").encode("utf-16")))


def test_executorch_portable(files: Path) -> None:
    report = analyse.inspect(files / "portable.pte")
    assert report.format == "executorch"
    assert [op.type for op in report.ops] == [
        "aten::convolution.out",
        "aten::relu.out",
        "aten::cumsum.out",
        "aten::permute_copy.out",
        "aten::addmm.out",
    ]
    assert report.parameter_count == 112 + 2570
    assert _sums(report)
    placement = report.placement
    assert placement is not None
    assert placement.evidence is Evidence.STATIC
    assert (placement.accelerated_ops, placement.cpu_ops) == (0, 5)
    assert placement.verdict is Verdict.NOT_ACCELERATED
    assert [(tensor.dtype, tensor.shape) for tensor in report.inputs] == [("float32", (1, 3, 16, 16))]
    assert [(tensor.dtype, tensor.shape) for tensor in report.outputs] == [("float32", (1, 10))]


def test_executorch_partly_delegated(files: Path) -> None:
    report = analyse.inspect(files / "xnnpack.pte")
    assert [(op.type, op.unit) for op in report.ops] == [
        ("XnnpackBackend", Unit.CPU_DELEGATE),
        ("aten::cumsum.out", Unit.CPU),
        ("XnnpackBackend", Unit.CPU_DELEGATE),
    ]
    assert report.placement is not None
    # How many operations a delegate took, and its parameters, are in its own data.
    assert report.placement.cpu_ops is None
    assert report.placement.cpu_op_types == {"aten::cumsum.out": 1}
    assert report.parameter_count is None
    assert _sums(report)


@pytest.mark.parametrize(("name", "kind"), [("small.pt", "TorchScript"), ("small.ptl", "lite interpreter")])
def test_torchscript(files: Path, name: str, kind: str) -> None:
    report = analyse.inspect(files / name)
    assert report.format == "torchscript"
    assert report.format_version.endswith(kind)
    assert report.op_count == 5
    assert {name.split(".")[0] for name in report.op_types} >= {"aten::relu", "aten::cumsum", "aten::linear"}
    assert report.parameter_count == 112 + 2570
    assert _sums(report)
    weights = next(use for use in report.bytes if use.purpose == "weights")
    assert (weights.dtype, weights.elements) == ("float32", 112 + 2570)


def test_torch_mobile_as_a_flatbuffer_is_what_it_is_as_an_archive(files: Path) -> None:
    archive = analyse.inspect(files / "mobile.ptl")
    report = analyse.inspect(files / "mobile_flatbuffer.ptl")
    assert report.format == "torchscript"
    assert report.format_version == "bytecode 9, lite interpreter (FlatBuffer)"
    assert [op.type for op in report.ops] == [op.type for op in archive.ops]
    assert report.op_count == 19
    assert report.parameter_count == archive.parameter_count == 30

    def weights(of: ModelReport) -> dict[str, tuple[int, int | None, int | None]]:
        return {
            use.dtype: (use.size_bytes, use.elements, use.zero_elements)
            for use in of.bytes
            if use.purpose == "weights"
        }

    assert weights(report) == weights(archive)
    assert set(weights(report)) == {"int64", "float32", "float64", "float16", "int8", "uint8"}
    assert _sums(report)
    # Nothing is left over: every byte but padding is known.
    assert "unreferenced" not in {use.purpose for use in report.bytes}
    # Arguments that are no tensors are no inputs.
    assert [tensor.name for tensor in report.inputs] == ["x"]
    assert sniff.check(files / "mobile_flatbuffer.ptl", "torchscript") is None


def test_torch_mobile_that_is_cut_off(files: Path, tmp_path: Path) -> None:
    data = (files / "mobile_flatbuffer.ptl").read_bytes()
    path = tmp_path / "half.ptl"
    for size in (60, 500, 2000, len(data) - 600):
        path.write_bytes(data[:size])
        with pytest.raises(Malformed, match="truncated or damaged"):
            analyse.inspect(path)
        assert "truncated" in (sniff.check(path, "torchscript") or "")


def test_coreml_neural_network(files: Path) -> None:
    report = analyse.inspect(files / "small.mlmodel")
    assert report.format == "coreml"
    assert report.format_version == "specification 4, neuralNetwork"
    assert [op.type for op in report.ops] == [
        "convolution",
        "activation",
        "reshapeStatic",
        "innerProduct",
        "softmaxND",
    ]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in report.inputs] == [
        ("x", "float32", (1, 3, 16, 16))
    ]
    assert _sums(report)
    assert report.producer.startswith("coremltools")


def test_coreml_package(files: Path, tmp_path: Path) -> None:
    report = analyse.inspect(files / "small.mlpackage")
    assert report.format_version == "specification 6, mlProgram"
    assert [op.type for op in report.ops] == ["conv", "relu", "reshape", "linear", "softmax"]
    assert report.multiply_accumulates == SMALL_MACS
    assert report.size_bytes == sum(
        p.stat().st_size for p in (files / "small.mlpackage").rglob("*") if p.is_file()
    )
    assert _sums(report)
    linear = next(use for use in report.bytes if use.op_type == "linear")
    assert linear.dtype == "float32"
    assert linear.elements in (2560, 2570)
    # Packed into a ZIP, as it travels, it says the same.
    packed = tmp_path / "small.mlpackage.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((files / "small.mlpackage").rglob("*")):
            archive.write(path, path.relative_to(files))
    again = analyse.inspect(packed)
    assert again.op_types == report.op_types
    assert again.multiply_accumulates == SMALL_MACS
    assert _sums(again)


def test_coreml_says_which_system_takes_it_and_which_sizes_are_open(files: Path) -> None:
    assert "run it on macOS 12 or iOS 15, or later" in _placement(files / "small.mlpackage")
    assert "run it on macOS 10.15 or iOS 13, or later" in _placement(files / "small.mlmodel")
    made = files.parents[1] / "coreml" / "affine_open.mlpackage"
    assert [tensor.shape for tensor in analyse.inspect(made).inputs] == [(-1, 4)]


def _placement(path: Path) -> str:
    placement = analyse.inspect(path).placement
    assert placement is not None
    return placement.detail


# ---- ONNX ------------------------------------------------------------------------------------------------


def _onnx(tmp_path: Path, **changes: object) -> Path:
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    weights[:2] = 0
    dense = rng.standard_normal((256, 10)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], name="conv", strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Flatten", ["r"], ["f"]),
            helper.make_node("Gemm", ["f", "d"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, changes.get("shape", [1, 3, 16, 16]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(dense, "d")],
    )
    model = helper.make_model(graph, producer_name="boardbench", opset_imports=[helper.make_opsetid("", 17)])
    path = tmp_path / "small.onnx"
    onnx.save(model, path, **changes.get("save", {}))
    return path


def test_onnx(tmp_path: Path) -> None:
    report = analyse.inspect(_onnx(tmp_path))
    assert report.format == "onnx"
    assert "opset 17" in report.format_version
    assert report.producer == "boardbench"
    assert report.op_types == {"Conv": 1, "Relu": 1, "Flatten": 1, "Gemm": 1}
    assert [op.name for op in report.ops] == ["conv", "r", "f", "y"]
    assert report.multiply_accumulates == SMALL_MACS
    assert report.parameter_count == 108 + 2560
    assert _sums(report)
    conv = next(use for use in report.bytes if use.op_type == "Conv")
    assert (conv.dtype, conv.size_bytes, conv.elements, conv.zero_elements) == ("float32", 432, 108, 54)
    # The input and, at the widest, what is computed of it.
    assert report.arena_estimate_bytes is not None
    assert report.arena_estimate_bytes >= (3 * 256 + 4 * 64) * 4


def test_onnx_with_an_open_batch(tmp_path: Path) -> None:
    report = analyse.inspect(_onnx(tmp_path, shape=["N", 3, 16, 16]))
    assert report.inputs[0].shape == (-1, 3, 16, 16)
    assert report.multiply_accumulates is None
    assert report.arena_estimate_bytes is None
    assert "open_shapes" in {warning.code for warning in report.warnings}


def test_onnx_with_constants_in_another_file(tmp_path: Path) -> None:
    save = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    report = analyse.inspect(_onnx(tmp_path, save=save))
    assert report.parameter_count == 108 + 2560
    warning = next(warning for warning in report.warnings if warning.code == "external_data")
    assert "weights.bin" in warning.message
    assert _sums(report)


def test_onnx_graphs_inside_operations(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["b"])],
        "b",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [4])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["cond"], ["y"], then_branch=branch, else_branch=branch)],
        "g",
        [
            helper.make_tensor_value_info("cond", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    path = tmp_path / "if.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    report = analyse.inspect(path)
    assert report.op_count == 1
    assert report.multiply_accumulates is None
    assert "nested_graphs" in {warning.code for warning in report.warnings}


LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda path: path.stem)
def test_onnx_shapes_are_those_of_the_onnx_project(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from boardbench.inspect import onnx as reader

    found: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    infer = reader.infer

    def keep(*arguments):
        found.update(infer(*arguments))
        return dict(found)

    monkeypatch.setattr(reader, "infer", keep)
    report = analyse.inspect(path)
    model = shape_inference.infer_shapes(onnx.load(path))
    expected = {
        value.name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in (*model.graph.value_info, *model.graph.output)
    }
    assert expected
    assert {name: found.get(name, ("", None))[1] for name in expected} == expected
    assert report.op_count == len(model.graph.node)
    assert report.op_types == {
        kind: sum(node.op_type == kind for node in model.graph.node) for kind in report.op_types
    }
    assert _sums(report)


KNOWN_MACS = {
    "light_resnet50": 4_089_184_256,
    "light_vgg19": 19_632_062_464,
    "light_squeezenet": 349_151_936,
}


@pytest.mark.parametrize("name", KNOWN_MACS)
def test_onnx_multiply_accumulates_of_known_networks(name: str) -> None:
    report = analyse.inspect(LIGHT / f"{name}.onnx")
    assert report.multiply_accumulates == KNOWN_MACS[name]


def test_onnx_agrees_with_the_runtime(tmp_path: Path) -> None:
    path = _onnx(tmp_path)
    report = analyse.inspect(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(tensor.name, list(tensor.shape)) for tensor in report.inputs] == [
        (value.name, value.shape) for value in session.get_inputs()
    ]
    assert [tensor.name for tensor in report.outputs] == [value.name for value in session.get_outputs()]


# ---- requests that do not fit ----------------------------------------------------------------------------


def test_requests_that_do_not_fit_the_format(tmp_path: Path, files: Path) -> None:
    path = _onnx(tmp_path)
    with pytest.raises(InspectError, match="convert it first"):
        analyse.inspect(path, target="edgetpu")
    with pytest.raises(InspectError, match="have an original"):
        analyse.inspect(path, original=files / "small.xml")
    with pytest.raises(InspectError, match="no rules are known for target 'jetson'"):
        analyse.inspect(path, target="jetson")
    with pytest.raises(InspectError, match="neither a board nor a size"):
        analyse.inspect(path, fits=["toaster"])


def test_files_that_are_no_models(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    (tmp_path / "text.tflite").write_text("hello")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(UnknownFormat, match="arrays and no model"):
        analyse.inspect(tmp_path / "a.npz")
    with pytest.raises(UnknownFormat, match="not a model format"):
        analyse.inspect(tmp_path / "text.tflite")
    with pytest.raises(Malformed, match=r"empty\.onnx: the file is empty"):
        analyse.inspect(tmp_path / "empty.onnx")
    with pytest.raises(UnknownFormat, match="no Core ML package"):
        analyse.inspect(tmp_path)
    with pytest.raises(InspectError, match="No such file"):
        analyse.inspect(tmp_path / "missing")


def test_closed_formats(tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"ftrt" + (239).to_bytes(4, "little") + bytes(100))
    report = analyse.inspect(engine)
    assert (report.format, report.format_version) == ("tensorrt", "serialization 239")
    assert "not_portable" in {warning.code for warning in report.warnings}
    assert _sums(report)
    module = tmp_path / "model.so"
    module.write_bytes(b"\x7fELF" + bytes(60) + b"\0face_GetInputSize\0face_Predict\0" + bytes(60))
    report = analyse.inspect(module)
    assert (report.format, report.format_version) == ("ell", "module face")
    assert _sums(report)
