"""OpenVINO: its formats, its plugins, what it says about operations, and that it computes what others do."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import inputs, runtimes
from boardbench.agent.bench.runtime import (
    InputsRejected,
    ModelRejected,
    OptionRejected,
    ProfileRequest,
    RuntimeUnavailable,
)
from boardbench.agent.bench.runtimes import openvino
from boardbench.agent.domain import Evidence, Unit, Verdict

from . import models

MOBILENET = "mobilenet_v1_0.25_128_quant.tflite"


@pytest.fixture
def runtime() -> openvino.OpenVinoRuntime:
    found = openvino.OpenVinoRuntime()
    try:
        found.version()
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
    return found


@pytest.fixture
def load(runtime: openvino.OpenVinoRuntime) -> Callable[..., Any]:
    def begin(path: Path, **changes: Any) -> Any:
        arguments = {"device": "cpu", "threads": None, "options": {}, "shapes": {}, **changes}
        return runtime.load(path, **arguments)

    return begin


@pytest.fixture
def affine(tmp_path: Path) -> Path:
    path = tmp_path / "0123456789abcdef"  # as the store names it: without a suffix
    path.write_bytes(models.onnx_affine())
    return path


@pytest.fixture
def archive(tmp_path: Path, affine: Path) -> Path:
    """OpenVINO's own format, as the client packs it."""
    import openvino as engine

    core = engine.Core()
    source = tmp_path / "affine.onnx"
    source.symlink_to(affine)
    engine.save_model(core.read_model(str(source)), str(tmp_path / "affine.xml"), compress_to_fp16=False)
    path = tmp_path / "packed"
    with zipfile.ZipFile(path, "w") as packed:
        for name in ("affine.xml", "affine.bin"):
            packed.write(tmp_path / name, name)
    return path


def computed(model: Any, feed: Any) -> Any:
    (tensor,) = model.inputs
    (output,) = model.fetch(model.bind({tensor.name: feed})()).values()
    return output


FEED = np.array([[-2.0, -1.0, 0.5, 3.0]], np.float32)


