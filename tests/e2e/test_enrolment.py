"""A board is enrolled by a token: by its command, and by a file left for it before the first boot."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def token_of(programs: Any, *arguments: str) -> str:
    script = str(Path(sys.executable).parent / "boardbench-collector")
    program = programs.start(
        f"token-{len(programs.started)}",
        [
            sys.executable,
            script,
            "token",
            "create",
            *arguments,
            f"--data-dir={programs.folder / 'collector'}",
        ],
    )
    assert program.process.wait(60) == 0, program.log()
    return str(program.log().strip().splitlines()[-1])


def enroll(programs: Any, *arguments: str, **environment: str) -> tuple[int, str]:
    script = str(Path(sys.executable).parent / "boardbench-agent")
    program = programs.start(
        f"enroll-{len(programs.started)}",
        [sys.executable, script, "enroll", "--device-id=board-agent", *arguments],
        environment,
    )
    return program.process.wait(60), program.log()


def test_an_enrolled_board_reports_where_others_are_refused(
    programs: Any, eventually: Callable[..., Any]
) -> None:
    collector = programs.collector(options=["--require-enrolment"])
    stranger = programs.agent("stranger", collector=collector.address)
    eventually(
        "the stranger is told why",
        lambda: "board board-stranger is not enrolled here: make a token" in stranger.program.log(),
    )
    data_dir = programs.folder / "agent"
    token = token_of(programs, "--label=lab=zurich")
    code, said = enroll(
        programs, f"--collector={collector.address}", f"--token={token}", f"--data-dir={data_dir}"
    )
    assert (code, said) == (0, f"board board-agent is enrolled at {collector.address}\n")
    kept = data_dir / "enrolment.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert token not in kept.read_text()
    assert not (data_dir / "enrolment-pending.json").exists()
    # Without a word about the collector: the board knows it from its enrolment.
    agent = programs.agent("agent", data_dir=data_dir)
    eventually("the board is up", lambda: collector.metric("boardbench_device_up", device=agent.device_id))
    described = programs.client("devices", "--collector", collector.address, "--format", "json").json
    assert [(d["board"]["device_id"], d["board"].get("labels")) for d in described] == [
        ("board-agent", {"lab": "zurich"})
    ]
    code, said = enroll(
        programs,
        f"--collector={collector.address}",
        f"--token={token}",
        f"--data-dir={programs.folder / 'other'}",
    )
    assert code == 1
    assert "does not take the token: the token was used by board board-agent" in said


def test_a_token_that_waits_is_shown_when_the_collector_is_there(
    programs: Any, eventually: Callable[..., Any]
) -> None:
    data_dir = programs.folder / "agent"
    data_dir.mkdir(mode=0o700)
    token = token_of(programs)
    first = programs.collector(options=["--require-enrolment"])
    first.program.end()
    waiting = data_dir / "enrolment-pending.json"
    waiting.write_text(json.dumps({"collector": first.address, "token": token}) + "\n")
    agent = programs.agent("agent", data_dir=data_dir)
    eventually("the agent tries in vain", lambda: "collector" in agent.program.log())
    assert waiting.exists()
    collector = programs.collector(listen=first.address, options=["--require-enrolment"])
    eventually(
        "the board is up",
        lambda: collector.metric("boardbench_device_up", device=agent.device_id),
        seconds=60,
    )
    assert not waiting.exists()
    assert json.loads((data_dir / "enrolment.json").read_text())["collector"] == first.address
    # Forgotten by its collector, the board says what is to be done.
    code = agent.program.end()
    assert code == 0


def test_a_waiting_token_that_is_refused_is_told_once_and_dropped(
    programs: Any, eventually: Callable[..., Any]
) -> None:
    collector = programs.collector()
    data_dir = programs.folder / "agent"
    data_dir.mkdir(mode=0o700)
    (data_dir / "enrolment-pending.json").write_text(
        json.dumps({"collector": collector.address, "token": "bbt_wrong"}) + "\n"
    )
    agent = programs.agent("agent", data_dir=data_dir)
    # The collector takes strangers, so the board is welcome all the same.
    eventually("the board is up", lambda: collector.metric("boardbench_device_up", device=agent.device_id))
    assert "does not take the token: there is no such token" in agent.program.log()
    assert not (data_dir / "enrolment-pending.json").exists()


@pytest.mark.parametrize("name", ["enrolment.json", "enrolment-pending.json"])
def test_a_damaged_file_is_told(programs: Any, name: str) -> None:
    data_dir = programs.folder / "agent"
    data_dir.mkdir(mode=0o700)
    (data_dir / name).write_text('{"collector": 7}')
    script = str(Path(sys.executable).parent / "boardbench-agent")
    program = programs.start(
        "agent", [sys.executable, script, "serve", "--listen=127.0.0.1:0", f"--data-dir={data_dir}"]
    )
    assert program.process.wait(60) == 1
    assert f"{name} is damaged: remove it, and enrol the board again" in program.log()


def test_a_collector_that_is_not_there_is_told(programs: Any) -> None:
    data_dir = programs.folder / "agent"
    code, said = enroll(programs, "--collector=127.0.0.1:1", "--token=bbt_x", f"--data-dir={data_dir}")
    assert code == 1
    assert "127.0.0.1:1 can't be reached" in said
    assert "is it running" in said
    assert not (data_dir / "enrolment-pending.json").exists()


def test_a_collector_without_a_certificate_is_told_as_such_and_nothing_else_is(programs: Any) -> None:
    collector = programs.collector()
    data_dir = programs.folder / "agent"
    code, said = enroll(
        programs, f"--collector=tls://{collector.address}", "--token=bbt_x", f"--data-dir={data_dir}"
    )
    assert code == 1
    assert "it does not speak TLS: leave tls://" in said
    assert "is it running" not in said
    assert len(said.splitlines()) == 1, "gRPC writes beside us"


# What a system with mDNS does (nss-mdns): gRPC's own resolver asks DNS servers, and never the system.
NAMES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
typedef int (*resolve)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    if (name && !strcmp(name, "lab.local")) name = "127.0.0.1";
    return ((resolve)dlsym(RTLD_NEXT, "getaddrinfo"))(name, service, hints, found);
}
"""


def test_a_collector_may_have_a_name_that_only_the_system_knows(programs: Any, tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the system can't be taught a name here: no C compiler for a library that does")
    source, library = tmp_path / "names.c", tmp_path / "names.so"
    source.write_text(NAMES)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    collector = programs.collector()
    code, said = enroll(
        programs,
        f"--collector=lab.local:{collector.address.rpartition(':')[2]}",
        "--token=bbt_x",
        f"--data-dir={programs.folder / 'agent'}",
        LD_PRELOAD=str(library),
    )
    assert (code, "does not take the token" in said) == (1, True), said
