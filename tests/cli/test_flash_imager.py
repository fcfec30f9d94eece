"""What Raspberry Pi Imager is told of a prepared image, by the rules that its own documents have for it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlparse

import pytest
from click.testing import CliRunner

from boardbench.cli import imager
from boardbench.cli.flash import flash

# raspberrypi/rpi-imager, doc/schema-notes.md ("Each OS entry must include") and doc/json-schema: the names
# and their types, and what an init_format can be.
REQUIRED = {
    "name": str, "description": str, "icon": str, "url": str, "extract_size": int, "extract_sha256": str,
    "image_download_size": int, "release_date": str, "devices": list,
}  # fmt: skip
INIT_FORMATS = ("none", "systemd", "cloudinit", "cloudinit-rpi")
# The tags of the boards in Imager's own list, of 64 and of 32 bits.
TAGS = re.compile(r"pi[1-5]-(32|64)bit")


def listed(image: Path, architecture: str = "arm64") -> dict[str, object]:
    text = imager.os_list(
        image,
        imager.sha256(image),
        suite="bookworm",
        architecture=architecture,
        released="2025-05-13",
        title="pi-01 (boardbench)",
    )
    found: dict[str, object] = json.loads(text)
    return found


@pytest.mark.parametrize("architecture", ["arm64", "armhf"])
def test_the_list_is_as_imager_wants_it(tmp_path: Path, architecture: str) -> None:
    image = tmp_path / "a name with blänks.img"
    image.write_bytes(bytes(1536))
    whole = listed(image, architecture)
    # additionalProperties is false for the whole, and true for an entry.
    assert set(whole) == {"imager", "os_list"}
    (entry,) = whole["os_list"]  # type: ignore[misc]
    for name, kind in REQUIRED.items():
        assert isinstance(entry[name], kind), name
    assert entry["extract_size"] == entry["image_download_size"] == 1536
    assert entry["extract_sha256"] == hashlib.sha256(bytes(1536)).hexdigest()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["release_date"])
    assert entry["init_format"] in INIT_FORMATS
    # Another would have Imager write its own first boot over ours.
    assert entry["init_format"] == "none"
    assert entry["devices"] and all(TAGS.fullmatch(tag) for tag in entry["devices"])
    assert all(("64" in tag) == (architecture == "arm64") for tag in entry["devices"])
    url = urlparse(entry["url"])
    assert url.scheme == "file" and Path(unquote(url.path)) == image
    # src/hwlistmodel.cpp: without devices there is no first step; with one that is the default it is taken.
    (device,) = whole["imager"]["devices"]  # type: ignore[call-overload,index]
    assert set(device) >= {"name", "tags", "icon", "description", "matching_type"}
    assert device["default"] is True and set(device["tags"]) & set(entry["devices"])


def test_the_commands_are_those_of_the_system() -> None:
    image = Path("my image.img")
    linux = list(imager.commands(image, "ab", Path("list.json"), "linux"))
    assert [shlex.split(line) for line in linux] == [
        ["sudo", "rpi-imager", "--cli", "--sha256", "ab", "my image.img", "/dev/sdX"],
        ["rpi-imager", "--repo", "list.json"],
    ]
    (mac,) = imager.commands(image, "", None, "darwin")
    assert shlex.split(mac)[1:] == [
        "/Applications/Raspberry Pi Imager.app/Contents/MacOS/rpi-imager", "--cli", "my image.img",
        "/dev/diskN",
    ]  # fmt: skip
    (windows,) = imager.commands(image, "", None, "win32")
    assert windows == (
        r'"C:\Program Files\Raspberry Pi\Imager\rpi-imager-cli.cmd" "my image.img" \\.\PhysicalDriveN'
    )


def test_a_prepared_image_is_listed_as_it_is_then(
    small_card: Path, tmp_path: Path, release_packages: ModuleType
) -> None:
    package = release_packages.build(tmp_path, "0.1.0", {})
    file = tmp_path / "os_list.json"
    arguments = [
        "pi", "--image", small_card, "--package", package, "--collector", "lab", "--hostname", "pi-07",
        "--os-list", file,
    ]  # fmt: skip
    answer = CliRunner().invoke(flash, [str(argument) for argument in arguments])
    assert answer.exit_code == 0, answer.output
    (entry,) = json.loads(file.read_bytes())["os_list"]
    assert entry["extract_sha256"] == hashlib.sha256(small_card.read_bytes()).hexdigest()
    assert (entry["name"], entry["release_date"]) == ("pi-07 (boardbench)", "2025-05-13")
    assert f"--sha256 {entry['extract_sha256']}" in answer.output
    assert f"rpi-imager --repo {file}" in answer.output
