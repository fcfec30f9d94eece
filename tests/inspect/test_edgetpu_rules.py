"""Each rule of the Edge TPU compiler with a model that breaks it and one that keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from boardbench.cli.tflite_build import Options
from boardbench.inspect import edgetpu, edgetpu_rules
from boardbench.inspect.edgetpu_rules import Context, Reason, why_not
from boardbench.inspect.report import Unit, Verdict
from boardbench.inspect.tflite import Model

if TYPE_CHECKING:
    from .conftest import Made

Make = Callable[[], "Made"]
Read = Callable[[bytes], Model]
Build = Callable[["Made"], tuple[list[int], list[int]]]


def _conv(made: Made, *, dtype: str = "int8", batch: int = 1, weights: str = "int8", **options: int) -> Build:
    first = made.value((batch, 8, 8, 4), dtype)
    filters = made.constant(np.ones((4, 3, 3, 4)), weights)
    bias = made.constant(np.zeros(4), "int32")
    out = made.op(
        "CONV_2D", [first, filters, bias], (batch, 8, 8, 4), Options("Conv2DOptions", options), dtype=dtype
    )
    return [first], [out]


def _simple(kind: str, before: tuple[int, ...], after: tuple[int, ...], **more: object):
    def build(made: Made) -> tuple[list[int], list[int]]:
        first = made.value(before, more.get("dtype", "int8"))
        inputs = [first]
        inputs += [made.constant(values, dtype) for values, dtype in more.get("constants", ())]
        options = more.get("options")
        out = made.op(
            kind,
            inputs,
            after,
            options,
            dtype=more.get("out", more.get("dtype", "int8")),
            version=more.get("version", 1),
        )
        return [first], [out]

    return build


def _axes(*axes: int) -> list[tuple[object, str]]:
    return [(np.array(axes), "int32")]


def _pool(kind: str, activation: int):
    return _simple(
        kind,
        (1, 8, 8, 4),
        (1, 4, 4, 4),
        options=Options("Pool2DOptions", {"fusedActivationFunction": activation, "strideH": 2, "strideW": 2}),
    )


def _concat(constant: object | None, count: int, *, activation: int = 0):
    def build(made: Made) -> tuple[list[int], list[int]]:
        inputs = [made.value((1, 4, 4, 2)) for _ in range(count)]
        more = [] if constant is None else [made.constant(constant, "int8", zero_point=5)]
        size = 2 * (count + len(more))
        options = Options("ConcatenationOptions", {"axis": 3, "fusedActivationFunction": activation})
        return inputs, [made.op("CONCATENATION", [*inputs, *more], (1, 4, 4, size), options)]

    return build


def _dense(rows: int, *, constant: bool = True, weights_format: int = 0):
    def build(made: Made) -> tuple[list[int], list[int]]:
        first = made.value((rows, 16))
        inputs = [first]
        if constant:
            filters = made.constant(np.ones((4, 16)), "int8")
        else:
            filters = made.value((4, 16))
            inputs.append(filters)
        bias = made.constant(np.zeros(4), "int32")
        options = Options("FullyConnectedOptions", {"weightsFormat": weights_format})
        return inputs, [made.op("FULLY_CONNECTED", [first, filters, bias], (rows, 4), options)]

    return build


def _prelu(alpha: tuple[int, ...]):
    return _simple("PRELU", (1, 8, 8, 4), (1, 8, 8, 4), constants=[(np.ones(alpha), "int8")])


def _slice(strides: tuple[int, ...], **options: int):
    return _simple(
        "STRIDED_SLICE",
        (1, 8, 8, 4),
        (1, 4, 4, 4),
        constants=[(np.zeros(4), "int32"), (np.array([1, 8, 8, 4]), "int32"), (np.array(strides), "int32")],
        options=Options("StridedSliceOptions", options),
    )


def _open_batch(made: Made) -> tuple[list[int], list[int]]:
    first = made.value((-1, 8, 8, 4))
    return [first], [made.op("RELU", [first], (-1, 8, 8, 4))]


def _computed_shape(made: Made) -> tuple[list[int], list[int]]:
    first, shape = made.value((1, 8, 8, 4)), made.value((2,), "int32")
    return [first, shape], [made.op("RESHAPE", [first, shape], (1, 256))]


def _lstm(time_major: int, weights: str = "int8"):
    def build(made: Made) -> tuple[list[int], list[int]]:
        first = made.value((1, 5, 8))
        matrices = [made.constant(np.ones((4, 8)), weights) for _ in range(4)]
        again = [made.constant(np.ones((4, 4)), weights) for _ in range(4)]
        bias = [made.constant(np.zeros(4), "int32") for _ in range(4)]
        state = made.graph.tensor("state", (1, 4), "int8", scale=0.5, variable=True)
        cell = made.graph.tensor("cell", (1, 4), "int16", scale=0.5, variable=True)
        inputs = [first, *matrices, *again, -1, -1, -1, *bias, -1, -1, state, cell]
        options = Options("UnidirectionalSequenceLSTMOptions", {"timeMajor": bool(time_major)})
        return [first], [made.op("UNIDIRECTIONAL_SEQUENCE_LSTM", inputs, (1, 5, 4), options)]

    return build


# name → (builds the breaking model, status, builds the keeping one)
RULES = {
    "float activations": (
        lambda made: _conv(made, dtype="float32", weights="float32"),
        edgetpu_rules.DATA_TYPE,
        lambda made: _conv(made),
    ),
    "unsigned is fine, 16 bits are not": (
        lambda made: _conv(made, dtype="int16"),
        edgetpu_rules.DATA_TYPE,
        lambda made: _conv(made, dtype="uint8", weights="uint8"),
    ),
    "weights of 4 bytes": (
        lambda made: _conv(made, weights="float32"),
        edgetpu_rules.DATA_TYPE,
        lambda made: _conv(made),
    ),
    "dequantised output": (
        _simple("DEQUANTIZE", (1, 8), (1, 8), out="float32"),
        edgetpu_rules.DATA_TYPE,
        _simple("QUANTIZE", (1, 8), (1, 8), out="uint8"),
    ),
    "quantised from float": (
        _simple("QUANTIZE", (1, 8), (1, 8), dtype="float32", out="int8"),
        edgetpu_rules.DATA_TYPE,
        _simple("QUANTIZE", (1, 8), (1, 8), dtype="uint8", out="int8"),
    ),
    "arg-max gives int64": (
        _simple("ARG_MAX", (1, 8, 4), (1, 8), out="int64", constants=_axes(2)),
        edgetpu_rules.DATA_TYPE,
        _simple("REDUCE_MAX", (1, 8, 8, 4), (1, 8, 8, 1), constants=_axes(3)),
    ),
    "leaky relu": (
        _simple("LEAKY_RELU", (1, 8, 8, 4), (1, 8, 8, 4)),
        edgetpu_rules.NOT_SUPPORTED,
        _simple("RELU6", (1, 8, 8, 4), (1, 8, 8, 4)),
    ),
    "custom operation": (
        _simple("MyOwnOp", (1, 8), (1, 8)),
        edgetpu_rules.NOT_SUPPORTED,
        _simple("LOGISTIC", (1, 8), (1, 8)),
    ),
    "newer version": (
        _simple("LOGISTIC", (1, 8), (1, 8), version=9),
        edgetpu_rules.VERSION,
        _simple("LOGISTIC", (1, 8), (1, 8), version=2),
    ),
    "batch of two": (lambda made: _conv(made, batch=2), edgetpu_rules.RANK, lambda made: _conv(made)),
    "five dimensions": (
        _simple("RELU", (1, 2, 4, 4, 4), (1, 2, 4, 4, 4)),
        edgetpu_rules.RANK,
        _simple("RELU", (1, 1, 4, 4, 4), (1, 1, 4, 4, 4)),
    ),
    "computed weights": (_dense(1, constant=False), edgetpu_rules.NOT_CONSTANT, _dense(1)),
    "computed shape": (
        _computed_shape,
        edgetpu_rules.DYNAMIC,
        _simple("RESHAPE", (1, 8, 8, 4), (1, 256), constants=[(np.array([1, 256]), "int32")]),
    ),
    "open batch": (_open_batch, edgetpu_rules.DYNAMIC, _simple("RELU", (1, 8, 8, 4), (1, 8, 8, 4))),
    "pool with activation": (_pool("MAX_POOL_2D", 1), edgetpu_rules.LIMITATION, _pool("MAX_POOL_2D", 0)),
    "average pool with activation": (
        _pool("AVERAGE_POOL_2D", 3),
        edgetpu_rules.LIMITATION,
        _pool("AVERAGE_POOL_2D", 0),
    ),
    "concatenation with activation": (
        _concat(None, 2, activation=1),
        edgetpu_rules.LIMITATION,
        _concat(None, 2),
    ),
    "concatenated constant is not zero": (
        _concat(np.full((1, 4, 4, 2), 7), 1),
        edgetpu_rules.LIMITATION,
        _concat(np.full((1, 4, 4, 2), 5), 1),
    ),
    "concatenated constant among three": (
        _concat(np.full((1, 4, 4, 2), 5), 2),
        edgetpu_rules.LIMITATION,
        _concat(None, 3),
    ),
    "dilation differs": (
        lambda made: _conv(made, dilationWFactor=2, dilationHFactor=1),
        edgetpu_rules.LIMITATION,
        lambda made: _conv(made, dilationWFactor=2, dilationHFactor=2),
    ),
    "dense with two rows": (_dense(2), edgetpu_rules.TWO_DIMENSIONS, _dense(1)),
    "shuffled weights": (_dense(1, weights_format=1), edgetpu_rules.LIMITATION, _dense(1)),
    "softmax over rows": (
        _simple("SOFTMAX", (3, 10), (3, 10)),
        edgetpu_rules.TWO_DIMENSIONS,
        _simple("SOFTMAX", (1, 10), (1, 10)),
    ),
    "softmax too large": (
        _simple("SOFTMAX", (1, 16001), (1, 16001)),
        edgetpu_rules.LIMITATION,
        _simple("SOFTMAX", (1, 16000), (1, 16000)),
    ),
    "mean over the batch": (
        _simple("MEAN", (1, 8, 8, 4), (8, 8, 4), constants=_axes(0)),
        edgetpu_rules.LIMITATION,
        _simple("MEAN", (1, 8, 8, 4), (1, 4), constants=_axes(1, 2)),
    ),
    "mean over seven channels": (
        _simple("MEAN", (1, 8, 8, 7), (1, 8, 8), constants=_axes(-1)),
        edgetpu_rules.LIMITATION,
        _simple("MEAN", (1, 8, 8, 8), (1, 8, 8), constants=_axes(-1)),
    ),
    "maximum over the batch": (
        _simple("REDUCE_MAX", (1, 8, 8, 4), (8, 8, 4), constants=_axes(-4)),
        edgetpu_rules.LIMITATION,
        _simple("REDUCE_MIN", (1, 8, 8, 4), (1, 8, 4), constants=_axes(1)),
    ),
    "sum over the batch": (
        _simple("SUM", (1, 8, 8, 4), (8, 8, 4), constants=_axes(0)),
        edgetpu_rules.LIMITATION,
        _simple("SUM", (1, 8, 8, 4), (1, 8, 4), constants=_axes(2)),
    ),
    "pack along the batch": (
        _simple("PACK", (1, 8), (1, 1, 8), options=Options("PackOptions", {"axis": 0, "valuesCount": 1})),
        edgetpu_rules.LIMITATION,
        _simple("PACK", (1, 8), (1, 8, 1), options=Options("PackOptions", {"axis": 2, "valuesCount": 1})),
    ),
    "pad the batch": (
        _simple(
            "PAD",
            (1, 8, 8, 4),
            (2, 8, 8, 4),
            constants=[(np.array([[1, 0], [0, 0], [0, 0], [0, 0]]), "int32")],
        ),
        edgetpu_rules.RANK,
        _simple(
            "PAD",
            (1, 8, 8, 4),
            (1, 10, 10, 4),
            constants=[(np.array([[0, 0], [1, 1], [1, 1], [0, 0]]), "int32")],
        ),
    ),
    "pad the batch of a matrix": (
        _simple("PAD", (1, 8), (2, 8), constants=[(np.array([[1, 0], [0, 0]]), "int32")]),
        edgetpu_rules.LIMITATION,
        _simple("PAD", (1, 8), (1, 10), constants=[(np.array([[0, 0], [1, 1]]), "int32")]),
    ),
    "alpha for every pixel": (_prelu((8, 8, 4)), edgetpu_rules.LIMITATION, _prelu((1, 1, 4))),
    "reshape beyond the chip": (
        _simple("RESHAPE", (1, 2048, 2048, 1), (1, 4194304), constants=[(np.array([1, 4194304]), "int32")]),
        edgetpu_rules.LIMITATION,
        _simple("RESHAPE", (1, 64, 64, 1), (1, 4096), constants=[(np.array([1, 4096]), "int32")]),
    ),
    "resize from one pixel": (
        _simple("RESIZE_BILINEAR", (1, 1, 1, 4), (1, 33, 33, 4), constants=[(np.array([33, 33]), "int32")]),
        edgetpu_rules.LIMITATION,
        _simple("RESIZE_BILINEAR", (1, 24, 24, 4), (1, 48, 48, 4), constants=[(np.array([48, 48]), "int32")]),
    ),
    "resize to a large picture": (
        _simple(
            "RESIZE_NEAREST_NEIGHBOR", (1, 256, 256, 3), (1, 512, 512, 3), constants=[([512, 512], "int32")]
        ),
        edgetpu_rules.LIMITATION,
        _simple(
            "RESIZE_NEAREST_NEIGHBOR", (1, 64, 64, 3), (1, 128, 128, 3), constants=[([128, 128], "int32")]
        ),
    ),
    "squeeze in the middle": (
        _simple("SQUEEZE", (1, 5, 1, 10), (1, 5, 10)),
        edgetpu_rules.LIMITATION,
        _simple("SQUEEZE", (1, 1, 5, 10), (5, 10)),
    ),
    "slice with a stride": (_slice((1, 2, 1, 1)), edgetpu_rules.LIMITATION, _slice((1, 1, 1, 1))),
    "slice with an ellipsis": (
        _slice((1, 1, 1, 1), ellipsisMask=1),
        edgetpu_rules.LIMITATION,
        _slice((1, 1, 1, 1)),
    ),
    "slice with a new axis": (
        _slice((1, 1, 1, 1), newAxisMask=1),
        edgetpu_rules.LIMITATION,
        _slice((1, 1, 1, 1)),
    ),
    "channels first": (
        _simple("TRANSPOSE", (1, 8, 8, 4), (1, 4, 8, 8), constants=[(np.array([0, 3, 1, 2]), "int32")]),
        edgetpu_rules.LIMITATION,
        _simple("TRANSPOSE", (1, 8, 6, 4), (1, 6, 8, 4), constants=[(np.array([0, 2, 1, 3]), "int32")]),
    ),
    "recurrent with wide weights": (_lstm(0, "float32"), None, _lstm(0)),
}


def _reason(read: Read, data: bytes) -> Reason | None:
    model = read(data)
    return why_not(Context(model, model.main), model.main.operators[0])


def test_tile_is_mapped(make: Make, read: Read) -> None:
    """It is on no published list, and inside a compiled file of google-coral's (deeplab slim, cityscapes)."""
    build = _simple("TILE", (1, 1, 1, 4), (1, 3, 3, 4), constants=[(np.array([1, 3, 3, 1]), "int32")])
    made = make()
    assert _reason(read, made.finish(*build(made))) is None


