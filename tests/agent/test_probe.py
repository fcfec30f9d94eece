"""Interpreters that the configuration names, each broken in its own way: only their engines are lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.config import AgentConfig, DeadlinesConfig, RuntimeConfig
from boardbench.agent.probe import Engines
from boardbench.v1 import board_pb2

# What each does; what the reason says of it, and what to do.
BROKEN = {
    "old": (
        "#!/bin/sh\ncase $1 in -c) printf 3.6;; *) echo 'SyntaxError: future feature' >&2; exit 1;; esac\n",
        ["is Python 3.6, and engines run under 3.9 or newer", "name that, in [runtimes]"],
    ),
    "older": ("#!/bin/sh\ncase $1 in -c) printf 2.7;; *) exit 1;; esac\n", ["is Python 2.7", "3.9 or newer"]),
    "chatty": ("#!/bin/sh\necho hello, this is no Python\n", ["is no Python", "hello, this is no Python"]),
    "leaving": ("#!/bin/sh\nexit 7\n", ["is no Python", "exits with 7"]),
    "hanging": ("#!/bin/sh\nexec sleep 1000\n", ["was not over after 2 s", "deadlines.start_seconds"]),
    "unfit": ("this is text", ["can't be started", "[runtimes]"]),
}


def interpreter(tmp_path: Path, name: str, source: str) -> str:
    path = tmp_path / name
    path.write_text(source)
    path.chmod(0o755)
    return str(path)


async def found(config: AgentConfig, scratch: Path) -> dict[str, board_pb2.RuntimeStatus]:
    return {status.name: status for status in await Engines(config, scratch).statuses()}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_interpreter_takes_its_own_engines_along(
    tmp_path: Path, fake_engine: None, name: str
) -> None:
    source, reason = BROKEN[name]
    python = interpreter(tmp_path, name, source)
    config = AgentConfig(
        data_dir=tmp_path,
        # As long as the others may need, and no longer for this one than it takes to start.
        deadlines=DeadlinesConfig(start_seconds=2.0),
        runtimes={
            "torch": RuntimeConfig(python),
            "coreml": RuntimeConfig(python),
            "own": RuntimeConfig(python),
        },
    )
    statuses = await found(config, tmp_path / "scratch")
    for lost in ("torch", "coreml", "own"):
        assert not statuses[lost].available
        assert python in statuses[lost].reason
        assert not [part for part in reason if part not in statuses[lost].reason], statuses[lost].reason
        assert statuses[lost].interpreter.path == python
    assert statuses["fake"].available, "the others are where they were"
    assert statuses["fake"].interpreter.path == sys.executable


async def test_an_interpreter_that_answers_what_is_no_answer_is_told(
    tmp_path: Path, fake_engine: None, worker_program: Callable[[str], str]
) -> None:
    python = worker_program('say(b"what is no event\\n" * 3)')
    config = AgentConfig(data_dir=tmp_path, runtimes={"torch": RuntimeConfig(python)})
    statuses = await found(config, tmp_path / "scratch")
    assert "exited with 0: its answer was not JSON" in statuses["torch"].reason
    assert python in statuses["torch"].reason
    assert statuses["fake"].available


async def test_a_name_on_the_path_and_a_home_are_interpreters(
    tmp_path: Path, fake_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    interpreter(tmp_path / "bin", "python-of-mine", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    for python in ("python-of-mine", "~/bin/python-of-mine"):
        config = AgentConfig(data_dir=tmp_path, runtimes={"fake": RuntimeConfig(python)})
        assert (await found(config, tmp_path / "scratch"))["fake"].available, python


async def test_each_interpreter_is_asked_once_for_all_its_engines(
    tmp_path: Path, fake_engine: None, worker_program: Callable[[str], str]
) -> None:
    """On a board each child is seconds. And what it offers besides is found though nobody named it."""
    log = tmp_path / "asked"
    body = f"""
        with open({str(log)!r}, "a") as file:
            file.write(json.dumps(job["runtimes"]) + "\\n")
        answer = [{{"name": name, "available": True, "version": "x 1"}} for name in job["runtimes"]]
        offers = [{{"name": "hailo", "plugin": "boardbench-hailo 1.2"}}]
        marks = [{{"format": "hef", "runtime": "hailo", "plugin": "boardbench-hailo 1.2", "magic": "0148"}}]
        say({{"event": "probe", "runtimes": answer, "offers": offers,
             "marks": marks if job["runtimes"] == ["hailo"] else []}})
    """
    python = worker_program(body)
    config = AgentConfig(
        data_dir=tmp_path, runtimes={name: RuntimeConfig(python) for name in ("torch", "coreml", "tensorrt")}
    )
    engines = Engines(config, tmp_path / "scratch")
    statuses = {status.name: status for status in await engines.statuses()}
    assert [statuses[name].version for name in ("torch", "coreml", "tensorrt", "hailo")] == ["x 1"] * 4
    asked = log.read_text().splitlines()
    assert asked == ["[]", '["tensorrt", "torch", "coreml"]', '["hailo"]']
    assert engines.interpreter("hailo") == python
    assert [mark.format for mark in await engines.marks()] == ["hef"]
    assert list(statuses)[-1] == "hailo", "boardbench's own come first, and are the defaults"


async def test_one_runtime_can_be_asked_for_without_the_others(
    tmp_path: Path, worker_program: Callable[[str], str]
) -> None:
    body = """
        assert job["runtimes"] in ([], ["hailo"]), job
        offers = [{"name": "hailo", "plugin": "boardbench-hailo 1.2"}]
        answer = [{"name": name, "available": True} for name in job["runtimes"]]
        say({"event": "probe", "runtimes": answer, "offers": offers})
    """
    python = worker_program(body)
    engines = Engines(
        AgentConfig(data_dir=tmp_path, runtimes={"torch": RuntimeConfig(python)}), tmp_path / "s"
    )
    status: Any = await engines.status("hailo")
    assert status.available
    assert engines.interpreter("hailo") == python
    assert await engines.status("nosuch") is None


async def test_one_from_elsewhere_that_hangs_is_waited_for_once(
    tmp_path: Path, worker_program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("boardbench.agent.probe._FRESH_SECONDS", 0.0)
    log, version = tmp_path / "asked", tmp_path / "version"
    version.write_text("1.2")
    body = f"""
        if job["runtimes"] == ["hailo"]:
            with open({str(log)!r}, "a") as file:
                file.write("asked\\n")
            time.sleep(1000)
        offers = [{{"name": "hailo", "plugin": "boardbench-hailo " + open({str(version)!r}).read()}}]
        answer = [{{"name": name, "available": True}} for name in job["runtimes"]]
        say({{"event": "probe", "runtimes": answer, "offers": offers}})
    """
    python = worker_program(body)
    config = AgentConfig(
        data_dir=tmp_path,
        deadlines=DeadlinesConfig(probe_seconds=5.0),
        runtimes={"torch": RuntimeConfig(python)},
    )
    engines = Engines(config, tmp_path / "scratch")
    for probe in (engines.statuses, engines.refresh):
        status = {status.name: status for status in await probe()}["hailo"]
        assert status.plugin == "boardbench-hailo 1.2"
        assert "not over after 5 s" in status.reason and "started again" in status.reason
    assert log.read_text() == "asked\n"
    # Another version of it may be mended.
    version.write_text("1.3")
    await engines.refresh()
    assert log.read_text() == "asked\n" * 2
