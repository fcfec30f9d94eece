"""ONNX Runtime: providers, where nodes run, and what is refused."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import inputs
from boardbench.agent.bench.runtime import (
    InputsRejected,
    ModelRejected,
    OptionRejected,
    RuntimeUnavailable,
)
from boardbench.agent.bench.runtimes import onnx
from boardbench.agent.domain import Evidence, Placement, Unit
from boardbench.testkit.child import BRIEF
from boardbench.testkit.contract import available

from . import models


@pytest.fixture
def runtime() -> onnx.OnnxRuntime:
    return available(onnx.OnnxRuntime())


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Writes bytes to a file and gives its path."""

    def make(data: bytes, name: str = "model.onnx") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return make


def load(runtime: onnx.OnnxRuntime, file: Path, *, device: str = "cpu", threads: int | None = None,
         fallback: bool = False, **options: str) -> onnx.OnnxModel:  # fmt: skip
    return runtime.load(
        file, device=device, threads=threads, options=options, shapes={}, allow_fallback=fallback
    )


def job(file: Path, **changes: Any) -> dict[str, Any]:
    known = {"kind": "run", "runtime": "onnxruntime", "format": "onnx", "model_path": str(file)}
    return {**known, **BRIEF, **changes}


@pytest.mark.usefixtures("runtime")
def test_the_demo_model_runs_in_the_worker(worker: Any, made: Any) -> None:
    demo = pytest.importorskip("boardbench.cli.demo_models")
    pytest.importorskip("onnx")
    result = worker.run(job(made(demo.build_onnx()))).result
    assert result["placement"]["accelerated_ops"] == 0
    assert result["placement"]["cpu_ops"] == len(result["placement"]["ops"]) > 10
    assert {tensor["name"]: tensor["shape"] for tensor in result["outputs"]} == {
        "scores": [1, 100],
        "label": [1],
    }


def test_nodes_are_listed_as_the_providers_chose_them(runtime: onnx.OnnxRuntime, made: Any) -> None:
    found = load(runtime, made(models.onnx_affine())).placement()
    if found.evidence is Evidence.PARTITION:
        assert [(op.type, op.name, op.unit, op.delegate) for op in found.ops] == [
            ("Relu", "relu", Unit.CPU, ""),
            ("Add", "add", Unit.CPU, ""),
        ]
        assert found.detail == (
            "2 of 2 nodes on CPUExecutionProvider "
            "(nodes as providers chose them: after the basic optimisations, before fusion)"
        )


def placed(model: onnx.OnnxModel) -> Placement:
    """The placement after an inference, as the worker asks for it."""
    model.bind(inputs.seeded(model.inputs, 0))()
    return model.placement()


def test_a_node_that_was_optimised_away_runs_nowhere(runtime: onnx.OnnxRuntime, made: Any) -> None:
    file = made(models.onnx_of_two("Abs", "Identity"))
    kept = placed(load(runtime, file, graph_optimization="off"))
    assert [op.type for op in kept.ops] == ["Abs", "Identity"]
    assert [op.type for op in placed(load(runtime, file)).ops] == ["Abs"]


