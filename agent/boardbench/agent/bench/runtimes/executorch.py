"""ExecuTorch: a program (``.pte``) whose operations were delegated when it was exported, or were not.

The file itself says which: its plan is a chain of calls of delegates and of portable kernels, and the runtime
runs it as it stands. Time comes from ETDump, which the runtime writes where it was built with it (that of the
Python package is), read by executorch.devtools. Schema: pytorch/executorch, schema/program.fbs.

A device is a delegate: ``cpu`` runs the program whatever it holds; asked for by its name (``xnnpack``),
what is not in that delegate counts as fallen back.
"""

from __future__ import annotations

import functools
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from boardbench.agent.bench import placement, stats
from boardbench.agent.bench import shapes as sizes
from boardbench.agent.bench.options import OptionReader
from boardbench.agent.bench.runtime import (
    THREADS,
    Cause,
    InputsRejected,
    ModelRejected,
    NoProfile,
    OptionRejected,
    Profile,
    ProfileRequest,
    RuntimeUnavailable,
)
from boardbench.agent.domain import Evidence, OpPlacement, Placement, TensorInfo
from boardbench.inspect import executorch as reader_of_pte
from boardbench.inspect.content import Opened
from boardbench.inspect.errors import InspectError, Unreadable
from boardbench.inspect.ledger import Ledger
from boardbench.inspect.report import ModelReport
from boardbench.inspect.sniff import check

if TYPE_CHECKING:
    from boardbench.agent.bench.runtime import Tensors

METHOD = "ETDump, the runtime's own times of every call"
MAIN = "forward"
MOST_THREADS = 1024

_SUFFIX = "Backend"
_MOST_INNER = 6
# runtime/core/error.h
_ERRORS: Mapping[int, str] = {
    0x01: "internal error",
    0x02: "invalid state",
    0x10: "not supported",
    0x11: "not implemented",
    0x12: "invalid argument",
    0x13: "invalid type",
    0x14: "an operator is missing",
    0x20: "not found",
    0x21: "memory can't be allocated",
    0x22: "access failed",
    0x23: "invalid program",
    0x24: "invalid external data",
    0x25: "out of resources",
    0x30: "the delegate is not compatible with this version",
    0x31: "memory of the delegate can't be allocated",
    0x32: "invalid delegate",
}


