"""The few functions of CUDA's runtime library that running an engine of NVIDIA's takes.

Called through ctypes, so that a Jetson needs nothing beside the libcudart of its system. Prototypes:
https://docs.nvidia.com/cuda/cuda-runtime-api/ (modules Device, Memory, Stream and Event Management).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
from typing import Callable, List, Mapping, Optional, Tuple

LIBRARY_VARIABLE = "BOARDBENCH_CUDART"
"""Names the library, where it is none of those below."""

LIBRARIES = (
    "libcudart.so.13",
    "libcudart.so.12",
    "libcudart.so.11.0",
    "/usr/local/cuda/lib64/libcudart.so",
)
"""The newest first; JetPack 5, 6 and 7 have CUDA 11, 12 and 13."""

STANDIN_SYMBOL = "boardbench_standin"
"""A string that says what it stands in for. Only a library made for tests has it."""

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2  # cudaMemcpyKind
_NON_BLOCKING = 1  # cudaStreamNonBlocking: doesn't wait for the default stream
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76  # cudaDeviceAttr

_size, _pointer, _int = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
_to_pointer, _to_int = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)
_PROTOTYPES = {
    "cudaGetDeviceCount": (_to_int,),
    "cudaRuntimeGetVersion": (_to_int,),
    "cudaDeviceGetAttribute": (_to_int, _int, _int),
    "cudaMalloc": (_to_pointer, _size),
    "cudaFree": (_pointer,),
    "cudaHostAlloc": (_to_pointer, _size, ctypes.c_uint),
    "cudaFreeHost": (_pointer,),
    "cudaMemcpyAsync": (_pointer, _pointer, _size, _int, _pointer),
    "cudaStreamCreateWithFlags": (_to_pointer, ctypes.c_uint),
    "cudaStreamDestroy": (_pointer,),
    "cudaStreamSynchronize": (_pointer,),
    "cudaEventCreate": (_to_pointer,),
    "cudaEventRecord": (_pointer, _pointer),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _pointer, _pointer),
    "cudaEventDestroy": (_pointer,),
}


class NoCuda(Exception):
    """The library is not here, or finds no GPU; says what to do."""


class CudaError(RuntimeError):
    """A call failed; the message is CUDA's own."""


