"""A Raspberry-Pi-like board out of nothing: a root file system, a card image, and QEMU that boots it.

What is real: the processor's instructions (QEMU's cortex-a72), Debian's arm64 kernel, systemd, dpkg, the
network stack, the layout of the card. What is not: the Raspberry Pi's boot loader (here QEMU takes the
command line from the FAT partition, as the loader does), its devices, and every timing.

Sources: mmdebstrap(1) (the variant "extract" needs no emulation), QEMU's documentation of the machine "virt",
of its user network and of QMP (`set_link`), kernel-command-line(7) of systemd.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = {
    "qemu-system-aarch64": "qemu-system-arm",
    "mmdebstrap": "mmdebstrap",
    "mkfs.vfat": "dosfstools",
    "mkfs.ext4": "e2fsprogs",
    "sfdisk": "fdisk",
    "cpio": "cpio",
    "modprobe": "kmod",
    "mcopy": "mtools",
}
# Debian's essential packages, without which there is no first boot, what the agent's package depends on, and
# what the tests look with.
PACKAGES = (
    "base-files",
    "base-passwd",
    "bash",
    "bsdutils",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "dpkg",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "init-system-helpers",
    "libc-bin",
    "libpam-modules",
    "login",
    "mawk",
    "mount",
    "ncurses-bin",
    "perl-base",
    "sed",
    "sysvinit-utils",
    "tar",
    "systemd",
    "systemd-sysv",
    "systemd-timesyncd",
    "dbus",
    "udev",
    "python3",
    "libstdc++6",
    "ca-certificates",
    "passwd",
    "busybox-static",
    "iproute2",
    "procps",
    "kmod",
    "util-linux",
    "linux-image-arm64",
    "cloud-init",
    "netplan.io",
    "netcat-openbsd",
    "eatmydata",
)
# As Raspberry Pi OS has it since its cloud-init: the boot partition is the source.
_CLOUD_CONFIG = """\
datasource_list: [NoCloud, None]
datasource:
  NoCloud:
    seedfrom: file:///boot/firmware/
# Those that need no more than is on this card: neither sshd nor locales nor resize2fs.
cloud_init_modules: [bootcmd, write-files, set_hostname, update_hostname, update_etc_hosts, users-groups]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user, final-message]
"""
_MODULES = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "ext4",
    "vfat",
    "nls_cp437",
    "nls_ascii",
)
_FAT_SECTOR = 8192  # 4 MiB, as Raspberry Pi OS has it
_FAT_MIB, _ROOT_MIB = 512, 1800
# systemd-networkd, as Raspberry Pi OS has NetworkManager: any of them.
_NETWORK = "[Match]\nName=e*\n[Network]\nDHCP=ipv4\n"
_FSTAB = "/dev/vda2 / ext4 rw,noatime 0 1\n/dev/vda1 /boot/firmware vfat defaults 0 2\n"
# One card serves both ways of the first boot: this word makes of it a system that has no cloud-init.
COMMAND_LINE = "console=ttyAMA0 root=/dev/vda2 rootfstype=ext4 rw rootwait"
_WITHOUT_CLOUD_INIT = "cloud-init=disabled"
# What the programs on the board say is heard on the console: it says more than a network that is cut.
_HEARD = "systemd.journald.forward_to_console=1"
# A fifth of the emulator's time: address spaces apart (for which it forgets its translations at every call of
# the kernel), and memory that is cleared when it is handed out.
_SPARED = "mitigations=off kpti=off nokaslr init_on_alloc=0"
_CABLE = "cable"


class Unbuildable(Exception):
    """A program is missing, or failed; the message says which."""


def missing() -> list[str]:
    """Debian packages that building and booting need and this machine lacks."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})


