"""Where the time of an ONNX Runtime inference goes, and why nodes are not where they were asked to be.

A second session with ``enable_profiling`` writes an event for every node that ran, with its provider,
duration and shapes. Nodes are there as they ran: what a provider took in one piece is one event, and nodes
of the CPU may be fused or have companions that only change a layout. What fallback costs is therefore told
by provider; the time of a single operation only where its node ran as it is in the model.

A node on the CPU is a root cause when the provider refuses it also by itself and between neighbours that it
takes: each is asked for with a model of its own. If the provider takes it there, its place in the graph was
the reason. (Some providers refuse an operation that is alone, but take it between others.)
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from boardbench.agent.bench import crossings, placement
from boardbench.agent.bench.crossings import Part
from boardbench.agent.bench.runtime import Cause, NoProfile, Profile, ProfileRequest
from boardbench.agent.bench.runtimes import onnx_graph
from boardbench.agent.bench.runtimes.onnx import CPU, Assigned, OnnxModel, OnnxRuntime, is_kernel, node_name
from boardbench.agent.bench.runtimes.onnx_graph import FileNode, Graph, Typed
from boardbench.agent.bench.stats import median, midmean
from boardbench.agent.domain import Crossings, OpPlacement

METHOD = "ONNX Runtime's profiler"
ASKING = "asking for single operations"

PROBE_SECONDS = 15.0
"""For asking about single operations, of which each needs a session: some 0.1 s for OpenVINO on a laptop."""

_COPIES = ("MemcpyToHost", "MemcpyFromHost")
"""Nodes that ONNX Runtime puts in to move a tensor between a device and the host (core/optimizer)."""


@dataclass(frozen=True)
class _Ran:
    """A node in a profile, by its first inference, with its seconds in all of them."""

    name: str
    op_type: str
    provider: str
    index: int
    inputs: Tuple[Typed, ...]
    outputs: Tuple[Typed, ...]
    seconds: Tuple[float, ...]


def profile(runtime: OnnxRuntime, request: ProfileRequest, runs: Callable[[], Iterable[int]]) -> Profile:
    """Profiles the model as it was loaded in the run. Raises NoProfile, and what ``load`` raises."""
    request.begin(METHOD)
    model = request.load(runtime)
    model.bind(request.feeds(model.inputs))
    found = model.placement()
    if not found.ops:
        raise NoProfile(f"it is not known where nodes run: {found.detail}")
    assigned = model.assigned() or [
        # A version that does not tell was asked by a profile: its operations are the nodes of one.
        Assigned(op.delegate or CPU, op.name, op.type, part=op.index)
        for op in found.ops
    ]
    inferences = _inferences(model.profile(runs()))
    ran = _nodes(inferences)
    whole = tuple(inference.seconds for inference in inferences)
    fallback = tuple(_seconds_away(inference) for inference in inferences) if model.wanted else ()
    seen = _Seen(found.ops, assigned, ran, _graph(request))
    seconds = seen.op_seconds()
    text = (
        f"{len(inferences)} inferences of {median_milliseconds(whole)}, {METHOD}: "
        f"{_by_provider(inferences)}; {len(seconds)} of {len(found.ops)} nodes ran as they are in the model "
        "and have a time of their own"
    )
    causes: Mapping[int, Cause] = {}
    if model.wanted and not model.device_fallback and ASKING not in request.avoid:
        request.trying(ASKING)
        causes = _causes(runtime, model, seen)
    return Profile(
        method=METHOD,
        detail=text,
        units=tuple(op.unit for op in found.ops),
        whole_seconds=whole,
        fallback_seconds=fallback,
        op_seconds=seconds,
        causes=causes,
        crossings=_crossings(inferences[0], seen) if model.wanted else None,
    )


def median_milliseconds(seconds: Sequence[float]) -> str:
    """Their median for a person."""
    return f"{median([round(each * 1e9) for each in seconds]) / 1e6:.3g} ms"


# The profile


@dataclass(frozen=True)
class _Inference:
    """One profiled inference: its duration, and its node events in the order in which they began."""

    seconds: float
    nodes: Tuple[Mapping[str, Any], ...]


def _inferences(events: Sequence[Mapping[str, Any]]) -> List[_Inference]:
    """The inferences after the first, which includes lazy work. Raises NoProfile."""
    spans = sorted(
        (int(event["ts"]), int(event["dur"]))
        for event in events
        if event.get("cat") == "Session" and event.get("name") == "model_run"
    )
    nodes = sorted((event for event in events if is_kernel(event)), key=lambda event: int(event["ts"]))
    found = []
    at = 0
    for begin, duration in spans:
        inside = []
        while at < len(nodes) and int(nodes[at]["ts"]) <= begin + duration:
            if int(nodes[at]["ts"]) >= begin:
                inside.append(nodes[at])
            at += 1
        found.append(_Inference(duration / 1e6, tuple(inside)))
    if len(found) < 2 or not found[1].nodes:
        raise NoProfile("ONNX Runtime wrote a profile without an inference")
    return found[1:]


def _nodes(inferences: Sequence[_Inference]) -> List[_Ran]:
    """The nodes in the order in which they ran."""
    seconds: Dict[str, List[float]] = {}
    for inference in inferences:
        sums: Dict[str, float] = {}
        for event in inference.nodes:  # a node in a loop runs many times
            sums[node_name(event)] = sums.get(node_name(event), 0.0) + int(event["dur"]) / 1e6
        for name, total in sums.items():
            seconds.setdefault(name, []).append(total)
    found: Dict[str, _Ran] = {}
    for event in inferences[0].nodes:
        arguments, name = event["args"], node_name(event)
        if name not in found:
            found[name] = _Ran(
                name=name,
                op_type=str(arguments["op_name"]),
                provider=str(arguments["provider"]),
                index=int(arguments.get("node_index", -1)),
                inputs=_typed(arguments.get("input_type_shape", ())),
                outputs=_typed(arguments.get("output_type_shape", ())),
                seconds=tuple(seconds[name]),
            )
    return list(found.values())


def _typed(content: Sequence[Mapping[str, Sequence[int]]]) -> Tuple[Typed, ...]:
    return tuple(
        (str(element), tuple(int(size) for size in sizes))
        for each in content
        for element, sizes in each.items()
    )


def _is_away(event: Mapping[str, Any]) -> bool:
    """Whether a node event is time that the provider asked for would not have taken."""
    return bool(event["args"]["provider"] == CPU or event["args"].get("op_name") in _COPIES)


def _seconds_away(inference: _Inference) -> float:
    """Seconds in which at least one such node ran; nodes may run side by side."""
    total, until = 0, 0
    for event in inference.nodes:
        if _is_away(event):
            begin, end = int(event["ts"]), int(event["ts"]) + int(event["dur"])
            total += max(end - max(begin, until), 0)
            until = max(until, end)
    return total / 1e6


def _by_provider(inferences: Sequence[_Inference]) -> str:
    totals: Dict[str, List[float]] = {}
    for inference in inferences:
        sums: Dict[str, float] = {}
        for event in inference.nodes:
            provider = str(event["args"]["provider"])
            sums[provider] = sums.get(provider, 0.0) + int(event["dur"]) / 1e6
        for provider, total in sums.items():
            totals.setdefault(provider, []).append(total)
    return ", ".join(f"{median_milliseconds(seconds)} on {name}" for name, seconds in totals.items())


# Joining


def _graph(request: ProfileRequest) -> Optional[Graph]:
    from boardbench.inspect.errors import InspectError

    try:
        return onnx_graph.read(request.model_path)
    except (OSError, ValueError, InspectError):
        return None


class _Seen:
    """The nodes of the placement, of the profile and of the file, joined where that is beyond doubt."""

    def __init__(
        self,
        ops: Sequence[OpPlacement],
        assigned: Sequence[Assigned],
        ran: Sequence[_Ran],
        graph: Optional[Graph],
    ) -> None:
        self.ops = ops
        self.assigned = assigned
        self.graph = graph
        self._ran = ran
        self.ran_of = self._join_ran()
        self.file_of = self._join_file()

    def _join_ran(self) -> Dict[int, _Ran]:
        """Operation → its own node in the profile."""
        by_name = {node.name: node for node in self._ran}
        names = Counter(node.name for node in self.assigned)
        found: Dict[int, _Ran] = {}
        for at, node in enumerate(self.assigned):
            ran = by_name.get(node.name) if node.name and names[node.name] == 1 else None
            if ran is not None and ran.provider == node.provider and _bare(node.op_type) == ran.op_type:
                found[at] = ran
        # A node without a name is called after its type and number.
        unnamed: Dict[Tuple[str, str], List[int]] = {}
        for at, node in enumerate(self.assigned):
            if not node.name:
                unnamed.setdefault((node.provider, _bare(node.op_type)), []).append(at)
        for (provider, op_type), positions in unnamed.items():
            alike = [
                ran
                for ran in self._ran
                if (ran.provider, ran.op_type, ran.name) == (provider, op_type, f"{op_type}_{ran.index}")
            ]
            if len(alike) == len(positions):
                found.update(zip(positions, sorted(alike, key=lambda ran: ran.index)))
        self._join_single_parts(found)
        return found

    def _join_single_parts(self, found: Dict[int, _Ran]) -> None:
        """Nodes that a provider took one by one: it runs them under names of its own, in the same order."""
        for provider in {node.provider for node in self.assigned} - {CPU}:
            parts: Dict[int, List[int]] = {}
            for at, node in enumerate(self.assigned):
                if node.provider == provider:
                    parts.setdefault(node.part, []).append(at)
            theirs = [ran for ran in self._ran if ran.provider == provider]
            if any(at in found for positions in parts.values() for at in positions):
                continue  # it runs nodes as they are
            if len(theirs) == len(parts):
                for positions, ran in zip(
                    parts.values(), sorted(theirs, key=lambda ran: _last_number(ran.name))
                ):
                    if len(positions) == 1:
                        found[positions[0]] = ran

    def _join_file(self) -> Dict[int, FileNode]:
        """Operation → its node in the file."""
        if self.graph is None:
            return {}
        names = Counter(node.name for node in self.graph.nodes)
        by_name = {node.name: node for node in self.graph.nodes if node.name and names[node.name] == 1}
        found: Dict[int, FileNode] = {}
        for at, node in enumerate(self.assigned):
            file = by_name.get(node.name)
            ran = self.ran_of.get(at)
            if file is None and not node.name and ran is not None and 0 <= ran.index < len(self.graph.nodes):
                file = self.graph.nodes[ran.index]
            if file is not None and file.name == node.name and file.op_type == _bare(node.op_type):
                found[at] = file
        return found

    def op_seconds(self) -> Dict[int, float]:
        """Mean seconds of every operation that ran as it is in the model."""
        return {at: midmean(ran.seconds) for at, ran in self.ran_of.items()}

    def tensors(self, at: int) -> Optional[Tuple[Dict[str, Typed], Dict[str, Typed]]]:
        """Types and sizes of an operation's inputs and outputs by name; None where they are not known."""
        ran, file = self.ran_of.get(at), self.file_of.get(at)
        if ran is None or file is None:
            return None
        inputs = [name for name in file.inputs if name]
        outputs = [name for name in file.outputs if name]
        if len(inputs) != len(ran.inputs) or len(outputs) != len(ran.outputs):
            return None
        return dict(zip(inputs, ran.inputs)), dict(zip(outputs, ran.outputs))