class Cudart:
    """The library, loaded. What it hands out are addresses, freed by whoever asked for them."""

    def __init__(self, library: str) -> None:
        """Loads ``library``. Raises OSError or AttributeError where that is no libcudart."""
        self.library = library
        self._loaded = ctypes.CDLL(library)
        for name, arguments in _PROTOTYPES.items():
            function = getattr(self._loaded, name)
            function.restype, function.argtypes = ctypes.c_int, list(arguments)
        self._loaded.cudaGetErrorString.restype = ctypes.c_char_p
        self._loaded.cudaGetErrorString.argtypes = [ctypes.c_int]

    @property
    def standin(self) -> str:
        """Name of the stand-in that the library is; empty for the real thing."""
        try:
            symbol = (ctypes.c_char * 64).in_dll(self._loaded, STANDIN_SYMBOL)
        except ValueError:
            return ""
        return ctypes.string_at(ctypes.addressof(symbol)).decode("utf-8", "replace")

    def check(self, status: int) -> None:
        """Raises CudaError, or MemoryError, where ``status`` is none of success."""
        if status == 0:
            return
        said = self._loaded.cudaGetErrorString(status) or b""
        message = f"CUDA error {status}: {said.decode('utf-8', 'replace')}"
        if status == 2:  # cudaErrorMemoryAllocation
            raise MemoryError(f"{message}: the GPU's memory is full")
        raise CudaError(message)

    def devices(self) -> int:
        """How many GPUs there are. Raises CudaError where there is no driver."""
        return self._number(self._loaded.cudaGetDeviceCount)

    def version(self) -> Tuple[int, int]:
        """Major and minor number of the library."""
        number = self._number(self._loaded.cudaRuntimeGetVersion)
        return number // 1000, number % 1000 // 10

    def gpu(self) -> str:
        """What kind of GPU an engine is built for: compute capability and number of multiprocessors."""
        major, minor, units = (
            self._number(functools.partial(self._attribute, attribute))
            for attribute in (_MAJOR, _MINOR, _MULTIPROCESSORS)
        )
        return f"sm_{major}{minor}, {units} multiprocessors"

    def _attribute(self, attribute: int, value: object) -> int:
        return int(self._loaded.cudaDeviceGetAttribute(value, attribute, 0))

    def _number(self, function: Callable[[object], int]) -> int:
        value = ctypes.c_int()
        self.check(function(ctypes.byref(value)))
        return value.value

    def _address(self, function: Callable[..., int], *arguments: int) -> int:
        value = ctypes.c_void_p()
        self.check(function(ctypes.byref(value), *arguments))
        return value.value or 0

    def malloc(self, size_bytes: int) -> int:
        """Address of so many bytes on the GPU."""
        # An empty tensor has an address, too.
        return self._address(self._loaded.cudaMalloc, max(1, size_bytes))

    def free(self, address: int) -> None:
        """Frees what ``malloc`` gave."""
        self.check(self._loaded.cudaFree(address))

    def host_malloc(self, size_bytes: int) -> int:
        """Address of so many bytes of this process that the GPU copies without a detour (pinned)."""
        return self._address(self._loaded.cudaHostAlloc, max(1, size_bytes), 0)

    def host_free(self, address: int) -> None:
        """Frees what ``host_malloc`` gave."""
        self.check(self._loaded.cudaFreeHost(address))

    def stream(self) -> int:
        """A stream of its own."""
        return self._address(self._loaded.cudaStreamCreateWithFlags, _NON_BLOCKING)

    def end_stream(self, stream: int) -> None:
        """Ends a stream."""
        self.check(self._loaded.cudaStreamDestroy(stream))

    def upload(self, device: int, host: int, size_bytes: int, stream: int) -> Callable[[], int]:
        """A call that queues a copy to the GPU and returns its status."""
        return self._copy(device, host, size_bytes, _HOST_TO_DEVICE, stream)

    def download(self, host: int, device: int, size_bytes: int, stream: int) -> Callable[[], int]:
        """A call that queues a copy from the GPU and returns its status."""
        return self._copy(host, device, size_bytes, _DEVICE_TO_HOST, stream)

    def _copy(self, to: int, source: int, size_bytes: int, kind: int, stream: int) -> Callable[[], int]:
        return functools.partial(
            self._loaded.cudaMemcpyAsync,
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size_bytes),
            kind,
            ctypes.c_void_p(stream),
        )

    def wait(self, stream: int) -> Callable[[], int]:
        """A call that returns, with a status, when all that the stream was given is done."""
        return functools.partial(self._loaded.cudaStreamSynchronize, ctypes.c_void_p(stream))

    def events(self, count: int) -> List[int]:
        """So many events."""
        return [self._address(self._loaded.cudaEventCreate) for _ in range(count)]

    def record(self, event: int, stream: int) -> None:
        """Queues a look at the GPU's clock."""
        self.check(self._loaded.cudaEventRecord(event, stream))

    def between_seconds(self, first: int, second: int) -> float:
        """Seconds from one recorded event to the next; both have happened."""
        milliseconds = ctypes.c_float()
        self.check(self._loaded.cudaEventElapsedTime(ctypes.byref(milliseconds), first, second))
        return milliseconds.value / 1e3

    def end_events(self, events: List[int]) -> None:
        """Ends events."""
        for event in events:
            self.check(self._loaded.cudaEventDestroy(event))


def load(environ: Optional[Mapping[str, str]] = None) -> Cudart:
    """The library of this machine, which has a GPU. Raises NoCuda."""
    named = (os.environ if environ is None else environ).get(LIBRARY_VARIABLE)
    found = ctypes.util.find_library("cudart")
    names = (named,) if named else (*LIBRARIES, *((found,) if found else ()))
    faults: List[str] = []
    for name in names:
        try:
            cuda = Cudart(name)
        except (OSError, AttributeError) as error:
            faults.append(str(error))
            continue
        try:
            if cuda.devices() > 0:
                return cuda
            fault = "it sees no GPU"
        except (CudaError, MemoryError) as error:
            fault = str(error)
        raise NoCuda(f"{name} is here, and finds no GPU of NVIDIA's it can use ({fault})")
    raise NoCuda(
        f"CUDA's runtime library can't be loaded ({'; '.join(faults)[:300]}): install CUDA "
        f"(cuda-cudart, part of JetPack), or name the library in {LIBRARY_VARIABLE}"
    )
