"""TensorFlow Lite: the real models, where their operations run, and what is refused."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import inputs
from boardbench.agent.bench.runtime import ModelRejected, OptionRejected, RuntimeUnavailable
from boardbench.agent.bench.runtimes import tflite, tflite_graphs, tflite_parts
from boardbench.agent.domain import Evidence, Unit, Verdict
from boardbench.testkit.child import BRIEF
from boardbench.testkit.contract import available

from . import models

# Every model of the folder that plain interpreters can run; the number of operations is that of the file.
RUNNABLE = {
    "deeplabv3_mnv2_dm05_pascal_quant": 72,
    "keras_lstm_mnist_ptq": 6,
    "mobilenet_quant_v1_224_head_layers": 3,
    "mobilenet_v1_0.25_128_quant": 31,
    "mobilenet_v1_0.5_160_quant": 31,
    "movenet_single_pose_lightning_ptq": 157,
    "split_concat": 3,
    "tf2_mobilenet_v2_1.0_224_ptq": 68,
}
UNKNOWN_OPS = {"model_invoking_error": "fake-op-double", "posenet_mobilenet_v1_075_353_481_16_quant_decoder":
               "PosenetDecoderOp"}  # fmt: skip


@pytest.fixture
def runtime() -> tflite.TfliteRuntime:
    return available(tflite.TfliteRuntime())


def load(runtime: tflite.TfliteRuntime, file: Path, **options: str) -> tflite.TfliteModel:
    return runtime.load(file, device="cpu", threads=None, options=options, shapes={})


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Writes bytes to a file and gives its path."""

    def make(data: bytes, name: str = "model.tflite") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return make


