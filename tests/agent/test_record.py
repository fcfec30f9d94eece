"""A recorded board is the same board to what reads it, and nobody's in particular."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from boardbench.agent import explain
from boardbench.agent.board.identify import identify
from boardbench.agent.board.sensors import find_all
from boardbench.agent.config import AgentConfig
from boardbench.agent.errors import ConfigurationError
from boardbench.agent.notify import notify
from boardbench.agent.record import MACHINE_ID, NOTE, record, scrubbed
from boardbench.v1 import agent_pb2

BOARDS = Path(__file__).resolve().parent.parent / "boards"
RECORDED = (
    "raspberry_pi_5", "raspberry_pi_4_throttled", "jetson_orin_nano", "jetson_agx_orin", "jetson_agx_xavier",
    "rock_5b", "nuc", "laptop_intel", "laptop_amd", "mini_pc_usb_meter", "tpu_usb3",
)  # fmt: skip


def described(root: Path) -> agent_pb2.DescribeResponse:
    board = identify(root, device_id="d", labels={}, architecture="aarch64")
    return agent_pb2.DescribeResponse(board=board, agent_version="0.1.0")


def readings(root: Path) -> set[tuple[str, str, str]]:
    """What the sensors of a tree say, without those that run a program."""
    found = set()
    for sensor in find_all(root):
        try:
            found |= {
                (type(sensor).__name__, reading.source, f"{reading.value:g}") for reading in sensor.read()
            }
        except OSError as error:
            found.add((type(sensor).__name__, sensor.name, str(error.errno)))
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_board_is_the_same_board(name: str, tmp_path: Path) -> None:
    root = BOARDS / name
    folder = tmp_path / "recorded"
    copied = record(root, folder, described(root))
    assert copied
    before, after = described(root).board, described(folder).board
    for board in (before, after):
        board.hostname = ""
    assert after == before
    programs = root / "usr"
    if programs.exists():
        shutil.copytree(programs, folder / "usr", symlinks=True)
    assert readings(folder) == readings(root)
    note = json.loads((folder / NOTE).read_text())
    assert note["board"] == before.model
    assert note["by"] == "boardbench-agent probe --record"


def test_nothing_in_it_names_the_board_or_its_owner(tmp_path: Path) -> None:
    root = tmp_path / "root"
    secrets = {
        "proc/cpuinfo": "processor\t: 0\nSerial\t\t: 10000000abcdef01\nModel\t\t: Raspberry Pi 5\n",
        "proc/sys/kernel/hostname": "annas-board\n",
        "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t RTX\n"
        "GPU UUID: \t GPU-12345678-abcd-abcd-abcd-123456789abc\n",
        "sys/class/power_supply/BAT0/uevent": "POWER_SUPPLY_SERIAL_NUMBER=SN4711\nPOWER_SUPPLY_STATUS=Full\n",
        "sys/class/power_supply/BAT0/serial_number": "SN4711\n",
        "sys/class/hwmon/hwmon0/device/address": "dc:a6:32:01:02:03\n",
        "sys/class/hwmon/hwmon0/device/label": "annas-board dc:a6:32:01:02:03\n",
        "sys/class/dmi/id/product_serial": "SN4711\n",
        "sys/firmware/devicetree/base/serial-number": "10000000abcdef01\0",
    }
    for name, text in secrets.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    folder = tmp_path / "recorded"
    record(root, folder, described(root))
    whole = b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for secret in ("10000000abcdef01", "annas", "0123456789abcdef01", "12345678-abcd", "SN4711", "dc:a6:32"):
        assert secret.encode() not in whole, secret
    assert MACHINE_ID.encode() in whole
    assert b"Raspberry Pi 5" in whole and b"STATUS=Full" in whole


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="name a folder that is not there yet"):
        record(BOARDS / "nuc", tmp_path, described(BOARDS / "nuc"))


def test_short_names_of_hosts_stay_words() -> None:
    assert scrubbed(b"pi processor pi", b"pi") == b"pi processor pi"
    assert scrubbed(b"my-pi-5 is up", b"my-pi-5") == b"board is up"


def test_the_page_says_what_the_board_has_and_lacks(tmp_path: Path) -> None:
    config = AgentConfig(sys_root=BOARDS / "tpu_usb2", data_dir=tmp_path)
    page = explain.page(config, described(BOARDS / "tpu_usb2"))
    assert "USB 2), where inputs and parameters take several times longer" in page
    assert "plug it into a USB 3 port" in page
    assert "boardbench-agent enroll --collector" in page
    config = AgentConfig(sys_root=BOARDS / "raspberry_pi_5", data_dir=tmp_path, collector="lab:1")
    page = explain.page(config, described(BOARDS / "raspberry_pi_5"))
    assert "✓ thermal: " in page
    assert "results go to lab:1; this board was not enrolled there" in page
    (tmp_path / "enrolment.json").write_text('{"collector": "lab:1", "device_key": "k"}')
    assert "✓ enrolled at lab:1" in explain.page(config, described(BOARDS / "raspberry_pi_5"))


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, abstract: bool) -> None:
    import socket

    name = f"@boardbench-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if abstract else name)
        listener.settimeout(10)
        assert notify("READY=1", {"NOTIFY_SOCKET": name})
        assert listener.recv(100) == b"READY=1"
    assert not notify("READY=1", {"NOTIFY_SOCKET": name})
    assert not notify("READY=1", {})
    assert not notify("READY=1", {"NOTIFY_SOCKET": "relative"})