class ExecuTorchRuntime:
    """The engine."""

    name = "executorch"
    formats: Tuple[str, ...] = ("executorch",)
    settings: Tuple[str, ...] = (THREADS,)
    options: Mapping[str, str] = {
        "verification": "internal (default) or minimal: how much of the file is checked",
        "method": "the method of the program that runs (default forward)",
        "data_path": "a .ptd file on the board, with data that the program keeps apart",
    }
    sys_root = Path("/")

    def __init__(self) -> None:
        """Imports nothing yet."""
        self._runtime: Any = None
        self._verification: Any = None
        self._native: Any = None
        self._version = ""

    def version(self) -> str:
        """Imports the engine."""
        if self._runtime is None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    from executorch.extension.pybindings import portable_lib
                    from executorch.runtime import Runtime, Verification
                    from executorch.version import __version__
                found = Runtime.get()
            except Exception as error:  # a broken installation raises anything
                from boardbench.agent.bench import wheels

                raise RuntimeUnavailable(
                    f"no ExecuTorch in {sys.executable} ({type(error).__name__}: {error}): "
                    f"{wheels.how(self.name, wheels.EXECUTORCH)}"
                ) from error
            self._verification, self._native = Verification, portable_lib
            self._version = f"executorch {str(__version__).partition('+')[0]}"
            self._runtime = found
        return self._version

    def devices(self) -> Tuple[str, ...]:
        """The CPU, then the delegates that this build has."""
        self.version()
        return ("cpu", *(_device(name) for name in self._backends()))

    def _backends(self) -> List[str]:
        return sorted(str(name) for name in self._runtime.backend_registry.registered_backend_names)

    def load(
        self,
        model: Path,
        *,
        device: str,
        threads: Optional[int],
        options: Mapping[str, str],
        shapes: Mapping[str, Tuple[int, ...]],
        allow_fallback: bool = False,
    ) -> ExecuTorchModel:
        """Loads a method of the program, whose delegates are set up then."""
        return self._load(
            model,
            device=device,
            threads=threads,
            options=options,
            shapes=shapes,
            allow_fallback=allow_fallback,
            dump=False,
        )

    def load_with_dump(self, request: ProfileRequest) -> ExecuTorchModel:
        """The same with ETDump, for a profile."""
        return self._load(
            request.model_path,
            device=request.device,
            threads=request.threads,
            options=request.options,
            shapes=request.shapes,
            allow_fallback=request.allow_fallback,
            dump=True,
        )

    def _load(
        self,
        model: Path,
        *,
        device: str,
        threads: Optional[int],
        options: Mapping[str, str],
        shapes: Mapping[str, Tuple[int, ...]],
        allow_fallback: bool,
        dump: bool,
    ) -> ExecuTorchModel:
        self.version()
        reader = OptionReader(self.name, options)
        verification = reader.choice("verification", ("internal", "minimal"), default="internal")
        method = reader.text("method", "the name of a method of the program (default forward)") or MAIN
        data = reader.text("data_path", "a .ptd file on the board, with data that the program keeps apart")
        in_force = {**reader.finish(), "method": method}
        backends = self._backends()
        wanted = next((name for name in backends if _device(name) == device), "")
        known = wanted or next((name for name in reader_of_pte.DELEGATES if _device(name) == device), "")
        if device != "cpu" and not wanted and not (known and allow_fallback):
            raise OptionRejected(
                f"{self.name} has no device {device!r}; it has {', '.join(self.devices())} (delegates of "
                "this build; another build of ExecuTorch may have more)"
            )
        if threads is not None:
            self._set_threads(threads)
        try:
            program = self._runtime.load_program(
                model.resolve(),
                verification=self._verification.InternalConsistency
                if verification == "internal"
                else self._verification.Minimal,
                **({"data_path": data} if data else {}),
                **({"enable_etdump": True} if dump else {}),
            )
            names = sorted(program.method_names)
        except MemoryError:
            raise
        except Exception as error:
            raise _rejected(model, error) from error
        if method not in names:
            raise (OptionRejected if "method" in options else ModelRejected)(
                f"{model.name} has no method {method!r}; it has {', '.join(names)} (--option method=NAME)"
            )
        report = _report(model, method)
        try:
            loaded = program.load_method(method)
        except MemoryError:
            raise
        except Exception as error:
            raise self._lacking(model, report, backends) or _rejected(model, error) from error
        fault = _fault(model, device, known, bool(wanted), report, allow_fallback)
        return ExecuTorchModel(
            model,
            program,
            loaded,
            report,
            wanted=known,
            fault=fault,
            threads=threads,
            options=in_force,
            given=shapes,
        )

    def _set_threads(self, threads: int) -> None:
        try:
            self._native._unsafe_reset_threadpool(threads)
        except (AttributeError, RuntimeError) as error:
            raise OptionRejected(
                f"this build of ExecuTorch can't be told a number of threads ({error}): leave --threads out"
            ) from error

    def _lacking(
        self, model: Path, report: Optional[ModelReport], backends: Sequence[str]
    ) -> Optional[ModelRejected]:
        """Which delegates or kernels of the program are not here: the engine tells it by a number."""
        if report is None:
            return None
        absent = sorted({op.delegate for op in report.ops if op.delegate} - set(backends))
        if absent:
            return ModelRejected(
                f"{model.name} was exported for {', '.join(absent)}, which this build of ExecuTorch lacks; "
                f"it has {', '.join(backends) or 'no delegate'}: export it for one of these, or for none"
            )
        kernels = set(self._runtime.operator_registry.operator_names)
        missing = sorted({op.type for op in report.ops if not op.delegate} - kernels)
        if missing:
            return ModelRejected(
                f"{model.name} calls operators that this build of ExecuTorch has no kernels for: "
                f"{', '.join(missing[:10])}"
            )
        return None