@pytest.mark.parametrize("name", RULES)
def test_rule_is_broken_and_kept(make: Make, read: Read, name: str) -> None:
    breaking, status, keeping = RULES[name]
    made = make()
    assert _reason(read, made.finish(*keeping(made))) is None
    if status is None:
        return
    made = make()
    data = made.finish(*breaking(made))
    reason = _reason(read, data)
    assert reason is not None
    assert reason.status == status
    assert reason.detail
    assert reason.remedy
    assert reason.cause.startswith(status)
    placement = edgetpu.predict(read(data))
    assert placement.accelerated_ops == 0
    assert placement.verdict is Verdict.NOT_ACCELERATED
    assert placement.ops[0].root_cause is True
    assert placement.ops[0].unit is Unit.CPU


def test_every_supported_operation_has_a_version_and_every_limit_a_test() -> None:
    assert set(edgetpu_rules.VERSIONS) == set(edgetpu_rules.SUPPORTED)
    assert set(edgetpu_rules.PARAMETERS) <= set(edgetpu_rules.SUPPORTED)
    assert not set(edgetpu_rules.TYPE_REMEDIES) & set(edgetpu_rules.SUPPORTED)


def test_split_along_the_batch_is_refused(make: Make, read: Read) -> None:
    for axis, status in ((0, edgetpu_rules.LIMITATION), (3, None)):
        made = make()
        first = made.value((1, 8, 8, 4))
        number = made.constant(np.array(axis), "int32")
        out = made.op("SPLIT", [number, first], (1, 8, 8, 4), Options("SplitOptions", {"numSplits": 1}))
        reason = _reason(read, made.finish([first], [out]))
        assert (reason.status if reason else None) == status


