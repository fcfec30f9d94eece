"""Two small real networks, made in code, so that a first benchmark needs no download.

Weights are not trained: they come from a hash of their names. The arithmetic is that of a trained
network of the same shape, and so is the time it takes; the same bytes come out at every call.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import struct
from collections.abc import Iterator
from typing import Any

from boardbench.cli.tflite_build import BuildUnavailable, GraphBuilder, ModelBuilder, Options

_CLASSES = 100

_IMAGE_SIZE = 192
_ONNX_IMAGE_SIZE = 160
# The image is [-1, 1] in steps of 1/127.5, as Keras's MobileNet preprocessing makes it.
_IMAGE_SCALE = 1 / 127.5

# ReLU6 fixes the range, so its quantisation needs no calibration: 0 … 6 on all 256 values.
_RELU6_SCALE = 6 / 255
_RELU6_ZERO_POINT = -128

# Linear bottlenecks and h-swish inputs are centred; their spread is kept near 1 by the weights below.
_LINEAR_SCALE = 6 / 127

# Standard deviation that the weights give to values before ReLU6; large enough to use its whole range.
_ACTIVATION_DEVIATION = 2.0
_BOTTLENECK_DEVIATION = 1.0
# Deviation of the channels after the global mean, as these weights give it.
_POOL_DEVIATION = 0.13
# Spread of the class scores before softmax: some classes stand out, none takes all.
_LOGIT_DEVIATION = 2.0
# Value that the biases put before ReLU6: most channels stay alive, and all have about the same mean.
_ACTIVATION_CENTRE = 1.0
# Variance of a value after ReLU6 that was normal around the centre with the deviation before.
_RELU6_VARIANCE = 2.0

# (expansion, channels, repeats, stride): MobileNetV2's table at about half its width, without its last rows.
_BLOCKS = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 3, 2), (4, 64, 3, 2), (4, 96, 2, 2))
_STEM_CHANNELS = 16
_HEAD_CHANNELS = 384

# (channels, stride): the first rows of MobileNetV1, at half its width.
_ONNX_BLOCKS = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2))
# Keeps the spread of float values about the same from layer to layer.
_ONNX_GAIN = 1.6
# Brings the spread of the class scores to about 2.
_ONNX_LOGIT_GAIN = 6.0

# 8 bits uniform: the deviation of a value drawn from -127 … 127.
_UNIFORM_INT8_DEVIATION = 127 / math.sqrt(3)


def build_tflite() -> bytes:
    """An int8 MobileNet of depthwise-separable convolutions, in the TensorFlow Lite format.

    Input ``image`` int8 (1, 192, 192, 3); outputs ``scores`` int8 (1, 100) and ``label`` int64 (1,).
    XNNPACK takes the convolutions and leaves HARD_SWISH, SOFTMAX and ARG_MAX to the plain kernels:
    it has no 8-bit version of the first two and none at all of the third.

    Raises:
        BuildUnavailable: flatbuffers or ai-edge-litert is not installed.
    """
    model = ModelBuilder(description="boardbench demo, weights not trained")
    graph = model.subgraph("main")
    net = _Int8Network(graph)
    image = graph.tensor(
        "serving_default_image:0", [1, _IMAGE_SIZE, _IMAGE_SIZE, 3], scale=_IMAGE_SCALE, zero_point=0
    )
    # A uniform image.
    current = net.begin(image, [1, _IMAGE_SIZE, _IMAGE_SIZE, 3], _IMAGE_SCALE, variance=1 / 3)
    current = net.convolution("stem", current, _STEM_CHANNELS, kernel=3, stride=2, activation=True)
    for number, (expansion, channels, stride) in enumerate(_blocks()):
        current = net.bottleneck(f"block{number}", current, expansion, channels, stride)
    current = net.convolution("head", current, _HEAD_CHANNELS, kernel=1, stride=1, activation=False)
    current = net.hard_swish("head/hard_swish", current)
    scores, label = net.classifier(current)
    graph.inputs(image)
    graph.outputs(scores, label)
    model.signature({"image": image}, {"scores": scores, "label": label})
    # The oldest TensorFlow with all these operator versions; 16 bytes, as converters write it.
    model.metadata("min_runtime_version", b"2.3.0".ljust(16, b"\0"))
    return model.finish()


def build_onnx() -> bytes:
    """A float32 network of depthwise-separable convolutions, in the ONNX format.

    Input ``image`` float32 (1, 3, 160, 160); outputs ``scores`` float32 (1, 100) and ``label`` int64 (1,).
    Passes ``onnx.checker`` with full shape inference; opset 17 and IR 8 load in any onnxruntime since 1.12.

    Raises:
        BuildUnavailable: onnx is not installed.
    """
    onnx = _load_onnx()
    helper, types = onnx.helper, onnx.TensorProto
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, shape: tuple[int, ...], values: list[float]) -> str:
        raw = struct.pack(f"<{len(values)}f", *values)
        constants.append(helper.make_tensor(name, types.FLOAT, shape, raw, raw=True))
        return name

    def weight(name: str, shape: tuple[int, ...], gain: float) -> str:
        fan_in = math.prod(shape[1:])
        step = gain / math.sqrt(fan_in) / _UNIFORM_INT8_DEVIATION
        drawn = _balanced_int8(name, shape[0], fan_in, innermost=False)
        return constant(name, shape, [step * value for value in drawn])

    def node(op: str, name: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, list(inputs), [f"{name}_output_0"], name=name, **attributes))
        return f"{name}_output_0"

    def convolution(
        name: str, data: str, inputs: int, outputs: int, *, kernel: int, stride: int = 1, group: int = 1
    ) -> str:
        weights = weight(f"{name}.weight", (outputs, inputs // group, kernel, kernel), _ONNX_GAIN)
        bias = constant(f"{name}.bias", (outputs,), [_ACTIVATION_CENTRE] * outputs)
        border = kernel // 2
        made = node(
            "Conv", f"/{name}/Conv", data, weights, bias,
            kernel_shape=[kernel, kernel], strides=[stride, stride], pads=[border] * 4, group=group,
        )  # fmt: skip
        return node("Relu", f"/{name}/Relu", made)

    data = convolution("stem", "image", 3, 16, kernel=3, stride=2)
    channels = 16
    for number, (wider, stride) in enumerate(_ONNX_BLOCKS):
        data = convolution(
            f"block{number}.depthwise", data, channels, channels, kernel=3, stride=stride, group=channels
        )
        data = convolution(f"block{number}.pointwise", data, channels, wider, kernel=1)
        channels = wider
    data = node("GlobalAveragePool", "/pool/GlobalAveragePool", data)
    data = node("Flatten", "/pool/Flatten", data, axis=1)
    weights = weight("classifier.weight", (_CLASSES, channels), _ONNX_LOGIT_GAIN)
    bias = constant("classifier.bias", (_CLASSES,), [0.0] * _CLASSES)
    data = node("Gemm", "/classifier/Gemm", data, weights, bias, transB=1)
    nodes.append(helper.make_node("Softmax", [data], ["scores"], name="/classifier/Softmax", axis=1))
    nodes.append(
        helper.make_node("ArgMax", ["scores"], ["label"], name="/classifier/ArgMax", axis=1, keepdims=0)
    )
    graph = helper.make_graph(
        nodes,
        "main_graph",
        [helper.make_tensor_value_info("image", types.FLOAT, [1, 3, _ONNX_IMAGE_SIZE, _ONNX_IMAGE_SIZE])],
        [
            helper.make_tensor_value_info("scores", types.FLOAT, [1, _CLASSES]),
            helper.make_tensor_value_info("label", types.INT64, [1]),
        ],
        initializer=constants,
    )
    model = helper.make_model(
        graph,
        producer_name="boardbench demo",
        producer_version="1",
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17)],
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


class _Layer:
    """A computed tensor and what the next layer must know of it."""

    def __init__(self, tensor: int, shape: list[int], scale: float, variance: float) -> None:
        self.tensor = tensor
        self.shape = shape  # (batch, height, width, channel)
        self.scale = scale
        self.variance = variance


class _Int8Network:
    """Adds quantised layers to a graph: weights int8 per channel, values int8 per tensor, biases int32."""

    def __init__(self, graph: GraphBuilder) -> None:
        self._graph = graph
        self._same = graph.enum("Padding", "SAME")
        self._relu6 = graph.enum("ActivationFunctionType", "RELU6")

    def begin(self, tensor: int, shape: list[int], scale: float, variance: float) -> _Layer:
        """A layer from a tensor that is there already."""
        return _Layer(tensor, shape, scale, variance)

    def convolution(
        self, name: str, data: _Layer, channels: int, *, kernel: int, stride: int, activation: bool
    ) -> _Layer:
        """A full convolution, with ReLU6 or linear."""
        inputs = data.shape[3]
        weights, bias = self._parameters(
            name, data, (channels, kernel, kernel, inputs), 0, inputs * kernel * kernel, activation
        )
        output = self._output(name, data, channels, stride, activation)
        options = Options(
            "Conv2DOptions",
            {
                "padding": self._same,
                "strideH": stride,
                "strideW": stride,
                "fusedActivationFunction": self._relu6 if activation else 0,
            },
        )
        self._graph.operator("CONV_2D", [data.tensor, weights, bias], [output.tensor], options, version=3)
        return output

    def depthwise(self, name: str, data: _Layer, *, stride: int) -> _Layer:
        """A 3x3 convolution of every channel by itself, with ReLU6."""
        channels = data.shape[3]
        weights, bias = self._parameters(name, data, (1, 3, 3, channels), 3, 9, True)
        output = self._output(name, data, channels, stride, True)
        options = Options(
            "DepthwiseConv2DOptions",
            {
                "padding": self._same,
                "strideH": stride,
                "strideW": stride,
                "depthMultiplier": 1,
                "fusedActivationFunction": self._relu6,
            },
        )
        self._graph.operator(
            "DEPTHWISE_CONV_2D", [data.tensor, weights, bias], [output.tensor], options, version=3
        )
        return output

    def bottleneck(self, name: str, data: _Layer, expansion: int, channels: int, stride: int) -> _Layer:
        """MobileNetV2's block: widen, filter each channel, narrow; with a shortcut where the shapes allow."""
        current = data
        if expansion > 1:
            wide = data.shape[3] * expansion
            current = self.convolution(f"{name}/expand", data, wide, kernel=1, stride=1, activation=True)
        current = self.depthwise(f"{name}/depthwise", current, stride=stride)
        current = self.convolution(f"{name}/project", current, channels, kernel=1, stride=1, activation=False)
        if stride != 1 or data.shape != current.shape:
            return current
        added = self._graph.tensor(f"mobilenet/{name}/add", current.shape, scale=_LINEAR_SCALE, zero_point=0)
        self._graph.operator("ADD", [data.tensor, current.tensor], [added], Options("AddOptions"), version=2)
        return _Layer(added, current.shape, _LINEAR_SCALE, data.variance + current.variance)

    def hard_swish(self, name: str, data: _Layer) -> _Layer:
        """MobileNetV3's activation x * relu6(x + 3) / 6."""
        # Its least value is -0.375; 6 at the top, as the input's range.
        scale = (6 + 0.375) / 255
        output = self._graph.tensor(f"mobilenet/{name}", data.shape, scale=scale, zero_point=-113)
        self._graph.operator("HARD_SWISH", [data.tensor], [output], Options("HardSwishOptions"))
        return _Layer(output, data.shape, scale, data.variance / 2)

    def classifier(self, data: _Layer) -> tuple[int, int]:
        """Global mean, a fully connected layer, softmax and the best class; tensors of scores and label."""
        graph, channels = self._graph, data.shape[3]
        axes = graph.tensor("mobilenet/pool/axes", [2], "int32", data=struct.pack("<2i", 1, 2))
        # The mean over an image is far narrower than its values: -0.375 … 1.6 holds it.
        pool_scale = 2 / 255
        pool = graph.tensor("mobilenet/pool", [1, channels], scale=pool_scale, zero_point=-80)
        graph.operator(
            "MEAN", [data.tensor, axes], [pool], Options("ReducerOptions", {"keepDims": False}), version=2
        )
        step = _LOGIT_DEVIATION / (_POOL_DEVIATION * math.sqrt(channels)) / _UNIFORM_INT8_DEVIATION
        drawn = _balanced_int8("classifier/weights", _CLASSES, channels, innermost=False)
        weights = graph.tensor(
            "mobilenet/classifier/weights", [_CLASSES, channels], scale=step, zero_point=0,
            data=struct.pack(f"<{len(drawn)}b", *drawn),
        )  # fmt: skip
        bias = graph.tensor(
            "mobilenet/classifier/bias", [_CLASSES], "int32", scale=pool_scale * step, zero_point=0,
            data=struct.pack(f"<{_CLASSES}i", *[0] * _CLASSES),
        )  # fmt: skip
        logits = graph.tensor("mobilenet/classifier", [1, _CLASSES], scale=0.1, zero_point=0)
        graph.operator(
            "FULLY_CONNECTED", [pool, weights, bias], [logits], Options("FullyConnectedOptions"), version=4
        )
        # int8 softmax has this one quantisation by the specification: 1/256, zero at -128.
        scores = graph.tensor("StatefulPartitionedCall:0", [1, _CLASSES], scale=1 / 256, zero_point=-128)
        graph.operator("SOFTMAX", [logits], [scores], Options("SoftmaxOptions", {"beta": 1.0}), version=2)
        axis = graph.tensor("mobilenet/label/axis", [], "int32", data=struct.pack("<i", 1))
        label = graph.tensor("StatefulPartitionedCall:1", [1], "int64")
        graph.operator(
            "ARG_MAX", [scores, axis], [label],
            Options("ArgMaxOptions", {"outputType": graph.enum("TensorType", "INT64")}), version=2,
        )  # fmt: skip
        return scores, label

    def _parameters(
        self, name: str, data: _Layer, shape: tuple[int, ...], axis: int, fan_in: int, activation: bool
    ) -> tuple[int, int]:
        channels = shape[axis]
        deviation = _ACTIVATION_DEVIATION if activation else _BOTTLENECK_DEVIATION
        typical = deviation / math.sqrt(fan_in * data.variance) / _UNIFORM_INT8_DEVIATION
        # Channels differ in size by up to a factor of two, as trained ones do.
        steps = [typical * (1 + value / 381) for value in _uniform_int8(f"{name}/scales", channels)]
        drawn = _balanced_int8(f"{name}/weights", channels, fan_in, innermost=axis == 3)
        weights = self._graph.tensor(
            f"mobilenet/{name}/weights", shape, scale=steps, zero_point=0, quantized_dimension=axis,
            data=struct.pack(f"<{len(drawn)}b", *drawn),
        )  # fmt: skip
        centre = _ACTIVATION_CENTRE if activation else 0.0
        scales = [data.scale * step for step in steps]
        stored = [round(centre / scale) for scale in scales]
        bias = self._graph.tensor(
            f"mobilenet/{name}/bias", [channels], "int32", scale=scales, zero_point=0,
            data=struct.pack(f"<{channels}i", *stored),
        )  # fmt: skip
        return weights, bias

    def _output(self, name: str, data: _Layer, channels: int, stride: int, activation: bool) -> _Layer:
        shape = [1, -(-data.shape[1] // stride), -(-data.shape[2] // stride), channels]
        scale, zero_point = (_RELU6_SCALE, _RELU6_ZERO_POINT) if activation else (_LINEAR_SCALE, 0)
        variance = _RELU6_VARIANCE if activation else _BOTTLENECK_DEVIATION**2
        tensor = self._graph.tensor(f"mobilenet/{name}", shape, scale=scale, zero_point=zero_point)
        return _Layer(tensor, shape, scale, variance)


def _blocks() -> Iterator[tuple[int, int, int]]:
    for expansion, channels, repeats, stride in _BLOCKS:
        for repeat in range(repeats):
            yield expansion, channels, stride if repeat == 0 else 1


def _balanced_int8(name: str, filters: int, fan_in: int, *, innermost: bool) -> list[int]:
    """Weights of filters that each sum to zero, so that what differs between inputs outlives many layers.

    A random filter mostly answers to the mean of its input, which is the same for every image after ReLU;
    the network would then say the same of all of them.

    Args:
        name: What the values depend on.
        filters: Number of filters.
        fan_in: Values in each.
        innermost: The filters' dimension is the innermost and not the outermost.
    """
    drawn = _uniform_int8(name, filters * fan_in)
    rows = [drawn[start : start + fan_in] for start in range(0, len(drawn), fan_in)]
    for row in rows:
        excess, place = sum(row), 0
        while excess:
            step = -1 if excess > 0 else 1
            if -127 <= row[place % fan_in] + step <= 127:
                row[place % fan_in] += step
                excess += step
            place += 1
    if innermost:
        rows = [list(column) for column in zip(*rows, strict=True)]
    return [value for row in rows for value in row]


def _uniform_int8(name: str, count: int) -> list[int]:
    """Values in -127 … 127, the same for the same name on every machine."""
    raw = hashlib.shake_256(name.encode()).digest(count)
    return [max(-127, value - 128) for value in raw]


def _load_onnx() -> Any:
    try:
        onnx = importlib.import_module("onnx")
        importlib.import_module("onnx.checker")
        importlib.import_module("onnx.helper")
    except ImportError as error:
        raise BuildUnavailable(
            f"ONNX models are built with the package onnx, which can't be imported ({error}); "
            "install it: pip install 'boardbench[demo]'"
        ) from error
    return onnx
