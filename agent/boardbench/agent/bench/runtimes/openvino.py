"""OpenVINO. A device is a plugin: ``cpu``, ``gpu``, ``npu``; ``auto`` and ``hetero`` choose among them.

Models are read as they are: ``.onnx``, ``.tflite``, and OpenVINO's own pair of ``.xml`` and ``.bin``, pushed
as one archive. Placement comes from the compiled model: the executed graph (CompiledModel.get_runtime_model)
lists operations as the plugin runs them, fused, with the precision of each; with ``hetero``
Core.query_model says which plugin takes which operation of the model, by the rule that HETERO splits by;
``auto`` tells what it chose in EXECUTION_DEVICES.
https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes.html
"""

from __future__ import annotations

import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple

from boardbench.agent.bench import caches, placement, shapes, stats
from boardbench.agent.bench.options import OptionReader
from boardbench.agent.bench.runtime import (
    CACHE,
    COMPUTE_PRECISION,
    NO_SETTINGS,
    THREADS,
    InputsRejected,
    ModelRejected,
    NoProfile,
    OptionRejected,
    Profile,
    ProfileRequest,
    RuntimeUnavailable,
    Settings,
)
from boardbench.agent.domain import Cache, Evidence, OpPlacement, Placement, TensorInfo, Unit

if TYPE_CHECKING:
    from boardbench.agent.bench.runtime import Tensors

# Plugins that choose among others; the rest is hardware.
CHOOSERS = ("auto", "hetero")
UNITS: Mapping[str, Unit] = {"CPU": Unit.CPU, "GPU": Unit.GPU, "NPU": Unit.NPU}
"""By the first part of a device's name: "GPU.1" is a GPU."""

