"""TensorRT of NVIDIA's GPUs and of the DLA of a Jetson, through its own Python package and libcudart.

An engine (``.engine``, ``.plan``) is loaded as it is; an ``.onnx`` model is built into one here. A timed call
is what an application waits for: inputs to the GPU, ``execute_async_v3``, outputs back, the stream's end.
Placement and precision of a layer are told by the engine's inspector, whose words are those of
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-tools.html; times by IProfiler.
Keeps to what TensorRT 8.5 (JetPack 5) and 10 have in common, and asks before it uses more.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

from boardbench.agent.bench import cudart, doubts, placement, shapes, stats
from boardbench.agent.bench.gpu_watch import GpuWatch
from boardbench.agent.bench.options import OptionReader
from boardbench.agent.bench.runtime import (
    CACHE,
    COMPUTE_PRECISION,
    NO_SETTINGS,
    InputsRejected,
    ModelRejected,
    NoProfile,
    OptionRejected,
    Outcome,
    Profile,
    ProfileRequest,
    RuntimeUnavailable,
    Settings,
)
from boardbench.agent.bench.runtimes.tensorrt_build import (
    FLAGS_OF,
    PRECISIONS,
    Build,
    Recipe,
    Said,
    dtype,
    logger,
    sizes,
)
from boardbench.agent.domain import (
    Cache,
    Evidence,
    OpPlacement,
    Placement,
    TensorInfo,
    Transfers,
    Unit,
    Warning,
)

if TYPE_CHECKING:
    import tensorrt

    from boardbench.agent.bench.runtime import Tensors

TIMING_CACHE = "timing.cache"
METHOD = "TensorRT's IProfiler, layer by layer, and CUDA events around the transfers"

DRIVERS = ("nvidia", "tegra")

_MARKS = (b"ftrt", b"ptrt")
_MOST_WORKSPACE_MIB = 1 << 20
_MOST_DLA = 7
# Inferences for the split into copies and computing; a second of them delays no run noticeably.
_LEAST_SPLIT, _MOST_SPLIT, _SPLIT_SECONDS = 5, 50, 1.0
# The inspector's words in TensorRT 8 ("Row major linear FP16 format") and 10 ("Half"), the longer ones first.
_PRECISION_WORDS = (
    ("bf16", "bf16"),
    ("bfloat16", "bf16"),
    ("fp16", "f16"),
    ("half", "f16"),
    ("fp8", "f8"),
    ("int8", "i8"),
    ("int4", "i4"),
    ("int64", "i64"),
    ("int32", "i32"),
    ("bool", "bool"),
    ("fp32", "f32"),
    ("float", "f32"),
)


_PRECISION_NAMES: Mapping[str, str] = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f8": "float8",
    "i4": "int4",
    "i8": "int8",
    "i32": "int32",
    "i64": "int64",
}


@dataclass(frozen=True)
class Layer:
    """A layer of the engine, as the inspector tells of it."""

    name: str
    type: str
    precision: str
    unit: Unit


class TensorRtRuntime:
    """The engine."""

    name = "tensorrt"
    formats: Tuple[str, ...] = ("tensorrt", "onnx")
    settings: Tuple[str, ...] = (COMPUTE_PRECISION, CACHE)
    options: Mapping[str, str] = {
        "precision": "precisions beside the model's: f16, bf16, i8, f16+i8, bf16+i8; as compute_precision",
        "tf32": "on (default) or off: whether float32 may be multiplied with ten bits of fraction",
        "workspace_mib": "most memory that a layer may take while the engine is built",
        "optimization_level": "how long the builder searches for kernels, 0 to 5",
        "calibration_cache": "a file on the board with the scales of a calibration, for int8",
        "timing_cache": "a file on the board that keeps the times of kernels; as the setting cache",
        "cache_dir": "a folder on the board for built engines; as the setting cache, and never cleaned up",
        "dla": "the core of the DLA",
        "dla_fallback": "on (default) or off: whether the GPU takes what the DLA does not",
        "host_memory": "pinned (default) or pageable: what inputs and outputs are copied from and to",
    }
    sys_root = Path("/")

    def __init__(self) -> None:
        """Imports nothing yet."""
        self._cuda: Optional[cudart.Cudart] = None
        self._said = Said()
        self._logger: Any = None

    def version(self) -> str:
        """Imports TensorRT, and looks for a GPU."""
        self._ready()
        import tensorrt as trt

        return f"tensorrt {trt.__version__}"

    def _ready(self) -> cudart.Cudart:
        if self._cuda is not None:
            return self._cuda
        try:
            import tensorrt as trt
        except Exception as error:  # a broken installation raises anything
            from boardbench.agent.bench import wheels

            place = wheels.here()
            # The package's Python sees what the system's has.
            name_it = (
                " and name /usr/bin/python3 as python in [runtimes.tensorrt]" if place.brought is None else ""
            )
            elsewhere = (
                ""
                if wheels.TENSORRT.lacks(place)
                else f"; elsewhere {wheels.how('tensorrt', wheels.TENSORRT)}"
            )
            raise RuntimeUnavailable(
                f"no TensorRT in {sys.executable} ({type(error).__name__}: {error}). On a Jetson it is the "
                f"system's: sudo apt install python3-libnvinfer{name_it}{elsewhere}"
            ) from error
        try:
            self._cuda = cudart.load()
        except cudart.NoCuda as error:
            raise RuntimeUnavailable(f"TensorRT {trt.__version__} has no GPU to run on: {error}") from error
        self._logger = logger(self._said)
        trt.init_libnvinfer_plugins(self._logger, "")
        return self._cuda

    def devices(self) -> Tuple[str, ...]:
        """The GPU, and the DLA where there is one."""
        self._ready()
        return ("gpu", "dla") if self._dla_cores() else ("gpu",)

    def _dla_cores(self) -> int:
        import tensorrt as trt

        return int(trt.Runtime(self._logger).num_DLA_cores)

    def load(
        self,
        model: Path,
        *,
        device: str,
        threads: Optional[int],
        options: Mapping[str, str],
        shapes: Mapping[str, Tuple[int, ...]],
        allow_fallback: bool = False,
        settings: Settings = NO_SETTINGS,
    ) -> TensorRtModel:
        """Loads an engine, or builds one of an ONNX model."""
        cuda = self._ready()
        reader = OptionReader(self.name, options)
        precision = reader.choice("precision", tuple(PRECISIONS), default="default")
        tf32 = reader.switch("tf32", default=True)
        workspace = reader.number("workspace_mib", least=1, most=_MOST_WORKSPACE_MIB)
        level = reader.number("optimization_level", least=0, most=5)
        calibration = reader.text("calibration_cache", "a file on the board with the scales of a calibration")
        timing_cache = reader.text("timing_cache", "a file on the board that keeps the times of tactics")
        cache_dir = reader.text("cache_dir", "a folder on the board for built engines")
        core = reader.number("dla", least=0, most=_MOST_DLA)
        dla_fallback = reader.switch("dla_fallback", default=True)
        pinned = reader.choice("host_memory", ("pinned", "pageable"), default="pinned") == "pinned"
        reader.refuse_both("precision", COMPUTE_PRECISION, settings.compute_precision)
        for name in ("cache_dir", "timing_cache"):
            reader.refuse_both(name, CACHE, settings.cache_dir)
        in_force = reader.finish()
        if settings.compute_precision:
            precision = FLAGS_OF[settings.compute_precision]
            if settings.compute_precision == "float32":
                reader.refuse_both("tf32", COMPUTE_PRECISION, tf32 and "float32")
                tf32, in_force["tf32"] = False, "off"
        if settings.cache_dir is not None:
            cache_dir = str(settings.cache_dir)
            timing_cache = str(settings.cache_dir / TIMING_CACHE)
        if threads is not None:
            raise OptionRejected("tensorrt takes no number of threads: leave --threads out")
        core, fault = self._core(device, core, allow_fallback)
        build = Build(
            precision,
            tf32,
            workspace,
            level,
            Path(calibration) if calibration else None,
            core,
            dla_fallback,
            timing_cache=Path(timing_cache) if timing_cache else None,
            cache_dir=Path(cache_dir) if cache_dir else None,
            compute_precision=settings.compute_precision,
        )
        return TensorRtModel(
            cuda,
            self._logger,
            self._said,
            model,
            build=build,
            pinned=pinned,
            wanted=device.upper(),
            fault=fault,
            allow_fallback=allow_fallback,
            options=in_force,
            given=shapes,
            sys_root=self.sys_root,
        )

    def _core(self, device: str, core: Optional[int], allow_fallback: bool) -> Tuple[Optional[int], str]:
        """The DLA to use, and why it is none where one was asked for."""
        if device == "gpu":
            if core is not None:
                raise OptionRejected(f"dla={core} chooses a core of the DLA: ask for it with --device dla")
            return None, ""
        if device != "dla":
            raise OptionRejected(f"tensorrt has no device {device!r}; it has {', '.join(self.devices())}")
        cores, core = self._dla_cores(), core or 0
        if core < cores:
            return core, ""
        fault = f"this board has no DLA {core} (it has {cores})"
        if not allow_fallback:
            raise OptionRejected(f"tensorrt has no device 'dla' here: {fault}; it has gpu")
        return None, fault


class TensorRtModel:
    """An engine with its buffers. Used by one thread."""

    profiles = True
    threads: Optional[int] = None

    def __init__(
        self,
        cuda: cudart.Cudart,
        log: Any,
        said: Said,
        model: Path,
        *,
        build: Build,
        pinned: bool,
        wanted: str,
        fault: str,
        allow_fallback: bool,
        options: Mapping[str, str],
        given: Mapping[str, Tuple[int, ...]],
        sys_root: Path,
    ) -> None:
        """Loads or builds the engine, settles its shapes, and takes the memory of its tensors."""
        self._cuda = cuda
        self._logger = log
        self._said = said
        self._model = model
        self._build = build
        self._pinned = pinned
        self.options = options
        self.wanted = wanted
        self.device_fallback = f"all runs on the GPU: {fault}" if fault else ""
        self._device: Dict[str, int] = {}
        self._host: List[int] = []
        self._arrays: Dict[str, Any] = {}
        self._stream = 0
        self._caches: Tuple[Cache, ...] = ()
        self._open = True
        said.clear()
        content = _read(model)
        try:
            engine = _engine_of(content)
            if engine is not None:
                build.refuse(model)
                self._engine, self._origin = self._deserialized(engine), "the engine as it was pushed"
            else:
                recipe = Recipe(log, said, cuda.gpu(), model, content, build, given)
                self._engine, self._origin = self._made(recipe)
                self._caches = recipe.caches()
                # The engine may have its inputs in another order.
                given = recipe.shapes
            self._prepare(given)
            layers = self.layers()
            if wanted == "DLA" and not fault and layers and not any(x.unit is Unit.NPU for x in layers):
                only = "the DLA takes no layer of it"
                if not allow_fallback:
                    raise ModelRejected(
                        f"{model.name} on dla: {only}; to measure that, allow it (--allow-fallback)"
                    )
                self.device_fallback = f"all runs on the GPU: {only}"
        except BaseException:
            self.close()
            raise
        unit = Unit.GPU if wanted == "GPU" or self.device_fallback else Unit.NPU
        self.watch = _Watch(cuda.standin, unit, sys_root)

    # ---- the engine --------------------------------------------------------------------------------------

    def _deserialized(self, content: Any) -> tensorrt.ICudaEngine:
        import tensorrt as trt

        # Kept: an engine must not outlive it.
        self._runtime = trt.Runtime(self._logger)
        if self._build.dla is not None:
            self._runtime.DLA_core = self._build.dla
        # Code inside an engine stays off: engine_host_code_allowed is False by default.
        engine: Optional[tensorrt.ICudaEngine] = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise ModelRejected(
                f"TensorRT {trt.__version__} refuses {self._model.name}: an engine runs on the kind of GPU "
                "and the version of TensorRT that it was built for; push the .onnx to have it built "
                f"here (it said: {self._said.told()})"
            )
        return engine

    def _made(self, recipe: Recipe) -> Tuple[tensorrt.ICudaEngine, str]:
        """The engine of an ONNX model, and in words where it came from."""
        found, origin = recipe.kept()
        if found is not None:
            try:
                return self._deserialized(found), origin
            except ModelRejected:
                self._said.clear()  # cut short, or of a driver that is gone: built again
        plan, origin = recipe.make()
        return self._deserialized(plan), origin

    def caches(self) -> Tuple[Cache, ...]:
        """The engine and the times of kernels that are kept; nothing of an engine that was pushed."""
        return self._caches

    # ---- its tensors -------------------------------------------------------------------------------------

    def _prepare(self, given: Mapping[str, Tuple[int, ...]]) -> None:
        """Settles the sizes of all tensors and gives each a place on the GPU."""
        import tensorrt as trt

        engine = self._engine
        names = [engine.get_tensor_name(at) for at in range(engine.num_io_tensors)]
        feeds = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = shapes.settle([self._tensor(name) for name in feeds], given)
        context = engine.create_execution_context()
        if context is None:
            raise MemoryError(f"the GPU has no memory to run {self._model.name} ({self._said.told()})")
        self._context = context
        for tensor in self.inputs:
            if not context.set_input_shape(tensor.name, tensor.shape):
                ranges = engine.get_tensor_profile_shape(tensor.name, 0)
                least, most = list(sizes(ranges[0])), list(sizes(ranges[-1]))
                raise InputsRejected(
                    f"the engine {self._model.name} was built for {tensor.name} from {least} to {most}, and "
                    f"not for {list(tensor.shape)}"
                )
        self.outputs = tuple(
            replace(self._tensor(name), shape=sizes(context.get_tensor_shape(name)))
            for name in names
            if name not in feeds
        )
        for tensor in self.outputs:
            if any(size < 0 for size in tensor.shape):
                raise ModelRejected(
                    f"the size of output {tensor.name} of {self._model.name} depends on the data, which "
                    "boardbench does not run in TensorRT: export it with a fixed number of results"
                )
        for tensor in (*self.inputs, *self.outputs):
            self._device[tensor.name] = self._cuda.malloc(shapes.size_bytes(tensor))
            context.set_tensor_address(tensor.name, self._device[tensor.name])
        self._stream = self._cuda.stream()

    def _tensor(self, name: str) -> TensorInfo:
        import tensorrt as trt

        engine = self._engine
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise ModelRejected(
                f"{name} of {self._model.name} is a shape that the engine reads on the host, for which no "
                "data can be given: export the model with fixed sizes"
            )
        if engine.get_tensor_vectorized_dim(name) >= 0:
            raise ModelRejected(
                f"{name} of {self._model.name} is packed for DLA or tensor cores: build the engine with "
                "linear inputs and outputs"
            )
        return TensorInfo(
            name=name,
            dtype=dtype(engine.get_tensor_dtype(name), name, self._model),
            shape=sizes(engine.get_tensor_shape(name)),
        )

    def arena_bytes(self) -> Optional[int]:
        """Memory of the GPU for what lies between layers."""
        engine = self._engine
        newer = getattr(engine, "device_memory_size_v2", None)
        return int(engine.device_memory_size if newer is None else newer)

    # ---- running -----------------------------------------------------------------------------------------

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """Inputs to the GPU, the engine, outputs back, and the end of the stream."""
        uploads, downloads = self._copies(feeds)
        execute, stream, wait = self._context.execute_async_v3, self._stream, self._cuda.wait(self._stream)

        def infer() -> None:
            status = 0
            for copy in uploads:
                status = status or copy()
            if status or not execute(stream):
                self._failed(status)
            for copy in downloads:
                status = status or copy()
            status = wait() or status
            if status:
                self._failed(status)

        return infer

    def _copies(self, feeds: Tensors) -> Tuple[List[Callable[[], int]], List[Callable[[], int]]]:
        """Calls that copy every input to the GPU, and every output back."""
        self._free_host()
        uploads, downloads = [], []
        for tensor in self.inputs:
            array = feeds[tensor.name]
            if self._pinned:
                held = self._host_array(tensor)
                held[...] = array
                array = held
            # The copy reads the array itself; it lives as long as the call.
            self._arrays[tensor.name] = array
            uploads.append(
                self._cuda.upload(
                    self._device[tensor.name], array.ctypes.data, shapes.size_bytes(tensor), self._stream
                )
            )
        for tensor in self.outputs:
            self._arrays[tensor.name] = array = self._host_array(tensor)
            downloads.append(
                self._cuda.download(
                    array.ctypes.data, self._device[tensor.name], shapes.size_bytes(tensor), self._stream
                )
            )
        return uploads, downloads

    def _host_array(self, tensor: TensorInfo) -> Any:
        import numpy as np

        if not self._pinned:
            return np.zeros(tensor.shape, tensor.dtype)
        size_bytes = shapes.size_bytes(tensor)
        address = self._cuda.host_malloc(size_bytes)
        self._host.append(address)
        held = memoryview((ctypes.c_uint8 * max(1, size_bytes)).from_address(address))
        return np.ndarray(tensor.shape, tensor.dtype, buffer=held)

    def _failed(self, status: int) -> None:
        self._cuda.check(status)
        raise cudart.CudaError(f"TensorRT refuses to run {self._model.name} ({self._said.told()})")

    def fetch(self, returned: object) -> Tensors:  # noqa: ARG002 - copied to where the call was told to
        """Copies of what came back."""
        return {tensor.name: self._arrays[tensor.name].copy() for tensor in self.outputs}

    # ---- where and how long ------------------------------------------------------------------------------

    def layers(self) -> List[Layer]:
        """Every layer of the engine; without types where it was built to tell names only."""
        import tensorrt as trt

        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        told = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        try:
            found = json.loads(told).get("Layers", [])
        except (ValueError, AttributeError):
            return []
        return [_layer(each) for each in found]

    def placement(self) -> Placement:
        """Layer by layer, from the engine's inspector."""
        layers = self.layers()
        if not layers:
            return placement.unknown(
                f"{self._origin}; it was built without a word about its layers (profilingVerbosity=none)"
            )
        if all(layer.unit is Unit.UNSPECIFIED for layer in layers) and not self._may_use_dla():
            layers = [replace(layer, unit=Unit.GPU) for layer in layers]
        ops = [
            OpPlacement(
                index=index,
                type=layer.type,
                name=layer.name,
                unit=layer.unit,
                delegate=_DELEGATES.get(layer.unit, ""),
                precision=_PRECISION_NAMES.get(layer.precision, layer.precision),
                cause="the DLA does not take it" if self._is_fallback(layer) else "",
            )
            for index, layer in enumerate(layers)
        ]
        parts = [f"{len(ops)} layers of the engine, fused"]
        counts = Counter(op.delegate or ("CPU" if op.unit is Unit.CPU else "no known unit") for op in ops)
        parts.append(", ".join(f"{number} on the {where}" for where, number in counts.most_common()))
        if self.wanted == "DLA" and (moved := sum(self._is_fallback(layer) for layer in layers)):
            parts.append(f"{moved} fell back from the DLA to the GPU")
        precisions = Counter(layer.precision for layer in layers if layer.precision)
        if precisions:
            parts.append("as executed " + ", ".join(f"{n} in {name}" for name, n in precisions.most_common()))
        if self._cuda.standin:
            parts.append(f"{self._cuda.standin} takes the place of CUDA")
        parts.append(self._origin)
        return placement.known(
            ops,
            evidence=Evidence.PARTITION,
            detail="; ".join(parts),
            standin=bool(self._cuda.standin),
            wanted=self.wanted,
        )

    def _may_use_dla(self) -> bool:
        return self._build.dla is not None or int(self._runtime.num_DLA_cores) > 0

    def _is_fallback(self, layer: Layer) -> bool:
        return self.wanted == "DLA" and layer.unit is Unit.GPU

    def split(self, feeds: Tensors, runs: Iterable[object]) -> List[Tuple[float, float, float]]:
        """Seconds of the way in, of the engine and of the way out of every inference, by the GPU's clock."""
        uploads, downloads = self._copies(feeds)
        wait, found = self._cuda.wait(self._stream), []
        events = self._cuda.events(4)
        try:
            for _ in runs:
                self._cuda.record(events[0], self._stream)
                for copy in uploads:
                    self._cuda.check(copy())
                self._cuda.record(events[1], self._stream)
                if not self._context.execute_async_v3(self._stream):
                    self._failed(0)
                self._cuda.record(events[2], self._stream)
                for copy in downloads:
                    self._cuda.check(copy())
                self._cuda.record(events[3], self._stream)
                self._cuda.check(wait())
                into, through, out = (
                    self._cuda.between_seconds(events[at], events[at + 1]) for at in range(3)
                )
                found.append((into, through, out))
        finally:
            self._cuda.end_events(events)
        return found

    def transfers(self, feeds: Tensors) -> Optional[Transfers]:
        """What of an inference is copying and what is computing, by CUDA events."""
        found = self.split(feeds, _turns())
        into, through, out = (statistics.median(each[at] for each in found) for at in range(3))
        standin = f" of {self._cuda.standin}, no hardware" if self._cuda.standin else ""
        return Transfers(into, through, out, len(found), f"CUDA events{standin}")

    def timed(self, feeds: Tensors, runs: Iterable[object]) -> Iterator[Tuple[float, Dict[str, float]]]:
        """Seconds of every inference under the profiler, and of each of its layers by name."""
        call, times = self.bind(feeds), _profiler()
        # The context only points to it.
        self._times = self._context.profiler = times
        for _ in runs:
            times.seconds.clear()
            began = time.perf_counter()
            call()
            yield time.perf_counter() - began, dict(times.seconds)

    def _free_host(self) -> None:
        self._arrays = {}
        for address in self._host:
            self._cuda.host_free(address)
        self._host = []

    def close(self) -> None:
        """Frees the engine and its memory. Idempotent."""
        if not self._open:
            return
        self._open = False
        for name in ("_context", "_engine", "_runtime"):  # in this order: each lives in the next
            self.__dict__.pop(name, None)
        self._free_host()
        for address in self._device.values():
            self._cuda.free(address)
        self._device = {}
        if self._stream:
            self._cuda.end_stream(self._stream)


