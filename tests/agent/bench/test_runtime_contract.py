"""What every engine keeps to. A new engine adds a line to SUBJECTS and passes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import inputs, runtimes
from boardbench.agent.bench.events import to_json
from boardbench.agent.bench.runtime import (
    InputsRejected,
    LoadedModel,
    ModelRejected,
    OptionRejected,
    ProfileRequest,
    Runtime,
    RuntimeUnavailable,
)
from boardbench.agent.domain import Evidence, Unit, Verdict

from . import models, standins, torch_models


@dataclass(frozen=True)
class Subject:
    """An engine, and two models of [batch, 4] floats for it: one closed, one with an open batch."""

    name: str
    suffix: str
    closed: Callable[[], bytes]
    open: Callable[[], bytes] | None
    ops: int = 2
    shape: tuple[int, ...] = (1, 4)
    threads: bool = True
    """Whether it can be told a number of threads."""
    device: str = "cpu"
    """The default, which is the first that it names."""
    standin: Callable[[pytest.MonkeyPatch], None] | None = None
    """Puts a stand-in in the place of an engine that does not run on this machine."""


SUBJECTS = (
    Subject("fake", ".fake", models.fake, lambda: models.fake(batch=-1)),
    Subject("tflite", ".tflite", models.tflite_affine, lambda: models.tflite_affine(batch=-1)),
    Subject("onnxruntime", ".onnx", models.onnx_affine, lambda: models.onnx_affine(batch="N")),
    # Relu and Add become one operation of its executed graph.
    Subject("openvino", ".onnx", models.onnx_affine, lambda: models.onnx_affine(batch="N"), ops=1),
    # A bundled input tells its sizes; others are given with the run.
    Subject("torch", ".ptl", torch_models.ptl_affine, None),
    # Which dimensions are open its files do not say, only that some are.
    Subject("executorch", ".pte", torch_models.pte_affine, None),
    # Compiled for one size and one number of threads.
    Subject("ell", ".so", models.ell_affine, None, ops=1, shape=(1, 1, 4), threads=False),
    Subject(
        "tensorrt",
        ".onnx",
        models.onnx_affine,
        lambda: models.onnx_affine(batch="N"),
        threads=False,
        device="gpu",
        standin=standins.tensorrt,
    ),
    Subject(
        "coreml",
        ".mlpackage.zip",
        models.coreml_affine,
        lambda: models.coreml_affine(batch=-1),
        threads=False,
        standin=standins.coremltools,
    ),
)
WITH_OPEN_SIZES = pytest.mark.parametrize(
    "subject", [each for each in SUBJECTS if each.open], ids=lambda subject: subject.name, indirect=True
)


def test_every_engine_of_the_table_is_tested() -> None:
    assert {subject.name for subject in SUBJECTS} == {engine.name for engine in runtimes.ENGINES}


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def subject(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setenv("BOARDBENCH_FAKE_RUNTIME", "1")
    monkeypatch.setenv("BOARDBENCH_NATIVE_MODELS", "1")
    found: Subject = request.param
    if found.standin is not None:
        found.standin(monkeypatch)
    return found


@pytest.fixture
def runtime(subject: Subject) -> Runtime:
    made = runtimes.create(subject.name)
    try:
        made.version()
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
    return made


@pytest.fixture
def file(subject: Subject, tmp_path: Path) -> Path:
    path = tmp_path / f"closed{subject.suffix}"
    path.write_bytes(subject.closed())
    return path


@pytest.fixture
def open_file(subject: Subject, tmp_path: Path) -> Path:
    assert subject.open is not None, "a test with this is for those of WITH_OPEN_SIZES"
    path = tmp_path / f"open{subject.suffix}"
    path.write_bytes(subject.open())
    return path


def load(runtime: Runtime, file: Path, **changes: Any) -> LoadedModel:
    device = runtime.devices()[0]
    arguments: dict[str, Any] = {"device": device, "threads": None, "options": {}, "shapes": {}, **changes}
    return runtime.load(file, **arguments)


@pytest.fixture
def model(runtime: Runtime, file: Path) -> Iterator[LoadedModel]:
    loaded = load(runtime, file)
    yield loaded
    loaded.close()


def ran(model: LoadedModel, seed: int = 0) -> dict[str, Any]:
    return dict(model.fetch(model.bind(inputs.seeded(model.inputs, seed))()))


def test_it_names_itself_as_the_table_does(runtime: Runtime, subject: Subject) -> None:
    engine = next(engine for engine in runtimes.ENGINES if engine.name == subject.name)
    assert (runtime.name, runtime.formats) == (engine.name, engine.formats)


def test_its_version_is_package_and_number(runtime: Runtime) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9-]+ \d[\w.+-]*", runtime.version())
    assert runtime.version() == runtime.version()


def test_it_has_its_default_first(runtime: Runtime, subject: Subject) -> None:
    devices = runtime.devices()
    assert devices[0] == subject.device
    assert len(set(devices)) == len(devices)
    assert all(device == device.lower() for device in devices)


def test_tensors_are_told_whole(model: LoadedModel, subject: Subject) -> None:
    for tensors in (model.inputs, model.outputs):
        names = [tensor.name for tensor in tensors]
        assert all(names)
        assert len(set(names)) == len(names)
        for tensor in tensors:
            assert np.dtype(tensor.dtype).name == tensor.dtype
            assert tensor.shape == subject.shape


def test_outputs_are_as_they_were_announced(model: LoadedModel) -> None:
    outputs = ran(model)
    assert set(outputs) == {tensor.name for tensor in model.outputs}
    for tensor in model.outputs:
        assert outputs[tensor.name].dtype.name == tensor.dtype
        assert outputs[tensor.name].shape == tensor.shape


# The fake engine's outputs are a pattern.
@pytest.mark.parametrize("subject", SUBJECTS[1:], ids=lambda subject: subject.name, indirect=True)
def test_real_engines_compute(model: LoadedModel) -> None:
    (tensor,) = model.inputs
    feed = np.array([-2.0, -1.0, 0.5, 3.0], np.float32).reshape(tensor.shape)
    (output,) = model.fetch(model.bind({tensor.name: feed})()).values()
    assert np.array_equal(output, np.maximum(feed, 0) + feed)


def test_equal_feeds_give_equal_outputs_call_after_call(model: LoadedModel) -> None:
    call = model.bind(inputs.seeded(model.inputs, 1))
    first = dict(model.fetch(call()))
    for _ in range(3):
        again = model.fetch(call())
        assert all(np.array_equal(first[name], again[name]) for name in first)


def test_fetch_is_of_the_latest_inference(model: LoadedModel) -> None:
    first, second = ran(model, seed=1), ran(model, seed=2)
    assert not all(np.array_equal(first[name], second[name]) for name in first)


def test_what_was_fetched_is_a_copy(model: LoadedModel) -> None:
    call = model.bind(inputs.seeded(model.inputs, 1))
    returned = call()
    first = dict(model.fetch(returned))
    kept = {name: array.copy() for name, array in first.items()}
    for array in first.values():
        array.fill(7)
    again = model.fetch(returned)
    assert all(np.array_equal(kept[name], again[name]) for name in kept)


def test_feeds_are_not_changed(model: LoadedModel) -> None:
    feeds = inputs.seeded(model.inputs, 1)
    before = {name: array.copy() for name, array in feeds.items()}
    model.bind(feeds)()
    assert all(np.array_equal(before[name], feeds[name]) for name in feeds)


def test_two_models_do_not_disturb_each_other(runtime: Runtime, file: Path) -> None:
    one, other = load(runtime, file), load(runtime, file)
    call_one = one.bind(inputs.seeded(one.inputs, 1))
    call_other = other.bind(inputs.seeded(other.inputs, 2))
    alone = dict(one.fetch(call_one()))
    returned = call_one()
    call_other()
    together = one.fetch(returned)
    assert all(np.array_equal(alone[name], together[name]) for name in alone)
    one.close()
    assert other.fetch(call_other())
    other.close()


def test_the_placement_adds_up(model: LoadedModel, subject: Subject) -> None:
    ran(model)
    found = model.placement()
    assert found.detail
    if found.evidence is Evidence.UNSPECIFIED:
        assert (found.ops, found.units, found.accelerated_ops, found.cpu_ops) == ((), (), None, None)
        assert found.verdict is Verdict.UNSPECIFIED
        return
    assert found.evidence in (Evidence.PARTITION, Evidence.PROFILED)
    assert [op.index for op in found.ops] == list(range(len(found.ops)))
    assert all(op.type for op in found.ops)
    if found.evidence is Evidence.PARTITION:
        assert len(found.ops) == subject.ops
    units = Counter(op.unit for op in found.ops)
    assert {count.unit: count.ops for count in found.units} == units
    assert found.cpu_ops == units[Unit.CPU] + units[Unit.CPU_DELEGATE]
    assert found.accelerated_ops == len(found.ops) - (found.cpu_ops or 0) - units[Unit.UNSPECIFIED]
    assert sum(found.cpu_op_types.values()) == found.cpu_ops
    assert sum(found.accelerated_op_types.values()) == found.accelerated_ops
    assert all(
        (op.delegate == "") == (op.unit in (Unit.CPU, Unit.UNSPECIFIED)) or found.standin for op in found.ops
    )
    assert to_json(found)["evidence"] == found.evidence.value


def test_a_placement_is_the_same_when_asked_again(model: LoadedModel) -> None:
    ran(model)
    assert model.placement() == model.placement()


def test_the_cpu_is_no_device_to_fall_back_from(model: LoadedModel, subject: Subject) -> None:
    assert bool(model.wanted) == (subject.device != "cpu")
    assert model.device_fallback == ""


def test_a_profile_is_of_the_operations_of_the_placement(
    runtime: Runtime, subject: Subject, file: Path
) -> None:
    loaded = load(runtime, file)
    profiles = loaded.profiles
    ran(loaded)
    units = tuple(op.unit for op in loaded.placement().ops)
    loaded.close()
    profiler = runtimes.profiler(subject.name)
    if not profiles:
        return
    assert profiler is not None
    tried: list[str] = []
    request = ProfileRequest(
        model_path=file,
        device=subject.device,
        threads=None,
        options={},
        shapes={},
        allow_fallback=False,
        feeds=lambda tensors: inputs.seeded(tensors, 0),
        trying=tried.append,
    )
    found = profiler(runtime, request, lambda: range(7))
    assert found.units == units
    assert len(found.whole_seconds) == 7
    assert all(seconds > 0 for seconds in found.whole_seconds)
    # Of the CPU there is nothing to fall back from, and here everything is where it was asked to be.
    assert found.fallback_seconds == (() if subject.device == "cpu" else (0.0,) * 7)
    assert set(found.op_seconds) <= set(range(len(units)))
    assert all(seconds >= 0 for seconds in found.op_seconds.values())
    assert found.method
    assert found.detail
    assert tried  # before each step that may end the process


def test_closing_twice_is_closing_once(runtime: Runtime, file: Path) -> None:
    loaded = load(runtime, file)
    ran(loaded)
    loaded.close()
    loaded.close()


@WITH_OPEN_SIZES
def test_an_open_size_that_nobody_settled_is_listed_with_its_option(
    runtime: Runtime, open_file: Path
) -> None:
    with pytest.raises(InputsRejected, match=r"float32 \[\?, 4\]; give them, for example --shape '.+=1,4'"):
        load(runtime, open_file)


@WITH_OPEN_SIZES
def test_an_open_size_is_settled_by_name_or_position(runtime: Runtime, open_file: Path, file: Path) -> None:
    closed = load(runtime, file)
    (name,) = (tensor.name for tensor in closed.inputs)
    closed.close()
    for key in (name, "arr_0"):
        loaded = load(runtime, open_file, shapes={key: (3, 4)})
        assert [tensor.shape for tensor in loaded.inputs] == [(3, 4)]
        (output,) = ran(loaded).values()
        assert output.shape == (3, 4)
        loaded.close()


@pytest.mark.parametrize(
    "shapes", [{"nosuch": (1, 4)}, {"arr_0": (1, 5)}, {"arr_0": (4,)}, {"arr_1": (1, 4)}]
)
@WITH_OPEN_SIZES
def test_shapes_that_do_not_fit_are_refused(
    runtime: Runtime, open_file: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(InputsRejected):
        load(runtime, open_file, shapes=shapes)


@WITH_OPEN_SIZES
def test_a_shape_of_more_memory_than_there_is_is_refused(runtime: Runtime, open_file: Path) -> None:
    with pytest.raises(InputsRejected, match="bytes of memory are available"):
        load(runtime, open_file, shapes={"arr_0": (2**31 - 1, 4)})


def test_an_unknown_option_is_refused_by_name(runtime: Runtime, file: Path) -> None:
    with pytest.raises(OptionRejected, match="no option no_such_option; it takes"):
        load(runtime, file, options={"no_such_option": "1"})


def test_an_unknown_device_is_refused_with_those_that_there_are(
    runtime: Runtime, file: Path, subject: Subject
) -> None:
    with pytest.raises(OptionRejected, match=f"no device 'no-such-device'; it has {subject.device}"):
        load(runtime, file, device="no-such-device")


def test_options_in_force_can_be_given_again(runtime: Runtime, file: Path) -> None:
    first = load(runtime, file)
    options = dict(first.options)
    first.close()
    assert options
    again = load(runtime, file, options=options)
    assert again.options == options
    again.close()


def test_threads_are_recorded(runtime: Runtime, file: Path, subject: Subject) -> None:
    if not subject.threads:
        with pytest.raises(OptionRejected, match="threads"):
            load(runtime, file, threads=2)
        return
    loaded = load(runtime, file, threads=2)
    assert loaded.threads == 2
    loaded.close()


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\0" * 64, bytes(range(256))])
def test_what_is_no_model_is_refused_by_its_name(runtime: Runtime, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "nonsense.bin"
    file.write_bytes(content)
    with pytest.raises(ModelRejected, match=r"nonsense\.bin"):
        load(runtime, file)


def test_a_file_that_is_not_there_is_refused_by_its_name(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match=r"absent\.bin"):
        load(runtime, tmp_path / "absent.bin")
