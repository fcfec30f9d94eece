"""The contract of an engine. One file an engine in ``runtimes/``; the contract suite runs over all.

Two types, so that run-before-load can't be written: a :class:`Runtime` can only load, a
:class:`LoadedModel` is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional, Protocol, Tuple

from boardbench.agent.domain import Placement, TensorInfo

if TYPE_CHECKING:
    import numpy as np

    Tensors = Mapping[str, "np.ndarray[Any, np.dtype[Any]]"]


class RuntimeUnavailable(Exception):
    """The engine can't run here; the message says why and what to install."""


class ModelRejected(Exception):
    """The engine refuses the model; the message is the engine's own, with the file and what to do."""


class OptionRejected(Exception):
    """An option, device, shape or input that this engine or model does not take; names it and lists what it takes."""


class LoadedModel(Protocol):
    """A model in an engine, ready to run. Used by one thread; closed by whoever loaded it."""

    inputs: Tuple[TensorInfo, ...]
    outputs: Tuple[TensorInfo, ...]

    def bind(self, feeds: "Tensors") -> Callable[[], object]:
        """A call that runs one inference on ``feeds`` and returns once the outputs are in host memory.

        Everything that need not be repeated for an inference happens here and not in the
        call: this is what the timed loop calls, so it is the engine's own function where possible.
        ``feeds`` holds every input by name, of the dtype and a shape that the model takes.
        """
        ...

    def fetch(self) -> "Tensors":
        """Outputs of the latest inference, by name, copied."""
        ...

    def placement(self) -> Placement:
        """Where each op runs. Never guesses: unknown is an empty Placement with the reason in ``detail``."""
        ...

    def close(self) -> None:
        """Frees the engine. Idempotent."""
        ...


class Runtime(Protocol):
    """An engine. Constructing it imports nothing heavy."""

    name: str
    formats: Tuple[str, ...]

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
    ) -> LoadedModel:
        """Loads a model file. Raises RuntimeUnavailable, ModelRejected, OptionRejected."""
        ...