def test_all_models_of_the_folder_are_accounted_for(shared_models: Path) -> None:
    found = {path.stem for path in shared_models.glob("*.tflite")}
    assert found == {*RUNNABLE, *UNKNOWN_OPS, *(name for name in found if name.endswith("_edgetpu"))}


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_real_model_runs_in_the_worker(worker: Any, shared_models: Path, name: str) -> None:
    outcome = worker.run({
        "kind": "run", "runtime": "tflite", "format": "tflite",
        "model_path": str(shared_models / f"{name}.tflite"),
        **BRIEF, "min_runs": 6, "warm_up_runs": 1,
    })  # fmt: skip
    result = outcome.result
    assert outcome.exit_code == 0
    assert result["latency"]["count"] == 6
    assert len(result["placement"]["ops"]) == RUNNABLE[name]
    assert result["placement"]["accelerated_ops"] == 0
    assert result["placement"]["cpu_ops"] == RUNNABLE[name]
    assert result["placement"]["evidence"] == "EVIDENCE_PARTITION"
    assert set(result["output_sha256"]) == {tensor["name"] for tensor in result["outputs"]}
    assert -1 not in [size for tensor in result["outputs"] for size in tensor["shape"]]
    assert result["memory"]["phases"][1]["rss_bytes"] > result["memory"]["phases"][0]["rss_bytes"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_without_xnnpack_everything_runs_in_plain_kernels(
    runtime: tflite.TfliteRuntime, shared_models: Path, name: str
) -> None:
    file = shared_models / f"{name}.tflite"
    with_it, without = load(runtime, file).placement(), load(runtime, file, xnnpack="off").placement()
    assert {op.unit for op in without.ops} == {Unit.CPU}
    assert {op.unit for op in with_it.ops} <= {Unit.CPU, Unit.CPU_DELEGATE}
    # The list is the model's own, whoever takes what.
    assert [(op.index, op.type, op.name) for op in with_it.ops] == [
        (op.index, op.type, op.name) for op in without.ops
    ]
    assert with_it.cpu_op_types == without.cpu_op_types
    assert with_it.verdict is without.verdict is Verdict.NOT_ACCELERATED
    for op in with_it.ops:
        assert op.delegate == (tflite.XNNPACK if op.unit is Unit.CPU_DELEGATE else "")


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_placement_is_what_the_interpreter_does_op_by_op(
    runtime: tflite.TfliteRuntime, shared_models: Path, name: str
) -> None:
    """Without node fusion every DELEGATE node stands for one operation: no walk is needed to name it."""
    if not runtime.version().startswith("ai-edge-litert"):
        pytest.skip("tflite-runtime can't keep delegated nodes apart")
    file = shared_models / f"{name}.tflite"
    apart = runtime._module.Interpreter(str(file), experimental_disable_delegate_node_fusion=True)
    apart.allocate_tensors()
    nodes = apart._get_ops_details()
    delegated = {tuple(node["outputs"]) for node in nodes if node["op_name"] == "DELEGATE"}
    expected = [
        Unit.CPU_DELEGATE if tuple(node["outputs"]) in delegated else Unit.CPU
        for node in nodes
        if node["op_name"] != "DELEGATE"
    ]
    assert [op.unit for op in load(runtime, file).placement().ops] == expected


def test_the_published_count_of_mobilenet(runtime: tflite.TfliteRuntime, shared_models: Path) -> None:
    found = load(runtime, shared_models / "mobilenet_v1_0.25_128_quant.tflite").placement()
    if runtime.version().startswith("ai-edge-litert 2.3"):
        assert Counter(op.unit for op in found.ops) == {Unit.CPU_DELEGATE: 29, Unit.CPU: 2}
        assert found.detail == (
            "29 of 31 operations run in TfLiteXNNPackDelegate; 2 in plain kernels on the CPU "
            "(1 AVERAGE_POOL_2D, 1 SOFTMAX); the delegates' operations are in 2 parts"
        )
    elif runtime.version().startswith("tflite-runtime 2.14"):
        assert Counter(op.unit for op in found.ops) == {Unit.CPU: 31}
    else:
        pytest.skip(f"no count is known for {runtime.version()}")


def test_outputs_do_not_depend_on_the_delegate_beyond_rounding(
    runtime: tflite.TfliteRuntime, shared_models: Path
) -> None:
    file = shared_models / "tf2_mobilenet_v2_1.0_224_ptq.tflite"
    outputs = []
    for option in ("on", "off"):
        model = load(runtime, file, xnnpack=option)
        (output,) = model.fetch(model.bind(inputs.seeded(model.inputs, 0))()).values()
        outputs.append(output.astype(int))
    # Of 256 steps; the two round differently in each of 68 layers.
    assert np.abs(outputs[0] - outputs[1]).max() <= 8


def test_the_timed_call_is_invoke_itself(runtime: tflite.TfliteRuntime, made: Any) -> None:
    model = load(runtime, made(models.tflite_affine()))
    call: Any = model.bind(inputs.seeded(model.inputs, 0))
    assert call.__func__ is runtime._module.Interpreter.invoke


def test_the_default_is_one_thread(runtime: tflite.TfliteRuntime, made: Any) -> None:
    model = load(runtime, made(models.tflite_affine()))
    assert model.threads == 1
    assert model.options == {"xnnpack": "on"}


def test_an_operation_whose_result_nobody_uses_is_unknown_beside_a_delegate(
    runtime: tflite.TfliteRuntime, made: Any
) -> None:
    file = made(models.tflite_dead_end())
    relu, neg = load(runtime, file).placement().ops
    if relu.unit is Unit.CPU_DELEGATE:
        assert (neg.type, neg.unit) == ("NEG", Unit.UNSPECIFIED)
        assert "1 unknown, as nothing uses their results (1 NEG)" in load(runtime, file).placement().detail
    plain = load(runtime, file, xnnpack="off").placement()
    assert [op.unit for op in plain.ops] == [Unit.CPU, Unit.CPU]


def test_tensors_without_names_are_numbered(runtime: tflite.TfliteRuntime, made: Any) -> None:
    model = load(runtime, made(models.tflite_nameless()))
    assert [(tensor.name, tensor.shape) for tensor in model.inputs] == [("input_0", (2,)), ("input_1", (3,))]
    assert [(tensor.name, tensor.shape) for tensor in model.outputs] == [
        ("output_0", (2,)),
        ("output_1", (3,)),
    ]
    outputs = model.fetch(model.bind(inputs.seeded(model.inputs, 0))())
    assert {name: array.shape for name, array in outputs.items()} == {"output_0": (2,), "output_1": (3,)}


@pytest.mark.parametrize(
    ("names", "unique"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a_1", "a_2"]),
        (["", "input_0"], ["input_0", "input_0_1"]),
        (["a_1", "a", "a"], ["a_1", "a", "a_2"]),
        (["x", "x_1", "x"], ["x", "x_1", "x_2"]),
    ],
)
def test_names_are_made_unique(names: list[str], unique: list[str]) -> None:
    assert tflite_graphs.unique(names, "input") == unique


def test_loops_run_and_their_bodies_are_named_as_not_listed(runtime: tflite.TfliteRuntime, made: Any) -> None:
    model = load(runtime, made(models.tflite_while()))
    (output,) = model.fetch(model.bind({"x": np.array([3.5], np.float32)})()).values()
    assert output == [10.5]
    found = model.placement()
    assert [op.type for op in found.ops] == ["WHILE"]
    if runtime.version().startswith("tflite-runtime"):
        said = "; the bodies of control flow are not listed"
    else:
        said = "; 2 further subgraphs (bodies of control flow, other signatures) are not listed"
    assert found.detail.endswith(said)


def test_quantisation_is_told(runtime: tflite.TfliteRuntime, shared_models: Path) -> None:
    model = load(runtime, shared_models / "mobilenet_v1_0.25_128_quant.tflite")
    (tensor,) = model.inputs
    assert (tensor.name, tensor.dtype, tensor.shape) == ("input", "uint8", (1, 128, 128, 3))
    assert tensor.quantization is not None
    assert (tensor.quantization.scale, tensor.quantization.zero_point) == (0.0078125, 128)
    moved = load(runtime, shared_models / "movenet_single_pose_lightning_ptq.tflite")
    assert moved.inputs[0].quantization is None


def test_an_interpreter_that_does_not_tell_its_nodes_leaves_the_placement_unknown(
    runtime: tflite.TfliteRuntime, made: Any
) -> None:
    class Silent:
        """The public face alone, as a later version may have it."""

        def __init__(self, real: Any) -> None:
            self.invoke = real.invoke

    model = load(runtime, made(models.tflite_affine()))
    model._interpreter = Silent(model._interpreter)
    found = model.placement()
    assert (found.evidence, found.ops, found.cpu_ops) == (Evidence.UNSPECIFIED, (), None)
    assert "it is not known what its delegates took" in found.detail


def node(name: str, tensors_in: tuple[int, ...], tensors_out: tuple[int, ...]) -> tflite.Node:
    return tflite.Node(name, tensors_in, tensors_out)


def place(*nodes: tflite.Node, outputs: set[int], **more: Any) -> Any:
    return tflite._place(
        nodes,
        outputs=outputs,
        external_before=None,
        external=None,
        other_subgraphs=0,
        tensor_name=str,
        **more,
    )


def test_a_closure_stops_at_the_inputs_of_its_delegate() -> None:
    # 0 -A-> 1 -B-> 2 -C-> 3, and a delegate that took B alone.
    found = place(
        node("A", (0,), (1,)), node("B", (1,), (2,)), node("C", (2,), (3,)), node("DELEGATE", (1,), (2,)),
        outputs={3},
    )  # fmt: skip
    assert [op.unit for op in found.ops] == [Unit.CPU, Unit.CPU_DELEGATE, Unit.CPU]


def test_a_closure_goes_around_what_was_left_on_the_cpu() -> None:
    # The delegate took A and C; B between them stayed: its output is an input of the second part.
    found = place(
        node("A", (0,), (1,)), node("B", (1,), (2,)), node("C", (1, 2), (3,)),
        node("DELEGATE", (0,), (1,)), node("DELEGATE", (1, 2), (3,)),
        outputs={3},
    )  # fmt: skip
    assert [op.unit for op in found.ops] == [Unit.CPU_DELEGATE, Unit.CPU, Unit.CPU_DELEGATE]
    assert found.detail.endswith("the delegates' operations are in 2 parts")


def test_what_nothing_uses_is_known_where_nodes_are_kept_apart_and_say_the_same_of_the_others() -> None:
    # A's result is read by an assignment, C, and by B, which makes the output.
    nodes = (
        node("A", (0,), (1,)), node("B", (1,), (2,)), node("C", (9, 1), ()), node("D", (8,), ()),
        node("DELEGATE", (0,), (2,)),
    )  # fmt: skip
    apart = (
        *nodes[:4], node("DELEGATE", (0,), (1,)), node("DELEGATE", (1,), (2,)), node("DELEGATE", (9, 1), ()),
    )  # fmt: skip
    assert tflite_parts.taken_apart(apart) == {0, 1, 2}
    twice = (node("C", (9, 1), ()), node("E", (1, 9), ()), node("DELEGATE", (9, 1), ()))
    assert tflite_parts.taken_apart(twice) == {tflite_parts.NOT_TOLD}
    for told, expected in (({0, 1, 2}, Unit.CPU), ({0, 2}, Unit.UNSPECIFIED), (None, Unit.UNSPECIFIED)):
        found = place(*nodes, outputs={2}, apart=lambda told=told: told)
        assert found.ops[3].unit is expected
    assert [op.unit for op in place(*nodes, outputs={2}, apart=lambda: {0, 1, 2}).ops] == [
        *[Unit.CPU_DELEGATE] * 3, Unit.CPU,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "delegates",
    [
        [node("DELEGATE", (1,), (1,))],  # takes nothing
        [node("DELEGATE", (0,), (7,))],  # an output that nothing makes
        [node("DELEGATE", (0,), (1,)), node("DELEGATE", (0,), (1,))],  # both took the same
    ],
)
def test_delegates_that_make_no_sense_leave_the_placement_unknown(delegates: list[tflite.Node]) -> None:
    found = place(node("A", (0,), (1,)), *delegates, outputs={1})
    assert found.evidence is Evidence.UNSPECIFIED
    assert "do not tell which operations it took" in found.detail


# -- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "op"), UNKNOWN_OPS.items())
def test_a_custom_operation_is_named_with_what_to_do(
    runtime: tflite.TfliteRuntime, shared_models: Path, name: str, op: str
) -> None:
    with pytest.raises(
        ModelRejected, match=f"refuses {name}.tflite: custom operation {op} is not in this engine"
    ):
        load(runtime, shared_models / f"{name}.tflite")


def test_a_compiled_model_is_sent_to_the_edge_tpu(runtime: tflite.TfliteRuntime, shared_models: Path) -> None:
    for file in shared_models.glob("*_edgetpu.tflite"):
        with pytest.raises(ModelRejected, match=r"compiled for the Edge TPU\. Run it with --device edgetpu"):
            load(runtime, file)


def test_an_operation_newer_than_the_engine_is_named(runtime: tflite.TfliteRuntime, made: Any) -> None:
    with pytest.raises(ModelRejected, match="operation ADD version 99 is not in this engine"):
        load(runtime, made(models.tflite_of_unknown_ops("ADD", 99)))


def test_an_operation_of_tensorflow_is_told_as_one(runtime: tflite.TfliteRuntime, made: Any) -> None:
    with pytest.raises(
        ModelRejected, match="uses TensorFlow operations: convert it with builtin operations only"
    ):
        load(runtime, made(models.tflite_of_unknown_ops("FlexErf")))


@pytest.mark.parametrize("options", [{"xnnpack": "yes"}, {"threads": "2"}, {"delegate": ""}])
def test_options_are_checked(runtime: tflite.TfliteRuntime, made: Any, options: dict[str, str]) -> None:
    with pytest.raises(OptionRejected):
        load(runtime, made(models.tflite_affine()), **options)


def test_options_of_no_delegate_are_refused(runtime: tflite.TfliteRuntime, made: Any) -> None:
    with pytest.raises(OptionRejected, match="delegate=PATH"):
        load(runtime, made(models.tflite_affine()), **{"delegate.device": "usb"})


def test_a_delegate_that_is_not_there_is_named(runtime: tflite.TfliteRuntime, made: Any) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"no-such-delegate\.so"):
        load(runtime, made(models.tflite_affine()), delegate="/nowhere/no-such-delegate.so")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.2, 0.8])
