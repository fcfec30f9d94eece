"""Files are replaced whole or not at all, and work on them is over when somebody else takes them up."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from boardbench.agent import folder
from boardbench.agent.enrolment import Enrolment
from boardbench.agent.errors import StorageError
from boardbench.v1 import board_pb2

NOBODY = 65534


def test_a_replacement_that_fails_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills_up(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "kept"
    folder.replace(path, b"old")
    monkeypatch.setattr(folder, "write_all", fills_up)
    with pytest.raises(OSError, match="No space left"):
        folder.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_root_leaves_for_the_service_is_the_services_from_the_first_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the name and the owner would leave a file that keeps the service from starting."""
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")

    def killed(_: Path) -> None:
        raise OSError(errno.EIO, "killed here")

    data_dir = tmp_path / "data"
    data_dir.mkdir()
    os.chown(data_dir, NOBODY, NOBODY)
    monkeypatch.setattr(folder, "sync", killed)
    with pytest.raises(StorageError):
        asyncio.run(Enrolment(data_dir).enroll("127.0.0.1:1", "token", board_pb2.Board(), "instance"))
    (left,) = data_dir.iterdir()
    about = left.stat()
    assert (about.st_uid, about.st_gid, about.st_mode & 0o777) == (NOBODY, NOBODY, 0o600)


async def test_work_is_over_before_who_breaks_off_goes_on() -> None:
    begun, may_end = threading.Event(), threading.Event()
    over: list[str] = []

    def work(how: str) -> str:
        begun.set()
        assert may_end.wait(30)
        over.append(how)
        if how == "failed":
            raise OSError(how)
        return how

    for how in ("done", "failed"):
        begun.clear()
        may_end.clear()
        task = asyncio.create_task(folder.whole(asyncio.to_thread(work, how)))
        assert await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert over == ["done", "failed"]
    assert await folder.whole(asyncio.to_thread(work, "done")) == "done"
    with pytest.raises(OSError, match="failed"):
        await folder.whole(asyncio.to_thread(work, "failed"))
