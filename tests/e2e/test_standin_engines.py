"""Engines whose hardware is not here, from the command line to the result, on stand-ins that say so."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
QUICK = ("--duration", "0.1", "--min-runs", "12", "--warm-up", "0.05", "--profile-runs", "12")


def standins() -> Any:
    """The module that the tests of the engines use."""
    path = TESTS / "agent" / "bench" / "standins.py"
    spec = importlib.util.spec_from_file_location("standins", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def board(programs: Any) -> Any:
    environment = standins().tensorrt_environment(dla=1)
    environment["PYTHONPATH"] += f"{os.pathsep}{TESTS / 'coreml'}"
    return programs.agent(environment=environment)


def push(programs: Any, board: Any, *arguments: object) -> Any:
    return programs.client("push", *QUICK, *arguments, "--to", board.address, "--format", "json", code=None)


def test_a_core_ml_package_is_pushed_as_the_folder_that_it_is(programs: Any, board: Any) -> None:
    answer = push(programs, board, TESTS / "inspect" / "files" / "small.mlpackage", "--device", "npu")
    result = answer.json
    assert result["runtime"]["version"] == "coremltools 9.0", answer
    assert (result["model"]["name"], result["model"]["format"]) == ("small.mlpackage", "coreml")
    assert (result["placement"]["accelerated_ops"], result["placement"]["cpu_ops"]) == (4, 1)
    assert result["standins"] == ["standin-npu"]
    assert result["validity"] == "VALIDITY_INVALID"


def test_an_onnx_model_is_built_where_it_is_asked_for_and_the_second_load_is_another_figure(
    programs: Any, board: Any, tmp_path: Path
) -> None:
    from onnx import TensorProto, helper, save

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in "xy")
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Softmax", ["a"], ["y"], name="last"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    path = tmp_path / "net.onnx"
    save(model, path)
    asked = ("--runtime", "tensorrt", "--device", "dla", "--option", "precision=f16")
    told = []
    for _ in range(2):
        answer = push(programs, board, path, *asked, "--option", f"cache_dir={tmp_path / 'engines'}")
        result = answer.json
        assert result["runtime"]["version"] == "tensorrt 10.13.0.35", answer
        assert result["placement"]["verdict"] == "PLACEMENT_VERDICT_PARTLY"
        assert "standin-dla" in result["standins"]
        assert result["validity"] == "VALIDITY_INVALID"
        told.append(result["placement"]["detail"])
    assert "a first load: the engine was built" in told[0]
    assert "a cached load: the engine comes from" in told[1]
    plain = push(programs, board, path, "--runtime", "tensorrt").json
    assert plain["runtime"]["device"] == "gpu"
    assert push(programs, board, path).json["runtime"]["name"] == "onnxruntime"