def test_a_truncated_file_is_refused_or_crashes_the_worker_alone(
    worker: Any, shared_models: Path, made: Any, share: float
) -> None:
    """ai-edge-litert checks the file; tflite-runtime 2.14 does not, and falls over it."""
    whole = (shared_models / "mobilenet_v1_0.25_128_quant.tflite").read_bytes()
    file = made(whole[: int(len(whole) * share)])
    outcome = worker.run(
        {"kind": "run", "runtime": "tflite", "format": "tflite", "model_path": str(file), **BRIEF}
    )
    assert outcome.stages[-1] == "CREATE"
    if outcome.exit_code == 1:
        assert outcome.error["code"] == "model_rejected"
        assert "is the file whole" in outcome.error["message"]
    else:
        assert outcome.exit_code < 0  # a signal, which the agent names


def test_without_an_engine_the_reasons_and_the_command_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite, "PACKAGES", (("no_such_engine", "no-such-engine"),))
    with pytest.raises(RuntimeUnavailable) as caught:
        tflite.TfliteRuntime().version()
    said = str(caught.value)
    assert "no-such-engine: ModuleNotFoundError" in said
    package = "ai-edge-litert" if sys.version_info >= (3, 10) else "tflite-runtime 'numpy<2'"
    assert said.endswith(f"{sys.executable} -m pip install {package}")


