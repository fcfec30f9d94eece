from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from boardbench.agent.bench import memory
from boardbench.agent.bench.memory import MemoryMeter
from boardbench.agent.domain import MemoryPhase

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

KIB = 1024


def process(folder: Path, *, rss: int, peak: int, pss: int | None, swap: int | None = None) -> Path:
    """A folder like /proc/self."""
    swapped = "" if swap is None else f"VmSwap:\t{swap} kB\n"
    (folder / "status").write_text(
        f"Name:\tpython\nVmHWM:\t{peak} kB\nVmRSS:\t{rss} kB\n{swapped}Threads:\t1\n"
    )
    if pss is not None:
        (folder / "smaps_rollup").write_text(
            f"55d0-7ffc ---p 00000000 00:00 0    [rollup]\nRss:  {rss} kB\nPss:  {pss} kB\nPss_Dirty: 7 kB\n"
        )
    (folder / "clear_refs").touch()
    return folder


def test_phases_are_read_and_the_peak_is_set_back(tmp_path: Path) -> None:
    meter = MemoryMeter(process(tmp_path, rss=100, peak=150, pss=80))
    first = meter.end_phase(MemoryPhase.BASELINE)
    assert (first.rss_bytes, first.pss_bytes, first.peak_rss_bytes) == (100 * KIB, 80 * KIB, 150 * KIB)
    assert (tmp_path / "clear_refs").read_text() == "5"
    process(tmp_path, rss=400, peak=900, pss=390)
    meter.end_phase(MemoryPhase.LOADED)
    process(tmp_path, rss=300, peak=500, pss=290)
    meter.end_phase(MemoryPhase.STEADY)
    whole = meter.memory()
    assert [phase.peak_rss_bytes for phase in whole.phases] == [150 * KIB, 900 * KIB, 500 * KIB]
    assert whole.peak_rss_bytes == 900 * KIB
    assert whole.model_rss_bytes == 200 * KIB
    assert meter.resettable


def test_the_most_that_was_swapped_out_at_the_end_of_a_phase_is_told(tmp_path: Path) -> None:
    meter = MemoryMeter(process(tmp_path, rss=100, peak=150, pss=80, swap=0))
    meter.end_phase(MemoryPhase.BASELINE)
    process(tmp_path, rss=100, peak=150, pss=80, swap=300)
    meter.end_phase(MemoryPhase.FIRST_INFERENCE)
    process(tmp_path, rss=100, peak=150, pss=80, swap=200)
    meter.end_phase(MemoryPhase.STEADY)
    assert meter.memory().peak_swap_bytes == 300 * KIB


def test_a_kernel_without_swap_tells_nothing_of_it(tmp_path: Path) -> None:
    meter = MemoryMeter(process(tmp_path, rss=100, peak=150, pss=80))
    meter.end_phase(MemoryPhase.BASELINE)
    assert meter.memory().peak_swap_bytes is None


def test_the_engine_s_own_arena_is_taken_as_it_is_told(tmp_path: Path) -> None:
    meter = MemoryMeter(process(tmp_path, rss=100, peak=150, pss=80))
    assert meter.memory().arena_bytes is None
    assert meter.memory(4096).arena_bytes == 4096


def test_a_peak_below_the_exact_sum_is_lifted_to_it(tmp_path: Path) -> None:
    meter = MemoryMeter(process(tmp_path, rss=160, peak=150, pss=80))
    assert meter.end_phase(MemoryPhase.BASELINE).peak_rss_bytes == 160 * KIB


def test_a_kernel_that_can_not_reset_leaves_later_peaks_out(tmp_path: Path) -> None:
    process(tmp_path, rss=100, peak=150, pss=None)
    (tmp_path / "clear_refs").unlink()
    (tmp_path / "clear_refs").mkdir()  # can't be written, not even by root
    meter = MemoryMeter(tmp_path)
    first = meter.end_phase(MemoryPhase.BASELINE)
    assert (first.rss_bytes, first.pss_bytes, first.peak_rss_bytes) == (100 * KIB, None, 150 * KIB)
    process_peak = tmp_path / "status"
    process_peak.write_text("VmHWM:\t900 kB\nVmRSS:\t400 kB\n")
    assert meter.end_phase(MemoryPhase.STEADY).peak_rss_bytes is None
    assert not meter.resettable
    whole = meter.memory()
    assert whole.peak_rss_bytes == 900 * KIB  # of the whole life it is still true
    assert whole.model_rss_bytes == 300 * KIB


def test_a_phase_that_was_not_reached_leaves_the_difference_out(tmp_path: Path) -> None:
    meter = MemoryMeter(process(tmp_path, rss=100, peak=150, pss=80))
    meter.end_phase(MemoryPhase.BASELINE)
    assert meter.memory().model_rss_bytes is None


@linux
def test_this_process_shows_what_it_takes_and_gives_back() -> None:
    size = 64 << 20
    meter = MemoryMeter()
    before = meter.end_phase(MemoryPhase.BASELINE)
    block = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        block[page] = 1
    taken = meter.end_phase(MemoryPhase.LOADED)
    block.close()
    after = meter.end_phase(MemoryPhase.STEADY)
    slack = 16 << 20
    assert before.rss_bytes and taken.rss_bytes and taken.pss_bytes and after.rss_bytes
    assert taken.rss_bytes - before.rss_bytes >= size - slack
    assert taken.pss_bytes <= taken.rss_bytes
    assert taken.rss_bytes - after.rss_bytes >= size - slack
    if meter.resettable:
        assert taken.peak_rss_bytes and after.peak_rss_bytes
        assert taken.peak_rss_bytes >= taken.rss_bytes
        assert after.peak_rss_bytes >= taken.rss_bytes - slack  # the phase began with it


def test_elsewhere_what_can_not_be_had_is_absent(tmp_path: Path) -> None:
    meter = MemoryMeter(tmp_path / "no-such-folder")
    phase = meter.end_phase(MemoryPhase.BASELINE)
    assert phase.pss_bytes is None
    assert phase.peak_rss_bytes is None
    assert meter.resettable  # nothing was refused
    if phase.rss_bytes is not None:  # psutil is installed
        assert phase.rss_bytes > 1 << 20
    peak = meter.memory().peak_rss_bytes
    assert peak is not None and peak > 1 << 20


def proc(folder: Path, *, available: int | None, cgroup: str = "") -> Path:
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(
        "" if available is None else f"MemTotal: 99 kB\nMemAvailable: {available} kB\n"
    )
    (folder / "self" / "cgroup").write_text(cgroup)
    return folder


def group(folder: Path, limit: str, current: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file 1\n")


def test_available_memory_is_the_least_of_kernel_and_control_groups(tmp_path: Path) -> None:
    folder = proc(tmp_path / "proc", available=1000, cgroup="0::/system.slice/agent.service\n")
    groups = tmp_path / "cgroup"
    group(groups / "system.slice" / "agent.service", "max", 10, 0)
    assert memory.available_bytes(folder, groups) == 1000 * KIB
    group(groups / "system.slice", "300000", 120_000, 20_000)
    assert memory.available_bytes(folder, groups) == 200_000
    group(groups / "system.slice" / "agent.service", "50000", 60_000, 0)
    assert memory.available_bytes(folder, groups) == 0


def test_available_memory_that_nobody_tells_is_none(tmp_path: Path) -> None:
    assert memory.available_bytes(proc(tmp_path / "proc", available=None), tmp_path) is None
    assert memory.available_bytes(tmp_path / "nowhere", tmp_path) is None


@linux
def test_this_machine_has_memory() -> None:
    available = memory.available_bytes()
    assert available is not None and available > 1 << 20
