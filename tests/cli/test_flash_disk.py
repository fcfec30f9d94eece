"""Whole disks: which are refused, and an image that is written to a real block device (a loop device)."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from boardbench.cli import disk, first_boot, raw_write
from boardbench.cli.errors import CliError, WrongUse
from boardbench.cli.fat import FatVolume
from boardbench.cli.flash import flash

MIB = 1 << 20
OLD = b"\xa5" * 4096
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


# A disk as sysfs and proc tell of it, in a folder.


class Tree:
    """What Linux says about one disk with one partition; a card in a reader at USB, unless it is changed."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.device = next(
            (path for path in Path("/dev").glob("*") if path.is_block_device()), Path("/dev/none")
        )
        if not self.device.exists():
            pytest.skip("this machine shows no block device, whose number a disk could have")
        number = self.device.stat().st_rdev
        self.disk = folder / "sys/devices/pci0000:00/usb1/1-2/block/sdx"
        self.part = self.disk / "sdx1"
        self.says({"size": "62333952", "removable": "1", "ro": "0", "dev": "8:16"})
        self.says({"device/vendor": "Generic ", "device/model": "SD/MMC CRW"})
        self.says({"sdx1/partition": "1", "sdx1/dev": "8:17"})
        place = folder / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
        place.parent.mkdir(parents=True)
        place.symlink_to(self.disk)
        self.link = place
        self.mounted("21 1 254:0 / / rw - ext4 /dev/root rw")

    def says(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.disk / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    def moved(self, to: str) -> None:
        """Lets it hang somewhere else."""
        new = self.root / to
        new.parent.mkdir(parents=True)
        self.disk.rename(new)
        self.disk = new
        self.link.unlink()
        self.link.symlink_to(new)

    def mounted(self, *lines: str) -> None:
        path = self.root / "proc/self/mountinfo"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    def look(self) -> disk.Disk:
        return disk.describe(self.device, self.root)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "root")


def test_a_card_is_told_by_model_size_and_id(tree: Tree) -> None:
    found = tree.look()
    assert str(found) == "Generic SD/MMC CRW, 31.9 GB"
    assert (found.id, found.refusal) == ("Generic_SD_MMC_CRW-31914983424", "")
    assert disk.checked(tree.device, tree.root) == found
    # udev's name for it, that of the model and not that of numbers.
    by_id = tree.root / "dev/disk/by-id"
    by_id.mkdir(parents=True)
    for name in ("wwn-0x5000", "usb-Generic_SD_MMC_CRW_0123-0:0"):
        (by_id / name).symlink_to(tree.device)
    (by_id / "ata-another").symlink_to("/dev/null")
    assert tree.look().id == "usb-Generic_SD_MMC_CRW_0123-0:0"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        # By its number, whatever it is called.
        (
            ["30 1 8:17 / /media/me/my\\040card rw shared:2 - vfat /dev/root rw"],
            "sdx1 is mounted on /media/me/my card",
        ),
        (["30 1 8:16 / /mnt rw - vfat /dev/disk/by-label/x rw"], "sdx is mounted on /mnt"),
        # By its name, where the file system has a number of its own.
        (["30 1 0:55 /@ /mnt rw - btrfs /dev/sdx1 rw"], "sdx1 is mounted on /mnt"),
    ],
)
def test_what_is_mounted_is_refused(tree: Tree, lines: list[str], words: str) -> None:
    tree.mounted("21 1 254:0 / / rw - ext4 /dev/root rw", *lines)
    assert words in tree.look().refusal
    with pytest.raises(CliError, match="is not written: it is in use"):
        disk.checked(tree.device, tree.root)


def test_what_else_uses_a_disk_is_told(tree: Tree) -> None:
    swaps = tree.root / "proc/swaps"
    swaps.write_text("Filename Type Size\n/dev/sdx1 partition 1 0 -2\n")
    assert "/dev/sdx1 is swap" in tree.look().refusal
    swaps.unlink()
    mapper = tree.root / "sys/devices/virtual/block/dm-0"
    (mapper / "dm").mkdir(parents=True)
    (mapper / "dm/name").write_text("vg-root\n")
    (tree.part / "holders").mkdir()
    (tree.part / "holders/dm-0").symlink_to(mapper)
    assert "vg-root (LVM, RAID or encryption) is made of it" in tree.look().refusal
    (tree.part / "holders/dm-0").unlink()
    (tree.disk / "holders").mkdir()
    (tree.disk / "holders/md127").symlink_to(tree.root / "sys/devices/virtual/block/md127")
    assert "md127 (LVM, RAID or encryption) is made of it" in tree.look().refusal


