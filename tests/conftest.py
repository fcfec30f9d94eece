"""Fixtures that every suite shares."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Engines are also tested under interpreters that have nothing else of the tests'.
with contextlib.suppress(ModuleNotFoundError):
    import hypothesis

    # How long an example takes tells how busy the machine is: hypothesis' own limit is 200 ms, which one
    # fsync can take.
    hypothesis.settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("untimed")

# Interpreters with engines that can't live beside the others; `make test` builds them. Set here and not
# in a fixture, because modules decide while they are collected what to skip.
for _variable, _environment in {
    "BOARDBENCH_TFLITE_RUNTIME_PYTHON": "tflite-runtime",
    "BOARDBENCH_ORT_OPENVINO_PYTHON": "ort-openvino",
    "BOARDBENCH_ORT_PLUGIN_PYTHON": "ort-plugin",
}.items():
    _python = REPOSITORY / ".cache" / "engines" / _environment / "bin" / "python"
    if _python.exists():
        os.environ.setdefault(_variable, str(_python))


def _module(path: Path) -> ModuleType:
    """The module in a file of the tests, which is in no package."""
    name = f"boardbench_tests_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def survivors() -> ModuleType:
    """Finds and ends processes that outlived whoever started them (survivors.py)."""
    return _module(REPOSITORY / "tests" / "survivors.py")


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_tests(survivors: ModuleType) -> Iterator[None]:
    """Fails when a process is left at the end that a test, or a process of a test, has started; kills it."""
    mark = f"{os.getpid()}-{secrets.token_hex(8)}"
    os.environ[survivors.MARK] = mark
    others = {child.pid for child in survivors.children()}
    yield

    def left() -> list[Any]:
        # This process's own may have been given another environment.
        own = [child for child in survivors.children() if child.pid not in others]
        return list({*survivors.started_with(survivors.MARK, mark), *own})

    survivors.check_none_is_left(left)


@pytest.fixture(scope="session")
def small_disks() -> ModuleType:
    """Makes file systems with little room, and fills them (small_disks.py)."""
    return _module(REPOSITORY / "tests" / "small_disks.py")


@pytest.fixture
def small_disk(small_disks: ModuleType) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many bytes; skips, saying so, where this user may not mount one."""
    made = small_disks.SmallDisks()

    def make(size_bytes: int) -> Path:
        try:
            return Path(made.make(size_bytes))
        except small_disks.NoSmallDisk as error:
            pytest.skip(f"a full disk can't be shown here: {error}")

    yield make
    made.close()


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
    build = _module(REPOSITORY / "tests" / "standin" / "build.py")
    try:
        return build.build(tmp_path_factory.mktemp("standin"))
    except build.NoCompiler as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def release_packages() -> ModuleType:
    """Makes and signs small packages of releases (release_packages.py)."""
    return _module(REPOSITORY / "tests" / "release_packages.py")


@pytest.fixture(scope="session")
def build_deb() -> ModuleType:
    """The program that builds the agent's packages (deploy/build_deb.py)."""
    return _module(REPOSITORY / "deploy" / "build_deb.py")


@pytest.fixture(scope="session")
def affine_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example of an engine from elsewhere, built and installed without a network."""
    folder = tmp_path_factory.mktemp("affine") / "site"
    # In a copy: building leaves nothing in the working tree.
    source = shutil.copytree(REPOSITORY / "examples" / "plugin-affine", folder.parent / "source")
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, *offline, "--target", str(folder), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
