"""Every engine with every common setting: it takes it, and that can be seen, or it is an error."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import caches, inputs, job, runtimes
from boardbench.agent.bench.jobline import Job, JobRejected
from boardbench.agent.bench.runtime import (
    CACHE,
    COMPUTE_PRECISION,
    PRECISIONS,
    SETTINGS,
    THREADS,
    KeepsCaches,
    LoadedModel,
    OptionRejected,
    Runtime,
    Settings,
)
from boardbench.agent.domain import CacheUse
from boardbench.testkit import Subject
from boardbench.testkit.child import BRIEF
from boardbench.testkit.contract import available

from . import models
from .test_runtime_contract import SUBJECTS

ENGINES = tuple(pytest.param(subject, id=subject.name) for subject in SUBJECTS)
TAKES = {
    "fake": {THREADS, COMPUTE_PRECISION, CACHE},
    "tflite": {THREADS},
    "onnxruntime": {THREADS, COMPUTE_PRECISION, CACHE},
    "openvino": {THREADS, COMPUTE_PRECISION, CACHE},
    "tensorrt": {COMPUTE_PRECISION, CACHE},
    "torch": {THREADS},
    "executorch": {THREADS},
    "coreml": set(),
    "ell": set(),
}


@pytest.fixture
def subject(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Subject:
    found: Subject = request.param
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    if found.standin is not None:
        found.standin(monkeypatch)
    return found


@pytest.fixture
def runtime(subject: Subject) -> Runtime:
    return available(runtimes.create(subject.name))


@pytest.fixture
def load(subject: Subject, runtime: Runtime, tmp_path: Path) -> Callable[..., LoadedModel]:
    path = tmp_path / f"model{subject.suffix}"
    path.write_bytes(subject.closed())

    def made(**changes: Any) -> LoadedModel:
        arguments = {"device": subject.device, "threads": None, "options": {}, "shapes": {}, **changes}
        return runtime.load(path, **arguments)

    return made


def asked(subject: Subject, **changes: Any) -> Job:
    return replace(Job(subject.name, Path("/model"), "", cache_root=Path("/"), model_sha256="0"), **changes)


@pytest.mark.parametrize("subject", ENGINES, indirect=True)
def test_an_engine_says_which_settings_and_options_it_takes(subject: Subject) -> None:
    runtime = runtimes.create(subject.name)
    assert set(runtime.settings) == TAKES[subject.name]
    assert set(runtime.settings) <= set(SETTINGS)
    assert all(name and text and "\n" not in text for name, text in runtime.options.items())


@pytest.mark.parametrize("subject", ENGINES, indirect=True)
def test_the_options_that_it_tells_are_those_that_it_takes(
    runtime: Runtime, load: Callable[..., LoadedModel]
) -> None:
    with pytest.raises(OptionRejected) as refused:
        load(options={"no_such_option": "1"})
    taken = str(refused.value).partition("it takes ")[2].split(", ")
    names = {re.sub(r"KEY$", "", each.partition("=")[0]) for each in taken if "=" in each}
    # The rest is for those who give another one.
    assert names == set(runtime.options) - {"provider_hardware"}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("subject", ENGINES, indirect=True)
def test_a_setting_is_taken_or_an_error_that_names_it(subject: Subject, name: str) -> None:
    runtime = runtimes.create(subject.name)
    wanted = asked(
        subject,
        **{THREADS: {"threads": 2}, COMPUTE_PRECISION: {"compute_precision": "float16"}}.get(
            name, {"cache": CacheUse.KEEP}
        ),
    )
    if name in TAKES[subject.name]:
        job.refuse_settings(runtime, wanted)
        if subject.name == "onnxruntime" and name != THREADS:
            pytest.importorskip("onnxruntime")
            runtime.version()
            if set(runtime.devices()) & {"openvino", "tensorrt"}:
                job.refuse_settings(runtime, wanted)
            else:
                with pytest.raises(OptionRejected, match=rf"takes no {name}"):
                    job.refuse_settings(runtime, wanted)
    else:
        with pytest.raises(OptionRejected, match=rf"^{subject.name} takes no {name} \("):
            job.refuse_settings(runtime, wanted)
    job.refuse_settings(runtime, asked(subject))


@pytest.mark.parametrize("subject", [each for each in ENGINES if each.values[0].threads], indirect=True)
def test_threads_are_told(load: Callable[..., LoadedModel]) -> None:
    model = load(threads=2)
    assert model.threads == 2
    model.close()


def told_by_openvino(model: Any) -> object:
    return model._compiled.get_property("INFERENCE_NUM_THREADS")


def told_by_onnx_runtime(model: Any) -> object:
    return model._session.get_session_options().intra_op_num_threads


def told_by_torch(model: Any) -> object:
    return model._torch.get_num_threads()


@pytest.mark.parametrize(
    ("subject", "told"),
    [
        pytest.param(next(each for each in SUBJECTS if each.name == name), told, id=name)
        for name, told in (
            ("openvino", told_by_openvino),
            ("onnxruntime", told_by_onnx_runtime),
            ("torch", told_by_torch),
        )
    ],
    indirect=["subject"],
)
def test_an_engine_that_tells_its_threads_has_those(
    load: Callable[..., LoadedModel], told: Callable[[Any], object]
) -> None:
    for threads in (1, 2):
        model = load(threads=threads)
        assert told(model) == threads
        model.close()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "subject", [each for each in ENGINES if COMPUTE_PRECISION in TAKES[each.values[0].name]], indirect=True
)
def test_a_precision_is_executed_or_refused(
    load: Callable[..., LoadedModel], subject: Subject, precision: str
) -> None:
    """What the processor can't do is not silently another one."""
    try:
        model = load(settings=Settings(compute_precision=precision))
    except OptionRejected as error:
        assert precision in str(error)
        assert precision != "float32" or subject.name == "onnxruntime", "all others compute in that"
        return
    told = {op.precision for op in model.placement().ops}
    # Layers may keep what they had; the fake of TensorRT answers as its builder was told.
    assert precision in told or (subject.name, precision) in {("openvino", "bfloat16")}, told
    model.close()


