"""ONNX Runtime. A device is an execution provider: ``cuda`` is CUDAExecutionProvider, and so on.

ONNX Runtime runs on the CPU whatever a provider does not take, and with a missing provider everything,
with no more than a line in its log. Here a device that is not there, or takes nothing, is an error, unless
fallback is allowed.

Placement. From 1.24 on the session tells which provider took which node
(`session.record_ep_graph_assignment_info`, InferenceSession.get_provider_graph_assignment_info): the
nodes as they were when providers chose, after constant folding and the other basic optimisations
and before nodes are fused. Older versions are asked by a profile of one more inference, which
lists nodes as they ran, fused.

A provider may come as a library of its own (``provider_library=PATH``, see :mod:`.onnx_plugin`).
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from boardbench.agent.bench import caches, placement, shapes
from boardbench.agent.bench.gpu_watch import GpuWatch
from boardbench.agent.bench.options import OptionReader
from boardbench.agent.bench.runtime import (
    CACHE,
    COMPUTE_PRECISION,
    NO_SETTINGS,
    THREADS,
    InputsRejected,
    ModelRejected,
    OptionRejected,
    RuntimeUnavailable,
    Settings,
)
from boardbench.agent.bench.runtimes import onnx_plugin
from boardbench.agent.domain import Cache, Evidence, OpPlacement, Placement, TensorInfo, Unit

if TYPE_CHECKING:
    from boardbench.agent.bench.runtime import Tensors

SUFFIX = "ExecutionProvider"
CPU = "CPU" + SUFFIX

NOT_ENGINES = ("AzureExecutionProvider",)
"""Sends the model to a service elsewhere: nothing runs on the board."""

UNITS: Mapping[str, Unit] = {
    "CPU": Unit.CPU,
    "Xnnpack": Unit.CPU_DELEGATE,
    "Dnnl": Unit.CPU_DELEGATE,
    "ACL": Unit.CPU_DELEGATE,
    "CUDA": Unit.GPU,
    "Tensorrt": Unit.GPU,
    "NvTensorRTRTX": Unit.GPU,
    "ROCM": Unit.GPU,
    "MIGraphX": Unit.GPU,
    "Dml": Unit.GPU,
    "WebGpu": Unit.GPU,
    "VitisAI": Unit.NPU,
    "Rknpu": Unit.NPU,
    "CANN": Unit.NPU,
}
"""Providers with one kind of hardware behind them; every other one is UNIT_DELEGATE, see `unit_of`."""

DRIVERS: Mapping[str, Tuple[str, ...]] = {
    "CUDA": ("nvidia", "tegra"),
    "Tensorrt": ("nvidia", "tegra"),
    "NvTensorRTRTX": ("nvidia",),
    "ROCM": ("amdgpu",),
    "MIGraphX": ("amdgpu",),
    "OpenVINO": ("i915", "xe", "intel_vpu"),
    "Rknpu": ("rknpu",),
}
"""Drivers that can be behind a provider, as `gpu_counters` names them: another GPU's counters say nothing."""

TYPES: Mapping[str, str] = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(string)": "str",
    "tensor(bool)": "bool",
    "tensor(complex64)": "complex64",
    "tensor(complex128)": "complex128",
    **{f"tensor({kind}{bits})": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}

_BOUND = tuple(name for name in TYPES.values() if name not in ("str", "complex64", "complex128"))

LEVELS: Mapping[str, str] = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "off": "ORT_DISABLE_ALL",
}

MOST_THREADS = 1024

PRECISION_OPTIONS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    # Its CPU takes FP32 only (in 1.24 it refuses FP16; bfloat16 by load_config is taken, and not told).
    "OpenVINO": {"float32": {"precision": "FP32"}, "float16": {"precision": "FP16"}},
    "Tensorrt": {
        "float16": {"trt_fp16_enable": "1"},
        "bfloat16": {"trt_bf16_enable": "1"},
        "int8": {"trt_int8_enable": "1"},
    },
}
"""What providers are told for a precision:
https://onnxruntime.ai/docs/execution-providers/OpenVINO-ExecutionProvider.html and
…/TensorRT-ExecutionProvider.html; the others can't be told any.
"""

