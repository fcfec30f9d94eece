"""PyTorch: ``.ptl`` by the lite interpreter of PyTorch Mobile, ``.pt`` TorchScript by the full one.

Both run on the CPU and nowhere else here, so the placement is known: operations are those of the program,
told from the graph (TorchScript) or from the bytecode in the archive (lite interpreter).

What a program says in code may reach files: such is refused before it is loaded, see :mod:`.torch_code`.

A program does not say the shapes of its inputs. Where it has bundled inputs (torch.utils.bundled_inputs) the
first of them is taken as the example, else shapes are given. Operators' time comes from torch.profiler.
Formats: pytorch/pytorch, torch/csrc/jit/docs/serialization.md and torch/csrc/jit/mobile/import.cpp.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from boardbench.agent.bench import placement, stats
from boardbench.agent.bench import shapes as sizes
from boardbench.agent.bench.options import NATIVE_MODELS, OptionReader
from boardbench.agent.bench.runtime import (
    THREADS,
    InputsRejected,
    ModelRejected,
    NoProfile,
    OptionRejected,
    Profile,
    ProfileRequest,
    RuntimeUnavailable,
)
from boardbench.agent.bench.runtimes import torch_code
from boardbench.agent.domain import Evidence, OpPlacement, Placement, TensorInfo, Unit
from boardbench.inspect import torch_mobile
from boardbench.inspect.archive import is_archive, read_archive, read_entry
from boardbench.inspect.budget import Budget
from boardbench.inspect.content import Opened
from boardbench.inspect.errors import InspectError, Unreadable
from boardbench.inspect.ledger import Ledger
from boardbench.inspect.pickles import Call, Global, read_pickle
from boardbench.inspect.report import ModelReport
from boardbench.inspect.sniff import check

if TYPE_CHECKING:
    from boardbench.agent.bench.runtime import Tensors

INPUT_TYPES = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64",
)  # fmt: skip
OPTIMISATIONS = ("off", "freeze", "inference")
METHOD = "torch.profiler's times of every operator"
MOST_THREADS = 1024

# The executor of TorchScript looks at the first inferences and then rewrites the graph.
_SETTLING_RUNS = 3
_MARK = "boardbench inference"
_LARGEST_BYTECODE_BYTES = 64 << 20
_MOBILE_FLATBUFFER = b"PTMF"
_BUNDLED = "get_all_bundled_inputs"
_EXECUTED = ("OP", "OPN")
# Of the nodes in a graph that are no operators, those that optimisations put in the place of some.
_COMPUTING = ("prim::mkldnn_convolution", "prim::BroadcastMKLDNNTensors", "prim::TensorExprGroup")
_MOST_KINDS = 6
_SCALARS: Mapping[str, Callable[[str], object]] = {"int": int, "float": float, "str": str}
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Argument:
    """An argument of the model's ``forward``, with the type as TorchScript writes it."""

    name: str
    type: str
    optional: bool = False
    """Whether it has a value when none is given."""
    default: object = None

    @property
    def is_tensor(self) -> bool:
        """Whether it takes one tensor."""
        return self.type in ("Tensor", "Optional[Tensor]", "Tensor?")


@dataclass(frozen=True)
class Program:
    """What the bytecode of the lite interpreter says about ``forward``."""

    arguments: Tuple[Argument, ...]
    operators: Tuple[str, ...]


