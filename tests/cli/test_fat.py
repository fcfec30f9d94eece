"""The FAT writer against other people's programs: mkfs.vfat makes, mtools read, fsck.vfat judges."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boardbench.cli.boot_partition import BootFolder, fat_offsets, opened
from boardbench.cli.errors import CliError, WrongUse
from boardbench.cli.fat import FatError, FatVolume

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def tool(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not here (Debian: dosfstools, mtools, fdisk)")
    return found


@pytest.fixture(
    params=[(16, 64, 0), (32, 128, 0), (32, 64, 4 << 20)], ids=["fat16", "fat32", "fat32-in-image"]
)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    """An empty file system of that kind, and where it begins."""
    bits, mebibytes, offset = request.param
    path = tmp_path / "card.img"
    with path.open("wb") as file:
        file.truncate(offset + (mebibytes << 20))
    sectors = [] if bits == 16 else ["-s", "1"]
    subprocess.run(
        [
            tool("mkfs.vfat"),
            "-F",
            str(bits),
            *sectors,
            "--offset",
            str(offset // 512),
            path,
            str(mebibytes << 10),
        ],
        check=True,
        capture_output=True,
    )
    return path, offset


def sound(path: Path, offset: int, tmp_path: Path) -> None:
    """Fails when fsck has anything to say."""
    alone = tmp_path / "alone.img"
    with path.open("rb") as file, alone.open("wb") as copy:
        file.seek(offset)
        shutil.copyfileobj(file, copy)
    done = subprocess.run([tool("fsck.vfat"), "-n", "-v", alone], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for complaint in ("differ", "Orphan", "Free cluster summary wrong", "reclaim", "bad"):
        assert complaint not in done.stdout, done.stdout


def by_mtools(path: Path, offset: int, name: str) -> bytes:
    return subprocess.run(
        [tool("mtype"), "-i", f"{path}@@{offset}", f"::{name}"], check=True, capture_output=True
    ).stdout


def test_what_is_written_is_read_by_mtools_and_sound_to_fsck(image: tuple[Path, int], tmp_path: Path) -> None:
    path, offset = image
    made = random.Random(1)
    files = {
        "cmdline.txt": b"console=tty1 root=/dev/mmcblk0p2",
        "UPPER.TXT": b"short",
        "a name that is longer than eight.and three": made.randbytes(12_345),
        "boardbench/agent.deb": made.randbytes(3_000_000),
        "boardbench/empty": b"",
        "boardbench/before/user-data": b"#cloud-config\n",
        "größe.txt": b"not ASCII",
    }
    with path.open("r+b") as file:
        volume = FatVolume(file, offset)
        free = volume.free_bytes
        for name, data in files.items():
            volume.write(name, data)
        assert volume.free_bytes < free - 3_000_000
    with path.open("rb") as file:
        volume = FatVolume(file, offset)
        for name, data in files.items():
            assert volume.read(name) == data
            assert volume.read(name.upper()) == data
        assert sorted(volume.listed("boardbench")) == ["agent.deb", "before", "empty"]
        assert not volume.exists("boardbench/none")
    for name in ("cmdline.txt", "boardbench/agent.deb", "a name that is longer than eight.and three"):
        assert by_mtools(path, offset, name) == files[name]
    sound(path, offset, tmp_path)


@pytest.mark.parametrize("image", [(32, 128, 0)], indirect=True, ids=["fat32"])
def test_the_reserved_bits_of_an_entry_stay_as_they_are(image: tuple[Path, int]) -> None:
    path, _ = image
    with path.open("r+b") as file:
        head = file.read(64)
        reserved, copies = struct.unpack_from("<HB", head, 14)
        (table,) = struct.unpack_from("<I", head, 36)
        # Of the first free cluster; the root folder has the one before.
        places = [(reserved + number * table) * 512 + 4 * 3 for number in range(copies)]
        for place in places:
            file.seek(place)
            file.write(struct.pack("<I", 0xA0000000))
        volume = FatVolume(file)
        volume.write("three.bin", bytes(3 * volume.cluster_bytes))
        for place in places:
            file.seek(place)
            assert struct.unpack("<I", file.read(4)) == (0xA0000000 | 4,)
        volume.remove("three.bin")
        for place in places:
            file.seek(place)
            assert struct.unpack("<I", file.read(4)) == (0xA0000000,)


def test_a_replaced_or_removed_file_gives_its_room_back(image: tuple[Path, int], tmp_path: Path) -> None:
    path, offset = image
    with path.open("r+b") as file:
        volume = FatVolume(file, offset)
        volume.write("kept.txt", b"kept")
        free = volume.free_bytes
        volume.write("large file.bin", bytes(5_000_000))
        volume.write("large file.bin", b"now small")
        assert volume.read("large file.bin") == b"now small"
        volume.remove("large file.bin")
        volume.remove("never there")
        volume.remove("no/folder/either")
        assert volume.free_bytes == free
        assert volume.listed() == ["kept.txt"]
    sound(path, offset, tmp_path)


def test_what_mtools_wrote_is_read_and_stays(image: tuple[Path, int], tmp_path: Path) -> None:
    path, offset = image
    source = tmp_path / "source"
    source.write_bytes(b"from mtools\n" * 1000)
    drive = f"{path}@@{offset}"
    subprocess.run([tool("mmd"), "-i", drive, "::overlays"], check=True)
    for name in ("kernel8.img", "overlays/a-long-overlay-name.dtbo", "bcm2711-rpi-4-b.dtb"):
        subprocess.run([tool("mcopy"), "-i", drive, source, f"::{name}"], check=True)
    with path.open("r+b") as file:
        volume = FatVolume(file, offset)
        assert volume.listed() == ["overlays", "kernel8.img", "bcm2711-rpi-4-b.dtb"]
        assert volume.read("overlays/a-long-overlay-name.dtbo") == source.read_bytes()
        volume.write("overlays/another.dtbo", b"ours")
    assert by_mtools(path, offset, "overlays/a-long-overlay-name.dtbo") == source.read_bytes()
    assert by_mtools(path, offset, "overlays/another.dtbo") == b"ours"
    sound(path, offset, tmp_path)


class PulledOut(Exception):
    """The card is gone."""


class Card(io.BytesIO):
    """Takes so many writes, and is then pulled out."""

    left = 0

    def write(self, data: Any) -> int:
        if not self.left:
            raise PulledOut
        self.left -= 1
        return super().write(data)


@pytest.mark.parametrize("bits", [16, 32])
def test_a_card_that_is_pulled_out_has_the_old_file_or_the_new_one(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "card.img"
    with path.open("wb") as made:
        made.truncate((4 << 20) if bits == 16 else (36 << 20))
    command = [tool("mkfs.vfat"), "-F", str(bits), "-s", "1", path]
    subprocess.run(command, check=True, capture_output=True)
    with path.open("r+b") as file:
        before = FatVolume(file)
        before.write("boot/told.txt", b"old " * 400)
        before.write("boot/beside.txt", b"beside " * 400)
    whole, news = path.read_bytes(), {"boot/told.txt": b"new " * 700, "fresh/a long name.txt": b"more " * 300}
    for name, data in news.items():
        for writes in range(100):
            card = Card(whole)
            card.left = writes
            try:
                FatVolume(card).write(name, data)
            except PulledOut:
                done = False
            else:
                done = True
            after = FatVolume(io.BytesIO(card.getvalue()))
            assert after.read("boot/beside.txt") == b"beside " * 400
            found = after.read(name) if after.exists(name) else None
            assert found in ((data,) if done else (data, b"old " * 400 if "told" in name else None))
            if done:
                break
        assert done and writes > 4


def test_a_long_name_that_belongs_to_another_entry_is_not_taken_for_its_own(tmp_path: Path) -> None:
    path = tmp_path / "card.img"
    with path.open("wb") as made:
        made.truncate(4 << 20)
    subprocess.run([tool("mkfs.vfat"), "-F", "16", "-s", "1", path], check=True, capture_output=True)
    with path.open("r+b") as file:
        FatVolume(file).write("a long name.txt", b"whole")
        file.flush()
        content = bytearray(path.read_bytes())
    # As a system leaves it that knows no long names and has renamed the file.
    at = content.index(b"ALONGN~1TXT")
    content[at : at + 11] = b"OTHER   TXT"
    volume = FatVolume(io.BytesIO(bytes(content)))
    assert volume.listed() == ["OTHER.TXT"]
    assert volume.read("other.txt") == b"whole"


def test_a_name_that_is_anothers_short_one_gets_one_of_its_own(
    image: tuple[Path, int], tmp_path: Path
) -> None:
    path, offset = image
    with path.open("r+b") as file:
        volume = FatVolume(file, offset)
        volume.write("a long name.txt", b"long")
        volume.write("ALONGN~1.TXT", b"short")
        assert (volume.read("a long name.txt"), volume.read("ALONGN~1.TXT")) == (b"long", b"short")
    sound(path, offset, tmp_path)


def test_a_folder_that_grows_over_what_was_there_holds_none_of_it(
    image: tuple[Path, int], tmp_path: Path
) -> None:
    path, offset = image
    names = [f"{number} is a name of some length.txt" for number in range(60)]
    with path.open("r+b") as file:
        volume = FatVolume(file, offset)
        volume.write("gone.bin", b"A" * 2_000_000)
        volume.write("folder/first.txt", b"")
        volume.remove("gone.bin")
        for name in names:
            volume.write(f"folder/{name}", b"")
        assert sorted(volume.listed("folder")) == sorted(["first.txt", *names])
    sound(path, offset, tmp_path)


def test_a_file_that_runs_in_a_circle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "card.img"
    with path.open("wb") as made:
        made.truncate(4 << 20)
    subprocess.run([tool("mkfs.vfat"), "-F", "16", "-s", "1", path], check=True, capture_output=True)
    with path.open("r+b") as file:
        FatVolume(file).write("circle.txt", b"round " * 200)
        file.seek(0)
        # Reserved sectors and copies of the table; at 22 its sectors.
        reserved, copies, table = struct.unpack_from("<14xHB5xH", file.read(64))
        for number in range(copies):
            # The third cluster leads to the first, which is the first there is.
            file.seek((reserved + number * table) * 512 + 2 * 4)
            file.write(struct.pack("<H", 2))
        with pytest.raises(FatError, match="runs in a circle"):
            FatVolume(file).read("circle.txt")


def test_many_names_grow_a_folder_and_short_ones_stay_apart(image: tuple[Path, int], tmp_path: Path) -> None:
    path, offset = image
    with path.open("r+b") as file:
        volume = FatVolume(file, offset)
        names = [f"folder/a file with a long name {number}.txt" for number in range(150)]
        for name in names:
            volume.write(name, name.encode())
        assert all(volume.read(name) == name.encode() for name in names)
        for name in names[::2]:
            volume.remove(name)
        volume.write("folder/a name that takes several of the slots that are free now.txt", b"x")
    sound(path, offset, tmp_path)


def test_random_work_agrees_with_a_dictionary(image: tuple[Path, int], tmp_path: Path) -> None:
    path, offset = image
    made = random.Random(7)
    names = [
        f"{folder}{stem}.{number}"
        for folder in ("", "one/", "one/two/")
        for stem in ("x", "longer name")
        for number in range(4)
    ]
    known: dict[str, bytes] = {}
    with path.open("r+b") as file:
        volume = FatVolume(file, offset)
        for _ in range(300):
            name = made.choice(names)
            if made.random() < 0.3:
                volume.remove(name)
                known.pop(name, None)
            else:
                known[name] = made.randbytes(made.choice((0, 1, 511, 512, 513, 5000, 70_000)))
                volume.write(name, known[name])
        for name in names:
            assert volume.exists(name) == (name in known)
            if name in known:
                assert volume.read(name) == known[name]
    with path.open("rb") as file:
        again = FatVolume(file, offset)
        assert {name: again.read(name) for name in known} == known
    sound(path, offset, tmp_path)


def test_a_full_one_says_so_and_stays_sound(image: tuple[Path, int], tmp_path: Path) -> None:
    path, offset = image
    with path.open("r+b") as file:
        volume = FatVolume(file, offset)
        with pytest.raises(FatError, match="full"):
            volume.write("large", bytes(volume.free_bytes + 1))
        volume.write("small", b"fits")
        assert volume.listed() == ["small"]
    sound(path, offset, tmp_path)


@pytest.mark.parametrize("name", ["a:b", "..", "x/../y", 'quoted"', "new\nline"])
def test_names_that_fat_does_not_know_are_refused(image: tuple[Path, int], name: str) -> None:
    path, offset = image
    with path.open("r+b") as file, pytest.raises(FatError):
        FatVolume(file, offset).write(name, b"")


@pytest.mark.parametrize(
    "content", [b"", bytes(4096), b"\xeb\x3c\x90" + bytes(507) + b"\x55\xaa" + bytes(4096)]
)
def test_what_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(FatError):
        FatVolume(io.BytesIO(content))


def test_damage_never_hangs_nor_raises_anything_else(image: tuple[Path, int]) -> None:
    path, offset = image
    with path.open("r+b") as file:
        FatVolume(file, offset).write("folder/file", bytes(100_000))
        # From the first table to the root folder of either kind.
        file.seek(offset)
        head = bytearray(file.read(2 << 20))
        tail = file.read(4096)
    made = random.Random(3)
    for _ in range(60):
        damaged = bytearray(head)
        for _ in range(made.choice((1, 8, 64))):
            at = made.randrange(512) if made.random() < 0.3 else made.randrange(len(damaged))
            damaged[at] = made.randrange(256)
        try:
            volume = FatVolume(io.BytesIO(bytes(damaged) + tail))
            volume.listed()
            volume.read("folder/file")
            volume.write("cmdline.txt", b"x")
        except (FatError, FileNotFoundError):
            pass


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_the_boot_partition_is_found(card_image: Callable[[str], Path], label: str) -> None:
    path = card_image(label)
    with path.open("rb") as file:
        assert list(fat_offsets(file)) == [16384 * 512]
    with opened(path, writable=True) as volume:
        volume.write("firstrun.sh", b"#!/bin/sh\n")
    with opened(path, writable=False) as volume:
        assert volume.read("firstrun.sh") == b"#!/bin/sh\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no FAT partition"),
        (b"\xfd7zXZ\x00" + bytes(600), "xz -dk"),
        (b"PK\x03\x04" + bytes(600), "unzip"),
        (bytes(510) + b"\x55\xaa", "no FAT partition"),
    ],
)
def test_what_is_no_image_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "image.img"
    path.write_bytes(content)
    with pytest.raises(WrongUse, match=words), opened(path, writable=True):
        pass
    assert path.read_bytes() == content


def test_an_image_that_is_cut_off_is_told(card_image: Callable[[str], Path]) -> None:
    path = card_image("dos")
    os.truncate(path, 16384 * 512 + 4096)
    with pytest.raises(CliError), opened(path, writable=True):
        pass


def test_a_folder_keeps_bytes_as_they_are(tmp_path: Path) -> None:
    folder = BootFolder(tmp_path)
    folder.write("boardbench/install.sh", b"#!/bin/sh\nexit 0\n")
    folder.write("boardbench/install.sh", b"#!/bin/sh\nexit 1\n")
    assert folder.read("boardbench/install.sh") == b"#!/bin/sh\nexit 1\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["boardbench", "install.sh"]
    folder.remove("boardbench/install.sh")
    folder.remove("boardbench/install.sh")
    assert not folder.exists("boardbench/install.sh")
