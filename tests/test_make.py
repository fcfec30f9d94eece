"""What `make` says before it installs anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def python(path: Path, version: str) -> Path:
    """What passes for a Python of this version, as far as make asks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    enough = 0 if tuple(map(int, version.split("."))) >= (3, 10) else 1
    path.write_text(
        f'#!/bin/sh\ncase "$2" in *exit*) exit {enough};; *print*) echo {version};; *) exit 9;; esac\n'
    )
    path.chmod(0o755)
    return path


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The make that runs the tests would hand its own arguments down.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")
    }
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
    )


def test_a_python_asked_for_is_not_passed_over_for_the_one_that_is_there(tmp_path: Path) -> None:
    python(tmp_path / "venv/bin/python", "3.11")
    newer, same = python(tmp_path / "newer", "3.12"), python(tmp_path / "same", "3.11")
    refused = make("same-python", f"VENV={tmp_path}/venv", f"PYTHON={newer}")
    assert refused.returncode != 0
    assert "is of Python 3.11: make clean first, or keep both with VENV=.venv-3.12" in refused.stdout
    assert make("same-python", f"VENV={tmp_path}/venv", f"PYTHON={same}").returncode == 0
    assert make("same-python", f"VENV={tmp_path}/venv").returncode == 0


def test_a_python_that_is_too_old_makes_no_environment(tmp_path: Path) -> None:
    old = python(tmp_path / "old", "3.9")
    refused = make(f"{tmp_path}/venv/bin/python", f"VENV={tmp_path}/venv", f"PYTHON={old}")
    assert refused.returncode != 0
    assert "is no Python 3.10 or newer" in refused.stdout
    assert not (tmp_path / "venv").exists()
