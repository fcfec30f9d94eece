"""TensorFlow Lite models made in code: tensors, operators, quantisation, signatures, metadata.

The file format is the public FlatBuffers schema (tensorflow/lite/schema/schema.fbs); the classes
generated from it come with ai-edge-litert, the writer is the flatbuffers package. Both are loaded
when a model is begun and not before. The same calls give the same bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

# What the converters of TensorFlow ensure for constant tensors: kernels may load whole vectors.
_BUFFER_ALIGNMENT_BYTES = 16

# Operators past this number are only in the new field; the old one then holds this mark.
# (tensorflow/lite/schema/schema_utils.cc, ConvertBuiltinCodeToDeprecatedBuiltinCode)
_DEPRECATED_CODE_LIMIT = 127

_SCHEMA_VERSION = 3


class BuildUnavailable(Exception):
    """A package that builds models is missing; the message names it and the command that installs it."""


class SupportsBytes(Protocol):
    """Anything that gives its little-endian bytes: ``numpy.ndarray``, ``array.array``, ``memoryview``."""

    def tobytes(self) -> bytes:
        """The elements, outermost dimension first."""
        ...


class Options(NamedTuple):
    """An operator's options: the table's name in the schema, and its fields as the Python classes spell them.

    ``Options("Conv2DOptions", {"strideH": 2, "strideW": 2})``. A field left out has the schema's default.
    """

    table: str
    fields: Mapping[str, object] = {}


class ModelBuilder:
    """One model file in the making. Begin with :meth:`subgraph`; the first one is what the interpreter runs.

    Raises:
        BuildUnavailable: flatbuffers or ai-edge-litert is not installed.
    """

    def __init__(self, description: str = "boardbench") -> None:
        self._schema, self._flatbuffers = _load_packages()
        self._model: Any = _filled(
            self._schema.ModelT,
            version=_SCHEMA_VERSION,
            operatorCodes=[],
            subgraphs=[],
            description=description,
            # Buffer 0 is empty by the schema's rule: tensors without data point at it.
            buffers=[self._schema.BufferT()],
            metadata=[],
            signatureDefs=[],
        )
        self._codes: dict[tuple[int, str, int], int] = {}

    def subgraph(self, name: str = "main") -> GraphBuilder:
        """A new subgraph, empty; they are numbered in the order of these calls."""
        table = _filled(self._schema.SubGraphT, name=name, tensors=[], operators=[], inputs=[], outputs=[])
        self._model.subgraphs.append(table)
        return GraphBuilder(self, table)

    def buffer(self, data: bytes) -> int:
        """Number of a new buffer with these bytes."""
        self._model.buffers.append(self._aligned_buffer(data))
        return len(self._model.buffers) - 1

    def metadata(self, name: str, data: bytes) -> None:
        """Adds a named metadata entry, as converters do for "min_runtime_version"."""
        self._model.metadata.append(_filled(self._schema.MetadataT, name=name, buffer=self.buffer(data)))

    def signature(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        *,
        key: str = "serving_default",
        subgraph: int = 0,
    ) -> None:
        """Adds a signature: the names by which callers know the tensors, each with a tensor's number."""
        maps = [
            [_filled(self._schema.TensorMapT, name=name, tensorIndex=index) for name, index in side.items()]
            for side in (inputs, outputs)
        ]
        self._model.signatureDefs.append(
            _filled(
                self._schema.SignatureDefT,
                inputs=maps[0],
                outputs=maps[1],
                signatureKey=key,
                subgraphIndex=subgraph,
            )
        )

    def finish(self) -> bytes:
        """The whole file."""
        builder = self._flatbuffers.Builder(0)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _operator_code(self, op: str, version: int) -> int:
        builtin = getattr(self._schema.BuiltinOperator, op, None)
        custom = "" if builtin is not None else op
        code = self._schema.BuiltinOperator.CUSTOM if builtin is None else builtin
        place = (code, custom, version)
        if place not in self._codes:
            self._codes[place] = len(self._model.operatorCodes)
            self._model.operatorCodes.append(
                _filled(
                    self._schema.OperatorCodeT,
                    deprecatedBuiltinCode=min(code, _DEPRECATED_CODE_LIMIT),
                    builtinCode=code,
                    customCode=custom or None,
                    version=version,
                )
            )
        return self._codes[place]

    def _aligned_buffer(self, data: bytes) -> object:
        # The generated Pack() aligns data to one byte only, and writes lists element by element.
        buffer = _filled(self._schema.BufferT, data=data)
        schema = self._schema

        def pack(builder: Any) -> object:
            builder.StartVector(1, len(data), _BUFFER_ALIGNMENT_BYTES)
            builder.head -= len(data)
            builder.Bytes[builder.head : builder.head + len(data)] = data
            vector = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, vector)
            return schema.BufferEnd(builder)

        buffer.Pack = pack
        return buffer