class TorchRuntime:
    """The engine."""

    name = "torch"
    formats: Tuple[str, ...] = ("torchscript",)
    settings: Tuple[str, ...] = (THREADS,)
    options: Mapping[str, str] = {
        "interpreter": "auto (default), lite or full: which of PyTorch's interpreters runs the file",
        "optimize": "off (default), freeze or inference: what TorchScript is rewritten by first",
        "input_type": "the type of all inputs, where the file does not tell",
        "input_type.": "the type of one input, as input_type.x=int64",
        "argument.": "the value of an argument that is no tensor",
        "inter_op_threads": "threads for operations side by side",
    }
    sys_root = Path("/")

    def __init__(self) -> None:
        """Imports nothing yet."""
        self._torch: Any = None

    def version(self) -> str:
        """Imports the engine."""
        if self._torch is None:
            try:
                # The profiler's library writes a line for every inference otherwise.
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    import torch
            except Exception as error:  # a broken installation raises anything
                from boardbench.agent.bench import wheels

                raise RuntimeUnavailable(
                    f"no PyTorch in {sys.executable} ({type(error).__name__}: {error}): "
                    f"{wheels.how(self.name, wheels.TORCH)}"
                ) from error
            self._torch = torch
        return f"torch {str(self._torch.__version__).partition('+')[0]}"

    def devices(self) -> Tuple[str, ...]:
        """The CPU: files of the lite interpreter run nowhere else."""
        self.version()
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
    ) -> TorchModel:
        """Loads the program and settles its inputs."""
        self.version()
        reader = OptionReader(self.name, options)
        interpreter = reader.choice("interpreter", ("auto", "lite", "full"), default="auto")
        optimise = reader.choice("optimize", OPTIMISATIONS, default="off")
        input_type = reader.choice("input_type", ("auto", *INPUT_TYPES), default="auto")
        input_types = reader.prefixed("input_type.", "the type of that input")
        values = reader.prefixed("argument.", "the value of that argument, which is no tensor")
        across = reader.number("inter_op_threads", least=1, most=MOST_THREADS)
        in_force = reader.finish()
        if device != "cpu":
            raise OptionRejected(f"{self.name} has no device {device!r}; it has cpu")
        for name, dtype in input_types.items():
            if dtype not in INPUT_TYPES:
                raise OptionRejected(f"input_type.{name} is {' or '.join(INPUT_TYPES)}, not {dtype!r}")
        if threads is not None:
            self._torch.set_num_threads(threads)
        self._set_threads_across(across)
        return TorchModel(
            self._torch,
            model,
            interpreter=interpreter,
            optimise=optimise,
            threads=threads,
            options=in_force,
            wishes=_Wishes(shapes, input_type, input_types, values),
        )

    def _set_threads_across(self, number: Optional[int]) -> None:
        if number is None or number == self._torch.get_num_interop_threads():
            return
        try:
            self._torch.set_num_interop_threads(number)
        except RuntimeError as error:
            raise OptionRejected(
                f"inter_op_threads={number} can't be set any more: {_said(error)}"
            ) from error


@dataclass(frozen=True)
class _Wishes:
    """What was given about inputs."""

    shapes: Mapping[str, Tuple[int, ...]]
    input_type: str
    input_types: Mapping[str, str]
    values: Mapping[str, str]


