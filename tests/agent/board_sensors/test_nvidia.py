"""NVIDIA's cards through the real ``nvidia-ml-py``, which loads a stand-in for the driver's library.

Each in a process of its own: the loader finds a library by LD_LIBRARY_PATH only when the process starts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.board.sensors import nvidia

READ = """
import json, sys
import pynvml
from boardbench.agent.board.sensors import nvidia
found = {}
for sensor in nvidia.open_all(pynvml):
    said, failure = [], ""
    try:
        for reading in sensor.read():
            coverage = reading.coverage.name if reading.coverage else ""
            said.append([reading.quantity, reading.source, reading.value, reading.cumulative, coverage])
    except OSError as error:
        failure = f"{error.errno} {error}"
    found[sensor.name] = {"said": said, "failure": failure}
print(json.dumps(found))
"""


@pytest.fixture
def cards(nvml_standin: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """What the cards of the stand-in say, under these variables."""
    if importlib.util.find_spec("pynvml") is None:
        pytest.skip("no nvidia-ml-py here: pip install nvidia-ml-py")

    def read(*flags: str, **variables: str) -> dict[str, Any]:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(nvml_standin(*flags)), **variables}
        done = subprocess.run(
            [sys.executable, "-c", READ], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return read


WHOLE = [
    ["power_watts", "gpu0", 71.5, False, "DEVICE"],
    ["energy_joules", "gpu0", 123456.789, True, "DEVICE"],
    ["temperature_celsius", "gpu0", 54.0, False, ""],
    ["frequency_hertz", "gpu0", 1.41e9, False, ""],
    ["frequency_hertz", "gpu0 memory", 6.001e9, False, ""],
    ["power_capped_now", "gpu0", 1.0, False, ""],
    ["hardware_slowdown_now", "gpu0", 0.0, False, ""],
    ["thermal_slowdown_now", "gpu0", 1.0, False, ""],
    ["hardware_thermal_slowdown_now", "gpu0", 0.0, False, ""],
    ["power_brake_now", "gpu0", 0.0, False, ""],
    ["busy_ratio", "gpu0", 0.87, False, ""],
    ["accelerator_memory_bytes", "gpu0", float(3 << 30), False, ""],
    ["accelerator_memory_bytes", "gpu0 pid 4242", float(2 << 30), False, ""],
    ["accelerator_memory_bytes", "gpu0 pid 17", float(512 << 20), False, ""],
]


def test_a_card_tells_all(cards: Callable[..., dict[str, Any]]) -> None:
    found = cards()
    assert list(found) == ["gpu0", "gpu1"]
    assert found["gpu0"] == {"said": WHOLE, "failure": ""}
    assert len(found["gpu1"]["said"]) == len(WHOLE)


def test_a_driver_that_has_the_older_name_of_the_reasons(cards: Callable[..., dict[str, Any]]) -> None:
    assert cards("-DOLD_DRIVER")["gpu0"] == {"said": WHOLE, "failure": ""}


def test_what_a_card_does_not_have_is_left_out(cards: Callable[..., dict[str, Any]]) -> None:
    found = cards(NVML_STANDIN_LACKS="nvmlDeviceGetTotalEnergyConsumption,nvmlDeviceGetPowerUsage")
    assert found["gpu1"]["failure"] == ""
    quantities = {quantity for quantity, *_ in found["gpu1"]["said"]}
    assert quantities.isdisjoint({"power_watts", "energy_joules"})
    assert "temperature_celsius" in quantities
    assert cards(NVML_STANDIN_LACKS="*")["gpu1"] == {"said": [], "failure": ""}


def test_a_card_that_is_lost_is_an_oserror_and_tells_the_rest(cards: Callable[..., dict[str, Any]]) -> None:
    found = cards(NVML_STANDIN_FAILS="nvmlDeviceGetPowerUsage")
    assert "GPU is lost" in found["gpu1"]["failure"]
    assert len(found["gpu1"]["said"]) == len(WHOLE) - 1
    assert found["gpu0"]["failure"] == ""


@pytest.mark.parametrize(("code", "names"), [("9", []), ("12", []), ("4", ["nvml"])])
def test_without_a_driver_there_are_no_cards(
    cards: Callable[..., dict[str, Any]], code: str, names: list[str]
) -> None:
    """9: the driver is not loaded; 12: no library. 4 (no permission) is not absence: it is told."""
    found = cards(NVML_STANDIN_INIT=code)
    assert list(found) == names
    assert all(each["failure"] for each in found.values())


def test_the_library_that_is_not_there_is_quiet(tmp_path: Path) -> None:
    pytest.importorskip("pynvml", reason="no nvidia-ml-py here: pip install nvidia-ml-py")
    script = (
        "import pynvml\nfrom boardbench.agent.board.sensors import nvidia\nprint(nvidia.open_all(pynvml))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if "NvidiaGpu" in done.stdout:
        pytest.skip("this machine has NVIDIA's driver")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_another_root_is_not_this_machine(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: …\n")
    assert nvidia.find(tmp_path) == []


def test_a_package_that_is_not_installed_is_quiet() -> None:
    assert nvidia.find(Path("/"), module="boardbench_has_no_such_module") == []


def test_nothing_is_imported_where_there_is_no_driver() -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has NVIDIA's driver")
    script = (
        "import sys; from pathlib import Path; from boardbench.agent.board.sensors import nvidia; "
        "nvidia.find(Path('/')); print('pynvml' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
