"""Programs are bounded in time and output, and what they cost is known."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from boardbench.agent.board.command import Command


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.touch(mode=0o755)
    return path


def test_it_says_what_it_is_asked(program: Path) -> None:
    program.write_text('#!/bin/sh\necho "$1-$2-$LC_ALL"\n')
    assert Command(program).run("a", "b c") == "a-b c-C\n"


def test_what_it_costs_is_added_up(program: Path) -> None:
    program.write_text("#!/bin/sh\ni=0; while [ $i -lt 3000 ]; do i=$((i+1)); done\n")
    command = Command(program)
    command.run()
    first = command.cpu_seconds
    command.run()
    assert 0 < first < command.cpu_seconds


def test_one_that_hangs_is_killed(program: Path, tmp_path: Path) -> None:
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    began = time.monotonic()
    with pytest.raises(OSError, match=r"not over after 0\.2 s") as raised:
        Command(program, timeout_seconds=0.2).run()
    assert raised.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - began < 30
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_that_closes_its_output_and_hangs_is_killed(program: Path) -> None:
    program.write_text("#!/bin/sh\nexec >&- 2>&-\nexec sleep 60\n")
    with pytest.raises(OSError, match="not over after"):
        Command(program, timeout_seconds=0.2).run()


def test_one_that_never_ends_to_talk_is_killed(program: Path) -> None:
    program.write_text("#!/bin/sh\nexec cat /dev/zero\n")
    with pytest.raises(OSError, match="not over after"):
        Command(program).run()


def test_one_that_fails_says_why(program: Path) -> None:
    program.write_text("#!/bin/sh\necho VCHI initialization failed >&2\nexit 1\n")
    with pytest.raises(OSError, match="exited with 1: VCHI initialization failed"):
        Command(program).run()


def test_one_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Command(tmp_path / "nowhere").run()
