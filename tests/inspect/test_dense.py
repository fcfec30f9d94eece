"""Files made to take long: the work that they cause stays within the budget, which stands for what it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from boardbench.inspect import analyse
from boardbench.inspect.budget import MOST_STEPS, Budget
from boardbench.inspect.errors import InspectError, Malformed, TooLarge
from boardbench.inspect.sniff import check, sniff_bytes
from boardbench.inspect.tflite import Model, closure, producers

from .dense import DENSE, onnx, padded
from .dense.effort import attempt, worst
from .dense.protobuf import field, number

SIZE = 30_000
# Of what Python does for a step, calls are what can be counted: of its own functions and of C's.
CALLS_PER_STEP, CALLS_AT_LEAST = 6, 60_000
# As in test_hostile.py.
MEMORY_RATIO = 24


def _calls(work: Callable[[], object]) -> int:
    count = 0

    def counted(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", DENSE)
def test_a_step_stands_for_what_is_done(name: str) -> None:
    data = memoryview(DENSE[name](SIZE))
    budget = Budget(len(data), sniff_bytes(data))
    told = []

    def inspect() -> None:
        try:
            report = analyse.inspect_bytes(
                "m", data, target="edgetpu" if bytes(data[4:8]) == b"TFL3" else "", budget=budget
            )
            assert sum(use.size_bytes for use in report.bytes) == report.size_bytes
        except InspectError as error:
            told.append(error)

    calls = _calls(inspect)
    # What is asked for beyond the budget is refused, and not done.
    steps = min(budget.steps, budget.most_steps)
    assert calls <= CALLS_PER_STEP * steps + CALLS_AT_LEAST
    assert budget.steps <= budget.most_steps or told
    for error in told:
        # Either what the file is, or what is wrong with it, or that it is too much.
        assert isinstance(error, (Malformed, TooLarge)) or "not a model format" in str(error)
        assert str(error)


# Those that leave most behind for their size.
HEAVY = (
    "tflite tensors bare",
    "tflite tensors described apart",
    "tflite constants of a byte",
    "tflite graph of inputs",
    "onnx empty nodes",
    "onnx empty constants",
    "openvino bare layers",
    "coreml empty layers",
    "torchscript pickle of dictionaries",
    "torchscript calls",
    "executorch values",
)


@pytest.mark.parametrize("name", HEAVY)
def test_memory_is_a_small_multiple_of_the_file(name: str) -> None:
    # So many of them that they are read to the end, in a file whose size allows it.
    data = padded(DENSE[name](100_000), 1 << 20)
    effort = attempt(name, data, memory=True)
    assert effort.peak_bytes < MEMORY_RATIO * len(data)


def test_dense_files_of_some_size_are_refused_and_say_why() -> None:
    outcome = attempt("m", DENSE["tflite operators bare"](1 << 20)).outcome
    assert "more parts than any model of its size: damaged, or made to harm" in outcome


def test_what_is_too_large_may_be_sound(tmp_path: Path) -> None:
    data = padded(DENSE["tflite operators bare"](1 << 20), 12 << 20)
    with pytest.raises(TooLarge, match="too large to be inspected, or made to harm"):
        analyse.inspect_bytes("m", memoryview(data))
    # It is no reason not to send it to a board.
    path = tmp_path / "m.tflite"
    path.write_bytes(data)
    assert check(path, "tflite") is None


def test_walks_through_a_graph_are_counted(
    conv_chain: Callable[..., bytes], read: Callable[[bytes], Model]
) -> None:
    # A compiled file may have many nodes, and for each the original is walked through.
    graph = read(conv_chain(*["RELU"] * 300)).main
    made_by = producers(graph)
    budget = Budget(0)
    before = budget.steps
    assert len(closure(graph, set(graph.outputs), set(graph.inputs), made_by, budget)) == 300
    assert budget.steps - before >= 300
    with pytest.raises(Malformed, match="more parts than any model"):
        for _ in range(1000):
            closure(graph, set(graph.outputs), set(graph.inputs), made_by, budget)


def test_no_size_allows_more_than_the_most() -> None:
    assert Budget(1 << 40, "onnx").most_steps == Budget(1 << 24, "onnx").most_steps == MOST_STEPS
    assert Budget(0).most_steps > 0


def test_many_operations_are_read() -> None:
    # As many as any model has, and 100 MB beside them.
    nodes = b"".join(
        onnx.node(
            "Conv",
            (f"v{number}", f"w{number}"),
            (f"v{number + 1}",),
            *(field(1, name) + field(8, b"\1\1") for name in (b"strides", b"kernel_shape")),
        )
        for number in range(20_000)
    )
    weights = field(5, field(1, b"\x01") + number(2, 1) + field(9, bytes(100 << 20)))
    report = analyse.inspect_bytes("m.onnx", memoryview(onnx.onnx_of(nodes, weights)))
    assert report.op_types == {"Conv": 20_000}
    assert sum(use.size_bytes for use in report.bytes) == report.size_bytes > 100 << 20


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("megabytes", [4, 12])
@pytest.mark.parametrize("name", DENSE)
def test_nothing_takes_a_second(name: str, megabytes: int) -> None:
    found, _ = worst(name, megabytes << 20)
    assert found.seconds < 1.0, found
