"""What engines keep from one load to the next is bounded; what was used longest ago goes first."""

from __future__ import annotations

import os
from pathlib import Path

from boardbench.agent import caches, merge
from boardbench.v1 import result_pb2


def kept(folder: Path, name: str, size_bytes: int, used_at: int) -> Path:
    path = folder / "openvino" / name
    path.mkdir(parents=True)
    (path / "blob").write_bytes(bytes(size_bytes))
    os.utime(path, (used_at, used_at))
    return path


def test_the_oldest_goes_first(tmp_path: Path) -> None:
    oldest, older, newest = (kept(tmp_path, name, 100, at) for at, name in enumerate("abc", 1))
    assert caches.bound(tmp_path, 300) == []
    assert caches.bound(tmp_path, 250) == [oldest]
    assert not oldest.exists()
    os.utime(older, (9, 9))
    assert caches.bound(tmp_path, 150) == [newest]
    assert older.exists()


def test_one_that_is_more_than_all_may_be_is_not_kept(tmp_path: Path) -> None:
    large, small = kept(tmp_path, "large", 1000, 2), kept(tmp_path, "small", 10, 1)
    assert caches.bound(tmp_path, 500) == [large]
    assert small.exists()


def test_nothing_is_there_before_anything_is_kept(tmp_path: Path) -> None:
    assert caches.bound(caches.root(tmp_path), 0) == []


def test_loading_times_of_processes_are_of_loads_that_found_the_same() -> None:
    def loaded(seconds: float, warm: bool) -> result_pb2.RunResult:
        result = result_pb2.RunResult(create_seconds=seconds)
        result.caches.add(name="engine", warm=warm)
        return result

    results = [loaded(60.0, False), loaded(1.0, True), loaded(3.0, True)]
    whole = result_pb2.RunResult()
    merge.fold(whole, merge.loaded_alike(results), merge.ONCE)
    assert whole.create_seconds == 2.0
