"""Whether a board is fit to measure on: every check on trees of boards, and what is set for them."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.board.check import Program, View, Work, size
from boardbench.agent.board.checks import CHECKS, findings
from boardbench.agent.board.identify import identify
from boardbench.agent.board.tune import Tuner
from boardbench.agent.board.watch import watch
from boardbench.agent.config import AgentConfig, SensorsConfig, StoreConfig
from boardbench.agent.errors import Conflict, InvalidRequest
from boardbench.agent.examine import OWNER, Examiner, clock_kept
from boardbench.v1 import agent_pb2, board_pb2

BOARDS = Path(__file__).parent.parent / "boards"
TREES = sorted(path.name for path in BOARDS.iterdir() if path.is_dir())
CPU = "sys/devices/system/cpu"

OK, DOUBTFUL, INVALID, ABSENT, UNKNOWN = (
    agent_pb2.FINDING_STATE_OK,
    agent_pb2.FINDING_STATE_DOUBTFUL,
    agent_pb2.FINDING_STATE_INVALID,
    agent_pb2.FINDING_STATE_ABSENT,
    agent_pb2.FINDING_STATE_UNSPECIFIED,
)
IDLE = Work(seconds=1.0, busy_processors=0.1, stolen_share=0.0, swapped_in_bytes=0)


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def view(root: Path, **known: Any) -> View:
    # QEMU's user mode shows the processor of an x86 machine to a program for ARM.
    cpuinfo = root / "proc/cpuinfo"
    x86 = root.name != "qemu_user" and cpuinfo.exists() and b"vendor_id" in cpuinfo.read_bytes()
    board = identify(root, device_id="it", labels={}, architecture="x86_64" if x86 else "aarch64")
    return View(root, board, **{"work": IDLE, "free_bytes": 8 << 30, **known})


def look(root: Path, code: str, **known: Any) -> agent_pb2.Finding:
    """What one check finds."""
    (check,) = (check for check in CHECKS if check.code == code)
    return check.look(view(root, **known))


def seen(root: Path, code: str, **known: Any) -> tuple[int, str]:
    """State and message of one check."""
    found = look(root, code, **known)
    return found.state, found.message


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copies the tree of a board, to be changed."""

    def copy(name: str) -> Path:
        return shutil.copytree(BOARDS / name, tmp_path / name, symlinks=True)

    return copy


@pytest.fixture
def fit(copied: Callable[[str], Path]) -> Path:
    """A Raspberry Pi 5 that is fit; beyond its tree, what a kernel and a systemd would show there."""
    root = copied("raspberry_pi_5")
    (root / CPU / "cpufreq").mkdir()
    for name in ("cpu1", "cpu2", "cpu3"):
        shutil.rmtree(root / CPU / name / "cpufreq")
        (root / CPU / name / "cpufreq").symlink_to("../cpufreq/policy0")
    (root / CPU / "cpu0/cpufreq").rename(root / CPU / "cpufreq/policy0")
    (root / CPU / "cpu0/cpufreq").symlink_to("../cpufreq/policy0")
    write(
        root,
        {
            f"{CPU}/cpufreq/policy0/scaling_governor": "performance",
            f"{CPU}/cpufreq/policy0/scaling_min_freq": "1500000",
            f"{CPU}/cpufreq/policy0/affected_cpus": "0 1 2 3",
            "proc/self/status": "Name:\tagent\nCpus_allowed_list:\t0-3",
            "proc/self/cgroup": "0::/system.slice/boardbench-agent.service",
            "proc/self/clear_refs": "",
            "sys/fs/cgroup/system.slice/boardbench-agent.service/cpu.max": "max 100000",
            "proc/swaps": "Filename\tType\tSize\tUsed\tPriority",
            "proc/meminfo": "MemTotal: 8256752 kB\nMemAvailable: 7300000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB",
            "proc/pressure/cpu": "some avg10=0.40 avg60=0.1 avg300=0.0 total=9",
            "proc/pressure/memory": "some avg10=0.00 avg60=0.0 avg300=0.0 total=0",
            "sys/devices/system/clocksource/clocksource0/current_clocksource": "arch_sys_counter",
            "run/systemd/timesync/synchronized": "",
            "sys/class/thermal/thermal_zone0/trip_point_0_temp": "110000",
            "sys/class/thermal/thermal_zone0/trip_point_0_type": "critical",
        },
    )
    current = root / "sys/firmware/devicetree/base/chosen/power/max_current"
    current.parent.mkdir(parents=True)
    current.write_bytes((5000).to_bytes(4, "big"))
    return root


RUNTIMES = (
    board_pb2.RuntimeStatus(name="tflite", available=True, version="ai-edge-litert 2.3.0", devices=["cpu"]),
)


# --- all of them


def test_a_board_that_is_fit_has_no_doubts(fit: Path) -> None:
    found = findings(view(fit, runtimes=RUNTIMES, clock_kept=True))
    assert [each.code for each in found] == [check.code for check in CHECKS]
    assert {each.code: each.state for each in found if each.state not in (OK, ABSENT)} == {}
    assert {each.code for each in found if each.state == ABSENT} == {
        "turbo", "power_mode", "clocks", "usb", "accelerator",
    }  # fmt: skip
    messages = {each.code: each.message for each in found}
    assert messages["governor"] == "performance at 2400 MHz on cpu0-3"
    assert messages["frequency_cap"] == "up to 2400 MHz on cpu0-3"
    assert messages["supply"] == "no under-voltage since the board booted, the supply offers 5 A"
    assert messages["heat"] == "cpu-thermal is at 52.4 °C, and the board slows down from 80 on"
    assert messages["memory"] == "7.5 GB of 8.5 GB of the board available"
    assert messages["load"] == "other programs use 0.10 of 4 processors; load average over one minute 0.42"