def test_a_version_that_does_not_tell_is_asked_by_a_profile(
    runtime: onnx.OnnxRuntime, made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in versions before 1.24, which know nothing of assignments."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(scratch)
    monkeypatch.setattr(onnx.OnnxModel, "assigned", lambda self: None)
    model = load(runtime, made(models.onnx_affine()), graph_optimization="off")
    model.bind(inputs.seeded(model.inputs, 0))()
    found = model.placement()
    assert found.evidence is Evidence.PROFILED
    assert [(op.type, op.name, op.unit) for op in found.ops] == [
        ("Relu", "relu", Unit.CPU),
        ("Add", "add", Unit.CPU),
    ]
    assert "as they ran under the profiler" in found.detail
    assert list(scratch.iterdir()) == []
    model.fetch(model.bind(inputs.seeded(model.inputs, 0))())  # the session is as before


def test_a_profile_that_can_not_be_made_leaves_the_placement_unknown(
    runtime: onnx.OnnxRuntime, made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnx.OnnxModel, "assigned", lambda self: None)
    model = load(runtime, made(models.onnx_affine()))
    model.bind(inputs.seeded(model.inputs, 0))()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    found = model.placement()
    assert (found.evidence, found.cpu_ops) == (Evidence.UNSPECIFIED, None)
    assert "a profile could not be made" in found.detail


def test_the_timed_call_is_run_itself(runtime: onnx.OnnxRuntime, made: Any) -> None:
    model = load(runtime, made(models.onnx_affine()))
    call: Any = model.bind(inputs.seeded(model.inputs, 0))
    assert call.func.__func__ is runtime._ort.InferenceSession.run


@pytest.mark.parametrize(
    ("options", "attribute", "value"),
    [
        ({}, "graph_optimization_level", 99),
        ({"graph_optimization": "off"}, "graph_optimization_level", 0),
        ({"graph_optimization": "basic"}, "graph_optimization_level", 1),
        ({"graph_optimization": "extended"}, "graph_optimization_level", 2),
        ({"execution_mode": "parallel"}, "execution_mode", 1),
        ({"intra_op_threads": "2"}, "intra_op_num_threads", 2),
        ({"inter_op_threads": "2"}, "inter_op_num_threads", 2),
        ({"arena": "off"}, "enable_cpu_mem_arena", False),
    ],
)
def test_options_reach_the_session(
    runtime: onnx.OnnxRuntime, made: Any, options: dict[str, str], attribute: str, value: Any
) -> None:
    model = load(runtime, made(models.onnx_affine()), **options)
    found = getattr(model._session.get_session_options(), attribute)
    assert int(found) == value
    assert options.items() <= dict(model.options).items()


def test_spinning_is_turned_off_in_both_pools(runtime: onnx.OnnxRuntime, made: Any) -> None:
    settings = load(runtime, made(models.onnx_affine()), allow_spinning="off")._session.get_session_options()
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert settings.get_session_config_entry("session.inter_op.allow_spinning") == "0"


def test_threads_by_either_name_but_not_by_both(runtime: onnx.OnnxRuntime, made: Any) -> None:
    file = made(models.onnx_affine())
    assert load(runtime, file).threads is None
    assert load(runtime, file, intra_op_threads="2").threads == 2
    assert load(runtime, file, threads=2, intra_op_threads="2").threads == 2
    with pytest.raises(OptionRejected, match="threads says 1 and the option intra_op_threads says 2"):
        load(runtime, file, threads=1, intra_op_threads="2")


@pytest.mark.parametrize(
    "options",
    [
        {"graph_optimization": "some"},
        {"execution_mode": ""},
        {"intra_op_threads": "0"},
        {"provider.device_id": "0"},
    ],
)
def test_options_are_checked(runtime: onnx.OnnxRuntime, made: Any, options: dict[str, str]) -> None:
    with pytest.raises(OptionRejected):
        load(runtime, made(models.onnx_affine()), **options)


# -- providers ------------------------------------------------------------------------------------------


def test_a_provider_that_is_not_in_this_build_is_refused(runtime: onnx.OnnxRuntime, made: Any) -> None:
    if "cuda" in runtime.devices():
        pytest.skip("this build has CUDA")
    file = made(models.onnx_affine())
    with pytest.raises(OptionRejected, match="no device 'cuda'; it has cpu"):
        load(runtime, file, device="cuda")
    fallen_back = load(runtime, file, device="cuda", fallback=True)
    assert Counter(op.unit for op in placed(fallen_back).ops) == {Unit.CPU: 2}
    assert "CUDAExecutionProvider is not in this build" in fallen_back.device_fallback
    with pytest.raises(OptionRejected, match="no device 'nosuch'"):
        load(runtime, file, device="nosuch", fallback=True)


def test_a_service_elsewhere_is_no_device(runtime: onnx.OnnxRuntime) -> None:
    assert "azure" not in runtime.devices()


CUDA = "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("providers", "assigned", "said"),
    [
        ([onnx.CPU], None, "could not be started"),
        ([CUDA, onnx.CPU], [onnx.Assigned(onnx.CPU, "relu", "Relu", 0)], "takes none of its operations"),
        ([CUDA, onnx.CPU], [onnx.Assigned(CUDA, "relu", "Relu", 0)], ""),
        ([CUDA, onnx.CPU], None, ""),  # can't be told before it ran
    ],
)
def test_a_device_that_takes_no_part_is_an_error_unless_that_is_allowed(
    runtime: onnx.OnnxRuntime,
    made: Any,
    monkeypatch: pytest.MonkeyPatch,
    providers: list[str],
    assigned: Any,
    said: str,
) -> None:
    file = made(models.onnx_affine())
    real = onnx.OnnxModel._create

    def create(self: onnx.OnnxModel, settings: Any) -> Any:
        named, self.providers = self.providers, [(onnx.CPU, {})]
        session = real(self, settings)
        self.providers = named
        monkeypatch.setattr(session, "get_providers", lambda: providers)
        return session

    monkeypatch.setattr(runtime, "_providers", lambda: [CUDA, onnx.CPU])
    monkeypatch.setattr(onnx.OnnxModel, "_create", create)
    monkeypatch.setattr(onnx.OnnxModel, "assigned", lambda self: assigned)
    if said:
        with pytest.raises(
            ModelRejected, match=f"model.onnx on cuda: the provider CUDA.* {said}.*--allow-fallback"
        ):
            load(runtime, file, device="cuda")
        assert said in load(runtime, file, device="cuda", fallback=True).device_fallback
    else:
        assert load(runtime, file, device="cuda").device_fallback == ""


