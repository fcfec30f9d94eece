"""doctor against a real agent on a copy of a board's tree: set, put back, and put back after kill -9."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

BOARDS = Path(__file__).parent.parent / "boards"
CPU = "sys/devices/system/cpu"
LONG = ("--duration", "60", "--warm-up", "0")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="boards' trees are of Linux")


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


class Board:
    """A copy of a board's tree, and the settings that make an agent take it for its board."""

    def __init__(self, root: Path) -> None:
        self.root = shutil.copytree(BOARDS / "raspberry_pi_5", root, symlinks=True)
        boot = self.root / "proc/sys/kernel/random/boot_id"
        boot.parent.mkdir(parents=True)
        boot.write_text("3f1c8ec5-6b8d-4b0e-9f0e-1f2d3c4b5a69\n")
        for number in range(4):
            (self.root / CPU / f"cpu{number}/cpufreq/scaling_min_freq").write_text("1500000\n")
        (self.root / CPU / "cpufreq").mkdir()
        (self.root / CPU / "cpufreq/boost").write_text("1\n")
        self.before = contents(self.root)
        self.environment = {"BOARDBENCH_AGENT_SYS_ROOT": str(self.root)}

    @property
    def is_as_it_was(self) -> bool:
        return contents(self.root) == self.before

    @property
    def is_set(self) -> bool:
        governors = {
            path.read_text().strip() for path in self.root.glob(f"{CPU}/cpu*/cpufreq/scaling_governor")
        }
        least = {path.read_text().strip() for path in self.root.glob(f"{CPU}/cpu*/cpufreq/scaling_min_freq")}
        turbo = (self.root / CPU / "cpufreq/boost").read_text().strip()
        return (governors, least, turbo) == ({"performance"}, {"2400000"}, "0")


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path / "board")


def states(document: Any) -> dict[str, str]:
    return {each["code"]: each.get("state", "FINDING_STATE_UNSPECIFIED") for each in document["findings"]}


def test_a_board_is_examined_fixed_and_restored(programs: Any, board: Board) -> None:
    agent = programs.agent(environment=board.environment)
    to = ("--to", agent.address)
    found = states(programs.client("doctor", *to, "--format", "json", code=1).json)
    assert len(found) == 23
    assert (found["governor"], found["turbo"]) == ("FINDING_STATE_DOUBTFUL", "FINDING_STATE_DOUBTFUL")
    assert found["heat"] == found["supply"] == found["runtimes"] == "FINDING_STATE_OK"
    assert board.is_as_it_was, "looking changes nothing"

    answer = programs.client("doctor", *to, "--fix", "--for", "1h")
    assert "fit to measure on" in answer.out and "cpu0-3 governor: ondemand → performance" in answer.out
    assert board.is_set
    found = states(programs.client("doctor", *to, "--format", "json").json)
    assert (found["governor"], found["turbo"]) == ("FINDING_STATE_OK", "FINDING_STATE_OK")

    programs.client("doctor", *to, "--restore", code=1)
    assert board.is_as_it_was


def test_a_killed_agent_puts_the_board_back_when_it_starts_again(programs: Any, board: Board) -> None:
    agent = programs.agent(environment=board.environment)
    programs.client("doctor", "--to", agent.address, "--fix")
    assert board.is_set
    agent.program.end(signal.SIGKILL)
    assert board.is_set, "nobody was left to do it"

    again = programs.agent("again", data_dir=agent.data_dir, environment=board.environment)
    assert board.is_as_it_was, "before it listens"
    assert "put back, after the last agent was killed: cpu0-3 governor: performance → ondemand" in (
        again.program.log()
    )
    assert not programs.client("doctor", "--to", again.address, "--format", "json", code=1).json.get(
        "changed"
    )


def test_after_a_reboot_nothing_is_put_back(programs: Any, board: Board) -> None:
    agent = programs.agent(environment=board.environment)
    programs.client("doctor", "--to", agent.address, "--fix")
    agent.program.end(signal.SIGKILL)
    (board.root / "proc/sys/kernel/random/boot_id").write_text("00000000-0000-4000-8000-000000000000\n")
    programs.agent("again", data_dir=agent.data_dir, environment=board.environment)
    assert board.is_set, "it is another boot's, and whoever set it meant it"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_agent_that_is_stopped_puts_the_board_back(programs: Any, board: Board, number: int) -> None:
    agent = programs.agent(environment=board.environment)
    programs.client("doctor", "--to", agent.address, "--fix")
    assert agent.program.end(number) == 0
    assert board.is_as_it_was