def test_only_the_first_partition_is_compiled(conv_chain: Callable[..., bytes], read: Read) -> None:
    placement = edgetpu.predict(
        read(conv_chain("CONV_2D", "RELU", "LEAKY_RELU", "CONV_2D", "CONV_2D", "CONV_2D"))
    )
    assert [op.unit for op in placement.ops] == [Unit.TPU] * 2 + [Unit.CPU] * 4
    assert [op.root_cause for op in placement.ops] == [None, None, True, False, False, False]
    assert "2 (LEAKY_RELU)" in placement.ops[5].cause
    assert placement.accelerated_op_types == {"CONV_2D": 1, "RELU": 1}
    assert placement.cpu_op_types == {"LEAKY_RELU": 1, "CONV_2D": 3}


def test_an_unsupported_beginning_does_not_keep_the_rest_off(
    conv_chain: Callable[..., bytes], read: Read
) -> None:
    placement = edgetpu.predict(read(conv_chain("LEAKY_RELU", "CONV_2D", "CONV_2D")))
    assert [op.unit for op in placement.ops] == [Unit.CPU, Unit.TPU, Unit.TPU]


def test_the_order_of_branches_decides_what_is_compiled(make: Make, read: Read) -> None:
    # As TensorFlow Lite cuts a graph for a delegate: what comes first in the file is taken first.
    for blocker_first, add_unit in ((True, Unit.TPU), (False, Unit.CPU)):
        made = make()
        first = made.value((1, 8, 8, 4))
        left = made.op("LEAKY_RELU", [first], (1, 8, 8, 4)) if blocker_first else -1
        right = made.op("TANH", [made.op("RELU", [first], (1, 8, 8, 4))], (1, 8, 8, 4))
        if not blocker_first:
            left = made.op("LEAKY_RELU", [first], (1, 8, 8, 4))
        out = made.op("ADD", [left, right], (1, 8, 8, 4))
        placement = edgetpu.predict(read(made.finish([first], [out])))
        assert {op.type: op.unit for op in placement.ops} == {
            "LEAKY_RELU": Unit.CPU,
            "RELU": Unit.TPU,
            "TANH": Unit.TPU,
            "ADD": add_unit,
        }
        assert placement.ops[3].root_cause is (None if blocker_first else False)


