"""An engine of TensorRT built of an ONNX model, or found in a cache where it was built before.

What an engine depends on is in the name of its file in the cache: the model, the version of TensorRT, the
kind of GPU, the options of the build and the sizes of the inputs.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Mapping, Optional, Tuple

from boardbench.agent.bench import shapes
from boardbench.agent.bench.runtime import InputsRejected, ModelRejected, OptionRejected
from boardbench.agent.domain import Cache, TensorInfo

if TYPE_CHECKING:
    import tensorrt

PRECISIONS: Mapping[str, Tuple[str, ...]] = {
    "default": (),
    "f16": ("FP16",),
    "bf16": ("BF16",),
    "i8": ("INT8",),
    "f16+i8": ("FP16", "INT8"),
    "bf16+i8": ("BF16", "INT8"),
}
"""Precisions that layers may have besides those of the model, as flags of the builder."""

FLAGS_OF: Mapping[str, str] = {"float32": "default", "float16": "f16", "bfloat16": "bf16", "int8": "i8"}
"""The common names of precisions, and those above that they stand for."""

TYPES: Mapping[str, str] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Build:
    """How an engine is to be built, and where it is kept."""

    precision: str
    tf32: bool
    workspace_mib: Optional[int]
    optimization_level: Optional[int]
    calibration_cache: Optional[Path]
    dla: Optional[int]
    dla_fallback: bool
    timing_cache: Optional[Path] = None
    cache_dir: Optional[Path] = None
    compute_precision: str = ""
    """The common setting that asked for the precision; empty where the option did."""

    @property
    def wish(self) -> str:
        """What asked for the precision, for a message."""
        if self.compute_precision:
            return f"compute_precision={self.compute_precision}"
        return f"precision={self.precision}"

    def refuse(self, model: Path) -> None:
        """Raises OptionRejected where anything but the defaults is asked for: ``model`` is built already."""
        given = {
            "compute_precision": bool(self.compute_precision),
            "precision": self.precision != "default" and not self.compute_precision,
            "tf32": not self.tf32 and not self.compute_precision,
            "workspace_mib": self.workspace_mib is not None,
            "optimization_level": self.optimization_level is not None,
            "calibration_cache": self.calibration_cache is not None,
            "dla_fallback": not self.dla_fallback,
            "timing_cache": self.timing_cache is not None,
            "cache_dir": self.cache_dir is not None,
        }
        named = [name for name, is_given in given.items() if is_given]
        if named:
            raise OptionRejected(
                f"{', '.join(named)}: for building an engine of an .onnx; {model.name} is an engine already"
            )


class Said:
    """What TensorRT complained of."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._lines: List[str] = []

    def clear(self) -> None:
        """Forgets it."""
        self._lines = []

    def add(self, line: str) -> None:
        """Takes one more line."""
        if len(self._lines) < 5:
            self._lines.append(" ".join(line.split()))

    def told(self) -> str:
        """The first of it, for a message."""
        return "; ".join(self._lines)[:500] or "nothing"


def logger(said: Said) -> tensorrt.ILogger:
    """One that tells ``said`` what goes wrong, and nobody anything else."""
    import tensorrt as trt

    severe = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            # TensorRT's classes want their own __init__ and no super().
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in severe:
                said.add(msg)

    return Log()