class GraphBuilder:
    """One subgraph in the making; made by :meth:`ModelBuilder.subgraph`."""

    def __init__(self, model: ModelBuilder, table: Any) -> None:
        self._builder = model
        self._schema: Any = model._schema
        self._table = table

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str = "int8",
        *,
        data: bytes | SupportsBytes | None = None,
        scale: float | Sequence[float] | None = None,
        zero_point: int | Sequence[int] = 0,
        quantized_dimension: int = 0,
        variable: bool = False,
    ) -> int:
        """Number of a new tensor.

        Args:
            name: Its name in the file.
            shape: Outermost first; -1 for a dimension left open (stored as 1, with the open shape beside it,
                as converters do).
            dtype: The schema's type name in lower case: "int8", "float32", "int64", "string", ….
            data: Little-endian bytes of a constant; None for a tensor that is computed.
            scale: Step of the affine quantisation: one, or one a slice of ``quantized_dimension``.
            zero_point: Stored value of 0.0: one for all, or one a slice.
            quantized_dimension: The dimension that per-channel scales run along.
            variable: State that outlives an inference.
        """
        quantization = None
        if scale is not None:
            scales = [float(scale)] if isinstance(scale, (int, float)) else [float(each) for each in scale]
            points = [zero_point] * len(scales) if isinstance(zero_point, int) else list(zero_point)
            if len(points) != len(scales):
                raise ValueError(f"tensor {name!r} has {len(scales)} scales but {len(points)} zero points")
            quantization = _filled(
                self._schema.QuantizationParametersT,
                scale=scales,
                zeroPoint=points,
                quantizedDimension=quantized_dimension,
            )
        contents = data if data is None or isinstance(data, bytes) else data.tobytes()
        self._table.tensors.append(
            _filled(
                self._schema.TensorT,
                shape=[max(1, size) for size in shape] if -1 in shape else list(shape),
                shapeSignature=list(shape) if -1 in shape else None,
                type=self._named(self._schema.TensorType, dtype.upper(), "element type"),
                buffer=0 if contents is None else self._builder.buffer(contents),
                name=name,
                quantization=quantization,
                isVariable=variable,
                hasRank=True,
            )
        )
        return len(self._table.tensors) - 1

    def operator(
        self,
        op: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: Options | None = None,
        *,
        custom_options: bytes | None = None,
        version: int = 1,
    ) -> int:
        """Number of a new operator; it runs after those before it.

        Args:
            op: The schema's name ("CONV_2D"); any other name makes a custom operator ("edgetpu-custom-op").
            inputs: Tensor numbers; -1 for an optional input that is left out.
            outputs: Tensor numbers.
            options: Built-in options, when the operator has any.
            custom_options: Raw options of a custom operator (often a FlexBuffer).
            version: Version of the operator that its types and options need.
        """
        table = _filled(
            self._schema.OperatorT,
            opcodeIndex=self._builder._operator_code(op, version),
            inputs=list(inputs),
            outputs=list(outputs),
            customOptions=None if custom_options is None else list(custom_options),
        )
        if options is not None:
            made = self._named(self._schema, f"{options.table}T", "options table")()
            for field, value in options.fields.items():
                if not hasattr(made, field):
                    raise ValueError(
                        f"{options.table} has no field {field!r}; it has {', '.join(vars(made))}"
                    )
                setattr(made, field, value)
            number = getattr(self._schema.BuiltinOptions, options.table, None)
            if number is not None:
                table.builtinOptionsType, table.builtinOptions = number, made
            else:
                number = self._named(self._schema.BuiltinOptions2, options.table, "options table")
                table.builtinOptions2Type, table.builtinOptions2 = number, made
        self._table.operators.append(table)
        return len(self._table.operators) - 1

    def inputs(self, *tensors: int) -> None:
        """Says which tensors are fed, in this order."""
        self._table.inputs = list(tensors)

    def outputs(self, *tensors: int) -> None:
        """Says which tensors are the results, in this order."""
        self._table.outputs = list(tensors)

    def enum(self, name: str, member: str) -> int:
        """Value of a member of one of the schema's enums: ``enum("Padding", "VALID")``."""
        return int(self._named(self._named(self._schema, name, "enum"), member, f"member of {name}"))

    @staticmethod
    def _named(owner: Any, name: str, kind: str) -> Any:
        found = getattr(owner, name, None)
        if found is None:
            raise ValueError(f"the TensorFlow Lite schema has no {kind} {name!r}")
        return found


def _filled(kind: Any, **fields: object) -> Any:
    """A table of the schema with these fields: classes that older flatbuffers generated take no arguments."""
    table = kind()
    for name, value in fields.items():
        setattr(table, name, value)
    return table


def _load_packages() -> tuple[Any, Any]:
    modules: list[ModuleType] = []
    for name, package in (
        ("ai_edge_litert.schema_py_generated", "ai-edge-litert"),
        ("flatbuffers", "flatbuffers"),
    ):
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            raise BuildUnavailable(
                f"TensorFlow Lite models are built with the package {package}, which can't be imported "
                f"({error}); install it: pip install 'boardbench[demo]'"
            ) from error
    return modules[0], modules[1]