CACHE_OPTIONS: Mapping[str, Tuple[str, Tuple[str, ...], Tuple[str, ...]]] = {
    "OpenVINO": ("compiled blobs", ("cache_dir",), ()),
    "Tensorrt": (
        "engines and timing cache",
        ("trt_engine_cache_path", "trt_timing_cache_path"),
        ("trt_engine_cache_enable", "trt_timing_cache_enable"),
    ),
}
"""What a provider keeps, its options for the folder, and those that are to be on."""

_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"


class OnnxRuntime:
    """The engine."""

    name = "onnxruntime"
    formats: Tuple[str, ...] = ("onnx",)
    options: Mapping[str, str] = {
        "graph_optimization": "all (default), extended, basic or off",
        "execution_mode": "sequential (default) or parallel: whether branches of the graph run side by side",
        "intra_op_threads": "threads within an operation; as the setting threads",
        "inter_op_threads": "threads for operations side by side, with execution_mode=parallel",
        "allow_spinning": "on (default) or off: whether threads burn the processor while they wait",
        "arena": "on (default) or off: whether memory is kept for the next inference",
        "io_binding": "off (default) or on: inputs and outputs are bound once, as tensors of ONNX Runtime",
        "provider_library": "path of a library on the board that brings an execution provider",
        "provider_hardware": "any (default), cpu, gpu or npu: what that provider is to use",
        "provider.": "an option of the execution provider, as provider.device_type=GPU",
    }
    sys_root = Path("/")

    def __init__(self) -> None:
        """Imports nothing yet."""
        self._ort: Any = None

    def version(self) -> str:
        """Imports the engine; the distribution's name tells its flavour (onnxruntime-gpu, …)."""
        if self._ort is None:
            # 1.32 and later keep a database of usage in the home folder otherwise; read at import.
            os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
            try:
                import onnxruntime
            except Exception as error:  # a broken installation raises anything
                from boardbench.agent.bench import wheels

                raise RuntimeUnavailable(
                    f"no ONNX Runtime in {sys.executable} ({type(error).__name__}: {error}): "
                    f"{wheels.how(self.name, wheels.ONNXRUNTIME)}"
                ) from error
            self._ort = onnxruntime
        package = getattr(self._ort, "package_name", None) or "onnxruntime"
        return f"{package} {self._ort.__version__}"

    @property
    def settings(self) -> Tuple[str, ...]:
        """Threads, and what some provider of this build can be told; of one not yet imported, any."""
        names = {*PRECISION_OPTIONS, *CACHE_OPTIONS}
        here = names if self._ort is None else {_short(name) for name in self._providers()}
        more = ((COMPUTE_PRECISION, PRECISION_OPTIONS), (CACHE, CACHE_OPTIONS))
        return (THREADS, *(setting for setting, takers in more if here & set(takers)))

    def devices(self) -> Tuple[str, ...]:
        """cpu, then the other providers of this build, the engine's preferred first."""
        self.version()
        others = [name for name in self._providers() if name != CPU]
        return ("cpu", *(name[: -len(SUFFIX)].lower() for name in others))

    def _providers(self) -> List[str]:
        return [name for name in self._ort.get_available_providers() if name not in NOT_ENGINES]

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
    ) -> OnnxModel:
        """Creates the session and checks that the device took part."""
        self.version()
        ort = self._ort
        reader = OptionReader(self.name, options)
        session = ort.SessionOptions()
        level = reader.choice("graph_optimization", tuple(LEVELS), default="all")
        session.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[level])
        if reader.choice("execution_mode", ("sequential", "parallel"), default="sequential") == "parallel":
            session.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        threads = _threads(threads, reader.number("intra_op_threads", least=1, most=MOST_THREADS))
        if threads is not None:
            session.intra_op_num_threads = threads
        inter = reader.number("inter_op_threads", least=1, most=MOST_THREADS)
        if inter is not None:
            session.inter_op_num_threads = inter
        if not reader.switch("allow_spinning", default=True):
            session.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session.add_session_config_entry("session.inter_op.allow_spinning", "0")
        session.enable_cpu_mem_arena = reader.switch("arena", default=True)
        provider_options = reader.prefixed("provider.", "an option of the execution provider")
        io_binding = reader.switch("io_binding", default=False)
        library = reader.text("provider_library", "path of a library with an execution provider")
        hardware = None
        if library is not None:
            hardware = reader.choice("provider_hardware", onnx_plugin.HARDWARE, default="any")
        in_force = reader.finish()

        plugin = None
        if library is not None:
            plugin = onnx_plugin.load(ort, library, device=device, hardware=hardware or "any")
        wanted = plugin.provider if plugin else self._provider(device, allow_fallback)
        here = plugin is not None or wanted in self._providers()
        if wanted == CPU and provider_options:
            raise OptionRejected(f"provider.KEY options belong to a device other than {device}")
        if plugin is None and wanted == f"OpenVINO{SUFFIX}" and "device_type" not in provider_options:
            # Said and not left to the provider's build, so that it is known where operations run.
            provider_options["device_type"] = in_force["provider.device_type"] = "CPU"
        runs_on = wanted if here else CPU
        provider_options.update(_told(runs_on, settings, provider_options))
        made = OnnxModel(
            ort,
            model,
            settings=session,
            wanted="" if wanted == CPU else wanted,
            providers=self._order(wanted, provider_options) if here else [(CPU, {})],
            device=device,
            allow_fallback=allow_fallback,
            threads=threads,
            options=in_force,
            given=shapes,
            sys_root=self.sys_root,
            cache=_watched(runs_on, settings),
            plugin=plugin,
            io_binding=io_binding,
        )
        if made.device_fallback and settings != NO_SETTINGS:
            made.close()
            raise OptionRejected(
                f"compute_precision and cache are for {wanted}, and {made.device_fallback}: leave them out"
            )
        return made

    def assignment(
        self,
        model: bytes,
        providers: Sequence[Tuple[str, Mapping[str, str]]],
        plugin: Optional[onnx_plugin.Plugin] = None,
    ) -> Optional[List[Assigned]]:
        """Where nodes of a small model would run; None where this version does not tell.

        As they are: nothing is optimised away. Raises what the engine raises.
        """
        settings = self._ort.SessionOptions()
        settings.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 4  # what is refused is an answer here, and no error
        settings.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
        if plugin is not None:
            plugin.tell(settings, dict(providers).get(plugin.provider, {}))
        return _assigned(_session(self._ort, model, settings, providers, plugin))

    def _provider(self, device: str, may_be_missing: bool) -> str:
        """The provider that a device stands for; with ``may_be_missing`` also one that this build lacks."""
        known = self._ort.get_all_providers() if may_be_missing else self._providers()
        for name in known:
            if name[: -len(SUFFIX)].lower() == device and name not in NOT_ENGINES:
                return str(name)
        raise OptionRejected(
            f"this {self.version()} has no device {device!r}; it has {', '.join(self.devices())}. "
            "Another build of ONNX Runtime may have it (onnxruntime-gpu, onnxruntime-openvino, …)"
        )

    def _order(self, wanted: str, options: Mapping[str, str]) -> List[Tuple[str, Dict[str, str]]]:
        """The providers to name: the wanted one, and CUDA behind TensorRT, as its vendor has it."""
        order = [(wanted, dict(options))]
        if wanted == f"Tensorrt{SUFFIX}" and f"CUDA{SUFFIX}" in self._providers():
            order.append((f"CUDA{SUFFIX}", {}))
        return order


