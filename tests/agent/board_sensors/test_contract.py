"""One suite over every kind of sensor on every tree: absent is left out, broken is an OSError."""

from __future__ import annotations

import importlib
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from boardbench.agent.board import sensors
from boardbench.agent.board.sensor import Coverage, Reading, Sensor, child_cpu_seconds, period_seconds
from boardbench.agent.board.sensors import KINDS, find_all

BOARDS = Path(__file__).resolve().parents[2] / "boards"
TREES = sorted(path.name for path in BOARDS.iterdir() if path.is_dir())

# Units and things counted, last in a quantity's name; and bits, which are 0 or 1.
UNITS = (
    "amperes", "bytes", "celsius", "events", "hertz", "index", "interrupts", "joules", "ratio", "seconds",
    "steps", "transfers", "volts", "watts",
)  # fmt: skip
BITS = ("_now", "_since_boot")

HOSTILE = {
    "empty": b"",
    "blank": b" \n",
    "text": b"hot\n",
    "negative": b"-1\n",
    "huge": b"9" * 400 + b"\n",
    "largest": b"18446744073709551615\n",
    "not a number": b"nan\n",
    "infinite": b"inf\n",
    "hexadecimal": b"0x10\n",
    "fraction": b"1.5\n",
    "underscore": b"1_000\n",
    "arabic digits": "٣\n".encode(),
    "binary": bytes(range(256)),
    "zero bytes": b"\0" * 64,
    "pages": b"1\n" * 10_000,
}

# Opens for everybody, and can't be read at its begin: EIO.
UNREADABLE = Path("/proc/self/mem")
# Refuses even root to read it (kernfs looks at the mode of its own files): EACCES.
FORBIDDEN = Path("/sys/bus/platform/drivers_probe")


KINDS_AND_TREES = [(kind, tree) for kind in KINDS for tree in TREES]


def find(kind: str, root: Path) -> list[Sensor]:
    found: list[Sensor] = importlib.import_module(f"{sensors.__name__}.{kind}").find(root)
    return found


def read(board: Iterable[Sensor]) -> tuple[dict[tuple[str, str], Reading], list[OSError]]:
    """Everything that can be read, and every failure. Any other exception ends the test."""
    readings: dict[tuple[str, str], Reading] = {}
    failures = []
    for sensor in board:
        try:
            for reading in sensor.read():
                key = (reading.quantity, reading.source)
                assert key not in readings, f"{key} is read twice"
                readings[key] = reading
        except OSError as error:
            failures.append(error)
    return readings, failures


def sound(reading: Reading) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", reading.quantity)
    unit = reading.quantity.rsplit("_", 1)[-1]
    if reading.quantity.endswith(BITS):
        assert reading.value in (0.0, 1.0)
    else:
        assert unit in UNITS, reading
    assert reading.source
    assert reading.source.isprintable()
    assert isinstance(reading.value, float)
    assert math.isfinite(reading.value)
    if unit == "ratio":
        assert 0.0 <= reading.value <= 1.0
    if reading.cumulative:
        assert reading.value >= 0.0
    assert (reading.coverage is not None) == (unit in ("watts", "joules"))
    assert unit != "joules" or reading.cumulative


@pytest.mark.parametrize(("kind", "tree"), KINDS_AND_TREES)
def test_what_is_read_is_sound(kind: str, tree: str) -> None:
    board = find(kind, BOARDS / tree)
    before: dict[tuple[str, str], Reading] = {}
    for _ in range(2):
        readings, failures = read(board)
        assert failures == []
        for key, reading in readings.items():
            sound(reading)
            if reading.cumulative and key in before:
                assert reading.value >= before[key].value
        before = readings
    for sensor in board:
        assert sensor.name
        assert period_seconds(sensor) >= 0
        assert child_cpu_seconds(sensor) >= 0


@pytest.mark.parametrize("tree", TREES)
def test_no_two_sensors_of_a_board_say_the_same(tree: str) -> None:
    readings, _ = read(find_all(BOARDS / tree))
    totals = [r for r in readings.values() if r.coverage in (Coverage.BOARD, Coverage.MODULE)]
    assert len(totals) <= 1, "the widest rail of a board is told once"


@pytest.mark.parametrize("kind", KINDS)
def test_a_board_without_the_kind_has_none(kind: str, tmp_path: Path) -> None:
    assert find(kind, tmp_path) == []
    for folder in ("sys/class/hwmon/hwmon0", "sys/class/drm/card0", "sys/class/power_supply/BAT0",
                   "sys/class/powercap/intel-rapl:0", "sys/devices/system/cpu/cpu0"):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
    assert find(kind, tmp_path) == []


def test_every_file_is_a_kind_and_says_where_it_reads() -> None:
    folder = Path(sensors.__file__).parent
    assert sorted(KINDS) == sorted(path.stem for path in folder.glob("[a-z]*.py"))
    for kind in KINDS:
        doc = importlib.import_module(f"{sensors.__name__}.{kind}").__doc__ or ""
        assert re.search(r"/sys/|/proc/|/var/|vcgencmd|NVML", doc), kind
        assert re.search(r"Documentation/|drivers/|src/|Guide|docs\.|\.com/", doc), kind


