"""Models made in code: TensorFlow Lite files, and what the Edge TPU compiler would leave of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from flatbuffers import flexbuffers

from boardbench.cli.tflite_build import GraphBuilder, ModelBuilder, Options
from boardbench.inspect.ledger import Ledger
from boardbench.inspect.tflite import Model, read_model

FILES = Path(__file__).resolve().parent / "files"


@pytest.fixture(scope="session")
def files() -> Path:
    """Folder of small models made by the tools that own the formats (make_files.py)."""
    return FILES


@dataclasses.dataclass
class Made:
    """A model in the making: a chain of tensors with quantisation, eight bits unless said otherwise."""

    builder: ModelBuilder
    graph: GraphBuilder

    def value(self, shape: Sequence[int], dtype: str = "int8", name: str | None = None) -> int:
        """A computed tensor."""
        self.count = getattr(self, "count", 0) + 1
        scale = 0.5 if dtype in ("int8", "uint8", "int16") else None
        return self.graph.tensor(name or f"t{self.count}", shape, dtype, scale=scale)

    def constant(
        self, values: object, dtype: str = "int32", name: str | None = None, zero_point: int = 0
    ) -> int:
        """A constant tensor; eight-bit ones are quantised."""
        self.count = getattr(self, "count", 0) + 1
        array = np.asarray(values, dtype=dtype)
        scale = 0.25 if dtype in ("int8", "uint8") else None
        return self.graph.tensor(
            name or f"c{self.count}", array.shape, dtype, data=array, scale=scale, zero_point=zero_point
        )

    def op(
        self,
        kind: str,
        inputs: Sequence[int],
        shape: Sequence[int],
        options: Options | None = None,
        *,
        dtype: str = "int8",
        version: int = 1,
    ) -> int:
        """An operation with one output; the output's number."""
        out = self.value(shape, dtype)
        self.graph.operator(kind, inputs, [out], options, version=version)
        return out

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The file."""
        self.graph.inputs(*inputs)
        self.graph.outputs(*outputs)
        return self.builder.finish()


@pytest.fixture
def make() -> Callable[[], Made]:
    """Begins a model."""

    def begin() -> Made:
        builder = ModelBuilder("boardbench test")
        return Made(builder, builder.subgraph())

    return begin


@pytest.fixture
def read() -> Callable[[bytes], Model]:
    """Reads a TensorFlow Lite file."""
    return lambda data: read_model(memoryview(data), Ledger())


@pytest.fixture
def conv_chain(make: Callable[[], Made]) -> Callable[..., bytes]:
    """A model of convolutions with other operations between them, each keeping shape (1, 8, 8, 4)."""

    def build(*kinds: str) -> bytes:
        made = make()
        first = value = made.value((1, 8, 8, 4), name="in")
        for number, kind in enumerate(kinds):
            if kind == "CONV_2D":
                weights = made.constant(np.full((4, 1, 1, 4), 3), "int8")
                bias = made.constant(np.zeros(4), "int32")
                options = Options("Conv2DOptions", {"strideH": 1, "strideW": 1})
                out = made.graph.tensor(f"out{number}", (1, 8, 8, 4), "int8", scale=0.5)
                made.graph.operator(kind, [value, weights, bias], [out], options)
            else:
                out = made.graph.tensor(f"out{number}", (1, 8, 8, 4), "int8", scale=0.5)
                made.graph.operator(kind, [value], [out])
            value = out
        return made.finish([first], [value])

    return build


@dataclasses.dataclass
class Node:
    """A compiled subgraph to put into a file: which operations of the original it replaces."""

    ops: Sequence[int]
    cached: int = 64
    streamed: int = 0
    runtime: int | None = 13


@pytest.fixture
def compile_like() -> Callable[..., bytes]:
    """Makes the file that the Edge TPU compiler would leave of an original, with given nodes."""
    return _compile_like


def _compile_like(original: bytes, nodes: Sequence[Node], *, rename: dict[str, str] | None = None) -> bytes:
    model = read_model(memoryview(original), Ledger())
    source = model.main
    rename = rename or {}
    builder = ModelBuilder("Exported from Subgraph.")
    graph = builder.subgraph()
    numbers: dict[int, int] = {}

    def tensor(index: int) -> int:
        if index < 0:
            return -1
        if index not in numbers:
            found = source.tensors[index]
            numbers[index] = graph.tensor(
                rename.get(found.name, found.name),
                found.fixed_shape,
                found.dtype,
                data=None if found.data is None else bytes(model.data[found.data[0] : found.data[1]]),
                scale=0.5 if found.dtype in ("int8", "uint8") else None,
            )
        return numbers[index]

    inside = {op: node_number for node_number, node in enumerate(nodes) for op in node.ops}
    done: set[int] = set()
    for operator in source.operators:
        node_number = inside.get(operator.index)
        if node_number is None:
            graph.operator(
                operator.type, [tensor(i) for i in operator.inputs], [tensor(i) for i in operator.outputs]
            )
            continue
        if node_number in done:
            continue
        done.add(node_number)
        node = nodes[node_number]
        made = {i for op in node.ops for i in source.operators[op].outputs}
        read = {i for op in node.ops for i in source.operators[op].inputs}
        outside = {
            i for other in source.operators if other.index not in node.ops for i in other.inputs
        } | set(source.outputs)
        graph.operator(
            "edgetpu-custom-op",
            [tensor(i) for i in sorted(read - made) if i >= 0 and not source.tensors[i].constant],
            [tensor(i) for i in sorted(made & outside)],
            custom_options=package_options(node.cached, node.streamed, node.runtime),
        )
    graph.inputs(*(tensor(i) for i in source.inputs))
    graph.outputs(*(tensor(i) for i in source.outputs))
    return builder.finish()


def package_options(cached: int, streamed: int, runtime: int | None) -> bytes:
    """The options of an ``edgetpu-custom-op``: a FlexBuffer map that holds a package."""
    executables = [_executable(2, streamed), _executable(1, cached)]
    builder = flatbuffers.Builder(0)
    offsets = [builder.CreateString(content) for content in executables]
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    vector = builder.EndVector()
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, vector, 0)
    builder.Finish(builder.EndObject())
    multi = bytes(builder.Output())
    builder = flatbuffers.Builder(0)
    content = builder.CreateByteVector(multi)
    compiler = builder.CreateString("cl/test")
    builder.StartObject(8)
    if runtime is not None:
        builder.PrependInt32Slot(0, runtime, 0)
    builder.PrependUOffsetTRelativeSlot(1, content, 0)
    builder.PrependUOffsetTRelativeSlot(4, compiler, 0)
    builder.Finish(builder.EndObject(), b"DWN1")
    package = bytes(builder.Output())
    flex = flexbuffers.Builder()
    with flex.Map():
        flex.Int("1", 0)
        flex.Key("4")
        # The package is a FlexBuffer string of any bytes, as the compiler writes it.
        flex._WriteBlob(package, append_zero=True, type_=flexbuffers.Type.STRING)
        flex.Int("5", -1)
    return bytes(flex.Finish())


def _executable(kind: int, parameters: int) -> bytes:
    builder = flatbuffers.Builder(0)
    chip = builder.CreateString("beagle")
    content = builder.CreateByteVector(
        bytes(range(256)) * (parameters // 256) + bytes(range(parameters % 256))
    )
    builder.StartObject(17)
    builder.PrependInt32Slot(3, 1, 0)
    builder.PrependInt32Slot(4, 32, 0)
    if parameters:
        builder.PrependUOffsetTRelativeSlot(6, content, 0)
    builder.PrependUOffsetTRelativeSlot(10, chip, 0)
    builder.PrependInt16Slot(13, kind, 0)
    builder.PrependUint64Slot(14, 0xABCDEF, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())
