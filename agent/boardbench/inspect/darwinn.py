"""What the Edge TPU compiler put into an ``edgetpu-custom-op``: packages of executables.

Source of the format: google-coral/libedgetpu ``executable/executable.fbs`` and
``tflite/custom_op_data.cc``. An executable may load parameters into the TPU's own memory once
(PARAMETER_CACHING), or run and have the parameters that did not fit sent at every inference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Mapping, Optional, Tuple

from boardbench.inspect.errors import Malformed
from boardbench.inspect.flatbuffer import I16, I32, U64, FlatBuffer, Pointer, Table, claim_tree
from boardbench.inspect.flexbuffer import Span, read_map
from boardbench.inspect.ledger import OPTIONS, Ledger
from boardbench.inspect.tflite_schema import EDGETPU_OP

CUSTOM_OP = EDGETPU_OP
STAND_ALONE, PARAMETER_CACHING, EXECUTION_ONLY = 0, 1, 2

EXECUTABLE = "edgetpu executable"
INSTRUCTIONS = "edgetpu instructions"
PARAMETERS_CACHED = "edgetpu parameters cached"
PARAMETERS_STREAMED = "edgetpu parameters streamed"

# Keys of the options map.
_PACKAGE_KEY, _MORE_PACKAGES_KEY = "4", "7"
_STEPS_PER_PACKAGE = 20

# What the tables of an executable point to that is counted and not read.
_POINTERS: Mapping[str, Tuple[Pointer, ...]] = {
    "FieldOffset": ((0, "table", "Meta"),),
    "Meta": ((2, "text", None),),
    "DmaHints": ((0, "tables", "DmaHint"),),
    "DmaHint": ((1, "union", (0, {1: "DmaDescriptorHint", 2: "Plain", 3: "Plain", 4: "Plain"})),),
    "DmaDescriptorHint": ((0, "table", "Meta"),),
    "Layer": (
        (5, "table", "Plain"),
        (8, "union", (7, {1: "OutputLayer", 2: "Plain"})),
        (11, "table", "TensorShape"),
    ),
    "OutputLayer": ((0, "table", "OutputLayout"), (2, "table", "OutputShapeInfo")),
    "OutputLayout": tuple((field, "vector", 4) for field in range(6)),
    "OutputShapeInfo": ((0, "tables", "TensorLayout"), (1, "vector", 4)),
    "TensorLayout": ((0, "table", "TensorShape"), (1, "vector", 4)),
    "TensorShape": ((0, "vector", 8),),
    "Plain": (),
}


@dataclass(frozen=True)
class Layer:
    """An input or output of an executable."""

    name: str
    size_bytes: int
    shape: Tuple[int, int, int]


@dataclass(frozen=True)
class Executable:
    """One executable of a package."""

    type: int
    batch_size: int
    scratch_bytes: int
    parameters_bytes: int
    instructions_bytes: int
    chip: str
    caching_token: int
    inputs: Tuple[Layer, ...]
    outputs: Tuple[Layer, ...]


@dataclass(frozen=True)
class Package:
    """What one compiled subgraph runs."""

    min_runtime_version: Optional[int]
    compiler_version: str
    model_identifier: str
    executables: Tuple[Executable, ...]

    @property
    def cached_bytes(self) -> int:
        """Parameters kept in the TPU's own memory."""
        return sum(found.parameters_bytes for found in self.executables if found.type == PARAMETER_CACHING)

    @property
    def streamed_bytes(self) -> int:
        """Parameters sent at every inference."""
        return sum(found.parameters_bytes for found in self.executables if found.type != PARAMETER_CACHING)