def _turns(clock: Callable[[], float] = time.monotonic) -> Iterator[int]:
    """One for every inference whose copies are timed: enough for a median, and not for long."""
    began = clock()
    for turn in range(_MOST_SPLIT):
        if turn >= _LEAST_SPLIT and clock() - began > _SPLIT_SECONDS:
            return
        yield turn


_DELEGATES = {Unit.GPU: "GPU", Unit.NPU: "DLA"}


class _Watch(GpuWatch):
    """Looks at the GPU's counters, and says where a stand-in is in its place."""

    def __init__(self, standin: str, unit: Unit, sys_root: Path) -> None:
        super().__init__("TensorRT", unit, DRIVERS, sys_root=sys_root)
        self._standin = standin

    def doubts(self) -> Iterable[Warning]:
        """That it is a stand-in."""
        if self._standin:
            yield doubts.warn("standin", f"{self._standin} took the place of CUDA and TensorRT")

    def outcome(
        self,
        placement: Placement,
        *,
        runs: int,
        cpu_seconds: float,
        wall_seconds: float,
        queued_seconds: Optional[float],
    ) -> Outcome:
        """What the counters say, labelled."""
        found = super().outcome(
            placement,
            runs=runs,
            cpu_seconds=cpu_seconds,
            wall_seconds=wall_seconds,
            queued_seconds=queued_seconds,
        )
        return replace(found, accelerator=replace(found.accelerator, standin=bool(self._standin)))