def _threads(threads: Optional[int], option: Optional[int]) -> Optional[int]:
    if threads is not None and option is not None and threads != option:
        raise OptionRejected(
            f"threads says {threads} and the option intra_op_threads says {option}: give one"
        )
    return option if threads is None else threads


def _short(provider: str) -> str:
    return provider[: -len(SUFFIX)] if provider.endswith(SUFFIX) else provider


def _told(provider: str, settings: Settings, given: Mapping[str, str]) -> Dict[str, str]:
    """The provider's own options for the common settings. Raises OptionRejected for what it can't be told."""
    name = _short(provider)
    found: Dict[str, str] = {}
    precision = settings.compute_precision
    if precision:
        known = PRECISION_OPTIONS.get(name, {})
        if name == "OpenVINO" and given.get("device_type", "").upper().startswith("CPU"):
            known = {"float32": known["float32"]}
        if precision not in known:
            takes = f"it can be told {' or '.join(known)}" if known else "it computes as the model is written"
            raise OptionRejected(
                f"compute_precision={precision}: the provider {provider} can't be told so, {takes}; "
                "leave it out, or convert the model"
            )
        found.update(known[precision])
    if settings.cache_dir is not None:
        if name not in CACHE_OPTIONS:
            raise OptionRejected(
                f"cache: the provider {provider} keeps nothing from one load to the next; of ONNX Runtime's "
                f"{' and '.join(CACHE_OPTIONS)} do: leave it out"
            )
        _, folders, switches = CACHE_OPTIONS[name]
        found.update(dict.fromkeys(folders, str(settings.cache_dir)))
        found.update(dict.fromkeys(switches, "1"))
    if both := sorted(set(found) & set(given)):
        raise OptionRejected(
            f"the options {', '.join(f'provider.{key}' for key in both)} say what compute_precision or cache "
            "says: give only the settings"
        )
    return found


