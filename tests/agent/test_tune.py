"""What is set for a measurement and put back: on copies of the boards' trees, with real crashes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.board.policies import policies, processor_names
from boardbench.agent.board.tune import CommandFailed, TimedHold, Tuner, command, run_command, settable

BOARDS = Path(__file__).parent.parent / "boards"
CPU = "sys/devices/system/cpu"
BOOT = "3f1c8ec5-6b8d-4b0e-9f0e-1f2d3c4b5a69"


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def contents(root: Path) -> dict[str, bytes]:
    """Every file below, with what it holds."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def text(root: Path, path: str) -> str:
    return (root / path).read_text().strip()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    """A Raspberry Pi 5 after a boot."""
    root = tmp_path / "pi"
    shutil.copytree(BOARDS / "raspberry_pi_5", root, symlinks=True)
    write(root, {"proc/sys/kernel/random/boot_id": BOOT})
    return root


@pytest.fixture
def policied(tmp_path: Path) -> Path:
    """Made up: two kinds of cores with policies as the kernel lays them out, a turbo and a Coral stick."""
    root = tmp_path / "policied"
    write(root, {"proc/sys/kernel/random/boot_id": BOOT, f"{CPU}/cpufreq/boost": "1"})
    for policy, (processors, least, most) in {
        "policy0": ("0 1 2 3", 600000, 1800000),
        "policy4": ("4 5", 800000, 2400000),
    }.items():
        write(
            root,
            {
                f"{CPU}/cpufreq/{policy}/affected_cpus": processors,
                f"{CPU}/cpufreq/{policy}/related_cpus": processors,
                f"{CPU}/cpufreq/{policy}/scaling_governor": "schedutil",
                f"{CPU}/cpufreq/{policy}/scaling_available_governors": "ondemand schedutil performance",
                f"{CPU}/cpufreq/{policy}/scaling_min_freq": str(least),
                f"{CPU}/cpufreq/{policy}/scaling_max_freq": str(most),
                f"{CPU}/cpufreq/{policy}/cpuinfo_max_freq": str(most),
            },
        )
        for number in processors.split():
            (root / CPU / f"cpu{number}").mkdir()
            (root / CPU / f"cpu{number}/cpufreq").symlink_to(f"../cpufreq/{policy}")
    usb = "sys/bus/usb/devices"
    write(
        root,
        {
            f"{usb}/2-1/idVendor": "18d1",
            f"{usb}/2-1/idProduct": "9302",
            f"{usb}/2-1/power/control": "auto",
            f"{usb}/1-4/idVendor": "0403",
            f"{usb}/1-4/idProduct": "6001",
            f"{usb}/1-4/power/control": "auto",
        },
    )
    return root


# --- policies


def test_processors_that_share_a_frequency_are_one_policy(policied: Path, pi: Path) -> None:
    found = policies(policied)
    assert [policy.name for policy in found] == ["cpu0-3", "cpu4-5"]
    assert (found[1].least_hertz, found[1].most_hertz, found[1].fixed) == (800e6, 2400e6, False)
    shutil.rmtree(policied / CPU / "cpufreq/policy4")
    write(policied, {f"{CPU}/cpufreq/policy4/related_cpus": "4 5"})
    assert [policy.name for policy in policies(policied)] == ["cpu0-3"], "its processors are offline"
    assert [policy.name for policy in policies(pi)] == ["cpu0", "cpu1", "cpu2", "cpu3"]
    assert policies(BOARDS / "kvm_guest") == []


def test_names_of_processors() -> None:
    assert processor_names([3, 0, 1, 2, 6]) == "cpu0-3,6"
    assert processor_names([11]) == "cpu11"


# --- setting and putting back


