"""What the kinds of sensors read from the trees, to the last digit, and what changes it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from boardbench.agent.board.command import Command
from boardbench.agent.board.sensor import Coverage, Reading, Sensor, child_cpu_seconds, period_seconds
from boardbench.agent.board.sensors import (
    battery,
    coral,
    cpufreq,
    fan,
    find_all,
    gpu,
    hwmon_power,
    ina3221,
    npu,
    nvmap,
    over_current,
    power_mode,
    rapl,
    raspberry_pi,
    raspberry_pi_pmic,
    tegra_gpu,
    thermal,
    x86_throttle,
)

BOARDS = Path(__file__).resolve().parents[2] / "boards"


def readings(sensors: Iterable[Sensor]) -> list[Reading]:
    return [reading for sensor in sensors for reading in sensor.read()]


def values(sensors: Iterable[Sensor], quantity: str) -> dict[str, float]:
    return {r.source: r.value for r in readings(sensors) if r.quantity == quantity}


def total(sensors: Iterable[Sensor]) -> dict[str, tuple[float, Coverage]]:
    """Of power and energy, what is more than a part."""
    found = (r for r in readings(sensors) if r.coverage is not None and r.coverage > Coverage.RAIL)
    return {r.source: (round(r.value, 4), r.coverage) for r in found if r.coverage is not None}


def copied(tree: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(BOARDS / tree, tmp_path / tree, symlinks=True))


# --- Raspberry Pi


@pytest.mark.parametrize(
    ("tree", "now", "since_boot"),
    [
        ("raspberry_pi_5", set(), set()),
        (
            "raspberry_pi_4_throttled",
            {"undervoltage", "frequency_capped", "throttled"},
            # The kernel's driver has cleared the bit of the supply.
            {"frequency_capped", "throttled", "soft_temperature_limit"},
        ),
        ("raspberry_pi_3_soft_limit", {"soft_temperature_limit"}, {"soft_temperature_limit"}),
    ],
)
def test_the_firmware_tells_now_from_since_boot(tree: str, now: set[str], since_boot: set[str]) -> None:
    found = {
        r.quantity for r in readings(raspberry_pi.find(BOARDS / tree)) if r.source == "firmware" and r.value
    }
    assert found == {f"{name}_now" for name in now} | {f"{name}_since_boot" for name in since_boot}


def test_a_sticky_bit_that_is_older_than_the_run_shows_before_and_after(tmp_path: Path) -> None:
    root = copied("raspberry_pi_5", tmp_path)
    word = root / "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"
    word.write_text("40000\n")
    sensors = raspberry_pi.find(root)
    before = {r.quantity for r in readings(sensors) if r.value}
    word.write_text("50000\n")
    after = {r.quantity for r in readings(sensors) if r.value}
    assert before == {"throttled_since_boot"}
    assert after - before == {"undervoltage_since_boot"}


def test_the_program_is_asked_only_where_there_is_no_file(tmp_path: Path) -> None:
    root = copied("raspberry_pi_5", tmp_path)
    assert not any(isinstance(s, raspberry_pi.FirmwareCommand) for s in raspberry_pi.find(root))
    shutil.rmtree(root / "sys/devices/platform")
    [asked] = [s for s in raspberry_pi.find(root) if isinstance(s, raspberry_pi.FirmwareCommand)]
    assert period_seconds(asked) == 1.0
    assert child_cpu_seconds(asked) == 0.0
    assert len(list(asked.read())) == 8
    assert child_cpu_seconds(asked) > 0.0


def test_the_program_can_be_another(tmp_path: Path) -> None:
    program = tmp_path / "asked"
    program.write_text("#!/bin/sh\necho throttled=0x4\n")
    program.chmod(0o755)
    [sensor] = raspberry_pi.find(tmp_path, Command(program))
    assert {r.quantity for r in sensor.read() if r.value} == {"throttled_now"}


@pytest.mark.parametrize(
    ("text", "word"),
    [("50005\n", 0x50005), ("0x50005", 0x50005), ("throttled=0xE0008\n", 0xE0008), ("0", 0), ("", None),
     ("throttled=", None), ("5000000005", None), ("-1", None)],
)  # fmt: skip
def test_the_word_is_read_as_file_and_program_write_it(text: str, word: int | None) -> None:
    assert raspberry_pi.parse(text) == word


def test_the_alarm_of_the_supply() -> None:
    found = values(raspberry_pi.find(BOARDS / "raspberry_pi_4_throttled"), "undervoltage_now")
    assert found == {"firmware": 1.0, "rpi_volt": 1.0}


def test_rails_of_a_pi_5_and_their_sum() -> None:
    sensors = raspberry_pi_pmic.find(BOARDS / "raspberry_pi_5")
    watts = values(sensors, "power_watts")
    assert watts["VDD_CORE"] == pytest.approx(2.5 * 0.84)
    assert "EXT5V" not in watts, "it has no current"
    assert values(sensors, "voltage_volts") == {"EXT5V": 5.12}
    parts = [value for rail, value in watts.items() if rail != raspberry_pi_pmic.TOTAL]
    assert len(parts) == 12
    assert watts[raspberry_pi_pmic.TOTAL] == pytest.approx(sum(parts)) == pytest.approx(3.9177, abs=1e-3)
    assert list(total(sensors)) == [raspberry_pi_pmic.TOTAL]


def test_older_boards_have_no_such_rails() -> None:
    assert raspberry_pi_pmic.find(BOARDS / "raspberry_pi_4_throttled") == []


# --- Jetson


@pytest.mark.parametrize(
    ("tree", "rails", "name", "watts"),
    [
        ("jetson_nano", 3, "POM_5V_IN", 3.648),
        ("jetson_xavier_nx", 3, "VDD_IN", 4.424),
        ("jetson_orin_nano", 3, "VDD_IN", 9.39),
        ("jetson_agx_orin", 4, "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", 22.4038),
        ("jetson_agx_xavier", 6, "GPU + CPU + SOC + CV + VDDRQ + SYS5V", 5.3398),
    ],
)
def test_the_total_of_a_jetson_holds_every_rail_once(tree: str, rails: int, name: str, watts: float) -> None:
    sensors = ina3221.find(BOARDS / tree)
    assert total(sensors) == {name: (pytest.approx(watts, abs=1e-3), Coverage.MODULE)}
    parts = [r for r in readings(sensors) if r.quantity == "voltage_volts"]
    assert len(parts) == rails
    assert not any("NC" in r.source or "shunt" in r.source for r in parts)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), ("VDD_IN",)),
        (("POM_5V_GPU", "POM_5V_IN"), ("POM_5V_IN",)),
        (("VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"), ("VIN_SYS_5V0",)),
        (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),
        (("VDD_GPU_SOC", "VIN_SYS_5V0", "VDD_IN"), ("VDD_IN",)),
        (("GPU", "CPU", "SOC"), ()),
        ((), ()),
    ],
)
def test_which_rails_are_the_total(labels: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert ina3221.total_of(labels) == expected


def test_a_sum_that_lacks_a_part_is_none(tmp_path: Path) -> None:
    root = copied("jetson_agx_orin", tmp_path)
    sensors = ina3221.find(root)
    (root / "sys/class/hwmon/hwmon3/curr2_input").write_text("broken\n")
    found: list[Reading] = []
    with pytest.raises(OSError, match="curr2_input"):
        found.extend(sensors[0].read())
    # What could be read came before the failure.
    assert {r.source for r in found} == {"VDD_GPU_SOC", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}
    assert all(r.coverage in (None, Coverage.RAIL) for r in found)


def test_the_power_of_the_old_layout_is_read_and_not_computed() -> None:
    sensors = ina3221.find(BOARDS / "jetson_nano")
    assert values(sensors, "power_watts") == {"POM_5V_IN": 3.648, "POM_5V_GPU": 0.203, "POM_5V_CPU": 1.036}
    assert values(sensors, "current_amperes")["POM_5V_IN"] == 0.716


def test_over_current_events() -> None:
    assert values(over_current.find(BOARDS / "jetson_agx_orin"), "over_current_events") == {
        "oc1": 0.0, "oc2": 3.0, "oc3": 27390.0,
    }  # fmt: skip
    assert set(over_current.MEANINGS) == {"oc1", "oc2", "oc3"}


@pytest.mark.parametrize(
    ("tree", "busy", "hertz", "limit"),
    [
        ("jetson_nano", 0.0, 76.8e6, 921.6e6),
        ("jetson_xavier_nx", 0.712, 803.25e6, 1109.25e6),
        ("jetson_agx_xavier", 0.0, 114.75e6, 1377e6),
        ("jetson_orin_nano", 0.325, 306e6, 624.75e6),
        ("jetson_agx_orin", 0.14, 407e6, 1300.5e6),
    ],
)
def test_the_gpu_of_a_jetson(tree: str, busy: float, hertz: float, limit: float) -> None:
    sensors = tegra_gpu.find(BOARDS / tree)
    assert values(sensors, "busy_ratio") == {"gpu": busy}
    assert values(sensors, "frequency_hertz") == {"gpu": hertz}
    assert values(sensors, "frequency_limit_hertz") == {"gpu": limit}


def test_a_gpu_of_another_maker_is_no_tegra() -> None:
    assert tegra_gpu.find(BOARDS / "rock_5b") == []
    assert values(gpu.find(BOARDS / "rock_5b"), "busy_ratio") == {"fb000000.gpu": 0.07}
    assert gpu.find(BOARDS / "jetson_orin_nano") == [], "its devfreq has no load"


def test_memory_of_the_gpu_that_is_the_boards_own() -> None:
    found = values(nvmap.find(BOARDS / "jetson_orin_nano"), "accelerator_memory_bytes")
    kilo = 1024
    assert found == {
        "NvMapMemUsed": 1868040 * kilo, "nvmap": 1868040 * kilo, "nvmap pid 5120": 1843200 * kilo,
        "nvmap pid 1432": 19456 * kilo, "nvmap pid 1625": 5384 * kilo,
    }  # fmt: skip


def test_only_the_largest_clients_are_told(tmp_path: Path) -> None:
    root = copied("jetson_orin_nano", tmp_path)
    lines = [f"user  many  {pid}  {pid}K\n" for pid in range(100, 200)]
    (root / "sys/kernel/debug/nvmap/iovmm/clients").write_text("".join([*lines, "total  14950K\n"]))
    found = values(nvmap.find(root), "accelerator_memory_bytes")
    assert len(found) == 2 + 16
    assert "nvmap pid 199" in found
    assert "nvmap pid 100" not in found


@pytest.mark.parametrize(
    ("tree", "index", "name", "default", "fan_profile"),
    [
        ("jetson_orin_nano", 0, "15W", 0, ""),
        ("jetson_xavier_nx", 2, "MODE_15W_6CORE", 3, "quiet"),
        ("jetson_agx_orin", 3, "MODE_50W", 2, ""),
    ],
)
def test_the_power_mode(tree: str, index: int, name: str, default: int, fan_profile: str) -> None:
    assert power_mode.power_mode(BOARDS / tree) == power_mode.PowerMode(index, name, default, fan_profile)
    assert values(power_mode.find(BOARDS / tree), "power_mode_index") == {"nvpmodel": float(index)}


def test_a_board_without_power_modes_has_none(tmp_path: Path) -> None:
    assert power_mode.power_mode(BOARDS / "nuc") is None
    assert power_mode.jetson_clocks(BOARDS / "nuc") is None
    (tmp_path / "var/lib/nvpmodel").mkdir(parents=True)
    (tmp_path / "var/lib/nvpmodel/status").write_text("mode 2\n")
    with pytest.raises(OSError, match="not pmode"):
        power_mode.power_mode(tmp_path)


def test_clocks_that_are_held_are_told_from_those_that_move() -> None:
    moving = power_mode.jetson_clocks(BOARDS / "jetson_orin_nano")
    held = power_mode.jetson_clocks(BOARDS / "jetson_xavier_nx")
    assert moving is not None
    assert held is not None
    assert (moving.held, moving.mode, len(moving.governors)) == (False, "15W", 6)
    assert moving.clocks["cpu0"] == power_mode.Clock(729.6e6, 1510.4e6, 1113.6e6)
    assert moving.clocks["GPU"].maximum_hertz == 624.75e6
    assert (held.held, held.mode) == (True, "MODE_15W_6CORE")


def test_a_processor_that_is_off_holds_nothing_back() -> None:
    text = (
        "cpu0: Online=1 Governor=schedutil MinFreq=100 MaxFreq=100 CurrentFreq=100 IdleStates: C1=1\n"
        "cpu1: Online=0 Governor=schedutil MinFreq=10 MaxFreq=100 CurrentFreq=10 IdleStates: C1=1\n"
        "GPU MinFreq=5 MaxFreq=5 CurrentFreq=5\n"
        "EMC MinFreq=1 MaxFreq=9 CurrentFreq=9 FreqOverride=0\n"
    )
    assert power_mode.parse_clocks(text).held
    assert not power_mode.parse_clocks(text.replace("Online=0", "Online=1")).held
    assert not power_mode.parse_clocks("garbage").held


# --- PCs


def test_energy_of_packages_and_of_the_platform() -> None:
    laptop = rapl.find(BOARDS / "laptop_intel")
    assert total(laptop) == {
        "package-0": (61234.5679, Coverage.CHIP),
        "psys": (191234.5679, Coverage.BOARD),
    }
    assert set(values(laptop, "energy_joules")) == {
        "package-0", "package-0 core", "package-0 uncore", "psys",
    }, "the same package by another way is left out"  # fmt: skip
    assert total(rapl.find(BOARDS / "server_two_sockets")) == {"package-0 + package-1": (4.0, Coverage.CHIP)}


def test_a_counter_that_begins_anew_goes_on(tmp_path: Path) -> None:
    root = copied("laptop_amd", tmp_path)
    zone = root / "sys/class/powercap/intel-rapl:0"
    (zone / "max_energy_range_uj").write_text("100000000\n")
    sensors = rapl.find(root)
    seen = []
    for microjoules in (99_000_000, 99_900_000, 100_000, 50_000_000, 49_999_999):
        (zone / "energy_uj").write_text(f"{microjoules}\n")
        seen.append(values(sensors, "energy_joules")["package-0"])
    assert seen == pytest.approx([99.0, 99.9, 100.1, 150.0, 249.999999])


def test_a_counter_that_does_not_say_where_it_begins_anew_never_falls(tmp_path: Path) -> None:
    root = copied("laptop_amd", tmp_path)
    zone = root / "sys/class/powercap/intel-rapl:0"
    (zone / "max_energy_range_uj").unlink()
    sensors = rapl.find(root)
    before = values(sensors, "energy_joules")["package-0"]
    (zone / "energy_uj").write_text("5\n")
    assert values(sensors, "energy_joules")["package-0"] >= before


def test_packages_that_only_the_memory_mapped_way_shows(tmp_path: Path) -> None:
    root = copied("laptop_intel", tmp_path)
    for folder in (root / "sys/class/powercap").glob("intel-rapl:*"):
        shutil.rmtree(folder)
    assert set(values(rapl.find(root), "energy_joules")) == {"package-0"}


def test_meters_say_what_they_cover() -> None:
    assert total(hwmon_power.find(BOARDS / "mini_pc_usb_meter")) == {"powerz": (10.0931, Coverage.BOARD)}
    assert values(hwmon_power.find(BOARDS / "mini_pc_usb_meter"), "power_watts")["ina226"] == 2.023
    assert values(hwmon_power.find(BOARDS / "mini_pc_usb_meter"), "current_amperes") == {
        "ina226": 0.611, "powerz": 0.842,
    }  # fmt: skip
    assert total(hwmon_power.find(BOARDS / "server_two_sockets")) == {"power_meter": (212.0, Coverage.BOARD)}
    assert total(hwmon_power.find(BOARDS / "laptop_amd")) == {"amdgpu PPT": (6.174, Coverage.DEVICE)}


def test_what_others_read_or_nobody_measured_is_left_out() -> None:
    for tree in ("jetson_orin_nano", "laptop_intel", "raspberry_pi_5"):
        assert hwmon_power.find(BOARDS / tree) == []


def test_energy_of_a_graphics_card_and_several_channels(tmp_path: Path) -> None:
    chip = tmp_path / "sys/class/hwmon/hwmon1"
    chip.mkdir(parents=True)
    for name, content in {
        "name": "i915", "energy1_input": "5000000", "power1_input": "2000000", "power1_average": "9",
        "power2_input": "1000000", "power2_label": "gt0",
    }.items():  # fmt: skip
        (chip / name).write_text(content + "\n")
    found = {(r.quantity, r.source): (r.value, r.coverage) for r in readings(hwmon_power.find(tmp_path))}
    assert found == {
        ("energy_joules", "i915"): (5.0, Coverage.DEVICE),
        ("power_watts", "i915 1"): (2.0, Coverage.DEVICE),
        ("power_watts", "i915 gt0"): (1.0, Coverage.RAIL),
    }


def test_a_battery_tells_only_while_it_gives(tmp_path: Path) -> None:
    assert total(battery.find(BOARDS / "laptop_amd")) == {"BAT1": (pytest.approx(10.3929), Coverage.BOARD)}
    assert readings(battery.find(BOARDS / "laptop_intel")) == []
    root = copied("laptop_intel", tmp_path)
    supply = root / "sys/class/power_supply/BAT0"
    sensors = battery.find(root)
    (supply / "status").write_text("Discharging\n")
    (supply / "power_now").write_text("-7250000\n")
    assert total(sensors) == {"BAT0": (7.25, Coverage.BOARD)}


def test_two_batteries_give_together(tmp_path: Path) -> None:
    root = copied("laptop_amd", tmp_path)
    supplies = root / "sys/class/power_supply"
    shutil.copytree(supplies / "BAT1", supplies / "BAT2")
    (supplies / "BAT2/current_now").write_text("-348000\n")
    assert total(battery.find(root)) == {"BAT1 + BAT2": (pytest.approx(15.94), Coverage.BOARD)}
    (supplies / "BAT2/status").write_text("Full\n")
    assert total(battery.find(root)) == {"BAT1 + BAT2": (pytest.approx(10.3929), Coverage.BOARD)}


def test_throttling_of_a_pc_is_counted_once_a_core_and_a_package() -> None:
    sensors = x86_throttle.find(BOARDS / "laptop_intel")
    assert values(sensors, "throttle_events") == {"package-0": 41.0, "package-0 cores": 7.0}
    assert values(sensors, "throttled_seconds") == {"package-0": 2.507, "package-0 cores": 0.025}
    assert len(x86_throttle.find(BOARDS / "server_two_sockets")) == 2


# --- GPUs and NPUs


def test_an_amd_gpu() -> None:
    sensors = gpu.find(BOARDS / "laptop_amd")
    assert values(sensors, "busy_ratio") == {"amdgpu card1": 0.13}
    assert values(sensors, "accelerator_memory_bytes") == {"amdgpu card1": 412065792.0}
    assert values(sensors, "frequency_hertz") == {"amdgpu card1": 800e6}
    assert values(sensors, "temperature_celsius") == {"amdgpu card1": 43.0}


def test_queues_tell_their_share_from_the_second_read_on(tmp_path: Path) -> None:
    root = copied("raspberry_pi_5", tmp_path)
    stats = root / "sys/class/drm/card0/device/gpu_stats"
    stats.write_text("queue\ttimestamp\tjobs\truntime\nrender\t1000000000\t1\t500000000\n")
    sensors = gpu.find(root)
    assert values(sensors, "busy_seconds") == {"v3d render": 0.5}
    stats.write_text("queue\ttimestamp\tjobs\truntime\nrender\t3000000000\t9\t2000000000\n")
    assert values(sensors, "busy_ratio") == {"v3d render": 0.75}


def test_an_intel_gpu_is_awake_when_it_does_not_sleep(tmp_path: Path) -> None:
    residency = tmp_path / "rc6_residency_ms"
    clock = iter([10.0, 12.0, 14.0])
    sensor = gpu.Sleeper("i915", residency, clock=lambda: next(clock))
    seen = []
    for milliseconds in (1000, 3000, 3500):
        residency.write_text(f"{milliseconds}\n")
        seen.append(values([sensor], "awake_ratio").get("i915"))
    assert seen == [None, 0.0, 0.75]


def test_the_parts_of_an_intel_gpu() -> None:
    assert set(values(gpu.find(BOARDS / "laptop_intel"), "asleep_seconds")) == {
        "i915 card1 gt0", "i915 card1 gt1",
    }  # fmt: skip
    assert values(gpu.find(BOARDS / "mini_pc_usb_meter"), "asleep_seconds") == {"xe card0 gt0": 9123.441}


def test_an_npu_of_a_core_ultra(tmp_path: Path) -> None:
    root = copied("laptop_intel", tmp_path)
    device = root / "sys/class/accel/accel0/device"
    clock = iter([1.0, 2.0])
    sensor = npu.IntelNpu("npu", device, clock=lambda: next(clock))
    assert values([sensor], "busy_seconds") == {"npu": 5.1239}
    (device / "npu_busy_time_us").write_text("5373900\n")
    (device / "npu_current_frequency_mhz").write_text("1400\n")
    found = {r.quantity: r.value for r in sensor.read()}
    assert found == pytest.approx({"busy_seconds": 5.3739, "busy_ratio": 0.25, "frequency_hertz": 1.4e9})
    assert period_seconds(npu.find(root)[0]) == 1.0


def test_cores_of_a_rockchip_npu(tmp_path: Path) -> None:
    assert values(npu.find(BOARDS / "rock_5b"), "busy_ratio") == {
        "rknpu Core0": 0.12, "rknpu Core1": 0.0, "rknpu Core2": 0.03,
    }  # fmt: skip
    root = copied("rock_5b", tmp_path)
    (root / "sys/kernel/debug/rknpu/load").write_text("NPU load:  45%\n")
    assert values(npu.find(root), "busy_ratio") == {"rknpu": 0.45}


def test_the_edge_tpu() -> None:
    pcie = coral.find(BOARDS / "tpu_pcie")
    assert values(pcie, "temperature_celsius") == {"apex_0": 46.3}
    assert values(pcie, "interrupts") == {"apex_0": 4247.0}
    assert values(coral.find(BOARDS / "tpu_usb3"), "usb_transfers") == {"usb 2-1": 5310.0}
    assert coral.find(BOARDS / "tpu_pcie_no_driver") == []


# --- fans, heat, clocks


def test_fans() -> None:
    assert values(fan.find(BOARDS / "raspberry_pi_5"), "fan_rotation_hertz") == {"pwmfan": 3050 / 60}
    assert values(fan.find(BOARDS / "raspberry_pi_5"), "fan_drive_ratio") == {"pwmfan": 75 / 255}
    assert values(fan.find(BOARDS / "laptop_intel"), "fan_rotation_hertz") == {
        "thinkpad 1": 2904 / 60, "thinkpad 2": 2711 / 60,
    }  # fmt: skip
    assert values(fan.find(BOARDS / "jetson_orin_nano"), "fan_rotation_hertz")["pwm_tach"] == 1820 / 60
    assert values(fan.find(BOARDS / "jetson_nano"), "fan_drive_ratio") == {"pwm-fan": 80 / 255}


def test_zones_of_one_name_are_told_apart() -> None:
    sensors = thermal.find(BOARDS / "laptop_intel")
    assert values(sensors, "temperature_celsius") == {
        "acpitz": 59.0, "acpitz (thermal_zone1)": 47.0, "x86_pkg_temp": 61.0,
    }  # fmt: skip
    assert values(sensors, "cooling_steps") == {"Processor": 0.0, "Processor (cooling_device1)": 2.0}


def test_a_limit_below_the_maximum_shows() -> None:
    sensors = cpufreq.find(BOARDS / "jetson_orin_nano")
    limits = values(sensors, "frequency_limit_hertz")
    most = values(sensors, "frequency_maximum_hertz")
    assert {name for name in limits if limits[name] < most[name]} >= {"cpu5"}


def test_all_kinds_of_a_board_come_in_one_call() -> None:
    quantities = {r.quantity for r in readings(find_all(BOARDS / "jetson_orin_nano"))}
    assert {"temperature_celsius", "frequency_hertz", "power_watts", "over_current_events", "busy_ratio",
            "accelerator_memory_bytes", "power_mode_index", "fan_rotation_hertz"} <= quantities  # fmt: skip
    assert {r.quantity for r in readings(find_all(BOARDS / "jetson_orin_nano", ["thermal"]))} == {
        "temperature_celsius", "cooling_steps",
    }  # fmt: skip
