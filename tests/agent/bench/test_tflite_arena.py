"""The arena of TensorFlow Lite, told by where the tensors are."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from boardbench.agent.bench import inputs, runtimes
from boardbench.agent.bench.runtime import RuntimeUnavailable, TellsArena
from boardbench.agent.bench.runtimes import tflite_arena
from boardbench.agent.bench.runtimes.tflite import TfliteModel

from . import models

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


def load(path: Path, **options: str) -> TfliteModel:
    runtime = runtimes.create("tflite")
    try:
        runtime.version()
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
    model = runtime.load(path, device="cpu", threads=1, options=options, shapes={})
    assert isinstance(model, TfliteModel)
    return model


@linux
@pytest.mark.parametrize("xnnpack", ["on", "off"])
def test_a_small_model_has_the_arena_that_its_tensors_take(tmp_path: Path, xnnpack: str) -> None:
    path = tmp_path / "affine.tflite"
    path.write_bytes(models.tflite_affine())
    model = load(path, xnnpack=xnnpack)
    assert isinstance(model, TellsArena)
    found = model.arena_bytes()
    # Input, output and one between them, of four floats each and at multiples of 64 bytes: two are needed at
    # a time at least, and constants are in the file.
    assert found is not None
    assert 2 * 16 <= found <= 2 * 64 + 3 * 16
    # It can run on: nothing holds its tensors.
    call = model.bind(inputs.seeded(model.inputs, 0))
    call()


@linux
@pytest.mark.parametrize("name", ["keras_lstm_mnist_ptq", "tf2_mobilenet_v2_1.0_224_ptq"])
def test_real_models_have_an_arena_that_holds_what_is_alive_at_one_time(
    shared_models: Path, name: str
) -> None:
    model = load(shared_models / f"{name}.tflite", xnnpack="off")
    found = model.arena_bytes()
    assert found is not None

    def size(index: int) -> int:
        detail = details[index]
        return int(np.prod(detail["shape"])) * np.dtype(detail["dtype"]).itemsize

    details = {detail["index"]: detail for detail in model._interpreter.get_tensor_details()}
    nodes = model.nodes()
    made = {index for node in nodes for index in node.outputs} | set(model.input_indices.values())
    # No operation runs without its inputs and outputs; and no arena is larger than all that is ever in it.
    largest = max(
        sum(size(index) for index in {*node.inputs, *node.outputs} if index in made) for node in nodes
    )
    assert largest <= found
    assert found <= sum(size(index) for index in details) + 64 * len(details)


def test_spans_are_joined_over_the_alignment_and_not_beyond() -> None:
    assert tflite_arena.covered([]) == 0
    assert tflite_arena.covered([(0, 10)]) == 10
    assert tflite_arena.covered([(64, 80), (0, 10)]) == 80  # one arena, with its gap
    assert tflite_arena.covered([(0, 100), (20, 50)]) == 100  # one tensor in the place of another
    assert tflite_arena.covered([(0, 10), (1000, 1010)]) == 20  # two allocations


def test_the_model_s_file_is_found_in_the_maps(tmp_path: Path) -> None:
    model = tmp_path / "a model.tflite"
    model.touch()
    text = (
        "55d0a000-55d0b000 rw-p 00000000 00:00 0                          [heap]\n"
        f"7f00a000-7f00c000 r--p 00000000 08:01 42                         {model}\n"
        "7f00c000-7f00d000 rw-p 00000000 00:00 0 \n"
    )
    assert tflite_arena.mappings(text, model) == [(0x7F00A000, 0x7F00C000)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="asks a copy of the process")
def test_what_goes_wrong_in_the_copy_costs_the_figure_alone() -> None:
    assert tflite_arena.in_copy(lambda: 42) == 42
    assert tflite_arena.in_copy(lambda: None) is None
    assert tflite_arena.in_copy(lambda: os.kill(os.getpid(), signal.SIGSEGV)) is None

    def fail() -> int:
        raise ValueError("no tensor")

    assert tflite_arena.in_copy(fail) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="asks a copy of the process")
def test_a_copy_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite_arena, "PATIENCE_SECONDS", 1)

    def hang() -> int:
        time.sleep(3600)
        return 0

    assert tflite_arena.in_copy(hang) is None


def test_without_proc_nothing_is_told(tmp_path: Path) -> None:
    assert tflite_arena.used_bytes(object(), tmp_path / "model", tmp_path / "no-maps") is None
