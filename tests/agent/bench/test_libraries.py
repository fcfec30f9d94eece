"""Libraries that came to the board as models are not loaded because an option names them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.bench import libraries
from boardbench.agent.bench.options import NATIVE_MODELS
from boardbench.agent.bench.runtime import OptionRejected
from boardbench.testkit.child import BRIEF

from . import models

SHA = "0123456789abcdef" * 4


@pytest.fixture
def pushed(tmp_path: Path, edgetpu_standin: Path) -> Path:
    """A delegate, as the agent would keep it."""
    path = tmp_path / f"{SHA}.ell"
    shutil.copy(edgetpu_standin, path)
    return path


@pytest.mark.parametrize("job", ["run", "profile"])
def test_a_delegate_that_was_pushed_is_refused_unless_programs_may_be_models(
    worker: Any, tmp_path: Path, pushed: Path, job: str
) -> None:
    model = tmp_path / "model.tflite"
    model.write_bytes(models.tflite_affine())
    line = {"kind": job, "runtime": "tflite", "format": "tflite", "model_path": str(model), **BRIEF,
            "options": {"delegate": str(pushed)}}  # fmt: skip
    if job == "profile":
        line["profile_runs"] = 3
    refused = worker.run(line)
    assert refused.error["code"] == "option_rejected"
    assert "a library that was pushed as a model" in refused.error["message"]
    allowed = worker.run(line, environ={NATIVE_MODELS: "1"})
    assert allowed.exit_code == 0, allowed.events


def test_links_and_lists_are_seen_through(
    tmp_path: Path, pushed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NATIVE_MODELS, raising=False)
    link = tmp_path / "libharmless.so"
    link.symlink_to(pushed)
    for value in (str(link), f"/nowhere/a.so;{pushed}", f"{tmp_path}/./{pushed.name}"):
        with pytest.raises(OptionRejected, match=r"provider\.backend_path"):
            libraries.refuse_pushed({"provider.backend_path": value})
    other = tmp_path / f"{SHA}.tflite"
    other.write_bytes(b"no library")
    libraries.refuse_pushed({"data_path": str(other), "delegate": "libedgetpu.so.1", "xnnpack": "on"})
    monkeypatch.setenv(NATIVE_MODELS, "1")
    libraries.refuse_pushed({"delegate": str(link)})