@pytest.mark.parametrize("tree", TREES)
def test_every_board_is_looked_at_by_every_check(tree: str) -> None:
    found = findings(view(BOARDS / tree, runtimes=RUNTIMES))
    assert [each.code for each in found] == [check.code for check in CHECKS]
    for each in found:
        assert each.message and "None" not in each.message and str(BOARDS) not in each.fix, each
        doubt = each.state in (DOUBTFUL, INVALID)
        assert bool(each.fix) >= doubt, f"what is to be done about {each}"
        assert not (each.fixable and not doubt)


def test_checks_are_told_apart_and_explained() -> None:
    codes = [check.code for check in CHECKS]
    assert len(set(codes)) == len(codes) == 23
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)
    assert all(check.subject and check.doubt for check in CHECKS)


def test_an_empty_root_is_unknown_or_absent_and_nothing_else(tmp_path: Path) -> None:
    found = findings(View(tmp_path, board_pb2.Board()))
    states = {each.code: each.state for each in found}
    assert {code for code, state in states.items() if state == OK} <= {"machine", "time"}
    assert not {code for code, state in states.items() if state in (DOUBTFUL, INVALID)}


def test_a_check_that_fails_hides_no_other(fit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = fit / CPU / "cpufreq/policy0/affected_cpus"
    policy.write_bytes(b"\xff\xfe 99999999999999999999999999\n")
    found = {each.code: each for each in findings(view(fit))}
    assert len(found) == 23 and found["heat"].state == OK


@pytest.mark.parametrize(
    "garbage", [b"", b"\0", b"\xff" * 5000, b"-1\n", b"NaN\n", b"9" * 4096, b"{}[]\n\n\n"]
)
def test_garbage_in_every_file_is_survived(fit: Path, garbage: bytes) -> None:
    for path in fit.rglob("*"):
        if path.is_file() and path.parent.name != "bin":
            path.write_bytes(garbage)
    found = findings(view(fit, runtimes=RUNTIMES))
    assert len(found) == 23
    assert all(each.message.isprintable() for each in found), [each.message for each in found]


# --- clocks


def test_a_governor_that_moves_the_clock(fit: Path) -> None:
    write(fit, {f"{CPU}/cpufreq/policy0/scaling_governor": "ondemand"})
    found = look(fit, "governor")
    assert (found.state, found.fixable) == (DOUBTFUL, True)
    assert found.message == (
        "ondemand between 1500 MHz and 2400 MHz on cpu0-3: the clock follows the load, and comes late"
    )
    assert found.fix == f"echo performance | sudo tee /{CPU}/cpufreq/policy0/scaling_governor"


def test_bounds_that_leave_one_frequency_are_as_good(fit: Path) -> None:
    write(
        fit,
        {
            f"{CPU}/cpufreq/policy0/scaling_governor": "schedutil",
            f"{CPU}/cpufreq/policy0/scaling_min_freq": "2400000",
        },
    )
    assert seen(fit, "governor") == (OK, "schedutil with one frequency at 2400 MHz on cpu0-3")


def test_two_kinds_of_cores_have_two_governors() -> None:
    found = look(BOARDS / "rock_5b", "governor")
    assert found.state == DOUBTFUL
    assert found.message == "ondemand on cpu0-3: the clock follows the load, and comes late"
    assert found.fix.endswith("tee " + " ".join(f"/{CPU}/cpu{n}/cpufreq/scaling_governor" for n in range(4)))


def test_without_the_performance_governor_the_least_frequency_is_raised(fit: Path) -> None:
    policy = f"{CPU}/cpufreq/policy0"
    write(
        fit, {f"{policy}/scaling_governor": "schedutil", f"{policy}/scaling_available_governors": "schedutil"}
    )
    found = look(fit, "governor")
    assert found.state == DOUBTFUL and found.fixable
    pasted(found.fix, fit)
    assert look(fit, "governor").state == OK


def test_a_governor_that_can_not_be_read(fit: Path) -> None:
    write(fit, {f"{CPU}/cpufreq/policy0/scaling_governor": ""})
    assert seen(fit, "governor") == (UNKNOWN, "the governor of cpu0-3 can't be read")


def test_no_governor_is_told_with_why() -> None:
    assert seen(BOARDS / "kvm_guest", "governor") == (
        ABSENT, "this machine is virtual: its host decides about the frequency",
    )  # fmt: skip
    assert look(BOARDS / "nuc", "governor").message == "the kernel does not move the processors' frequency"


def test_a_limit_of_the_frequency(fit: Path) -> None:
    write(fit, {f"{CPU}/cpufreq/policy0/scaling_max_freq": "1800000"})
    found = look(fit, "frequency_cap")
    assert (found.state, found.fixable) == (DOUBTFUL, False), "it may be there for a reason"
    assert found.message.startswith("limited to 1800 of 2400 MHz on cpu0-3: ")
    pasted(found.fix, fit)
    assert look(fit, "frequency_cap").state == OK
    write(fit, {f"{CPU}/cpufreq/policy0/scaling_max_freq": "2399000"})
    assert look(fit, "frequency_cap").state == OK, "drivers round"


def test_the_limit_of_a_power_mode_is_meant() -> None:
    assert seen(BOARDS / "jetson_orin_nano", "frequency_cap") == (
        OK, "limited to 1344 of 1728 MHz on cpu0-5, as the power mode 15W has it",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({f"{CPU}/cpufreq/boost": "1"}, DOUBTFUL),
        ({f"{CPU}/cpufreq/boost": "0"}, OK),
        ({f"{CPU}/intel_pstate/no_turbo": "0"}, DOUBTFUL),
        ({f"{CPU}/intel_pstate/no_turbo": "1"}, OK),
        ({f"{CPU}/cpufreq/policy0/boost": "1"}, DOUBTFUL),
        ({}, ABSENT),
    ],
)
def test_turbo(fit: Path, files: dict[str, str], state: int) -> None:
    write(fit, files)
    found = look(fit, "turbo")
    assert (found.state, found.fixable) == (state, state == DOUBTFUL)
    if state == DOUBTFUL:
        pasted(found.fix, fit)
        assert seen(fit, "turbo") == (OK, "off")


