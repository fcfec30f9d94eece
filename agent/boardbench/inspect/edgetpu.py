"""Where the operations of a TensorFlow Lite model run on a board with an Edge TPU.

Three questions, three functions:

- a compiled file alone: which operations were left to the CPU (evidence: the file);
- a compiled file and its original: what became of every operation (evidence: both files), told twice, by
  names and by the graph, and compared;
- a file that was not compiled: what the compiler would do, by its documented rules (a prediction).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, FrozenSet, List, Optional, Sequence, Set, Tuple

from boardbench.inspect import darwinn
from boardbench.inspect.edgetpu_rules import (
    DYNAMIC,
    LIMITATION,
    ONE_SUBGRAPH,
    VERSION,
    Context,
    Reason,
    why_not,
)
from boardbench.inspect.errors import InspectError
from boardbench.inspect.report import (
    ACCELERATORS,
    EdgeTpuReport,
    Evidence,
    OpPlacement,
    Placement,
    ReportWarning,
    Unit,
    UnitCount,
    Verdict,
)
from boardbench.inspect.tflite import Model, Operator, Subgraph, closure, count_types, op_name, producers

# The size of what is told about a list of operations in one sentence.
_LISTED = 8
# To ask all rules about an operation.
_STEPS_PER_JUDGEMENT = 12


def compiled_nodes(model: Model) -> List[Operator]:
    """The compiled subgraphs in the model, as operations of its main graph."""
    return [operator for operator in model.main.operators if operator.type == darwinn.CUSTOM_OP]


def edgetpu_report(packages: Sequence[Sequence[darwinn.Package]]) -> EdgeTpuReport:
    """What the compiler left in a file: the packages of each node, in order."""
    # A node of several packages was compiled for several chips; one of them runs.
    first = [node[0] for node in packages]
    executables = [executable for package in first for executable in package.executables]
    versions = [package.min_runtime_version for package in first if package.min_runtime_version is not None]
    tokens = [executable.caching_token for executable in executables if executable.caching_token]
    return EdgeTpuReport(
        nodes=len(first),
        parameters_cached_bytes=sum(package.cached_bytes for package in first),
        parameters_streamed_bytes=sum(package.streamed_bytes for package in first),
        min_runtime_version=max(versions) if versions else None,
        scratch_bytes=sum(executable.scratch_bytes for executable in executables),
        parameter_caching_token=tokens[0] if tokens else None,
        compiler_version=next((p.compiler_version.strip() for p in first if p.compiler_version), ""),
        executables=len(executables),
        chip=next((executable.chip for executable in executables if executable.chip), ""),
    )


# ---- a compiled file alone -------------------------------------------------------------------------------


def place_compiled(model: Model) -> Placement:
    """Where the operations of a compiled file run, as far as it says: those inside a node are not in it.

    Those on the CPU are there as they were in the original, with all their tensors, so that the rules tell
    why they stayed.
    """
    graph = model.main
    cpu = [operator for operator in graph.operators if operator.type != darwinn.CUSTOM_OP]
    stayed = {operator.index for operator in cpu}
    compiled = {operator.index for operator in graph.operators} - stayed
    nodes = len(compiled)
    reasons = _explain(model, compiled, stayed)
    ops = tuple(
        _placed(
            graph, operator, Unit.CPU if operator.index in stayed else Unit.TPU, reasons.get(operator.index)
        )
        for operator in graph.operators
    )
    detail = f"{nodes} compiled Edge TPU subgraph{'s' if nodes != 1 else ''}"
    detail += (
        f"; {len(cpu)} operation{'s' if len(cpu) != 1 else ''} left to the CPU "
        f"({_types(count_types(cpu))}). What is inside the subgraph, only the original file can tell"
        if cpu
        else "; nothing is left to the CPU"
    )
    return Placement(
        evidence=Evidence.STATIC,
        accelerated_ops=None,
        cpu_ops=len(cpu),
        cpu_op_types=count_types(cpu),
        units=(UnitCount(Unit.CPU, len(cpu)),) if cpu else (),
        ops=ops,
        verdict=Verdict.PARTLY if cpu else Verdict.ACCELERATED,
        detail=detail,
    )


# ---- a compiled file and its original --------------------------------------------------------------------


@dataclass(frozen=True)
class Mapping:
    """What became of the original's operations, told in two ways."""

    cpu_by_name: FrozenSet[int]
    tpu_by_closure: FrozenSet[int]
    cpu_unmatched: Tuple[str, ...]

    def disagreements(self, count: int) -> Tuple[int, ...]:
        """Operations of which the two ways say different things."""
        return tuple(
            index for index in range(count) if (index in self.cpu_by_name) == (index in self.tpu_by_closure)
        )


