"""The engine. Its contract, word for word, is ``boardbench.agent.bench.runtime``.

It runs in a process of its own, under the interpreter that has this distribution, for one run; what it
imports of boardbench is there without being installed. NumPy is loaded when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boardbench.agent.bench import placement, shapes
from boardbench.agent.bench.options import OptionReader
from boardbench.agent.bench.runtime import ModelRejected, OptionRejected, RuntimeUnavailable
from boardbench.agent.domain import Evidence, OpPlacement, Placement, TensorInfo, Unit
from boardbench_affine import graph

if TYPE_CHECKING:
    import numpy as np

    from boardbench.agent.bench.runtime import Tensors

    Array = np.ndarray[Any, np.dtype[Any]]
    Step = Callable[[dict[str, Array]], Array]


class AffineRuntime:
    """The engine, before a model is loaded."""

    name = "affine"
    formats: tuple[str, ...] = ("affine",)
    # Those of boardbench's own settings that it takes: none. How many threads NumPy has, it decides itself.
    settings: tuple[str, ...] = ()
    # Its own options, each with what it does.
    options: Mapping[str, str] = {
        "accumulate": "float32 (default) or float64: what sums of dense are kept in"
    }
    sys_root = Path("/")

    def version(self) -> str:
        """Package and number. This is where the engine is imported, and where it says why it can't be."""
        try:
            import numpy as np
        except Exception as error:  # a broken installation raises anything
            raise RuntimeUnavailable(f"no NumPy ({error}): python -m pip install numpy") from error
        return f"numpy {np.__version__}"

    def devices(self) -> tuple[str, ...]:
        """What can be asked for with --device, the default first."""
        return ("cpu",)

    def load(
        self,
        model: Path,
        *,
        device: str,
        threads: int | None,
        options: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        allow_fallback: bool = False,  # noqa: ARG002 - the CPU is always there
    ) -> AffineModel:
        """Reads the file; what can't be done as it is asked for is refused, never ignored."""
        if device not in self.devices():
            raise OptionRejected(f"affine has no device {device!r}; it has {', '.join(self.devices())}")
        if threads is not None:
            raise OptionRejected(
                "affine takes no number of threads: set OPENBLAS_NUM_THREADS, or whatever NumPy's BLAS "
                "listens to, in the agent's environment"
            )
        reader = OptionReader(self.name, options)
        double = reader.choice("accumulate", ("float32", "float64"), default="float32") == "float64"
        in_force = reader.finish()
        try:
            found = graph.read(model)
        except graph.Malformed as error:
            raise ModelRejected(f"{model.name} {error}") from error
        return AffineModel(found, options=in_force, given=shapes, double=double)


@dataclass(frozen=True)
class Timed:
    """One operation as it is computed; called with all values so far."""

    name: str
    compute: Step


class AffineModel:
    """A model, ready to run."""

    watch = None
    wanted = ""
    device_fallback = ""
    threads = None
    profiles = True

    def __init__(
        self,
        found: graph.Graph,
        *,
        options: Mapping[str, str],
        given: Mapping[str, tuple[int, ...]],
        double: bool,
    ) -> None:
        """Settles the sizes that the model leaves open."""
        self.graph = found
        self.options = options
        # Refuses what does not fit, and says what to give for what is open.
        self.inputs = shapes.settle((TensorInfo(found.input_name, "float32", found.input_shape),), given)
        self.outputs = (TensorInfo(found.output_name, "float32", found.output_shape),)
        self.steps = tuple(Timed(each.name, _step(each, double)) for each in found.operations)

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """What is timed: nothing in it but the inference."""
        feed = feeds[self.graph.input_name]
        name, wanted = self.graph.input_name, self.graph.output_value
        steps = [(step.name, step.compute) for step in self.steps]

        def infer() -> object:
            values = {name: feed}
            for made, compute in steps:
                values[made] = compute(values)
            return values[wanted]

        return infer

    def fetch(self, returned: object) -> Tensors:
        """A copy: what was returned may be overwritten, or be the input itself."""
        import numpy as np

        return {self.graph.output_name: np.array(returned, copy=True)}

    def placement(self) -> Placement:
        """Where each operation runs, and how that is known."""
        return placement.known(
            [
                OpPlacement(index=at, type=operation.type, name=operation.name, unit=Unit.CPU)
                for at, operation in enumerate(self.graph.operations)
            ],
            evidence=Evidence.PARTITION,
            detail="every operation is a call of NumPy, which computes on the CPU",
        )

    def close(self) -> None:
        """Nothing outlives it."""


def _step(operation: graph.Operation, double: bool) -> Step:
    import numpy as np

    first = operation.of[0]
    if operation.type == "relu":
        zero = np.float32(0)
        return lambda values: np.maximum(values[first], zero)
    if operation.type == "add":
        second = operation.of[1]
        return lambda values: values[first] + values[second]
    weights, bias = operation.weights, operation.bias
    assert weights is not None and bias is not None
    if not double:
        return lambda values: values[first] @ weights + bias
    wide, wide_bias = weights.astype(np.float64), bias.astype(np.float64)
    return lambda values: (values[first].astype(np.float64) @ wide + wide_bias).astype(np.float32)