class Recipe:
    """An ONNX model that is read, with its sizes settled: what an engine is made of."""

    def __init__(
        self,
        log: tensorrt.ILogger,
        said: Said,
        gpu: str,
        model: Path,
        content: bytes,
        build: Build,
        given: Mapping[str, Tuple[int, ...]],
    ) -> None:
        """Reads ``content`` of the file ``model``. Raises ModelRejected and InputsRejected."""
        import tensorrt as trt

        self._said = said
        self._model = model
        self._build = build
        self._builder = trt.Builder(log)
        self._network = self._parsed(log, content)
        self._settled = shapes.settle(
            [_input(self._network, at, model) for at in range(self._network.num_inputs)], given
        )
        self._scales: Optional[bytes] = None
        if build.calibration_cache is not None:
            self._scales = _content(build.calibration_cache, "calibration_cache")
            if self._scales is None:
                raise OptionRejected(f"calibration_cache: {build.calibration_cache} is not there")
        self._kept: Optional[Path] = None
        self._engine_was_kept = False
        # Not asked for where the whole engine is there.
        self._timings_were_kept: Optional[bool] = None
        if build.cache_dir is not None:
            self._kept = build.cache_dir / f"{self._key(content, gpu)}.engine"

    @property
    def shapes(self) -> Mapping[str, Tuple[int, ...]]:
        """Sizes of the inputs by name."""
        return {tensor.name: tensor.shape for tensor in self._settled}

    def caches(self) -> Tuple[Cache, ...]:
        """What is kept on disk now; after :meth:`kept`, and :meth:`make` where that found nothing."""
        found = []
        for name, path, warm in (
            ("engine", self._kept, self._engine_was_kept),
            ("timing cache", self._build.timing_cache, self._timings_were_kept),
        ):
            if path is not None and path.exists():
                found.append(Cache(name, warm, path.stat().st_size, str(path)))
        return tuple(found)

    def kept(self) -> Tuple[Optional[bytes], str]:
        """The engine that was built before, and in words where it is; None where there is none."""
        if self._kept is None:
            return None, ""
        content = _content(self._kept, "cache_dir")
        self._engine_was_kept = content is not None
        return content, f"a cached load: the engine comes from {self._kept}"

    def make(self) -> Tuple[tensorrt.IHostMemory, str]:
        """The engine built anew, and in words how. Raises ModelRejected and OptionRejected."""
        import tensorrt as trt

        build, config = self._build, self._config()
        self._engine_was_kept = False
        timings: Optional[bytes] = None
        if build.timing_cache is not None:
            timings = _content(build.timing_cache, "timing_cache")
            self._timings_were_kept = timings is not None
            config.set_timing_cache(config.create_timing_cache(timings or b""), False)
        began = time.perf_counter()
        plan: Optional[tensorrt.IHostMemory] = self._builder.build_serialized_network(self._network, config)
        seconds = time.perf_counter() - began
        if plan is None:
            raise ModelRejected(
                f"TensorRT {trt.__version__} builds no engine of {self._model.name}{self._why_not_dla()} "
                f"(it said: {self._said.told()})"
            )
        if build.timing_cache is not None:
            _keep(build.timing_cache, config.get_timing_cache().serialize(), "timing_cache")
        origin = f"a first load: the engine was built in {seconds:.1f} s with {_named(build, timings)}"
        if self._kept is not None:
            _keep(self._kept, plan, "cache_dir")
            origin = f"{origin}, and kept as {self._kept}"
        return plan, origin

    def _parsed(self, log: tensorrt.ILogger, content: bytes) -> tensorrt.INetworkDefinition:
        import tensorrt as trt

        # Since TensorRT 10 there is no other batch, and the flag is going away.
        explicit: Any = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
        old = int(trt.__version__.partition(".")[0]) < 10 and explicit is not None
        network = self._builder.create_network(1 << int(explicit) if old else 0)
        # It holds the weights that the network points to, until an engine is built.
        self._parser = parser = trt.OnnxParser(network, log)
        if not parser.parse(content):
            faults = "; ".join(
                " ".join(str(parser.get_error(at).desc()).split()) for at in range(min(3, parser.num_errors))
            )
            lower = faults.lower()
            todo = (
                "it uses an operation that this version does not have"
                if "unsupported" in lower or "no importer" in lower or "plugin not found" in lower
                else "is the file whole?"
            )
            raise ModelRejected(
                f"TensorRT {trt.__version__} can't read {self._model.name}: {todo} "
                f"(it said: {(faults or self._said.told())[:500]})"
            )
        return network

    def _config(self) -> tensorrt.IBuilderConfig:
        import tensorrt as trt

        build, config = self._build, self._builder.create_builder_config()
        # Names, types and formats of all layers are kept; kernels are the same without.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for name in PRECISIONS[build.precision]:
            config.set_flag(_flag(name, build.wish))
        if "INT8" in PRECISIONS[build.precision]:
            self._give_scales(config)
        elif self._scales is not None:
            raise OptionRejected("calibration_cache is for layers of 8 bits: ask for precision=i8, too")
        if not build.tf32:
            config.clear_flag(_flag("TF32", "tf32=off"))
        if build.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, build.workspace_mib << 20)
        if build.optimization_level is not None:
            if not hasattr(config, "builder_optimization_level"):
                raise OptionRejected(f"TensorRT {trt.__version__} has no optimization_level: leave it out")
            config.builder_optimization_level = build.optimization_level
        if build.dla is not None:
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = build.dla
            if build.dla_fallback:
                config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
        self._give_shapes(config)
        return config

    def _give_shapes(self, config: tensorrt.IBuilderConfig) -> None:
        """Builds for the settled sizes alone, where the model leaves any open."""
        profile = self._builder.create_optimization_profile()
        opened = [
            tensor
            for at, tensor in enumerate(self._settled)
            if any(size < 0 for size in sizes(self._network.get_input(at).shape))
        ]
        for tensor in opened:
            size: Any = tensor.shape
            profile.set_shape(tensor.name, size, size, size)
        if opened:
            config.add_optimization_profile(profile)

    def _give_scales(self, config: tensorrt.IBuilderConfig) -> None:
        """Gives 8-bit layers their scales, which are in the model or come from a calibration."""
        import tensorrt as trt

        if self._scales is not None:
            if not hasattr(trt, "IInt8EntropyCalibrator2"):
                raise OptionRejected(
                    f"TensorRT {trt.__version__} takes no calibration: quantise the model with Q/DQ nodes"
                )
            # The builder does not keep it alive.
            self._calibrator = _calibrator(self._scales)
            config.int8_calibrator = self._calibrator
            return
        quantise = (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE)
        layers = (self._network.get_layer(at) for at in range(self._network.num_layers))
        if not any(layer.type in quantise for layer in layers):
            raise OptionRejected(
                f"{self._build.wish}: {self._model.name} has no Q/DQ nodes, so the scales of "
                "its 8-bit layers are unknown: quantise it, or give a calibration with calibration_cache=FILE"
            )

    def _key(self, content: bytes, gpu: str) -> str:
        """Names an engine by all that it depends on."""
        import tensorrt as trt

        digest = hashlib.sha256(content)
        digest.update(self._scales or b"")
        about = replace(self._build, calibration_cache=None, timing_cache=None, cache_dir=None)
        digest.update(repr((trt.__version__, gpu, about, sorted(self.shapes.items()))).encode())
        return digest.hexdigest()[:32]

    def _why_not_dla(self) -> str:
        if self._build.dla is None:
            return ""
        if self._build.dla_fallback:
            return " for the DLA, whose layers are in f16 or i8: give --option precision=f16"
        return " for the DLA alone: dla_fallback=on lets the GPU take what the DLA does not"


