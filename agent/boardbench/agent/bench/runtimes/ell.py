"""Compiled modules of the Embedded Learning Library: a model as a shared library of machine code.

A module exports plain C functions whose names begin with its own: ``X_Predict(void* context, T* input…, T*
output…)``, ``X_GetInputSize(int)``, ``X_GetInputShape(int, TensorShape*)`` and their like for outputs,
``X_GetNumNodes()``; one compiled with profiling also ``X_GetNodeInfo(int)`` and
``X_GetNodePerformanceCounters(int)``, whose times are in milliseconds.
Source: microsoft/ELL, libraries/model/src/IRMapCompiler.cpp and ModelProfiler.cpp.

Its functions don't tell the type of their elements: it is ``float`` unless an option says otherwise.

A module is a program, and whoever may push one may run anything as the agent's user. It is therefore run only
where ``BOARDBENCH_NATIVE_MODELS=1`` is set for the agent.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple

from boardbench.agent.bench import placement, shapes, stats
from boardbench.agent.bench.options import NATIVE_MODELS, OptionReader
from boardbench.agent.bench.runtime import (
    ModelRejected,
    NoProfile,
    OptionRejected,
    Profile,
    ProfileRequest,
    RuntimeUnavailable,
)
from boardbench.agent.domain import Evidence, OpPlacement, Placement, TensorInfo, Unit

if TYPE_CHECKING:
    from boardbench.agent.bench.runtime import Tensors

METHOD = "the module's own counters of every node"

_PREDICT = re.compile(rb"(?:^|\x00)([A-Za-z_][A-Za-z0-9_]{0,200})_Predict\x00")
# Symbols are told from the end of the file, where linkers put their table; a module may have hundreds of MB.
_SEARCHED_BYTES = 64 * 1024 * 1024
MOST_TENSORS = 32
"""Inputs, and outputs, of one module: a function of C with more arguments is no model."""

_TYPES = {
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
    "int8": ctypes.c_int8,
    "int16": ctypes.c_int16,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
}


class _TensorShape(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int32), ("columns", ctypes.c_int32), ("channels", ctypes.c_int32)]


class _NodeInfo(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("type", ctypes.c_char_p)]


class _Counters(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int), ("milliseconds", ctypes.c_double)]


class EllRuntime:
    """The engine: the operating system's own loader."""

    name = "ell"
    formats: Tuple[str, ...] = ("ell",)
    settings: Tuple[str, ...] = ()
    options: Mapping[str, str] = {
        "input_type": "the C type of the inputs, as the module was compiled (default float32)",
        "output_type": "the C type of the outputs, as the module was compiled (default float32)",
    }
    sys_root = Path("/")

    def version(self) -> str:
        """There is no package, since a module brings its code along: what loads it is the C library."""
        if os.environ.get(NATIVE_MODELS) != "1":
            raise RuntimeUnavailable(
                "a module of the Embedded Learning Library is a program, which may do whatever the agent "
                f"may: set {NATIVE_MODELS}=1 in the agent's environment to run such"
            )
        name, number = platform.libc_ver()
        return f"{name} {number}" if name and number else f"python {platform.python_version()}"

    def devices(self) -> Tuple[str, ...]:
        """The CPU it was compiled for."""
        return ("cpu",)

    def load(
        self,
        model: Path,
        *,
        device: str,
        threads: Optional[int],
        options: Mapping[str, str],
        shapes: Mapping[str, Tuple[int, ...]],
        allow_fallback: bool = False,  # noqa: ARG002 - there is nothing to fall back from
    ) -> EllModel:
        """Loads the module into this process."""
        self.version()
        reader = OptionReader(self.name, options)
        input_type = reader.choice("input_type", tuple(_TYPES), default="float32")
        output_type = reader.choice("output_type", tuple(_TYPES), default="float32")
        in_force = reader.finish()
        if device != "cpu":
            raise OptionRejected(f"{self.name} has no device {device!r}; it has cpu")
        if threads is not None:
            raise OptionRejected(
                f"a module of {self.name} has the threads that it was compiled with: leave --threads out"
            )
        return EllModel(model, input_type, output_type, in_force, shapes)