def read_packages(options: memoryview, ledger: Ledger) -> Tuple[Package, ...]:
    """The packages in an ``edgetpu-custom-op``'s options; raises Malformed when they can't be read.

    There is one, and more where the file was compiled for several chips: the first is the one that runs on
    an Edge TPU of today.
    """
    budget = ledger.budget(len(options))
    values = read_map(options, budget)
    spans: List[Span] = []
    first = values.get(_PACKAGE_KEY)
    if isinstance(first, Span):
        spans.append(first)
    more = values.get(_MORE_PACKAGES_KEY)
    if isinstance(more, tuple):
        spans.extend(value for value in more if isinstance(value, Span))
    if not spans:
        raise Malformed(f"the {CUSTOM_OP} holds no executable: the file is damaged; compile the model again")
    ledger.claim(0, min(span.start for span in spans), OPTIONS)
    packages = []
    seen = set()
    for span in spans:
        budget.spend(_STEPS_PER_PACKAGE, f"the {CUSTOM_OP}")
        if span.stop <= span.start or span in seen:
            raise Malformed(f"the {CUSTOM_OP} holds an empty or repeated executable; compile the model again")
        seen.add(span)
        packages.append(_read_package(options[span.start : span.stop], ledger.at(span.start)))
    ledger.claim(max(span.stop for span in spans), len(options), OPTIONS)
    for value in values.values():
        # Compiler 1.0 left an executable of its own here, which runtimes ignore.
        if isinstance(value, Span) and value not in seen:
            ledger.claim(value.start, value.stop, OPTIONS)
    return tuple(packages)


def _read_package(data: memoryview, ledger: Ledger) -> Package:
    buffer = FlatBuffer(data, "the Edge TPU package", ledger)
    # As the runtime does, a mark other than this one is let through (driver/package_registry.cc).
    root = buffer.root()
    ledger.claim(4, 8, EXECUTABLE)
    executables: Tuple[Executable, ...] = ()
    multi = root.span(1)
    if multi is not None and multi[1] > multi[0]:
        executables = _read_executables(data[multi[0] : multi[1]], ledger.at(multi[0]))
    signature = root.span(2)
    if signature is not None:
        ledger.claim(signature[0], signature[1], EXECUTABLE)
    return Package(
        min_runtime_version=root.integer(0, I32) if root.has(0) else None,
        compiler_version=root.text(4, EXECUTABLE),
        model_identifier=root.text(7, EXECUTABLE),
        executables=executables,
    )


def _read_executables(data: memoryview, ledger: Ledger) -> Tuple[Executable, ...]:
    root = FlatBuffer(data, "the Edge TPU package", ledger).root()
    spans = root.spans(0)
    if len(set(spans)) != len(spans):
        raise Malformed("the Edge TPU package repeats an executable: damaged; compile the model again")
    return tuple(_read_executable(data[start:stop], ledger.at(start)) for start, stop in spans)


def _read_executable(data: memoryview, ledger: Ledger) -> Executable:
    root = FlatBuffer(data, "the Edge TPU executable", ledger).root()
    kind = root.integer(13, I16)
    model = root.span(2)
    if model is not None:
        ledger.claim(model[0], model[1], EXECUTABLE)
    parameters = root.span(6) or (0, 0)
    ledger.claim(
        parameters[0], parameters[1], PARAMETERS_CACHED if kind == PARAMETER_CACHING else PARAMETERS_STREAMED
    )
    instructions = 0
    for chunk in root.tables(5, INSTRUCTIONS):
        bits = chunk.span(0)
        if bits is not None:
            instructions += bits[1] - bits[0]
            ledger.claim(bits[0], bits[1], INSTRUCTIONS)
        claim_tree(chunk.tables(1, EXECUTABLE), "FieldOffset", _POINTERS)
    hints = root.table(7, EXECUTABLE)
    if hints is not None:
        claim_tree((hints,), "DmaHints", _POINTERS)
    root.text(1, EXECUTABLE)
    return Executable(
        type=kind,
        batch_size=root.integer(3, I32),
        scratch_bytes=max(0, root.integer(4, I32)),
        parameters_bytes=parameters[1] - parameters[0],
        instructions_bytes=instructions,
        chip=root.text(10, EXECUTABLE),
        caching_token=root.integer(14, U64),
        inputs=_read_layers(root, 8),
        outputs=_read_layers(root, 9),
    )


def _read_layers(root: Table, field: int) -> Tuple[Layer, ...]:
    layers = root.tables(field, EXECUTABLE)
    claim_tree(layers, "Layer", _POINTERS)
    return tuple(
        Layer(
            layer.text(0, EXECUTABLE),
            layer.integer(1, I32),
            (layer.integer(2, I32), layer.integer(3, I32), layer.integer(4, I32)),
        )
        for layer in layers
    )
