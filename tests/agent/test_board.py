"""What the board says of itself, read from the trees in ``tests/boards``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from boardbench.agent.board import identify as identify_module
from boardbench.agent.board.identify import core_types, derive_device_id, identify, is_recorded
from boardbench.agent.board.sensor import Sensor
from boardbench.agent.board.sensors import cpufreq, find_all, thermal
from boardbench.agent.errors import StorageError
from boardbench.v1 import board_pb2

BOARDS = Path(__file__).parent.parent / "boards"


def board(name: str, architecture: str = "aarch64") -> board_pb2.Board:
    return identify(BOARDS / name, device_id="it", labels={"lab": "zurich"}, architecture=architecture)


def copied(name: str, tmp_path: Path) -> Path:
    """A tree that the test may change."""
    root = tmp_path / name
    shutil.copytree(BOARDS / name, root, symlinks=True)
    return root


# --- identify


def test_raspberry_pi() -> None:
    found = board("raspberry_pi_5")
    assert found == board_pb2.Board(
        device_id="it",
        hostname="raspberrypi",
        model="Raspberry Pi 5 Model B Rev 1.0",
        soc="bcm2712",
        architecture="aarch64",
        cpu_model="Cortex-A76",
        cpu_count=4,
        memory_bytes=8256752 * 1024,
        os="Debian GNU/Linux 12 (bookworm)",
        kernel="6.6.51+rpt-rpi-2712",
        labels={"lab": "zurich"},
    )


def test_jetson_has_its_gpu() -> None:
    found = board("jetson_orin_nano")
    assert (found.soc, found.cpu_model, found.cpu_count) == ("tegra234", "Cortex-A78AE", 6)
    assert [(each.kind, each.name, each.path) for each in found.accelerators] == [
        ("gpu", "tegra234 GPU", "/sys/bus/platform/devices/17000000.gpu")
    ]


def test_two_kinds_of_cores_are_both_named() -> None:
    found = board("rock_5b")
    assert found.cpu_model == "4 × Cortex-A55 + 4 × Cortex-A76"
    assert [each.kind for each in found.accelerators] == ["npu"]


def test_kinds_of_the_cores_that_are_used(tmp_path: Path) -> None:
    assert core_types(BOARDS / "rock_5b", [0, 4, 5]) == ["Cortex-A55", "Cortex-A76"]
    assert core_types(BOARDS / "rock_5b", [4]) == ["Cortex-A76"]
    assert core_types(BOARDS / "nuc", [0, 1]) == ["Intel(R) Core(TM) i3-8109U CPU @ 3.00GHz"]
    assert core_types(BOARDS / "rock_5b", []) == []
    for number, capacity in (0, 446), (1, 446), (2, 1024):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}"
        folder.mkdir(parents=True)
        (folder / "cpu_capacity").write_text(f"{capacity}\n")
    assert core_types(tmp_path, [0, 1, 2, 3]) == ["capacity 446", "capacity 1024"]
    for kind, numbers in ("cpu_core", "2-3"), ("cpu_atom", "0-1"):
        (tmp_path / "sys/devices" / kind).mkdir()
        (tmp_path / "sys/devices" / kind / "cpus").write_text(f"{numbers}\n")
    assert core_types(tmp_path, [0, 1, 2, 3]) == ["E-core", "P-core"]


def test_pc_is_told_by_its_dmi_without_what_its_maker_left_blank() -> None:
    found = board("nuc", "x86_64")
    assert found.model == "Intel(R) Client Systems NUC8i3BEH"
    assert found.cpu_model == "Intel(R) Core(TM) i3-8109U CPU @ 3.00GHz"
    assert [(each.kind, each.name) for each in found.accelerators] == [("gpu", "NVIDIA RTX A2000")]
    assert found.emulator == ""


@pytest.mark.parametrize(
    ("tree", "path", "name"),
    [
        ("tpu_pcie", "/dev/apex_0", "Google Coral Edge TPU (PCIe)"),
        (
            "tpu_pcie_no_driver",
            "/sys/bus/pci/devices/0000:01:00.0",
            "Google Coral Edge TPU (PCIe), no driver",
        ),
        ("tpu_usb3", "/sys/bus/usb/devices/", "Google Coral USB Accelerator"),
        ("tpu_usb_fresh", "/sys/bus/usb/devices/", "Google Coral USB Accelerator"),
    ],
)
def test_edge_tpu_is_found_once(tree: str, path: str, name: str) -> None:
    (found,) = board(tree).accelerators
    assert (found.kind, found.name, found.standin) == ("tpu", name, False)
    assert found.path.startswith(path)


@pytest.mark.parametrize(
    ("tree", "architecture", "emulator"),
    [
        ("raspberry_pi_5", "aarch64", ""),
        ("qemu_user", "aarch64", "qemu-user"),
        ("qemu_virt", "aarch64", "qemu"),
        ("kvm_guest", "x86_64", "kvm"),
    ],
)
def test_what_is_underneath(tree: str, architecture: str, emulator: str) -> None:
    assert board(tree, architecture).emulator == emulator


def test_foreign_cpuinfo_alone_tells_an_emulator(tmp_path: Path) -> None:
    root = copied("qemu_user", tmp_path)
    shutil.rmtree(root / "proc/self")
    assert identify(root, device_id="", labels={}, architecture="armv7l").emulator == "qemu-user"
    assert identify(root, device_id="", labels={}, architecture="x86_64").emulator == "vm"


def test_board_that_says_nothing_is_told_by_nothing(tmp_path: Path) -> None:
    found = identify(tmp_path, device_id="it", labels={}, architecture="riscv64")
    assert found == board_pb2.Board(device_id="it", architecture="riscv64")


def test_this_machine_is_identified() -> None:
    found = identify(Path("/"), device_id="it", labels={})
    assert found.cpu_count == os.cpu_count()
    assert found.architecture == os.uname().machine
    assert found.kernel == os.uname().release


# --- device id


def test_device_id_is_made_from_the_machine_id_and_does_not_show_it(tmp_path: Path) -> None:
    first = derive_device_id(BOARDS / "raspberry_pi_5", tmp_path / "a")
    again = derive_device_id(BOARDS / "raspberry_pi_5", tmp_path / "b")
    assert first == again
    assert first not in (BOARDS / "raspberry_pi_5/etc/machine-id").read_text()
    assert not (tmp_path / "a").exists(), "no folder is made where the machine says who it is"


def test_device_id_is_hashed_once_and_again_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = derive_device_id(BOARDS / "raspberry_pi_5", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(identify_module, "_keyed_hash", None)
        assert derive_device_id(BOARDS / "raspberry_pi_5", tmp_path) == first
    # The card is put into another board, or copied for it.
    other = tmp_path / "other"
    (other / "etc").mkdir(parents=True)
    (other / "etc/machine-id").write_text("0" * 31 + "1\n")
    second = derive_device_id(other, tmp_path)
    assert second != first
    assert derive_device_id(other, tmp_path) == second


def test_device_id_without_a_machine_id_is_made_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    # systemd's word for a first boot that is not over.
    (root / "etc/machine-id").write_text("uninitialized\n")
    first = derive_device_id(root, tmp_path / "data")
    assert len(first) == 16
    assert derive_device_id(root, tmp_path / "data") == first
    assert derive_device_id(root, tmp_path / "other") != first


def test_device_id_that_can_not_be_kept_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="set device_id"):
        derive_device_id(tmp_path / "nowhere", tmp_path / "file" / "data")


# --- sensors


def values(sensors: Iterable[Sensor], quantity: str) -> dict[str, float]:
    readings = [reading for sensor in sensors for reading in sensor.read()]
    return {reading.source: reading.value for reading in readings if reading.quantity == quantity}


def test_temperatures_are_in_celsius() -> None:
    assert values(find_all(BOARDS / "raspberry_pi_5"), "temperature_celsius") == {"cpu-thermal": 52.35}


def test_zone_that_is_off_is_left_out() -> None:
    temperatures = values(find_all(BOARDS / "jetson_orin_nano"), "temperature_celsius")
    assert temperatures == {"cpu-thermal": 48.5, "tj-thermal": 49.125}


def test_fan_is_no_throttling() -> None:
    assert values(find_all(BOARDS / "raspberry_pi_5"), "cooling_steps") == {"cpufreq-cpu0": 0.0}
    assert values(find_all(BOARDS / "jetson_orin_nano"), "cooling_steps") == {
        "cpufreq-cpu0": 3.0,
        "thermal-devfreq-0": 0.0,
    }


def test_frequencies_are_in_hertz() -> None:
    sensors = cpufreq.find(BOARDS / "jetson_orin_nano")
    assert values(sensors, "frequency_hertz")["cpu0"] == 1113.6e6
    assert values(sensors, "frequency_limit_hertz")["cpu5"] == 1344e6
    assert values(sensors, "frequency_maximum_hertz")["cpu5"] == 1728e6


def test_frequency_that_a_driver_does_not_know_is_left_out(tmp_path: Path) -> None:
    root = copied("raspberry_pi_5", tmp_path)
    (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq").write_text("<unknown>\n")
    assert set(values(cpufreq.find(root), "frequency_hertz")) == {"cpu1", "cpu2", "cpu3"}


@pytest.mark.parametrize(
    ("tree", "governor"), [("raspberry_pi_5", "ondemand"), ("rock_5b", "mixed"), ("kvm_guest", "")]
)
def test_governor(tree: str, governor: str) -> None:
    assert cpufreq.governor(BOARDS / tree) == governor


def test_board_without_sensors_has_none(tmp_path: Path) -> None:
    assert find_all(tmp_path) == []


def test_zone_that_is_no_number_is_an_error_and_not_a_zero(tmp_path: Path) -> None:
    root = copied("raspberry_pi_5", tmp_path)
    (root / "sys/class/thermal/thermal_zone0/temp").write_text("hot\n")
    (zone, _) = thermal.find(root)
    with pytest.raises(OSError, match="thermal_zone0"):
        list(zone.read())


def test_a_folder_is_no_hardware_and_the_host_of_a_container_is(tmp_path: Path) -> None:
    host = tmp_path / "host"
    (host / "sys").mkdir(parents=True)
    assert not is_recorded(Path("/"))
    assert is_recorded(host)
    asks = "import sys; from pathlib import Path; from boardbench.agent.board.identify import is_recorded; "
    asks += "print(is_recorded(Path(sys.argv[1])))"
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount.append('mount --rbind /sys "$1/sys" && shift && exec "$@"')
    asked = subprocess.run(
        [*mount, "_", str(host), sys.executable, "-c", asks, str(host)],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode:
        pytest.skip(f"this machine lets nobody mount what its kernel says elsewhere: {asked.stderr.strip()}")
    assert asked.stdout.strip() == "False"