class TorchModel:
    """A program that is loaded, with inputs settled."""

    watch = None
    wanted = ""
    device_fallback = ""
    profiles = True

    def __init__(
        self,
        torch: Any,
        model: Path,
        *,
        interpreter: str,
        optimise: str,
        threads: Optional[int],
        options: Mapping[str, str],
        wishes: _Wishes,
    ) -> None:
        """Loads it by the interpreter that was asked for, or the one that the file is for."""
        self._torch = torch
        self._model = model
        self.options = options
        self.threads = threads
        kind, self._program = _read(model)
        self.lite = interpreter == "lite" or (interpreter == "auto" and kind != "full")
        if self.lite and optimise != "off":
            raise OptionRejected(
                f"optimize={optimise} is for TorchScript in the full interpreter, not for {model.name} in "
                "the lite one: give interpreter=full as well, or leave it out"
            )
        if os.environ.get(NATIVE_MODELS) != "1":
            _refuse_files(model, lite=self.lite)
        self._module = self._load(optimise)
        bundled = self._bundled()
        self._arguments = self._told_arguments(bundled, wishes.shapes)
        self.inputs, self._others = _settled(model, self._arguments, bundled, wishes)
        self._outputs: Optional[Tuple[TensorInfo, ...]] = None

    def _load(self, optimise: str) -> Any:
        torch = self._torch
        path = str(self._model.resolve())
        try:
            with warnings.catch_warnings():
                # Both are deprecated for other formats; whoever runs this has one of these files.
                warnings.simplefilter("ignore")
                if self.lite:
                    from torch.jit.mobile import _load_for_lite_interpreter

                    return _load_for_lite_interpreter(path)
                module = torch.jit.load(path, map_location="cpu")
                module.eval()
                if optimise == "freeze":
                    return torch.jit.freeze(module)
                if optimise == "inference":
                    return torch.jit.optimize_for_inference(module)
                return module
        except MemoryError:
            raise
        except Exception as error:
            raise _rejected(self._model, error, lite=self.lite) from error

    def _bundled(self) -> Tuple[object, ...]:
        """The arguments of the first bundled input; none where the program has no such."""
        try:
            if self.lite:
                found = self._module.run_method(_BUNDLED) if self._module.find_method(_BUNDLED) else []
            else:
                method = getattr(self._module, _BUNDLED, None)
                found = method() if method is not None else []
        except MemoryError:
            raise
        except Exception as error:
            raise ModelRejected(f"{self._model.name}: its bundled inputs fail: {_said(error)}") from error
        return tuple(found[0]) if found else ()

    def _told_arguments(
        self, bundled: Tuple[object, ...], given: Mapping[str, Tuple[int, ...]]
    ) -> Tuple[Argument, ...]:
        """The arguments of forward; by their number alone where the file does not name them."""
        if not self.lite:
            return tuple(
                Argument(
                    str(each.name),
                    str(each.type),
                    bool(each.has_default_value()),
                    each.default_value if each.has_default_value() else None,
                )
                for each in self._module.forward.schema.arguments[1:]
            )
        if self._program is not None and len(bundled) in (0, len(self._program.arguments)):
            return self._program.arguments
        if bundled:
            kinds = ["Tensor" if self._is_tensor(each) else type(each).__name__ for each in bundled]
            return tuple(Argument(f"input{at}", kind) for at, kind in enumerate(kinds))
        # A file that names nothing: as many as are given, in their order.
        number = sum(name != sizes.EVERY for name in given)
        return tuple(Argument(f"input{at}", "Tensor") for at in range(max(1, number)))

    def _is_tensor(self, value: object) -> bool:
        return isinstance(value, self._torch.Tensor)

    @property
    def outputs(self) -> Tuple[TensorInfo, ...]:
        """As the latest inference gave them: a program does not declare its outputs."""
        if self._outputs is None:
            import numpy as np

            zeros = {tensor.name: np.zeros(tensor.shape, tensor.dtype) for tensor in self.inputs}
            self.fetch(self.bind(zeros)())
        return self._outputs or ()

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """The interpreter's own ``forward`` with tensors that share the memory of ``feeds``."""
        # For this thread, which is the one that runs it: gradients would be computed otherwise.
        self._torch.set_grad_enabled(False)
        tensors = {name: self._torch.from_numpy(array) for name, array in feeds.items()}
        arguments = tuple(
            tensors[each.name] if each.name in tensors else self._others[each.name]
            for each in self._arguments
        )
        if self.lite:
            # The method of the wrapper does just this, one Python call later.
            return functools.partial(self._module._c.forward, arguments)
        return functools.partial(self._module.forward, *arguments)

    def fetch(self, returned: object) -> Tensors:
        """Copies of every tensor in what it returned, named by where it stands there."""
        import numpy as np

        found = {name: np.array(_array(tensor), copy=True) for name, tensor in self._flat(returned, "")}
        self._outputs = tuple(
            TensorInfo(name=name, dtype=array.dtype.name, shape=tuple(array.shape))
            for name, array in found.items()
        )
        return found

    def _flat(self, value: Any, path: str) -> Iterable[Tuple[str, Any]]:
        """``output0``, or ``output0.1`` and ``output0.key`` in tuples, lists and dictionaries."""
        if self._is_tensor(value):
            yield (f"output{path}" if path else "output0"), value
        elif isinstance(value, dict):
            for key, each in value.items():
                yield from self._flat(each, f"{path}.{key}" if path else str(key))
        elif isinstance(value, (list, tuple)):
            for at, each in enumerate(value):
                yield from self._flat(each, f"{path}.{at}" if path else str(at))

    def placement(self) -> Placement:
        """All on the CPU, operation by operation of the program."""
        names = self.operators()
        how = "the lite interpreter" if self.lite else "TorchScript"
        if names:
            counts = placement.listed(Counter(name.partition(".")[0] for name in names))
            detail = f"{len(names)} operations of the program ({counts}), all on the CPU: {how} runs there"
        else:
            names = ["program"]
            detail = f"the whole program is on the CPU: {how} runs there; the file lists no operations"
        ops = [OpPlacement(index=at, type=name, unit=Unit.CPU) for at, name in enumerate(names)]
        return placement.known(ops, evidence=Evidence.PARTITION, detail=detail)

    def operators(self) -> List[str]:
        """Operations of the program that make tensors, each as often as it is written."""
        if not self.lite:
            graph = getattr(self._module, "inlined_graph", None) or self._module.graph
            return list(_operators(graph))
        if self._program is None:
            return []
        return [name for name in self._program.operators if self._makes_tensors(name)]

    def _makes_tensors(self, name: str) -> bool:
        base, _, overload = name.partition(".")
        try:
            schemas = self._torch._C._jit_get_schemas_for_operator(base)
        except (AttributeError, RuntimeError):
            return True
        mine = [each for each in schemas if each.overload_name == overload] or schemas
        return not mine or any("Tensor" in str(value.type) for each in mine for value in each.returns)

    def close(self) -> None:
        """Lets go of the program. Idempotent."""
        self._module = None


