"""Counts, sizes and costs on models and bytes whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boardbench.cli.tflite_build import ModelBuilder, Options
from boardbench.inspect import analyse
from boardbench.inspect.elements import BITS, count_zeros, element_count
from boardbench.inspect.errors import InspectError
from boardbench.inspect.fit import BOARDS, EDGETPU_CACHE, memory_of
from boardbench.inspect.ledger import Ledger
from boardbench.inspect.report import ModelReport

if TYPE_CHECKING:
    from .conftest import Made


def _report(data: bytes, **request: object) -> ModelReport:
    report = analyse.inspect_bytes("m", memoryview(data), **request)
    assert sum(use.size_bytes for use in report.bytes) == report.size_bytes == len(data)
    return report


# ---- elements --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "float32",
        "float64",
        "bool",
    ],
)
def test_zeros_are_those_that_numpy_counts(dtype: str) -> None:
    rng = np.random.default_rng(11)
    for size in (0, 1, 7, 1000, 300_000):
        values = rng.integers(0, 3, size).astype(dtype)
        assert count_zeros(memoryview(values.tobytes()), dtype) == int((values == 0).sum())
        assert element_count(values.nbytes, dtype) == size


def test_minus_zero_is_zero() -> None:
    for dtype in ("float16", "float32", "float64"):
        values = np.array([0.0, -0.0, 1.0, -1.0, np.nan], dtype)
        assert count_zeros(memoryview(values.tobytes()), dtype) == 2
    brain = np.array([0.0, -0.0, 2.0], np.float32).view(np.uint16)[1::2].tobytes()
    assert count_zeros(memoryview(brain), "bfloat16") == 2


def test_packed_elements() -> None:
    assert count_zeros(memoryview(bytes((0x00, 0x10, 0x01, 0x11))), "int4") == 4
    assert count_zeros(memoryview(bytes((0b00_01_00_11,))), "int2") == 2
    assert element_count(3, "int4") == 6


def test_types_of_no_size_have_no_count() -> None:
    assert count_zeros(memoryview(b"abc"), "str") is None
    assert element_count(3, "str") is None


@given(st.binary(max_size=500), st.integers(-128, 255))
def test_zero_point(data: bytes, zero_point: int) -> None:
    assert count_zeros(memoryview(data), "int8", zero_point) == data.count(zero_point & 0xFF)


# ---- ledger ----------------------------------------------------------------------------------------------


@given(
    st.binary(max_size=200),
    st.lists(st.tuples(st.integers(0, 250), st.integers(0, 250), st.sampled_from("abc")), max_size=20),
)
def test_every_byte_counts_once(data: bytes, claims: list[tuple[int, int, str]]) -> None:
    ledger = Ledger()
    for start, stop, purpose in claims:
        ledger.claim(start, stop, purpose)
    uses = ledger.uses(memoryview(data))
    assert sum(use.size_bytes for use in uses) == len(data)
    covered = {at for start, stop, _ in claims for at in range(start, min(stop, len(data)))}
    assert sum(use.size_bytes for use in uses if use.purpose in "abc") == len(covered)


def test_gaps_are_padding_or_unreferenced() -> None:
    ledger = Ledger()
    ledger.claim(2, 4, "x")
    ledger.at(4).claim(2, 3, "nested")
    uses = {use.purpose: use.size_bytes for use in ledger.uses(memoryview(b"\0\0abc\0de"))}
    assert uses == {"padding": 2, "x": 2, "nested": 1, "unreferenced": 3}


# ---- TensorFlow Lite -------------------------------------------------------------------------------------


def test_multiply_accumulates_of_every_counted_operation(make: Callable[[], Made]) -> None:
    made = make()
    first = made.value((1, 8, 8, 4))
    conv = made.op(
        "CONV_2D",
        [first, made.constant(np.ones((6, 3, 3, 4)), "int8"), made.constant(np.zeros(6))],
        (1, 4, 4, 6),
        Options("Conv2DOptions", {"strideH": 2, "strideW": 2}),
    )
    depth = made.op(
        "DEPTHWISE_CONV_2D",
        [conv, made.constant(np.ones((1, 3, 3, 6)), "int8"), made.constant(np.zeros(6))],
        (1, 4, 4, 6),
        Options("DepthwiseConv2DOptions", {"strideH": 1, "strideW": 1, "depthMultiplier": 1}),
    )
    up = made.op(
        "TRANSPOSE_CONV",
        [made.constant([1, 8, 8, 2]), made.constant(np.ones((2, 2, 2, 6)), "int8"), depth],
        (1, 8, 8, 2),
        Options("TransposeConvOptions", {"strideH": 2, "strideW": 2}),
    )
    flat = made.op("RESHAPE", [up, made.constant([1, 128])], (1, 128))
    dense = made.op(
        "FULLY_CONNECTED",
        [flat, made.constant(np.ones((10, 128)), "int8"), made.constant(np.zeros(10))],
        (1, 10),
        Options("FullyConnectedOptions"),
    )
    matrix = made.value((4, 10, 5))
    rows = made.op("BATCH_MATMUL", [made.value((4, 3, 10)), matrix], (4, 3, 5), Options("BatchMatMulOptions"))
    report = _report(made.finish([first], [dense, rows]))
    assert report.multiply_accumulates == (
        4 * 4 * 6 * (3 * 3 * 4) + 4 * 4 * 6 * 9 + 4 * 4 * 6 * (2 * 2 * 2) + 10 * 128 + 4 * 3 * 5 * 10
    )


def test_an_open_size_leaves_the_costs_open(make: Callable[[], Made]) -> None:
    made = make()
    first = made.value((-1, 16))
    filters, bias = made.constant(np.ones((4, 16)), "int8"), made.constant(np.zeros(4))
    out = made.op("FULLY_CONNECTED", [first, filters, bias], (-1, 4), Options("FullyConnectedOptions"))
    report = _report(made.finish([first], [out]))
    assert report.inputs[0].shape == (-1, 16)
    assert report.multiply_accumulates is None
    assert report.arena_estimate_bytes is None
    assert report.parameter_count == 64 + 4
    assert "open_shapes" in {warning.code for warning in report.warnings}


def test_arena_is_what_is_alive_at_once(make: Callable[[], Made]) -> None:
    made = make()
    # Each 1,024 bytes: a chain needs two at a time besides its input, a value that is kept one more.
    first = made.value((1, 1024))
    a = made.op("RELU", [first], (1, 1024))
    b = made.op("RELU", [a], (1, 1024))
    c = made.op("RELU", [b], (1, 1024))
    chain = _report(made.finish([first], [c]))
    assert chain.arena_estimate_bytes == 3 * 1024
    made = make()
    first = made.value((1, 1000))
    a = made.op("RELU", [first], (1, 1000))
    b = made.op("RELU", [a], (1, 1000))
    c = made.op("RELU", [b], (1, 1000))
    d = made.op("ADD", [a, c], (1, 1000))
    kept = _report(made.finish([first], [d]))
    # 1,000 bytes take 1,024: tensors begin at multiples of 64.
    assert kept.arena_estimate_bytes == 4 * 1024


def test_weights_are_told_by_type_and_operation(make: Callable[[], Made]) -> None:
    made = make()
    first = made.value((1, 4))
    filters = np.array([[0, 1, 2, 0]] * 4)
    out = made.op(
        "FULLY_CONNECTED",
        [first, made.constant(filters, "int8"), made.constant([0, 0, 5, 6])],
        (1, 4),
        Options("FullyConnectedOptions"),
    )
    report = _report(made.finish([first], [out]))
    weights = {(use.dtype, use.op_type): use for use in report.bytes if use.purpose == "weights"}
    filter_use = weights["int8", "FULLY_CONNECTED"]
    assert (filter_use.size_bytes, filter_use.elements, filter_use.zero_elements) == (16, 16, 8)
    bias_use = weights["int32", "FULLY_CONNECTED"]
    assert (bias_use.size_bytes, bias_use.elements, bias_use.zero_elements) == (16, 4, 2)


def test_quantised_zeros_are_the_zero_point(make: Callable[[], Made]) -> None:
    made = make()
    first = made.value((1, 4))
    weights = made.constant([[7, 7, 7, 0]], "uint8", zero_point=7)
    out = made.op("MUL", [first, weights], (1, 4), Options("MulOptions"))
    report = _report(made.finish([first], [out]))
    use = next(use for use in report.bytes if use.purpose == "weights")
    assert (use.elements, use.zero_elements) == (4, 3)


def test_what_else_is_in_a_file(make: Callable[[], Made]) -> None:
    made = make()
    first = made.value((1, 4))
    out = made.op("RELU", [first], (1, 4))
    made.builder.metadata("min_runtime_version", b"1.5.0" + bytes(11))
    made.builder.buffer(b"nobody reads this")
    made.builder.signature({"x": first}, {"y": out})
    data = made.finish([first], [out])
    report = _report(data)
    purposes = {use.purpose: use.size_bytes for use in report.bytes}
    assert purposes["metadata"] > 16
    assert purposes["unused constants"] == 17
    assert "unreferenced" not in purposes
    # Metadata tools append label files as a ZIP archive.
    packed = _report(data + b"PK\x03\x04" + b"labels" * 10)
    assert {use.purpose: use.size_bytes for use in packed.bytes}["associated files"] == 64
    strange = _report(data + b"something else entirely")
    assert {use.purpose: use.size_bytes for use in strange.bytes}["unreferenced"] == 23


def test_constants_behind_the_flatbuffer(make: Callable[[], Made]) -> None:
    """As in models beyond 2 GB: offset and size instead of bytes in the buffer."""
    from ai_edge_litert import schema_py_generated as schema

    made = make()
    first = made.value((1, 4))
    weights = made.constant([[1, 0, 3, 4]], "int8")
    out = made.op("MUL", [first, weights], (1, 4), Options("MulOptions"))
    made.graph.inputs(first)
    made.graph.outputs(out)
    buffers = made.builder._model.buffers
    buffers[1] = schema.BufferT(offset=2, size=4)
    size = len(made.builder.finish())
    buffers[1] = schema.BufferT(offset=size, size=4)
    data = made.builder.finish()
    assert len(data) == size
    report = _report(data + bytes((1, 0, 3, 4)))
    use = next(use for use in report.bytes if use.purpose == "weights")
    assert (use.size_bytes, use.elements, use.zero_elements) == (4, 4, 1)
    with pytest.raises(InspectError, match="outside the file"):
        analyse.inspect_bytes("m", memoryview(data))


def test_operations_beyond_the_first_graph_are_not_counted_into_costs() -> None:
    builder = ModelBuilder()
    main, body = builder.subgraph("main"), builder.subgraph("body")
    for graph in (main, body):
        first = graph.tensor("x", (1, 4), "int8", scale=0.5)
        out = graph.tensor("y", (1, 4), "int8", scale=0.5)
        graph.operator("WHILE" if graph is main else "RELU", [first], [out])
        graph.inputs(first)
        graph.outputs(out)
    report = _report(builder.finish())
    assert report.op_count == 1
    assert [op.type for op in report.ops] == ["WHILE"]
    assert report.multiply_accumulates is None
    assert "more_graphs" in {warning.code for warning in report.warnings}


def test_names_of_operations_beyond_the_old_numbers(make: Callable[[], Made]) -> None:
    made = make()
    first = made.value((1, 4))
    gelu = made.op("GELU", [first], (1, 4))
    custom = made.op("MyOwnOp", [gelu], (1, 4))
    report = _report(made.finish([first], [custom]))
    assert report.op_types == {"GELU": 1, "MyOwnOp": 1}
    assert "custom_operations" in {warning.code for warning in report.warnings}


def test_litert_reads_the_same(make: Callable[[], Made], conv_chain: Callable[..., bytes]) -> None:
    from ai_edge_litert.interpreter import Interpreter

    data = conv_chain("CONV_2D", "RELU", "TANH", "CONV_2D")
    interpreter = Interpreter(model_content=data)
    report = _report(data)
    assert [op["op_name"] for op in interpreter._get_ops_details() if op["op_name"] != "DELEGATE"] == [
        op.type for op in report.ops
    ]
    for told, mine in (
        (interpreter.get_input_details(), report.inputs),
        (interpreter.get_output_details(), report.outputs),
    ):
        assert [(each["name"], tuple(each["shape"]), np.dtype(each["dtype"]).name) for each in told] == [
            (each.name, each.shape, each.dtype) for each in mine
        ]
        for each, tensor in zip(told, mine, strict=True):
            assert tensor.quantization is not None
            assert each["quantization"] == (tensor.quantization.scale, tensor.quantization.zero_point)


# ---- does it fit -----------------------------------------------------------------------------------------


def test_sizes_and_boards() -> None:
    assert memory_of("512MiB") == 512 << 20
    assert memory_of("2GB") == 2_000_000_000
    assert memory_of("1.5 GiB") == 3 << 29
    assert memory_of("65536") == 65536
    assert memory_of("RaspberryPi4-1GB") == 1 << 30
    assert memory_of(EDGETPU_CACHE) == 8 << 20
    for wrong in ("", "toaster", "12 parsecs", "-1", "1e9", "9" * 30):
        with pytest.raises(InspectError, match="coral-dev-board"):
            memory_of(wrong)
    assert all(size > 1 << 20 for size in BOARDS.values())


def test_fits(tmp_path: Path, conv_chain: Callable[..., bytes]) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(conv_chain("CONV_2D", "RELU"))
    report = analyse.inspect(path, fits=["coral-dev-board", "100"], target="edgetpu")
    large, small, cache = report.fits
    assert (large.fits, small.fits, cache.fits) == (True, False, True)
    assert report.arena_estimate_bytes is not None
    assert small.needed_bytes == report.size_bytes + report.arena_estimate_bytes
    assert small.available_bytes == 100
    assert cache.target == EDGETPU_CACHE
    assert cache.needed_bytes == sum(use.size_bytes for use in report.bytes if use.purpose == "weights")


def test_bits_are_those_of_numpy() -> None:
    checked = 0
    for name, bits in BITS.items():
        try:
            dtype = np.dtype(name)
        except TypeError:
            continue
        # Where NumPy knows types below a byte, it gives each element a byte.
        if bits >= 8:
            assert dtype.itemsize * 8 == bits, name
            checked += 1
    assert checked >= 14


def test_every_warning_is_listed() -> None:
    import re

    from boardbench.inspect import doubts

    source = "".join(path.read_text() for path in Path(doubts.__file__).parent.glob("*.py"))
    used = set(re.findall(r'ReportWarning\(\s*"(\w+)"', source))
    assert used == set(doubts.WARNINGS)