def run(*command: object, cwd: Path | None = None, text: str | None = None) -> str:
    """What the program says. Raises Unbuildable with its words when it fails."""
    environment = os.environ | {
        "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
        "MTOOLS_SKIP_CHECK": "1",
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        input=text,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Unbuildable(f"{command[0]} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Inside the context no other process has ``path``: what is made once is made by one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class System:
    """A card as it is written from a download, and the kernel and the first programs that start from it."""

    card: Path
    kernel: Path
    initrd: Path


def system(suite: str, cache: Path, python: str) -> System:
    """Debian for arm64, made once and kept in ``cache``. Raises Unbuildable.

    ``python`` is an interpreter of the version that the suite has: it compiles the suite's own modules, as
    the packages' scripts do on a real card.
    """
    mark = hashlib.sha256(f"{suite} {Path(__file__).read_text()}".encode()).hexdigest()[:12]
    home = cache / f"{suite}-{mark}"
    made = System(home / "card.img", home / "vmlinuz", home / "initrd.img")
    with held(cache / "lock"):
        if not made.card.exists():
            for older in cache.glob(f"{suite}-*"):
                shutil.rmtree(older)
            _make(suite, home, made, python)
    return made


def _make(suite: str, home: Path, made: System, python: str) -> None:
    home.mkdir(parents=True)
    root = home / "root"
    run(
        "mmdebstrap",
        "--quiet",
        "--architectures=arm64",
        "--variant=extract",
        f"--include={','.join(PACKAGES)}",
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        "--skip=cleanup/apt",
        suite,
        root,
    )
    _register(root)
    kernel = next(root.glob("boot/vmlinuz-*"))
    shutil.copyfile(kernel, made.kernel)
    _make_initrd(root, kernel.name.removeprefix("vmlinuz-"), home / "early", made.initrd)
    _configure(root)
    _compile(root, python)
    fresh = made.card.with_suffix(".part")
    _write_card(root, fresh)
    shutil.rmtree(root)
    fresh.rename(made.card)


def _register(root: Path) -> None:
    """Tells dpkg what is there: "extract" unpacks the packages and configures none."""
    information = root / "var/lib/dpkg/info"
    information.mkdir(parents=True, exist_ok=True)
    status = []
    for deb in sorted(root.glob("var/cache/apt/archives/*.deb")):
        control = run("dpkg-deb", "--field", deb)
        fields = dict(line.split(": ", 1) for line in control.splitlines() if ": " in line and line[0] != " ")
        name = fields["Package"]
        status.append(
            control.replace(f"Package: {name}\n", f"Package: {name}\nStatus: install ok installed\n", 1)
        )
        listed = run("dpkg-deb", "--contents", deb)
        paths = [
            line.split(None, 5)[5].partition(" -> ")[0].removeprefix(".").rstrip("/")
            for line in listed.splitlines()
        ]
        file = f"{name}:arm64" if fields.get("Multi-Arch") == "same" else name
        (information / f"{file}.list").write_text("".join(f"{path or '/.'}\n" for path in paths))
    (root / "var/lib/dpkg/status").write_text("\n".join(status))
    for name in ("available", "lock", "lock-frontend"):
        (root / "var/lib/dpkg" / name).touch()
    for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()


def _make_initrd(root: Path, version: str, folder: Path, out: Path) -> None:
    """Loads the drivers of QEMU's devices and goes on to the card."""
    for name in ("bin", "proc", "sys", "dev", "mnt", "lib"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / "usr/bin/busybox", folder / "bin/busybox")
    (folder / "bin/busybox").chmod(0o755)
    run("depmod", "-b", root, version)
    names: list[str] = []
    for module in _MODULES:
        for line in run("modprobe", "-d", root, "-S", version, "--show-depends", module).splitlines():
            kind, _, path = line.partition(" ")
            place = Path(path.strip())
            if kind == "insmod" and place.name not in names:
                shutil.copyfile(place, folder / "lib" / place.name)
                names.append(place.name)
    (folder / "mods").write_text("".join(f"{name}\n" for name in names))
    (folder / "init").write_text(
        "#!/bin/busybox sh\n"
        "B=/bin/busybox\n"
        "$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev\n"
        "while read module; do $B insmod /lib/$module; done </mods\n"
        "n=0; while [ ! -b /dev/vda2 ] && [ $n -lt 100 ]; do $B sleep 0.1; n=$((n+1)); done\n"
        "$B mount -t ext4 -o rw /dev/vda2 /mnt || exec $B sh\n"
        "$B umount /sys; $B umount /proc; $B mount --move /dev /mnt/dev\n"
        "exec $B switch_root /mnt /sbin/init\n"
    )
    (folder / "init").chmod(0o755)
    files = run("find", ".", cwd=folder)
    with out.open("wb") as file:
        archive = subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"],
            cwd=folder,
            input=files.encode(),
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        file.write(archive)
    shutil.rmtree(folder)


def _compile(root: Path, python: str) -> None:
    """Python's own modules and cloud-init's, without which every start on the board compiles them anew."""
    folders = sorted(root.glob("usr/lib/python3*"))
    how = ("--invalidation-mode", "unchecked-hash", "-q", "-j", "0", "-s", root, "-p", "/")
    run(python, "-I", "-m", "compileall", *how, *folders)


def _configure(root: Path) -> None:
    """What the packages' own scripts would have done, as far as a first boot needs it."""
    for path in ("usr/lib/modules", "boot", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(root / path, ignore_errors=True)
    # mmdebstrap takes these from the machine that it runs on, and some lead out of the folder.
    for path in ("etc/resolv.conf", "etc/hostname", "etc/apt/sources.list", "etc/machine-id", "etc/hosts"):
        (root / path).unlink(missing_ok=True)
    shutil.rmtree(root / "etc/apt/sources.list.d", ignore_errors=True)

    def write(path: str, text: str) -> None:
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_symlink() or place.exists():
            place.unlink()
        place.write_text(text)

    def enable(unit: str, wanted_by: str) -> None:
        place = root / "etc/systemd/system" / f"{wanted_by}.wants" / unit
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(f"/usr/lib/systemd/system/{unit}")

    masters = root / "usr/share/base-passwd"
    passwd = (masters / "passwd.master").read_text().replace("root:*:", "root::", 1)
    write("etc/passwd", passwd + "messagebus:x:100:107::/nonexistent:/usr/sbin/nologin\n")
    write("etc/group", (masters / "group.master").read_text() + "messagebus:x:107:\n")
    write("etc/hostname", "board\n")
    write("etc/hosts", "127.0.0.1\tlocalhost\n127.0.1.1\tboard\n")
    # Empty: made at the first boot, as on an image for many cards.
    write("etc/machine-id", "")
    write("etc/fstab", _FSTAB)
    write("etc/resolv.conf", "nameserver 10.0.2.3\n")
    write("etc/systemd/network/10-wired.network", _NETWORK)
    (root / "boot/firmware").mkdir(parents=True)
    enable("systemd-networkd.service", "multi-user.target")
    enable("systemd-networkd-wait-online.service", "network-online.target")
    default = root / "etc/systemd/system/default.target"
    default.unlink(missing_ok=True)
    default.symlink_to("/usr/lib/systemd/system/multi-user.target")
    for unit in (
        "systemd-binfmt.service",
        "proc-sys-fs-binfmt_misc.automount",
        "apt-daily.timer",
        "dpkg-db-backup.timer",
    ):
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
    write("etc/cloud/cloud.cfg.d/99_raspberry-pi.cfg", _CLOUD_CONFIG)
    units = (
        "cloud-init-local",
        "cloud-init",
        "cloud-config",
        "cloud-final",
        "cloud-init-main",
        "cloud-init-network",
    )
    for unit in units:
        if (root / f"usr/lib/systemd/system/{unit}.service").exists():
            enable(f"{unit}.service", "cloud-init.target")
    # A card waits for each of thousands of files to be written; an emulated one, of which nobody keeps
    # anything, need not.
    write("etc/dpkg/dpkg.cfg.d/emulated", "force-unsafe-io\n")
    # The network is networkd's here: netplan would write the same again.
    write("etc/cloud/cloud.cfg.d/98_network.cfg", "network: {config: disabled}\n")
    run("ldconfig", "-r", root)


def _write_card(root: Path, out: Path) -> None:
    """An image with the two partitions of Raspberry Pi OS; nothing is mounted for it."""
    root_sector = _FAT_SECTOR + _FAT_MIB * 2048
    with out.open("wb") as file:
        file.truncate((root_sector + _ROOT_MIB * 2048) * 512)
    sizes = (_FAT_MIB * 2048, _ROOT_MIB * 2048)
    table = (
        "label: dos\nlabel-id: 0x1234abcd\n"
        f"start={_FAT_SECTOR}, size={sizes[0]}, type=c\nstart={root_sector}, size={sizes[1]}, type=83\n"
    )
    run("sfdisk", "--quiet", out, text=table)
    run("mkfs.vfat", "-F", "32", "-n", "bootfs", "--offset", _FAT_SECTOR, out, _FAT_MIB * 1024)
    place = f"offset={root_sector * 512},nodiscard,lazy_itable_init=1"
    run("mkfs.ext4", "-q", "-F", "-L", "rootfs", "-E", place, "-d", root, out, f"{_ROOT_MIB}M")
    put_boot(out, "config.txt", "# config.txt\narm_64bit=1\n")


def card(made: System, out: Path, *, cloud_init: bool) -> Path:
    """A card of the system that takes orders for its first boot in one way or the other."""
    run("cp", "--sparse=always", made.card, out)
    if cloud_init:
        # As on an image as it is downloaded: comments, and nothing set.
        put_boot(out, "user-data", "#cloud-config\n# nothing yet\n")
        put_boot(out, "meta-data", "# instance-id: rpios-image\n")
    words = COMMAND_LINE if cloud_init else f"{COMMAND_LINE} {_WITHOUT_CLOUD_INIT}"
    put_boot(out, "cmdline.txt", words + "\n")
    return out


def fat(image: Path) -> str:
    """The boot partition, as mtools names it."""
    return f"{image}@@{_FAT_SECTOR * 512}"


def put_boot(image: Path, name: str, text: str) -> None:
    """Writes a file onto the boot partition."""
    scratch = image.with_suffix(".file")
    scratch.write_text(text)
    run("mcopy", "-o", "-i", fat(image), scratch, f"::{name}")
    scratch.unlink()


def read_boot(image: Path, name: str) -> str:
    """A file on the boot partition; by mtools, which share no code with what wrote it."""
    return run("mtype", "-i", fat(image), f"::{name}")


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Machine:
    """One life of the board: from power on to power off.

    It has two network cards. One leads to this machine, as a board's cable leads to the network that its
    collector is in, and can be pulled. By the other nothing is reached from the board, and only the agent on
    the board: so that a test sees what the board does while its cable is out.
    """

    def __init__(
        self,
        made: System,
        image: Path,
        log: Path,
        port: int,
        *,
        cpu: str = "cortex-a72",
        memory_mib: int = 2048,
    ) -> None:
        """``port`` on this machine's loopback leads to the agent's on the board."""
        self.log_path = log
        self.cpu_seconds = 0.0
        """That QEMU has taken, by when it was last waited for."""
        words = read_boot(image, "cmdline.txt").strip()
        program = os.environ.get("BOARDBENCH_QEMU_SYSTEM", "qemu-system-aarch64")
        options = (
            ("-M", "virt"),
            ("-cpu", cpu),
            ("-accel", "tcg,thread=multi"),
            ("-smp", "2"),
            ("-m", str(memory_mib)),
            ("-display", "none"),
            ("-qmp", "stdio"),
            ("-serial", f"file:{log}"),
            ("-kernel", str(made.kernel)),
            ("-initrd", str(made.initrd)),
            ("-append", f"{words} {_HEARD} {_SPARED}"),
            # What the board has not handed to its disk yet is lost with its power.
            ("-drive", f"file={image},format=raw,if=none,id=card,cache=unsafe"),
            ("-device", "virtio-blk-device,drive=card"),
            ("-netdev", f"user,id={_CABLE}"),
            ("-device", f"virtio-net-device,netdev={_CABLE}"),
            ("-netdev", f"user,id=side,net=10.0.3.0/24,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:7341"),
            ("-device", "virtio-net-device,netdev=side"),
            ("-device", "virtio-rng-pci"),
        )
        self.process = subprocess.Popen(
            [program, "-no-reboot", *(word for option in options for word in option)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
        )
        self._order("qmp_capabilities")

    def _order(self, command: str, **arguments: object) -> None:
        """QEMU does it (QMP)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            answer = json.loads(line)
            if "return" in answer:
                return
            assert "error" not in answer, answer
        raise AssertionError(f"QEMU has ended before it did {command}")

    def cable(self, *, plugged: bool) -> None:
        """Pulls the cable, or plugs it in again; the board sees it, and nobody is told anything."""
        self._order("set_link", name=_CABLE, up=plugged)

    def log(self) -> str:
        """What the console has shown."""
        try:
            return self.log_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def until(self, what: str, check: Callable[[], object], seconds: float, pause: float = 0.5) -> object:
        """The first true answer; fails with the end of the console's log."""
        deadline = time.monotonic() + seconds
        while not (answer := check()):
            if self.process.poll() is not None:
                raise AssertionError(f"the board went off while waiting until {what}:\n{self.log()[-6000:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds:.0f} s in vain until {what}:\n{self.log()[-6000:]}")
            time.sleep(pause)
        self._look_at_clock()
        return answer

    def until_off(self, seconds: float) -> None:
        """Returns when the board has gone off by itself (or wanted to start again)."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self._look_at_clock()
            if time.monotonic() > deadline:
                raise AssertionError(f"the board is still on after {seconds:.0f} s:\n{self.log()[-6000:]}")
            time.sleep(0.2)

    def _look_at_clock(self) -> None:
        with contextlib.suppress(OSError, IndexError):
            told = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            self.cpu_seconds = (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")

    def cut_power(self) -> None:
        """No power from one moment to the next."""
        self._look_at_clock()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def powered(made: System, image: Path, log: Path, port: int) -> Iterator[Machine]:
    """The board, on inside the context."""
    machine = Machine(made, image, log, port)
    try:
        yield machine
    finally:
        machine.cut_power()