def map_original(compiled: Model, original: Model) -> Mapping:
    """Which operations of the original stayed and which were compiled; raises InspectError for a stranger."""
    graph, source = compiled.main, original.main
    by_key: Dict[Tuple[str, Tuple[str, ...]], List[int]] = {}
    # Backwards, so that those taken from the end are in the order of the graph.
    for operator in reversed(source.operators):
        by_key.setdefault(_key(source, operator), []).append(operator.index)
    cpu: Set[int] = set()
    unmatched: List[str] = []
    for operator in graph.operators:
        if operator.type == darwinn.CUSTOM_OP:
            continue
        candidates = by_key.get(_key(graph, operator))
        if candidates:
            cpu.add(candidates.pop())
        else:
            unmatched.append(f"{operator.index} {operator.type}")
    tensor_of = {tensor.name: tensor.index for tensor in reversed(source.tensors) if tensor.name}
    mapped: Set[int] = set()
    known = 0
    made_by = producers(source)
    for operator in compiled_nodes(compiled):
        outputs = {tensor_of.get(graph.tensors[i].name, -1) for i in operator.outputs if i >= 0} - {-1}
        inputs = {tensor_of.get(graph.tensors[i].name, -1) for i in operator.inputs if i >= 0} - {-1}
        known += len(outputs)
        mapped |= closure(source, outputs, inputs, made_by, compiled.budget)
    if (compiled_nodes(compiled) and known == 0) or len(unmatched) == len(graph.operators):
        raise InspectError(
            "the original file is not the one that was compiled: none of the compiled file's tensors is in "
            "it; give the .tflite file that was handed to edgetpu_compiler"
        )
    return Mapping(frozenset(cpu), frozenset(mapped), tuple(unmatched))


def _key(graph: Subgraph, operator: Operator) -> Tuple[str, Tuple[str, ...]]:
    return operator.type, tuple(graph.tensors[i].name for i in operator.outputs if i >= 0)


def place_with_original(compiled: Model, original: Model) -> Tuple[Placement, Tuple[ReportWarning, ...]]:
    """Where every operation of the original runs, why those on the CPU are there, and doubts about it."""
    mapping = map_original(compiled, original)
    graph = original.main
    count = len(graph.operators)
    doubtful = set(mapping.disagreements(count))
    mapped = {index for index in range(count) if index in mapping.tpu_by_closure and index not in doubtful}
    stayed = {index for index in range(count) if index in mapping.cpu_by_name}
    reasons = _explain(original, mapped, stayed)
    ops = []
    for operator in graph.operators:
        index = operator.index
        unit = Unit.TPU if index in mapped else Unit.CPU if index in stayed else Unit.UNSPECIFIED
        ops.append(_placed(graph, operator, unit, reasons.get(index)))
    warnings: List[ReportWarning] = []
    if doubtful or mapping.cpu_unmatched:
        told = ", ".join(f"{index} {graph.operators[index].type}" for index in sorted(doubtful)[:_LISTED])
        warnings.append(
            ReportWarning(
                "estimates_disagree",
                f"what became of {len(doubtful)} operations can't be told for certain: the names of what is "
                "left and the graph around the compiled part say different things"
                + (f" ({told})" if told else "")
                + (
                    f"; not in the original: {', '.join(mapping.cpu_unmatched[:_LISTED])}"
                    if mapping.cpu_unmatched
                    else ""
                )
                + ". Check that the original is the file that was compiled",
            )
        )
    return _placement(ops, Evidence.STATIC, "compiled"), tuple(warnings)


# ---- a file that was not compiled ------------------------------------------------------------------------


