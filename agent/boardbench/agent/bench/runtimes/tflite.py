"""TensorFlow Lite, by ai-edge-litert or the older tflite-runtime, whichever this Python has.

Devices: ``cpu``; ``edgetpu`` where libedgetpu can be loaded (see :mod:`.edgetpu`). Any other delegate
by ``delegate=PATH``; options of a delegate, libedgetpu included, by ``delegate.KEY=VALUE``. The main graph
runs, or that of ``signature=NAME``.

Placement. ``Interpreter._get_ops_details()`` and the wrapper underneath list every original node of
the first subgraph and, after them, one node called DELEGATE for each part that a delegate took,
under the same name for XNNPACK and for an Edge TPU. Which originals a DELEGATE stands for follows
from the tensors: walking back from its outputs to its inputs meets exactly those. Which delegate
it was follows from when the node appeared: an external delegate is applied while the interpreter is
created, XNNPACK only when tensors are allocated (`Interpreter::ApplyLazyDelegateProviders`,
tensorflow/lite/core/interpreter.cc). What an Edge TPU's library took runs on the Edge TPU.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from boardbench.agent.bench import placement, shapes
from boardbench.agent.bench.options import OptionReader
from boardbench.agent.bench.runtime import (
    THREADS,
    AcceleratorWatch,
    InputsRejected,
    ModelRejected,
    OptionRejected,
    RuntimeUnavailable,
)
from boardbench.agent.bench.runtimes import edgetpu, tflite_arena, tflite_causes, tflite_cut, tflite_graphs
from boardbench.agent.bench.runtimes.tflite_parts import (
    DELEGATE_NODE,
    Node,
    closure,
    crossings_of,
    nodes_of,
    originals_of,
    taken_apart,
)
from boardbench.agent.domain import Evidence, OpPlacement, Placement, Quantization, TensorInfo, Unit

if TYPE_CHECKING:
    from boardbench.agent.bench.runtime import Tensors

PACKAGES = (("ai_edge_litert", "ai-edge-litert"), ("tflite_runtime", "tflite-runtime"))
"""Module and distribution, the preferred first."""

CONTROL_FLOW = ("CALL", "CALL_ONCE", "IF", "WHILE")
_REFUSALS = (ModelRejected, InputsRejected, RuntimeUnavailable)
XNNPACK = "TfLiteXNNPackDelegate"
"""What the delegate calls itself (tensorflow/lite/delegates/xnnpack/xnnpack_delegate.cc)."""


class TfliteRuntime:
    """The engine."""

    name = "tflite"
    formats: Tuple[str, ...] = ("tflite",)
    settings: Tuple[str, ...] = (THREADS,)
    options: Mapping[str, str] = {
        "xnnpack": "on (default) or off: whether XNNPACK takes what it can",
        "delegate": "path of a delegate library on the board",
        "delegate.": "an option of the delegate, libedgetpu included, as delegate.device=usb:0",
        "signature": "the signature of the model that runs; the main graph otherwise",
    }
    sys_root = Path("/")

    def __init__(self) -> None:
        """Imports nothing yet."""
        self._module: Any = None
        self._version = ""

    def version(self) -> str:
        """Imports the first of the packages that works."""
        if self._module is None:
            self._module, self._version = _import()
        return self._version

    def devices(self) -> Tuple[str, ...]:
        """cpu, and edgetpu where its library can be loaded; no look is taken at what is plugged in."""
        self.version()
        return ("cpu", "edgetpu") if edgetpu.loads(edgetpu.library_name()) else ("cpu",)

    def load(
        self,
        model: Path,
        *,
        device: str,
        threads: Optional[int],
        options: Mapping[str, str],
        shapes: Mapping[str, Tuple[int, ...]],
        allow_fallback: bool = False,
    ) -> TfliteModel:
        """Creates the interpreter, resizes what is open, allocates."""
        self.version()
        if device not in ("cpu", "edgetpu"):
            raise OptionRejected(
                f"tflite has no device {device!r}; it has cpu and edgetpu, and any other by the option "
                "delegate=PATH"
            )
        reader = OptionReader(self.name, options)
        xnnpack = reader.switch("xnnpack", default=True)
        library = reader.text("delegate", "path of a delegate library")
        delegate_options = reader.prefixed("delegate.", "an option of the delegate")
        signature = reader.text("signature", "a signature of the model")
        in_force = reader.finish()
        if device == "edgetpu" and library is None:
            library = edgetpu.library_name()
        if delegate_options and library is None:
            raise OptionRejected(
                "delegate.KEY options belong to a delegate: give delegate=PATH or the device edgetpu too"
            )
        external, device_fallback = None, ""
        if library is not None:
            try:
                external = External.load(
                    self._module, library, delegate_options, wanted=device, sys_root=self.sys_root
                )
            except RuntimeUnavailable as error:
                if not allow_fallback:
                    raise
                device_fallback = f"all runs on the CPU: {error}"
        return TfliteModel(
            self._module,
            model,
            external=external,
            wanted="" if library is None else Path(library).name,
            device_fallback=device_fallback,
            xnnpack=xnnpack,
            threads=threads,
            options=in_force,
            given=shapes,
            signature=signature,
        )


@dataclass(frozen=True)
class External:
    """A delegate that was loaded from a library."""

    handle: Any
    library: str
    options: Mapping[str, str]
    unit: Unit
    standin: bool
    sys_root: Path

    @classmethod
    def load(
        cls, module: Any, library: str, options: Mapping[str, str], *, wanted: str, sys_root: Path
    ) -> External:
        """Loads it. Raises RuntimeUnavailable, OptionRejected."""
        drives_tpus, standin = edgetpu.is_driver(library), bool(edgetpu.standin(library))
        if wanted == "edgetpu" and not drives_tpus:
            raise OptionRejected(
                f"{library} drives no Edge TPU: leave the device out to run with it as a delegate"
            )
        if drives_tpus and not standin:
            edgetpu.check_options(options)
        return cls(
            handle=edgetpu.load_delegate(module, library, options, sys_root=sys_root),
            library=library,
            options=options,
            unit=Unit.TPU if drives_tpus else Unit.DELEGATE,
            standin=standin,
            sys_root=sys_root,
        )


@dataclass(frozen=True)
class Maker:
    """Makes interpreters that are set up as the one of a model was."""

    module: Any
    external: Optional[External]
    xnnpack: bool
    threads: Optional[int]

    def interpreter(self, model: Path, external: Optional[External], **more: object) -> Any:
        """An interpreter for a file, with a delegate that no other interpreter has."""
        types = self.module.OpResolverType
        return self.module.Interpreter(
            model_path=str(model),
            experimental_delegates=None if external is None else [external.handle],
            num_threads=self.threads,
            experimental_op_resolver_type=(
                types.AUTO if self.xnnpack else types.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            ),
            **more,
        )

    def another(self) -> External:
        """The delegate once more. Raises RuntimeUnavailable."""
        assert self.external is not None
        handle = edgetpu.load_delegate(
            self.module, self.external.library, self.external.options, sys_root=self.external.sys_root
        )
        return replace(self.external, handle=handle)


def _import() -> Tuple[Any, str]:
    """The interpreter module and "package version". Raises RuntimeUnavailable with every reason."""
    reasons = []
    for module, package in PACKAGES:
        try:
            found = importlib.import_module(f"{module}.interpreter")
        except Exception as error:  # a broken installation raises anything
            reasons.append(f"{package}: {type(error).__name__}: {error}")
            continue
        return found, f"{package} {_package_version(module, package)}"
    from boardbench.agent.bench import wheels

    raise RuntimeUnavailable(
        f"no TensorFlow Lite in {sys.executable} ({'; '.join(reasons)}): "
        f"{wheels.how('tflite', wheels.AI_EDGE_LITERT, wheels.TFLITE_RUNTIME)}"
    )


def _package_version(module: str, package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:  # built from source, or vendored by a distribution
        return str(getattr(importlib.import_module(module), "__version__", "of unknown version"))


class TfliteModel:
    """A model in an interpreter."""

    def __init__(
        self,
        module: Any,
        model: Path,
        *,
        external: Optional[External],
        wanted: str,
        device_fallback: str,
        xnnpack: bool,
        threads: Optional[int],
        options: Mapping[str, str],
        given: Mapping[str, Tuple[int, ...]],
        signature: Optional[str] = None,
    ) -> None:
        """Creates, resizes, allocates."""
        self._model = model
        self._external = external
        self.wanted = wanted
        self.device_fallback = device_fallback
        self._watch: Optional[edgetpu.EdgeTpuWatch] = None
        self.options = options
        self.threads = 1 if threads is None else threads  # the interpreter's own default
        # Without the handle, so that the delegate ends when the model is closed.
        kind = None if external is None else replace(external, handle=None)
        self.maker = Maker(module, kind, xnnpack=xnnpack, threads=threads)
        try:
            self._interpreter: Any = self.maker.interpreter(model, external)
            self._nodes_before_default_delegates = _node_count(self._interpreter)
            self._took_nothing = external is not None and not _has_delegate(self._interpreter)
            self._graph = tflite_graphs.graph_of(self._interpreter, signature)
            # Of another graph than the main one the interpreter tells too little.
            self.profiles = self._graph.number == tflite_graphs.MAIN
            declared = self._graph.inputs()
            self.inputs = shapes.settle([_tensor(detail, name) for name, detail in declared], given)
            for (_, detail), tensor in zip(declared, self.inputs):
                if tuple(int(size) for size in detail["shape"]) != tensor.shape:
                    self._graph.resize(detail["index"], tensor.shape)
                    # Delegates are undone by this and done again later: the count says nothing any more.
                    self._nodes_before_default_delegates = None
            if not xnnpack:
                self._nodes_before_default_delegates = sys.maxsize  # there are no default ones
            self._graph.allocate()
        except MemoryError:
            raise
        except (InputsRejected, OptionRejected):
            raise
        except Exception as error:  # ValueError and RuntimeError by the interpreter, others by the package
            raise _rejected(model, error, delegated=external is not None) from error
        outputs = self._graph.outputs()
        self.outputs = tuple(_tensor(detail, name) for name, detail in outputs)
        self._input_indices = {name: int(detail["index"]) for name, detail in declared}
        self._output_indices = {name: int(detail["index"]) for name, detail in outputs}
        self._own_names = {name: str(detail["name"]) for name, detail in declared}

    @property
    def input_indices(self) -> Mapping[str, int]:
        """Tensor of every input by its name."""
        return self._input_indices

    @property
    def output_indices(self) -> Mapping[str, int]:
        """Tensor of every output by its name."""
        return self._output_indices

    def nodes(self) -> List[Node]:
        """The nodes after delegation; raises AttributeError where the interpreter does not tell."""
        return nodes_of(self._interpreter)

    @property
    def watch(self) -> Optional[AcceleratorWatch]:
        """Of the Edge TPU, where the model was loaded for one."""
        external = self._external
        if self._watch is None and external is not None and external.unit is Unit.TPU:
            self._watch = edgetpu.EdgeTpuWatch(
                edgetpu.describe(external.library),
                external.options,
                self._model,
                took_nothing=self._took_nothing,
                sys_root=external.sys_root,
            )
        return self._watch

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """``Interpreter.invoke`` itself: inputs stay in the interpreter from one call to the next."""
        for name, index in self._input_indices.items():
            self._graph.write(index, feeds[name])
        return self._graph.call()

    def fetch(self, returned: object) -> Tensors:  # noqa: ARG002 - invoke returns nothing
        """The output tensors, copied out of the interpreter."""
        return {name: self._graph.read(index) for name, index in self._output_indices.items()}

    def placement(self) -> Placement:
        """Per original node, by the closure of each DELEGATE node."""
        if self._graph.number != tflite_graphs.MAIN:
            return self._placement_elsewhere()
        try:
            nodes = self.nodes()
        except AttributeError as error:
            return placement.unknown(
                f"this interpreter does not tell its nodes ({error}), so it is not known what its "
                "delegates took"
            )
        found = _place(
            nodes,
            outputs=set(self._output_indices.values()),
            external_before=self._nodes_before_default_delegates,
            external=self._external,
            other_subgraphs=_other_subgraphs(self._interpreter),
            tensor_name=self._tensor_name,
            apart=self._taken_apart,
        )
        if not self.wanted:
            return found
        ends = {"inputs": self._input_indices.values(), "outputs": self._output_indices.values()}
        found = replace(found, crossings=crossings_of(self._interpreter, found.ops, self.wanted, **ends))
        if self._external is not None and self._external.unit is Unit.TPU:
            found = tflite_causes.with_causes(found, self._model, self.wanted)
        return found

    def _taken_apart(self) -> Optional[Set[int]]:
        """Nodes that XNNPACK takes in an interpreter that keeps delegated nodes apart; None without such."""
        try:
            other = self.maker.interpreter(self._model, None, experimental_disable_delegate_node_fusion=True)
            for tensor in self.inputs:
                other.resize_tensor_input(self._input_indices[tensor.name], list(tensor.shape))
            other.allocate_tensors()
            return taken_apart(nodes_of(other))
        except MemoryError:
            raise
        except Exception:  # tflite-runtime has no such; and whatever an interpreter raises
            return None

    def _placement_elsewhere(self) -> Placement:
        """Of a graph that is not the main one: as it is where that graph is put first.

        The interpreter lists nodes of the main graph only; delegates divide every graph by the same rule.
        """
        number = self._graph.number
        with tempfile.TemporaryDirectory(prefix="boardbench-graph-") as folder:
            path = Path(folder) / self._model.name
            try:
                path.write_bytes(tflite_cut.led_by(self._model.read_bytes(), number))
                twin = TfliteModel(
                    self.maker.module,
                    path,
                    external=None if self._external is None else self.maker.another(),
                    wanted=self.wanted,
                    device_fallback=self.device_fallback,
                    xnnpack=self.maker.xnnpack,
                    threads=self.maker.threads,
                    options={},
                    given={self._own_names[tensor.name]: tensor.shape for tensor in self.inputs},
                )
            except (tflite_cut.CanNotCut, *_REFUSALS, OSError) as error:
                return placement.unknown(
                    f"the signature's graph is number {number}, and of that this interpreter does not tell "
                    f"where it runs; it can't be put first: {error}"
                )
            try:
                found = twin.placement()
            finally:
                twin.close()
        return replace(
            found,
            detail=f"{found.detail} (graph {number}, as a second interpreter has it that runs it first)",
        )

    def _tensor_name(self, index: int) -> str:
        return str(self._interpreter._interpreter.TensorName(index, 0))

    def arena_bytes(self) -> Optional[int]:
        """What the tensors take that are not in the file; only the main graph's can be told."""
        if self._graph.number != tflite_graphs.MAIN:
            return None
        return tflite_arena.used_bytes(self._interpreter, self._model)

    def close(self) -> None:
        """Drops the interpreter, and the delegate with it."""
        self._interpreter = None
        self._external = None
        self.__dict__.pop("_graph", None)


