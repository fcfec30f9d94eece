"""Root's half of an update, as the package installs it: alone, under the system's Python, hardened."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SYSTEMD = REPOSITORY / "deploy/systemd"


def test_it_needs_nothing_but_python_and_what_the_package_installs(
    tmp_path: Path, release_packages: Any, build_deb: ModuleType
) -> None:
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    tree = tmp_path / "tree"
    build_deb._add_updater(tree, next(t for t in build_deb.TARGETS.values() if t.tag == "cp311"))
    root = tmp_path / "root"
    card = {"version": "0.1.0", "release": f"0.1.0+{tag}", "architecture": "arm64"}
    card["python"] = f"{sys.version_info[0]}.{sys.version_info[1]}"
    old = root / f"opt/boardbench/releases/0.1.0+{tag}"
    for folder in (old, root / "etc/boardbench", root / "var/lib/boardbench/update"):
        folder.mkdir(parents=True)
    (old / "release.json").write_text(json.dumps(card))
    (root / "opt/boardbench/current").symlink_to(f"releases/0.1.0+{tag}")
    signer = release_packages.Signer()
    (root / "etc/boardbench/update.pub").write_text(signer.public_line)
    new = card | {"version": "0.2.0", "release": f"0.2.0+{tag}"}
    package = signer.sign(
        release_packages.build(tmp_path, "0.2.0", {"release.json": json.dumps(new)}, tag=tag)
    )
    sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
    inbox = root / "var/lib/boardbench/update"
    shutil.copyfile(package, inbox / f"{sha256}.deb")
    (inbox / "request.json").write_text(json.dumps({"update_id": "u", "sha256": sha256}))
    program = tree / "usr/lib/boardbench/bin/boardbench-update"
    done = subprocess.run(
        # -S: without anybody's site-packages.
        [sys.executable, "-ISB", program, "--root", root, "--restart", "false", "--health-seconds", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    entry = json.loads((root / "opt/boardbench/update/journal.json").read_text())
    # It was unpacked and switched to, and left again because there is no agent that could start.
    assert entry["state"] == "rolled_back", done.stderr
    assert "false failed" in entry["reason"]
    assert (root / "opt/boardbench/current").readlink() == Path(f"releases/0.1.0+{tag}")
    assert not list((tree / "usr/lib/boardbench").rglob("__pycache__"))


def test_the_units_are_hardened_and_sound(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not here")
    unit = SYSTEMD / "boardbench-update.service"
    judged = subprocess.run(
        [analyze, "--no-pager", "security", "--offline=true", "--threshold=20", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    score = re.search(r"Overall exposure level for boardbench-update\.service: ([\d.]+)", judged.stdout)
    assert score is not None, judged.stdout + judged.stderr
    assert float(score[1]) <= 2.0
    root = tmp_path / "root"
    place = root / "usr/lib/systemd/system"
    place.mkdir(parents=True)
    for path in SYSTEMD.glob("boardbench-*"):
        shutil.copyfile(path, place / path.name)
    system = Path("/usr/lib/systemd/system")
    for name in (
        "network-online.target", "sysinit.target", "basic.target", "shutdown.target", "multi-user.target",
        "paths.target", "-.mount",
    ):  # fmt: skip
        if (system / name).exists():
            shutil.copyfile(system / name, place / name)
    for start in ("opt/boardbench/current/bin/boardbench-agent", "usr/lib/boardbench/bin/python"):
        (root / start).parent.mkdir(parents=True)
        (root / start).write_text("#!/bin/sh\n")
        (root / start).chmod(0o755)
    names = ["boardbench-update.service", "boardbench-update.path"]
    done = subprocess.run(
        [analyze, f"--root={root}", "--man=no", "--recursive-errors=no", "verify", *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "boardbench-update" not in done.stderr, done.stderr


def test_the_path_is_the_one_that_the_agent_writes() -> None:
    from boardbench.agent.update.layout import Layout

    told = (SYSTEMD / "boardbench-update.path").read_text()
    inbox = Layout(Path("/"), Path("/var/lib/boardbench")).inbox
    assert f"PathChanged={inbox / 'request.json'}\n" in told
