"""A fake of NVIDIA's package ``tensorrt``: the part of its interface that boardbench uses, on the CPU.

Names, arguments and what is refused are those of TensorRT 10.13 as published in ``tensorrt-stubs``; where 8.6
differs, ``STANDIN_TENSORRT_VERSION`` chooses it. Graphs of Relu, Add, Identity, Softmax, QuantizeLinear and
DequantizeLinear are computed with NumPy when the stream of the stand-in for CUDA gets to them. The DLA of
this fake takes Relu and Add, in f16 or i8 only. Its inspector speaks as TensorRT's does.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import time
import weakref
from typing import Any

import numpy as np

__version__ = os.environ.get("STANDIN_TENSORRT_VERSION", "10.13.0.35")
_MAJOR = int(__version__.partition(".")[0])
_DLA_CORES = int(os.environ.get("STANDIN_TENSORRT_DLA", "0"))
_MARK = b"ftrt"
_DLA_TAKES = ("Relu", "Add")
_TYPES = {"Relu": "Activation", "Add": "ElementWise", "Softmax": "SoftMaxV2", "Identity": "NoOp"}

_cuda = ctypes.CDLL(os.environ["BOARDBENCH_CUDART"])
_cuda.boardbench_device.restype = ctypes.c_void_p
_cuda.boardbench_device.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_cuda.cudaLaunchHostFunc.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
_cuda.cudaStreamSynchronize.argtypes = [ctypes.c_void_p]
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

DataType = enum.Enum(
    "DataType",
    dict(
        FLOAT=0,
        HALF=1,
        INT8=2,
        INT32=3,
        BOOL=4,
        UINT8=5,
        **({"FP8": 6, "BF16": 7, "INT64": 8} if _MAJOR > 9 else {}),
    ),
)
TensorIOMode = enum.Enum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
TensorLocation = enum.Enum("TensorLocation", {"DEVICE": 0, "HOST": 1})
DeviceType = enum.Enum("DeviceType", {"GPU": 0, "DLA": 1})
ProfilingVerbosity = enum.Enum("ProfilingVerbosity", {"LAYER_NAMES_ONLY": 0, "NONE": 1, "DETAILED": 2})
LayerInformationFormat = enum.Enum("LayerInformationFormat", {"ONELINE": 0, "JSON": 1})
MemoryPoolType = enum.Enum("MemoryPoolType", {"WORKSPACE": 0, "DLA_MANAGED_SRAM": 1})
BuilderFlag = enum.Enum(
    "BuilderFlag",
    {
        "TF32": 7,
        "GPU_FALLBACK": 3,
        **({"FP16": 0, "INT8": 2} if _MAJOR < 11 else {}),
        **({"BF16": 17} if 9 < _MAJOR < 11 else {}),
    },
)
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"EXPLICIT_BATCH": 0})
LayerType = enum.Enum(
    "LayerType",
    {"ACTIVATION": 1, "ELEMENTWISE": 2, "SOFTMAX": 3, "QUANTIZE": 4, "DEQUANTIZE": 5, "IDENTITY": 6},
)
_LAYER_TYPES = {
    "Relu": LayerType.ACTIVATION,
    "Add": LayerType.ELEMENTWISE,
    "Softmax": LayerType.SOFTMAX,
    "QuantizeLinear": LayerType.QUANTIZE,
    "DequantizeLinear": LayerType.DEQUANTIZE,
    "Identity": LayerType.IDENTITY,
}
_ONNX_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16"}
_NUMPY = {
    "FLOAT": "float32",
    "UINT8": "uint8",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "HALF": "float16",
}


class Dims(tuple[int, ...]):
    """As pybind gives it: a sequence."""


class _Base:
    _ready = False

    def __init__(self) -> None:
        self._ready = True


class ILogger(_Base):
    Severity = enum.Enum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProfiler(_Base):
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class IInt8EntropyCalibrator2(_Base):
    pass


def _checked(logger: Any) -> Any:
    if not isinstance(logger, ILogger) or not logger._ready:
        raise TypeError("incompatible function arguments: ILogger.__init__() must be called")
    return logger


def init_libnvinfer_plugins(logger: Any, namespace: str) -> None:
    _checked(logger)


class IHostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.content)


class ITensor:
    def __init__(self, name: str, dtype: Any, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, Dims(shape)
        self.is_shape_tensor = name == "shape"


class ILayer:
    def __init__(self, node: Any) -> None:
        self.name, self.type = node["name"], _LAYER_TYPES[node["op"]]


class INetworkDefinition:
    def __init__(self) -> None:
        self.graph: dict[str, Any] = {}
        self._weights: Any = lambda: None

    num_inputs = property(lambda self: len(self.graph["inputs"]))
    num_layers = property(lambda self: len(self.graph["nodes"]))

    def get_input(self, index: int) -> ITensor:
        name, dtype, shape = self.graph["inputs"][index]
        return ITensor(name, DataType[dtype], shape)

    def get_layer(self, index: int) -> ILayer:
        return ILayer(self.graph["nodes"][index])


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network, self._errors = network, []
        _checked(logger)

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        import onnx

        try:
            graph = onnx.load_model_from_string(bytes(model)).graph
        except Exception:
            self._errors.append(ParserError("Failed to parse ONNX model"))
            return False
        if not graph.node:
            self._errors.append(ParserError("Failed to parse ONNX model: it has no graph"))
            return False
        for node in graph.node:
            if node.op_type not in _LAYER_TYPES:
                self._errors.append(ParserError(f"No importer registered for op: {node.op_type}"))
                return False
        self._network._weights = weakref.ref(self)
        self._network.graph = {
            "inputs": [_value(each) for each in graph.input],
            "outputs": [_value(each) for each in graph.output],
            "constants": {each.name: onnx.numpy_helper.to_array(each).tolist() for each in graph.initializer},
            "nodes": [
                {
                    "op": node.op_type,
                    "name": node.name or f"{node.op_type}_{at}",
                    "inputs": list(node.input),
                    "outputs": list(node.output),
                }
                for at, node in enumerate(graph.node)
            ],
        }
        return True


def _value(value: Any) -> tuple[str, str, tuple[int, ...]]:
    kind = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    return value.name, _ONNX_TYPES[kind.elem_type], shape


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [tuple(min), tuple(opt), tuple(max)]


class IBuilderConfig:
    def __init__(self) -> None:
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.default_device_type = DeviceType.GPU
        self.DLA_core = -1
        self.int8_calibrator: Any = None
        self.flags = {BuilderFlag.TF32}
        self.pools: dict[Any, int] = {}
        self.profile: IOptimizationProfile | None = None
        self.cache: ITimingCache | None = None
        if _MAJOR > 8 or __version__.startswith("8.6"):
            self.builder_optimization_level = 3

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self.cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profile = profile
        return 0


class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = _checked(logger)

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        if _MAJOR < 10 and not flags & 1:
            raise RuntimeError("the ONNX parser needs a network with an explicit batch")
        if _MAJOR > 10 and flags:
            raise RuntimeError("unknown flag")
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        if network._weights() is None:
            raise RuntimeError(
                "segmentation fault: the parser is gone, and with it the weights of the network"
            )
        graph, flags = network.graph, {flag.name for flag in config.flags}
        if any(-1 in shape for _, _, shape in graph["inputs"]) and config.profile is None:
            return self._refused(
                "Network has dynamic or shape inputs, but no optimization profile has been defined."
            )
        half = bool(flags & {"FP16", "INT8", "BF16"})
        on_dla = config.default_device_type is DeviceType.DLA
        if on_dla and not half:
            return self._refused("DLA validation failed: Default DLA is enabled but layer has type FP32.")
        fits = [on_dla and node["op"] in _DLA_TAKES for node in graph["nodes"]]
        if on_dla and not all(fits) and "GPU_FALLBACK" not in flags:
            return self._refused(
                "Default DLA is enabled but layer is not supported on DLA and GPU fallback is off."
            )
        if config.int8_calibrator is not None:
            graph = {**graph, "scales": len(config.int8_calibrator.read_calibration_cache())}
        if config.cache is not None:
            config.cache.content += b"timing of a layer\n" * len(graph["nodes"])
        plan = {
            "graph": graph,
            "dla": fits,
            "precision": "bf16" if "BF16" in flags else "f16" if half else "f32",
            "profile": config.profile.shapes if config.profile else {},
            "verbosity": config.profiling_verbosity.name,
            "version": __version__,
            "flags": sorted(flags),
            "level": getattr(config, "builder_optimization_level", None),
            "workspace": config.pools.get(MemoryPoolType.WORKSPACE),
        }
        return IHostMemory(_MARK + b"\0\0\0\1" + bytes(16) + json.dumps(plan).encode())

    def _refused(self, message: str) -> None:
        self._logger.log(ILogger.Severity.ERROR, message)


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = _checked(logger)
        self.DLA_core = -1
        self.num_DLA_cores = _DLA_CORES

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        content = bytes(serialized_engine)
        try:
            plan = json.loads(content[24:]) if content[:4] == _MARK else None
        except ValueError:
            plan = None
        if plan is None:
            self._logger.log(
                ILogger.Severity.ERROR, "Error Code 4: stdArchiveReader: magic tag does not match"
            )
            return None
        if plan["version"] != __version__:
            self._logger.log(
                ILogger.Severity.ERROR,
                "Error Code 6: the engine plan file is not compatible with this version",
            )
            return None
        if any(plan["dla"]) and self.DLA_core < 0:
            self._logger.log(
                ILogger.Severity.ERROR, "Error Code 2: the engine needs a DLA core and none is set"
            )
            return None
        return ICudaEngine(plan)


class ICudaEngine:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        graph = plan["graph"]
        self._tensors = [(*each, TensorIOMode.INPUT) for each in graph["inputs"]]
        self._tensors += [(*each, TensorIOMode.OUTPUT) for each in graph["outputs"]]
        self.device_memory_size = 4096
        if _MAJOR > 9:
            self.device_memory_size_v2 = 4096

    num_io_tensors = property(lambda self: len(self._tensors))

    def _of(self, name: str) -> Any:
        return next(each for each in self._tensors if each[0] == name)

    def get_tensor_name(self, index: int) -> str:
        return self._tensors[index][0]

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[self._of(name)[1]]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._of(name)[2])

    def get_tensor_mode(self, name: str) -> Any:
        return self._of(name)[3]

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.DEVICE

    def get_tensor_vectorized_dim(self, name: str) -> int:
        return -1

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        shapes = self.plan["profile"].get(name) or [self._of(name)[2]] * 3
        return [Dims(shape) for shape in shapes]

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._plan = engine.plan
        self.execution_context: IExecutionContext | None = None

    def get_engine_information(self, format: Any) -> str:
        layers: list[Any] = []
        names = {"f16": "Row major linear FP16 format" if _MAJOR < 10 else "Half", "bf16": "BFloat16"}
        for names_of, kind, nodes in _layers(self._plan):
            text = names.get(self._plan["precision"], "Row major linear FP32" if _MAJOR < 10 else "Float")
            described = {
                "Name": names_of,
                "LayerType": kind,
                "Inputs": [
                    {"Name": each, "Location": "Device", "Format/Datatype": text}
                    for each in nodes[0]["inputs"]
                ],
                "Outputs": [
                    {"Name": each, "Location": "Device", "Format/Datatype": text}
                    for each in nodes[-1]["outputs"]
                ],
            }
            layers.append(described if self._plan["verbosity"] == "DETAILED" else names_of)
        return json.dumps({"Layers": [] if self._plan["verbosity"] == "NONE" else layers, "Bindings": []})


def _layers(plan: dict[str, Any]) -> list[tuple[str, str, list[Any]]]:
    """Nodes of a row on the DLA are one layer, as TensorRT makes of them; others are one each."""
    found: list[tuple[str, str, list[Any]]] = []
    for node, on_dla in zip(plan["graph"]["nodes"], plan["dla"], strict=True):
        if on_dla and found and found[-1][1] == "DLA":
            found[-1][2].append(node)
        else:
            found.append((node["name"], "DLA" if on_dla else _TYPES.get(node["op"], node["op"]), [node]))
    return [
        (f"{{ForeignNode[{nodes[0]['name']}...{nodes[-1]['name']}]}}" if kind == "DLA" else name, kind, nodes)
        for name, kind, nodes in found
    ]


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.profiler: Any = None
        self.enqueue_emits_profile = True
        self._call = _CALL(self._run)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        if len(shape) != len(least) or not all(
            a <= b <= c for a, b, c in zip(least, shape, most, strict=True)
        ):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        if self._engine.get_tensor_mode(name) is TensorIOMode.INPUT:
            return Dims(self._shapes.get(name, self._engine.get_tensor_shape(name)))
        first = next(iter(self._shapes.values()), ())
        return Dims(
            (first[at] if at < len(first) else -1) if size < 0 else size
            for at, size in enumerate(self._engine.get_tensor_shape(name))
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if {name for name, *_ in self._engine._tensors} != set(self._addresses):
            return False
        _cuda.cudaLaunchHostFunc(stream_handle, ctypes.cast(self._call, ctypes.c_void_p), None)
        if self.profiler is not None and self.enqueue_emits_profile:
            _cuda.cudaStreamSynchronize(stream_handle)
        return True

    def _array(self, name: str) -> Any:
        dtype, shape = np.dtype(_NUMPY[self._engine.get_tensor_dtype(name).name]), self.get_tensor_shape(name)
        size = int(np.prod(shape)) * dtype.itemsize
        address = _cuda.boardbench_device(self._addresses[name], size)
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)

    def _run(self, _data: Any) -> None:
        graph = self._engine.plan["graph"]
        values = {name: np.asarray(value, np.float32) for name, value in graph["constants"].items()}
        values.update({name: self._array(name).copy() for name, *_ in graph["inputs"]})
        for name, _, nodes in _layers(self._engine.plan):
            began = time.perf_counter()
            for node in nodes:
                values[node["outputs"][0]] = _computed(node["op"], [values[each] for each in node["inputs"]])
            if self.profiler is not None:
                self.profiler.report_layer_time(name, (time.perf_counter() - began) * 1e3)
        for name, *_ in graph["outputs"]:
            self._array(name)[...] = values[name]


def _computed(op: str, values: list[Any]) -> Any:
    if op == "Relu":
        return np.maximum(values[0], 0)
    if op == "Add":
        return values[0] + values[1]
    if op == "Softmax":
        powers = np.exp(values[0] - values[0].max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)
    if op == "QuantizeLinear":
        return np.clip(np.rint(values[0] / values[1]), -128, 127)
    if op == "DequantizeLinear":
        return values[0] * values[1]
    return values[0]