def _tensor(detail: Mapping[str, Any], name: str) -> TensorInfo:
    import numpy as np

    dtype = np.dtype(detail["dtype"])
    declared = [int(size) for size in detail.get("shape_signature", ())]
    shape = [int(size) for size in detail["shape"]]
    parameters = detail.get("quantization_parameters", {})
    scales, zero_points = parameters.get("scales", ()), parameters.get("zero_points", ())
    quantization = None
    if len(scales) == 1 and len(zero_points) == 1 and scales[0] != 0:
        quantization = Quantization(scale=float(scales[0]), zero_point=int(zero_points[0]))
    return TensorInfo(
        name=name,
        dtype="str" if dtype.kind in "OSU" else dtype.name,
        shape=tuple(declared if len(declared) == len(shape) else shape),
        quantization=quantization,
    )


_UNRESOLVED = re.compile(r"unresolved custom op: ([^\s]+?)\.?(?:\s|$)")
_NO_BUILTIN = re.compile(r"builtin opcode '?([A-Z0-9_]+)'?(?: version '?(\d+)'?)?")
_FLEX = re.compile(r"Select TensorFlow op|Flex")


def _rejected(model: Path, error: Exception, *, delegated: bool) -> ModelRejected:
    """The interpreter's refusal with what to do about it."""
    said = " ".join(str(error).split())
    unresolved, builtin = _UNRESOLVED.search(said), _NO_BUILTIN.search(said)
    of_the_tpu = edgetpu.explain(said) if delegated else None
    if of_the_tpu:
        todo = of_the_tpu
    elif unresolved and unresolved.group(1) == edgetpu.CUSTOM_OP and not delegated:
        todo = (
            f"operation {edgetpu.CUSTOM_OP}: the model is compiled for the Edge TPU. Run it with "
            "--device edgetpu on a board that has one, or run the model as it was before edgetpu_compiler"
        )
    elif _FLEX.search(said):
        todo = "the model uses TensorFlow operations: convert it with builtin operations only"
    elif unresolved:
        todo = (
            f"custom operation {unresolved.group(1)} is not in this engine: convert the model without it, "
            "or load a delegate that has it with the option delegate=PATH"
        )
    elif builtin:
        version = f" version {builtin.group(2)}" if builtin.group(2) else ""
        named = f"{builtin.group(1)}{version}"
        todo = f"operation {named} is not in this engine: update it, or convert for an older one"
    else:
        todo = "is the file whole, and is it a TensorFlow Lite model?"
    return ModelRejected(f"tflite refuses {model.name}: {todo} (it said: {said[:500]})")


