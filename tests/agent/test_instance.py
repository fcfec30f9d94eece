"""Which agent this is: the same after a restart, another on another board."""

from __future__ import annotations

from pathlib import Path

import pytest

from boardbench.agent.errors import StorageError
from boardbench.agent.instance import instance_id


def board(root: Path, serial: str) -> Path:
    path = root / "proc/device-tree/serial-number"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serial.encode() + b"\0")
    return root


def test_it_is_made_once(tmp_path: Path) -> None:
    root = board(tmp_path / "root", "10000000abcdef01")
    first = instance_id(tmp_path / "data", root)
    assert len(first) == 32
    assert instance_id(tmp_path / "data", root) == first
    assert instance_id(tmp_path / "other", root) != first
    # The serial number itself is not written down.
    assert "10000000abcdef01" not in (tmp_path / "data" / "instance").read_text()


def test_a_card_that_was_copied_to_another_board_is_another_agent(tmp_path: Path) -> None:
    first = instance_id(tmp_path / "data", board(tmp_path / "a", "1"))
    second = instance_id(tmp_path / "data", board(tmp_path / "b", "2"))
    assert second != first
    assert instance_id(tmp_path / "data", tmp_path / "b") == second


def test_a_board_without_a_serial_number_has_one_too(tmp_path: Path) -> None:
    first = instance_id(tmp_path / "data", tmp_path / "none")
    assert instance_id(tmp_path / "data", tmp_path / "none") == first


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"abc -\n", b"one two three\n"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "instance").write_bytes(content)
    made = instance_id(tmp_path, tmp_path / "none")
    assert len(made) == 32
    assert instance_id(tmp_path, tmp_path / "none") == made


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(StorageError, match="check the disk"):
        instance_id(tmp_path / "data", tmp_path / "none")
