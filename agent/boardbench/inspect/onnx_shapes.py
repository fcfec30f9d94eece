"""Shapes of the values in an ONNX graph, as far as the file and simple rules tell, and what follows of them.

Exporters rarely write the shapes of intermediate values. Where a rule is missing here, a shape stays unknown,
and with it every figure that needs it: nothing is guessed.
"""

from __future__ import annotations

import operator
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from boardbench.inspect.budget import Budget
from boardbench.inspect.cost import product
from boardbench.inspect.elements import BITS, aligned_bytes

Shape = Tuple[int, ...]
Value = Tuple[str, Optional[Shape]]

_SAME = b"SAME"
_LARGEST = 1 << 62
# More than any model has. What has more could keep the rules busy that look at sizes: gathering by what was
# gathered doubles the number of dimensions, again and again.
_MOST_DIMENSIONS = 16
_MOST_NUMBERS = 64
# So many are worth no step of their own.
_FEW = 6


class Node(NamedTuple):
    """One operation; integer attributes only (text by its bytes)."""

    type: str
    domain: str
    name: str
    inputs: Tuple[str, ...]
    outputs: Tuple[str, ...]
    attributes: Mapping[str, Tuple[int, ...]]

    def one(self, name: str, default: int) -> int:
        """An attribute of one integer."""
        found = self.attributes.get(name, ())
        return found[0] if found else default


def infer(
    nodes: Sequence[Node],
    constants: Mapping[str, Tuple[str, Shape]],
    contents: Mapping[str, Tuple[int, ...]],
    known: Mapping[str, Tuple[str, Shape]],
    budget: Budget,
) -> Dict[str, Value]:
    """Type and shape of every value that is known or follows; a shape has no open sizes.

    One of more than _MOST_DIMENSIONS counts as unknown. Long ones take steps of the budget.
    """
    values: Dict[str, Value] = {
        name: (dtype, shape if len(shape) <= _MOST_DIMENSIONS else None)
        for name, (dtype, shape) in constants.items()
    }
    for name, (dtype, shape) in known.items():
        closed = -1 not in shape and len(shape) <= _MOST_DIMENSIONS
        values.setdefault(name, (dtype, shape if closed else None))
    numbers: Dict[str, Tuple[int, ...]] = dict(contents)
    for node in nodes:
        _follow_numbers(node, values, numbers)
        if node.outputs and len(numbers.get(node.outputs[0], ())) > _FEW:
            budget.spend(len(numbers[node.outputs[0]]), "the ONNX model")
        inputs: List[Value] = [values.get(name, ("", None)) if name else ("", None) for name in node.inputs]
        if not inputs and node.type != "Constant":
            continue
        for position, name in enumerate(node.outputs):
            if not name:
                continue
            if inputs and inputs[0][1] is not None and len(inputs[0][1]) > _FEW:
                budget.spend(len(inputs), "the ONNX model")
            told: Value = values.get(name, ("", None))
            found = _shape(node, inputs, numbers, position) if told[1] is None else told[1]
            if found is not None and len(found) > _MOST_DIMENSIONS:
                found = None
            values[name] = (told[0] or _dtype(node, inputs), found)
    return values


def _follow_numbers(node: Node, values: Mapping[str, Value], numbers: Dict[str, Tuple[int, ...]]) -> None:
    """Shapes computed in the graph itself: Shape → Gather → Unsqueeze → Concat → Reshape."""
    if not node.outputs or not node.inputs:
        return
    out = node.outputs[0]
    if node.type == "Shape":
        shape = values.get(node.inputs[0], ("", None))[1]
        if shape is not None:
            numbers[out] = shape
        return
    inputs = [numbers.get(name) for name in node.inputs]
    if inputs[0] is None:
        return
    first = inputs[0]
    if node.type in ("Cast", "Identity", "Unsqueeze", "Squeeze"):
        numbers[out] = first
    elif node.type == "Gather" and len(inputs) > 1 and inputs[1] is not None:
        picked = inputs[1]
        if first and all(-len(first) <= index < len(first) for index in picked):
            numbers[out] = tuple(first[index] for index in picked)
    elif node.type == "Concat":
        known = [each for each in inputs if each is not None]
        if len(known) == len(inputs) and sum(map(len, known)) <= _MOST_NUMBERS:
            numbers[out] = tuple(number for each in known for number in each)
    elif node.type == "Slice" and all(each is not None for each in inputs[1:3]) and len(inputs) >= 3:
        starts, stops = inputs[1], inputs[2]
        if starts and stops and len(starts) == 1 and (len(inputs) < 5 or inputs[4] in (None, (1,))):
            numbers[out] = first[starts[0] : stops[0]]
    elif node.type in ("Mul", "Add", "Sub", "Div") and len(inputs) == 2 and inputs[1] is not None:
        second = inputs[1]
        if len(first) == len(second) or 1 in (len(first), len(second)):
            if not first or not second or (node.type == "Div" and 0 in second):
                return
            long = max(len(first), len(second))
            found = tuple(
                _ARITHMETIC[node.type](first[i % len(first)], second[i % len(second)]) for i in range(long)
            )
            if all(abs(number) < _LARGEST for number in found):
                numbers[out] = found


_ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "Mul": operator.mul,
    "Add": operator.add,
    "Sub": operator.sub,
    "Div": operator.floordiv,
}

# Operations whose result is like their first input.
_ALIKE = frozenset(
    [
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Elu",
        "Selu",
        "Celu",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Softmax",
        "LogSoftmax",
        "Softplus",
        "Softsign",
        "Gelu",
        "Mish",
        "Clip",
        "Abs",
        "Neg",
        "Exp",
        "Log",
        "Sqrt",
        "Reciprocal",
        "Floor",
        "Ceil",
        "Round",
        "Sign",
        "Erf",
        "Sin",
        "Cos",
        "Identity",
        "Dropout",
        "Cast",
        "BatchNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "GroupNormalization",
        "LpNormalization",
        "LRN",
        "MeanVarianceNormalization",
        "QuantizeLinear",
        "DequantizeLinear",
        "Not",
        "CumSum",
        "ThresholdedRelu",
        "DynamicQuantizeLinear",
        "FastGelu",
        "QuickGelu",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearSoftmax",
    ]
)
_BROADCAST = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Mod",
        "Max",
        "Min",
        "Sum",
        "Mean",
        "And",
        "Or",
        "Xor",
        "Equal",
        "Less",
        "Greater",
        "LessOrEqual",
        "GreaterOrEqual",
        "Where",
        "BitShift",
    ]
)
_LINEAR_BROADCAST = frozenset(("QLinearAdd", "QLinearMul"))
_REDUCE = frozenset(
    [
        "ReduceMean",
        "ReduceSum",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceSumSquare",
    ]
)
_BOOLEAN = frozenset(
    ["And", "Or", "Xor", "Not", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "IsNaN", "IsInf"]
)
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "FusedConv": 1}
_PRODUCTS = {"MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3, "FusedMatMul": 1}
_POOLS = frozenset(("MaxPool", "AveragePool", "LpPool", "QLinearAveragePool"))
_GLOBAL_POOLS = frozenset(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "QLinearGlobalAveragePool"))
_CELLS = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _dtype(node: Node, inputs: Sequence[Value]) -> str:
    if node.type == "Cast":
        from boardbench.inspect.onnx import TYPES

        return TYPES.get(node.one("to", 0), "")
    if node.type == "ConstantOfShape":
        # The type of the value that it repeats is not kept; float32 is the format's default.
        return "" if "value" in node.attributes else "float32"
    if node.type in _BOOLEAN:
        return "bool"
    if node.type in ("ArgMax", "ArgMin", "Shape", "Size", "NonZero"):
        return "int64"
    if node.type in ("ConvInteger", "MatMulInteger"):
        return "int32"
    if node.type == "DequantizeLinear":
        return inputs[1][0] if len(inputs) > 1 else "float32"
    if node.type == "QuantizeLinear":
        return inputs[2][0] if len(inputs) > 2 and inputs[2][0] else "uint8"
    if node.type == "Where":
        return inputs[1][0] if len(inputs) > 1 else ""
    return inputs[0][0] if inputs else ""


def _shape(
    node: Node, inputs: Sequence[Value], numbers: Mapping[str, Tuple[int, ...]], position: int
) -> Optional[Shape]:
    kind = node.type
    if position and kind != "Split":
        return None
    if kind == "ConstantOfShape":
        return _valid(numbers.get(node.inputs[0]))
    first = inputs[0][1] if inputs else None
    if first is None:
        return None
    if kind in _ALIKE:
        return first
    if kind in _BROADCAST:
        return _broadcast([shape for _, shape in inputs])
    if kind in _LINEAR_BROADCAST:
        return _broadcast([first, inputs[3][1] if len(inputs) > 3 else None])
    if kind in _CONVOLUTIONS:
        at = _CONVOLUTIONS[kind]
        weights = inputs[at][1] if at < len(inputs) else None
        if weights is None or len(weights) != len(first) or len(first) < 3:
            return None
        spatial = _windowed(node, first[2:], weights[2:])
        return None if spatial is None else (first[0], weights[0], *spatial)
    if kind == "ConvTranspose":
        return _transposed(node, first, inputs[1][1] if len(inputs) > 1 else None)
    if kind in _POOLS:
        kernel = node.attributes.get("kernel_shape", ())
        spatial = _windowed(node, first[2:], kernel) if len(kernel) == len(first) - 2 else None
        return None if spatial is None else (*first[:2], *spatial)
    if kind in _GLOBAL_POOLS:
        return (*first[:2], *(1 for _ in first[2:]))
    if kind == "Gemm":
        return _gemm(node, first, inputs[1][1] if len(inputs) > 1 else None)
    if kind in _PRODUCTS:
        at = _PRODUCTS[kind]
        return _matmul(first, inputs[at][1] if at < len(inputs) else None)
    return _moved(node, first, inputs, numbers, position)