@pytest.mark.parametrize(
    ("said", "place", "words"),
    [
        ({"size": "0"}, "", "there is no card in it"),
        ({"ro": "1"}, "", "write protected"),
        ({"removable": "0"}, "", ""),  # a disk at USB
        ({"removable": "0"}, "sys/devices/pci0000:00/ata1/block/sdx", "built into this computer"),
        ({"removable": "1"}, "sys/devices/pci0000:00/ata1/block/sdx", ""),  # a reader in the case
        ({"removable": "0", "device/type": "SD"}, "sys/devices/mmc0/block/sdx", ""),
        ({"removable": "0", "device/type": "MMC"}, "sys/devices/mmc0/block/sdx", "built into this computer"),
    ],
)
def test_only_what_somebody_would_carry_to_a_board_is_written(
    tree: Tree, said: dict[str, str], place: str, words: str
) -> None:
    tree.says(said)
    if place:
        tree.moved(place)
    refusal = tree.look().refusal
    assert words in refusal and bool(words) == bool(refusal), refusal


def test_another_disk_by_the_same_name_is_told(tree: Tree) -> None:
    found = disk.checked(tree.device, tree.root)
    disk.still_there(found, tree.root)
    tree.says({"size": "1953525168"})
    with pytest.raises(
        CliError, match=rf"{tree.device} was Generic SD/MMC CRW, 31\.9 GB .* and is .*, 1000\.2 GB"
    ):
        disk.still_there(found, tree.root)
    tree.says({"size": "62333952"})
    disk.still_there(found, tree.root)
    tree.mounted("30 1 8:17 / /mnt rw - vfat /dev/sdx1 rw")
    with pytest.raises(CliError, match="sdx1 is mounted on /mnt"):
        disk.still_there(found, tree.root)


def test_a_partition_is_no_disk(tree: Tree, tmp_path: Path) -> None:
    tree.link.unlink()
    tree.link.symlink_to(tree.part)
    # By whatever name it is given (/dev/disk/by-id).
    link = tmp_path / "usb-Generic-part1"
    link.symlink_to(tree.device)
    for device in (tree.device, link):
        refusal = disk.describe(device, tree.root).refusal
        assert "it is a partition of /dev/sdx: name the whole disk" in refusal


def test_a_system_that_does_not_tell_is_told(tmp_path: Path, tree: Tree) -> None:
    with pytest.raises(WrongUse, match="Raspberry Pi Imager"):
        disk.describe(tree.device, tmp_path / "none")


def test_the_disk_that_this_system_runs_from_is_refused() -> None:
    number = Path("/").stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not place.exists():
        pytest.skip("/ is on no disk of this machine's")
    place = place.resolve()
    name = place.parent.name if (place / "partition").exists() else place.name
    device = Path("/dev") / name
    if not device.is_block_device():
        pytest.skip(f"{device} is not shown here")
    with pytest.raises(CliError, match=r"in use: .* is mounted on /"):
        disk.checked(device)


