"""A collector without room for files, and clocks that are set while agent and collector work together."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Eventually = Callable[..., Any]
SHORT = ("--duration", "0.1", "--profile-runs", "0", "--idle", "0")
DAY = 86_400


def devices(programs: Any, collector: Any, *terms: str) -> list[dict[str, Any]]:
    on = [part for term in terms for part in ("--on", term)]
    return list(programs.client("devices", *on, "--via", collector.address, "--format", "json").json)


def fill(path: Path, leave_bytes: int) -> None:
    """Takes all of the file system but so much, while others write to it, too."""
    found = os.statvfs(path.parent)
    with path.open("wb", buffering=0) as file:
        most = found.f_bavail * found.f_frsize - max(leave_bytes, 64 << 20)
        os.posix_fallocate(file.fileno(), 0, most)
        file.seek(most)
        for block in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while not leave_bytes and file.write(bytes(block)):
                    pass


def test_a_collector_without_room_for_files_refuses_them_and_goes_on(
    programs: Any,
    small_disk: Callable[[int], Path],
    demo_tflite: Path,
    tmp_path: Path,
    eventually: Eventually,
) -> None:
    """A push is refused in words, before it is sent or when others fill the disk; no job is queued."""
    disk = small_disk(1400 << 20)
    collector = programs.collector(data_dir=disk / "collector", options=("--heartbeat", "0.5"))
    board = programs.agent(collector=collector.address, listen="")
    eventually("it is up", lambda: devices(programs, collector, f"device_id={board.device_id}", "up=true"))

    fill(disk / "filler", 900 << 20)
    refused = programs.client("push", demo_tflite, "--via", collector.address, "--all", *SHORT, code=None)
    assert refused.code != 0
    assert "there is no room for" in refused.err
    (disk / "filler").unlink()

    # Admitted, and then there is no room after all.
    wire = programs.wire(collector.address)
    wire.hold_after = 4 << 20
    large = tmp_path / "large.tflite"
    large.write_bytes(demo_tflite.read_bytes() + os.urandom(24 << 20))
    client = programs.client.begin("push", large, "--via", wire.address, "--all", *SHORT)
    assert wire.held.wait(60), client.log()
    fill(disk / "filler", 0)
    wire.release()
    assert client.process.wait(120) != 0, client.log()
    assert "there is no room for large.tflite" in client.log()
    assert programs.client("jobs", "--via", collector.address, "--format", "json").json == []

    # It was never away, and with room again it works on, with what came before the disk was full.
    assert collector.program.running
    (disk / "filler").unlink()
    answer = programs.client(
        "push", demo_tflite, "--via", collector.address, "--all", *SHORT, "--format", "json"
    )
    assert answer.code == 0
    eventually("the result is stored", lambda: len(collector.results()) == 1)


# libfaketime also rewrites sleeps, and those of Python 3.11 and later then fail (EINVAL). This shifts what
# the wall clock says and nothing else, as setting it does.
SHIFTED_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile int64_t *shift;
static int (*real)(clockid_t, struct timespec *);
static void begin(void) {
    const char *path = getenv("SHIFTED_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file >= 0) {
        void *mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
        close(file);
        if (mapped != MAP_FAILED) shift = mapped;
    }
    real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
}
__attribute__((constructor)) static void first(void) { begin(); }
int clock_gettime(clockid_t id, struct timespec *now) {
    if (!real) begin();
    int answer = real(id, now);
    if (answer == 0 && shift && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *shift;
    return answer;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec told;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &told);
    now->tv_sec = told.tv_sec;
    now->tv_usec = told.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *into) {
    struct timespec told;
    clock_gettime(CLOCK_REALTIME, &told);
    if (into) *into = told.tv_sec;
    return told.tv_sec;
}
"""


class Clock:
    """A clock that is set by hand, of every program that is started with its environment."""

    def __init__(self, folder: Path) -> None:
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None or not sys.platform.startswith("linux"):
            pytest.skip("clocks can't be set here: no C compiler for a library that shifts them")
        source, library = folder / "clock.c", folder / "clock.so"
        source.write_text(SHIFTED_CLOCK)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
        self._path = folder / "clock"
        self._path.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "SHIFTED_CLOCK": str(self._path)}

    def set(self, offset_seconds: int) -> None:
        """Sets it so much ahead of the right time; negative: behind."""
        with self._path.open("r+b") as file:
            file.write(struct.pack("=q", offset_seconds))


@pytest.mark.parametrize("whose", ["agent", "collector", "both"])
def test_clocks_that_are_set_both_ways_lose_and_repeat_nothing(
    programs: Any, demo_tflite: Path, tmp_path: Path, eventually: Eventually, whose: str
) -> None:
    clock = Clock(tmp_path)
    faked = clock.environment
    collector = programs.collector(
        options=("--heartbeat", "0.5", "--lease", "2"), environment={} if whose == "agent" else faked
    )
    board = programs.agent(
        collector=collector.address, listen="", environment={} if whose == "collector" else faked
    )
    eventually("it is up", lambda: devices(programs, collector, f"device_id={board.device_id}", "up=true"))
    done = []
    for offset in (0, DAY, -2 * DAY, 400 * DAY, 0):
        clock.set(offset)
        job = programs.client(
            "push", demo_tflite, "--via", collector.address, "--all", *SHORT, "--format", "json"
        )
        done.append(job.json[0]["run_id"] if isinstance(job.json, list) else job.json["run_id"])
        assert len(collector.results()) == len(done)
    assert sorted(result["run_id"] for result in collector.results()) == sorted(done)
    # Each at its first attempt: no clock took a job from its board.
    assert {run_id.rpartition("-")[2] for run_id in done} == {"1"}
    (found,) = devices(programs, collector)
    assert found["up"]
    assert int(found["heartbeat"].get("spool_pending", 0)) == 0