def _bare(op_type: str) -> str:
    """The type without its domain."""
    return op_type.rpartition(".")[2]


def _last_number(name: str) -> int:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else 0


def _crossings(inference: _Inference, seen: _Seen) -> Crossings:
    """Changes of side in the order in which nodes ran, and the bytes that went along."""
    sides = [event["args"]["provider"] == CPU for event in inference.nodes]
    count = sum(sides[at] != sides[at - 1] for at in range(1, len(sides)))
    return Crossings(count=count, bytes=_crossing_bytes(seen))


def _crossing_bytes(seen: _Seen) -> Optional[int]:
    """Bytes of the tensors between the CPU and the rest; None where one of them is not known.

    Every such tensor is one of a node on the CPU, whose sizes are in the profile.
    """
    if seen.graph is None or len(seen.file_of) != len(seen.assigned):
        return None
    sizes: Dict[str, Typed] = {}
    for at, node in enumerate(seen.assigned):
        if node.provider == CPU:
            tensors = seen.tensors(at)
            if tensors is None:
                return None
            sizes.update({**tensors[0], **tensors[1]})
    source = _sources(seen.graph, {file.index for file in seen.file_of.values()})
    groups: Dict[Tuple[bool, int], List[FileNode]] = {}
    for at, node in enumerate(seen.assigned):
        on_cpu = node.provider == CPU
        groups.setdefault((on_cpu, at if on_cpu else node.part), []).append(seen.file_of[at])
    parts = []
    for (on_cpu, _), files in groups.items():
        made = {name for file in files for name in file.outputs if name}
        read = dict.fromkeys(source.get(name, name) for file in files for name in file.inputs if name)
        parts.append(
            Part(
                ops=tuple(sorted(file.index for file in files)),
                accelerated=not on_cpu,
                inputs=tuple(name for name in read if name not in made and name not in seen.graph.constants),
                outputs=tuple(made),
            )
        )

    def size_bytes(tensor: object) -> Optional[int]:
        typed = sizes.get(str(tensor))
        return None if typed is None else onnx_graph.sizes_bytes([typed])

    return crossings.between(parts, size_bytes).bytes


