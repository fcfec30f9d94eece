"""Releases are switched as root: every step is cut off once, and there is always a release that works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.update import layout as places
from boardbench.agent.update.layout import Entry, Layout
from boardbench.agent.update.switch import Switch

# What the agent of a release does when it is started: one that works says so, with the journal's token.
AGENT = """
import json, pathlib, sys
root = pathlib.Path(sys.argv[1])
told = json.loads((root / "opt/boardbench/current/release.json").read_text())
with (root / "started").open("a") as file:
    file.write(told["release"] + "\\n")
if told.get("dies"):
    sys.exit("it died")
journal = root / "opt/boardbench/update/journal.json"
if journal.exists() and not told.get("sick"):
    entry = json.loads(journal.read_text())
    word = {"token": entry["token"], "release": told["release"], "healthy": True}
    (root / "data/update/healthy.json").write_text(json.dumps(word))
"""

# One process that dies as by a power cut, at the n-th thing that it does to the disk or to the agent: for
# each line with n, a root folder and seconds it forks one, and answers with how that ended.
CUT = """
import os, pathlib, signal, sys
from boardbench.agent.update.layout import Layout
from boardbench.agent.update.switch import Switch
start = sys.argv[1]
def cutting(real):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return call
def restart():
    try:
        exec(start, {"sys": sys})
    except SystemExit as error:
        return str(error)
    return ""
for line in sys.stdin:
    number, root, seconds = line.split()
    if (child := os.fork()) == 0:
        left = int(number)
        # All disks of the machine that tests run on need not be waited for.
        os.sync = lambda: None
        for name in ("fsync", "sync", "replace", "rename", "symlink", "unlink", "mkdir", "rmdir"):
            setattr(os, name, cutting(getattr(os, name)))
        sys.argv = ["", root]
        Switch(Layout(pathlib.Path(root), pathlib.Path(root, "data")), cutting(restart),
               health_seconds=float(seconds)).run()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Board:
    """A board's disk, with a release on it that works."""

    root: Path
    signer: Any
    packages: Any

    @property
    def layout(self) -> Layout:
        return Layout(self.root, self.root / "data")

    @property
    def current(self) -> str:
        return json.loads((self.layout.current / "release.json").read_text())["release"]

    @property
    def entry(self) -> Entry:
        entry = places.read_entry(self.layout)
        assert entry is not None
        return entry

    @property
    def releases(self) -> list[str]:
        return sorted(path.name for path in self.layout.releases.iterdir())

    def ask(self, package: Path, update_id: str = "u1") -> None:
        import hashlib

        sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
        (self.layout.inbox / f"{sha256}.deb").write_bytes(package.read_bytes())
        (self.layout.inbox / "request.json").write_text(
            json.dumps({"update_id": update_id, "sha256": sha256})
        )

    def package(self, version: str, *, signed: bool = True, downgrade: bool = False, **told: Any) -> Path:
        files = card(version, **told)
        made = self.packages.build(self.root / "made", version, files, **told.get("build", {}))
        return self.signer.sign(made, downgrade=downgrade) if signed else made

    def start_agent(self) -> str:
        arguments, sys.argv = sys.argv, ["", str(self.root)]
        try:
            exec(AGENT, {})
        except SystemExit as error:
            return str(error)
        finally:
            sys.argv = arguments
        return ""

    def update(self, health_seconds: float = 5.0) -> Entry:
        Switch(self.layout, self.start_agent, health_seconds=health_seconds).run()
        return self.entry

    def started(self) -> list[str]:
        return (self.root / "started").read_text().split()


def card(version: str, **told: Any) -> dict[str, Any]:
    said = {"version": version, "release": f"{version}+cp311", "architecture": "arm64", "python": "3.11"}
    return {
        "release.json": json.dumps(said | {key: value for key, value in told.items() if key != "build"}),
        "bin/boardbench-agent": "#!/bin/sh\n",
        "bin/python": Path("/usr/bin/python3.11"),
        "lib/last": "whole",
    }


