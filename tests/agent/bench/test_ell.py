"""Modules of the Embedded Learning Library, built here with a C compiler to the interface that ELL emits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.agent.bench import inputs
from boardbench.agent.bench.options import NATIVE_MODELS
from boardbench.agent.bench.runtime import (
    ModelRejected,
    NoProfile,
    OptionRejected,
    ProfileRequest,
    RuntimeUnavailable,
)
from boardbench.agent.bench.runtimes import ell
from boardbench.agent.domain import Evidence, Unit, Verdict
from boardbench.inspect.sniff import sniff

from . import models

FEED = np.array([[[-2.0, -1.0, 0.5, 3.0]]], np.float32)


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE_MODELS, "1")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def begin(*defines: str, **changes: Any) -> Any:
        path = tmp_path / f"module{len(list(tmp_path.iterdir()))}"
        path.write_bytes(models.ell_affine(*defines))
        arguments = {"device": "cpu", "threads": None, "options": {}, "shapes": {}, **changes}
        return ell.EllRuntime().load(path, **arguments)

    return begin


def computed(model: Any, feed: Any) -> Any:
    return model.fetch(model.bind({"input0": feed})())["output0"]


def test_it_is_known_by_its_names(tmp_path: Path) -> None:
    path = tmp_path / "module"
    path.write_bytes(models.ell_affine())
    assert sniff(path) == "ell"


def test_it_runs_only_where_programs_may_be_run(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NATIVE_MODELS)
    with pytest.raises(RuntimeUnavailable, match="BOARDBENCH_NATIVE_MODELS=1"):
        load()


@pytest.mark.parametrize("variant", [(), ("MODULE_OLD",), ("MODULE_PROFILED",)])
def test_it_computes(load: Any, variant: tuple[str, ...]) -> None:
    model = load(*variant)
    assert [(tensor.name, tensor.shape) for tensor in model.inputs] == [("input0", (1, 1, 4))]
    assert np.array_equal(computed(model, FEED), np.maximum(FEED, 0) + FEED)


def test_the_type_of_its_elements_can_be_told(load: Any) -> None:
    model = load("MODULE_ELEMENT=double", options={"input_type": "float64", "output_type": "float64"})
    feed = FEED.astype(np.float64)
    assert np.array_equal(computed(model, feed), np.maximum(feed, 0) + feed)


def test_all_is_on_the_cpu_node_by_node_where_the_module_tells_its_nodes(load: Any) -> None:
    found = load("MODULE_PROFILED").placement()
    assert [(op.type, op.name, op.unit) for op in found.ops] == [
        ("ReLUActivationNode", "2", Unit.CPU),
        ("BinaryOperationNode", "3", Unit.CPU),
    ]
    assert (found.evidence, found.verdict) == (Evidence.PARTITION, Verdict.NOT_ACCELERATED)
    whole = load().placement()
    assert [op.type for op in whole.ops] == ["compiled module"]


def request(path: Path) -> ProfileRequest:
    return ProfileRequest(
        model_path=path,
        device="cpu",
        threads=None,
        options={},
        shapes={},
        allow_fallback=False,
        feeds=lambda tensors: inputs.seeded(tensors, 0),
        trying=lambda _method: None,
    )


def test_its_own_counters_tell_the_time_of_a_node(tmp_path: Path) -> None:
    path = tmp_path / "module"
    path.write_bytes(models.ell_affine("MODULE_PROFILED"))
    found = ell.profile(ell.EllRuntime(), request(path), lambda: range(20))
    assert len(found.whole_seconds) == 20
    assert set(found.op_seconds) == {0, 1}
    assert all(0 <= seconds <= max(found.whole_seconds) for seconds in found.op_seconds.values())
    assert any(seconds > 0 for seconds in found.op_seconds.values())


def test_without_counters_there_is_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "module"
    path.write_bytes(models.ell_affine())
    with pytest.raises(NoProfile, match="without profiling"):
        ell.profile(ell.EllRuntime(), request(path), lambda: range(3))


def test_a_module_that_needs_callbacks_is_refused(load: Any) -> None:
    with pytest.raises(ModelRejected, match="calls functions that are not in it"):
        load("MODULE_CALLS_BACK")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x7fELF" + bytes(60), "exports no NAME_Predict"),
        (b"\x7fELF\0a_Predict\0a_GetInputSize\0b_Predict\0b_GetInputSize\0", "holds 2 modules"),
        (b"\x7fELF\0a_Predict\0a_GetInputSize\0", "can't be loaded"),
    ],
)
def test_what_is_no_module_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(ModelRejected, match=told):
        ell.EllRuntime().load(path, device="cpu", threads=None, options={}, shapes={})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device": "gpu"}, "it has cpu"),
        ({"threads": 2}, "leave --threads out"),
        ({"options": {"input_type": "bfloat16"}}, "input_type of ell is"),
    ],
)
def test_what_it_does_not_take_is_refused(load: Any, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionRejected, match=told):
        load(**changes)
