"""A fake engine that ships: for tests of everything around an engine, with faults that are real.

Offered only where the environment variable BOARDBENCH_FAKE_RUNTIME is set (to anything); its format
is "fake", which no file is ever taken for by itself.

A model is a text file: the magic line ``boardbench-fake/1``, then one JSON object::

    boardbench-fake/1
    {"inputs":  [{"name": "x", "dtype": "float32", "shape": [1, 4]}],      -1: open
     "outputs": [{"name": "y", "dtype": "float32", "shape": [1, 4]}],
     "ops":     [{"type": "CONV_2D", "unit": "UNIT_TPU"}],                 left out: placement unknown
     "create": [ACTION, …], "first_inference": [ACTION, …], "inference": [ACTION, …],
     "placement": [ACTION, …], "close": [ACTION, …],
     "profile": [ACTION, …]}                                               left out: can't be profiled

Every field may be left out; the tensors above (and no op) are the default. ``inference`` happens at
every inference but the first when ``first_inference`` is there. An action is an object with one of

    sleep_seconds: number           sleeps
    jitter_seconds: number          sleeps a pseudo-random part of it, the same at every run
    spin_seconds: number            keeps one processor busy
    hang: true                      never returns
    signal: "SIGSEGV"               SIGSEGV by a read at address 0, SIGABRT by abort(), others by kill
    exit_code: number               ends the process on the spot, nothing said
    allocate_bytes: number          takes and touches that much memory for good, 16 MiB at a time
    memory_error: true              raises MemoryError
    raise: "message"                raises an error that is no error of boardbench
    reject: "message"               refuses the model
    exclusive: "path"               refuses the model while another instance has this path: a device
    stdout: "text", times: number   writes to stdout (stderr alike)
    at_exit: [ACTION, …]            happens in an exit handler of the interpreter, as engines have them

and, for an action of ``inference``, any of these, inferences being counted from 0, the first one included:

    at: number                      only in that inference: a stall
    every: number                   only in every so-manieth, the last of each so many
    from: number, until: number     only from that one on, and before that one: a board that heats up

Faults while the engine is imported: a JSON list of actions in BOARDBENCH_FAKE_IMPORT.
Options: ``mode=plain|noisy`` (noisy writes to stdout at every inference). Devices: cpu, faketpu.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from boardbench.agent.bench import caches, placement, shapes
from boardbench.agent.bench.options import OptionReader
from boardbench.agent.bench.runtime import (
    CACHE,
    COMPUTE_PRECISION,
    NO_SETTINGS,
    THREADS,
    ModelRejected,
    OptionRejected,
    Profile,
    ProfileRequest,
    RuntimeUnavailable,
    Settings,
)
from boardbench.agent.domain import Cache, Evidence, OpPlacement, Placement, Quantization, TensorInfo, Unit

if TYPE_CHECKING:
    import numpy as np

    from boardbench.agent.bench.runtime import Tensors

MAGIC = "boardbench-fake/1"
ENVIRONMENT = "BOARDBENCH_FAKE_RUNTIME"
IMPORT_ENVIRONMENT = "BOARDBENCH_FAKE_IMPORT"

LARGEST_ALLOCATION = 4 << 30
"""No test may take a machine down: more than 4 GiB is refused."""

_BLOCK = 16 << 20
_kept: List[bytearray] = []
_taken: Set[str] = set()


class FakeRuntime:
    """The engine."""

    name = "fake"
    formats: Tuple[str, ...] = ("fake",)
    settings: Tuple[str, ...] = (THREADS, COMPUTE_PRECISION, CACHE)
    options: Mapping[str, str] = {
        "mode": "plain (default) or noisy: whether it writes to stdout",
    }
    sys_root = Path("/")

    def version(self) -> str:
        """The version, after the faults asked for by the environment."""
        if not os.environ.get(ENVIRONMENT):
            raise RuntimeUnavailable(f"the fake engine is for tests: set {ENVIRONMENT}=1")
        import numpy  # noqa: F401 - as a real engine does

        _act(json.loads(os.environ.get(IMPORT_ENVIRONMENT, "[]")))
        return "boardbench-fake 1"

    def devices(self) -> Tuple[str, ...]:
        """Always the same two."""
        return ("cpu", "faketpu")

    def load(
        self,
        model: Path,
        *,
        device: str,
        threads: Optional[int],
        options: Mapping[str, str],
        shapes: Mapping[str, Tuple[int, ...]],
        allow_fallback: bool = False,  # noqa: ARG002 - its devices are always there
        settings: Settings = NO_SETTINGS,
    ) -> FakeModel:
        """Reads the file and carries out its ``create`` actions."""
        if device not in self.devices():
            raise OptionRejected(f"fake has no device {device!r}; it has {', '.join(self.devices())}")
        reader = OptionReader(self.name, options)
        noisy = reader.choice("mode", ("plain", "noisy"), default="plain") == "noisy"
        return FakeModel(
            _parse(model),
            wanted="" if device == "cpu" else device,
            noisy=noisy,
            options=reader.finish(),
            threads=threads,
            given=shapes,
            settings=settings,
        )


def _parse(file: Path) -> Mapping[str, Any]:
    try:
        magic, _, body = file.read_text(encoding="utf-8").partition("\n")
        content = json.loads(body) if body.strip() else {}
    except (OSError, ValueError) as error:
        raise ModelRejected(f"{file.name} can't be read by the fake engine: {error}") from error
    if magic.strip() != MAGIC or not isinstance(content, dict):
        raise ModelRejected(f"{file.name} is no model of the fake engine: its first line is not {MAGIC}")
    return content


class FakeModel:
    """A model of the fake engine."""

    watch = None
    device_fallback = ""

    def __init__(
        self,
        content: Mapping[str, Any],
        *,
        wanted: str,
        noisy: bool,
        options: Mapping[str, str],
        threads: Optional[int],
        given: Mapping[str, Tuple[int, ...]],
        settings: Settings = NO_SETTINGS,
    ) -> None:
        """Carries out the ``create`` actions; ``given`` settles open shapes."""
        self.content = content
        self._noisy = noisy
        self._noise = _noise()
        self._closed = False
        self._device = ""
        self.wanted = wanted
        self.profiles = "profile" in content
        self.options = options
        self.threads = threads
        try:
            declared = _tensors(content, "inputs", "x")
            self.outputs = _tensors(content, "outputs", "y")
            self._ops = tuple(
                OpPlacement(
                    index=at,
                    type=op["type"],
                    name=op.get("name", ""),
                    unit=Unit(op["unit"]),
                    precision=settings.compute_precision,
                )
                for at, op in enumerate(content.get("ops", ()))
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelRejected(f"the model of the fake engine is malformed: {error!r}") from error
        actions = content.get("create", ())
        self._device = next((action["exclusive"] for action in actions if "exclusive" in action), "")
        if self._device in _taken:
            raise ModelRejected(f"{self._device} is in use by another instance")
        _act([action for action in actions if "exclusive" not in action])
        _taken.update({self._device} - {""})
        self.inputs = shapes.settle(declared, given)
        self._cache = None
        if settings.cache_dir is not None:
            self._cache = caches.Watched(settings.cache_dir, "fake blob")
            blob = settings.cache_dir / "fake.blob"
            if not blob.exists():
                blob.write_bytes(bytes(int(content.get("cache_bytes", 64))))
            self._cache.loaded()

    def caches(self) -> Tuple[Cache, ...]:
        """The file that it keeps, of ``cache_bytes`` zeros."""
        return () if self._cache is None else self._cache.caches()

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """A call that carries out the actions and returns outputs derived from the bytes of ``feeds``."""
        outputs = self._outputs(feeds)
        steady: Sequence[Mapping[str, Any]] = self.content.get("inference", ())
        first: Optional[Sequence[Mapping[str, Any]]] = self.content.get("first_inference")
        pending = [steady if first is None else first]

        numbers = itertools.count()

        def infer() -> object:
            actions = pending.pop() if pending else steady
            number = next(numbers)
            if actions:
                _act([action for action in actions if _is_due(action, number)], self._noise)
            if self._noisy:
                sys.stdout.write("the fake engine ran\n")
            return outputs

        return infer

    def _outputs(self, feeds: Tensors) -> Dict[str, np.ndarray[Any, np.dtype[Any]]]:
        import numpy as np

        state = hashlib.sha256()
        for tensor in self.inputs:
            state.update(feeds[tensor.name].tobytes())
        outputs = {}
        # An open size of an output is that of the first input, as a batch is.
        first = self.inputs[0].shape if self.inputs else ()
        for tensor in self.outputs:
            shape = tuple(
                size if size >= 0 else (first[at] if at < len(first) else 1)
                for at, size in enumerate(tensor.shape)
            )
            pattern = np.frombuffer(state.digest(), dtype=np.uint8)
            outputs[tensor.name] = np.resize(pattern, shape).astype(tensor.dtype)
        return outputs

    def fetch(self, returned: object) -> Tensors:
        """Copies of what the call returned."""
        assert isinstance(returned, dict)
        return {name: array.copy() for name, array in returned.items()}

    def placement(self) -> Placement:
        """What the file says, labelled as a stand-in's; unknown when it says nothing."""
        _act(self.content.get("placement", ()))
        if not self._ops:
            return placement.unknown("the fake model names no operation")
        return placement.known(
            self._ops,
            evidence=Evidence.PARTITION,
            detail="as the fake model's file has it",
            standin=True,
            wanted=self.wanted,
        )

    def close(self) -> None:
        """Carries out the ``close`` actions, once."""
        if not self._closed:
            self._closed = True
            _taken.discard(self._device)
            _act(self.content.get("close", ()))


