"""The contract of an engine. One file an engine in ``runtimes/``; the contract suite runs over all.

Two types, so that run-before-load can't be written: a :class:`Runtime` can only load, a
:class:`LoadedModel` is loaded. An engine that can tell the time of an operation has a :class:`Profiler`
besides, which works in a process of its own, when all figures are safe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Mapping,
    Optional,
    Protocol,
    Tuple,
    TypeVar,
    runtime_checkable,
)

from boardbench.agent.domain import (
    AcceleratorUse,
    Cache,
    Crossings,
    Placement,
    TensorInfo,
    Transfers,
    Unit,
    Warning,
)

if TYPE_CHECKING:
    import numpy as np

    Tensors = Mapping[str, "np.ndarray[Any, np.dtype[Any]]"]

_Model = TypeVar("_Model", covariant=True)


class RuntimeUnavailable(Exception):
    """The engine can't run here; the message says why and what to install."""


class ModelRejected(Exception):
    """The engine refuses the model; the message is the engine's own, with the file and what to do."""


class OptionRejected(Exception):
    """An option or device that this engine does not take; names it and lists what it takes."""


class InputsRejected(Exception):
    """Shapes or input data that this model does not take; lists what it takes."""


THREADS = "threads"
COMPUTE_PRECISION = "compute_precision"
CACHE = "cache"
SETTINGS = (THREADS, COMPUTE_PRECISION, CACHE)
"""Settings that mean the same in every engine that takes them; each engine says which it does."""

PRECISIONS = ("float32", "float16", "bfloat16", "int8")
"""What a model can be told to be computed in."""


@dataclass(frozen=True)
class Settings:
    """Settings of the common vocabulary that not every engine takes."""

    compute_precision: str = ""
    """One of PRECISIONS; empty: the engine's own choice."""

    cache_dir: Optional[Path] = None
    """A folder that is there, for this model in this version of the engine with these settings alone."""


NO_SETTINGS = Settings()


class NoProfile(Exception):
    """The engine can't profile this model; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What a run did with an accelerator: the placement with all evidence joined, and what came up."""

    placement: Placement
    accelerator: AcceleratorUse
    warnings: Tuple[Warning, ...] = ()


class AcceleratorWatch(Protocol):
    """Looks at an accelerator before and after the counted inferences. Nothing here is timed."""

    def doubts(self) -> Iterable[Warning]:
        """What can be said once the model is loaded."""
        ...

    def begin(self) -> None:
        """Reads what there is to read; called right before the counted inferences."""
        ...

    def end(self) -> None:
        """Reads it again; called right after them."""
        ...

    def outcome(
        self,
        placement: Placement,
        *,
        runs: int,
        cpu_seconds: float,
        wall_seconds: float,
        queued_seconds: Optional[float],
    ) -> Outcome:
        """What the counted inferences did; ``placement`` is what the model itself says.

        ``queued_seconds`` of the wall seconds went by waiting for a processor; None where it is not known.
        """
        ...


class LoadedModel(Protocol):
    """A model in an engine, ready to run. Used by one thread; closed by whoever loaded it."""

    inputs: Tuple[TensorInfo, ...]
    """With every dimension settled: the shapes that will run. Names are unique and never empty."""

    outputs: Tuple[TensorInfo, ...]
    """As the model declares them, -1 where it leaves a size open. Names are unique and never empty."""

    options: Mapping[str, str]
    """Every option as it is in force, defaults included."""

    threads: Optional[int]
    """Threads that the engine was told to use; None where it decides by itself."""

    wanted: str
    """The delegate or provider that was asked for, as it stands in an op's ``delegate``; "" for the CPU."""

    device_fallback: str
    """Why the device that was asked for takes no part, where that was allowed; "" when it does."""

    profiles: bool
    """Whether there is a profiler for this model, see :class:`Profiler`."""

    @property
    def watch(self) -> Optional[AcceleratorWatch]:
        """Who knows the accelerator that this model was loaded for; None without one."""
        ...

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """A call that runs one inference on ``feeds`` and returns once the outputs are in host memory.

        Everything that need not be repeated for an inference happens here and not in the
        call: this is what the timed loop calls, so it is the engine's own function where possible.
        ``feeds`` holds every input by name, C-contiguous, of the dtype and shape in ``inputs``.
        """
        ...

    def fetch(self, returned: object) -> Tensors:
        """Outputs of the latest inference, by name, copied; ``returned`` is what its call gave back.

        An output that is no tensor (a list or map of ONNX-ML) is left out.
        """
        ...

    def placement(self) -> Placement:
        """Where each op runs. Never guesses: unknown is an empty Placement with the reason in ``detail``.

        Called after the measurement; may run the model again, under a profiler.
        """
        ...

    def close(self) -> None:
        """Frees the engine. Idempotent."""
        ...


@runtime_checkable
class TellsArena(Protocol):
    """A loaded model whose engine tells how much memory it has for tensors."""

    def arena_bytes(self) -> Optional[int]:
        """Bytes of it; None where this version does not tell. Called after the measurement."""
        ...


@runtime_checkable
class TimesTransfers(Protocol):
    """A loaded model on an accelerator with memory of its own, whose events tell what goes there and back."""

    def transfers(self, feeds: Tensors) -> Optional[Transfers]:
        """From some inferences more; None where it can't be told. Called last, after the measurement."""
        ...


@runtime_checkable
class KeepsCaches(Protocol):
    """A loaded model of an engine that takes the setting ``cache``."""

    def caches(self) -> Tuple[Cache, ...]:
        """What it found on disk, or left there. Called after the measurement."""
        ...