TYPES: Mapping[str, str] = {
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "boolean": "bool",
    "string": "str",
    **{
        f"{sign}{bits}": f"{name}{bits}"
        for sign, name in (("i", "int"), ("u", "uint"))
        for bits in (8, 16, 32, 64)
    },
}
PRECISIONS = ("f32", "f16", "bf16")
HINTS: Mapping[str, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""The common names of precisions, and the plugin's of those that it can be told."""

PRECISION_NAMES: Mapping[str, str] = {
    **{short: name for name, short in HINTS.items()},
    "f64": "float64",
    "i8": "int8",
    "u8": "uint8",
}
"""What the executed graph calls a precision, and its common name."""

METHOD = "OpenVINO's own counters of every operation (PERF_COUNT)"

MOST_THREADS = 1024

# Nodes of the executed graph that hold or pass data and compute nothing.
_NO_WORK = ("Input", "Output", "Const", "Parameter", "Result")
_SUFFIXES = {"onnx": ".onnx", "tflite": ".tflite"}
# A model's text is some kilobytes an operation; beyond this it is no model.
_MOST_XML_BYTES = 512 * 1024 * 1024


class OpenVinoRuntime:
    """The engine."""

    name = "openvino"
    formats: Tuple[str, ...] = ("openvino", "onnx", "tflite")
    settings: Tuple[str, ...] = (THREADS, COMPUTE_PRECISION, CACHE)
    options: Mapping[str, str] = {
        "hint": "what the plugin is set up for: latency (default), throughput or none",
        "precision": "the plugin's name of a precision: f32, f16 or bf16; as the setting compute_precision",
        "streams": "inferences that the plugin runs side by side",
        "devices": "the plugins that auto and hetero choose among, as GPU,CPU",
        "cache_dir": "a folder on the board for compiled models; as the setting cache, and never cleaned up",
        "property.": "any property of the plugin, as property.ENABLE_CPU_PINNING=NO",
    }
    sys_root = Path("/")

    def __init__(self) -> None:
        """Imports nothing yet."""
        self._ov: Any = None
        self._core: Any = None

    def version(self) -> str:
        """Imports the engine."""
        if self._ov is None:
            try:
                import openvino

                self._core = openvino.Core()
            except Exception as error:  # a broken installation raises anything
                from boardbench.agent.bench import wheels

                raise RuntimeUnavailable(
                    f"no OpenVINO in {sys.executable} ({type(error).__name__}: {error}): "
                    f"{wheels.how(self.name, wheels.OPENVINO)}"
                ) from error
            self._ov = openvino
        return f"openvino {str(self._ov.__version__).partition('-')[0]}"

    def devices(self) -> Tuple[str, ...]:
        """cpu, then the other plugins that found their hardware, then those that choose among them."""
        self.version()
        found = [str(name).lower() for name in self._core.available_devices]
        others = [name for name in found if name != "cpu"]
        return (*(["cpu"] if "cpu" in found else []), *others, *CHOOSERS)

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
    ) -> OpenVinoModel:
        """Reads and compiles the model."""
        self.version()
        reader = OptionReader(self.name, options)
        properties: Dict[str, Any] = {}
        hint = reader.choice("hint", ("latency", "throughput", "none"), default="latency")
        if hint != "none":
            properties["PERFORMANCE_HINT"] = hint.upper()
        precision = reader.choice("precision", ("default", *PRECISIONS), default="default")
        reader.refuse_both("precision", COMPUTE_PRECISION, settings.compute_precision)
        if settings.compute_precision:
            precision = _hint(settings.compute_precision)
        if precision != "default":
            properties["INFERENCE_PRECISION_HINT"] = precision
        streams = reader.number("streams", least=1, most=MOST_THREADS)
        if streams is not None:
            properties["NUM_STREAMS"] = str(streams)
        priorities = reader.text("devices", "the plugins that auto and hetero choose among, as GPU,CPU")
        cache = reader.text("cache_dir", "a folder on the board for compiled models")
        reader.refuse_both("cache_dir", CACHE, settings.cache_dir)
        kept = settings.cache_dir or (None if cache is None else Path(cache))
        if kept is not None:
            properties["CACHE_DIR"] = str(kept)
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        properties.update(reader.prefixed("property.", "a property of the plugin"))
        in_force = reader.finish()
        if priorities is not None and device not in CHOOSERS:
            raise OptionRejected(f"devices={priorities} is for {' and '.join(CHOOSERS)}, not for {device}")
        plugin, fault = self._plugin(device, priorities, allow_fallback)
        return OpenVinoModel(
            self._ov,
            self._core,
            model,
            plugin=plugin,
            device=device,
            properties=properties,
            fault=fault,
            allow_fallback=allow_fallback,
            threads=threads,
            options=in_force,
            given=shapes,
            cache_dir=kept,
        )

    def _plugin(self, device: str, priorities: Optional[str], allow_fallback: bool) -> Tuple[str, str]:
        """Name of the plugin, and why it is not the one that was asked for (empty when it is)."""
        here = [str(name) for name in self._core.available_devices]
        if device in CHOOSERS:
            chosen = priorities or ("" if device == "auto" else ",".join(sorted(here, key=_cpu_last)))
            missing = [name for name in chosen.split(",") if name and not _is_here(name, here)]
            if missing:
                raise OptionRejected(
                    f"devices={chosen}: there is no {', '.join(missing)} here; there is {', '.join(here)}"
                )
            return (f"{device.upper()}:{chosen}" if chosen else device.upper()), ""
        if _is_here(device.upper(), here):
            return device.upper(), ""
        if device.upper().partition(".")[0] in UNITS and allow_fallback:
            return "CPU", f"OpenVINO has no {device.upper()} here"
        raise OptionRejected(
            f"OpenVINO has no device {device!r}; it has {', '.join(self.devices())}. Its GPU and NPU "
            "plugins need the drivers of the hardware (for a GPU, libOpenCL.so.1 and Intel's runtime)"
        )


def _cpu_last(name: str) -> Tuple[bool, str]:
    return name.startswith("CPU"), name


def _is_here(name: str, here: List[str]) -> bool:
    return name in here or any(each.partition(".")[0] == name for each in here)