def test_a_board_is_set_and_put_back_to_the_byte(policied: Path, data: Path) -> None:
    before = contents(policied)
    tuner = Tuner(policied, data)
    assert tuner.acquire("test") == [
        "turbo: on → off",
        "cpu0-5 governor: schedutil → performance",
        "cpu0-3 least frequency: 600 MHz → 1800 MHz",
        "cpu4-5 least frequency: 800 MHz → 2400 MHz",
        "2-1 USB autosuspend: on → off",
    ]
    assert tuner.failed == []
    assert text(policied, f"{CPU}/cpu5/cpufreq/scaling_governor") == "performance"
    assert text(policied, f"{CPU}/cpufreq/policy4/scaling_min_freq") == "2400000"
    assert text(policied, f"{CPU}/cpufreq/boost") == "0"
    assert text(policied, "sys/bus/usb/devices/2-1/power/control") == "on"
    changed = {name for name, held in contents(policied).items() if held != before[name]}
    assert len(changed) == 6, "two governors, two bounds, the turbo, the stick, and nothing else"
    assert tuner.release("test") == []
    assert contents(policied) == before
    assert (tuner.changed, tuner.failed) == ([], [])
    assert sorted(path.name for path in (data / "tuning").iterdir()) == ["lock"]


@pytest.mark.parametrize("board", ["raspberry_pi_5", "rock_5b", "laptop_intel", "laptop_amd", "tpu_usb2"])
def test_every_board_is_put_back(board: str, tmp_path: Path, data: Path) -> None:
    root = tmp_path / board
    shutil.copytree(BOARDS / board, root, symlinks=True)
    before = contents(root)
    tuner = Tuner(root, data)
    tuner.acquire("test")
    assert tuner.failed == []
    tuner.restore()
    assert contents(root) == before


def test_where_nothing_can_be_set_nothing_is_written(data: Path) -> None:
    tuner = Tuner(BOARDS / "kvm_guest", data)
    assert (tuner.acquire("test"), tuner.failed) == ([], [])
    assert tuner.release("test") == []
    assert not data.exists()


def test_intel_turbo_is_told_as_turbo(tmp_path: Path, data: Path) -> None:
    write(tmp_path, {f"{CPU}/intel_pstate/no_turbo": "0", f"{CPU}/cpufreq/boost": "1"})
    tuner = Tuner(tmp_path, data)
    assert tuner.acquire("test") == ["turbo: on → off"]
    assert text(tmp_path, f"{CPU}/intel_pstate/no_turbo") == "1"
    assert text(tmp_path, f"{CPU}/cpufreq/boost") == "1", "one switch is enough"
    tuner.release("test")
    assert text(tmp_path, f"{CPU}/intel_pstate/no_turbo") == "0"


def test_the_energy_preference_is_set_before_the_governor_and_put_back_after_it(
    policied: Path, data: Path
) -> None:
    policy = f"{CPU}/cpufreq/policy4"
    write(
        policied,
        {
            f"{policy}/energy_performance_preference": "balance_power",
            f"{policy}/energy_performance_available_preferences": "default performance balance_power power",
            f"{CPU}/cpufreq/policy0/energy_performance_preference": "128",
        },
    )
    before = contents(policied)
    tuner = Tuner(policied, data)
    told = tuner.acquire("test")
    assert told[1:3] == [
        "cpu4-5 energy preference: balance_power → performance",
        "cpu0-5 governor: schedutil → performance",
    ]
    assert text(policied, f"{CPU}/cpufreq/policy0/energy_performance_preference") == "128"
    tuner.release("test")
    assert contents(policied) == before
    kinds = [change["kind"] for change in journal_of(policied, data)]
    assert kinds == ["boost", "preference", "governor", "governor", "least", "least", "autosuspend"]


def journal_of(root: Path, data: Path) -> list[dict[str, str]]:
    """What is on disk while the board is set; it is put back in the reverse order."""
    tuner = Tuner(root, data)
    tuner.acquire("look")
    changes = json.loads((data / "tuning/journal.json").read_text())["changes"]
    tuner.release("look")
    return list(changes)


def test_turbo_of_each_policy(policied: Path, data: Path) -> None:
    (policied / CPU / "cpufreq/boost").unlink()
    write(policied, {f"{CPU}/cpufreq/policy4/boost": "1"})
    assert "cpu4-5 turbo: on → off" in Tuner(policied, data).acquire("test")


