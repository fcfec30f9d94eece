"""A new release reaches boards: a real collector, real agents, root's program; releases are environments.

What systemd does on a board is done here by a thread (it looks for the request) and by a program that ends
the old agent and starts the one that `current` leads to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.update import layout as places
from boardbench.agent.update.layout import Layout

Eventually = Callable[..., Any]
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)

SHORT = ("--duration", "0.2", "--profile-runs", "0", "--idle", "0")

# As `systemctl restart` does: fails when the service does not come up.
RESTART = """
import fcntl, json, os, pathlib, signal, subprocess, sys, time
told = json.loads(pathlib.Path(sys.argv[1]).read_text())
pid = pathlib.Path(told["pid"])
# One after the other: that of a switch that was killed goes on beside that of the next.
fcntl.flock(os.open(told["pid"] + ".lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)
def alive(number):
    try:
        os.kill(number, 0)
        return pathlib.Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, FileNotFoundError):
        return False
if pid.exists():
    old = int(pid.read_text())
    if alive(old):
        os.kill(old, signal.SIGTERM)
    while alive(old):
        time.sleep(0.02)
ready = pathlib.Path(told["ready"])
ready.unlink(missing_ok=True)
with open(told["log"], "ab") as log:
    new = subprocess.Popen(told["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                           env=told["environment"], start_new_session=True)
pid.write_text(str(new.pid))
while not ready.exists():
    if new.poll() is not None:
        sys.exit(f"the agent ended with {new.returncode}")
    time.sleep(0.02)
os._exit(0)
"""


def release_files(version: str, *, broken: bool = False, lonely: bool = False) -> dict[str, Any]:
    """An environment over the one that the tests run in, which says that it is another version."""
    site = f"lib/python{PYTHON}/site-packages"
    card = {"version": version, "release": f"{version}+{TAG}", "architecture": MACHINE, "python": PYTHON}
    program = '#!/bin/sh\nexec "$(dirname "$0")/python" -m boardbench.agent "$@"\n'
    if broken:
        program = "#!/bin/sh\necho this release is broken >&2\nexit 1\n"
    if lonely:
        # It starts, and never reaches its collector.
        program = program.replace('"$@"', '"$@" --collector 127.0.0.1:9')
    return {
        "release.json": json.dumps(card),
        "pyvenv.cfg": f"home = {Path(sys._base_executable).parent}\n",  # type: ignore[attr-defined]
        "bin/python": Path(sys._base_executable),  # type: ignore[attr-defined]
        "bin/boardbench-agent": program,
        f"{site}/base.pth": f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n",
        f"{site}/boardbench-{version}.dist-info/METADATA": f"Name: boardbench\nVersion: {version}\n",
    }


@dataclass
class Board:
    """A board's root folder, its agent, and what systemd would be."""

    name: str
    root: Path
    orders: Path
    environment: dict[str, str]
    survivors: Any
    stop: threading.Event = field(default_factory=threading.Event)
    switches: list[subprocess.Popen[bytes]] = field(default_factory=list)
    watcher: threading.Thread | None = None
    paused: bool = False
    # As on a board, where a loaded machine may make it minutes.
    health_seconds: float = 120.0

    @property
    def layout(self) -> Layout:
        return Layout(self.root, self.root / "var/lib/boardbench")

    @property
    def log(self) -> str:
        return (self.root / "log").read_text(errors="replace")

    @property
    def current(self) -> str:
        return self.layout.current.readlink().name

    def restart(self) -> None:
        command = [sys.executable, "-c", RESTART, str(self.orders)]
        subprocess.run(command, check=True, timeout=60, env=self.environment)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{json.loads((self.root / 'ports').read_text())['grpc']}"

    def runs(self) -> list[str]:
        """States of its runs."""
        from boardbench.cli.address import parse_address
        from boardbench.cli.client import AgentClient
        from boardbench.v1 import agent_pb2

        with AgentClient(parse_address(self.address, 0)) as client:
            return [agent_pb2.RunState.Name(run.state) for run in client.list_runs()]

    def begin_switch(self) -> subprocess.Popen[bytes]:
        command = f"{sys.executable} {self.root / 'restart.py'} {self.orders}"
        with (self.root / "log").open("ab") as log:
            started = subprocess.Popen(
                [
                    *(sys.executable, "-m", "boardbench.agent.update.switch", "--root", self.root),
                    *(
                        "--data-dir",
                        self.layout.data_dir,
                        "--restart",
                        command,
                        "--health-seconds",
                        str(self.health_seconds),
                    ),
                ],
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        self.switches.append(started)
        return started

    def power_up(self) -> None:
        """The agent is up, and requests are looked for."""
        self.restart()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()

    def watch(self) -> None:
        """What the path unit does."""
        seen = None
        while not self.stop.wait(0.05):
            if self.paused:
                continue
            told = places.read_object(self.layout.inbox / "request.json")
            if told and told != seen:
                seen = told
                self.begin_switch().wait()

    def _running(self) -> list[Any]:
        return list(self.survivors.started_with("BOARDBENCH_AGENT_UPDATE_ROOT", str(self.root)))

    def end(self) -> None:
        """Ends all that was started for it, and that these have started, whoever of them is still there."""
        self.stop.set()
        while True:
            # It has gone down to every one of them; a switch that is ended lets go of whoever waits for it.
            self.survivors.end(self._running)
            if self.watcher is None or not self.watcher.is_alive():
                break
            self.watcher.join(0.1)
        for each in self.switches:
            each.wait()


@dataclass
class Fleet:
    """A collector with boards, and a key that these trust."""

    programs: Any
    collector: Any
    eventually: Eventually
    packages: Any
    survivors: Any
    signer: Any
    boards: list[Board] = field(default_factory=list)

    def board(self, name: str, collector: str = "") -> Board:
        root = self.programs.folder / name
        files = release_files("0.1.0")
        for path, content in files.items():
            place = root / f"opt/boardbench/releases/0.1.0+{TAG}" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(content) if isinstance(content, Path) else place.write_text(content)
            if path == "bin/boardbench-agent":
                place.chmod(0o755)
        (root / "opt/boardbench/current").symlink_to(f"releases/0.1.0+{TAG}")
        (root / "etc/boardbench").mkdir(parents=True)
        (root / "etc/boardbench/update.pub").write_text(self.signer.public_line)
        (root / "restart.py").write_text(RESTART)
        environment = self.programs.environment | {
            "BOARDBENCH_AGENT_UPDATE_ROOT": str(root),
            "BOARDBENCH_AGENT_COLLECTOR": collector or self.collector.address,
            "BOARDBENCH_AGENT_STORE_FREE_FLOOR_BYTES": str(1 << 20),
            "BOARDBENCH_AGENT_LABELS": "lab=zurich",
        }
        orders = {
            "pid": str(root / "pid"),
            "ready": str(root / "ports"),
            "log": str(root / "log"),
            "environment": environment,
            "command": [
                *(str(root / "opt/boardbench/current/bin/boardbench-agent"), "serve"),
                *("--listen", "127.0.0.1:0", "--data-dir", str(root / "var/lib/boardbench")),
                *("--device-id", name, "--port-file", str(root / "ports")),
            ],
        }
        (root / "orders.json").write_text(json.dumps(orders))
        made = Board(name, root, root / "orders.json", environment, self.survivors)
        self.boards.append(made)
        made.power_up()
        self.eventually(f"{name} is up", lambda: self.version(name) == "0.1.0", 60.0)
        return made

    def end(self) -> None:
        for board in self.boards:
            board.end()

    def package(self, version: str, **how: bool) -> Path:
        built = self.packages.build(
            self.programs.folder / "made",
            version,
            release_files(version, **how),
            architecture=MACHINE,
            tag=TAG,
        )
        return Path(self.signer.sign(built))

    def version(self, name: str) -> str:
        """Of the board's agent, while it is up."""
        from boardbench.cli.address import parse_address
        from boardbench.cli.client import CollectorClient

        with CollectorClient(parse_address(self.collector.address, 0)) as client:
            found = client.devices((f"device_id={name}", "up=true"))
        return found[0].agent_version if found else ""

    def update(self, package: Path, *arguments: object, code: int = 0) -> dict[str, dict[str, Any]]:
        answer = self.programs.client(
            "devices", "update", package, "--on", "lab=zurich", "--via", self.collector.address,
            "--format", "json", *arguments, code=code,
        )  # fmt: skip
        return {board["device_id"]: board for board in answer.json["boards"]}


@pytest.fixture
def fleet_of(
    programs: Any, eventually: Eventually, release_packages: Any, survivors: Any
) -> Iterator[Callable[[Any], Fleet]]:
    """Makes the fleet of a collector; ends its boards."""
    made: list[Fleet] = []

    def make(collector: Any) -> Fleet:
        signer = release_packages.Signer()
        made.append(Fleet(programs, collector, eventually, release_packages, survivors, signer))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture
def fleet(programs: Any, fleet_of: Callable[[Any], Fleet]) -> Fleet:
    return fleet_of(programs.collector(options=("--heartbeat", "0.5")))


def test_a_release_goes_to_one_board_first_and_then_to_the_others(fleet: Fleet) -> None:
    a, b = fleet.board("a"), fleet.board("b")
    boards = fleet.update(fleet.package("0.2.0"), "--canary", "1")
    assert {board["state"] for board in boards.values()} == {"UPDATE_STATE_DONE"}
    assert {board["from_version"] for board in boards.values()} == {"0.1.0"}
    assert boards["a"]["canary"] and "canary" not in boards["b"]
    assert boards["a"]["changed_at"] < boards["b"]["changed_at"]
    for board in (a, b):
        assert board.current == f"0.2.0+{TAG}"
        fleet.eventually("the new agent reports", lambda name=board.name: fleet.version(name) == "0.2.0")
        assert not list(board.layout.inbox.glob("*.deb"))
    # Again: they have it, and nothing is started.
    boards = fleet.update(fleet.package("0.2.0"), "--canary", "0")
    assert all("runs already" in board["reason"] for board in boards.values())
    listed = fleet.programs.client("devices", "updates", "--via", fleet.collector.address, "--format", "json")
    assert [entry["version"] for entry in listed.json] == ["0.2.0", "0.2.0"]


def test_a_release_goes_to_the_boards_of_another_collector(
    postgres_server: Any, programs: Any, fleet_of: Callable[[Any], Fleet]
) -> None:
    options = ("--heartbeat", "0.5", "--store", postgres_server.new_database())
    one, other = (programs.collector(name, options=options) for name in ("one", "other"))
    fleet = fleet_of(one)
    boards = (fleet.board("a"), fleet.board("b", collector=other.address))
    told = fleet.update(fleet.package("0.2.0"), "--canary", "1")
    assert {board["state"] for board in told.values()} == {"UPDATE_STATE_DONE"}
    assert [name for name, board in told.items() if board.get("canary")] == ["a"]
    assert told["a"]["changed_at"] < told["b"]["changed_at"]
    for board in boards:
        assert board.current == f"0.2.0+{TAG}"
    listed = programs.client("devices", "updates", "--via", other.address, "--format", "json").json
    assert [update["version"] for update in listed] == ["0.2.0"]


@pytest.mark.parametrize("how", ["broken", "lonely"])
def test_a_release_that_does_not_work_is_left_again_and_reaches_nobody_else(fleet: Fleet, how: str) -> None:
    a, b = fleet.board("a"), fleet.board("b")
    # For one that does not start it does not matter; the other one has time to say what it lacks.
    a.health_seconds = 8.0
    boards = fleet.update(fleet.package("0.2.0", **{how: True}), "--canary", "1", code=1)
    assert boards["a"]["state"] == "UPDATE_STATE_ROLLED_BACK"
    assert ("ended with 1" if how == "broken" else "is not reached") in boards["a"]["reason"]
    assert boards["b"]["state"] == "UPDATE_STATE_STOPPED"
    for board in (a, b):
        assert board.current == f"0.1.0+{TAG}"
        fleet.eventually("the old agent reports", lambda name=board.name: fleet.version(name) == "0.1.0")
    assert not list(b.layout.inbox.glob("*")) if b.layout.inbox.exists() else True


def test_what_is_not_signed_or_by_somebody_else_is_refused(fleet: Fleet, release_packages: Any) -> None:
    board = fleet.board("a")
    unsigned = release_packages.build(
        fleet.programs.folder / "made", "0.3.0", release_files("0.3.0"), architecture=MACHINE, tag=TAG
    )
    on = ("--on", "lab=zurich", "--via", fleet.collector.address)
    told = fleet.programs.client("devices", "update", unsigned, *on, code=2)
    assert "not signed" in told.err
    boards = fleet.update(release_packages.Signer().sign(unsigned), code=1)
    assert boards["a"]["state"] == "UPDATE_STATE_FAILED"
    assert "signed by nobody whose key is here" in boards["a"]["reason"]
    assert board.current == f"0.1.0+{TAG}"
    assert not board.switches


def test_a_run_that_is_measured_is_not_disturbed(fleet: Fleet, demo_tflite: Path) -> None:
    fleet.board("a")
    run = fleet.programs.client.begin(
        "push", demo_tflite, "--via", fleet.collector.address, "--on", "lab=zurich", "--duration", "4",
        "--profile-runs", "0", "--idle", "0", "--format", "json",
    )  # fmt: skip
    fleet.eventually(
        "the run is measured",
        lambda: "JOB_STATE_RUNNING" in json.dumps(fleet.collector.get_json("/api/v1/jobs")),
        60.0,
    )
    boards = fleet.update(fleet.package("0.2.0"))
    assert boards["a"]["state"] == "UPDATE_STATE_DONE"
    assert run.process.wait(60) == 0
    (result,) = fleet.collector.results()
    assert result["status"] == "RUN_STATUS_SUCCEEDED"
    on = ("--via", fleet.collector.address, "--format", "json")
    (begun,) = fleet.programs.client("devices", "updates", *on).json
    # It was being measured when the update began, and had ended before the switch.
    assert result["started_at"] < begun["created_at"] < result["finished_at"] < boards["a"]["changed_at"]


def test_collector_and_switch_are_killed_in_the_middle_and_go_on(fleet: Fleet, demo_tflite: Path) -> None:
    board = fleet.board("a")
    board.paused = True
    client = fleet.programs.client.begin(
        "devices", "update", fleet.package("0.2.0"), "--on", "lab=zurich", "--via", fleet.collector.address
    )
    fleet.eventually("it is asked for", lambda: (board.layout.inbox / "request.json").exists(), 60.0)
    # What is asked for meanwhile is queued, and not begun.
    fleet.programs.client("push", demo_tflite, "--to", board.address, "--detach", *SHORT)
    assert board.runs() == ["RUN_STATE_QUEUED"]
    fleet.collector.program.kill()
    switch = board.begin_switch()
    fleet.eventually(
        "it has switched",
        lambda: (entry := places.read_entry(board.layout)) is not None and entry.state == places.SWITCHED,
        60.0,
    )
    switch.kill()
    switch.wait()
    # As at boot.
    board.begin_switch()
    fleet.collector = fleet.programs.collector(listen=fleet.collector.address, options=("--heartbeat", "0.5"))
    assert client.process.wait(90) == 0, client.log()
    assert board.current == f"0.2.0+{TAG}"
    fleet.eventually("the new agent reports", lambda: fleet.version("a") == "0.2.0")
    fleet.eventually("the switch has ended", lambda: board.switches[-1].poll() is not None)
    entry = places.read_entry(board.layout)
    assert entry is not None and entry.state == places.DONE
    # The new release has begun it when it was kept.
    (result,) = fleet.eventually("its result is stored", fleet.collector.results)
    assert result["status"] == "RUN_STATUS_SUCCEEDED"