def test_without_turbo_the_base_frequency_is_the_most(fit: Path) -> None:
    policy = f"{CPU}/cpufreq/policy0"
    write(
        fit,
        {
            f"{CPU}/intel_pstate/no_turbo": "1",
            f"{policy}/base_frequency": "1800000",
            f"{policy}/scaling_max_freq": "1800000",
        },
    )
    assert look(fit, "frequency_cap").state == OK
    write(fit, {f"{policy}/scaling_max_freq": "1200000"})
    assert look(fit, "frequency_cap").state == DOUBTFUL


def test_power_modes_of_a_jetson(copied: Callable[[str], Path]) -> None:
    root = copied("jetson_orin_nano")
    assert seen(root, "power_mode") == (OK, "15W (0): figures are right for this power mode and for no other")
    write(root, {"var/lib/nvpmodel/status": "what?"})
    assert look(root, "power_mode").state == UNKNOWN
    (root / "var/lib/nvpmodel/status").unlink()
    assert seen(root, "power_mode") == (UNKNOWN, "nvpmodel has not noted a power mode")


def test_platform_profile(fit: Path) -> None:
    profile = "sys/firmware/acpi/platform_profile"
    write(fit, {profile: "low-power", f"{profile}_choices": "low-power balanced performance"})
    found = look(fit, "power_mode")
    assert found.state == DOUBTFUL
    pasted(found.fix, fit)
    assert seen(fit, "power_mode") == (OK, "platform profile performance")
    write(fit, {profile: "quiet", f"{profile}_choices": "quiet balanced"})
    assert look(fit, "power_mode").fix == f"echo balanced | sudo tee /{profile}"


def test_clocks_of_a_jetson(copied: Callable[[str], Path]) -> None:
    root = copied("jetson_orin_nano")
    found = look(root, "clocks")
    assert (found.state, found.fix) == (DOUBTFUL, "sudo jetson_clocks --fan")
    assert found.message.startswith("GPU between 306 MHz and 625 MHz")
    assert found.fixable == (os.geteuid() == 0), "NVIDIA's program wants root"
    gpu = "sys/class/devfreq/17000000.gpu"
    write(root, {f"{gpu}/min_freq": "624750000", f"{gpu}/max_freq": "624750000"})
    assert seen(root, "clocks") == (OK, "GPU held at 625 MHz")
    shutil.rmtree(root / "sys/class/devfreq")
    assert look(root, "clocks").state == UNKNOWN


# --- supply and heat


def throttled_word(root: Path, word: str) -> None:
    (path,) = root.glob("sys/devices/platform/soc*/soc*:firmware/get_throttled")
    path.write_text(word + "\n")


def test_under_voltage_now_and_before(fit: Path) -> None:
    throttled_word(fit, "50005")
    found = look(fit, "supply")
    assert (found.state, found.message) == (
        INVALID, "under-voltage now: the firmware holds the processor back",
    )  # fmt: skip
    assert "5.1 V, 5 A" in found.fix, "what this board needs"
    throttled_word(fit, "10000")
    found = look(fit, "supply")
    assert (found.state, found.message) == (
        DOUBTFUL, "there was under-voltage since the board booted: under load it comes back",
    )  # fmt: skip


def test_each_pi_is_told_its_own_supply() -> None:
    assert "5.1 V, 3 A" in look(BOARDS / "raspberry_pi_4_throttled", "supply").fix


def test_a_weak_supply_matters_where_something_hangs_on_usb(fit: Path) -> None:
    current = fit / "sys/firmware/devicetree/base/chosen/power/max_current"
    current.write_bytes((3000).to_bytes(4, "big"))
    assert seen(fit, "supply") == (
        OK, "the supply offers 3 A of 5: enough for the board, not for what hangs on its USB ports",
    )  # fmt: skip
    usb = "sys/bus/usb/devices/2-1"
    write(fit, {f"{usb}/idVendor": "18d1", f"{usb}/idProduct": "9302", f"{usb}/speed": "5000"})
    found = look(fit, "supply")
    assert found.state == DOUBTFUL and "600 mA in all" in found.message


def test_a_pi_without_its_tools_is_unknown_and_not_fine(fit: Path) -> None:
    for path in [*fit.glob("sys/devices/platform/soc*"), fit / "usr/bin", fit / "sys/class/hwmon"]:
        shutil.rmtree(path)
    (fit / "sys/firmware/devicetree/base/chosen/power/max_current").unlink()
    found = look(fit, "supply")
    assert found.state == UNKNOWN and "raspi-utils" in found.fix
    write(fit, {"usr/bin/vcgencmd": "#!/bin/sh\necho Can\\'t open device file: /dev/vcio; exit 255"})
    (fit / "usr/bin/vcgencmd").chmod(0o755)
    found = look(fit, "supply")
    assert found.state == UNKNOWN and "/dev/vcio" in found.message and "usermod -aG video" in found.fix