@pytest.mark.parametrize(
    ("provider", "options", "unit"),
    [
        ("CPUExecutionProvider", {}, Unit.CPU),
        ("XnnpackExecutionProvider", {}, Unit.CPU_DELEGATE),
        ("CUDAExecutionProvider", {}, Unit.GPU),
        ("TensorrtExecutionProvider", {}, Unit.GPU),
        ("TensorrtExecutionProvider", {"trt_dla_enable": "True"}, Unit.DELEGATE),
        ("OpenVINOExecutionProvider", {"device_type": "CPU"}, Unit.CPU_DELEGATE),
        ("OpenVINOExecutionProvider", {"device_type": "GPU.0"}, Unit.GPU),
        ("OpenVINOExecutionProvider", {"device_type": "CPU_FP32"}, Unit.CPU_DELEGATE),
        ("OpenVINOExecutionProvider", {"device_type": "NPU"}, Unit.NPU),
        ("OpenVINOExecutionProvider", {"device_type": "AUTO:GPU,CPU"}, Unit.DELEGATE),
        ("OpenVINOExecutionProvider", {"device_type": "HETERO:GPU,CPU"}, Unit.DELEGATE),
        ("OpenVINOExecutionProvider", {}, Unit.DELEGATE),
        ("QNNExecutionProvider", {"backend_path": "/opt/qnn/libQnnHtp.so"}, Unit.NPU),
        ("QNNExecutionProvider", {"backend_type": "gpu"}, Unit.GPU),
        ("QNNExecutionProvider", {"backend_path": "QnnCpu.dll"}, Unit.CPU_DELEGATE),
        ("QNNExecutionProvider", {}, Unit.DELEGATE),
        ("CoreMLExecutionProvider", {}, Unit.DELEGATE),
        ("BrandNewExecutionProvider", {}, Unit.DELEGATE),
        ("UnheardOf", {}, Unit.DELEGATE),
    ],
)
def test_a_provider_s_hardware_is_said_only_where_it_is_known(
    provider: str, options: dict[str, str], unit: Unit
) -> None:
    assert onnx.unit_of(provider, options) is unit