class ExecuTorchModel:
    """A method of a program, set up."""

    watch = None
    profiles = True

    def __init__(
        self,
        model: Path,
        program: Any,
        method: Any,
        report: Optional[ModelReport],
        *,
        wanted: str,
        fault: str,
        threads: Optional[int],
        options: Mapping[str, str],
        given: Mapping[str, Tuple[int, ...]],
    ) -> None:
        """Settles open inputs; the file says which are open, and the engine how large they may be."""
        self.program = program
        self._method = method
        self._report = report
        self.wanted = wanted
        self.device_fallback = f"all runs on the CPU: {fault}" if fault else ""
        self.threads = threads
        self.options = options
        about = method.metadata
        self.inputs = _settled(model, about, report, given)
        self.outputs = _outputs(about, report)

    def bind(self, feeds: Tensors) -> Callable[[], object]:
        """``Method.execute`` itself with tensors that share the memory of ``feeds``."""
        import torch

        tensors = [torch.from_numpy(feeds[tensor.name]) for tensor in self.inputs]
        return functools.partial(self._method.execute, tensors)

    def fetch(self, returned: object) -> Tensors:
        """Copies of the tensors that it returned."""
        import numpy as np

        found: Dict[str, Any] = {}
        for at, tensor in enumerate(returned if isinstance(returned, (list, tuple)) else ()):
            if hasattr(tensor, "numpy"):
                wide = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
                found[f"output{at}"] = np.array(wide.detach().numpy(), copy=True)
        return found

    def placement(self) -> Placement:
        """Call by call of the program's plan: delegates, and portable kernels of the CPU."""
        if self._report is None or not self._report.ops:
            return placement.unknown(
                f"the plan of the method {self.options['method']} can't be read from the file"
            )
        ops = [
            OpPlacement(index=op.index, type=op.type, name=op.name, unit=op.unit, delegate=op.delegate)
            for op in self._report.ops
        ]
        delegated = Counter(op.delegate for op in ops if op.delegate)
        portable = Counter(op.type for op in ops if not op.delegate)
        parts = [
            f"{number} {'call' if number == 1 else 'calls'} of {name}"
            for name, number in delegated.most_common()
        ]
        if portable:
            parts.append(f"{sum(portable.values())} on portable kernels ({placement.listed(portable)})")
        return placement.known(
            ops,
            evidence=Evidence.PARTITION,
            detail=f"the program as it was exported: {', '.join(parts)}; the file does not say what is "
            "inside a delegate"
            if delegated
            else f"the program as it was exported: nothing was delegated, {', '.join(parts)}",
            wanted=self.wanted,
        )

    def close(self) -> None:
        """Frees the method and the program. Idempotent."""
        self._method = self.program = None


