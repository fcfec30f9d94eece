"""Parts of TensorFlow Lite models as models of their own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench.runtimes import tflite
from boardbench.agent.bench.runtimes.tflite_cut import CanNotCut, cut
from boardbench.agent.bench.runtimes.tflite_parts import nodes_of

from . import models

REAL = (
    "mobilenet_v1_0.25_128_quant",
    "split_concat",
    "keras_lstm_mnist_ptq",
    "movenet_single_pose_lightning_ptq",
)


@pytest.fixture
def module() -> Any:
    runtime = tflite.TfliteRuntime()
    try:
        runtime.version()
    except tflite.RuntimeUnavailable as error:
        pytest.skip(str(error))
    if not runtime.version().startswith("ai-edge-litert"):
        pytest.skip("older interpreters overwrite tensors that they were told to keep")
    return runtime._module


def interpreter(module: Any, content: bytes, **more: Any) -> Any:
    plain = module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    made = module.Interpreter(model_content=content, experimental_op_resolver_type=plain, **more)
    made.allocate_tensors()
    return made


def fed(made: Any) -> Any:
    source = np.random.default_rng(0)
    for detail in made.get_input_details():
        made.set_tensor(detail["index"], (source.random(detail["shape"]) * 100).astype(detail["dtype"]))
    made.invoke()
    return made


@pytest.mark.parametrize("name", REAL)
def test_every_operation_alone_computes_what_it_does_in_the_model(
    module: Any, shared_models: Path, name: str
) -> None:
    content = (shared_models / f"{name}.tflite").read_bytes()
    whole = fed(interpreter(module, content, experimental_preserve_all_tensors=True))
    nodes = nodes_of(whole)
    computed = {tensor for node in nodes for tensor in node.outputs}
    computed |= {int(detail["index"]) for detail in whole.get_input_details()}
    for at, node in enumerate(nodes):
        inputs = [tensor for tensor in dict.fromkeys(node.inputs) if tensor in computed]
        shapes = {tensor: tuple(whole.get_tensor(tensor).shape) for tensor in inputs}
        alone = interpreter(module, cut(content, [at], inputs, list(node.outputs), shapes))
        assert [each.name for each in nodes_of(alone)] == [node.name]
        for tensor in inputs:
            alone.set_tensor(tensor, whole.get_tensor(tensor))
        alone.invoke()
        for tensor in node.outputs:
            assert np.array_equal(alone.get_tensor(tensor), whole.get_tensor(tensor)), (at, node.name)


def test_operations_in_the_middle_are_fed_and_read_at_their_own_tensors(
    module: Any, shared_models: Path
) -> None:
    content = (shared_models / "mobilenet_v1_0.25_128_quant.tflite").read_bytes()
    whole = fed(interpreter(module, content, experimental_preserve_all_tensors=True))
    nodes = nodes_of(whole)
    entry, exit_ = nodes[3].inputs[0], nodes[9].outputs[0]
    part = interpreter(module, cut(content, range(3, 10), [entry], [exit_]))
    assert len(nodes_of(part)) == 7
    part.set_tensor(entry, whole.get_tensor(entry))
    part.invoke()
    assert np.array_equal(part.get_tensor(exit_), whole.get_tensor(exit_))


def test_a_part_without_operations_runs(module: Any) -> None:
    interpreter(module, cut(models.tflite_affine(), (), (), ())).invoke()


def test_sizes_can_be_set_and_what_follows_has_them(module: Any) -> None:
    content = models.tflite_affine(batch=-1)
    whole = interpreter(module, content)
    (x,), (y,) = whole.get_input_details(), whole.get_output_details()
    large = interpreter(module, cut(content, [0, 1], [x["index"]], [y["index"]], {x["index"]: (5, 4)}))
    assert large.get_output_details()[0]["shape"].tolist() == [5, 4]


def test_control_flow_keeps_its_other_graphs(module: Any) -> None:
    content = models.tflite_while()
    (x,), (y,) = (
        interpreter(module, content).get_input_details(),
        interpreter(module, content).get_output_details(),
    )
    loop = interpreter(module, cut(content, [0], [x["index"]], [y["index"]]))
    loop.set_tensor(x["index"], np.array([0.5], np.float32))
    loop.invoke()
    assert loop.get_tensor(y["index"]).tolist() == [10.5]


def test_the_original_is_not_changed() -> None:
    content = models.tflite_affine()
    kept = bytes(bytearray(content))
    assert cut(content, [1], [0], [2]) != content
    assert content == kept


@pytest.mark.parametrize("operators", [[2], [-1], [0, 7]])
def test_an_operation_that_is_not_there_is_refused(operators: list[int]) -> None:
    with pytest.raises(CanNotCut, match="2 operations"):
        cut(models.tflite_affine(), operators, [0], [2])


def test_another_number_of_dimensions_is_refused() -> None:
    with pytest.raises(CanNotCut, match="another number of dimensions"):
        cut(models.tflite_affine(), [0], [0], [1], {0: (1, 2, 2)})


def test_a_broken_file_is_refused_or_cut_and_never_read_outside() -> None:
    content = models.tflite_affine()
    source = random.Random(0)
    for _ in range(3000):
        broken = bytearray(content[: source.randrange(len(content) + 1)])
        for _ in range(source.randrange(4)):
            if broken:
                broken[source.randrange(len(broken))] = source.randrange(256)
        try:
            cut(bytes(broken), [0], [0], [1], {0: (1, 4)})
        except CanNotCut:
            pass