@pytest.fixture
def board(tmp_path: Path, release_packages: Any, monkeypatch: pytest.MonkeyPatch) -> Board:
    # All disks of the machine that tests run on need not be waited for.
    monkeypatch.setattr(os, "sync", lambda: None)
    root = tmp_path / "board"
    old = root / "opt/boardbench/releases/0.1.0+cp311"
    for path, content in card("0.1.0").items():
        (old / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (old / path).write_text(content)
    (root / "opt/boardbench/current").symlink_to("releases/0.1.0+cp311")
    (root / "data/update").mkdir(parents=True)
    (root / "etc/boardbench").mkdir(parents=True)
    made = Board(root, release_packages.Signer(), release_packages)
    made.layout.keys.write_text(made.signer.public_line)
    return made


def test_a_release_that_works_is_kept(board: Board) -> None:
    board.ask(board.package("0.2.0"))
    entry = board.update()
    assert (entry.state, entry.from_release, entry.to_release) == ("done", "0.1.0+cp311", "0.2.0+cp311")
    assert board.current == "0.2.0+cp311"
    assert board.started() == ["0.2.0+cp311"]
    new = board.layout.releases / "0.2.0+cp311"
    assert os.access(new / "bin/boardbench-agent", os.X_OK)
    assert not os.access(new / "release.json", os.X_OK)
    assert str((new / "bin/python").readlink()) == "/usr/bin/python3.11"
    # The same request does nothing more.
    assert board.update() == entry
    assert board.started() == ["0.2.0+cp311"]


@pytest.mark.parametrize(
    ("told", "why"), [({"dies": True}, "it did not start: it died"), ({"sick": True}, "not healthy within")]
)
def test_one_that_does_not_is_left_again(board: Board, told: dict[str, Any], why: str) -> None:
    board.ask(board.package("0.2.0", **told))
    entry = board.update(health_seconds=0.5)
    assert entry.state == "rolled_back"
    assert why in entry.reason
    assert board.current == "0.1.0+cp311"
    assert board.started() == ["0.2.0+cp311", "0.1.0+cp311"]
    # A better one is taken afterwards, and the bad one does not fill the disk.
    board.ask(board.package("0.2.1"), "u2")
    assert board.update().state == "done"
    assert board.releases == ["0.1.0+cp311", "0.2.1+cp311"]


def test_of_releases_only_the_last_two_stay_and_the_packages_own(board: Board) -> None:
    for number in (2, 3, 4):
        board.ask(board.package(f"0.{number}.0"), f"u{number}")
        assert board.update().state == "done"
    board.update()
    assert board.releases == ["0.1.0+cp311", "0.3.0+cp311", "0.4.0+cp311"]


def test_what_is_not_trusted_or_does_not_fit_changes_nothing(board: Board, release_packages: Any) -> None:
    stranger = release_packages.Signer()
    other = board.package("0.2.0", signed=False)
    changed = bytearray(board.package("0.2.0").read_bytes())
    changed[200] ^= 1
    damaged = board.root / "made" / "damaged.deb"
    damaged.write_bytes(changed)
    outside = release_packages.build(board.root / "out", "0.2.0", {"../../../x": "out"})
    elsewhere = board.root / "elsewhere"
    elsewhere.mkdir()
    linked = release_packages.build(
        board.root / "linked", "0.2.0", {"lib": elsewhere, "lib/x": "out", "lib/deep/y": "out"}
    )
    cases = [
        (other, "not signed"),
        (stranger.sign(other), "signed by nobody whose key is here"),
        (damaged, "changed or damaged"),
        (board.signer.sign(outside), "leads elsewhere"),
        (board.signer.sign(linked), "behind a link"),
        (board.package("0.0.9"), "older than 0.1.0"),
        (board.package("0.2.0", build={"architecture": "armhf"}), "is for armhf, and this board is arm64"),
        (board.package("0.2.0", build={"tag": "cp313"}), "Python 3.13, and this board has 3.11"),
        (board.package("0.1.0"), "runs already"),
    ]
    for number, (package, why) in enumerate(cases):
        board.ask(package, f"u{number}")
        entry = board.update()
        assert entry.state == "failed"
        assert why in entry.reason
        assert board.current == "0.1.0+cp311"
        assert board.update() == entry
    assert list(elsewhere.iterdir()) == []
    board.layout.keys.unlink()
    board.ask(board.package("0.2.0"), "keyless")
    assert "trusts no signature" in board.update().reason
    assert not (board.root / "started").exists()
    assert board.releases == ["0.1.0+cp311"]
    assert not (board.root / "opt/boardbench/x").exists()


def test_a_release_is_on_the_disk_before_it_has_its_name(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "sync", lambda: seen.append(board.releases))
    board.ask(board.package("0.2.0"))
    assert board.update().state == "done"
    assert seen == [[".coming-0.2.0+cp311", "0.1.0+cp311"]]


def test_files_of_a_release_have_no_more_rights_than_they_need(board: Board, release_packages: Any) -> None:
    modes = {"lib/last": 0o6777, "release.json": 0o666}
    board.ask(
        board.signer.sign(release_packages.build(board.root / "odd", "0.2.0", card("0.2.0"), modes=modes))
    )
    assert board.update().state == "done"
    found = {path: (board.layout.current / path).stat().st_mode & 0o7777 for path in modes}
    assert found == {"lib/last": 0o755, "release.json": 0o644}


def test_an_older_release_is_taken_when_its_signature_says_so(board: Board) -> None:
    board.ask(board.package("0.0.9", downgrade=True))
    assert board.update().state == "done"
    assert board.current == "0.0.9+cp311"


def test_what_the_agent_leaves_is_not_followed(board: Board) -> None:
    secret = board.root / "secret"
    secret.write_text("secret")
    board.ask(board.package("0.2.0"))
    (package,) = board.layout.inbox.glob("*.deb")
    package.unlink()
    package.symlink_to(secret)
    entry = board.update()
    assert entry.state == "failed"
    assert "the package is not there" in entry.reason
    package.unlink()
    os.mkfifo(package)
    (board.layout.inbox / "request.json").write_text(json.dumps({"update_id": "u2", "sha256": package.stem}))
    assert "is no file" in board.update().reason
    requests = [
        json.dumps(request)
        for request in ({"update_id": "u3", "sha256": "../../../secret"}, {"update_id": 3}, [], "x")
    ]
    for request in (*requests, "[" * 20_000):
        (board.layout.inbox / "request.json").write_text(request)
        assert board.update().update_id == "u2"


def test_a_fault_before_anything_was_changed_is_not_met_again(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal would be taken up at every boot, and no other update would have its turn."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("odd")

    board.ask(board.package("0.2.0"))
    with monkeypatch.context() as patch:
        patch.setattr("boardbench.inspect.release.verify", broken)
        entry = board.update()
    assert (entry.state, entry.reason) == ("failed", "it could not be unpacked (ZeroDivisionError: odd)")
    board.ask(board.package("0.2.0"), "u2")
    assert board.update().state == "done"


@pytest.mark.parametrize("told", [{}, {"sick": True}, {"dies": True}], ids=["works", "sick", "dies"])
def test_a_power_cut_at_any_step_leaves_a_board_that_works(board: Board, told: dict[str, Any]) -> None:
    wanted = "rolled_back" if told else "done"
    final = "0.1.0+cp311" if told else "0.2.0+cp311"
    health = 0.05 if told else 20.0
    board.ask(board.package("0.2.0", **told))
    pristine = board.root.with_name("pristine")
    shutil.copytree(board.root, pristine, symlinks=True)
    cuts = 0
    with subprocess.Popen(
        [sys.executable, "-c", CUT, AGENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as driver:
        assert driver.stdin is not None and driver.stdout is not None
        for number in range(1, 1000):
            shutil.rmtree(board.root)
            shutil.copytree(pristine, board.root, symlinks=True)
            driver.stdin.write(f"{number} {board.root} {health}\n")
            code = int(driver.stdout.readline())
            if code == 0:
                break
            assert code == -9
            cuts += 1
            # Whatever was being done, there is a whole release to boot from.
            assert (board.layout.current / "lib/last").read_text() == "whole", f"cut {number}"
            # The board boots: its agent starts, and what was begun is ended.
            board.start_agent()
            assert board.update(health_seconds=health).state == wanted, f"cut {number}"
            assert board.current == final, f"cut {number}"
            board.update()
            assert board.releases == sorted({"0.1.0+cp311", final}), f"cut {number}"
        driver.stdin.close()
    assert cuts > 25


def test_a_release_that_takes_the_power_away_is_left_after_two_tries(board: Board) -> None:
    board.ask(board.package("0.2.0"))

    class PowerCut(BaseException):
        pass

    def restart() -> str:
        if board.current == "0.2.0+cp311":
            raise PowerCut
        return board.start_agent()

    for _ in range(2):
        with pytest.raises(PowerCut):
            Switch(board.layout, restart, health_seconds=5).run()
        assert board.entry.state == "switched"
    Switch(board.layout, restart, health_seconds=5).run()
    assert board.entry.state == "rolled_back"
    assert "went down 2 times" in board.entry.reason
    assert board.current == "0.1.0+cp311"


def test_an_old_word_of_health_does_not_count(board: Board) -> None:
    stale = {"token": "", "release": "0.2.0+cp311", "healthy": True}
    (board.layout.inbox / "healthy.json").write_text(json.dumps(stale))
    board.ask(board.package("0.2.0", sick=True))
    assert board.update(health_seconds=0.5).state == "rolled_back"
