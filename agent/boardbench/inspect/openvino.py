"""An OpenVINO model: the graph in ``.xml``, the constants in the ``.bin`` beside it.

Source of the format: openvinotoolkit/openvino, "Intermediate Representation" (docs.openvino.ai). Document
types and entities are refused: the format has none, and they are how XML is made to harm.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Dict, List, Optional, Tuple
from xml.parsers import expat

from boardbench.inspect.budget import Budget
from boardbench.inspect.content import Opened
from boardbench.inspect.cost import product
from boardbench.inspect.elements import BITS, aligned_bytes, count_zeros
from boardbench.inspect.errors import Malformed
from boardbench.inspect.ledger import WEIGHTS, Ledger
from boardbench.inspect.report import ByteUse, ModelReport, OpPlacement, Placement, ReportWarning, TensorInfo

# Element types as constants and parameters name them; ports use the upper-case names of before.
TYPES: Dict[str, str] = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "f8e4m3": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "i4": "int4",
    "u64": "uint64",
    "u32": "uint32",
    "u16": "uint16",
    "u8": "uint8",
    "u4": "uint4",
    "u2": "uint2",
    "boolean": "bool",
    "string": "str",
    "fp32": "float32",
    "fp16": "float16",
    "fp64": "float64",
    "bool": "bool",
}
_DEEPEST, _LONGEST_SHAPE = 64, 2048
# Elements of the format are short. The parser looks at one again whenever more of it comes, so that a long
# one takes the square of its length.
_LONGEST_ELEMENT_BYTES, _PIECE_BYTES = 1 << 19, 1 << 16
# How long what is done for an element takes: its beginning and end, and what is kept of some.
_STEPS_PER_ELEMENT = 3
_STEPS_KEPT = {"layer": 12, "edge": 4, "port": 4, "dim": 1}
# Those attributes of a layer's <data> that anybody asks for.
_KEPT = ("element_type", "shape", "offset", "size", "transpose_a")
_WHAT = "the OpenVINO model"
_NOT_OPERATIONS = frozenset(("Parameter", "Const", "Result"))
_INNER_GRAPHS = frozenset(("body", "then_body", "else_body"))


@dataclass
class _Port:
    dtype: str
    names: str
    shape: List[int] = field(default_factory=list)


@dataclass
class _Layer:
    identity: str
    name: str
    type: str
    attributes: Dict[str, str] = field(default_factory=dict)
    inputs: Dict[str, _Port] = field(default_factory=dict)
    outputs: Dict[str, _Port] = field(default_factory=dict)


class _Graph:
    """What the XML says, collected element by element."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.version = ""
        self.name = ""
        self.layers: List[_Layer] = []
        self.edges: List[Tuple[str, str, str, str]] = []
        self.inner_layers = 0
        self._path: List[str] = []
        self._inner = 0
        self._port: Optional[_Port] = None
        self._text: List[str] = []

    def start(self, tag: str, attributes: Dict[str, str]) -> None:
        self._budget.spend(_STEPS_PER_ELEMENT + _STEPS_KEPT.get(tag, 0), _WHAT)
        self._path.append(tag)
        if len(self._path) > _DEEPEST:
            raise Malformed(f"{_WHAT} is deeper than any model: damaged, or made to harm")
        if tag in _INNER_GRAPHS:
            self._inner += 1
        if len(self._path) == 1:
            if tag != "net":
                raise Malformed("the XML is no OpenVINO model: its first element is not <net>")
            self.version = attributes.get("version", "")
            self.name = attributes.get("name", "")
        elif self._inner:
            self.inner_layers += tag == "layer"
        elif tag == "layer":
            self.layers.append(
                _Layer(attributes.get("id", ""), attributes.get("name", ""), attributes.get("type", ""))
            )
        elif tag == "edge":
            self.edges.append(
                tuple(attributes.get(key, "") for key in ("from-layer", "from-port", "to-layer", "to-port"))  # type: ignore[arg-type]
            )
        elif self.layers and tag == "data" and self._path[-2] == "layer":
            self.layers[-1].attributes = {key: attributes[key] for key in _KEPT if key in attributes}
        elif self.layers and tag == "port" and len(self._path) >= 2:
            precision = attributes.get("precision", "").lower()
            self._port = _Port(TYPES.get(precision, precision), attributes.get("names", ""))
            side = self.layers[-1].inputs if self._path[-2] == "input" else self.layers[-1].outputs
            side[attributes.get("id", "")] = self._port
        elif tag == "dim":
            self._text = []

    def end(self, tag: str) -> None:
        self._path.pop()
        if tag in _INNER_GRAPHS:
            self._inner -= 1
        elif tag == "port":
            self._port = None
        elif tag == "dim" and self._port is not None and not self._inner and len(self._port.shape) < 64:
            text = "".join(self._text).strip()
            self._port.shape.append(int(text) if text.isdigit() and len(text) < 19 else -1)

    def characters(self, text: str) -> None:
        self._budget.spend(1, _WHAT)
        if self._port is not None and len(self._text) < 16:
            self._text.append(text[:32])