def _watched(provider: str, settings: Settings) -> Optional[caches.Watched]:
    if settings.cache_dir is None:
        return None
    return caches.Watched(settings.cache_dir, CACHE_OPTIONS[_short(provider)][0])


@dataclass(frozen=True)
class Assigned:
    """A node and the provider that runs it; ``part`` numbers what a provider took in one piece."""

    provider: str
    name: str
    op_type: str
    part: int


class OnnxModel:
    """A model in a session."""

    profiles = True

    def __init__(
        self,
        ort: Any,
        model: Path,
        *,
        settings: Any,
        wanted: str,
        providers: Sequence[Tuple[str, Mapping[str, str]]],
        device: str,
        allow_fallback: bool,
        threads: Optional[int],
        options: Mapping[str, str],
        given: Mapping[str, Tuple[int, ...]],
        sys_root: Path = Path("/"),
        cache: Optional[caches.Watched] = None,
        plugin: Optional[onnx_plugin.Plugin] = None,
        io_binding: bool = False,
    ) -> None:
        """Creates the session."""
        self._ort = ort
        self._model = model
        self._settings = settings
        self.providers = [(name, dict(entries)) for name, entries in providers]
        self.wanted = wanted
        self.options = options
        self.threads = threads
        self._feeds: Tensors = {}
        self._io_binding = io_binding
        self._bound: Any = None
        self.plugin = plugin
        if plugin is not None:
            plugin.tell(settings, dict(self.providers).get(plugin.provider, {}))
        # Costs nothing after the session is made; older versions pass over keys they don't know.
        settings.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
        self._session: Any = self._create(settings)
        self._cache = cache
        if cache is not None:
            cache.loaded()
        self.inputs = shapes.settle([_input(node, model) for node in self._session.get_inputs()], given)
        self.outputs = tuple(_output(node) for node in self._session.get_outputs())
        self._output_names = [tensor.name for tensor in self.outputs]
        untaken = [tensor.name for tensor in (*self.inputs, *self.outputs) if tensor.dtype not in _BOUND]
        if io_binding and untaken:
            raise OptionRejected(
                f"io_binding=on is for numbers, and {', '.join(untaken)} of {model.name} is of another type: "
                "leave it out"
            )
        fault = self._fault()
        if fault and not allow_fallback:
            raise ModelRejected(
                f"{model.name} on {device}: the provider {wanted} {fault}. Its log tells why; "
                "to measure the fallback, allow it (--allow-fallback)"
            )
        self.device_fallback = f"all runs on the CPU: the provider {wanted} {fault}" if fault else ""
        self.watch = None if fault or not wanted else _watch(wanted, self.unit_of(wanted), sys_root)

    def caches(self) -> Tuple[Cache, ...]:
        """What the provider keeps of this model."""
        return () if self._cache is None else self._cache.caches()

    def _create(self, settings: Any) -> Any:
        try:
            session = _session(self._ort, str(self._model), settings, self.providers, self.plugin)
        except MemoryError:
            raise
        except Exception as error:
            raise _rejected(self._model, error) from error
        session.disable_fallback()  # else a failing provider is replaced by the CPU in mid-run
        return session

    def _fault(self) -> str:
        """Why the provider that was asked for has no part in this; empty when it has, or there is none."""
        if not self.wanted:
            return ""
        if self.wanted not in (name for name, _ in self.providers):
            return "is not in this build of ONNX Runtime"
        if self.wanted not in self._session.get_providers():
            return "could not be started, so that everything would run on the CPU"
        taken = self.assigned()
        if taken is not None and not any(node.provider == self.wanted for node in taken):
            return "takes none of its operations: all would run on the CPU"
        return ""

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """``InferenceSession.run`` itself with its arguments: it returns with the outputs in host memory."""
        self._feeds = feeds
        if self._io_binding:
            return self._bind_once(feeds)
        return functools.partial(self._session.run, self._output_names, dict(feeds))

    def _bind_once(self, feeds: Tensors) -> Callable[[], object]:
        """``InferenceSession.run_with_iobinding``: inputs and outputs stay where they are, in host memory."""
        self._bound = self._session.io_binding()
        for name, array in feeds.items():
            self._bound.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        for name in self._output_names:
            self._bound.bind_output(name, "cpu")
        return functools.partial(self._session.run_with_iobinding, self._bound)

    def fetch(self, returned: object) -> Tensors:
        """The arrays that run returned; sequences and maps are left out."""
        import numpy as np

        if self._bound is not None:
            returned = self._bound.copy_outputs_to_cpu()
        assert isinstance(returned, list)
        pairs = zip(self._output_names, returned)
        return {name: np.array(value, copy=True) for name, value in pairs if isinstance(value, np.ndarray)}

    def placement(self) -> Placement:
        """Per node, by the session's own record or by a profile of one inference."""
        assigned = self.assigned()
        if assigned is not None:
            how = "nodes as providers chose them: after the basic optimisations, before fusion"
            return self._place(assigned, Evidence.PARTITION, how)
        try:
            profiled = self._profiled_nodes()
        except MemoryError:
            raise
        except Exception as error:  # a session under a profiler needs memory and a place for its file
            return placement.unknown(
                f"this version of ONNX Runtime does not tell which provider took a node, and a profile "
                f"could not be made: {error}"
            )
        how = "nodes as they ran under the profiler, fused"
        return self._place(profiled, Evidence.PROFILED, how)

    def unit_of(self, provider: str) -> Unit:
        """Where a provider of this session runs its nodes."""
        if self.plugin is not None and provider == self.plugin.provider:
            return self.plugin.unit
        return unit_of(provider, dict(self.providers).get(provider, {}))

    def _place(self, nodes: Sequence[Assigned], evidence: Evidence, how: str) -> Placement:
        ops = []
        for index, node in enumerate(nodes):
            unit = self.unit_of(node.provider)
            ops.append(
                OpPlacement(
                    index=index,
                    type=node.op_type,
                    name=node.name,
                    unit=unit,
                    delegate="" if unit is Unit.CPU else node.provider,
                )
            )
        counts = Counter(node.provider for node in nodes)
        taken = "; ".join(
            f"{number} of {len(ops)} nodes on {provider}" for provider, number in counts.most_common()
        )
        order = ", listed provider by provider" if len(counts) > 1 and evidence is Evidence.PARTITION else ""
        detail = f"{taken or 'no node is left to run'} ({how}{order})"
        return placement.known(ops, evidence=evidence, detail=detail, wanted=self.wanted)

    def assigned(self) -> Optional[List[Assigned]]:
        """Every node with its provider; None where this version does not tell."""
        return _assigned(self._session)

    def profile(self, runs: Iterable[object]) -> List[Mapping[str, Any]]:
        """The events of a profile, in a session of its own: one inference, then one for each of ``runs``."""
        with tempfile.TemporaryDirectory(prefix="boardbench-profile-") as folder:
            self._settings.enable_profiling = True
            self._settings.profile_file_prefix = str(Path(folder) / "ort")
            try:
                session = self._create(self._settings)
                session.run(self._output_names, dict(self._feeds))
                for _ in runs:
                    session.run(self._output_names, dict(self._feeds))
                events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            finally:
                self._settings.enable_profiling = False
        return [event for event in events if isinstance(event, dict)]

    def _profiled_nodes(self) -> List[Assigned]:
        return [
            Assigned(event["args"]["provider"], node_name(event), event["args"]["op_name"], part=at)
            for at, event in enumerate(self.profile(()))
            if is_kernel(event)
        ]

    def close(self) -> None:
        """Drops the session."""
        self._bound = None
        self._session = None
        self._feeds = {}


