"""Small models for the engines, made in code; every function gives the bytes of a file."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest


def _tflite_builder() -> Any:
    build = pytest.importorskip("boardbench.cli.tflite_build")
    pytest.importorskip("flatbuffers")
    pytest.importorskip("ai_edge_litert.schema_py_generated")
    return build


def tflite_affine(*, batch: int = 1, names: tuple[str, str] = ("x", "y")) -> bytes:
    """Float [batch, 4] → RELU → ADD → float [batch, 4]; ``batch`` -1 leaves it open."""
    build = _tflite_builder()
    model = build.ModelBuilder()
    graph = model.subgraph()
    x = graph.tensor(names[0], [batch, 4], "float32")
    positive = graph.tensor("positive", [batch, 4], "float32")
    y = graph.tensor(names[1], [batch, 4], "float32")
    graph.operator("RELU", [x], [positive])
    graph.operator("ADD", [positive, x], [y], build.Options("AddOptions"))
    graph.inputs(x)
    graph.outputs(y)
    return bytes(model.finish())


def tflite_dead_end() -> bytes:
    """RELU, whose result is the output, and NEG, whose result nobody uses."""
    build = _tflite_builder()
    model = build.ModelBuilder()
    graph = model.subgraph()
    x, y, unused = (graph.tensor(name, [1, 4], "float32") for name in ("x", "y", "unused"))
    graph.operator("RELU", [x], [y])
    graph.operator("NEG", [x], [unused], build.Options("NegOptions"))
    graph.inputs(x)
    graph.outputs(y)
    return bytes(model.finish())


def tflite_small_and_large() -> bytes:
    """RELU on 16 floats, then TILE, POW and SUM on a million of them, then RELU6 on one.

    What is in between takes some 10 ms on a laptop, and what is around it nothing.
    """
    build = _tflite_builder()
    model = build.ModelBuilder()
    graph = model.subgraph()
    x, small = graph.tensor("x", [1, 16], "float32"), graph.tensor("small", [1, 16], "float32")
    large, power = (graph.tensor(name, [1024, 1024], "float32") for name in ("large", "power"))
    times = graph.tensor("times", [2], "int32", data=struct.pack("<2i", 1024, 64))
    exponent = graph.tensor("exponent", [1], "float32", data=_float(0.5))
    axes = graph.tensor("axes", [2], "int32", data=struct.pack("<2i", 0, 1))
    total, y = graph.tensor("total", [], "float32"), graph.tensor("y", [], "float32")
    graph.operator("RELU", [x], [small])
    graph.operator("TILE", [small, times], [large], build.Options("TileOptions"))
    graph.operator("POW", [large, exponent], [power], build.Options("PowOptions"))
    graph.operator("SUM", [power, axes], [total], build.Options("ReducerOptions"))
    graph.operator("RELU6", [total], [y])
    graph.inputs(x)
    graph.outputs(y)
    return bytes(model.finish())


def tflite_nameless() -> bytes:
    """Two inputs and two outputs without names, of different types."""
    build = _tflite_builder()
    model = build.ModelBuilder()
    graph = model.subgraph()
    a, c = graph.tensor("", [2], "float32"), graph.tensor("", [2], "float32")
    b, d = graph.tensor("", [3], "float32"), graph.tensor("", [3], "float32")
    graph.operator("RELU", [a], [c])
    graph.operator("RELU", [b], [d])
    graph.inputs(a, b)
    graph.outputs(c, d)
    return bytes(model.finish())


def tflite_while() -> bytes:
    """A loop: the operations of its body are in subgraphs of their own."""
    build = _tflite_builder()
    model = build.ModelBuilder()
    main, condition, body = model.subgraph("main"), model.subgraph("condition"), model.subgraph("body")
    x, y = main.tensor("x", [1], "float32"), main.tensor("y", [1], "float32")
    main.operator(
        "WHILE", [x], [y], build.Options("WhileOptions", {"condSubgraphIndex": 1, "bodySubgraphIndex": 2})
    )
    main.inputs(x)
    main.outputs(y)
    value, limit = (
        condition.tensor("v", [1], "float32"),
        condition.tensor("ten", [1], "float32", data=_float(10)),
    )
    less = condition.tensor("less", [1], "bool")
    condition.operator("LESS", [value, limit], [less], build.Options("LessOptions"))
    condition.inputs(value)
    condition.outputs(less)
    value, one = body.tensor("v", [1], "float32"), body.tensor("one", [1], "float32", data=_float(1))
    more = body.tensor("more", [1], "float32")
    body.operator("ADD", [value, one], [more], build.Options("AddOptions"))
    body.inputs(value)
    body.outputs(more)
    return bytes(model.finish())


def tflite_of_signatures(*, loop: bool = False) -> bytes:
    """Two signatures: ``add`` of the main graph, a + b; ``scale`` of the second, weights · x of open batch.

    The names that signatures give are others than those of the tensors. With ``loop`` a third graph, which no
    signature names, holds a loop.
    """
    build = _tflite_builder()
    model = build.ModelBuilder()
    main = model.subgraph()
    a, b, total = (main.tensor(name, [1, 4], "float32") for name in ("add_a:0", "add_b:0", "add_total:0"))
    main.operator("ADD", [a, b], [total], build.Options("AddOptions"))
    main.inputs(a, b)
    main.outputs(total)
    second = model.subgraph("scale")
    x, product = second.tensor("scale_x:0", [-1, 4], "float32"), second.tensor("product", [-1, 8], "float32")
    weights = second.tensor("weights", [8, 4], "float32", data=struct.pack("<32f", *range(32)))
    bias = second.tensor("bias", [8], "float32", data=struct.pack("<8f", *[0.0] * 8))
    y, negative = (
        second.tensor("scale_y:0", [-1, 8], "float32"),
        second.tensor("negative:0", [-1, 8], "float32"),
    )
    second.operator("FULLY_CONNECTED", [x, weights, bias], [product], build.Options("FullyConnectedOptions"))
    second.operator("RELU", [product], [y])
    second.operator("NEG", [product], [negative], build.Options("NegOptions"))
    second.inputs(x)
    second.outputs(negative, y)
    if loop:
        third = model.subgraph("loop")
        v, w = third.tensor("v", [1], "float32"), third.tensor("w", [1], "float32")
        third.operator(
            "WHILE", [v], [w], build.Options("WhileOptions", {"condSubgraphIndex": 3, "bodySubgraphIndex": 4})
        )
        third.inputs(v)
        third.outputs(w)
        condition, body = model.subgraph("condition"), model.subgraph("body")
        value, less = condition.tensor("v", [1], "float32"), condition.tensor("less", [1], "bool")
        condition.operator("LESS", [value, value], [less], build.Options("LessOptions"))
        condition.inputs(value)
        condition.outputs(less)
        value, more = body.tensor("v", [1], "float32"), body.tensor("more", [1], "float32")
        body.operator("ADD", [value, value], [more], build.Options("AddOptions"))
        body.inputs(value)
        body.outputs(more)
    model.signature({"left": a, "right": b}, {"sum": total}, key="add")
    model.signature({"features": x}, {"scaled": y, "flipped": negative}, key="scale", subgraph=1)
    return bytes(model.finish())


def tflite_of_open_output() -> bytes:
    """The places of the values above 0.5 in four floats: how many depends on the data."""
    build = _tflite_builder()
    model = build.ModelBuilder()
    graph = model.subgraph()
    x, half = graph.tensor("x", [4], "float32"), graph.tensor("half", [1], "float32", data=_float(0.5))
    above, places = graph.tensor("above", [4], "bool"), graph.tensor("places", [-1, 1], "int64")
    graph.operator("GREATER", [x, half], [above], build.Options("GreaterOptions"))
    graph.operator("WHERE", [above], [places], build.Options("WhereOptions"))
    graph.inputs(x)
    graph.outputs(places)
    return bytes(model.finish())


def tflite_of_unknown_ops(name: str, version: int = 1) -> bytes:
    """One operation that no engine has, or not in that version."""
    build = _tflite_builder()
    model = build.ModelBuilder()
    graph = model.subgraph()
    x, y = graph.tensor("x", [1, 4], "float32"), graph.tensor("y", [1, 4], "float32")
    graph.operator(name, [x], [y], version=version)
    graph.inputs(x)
    graph.outputs(y)
    return bytes(model.finish())


def _float(value: float) -> bytes:
    return struct.pack("<f", value)


def onnx_affine(*, batch: int | str = 1) -> bytes:
    """Float [batch, 4] → Relu → Add → float [batch, 4]; a text leaves the batch open."""
    helper, types, finish = _onnx_builder()
    x, y = (helper.make_tensor_value_info(name, types.FLOAT, [batch, 4]) for name in "xy")
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"], name="relu"),
        helper.make_node("Add", ["positive", "x"], ["y"], name="add"),
    ]
    return finish(nodes, [x], [y])


def onnx_of_node(node: str, *, domain: str = "", dtype: str = "FLOAT", opset: int = 17, ir: int = 8) -> bytes:
    """One node from x to y."""
    helper, types, finish = _onnx_builder()
    x, y = (helper.make_tensor_value_info(name, getattr(types, dtype), [1, 4]) for name in "xy")
    return finish(
        [helper.make_node(node, ["x"], ["y"], domain=domain)], [x], [y], opset=opset, ir=ir, domain=domain
    )


def onnx_of_two(first: str, second: str) -> bytes:
    """Two nodes, one after the other."""
    helper, types, finish = _onnx_builder()
    x, y = (helper.make_tensor_value_info(name, types.FLOAT, [1, 4]) for name in "xy")
    return finish([helper.make_node(first, ["x"], ["m"]), helper.make_node(second, ["m"], ["y"])], [x], [y])


def onnx_with_an_end(last: str) -> bytes:
    """Relu, Add and Mul of four floats, and a last node that takes what they make."""
    helper, types, finish = _onnx_builder()
    x = helper.make_tensor_value_info("x", types.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", types.FLOAT, None)
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu"),
        helper.make_node("Add", ["a", "x"], ["b"], name="add"),
        helper.make_node("Mul", ["b", "b"], ["c"], name="mul"),
        helper.make_node(last, ["c"], ["y"], name="last"),
    ]
    return finish(nodes, [x], [y])


def onnx_of_external_data() -> bytes:
    """Weights in a file of their own that is not there."""
    import onnx

    helper, types, finish = _onnx_builder()
    weight = onnx.TensorProto(name="w", data_type=types.FLOAT, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    x, y = (helper.make_tensor_value_info(name, types.FLOAT, [4]) for name in "xy")
    return finish([helper.make_node("Add", ["x", "w"], ["y"])], [x], [y], constants=[weight])


def onnx_of_sequence() -> bytes:
    """Two outputs: a tensor, and a sequence of tensors."""
    helper, types, finish = _onnx_builder()
    x, y = (helper.make_tensor_value_info(name, types.FLOAT, [2, 4]) for name in "xy")
    parts = helper.make_tensor_sequence_value_info("parts", types.FLOAT, None)
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("SplitToSequence", ["x"], ["parts"])]
    return finish(nodes, [x], [y, parts])


def onnx_of_division() -> bytes:
    """0 / 0 in the only output."""
    helper, types, finish = _onnx_builder()
    x, y = (helper.make_tensor_value_info(name, types.FLOAT, [4]) for name in "xy")
    nodes = [helper.make_node("Sub", ["x", "x"], ["zero"]), helper.make_node("Div", ["zero", "zero"], ["y"])]
    return finish(nodes, [x], [y])


def onnx_partly(*, keep: bool = True, unique: bool = True, named: bool = True) -> bytes:
    """Conv, Relu, Flatten, Unique, ReduceSum: every provider has the first three, and few have Unique.

    ``keep``: the sum keeps its dimension, else it is a number without any.
    """
    helper, types, finish = _onnx_builder()
    x = helper.make_tensor_value_info("x", types.FLOAT, [1, 3, 32, 32])
    y = helper.make_tensor_value_info("y", types.FLOAT, None)
    values = [((at * 7919) % 1000 - 500) / 500 for at in range(16 * 3 * 3 * 3)]
    weight = helper.make_tensor("w", types.FLOAT, [16, 3, 3, 3], values)

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs, [output], name=kind.lower() if named else "", **attributes)

    nodes = [
        node("Conv", ["x", "w"], "c", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], "r"),
        node("Flatten", ["r"], "f"),
        *([node("Unique", ["f"], "u")] if unique else []),
        node("ReduceSum", ["u" if unique else "f"], "y", keepdims=int(keep)),
    ]
    return finish(nodes, [x], [y], constants=[weight])


def onnx_cut_off() -> bytes:
    """Relu, Unique, Relu, Unique: two of what every provider has, cut off from each other."""
    helper, types, finish = _onnx_builder()
    x = helper.make_tensor_value_info("x", types.FLOAT, [1, 64])
    y = helper.make_tensor_value_info("y", types.FLOAT, None)
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu_a"),
        helper.make_node("Unique", ["a"], ["b"], name="unique_a"),
        helper.make_node("Relu", ["b"], ["c"], name="relu_b"),
        helper.make_node("Unique", ["c"], ["y"], name="unique_b"),
    ]
    return finish(nodes, [x], [y])


def onnx_of_constants() -> bytes:
    """Two constants added to a third, and that to the input."""
    helper, types, finish = _onnx_builder()
    x, y = (helper.make_tensor_value_info(name, types.FLOAT, [2]) for name in "xy")
    one, two = (helper.make_tensor(name, types.FLOAT, [2], [1.0, 2.0]) for name in ("one", "two"))
    nodes = [
        helper.make_node("Mul", ["one", "two"], ["product"]),
        helper.make_node("Neg", ["product"], ["negative"]),
        helper.make_node("Add", ["x", "negative"], ["y"]),
    ]
    return finish(nodes, [x], [y], constants=[one, two])


def onnx_gather(rows: int) -> bytes:
    """A table of that many rows, looked up: an index beyond it fails when the model runs."""
    helper, types, finish = _onnx_builder()
    ids = helper.make_tensor_value_info("ids", types.INT64, [8])
    y = helper.make_tensor_value_info("y", types.FLOAT, None)
    table = helper.make_tensor("table", types.FLOAT, [rows, 2], [0.5] * rows * 2)
    return finish([helper.make_node("Gather", ["table", "ids"], ["y"])], [ids], [y], constants=[table])


def _onnx_builder() -> tuple[Any, Any, Any]:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper

    def finish(
        nodes: Any,
        inputs: Any,
        outputs: Any,
        *,
        constants: Any = (),
        opset: int = 17,
        ir: int = 8,
        domain: str = "",
    ) -> bytes:
        graph = helper.make_graph(nodes, "graph", inputs, outputs, list(constants))
        opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
        data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=ir).SerializeToString()
        return data

    return helper, onnx.TensorProto, finish


def fake(*, batch: int = 1) -> bytes:
    """A model of the fake engine."""
    tensor = {"dtype": "float32", "shape": [batch, 4]}
    content = {
        "inputs": [{"name": "x", **tensor}],
        "outputs": [{"name": "y", **tensor}],
        "ops": [{"type": "RELU", "unit": "UNIT_TPU"}, {"type": "ADD", "unit": "UNIT_CPU"}],
    }
    return b"boardbench-fake/1\n" + json.dumps(content).encode()


def ell_affine(*defines: str) -> bytes:
    """A module of the Embedded Learning Library's interface: y = max(x, 0) + x on four floats, compiled here.

    ``defines`` choose variants, see ``tests/ell/module.c``. Skips the test where there is no C compiler.
    """
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang) to build a module with: install gcc")
    source = Path(__file__).resolve().parents[2] / "ell" / "module.c"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "module.so"
        command = [compiler, "-std=gnu11", "-O1", "-shared", "-fPIC", *(f"-D{each}" for each in defines)]
        subprocess.run([*command, "-o", os.fspath(made), os.fspath(source)], check=True)
        return made.read_bytes()


def coreml_affine(*, batch: int = 1) -> bytes:
    """A Core ML package as it travels: y = max(x, 0) + x on [batch, 4]; -1 leaves the batch open.

    Made by coremltools, see ``tests/coreml/make_models.py``.
    """
    name = "affine.mlpackage" if batch == 1 else "affine_open.mlpackage"
    return zipped(Path(__file__).resolve().parents[2] / "coreml" / name)


def zipped(folder: Path) -> bytes:
    """The files of a folder as an archive."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return packed.getvalue()