def test_the_time_of_a_fix_runs_out(programs: Any, board: Board, eventually: Any) -> None:
    agent = programs.agent(environment=board.environment)
    programs.client("doctor", "--to", agent.address, "--fix", "--for", "1s", code=None)
    eventually("the board is put back", lambda: board.is_as_it_was)


def test_a_client_that_goes_away_in_the_middle(programs: Any, board: Board, eventually: Any) -> None:
    agent = programs.agent(environment=board.environment)
    client = programs.client.begin("doctor", "--to", agent.address, "--fix", "--for", "1h")
    eventually("it is being set", lambda: board.is_set)
    client.end(signal.SIGKILL)
    assert "Set until" in programs.client("doctor", "--to", agent.address).out
    programs.client("doctor", "--to", agent.address, "--restore", code=1)
    assert board.is_as_it_was


def test_nothing_is_set_while_a_run_is_measured(
    programs: Any, board: Board, demo_onnx: Path, eventually: Any
) -> None:
    agent = programs.agent(environment=board.environment)
    client = programs.client.begin("push", demo_onnx, "--to", agent.address, *LONG)
    eventually(
        "a run is being measured",
        lambda: [run for run in agent.runs() if run.get("stage") == "STAGE_MEASURE"],
    )
    refused = programs.client("doctor", "--to", agent.address, "--fix", code=1)
    assert "is being measured" in refused.err
    looked = programs.client("doctor", "--to", agent.address, "--format", "json", code=None).json
    (load,) = (each for each in looked["findings"] if each["code"] == "load")
    assert "the load is its own" in load["message"]
    assert board.is_as_it_was
    (run,) = agent.runs()
    programs.client("cancel", run["run_id"], "--to", agent.address)
    client.process.wait(30)


def test_a_run_that_tunes_leaves_what_doctor_has_set(programs: Any, board: Board, demo_onnx: Path) -> None:
    agent = programs.agent(environment=board.environment)
    quick = ("--duration", "0.2", "--min-runs", "3", "--warm-up", "0")
    to = ("--to", agent.address, "--format", "json")
    programs.client("doctor", "--to", agent.address, "--fix")
    result = programs.client("push", demo_onnx, *to, *quick, "--tune").json
    assert "cpu0-3 governor: ondemand → performance" in result["environment"]["tuned"]
    assert board.is_set, "the hour is not over"
    programs.client("doctor", "--to", agent.address, "--restore", code=1)
    assert board.is_as_it_was
    result = programs.client("push", demo_onnx, *to, *quick, "--tune").json
    assert "turbo: on → off" in result["environment"]["tuned"]
    assert board.is_as_it_was


def test_a_board_that_a_killed_run_had_tuned(
    programs: Any, board: Board, demo_onnx: Path, eventually: Any
) -> None:
    agent = programs.agent(environment=board.environment)
    client = programs.client.begin("push", demo_onnx, "--to", agent.address, *LONG, "--tune")
    eventually("the board is set", lambda: board.is_set)
    agent.program.end(signal.SIGKILL)
    assert board.is_set
    client.kill()
    programs.agent("again", data_dir=agent.data_dir, environment=board.environment)
    assert board.is_as_it_was


def test_without_a_server(programs: Any, board: Board, eventually: Any, tmp_path: Path) -> None:
    """boardbench-agent doctor: held as long as it runs; what a killed one left is put back by --restore."""
    data = ("--data-dir", str(tmp_path / "data"))
    command = [
        programs.client.command()[0],
        programs.client.command()[1].replace("boardbench", "boardbench-agent"),
    ]

    def start(name: str, *arguments: str) -> Any:
        return programs.start(name, [*command, "doctor", *data, *arguments], board.environment)

    looked = start("looked")
    assert looked.process.wait(60) == 1
    assert "not fit to measure on" in looked.log() and "! governor" in looked.log()

    held = start("held", "--fix", "--for", "1h")
    eventually("it is held", lambda: "held until" in held.log())
    assert board.is_set and "set:\n  turbo: on → off\n" in held.log()
    assert held.end(signal.SIGTERM) == 0
    assert board.is_as_it_was

    killed = start("killed", "--fix")
    eventually("it is held", lambda: "held until" in killed.log())
    restored = start("not-restored", "--restore")
    assert restored.process.wait(60) == 1
    assert "another agent is using it" in restored.log() and board.is_set
    killed.end(signal.SIGKILL)
    assert board.is_set
    restored = start("restored", "--restore")
    assert restored.process.wait(60) == 1, "as it was, it is not fit"
    assert "put back: cpu0-3 governor: performance → ondemand" in restored.log()
    assert board.is_as_it_was
