"""A disk that takes its time for each sync: the real collector, whose fsync is made to wait."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from boardbench.v1 import collector_pb2_grpc

SYNC_SECONDS = 0.3
RESULTS = 400
SAMPLES = 60_000

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
static int slowly(const char *name, int descriptor) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *told = getenv("SLOW_SYNC_NANOSECONDS");
    struct timespec pause = {0, told ? atol(told) : 0};
    nanosleep(&pause, NULL);
    return real(descriptor);
}
int fsync(int descriptor) { return slowly("fsync", descriptor); }
int fdatasync(int descriptor) { return slowly("fdatasync", descriptor); }
"""


@pytest.fixture
def slow_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sync of programs that are started from now on waits; skips without a C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("syncs can't be made slow here: no C compiler")
    source, library = tmp_path / "slow.c", tmp_path / "slow.so"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("SLOW_SYNC_NANOSECONDS", str(int(SYNC_SECONDS * 1e9)))


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def test_a_slow_disk_is_waited_for_in_order_and_in_bounded_memory(
    slow_syncs: None, start_collector: Callable[..., Any], make_result: Callable[..., Any], make_hello: Any
) -> None:
    """What is sent faster than the disk takes it waits at the sender; acknowledgements are after the sync."""
    from boardbench.v1 import collector_pb2

    collector = start_collector()
    before = resident_bytes(collector.process.pid)
    loop = asyncio.get_running_loop()
    sizes: list[int] = []
    async with grpc.aio.insecure_channel(
        collector.grpc_address, options=(("grpc.max_send_message_length", -1),)
    ) as channel:
        call = collector_pb2_grpc.CollectorServiceStub(channel).Report()
        await call.write(collector_pb2.ReportRequest(hello=make_hello()))
        assert (await call.read()).WhichOneof("response") == "welcome"
        began = loop.time()
        result = make_result("run-0", samples=SAMPLES)
        size = result.ByteSize()

        async def send() -> None:
            for sequence in range(1, RESULTS + 1):
                result.run_id = f"run-{sequence}"
                spooled = collector_pb2.SpooledResult(spool_id="spool-1", sequence=sequence, result=result)
                await call.write(collector_pb2.ReportRequest(result=spooled))

        sender = asyncio.create_task(send())
        marks: list[int] = []
        while not marks or marks[-1] < RESULTS:
            answer = await asyncio.wait_for(call.read(), 60)
            assert answer.WhichOneof("response") == "acknowledgement", answer
            marks.append(answer.acknowledgement.sequence)
            sizes.append(resident_bytes(collector.process.pid))
        took = loop.time() - began
        await sender
        call.cancel()
    assert marks == sorted(set(marks)), "acknowledged out of order, or twice"
    # 64 results at most wait for the disk at a time, so that these need six syncs, one after the other.
    assert len(marks) > 3
    assert took > 3 * SYNC_SECONDS
    sent = RESULTS * size
    grown = max(sizes) - before
    assert sent > 80 << 20
    # What may be on its way (32 MiB), copies of it, SQLite's pages: and far less than what was sent.
    assert grown < sent * 0.75, f"{grown:,} bytes more for {sent:,} bytes sent"
    assert re.search(rf"(?m)^boardbench_runs_total\{{[^}}]*\}} {RESULTS}(\.0)?$", collector.get("/metrics"))
