"""The power mode of a Jetson, by a stand-in of nvpmodel that keeps its status file as the real one does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from boardbench.agent.board.power_modes import NoPowerMode, PowerModes
from boardbench.agent.board.tune import CommandFailed
from boardbench.agent.config import AgentConfig
from boardbench.agent.plan import check_power_mode
from boardbench.v1 import result_pb2

CONFIGURATION = """\
# comment
< PARAM TYPE=FILE NAME=CPU_ONLINE >
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=15W >
< POWER_MODEL ID=2 NAME=15w >
< POWER_MODEL ID=3 NAME=REBOOT >
< PM_CONFIG DEFAULT=1 >
"""


class Jetson:
    """A board under a folder, and its nvpmodel."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[list[str]] = []
        self.broken = False
        # A mode that nvpmodel sets in part, before it fails.
        self.half = ""
        self.status = root / "var/lib/nvpmodel/status"
        for path, text in (
            (root / "etc/nvpmodel.conf", CONFIGURATION),
            (root / "usr/sbin/nvpmodel", ""),
            (self.status, "pmode:0001 fmode:quiet\n"),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def run(self, command: Sequence[str], _environment: Mapping[str, str]) -> None:
        self.calls.append(list(command[1:]))
        if self.broken:
            raise CommandFailed("NVPM ERROR: Error opening a file")
        if command[2] != "3":  # that one wants a reboot, and nobody answers
            self.status.write_text(f"pmode:{int(command[2]):04} fmode:quiet\n")
        if command[2] == self.half:
            raise CommandFailed("NVPM ERROR: clock could not be set")

    @property
    def mode(self) -> int:
        return int(self.status.read_text()[6:10])


@pytest.fixture
def jetson(tmp_path: Path) -> Jetson:
    return Jetson(tmp_path / "board")


@pytest.fixture
def modes(jetson: Jetson, tmp_path: Path) -> PowerModes:
    return PowerModes(jetson.root, tmp_path / "data", jetson.run)


def test_a_mode_is_set_and_the_former_one_put_back(jetson: Jetson, modes: PowerModes, tmp_path: Path) -> None:
    assert modes.set("MAXN") == "power mode: 15W → MAXN"
    assert jetson.mode == 0
    assert json.loads((tmp_path / "data/power/journal.json").read_text())["before"] == 1
    assert modes.put_back() == []
    assert jetson.mode == 1
    assert jetson.calls == [["-m", "0"], ["-m", "1"]]
    assert not (tmp_path / "data/power/journal.json").exists()
    assert modes.put_back() == []
    assert len(jetson.calls) == 2


def test_a_mode_that_is_set_already_changes_nothing(jetson: Jetson, modes: PowerModes) -> None:
    assert modes.set("1") == ""
    assert modes.put_back() == []
    assert jetson.calls == []


def test_names_are_those_of_the_board(modes: PowerModes) -> None:
    assert modes.index_of("maxn") == 0
    assert modes.index_of("15w") == 2, "the exact one of two that differ in case"
    with pytest.raises(NoPowerMode, match=r"'15 W', which is none of this board's: MAXN \(0\), 15W \(1\)"):
        modes.index_of("15 W")


def test_a_board_without_modes_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoPowerMode, match="this board has no modes"):
        PowerModes(tmp_path, tmp_path / "data").index_of("MAXN")
    assert not (tmp_path / "data").exists()
    config = AgentConfig(sys_root=tmp_path, data_dir=tmp_path / "data")
    with pytest.raises(NoPowerMode):
        check_power_mode(config, result_pb2.BenchmarkSpec(power_mode="MAXN"))
    check_power_mode(config, result_pb2.BenchmarkSpec())


def test_one_that_wants_a_reboot_is_not_set(jetson: Jetson, modes: PowerModes) -> None:
    with pytest.raises(NoPowerMode, match=r"may want a reboot: sudo nvpmodel -m 3"):
        modes.set("REBOOT")
    assert jetson.mode == 1
    assert modes.put_back() == []


def test_one_that_is_set_in_part_only_is_put_back(jetson: Jetson, modes: PowerModes, tmp_path: Path) -> None:
    jetson.half = "0"
    with pytest.raises(NoPowerMode, match="clock could not be set: sudo nvpmodel -m 0"):
        modes.set("MAXN")
    assert jetson.mode == 1
    assert not (tmp_path / "data/power/journal.json").exists()
    # Nor is the folder held any more.
    other = PowerModes(jetson.root, tmp_path / "data", jetson.run)
    assert other.set("15w") == "power mode: 15W → 15w"
    other.put_back()


def killed_in_maxn(jetson: Jetson, data_dir: Path) -> None:
    """What a process leaves that is killed after it has set a mode: its lock goes with it."""
    (data_dir / "power").mkdir(parents=True)
    noted = {"root": str(jetson.root.absolute()), "before": 1}
    (data_dir / "power/journal.json").write_text(json.dumps(noted))
    jetson.run(("nvpmodel", "-m", "0"), {})


def test_what_a_killed_process_left_is_put_back(jetson: Jetson, tmp_path: Path) -> None:
    killed_in_maxn(jetson, tmp_path / "data")
    after = PowerModes(jetson.root, tmp_path / "data", jetson.run)
    assert after.recover() == ["power mode: back to 1"]
    assert jetson.mode == 1
    assert after.recover() == []


def test_what_was_noted_of_another_board_is_not_put_back(jetson: Jetson, tmp_path: Path) -> None:
    killed_in_maxn(jetson, tmp_path / "data")
    journal = tmp_path / "data/power/journal.json"
    journal.write_text(json.dumps({"root": "/another", "before": 1}))
    assert PowerModes(jetson.root, tmp_path / "data", jetson.run).recover() == []
    assert jetson.mode == 0


def test_what_can_not_be_put_back_is_told_with_the_command(jetson: Jetson, modes: PowerModes) -> None:
    modes.set("MAXN")
    jetson.broken = True
    (told,) = modes.put_back()
    assert "not put back, NVPM ERROR" in told
    assert "sudo nvpmodel -m 1" in told


def test_the_former_mode_is_that_before_a_killed_process(jetson: Jetson, tmp_path: Path) -> None:
    killed_in_maxn(jetson, tmp_path / "data")
    after = PowerModes(jetson.root, tmp_path / "data", jetson.run)
    assert after.set("15w") == "power mode: 15W → 15w"
    after.put_back()
    assert jetson.mode == 1
