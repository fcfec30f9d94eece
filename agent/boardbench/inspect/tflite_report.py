"""The report on a TensorFlow Lite file, compiled for the Edge TPU or not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Dict, List, NamedTuple, Optional, Set, Tuple

from boardbench.inspect.budget import Budget
from boardbench.inspect.cost import arena_bytes, multiply_accumulates
from boardbench.inspect.elements import BITS, count_zeros
from boardbench.inspect.errors import InspectError, Malformed
from boardbench.inspect.ledger import METADATA, OPTIONS, WEIGHTS, Ledger
from boardbench.inspect.report import (
    EDGETPU,
    ModelReport,
    OpPlacement,
    Placement,
    Quantization,
    ReportWarning,
    TensorInfo,
    Unit,
)
from boardbench.inspect.tflite import Model, Operator, Span, Tensor, count_types, op_name, read_model
from boardbench.inspect.tflite_schema import EDGETPU_OP

if TYPE_CHECKING:
    from boardbench.inspect import darwinn

UNUSED = "unused constants"
FILES = "associated files"

# That of libedgetpu 16.0 and later (api/runtime_version.h).
_NEWEST_RUNTIME = 14
_STEPS_PER_CONSTANT = 6
_ZIP = b"PK\x03\x04"


class Read(NamedTuple):
    """A file that was read: the model, what is compiled in it, and who uses which bytes."""

    model: Model
    packages: Tuple[Tuple[darwinn.Package, ...], ...]
    ledger: Ledger


def read(data: memoryview, budget: Budget) -> Read:
    """The model with its compiled parts; raises Malformed."""
    ledger = Ledger(budget)
    model = read_model(data, ledger)
    packages: List[Tuple[darwinn.Package, ...]] = []
    read_options: Dict[Span, Tuple[darwinn.Package, ...]] = {}
    for graph in model.subgraphs:
        for operator in graph.operators:
            span = operator.custom_options
            if operator.type != EDGETPU_OP:
                if span is not None:
                    ledger.claim(span[0], span[1], OPTIONS, "", operator.type)
                continue
            if span is None:
                raise Malformed(f"operation {operator.index}, an {EDGETPU_OP}, holds nothing: compile again")
            if span not in read_options:
                # What is for the Edge TPU is imported where it is needed, which it mostly is not.
                from boardbench.inspect import darwinn

                read_options[span] = darwinn.read_packages(data[span[0] : span[1]], ledger.at(span[0]))
            if graph.index == 0:
                packages.append(read_options[span])
    return Read(model, tuple(packages), ledger)


def report(
    base: ModelReport, data: memoryview, original: Optional[memoryview], target: str, budget: Budget
) -> ModelReport:
    """``base`` with everything filled in that the file tells.

    ``original`` is the file that was compiled. Raises Malformed for a broken file, InspectError where the
    request does not fit it.
    """
    found = read(data, budget)
    model = found.model
    graph = model.main
    parameters = _claim_constants(found)
    compiled = bool(found.packages)
    if original is not None and not compiled:
        raise InspectError(
            "the file was not compiled for the Edge TPU, so it has no original: give the compiled file "
            "(…_edgetpu.tflite) first, and the file it was made of with --original"
        )
    filled = replace(
        base,
        format_version=str(model.version),
        producer=model.description,
        inputs=tuple(_info(graph.tensors[index]) for index in graph.inputs),
        outputs=tuple(_info(graph.tensors[index]) for index in graph.outputs),
        op_count=len(graph.operators),
        op_types=count_types(graph.operators),
        parameter_count=None if compiled else parameters,
        multiply_accumulates=None if compiled else _multiply_accumulates(model),
        arena_estimate_bytes=arena_bytes(graph),
        bytes=found.ledger.uses(data),
        target=target or (EDGETPU if compiled else ""),
    )
    warnings = _warnings(found)
    if compiled:
        filled, more = _compiled(filled, found, original, budget)
        warnings += more
    elif target == EDGETPU:
        from boardbench.inspect import edgetpu

        placement = edgetpu.predict(model)
        filled = replace(filled, placement=placement, ops=placement.ops)
        warnings.append(
            ReportWarning(
                "not_compiled",
                "the file is not compiled for the Edge TPU: as it is, it runs wholly on the CPU there, "
                "without an error. Compile it with edgetpu_compiler; the placement here is a prediction of "
                "what that would do",
            )
        )
        if not _quantised(model):
            warnings.append(
                ReportWarning(
                    "not_quantised",
                    "no value that the model computes has 8 bits: edgetpu_compiler refuses it as an invalid "
                    "model. Convert it with full-integer post-training quantisation (representative_dataset, "
                    "supported_ops = [TFLITE_BUILTINS_INT8]) (#79)",
                )
            )
    else:
        ops = tuple(
            OpPlacement(operator.index, operator.type, op_name(graph, operator))
            for operator in graph.operators
        )
        filled = replace(filled, ops=ops, placement=_unknown())
    return replace(filled, warnings=tuple(warnings))


def _quantised(model: Model) -> bool:
    """Whether anything that is computed has the 8 bits that the Edge TPU computes in."""
    from boardbench.inspect.edgetpu_rules import EIGHT_BITS

    graph = model.main
    made = {index for operator in graph.operators for index in operator.outputs if index >= 0}
    return any(graph.tensors[index].dtype in EIGHT_BITS for index in made)


def _unknown() -> Placement:
    return Placement(
        detail="the file does not say where its operations run: ask for a target (edgetpu), or run it"
    )


def _compiled(
    base: ModelReport, found: Read, original: Optional[memoryview], budget: Budget
) -> Tuple[ModelReport, List[ReportWarning]]:
    from boardbench.inspect import edgetpu

    report_of = edgetpu.edgetpu_report(found.packages)
    warnings: List[ReportWarning] = []
    if original is None:
        placement = edgetpu.place_compiled(found.model)
        filled = replace(base, placement=placement, ops=placement.ops, edgetpu=report_of)
    else:
        source = read(original, budget)
        if source.packages:
            raise InspectError(
                "the original file is itself compiled for the Edge TPU; give the file that was handed to "
                "edgetpu_compiler"
            )
        placement, doubts = edgetpu.place_with_original(found.model, source.model)
        warnings.extend(doubts)
        filled = replace(
            base,
            placement=placement,
            ops=placement.ops,
            edgetpu=report_of,
            parameter_count=_claim_constants(source),
            multiply_accumulates=_multiply_accumulates(source.model),
        )
    streamed = report_of.parameters_streamed_bytes
    if streamed > 0:
        total = streamed + report_of.parameters_cached_bytes
        warnings.append(
            ReportWarning(
                "parameters_streamed",
                f"{streamed} of {total} bytes of parameters are not kept in the Edge TPU's memory and are "
                "sent at every inference: nothing falls back to the CPU, yet each inference waits for the "
                "bus. Use a smaller model, compile it alone (co-compiled models share the memory), or "
                "split it over several Edge TPUs",
            )
        )
    slow = sum(op.unit is Unit.CPU for op in placement.ops)
    if slow:
        warnings.append(
            ReportWarning(
                "cpu_fallback",
                f"{slow} operations were left to the CPU by the compiler"
                + (
                    "; the causes stand beside them"
                    if original is not None
                    else "; give --original to learn why"
                ),
            )
        )
    version = report_of.min_runtime_version
    if version is not None and version > _NEWEST_RUNTIME:
        warnings.append(
            ReportWarning(
                "runtime_too_new",
                f"the file needs Edge TPU runtime {version}; the newest public one is {_NEWEST_RUNTIME}: "
                f"compile it with edgetpu_compiler --min_runtime_version {_NEWEST_RUNTIME}",
            )
        )
    return filled, warnings


def _multiply_accumulates(model: Model) -> Optional[int]:
    return multiply_accumulates(model.main)


def _info(tensor: Tensor) -> TensorInfo:
    scale = tensor.whole_scale
    whole = Quantization(scale, tensor.zero_point) if scale else None
    return TensorInfo(tensor.name, tensor.dtype, tensor.shape if tensor.has_rank else (), whole)


def _claim_constants(found: Read) -> Optional[int]:
    """Number of parameters. Claims the bytes of every constant, for whoever reads it first."""
    model, ledger = found.model, found.ledger
    named = {index: name for name, index in model.metadata.items()}
    claimed: Set[int] = set()
    # Two entries may share their bytes, which still are counted once.
    spans: Set[Span] = set()
    total: Optional[int] = 0
    for graph in model.subgraphs:
        reader: Dict[int, Operator] = {}
        for operator in graph.operators:
            for index in operator.inputs:
                if index >= 0:
                    reader.setdefault(index, operator)
        for tensor in graph.tensors:
            if tensor.data is None or tensor.buffer in claimed:
                continue
            claimed.add(tensor.buffer)
            model.budget.spend(_STEPS_PER_CONSTANT, "the TensorFlow Lite model")
            if tensor.data in spans:
                continue
            spans.add(tensor.data)
            used_by = reader.get(tensor.index)
            count = _claim_tensor(found, tensor, used_by.type if used_by is not None else "")
            if BITS.get(tensor.dtype) is not None:
                total = None if total is None or count is None else total + count
    for index, span in enumerate(model.buffers):
        if span is None or index in claimed or span in spans:
            continue
        spans.add(span)
        ledger.claim(span[0], span[1], METADATA if index in named else UNUSED)
    _claim_files(model, ledger)
    return total


def _claim_tensor(found: Read, tensor: Tensor, op_type: str) -> Optional[int]:
    if tensor.data is None:
        return None
    start, stop = tensor.data
    bits = BITS.get(tensor.dtype)
    elements = zeros = None
    if bits is not None:
        elements = (stop - start) * 8 // bits
        if tensor.shape and not tensor.sparse:
            # The last byte of packed 4-bit values may be half empty.
            declared = 1
            for size in tensor.fixed_shape:
                declared *= max(0, size)
                if declared > elements:
                    break
            elements = min(elements, declared)
        found.model.budget.look(stop - start, "the TensorFlow Lite model")
        zero_point = _stored_zero(tensor) if bits == 8 else 0
        zeros = min(count_zeros(found.model.data[start:stop], tensor.dtype, zero_point) or 0, elements)
    found.ledger.claim(start, stop, WEIGHTS, tensor.dtype, op_type, elements, zeros)
    return elements


def _stored_zero(tensor: Tensor) -> int:
    """The stored value that stands for 0.0: the zero point, where all channels have the same."""
    where = tensor.quantised
    if where is None or where.zero_points[1] - where.zero_points[0] <= 8:
        return tensor.zero_point
    points = tensor.quantisation.zero_points if tensor.quantisation is not None else ()
    return points[0] if points and points.count(points[0]) == len(points) else 0


def _claim_files(model: Model, ledger: Ledger) -> None:
    """Files that TensorFlow Lite's metadata tools append as a ZIP archive behind the model."""
    data = model.data
    end = ledger.claimed_up_to()
    begin = end
    while begin < len(data) and begin < end + 64 and data[begin] == 0:
        begin += 1
    if bytes(data[begin : begin + 4]) == _ZIP:
        ledger.claim(begin, len(data), FILES)