def test_over_current_of_a_jetson() -> None:
    assert seen(BOARDS / "jetson_orin_nano", "supply") == (
        DOUBTFUL, "12 × instantaneous over-current since the board booted: each held the clocks back",
    )  # fmt: skip


def test_a_laptop_on_its_battery() -> None:
    assert seen(BOARDS / "laptop_amd", "supply")[0] == DOUBTFUL
    assert seen(BOARDS / "laptop_intel", "supply") == (OK, "plugged in")


def test_throttled_now_and_before(fit: Path) -> None:
    throttled_word(fit, "60006")
    assert seen(fit, "throttled") == (INVALID, "now: frequency capped, throttled")
    throttled_word(fit, "e0000")
    state, message = seen(fit, "throttled")
    assert state == OK
    assert (
        message == "not now, but since the board booted: frequency capped, throttled, soft temperature limit"
    )
    throttled_word(fit, "10000")
    assert seen(fit, "throttled") == (OK, "not since the board booted"), "that is the supply's"
    throttled_word(fit, "what?")
    assert look(fit, "throttled").state == UNKNOWN


def test_the_kernel_s_cooling_is_throttling() -> None:
    assert seen(BOARDS / "jetson_orin_nano", "throttled") == (
        INVALID, "now: cpufreq-cpu0 at step 3 of its cooling",
    )  # fmt: skip
    assert look(BOARDS / "kvm_guest", "throttled").state == ABSENT


def test_sensors_that_are_left_out_are_not_read(fit: Path) -> None:
    assert seen(fit, "throttled", without=("raspberry_pi",)) == (
        UNKNOWN, "it can't be told: raspberry_pi is left out by sensors.without",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("milli", "state"), [("52400", OK), ("74900", OK), ("75100", DOUBTFUL), ("80000", INVALID)]
)
def test_heat_against_where_the_firmware_slows_down(fit: Path, milli: str, state: int) -> None:
    write(fit, {"sys/class/thermal/thermal_zone0/temp": milli})
    assert look(fit, "heat").state == state


def test_trip_points_of_the_kernel(copied: Callable[[str], Path]) -> None:
    root = copied("jetson_orin_nano")
    assert look(root, "heat").message.endswith("where the board begins to slow down is not told")
    zone = "sys/class/thermal/thermal_zone0"
    write(
        root,
        {
            f"{zone}/trip_point_0_temp": "104500",
            f"{zone}/trip_point_0_type": "critical",
            f"{zone}/trip_point_1_temp": "-274000",
            f"{zone}/trip_point_1_type": "passive",
        },
    )
    assert look(root, "heat").message.endswith("the board slows down from 104.5 on")
    write(root, {f"{zone}/trip_point_2_temp": "99000", f"{zone}/trip_point_2_type": "passive"})
    assert look(root, "heat").message.endswith("the board slows down from 99 on")


def test_the_soft_limit_of_a_3b_plus() -> None:
    assert look(BOARDS / "raspberry_pi_3_soft_limit", "heat").message == (
        "cpu-thermal is at 61.2 °C, and the board slows down from 60 on"
    )


def test_the_processor_s_own_sensor(copied: Callable[[str], Path]) -> None:
    root = copied("nuc")
    chip = "sys/class/hwmon/hwmon3"
    write(
        root,
        {
            f"{chip}/name": "coretemp",
            f"{chip}/temp1_input": "97000",
            f"{chip}/temp1_crit": "100000",
            f"{chip}/temp1_label": "Package id 0",
        },
    )
    assert seen(root, "heat") == (
        DOUBTFUL,
        "Package id 0 is at 97.0 °C, and the board slows down from 100 on",
    )


def test_no_temperature_and_a_broken_one(fit: Path) -> None:
    write(fit, {"sys/class/thermal/thermal_zone0/temp": "warm"})
    state, message = seen(fit, "heat")
    assert state == UNKNOWN and "thermal_zone0/temp" in message
    shutil.rmtree(fit / "sys/class/thermal")
    assert look(fit, "heat").state == ABSENT


# --- load


def test_emulators_virtual_machines_and_containers(fit: Path) -> None:
    assert look(BOARDS / "qemu_virt", "machine").state == INVALID
    assert look(BOARDS / "qemu_user", "machine").state == INVALID
    guest = BOARDS / "kvm_guest"
    assert look(guest, "machine", work=None).state == OK
    for share, state in ((0.005, OK), (0.05, DOUBTFUL), (0.2, INVALID)):
        work = Work(seconds=1.0, busy_processors=0.0, stolen_share=share)
        assert look(guest, "machine", work=work).state == state
    write(fit, {".dockerenv": ""})
    assert seen(fit, "machine") == (OK, "no emulator and no virtual machine, a container (Docker)")


def test_processors_that_the_agent_may_not_use(fit: Path) -> None:
    write(fit, {"proc/self/status": "Cpus_allowed_list:\t0-1"})
    found = look(fit, "processors")
    assert found.state == DOUBTFUL and "may not use cpu2-3" in found.message and "--threads 2" in found.fix
    write(fit, {f"{CPU}/isolated": "2-3"})
    state, message = seen(fit, "processors")
    assert state == OK and "cpu2-3 isolated" in message
    write(fit, {f"{CPU}/smt/active": "1"})
    assert "two threads share a core" in look(fit, "processors").message


