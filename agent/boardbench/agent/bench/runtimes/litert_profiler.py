"""LiteRT's own profiler, which times every operation, those inside XNNPACK too.

The Interpreter of ai-edge-litert has no profiler, but ``libLiteRt.so`` in the same wheel has one for its
CompiledModel. It is a plain C API, called here through ctypes. Sources: google-ai-edge/LiteRT,
``litert/c/litert_compiled_model.h``, ``litert_model_types.h`` (the tensor type), ``litert_profiler.h``,
``litert_profiler_event.h`` (the event) and ``options/litert_cpu_options.cc`` (the options' names).

The layout of an event is not promised by the library. How many bytes it writes for one is therefore measured
before an event is looked at, and any other number than the expected is refused. To be used in a process
that may crash.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, List, Sequence, Tuple

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

LIBRARY = "libLiteRt.so"

_CPU = 1  # kLiteRtHwAcceleratorCpu
_LOCK_TO_WRITE = 1  # kLiteRtTensorBufferLockModeWrite
_INVOKED, _OPERATION, _IN_DELEGATE = 1, 2, 8
"""tflite::Profiler::EventType: DEFAULT, OPERATOR_INVOKE, DELEGATE_PROFILED_OPERATOR_INVOKE."""

# tag, type, start and duration in microseconds, two records of memory (three numbers each in C++), the number
# of the operation and that of its graph, source.
_EVENT = struct.Struct("<QixxxxQQ48xQQixxxx")
_UNTOUCHED = 0xA5


class NoProfiler(Exception):
    """The profiler can't be used here or for this model; the message says why."""


@dataclass(frozen=True)
class Event:
    """An operation that ran. ``index`` counts in the model, or inside the delegate if ``delegated``."""

    name: str
    index: int
    delegated: bool
    seconds: float


@dataclass(frozen=True)
class Inference:
    """One profiled inference: its duration, and the operations in the order in which they ended."""

    seconds: float
    events: Tuple[Event, ...]


def library_of(module: Any) -> Path:
    """Where the library of an interpreter module is. Raises NoProfiler."""
    path = Path(str(module.__file__)).parent / LIBRARY
    if not path.is_file():
        raise NoProfiler(f"there is no {LIBRARY} beside the interpreter")
    return path


def profile(
    library: Path, model: Path, feeds: Sequence[Array], *, threads: int, xnnpack: bool, runs: Iterable[object]
) -> List[Inference]:
    """Runs the model once and then once for each of ``runs``, on the CPU; raises NoProfiler.

    ``feeds`` are the inputs of the main graph in its order.
    """
    try:
        loaded = _Library(library)
    except (OSError, AttributeError) as error:
        raise NoProfiler(f"{library.name} can't be used: {error}") from error
    return loaded.profile(model, feeds, threads=threads, xnnpack=xnnpack, runs=runs)


class _Layout(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_uint32),  # seven bits, and one for strides
        ("dimensions", ctypes.c_int32 * 8),
        ("strides", ctypes.c_uint32 * 8),
    )


class _TensorType(ctypes.Structure):
    _fields_ = (("element", ctypes.c_int), ("layout", _Layout))