def _warnings(found: Read) -> List[ReportWarning]:
    model = found.model
    warnings: List[ReportWarning] = []
    open_inputs = [
        model.main.tensors[index].name or f"#{index}"
        for index in model.main.inputs
        if min(model.main.tensors[index].shape or (0,)) < 0
    ]
    if open_inputs:
        warnings.append(
            ReportWarning(
                "open_shapes",
                f"inputs with open sizes: {', '.join(open_inputs[:8])}; name them with --shape when "
                "running, and fix them before compiling for an accelerator",
            )
        )
    if len(model.subgraphs) > 1:
        others = sum(len(graph.operators) for graph in model.subgraphs[1:])
        warnings.append(
            ReportWarning(
                "more_graphs",
                f"{others} more operations are in {len(model.subgraphs) - 1} graphs beside the main one; "
                "they are not counted, because the data decides how often they run",
            )
        )
    custom = sorted(
        {
            operator.type
            for graph in model.subgraphs
            for operator in graph.operators
            if operator.custom and operator.type != EDGETPU_OP
        }
    )
    if custom:
        warnings.append(
            ReportWarning(
                "custom_operations",
                f"operations that an interpreter may lack: {', '.join(custom[:8])}; it must be built with "
                "them",
            )
        )
    if model.external_files:
        warnings.append(
            ReportWarning(
                "external_data",
                f"constants lie in other files: {', '.join(model.external_files[:8])}; push them with the "
                "model",
            )
        )
    return warnings
