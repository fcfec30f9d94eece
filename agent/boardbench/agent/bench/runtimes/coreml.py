"""Core ML of macOS, through Apple's coremltools. Nothing of it runs anywhere else.

A model is an ``.mlmodel`` file or an ``.mlpackage`` folder, which is pushed as one archive. A device is a set
of compute units: with ``gpu``, ``npu`` and ``all`` Core ML may still use the CPU, operation by operation.
Placement is the compute plan that Core ML makes for the compiled model (MLComputePlan, macOS 14.4 and later).
https://apple.github.io/coremltools/docs-guides/source/mlmodel-debugging-perf-utilities.html
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import stat
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

from boardbench.agent.bench import doubts, placement, shapes
from boardbench.agent.bench.options import OptionReader
from boardbench.agent.bench.runtime import (
    InputsRejected,
    ModelRejected,
    OptionRejected,
    Outcome,
    RuntimeUnavailable,
)
from boardbench.agent.domain import (
    AcceleratorUse,
    Evidence,
    OpPlacement,
    Placement,
    TensorInfo,
    Unit,
    Warning,
)
from boardbench.inspect.analyse import inspect
from boardbench.inspect.errors import InspectError

if TYPE_CHECKING:
    from boardbench.agent.bench.runtime import Tensors

COMPUTE_UNITS: Mapping[str, str] = {
    "cpu": "CPU_ONLY",
    "gpu": "CPU_AND_GPU",
    "npu": "CPU_AND_NE",
    "all": "ALL",
}
"""Devices by coremltools' names of the sets that they stand for."""

UNITS: Mapping[str, Unit] = {
    "MLCPUComputeDevice": Unit.CPU,
    "MLGPUComputeDevice": Unit.GPU,
    "MLNeuralEngineComputeDevice": Unit.NPU,
}
"""By coremltools' class of a device."""

STANDIN = "boardbench_standin"
"""A name that only a fake of coremltools has: what it stands in for."""

_NAMES = {Unit.GPU: "GPU", Unit.NPU: "neural engine"}
_DEVICE_UNITS = {"cpu": Unit.CPU, "gpu": Unit.GPU, "npu": Unit.NPU}
_MANIFEST = "Manifest.json"
_MOST_FILES = 1000
_PIECE_BYTES = 1 << 20


class CoreMlRuntime:
    """The engine."""

    name = "coreml"
    formats: Tuple[str, ...] = ("coreml",)
    settings: Tuple[str, ...] = ()
    options: Mapping[str, str] = {
        "low_precision_accumulation": "on or off (default): whether the GPU may add up in float16",
        "function": "a function of a model that has several",
    }
    sys_root = Path("/")

    def __init__(self) -> None:
        """Imports nothing yet."""
        self._tools: Any = None

    def version(self) -> str:
        """Imports coremltools, with the part of it that only macOS has."""
        if self._tools is None:
            self._tools = _imported()
        return f"coremltools {self._tools.__version__}"

    def devices(self) -> Tuple[str, ...]:
        """The CPU, then what else this Mac has, then all of it."""
        self.version()
        try:
            from coremltools.models.compute_device import MLComputeDevice

            found = {UNITS.get(type(each).__name__) for each in MLComputeDevice.get_all_compute_devices()}
        except Exception:  # before coremltools 8.1, or macOS 14.4: not told
            found = set(_DEVICE_UNITS.values())
        return ("cpu", *(name for name in ("gpu", "npu") if _DEVICE_UNITS[name] in found), "all")

    def load(
        self,
        model: Path,
        *,
        device: str,
        threads: Optional[int],
        options: Mapping[str, str],
        shapes: Mapping[str, Tuple[int, ...]],
        allow_fallback: bool = False,
    ) -> CoreMlModel:
        """Compiles and loads the model."""
        self.version()
        reader = OptionReader(self.name, options)
        low = reader.switch("low_precision_accumulation", default=False)
        function = reader.text("function", "a function of a model that has several")
        in_force = reader.finish()
        if threads is not None:
            raise OptionRejected("coreml takes no number of threads: leave --threads out")
        here, fault = self.devices(), ""
        if device not in here:
            if device not in COMPUTE_UNITS or not allow_fallback:
                raise OptionRejected(f"coreml has no device {device!r}; it has {', '.join(here)}")
            fault = f"this Mac has no {_NAMES[_DEVICE_UNITS[device]]}"
        return CoreMlModel(
            self._tools,
            model,
            device=device,
            compute_units="CPU_ONLY" if fault else COMPUTE_UNITS[device],
            hints={"allowLowPrecisionAccumulationOnGPU": True} if low else {},
            function=function,
            fault=fault,
            options=in_force,
            given=shapes,
        )


