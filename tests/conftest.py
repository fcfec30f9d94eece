"""Fixtures that every suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of the real models (google-coral test data); skips, saying so, where it is not."""
    folder = Path(os.environ.get("BOARDBENCH_MODELS", REPOSITORY.parent / "shared" / "models"))
    if not folder.is_dir():
        pytest.skip(f"real models are not here: no folder {folder} (set BOARDBENCH_MODELS)")
    return folder