def _node_count(interpreter: Any) -> Optional[int]:
    try:
        return int(interpreter._interpreter.NumNodes())
    except AttributeError:
        return None


def _has_delegate(interpreter: Any) -> bool:
    """Whether a delegate has taken anything so far; True where the interpreter does not tell."""
    try:
        return any(node.name == DELEGATE_NODE for node in nodes_of(interpreter))
    except AttributeError:
        return True


def _other_subgraphs(interpreter: Any) -> Optional[int]:
    """Number of subgraphs beside the first; None where the interpreter does not tell."""
    try:
        return int(interpreter._interpreter.NumSubgraphs()) - 1
    except AttributeError:  # tflite-runtime
        return None


def _place(
    nodes: Sequence[Node],
    *,
    outputs: Set[int],
    external_before: Optional[int],
    external: Optional[External],
    other_subgraphs: Optional[int],
    tensor_name: Callable[[int], str],
    apart: Callable[[], Optional[Set[int]]] = lambda: None,
) -> Placement:
    """The placement that the nodes amount to; see the head of this file.

    ``apart`` tells what XNNPACK takes node by node; it is asked where the tensors don't tell.

    DELEGATE nodes before position ``external_before`` belong to ``external``; None: not known which.
    """
    library = "" if external is None else Path(external.library).name
    standin = external is not None and external.standin
    originals = originals_of(nodes)
    delegates = {at: node for at, node in enumerate(nodes) if node.name == DELEGATE_NODE}
    producer = {tensor: at for at, node in originals.items() for tensor in node.outputs}
    unit_of: Dict[int, Tuple[Unit, str]] = {}
    for at, delegate in delegates.items():
        taken = closure(delegate, originals, producer)
        if not taken or not taken.isdisjoint(unit_of):
            return placement.unknown(
                f"the tensors of delegate node {at} do not tell which operations it took, so where they run "
                "is not known"
            )
        if external is not None and external_before is None:
            return placement.unknown(
                f"an input was resized, so it can't be told which operations {library} took and which "
                "XNNPACK took: give the option xnnpack=off to know"
            )
        if external is None or at >= (external_before or 0):
            unit = (Unit.CPU_DELEGATE, XNNPACK)
        else:
            unit = (external.unit, library)
        unit_of.update(dict.fromkeys(taken, unit))
    # Nothing asks for the result of a dead end, so no closure reaches it: a delegate may have taken it.
    unreached = _dead_ends(originals, producer, outputs) - set(unit_of) if delegates else set()
    taken_by_one = apart() if unreached and external is None else None
    # Believed where it says the same about all the others.
    if taken_by_one is not None and taken_by_one - unreached == set(unit_of):
        # Assignments to variables, and what is for them. Of a result that nobody uses it is not known whether
        # it is computed at all.
        settled = unreached - _without_effect(originals, producer, outputs)
        unit_of.update(dict.fromkeys(settled & taken_by_one, (Unit.CPU_DELEGATE, XNNPACK)))
        unreached -= settled
    ops = [
        OpPlacement(
            index=position,
            type=originals[at].name,
            name=tensor_name(originals[at].outputs[0]) if originals[at].outputs else "",
            unit=Unit.UNSPECIFIED if at in unreached else unit_of.get(at, (Unit.CPU, ""))[0],
            delegate=unit_of.get(at, (Unit.CPU, ""))[1],
        )
        for position, at in enumerate(originals)
    ]
    detail = _detail(ops, len(delegates), other_subgraphs)
    return placement.known(ops, evidence=Evidence.PARTITION, detail=detail, standin=standin, wanted=library)