def predict(model: Model) -> Placement:
    """What the compiler would map, by the rules; a prediction."""
    graph = model.main
    own = _own_reasons(model)
    if any(reason.whole_model for reason in own.values()):
        mapped: Set[int] = set()
    else:
        mapped = first_partition(graph, set(range(len(graph.operators))) - set(own))
    stayed = set(range(len(graph.operators))) - mapped
    reasons = _explain(model, mapped, stayed, own)
    ops = [
        _placed(
            graph, operator, Unit.TPU if operator.index in mapped else Unit.CPU, reasons.get(operator.index)
        )
        for operator in graph.operators
    ]
    return _placement(ops, Evidence.PREDICTION, "would be compiled")


def first_partition(graph: Subgraph, supported: Set[int]) -> Set[int]:
    """The operations of the first supported partition: the compiler makes one subgraph and no second.

    As TensorFlow Lite partitions a graph for a delegate (``graph_info.cc``): in turns, everything of one kind
    that is ready is taken, until nothing of that kind is.
    """
    made_by = producers(graph)
    needs = {
        operator.index: {
            made_by[tensor]
            for tensor in operator.inputs
            if tensor in made_by and made_by[tensor] != operator.index
        }
        for operator in graph.operators
    }
    waiting = {index: len(before) for index, before in needs.items()}
    after: Dict[int, List[int]] = {}
    for index, before in needs.items():
        for producer in before:
            after.setdefault(producer, []).append(index)
    ready: Dict[bool, List[int]] = {True: [], False: []}
    for operator in graph.operators:
        if waiting[operator.index] == 0:
            ready[operator.index in supported].append(operator.index)
    kind = bool(graph.operators) and (
        not ready[False] or (bool(ready[True]) and ready[True][0] < ready[False][0])
    )
    while ready[True] or ready[False]:
        taken: Set[int] = set()
        while ready[kind]:
            index = ready[kind].pop()
            taken.add(index)
            for consumer in after.get(index, ()):
                waiting[consumer] -= 1
                if waiting[consumer] == 0:
                    ready[consumer in supported].append(consumer)
        if kind and taken:
            return taken
        kind = not kind
    return set()


# ---- causes ----------------------------------------------------------------------------------------------


def _own_reasons(model: Model) -> Dict[int, Reason]:
    context = Context(model, model.main)
    found: Dict[int, Reason] = {}
    for operator in model.main.operators:
        edges = len(operator.inputs) + len(operator.outputs)
        model.budget.spend(_STEPS_PER_JUDGEMENT + 2 * edges, "the TensorFlow Lite model")
        reason = why_not(context, operator)
        if reason is not None:
            found[operator.index] = reason
    return found


def _explain(
    model: Model, mapped: Set[int], stayed: Set[int], own: Optional[Dict[int, Reason]] = None
) -> Dict[int, Tuple[Reason, bool]]:
    """Operation on the CPU → (why, whether the reason is in itself)."""
    graph = model.main
    own = _own_reasons(model) if own is None else own
    found: Dict[int, Tuple[Reason, bool]] = {
        index: (own[index], True) for index in stayed if index in own and not own[index].observed
    }
    made_by = producers(graph)
    before = _ancestors(model, mapped, made_by)
    blocking = min((index for index, reason in own.items() if reason.whole_model), default=None)
    # Which blocked operations an operation waits for, nearest first; in the order of the graph, so that every
    # producer is known before its consumers.
    blockers: Dict[int, Tuple[int, ...]] = {}
    for operator in graph.operators:
        index = operator.index
        if index not in stayed:
            continue
        producing = {made_by[tensor] for tensor in operator.inputs if tensor in made_by} - {index}
        above: Dict[int, None] = {}
        for producer in sorted(producing):
            if producer not in stayed or producer in before:
                continue
            if producer in found and found[producer][1]:
                above[producer] = None
            else:
                above.update(dict.fromkeys(blockers.get(producer, ())[:_LISTED]))
        blockers[index] = tuple(above)
        if index in found:
            continue
        if above:
            found[index] = (_collateral(graph, tuple(above)), False)
        elif index in own:
            found[index] = (own[index], True)
        elif index in before:
            found[index] = (
                Reason(
                    ONE_SUBGRAPH,
                    "it runs before the part that was compiled, with an operation for the CPU between them",
                    "make the operations behind it fit for the Edge TPU first",
                ),
                False,
            )
        elif blocking is not None:
            found[index] = (
                Reason(
                    DYNAMIC,
                    f"the compiler takes nothing of the model, because of operation {blocking} "
                    f"({graph.operators[blocking].type})",
                    f"change operation {blocking} first",
                ),
                False,
            )
        else:
            found[index] = (
                _older_compiler(operator)
                or Reason(
                    LIMITATION,
                    "nothing in the documented rules forbids it; it is the first of its branch that was "
                    "left out",
                    "mostly the tensors are too large: make the input smaller or split the operation, or "
                    "let the compiler search (edgetpu_compiler -d)",
                ),
                True,
            )
    return found