@pytest.mark.parametrize(
    ("cgroup", "files", "fix"),
    [
        (
            "0::/system.slice/boardbench-agent.service",
            {"sys/fs/cgroup/system.slice/boardbench-agent.service/cpu.max": "150000 100000"},
            "sudo systemctl set-property boardbench-agent.service CPUQuota=",
        ),
        (
            "0::/system.slice/boardbench-agent.service",
            {"sys/fs/cgroup/system.slice/cpu.max": "150000 100000"},
            "sudo systemctl set-property system.slice CPUQuota=",
        ),
        (
            f"0::/system.slice/docker-{'ab' * 32}.scope",
            {f"sys/fs/cgroup/system.slice/docker-{'ab' * 32}.scope/cpu.max": "150000 100000"},
            "docker update --cpus 0 abababababab",
        ),
        (
            f"3:cpuset:/\n2:cpu,cpuacct:/docker/{'ab' * 32}\n0::/",
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "15000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "10000",
            },
            "take the limit away where the container is started (--cpus, resources.limits.cpu)",
        ),
    ],
)
def test_a_limit_on_processor_time(fit: Path, cgroup: str, files: dict[str, str], fix: str) -> None:
    write(fit, {"proc/self/cgroup": cgroup, **files})
    found = look(fit, "quota")
    assert (found.state, found.fix) == (DOUBTFUL, fix)
    assert "1.5 of 4 processors" in found.message


def test_a_limit_that_leaves_all_processors(fit: Path) -> None:
    folder = "sys/fs/cgroup/system.slice/boardbench-agent.service"
    write(fit, {f"{folder}/cpu.max": "400000 100000"})
    assert look(fit, "quota").state == OK
    write(
        fit, {f"{folder}/cpu.max": "200000 100000", f"{folder}/cpu.stat": "nr_periods 9\nnr_throttled 1234"}
    )
    assert "happened 1,234 times" in look(fit, "quota").message
    (fit / "proc/self/cgroup").unlink()
    assert look(fit, "quota").state == ABSENT


@pytest.mark.parametrize(("busy", "state"), [(0.3, OK), (0.5, DOUBTFUL), (1.2, INVALID)])
def test_load_of_other_programs(fit: Path, busy: float, state: int) -> None:
    work = Work(
        seconds=1.0,
        busy_processors=busy,
        stolen_share=0.0,
        programs=(Program("chromium", 4711, 0.4), Program("cron", 5, 0.1, "cron.service")),
    )
    found = look(fit, "load", work=work)
    assert found.state == state
    if state != OK:
        assert f"use {busy:.2f} of 4 processors" in found.message
        assert "chromium (pid 4711) 0.40" in found.message
        assert found.fix == "sudo systemctl stop cron.service"
    assert look(fit, "load", work=work, running_run_id="0123456789").state == OK, "it is the run's own"


def test_load_by_a_person_s_program(fit: Path) -> None:
    programs = (Program("python3", 1, 0.9), Program("python3", 2, 0.8))
    work = Work(seconds=1.0, busy_processors=1.7, stolen_share=0.0, programs=programs)
    assert look(fit, "load", work=work).fix == "end python3, or wait until it is done"
    assert look(fit, "load", work=None).state == UNKNOWN


def test_pressure(fit: Path) -> None:
    assert seen(fit, "pressure")[0] == OK
    write(fit, {"proc/pressure/cpu": "some avg10=48.05 avg60=1 avg300=1 total=1\nfull avg10=0.00 total=0"})
    state, message = seen(fit, "pressure")
    assert state == DOUBTFUL and "48% of the time for a processor" in message
    assert look(fit, "pressure", running_run_id="r").state == OK
    write(fit, {"proc/pressure/cpu": "", "proc/pressure/memory": "some avg10=2.00 avg60=0 avg300=0 total=0"})
    assert "rss" in look(fit, "pressure").fix
    shutil.rmtree(fit / "proc/pressure")
    assert look(fit, "pressure").state == ABSENT


def test_memory_and_a_limit_on_it(fit: Path) -> None:
    write(fit, {"proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 40000 kB"})
    assert seen(fit, "memory")[0] == DOUBTFUL
    write(fit, {"proc/meminfo": "MemTotal: 1000000 kB\nMemAvailable: 900000 kB"})
    folder = "sys/fs/cgroup/system.slice/boardbench-agent.service"
    write(fit, {f"{folder}/memory.max": str(200 << 20), f"{folder}/memory.current": str(195 << 20)})
    state, message = seen(fit, "memory")
    assert state == DOUBTFUL and "of the agent's control group available" in message


def test_swap(fit: Path) -> None:
    memory = "MemTotal: 1000000 kB\nMemAvailable: {} kB\nSwapTotal: 200000 kB\nSwapFree: {} kB"
    write(fit, {"proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 200000 9 100"})
    write(fit, {"proc/meminfo": memory.format(600000, 100000)})
    assert seen(fit, "swap") == (OK, "102.4 MB of 204.8 MB in use, on /dev/zram0")
    write(fit, {"proc/meminfo": memory.format(200000, 100000)})
    found = look(fit, "swap")
    assert found.state == DOUBTFUL and found.fix.startswith("sudo swapoff -a")
    write(fit, {"proc/meminfo": memory.format(600000, 100000)})
    moving = Work(seconds=1.0, busy_processors=0.0, stolen_share=0.0, swapped_in_bytes=3_000_000)
    assert "3.0 MB came back" in look(fit, "swap", work=moving).message
    write(fit, {"proc/meminfo": memory.format(600000, 200000)})
    assert look(fit, "swap").state == OK


# --- watch