def _moved(
    node: Node, first: Shape, inputs: Sequence[Value], numbers: Mapping[str, Tuple[int, ...]], position: int
) -> Optional[Shape]:
    """Operations that move values about without computing on them."""
    kind, rank = node.type, len(first)
    if kind == "Flatten":
        axis = node.one("axis", 1)
        axis += rank if axis < 0 else 0
        before, after = product(first[:axis]), product(first[axis:])
        return None if before is None or after is None else (before, after)
    if kind == "Transpose":
        order = node.attributes.get("perm", tuple(reversed(range(rank))))
        return tuple(first[i] for i in order) if sorted(order) == list(range(rank)) else None
    if kind == "Reshape":
        return _reshaped(
            first, numbers.get(node.inputs[1]) if len(node.inputs) > 1 else None, node.one("allowzero", 0)
        )
    if kind == "Concat":
        return _joined([shape for _, shape in inputs], node.one("axis", 0))
    if kind in ("Squeeze", "Unsqueeze"):
        axes = node.attributes.get("axes") or (numbers.get(node.inputs[1]) if len(node.inputs) > 1 else None)
        if kind == "Squeeze":
            if axes is None:
                return tuple(size for size in first if size != 1) if len(node.inputs) < 2 else None
            gone = {axis % rank for axis in axes} if rank else set()
            return tuple(size for axis, size in enumerate(first) if axis not in gone)
        if axes is None:
            return None
        return _unsqueezed(first, axes)
    if kind == "Gather" and len(inputs) > 1 and inputs[1][1] is not None and rank:
        axis = node.one("axis", 0) % rank
        return (*first[:axis], *inputs[1][1], *first[axis + 1 :])
    if kind in _REDUCE or kind in ("ArgMax", "ArgMin"):
        return _reduced(node, first, numbers)
    if kind == "Split" and rank:
        axis = node.one("axis", 0) % rank
        sizes = node.attributes.get("split") or (
            numbers.get(node.inputs[1]) if len(node.inputs) > 1 else None
        )
        if sizes is None:
            count = len(node.outputs)
            return None if first[axis] % count else (*first[:axis], first[axis] // count, *first[axis + 1 :])
        return (*first[:axis], sizes[position], *first[axis + 1 :]) if position < len(sizes) else None
    if kind == "Pad":
        pads = node.attributes.get("pads") or (numbers.get(node.inputs[1]) if len(node.inputs) > 1 else None)
        if pads is None or len(pads) != 2 * rank:
            return None
        return _valid(tuple(size + pads[axis] + pads[axis + rank] for axis, size in enumerate(first)))
    if kind == "Expand":
        target = numbers.get(node.inputs[1]) if len(node.inputs) > 1 else None
        return None if target is None else _broadcast([first, target])
    if kind == "Resize":
        sizes = numbers.get(node.inputs[3]) if len(node.inputs) > 3 else None
        return _valid(sizes) if sizes is not None and len(sizes) == rank else None
    if kind == "DepthToSpace" and rank == 4:
        block = node.one("blocksize", 1)
        return (
            (first[0], first[1] // (block * block), first[2] * block, first[3] * block) if block > 0 else None
        )
    if kind == "SpaceToDepth" and rank == 4:
        block = node.one("blocksize", 1)
        return (
            (first[0], first[1] * block * block, first[2] // block, first[3] // block) if block > 0 else None
        )
    if kind == "Slice":
        return _sliced(node, first, numbers)
    if kind == "Shape":
        return (rank,)
    return None


def _valid(shape: Optional[Shape]) -> Optional[Shape]:
    return shape if shape is not None and all(0 <= size < _LARGEST for size in shape) else None


def _broadcast(shapes: Sequence[Optional[Shape]]) -> Optional[Shape]:
    found: List[int] = []
    for shape in shapes:
        if shape is None:
            return None
        found = [1] * (len(shape) - len(found)) + found
        for back in range(1, len(shape) + 1):
            size = shape[-back]
            if size != 1:
                if found[-back] not in (1, size):
                    return None
                found[-back] = size
    return tuple(found)


def _windowed(node: Node, sizes: Shape, kernel: Sequence[int]) -> Optional[Shape]:
    """Spatial sizes behind a sliding window (onnx, Conv and the pools)."""
    count = len(sizes)
    strides = node.attributes.get("strides", (1,) * count)
    dilations = node.attributes.get("dilations", (1,) * count)
    pads = node.attributes.get("pads", (0,) * (2 * count))
    if (
        len(strides) != count
        or len(dilations) != count
        or len(pads) != 2 * count
        or min(strides, default=1) < 1
    ):
        return None
    if bytes(node.attributes.get("auto_pad", ())).startswith(_SAME):
        return tuple(-(-sizes[axis] // strides[axis]) for axis in range(count))
    up = node.one("ceil_mode", 0)
    found = []
    for axis in range(count):
        room = sizes[axis] + pads[axis] + pads[axis + count] - dilations[axis] * (kernel[axis] - 1) - 1
        if room < 0:
            return None
        found.append((-(-room // strides[axis]) if up else room // strides[axis]) + 1)
    return _valid(tuple(found))


def _transposed(node: Node, first: Shape, weights: Optional[Shape]) -> Optional[Shape]:
    if weights is None or len(weights) != len(first) or len(first) < 3:
        return None
    count = len(first) - 2
    if "output_shape" in node.attributes or bytes(node.attributes.get("auto_pad", ())).startswith(_SAME):
        return None
    strides = node.attributes.get("strides", (1,) * count)
    dilations = node.attributes.get("dilations", (1,) * count)
    pads = node.attributes.get("pads", (0,) * (2 * count))
    more = node.attributes.get("output_padding", (0,) * count)
    if not len(strides) == len(dilations) == len(more) == count or len(pads) != 2 * count:
        return None
    spatial = tuple(
        strides[axis] * (first[axis + 2] - 1)
        + more[axis]
        + (weights[axis + 2] - 1) * dilations[axis]
        + 1
        - pads[axis]
        - pads[axis + count]
        for axis in range(count)
    )
    return _valid((first[0], weights[1] * node.one("group", 1), *spatial))


def _gemm(node: Node, a: Shape, b: Optional[Shape]) -> Optional[Shape]:
    if b is None or len(a) != 2 or len(b) != 2:
        return None
    return a[1 if node.one("transA", 0) else 0], b[0 if node.one("transB", 0) else 1]


def _matmul(a: Shape, b: Optional[Shape]) -> Optional[Shape]:
    if b is None or not a or not b:
        return None
    if len(b) == 1:
        return a[:-1]
    if len(a) == 1:
        return b[:-2] + b[-1:]
    batch = _broadcast([a[:-2], b[:-2]])
    return None if batch is None else (*batch, a[-2], b[-1])


def _reshaped(first: Shape, target: Optional[Tuple[int, ...]], keep_zero: int) -> Optional[Shape]:
    total = product(first)
    if target is None or total is None:
        return None
    sizes = [
        first[i] if size == 0 and not keep_zero and i < len(first) else size for i, size in enumerate(target)
    ]
    if sizes.count(-1) == 1:
        rest = 1
        for size in sizes:
            rest *= size if size != -1 else 1
        if rest <= 0 or total % rest:
            return None
        sizes[sizes.index(-1)] = total // rest
    shape = tuple(sizes)
    return shape if _valid(shape) is not None and product(shape) == total else None


def _joined(shapes: Sequence[Optional[Shape]], axis: int) -> Optional[Shape]:
    first = shapes[0]
    if first is None or not -len(first) <= axis < len(first):
        return None
    total = 0
    for shape in shapes:
        if shape is None or len(shape) != len(first):
            return None
        total += shape[axis]
    axis %= len(first)
    return (*first[:axis], total, *first[axis + 1 :])


def _unsqueezed(first: Shape, axes: Sequence[int]) -> Optional[Shape]:
    rank = len(first) + len(axes)
    new = {axis % rank for axis in axes}
    if len(new) != len(axes):
        return None
    rest = iter(first)
    return tuple(1 if axis in new else next(rest) for axis in range(rank))


def _reduced(node: Node, first: Shape, numbers: Mapping[str, Tuple[int, ...]]) -> Optional[Shape]:
    rank = len(first)
    if node.type in ("ArgMax", "ArgMin"):
        axes: Optional[Tuple[int, ...]] = (node.one("axis", 0),)
    elif "axes" in node.attributes:
        axes = node.attributes["axes"]
    elif len(node.inputs) > 1 and node.inputs[1]:
        axes = numbers.get(node.inputs[1])
        if axes is None:
            return None
    else:
        axes = tuple(range(rank))
    if not rank:
        return ()
    gone = {axis % rank for axis in axes or ()}
    if node.one("keepdims", 1):
        return tuple(1 if axis in gone else size for axis, size in enumerate(first))
    return tuple(size for axis, size in enumerate(first) if axis not in gone)


def _sliced(node: Node, first: Shape, numbers: Mapping[str, Tuple[int, ...]]) -> Optional[Shape]:
    if "starts" in node.attributes:
        starts, stops = node.attributes["starts"], node.attributes.get("ends", ())
        axes, steps = node.attributes.get("axes"), None
    else:
        given = [numbers.get(name) if name else None for name in node.inputs[1:]]
        if len(given) < 2 or given[0] is None or given[1] is None:
            return None
        if any(name and numbers.get(name) is None for name in node.inputs[3:]):
            return None
        starts, stops = given[0], given[1]
        axes = given[2] if len(given) > 2 else None
        steps = given[3] if len(given) > 3 else None
    axes = tuple(range(len(starts))) if axes is None else axes
    steps = (1,) * len(starts) if steps is None else steps
    if not len(starts) == len(stops) == len(axes) == len(steps) or 0 in steps:
        return None
    sizes = list(first)
    for number, axis in enumerate(axes):
        if not -len(first) <= axis < len(first) or first[axis] >= 1 << 31:
            return None
        picked = slice(starts[number], stops[number], steps[number])
        sizes[axis] = len(range(*picked.indices(first[axis])))
    return tuple(sizes)


def costs(
    nodes: Sequence[Node],
    values: Mapping[str, Value],
    constants: Set[str],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> Tuple[Optional[int], Optional[int]]:
    """(multiply-accumulates of one inference, most bytes alive at once); None where a shape is not known."""
    total: Optional[int] = 0
    for node in nodes:
        count = _multiplied(node, values)
        total = None if total is None or count is None or total > _LARGEST else total + count
    return total, _alive(nodes, values, constants, inputs, outputs)


def _multiplied(node: Node, values: Mapping[str, Value]) -> Optional[int]:
    def shape(position: int) -> Optional[Shape]:
        return values.get(node.inputs[position], ("", None))[1] if position < len(node.inputs) else None

    result = values.get(node.outputs[0], ("", None))[1] if node.outputs else None
    kind = node.type
    if kind in _CONVOLUTIONS:
        weights = shape(_CONVOLUTIONS[kind])
        return _product(result, None if weights is None else weights[1:])
    if kind == "ConvTranspose":
        weights = shape(1)
        return _product(shape(0), None if weights is None else weights[1:])
    if kind == "Gemm":
        a = shape(0)
        return _product(result, None if a is None or len(a) != 2 else (a[0 if node.one("transA", 0) else 1],))
    if kind in _PRODUCTS:
        a = shape(0)
        return _product(result, None if not a else a[-1:])
    if kind in _CELLS:
        first, weights, again = shape(0), shape(1), shape(2)
        if first is None or weights is None or again is None or len(first) != 3:
            return None
        inner, cell = product(weights), product(again)
        return None if inner is None or cell is None else (inner + cell) * first[0] * first[1]
    return 0


def _product(a: Optional[Shape], b: Optional[Shape]) -> Optional[int]:
    if a is None or b is None:
        return None
    return product((*a, *b))


def _alive(
    nodes: Sequence[Node],
    values: Mapping[str, Value],
    constants: Set[str],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> Optional[int]:
    last = len(nodes)
    born: Dict[str, int] = dict.fromkeys(inputs, 0)
    dies: Dict[str, int] = dict.fromkeys((*inputs, *outputs), last)
    for index, node in enumerate(nodes):
        for name in node.outputs:
            if name and name not in constants:
                born.setdefault(name, index)
                dies[name] = max(dies.get(name, 0), index)
        for name in node.inputs:
            if name in born:
                dies[name] = max(dies.get(name, 0), index)
    change = [0] * (last + 2)
    for name, start in born.items():
        dtype, shape = values.get(name, ("", None))
        count, bits = (None if shape is None else product(shape)), BITS.get(dtype)
        if count is None or bits is None:
            return None
        size = aligned_bytes(count, bits)
        change[start] += size
        change[dies[name] + 1] -= size
    most = alive = 0
    for difference in change:
        alive += difference
        most = max(most, alive)
    return most if most <= _LARGEST else None