def _older_compiler(operator: Operator) -> Optional[Reason]:
    """A reason that only compilers before 16 had; 16 maps these operations."""
    if not operator.type.startswith("RESIZE_") or not operator.option("half_pixel_centers"):
        return None
    return Reason(
        VERSION,
        "it resizes by half-pixel centres, which compilers before 16 don't know",
        "compile with edgetpu_compiler 16, or resize without half_pixel_centers (#187, #396, #420)",
    )


def _ancestors(model: Model, mapped: Set[int], made_by: Dict[int, int]) -> Set[int]:
    """The operations that the compiled part waits for."""
    graph = model.main
    if not mapped:
        return set()
    outputs = {tensor for index in mapped for tensor in graph.operators[index].outputs if tensor >= 0}
    return closure(graph, outputs, set(), made_by, model.budget) - mapped


def _collateral(graph: Subgraph, blockers: Tuple[int, ...]) -> Reason:
    named = [f"{index} ({graph.operators[index].type})" for index in blockers[:3]]
    more = f" and {len(blockers) - 3} more" if len(blockers) > 3 else ""
    which = ", ".join(named) + more
    several = "s" if len(blockers) > 1 else ""
    return Reason(
        ONE_SUBGRAPH,
        f"it needs the result of operation{several} {which} on the CPU",
        f"change operation{several} {which} first; or edgetpu_compiler -a, which can be slower (#317, #461, "
        "#601)",
    )


# ---- putting it together ---------------------------------------------------------------------------------


def _placed(
    graph: Subgraph, operator: Operator, unit: Unit, why: Optional[Tuple[Reason, bool]]
) -> OpPlacement:
    if unit is not Unit.CPU or why is None:
        return OpPlacement(operator.index, operator.type, op_name(graph, operator), unit)
    reason, root = why
    return OpPlacement(
        index=operator.index,
        type=operator.type,
        name=op_name(graph, operator),
        unit=unit,
        cause=reason.cause,
        root_cause=root,
        remedy=reason.remedy,
    )


def _placement(ops: Sequence[OpPlacement], evidence: Evidence, how: str) -> Placement:
    counts: Dict[Unit, int] = {}
    accelerated: Dict[str, int] = {}
    cpu: Dict[str, int] = {}
    for op in ops:
        counts[op.unit] = counts.get(op.unit, 0) + 1
        if op.unit in ACCELERATORS:
            accelerated[op.type] = accelerated.get(op.type, 0) + 1
        elif op.unit is not Unit.UNSPECIFIED:
            cpu[op.type] = cpu.get(op.type, 0) + 1
    fast, slow = sum(accelerated.values()), sum(cpu.values())
    unknown = counts.get(Unit.UNSPECIFIED, 0)
    if unknown:
        verdict = Verdict.UNSPECIFIED
    elif not slow and fast:
        verdict = Verdict.ACCELERATED
    else:
        verdict = Verdict.PARTLY if fast else Verdict.NOT_ACCELERATED
    detail = f"{fast} of {len(ops)} operations {how} for the Edge TPU"
    if slow:
        roots = [f"{op.index} {op.type}" for op in ops if op.root_cause]
        detail += f"; {slow} on the CPU, {len(roots)} because of themselves"
        if roots:
            detail += f" (first: {', '.join(roots[:3])})"
    if unknown:
        detail += f"; {unknown} can't be told"
    return Placement(
        evidence=evidence,
        accelerated_ops=fast if not unknown else None,
        cpu_ops=slow if not unknown else None,
        accelerated_op_types=accelerated,
        cpu_op_types=cpu,
        units=tuple(UnitCount(unit, counts[unit]) for unit in Unit if unit in counts),
        ops=tuple(ops),
        verdict=verdict,
        detail=detail,
    )


def _types(types: Dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in types.items())