def test_a_broken_engine_is_passed_over_for_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runtime: tflite.TfliteRuntime
) -> None:
    package = tmp_path / "broken_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "interpreter.py").write_text("raise AttributeError('_ARRAY_API not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tflite, "PACKAGES", (("broken_engine", "broken"), *tflite.PACKAGES))
    assert tflite.TfliteRuntime().version() == runtime.version()


OTHER_PYTHON = os.environ.get("BOARDBENCH_TFLITE_RUNTIME_PYTHON", "")


@pytest.mark.skipif(
    not OTHER_PYTHON, reason="set BOARDBENCH_TFLITE_RUNTIME_PYTHON to a Python that has tflite-runtime"
)
@pytest.mark.parametrize("name", RUNNABLE)
def test_the_older_engine_runs_the_same_models_under_its_own_python(
    worker: Any, shared_models: Path, name: str
) -> None:
    result = worker.run(
        {"kind": "run", "runtime": "tflite", "format": "tflite",
         "model_path": str(shared_models / f"{name}.tflite"), **BRIEF, "min_runs": 6, "warm_up_runs": 1},
        python=OTHER_PYTHON,
    ).result  # fmt: skip
    assert result["runtime"]["version"].startswith("tflite-runtime ")
    assert len(result["placement"]["ops"]) == RUNNABLE[name]
