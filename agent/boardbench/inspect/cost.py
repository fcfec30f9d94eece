"""What a TensorFlow Lite graph costs: multiply-accumulates and memory between operations."""

from __future__ import annotations

from typing import Dict, List, Optional

from boardbench.inspect.elements import BITS, aligned_bytes
from boardbench.inspect.tflite import Operator, Subgraph, Tensor

# Operations that run other graphs, as often as the data says.
_CONTROL = frozenset(
    ("IF", "WHILE", "CALL", "CALL_ONCE", "STABLEHLO_WHILE", "STABLEHLO_COMPOSITE", "STABLEHLO_CASE")
)
# A product of sizes beyond this is no model but a damaged shape.
_LARGEST = 1 << 62


def element_total(tensor: Tensor) -> Optional[int]:
    """Number of elements; None while a size is open, or absurd."""
    return product(tensor.shape)


def product(shape: "tuple[int, ...]") -> Optional[int]:
    """Number of elements of the shape; None while a size is open, or the product is absurd."""
    count = 1
    for size in shape:
        if size < 0:
            return None
        count *= size
        if count > _LARGEST:
            return None
    return count


def multiply_accumulates(graph: Subgraph) -> Optional[int]:
    """Multiply-accumulates of one inference; None where a shape is open or the data decides.

    Counted are convolutions, matrix products and recurrent cells; the few that element-wise operations and
    pooling do are not, as is usual.
    """
    total = 0
    for operator in graph.operators:
        if operator.type in _CONTROL:
            return None
        count = _counted(graph, operator)
        if count is None:
            return None
        total += count
    return total if total <= _LARGEST else None


def _counted(graph: Subgraph, operator: Operator) -> Optional[int]:
    if operator.type not in _KINDS:
        return 0
    inputs = [graph.tensors[index] if index >= 0 else None for index in operator.inputs]
    outputs = [graph.tensors[index] for index in operator.outputs if index >= 0]
    if not outputs:
        return None
    weights_at = _KINDS[operator.type]
    weights = inputs[weights_at] if weights_at < len(inputs) else None
    source_at = 2 if operator.type in ("TRANSPOSE_CONV", "CONV_3D_TRANSPOSE") else 0
    source = inputs[source_at] if source_at < len(inputs) else None
    if weights is None or source is None:
        return None
    result, values = element_total(outputs[0]), element_total(source)
    filter_shape = weights.shape
    if result is None or values is None or not filter_shape or min(filter_shape) < 0:
        return None
    if operator.type == "CONV_2D":
        return _times(result, product(filter_shape[1:]))
    if operator.type == "CONV_3D":
        # Filter: depth, height, width, input channels, output channels.
        return _times(result, product(filter_shape[:-1]))
    if operator.type == "DEPTHWISE_CONV_2D":
        return _times(result, product(filter_shape[1:-1]))
    if operator.type in ("TRANSPOSE_CONV", "CONV_3D_TRANSPOSE"):
        # Each input value is multiplied with a kernel for every output channel.
        channels = filter_shape[-1]
        whole = product(filter_shape)
        return None if whole is None or channels == 0 else _times(values, whole // channels)
    if operator.type == "FULLY_CONNECTED":
        return _times(result, filter_shape[-1])
    if operator.type == "BATCH_MATMUL":
        shared = source.shape[-2 if operator.option("adj_x") else -1] if len(source.shape) >= 2 else 1
        return _times(result, shared)
    return _recurrent(operator, inputs, source)


def _recurrent(operator: Operator, inputs: "list[Optional[Tensor]]", source: Tensor) -> Optional[int]:
    matrices = [
        product(tensor.shape)
        for tensor in inputs[1:]
        if tensor is not None and tensor.constant and len(tensor.shape) == 2
    ]
    weights = sum(count for count in matrices if count is not None)
    if operator.type in ("UNIDIRECTIONAL_SEQUENCE_LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN"):
        steps = product(source.shape[:-1])
    else:
        steps = source.shape[0] if source.shape else 1
    return _times(weights, steps)


def _times(a: Optional[int], b: Optional[int]) -> Optional[int]:
    if a is None or b is None or a * b > _LARGEST:
        return None
    return a * b


# Operation → where its weights are among the inputs.
_KINDS: Dict[str, int] = {
    "CONV_2D": 1,
    "CONV_3D": 1,
    "DEPTHWISE_CONV_2D": 1,
    "TRANSPOSE_CONV": 1,
    "CONV_3D_TRANSPOSE": 1,
    "FULLY_CONNECTED": 1,
    "BATCH_MATMUL": 1,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": 2,
    "UNIDIRECTIONAL_SEQUENCE_RNN": 1,
    "LSTM": 2,
    "RNN": 1,
    "SVDF": 1,
}


def arena_bytes(graph: Subgraph) -> Optional[int]:
    """Most bytes of tensors that are alive at once; None while a size is open.

    Inputs and state live from the beginning to the end, as interpreters keep them, outputs from where they
    are written to the end. An interpreter's own arena is larger by what kernels need while they run, and by
    the gaps between tensors of different life.
    """
    last = len(graph.operators)
    born: Dict[int, int] = dict.fromkeys(graph.inputs, 0)
    dies: Dict[int, int] = dict.fromkeys((*graph.inputs, *graph.outputs), last)
    for tensor in graph.tensors:
        if tensor.variable:
            born[tensor.index], dies[tensor.index] = 0, last
    for operator in graph.operators:
        for index in operator.outputs:
            if index >= 0:
                born.setdefault(index, operator.index)
                dies[index] = max(dies.get(index, 0), operator.index)
        for index in operator.inputs:
            if index >= 0 and index in born:
                dies[index] = max(dies.get(index, 0), operator.index)
    change: List[int] = [0] * (last + 2)
    for index, start in born.items():
        tensor = graph.tensors[index]
        if tensor.constant:
            continue
        count, bits = element_total(tensor), BITS.get(tensor.dtype)
        if count is None or bits is None or not tensor.has_rank:
            return None
        aligned = aligned_bytes(count, bits)
        change[start] += aligned
        change[dies[index] + 1] -= aligned
    alive = most = 0
    for difference in change:
        alive += difference
        most = max(most, alive)
    return most if most <= _LARGEST else None