# -- models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "todo"),
    [
        (lambda: models.onnx_of_node("NoSuchOp"), "it uses an operation that this build does not have"),
        (
            lambda: models.onnx_of_node("Op", domain="my.domain"),
            "it uses an operation that this build does not have",
        ),
        (lambda: models.onnx_of_node("Relu", opset=99), "it is newer than this engine"),
        (lambda: models.onnx_of_node("Relu", ir=99), "it is newer than this engine"),
        (models.onnx_of_external_data, "its weights are in files of their own, .*: save it in one file"),
        (lambda: models.onnx_affine()[:-9], "is the file whole, and is it an ONNX model"),
        (lambda: b"", "is the file whole, and is it an ONNX model"),
    ],
)
def test_a_refusal_says_what_to_do(runtime: onnx.OnnxRuntime, made: Any, build: Any, todo: str) -> None:
    with pytest.raises(ModelRejected, match=f"onnxruntime refuses model.onnx: {todo}"):
        load(runtime, made(build()))


def test_an_input_that_can_not_be_fed_is_refused(runtime: onnx.OnnxRuntime, made: Any) -> None:
    with pytest.raises(InputsRejected, match=r"input x of model.onnx is a tensor\(bfloat16\)"):
        load(runtime, made(models.onnx_of_node("Identity", dtype="BFLOAT16")))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("FLOAT16", "float16"), ("DOUBLE", "float64"), ("INT8", "int8"), ("UINT64", "uint64"), ("BOOL", "bool"),
     ("STRING", "str")],
)  # fmt: skip
def test_every_type_of_input_is_fed(runtime: onnx.OnnxRuntime, made: Any, dtype: str, name: str) -> None:
    model = load(runtime, made(models.onnx_of_node("Identity", dtype=dtype)))
    assert model.inputs[0].dtype == model.outputs[0].dtype == name
    feeds = inputs.seeded(model.inputs, 0)
    (output,) = model.fetch(model.bind(feeds)()).values()
    assert np.array_equal(output, feeds["x"])


@pytest.mark.usefixtures("runtime")
def test_an_output_that_is_no_tensor_is_named_and_left_out(worker: Any, made: Any) -> None:
    result = worker.run(job(made(models.onnx_of_sequence()))).result
    assert [(tensor["name"], tensor["dtype"]) for tensor in result["outputs"]] == [
        ("y", "float32"),
        ("parts", "seq(tensor(float))"),
    ]
    assert set(result["output_sha256"]) == {"y"}


@pytest.mark.usefixtures("runtime")
def test_an_output_that_is_not_finite_is_doubted(worker: Any, made: Any) -> None:
    outcome = worker.run(job(made(models.onnx_of_division()), options={"graph_optimization": "off"}))
    assert outcome.exit_code == 0
    assert "outputs_not_finite" in [event["warning"]["code"] for event in outcome.of("warning")]


@pytest.mark.usefixtures("runtime")
def test_a_failure_while_it_runs_is_told_as_one(worker: Any, made: Any) -> None:
    assert worker.run(job(made(models.onnx_gather(2)))).exit_code == 0  # generated indices are 0 and 1
    outcome = worker.run(job(made(models.onnx_gather(1))))
    assert (outcome.error["code"], outcome.stages[-1]) == ("inference_failed", "FIRST_INFERENCE")
    assert "onnxruntime failed to run the model" in outcome.error["message"]


@pytest.mark.usefixtures("runtime")
def test_it_keeps_no_record_of_its_use(worker: Any, made: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environ = {name: str(home) for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")}
    assert worker.run(job(made(models.onnx_affine())), environ=environ).exit_code == 0
    assert list(home.rglob("*")) == []


def test_without_the_engine_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(RuntimeUnavailable, match="-m pip install onnxruntime"):
        onnx.OnnxRuntime().version()