class OpenVinoModel:
    """A compiled model."""

    watch = None
    profiles = True

    def __init__(
        self,
        ov: Any,
        core: Any,
        model: Path,
        *,
        plugin: str,
        device: str,
        properties: Mapping[str, Any],
        fault: str,
        allow_fallback: bool,
        threads: Optional[int],
        options: Mapping[str, str],
        given: Mapping[str, Tuple[int, ...]],
        cache_dir: Optional[Path] = None,
    ) -> None:
        """Reads, settles open inputs and compiles."""
        self._ov = ov
        self._model = model
        self._plugin = plugin
        self.options = options
        self.threads = threads
        self.wanted = "" if device == "cpu" else device.upper()
        self.device_fallback = f"all runs on the CPU: {fault}" if fault else ""
        self._core = core
        self._network = self._read(core, model)
        self.inputs = shapes.settle(
            [_tensor(port, at, "input", model) for at, port in enumerate(self._network.inputs)], given
        )
        self._reshape()
        self._cache = None if cache_dir is None else caches.Watched(cache_dir, "compiled blobs")
        self._compiled = self._compile(dict(properties))
        if self._cache is not None:
            self._cache.loaded(self._from_cache())
        self._check_precision(properties.get("INFERENCE_PRECISION_HINT"))
        self.outputs = tuple(
            _tensor(port, at, "output", model) for at, port in enumerate(self._compiled.outputs)
        )
        self._request: Any = self._compiled.create_infer_request()
        self._kept: List[Any] = []
        taken = self._chosen()
        if (
            self.wanted
            and not fault
            and device != "auto"
            and not any(UNITS.get(_family(name)) is not Unit.CPU for name in taken)
        ):
            only = f"{self.wanted} takes nothing but the CPU ({', '.join(taken) or 'it does not say'})"
            if not allow_fallback:
                raise ModelRejected(
                    f"{model.name} on {device}: {only}; to measure that, allow it (--allow-fallback)"
                )
            self.device_fallback = f"all runs on the CPU: {only}"

    def _read(self, core: Any, model: Path) -> Any:
        try:
            # Its frontends are chosen by the file's suffix, which a stored file does not have.
            with tempfile.TemporaryDirectory(prefix="boardbench-openvino-") as folder:
                return core.read_model(str(_with_suffix(model, Path(folder))))
        except (MemoryError, ModelRejected):
            raise
        except Exception as error:
            raise _rejected(model, error) from error

    def _reshape(self) -> None:
        """Gives the network the settled sizes, where it leaves them open."""
        open_ports = {
            at: list(tensor.shape)
            for at, (port, tensor) in enumerate(zip(self._network.inputs, self.inputs))
            if port.get_partial_shape().is_dynamic
        }
        if not open_ports:
            return
        try:
            self._network.reshape({at: self._ov.PartialShape(shape) for at, shape in open_ports.items()})
        except Exception as error:
            raise InputsRejected(
                f"{self._model.name} does not take the shapes {shapes.describe(self.inputs)}: {_said(error)}"
            ) from error

    def _compile(self, properties: Dict[str, Any]) -> Any:
        try:
            return self._core.compile_model(self._network, self._plugin, properties)
        except MemoryError:
            raise
        except Exception as error:
            said = _said(error)
            if (
                "unsupported property" in said.lower()
                or "not supported property" in said.lower()
                or "NotFound" in said
            ):
                raise OptionRejected(f"the plugin {self._plugin} refuses an option: {said[:500]}") from error
            raise _rejected(self._model, error) from error

    def _from_cache(self) -> Optional[bool]:
        """Whether the plugin imported a blob; None where it does not say."""
        try:
            return bool(self._compiled.get_property("LOADED_FROM_CACHE"))
        except Exception:
            return None

    def caches(self) -> Tuple[Cache, ...]:
        """The blobs of this model."""
        return () if self._cache is None else self._cache.caches()

    def _check_precision(self, asked: Optional[str]) -> None:
        """Raises OptionRejected when the plugin takes the hint and does something else."""
        if asked is None or self._plugin.partition(":")[0].lower() in CHOOSERS:
            return
        try:
            told = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        except Exception:
            return  # one that does not tell what it took
        taken = str(getattr(told, "get_type_name", lambda: told)())
        if taken not in (asked, ""):
            raise OptionRejected(
                f"{self._plugin} computes in {PRECISION_NAMES.get(taken, taken)} on this processor though "
                f"{PRECISION_NAMES.get(asked, asked)} was asked for: leave the precision out"
            )

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """``InferRequest.infer`` itself, without arguments: the inputs are set, and shared, once."""
        self._kept = []
        for at, tensor in enumerate(self.inputs):
            data = feeds[tensor.name]
            shared = tensor.dtype != "str"
            held = self._ov.Tensor(data, shared_memory=shared)
            self._request.set_input_tensor(at, held)
            # The engine reads the array itself; it lives as long as the request uses it.
            self._kept.append((data, held))
        call: Callable[[], object] = self._request.infer
        return call

    def fetch(self, returned: object) -> Tensors:  # noqa: ARG002 - the request holds what it returned
        """Copies of the request's output tensors."""
        import numpy as np

        return {
            tensor.name: np.array(self._request.get_output_tensor(at).data, copy=True)
            for at, tensor in enumerate(self.outputs)
        }

    def placement(self) -> Placement:
        """Per operation of the executed graph; with HETERO per operation of the model."""
        if self._plugin.startswith("HETERO"):
            return self._split()
        graph = self.graph()
        chosen = self._chosen()
        if len(chosen) != 1:
            return placement.unknown(f"{self._plugin} runs on {', '.join(chosen) or 'it does not say what'}")
        unit = UNITS.get(_family(chosen[0]), Unit.DELEGATE)
        ops = [
            OpPlacement(
                index=index,
                type=node.type,
                name=node.name,
                unit=unit,
                delegate="" if unit is Unit.CPU else chosen[0],
                precision=PRECISION_NAMES.get(node.precision, TYPES.get(node.precision, node.precision)),
            )
            for index, node in enumerate(graph)
        ]
        precisions = Counter(node.precision for node in graph if node.precision)
        ran = ", ".join(f"{number} in {name}" for name, number in precisions.most_common())
        detail = f"{len(ops)} operations of the executed graph, fused, on {chosen[0]}"
        return placement.known(
            ops,
            evidence=Evidence.PARTITION,
            detail=f"{detail}; {ran}" if ran else detail,
            wanted=self.wanted,
        )

    def _split(self) -> Placement:
        """What each plugin of HETERO takes, by the query that it splits the model by."""
        try:
            taken: Dict[str, str] = dict(self._core.query_model(self._network, self._plugin))
        except Exception as error:
            return placement.unknown(f"{self._plugin} does not tell how it splits the model: {_said(error)}")
        ops = []
        nodes = [
            node
            for node in self._network.get_ordered_ops()
            if node.get_type_name() not in ("Constant", *_NO_WORK)
        ]
        for index, node in enumerate(nodes):
            device = taken.get(node.get_friendly_name(), "")
            unit = UNITS.get(_family(device), Unit.DELEGATE) if device else Unit.UNSPECIFIED
            ops.append(
                OpPlacement(
                    index=index,
                    type=node.get_type_name(),
                    name=node.get_friendly_name(),
                    unit=unit,
                    delegate="" if unit in (Unit.CPU, Unit.UNSPECIFIED) else device,
                )
            )
        counts = Counter(op.delegate or "CPU" for op in ops if op.unit is not Unit.UNSPECIFIED)
        split = ", ".join(f"{number} on {name}" for name, number in counts.most_common())
        return placement.known(
            ops,
            evidence=Evidence.PARTITION,
            detail=f"operations of the model as HETERO splits them: {split}",
            wanted=self.wanted,
        )

    def _chosen(self) -> List[str]:
        """Devices that run the compiled model."""
        try:
            found = self._compiled.get_property("EXECUTION_DEVICES")
        except Exception:
            return []
        names = [found] if isinstance(found, str) else [str(name) for name in found]
        # AUTO marks a device that it runs on for the time being as "(CPU)".
        return [name.strip("()") for name in names]

    def graph(self) -> List[GraphNode]:
        """Operations as the plugin runs them, in their order."""
        nodes = []
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            about = node.get_rt_info()
            kind = _text(about, "layerType") or node.get_type_name()
            if kind in _NO_WORK:
                continue
            nodes.append(GraphNode(node.get_friendly_name(), kind, _text(about, "runtimePrecision")))
        return nodes

    def timed(self, runs: Iterable[object]) -> List[Tuple[float, Dict[str, float]]]:
        """Seconds of one inference for each of ``runs``, with those of every operation by its name."""
        found = []
        for _ in runs:
            began = time.perf_counter()
            self._request.infer()
            seconds = time.perf_counter() - began
            by_name: Dict[str, float] = {}
            for entry in self._request.profiling_info:
                if str(entry.status).endswith("EXECUTED"):
                    by_name[entry.node_name] = (
                        by_name.get(entry.node_name, 0.0) + entry.real_time.total_seconds()
                    )
            found.append((seconds, by_name))
        return found

    def close(self) -> None:
        """Frees the request and the compiled model."""
        self._request = self._compiled = self._network = None
        self._kept = []