def _profiler() -> Any:
    import tensorrt as trt

    class Times(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.seconds: Dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.seconds[layer_name] = self.seconds.get(layer_name, 0.0) + ms / 1e3

    return Times()


def profile(runtime: TensorRtRuntime, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    """Profiles the engine as it was loaded in the run. Raises NoProfile, and what ``load`` raises."""
    request.begin(METHOD)
    model = request.load(runtime)
    try:
        return _profiled(model, request, runs)
    finally:
        model.close()


def _profiled(model: TensorRtModel, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    feeds = request.feeds(model.inputs)
    placed = model.placement()
    model.bind(feeds)()  # the first one allocates
    transfers = model.split(feeds, runs())
    inferences = list(model.timed(feeds, runs()))
    if not inferences or not transfers:
        raise NoProfile("not one inference was profiled")
    seconds = {}
    for op in placed.ops:
        times = [by_name[op.name] for _, by_name in inferences if op.name in by_name]
        if len(times) == len(inferences):
            seconds[op.index] = stats.midmean(times)
    away = {op.name for op in placement.fallen_back(placed, model.wanted)}
    into, through, out = (stats.midmean([each[at] for each in transfers]) for at in range(3))
    return Profile(
        method=METHOD,
        detail=f"{len(transfers)} inferences by CUDA events: {into * 1e3:.3f} ms to the GPU, "
        f"{through * 1e3:.3f} ms in the engine, {out * 1e3:.3f} ms back; {len(inferences)} more under "
        f"IProfiler: {len(seconds)} of {len(placed.ops)} layers have a time of their own",
        units=tuple(op.unit for op in placed.ops),
        whole_seconds=tuple(whole for whole, _ in inferences),
        fallback_seconds=tuple(
            sum(time for name, time in by_name.items() if name in away) for _, by_name in inferences
        ),
        op_seconds=seconds,
    )


def _layer(told: Any) -> Layer:
    if not isinstance(told, dict):
        return Layer(str(told), "layer", "", Unit.UNSPECIFIED)
    kind = str(told.get("LayerType", "")) or "layer"
    outputs = [each for each in told.get("Outputs", ()) if isinstance(each, dict)]
    places = {str(each.get("Location", "Device")) for each in outputs}
    if kind == "DLA":
        unit = Unit.NPU
    elif places == {"Host"}:
        unit = Unit.CPU  # sizes are computed by the processor
    else:
        unit = Unit.GPU
    words = " ".join(str(each.get("Format/Datatype", each.get("Datatype", ""))) for each in outputs).lower()
    precision = next((name for word, name in _PRECISION_WORDS if word in words), "")
    return Layer(str(told.get("Name", "")), kind, precision, unit)


def _read(model: Path) -> bytes:
    try:
        return model.read_bytes()
    except OSError as error:
        raise ModelRejected(f"{model.name} can't be read: {error.strerror}") from error


def _engine_of(content: bytes) -> Optional[memoryview]:
    """The engine in a file, also behind the JSON that Ultralytics puts before it; None for another file."""
    if content[:4] in _MARKS:
        return memoryview(content)
    if content[3:5] == b"\x00{" and len(content) > 8:
        start = struct.unpack_from("<I", content)[0] + 4
        if content[start : start + 4] in _MARKS:
            return memoryview(content)[start:]
    return None
