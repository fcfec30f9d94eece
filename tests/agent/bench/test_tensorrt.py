"""TensorRT, through fakes of its package and of libcudart: see tests/tensorrt. No GPU has run this."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import cudart, inputs, runtimes
from boardbench.agent.bench.runtime import (
    InputsRejected,
    ModelRejected,
    NoProfile,
    OptionRejected,
    ProfileRequest,
    RuntimeUnavailable,
    TimesTransfers,
)
from boardbench.agent.bench.runtimes import tensorrt as engine
from boardbench.agent.domain import Evidence, Severity, Unit, Verdict
from boardbench.inspect.sniff import sniff
from boardbench.testkit.child import BRIEF

from . import models, standins

FEED = np.array([[-2.0, -1.0, 0.5, 3.0]], np.float32)
Load = Callable[..., Any]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    standins.tensorrt(monkeypatch, **getattr(request, "param", {}))
    return engine.TensorRtRuntime()


@pytest.fixture
def load(runtime: Any, tmp_path: Path) -> Any:
    opened = []

    def begin(content: bytes | None = None, **changes: Any) -> Any:
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}.bin"
        path.write_bytes(models.onnx_affine() if content is None else content)
        arguments = {"device": "gpu", "threads": None, "options": {}, "shapes": {}, **changes}
        opened.append(runtime.load(path, **arguments))
        return opened[-1]

    yield begin
    for model in opened:
        model.close()


JETSON = pytest.mark.parametrize("runtime", [{"dla": 2}], indirect=True)


def softmaxed() -> bytes:
    """Relu, Softmax, Relu: the DLA of the fake takes no Softmax."""
    import onnx
    from onnx import helper

    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in "xy")
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Softmax", ["a"], ["b"], name="soft"),
        helper.make_node("Relu", ["b"], ["y"], name="last"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y])
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())


def quantised() -> bytes:
    """QuantizeLinear and DequantizeLinear around nothing."""
    import onnx
    from onnx import helper

    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in "xy")
    scale = helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [0.5])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"], name="dq"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [scale])
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())


def computed(model: Any, feed: Any = FEED) -> Any:
    (tensor,) = model.inputs
    (output,) = model.fetch(model.bind({tensor.name: feed})()).values()
    return output


def built(load: Load, folder: Path, **changes: Any) -> bytes:
    """An engine, as a cache keeps it."""
    load(**{"options": {"cache_dir": os.fspath(folder)}, **changes}).close()
    (kept,) = folder.iterdir()
    return kept.read_bytes()


# ---- whether it is here ----------------------------------------------------------------------------------


def test_without_the_package_it_says_where_to_get_it() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"no TensorRT in .*apt install python3-libnvinfer"):
        runtimes.create("tensorrt").version()


def test_without_cuda_it_says_what_is_missing(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOARDBENCH_CUDART", standins.cudart())
    import tensorrt  # noqa: F401 - it needs the library itself

    monkeypatch.setenv("BOARDBENCH_CUDART", "libcudart-that-is-not-there.so")
    with pytest.raises(
        RuntimeUnavailable, match=r"has no GPU to run on: CUDA's runtime library can't be loaded"
    ):
        runtime.version()


def test_without_a_gpu_it_says_what_cuda_says(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_CUDA_NO_DEVICE", "1")
    with pytest.raises(RuntimeUnavailable, match="no CUDA-capable device is detected"):
        runtime.version()


@pytest.mark.parametrize(
    ("runtime", "devices"), [({}, ("gpu",)), ({"dla": 2}, ("gpu", "dla"))], indirect=["runtime"]
)
def test_the_dla_is_a_device_where_there_is_one(runtime: Any, devices: tuple[str, ...]) -> None:
    assert runtime.devices() == devices


# ---- running ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runtime", [{"version": each} for each in ("8.5.2", "8.6.2", "10.3.0", "11.0.0")], indirect=True
)
@pytest.mark.parametrize("memory", ["pinned", "pageable"])
def test_it_computes(load: Load, memory: str) -> None:
    model = load(options={"host_memory": memory})
    assert np.array_equal(computed(model), np.maximum(FEED, 0) + FEED)
    assert model.arena_bytes() == 4096


def test_outputs_are_in_host_memory_when_the_call_returns(load: Load) -> None:
    model = load()
    call = model.bind({"x": FEED})
    for scale in (1, 2):
        model._arrays["x"][...] = FEED * scale
        call()
        assert np.array_equal(model.fetch(None)["y"], (np.maximum(FEED, 0) + FEED) * scale)


def test_an_engine_is_loaded_as_it_is(load: Load, tmp_path: Path) -> None:
    content = built(load, tmp_path / "cache")
    path = tmp_path / "pushed"
    path.write_bytes(content)
    assert sniff(path) == "tensorrt"
    model = load(content)
    assert np.array_equal(computed(model), np.maximum(FEED, 0) + FEED)
    assert model.placement().detail.endswith("the engine as it was pushed")


def test_the_head_that_ultralytics_writes_is_skipped(load: Load, tmp_path: Path) -> None:
    content = built(load, tmp_path / "cache")
    about = b'{"stride": 32}'
    model = load(len(about).to_bytes(4, "little") + about + content)
    assert np.array_equal(computed(model), np.maximum(FEED, 0) + FEED)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content[:40], "magic tag does not match"),
        (lambda content: content.replace(b"10.13.0.35", b"10.12.0.35"), "not compatible with this version"),
    ],
)
def test_an_engine_of_elsewhere_is_refused(
    load: Load, tmp_path: Path, change: Callable[[bytes], bytes], told: str
) -> None:
    content = change(built(load, tmp_path / "cache"))
    with pytest.raises(ModelRejected, match=rf"push the \.onnx to have it built here .*{told}"):
        load(content)


def test_an_engine_takes_no_option_of_a_build(load: Load, tmp_path: Path) -> None:
    content = built(load, tmp_path / "cache")
    with pytest.raises(OptionRejected, match=r"precision, timing_cache: for building"):
        load(content, options={"precision": "f16", "timing_cache": os.fspath(tmp_path / "t")})


def test_an_engine_of_other_sizes_names_those_that_it_was_built_for(load: Load, tmp_path: Path) -> None:
    content = built(load, tmp_path / "cache", content=models.onnx_affine(batch="N"), shapes={"x": (2, 4)})
    assert computed(load(content, shapes={"x": (2, 4)}), np.ones((2, 4), np.float32)).shape == (2, 4)
    with pytest.raises(InputsRejected, match=r"from \[2, 4\] to \[2, 4\], and not for \[3, 4\]"):
        load(content, shapes={"x": (3, 4)})


def test_memory_of_the_gpu_that_is_full_is_told_as_such(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_CUDA_BYTES", "8")
    with pytest.raises(MemoryError, match="out of memory"):
        load()


def test_all_memory_is_given_back(load: Load, runtime: Any) -> None:
    library = ctypes.CDLL(standins.cudart())
    library.boardbench_taken.restype = ctypes.c_size_t
    before = library.boardbench_taken()
    model = load()
    computed(model)
    computed(model)
    assert library.boardbench_taken() > before
    model.close()
    model.close()
    assert library.boardbench_taken() == before


def test_an_address_of_the_gpu_is_none_of_the_host(runtime: Any) -> None:
    cuda = cudart.load()
    stream, device = cuda.stream(), cuda.malloc(16)
    assert cuda.upload(device, device, 16, stream)() == 0
    assert cuda.download(FEED.ctypes.data, FEED.ctypes.data, 16, stream)() == 1
    with pytest.raises(cudart.CudaError, match="CUDA error 1: invalid argument"):
        cuda.check(cuda.upload(device, FEED.ctypes.data, 17, stream)())


# ---- building --------------------------------------------------------------------------------------------


def plan(tmp_path: Path) -> str:
    (kept,) = (tmp_path / "cache").iterdir()
    return kept.read_bytes()[24:].decode()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, '"flags": ["TF32"]'),
        ({"precision": "f16"}, '"flags": ["FP16", "TF32"]'),
        ({"precision": "bf16", "tf32": "off"}, '"flags": ["BF16"]'),
        ({"workspace_mib": "64"}, '"workspace": 67108864'),
        ({"optimization_level": "1"}, '"level": 1'),
    ],
)
def test_an_option_reaches_the_builder(
    load: Load, tmp_path: Path, options: dict[str, str], told: str
) -> None:
    model = load(options={"cache_dir": os.fspath(tmp_path / "cache"), **options})
    assert told in plan(tmp_path)
    assert model.options == {
        "cache_dir": os.fspath(tmp_path / "cache"),
        "precision": "default",
        "tf32": "on",
        "dla_fallback": "on",
        "host_memory": "pinned",
        **options,
    }


def test_a_first_load_and_a_cached_one_say_which_they_are(load: Load, tmp_path: Path) -> None:
    options = {"cache_dir": os.fspath(tmp_path / "cache"), "timing_cache": os.fspath(tmp_path / "times")}
    first = load(options=options).placement().detail
    times = tmp_path / "times"
    assert re.search(rf"a first load: .* built in \d+\.\d s with the timing cache {times} of 0 bytes", first)
    cached = load(options=options).placement().detail
    (kept,) = (tmp_path / "cache").iterdir()
    assert f"a cached load: the engine comes from {kept}" in cached
    again = load(options={"timing_cache": os.fspath(times)}).placement().detail
    assert f"with the timing cache {times} of {times.stat().st_size // 2} bytes" in again


@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"precision": "f16"}},
        {"content": models.onnx_affine},
        {"shapes": {"x": (3, 4)}},
    ],
)
def test_a_cached_engine_is_of_the_same_model_options_and_sizes(
    load: Load, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "cache"
    first = {"content": models.onnx_affine(batch="N"), "shapes": {"x": (2, 4)}, "options": {}}
    for each in (first, {**first, **changes}):
        content = each["content"]() if callable(each["content"]) else each["content"]
        shapes = {} if callable(each["content"]) else each["shapes"]
        load(content, shapes=shapes, options={"cache_dir": os.fspath(folder), **each["options"]})
    assert len(list(folder.iterdir())) == 2


def test_a_broken_file_in_the_cache_is_built_again(load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    whole = built(load, folder)
    (kept,) = folder.iterdir()
    kept.write_bytes(whole[:50])
    assert "a first load" in load(options={"cache_dir": os.fspath(folder)}).placement().detail
    assert kept.read_bytes() == whole


def test_a_cache_that_can_not_be_written_is_named(load: Load, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OptionRejected, match=r"cache_dir: .*file"):
        load(options={"cache_dir": os.fspath(tmp_path / "file")})


def test_eight_bits_need_scales(load: Load, tmp_path: Path) -> None:
    with pytest.raises(OptionRejected, match="has no Q/DQ nodes"):
        load(options={"precision": "i8"})
    assert np.array_equal(computed(load(quantised(), options={"precision": "f16+i8"})), FEED)
    scales = tmp_path / "scales"
    options = {"precision": "i8", "calibration_cache": os.fspath(scales)}
    with pytest.raises(OptionRejected, match="is not there"):
        load(options=options)
    scales.write_bytes(b"TRT-101300-EntropyCalibration2\nx: 3c010a14\n")
    load(options={**options, "cache_dir": os.fspath(tmp_path / "cache")})
    assert f'"scales": {scales.stat().st_size}' in plan(tmp_path)
    with pytest.raises(OptionRejected, match="ask for precision=i8, too"):
        load(options={"calibration_cache": os.fspath(scales)})


@pytest.mark.parametrize(
    ("runtime", "option", "told"),
    [
        ({"version": "8.6.2"}, {"precision": "bf16"}, "has no flag BF16"),
        ({"version": "11.0.0"}, {"precision": "f16"}, "has no flag FP16"),
        ({"version": "8.5.2"}, {"optimization_level": "1"}, "has no optimization_level"),
    ],
    indirect=["runtime"],
)
def test_what_a_version_does_not_have_is_refused(load: Load, option: dict[str, str], told: str) -> None:
    with pytest.raises(OptionRejected, match=told):
        load(options=option)


def test_an_operation_that_it_does_not_have_is_named(load: Load) -> None:
    with pytest.raises(ModelRejected, match=r"operation that this version does not have .*op: Unique"):
        load(models.onnx_of_node("Unique"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device": "cpu"}, "no device 'cpu'; it has gpu"),
        ({"device": "dla"}, "no DLA 0"),
        ({"options": {"dla": "0"}}, "ask for it with --device dla"),
        ({"threads": 2}, "leave --threads out"),
    ],
)
def test_what_it_does_not_take_is_refused(load: Load, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionRejected, match=told):
        load(**changes)


# ---- where it runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", [{"version": "8.6.2"}, {"version": "10.3.0"}], indirect=True)
def test_every_layer_is_on_the_gpu_in_its_precision(load: Load) -> None:
    found = load(options={"precision": "f16"}).placement()
    assert [(op.type, op.name, op.unit, op.delegate) for op in found.ops] == [
        ("Activation", "relu", Unit.GPU, "GPU"),
        ("ElementWise", "add", Unit.GPU, "GPU"),
    ]
    assert (found.evidence, found.verdict, found.standin) == (
        Evidence.PARTITION,
        Verdict.ACCELERATED,
        True,
    )
    assert "2 on the GPU; as executed 2 in f16" in found.detail
    assert "standin-cuda takes the place of CUDA" in found.detail


def test_a_stand_in_makes_the_run_invalid(load: Load) -> None:
    watch = load().watch
    assert [(doubt.code, doubt.severity) for doubt in watch.doubts()] == [("standin", Severity.INVALID)]
    outcome = watch.outcome(
        load().placement(), runs=1, cpu_seconds=1.0, wall_seconds=1.0, queued_seconds=None
    )
    assert outcome.accelerator.standin
    assert outcome.placement.standin


@pytest.mark.parametrize(
    ("verbosity", "runtime", "evidence", "told"),
    [
        ("LAYER_NAMES_ONLY", {}, Evidence.PARTITION, "2 on the GPU"),
        ("LAYER_NAMES_ONLY", {"dla": 1}, Evidence.PARTITION, "2 on the no known unit"),
        ("NONE", {}, Evidence.UNSPECIFIED, "without a word about its layers"),
    ],
    indirect=["runtime"],
)
def test_an_engine_that_tells_little_is_known_as_little(
    load: Load, tmp_path: Path, verbosity: str, evidence: Evidence, told: str
) -> None:
    content = built(load, tmp_path / "cache").replace(b'"DETAILED"', f'"{verbosity}"'.encode())
    found = load(content).placement()
    assert found.evidence is evidence
    assert told in found.detail


@JETSON
def test_what_the_dla_does_not_take_falls_back_to_the_gpu_and_is_told(load: Load) -> None:
    model = load(softmaxed(), device="dla", options={"precision": "f16", "dla": "1"})
    expected = np.exp(np.maximum(FEED, 0))
    assert np.allclose(computed(model), expected / expected.sum())
    found = model.placement()
    assert [(op.type, op.unit, op.delegate, op.cause) for op in found.ops] == [
        ("DLA", Unit.NPU, "DLA", ""),
        ("SoftMaxV2", Unit.GPU, "GPU", "the DLA does not take it"),
        ("DLA", Unit.NPU, "DLA", ""),
    ]
    assert (found.verdict, found.accelerated_ops) == (Verdict.PARTLY, 3)
    assert "1 fell back from the DLA to the GPU" in found.detail


@JETSON
@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (softmaxed, {"precision": "f16", "dla_fallback": "off"}, "dla_fallback=on lets the GPU take"),
        (softmaxed, {}, "give --option precision=f16"),
        (
            lambda: models.onnx_of_node("Softmax"),
            {"precision": "f16"},
            "takes no layer of it; .*--allow-fallback",
        ),
    ],
)
def test_what_the_dla_takes_nothing_of_is_refused(
    load: Load, content: Callable[[], bytes], options: dict[str, str], told: str
) -> None:
    with pytest.raises(ModelRejected, match=told):
        load(content(), device="dla", options=options)


@JETSON
def test_a_dla_that_takes_nothing_can_be_allowed(load: Load) -> None:
    model = load(
        models.onnx_of_node("Softmax"), device="dla", options={"precision": "f16"}, allow_fallback=True
    )
    assert "all runs on the GPU: the DLA takes no layer" in model.device_fallback
    assert model.placement().verdict is Verdict.NOT_ACCELERATED


def test_a_dla_that_is_not_there_can_be_allowed(load: Load) -> None:
    model = load(device="dla", allow_fallback=True)
    assert "all runs on the GPU: this board has no DLA 0 (it has 0)" in model.device_fallback
    assert np.array_equal(computed(model), np.maximum(FEED, 0) + FEED)


# ---- how long it takes -----------------------------------------------------------------------------------


def request(path: Path, **changes: Any) -> ProfileRequest:
    fields: dict[str, Any] = {
        "model_path": path,
        "device": "gpu",
        "threads": None,
        "options": {},
        "shapes": {},
        "allow_fallback": False,
        "feeds": lambda tensors: inputs.seeded(tensors, 0),
        "trying": lambda _method: None,
        **changes,
    }
    return ProfileRequest(**fields)


def test_the_profile_tells_transfers_from_the_engine(runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(models.onnx_affine())
    found = engine.profile(runtime, request(path), lambda: range(5))
    assert re.fullmatch(
        r"5 inferences by CUDA events: \d+\.\d{3} ms to the GPU, \d+\.\d{3} ms in the engine, \d+\.\d{3} ms "
        r"back; 5 more under IProfiler: 2 of 2 layers have a time of their own",
        found.detail,
    )
    assert set(found.op_seconds) == {0, 1}
    assert all(seconds > 0 for seconds in found.op_seconds.values())
    assert found.fallback_seconds == (0.0,) * 5


def test_the_result_tells_copies_from_computing_and_that_a_stand_in_did(load: Load) -> None:
    model = load()
    call = model.bind({"x": FEED})
    call()
    assert isinstance(model, TimesTransfers)
    told = model.transfers({"x": FEED})
    assert told is not None
    assert 5 <= told.inferences <= 50
    assert min(told.to_device_seconds, told.compute_seconds, told.from_device_seconds) >= 0
    assert re.fullmatch(r"CUDA events of standin-\S+, no hardware", told.method)


def test_the_split_ends_by_its_time_and_not_before_there_is_a_median() -> None:
    assert len(list(engine._turns(lambda: 0.0))) == 50
    ticks = iter(range(0, 1000, 10))
    assert len(list(engine._turns(lambda: float(next(ticks))))) == 5


def test_the_split_is_of_whole_inferences(load: Load) -> None:
    model = load()
    parts = model.split({"x": FEED}, range(3))
    assert np.array_equal(model.fetch(None)["y"], np.maximum(FEED, 0) + FEED)
    assert len(parts) == 3
    assert all(into >= 0 and through > 0 and out >= 0 for into, through, out in parts)


@JETSON
def test_the_time_of_what_fell_back_is_told(runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(softmaxed())
    found = engine.profile(
        runtime, request(path, device="dla", options={"precision": "f16"}), lambda: range(5)
    )
    assert all(
        0 < part < whole for part, whole in zip(found.fallback_seconds, found.whole_seconds, strict=True)
    )


def test_a_worker_runs_it_and_says_that_it_is_a_stand_in(worker: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(softmaxed())
    job = {
        "kind": "run",
        "runtime": "tensorrt",
        "format": "onnx",
        "model_path": os.fspath(path),
        "device": "dla",
        "options": {"precision": "f16"},
        **BRIEF,
        "profile_runs": 10,
    }
    outcome = worker.run(job, environ=standins.tensorrt_environment(dla=1))
    result, (profiled,) = outcome.result, outcome.of("profile")
    assert result["runtime"]["version"] == "tensorrt 10.13.0.35"
    assert (result["placement"]["standin"], result["accelerator"]["standin"]) == (True, True)
    assert result["placement"]["verdict"] == "PLACEMENT_VERDICT_PARTLY"
    assert result["memory"]["arena_bytes"] == 4096
    assert "standin" in [event["warning"]["code"] for event in outcome.of("warning")]
    placed = profiled["placement"]
    assert all(op["seconds"] > 0 for op in placed["ops"])
    assert 0 < placed["fallback_cost"]["share"] < 1
    assert any("ms in the engine" in report["detail"] for report in placed["evidence_reports"])


def test_a_profiler_that_ended_the_process_is_not_tried_again(runtime: Any, tmp_path: Path) -> None:
    with pytest.raises(NoProfile):
        engine.profile(runtime, request(tmp_path / "m", avoid=(engine.METHOD,)), lambda: range(5))