class GraphNode:
    """An operation of the executed graph."""

    __slots__ = ("name", "precision", "type")

    def __init__(self, name: str, type: str, precision: str) -> None:
        """As the plugin names them."""
        self.name = name
        self.type = type
        self.precision = precision


def profile(runtime: OpenVinoRuntime, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    """Profiles the model as it was loaded in the run. Raises NoProfile, and what ``load`` raises."""
    request.begin(METHOD)
    model = runtime.load(
        request.model_path,
        device=request.device,
        threads=request.threads,
        options={**request.options, "property.PERF_COUNT": "YES"},
        shapes=request.shapes,
        allow_fallback=request.allow_fallback,
        settings=replace(request.settings, cache_dir=None),  # compiled to be counted, it is another blob
    )
    model.bind(request.feeds(model.inputs))
    placed = model.placement()
    if not placed.ops:
        raise NoProfile(f"it is not known where operations run: {placed.detail}")
    model.timed(range(1))  # the first one allocates
    inferences = model.timed(runs())
    if not inferences:
        raise NoProfile("not one inference was profiled")
    seconds = {}
    for op in placed.ops:
        times = [by_name[op.name] for _, by_name in inferences if op.name in by_name]
        if len(times) == len(inferences):
            seconds[op.index] = stats.midmean(times)
    away = {op.name for op in placed.ops if placement.is_away(op, model.wanted)} if model.wanted else set()
    whole = tuple(whole for whole, _ in inferences)
    return Profile(
        method=METHOD,
        detail=f"{len(inferences)} inferences, {METHOD}; {len(seconds)} of {len(placed.ops)} operations have "
        "a time of their own",
        units=tuple(op.unit for op in placed.ops),
        whole_seconds=whole,
        fallback_seconds=tuple(
            sum(time for name, time in by_name.items() if name in away) for _, by_name in inferences
        )
        if model.wanted
        else (),
        op_seconds=seconds,
    )


def _hint(precision: str) -> str:
    """The plugin's name of a precision. Raises OptionRejected."""
    if precision not in HINTS:
        raise OptionRejected(
            f"OpenVINO computes in {', '.join(HINTS)} when it is told to, and in {precision} where the "
            "model is quantised: quantise it (nncf), and leave the precision out"
        )
    return HINTS[precision]


def _with_suffix(model: Path, folder: Path) -> Path:
    """A path to the model by which OpenVINO knows what it is."""
    with model.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"PK\x03\x04"):
        return _unpacked(model, folder)
    if head.lstrip()[:1] == b"<":
        if model.suffix == ".xml" and model.with_suffix(".bin").is_file():
            return model
        raise ModelRejected(
            f"{model.name} is OpenVINO's .xml without its .bin: push the .xml where the .bin lies beside it, "
            "or both in one .zip"
        )
    suffix = _SUFFIXES["tflite"] if head[4:8] == b"TFL3" else _SUFFIXES["onnx"]
    link = folder / f"model{suffix}"
    link.symlink_to(model.resolve())
    return link