@pytest.mark.parametrize("subject", [each for each in ENGINES if each.id == "openvino"], indirect=True)
def test_openvino_computes_in_the_precision_that_it_is_told(runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "conv.onnx"
    path.write_bytes(convolution())
    able = runtime._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def told(precision: str) -> set[str]:
        model = runtime.load(
            path, device="cpu", threads=None, options={}, shapes={}, settings=Settings(precision)
        )
        found = {op.precision for op in model.placement().ops if op.type == "Convolution"}
        model.close()
        return found

    assert told("float32") == {"float32"}
    for name, capability in (("bfloat16", "BF16"), ("float16", "FP16")):
        if capability in able:
            assert told(name) == {name}
        else:
            with pytest.raises(OptionRejected, match=rf"computes in \w+ on this processor though {name}"):
                told(name)


@pytest.mark.parametrize(
    "subject", [each for each in ENGINES if CACHE in TAKES[each.values[0].name]], indirect=True
)
def test_a_second_load_finds_what_the_first_left(
    load: Callable[..., LoadedModel], subject: Subject, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    if subject.name == "onnxruntime":
        with pytest.raises(
            OptionRejected, match=r"CPUExecutionProvider keeps nothing.*OpenVINO and Tensorrt"
        ):
            load(settings=Settings(cache_dir=folder))
        return
    states = []
    for _ in range(2):
        model = load(settings=Settings(cache_dir=folder))
        assert isinstance(model, KeepsCaches)
        found = model.caches()
        assert found and all(cache.size_bytes and cache.path.startswith(str(folder)) for cache in found)
        states.append(found[0].warm)
        model.close()
    assert states == [False, True]


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("openvino", {"precision": "f32"}, Settings("float32")),
        ("openvino", {"cache_dir": "/tmp/x"}, Settings(cache_dir=Path("/tmp/y"))),
        ("tensorrt", {"precision": "f16"}, Settings("float16")),
        ("tensorrt", {"tf32": "on"}, Settings("float32")),
        ("tensorrt", {"timing_cache": "/tmp/x"}, Settings(cache_dir=Path("/tmp/y"))),
    ],
)
def test_an_option_and_the_setting_that_means_the_same_exclude_one_another(
    name: str, options: dict[str, str], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (subject,) = [each for each in SUBJECTS if each.name == name]
    if subject.standin is not None:
        subject.standin(monkeypatch)
    path = tmp_path / "model.onnx"
    path.write_bytes(subject.closed())
    runtime: Any = runtimes.create(name)
    with pytest.raises(OptionRejected, match="give only the setting"):
        runtime.load(path, device=subject.device, threads=None, options=options, shapes={}, settings=settings)


# --- the worker

AFFINITY = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processes are bound here")


@AFFINITY
@pytest.mark.parametrize("runtime_name", ["tflite", "onnxruntime", "openvino"])
def test_every_engine_runs_on_the_processors_that_were_asked_for(
    worker: Any, tmp_path: Path, runtime_name: str
) -> None:
    pytest.importorskip(
        {"tflite": "ai_edge_litert", "onnxruntime": "onnxruntime"}.get(runtime_name, "openvino")
    )
    path = tmp_path / "model"
    path.write_bytes(models.tflite_affine() if runtime_name == "tflite" else models.onnx_affine())
    processor = max(os.sched_getaffinity(0))
    outcome = worker.run(
        {
            "kind": "run",
            "runtime": runtime_name,
            "format": "tflite" if runtime_name == "tflite" else "onnx",
            "model_path": str(path),
            "cpu_affinity": [processor],
            **BRIEF,
        }
    )
    assert outcome.result["environment"]["cpu_affinity"] == [processor]
    assert outcome.result["effective_spec"]["cpu_affinity"] == [processor]


@AFFINITY
def test_a_probe_tells_the_settings_of_the_engine_and_of_the_worker(worker: Any) -> None:
    (event,) = worker.run({"kind": "probe"}).of("probe")
    for status in event["runtimes"]:
        assert status["settings"][-1] == "cpu_affinity", status["name"]
        if status["name"] != "onnxruntime":  # its are those of the providers in its build
            assert set(status["settings"]) == {*TAKES[status["name"]], "cpu_affinity"}


@AFFINITY
def test_a_processor_that_is_not_there_is_an_error_before_the_engine_is_imported(
    worker: Any, fake_job: Callable[..., dict[str, Any]]
) -> None:
    outcome = worker.run(fake_job(job={"cpu_affinity": [0, 4095]}))
    assert outcome.error["code"] == "option_rejected"
    assert re.search(r"cpu_affinity: .*4095.* there is 0", outcome.error["message"])
    assert outcome.stages == []


def test_a_setting_that_the_engine_does_not_take_ends_the_worker(worker: Any, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    path = tmp_path / "model.tflite"
    path.write_bytes(models.tflite_affine())
    outcome = worker.run(
        {
            "kind": "run",
            "runtime": "tflite",
            "format": "tflite",
            "model_path": str(path),
            "compute_precision": "float16",
            **BRIEF,
        }
    )
    assert outcome.error["code"] == "option_rejected"
    assert "tflite takes no compute_precision (float16 was asked for)" in outcome.error["message"]


def cached(fake_job: Callable[..., dict[str, Any]], root: Path, use: str, **more: Any) -> dict[str, Any]:
    return fake_job(job={"cache": use, "cache_root": str(root), "model_sha256": "ab" * 32, **more})


def test_a_cache_is_warm_the_second_time_and_anew_when_asked(
    worker: Any, fake_job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    root = tmp_path / "caches"
    uses = ["KEEP", "KEEP", "RENEW", "KEEP"]
    found = [worker.run(cached(fake_job, root, f"CACHE_USE_{use}")).result for use in uses]
    assert [result["caches"][0]["warm"] for result in found] == [False, True, False, True]
    assert {result["caches"][0]["path"] for result in found} == {str(path) for path in root.glob("fake/*")}
    assert found[0]["caches"][0]["size_bytes"] == 64
    assert [result["effective_spec"]["cache"] for result in found] == [f"CACHE_USE_{use}" for use in uses]


def test_without_a_word_nothing_is_kept(worker: Any, fake_job: Callable[..., dict[str, Any]]) -> None:
    result = worker.run(fake_job()).result
    assert not result.get("caches")
    assert result["effective_spec"]["cache"] == "CACHE_USE_NONE"


def test_other_settings_share_no_cache(
    worker: Any, fake_job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for more in ({}, {"threads": 2}, {"compute_precision": "float16"}, {"options": {"mode": "noisy"}}):
        result = worker.run(cached(fake_job, tmp_path, "CACHE_USE_KEEP", **more)).result
        assert result["caches"][0]["warm"] is False, more
    assert len(list(tmp_path.glob("fake/*"))) == 4


def test_no_two_versions_of_an_engine_share_a_cache(tmp_path: Path) -> None:
    folders = {
        caches.folder(tmp_path, engine, model_sha256=model * 64, version=version, settings={})
        for engine in ("openvino", "tensorrt", "someone:engine")
        for model in "ab"
        for version in ("openvino 2026.4.1", "openvino 2026.4.2")
    }
    assert len(folders) == 12
    assert all(folder.parent.parent == tmp_path for folder in folders)


def test_a_cache_by_default_is_none_where_the_engine_has_none(worker: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    path.write_bytes(models.onnx_affine())
    wanted = {"kind": "run", "runtime": "onnxruntime", "format": "onnx", "model_path": str(path),
              "cache": "CACHE_USE_KEEP", "cache_root": str(tmp_path), "model_sha256": "0",
              **BRIEF}  # fmt: skip
    assert worker.run(wanted).error["code"] == "option_rejected"
    result = worker.run({**wanted, "cache_by_default": True}).result
    assert result["effective_spec"]["cache"] == "CACHE_USE_NONE"
    assert not result.get("caches")


def test_a_job_with_a_cache_and_no_place_for_it_makes_no_sense() -> None:
    with pytest.raises(JobRejected, match="cache_root"):
        Job.parse({"runtime": "fake", "model_path": "/m", "format": "fake", "cache": "CACHE_USE_KEEP"})


# --- outputs


def test_values_of_outputs_are_kept_where_that_is_asked_for(
    worker: Any, fake_job: Callable[..., dict[str, Any]]
) -> None:
    outputs = [
        {"name": "y", "dtype": "int8", "shape": [1, 1000]},
        {"name": "z", "dtype": "float32", "shape": [3]},
    ]
    assert not worker.run(fake_job(outputs=outputs)).result.get("output_values")
    found = worker.run(fake_job(outputs=outputs, job={"output_values": 100})).result["output_values"]
    assert [(entry["name"], entry["count"], entry["step"]) for entry in found] == [
        ("y", 1000, 20),
        ("z", 3, 1),
    ]
    assert [len(entry["values"]) for entry in found] == [50, 3]


def test_values_that_are_not_finite_or_no_numbers_are_left_out() -> None:
    outputs = {
        "nan": np.array([0.0, np.nan]),
        "text": np.array(["a"], dtype=object),
        "half": np.array([1.5], dtype=np.float16),
        "truth": np.array([True, False]),
    }
    found = {entry.name: entry.values for entry in inputs.values_of(list(outputs), outputs, 10)}
    assert found == {"half": (1.5,), "truth": (1.0, 0.0)}


def convolution() -> bytes:
    """A convolution that is worth another precision: 64 channels, of ONNX."""
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    weights = np.linspace(-1, 1, 64 * 64 * 9, dtype=np.float32).reshape(64, 64, 3, 3)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "convolution",
        [helper.make_tensor_value_info("x", types.FLOAT, [1, 64, 16, 16])],
        [helper.make_tensor_value_info("y", types.FLOAT, [1, 64, 16, 16])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(made.SerializeToString())