def _session(
    ort: Any,
    model: object,
    settings: Any,
    providers: Sequence[Tuple[str, Mapping[str, str]]],
    plugin: Optional[onnx_plugin.Plugin],
) -> Any:
    """A session with these providers; that of a plugin stands in the settings already."""
    named = None if plugin is not None else list(providers)
    return ort.InferenceSession(model, settings, providers=named, enable_fallback=0)


def _assigned(session: Any) -> Optional[List[Assigned]]:
    try:
        parts = session.get_provider_graph_assignment_info()
    except AttributeError:
        return None
    return [
        Assigned(
            provider=part.ep_name,
            name=node.name,
            op_type=f"{node.domain}.{node.op_type}" if node.domain else node.op_type,
            part=at,
        )
        for at, part in enumerate(parts)
        for node in part.get_nodes()
    ]


def is_kernel(event: Mapping[str, Any]) -> bool:
    """Whether an event of a profile is a node that ran."""
    return (
        event.get("cat") == "Node"
        and str(event["name"]).endswith(_KERNEL_SUFFIX)
        and bool(event["args"].get("provider"))
    )


def node_name(event: Mapping[str, Any]) -> str:
    """The node of such an event."""
    return str(event["name"])[: -len(_KERNEL_SUFFIX)]


_KERNEL_SUFFIX = "_kernel_time"