def stat(busy: int, stolen: int = 0) -> str:
    return f"cpu {busy} 0 0 0 0 0 0 {stolen} 0 0\ncpu0 1 0 0 0 0 0 0 0 0 0\ncpu1 1 0 0 0 0 0 0 0 0 0"


def process(name: str, ticks: int, began: int = 77) -> str:
    return f"1 ({name}) S 1 1 1 0 -1 0 0 0 0 0 {ticks} 0 0 0 20 0 1 0 {began} 0 0"


def test_what_others_do_is_watched(tmp_path: Path) -> None:
    own = os.getpid()
    ticks = os.sysconf("SC_CLK_TCK")
    write(
        tmp_path,
        {
            "proc/stat": stat(1000),
            f"proc/{own}/stat": process("agent", 100),
            "proc/50/stat": process("a (strange) name", 500),
            "proc/50/cgroup": "0::/system.slice/strange.service",
            "proc/51/stat": process("quiet", 10),
            "proc/52/stat": process("gone", 10),
            "proc/vmstat": "pswpin 10",
        },
    )
    hour = 3600.0

    def pause(seconds: float) -> None:
        assert seconds == hour
        write(
            tmp_path,
            {
                "proc/stat": stat(1000 + 3 * 3600 * ticks, stolen=360 * ticks),
                f"proc/{own}/stat": process("agent", 100 + 3600 * ticks),
                "proc/50/stat": process("a (strange) name", 500 + 3600 * ticks),
                "proc/52/stat": process("another", 3600 * ticks // 2, began=99),
                "proc/53/stat": "garbage",
                "proc/vmstat": "pswpin 12",
            },
        )

    # The time that passes is the clock's: it is what the shares are of.
    moments = iter((0.0, hour))
    work = watch(tmp_path, hour, pause, clock=lambda: next(moments))
    assert work is not None
    assert work.busy_processors == pytest.approx(2.0), "three processors, one of them our own"
    assert work.stolen_share == pytest.approx(0.05), "a tenth of one of two"
    assert work.swapped_in_bytes == 2 * os.sysconf("SC_PAGE_SIZE")
    assert [(each.name, each.pid, each.unit) for each in work.programs] == [
        ("a (strange) name", 50, "strange.service"),
        ("another", 52, ""),
    ]
    assert [each.processors for each in work.programs] == pytest.approx([1.0, 0.5])


def test_a_service_of_a_person_is_no_system_service(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/stat": stat(0),
            "proc/50/stat": process("x", 0),
            "proc/50/cgroup": "0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.service",
        },
    )
    moments = iter((0.0, 1.0))

    def pause(_seconds: float) -> None:
        write(tmp_path, {"proc/50/stat": process("x", 100)})

    work = watch(tmp_path, 1.0, pause, clock=lambda: next(moments))
    assert work is not None and [each.unit for each in work.programs] == [""]


def test_nothing_to_watch(tmp_path: Path) -> None:
    assert watch(tmp_path, 0.0) is None


def test_this_machine_can_be_watched() -> None:
    work = watch(Path("/"), 0.05)
    assert work is None or (work.seconds > 0 and work.busy_processors >= 0)


# --- accelerators


def test_the_speed_of_a_stick() -> None:
    assert look(BOARDS / "tpu_usb2", "usb").state == DOUBTFUL
    assert look(BOARDS / "tpu_usb3", "usb").state == OK
    assert look(BOARDS / "tpu_usb_fresh", "usb").state == UNKNOWN, "settled by its first use"
    assert look(BOARDS / "nuc", "usb").state == ABSENT


def test_a_stick_that_is_put_to_sleep(copied: Callable[[str], Path]) -> None:
    root = copied("tpu_usb3")
    (device,) = root.glob("sys/devices/pci*/*/usb2/2-1")
    write(device, {"power/control": "auto"})
    found = look(root, "usb")
    assert (found.state, found.fixable) == (DOUBTFUL, True)
    pasted(found.fix, root)
    assert look(root, "usb").state == OK


TPU = (board_pb2.RuntimeStatus(name="tflite", available=True, version="x", devices=["cpu", "edgetpu"]),)


def test_a_module_on_pcie(copied: Callable[[str], Path]) -> None:
    root = copied("tpu_pcie")
    found = look(root, "accelerator", runtimes=TPU)
    assert found.state == DOUBTFUL and "there is no /dev/apex_0" in found.message
    write(root, {"dev/apex_0": ""})
    assert seen(root, "accelerator", runtimes=TPU) == (OK, "Google Coral Edge TPU (PCIe) at /dev/apex_0")
    found = look(root, "accelerator", runtimes=RUNTIMES)
    assert found.state == DOUBTFUL and "libedgetpu1-std" in found.fix
    assert look(root, "accelerator").state == OK, "nobody has asked the engines yet"
    found = look(BOARDS / "tpu_pcie_no_driver", "accelerator", runtimes=TPU)
    assert found.state == DOUBTFUL and "gasket-dkms" in found.fix


RIGHTS = """
    from boardbench.agent.board.check import View
    from boardbench.agent.board.checks import findings
    from boardbench.agent.board.identify import identify

    root = Path(sys.argv[1])
    view = View(root, identify(root, device_id="it", labels={}))
    found = {each.code: [each.state, each.message, each.fix, each.fixable] for each in findings(view)}
    print(json.dumps(found))
    """