def test_what_is_no_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="there is no"):
        disk.checked(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(WrongUse, match="is no disk"):
        disk.checked(tmp_path / "file")


# The write itself, where both sides are files.


def nothing(_: int) -> None:
    pass


def test_what_was_cut_off_holds_nothing_that_could_start(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 6 * MIB:
                raise OSError(5, "Input/output error")
            return super().read(size)

    path = tmp_path / "disk"
    path.write_bytes(OLD * (16 * MIB // len(OLD)))
    with path.open("r+b") as target, pytest.raises(CliError, match="writing failed: Input/output error"):
        raw_write.write(Broken(b"x" * 12 * MIB), target, nothing)
    assert path.read_bytes()[:MIB] == bytes(MIB)


def test_what_reads_back_as_something_else_is_told(tmp_path: Path) -> None:
    content = os.urandom(9 * MIB)
    path = tmp_path / "disk"
    path.write_bytes(bytes(10 * MIB))
    counted: list[int] = []
    with path.open("r+b") as target:
        raw_write.write(io.BytesIO(content), target, counted.append)
        raw_write.verify(io.BytesIO(content), target, nothing)
        assert sum(counted) == len(content)
        target.seek(5 * MIB)
        target.write(bytes((content[5 * MIB] ^ 1,)))
        target.flush()
        with pytest.raises(CliError, match="between byte 4,194,304 and 8,388,608"):
            raw_write.verify(io.BytesIO(content), target, nothing)
        # A card that says it is larger than it is.
        target.truncate(8 * MIB)
        target.seek(5 * MIB)
        target.write(content[5 * MIB : 5 * MIB + 1])
        with pytest.raises(CliError, match="between byte 8,388,608 and 9,437,184"):
            raw_write.verify(io.BytesIO(content), target, nothing)


def test_an_image_that_does_not_fit_or_is_none_is_told(tree: Tree, tmp_path: Path) -> None:
    tree.says({"size": "2048"})
    image = tmp_path / "card.img"
    for size, words in (
        (0, "no image of a disk"),
        (1000, "no image of a disk"),
        (2 * MIB, "take a larger card"),
    ):
        image.write_bytes(bytes(size))
        with pytest.raises(WrongUse, match=words):
            raw_write.image_bytes(image, tree.look())


# Real block devices.


def losetup(*arguments: object) -> str:
    program = shutil.which("losetup", path=PATH)
    if program is None or os.geteuid() != 0:
        pytest.skip("a real block device out of a file needs root and losetup (Debian: mount)")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device is to be had here: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes a disk of that many MiB, full of what somebody had on it."""
    devices: list[str] = []

    def make(mebibytes: int, *options: str) -> Path:
        file = tmp_path / f"disk-{len(devices)}.img"
        file.write_bytes(OLD * (mebibytes * MIB // len(OLD)))
        devices.append(losetup("--find", "--show", *options, file))
        return Path(devices[-1])

    yield make
    for device in devices:
        losetup("--detach", device)


@pytest.fixture
def package(tmp_path: Path, release_packages: ModuleType) -> Path:
    return Path(release_packages.build(tmp_path, "0.1.0", {}))


def run(*arguments: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(flash, ["pi", "--collector", "lab", *map(str, arguments)], input=answer)


def content(device: Path) -> bytes:
    return device.read_bytes()


def test_an_image_comes_onto_a_disk_and_the_disk_gets_its_first_boot(
    attach: Callable[..., Path], small_card: Path, package: Path
) -> None:
    device = attach(56)
    image = small_card.read_bytes()
    given = ("--package", package, "--device", device, "--token", "bbt_secret")
    named = disk.describe(device)
    answer = run(*given, "--image", small_card, "--dry-run")
    assert answer.exit_code == 0, answer.output
    assert f"would be written over {device}: {named}; in a script: --yes {named.id}" in answer.output
    assert "would be written" in answer.output and "bbt_secret" not in answer.output
    assert content(device) == OLD * (56 * MIB // len(OLD))

    answer = run(*given, "--image", small_card, "--yes", named.id)
    assert answer.exit_code == 0, answer.output
    assert f"{len(image):,} bytes written to {device} and read back the same" in answer.output
    assert small_card.read_bytes() == image, "the image stays what it was"
    written = content(device)
    # Before the boot partition, what the image has; behind the image, what was there.
    assert written[: 8 * MIB] == image[: 8 * MIB]
    assert written[len(image) :] == OLD * ((56 * MIB - len(image)) // len(OLD))
    with device.open("rb") as file:
        volume = FatVolume(file, 8 * MIB)
        assert volume.read(first_boot.PACKAGE) == package.read_bytes()
        assert b"systemd.run=" in volume.read("cmdline.txt")
    fsck = shutil.which("fsck.vfat", path=PATH)
    if fsck is not None:
        alone = small_card.with_name("alone.img")
        alone.write_bytes(written[8 * MIB : len(image)])
        checked = subprocess.run([fsck, "-n", alone], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
    # The card that was written is prepared once more, and is as it was.
    answer = run(*given, "--yes", named.id)
    assert answer.exit_code == 0, answer.output
    assert "written" not in answer.output
    assert hashlib.sha256(content(device)).digest() == hashlib.sha256(written).digest()


def test_whoever_writes_has_to_name_the_disk(
    attach: Callable[..., Path], small_card: Path, package: Path
) -> None:
    device = attach(49)
    named = disk.describe(device)
    given = ("--package", package, "--device", device, "--image", small_card)
    before = content(device)
    for typed in ("y\n", "\n", "sda\n"):
        answer = run(*given, answer=typed)
        assert answer.exit_code == 1
        assert f"Everything on {device} is lost: {named} (id {named.id})." in answer.output
    answer = run(*given, "--yes", "another-disk-31914983424")
    assert isinstance(answer.exception, WrongUse)
    assert f"another disk than {device}: that is {named} with the id {named.id}" in str(answer.exception)
    assert content(device) == before
    answer = run(*given, answer=f"{device.name}\n")
    assert answer.exit_code == 0, answer.output
    # Only the boot partition: a question is enough.
    given = (*given[:-2], "--label", "a=b")
    answer = run(*given, answer="n\n")
    assert answer.exit_code == 1 and f"boot partition of {device}: {named}?" in answer.output
    assert run(*given, answer="y\n").exit_code == 0


def test_what_can_not_be_written_is_told_before_anything_is(
    attach: Callable[..., Path], small_card: Path, package: Path, tmp_path: Path
) -> None:
    small, protected = attach(40), attach(56, "--read-only")
    given = ("--package", package, "--image", small_card)
    # Nobody is asked about what can't be.
    for more in (("--yes", disk.describe(small).id), ("--dry-run",), ()):
        answer = run(*given, "--device", small, *more, answer=f"{small.name}\n")
        assert "take a larger card" in str(answer.exception)
        assert "is lost" not in answer.output
    assert content(small) == OLD * (40 * MIB // len(OLD))
    answer = run(*given, "--device", protected)
    assert "write protected" in str(answer.exception)
    answer = run("--package", package, "--image", small)
    assert "name it with --device" in str(answer.exception)
    # The image is looked at first.
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    answer = run("--package", package, "--image", other, "--device", small, "--yes", disk.describe(small).id)
    assert "is no image of a Raspberry Pi's system" in str(answer.exception)
    assert content(small) == OLD * (40 * MIB // len(OLD))


def test_a_mounted_disk_is_refused_by_this_program_and_by_the_kernel(
    attach: Callable[..., Path], small_card: Path, package: Path, tmp_path: Path
) -> None:
    device = attach(56)
    mkfs, mount = (shutil.which(name, path=PATH) for name in ("mkfs.ext4", "mount"))
    if mkfs is None or mount is None:
        pytest.skip("mkfs.ext4 or mount is not here (Debian: e2fsprogs, mount)")
    subprocess.run([mkfs, "-q", "-F", device], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    given = (
        "--package",
        package,
        "--image",
        small_card,
        "--device",
        device,
        "--yes",
        disk.describe(device).id,
    )
    subprocess.run([mount, device, place], check=True)
    try:
        before = content(device)
        answer = run(*given)
        assert f"{device.name} is mounted on {place}" in str(answer.exception)
    finally:
        subprocess.run(["umount", place], check=True)
    # Somewhere this program can't see, as a container's or another user's is.
    script = f'mount "{device}" "{place}" && echo mounted && read line'
    elsewhere = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with elsewhere:
        assert elsewhere.stdin is not None and elsewhere.stdout is not None
        if elsewhere.stdout.readline() != "mounted\n":
            pytest.skip("no mount of somebody else's can be made here")
        assert disk.describe(device).refusal == ""
        answer = run(*given)
        assert "in use (the kernel says so)" in str(answer.exception)
        elsewhere.stdin.write("\n")
        elsewhere.stdin.flush()
    assert len(content(device)) == len(before)
    with device.open("rb") as file:
        file.seek(1080)
        assert file.read(2) == b"\x53\xef", "the file system is there still (ext4's magic)"


def test_another_disk_that_comes_while_somebody_is_asked_is_not_written(
    attach: Callable[..., Path],
    small_card: Path,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = attach(56)
    other = tmp_path / "other.img"
    other.write_bytes(OLD * (60 * MIB // len(OLD)))

    def exchanged(*_: object, **__: object) -> str:
        losetup("--detach", device)
        losetup(device, other)
        return device.name

    monkeypatch.setattr("click.prompt", exchanged)
    answer = run("--package", package, "--image", small_card, "--device", device)
    assert isinstance(answer.exception, CliError)
    assert "by now: nothing was written" in str(answer.exception)
    assert content(device) == other.read_bytes() == OLD * (60 * MIB // len(OLD))


def test_who_may_not_write_is_told_before_the_question(
    attach: Callable[..., Path], small_card: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = attach(56)
    # Root may do anything: the answer that everybody else gets.
    may = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != device and may(path, mode))
    for given in (("--image", small_card), (), ("--dry-run",)):
        answer = run("--package", package, "--device", device, *given, answer=f"{device.name}\n")
        assert f"{device} may be written by root only: sudo" in str(answer.exception)
        assert "is lost" not in answer.output
    # What the disk's id is, everybody may see.
    answer = run("--package", package, "--device", device, "--image", small_card, "--dry-run")
    assert answer.exit_code == 0 and f"--yes {disk.describe(device).id}" in answer.output


def test_a_card_that_is_pulled_out_is_told(
    attach: Callable[..., Path], small_card: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = attach(56)
    given = ("--package", package, "--device", device, "--yes", disk.describe(device).id)
    assert run(*given, "--image", small_card).exit_code == 0

    def gone(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk, "forget", gone)
    answer = run(*given, "--label", "a=b")
    assert isinstance(answer.exception, CliError)
    assert str(answer.exception) == f"{device}: Input/output error; is the card gone, or broken?"