def _imported() -> Any:
    missing = (
        f"Core ML needs macOS, and this is {sys.platform}: `boardbench inspect` reads the model anywhere; "
        "to run it, push it to an agent on a Mac"
    )
    try:
        if importlib.util.find_spec("coremltools") is None:
            raise RuntimeUnavailable(
                f"no coremltools in {sys.executable}: {sys.executable} -m pip install coremltools"
                if sys.platform == "darwin"
                else missing
            )
        if importlib.util.find_spec("coremltools.libcoremlpython") is None:
            raise RuntimeUnavailable(missing)
        import coremltools
        from coremltools.libcoremlpython import _MLModelProxy  # noqa: F401 - what runs a model
    except RuntimeUnavailable:
        raise
    except Exception as error:  # a broken installation raises anything
        raise RuntimeUnavailable(
            f"coremltools in {sys.executable} is broken ({type(error).__name__}: {error}): "
            f"{sys.executable} -m pip install --force-reinstall coremltools"
        ) from error
    return coremltools


class CoreMlModel:
    """A compiled model."""

    profiles = False
    threads: Optional[int] = None

    def __init__(
        self,
        tools: Any,
        model: Path,
        *,
        device: str,
        compute_units: str,
        hints: Mapping[str, Any],
        function: Optional[str],
        fault: str,
        options: Mapping[str, str],
        given: Mapping[str, Tuple[int, ...]],
    ) -> None:
        """Reads the model's tensors, unpacks it, and has it compiled."""
        self.options = options
        self.wanted = "" if device == "cpu" else device.upper()
        self.device_fallback = f"all runs on the CPU: {fault}" if fault else ""
        self._model = model
        self._wanted_unit = _DEVICE_UNITS.get(device)
        self._units = getattr(tools.ComputeUnit, compute_units)
        self._standin = str(getattr(tools, STANDIN, ""))
        self.watch = _Watch(self._standin) if self._standin else None
        try:
            told = inspect(model)
        except InspectError as error:
            raise ModelRejected(f"{model.name} can't be read: {error}") from error
        if told.format != "coreml":
            raise ModelRejected(f"{model.name} is no Core ML model ({told.format or 'of no known format'})")
        self.inputs = shapes.settle([_input(tensor, model) for tensor in told.inputs], given)
        self.outputs = tuple(
            TensorInfo(name=each.name, dtype=each.dtype, shape=each.shape or (-1,)) for each in told.outputs
        )
        # It holds the package while Core ML may read it.
        self._folder = tempfile.TemporaryDirectory(prefix="boardbench-coreml-")
        try:
            path = _with_suffix(model, Path(self._folder.name))
            self._loaded: Any = _load(tools, path, model, self._units, hints, function, told.format_version)
        except BaseException:
            self._folder.cleanup()
            raise
        self._function = function

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """``MLModel.predict`` itself with its dictionary."""
        data: Dict[str, Any] = {}
        for tensor in self.inputs:
            array = feeds[tensor.name]
            if tensor.dtype == "uint8":
                data[tensor.name] = _image(array, tensor)
            else:
                data[tensor.name] = array if tensor.shape else array.item()
        call: Callable[[], object] = functools.partial(self._loaded.predict, data)
        return call

    def fetch(self, returned: object) -> Tensors:
        """Copies of what it returned; the dictionary of a classifier's classes is left out."""
        import numpy as np

        assert isinstance(returned, dict)
        return {
            name: np.array(value, copy=True)
            for name, value in returned.items()
            if not isinstance(value, (dict, list))
        }

    def placement(self) -> Placement:
        """The plan that Core ML makes, operation by operation."""
        try:
            from coremltools.models.compute_plan import MLComputePlan

            plan = MLComputePlan.load_from_path(
                path=self._loaded.get_compiled_model_path(), compute_units=self._units
            )
            found = list(_used(plan, plan.model_structure, self._function))
        except Exception as error:
            return placement.unknown(
                "Core ML tells no compute plan, which takes macOS 14.4 and coremltools 8.1: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
        if not found:
            return placement.unknown("the compute plan of Core ML lists no operation of this kind of model")
        ops = []
        for index, (kind, name, usage) in enumerate(found):
            unit = Unit.UNSPECIFIED if usage is None else _unit(usage.preferred_compute_device)
            ops.append(
                OpPlacement(
                    index=index,
                    type=kind,
                    name=name,
                    unit=unit,
                    delegate="" if unit in (Unit.CPU, Unit.UNSPECIFIED) else _NAMES.get(unit, "Core ML"),
                    cause=self._cause(unit, usage),
                )
            )
        counts = Counter(op.delegate or ("CPU" if op.unit is Unit.CPU else "no known unit") for op in ops)
        where = ", ".join(f"{number} on the {name}" for name, number in counts.most_common())
        detail = f"{len(ops)} operations, {where}, as Core ML's compute plan anticipates"
        return placement.known(
            ops,
            evidence=Evidence.PARTITION,
            detail=f"{detail}; {self._standin} takes the place of Core ML" if self._standin else detail,
            standin=bool(self._standin),
            wanted=self.wanted,
        )

    def _cause(self, unit: Unit, usage: Any) -> str:
        """Why an operation is on the CPU, where another unit was asked for."""
        if unit is not Unit.CPU or not self.wanted:
            return ""
        able = {_unit(each) for each in usage.supported_compute_devices}
        if self._wanted_unit is None:
            others = able - {Unit.CPU}
            return "Core ML prefers the CPU for it" if others else "no other unit supports it"
        name = _NAMES[self._wanted_unit]
        if self._wanted_unit in able:
            return f"the {name} supports it, and Core ML prefers the CPU"
        return f"the {name} does not support it"

    def close(self) -> None:
        """Frees the model. Idempotent."""
        self._loaded = None
        self._folder.cleanup()


class _Watch:
    """Says that a stand-in is in Core ML's place."""

    def __init__(self, standin: str) -> None:
        self._standin = standin

    def doubts(self) -> Iterable[Warning]:
        """That it is one."""
        yield doubts.warn("standin", f"{self._standin} took the place of Core ML")

    def begin(self) -> None:
        """There is nothing to read."""

    def end(self) -> None:
        """There is nothing to read."""

    def outcome(
        self,
        placement: Placement,
        *,
        runs: int,  # noqa: ARG002 - nothing was counted
        cpu_seconds: float,  # noqa: ARG002
        wall_seconds: float,  # noqa: ARG002
        queued_seconds: Optional[float],  # noqa: ARG002
    ) -> Outcome:
        """The placement as it is."""
        use = AcceleratorUse(kind="coreml", library=self._standin, standin=True)
        return Outcome(placement=placement, accelerator=use)


def _load(
    tools: Any,
    path: Path,
    model: Path,
    units: Any,
    hints: Mapping[str, Any],
    function: Optional[str],
    version: str,
) -> Any:
    """The model, loaded; coremltools itself only warns where Core ML refuses one."""
    further: Dict[str, Any] = {}
    if hints:
        further["optimization_hints"] = dict(hints)
    if function is not None:
        further["function_name"] = function
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            loaded = tools.models.MLModel(str(path), compute_units=units, **further)
        except MemoryError:
            raise
        except (TypeError, ValueError) as error:
            if not further:
                raise _rejected(model, str(error), version) from error
            raise OptionRejected(
                f"coremltools {tools.__version__} refuses {', '.join(further)} for {model.name}: {error}"
            ) from error
        except Exception as error:
            raise _rejected(model, str(error), version) from error
    if loaded.__proxy__ is None:
        said = "; ".join(str(each.message) for each in warned)
        raise _rejected(model, said or f"this macOS has no {version}", version)
    return loaded


def _rejected(model: Path, said: str, version: str) -> ModelRejected:
    return ModelRejected(
        f"Core ML refuses {model.name} ({version}): is macOS new enough for it? "
        f"(it said: {' '.join(said.split())[:500]})"
    )


def _used(plan: Any, structure: Any, function: Optional[str]) -> Iterator[Tuple[str, str, Any]]:
    """Type and name of every operation, and which device it is to use; None where that is not told."""
    if structure.program is not None:
        functions = structure.program.functions
        chosen = functions.get(function or "main") or next(iter(functions.values()))
        for operation in chosen.block.operations:
            kind = str(operation.operator_name).rpartition(".")[2]
            if kind != "const":
                name = operation.outputs[0].name if operation.outputs else ""
                yield kind, name, plan.get_compute_device_usage_for_mlprogram_operation(operation)
    elif structure.neuralnetwork is not None:
        for layer in structure.neuralnetwork.layers:
            usage = plan.get_compute_device_usage_for_neuralnetwork_layer(layer)
            yield str(layer.type), str(layer.name), usage
    elif structure.pipeline is not None:
        parts = structure.pipeline.sub_models
        for _, part in parts.items() if hasattr(parts, "items") else parts:
            yield from _used(plan, part, None)


def _unit(device: Any) -> Unit:
    return UNITS.get(type(device).__name__, Unit.DELEGATE)


def _input(tensor: TensorInfo, model: Path) -> TensorInfo:
    if tensor.dtype in ("", "str"):
        raise InputsRejected(
            f"input {tensor.name} of {model.name} is neither an array, an image nor a number, so no data can "
            "be given for it"
        )
    return tensor


def _image(array: Any, tensor: TensorInfo) -> Any:
    """Pixels as Core ML takes them, of which only images are of bytes."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputsRejected(
            f"input {tensor.name} is an image: {sys.executable} -m pip install pillow"
        ) from error
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)


def _with_suffix(model: Path, folder: Path) -> Path:
    """A path by which coremltools knows what it is."""
    try:
        if model.is_dir():
            link = folder / "model.mlpackage"
            link.symlink_to(model.resolve(), target_is_directory=True)
            return link
        if zipfile.is_zipfile(model):
            return _unpacked(model, folder / "model.mlpackage")
        # A copy and no link: Core ML follows links, and then looks at the suffix.
        copy = folder / "model.mlmodel"
        shutil.copyfile(model, copy)
    except OSError as error:
        raise ModelRejected(f"{model.name} can't be made ready for Core ML: {error}") from error
    return copy


def _unpacked(model: Path, package: Path) -> Path:
    """The package in an archive. Nothing of it gets outside ``package``, or is more than a plain file."""
    with zipfile.ZipFile(model) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        manifests = [entry.filename for entry in entries if entry.filename.split("/")[-1] == _MANIFEST]
        if not manifests:
            raise ModelRejected(f"{model.name} holds no {_MANIFEST}: it is no .mlpackage")
        # Packed with its folder, or without.
        top = min(manifests, key=len)[: -len(_MANIFEST)]
        if len(entries) > _MOST_FILES:
            raise ModelRejected(
                f"{model.name} holds {len(entries)} files: no .mlpackage has more than {_MOST_FILES}"
            )
        needed, free = sum(entry.file_size for entry in entries), shutil.disk_usage(package.parent).free
        if needed > free // 2:
            raise ModelRejected(
                f"{model.name} unpacks to {needed} bytes, and {free} are free for temporary files"
            )
        for entry in entries:
            target = package.joinpath(*_parts(entry, top, model))
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("xb") as file:
                shutil.copyfileobj(source, file, _PIECE_BYTES)
    return package


def _parts(entry: zipfile.ZipInfo, top: str, model: Path) -> List[str]:
    """Where a file of the archive belongs in the package, step by step."""
    name = entry.filename
    parts = list(PurePosixPath(name[len(top) :]).parts)
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if (
        not name.startswith(top)
        or not parts
        or any(part in ("..", "/") or "\\" in part or ":" in part or "\0" in part for part in parts)
        or kind not in (0, stat.S_IFREG)
    ):
        raise ModelRejected(f"{model.name} holds {name!r}, which has no place in an .mlpackage")
    return parts