def profile(
    runtime: ExecuTorchRuntime, request: ProfileRequest, runs: Callable[[], Iterable[int]]
) -> Profile:
    """Profiles the program by ETDump. Raises NoProfile, and what ``load`` raises."""
    request.begin(METHOD)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from executorch.devtools import Inspector
    except Exception as error:
        raise NoProfile(f"executorch.devtools can't be imported: {error}") from error
    model = runtime.load_with_dump(request)
    placed = model.placement()
    if not placed.ops:
        raise NoProfile(f"it is not known what runs where: {placed.detail}")
    call = model.bind(request.feeds(model.inputs))
    call()  # the first one allocates; its entry is left out below
    whole: List[float] = []
    for _ in runs():
        began = time.perf_counter()
        call()
        whole.append(time.perf_counter() - began)
    if not whole:
        raise NoProfile("not one inference was profiled")
    with tempfile.TemporaryDirectory(prefix="boardbench-etdump-") as folder:
        dump = Path(folder) / "dump.etdp"
        try:
            model.program.write_etdump_result_to_file(str(dump), str(Path(folder) / "debug.bin"))
        except RuntimeError as error:
            raise NoProfile(f"no ETDump was written: {_said(error)}") from error
        if not dump.is_file() or not dump.stat().st_size:
            raise NoProfile("this build of ExecuTorch has no ETDump (EXECUTORCH_ENABLE_EVENT_TRACER)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            blocks = Inspector(etdump_path=str(dump)).event_blocks
    calls, inner = _calls(blocks, len(whole) + 1)
    if len(calls) != len(placed.ops):
        raise NoProfile(
            f"ETDump has {len(calls)} calls, and the program {len(placed.ops)}: it is not one chain of calls"
        )
    by_op = [calls[instruction][1:] for instruction in sorted(calls)]
    away = [op.index for op in placed.ops if model.wanted and placement.is_away(op, model.wanted)]
    return Profile(
        method=METHOD,
        detail=_told(placed.ops, by_op, inner, len(whole)),
        units=tuple(op.unit for op in placed.ops),
        whole_seconds=tuple(whole),
        fallback_seconds=tuple(sum(by_op[index][run] for index in away) for run in range(len(whole)))
        if model.wanted
        else (),
        op_seconds={index: stats.midmean(times) for index, times in enumerate(by_op)},
        causes={
            index: Cause(
                f"{model.wanted} did not take it when the program was exported",
                remedy="export it with a partitioner that takes it, or without this operation",
            )
            for index in away
        },
    )


_Times = List[float]


def _calls(blocks: Iterable[Any], number: int) -> Tuple[Dict[int, _Times], Dict[Tuple[int, str], _Times]]:
    """Seconds of each call by its place in the chain, and of what ran inside delegates, every time."""
    calls: Dict[int, _Times] = {}
    inner: Dict[Tuple[int, str], _Times] = {}
    for block in blocks:
        for event in block.events:
            times = [float(each) / 1e3 for each in event.perf_data.raw] if event.perf_data else []
            # What runs before the method is executed has one time, and an operation in a loop more.
            if len(times) != number:
                continue
            if event.is_delegated_op:
                inner[event._instruction_id, str(event.name)] = times
            elif event.name in ("DELEGATE_CALL", "OPERATOR_CALL"):
                calls[event._instruction_id] = times
    return calls, inner


def _told(
    ops: Sequence[OpPlacement],
    by_op: Sequence[_Times],
    inner: Mapping[Tuple[int, str], _Times],
    number: int,
) -> str:
    """The shares of delegates and portable kernels, and what takes longest inside a delegate."""
    total = sum(map(sum, by_op)) or 1.0
    shares: Dict[str, float] = {}
    for op, times in zip(ops, by_op):
        where = op.delegate or "portable kernels"
        shares[where] = shares.get(where, 0.0) + sum(times) / total
    split = ", ".join(
        f"{share:.0%} in {name}" for name, share in sorted(shares.items(), key=lambda each: -each[1])
    )
    kinds: Dict[str, float] = {}
    for (_, name), times in inner.items():
        kind = re.sub(r" #\d+$", "", name)
        kinds[kind] = kinds.get(kind, 0.0) + stats.midmean(times[1:])
    longest = sorted(kinds.items(), key=lambda each: -each[1])[:_MOST_INNER]
    inside = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in longest)
    return f"{number} inferences, {METHOD}: {split}" + (f"; inside delegates {inside}" if inside else "")


def _device(backend: str) -> str:
    """``xnnpack`` of ``XnnpackBackend``."""
    return (backend[: -len(_SUFFIX)] if backend.endswith(_SUFFIX) else backend).lower()


def _fault(
    model: Path,
    device: str,
    delegate: str,
    here: bool,
    report: Optional[ModelReport],
    allow_fallback: bool,
) -> str:
    """Why the delegate that was asked for takes no part; empty where it does, or none was asked for."""
    if device == "cpu":
        return ""
    if not here:
        return f"this build of ExecuTorch has no {delegate}"
    if report is None or any(op.delegate == delegate for op in report.ops):
        return ""
    fault = f"the program was exported without {delegate}"
    if not allow_fallback:
        raise ModelRejected(
            f"{model.name} on {device}: {fault}; export it with that delegate's partitioner, or, to "
            "measure it as it is, run it on cpu (or --allow-fallback)"
        )
    return fault