class EllModel:
    """A module that is loaded."""

    watch = None
    wanted = ""
    device_fallback = ""
    threads: Optional[int] = None

    def __init__(
        self,
        model: Path,
        input_type: str,
        output_type: str,
        options: Mapping[str, str],
        given: Mapping[str, Tuple[int, ...]],
    ) -> None:
        """Loads it and asks for its sizes."""
        self.options = options
        try:
            prefix = _prefix(model)
        except OSError as error:
            raise ModelRejected(f"{model.name} can't be read: {error.strerror}") from error
        try:
            # RTLD_LOCAL: its names must not stand in for those of the process.
            self._library = ctypes.CDLL(os.fspath(model.resolve()), mode=os.RTLD_NOW)
        except OSError as error:
            raise _rejected(model, error) from error
        self._prefix = prefix
        predict = self._function("Predict")
        if predict is None:
            raise ModelRejected(f"{model.name} has no function {prefix}_Predict")
        self._predict: Any = predict
        self._predict.restype = None
        sizes = self._sizes("Input"), self._sizes("Output")
        if not all(sizes):
            raise ModelRejected(
                f"{model.name}: {prefix}_GetInputSize and {prefix}_GetOutputSize name no input or no output"
            )
        self.inputs = shapes.settle(
            [self._tensor("Input", at, size, input_type) for at, size in enumerate(sizes[0])], given
        )
        self.outputs = tuple(
            self._tensor("Output", at, size, output_type) for at, size in enumerate(sizes[1])
        )
        self.profiles = self._function("GetNodePerformanceCounters") is not None
        self._results: List[Any] = []
        self._kept: Any = None

    def _function(self, name: str) -> Optional[Any]:
        try:
            return self._library[f"{self._prefix}_{name}"]
        except AttributeError:
            return None

    def _sizes(self, kind: str) -> List[int]:
        """Elements of every input or output."""
        function = self._function(f"Get{kind}Size")
        if function is None:
            return []
        function.restype = ctypes.c_int32
        function.argtypes = [ctypes.c_int32]
        found: List[int] = []
        while len(found) < MOST_TENSORS and (size := int(function(len(found)))) > 0:
            found.append(size)
        # Older modules have one of each, and functions that look at no argument.
        return found[:1] if len(found) == MOST_TENSORS else found

    def _tensor(self, kind: str, at: int, size: int, dtype: str) -> TensorInfo:
        shape: Tuple[int, ...] = (size,)
        function = self._function(f"Get{kind}Shape")
        if function is not None:
            function.restype = None
            function.argtypes = [ctypes.c_int32, ctypes.POINTER(_TensorShape)]
            told = _TensorShape()
            function(at, ctypes.byref(told))
            sizes = (told.rows, told.columns, told.channels)
            if all(each > 0 for each in sizes) and sizes[0] * sizes[1] * sizes[2] == size:
                shape = sizes
        return TensorInfo(name=f"{kind.lower()}{at}", dtype=dtype, shape=shape)

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """``X_Predict`` itself with its pointers."""
        import numpy as np

        self._results = [np.zeros(tensor.shape, tensor.dtype) for tensor in self.outputs]
        arrays = [*(feeds[tensor.name] for tensor in self.inputs), *self._results]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        self._kept = arrays
        self._predict.argtypes = [ctypes.c_void_p] * (1 + len(pointers))
        return functools.partial(self._predict, None, *pointers)

    def fetch(self, returned: object) -> Tensors:  # noqa: ARG002 - it writes where it was told to
        """Copies of what it wrote."""
        return {tensor.name: array.copy() for tensor, array in zip(self.outputs, self._results)}

    def placement(self) -> Placement:
        """All on the CPU: the module is machine code for it and calls nothing else."""
        nodes = self.nodes()
        if nodes:
            detail = f"{len(nodes)} nodes, compiled into machine code of the CPU"
        else:
            nodes = [("", "compiled module")]
            detail = "the whole module is machine code of the CPU; it was compiled without telling its nodes"
        ops = [
            OpPlacement(index=index, type=kind, name=name, unit=Unit.CPU)
            for index, (name, kind) in enumerate(nodes)
        ]
        return placement.known(ops, evidence=Evidence.PARTITION, detail=detail)

    def nodes(self) -> List[Tuple[str, str]]:
        """Name and type of every node; empty where it was compiled without profiling."""
        about = self._function("GetNodeInfo")
        if about is None:
            return []
        about.restype = ctypes.POINTER(_NodeInfo)
        about.argtypes = [ctypes.c_int32]
        return [
            (_decoded(info.contents.name), _decoded(info.contents.type) or "node")
            for at in range(self._count())
            if (info := about(at))
        ]

    def _count(self) -> int:
        count = self._function("GetNumNodes")
        if count is None:
            return 0
        count.restype = ctypes.c_int32
        return max(0, min(int(count()), 100_000))

    def milliseconds(self) -> List[float]:
        """Time that every node has taken in all inferences so far."""
        function = self._function("GetNodePerformanceCounters")
        if function is None:
            return []
        function.restype = ctypes.POINTER(_Counters)
        function.argtypes = [ctypes.c_int32]
        found = []
        for at in range(self._count()):
            counters = function(at)
            found.append(float(counters.contents.milliseconds) if counters else 0.0)
        return found

    def close(self) -> None:
        """Lets go of the arrays. The library stays: what it started may still run."""
        self._results, self._kept = [], None