@pytest.mark.parametrize("kind", ["affine", "archive", "pair"])
def test_every_format_computes(kind: str, load: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = request.getfixturevalue("archive" if kind == "pair" else kind)
    path = tmp_path / "affine.xml" if kind == "pair" else path
    assert np.array_equal(computed(load(path), FEED), np.maximum(FEED, 0) + FEED)


def test_a_tensorflow_lite_model_computes_what_its_own_engine_does(load: Any, shared_models: Path) -> None:
    path = shared_models / MOBILENET
    theirs = runtimes.create("tflite")
    theirs.version()
    other = theirs.load(path, device="cpu", threads=None, options={}, shapes={})
    mine = load(path, options={"precision": "f32"})
    feeds = inputs.seeded(mine.inputs, 3)
    found = np.asarray(next(iter(mine.fetch(mine.bind(feeds)()).values()))).astype(int)
    wanted = np.asarray(next(iter(other.fetch(other.bind(feeds)()).values()))).astype(int)
    assert [tensor.shape for tensor in mine.inputs] == [tensor.shape for tensor in other.inputs]
    # Both round at every layer, by rules of their own: some steps of 1/256 apart, and the same best classes.
    assert np.abs(found - wanted).max() <= 8
    assert set(np.argsort(found.ravel())[-1:]) <= set(np.argsort(wanted.ravel())[-5:])


def test_an_xml_alone_is_told_what_it_lacks(load: Any, archive: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.write_bytes((tmp_path / "affine.xml").read_bytes())
    with pytest.raises(ModelRejected, match=r"without its \.bin"):
        load(alone)


@pytest.mark.parametrize("names", [("a.xml",), ("a.xml", "b.xml", "a.bin"), ("a.bin",)])
def test_an_archive_of_something_else_is_refused(load: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    path = tmp_path / "packed"
    with zipfile.ZipFile(path, "w") as packed:
        for name in names:
            packed.writestr(name, "<net version='11'/>")
    with pytest.raises(ModelRejected, match=r"one \.xml and one \.bin"):
        load(path)


def test_names_in_an_archive_lead_nowhere(load: Any, archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    with zipfile.ZipFile(path, "w") as packed:
        packed.write(tmp_path / "affine.xml", "../../../escaped.xml")
        packed.write(tmp_path / "affine.bin", "/escaped.bin")
    assert np.array_equal(computed(load(path), FEED), np.maximum(FEED, 0) + FEED)
    assert not list(tmp_path.parent.glob("**/escaped.*"))


def test_the_executed_graph_says_where_and_in_what_precision(load: Any, shared_models: Path) -> None:
    found = load(shared_models / MOBILENET, options={"precision": "f32"}).placement()
    assert found.evidence is Evidence.PARTITION
    assert found.verdict is Verdict.NOT_ACCELERATED
    assert {op.unit for op in found.ops} == {Unit.CPU}
    assert sum(op.type == "Convolution" for op in found.ops) == 28
    assert "fused, on CPU" in found.detail and " in u8" in found.detail


def test_the_profile_has_a_time_for_operations(
    runtime: openvino.OpenVinoRuntime, shared_models: Path
) -> None:
    request = ProfileRequest(
        model_path=shared_models / MOBILENET,
        device="cpu",
        threads=1,
        options={},
        shapes={},
        allow_fallback=False,
        feeds=lambda tensors: inputs.seeded(tensors, 0),
        trying=lambda _method: None,
    )
    found = openvino.profile(runtime, request, lambda: range(7))
    assert len(found.whole_seconds) == 7
    assert found.fallback_seconds == (), "nothing but the CPU was asked for"
    assert len(found.op_seconds) > 20
    # The counters are of whole microseconds, and of the operations alone.
    assert 0 < sum(found.op_seconds.values()) < 1.2 * max(found.whole_seconds)


def test_auto_tells_what_it_chose(load: Any, affine: Path) -> None:
    found = load(affine, device="auto").placement()
    assert found.detail.endswith("on CPU; 1 in f32")
    assert found.verdict is Verdict.NOT_ACCELERATED, "AUTO chose the CPU, for want of anything else"


def test_hetero_of_the_cpu_alone_is_no_accelerator(load: Any, affine: Path) -> None:
    with pytest.raises(ModelRejected, match="takes nothing but the CPU"):
        load(affine, device="hetero")
    model = load(affine, device="hetero", allow_fallback=True)
    assert model.device_fallback.startswith("all runs on the CPU")
    found = model.placement()
    assert [(op.type, op.unit) for op in found.ops] == [("Relu", Unit.CPU), ("Add", Unit.CPU)]
    assert found.verdict is Verdict.NOT_ACCELERATED


def test_a_plugin_without_its_hardware_is_told_or_replaced(
    load: Any, affine: Path, runtime: openvino.OpenVinoRuntime
) -> None:
    if "npu" in runtime.devices():
        pytest.skip("this machine has an NPU")
    with pytest.raises(OptionRejected, match="no device 'npu'; it has cpu"):
        load(affine, device="npu")
    model = load(affine, device="npu", allow_fallback=True)
    assert model.device_fallback == "all runs on the CPU: OpenVINO has no NPU here"
    assert model.wanted == "NPU"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hint": "fast"}, "latency or throughput or none"),
        ({"precision": "int4"}, "default or f32"),
        ({"devices": "GPU"}, "is for auto and hetero"),
        ({"property.NO_SUCH": "1"}, "refuses an option"),
        ({"no_such": "1"}, "has no option no_such"),
    ],
)
def test_options_that_it_does_not_take_are_refused(
    load: Any, affine: Path, options: dict[str, str], told: str
) -> None:
    with pytest.raises(OptionRejected, match=told):
        load(affine, options=options)


def test_threads_are_those_asked_for(load: Any, affine: Path) -> None:
    model = load(affine, threads=1)
    assert model._compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_open_sizes_are_settled(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "open"
    path.write_bytes(models.onnx_affine(batch="N"))
    with pytest.raises(InputsRejected, match="leaves sizes open"):
        load(path)
    model = load(path, shapes={"x": (3, 4)})
    assert model.inputs[0].shape == (3, 4) and model.outputs[0].shape == (3, 4)


@pytest.mark.parametrize("content", [b"nonsense", b"\x08\x07nonsense" * 9, b""])
def test_no_model_is_refused(load: Any, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(ModelRejected, match="OpenVINO refuses bad"):
        load(path)
