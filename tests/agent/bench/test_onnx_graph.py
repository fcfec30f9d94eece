"""ONNX nodes as models of their own, told apart from the file's bytes without the onnx package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.bench.runtimes import onnx_graph

from . import models


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def make(content: bytes) -> onnx_graph.Graph:
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        return onnx_graph.read(path)

    return make


def test_nodes_are_read_as_they_are(read: Any) -> None:
    graph = read(models.onnx_affine())
    assert [(node.index, node.name, node.op_type, node.inputs, node.outputs) for node in graph.nodes] == [
        (0, "relu", "Relu", ("x",), ("positive",)),
        (1, "add", "Add", ("positive", "x"), ("y",)),
    ]
    assert graph.ir_version == 8


@pytest.mark.parametrize(("before", "after"), [(False, False), (True, False), (True, True)])
def test_a_node_alone_is_a_model_that_the_checker_takes(read: Any, before: bool, after: bool) -> None:
    onnx = pytest.importorskip("onnx")
    graph = read(models.onnx_partly())
    shapes = {
        "r": ("float", (1, 1, 4, 4)),
        "f": ("float", (1, 16)),
        "u": ("float", (3,)),
        "y": ("float", (1,)),
    }
    node = graph.nodes[-1]
    content = onnx_graph.alone(graph, node, shapes, shapes, before=before, after=after)
    assert content is not None
    model = onnx.load_from_string(content)
    types = [each.op_type for each in model.graph.node]
    assert types == ["Abs"] * before + ["ReduceSum"] + ["Abs"] * after
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert inferred.opset_import[0].version == 17
    (source,) = model.graph.input
    assert [each.dim_value for each in source.type.tensor_type.shape.dim] == [3]


def test_constants_go_along(read: Any) -> None:
    onnx = pytest.importorskip("onnx")
    graph = read(models.onnx_gather(5))
    content = onnx_graph.alone(graph, graph.nodes[0], {"ids": ("int64", (8,))}, {"y": ("float", (8, 2))})
    assert content is not None
    model = onnx.load_from_string(content)
    assert [(each.name, list(each.dims)) for each in model.graph.initializer] == [("table", [5, 2])]
    assert [each.name for each in model.graph.input] == ["ids"]


def test_booleans_have_other_neighbours(read: Any) -> None:
    onnx = pytest.importorskip("onnx")
    graph = read(models.onnx_of_node("Not", dtype="BOOL"))
    typed = ("bool", (1, 4))
    content = onnx_graph.alone(graph, graph.nodes[0], {"x": typed}, {"y": typed}, before=True, after=True)
    assert [each.op_type for each in onnx.load_from_string(content).graph.node] == ["Not"] * 3


def test_what_can_not_be_made_is_not(read: Any) -> None:
    gather = read(models.onnx_gather(5))
    assert onnx_graph.alone(gather, gather.nodes[0], {}, {}) is None
    assert onnx_graph.alone(gather, gather.nodes[0], {"ids": ("string", (8,))}, {}) is None
    outside = read(models.onnx_of_external_data())
    assert outside.external == {"w"}
    assert onnx_graph.alone(outside, outside.nodes[0], {"x": ("float", (4,))}, {}) is None


def test_what_does_not_depend_on_an_input_is_not_computed(read: Any) -> None:
    assert [node.op_type for node in read(models.onnx_of_constants()).computed()] == ["Add"]


def test_sizes_are_those_of_the_elements() -> None:
    assert (
        onnx_graph.sizes_bytes([("float", (2, 3)), ("int64", ()), ("bool", (5,)), ("float16", (0, 4))]) == 37
    )
    assert onnx_graph.sizes_bytes([("string", (2,))]) is None


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"no model"])
def test_what_is_no_model_is_refused(read: Any, content: bytes) -> None:
    from boardbench.inspect.errors import InspectError

    with pytest.raises((ValueError, InspectError)):
        read(content)