def sizes(dimensions: Any) -> Tuple[int, ...]:
    """TensorRT's ``Dims`` as a tuple."""
    return tuple(int(size) for size in dimensions)


def dtype(told: Any, name: str, model: Path) -> str:
    """NumPy's name of a type. Raises ModelRejected where it has none."""
    found = TYPES.get(str(told.name))
    if found is None:
        raise ModelRejected(
            f"{name} of {model.name} is of the type {told.name}, which NumPy does not have: export the model "
            "with inputs and outputs of an ordinary type"
        )
    return found


def _named(build: Build, timings: Optional[bytes]) -> str:
    if build.timing_cache is None:
        return "no timing cache"
    return f"the timing cache {build.timing_cache} of {len(timings or b'')} bytes"


def _input(network: tensorrt.INetworkDefinition, at: int, model: Path) -> TensorInfo:
    tensor = network.get_input(at)
    if tensor.is_shape_tensor:
        raise InputsRejected(
            f"input {tensor.name} of {model.name} is a shape, for which no data can be given: export the "
            "model with fixed sizes"
        )
    name = str(tensor.name)
    return TensorInfo(name=name, dtype=dtype(tensor.dtype, name, model), shape=sizes(tensor.shape))


def _calibrator(scales: bytes) -> Any:
    import tensorrt as trt

    class Scales(trt.IInt8EntropyCalibrator2):
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: List[str]) -> Any:  # noqa: ARG002 - there is none: the cache holds all
            return None

        def read_calibration_cache(self) -> bytes:
            return scales

        def write_calibration_cache(self, cache: Any) -> None:
            """Leaves the file as it is."""

    return Scales()


def _flag(name: str, option: str) -> tensorrt.BuilderFlag:
    import tensorrt as trt

    flag: Optional[tensorrt.BuilderFlag] = getattr(trt.BuilderFlag, name, None)
    if flag is None:
        raise OptionRejected(
            f"{option}: TensorRT {trt.__version__} has no flag {name} and takes precisions as they are in "
            "the model: convert that"
        )
    return flag


def _content(path: Path, option: str) -> Optional[bytes]:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OptionRejected(f"{option}: {path} can't be read: {error.strerror}") from error


def _keep(path: Path, content: Any, option: str) -> None:
    """Writes the file in one step: another run may read it at any time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        written = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(memoryview(content))
            written.replace(path)
        except BaseException:
            written.unlink()
            raise
    except OSError as error:
        raise OptionRejected(f"{option}: {path} can't be written: {error.strerror}") from error
