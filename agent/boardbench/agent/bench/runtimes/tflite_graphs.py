"""The graph of a TensorFlow Lite model that runs: its main one, or the one that a signature names.

A signature gives a graph and names for the tensors that go in and out. Most models have one, of the main
graph; one with several has a graph for each. The wrapper underneath the interpreter takes the number of a
graph where the interpreter itself has only the main one in mind (`SignatureRunner`,
tensorflow/lite/python/interpreter.py).
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from boardbench.agent.bench.runtime import OptionRejected

MAIN = 0

Named = List[Tuple[str, Mapping[str, Any]]]
"""Names of tensors with what the interpreter tells of each."""


class Graph:
    """The main graph, by the names of its tensors."""

    number = MAIN

    def __init__(self, interpreter: Any) -> None:
        """Of an interpreter, whose tensors need not be allocated yet."""
        self._interpreter = interpreter

    def inputs(self) -> Named:
        """What goes in, in its order."""
        return _by_own_names(self._interpreter.get_input_details(), "input")

    def outputs(self) -> Named:
        """What comes out, in its order."""
        return _by_own_names(self._interpreter.get_output_details(), "output")

    def resize(self, tensor: int, shape: Sequence[int]) -> None:
        """Settles the size of an input."""
        self._interpreter.resize_tensor_input(tensor, list(shape), strict=True)

    def allocate(self) -> None:
        """Allocates the tensors; default delegates take their part."""
        self._interpreter.allocate_tensors()

    def write(self, tensor: int, array: Any) -> None:
        """Fills an input."""
        self._interpreter.set_tensor(tensor, array)

    def read(self, tensor: int) -> Any:
        """A copy of a tensor."""
        return self._interpreter.get_tensor(tensor)

    def call(self) -> Callable[[], object]:
        """What runs one inference."""
        found: Callable[[], object] = self._interpreter.invoke
        return found


class Signature(Graph):
    """The graph of a signature, by the names that the signature gives to its tensors."""

    def __init__(self, interpreter: Any, key: str) -> None:
        """Raises OptionRejected, with those that there are, when there is none of this name."""
        super().__init__(interpreter)
        signatures: Mapping[str, Any] = self._wrapper.GetSignatureDefs() or {}
        if key not in signatures:
            named = ", ".join(sorted(signatures))
            raise OptionRejected(
                f"the model has no signature {key!r}; "
                + (f"it has {named}" if named else "it has none: leave the option out")
            )
        self._names: Mapping[str, Dict[str, int]] = signatures[key]
        self.number = int(self._wrapper.GetSubgraphIndexFromSignature(key))

    @property
    def _wrapper(self) -> Any:
        # Not kept: the interpreter refuses to allocate while anybody else holds it.
        return self._interpreter._interpreter

    def inputs(self) -> Named:
        """What goes in, in the order of the names."""
        return self._details("inputs")

    def outputs(self) -> Named:
        """What comes out, in the order of the names."""
        return self._details("outputs")

    def _details(self, side: str) -> Named:
        tell = self._interpreter._get_tensor_details
        names = self._names[side]
        return [(name, tell(names[name], self.number)) for name in sorted(names)]

    def resize(self, tensor: int, shape: Sequence[int]) -> None:
        """Settles the size of an input."""
        import numpy as np

        self._wrapper.ResizeInputTensor(tensor, np.array(shape, np.int32), True, self.number)

    def allocate(self) -> None:
        """Allocates the tensors of the main graph, with which default delegates come, and of this one."""
        super().allocate()
        if self.number != MAIN:
            self._wrapper.AllocateTensors(self.number)

    def write(self, tensor: int, array: Any) -> None:
        """Fills an input."""
        self._wrapper.SetTensor(tensor, array, self.number)

    def read(self, tensor: int) -> Any:
        """A copy of a tensor."""
        return self._wrapper.GetTensor(tensor, self.number)

    def call(self) -> Callable[[], object]:
        """What runs one inference."""
        return super().call() if self.number == MAIN else functools.partial(self._wrapper.Invoke, self.number)


def graph_of(interpreter: Any, signature: Optional[str]) -> Graph:
    """The graph of the signature, or the main one. Raises OptionRejected."""
    return Graph(interpreter) if signature is None else Signature(interpreter, signature)


def unique(names: Sequence[str], kind: str) -> List[str]:
    """The names, with ``input_N`` for an empty one and the position added to one that came before."""
    found: List[str] = []
    for position, name in enumerate(names):
        candidate = name or f"{kind}_{position}"
        while candidate in found:
            candidate = f"{candidate}_{position}"
        found.append(candidate)
    return found


def _by_own_names(details: Sequence[Mapping[str, Any]], kind: str) -> Named:
    return list(zip(unique([str(detail["name"]) for detail in details], kind), details))