def _sources(graph: Graph, kept: Iterable[int]) -> Dict[str, str]:
    """Tensor → what it is a copy of, over nodes that were optimised away (Identity, Dropout)."""
    remaining = set(kept)
    source: Dict[str, str] = {}
    for node in graph.computed():
        if node.index not in remaining and node.inputs and node.outputs:
            source[node.outputs[0]] = source.get(node.inputs[0], node.inputs[0])
    return source


# Causes


def _causes(runtime: OnnxRuntime, model: OnnxModel, seen: _Seen) -> Dict[int, Cause]:
    """Why each operation on the CPU is there, by asking the provider for it alone."""
    provider = model.wanted
    end = time.monotonic() + PROBE_SECONDS
    refused: Dict[int, bool] = {}
    for op in seen.ops:
        if placement.is_away(op, provider) and time.monotonic() < end:
            answer = _refuses(runtime, model, seen, op.index)
            if answer is not None:
                refused[op.index] = answer
    roots = [at for at, is_root in refused.items() if is_root]
    causes: Dict[int, Cause] = {}
    for at, is_root in refused.items():
        if is_root:
            causes[at] = Cause(
                f"{provider} refuses it, by itself and between others that it takes",
                True,
                f"replace {seen.ops[at].type} by operations that {provider} has",
            )
        else:
            first = _blocker(seen, at, roots)
            named = f"#{first} {seen.ops[first].type}" if first is not None else "what is around it"
            causes[at] = Cause(
                f"{provider} takes it elsewhere: it is on the CPU because of {named}",
                False,
                f"change {named} first" if first is not None else "",
            )
    return causes


