"""Traps of Windows and macOS for `flash --boot`, as far as they can be set on another system."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType

import pytest

from boardbench.cli import boot_partition, card, disk
from boardbench.cli.address import Address

CLI = Path(boot_partition.__file__).parent
MODULES = (
    "arrival",
    "boot_partition",
    "card",
    "disk",
    "fat",
    "first_boot",
    "flash",
    "imager",
    "raw_write",
    "remote",
)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        # Where somebody was last on that drive, to Windows.
        ("E:", "E:\\"),
        ("E:\\", "E:\\"),
        ("E:/", "E:\\"),
        ("E:bootfs", "E:bootfs"),
        ("C:\\mounted\\bootfs", "C:\\mounted\\bootfs"),
        ("\\\\server\\share", "\\\\server\\share"),
    ],
)
def test_a_drive_is_its_first_folder(given: str, meant: str) -> None:
    found = boot_partition.folder_of(PureWindowsPath(given))
    assert found == PureWindowsPath(meant)
    assert found.is_absolute() == PureWindowsPath(meant).is_absolute()
    assert str(found / "cmdline.txt").startswith(meant)


def test_a_folder_of_macos_is_what_it_is() -> None:
    for given in ("/Volumes/bootfs", "bootfs", "/Volumes/My Card"):
        assert boot_partition.folder_of(PurePosixPath(given)) == PurePosixPath(given)


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_opened_as_text_in_the_systems_own_way(name: str) -> None:
    """Windows' own encoding is not UTF-8, and its line ends are two bytes."""
    tree = ast.parse((CLI / f"{name}.py").read_text(encoding="utf-8"))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        words = {keyword.arg for keyword in call.keywords}
        assert called != "write_text", f"{name}.py:{call.lineno} translates line ends"
        if called == "read_text":
            assert "encoding" in words, f"{name}.py:{call.lineno}"
        if called == "open" and not (
            isinstance(call.func, ast.Attribute) and ast.unparse(call.func) == "os.open"
        ):
            modes = [arg.value for arg in ast.walk(call) if isinstance(arg, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
            assert binary or ast.unparse(call.func) == "tarfile.open", f"{name}.py:{call.lineno}"


def test_a_system_without_posix_writes_a_folder_and_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has neither fcntl nor posix_fadvise."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    folder = boot_partition.BootFolder(tmp_path)
    folder.write("boardbench/install.sh", b"#!/bin/sh\nexit 0\n")
    assert folder.read("boardbench/install.sh") == b"#!/bin/sh\nexit 0\n"
    (tmp_path / "image").write_bytes(b"\r\n\x1a\n")
    with disk.alone(tmp_path / "image") as file:
        file.seek(1)
        file.write(b"\n\n")
    assert (tmp_path / "image").read_bytes() == b"\r\n\n\n"


def test_what_finder_and_explorer_leave_on_a_card_is_left(
    tmp_path: Path, release_packages: ModuleType
) -> None:
    folder = tmp_path / "bootfs"
    folder.mkdir()
    theirs = {
        "._cmdline.txt": b"\0\5\x16\7",
        ".fseventsd": b"",
        "System Volume Information": b"",
        "Thumbs.db": b"x",
    }
    for name, data in {"cmdline.txt": b"root=/dev/x\n", "config.txt": b"", **theirs}.items():
        (folder / name).write_bytes(data)
    package = release_packages.build(tmp_path, "0.1.0", {})
    program = [sys.executable, "-c", "import sys; from boardbench.cli.main import main; sys.exit(main())"]
    # A console that knows Latin letters only, as Windows' is where output goes into a file.
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}
    for more in (["--dry-run"], []):
        done = subprocess.run(
            [
                *program, "flash", "pi", "--boot", folder, "--os", "bookworm", "--package", package,
                "--collector", str(Address("lab", 7342)), "--token", "bbt_x", "--label", "lab=Zürich", *more,
            ],
            env=environment,
            capture_output=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert {name: (folder / name).read_bytes() for name in theirs} == theirs
    assert 'lab" = "Zürich"'.encode() in (folder / "boardbench/agent.toml").read_bytes()
    for path in (folder / "boardbench").iterdir():
        if path.suffix != ".deb":
            assert b"\r" not in path.read_bytes(), path


def test_paths_on_the_card_are_written_with_slashes() -> None:
    from boardbench.cli import first_boot

    order = first_boot.Order(package=b"", collector="c:1", token="t", update_keys=b"k")
    assert all("\\" not in path for path in first_boot.bundle(order))
    assert card.PYTHONS.keys() == {"bookworm", "trixie"}