def read_graph(data: memoryview, budget: Optional[Budget] = None) -> _Graph:
    """The graph in the XML; raises Malformed."""
    graph = _Graph(Budget(len(data)) if budget is None else budget)
    parser = expat.ParserCreate()
    parser.StartElementHandler = graph.start
    parser.EndElementHandler = graph.end
    parser.CharacterDataHandler = graph.characters
    parser.StartDoctypeDeclHandler = _refuse
    parser.EntityDeclHandler = _refuse
    parser.buffer_text = True
    try:
        for start in range(0, len(data), _PIECE_BYTES):
            parser.Parse(bytes(data[start : start + _PIECE_BYTES]), False)
            if start - parser.CurrentByteIndex > _LONGEST_ELEMENT_BYTES:
                raise Malformed(f"{_WHAT} has an element longer than any model: damaged, or made to harm")
        parser.Parse(b"", True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise Malformed(f"{_WHAT} is no valid XML ({error}): truncated or damaged; copy it again") from error
    return graph


def _refuse(*_arguments: object) -> None:
    raise Malformed(f"{_WHAT} has a document type or an entity, which the format does not know: refused")


def report(base: ModelReport, data: memoryview, weights: Optional[Path], budget: Budget) -> ModelReport:
    """``base`` with everything filled in that the files tell; raises Malformed.

    ``weights`` is where the constants are. The report is about both files, and its size is that of both.
    """
    graph = read_graph(data, budget)
    by_id = {layer.identity: layer for layer in graph.layers}
    feeds: Dict[Tuple[str, str], Tuple[str, str]] = {
        (to_layer, to_port): (from_layer, from_port)
        for from_layer, from_port, to_layer, to_port in graph.edges
    }
    reader: Dict[str, str] = {}
    for from_layer, _, to_layer, _ in graph.edges:
        if to_layer in by_id:
            reader.setdefault(from_layer, by_id[to_layer].type)
    operations = [layer for layer in graph.layers if layer.type not in _NOT_OPERATIONS]
    types: Dict[str, int] = {}
    for layer in operations:
        types[layer.type] = types.get(layer.type, 0) + 1
    uses: List[ByteUse] = [ByteUse("graph", "", "", len(data))]
    warnings: List[ReportWarning] = []
    bin_bytes = 0
    found = weights is not None and weights.is_file()
    if found and weights is not None:
        with Opened(weights, mapped=True) as content:
            bin_bytes = len(content)
            budget.beside(bin_bytes)
            uses.extend(_constants(graph, reader, content, budget))
    elif any(layer.type == "Const" and _number(layer.attributes.get("size", "0")) for layer in graph.layers):
        warnings.append(
            ReportWarning(
                "external_data",
                "the constants lie in a .bin file that is not here"
                + (f" ({weights.name})" if weights is not None else "")
                + "; the model does not run without it",
            )
        )
    if graph.inner_layers:
        warnings.append(
            ReportWarning(
                "nested_graphs",
                f"{graph.inner_layers} more layers are in graphs inside layers (If, Loop, TensorIterator); "
                "they are not counted, because the data decides how often they run",
            )
        )
    inputs = tuple(
        _info(layer, next(iter(layer.outputs.values()), None))
        for layer in graph.layers
        if layer.type == "Parameter"
    )
    outputs = tuple(_output(layer, by_id, feeds) for layer in graph.layers if layer.type == "Result")
    if any(-1 in tensor.shape for tensor in inputs):
        names = ", ".join(tensor.name for tensor in inputs if -1 in tensor.shape)
        warnings.append(
            ReportWarning(
                "open_shapes", f"inputs with open sizes: {names[:400]}; name them with --shape when running"
            )
        )
    uses.sort(key=lambda use: (-use.size_bytes, use.purpose, use.dtype, use.op_type))
    return replace(
        base,
        size_bytes=len(data) + bin_bytes,
        format_version=f"IR {graph.version}" if graph.version else "",
        inputs=inputs,
        outputs=outputs,
        op_count=len(operations),
        op_types=types,
        ops=tuple(OpPlacement(index, layer.type, layer.name) for index, layer in enumerate(operations)),
        placement=Placement(
            detail="the file does not say where its operations run; OpenVINO chooses by device: run it"
        ),
        parameter_count=_parameters(graph),
        multiply_accumulates=None if graph.inner_layers else _multiplied(operations),
        arena_estimate_bytes=None if graph.inner_layers else _alive(graph, feeds),
        bytes=tuple(uses),
        warnings=tuple(warnings),
    )


def _number(text: str) -> int:
    return int(text) if text.isdigit() and len(text) < 19 else 0


def _shape(text: str) -> Tuple[int, ...]:
    parts = [part.strip() for part in text[:_LONGEST_SHAPE].split(",") if part.strip()][:64]
    return tuple(int(part) if part.isdigit() and len(part) < 19 else -1 for part in parts)


def _info(layer: _Layer, port: Optional[_Port]) -> TensorInfo:
    name = (port.names.split(",")[0] if port is not None and port.names else "") or layer.name
    dtype = TYPES.get(layer.attributes.get("element_type", ""), port.dtype if port is not None else "")
    return TensorInfo(
        name, dtype, tuple(port.shape) if port is not None else _shape(layer.attributes.get("shape", ""))
    )


def _output(
    layer: _Layer, by_id: Dict[str, _Layer], feeds: Dict[Tuple[str, str], Tuple[str, str]]
) -> TensorInfo:
    for port_id, port in layer.inputs.items():
        source_id, source_port = feeds.get((layer.identity, port_id), ("", ""))
        source = by_id.get(source_id)
        made = source.outputs.get(source_port) if source is not None else None
        if made is not None and made.names:
            return TensorInfo(made.names.split(",")[0], made.dtype, tuple(made.shape))
        return TensorInfo(layer.name, port.dtype, tuple(port.shape))
    return TensorInfo(layer.name, "", ())


def _constants(
    graph: _Graph, reader: Dict[str, str], content: memoryview, budget: Budget
) -> Tuple[ByteUse, ...]:
    ledger = Ledger(budget)
    seen = set()
    for layer in graph.layers:
        if layer.type != "Const":
            continue
        start, size = _number(layer.attributes.get("offset", "0")), _number(layer.attributes.get("size", "0"))
        dtype = TYPES.get(layer.attributes.get("element_type", ""), "")
        if start + size > len(content):
            raise Malformed(
                f"constant {layer.name!r} ends at byte {start + size} of {len(content)} of the .bin file: "
                "it is truncated, or that of another model"
            )
        # Equal constants share their bytes.
        if (start, size) in seen:
            continue
        seen.add((start, size))
        count = product(_shape(layer.attributes.get("shape", "")))
        budget.look(size, _WHAT)
        zeros = count_zeros(content[start : start + size], dtype)
        if zeros is not None and count is not None:
            zeros = min(zeros, count)
        ledger.claim(start, start + size, WEIGHTS, dtype, reader.get(layer.identity, ""), count, zeros)
    return ledger.uses(content)


def _parameters(graph: _Graph) -> Optional[int]:
    total = 0
    for layer in graph.layers:
        if layer.type == "Const":
            count = product(_shape(layer.attributes.get("shape", "")))
            if count is None:
                return None
            total += count
    return total


def _multiplied(layers: List[_Layer]) -> Optional[int]:
    total = 0
    for layer in layers:
        count = _multiplied_by(layer)
        if count is None:
            return None
        total += count
    return total


def _multiplied_by(layer: _Layer) -> Optional[int]:
    kind = layer.type
    if kind not in _COUNTED:
        return 0
    inputs = list(layer.inputs.values())
    result = next(iter(layer.outputs.values()), None)
    if result is None or len(inputs) < 2:
        return None
    first, weights = tuple(inputs[0].shape), tuple(inputs[1].shape)
    if kind == "MatMul":
        turned = layer.attributes.get("transpose_a", "false").lower() in ("true", "1")
        if not first:
            return None
        shared = first[-2] if turned and len(first) > 1 else first[-1]
        return product((*result.shape, shared))
    if kind in ("LSTMSequence", "GRUSequence", "RNNSequence"):
        # Weights of the input and of the state, once a step: [directions, gates * hidden, inputs].
        matrices = [product(tuple(port.shape)) for port in inputs if len(port.shape) == 3][1:]
        pair = [count for count in matrices[-2:] if count is not None]
        return product((sum(pair), *first[:2])) if len(pair) == 2 else None
    skipped = _COUNTED[kind]
    if kind.endswith("BackpropData"):
        return product((*first, *weights[skipped:]))
    return product((*result.shape, *weights[skipped:]))


# Layers that multiply → how many leading dimensions of the weights are not part of one result's sum.
_COUNTED: Dict[str, int] = {
    "Convolution": 1,
    "GroupConvolution": 2,
    "ConvolutionBackpropData": 1,
    "GroupConvolutionBackpropData": 2,
    "MatMul": 0,
    "LSTMSequence": 0,
    "GRUSequence": 0,
    "RNNSequence": 0,
}


def _alive(graph: _Graph, feeds: Dict[Tuple[str, str], Tuple[str, str]]) -> Optional[int]:
    """Most bytes of computed values alive at once, by the order of the file."""
    last = len(graph.layers)
    born: Dict[Tuple[str, str], int] = {}
    dies: Dict[Tuple[str, str], int] = {}
    sizes: Dict[Tuple[str, str], int] = {}
    for index, layer in enumerate(graph.layers):
        if layer.type == "Const":
            continue
        for port_id, port in layer.outputs.items():
            count, bits = product(tuple(port.shape)), BITS.get(port.dtype)
            if count is None or bits is None:
                return None
            value = (layer.identity, port_id)
            born[value] = dies[value] = 0 if layer.type == "Parameter" else index
            if layer.type == "Parameter":
                dies[value] = last
            sizes[value] = aligned_bytes(count, bits)
    for index, layer in enumerate(graph.layers):
        for port_id in layer.inputs:
            value = feeds.get((layer.identity, port_id), ("", ""))
            if value in born:
                dies[value] = max(dies[value], last if layer.type == "Result" else index)
    change = [0] * (last + 2)
    for value, start in born.items():
        change[start] += sizes[value]
        change[dies[value] + 1] -= sizes[value]
    most = alive = 0
    for difference in change:
        alive += difference
        most = max(most, alive)
    return most