def profile(runtime: EllRuntime, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    """Profiles the module by its own counters. Raises NoProfile, and what ``load`` raises."""
    import time

    request.begin(METHOD)
    model = request.load(runtime)
    if not model.profiles:
        raise NoProfile("the module was compiled without profiling (compile it with --profile)")
    call = model.bind(request.feeds(model.inputs))
    call()
    whole: List[float] = []
    each: List[List[float]] = []
    before = model.milliseconds()
    for _ in runs():
        began = time.perf_counter()
        call()
        whole.append(time.perf_counter() - began)
        after = model.milliseconds()
        each.append([(now - then) / 1e3 for now, then in zip(after, before)])
        before = after
    found = model.placement()
    seconds: Dict[int, float] = {
        op.index: stats.midmean([times[op.index] for times in each])
        for op in found.ops
        if each and op.index < len(each[0])
    }
    return Profile(
        method=METHOD,
        detail=f"{len(whole)} inferences, {METHOD}",
        units=tuple(op.unit for op in found.ops),
        whole_seconds=tuple(whole),
        op_seconds=seconds,
    )


def _prefix(model: Path) -> str:
    """What the names of a module begin with, told from the names that the file holds."""
    with model.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _SEARCHED_BYTES))
        content = file.read(_SEARCHED_BYTES)
    names: List[str] = sorted({name.decode("ascii") for name in _PREDICT.findall(content)})
    found = [name for name in names if f"\0{name}_GetInputSize\0".encode("ascii") in content]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelRejected(
            f"{model.name} exports no NAME_Predict with a NAME_GetInputSize: is it a module that ELL "
            "compiled, linked as a shared library (gcc -shared)?"
        )
    raise ModelRejected(
        f"{model.name} holds {len(found)} modules ({', '.join(found[:5])}): link one by itself"
    )


def _decoded(text: Optional[bytes]) -> str:
    return (text or b"").decode("utf-8", "replace")


def _rejected(model: Path, error: OSError) -> ModelRejected:
    said = str(error)
    if "undefined symbol" in said:
        todo = "it calls functions that are not in it (callbacks of source nodes?): link them into the module"
    elif re.search("wrong ELF class|invalid ELF header|Exec format|file too short|incompatible", said):
        todo = f"compile it for this machine ({platform.machine()}, {sys.platform})"
    else:
        todo = "is the file whole?"
    return ModelRejected(f"{model.name} can't be loaded: {todo} (the loader said: {said[:300]})")
