"""Reports on Google's own models: figures checked against the compiler's logs and libedgetpu's reader."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from boardbench.inspect import analyse
from boardbench.inspect.report import Evidence, Unit, Verdict

# name → bytes, TPU nodes, CPU operations, cached, streamed, minimum runtime.
COMPILED = {
    "mobilenet_v1_0.25_128_quant_edgetpu": (801454, 1, 0, 566912, 0, 12),
    "mobilenet_v1_0.5_160_quant_edgetpu": (1743534, 1, 0, 1473280, 0, 12),
    "deeplabv3_mnv2_dm05_pascal_quant_edgetpu": (1107584, 1, 8, 766720, 0, 12),
    "keras_lstm_mnist_ptq_edgetpu": (140096, 1, 0, 43968, 576, 12),
    "movenet_single_pose_lightning_ptq_edgetpu": (3087168, 1, 59, 2862656, 2368, 12),
    "posenet_mobilenet_v1_075_353_481_16_quant_decoder_edgetpu": (1598832, 1, 1, 1444608, 0, 12),
    "mobilenet_v1_0.25_128_quant_cocompiled_with_3quant_edgetpu": (809646, 1, 0, 315840, 251072, 12),
    "ssd_mobilenet_v1_coco_quant_postprocess_segment_0_of_2_edgetpu": (3499360, 1, 0, 3363072, 0, 12),
    "ssd_mobilenet_v1_coco_quant_postprocess_segment_1_of_2_edgetpu": (3928416, 1, 3, 3694528, 0, 12),
    "split_concat_edgetpu": (58504, 1, 0, 192, 0, 13),
}
# compiled → original, operations mapped, operations on the CPU.
PAIRS = {
    "deeplabv3_mnv2_dm05_pascal_quant_edgetpu": ("deeplabv3_mnv2_dm05_pascal_quant", 64, 8),
    "keras_lstm_mnist_ptq_edgetpu": ("keras_lstm_mnist_ptq", 6, 0),
    "mobilenet_v1_0.25_128_quant_edgetpu": ("mobilenet_v1_0.25_128_quant", 31, 0),
    "mobilenet_v1_0.25_128_quant_cocompiled_with_3quant_edgetpu": ("mobilenet_v1_0.25_128_quant", 31, 0),
    "mobilenet_v1_0.5_160_quant_edgetpu": ("mobilenet_v1_0.5_160_quant", 31, 0),
    "movenet_single_pose_lightning_ptq_edgetpu": ("movenet_single_pose_lightning_ptq", 98, 59),
    "posenet_mobilenet_v1_075_353_481_16_quant_decoder_edgetpu": (
        "posenet_mobilenet_v1_075_353_481_16_quant_decoder",
        37,
        1,
    ),
    "split_concat_edgetpu": ("split_concat", 3, 0),
}
MOVENET_MAPPED = {*range(2, 89), *range(100, 105), *range(106, 112)}


def _file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.tflite"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the real models")
    return path


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_file_alone(shared_models: Path, name: str) -> None:
    size, nodes, cpu_ops, cached, streamed, runtime = COMPILED[name]
    report = analyse.inspect(_file(shared_models, name))
    assert report.size_bytes == size
    assert report.edgetpu is not None
    assert report.edgetpu.nodes == nodes
    assert report.edgetpu.parameters_cached_bytes == cached
    assert report.edgetpu.parameters_streamed_bytes == streamed
    assert report.edgetpu.min_runtime_version == runtime
    assert report.edgetpu.chip == "beagle"
    assert report.edgetpu.executables == 2
    assert report.edgetpu.parameter_caching_token
    assert report.edgetpu.compiler_version.startswith("cl/")
    placement = report.placement
    assert placement is not None
    assert placement.evidence is Evidence.STATIC
    assert placement.cpu_ops == cpu_ops
    assert sum(placement.cpu_op_types.values()) == cpu_ops
    assert placement.verdict is (Verdict.PARTLY if cpu_ops else Verdict.ACCELERATED)
    # What is inside a node, the file does not say.
    assert placement.accelerated_ops is None
    assert not placement.accelerated_op_types
    assert report.parameter_count is None
    assert report.multiply_accumulates is None
    assert [op.unit for op in report.ops].count(Unit.TPU) == nodes
    assert [op.unit for op in report.ops].count(Unit.CPU) == cpu_ops
    assert ("parameters_streamed" in {warning.code for warning in report.warnings}) == (streamed > 0)
    assert report.target == "edgetpu"


@pytest.mark.parametrize("name", PAIRS)
def test_compiled_file_with_its_original(shared_models: Path, name: str) -> None:
    original_name, mapped, cpu_ops = PAIRS[name]
    original = _file(shared_models, original_name)
    report = analyse.inspect(_file(shared_models, name), original=original)
    placement = report.placement
    assert placement is not None
    assert placement.evidence is Evidence.STATIC
    assert (placement.accelerated_ops, placement.cpu_ops) == (mapped, cpu_ops)
    assert "estimates_disagree" not in {warning.code for warning in report.warnings}
    assert {count.unit: count.ops for count in placement.units} == {
        unit: count for unit, count in ((Unit.CPU, cpu_ops), (Unit.TPU, mapped)) if count
    }
    for op in report.ops:
        if op.unit is Unit.TPU:
            assert (op.cause, op.root_cause, op.remedy) == ("", None, "")
        else:
            assert op.cause
            assert op.remedy
            assert op.root_cause is not None
    assert report.original_sha256 == hashlib.sha256(original.read_bytes()).hexdigest()
    assert report.parameter_count
    assert report.multiply_accumulates is not None


@pytest.mark.parametrize("name", PAIRS)
def test_prediction_is_what_the_compiler_did(shared_models: Path, name: str) -> None:
    original = _file(shared_models, PAIRS[name][0])
    done = analyse.inspect(_file(shared_models, name), original=original)
    predicted = analyse.inspect(original, target="edgetpu")
    assert predicted.placement is not None
    assert predicted.placement.evidence is Evidence.PREDICTION
    assert [op.unit for op in predicted.ops] == [op.unit for op in done.ops]
    assert [(op.index, op.cause, op.root_cause) for op in predicted.ops] == [
        (op.index, op.cause, op.root_cause) for op in done.ops
    ]
    assert "not_compiled" in {warning.code for warning in predicted.warnings}


def test_deeplab_has_one_blocker_and_an_arg_max(shared_models: Path) -> None:
    report = analyse.inspect(
        _file(shared_models, "deeplabv3_mnv2_dm05_pascal_quant_edgetpu"),
        original=_file(shared_models, "deeplabv3_mnv2_dm05_pascal_quant"),
    )
    cpu = {op.index: op for op in report.ops if op.unit is Unit.CPU}
    assert sorted(cpu) == list(range(64, 72))
    assert [index for index, op in cpu.items() if op.root_cause] == [64, 71]
    assert cpu[64].type == "RESIZE_BILINEAR"
    assert "1x1 to 33x33" in cpu[64].cause
    assert cpu[71].type == "ARG_MAX"
    assert "unsupported data type" in cpu[71].cause
    assert "int64" in cpu[71].cause
    for index in range(65, 71):
        assert cpu[index].cause.startswith("More than one subgraph is not supported")
        assert "64 (RESIZE_BILINEAR)" in cpu[index].cause


def test_movenet_is_mapped_behind_an_operation_on_the_cpu(shared_models: Path) -> None:
    report = analyse.inspect(
        _file(shared_models, "movenet_single_pose_lightning_ptq_edgetpu"),
        original=_file(shared_models, "movenet_single_pose_lightning_ptq"),
    )
    assert {op.index for op in report.ops if op.unit is Unit.TPU} == MOVENET_MAPPED
    by_index = {op.index: op for op in report.ops}
    assert "float32" in by_index[0].cause
    assert by_index[0].root_cause
    assert "int32" in by_index[89].cause
    collateral = [op for op in report.ops if op.root_cause is False]
    assert {op.type for op in collateral} == {"RESHAPE", "ADD", "SUB", "MUL", "PACK", "CONCATENATION"}


@pytest.mark.parametrize(
    ("name", "macs", "parameters"),
    [
        # The papers and model cards say 300 and 14 million, 3.5 and 0.47 million.
        ("tf2_mobilenet_v2_1.0_224_ptq", 300_775_552, 3_489_101),
        ("mobilenet_v1_0.25_128_quant", 13_570_304, 467_595),
    ],
)
def test_figures_of_known_models(shared_models: Path, name: str, macs: int, parameters: int) -> None:
    report = analyse.inspect(_file(shared_models, name))
    assert report.multiply_accumulates == macs
    assert report.parameter_count == parameters


def test_every_byte_of_every_model_is_accounted_for(shared_models: Path) -> None:
    for path in sorted(shared_models.glob("*.tflite")):
        report = analyse.inspect(path)
        assert sum(use.size_bytes for use in report.bytes) == path.stat().st_size == report.size_bytes, (
            path.name
        )
        if path.name != "model_invoking_error.tflite":  # holds an older copy of itself that nothing refers to
            assert "unreferenced" not in {use.purpose for use in report.bytes}, path.name
        for use in report.bytes:
            assert use.zero_elements is None or (
                use.elements is not None and use.zero_elements <= use.elements
            )


def test_original_of_another_model_is_refused(shared_models: Path) -> None:
    with pytest.raises(analyse.InspectError, match="not the one that was compiled"):
        analyse.inspect(
            _file(shared_models, "split_concat_edgetpu"),
            original=_file(shared_models, "keras_lstm_mnist_ptq"),
        )


def test_swapped_pair_is_refused(shared_models: Path) -> None:
    compiled, original = _file(shared_models, "split_concat_edgetpu"), _file(shared_models, "split_concat")
    with pytest.raises(analyse.InspectError, match="not compiled for the Edge TPU"):
        analyse.inspect(original, original=compiled)
    with pytest.raises(analyse.InspectError, match="itself compiled"):
        analyse.inspect(compiled, original=compiled)