def profile(runtime: FakeRuntime, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    """Carries out the ``profile`` actions, unless the way of measuring called "actions" is to be avoided.

    Then every inference takes a millisecond for each operation.
    """
    model = request.load(runtime)
    request.feeds(model.inputs)
    if "actions" not in request.avoid:
        request.trying("actions")
        _act(model.content["profile"])
    found = model.placement()
    away = len(placement.fallen_back(found, model.wanted))
    turns = list(runs())
    return Profile(
        method="fake profiler",
        detail=f"fake profiler, {len(turns)} inferences",
        units=tuple(op.unit for op in found.ops),
        whole_seconds=(len(found.ops) * 1e-3,) * len(turns),
        fallback_seconds=(away * 1e-3,) * len(turns) if model.wanted else (),
        op_seconds={op.index: 1e-3 for op in found.ops},
    )


def _tensors(content: Mapping[str, Any], key: str, name: str) -> Tuple[TensorInfo, ...]:
    default = [{"name": name, "dtype": "float32", "shape": [1, 4]}]
    return tuple(
        TensorInfo(
            name=tensor["name"],
            dtype=tensor["dtype"],
            shape=tuple(int(size) for size in tensor["shape"]),
            quantization=Quantization(**tensor["quantization"]) if "quantization" in tensor else None,
        )
        for tensor in content.get(key, default)
    )


def _noise() -> Iterator[float]:
    """Numbers in [0, 1), the same every time: a linear congruential generator (Numerical Recipes)."""
    state = 1
    while True:
        state = (1664525 * state + 1013904223) % 2**32
        yield state / 2**32


def _is_due(action: Mapping[str, Any], number: int) -> bool:
    """Whether an action happens in the inference of this number."""
    return (
        action.get("at", number) == number
        and (number + 1) % action.get("every", 1) == 0
        and action.get("from", 0) <= number
        and ("until" not in action or number < action["until"])
    )


def _act(actions: Sequence[Mapping[str, Any]], noise: Optional[Iterator[float]] = None) -> None:
    for action in actions:
        _act_one(action, noise)


def _act_one(action: Mapping[str, Any], noise: Optional[Iterator[float]]) -> None:
    if "sleep_seconds" in action:
        time.sleep(action["sleep_seconds"])
    elif "jitter_seconds" in action:
        time.sleep(action["jitter_seconds"] * (next(noise) if noise is not None else 1.0))
    elif "spin_seconds" in action:
        end = time.perf_counter() + action["spin_seconds"]
        while time.perf_counter() < end:
            pass
    elif "hang" in action:
        while True:
            time.sleep(3600.0)
    elif "signal" in action:
        _signal(action["signal"])
    elif "exit_code" in action:
        os._exit(action["exit_code"])
    elif "allocate_bytes" in action:
        _allocate(action["allocate_bytes"])
    elif "memory_error" in action:
        raise MemoryError("the fake engine was told to run out of memory")
    elif "raise" in action:
        raise RuntimeError(action["raise"])
    elif "reject" in action:
        raise ModelRejected(action["reject"])
    elif "at_exit" in action:
        atexit.register(_act, action["at_exit"])
    elif "stdout" in action or "stderr" in action:
        stream = sys.stdout if "stdout" in action else sys.stderr
        text = action.get("stdout", action.get("stderr"))
        for _ in range(action.get("times", 1)):
            print(text, file=stream)
        stream.flush()
    else:
        raise ModelRejected(f"the fake engine has no action {sorted(action)}")


def _signal(name: str) -> None:
    number = signal.Signals[name]
    if number is signal.SIGSEGV:
        ctypes.string_at(0)  # the real thing: a read at address 0
    elif number is signal.SIGABRT:
        os.abort()
    else:
        os.kill(os.getpid(), number)


def _allocate(size_bytes: int) -> None:
    if size_bytes > LARGEST_ALLOCATION:
        raise ModelRejected(f"the fake engine takes {LARGEST_ALLOCATION} bytes at most, not {size_bytes}")
    left = size_bytes
    while left > 0:
        block = bytearray(min(left, _BLOCK))
        block[::4096] = b"\1" * len(block[::4096])  # a page that is never written takes no memory
        _kept.append(block)
        left -= len(block)