def watch_of(
    wanted: str, providers: Iterable[Tuple[str, Mapping[str, str]]], sys_root: Path
) -> Optional[GpuWatch]:
    """Who looks at the hardware behind a provider; None where that is the processor."""
    return _watch(wanted, unit_of(wanted, dict(providers).get(wanted, {})), sys_root)


def _watch(wanted: str, unit: Unit, sys_root: Path) -> Optional[GpuWatch]:
    if unit in placement.ON_CPU:
        return None
    name = wanted[: -len(SUFFIX)] if wanted.endswith(SUFFIX) else wanted
    return GpuWatch(wanted, unit, DRIVERS.get(name), sys_root=sys_root)


def unit_of(provider: str, options: Mapping[str, str]) -> Unit:
    """Where a provider with these options runs its nodes; UNIT_DELEGATE where that is its own choice."""
    name = provider[: -len(SUFFIX)] if provider.endswith(SUFFIX) else provider
    if name == "OpenVINO":
        # "AUTO:…", "HETERO:…" and "MULTI:…" choose by themselves.
        family = options.get("device_type", "").upper().replace("_", ".").partition(".")[0]
        return {"CPU": Unit.CPU_DELEGATE, "GPU": Unit.GPU, "NPU": Unit.NPU}.get(family, Unit.DELEGATE)
    if name == "QNN":
        backend = (options.get("backend_type") or Path(options.get("backend_path", "")).name).lower()
        for word, unit in (("htp", Unit.NPU), ("gpu", Unit.GPU), ("cpu", Unit.CPU_DELEGATE)):
            if word in backend:
                return unit
        return Unit.DELEGATE
    if name == "Tensorrt" and options.get("trt_dla_enable", "").lower() in ("1", "true"):
        return Unit.DELEGATE  # TensorRT splits between DLA and GPU inside a node
    return UNITS.get(name, Unit.DELEGATE)


def _input(node: Any, model: Path) -> TensorInfo:
    dtype = TYPES.get(node.type)
    if dtype is None:
        raise InputsRejected(
            f"input {node.name} of {model.name} is a {node.type}, for which no data can be given: export the "
            "model with inputs of an ordinary tensor type"
        )
    return TensorInfo(name=node.name, dtype=dtype, shape=_shape(node.shape))


def _output(node: Any) -> TensorInfo:
    return TensorInfo(
        name=node.name, dtype=TYPES.get(node.type, str(node.type)), shape=_shape(node.shape or ())
    )


def _shape(dimensions: Sequence[object]) -> Tuple[int, ...]:
    """Numbers as they are; a name, or nothing, is an open size."""
    return tuple(size if isinstance(size, int) and size >= 0 else -1 for size in dimensions)


def _rejected(model: Path, error: Exception) -> ModelRejected:
    """The session's refusal with what to do about it."""
    said = " ".join(str(error).split())
    lower = said.lower()
    if "external data" in lower or "cannot get file size" in lower:
        todo = (
            "its weights are in files of their own, which were not pushed: save it in one file "
            "(onnx.save with save_as_external_data=False)"
        )
    elif "no op registered for" in lower or "is not a registered function/op" in lower:
        todo = "it uses an operation that this build does not have: update onnxruntime, or export without it"
    elif "opset" in lower or "ir version" in lower:
        todo = "it is newer than this engine: update onnxruntime, or export with an older opset or IR version"
    elif re.search("protobuf parsing failed|no graph was found|modelproto does not have a graph", lower):
        todo = "is the file whole, and is it an ONNX model?"
    else:
        todo = "does it pass onnx.checker.check_model?"
    return ModelRejected(f"onnxruntime refuses {model.name}: {todo} (it said: {said[:500]})")