class Runtime(Protocol):
    """An engine. Constructing it imports nothing heavy.

    One that takes more of the common settings than ``threads`` has a keyword ``settings`` in ``load``, too,
    which is given when there is something in it; see :class:`TakesSettings`.
    """

    name: str
    formats: Tuple[str, ...]

    @property
    def settings(self) -> Tuple[str, ...]:
        """Those of SETTINGS that it takes, on some device at least; the others are refused before ``load``.

        A constant in most; where it depends on the installation, asked for after :meth:`version`.
        """
        ...

    options: Mapping[str, str]
    """Its own options by name, each with what it does in one line; a name that ends in ``.`` takes a key."""

    sys_root: Path
    """Folder that holds sys and proc of the board; set before ``load`` where it is not ``/``."""

    def version(self) -> str:
        """Imports the engine; package and version ("onnxruntime 1.32.0"). Raises RuntimeUnavailable."""
        ...

    def devices(self) -> Tuple[str, ...]:
        """Devices that can be asked for here, the default first. Raises RuntimeUnavailable."""
        ...

    def load(
        self,
        model: Path,
        *,
        device: str,
        threads: Optional[int],
        options: Mapping[str, str],
        shapes: Mapping[str, Tuple[int, ...]],
        allow_fallback: bool = False,
    ) -> LoadedModel:
        """Loads a model file; ``shapes`` settles open inputs, see :func:`shapes.settle`.

        ``allow_fallback``: with a device that the engine knows and that is not there, or takes nothing of the
        model, it is loaded all the same, and says so in ``device_fallback``.

        Raises RuntimeUnavailable, ModelRejected, OptionRejected, InputsRejected.
        """
        ...


class TakesSettings(Protocol):
    """How an engine loads that takes more of the common settings than ``threads``."""

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
    ) -> LoadedModel:
        """Loads a model file as :meth:`Runtime.load` does, or raises OptionRejected for what it can't do."""
        ...


class Loads(Protocol[_Model]):
    """An engine whose models are of this type."""

    def load(
        self,
        model: Path,
        *,
        device: str,
        threads: Optional[int],
        options: Mapping[str, str],
        shapes: Mapping[str, Tuple[int, ...]],
        allow_fallback: bool = False,
    ) -> _Model:
        """As in :class:`Runtime`."""
        ...


@dataclass(frozen=True)
class ProfileRequest:
    """What to profile: what was run, as it was run."""

    model_path: Path
    device: str
    threads: Optional[int]
    options: Mapping[str, str]
    shapes: Mapping[str, Tuple[int, ...]]
    allow_fallback: bool
    feeds: Callable[[Tuple[TensorInfo, ...]], Tensors]
    """The data of the run for these inputs."""

    trying: Callable[[str], None]
    """To be called with the name of a way of measuring before it is tried: it may crash or hang."""

    avoid: Tuple[str, ...] = ()
    """Names of those that did so before."""

    settings: Settings = NO_SETTINGS
    """As in the run."""

    def begin(self, method: str) -> None:
        """Before an engine's only way of measuring. Raises NoProfile where that is to be avoided."""
        if method in self.avoid:
            raise NoProfile(f"{method} ended the process")
        self.trying(method)

    def load(self, runtime: Loads[_Model]) -> _Model:
        """The model as it was loaded in the run. Raises what ``load`` of the engine raises."""
        more: Dict[str, Any] = {} if self.settings == NO_SETTINGS else {"settings": self.settings}
        return runtime.load(
            self.model_path,
            device=self.device,
            threads=self.threads,
            options=self.options,
            shapes=self.shapes,
            allow_fallback=self.allow_fallback,
            **more,
        )


@dataclass(frozen=True)
class Cause:
    """Why an operation is not where it was asked to be; see ``boardbench.v1.OpPlacement``."""

    cause: str
    root_cause: Optional[bool] = None
    remedy: str = ""


@dataclass(frozen=True)
class Profile:
    """Where the time of an inference goes. Operations count as in ``LoadedModel.placement``."""

    method: str
    """How it was measured, in a few words."""

    detail: str
    """What was seen, for a person."""

    units: Tuple[Unit, ...]
    """Where each operation ran in the profiling process."""

    whole_seconds: Tuple[float, ...]
    """Duration of every profiled inference."""

    fallback_seconds: Tuple[float, ...] = ()
    """The part of each in operations that are not where they were asked to be; empty: nothing was asked."""

    whole_queued_seconds: Tuple[float, ...] = ()
    """Of each, the time in which the thread was ready to run and had no processor; empty: not known."""

    fallback_queued_seconds: Tuple[float, ...] = ()
    """The same, of the part in operations that are not where they were asked to be."""

    whole_cpu_seconds: Tuple[float, ...] = ()
    """Of each, the processor time of all threads; empty: not known."""

    accelerator_apart: bool = False
    """Whether the rest of each is the time of hardware of its own, timed by itself to its end."""

    op_seconds: Mapping[int, float] = field(default_factory=dict)
    """Mean seconds of an operation in one inference (of the middle half), where that could be told."""

    causes: Mapping[int, Cause] = field(default_factory=dict)
    """What was found out about operations that are not where they were asked to be."""

    crossings: Optional[Crossings] = None
    """Seen while it ran; None where the placement already says it, or nothing does."""


class Profiler(Protocol):
    """The function ``profile`` in the module that the table of engines names for an engine."""

    def __call__(
        self, runtime: Runtime, request: ProfileRequest, runs: Callable[[], Iterable[int]]
    ) -> Profile:
        """Profiles the model. Every call of ``runs`` gives one turn for each inference to profile.

        May crash or hang: it is called in a process of its own. Raises NoProfile, and what ``load`` raises.
        """
        ...