def test_kinds_are_loaded_when_they_are_looked_for() -> None:
    """A waiting agent has no use for them."""
    script = (
        "import sys; import boardbench.agent.board.sensors as s; "
        "print([k for k in s.KINDS if f'{s.__name__}.{k}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- broken boards


def copied(tree: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(BOARDS / tree, tmp_path / tree, symlinks=True))


def files(root: Path) -> list[Path]:
    """The files that a sensor could read; those that say what the board is belong to others."""
    found = [path for place in ("sys", "proc/meminfo", "var") for path in _under(root / place)]
    return [path for path in found if "devicetree" not in path.parts and "dmi" not in path.parts]


def _under(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def without_programs(root: Path) -> list[Sensor]:
    """What the files say: programs are broken in a test of their own."""
    return [sensor for sensor in find_all(root) if not hasattr(sensor, "child_cpu_seconds")]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("content", HOSTILE)
def test_hostile_content_everywhere_is_an_oserror_at_most(tree: str, content: str, tmp_path: Path) -> None:
    """First in all values, after the sensors were found; then in all files, before."""
    root = copied(tree, tmp_path)
    board = without_programs(root)
    for path in files(root):
        path.write_bytes(HOSTILE[content])
    for _ in range(2):
        for reading in read(board)[0].values():
            sound(reading)
    for reading in read(without_programs(root))[0].values():
        sound(reading)


@pytest.mark.parametrize("tree", TREES)
def test_hostile_content_of_one_file_spoils_nothing_else(tree: str, tmp_path: Path) -> None:
    root = copied(tree, tmp_path)
    expected = read(without_programs(root))[0]
    for path in files(root):
        good = path.read_bytes()
        for content in (b"", b"hot\n", b"9" * 400):
            path.write_bytes(content)
            readings, failures = read(without_programs(root))
            for reading in readings.values():
                sound(reading)
            # One file is one value, or one table.
            lost = {source for _, source in set(expected) - set(readings)}
            assert len(lost) <= 20, (path, lost)
            assert len(failures) <= 1, (path, failures)
        path.write_bytes(good)
    assert set(read(without_programs(root))[0]) == set(expected)


@pytest.mark.parametrize("tree", TREES)
def test_a_file_that_can_not_be_read_is_never_passed_over(tree: str, tmp_path: Path) -> None:
    root = copied(tree, tmp_path)
    expected = set(read(without_programs(root))[0])
    for path in files(root):
        board = without_programs(root)
        kept = path.with_name(path.name + ".kept")
        path.rename(kept)
        path.symlink_to(UNREADABLE)
        readings, failures = read(board)
        path.unlink()
        kept.rename(path)
        missing = expected - set(readings)
        assert not missing or failures, (path, missing)


@pytest.mark.parametrize("tree", TREES)
def test_a_file_that_vanishes_is_left_out_or_an_oserror(tree: str, tmp_path: Path) -> None:
    root = copied(tree, tmp_path)
    for path in files(root):
        board = without_programs(root)
        kept = path.read_bytes()
        path.unlink()
        for reading in read(board)[0].values():
            sound(reading)
        path.write_bytes(kept)


@pytest.mark.parametrize(
    ("tree", "file"),
    [
        ("laptop_intel", "sys/class/powercap/intel-rapl:0/energy_uj"),
        ("jetson_orin_nano", "sys/kernel/debug/nvmap/iovmm/clients"),
        ("rock_5b", "sys/kernel/debug/rknpu/load"),
    ],
)
def test_what_is_forbidden_is_told_apart_from_what_is_absent(tree: str, file: str, tmp_path: Path) -> None:
    if not FORBIDDEN.exists() or _readable(FORBIDDEN):
        pytest.skip(f"{FORBIDDEN} is not there, or may be read here")
    root = copied(tree, tmp_path)
    (root / file).unlink()
    absent = read(find_all(root))
    assert absent[1] == []
    (root / file).symlink_to(FORBIDDEN)
    readings, failures = read(find_all(root))
    assert [type(failure) for failure in failures] == [PermissionError]
    assert Path(str(failures[0].filename)).name == Path(file).name
    assert set(absent[0]) <= set(readings)


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


# --- programs


PROGRAMS = ("raspberry_pi_3_soft_limit", "raspberry_pi_5")


@pytest.mark.parametrize("tree", PROGRAMS)
@pytest.mark.parametrize(
    "said", ["", "hot", "throttled=", "throttled=0xzz", "throttled=0x123456789", "nan", "X_A current(0)=infA"]
)
def test_hostile_answers_of_a_program_are_an_oserror(tree: str, said: str, tmp_path: Path) -> None:
    root = copied(tree, tmp_path)
    program = root / "usr/bin/vcgencmd"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    asking = [sensor for sensor in find_all(root) if hasattr(sensor, "child_cpu_seconds")]
    assert asking
    readings, failures = read(asking)
    assert (readings, len(failures)) == ({}, len(asking))


@pytest.mark.parametrize("tree", PROGRAMS)
@pytest.mark.parametrize("broken", ["#!/bin/sh\nexit 255\n", "#!/nowhere\n", "\x7fELF not a program"])
def test_a_program_that_fails_is_an_oserror(tree: str, broken: str, tmp_path: Path) -> None:
    root = copied(tree, tmp_path)
    (root / "usr/bin/vcgencmd").write_text(broken)
    asking = [sensor for sensor in find_all(root) if hasattr(sensor, "child_cpu_seconds")]
    assert len(read(asking)[1]) == len(asking) > 0