def test_a_frequency_that_somebody_holds_stays(policied: Path, data: Path) -> None:
    write(policied, {f"{CPU}/cpufreq/policy0/scaling_governor": "userspace"})
    told = Tuner(policied, data).acquire("test")
    assert "cpu4-5 governor: schedutil → performance" in told
    assert text(policied, f"{CPU}/cpufreq/policy0/scaling_governor") == "userspace"
    assert text(policied, f"{CPU}/cpufreq/policy0/scaling_min_freq") == "600000"


def test_without_the_performance_governor_the_bounds_do(policied: Path, data: Path) -> None:
    for policy in ("policy0", "policy4"):
        write(policied, {f"{CPU}/cpufreq/{policy}/scaling_available_governors": "schedutil powersave"})
    tuner = Tuner(policied, data)
    told = tuner.acquire("test")
    assert not any("governor" in line for line in told) and tuner.failed == []
    assert all(policy.fixed for policy in policies(policied))


def test_whoever_holds_the_board_last_puts_it_back(pi: Path, data: Path) -> None:
    before = contents(pi)
    tuner = Tuner(pi, data)
    first = tuner.acquire("doctor")
    assert tuner.acquire("run 1") == first, "the second one measures under the same settings"
    assert tuner.holders == ["doctor", "run 1"]
    assert tuner.release("doctor") == []
    assert text(pi, f"{CPU}/cpu0/cpufreq/scaling_governor") == "performance"
    assert tuner.changed == first
    assert tuner.release("run 1") == []
    assert contents(pi) == before
    assert tuner.release("run 1") == [], "twice is once"


def test_an_owner_that_holds_twice_lets_go_once(pi: Path, data: Path) -> None:
    before = contents(pi)
    tuner = Tuner(pi, data)
    tuner.acquire("doctor")
    tuner.acquire("doctor")
    tuner.release("doctor")
    assert contents(pi) == before