def test_rights_that_are_missing(public_path: Path, as_nobody: Callable[..., Any]) -> None:
    root = shutil.copytree(BOARDS / "tpu_pcie", public_path / "board", symlinks=True)
    energy = "sys/class/powercap/intel-rapl:0/energy_uj"
    governor = f"{CPU}/cpu0/cpufreq/scaling_governor"
    write(
        root,
        {
            "dev/apex_0": "",
            governor: "ondemand",
            energy: "1",
            "sys/class/powercap/intel-rapl:0/name": "package-0",
        },
    )
    (root / "dev/apex_0").chmod(0o000)
    (root / energy).chmod(0o000)
    (root / governor).chmod(0o444)
    found = as_nobody(RIGHTS, root)
    state, message, fix, _ = found["accelerator"]
    assert state == DOUBTFUL and message.endswith("the agent's user may not open /dev/apex_0")
    assert fix.startswith(("sudo usermod -aG ", "sudo chmod 666 /dev/apex_0"))
    state, message, fix, _ = found["power_meter"]
    assert state == UNKNOWN, "there is one: not absent, and not fine"
    assert "may not read it: /sys/class/powercap/intel-rapl:0/energy_uj" in message
    assert fix.startswith("sudo chgrp ")
    state, _, fix, fixable = found["governor"]
    assert (state, fixable) == (DOUBTFUL, False)
    assert fix == f"echo performance | sudo tee /{governor}"


def test_rights_on_a_stick(public_path: Path, as_nobody: Callable[..., Any]) -> None:
    root = shutil.copytree(BOARDS / "tpu_usb3", public_path / "board", symlinks=True)
    node = root / "dev/bus/usb/002/007"
    write(root, {"dev/bus/usb/002/007": ""})
    node.chmod(0o660)
    state, message, fix, _ = as_nobody(RIGHTS, root)["accelerator"]
    if os.geteuid() != 0:
        pytest.skip("the file belongs to the tests' own user, who may open it")
    assert state == DOUBTFUL and "/dev/bus/usb/002/007" in message
    assert "udevadm" in fix
    subprocess.run(["sh", "-n", "-c", fix], check=True)
    rules = subprocess.run(
        ["sh", "-c", fix.split(" | ")[0]], check=True, capture_output=True, text=True
    ).stdout
    assert rules.splitlines() == [
        'SUBSYSTEM=="usb", ATTRS{idVendor}=="1a6e", ATTRS{idProduct}=="089a", MODE="0666"',
        'SUBSYSTEM=="usb", ATTRS{idVendor}=="18d1", ATTRS{idProduct}=="9302", MODE="0666"',
    ]


def test_a_jetson_s_gpu_needs_its_device_files(copied: Callable[[str], Path]) -> None:
    root = copied("jetson_orin_nano")
    write(root, {"dev/nvmap": ""})
    assert look(root, "accelerator").state == OK


# --- system


def test_disk(fit: Path) -> None:
    known = {"data_dir": Path("/data"), "free_floor_bytes": 512 << 20}
    assert seen(fit, "disk", free_bytes=2 * 10**9, **known) == (OK, "2.0 GB free at /data")
    state, message = seen(fit, "disk", free_bytes=10**8, **known)
    assert state == DOUBTFUL and "no model can be pushed" in message
    assert look(fit, "disk", free_bytes=None).state == UNKNOWN


def test_clock_source(fit: Path) -> None:
    folder = "sys/devices/system/clocksource/clocksource0"
    write(
        fit, {f"{folder}/current_clocksource": "hpet", f"{folder}/available_clocksource": "tsc hpet acpi_pm"}
    )
    found = look(fit, "clock_source")
    assert found.state == DOUBTFUL
    pasted(found.fix, fit)
    assert seen(fit, "clock_source") == (OK, "tsc")
    write(fit, {f"{folder}/current_clocksource": "hpet", f"{folder}/available_clocksource": "hpet acpi_pm"})
    assert "dmesg" in look(fit, "clock_source").fix


def test_time(fit: Path) -> None:
    assert seen(fit, "time") == (OK, "kept right by a time service")
    (fit / "run/systemd/timesync/synchronized").unlink()
    assert look(fit, "time").state == UNKNOWN
    assert look(fit, "time", clock_kept=True).state == OK
    found = look(fit, "time", clock_kept=False)
    assert (found.state, found.fix) == (OK, "sudo timedatectl set-ntp true"), "no doubt about latencies"


def test_the_kernel_is_asked_about_its_clock() -> None:
    assert clock_kept() in (True, False, None)


def test_power_meters() -> None:
    assert seen(BOARDS / "raspberry_pi_5", "power_meter")[0] == OK
    assert "VDD_IN" in look(BOARDS / "jetson_orin_nano", "power_meter").message
    assert look(BOARDS / "laptop_intel", "power_meter").message == "psys: the whole board"
    assert look(BOARDS / "kvm_guest", "power_meter").state == ABSENT


def test_page_monitor(fit: Path) -> None:
    assert look(fit, "page_monitor").state == OK
    (fit / "proc/self/clear_refs").unlink()
    assert look(fit, "page_monitor").state == ABSENT
    assert look(BOARDS / "nuc", "page_monitor").state == UNKNOWN


def test_runtimes(fit: Path) -> None:
    missing = board_pb2.RuntimeStatus(name="onnxruntime", reason="pip install it")
    assert seen(fit, "runtimes", runtimes=(*RUNTIMES, missing)) == (
        OK, "tflite (ai-edge-litert 2.3.0); not here: onnxruntime",
    )  # fmt: skip
    assert seen(fit, "runtimes", runtimes=(missing,)) == (INVALID, "onnxruntime: pip install it")
    assert look(fit, "runtimes").state == UNKNOWN


def test_sizes() -> None:
    assert [size(count) for count in (0, 999, 1500, 2_500_000, 8_200_000_000)] == [
        "0 bytes", "999 bytes", "1.5 kB", "2.5 MB", "8.2 GB",
    ]  # fmt: skip