def _unpacked(model: Path, folder: Path) -> Path:
    """The .xml of an archive, with its .bin beside it; both are named by us and by nothing in the archive."""
    with zipfile.ZipFile(model) as archive:
        found = {}
        for suffix in (".xml", ".bin"):
            names = [entry for entry in archive.infolist() if entry.filename.endswith(suffix)]
            if len(names) != 1:
                raise ModelRejected(
                    f"{model.name} holds {len(names)} {suffix} files: an archive of an OpenVINO model holds "
                    "one .xml and one .bin"
                )
            found[suffix] = names[0]
        if found[".xml"].file_size > _MOST_XML_BYTES:
            raise ModelRejected(f"{model.name}: its .xml is larger than any model's")
        for suffix, entry in found.items():
            with archive.open(entry) as source, (folder / f"model{suffix}").open("wb") as target:
                left = entry.file_size
                while left > 0 and (chunk := source.read(min(left, 1 << 20))):
                    target.write(chunk)
                    left -= len(chunk)
    return folder / "model.xml"


def _tensor(port: Any, at: int, kind: str, model: Path) -> TensorInfo:
    names = sorted(port.get_names())
    name = str(port.get_any_name()) if names else f"{kind}_{at}"
    element = str(port.get_element_type().get_type_name())
    dtype = TYPES.get(element)
    if dtype is None and kind == "input":
        raise InputsRejected(
            f"input {name} of {model.name} is of the type {element}, for which no data can be given: export "
            "the model with inputs of an ordinary type"
        )
    shape = port.get_partial_shape()
    if shape.rank.is_dynamic:
        if kind == "output":
            return TensorInfo(name=name, dtype=dtype or element, shape=(-1,))
        raise InputsRejected(
            f"{kind} {name} of {model.name} leaves even the number of its dimensions open: export the model "
            "with a fixed number"
        )
    sizes = tuple(size.get_length() if size.is_static else -1 for size in shape)
    return TensorInfo(name=name, dtype=dtype or element, shape=sizes)


def _family(device: str) -> str:
    return device.partition(".")[0]


def _text(about: Any, key: str) -> str:
    try:
        return str(about[key].value if hasattr(about[key], "value") else about[key])
    except (KeyError, RuntimeError):
        return ""


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _rejected(model: Path, error: Exception) -> ModelRejected:
    said = _said(error)
    lower = said.lower()
    if "not supported" in lower or "unsupported" in lower or "no conversion" in lower:
        todo = "it uses an operation that OpenVINO does not have: update openvino, or export without it"
    else:
        todo = "is the file whole?"
    return ModelRejected(f"OpenVINO refuses {model.name}: {todo} (it said: {said})")