def test_threads_that_come_and_go_leave_the_board_as_it_was(pi: Path, data: Path) -> None:
    before = contents(pi)
    tuner = Tuner(pi, data)

    def measure(name: str) -> None:
        for _ in range(5):
            tuner.acquire(name)
            tuner.release(name)

    threads = [threading.Thread(target=measure, args=(f"run {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(pi) == before and tuner.holders == []


# --- others who set things


def test_what_somebody_else_has_set_since_is_left_alone(pi: Path, data: Path) -> None:
    tuner = Tuner(pi, data)
    tuner.acquire("test")
    write(pi, {f"{CPU}/cpu2/cpufreq/scaling_governor": "powersave"})
    failed = tuner.release("test")
    assert failed == ["cpu2 governor: left at powersave, which somebody else has set since (it was ondemand)"]
    governors = [text(pi, f"{CPU}/cpu{n}/cpufreq/scaling_governor") for n in range(4)]
    assert governors == ["ondemand", "ondemand", "powersave", "ondemand"]
    assert tuner.changed == [] and tuner.release("test") == [], "and it is said once"


def test_what_somebody_set_between_two_holds_is_what_comes_back(pi: Path, data: Path) -> None:
    tuner = Tuner(pi, data)
    tuner.acquire("doctor")
    write(pi, {f"{CPU}/cpu2/cpufreq/scaling_governor": "powersave"})
    tuner.acquire("run 1")
    assert text(pi, f"{CPU}/cpu2/cpufreq/scaling_governor") == "performance"
    tuner.release("doctor")
    assert tuner.release("run 1") == []
    governors = [text(pi, f"{CPU}/cpu{n}/cpufreq/scaling_governor") for n in range(4)]
    assert governors == ["ondemand", "ondemand", "powersave", "ondemand"]


def test_a_bound_that_followed_the_heat_is_still_ours(policied: Path, data: Path) -> None:
    """The kernel lowers both bounds when it throttles."""
    before = contents(policied)
    tuner = Tuner(policied, data)
    tuner.acquire("test")
    write(
        policied,
        {
            f"{CPU}/cpufreq/policy4/scaling_max_freq": "1200000",
            f"{CPU}/cpufreq/policy4/scaling_min_freq": "1200000",
        },
    )
    assert tuner.release("test") == []
    assert text(policied, f"{CPU}/cpufreq/policy4/scaling_min_freq") == "800000"
    write(policied, {f"{CPU}/cpufreq/policy4/scaling_max_freq": "2400000"})
    assert contents(policied) == before


def test_what_is_no_longer_there_is_told(policied: Path, data: Path) -> None:
    tuner = Tuner(policied, data)
    tuner.acquire("test")
    shutil.rmtree(policied / "sys/bus/usb/devices/2-1")
    assert tuner.release("test") == ["2-1 USB autosuspend: not put back, it is no longer there"]
    assert text(policied, f"{CPU}/cpufreq/policy0/scaling_governor") == "schedutil"


def test_two_processes_do_not_undo_each_other(pi: Path, data: Path) -> None:
    agent, other = Tuner(pi, data), Tuner(pi, data)
    agent.acquire("doctor")
    assert other.acquire("run") == [], "it may be put back at any moment"
    (failed,) = other.failed
    assert failed.startswith("nothing was set: ") and "another agent is using it" in failed
    assert other.recover() == []
    other.restore()
    assert text(pi, f"{CPU}/cpu1/cpufreq/scaling_governor") == "performance"


# --- what can't be set


def test_a_user_that_may_not_is_told_what_to_type(
    policied: Path, public_path: Path, as_nobody: Callable[..., Any]
) -> None:
    policied, data = shutil.copytree(policied, public_path / "board", symlinks=True), public_path / "data"
    before = contents(policied)
    for path in policied.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    told = as_nobody(
        """
        from boardbench.agent.board.tune import Tuner

        tuner = Tuner(Path(sys.argv[1]), Path(sys.argv[2]))
        print(json.dumps([tuner.acquire("test"), tuner.failed, tuner.release("test")]))
        """,
        policied,
        data,
        writable=[data],
    )
    changed, failed, left = told
    assert changed == [] and left == []
    uid = 65534 if os.geteuid() == 0 else os.geteuid()
    why = f"not allowed for the agent's user (uid {uid})"
    assert failed == [
        f"turbo: {why}: echo 0 | sudo tee /{CPU}/cpufreq/boost",
        f"cpu0-5 governor: {why}: echo performance | sudo tee /{CPU}/cpufreq/policy[0-9]*/scaling_governor",
        f"cpu0-3 least frequency: {why}: echo 1800000 | sudo tee /{CPU}/cpufreq/policy0/scaling_min_freq",
        f"cpu4-5 least frequency: {why}: echo 2400000 | sudo tee /{CPU}/cpufreq/policy4/scaling_min_freq",
        f"2-1 USB autosuspend: {why}: echo on | sudo tee /sys/bus/usb/devices/2-1/power/control",
    ]
    assert contents(policied) == before
    assert not (data / "tuning/journal.json").exists()


def test_commands_can_be_pasted(policied: Path) -> None:
    """A shell makes of each what is meant, in a copy of the board and without sudo."""
    governors = [f"{policy.path}/scaling_governor" for policy in policies(policied)]
    for paths in (governors, governors[:1], [f"{CPU}/cpufreq/boost"]):
        line = command(policied, paths, "powersave").replace("sudo ", "").replace(" /sys", f" {policied}/sys")
        subprocess.run(["sh", "-c", line], check=True, stdout=subprocess.DEVNULL)
        assert {text(policied, path) for path in paths} == {"powersave"}
    assert settable(policied, governors[0]) and not settable(policied, "nothing")
    assert command(Path("/"), [f"{CPU}/cpufreq/boost"], "0") == f"echo 0 | sudo tee /{CPU}/cpufreq/boost"


def test_nothing_is_set_that_could_not_be_put_back_after_a_crash(pi: Path, data: Path) -> None:
    before = contents(pi)
    (data / "tuning/journal.json.tmp").mkdir(parents=True)
    tuner = Tuner(pi, data)
    assert tuner.acquire("test") == []
    (failed,) = tuner.failed
    assert failed.startswith("nothing was set, since how it was can't be noted first: ")
    shutil.rmtree(data)
    data.write_text("a file where a folder should be")
    assert tuner.acquire("test") == []
    (failed,) = tuner.failed
    assert failed.startswith("nothing was set: ")
    assert contents(pi) == before


def test_a_link_that_leads_out_of_the_board_is_not_followed(pi: Path, data: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("ondemand\n")
    path = pi / CPU / "cpu3/cpufreq/scaling_governor"
    path.unlink()
    path.symlink_to(outside)
    tuner = Tuner(pi, data)
    assert tuner.acquire("test") == ["cpu0-2 governor: ondemand → performance"]
    assert "it leads out of the board's root" in tuner.failed[0]
    assert outside.read_text() == "ondemand\n"


# --- crashes

CRASH = """
import os, signal, sys
from pathlib import Path
from boardbench.agent.board.tune import Tuner
Tuner(Path(sys.argv[1]), Path(sys.argv[2])).acquire("test")
os.kill(os.getpid(), signal.SIGKILL)
"""


def crash(root: Path, data: Path) -> None:
    """A process that holds the board is killed."""
    done = subprocess.run([sys.executable, "-c", CRASH, str(root), str(data)])
    assert done.returncode == -signal.SIGKILL


def test_a_crash_is_put_right(policied: Path, data: Path) -> None:
    before = contents(policied)
    crash(policied, data)
    assert contents(policied) != before
    tuner = Tuner(policied, data)
    assert tuner.recover() == [
        "turbo: off → on",
        "cpu0-5 governor: performance → schedutil",
        "cpu0-3 least frequency: 1800 MHz → 600 MHz",
        "cpu4-5 least frequency: 2400 MHz → 800 MHz",
        "2-1 USB autosuspend: off → on",
    ]
    assert contents(policied) == before
    assert tuner.failed == [] and tuner.changed == [] and tuner.recover() == []


def test_a_second_crash_keeps_the_first_originals(pi: Path, data: Path) -> None:
    before = contents(pi)
    crash(pi, data)
    crash(pi, data)
    Tuner(pi, data).recover()
    assert contents(pi) == before


def test_whoever_holds_next_takes_the_originals_over(pi: Path, data: Path) -> None:
    before = contents(pi)
    crash(pi, data)
    tuner = Tuner(pi, data)
    assert tuner.acquire("run") == ["cpu0-3 governor: ondemand → performance"]
    tuner.release("run")
    assert contents(pi) == before


def test_after_a_crash_too_a_stranger_s_value_stays(pi: Path, data: Path) -> None:
    crash(pi, data)
    write(pi, {f"{CPU}/cpu1/cpufreq/scaling_governor": "schedutil"})
    tuner = Tuner(pi, data)
    tuner.recover()
    assert tuner.failed == [
        "cpu1 governor: left at schedutil, which somebody else has set since (it was ondemand)"
    ]
    assert text(pi, f"{CPU}/cpu0/cpufreq/scaling_governor") == "ondemand"


def test_after_another_boot_nothing_is_put_back(pi: Path, data: Path) -> None:
    crash(pi, data)
    write(pi, {"proc/sys/kernel/random/boot_id": "00000000-0000-4000-8000-000000000000"})
    held = contents(pi)
    tuner = Tuner(pi, data)
    assert (tuner.recover(), tuner.failed) == ([], [])
    assert contents(pi) == held
    assert not (data / "tuning/journal.json").exists()


def test_what_can_not_be_put_back_is_kept_for_the_next_time(
    pi: Path, public_path: Path, as_nobody: Callable[..., Any]
) -> None:
    pi, data = shutil.copytree(pi, public_path / "board", symlinks=True), public_path / "data"
    before = contents(pi)
    crash(pi, data)
    for path in (pi / CPU).rglob("scaling_governor"):
        path.chmod(0o444)
    for path in data.rglob("*"):
        path.chmod(0o777)
    failed = as_nobody(
        """
        from boardbench.agent.board.tune import Tuner

        tuner = Tuner(Path(sys.argv[1]), Path(sys.argv[2]))
        tuner.recover()
        print(json.dumps(tuner.failed))
        """,
        pi,
        data,
        writable=[data, data / "tuning"],
    )
    uid = 65534 if os.geteuid() == 0 else os.geteuid()
    pattern = f"/{CPU}/cpu[0-9]*/cpufreq/scaling_governor"
    assert failed == [
        f"cpu0-3 governor: not put back, not allowed for the agent's user (uid {uid}): "
        f"echo ondemand | sudo tee {pattern}"
    ]
    assert text(pi, f"{CPU}/cpu0/cpufreq/scaling_governor") == "performance"
    for path in (pi / CPU).rglob("scaling_governor"):
        path.chmod(0o644)
    tuner = Tuner(pi, data)
    assert tuner.recover() == ["cpu0-3 governor: performance → ondemand"]
    assert contents(pi) == before


def noted(root: Path, data: Path, *changes: Mapping[str, str], **more: object) -> None:
    write(
        data,
        {
            "tuning/journal.json": json.dumps(
                {"root": str(root), "boot_id": BOOT, "clocks": False, "changes": changes} | more
            )
        },
    )


def test_a_crash_in_the_middle_of_a_change(pi: Path, data: Path) -> None:
    """What was about to be written may have been, and may have been rounded by the driver."""
    governor = f"{CPU}/cpu0/cpufreq/scaling_governor"
    noted(pi, data, {"kind": "governor", "part": "cpu0", "path": governor, "before": "conservative"})
    tuner = Tuner(pi, data)
    assert tuner.recover() == ["cpu0 governor: ? → conservative"]
    assert text(pi, governor) == "conservative" and tuner.failed == []


def test_what_a_driver_rounded_is_still_ours(policied: Path, data: Path) -> None:
    """It was asked for 2400 MHz and took 2300; nobody else has set anything."""
    path = f"{CPU}/cpufreq/policy4/scaling_min_freq"
    change = {"kind": "least", "part": "cpu4-5", "path": path, "before": "800000", "now": "2300000"}
    write(policied, {path: "2300000"})
    noted(policied, data, change | {"like": f"{CPU}/cpufreq/policy4/scaling_max_freq"})
    tuner = Tuner(policied, data)
    tuner.acquire("run")
    assert text(policied, path) == "2300000"
    assert tuner.release("run") == []
    assert text(policied, path) == "800000"


@pytest.mark.parametrize(
    "journal",
    [b"", b"{", b"[]", b'{"root": 1}', b'{"root":"","boot_id":"","clocks":0,"changes":[1]}', b"\xff"],
)
def test_a_damaged_journal_is_put_aside(journal: bytes, pi: Path, data: Path) -> None:
    before = contents(pi)
    (data / "tuning").mkdir(parents=True)
    (data / "tuning/journal.json").write_bytes(journal)
    tuner = Tuner(pi, data)
    assert tuner.recover() == []
    assert "no journal of ours" in tuner.failed[0]
    assert (data / "tuning/journal.broken").read_bytes() == journal
    tuner.acquire("test")
    tuner.release("test")
    assert contents(pi) == before


def test_a_journal_that_names_other_files_is_not_obeyed(pi: Path, data: Path) -> None:
    write(pi, {"etc/shadow": "root:*:"})
    for path in ("etc/shadow", f"{CPU}/cpu0/cpufreq/../../../../../../etc/shadow"):
        noted(pi, data, {"kind": "governor", "part": "x", "path": path, "before": "root::", "now": "root:*:"})
        tuner = Tuner(pi, data)
        tuner.recover()
        assert text(pi, "etc/shadow") == "root:*:"
        assert "nothing that boardbench sets" in tuner.failed[0]


def test_the_journal_of_another_root_is_kept(pi: Path, data: Path) -> None:
    noted(Path("/elsewhere"), data)
    tuner = Tuner(pi, data)
    tuner.recover()
    tuner.acquire("test")
    assert "/elsewhere" in tuner.failed[0]
    assert text(pi, f"{CPU}/cpu0/cpufreq/scaling_governor") == "ondemand"
    assert (data / "tuning/journal.json").exists()


# --- jetson_clocks

# Does what NVIDIA's does, in small: it asks before it overwrites, and keeps the fan's state in HOME.
CLOCKS = """\
#!/bin/sh
root=$(cd "$(dirname "$0")/../.." && pwd)
gpu=$root/sys/class/devfreq/17000000.gpu
case "$1" in
--store)
    if [ -e "$2" ]; then echo "File $2 already exists. Can I overwrite it? Y/N:"; exit 1; fi
    echo "$gpu/min_freq:$(cat "$gpu/min_freq")" >"$2"
    echo active >"$HOME/.jetsonclocks_fan.txt" ;;
--restore)
    [ -e "$HOME/.jetsonclocks_fan.txt" ] || exit 3
    sed 's/.*://' "$2" >"$gpu/min_freq" ;;
--fan)
    cat "$gpu/max_freq" >"$gpu/min_freq"
    if [ -e "$root/kill" ]; then kill -9 $PPID; fi ;;
esac
"""


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    """A Jetson with a program in the place of NVIDIA's jetson_clocks."""
    root = tmp_path / "jetson"
    shutil.copytree(BOARDS / "jetson_orin_nano", root, symlinks=True)
    gpu = "sys/class/devfreq/17000000.gpu"
    write(root, {f"{gpu}/min_freq": "306000000", f"{gpu}/max_freq": "1020000000"})
    write(root, {"usr/bin/jetson_clocks": CLOCKS, "proc/sys/kernel/random/boot_id": BOOT})
    (root / "usr/bin/jetson_clocks").chmod(0o755)
    return root


GPU = "sys/class/devfreq/17000000.gpu/min_freq"


def test_jetson_clocks_are_stored_set_and_restored(jetson: Path, data: Path) -> None:
    before = contents(jetson)
    tuner = Tuner(jetson, data)
    told = tuner.acquire("test")
    assert told[0] == (
        "jetson_clocks: as it was → the highest clocks of the power mode, the fan at full speed"
    )
    assert told[1] == "cpu0-5 governor: schedutil → performance"
    assert text(jetson, GPU) == "1020000000"
    assert tuner.acquire("again") == told
    tuner.release("test")
    assert text(jetson, GPU) == "1020000000"
    assert tuner.release("again") == []
    assert contents(jetson) == before
    assert tuner.acquire("later") == told, "what was stored before is not in the way"
    assert tuner.restore() == []
    assert contents(jetson) == before


def test_everything_is_on_disk_before_anything_is_set(jetson: Path, data: Path) -> None:
    before = contents(jetson)
    seen: list[str] = []

    def run(program: Sequence[str], environment: Mapping[str, str]) -> None:
        journal = json.loads((data / "tuning/journal.json").read_text())
        assert [change["before"] for change in journal["changes"]] == ["schedutil"] * 6
        assert contents(jetson) == before, "nothing is set yet"
        assert journal["clocks"] == (program[1] != "--store")
        seen.append(program[1])
        run_command(program, environment) if program[1] == "--store" else None

    Tuner(jetson, data, run).acquire("test")
    assert seen == ["--store", "--fan"]


def test_a_crash_between_the_clocks_and_the_governors(jetson: Path, data: Path) -> None:
    before = contents(jetson)
    write(jetson, {"kill": ""})
    crash(jetson, data)
    (jetson / "kill").unlink()
    assert text(jetson, GPU) == "1020000000"
    assert text(jetson, f"{CPU}/cpu0/cpufreq/scaling_governor") == "schedutil", "it died before"
    Tuner(jetson, data).recover()
    assert contents(jetson) == before


def test_clocks_that_need_root_are_told(jetson: Path, data: Path) -> None:
    write(jetson, {"usr/bin/jetson_clocks": "#!/bin/sh\necho Error: Run this script as a root user\nexit 1"})
    tuner = Tuner(jetson, data)
    assert tuner.acquire("test") == ["cpu0-5 governor: schedutil → performance"]
    assert tuner.failed == ["jetson_clocks: Error: Run this script as a root user: sudo jetson_clocks --fan"]
    assert tuner.release("test") == []


def test_clocks_that_were_not_stored_are_not_set(jetson: Path, data: Path) -> None:
    shutil.copy(BOARDS / "jetson_orin_nano/usr/bin/jetson_clocks", jetson / "usr/bin")
    tuner = Tuner(jetson, data)
    assert tuner.acquire("test") == ["cpu0-5 governor: schedutil → performance"]
    assert tuner.failed == ["jetson_clocks: it stored nothing: sudo jetson_clocks --fan"]


def test_clocks_that_do_not_come_back_are_tried_again(jetson: Path, data: Path) -> None:
    before = contents(jetson)
    tuner = Tuner(jetson, data)
    tuner.acquire("test")
    fan = data / "tuning/.jetsonclocks_fan.txt"
    state = fan.read_text()
    fan.unlink()
    (failed,) = tuner.release("test")
    stored = data / "tuning/clocks.txt"
    assert failed == (f"jetson_clocks: not put back, it exited with 3: sudo jetson_clocks --restore {stored}")
    assert text(jetson, f"{CPU}/cpu0/cpufreq/scaling_governor") == "schedutil"
    fan.write_text(state)
    assert Tuner(jetson, data).recover() == [], "the other one holds the folder"
    assert tuner.restore() == []
    assert contents(jetson) == before


def test_a_program_that_can_not_be_run() -> None:
    with pytest.raises(CommandFailed, match="No such file"):
        run_command(("/nowhere/jetson_clocks",), {})


# --- for a time


async def test_the_time_runs_out(pi: Path, data: Path, until: Callable[..., Awaitable[Any]]) -> None:
    before = contents(pi)
    tuner = Tuner(pi, data)
    hold = TimedHold(tuner, "doctor")
    assert hold.until is None
    assert await hold.hold(3600.0) == []
    assert contents(pi) != before and hold.until is not None
    await hold.hold(0.01)
    await until(lambda: tuner.changed == [], "the board is put back")
    assert contents(pi) == before and hold.until is None


async def test_a_run_goes_on_when_the_time_is_over(
    pi: Path, data: Path, until: Callable[..., Awaitable[Any]]
) -> None:
    before = contents(pi)
    tuner = Tuner(pi, data)
    hold = TimedHold(tuner, "doctor")
    tuner.acquire("run 1")
    await hold.hold(0.01)
    await until(lambda: tuner.holders == ["run 1"])
    assert contents(pi) != before
    tuner.release("run 1")
    assert contents(pi) == before


async def test_it_does_not_run_out_in_the_middle_of_a_measurement(
    pi: Path, data: Path, until: Callable[..., Awaitable[Any]]
) -> None:
    before = contents(pi)
    asked: list[bool] = []
    busy = True

    def is_busy() -> bool:
        asked.append(busy)
        return busy

    hold = TimedHold(Tuner(pi, data), "doctor", is_busy)
    await hold.hold(0.01)
    await until(lambda: len(asked) > 1, "it has been asked twice whether it may be put back")
    assert contents(pi) != before and hold.until is not None
    busy = False
    await until(lambda: hold.until is None, "the measurement is over")
    await hold.close()
    assert contents(pi) == before


async def test_it_is_let_go_and_closed(pi: Path, data: Path) -> None:
    before = contents(pi)
    tuner = Tuner(pi, data)
    hold = TimedHold(tuner, "doctor")
    await hold.hold(3600.0)
    assert await hold.let_go() == []
    assert contents(pi) == before and hold.until is None
    await hold.hold(3600.0)
    tuner.acquire("run 1")
    assert await hold.close() == []
    assert contents(pi) == before, "the agent ends, and with it every run"


async def test_a_caller_that_goes_away_leaves_the_timer(
    jetson: Path, data: Path, until: Callable[..., Awaitable[Any]]
) -> None:
    before = contents(jetson)
    started, go = threading.Event(), threading.Event()

    def run(program: Sequence[str], environment: Mapping[str, str]) -> None:
        started.set()
        assert go.wait(30)
        run_command(program, environment)

    tuner = Tuner(jetson, data, run)
    hold = TimedHold(tuner, "doctor")
    asked = asyncio.create_task(hold.hold(3600.0))
    await until(started.is_set, "it is being set")
    asked.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await until(lambda: hold.until is not None, "it is held all the same")
    assert contents(jetson) != before
    assert await hold.let_go() == []
    assert contents(jetson) == before