def test_one_open_size_keeps_the_whole_model_off(make: Make, read: Read) -> None:
    made = make()
    first, second = made.value((1, 8, 8, 4)), made.value((1, -1))
    one = made.op("RELU", [first], (1, 8, 8, 4))
    two = made.op("RELU", [second], (1, -1))
    placement = edgetpu.predict(read(made.finish([first, second], [one, two])))
    assert placement.accelerated_ops == 0
    assert [op.root_cause for op in placement.ops] == [False, True]
    assert all(op.cause.startswith(edgetpu_rules.DYNAMIC) for op in placement.ops)
    assert "operation 1 (RELU)" in placement.ops[0].cause


def test_a_float_model_is_called_unquantised(make: Make) -> None:
    from boardbench.inspect.analyse import inspect_bytes

    for dtype, warned in (("float32", True), ("int8", False)):
        made = make()
        first = made.value((1, 8), dtype)
        data = made.finish([first], [made.op("RELU", [first], (1, 8), dtype=dtype)])
        report = inspect_bytes("m", memoryview(data), target="edgetpu")
        assert ("not_quantised" in {warning.code for warning in report.warnings}) is warned


def test_a_limit_that_was_only_observed_gives_way_to_a_blocker_above(make: Make, read: Read) -> None:
    made = make()
    first = made.value((1, 1, 1, 4))
    size = made.constant([33, 33])
    leaky = made.op("LEAKY_RELU", [first], (1, 1, 1, 4))
    large = made.op("RESIZE_BILINEAR", [leaky, size], (1, 33, 33, 4))
    placement = edgetpu.predict(read(made.finish([first], [large])))
    assert [op.root_cause for op in placement.ops] == [True, False]
