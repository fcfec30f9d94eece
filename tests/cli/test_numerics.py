"""How far outputs of engines lie apart, and when nothing can be said about it."""

from __future__ import annotations

import math

import pytest

from boardbench.cli import numerics
from boardbench.v1 import model_pb2, result_pb2


def run(
    values=(1.0, -4.0, 0.5), *, name="y", sha256="a", inputs="i", count=None, step=1, shape=(1, 3)
) -> result_pb2.RunResult:
    result = result_pb2.RunResult(
        inputs=[model_pb2.TensorInfo(name="x", dtype="float32", shape=[1, 4])],
        outputs=[model_pb2.TensorInfo(name=name, dtype="float32", shape=shape)],
        output_sha256={name: sha256},
    )
    result.input_data.source, result.input_data.sha256, result.input_data.seed = "seeded", inputs, 0
    if values is not None:
        result.output_values.add(
            name=name, dtype="float32", count=count or len(values), step=step, values=values
        )
    return result


def test_equal_bytes_need_no_values() -> None:
    found = numerics.compare(run(None), run(None))
    assert (found.verdict, found.greatest) == (numerics.SAME, 0.0)


@pytest.mark.parametrize(
    ("values", "verdict", "greatest", "share"),
    [
        ((1.0, -4.001, 0.5), numerics.CLOSE, 0.001, 0.00025),
        ((1.0, -4.1, 0.5), numerics.ROUGH, 0.1, 0.025),
        ((1.0, -4.0, 0.9), numerics.DIFFERS, 0.4, 0.1),
    ],
)
def test_a_difference_is_a_share_of_the_greatest(values, verdict, greatest, share) -> None:
    found = numerics.compare(run(), run(values, sha256="b"))
    assert found.verdict == verdict
    assert found.greatest == pytest.approx(greatest)
    assert found.share == pytest.approx(share)
    assert (found.compared, found.of, found.output) == (3, 3, "y")


def test_what_was_all_zero_and_is_not_differs() -> None:
    found = numerics.compare(run((0.0, 0.0, 0.0)), run((0.0, 1e-9, 0.0), sha256="b"))
    assert found.verdict == numerics.DIFFERS
    assert math.isinf(found.share or 0)


def test_other_inputs_say_nothing() -> None:
    other = run(sha256="b", inputs="j")
    other.input_data.source = "file"
    assert numerics.compare(run(), other).verdict == numerics.UNKNOWN


def test_inputs_of_a_seed_are_the_same_whatever_they_are_called() -> None:
    other = run(sha256="b", inputs="j")
    other.inputs[0].name = "serving_default_x:0"
    assert numerics.compare(run(), other).verdict == numerics.CLOSE
    other.inputs[0].shape[0] = 2
    assert numerics.compare(run(), other).verdict == numerics.UNKNOWN
    other.inputs[0].shape[0] = 1
    other.input_data.seed = 1
    assert numerics.compare(run(), other).verdict == numerics.UNKNOWN


def test_outputs_with_other_names_are_matched_by_place_and_size() -> None:
    assert numerics.compare(run(), run(name="Identity", sha256="b")).verdict == numerics.CLOSE
    assert numerics.compare(run(), run(name="z", sha256="b", shape=(1, 4))).verdict == numerics.UNKNOWN


def test_a_part_of_a_large_output_is_told_as_one() -> None:
    found = numerics.compare(run(count=300, step=100), run(sha256="b", count=300, step=100))
    assert found.detail == "3 of 300 elements compared"
    found = numerics.compare(run(count=300, step=100), run(sha256="b", count=300, step=50))
    assert (found.verdict, found.detail) == (numerics.UNKNOWN, "no values of y were kept by both")