def profile(runtime: TorchRuntime, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    """Profiles the model by torch.profiler. Raises NoProfile, and what ``load`` raises."""
    request.begin(METHOD)
    model = request.load(runtime)
    from torch import profiler

    call = model.bind(request.feeds(model.inputs))
    for _ in range(_SETTLING_RUNS):
        call()
    ops = model.placement().ops
    whole: List[float] = []
    times: Dict[int, List[float]] = {}
    kinds: Dict[str, float] = {}
    for _ in runs():
        # A session for each: the events of many would need memory that a board does not have.
        with warnings.catch_warnings(), profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as seen:
            warnings.simplefilter("ignore")
            with profiler.record_function(_MARK):
                began = time.perf_counter()
                call()
                whole.append(time.perf_counter() - began)
        called = _called(seen.events())
        for index, seconds in _by_operation(ops, called).items():
            times.setdefault(index, []).append(seconds)
        for name, spans in called.items():
            kinds[name] = kinds.get(name, 0.0) + sum(seconds for _, seconds in spans)
    if not whole:
        raise NoProfile("not one inference was profiled")
    told = {index: stats.midmean(each) for index, each in times.items() if len(each) == len(whole)}
    longest = sorted(kinds.items(), key=lambda each: -each[1])[:_MOST_KINDS]
    inside = ", ".join(f"{name} {seconds / len(whole) * 1e3:.3f} ms" for name, seconds in longest)
    untold = "" if len(told) == len(ops) else " (the others run more or less often than they are written)"
    return Profile(
        method=METHOD,
        detail=f"{len(whole)} inferences, {METHOD}; {len(told)} of {len(ops)} operations have a time of "
        f"their own{untold}; mean of an inference: {inside}",
        units=tuple(op.unit for op in ops),
        whole_seconds=tuple(whole),
        op_seconds=told,
    )


def _called(events: Iterable[Any]) -> Dict[str, List[Tuple[float, float]]]:
    """Begin and seconds of every operator that the program called in one inference, by its name."""
    called: Dict[str, List[Tuple[float, float]]] = {}
    for event in events:
        if "::" in event.name and _is_outermost(event):
            span = event.time_range
            called.setdefault(event.name, []).append((span.start, span.elapsed_us() / 1e6))
    return called


def _by_operation(
    ops: Sequence[OpPlacement], called: Mapping[str, Sequence[Tuple[float, float]]]
) -> Dict[int, float]:
    """Seconds of the operations of one inference whose number of calls is that of the program."""
    written: Dict[str, List[int]] = {}
    for op in ops:
        written.setdefault(op.type.partition(".")[0], []).append(op.index)
    found: Dict[int, float] = {}
    for name, indices in written.items():
        spans = sorted(called.get(name, ()))
        if len(spans) == len(indices):
            found.update((index, seconds) for index, (_, seconds) in zip(indices, spans))
    return found


def _is_outermost(event: Any) -> bool:
    """Whether no other operator called it: between it and the mark are only methods of modules."""
    parent = event.cpu_parent
    while parent is not None and parent.name != _MARK:
        if "::" in parent.name:
            return False
        parent = parent.cpu_parent
    return parent is not None


def _settled(
    model: Path, arguments: Sequence[Argument], bundled: Tuple[object, ...], wishes: _Wishes
) -> Tuple[Tuple[TensorInfo, ...], Dict[str, object]]:
    """The inputs with every size, and the arguments that are no tensors."""
    examples = {argument.name: value for argument, value in zip(arguments, bundled)}
    tensors = [argument for argument in arguments if argument.is_tensor]
    given = _by_name(model, tensors, wishes.shapes, "shape")
    types = _by_name(model, tensors, wishes.input_types, "type")
    batch = wishes.shapes.get(sizes.EVERY)
    infos: List[TensorInfo] = []
    wanted: Dict[str, Tuple[int, ...]] = {}
    missing: List[Argument] = []
    others: Dict[str, object] = {}
    for argument in tensors:
        example: Any = examples.get(argument.name)
        shape = given.get(argument.name)
        if shape is None and example is not None:
            shape = tuple(int(size) for size in example.shape)
            if batch is not None and shape:
                shape = (batch[0], *shape[1:])
        if shape is None:
            if argument.optional:
                others[argument.name] = argument.default
            else:
                missing.append(argument)
            continue
        own = str(example.dtype).partition(".")[2] if example is not None else "float32"
        dtype = types.get(argument.name) or (own if wishes.input_type == "auto" else wishes.input_type)
        infos.append(TensorInfo(name=argument.name, dtype=dtype, shape=tuple(-1 for _ in shape)))
        wanted[argument.name] = shape
    if missing:
        raise InputsRejected(_what_to_give(model, tensors, missing))
    if batch is not None:
        wanted[sizes.EVERY] = batch
    settled = sizes.settle(infos, wanted)
    others.update(_values(model, arguments, examples, wishes.values))
    return settled, others


def _what_to_give(model: Path, tensors: Sequence[Argument], missing: Sequence[Argument]) -> str:
    named = ", ".join(argument.name for argument in tensors)
    options = " ".join(f"--shape '{argument.name}=1,3,224,224'" for argument in missing)
    lacking = ", ".join(argument.name for argument in missing)
    return (
        f"{model.name} does not say the shapes of its inputs ({named}), as no TorchScript does without "
        f"bundled inputs: give that of {lacking}, for example {options}, or data (--inputs FILE.npz); where "
        f"one is not float32, also --option input_type.{missing[0].name}=int64"
    )


def _by_name(model: Path, tensors: Sequence[Argument], given: Mapping[str, Any], what: str) -> Dict[str, Any]:
    """``given`` by the names of inputs; inputN and arr_N stand for the input at that position."""
    places: Dict[str, str] = {}
    for at, argument in enumerate(tensors):
        places.update({f"input{at}": argument.name, sizes.positional(at): argument.name})
    places.update((argument.name, argument.name) for argument in tensors)
    found: Dict[str, Any] = {}
    for name, value in given.items():
        if name == sizes.EVERY:
            continue
        target = places.get(name)
        if target is None:
            named = ", ".join(argument.name for argument in tensors) or "none"
            raise InputsRejected(f"{model.name} has no input {name!r}; its inputs are {named}")
        if target in found:
            raise InputsRejected(f"the {what} of input {target!r} is given twice, by name and by position")
        found[target] = value
    return found


def _values(
    model: Path, arguments: Sequence[Argument], examples: Mapping[str, object], given: Mapping[str, str]
) -> Dict[str, object]:
    """Values of the arguments that are no tensors."""
    found: Dict[str, object] = {}
    others = [argument for argument in arguments if not argument.is_tensor]
    unknown = set(given) - {argument.name for argument in others}
    if unknown:
        named = ", ".join(f"{each.name} ({each.type})" for each in others) or "none"
        raise OptionRejected(
            f"{model.name} has no argument {', '.join(sorted(unknown))} that is no tensor; it has {named}"
        )
    for argument in others:
        if argument.name in given:
            found[argument.name] = _value(argument, given[argument.name])
        elif argument.name in examples:
            found[argument.name] = examples[argument.name]
        elif argument.optional:
            found[argument.name] = argument.default
        elif argument.type.startswith("Optional[") or argument.type.endswith("?"):
            found[argument.name] = None
        elif argument.type in _SCALARS or argument.type == "bool":
            raise InputsRejected(
                f"{model.name} takes the {argument.type} {argument.name}, which no data can be made for: "
                f"give it, with --option argument.{argument.name}=VALUE"
            )
        else:
            raise InputsRejected(
                f"{model.name} takes {argument.name}, {argument.type}, which can't be given: export it with "
                "tensors and numbers for inputs, or with bundled inputs"
            )
    return found


def _value(argument: Argument, text: str) -> object:
    kind = argument.type
    for before, after in (("Optional[", "]"), ("", "?")):
        if kind.startswith(before) and kind.endswith(after):
            kind = kind[len(before) : len(kind) - len(after)]
    try:
        return _BOOLEANS[text.lower()] if kind == "bool" else _SCALARS[kind](text)
    except (KeyError, ValueError) as error:
        raise OptionRejected(
            f"argument.{argument.name} is a value of the type {argument.type} (true or false for bool), "
            f"not {text!r}"
        ) from error


def _read(model: Path) -> Tuple[str, Optional[Program]]:
    """Which interpreter the file is for, and what its bytecode says, where it can be read.

    Whatever is wrong with an archive the engine finds as well; it is asked afterwards.
    """
    try:
        with Opened(model, mapped=True) as data:
            head = bytes(data[:8])
            if head[4:8] == _MOBILE_FLATBUFFER:
                return "lite", _read_flat(data)
            if not is_archive(head):
                raise ModelRejected(
                    f"{model.name} is no TorchScript: neither an archive, as torch.jit.save and "
                    "_save_for_lite_interpreter write it, nor a FlatBuffer of the lite interpreter"
                )
            return _read_archive(data)
    except Unreadable as error:
        raise ModelRejected(f"{model.name} can't be read: {error}") from error


def _refuse_files(model: Path, *, lite: bool) -> None:
    """Raises ModelRejected for a program that reaches files, or for one in which that can't be seen."""
    with Opened(model, mapped=True) as data:
        if is_archive(bytes(data[:4])):
            try:
                fault = torch_code.fault_of_archive(data)
            except InspectError as error:
                raise ModelRejected(
                    f"{model.name} can't be looked through for operators that reach files, and is not run: "
                    f"{error}"
                ) from error
        else:
            fault = torch_code.fault_of_bytes(data)
            if not fault and not lite:
                fault = "may hold code that can't be looked through: leave interpreter=full out"
    if fault:
        raise ModelRejected(
            f"{model.name} is not run: {fault}. Such a program may do what the agent may; to run it all the "
            f"same, set {NATIVE_MODELS}=1 in the agent's environment"
        )


def _read_flat(data: memoryview) -> Optional[Program]:
    """What the FlatBuffer says: its tensors by name, and the operations of all of its methods."""
    try:
        found = torch_mobile.report(ModelReport("", "", len(data), "torchscript"), data, Ledger())
    except InspectError:
        return None
    return Program(
        tuple(Argument(tensor.name, "Tensor") for tensor in found.inputs), tuple(op.type for op in found.ops)
    )


def _read_archive(data: memoryview) -> Tuple[str, Optional[Program]]:
    kind = "full"
    try:
        budget = Budget(len(data))
        entries = {entry.name.partition("/")[2]: entry for entry in read_archive(data, budget).entries}
        if "bytecode.pkl" not in entries:
            return kind, None
        kind = "lite"
        bytecode, module = (
            read_pickle(read_entry(data, entries[name], _LARGEST_BYTECODE_BYTES, budget), budget).value
            if name in entries
            else None
            for name in ("bytecode.pkl", "data.pkl")
        )
    except InspectError:
        return kind, None
    root = module.callee if isinstance(module, Call) else None
    return kind, _program(bytecode, f"{root.path}.forward" if isinstance(root, Global) else "forward")


def _program(bytecode: Any, forward: str) -> Optional[Program]:
    """``forward`` in the bytecode; None where it is not of the structure that is known."""
    if not isinstance(bytecode, tuple):
        return None
    for function in bytecode:
        if not isinstance(function, tuple) or len(function) < 2 or function[0] != forward:
            continue
        try:
            code, schema = dict(function[1]), dict(function[2]) if len(function) > 2 else {}
            names = [f"{each[0]}.{each[1]}" if each[1] else str(each[0]) for each in code["operators"]]
            called = [names[each[1]] for each in code["instructions"] if each[0] in _EXECUTED]
            arguments = [_argument(dict(each)) for each in schema["arguments"][1:]]
        except (KeyError, ValueError, TypeError, IndexError):
            return None
        return Program(tuple(arguments), tuple(called))
    return None


def _argument(entry: Mapping[str, Any]) -> Argument:
    # Without a default value, None stands there; only what may be None can have that for a default.
    kind, default = str(entry["type"]), entry.get("default_value")
    return Argument(str(entry["name"]), kind, default is not None or kind.startswith("Optional["), default)


def _operators(block: Any) -> Iterable[str]:
    """Operations in a graph and the blocks in it that make tensors."""
    for node in block.nodes():
        kind = str(node.kind())
        computes = not kind.startswith("prim::") or kind in _COMPUTING
        if computes and any("Tensor" in str(each.type()) for each in node.outputs()):
            yield kind
        for inner in node.blocks():
            yield from _operators(inner)


def _array(tensor: Any) -> Any:
    """NumPy's view of a tensor; of types that NumPy lacks, as float32."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    return tensor.cpu().resolve_conj().resolve_neg().numpy()


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _rejected(model: Path, error: Exception, *, lite: bool) -> ModelRejected:
    said = _said(error)
    if "constants.pkl" in said and "locating file" in said:
        todo = (
            "it holds weights (torch.save) and no program: export it with torch.jit.trace or "
            "torch.jit.script and save that"
        )
    elif lite and "bytecode" in said and "locating file" in said:
        todo = (
            "it is not for the lite interpreter: save it with _save_for_lite_interpreter, or leave "
            "interpreter out"
        )
    elif "version" in said.lower():
        todo = "it is of another version than this PyTorch reads: export it anew, or install another torch"
    elif (
        "unknown builtin op" in said.lower() or "cannot be found" in said or "could not find" in said.lower()
    ):
        todo = "it uses operators that this PyTorch lacks: install the package that brings them"
    elif "central directory" in said:
        todo = "the archive is cut off or damaged: copy it again"
    else:
        todo = check(model, "torchscript") or "is the file whole?"
    return ModelRejected(f"PyTorch refuses {model.name}: {todo} (it said: {said})")
