"""A process that outlives the test that started it is found, told and ended, whoever started it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")

# Whoever starts it is gone before it is looked for.
ORPHAN = (
    "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True, stdin=subprocess.DEVNULL,"
    " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)"
)
LEAKING = f"""
import subprocess, sys

def test_that_leaves_something(survivors):
    survivors.GOING_SECONDS = 0.0
    subprocess.run([sys.executable, "-c", {ORPHAN!r}], check=True)
"""


@pytest.fixture
def name(tmp_path: Path) -> str:
    """What no other process has in its environment."""
    return str(tmp_path)


@pytest.fixture
def look(survivors: ModuleType, name: str) -> Callable[[], list[Any]]:
    return lambda: list(survivors.started_with("BOARDBENCH_TESTS_OWN", name))


def test_an_orphan_is_found_by_what_it_was_started_with_and_ended(
    survivors: ModuleType, name: str, look: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survivors, "GOING_SECONDS", 0.0)
    environment = os.environ | {"BOARDBENCH_TESTS_OWN": name}
    subprocess.run([sys.executable, "-c", ORPHAN], check=True, env=environment)
    (found,) = look()
    assert found.command == "sleep 600"
    assert survivors.started_with("BOARDBENCH_TESTS_OWN", name[:-1]) == []
    assert found in survivors.started_with(survivors.MARK, os.environ[survivors.MARK])
    with pytest.raises(AssertionError, match=f"left behind.*{found.pid} .sleep 600.*test_an_orphan_is_found"):
        survivors.check_none_is_left(look)
    assert look() == []
    survivors.check_none_is_left(look)


def test_one_that_ends_by_itself_is_waited_for(
    survivors: ModuleType, name: str, look: Callable[[], list[Any]]
) -> None:
    environment = os.environ | {"BOARDBENCH_TESTS_OWN": name}
    with subprocess.Popen(["sleep", "0.2"], env=environment) as process:
        assert process.pid in [found.pid for found in survivors.children()]
        survivors.check_none_is_left(look)


def test_a_session_whose_tests_leave_something_fails(
    name: str, look: Callable[[], list[Any]], tmp_path: Path
) -> None:
    (tmp_path / "test_leaking.py").write_text(LEAKING)
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    environment |= {"BOARDBENCH_TESTS_OWN": name, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path / "test_leaking.py")),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 passed, 1 error" in done.stdout
    assert "sleep 600), started during test_leaking.py::test_that_leaves_something" in done.stdout
    assert look() == []