# --- what is to be pasted


def pasted(fix: str, root: Path) -> None:
    """Runs the command in the copy of a board instead of the board, without sudo."""
    assert " /sys" in fix
    line = fix.replace("sudo ", "").replace(" /sys", f" {root}/sys")
    subprocess.run(["sh", "-c", line], check=True, stdout=subprocess.DEVNULL)


COMMANDS = ("sudo ", "echo ", "for ", "printf ", "docker ", "pip ")


@pytest.mark.parametrize("tree", TREES)
def test_every_command_is_one_for_a_shell(tree: str) -> None:
    for each in findings(view(BOARDS / tree, runtimes=RUNTIMES)):
        if each.fix.startswith(COMMANDS) and not each.fix.startswith("sudo swapoff"):
            subprocess.run(["sh", "-n", "-c", each.fix], check=True)


# --- the examiner


async def statuses() -> tuple[board_pb2.RuntimeStatus, ...]:
    return RUNTIMES


@pytest.fixture
def examined(fit: Path, tmp_path: Path) -> Any:
    """An examiner of a board whose governor moves; ``.running`` is the run that is measured."""
    write(fit, {f"{CPU}/cpufreq/policy0/scaling_governor": "ondemand"})
    (fit / CPU / "cpufreq/policy0/scaling_min_freq").unlink()

    class Examined:
        root = fit
        running = ""
        tuner = Tuner(fit, tmp_path / "data")

        def governor(self) -> str:
            return (fit / CPU / "cpufreq/policy0/scaling_governor").read_text().strip()

        async def ask(self, **request: Any) -> agent_pb2.ExamineResponse:
            return await self.examiner.answer(agent_pb2.ExamineRequest(**request))

    found = Examined()
    config = AgentConfig(
        data_dir=tmp_path / "data",
        sys_root=fit,
        store=StoreConfig(free_floor_bytes=0),
        sensors=SensorsConfig(without="nvidia"),
    )
    found.examiner = Examiner(  # type: ignore[attr-defined]
        config,
        found.tuner,
        identify=lambda: identify(fit, device_id="it", labels={}, architecture="aarch64"),
        statuses=statuses,
        running=lambda: found.running,
    )
    return found


def state_of(response: agent_pb2.ExamineResponse, code: str) -> int:
    (found,) = (each for each in response.findings if each.code == code)
    return found.state


async def test_a_board_is_examined_fixed_and_restored(examined: Any) -> None:
    response = await examined.ask()
    assert [each.code for each in response.findings] == [check.code for check in CHECKS]
    assert state_of(response, "governor") == DOUBTFUL
    assert not response.changed and not response.HasField("restored_at") and not response.failed

    response = await examined.ask(fix=True)
    assert state_of(response, "governor") == OK
    assert list(response.changed) == ["cpu0-3 governor: ondemand → performance"]
    assert response.HasField("restored_at") and examined.governor() == "performance"
    assert examined.tuner.holders == [OWNER]

    again = await examined.ask()
    assert again.restored_at == response.restored_at and again.changed == response.changed

    response = await examined.ask(restore=True)
    assert state_of(response, "governor") == DOUBTFUL
    assert not response.changed and not response.HasField("restored_at")
    assert examined.governor() == "ondemand"


async def test_the_time_of_a_fix_runs_out(examined: Any, until: Callable[..., Awaitable[Any]]) -> None:
    await examined.ask(fix=True, hold_seconds=1.0)
    await until(lambda: examined.governor() == "ondemand", "the board is put back")


async def test_nothing_is_set_in_the_middle_of_a_run(examined: Any) -> None:
    await examined.ask(fix=True)
    examined.running = "0123456789abcdef"
    with pytest.raises(Conflict, match="01234567 is being measured"):
        await examined.ask(restore=True)
    with pytest.raises(Conflict):
        await examined.ask(fix=True)
    assert (await examined.ask()).changed, "looking is allowed"
    assert examined.governor() == "performance"
    examined.running = ""
    await examined.ask(restore=True)
    assert examined.governor() == "ondemand"


async def test_a_run_that_holds_the_board_keeps_it_after_a_restore(examined: Any) -> None:
    await asyncio.to_thread(examined.tuner.acquire, "run 0123")
    await examined.ask(fix=True)
    response = await examined.ask(restore=True)
    assert response.changed and examined.governor() == "performance"
    assert list(response.failed) == ["run 0123 still needs the settings, and puts them back at its end"]
    assert not response.HasField("restored_at"), "nobody knows when it ends"
    await asyncio.to_thread(examined.tuner.release, "run 0123")
    assert examined.governor() == "ondemand"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e9])
async def test_times_that_make_no_sense(examined: Any, seconds: float) -> None:
    with pytest.raises(InvalidRequest, match="hold_seconds"):
        await examined.ask(fix=True, hold_seconds=seconds)
    assert examined.governor() == "ondemand"


async def test_fix_and_restore_exclude_each_other(examined: Any) -> None:
    with pytest.raises(InvalidRequest, match="exclude"):
        await examined.ask(fix=True, restore=True)


async def test_an_agent_that_ends_puts_the_board_back(examined: Any) -> None:
    await examined.ask(fix=True)
    await asyncio.to_thread(examined.tuner.acquire, "run 0123")
    assert await examined.examiner.close() == []
    assert examined.governor() == "ondemand"


def test_an_agent_that_waits_has_no_checks_in_memory() -> None:
    program = "import sys, boardbench.agent.serve; print([m for m in sys.modules if '.board.check' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
