"""Compiled files against their originals, on pairs whose answer is known because they were made that way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from boardbench.inspect import analyse
from boardbench.inspect.errors import InspectError, Malformed
from boardbench.inspect.report import Unit, Verdict

if TYPE_CHECKING:
    from .conftest import Made

CHAIN = ("CONV_2D", "RELU", "CONV_2D", "LEAKY_RELU", "CONV_2D", "TANH", "LEAKY_RELU", "CONV_2D")


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Callable[..., object]:
    """Makes a compiled subgraph for ``compile_like``."""
    import inspect

    made = inspect.getmodule(request.getfixturevalue("compile_like"))
    assert made is not None
    return made.Node


def _pair(folder: Path, compiled: bytes, original: bytes) -> tuple[Path, Path]:
    (folder / "m_edgetpu.tflite").write_bytes(compiled)
    (folder / "m.tflite").write_bytes(original)
    return folder / "m_edgetpu.tflite", folder / "m.tflite"


@pytest.mark.parametrize("mapped", [(0, 1, 2), (4, 5), (7,), tuple(range(8))])
def test_every_operation_is_told_by_name_and_by_graph(
    tmp_path: Path, conv_chain: Callable[..., bytes], compile_like, node, mapped: tuple[int, ...]
) -> None:
    original = conv_chain(*CHAIN)
    compiled, source = _pair(tmp_path, compile_like(original, [node(mapped)]), original)
    report = analyse.inspect(compiled, original=source)
    assert {op.index for op in report.ops if op.unit is Unit.TPU} == set(mapped)
    assert {op.index for op in report.ops if op.unit is Unit.CPU} == set(range(8)) - set(mapped)
    assert "estimates_disagree" not in {warning.code for warning in report.warnings}


def test_several_nodes_are_counted_together(
    tmp_path: Path, conv_chain: Callable[..., bytes], compile_like, node
) -> None:
    original = conv_chain(*CHAIN)
    nodes = [
        node((0, 1, 2), cached=100, streamed=0, runtime=12),
        node((4, 5), cached=50, streamed=7, runtime=14),
    ]
    compiled, source = _pair(tmp_path, compile_like(original, nodes), original)
    report = analyse.inspect(compiled, original=source)
    assert report.edgetpu is not None
    assert report.edgetpu.nodes == 2
    assert report.edgetpu.parameters_cached_bytes == 150
    assert report.edgetpu.parameters_streamed_bytes == 7
    # The newest of them decides what runtime is needed.
    assert report.edgetpu.min_runtime_version == 14
    assert report.edgetpu.executables == 4
    assert {op.index for op in report.ops if op.unit is Unit.TPU} == {0, 1, 2, 4, 5}


def test_absent_minimum_runtime_stays_absent(
    tmp_path: Path, conv_chain: Callable[..., bytes], compile_like, node
) -> None:
    original = conv_chain("CONV_2D")
    compiled, _ = _pair(tmp_path, compile_like(original, [node((0,), runtime=None)]), original)
    report = analyse.inspect(compiled)
    assert report.edgetpu is not None
    assert report.edgetpu.min_runtime_version is None


def test_a_runtime_from_the_future_is_warned_of(
    tmp_path: Path, conv_chain: Callable[..., bytes], compile_like, node
) -> None:
    original = conv_chain("CONV_2D")
    compiled, _ = _pair(tmp_path, compile_like(original, [node((0,), runtime=99)]), original)
    assert "runtime_too_new" in {warning.code for warning in analyse.inspect(compiled).warnings}


def test_an_operation_that_only_the_names_know_is_not_guessed(
    tmp_path: Path, conv_chain: Callable[..., bytes], compile_like, node
) -> None:
    original = conv_chain(*CHAIN)
    # The result of operation 4 has another name in the compiled file, so it can't be found by it.
    compiled, source = _pair(
        tmp_path, compile_like(original, [node((0, 1, 2))], rename={"out4": "renamed"}), original
    )
    report = analyse.inspect(compiled, original=source)
    warning = next(warning for warning in report.warnings if warning.code == "estimates_disagree")
    assert "4 CONV_2D" in warning.message
    assert report.ops[4].unit is Unit.UNSPECIFIED
    assert report.placement is not None
    assert report.placement.verdict is Verdict.UNSPECIFIED
    assert report.placement.accelerated_ops is None
    assert report.placement.cpu_ops is None


def test_a_supported_operation_that_was_left_out_first_is_a_root(
    tmp_path: Path, conv_chain: Callable[..., bytes], compile_like, node
) -> None:
    original = conv_chain("CONV_2D", "CONV_2D", "RELU", "CONV_2D")
    compiled, source = _pair(tmp_path, compile_like(original, [node((0,))]), original)
    report = analyse.inspect(compiled, original=source)
    assert [op.root_cause for op in report.ops] == [None, True, False, False]
    assert report.ops[1].cause.startswith("Operation is otherwise supported, but not mapped")
    assert "1 (CONV_2D)" in report.ops[3].cause


def test_an_older_compiler_left_out_half_pixel_centres(
    tmp_path: Path, make: Callable[[], Made], compile_like, node
) -> None:
    from boardbench.cli.tflite_build import Options

    made = make()
    first = made.graph.tensor("in", (1, 4, 4, 4), "int8", scale=0.5)
    middle, out = (
        made.graph.tensor("mid", (1, 4, 4, 4), "int8", scale=0.5),
        made.graph.tensor("out", (1, 8, 8, 4), "int8"),
    )
    made.graph.operator("RELU", [first], [middle])
    options = Options("ResizeBilinearOptions", {"halfPixelCenters": True})
    made.graph.operator("RESIZE_BILINEAR", [middle, made.constant([8, 8])], [out], options, version=3)
    original = made.finish([first], [out])
    compiled, source = _pair(tmp_path, compile_like(original, [node((0,))]), original)
    report = analyse.inspect(compiled, original=source)
    assert report.ops[1].cause.startswith("Operation version not supported")
    assert report.ops[1].root_cause is True
    # Compiler 16 maps it.
    predicted = analyse.inspect(source, target="edgetpu")
    assert [op.unit for op in predicted.ops] == [Unit.TPU, Unit.TPU]


def test_nothing_was_compiled(tmp_path: Path, conv_chain: Callable[..., bytes]) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(conv_chain("LEAKY_RELU"))
    report = analyse.inspect(path, target="edgetpu")
    assert report.placement is not None
    assert report.placement.verdict is Verdict.NOT_ACCELERATED
    assert report.edgetpu is None


def test_node_without_a_package_is_malformed(make: Callable[[], Made], tmp_path: Path) -> None:
    for number, options in enumerate((None, b"", b"\x00\x01", b"{}", bytes(64))):
        made = make()
        first, out = made.value((1, 4)), made.value((1, 4))
        made.graph.operator("edgetpu-custom-op", [first], [out], custom_options=options)
        path = tmp_path / f"{number}.tflite"
        path.write_bytes(made.finish([first], [out]))
        with pytest.raises(Malformed):
            analyse.inspect(path)


def test_wrong_kind_of_original(tmp_path: Path, conv_chain: Callable[..., bytes], compile_like, node) -> None:
    original = conv_chain("CONV_2D")
    compiled, _ = _pair(tmp_path, compile_like(original, [node((0,))]), original)
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    with pytest.raises(InspectError, match="is none"):
        analyse.inspect(compiled, original=text)


@pytest.mark.parametrize(
    "name",
    [
        "deeplabv3_mnv2_dm05_pascal_quant",
        "movenet_single_pose_lightning_ptq",
        "posenet_mobilenet_v1_075_353_481_16_quant_decoder",
    ],
)
def test_a_compiled_file_alone_tells_why_operations_stayed(shared_models: Path, name: str) -> None:
    """What stayed is in the compiled file with all its tensors, so the roots are those of the original."""
    compiled, original = shared_models / f"{name}_edgetpu.tflite", shared_models / f"{name}.tflite"
    alone = analyse.inspect(compiled)
    both = analyse.inspect(compiled, original=original)

    def stayed(report: analyse.ModelReport) -> dict[tuple[str, str], tuple[str, bool | None]]:
        assert report.placement is not None
        return {
            (op.type, op.name): (op.cause.split(":")[0], op.root_cause)
            for op in report.placement.ops
            if op.unit is Unit.CPU
        }

    assert stayed(alone)
    assert stayed(alone) == stayed(both)
    assert alone.placement is not None
    assert alone.placement.accelerated_ops is None
