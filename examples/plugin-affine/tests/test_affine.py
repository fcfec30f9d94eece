"""The engine against boardbench's contract, and what it has besides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from boardbench_affine import graph
from boardbench_affine.engine import AffineRuntime

from boardbench.agent.bench.runtime import ModelRejected
from boardbench.testkit import BenchChild, EngineContract, Subject


def relu_and_itself(batch: int = 1) -> bytes:
    relu = {"type": "relu", "name": "relu", "of": ["x"]}
    both = {"type": "add", "name": "sum", "of": ["relu", "x"]}
    return graph.write(shape=(batch, 4), operations=[relu, both], output="sum")


class TestAffine(EngineContract):
    subjects = (
        Subject(
            "affine",
            ".affine",
            closed=relu_and_itself,
            open=lambda: relu_and_itself(batch=-1),
            threads=False,
            computes=lambda x: np.maximum(x, 0) + x,
        ),
    )


def layer(seed: int = 0, size: int = 16) -> dict[str, object]:
    random = np.random.default_rng(seed)
    weights = random.standard_normal((size, size)).astype(np.float32)
    return {
        "type": "dense",
        "name": "layer",
        "of": ["x"],
        "weights": weights,
        "bias": np.ones(size, np.float32),
    }


def test_dense_is_a_product_and_a_sum(tmp_path: Path) -> None:
    operation = layer()
    path = tmp_path / "m.affine"
    path.write_bytes(graph.write(shape=(2, 16), operations=[operation], output="layer"))
    feed = np.random.default_rng(1).standard_normal((2, 16)).astype(np.float32)
    found = {}
    for accumulate in ("float32", "float64"):
        model = AffineRuntime().load(
            path, device="cpu", threads=None, options={"accumulate": accumulate}, shapes={}
        )
        found[accumulate] = model.fetch(model.bind({"x": feed})())["y"]
    exact = feed.astype(np.float64) @ np.asarray(operation["weights"], np.float64) + 1
    assert np.allclose(found["float32"], exact, rtol=0, atol=1e-5)
    # Summed in float64 it is the exact result, rounded once.
    assert np.array_equal(found["float64"], exact.astype(np.float32))


@pytest.mark.parametrize("lacking", range(1, 60, 7))
def test_a_truncated_file_is_refused(tmp_path: Path, lacking: int) -> None:
    whole = graph.write(shape=(1, 4), operations=[layer(size=4)], output="layer")
    path = tmp_path / "m.affine"
    path.write_bytes(whole[:-lacking])
    with pytest.raises(ModelRejected, match=r"m\.affine .*truncated"):
        AffineRuntime().load(path, device="cpu", threads=None, options={}, shapes={})


def test_the_profile_tells_which_operation_takes_the_time(tmp_path: Path, bench_child: BenchChild) -> None:
    path = tmp_path / "m.affine"
    relu = {"type": "relu", "name": "relu", "of": ["layer"]}
    path.write_bytes(graph.write(shape=(64, 512), operations=[layer(size=512), relu], output="relu"))
    answer = bench_child.run(
        {
            "kind": "run",
            "runtime": "affine",
            "format": "affine",
            "model_path": str(path),
            "duration_seconds": 0.0,
            "min_runs": 5,
            "profile_runs": 5,
        }
    )
    (profile,) = answer.of("profile")
    assert [op["type"] for op in profile["placement"]["ops"]] == ["dense", "relu"]
    assert all(op["seconds"] > 0 for op in profile["placement"]["ops"])