def _dead_ends(originals: Mapping[int, Node], producer: Mapping[int, int], outputs: Set[int]) -> Set[int]:
    """Original nodes from which no path leads to an output of the model."""
    everything = Node(name="", inputs=(), outputs=tuple(outputs))
    return set(originals) - closure(everything, originals, producer)


def _without_effect(
    originals: Mapping[int, Node], producer: Mapping[int, int], outputs: Set[int]
) -> Set[int]:
    """Of the dead ends those from which no path leads to an operation without results, as an assignment."""
    ends = {at for at, node in originals.items() if not node.outputs}
    read = {tensor for at in ends for tensor in originals[at].inputs}
    return _dead_ends(originals, producer, outputs | read) - ends


def _detail(ops: Sequence[OpPlacement], delegate_nodes: int, other_subgraphs: Optional[int]) -> str:
    parts = []
    for delegate in sorted({op.delegate for op in ops if op.delegate}):
        taken = sum(op.delegate == delegate for op in ops)
        parts.append(f"{taken} of {len(ops)} operations run in {delegate}")
    plain = Counter(op.type for op in ops if op.unit is Unit.CPU)
    if plain:
        parts.append(f"{sum(plain.values())} in plain kernels on the CPU ({placement.listed(plain)})")
    unsettled = Counter(op.type for op in ops if op.unit is Unit.UNSPECIFIED)
    if unsettled:
        named = placement.listed(unsettled)
        parts.append(f"{sum(unsettled.values())} unknown, as nothing uses their results ({named})")
    detail = "; ".join(parts) or "the model has no operation"
    if delegate_nodes > 1:
        detail += f"; the delegates' operations are in {delegate_nodes} parts"
    if other_subgraphs is None:
        if any(op.type in CONTROL_FLOW for op in ops):
            detail += "; the bodies of control flow are not listed"
    elif other_subgraphs > 0:
        which = "bodies of control flow, other signatures"
        detail += f"; {other_subgraphs} further subgraphs ({which}) are not listed"
    return detail