def _report(model: Path, method: str) -> Optional[ModelReport]:
    """What the file says about the method; None where it can't be read, or is about another one."""
    try:
        with Opened(model, mapped=True) as data:
            found = reader_of_pte.report(ModelReport("", "", len(data), "executorch"), data, Ledger())
    except InspectError:
        return None
    several = any(warning.code == "more_methods" for warning in found.warnings)
    return None if several and method != MAIN else found


def _settled(
    model: Path, about: Any, report: Optional[ModelReport], given: Mapping[str, Tuple[int, ...]]
) -> Tuple[TensorInfo, ...]:
    """The inputs with every size, within the bounds that the program was exported with."""
    told = [_tensor(about.input_tensor_meta, at, f"input{at}") for at in range(about.num_inputs())]
    bounds = [tensor for tensor in told if tensor is not None]
    if len(bounds) != len(told):
        at = told.index(None)
        raise InputsRejected(
            f"input {at} of {model.name} is no tensor, so no data can be made for it: export it with tensors "
            "for inputs"
        )
    declared = [
        TensorInfo(bound.name, bound.dtype, tuple(-1 for _ in bound.shape))
        if report is not None and len(report.inputs) == len(bounds) and -1 in report.inputs[at].shape
        else bound
        for at, bound in enumerate(bounds)
    ]
    most = sizes.describe(bounds)
    try:
        settled = sizes.settle(declared, given)
    except InputsRejected as error:
        if all(tensor is bound for tensor, bound in zip(declared, bounds)):
            raise
        raise InputsRejected(f"{error} ({model.name} was exported for at most {most})") from error
    for tensor, bound in zip(settled, bounds):
        if any(size > limit for size, limit in zip(tensor.shape, bound.shape)):
            raise InputsRejected(
                f"{tensor.name} is too large with {list(tensor.shape)}: {model.name} was exported for at "
                f"most {most}"
            )
    return settled


def _outputs(about: Any, report: Optional[ModelReport]) -> Tuple[TensorInfo, ...]:
    told = [_tensor(about.output_tensor_meta, at, f"output{at}") for at in range(about.num_outputs())]
    found = [tensor for tensor in told if tensor is not None]
    if report is None or len(report.outputs) != len(found):
        return tuple(found)
    return tuple(
        TensorInfo(tensor.name, tensor.dtype, tuple(-1 for _ in tensor.shape)) if -1 in mine.shape else tensor
        for tensor, mine in zip(found, report.outputs)
    )


def _tensor(meta: Callable[[int], Any], at: int, name: str) -> Optional[TensorInfo]:
    try:
        found = meta(at)
    except RuntimeError:  # a number, or a list
        return None
    kind = int(found.dtype())
    dtype = reader_of_pte.SCALARS.get(kind, f"scalar{kind}")
    if dtype == "bfloat16" and name.startswith("output"):
        dtype = "float32"  # as it is fetched: NumPy has no such type
    return TensorInfo(name=name, dtype=dtype, shape=tuple(int(size) for size in found.sizes()))


def _said(error: Exception) -> str:
    said = " ".join(str(error).split())[:500]
    number = re.search(r"0x:?([0-9a-fA-F]{1,2})\b", said)
    meaning = _ERRORS.get(int(number.group(1), 16)) if number else None
    return f"{said}, {meaning}" if meaning else said


def _rejected(model: Path, error: Exception) -> ModelRejected:
    try:
        todo = check(model, "executorch")
    except Unreadable as unreadable:
        return ModelRejected(f"{model.name} can't be read: {unreadable}")
    todo = todo or "it was exported for another version of ExecuTorch, or for hardware that is not here"
    return ModelRejected(f"ExecuTorch refuses {model.name}: {todo} (it said: {_said(error)})")