_Handle = ctypes.c_void_p
_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Library:
    """The functions that are needed. What they make lives as long as the process, which is short."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._c = ctypes.CDLL(None)
        self._c.strdup.restype = ctypes.c_void_p
        self._c.free.argtypes = (ctypes.c_void_p,)
        self._free = _DELETER(self._c.free)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._functions, name)(*arguments)
        if status != 0:
            raise NoProfiler(f"{name} says {status}")

    def _made(self, name: str, *arguments: object) -> ctypes.c_void_p:
        """What a function with a last argument for its result makes."""
        found = _Handle()
        self._call(name, *arguments, ctypes.byref(found))
        return found

    def profile(
        self, model: Path, feeds: Sequence[Array], *, threads: int, xnnpack: bool, runs: Iterable[object]
    ) -> List[Inference]:
        try:
            environment = self._made("LiteRtCreateEnvironment", 0, None)
            loaded = self._made("LiteRtCreateModelFromFile", environment, str(model).encode())
            compiled = self._compiled(environment, loaded, threads, xnnpack)
            profiler = self._made("LiteRtCompiledModelGetProfiler", compiled)
            inputs = self._buffers(environment, loaded, compiled, "Input")
            outputs = self._buffers(environment, loaded, compiled, "Output")
            self._fill(inputs, feeds)
            run = self._run(compiled, inputs, outputs)
            run()
            return [self._profiled(profiler, run) for _ in runs]
        except AttributeError as error:
            raise NoProfiler(f"{LIBRARY} lacks a function: {error}") from error

    def _compiled(
        self, environment: ctypes.c_void_p, model: ctypes.c_void_p, threads: int, xnnpack: bool
    ) -> ctypes.c_void_p:
        options = self._made("LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, _CPU)
        kernels = "xnnpack" if xnnpack else "builtin"
        for name, text in (
            ("runtime_options_string", "enable_profiling = true\n"),
            ("xnnpack", f'num_threads = {threads}\nkernel_mode = "{kernels}"\n'),
        ):
            copy = ctypes.c_void_p(self._c.strdup(text.encode()))
            opaque = self._made("LiteRtCreateOpaqueOptions", name.encode(), copy, self._free)
            self._call("LiteRtAddOpaqueOptions", options, opaque)
        return self._made("LiteRtCreateCompiledModel", environment, model, options)

    def _buffers(
        self, environment: ctypes.c_void_p, model: ctypes.c_void_p, compiled: ctypes.c_void_p, kind: str
    ) -> List[ctypes.c_void_p]:
        """A buffer for every input or output."""
        graph = self._made("LiteRtGetModelSubgraph", model, ctypes.c_size_t(0))
        count = ctypes.c_size_t()
        self._call(f"LiteRtGetNumSubgraph{kind}s", graph, ctypes.byref(count))
        found = []
        for at in range(count.value):
            tensor = self._made(f"LiteRtGetSubgraph{kind}", graph, ctypes.c_size_t(at))
            type_ = _TensorType()
            self._call("LiteRtGetRankedTensorType", tensor, ctypes.byref(type_))
            needed = self._made(
                f"LiteRtGetCompiledModel{kind}BufferRequirements",
                compiled,
                ctypes.c_size_t(0),
                ctypes.c_size_t(at),
            )
            found.append(
                self._made(
                    "LiteRtCreateManagedTensorBufferFromRequirements",
                    environment,
                    ctypes.byref(type_),
                    needed,
                )
            )
        return found

    def _fill(self, buffers: Sequence[ctypes.c_void_p], feeds: Sequence[Array]) -> None:
        if len(buffers) != len(feeds):
            raise NoProfiler(f"it finds {len(buffers)} inputs where there are {len(feeds)}")
        for buffer, array in zip(buffers, feeds):
            if array.dtype.hasobject or array.dtype.kind not in "biufc":
                raise NoProfiler(f"an input of type {array.dtype} can't be copied into it")
            size = ctypes.c_size_t()
            self._call("LiteRtGetTensorBufferSize", buffer, ctypes.byref(size))
            if size.value < array.nbytes:
                raise NoProfiler(f"it takes {size.value} bytes for an input of {array.nbytes}")
            place = ctypes.c_void_p()
            self._call("LiteRtLockTensorBuffer", buffer, ctypes.byref(place), _LOCK_TO_WRITE)
            data = array.tobytes()
            ctypes.memmove(place, data, len(data))
            self._call("LiteRtUnlockTensorBuffer", buffer)

    def _run(
        self,
        compiled: ctypes.c_void_p,
        inputs: Sequence[ctypes.c_void_p],
        outputs: Sequence[ctypes.c_void_p],
    ) -> Callable[[], None]:
        ins = (ctypes.c_void_p * len(inputs))(*[buffer.value for buffer in inputs])
        outs = (ctypes.c_void_p * len(outputs))(*[buffer.value for buffer in outputs])
        signature = ctypes.c_size_t(0)
        sizes = ctypes.c_size_t(len(inputs)), ctypes.c_size_t(len(outputs))

        def run() -> None:
            self._call("LiteRtRunCompiledModel", compiled, signature, sizes[0], ins, sizes[1], outs)

        return run

    def _profiled(self, profiler: ctypes.c_void_p, run: Callable[[], None]) -> Inference:
        self._call("LiteRtStartProfiler", profiler)  # forgets what was before
        run()
        self._call("LiteRtStopProfiler", profiler)
        seconds, events = 0.0, []
        for tag, kind, microseconds, index, graph in self._events(profiler):
            if graph:
                continue  # the body of a loop: the loop has the time
            if kind == _INVOKED and tag == "Invoke":
                seconds += microseconds / 1e6
            elif kind in (_OPERATION, _IN_DELEGATE):
                events.append(Event(tag, index, kind == _IN_DELEGATE, microseconds / 1e6))
        if seconds <= 0 or not events:
            raise NoProfiler("its profile of an inference is empty")
        return Inference(seconds=seconds, events=tuple(events))

    def _events(self, profiler: ctypes.c_void_p) -> Iterator[Tuple[str, int, int, int, int]]:
        """(tag, type, microseconds, number, graph) of every event."""
        count = ctypes.c_int()
        self._call("LiteRtGetNumProfilerEvents", profiler, ctypes.byref(count))
        room = 2 * _EVENT.size * (count.value + 1)
        buffer = (ctypes.c_ubyte * room)()
        ctypes.memset(buffer, _UNTOUCHED, room)
        self._call("LiteRtGetProfilerEvents", profiler, count, buffer)
        content = bytes(buffer)
        # The last bytes of an event are a small number and padding, which may keep what was there.
        written = len(content.rstrip(bytes([_UNTOUCHED])))
        if count.value and not 0 <= count.value * _EVENT.size - written < 8:
            raise NoProfiler(
                f"{count.value} events take {written} bytes: this version has another layout than is known"
            )
        for at in range(count.value):
            tag, kind, _, microseconds, index, graph, _ = _EVENT.unpack_from(content, at * _EVENT.size)
            name = ctypes.string_at(tag).decode("utf-8", "replace")
            yield name, kind, microseconds, index & 0xFFFFFFFF, graph