def _blocker(seen: _Seen, at: int, roots: Sequence[int]) -> Optional[int]:
    """The nearest root cause that an operation depends on, or that depends on it; None when there is none."""
    files = {op: seen.file_of[op] for op in roots if op in seen.file_of}
    start = seen.file_of.get(at)
    if start is None or seen.graph is None or not files:
        return None
    by_index = {file.index: op for op, file in files.items()}
    makers = {name: node for node in seen.graph.nodes for name in node.outputs if name}
    readers: Dict[str, List[FileNode]] = {}
    for node in seen.graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    for forwards in (False, True):
        waiting, met = [start], {start.index}
        while waiting:
            node = waiting.pop(0)
            if node.index in by_index:
                return by_index[node.index]
            near = (
                [reader for name in node.outputs for reader in readers.get(name, ())]
                if forwards
                else [makers[name] for name in node.inputs if name in makers]
            )
            for other in near:
                if other.index not in met:
                    met.add(other.index)
                    waiting.append(other)
    return None


def _refuses(runtime: OnnxRuntime, model: OnnxModel, seen: _Seen, at: int) -> Optional[bool]:
    """Whether the provider leaves the operation also when it is alone or between others; None: not known."""
    tensors, file = seen.tensors(at), seen.file_of.get(at)
    if tensors is None or file is None or seen.graph is None:
        return None
    answered = False
    for before, after in ((False, False), (True, False), (True, True)):
        content = onnx_graph.alone(seen.graph, file, *tensors, before=before, after=after)
        if content is None:
            continue
        taken = _takes(runtime, model, content, file)
        if taken:
            return False
        answered = answered or taken is False
    return True if answered else None


def _takes(runtime: OnnxRuntime, model: OnnxModel, content: bytes, file: FileNode) -> Optional[bool]:
    """Whether the provider takes the node of a model of one; None where the session says nothing of it."""
    try:
        nodes = runtime.assignment(content, model.providers, model.plugin)
    except Exception:  # whatever the engine has against the model: it is no answer
        return None
    if nodes is None:
        return None
    for node in nodes:
        if not node.name.startswith(onnx_graph.NEIGHBOUR) and _bare(node.op_type) == file.op_type:
            return node.provider == model.wanted
    return None
