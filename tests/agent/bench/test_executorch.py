"""ExecuTorch: what was delegated and what was not, its time, open sizes, and what it refuses.

ExecuTorch has an environment of its own (gigabytes): `make test-engines` runs these inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import inputs
from boardbench.agent.bench.runtime import (
    InputsRejected,
    ModelRejected,
    NoProfile,
    OptionRejected,
    ProfileRequest,
)
from boardbench.agent.bench.runtimes import executorch as engine
from boardbench.agent.bench.runtimes import torch as torch_engine
from boardbench.agent.domain import Evidence, Unit, Verdict
from boardbench.testkit.child import BRIEF

from . import torch_models

pytest.importorskip(
    "executorch", reason="ExecuTorch lives in an environment of its own: make test-engines runs this there"
)
torch: Any = pytest.importorskip("torch")

SHAPE = torch_models.EXAMPLES["between"]
XNNPACK = "XnnpackBackend"
CUMSUM = "aten::cumsum.out"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("executorch")
    between, affine = torch_models.between(), torch_models.affine()
    (folder / "between").write_bytes(torch_models.exported(between, SHAPE, xnnpack=True))
    (folder / "portable").write_bytes(torch_models.exported(affine, (1, 4), xnnpack=False))
    (folder / "open").write_bytes(torch_models.exported(affine, (2, 4), xnnpack=False, most=16))
    (folder / "lite").write_bytes(torch_models.script(between, lite=True))
    return folder


@pytest.fixture(scope="module")
def runtime() -> engine.ExecuTorchRuntime:
    return engine.ExecuTorchRuntime()


@pytest.fixture
def load(runtime: engine.ExecuTorchRuntime, files: Path) -> Callable[..., Any]:
    def begin(name: str, **changes: Any) -> Any:
        arguments = {"device": "cpu", "threads": None, "options": {}, "shapes": {}, **changes}
        return runtime.load(files / name, **arguments)

    return begin


def test_the_same_model_computes_the_same_in_every_engine(load: Any, files: Path) -> None:
    model = load("between")
    feeds = inputs.seeded(model.inputs, 3)
    mine = model.fetch(model.bind(feeds)())["output0"]
    (feed,) = feeds.values()
    with torch.no_grad():
        eager = torch_models.between()(torch.from_numpy(feed)).numpy()
    lite = torch_engine.TorchRuntime().load(
        files / "lite", device="cpu", threads=None, options={}, shapes={"x": SHAPE}
    )
    theirs = lite.fetch(lite.bind({"x": feed})())["output0"]
    np.testing.assert_allclose(mine, eager, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_delegated_and_portable_parts_are_told_apart(load: Any) -> None:
    found = load("between").placement()
    assert [(op.type, op.unit, op.delegate) for op in found.ops] == [
        (XNNPACK, Unit.CPU_DELEGATE, XNNPACK),
        (CUMSUM, Unit.CPU, ""),
        (XNNPACK, Unit.CPU_DELEGATE, XNNPACK),
    ]
    assert (found.evidence, found.verdict) == (Evidence.PARTITION, Verdict.NOT_ACCELERATED)
    assert f"2 calls of {XNNPACK}, 1 on portable kernels (1 {CUMSUM})" in found.detail
    assert "nothing was delegated" in load("portable").placement().detail


def test_asked_for_its_delegate_the_rest_has_fallen_back(load: Any) -> None:
    model = load("between", device="xnnpack")
    assert (model.wanted, model.device_fallback) == (XNNPACK, "")
    assert model.placement().verdict is Verdict.PARTLY


def request(path: Path, **changes: Any) -> ProfileRequest:
    arguments: dict[str, Any] = {
        "model_path": path,
        "device": "cpu",
        "threads": 1,
        "options": {},
        "shapes": {},
        "allow_fallback": False,
        "feeds": lambda tensors: inputs.seeded(tensors, 0),
        "trying": lambda _method: None,
        **changes,
    }
    return ProfileRequest(**arguments)


def test_every_call_has_a_time_and_what_is_inside_a_delegate_is_named(
    runtime: engine.ExecuTorchRuntime, files: Path
) -> None:
    found = engine.profile(runtime, request(files / "between"), lambda: range(9))
    assert set(found.op_seconds) == {0, 1, 2}
    assert all(seconds > 0 for seconds in found.op_seconds.values())
    assert sum(found.op_seconds.values()) < 1.2 * max(found.whole_seconds)
    assert found.fallback_seconds == ()
    assert f"% in {XNNPACK}" in found.detail and "% in portable kernels" in found.detail
    assert "inside delegates " in found.detail and "Convolution" in found.detail


def test_the_cost_of_what_was_not_delegated_is_its_time(
    runtime: engine.ExecuTorchRuntime, files: Path
) -> None:
    found = engine.profile(runtime, request(files / "between", device="xnnpack"), lambda: range(9))
    assert len(found.fallback_seconds) == len(found.whole_seconds) == 9
    assert all(
        0 < part < whole for part, whole in zip(found.fallback_seconds, found.whole_seconds, strict=True)
    )
    assert list(found.causes) == [1]
    assert found.causes[1].cause == f"{XNNPACK} did not take it when the program was exported"


def test_a_dump_that_ended_the_process_is_left_alone(runtime: engine.ExecuTorchRuntime, files: Path) -> None:
    with pytest.raises(NoProfile):
        engine.profile(runtime, request(files / "between", avoid=(engine.METHOD,)), lambda: range(3))


def test_a_delegate_that_the_program_does_not_use_is_an_error_or_is_told(load: Any) -> None:
    with pytest.raises(
        ModelRejected, match=f"portable on xnnpack: the program was exported without {XNNPACK}"
    ):
        load("portable", device="xnnpack")
    model = load("portable", device="xnnpack", allow_fallback=True)
    assert model.device_fallback == f"all runs on the CPU: the program was exported without {XNNPACK}"


def test_a_delegate_that_is_not_built_in_is_an_error_or_is_told(load: Any) -> None:
    with pytest.raises(OptionRejected, match="no device 'vulkan'; it has cpu, "):
        load("between", device="vulkan")
    model = load("portable", device="vulkan", allow_fallback=True)
    assert (model.wanted, "has no VulkanBackend" in model.device_fallback) == ("VulkanBackend", True)


def test_open_sizes_are_settled_within_what_it_was_exported_for(load: Any) -> None:
    with pytest.raises(
        InputsRejected, match=r"leaves sizes open.*exported for at most input0 float32 \[16, 4\]"
    ):
        load("open")
    model = load("open", shapes={"arr_0": (3, 4)})
    assert model.outputs[0].shape == (-1, -1)
    assert model.fetch(model.bind(inputs.seeded(model.inputs, 0))())["output0"].shape == (3, 4)
    with pytest.raises(InputsRejected, match=r"input0 is too large with \[17, 4\].*at most input0"):
        load("open", shapes={"input0": (17, 4)})


def test_threads_are_those_asked_for(load: Any, runtime: engine.ExecuTorchRuntime) -> None:
    for number in (1, 2):
        assert load("portable", threads=number).threads == number
        assert runtime._native._threadpool_get_thread_count() == number


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            b"XnnpackBackend",
            b"XnnpackBackenX",
            "exported for XnnpackBackenX, which this build of ExecuTorch lacks",
        ),
        (b"aten::cumsum", b"aten::cumsuX", r"no kernels for: aten::cumsuX\.out"),
    ],
)
def test_what_this_build_lacks_is_named(
    load: Any, files: Path, before: bytes, after: bytes, told: str
) -> None:
    (files / "foreign").write_bytes((files / "between").read_bytes().replace(before, after))
    with pytest.raises(ModelRejected, match=told):
        load("foreign")


def test_a_truncated_program_is_told(load: Any, files: Path) -> None:
    content = (files / "between").read_bytes()
    (files / "cut").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelRejected, match=r"refuses cut: the ExecuTorch program .* truncated"):
        load("cut")


def test_a_method_that_it_has_not_is_told(load: Any) -> None:
    with pytest.raises(OptionRejected, match="no method 'backward'; it has forward"):
        load("portable", options={"method": "backward"})


def job(path: Path, **changes: Any) -> dict[str, Any]:
    return {"kind": "run", "runtime": "executorch", "format": "executorch", "device": "cpu",
            "model_path": str(path), **BRIEF, **changes}  # fmt: skip


def test_the_worker_tells_what_fallback_costs(worker: Any, files: Path) -> None:
    outcome = worker.run(job(files / "between", device="xnnpack", profile_runs=20))
    assert outcome.exit_code == 0, outcome.output
    assert outcome.result["placement"]["verdict"] == "PLACEMENT_VERDICT_PARTLY"
    (profile,) = outcome.of("profile")
    cost = profile["placement"]["fallback_cost"]
    assert 0 < cost["share_low"] <= cost["share"] <= cost["share_high"] < 1
    (cumsum,) = [op for op in profile["placement"]["ops"] if op["type"] == CUMSUM]
    assert cumsum["seconds"] > 0 and "did not take it" in cumsum["cause"]


def test_strict_names_what_was_not_delegated(worker: Any, files: Path) -> None:
    error = worker.run(job(files / "between", device="xnnpack", strict=True)).error
    assert error["code"] == "cpu_fallback"
    assert f"#1 {CUMSUM}" in error["message"]
