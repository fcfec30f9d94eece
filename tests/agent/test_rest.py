"""Sensors at rest: what heartbeats say of a board that waits, and how little that may cost it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from boardbench.agent.board.rest import LEAST_SECONDS, AtRest
from boardbench.v1 import collector_pb2

# Made up after Documentation/driver-api/thermal/sysfs-api.rst, admin-guide/pm/cpufreq.rst and
# drivers/thermal/intel/therm_throt.c.
FILES = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "48312",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "7",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_total_time_ms": "120",
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": "123456789",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
}


def tree(root: Path) -> Path:
    for name, content in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


def readings(heartbeat: collector_pb2.Heartbeat) -> dict[str, float]:
    return {reading.quantity: reading.value for reading in heartbeat.readings}


async def beat(sensors: AtRest) -> collector_pb2.Heartbeat:
    heartbeat = collector_pb2.Heartbeat()
    sensors.beat(heartbeat)
    await sensors.close()
    return heartbeat


async def test_heartbeats_say_what_the_sensors_said(tmp_path: Path) -> None:
    now = [100.0]
    sensors = AtRest(tree(tmp_path), monotonic=lambda: now[0])
    sensors.look()
    assert {"thermal", "cpufreq", "rapl"} <= set(sensors.kinds)
    assert not readings(await beat(sensors))
    first = readings(await beat(sensors))
    assert first["temperature_celsius"] == 48.312
    assert first["frequency_hertz"] == 1.5e9
    # A counter says nothing by itself, but for those of which the collector keeps the history.
    assert "energy_joules" not in first
    assert "throttled_seconds" not in first
    assert first["throttle_events"] == 7


async def test_they_are_read_no_more_often_than_heat_moves(tmp_path: Path) -> None:
    now = [100.0]
    sensors = AtRest(tree(tmp_path), monotonic=lambda: now[0])
    sensors.look()
    await beat(sensors)
    zone = tmp_path / "sys/class/thermal/thermal_zone0/temp"
    zone.write_text("60000\n")
    now[0] += LEAST_SECONDS - 0.1
    await beat(sensors)
    assert readings(await beat(sensors))["temperature_celsius"] == 48.312
    # However dear it was to read them.
    now[0] += 3600
    await beat(sensors)
    assert readings(await beat(sensors))["temperature_celsius"] == 60.0


async def test_what_can_not_be_read_is_left_out(tmp_path: Path) -> None:
    sensors = AtRest(tree(tmp_path))
    sensors.look()
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").unlink()
    await beat(sensors)
    left = readings(await beat(sensors))
    assert "temperature_celsius" not in left
    assert left["frequency_hertz"] == 1.5e9


async def test_kinds_that_are_left_out_are_not_looked_for(tmp_path: Path) -> None:
    sensors = AtRest(tree(tmp_path), ["thermal"])
    sensors.look()
    assert "thermal" not in sensors.kinds
    await beat(sensors)
    assert "temperature_celsius" not in readings(await beat(sensors))


async def test_a_board_without_sensors_says_nothing(tmp_path: Path) -> None:
    sensors = AtRest(tmp_path)
    sensors.look()
    await beat(sensors)
    assert sensors.kinds == ()
    assert not readings(await beat(sensors))


async def test_a_heartbeat_stays_small(tmp_path: Path) -> None:
    tree(tmp_path)
    for number in range(200):
        folder = tmp_path / f"sys/class/thermal/thermal_zone{number}"
        folder.mkdir(exist_ok=True)
        (folder / "type").write_text(f"zone-{number}\n")
        (folder / "temp").write_text("40000\n")
    sensors = AtRest(tmp_path)
    sensors.look()
    await beat(sensors)
    heartbeat = await beat(sensors)
    assert 60 < len(heartbeat.readings) < 200
    assert heartbeat.ByteSize() <= 3000


def test_a_board_keeps_only_the_kinds_that_it_has_in_memory(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from boardbench.agent.board.rest import AtRest; "
        f"AtRest(Path({str(tree(tmp_path))!r})).look(); "
        "begin = 'boardbench.agent.board.sensors.'; "
        "print(*sorted(name.replace(begin, '') for name in sys.modules if name.startswith(begin)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpufreq", "thermal", "x86_throttle"]
