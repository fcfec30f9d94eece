"""Fixtures that every suite shares."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Interpreters with engines that can't live beside the others; `make test` builds them. Set here and not
# in a fixture, because modules decide while they are collected what to skip.
for _variable, _environment in {
    "BOARDBENCH_TFLITE_RUNTIME_PYTHON": "tflite-runtime",
    "BOARDBENCH_ORT_OPENVINO_PYTHON": "ort-openvino",
}.items():
    _python = REPOSITORY / ".cache" / "engines" / _environment / "bin" / "python"
    if _python.exists():
        os.environ.setdefault(_variable, str(_python))


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of the real models (google-coral test data); skips, saying so, where it is not."""
    folder = Path(os.environ.get("BOARDBENCH_MODELS", REPOSITORY.parent / "shared" / "models"))
    if not folder.is_dir():
        pytest.skip(f"real models are not here: no folder {folder} (set BOARDBENCH_MODELS)")
    return folder


@pytest.fixture(scope="session")
def edgetpu_standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Library in the place of libedgetpu.so.1 (see standin/README.md); skips without a C compiler."""
    spec = importlib.util.spec_from_file_location(
        "standin_build", REPOSITORY / "tests" / "standin" / "build.py"
    )
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    try:
        return build.build(tmp_path_factory.mktemp("standin"))
    except build.NoCompiler as error:
        pytest.skip(str(error))
